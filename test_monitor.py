#!/usr/bin/env python3
"""Tests of the Contextuate Monitor.

    python3 test_monitor.py --setup           install what the tests need, then run them all
    python3 test_monitor.py [pytest options]  run the tests (-k NAME for some of them, -m "not slow" without soak tests)
    python3 test_monitor.py --bench [NAME] [--json FILE]   run the benchmarks of .ci/bench.py

The tests use real parts: the installed hook command, monitor and Redis processes, an independent WebSocket client,
headless Chromium, recorded payloads (.ci/recorded), kills and full disks. What a machine lacks is skipped and
listed at the end. The program itself needs none of this. Rules and texts that tests try one by one are in .ci/stories.

Order: helpers and fixtures · then the rooms of the program in their order, from hook to page · faults.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import calendar
import collections
import colorsys
import concurrent.futures
import contextlib
import dataclasses
import datetime
import difflib
import dis
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import plistlib
import pty
import pwd
import queue
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import types
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [ROOT, os.path.join(ROOT, ".ci")]

import setup

if __name__ == "__main__":
    setup.main()  # continues as pytest or as .ci/bench.py; the packages below may be missing until then

import playwright.sync_api
import pytest
import websockets
import websockets.sync.client
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import contextuate_monitor as cm
import emit_event as ee

# ---- Helpers and fixtures ----------------------------------------------------------------------------------

# A busy machine is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

with contextlib.suppress(ValueError):  # not in the main thread
    # Where the tests run in the background SIGINT is ignored, and every process that they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

RECORDED = os.path.join(ROOT, ".ci", "recorded", "hook-payloads")
PYTHON = cm.base_interpreter()
BROWSER = setup.find_browser()
NOW_MS = 1_795_500_000_000  # a fixed "now" for tests without a clock


def unmount(place: str | os.PathLike[str]) -> None:
    """Take a mounted disk away, though the threads of a killed process may hold its files a moment longer."""
    subprocess.run(["umount", "-l", place], check=True)


def eventually(condition: Any, timeout_s: float = 15.0, what: str = "") -> Any:
    """Return the condition's first true value; fail when there is none in time."""
    begin = time.monotonic()
    while not (value := condition()):
        waited_s = time.monotonic() - begin
        if waited_s > timeout_s:
            raise AssertionError(f"not in {timeout_s} s: {what or condition}; last value {value!r}")
        time.sleep(min(0.1, max(0.02, waited_s / 10)))  # who waits long looks less often
    return value


def install_text(path: object) -> str:
    return pathlib.Path(str(path)).read_text(encoding="utf-8")


@functools.cache
def story_parts(name: str) -> dict[str, list[str]]:
    """Return the parts of a file of .ci/stories, whose notation is at its head: title → lines."""
    _, *parts = re.split(r"^=== (.*)\n", install_text(os.path.join(ROOT, ".ci/stories", name)), flags=re.M)
    signs = {0x2400 + code: code for code in range(33)}
    texts = [re.sub("⟨(.*?)×(\\d+)⟩", lambda it: it[1] * int(it[2]), part) for part in parts[1::2]]
    lines = ([it.translate(signs) for it in text.split("\n") if it] for text in texts)
    return dict(zip(parts[::2], lines))


def story_value(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def story_cases(name: str, part: str) -> dict[str, list[Any]]:
    """Return the rows `TITLE: VALUE → VALUE …` of a part of a story file; a value is JSON, or else the text itself."""
    rows = [line.partition(": ") for line in story_parts(name)[part]]
    cases = {title: list(map(story_value, values.split(" → "))) for title, _, values in rows}
    assert len(cases) == len(rows), "each title once"
    return cases


def story_table(name: str, part: str, arguments: str) -> Any:
    """Parametrize a test by a part's rows; where it has an argument more than a row has values, by their titles, too."""
    cases, count = story_cases(name, part), arguments.count(",") + 1
    rows = [values[0] if count == 1 else [title, *values][-count:] for title, values in cases.items()]
    return pytest.mark.parametrize(arguments, rows, ids=cases)


def protected(event: dict[str, Any], privacy: ee.Privacy) -> dict[str, Any]:
    """Protect an event; its JSON, which comes along, must be what anybody would make of it."""
    event, encoded = ee.protect(event, privacy)
    assert encoded == ee.encode_json(event)
    return event


def recording_names() -> list[str]:
    return sorted(os.path.basename(path)[: -len(".jsonl")] for path in glob.glob(RECORDED + "/*.jsonl"))


@functools.cache
def recorded_lines(name: str) -> list[bytes]:
    """Return a recording's payloads as the client sent them; lines end at \\n only."""
    return spool_read(f"{RECORDED}/{name}.jsonl")


def recorded(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorded_lines(name)]


def status_line(session: str = "s1", five: Any = None, seven: Any = None, **changes: Any) -> dict[str, Any]:
    """Return the recorded object of a status line; `five`, `seven`: (percent, time of reset in s) of the limits."""
    recorded_line = json.loads(install_text(os.path.join(ROOT, ".ci/recorded/statusline.json")))
    line: dict[str, Any] = {**recorded_line, "session_id": session}
    for name, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(line.get(name), dict)
        line[name] = {**line[name], **value} if is_part else value
    windows = {"five_hour": five, "seven_day": seven}
    limits = {name: dict(zip(("used_percentage", "resets_at"), it)) for name, it in windows.items() if it}
    return {**line, "rate_limits": limits} if limits else line


FORK_SERVER = """if True:
    import json, os, signal, socket, sys
    import contextuate_monitor
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no test shall find a zombie
    with socket.socket(fileno=0) as requests:
        while (request := socket.recv_fds(requests, 1 << 20, 1))[1]:
            if os.fork():
                os.close(request[1][0])
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            os.dup2(request[1][0], 2)
            sys.stderr = open(2, "w")  # that of the server may be a file
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.closerange(3, 16)
            os.environ.clear()
            os.environ.update(json.loads(request[0]))
            sys.exit(contextuate_monitor.main(["start", "--foreground", "--detached"]))
"""


@functools.lru_cache(None)
def fork_server() -> socket.socket:
    """Start a process that has imported the monitor, and forks one for each environment that is sent to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER], cwd=ROOT, stdin=theirs, stdout=subprocess.DEVNULL
        )
    return ours


@dataclasses.dataclass
class RunningMonitor:
    """A monitor process of its own home, and what tests do with it."""

    home: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    program: str = os.path.join(ROOT, "contextuate_monitor.py")

    def __post_init__(self) -> None:
        self.socket_path, self.claude_home = self.home + "/m.sock", self.home + "/claude"
        self.write_config({})
        self.about: dict[str, Any] = {}
        self.clients: list[TestClient] = []

    def write_config(self, more: dict[str, Any]) -> None:
        """Write the configuration: free ports, a socket of its own, and what the test wants."""
        config: dict[str, Any] = {"socketPath": self.socket_path, "server": {"port": 0, "wsPort": 0}}
        for key, value in {**self.config, **more}.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        pathlib.Path(self.home + "/monitor.config.json").write_text(json.dumps(config))

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process that belongs to this monitor."""
        # bytecode is allowed, whatever holds here: users have it, and a start takes half the time
        others = ("CONTEXTUATE", "CLAUDE", "PYTHONDONTWRITEBYTECODE")
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith(others)},
            "CONTEXTUATE_HOME": self.home,
            "CLAUDE_CONFIG_DIR": self.claude_home,
            "CONTEXTUATE_MACHINE_ID": "testbox",
        }

    def command(self, *arguments: str, check: bool = True, **options: Any) -> Any:
        """Run one command of the command line: the program as a module, so that it is compiled only once."""
        program = [self.program]
        if self.program == os.path.join(ROOT, "contextuate_monitor.py") and "cwd" not in options:
            program, options["cwd"] = ["-m", "contextuate_monitor"], ROOT
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False, **options,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{arguments} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def start(self) -> RunningMonitor:
        self.command("start", "--no-open")
        return self.know()

    def serve(self, **config: Any) -> RunningMonitor:
        """Start what `start` starts, by `fork_server`: half a second less for each test."""
        if config:
            self.write_config(config)
        if "redis" in (self.config.get("mode"), config.get("mode")):  # else it runs a Python to find redis-py
            ee.make_private_directory(self.home + "/hooks")
            ee.write_atomically(self.home + "/hooks/publisher-python", os.fsencode(sys.executable) + b"\n")
        read_end, write_end = os.pipe()
        socket.send_fds(fork_server(), [json.dumps(self.environment).encode()], [write_end])
        os.close(write_end)
        with open(read_end, "rb") as reports:
            said = reports.read()  # it is closed when the monitor serves
            assert b"error" not in said, said
        return self.know()

    def know(self) -> RunningMonitor:
        """Read what the running monitor says about itself."""
        self.about = json.loads(install_text(self.home + "/monitor.run.json"))
        return self

    pid, port = property(lambda self: int(self.about["pid"])), property(lambda self: int(self.about["port"]))
    ws_port = property(lambda self: int(self.about["wsPort"]))
    url = property(lambda self: f"http://127.0.0.1:{self.port}/")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: not alive(self.pid), what="the monitor's end")

    def stop(self) -> None:
        self.command("stop")

    def request(
        self, path: str, method: str = "GET", body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Make one HTTP request; return status, headers in lower case, body."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)) as connection:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, response.read()

    def get(self, path: str) -> Any:
        status, _, body = self.request(path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Return every session by its id, once every stored one has been read."""
        eventually(lambda: self.get("/api/status")["loading"] is None, 60, "the stored sessions")
        return self.sessions_so_far()

    def counts(self) -> dict[str, Any]:
        return {name: session["counts"] for name, session in self.sessions().items()}

    def sessions_so_far(self) -> dict[str, dict[str, Any]]:
        return {session["sessionId"]: session for session in self.get("/api/sessions?hidden=1")["sessions"]}

    def stored_events(self) -> list[dict[str, Any]]:
        """Read every event file, in order of arrival; a write that is under way is waited for."""

        def whole_lines(path: str) -> list[str]:
            content = install_text(path)
            return content.splitlines() if content.endswith("\n") else []

        events = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            if os.path.getsize(path):
                lines = eventually(functools.partial(whole_lines, path), 15, f"a whole last line in {path}")
                events += [json.loads(line) for line in lines]
        return sorted(events, key=lambda event: event["seq"])

    def stored_events_allowing_a_torn_line(self) -> list[dict[str, Any]]:
        """Read every event file right after a kill: a last line may be torn, it was not acknowledged."""
        return [json.loads(line) for line in journal_plain_lines(self.home + "/events")]

    def websocket(self, view: str | None = "full", **subscription: Any) -> TestClient:
        """Connect an independent WebSocket client, and subscribe."""
        client = TestClient(websockets.sync.client.connect(
            f"ws://127.0.0.1:{self.ws_port}/", max_size=None, open_timeout=10, close_timeout=2,
            compression=None, ping_interval=None,
        ))  # fmt: skip
        self.clients.append(client)
        client.hello = client.next("hello")
        if view is not None:
            client.subscribed = client.ask("subscribed", type="subscribe", view=view, **subscription)
        return client

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(15)
        sock.connect(self.socket_path)
        return sock

    def emit(self, *events: dict[str, Any]) -> None:
        """Send events over the Unix socket and wait until they are stored."""
        with self.connect() as sock:
            sock.sendall(b"".join(json.dumps(event).encode() + b"\n" for event in events))
            received = sock.makefile("rb").read(len(events))
            assert received == ee.ACKNOWLEDGEMENT * len(events), "the monitor closed the connection"

    def client_settings(self) -> dict[str, Any]:
        return dict(json.loads(install_text(self.claude_home + "/settings.json")))

    def installed_command(self, *options: str) -> str:
        """Install the hook and return the command that Claude Code would run."""
        in_process(self, "install", *options)
        return str(self.client_settings()["hooks"]["PreToolUse"][0]["hooks"][0]["command"])


class TestClient:
    """A WebSocket client by another author, with the messages that were not asked for yet (`others`)."""

    __test__ = False

    def __init__(self, connecting: Any) -> None:
        self._connecting, self.connection = connecting, connecting.__enter__()
        self.hello: dict[str, Any] = {}
        self.subscribed: dict[str, Any] = {}
        self.others: list[dict[str, Any]] = []

    def send(self, **message: Any) -> None:
        self.connection.send(json.dumps(message))

    def next(self, kind: str, timeout_s: float = 15.0, **fields: Any) -> dict[str, Any]:
        """Return the next message of one kind with these fields; others are kept for later."""

        def is_wanted(message: dict[str, Any]) -> bool:
            return message["type"] == kind and all(message.get(name) == fields[name] for name in fields)

        deadline, waiting = time.monotonic() + timeout_s, self.others
        while True:
            for message in filter(is_wanted, waiting):
                self.others.remove(message)
                return message
            self.others += self.receive(max(0.001, deadline - time.monotonic()))

    def receive(self, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Return the next message, or what is in one of `several`."""
        message = json.loads(self.connection.recv(timeout=timeout_s))
        return list(message["messages"]) if message["type"] == "several" else [message]

    def ask(self, answer: str, **message: Any) -> dict[str, Any]:
        self.send(**message)
        return self.next(answer)

    def events(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        return [self.next("event", timeout_s)["event"] for _ in range(count)]

    def close(self) -> None:
        self._connecting.__exit__(None, None, None)


def alive(pid: int) -> bool:
    """True if a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            return fields[0] not in (b"Z", b"X") or int(fields[17]) > 1  # its other threads have its sockets
    except OSError:
        return False


def run_hook(command: str, payload: bytes, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """Run the hook as Claude Code does: through /bin/sh, in a session of its own."""
    options: Any = {"capture_output": True, "timeout": 30, "start_new_session": True}
    return subprocess.run(["/bin/sh", "-c", command], input=payload, env=environment, **options)


def new_home() -> str:
    """Make a short-named directory for a monitor: a Unix socket's path has at most 107 bytes."""
    return tempfile.mkdtemp(prefix="ctx-", dir="/tmp")


def clean_up(monitor: RunningMonitor) -> None:
    """End the monitor if it runs, and remove its directory."""
    for client in monitor.clients:
        client.close()
    pid = cm.lock_holder(monitor.home + "/monitor.pid")
    if pid is not None:
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not alive(pid))
    shutil.rmtree(monitor.home, ignore_errors=True)


@contextlib.contextmanager
def serving(serve: Any, *arguments: Any) -> Iterator[None]:
    """Run a function in a process of its own while the block runs."""
    process = multiprocessing.get_context("fork").Process(target=serve, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


@pytest.fixture
def monitor() -> Iterator[RunningMonitor]:
    """A monitor of its own, not yet started."""
    made = RunningMonitor(new_home())
    yield made
    clean_up(made)


@pytest.fixture
def running(monitor: RunningMonitor) -> RunningMonitor:
    """A running monitor of its own."""
    return monitor.serve()


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningMonitor]:
    """A running monitor for tests that leave no trace for others."""
    made = RunningMonitor(new_home()).start()
    yield made
    clean_up(made)


needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is missing")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")
# What may stand in place of a file: (place, some file) → None
SQUATS = {
    "a link": lambda place, file: os.symlink(file, place),
    "a broken link": lambda place, file: os.symlink(file + "-none", place),
    "a directory": lambda place, file: os.mkdir(place),
    "a fifo": lambda place, file: os.mkfifo(place),
    "a link to itself": lambda place, file: os.symlink(place, place),
    "a file": lambda place, file: shutil.copyfile(file, place),
    "another user's file": lambda place, file: os.chown(shutil.copyfile(file, place), 65534, 65534),
    "another user's directory": lambda place, file: (os.mkdir(place), os.chown(place, 65534, 65534)),
}


def payload(hook: str, session: str = "s1", **fields: Any) -> dict[str, Any]:
    """Return a hook payload with the fields every payload has."""
    return {
        "session_id": session, "transcript_path": "/nowhere.jsonl", "cwd": "/home/dev/shop",
        "hook_event_name": hook, **fields,
    }  # fmt: skip


BWRAP, UNSHARE = shutil.which("bwrap"), shutil.which("unshare")
needs_containers = pytest.mark.skipif(not (BWRAP or UNSHARE), reason="bubblewrap and unshare are missing")


def contained(place: str, *command: str, flags: str = "") -> list[str]:
    """Return the command line that runs a command in a container of its own, with `place` to write in.

    `flags`: "net" for a network of its own, "user" for the user 4242 that has no entry and no home.
    """
    name = "3f2a9c1b77de"
    if BWRAP:
        options = f"--unshare-pid --unshare-uts --hostname {name} --die-with-parent --proc /proc"
        options += " --unshare-net" * ("net" in flags)
        options += " --unshare-user --uid 4242 --gid 4242" * ("user" in flags)
        return [*f"{BWRAP} --ro-bind / / --dev /dev {options} --bind {place} {place} --".split(), *command]
    options = "--pid --fork --kill-child --mount-proc --uts" + " --net" * ("net" in flags)
    options += " --user --map-user=4242" if "user" in flags else " --user" * (os.geteuid() != 0)
    named = ["sh", "-c", 'hostname "$0" 2>/dev/null; exec "$@"', name]
    return [str(UNSHARE), *options.split(), *named, *command]


@contextlib.contextmanager
def in_container(monitor: RunningMonitor, *command: str, flags: str = "") -> Iterator[Any]:
    """Run a command in a container while the block runs; its directory is the monitor's, mounted."""
    environment = monitor.environment
    del environment["CONTEXTUATE_MACHINE_ID"]
    argv = contained(monitor.home, *command, flags=flags)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(argv, env=environment, cwd=ROOT, text=True, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said_in_container(monitor: RunningMonitor, *command: str, flags: str = "") -> str:
    with in_container(monitor, *command, flags=flags) as process:
        return str(process.communicate(timeout=60)[0])


def client_script(*payloads: dict[str, Any], then: str = "sleep 60") -> list[str]:
    """Return a command in place of the client: it runs the hook on each payload, then continues."""
    hook = f"{shlex.quote(PYTHON)} -I -S {ROOT}/emit_event.py"
    calls = [f"printf %s {shlex.quote(json.dumps(it))} | CLAUDE_PID=$$ {hook}" for it in payloads]
    return ["sh", "-c", "; ".join([*calls, then])]


# ---- The hook as a process: it always exits with 0 and prints nothing --------------------------------------
# The installed command, through /bin/sh. One installation serves every test: CONTEXTUATE_HOME says whose
# spool it is. In that copy the default socket is a path of our own, so that no test reaches a developer's
# monitor.


class HookInstallation(NamedTuple):
    """The installed hook: its command, its directory, and the socket it takes for the default one."""

    command: str
    directory: str
    default_socket: str


@pytest.fixture(scope="module")
def hook_installed() -> Iterator[HookInstallation]:
    made = RunningMonitor(new_home())
    installed = HookInstallation(made.installed_command(), made.home + "/hooks", made.home + "/default.sock")
    for name in ("hot_path.py", "emit_event.py"):
        path = f"{installed.directory}/lib/{name}"
        hook_replace(path, '"/tmp/contextuate-monitor.sock"', f'"{installed.default_socket}"')
    yield installed
    shutil.rmtree(made.home)


def hook_replace(path: str, old: str, new: str) -> None:
    """Change one file of a program that a test has to itself."""
    text = install_text(path)
    assert old in text
    pathlib.Path(path).write_text(text.replace(old, new), encoding="utf-8")


def hook_call(command: str, given_payload: Any, environment: dict[str, str], **more: str) -> str:
    """Run the hook on bytes or an object; check what must hold for every run; return its standard error."""
    line = given_payload if isinstance(given_payload, bytes) else json.dumps(given_payload).encode() + b"\n"
    done = run_hook(command, line, {**environment, **more})
    assert (done.returncode, done.stdout) == (0, b""), done
    return done.stderr.decode()


def hook_spooled(home: str, place: str = "spool") -> list[Any]:
    """Return what lies in the spool, parsed, in the order of its segments."""
    return [json.loads(line) for path, _ in ee.spool_segments(f"{home}/{place}") for line in spool_read(path)]


def hook_mode_of(path: object) -> int:
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


@dataclasses.dataclass
class HookAlone:
    """The installed hook in a home where no monitor runs (yet)."""

    installed: HookInstallation
    home: str
    environment: dict[str, str]

    def __call__(self, given_payload: Any = None, shell: str = ":", **more: str) -> str:
        """Run the hook, with notes, after what the shell does in the home; return its notes."""
        command = f"umask 0; cd '{self.home}'; set -a; {shell}; {self.installed.command}"
        more = {"HOOK": self.installed.command, "CONTEXTUATE_DEBUG": "1", **more}
        return hook_call(command, given_payload or payload("Stop"), self.environment, **more)

    def spooled(self) -> list[Any]:
        return hook_spooled(self.home)

    def socket_tried(self) -> str:
        return re.search(r"socket (\S+)", self())[1]

    @contextlib.contextmanager
    def started(self, deadline_s: float) -> Iterator[Any]:
        """Start a copy that waits so long for its input, without a shell; it must end with 0 and print nothing."""
        copy = f"{self.home}/{deadline_s}"
        shutil.copytree(self.installed.directory, copy, dirs_exist_ok=True)
        deadline = f"STDIN_DEADLINE_S = {ee.STDIN_DEADLINE_S}"
        hook_replace(copy + "/lib/hot_path.py", deadline, f"STDIN_DEADLINE_S = {deadline_s}")
        argv = [*shlex.split(self.installed.command)[:3], copy + "/emit_event.py"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(argv, env=self.environment, bufsize=0, **pipes) as hook:
            try:
                yield hook
                assert (hook.communicate(timeout=20)[0], hook.returncode) == (b"", 0)
            finally:
                hook.kill()


@pytest.fixture
def hook_alone(hook_installed: HookInstallation, monitor: RunningMonitor) -> HookAlone:
    return HookAlone(hook_installed, monitor.home, monitor.environment)


HOOK_STOP_LINE = b'{"session_id":"hook-in","hook_event_name":"Stop","x":"%s"}'
HOOK_INPUTS = {
    "one line": HOOK_STOP_LINE % b"" + b"\n",
    "no newline": HOOK_STOP_LINE % b"",
    "many lines": HOOK_STOP_LINE.replace(b",", b",\r\n ") % b"" + b"\n\n",
    "empty": b"",
    "blank": b" \n\n ",
    "half": HOOK_STOP_LINE[:30],
    "garbage": bytes(range(256)) * 40,
    "garbage that ends like an object": b"\xff\xfe{\x00}\n",
    "a list": b"[1,2]\n",
    "two objects": b"{}\n{}\n",
    "not UTF-8": HOOK_STOP_LINE % b"\xff\xc0",
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "9 MB of garbage": b"\x00\n" * 4_500_000,
}


@pytest.mark.parametrize("given_input", HOOK_INPUTS.values(), ids=HOOK_INPUTS.keys())
def test_a_hook_exits_0_and_prints_nothing_on_any_input(hook_installed, monitor, shared, given_input):
    session = f"hook-{uuid.uuid4()}"
    for environment in (monitor.environment, shared.environment):
        assert hook_call(hook_installed.command, given_input, environment) == ""
    hook_call(hook_installed.command, payload("Stop", session), shared.environment)
    eventually(lambda: shared.sessions().get(session, {}).get("state") == "idle", what="the stream goes on")


def test_the_hook_adds_what_only_the_environment_knows(hook_alone):
    more = {"CLAUDE_CODE_SESSION_ID": 'from "outside" é', "CONTEXTUATE_PARENT_SESSION": "par\nent"}
    hook_alone(b'{"hook_event_name":"Stop"}', CONTEXTUATE_MACHINE_ID="", CLAUDE_PID="x12", **more)
    (line,) = hook_alone.spooled()
    assert line["parentSessionId"] == "par\nent" and line["machineId"] == os.uname().nodename
    assert "pid" not in line
    event, directory = ee.build_event(line, 1, "m"), os.path.realpath(hook_alone.home)
    for taken in (line["sessionId"], line["cwd"]), (event["sessionId"], event["workingDirectory"]):
        assert taken == ('from "outside" é', directory)


def test_the_hook_reads_until_the_object_is_whole_not_until_eof(hook_alone):
    def is_read_or_over(hook: Any) -> bool:
        return hook.poll() is not None or fcntl.ioctl(hook.stdin, termios.FIONREAD, bytes(4)) == bytes(4)

    inputs = (b'{"a":{"b":1}}\n', b'{"a":\n{"b":1}\r\n}\n', b'{"a": "}"}\n', b'{"a": {"b": 1}}')
    for given_input in inputs:
        with hook_alone.started(deadline_s=3600) as hook:
            for at in range(len(given_input)):  # byte by byte
                with contextlib.suppress(BrokenPipeError):
                    hook.stdin.write(given_input[at : at + 1])
                eventually(functools.partial(is_read_or_over, hook))
            assert hook.wait(20) == 0
    assert [line["hook"] for line in hook_alone.spooled()] == [json.loads(line) for line in inputs]


def test_the_hook_waits_two_seconds_for_the_rest_of_an_object(hook_alone):
    assert ee.STDIN_DEADLINE_S == 2.0
    begin = time.monotonic()
    with hook_alone.started(deadline_s=0.3) as hook:
        hook.stdin.write(b'{"session_id":"s","x":{}')
        assert hook.wait(20) == 0
        assert time.monotonic() - begin > 0.3, "it gave up too early"


@story_table("hook.txt", "surroundings", "shell, tried, kept")
def test_a_hook_exits_0_in_any_surroundings(hook_installed, hook_alone, monitor, shell, tried, kept):
    notes = hook_alone({"hook_event_name": "Stop", "session_id": "s"}, shell)
    sockets = {"own": monitor.socket_path, "default": hook_installed.default_socket}
    assert tried == "-" or f"mode local, socket {sockets[tried]}\n" in notes
    spools = glob.glob(monitor.home + "/**/spool", recursive=True)
    lines = [line for spool in spools for line in hook_spooled(spool, ".")]
    kept = not os.geteuid() if kept == "for root" else kept
    assert [line["hook"]["session_id"] for line in lines] == ["s"] * kept
    for line in lines:
        assert ee.build_event(line, 1, "m")["hookType"] == "Stop"
    for path in [*spools, *glob.glob(monitor.home + "/**/spool/*", recursive=True)]:
        assert hook_mode_of(path) == (0o700 if path in spools else 0o600), "for its user alone"
    if shell.endswith(">monitor.config.json"):
        assert monitor.home + "/monitor.config.json" in install_text(monitor.home + "/emit.log")


def test_the_hook_finds_its_directory_by_environment_or_user():
    assert ee.places({b"HOME": b""}) == ee.places({})
    home = os.path.expanduser("~" + pwd.getpwuid(os.getuid()).pw_name) + "/.contextuate"
    assert ee.places({}) == (home, home + "/monitor.config.json")
    assert ee.places({b"HOME": b"/h"}) == ("/h/.contextuate", "/h/.contextuate/monitor.config.json")
    assert ee.places({b"CONTEXTUATE_HOME": b"/c", b"CONTEXTUATE_CONFIG": b"/d"}) == ("/c", "/d")
    in_settings = {b"HOME": b"/h", b"CONTEXTUATE_HOME": b"~/x", b"CONTEXTUATE_CONFIG": b"~/y"}
    assert ee.places(in_settings) == ("/h/x", "/h/y")


@needs_root
@pytest.mark.parametrize("name", ["HOME", "CONTEXTUATE_HOME"])
def test_a_hook_writes_nothing_into_another_users_home(monitor, name):
    os.chmod(monitor.home, 0o777)
    before = os.listdir(monitor.home)
    hook = f"import os, sys; sys.path[:0] = [{ROOT!r}]; import emit_event; os.setuid(65534); emit_event.run_hook()"
    hook_call(shlex.join([PYTHON, "-c", hook]), payload("Stop"), {name: monitor.home})
    assert os.listdir(monitor.home) == before


def test_a_hook_that_cannot_write_its_directory_still_delivers(hook_alone, shared):
    session, config = f"hook-{uuid.uuid4()}", shared.home + "/monitor.config.json"
    shell = f"touch file; CONTEXTUATE_HOME=$PWD/file CONTEXTUATE_CONFIG={config}"
    notes = hook_alone(payload("Stop", session), shell)
    eventually(lambda: session in shared.sessions(), what=notes)


def test_the_hooks_notes_name_config_mode_and_destination(hook_installed, hook_alone, shared):
    more = {"CONTEXTUATE_DEBUG": "1"}
    say = functools.partial(hook_call, hook_installed.command, payload("Stop", "hook-d"), shared.environment)
    notes = eventually(lambda: "has stored" in (it := say(**more)) and it)  # a busy one may be too late
    assert f"config {shared.home}/monitor.config.json: mode local, socket {shared.socket_path}" in notes
    assert "the monitor has stored" in notes and "spool" not in notes
    notes, home = hook_alone(), hook_alone.home
    assert f"config {home}/monitor.config.json: mode local, socket {home}/m.sock" in notes
    assert "no acknowledgement" in notes and f"kept in the spool: {home}/spool/" in notes
    assert "no hook payload on standard input" in hook_alone(b"\n")
    assert hook_alone(CONTEXTUATE_DEBUG="0") == ""


def test_the_hooks_log_is_bounded_and_shows_no_secret(monkeypatch, tmp_path):
    monkeypatch.setenv("CONTEXTUATE_HOME", str(tmp_path))
    secret = hook_token("", 14)
    ee.log_failure(f"failed: token={secret} is wrong")
    text = (tmp_path / "emit.log").read_text()
    assert secret not in text and "is wrong" in text
    for _ in range(4):
        ee.log_failure("x" * (200 << 10))
    assert sorted(os.listdir(tmp_path)) == ["emit.log", "emit.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20
    assert hook_mode_of(tmp_path / "emit.log") == 0o600


def status_line_call(command: str, line: Any, environment: dict[str, str]) -> tuple[bytes, bytes, int]:
    """Run a status line as Claude Code does; return (standard output, standard error, exit status)."""
    given = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
    done = run_hook(command, given, environment)
    return done.stdout, done.stderr, done.returncode


STATUS_LINES = ["", *story_parts("hook.txt")["status lines"]]


@pytest.mark.parametrize("locale", [{}, {"LC_CTYPE": "C.UTF-8"}, {"LC_ALL": "C"}], ids=str)
def test_an_earlier_status_line_is_shown_unchanged(hook_installed, monitor, locale):
    script = hook_installed.directory + "/emit_event.py"
    kept = {k: v for k, v in monitor.environment.items() if not k.startswith(("LC_", "LANG"))}
    cases = [(wrapped, status_line()) for wrapped in STATUS_LINES]
    if not locale:  # what is odd only matters to those that read it, or do not
        odd = [status_line(padding="x" * 300_000), b"no object\n", b""]
        cases += itertools.product(["true", "wc -c", "cat | tail -c 3; exit 1", "exec 1>&-"], odd)
    for wrapped, line in cases:
        ours, gone = (cm.status_line_command(PYTHON, it, wrapped) for it in (script, "/gone/emit_event.py"))
        results = [status_line_call(it, line, {**kept, **locale}) for it in (wrapped, ours, gone)]
        assert results[0] == results[1] == results[2], wrapped
    own = cm.status_line_command(PYTHON, script, None)
    assert status_line_call(own, status_line(), kept)[::2] == ("Opus 5.5 · 4 % · $0.30\n".encode(), 0)
    assert status_line_call(own, b"[]", kept)[::2] == (b"\n", 0)


def test_hook_and_status_line_survive_a_broken_installation(hook_installed, monitor):
    copy = monitor.home + "/hooks"
    shutil.copytree(hook_installed.directory, copy)
    hook_replace(copy + "/lib/hot_path.py", "def run_hook", "raise SystemExit(2)\ndef run_hook")
    hook = hook_installed.command.replace(hook_installed.directory, copy)
    shown = cm.status_line_command(PYTHON, copy + "/emit_event.py", "cat; exit 3")
    for name in ("lib/status_line.py", "lib"):
        shutil.rmtree(copy + "/lib/__pycache__", ignore_errors=True)
        ee.set_aside(f"{copy}/{name}")
        assert hook_call(hook, payload("Stop"), monitor.environment) == ""
        assert status_line_call(shown, b"{}\n", monitor.environment) == (b"{}\n", b"", 3)
    assert hook_call(hook.replace("emit_event.py", "gone.py"), b"{}", monitor.environment)
    shown = cm.status_line_command(PYTHON, hook_installed.directory + "/emit_event.py", "cat")
    for home in ("/dev/null/home", "/proc/1/x"):  # nothing can be kept there
        environment = {**monitor.environment, "CONTEXTUATE_HOME": home}
        assert status_line_call(shown, b"{}\n", environment) == (b"{}\n", b"", 0)


def test_the_client_can_end_a_status_line_that_hangs(hook_installed, monitor):
    script = hook_installed.directory + "/emit_event.py"
    hanging = cm.status_line_command(PYTHON, script, "echo $$; exec sleep 60")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["/bin/sh", "-c", hanging], env=monitor.environment, **pipes) as process:
        process.stdin.write(json.dumps(status_line()).encode() + b"\n")
        process.stdin.close()
        assert int(process.stdout.readline()) == process.pid, "the client ends the line itself"
        process.kill()


def test_figures_are_handed_on_when_they_change_and_not_too_often(hook_installed, monitor):
    copy = monitor.home + "/copy"
    shutil.copytree(hook_installed.directory, copy)
    hook_replace(copy + "/lib/status_line.py", "GAUGES_INTERVAL_S = 5.0", "GAUGES_INTERVAL_S = 1.5")
    command = cm.status_line_command(PYTHON, copy + "/emit_event.py", None)

    def handed_on() -> list[tuple[str, Any]]:
        lines = [it["statusLine"] for it in hook_spooled(monitor.home)]
        return [(it["session_id"], it["cost"]["total_cost_usd"]) for it in lines]

    for why, (session, cost, context, five, count) in story_cases("hook.txt", "figures").items():
        changes = {"cost": {"total_cost_usd": cost}, "context_window": {"used_percentage": context}}
        line = status_line(session, five and (five, 2_000_000_000), **changes)
        status_line_call(command, line, monitor.environment)
        if count:
            eventually(lambda it=(session, cost), count=count: handed_on().count(it) == count, what=why)
    times = [it["timestamp"] for it in hook_spooled(monitor.home) if it["statusLine"]["session_id"] == "s1"]
    assert min(later - earlier for earlier, later in zip(times, times[1:])) >= 1400
    costs = [cost for session, cost in handed_on() if session == "s1" and cost != 0.4]
    assert costs == [0.301, 0.6, 0.6, 0.6], "0.4 only if the machine is slow"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_sigterm_at_any_moment_stops_no_hook_that_has_begun(hook_installed, running):
    def has_begun(pid: int) -> bool:  # to ignore the signal
        ignored = re.search(r"SigIgn:\s*(\w+)", install_text(f"/proc/{pid}/status"))[1]
        return bool(int(ignored, 16) >> (signal.SIGTERM - 1) & 1)

    rng, delivered = random.Random(4), set()
    argv, pipe = shlex.split(hook_installed.command)[:4], subprocess.PIPE
    for number in range(32):
        line = json.dumps(payload("StopFailure", f"term-{number}")).encode()
        hook = subprocess.Popen(argv, stdin=pipe, stdout=pipe, env=running.environment, bufsize=0)
        if number % 4 == 0:  # it waits for its input when the signal comes
            eventually(functools.partial(has_begun, hook.pid))
        else:
            hook.stdin.write(line)
            threading.Event().wait(rng.uniform(0, 0.03))  # the moment is what is tried
        begun = has_begun(hook.pid)
        hook.send_signal(signal.SIGTERM)
        assert hook.communicate(line if number % 4 == 0 else None, timeout=20)[0] == b""
        assert hook.returncode == 0 or (not begun and hook.returncode == -signal.SIGTERM)
        delivered |= {f"term-{number}"} if hook.returncode == 0 else set()
    eventually(lambda: not hook_spooled(running.home))
    assert delivered <= set(running.sessions()) and len(delivered) >= 8


# What listens in the monitor's place does with its connection
HOOK_LISTENERS = {
    "closes": lambda connection: connection.close(),
    "closes after reading": lambda connection: (connection.recv(1 << 16), connection.close()),
    "answers something else": lambda connection: connection.sendall(b"?"),
    "never accepts": None,
}


@pytest.mark.parametrize("answer", HOOK_LISTENERS.values(), ids=HOOK_LISTENERS.keys())
def test_a_hook_spools_what_is_not_acknowledged(hook_alone, monitor, answer):
    assert ee.ACKNOWLEDGEMENT_DEADLINE_S == 0.25

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            answer(connection)
            while connection.recv(1 << 16):
                pass

    with contextlib.ExitStack() as stack:
        listener, *others = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4))
        listener.bind(monitor.socket_path)
        listener.listen(8 if answer else 0)
        if answer:
            threading.Thread(target=serve, daemon=True).start()
        for other in [] if answer else others:  # fill the backlog, so that connecting itself blocks
            other.setblocking(False)
            other.connect_ex(monitor.socket_path)
        hook_alone()
    assert [line["hook"] for line in hook_alone.spooled()] == [payload("Stop")]


@needs_root
def test_a_hook_sends_nothing_to_another_users_socket(hook_alone, monitor):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(monitor.socket_path)
        os.seteuid(65534)
        try:
            listener.listen(1)
        finally:
            os.seteuid(0)
        assert "another user" in hook_alone() and len(hook_alone.spooled()) == 1
        with listener.accept()[0] as connection:
            assert connection.recv(1) == b""


@story_table("hook.txt", "config changes", "change")
def test_a_hook_uses_derived_settings_while_the_config_is_the_same(hook_alone, monitor, change):
    cache, marked = monitor.home + "/hook.cache", monitor.home + "/x.sock"
    assert hook_alone.socket_tried() == monitor.socket_path and hook_mode_of(cache) == 0o600
    hook_replace(cache, monitor.socket_path, marked)  # what only the cache says
    assert hook_alone.socket_tried() == marked
    subprocess.run(change, shell=True, cwd=monitor.home, check=True)
    now = hook_alone.installed.default_socket if change.startswith("rm") else monitor.socket_path
    assert hook_alone.socket_tried() == now


def test_a_field_cut_by_the_hook_keeps_its_size_and_shows_no_secret(hook_installed, monitor):
    secret = hook_made_up("AK~IA<16 base32>")
    around_the_cut = ("x " * (1 << 19))[:-500] + (secret + " ") * 50  # of 2 MiB the hook keeps both ends
    content = (around_the_cut + "y " * 9_000_000)[:17_000_000]
    given_payload = payload("PreToolUse", tool_input={"content": content, "file_path": "/f"})
    assert hook_call(hook_installed.command, given_payload, monitor.environment) == ""
    (spooled,) = hook_spooled(monitor.home)
    assert len(spooled["data"]["toolInput"]["content"]) > 2_000_000 and not hook_traces(secret, spooled)
    (event,) = eventually(monitor.serve().stored_events)
    assert event["data"]["truncated"] == {"toolInput.content": 17_000_000}
    assert event["data"]["toolInput"]["file_path"] == "/f"
    assert len(event["data"]["toolInput"]["content"]) <= (1 << 20) + 100


def test_after_three_time_outs_in_a_row_hooks_do_not_wait_for_10_s(hook_alone):
    path = hook_alone.home + "/hook.timeouts"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(hook_alone.home + "/m.sock")
        listener.listen()
        for tries in (1, 2, 3):
            assert "no acknowledgement" in hook_alone() and os.path.getsize(path) == tries
        assert "not sent, after 3 time-outs" in hook_alone()
        for age_s in (11, -3600):  # it is over, or the clock was set back
            os.utime(path, (time.time() - age_s,) * 2)
            assert "not sent" not in hook_alone()
        assert os.path.getsize(path) == 5 and len(hook_alone.spooled()) == 6
    os.utime(path, (0, 0))
    assert "ConnectionRefused" in hook_alone() and not os.path.exists(path), "that costs no time"


def test_a_monitor_that_answers_again_ends_the_pause_of_the_hooks(hook_installed, running):
    path = running.home + "/hook.timeouts"
    ee.write_atomically(path, b"...")
    os.utime(path, (0, 0))
    say = functools.partial(hook_call, hook_installed.command, payload("Stop"), running.environment)
    eventually(lambda: say() == "" and not os.path.exists(path))
    eventually(lambda: "s1" in running.sessions())


@pytest.mark.parametrize("views", ["devices", "configurations"])
def test_the_hook_derives_its_settings_once_for_each_view(tmp_path, monkeypatch, views):
    derived, paths = [], [str(tmp_path / name) for name in ("a.json", "b.json")]
    for number, path in enumerate(paths):
        pathlib.Path(path).write_text(json.dumps({"socketPath": f"/of/{number} {number}"}))
    derive, about = ee.derive_hook_settings, os.stat(paths[0])
    monkeypatch.setattr(ee, "whole", lambda: ee)
    monkeypatch.setattr(ee, "derive_hook_settings", lambda *given: derived.append(given) or derive(*given))
    about = {name: getattr(about, name) for name in ("st_size", "st_mtime_ns")}
    for turn in range(12):
        number = turn % 2 if views == "configurations" else 0
        if views == "devices":  # of one file, as a container sees it
            seen = types.SimpleNamespace(st_dev=turn % 2, st_ino=turn % 2, **about)
            monkeypatch.setattr(ee.posix, "stat", lambda _, seen=seen: seen)
        assert ee.hook_settings(str(tmp_path), paths[number]) == ("local", f"/of/{number} {number}")
    assert len(derived) == 2
    monkeypatch.undo()
    for size in range(20):
        ee.derive_hook_settings(str(tmp_path), paths[0], f"1 2 {size} 4")
    assert len((tmp_path / "hook.cache").read_bytes().splitlines()) == 8


@needs_containers
def test_a_user_without_home_and_entry_loses_no_event_and_sees_one_line(monitor):
    program = monitor.home + "/p"
    os.mkdir(program)
    for name in ("contextuate_monitor.py", "emit_event.py"):
        shutil.copy(os.path.join(ROOT, name), program)
    hook_replace(program + "/emit_event.py", '"/tmp/contextuate-monitor.sock"', f'"{program}/none.sock"')
    subprocess.run([PYTHON, "-m", "compileall", "-q", program], check=True)
    event = shlex.quote(json.dumps(payload("Stop")))
    bare = f"cd {program}; env -i PATH=$PATH CONTEXTUATE_HOME=$0 {PYTHON}"
    for home, place in (("", program + "/.contextuate"), (monitor.home + "/own", monitor.home + "/own")):
        hook = ("sh", "-c", f"printf %s {event} | ({bare} emit_event.py)", home)
        assert said_in_container(monitor, *hook, flags="user") == ""
        assert [line["hook"]["hook_event_name"] for line in hook_spooled(place)] == ["Stop"]
    for command in ("status", "doctor", "install", "stop", "sessions", "uninstall"):
        shell = ("sh", "-c", f"{bare} -m contextuate_monitor {command} 2>&1 >/dev/null", "")
        first, *more = said_in_container(monitor, *shell, flags="user").splitlines()
        assert re.search("no home directory.*; set (CONTEXTUATE_HOME|HOME)", first) and not more[1:], first
        assert command not in ("doctor", "install") or "CLAUDE_CONFIG_DIR" in [first, *more][-1]
    assert not os.path.exists(program + "/~") and not os.path.exists(monitor.home + "/~")


def test_a_small_file_that_cannot_be_read_is_closed(tmp_path):
    before = len(os.listdir("/dev/fd"))
    assert [ee.read_small(str(tmp_path)) for _ in range(5)] == [b""] * 5
    assert len(os.listdir("/dev/fd")) == before


def test_the_machine_key_is_made_once_and_kept_whatever_the_name(tmp_path, monkeypatch):
    home = str(tmp_path / "new")
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        (key,) = set(pool.map(ee.machine_key, [home] * 12))
    base, _, namespace = key.partition("/")
    assert re.fullmatch("[0-9a-f]{16}", base) and int(namespace or 0) == ee.pid_namespace()
    monkeypatch.setenv("CONTEXTUATE_MACHINE_ID", "other")
    assert ee.machine_key(home) == key
    for damage in (b"", b"../x\n", b"\xff\xfe"):
        pathlib.Path(home + "/machine-key").write_bytes(damage)
        remade = ee.machine_key(home)
        assert re.fullmatch("[0-9a-f]{16}", remade.partition("/")[0]) and ee.machine_key(home) == remade
    monkeypatch.setattr(ee, "pid_namespace", lambda: 4026532999)
    assert ee.machine_key(home) == remade.partition("/")[0] + "/4026532999"
    assert f'"machineKey":"{ee.machine_key(home)}"'.encode() in ee.wrap(b"{}", {}, ee.machine_key(home))
    assert b"machineKey" not in ee.wrap(b"{}", {})
    monkeypatch.setattr(ee, "open_own", lambda *_: (_ for _ in ()).throw(OSError(23, "too many open files")))
    assert ee.machine_key("/proc/none") == ee.make_machine_key(home) == ""
    assert hook_mode_of(home + "/machine-key") == 0o600 and hook_mode_of(home) == 0o700


# ---- Config: relaxed JSON, one table of keys ---------------------------------------------------------------

hook_scalars = st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)
hook_scalars |= st.integers(-(10**20), 10**20) | st.text(max_size=20) | st.integers(0xD800, 0xDFFF).map(chr)
hook_scalars |= st.sampled_from(r'http://a/b¦# none¦/* no */ // comment¦,]¦,}¦"¦\\¦\\",]//'.split("¦"))
hook_json = st.recursive(
    hook_scalars, lambda it: st.lists(it, max_size=4) | st.dictionaries(st.text(max_size=8), it, max_size=4), max_leaves=8
)  # fmt: skip
HOOK_COMMENTS = ["", *'// line\n~# "hash" ,]\n~/* block\n , } */~/* " */~//\n~/**/~// */\n~ ~\n'.split("~")]


def hook_relaxed(value: Any, rng: random.Random) -> str:
    """Write a value as JSON with comments and trailing commas at every place where they may be."""
    gap = lambda: rng.choice(HOOK_COMMENTS) + rng.choice(HOOK_COMMENTS)  # noqa: E731
    text, written, last = json.dumps(value, ensure_ascii=rng.random() < 0.5), gap(), ""
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[][{}:,]|[^][{}:,\s"]+', text):
        if token in ("]", "}") and last not in ("[", "{") and rng.random() < 0.5:
            written += "," + gap()
        written, last = written + token + gap(), token
    return written


@settings(max_examples=150)
@given(hook_json, st.randoms(use_true_random=False))
def test_comments_and_trailing_commas_change_nothing(value, rng):
    assert json.dumps(ee.parse_relaxed_json(hook_relaxed(value, rng))) == json.dumps(value)


HOOK_VALUES = story_cases("config.txt", "keys")


def hook_load(path: Any, key: str, value: Any, mode: int = 0o600) -> tuple[dict[str, Any], list[str]]:
    """Load a configuration in which one key has a value; return every key's value, and the warnings."""
    section, dot, name = key.partition(".")
    path.write_text(json.dumps({section: {name: value}} if dot else {section: value}))
    path.chmod(mode)
    made, warnings = cm.load_settings(str(path))
    return made.values, warnings


@pytest.mark.parametrize("key", sorted({part for key in cm.KEYS for part in (key, key.partition(".")[0])}))
def test_a_wrong_value_is_refused_with_file_key_and_expectation(tmp_path, key):
    (wrong, right), path = HOOK_VALUES[key], tmp_path / "c.json"
    expected = cm.KEYS[key].expected if key in cm.KEYS else "an object"
    for value in wrong:
        with pytest.raises(ee.ConfigError) as caught:
            hook_load(path, key, value)
        message = str(caught.value)
        assert message.startswith(f"{path}: {key}: expected {expected}, got ") and "\n" not in message
        assert "12345678" not in message, "a password is not shown"
    values, warnings = hook_load(path, key, right)
    assert values.get(key, right) == right and warnings == []
    assert {name for name in values if name != key and values[name] != cm.KEYS[name].default} == set()


@story_table("config.txt", "warnings", "key, value, mode, warning")
def test_a_doubtful_key_is_warned_about(tmp_path, key, value, mode, warning):
    path = tmp_path / "c.json"
    values, warnings = hook_load(path, key, value, int(str(mode), 8))
    assert warnings == ([f"{path}: {warning.format(path=path)}"] if warning else [])
    assert values == {**ee.load_config("", cm.KEYS)[0], **({key: value} if key in cm.KEYS else {})}


@story_table("config.txt", "defaults", "content, others")
def test_what_the_config_does_not_say_has_its_default(tmp_path, content, others):
    if content is not None:
        (tmp_path / "c.json").write_bytes(as_text(content).encode("latin-1"))
    expected = {**ee.load_config("", cm.KEYS)[0], **others}
    assert ee.load_config(str(tmp_path / "c.json"), cm.KEYS)[0] == expected


@story_table("config.txt", "refused", "config, message")
def test_start_refuses_a_config_that_cannot_be_used(tmp_path, monkeypatch, capsys, config, message):
    path = tmp_path / "monitor.config.json"
    path.write_bytes(as_text(config).encode("latin-1"))
    monkeypatch.setenv("CONTEXTUATE_HOME", str(tmp_path))
    assert cm.main(["start", "--no-open"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert str(path) in said.err and message in said.err
    assert os.listdir(tmp_path) == ["monitor.config.json"]


def test_start_takes_a_pasted_config_and_warns_of_unknown_keys(monitor):
    path = monitor.home + "/monitor.config.json"
    text = f'// mine\n{install_text(path)[:-1]}, # more\n "socketPaht": 1, /* \n */ }}\n'
    ee.write_atomically(path, text.encode())
    assert "unknown key" in in_process(monitor, "start", "--no-open").stderr


# ---- Event model: from anything that is one JSON object to one event ---------------------------------------

HOOK_DATA_NAMES = {name: ours for name, (ours,) in story_cases("hook.txt", "data names").items()}
HOOK_REQUIRED = dict.fromkeys("id sessionId machineId workingDirectory hookType eventType".split(), str)
HOOK_REQUIRED |= {"timestamp": int, "data": dict}
HOOK_OPTIONAL = {"agentId": str, "agentType": str, "parentSessionId": str, "pid": int, "pidNamespace": int}


def hook_check_form(event: dict[str, Any]) -> None:
    """Check that an event has every field in its type, goes through the encoder, and comes back the same."""
    for name, kind in HOOK_REQUIRED.items():
        assert type(event[name]) is kind, (name, event[name])
    for name, kind in HOOK_OPTIONAL.items():
        assert name not in event or type(event[name]) is kind, (name, event[name])
    assert event["id"] and event["sessionId"] and event["timestamp"] >= 0
    line = ee.encode_json(event)
    assert line.isascii() and b"\n" not in line and ee.is_json_object(line)
    json.loads(line, parse_constant=pytest.fail)
    assert ee.encode_json(ee.parse_event_line(line)) == line


def hook_wrapped(given_payload: Any, **more: Any) -> dict[str, Any]:
    return {"id": "5f0c", "timestamp": 1_795_500_000_000, "machineId": "box", "hook": given_payload, **more}


@pytest.mark.parametrize("name", recording_names())
def test_an_event_keeps_every_field_of_a_recorded_payload(name):
    for line in recorded_lines(name):
        wrapped = ee.wrap(line, {b"CLAUDE_PID": b"77", b"CONTEXTUATE_MACHINE_ID": b"box"})
        assert wrapped.count(b"\n") == 1 and wrapped.endswith(b"}\n")
        for sent, origin in ((line, ("m", None)), (wrapped, ("box", 77))):
            given_payload, event = json.loads(line), ee.build_event(ee.parse_event_line(sent), 5, "m")
            hook_check_form(event)
            moved = {"session_id": "sessionId", "cwd": "workingDirectory", "hook_event_name": "hookType"}
            if "agent_id" in given_payload:
                moved.update(agent_id="agentId", agent_type="agentType")
            for field, ours in moved.items():
                assert event.get(ours) == given_payload.pop(field, None)
            assert event["data"] == {HOOK_DATA_NAMES.get(it, it): given_payload[it] for it in given_payload}
            # The room of the documents compares the table with what they say.
            assert event["eventType"] == ee.EVENT_TYPES.get(event["hookType"], "message")
            assert uuid.UUID(event["id"]).version == 4 and (event["timestamp"] == 5) == (sent is line)
            assert (event["machineId"], event.get("pid")) == origin


NODE = {"timestamp": NOW_MS, "machineId": "mac", "workingDirectory": "/w"}
NODE_STOP = {"eventType": "session_end", "hookType": "Stop", "sessionId": "0123456789abcdef"}
NODE_SUMS = {"input": 30, "output": 60, "cacheRead": 15, "cacheCreation5m": 7, "cacheCreation1h": 2}


@story_table("hook.txt", "events", "given_object, fields")
def test_an_object_becomes_an_event(given_object, fields):
    hook = given_object.get("hook_event_name", given_object.get("hookEventName"))
    is_payload = hook and "eventType" not in given_object
    for form in [given_object] + ([hook_wrapped(given_object)] if is_payload else []):
        event = ee.build_event(cm.like_ours(json.loads(json.dumps(form))), 5, "m")
        hook_check_form(event)
        assert {name: event.get(name, event["data"].get(name)) for name in fields} == fields
        assert event.keys() <= {*HOOK_REQUIRED, *HOOK_OPTIONAL, *fields}
        stored = json.loads(cm.numbered_line(7, 8, ee.encode_json(event)))
        assert (stored["seq"], stored["received"]) == (7, 8), "the store's own numbers hold"
        cm.Sessions().apply(event)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no pid namespaces")
@pytest.mark.parametrize(("number", "said"), [(4026531836, None), (4026532123, 4026532123)])
def test_a_hook_names_the_namespace_of_its_pid_but_the_first(monkeypatch, number, said):
    monkeypatch.setattr(ee.posix, "readlink", lambda _: f"pid:[{number}]")
    event = ee.build_event(json.loads(ee.wrap(b'{"cwd":"/"}', {b"CLAUDE_PID": b"7"})), 5, "m")
    assert (event["pid"], event.get("pidNamespace")) == (7, said)


HOOK_FIELDS = (
    *HOOK_DATA_NAMES, *HOOK_DATA_NAMES.values(), *HOOK_REQUIRED, *HOOK_OPTIONAL, "hook_event_name", "session_id",
    "cwd", "agent_id", "agent_type", "truncated", "usage", "seq", "received",
)  # fmt: skip
hook_fields = st.dictionaries(st.sampled_from(HOOK_FIELDS) | st.text(max_size=4), hook_json, max_size=8)
hook_texts = st.text(min_size=1, max_size=9)
hook_anything = st.one_of(
    hook_fields,
    st.builds(lambda fields, kind, name: {**fields, kind: name}, hook_fields,
              st.sampled_from(("hook_event_name", "eventType")), hook_texts),
    st.builds(
        lambda fields, hook, name: {**fields, "hook": hook, "id": name},
        hook_fields.filter(lambda fields: "eventType" not in fields), hook_fields, hook_texts,
    ),
)  # fmt: skip


def hook_all_values(value: Any) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [json.dumps(value), *(text for part in inner for text in hook_all_values(part))]


@settings(max_examples=150)
@given(hook_anything, st.booleans(), st.booleans())
def test_any_object_becomes_an_event_with_every_value(given_object, redact, metadata_only):
    event = ee.build_event(json.loads(json.dumps(given_object)), NOW_MS, "m")
    hook_check_form(event)
    privacy = ee.Privacy(redact, metadata_only, 1024)
    once = hook_protected(given_object, privacy)
    hook_check_form(once)
    assert protected(json.loads(json.dumps(once)), privacy) == once, "protecting twice is protecting once"
    there, fields = collections.Counter(hook_all_values(event)), dict(given_object)
    is_wrapped = isinstance(fields.get("hook"), dict) and isinstance(fields.get("id"), str)
    is_event = isinstance(fields.get("eventType"), str) and not isinstance(fields.get("hook_event_name"), str)
    opened = "data" if is_event else "hook" if is_wrapped and "eventType" not in fields else None
    if isinstance(fields.get(opened), dict):
        fields.update({(opened, inner): value for inner, value in fields.pop(opened).items()})
    for name, value in fields.items():
        if value is None or name in ("seq", "received"):
            continue  # nothing was said; the store gives its own numbers
        if opened == "hook" and name in ("cwd", "sessionId") and value in given_object["hook"].values():
            continue  # said twice
        if name == "timestamp" and isinstance(value, float):
            continue  # whole milliseconds
        text = json.dumps(value)
        assert there[text] > 0, (name, value, event)
        there[text] -= 1
    book = cm.Sessions(120_000, 43_200_000, "m")
    for seq in (1, 2):  # what is stored must not stop its readers
        stored = {"seq": seq, "received": NOW_MS + seq, **event}
        ee.encode_json(book.to_json(book.apply(stored)))
        ee.encode_json(cm.event_row(stored))


@story_table("hook.txt", "odd JSON", "line, value")
def test_odd_json_is_parsed_and_survives_the_round_trip(line, value):
    event = ee.build_event(ee.parse_event_line(line.encode("latin-1")), 5, "m")
    hook_check_form(event)
    assert json.loads(ee.encode_json(event))["data"] == value


# Python 3.11 and newer refuse to convert more than 4300 digits; what is deeper than 100 levels becomes text.
@pytest.mark.parametrize(("length", "depth"), [(1200, 0), (1, 99), (1, 100), (1, 101), (1, 300), (1, 700)])
def test_a_value_of_any_length_and_depth_is_kept(length, depth):
    line = b'{"hook_event_name": "Stop", "x": ' + b"[" * depth + b"70707" * length + b"]" * depth + b"}"
    event = protected(ee.build_event(ee.parse_event_line(line), 5, "m"), ee.Privacy())
    assert b"70707" * length in ee.encode_json(event["data"])


def test_what_is_not_one_object_is_malformed_and_nothing_worse():
    lines = b'|x|[1]|"text"|5|null|{"a":|{}{}|{} x|{}\xc2\xa0'  # the last: a space, but none of JSON's
    for line in (*lines.split(b"|"), b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        with pytest.raises(ee.MalformedEvent):
            ee.parse_event_line(line)
        assert not ee.is_json_object(line)


@settings(max_examples=150)
@given(st.text(max_size=12) | st.integers(0xD800, 0xDFFF).map(chr))
def test_the_hooks_own_quoting_is_json(text):
    assert json.loads(ee.quote(text)) == text and ee.quote(text).isascii()


@story_table("hook.txt", "machine keys", "remote, fields, key")
def test_an_event_without_a_key_has_ours_only_if_it_is_of_this_machine(
    tmp_path, monkeypatch, remote, fields, key
):
    monkeypatch.setattr(ee, "this_machine", lambda: "box.new")
    here = cm.Settings(str(tmp_path), "", "box", ee.load_config("", cm.KEYS)[0])
    line = json.dumps({"hook": payload("Stop"), "id": "e1", **fields}).encode()
    with contextlib.closing(cm.Ingest(here, cm.MemoryJournal(), lambda usage: None)) as ingest:
        (stored,) = ingest.take([line], remote)[1]
    assert stored.event.get("machineKey") == (here.machine_key if key == "own" else key)
    assert stored.event["machineId"] == fields.get("machineId", "unknown" if remote else "box")


# ---- Redaction: secrets out, long fields cut ---------------------------------------------------------------

HOOK_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
HOOK_ALPHABETS = {"": HOOK_LETTERS, "hex": "0123456789abcdef", "base32": "ABCDEFGHIJ234567"}
REDACTION = story_parts("redaction.txt")


def hook_token(head: str, length: int, alphabet: str = HOOK_LETTERS) -> str:
    """Make up a secret of a known shape, so that this file holds none."""
    rng = random.Random(head + str(length))
    return head + "".join(rng.choice(alphabet) for _ in range(length))


def hook_key_block(length: int = 1600, kind: str = "RSA ") -> str:
    body = hook_token("MII", length, HOOK_LETTERS + "+/")
    lines = "\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    return f"-----BEGIN {kind}PRIVATE " + f"KEY-----\n{lines}\n-----END {kind}PRIVATE " + "KEY-----"


def hook_made_up(text: str) -> str:
    """Make up the secrets in a text of the file, whose notation is at its head."""
    text = text.replace("~", "")
    return re.sub(r"<(\d+) ?(\w*)>", lambda it: hook_token("", int(it[1]), HOOK_ALPHABETS[it[2]]), text)


def hook_tokens() -> Iterator[tuple[str, str]]:
    """Make up (kind, token): of the shapes in the file, and one for each beginning that redaction knows."""
    for kind, *shapes in (row.split(" → ") for row in REDACTION["shapes"]):
        yield from ((kind, hook_made_up(shape)) for shape in shapes)
    bodies = list(map(hook_made_up, REDACTION["bodies"]))
    for shape in ee.SECRET_SHAPES:
        if shape.is_token:
            yield shape.kind, shape.hint + next(filter(re.compile(shape.pattern).fullmatch, bodies))


def hook_secrets() -> list[tuple[str, str, str]]:
    """List (kind, secret, text around it with {} in its place)."""
    keys = (("private-key", hook_key_block(kind=kind)) for kind in ("", "RSA ", "OPENSSH "))
    plain = [(kind, secret, "see {} there") for kind, secret in (*hook_tokens(), *keys)]
    word, around = hook_token("", 24), []
    encoded = {"<login>": f"user:{word}", "<block>": hook_key_block()}
    for kind, secret, text in (row.split(" → ") for row in REDACTION["in texts"]):
        if secret in encoded:
            secret = base64.b64encode(encoded[secret].encode()).decode()
        around.append((kind, hook_made_up(secret), text.replace("~", "")))
    kinds = ("authorization", "url-password", "command-line", "assignment")
    return plain + around + [(kind, word, text) for kind in kinds for text in REDACTION[kind]]


HOOK_SECRETS = hook_secrets()
HOOK_SECRET_KINDS = sorted({kind for kind, _, _ in HOOK_SECRETS})


def hook_traces(secret: str, event: Any, length: int = 8) -> list[str]:
    """List the pieces of a secret that stand in an event."""
    text, pieces = json.dumps(event), {secret[at : at + length] for at in range(4, len(secret) - length + 1)}
    return sorted(piece for piece in pieces if json.dumps(piece)[1:-1] in text)


def hook_corpus() -> list[tuple[str, str, str]]:
    """List (kind, secret, text) for every secret in every surrounding that it can stand in."""
    corpus = []
    for kind, secret, around in HOOK_SECRETS:
        text = around.replace("{}", secret)
        texts = [text, json.dumps(text), f"ünd İ {text}"]
        if around == "see {} there":
            quoted = json.dumps(secret)[1:-1] if "\n" in secret else secret
            others = REDACTION["surroundings"]
            texts += [other.replace("{}", quoted if '"{}' in other else secret) for other in others]
        corpus += [(kind, secret, text) for text in texts]
    return corpus


def hook_missed() -> list[tuple[str, str]]:
    return [(kind, text) for kind, secret, text in hook_corpus() if hook_traces(secret, ee.redact_text(text))]


def test_a_secret_is_found_in_whatever_surrounds_it():
    assert hook_missed() == [] and len(hook_corpus()) > 300
    assert {shape.kind for shape in ee.SECRET_SHAPES} <= set(HOOK_SECRET_KINDS)


def hook_protected(given_payload: dict[str, Any], privacy: ee.Privacy | None = None) -> dict[str, Any]:
    return protected(ee.build_event(json.loads(json.dumps(given_payload)), 5, "m"), privacy or ee.Privacy())


@pytest.mark.parametrize("kind", HOOK_SECRET_KINDS)
def test_a_secret_is_replaced_wherever_it_stands(kind):
    for _, secret, around in (row for row in HOOK_SECRETS if row[0] == kind):
        digest = hashlib.sha256(secret.encode()).hexdigest()[:8]
        text, expected = (around.replace("{}", it) for it in (secret, f"[redacted:{kind}:{digest}]"))
        assert ee.redact_text(text) == ee.redact_text(expected) == expected
        assert ee.redact_text(f"{text}\n{text}") == f"{expected}\n{expected}"
        response, tool_input = [{"stdout": ["a", text]}], {"command": text, text: "as a name"}
        given_payload = payload("PostToolUse", tool_input=tool_input, tool_response=response, future=text)
        event = hook_protected(given_payload)
        assert not hook_traces(secret, event)
        assert event["data"]["toolOutput"] == [{"stdout": ["a", expected]}]
        assert event["data"]["future"] == expected
        assert protected(json.loads(json.dumps(event)), ee.Privacy()) == event
        other = protected({**ee.build_event({"eventType": "x"}, 5, "m"), "beside": [text]}, ee.Privacy())
        assert other["beside"] == [expected]
        assert hook_protected(given_payload, ee.Privacy(redact=False))["data"]["future"] == text


@pytest.mark.parametrize("text", REDACTION["alone"])
def test_a_secret_in_a_text_of_its_own_is_replaced(text):
    secret = hook_token("", 24)
    whole = text.replace("{}", secret)
    for _ in range(1 if "&" in text else 3):  # in JSON, too, and in JSON in JSON
        shown = ee.redact_text(whole)
        assert not hook_traces("p@ss&word#" + secret, shown, 6) and "[redacted:" in shown
        whole = json.dumps({"a": whole})


@story_table("redaction.txt", "named values", "names, values, are_secret")
def test_a_value_is_replaced_when_its_name_says_secret(names, values, are_secret):
    for name in " ".join(REDACTION[names]).split():
        for value in values:
            digest = hashlib.sha256(str(value).encode()).hexdigest()[:8]
            expected = f"[redacted:key:{digest}]" if are_secret else value
            pair = {"name": name, "value": value}
            given_input = {"env": {name: value}, "list": {name: [value]}, "pair": pair}
            redacted = hook_protected(payload("PreToolUse", tool_input=given_input))["data"]["toolInput"]
            assert redacted["env"] == {name: expected} and redacted["list"] == {name: [expected]}
            assert redacted["pair"] == {"name": name, "value": expected}
        if "short" in values and name.lower() not in ("cookie", "set-cookie", "bearer"):
            word = hook_token("", 12) + "7Q"
            assert (word not in ee.redact_text(f'{{"{name}": "{word}"}}')) == are_secret, name


HOOK_HARMLESS = REDACTION["harmless"]


def hook_harmless_texts() -> list[str]:
    image = base64.b64encode(random.Random(9).randbytes(60_000)).decode()
    like_a_token = image[:400] + "/" + "EAAB" + "Qz8k" * 20 + "/" + image[400:800]
    return [*HOOK_HARMLESS, image, like_a_token, "data:image/png;base64," + image[:4000]]


@pytest.mark.parametrize("text", hook_harmless_texts(), ids=lambda text: text[:20])
def test_what_is_no_secret_stays_as_it_is(text):
    assert ee.redact_text(text) == text


@pytest.mark.parametrize("module", [http.client, json, socket, tempfile, urllib.request, cm, inspect, uuid])
def test_source_code_stays_as_it_is(module):
    text = install_text(module.__file__)
    # the one thing like a secret in them: an example in urllib's documentation
    found = ee.redact_text(text).count("[redacted:") - text.count("[redacted:")
    assert found == (module is urllib.request)


def hook_hints() -> list[str]:
    return sorted({shape.hint for shape in ee.SECRET_SHAPES})


def redaction_seconds(unit: str, size: int) -> float:
    begin = time.process_time()
    ee.redact_text((unit * (size // len(unit) + 1))[:size])
    return time.process_time() - begin


@pytest.mark.parametrize("pattern", REDACTION["repeated"])
def test_redaction_of_one_thing_over_and_over_is_quick(pattern):
    for hint in ("", "token", "eyJ", "://", "authorization"):
        unit = pattern.replace("{}", hint)
        assert not unit or redaction_seconds(unit, 30_000) < 1.0, unit  # the square would take half a minute
    if pattern == "{}":  # a long word is not searched again and again: 0.1 s; with backtracking 4 s
        assert all(redaction_seconds(unit, 240_000) < 0.6 for unit in ("key", "pass", "pw", "curl x "))
        assert redaction_seconds("A", 2_400_000) < 0.6, "base64 of zeros; 1.3 s if each could begin a token"


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from([*REDACTION["repeated"][:11], *hook_hints(), *"= : \" ' \n a1b2c3d4 \\".split(" "), " "]),
             min_size=1, max_size=6),
    st.sampled_from(hook_hints()),
)  # fmt: skip
@example(["OqTOKEN=`1bc9ade0 on: x Authorization: Bearst", "uvwOqTOKEN=`1bc9adef on: Bx"], "token")
def test_redaction_of_any_mixture_is_quick_and_the_same_twice(parts, hint):
    unit = "".join(parts).replace("{}", hint)
    once = ee.redact_text(unit)
    assert ee.redact_text(once) == once, "what is gone gives nothing beside it another meaning"
    assert redaction_seconds(unit, 20_000) < 1.0


def test_a_token_that_grep_has_coloured_is_redacted_whole():
    shown = ee.redact_text("\x1b[01;31m\x1b[K" + hook_made_up("gh~p_\x1b[m\x1b[K<36>") + " and text")
    assert "[redacted:github:" in shown and shown.endswith(" and text")
    assert not hook_traces(hook_token("", 36), shown)


HOOK_ESCAPES = st.sampled_from(r'\n|\t|\\n|%3D|%20|\u003d|\x1b[0m|&amp;|"|=|: '.split("|"))
HOOK_ESCAPES |= st.sampled_from(["\n", " ", "\x1b[0m", "\x1b[01;31m\x1b[K"])
hook_harmless_parts = st.lists(st.sampled_from(HOOK_HARMLESS) | HOOK_ESCAPES, max_size=4).map("".join)


@example("", " ", next(token for kind, token in hook_tokens() if kind == "facebook"), "%3D", "")
@settings(max_examples=300)
@given(
    hook_harmless_parts,
    HOOK_ESCAPES,
    st.sampled_from([it for _, it in hook_tokens()]),
    HOOK_ESCAPES,
    hook_harmless_parts,
)
def test_no_text_and_no_escape_around_a_token_hides_it(before, left, token, right, after):
    shown = ee.redact_text(before + left + token + right + after)
    assert set(hook_traces(token, shown)) <= {*hook_traces(token, [before, after])}, shown
    assert ee.redact_text(shown) == shown


@pytest.mark.parametrize("letter", ["a", "é", "€", "😀", "\ud83d"])
@pytest.mark.parametrize("limit", [1024, 4096])
def test_a_long_field_is_cut_in_the_middle_once_and_with_its_size(letter, limit):
    width = len(letter.encode("utf-8", "surrogatepass"))
    for over in (*range(0, 320, 3), 100_000):
        text = "head" + letter * ((limit - 8) // width + over) + "tail"
        size, response = len(text.encode("utf-8", "surrogatepass")), {"stdout": text, "lines": ["x", text]}
        given_payload = payload("PostToolUse", tool_response=response, tool_input={"a": "b"})
        event = hook_protected(given_payload, ee.Privacy(field_limit_bytes=limit))
        assert protected(json.loads(json.dumps(event)), ee.Privacy(field_limit_bytes=limit)) == event
        data, cut = event["data"], event["data"]["toolOutput"]["stdout"]
        if over == 0:
            assert cut == text and "truncated" not in data
            continue
        assert cut.startswith("head" + letter) and cut.endswith(letter + "tail")
        assert data["toolOutput"]["lines"][1] == cut and data["toolInput"] == {"a": "b"}
        assert data["truncated"] == {"toolOutput.stdout": size, "toolOutput.lines[1]": size}
        assert len(cut.encode("utf-8", "surrogatepass")) <= limit and str(size) in cut
        again = protected(json.loads(json.dumps(event)), ee.Privacy(field_limit_bytes=limit // 2))
        assert again["data"]["truncated"] == data["truncated"], "its first size"


@pytest.mark.parametrize("kind", HOOK_SECRET_KINDS)
def test_a_secret_across_the_cut_leaves_no_half(kind):
    secret, around = next((secret, around) for its_kind, secret, around in HOOK_SECRETS if its_kind == kind)
    text, half, total = around.replace("{}", secret), 2048, 14_000
    for back in range(0, len(text), max(1, len(text) // 12)):
        long_text = ""
        for edge in (half, total - half):
            long_text = (long_text + " word" * total)[: edge - back - 1] + " " + text
        long_text = (long_text + " word" * total)[:total]
        event = hook_protected(payload("Stop", x=long_text), ee.Privacy(field_limit_bytes=2 * half))
        assert "truncated" in event["data"] and not hook_traces(secret, event), back


def test_a_private_key_of_any_length_is_found_by_its_end_alone():
    rest = hook_key_block(40_000).partition("\n")[2]
    assert re.fullmatch(r"x\n\[redacted:private-key:\w+\]\n", ee.redact_text(f"x\n{rest}\n"))


def test_secrets_before_the_cut_pull_no_half_secret_into_view():
    # What is replaced becomes shorter, so that the head reaches further into the text than its length says.
    limit, margin, secret = 32_768, 4096, hook_made_up("AK~IA<16 base32>")
    blocks = "\n\n".join(hook_key_block(1600) for _ in range(5)) + "\n"
    for edge in (limit // 2, limit // 2 + margin):
        for back in (2, 8, 12, 18):
            start = (blocks + "x " * edge)[: edge - back - 1] + " "
            text = start + secret + " y" * 60_000
            mirrored = "y " * 60_000 + secret + start[::-1].replace(blocks[::-1], blocks)
            for tried in (text, mirrored):
                event = hook_protected(payload("Stop", x=tried), ee.Privacy(field_limit_bytes=limit))
                assert not hook_traces(secret, event), (edge, back, tried is text)


HOOK_PROSE, HOOK_WORDS = "content-of-a-person", "words of a person"


@story_table("hook.txt", "metadata", "given_object, data")
def test_at_the_level_of_metadata_no_content_leaves(given_object, data):
    event = hook_protected(given_object, ee.Privacy(metadata_only=True))
    built, text = ee.build_event(given_object, 5, "m"), json.dumps(event)
    assert HOOK_PROSE not in text and HOOK_WORDS not in text and event["data"] == data
    row, kept = cm.event_row(event), ("sessionId", "hookType", "agent")
    assert [row.get(name) for name in kept] == [built.get(name) for name in kept]


@story_table("hook.txt", "stored", "key, value, beginning, is_whole")
def test_the_config_decides_what_is_stored(tmp_path, key, value, beginning, is_whole):
    here = cm.Settings(str(tmp_path), "", "box", hook_load(tmp_path / "c.json", key, value)[0])
    prompt = f"use {hook_token('gh' + 'p_', 36)} " + "x" * 3000
    line = json.dumps(hook_wrapped(payload("UserPromptSubmit", prompt=prompt))).encode()
    with contextlib.closing(cm.Ingest(here, cm.MemoryJournal(), lambda usage: None)) as ingest:
        (entry,) = ingest.take([line])[1]
    message = str(json.loads(entry.line)["data"].get("message"))
    assert message.startswith(beginning) and (len(message) > 1024) == is_whole


@pytest.mark.parametrize("level", ["full", "metadata"])
def test_what_is_no_event_leaves_no_secret_in_a_log(monitor, level):
    token = hook_token("gh" + "p_", 36)
    lines = [f'{{"hook_event_name": "Stop", "prompt": "{HOOK_PROSE} {token}', '{"a": "' + "x" * 4080 + " " + token,
             f'{{"x": "{HOOK_PROSE} {"y" * 170} {token}' + "z" * (17 << 20)]  # fmt: skip
    monitor.serve(privacy={"level": level})
    for line in lines:
        with monitor.connect() as sock:
            sock.sendall(line.encode() + b"\n")
            assert sock.recv(10) == ee.ACKNOWLEDGEMENT
    eventually(lambda: monitor.get("/api/status")["events"]["quarantined"] == len(lines))
    monitor.kill()
    for name in ("quarantine.log", "monitor.log"):
        text = install_text(f"{monitor.home}/{name}")
        assert not hook_traces(token, text), name
        assert (HOOK_PROSE in text) == (level == "full"), name


SECRET_PARTS = st.lists(
    st.sampled_from(["password", "name", "value", "key: ", "\x1b[0m", "\\n", *hook_hints()])
    | st.sampled_from([secret for _, secret, _ in HOOK_SECRETS] + HOOK_HARMLESS),
    max_size=5,
).map("".join)


@settings(max_examples=200)
@given(
    st.recursive(
        SECRET_PARTS, lambda it: st.lists(it, max_size=3) | st.dictionaries(SECRET_PARTS, it, max_size=3)
    )
)
def test_no_secret_is_missed_because_the_whole_event_has_no_hint_of_it(content):
    event = {**ee.build_event({"eventType": "message", "data": {"x": content}}, 5, "m"), "beside": content}
    shown = ee.protect(dict(event), ee.Privacy())[0]
    protector = ee._Protector(ee.Privacy(), {""})  # searches every text
    assert shown["data"] == {"x": protector.value(content, "x", "x")}
    assert shown["beside"] == shown["data"]["x"]


# ---- Spool: what waits while no monitor takes it -----------------------------------------------------------


def spool_line(event_id: str, session: str = "s1") -> bytes:
    wrapped = {"id": event_id, "timestamp": NOW_MS, "hook": payload("Stop", session)}
    return json.dumps(wrapped).encode() + b"\n"


def spool_read(path: str) -> list[bytes]:
    with contextlib.suppress(FileNotFoundError):  # drained meanwhile
        return [line for line in pathlib.Path(path).read_bytes().split(b"\n") if line]
    return []


def test_many_writers_and_a_drainer_lose_double_and_tear_nothing(tmp_path):
    directory, writers, each, segments = str(tmp_path / "spool"), 8, 250, []

    def write(writer: int) -> None:
        ee.SEGMENT_LIMIT_BYTES, rng = 40_000, random.Random(writer)
        for number in range(each):
            pad = b"x" * rng.choice((0, 10, 1000, 9000))
            ee.append_to_spool(directory, b'{"id":"%d-%d","pad":"%s","end":1}\n' % (writer, number, pad))

    def drain() -> bool:
        for path, _ in ee.spool_segments(directory):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                taken = ee.take_segment(path)
                segments.append(spool_read(taken))
                os.unlink(taken)
        return all(process.exitcode == 0 for process in processes)

    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=write, args=(writer,)) for writer in range(writers)]
    for process in processes:
        process.start()
    eventually(drain, timeout_s=60)
    drain()
    found = collections.Counter(json.loads(line)["id"] for lines in segments for line in lines)
    assert found == {f"{writer}-{number}": 1 for writer in range(writers) for number in range(each)}
    assert len(segments) > 10 and ee.spool_segments(directory) == []


@story_table("hook.txt", "segments", "story, left, dropped")
def test_the_spool_has_segments_in_order_of_time(tmp_path, monkeypatch, story, left, dropped):
    directory, names = str(tmp_path / "spool"), {}  # path without suffix → letter
    for step in story.split():
        if step == "take":
            for path, _ in ee.spool_segments(directory):
                ee.take_segment(path)
            continue
        amount, unit, full, name = re.fullmatch(r"(-?\d+)([a-z]+)(!?):(\w)", step).groups()
        now_ms = NOW_MS + int(amount) * {"ms": 1, "s": 1000, "h": 3_600_000, "d": DAY_MS}[unit]
        monkeypatch.setattr(ee.time, "time_ns", lambda now_ms=now_ms: now_ms * 1_000_000)
        path = ee.append_to_spool(directory, b"x" * (4 << 20) + b"\n" if full else b"{}\n")
        place = path.rpartition(".")[0]
        assert place in names or all(place > other for other in names)
        assert names.setdefault(place, name) == name, step
    places = [path.rpartition(".")[0] for path, _ in ee.spool_segments(directory)]
    assert [names[place] for place in places] == list(left)
    assert (ee.take_dropped(directory), ee.take_dropped(directory)) == (dropped, 0)


def test_the_spool_is_bounded_and_counts_what_it_drops(tmp_path, monkeypatch):
    assert ee.SPOOL_LIMIT_BYTES == 64 << 20
    directory = str(tmp_path / "spool")
    monkeypatch.setattr(ee, "SEGMENT_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(ee, "SPOOL_LIMIT_BYTES", 50_000)
    for number in range(400):
        ee.append_to_spool(directory, b'{"n":%d,"pad":"%s"}\n' % (number, b"x" * 480))
        assert sum(size for _, size in ee.spool_segments(directory)) <= 50_000 + 10_000 + 1000
    kept = [json.loads(line)["n"] for path, _ in ee.spool_segments(directory) for line in spool_read(path)]
    assert kept == list(range(400 - len(kept), 400)), "the oldest go first"
    assert ee.take_dropped(directory) == 400 - len(kept)
    # A reader that was killed left its file: both are counted.
    for name, lost in (("taken", "3\n"), ("log", "2\ntorn by a full disk\n3\n")):
        (tmp_path / "spool" / f"dropped.{name}").write_text(lost)
    assert [ee.take_dropped(directory) for _ in range(3)] == [3, 5, 0]


@pytest.mark.parametrize("has_opened", [False, True])
def test_a_writer_that_was_held_up_does_not_write_into_a_taken_segment(tmp_path, monkeypatch, has_opened):
    directory, open_file, taken = str(tmp_path / "spool"), ee.posix.open, []
    path = ee.append_to_spool(directory, b'{"n":1}\n')

    def held_up(name: str, *about: int) -> int:
        fd = open_file(name, *about) if has_opened or taken else -1
        taken.extend([] if taken else [ee.take_segment(path)])
        return open_file(name, *about) if fd == -1 else fd

    monkeypatch.setattr(ee.posix, "open", held_up)
    other = ee.append_to_spool(directory, b'{"n":2}\n')
    assert [spool_read(it) for it in (*taken, other)] == [[b'{"n":1}'], [b'{"n":2}']]


def test_a_segment_with_a_writer_in_it_is_not_taken_yet(tmp_path):
    path = ee.append_to_spool(str(tmp_path), b'{"n":1}\n')
    with open(path, "ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_SH)
        with pytest.raises(BlockingIOError):
            ee.take_segment(path)  # it has another name now, and is not drained
        other = ee.append_to_spool(str(tmp_path), b'{"n":2}\n')
        writer.write(b'{"n":3}\n')
    (taken,) = glob.glob(str(tmp_path / "*.taken"))
    assert spool_read(ee.take_segment(taken)) == [b'{"n":1}', b'{"n":3}']
    assert other.endswith(".jsonl") and spool_read(other) == [b'{"n":2}']


def test_a_link_in_the_place_of_a_segment_is_not_followed(hook_alone, monitor):
    target, directory = monitor.home + "/precious", monitor.home + "/spool"
    hook_alone(shell=f"echo mine >{target}; mkdir spool; ln -s {target} spool/{ee.now_ms():013d}-1.jsonl")
    ee.append_to_spool(directory, b"{}\n")
    link, segment = sorted(glob.glob(directory + "/*.jsonl"))
    assert ee.spool_segments(directory) == [(segment, os.path.getsize(segment))] and os.path.islink(link)
    with pytest.raises(OSError):
        ee.take_segment(link)
    assert spool_read(target) == [b"mine"] and len(spool_read(segment)) == 2


def test_a_fault_while_the_spool_is_drained_does_not_stop_it_for_good(tmp_path):
    ee.append_to_spool(str(tmp_path / "spool"), b'{"a":1}\n')
    taken: list[bytes] = []

    def take(lines: list[bytes], remote: bool) -> bool:
        taken.extend(lines)
        if len(taken) < 3:
            raise (OSError("a damaged file"), MemoryError())[len(taken) - 1]
        return True

    settings = types.SimpleNamespace(path=lambda name: str(tmp_path / name))
    monitor: Any = types.SimpleNamespace(settings=settings, _take_all=take)
    for _ in range(3):
        assert set(cm.Monitor._drain_spool(monitor)) == {False} and not monitor._is_draining
    assert taken == [b'{"a":1}'] * 3 and not ee.spool_segments(str(tmp_path / "spool"))


def test_a_file_that_cannot_be_written_holds_up_no_other_session(monitor):
    in_the_way = f"{monitor.home}/events/{cm.day_of(cm.now_ms())}/bad.jsonl"
    os.makedirs(in_the_way)
    spool = monitor.home + "/spool"
    for number, session in enumerate(("bad", "good", "bad", "better")):
        ee.append_to_spool(spool, spool_line(f"e{number}", session))
    monitor.serve()
    eventually(lambda: {"good", "better"} <= monitor.sessions().keys() and not ee.spool_segments(spool))
    assert len(hook_spooled(monitor.home, "unsaved")) == 2
    assert levels(examine(monitor)[1], "unsaved") == ["warn"]
    monitor.kill()
    os.rmdir(in_the_way)
    os.rmdir(spool)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if sys.platform == "linux" else None) as other_disk:
        os.symlink(other_disk, spool)
        monitor.serve()
        eventually(lambda: monitor.counts().get("bad", {}).get("events") == 2)
    assert not ee.spool_segments(monitor.home + "/unsaved")


def test_the_monitor_drains_the_spool_at_its_start_and_while_it_runs(hook_alone, monitor, monkeypatch):
    directory = monitor.home + "/spool"
    with monkeypatch.context() as patch:
        patch.setattr(ee, "SPOOL_LIMIT_BYTES", 0)
        for number in range(3):
            ee.append_to_spool(directory, spool_line(f"gone-{number}"))
        ee.drop_old_segments(directory)
    hook_alone()
    path, before = ee.append_to_spool(directory, spool_line("one")), hook_alone.spooled()
    with open(path, "ab") as file:
        file.write(b"\n" + spool_line("torn")[:40])  # what a kill in the middle of a write leaves
    assert ee.append_to_spool(directory, spool_line("two")) == path
    taken = ee.take_segment(path)  # and then the monitor that took it died
    assert ee.take_segment(taken) == taken
    monitor.serve()
    eventually(lambda: monitor.get("/api/status")["spool"] == {"segments": 0, "bytes": 0, "dropped": 3})
    events = monitor.stored_events()
    assert [event["id"] for event in events] == [before[0]["id"], "one", "two"]
    assert events[0]["timestamp"] == before[0]["timestamp"]
    assert monitor.get("/api/status")["events"]["quarantined"] == 1 and os.listdir(directory) == []
    during = [f"during-{number}" for number in range(900)]  # more than one turn takes
    for event_id in during:
        ee.append_to_spool(directory, spool_line(event_id, "during"))
    eventually(lambda: ee.spool_segments(directory) == [])
    assert [event["id"] for event in monitor.stored_events()[3:]] == during


# ---- Journal: events on disk, one file per day and session -------------------------------------------------

DAY_MS = 86_400_000
STORE_SESSIONS = ("s1", "s2", "../../etc/x", "odd id \u2028")


def store_event(number: int, session: str, size: int = 0) -> dict[str, Any]:
    event = {"eventType": "message", "id": f"id-{number}", "timestamp": NOW_MS, "sessionId": session}
    return ee.build_event({**event, "data": {"x": "é" * (size // 6)}}, NOW_MS, "m")


def journal_opened(root: Any) -> cm.Journal:
    journal = cm.Journal(str(root))
    journal.open()
    return journal


@pytest.fixture
def journal(tmp_path: Any) -> Iterator[cm.Journal]:
    opened = journal_opened(tmp_path)
    yield opened
    opened.close()


def journal_seqs(lines: Iterable[bytes]) -> list[int]:
    return [cm.line_seq(line) for line in lines]


def journal_plain_lines(root: str, session: str = "*") -> list[bytes]:
    """Read every whole line of ours out of the files, or of one session's, the plain way; return them by seq."""
    lines = []
    for path in glob.glob(f"{glob.escape(root)}/*/{session}.jsonl"):
        lines += re.findall(rb'^({"seq":\d+,.*)\n', pathlib.Path(path).read_bytes(), re.M)
    return sorted(lines, key=cm.line_seq)


JournalEntry = collections.namedtuple("JournalEntry", "seq session line path")


class JournalModel:
    """A journal beside what it should hold: a list of lines, changed by the same operations."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.journal: Any = journal_opened(root) if root else cm.MemoryJournal()
        self.kept: list[Any] = []
        self.time_ms, self.count, self.highest = NOW_MS, 0, 0

    def append(self, days: int, batch: list[tuple[str, int]]) -> None:
        self.time_ms += days * DAY_MS
        events = [store_event(self.count + at, *about) for at, about in enumerate(batch)]
        self.count += len(events)
        stored = self.journal.append(events, self.time_ms)
        assert len(stored) == len(events) and self.journal.error is None
        for entry, event in zip(stored, events):
            expected = {"seq": entry.seq, "received": self.time_ms, **event}
            assert json.loads(entry.line) == expected == entry.event and entry.seq > self.highest
            self.highest = entry.seq
            name = cm.session_file_name(event["sessionId"])
            path = f"{self.root}/{self.journal.newest_day}/{name}" if self.root else ""
            self.kept.append(JournalEntry(entry.seq, event["sessionId"], entry.line, path))

    def delete(self, session: str) -> None:
        before = {file.path: file.size for file in self.journal.files()} if self.root else {}
        freed = self.journal.delete_session(session)
        gone = {path: size for path, size in before.items() if not os.path.exists(path)}
        assert not self.root or freed == sum(gone.values())
        days = {os.path.dirname(path) for path in gone}
        assert all(os.listdir(day) for day in days if os.path.exists(day)), "no empty day"
        self.kept = [entry for entry in self.kept if entry.session != session]

    def path(self, number: int) -> str:
        paths = sorted(glob.glob(self.root + "/*/*.jsonl")) if self.root else []
        return paths[number % len(paths)] if paths else ""

    def remove(self, number: int, with_day: bool) -> None:
        if path := self.path(number):
            shutil.rmtree(os.path.dirname(path)) if with_day else os.unlink(path)
            self.kept = [entry for entry in self.kept if os.path.exists(entry.path)]

    def edit(self, number: int, added: bytes) -> None:
        if path := self.path(number):
            with open(path, "r+b") as file:
                if file.read()[-1:] in (b"", b"\n"):  # otherwise it would become a part of a torn line
                    file.write(added)

    def put_foreign(self, content: bytes) -> None:
        """Put a file there that holds no whole event."""
        if self.root:
            os.makedirs(self.root + "/2026-01-20", exist_ok=True)
            ee.write_atomically(self.root + "/2026-01-20/f.jsonl", content)

    def tear(self, number: int, size: int) -> None:
        """Cut the last line of a file, as a loss of power does, or a person."""
        path = self.path(number)
        if path and (mine := [entry for entry in self.kept if entry.path == path]):
            last = max(mine)
            with open(path, "r+b") as file:
                if file.read().endswith(last.line + b"\n"):
                    file.truncate(file.tell() - min(size, len(last.line)))
                    self.kept.remove(last)

    def restart(self) -> None:
        if self.root:
            self.journal.close()
            self.journal = journal_opened(self.root)
            assert self.journal.seq >= max((entry.seq for entry in self.kept), default=0)
            self.journal.seq = max(self.journal.seq, self.highest)  # as `last-seq` does

    def check(self, journal: Any, session: Any = None, after: int = 0, before: int | None = None) -> None:
        expected = [
            entry.line for entry in sorted(self.kept)
            if session in (None, entry.session) and after < entry.seq < (before or 1 << 62)
        ]  # fmt: skip
        assert list(journal.lines(session, after, before)) == expected
        assert list(journal.lines(session, after, before, backwards=True)) == expected[::-1]


journal_sizes = st.sampled_from([0, 0, 0, 40, 700, 20_000])
journal_batches = st.lists(st.tuples(st.sampled_from(STORE_SESSIONS), journal_sizes), max_size=6)
journal_operations = st.one_of(
    st.tuples(st.just("append"), st.sampled_from([0, 0, 0, 1, 3, -1, -2, -5]), journal_batches),
    st.tuples(st.just("append"), st.sampled_from([0, 1]), journal_batches),
    st.tuples(st.just("delete"), st.sampled_from(STORE_SESSIONS)),
    st.tuples(st.just("remove"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("tear"), st.integers(0, 9), st.sampled_from([2, 30, 10_000_000])),
    st.tuples(st.just("edit"), st.integers(0, 9), st.sampled_from([b"\n", b"none\n", b'{"seq":x}\n\n', b"no end"])),
    st.tuples(st.just("put_foreign"), st.sampled_from([b"", b"\n\n\n", b'{"seq":1,', b"no\n\n{}\n", b"x" * 10_000])),
    st.tuples(st.just("restart")),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["files", "memory"])
@settings(max_examples=50)
@given(st.sampled_from([(7, 70), (64, 50), (4 << 10, 8 << 10)]), st.lists(journal_operations, max_size=16))
@example((7, 70), [("append", 0, [("s1", 0)]), ("tear", 0, 2), ("append", 0, [("s1", 0)])])
@example((7, 70), [("append", 0, [("s1", 0)]), ("edit", 0, b"no end"), ("append", 0, [("s1", 0)])])
def test_the_journal_reads_back_what_a_list_would(kind, sizes, operations):
    with tempfile.TemporaryDirectory(prefix="ctx-") as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm, "_TAIL_BYTES", sizes[0])
        patch.setattr(cm, "_BLOCK_BYTES", sizes[1])
        model = JournalModel(root if kind == "files" else "")
        for name, *arguments in operations:
            getattr(model, name)(*arguments)
            model.check(model.journal)
        for journal in [model.journal] + ([cm.Journal(root)] if model.root else []):
            for session in (None, *STORE_SESSIONS):
                model.check(journal, session)
            for seq, owner, line, _ in model.kept[:: max(1, len(model.kept) // 3)]:
                model.check(journal, owner, max(0, seq - 2), seq + 1)
                model.check(journal, None, seq)
                for about in ((), (owner,), (owner, seq), (None, seq), (owner, seq + 1)):
                    assert journal.find(cm.line_id(line), *about) == line, "a wrong seq costs time only"
            assert journal.find("nothing") is None and list(journal.lines("none")) == []
        for session in STORE_SESSIONS:
            model.delete(session)
            model.check(model.journal)
        assert model.journal.is_writable() == (kind == "files")
        model.journal.close()


@pytest.mark.parametrize("size", [0, 100, 5000, 66_000, 200_000])
@pytest.mark.parametrize("torn", [b"", b'{"seq":4', b'{"seq":4,"re', b'{"seq":4,"received":1}'])
def test_a_torn_last_line_is_cut_off_or_completed_once(tmp_path, size, torn):
    path, last_seq = tmp_path / cm.day_of(NOW_MS) / "s.jsonl", 4 if b"," in torn else 2
    path.parent.mkdir()
    lines = [cm.numbered_line(seq, NOW_MS, ee.encode_json(store_event(seq, "s", size))) for seq in (1, 2)]
    for whole in (lines, []):  # or the file is nothing but a torn line
        path.write_bytes(b"".join(line + b"\n" for line in whole) + torn)
        journal = journal_opened(tmp_path)
        assert journal.seq == (last_seq if whole or last_seq == 4 else 0)
        stored = [journal.append([store_event(number, "s")], NOW_MS)[0].line for number in (3, 4)]
        completed = [torn] if torn.endswith(b"}") else []
        assert list(journal.lines("s")) == whole + completed + stored and journal.repaired == bool(torn)
        assert path.read_bytes() == b"".join(line + b"\n" for line in whole + completed + stored)
        journal.close()


def test_what_is_read_while_events_come_in_has_no_gap(journal):
    # A consumer goes on after the last number it has seen: what it missed before that it would never see.
    seen: list[int] = []
    stopping = threading.Event()

    def follow() -> None:
        while not stopping.is_set() or seen[-1:] != [journal.seq]:
            seen.extend(journal_seqs(journal.lines(after=seen[-1] if seen else 0)))

    reader = threading.Thread(target=follow)
    reader.start()
    rng = random.Random(3)
    for number in range(300):
        sessions = [f"s{rng.randrange(40)}" for _ in range(rng.randrange(30))]
        journal.append([store_event(number, session, 3000) for session in sessions], NOW_MS)
    stopping.set()
    reader.join(60)
    assert seen == list(range(1, journal.seq + 1))


@pytest.mark.parametrize("backwards", [False, True])
def test_a_file_that_is_removed_or_replaced_ends_there(tmp_path, journal, monkeypatch, backwards):
    monkeypatch.setattr(cm, "_BLOCK_BYTES", 4096)
    day = tmp_path / cm.day_of(NOW_MS)
    journal.append([store_event(number, f"s{number % 3}", 700) for number in range(90)], NOW_MS)
    lines = journal.lines(backwards=backwards)
    seen = journal_seqs(itertools.islice(lines, 10))
    os.unlink(day / "s0.jsonl")
    os.rename(day / "s1.jsonl", day / "gone")
    (day / "s1.jsonl").write_bytes((day / "gone").read_bytes().replace(b"id-", b"in-"))
    rest = list(lines)
    seen += journal_seqs(rest)
    assert seen == sorted(seen, reverse=backwards) and not any(b'"in-' in line for line in rest)
    assert [seq for seq in seen if seq % 3 == 0] == list(range(3, 91, 3))[:: -1 if backwards else 1], "of s2"
    assert len(seen) < 90 and list(journal.lines("s0")) == []


def test_a_day_may_have_more_files_than_may_be_open(journal):
    (soft, hard), used = resource.getrlimit(resource.RLIMIT_NOFILE), len(os.listdir("/dev/fd"))
    try:
        for turn in range(3):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + journal.OPEN_FILES + 20, hard))
            events = [store_event(turn * 300 + number, f"s{number}") for number in range(300)]
            assert None not in journal.append(events, NOW_MS)
            journal.close()
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
            seqs = list(range(1, 300 * turn + 301))
            assert journal_seqs(journal.lines()) == journal_seqs(journal.lines(backwards=True))[::-1] == seqs
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_days_are_in_order_until_a_clock_is_set_back_by_a_day(tmp_path, journal):
    mark, midnight = tmp_path / ".in-order", NOW_MS // DAY_MS * DAY_MS
    for at in (midnight + 1000, midnight - 5000, midnight + 2000, midnight - 23 * 3_600_000):
        journal.append([store_event(at, "s")], at)
    assert journal.days() == [cm.day_of(midnight)], "events go on in the newest day"
    assert journal.in_order and mark.exists()
    for age in (40, 1):
        journal.append([store_event(age, "s")], midnight - age * DAY_MS)
    for opened in (journal, journal_opened(tmp_path), journal_opened(tmp_path)):
        assert not opened.in_order and not mark.exists() and opened.seq == 6
        assert journal_seqs(opened.lines()) == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / cm.day_of(midnight))
    assert journal_seqs(cm.Journal(str(tmp_path)).lines()) == [5, 6]
    assert journal_opened(tmp_path).in_order and mark.exists() and cm.Journal(str(tmp_path)).in_order


def test_packed_days_of_older_versions_are_unpacked_once(tmp_path, journal):
    for number in range(120):
        journal.append([store_event(number, f"s{number % 4}", 600)], NOW_MS + number // 50 * DAY_MS)
    before = {str(path): path.read_bytes() for path in tmp_path.glob("*/*.jsonl")}
    lines = list(journal.lines())
    whole, half, *others = sorted(before)[:-2]
    subprocess.run(["gzip", whole, half, *others], check=True)
    # killed before the packed one went: the plain one counts; and killed while it was written
    kills = {whole + ".gz": b"x", whole: before[whole], half + ".tmp": before[half][:999] * 99}
    for path, content in kills.items():
        ee.write_atomically(path, content)
    os.unlink(tmp_path / ".in-order")
    opened = journal_opened(tmp_path)
    assert not [*tmp_path.glob("*/*.gz"), *tmp_path.glob("*/*.tmp")]
    assert {str(path): path.read_bytes() for path in tmp_path.glob("*/*.jsonl")} == before
    assert {hook_mode_of(path) for path in before} == {0o600}
    assert list(opened.lines()) == lines and opened.seq == 120 and opened.in_order


def test_what_is_no_file_of_events_is_skipped_and_logged_once(tmp_path, journal, caplog, monkeypatch):
    entry, *_ = journal.append([store_event(*it) for it in enumerate(("s", "foreign", "broken"))], NOW_MS)
    day = tmp_path / cm.day_of(NOW_MS)
    (day / "folder.jsonl").mkdir()
    os.mkfifo(day / "pipe.jsonl")
    (day / "dangling.jsonl").symlink_to("nowhere")
    (day / "none.jsonl.gz").write_bytes(b"no gzip at all")
    (day / "torn.jsonl.gz").write_bytes(gzip.compress(entry.line)[:-1])
    (day / "odd.jsonl.gz").mkdir()
    (tmp_path / "2026-01-20").write_bytes(b"no directory")
    access, pread, broken = os.access, os.pread, os.stat(day / "broken.jsonl").st_ino
    fail = lambda: (_ for _ in ()).throw(OSError(5, "Input/output error"))  # noqa: E731
    read = lambda fd, *at: fail() if os.fstat(fd).st_ino == broken else pread(fd, *at)  # noqa: E731
    monkeypatch.setattr(cm.os, "pread", read)
    monkeypatch.setattr(cm.os, "access", lambda path, mode: "foreign" not in path and access(path, mode))
    for opened in (journal_opened(tmp_path), journal, cm.Journal(str(tmp_path))):
        assert list(opened.lines()) == list(opened.lines(backwards=True)) == [entry.line]
        assert list(opened.lines("folder")) == list(opened.lines("foreign")) == []
    skipped = sorted(re.findall(r"(\w+)\.jsonl is skipped", caplog.text))
    assert skipped == ["broken", "folder", "foreign", "pipe"] and caplog.text.count("cannot be unpacked") == 3
    assert {path.name[:-9] for path in day.glob("*.gz*")} == {"none", "odd", "torn"}


def test_seen_ids_are_the_last_ones(monkeypatch):
    assert cm.SeenIds().limit == 64_000
    monkeypatch.setattr(cm, "REMEMBERED_IDS", 10)
    for least, size in ((0, 10), (10, 10), (25, 25)):
        seen = cm.SeenIds(least)
        for number in range(100):
            seen.add(str(number))
            kept = [each for each in range(number + 2) if str(each) in seen]
            assert kept == list(range(kept[0], number + 1))
            assert min(size, number + 1) <= len(kept) < 2 * size


STORE_ODD_IDS = [
    *"../../x /etc/passwd .. . a/b a\\b con:1 * ~ .hidden -rf é \ud83d a\0b".split(" "),
    *("\n", "", " ", "s1\n", "x" * 65, "x" * 10_000, "S1", "sha256-" + "a" * 40),
]


@pytest.mark.parametrize("session", [*STORE_ODD_IDS, "s1", "a.b_c-d", "x" * 64])
def test_no_session_id_leads_out_of_its_folder(tmp_path, session):
    store = journal_opened(tmp_path / "events")
    (entry,) = store.append([{**store_event(1, "s"), "sessionId": session}], NOW_MS)
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.parent == tmp_path / "events" / cm.day_of(NOW_MS)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,70}\.jsonl", path.name)
    assert list(store.lines(session)) == list(store.lines()) == [entry.line]
    assert (path.name == session + ".jsonl") == (session not in STORE_ODD_IDS)
    store.close()


def test_a_file_with_capitals_of_an_older_version_is_renamed_and_read(tmp_path):
    store = journal_opened(tmp_path)
    (entry,) = store.append([{**store_event(1, "s"), "sessionId": "Old"}], NOW_MS)
    store.close()
    (path,) = tmp_path.rglob("*.jsonl")
    path.rename(path.with_name("Old.jsonl"))
    assert list(journal_opened(tmp_path).lines("Old")) == [entry.line]
    assert list(tmp_path.rglob("*.jsonl")) == [path]


@pytest.mark.parametrize("written", [0, 1, 100, -1, OSError(28, "No space left on device")])
def test_an_event_that_is_not_written_whole_leaves_no_trace(tmp_path, journal, monkeypatch, written):
    journal.append([store_event(1, "s"), store_event(2, "other")], NOW_MS)
    write = os.write

    def full_disk(fd: int, data: bytes) -> int:
        if b"second" in data and isinstance(written, OSError):
            raise written
        return write(fd, data[:written] if b"second" in data else data)

    event = {**store_event(3, "s"), "data": {"x": "second"}}
    with monkeypatch.context() as patch:
        patch.setattr(cm.os, "write", full_disk)
        failed, fine = journal.append([event, store_event(4, "other")], NOW_MS)
        assert failed is None and fine is not None and "s.jsonl: " in journal.error
        assert journal.append([event], NOW_MS) == [None]
    (entry,) = journal.append([event], NOW_MS)
    assert journal.error is None and journal.repaired == 0
    content = (tmp_path / cm.day_of(NOW_MS) / "s.jsonl").read_bytes()
    assert [json.loads(line)["id"] for line in content.splitlines()] == ["id-1", "id-3"]
    assert journal_seqs(journal.lines("s")) == [1, entry.seq]


def test_memory_forgets_the_oldest_events_beyond_its_limit(monkeypatch):
    monkeypatch.setattr(cm.MemoryJournal, "LIMIT_BYTES", 20_000)
    journal = cm.MemoryJournal()
    for number in range(50):
        journal.append([store_event(number, "s", 1000)], NOW_MS)
        assert sum(map(len, journal.lines())) <= 20_000
    seqs = journal_seqs(journal.lines())
    assert seqs == list(range(51 - len(seqs), 51)) and len(seqs) > 10 and journal.forgotten == seqs[0] - 1


def test_a_monitor_starts_and_counts_on_after_edited_lines(monitor):
    good = {**store_event(1, "s"), "received": cm.now_ms()}
    gone = ("id", "sessionId", "data", "received")
    edited = [{key: value for key, value in good.items() if key != name} for name in gone]
    edited += [{**good, "data": 5}, {**good, "timestamp": "x"}, {**good, "id": 7}]
    lines = [json.dumps({"seq": at, **it}, separators=(",", ":")) for at, it in enumerate([good, *edited], 1)]
    lines += ['{"seq":99,"received":1,"id":"half"', "not json", ""]
    write_files(
        pathlib.Path(monitor.home), {f"events/{cm.day_of(cm.now_ms())}/s.jsonl": "\n".join(lines) + "\n"}
    )
    monitor.serve().emit(json.loads(spool_line("b", "s2")))
    assert {"s", "s2"} <= set(monitor.sessions())
    (event,) = monitor.get("/api/sessions/s2/events")["events"]
    assert event["seq"] == monitor.get("/api/status")["seq"] > 8
    assert len(monitor.get("/api/sessions/s/events?limit=1000")["events"]) > 7
    assert monitor.websocket(None).ask("subscribed", type="subscribe", since=0)["missed"] > 7
    assert "imported" in in_process(monitor, "import", monitor.home + "/events").stdout


def test_the_status_names_a_slow_write(shared, journal, monkeypatch):
    write = os.write
    assert journal.slow_write[1] == 0
    monkeypatch.setattr(os, "write", lambda *given: time.sleep(0.12) or write(*given))
    journal.append([store_event(1, "s")], NOW_MS)
    assert journal.slow_write[1] >= 120
    status = shared.get("/api/status")
    status["store"]["slowWriteMs"] = 340
    (problem,) = cm.status_problems(status, 0)
    assert problem["kind"] == "store" and "took 340 ms" in problem["words"]
    assert "faster disk" in problem["advice"]


def test_the_index_reads_a_page_of_older_events_without_other_files(tmp_path, journal, monkeypatch):
    history = cm.History(journal, str(tmp_path / "index.db"))
    history.start()
    history.add(journal.append([store_event(number, f"s{number}") for number in range(40)], NOW_MS))
    eventually(lambda: history.status()["lagEvents"] == 0 and history.status()["state"] == "ready")
    opened, read = [], cm.JournalFile.__init__
    noted = lambda it, path, about: (opened.append(path), read(it, path, about))[1]  # noqa: E731
    monkeypatch.setattr(cm.JournalFile, "__init__", noted)
    assert [cm.line_seq(line) for line in history.newest(3, None, 20)] == [19, 18, 17]
    assert len(opened) == 3
    history.stop()


# ---- Hook installation: what is merged, what is refused, what the shell makes of the command ---------------

INSTALL_COMMAND = cm.hook_command("/usr/bin/python3", "/home/me/.contextuate/hooks/emit_event.py")
INSTALL_HANDLER = {"type": "command", "command": INSTALL_COMMAND, "timeout": 10}
INSTALL_ODD_NAMES = r"""a b|a"b|a$HOME b|a`id`b|a\b|a\|a'b|$(exit 3)|é|a;b|!x|*?[x]{a,b} ~#&()<>""".split("|")
INSTALL_ODD_NAMES += ["\u2028", "a\nb"]
INSTALL_OTHERS_COMMANDS = ["", *story_parts("tables.txt")["others' commands"]]
INSTALL_OUR_COMMANDS = [INSTALL_COMMAND, *story_parts("tables.txt")["our commands"]]
INSTALL_OUR_COMMANDS += [
    cm.hook_command(f"/{it}/python", f"/{it}/hooks/emit_event.py") for it in INSTALL_ODD_NAMES
]
INSTALL_OTHERS = [
    *({"type": "command", "command": command, "timeout": 5} for command in INSTALL_OTHERS_COMMANDS),
    {"type": "http", "url": INSTALL_COMMAND}, {"type": "command", "command": "make", "args": ["x"]}, {}, {"x": [None]},
]  # fmt: skip
install_groups = st.fixed_dictionaries(
    {"hooks": st.lists(st.sampled_from(INSTALL_OTHERS), max_size=3)},
    optional={"matcher": st.sampled_from(["", "*", "Bash", "Edit|Write"]), "future": hook_json},
)
install_hooks = st.dictionaries(
    st.sampled_from([*cm.event_names((99, 0, 0)), "WorktreeCreate", "é"]), st.lists(install_groups, min_size=1, max_size=3),
    min_size=1, max_size=4,
)  # fmt: skip
install_settings = st.builds(
    lambda before, hooks, after: {**before, **hooks, **after},
    st.dictionaries(st.sampled_from(["a", "é\u2028"]), hook_json),
    st.none().map(lambda _: {}) | install_hooks.map(lambda hooks: {"hooks": hooks}),
    st.dictionaries(st.sampled_from(["b", "model"]), hook_json),
)
install_versions = st.none() | st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, 400))


def install_handlers_in(value: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    hooks = value.get("hooks", {}).items()
    return [name for name, groups in hooks for group in groups for it in group["hooks"] if it == entry]


def install_of(command: str, **group: Any) -> dict[str, Any]:
    return {"hooks": {"Stop": [{**group, "hooks": [{"type": "command", "command": command}]}]}}


@settings(max_examples=80)
@given(install_settings, install_versions, install_versions)
def test_install_adds_one_hook_an_event_and_uninstall_restores(given_settings, version, later):
    names, before = cm.event_names(version), json.dumps(given_settings)
    assert json.dumps(cm.merge_hooks(given_settings, "", [])) == before, "nothing of ours is in it yet"
    assert json.dumps(json.loads(cm.render_settings(given_settings, "").encode())) == before
    installed = cm.merge_hooks(given_settings, INSTALL_COMMAND, names)
    assert sorted(install_handlers_in(installed, INSTALL_HANDLER)) == sorted(names)
    assert json.dumps(cm.merge_hooks(installed, "", [])) == before
    assert json.dumps(given_settings) == before, "the argument was changed"
    assert list(installed)[: len(given_settings)] == list(given_settings)
    hooks = given_settings.get("hooks", {})
    assert list(installed["hooks"])[: len(hooks)] == list(hooks)
    assert all(installed["hooks"][name][: len(groups)] == groups for name, groups in hooks.items())
    assert json.dumps(cm.merge_hooks(installed, INSTALL_COMMAND, names)) == json.dumps(installed)
    updated = cm.merge_hooks(installed, INSTALL_COMMAND, cm.event_names(later))
    assert sorted(install_handlers_in(updated, INSTALL_HANDLER)) == sorted(cm.event_names(later))


def test_the_installed_command_has_a_second_choice_and_exits_0(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for script, second in (
        ("/home/me/.contextuate/hooks/emit_event.py", "$HOME/.contextuate/hooks/emit_event.py"),
        ("/home/me/x/../.contextuate/hooks/emit_event.py", "$HOME/.contextuate/hooks/emit_event.py"),
        ("/srv/contextuate/hooks/emit_event.py", "/srv/contextuate/hooks/emit_event.py"),
    ):
        command, first = cm.hook_command("/usr/bin/python3", script), os.path.abspath(script)
        assert command == f'"/usr/bin/python3" -I -S "{first}" || python3 -I -S "{second}" || :'


@pytest.mark.parametrize(
    ("command", "is_ours"),
    [*((it, False) for it in INSTALL_OTHERS_COMMANDS), *((it, True) for it in INSTALL_OUR_COMMANDS)],
)
def test_uninstall_removes_our_commands_and_keeps_those_of_others(command, is_ours):
    assert cm.merge_hooks(install_of(command), "", []) == ({} if is_ours else install_of(command))
    with_arguments = install_of(command)
    with_arguments["hooks"]["Stop"][0]["hooks"][0]["args"] = []  # no shell runs it then: another's hook
    assert cm.merge_hooks(with_arguments, "", []) == with_arguments


@story_table("tables.txt", "merged", "before, after")
def test_install_updates_an_old_entry_and_removes_doubles_and_old_names(before, after):
    new = {**INSTALL_HANDLER, "note": 1}
    old = {**new, "command": "python3 -I -S /old/hooks/emit_event.py", "timeout": 5}
    other = {"type": "command", "command": "make"}
    entries = {"OURS": INSTALL_HANDLER, "OLD": old, "NEW": new, "OTHER": other}
    for group in (*before["Stop"], *after["Stop"]):
        group["hooks"] = [entries.get(name, name) for name in group["hooks"]]
    for more in ({}, {"FileChanged": [{"hooks": [old]}]}):
        assert cm.merge_hooks({"hooks": {**more, **before}}, INSTALL_COMMAND, ["Stop"]) == {"hooks": after}


INSTALL_NINE = {"PreToolUse", "PostToolUse", "Notification", "UserPromptSubmit", "Stop", "SubagentStop"}
INSTALL_NINE |= {"PreCompact", "SessionStart", "SessionEnd"}


def test_a_client_gets_only_event_names_it_knows():
    known = set(INSTALL_NINE)
    for version, (added,) in story_cases("tables.txt", "event names").items():
        known |= set(added.split())
        assert set(cm.event_names(tuple(map(int, version.split("."))))) == known, version
    assert set(cm.event_names(None)) == INSTALL_NINE and cm.event_names((0, 9, 9)) == []
    assert not {"MessageDisplay", "WorktreeCreate", "FileChanged"} & set(cm.event_names((9, 0, 0)))


@story_table("tables.txt", "versions", "place, script, version")
def test_the_client_is_asked_for_its_version(tmp_path, monkeypatch, place, script, version):
    (tmp_path / place).mkdir(parents=True)
    ee.write_atomically(f"{tmp_path}/{place}/claude", f"#!/bin/sh\n{script}\n".encode(), 0o755)
    if "sleep" in script:
        monkeypatch.setattr(cm, "CLAUDE_VERSION_TIMEOUT_S", 0.2)
    for name, value in {"PATH": f"{tmp_path}/bin", "HOME": str(tmp_path), "KEPT": "yes"}.items():
        monkeypatch.setenv(name, value)
    assert cm.claude_version() == (tuple(version) if version else None)


def test_claude_config_dir_replaces_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    assert cm.settings_path(None) == "/home/me/.claude/settings.json"
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "/etc/cc")
    assert cm.settings_path(None) == "/etc/cc/settings.json"
    monkeypatch.chdir(tmp_path)
    assert cm.settings_path(".") == f"{tmp_path}/.claude/settings.json"


def test_the_installed_interpreter_is_not_of_a_virtual_environment():
    interpreter = cm.base_interpreter()
    assert os.path.isabs(interpreter) and os.access(interpreter, os.X_OK)
    assert sys.prefix == sys.base_prefix or not interpreter.startswith(sys.prefix + os.sep)


@story_table("tables.txt", "pythons", "gone, python, home")
def test_the_command_finds_another_python_and_never_blocks(tmp_path, monkeypatch, gone, python, home):
    tmp_path /= "".join(INSTALL_ODD_NAMES)  # the shell runs exactly the named files
    places = {name: tmp_path / name for name in ("home", "elsewhere")}
    programs = {name: tmp_path / folder / name for folder, name in (("old", "python"), ("bin", "python3"))}
    script = places["home"] / ".contextuate/hooks/emit_event.py"
    words = "print(sys.flags.isolated, sys.flags.no_site, sys.executable, *sys.argv, sys.stdin.read())"
    words = "sys.exit(2)" if "script" in gone else words
    write_files(tmp_path, {"home/.contextuate/hooks/emit_event.py": "import sys; " + words})
    for name, program in programs.items():
        program.parent.mkdir()
        if name not in re.findall(r"\w+", gone):
            program.symlink_to(PYTHON)
    if "program" in gone or "reads" in gone:
        programs["python"].write_text("\0\1" if "program" in gone else "#!/bin/sh\nexit 1\n")
        programs["python"].chmod(0o755 if "reads" in gone else 0o644)
    monkeypatch.setenv("HOME", str(places["home"]))
    command = cm.hook_command(str(programs["python"]), str(script))
    if "home" in gone:
        places["home"].rename(places["elsewhere"] if "elsewhere" in gone else tmp_path / "x")
    there = {"HOME": str(places["elsewhere" if "elsewhere" in gone else "home"]), "PATH": f"{tmp_path}/bin"}
    given_input = b'{"x": "' + b"y" * 200_000 + b'"}'
    done = run_hook(command, given_input, there)
    ran = f"1 1 {programs[python]} {places[home]}/.contextuate/hooks/emit_event.py " if python else ""
    assert (done.returncode, done.stdout.strip()) == (0, ran.encode() + given_input * bool(ran))


def test_a_publisher_runs_with_the_hooks_python_when_its_own_is_gone(tmp_path):
    (tmp_path / "hooks").mkdir()
    for written, used in (("/gone/python3", sys.executable), (PYTHON, PYTHON), ("", sys.executable)):
        (tmp_path / "hooks/publisher-python").write_text(written + "\n")
        assert ee.publisher_python(str(tmp_path)) == used


INSTALL_OURS = install_of("python3 -I -S /home/me/.contextuate/hooks/emit_event.py")
INSTALL_FILES = {
    "user": "user/settings.json", "project": "project/.claude/settings.json",
    "local": "project/.claude/settings.local.json", "managed": "managed/managed-settings.json",
}  # fmt: skip


def client_files(place: Any, monkeypatch: Any, files: dict[str, Any]) -> list[Any]:
    """Write settings where Claude Code reads them, and return what we read of them."""
    monkeypatch.setattr(cm, "MANAGED_DIRECTORIES", {sys.platform: f"{place}/managed"})
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", f"{place}/user")
    ours = json.dumps(INSTALL_OURS)[1:-1]
    texts = {name: as_text(it).replace('"OURS": 1', ours) for name, it in files.items()}
    write_files(place, {INSTALL_FILES.get(name, name): text for name, text in texts.items()})
    return cm.client_files(f"{place}/project")


@story_table("tables.txt", "settings", "files, runs, words")
def test_every_settings_file_that_counts_is_known(tmp_path, monkeypatch, files, runs, words):
    running, off = cm.files_that_run(client_files(tmp_path, monkeypatch, files))
    assert any(cm.our_hooks(file.settings) for file in running) == runs
    assert words in off if words else off == ""


@story_table("tables.txt", "second", "event, handler, is_twice")
def test_a_second_registration_is_found(tmp_path, monkeypatch, event, handler, is_twice):
    handler = INSTALL_OURS["hooks"]["Stop"][0]["hooks"][0] if handler == "OURS" else handler
    second = {"hooks": {event: [{"hooks": [{"type": "command", **handler}]}]}}
    files = client_files(tmp_path, monkeypatch, {"user": {"OURS": 1}, "local": second})
    names, paths = cm.registered_twice(files)
    assert names == ["Stop"] * is_twice
    expected = ["settings.json", "settings.local.json"] if is_twice else []
    assert sorted(map(os.path.basename, paths)) == sorted(expected)


def test_the_hook_is_copied_and_runs_from_bytecode(tmp_path):
    home = tmp_path / 'my "home" $x'
    script = cm.install_hook_files(str(home))
    assert script == cm.hook_script(str(home)) == f"{home}/hooks/emit_event.py"
    library, names = home / "hooks/lib", ("emit_event.py", "hot_path.py", "status_line.py")
    launcher, whole, hot_path, status_line = map(install_text, [script, *(library / name for name in names)])
    assert launcher == cm.LAUNCHER and whole == install_text(ee.__file__)
    line, end = status_line.partition("\n")[2], "# --- end of the {} ---\n".format
    assert whole.startswith(hot_path + end("hot path") + line + end("status line"))
    compiled = {path.name.partition(".")[0] for path in (library / "__pycache__").iterdir()}
    assert compiled == {"emit_event", "hot_path", "status_line"}
    (home / "monitor.config.json").write_text(json.dumps({"socketPath": f"{tmp_path}/none.sock"}))
    command = cm.hook_command(PYTHON, script)
    for _ in range(2):
        assert hook_call(command, payload("Stop"), dict(os.environ), CONTEXTUATE_HOME=str(home)) == ""
        shutil.rmtree(library / "__pycache__", ignore_errors=True)  # it works without, too
    assert [line["hook"] for line in hook_spooled(str(home))] == [payload("Stop")] * 2


def test_the_status_line_is_wrapped_and_put_back(tmp_path, monkeypatch):
    settings_before = [
        {}, {"statusLine": {"type": "command", "command": ""}},
        *({"statusLine": {"command": it, "x": [1], "type": "command", "padding": 0}, "z": "ü"} for it in STATUS_LINES),
        {"statusLine": {"type": "command", "command": "a \ud83d\n'\"'"}},
    ]  # fmt: skip
    path = tmp_path / "settings.json"
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    for before in settings_before:
        path.write_text(json.dumps(before, indent=1))
        plan = cm.plan_install("/a'b \"$x", version=(2, 1, 332), line=True)
        changed, wrapped = json.loads(plan.new_text), before.get("statusLine", {}).get("command")
        assert plan.status_line == (changed["statusLine"]["command"], wrapped)
        rest = {**before.get("statusLine", {"type": "command"}), "command": plan.status_line.command}
        assert changed["statusLine"] == rest and list(changed["statusLine"])[: len(rest)] == list(rest)
        path.write_text(plan.new_text)
        assert cm.plan_install("/a'b \"$x", version=(2, 1, 332)).new_text == plan.new_text, "it stays"
        moved = cm.plan_install("/other", version=(2, 1, 332)).status_line
        assert moved and moved.wrapped == wrapped and "/other/hooks" in moved.command
        back = cm.plan_install("").new_text
        assert json.loads(back) == before and list(json.loads(back)) == list(before)


@pytest.mark.parametrize(
    "given", [None, "x", 1, [], {}, {"type": "static"}, {"type": "command", "command": 1}]
)
def test_a_status_line_of_another_form_is_refused_and_left_alone(tmp_path, monkeypatch, given):
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings.json").write_text(json.dumps({"statusLine": given}))
    with pytest.raises(cm.CommandError, match="statusLine: expected a command"):
        cm.plan_install("/home", line=True)
    assert json.loads(cm.plan_install("/home").new_text)["statusLine"] == given
    assert cm.plan_install("").new_text == json.dumps({"statusLine": given})


def test_the_installed_copy_can_install_itself_but_no_part_of_it(tmp_path, monkeypatch):
    cm.install_hook_files(str(tmp_path))
    names = ("emit_event.py", "lib/emit_event.py", "lib/hot_path.py")
    before = [install_text(tmp_path / "hooks" / name) for name in names]
    monkeypatch.setattr(ee, "__file__", str(tmp_path / "hooks/lib/emit_event.py"))
    cm.install_hook_files(str(tmp_path))
    assert [install_text(tmp_path / "hooks" / name) for name in names] == before
    for part in ("lib/hot_path.py", "emit_event.py"):
        monkeypatch.setattr(ee, "__file__", str(tmp_path / "hooks" / part))
        with pytest.raises(cm.CommandError, match="not whole"):
            cm.install_hook_files(str(tmp_path))
    assert [install_text(tmp_path / "hooks" / name) for name in names] == before


@pytest.fixture
def settings_file(tmp_path: Any) -> Any:
    (tmp_path / "project/.claude").mkdir(parents=True)
    return tmp_path / "project/.claude/settings.json"


def install_plan(settings_file: Any, home: str = "/h", version: tuple[int, int, int] | None = None) -> Any:
    return cm.plan_install(home, project=str(settings_file.parent.parent), version=version)


@story_table("tables.txt", "unreadable", "content, words")
def test_settings_that_cannot_be_read_are_refused_and_left_alone(settings_file, content, words):
    content = as_text(content).encode("latin-1")
    settings_file.write_bytes(content)
    for home in ("/h", ""):
        with pytest.raises(cm.CommandError, match=re.escape(words)) as caught:
            install_plan(settings_file, home)
        assert str(settings_file) in str(caught.value) and "nothing was changed" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert settings_file.read_bytes() == content and os.listdir(settings_file.parent) == ["settings.json"]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda place: cm.hook_command("/usr/bin/python3", os.fsdecode(b"/\xff/emit_event.py")), "UTF-8"),
        (lambda place: cm.install_hook_files(f"{place}/file/home"), "file/home"),
        (lambda place: cm.plan_install("/h", project=f"{place}/gone"), "no such directory"),
        (lambda place: cm.plan_install("/h", version=(0, 2, 1)), "update it"),
        (lambda place: cm.render_settings(json.loads('{"a": 1e999}'), ""), "no valid JSON"),
        (lambda place: cm.read_settings(f"{place}/pipe"), "pipe"),
        (lambda place: cm.read_settings(f"{place}/loop"), "loop"),
        (lambda place: cm.read_settings(place), "no regular file"),
        (lambda place: cm.read_settings(f"{place}/file/settings.json"), "file/settings"),
        (lambda place: cm.write_settings(f"{place}/file", '{"a": 1}', "{}"), "nothing was changed"),
        (lambda place: cm.write_settings(f"{place}/gone", '{"a": 1}', "{}"), "nothing was changed"),
        (
            lambda place: cm.write_settings(f"{place}/fixed", "{}", install_text("/proc/version")),
            "cannot be written",
        ),
        (lambda place: cm.plan_install("/h", project=place, line=True), "without --project"),
    ],
)
def test_what_cannot_be_installed_is_refused_in_one_line(tmp_path, act, words):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "fixed").symlink_to("/proc/version")
    (tmp_path / "file").write_text("{ }")
    with pytest.raises(cm.CommandError, match=words) as caught:
        act(str(tmp_path))
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "fixed", "loop", "pipe"]
    assert (tmp_path / "file").read_text() == "{ }"


@pytest.mark.parametrize(
    ("line_end", "indent", "mark", "final"),
    [("\n", "\t", "", 1), ("\r\n", "  ", "\ufeff", 0), ("\n", "    ", "\ufeff", 1), ("\r\n", "", "", 0)],
)
def test_install_keeps_the_layout_and_uninstall_restores_it(settings_file, line_end, indent, mark, final):
    settings = {"model": "é\u2028😀", **install_of("make"), "n": {}}
    text = json.dumps(settings, indent=indent, ensure_ascii=False)
    content = (mark + (text + "\n" * final).replace("\n", line_end)).encode()
    settings_file.write_bytes(content)
    plan = install_plan(settings_file)
    backup = cm.write_settings(plan.path, plan.new_text, plan.old_text)
    assert install_text(backup).encode() == content.replace(b"\r\n", b"\n")
    changed = settings_file.read_bytes().decode()
    assert changed.startswith(mark + "{" + line_end + indent + '"model": "é\u2028😀"')
    assert changed.count("\n") == changed.count(line_end) and changed.endswith("\n") == bool(final)
    again = install_plan(settings_file)
    assert again.new_text == again.old_text == plan.new_text
    assert cm.write_settings(again.path, again.new_text, again.old_text) is None
    back = install_plan(settings_file, "")
    cm.write_settings(back.path, back.new_text, back.old_text)
    assert settings_file.read_bytes() == content and back.names == []


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xef\xbb\xbf", b"{}"])
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o440])
def test_a_link_to_settings_is_followed_its_mode_kept_the_backup_private(tmp_path, content, mode):
    link, target = tmp_path / "settings.json", tmp_path / "dotfiles/claude.json"
    link.symlink_to("dotfiles/claude.json")
    if content is not None:
        target.parent.mkdir()
        target.write_bytes(content)
        target.chmod(mode)
    text, value = cm.read_settings(str(link))
    backup = cm.write_settings(str(link), cm.render_settings({**value, "é": 1}, text), text)
    assert link.is_symlink() and os.listdir(target.parent) == ["claude.json"]
    assert target.read_bytes().rstrip(b"\n").endswith('{\n  "é": 1\n}'.encode())
    assert hook_mode_of(target) == (0o600 if content is None else mode)
    assert (backup is None) == (content is None)
    if backup:
        assert re.fullmatch(re.escape(str(link)) + r"\.contextuate-backup-\d{8}-\d{6}-\d{9}", backup)
        assert install_text(backup).encode() == content and hook_mode_of(backup) == 0o600


def test_settings_that_cannot_be_replaced_stay_as_they_are(tmp_path, monkeypatch):
    path, write = tmp_path / "settings.json", ee.write_atomically
    path.write_text("{}")

    def full_disk(target: str, content: bytes, mode: int = 0o600) -> None:
        if target == str(path):
            raise OSError(28, "No space left on device")
        write(target, content, mode)

    monkeypatch.setattr(ee, "write_atomically", full_disk)
    with pytest.raises(cm.CommandError, match="No space left"):
        cm.write_settings(str(path), '{"a": 1}', "{}")
    assert {install_text(tmp_path / name) for name in os.listdir(tmp_path)} == {"{}"}, "itself and its backup"


def test_the_diff_shows_what_changes(settings_file):
    settings_file.write_text('{\n  "a": "x\u2028y"\n}')
    plan = install_plan(settings_file)
    diff = cm.diff_settings(plan.path, plan.old_text, plan.new_text)
    assert diff.startswith(f"--- {settings_file}\n+++ {settings_file}\n@@ -1,3 +1,")
    assert '-  "a": "x\u2028y"\n' in diff and '+  "a": "x\u2028y",\n' in diff
    assert "\n\\ No newline at end of file\n" in diff
    assert cm.diff_settings(plan.path, plan.old_text, plan.old_text) == ""
    assert cm.diff_settings("/new", "", "{}\n") == "--- /dev/null\n+++ /new\n@@ -0,0 +1 @@\n+{}\n"


def test_without_a_client_version_what_is_registered_stays(settings_file):
    known = install_plan(settings_file, version=(2, 1, 200))
    settings_file.write_text(known.new_text)
    again = install_plan(settings_file)
    assert again.new_text == known.new_text and sorted(again.names) == sorted(known.names)
    settings_file.write_text("{}")
    assert len(install_plan(settings_file).names) < len(known.names)


def in_process(monitor: RunningMonitor, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command for a monitor in this process."""
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    to_out, to_errors = contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors)
    with pytest.MonkeyPatch.context() as patch, to_out, to_errors:
        for name in os.environ.keys() - monitor.environment.keys():
            patch.delenv(name)
        for name, value in monitor.environment.items():
            patch.setenv(name, value)
        try:
            status = cm.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    said = [stream.buffer.getvalue().decode() for stream in (out, errors)]
    return subprocess.CompletedProcess(arguments, status, *said)


def test_install_and_uninstall_do_what_their_dry_runs_show(monitor):
    def run(*arguments: str) -> tuple[str, str]:
        return in_process(monitor, *arguments).stdout, install_text(path) if os.path.exists(path) else ""

    path = monitor.claude_home + "/settings.json"
    words, text = run("install", "--dry-run")
    assert "+" in words and not text and not os.path.exists(monitor.home + "/hooks")
    _, installed = run("install")
    assert set(json.loads(installed)["hooks"]) >= INSTALL_NINE
    words, text = run("install", "--dry-run")
    assert "nothing to change" in words and text == run("install")[1] == installed
    words, text = run("uninstall", "--dry-run")
    assert "-" in words and text == installed
    assert json.loads(run("uninstall")[1]) == {}
    assert "the hook is not registered" in run("uninstall")[0]
    ee.write_atomically(path, b"{,}")
    shutil.rmtree(monitor.home + "/hooks")
    refused = in_process(monitor, "install")
    assert refused.returncode == 1 and path in refused.stderr and refused.stderr.count("error") == 1
    assert not os.path.exists(monitor.home + "/hooks") and install_text(path) == "{,}"


# ---- WebSocket framing, the opening handshake, the protocol of both ports ----------------------------------
# RFC 6455 as a whole is the fuzzing client's (room "Safe and unbreakable"); here is what it cannot see. Frames
# come from another author's serializer where they are valid, and are made by hand where they are not.
# What a running monitor sends is read from raw sockets or by that author's client.

PROTOCOL_KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3
PROTOCOL_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def protocol_frame(opcode: int, payload: bytes = b"", fin: bool = True) -> bytes:
    """Serialize one valid frame with the other author's code."""
    return websockets.frames.Frame(websockets.frames.Opcode(opcode), payload, fin).serialize(mask=True)


def protocol_feed(data: bytes, sizes: list[int], new_parsers: bool = False) -> list[Any]:
    """Feed a parser in chunks of these sizes, in turn; the monitor throws away each parser that is at rest."""
    received: list[Any] = []
    parser, turn, least = cm.FrameParser(), itertools.cycle(sizes), len(data) // 500
    while data:
        size = max(next(turn), least)
        received += parser.feed(data[:size])
        data = data[size:]
        if new_parsers and parser.is_between_messages:
            parser = cm.FrameParser()
    return received


@pytest.fixture(scope="module")
def speaking() -> Iterator[RunningMonitor]:
    """A running monitor for this section; every test uses sessions of its own."""
    allowed = {"server": {"allowedHosts": ["Monitor.example", "proxy.example:8443"]}}
    made = RunningMonitor(new_home(), allowed).serve()
    yield made
    clean_up(made)


@pytest.fixture
def spoken(speaking: RunningMonitor) -> Iterator[RunningMonitor]:
    """The monitor of this section, whose clients are closed after each test."""
    yield speaking
    while speaking.clients:
        speaking.clients.pop().close()


protocol_messages = st.text(max_size=200) | st.binary(max_size=400)
protocol_messages |= st.builds(bytes, st.integers(65530, 65540))
protocol_controls = st.lists(st.tuples(st.sampled_from([9, 10]), st.binary(max_size=125)), max_size=2)
protocol_cuts = st.lists(st.tuples(st.integers(0, 1 << 20), protocol_controls), max_size=4)


@given(
    st.lists(st.tuples(protocol_messages, protocol_cuts), max_size=5),
    st.lists(st.integers(1, 70000), min_size=1),
)
@settings(max_examples=100)
def test_fragments_and_chunks_of_any_size_give_the_same_messages(conversation, sizes):
    wire, expected = b"", []
    for message, cuts in conversation:
        data, opcode = (message.encode(), 1) if isinstance(message, str) else (message, 2)
        start = 0
        for place, controls in sorted((cut % (len(data) + 1), controls) for cut, controls in cuts):
            wire += protocol_frame(opcode, data[start:place], fin=False)
            start, opcode = place, 0
            for control, content in controls:
                wire += protocol_frame(control, content)
                expected.append(cm.Message(cm.Opcode(control), content))
        wire += protocol_frame(opcode, data[start:])
        expected.append(cm.Message(cm.Opcode(1 if isinstance(message, str) else 2), message))
    assert protocol_feed(wire, sizes) == expected
    assert protocol_feed(wire, sizes, new_parsers=True) == expected


def protocol_raw_frame(first: int, content: bytes, extra: int) -> bytes:
    """Build a masked frame by hand, valid or not: any first byte, the length in 0, 2 or 8 extra bytes."""
    content = content if extra else content[:125]
    length = len(content).to_bytes(extra, "big") if extra else b""
    code = {0: len(content), 2: 126, 8: 127}[extra]
    masked = bytes(byte ^ key for byte, key in zip(content, itertools.cycle(b"7\xfa!=")))
    return bytes([first, 0x80 | code]) + length + b"7\xfa!=" + masked


protocol_sizes = st.sampled_from([0, 0, 0, 2, 8])
protocol_any_frame = st.builds(
    protocol_raw_frame, st.integers(0, 255), st.binary(max_size=130), protocol_sizes
)
protocol_any_bytes = st.binary(max_size=300) | st.lists(protocol_any_frame, max_size=8).map(b"".join)


@given(protocol_any_bytes, st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(max_examples=400)
def test_no_bytes_raise_and_nothing_follows_a_close(data, sizes):
    whole = cm.FrameParser().feed(data)
    assert protocol_feed(data, sizes) == whole
    assert protocol_feed(data, sizes, new_parsers=True)[: len(whole)] == whole
    assert not [item for item in whole[:-1] if isinstance(item, cm.Close)]


@story_table("http.txt", "violations", "code, wire")
def test_each_violation_fails_with_its_code_and_nothing_follows(code, wire):
    parser = cm.FrameParser()
    before, failure = parser.feed(protocol_frame(1, b"before") + bytes.fromhex(wire))
    assert before == cm.Message(cm.Opcode.TEXT, "before")
    assert (failure.code, failure.by_peer) == (code, False)
    assert parser.feed(protocol_frame(1, b"after") * 3) == []


def test_the_limit_counts_the_fragments_of_one_message_only():
    parser = cm.FrameParser(limit_bytes=300)
    third = protocol_frame(0, b"x" * 100, fin=False)
    for _ in range(3):
        assert parser.feed(protocol_frame(1, b"x" * 100, fin=False) + third) == []
        assert parser.feed(protocol_frame(9, b"p" * 125)) == [cm.Message(cm.Opcode.PING, b"p" * 125)]
        assert parser.feed(protocol_frame(0, b"x" * 100)) == [cm.Message(cm.Opcode.TEXT, "x" * 300)]
    assert parser.feed(protocol_frame(2, b"x" * 100, fin=False) + third + third) == []
    (failure,) = parser.feed(protocol_frame(0, b"y"))
    assert failure.code == 1009


# -- the opening handshake -----------------------------------------------------


HTTP_ROWS = story_parts("http.txt")


def protocol_rows(kind: str) -> Any:
    """Give a test each row of one kind with its status."""
    parts = [(int(title.split()[1]), HTTP_ROWS[title]) for title in HTTP_ROWS if title.startswith(kind)]
    return pytest.mark.parametrize(("status", "row"), [(status, it) for status, rows in parts for it in rows])


def protocol_filled(row: str, **words: Any) -> list[str]:
    """Return what is between the " | " of a row, its words replaced."""
    for word, meaning in words.items():
        row = row.replace(word, str(meaning))
    return row.split(" | ")


def protocol_head(*changes: Any, line: str = "GET / HTTP/1.1") -> bytes:
    """Return a request head for a WebSocket without its blank line.

    Of the changes "Name: x" replaces a header, "-Name" removes one, "+x" adds a line; else it is the
    first line.
    """
    headers = {"Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade",
               "Sec-WebSocket-Key": PROTOCOL_KEY, "Sec-WebSocket-Version": "13"}  # fmt: skip
    more = []
    for change in changes:
        name, colon, value = change.partition(": ")
        if name[:1] == "+":
            more.append(change[1:])
        elif name[:1] == "-":
            del headers[change[1:]]
        elif colon:
            headers[name] = value
        else:
            line = change
    return "\r\n".join([line, *map(": ".join, headers.items()), *more]).encode("latin-1")


@protocol_rows("handshake")
def test_a_handshake_is_answered_with_101_or_its_error(status, row):
    try:
        response = cm.handshake_response(cm.parse_request_head(protocol_head(*row.split(" | "))))
    except cm.RequestError as error:
        assert error.status == status
        needed = ("Sec-WebSocket-Version", "13") if "Version" in row else ("Upgrade", "websocket")
        header = {405: ("Allow", "GET"), 426: needed}.get(status)
        assert header is None or header in error.headers
    else:
        first, *lines = response.decode("ascii").split("\r\n")
        assert first.startswith(f"HTTP/1.1 {status} ")
        expected = ["Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {PROTOCOL_ACCEPT}"]
        assert lines == [*expected, "", ""]


@pytest.mark.parametrize("status", [400, 405, 426, 431, 505])
def test_a_refused_handshake_is_answered_in_json_and_ends(spoken, status):
    change = HTTP_ROWS.get(f"handshake {status}", ["X-Long: " + "x" * cm.HEAD_LIMIT_BYTES])[0]
    for port, path in ((spoken.ws_port, b" / "), (spoken.port, b" /ws ")):
        head = protocol_head(f"Host: 127.0.0.1:{port}", change).replace(b" / ", path, 1)
        got, headers, body = protocol_exchange(port, head + b"\r\n\r\n")
        assert got == (403 if status == 405 else status)
        assert ("x-content-type-options", "nosniff") in headers
        assert json.loads(body)["error"]


# -- a running monitor's WebSocket port ----------------------------------------


class ProtocolPeer:
    """A WebSocket client that sends any bytes, and reads frames by hand."""

    def __init__(self, port: int, receive_bytes: int = 0, path: str = "/") -> None:
        self.sock = socket.socket()
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(15)
        self.sock.connect(("127.0.0.1", port))
        self.send = self.sock.sendall  # bytes as they are
        self.send(protocol_upgrade(f"127.0.0.1:{port}", path=path))
        self.received = self.sock.makefile("rb")
        head = b"".join(iter(self.received.readline, b"\r\n"))
        assert b" 101 " in head and PROTOCOL_ACCEPT.encode() in head, head

    def frame(self) -> tuple[int, bytes] | None:
        """Return the next frame's opcode and payload; None when the connection has ended."""
        with contextlib.suppress(ConnectionError):
            head = self.received.read(2)
            if len(head) == 2:
                assert head[0] & 0xF0 == 0x80 and head[1] < 0x80, "a server's frames are whole and unmasked"
                more = {126: 2, 127: 8}.get(head[1], 0)
                size = int.from_bytes(self.received.read(more), "big") if more else head[1]
                content = self.received.read(size)
                return (head[0] & 0x0F, content) if len(content) == size else None
        return None

    def say(self, **message: Any) -> None:
        self.send(protocol_frame(1, json.dumps(message).encode()))

    def next(self, kind: str) -> bytes:
        """Return the text of the next message of one kind."""
        for opcode, content in iter(self.frame, None):
            if opcode == 1 and json.loads(content)["type"] == kind:
                return content
        raise AssertionError(f"the connection ended before {kind}")

    def close(self) -> None:
        """Close the connection without a close frame."""
        self.received.close()
        self.sock.close()


def protocol_exchange(port: int, data: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send a request's bytes to either port; return status, headers in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as sock:
        sock.sendall(data)
        response = http.client.HTTPResponse(sock)
        response.begin()
        headers = [(name.lower(), value) for name, value in response.getheaders()]
        return response.status, headers, response.read()


def protocol_events(session: str, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Make some events of a session, each with its own prompt."""
    return [payload("UserPromptSubmit", session, prompt=f"{session} {at}", **fields) for at in range(count)]


def test_replies_come_in_order_with_request_ids_of_any_kind(spoken):
    spoken.emit(*protocol_events("order", 3))
    client, ids = spoken.websocket(), [0, -1.5, "", "x" * 1000, "\ud800", 1 << 60, None, *range(30)]
    for number in ids:
        client.send(type="get_sessions", requestId=number)
        client.send(type="get_events", sessionId="order", limit=2, requestId=number)
        client.send(type="nothing", requestId=number)
    for kind in ("sessions", "events", "error"):
        assert [client.next(kind)["requestId"] for _ in ids] == ids
    assert "requestId" not in client.ask("sessions", type="get_sessions")


@pytest.mark.parametrize(("code", "wire"), [(1003, b"\x82\x81\0\0\0\0x"), (1002, b"\x81\1x")])
def test_a_client_that_breaks_the_protocol_is_closed_with_the_code(spoken, code, wire):
    with contextlib.closing(ProtocolPeer(spoken.ws_port)) as peer:
        peer.next("hello")
        peer.send(wire + protocol_frame(1, b'{"type":"get_sessions"}'))  # which is not carried out
        opcode, content = peer.frame()
        assert (opcode, content[:2]) == (8, struct.pack("!H", code)) and content[2:].decode("utf-8")
        peer.send(protocol_frame(8, struct.pack("!H", code)))
        assert peer.frame() is None


def test_a_bad_message_gets_an_error_that_names_the_fault(spoken):
    spoken.emit(*(protocol_events(name, 1)[0] for name in ("bad", "bad-child", "bad-grandchild")))
    for child, parent in (("bad-child", "bad"), ("bad-grandchild", "bad-child")):
        assert protocol_post(spoken, type="set_parent", sessionId=child, parentSessionId=parent)[0] == 200
    seq, client = spoken.get("/api/status")["seq"], spoken.websocket(None)
    for row in HTTP_ROWS["messages"]:
        kind, fields, word, values = map(story_value, row.split(" → "))
        for value in values:
            message = {**({"type": kind} if kind != "-" else {}), **fields, "requestId": 7}
            message.update({} if value is None else {word: value})
            error = client.ask("error", **message)
            assert (error["request"], error["requestId"]) == (kind if kind != "-" else None, 7)
            assert word in error["message"], message
            status, reply = protocol_post(spoken, **message)
            assert status == 400 and (word in reply["error"] or "for a WebSocket" in reply["error"]), message
    assert spoken.get("/api/status")["seq"] == seq


def test_what_is_no_json_object_gets_an_error_and_the_next_its_answer(spoken):
    client = spoken.websocket(None)
    for text in ("not json", "", "[1]", "null", '"text"', "{}{}", '{"type": "', '{"type": ' + "[" * 99999):
        client.connection.send(text)
        error = client.next("error")
        assert error["request"] is None and "requestId" not in error and error["message"]
        assert client.ask("sessions", type="get_sessions", requestId="after")["requestId"] == "after"
    assert "requestId" not in client.ask("sessions", type="get_sessions", requestId=[[7]])


def protocol_post(monitor: RunningMonitor, **message: Any) -> tuple[int, dict[str, Any]]:
    body = json.dumps(message).encode()
    status, _, answer = monitor.request("/api/message", "POST", body, protocol_origin(monitor))
    return status, json.loads(answer)


def test_no_fields_of_any_type_end_a_connection(spoken):
    client = spoken.websocket(None)
    odd = (None, False, -5, 1 << 70, float("nan"), "x", ["x"], [1], {"x": None})
    names = " ".join(it[0] for it in cm.MessageHandlers.FIELDS) + " showHidden requestId query"
    for kind in sorted(cm.MessageHandlers.QUESTIONS | set(cm.MessageHandlers.META)):
        for name in names.split():
            for value in odd:
                client.send(**{"sessionId": "odd", "eventId": "x", "query": "x", name: value, "type": kind})
        client.send(type="get_sessions", requestId="all of " + kind)
        client.next("sessions", requestId="all of " + kind)
        client.others.clear()


def test_a_client_gets_the_events_of_the_sessions_it_asked_for(spoken):
    some, everything = spoken.websocket(sessionIds=["filter-a", "filter-c"]), spoken.websocket()
    silent = spoken.websocket(None)
    for unsubscribed, expected in (([], "aca"), (["filter-a", "unknown-id"], "c"), (["filter-c"], "")):
        some.send(type="unsubscribe", sessionIds=unsubscribed)
        some.ask("sessions", type="get_sessions")
        sent = [f"filter-{letter}" for letter in "abcab"]
        spoken.emit(*(protocol_events(name, 1)[0] for name in sent))
        assert [event["sessionId"] for event in everything.events(5)] == sent
        got = [event["sessionId"] for event in some.events(len(expected))]
        assert got == [f"filter-{letter}" for letter in expected]
    for client in (some, silent):
        client.ask("sessions", type="get_sessions")
        assert not [message for message in client.others if message["type"] == "event"]


def test_what_was_missed_comes_in_order_before_what_is_live(running):
    last = cm.CATCH_UP_EVENTS + 13
    running.emit(*protocol_events("long", last - 12), *protocol_events("a", 5), *protocol_events("b", 7))
    rows = (  # since, sessions, the missed events that follow; None: the client must start over
        (None, None, range(0)),
        (last, None, range(0)),
        (last + 1, None, None),
        (0, None, None),
        (last - cm.CATCH_UP_EVENTS - 1, None, None),
        (last - cm.CATCH_UP_EVENTS, None, range(last - cm.CATCH_UP_EVENTS + 1, last + 1)),
        (last - 12, None, range(last - 11, last + 1)),
        (last - 12, ["a", "live"], range(last - 11, last - 6)),
        (last - 12, ["b", "live"], range(last - 6, last + 1)),
    )
    opened = []
    for view, (since, sessions, missed) in itertools.product(("full", "rows"), rows):
        opened.append((running.websocket(view, since=since, sessionIds=sessions), view, since, missed))
    running.emit(*protocol_events("live", 1))
    for client, view, since, missed in opened:
        answer = {name: client.subscribed[name] for name in ("seq", "missed", "resync")}
        assert answer == {"seq": last, "missed": len(missed or ()), "resync": missed is None}, since
        events = client.events(len(missed or ()) + 1)
        assert [event["seq"] for event in events] == [*(missed or ()), last + 1], since
        assert {event.get("partial", False) for event in events} == {view == "rows"}


def test_a_client_that_comes_and_goes_misses_and_doubles_no_event(running):
    count, seen, dice = 150, [], random.Random(5)
    sender = threading.Thread(target=lambda: [*map(running.emit, protocol_events("flow", count))])
    sender.start()
    while len(seen) < count:
        client = running.websocket("rows", since=seen[-1] if seen else 0)
        seen += [event["seq"] for event in client.events(min(dice.randint(1, 30), count - len(seen)))]
        client.close()
    sender.join()
    assert seen == list(range(1, count + 1))


def test_a_page_of_events_holds_what_its_parameters_say(running):
    running.emit(*(payload("UserPromptSubmit", f"s{at % 2}", prompt=f"n {at}") for at in range(1, 12)))
    stored, edges = running.stored_events(), ((None, 0, 1, 5, 12), (None, 0, 4, 11))
    clients = {"rows": running.websocket("rows"), "full": running.websocket(None)}
    for session, limit, before, after in itertools.product(("s1", None), (1, 6, None), *edges):
        query = {"limit": limit, "before": before, "after": after}
        query = {name: value for name, value in query.items() if value is not None}
        found = [event for event in stored if session in (None, event["sessionId"])
                 and (after or 0) < event["seq"] < (99 if before is None else before)]  # fmt: skip
        page = found[-(limit or 100) :] if after is None else found[: limit or 100]
        expected = {"events": page, "more": len(page) < len(found)}
        path = f"/api/sessions/{session}/events" if session else "/api/events"
        assert running.get(path + "?" + urllib.parse.urlencode(query)) == expected, (path, query)
        for view, client in clients.items() if after is None else ():
            if session:
                answer = client.ask("events", type="get_events", sessionId=session, **query)
                assert answer["sessionId"] == session
            else:
                answer = client.ask("all_events", type="get_all_recent_events", **query)
            if view == "rows":
                assert all(row["partial"] for row in answer["events"])
                answer["events"] = [stored[row["seq"] - 1] for row in answer["events"]]
            assert {"events": answer["events"], "more": answer["more"]} == expected, (view, query)
    assert protocol_post(running, type="get_events", sessionId="s1", limit=3, requestId=7)[1] == {
        **clients["full"].ask("events", type="get_events", sessionId="s1", limit=3),
        "requestId": 7,
    }
    unknown = clients["rows"].ask("events", type="get_events", sessionId="../../token")
    assert (unknown["events"], unknown["more"]) == ([], False)
    assert running.request("/api/sessions/unknown-id/events")[0] == 404


def test_a_whole_event_comes_with_and_without_its_number(spoken):
    spoken.emit(*protocol_events("detail", 6))
    stored = [json.loads(line) for line in journal_plain_lines(spoken.home + "/events", "detail")]
    client = spoken.websocket("rows")
    ask = functools.partial(client.ask, "event_detail", type="get_event_detail", sessionId="detail")
    for event in stored:
        for query in ("", f"?session=detail&seq={event['seq']}"):
            assert spoken.get(f"/api/events/{event['id']}{query}") == event
        for more in ({}, {"seq": event["seq"]}, {"seq": stored[0]["seq"]}, {"seq": 1 << 50}):
            detail = ask(eventId=event["id"], **more)
            assert (detail["sessionId"], detail["eventId"], detail["event"]) == ("detail", event["id"], event)
    missing = ask(eventId="no", requestId=1)
    assert (missing["event"], missing["requestId"], missing["eventId"]) == (None, 1, "no")


def protocol_updates(client: TestClient, **expected: dict[str, Any]) -> None:
    """Wait until each of these sessions has had an update with its fields."""
    while expected:
        session = client.next("session_update")["session"]
        fields = expected.get(session["sessionId"])
        if fields and all(session[name] == value for name, value in fields.items()):
            del expected[session["sessionId"]]


def test_linked_sessions_are_updated_on_both_sides_for_every_client(spoken):
    spoken.emit(*(protocol_events(name, 1)[0] for name in "xyz"))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    for child, parent, *gone in (("y", "x"), ("z", "y"), ("y", None, "x"), ("x", "z")):
        mine.send(type="set_parent", sessionId=child, parentSessionId=parent)
        children = {parent: {"childSessionIds": [child]}} if parent else {gone[0]: {"childSessionIds": []}}
        for client in (other, mine):
            protocol_updates(client, **{child: {"parentSessionId": parent}, **children})
    mine.send(type="delete_session", sessionId="x")
    protocol_updates(other, z={"childSessionIds": []})
    spoken.emit(*protocol_events("old", 1), payload("SessionStart", "new", source="clear"))
    protocol_updates(other, new={"continuedFrom": None})
    spoken.emit(payload("SessionEnd", "old", reason="clear"))
    protocol_updates(other, new={"continuedFrom": "old"})


def test_a_hidden_session_is_listed_only_for_who_shows_hidden_ones(spoken):
    spoken.emit(*protocol_events("secret", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")

    def is_in(answer: dict[str, Any]) -> bool:
        return "secret" in {session["sessionId"] for session in answer["sessions"]}

    assert other.ask("sessions", type="set_show_hidden", showHidden=True, requestId="s")["requestId"] == "s"
    mine.send(type="hide_session", sessionId="secret")
    protocol_updates(other, secret={"hidden": True})
    spoken.emit(*protocol_events("secret", 1))  # goes on unseen
    for client, expected in ((mine, False), (other, True)):
        assert is_in(client.ask("sessions", type="get_sessions")) is expected
    assert not is_in(spoken.get("/api/sessions")) and is_in(spoken.get("/api/sessions?hidden=1"))
    off = other.ask("sessions", type="set_show_hidden", showHidden=False)
    assert all(not session["hidden"] for session in off["sessions"])
    mine.send(type="unhide_session", sessionId="secret")
    protocol_updates(mine, secret={"hidden": False})
    assert is_in(mine.ask("sessions", type="get_sessions"))


def test_all_sessions_are_hidden_and_deleted_at_once(running):
    names = [f"many-{index}" for index in range(5)]
    running.emit(*(protocol_events(name, 1)[0] for name in names))
    mine, other, showing = (running.websocket("rows") for _ in range(3))
    showing.ask("sessions", type="set_show_hidden", showHidden=True)
    mine.send(type="hide_all_sessions")
    hidden = showing.next("sessions_updated")["sessions"]
    assert sorted(session["sessionId"] for session in hidden if session["hidden"]) == names
    assert [client.next("sessions_updated")["sessions"] for client in (mine, other)] == [[], []]
    mine.send(type="delete_all_sessions")
    for client in (mine, other, showing):
        assert client.next("sessions_updated")["sessions"] == []
    assert running.sessions() == {} and running.stored_events() == []
    running.kill()
    assert running.serve().sessions() == {}


def test_what_a_user_did_survives_a_restart_from_the_files_alone(running):
    running.emit(*(protocol_events(f"keep-{index}", 2)[0] for index in range(5)))
    client = running.websocket("rows")
    client.send(type="rename_session", sessionId="keep-0", label="By hand é")
    client.send(type="toggle_pin", sessionId="keep-1")
    client.send(type="hide_session", sessionId="keep-2")
    client.send(type="set_parent", sessionId="keep-3", parentSessionId="keep-0")
    client.ask("session_deleted", type="delete_session", sessionId="keep-4")
    before = running.sessions()
    assert not journal_plain_lines(running.home + "/events", "keep-4")
    assert running.request("/api/sessions/keep-4")[0] == 404
    assert (before["keep-0"]["label"], before["keep-0"]["labelSource"]) == ("By hand é", "user")
    assert before["keep-1"]["isPinned"] and before["keep-2"]["hidden"]
    assert before["keep-3"]["parentSessionId"] == "keep-0" and "keep-4" not in before
    running.stop()
    for name in set(os.listdir(running.home)) - {"events", "monitor.config.json"}:
        path = os.path.join(running.home, name)
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    assert running.serve().sessions() == before
    actions = [event for event in running.stored_events() if event["hookType"] == "Monitor"]
    assert [event["eventType"] for event in actions] == ["session_meta"] * 4


def test_no_number_is_given_twice_after_the_newest_session_was_deleted(running):
    running.emit(*protocol_events("first", 1), *protocol_events("newest", 9))
    running.websocket("rows").ask("session_deleted", type="delete_session", sessionId="newest")
    running.stop()
    running.serve()
    running.emit(*protocol_events("later", 12))
    back = running.websocket("rows", since=10)  # it was away since before the restart
    assert back.subscribed["missed"] == 12 or back.subscribed["resync"]
    for at in range(back.subscribed["missed"]):
        assert back.events(1)[0]["data"]["text"] == f"later {at}"
    assert min(event["seq"] for event in running.stored_events() if event["sessionId"] == "later") > 10


def test_hello_comes_first_and_the_status_whenever_it_changes(running):
    running.emit(*protocol_events("status", 2))
    client = running.websocket(None)
    about = {"type": "hello", "mode": "local", "machineId": "testbox", "version": cm.__version__}
    assert client.hello == {**about, "wsProtocol": 1, "seq": 2, "mayAnswer": False} and not client.others
    client.send(type="subscribe", view="rows")
    status = client.next("status")
    expected = {
        "events": {"received": 2, "stored": 2, "duplicates": 0, "quarantined": 0},
        "seq": 2, "sessions": 1, "clients": 1, "demo": False, "mode": "local", "machineId": "testbox",
        "version": cm.__version__, "loading": None, "redis": None, "publisher": None,
        "store": {"path": running.home + "/events", "persistent": True, "ok": True, "error": None, "repaired": 0},
    }  # fmt: skip
    status["store"].pop("slowWriteMs")
    assert {name: status[name] for name in expected} == expected
    assert set(status["spool"]) >= {"bytes", "segments", "dropped"}
    assert abs(status["startedAt"] - time.time() * 1000) < 600_000
    running.emit({"eventType": "message", "sessionId": "status-demo", "demo": True})
    assert client.next("status", demo=True)["sessions"] == 2
    assert running.get("/api/status")["demo"] is True
    running.websocket()
    assert running.get("/api/status")["clients"] == 2, "at once"


def test_a_client_that_never_reads_is_closed_and_may_catch_up(monitor):
    """It gets 8 MB of answers then though a queue holds 64 KB: a client that reads is not closed for that."""
    monitor.serve(limits={"clientQueueBytes": 65536}, privacy={"redact": False})
    slow = ProtocolPeer(monitor.ws_port, receive_bytes=4096)
    slow.say(type="subscribe", view="full")
    slow.next("subscribed")
    reading = monitor.websocket()
    text, batch, rounds = "plain words only " * 20_000, 2, 13  # more than the kernel holds for one connection
    for _ in range(rounds):
        monitor.emit(*protocol_events("slow", batch, text=text))
        reading.events(batch)
    frames, total = [*iter(slow.frame, None)], batch * rounds
    events = [content for opcode, content in frames if opcode == 1 and b'"event"' in content[:20]]
    got = [json.loads(content)["seq"] for content in events]
    assert got == list(range(1, len(got) + 1)) and len(got) < total, "it was never closed"
    assert frames[-1][0] != 8 or frames[-1][1][:2] == struct.pack("!H", 1013)
    assert install_text(monitor.home + "/monitor.log").count("a client reads too slowly") == 1
    back = monitor.websocket(since=1)
    assert back.subscribed["resync"] is False
    assert len(back.ask("events", type="get_events", sessionId="slow", limit=total)["events"]) == total
    monitor.emit(*protocol_events("slow", 1))
    for client, first in ((back, 2), (reading, total + 1)):
        assert [event["seq"] for event in client.events(total + 2 - first)] == list(range(first, total + 2))
    slow.close()


@contextlib.contextmanager
def protocol_inside(**config: Any) -> Iterator[cm.Monitor]:
    """Run a monitor in a thread of this process, so that a test can shorten its deadlines beforehand."""
    place = RunningMonitor(new_home(), config)
    with loading_here(place.home) as made:
        yield made
    shutil.rmtree(place.home, ignore_errors=True)


def protocol_drip(port: int, data: bytes) -> bytes:
    """Send a head byte by byte, without an end; return what came back before the connection was cut."""
    received, deadline = b"", time.monotonic() + 15
    with socket.create_connection(("127.0.0.1", port), 0.03) as sock, contextlib.suppress(ConnectionError):
        for byte in itertools.chain(data, itertools.repeat(ord("x"))):
            assert time.monotonic() < deadline, "the connection was not cut"
            with contextlib.suppress(socket.timeout):
                sock.sendall(bytes([byte]))
                piece = sock.recv(4096)
                if not piece:
                    break
                received += piece
    return received


def protocol_stop(port: int, data: bytes) -> bytes:
    """Send bytes and then nothing; return what came back before the connection was cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as sock:
        sock.sendall(data)
        return sock.makefile("rb").read()


@pytest.mark.parametrize("send", [protocol_drip, protocol_stop])
def test_a_request_that_is_never_finished_is_cut_off_on_both_ports(monkeypatch, send):
    monkeypatch.setattr(cm, "REQUEST_DEADLINE_S", 0.3)
    monkeypatch.setattr(cm, "BODY_DEADLINE_S", 0.3)
    monkeypatch.setattr(cm.RequestHandler, "timeout", 0.3 if send is protocol_stop else 10.0)
    with protocol_inside() as inside, contextlib.closing(ProtocolPeer(inside.ws_port)) as good:
        good.next("hello")
        head, host = b"GET / HTTP/1.1\r\nX: ", f"127.0.0.1:{inside.port}"
        origin = (f"Origin: http://{host}", "Content-Length: 9000000")
        half = protocol_get(host, *origin, path="/api/hooks", method="POST") + b'{"half'
        requests = [*itertools.product((inside.ws_port, inside.port), (head, b"")), (inside.port, half)]
        for answer in at_once(*(functools.partial(send, *request) for request in requests)):
            assert b" 101 " not in answer and b" 200 " not in answer
        assert inside.loop.call(lambda: inside.ingest.counts["stored"]) == 0
        good.say(type="get_sessions")  # a client whose handshake is done stays connected
        assert good.next("sessions")


def test_a_client_that_answers_no_ping_is_dropped_and_one_that_does_stays(monkeypatch):
    monkeypatch.setattr(cm, "PING_INTERVAL_S", 0.4)
    with protocol_inside() as inside:
        answering, silent = ProtocolPeer(inside.ws_port), ProtocolPeer(inside.ws_port)
        answering.next("hello")
        for _ in range(4):
            assert answering.frame() == (9, b"")
            answering.send(protocol_frame(10, b""))
        frames = list(itertools.islice(iter(silent.frame, None), 20))
        assert [opcode for opcode, _ in frames] in ([1, 9, 9], [1, 9, 9, 8])
        answering.say(type="get_sessions")
        assert answering.next("sessions")
        answering.close(), silent.close()


@pytest.mark.parametrize(("which", "path"), [("port", "/ws"), ("port", ""), ("ws_port", "")])
def test_a_connection_too_many_gets_503_on_both_ports(monitor, which, path):
    port = getattr(monitor.serve(limits={"connections": 3}), which)
    with contextlib.ExitStack() as held:
        for _ in range(3):
            plain = functools.partial(socket.create_connection, ("127.0.0.1", port), 15)
            held.enter_context(contextlib.closing(ProtocolPeer(port, path=path) if path else plain()))
        request = protocol_upgrade(f"127.0.0.1:{port}", path=path) if path else b""
        status, headers, body = protocol_exchange(port, request)
        assert status == 503 and ("content-type", "application/json") in headers
        assert json.loads(body)["error"]

    def has_room() -> bool:
        try:
            monitor.websocket(None).close()
            return monitor.request("/health")[0] == 200
        except (websockets.WebSocketException, OSError, http.client.HTTPException, AssertionError):
            return False  # websockets 17.4 fails an assertion of its own when it is cut off while it connects

    eventually(has_room, what="a place for a new connection")


def test_a_connection_is_refused_and_not_counted_where_no_thread_starts(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))
    server = cm.HttpServer(listener, cm.Access("off", "t", [], []), None, None, 1)

    def start(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    for _ in range(2):
        with socket.create_connection(listener.getsockname(), 15) as peer:
            assert peer.recv(1000).startswith(b"HTTP/1.1 503 ")
    assert not server.deadlines
    server.stop()


# -- HTTP ----------------------------------------------------------------------


def protocol_origin(monitor: RunningMonitor) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{monitor.port}"}


def protocol_get(host: str | None, *more: str, path: str = "/health", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def protocol_upgrade(host: str | None, *more: str, path: str = "/") -> bytes:
    host_line = "-Host" if host is None else f"Host: {host}"
    return protocol_head(host_line, *("+" + line for line in more), line=f"GET {path} HTTP/1.1") + b"\r\n\r\n"


def protocol_check_headers(headers: Any) -> None:
    """Check the headers of every answer in JSON: no other site reads or frames it."""
    headers = dict(headers)
    expected = {
        "content-type": "application/json", "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
        "x-frame-options": "DENY", "cache-control": "no-store", "cross-origin-opener-policy": "same-origin",
    }  # fmt: skip
    assert {name: headers.get(name) for name in expected} == expected
    assert not [name for name in headers if name.startswith("access-control")]
    assert "Python" not in headers.get("server", "")


@story_table("http.txt", "routes", "path, expected")
def test_every_route_answers_json_and_gives_no_secret(spoken, path, expected):
    spoken.emit(*protocol_events("routes", 2))
    status, headers, body = spoken.request(path)
    answer = json.loads(body)
    expected = {name: cm.__version__ if value == "VERSION" else value for name, value in expected.items()}
    assert status == 200 and answer.items() >= expected.items()
    protocol_check_headers(headers)
    assert cm.read_token(spoken.home + "/token").encode() not in body
    head_status, head_headers, head_body = spoken.request(path, "HEAD")
    assert (head_status, head_body) == (200, b"")
    assert head_headers["content-type"] == headers["content-type"]
    assert {"content-length", "transfer-encoding"} & head_headers.keys()
    if path == "/api/config":
        assert (answer["server"]["port"], answer["server"]["wsPort"]) == (spoken.port, spoken.ws_port)


def protocol_request(request: str, port: int) -> bytes:
    """Return the bytes of a request that is refused: with Host, with the page's Origin where it writes."""
    if request.startswith("raw "):
        return request[len("raw ") :].encode("latin-1")
    head, blank, body = request.replace("PORT", str(port)).partition("\n\n")
    line, *headers = head.split("\n")
    method, path = line.split(" ")
    if method != "GET":
        headers.append(f"Origin: http://127.0.0.1:{port}")
    if blank and "chunked" not in head:
        headers.append(f"Content-Length: {len(body)}")
    return protocol_get(f"127.0.0.1:{port}", *headers, path=path, method=method) + body.encode("latin-1")


@pytest.mark.parametrize("rule", [it for it in HTTP_ROWS if it.startswith("refused")])
def test_a_bad_request_is_refused_in_json_and_nothing_is_stored(spoken, rule):
    spoken.emit(*protocol_events("routes", 2))
    seq = spoken.get("/api/status")["seq"]
    about, *requests = HTTP_ROWS[rule]
    status, *more = about.split()
    expected = dict(it.split("=") for it in more)
    for request in requests:
        got, headers, body = protocol_exchange(spoken.port, protocol_request(request, spoken.port))
        assert (got, request) == (int(status), request)
        protocol_check_headers(headers)
        answer = json.loads(body)
        assert answer["error"] and expected.get("field", "") in answer["error"]
        assert expected.items() <= {**dict(headers), **answer}.items(), request
    assert spoken.get("/api/status")["seq"] == seq


def test_one_connection_serves_many_requests(spoken):
    connection = http.client.HTTPConnection("127.0.0.1", spoken.port, timeout=15)
    sockets, took = set(), []
    for path in ("/", "/api/status", "/api/events?limit=0", "/api/export?session=x", *["/health"] * 50):
        began = time.monotonic()
        connection.request("GET", path)
        connection.getresponse().read()
        took.append(time.monotonic() - began)
        sockets.add(id(connection.sock))
    assert len(sockets) == 1
    assert min(took) < 0.03, "no answer waits for the acknowledgement of a part of it (40 ms)"
    connection.close()


def protocol_check_page(monitor: RunningMonitor) -> str:
    """Check that the page's policy fits what is in it; return the page."""
    status, headers, body = monitor.request("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    protocol_check_headers({**headers, "content-type": "application/json"})
    parts = [part.split() for part in headers["content-security-policy"].split(";")]
    policy = {name: values for name, *values in parts}
    itself, *others = policy["connect-src"]
    assert itself == "'self'" and f"ws://127.0.0.1:{monitor.ws_port}" in others
    assert all("127.0.0.1" in source for source in others) and len(policy) == len(parts)
    page = body.decode("utf-8")
    closed = "default-src form-action base-uri frame-ancestors trusted-types".split()
    expected = dict.fromkeys(closed, ["'none'"])
    expected.update({"require-trusted-types-for": ["'script'"], "img-src": ["'self'", "data:"]})
    for kind in ("script", "style"):
        [(attributes, content)] = re.findall(rf"<{kind}\b([^>]*)>(.*?)</{kind}\s*>", page, re.S | re.I)
        assert not attributes.strip()
        digest = base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode()
        expected[f"{kind}-src"] = [f"'sha256-{digest}'"]
    assert policy.items() >= expected.items()
    assert not re.search(r"\s(on\w+|style)\s*=", re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S))
    return page


def test_the_page_comes_with_a_policy_that_fits_it(spoken):
    page = protocol_check_page(spoken)
    assert page.encode() == pathlib.Path(ROOT, "index.html").read_bytes() == spoken.request("/index.html")[2]
    status, headers, body = spoken.request("/", "HEAD")
    assert (status, body) == (200, b"") and "content-security-policy" in headers
    _, of_a_proxy, _ = protocol_exchange(spoken.port, protocol_get("monitor.example", path="/"))
    assert f"wss://monitor.example:{spoken.ws_port}" in dict(of_a_proxy)["content-security-policy"]


@protocol_rows("access")
def test_only_our_hosts_and_origins_are_served_on_both_ports(spoken, status, row):
    page, ws = spoken.port, spoken.ws_port
    for port, other, path in ((page, ws, ""), (ws, page, "/"), (page, ws, "/ws")):
        host, *others = protocol_filled(row, PORT=port, PAGE=page, OTHER=other, WS=ws)
        more = [other if other.startswith("Host") else f"Origin: {other}" for other in others]
        given_host = None if host == "no host" else host
        request = protocol_upgrade(given_host, *more, path=path) if path else protocol_get(given_host, *more)
        got, headers, body = protocol_exchange(port, request)
        assert got == (101 if status == 200 and path else status)
        assert not [name for name, _ in headers if name.startswith("access-control")]
        assert status == 200 or json.loads(body)["error"]


def test_a_refused_page_names_the_line_that_allows_its_host(spoken, monitor):
    for name in ("evil<b>", "", "x" * 30 + "\u00e9"):
        status, _, body = protocol_exchange(spoken.port, protocol_get(name, "Accept: text/html"))
        assert status in (400, 421) and b"allowedHosts" not in body
    request = protocol_get("Box.local:8000", "Accept: text/html,*/*", path="/")
    status, headers, body = protocol_exchange(spoken.port, request)
    assert status == 421 and ("content-type", "text/plain; charset=utf-8") in headers
    line = re.search(r"write (.*) into ~/.contextuate/monitor.config.json and run `restart`", body.decode())
    assert line and json.loads(line[1]) == {"server": {"allowedHosts": ["box.local"]}}
    monitor.serve(**json.loads(line[1]))
    arrived = cm.Request("GET", "/", (("host", "[fd00::7]:80"),), address="fd00::7")
    assert cm.Access("off", "t", [], []).check_host(arrived) == "[fd00::7]"
    request = protocol_get("Box.local:8000", "Origin: https://box.local:8000", path="/")
    assert protocol_exchange(monitor.port, request)[0] == 200


def test_upgrades_cost_no_thread_and_half_a_one_holds_up_nothing(monitor: RunningMonitor) -> None:
    monitor.serve(limits={"connections": 2000})
    monitor.websocket().close()

    def cost() -> tuple[int, int]:
        about = dict(line.split(":", 1) for line in install_text(f"/proc/{monitor.pid}/status").splitlines())
        return int(about["Threads"]), int(about["VmRSS"].split()[0])

    upgrade = protocol_upgrade(f"127.0.0.1:{monitor.port}", path="/ws")
    threads, _ = cost()
    with contextlib.ExitStack() as held:
        costs = []
        for port, path in ((monitor.port, "/ws"), (monitor.ws_port, "/")):
            before = cost()[1]
            for _ in range(300):
                held.enter_context(contextlib.closing(ProtocolPeer(port, path=path)))
            eventually(lambda: cost()[0] <= threads + 1, what="the end of the threads of HTTP")
            costs.append(cost()[1] - before)
        assert costs[0] < costs[1] + 3000, "kB"
        for _ in range(100):
            sock = held.enter_context(socket.create_connection(("127.0.0.1", monitor.port)))
            sock.sendall(upgrade[: len(upgrade) // 2])
        began = time.monotonic()
        held.enter_context(contextlib.closing(ProtocolPeer(monitor.port, path="/ws")))
        monitor.emit(payload("Stop"))
        assert monitor.get("/health")["status"] == "ok"
        assert time.monotonic() - began < cm.REQUEST_DEADLINE_S, "before the halves are cut off"


def test_a_posted_hook_is_stored_before_it_is_answered(spoken):
    client = spoken.websocket(sessionIds=["posted"])
    body = json.dumps(payload("UserPromptSubmit", "posted", prompt="over HTTP"), indent=2).encode()
    status, headers, answer = spoken.request("/api/hooks", "POST", body, protocol_origin(spoken))
    assert (status, headers["content-type"], json.loads(answer)) == (200, "application/json", {})
    (line,) = journal_plain_lines(spoken.home + "/events", "posted")
    event = json.loads(line)
    assert (event["hookType"], event["data"]["message"]) == ("UserPromptSubmit", "over HTTP")
    assert client.events(1) == [event]
    pieces: Any = iter([body[:9], body[9:]])  # in chunks, then after 100 Continue
    assert spoken.request("/api/hooks", "POST", pieces, protocol_origin(spoken))[0] == 200
    origin = f"Origin: http://127.0.0.1:{spoken.port}"
    lines = ("Expect: 100-continue", f"Content-Length: {len(body)}", origin, "Connection: close")
    with socket.create_connection(("127.0.0.1", spoken.port), timeout=15) as sock:
        sock.sendall(protocol_get(f"127.0.0.1:{spoken.port}", *lines, path="/api/hooks", method="POST"))
        assert sock.recv(99) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert sock.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
    assert len(journal_plain_lines(spoken.home + "/events", "posted")) == 3


def test_a_post_needs_the_pages_origin_or_the_token(spoken):
    token = cm.read_token(spoken.home + "/token")
    words = {"PORT": spoken.port, "WS": spoken.ws_port, "TOKEN": token}
    words["COOKIE"] = f"contextuate_token_{spoken.port}"
    body = json.dumps(payload("Stop", "post-origin")).encode()
    for row in HTTP_ROWS["posts"]:
        expected, *lines = protocol_filled(row, **words)
        headers = dict(line.split(": ", 1) for line in lines)
        for path, content in (("/api/hooks", body), ("/api/message", b'{"type":"send_test_event"}')):
            assert spoken.request(path, "POST", content, headers)[0] == int(expected), (path, headers)
    assert len(journal_plain_lines(spoken.home + "/events", "post-origin")) == 4


def test_another_site_may_link_to_the_page_but_embed_nothing_of_it(spoken):
    for expected, site, kind in (row.split(" | ") for row in HTTP_ROWS["sites"]):
        about = {"Sec-Fetch-Site": site, "Sec-Fetch-Dest": kind}
        for path in ("/", "/api/search?q=x"):
            assert spoken.request(path, headers=about)[0] == int(expected), (about, path)


def test_a_body_that_no_route_wants_is_not_taken_for_the_next_request(spoken):
    host = f"127.0.0.1:{spoken.port}"
    for path in ("/", "/index.html", "/health"):
        inner = protocol_get(host, path="/api/nothing")
        outer = protocol_get(host, f"Content-Length: {len(inner)}", path=path)
        stream = protocol_stop(spoken.port, outer + inner + protocol_get(host, "Connection: close"))
        assert re.findall(rb"^HTTP/1\.1 (\d+) ", stream, re.M) in ([b"200", b"200"], [b"400"], [b"200"]), path


@pytest.fixture(scope="module")
def guarded() -> Iterator[tuple[RunningMonitor, str]]:
    """A running monitor with server.auth "token", and its token."""
    made = RunningMonitor(new_home(), {"server": {"auth": "token"}}).serve()
    link = re.search(r"http://\S+?/\?token=(\S+)", in_process(made, "url").stdout)
    assert link
    yield made, link[1]
    clean_up(made)


def test_with_auth_token_every_request_needs_it(guarded):
    monitor, token = guarded
    assert install_text(monitor.home + "/token").strip() == token and len(token) >= 32  # 192 bits in base64
    assert hook_mode_of(monitor.home + "/token") == 0o600
    words = {"PORT": monitor.port, "WRONG": token[:-1] + ("y" if token[-1] == "x" else "x"), "TOKEN": token}
    words["COOKIE"] = f"contextuate_token_{monitor.port}"
    for row in HTTP_ROWS["token"]:
        status, *headers = protocol_filled(row, **words)
        for path in "/ /index.html /health /api/status /api/config /api/events /api/export".split():
            request = protocol_get(f"127.0.0.1:{monitor.port}", *headers, path=path)
            got, _, body = protocol_exchange(monitor.port, request)
            assert (str(got), path, headers) == (status, path, headers)
            assert token.encode() not in body
        for port, path in ((monitor.ws_port, "/"), (monitor.port, "/ws")):
            upgrade = protocol_upgrade(f"127.0.0.1:{port}", *headers, path=path)
            assert protocol_exchange(port, upgrade)[0] == (101 if status == "200" else int(status)), headers


def test_a_link_with_the_token_is_exchanged_for_a_cookie(guarded):
    monitor, token = guarded
    status, headers, body = monitor.request(f"/?token={token}")
    assert (status, headers["location"], token.encode() in body) == (303, "./", False)
    name, *attributes = [part.strip() for part in headers["set-cookie"].split(";")]
    assert {"httponly", "samesite=strict"} <= {attribute.lower() for attribute in attributes}
    assert not [attribute for attribute in attributes if attribute.lower().startswith(("domain", "path"))]
    assert monitor.request("/", headers={"Cookie": name})[0] == 200
    assert monitor.request("/api/status", headers={"Cookie": f"other=1; {name}"})[0] == 200
    for wrong in ("/?token=", "/?token=x", f"/?token={token}x", f"/?token={token[:-1]}", "/?token=%ff%00"):
        status, headers, _ = monitor.request(wrong)
        assert (wrong, status, "set-cookie" in headers) == (wrong, 401, False)
    evil = protocol_get(f"evil.example:{monitor.port}", path=f"/?token={token}")
    assert protocol_exchange(monitor.port, evil)[0] == 421
    for path in pathlib.Path(monitor.home).rglob("*"):
        if path.is_file() and path.name != "token":
            assert token.encode() not in path.read_bytes(), path


def test_an_export_is_the_stored_lines_with_its_filters(running):
    about = {"eventType": "message", "data": {}}
    sessions = [f"s{at % 3 if at < 60 else 0}" for at in range(1200)]
    running.emit(*({**about, "sessionId": it, "timestamp": at + 1} for at, it in enumerate(sessions)))
    stored = journal_plain_lines(running.home + "/events")
    for query, expected in (
        ("", stored),
        ("?session=s1", stored[1:60:3]),
        ("?session=unknown-id", []),
        ("?from=21&to=21", []),
        ("?session=s1&from=11&to=21", stored[10:20:3]),
    ):
        status, headers, body = running.request(f"/api/export{query}")
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        assert "attachment" in headers["content-disposition"]
        lines = body.splitlines()
        assert sorted(lines) == sorted(expected) and (lines == expected or "session=" not in query), query
    status, headers, body = running.request("/api/export", "HEAD")
    assert (status, headers["transfer-encoding"], body) == (200, "chunked", b"")
    old = protocol_get(f"127.0.0.1:{running.port}", path="/api/export?session=s1").replace(b"1.1\r", b"1.0\r")
    head, _, body = protocol_stop(running.port, old).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower(), "HTTP 1.0 knows no chunks"
    assert body.splitlines() == stored[1:60:3]


def test_a_status_from_before_the_events_of_its_turn_is_not_sent_again() -> None:
    ours, theirs = socket.socketpair()
    with protocol_inside() as inside, ours, theirs:

        def in_one_turn() -> None:
            inside.hooks.connections[ours], inside.hooks.waiting[ours] = cm.LineSplitter(), 1
            inside._arrivals.add((json.dumps(payload("Stop")).encode(), ours))
            inside.status.encoded()

        inside.loop.call(in_one_turn)
        assert theirs.recv(1) == ee.ACKNOWLEDGEMENT
        assert json.loads(inside.status.encoded())["events"]["stored"] == 1


@story_table("tables.txt", "turns", "waiting, taken")
def test_machines_take_turns(waiting: dict[str, int], taken: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "TURN_LINES", 4)
    turns = cm.Turns()
    line = rb'{"hook":{"tool_input":"\"machineId\":\"x\""},"id":"1","machineId":"%s","pid":1}'
    for machine, count in waiting.items():
        turns.add(*((line % machine.encode(), f"{machine}{number}") for number in range(count)))
    turns.put_back(turns.take())  # they were not stored
    rounds = []
    while turns.waiting:
        rounds.append([number for _, number in turns.take()])
    assert (rounds, turns.size, turns.take()) == (taken, 0, [])


def test_a_flood_of_one_machine_does_not_delay_another(running: RunningMonitor) -> None:
    event = json.dumps({"hook": payload("Stop"), "machineId": "flood"}).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        os.kill(running.pid, signal.SIGSTOP)
        *floods, quiet = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(21))
        for sock in (*floods, quiet):
            sock.settimeout(30)
            sock.connect(running.socket_path)
            sock.sendall(event * 500 if sock is not quiet else event.replace(b"flood", b"quiet"))
        os.kill(running.pid, signal.SIGCONT)
        assert quiet.recv(1) == ee.ACKNOWLEDGEMENT
        assert sum(len(sock.recv(500)) for sock in multiprocessing.connection.wait(floods, 0)) < 20 * 500 / 2


def test_a_page_that_reads_too_slowly_misses_rows_and_no_state(monitor: RunningMonitor) -> None:
    monitor.serve(limits={"clientQueueBytes": 200_000})
    page, found, states = ProtocolPeer(monitor.ws_port, receive_bytes=4096), collections.Counter(), []
    page.say(type="subscribe", view="rows", changes=True)
    page.next("subscribed")
    for _ in range(9):  # more than sockets and queues take: nothing is read meanwhile
        monitor.emit(*[payload("UserPromptSubmit", agent_id="a1", agent_type="x" * 4000)] * 200)
    monitor.emit(payload("PermissionRequest", "asks", tool_name="Bash"))
    while found["event"] + found["skipped"] < 1801 or not states:
        received = json.loads(page.frame()[1])
        for sent in received.get("messages", [received]):
            found[sent["type"]] += sent["events"] if sent["type"] == "skipped" else 1
            if sent["type"] == "session_update" and sent["session"]["sessionId"] == "asks":
                states.append(sent["session"]["state"])
    assert 0 < found["event"] < 1801 == found["event"] + found["skipped"] and set(states) == {"waiting"}
    page.close()


def test_a_page_gets_what_comes_together_in_one_frame(running: RunningMonitor) -> None:
    page, other = running.websocket("rows", changes=True), running.websocket("rows")
    os.kill(running.pid, signal.SIGSTOP)
    with running.connect() as sock:
        lines = (json.dumps(payload("Stop", f"s{number}")) + "\n" for number in range(9))
        sock.sendall("".join(lines).encode())
        os.kill(running.pid, signal.SIGCONT)
        for client, frames in ((page, 2), (other, 18)):
            found = collections.Counter()
            while found["event"] < 9 or found["session_update"] < 9:
                together = client.receive()
                found.update(message["type"] for message in together)
                frames -= together[0]["type"] != "status"
            assert frames == 0 and found["event"] == found["session_update"] == 9


def test_an_update_has_only_what_changed(running: RunningMonitor) -> None:
    page, other = running.websocket("rows", changes=True), running.websocket("rows")

    def updates(*hooks: dict[str, Any]) -> list[dict[str, Any]]:
        running.emit(*hooks)
        last, found = running.sessions()["s1"]["lastEventTime"], []
        for client in (page, other):
            update = {}
            while update.get("lastEventTime") != last:
                update = client.next("session_update")["session"]
            found.append(update)
        return found

    first, whole = updates(payload("UserPromptSubmit", prompt="work"))
    assert first == whole
    changes, whole = updates(payload("PreToolUse", tool_name="Bash", tool_use_id="t1"))
    assert set(changes) == {"sessionId", "lastEventTime", "counts", "activity", "openCalls", "openCallCount"}
    assert {**first, **changes} == whole
    listed = page.ask("sessions", type="get_sessions")["sessions"]  # may be newer than the last update
    assert listed == [running.get("/api/sessions/s1")] == [*running.sessions().values()]
    assert listed[0]["openCalls"]
    changes, whole = updates(payload("Stop"))
    assert changes == whole


# ---- Sessions: what each event says about who works, who waits and who is gone -----------------------------
# Pure: events in, sessions out. Where the real client was recorded the recording is replayed; the rest are stories.

SESSION_MACHINE = "box"
SESSION_STORIES = install_text(ROOT + "/.ci/stories/sessions.txt")  # their notation is at its head
SESSION_VERBS = dict(re.findall(r"^(\w+) = (.*)", SESSION_STORIES, re.M))
SESSION_LINES = {name: line for name, (line,) in story_cases("tables.txt", "transcript lines").items()}


def session_line(name: str, time_ms: int, **more: Any) -> bytes:
    moment = datetime.datetime.fromtimestamp(time_ms / 1000, datetime.timezone.utc)
    stamp = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return ee.encode_json({**SESSION_LINES[name], "isSidechain": False, "timestamp": stamp, **more}) + b"\n"


def evidence(name: str, time_ms: int = NOW_MS, agent_id: str = "", **more: Any) -> list[dict[str, Any]]:
    """Return what a transcript's parser finds in one of SESSION_LINES."""
    return ee.TranscriptParser(agent_id).facts_of(session_line(name, time_ms, **more))


SESSION_STEP = re.compile(r"(?:(\d+)x )?(?:(\w+): )?(?:(spooled|imported|remote) )?(late )?(\w+) ?(.*)")
SESSION_INPUTS = {"WebFetch": "url", "Agent": "description", "ExitPlanMode": "plan"}
SESSION_INPUTS |= dict.fromkeys("Bash apply_patch bash run_in_terminal".split(), "command")
SESSION_INPUTS |= dict.fromkeys("Read Write Edit".split(), "file_path")


def session_ms(text: str) -> int:
    """Return a time such as -65s in milliseconds; none is 0."""
    number, unit = re.fullmatch(r"(-?\d*)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number or 0) * {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "": 0}[unit]


@dataclasses.dataclass
class SessionStory:
    """A book, a clock, and what arrives."""

    book: cm.Sessions = dataclasses.field(default_factory=lambda: cm.Sessions(own_machine=SESSION_MACHINE))
    time: int = NOW_MS
    set_by: int = 0  # how far this machine's clock was set forward
    count: int = 0
    session: str = "s1"
    pid: int = 0
    namespace: int = 0
    machine: str = SESSION_MACHINE
    clock: int = 0  # how far the emitter's clock is off
    marked: int = 0
    calls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # id → fields of its call
    heard: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # all events, and `processes`
    is_replayed: bool = False  # facts are those of a new book that takes all stored lines
    cuts: frozenset[int] = frozenset()  # before which events the monitor restarts from its snapshots

    def play(self, steps: str) -> dict[str, Any]:
        """Do the steps of a story and check the facts after each; return the session of the last one."""
        for part in steps.replace("\n", ";").split(";"):
            step, _, facts = (text.strip() for text in part.partition("→"))
            before = self.now() if "same" in facts else {}
            session = self.do(step)
            if facts:
                session_check(facts, self.now(session), self.time, step, before)
        return self.now(session)

    def do(self, step: str) -> str:
        """Do one step; return the id of its session."""
        times, name, mark, late, verb, rest = SESSION_STEP.fullmatch(step).groups()  # type: ignore[union-attr]
        session = name if name and name[0] == "s" else self.session
        agent = (name or "") if name != session else ""
        hook = "any" if verb == "hook" else SESSION_VERBS.get(verb, "").partition(" ")[0]
        for _ in range(int(times or 1)):
            if hook == "Monitor" or verb in ("usage", "under", "forked"):
                self.note(session, verb, rest)
            elif hook[:1].isupper() or hook == "any":
                self.time += 1000
                fields = self.fields(verb, rest)
                fields.update({"agent_id": agent, "agent_type": "general-purpose"} if agent else {})
                self.deliver(payload(session=session, **fields), self.marked + 500 if late else None, mark)
            elif hook:
                named = {"n": f"n{self.count}", "by": f"{name}: " if name else ""}
                for part in SESSION_VERBS[verb].format(*rest.split(" ", 1), "", **named).split("; "):
                    self.do(part)
            elif verb == "shows":
                self.time += 1000
                at, (status, _, more) = self.marked + 500 if late else self.time, rest.partition(" ")
                data = {"status": status, **({"previous": ""} if more == "again" else {"waitingFor": more})}
                shown = {"eventType": "client_status", "hookType": "", "pid": self.pid, "data": data}
                if rest in SESSION_LINES:
                    (shown,) = evidence(rest, agent_id=agent)
                self.apply({**shown, "sessionId": session, "id": f"e{self.count + 1}", "timestamp": at})
            elif verb == "processes":
                self.time += 1000
                look = {"running": [*map(int, rest.split())], "is_sure": mark != "remote"}
                heard = self.hear({"eventType": verb, "timestamp": self.time, **look})
                session_look(self.book, heard)
            elif verb == "wait":
                self.wait(session_ms(rest))
            elif verb == "mark":
                self.marked = self.time + self.clock - session_ms(rest)
            elif verb == "clock":
                self.clock = session_ms(rest)
            elif verb in ("machine", "pid", "namespace"):
                setattr(self, verb, rest if verb == "machine" else int(rest))
            else:
                assert verb in ("look", "new"), step
        return session

    def fields(self, verb: str, rest: str) -> dict[str, Any]:
        fields: dict[str, Any]
        if verb == "hook":
            hook, *pairs = shlex.split(rest)
            fields = {name: story_value(text) for name, _, text in (pair.partition("=") for pair in pairs)}
        else:
            hook, *names = SESSION_VERBS[verb].split(" ")
            fields = dict(zip(names, rest.split(" ", max(len(names) - 1, 0))))
            target = fields.pop("target", "")
            if "tool_name" in fields:
                name = SESSION_INPUTS.get(fields["tool_name"], "text")
                fields["tool_input"] = {name: target} if target else {}
        if use_id := fields.get("tool_use_id"):
            known = {name: fields[name] for name in ("tool_name", "tool_input") if name in fields}
            fields = {**self.calls.setdefault(use_id, known), **fields}
        if use_id == "-":
            del fields["tool_use_id"], self.calls["-"]
        if verb == "stop":
            tasks = [{"id": each, "status": "running", "description": each} for each in rest.split()]
            fields = {"stop_hook_active": False, "background_tasks": tasks}
        elif verb == "round":
            words = (word.partition("=") for word in rest.split())
            made = [(each, tool or self.calls[each]["tool_name"]) for each, _, tool in words]
            names = ("tool_use_id", "tool_name", "tool_response")
            fields = {"tool_calls": [dict(zip(names, (*call, "no such tool"))) for call in made]}
        return {"hook": hook, **fields}

    def note(self, session: str, verb: str, rest: str) -> None:
        """Take what comes from no hook: an act on the page, a transcript's totals, an emitter's word on a parent."""
        about = {"sessionId": session, "timestamp": self.time}
        if verb in ("usage", "forked"):
            usage = usage_data(int(rest)) if verb == "usage" else {"origin": rest}
            about.update(eventType="usage", hookType="", data={"usage": usage})
        elif verb == "under":
            about.update(eventType="user_prompt", hookType="UserPromptSubmit", parentSessionId=rest, data={})
        else:
            _, action, name = SESSION_VERBS[verb].split(" ")
            data = {"action": action, name: True if action in ("pin", "hide") else rest or None}
            about.update(eventType="session_meta", hookType="Monitor", data=data)
        self.apply(about)

    def deliver(self, hook_payload: dict[str, Any], at: int | None = None, mark: str = "") -> None:
        """Let one payload arrive now; `at`: it happened then and was overtaken."""
        event_id = f"e{self.count + 1}"
        wrapped = {"hook": hook_payload, "id": event_id, "machineId": self.machine, "pid": self.pid or None}
        if self.namespace:
            wrapped["pidNamespace"] = self.namespace
        self.apply({**wrapped, "timestamp": self.time + self.clock if at is None else at}, mark)

    def apply(self, given: dict[str, Any], mark: str = "") -> dict[str, Any]:
        """Let anything arrive now, as the monitor would take it."""
        self.count += 1
        event, marked = ee.build_event(given, self.time, self.machine), {mark: True} if mark else {}
        heard = self.hear({"seq": self.count, "received": self.time, **event, **marked})
        return self.book.to_json(self.book.apply(heard))

    def hear(self, event: dict[str, Any]) -> dict[str, Any]:
        """Remember what comes now, after a restart where there is a cut."""
        if len(self.heard) in self.cuts:
            live, self.book = self.book, session_restored(self.book)
            if self.heard and self.heard[-1]["eventType"] != "processes":  # the checkpoint may be older
                self.book.apply(self.heard[-1])
            assert self.book.sessions == live.sessions
            assert self.book.skew_ms(self.machine) == live.skew_ms(self.machine)
        self.heard.append(event)
        return event

    def now(self, session: str = "") -> dict[str, Any]:
        book = self.book
        if self.is_replayed:
            book = cm.Sessions(own_machine=SESSION_MACHINE)
            for event in self.heard:
                if event["eventType"] == "processes":
                    session_look(book, event)
                else:
                    book.apply(cm.parse_stored(ee.encode_json(event)))
            book.tick(self.time, self.time)
        found = book.sessions.get(session or self.session)
        return book.to_json(found) if found else {}

    def wait(self, milliseconds: int = 0) -> list[str]:
        """Look at the clock when time has passed; return the ids of the sessions that changed."""
        self.time += milliseconds
        return [it.session_id for it in self.book.tick(self.time, self.time - self.set_by)]


def session_look(book: cm.Sessions, event: dict[str, Any]) -> None:
    book.check_processes(0, lambda pid, _: pid in event["running"], event["timestamp"], event["is_sure"])


def session_story(**fields: Any) -> SessionStory:
    story = SessionStory(**fields)
    story.play("hook SessionStart source=startup model=claude-opus-5-5; prompt make the cart work")
    return story


def session_check(facts: str, shown: dict[str, Any], now_ms: int, about: Any, before: Any = None) -> None:
    """Check the facts of a session; `before`: what it was before the step."""
    known = session_facts(shown, now_ms)
    names = "|".join(map(re.escape, (*cm.SESSION_STATES, *known)))
    for fact in re.split(rf", (?=(?:{names})\b)", facts):
        name = fact.partition(" ")[0]
        if fact == "same":
            assert session_matter(shown) == session_matter(before), about
        elif name.rstrip(":") in cm.SESSION_STATES:
            state, reason = shown["state"], shown["reason"] or {"kind": "", "detail": "", "tool": ""}
            kind, detail = f"{state} {reason['kind']}", reason["detail"]
            what = f"{kind} {reason['tool']}" if reason["tool"] else kind
            assert fact in (state, kind, f"{state}: {detail}", f"{what}: {detail}"), about
        else:
            assert f"{name} {known[name]}" == fact, about


def session_facts(shown: dict[str, Any], now_ms: int) -> dict[str, str]:
    """Return what facts can be about: name → value, `-` for none; times are how long ago."""

    def ago(time_ms: int | None) -> str:
        return "-" if time_ms is None else f"{(now_ms - time_ms) / 1000:g}s"

    def words(values: Iterable[Any]) -> str:
        return " ".join(map(str, values)) or "-"

    def job(agent: dict[str, Any]) -> str:
        parents = [parent["label"] for parent in agents if parent["agentId"] == agent["parentAgentId"]]
        return " ".join([" of ".join([agent["label"], *parents]), words(agent["counts"].values())])

    counts, calls, agents = shown["counts"], shown["openCalls"], shown["agents"]
    facts = {
        "open": words(call["toolUseId"] for call in calls),
        "by": words(call["agentId"] or "main" for call in calls),  # whose calls are open
        "tools": words(call["toolName"] for call in calls),
        "targets": words(call["target"] for call in calls),
        "doing": shown["activity"] or "-",
        "since": ago(shown["stateSince"]),
        "asked": ago((shown["reason"] or {"since": None})["since"]),
        "heard": ago(shown["lastEventTime"]),
        "over": ago(shown["endTime"]),
        "events": counts["events"], "calls": counts["toolCalls"], "errors": counts["toolErrors"],
        "interrupted": counts["interrupted"], "prompts": counts["prompts"], "counts": words(counts.values()),
        "agents": words(agent["agentId"] for agent in agents),
        "agent_states": words(agent["state"] for agent in agents),
        "jobs": " + ".join(map(job, agents)) or "-",
        "stuck": words(signal["kind"] for signal in shown["stuck"]),  # details are facts by the kind's name
        "label": shown["label"], "from": shown["labelSource"], "model": shown["model"] or "-",
        "machine": shown["machineId"], "pid": shown["pid"] or "-",
        "continues": shown["continuedFrom"] or "-", "parent": shown["parentSessionId"] or "-",
        "children": words(shown["childSessionIds"]), "pinned": shown["isPinned"], "hidden": shown["hidden"],
        "tokens": (shown["tokenUsage"] or {"totalOutput": "-"})["totalOutput"],
    }  # fmt: skip
    for sign in shown["stuck"]:
        facts.update({sign["kind"]: sign["detail"], sign["kind"] + ".since": ago(sign["since"])})
    for agent in agents:
        facts.update({
            agent["agentId"]: agent["state"],
            agent["agentId"] + ".label": agent["label"],
            agent["agentId"] + ".type": agent["agentType"],
            agent["agentId"] + ".below": agent["parentAgentId"] or "-",
            agent["agentId"] + ".doing": agent["activity"] or "-",
            agent["agentId"] + ".over": ago(agent["endTime"]),
            agent["agentId"] + ".counts": words(agent["counts"].values()),  # events, calls, errors
        })  # fmt: skip
    return {name: str(value) for name, value in facts.items()}


def session_matter(shown: dict[str, Any]) -> dict[str, Any]:
    """Return what an event without consequence leaves as it was."""
    agents = [{**agent, "counts": {}} for agent in shown["agents"]]
    counts = {**shown["counts"], "events": 0}
    return {**shown, "lastEventTime": 0, "asks": [], "counts": counts, "agents": agents}


def session_rows() -> Iterator[Any]:
    """Yield every story of the table, one for each alternative."""
    heading, choice = "", re.compile(r"\(([^()]*\|[^()]*)\)")
    stories = SESSION_STORIES.strip().replace("{long}", "x" * 300).replace("{cut}", "x" * 159 + "…")
    for block in re.split(r"\n+(?=\S)", stories):
        rule, _, steps = block.partition("\n")
        if not steps:
            heading = rule[2:]
            continue
        numbers = {found.count("|") + 1 for found in choice.findall(steps)} or {1}
        assert len(numbers) == 1, f"groups of different length: {rule}"
        for number in range(numbers.pop()):
            chosen = choice.sub(lambda found, number=number: found.group(1).split("|")[number], steps)  # type: ignore[misc]
            yield pytest.param(chosen, id=f"{heading}: {rule} {number or ''}".strip())


@pytest.mark.parametrize("steps", list(session_rows()))
@pytest.mark.parametrize("way", ["live", "replayed", "restored"])
def test_a_session_story_holds_in_each_way(steps, way):
    """Replayed: all stored lines in one pass. Restored: new from snapshots before every event."""
    make = SessionStory if steps.split(";")[0].strip() == "new" else session_story
    make(is_replayed=way == "replayed", cuts=frozenset(range(1000) if way == "restored" else ())).play(steps)


@functools.cache
def session_events(name: str) -> list[dict[str, Any]]:
    """Build the events of a recording, a second apart; nothing may change them."""
    events = []
    for seq, shown in enumerate(recorded(name), 1):
        at = NOW_MS + seq * 1000
        wrapped = {"hook": shown, "id": f"{name}-{seq}", "timestamp": at}
        events.append({"seq": seq, "received": at, **ee.build_event(wrapped, NOW_MS, SESSION_MACHINE)})
    return events


def session_replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in events:
        book.apply(event)
    return sorted((book.to_json(each) for each in book.sessions.values()), key=lambda each: each["startTime"])


def session_steps(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in session_events(name):
        yield event, book.to_json(book.apply(event))


# -- recordings ---------------------------------------------------------------

SESSION_MOMENTS = install_text(os.path.join(ROOT, ".ci/stories/moments.txt"))


@pytest.mark.parametrize("moment", re.findall(r"^\w.*", SESSION_MOMENTS, re.M))
def test_a_recorded_event_leaves_its_session_as_the_table_says(moment):
    event, _, facts = moment.partition(" → ")
    name, hook, which = event.split()
    found = [(event, shown) for event, shown in session_steps(name) if event["hookType"] == hook]
    event, shown = found[int(which) - 1]
    session_check(facts, shown, event["timestamp"], moment)


@pytest.mark.parametrize("name", recording_names())
def test_at_every_step_of_a_recording_the_session_makes_sense(name):
    assert re.search(f"^{name} ", SESSION_MOMENTS, re.M), "how it ends is in the table"
    for event, shown in session_steps(name):
        agents = {agent["agentId"]: agent for agent in shown["agents"]}
        assert shown["state"] in ("waiting", "working", "idle", "failed", "ended"), event
        assert (shown["reason"] is not None) == (shown["state"] in ("waiting", "failed", "ended")), event
        has_ended = shown["state"] == "ended" or event["hookType"] == "SessionEnd"
        assert (shown["endTime"] is not None) == has_ended, event
        assert shown["lastEventTime"] == event["timestamp"], event
        assert shown["startTime"] <= shown["stateSince"], event
        assert shown["workingDirectory"] == "/home/dev/acme-shop", "also while an agent is in a worktree"
        assert all(call["agentId"] is None or call["agentId"] in agents for call in shown["openCalls"]), event
        if shown["openCalls"]:
            assert shown["state"] in ("working", "waiting") and shown["activity"], event
        elif not event["data"].get("background_tasks"):
            assert shown["activity"] in ("", "background: bg", "background: inner job"), event
        for agent in agents.values():
            assert agent["parentAgentId"] is None or agent["parentAgentId"] in agents, event
            assert agent["state"] != "ended" or agent["endTime"] >= agent["startTime"], event
            assert agent["state"] == "ended" or shown["state"] in ("working", "waiting"), event
        json.dumps(shown)
    assert shown["stuck"] == []


def test_all_recordings_in_one_book_do_not_disturb_each_other():
    streams = [session_events(name) for name in recording_names()]
    alone = {shown["sessionId"]: shown for stream in streams for shown in session_replay(stream)}
    mixed = [event for group in itertools.zip_longest(*streams) for event in group if event is not None]
    together = {shown["sessionId"]: shown for shown in session_replay(mixed)}
    for shown in (*together.values(), *alone.values()):
        shown.pop("collisions")  # all of them work in one directory
    assert together == alone


@pytest.mark.parametrize("machine", [SESSION_MACHINE, "far"])
@pytest.mark.parametrize("step_ms", [3_600_000, 14 * 3_600_000, -3_600_000, -14 * 3_600_000])
def test_no_session_is_silent_for_the_time_that_our_clock_was_set_by(machine, step_ms):
    story = SessionStory(machine=machine)
    story.play("s2: ask Bash make; pid 7; s3: prompt; pid 0; prompt; wait 100s → working")
    story.time += step_ms
    story.set_by = step_ms
    story.clock = 0 if machine == SESSION_MACHINE else -step_ms
    story.play("wait 10s → working; s2: look → waiting")
    seen: list[int] = []  # a process began by the clock as it is now
    assert story.book.check_processes(0, lambda _, at: not seen.append(at), story.time, True) == []
    assert seen == ([story.time] if machine == SESSION_MACHINE else [])
    story.play("wait 109s → working; wait 11s → quiet")
    story.play("call t1 Bash make → working, heard 0s; wait 119s → working; wait 1s → quiet")
    story.play(f"wait {12 + max(0, -step_ms) // 3_600_000}h; s2: look → ended")


def test_sessions_are_listed_newest_first_but_for_hidden_and_deleted_ones():
    story = session_story()
    story.play("s2: start startup; hide")
    listed = lambda hidden: [shown["sessionId"] for shown in story.book.each_json(hidden)]  # noqa: E731
    assert (listed(True), listed(False)) == (["s2", "s1"], ["s2"])
    assert (story.book.delete("s1"), story.book.delete("s1")) == (True, False)
    story.do("usage 7")
    assert listed(True) == ["s2"], "token totals do not bring it back"
    story.play("prompt new words → events 1, calls 0, errors 0, interrupted 0, prompts 1, tokens -")


@story_table("tables.txt", "other programs", "event, facts")
def test_events_of_other_programs_go_by_their_hook_else_by_their_type(event, facts):
    story = SessionStory()
    shown = story.apply(event)
    session_check(facts, shown, story.time, event)
    assert shown["sessionId"] == event.get("sessionId", "unknown")


SESSION_FIELDS = (
    "tool_name", "tool_input", "tool_use_id", "tool_response", "message", "prompt", "error", "model", "source", "reason",
    "notification_type", "last_assistant_message", "background_tasks", "tool_calls", "session_title", "to_model",
    "agent_id", "agent_type", "mcp_server_name", "error_details", "action", "label", "cwd", "parentSessionId", "pid",
    "toolName", "toolInput", "toolUseId", "toolOutput", "data", "durationMs",
)  # fmt: skip
SESSION_LIKELY = st.sampled_from(
    ["Bash", "Agent", "AskUserQuestion", "a1", "t1", "running", "idle_prompt", "permission_prompt", "clear", "compact",
     "<task-notification><task-id>a1</task-id>", [{"tool_use_id": ["t1"]}], [{"status": "running", "id": {}}],
     {"agentId": ["a1"]}, {"questions": [{"question": {}}]}, {"agentId": "a1", "status": {}},
     None, True, -1, 1 << 70, 0.5, "", [], {}, [[]], {"": None}]
)  # fmt: skip


SESSION_ANY_HOOK = st.sampled_from([*ee.EVENT_TYPES, "PostToolBatch", "PostModelSwitch", "New", ""])
SESSION_ANY = st.builds(
    dict.__or__,
    st.dictionaries(st.sampled_from(SESSION_FIELDS), SESSION_LIKELY, max_size=7),
    st.dictionaries(st.sampled_from(SESSION_FIELDS), hook_json, max_size=1),  # dear: one is enough
)


@settings(max_examples=200)
@given(st.lists(st.tuples(SESSION_ANY_HOOK, SESSION_ANY, st.booleans()), max_size=8))
@example([("PermissionRequest", {"tool_name": "Bash"}, False), ("PreToolUse", {"tool_use_id": [1]}, False)])
def test_fields_of_wrong_types_never_raise(said):
    story = session_story()
    for hook, fields, is_anothers in said:
        if is_anothers:
            story.apply({"eventType": "tool_call", "hookType": hook, "sessionId": "s1", "data": fields})
        else:
            story.deliver({"session_id": "s1", "hook_event_name": hook, **fields})
        assert len(ee.encode_json(cm.event_row(story.heard[-1]))) < 6000
        story.wait(50_000)
    for session in story.book.each_json(True):
        json.loads(ee.encode_json(session))


def session_essence(shown: list[dict[str, Any]]) -> list[Any]:
    """Return what must not depend on the order in which events arrive."""
    return [
        (
            each["sessionId"], each["state"], each["reason"] and (each["reason"]["kind"], each["reason"]["detail"]),
            sorted(call["toolUseId"] for call in each["openCalls"]), each["counts"],
            each["model"], each["tokenUsage"], each["isPinned"],
            sorted((agent["agentId"], agent["state"]) for agent in each["agents"]),
        )
        for each in sorted(shown, key=lambda each: str(each["sessionId"]))
    ]  # fmt: skip


def session_arrivals(events: Any, gaps: list[int], delays: Iterable[int]) -> list[dict[str, Any]]:
    """Return the events as they arrive: happened `gaps` apart, each on its way for one of `delays`."""
    arrived = []
    for event, at, delay in zip(events, itertools.accumulate(gaps, initial=NOW_MS), delays):
        arrived.append({**event, "timestamp": at, "received": at + delay})
    return session_numbered(arrived)


def session_numbered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events in the order of their arrival, numbered in it."""
    arrived = sorted(events, key=lambda event: event["received"])
    return [{**event, "seq": number} for number, event in enumerate(arrived, 1)]


SESSION_NAMED = [name for name in recording_names() if name[:3] != "v1."]  # pairing by name only guesses
SESSION_SEEDS = st.integers(0, 1 << 32)


def session_numbers(seed: int, *limits: tuple[int, int]) -> list[list[int]]:
    """Return forty random numbers between each of these limits."""
    chance = random.Random(seed)
    return [[chance.randint(*each) for _ in range(40)] for each in limits]


@settings(max_examples=250)
@given(st.sampled_from(SESSION_NAMED), SESSION_SEEDS)
def test_the_order_of_arrival_changes_neither_state_nor_counts(name, seed):
    gaps, delays = session_numbers(seed, (1, 1500), (0, 2000))
    arrived = session_arrivals(session_events(name), gaps, delays)
    in_order = session_arrivals(session_events(name), gaps, itertools.repeat(0))
    assert session_essence(session_replay(arrived)) == session_essence(session_replay(in_order))


@settings(max_examples=150)
@given(st.sampled_from(SESSION_NAMED), SESSION_SEEDS)
def test_an_event_that_a_plugin_delivers_too_changes_nothing_in_any_order(name, seed):
    gaps, delays, later = session_numbers(seed, (50, 1500), (0, 2000), (0, 40))
    once = session_arrivals(session_events(name), gaps, itertools.repeat(0))
    doubled = list(once)
    for event, delay, after in zip(once, reversed(delays), later):
        if after:
            time_ms = event["timestamp"] + after
            times = {"timestamp": time_ms, "received": time_ms + delay}
            doubled.append({**event, **times, "id": event["id"] + "b"})
    ends = session_replay(once), session_replay(session_numbered(doubled))
    for shown in itertools.chain(*ends):
        del shown["counts"]["events"], shown["counts"]["prompts"]
    assert session_essence(ends[0]) == session_essence(ends[1])


def session_restored(book: cm.Sessions) -> cm.Sessions:
    """Return a book made from the snapshots of another, as after a restart."""
    restored, names = cm.Sessions(own_machine=SESSION_MACHINE), ["", *book.sessions]
    random.Random(len(names)).shuffle(names)
    restored.restore([(name, book.snapshot(name)) for name in names])
    return restored


def test_a_snapshot_is_small_and_holds_no_heard_event():
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in session_events("large"):
        session = book.apply(event)
    assert len(book.snapshot(session.session_id)) < 4000


@pytest.mark.parametrize("row", [
    b"", b"x", pickle.dumps(7), pickle.dumps((0, ())), pickle.dumps(os.system), pickle.dumps(argparse.Namespace()),
    pickle.dumps((cm._SNAPSHOT_FORMAT, (1, 2))), pickle.dumps((cm._SNAPSHOT_FORMAT, (argparse.Namespace(),) * 62)),
], ids=range(8))  # fmt: skip
def test_a_damaged_or_foreign_snapshot_is_refused_and_takes_over_nothing(row):
    story, restored = session_story(), cm.Sessions()
    with pytest.raises(ValueError, match="snapshot of 's2'"):
        restored.restore([("s1", story.book.snapshot("s1")), ("s2", row)])
    assert restored.sessions == {} and restored.skew_ms(SESSION_MACHINE) is None


def test_the_skew_of_a_machine_is_the_least_delay_lately():
    book, seconds = cm.Sessions(own_machine="m"), itertools.count(1)

    def say(delay: int, machine: str = "far", **more: Any) -> int | None:
        at = NOW_MS + next(seconds) * 1000
        shown = {"eventType": "message", "timestamp": at, "machineId": machine}
        book.apply({**ee.build_event(shown, at, machine), "received": at + delay, **more})
        return book.skew_ms(machine)

    assert book.skew_ms("far") is None and say(50_000, spooled=True) is None
    assert [say(900), say(20), say(-3_600_000), say(-3_599_800)] == [900, 20, -3_600_000, -3_599_999]
    assert say(86_400_000, imported=True) == say(500_000, demo=True) == -3_599_999
    assert say(30) == 30, "its clock was set back"
    for _ in range(2000):
        slow = say(1030)
    assert slow is not None and 1000 < slow <= 1030, "a clock that drifts is followed"
    assert say(500, "m") == 0


def test_rows_are_about_three_hundred_bytes_and_have_the_agreed_fields():
    about = "seq received id timestamp sessionId machineId hookType eventType agentId agentType demo".split()
    words = (
        "toolName toolUseId durationMs notificationType source reason isInterrupt calls target text".split()
    )
    sizes = []
    for event in itertools.chain.from_iterable(map(session_events, recording_names())):
        event = {**event, "id": str(uuid.UUID(int=event["seq"]))}
        row = cm.event_row(event)
        sizes.append(len(ee.encode_json(row)))
        data = row.pop("data")
        assert row.pop("partial") is True and row.items() <= event.items()
        assert set(row) <= set(about) and set(data) <= set(words)
        assert all(len(it) <= 160 and "\n" not in it for it in map(data.get, words[-2:]) if it)
    assert 200 < statistics.median(sizes) < 400 and max(sizes) < 900
    counts = {"input": 10, "output": 2000, "cacheRead": 300_000, "cacheCreation": 5000, "cacheCreation1h": 9}
    for kind, data, text in (
        ("other", {"status": "good"}, '{"status": "good"}'),
        ("usage", {"usage": {"models": {"m": counts, "odd": "x"}}}, "305,010 tokens in, 2,000 out"),
        ("client_status", {"status": "waiting", "waitingFor": "a plan", "kind": "x"}, "waiting, a plan"),
        ("status_line", {"gauges": {"cost": {"total_cost_usd": 1.5, "x": 2}}}, "$1.50"),
    ):
        event.update(hookType="", eventType=kind, data=data)
        assert cm.event_row(event)["data"]["text"] == text


@story_table("tables.txt", "processes", "namespace, events, here, state")
def test_only_a_process_that_this_machine_can_see_is_believed_to_be_gone(namespace, events, here, state):
    book = cm.Sessions(own_machine=f"own/{namespace}" if namespace else "own", own_name="old")
    for number, words in enumerate(events.split(", ")):
        name, key, process, *seen = words.split()
        pid, its_namespace = map(int, process.split("/"))
        about = {"machineId": name, "pid": pid, **({} if key == "-" else {"machineKey": key})}
        about.update({"pidNamespace": its_namespace} if its_namespace else {})
        event = hook_wrapped(payload("UserPromptSubmit", prompt="x"), **about, id=f"e{number}")
        session = book.apply(ee.build_event(event, NOW_MS, "box"))
        session.processes[pid, its_namespace] = NOW_MS if seen else 0  # by a monitor before a restart
    found = lambda it: here.get("{}/{}".format(*it), 0)  # noqa: E731
    book.check_processes(namespace, lambda pid, _: str(pid) in here, NOW_MS + 1, True, found)
    assert (session.state, session.machine_id) == (state, name)


@pytest.mark.parametrize(("count", "limit"), [(3, 5000), (20, 5000), (50, 5000), (50, 30)])
def test_a_session_is_sent_with_its_newest_calls_and_their_number(count, limit, monkeypatch):
    monkeypatch.setattr(cm, "CALLS_LIMIT", limit)
    book, call = cm.Sessions(), {"tool_name": "Bash", "tool_input": {"command": "make"}}
    for number in range(count):
        begin = payload("PreToolUse", tool_use_id=f"t{number}", **call)
        book.apply(ee.build_event(begin, 1000 + number, "m"))
    sent = book.to_json(book.sessions["s1"])
    assert [call["toolUseId"] for call in sent["openCalls"]] == [f"t{it}" for it in range(count)[-20:]]
    assert sent["openCallCount"] == min(count, limit)
    assert sent["counts"]["interrupted"] == max(0, count - limit)
    end = payload("PostToolUse", tool_use_id="t0", **call)
    sent = book.to_json(book.apply(ee.build_event(end, 9000, "m")))
    shown = sent["openCallCount"], sent["counts"]["interrupted"], sent["counts"]["toolCalls"]
    assert shown == (min(count - 1, limit), max(0, count - limit - 1), count)


def test_the_agents_that_run_and_the_newest_questions_are_sent() -> None:
    book, agents = cm.Sessions(), [f"a{number}" for number in range(150)]
    events = [(it, "SubagentStart", {}) for it in agents[:60]] + [
        (it, "SubagentStop", {}) for it in agents[5:60]
    ]
    asked = {"session": "s2", "tool_name": "Bash", "tool_input": {"command": "make"}}
    events += [(it, "PermissionRequest", asked) for it in agents]
    for number, (agent, hook, more) in enumerate(events):
        book.apply(ee.build_event(payload(hook, agent_id=agent, **more), 1000 + number, "m"))
    works, waits = map(book.to_json, book.sessions.values())
    assert [agent["agentId"] for agent in works["agents"]] == agents[:5] + agents[45:60]
    assert (works["agentCount"], waits["state"]) == (60, "waiting")
    assert [it["agentId"] for it in waits["asks"]] == agents[50:]


SESSION_WORK = st.sampled_from(("UserPromptSubmit", "Stop", "SubagentStart", "SessionEnd", "wait"))


@given(st.lists(st.tuples(st.integers(0, 4), SESSION_WORK, st.integers(1, 9000)), max_size=30))
def test_ticks_only_when_due_report_what_ticks_always_report(steps):
    books, now = [cm.Sessions(quiet_ms=120_000, ended_ms=9_000_000) for _ in range(2)], 1_000_000
    for number, (session, hook, seconds) in enumerate(steps):
        now += seconds * 1000
        event = payload(hook, f"s{session}", **({"agent_id": "a"} if hook == "SubagentStart" else {}))
        for always, book in enumerate(books):
            if hook != "wait":
                book.apply(ee.build_event(event, now, f"m{session % 3}") | {"id": str(number)})
            if always:  # every session is due
                book._due_at = dict.fromkeys(book.sessions, 0)
            before = {name: book.to_json(it) for name, it in book.sessions.items()}
            reported = {it.session_id for it in book.tick(now, now)}
            assert reported == {name for name in before if before[name] != book.to_json(book.sessions[name])}
        assert books[0].sessions == books[1].sessions


@pytest.mark.parametrize("state", ["idle", "ended"])
def test_sessions_to_which_nothing_is_due_are_not_looked_at(state: str, monkeypatch: Any) -> None:
    book = cm.Sessions(own_machine="m0")
    for number in range(500):
        hook = payload("Stop" if state == "idle" else "SessionEnd", f"s{number}")
        book.apply(ee.build_event(hook, 1_000_000, f"m{number}"))
    book.tick(1_200_000, 1_200_000)
    looked = []
    monkeypatch.setattr(cm, "_busy_since", lambda session: looked.append(session) or cm._NEVER)
    for second in range(100):
        book.tick(1_201_000 + second * 1000, 1_201_000 + second * 1000)
        book.check_processes(0, lambda *about: looked.append(about) or True, 1_201_000, True)
    assert not looked


class GaugeCase:
    """Sessions that get hooks and status lines of machines, in process."""

    def __init__(self) -> None:
        self.sessions, self.numbers = cm.Sessions(own_machine="k1"), itertools.count(1)

    def apply(self, given: dict[str, Any], at: int, machine: str = "k1") -> cm.Session:
        number = next(self.numbers)
        wrapper = {"id": f"gauge-{number}", "timestamp": at, "machineId": machine, "machineKey": machine}
        event = ee.build_event({**wrapper, **given}, at, machine)
        return self.sessions.apply({**event, "seq": number, "received": at})

    def hook(self, name: str, at: int = NOW_MS, machine: str = "k1", session: str = "s1", **more: Any) -> Any:
        self.apply({"hook": payload(name, session, **more)}, at, machine)

    def line(self, at: int = NOW_MS, machine: str = "k1", **changes: Any) -> cm.Session:
        return self.apply({"statusLine": status_line(**changes)}, at, machine)

    def shown(self, session: str = "s1") -> dict[str, Any]:
        return self.sessions.to_json(self.sessions.sessions[session])


GAUGE_FIELDS = ("context", "costUsd", "costSource", "linesAdded", "linesRemoved", "cacheExpiresAt", "effort")


def test_a_status_line_gives_figures_and_is_no_activity() -> None:
    case = GaugeCase()
    case.line()
    assert not case.sessions.sessions, "figures make no session"
    case.hook("SessionStart")
    case.hook("UserPromptSubmit", prompt="hi", effort={"level": "low"})
    assert [case.shown()[name] for name in GAUGE_FIELDS] == [None] * 6 + ["low"]
    case.sessions.tick(NOW_MS + 300_000)
    before = case.shown()
    case.line(NOW_MS + 400_000)
    after, context = case.shown(), {"percent": 4, "used": 36561, "size": 1_000_000}
    expected = [context, 0.30407, "client", 0, 0, 1_795_647_322_000, "medium"]
    assert [after.pop(name) for name in GAUGE_FIELDS] == expected
    assert after.pop("model") == "claude-opus-5-5" and before.pop("model") is None
    assert after == {name: it for name, it in before.items() if name not in GAUGE_FIELDS}, "quiet as before"
    case.hook("PermissionRequest", NOW_MS + 500_000, tool_name="Bash", tool_input={"command": "make"})
    case.line(NOW_MS + 600_000, cost={"total_cost_usd": 1})
    case.line(NOW_MS + 550_000, cost={"total_cost_usd": 0.9})  # late
    assert (case.shown()["state"], case.shown()["costUsd"]) == ("waiting", 1)
    case.hook("SessionEnd", NOW_MS + 700_000, reason="other")
    case.line(NOW_MS + 800_000)
    assert case.shown()["state"] == "ended"
    case.hook("SessionStart", NOW_MS + 900_000, source="resume")
    small = {"models": {"m": {}}, "agents": {}, "context": 36_700}  # after its turn no figure is another
    case.apply({"eventType": "usage", "sessionId": "s1", "data": {"usage": small}}, NOW_MS + 950_000)
    assert case.shown()["costSource"] == "client"


@pytest.mark.parametrize("value", [
    -1, -0.001, math.nan, math.inf, 10**300, 1e300, "4", "NaN", True, False, None, {}, {"a": [4]}, [4], "x" * 10**5,
], ids=lambda it: repr(it)[:20])  # fmt: skip
def test_hostile_figures_show_nothing(value):
    case = GaugeCase()
    case.hook("SessionStart")
    window = {"used_percentage": value, "resets_at": value}
    figures = {
        "context_window": {**window, "total_input_tokens": value, "context_window_size": value},
        "cost": {"total_cost_usd": value, "total_lines_added": value, "total_lines_removed": value},
        "rate_limits": {"five_hour": window, "seven_day": {**window, "used_percentage": 5}},
        "prompt_cache": {"expires_at": value}, "effort": {"level": value if type(value) is not str else 1},
    }  # fmt: skip
    nothing = [{"percent": None, "used": None, "size": None}, *[None] * 6]
    for sent in (figures, dict.fromkeys(figures, value), {"gauges": value}):
        for event in ({"statusLine": {**sent, "session_id": "s1"}},
                      {"eventType": "status_line", "sessionId": "s1", "data": {"gauges": sent}}):  # fmt: skip
            case.apply(event, NOW_MS)
            shown = case.shown()
            assert [shown[name] or None for name in GAUGE_FIELDS] == nothing
    assert case.sessions.limits(NOW_MS) == [] and json.loads(ee.encode_json(shown)) == shown
    line = ee.encode_json({**figures, "session_id": value, "model": {"display_name": value}})
    assert ee.figures_in(line)[1].split() == ["5"] and "\n" not in ee.figures_in(line)[2]


def test_machines_with_the_same_resets_are_one_account() -> None:
    case, now, hour, day = GaugeCase(), NOW_MS // 1000, 3600, 86400
    five, seven = now + 3 * hour, now + 4 * day
    for number in (1, 2, 3):
        case.hook("SessionStart", NOW_MS - hour * 1000, f"k{number}", f"s{number}")

    def line(number: int, minutes: int, cost: float, *used: int, resets: Any = (five, seven)) -> None:
        about = {"session": f"s{number}", "cost": {"total_cost_usd": cost}}
        about.update(zip(("five", "seven"), zip(used, resets)))
        case.line(NOW_MS + minutes * 60_000, f"k{number}", **about)

    def limits(minutes: int) -> list[dict[str, Any]]:
        return case.sessions.limits(NOW_MS + minutes * 60_000)

    line(1, -60, 1.0, 30, 20)
    line(2, -30, 2.0, 45, 21, resets=(five + 20, seven))  # a reset may differ by seconds
    line(1, 0, 4.0, 60, 22)
    line(2, 0, 2.0, 40, 21)  # an idle client repeats what it knew
    line(3, 0, 5.0, 10, 11, resets=(five, seven + 7200))  # the same five hours, by chance
    (one, other) = limits(0)
    assert one["machines"] == ["k1", "k2"] and other["machines"] == ["k3"]
    assert (one["fiveHour"]["percent"], one["sevenDay"]["percent"]) == (60, 22)
    assert one["fiveHour"]["forecast"] == NOW_MS + hour * 1000 * 40 // 30, "30 % in the last hour, 40 % left"
    assert one["sevenDay"]["forecast"] == NOW_MS + hour * 1000 * 78 // 2
    assert limits(61)[0]["fiveHour"]["forecast"] is None, "nothing grew in the last hour"
    shares = [(it["sessionId"], it["percent"]) for it in one["fiveHour"]["shares"]]
    assert shares == [("s1", 40.0), ("s2", 20.0)] and other["fiveHour"]["forecast"] is None
    again = cm.Sessions(own_machine="k1")
    again.restore([(name, case.sessions.snapshot(name)) for name in ("", *case.sessions.sessions)])
    assert again.limits(NOW_MS) == [one, other] and limits(8 * 1440) == []
    line(2, 181, 3.0, 2, 23, resets=(five + 5 * hour, seven))  # the next five hours
    later = limits(181)[-1]
    assert later["machines"] == ["k1", "k2"] and later["fiveHour"]["percent"] == 2
    assert later["fiveHour"]["shares"] == [{"sessionId": "s2", "percent": 2.0}]
    line(1, 0, 9.0, 70, 22)  # of the window that is over, late
    assert limits(181)[-1]["fiveHour"]["percent"] == 2
    following = now + 5 * day + 60, now + 11 * day
    line(2, 5 * 1440, 4.0, 1, 1, resets=following)  # the next week
    line(1, 5 * 1440, 9.0, 1, 2, resets=following)
    (account,) = [it for it in limits(5 * 1440) if "k1" in it["machines"]]
    assert account["machines"] == ["k1", "k2"] and account["sevenDay"]["percent"] == 2
    case.hook("SessionStart", NOW_MS + 20 * DAY_MS, "k4", "s4")
    line(4, 20 * 1440, 1.0, 5, 6, resets=(now + 20 * day + 60, now + 25 * day))
    assert [it["machines"] for it in limits(20 * 1440)] == [["k4"]]


@story_table("tables.txt", "contexts", "model, used, percent, size")
def test_without_a_status_line_the_context_is_estimated(model, used, percent, size):
    case = GaugeCase()
    case.hook("SessionStart", NOW_MS - 3)
    case.line(NOW_MS - 2, model=None)
    case.hook("SessionStart", NOW_MS - 1, source="resume")  # by `claude -p`
    usage = {"models": {model: {"input": 1_000_000}}, "agents": {}, "model": model, "context": used}
    case.apply({"eventType": "usage", "sessionId": "s1", "data": {"usage": usage}}, NOW_MS)
    shown, known = case.shown(), {"percent": percent, "used": used, "size": size, "estimated": True}
    assert shown["context"] == (known if type(used) is int and used else None)
    expected = (None, None) if model == "strange" else (shown["estimatedCostUsd"], "estimate")
    assert (shown["costUsd"], shown["costSource"]) == expected


# ---- Token usage: what transcripts say, read once, and what it costs ---------------------------------------
# The recorded transcripts end with the client's own sums (`cost-state`): ours must be the same, to the token and
# to the cent.


def story_blocks(name: str) -> list[list[str]]:
    """Return the lines of each block of .ci/stories/NAME.txt but for the first one, which explains the others."""
    blocks = install_text(f"{ROOT}/.ci/stories/{name}.txt").rstrip().split("\n\n")
    return [block.split("\n") for block in blocks[1:]]


def stories(name: str, mark: str) -> dict[str, list[tuple[str, str]]]:
    """Return the stories of a file by their titles: each line below as what comes before and after the mark."""
    cut = {title: [line.partition(mark)[::2] for line in lines] for title, *lines in story_blocks(name)}
    return {title: [(got.strip(), then.strip()) for got, then in lines] for title, lines in cut.items()}


USAGE_MACHINE, USAGE_MODEL = "box", "claude-opus-4-5-20251101"


def session_after(story: SessionStory, hook: str, at: int | None = None, **fields: Any) -> dict[str, Any]:
    """Let one more hook arrive; return the session then."""
    story.time += 1000
    story.deliver(payload(hook, story.session, **fields), at)
    return story.now()


def usage_transcript(name: str) -> str:
    (path,) = glob.glob(f"{RECORDED}/transcripts/{name}/*.jsonl")
    return path


def usage_event(path: str, session: str = "s1", hook: str = "Stop", **fields: Any) -> dict[str, Any]:
    """Return the event of one hook that names a transcript."""
    given_payload = {**payload(hook, session, **fields), "transcript_path": path}
    return {**ee.build_event(given_payload, NOW_MS, USAGE_MACHINE), "machineKey": "k/9"}  # another machine's


def usage_read(home: object, path: str, session: str = "s1", **fields: Any) -> Any:
    """Return what a reader (or a new one with this home) makes of an event; None when there is nothing new."""
    reader = home if isinstance(home, ee.UsageReader) else ee.UsageReader(str(home))
    event = usage_event(path, session, **fields)
    before = json.dumps(event)
    made = [it for it in reader.events(event) if it["eventType"] != ee.WORDS]
    assert json.dumps(event) == before
    if not made:
        return None
    usage, same = made[0]["data"]["usage"], "sessionId machineId machineKey workingDirectory timestamp"
    about = {name: event[name] for name in same.split()}
    assert made == [{"eventType": "usage", "hookType": "", **about, "data": {"usage": usage}}]
    return usage


def usage_line(message_id: str, output: Any, model: str = USAGE_MODEL, **more: Any) -> bytes:
    usage = {"input_tokens": 1, "output_tokens": output, **more}
    message = {"id": message_id, "type": "message", "role": "assistant", "model": model, "usage": usage}
    return json.dumps({"type": "assistant", "isSidechain": False, "message": message}).encode() + b"\n"


def usage_output(usage: Any) -> Any:
    return usage and sum(counts["output"] for counts in usage["models"].values())


@dataclasses.dataclass
class Transcript:
    """A transcript that grows, and a process that reads it."""

    home: str
    session: str = "s1"

    def __post_init__(self) -> None:
        self.path, self.reader = f"{self.home}/{self.session}.jsonl", ee.UsageReader(self.home)

    def add(self, lines: bytes) -> None:
        with open(self.path, "ab") as file:
            file.write(lines)

    def total(self, **fields: Any) -> int | None:
        return usage_output(usage_read(self.reader, self.path, self.session, **fields))

    def do(self, step: str) -> None:
        verb, *words = step.split()
        lines = b""
        for word in words:
            message_id, _, tokens = word.partition("=")
            line = usage_line(message_id, int(tokens.strip("<>") or 0)) if tokens else b"x" * 30_000 + b"\n"
            lines += line[:-20] if word.endswith("<") else line[-20:] if word.endswith(">") else line
        if verb == "replace":
            os.rename(self.path, self.path + ".old")
        elif verb == "remove":
            os.unlink(self.path)
        elif verb == "write":
            os.truncate(self.path, 0)
        elif verb == "restart":
            self.reader.close()
            self.reader = ee.UsageReader(self.home)
        else:
            assert verb in ("add", "read")
        if lines:
            self.add(lines)


@pytest.fixture
def transcript(tmp_path: Any) -> Transcript:
    return Transcript(str(tmp_path))


USAGE_GROWING = stories("usage-growing", " → ")


@pytest.mark.parametrize("rule", USAGE_GROWING)
def test_a_transcript_that_grows_is_counted_as_the_table_says(rule, transcript, monkeypatch):
    monkeypatch.setattr(ee, "TRANSCRIPT_LINE_LIMIT_BYTES", 4000)
    for step, total in USAGE_GROWING[rule]:
        transcript.do(step)
        assert str(transcript.total() or "-") == total, step


def usage_model(short: str) -> str:
    return re.sub(r"^\w+", r"claude-\g<0>-4-5", short)


def usage_entries(words: str, session: str = "s1", minute: int = 0) -> str:
    """Return lines of a transcript, a minute each, from words as in usage-layouts.txt."""
    lines = []
    for number, line in enumerate(words.split("; "), minute):
        name, *parts = line.split(" ")
        fields = (part.partition("=") for part in parts)
        given = {field: json.loads(text) for field, is_one, text in fields if is_one}
        counts = [tuple(map(int, part.split("/"))) for part in parts if re.fullmatch(r"\d+/\d+", part)]
        if name == "user":
            about = {"type": "user", "message": {"role": "user", "content": " ".join(parts)}}
        elif name == "sums":
            used = (dict(zip(("inputTokens", "outputTokens"), each)) for each in counts)
            about = {"type": "cost-state", "modelUsage": dict(zip(map(usage_model, parts[::2]), used))}
        else:
            usage = dict(zip(("input_tokens", "output_tokens"), counts[0]))
            message = {
                "id": given.pop("id", name), "role": "assistant", "model": usage_model(given.pop("model", "opus")),
                "usage": {**usage, "iterations": given.pop("iterations", None)},
                "content": [{"type": "text", "text": "done"}], "stop_reason": "end_turn",
            }  # fmt: skip
            about = {"type": "assistant", "requestId": f"r-{name}", "message": message}
        common = {"uuid": f"u-{number}-{name}", "timestamp": f"2026-11-20T10:{number:02}:00.000Z"}
        lines.append(json.dumps({**common, "sessionId": session, **about, **given}, separators=(",", ":")))
    return "\n".join(lines) + "\n"


def git(place: pathlib.Path, *words: str, given: str = "") -> str:
    settings = "user.name=t user.email=t@x protocol.file.allow=always init.defaultBranch=main".split()
    options = [word for setting in (*settings, "core.autocrlf=false") for word in ("-c", setting)]
    done = subprocess.run(["git", *options, *words], cwd=place, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def write_files(folder: Any, files: dict[str, str]) -> None:
    """Append to files below a folder; content that begins with `->` is a link to what follows."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("->"):
            path.symlink_to(folder / content[2:])
        else:
            with path.open("a") as file:
                file.write(content)


def usage_named(files: str) -> tuple[dict[str, str], str]:
    """Return the transcripts of a step of usage-layouts.txt, and the session of the first."""
    named = dict(re.findall(r"(\S+): (.*?)(?: \||$)", files))
    return named, os.path.basename(next(iter(named)))


def usage_written(folder: Any, files: str) -> tuple[str, str]:
    """Write the transcripts of a step of usage-layouts.txt; return path and session of the first."""
    named, session = usage_named(files)
    first = next(iter(named))
    for name, words in named.items():
        if words == "moved":
            os.rename(f"{folder}/{name}.jsonl", f"{folder}/{name}.old.jsonl")
        elif words != "gone":
            is_link = words.startswith("->")
            write_files(folder, {name + ".jsonl": words if is_link else usage_entries(words, session)})
    return f"{folder}/{first}.jsonl", session


def usage_words(usage: Any) -> str:
    """Return what each agent used of each model, as usage-layouts.txt says it."""
    parts = []
    for agent, models in sorted(usage["agents"].items()) if usage else ():
        used = [f"{model} {counts['input']}/{counts['output']}" for model, counts in sorted(models.items())]
        parts.append(f"{agent}: " * bool(agent) + " ".join(used))
    return re.sub(r"claude-(\w+)-4-5", r"\1", " | ".join(parts)) or "-"


USAGE_LAYOUTS = stories("usage-layouts", " → ")


@pytest.mark.parametrize("rule", USAGE_LAYOUTS)
@pytest.mark.parametrize("is_watched", [False, True])
def test_tokens_are_counted_in_every_layout_of_transcripts(tmp_path, rule, is_watched):
    """Watched: a session is also looked at before its transcripts are written, and before its end."""
    reader, events = ee.UsageReader(f"{tmp_path}/home"), {}
    for files, used in USAGE_LAYOUTS[rule]:
        (first, *_), session = usage_named(files)
        event = {**usage_event(f"{tmp_path}/{first}.jsonl", session), "states": {}}
        event = events.setdefault(session, event) if is_watched else event
        found = reader.events(event, is_end=False) if is_watched else []
        usage_written(tmp_path, files)
        found += reader.events(event, is_end=False) if is_watched else []
        found += (late := reader.events(event))
        assert words_of(late) == "" or not is_watched, "they came with the look"
        usages = [it["data"]["usage"] for it in found if it["eventType"] == "usage"]
        assert usage_words(usages[-1] if usages else None) == used, files
        assert all(it["model"] == usage_model("opus") for it in usages)
        assert reader.events(event) == [], "nothing is new the second time"
    reader.close()
    assert not os.path.exists(f"{tmp_path}/home/emit.log")
    if not is_watched and len(USAGE_LAYOUTS[rule]) == 1 and files.startswith("s1: ") and "->" not in files:
        sources = cm.import_sources([str(tmp_path)], [])
        ((_, events, _),) = cm.import_batches(sources, USAGE_MACHINE, lambda _: False, [])
        usages = [event["data"]["usage"] for event in events if event["eventType"] == "usage"]
        assert usage_words(usages[-1]) == used, "an import counts by the same rules"


@pytest.mark.parametrize("name", "simple failing thinking subagent subagent-default nested parallel".split())
def test_tokens_and_cost_are_those_that_the_client_itself_counted(tmp_path, name):
    usage = usage_read(tmp_path, usage_transcript(name))
    with open(usage_transcript(name), encoding="utf-8") as file:
        own = [json.loads(line) for line in file if '"cost-state"' in line][-1]
    for model, counts in own["modelUsage"].items():
        theirs = (counts[it + "Tokens"] for it in ("input", "output", "cacheReadInput", "cacheCreationInput"))
        expected = [*theirs, counts["cacheCreationEphemeral1hInputTokens"]]
        assert [usage["models"][model][each] for each in ee.COUNT_NAMES] == expected
    assert usage["models"].keys() == own["modelUsage"].keys()
    shown = session_after(session_story(), "SessionEnd", reason="other", usage=usage)
    assert shown["estimatedCostUsd"] == pytest.approx(own["totalCostUSD"], abs=1e-6)
    agents = {event["agent_id"] for event in recorded(name) if event["hook_event_name"] == "SubagentStart"}
    assert set(usage["agents"]) == {"", *agents}
    by_agent = [counts for by_model in usage["agents"].values() for counts in by_model.values()]
    for count in ee.COUNT_NAMES:
        total = sum(counts[count] for counts in usage["models"].values())
        assert sum(counts[count] for counts in by_agent) == total


def test_an_old_clients_agent_transcript_counts_for_its_agent(transcript):
    agent = Transcript(transcript.home, "agent-a94648d")
    transcript.add(usage_entries("m1 1/5").encode())
    agent.add(usage_entries("m2 1/7").encode())
    usage = usage_read(
        transcript.reader, transcript.path, hook="SubagentStop", agent_transcript_path=agent.path
    )
    assert usage_words(usage) == "opus 1/5 | a94648d: opus 1/7"


@given(data=st.binary(max_size=600))
@settings(max_examples=200)
def test_no_bytes_break_the_transcript_parser(data):
    parser, content = ee.TranscriptParser(), usage_line("m1", 3)[:-1] + data + b"\n" + usage_line("m2", 4)
    assert [it for line in content.split(b"\n") for it in parser.facts_of(line)][-1].key.startswith("m2 ")


@pytest.mark.parametrize("value", [None, -1, 1.5, "7", True, 1 << 70, [], {}])
def test_odd_numbers_of_tokens_count_as_none(transcript, value):
    transcript.add(usage_line("m1", value, cache_creation=value))
    transcript.add(usage_line("m2", 4, cache_creation_input_tokens=9))
    transcript.add(usage_line("m3", 8, "<synthetic>"))  # what the client wrote itself is no model
    counts = {"input": 2, "output": 4, "cacheRead": 0, "cacheCreation": 9}
    assert usage_read(transcript.reader, transcript.path)["models"] == {USAGE_MODEL: counts}


@pytest.mark.parametrize(
    "what", ["a link to another user's", *(it for it in SQUATS if it not in ("a file", "a link"))]
)
def test_only_a_regular_file_of_this_user_is_read(transcript, what):
    if "another user" in what and os.geteuid():
        pytest.skip("only root can give files away")
    if what == "a link to another user's":
        SQUATS["another user's file"](transcript.path + "x", usage_transcript("simple"))
        os.symlink(transcript.path + "x", transcript.path)
    else:
        SQUATS[what](transcript.path, usage_transcript("simple"))
    before = time.monotonic()
    assert transcript.total() is None and time.monotonic() - before < 5


@pytest.mark.parametrize("path", [
    "/dev/zero", os.path.relpath(usage_transcript("simple")), __file__, None, 7, "", [], "/x\0y.jsonl", "/\ud800.jsonl",
    "/" + "x" * 9000 + ".jsonl", "/missing.jsonl",
], ids=range(11))  # fmt: skip
def test_an_odd_transcript_path_is_not_read_and_no_failure(tmp_path, path):
    assert usage_read(tmp_path, path) is None
    usage = usage_read(tmp_path, usage_transcript("simple"), hook="SubagentStop", agent_transcript_path=path)
    assert usage_output(usage) == 210 and not (tmp_path / "emit.log").exists()


def test_what_was_read_is_not_read_again_also_where_its_reader_had_to_stop(transcript, monkeypatch):
    lines_read, real = [], ee.TranscriptParser.facts_of
    read = lambda it, line, *words: lines_read.append(line) or real(it, line, *words)  # noqa: E731
    monkeypatch.setattr(ee.TranscriptParser, "facts_of", read)
    transcript.add(b"".join(usage_line(f"m{number}", 1) for number in range(500)))
    stopping = types.SimpleNamespace(is_set=lambda: len(lines_read) >= 100)
    assert usage_read(ee.UsageReader(transcript.home, stopping), transcript.path) is None
    assert len(lines_read) == 100 and transcript.total() == 500 == len(lines_read)
    assert transcript.total() is None and len(lines_read) == 500
    transcript.add(usage_line("more", 1))
    assert Transcript(transcript.home).total() == 501 == len(lines_read)  # also by another process


def test_events_do_not_wait_for_transcripts_to_be_read(tmp_path, monkeypatch):
    made, reading, goes_on = [], threading.Event(), threading.Event()
    first, second = Transcript(str(tmp_path), "s1"), Transcript(str(tmp_path), "s2")
    first.add(usage_line("s1", 5))
    second.add(usage_line("s2", 5))
    real = ee.totals_in
    slow = lambda *given: (reading.set(), goes_on.wait(10), real(*given))[-1]  # noqa: E731
    monkeypatch.setattr(ee, "totals_in", slow)
    worker = ee.UsageWorker(str(tmp_path), lambda events: not made.extend(events), True)
    worker.put(usage_event(first.path, "s1", "PreToolUse"))
    assert worker.is_watching({"s2"}) and not worker.is_watching({"s1"})
    worker.put(usage_event(first.path, "s1"))
    assert reading.wait(10)
    first.add(usage_line("late", 2))
    for number in range(50):
        worker.put({**usage_event(first.path, "s1"), "timestamp": NOW_MS + number})
        worker.put(usage_event(second.path, "s2"))
    goes_on.set()
    eventually(lambda: len(made) >= 3)
    totals = [(event["sessionId"], usage_output(event["data"]["usage"])) for event in made]
    assert totals == [("s1", 5), ("s1", 7), ("s2", 5)] and made[1]["timestamp"] == NOW_MS + 49
    worker.close()
    assert not any(thread.name == "usage" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("late_s", "hooks", "turns"),
    [(0.3, ("PreToolUse", "Stop", ""), [0, 1, 1]), (60, ("Stop", "UserPromptSubmit"), [0, 0])],
    ids=["a session without an end", "the next turn begins at once"],
)
def test_lines_that_come_behind_the_last_hook_count_for_its_turn(
    transcript, monkeypatch, late_s, hooks, turns
):
    monkeypatch.setattr(ee, "USAGE_LATE_S", late_s)
    monkeypatch.setattr(ee, "USAGE_QUIET_S", 0.2 if late_s < 1 else ee.USAGE_QUIET_S)
    monkeypatch.setattr(ee, "LOOK_S", max(late_s - 1, ee.LOOK_S))
    made: list[Any] = []
    worker = ee.UsageWorker(transcript.home, lambda events: not made.extend(events), True)
    for number, hook in enumerate(hooks):
        transcript.add(usage_line(f"m{number}", 2))
        if hook:
            worker.put({**usage_event(transcript.path, hook=hook), "timestamp": NOW_MS + number})
        eventually(lambda number=number: len(made) > number)
    eventually(lambda: bool(worker._pending) == (late_s == 60))
    assert [it["timestamp"] - NOW_MS for it in made] == turns
    assert [usage_output(it["data"]["usage"]) for it in made] == [2, 4, 6][: len(hooks)]
    worker.close()


def test_what_a_turn_used_is_counted_when_esc_ends_it(transcript):
    event, totals = usage_event(transcript.path, hook="PreToolUse"), []
    for lines in (usage_line("m1", 2), usage_line("m2", 3), session_line("interrupted", cm.now_ms())):
        transcript.add(lines)
        found = transcript.reader.events(event, is_end=False)
        totals.append([usage_output(it["data"]["usage"]) for it in found if it["eventType"] == "usage"])
    assert totals == [[2], [], [5]]


def test_the_database_of_counted_messages_is_private_and_bounded(tmp_path):
    reader = ee.UsageReader(str(tmp_path))
    assert usage_read(reader, str(tmp_path / "none.jsonl")) is None
    for number in range(10):
        path = tmp_path / f"s{number}.jsonl"
        path.write_bytes(b"".join(usage_line(f"{number}-{each}", 1) for each in range(40)))
        assert usage_output(usage_read(reader, str(path), f"s{number}")) == 40
    for name in glob.glob(f"{tmp_path}/usage.db*"):
        assert hook_mode_of(name) == 0o600
    with reader._open() as database:
        database.execute("UPDATE sessions SET read_ms = 0 WHERE name != 's9'")
    assert usage_read(reader, str(path), "s9") is None  # nothing new
    counts = (f"SELECT COUNT(*) FROM {name}" for name in ("messages", "files", "sessions"))
    # What cannot be read leaves no trace.
    assert [reader._open().execute(count).fetchone()[0] for count in counts] == [40, 1, 1]
    first = Transcript(str(tmp_path), "s0")
    first.add(usage_line("0-more", 1))
    assert first.total() == 41  # forgotten, read again


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"", None])
def test_a_damaged_database_of_counted_messages_is_rebuilt(tmp_path, damage):
    path, database = usage_transcript("simple"), tmp_path / "usage.db"
    assert usage_read(__file__ + "/home", path) is None, "nothing can be written: it costs the usage only"
    reader = ee.UsageReader(str(tmp_path))
    assert usage_output(usage_read(reader, path)) == 210
    reader.close()
    content = database.read_bytes()
    database.write_bytes(content[:100] + b"\xff" * (len(content) - 100) if damage is None else damage)
    assert [usage_output(usage_read(tmp_path, path)) for _ in range(2)][-1] == 210


def test_a_fork_made_in_a_turn_leaves_its_origins_tokens_to_the_origin(tmp_path):
    reader, first = ee.UsageReader(str(tmp_path)), usage_entries("m1 1/2", "s1")
    events = {it: {**usage_event(f"{tmp_path}/{it}.jsonl", it), "states": {}} for it in ("s1", "s2")}
    write_files(tmp_path, {"s1.jsonl": first})
    for session in ("s1", "s2"):  # the fork has no transcript yet
        reader.events(events[session])
        reader.events(events[session], is_end=False)
    copied = first + usage_entries("m2 1/30", "s1")
    write_files(tmp_path, {"s2/subagents/agent-x.jsonl": usage_entries("m3 1/400", "s2")})
    reader.events(events["s2"], is_end=False)
    write_files(tmp_path, {"s1.jsonl": usage_entries("m2 1/30", "s1"), "s2.jsonl": copied})
    reader.events(events["s1"], is_end=False)
    totals = [reader.events(events[session])[-1]["data"]["usage"] for session in ("s2", "s1")]
    assert list(map(usage_output, totals)) == [400, 32]


def test_a_prompt_reported_by_its_hook_does_not_come_again_after_a_restart(transcript):
    prompt, event = usage_entries("user go").encode(), usage_event(transcript.path, hook="UserPromptSubmit")
    reported_ms = ee.iso_time_ms(json.loads(prompt)["timestamp"])
    looks = [{**event, "timestamp": at_ms, "states": {}} for at_ms in (reported_ms, reported_ms + 60_000)]
    transcript.add(usage_line("m0", 1))
    transcript.reader.events(looks[0])
    transcript.add(prompt)
    assert transcript.reader.events(looks[0], is_end=False) == []
    transcript.reader.close()
    assert words_of(ee.UsageReader(transcript.home).events(looks[1])) == ""


def test_totals_come_at_the_first_look_even_right_after_boot(transcript, monkeypatch):
    monkeypatch.setattr(ee.time, "monotonic", lambda: 5.0)
    transcript.add(usage_line("m1", 2))
    found = transcript.reader.events({**usage_event(transcript.path), "states": {}}, is_end=False)
    assert [usage_output(it["data"]["usage"]) for it in found] == [2]


def test_totals_read_for_an_older_end_are_no_older_than_the_last(transcript):
    made = []
    for time_ms, name in ((9, "m1"), (5, "m2")):  # a turn's end, then the second look for its subagent's
        transcript.add(usage_line(name, 2))
        made += transcript.reader.events({**usage_event(transcript.path), "timestamp": time_ms})
    assert [(it["timestamp"], usage_output(it["data"]["usage"])) for it in made] == [(9, 2), (9, 4)]


@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=40)
def test_looks_kills_and_failures_in_any_order_lose_and_double_nothing(seed):
    chance, written, given_words = random.Random(seed), collections.Counter(), []
    is_doubled = False  # with the same id, which the monitor drops
    with tempfile.TemporaryDirectory() as home:
        reader, totals, events = ee.UsageReader(home), {}, {}

        def look(session: str, is_end: bool) -> None:
            for it in reader.events(events[session], is_end):
                if it["eventType"] == "usage":
                    totals[session] = usage_output(it["data"]["usage"])
                else:
                    given_words.append(it["id"])

        def fail(_events: object) -> bool:
            reader.deliver = lambda _: True
            raise OSError("no space left")

        for step in range(40):
            session = chance.choice("abc")
            act = chance.choice("write write write look look end kill fail damage".split())
            path = f"{home}/{session}.jsonl"
            events.setdefault(session, {**usage_event(path, session), "states": {}})
            is_doubled |= act in ("kill", "fail", "damage")
            if act == "write":
                below = chance.choice(("", "/subagents/agent-x", "/subagents/workflows/w/agent-y"))
                path = f"{home}/{session}{below}.jsonl"
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "a", encoding="utf-8") as file:
                    file.write(usage_entries(f"m{session}{step} 1/{step + 1}", session))
                written[session] += step + 1
            elif act == "kill":
                reader = ee.UsageReader(home)
                events = {name: {**event, "states": {}} for name, event in events.items()}
            elif act == "damage":
                reader.close()
                pathlib.Path(home + "/usage.db").write_bytes(b"no database")
                look(session, is_end=True)  # which finds it
            else:
                if act == "fail":
                    reader.deliver = fail
                look(session, is_end=act == "end")
                has_failed = act == "fail" and reader.deliver is not fail
                reader.deliver = lambda _: True
                if has_failed:
                    look(session, is_end=False)
                if has_failed or act == "end":
                    assert totals.get(session, 0) == written[session]
        for session in events:
            look(session, is_end=True)
        assert totals == +written
        lines = sum(path.read_bytes().count(b"\n") for path in pathlib.Path(home).rglob("*.jsonl"))
        assert len(set(given_words)) == lines and (is_doubled or len(given_words) == lines)
        reader.close()


def words_of(events: Iterable[dict[str, Any]]) -> str:
    """Return what was said in some events, as usage-words.txt says it."""
    said = [event for event in events if event["eventType"] == ee.WORDS]
    assert len({event["id"] for event in said}) == len(said)
    about = ((it.get("agentId") or it["data"].get("role") or "", it["data"]["text"]) for it in said)
    return "; ".join(": ".join(filter(None, words)) for words in about)


USAGE_WORDS = stories("usage-words", " →")


@pytest.mark.parametrize("rule", USAGE_WORDS)
def test_what_was_said_is_read_once_and_in_order(tmp_path, rule):
    reader, late = ee.UsageReader(f"{tmp_path}/home"), "2026-11-24T12:00:00.000Z"
    at_ms = ee.iso_time_ms(late)
    for files, said in USAGE_WORDS[rule]:
        path, session = usage_written(tmp_path, files.replace("LATE", late))
        event = {**usage_event(path, session), "since": at_ms}
        events = reader.events(event)
        assert words_of(events) == said, files
        assert all(it["sessionId"] == session and it["timestamp"] <= at_ms for it in events[:-1])
        assert words_of(reader.events(event)) == ""
    reader.close()


def test_of_a_long_transcript_only_the_end_is_read_for_words(transcript, monkeypatch):
    monkeypatch.setattr(ee, "WORDS_TAIL_BYTES", 5000)
    transcript.add(usage_entries("; ".join(f"m{number} 1/1" for number in range(60))).encode())
    events = transcript.reader.events(usage_event(transcript.path))
    assert 5 < words_of(events).count("done") < 25 and usage_output(events[-1]["data"]["usage"]) == 60
    transcript.reader.with_words = False
    transcript.add(usage_entries("late 1/1").encode())
    assert words_of(transcript.reader.events(usage_event(transcript.path))) == ""


@given(first=st.integers(0, 40_000))
@settings(max_examples=10)
def test_the_words_of_a_transcript_are_its_texts(first):
    for path in glob.glob(f"{RECORDED}/transcripts/*/*.jsonl"):
        lines, parser = pathlib.Path(path).read_bytes().splitlines(keepends=True), ee.TranscriptParser()
        starts = list(itertools.accumulate(map(len, lines), initial=0))
        found = [it for at, line in zip(starts, lines) for it in parser.facts_of(line, at >= first)]
        said = [it["data"] for it in found if isinstance(it, dict) and it["eventType"] == ee.WORDS]
        read = [json.loads(line).get("message") or {} for at, line in zip(starts, lines) if at >= first]
        blocks = [block for it in read if it.get("role") == "assistant" for block in it["content"]]
        own = [block["text"] for block in blocks if "text" in block]
        assert [data["text"] for data in said if "role" not in data] == own


@pytest.mark.parametrize("level", ["full", "metadata"])
def test_words_come_while_a_session_works_redacted_and_searchable(level, monitor, tmp_path):
    machine = monitor.serve(privacy={"level": level})
    transcript, secret = Transcript(str(tmp_path)), hook_token("ghp_", 36)
    machine.emit(payload("UserPromptSubmit", prompt="go", transcript_path=transcript.path))
    for number, text in enumerate(("the first finding", f"it is {secret}", "the last")):
        blocks = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
        about = {"id": f"m{number}", "model": USAGE_MODEL, "usage": {}, "content": blocks}
        message = json.dumps(about, separators=(",", ":")).replace(" ", "\\u0020")
        transcript.add(usage_entries(f"m 1/1 message={message}").encode())
        said = lambda: [it["data"]["text"] for it in machine.stored_events() if it["eventType"] == ee.WORDS]  # noqa: E731
        if level == "full":
            eventually(lambda number=number, said=said: len(said()) > number, what=text)
    if level == "metadata":
        machine.emit(payload("Stop", transcript_path=transcript.path))
        eventually(lambda: machine.sessions()["s1"]["tokenUsage"], what="the tokens")
        assert said() == []
        return
    assert said()[0] == "the first finding" and "[redacted:" in said()[1] and secret not in str(said())
    index_ready(machine)
    found = machine.get("/api/search?q=finding")["results"]
    assert [it["data"]["text"] for it in found] == ["the first finding"]
    session = machine.sessions()["s1"]
    assert session["state"] == "working" and session["counts"]["events"] == 1


def test_what_could_not_be_stored_is_found_again_with_the_same_ids(transcript):
    transcript.add(usage_entries("a 1/2; b 1/2").encode())
    given: list[Any] = []
    reader = ee.UsageReader(transcript.home, types.SimpleNamespace(is_set=lambda: False, wait=lambda _: True))
    reader.deliver = given.extend  # None: not stored
    event = usage_event(transcript.path)
    assert reader.events(event) == [] and usage_output(given[-1]["data"]["usage"]) == 4
    assert [it.get("id") for it in transcript.reader.events(event)] == [it.get("id") for it in given]
    assert transcript.reader.events(event) == []


def usage_is_held(home: str) -> bool:
    """True if for a second a reader keeps what it has counted from being final: it is not delivered yet."""
    until = time.monotonic() + 1
    while os.path.exists(home + "/usage.db"):
        with contextlib.closing(sqlite3.connect(home + "/usage.db", 0, isolation_level=None)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
                return False
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    return True
    return False


@pytest.mark.parametrize("mode", ["local", "redis"])
def test_no_word_is_lost_or_doubled_where_its_reader_is_killed(mode, make, monitor, tmp_path):
    server = make(RedisServer) if mode == "redis" else None
    machine = make(RedisMachine, config=server.settings(maxRetries=None)) if server else monitor
    command, transcript = machine.installed_command(), Transcript(str(tmp_path))
    about = functools.partial(payload, prompt="go", transcript_path=transcript.path)

    def said() -> list[str]:
        stored = machine.stored_events_allowing_a_torn_line()  # the kill may come amid a write
        return [it["id"] for it in stored if it["eventType"] == ee.WORDS]

    def stored_bytes() -> int:
        return sum(map(os.path.getsize, glob.glob(f"{machine.home}/events/*/s1.jsonl")))

    machine.serve()
    hook_call(command, about("UserPromptSubmit"), machine.environment)
    eventually(lambda: machine.sessions().get("s1"), what="the session")
    for wanted in range(1000, 11_000, 1000):
        words = [f"m{wanted + number} 1/1" for number in range(1000)]
        parts = (usage_entries("; ".join(words[at : at + 50])) for at in range(0, 1000, 50))
        transcript.add("".join(parts).encode())
        if server:
            server.process.send_signal(signal.SIGSTOP)  # its connections stay
            hook_call(command, about("Stop"), machine.environment)
            read_by = time.monotonic() + 3 * ee.LOOK_S  # a look that reads it does not lock usage.db
            while not (is_unfinished := usage_is_held(machine.home)) and time.monotonic() < read_by:
                time.sleep(0.05)
            machine.end_publisher()
            server.thaw()
        else:
            before = stored_bytes()
            hook_call(command, about("Stop"), machine.environment)
            eventually(lambda before=before: stored_bytes() > before + 5000, what="the first words")
            machine.kill()
            is_unfinished = len(said()) < wanted
            machine.serve()
        hook_call(command, about("Stop"), machine.environment)
        eventually(lambda wanted=wanted: len(said()) >= wanted, 60, "all words")
        assert len(set(said())) == len(said()) == wanted
        if is_unfinished:
            return
    pytest.fail("it was never killed between the first and the last words")


def test_branch_and_project_come_from_the_files_of_git(tmp_path):
    for place in "proj/below/deep detached none fifo/.git other private/.git loop/.git odd/.git".split():
        (tmp_path / place).mkdir(parents=True)
    for place in ("proj", "detached", "other"):
        git(tmp_path / place, "init", "-q")
        git(tmp_path / place, "commit", "-q", "--allow-empty", "-m", "x")
    git(tmp_path / "proj", "worktree", "add", "-q", "-b", "side", "../tree")
    (tmp_path / "tree/below").mkdir()
    git(tmp_path / "detached", "checkout", "-q", "--detach")
    git(tmp_path, "clone", "-q", "--bare", "other", "bare.git")
    git(tmp_path / "bare.git", "worktree", "add", "-q", "../bare-tree", "main")
    git(tmp_path / "proj", "submodule", "--quiet", "add", "../other", "sub")
    os.mkfifo(tmp_path / "fifo/.git/HEAD")
    (tmp_path / "secret").write_text("hunter2 of refs/heads/ no branch\n")
    (tmp_path / "private/.git/HEAD").symlink_to(tmp_path / "secret")
    (tmp_path / "loop/.git/HEAD").symlink_to("HEAD")
    (tmp_path / "odd/.git/HEAD").write_text("ref: refs/heads/a\u202eb\n")
    commit, began = git(tmp_path / "detached", "rev-parse", "HEAD")[:7], time.monotonic()
    for place, *expected in story_cases("tables.txt", "git places").values():
        event = ee.build_event(payload("Stop", cwd=f"{tmp_path}/{place}" if place else ""), NOW_MS, "box")
        ee.add_git_place(event)
        found = event["data"].get("git")
        places = (os.path.relpath(found[it], tmp_path) for it in ("root", "project") if found)
        shown = [found["branch"], *places] if found else ["none"]
        assert shown == [it.replace("COMMIT", commit) for it in expected], place
    assert time.monotonic() - began < 5.0  # the monitor's loop waits for it
    agent = ee.build_event(payload("Stop", cwd=f"{tmp_path}/proj", agent_id="a"), NOW_MS, "box")
    ee.add_git_place(agent)
    assert "git" not in agent["data"]


def usage_copied(name: str, directory: object) -> list[dict[str, Any]]:
    """Copy a recording's transcripts; return its payloads with their paths in the copy."""
    path = usage_transcript(name)
    shutil.copytree(os.path.dirname(path), f"{directory}/{name}")
    copied = f"{directory}/{name}/{os.path.basename(path)}"
    return [{**each, "transcript_path": copied} for each in recorded(name)]


def usage_noted(payloads: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of these payloads with the client's notes on them."""
    known, events = {}, []
    for number, each in enumerate(payloads):
        given_object = {"hook": each, "id": f"n{number}", "timestamp": NOW_MS + number}
        events.append(ee.build_event(given_object, 1, USAGE_MACHINE))
        ee.add_agent_note(events[-1], known)
    return events


def test_each_agents_first_event_carries_the_note_on_it_once(tmp_path):
    noted = [event for event in usage_noted(usage_copied("nested", tmp_path)) if "agentMeta" in event["data"]]
    outer, inner = "a8bdf82a3b7eac1f1", "a10958c072d3ed1c1"
    found = {event["agentId"]: event["data"]["agentDescription"] for event in noted}
    assert found == {outer: "outer job", inner: "inner job"} and len(noted) == 2
    assert "parentAgentId" not in noted[0]["data"]["agentMeta"]
    assert noted[1]["data"]["agentMeta"] == {
        "agentType": "general-purpose", "toolUseId": "toolu_fake_83f675246c204e179b",
        "parentAgentId": outer, "requestShape": "foreground", "spawnDepth": 2,
    }  # fmt: skip
    events = [protected(event, ee.Privacy(metadata_only=True)) for event in noted]
    assert all("agentMeta" in event["data"] and "agentDescription" not in event["data"] for event in events)
    assert "inner job" not in json.dumps(events), "at the level of metadata it loses its words"


def test_a_note_comes_once_it_is_whole_and_again_with_its_event(tmp_path):
    copied = [each for each in usage_copied("subagent", tmp_path) if "agent_id" in each]
    (note,) = glob.glob(f"{tmp_path}/subagent/*/subagents/*.meta.json")
    whole, known, noted = install_text(note), {}, []
    for number, written in ((0, None), (1, '{"half": '), (2, whole), (2, whole), (3, whole)):
        os.unlink(note) if written is None else ee.write_atomically(note, written.encode())
        given_object = {"hook": copied[number], "id": f"e{number}", "timestamp": NOW_MS}
        event = ee.build_event(given_object, NOW_MS, USAGE_MACHINE)
        ee.add_agent_note(event, known)
        noted.append("agentMeta" in event["data"])
    assert noted == [False, False, True, True, False]


def test_a_missing_note_is_looked_for_a_few_times_only(tmp_path, monkeypatch):
    looks, copied = [], [each for each in usage_copied("subagent", tmp_path) if "agent_id" in each][:1]
    monkeypatch.setattr(ee, "agent_folders", lambda *given: iter(looks.append(given) or ()))
    usage_noted([{**copied[0], "transcript_path": None}] * 100 + copied * 100)
    assert len(looks) == ee.NOTE_LOOKS


@pytest.mark.parametrize("place", ["s1/subagents", "s1/subagents/workflows/run"])
def test_the_note_on_an_agent_is_found_where_its_transcript_is(tmp_path, place):
    note = json.dumps({"agentType": "Explore", "description": "look", "toolUseId": "t1"})
    write_files(tmp_path / "projects/-app", {f"{place}/agent-a1.meta.json": note, "s1.jsonl": ""})
    paths = {"agent_id": "a1", "transcript_path": f"{tmp_path}/projects/-worktree/s1.jsonl"}
    (event,) = usage_noted([{**payload("PreToolUse", tool_name="Bash"), **paths}])
    assert event["data"]["agentDescription"] == "look"


@pytest.mark.parametrize("agent", ["../../x", "a/b", "", "x" * 200, "\ud800", "a\0b"])
def test_no_agent_id_leads_to_another_file(tmp_path, agent):
    (event,) = usage_noted([{**usage_copied("subagent", tmp_path)[0], "agent_id": agent}])
    assert "agentMeta" not in event["data"]


@pytest.mark.parametrize("name", ["session_id", "sessionId"])
def test_a_forks_origin_is_the_last_session_whose_messages_it_copied(tmp_path, name):
    said = ("m1", "first"), ("m2", "origin"), ("m3", "fork")  # the origin is a fork, too
    parsed = ((json.loads(usage_line(key, 1)), session) for key, session in said)
    lines = [json.dumps({**line, "sessionId": "fork", name: session}) for line, session in parsed]
    path = tmp_path / "fork.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert usage_read(tmp_path, str(path), "fork")["origin"] == "origin"


def usage_data(output: int) -> dict[str, Any]:
    models = {"claude-opus-4-5": {"input": 10, "output": output, "cacheRead": 0, "cacheCreation": 0}}
    return {"models": models, "agents": {"": models}, "model": "claude-opus-4-5"}


@pytest.mark.parametrize("order", list(itertools.permutations((5, 9, 30))))
def test_the_newest_usage_is_the_sessions_whatever_the_order_of_arrival(order):
    story = session_story()
    start, story.time = story.time, story.time + 60_000
    for output in order:
        shown = session_after(story, "Stop", start + output * 1000, usage=usage_data(output))
    assert list(shown["tokenUsage"].values()) == [10, 30, 0, 0]
    assert shown["estimatedCostUsd"] == pytest.approx((10 * 5 + 30 * 25) / 1e6)


def test_each_agent_has_its_own_tokens(tmp_path):
    *events, end = recorded("parallel")
    story = SessionStory(session=end["session_id"])
    for each in events:
        story.deliver(each)
    assert [agent["tokenUsage"] for agent in story.now()["agents"]] == [None, None]  # not read yet
    story.deliver({**end, "usage": usage_read(tmp_path, usage_transcript("parallel"))})
    shown = story.now()
    assert sorted(agent["tokenUsage"]["totalOutput"] for agent in shown["agents"]) == [123, 166]
    assert shown["tokenUsage"]["totalOutput"] == 370


@story_table("tables.txt", "usages", "usage, is_ours")
def test_others_usage_is_left_alone_and_odd_numbers_are_0(usage, is_ours):
    shown = session_after(session_story(), "Stop", usage=usage)
    totals = shown["tokenUsage"] and set(shown["tokenUsage"].values())
    assert (totals, shown["estimatedCostUsd"]) == (({0}, 0) if is_ours else (None, None))
    assert shown["state"] == "idle" and json.dumps(shown["model"])


@pytest.mark.parametrize("line", story_blocks("prices")[0])
def test_the_family_of_a_model_is_found_in_any_clouds_spelling(line):
    model, _, family = line.partition(" →")
    assert cm.model_family(model) == family.strip()


def test_every_price_follows_the_rules_of_the_price_list():
    assert all(family == cm.model_family("claude-" + family) or family[-1] == "3" for family in cm.PRICES)
    for family, price in cm.PRICES.items():
        assert price.output == pytest.approx(5 * price.input), family
        assert price.cache_write_5m == pytest.approx(1.25 * price.input, rel=0.05), family
        assert price.cache_write_1h == pytest.approx(2 * price.input), family
        assert 0.02 * price.input < price.cache_read < 0.13 * price.input, family


@pytest.mark.parametrize("line", story_blocks("prices")[1])
def test_each_kind_of_token_costs_its_price_by_model_family_or_kind(line):
    models, *given = re.fullmatch(r"(.*?) (\{.*\}) (\{.*\}) → (.*)", line).groups()
    prices, millions, cost = map(json.loads, given)
    tokens = cm.Tokens(**{kind: number * 1_000_000 for kind, number in millions.items()})
    prices = {name: cm.Price.of(**it) for name, it in prices.items()}
    for model in models.split():
        assert cm.estimated_usd(cm.SessionUsage(1, {model: tokens}), prices) == cost
    half = {"some-model": tokens, "claude-opus-4-1-20250805": tokens}
    assert cm.estimated_usd(cm.SessionUsage(1, half), {}) is None


def test_tokens_cost_and_agents_arrive_through_hooks_and_survive_a_restart(hook_installed, monitor):
    def output() -> int:
        return (monitor.sessions()[session]["tokenUsage"] or {}).get("totalOutput", 0)

    monitor.serve(prices={"opus-5-5": {"input": 40, "output": 200}}, privacy={"level": "metadata"})
    started, stop = (
        next(each for each in usage_copied(name, monitor.home) if each["hook_event_name"] == hook)
        for name, hook in (("nested", "SubagentStart"), ("subagent", "Stop"))
    )
    hook_call(hook_installed.command, started, monitor.environment)
    path, session = stop["transcript_path"], stop["session_id"]
    lines, outputs = pathlib.Path(path).read_bytes().splitlines(keepends=True), [0]
    for part in (lines[:5], lines):
        pathlib.Path(path).write_bytes(b"".join(part))
        hook_call(hook_installed.command, stop, monitor.environment)
        eventually(lambda: output() > outputs[-1], 3)
        outputs.append(output())
    sessions = monitor.sessions()
    assert list(sessions[session]["tokenUsage"].values()) == [88, 333, 26664, 1776]
    assert sessions[session]["model"] == "claude-opus-5-5"
    expected = (88 * 40 + 333 * 200 + 26664 * 4 + 1600 * 50 + 176 * 80) / 1e6
    assert sessions[session]["estimatedCostUsd"] == pytest.approx(expected, abs=1e-6)
    note, *stored = monitor.stored_events()
    assert note["data"]["agentMeta"]["agentType"] == "general-purpose"
    assert not any("usage" in it["data"] for it in stored if it["eventType"] != "usage"), "a thread reads it"
    own = [it for it in stored if it["sessionId"] == session]
    ends = [place for place, event in enumerate(own) if event["eventType"] == "turn_end"]
    totals_after = [own[place + 1]["data"]["usage"] for place in ends]
    assert [usage_output(usage) for usage in totals_after] == outputs[1:]
    monitor.kill()
    assert monitor.serve().sessions() == sessions


def test_through_redis_totals_come_once_after_the_event_they_belong_to(team):
    machine = team.emitters[0]
    transcript = Transcript(machine.home)
    transcript.add(usage_line("m1", 5) + usage_line("m2", 6))
    for hook in ("Stop", "SessionEnd"):
        hook_call(machine.hook, payload(hook, "totals", transcript_path=transcript.path), machine.environment)

    def streamed() -> list[dict[str, Any]]:
        return [event for event in map(json.loads, team.server.streamed()) if event["sessionId"] == "totals"]

    eventually(lambda: len(streamed()) >= 3)
    stop, shown = [event for event in streamed() if event["hookType"] != "SessionEnd"]
    assert (stop["hookType"], "usage" in stop["data"]) == ("Stop", False)
    assert (shown["eventType"], shown["hookType"], shown["machineId"]) == ("usage", "", machine.machine_id)
    assert usage_output(shown["data"]["usage"]) == 11
    assert len({event["id"] for event in streamed()}) == 3


# -- loading ------------------------------------------------------------------
#
# What is stored is read behind the page, and the state is that of one pass in the order of arrival. It is made up
# here: what a month of work leaves behind, in any size, out of recorded turns.


def history_line(given_payload: dict[str, Any], **data: Any) -> bytes:
    """Return the event of a payload from its directory on: what else there is changes with each session."""
    event = ee.build_event(given_payload, NOW_MS, "m")
    event["data"].update(data)
    for field in ("id", "timestamp", "sessionId", "machineId"):
        del event[field]
    return ee.encode_json(event)[1:]


@functools.cache
def history_turn(name: str) -> tuple[bytes, ...]:
    """Return the events of a recorded turn, with SESSION and TURN for its ids."""
    lines: list[bytes] = []
    for each in recorded(name):
        if each["hook_event_name"] in ("SessionStart", "SessionEnd"):
            continue
        passed = "ok src/cart/totals_test.py::test_rounding PASSED\n" * (len(lines) % 40)
        more = {"stdoutTail": passed} if each["hook_event_name"] == "PostToolUse" else {}
        line = history_line(each, **more).replace(each["session_id"].encode(), b"SESSION")
        line = line.replace(b"toolu_", b"toolu_TURN")
        if "agent_id" in each:
            line = line.replace(each["agent_id"].encode(), b"TURN" + each["agent_id"].encode())
        lines.append(line)
    return tuple(lines)


def history_work(rng: random.Random, session: bytes, begin_ms: int, events: int) -> Iterator[Any]:
    """Do so many events of turns; yield when each arrives, when it happened, and the event from its directory on."""
    names = "simple paralleltools failing subagent thinking tasks parallel mcp unicode i-perm nested worktree"
    names, at, last_turn = f"{names} bgbash p-perm".split(), begin_ms, 0
    turns = ((turn, line) for turn in itertools.count() for line in history_turn(rng.choice(names)))
    for turn, line in itertools.islice(turns, events):
        at += rng.randrange(5, 4000) + (turn != last_turn) * rng.randrange(1000, 120_000)
        last_turn, chance = turn, rng.random()
        late_ms = 0 if chance > 0.02 else rng.randrange(2000) if chance > 0.001 else 300_000
        yield at + late_ms, at, line.replace(b"SESSION", session).replace(b"TURN", b"%04d" % turn)


def write_history(
    root: str, sessions: int, events: int, now_ms: int, seed: int = 1, pids: bool = True
) -> list[str]:
    """Write a made-up history of 30 days as the store writes it; return the ids of the sessions, oldest first.

    One in eight goes on after /clear as the next one, some have a parent; the last ones have not ended.
    """
    rng = random.Random(seed)
    weights = [rng.lognormvariate(0, 1.1) for _ in range(sessions)]
    ids = [str(uuid.UUID(int=rng.getrandbits(128), version=4)) for _ in weights]
    said: list[Any] = []  # arrival, number of its session, timestamp, machine, the rest
    end_ms, machine, process = 0, b"", b""
    for number, weight in enumerate(weights):
        begin, source = now_ms - 30 * 86_400_000 * (sessions - number) // sessions, "startup"
        if number % 8 == 7:
            begin, source = end_ms + rng.randrange(5, 300), "clear"
        else:
            machine = rng.choice((b"testbox", b"build-7", b"laptop"))
            process = b'"pid":%d,' % (4_000_000 + number) if pids else b""
        share = max(1, round(weight * events / sum(weights)) - 2)
        work = list(history_work(rng, ids[number].encode(), begin, share))
        end_ms = work[-1][1] + rng.randrange(1000, 600_000)
        hooks = [(begin, payload("SessionStart", ids[number], source=source))]
        if number % 8 == 6 or number < sessions * 0.99:
            reason = "clear" if number % 8 == 6 else rng.choice(("prompt_input_exit", "other", "logout"))
            hooks.append((end_ms, payload("SessionEnd", ids[number], reason=reason)))
        work += [(at, at, history_line(hook)) for at, hook in hooks]
        if number % 40 in (17, 18):
            data = {"action": "set_parent", "parentSessionId": ids[number - 1]}
            act = {"workingDirectory": "", "hookType": "Monitor", "eventType": "session_meta", "data": data}
            work.append((begin + 3000, begin + 3000, ee.encode_json(act)[1:]))
        said += [(min(arrival, now_ms), number, at, machine, process + line) for arrival, at, line in work]
    files: dict[str, list[bytes]] = collections.defaultdict(list)
    for seq, (received, number, at, machine, line) in enumerate(sorted(said), 1):
        event_id = uuid.UUID(int=rng.getrandbits(128), version=4).hex.encode()
        files[f"{root}/{cm.day_of(received)}/{ids[number]}.jsonl"].append(
            b'{"seq":%d,"received":%d,"id":"%s","timestamp":%d,"sessionId":"%s","machineId":"%s",%s\n'
            % (seq, received, event_id, at, ids[number].encode(), machine, line)
        )
    for path, lines in files.items():
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(lines)
    return ids


def loading_same(place: RunningMonitor) -> None:
    """Check that the monitor's sessions, of which none may have a process, are those of one pass over all events."""
    book = cm.Sessions(own_machine=ee.machine_key(place.home), own_name="testbox")
    for line in journal_plain_lines(place.home + "/events"):
        book.apply(cm.parse_stored(line))
    book.tick(cm.now_ms())
    expected, shown = (
        {it["sessionId"]: {**it, "childSessionIds": sorted(it["childSessionIds"])} for it in sessions}
        for sessions in (book.each_json(True), place.sessions().values())
    )
    assert shown == expected


@contextlib.contextmanager
def loading_here(home: str) -> Iterator[cm.Monitor]:
    values, _ = ee.load_config(home + "/monitor.config.json", cm.KEYS)
    made = cm.Monitor(cm.Settings(home, home + "/monitor.config.json", "testbox", values))
    made.open()
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "saved",
    ["nothing", "nothing, at a stop while loading", "at the stop", "before a kill", "at a stop amid saving"],
)
def test_what_was_loaded_is_what_processing_live_gives(monitor, monkeypatch, saved):
    """From no snapshot, from those of an orderly stop, at any moment, and from those that a killed monitor saved."""
    # without pids: no session may end by itself while this runs
    write_history(monitor.home + "/events", 80, 3000, cm.now_ms(), seed=len(saved), pids=False)
    advance = cm.Monitor._advance
    if saved != "nothing":
        if "nothing" in saved:
            monkeypatch.setattr(cm.Monitor, "_advance", lambda self, steps: next(steps))
        with loading_here(monitor.home) as made:
            eventually(lambda: "nothing" in saved or made.loading is None, 60)
            if saved in ("before a kill", "at a stop amid saving"):
                made.loop.call(lambda: collections.deque(made._snapshot_steps(), 0))
                eventually(lambda: not made.history._jobs)
            if saved == "before a kill":
                made._snapshot_steps = lambda: iter(())  # type: ignore[method-assign]
            for number in range(50):
                if (number, saved) == (40, "at a stop amid saving"):
                    made.loop.call(lambda: next(made._snapshot_steps()))
                hook = payload("UserPromptSubmit", f"later-{number // 8}", prompt=str(number))
                event = timed(hook, cm.now_ms(), "later-box")
                made.loop.call(lambda event=event: made.take_now(ee.encode_json(event)))
        assert (made.loading is None) is ("nothing" not in saved)
        assert int(install_text(monitor.home + "/last-seq")) == monitor.stored_events()[-1]["seq"]
    monkeypatch.setattr(cm.Monitor, "_advance", advance)
    with loading_here(monitor.home) as made:
        eventually(lambda: made.loading is None, 60)
        loading_same(monitor.know())


@contextlib.contextmanager
def loading_held(monkeypatch: Any) -> Iterator[Any]:
    """Run a monitor here that reads nothing of what is stored until the gate is opened."""
    gate, advance = threading.Event(), cm.Monitor._advance

    def held(self: cm.Monitor, steps: Iterator[None]) -> None:
        if gate.is_set():
            advance(self, steps)
        else:
            self.loop.call_later(0.01, functools.partial(held, self, steps))

    monkeypatch.setattr(cm.Monitor, "_advance", held)
    place = RunningMonitor(new_home())
    ids = write_history(place.home + "/events", 40, 2000, cm.now_ms(), pids=False)
    with contextlib.ExitStack() as at_end:
        at_end.callback(shutil.rmtree, place.home, ignore_errors=True)
        at_end.enter_context(loading_here(place.home))
        at_end.callback(gate.set)
        yield place.know(), ids, gate


def test_all_but_actions_is_served_before_anything_is_read(monkeypatch):
    with loading_held(monkeypatch) as (place, ids, gate):
        assert place.request("/")[0] == 200
        nothing_yet = {"done": 0, "total": len(place.stored_events())}
        words = f"0 of {nothing_yet['total']} stored events have been read"
        assert place.get("/api/status")["loading"] == nothing_yet
        place.emit(place.stored_events()[0])  # once more: it is not stored again
        assert len(place.stored_events()) == nothing_yet["total"]
        assert words in in_process(place, "status").stdout and words in in_process(place, "sessions").stderr
        with monkeypatch.context() as patch:
            started = {**place.about, "process": "pid 1"}
            found = itertools.chain([None], itertools.repeat(started))
            patch.setattr(cm, "running_monitor", lambda settings: next(found))
            patch.setattr(cm, "start_in_background", lambda *_: started)
            assert words in in_process(place, "start", "--no-open").stdout
        client = place.websocket()
        client.next("status", loading=nothing_yet)
        assert client.ask("sessions", type="get_sessions")["sessions"] == []
        machine = next(e["machineId"] for e in place.stored_events() if e["sessionId"] == ids[3])
        command = [sys.executable, place.program, "tail"]
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        ends, starts = (payload(f"Session{it}", reason="clear", source="clear") for it in ("End", "Start"))
        with subprocess.Popen(command, env=place.environment, text=True, **pipes) as tail:
            assert words in tail.stderr.readline()
            for hook, session in ((ends, ids[3]), (starts, "new")):
                place.emit(timed({**hook, "session_id": session}, cm.now_ms(), machine))
                assert hook["hook_event_name"] in tail.stdout.readline()
            tail.kill()
        assert [event["sessionId"] for event in client.events(2)] == [ids[3], "new"]
        assert place.sessions_so_far() == {}
        assert place.request("/api/sessions/" + ids[3])[0] == 503
        renaming = {"type": "rename_session", "sessionId": ids[1], "label": "second"}
        assert client.ask("error", **renaming)["message"] == cm.LOADING
        assert place.request("/api/message", "POST", b'{"type":"prune"}', protocol_origin(place))[0] == 503
        assert place.get(f"/api/sessions/{ids[3]}/events?limit=1")["events"][0]["hookType"] == "SessionEnd"
        gate.set()
        listed = client.next("sessions_updated")["sessions"]
        assert {session["sessionId"] for session in listed} == {*ids, "new"}
        client.next("status", loading=None)
        client.send(**renaming)
        eventually(lambda: client.next("session_update")["session"]["label"] == "second")
        assert place.sessions()["new"]["continuedFrom"] == ids[3]
        loading_same(place)
        assert "stored events have" not in in_process(place, "status").stdout


def test_a_page_that_is_served_before_all_is_known_says_so(monitor, monkeypatch):
    ids = write_history(monitor.home + "/events", 10, 500, cm.now_ms(), pids=False)
    monitor.about = {"port": redis_free_port()}
    monitor.write_config({"server": {"port": monitor.port}})
    encode, listen, asked, answers = cm.encode_with_sessions, cm.HookPort.listen, threading.Event(), []

    def listen_later(port: cm.HookPort) -> None:
        answers.append(pool.submit(monitor.get, "/api/sessions"))
        assert asked.wait(15)
        listen(port)

    monkeypatch.setattr(cm, "encode_with_sessions", lambda *given: (asked.set(), encode(*given))[1])
    monkeypatch.setattr(cm.HookPort, "listen", listen_later)
    with concurrent.futures.ThreadPoolExecutor() as pool, loading_here(monitor.home):
        assert answers[0].result()["loading"]
        assert set(monitor.sessions()) == set(ids)
        assert monitor.get("/api/sessions")["loading"] is None


@pytest.fixture
def old_monitor() -> Iterator[RunningMonitor]:
    """A monitor, not started, with a directory of version 0.1.0 (commit 9080103) and what is true of this machine.

    It has packed and plain days, an index, usage, a spool, settings with the hooks of then, and acts of the user.
    """
    folder = new_home()
    with tarfile.open(os.path.join(ROOT, ".ci", "recorded", "home-0.1.0.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    for path in map(str, pathlib.Path(folder).rglob("*.json*")):
        if not path.endswith(".gz"):
            text = install_text(path).replace("@HOME@", folder).replace("@PYTHON@", PYTHON)
            ee.write_atomically(path, text.encode())
    (spooled,) = glob.glob(folder + "/.contextuate/spool/*-*.jsonl")  # one of over 7 days would be dropped
    os.rename(spooled, os.path.dirname(spooled) + f"/{cm.now_ms()}-3be190be.jsonl")
    more = {"mode": "local", "retention": {"days": None}, "sessions": {"endedHours": 87_600}}
    monitor = RunningMonitor(folder + "/.contextuate", config=more)
    monitor.claude_home = folder + "/.claude"
    yield monitor
    clean_up(monitor)
    shutil.rmtree(folder)


def test_a_directory_of_version_0_1_0_is_taken_over_without_a_loss(old_monitor):
    def printed(*command: str) -> list[Any]:
        return [json.loads(line) for line in in_process(old_monitor, *command).stdout.splitlines()]

    home, folder = old_monitor.home, os.path.dirname(old_monitor.home)
    expected = {it["sessionId"]: it for it in json.loads(install_text(folder + "/expected-sessions.json"))}
    old_monitor.start()
    # The hook that the old version installed sends to the new monitor, and the old spool comes in.
    old_monitor.write_config({"sessions": {}})  # with too large a value the hook takes the default socket
    call = payload("PreToolUse", "live", tool_name="Bash", tool_use_id="t3", tool_input={})
    assert hook_call(f"{PYTHON} -I -S {home}/hooks/emit_event.py", call, old_monitor.environment) == ""
    eventually(lambda: not os.listdir(home + "/spool"), what="the old spool")
    known = old_monitor.sessions()
    # a notification of it was in the spool, and the call was just sent
    expected["live"]["counts"]["events"] += 2
    expected["live"]["counts"]["toolCalls"] += 1
    same = ("counts", "label", "isPinned", "hidden", "parentSessionId", "startTime", "tokenUsage", "model")
    assert known.keys() == expected.keys()
    for name, session in expected.items():
        assert [known[name][field] for field in same] == [session[field] for field in same], name
    assert not glob.glob(home + "/events/*/*.gz")
    exported = printed("export")
    assert len({event["id"] for event in exported}) == len(exported)
    calls = sum(event["hookType"] == "PreToolUse" for event in exported)
    eventually(lambda: len(printed("search", "--type", "PreToolUse", "--json", "--limit", "500")) == calls)
    in_process(old_monitor, "install")
    hooks = old_monitor.client_settings()["hooks"]
    assert all(len(group["hooks"]) == 1 for groups in hooks.values() for group in groups)


def test_a_transcript_that_is_here_counts_instead_of_the_sums(running: RunningMonitor) -> None:
    (transcript,) = glob.glob(f"{RECORDED}/transcripts/parallel/*.jsonl")
    data = {"transcriptPath": transcript, "sessionTokenUsage": {**NODE_SUMS, "input": 10**9}}
    running.emit({**NODE, **NODE_STOP, "machineId": "testbox", "timestamp": cm.now_ms(), "data": data})
    used = eventually(lambda: running.sessions()["0123456789abcdef"]["tokenUsage"])
    assert used["totalOutput"] and used["totalInput"] < 10**9


def test_events_of_a_running_turn_do_not_wake_the_reader_of_transcripts(tmp_path: Any) -> None:
    worker, woken = ee.UsageWorker(str(tmp_path), lambda events: True, True), []
    really_notify = worker._wake.notify
    worker._wake.notify = lambda: (woken.append(hook), really_notify())  # type: ignore[assignment]
    for hook in ("PreToolUse", "PostToolUse", "PreToolUse", "Stop"):
        worker.put(usage_event(f"{tmp_path}/s1.jsonl", hook=hook))
    assert woken == ["PreToolUse", "Stop"]
    worker.close()


# ---- Registry: the client's status, from its recorded files to the state on the page -----------------------
# The recordings of the real client have its hooks, its registry file and its screen side by side.

CLIENT_RECORDINGS = os.path.join(ROOT, ".ci", "recorded", "client-registry")
SCREENS = {  # state on the page → what the client's screen, or its file, may show
    "waiting": {"PROMPT", "waiting"}, "working": {"WORKING", "busy"}, "idle": {"IDLE", "idle"},
    "failed": {"IDLE", "idle"}, "ended": {"IDLE", "EXITED"}, "background": {"WORKING", "IDLE", "busy", "shell"},
}  # fmt: skip


def registry_file(directory: Any, pid: int = 4711, **fields: Any) -> Any:
    """Write the file of a client, as the client does."""
    (directory / "sessions").mkdir(parents=True, exist_ok=True)
    path = directory / "sessions" / f"{pid}.json"
    about = {"pid": pid, "sessionId": "s1", "cwd": "/w", "procStart": "1", "kind": "interactive"}
    path.write_text(json.dumps({**about, **fields}))
    return path


def test_a_status_that_was_not_stored_is_delivered_again(tmp_path, watcher):
    given: list[Any] = []
    thread = cm.RegistryThread("box", lambda events: not events or given.append(events[:]) or len(given) > 2)
    thread.watcher = watcher
    thread.start()
    time.sleep(2 * ee.REGISTRY_POLL_S)  # no client runs: it rests
    registry_file(tmp_path, status="busy", statusUpdatedAt=cm.now_ms() - 5000)
    thread.learn({"data": {}})  # from Claude Code 2.1.150, which does not name its process
    eventually(lambda: len(given) > 2, cm.REGISTRY_REST_S)
    time.sleep(2 * ee.REGISTRY_POLL_S)  # what was stored is not delivered a fourth time
    thread.close()
    assert len(given) == 3 and given[0] == given[1] == given[2]


@pytest.fixture
def watcher(tmp_path, monkeypatch):
    """A watcher of a directory of its own, whose clients run."""
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(ee, "process_start", lambda pid: 1)
    return ee.RegistryWatcher("box")


def replayed(name: str, directory: Any, watcher: Any, delay_ms: Any, lines: Iterable[str] = ()) -> list[Any]:
    """Replay a recording; return (ms, (screen, status), state on the page) whenever one of them changed.

    `lines`: what the transcript gets by Esc (SESSION_LINES); it is then read instead of the registry.
    """
    rows = [json.loads(line) for line in spool_read(f"{CLIENT_RECORDINGS}/{name}.jsonl")]
    contents = [(it["t"], it["registry"]["content"]) for it in rows if it.get("registry", {}).get("content")]
    base = max(it["statusUpdatedAt"] - t for t, it in contents if "statusUpdatedAt" in it)
    exited = next((row["t"] for row in rows if row.get("screen") == "EXITED"), math.inf)
    numbered = enumerate([*rows, {"t": rows[-1]["t"] + 1500}])
    arrivals = [(row["t"] + (delay_ms() if "hook" in row else 0), number, row) for number, row in numbered]
    sessions, seen, screen, status, next_poll = cm.Sessions(own_machine="box"), [], "IDLE", "", 0.0

    def take(event: dict[str, Any], at: float) -> None:
        sessions.apply({**ee.build_event(event, 0, "box"), "received": round(base + at)})

    def note(at: float) -> None:
        current = [it for it in sessions.sessions.values() if it.end_reason not in ("clear", "replaced")]
        state = current[-1].state if current else "idle"
        state = "background" if state == "working" and current[-1].turn != "working" else state
        if not seen or seen[-1][1:] != ((screen, status), state):
            seen.append((at, (screen, status), state))

    session_id = contents[0][1]["sessionId"]
    for row in rows if lines else ():
        for number, line in enumerate(lines if row.get("keys") == "key esc" else ()):
            (shown,) = evidence(line, round(base + row["t"] + 150 + number))
            arrivals.append((row["t"] + 150 + delay_ms() * 4, number, {"t": 0, "line": shown}))
    for at, _, row in sorted(arrivals, key=lambda it: it[:2]):
        while next_poll <= at and not lines:
            if next_poll >= exited:
                registry_file(directory, **{**contents[-1][1], "procStart": "dead"})
            for event in watcher.poll(round(base + next_poll)):
                take(event, next_poll)
            note(next_poll)
            next_poll += 300
        if "registry" in row and row["registry"]["content"]:
            registry_file(directory, **{**row["registry"]["content"], "procStart": "1"})
            status = row["registry"]["content"].get("status", "")
        elif "registry" in row:
            os.unlink(directory / "sessions" / row["registry"]["file"])
        elif "line" in row:
            take({**row["line"], "sessionId": session_id, "machineKey": "box"}, at)
        elif "hook" in row:
            wrapped = {"id": str(uuid.uuid4()), "timestamp": round(base + row["t"]), "machineKey": "box"}
            take({**wrapped, "pid": contents[0][1]["pid"], "hook": row["hook"]}, at)
        screen = row.get("screen", screen)
        note(at)
    return [*seen, (rows[-1]["t"] + 1000.0, (), "")]


def longest_difference_ms(seen: list[tuple[Any, ...]]) -> float:
    """Return the longest time in which the page differed from the screen and from the client's status."""
    longest = since = 0.0
    differs = False
    for (at, shown, state), (until, _, _) in zip(seen, seen[1:]):
        since = since if differs else at
        differs = not SCREENS[state] & {*shown}
        longest = max(longest, until - since if differs else 0.0)
    return longest


@pytest.mark.parametrize("name", sorted(path[:-6] for path in os.listdir(CLIENT_RECORDINGS)))
def test_the_page_says_within_seconds_what_a_recorded_screen_says(name, tmp_path, watcher):
    # The screens were recorded on a loaded machine: up to 1.9 s after the hook.
    in_order = replayed(name, tmp_path, watcher, lambda: 0)
    assert longest_difference_ms(in_order) <= 2000, in_order
    delays, watcher = random.Random(name), ee.RegistryWatcher("box")
    shuffled = replayed(name, tmp_path, watcher, lambda: delays.uniform(0, 500))
    assert longest_difference_ms(shuffled) <= 2500, shuffled
    assert shuffled[-2][2] == in_order[-2][2]


@pytest.mark.parametrize("name", ["permission-esc", "question-esc", "esc-in-tool"])
def test_without_a_registry_the_transcript_shows_what_the_screen_did(name, tmp_path, watcher):
    delays, lines = random.Random(name), ["interrupted"] if "tool" in name else ["denied", "interrupted"]
    for _ in range(5):
        seen = replayed(name, tmp_path, watcher, lambda: delays.uniform(0, 500), lines)
        assert longest_difference_ms(seen) <= 4500, seen


def changes(watcher: Any, *times_ms: int) -> list[tuple[Any, ...]]:
    events = [event for at in times_ms for event in watcher.poll(at)]
    return [(it["data"].get("status"), it["data"].get("previous"), it["timestamp"]) for it in events]


@pytest.mark.parametrize("clock", ["statusUpdatedAt", "updatedAt"])
def test_a_status_is_reported_once_it_has_settled(clock, tmp_path, watcher):
    registry_file(tmp_path, status="busy", **{clock: 500})
    assert changes(watcher, 1000, 1300) == []  # its hooks report its beginning
    assert changes(watcher, 2000, 2300) == [("busy", None, 500)]
    registry_file(tmp_path, status="waiting", waitingFor="permission prompt", **{clock: 2500})
    assert changes(watcher, 2600) == []
    registry_file(tmp_path, status="idle", **{clock: 2700})
    assert changes(watcher, 2900, 3200) == [("idle", "busy", 2700)]
    registry_file(tmp_path, **(named := {"status": "idle", clock: 2700, "name": "pay", "nameSource": "user"}))
    assert changes(watcher, 3500) == [("idle", "idle", 3500)]
    registry_file(tmp_path, **{**named, clock: 3600})  # after a short "busy"
    assert changes(watcher, 3700) == []
    assert changes(watcher, 3900, 4000) == [("idle", "", 3600)]
    registry_file(tmp_path, **named, procStart="dead")
    assert changes(watcher, 5000, 5500) == [("exited", None, 5000)]


def test_a_flood_of_configuration_directories_is_not_watched(tmp_path, watcher):
    for number in range(300):
        registry_file(tmp_path / str(number), sessionId=f"s{number}", status="busy", statusUpdatedAt=500)
        watcher.learn({"data": {"transcriptPath": f"{tmp_path}/{number}/projects/p/x.jsonl"}})
    assert 200 < len(changes(watcher, 1000, 3000, 3300)) < 257


def test_two_watchers_and_a_restart_make_the_same_event(tmp_path, watcher):
    registry_file(tmp_path, status="busy", statusUpdatedAt=500)
    pairs = enumerate((watcher, ee.RegistryWatcher("box")))
    ids = [[it["id"] for at in (1000, 3000) for it in each.poll(at + late)] for late, each in pairs]
    assert ids[0] == ids[1] and len(ids[0]) == 1


HOSTILE_FILES = story_cases("tables.txt", "hostile files")


@pytest.mark.parametrize("kind", [*HOSTILE_FILES, *(it for it in SQUATS if it != "a file")])
def test_a_hostile_registry_file_reports_nothing(kind, tmp_path, watcher):
    if "another user" in kind and os.getuid():
        pytest.skip("only root can give files away")
    path = registry_file(tmp_path, status="busy", statusUpdatedAt=500)
    if kind in SQUATS:
        SQUATS[kind](str(path), str(path.rename(tmp_path / "x.json")))
    else:
        subprocess.run(["sh", "-ec", *HOSTILE_FILES[kind]], cwd=path.parent, check=True)
    assert changes(watcher, 1000, 3000) == []


@given(st.dictionaries(
    st.sampled_from(("pid", "sessionId", "cwd", "status", "statusUpdatedAt", "name", "procStart")),
    st.one_of(st.integers(), st.text(), st.none()),
))  # fmt: skip
def test_parsing_a_registry_file_never_raises(fields):
    record = ee.parse_registry(fields, f"{fields.get('pid')}.json")
    assert not record or record.pid == fields["pid"] and all(len(it) <= 200 for it in record.about.values())


@pytest.mark.parametrize("mode", ["local", "redis"])
def test_esc_is_read_from_the_transcript_of_a_client_without_a_registry(mode, make, monitor, transcript):
    machine = make(RedisMachine, config=make(RedisServer).settings()) if mode == "redis" else monitor
    machine.serve()
    transcript.add(usage_line("m1", 5))
    call = payload("PreToolUse", tool_use_id="t1", transcript_path=transcript.path)
    hook_call(machine.installed_command(), call, machine.environment)
    eventually(lambda: machine.sessions().get("s1", {}).get("state") == "working", what="the call")
    transcript.add(session_line("interrupted", ee.now_ms() - ee.EVIDENCE_MS - 1000))  # history
    transcript.add(usage_entries("m2 1/5").encode())
    eventually(lambda: any(it["eventType"] == ee.WORDS for it in machine.stored_events()), what="its words")
    assert machine.sessions()["s1"]["state"] == "working"
    transcript.add(session_line("interrupted", ee.now_ms()))
    eventually(lambda: machine.sessions()["s1"]["state"] == "idle", what="Esc")
    assert machine.sessions()["s1"]["counts"]["interrupted"] == 1


def test_esc_while_the_monitor_is_away_is_read_at_its_next_start(running, client, transcript):
    transcript.add(usage_line("m1", 5))
    for call in hooks("call make; ask make"):
        call["transcript_path"] = transcript.path
        hook_call(running.installed_command(), call, running.environment, CLAUDE_PID=str(client.pid))
    eventually(lambda: running.sessions().get("s1", {}).get("state") == "waiting", what="the request")
    running.kill()
    transcript.add(session_line("interrupted", ee.now_ms()))
    running.serve()
    eventually(lambda: running.sessions()["s1"]["state"] == "idle", what="Esc")


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
@pytest.mark.parametrize("mode", ["local", "redis"])
def test_a_session_without_hooks_is_shown_until_its_client_exits(mode, make, monitor, client):
    machine = make(RedisMachine, config=make(RedisServer).settings()) if mode == "redis" else monitor
    machine.serve()
    home = pathlib.Path(machine.claude_home)
    start = str(ee.process_start(client.pid))
    about = {"pid": client.pid, "procStart": start, "statusUpdatedAt": ee.now_ms()}
    registry_file(home, status="busy", **about)
    if mode == "redis":
        machine.say("a hook starts the publisher", "other")
    session = eventually(lambda: machine.sessions().get("s1"), what="the session")
    assert (session["state"], session["withoutHooks"], session["pid"]) == ("working", True, client.pid)
    if mode == "redis":
        machine.end_publisher()  # by a kill: the monitor starts another one
    about["statusUpdatedAt"] += 2000
    registry_file(home, status="waiting", waitingFor="permission prompt", **about)
    eventually(lambda: machine.sessions()["s1"]["state"] == "waiting", what="the dialog")
    assert protocol_post(machine, type="delete_session", sessionId="s1")[0] == 200
    machine.emit(words := {"eventType": ee.WORDS, "sessionId": "s1", "data": {"text": "said"}})
    registry_file(home, status="busy", **{**about, "statusUpdatedAt": ee.now_ms()})
    time.sleep(1.5)  # a status that has changed is reported within 0.5 s
    assert "s1" not in machine.sessions(), "only what its hooks report brings it back"
    esc = {**words, "eventType": "client_status", "data": {"status": "interrupted"}}
    machine.emit(payload("UserPromptSubmit"), esc)
    assert machine.sessions()["s1"]["state"] == "idle", "what comes with it counts"
    registry_file(home, status="idle", **{**about, "statusUpdatedAt": ee.now_ms() + 1000})
    eventually(lambda: machine.sessions()["s1"]["pid"] == client.pid, what="the session that goes on")
    client.kill()
    eventually(lambda: machine.sessions()["s1"]["state"] == "ended", what="its end")


# ---- Agents: the hooks of other programs, from their recorded payloads to the states on the page -----------
# Recorded with the real programs: Codex 0.169, Gemini CLI 0.61, Copilot CLI 1.0.102, Qwen Code 0.24, Kimi Code 2.1.

AGENT_RECORDINGS = os.path.join(ROOT, ".ci", "recorded", "agents")
AGENT_LETTERS = {
    "idle": "i", "working": "w", "waiting permission": "P", "waiting question": "Q", "failed": "F", "ended": "e",
}  # fmt: skip
AGENT_NAMES = [path.split("agents/")[1][:-6] for path in glob.glob(f"{AGENT_RECORDINGS}/[!t]*/*.jsonl")]
# Recording → the states of its sessions, then calls, failed, interrupted and prompts of all.
AGENT_STATES = {name: row for name, *row in map(str.split, story_blocks("agents")[0])}


def agent_payloads(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in spool_read(f"{AGENT_RECORDINGS}/{name}.jsonl")]


def agent_event(name: str, number: int, hook: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded payload as an event: one a second."""
    at, agent = 1_700_000_000_000 + 1000 * number, name.partition("/")[0]
    about = {"id": f"{name} {number}", "timestamp": at, "machineId": "m", "agent": agent}
    return {"received": at, **ee.build_event({**about, "hook": hook}, at, "m")}


def agent_states(events: Iterable[dict[str, Any]]) -> tuple[cm.Sessions, dict[str, str]]:
    """Return (all sessions, the states of each as letters) after these events."""
    book, states = cm.Sessions(own_machine="m"), collections.defaultdict(str)
    for seq, event in enumerate(events, 1):
        session = book.to_json(book.apply({"seq": seq, **event}))
        kind = " " + session["reason"]["kind"] if session["state"] == "waiting" else ""
        letter = AGENT_LETTERS[session["state"] + kind]
        if session["sessionId"] in book.sessions and states[session["sessionId"]][-1:] != letter:
            states[session["sessionId"]] += letter
    return book, dict(states)


@pytest.mark.parametrize("name", sorted({*AGENT_NAMES, *AGENT_STATES}))
def test_a_recorded_agent_has_the_states_of_its_screen(name):
    states, counts = AGENT_STATES[name][:-4], AGENT_STATES[name][-4:]
    book, found = agent_states(agent_event(name, *it) for it in enumerate(agent_payloads(name)))
    assert list(found.values()) == states
    assert {session.agent for session in book.sessions.values()} == {name.partition("/")[0]}
    names = ("toolCalls", "toolErrors", "interrupted", "prompts")
    assert [str(sum(it.counts[each] for it in book.sessions.values())) for each in names] == counts


@pytest.mark.parametrize("row", story_blocks("agents")[1])
def test_a_recorded_agent_says_what_it_waits_for_and_who_works(row):
    name, number, expected = re.fullmatch(r"(\S+) (\d+) →(.*)", row).groups()
    given = agent_payloads(name)[: int(number) + 1]
    book = agent_states(agent_event(name, *it) for it in enumerate(given))[0]
    (session,) = book.each_json(with_hidden=True)
    words = " {kind} {tool}: {detail}".format_map(session["reason"]) if session["reason"] else ""
    assert words + "".join(f" | {it['label']}: {it['state']}" for it in session["agents"]) == expected


@story_table("tables.txt", "evidence", "agent, output, evidence")
def test_tokens_and_evidence_come_from_an_agents_transcript(tmp_path, agent, output, evidence):
    content = open(f"{AGENT_RECORDINGS}/transcripts/{agent}.jsonl", "rb").read()  # noqa: SIM115
    facts = itertools.chain.from_iterable(map(ee.TranscriptParser("", agent).facts_of, content.splitlines()))
    found = [it for it in facts if isinstance(it, dict)]
    assert [it["data"].get("status", it["eventType"]) for it in found] == evidence
    path = tmp_path / "events.jsonl"
    path.write_bytes(content)
    event = {"sessionId": "s", "agent": agent, "machineId": "m", "timestamp": NOW_MS}
    reader = ee.UsageReader(str(tmp_path))
    for _ in range(2):  # the second reading counts no message twice
        reader._delivered.clear()
        usage = reader.events({**event, "data": {"transcriptPath": str(path)}})[-1]["data"]["usage"]
        path.write_bytes(content + content)
        (counts,) = usage["models"].values()
        assert counts == {"input": 678, "output": output, "cacheRead": 333, "cacheCreation": 0}
    reader.close()
    live, grown = ee.UsageReader(f"{tmp_path}/live"), tmp_path / "grown.jsonl"
    look = {**event, "data": {"transcriptPath": str(grown)}, "states": {}}
    for number, line in enumerate(content.splitlines(keepends=True)):
        with open(grown, "ab") as file:
            file.write(line)
        live.deliver = (lambda _: 1 / 0) if number % 3 > 1 else lambda _: True
        found += live.events(look, is_end=number % 3 > 1)
    live.deliver = lambda _: True
    found += live.events(look)
    assert [it for it in found if it["eventType"] == "usage"][-1]["data"]["usage"] == usage
    live.close()


@pytest.mark.parametrize("number", [3, 4, 5])
def test_an_exit_code_after_the_result_marks_only_calls_of_codex_failed(number):
    events = [agent_event("codex/exec-fail", *it) for it in enumerate(agent_payloads("codex/exec-fail"))][:5]
    data = {"toolName": "Bash", "toolUseId": events[2]["data"]["toolUseId"], "exitCode": 3, "error": "bad"}
    late = {**events[number - 1], "id": "late", "hookType": "", "eventType": "tool_error", "data": data}
    late["timestamp"] = late["received"] = late["received"] + 500
    (session,) = agent_states([*events[:number], late, *events[number:]])[0].sessions.values()
    names = ("toolCalls", "toolErrors", "interrupted")
    assert (session.state, *map(session.counts.get, names)) == ("idle", 1, 1, 0)


@story_table("tables.txt", "programs", "hook, agent")
def test_a_payload_without_the_argument_proves_its_program(hook, agent):
    assert ee.build_event({"id": "1", "hook": hook}, 5, "m").get("agent") == agent


def test_the_hook_adds_the_program_of_its_argument(hook_alone, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["emit_event.py", "--agent", "gemini"])
    line = json.loads(ee.wrap(b'{"hook_event_name": "BeforeTool", "tool_name": "read_file"}', {}))
    event = ee.build_event(line, 5, "m")
    assert (event["agent"], event["hookType"], event["data"]["toolName"]) == ("gemini", "PreToolUse", "Read")


@story_table("tables.txt", "agents' files", "agent, name, before")
def test_install_and_uninstall_for_an_agent_change_only_our_entries(
    monitor, monkeypatch, tmp_path, agent, name, before
):
    monkeypatch.setenv("HOME", str(tmp_path))
    for about in ee.AGENTS.values():
        monkeypatch.delenv(about.variable or "NONE", raising=False)
    path = tmp_path / ee.AGENTS[agent].directory / name
    path.parent.mkdir(parents=True)
    if before:
        path.write_text(before)
    assert "+" in in_process(monitor, "install", "--dry-run", "--agent", agent).stdout
    assert not path.exists() or path.read_text() == before
    assert in_process(monitor, "install", "--agent", agent).returncode == 0
    installed = path.read_text()
    assert installed.count(f"--agent {agent} || :") == len(cm.PROGRAMS[agent].events.split())
    assert not before or "mine" in installed or '"theme": "x"' in installed
    in_process(monitor, "install", "--agent", agent)
    assert path.read_text() == installed
    assert f"of {agent} in {path}" in in_process(monitor, "doctor").stdout
    broken = tmp_path / (".gemini" if agent == "qwen" else ".qwen") / "settings.json"
    broken.parent.mkdir(exist_ok=True)
    broken.write_text("{,}")
    for command in ("install", "uninstall"):
        done = in_process(monitor, command, "--agent", "all")
        assert done.returncode == 1 and str(broken) in done.stderr and f"{path}: " in done.stdout
    left, parse = path.read_text() if path.exists() else "", json.loads if name.endswith(".json") else str
    assert parse(left or "{}") == parse(before or "{}")
    assert "the hook is not registered" in in_process(monitor, "uninstall", "--agent", agent).stdout


# What a `codex app-server` prints of the trust of our hooks, with a process that outlives it → what doctor says
CODEX = f"""#!{sys.executable}
import json, sys
calls = [json.loads(sys.stdin.readline()) for _ in range(3)]
print(json.dumps({{"id": 1, "result": {{}}}}), json.dumps({{"method": "news"}}), sep="\\n")
hooks = json.load(open("hooks.json"))["hooks"].values()
listed = [{{"sourcePath": sys.path[0] + "/hooks.json", "enabled": True, "trustStatus": "trusted",
          "command": groups[-1]["hooks"][0]["command"]}} for groups in hooks]
CHANGE
print(json.dumps({{"id": 2, "result": {{"data": [{{"hooks": listed}}]}}}}), flush=True)
assert calls[2]["method"] == "hooks/list" and sys.stdin.read() == ""
"""


@story_table("tables.txt", "trust", "change, level, words")
def test_doctor_says_whether_codex_trusts_the_hooks(monkeypatch, tmp_path, change, level, words):
    monkeypatch.setenv("CODEX_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    doctor = cm.Doctor(cm.Settings(str(tmp_path), "", "box", ee.load_config("", cm.KEYS)[0]), [])
    path = tmp_path / "hooks.json"
    path.write_text(cm.plan_install(str(tmp_path), "codex").new_text)
    assert [it.words for it in doctor._program("codex")] == [f"12 events of codex in {path}"]
    ee.write_atomically(f"{tmp_path}/codex", CODEX.replace("CHANGE", change).encode(), 0o700)
    monkeypatch.setattr(cm, "_in_time", functools.partial(ee.within, 2 if "sleep" in change else 60))
    (finding,) = doctor._program("codex")
    assert finding.level == level and words.format(path) in finding.words


def test_kimis_file_has_no_halves_of_surrogate_pairs():
    assert 'command = "/home/😀/x"' in cm.merge_toml("config.toml", "", "/home/😀/x", ["Stop"], {})


def test_hooks_that_are_one_list_in_kimis_file_are_refused(monitor, monkeypatch, tmp_path):
    monkeypatch.setenv("KIMI_CODE_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text("hooks = []\n")
    with pytest.raises(cm.CommandError, match="one list"):
        cm.plan_install(str(tmp_path), "kimi")


# ---- Notifications: what is due to whom; sent once, to servers that fail in every way ----------------------


class NoticeServer:
    """An HTTP server that receives notifications; `manners`: path → what it answers, one after the other.

    A manner is a status, "429 SECONDS" with Retry-After, "301 ADDRESS", or "slow", which never ends its answer.
    """

    def __init__(self, manners: dict[str, list[str]] | None = None, tls: Any = None) -> None:
        self.received: list[tuple[float, str, dict[str, str], str]] = []  # (time.time(), path, headers, body)
        outer, self.manners, self.ended = self, manners or {}, threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                headers = {name.lower(): it for name, it in self.headers.items()}
                outer.received.append((time.time(), self.path, headers, body))
                left = outer.manners.get(self.path) or ["200"]
                status, _, more = (left.pop(0) if len(left) > 1 else left[0]).partition(" ")
                while status == "slow" and not outer.ended.wait(0.1):
                    self.wfile.write(b"H")
                if status != "slow":
                    self.send_response(int(status))
                    self.send_header("Location" if status == "301" else "Retry-After", more)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(f"{tls.directory}/server.crt", f"{tls.directory}/server.key")
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.url = f"http{'s' * bool(tls)}://localhost:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def titles(self, path: str = "/topic") -> list[str]:
        """Return the titles that came on a path, with what ntfy shall replace."""
        found = [headers["title"] for _, came_to, headers, _ in self.received if came_to == path]
        return [base64.b64decode(it.split("?")[3]).decode() for it in found]

    def remove(self) -> None:
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()


def notice_target(**given: Any) -> cm.NotifyTarget:
    return cm.NotifyTarget(1, {"url": "http://127.0.0.1:9/topic", "afterSeconds": 0, **given})


def notice_of(kind: str = "permission", label: str = "shop", detail: str = "", since: int = 0) -> cm.Notice:
    return cm.Notice("k1", kind, "s1", label, "box", detail, since)


@pytest.mark.parametrize("line", story_blocks("notices")[1])
def test_a_target_that_cannot_be_used_is_refused_by_number_and_key(tmp_path, line):
    target, _, words = line.partition(" → ")
    path, given = tmp_path / "c.json", json.loads(target)
    path.write_text(json.dumps({"notify": [{"url": "https://ntfy.example/geheim"}, given]}))
    with pytest.raises(cm.ConfigError) as caught:
        cm.load_settings(str(path))
    assert f"{path}: notify: target 2: {words}" in str(caught.value) and "geheim" not in str(caught.value)


@pytest.mark.parametrize("line", story_blocks("notices")[0])
def test_each_kind_of_notice_comes_from_the_state_of_a_session(line: str) -> None:
    (steps, _, expected), story = line.partition(" →"), SessionStory()
    story.play(f"start startup; prompt; {steps}")
    found = cm.notices_of(story.book.sessions["s1"], None)
    assert "|".join(f"{it.kind} {it.detail}" for it in found) == expected.strip()
    assert len({it.key for it in found}) == len(found)
    again = cm.notices_of(session_restored(story.book).sessions["s1"], 91.2)
    assert again[: len(found)] == found, "the same after a restart"
    is_over = {"hide", "end"} & {*steps.split()}
    assert [it.detail for it in again[len(found) :]] == ([] if is_over else ["context 91 % full"])


COLLISION_STORIES = stories("collisions", " →")


@pytest.mark.parametrize("rule", COLLISION_STORIES)
def test_sessions_that_edit_the_same_file_collide(rule):
    ((steps, expected),) = COLLISION_STORIES[rule]
    story = SessionStory(cuts=frozenset(range(1, 9, 2)))
    for step in steps.split("; "):
        session, path, *rest = step.split(" ")
        if session in ("clear", "fork"):
            if session == "clear":
                story.deliver({**payload("SessionEnd", path, reason="clear"), "cwd": "/r"})
            story.deliver({**payload("SessionStart", *rest, source=session), "cwd": "/r"})
            if session == "fork":
                forked = {"eventType": "usage", "data": {"usage": {"origin": path}}}
                about = {"sessionId": rest[0], "timestamp": story.time}
                assert story.apply({**forked, **about})["continuedFrom"] == path
            continue
        given = dict(field.split("=") for field in rest[1:])
        story.time = NOW_MS + int(rest[0]) * 60_000
        story.machine, hook = given.pop("machine", SESSION_MACHINE), given.pop("hook", "PostToolUse")
        if root := given.pop("root", ""):
            git = {"branch": "main", "root": root, "project": given.pop("project", root)}
            start = {"eventType": "session_start", "hookType": "SessionStart", "data": {"git": git}}
            story.apply({**start, "sessionId": session, "timestamp": story.time})
        target = "*** Begin Patch\n*** Update File: x\n@@\n" if path == "PATCH" else path
        tool = {"tool_name": "Edit", "tool_input": {given.pop("key", "file_path"): target}}
        about = {"cwd": "/r", "tool_use_id": f"t{story.count}", **tool, **given}
        story.deliver(payload(hook, session, **about))
    shown = {name: story.now(name)["collisions"] for name in story.book.sessions}
    said = [f"{name}: {it['path']} with {it['sessionId']}" + (f"'s {it['agent']}" if "agent" in it else "")
            for name, found in sorted(shown.items()) for it in found]  # fmt: skip
    assert "; ".join(said) == expected
    assert all(it["time"] == story.time for found in shown.values() for it in found)
    notices = [it.kind for session in story.book.sessions.values() for it in cm.notices_of(session, None)]
    assert notices.count("collision") == bool(expected), "one message for both"


def test_a_process_with_older_figures_does_not_wait(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ee, "GAUGES_INTERVAL_S", 60.0)
    kept = str(tmp_path / "abcd")
    ee.write_atomically(kept + ".sent", b"")
    older = threading.Thread(target=ee.hand_on_gauges, args=(kept, b"figures 1", b"{}"), daemon=True)
    older.start()
    eventually(lambda: ee.read_small(kept) == b"figures 1")
    ee.write_atomically(kept, b"figures 2")
    older.join(30)
    assert not older.is_alive() and ee.read_small(kept) == b"figures 2"


def test_a_limit_that_is_nearly_reached_is_noticed_once_for_an_account() -> None:
    windows = {"fiveHour": {"percent": 80.0, "resetsAt": 5}, "sevenDay": {"percent": 79.9, "resetsAt": 9}}
    accounts = [{"machines": ["a", "b"], **windows}, {"machines": ["c"]}, {"machines": ["d"], **windows}]
    notice, other = cm.limit_notices(accounts, {"a": "laptop", "b": "box", "c": "here"})
    assert (notice.kind, notice.label, notice.detail) == ("limit", "account, 5 hours", "80 % used")
    assert (notice.machine, other.machine) == ("box, laptop", "another machine") and notice.key != other.key


def test_a_message_is_due_once_after_its_delay_and_its_end_once() -> None:
    target = notice_target(afterSeconds=30, quietHours="22:00-07:00", when=["permission"])
    other = cm.NotifyTarget(2, {"url": "http://b", "format": "json", "afterSeconds": 0, "unlessSeen": False})
    book, day, night, at = cm.NoticeBook([target, other], {}), "12:00", "23:00", NOW_MS

    def due(after_s: float, clock: str = day, is_seen: bool = False) -> list[tuple[int, bool]]:
        found = book.due(at + int(after_s * 1000), clock, is_seen)
        return [([target, other].index(it.target), it.over) for it in found if not book.record(it) or True]

    book.update("s1", [notice_of(since=at)], at)
    assert due(0.9) == [] and due(1) == [(1, False)] and due(29.9) == []
    assert due(31, night) == due(31, is_seen=True) == [], "quiet hours, and a page that someone sees"
    assert due(31) == [(0, False)] and due(3000) == []
    book.update("s1", [], at)
    assert due(3001, night) == [(0, True)], "only ntfy can replace a message"
    book = cm.NoticeBook([target, other], {})
    book.update("s1", [notice_of("dialog", since=at)], at)
    assert due(60) == [(1, False)], "kinds that were not asked for"
    book.update("s2", [notice_of(since=at - cm.NOTICE_AGE_MS - 1)._replace(key="k2")], at)
    book.update("s3", [notice_of("ended", since=at - cm.NOTICE_QUEUE_MS - 1)._replace(key="k3")], at)
    assert due(100) == [], "too old to be news"


def test_the_request_of_a_hook_continues_the_wait_that_the_client_reported() -> None:
    story, found = SessionStory(pid=7), []
    begin = "start startup; prompt; call t1 Bash make; shows busy; shows waiting"
    for steps in (begin, "wait 15s; ask Bash make"):
        story.play(steps)
        found += cm.notices_of(story.book.sessions["s1"], None)
    assert [it.kind for it in found] == ["dialog", "permission"] and found[0].key == found[1].key


def test_a_long_turn_is_noticed_once_however_often_it_asks() -> None:
    story, book, ended = SessionStory(), cm.NoticeBook([notice_target(when=["stuck"])], {}), []
    asks = ["call t1 Bash ls; ask Bash ls", "result t1", "call t2 Bash rm; ask Bash rm", "result t2"]
    for steps in ("prompt; wait 7300s", *asks, "stop"):
        story.play(steps)
        book.update("s1", cm.notices_of(story.book.sessions["s1"], None), story.time)
        for message in book.due(story.time + 1000, "12:00", False):
            ended.append(message.over or book.record(message))
    assert ended == [None, True]


@pytest.mark.parametrize("form", ["ntfy", "slack", "json", "command"])
def test_a_message_has_no_control_characters_secrets_or_markup(form: str, tmp_path: Any) -> None:
    hostile = "--help\x1b[31m\r\nX: y\u202e<!channel> @here [a](http://b) & AKIAIOSFODNN7EXAMPLE"
    path, notice = tmp_path / "out", notice_of(label=hostile, detail=f"Bash: {hostile}")
    script = ["sh", "-c", 'printf "%s|%s" "$1" "$2" > "$0"', str(path), "{title}", "{text}"]
    given = {"command": script} if form == "command" else {"url": "http://u:p%40@a/b#c", "format": form}
    for content in (False, True):
        target = cm.NotifyTarget(1, {**given, "content": content, "link": "https://m.example/x/"})
        message = cm.Delivery(target, notice, False, 0)
        if form == "command":
            assert cm.attempt(message)[:2] == (True, "ended with status 0")
            whole = path.read_text()
        else:
            url, body, headers = cm.http_request(message)
            assert (url, headers["Authorization"]) == ("http://a/b", "Basic dTpwQA==")
            whole = body.decode()
            assert headers.get("Click", "https://m.example/x/#s=s1") == "https://m.example/x/#s=s1"
            if form == "ntfy":
                whole = base64.b64decode(headers["Title"].split("?")[3]).decode() + "|" + whole
            else:
                body = json.loads(whole)
                assert "https://m.example/x/#s=s1" in (body.get("link") or body["text"])
                whole = body.get("title", "") + body["text"].replace("\n", "")
        markup = {"slack": r"<|@here|\]\(", "command": "<"}.get(form, r"\x00")
        assert not re.search(markup, whole)
        whole = whole.replace("\u200b", "") if form == "slack" else whole
        assert whole.isprintable() and whole.startswith("Needs your permission: ") and "AKIA" not in whole
        assert ("Bash" in whole) is content


@story_table("tables.txt", "servers", "manner, words, pause_s")
def test_every_failure_of_a_server_has_its_outcome(make, monkeypatch, manner, words, pause_s):
    monkeypatch.setattr(cm, "NOTICE_DEADLINE_S", 0.5 if manner == "slow" else 10.0)
    certificates = make(RedisCertificates) if "certificate" in manner else None
    manners = {} if certificates else {"/topic": [manner if manner[0].isdigit() else manner[:4]]}
    server = make(NoticeServer, manners, certificates)
    if manner == "right certificate":
        monkeypatch.setenv("SSL_CERT_FILE", f"{certificates.directory}/ca.crt")
    url = {"refused": "http://127.0.0.1:1", "gone.invalid": "http://gone.invalid"}.get(manner, server.url)
    delivery = cm.Delivery(notice_target(url=f"{url}/topic"), notice_of(), False, 0)
    is_sent, outcome, pause = cm.attempt(delivery)
    assert is_sent is ("answered 20" in outcome) and words in outcome and "topic" not in outcome
    assert pause == pause_s
    assert len(server.received) == (url == server.url and manner != "wrong certificate")


def test_a_message_is_tried_three_times_while_other_targets_are_served(make, monkeypatch, tmp_path):
    monkeypatch.setattr(cm, "NOTICE_PAUSES_S", (0.1, 0.2))
    server = make(NoticeServer, {"/topic": ["500"], "/late": ["500", "200"]})
    targets = [notice_target(url=f"{server.url}/{path}") for path in ("topic", "late")]
    calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
    damaged = {"k1": 1, "k2": {}, "k3": {"to": 1, "notice": []}, "k4": {"to": [], "notice": [1]}}
    (tmp_path / "n").write_text(json.dumps({"sent": damaged}))
    notifier = cm.Notifier(targets, str(tmp_path / "n"), types.SimpleNamespace(call_soon=calls.put))  # type: ignore[arg-type]

    def look(*notices: cm.Notice) -> list[str]:
        with contextlib.suppress(queue.Empty):
            calls.get(timeout=0.02)()
        notifier.look({"s1": list(notices)}, is_seen=False)
        return [path for _, path, _, _ in server.received]

    first = notice_of(since=cm.now_ms() - 5000)
    eventually(lambda: sorted(look(first)) == ["/late"] * 2 + ["/topic"] * 3, what="three attempts")
    for number in range(50):
        assert len(look(first)) == 5, number
    eventually(lambda: look()[5:] == ["/late"], what="the end, where it was sent")
    notifier.close()
    assert json.loads((tmp_path / "n").read_text()) == {"sent": {}}


def test_sixty_waits_are_sent_once_also_over_restarts_and_failures(make, monitor):
    server = make(NoticeServer, {"/topic": ["429 1", "200"], "/dead": ["500"]})
    secret = f"{server.url}/topic"
    dead, target = ({"url": it, "afterSeconds": 1} for it in (f"{server.url}/dead", secret))
    monitor.serve(notify=[dead, {**target, "content": True}])
    waits = [hooks(f"prompt Work on {it}; call make; ask make", it) for it in map("s{}".format, range(61))]
    monitor.emit(*itertools.chain(*waits[:60]))
    eventually(lambda: len(server.titles()) > 20, 30, "the first messages")
    monitor.stop()
    monitor.serve()
    expected = {f"Needs your permission: Work on s{number}" for number in range(60)}
    eventually(lambda: set(server.titles()) == expected, 30, "a message for each session")
    eventually(lambda: monitor.get("/api/status")["notify"][0]["ok"] is False, what="the failing target")
    status = monitor.get("/api/status")
    monitor.kill()
    monitor.serve()
    monitor.emit(*waits[60], *hooks("result make", "s7"))
    over = "Over: needs your permission: Work on s7"
    titles = {over, "Needs your permission: Work on s60"}
    eventually(lambda: titles <= set(server.titles()), 30, "the end of a wait")
    counts = collections.Counter(server.titles())
    assert counts[over] == 1 and sorted(counts.values())[-2:] == [1, 2], "one was tried again"
    sequences = {headers["x-sequence-id"] for _, path, headers, _ in server.received if path == "/topic"}
    assert len(sequences) == 61
    bodies = {body for _, path, _, body in server.received[:60] if path == "/topic"}
    assert bodies == {"On testbox: Bash: make"}
    assert status["notify"][0]["words"].startswith("answered 500")
    assert any(it["kind"] == "notify" and "target 1 (ntfy)" in it["words"] for it in status["problems"])
    done = in_process(monitor, "notify-test")
    assert done.returncode == 1 and "ok   target 2 (ntfy): answered 200" in done.stdout
    shown = [in_process(monitor, it).stdout for it in ("status", "doctor", "config", "export")]
    assert all("target 1 (ntfy): answered 500" in it for it in shown[:2])
    log = pathlib.Path(monitor.home, "monitor.log").read_text()
    answers = (json.dumps(monitor.get(f"/api/{it}")) for it in ("config", "status"))
    places = [*shown, done.stdout, log, *answers]
    assert "target 2 (ntfy)" in log and not [it for it in places if secret[-12:] in it or "/topic" in it]


# ---- Processes: the installed hook, the monitor, the command line, kills and bad days ----------------------

# Runs the hook for each payload on its standard input, in a process of its own that need not start an interpreter;
# answers each with what that hook said.
HOOKS_IN_A_ROW = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import emit_event
emit_event.ACKNOWLEDGEMENT_DEADLINE_S = float(sys.argv[2])
for line in sys.stdin.buffer:
    (reader, writer), (errors, said) = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(reader, 0), os.dup2(said, 2)
        os.close(writer)
        emit_event.run_hook()
    os.close(reader), os.close(said)
    os.write(writer, line)
    os.close(writer)
    with open(errors, encoding="utf-8") as file:
        words = file.read()
    print(json.dumps([os.waitpid(pid, 0)[1], words]), flush=True)
"""


@contextlib.contextmanager
def hooks_in_a_row(environment: dict[str, str], deadline_s: float | None = None) -> Iterator[Any]:
    """Give a function that calls the hook for one event, and returns what it said to one who debugs."""
    command = [sys.executable, "-c", HOOKS_IN_A_ROW, ROOT, str(deadline_s or ee.ACKNOWLEDGEMENT_DEADLINE_S)]
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    environment = {**environment, "CONTEXTUATE_DEBUG": "1"}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as hooks:

        def call(event: dict[str, Any]) -> str:
            print(json.dumps(event), file=hooks.stdin, flush=True)
            status, words = json.loads(hooks.stdout.readline())
            assert status == 0
            return str(words)

        yield call


def test_recorded_sessions_are_shown_stored_and_served_as_sent(running: RunningMonitor) -> None:
    client = running.websocket("full")
    sent = [one for name in recording_names() for one in recorded(name)]
    assert len(sent) > 390
    with hooks_in_a_row(running.environment, deadline_s=20) as call:
        for one in sent:
            assert "has stored" in call(one)
    shown, stored = client.events(len(sent)), running.stored_events()
    assert shown == stored and len({event["id"] for event in stored}) == len(sent)
    for event, original in zip(stored, sent):  # what a payload becomes is tested in its room
        made = ee.build_event(original, event["timestamp"], "testbox")
        assert {**event, "id": ""} == {**event, **made, "id": ""}
        assert abs(event["timestamp"] - time.time() * 1000) < 300_000
    assert [event["seq"] for event in stored] == sorted({event["seq"] for event in stored})
    by_session = collections.Counter(original["session_id"] for original in sent)
    sessions = running.sessions()
    assert {name: session["counts"]["events"] for name, session in sessions.items()} == by_session
    for name, count in by_session.items():
        page = running.get(f"/api/sessions/{name}/events?limit=1000")
        assert page["more"] is False and len(page["events"]) == count
        assert page["events"] == [event for event in stored if event["sessionId"] == name]
    assert not glob.glob(running.home + "/spool/*.jsonl")
    assert not os.path.exists(running.home + "/quarantine.log")
    running.kill()
    running.serve()
    assert running.sessions() == sessions, "a restart changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rounds"), [("KILL", 20), ("TERM", 4), ("INT", 4), ("HUP", 4)])
def test_no_signal_at_any_moment_loses_or_doubles_an_event(monitor, name, rounds):
    """Also while what is stored is loaded."""
    running, history = monitor, {*write_history(monitor.home + "/events", 12, 1000, cm.now_ms(), pids=False)}
    running.serve()
    permitted = threading.Semaphore(0)  # hooks that may still be called
    stopping = threading.Event()
    outcomes: dict[str, bool] = {}  # marker → whether the hook got its acknowledgement

    def emit(worker: int) -> None:
        with hooks_in_a_row(running.environment) as call:
            for count in itertools.count():
                permitted.acquire()
                if stopping.is_set():
                    return
                marker = f"{worker}-{count}"
                words = call(payload("UserPromptSubmit", f"w{worker}", prompt=marker))
                assert ("has stored" in words) != ("kept in the spool" in words), words
                outcomes[marker] = "has stored" in words

    def more_outcomes(count: int, spare: int) -> None:
        enough = len(outcomes) + count
        permitted.release(count + spare)
        eventually(lambda: len(outcomes) >= enough, 60)

    dice = random.Random(name)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(emit, worker) for worker in range(4)]
        try:
            for number in range(rounds):
                more_outcomes(dice.randrange(20, 100), 50)  # the spare ones find a monitor that dies, or none
                acknowledged = {marker for marker, stored in outcomes.copy().items() if stored}
                pid = running.pid
                os.kill(pid, signal.Signals[f"SIG{name}"])
                if name != "HUP":
                    eventually(lambda pid=pid: not alive(pid), 30, "its end")
                    torn_allowed = running.stored_events_allowing_a_torn_line()
                    assert acknowledged <= {event["data"].get("message") for event in torn_allowed}
                    more_outcomes(5, 0)
                    running.serve()
                if name == "KILL" and number % 5 == 4:
                    running.kill()
                    running.serve()
        finally:
            stopping.set()
            permitted.release(4)
        for worker in workers:
            worker.result()
    eventually(lambda: not ee.spool_segments(running.home + "/spool"), 30, "an empty spool")
    stored = running.stored_events()
    said = [event["data"]["message"] for event in stored if event["sessionId"] not in history]
    assert sorted(said) == sorted(outcomes)
    assert len({event["seq"] for event in stored}) == len(stored)
    sessions = [session for name, session in running.sessions().items() if name not in history]
    assert sum(session["counts"]["prompts"] for session in sessions) == len(outcomes)
    assert len(outcomes) > 20 * rounds and sum(outcomes.values()) > rounds
    assert name == "HUP" or not all(outcomes.values())


@pytest.mark.slow
def test_hundreds_of_hooks_at_a_paused_monitor_lose_nothing(running):
    command = shlex.split(running.installed_command())[:4]
    os.kill(running.pid, signal.SIGSTOP)
    hooks = []
    for number in range(300):
        hooks.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=running.environment))
        hooks[-1].stdin.write(json.dumps(payload("UserPromptSubmit", prompt=str(number))).encode() + b"\n")
        hooks[-1].stdin.close()
        if number == 250:  # the last ones meet a monitor that is busy with those before
            os.kill(running.pid, signal.SIGCONT)
    assert [hook.wait(60) for hook in hooks] == [0] * 300
    eventually(lambda: len(running.stored_events_allowing_a_torn_line()) >= 300, 60, "all events")
    assert safe_stored(running) == list(range(300))


BAD_LINES = {  # no JSON object: quarantined
    "noise": os.urandom(5000).replace(b"\n", b""), "no utf-8": b"\xff\xfe\x00", "text": b"not json at all",
    "a list": b"[1, 2, 3]", "a string": b'"a string"', "NUL": b"nul" + b"\0" * 100,
    "a deep list": b"[" * 100_000 + b"]" * 100_000, "a deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "half a hook": b'{"hook":' + b"[" * 3000, "too long": b"x" * (20 << 20),
}  # fmt: skip

ODD_LINES = [line.encode("latin-1") for line in story_parts("tables.txt")["odd lines"]]


def test_bad_input_never_stops_the_stream_of_others(running: RunningMonitor) -> None:
    steady, drip, silent = (running.connect() for _ in range(3))
    drip.sendall(b'{"hook_event_na')  # and then a byte at a time
    lines = (*BAD_LINES.values(), *ODD_LINES)
    for number, line in enumerate(lines):
        with running.connect() as sock:
            sock.sendall(line + b"\n")
            assert sock.recv(10) == ee.ACKNOWLEDGEMENT or line == BAD_LINES["too long"], line[:200]
        steady.sendall(json.dumps(payload("PreToolUse", "steady", tool_use_id=str(number))).encode() + b"\n")
        assert steady.recv(10) == ee.ACKNOWLEDGEMENT
        drip.sendall(b"x")
    status, before = running.get("/api/status"), running.counts()
    assert status["events"]["quarantined"] == len(BAD_LINES) and status["store"]["ok"] is True
    assert status["events"]["received"] == 2 * len(lines) and status["events"]["duplicates"] == 0
    assert before["steady"]["events"] == len(lines)
    assert len(running.stored_events()) == len(lines) + len(ODD_LINES)
    kept = [json.loads(line) for line in install_text(running.home + "/quarantine.log").splitlines()]
    assert len(kept) == len(BAD_LINES) and any("longer than" in record["reason"] for record in kept)
    assert "Traceback" not in install_text(running.home + "/monitor.log")
    for sock in (steady, drip, silent):
        sock.close()
    running.kill()
    running.serve()
    assert running.counts() == before


def test_events_of_one_connection_are_each_stored_once(running: RunningMonitor) -> None:
    events = [{"id": f"n{n}", "eventType": "message", "sessionId": "many", "data": {}} for n in range(500)]
    running.emit(*events, events[0])
    with running.connect() as sock:
        sock.sendall(json.dumps(payload("Stop")).encode())  # without a newline
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(10) == ee.ACKNOWLEDGEMENT
    running.kill()
    running.serve().sessions()  # then the ids of stored events are known
    running.emit(events[0])
    assert len(running.stored_events()) == 501
    assert running.get("/api/status")["events"]["duplicates"] == 1


@needs_root
@pytest.mark.parametrize("mode", ["local", "redis"])
def test_a_full_event_disk_loses_nothing_and_heals_by_itself(make: Any, mode: str) -> None:
    monitor = make(RedisMachine, config=make(RedisServer).settings() if mode == "redis" else {})
    os.mkdir(monitor.home + "/events", 0o700)
    with safe_disk(monitor, "1m", "/events") as remount:
        monitor.serve()
        with hooks_in_a_row(monitor.environment) as call:
            for number in range(30):
                call(payload("UserPromptSubmit", prompt=str(number), pad="x" * 50_000))
        status = eventually(lambda: (s := monitor.get("/api/status"))["store"]["error"] and s)
        assert status["store"]["ok"] is False
        assert "No space left" in status["store"]["error"] or "could be written" in status["store"]["error"]
        assert status["spool"]["bytes"] > 0 if mode == "local" else status["redis"]["state"] == "connected"
        assert 0 < len(safe_stored(monitor)) < 30  # every line of the files is whole
        remount("size=64m")
        whole = monitor.stored_events_allowing_a_torn_line  # one may just be written
        eventually(lambda: len(whole()) == 30, 30, "the rest out of the spool")
        assert safe_stored(monitor) == list(range(30))
        eventually(lambda: monitor.get("/api/status")["store"]["ok"])


@pytest.mark.slow
def test_only_one_of_many_simultaneous_starts_runs(monitor: RunningMonitor) -> None:
    with multiprocessing.get_context("fork").Pool(16) as pool:
        starts = pool.starmap(in_process, [(monitor, "start", "--no-open")] * 16, 1)
    assert any(start.returncode == 0 for start in starts)
    assert all(start.returncode == 0 or "another monitor" in start.stderr for start in starts)
    eventually(lambda: processes_of(monitor.home, b"--detached") == [monitor.know().pid], 60)  # others exit


def processes_of(home: str, argument: bytes) -> list[int]:
    found, variable = [], f"CONTEXTUATE_HOME={home}".encode()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        about = f"/proc/{pid}/"
        with contextlib.suppress(OSError):
            command, environment = (pathlib.Path(about + it).read_bytes() for it in ("cmdline", "environ"))
            if argument in command.split(b"\0") and variable in environment.split(b"\0"):
                found.append(int(pid))
    return found


def test_a_start_that_hangs_is_reported_after_a_deadline(monitor, monkeypatch, tmp_path):
    python = tmp_path / "python"
    ee.write_atomically(str(python), b"#!/bin/sh\nexec sleep 60\n", 0o700)
    monkeypatch.setattr(cm.sys, "executable", str(python))
    monkeypatch.setattr(cm, "START_DEADLINE_S", 0.5)
    with pytest.raises(cm.CommandError) as caught:
        cm.start_in_background(cm.Settings(monitor.home, "", "", {}))
    pid = int(re.search(r"process (\d+).*monitor\.log", str(caught.value))[1])
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_live_socket_or_port_is_never_taken_over_a_dead_socket_is(running, make):
    other = make(RedisMachine)
    assert "command line: server.port: expected" in in_process(other, "start", "--port", "70000").stderr
    by_option = in_process(other, "start", "--no-open", "--port", str(running.port))
    other.write_config({"server": {"port": running.port}})
    for refused in (by_option, in_process(other, "start", "--no-open")):
        assert refused.returncode == 1 and "--port" in refused.stderr
        assert f"port {running.port} is in use" in refused.stderr
    other.config = {"socketPath": running.socket_path}
    other.write_config({})
    assert f"it uses {running.socket_path} (pid {running.pid}); `kill" in in_process(other, "doctor").stdout
    for _ in range(2):
        refused = in_process(other, "start", "--no-open")
        assert refused.returncode == 1 and running.socket_path in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        os.unlink(running.socket_path + ".lock")  # its socket is enough
    running.emit(payload("Stop"))
    running.kill()
    assert os.path.exists(running.socket_path)
    other.socket_path = running.socket_path
    other.serve().emit(payload("Stop"))
    assert stat.S_IMODE(os.stat(running.socket_path).st_mode) == 0o600


@story_table("tables.txt", "lost files", "commands")
def test_a_lost_file_of_a_running_monitor_comes_back(running, commands):
    subprocess.run(["sh", "-ec", commands], cwd=running.home, check=True)
    back = [running.home + name for name in ("/monitor.pid", "/monitor.run.json", "/monitor.log")]
    eventually(lambda: all(map(os.path.exists, [running.socket_path, *back])))
    running.emit(payload("Stop"))
    assert cm.lock_holder(running.home + "/monitor.pid") is not None
    running.write_config({})
    eventually(lambda: in_process(running, "status").returncode == 0)
    assert "Traceback" not in install_text(running.home + "/monitor.log")
    assert ee.machine_key(running.home) == running.sessions()["s1"]["machineKey"]


@pytest.fixture
def client() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([PYTHON, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def test_a_killed_client_ends_its_session_also_while_no_monitor_runs(running, client):
    session_id, path = recorded("i-sigKILL")[0]["session_id"], running.home + "/t.jsonl"
    about = {"timestamp": cm.now_ms(), "pid": client.pid, "machineId": "testbox"}
    for number, one in enumerate(recorded("i-sigKILL")):
        running.emit({"hook": {**one, "transcript_path": path}, "id": f"k{number}", **about})
    with subprocess.Popen([PYTHON, "-c", "import signal; signal.pause()"]) as second:
        line = json.dumps(payload("UserPromptSubmit", "gone", prompt="go")).encode()
        run_hook(running.installed_command(), line, {**running.environment, "CLAUDE_PID": str(second.pid)})
        sessions = eventually(lambda: "gone" in (it := running.sessions()) and it)
        assert [sessions[name]["state"] for name in (session_id, "gone")] == ["working"] * 2
        assert sessions[session_id]["pid"] == client.pid
        pathlib.Path(path).write_text(usage_entries("a 3/4", session_id))
        client.kill()
        client.wait()
        session = eventually(lambda: (s := running.sessions()[session_id])["state"] == "ended" and s)
        assert (session["reason"]["detail"], session["openCalls"]) == ("its process exited", [])
        used = eventually(lambda: running.sessions()[session_id]["tokenUsage"])
        assert (used["totalInput"], used["totalOutput"]) == (3, 4)
        running.kill()
        killed_ms = cm.now_ms()
        second.kill()
    eventually(lambda: cm.now_ms() > killed_ms + 200)  # so that its end would differ
    again = running.serve().sessions()
    assert (again[session_id]["state"], again["gone"]["state"]) == ("ended", "ended")
    assert again["gone"]["reason"]["detail"] == "its process exited"
    ended_ms = again["gone"]["endTime"]
    assert sessions["gone"]["lastEventTime"] <= ended_ms == again["gone"]["stateSince"] <= killed_ms


def test_a_process_ends_and_a_later_one_does_not_count_for_an_earlier_time(client: Any) -> None:
    assert cm.ran_at(client.pid, ee.now_ms())
    assert sys.platform != "linux" or not cm.ran_at(client.pid, ee.now_ms() - 3_600_000)
    client.kill()  # its parent has not waited for it: it is a zombie
    eventually(lambda: not cm.ran_at(client.pid, ee.now_ms()))
    client.wait()
    assert not cm.ran_at(client.pid, ee.now_ms())


def test_the_short_status_is_the_same_by_file_and_by_module(monitor: RunningMonitor) -> None:
    def short(is_fast: bool = True) -> tuple[str, int]:
        """Return what both forms print, and their exit status; if `is_fast`, without other imports."""
        forms = [f"{ROOT}/contextuate_monitor.py"], ["-X", "importtime", "-m", "contextuate_monitor"]
        options: Any = {"cwd": ROOT, "env": monitor.environment, "capture_output": True, "text": True}
        done = [subprocess.run([sys.executable, *it, "status", "--short"], **options) for it in forms]
        assert ("argparse" not in done[1].stderr) is is_fast
        ((said, status),) = {(it.stdout, it.returncode) for it in done}
        return said, status

    assert short(is_fast=False) == ("not running\n", 1)
    monitor.serve().emit(*hooks("@short prompt Hello"))
    place = pathlib.Path(monitor.home, "short")
    eventually(lambda: place.exists() and place.read_text() == "1 working\n")
    assert short() == ("1 working\n", 0)
    monitor.kill()  # leaves the line behind
    assert place.exists() and short() == ("not running\n", 1)


def test_a_lock_waits_for_a_check_and_is_refused_or_made_again(tmp_path, monkeypatch):
    path = str(tmp_path / "monitor.pid")

    def lock(during_the_wait: Any) -> int:
        monkeypatch.setattr(cm.time, "sleep", during_the_wait)
        return cm.lock_file(path, lambda: "another monitor runs")

    with open(path, "wb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as running_monitor does, for a moment
        holder = lock(lambda _: fcntl.flock(looker, fcntl.LOCK_UN))
    with pytest.raises(cm.CommandError, match="another monitor runs"):
        lock(lambda _: None)
    second = lock(lambda _: cm.unlock_file(path, holder))  # which removes it
    assert cm.lock_holder(path) == os.getpid()
    assert os.path.samestat(os.stat(path), os.fstat(second)), "not the one that is gone"
    cm.unlock_file(path, second)
    assert not os.path.exists(path)


def test_stop_without_a_token_closes_clients_and_removes_socket_and_lock(monitor, tmp_path):
    lock, client = monitor.socket_path + ".lock", monitor.serve().websocket("rows")
    assert cm.lock_holder(lock) == monitor.pid
    refused = in_process(RunningMonitor(str(tmp_path), {"socketPath": monitor.socket_path}), "stop")
    assert refused.returncode == 1 and f"`kill {monitor.pid}` ends it" in refused.stderr
    os.unlink(monitor.home + "/token")
    os.mkdir(monitor.home + "/token")  # so that the signal is what ends it
    assert f"stopped (pid {monitor.pid})" in in_process(monitor, "stop").stdout
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        while True:
            client.connection.recv(timeout=10)
    assert closed.value.rcvd and closed.value.rcvd.code == 1001
    assert not os.path.exists(lock) and not os.path.exists(monitor.socket_path)


def test_a_unique_beginning_of_a_session_id_is_enough(running: RunningMonitor) -> None:
    names = ("ab", "ac", "ac-4711")
    running.emit(*(payload("UserPromptSubmit", f"{name}-4711", prompt=f"of {name}") for name in names))
    eventually(lambda: "of ab" in in_process(running, "search", "--session", "ab").stdout)
    for whole in ("ab", "ac-4711"):  # the second is also the beginning of another
        assert in_process(running, "export", "--session", whole).stdout.count("\n") == 1
    refused = in_process(running, "export", "--session", "a")
    assert refused.returncode == 1 and "ac-4711, ac-4711-4711; give more of the id" in refused.stderr


@story_table("tables.txt", "commands", "command, status, words")
def test_a_command_that_cannot_run_says_why_in_one_line(monitor, command, status, words):
    refused = in_process(monitor, *command.replace("\\xff", "\udcff").split())
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (status, "", 1)
    assert refused.stderr.startswith("contextuate: error: ") and words in refused.stderr


@pytest.mark.parametrize("content, word", [(None, "missing"), ("", "of another version")])
def test_a_missing_or_older_second_file_is_named(monitor, tmp_path, content, word):
    shutil.copy(monitor.program, tmp_path)
    if content is not None:
        (tmp_path / "emit_event.py").write_text(content)
    monitor.program = str(tmp_path / "contextuate_monitor.py")
    refused = monitor.command("status", check=False)
    words = f"contextuate: emit_event.py is {word}: copy it into the folder of contextuate_monitor.py\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", words)


def test_start_status_url_test_event_restart_stop(monitor, monkeypatch) -> None:
    def status() -> dict[str, Any]:
        return json.loads(in_process(monitor, "status", "--json").stdout)

    for command, word in (("status", ""), ("url", "start"), ("test-event", "spool")):
        refused = in_process(monitor, command)
        assert refused.returncode == 1 and word in refused.stderr
    started = in_process(monitor, "start", "--no-open", "--port", str(redis_free_port())).stdout
    address = re.search(r"http://localhost:\d+/", started)
    assert address and "install" in started
    assert "already running" in in_process(monitor, "start", "--no-open").stdout
    assert "running" in in_process(monitor, "status").stdout and status()["running"] is True
    assert in_process(monitor, "url").stdout.strip() == address.group()
    with_token = in_process(monitor, "url", "--token").stdout
    assert re.fullmatch(r"http://localhost:\d+/\?token=[\w-]{32}\n", with_token)
    eventually(lambda: "has stored" in in_process(monitor, "test-event").stdout)
    assert {event["hookType"] for event in monitor.stored_events()} == {"Notification"}
    path = pathlib.Path(monitor.home + "/monitor.run.json")
    path.write_text((about := path.read_text()).replace(cm.__version__, "0.1.0"))  # new files were copied
    for command, words in (("start", ", this is"), ("status", "; run: "), ("doctor", "; run: ")):
        answered = in_process(monitor, command)
        assert f"version 0.1.0{words}" in answered.stdout + answered.stderr
    path.write_text(about)
    before = status()["pid"]
    monkeypatch.chdir(os.path.dirname(monitor.home))
    relative = RunningMonitor(os.path.basename(monitor.home), {"socketPath": monitor.socket_path})
    in_process(relative, "restart", "--no-open")
    assert status()["pid"] != before and in_process(monitor, "url").stdout.strip() == address.group()
    broken = pathlib.Path(monitor.home + "/broken.json")
    broken.write_text('{"mode": "cloud"}')
    assert "mode: expected" in in_process(monitor, "restart", "--config", str(broken)).stderr
    broken.rename(monitor.home + "/monitor.config.json")  # which has stopped nothing
    stopped = in_process(monitor, "stop")
    assert "stopped" in stopped.stdout and "mode: expected" in stopped.stderr
    assert "not running" in in_process(monitor, "stop").stdout
    assert "hook is not registered" in in_process(monitor, "uninstall").stdout
    assert not os.path.exists(monitor.socket_path)


@contextlib.contextmanager
def tailing(monitor: RunningMonitor, *options: str) -> Iterator[Any]:
    """Run `tail`, and give a function that returns its next line, without those of the session "chosen-r"."""
    command = [sys.executable, "-m", "contextuate_monitor", "tail", *options]
    about = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=monitor.environment, **about) as tail:
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in tail.stdout or ()], daemon=True).start()

        def next_line() -> str:
            line = lines.get(timeout=20)
            return next_line() if "chosen-r" in line else line

        def has_begun() -> bool:
            monitor.emit(payload("PermissionRequest", "chosen-r"))
            return not lines.empty()

        try:
            eventually(has_begun)
            yield next_line
            tail.send_signal(signal.SIGINT)
            assert tail.wait(10) == 130
        finally:
            tail.kill()


def test_tail_prints_new_events_and_waits_for_a_restarted_monitor(running: RunningMonitor) -> None:
    running.emit(payload("Stop", "before"))
    with tailing(running, "--json") as line, tailing(running, "--type", "PermissionRequest") as plain:
        waiting = recorded("i-perm")[:5]
        running.emit(*waiting)
        stored = [one for one in running.stored_events() if one["sessionId"] == waiting[0]["session_id"]]
        assert [json.loads(line()) for _ in waiting] == stored
        words = plain()
        assert "PermissionRequest" in words and "touch" in words and "\x1b" not in words
        running.stop()
        hook_call(running.installed_command(), payload("Stop", "away"), running.environment)
        running.serve()
        assert "waiting for the monitor" in line()
        assert json.loads(line())["sessionId"] == "away"
    with tailing(running, "--session", "chosen") as line:
        running.emit(*(payload("Stop", f"{name}-1") for _ in range(1200) for name in ("chosen", "x")))
        assert all("chosen-" in line() for _ in range(1200))
    with tailing(running, "--session", "none") as line:
        assert "no session begins with 'none'; waiting for one" in line()


def test_sessions_and_export_print_what_the_page_shows(running: RunningMonitor) -> None:
    def printed(*command: str) -> list[str]:
        return in_process(running, *command).stdout.splitlines()

    running.emit(*recorded("i-perm")[:5])
    words = in_process(running, "sessions").stdout
    assert re.match(r"waiting +\d \w  3e0ddc52  ", words) and "permission" in words
    as_json = json.loads(in_process(running, "sessions", "--json", "--all").stdout)
    assert as_json == list(running.sessions().values())
    exported, target = printed("export"), running.home + "/out.ndjson"
    assert [json.loads(line) for line in exported] == running.stored_events()
    assert printed("export", "--state", "waiting") == exported
    for options, (code, words) in story_cases("tables.txt", "empty exports").items():
        done = in_process(running, "export", *options.split())
        assert (done.returncode, done.stdout, words in done.stderr) == (code, "", True), options
    assert "5 events" in in_process(running, "export", "--output", target).stdout
    assert in_process(running, "export", "--tool", "Nothing", "--output", target).returncode == 1
    assert install_text(target).splitlines() == exported
    for number in range(5):
        failed = {"tool_name": "Edit", "tool_use_id": f"t{number}", "error": "\x1b[31mno match"}
        running.emit(payload("PostToolUseFailure", "stuck", **failed))
    assert "Edit failed 5 times the same way: no match" in in_process(running, "sessions").stdout
    exported = printed("export")
    page = "\n".join(printed("export", "--format", "html", "--session", "stuck")).partition(',"events":[')
    body = running.request("/api/export?session=stuck&format=html")[2].decode()
    assert page[2].rstrip() == body.partition(',"events":[')[2].rstrip()
    assert '"session":{"sessionId":"stuck"' in page[0]
    running.stop()
    assert printed("export") == exported, "no monitor is needed"


@pytest.mark.parametrize("line", story_blocks("terminals")[0])
def test_a_terminal_has_a_name_and_a_command_of_checked_values_only(line):
    given, _, expected = line.partition(" →")
    variables = dict(re.findall(r"(?:^|;)([A-Z_]+)=([^\n]*?)(?=;[A-Z_]+=|$)", given))
    event = ee.build_event(hook_wrapped(payload("SessionStart"), terminal=variables), 1, "x")
    found = cm.terminal_of(event["data"].get("terminal", {}))
    name, _, command = expected.strip().partition(": ")
    assert found == (({"name": name, "command": command} if command else {"name": name}) if name else None)


def test_the_terminal_of_an_event_is_bounded_text_of_known_variables() -> None:
    terminal = {"TMUX": "a\x1b\n" + "b" * 999, "PATH": "/bin", "WEZTERM_PANE": 5}
    event = ee.build_event(hook_wrapped(payload("SessionStart"), terminal=terminal), 1, "x")
    assert event["data"]["terminal"] == {"TMUX": "a" + "b" * 199, "WEZTERM_PANE": ""}
    for odd in ({}, [], "x", None):
        event = ee.build_event(hook_wrapped(payload("SessionStart"), terminal=odd), 1, "x")
        assert "terminal" not in {*event, *event["data"]}


def test_go_says_what_to_do_where_it_cannot_bring_a_terminal_to_the_front(running: RunningMonitor) -> None:
    now, ssh = {"timestamp": cm.now_ms()}, {"SSH_CONNECTION": "10.0.0.5 1 10.0.0.1 22"}
    start = payload("SessionStart", "here-1")
    running.emit(hook_wrapped(start, id="a", machineKey=ee.machine_key(running.home), **now))
    far = {"machineId": "far", "machineKey": "f00", "terminal": ssh}
    running.emit(hook_wrapped(payload("SessionStart", "away-1"), id="b", **far, **now))
    for session, prompt in (("over-1", "Fix it"), ("--yes", "An option")):
        running.emit(payload("UserPromptSubmit", session, prompt=prompt), payload("SessionEnd", session))
    running.emit(*(payload(hook, "odd-1", cwd="/a\x1b]0;b\n") for hook in ("SessionStart", "SessionEnd")))
    for wanted, (words,) in story_cases("tables.txt", "go").items():
        done = in_process(running, "go", wanted)
        assert words in done.stdout + done.stderr and done.returncode == ("cd " not in words)


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is missing")
def test_go_makes_the_tmux_window_of_a_session_the_current_one(running, tmp_path):
    def tmux(*words: str) -> str:
        done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    command = ["tmux", "-S", f"{tmp_path}/tmux", "-f", "/dev/null"]
    environment = {**running.environment, "TERM": "xterm"}
    environment.pop("TMUX", None)
    (tmp_path / "payload").write_text(json.dumps(payload("SessionStart", "in-tmux")))
    hook = f"{{ {running.installed_command()}; }} <{tmp_path}/payload; exec sleep 600"
    screen, terminal = os.openpty()
    try:
        tmux("new-session", "-d", "-s", "work", hook)
        where = eventually(lambda: running.sessions().get("in-tmux"))["terminal"]
        assert where["name"] == "tmux " + tmux("display-message", "-p", "-t", "work", "#{pane_id}")
        looking = subprocess.Popen([*command, "attach"], env=environment, stdin=terminal, stdout=terminal)
        eventually(lambda: tmux("list-clients"))
        go = f"cd {ROOT}; {sys.executable} -m contextuate_monitor go in-t; exec sleep 600"
        tmux("new-window", "-t", "work", go)
        eventually(lambda: tmux("display-message", "-p", "-t", "work", "#{window_index}") == "0")
    finally:
        tmux("kill-server")
        looking.wait(20)
        os.close(screen)
        os.close(terminal)


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert cm.safe_line("a\x1b[31mred\n\u202eb \t") == "a\ufffd[31mred\ufffd\ufffdb \ufffd"
    record = cm.logging.makeLogRecord({"msg": "from %s", "args": ("a\x1b[31m\n2026 INFO b",)})
    assert cm.RedactingFormatter().format(record) == "from a\ufffd[31m\ufffd2026 INFO b"


def test_status_prints_facts_and_problems(running: RunningMonitor) -> None:
    status, words = running.get("/api/status"), in_process(running, "status").stdout
    facts = {it["name"]: it["words"] for it in status["facts"]}
    assert list(facts) == ["mode", "events", "sessions", "store", "index", "spool", "lost"]
    for name, fact in facts.items():
        steady = fact.partition(",")[0] if name == "store" else fact  # its size grows meanwhile
        assert f"{name:<8} {steady}" in words or name == "index", words
    link = {"state": "waiting", "server": "redis:6379", "tls": True, "attempt": 2, "maxRetries": 9,
            "reason": "refused", "position": None, "streamReason": "", "streamState": "ok"}  # fmt: skip
    machine = {"machineId": "far", "label": "far", "sameName": False, "events": 3000, "clockSkewMs": -7000}
    machine["lastSeen"] = cm.now_ms()
    publisher = {"running": True, "state": "connected", "published": 4}
    found = cm.status_facts({**status, "redis": link, "publisher": publisher, "machines": [machine]})
    facts = {it["name"]: it["words"] for it in found}
    assert facts["redis"] == "redis:6379 with TLS: waiting, attempt 2 of 9: refused"
    assert facts["stream"] == "read up to its start"
    assert facts["publish"] == "connected: 4 events since its start"
    assert facts["machine"] == "far: 3,000 events, last 0 s ago, clock 7 s ahead"
    for state in ("waiting", "connecting"):  # an attempt may last for seconds
        problems = cm.status_problems({**status, "redis": {**link, "state": state}}, 0)
        assert [it["kind"] for it in problems] == ["redis"]


def test_the_demo_shows_every_kind_of_row_and_wait() -> None:
    book = cm.Sessions(own_machine="testbox")
    events = [ee.build_event(sent, at, "testbox") for at, sent in cm.demo_day(NOW_MS, 0)]
    for seq, event in enumerate(events, 1):
        book.apply({**event, "seq": seq, "received": event["timestamp"]})
    book.tick(NOW_MS)
    live = [at for at, _ in cm.demo_day(NOW_MS, 120)]
    assert live[: len(events)] == sorted(live)[: len(events)] and NOW_MS < live[-1] <= NOW_MS + 120_000
    for field, (values,) in story_cases("tables.txt", "demo").items():
        assert {*values.split()} <= {event.get(field, event["data"].get(field)) for event in events}, field
    shown = [book.to_json(session) for session in book.sessions.values()]
    waits = {"{kind} {tool}".format_map(one["reason"]) for one in shown if one["state"] == "waiting"}
    assert waits == {"permission Bash", "question AskUserQuestion", "question ExitPlanMode", "input None"}
    assert any(one["counts"]["interrupted"] for one in shown)
    agents = [agent for one in shown for agent in one["agents"]]
    assert any(agent["parentAgentId"] for agent in agents), "none is nested"
    assert sum(agent["state"] == "working" for agent in agents) == 2, "in the background"


def test_the_demo_fills_every_state_and_is_replaced_or_removed(running):
    def demo() -> tuple[str, dict[str, dict[str, Any]]]:
        words = in_process(running, "demo", "--live", "0").stdout
        return words, {name: one for name, one in running.sessions().items() if name != "mine"}

    running.emit(payload("UserPromptSubmit", "mine", prompt="keep me"))
    words, first = demo()
    assert "demo --remove" in words
    every_state = {"waiting", "working", "quiet", "failed", "idle", "ended"}
    eventually(lambda: {session["state"] for session in running.sessions().values()} == every_state)
    assert all(session["demo"] for session in first.values())
    assert sum(bool(session["estimatedCostUsd"]) for session in first.values()) >= 10
    words, second = demo()
    assert "demo sessions removed" in words and not set(second) & set(first)
    assert sorted(one["label"] for one in second.values()) == sorted(one["label"] for one in first.values())
    in_process(running, "demo", "--remove")
    assert list(running.sessions()) == ["mine"]
    assert {event["sessionId"] for event in running.stored_events()} == {"mine"}


def test_the_demo_goes_on_when_the_monitor_restarts(running):
    command = [sys.executable, "-m", "contextuate_monitor", "demo", "--live", "2"]
    demo = subprocess.Popen(command, cwd=ROOT, env=running.environment, stdout=subprocess.PIPE, text=True)
    eventually(lambda: len(running.stored_events()) > 20)
    running.kill()
    running.serve()
    sent = re.search(r"(\d+) demo events sent", demo.communicate(timeout=90)[0])
    assert demo.returncode == 0 and len(running.stored_events()) == int(sent[1])


COMMANDS_IN_A_ROW = """
import sys, contextuate_monitor
for command in sys.argv[1:]:
    try:
        status = contextuate_monitor.main(command.split())
    except SystemExit as exit:
        status = exit.code
    if status not in (0, 1, None):
        sys.exit(f"{command} gave {status}")
"""


def test_no_command_fails_for_its_terminal_or_the_name_of_its_home(tmp_path):
    (tmp_path / "h\udcff").mkdir()
    monitor = RunningMonitor(str(tmp_path / "h\udcff"), {"socketPath": str(tmp_path / "s")})
    try:
        monitor.socket_path = str(tmp_path / "s")
        monitor.serve().emit(payload("UserPromptSubmit", prompt="deploy \U0001f680 Zürich 日本語 \ud83d"))
        commands = "doctor;sessions --all;search deploy;export;url;config;test-event;install --dry-run;"
        commands = f"{commands}uninstall --dry-run;prune --dry-run;demo --remove;status".split(";")
        listed = re.findall(r"^    ([a-z][a-z-]+)", cm.build_parser().format_help(), re.M)
        assert {"start", "stop", "restart", "status", "install", "uninstall", "tail", "export"} <= {*listed}
        helps = [f"{name} --help" for name in listed]
        for start in (
            'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 exec "$@"', 'PYTHONIOENCODING=latin-1 exec "$@"',
            'exec "$@" >&-', 'exec "$@" <&- >&-',
        ):  # fmt: skip
            shell = ["/bin/sh", "-c", start, "sh", sys.executable, "-c", COMMANDS_IN_A_ROW, *helps, *commands]
            done = subprocess.run(shell, cwd=ROOT, env=monitor.environment, capture_output=True)
            assert (done.returncode, b"Traceback" in done.stderr) == (0, False), done.stderr
            helps = []
        assert monitor.get("/api/search?q=deploy") and monitor.get("/api/stats")
    finally:
        clean_up(monitor)


def test_without_sqlite3_the_monitor_searches_files_and_says_why(monitor, monkeypatch, tmp_path):
    (tmp_path / "sqlite3.py").write_text("raise ImportError('none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monitor.start().emit(payload("UserPromptSubmit", prompt="find me"), payload("Stop"))
    assert len(monitor.get("/api/search?q=find")["results"]) == 1
    index = monitor.get("/api/status")["index"]
    assert index["state"] == "off" and "has no sqlite3" in index["error"]
    monitor.stop()
    assert "Traceback" not in install_text(monitor.home + "/monitor.log")


def test_an_installed_hook_belongs_to_the_directory_it_is_installed_in(running: RunningMonitor) -> None:
    environment = {name: value for name, value in running.environment.items() if name != "CONTEXTUATE_HOME"}
    hook_call(running.installed_command(), payload("Stop"), environment)
    eventually(lambda: [event["hookType"] for event in running.stored_events()] == ["Stop"])


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="makes a pid namespace")
def test_a_session_in_a_sandbox_lives_though_its_pid_is_none_here(monitor):
    pid = next(pid for pid in range(300, 30_000) if not os.path.exists(f"/proc/{pid}"))
    hook = f"export CLAUDE_PID={pid}; {{ {monitor.installed_command()}; }} < payload; exec sleep 60"
    prompt = payload("UserPromptSubmit", "boxed", prompt="go")
    pathlib.Path(monitor.home, "payload").write_text(json.dumps(prompt))
    monitor.serve()
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", hook]
    with subprocess.Popen(command, cwd=monitor.home, env=monitor.environment) as box:
        session = eventually(lambda: monitor.sessions().get("boxed"))
        monitor.emit({"hook": payload("Stop", "gone"), "id": "g", "machineId": "testbox", "pid": pid})
        eventually(lambda: monitor.sessions()["gone"]["state"] == "ended", what="a look at the processes")
        assert session["pid"] == pid and box.poll() is None
        assert monitor.sessions()["boxed"]["state"] == "working"
        box.kill()


MACHINE_LINES = stories("machines", " → ")


@pytest.mark.parametrize("case", MACHINE_LINES)
def test_machines_with_one_name_are_apart_and_containers_together(tmp_path, case):
    ((machines, lines),) = MACHINE_LINES[case]
    settings = cm.Settings(str(tmp_path), "", "build-box", ee.load_config("", cm.KEYS)[0])
    settings.__dict__["machine_key"] = "h"
    by_key: dict[str, dict[str, Any]] = {}
    for number, words in enumerate(machines.split(", ")):
        name, key = words.split()
        about = by_key.setdefault(key, {"machineKey": key, "events": 0, "dropped": 0, "clockSkewMs": 0})
        about.update(machineId=name, events=about["events"] + 1, lastSeen=number)
    found = cm.machine_lines(by_key.values(), settings)
    assert "; ".join(f"{it['label']} {it['events']}{'*' * it['sameName']}" for it in found) == lines


def test_status_and_doctor_name_a_name_that_two_machines_have(monitor):
    monitor.serve()
    for number, key in enumerate(("1111aa", "2222bb")):
        event = hook_wrapped(payload("UserPromptSubmit", f"s{number}"), id=f"e{number}", machineKey=key)
        monitor.emit({**event, "machineId": "macbook"})
    for command in ("status", "doctor"):
        assert "Several machines have the same name, macbook" in in_process(monitor, command).stdout
    assert "macbook (1111): 1 event," in in_process(monitor, "status").stdout
    keys = {it["sessionId"]: it["machineKey"] for it in monitor.get("/api/sessions")["sessions"]}
    assert (keys["s0"], keys["s1"]) == ("1111aa", "2222bb")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full", "1</dev/null", "| :"])
def test_start_ends_with_0_when_its_output_cannot_be_written(monitor, streams):
    command = f"set -o pipefail; {sys.executable} -m contextuate_monitor start --no-open {streams}"
    options: dict[str, Any] = {"cwd": ROOT, "env": monitor.environment, "timeout": 60, "check": True}
    assert subprocess.run(["bash", "-c", command], **options, stderr=subprocess.PIPE).stderr == b""
    assert monitor.know().get("/health")["status"] == "ok"


def test_another_monitor_is_not_stopped_in_place_of_ours(monitor, shared):
    monitor.serve()
    body = json.dumps({"startedAt": monitor.about["startedAt"]}).encode()
    headers = {"Authorization": "Bearer " + cm.read_token(shared.home + "/token")}
    headers["Content-Type"] = "application/json"
    assert shared.request("/api/stop", "POST", body, headers)[0] == 409
    about = {**monitor.about, "port": shared.port}  # as seen from another network
    ee.write_atomically(monitor.home + "/monitor.run.json", json.dumps(about).encode())
    assert f"stopped (pid {monitor.pid})" in in_process(monitor, "stop").stdout
    eventually(lambda: not alive(monitor.pid))
    assert alive(shared.pid)


@needs_containers
def test_stop_in_another_container_signals_no_process(monitor):
    serve = [sys.executable, "-m", "contextuate_monitor", "start", "--foreground", "--no-open"]
    with in_container(monitor, *serve) as first:
        eventually(lambda: os.path.exists(monitor.home + "/monitor.run.json"), 30)
        assert monitor.know().about["pid"] < 10, "it is that of its namespace"
        # The shell has the monitor's pid, in a namespace of its own.
        script = f"echo shell $$; {sys.executable} -m contextuate_monitor $0; echo status $?"
        run = functools.partial(said_in_container, monitor, "sh", "-c", script)
        for said, words in (
            (run("stop", flags="net"), ("in another container", "run `stop` where it runs", "status 1")),
            (run("status"), ("running  in another container", "status 0")),
            (run("stop"), ("stopped (in another container)", "status 0")),
        ):
            assert all(word in said for word in (f"shell {monitor.pid}", *words)), said
        eventually(lambda: first.poll() is not None)
    with in_container(monitor, *serve):  # seen from its host, the kernel numbers it in another way
        eventually(lambda: "running  pid" in monitor.command("status", check=False).stdout, 30)
        pid = cm.listening_pid(monitor.socket_path)
        assert pid not in (monitor.know().pid, 0, None)
        assert f"stopped (pid {pid})" in monitor.command("stop").stdout
        eventually(lambda: not alive(pid))


def test_machines_beyond_a_thousand_are_a_number(running: RunningMonitor) -> None:
    running.emit(*(timed(payload("Stop"), cm.now_ms(), f"box-{number}") for number in range(1200)))
    status = running.get("/api/status")
    assert {it["machineId"] for it in status["machines"]} == {f"box-{number}" for number in range(200, 1200)}
    assert status["otherMachines"] == 200 and "200 others" in str(status["facts"])
    assert len(running.request("/metrics")[2]) < 200 << 10


def test_machines_are_forgotten_after_the_retention() -> None:
    ingest = cm.Ingest.__new__(cm.Ingest)
    ingest.machines = {name: {"machineId": name, "lastSeen": at} for name, at in (("old", 10), ("new", 30))}
    book = cm.Sessions()
    for machine, at in (("old", 10), ("new", 30)):
        book.apply(ee.build_event(payload("Stop", machine), at, machine))
    ingest.forget_machines(20)
    book.forget_machines(20)
    assert (list(ingest.machines), book.skew_ms("old"), book.skew_ms("new")) == (["new"], None, 0)


# -- the service ---------------------------------------------------------------

# In namespaces of its own: a systemd of this user, then `sh -c "$1"` with the command line of the program in $P.
SERVICE_WORLD = """mount -t tmpfs none /run; mkdir -p /run/systemd/system /run/user/0; export XDG_RUNTIME_DIR=/run/user/0
/usr/lib/systemd/systemd --user >"$HOME/systemd.log" 2>&1 & until systemctl --user show-environment >/dev/null 2>&1
do sleep 0.1; done; sh -c "$1"; status=$?; kill $!; wait; exit $status"""
has_systemd = os.geteuid() == 0 and UNSHARE and os.path.exists("/usr/lib/systemd/systemd")
needs_systemd = pytest.mark.skipif(not has_systemd, reason="systemd is missing")


@needs_systemd
def test_a_service_starts_the_monitor_now_and_after_a_crash(monitor: RunningMonitor) -> None:
    program = f"{sys.executable} -m contextuate_monitor"
    environment = {**monitor.environment, "HOME": monitor.home, "P": program}
    options = "--mount --pid --fork --kill-child --mount-proc sh -c".split()
    world, pid = [str(UNSHARE), *options, SERVICE_WORLD, "sh"], "$CONTEXTUATE_HOME/monitor.pid"
    waits = f"until $P status --short | grep -q idle; do sleep 0.1; done; cat {pid}; echo;"
    script = (f"$P service status; $P start --no-open >/dev/null; $P service install; {waits} $P service status;"
              f"kill -9 $(cat $CONTEXTUATE_HOME/monitor.pid); rm $CONTEXTUATE_HOME/short; {waits}"
              f"mkdir $HOME/b; cp $HOME/*.json $HOME/b; CONTEXTUATE_HOME=$HOME/b $P restart; $P restart; {waits}"
              """$P stop; $P service status; sed -i 's/"port": 0/"port": 0, "host": "a..b"/' $HOME/monitor.config.json;"""
              "$P service install; $P service remove; $P service remove; ls $HOME/.config/systemd/user/*.service")  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    said = subprocess.run([*world, script], cwd=ROOT, env=environment, text=True, timeout=120, **pipes).stdout
    lines = [re.sub(":[0-9]+/$", "", line) for line in said.splitlines() if not line.startswith("ls:")]
    runs = "Contextuate Monitor runs (pid {}): http://localhost".format
    assert [line for line in lines if not line.isdigit()] == [
        "not installed", lines[1], runs(lines[3]), "running", lines[6], runs(lines[8]), f"stopped (pid {lines[8]})",
        "installed, not running", lines[1], lines[12], lines[13], "not installed",
    ]  # fmt: skip
    assert "contextuate-monitor.service installed" in lines[1] and lines[13].endswith("removed")
    assert "another monitor uses" in lines[6], "the service is of another directory"
    assert lines[12].startswith("contextuate: error: a..b port 0 cannot be opened"), lines
    assert len({it for it in lines if it.isdigit()}) == 3, "a process for each start"


@pytest.mark.parametrize("action", ["install", "remove", "status"])
def test_a_service_is_refused_where_neither_systemd_nor_launchd_runs(monitor, monkeypatch, action):
    monkeypatch.setenv("PATH", monitor.home)
    done = in_process(monitor, "service", action)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "neither systemd nor launchd runs services of this user here" in done.stderr


def test_service_files_keep_any_path_and_variable(tmp_path: Any) -> None:
    folder = tmp_path / "a b%n<&>"
    folder.mkdir()
    command = [sys.executable, "-m", 'x "$HOME" %n \\']
    environment = {"CONTEXTUATE_HOME": str(folder) + ' "%h" $x'}
    agent = plistlib.loads(cm.launchd_agent(command, str(folder), environment))
    assert (agent["ProgramArguments"], agent["EnvironmentVariables"]) == (command, environment)
    assert agent["WorkingDirectory"] == str(folder) and agent["RunAtLoad"] is True
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    unit = cm.systemd_unit(command, str(folder), environment).decode()
    assert 'ExecStart="' in unit and ' "x \\"$$HOME\\" %%n \\\\"\n' in unit and "b%%n<&>\n" in unit
    assert f'Environment="CONTEXTUATE_HOME={str(folder).replace("%", "%%")} \\"%%h\\" $x"\n' in unit
    (tmp_path / "x.service").write_text(unit)
    if shutil.which("systemd-analyze"):
        verify = ["systemd-analyze", "--user", "verify", str(tmp_path / "x.service")]
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
        done = subprocess.run(verify, env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


# ---- Doctor: each broken link is named, with what to do ----------------------------------------------------


def examine(monitor: RunningMonitor) -> tuple[int, dict[str, list[dict[str, str]]]]:
    done = in_process(monitor, "doctor", "--json")
    answer = json.loads(done.stdout)
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in answer["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    assert answer["ok"] == (done.returncode == 0)
    return done.returncode, findings


def levels(findings: dict[str, list[dict[str, str]]], check: str) -> list[str]:
    return [finding["level"] for finding in findings[check]]


@pytest.fixture
def examined(shared: RunningMonitor) -> Iterator[RunningMonitor]:
    """A running monitor, for which nothing is installed."""
    yield shared
    shared.write_config({})
    os.chmod(shared.home, 0o700)
    for path in (shared.home + "/hooks", shared.claude_home):
        shutil.rmtree(path, ignore_errors=True)


def test_doctor_finds_nothing_wrong_where_nothing_is(running):
    in_process(running, "install")
    status, findings = examine(running)
    assert status == 0, findings
    for check in ("config", "files", "hook", "registered", "spool", "monitor", "socket", "index", "probe"):
        assert levels(findings, check) == ["ok"], findings[check]
    assert "reached the monitor" in findings["probe"][0]["words"]
    (event,) = running.get("/api/events?limit=10")["events"]
    assert event["data"]["message"].startswith("doctor ")
    end = "All checks passed.\n" if shutil.which("claude") else "No check failed; see what says warn.\n"
    assert re.fullmatch(r"(?s)ok   config.*\n\n" + re.escape(end), in_process(running, "doctor").stdout)


def test_doctor_reports_a_monitor_that_does_not_run_and_loses_no_event(monitor):
    in_process(monitor, "install")
    status, findings = examine(monitor)
    assert status == 1
    assert levels(findings, "monitor") == levels(findings, "probe") == ["fail"]
    assert findings["monitor"][0]["advice"] == "run: python3 contextuate_monitor.py start"
    assert levels(examine(monitor)[1], "spool") == ["warn"]  # the first probe waits there
    monitor.serve()
    eventually(lambda: len(monitor.get("/api/events?limit=10")["events"]) == 2)
    assert examine(monitor)[0] == 0


def test_doctor_knows_a_hook_registered_for_one_project(examined, monkeypatch, tmp_path):
    in_process(examined, "install", "--project", str(tmp_path))
    assert levels(examine(examined)[1], "registered") == ["fail"]
    monkeypatch.chdir(tmp_path)
    (found,) = examine(examined)[1]["registered"]
    assert found["level"] == "ok" and str(tmp_path) in found["words"]


@needs_root
def test_doctor_reports_a_socket_of_another_user(running):
    os.chown(running.socket_path, 4242, 4242)
    (found,) = examine(running)[1]["socket"]
    assert (found["level"], "not this user's" in found["words"]) == ("fail", True), found


def test_a_host_that_is_no_name_is_refused_with_the_key_to_change():
    with pytest.raises(cm.CommandError, match=r"a\.\.b port 0 cannot be opened: .* server\.host"):
        cm.bind_tcp("a..b", 0, "server.port", "--port")


def test_doctor_reports_a_port_in_use(monitor):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monitor.write_config({"server": {"port": port, "wsPort": 0}})
        status, findings = examine(monitor)
    assert status == 1 and levels(findings, "ports") == ["fail"]
    assert str(port) in findings["ports"][0]["words"]


@story_table("tables.txt", "doctor", "settings, options, commands, status, finding, words")
def test_doctor_runs_what_is_registered_and_names_what_is_wrong(
    examined, monkeypatch, settings, options, commands, status, finding, words
):
    monkeypatch.setattr(cm, "HOOK_DEADLINE_S", 3.0)
    os.mkdir(examined.claude_home)
    pathlib.Path(examined.claude_home, "settings.json").write_text(json.dumps(settings))
    in_process(examined, "install", *options.split())
    subprocess.run(
        ["sh", "-ec", commands], cwd=examined.home, env={**os.environ, "PYTHON": PYTHON}, check=True
    )
    (found_status, findings), (check, level) = examine(examined), finding.split()
    said = [it["words"] + it["advice"] for it in findings.get(check, ()) if it["level"] == level]
    assert found_status == status and words in "\n".join(said), findings


def test_doctor_lists_files_that_are_in_the_way_also_without_a_monitor(monitor):
    paths = {monitor.home + "/spool/0000000000001-x.jsonl", monitor.home + "/quarantine.log"}
    os.makedirs(monitor.home + "/spool", 0o700)
    for path in paths:
        os.mkfifo(path)
    in_process(monitor, "install")
    before = examine(monitor)[1]["files"]
    assert [it["level"] for it in before] == ["ok", "warn", "warn"]
    assert {it["advice"].partition(" rm -r ")[2] for it in before[1:]} == paths
    monitor.serve()
    assert sorted(it["words"] for it in examine(monitor)[1]["files"]) == sorted(it["words"] for it in before)


def test_doctor_names_two_registrations_and_a_broken_file(examined, monkeypatch, tmp_path):
    in_process(examined, "install")
    project = tmp_path / ".claude"
    project.mkdir()
    entry = {"type": "http", "url": f"http://localhost:{examined.port}/api/hooks"}
    (project / "settings.json").write_text(json.dumps({"hooks": {"Stop": [{"hooks": [entry]}]}}))
    (project / "settings.local.json").write_text("{\n// no JSON\n}")
    monkeypatch.chdir(tmp_path)
    status, findings = examine(examined)
    assert status == 0 and levels(findings, "registered") == ["warn", "ok", "warn"]
    broken, _, twice = (it["words"] for it in findings["registered"])
    assert "settings.local.json: not valid JSON" in broken and "line 2" in broken
    assert "Stop would come twice" in twice and str(project) in twice


# ---- Redis mode: many machines, several monitors, and a Redis that misbehaves ------------------------------
# Real redis-server processes, real monitors, installed hooks. A machine is a directory and a name of its own.

REDIS_CHANNEL, REDIS_STREAM = "contextuate:events", "contextuate:events:stream"


REDIS_FIRST_PORT = 11_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10)
# 10,000 above them are the ports for the bus of a cluster; all are below those of outgoing connections.
REDIS_PORTS = iter(random.Random().sample(range(REDIS_FIRST_PORT, REDIS_FIRST_PORT + 1_000), 1_000))


def redis_free_port() -> int:
    """Return each port once: no outgoing connection and no other test gets it while its server is down."""
    for port in REDIS_PORTS:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("every port has been used")


class RedisCertificates:
    """A certificate authority, and what it gave to a server and to a client, as PEM files made by openssl."""

    def __init__(self, names: str = "DNS:localhost,IP:127.0.0.1") -> None:
        self.directory = new_home()
        key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        self.openssl(
            f"req -x509 {key} -keyout ca.key -out ca.crt -days 2 -subj /CN=authority "
            "-addext basicConstraints=critical,CA:TRUE -addext keyUsage=critical,keyCertSign,cRLSign"
        )
        for part, usage in (("server", "serverAuth"), ("client", "clientAuth")):
            self.openssl(
                f"req -x509 -CA ca.crt -CAkey ca.key {key} -keyout {part}.key -out {part}.crt -days 2 -subj /CN={part} "
                f"-addext basicConstraints=critical,CA:FALSE -addext extendedKeyUsage={usage} "
                f"-addext subjectAltName={names} -addext keyUsage=digitalSignature"
            )

    def openssl(self, command: str) -> None:
        subprocess.run(["openssl", *command.split()], cwd=self.directory, check=True, capture_output=True)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


class RedisServer:
    """A redis-server process with a directory and a port of its own; both stay when it is started again.

    `lines` go into its configuration. What it had is kept over `stop` and `start`.
    """

    def __init__(
        self, *lines: str, user: str = "default", password: str = "", certificates: Any = None, port: int = 0,
        mode: str = "",
    ) -> None:  # fmt: skip
        self.directory, self.mode = new_home(), mode
        self.socket_path, self.port = self.directory + "/redis.sock", port or redis_free_port()
        self.user, self.password, self.certificates = user, password, certificates
        common = [
            f"port {self.port}", "bind 127.0.0.1", f"dir {self.directory}", f"unixsocket {self.socket_path}",
            f"logfile {self.directory}/redis.log",
            *([] if mode else ['save ""', "appendonly yes", "appendfsync everysec"]),
            *([f"requirepass {password}"] if password and user == "default" else []),
        ]  # fmt: skip
        if certificates is not None:
            folder = certificates.directory
            common += [
                "port 0", f"tls-port {self.port}", "tls-auth-clients no", f"tls-cert-file {folder}/server.crt",
                f"tls-key-file {folder}/server.key", f"tls-ca-cert-file {folder}/ca.crt",
            ]  # fmt: skip
        pathlib.Path(self.directory, "redis.conf").write_text("\n".join((*common, *lines)) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> RedisServer:
        """Start it, on the same port, with what it had, and wait until it answers."""
        command = ["redis-server", self.directory + "/redis.conf", *self.mode.split()]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(lambda: self.cli("PING", check=False) == "PONG", what=f"Redis on port {self.port}")
        return self

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def thaw(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        self.thaw()
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.directory, ignore_errors=True)

    def cli(self, *arguments: str, check: bool = True, given: bytes | None = None) -> str:
        """Run redis-cli and return what it says; bytes given on standard input are the last argument."""
        login = ["--user", self.user] if self.password else []
        done = subprocess.run(
            ["redis-cli", "-s", self.socket_path, *login, *(["-x"] if given is not None else []), *arguments],
            input=given, env={**os.environ, "REDISCLI_AUTH": self.password}, capture_output=True, timeout=20,
            check=False,
        )  # fmt: skip
        said = done.stdout.decode("utf-8", "replace").rstrip("\n")
        if check and (done.returncode or said.startswith(("ERR", "NOPERM", "NOAUTH", "WRONG", "OOM"))):
            raise AssertionError(f"redis-cli {arguments}: {said}{done.stderr.decode()}")
        return said

    def publish(self, message: bytes) -> None:
        self.cli("PUBLISH", REDIS_CHANNEL, given=message)

    def streamed(self) -> list[str]:
        said = self.cli("--json", "XRANGE", REDIS_STREAM, "-", "+")
        return [dict(zip(fields[::2], fields[1::2]))["event"] for _, fields in json.loads(said)]

    def clients(self, kind: str) -> int:
        """Count its connections of one type: "normal" (ours included) or "pubsub"."""
        return len(self.cli("CLIENT", "LIST", "TYPE", kind).splitlines())

    def settings(self, **more: Any) -> dict[str, Any]:
        redis = {"host": "127.0.0.1", "port": self.port, **more}
        if self.certificates is not None:
            redis = {"tls": True, "caFile": self.certificates.directory + "/ca.crt", **redis}
        return {"mode": "redis", "redis": redis}


@dataclasses.dataclass
class RedisMachine(RunningMonitor):
    """One machine in Redis mode: its hook, its spool, its publisher, and a monitor if one is started."""

    machine_id: str = "testbox"
    more_environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "CONTEXTUATE_MACHINE_ID": self.machine_id, **self.more_environment}

    hook = functools.cached_property(RunningMonitor.installed_command)

    def stop(self) -> None:
        assert in_process(self, "stop").returncode == 0

    @functools.cached_property
    def hook_process(self) -> subprocess.Popen[str]:
        """A process that runs the hook for each payload, so that not each has to start an interpreter."""
        command = [sys.executable, "-c", HOOKS_IN_A_ROW, ROOT, str(ee.ACKNOWLEDGEMENT_DEADLINE_S)]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        return subprocess.Popen(command, env=self.environment, text=True, **pipes)

    def say(self, marker: str, session: str = "s1", **fields: Any) -> None:
        """Run the hook; it has returned, and printed nothing, when this returns."""
        said = payload("PreToolUse", session, tool_use_id=marker, **fields)
        print(json.dumps(said), file=self.hook_process.stdin, flush=True)
        assert json.loads(self.hook_process.stdout.readline()) == [0, ""]

    def spool(self, marker: str, session: str = "s1", **fields: Any) -> None:
        """Put one event into the spool as a hook does, without starting a process."""
        given_payload = payload("PreToolUse", session, tool_use_id=marker, **fields)
        environment = {name.encode(): value.encode() for name, value in self.environment.items()}
        ee.append_to_spool(self.home + "/spool", ee.wrap(json.dumps(given_payload).encode(), environment))

    def spooled(self) -> int:
        return sum(size for _, size in ee.spool_segments(self.home + "/spool"))

    def redis(self) -> dict[str, Any]:
        return dict(self.get("/api/status")["redis"])

    def publisher(self) -> dict[str, Any]:
        path = self.home + "/publisher.json"
        about = json.loads(install_text(path)) if os.path.exists(path) else {}
        return {name: cm.redis_advised(it) if it and "eason" in name else it for name, it in about.items()}

    def wait_until(self, state: str, timeout_s: float = 60.0) -> dict[str, Any]:
        is_it = f"{self.machine_id}: {state}"
        return dict(eventually(lambda: (it := self.redis())["state"] == state and it, timeout_s, is_it))

    def arrivals(self, session: str = "s1") -> dict[str, list[str]]:
        """Return what the monitor has stored of a session: machine → markers, in order of arrival."""
        found: dict[str, list[str]] = {}
        for event in self.stored_events():
            if event["sessionId"] == session:
                found.setdefault(event["machineId"], []).append(event["data"].get("toolUseId"))
        return found

    def gets(self, count: int, session: str = "s1") -> None:
        def has() -> bool:
            shown = self.sessions().get(session)
            return shown is not None and shown["counts"]["events"] >= count

        eventually(has, 90, f"{count} events of {session} at {self.machine_id}")

    def publishes_all(self) -> None:
        eventually(lambda: not self.spooled(), 90, f"an empty spool of {self.machine_id}")

    def publishers(self) -> list[int]:
        return processes_of(self.home, b"--publish")

    def end_publisher(self) -> None:
        for pid in self.publishers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not alive(pid), what="the publisher's end")

    def remove(self) -> None:
        if "hook_process" in self.__dict__:
            self.hook_process.communicate()
        clean_up(self)
        self.end_publisher()
        shutil.rmtree(self.home, ignore_errors=True)


def at_once(*jobs: Any) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return [job.result() for job in [pool.submit(job) for job in jobs]]


@contextlib.contextmanager
def redis_parts() -> Iterator[Any]:
    """Give a function that makes servers and machines (by class and arguments); remove them all at the end."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is missing")
    made: list[Any] = []

    def make(kind: Any, *arguments: Any, **options: Any) -> Any:
        if kind is RedisMachine:
            options = {"home": new_home(), **options}
        made.append(kind(*arguments, **options))
        return made[-1]

    try:
        yield make
    finally:
        for part in reversed(made):
            part.remove()


@pytest.fixture
def make() -> Iterator[Any]:
    with redis_parts() as maker:
        yield maker


@dataclasses.dataclass
class RedisTeam:
    """Three machines that emit, two that only watch, one Redis."""

    server: RedisServer
    emitters: list[RedisMachine]
    monitors: list[RedisMachine]

    def mend(self) -> None:
        """Undo what a test has done to it."""
        self.server.thaw()
        if self.server.process is None:
            self.server.start()
        self.server.cli("ACL", "SETUSER", "default", "allcommands", "allkeys", "allchannels")
        if self.server.cli("EXISTS", "aside") == "1":
            self.server.cli("RENAME", "aside", REDIS_STREAM)
        self.server.cli("CONFIG", "SET", "maxmemory", "0")
        self.server.cli("REPLICAOF", "NO", "ONE")
        for monitor in self.monitors:
            if not alive(monitor.pid):
                monitor.serve()
            os.kill(monitor.pid, signal.SIGCONT)

    def whole(self) -> None:
        """Undo it, and wait until every monitor is connected."""
        self.mend()
        for monitor in self.monitors:
            monitor.wait_until("connected")
        self.server.cli("XTRIM", REDIS_STREAM, "MAXLEN", "200")  # every monitor has what is older


@pytest.fixture(scope="module")
def redis_team() -> Iterator[RedisTeam]:
    with redis_parts() as maker:
        server = maker(RedisServer)
        made = RedisTeam(
            server,
            [maker(RedisMachine, config=server.settings(), machine_id=f"box{n}") for n in range(3)],
            [maker(RedisMachine, config=server.settings(), machine_id=f"watcher{n}") for n in range(2)],
        )
        at_once(*[monitor.serve for monitor in made.monitors])
        yield made


@pytest.fixture
def team(redis_team: RedisTeam) -> RedisTeam:
    redis_team.whole()
    return redis_team


class RedisFlow:
    """Events of one session, said on every machine of a team in turn, and the check that all arrived."""

    def __init__(self, team: RedisTeam, session: str) -> None:
        self.team, self.session = team, session
        self.said: dict[str, list[str]] = {machine.machine_id: [] for machine in team.emitters}

    def hooks(self, count: int) -> None:
        """Run so many real hooks, on all machines at once; every one has returned when this returns."""
        shares = self._shares(count)
        at_once(*(
            lambda machine=machine: [machine.say(marker, self.session) for marker in shares[machine.machine_id]]
            for machine in self.team.emitters
        ))  # fmt: skip

    def bulk(self, count: int, **fields: Any) -> None:
        """Put so many events into the machines' spools, and let one hook each find its publisher."""
        shares = self._shares(count)
        for machine in self.team.emitters:
            *first, last = shares[machine.machine_id]
            for marker in first:
                machine.spool(marker, self.session, **fields)
            machine.say(last, self.session, **fields)

    def _shares(self, count: int) -> dict[str, list[str]]:
        machines = self.team.emitters
        shares: dict[str, list[str]] = {machine.machine_id: [] for machine in machines}
        for number in range(count):
            name = machines[number % len(machines)].machine_id
            shares[name].append(f"{name}-{len(self.said[name])}")
            self.said[name].append(shares[name][-1])
        return shares

    def check(self) -> None:
        """Both monitors get every event once, each machine's in its order; no spool keeps any."""
        for monitor in self.team.monitors:
            monitor.gets(sum(map(len, self.said.values())), self.session)
        for machine in self.team.emitters:
            machine.publishes_all()
        for monitor in self.team.monitors:
            assert monitor.arrivals(self.session) == self.said


def test_every_monitor_has_every_machines_events_once_and_in_order(team: RedisTeam) -> None:
    clients = [monitor.websocket("full", sessionIds=["three-machines"]) for monitor in team.monitors]
    flow = RedisFlow(team, "three-machines")
    flow.hooks(60)
    flow.bulk(60, tool_name="Bash", tool_input={"command": "ls"})
    flow.check()
    kept = []  # of each monitor, by id, without what it adds for itself
    for client, monitor in zip(clients, team.monitors):
        stored = [event for event in monitor.stored_events() if event["sessionId"] == flow.session]
        assert sorted(client.events(120), key=lambda event: event["seq"]) == stored
        client.close()
        kept.append({event["id"]: {**event, "seq": 0, "received": 0} for event in stored})
        about = {machine["machineId"]: machine for machine in monitor.get("/api/status")["machines"]}
        for machine in team.emitters:
            assert about[machine.machine_id]["events"] >= 40
            assert abs(about[machine.machine_id]["lastSeen"] - time.time() * 1000) < 300_000
    assert kept[0] == kept[1]
    streamed = [{**json.loads(line), "seq": 0, "received": 0} for line in team.server.streamed()]
    assert {event["id"]: event for event in streamed if event["sessionId"] == flow.session} == kept[0]
    for machine in team.emitters:
        said = lambda it=machine: it.publisher()  # noqa: E731
        eventually(lambda said=said: said()["published"] >= 40 and said()["subscribers"] == 2)
        eventually(lambda machine=machine: len(machine.publishers()) == 1)
        more = {"CONTEXTUATE_DEBUG": "wait"}
        said = hook_call(machine.hook, payload("Stop", "debug"), machine.environment, **more)
        assert "mode redis" in said and re.search(r"\b2 (subscribers|monitors)", said), said


class RedisTrouble(NamedTuple):
    """What is done to a team, and what its publishers and monitors say then; events come before, during and after.

    `arrives`: what is published meanwhile arrives in spite of it. `hooks`: how many are called meanwhile; one that
    waited for Redis would never return. What they say: field → pattern.
    """

    do: Any
    publisher: dict[str, str] = {}
    monitor: dict[str, str] = {"state": "connected"}
    arrives: bool = True
    times: int = 1
    hooks: int = 18


def redis_refused(commands: str, reason: str) -> RedisTrouble:
    says = {"stream": "refused", "channelState": "ok", "streamReason": reason}
    do = lambda team: [team.server.cli(*command.split()) for command in commands.split("; ")]  # noqa: E731
    return RedisTrouble(do, says, arrives=False)


REDIS_AWAY = {"state": "waiting|connecting", "reason": r"\w{5}"}
REDIS_TROUBLES = {
    "Redis is stopped": RedisTrouble(
        lambda team: team.server.stop(), REDIS_AWAY, {**REDIS_AWAY, "attempt": "[3-9]"}, arrives=False, hooks=180
    ),
    "Redis is killed": RedisTrouble(lambda team: team.server.stop(signal.SIGKILL), REDIS_AWAY, REDIS_AWAY, arrives=False),
    "Redis is frozen": RedisTrouble(
        lambda team: team.server.process.send_signal(signal.SIGSTOP), REDIS_AWAY, REDIS_AWAY, arrives=False
    ),
    "every connection is cut": RedisTrouble(
        lambda team: [team.server.cli("CLIENT", "KILL", "TYPE", it, "SKIPME", "yes") for it in ("normal", "pubsub")],
        times=50,
    ),
    "the publishers are killed": RedisTrouble(
        lambda team: at_once(*[machine.end_publisher for machine in team.emitters]), times=8
    ),
    "a monitor is killed": RedisTrouble(lambda team: team.monitors[1].kill(), arrives=False, times=3),
    **{name: redis_refused(*row) for name, row in story_cases("tables.txt", "refusals").items()},
    "no right to PUBLISH": RedisTrouble(
        lambda team: team.server.cli("ACL", "SETUSER", "default", "-publish"),
        {"stream": "ok", "channelState": "refused", "channelReason": "publish"},
    ),
}  # fmt: skip


def redis_says(ask: Any, expected: dict[str, str]) -> None:
    def matches() -> bool:
        said = ask()
        return all(re.search(pattern, str(said.get(name)), re.I) for name, pattern in expected.items())

    eventually(matches, 60, f"{expected} in {ask()}")


REDIS_SOAKS = ("every connection is cut", "Redis is frozen", "the publishers are killed")
REDIS_MARKED = [pytest.param(it, marks=[pytest.mark.slow] * (it in REDIS_SOAKS)) for it in REDIS_TROUBLES]


@pytest.mark.parametrize("name", REDIS_MARKED)
def test_no_trouble_with_redis_loses_or_doubles_an_event(team: RedisTeam, name: str) -> None:
    trouble, flow = REDIS_TROUBLES[name], RedisFlow(team, name)
    flow.bulk(90)
    if trouble.publisher.get("stream") == "refused":
        flow.check()  # a stream under its name must be there to be put aside
    for _ in range(trouble.times):
        trouble.do(team)
        (flow.hooks if trouble.times == 1 else flow.bulk)(trouble.hooks)
        if trouble.arrives and trouble.times == 1:
            flow.check()
        for machine in team.emitters:
            redis_says(machine.publisher, trouble.publisher)
        for monitor in team.monitors if trouble.times == 1 else ():
            redis_says(monitor.redis, trouble.monitor)
        assert trouble.arrives or trouble.times > 1 or all(machine.spooled() for machine in team.emitters)
        team.mend()
    flow.hooks(30)
    flow.check()
    for monitor in team.monitors:
        about = monitor.wait_until("connected")
        assert (about["attempt"], about["reason"]) == (0, None)
    kept = {json.loads(event)["data"].get("toolUseId") for event in team.server.streamed()}
    assert kept >= {marker for said in flow.said.values() for marker in said[-10:]}
    for machine in team.emitters:
        redis_says(machine.publisher, {"stream": "ok", "channelState": "ok"})


class Relay:
    """A port that passes what it gets to another one, and back; `change` takes each piece, and if it is a request."""

    def __init__(self, port: int, change: Any, piece_bytes: int = 1 << 16) -> None:
        self.target, self.change, self.piece_bytes = ("127.0.0.1", port), change, piece_bytes
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with self.listener, contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.socket()
                for sock in (near, far):  # little is under way
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * self.piece_bytes)
                far.connect(self.target)
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self.piece_bytes):
                target.sendall(self.change(data, is_request))
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)


def slow_link(server: RedisServer, is_slow_up: bool) -> Any:
    """Return a way to a Redis on which the bytes to it, or those from it, pass at 20 kB a second."""

    def change(data: bytes, is_request: bool) -> bytes:
        time.sleep(len(data) / 20_000 * (is_request == is_slow_up))
        return data

    return contextlib.closing(Relay(server.port, change, 2048))


def test_a_monitor_catches_up_over_a_slow_link(make: Any) -> None:
    server, redis = make(RedisServer), pytest.importorskip("redis")
    with contextlib.closing(redis.Redis(port=server.port)) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(75):  # 100 s of the link
            event = {"id": f"id-{number}", "sessionId": "far", "machineId": "far", "eventType": "user_prompt"}
            event |= {"hookType": "UserPromptSubmit", "data": {"message": f"{number} " + "word " * 5000}}
            pipeline.xadd(REDIS_STREAM, {"event": json.dumps(event)})
        pipeline.execute()
    with slow_link(server, is_slow_up=False) as link:
        make(RedisMachine, config=server.settings(port=link.port, maxRetries=None)).serve().gets(5, "far")


@pytest.mark.slow
def test_a_backlog_leaves_over_a_slow_link(make: Any) -> None:
    server = make(RedisServer)
    with slow_link(server, is_slow_up=True) as link:
        machine = make(RedisMachine, config=server.settings(port=link.port))
        for number in range(15):  # 9 s of the link
            machine.spool(f"small-{number}", text="words " * 1000)
        machine.spool("large", text="words " * 10_000)  # 6 s
        machine.say("last")
        eventually(lambda: machine.publisher().get("state") == "publishing", 60, "what it does")
        assert machine.spooled(), "it is said only at the end"
        machine.publishes_all()
    markers = [json.loads(event)["data"]["toolUseId"] for event in server.streamed()]
    assert list(dict.fromkeys(markers)) == [*(f"small-{number}" for number in range(15)), "large", "last"]


def test_what_the_stream_delivered_and_waits_holds_up_no_machine(make, monkeypatch):
    server, home, takes, stored = make(RedisServer), new_home(), threading.Event(), []

    def take(lines: list[cm.RemoteLine]) -> bool:
        stored.extend(line for line, _ in lines if takes.is_set())
        return takes.is_set()

    monkeypatch.setattr(cm, "REDIS_PING_INTERVAL_S", 0.1)
    path = pathlib.Path(home + "/monitor.config.json")
    path.write_text(json.dumps({"mode": "redis", **server.settings()}))
    loop = cm.EventLoop()
    thread = threading.Thread(target=loop.run)
    thread.start()
    here = cm.Settings(home, str(path), "box", ee.load_config(str(path), cm.KEYS)[0])
    link = cm.RedisLink(loop, here, take, bool)
    try:
        eventually(lambda: server.clients("pubsub"), what="the subscription")
        lines = [json.dumps({"id": f"{it}", "machineId": it}) for it in ("stream", "channel", "later")]
        server.cli("XADD", REDIS_STREAM, "*", "event", lines[0])
        eventually(lambda: len(link.inbox.waiting) == 1, what="the stream's event")
        server.publish(lines[1].encode())
        eventually(lambda: len(link.inbox.waiting) == 2, what="the channel's event")
        server.cli("XADD", REDIS_STREAM, "*", "event", lines[2])
        assert link.status()["position"] is None and not stored
        takes.set()
        eventually(lambda: len(stored) == 3 and link.status()["position"], what="all of them, once")
        assert sorted(stored) == sorted(line.encode() for line in lines)
    finally:
        link.close()
        loop.stop()
        thread.join(30)
        shutil.rmtree(home)


def test_the_clock_of_another_machine_is_measured_but_not_by_what_waited(team: RedisTeam, make: Any) -> None:
    behind, hour_ms = team.emitters[2], 3_600_000
    event = {"id": str(uuid.uuid4()), "timestamp": cm.now_ms() - hour_ms, "machineId": "slow-clock"}
    line = json.dumps({**event, "hook": payload("Stop", "skewed")}).encode() + b"\n"
    ee.append_to_spool(behind.home + "/spool", line)
    behind.say("now", "skewed")
    for monitor in team.monitors:
        monitor.gets(2, "skewed")
        skews = {it["machineId"]: it["clockSkewMs"] for it in monitor.get("/api/status")["machines"]}
        assert abs(skews["slow-clock"] - hour_ms) < 60_000 and abs(skews["box2"]) < 60_000
    server = make(RedisServer)
    for session, hours in (("days", 60), ("hours", 2)):
        at = cm.now_ms() - hours * hour_ms
        for number in range(2):
            hook = payload("UserPromptSubmit", session, prompt="go")
            wrapped = {"hook": hook, "id": f"{session}{number}", "timestamp": at, "machineId": session}
            event = ee.encode_json(ee.build_event(wrapped, at, session)).decode()
            server.cli("XADD", REDIS_STREAM, f"{at}-{number + 1}", "event", event)
    late = make(RedisMachine, config=server.settings()).serve()
    for session, state in (("hours", "quiet"), ("days", "ended")):
        late.gets(2, session)
        eventually(lambda name=session, state=state: late.sessions()[name]["state"] == state)


def test_redis_cli_publishes_anything_and_sees_plain_events(team: RedisTeam) -> None:
    clients = [monitor.websocket("full") for monitor in team.monitors]
    assert team.server.cli("PUBLISH", REDIS_CHANNEL, '{"test":"message"}') == "2"
    for client, monitor in zip(clients, team.monitors):
        (event,) = client.events(1)
        shown = (event["sessionId"], event["eventType"], event["data"])
        assert shown == ("unknown", "message", {"test": "message"})
        assert [it["id"] for it in monitor.get("/api/events?limit=1")["events"]] == [event["id"]]
        client.close()
    watch = ["redis-cli", "-s", team.server.socket_path, "SUBSCRIBE", REDIS_CHANNEL]
    with subprocess.Popen(watch, stdout=subprocess.PIPE) as watching:
        try:
            assert [watching.stdout.readline() for _ in range(3)][0] == b"subscribe\n"
            team.emitters[0].say("plain", "plain", tool_name="Bash", tool_input={"command": "é \U0001f600\n"})
            kind, channel, line = (watching.stdout.readline().rstrip(b"\n") for _ in range(3))
        finally:
            watching.kill()
    assert (kind, channel) == (b"message", REDIS_CHANNEL.encode())
    event = json.loads(line)
    assert ee.is_whole_event(event) and "hook" not in event and line.isascii()
    assert (event["machineId"], event["sessionId"], event["hookType"]) == ("box0", "plain", "PreToolUse")
    assert event["data"]["toolInput"] == {"command": "é \U0001f600\n"}
    hook_check_form(event)


def test_garbage_from_redis_is_quarantined_and_blocks_no_event(team: RedisTeam) -> None:
    garbage = [*BAD_LINES.values(), b"", b" ", b"null", b"\x00", b"1" * 5000]
    odd = [line for line in ODD_LINES if b'"odd"' in line]

    def quarantined(monitor: RedisMachine) -> int:
        return int(monitor.get("/api/status")["events"]["quarantined"])

    before, flow = [quarantined(monitor) for monitor in team.monitors], RedisFlow(team, "among-garbage")
    for message in (*garbage, *odd):
        team.server.publish(message)
    foreign = [team.server.cli("XADD", REDIS_STREAM, "*", "nothing", "of ours")]
    foreign.append(team.server.cli("XADD", REDIS_STREAM, "*", "event", given=bytes(range(256))))
    flow.bulk(30)
    flow.check()
    for monitor, known in zip(team.monitors, before):
        all_of_it = known + len(garbage)
        eventually(functools.partial(lambda it, count: quarantined(it) >= count, monitor, all_of_it))
        assert quarantined(monitor) <= all_of_it + 2
        stored = functools.partial(lambda it: [event["sessionId"] for event in it.stored_events()], monitor)
        eventually(lambda stored=stored: stored().count("odd") == len(odd))
        assert metrics_of(monitor)["contextuate_redis_connected"] == {(("state", "connected"),): 1}
        assert "Traceback" not in install_text(monitor.home + "/monitor.log")
        assert os.path.getsize(monitor.home + "/quarantine.log")
    assert team.server.cli("XDEL", REDIS_STREAM, *foreign) == "2", "the other tests read this stream"


def test_no_message_through_redis_changes_what_a_user_did(team: RedisTeam) -> None:
    actions = (
        {"action": "rename", "label": "theirs"}, {"action": "pin", "pinned": True}, {"action": "hide", "hidden": True},
        {"action": "set_parent", "parentSessionId": "theirs"},
    )  # fmt: skip
    for monitor in team.monitors:
        monitor.emit(payload("UserPromptSubmit", "ours", prompt="our words"))
    before = [monitor.sessions()["ours"] for monitor in team.monitors]
    for action in actions:
        other = {"sessionId": "ours", "data": action}
        given_hook = {"hook_event_name": "Monitor", "session_id": "ours", **action}
        for message in (
            {"eventType": "session_meta", "hookType": "Monitor", **other}, {"eventType": "session_meta", **other},
            {"eventType": "message", "hookType": "Monitor", **other}, given_hook, {"id": str(uuid.uuid4()), "hook": given_hook},
        ):  # fmt: skip
            team.server.publish(json.dumps(message).encode())
    for monitor, session in zip(team.monitors, before):
        monitor.gets(1 + 5 * len(actions), "ours")
        shown = monitor.sessions()["ours"]
        for field in ("label", "isPinned", "hidden", "parentSessionId"):
            assert shown[field] == session[field]


def test_secrets_and_long_fields_stay_on_their_machine(team: RedisTeam) -> None:
    secret, machine = hook_token("ghp_", 36), team.emitters[0]
    said = {"token": secret, "text": f"use {secret} now"}
    machine.say("secret", "secret", tool_name="Write", tool_input=said)
    machine.say("long", "secret", tool_name="Write", tool_input={"content": "é" * 50_000, "rest": "kept"})
    for monitor in team.monitors:
        monitor.gets(2, "secret")
    machine.publishes_all()
    places = [machine.home, team.server.directory, *(monitor.home for monitor in team.monitors)]
    found = subprocess.run(["grep", "-rlF", secret, *places], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    replaced, cut = (it["data"] for it in team.monitors[0].stored_events() if it["sessionId"] == "secret")
    assert replaced["toolInput"]["token"].startswith("[redacted:")
    assert cut["truncated"] == {"toolInput.content": 100_000} and cut["toolInput"]["rest"] == "kept"
    assert 65_000 < len(cut["toolInput"]["content"].encode()) < 66_000


def test_one_publisher_serves_any_number_of_hooks(team: RedisTeam) -> None:
    machine, markers = team.emitters[1], [f"box1-{number}" for number in range(80)]
    machine.end_publisher()
    said = [payload("PreToolUse", "at-once", tool_use_id=marker) for marker in markers]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        hooks = [pool.submit(hook_call, machine.hook, hook, machine.environment) for hook in said]
        seen = {pid for hook in hooks if hook.result() == "" for pid in machine.publishers()}
    assert len(seen) == 1
    for monitor in team.monitors:
        monitor.gets(80, "at-once")
        assert sorted(monitor.arrivals("at-once")["box1"]) == sorted(markers)


@pytest.mark.parametrize("closed", ["1>&-", "0<&- 1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_one_publisher_starts_where_standard_streams_are_closed(make: Any, closed: str) -> None:
    machine = make(RedisMachine, config={"mode": "redis", "redis": {"port": redis_free_port()}})
    start = "import emit_event, sys; sys.exit(sys.argv[1] not in emit_event.ensure_publisher(sys.argv[2]))"
    for answer in ("publisher started", "a publisher runs already", "a publisher runs already"):
        command = [f'exec "$0" -c "$1" "$2" "$3" {closed}', sys.executable, start, answer, machine.home]
        subprocess.run(["/bin/sh", "-c", *command], cwd=ROOT, env=machine.environment, check=True)
    assert eventually(lambda: len(machine.publishers()) == 1 and machine.publisher(), what="one publisher")
    assert "the last to 0 subscribers" in in_process(machine, "doctor").stdout


# -- configurations that cannot work -------------------------------------------
#
# One machine for each, all started at once; the tests look at what each of them says.

REDIS_PASSWORD, REDIS_WRONG_PASSWORD = "correct-horse-battery-9217", "wrong-staple-4711"


REDIS_FAULTS = story_cases("tables.txt", "faults of Redis")
REDIS_WAYS = story_cases("tables.txt", "ways to Redis")


@pytest.fixture(scope="module")
def redis_servers() -> Iterator[Any]:
    """Give a function: a server and keys of these tables → the server and a machine's configuration."""
    with redis_parts() as maker:
        strange, ours = maker(RedisCertificates), maker(RedisCertificates)
        elsewhere, plain = maker(RedisCertificates, "DNS:redis.example"), maker(RedisServer)
        servers = {
            "plain": plain,
            "stopped": maker(RedisServer),
            "locked": maker(RedisServer, password=REDIS_PASSWORD),
            "ruled": maker(
                RedisServer,
                "user default on nopass ~* &* +@all",
                f"user nothing on >{REDIS_PASSWORD} resetchannels +ping",
                f"user elsewhere on >{REDIS_PASSWORD} ~other &other +@all",
                f"user team on >{REDIS_PASSWORD} ~* &* +@all",
            ),
            "tls": maker(RedisServer, certificates=ours),
            "tls locked": maker(RedisServer, certificates=ours, password=REDIS_PASSWORD),
            "tls elsewhere": maker(RedisServer, certificates=elsewhere),
            "tls asking": maker(RedisServer, "tls-auth-clients yes", certificates=ours),
            "replica": maker(RedisServer, f"replicaof 127.0.0.1 {plain.port}"),
        }
        servers["stopped"].stop()

        def configure(name: str, keys: dict[str, Any]) -> tuple[RedisServer, dict[str, Any]]:
            server = servers[name]
            words = {"STRANGE": strange.directory, "CERTIFICATES": ours.directory, "PORT": str(server.port)}
            words |= {"SOCKET": server.socket_path, "PASSWORD": REDIS_PASSWORD, "WRONG": REDIS_WRONG_PASSWORD}
            text = json.dumps(server.settings(**keys))
            for word, meaning in words.items():
                text = text.replace(word, meaning)
            return server, json.loads(text)

        yield configure


def redis_shown_and_stored(machine: RedisMachine) -> Iterator[str]:
    """Yield all that a machine shows, stores (but for its configuration) and passes to processes."""
    yield json.dumps([machine.get("/api/config"), machine.get("/api/status"), machine.sessions()])
    yield in_process(machine, "status").stdout
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(machine.home) for name in names]
    paths = [path for path in paths if not path.endswith(("/monitor.config.json", ".sock"))]
    for path in (*paths, *(f"/proc/{pid}/cmdline" for pid in [machine.pid, *machine.publishers()])):
        with open(path, "rb") as file:
            yield file.read().decode("utf-8", "replace")


def test_every_fault_is_said_in_a_clear_sentence_and_keeps_its_event(make: Any, redis_servers: Any) -> None:
    def complain(name: str) -> tuple[RedisMachine, dict[str, str]]:
        machine = make(RedisMachine, config=redis_servers(*REDIS_FAULTS[name][:2])[1])
        machine.spool("kept")
        machine.serve()  # and that starts a publisher for what lies in the spool

        def publishers_words() -> str:
            about = machine.publisher()
            return str(about.get("reason") or about.get("streamReason") or "")

        words = {"publisher": eventually(publishers_words, 60, name + ": publisher")}
        if name != "read-only replica":
            words["monitor"] = eventually(lambda: machine.redis()["reason"], 60, name + ": monitor")
            assert machine.redis()["state"] in ("waiting", "connecting", "given_up")
        return machine, words

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        complaints = dict(zip(REDIS_FAULTS, pool.map(complain, REDIS_FAULTS)))
    for name, (machine, words) in complaints.items():
        for part, sentence in words.items():
            assert re.search(REDIS_FAULTS[name][2], sentence, re.I), (name, part, sentence)
            assert len(sentence) < 300 and "\n" not in sentence
            assert not re.search(r"Traceback|Error\(|Errno|None|<class|_ssl\.c", sentence), sentence
            assert [said.get(part) for _, said in complaints.values()].count(sentence) == 1, sentence
        if name == "read-only replica":  # its monitor has got it by the channel
            assert machine.arrivals() == {"testbox": ["kept"]}
        else:
            assert [line["hook"]["tool_use_id"] for line in hook_spooled(machine.home)] == ["kept"]
        assert name != "wrong password" or "password" in in_process(machine, "doctor").stdout
        for text in redis_shown_and_stored(machine) if "password" in machine.config["redis"] else ():
            assert REDIS_PASSWORD not in text and REDIS_WRONG_PASSWORD not in text, name


def test_every_way_to_a_redis_works(make: Any, redis_servers: Any) -> None:
    def go(name: str) -> None:
        place, keys, database = REDIS_WAYS[name]
        server, config = redis_servers(place, keys)
        environment = {"CONTEXTUATE_REDIS_PASSWORD": REDIS_PASSWORD} if "environment" in name else {}
        machine = make(RedisMachine, config=config, more_environment=environment)
        ee.redis_client(ee.load_config(machine.home + "/monitor.config.json", cm.KEYS)[0]).close()
        machine.spool("there", session=name)  # ways to one server hear each other
        about = machine.serve().wait_until("connected")
        machine.gets(1, name)
        assert machine.arrivals(name) == {"testbox": ["there"]}
        channel, has_stream = keys.get("channel", REDIS_CHANNEL), "streamMaxLength" not in keys
        assert {field: about[field] for field in ("tls", "channel", "stream", "streamState")} == {
            "tls": "tls" in place, "channel": channel, "stream": f"{channel}:stream" if has_stream else None,
            "streamState": "ok" if has_stream else "off",
        }, name  # fmt: skip
        assert server.cli("-n", str(database), "EXISTS", f"{channel}:stream") == str(int(has_stream)), name

    at_once(*(functools.partial(go, name) for name in REDIS_WAYS))


class DrippingServer:
    """A server that sends a byte of an endless answer now and then, so that no read of its answer times out."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server(("127.0.0.1", port))
        self.listener.settimeout(0.05)
        self.stopping, self.thread = threading.Event(), threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        with contextlib.ExitStack() as connections, self.listener:
            accepted: list[socket.socket] = []
            while not self.stopping.is_set():
                with contextlib.suppress(OSError):
                    accepted.append(connections.enter_context(self.listener.accept()[0]))
                    accepted[-1].sendall(b"$100000\r\n")
                for sock in accepted:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")

    def remove(self) -> None:
        self.stopping.set()
        self.thread.join()


@pytest.mark.slow
def test_a_server_that_does_not_answer_blocks_and_loses_nothing(make: Any) -> None:
    redis = {"host": "127.0.0.1", "port": redis_free_port(), "password": "p", "maxRetries": None}
    dripping = make(DrippingServer, redis["port"])
    machine = make(RedisMachine, config={"mode": "redis", "redis": redis}).serve()
    machine.spool("first")
    eventually(lambda: machine.redis()["attempt"] >= 1, 40, "the monitor notices")
    eventually(lambda: machine.publisher().get("reason"), 40, "the publisher notices")
    assert machine.publisher()["state"] in ("waiting", "connecting")
    for sentence in (machine.redis()["reason"], machine.publisher()["reason"]):
        assert re.search(r"answer|[Tt]ime|reach", sentence), sentence
    machine.spool("second")
    os.kill(machine.pid, signal.SIGTERM)
    eventually(lambda: not alive(machine.pid), 15, "SIGTERM ends the monitor")
    machine.serve()
    dripping.remove()
    make(RedisServer, password="p", port=redis["port"])
    os.kill(machine.pid, signal.SIGHUP)
    machine.gets(2)
    assert machine.arrivals() == {"testbox": ["first", "second"]}


def test_after_its_attempts_the_monitor_gives_up_until_it_is_asked(make: Any) -> None:
    machine = make(RedisMachine, config=(server := make(RedisServer)).settings(maxRetries=2))
    machine.serve().wait_until("connected")
    client = machine.websocket("rows")

    def restart() -> None:
        client.close()
        machine.command("restart", "--no-open")
        machine.know()

    ask = functools.partial(client.ask, "status", type="reconnect_redis")
    hang_up = functools.partial(os.kill, machine.pid, signal.SIGHUP)
    for number, come_back in enumerate((ask, hang_up, restart)):
        server.stop()
        about = machine.wait_until("given_up")
        assert (about["maxRetries"], about["attempt"]) == (2, 2) and about["reason"]
        said = json.dumps(machine.get("/api/status"))
        assert "given up, attempt 2 of 2: " in said
        assert "no longer tries (attempt 2 of 2): Redis at 127.0.0.1" in said
        assert machine.request("/health")[0] == 200
        machine.say(f"away-{number}")
        server.start()
        assert machine.redis()["state"] == "given_up"
        come_back()
        assert machine.wait_until("connected")["reason"] is None
        machine.gets(number + 1)
    assert machine.arrivals() == {"testbox": ["away-0", "away-1", "away-2"]}
    assert re.search(r"gives? up|gave up|given up", install_text(machine.home + "/monitor.log"))


def test_what_was_not_published_is_taken_back_in_local_mode(make: Any) -> None:
    machine = make(RedisMachine, config=(server := make(RedisServer)).settings())
    server.stop()
    assert "\nNot connected yet, trying again: " in machine.command("start", "--no-open").stdout
    eventually(lambda: machine.know().redis()["attempt"] >= 2)
    server.start()
    machine.wait_until("connected")
    kept = [f"kept-{number}" for number in range(20)]

    def restart(config: dict[str, Any]) -> None:
        machine.stop()
        machine.config = config
        machine.write_config({})
        machine.serve()

    machine.say("published")
    machine.gets(1)
    server.stop()
    for marker in kept:
        machine.spool(marker)
    restart({"mode": "local"})
    machine.say("local")
    machine.gets(22)
    server.start()
    eventually(lambda: not machine.publishers() or machine.spooled() == 0)
    restart(server.settings())
    machine.say("again")
    machine.gets(23)
    markers = machine.arrivals()["testbox"]
    assert sorted(markers) == sorted(["published", "local", "again", *kept])
    assert [marker for marker in markers if marker.startswith("kept")] == kept


def test_the_monitor_goes_on_from_its_position_in_the_stream(make: Any) -> None:
    machine = make(RedisMachine, config=(server := make(RedisServer)).settings(streamMaxLength=100))

    def publish(first: int, last: int) -> None:
        for number in range(first, last):
            machine.spool(str(number))
        machine.say(str(last))
        machine.publishes_all()

    publish(1, 6)
    machine.serve().gets(6)
    eventually(lambda: machine.redis()["position"])
    machine.stop()
    publish(7, 8)
    machine.serve().gets(8)
    assert machine.wait_until("connected")["gaps"] == 0
    assert machine.get("/api/status")["events"]["duplicates"] == 0
    machine.stop()
    publish(9, 609)  # more than the stream keeps: a gap, which is reported
    kept = len(server.streamed())
    assert 100 <= kept < 601
    machine.serve().gets(8 + kept)
    assert machine.wait_until("connected")["gaps"] == 1
    assert machine.arrivals()["testbox"][-1] == "609"
    machine.stop()  # the stream is deleted, and a late clock fills it: it is read from its start
    path = machine.home + "/redis-position.json"
    later = {**ee.read_state(path), "position": f"{ee.now_ms() + 86_400_000}-0"}
    ee.write_atomically(path, cm.encode_json(later))
    publish(610, 610)
    machine.serve().gets(9 + kept)


def test_a_deleted_session_does_not_come_back_from_the_stream(make: Any) -> None:
    machine = make(RedisMachine, config=(server := make(RedisServer)).settings())
    assert "\nConnected to Redis at 127.0.0.1" in machine.command("start", "--no-open").stdout
    assert install_text(machine.home + "/hooks/publisher-python") == sys.executable + "\n"
    for marker, session in (("a", "private"), ("b", "private"), ("c", "s1")):
        machine.know().say(marker, session)
    machine.gets(2, "private")
    machine.gets(1)
    machine.websocket().ask("session_deleted", type="delete_session", sessionId="private")
    machine.emit(payload("UserPromptSubmit"), payload("PermissionRequest", tool_name="Bash", tool_input={}))
    machine.stop()
    pathlib.Path(machine.home, "redis-position.json").unlink(missing_ok=True)  # all of the stream is read
    stored = next(pathlib.Path(machine.home).glob("events/*/s1.jsonl"))
    stored.write_bytes(stored.read_bytes()[:-9] + b"\n")  # the question that is to be offered again
    machine.serve()
    eventually(lambda: machine.get("/api/status")["events"]["duplicates"] == 3)
    assert set(machine.sessions()) == {"s1"} and len(server.streamed()) == 3


def test_a_publisher_that_ends_at_once_is_started_again_only_once(make: Any) -> None:
    machine = make(RedisMachine, config=make(RedisServer).settings()).serve()
    ends = {"py": '#!/bin/sh\necho >> "$0.starts"\n', "hooks/publisher-python": f"{machine.home}/py\n"}
    for name, text in {**ends, "publisher.json": '{"pid": 1, "state": "idle"}'}.items():
        ee.write_atomically(f"{machine.home}/{name}", text.encode(), 0o700)
    time.sleep(3 * cm.TICK_INTERVAL_S)  # the monitor looks at it once in each
    assert install_text(machine.home + "/py.starts") == "\n", "it is started once"


def test_the_publisher_goes_on_in_the_python_that_has_redis_py(make: Any) -> None:
    machine = make(RedisMachine, config=(server := make(RedisServer)).settings())
    without = machine.home + "/python-without"
    ee.write_atomically(without, f'#!/bin/sh\nexec "{cm.base_interpreter()}" -S "$@"\n'.encode(), 0o700)
    machine.installed_command()
    ee.write_atomically(machine.home + "/hooks/publisher-python", without.encode() + b"\n")
    machine.say("first")
    eventually(lambda: "redis-py is missing" in str(machine.publisher().get("reason")), 60, "the reason")
    assert not server.streamed() and cm.record_publisher_python(machine.home)
    machine.publishes_all()  # by itself
    assert [json.loads(event)["data"]["toolUseId"] for event in server.streamed()] == ["first"]


# Emits at moments around the exit of the publisher that the event before had started. A new publisher is a fork of
# this process: 150 new interpreters would take long. Half of them pause before or after they give their lock back, as
# on a busy machine: else an exit that looks for events before that, not after, shows in one of 700 rounds.
REDIS_RACER = """
import encodings.utf_8_sig, fcntl, os, posix, random, secrets, signal, sys, time, types
root, home, rounds, seed = sys.argv[1:]
sys.path.insert(0, root)
import redis
import emit_event as ee
ee.PUBLISHER_QUIET_S, ee.BUSY_S, ee.IDLE_POLL_S = 0.005, 0.0, 0.001

def spawn(python, arguments, environment, **_):
    return os.fork() or ee.run_publisher(int(arguments[-1]))  # which never returns
def flock(fd, how):
    before, after = dice.choice(((0, 0), (0, 0), (0.001, 0), (0, 0.001))) if how == fcntl.LOCK_UN else (0, 0)
    time.sleep(before)
    fcntl.flock(fd, how)
    time.sleep(after)
ee.posix = types.SimpleNamespace(**{**vars(posix), "posix_spawn": spawn})
ee.fcntl = types.SimpleNamespace(**{**vars(fcntl), "flock": flock})
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
dice, started, wait_s = random.Random(seed), 0, ee.PUBLISHER_QUIET_S
for number in range(int(rounds)):
    line = b'{"id":"%s-%d","timestamp":1,"machineId":"m","hook":{"hook_event_name":"Stop"}}\\n' % (seed.encode(), number)
    ee.append_to_spool(home + "/spool", line)
    found_none = ee.ensure_publisher(home).startswith("publisher started")
    started += found_none
    wait_s = max(0.0, wait_s + (-0.0005 if found_none else 0.0005))  # the exit is met whatever the machine's speed
    deadline = time.monotonic() + 20
    while ee.spool_segments(home + "/spool"):
        if time.monotonic() > deadline:
            sys.exit(f"event {number} of {seed} was left in the spool")
        time.sleep(0.0005)
    time.sleep(wait_s + dice.uniform(0.0, 0.001))
print(started)
"""


@pytest.mark.slow
def test_no_event_is_left_behind_around_the_publishers_exit(make: Any) -> None:
    server, workers, rounds = make(RedisServer), 3, 120
    config = {"mode": "redis", "redis": {"url": f"unix://{server.socket_path}"}}
    machines = [make(RedisMachine, config=config) for _ in range(workers)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", REDIS_RACER, ROOT, machine.home, str(rounds), f"racer{number}"],
            env=machine.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number, machine in enumerate(machines)
    ]  # fmt: skip
    outcomes = [(*racer.communicate(timeout=300), racer.returncode) for racer in racers]
    assert [(errors, code) for _, errors, code in outcomes] == [("", 0)] * workers
    started, total = sum(int(out) for out, _, _ in outcomes), workers * rounds
    assert total >= 300 and total * 0.2 < started < total * 0.8, "met before and after its exit"
    found = [json.loads(line)["id"] for line in server.streamed()]
    assert sorted(found) == sorted(f"racer{n}-{number}" for n in range(workers) for number in range(rounds))


class RedisSentinels:
    """A primary with two replicas, and three sentinels that watch them and fail over within seconds."""

    def __init__(self, make: Any) -> None:
        self.primary = make(RedisServer)
        self.replicas = [make(RedisServer, f"replicaof 127.0.0.1 {self.primary.port}") for _ in range(2)]
        eventually(lambda: "connected_slaves:2" in self.primary.cli("INFO", "replication"), 30)
        watch = (
            f"sentinel monitor team 127.0.0.1 {self.primary.port} 2",
            "sentinel down-after-milliseconds team 700", "sentinel failover-timeout team 4000",
        )  # fmt: skip
        self.sentinels = [make(RedisServer, *watch, mode="--sentinel") for _ in range(3)]
        master = ("SENTINEL", "MASTER", "team")
        found = lambda: all("num-other-sentinels\n2" in it.cli(*master) for it in self.sentinels)  # noqa: E731
        eventually(found, 30, "all of them")

    def settings(self) -> dict[str, Any]:
        return {"sentinels": [f"127.0.0.1:{it.port}" for it in self.sentinels], "master": "team", "port": 1}


class RedisCluster:
    """Three primaries with all slots between them, and a replica of the one that has the stream."""

    def __init__(self, make: Any) -> None:
        lines = ("cluster-enabled yes", "cluster-node-timeout 1000", "cluster-replica-validity-factor 0")
        self.servers = [make(RedisServer, *lines) for _ in range(4)]
        *first, added = [f"127.0.0.1:{server.port}" for server in self.servers]
        self.manage("create", *first, "--cluster-yes")
        eventually(lambda: "cluster_state:ok" in self.servers[0].cli("CLUSTER", "INFO"), 30, "the cluster")
        slot = int(self.servers[0].cli("CLUSTER", "KEYSLOT", REDIS_STREAM))
        self.primary, self.replicas = self.servers[slot * 3 // 16384], self.servers[3:]
        primary_id = self.primary.cli("CLUSTER", "MYID")
        self.manage("add-node", added, first[0], "--cluster-slave", "--cluster-master-id", primary_id)
        is_up = "master_link_status:up"
        eventually(lambda: is_up in self.replicas[0].cli("INFO", "replication"), 30, "the replica")
        eventually(lambda: all("slave" in it.cli("CLUSTER", "NODES") for it in self.servers), 30)

    @staticmethod
    def manage(*arguments: str) -> None:
        subprocess.run(["redis-cli", "--cluster", *arguments], check=True, capture_output=True, timeout=60)

    def settings(self) -> dict[str, Any]:
        return {"cluster": [f"127.0.0.1:{it.port}" for it in self.servers[:3]]}


def test_what_a_connection_sent_last_is_sent_again_however_long_it_was_idle_before_it_broke(
    make, monkeypatch
):
    server = make(RedisServer)
    machine = make(RedisMachine, config={"redis": {"host": "127.0.0.1", "port": server.port}})
    publisher = ee.Publisher(machine.home, machine.home + "/monitor.config.json", -1)
    monkeypatch.setattr(ee, "RESEND_S", 0.2)
    for number in range(3):
        publisher._add({"eventType": "message", "id": f"e{number}"})
        if number == 2:
            server.stop(signal.SIGKILL)
        publisher._publish()
        time.sleep(0.3)  # longer than what is sent again
    assert [event_id for event_id, _ in publisher._batch] == ["e1", "e2"]


def test_an_idle_publisher_sends_again_when_its_connection_breaks_and_no_event_follows(make):
    server = make(RedisServer, "appendonly no")
    machine = make(
        RedisMachine, config={"mode": "redis", "redis": {"host": "127.0.0.1", "port": server.port}}
    )
    machine.say("e1")
    machine.publishes_all()
    server.stop(signal.SIGKILL)  # and with it the stream
    eventually(lambda: machine.publisher()["state"] == "waiting", 10, "notice of the broken connection")
    server.start()
    eventually(
        lambda: server.cli("XLEN", "contextuate:events:stream") == "1", 30, "the event in the new stream"
    )
    xlen = functools.partial(server.cli, "XLEN", "contextuate:events:stream")
    for count in ("2", "3"):
        assert server.cli("CLIENT", "KILL", "TYPE", "normal") == "1"
        eventually(lambda count=count: xlen() == count, 30, "the event once more")
    server.cli("CLIENT", "KILL", "TYPE", "normal")
    time.sleep(1)
    assert xlen() == "3"  # a server may close whatever is idle


@pytest.mark.parametrize("kind", [RedisSentinels, RedisCluster])
def test_a_failover_loses_and_doubles_no_event(make, kind):
    servers = kind(make)
    config = {"mode": "redis", "redis": {**servers.settings(), "maxRetries": None}}
    emitter, other = (make(RedisMachine, config=config, machine_id=name).serve() for name in ("m1", "m2"))
    for machine in (emitter, other):
        machine.wait_until("connected")
    wanted = [f"t{number}" for number in range(120)]
    for number, marker in enumerate(wanted):
        if number == 40:
            servers.primary.stop(signal.SIGKILL)
        if number == 80:
            # Unchecked: a sentinel cuts the connections of the replica that becomes the primary.
            roles = lambda: [it.cli("INFO", "replication", check=False) for it in servers.replicas]  # noqa: E731
            eventually(lambda found=roles: "role:master" in str(found()), 30, "a new primary")
        emitter.say(marker)
    emitter.publishes_all()
    for machine in (emitter, other):
        machine.gets(len(wanted))
        (stored,) = machine.arrivals().values()
        assert (len(stored), set(stored)) == (len(wanted), set(wanted))
    servers.primary.start()  # it comes back as a replica, which takes no events
    emitter.say("after")
    for machine in (emitter, other):
        machine.gets(len(wanted) + 1)
    # a sentinel that makes the old primary a replica cuts its connections once more
    eventually(lambda: in_process(emitter, "doctor").returncode == 0, 60, "doctor")


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.77"], ids=["refused", "black hole"])
def test_debug_holds_a_hook_up_for_a_second_at_most(make, host):
    machine, taken_s = make(RedisMachine, config={"mode": "redis", "redis": {"host": host, "port": 1}}), []
    for _ in range(5):
        begin = time.monotonic()
        notes = hook_call(machine.hook, payload("Stop"), machine.environment, CONTEXTUATE_DEBUG="1")
        taken_s.append(time.monotonic() - begin)
        assert "no outcome after 600 ms: " in notes, notes
    assert min(taken_s) < 2.0  # of which its start takes up to one on a slow machine


def test_two_machines_of_one_account_share_its_limits(team: RedisTeam) -> None:
    five, seven = (int(time.time()) + hours * 3600 for hours in (3, 60))
    for machine, percent in zip(team.emitters, (41, 42.5)):
        in_process(machine, "install", "--status-line")
        machine.say("start", f"of-{machine.machine_id}")
        line = status_line(f"of-{machine.machine_id}", five=(percent, five), seven=(7, seven))
        shown = status_line_call(
            machine.client_settings()["statusLine"]["command"], line, machine.environment
        )
        assert shown[::2] == ("Opus 5.5 · 4 % · $0.30\n".encode(), 0)
    keys = {ee.machine_key(machine.home) for machine in team.emitters[:2]}
    for monitor in team.monitors:
        limits = lambda it=monitor: it.get("/api/status")["limits"]  # noqa: E731
        (account,) = eventually(lambda of=limits: [it for it in of() if set(it["machines"]) == keys])
        assert account["fiveHour"]["percent"] == 42.5 and account["sevenDay"]["resetsAt"] == seven * 1000
        assert {monitor.sessions()[f"of-box{n}"]["costSource"] for n in range(2)} == {"client"}


# ---- Containers: an agent in a container reports to the monitor of its host --------------------------------


@needs_containers
def test_a_container_with_the_mounted_directory_has_name_tokens_and_end(running):
    session = str(uuid.uuid4())
    os.makedirs(running.claude_home + "/projects/p")
    transcript = f"{running.claude_home}/projects/p/{session}.jsonl"
    shutil.copy(usage_transcript("simple"), transcript)
    said = payload("UserPromptSubmit", session, prompt="x", transcript_path=transcript)
    ask = payload("PermissionRequest", session, tool_name="Bash", tool_input={"command": "x"})
    with in_container(running, *client_script(said, {**said, "hook_event_name": "Stop"}, said, ask)):
        eventually(lambda: running.sessions().get(session, {}).get("state") == "waiting")
        found = running.sessions()[session]
        assert found["machineId"] == "3f2a9c1b77de"
        base, _, namespace = found["machineKey"].partition("/")
        assert base == cm.machine_host(ee.machine_key(running.home)) and namespace
        eventually(lambda: running.sessions()[session]["tokenUsage"])
        time.sleep(cm.CONTAINERS_INTERVAL_S + 1.5)  # the monitor has checked its process
        assert running.sessions()[session]["state"] == "waiting"
    ended = eventually(lambda: (it := running.sessions()[session])["state"] == "ended" and it, 30)
    assert ended["reason"]["detail"] == "its process exited"


@needs_containers
@pytest.mark.skipif(not BWRAP, reason="bubblewrap is missing")
def test_a_directory_mounted_at_another_path_delivers_through_the_spool(running):
    inner = ["env", "CONTEXTUATE_HOME=/mnt", *client_script(payload("Stop", "far"), then=":")]
    argv = contained(running.home, *inner)
    argv[argv.index("--bind") : argv.index("--bind")] = ["--tmpfs", "/tmp", "--ro-bind", ROOT, ROOT]
    argv[argv.index("--bind") + 2] = "/mnt"
    subprocess.run(argv, env=running.environment, timeout=30, check=True)
    assert eventually(lambda: running.sessions().get("far"))["machineId"] == "testbox"
    (event,) = running.stored_events()
    host = cm.machine_host(ee.machine_key(running.home))
    assert event["spooled"] and event["machineKey"].startswith(host + "/")


@needs_containers
def test_a_container_reports_through_redis_from_a_directory_of_its_own(team):
    host, guest = team.monitors[0], team.emitters[0]
    guest.end_publisher()
    hook = f"printf %s {shlex.quote(json.dumps(payload('Stop', 'far')))} | CLAUDE_PID=$$ {guest.hook}"
    with in_container(guest, "sh", "-c", f"{hook}; sleep 60"):
        host.gets(1, "far")
    (event,) = [it for it in host.stored_events() if it["sessionId"] == "far"]
    base = cm.machine_host(ee.machine_key(guest.home))
    assert event["machineId"] == "3f2a9c1b77de" and event["machineKey"].startswith(base + "/")
    assert not ee.machine_key(host.home).startswith(base) and host.sessions()["far"]["state"] == "idle"


# ---- Safe and unbreakable: strangers, other users, hostile bytes, and bad days for disks, clocks and processes
# What other rooms test of this is there: Host, Origin, token and paths in the room of the protocol, kills and
# full disks in the room of processes.


@contextlib.contextmanager
def safe_stranger() -> Iterator[Any]:
    """Give a function that calls another one in a process of another user."""

    def become_stranger() -> None:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)

    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, context, become_stranger) as pool:
        yield lambda work, *arguments: pool.submit(work, *arguments).result(60)


def safe_send(path: str, line: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(line)
        return sock.recv(1)


def safe_leave(port: int, request: bytes) -> None:
    """Send requests, and close each connection at once: its user is then unknown."""
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(request)


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/net/tcp")
def test_another_user_of_the_machine_gets_nothing_without_the_token(running):
    line = json.dumps(payload("Stop", "stranger")).encode() + b"\n"
    running.emit(payload("UserPromptSubmit", prompt="precious"))
    run_hook(running.installed_command(), json.dumps(payload("Stop")).encode(), running.environment)
    page, live = f"127.0.0.1:{running.port}", f"127.0.0.1:{running.ws_port}"
    origin = f"Origin: http://{page}"
    bearer = "Authorization: Bearer " + install_text(running.home + "/token").strip()
    posted = protocol_get(page, origin, "Content-Length: 2", path="/api/hooks", method="POST") + b"{}"
    asked = (protocol_get(page, path="/"), protocol_get(page, path="/api/events"), posted)
    refused = [(running.port, request) for request in asked]
    refused += [(running.ws_port, protocol_upgrade(live, *more)) for more in ((), (origin,))]
    files = [os.path.join(folder, name) for folder, _, names in os.walk(running.home) for name in names]
    own = "/claude|__pycache__|monitor.config.json|[.]sock"  # the user's own, our program, the socket
    files = [path for path in files if not re.search(own, path)]
    # The directory keeps others out; so does every file in it, should it stand open.
    for mode in (0o700, 0o777):
        for folder, _, _ in os.walk(running.home):
            os.chmod(folder, mode)
        with safe_stranger() as ask:
            for port, request in refused:
                status, _, body = ask(protocol_exchange, port, request)
                assert status == 401 and not re.search(b"precious|testbox", body), (mode, request)
            ask(safe_leave, running.port, posted)
            events = protocol_get(page, bearer, path="/api/events")
            status, _, body = ask(protocol_exchange, running.port, events)
            assert status == 200 and b"precious" in body
            assert ask(protocol_exchange, running.ws_port, protocol_upgrade(live, bearer))[0] == 101
            assert [path for path in files if ask(os.access, path, os.R_OK)] == []
            with pytest.raises(PermissionError):
                ask(safe_send, running.socket_path, line)
    os.chmod(running.socket_path, 0o777)  # and if the socket stood open, its user would still be looked at
    with safe_stranger() as ask, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        assert ask(safe_send, running.socket_path, line) == b""
    assert not {"stranger", "unknown"} & running.sessions().keys()


@pytest.mark.parametrize("candidate", ["t" * 32, "t" * 31 + "u", "u" * 32, "", "é"])
def test_tokens_are_compared_in_constant_time(monkeypatch, candidate):
    compared, real = [], cm.hmac.compare_digest
    monkeypatch.setattr(cm.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    for name, prefix in (("authorization", "Bearer "), ("cookie", "a=b; contextuate_token_0=")):
        request = cm.Request("GET", "/", (("host", "here"), (name, prefix + candidate)))
        with contextlib.nullcontext() if candidate == "t" * 32 else pytest.raises(cm.RequestError):
            cm.Access("token", "t" * 32, ["here"], []).check(request, 0, lambda: True)
        assert compared.pop() == (candidate.encode(), b"t" * 32) and not compared


def safe_open_modes(home: str, until: threading.Event) -> set[str]:
    """Return what of ours was ever open to others, looking without a pause until `until` is set."""
    seen = set()
    while not until.is_set():
        for folder, folders, names in os.walk(home):
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if os.lstat(path).st_mode & 0o077:
                        seen.add(re.sub(r"[0-9a-f]{8,}|\d+", "N", path[len(home) :]))
    return seen


def test_no_file_of_ours_is_ever_open_to_others_with_any_umask(monitor):
    done, config = threading.Event(), monitor.home + "/monitor.config.json"
    command, hook = monitor.installed_command(), payload("PreToolUse", tool_use_id="t", tool_input={})
    shutil.rmtree(monitor.claude_home)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        watch, mask = pool.submit(safe_open_modes, monitor.home, done), os.umask(0)
        try:
            hook_call(command, hook, monitor.environment)  # into the spool
            assert in_process(monitor, "start", "--no-open").returncode == 0
            hook_call(command, hook, monitor.environment)
            eventually(lambda: in_process(monitor, "test-event").returncode == 0)
            assert safe_send(monitor.socket_path, b"garbage\n")  # into quarantine.log
            assert in_process(monitor, "stop").returncode == 0
            monitor.write_config({"mode": "redis", "redis": {"port": 1}})
            os.chmod(config, 0o600)
            hook_call(command, hook, monitor.environment, CONTEXTUATE_HOME=os.path.relpath(monitor.home))
            eventually(lambda: {"publisher.json", "emit.log"} <= {*os.listdir(monitor.home)})
        finally:
            os.umask(mask)
            done.set()
        os.kill(json.loads(install_text(monitor.home + "/publisher.json"))["pid"], signal.SIGKILL)
    # the configuration is the user's own file; bytecode holds nothing but our program
    assert not [path for path in watch.result() if "__pycache__" not in path and not config.endswith(path)]


SAFE_FILES = (
    "monitor.log", "emit.log", "monitor.pid", "monitor.run.json", "hook.cache", "publisher.lock", "publisher.json",
    "machine-key", "usage.db", "index.db", "redis-position.json", "last-seq", "token", "quarantine.log", "spool/dropped.log",
    "hooks/publisher-python",
)  # fmt: skip


@pytest.fixture
def precious(tmp_path: Any) -> Iterator[str]:
    """Give a file of another user; it must stay as it is, and alone in its directory."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "precious").chmod(0o644)
    yield str(tmp_path / "precious")
    assert os.listdir(tmp_path) == ["precious"] and (tmp_path / "precious").read_text() == "precious"
    assert stat.S_IMODE((tmp_path / "precious").stat().st_mode) == 0o644


# These end a start by themselves.
SAFE_ALONE = ("monitor.pid", "token", "spool", "events")
SAFE_LINKED = ([name for name in SAFE_FILES if name not in SAFE_ALONE], *SAFE_ALONE)


@pytest.mark.parametrize("names", SAFE_LINKED, ids=lambda names: names if isinstance(names, str) else "files")
def test_no_link_in_place_of_our_file_is_written_through(hook_alone, monitor, names, precious):
    for name in [names] if isinstance(names, str) else names:
        os.makedirs(os.path.dirname(f"{monitor.home}/{name}"), mode=0o700, exist_ok=True)
        os.symlink(precious, f"{monitor.home}/{name}")
    monitor.write_config({"limits": {"fieldBytes": 2048}})
    hook_alone(payload("Stop", "link"))
    started = monitor.command("start", "--no-open", check=False)
    assert started.returncode == isinstance(names, str) or names == "spool"
    hook_alone(payload("Stop", "link"))
    hook_alone(b"not json")
    assert in_process(monitor, "stop").returncode == 0


@needs_root
@pytest.mark.parametrize("kind", SQUATS)
@pytest.mark.parametrize("squatted", ["m.sock", "m.sock.lock", "events"])
def test_what_stands_in_our_place_is_left_alone(hook_alone, monitor, squatted, kind, precious):
    if (squatted, kind) in (("m.sock.lock", "a file"), ("events", "a directory")):
        return  # that is what we make ourselves
    place = f"{monitor.home}/{squatted}"
    SQUATS[kind](place, precious)
    before, refused = os.lstat(place), in_process(monitor, "start", "--no-open")
    assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) == 1
    assert (place if squatted == "events" else monitor.socket_path) in refused.stderr
    hook_alone()
    assert len(hook_alone.spooled()) == 1
    assert (os.lstat(place).st_ino, os.lstat(place).st_size) == (before.st_ino, before.st_size)


@needs_root
@story_table("tables.txt", "foreign", "kind, owner, command")
@pytest.mark.parametrize("where", ["files", "spool"])
def test_what_is_not_ours_is_stepped_around(
    hook_alone, monitor, monkeypatch, precious, where, kind, owner, command
):
    segment = f"spool/{ee.now_ms():013d}-a.jsonl"
    others = "hook.cache last-seq publisher.lock emit.log clock.json deleted-ids monitor.run.json index.db"
    names = (segment, *others.split()) if where == "files" else ("spool",)
    for name in names:
        os.makedirs(os.path.dirname(f"{monitor.home}/{name}"), 0o700, exist_ok=True)
        SQUATS[kind](f"{monitor.home}/{name}", precious)
    hook_alone(payload("Stop", "kept"))
    assert [line["hook"]["session_id"] for line in hook_alone.spooled()] == ["kept"]
    monitor.serve()
    eventually(lambda: "kept" in monitor.sessions(), what="the next segment")
    words, place = in_process(monitor, "status").stdout, re.escape(f"{monitor.home}/{names[0]}")
    if where == "spool" and not kind.endswith("directory"):  # it gets another name
        place, owner, command = place + r"\.\w+\.foreign", owner or "root", "rm -r"
    named = rf"warn +({place}) \(owner: {owner}\) cannot be used by this user: Run: sudo {command} \1\n"
    assert bool(re.search(named, words)) == bool(owner), words
    monitor.kill()
    monkeypatch.setenv("CONTEXTUATE_HOME", monitor.home)
    ee.log_failure("noted")
    assert "noted" in install_text(monitor.home + "/emit.log")
    machine = RedisMachine(monitor.home, {"mode": "redis", "redis": {"port": 1}})
    hook_alone(CONTEXTUATE_DEBUG="0")
    eventually(machine.publishers, what="the publisher's start")
    machine.end_publisher()


def serve_handshakes(listener: socket.socket, clients: cm.WebSocketServer) -> None:
    """Admit everyone to the monitor's own WebSocket side."""

    def adopt(_request: cm.Request, *connection: Any) -> None:
        clients.loop.call_soon(functools.partial(clients.adopt, *connection))

    access: Any = types.SimpleNamespace(port=0, check=lambda *_, **__: None)
    answers: Any = types.SimpleNamespace(adopt=adopt)
    cm.HttpServer(listener, access, answers, answers, 2000)


def safe_serve_echo(listener: socket.socket) -> None:
    """Run the monitor's own WebSocket side, which gives back what it gets."""

    def echo(client: cm.Client, data: str | bytes) -> None:
        opcode, raw = (1, data.encode()) if isinstance(data, str) else (2, data)
        server.send(client, cm.encode_frame(opcode, raw), is_reply=True)

    server = cm.WebSocketServer(cm.EventLoop(), lambda client: None, echo, 64, 1 << 20)
    serve_handshakes(listener, server)
    server.loop.run()


def safe_run_cases(port: int, **which: Any) -> dict[str, Any]:
    kosoku = pytest.importorskip("kosoku", reason="kosoku is missing: python3 test_monitor.py --setup")
    try:
        fuzzing = kosoku.run_fuzzingclient(f"ws://127.0.0.1:{port}", **which)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # this thread may have the browser's loop
            results = pool.submit(asyncio.run, asyncio.wait_for(fuzzing, 300)).result()
    except kosoku.FailureError as failure:
        results = failure.results
    return {result.case_id: result for result in results}


@pytest.mark.slow
def test_the_public_case_list_of_rfc_6455_passes_strictly(monkeypatch) -> None:
    monkeypatch.setattr(cm, "PING_INTERVAL_S", 3600.0)  # the client answers a ping amid its unfinished frame
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, serving(safe_serve_echo, listener):
        port = listener.getsockname()[1]
        # 12 and 13 are of compression, which is declined
        results = safe_run_cases(port, exclude_cases=["12.*", "13.*"], concurrency=4)
        assert len(results) == 301
        for _ in range(5):  # the client waits for a second at most, which a busy machine may need
            if again := [case for case, result in results.items() if result.dropped_by_me]:
                results.update(safe_run_cases(port, cases=again))
    verdicts = {case: (str(result.behavior), str(result.behavior_close)) for case, result in results.items()}
    good = {("Behavior.OK", "BehaviorClose.OK"), ("Behavior.INFORMATIONAL", "BehaviorClose.INFORMATIONAL")}
    assert {case: verdict for case, verdict in verdicts.items() if verdict not in good} == {}


def safe_prompt(number: int, **more: Any) -> bytes:
    hook = payload("UserPromptSubmit", f"s{number % 3}", prompt=str(number), **more)
    return json.dumps(hook).encode() + b"\n"


def safe_told(monitor: RunningMonitor, numbers: Iterable[int]) -> list[int]:
    """Send one numbered event each on a connection of its own; return the numbers that were acknowledged."""
    acknowledged = []
    for number in numbers:
        with contextlib.suppress(OSError), monitor.connect() as sock:
            sock.sendall(safe_prompt(number))
            if sock.recv(1) == ee.ACKNOWLEDGEMENT:
                acknowledged.append(number)
    return acknowledged


def safe_stored(monitor: RunningMonitor) -> list[int]:
    return sorted(int(event["data"]["message"]) for event in monitor.stored_events())


@contextlib.contextmanager
def safe_disk(monitor: RunningMonitor, size: str, below: str = "") -> Iterator[Any]:
    """Put the monitor's directory, or one below, on a small disk of its own; give a function that remounts it."""
    place = monitor.home + below
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", place]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not permitted")
    if not below:
        monitor.write_config({})

    def remount(options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", place]
        # the threads of a killed process may hold its files a moment longer than the process
        eventually(lambda: not subprocess.run(command, check=False).returncode, 30, options)

    try:
        yield remount
    finally:
        remount("rw")
        clean_up(monitor)
        unmount(place)


@needs_root
def test_a_full_or_read_only_disk_loses_no_acknowledged_event(monitor):
    def fill() -> None:
        """Fill the disk until no byte is left, for events, spool, logs, usage and all."""
        with open(monitor.home + "/filler", "ab") as filler, contextlib.suppress(OSError):
            while True:
                os.write(filler.fileno(), b"x" * 4096)

    def is_reported() -> bool:
        """True once an event that cannot be written shows; the index may have given a page back."""
        fill()
        sure.extend(safe_told(monitor, [next(numbers)]))
        store = monitor.get("/api/status")["store"]
        return store["ok"] is False and bool(store["error"])

    with safe_disk(monitor, "4m") as remount:
        command, numbers = monitor.installed_command(), itertools.count(1001)
        fill()
        refused = in_process(monitor, "start", "--no-open")
        assert refused.returncode == 1 and "No space left on device" in refused.stderr
        assert monitor.home in refused.stderr and refused.stderr.count("\n") == 1
        os.unlink(monitor.home + "/filler")
        monitor.serve()
        sure = safe_told(monitor, range(10))
        assert sure == list(range(10))
        fill()
        sure += safe_told(monitor, range(10, 200))
        assert len(sure) < 200
        for _ in range(3):  # neither monitor nor spool can keep it: the hook is silent all the same
            hook_call(command, safe_prompt(1000, pad="x" * 9000), monitor.environment)
        eventually(is_reported)
        os.unlink(monitor.home + "/filler")
        assert safe_told(monitor, range(200, 210)) == list(range(200, 210))
        sure += range(200, 210)
        assert set(sure) <= set(safe_stored(monitor))
        assert monitor.get("/api/status")["store"]["ok"] is True
        log = install_text(monitor.home + "/monitor.log")
        assert "events can be written again" in log, "the log goes on, too"
        monitor.kill()  # a file that is open for writing would forbid the change
        remount("ro")
        refused = in_process(monitor, "start", "--no-open")
        assert refused.returncode == 1 and "Read-only" in refused.stderr and refused.stderr.count("\n") == 1
        hook_call(command, payload("Stop"), monitor.environment)
        remount("rw")
        monitor.serve()
        assert set(sure) <= set(safe_stored(monitor)) and safe_told(monitor, [220]) == [220]
        assert sum(session["counts"]["prompts"] for session in monitor.sessions().values()) > len(sure)


@pytest.fixture
def breaking_disk(monitor: RunningMonitor, tmp_path: Any) -> Iterator[tuple[Any, Any]]:
    """Put the events on a disk of their own; give a function that breaks it, and one that replaces it.

    The system makes a broken disk read-only under all who use it.
    """
    place, image, devices = monitor.home + "/events", str(tmp_path / "disk"), []

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be made here: {done.stderr.strip()}")
        return done.stdout.strip()

    def mount() -> None:
        devices.append(run("losetup", "-f", "--show", image))
        run("mount", "-t", "ext4", "-o", "errors=remount-ro", devices[-1], place)
        os.chmod(place, 0o700)

    def fail() -> None:
        """Let the file system find an error, as it does when a disk breaks."""
        run("sync", "-f", place)
        run("sh", "-c", f"echo a test >/sys/fs/ext4/{os.path.basename(devices[-1])}/trigger_fs_error")

    def replace() -> None:
        """Put a repaired copy over it, so that the place is never empty; open files are of the broken one."""
        nonlocal image
        shutil.copyfile(image, image + "2")
        image += "2"
        subprocess.run(["e2fsck", "-fy", image], capture_output=True, check=False)
        mount()

    os.mkdir(place)
    run("truncate", "-s", "24M", image)
    run("mkfs.ext4", "-q", "-F", image)
    try:
        mount()
        if not os.access(f"/sys/fs/ext4/{os.path.basename(devices[-1])}/trigger_fs_error", os.W_OK):
            pytest.skip("no error can be made here")
        yield fail, replace
    finally:
        clean_up(monitor)
        for device in devices:
            for command in (["umount", "-l", place], ["losetup", "-d", device]):
                subprocess.run(command, capture_output=True, check=False)


@needs_root
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mkfs.ext4"), reason="makes an ext4 disk")
def test_a_disk_that_breaks_is_reported_and_its_replacement_used(monitor, breaking_disk):
    (fail, replace), command = breaking_disk, monitor.installed_command()
    monitor.serve()
    store = cm.Journal(monitor.home + "/events")
    assert safe_told(monitor, range(6)) == list(range(6)) and store.is_writable()
    fail()
    assert safe_told(monitor, range(6, 12)) == []
    reported = monitor.get("/api/status")["store"]
    assert reported["ok"] is False and "Read-only" in reported["error"]
    assert "make it writable" in monitor.get("/api/status")["problems"][0]["advice"]
    assert not store.is_writable(), "it looks writable"
    for number in range(12, 15):
        hook_call(command, safe_prompt(number), monitor.environment)
    assert len(hook_spooled(monitor.home)) == 3
    assert len(monitor.get("/api/events?limit=100")["events"]) == 6, "what is there can be read"
    replace()
    eventually(lambda: safe_stored(monitor) == [*range(6), 12, 13, 14], 30, "what was spooled")
    assert safe_told(monitor, [20]) == [20]
    assert monitor.get("/api/status")["store"]["ok"] is True and store.is_writable()
    served = monitor.get("/api/events?limit=100")["events"]
    assert [event["seq"] for event in monitor.stored_events()] == sorted(event["seq"] for event in served)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of another process is changed")
def test_a_monitor_without_file_descriptors_recovers(running):
    assert safe_told(running, [0]) == [0]
    limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{running.pid}/fd"))
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
    ports = (running.port, running.ws_port) * 10
    held = [socket.create_connection(("127.0.0.1", port), 15) for port in ports]
    with hooks_in_a_row(running.environment) as call:
        for number in range(1, 6):
            call(json.loads(safe_prompt(number)))
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)
    for sock in held:
        sock.close()
    eventually(lambda: safe_told(running, [6]) == [6], 30, "an acknowledgement")
    eventually(lambda: set(safe_stored(running)) == set(range(7)), 30, "every event")
    assert safe_stored(running).count(0) == 1 and running.get("/health")["status"] == "ok"
    said = install_text(running.home + "/monitor.log")
    assert "a connection cannot be accepted" in said and "Traceback" not in said, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_hook_killed_at_any_moment_spoils_no_other_event(monitor, number):
    rng, command = random.Random(int(number)), shlex.split(monitor.installed_command())[:4]
    line = json.dumps(payload("UserPromptSubmit", prompt="x" * 20_000)).encode() + b"\n"
    pipes, ended_well = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}, 0
    for round_number in range(30):
        if round_number == 15:
            monitor.serve()
        hook = subprocess.Popen(command, env=monitor.environment, **pipes)
        with contextlib.suppress(BrokenPipeError):
            hook.stdin.write(line)
            hook.stdin.close()
        time.sleep(rng.random() * 0.05)  # any moment
        hook.send_signal(number)
        # A SIGINT before the hook's first line ends it with 0, like every other fault: it must not block Claude.
        ended_well += hook.wait(30) == 0 and number != signal.SIGINT
    hook_call(shlex.join(command), line, monitor.environment)
    eventually(lambda: not hook_spooled(monitor.home), 30, "an empty spool")
    events = monitor.stored_events()
    assert len(events) > ended_well
    assert {event["data"].get("message") for event in events} == {"x" * 20_000}
    assert not os.path.exists(monitor.home + "/quarantine.log")


def test_damaged_files_cost_no_event_and_no_start(monitor: RunningMonitor) -> None:
    kept = (
        *SAFE_FILES, "hooks/lib/hot_path.py", "events/2020-01-01/s7.jsonl", "spool/1000000000000-abcdef00.jsonl",
        "spool/1000000000001-abcdef00.taken", "events/garbage",
    )  # fmt: skip
    command, transcript, no_events = monitor.installed_command(), monitor.home + "/t.jsonl", {"events": 0}
    monitor.serve()
    sure = safe_told(monitor, range(9))
    ee.write_atomically(transcript, usage_line("a", 5))
    hook_call(command, {**payload("Stop"), "transcript_path": transcript}, monitor.environment)
    for number, row in enumerate(story_parts("tables.txt")["damaged files"]):
        (kind, _, garbage), before = row.partition(": "), monitor.counts()
        monitor.kill()
        for name in kept:
            path = f"{monitor.home}/{name}"
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            pathlib.Path(path).write_bytes(garbage.encode("latin-1"))
        monitor.serve()
        after = monitor.counts()
        # An object in the spool is an event of an unknown session, which arrives at any moment.
        assert after.pop("unknown", no_events)["events"] >= before.pop("unknown", no_events)["events"], kind
        assert {name: after.get(name) for name in before} == before, kind
        hook_call(command, payload("UserPromptSubmit", prompt=f"after {kind}"), monitor.environment)
        sure += safe_told(monitor, [100 + number])
        lines = [json.loads(line) for line in monitor.request("/api/export")[2].splitlines()]
        stored = {event["data"].get("message") for event in lines if event["sessionId"] in ("s0", "s1", "s2")}
        assert {str(it) for it in sure} <= stored, kind
        index_ready(monitor)
        assert in_process(monitor, "status").returncode == in_process(monitor, "sessions").returncode == 0
        assert in_process(monitor, "doctor").returncode in (0, 1)


def test_a_broken_configuration_stops_no_running_monitor(hook_installed, running):
    broken = """{ [] {"socketPath":5} {"mode":"moon"} \0\0 {"limits":{"fieldBytes":-1}}""".split(" ")
    command, config = hook_installed.command, running.home + "/monitor.config.json"
    good = install_text(config)
    for content in ("", *broken):
        ee.write_atomically(config, content.encode())
        hook_call(command, payload("UserPromptSubmit"), running.environment)
        running.emit(payload("Stop"))
        assert running.get("/health")["status"] == "ok"
        if content:
            refused = in_process(running, "restart", "--no-open")
            assert refused.returncode in (1, 2) and config in refused.stderr
            assert alive(running.pid)
    ee.write_atomically(config, good.encode())
    eventually(lambda: len(running.stored_events()) == 14, 30, "what the hooks had to spool, too")


# -- fuzzing: what is well-formed, and then not quite ----------------------------

SAFE_HEADS = [row.encode("latin-1") for row in HTTP_ROWS["heads"]]
SAFE_HEADS.append(protocol_upgrade("127.0.0.1:PORT") + protocol_frame(1, b"hello"))
SAFE_SPLICES = (*(row.encode("latin-1") for row in HTTP_ROWS["splices"]), b"\xed\xa0\x80")


@st.composite
def safe_mutants(draw: Any, corpus: tuple[bytes, ...]) -> bytes:
    """Take one of the corpus and cut, repeat, splice and flip it here and there."""
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        spliced, other, flips = (draw(st.sampled_from(of)) for of in (SAFE_SPLICES, corpus, range(1, 256)))
        flipped = bytes(byte ^ flips for byte in data[start:end])
        middle, rest = draw(st.sampled_from((
            (b"", end), (data[start:end], start), (spliced, end), (other[start:], len(data)), (flipped, end)
        )))  # fmt: skip
        data = data[:start] + middle + data[rest:]
    return data


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(safe_mutants(SAFE_HEADS))
def test_no_bytes_sent_to_either_port_do_any_harm(spoken, data):
    for port in (spoken.port, spoken.ws_port):
        answer = b""
        with socket.create_connection(("127.0.0.1", port), timeout=15) as sock, contextlib.suppress(OSError):
            sock.sendall(data.replace(b"PORT", str(port).encode()))
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                answer += piece
        assert answer == b"" or re.match(rb"HTTP/1\.1 (?:101|200|303|4\d\d|501|505) ", answer), answer[:200]
        assert b"Traceback" not in answer
    assert spoken.request("/health")[0] == 200


# ---- Browser: the page in headless Chromium against a real monitor -----------------------------------------
# Most tests share one page and one monitor (`tab`), which has no session when a test begins. What is sent to the
# monitor is written as a story, see `hooks`. .ci/stories/page.txt says what the page shows of which events.


def test_no_line_of_the_page_is_longer_than_120_columns() -> None:
    with open(os.path.join(ROOT, "index.html"), encoding="utf-8") as file:
        assert [number for number, line in enumerate(file, 1) if len(line.rstrip("\n")) > 120] == []


def by_page(expression: str) -> Any:
    """Return the value of an expression over the section "Parsers" of the page, by Node."""
    if shutil.which("node") is None:
        pytest.skip("Node is missing")
    banner = r"\n// Parsers: .*?\n(// -----+\n.*?)// -----+\n// Render: "
    section = re.search(banner, install_text(os.path.join(ROOT, "index.html")), re.DOTALL)
    script = f"'use strict';\n{section[1]}\nconsole.log(JSON.stringify({expression}))"
    done = subprocess.run(["node", "-"], input=script, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_what_parses_needs_no_page() -> None:
    helpers = "const filter = (text) => parseFilter(text).map((it) => [it.field, it.value, it.isNot]);"
    expressions = story_blocks("parsers")
    values = ", ".join(f"(() => {{ const seen = []; return {words}; }})()" for words, _ in expressions)
    expected = [json.loads(value.removeprefix("= ")) for _, value in expressions]
    assert by_page(f"(() => {{ {helpers} return [{values}]; }})()") == expected


class EditHistory:
    """Random edits of the files in a directory: what the client does, and the calls that its hooks report."""

    def __init__(self, root: pathlib.Path, seed: int) -> None:
        self.root, self.rng, self.calls, self.made, self.known = root, random.Random(seed), [], 0, set()
        for name in ("a.txt", "b c.txt"):
            (root / name).write_text(self.lines(40))

    def lines(self, number: int) -> str:
        self.made += number
        numbers = range(self.made - number, self.made)
        return "".join(f"{n} {self.rng.choice(['one', 'two'])}\n" for n in numbers)

    def step(self) -> None:
        path = self.rng.choice([*self.root.glob("*.txt"), self.root / f"new{self.made}.txt"])
        before = path.read_text() if path.exists() else None
        lines = (before or "").splitlines(keepends=True)
        at = self.rng.randrange(len(lines) + 1)
        is_command = (before is None or path in self.known) and self.rng.random() < 0.4
        if is_command or before is None or at == len(lines) or self.rng.random() < 0.2:
            text = "".join(lines[:at]) + self.lines(self.rng.randrange(3)) + "".join(lines[at + 2 :])
            cut = text[:-1] if self.rng.random() < 0.3 else text
            text = text.replace("one", "two", 3) if is_command else cut
            tool, given = "Write", {"content": text}
            reply = {"type": "create" if before is None else "update", "content": text, "structuredPatch": []}
        else:
            edits, text = [], before
            for _ in range(self.rng.choice([1, 1, 3])):
                old = "".join(lines[at : at + self.rng.randrange(1, 4)])
                old = old.rstrip("\n") if self.rng.random() < 0.5 else old
                new = self.rng.choice(["", self.lines(2), old + self.lines(1)])
                is_all = self.rng.random() < 0.2
                old, new = ("one", "three") if is_all and "one" in text else (old, new)
                takes_end = new == "" and not old.endswith("\n") and f"{old}\n" in text
                text = text.replace(old + "\n" * takes_end, new, -1 if is_all else 1)
                edits.append({"old_string": old, "new_string": new, "replace_all": is_all})
                lines = text.splitlines(keepends=True) or [""]
                at = self.rng.randrange(len(lines))
                if lines == [""]:
                    break
            tool, given = ("Edit", edits[0]) if len(edits) == 1 else ("MultiEdit", {"edits": edits})
            reply = {"oldString": old, "newString": new} if tool == "Edit" else {}
        path.write_text(text)
        reply |= {"filePath": str(path), "originalFile": before, "userModified": False}
        if is_command:  # the client gives the hunks of `git diff`
            diff = (line.rstrip("\n") for line in difflib.unified_diff(lines, text.splitlines(keepends=True)))
            parts = iter(re.split(r"(?m)^@@ -(\d+).*\n", "\n".join(diff))[1:])
            hunks = [{"oldStart": int(start), "lines": next(parts).splitlines()} for start in parts]
            file = {"filePath": str(path), "hunks": hunks, "created": before is None}
            tool, reply = "Bash", {"bashEditDiff": {"files": [file]}}
        self.known.add(path)
        self.calls.append({"tool": tool, "input": {"file_path": str(path), **given}, "output": reply})


@pytest.mark.skipif(shutil.which("git") is None, reason="git is missing")
def test_the_changes_of_a_session_are_those_of_git_and_so_is_its_patch(tmp_path: pathlib.Path) -> None:
    def files(where: pathlib.Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in where.glob("*.txt")}

    histories = []
    for seed in range(10):
        (tmp_path / str(seed)).mkdir()
        histories.append(EditHistory(tmp_path / str(seed), seed))
        for words in ("init -q", "add -A", "commit -qm start", f"clone -q . ../copy{seed}"):
            git(histories[-1].root, *words.split())
        for _ in range(12):
            histories[-1].step()
    calls = json.dumps([[it.calls, f"{it.root}/"] for it in histories])
    patches = by_page(f"""{calls}.map(([calls, root]) => {{
      const files = new Map();
      for (const call of calls) applyEdit(files, call);
      return [...files.values()].sort((a, b) => (a.path < b.path ? -1 : 1))
        .map((file) => file.isForeign ? 'foreign' : patchText(file, file.path.slice(root.length))).join('');
    }})""")
    for history, patch in zip(histories, patches):
        git(history.root, "add", "-AN")
        real = re.sub(r"(?m)^index .*\n|(?<= @@) .*$|\t$", "", git(history.root, "diff"))
        assert patch == real
        copy = tmp_path / f"copy{history.root.name}"
        git(copy, "apply", "-", given=patch)
        assert files(copy) == files(history.root)


def test_the_colours_of_agents_have_one_hue_in_both_themes_and_stand_out() -> None:
    with open(os.path.join(ROOT, "index.html"), encoding="utf-8") as file:
        themes = file.read().split("</style>")[0].split("prefers-color-scheme: dark", 1)

    def colours(theme: str, names: str) -> list[list[float]]:
        found = re.findall(rf"--(?:{names}): #(\w\w)(\w\w)(\w\w);", theme)
        return [[int(part, 16) / 255 for part in parts] for parts in found]

    def light(colour: list[float]) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05

    for theme in themes:
        for ground, colour in itertools.product(colours(theme, "bg|panel|select"), colours(theme, "a[0-7]")):
            low, high = sorted((light(ground), light(colour)))
            assert high / low >= 3, (ground, colour)
    hues = [[colorsys.rgb_to_hsv(*it)[0] for it in colours(theme, "a[0-7]")] for theme in themes]
    assert len(hues[0]) == 8 and hues[0] == pytest.approx(hues[1], abs=0.05)


# Stories: verb → the hook, and its field that holds the words behind the verb.
HOOK_VERBS = {
    "prompt": ("UserPromptSubmit", "prompt"), "agent": ("SubagentStart", None),
    "call": ("PreToolUse", None), "ask": ("PermissionRequest", None), "question": ("PreToolUse", None),
    "result": ("PostToolUse", None), "failure": ("PostToolUseFailure", "error"), "reply": ("PostToolUse", None),
    "batch": ("PostToolBatch", "tool_calls"), "answer": ("Stop", "last_assistant_message"),
    "error": ("StopFailure", "error"), "end": ("SessionEnd", "reason"), "idle": ("Notification", "message"),
    "stop": ("SubagentStop", "last_assistant_message"),
}  # fmt: skip
STORY_WHO = r"(?:\+(\d+) )?(?:@([^ /]+)(?:/(\S+))? )?"
STORY_NUMBERS = itertools.count()  # make each event its own, however soon another test emits the same story
STORY_STEP = re.compile(STORY_WHO + r"(\w+) ?(.*?)(?: took (\d+))?(?: => (.*))?", re.DOTALL)


def hooks(story, session="s1", start_ms=None, machine="testbox") -> list[dict[str, Any]]:
    """Return the payloads of a story: steps `[+SECOND] [@SESSION[/AGENT]] VERB WORDS`, with "; " between them.

    Calls are of Bash: `call make`, then `result make took 3 => its output` or `failure make => its error`; `ask make`
    asks for permission, `batch 1 2` ends `make 1` and `make 2`; `question WORDS`, `reply WORDS` are of AskUserQuestion;
    `play NAME` is a recording; `60x STEP` is a step for each number from 0 on, which replaces its #.
    With `start_ms` payloads have times, counted from there, and a machine.
    """
    made: list[dict[str, Any]] = []
    steps = (re.fullmatch(r"(?s)(?:(\d+)x )?(.*)", it).groups() for it in re.split(r"; +", story.strip()))
    each = (it.replace("#", str(n)) if times else it for times, it in steps for n in range(int(times or 1)))
    for step in each:
        second, who, agent, verb, words, took, said = STORY_STEP.fullmatch(step).groups()
        if verb == "play":
            about = {"session_id": who or session, "story": next(STORY_NUMBERS)}
            made += [{**event, **about} for event in recorded(words)]
            continue
        hook, field = HOOK_VERBS[verb]
        about: dict[str, Any] = {field: said if verb == "failure" else words} if field else {}
        if agent:
            about |= {"agent_id": agent, "agent_type": "explorer"}
        if verb == "idle":
            about["notification_type"] = "idle_prompt"
        if verb in ("question", "reply"):
            about |= {"tool_name": "AskUserQuestion", "tool_input": {"questions": [{"question": words}]}}
        elif "Permission" in hook or "ToolUse" in hook:
            about |= {"tool_name": "Bash", "tool_input": {"command": words}}
        if "ToolUse" in hook:
            about |= {"tool_use_id": words, "duration_ms": int(took or 0) * 1000 or 1234}
        if hook == "PostToolUse":
            about |= {"tool_response": {"stdout": said or "", "stderr": ""}}
        if verb == "batch":
            about[field] = [{"tool_use_id": f"make {n}", "tool_response": "denied"} for n in words.split()]
        event = payload(hook, who or session, story=next(STORY_NUMBERS), **about)
        made.append(event if start_ms is None else timed(event, start_ms + int(second or 0) * 1000, machine))
    return made


def timed(hook: dict[str, Any], at_ms: int, machine: str = "testbox") -> dict[str, Any]:
    """Return a payload as the hook hands it over: with a time and a machine."""
    return {"hook": hook, "id": str(uuid.uuid4()), "timestamp": at_ms, "machineId": machine}


def many_calls(numbers: Iterable[int], session: str) -> list[dict[str, Any]]:
    return hooks("; ".join(f"call make step-{n}; result make step-{n}" for n in numbers), session)


BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--in-process-gpu",
    "--process-per-site",  # a page that is loaded again stays in its process: a third less work
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if BROWSER is None:
        pytest.skip("Chromium is missing")
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@dataclasses.dataclass
class BrowserTab:
    """A page of a monitor, and whatever its console said."""

    page: Any
    monitor: RunningMonitor
    said: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.add_init_script(path=ROOT + "/.ci/page.js")
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))

    def load(self, link: str = "") -> BrowserTab:
        self.page.goto("about:blank")
        self.page.goto(self.monitor.url.replace("127.0.0.1", "localhost") + link)
        return self

    def emit(self, story: str, **options: Any) -> None:
        self.monitor.emit(*hooks(story, **options))

    def press(self, keys: str) -> None:
        for key in keys.split():
            self.page.keyboard.press(key)

    def until(self, condition: str, timeout_s: float = 15) -> None:
        eventually(lambda: self.page.evaluate(condition), timeout_s, condition)

    def rows(self, words: str = "", status: str = "") -> list[dict[str, Any]]:
        """Return the visible rows that show some words, from the top."""
        rows = self.page.evaluate("look.rows()")
        return [row for row in rows if words in row["text"] and status in ("", row["status"])]

    def row_with(self, words: str, tool: str = "", timeout_s: float = 15) -> Any:
        """Return the last row that shows these words, once there is one: the element that has it at any time."""

        def found() -> list[str]:
            return [row["id"] for row in self.rows(words) if tool in ("", row["tool"])]

        event_id = eventually(found, timeout_s, f"a row {tool} {words}")[-1]
        return self.page.locator(f'[data-testid=row][data-event-id="{event_id}"]').locator("visible=true")

    def text(self, testid: str) -> str:
        """Return the text of one part of the page on one line, "" when it is hidden."""
        return " ".join(self.page.evaluate("(testid) => look.text(testid)", testid).split())

    def shows(self, testid: str, *words: str) -> None:
        for each in words:
            eventually(lambda each=each: each in self.text(testid), 15, f"{each!r} in {testid}")

    def shows_details(self) -> None:
        eventually(lambda: self.text("drawer") and "Loading" not in self.text("drawer"), what="details")

    def link(self) -> str:
        return str(self.page.evaluate("location.hash"))

    def rail(self) -> list[tuple[str, str]]:
        return list(map(tuple, self.page.evaluate("look.rail()")))

    def choose(self, session: str, words: str) -> None:
        self.page.click(f"[data-session-id={session}]", button="right")
        self.page.click(f"[data-testid=menu] >> text={words}")

    def store(self, expression: str) -> Any:
        return self.page.evaluate(f"(({{ store }}) => {expression})(contextuate)")

    def drag(self, part: str, start: float, end: float, below: int) -> None:
        """Drag the mouse in a part of the page: from and to a pixel, or with floats a fraction of its width."""
        box = self.page.query_selector(part).bounding_box()
        at = [box["x"] + (x * box["width"] if isinstance(x, float) else x) for x in (start, end)]
        self.page.mouse.move(at[0], box["y"] + below)
        self.page.mouse.down()
        self.page.mouse.move(at[1], box["y"] + below, steps=4)
        self.page.mouse.up()


class BrowserWire:
    """The page's connection to the monitor: `cut` takes it away until `mend`.

    `keeps` takes each message in either direction, and returns True for those that are not to be passed on.
    """

    def __init__(self, tab: BrowserTab, keeps: Any = lambda message: False) -> None:
        self._tab, self._keeps = tab, keeps
        self.page: Any = None
        self._is_cut = False
        tab.page.route_web_socket("**/*", self._opened)
        tab.page.reload()

    def _opened(self, page: Any) -> None:
        self.page = page
        if self._is_cut:
            return  # to close it in here would block Playwright for Python 3.9
        monitor = page.connect_to_server()
        page.on_message(lambda text: self._keeps(json.loads(text)) or monitor.send(text))
        monitor.on_message(lambda text: self._keeps(json.loads(text)) or page.send(text))

    def cut(self) -> None:
        """Close the connection; one that is tried gets no word until `mend` closes it."""
        self._is_cut = True
        self.page.close()
        self._tab.shows("banner", "Not connected")

    def mend(self) -> None:
        """Let the page connect again, and wait until it has."""
        self._is_cut = False
        self.page.close()
        self._tab.until("contextuate.store.phase === 'open'", 30)


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Any]:
    """Open tabs that fail the test when the console says anything at all."""
    tabs = []

    def open_one(monitor: RunningMonitor, link: str = "", script: str = "", **options: Any) -> BrowserTab:
        context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        tab = BrowserTab(context.new_page(), monitor)
        tab.page.add_init_script(script)
        tabs.append(tab)
        return tab.load(link)

    yield open_one
    for tab in tabs:
        tab.page.context.close()
        assert tab.said == []


@pytest.fixture(scope="module")
def shared_tab(chromium: Any) -> Iterator[BrowserTab]:
    made, size = RunningMonitor(new_home()).serve(), {"width": 1440, "height": 900}
    page = chromium.new_page(viewport=size, permissions=["clipboard-read", "clipboard-write"])
    yield BrowserTab(page, made).load()
    clean_up(made)


@pytest.fixture
def tab(shared_tab: BrowserTab) -> Iterator[BrowserTab]:
    """The shared page, reloaded on the shared monitor, which has no session."""
    assert protocol_post(shared_tab.monitor, type="delete_all_sessions")[0] == 200
    shared_tab.page.evaluate("localStorage.clear()")
    yield shared_tab.load()
    said, shared_tab.said[:] = list(shared_tab.said), []
    assert said == []


BROWSER_STORIES = stories("page", " | ")
LINES_19000 = "\n".join(f"\x1b[32mok\x1b[0m test {number}" for number in range(19_000))


def press_tab_until(tab: BrowserTab, testid: str) -> None:
    focused = "document.activeElement.dataset.testid"
    assert any(tab.press("Tab") or tab.page.evaluate(focused) == testid for _ in range(20)), testid


def browser_bar(tab: BrowserTab, target: str, at_ms: int | None = None) -> dict[str, Any]:
    return dict(tab.page.evaluate("(given) => look.bar(...given)", [target, at_ms]))


def browser_place(tab: BrowserTab, target: str) -> dict[str, float]:
    return {name: value for name, value in browser_bar(tab, target).items() if name in ("x", "y")}


BROWSER_GIVE = "(session) => contextuate.store.apply({ type: 'session_update', session })"
# What a person does: (tab, part, words) → None
BROWSER_ACTS: dict[str, Any] = {
    "load": lambda tab, link, _: tab.load(tab.link() if link == "same link" else link),
    "go": lambda tab, link, _: tab.page.evaluate(f"location.hash = '{link}'"),
    "press": lambda tab, keys, _: tab.press(keys),
    "type": lambda tab, words, _: tab.page.keyboard.type(words),
    "click": lambda tab, part, _: tab.page.click(part),
    "focus": lambda tab, part, _: tab.page.focus(part),
    "fill": lambda tab, part, words: tab.page.fill(part, words),
    "select": lambda tab, part, words: tab.page.select_option(part, words),
    "menu": lambda tab, session, words: tab.choose(session, words),
    "give": lambda tab, it, words: tab.page.evaluate(BROWSER_GIVE, {**json.loads(words), "sessionId": it}),
    "tab": lambda tab, testid, _: press_tab_until(tab, testid),
    "back": lambda tab, *_: tab.page.go_back(),
    "forward": lambda tab, *_: tab.page.go_forward(),
    "width": lambda tab, pixels, _: tab.page.set_viewport_size({"width": int(pixels), "height": 900}),
    "brush": lambda tab, parts, _: tab.drag("#timeline-canvas", *map(float, parts.split()), 8),
    "pan": lambda tab, parts, _: tab.drag("#timeline-canvas", *map(float, parts.split()), 60),
    "point": lambda tab, target, _: tab.page.mouse.move(**browser_place(tab, target)),
    "hit": lambda tab, target, _: tab.page.mouse.click(**browser_place(tab, target)),
    "pull": lambda tab, what, _: tab.drag(what.split()[0], 3, 3 + int(what.split()[1]), 300),
    "lane": lambda tab, at, _: tab.page.click("#timeline-canvas", position={"x": 40, "y": 16 + 20 * int(at)}),
    "run": lambda tab, script, _: tab.page.evaluate(script),
    "send": lambda tab, hook, words: tab.monitor.emit(browser_sent(hook, **json.loads(words))),
    "tool": lambda tab, name, words: tab.monitor.emit(*call_and_result(name, **json.loads(words))),
    "event": lambda tab, session, words: tab.monitor.emit({"sessionId": session, **json.loads(words)}),
    "gauges": lambda tab, session, words: tab.monitor.emit(browser_gauges(session, **json.loads(words))),
    "down": lambda tab, part, _: tab.page.hover(part) or tab.page.mouse.down(),
    "up": lambda tab, *_: tab.page.mouse.up(),
    "cut": lambda tab, *_: tab.wire.cut(),
    "mend": lambda tab, *_: tab.wire.mend(),
    "hears": lambda tab, _, words: tab.page.evaluate("(fields) => look.hear(fields)", json.loads(words)),
    "talk": lambda tab, *_: emit_talk(tab.monitor),
    "turns": lambda tab, *_: emit_hundred_turns(tab.monitor),
    "words": lambda tab, text, _: tab.monitor.emit(agent_words(text)),
    "edit": lambda tab, texts, _: tab.monitor.emit(*edited(*texts.split())),
}


def browser_sent(hook: str, **fields: Any) -> dict[str, Any]:
    """Return a payload as it is handed over now, by a clock that is `clock` s ahead; some fields are beside it."""
    about = {name: fields.pop(name) for name in ("agent", "machineId", "machineKey") if name in fields}
    at_ms = cm.now_ms() + 1000 * fields.pop("clock", 0)
    return {**timed(payload(hook, **fields), at_ms), **about}


def browser_gauges(session: str, context: float, five: float, seven: float) -> dict[str, Any]:
    """Return a status line: percent of the context, and of the limits of five hours and seven days."""
    limits = {"five": (five, time.time() // 1 + 7200), "seven": (seven, time.time() // 1 + 200_000)}
    more = {"context_window": {"used_percentage": context}, "cost": {"total_lines_added": 12}}
    about = {"id": str(uuid.uuid4()), "timestamp": cm.now_ms(), "machineId": "testbox"}
    return {**about, "statusLine": status_line(session, **limits, **more)}


def call_and_result(tool: str, tool_response: Any, **call: Any) -> list[dict[str, Any]]:
    call |= {"tool_name": tool, "tool_use_id": str(next(STORY_NUMBERS))}
    return [payload("PreToolUse", **call), payload("PostToolUse", **call, tool_response=tool_response)]


def edited(old: str, new: str, session: str = "s1") -> list[dict[str, Any]]:
    """Return the payloads of an Edit of src/a.js."""
    given = {"file_path": "/home/dev/shop/src/a.js", "old_string": old, "new_string": new}
    reply = {"filePath": given["file_path"], "oldString": old, "newString": new, "structuredPatch": []}
    reply["originalFile"] = f"let a = {old};\nlet b;\n"
    return call_and_result("Edit", reply, session=session, tool_input=given)


def browser_selector(text: str) -> str:
    return re.sub(r"<([\w-]+)>", r"[data-testid=\1]", text)


def browser_acts(tab: BrowserTab, act: str, start_ms: int = 0) -> None:
    act = re.sub(r"\{(\d+) s\}", lambda it: str(start_ms + int(it[1]) * 1000), act)
    verb, _, what = browser_selector(act).partition(" ")
    if verb in ("fill", "select", "menu", "give", "send", "tool", "event", "gauges", "hears"):
        part, _, words = what.removesuffix(":").partition(": ")
        BROWSER_ACTS[verb](tab, part, words)
    elif verb in BROWSER_ACTS:
        for one in re.findall(r"\{(.*?)\}", what) if verb == "go" else ():
            (event,) = (it for it in tab.monitor.stored_events() if it["data"].get("message") == one)
            what = what.replace("{" + one + "}", event["id"])
        BROWSER_ACTS[verb](tab, what, "")
    elif act:
        act = act.replace("19,000 LINES", LINES_19000)
        tab.emit(act, start_ms=start_ms if act.startswith("+") else None)


def browser_opens(tab: BrowserTab, _session: str, place: str, words: str) -> bool:
    tool, _, target = place.partition(" / ")
    tab.row_with(target, tool.strip(" /")).click()
    tab.shows("drawer", *words.split("; "))
    return True


def browser_opens_all(tab: BrowserTab, *_: str) -> bool:
    tab.page.focus("[data-testid=table]")
    tab.press("g")
    details = set()
    for _ in tab.rows():
        tab.press("Enter")
        tab.shows_details()
        details.add(tab.text("drawer")[:60])
        tab.press("j")
    return len(details) > 2


def browser_rail(tab: BrowserTab, session: str, state: str, words: str) -> bool:
    if not state:
        return [name for name, _ in tab.rail()] == words.split()
    shown = tab.page.query_selector(f"[data-session-id={session}][data-state={state}]")
    return bool(shown) and words in " ".join(shown.inner_text().split())


def kept_of(tab: BrowserTab, session: str, field: str) -> Any:
    return tab.monitor.sessions()[session][field]


def browser_bars(tab: BrowserTab, _session: str, place: str, words: str) -> bool:
    target, *seconds = place.split()
    moments = [tab.start_ms + int(second) * 1000 for second in seconds] or [None]
    return [browser_bar(tab, target, at_ms)["colour"] or "-" for at_ms in moments] == words.split()


def browser_copied(tab: BrowserTab, _session: str, __: str, words: str) -> bool:
    """True if the link in the clipboard leads to details with these words."""
    link = tab.page.evaluate("navigator.clipboard.readText()")
    tab.load(link[link.index("#") :])
    tab.shows("drawer", words)
    return True


# What the page shows: (tab, session, what comes before the colon, words) → if it does
BROWSER_LOOKS: dict[str, Any] = {
    "row": lambda tab, _, status, words: [row["status"] for row in tab.rows(words + " ")] == [status],
    "rows": lambda tab, _, status, words: len(tab.rows(status=status)) == int(words),
    "rail": browser_rail,
    "counter": lambda tab, _, state, words: tab.page.evaluate("look.counts()").get(state, 0) == int(words),
    "title": lambda tab, _, __, words: tab.page.title() == words,
    "open": browser_opens,
    "every": browser_opens_all,
    "in": lambda tab, _, part, words: all(each in tab.text(part) for each in words.split("; ")),
    "is": lambda tab, _, part, words: tab.text(part) == words,
    "not": lambda tab, _, part, words: words not in tab.text(part.removeprefix("in ")),
    "no": lambda tab, _, it, words: not {"row": tab.rows(words), "link": tab.link()}.get(it, tab.text(it)),
    "link": lambda tab, _, __, words: tab.link() == words,
    "linked": lambda tab, _, __, words: all(each in tab.link() for each in words.split("; ")),
    "kept": lambda tab, _, field, words: kept_of(tab, *field.split()) == json.loads(words),
    "errors": lambda tab, session, _, words: kept_of(tab, session, "counts")["toolErrors"] == int(words),
    "agents": lambda tab, _, __, words: len({row["session"] for row in tab.rows()}) == int(words),
    "found": lambda tab, _, q, words: len(tab.monitor.get(f"/api/search?q={q}")["results"]) == int(words),
    "calls": lambda tab, _, __, words: tab.monitor.get("/api/stats")["totals"]["toolCalls"] == int(words),
    "hits": lambda tab, _, __, words: tab.page.locator("[data-testid=hit]").count() == int(words),
    "focus": lambda tab, _, __, words: (
        tab.page.evaluate("document.activeElement.dataset.act || document.activeElement.id") == words
    ),
    "bars": browser_bars,
    "widths": lambda tab, _, __, words: tab.page.evaluate("look.widths()") == words,
    "details": lambda tab, *_: tab.text("drawer") and "Loading" not in tab.text("drawer"),
    "fits": lambda tab, *_: tab.page.evaluate("look.fits()"),
    "end": lambda tab, _, __, words: tab.page.evaluate("(words) => look.ends(words)", words),
    "copied": browser_copied,
    "pages": lambda tab, _, __, words: tab.page.pdf().count(b"/Type /Page\n") == int(words),
    "true": lambda tab, _, __, words: tab.page.evaluate(words),
}


@pytest.mark.parametrize("rule", BROWSER_STORIES)
def test_the_page_shows(request, open_tab, rule):
    if rule.startswith("demo: "):
        tab = open_tab(request.getfixturevalue("shared_demo"))
    else:
        tab = request.getfixturevalue("tab")
    if rule.startswith("cut off: "):
        tab = open_tab(tab.monitor)
        tab.wire = BrowserWire(tab)
    elif rule.startswith("alerts: "):
        tab = open_tab(tab.monitor, script="look.noteAlerts()", permissions=["notifications"])
    tab.start_ms, tabs, session = cm.now_ms() - 600_000, {"": tab}, "s1"
    for act, shown in BROWSER_STORIES[rule]:
        if act.startswith("other "):
            link = act.removeprefix("other ")
            tabs["other"] = open_tab(tab.monitor, tab.link() if link == "same link" else link)
        else:
            browser_acts(tab, act, tab.start_ms)
        session = found[1] if (found := re.match(r"@(\S+) ", act)) else session
        for look in filter(None, shown.split(" & ")):
            where = "other" if look.startswith("other ") else ""
            place, _, words = look.removeprefix("other ").partition(": ")
            kind, _, more = place.partition(" ")
            looks = functools.partial(BROWSER_LOOKS[kind], tabs[where], session, more, words)
            eventually(looks, 20, f"{act} | {look}")


@pytest.fixture(scope="module")
def crowded() -> Iterator[RunningMonitor]:
    """A running monitor with more calls than a page loads: 1 of `old`, 600 of `long`, 700 of `later`."""
    made = RunningMonitor(new_home()).serve()
    made.emit(*hooks("@old call make old; @old result make old => ancient output"))
    made.emit(*many_calls(range(1, 601), "long"), *many_calls(range(601, 1301), "later"))
    yield made
    clean_up(made)


def test_events_of_long_ago_are_reached_by_link_and_by_scrolling(crowded, open_tab):
    results = (event for event in crowded.stored_events() if event["hookType"] == "PostToolUse")
    tab = open_tab(crowded, f"#s0=old&e={next(results)['id']}")
    tab.shows("drawer", "ancient output")
    tab.load()

    def scrolled_up() -> bool:
        tab.page.evaluate("document.querySelector('[data-testid=table]').scrollTop = 0")
        return bool(tab.rows("make step-1 "))

    tab.row_with("make step-1300")
    tab.page.click("[data-session-id=long]")
    tab.row_with("make step-600")
    eventually(scrolled_up, 20)
    loaded = tab.store("store.rows.filter((row) => row.sid === 'long').map((row) => row.target)")
    assert sorted(loaded) == sorted(f"make step-{number}" for number in range(1, 601))
    tab.press("Escape")
    tab.row_with("make step-1300")
    eventually(scrolled_up, 20)
    called = (
        it for it in crowded.stored_events() if it["data"].get("toolInput") == {"command": "make step-20"}
    )
    tab.load(f"#s=long&e={next(called)['id']}")
    tab.row_with("make step-20 ")  # among the rows that are loaded second


def test_rows_stay_where_they_are_while_others_come(crowded: RunningMonitor, open_tab: Any) -> None:
    tab = open_tab(crowded)
    tab.row_with("make step-1300")
    oldest = tab.store("store.rows[0].seq")
    tab.page.hover("[data-testid=table]")
    tab.page.mouse.wheel(0, -100_000)
    eventually(lambda: tab.store("store.rows[0].seq") < oldest and not tab.store("store.loadingOlder"))

    def at_top() -> list[tuple[str, float]]:
        return [(row["text"], row["y"]) for row in tab.rows("make") if 300 < row["y"] < 500]

    top = at_top()
    tab.page.mouse.wheel(0, 1300)
    eventually(lambda: at_top() != top)
    eventually(lambda: at_top() == at_top() != [], what="scrolled to its end")
    before = at_top()
    crowded.emit(*hooks("@later call make one more; @later call make another"))
    tab.shows("new-count", "2 new")
    assert at_top() == before
    tab.page.click("[data-testid=new-count]")
    tab.row_with("make another")
    tab.until("look.text('new-count') === ''")


def test_the_page_shows_loading_and_fills_without_a_reload(monkeypatch, open_tab):
    with loading_held(monkeypatch) as (place, _ids, gate):
        tab = open_tab(place)
        tab.shows("banner", "Reading history: 0 of 2")
        assert tab.rail() == []
        gate.set()
        eventually(lambda: "Reading history" not in tab.text("banner"))
        eventually(lambda: "ended" in tab.text("rail").lower())
        tab.page.close()


def test_a_conversation_longer_than_what_a_page_keeps_has_no_hole(monitor, tmp_path, open_tab):
    for name in ("contextuate_monitor.py", "emit_event.py", "index.html"):
        text = install_text(os.path.join(ROOT, name))
        text = text.replace("[ROW_CAP, DETAIL_CAP] = [50000,", "[ROW_CAP, DETAIL_CAP] = [3000,")
        (tmp_path / name).write_text(text.replace("ROW_SLACK = 5000;", "ROW_SLACK = 300;"))
    monitor.program = str(tmp_path / "contextuate_monitor.py")
    monitor.start().emit(*(payload("UserPromptSubmit", prompt=f"prompt {number}") for number in range(6200)))
    tab = open_tab(monitor, "#s=s1&show=conversation")
    tab.until("contextuate.store.rows.length >= 3000")
    tab.until("![...contextuate.store.pages.values()].some((it) => it.loading)")
    seqs = tab.store("store.rows.map((row) => row.seq)")
    assert seqs == list(range(seqs[0], 6201)) and len(seqs) >= 3000


def test_a_killed_monitor_is_missed_and_all_that_came_is_shown_in_order(running, open_tab):
    running.write_config({"server": {"port": running.port, "wsPort": running.ws_port}})
    running.emit(*many_calls([0], "s1"))
    tab = open_tab(running)
    tab.row_with("make step-0")
    running.kill()
    tab.shows("banner", "Not connected")
    running.serve().emit(*many_calls(range(1, cm.CATCH_UP_EVENTS), "s1"))
    tab.row_with(f"make step-{cm.CATCH_UP_EVENTS - 1}", timeout_s=40)
    tab.until("look.text('banner') === ''")
    tab.until("contextuate.store.phase === 'open' && contextuate.store.loaded")
    numbers = tab.store("store.rows.map((row) => Number(row.target.slice('make step-'.length)))")
    assert numbers == list(range(numbers[0], cm.CATCH_UP_EVENTS)), "no gap, nothing twice"
    assert tab.store("store.rows.every((row) => row.outcome === 'done')")
    assert all("WebSocket" in words or "ERR_CONNECTION_REFUSED" in words for words in tab.said)
    tab.said.clear()


def test_what_is_seen_and_saved_in_one_tab_is_in_every_tab_of_the_browser(running, open_tab):
    tab = open_tab(running)
    other = BrowserTab(tab.page.context.new_page(), running).load()
    tab.emit("call rm; ask rm")
    for one in (tab, other):
        one.until("document.title.startsWith('(1)')")
    tab.press("w e")
    other.until("!document.title.startsWith('(')")
    for one, words in ((tab, "from one"), (other, "from another")):
        one.page.fill("[data-testid=filter]", words)
        one.until("location.hash.includes('q=from')")
        one.page.click("[data-testid=filters]")
        one.page.click("[data-testid=menu] >> text=Save")
    tab.page.click("[data-testid=filters]")
    tab.shows("menu", "status:failed", "from one", "from another")
    assert other.said == []


def test_the_timeline_moves_by_wheel_and_fingers(tab):
    tab.emit("prompt go; call make; result make")
    tab.row_with("make")
    quarter = 15 * 60_000
    tab.until(f"contextuate.timeline.span === {quarter}")
    box = tab.page.query_selector("#timeline-canvas").bounding_box()
    touch = tab.page.context.new_cdp_session(tab.page)

    def fingers(*moves: tuple[float, ...]) -> list[float]:
        """Touch the timeline and move the fingers; return its span and end."""
        for kind, places in zip(["touchStart", *["touchMove"] * (len(moves) - 1), "touchEnd"], [*moves, ()]):
            y, xs = box["y"] + 60, [box["x"] + box["width"] * at for at in places]
            points = [{"x": x, "y": y, "id": number} for number, x in enumerate(xs)]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        return tab.page.evaluate("[contextuate.timeline.span, contextuate.timeline.to]")

    span, to = fingers(*((0.45 - 0.05 * step, 0.55 + 0.05 * step) for step in range(5)))
    assert span == pytest.approx(quarter * 0.1 / 0.5, rel=0.1)
    eventually(lambda: tab.page.is_visible("#time-now"), 15, "zoomed around the fingers, not around now")
    moved = fingers((0.5,), (0.6,), (0.7,))
    assert moved[0] == span and moved[1] < to - span * 0.1
    tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60)
    tab.page.mouse.wheel(0, 200)
    tab.until(f"contextuate.timeline.span > {span}")
    for _ in range(4):
        tab.page.mouse.wheel(0, -4000)
    tab.until("contextuate.timeline.span === 60_000")


def hostile_events(session: str, words: str) -> list[dict[str, Any]]:
    """Return events of every recorded kind and tool, and of odd ones, with these words wherever text is allowed."""
    deep = {"__proto__": {"acted": 1}, "constructor": {"prototype": {"acted": 1}}, "toString": "x"}

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {**{name: poisoned(inner) for name, inner in value.items()}, words: [words, deep], **deep}
        if isinstance(value, list):
            return [*map(poisoned, value), words, deep, None, 7]
        return words if isinstance(value, str) else value

    kinds: dict[Any, Any] = {}
    for hook in itertools.chain.from_iterable(map(recorded, recording_names())):
        kinds.setdefault((hook["hook_event_name"], hook.get("tool_name", "")), hook)
    for odd in ("__proto__", "constructor", words):
        kinds |= {(odd, ""): {"message": ""}, ("PreToolUse", odd): {"tool_input": {}}}
    return [
        {**poisoned(hook), "session_id": session, "hook_event_name": kind, "tool_name": tool, "tool_use_id": tool + words}
        for (kind, tool), hook in kinds.items()
    ]  # fmt: skip


def test_words_of_events_and_people_are_only_ever_text(running, open_tab):
    # Alone, as an address is, and all others at once.
    hostile = (
        "javascript:window.acted=1",
        "<script>window.acted = 1</script> <img src=x onerror='window.acted = 1'> \"><svg onload=window.acted=1> "
        "{{constructor.constructor('window.acted=1')()}} ${window.acted=1} \u202egnihtyna\u202c \u2066x "
        "\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[2J",
    )
    for number, words in enumerate(hostile):
        running.emit(*hostile_events(f"evil-{number}{words}", words))
        protocol_post(running, type="rename_session", sessionId=f"evil-{number}{words}", label=words)
    assert all(session["labelSource"] == "user" for session in running.sessions().values())
    tab = open_tab(running, script="look.noteStrange()")
    eventually(lambda: len(tab.rows()) > 20)
    assert hostile[0] in tab.text("rail") and "<script>window.acted = 1</script>" in tab.text("rail")
    assert "\x1b" not in tab.page.inner_text("body")
    for number in range(len(hostile)):
        tab.page.click(f"[data-session-id^=evil-{number}]")
        tab.page.focus("[data-testid=table]")
        tab.press("g")
        for _ in range(int(tab.page.get_attribute("[data-testid=table]", "aria-rowcount"))):
            tab.press("Enter")
            tab.shows_details()
            assert "Unexpected format" not in tab.text("drawer") and "\x1b" not in tab.text("drawer")
            buttons = tab.page.eval_on_selector_all(".showmore", "all => all.map((el) => el.innerText)")
            assert all(text == "" or text.startswith("Show ") for text in buttons), buttons
            tab.press("r r j")  # raw JSON and back
        assert "\u202e" not in tab.page.inner_text("body")
        for entry in ("Delete", "Set parent"):
            tab.press("m")
            tab.page.click(f"[data-testid=menu] >> text={entry}")
            tab.page.click("dialog >> text=Cancel")
    found = "[window.acted ?? null, ({}).acted ?? null, [...strange], violations]"
    assert tab.page.evaluate(found) == [None, None, [], []]
    assert tab.page.query_selector_all("img, iframe, object, script[src], a[href^='javascript']") == []
    assert len(tab.page.query_selector_all("script")) == 1
    assert tab.said == []
    refused = "() => { try { document.body.innerHTML = '<i></i>'; } catch (error) { return error.name; } }"
    assert tab.page.evaluate(refused) == "TypeError", "the browser itself takes no text for markup"
    assert tab.page.evaluate("violations") == ["require-trusted-types-for"]
    tab.said.clear()


def test_every_colour_of_a_terminal_can_be_read_in_both_themes(tab):
    codes = "".join(f"\x1b[38;5;{n}mf{n}\x1b[0m \x1b[48;5;{n}mb{n}\x1b[0m " for n in range(256))
    tab.emit(f"call paint; failure paint => Exit code 2\n{codes} \x1b[2mdim\x1b[0m")
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        tab.row_with("paint").click()
        tab.shows("drawer", "b255")
        assert tab.page.evaluate("look.contrast()") >= 4.5, scheme


@pytest.mark.parametrize("prefix", ["", "deep/monitor/"])
def test_a_tunnel_of_one_port_to_any_other_is_enough(prefix, monitor, open_tab):
    port = monitor.serve(server={"auth": "token"}).port
    token = monitor.command("url", "--token").stdout.strip().rpartition("/")[2]
    change = lambda data, is_request: data.replace(f" /{prefix}".encode(), b" /") if is_request else data  # noqa: E731
    with contextlib.closing(Relay(port, change)) as tunnel:
        monitor.about["port"] = tunnel.port
        tab = open_tab(monitor, prefix + token)
        tab.emit("prompt go; call make")
        tab.row_with("make")  # the WebSocket's own port refuses this Origin
        assert tab.page.url.partition("#")[0] == monitor.url.replace("127.0.0.1", "localhost") + prefix
        tab.page.click("[data-testid=view-stats]")
        tab.shows("sheet", "Bash")
        monitor.about["port"] = port


def test_a_page_behind_a_proxy_that_changes_the_host_says_so(running: RunningMonitor, open_tab: Any) -> None:
    def change(data: bytes, _is_request: bool) -> bytes:
        return data.replace(b"Host: localhost:%d" % proxy.port, b"Host: localhost:%d" % port)

    port = running.port
    with contextlib.closing(Relay(running.port, change)) as proxy:
        running.about["port"] = proxy.port
        tab = open_tab(running)
        tab.shows(
            "banner", "Access denied: requests from other sites are refused; a proxy must pass the Host"
        )
        tab.said.clear()  # what the browser says of the refusals


def test_a_visible_page_keeps_notifications_back(make: Any, monitor: RunningMonitor, open_tab: Any) -> None:
    server = make(NoticeServer)
    target = {"url": f"{server.url}/topic", "afterSeconds": 1}
    monitor.write_config({"notify": [target, {**target, "url": f"{server.url}/always", "unlessSeen": False}]})
    tab = open_tab(monitor.serve(), script="document.seen = 'visible';"
                   "Object.defineProperty(document, 'visibilityState', {get: () => document.seen})")  # fmt: skip
    tab.emit("prompt go; call make; ask make")
    eventually(lambda: server.titles("/always"), what="the message to those who want all")
    tab.page.click("[data-testid=view-status]")
    tab.shows("status", "target 1 (ntfy): nothing sent since the start", "target 2 (ntfy): answered 200")
    assert server.titles() == []
    tab.page.evaluate("document.seen = 'hidden'; document.dispatchEvent(new Event('visibilitychange'))")
    eventually(server.titles, what="the message once the page is hidden")


def test_what_happened_while_the_link_was_away_is_caught_up(crowded, open_tab):
    crowded.emit(*hooks("@gone call make gone"))
    tab = open_tab(crowded, script="look.noteAlerts()", permissions=["notifications"])
    tab.page.evaluate("localStorage.setItem('contextuate.notify', 'true')")
    wire = BrowserWire(tab)
    tab.row_with("make gone")
    wire.cut()
    crowded.emit(*hooks("@asks prompt ask me; @asks call rm x; @asks ask rm x"))
    protocol_post(crowded, type="delete_session", sessionId="gone")
    wire.mend()
    eventually(lambda: len(tab.page.evaluate("alerts")) == 1, what="the wait is alerted, once")
    eventually(lambda: not tab.rows("make gone"), what="the deleted session's rows are gone")
    wire.cut()
    tab.page.evaluate("location.hash = '#s=old'")
    wire.mend()
    tab.row_with("make old")
    eventually(lambda: tab.rows("make old", "done"))
    assert len(tab.page.evaluate("alerts")) == 1
    protocol_post(crowded, type="delete_session", sessionId="asks")


def agent_words(text: str) -> dict[str, Any]:
    about = {"eventType": "agent_words", "hookType": "", "sessionId": "s1", "timestamp": cm.now_ms()}
    return {**about, "id": str(uuid.uuid4()), "data": {"text": text, "messageId": "m"}}


def emit_talk(monitor: RunningMonitor) -> None:
    """Send a session with a turn, a subagent, an edit of a file that another session edits too."""
    calls = "prompt Fix *it*; call make; result make; call lint; failure lint => no"
    agent = "@s1/a1 agent; @s1/a1 call ls; @s1/a1 result ls"
    monitor.emit(*hooks(f"{calls}; {agent}"), *edited("1", "2"))
    said = "It is **done**"
    monitor.emit(agent_words(said), *hooks(f"answer {said}"), *edited("2", "4", "s2"))


def test_an_exported_session_opens_without_a_monitor_or_a_network(tab, chromium, tmp_path) -> None:
    emit_talk(tab.monitor)
    tab.monitor.emit(*hooks("prompt </script><b>&"))
    with tab.page.expect_download() as download:
        tab.choose("s1", "Export as a web page")
    download.value.save_as(tmp_path / "s1.html")
    context = chromium.new_context(offline=True)
    copy = BrowserTab(context.new_page(), tab.monitor)
    copy.page.goto((tmp_path / "s1.html").as_uri())
    eventually(lambda: copy.rows("make", "done"), what="its calls")
    copy.row_with("lint").click()
    copy.shows("drawer", "no")
    copy.press("Escape c")
    copy.shows("reading", "3 calls, 1 failed", "It is done", "</script><b>&")
    copy.press("v")
    copy.shows("reading", "1 file, +1 −1")
    copy.press("v y ?")
    copy.until("document.querySelector('[data-testid=replay]').innerText.includes('of')")
    assert copy.text("views") == "" and not {*"Pexa1"} & {*copy.page.locator("kbd").all_inner_texts()}
    context.close()
    assert copy.said == []
    call = {"tool_name": "Bash", "tool_input": {"command": "ls"}, "tool_response": {"stdout": "x" * 100}}
    tab.monitor.emit(*(payload("PostToolUse", "big", tool_use_id=str(n), **call) for n in range(1000)))
    assert len(tab.monitor.request("/api/export?session=big&format=html")[2]) < 1_000_000


def emit_hundred_turns(monitor: RunningMonitor) -> None:
    """Send 100 turns with 20 calls each, of the session s1; the last target is "step-1999"."""
    for turn in range(100):
        monitor.emit(*hooks(f"prompt turn {turn}"), *many_calls(range(turn * 20, turn * 20 + 20), "s1"))
        monitor.emit(agent_words(f"- step {turn}\n- *done*"))


ZONE_TIMES = {name: times for name, (times,) in story_cases("tables.txt", "zones").items()}


def utc_ms(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M")) * 1000


def zone_calls(zone: str) -> list[dict[str, Any]]:
    times = enumerate(utc_ms(at) for at, _, _ in ZONE_TIMES[zone])
    return [{**timed(*hooks(f"call make {number}"), at), "id": f"z{number}"} for number, at in times]


@pytest.mark.parametrize("zone", ZONE_TIMES)
def test_statistics_show_the_days_of_the_browsers_zone(running, open_tab, zone):
    running.emit(*zone_calls(zone))
    index_ready(running)
    tab = open_tab(running, "#stats&when=", timezone_id=zone)
    tab.shows("stats", f"{len(ZONE_TIMES[zone])} calls")
    titles = "[...document.querySelectorAll('[aria-label=\"Calls by day\"] > div')].map((bar) => bar.title).join(';')"
    bars = eventually(lambda: re.findall(r"\b(\d{1,2})\b[^;]*: (\d+) call", tab.page.evaluate(titles)))
    calls = collections.Counter(day for _, day, _ in ZONE_TIMES[zone])
    every_day = range(min(calls), max(calls) + 1)
    assert {int(day): int(count) for day, count in bars} == {day: calls[day] for day in every_day}
    rows = tab.page.locator("table[aria-label=Days] tbody tr").all_inner_texts()
    assert sorted(row.split()[0] for row in rows) == [f"2026-10-{day:02}" for day in sorted(calls)]


def test_without_an_index_history_is_searched_and_not_counted(monitor: RunningMonitor, open_tab: Any) -> None:
    os.makedirs(monitor.home + "/index.db/in-the-way")
    monitor.serve().emit(*hooks("prompt find the zebra"))
    tab = open_tab(monitor, "#history&q=zebra")
    tab.shows("hits", "find the zebra")
    tab.shows("banner", "There is no index")
    eventually(lambda: monitor.get("/api/status")["index"]["state"] == "off")
    tab.page.reload()
    tab.shows("hits", "find the zebra")
    tab.press("3")
    tab.shows("banner", "there are no statistics")
    eventually(lambda: tab.page.query_selector("[data-testid=sheet] .note.bad"))


@pytest.fixture(scope="module")
def shared_demo() -> Iterator[RunningMonitor]:
    made = RunningMonitor(new_home()).serve()
    assert in_process(made, "demo", "--live", "0").returncode == 0
    lines = "\n".join(f"line {number} of many" for number in range(300))
    made.emit(*hooks(f"@long prompt Long work; @long call make; @long failure make => {lines}"))
    yield made
    clean_up(made)


@story_table("tables.txt", "screens", "acts, part")
def test_axe_finds_nothing_to_complain_about(shared_demo, open_tab, acts, part):
    # Colours are the same at every width, the other rules are the same in every colour.
    only_colours = {"runOnly": ["color-contrast"]}
    no_colours = {"rules": {"color-contrast": {"enabled": False}}}
    ways = (("light", 1440, {}), ("dark", 1440, only_colours), ("light", 360, no_colours))
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - only this test needs it

    tab = open_tab(shared_demo)
    for act in acts.split("; "):
        browser_acts(tab, act)
        tab.until("contextuate.store.loaded && contextuate.store.status")
    Axe().run(tab.page, options={"runOnly": ["document-title"]})  # makes `axe` known to the page
    for scheme, width, rules in ways:
        tab.page.emulate_media(color_scheme=scheme)
        browser_acts(tab, f"width {width}")
        options = {"resultTypes": ["violations"], **rules}
        report = tab.page.evaluate("(given) => axe.run(...given)", [browser_selector(part), options])
        found = [(each["id"], each["nodes"][0]["html"]) for each in report["violations"]]
        assert found == [], (scheme, width)


def test_without_index_html_a_small_page_shows_the_bare_facts_live(monitor, open_tab):
    folder = monitor.home + '/a <b> "quoted" folder'  # its name cannot end the script
    os.mkdir(folder)
    for name in ("contextuate_monitor.py", "emit_event.py"):
        shutil.copy(os.path.join(ROOT, name), folder)
    monitor.program = folder + "/contextuate_monitor.py"
    monitor.start().emit(*hooks("prompt early"))
    assert folder not in protocol_check_page(monitor)
    tab, shows = open_tab(monitor), "document.querySelector({0!r}).innerText.includes({1!r})"
    tab.until(shows.format("body", folder + "/index.html"))
    tab.until(shows.format("#events", "early"))
    tab.emit("@later prompt later <b>work</b>")
    for part in ("#events", "#sessions"):
        tab.until(shows.format(part, "later <b>work</b>"))
    page = b"<!doctype html>\n<style>b{}</style><script>\nlet a;\n</script>"
    ee.write_atomically(folder + "/index.html", page)
    assert protocol_check_page(monitor).endswith("let a;\n</script>")  # seen without a restart


# ---- Answers: a person answers on the page or in a terminal; an agent does not -----------------------------
# The installed hook with --answer, a real monitor, a paired client. What the hook prints is the client's form.

asked_rows = (line.split(" ", 2) for line in story_blocks("answers")[0])
ANSWER_ASKED = {kind: payload(hook, **json.loads(fields)) for kind, hook, fields in asked_rows}
# What is asked, the answer, and the decision that is printed; None: nothing is.
answer_rows = (re.fullmatch(r"(\w+) (.*) → (.*)", line).groups() for line in story_blocks("answers")[1])
ANSWERS = [(kind, json.loads(answer), json.loads(decision)) for kind, answer, decision in answer_rows]


# What a hook reads and is no answer; lines that are too long or never end are in `deliver_and_wait`.
ANSWER_RUBBISH = [
    b"", b"\n", b'{"do": "allow"}x\n', random.Random(1).randbytes(10_000) + b"\n", b"[" * 100_000 + b"\n",
    b'{"do": "deny", "message": "\xff"}\n',
]  # fmt: skip


def test_an_answer_is_printed_in_the_clients_form_or_not_at_all(capfd):
    for kind, answer, decision in ANSWERS:
        ee.print_answer(ANSWER_ASKED[kind], json.dumps(answer).encode() + b"\n")
        printed = capfd.readouterr().out
        output = {"decision": decision} if decision and "behavior" in decision else decision
        wanted = {"hookEventName": ANSWER_ASKED[kind]["hook_event_name"], **output} if decision else None
        assert (json.loads(printed)["hookSpecificOutput"] if printed else None) == wanted, (kind, answer)
    assert not any(ee.print_answer(ANSWER_ASKED["Bash"], line) for line in ANSWER_RUBBISH)
    assert capfd.readouterr().out == ""


@given(st.sampled_from(list(ANSWER_ASKED.values())), st.binary(max_size=60) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
        ["allow", "deny", "always", "answer", "accept", "decline"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["do", "message", "suggestions", "answers", "content", "name"]), inner, max_size=3),
).map(lambda it: json.dumps(it).encode()))  # fmt: skip
def test_whatever_comes_back_gives_nothing_or_one_decision(asked, line):
    output = None
    with contextlib.suppress(ValueError, RecursionError):
        output = ee.client_answer(asked, json.loads(line.decode("utf-8")))
    if output is not None:
        assert json.loads(ee.encode_json(output)), "it can be printed"
        behaviors = {"accept", "decline", "cancel"} if "action" in output else {"allow", "deny"}
        assert output.get("action", output.get("decision", {}).get("behavior")) in behaviors


def started_hook(command: str, asked: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a hook on a payload, and do not wait."""
    shell, pipes = ["/bin/sh", "-c", command], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    hook = subprocess.Popen(shell, env=environment, start_new_session=True, **pipes)
    with hook.stdin:
        hook.stdin.write(json.dumps(asked).encode() + b"\n")
    hook.stdin = None  # for `communicate`
    return hook


@dataclasses.dataclass
class Asking:
    """A monitor with `install --answers`, the agents that ask, and a paired page."""

    monitor: RunningMonitor

    def __post_init__(self) -> None:
        # The client's version is not known here, so its own hook is derived from one that every version has.
        self.command = self.monitor.installed_command("--answers").replace(" || ", " --answer || ", 1)
        self.client = subprocess.Popen(["sleep", "600"])

    def remove(self) -> None:
        """End the client."""
        self.client.kill()
        self.client.wait()

    def hook(self, asked: dict[str, Any], command: str = "") -> subprocess.Popen[bytes]:
        """Start the hook on a payload, as the client does, and do not wait."""
        environment = {**self.monitor.environment, "CLAUDE_PID": str(self.client.pid)}
        return started_hook(command or self.command, asked, environment)

    def ask(self, kind: str = "Bash", session: str = "s1", **more: Any) -> tuple[Any, str]:
        """Ask in a session; return the hook that waits, and the id of its event."""
        return self.asks({**ANSWER_ASKED[kind], "session_id": session, **more})

    def asks(self, hook: dict[str, Any], *command: str) -> tuple[Any, str]:
        """Run a hook that asks; return it, and the id of its event."""
        session = hook["session_id"]
        earlier = self.open_ids(session)  # one that was just answered may be among them
        new = lambda: [it for it in self.open_ids(session) if it not in earlier]  # noqa: E731
        return self.hook(hook, *command), eventually(new, what="a question that can be answered")[0]

    def decision(self, hook: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Return what a hook decides, of a form the answer; wait for its end."""
        printed = json.loads(hook.communicate(timeout=20)[0])["hookSpecificOutput"]
        assert printed.pop("hookEventName")
        return dict(printed.get("decision", printed))

    def open_ids(self, session: str = "s1") -> list[str]:
        asks = self.monitor.sessions_so_far().get(session, {"asks": []})["asks"]
        return [it["eventId"] for it in asks if it["answerable"]]

    def on_terminal(self, *arguments: str) -> str:
        """Run a command in a process with a terminal of its own; return what it prints."""
        pid, terminal = pty.fork()
        if pid == 0:
            os.environ.clear()
            os.environ.update(self.monitor.environment)
            with os.fdopen(0) as sys.stdin, os.fdopen(1, "w") as sys.stdout, os.fdopen(2, "w") as sys.stderr:
                try:
                    cm.main(arguments)
                finally:
                    sys.stdout.flush(), sys.stderr.flush(), os._exit(0)
        said = b""
        with contextlib.suppress(OSError):  # it has ended
            while piece := os.read(terminal, 4096):
                said += piece
        os.close(terminal)
        os.waitpid(pid, 0)
        return said.decode()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, str], Any]:
        headers = headers or {"Origin": self.monitor.url.rstrip("/")}
        status, found, answer = self.monitor.request(path, "POST", json.dumps(body), headers)
        return status, found, json.loads(answer)

    def code(self) -> str:
        return self.on_terminal("answers", "pair").split()[0]

    def pair_tab(self, tab: BrowserTab) -> None:
        tab.page.click("text=Pair this browser")
        tab.page.fill("dialog input", self.code())
        tab.page.click("dialog .first")

    def pair(self) -> str:
        status, headers, _ = self.post("/pair", {"code": self.code()})
        assert status == 200 and "HttpOnly; SameSite=Strict" in headers["set-cookie"]
        return headers["set-cookie"].partition(";")[0]

    def page(self, cookie: str = "", port: int = 0, source: str = "127.0.0.1") -> TestClient:
        """Connect a page with a cookie, on either port, from an address of this machine."""
        port = port or self.monitor.port
        sock = socket.create_connection(("127.0.0.1", port), 10, (source, 0))
        page = TestClient(websockets.sync.client.connect(
            f"ws://127.0.0.1:{port}/ws", sock=sock, additional_headers={"Cookie": cookie}, compression=None,
            close_timeout=1,
        ))  # fmt: skip
        self.monitor.clients.append(page)
        page.hello = page.next("hello")
        page.ask("subscribed", type="subscribe", view="full")
        page.send(type="set_visible", visible=True)
        return page

    def answer(self, page: TestClient, event_id: str, answer: Any, session: str = "s1") -> Any:
        """Answer from a page; return the outcome, or the error."""
        page.send(type="answer", sessionId=session, eventId=event_id, answer=answer, requestId=event_id)
        while True:
            page.others += (messages := page.receive())
            for message in messages:
                if message["type"] in ("answered", "error"):
                    return message.get("outcome") or message["message"]


@pytest.fixture
def asking(running: RunningMonitor) -> Iterator[Asking]:
    made = Asking(running)
    yield made
    made.remove()


def test_a_paired_page_answers_and_the_hook_prints_it(asking):
    page = asking.page(asking.pair())
    assert page.hello["mayAnswer"]
    for number, (kind, answer, decision) in enumerate(it for it in ANSWERS if it[2]):
        hook, event_id = asking.ask(kind, f"s{number}")
        outcome = asking.answer(page, event_id, answer, f"s{number}")
        assert asking.decision(hook) == decision
        assert (outcome, hook.returncode) == ("delivered", 0)
        events = (page.next("event")["event"] for _ in itertools.count())
        row = next(it for it in events if it["data"].get("to") == event_id)
        assert (row["eventType"], row["data"]["outcome"]) == ("answer", "delivered")
        assert "127.0.0.1" in row["data"]["by"]
        assert asking.answer(page, event_id, answer, f"s{number}") == "late", "the second is too late"
    hiding = ("echo -----BEGIN PRIVATE KEY-----; rm -r ~", "git status\n\x1b]; rm -r ~ ;\x07")
    unseen_inputs = [{"tool_input": {"command": it}} for it in hiding]
    for unseen in (*unseen_inputs, {"truncated": {"toolInput.command": 5_000_000}}):
        hook, event_id = asking.ask("Bash", "unseen", **unseen)
        assert "not shown whole" in asking.answer(page, event_id, {"do": "allow"}, "unseen")
        assert asking.answer(page, event_id, {"do": "deny"}, "unseen") == "delivered"
    hook, event_id = asking.ask("Bash", "broken")
    for answer in (it[1] for it in ANSWERS if it[0] == "Bash" and it[2] is None):
        assert "does not fit" in asking.answer(page, event_id, answer, "broken")
    assert hook.poll() is None


@pytest.mark.parametrize("line", [b'{"do": "allow"}', b" " * 300_000 + b'{"do": "allow"}\n'])
def test_a_hook_prints_nothing_for_a_line_without_end_or_too_long(hook_alone, monitor, line):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(monitor.socket_path)
        listener.listen(1)
        command = hook_alone.installed.command.replace(" || ", " --answer || ", 1)
        hook = started_hook(command, ANSWER_ASKED["Bash"], monitor.environment)
        with listener.accept()[0] as connection:
            assert b'"answerable":3600' in connection.recv(1 << 16)
            connection.sendall(ee.ACKNOWLEDGEMENT)
            with contextlib.suppress(OSError):
                connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            assert hook.communicate(timeout=20)[0] == b"" and hook.returncode == 0


def test_a_hook_ends_silently_when_the_wait_is_over(asking):
    def esc_in_the_terminal() -> None:
        about = {"eventType": "client_status", "sessionId": "s1", "machineId": "testbox"}
        for status in ("waiting", "idle"):
            data = {"status": status, "previous": "busy"}
            monitor.emit({**about, "pid": asking.client.pid, "timestamp": ee.now_ms() + 5, "data": data})

    monitor = asking.monitor
    next_prompt = functools.partial(monitor.emit, payload("UserPromptSubmit", prompt="go on"))
    for end in (monitor.stop, monitor.kill):
        hook, _ = asking.ask()
        end()
        assert hook.communicate(timeout=20)[0] == b"" and hook.returncode == 0
        monitor.serve()
    for end in (esc_in_the_terminal, next_prompt, asking.remove):
        hook, event_id = asking.ask()
        end()
        assert hook.communicate(timeout=20)[0] == b"" and hook.returncode == 0
        assert asking.open_ids() == []
        assert asking.answer(asking.page(asking.pair()), event_id, {"do": "allow"}) == "late"


def test_one_of_two_pages_answers_whatever_else_names_the_question(asking):
    outcomes: dict[str, str] = {}

    def give(page: TestClient, do: str) -> None:
        outcomes[asking.answer(page, event_id, {"do": do})] = do

    def go_on() -> None:
        eventually(lambda: outcomes, what="the one that is too late")
        os.killpg(hook.pid, signal.SIGCONT)

    cookie = asking.pair()
    pages, (hook, event_id) = [asking.page(cookie) for _ in range(2)], asking.ask()
    line = json.dumps({"id": event_id, "answerable": 60, "hook": ANSWER_ASKED["Bash"]}, separators=(",", ":"))
    with asking.monitor.connect() as other:
        other.sendall(line.encode() + b"\n")
        assert other.recv(1) == ee.ACKNOWLEDGEMENT and other.recv(1) == b""
    os.killpg(hook.pid, signal.SIGSTOP)
    at_once(lambda: give(pages[0], "allow"), lambda: give(pages[1], "deny"), go_on)
    assert sorted(outcomes) == ["delivered", "late"]
    assert asking.decision(hook)["behavior"] == outcomes["delivered"]


def test_an_answer_that_was_refused_is_not_given_later(monkeypatch):
    event_id, goes_on, asked = str(uuid.uuid4()), threading.Event(), {"hook": ANSWER_ASKED["Bash"]}
    with protocol_inside() as inside, socket.socket(socket.AF_UNIX) as hook:
        hook.connect(inside.settings["socketPath"])
        hook.sendall(ee.encode_json({"id": event_id, "answerable": 60, **asked}) + b"\n")
        assert hook.recv(1) == ee.ACKNOWLEDGEMENT
        monkeypatch.setattr(cm.EventLoop.call, "__defaults__", (0.1,))
        monkeypatch.setattr(cm, "TAKEN_DEADLINE_S", 0.1)
        answers, begin = inside.answers, inside.answers._begin
        allow = functools.partial(answers.answer, "s1", event_id, {"do": "allow"}, "a test")
        inside.loop.call_soon(goes_on.wait)
        with pytest.raises(TimeoutError):
            allow()
        goes_on.set()
        assert inside.loop.call(lambda: answers.questions[event_id].is_taken, 10) is False
        goes_on.clear()
        answers._begin = lambda *given: (begin(*given), inside.loop.call_soon(goes_on.wait))[0]
        assert allow()["outcome"] == "unknown", "it was sent, whatever hangs then"
        goes_on.set()
        assert hook.recv(100) == b'{"do":"allow"}\n'


def test_before_its_dialog_the_client_waits_only_while_a_page_is_looking(asking):
    asked = {"agent_id": "a1", "agent_type": "Explore"}
    hook = asking.hook({**ANSWER_ASKED["Bash"], **asked})
    assert hook.communicate(timeout=10)[0] == b"", "no page is open"
    page = asking.page(asking.pair())
    hook, _ = asking.ask("form", "s2", **asked)
    page.send(type="set_visible", visible=False)
    assert hook.communicate(timeout=10)[0] == b"", "the page is hidden"


def test_pairing_needs_the_code_of_a_terminal(asking):
    code = asking.code()
    wrong = f"{(int(code) + 1) % 10**8:08}"
    for tried, status in ((wrong, 403), (code, 200), (code, 403)):
        assert asking.post("/pair", {"code": tried})[0] == status, "once"
    code = asking.code()
    assert [asking.post("/pair", {"code": it})[0] for it in (wrong, wrong, wrong, code)] == [403] * 4
    assert asking.post("/pair", {"code": asking.code()}, Origin="http://evil.example")[0] == 403
    assert stat.S_IMODE(os.stat(asking.monitor.home + "/pairings.json").st_mode) == 0o600
    cookie, (hook, event_id) = asking.pair(), asking.ask()
    elsewhere = asking.page(cookie, source="127.0.0.2")
    assert not elsewhere.hello["mayAnswer"]
    assert "not paired" in asking.answer(elsewhere, event_id, {"do": "allow"})
    page = asking.page(cookie, asking.monitor.ws_port)
    assert page.hello["mayAnswer"]
    assert any("127.0.0.2" in it["words"] for it in asking.monitor.get("/api/status")["answers"]["refused"])
    for pairing in asking.monitor.get("/api/status")["answers"]["pairings"]:
        page.send(type="end_pairing", pairing=pairing["id"])
    eventually(lambda: asking.monitor.get("/api/status")["answers"]["pairings"] == [])
    assert not asking.page(cookie).hello["mayAnswer"] and hook.poll() is None


def test_a_code_is_valid_for_two_minutes(monkeypatch):
    monkeypatch.setattr(cm, "_process_fields", lambda pid: ("test", ["S", "0", "0", "0", "34816"]))
    with protocol_inside() as inside:
        place = RunningMonitor.__new__(RunningMonitor)
        place.about = {"port": inside.port}
        origin = {"Origin": f"http://127.0.0.1:{inside.port}"}
        token = {"Authorization": f"Bearer {cm.read_token(inside.settings.path('token'))}"}
        for life_s, status in ((-1, 403), (cm.CODE_LIFE_S, 200)):
            monkeypatch.setattr(cm, "CODE_LIFE_S", life_s)
            code = json.loads(place.request("/api/answer", "POST", '{"do": "code"}', token)[2])["code"]
            assert place.request("/pair", "POST", json.dumps({"code": code}), origin)[0] == status


ANSWER_SOCKET = """
import json, os, sys, websockets.sync.client as client
with client.connect(sys.argv[1], additional_headers={"Cookie": os.environ["COOKIE"]}) as page:
    page.send(os.environ["MESSAGE"])
    if sys.argv[2:]: os._exit(0)
    for text in page:
        if json.loads(text)["type"] in ("error", "answered"): sys.exit(print(text))"""
ANSWER_EVENT = """
import json, os, socket
sock = socket.socket(socket.AF_UNIX); sock.connect(os.environ["HOOKS"])
data = {"to": os.environ["ID"], "outcome": "delivered", "by": "you", "message": "Allowed once"}
sock.sendall(json.dumps({"eventType": "answer", "sessionId": "s1", "data": data}).encode() + b"\\n"); sock.recv(1)"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up on Linux")
def test_an_agent_does_not_answer_itself(asking):
    def refused() -> list[Any]:
        return list(monitor.get("/api/status")["answers"]["refused"])

    monitor = asking.monitor
    hook, event_id = asking.ask()
    message = {"type": "answer", "sessionId": "s1", "eventId": event_id, "answer": {"do": "allow"}}
    known = {
        **monitor.environment, "PYTHON": sys.executable, "URL": monitor.url.rstrip("/"),
        "MONITOR": f"{sys.executable} -m contextuate_monitor", "HOOKS": monitor.socket_path, "ID": event_id,
        "WS": monitor.url.rstrip("/").replace("http", "ws"), "WS2": f"ws://127.0.0.1:{monitor.ws_port}",
        "MESSAGE": json.dumps(message), "COOKIE": asking.pair(), "SOCKET": ANSWER_SOCKET, "EVENT": ANSWER_EVENT,
        "TOKEN": f"Authorization: Bearer {install_text(monitor.home + '/token').strip()}",
    }  # fmt: skip
    programs = itertools.cycle(("CLAUDECODE", "QWEN_CODE", "GEMINI_CLI", "COPILOT_CLI"))
    for name, ((attempt, _),) in stories("attempts", "\n").items():
        before, known["AGENT"] = len(refused()), next(programs)
        shell = ["bash", "-c", attempt.replace("$MONITOR", known["MONITOR"]) + "; true"]
        inside = {**known, known["AGENT"]: "1"}
        said = subprocess.run(shell, capture_output=True, text=True, cwd=ROOT, timeout=60, env=inside)
        assert hook.poll() is None and asking.open_ids() == [event_id], (name, said)
        assert not re.search(r"\b\d{8}\b +type|delivered|Allowed once", said.stdout), (name, said)
        if name != "a made-up event":
            eventually(lambda before=before: len(refused()) > before, what=name)
    assert not any(it["eventType"] == "answer" for it in monitor.stored_events())
    problems = monitor.get("/api/status")["problems"]
    assert any(it["kind"] == "answers" and "refused" in it["words"] for it in problems)
    assert "refused: an agent must not answer" in install_text(monitor.home + "/monitor.log")
    assert "Allowed once" in asking.on_terminal("answer", "s1", "allow"), "a person's terminal may"
    assert asking.decision(hook) == {"behavior": "allow"}


@story_table("tables.txt", "suggestions", "given, words")
def test_a_suggestion_of_the_client_is_one_sentence(given: Any, words: str) -> None:
    assert cm.suggestion_words(given) == words


def test_the_command_shows_what_is_asked_and_answers_it(asking):
    asking.page(asking.pair())  # for the form, which waits only for a page
    asking.ask(session="s")
    assert "no answer" in asking.on_terminal("answer", "s", "perhaps")
    for number, line in enumerate(story_blocks("answers")[2]):
        asked, decision, shown = line.split(" → ")
        kind, *words = asked.split()
        hook, _ = asking.ask(kind, f"s{number}")
        assert shown in asking.on_terminal("answer", f"s{number}")
        said = asking.on_terminal("answer", f"s{number}", *words)
        assert asking.decision(hook) == json.loads(decision), said
    assert "asks nothing" in asking.on_terminal("answer", "s0")
    asking.ask("form", "f")
    for wrong in ("nmae=x", "size=7", "rush=yes"):
        assert "not fit" in asking.on_terminal("answer", "f", "accept", "name=Ada", wrong)
    asking.ask("Bash", "odd", tool_input={"command": "make\nalways 1: less"})
    assert "\n    always 1: less" in asking.on_terminal("answer", "odd"), "no command poses as a line of ours"
    odd = {"question": "Which?", "options": [{"label": "Red\x1b[31m"}]}
    asking.ask("AskUserQuestion", "red", tool_input={"questions": [odd]})
    assert "Answered: Red\ufffd[31m" in asking.on_terminal("answer", "red", "choose", "1")


@pytest.mark.parametrize("agent", ["codex", "qwen"])
def test_permissions_of_other_programs_are_answered_while_a_page_looks(asking, monkeypatch, tmp_path, agent):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CODEX_HOME", str(tmp_path / ".codex"))
    path = tmp_path / ee.AGENTS[agent].directory / cm.PROGRAMS[agent].file

    def hooks_after(command: str, *options: str) -> dict[str, Any]:
        in_process(asking.monitor, command, "--agent", agent, *options)
        found = json.loads(path.read_text()) if path.exists() else {}
        return {name: groups[0]["hooks"][0] for name, groups in found.get("hooks", {}).items()}

    hook = hooks_after("install", "--answers")["PermissionRequest"]
    assert hook["command"].count(f'emit_event.py" --answer {agent} ||') == 2 and hook["timeout"] == 30
    assert "questions can be answered on the page" in in_process(asking.monitor, "doctor").stdout
    payloads = agent_payloads(f"{agent}/perm-yes")
    asked = next(it for it in payloads if it["hook_event_name"] == "PermissionRequest")
    unseen = asking.hook(asked, hook["command"])
    assert unseen.communicate(timeout=10)[0] == b"", "no paired page looks: the dialog comes at once"
    page = asking.page(asking.pair())
    for behavior, more in (("allow", {}), ("deny", {"message": "use make"})):
        waiting, event_id = asking.asks(asked, hook["command"])
        assert asking.answer(page, event_id, {"do": behavior, **more}, asked["session_id"]) == "delivered"
        printed = {"hookEventName": "PermissionRequest", "decision": {"behavior": behavior, **more}}
        assert json.loads(waiting.communicate(timeout=20)[0]) == {"hookSpecificOutput": printed}
    question = {**asked, "tool_name": {"codex": "request_user_input", "qwen": "ask_user_question"}[agent]}
    assert asking.hook(question, hook["command"]).communicate(timeout=10)[0] == b""
    assert "--answer" not in str(hooks_after("install"))
    hooks_after("install", "--answers")
    assert hooks_after("uninstall") == {}
    said = in_process(asking.monitor, "install", "--agent", "gemini", "--answers").stderr
    assert "gemini takes no answers from the page" in said


def test_install_registers_answering_hooks_only_when_asked(monitor, monkeypatch):
    monkeypatch.setattr(cm, "claude_version", lambda: (2, 1, 332))
    for options, words in zip(("", "--answers", "--answers", ""), ("registered\n", "(pair", "(pair", "off")):
        assert words in in_process(monitor, "install", *options.split()).stdout
        entries = {name: groups[0]["hooks"] for name, groups in monitor.client_settings()["hooks"].items()}
        assert all(len(entry) == 1 for entry in entries.values())
        answering = {name for name, entry in entries.items() if "--answer" in entry[0]["command"]}
        assert len(answering) == (2 if options else 0) and answering <= set(ee.ANSWERED_HOOKS)
        assert entries["Elicitation"][0]["timeout"] == (3610 if options else 10)
    in_process(monitor, "install", "--answers", "--without", "PermissionRequest")
    assert ", forms of MCP servers can be answered on the page" in in_process(monitor, "doctor").stdout
    monkeypatch.setattr(cm, "claude_version", lambda: None)
    assert "and the page cannot answer; put it on" in in_process(monitor, "install", "--answers").stderr
    in_process(monitor, "uninstall")
    assert "hooks" not in monitor.client_settings()


def test_answers_through_redis_are_signed_fresh_and_wanted(make):
    server = make(RedisServer)
    remote = server.settings() | {"answers": {"remote": True}}
    one, two = (make(RedisMachine, config=remote, machine_id=name) for name in ("one", "two"))
    key = cm.secrets.token_hex(32).encode()
    for machine in (one, two):
        machine.serve()
        machine.wait_until("connected")
        ee.write_atomically(machine.home + "/answers.key", key + b"\n")
    asking, other = make(Asking, one), make(Asking, two)
    os.makedirs(one.home + "/hooks", exist_ok=True)
    ee.write_atomically(one.home + "/hooks/publisher-python", os.fsencode(sys.executable) + b"\n")
    hook = asking.hook(ANSWER_ASKED["Bash"])
    event_id = eventually(other.open_ids, 30, "the question at the other machine")[0]
    place, now = f"{REDIS_CHANNEL}:answer:{event_id}", int(server.cli("TIME").split()[0]) * 1000
    allow = {"do": "allow"}
    shown = next(it for it in two.stored_events() if it["id"] == event_id)
    other_input = {**shown["data"], "toolInput": {"command": "ls"}}
    unlike = [{**shown, **it} for it in ({"id": "x"}, {"data": other_input}, {"workingDirectory": "/x"})]
    for at, event, by in (
        (now, shown, b"0" * 64),
        *((now, it, key) for it in unlike),
        (now - 300_000, shown, key),
    ):
        mac = ee.signature(by, event, allow, at, "n")
        server.cli("RPUSH", place, json.dumps({"answer": allow, "at": at, "nonce": "n", "mac": mac}))
    server.cli("RPUSH", place, json.dumps({"answer": allow}), "x")
    eventually(lambda: server.cli("LLEN", place) == "0", 20)
    server.stop()
    server.start()
    two.kill()
    two.serve()
    two.wait_until("connected")
    assert hook.poll() is None
    deny = functools.partial(other.answer, other.page(other.pair()), event_id, {"do": "deny"})
    assert eventually(lambda: (outcome := deny()) != "failed" and outcome, 30) == "delivered"
    assert asking.decision(hook)["behavior"] == "deny"
    hook, always = (
        asking.hook({**ANSWER_ASKED["Bash"], "session_id": "s2"}),
        {"do": "always", "suggestions": [1]},
    )
    event_id = eventually(lambda: other.open_ids("s2"), 30, "the second question")[0]
    assert other.answer(other.page(other.pair()), event_id, always, "s2") == "delivered"
    reports = lambda: [it for it in two.stored_events() if "were refused" in str(it["data"])]  # noqa: E731
    assert "4 foreign, 1 old, 2 unsigned" in eventually(reports, 30)[0]["data"]["message"]
    one.write_config({"answers": {"remote": False}})
    assert asking.hook(ANSWER_ASKED["Bash"]).communicate(timeout=20)[0] == b"", "it does not wait"


@needs_browser
def test_the_page_shows_questions_whole_and_answers_by_buttons_and_keys(asking, open_tab):
    tab = open_tab(asking.monitor, "#s=s1")
    first, _ = asking.ask("Bash", command_note="x", tool_input={"command": "make\nrm -r x", "timeout": 5})
    tab.shows("ask", "Allow Bash?", "make rm -r x", "timeout 5", "may look, and not answer")
    assert "Allow once" not in tab.text("ask")
    asking.pair_tab(tab)
    always = ("Always: allow Bash(make:*) in this session", "Always: switch to the mode acceptEdits")
    tab.shows("ask", "Allow once", *always)
    tab.page.focus("#grid")
    tab.press("a d")
    assert first.poll() is None, "keys count only in the strip"
    tab.page.focus("#ask")
    tab.press("A")
    assert asking.decision(first)["updatedPermissions"]
    tab.shows("ask", "Always allowed: allow Bash(make:*) in this session", "from Chrome on 127.0.0.1,")
    tab.row_with("Always allowed: allow Bash(make:*) in this session; switch to the mode acceptEdits in this")
    for number, line in enumerate(story_blocks("answers")[3], 2):
        kind, acts, decision = re.fullmatch(r"(\w+) (.*) → (.*)", line).groups()
        hook, _ = asking.ask(kind, f"s{number}")
        tab.page.click(f"[data-session-id=s{number}]")
        tab.page.wait_for_selector("#ask [data-act]")
        for act in acts.split("; "):
            browser_acts(tab, act)
        assert asking.decision(hook) == json.loads(decision)
    long = {"mcp__x__write": {"n": [*range(300)]}, "ExitPlanMode": {"plan": "a|b\n--|--" + "\nc|d" * 400}}
    for tool, whole in long.items():
        hook, _ = asking.ask("Bash", f"s6{tool}", tool_name=tool, tool_input=whole)
        tab.page.click(f"[data-session-id=s6{tool}]")
        tab.shows("ask", "Show all of it before you allow it")
        assert tab.page.is_disabled("[data-act=a]")
        while tab.page.query_selector("#ask .showmore:not([hidden])"):
            tab.page.click("#ask .showmore:not([hidden])")
        tab.until("!document.querySelector('[data-act=a]').disabled")
    asking.monitor.emit(payload("UserPromptSubmit", "s6ExitPlanMode", prompt="go on"))
    tab.shows("ask", "answered in the terminal")
    hook.communicate(timeout=20)
    for number, (fields, words) in enumerate(story_cases("tables.txt", "asked").values(), 8):
        asking.ask("Bash", f"s{number}", **fields)
        tab.page.click(f"[data-session-id=s{number}]")
        tab.shows("ask", words)
        assert tab.page.is_disabled("[data-act=a]") == ("cannot" in words)
    tab.page.click("[data-testid=view-status]")
    tab.shows("status", "Browsers that may answer", "Chrome on 127.0.0.1")
    tab.page.set_viewport_size({"width": 360, "height": 740})
    asking.ask("Bash", "s7")
    tab.load("#s=s7")
    tab.page.wait_for_selector("[data-act=a]")
    boxes = tab.page.evaluate("look.seen('#ask .push').map((it) => it.getBoundingClientRect().toJSON())")
    assert boxes and all(it["height"] >= 40 and it["left"] >= 0 and it["right"] <= 360 for it in boxes)
    tab.page.click("[data-act=d]")


def test_what_is_typed_or_pressed_for_one_question_answers_no_other(asking, open_tab):
    tab = open_tab(asking.monitor, "#s=s1")
    first, _ = asking.ask("Bash", tool_input={"command": "make"})
    asking.pair_tab(tab)
    tab.page.click("[data-act=r]")
    tab.page.keyboard.type("use a d")
    asking.monitor.emit(payload("SubagentStart", agent_id="a1", agent_type="x"))
    second, _ = asking.ask("Bash", agent_id="a1", agent_type="x", tool_input={"command": "rm -r ~"})
    tab.shows("ask", "Next of 2")
    tab.page.keyboard.type("ifferent way")
    tab.press("Enter")
    assert asking.decision(first)["message"] == "use a different way"
    tab.shows("ask", "rm -r ~")
    tab.press("a")
    tab.page.click("[data-act=a]")
    tab.until("document.querySelector('#toast').innerText.startsWith('Not answered')")
    time.sleep(0.6)  # longer than it takes to read
    held = "new KeyboardEvent('keydown', { key: 'a', repeat: true, bubbles: true })"
    tab.page.evaluate(f"document.querySelector('#ask').dispatchEvent({held})")
    assert second.poll() is None
    tab.press("d")
    assert asking.decision(second)["behavior"] == "deny"


def test_an_answer_lost_with_the_connection_can_be_given_again(asking, open_tab):
    tab, lost = open_tab(asking.monitor, "#s=s1"), []
    hook, _ = asking.ask("Bash")
    asking.pair_tab(tab)
    tab.shows("ask", "Allow once")
    wire = BrowserWire(tab, lambda it: it["type"] == "answer" and not lost and not lost.append(it))
    tab.page.click("[data-act=a]")
    tab.shows("ask", "Sending")
    wire.cut()
    wire.mend()
    tab.page.click("[data-act=a]")
    assert asking.decision(hook)["behavior"] == "allow" and lost


# ---- Index: search and statistics over everything stored ---------------------------------------------------
# What the index answers is compared with reading every file, which is slow and plain.


class IndexCase:
    """Event files and the history over them, in this process; `store` is written to as the monitor would."""

    def __init__(self, folder: str | None = None) -> None:
        self.home = folder or new_home()
        self.path, self.store = self.home + "/index.db", journal_opened(self.home + "/events")
        self.history, self.started = cm.History(self.store, self.path), False

    def add(self, *events: dict[str, Any], day_ms: int = NOW_MS) -> IndexCase:
        """Store events as if they arrived at `day_ms`; payloads are made events."""
        built = [ee.build_event(given, given.get("timestamp", day_ms), "testbox") for given in events]
        stored = self.store.append(built, day_ms)
        assert None not in stored
        self.history.add(stored)
        return self

    def start(self) -> IndexCase:
        if not self.started:
            self.history.start()
        self.started = True
        return self

    def ready(self) -> IndexCase:
        self.start()
        eventually(self.is_complete, what="a complete index")
        return self

    def is_complete(self) -> bool:
        status = self.history.status()
        return bool(status["state"] == "ready" and status["lagEvents"] == 0)

    def search(self, words: str = "", **wanted: Any) -> list[dict[str, Any]]:
        """Return every result, over all pages."""
        results: list[dict[str, Any]] = []
        wanted |= {"q": words, "limit": 200, "cursor": ""}
        while wanted["cursor"] is not None:
            page = self.history.search(cm.search_query(wanted))
            results, wanted["cursor"] = results + page["results"], page["next"]
        return results

    def ids(self, words: str = "", **wanted: Any) -> list[str]:
        return [result["id"] for result in self.search(words, **wanted)]

    def figures(self, session: str | None = None, offset_minutes: int = 0) -> dict[str, Any]:
        zone = datetime.timezone(datetime.timedelta(minutes=offset_minutes))
        return self.history.statistics(0, 1 << 53, session, zone)

    def counted(self) -> int:
        return int(self.figures()["totals"]["events"])

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in journal_plain_lines(self.home + "/events")]

    def close(self) -> None:
        self.history.stop()
        self.store.close()
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture
def indexed() -> Iterator[IndexCase]:
    case = IndexCase()
    yield case
    case.close()


def index_prompt(number: int, text: str, session: str = "s1", **more: Any) -> dict[str, Any]:
    """Return a prompt event with a known id, a second after the one with the number before."""
    return {
        "eventType": "user_prompt", "hookType": "UserPromptSubmit", "id": f"e{number}", "sessionId": session,
        "timestamp": NOW_MS + number * 1000, "workingDirectory": "/home/dev/shop", "data": {"message": text}, **more,
    }  # fmt: skip


def index_prompts(numbers: Iterable[int], text: str = "word", sessions: int = 1) -> list[dict[str, Any]]:
    return [index_prompt(number, text, f"s{number % sessions}") for number in numbers]


def newest_first(numbers: Iterable[int]) -> list[str]:
    return [f"e{number}" for number in numbers][::-1]


@pytest.mark.parametrize("how", ["full text", "no full text", "no index"])
def test_words_beginnings_and_phrases_are_found_newest_first(indexed, monkeypatch, how):
    texts, searches, _ = story_blocks("search")
    indexed.add(*(index_prompt(number, json.loads(text)) for number, text in enumerate(texts)))
    if how == "no full text":
        monkeypatch.setattr(cm.IndexFile, "_FULL_TEXT", ("not there",))
    if how != "no index":
        indexed.ready()
    typed = [line.partition(" →")[0] for line in searches]
    found = (" ".join(id_[1:] for id_ in indexed.ids(words)) for words in typed)
    assert [f"{words} → {numbers}".rstrip() for words, numbers in zip(typed, found)] == searches


@pytest.mark.parametrize("line", story_blocks("search")[2])
def test_what_is_found_is_marked_with_its_accents(line: str) -> None:
    text, typed, expected = line.split(" → ")
    found = cm.snippet_of({"data": {"message": json.loads(text)}}, cm.parse_terms(typed))["snippet"]
    assert "".join(f"[{it['text']}]" if it.get("hit") else it["text"] for it in found) == expected


def test_many_marks_on_letters_do_not_hold_up_a_search() -> None:
    event, begun = {"data": {"message": ("a" + chr(0x301) * 100) * 3 + "c"}}, time.process_time()
    assert cm.snippet_of(event, cm.parse_terms('"a a a b"'))["snippet"] == []
    assert time.process_time() - begun < 1


def test_a_call_is_found_by_its_events_and_not_by_those_of_its_round(indexed):
    call = {"tool_name": "Bash", "tool_use_id": "ran", "tool_input": {"command": "ran"}}
    rounds = payload("PreToolUse", **call), payload("PostToolUse", **call, tool_response="done")
    for number, hook in enumerate((*rounds, payload("PostToolBatch", tool_calls=[call]))):
        indexed.add({"id": f"e{number}", "timestamp": NOW_MS + number, "machineId": "m", "hook": hook})
    assert indexed.ids("ran") == indexed.ready().ids("ran") == ["e1", "e0"]


index_texts = st.lists(
    st.lists(st.sampled_from(["alpha", "Beta", "gäbe", "x1", "日本", "a", "ab", "über-all", "\u00e9", "e\u0301", "-", "_", "İ", "ß",
                              "\ud83d", "\U0001f600", "\ue0003", "कि", "한국어", "Ａ", "ﬁ", "ǅ", "\x00", "1½", "²"])
             | st.text(max_size=6), max_size=6).map(" ".join),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=25)
@given(index_texts, st.data())
def test_the_index_finds_just_what_reading_every_event_finds(texts: list[str], data: Any) -> None:
    with contextlib.closing(IndexCase()) as case:
        case.add(*(index_prompt(number, text, f"s{number % 2}") for number, text in enumerate(texts))).ready()
        for _ in range(6):
            start = data.draw(st.integers(0, len(source := cm.fold(data.draw(st.sampled_from(texts))))))
            typed = source[start : start + data.draw(st.integers(1, 8))]
            typed += data.draw(st.sampled_from(["", "*"]))
            typed = f'"{typed}"' if data.draw(st.booleans()) else typed
            query = cm.search_query({"q": typed})
            expected = [event["id"] for event in case.events() if query.takes(event)]
            assert sorted(case.ids(typed)) == sorted(expected), typed


def test_every_filter_takes_what_it_says(indexed, monkeypatch):
    for number in range(60):
        hook = ("PreToolUse", "PostToolUse", "PostToolUseFailure")[number % 3]
        call = {"tool_name": ("Bash", "Read")[number % 2], "tool_use_id": f"t{number}"}
        hook = payload(hook, f"s{number % 4}", **call, tool_input={"command": f"number {number % 5}"})
        event = {**timed(hook, NOW_MS + number * 1000, f"box{number % 3}"), "id": f"e{number}"}
        indexed.add(event, day_ms=NOW_MS + (number // 20) * DAY_MS)
    indexed.ready()
    every, start = sorted(indexed.events(), key=lambda event: -event["timestamp"]), NOW_MS + 7000
    wanted: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda event: True),
        ({"session": "s2"}, lambda event: event["sessionId"] == "s2"),
        ({"session": "none"}, lambda event: False),
        ({"machine": "box1"}, lambda event: event["machineId"] == "box1"),
        ({"tool": "Read"}, lambda event: event["data"]["toolName"] == "Read"),
        ({"type": "tool_error"}, lambda event: event["eventType"] == "tool_error"),
        ({"type": "PostToolUse"}, lambda event: event["hookType"] == "PostToolUse"),
        ({"type": "tool"}, lambda event: False),
        ({"from": start}, lambda event: event["timestamp"] >= start),
        ({"to": start}, lambda event: event["timestamp"] < start),
        ({"from": start, "to": start + 1}, lambda event: event["timestamp"] == start),
    ]
    for (one, takes_one), (other, takes_other) in itertools.combinations_with_replacement(wanted, 2):
        both = {**one, **other}
        if len(both) < len(one) + len(other):
            continue
        expected = [event for event in every if takes_one(event) and takes_other(event)]
        assert indexed.ids(**both) == [event["id"] for event in expected], both
        numbered = [event["id"] for event in expected if event["data"]["toolInput"]["command"] == "number 3"]
        assert indexed.ids('"number 3"', **both) == numbered, both
    own = [it for it in every if it["sessionId"] in ("s0", "s1") and it["data"]["toolName"] == "Bash"]
    for limit in (500, 1):  # sessions by the index, or by the line in the file
        monkeypatch.setattr(cm, "SESSIONS_MATCHED", limit)
        query = cm.search_query({"q": "number", "tool": "Bash"}, frozenset(("s0", "s1", "none")))
        found = indexed.history.search(query)["results"]
        assert [result["id"] for result in found] == [event["id"] for event in own]


def test_pages_follow_each_other_without_gap_or_double(indexed: IndexCase, monkeypatch: Any) -> None:
    # Many in one millisecond, over two days of arrival, in any order and small batches, while others arrive.
    monkeypatch.setattr(cm, "INDEX_SLICE_BYTES", 1000)
    monkeypatch.setattr(cm, "INDEX_BATCH_S", 0)
    numbers = list(range(300))
    random.Random(3).shuffle(numbers)
    for place, number in enumerate(numbers):
        event = {**index_prompt(number, "word"), "timestamp": NOW_MS + number // 100 * 1000}
        indexed.add(event, day_ms=NOW_MS + (place // 150) * DAY_MS)
    assert indexed.ready().counted() == 300
    seen, cursor = [], None
    while len(seen) < 300:
        page = indexed.history.search(cm.search_query({"q": "word", "limit": 53, "cursor": cursor}))
        assert len(page["results"]) <= 53
        seen += page["results"]
        cursor = page["next"]
        indexed.add(index_prompt(1000 + len(seen), "word"))
        indexed.ready()
    assert cursor is None and [result["id"] for result in seen] == newest_first(numbers)


@pytest.mark.parametrize("days", [(0, 1, 2), (3, 0.9, 0.95, 4), (5, 1, 5.1, 1.1), (1, 0.3, 1.1)], ids=str)
def test_results_come_in_order_of_arrival_whatever_the_clock_did(indexed, days):
    for place, day in enumerate(days):
        for number in range(place * 3, place * 3 + 3):
            arrived_ms = NOW_MS + int(day * DAY_MS) + number % 3
            indexed.add(index_prompt(number, "word", f"s{number % 2}"), day_ms=arrived_ms)
        if place == len(days) // 2:
            indexed.ready()
    indexed.ready()
    numbers = range(3 * len(days))
    for wanted in ({}, {"words": "word"}):
        assert indexed.ids(limit=2, **wanted) == newest_first(numbers)
        assert indexed.ids(session="s1", limit=1, **wanted) == newest_first(numbers[1::2])
    assert indexed.counted() == len(numbers)


def test_what_is_not_indexed_yet_is_found_in_the_journal(indexed: IndexCase, monkeypatch: Any) -> None:
    indexed.add(*index_prompts(range(5)))
    assert indexed.ids("word") == newest_first(range(5))  # nothing runs yet
    assert not os.path.exists(indexed.path)
    indexed.ready()
    monkeypatch.setattr(cm.IndexFile, "add", lambda *_: time.sleep(0.2))
    indexed.add(*index_prompts(range(5, 9)))
    page = indexed.history.search(cm.search_query({"q": "word", "limit": 6}))
    assert [result["id"] for result in page["results"]] == newest_first(range(3, 9))
    assert page["complete"] is True and page["next"] == "4"


def test_a_search_that_begins_slowly_names_where_the_next_page_begins(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "SEARCH_BUDGET_S", -1)
    lines = [cm.numbered_line(seq, NOW_MS, b'{"id":"e"}') for seq in (9, 8)]
    page = cm.search_page(cm.SearchQuery(), lines)
    assert page["next"] == "9" and len(page["results"]) == 1
    assert cm.search_page(cm.SearchQuery(before=9), lines[1:])["next"] is None


def test_a_line_is_found_by_its_number_also_in_an_edited_file(tmp_path: Any) -> None:
    rng = random.Random(5)
    seqs, lines = rng.sample(range(1, 450), 100), []
    for seq in sorted(seqs):
        event = ee.build_event(index_prompt(seq, "x" * rng.choice([1, 500, 20_000])), NOW_MS, "m")
        lines += [*rng.choice([[], [b"not ours"]]), cm.numbered_line(seq, NOW_MS, ee.encode_json(event))]
    day = tmp_path / "events" / "2026-01-01"
    day.mkdir(parents=True)
    (day / "s.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    journal = journal_opened(day.parent)
    for seq in range(1, 450):
        line = journal.line(seq, "2026-01-01", "s.jsonl")
        assert (line and cm.line_seq(line)) == (seq if seq in seqs else None)
    assert journal.line(1, "2026-01-01", "gone.jsonl") is None


def test_what_is_read_before_it_is_handed_over_is_not_missing(indexed: IndexCase) -> None:
    stored = indexed.store.append([ee.build_event(index_prompt(1, "quokka"), NOW_MS, "testbox")], NOW_MS)
    indexed.ready()
    indexed.history.add(stored)
    assert indexed.history.status()["lagEvents"] <= 1
    eventually(lambda: indexed.history.status()["lagEvents"] == 0)
    indexed.add(index_prompt(2, "wombat"))
    eventually(lambda: indexed.ids("wombat"))
    eventually(lambda: indexed.history.status()["lagEvents"] == 0)


def test_an_idle_index_looks_only_now_and_then(indexed, monkeypatch):
    looks, is_removed = [], cm.IndexFile.is_removed
    noted = lambda file: looks.append(time.monotonic()) or is_removed(file)  # noqa: E731
    monkeypatch.setattr(cm.IndexFile, "is_removed", noted)
    indexed.add(index_prompt(1, "word")).ready()
    eventually(lambda: time.monotonic() > looks[-1] + 1, what="a second without a look")


def test_a_result_shows_where_it_was_found(indexed: IndexCase) -> None:
    long = "before " * 100 + "the needle in\n   here " + "after " * 100
    (result,) = indexed.add(*hooks("result find hay => " + long)).ready().search('needle "here after"')
    assert result["field"] == "toolOutput"
    text = "".join(piece["text"] for piece in result["snippet"])
    assert text.startswith("…") and text.endswith("…") and len(text) < 260 and "\n" not in text
    assert [piece["text"] for piece in result["snippet"] if piece.get("hit")] == ["needle", "here after"]
    assert result["data"]["target"] == "find hay" and result["partial"] is True


INDEX_DAMAGE = {kind: shell for kind, (shell,) in story_cases("tables.txt", "damage").items()}
# Damage while the index is not open. A closed index has no log and no map.
SNAPSHOT_DAMAGE = {**INDEX_DAMAGE, "a directory in its place": "rm index.db; mkdir index.db"}
SNAPSHOTS = {"": b"machines", "s1": b"\x00\xff" * 3000, "s\ud8001": b""}


def damage_index(case: IndexCase, damage: str) -> None:
    shell = ["/bin/sh", "-c", SNAPSHOT_DAMAGE[damage]]
    subprocess.run(shell, cwd=case.home, check=True, stderr=subprocess.DEVNULL)


@pytest.fixture
def saved(indexed: IndexCase) -> IndexCase:
    """A stopped index with events of three sessions, SNAPSHOTS and the checkpoint 2."""
    indexed.add(index_prompt(1, "all"), index_prompt(2, "all", "s\ud8001"))
    indexed.add(*index_prompts(range(3, 300), "all")).ready()
    indexed.history.save_snapshots(indexed.history.generation, {"s1": b"old", "": b"machines"}, None)
    indexed.history.save_snapshots(indexed.history.generation, SNAPSHOTS, 2)
    indexed.history.stop()  # writes what is queued
    return indexed


def snapshots_of(case: IndexCase) -> tuple[int, dict[str, bytes]]:
    """Return the checkpoint and the snapshots as the next monitor would load them."""
    checkpoint, rows = cm.History(case.store, case.path).load_snapshots()
    return checkpoint, dict(rows)


@pytest.mark.parametrize("damage", SNAPSHOT_DAMAGE)
def test_an_index_damaged_while_closed_is_rebuilt_without_snapshots(saved, monkeypatch, damage):
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.1)
    damage_index(saved, damage)
    nothing_lost = damage in ("without its log", "without its map")
    assert snapshots_of(saved) == ((2, SNAPSHOTS) if nothing_lost else (0, {}))
    again = IndexCase(saved.home)
    again.add(index_prompt(5000, "all"))
    again.start()
    if os.path.isdir(saved.path):
        status = eventually(lambda: again.history.status()["state"] == "off" and again.history.status())
        assert status["error"] and len(again.ids("all")) == 300
        with pytest.raises(cm.RequestError, match="index"):
            again.figures()
        os.rmdir(saved.path)
    eventually(lambda: again.is_complete() and again.counted() == 300)
    assert again.ids("all") == newest_first([*range(1, 300), 5000])
    again.history.stop()


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_an_index_damaged_while_it_is_used_answers_nothing_wrong(indexed, damage):
    indexed.add(*index_prompts(range(300), "all"))
    assert indexed.ready().ids("all") == newest_first(range(300))
    damage_index(indexed, damage)
    for number in range(3):
        eventually(lambda: indexed.ids("all") == newest_first(range(300)))
        indexed.add(index_prompt(1000 + number, "later"))
        eventually(lambda number=number: len(indexed.search("later")) == number + 1)


def test_statistics_wait_for_an_index_that_is_being_made(indexed, monkeypatch):
    connect = cm.IndexFile._connect

    def connect_slowly(file: Any) -> Any:
        db = connect(file)
        time.sleep(0.3)  # there is a file, and nothing in it
        return db

    monkeypatch.setattr(cm.IndexFile, "_connect", connect_slowly)
    assert indexed.start().counted() == 0
    assert indexed.ids("nothing") == []


def many_words(rng: random.Random, numbers: Iterable[int], session: str = "s1") -> list[dict[str, Any]]:
    texts = ((number, " ".join(f"w{rng.randrange(100_000)}" for _ in range(50))) for number in numbers)
    return [index_prompt(number, text, session) for number, text in texts]


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_too_small_for_the_index_hinders_nothing_and_heals(indexed, monkeypatch):
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.2)
    place = indexed.home + "/small"
    os.mkdir(place)
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    indexed.add(*many_words(random.Random(1), range(1000)), index_prompt(9999, "quokka"))
    indexed.history = history = cm.History(indexed.store, place + "/index.db")
    try:
        history.start()
        status = eventually(lambda: history.status()["state"] == "off" and history.status(), 30)
        assert "full" in status["error"] and indexed.ids("quokka") == ["e9999"]
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        eventually(lambda: history.status()["state"] == "ready", 30)
        assert indexed.counted() == 1001 and indexed.ids("quokka") == ["e9999"]
    finally:
        history.stop()
        unmount(place)


def test_files_removed_changed_or_added_by_hand_are_noticed(indexed: IndexCase) -> None:
    for day in range(3):
        indexed.add(*index_prompts(range(day * 10, day * 10 + 10), sessions=2), day_ms=NOW_MS + day * DAY_MS)
    indexed.ready()
    removed, thinned, changed = (f"{indexed.home}/events/{day}" for day in indexed.store.days())
    shutil.rmtree(removed)
    os.unlink(thinned + "/s1.jsonl")
    with open(changed + "/s0.jsonl", "rb") as file:
        kept = file.readlines()[1:]
    ee.write_atomically(changed + "/s0.jsonl", b"".join(kept))
    by_hand = ee.encode_json(ee.build_event(index_prompt(999, "word by hand", "s9"), NOW_MS, "m"))
    by_hand = cm.numbered_line(8, NOW_MS, by_hand)
    ee.write_atomically(changed + "/s9.jsonl", by_hand + b"\n{ this is no event\n")
    indexed.history.rescan()
    indexed.ready()
    expected = sorted(event["id"] for event in indexed.events())
    assert len(expected) == 15 and sorted(indexed.ids("word")) == expected
    assert indexed.counted() == 15


def test_the_space_of_deleted_days_is_given_back(indexed: IndexCase) -> None:
    rng = random.Random(1)
    for part in range(4):
        events = many_words(rng, range(part * 1000, part * 1000 + 200), f"s{part}")
        indexed.add(*events, day_ms=NOW_MS + part * DAY_MS)
    indexed.ready()
    full = indexed.history.status()["bytes"]
    for day in indexed.store.days()[:3]:
        shutil.rmtree(f"{indexed.home}/events/{day}")
    indexed.history.rescan()
    eventually(lambda: indexed.is_complete() and indexed.history.status()["bytes"] < full * 0.5)
    assert len(indexed.search()) == len(indexed.search("w*")) == 200


def test_snapshots_come_back_with_their_checkpoint(saved: IndexCase) -> None:
    assert snapshots_of(saved) == (2, SNAPSHOTS)
    again = IndexCase(saved.home)
    assert again.history.load_snapshots()[0] == 2
    again.ready()
    assert again.history.generation == 0
    again.history.save_snapshots(0, {"s1": b"new"}, None)  # the first piece of more
    again.history.save_snapshots(1, {"s1": b"of another file"}, 9)
    again.history.forget("s\ud8001")
    again.history.stop()
    assert snapshots_of(again) == (2, {"": b"machines", "s1": b"new"})
    (path,) = glob.glob(saved.home + "/events/*/s1.jsonl")
    os.unlink(path)
    assert snapshots_of(saved) == (2, {"": b"machines"}), "those of sessions without files are left out"
    IndexCase(saved.home).ready().history.stop()
    with contextlib.closing(sqlite3.connect(saved.path)) as db:
        assert db.execute("SELECT count(*) FROM snapshots").fetchone() == (1,)


def test_a_new_index_has_a_new_generation_and_no_checkpoint(indexed: IndexCase, monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.1)
    indexed.add(index_prompt(1, "one")).ready()
    history = indexed.history
    first = history.generation
    history.save_snapshots(first, {"s1": b"a"}, 1)
    eventually(lambda: snapshots_of(indexed) == (1, {"s1": b"a"}))
    os.unlink(indexed.path)
    indexed.search("one")  # a search that finds it missing wakes the thread
    eventually(lambda: history.generation > first and history.status()["state"] == "ready")
    history.save_snapshots(first, {"s1": b"b"}, 2)
    history.save_snapshots(history.generation, {"s1": b"c"}, None)
    second = history.generation
    with monkeypatch.context() as patch:
        patch.setattr(cm.IndexFile, "add", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        indexed.add(index_prompt(2, "two"))
        eventually(lambda: history.status()["state"] == "off")
        assert snapshots_of(indexed) == (0, {})
        history.save_snapshots(second, {"s1": b"lost"}, 2)  # what cannot be written is not remembered
    eventually(lambda: history.generation > second and history.status()["state"] == "ready")
    history.save_snapshots(history.generation, {"s1": b"d"}, 2)
    eventually(lambda: snapshots_of(indexed) == (2, {"s1": b"d"}))


def test_a_connection_to_the_index_is_kept_until_its_file_is_replaced(tmp_path):
    path, known = str(tmp_path / "index.db"), []
    reader, before = cm.IndexReader(path), len(os.listdir("/dev/fd"))
    for _ in range(2):
        with contextlib.closing(cm.IndexFile(path).db):
            with reader.reading(60) as kept:
                assert kept not in known
            with reader.reading(60) as first, reader.reading(60) as second:
                assert first is kept and second is not kept
        cm.remove_index(path)
        known += [first, second]
    reader.close()
    assert len(os.listdir("/dev/fd")) == before


def test_the_index_needs_no_newer_sqlite_than_systems_with_python_3_9_have() -> None:
    for module in (cm, ee):  # 3.26 to 3.34
        assert not re.search(r"ON CONFLICT DO UPDATE|\bRETURNING\b|\biif\(", install_text(module.__file__))


def calls_by_hand(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of every call its tool, how it ended and how long it took, if that is known."""
    calls: dict[Any, dict[str, Any]] = {}
    for event in events:
        data, hook = event["data"], event["hookType"]
        own = {"tool_use_id": data.get("toolUseId"), "tool_name": data.get("toolName")}
        for named in data.get("tool_calls", [own] if "ToolUse" in hook else []):
            new = {"tool": named["tool_name"], "how": "", "ms": None}
            call = calls.setdefault((event["sessionId"], named["tool_use_id"]), new)
            if hook == "PreToolUse":
                call["begun"] = event["timestamp"]
            elif hook == "PostToolBatch":
                call["how"] = call["how"] or "failed"
            else:
                how = (
                    "ok" if hook == "PostToolUse" else "interrupted" if data.get("is_interrupt") else "failed"
                )
                call |= {"how": how, "end": event["timestamp"], "ms": data.get("durationMs")}
    for call in calls.values():
        if call["ms"] is None and {"begun", "end"} <= call.keys():
            call["ms"] = call["end"] - call["begun"]
    return list(calls.values())


def tools_by_hand(events: list[dict[str, Any]]) -> dict[str, Any]:
    tools, calls = {}, calls_by_hand(events)
    for name in {call["tool"] for call in calls}:
        own = [call for call in calls if call["tool"] == name]
        outcomes = collections.Counter(call["how"] for call in own)
        times = sorted(call["ms"] for call in own if call["ms"] is not None)
        tools[name] = {
            "calls": len(own), "failures": outcomes["failed"], "noResult": outcomes["interrupted"] + outcomes[""],
            "timed": len(times), "totalMs": sum(times), "maxMs": max(times, default=None),
        }  # fmt: skip
        for percent in (50, 95):  # the least time that so many calls did not exceed
            enough = (ms for ms in times if sum(other <= ms for other in times) * 100 >= percent * len(times))
            tools[name][f"p{percent}Ms"] = next(enough, None)
    return tools


def check_statistics(figures: dict[str, Any], events: list[dict[str, Any]], offset_minutes: int) -> None:
    """Compare the statistics with what counting gives: one event after the other, all durations in lists."""
    events = [event for event in events if event["hookType"] != "Monitor"]
    tools = tools_by_hand(events)
    rows = {row["toolName"]: row for row in figures["tools"]}
    assert {tool: {name: row[name] for name in tools[tool]} for tool, row in rows.items()} == tools
    days = {row["day"]: row["events"] for row in figures["days"] if row["events"]}
    of_days = (time.gmtime(event["timestamp"] / 1000 + offset_minutes * 60) for event in events)
    assert days == collections.Counter(time.strftime("%Y-%m-%d", it) for it in of_days)
    machines = {row["machineId"]: row["events"] for row in figures["machines"]}
    assert machines == collections.Counter(event["machineId"] for event in events)
    prompts = [event["data"]["message"] for event in events if event["hookType"] == "UserPromptSubmit"]
    totals = {
        "events": len(events),
        "prompts": sum("<task-" not in str(message) for message in prompts),
        "sessions": len({event["sessionId"] for event in events}),
        "failures": sum(tool["failures"] for tool in tools.values()),
        "toolCalls": sum(tool["calls"] for tool in tools.values()),
    }
    assert {name: figures["totals"][name] for name in totals} == totals
    for group in ("projects", "machines", "programs", "days", "hours", "timeline", "sessions"):
        for name in ("events", "toolCalls", "failures"):
            assert sum(row[name] for row in figures[group]) == totals[name], (group, name)
    slowest = [call["durationMs"] for call in figures["slowest"]]
    assert slowest == sorted(slowest, reverse=True)
    assert slowest[:1] == sorted(tool["maxMs"] or 0 for tool in tools.values())[:-2:-1]
    assert sum(row["failures"] for row in figures["failing"]) <= totals["failures"]


def index_work(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return made-up work of some sessions on two machines over three days, out of order."""
    work = []
    for number in range(count):
        session, at = f"s{rng.randrange(6)}", NOW_MS + rng.randrange(3 * DAY_MS)
        length, tool = int(rng.lognormvariate(5, 2)), rng.choice(["Bash", "Read", "Edit"])
        command = {"command": f"run {rng.randrange(5)}"}
        about = {"tool_name": tool, "tool_use_id": f"t{number}", "tool_input": command}
        steps: list[tuple[int, str, dict[str, Any]]] = [(0, "PreToolUse", about)] if number % 9 else []
        steps.append(rng.choice([
            (length, "PostToolUse", {**about, "duration_ms": length}), (length, "PostToolUse", about),
            (length + 1, "PostToolUseFailure", {**about, "duration_ms": length, "error": "no"}),
            (3, "PostToolUseFailure", {**about, "error": "no", "is_interrupt": True}), (0, "UserPromptSubmit", {"prompt": "hi"}),
        ]))  # fmt: skip
        if number % 7 == 0:
            gone = {"tool_name": "Gone", "tool_use_id": f"gone{number}", "tool_input": {}}
            steps.append((length + 5, "PostToolBatch", {"tool_calls": [about, gone]}))
        machine = f"box{session[1] in '123'}"
        for place, (after_ms, hook, fields) in enumerate(steps):
            event = timed(payload(hook, session, **fields), at + after_ms, machine)
            work.append({**event, "id": f"e{number}.{place}"})
    rng.shuffle(work)
    return work


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_what_counting_the_files_gives(indexed, seed):
    work = index_work(random.Random(seed), 300)
    indexed.add(*work[:400]).ready()
    events = indexed.add(*work[400:], day_ms=NOW_MS + DAY_MS).ready().events()
    for session, offset in itertools.product((None, "s1", "s4"), (0, 60, -570)):
        own = [event for event in events if session in (None, event["sessionId"])]
        check_statistics(indexed.figures(session, offset), own, offset)


def index_usage(number: int, session: str, **models: tuple[int, int]) -> dict[str, Any]:
    """Return the end of a turn that has what a session has used so far: (input, output) by model."""
    named = ("input", "output", "cacheRead")
    used = {name.replace("_", "-"): dict(zip(named, (*counts, 7))) for name, counts in models.items()}
    turn = {"eventType": "turn_end", "hookType": "Stop", "data": {"usage": {"models": used, "agents": {}}}}
    return {**index_prompt(number, "", session), **turn}


def test_tokens_count_when_they_were_used_by_model_project_and_session(indexed: IndexCase) -> None:
    day, elsewhere = DAY_MS // 1000, {"workingDirectory": "/home/dev/bank", "agent": "codex"}
    indexed.add(
        index_usage(0, "a", claude_opus_4_5=(1000, 100)),
        index_usage(60, "a", claude_opus_4_5=(5000, 500)),  # the totals grow
        index_usage(day, "a", claude_opus_4_5=(6000, 600), claude_haiku_4_5=(50, 5)),
        index_usage(day + 3000, "a", claude_opus_4_5=(6000, 600), claude_haiku_4_5=(50, 5)),  # once more
        {**index_usage(30, "b", strange_model=(10, 1)), **elsewhere},
        {**index_prompt(40, "", "c"), "data": {"usage": {"input_tokens": 5}}},  # another program's form
    )
    figures = indexed.ready().figures()
    expected: dict[str, dict[str, Any]] = {
        "day": {cm.day_of(NOW_MS): (5010, 501), cm.day_of(NOW_MS + DAY_MS): (1050, 105)},
        "model": {"claude-opus-4-5": (6000, 600), "claude-haiku-4-5": (50, 5), "strange-model": (10, 1)},
        "project": {"/home/dev/shop": (6050, 605), "/home/dev/bank": (10, 1)},
        "sessionId": {"a": (6050, 605), "b": (10, 1), "c": None},
        "agent": {"": (6050, 605), "codex": (10, 1)},
    }
    for name, group in zip(expected, ("days", "models", "projects", "sessions", "programs")):
        used = {row[name]: row["tokenUsage"] for row in figures[group]}
        pairs = {key: usage and (usage["totalInput"], usage["totalOutput"]) for key, usage in used.items()}
        assert pairs == expected[name]
    assert figures["totals"]["tokenUsage"]["totalInput"] == 6060
    assert figures["totals"]["estimatedCostUsd"] is None
    costs = {row["model"]: row["estimatedCostUsd"] for row in figures["models"]}
    opus = cm.SessionUsage(0, {"claude-opus-4-5": cm.Tokens(6000, 600, 7)})
    assert costs["strange-model"] is None and costs["claude-opus-4-5"] == cm.estimated_usd(opus, {})
    later = indexed.history.statistics(NOW_MS + DAY_MS - 3_600_000, 1 << 53, "a")
    assert later["totals"]["tokenUsage"]["totalInput"] == 1050


def test_the_clients_own_cost_counts_before_an_estimate(indexed: IndexCase) -> None:
    def line(number: int, session: str, usd: Any) -> dict[str, Any]:
        data = {"gauges": {"cost": {"total_cost_usd": usd}}}
        return {**index_prompt(number, "", session), "eventType": "status_line", "hookType": "", "data": data}

    day = DAY_MS // 1000
    million = {"claude_opus_4_5": (1_000_000, 0)}  # 5 USD and a little
    indexed.add(
        index_usage(0, "a", **million), line(1, "a", 3.25), line(2, "a", 3.5), line(day, "a", 4.5),
        index_usage(3, "b", **million), line(4, "b", -1), line(5, "b", math.nan), line(6, "c", 1),
        line(7, "d", 2), index_usage(2 * day, "d", **million),  # without a status line on its last day
    )  # fmt: skip
    figures = indexed.ready().figures()
    part = cm.estimated_usd(cm.SessionUsage(0, {"claude-opus-4-5": cm.Tokens(1_000_000, 0, 7)}), {})
    assert part and figures["totals"]["costUsd"] == pytest.approx(4.5 + 1 + 2 + 2 * part)
    assert figures["totals"]["estimatedPartUsd"] == pytest.approx(2 * part)
    costs = {row["sessionId"]: (row["costUsd"], row["estimatedPartUsd"]) for row in figures["sessions"]}
    assert costs == {"a": (4.5, 0), "b": (part, part), "c": (1, 0), "d": (2 + part, part)}
    assert [row["costUsd"] for row in figures["days"]] == [pytest.approx(6.5 + part), 1.0, part]
    assert [row["model"] for row in figures["models"]] == ["claude-opus-4-5"]
    assert figures["totals"]["events"] == 3 and len(indexed.search()) == 3, "a status line is no event"


def test_token_totals_that_come_as_events_are_no_events_of_their_session(indexed: IndexCase) -> None:
    totals = {**index_usage(60, "a", claude_opus_4_5=(5000, 500)), "eventType": "usage", "hookType": ""}
    with_turn = index_usage(0, "a", claude_opus_4_5=(1000, 100))  # as older monitors stored them
    figures = indexed.add(with_turn, totals, {**totals, "id": "alone", "sessionId": "b"}).ready().figures()
    assert (figures["totals"]["events"], figures["totals"]["sessions"]) == (1, 2)
    assert figures["totals"]["tokenUsage"]["totalInput"] == 10_000
    assert {row["sessionId"]: row["events"] for row in figures["sessions"]} == {"a": 1, "b": 0}
    assert indexed.ids() == indexed.ids(type="turn_end") == ["e0"] and indexed.ids(type="usage") == []
    indexed.history.stop()
    os.unlink(indexed.path)
    assert indexed.ids() == ["e0"]  # by reading the files too


def test_odd_events_of_other_programs_do_not_stop_the_index(indexed: IndexCase) -> None:
    odd = [json.loads(line) for line in story_parts("tables.txt")["odd events"]]
    for number, fields in enumerate(odd):
        indexed.add({"eventType": "message", "id": f"odd{number}", "timestamp": NOW_MS, **fields})
    indexed.ready()
    assert indexed.history.status()["error"] is None
    assert sorted(indexed.ids()) == sorted(f"odd{number}" for number in range(len(odd)))
    assert indexed.ids("bottom") == ["odd9"]
    assert indexed.ids(session="s\ud800") == indexed.ids(machine="m\udfff") == ["odd0"]
    assert len(indexed.ids(type="Unheard % of_")) == 1 and indexed.ids(type="%") == []
    assert indexed.counted() == len(odd)


def test_statistics_of_a_time_range_leave_the_rest_out(indexed: IndexCase) -> None:
    indexed.add(*index_prompts(range(0, 86_400, 300)))
    start, end, quarter = NOW_MS + 3 * 3_600_000 + 1, NOW_MS + 5 * 3_600_000, 900_000
    figures = indexed.ready().history.statistics(start, end)
    since, until = figures["from"], figures["to"]
    assert since <= start < since + quarter and until - quarter < end <= until
    inside = sum(since <= event["timestamp"] < until for event in indexed.events())
    assert figures["totals"]["events"] == figures["totals"]["prompts"] == inside
    empty = indexed.history.statistics(NOW_MS - 10 * DAY_MS, NOW_MS - 9 * DAY_MS)
    assert empty["totals"]["events"] == 0 and empty["tools"] == empty["days"] == []


@pytest.mark.parametrize("zone", ZONE_TIMES)
def test_days_and_hours_are_those_of_the_zone_across_a_clock_change(indexed: IndexCase, zone: str) -> None:
    figures = indexed.add(*zone_calls(zone)).ready().history.statistics(0, 1 << 53, None, cm.time_zone(zone))
    assert figures["timeZone"] == zone
    groups = (("day", figures["days"]), ("hour", figures["hours"]))
    days, hours = ({row[key]: row["toolCalls"] for row in it if row["toolCalls"]} for key, it in groups)
    assert days == collections.Counter(f"2026-10-{day:02}" for _, day, _ in ZONE_TIMES[zone])
    assert hours == collections.Counter(hour for _, _, hour in ZONE_TIMES[zone])
    # An hour that the clock shows twice is two.
    begun = [utc_ms(at.replace(":30", ":00")) for at, _, _ in ZONE_TIMES[zone]]
    assert [row["time"] for row in figures["timeline"]] == begun
    quarter = indexed.history.statistics(0, 1 << 53, None, cm.time_zone("Asia/Kathmandu"))  # +5:45
    assert quarter["timeline"][0]["time"] == begun[0] + 15 * 60_000


def test_recorded_sessions_count_the_same_in_statistics_and_states(indexed: IndexCase) -> None:
    book = cm.Sessions(own_machine="testbox")
    sent = itertools.chain.from_iterable(map(recorded, recording_names()))
    indexed.add({"eventType": "session_end", "sessionId": "without-prompt", "agent": "codex", "data": {}})
    indexed.add(*(timed(hook, NOW_MS + number * 10) for number, hook in enumerate(sent)))
    for event in indexed.events():
        book.apply(event)
    assert book.sessions and len(book.sessions) == indexed.ready().figures()["totals"]["sessions"]
    for session_id, session in book.sessions.items():
        totals, counts = indexed.figures(session_id)["totals"], session.counts
        for name in ("events", "prompts", "toolCalls"):
            assert totals[name] == counts[name], (session_id, name)
        assert totals["failures"] == counts["toolErrors"], session_id
    failing = indexed.figures()["failing"]  # also of calls that only a batch reports
    assert {"?", ""}.isdisjoint(words for row in failing for words in (row["toolName"], row["lastError"]))


def index_ready(monitor: RunningMonitor, timeout_s: float = 60) -> dict[str, Any]:
    def complete() -> dict[str, Any] | None:
        index: dict[str, Any] = monitor.get("/api/status")["index"]
        return index if index["state"] == "ready" and index["lagEvents"] == 0 else None

    return dict(eventually(complete, timeout_s, "a complete index"))


def found_in(answer: dict[str, Any]) -> list[str]:
    return [result["sessionId"] for result in answer["results"]]


def test_what_was_just_stored_is_found_over_http_and_websocket(running: RunningMonitor) -> None:
    running.emit(*hooks("@a call quokka; @a prompt where is the quokka?; @b prompt quokka; @b ask rm"))
    index_ready(running)
    page = running.get("/api/search?q=quokka&limit=1")
    assert found_in(page) == ["b"] and page["complete"] is True
    for query, found in {
        f"limit=1&cursor={page['next']}": ["a"], "state=waiting": ["b"], "state=failed": [], "state=waiting&session=a": [],
    }.items():  # fmt: skip
        assert found_in(running.get("/api/search?q=quokka&" + query)) == found, query
    client, wanted = running.websocket("rows"), {"type": "search", "query": "quokka"}
    answer = client.ask("search_results", eventType="user_prompt", session="a", requestId=7, **wanted)
    assert answer["requestId"] == 7 and found_in(answer) == ["a"]
    assert answer["results"][0]["snippet"][1] == {"text": "quokka", "hit": True}
    assert found_in(client.ask("search_results", state="working", **wanted)) == ["a", "a"]
    for name, wrong in (("state", "asleep"), ("cursor", "x"), ("limit", 9999)):
        client.send(requestId=name, **wanted, **{name: wrong})
        assert name in client.next("error", requestId=name)["message"]
    figures = running.get("/api/stats")
    assert figures["totals"]["prompts"] == 2
    labels = {row["sessionId"]: row["label"] for row in figures["sessions"]}
    assert labels == {"a": "where is the quokka?", "b": "quokka"}
    assert stat.S_IMODE(os.stat(running.home + "/index.db").st_mode) == 0o600
    client.ask("session_deleted", type="delete_session", sessionId="a")
    eventually(lambda: found_in(running.get("/api/search?q=quokka")) == ["b"])
    eventually(lambda: running.get("/api/stats")["totals"]["sessions"] == 1)


def test_a_question_that_makes_no_sense_is_refused_with_the_parameter(shared):
    for query in HTTP_ROWS["questions"]:
        status, _, body = shared.request("/api/" + query)
        answer = json.loads(body)
        assert (query, status, answer["field"]) == (query, 400, re.split("[?=]", query)[1])
        assert "timeZone" not in query or "Europe/Berlin" in answer["error"]
    for day in ("9999-12-31", "2026-1-5"):
        assert shared.request(f"/api/stats?from={day}&to={day}")[0] == 200


@story_table("tables.txt", "ranges", "start, end, zone, first, last")
def test_a_range_ends_before_its_last_day_unless_it_is_the_first(start, end, zone, first, last):
    assert cm.time_range(start, end, cm.time_zone(zone)) == (utc_ms(first), utc_ms(last))


def test_days_are_searched_in_the_zone_that_is_named(running):
    running.emit(*zone_calls("Europe/Berlin"))
    index_ready(running)
    the_day, zone = [f"z{number}" for number in (1, 2, 3, 4)], "--time-zone Europe/Berlin"

    def ids(lines: str) -> list[str]:
        return sorted(json.loads(line)["id"] for line in lines.splitlines())

    first_ms, after_ms = (utc_ms(ZONE_TIMES["Europe/Berlin"][number][0]) for number in (1, 5))
    for query in ("from=2026-10-25&to=2026-10-25&timeZone=Europe/Berlin", f"from={first_ms}&to={after_ms}"):
        assert sorted(row["id"] for row in running.get(f"/api/search?{query}")["results"]) == the_day
        assert ids(running.request(f"/api/export?{query}")[2].decode()) == the_day
    for command in ("search --json", "export"):
        day = in_process(running, *f"{command} --from 2026-10-25 --to 2026-10-25 {zone}".split())
        assert (ids(day.stdout), day.stderr) == (the_day, "")
        before = in_process(running, *f"{command} --to 2026-10-25 {zone}".split())
        assert ids(before.stdout) == ["z0"] and "--to 2026-10-25 means before that day" in before.stderr


def test_the_search_command_prints_what_the_monitor_finds(running):
    running.emit(*hooks("@a prompt where is the \x1b[1;31mquokka\x1b[31m?; @b prompt nothing of the kind"))
    running.emit(*hooks("@b call grep -r quokka src"))
    eventually(lambda: len(running.get("/api/search?q=quokka")["results"]) == 2)
    for options, (code, printed, said) in story_cases("tables.txt", "searches").items():
        done = in_process(running, "search", *options.split())
        lines = done.stdout.splitlines()
        assert (done.returncode, len(lines)) == (code, len(printed)), options
        assert said in done.stderr and "\x1b" not in done.stdout, options
        assert all(re.search(words, line) for words, line in zip(printed, lines)), options


def test_in_memory_only_the_last_events_can_be_searched(monitor: RunningMonitor) -> None:
    monitor.serve(persistence={"enabled": False}).emit(*hooks("prompt quokka one; prompt quokka two"))
    seq = monitor.get("/api/status")["seq"]
    for since, is_over in ((seq, False), (seq - 2, False), (seq - 3, True), (2, True)):
        assert monitor.websocket("rows", since=since).subscribed["resync"] is is_over, "as after a kill"
    assert in_process(monitor, "search", "quokka", "--session", "s").stdout.count("quokka") == 2
    first = monitor.get("/api/search?q=quokka&limit=1")
    rest = monitor.get(f"/api/search?q=quokka&limit=1&cursor={first['next']}")
    assert [page["results"][0]["data"]["text"] for page in (first, rest)] == ["quokka two", "quokka one"]
    assert monitor.request("/api/stats")[0] == 503
    assert not os.path.exists(monitor.home + "/index.db")


def test_an_event_without_memory_for_it_is_left_to_its_sender(tmp_path: Any, monkeypatch: Any) -> None:
    def protect(event: Any, privacy: Any) -> Any:
        if event["id"] == "1":
            raise MemoryError
        return really_protect(event, privacy)

    really_protect, here = ee.protect, cm.Settings(str(tmp_path), "", "box", ee.load_config("", cm.KEYS)[0])
    monkeypatch.setattr(ee, "protect", protect)
    ingest = cm.Ingest(here, cm.Journal(str(tmp_path / "events")), lambda event: None)
    lines = [json.dumps(hook_wrapped(payload("Stop"), id=str(number))).encode() for number in range(3)]
    safe, stored = ingest.take(lines)
    ingest.close()
    assert safe == [True, False, True] and [entry.event["id"] for entry in stored] == ["0", "2"]
    assert not os.path.exists(tmp_path / "quarantine.log")


SECOND_DELIVERIES = stories("deliveries", " → ")


@pytest.mark.parametrize("rule", SECOND_DELIVERIES)
def test_a_second_delivery_is_stored_once(tmp_path: Any, rule: str) -> None:
    ((story, kept),) = SECOND_DELIVERIES[rule]
    here = cm.Settings(str(tmp_path), "", "box", ee.load_config("", cm.KEYS)[0])
    ingest = cm.Ingest(here, cm.Journal(f"{tmp_path}/events"), lambda event: None)
    for number, (hook, at, name, value) in enumerate(re.findall(r"(\w+)@(\d+)(?:#(\w+)=(\w+))?", story)):
        data = {"message": "same", **({name: value} if name else {})}
        about = {"id": str(number), "sessionId": "s", "machineId": "box", "pid": 9, "data": data}
        event = {**about, "timestamp": NOW_MS + int(at), "hookType": hook, "eventType": ee.EVENT_TYPES[hook]}
        ingest.take([ee.encode_json(event)])
    ingest.close()
    assert "".join(map(cm.line_id, cm.Journal(f"{tmp_path}/events").lines())) == kept


# ---- Retention: whole days of events go, the oldest first --------------------------------------------------


def retention_days(home: str) -> list[str]:
    return sorted(name for name in os.listdir(home + "/events") if name != ".in-order")


def retention_fill(home: str, ages: Iterable[int], size: int = 100, sessions: int = 2) -> dict[int, str]:
    """Store events that arrived so many days ago; return the name of each day."""
    store, now = cm.Journal(home + "/events"), cm.now_ms()
    arrivals = {age: now - age * DAY_MS for age in sorted(ages, reverse=True)}
    for age, at in arrivals.items():
        for number in range(sessions):
            about = {"session": f"s{number}-{age}", "timestamp": at, "id": f"{age}.{number}"}
            event = ee.build_event(index_prompt(0, "x" * size + f" age{age}", **about), at, "testbox")
            store.append([event], at)
    store.close()
    return {age: cm.day_of(at) for age, at in arrivals.items()}


def test_old_days_go_with_their_sessions_but_pinned_and_foreign_files_stay(monitor):
    days = retention_fill(monitor.home, (0, 1, 4, 7, 8, 40))
    note = f"{monitor.home}/events/{days[40]}/note.txt"
    ee.write_atomically(note, b"mine")
    monitor.serve(retention={"days": 1000})
    protocol_post(monitor, type="toggle_pin", sessionId="s1-8")
    highest = monitor.get("/api/status")["seq"]
    monitor.kill()
    monitor.serve(retention={"days": 5})
    eventually(lambda: set(retention_days(monitor.home)) == {days[age] for age in (0, 1, 4, 8, 40)})
    assert os.listdir(f"{monitor.home}/events/{days[8]}") == ["s1-8.jsonl"]
    eventually(lambda: os.listdir(os.path.dirname(note)) == ["note.txt"])
    left = {"s1-8", *(f"s{number}-{age}" for number in (0, 1) for age in (0, 1, 4))}
    eventually(lambda: set(monitor.sessions()) == left)
    eventually(lambda: len(monitor.get("/api/search?q=age8")["results"]) == 1)
    assert monitor.get("/api/search?q=age40")["results"] == []
    assert monitor.get("/api/status")["seq"] >= highest
    disk = eventually(lambda: monitor.get("/api/status")["disk"])
    assert disk["oldestDay"] == days[8] and disk["error"] is None and disk["limitBytes"] == 2048 << 20


def test_the_status_shows_how_much_is_on_disk(running):
    def on_disk() -> int:
        return sum(os.path.getsize(path) for path in glob.glob(running.home + "/events/*/*"))

    eventually(lambda: running.get("/api/status")["disk"], what="the first measurement")
    running.emit(payload("UserPromptSubmit", "a", prompt="x" * 50_000), payload("UserPromptSubmit", "b"))
    disk = running.get("/api/status")["disk"]
    assert disk["eventsBytes"] == on_disk() > 50_000
    assert disk["bytes"] >= disk["eventsBytes"] + disk["indexBytes"]  # of one moment: the index grows
    protocol_post(running, type="delete_session", sessionId="a")
    assert running.get("/api/status")["disk"]["eventsBytes"] == on_disk() < 50_000


@pytest.mark.parametrize("is_linked", [False, True])
def test_all_our_files_count_the_oldest_days_go_first_today_never(tmp_path: Any, is_linked: bool) -> None:
    home, now = str(tmp_path / "home"), cm.now_ms()
    days = retention_fill(home, (0, 1, 2, 3), size=1 << 20, sessions=1)
    if is_linked:
        os.rename(home + "/events", tmp_path / "disk")
        os.symlink(tmp_path / "disk", home + "/events")

    def going(megabytes: int, kept: str = "", keep_days: int | None = None) -> list[str]:
        return cm.plan_retention(home, now, keep_days, megabytes << 20, frozenset([kept])).days

    assert going(5) == []
    assert going(4) == [days[3]]
    assert going(2) == [days[3], days[2], days[1]] == going(0)
    assert going(4, "s0-3.jsonl") == [days[2]]
    assert going(99, keep_days=1) == [days[3], days[2]]
    ee.write_atomically(home + "/quarantine.log", b"x" * (3 << 20))
    os.mkdir(home + "/venv")
    (tmp_path / "home/venv/redis.so").write_bytes(b"x" * (1 << 20))
    assert going(5) == [days[3], days[2], days[1]]
    plan = cm.plan_retention(home, now, None, 5 << 20, frozenset())
    assert plan.total == sum(path.stat().st_size for path in tmp_path.rglob("*[!o]") if path.is_file())
    assert cm.delete_planned(home, plan) == {"s0-1.jsonl", "s0-2.jsonl", "s0-3.jsonl"}
    assert retention_days(home) == [days[0]]
    assert cm.plan_retention(home, now, None, None, frozenset()).days == []
    assert install_text(home + "/last-seq") == "3\n", "no number is given twice"


def test_prune_prints_what_it_would_delete_and_deletes_it(monitor):
    monitor.serve(retention={"days": 10})
    assert "nothing is too old" in in_process(monitor, "prune").stdout
    days = retention_fill(monitor.home, (0, 3, 20, 30))
    plan = in_process(monitor, "prune", "--dry-run").stdout
    for words in ("4 files of 4 sessions", days[30], days[20], "would be"):
        assert words in plan
    assert len(retention_days(monitor.home)) == 4
    assert "deleted" in in_process(monitor, "prune").stdout
    assert retention_days(monitor.home) == sorted([days[0], days[3]])
    assert "nothing is too old" in in_process(monitor, "prune").stdout
    os.rename(monitor.home + "/events", monitor.home + "/events.kept")
    pathlib.Path(monitor.home + "/events").touch()
    done = in_process(monitor, "prune")
    assert done.returncode == 1 and "cannot be deleted" in done.stderr


@pytest.mark.slow
def test_a_kill_while_deleting_leaves_the_rest_to_the_next_start(monitor):
    retention_fill(monitor.home, range(90), sessions=5)
    rng = random.Random(2)
    for _ in range(3):
        before = len(retention_days(monitor.home))
        monitor.serve()
        eventually(lambda before=before: len(retention_days(monitor.home)) < max(before, 32), 60)
        time.sleep(rng.random() * 0.02)
        monitor.kill()
    monitor.serve()
    eventually(lambda: 30 <= len(retention_days(monitor.home)) <= 31, 60)
    index_ready(monitor)
    stored = len(monitor.stored_events())
    eventually(lambda: monitor.get("/api/stats")["totals"]["events"] == stored)
    assert len(monitor.get("/api/search?q=age7")["results"]) == 5


@dataclasses.dataclass
class ClockStory:
    """A machine with a clock that is set, and events that are kept for 30 days."""

    home: str
    patch: Any
    wall_ms: int = NOW_MS
    steady_ms: int = 0
    boot: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        self.patch.setattr(cm, "now_ms", lambda: self.wall_ms)
        self.patch.setattr(cm, "steady_ms", lambda: float(self.steady_ms))
        self.patch.setattr(cm, "boot_id", lambda: f"boot {self.boot}")
        self.store = cm.Journal(self.home + "/events")
        self.memory: Any = None

    def step(self, verb: str, words: str) -> None:
        """Do one step: a capital letter stores an event of that session; `soon`: the next is in its second."""
        words, soon = words.removesuffix("soon").strip(), words.endswith("soon")
        amount = int(float(words[:-1] or 0) * {"y": 365, "d": 1, "h": 1 / 24}.get(words[-1:], 0) * DAY_MS)
        if verb == "limit":
            self.limit = int(words)
        if verb in ("pass", "set", "off"):
            self.wall_ms += amount
            self.steady_ms += amount if verb == "pass" else 0
        if verb == "off":
            self.steady_ms, self.boot = 0, self.boot + 1
        if verb == "stop":
            self.memory.compare(self.store.seq, save=True)
            self.memory = None
        elif verb == "start":
            self.memory = cm.ClockMemory(self.home + "/clock.json")
        elif verb == "kill":
            self.memory = None
        elif verb == "damage":
            ee.write_atomically(self.home + "/clock.json", b'{"time": 1e999, "steps": []}')
        elif verb.isupper():
            event = ee.build_event(payload("Stop", verb.lower()), self.wall_ms, "box")
            self.store.append([event], self.wall_ms)
        if self.memory and not soon:
            self.memory.compare(self.store.seq)

    def kept(self) -> str:
        steps = self.memory.steps if self.memory else ()
        plan = cm.plan_retention(self.home, self.wall_ms, 30, self.limit, frozenset(), steps)
        left = {file.path for file in self.store.files()} - {file.path for file in plan.files}
        return "".join(sorted(os.path.basename(path)[0].upper() for path in left))


CLOCK_STORIES = stories("clock", " →")


@pytest.mark.parametrize("rule", CLOCK_STORIES)
def test_events_are_deleted_by_their_real_age(tmp_path: Any, monkeypatch: Any, rule: str) -> None:
    story = ClockStory(str(tmp_path), monkeypatch)
    for steps, kept in CLOCK_STORIES[rule]:
        for step in steps.split("; "):
            story.step(*step.partition(" ")[::2])
        assert story.kept() == kept, steps


def test_a_spool_of_a_machine_without_a_clock_is_kept(tmp_path: Any) -> None:
    for start in ("90000000", str(ee.now_ms()), str(ee.now_ms() - 8 * 86_400_000)):
        (tmp_path / f"{start}-0a.jsonl").write_bytes(b"{}\n")
    ee.drop_old_segments(str(tmp_path))
    assert sorted(int(path.name.split("-")[0]) > 10**12 for path in tmp_path.glob("*.jsonl")) == [False, True]


def test_a_day_that_is_more_than_the_limit_is_named(monitor: RunningMonitor) -> None:
    monitor.serve(retention={"maxMegabytes": 16})
    in_process(monitor, "prune")
    assert "maxMegabytes" not in in_process(monitor, "status").stdout
    retention_fill(monitor.home, (0,), size=17 << 20, sessions=1)
    in_process(monitor, "prune")
    for command in ("status", "doctor"):
        assert "more than retention.maxMegabytes" in in_process(monitor, command).stdout


# ---- Export: events as they are ----------------------------------------------------------------------------


def test_export_takes_the_filters_of_search_as_query_and_as_options(running):
    for number in range(6):
        tool, session = ("Bash", "Read")[number % 2], f"s{number % 3}"
        about = {"tool_name": tool, "tool_use_id": f"t{number}", "tool_input": {"command": f"word{number}"}}
        for name in ("pre", "post"):
            hook = payload(f"{name.title()}ToolUse", session, **about)
            running.emit({"hook": hook, "id": f"{name}{number}"})
    running.emit(*({"hook": payload("Stop", f"s{number}"), "id": f"stop{number}"} for number in (1, 2)))
    stored = {event["id"]: event for event in running.stored_events()}
    for query, (ids,) in story_cases("tables.txt", "exports").items():
        lines = running.request(f"/api/export?{query}")[2].decode().splitlines()
        exported = {event["id"]: event for event in map(json.loads, lines)}
        assert exported == {name: stored[name] for name in ids.split()}, query
        options = re.sub(r"(?:^|&)(\w+)=", r" --\1 ", query).replace("--q ", "").split()
        assert sorted(in_process(running, "export", *options).stdout.splitlines()) == sorted(lines)
    target = running.home + "/events.ndjson"
    assert "14 events" in in_process(running, "export", "--output", target).stdout
    assert hook_mode_of(target) == 0o600
    status, _, body = running.request("/api/export?format=xml")
    assert status == 400 and json.loads(body)["field"] == "format"


# ---- Import: history from before the monitor was there -----------------------------------------------------

IMPORT_TRANSCRIPTS = sorted(os.listdir(RECORDED + "/transcripts"))


def import_copy(monitor: RunningMonitor, name: str) -> str:
    """Put a recorded session's transcripts where Claude Code keeps them; return the session's id."""
    place = f"{monitor.claude_home}/projects/{name}"
    shutil.copytree(f"{RECORDED}/transcripts/{name}", place)
    return os.path.basename(glob.glob(place + "/*.jsonl")[0])[: -len(".jsonl")]


def import_entries(name: str) -> Iterator[dict[str, Any]]:
    for path in glob.glob(f"{RECORDED}/transcripts/{name}/**/*.jsonl", recursive=True):
        with open(path, "rb") as file:
            yield from map(json.loads, file)


def import_hooks(name: str, start_ms: int) -> list[dict[str, Any]]:
    return [timed(hook, start_ms + number) for number, hook in enumerate(recorded(name))]


def test_imported_transcripts_give_the_sessions_that_hooks_give(running):
    names = {import_copy(running, name): name for name in IMPORT_TRANSCRIPTS}
    first, stored = in_process(running, "import").stdout, len(running.stored_events())
    assert first == f"{stored} events imported, 0 stored already\n" and stored
    again = in_process(running, "import", running.claude_home).stdout
    assert again == f"0 events imported, {stored} stored already\n"
    assert len(running.stored_events()) == stored
    sessions = running.sessions()
    assert set(sessions) == set(names)
    index_ready(running)
    figures = {row["sessionId"]: row for row in running.get("/api/stats")["sessions"]}
    for session_id, name in names.items():
        session, book = sessions[session_id], cm.Sessions(own_machine="testbox")
        for sent in import_hooks(name, NOW_MS):
            book.apply(ee.build_event(sent, NOW_MS, "testbox"))
        by_hooks = book.sessions[session_id]
        assert session["isImported"] is True and session["state"] == "ended" and session["openCalls"] == []
        for counted in ("toolCalls", "prompts", "toolErrors"):
            assert session["counts"][counted] == by_hooks.counts[counted], (name, counted)
        assert {agent["agentId"] for agent in session["agents"]} == set(by_hooks.agents), name
        assert session["label"] == by_hooks.label[0] and session["workingDirectory"] == by_hooks.directory
        assert session["model"] == by_hooks.model or by_hooks.model is None
        messages = [entry.get("message") or {} for entry in import_entries(name)]
        answers = [one for one in messages if one.get("usage") and one.get("role") == "assistant"]
        output = sum({one["id"]: one["usage"]["output_tokens"] for one in answers}.values())
        for counted in (session, figures[session_id]):
            assert counted["tokenUsage"]["totalOutput"] == output, name


def test_import_repeats_nothing_that_hooks_have_sent(running):
    for name in IMPORT_TRANSCRIPTS:
        import_copy(running, name)
        times = [ee.iso_time_ms(entry["timestamp"]) or 0 for entry in import_entries(name) if "uuid" in entry]
        running.emit(*import_hooks(name, min(times)))
    before = running.counts()
    assert in_process(running, "import").stdout.startswith("0 events imported")
    assert running.counts() == before


def test_of_a_session_known_in_part_only_what_was_before_is_imported(running):
    session_id = import_copy(running, "failing")
    entries = [entry for entry in import_entries("failing") if "tool_use" in json.dumps(entry.get("message"))]
    entries = [entry for entry in entries if entry["type"] == "assistant"]
    first, use = (entries[number]["message"]["content"][0] for number in (0, 2))
    at = (ee.iso_time_ms(entries[2]["timestamp"]) or 0) + 60_000  # its clock may differ: the call's id counts
    call = {"tool_name": use["name"], "tool_use_id": use["id"], "tool_input": use["input"]}
    running.emit({**timed(payload("PreToolUse", session_id, **call), at), "id": "late"})
    in_process(running, "import")
    stored = running.stored_events()
    calls = [event["data"]["toolUseId"] for event in stored if event["hookType"] == "PreToolUse"]
    assert calls.count(use["id"]) == calls.count(first["id"]) == 1
    assert all(event.get("imported") or event["id"] == "late" for event in stored)
    assert not any(event["hookType"] == "SessionEnd" for event in stored)
    assert running.sessions()[session_id]["isImported"] is True


def test_import_repeats_nothing_that_was_read_when_the_first_hook_came(running):
    session_id = import_copy(running, "simple")
    path = glob.glob(f"{running.claude_home}/projects/*/{session_id}.jsonl")[0]
    running.emit(payload("Stop", session_id, transcript_path=path))
    words = lambda: [it for it in running.stored_events() if it["eventType"] == ee.WORDS]  # noqa: E731
    read = eventually(lambda: len(words()) > 1 and words(), what="what was said")
    assert in_process(running, "import").returncode == 0
    hooks = [event["hookType"] for event in running.stored_events()]
    assert words() == read and read[0]["data"]["role"] == "user"
    assert hooks.count("PreToolUse") > 1 and "UserPromptSubmit" not in hooks


def test_exports_of_this_and_of_the_node_monitor_are_imported_once(running, shared):
    shared.emit(*recorded("simple"), payload("UserPromptSubmit", "import-x", prompt="hello there"))
    export, node_export = running.home + "/export.ndjson", running.home + "/node.json"
    in_process(shared, "export", "--output", export)
    expected, common = shared.stored_events(), {"sessionId": "0123456789abcdef", "machineId": "mac"}
    node = [
        {"id": "n1", "timestamp": NOW_MS, **common, "eventType": "tool_call", "hookType": "PreToolUse",
         "data": {"toolName": "Bash", "toolInput": {"command": "ls"}}},
        {"timestamp": NOW_MS + 5, **common, "eventType": "tool_result", "hookType": "PostToolUse",
         "data": {"toolName": "Bash", "tool_output": "a b"}},
    ]  # fmt: skip
    whole = {"version": 1, "sessions": [{"sessionId": common["sessionId"], "events": node}]}
    ee.write_atomically(node_export, json.dumps(whole, indent=1).encode())
    for count in (len(expected) + 2, 0, 2):
        if count == 2:  # what a person deletes can be imported again
            running.websocket("rows").ask("session_deleted", type="delete_session", **common)
        done = in_process(running, "import", export, node_export)
        assert done.stdout.startswith(f"{count} events imported")
    stored = {event["id"]: event for event in running.stored_events()}
    for event in expected:
        kept = {**stored[event["id"]], "seq": 0, "received": 0}
        event.pop("spooled", None)
        assert kept == {**event, "seq": 0, "received": 0, "imported": True}
    session = running.sessions()["0123456789abcdef"]
    assert session["isImported"] is True and session["machineId"] == "mac"
    assert session["counts"]["toolCalls"] == 1 and len(stored) == len(expected) + 2


def test_odd_transcripts_are_read_as_far_as_they_make_sense(tmp_path):
    path, skipped = tmp_path / "s.jsonl", []
    path.write_text("\n\n".join(story_parts("tables.txt")["odd transcript"]))
    reader = cm.TranscriptReader("s", "m", set(), lambda _: False, ee.UsageReader(""), skipped)
    events = reader.events([str(path)])
    assert skipped == [f"{path}: not JSON: 2 lines"]
    read = [event["hookType"] for event in events]
    assert read == ["SessionStart", "PostToolUse", "UserPromptSubmit", "SessionEnd"]
    assert events[2]["data"] == {"message": "hello"} and len({event["id"] for event in events}) == 4


def imported(folder: Any, stored: str = "") -> dict[str, dict[str, Any]]:
    """Return each session as the monitor shows it after an import of a folder; events of `stored` are there."""
    book, found = cm.Sessions(own_machine="box"), {}
    sources = cm.import_sources([str(folder)], [])
    for session_id, events, _ in cm.import_batches(sources, "box", stored.__eq__, []):
        for event in events:
            book.apply(ee.build_event(event, NOW_MS, "box"))
        if events:
            found[session_id] = book.to_json(book.sessions[session_id])
    return found


IMPORT_A, IMPORT_B = (f"0000000{number}-0000-4000-8000-000000000000" for number in "12")
IMPORT_OLD = usage_entries("user first question; m1 100/10", IMPORT_A)
IMPORT_COPY = IMPORT_OLD.replace(f'"sessionId":"{IMPORT_A}"', f'"sessionId":"{IMPORT_B}"')
IMPORT_OWN = usage_entries("user fork question; m2 100/10", IMPORT_B, minute=10)
IMPORT_OLD_SUMS = usage_entries("sums opus 100/10 startTime=5", IMPORT_A)
IMPORT_SHOWN = (1, 100, "fork question")
# A session's transcript; what its fork begins with; the prompts, input tokens and label of the fork.
IMPORT_FORKS = {
    "copies keep the origin's id": (IMPORT_OLD, IMPORT_OLD, IMPORT_SHOWN),
    "copies keep it and have new uuids": (IMPORT_OLD, IMPORT_OLD.replace("u-", "v-"), IMPORT_SHOWN),
    "copies keep their uuids only": (IMPORT_OLD, IMPORT_COPY, IMPORT_SHOWN),
    "its sums include the origin's": (IMPORT_OLD + IMPORT_OLD_SUMS, IMPORT_COPY, IMPORT_SHOWN),
    "unmarked copies have their tokens counted once": (IMPORT_OLD, IMPORT_COPY.replace("u-", "v-"), (2, 100, "first question")),
    "it keeps the history of an origin that is gone": ("", IMPORT_OLD, (2, 200, "first question")),
    "it keeps nothing of an origin that is stored": ("", IMPORT_OLD, IMPORT_SHOWN),
}  # fmt: skip


@pytest.mark.parametrize("rule", IMPORT_FORKS)
def test_an_imported_fork_has_its_own_history_only(tmp_path, rule):
    origin, copied, shown = IMPORT_FORKS[rule]
    sums = usage_entries("sums opus 200/20 startTime=5", IMPORT_B) if "sums" in rule else ""
    fork = copied + IMPORT_OWN + sums
    write_files(tmp_path / "p", {f"{IMPORT_A}.jsonl": origin, f"{IMPORT_B}.jsonl": fork})
    write_files(tmp_path, {f"x/{IMPORT_A}.jsonl": f"->p/{IMPORT_A}.jsonl", "y": "->p"})  # read once
    os.utime(tmp_path / "p" / f"{IMPORT_A}.jsonl", (1, 1))
    sessions = imported(tmp_path, IMPORT_A if "stored" in rule else "")
    shown_of = lambda it: (it["counts"]["prompts"], it["tokenUsage"]["totalInput"], it["label"])  # noqa: E731
    found = {session_id: shown_of(session) for session_id, session in sessions.items()}
    assert found == {**({IMPORT_A: (1, 100, "first question")} if origin else {}), IMPORT_B: shown}


@story_table("tables.txt", "typed", "flag, content")
def test_what_no_person_typed_is_no_imported_prompt(tmp_path, flag, content):
    first, rest = usage_entries("user ; user fix <b>it</b>; m1 1/2", IMPORT_A).split("\n", 1)
    entry = {**json.loads(first), flag: True, "message": {"role": "user", "content": content}}
    write_files(tmp_path, {f"{IMPORT_A}.jsonl": f"{json.dumps(entry)}\n{rest}"})
    session = imported(tmp_path)[IMPORT_A]
    assert (session["counts"]["prompts"], session["label"]) == (1, "fix <b>it</b>")


@story_table("tables.txt", "import ends", "name, kind, counts")
def test_import_says_how_calls_and_turns_ended(tmp_path, name, kind, counts):
    about, stamp = {"sessionId": IMPORT_A}, "2026-11-20T10:00:01.000Z"
    use = {"type": "tool_use", "id": "t1", "name": "Bash", "input": {"command": "make"}}
    call = {"type": "assistant", **about, "uuid": "u1", "timestamp": stamp, "message": {"content": [use]}}
    end = session_line(name, ee.iso_time_ms(stamp) or 0, uuid="u2", **about).decode()
    lines = f"{usage_entries('user go', IMPORT_A)}{json.dumps(call)}\n{end}"
    write_files(tmp_path, {f"{IMPORT_A}.jsonl": lines})
    ((_, events, _),) = cm.import_batches(cm.import_sources([str(tmp_path)], []), "box", "".__eq__, [])
    found = [event["eventType"] for event in events]
    assert found == ["session_start", "user_prompt", "tool_call", kind, "session_end"]
    counted = imported(tmp_path)[IMPORT_A]["counts"]
    assert [counted["toolErrors"], counted["interrupted"]] == counts


@story_table("tables.txt", "titles", "titles, label")
def test_an_imported_session_has_the_title_of_its_transcript(tmp_path, titles, label):
    about, lines = {"sessionId": IMPORT_A, "leafUuid": "u-0-user"}, [{"type": ["odd"]}]
    for kind, field, text in (title.split(" ", 2) for title in titles.split("; ")):
        lines.append({"type": kind, **about, field: None if text == "null" else text})
    lines.append({"type": "summary", "summary": "of another session", "leafUuid": "elsewhere"})
    texts = [json.dumps(line) + "\n" for line in lines]
    entries = [texts[-1], usage_entries("user question", IMPORT_A), *texts]
    write_files(tmp_path, {f"{IMPORT_A}.jsonl": "".join(entries)})
    assert imported(tmp_path)[IMPORT_A]["label"] == label


def test_import_names_each_file_that_it_did_not_understand(running, tmp_path):
    files = story_cases("tables.txt", "imports")
    write_files(tmp_path, {name: as_text(content) for name, (content, _, _) in files.items()})
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\x00")
    files |= {"fifo.jsonl": ["", 0, "is no regular file"], "bytes.jsonl": ["", 0, "it has no events"]}
    for name, (_, count, words) in files.items():
        done = in_process(running, "import", f"{tmp_path}/{name}")
        imported = int(done.stdout.split()[0] if done.stdout else 0)
        assert (done.returncode, imported) == (bool(words), count), name
        assert cm.safe_line(f"/{name}: {words}") + "\n" in done.stderr if words else done.stderr == "", name
    write_files(tmp_path, {"settings.json": "{}", "x.txt": ""})  # which are ignored in a directory
    done = in_process(running, "import", str(tmp_path))
    assert done.returncode == 1 and done.stdout.startswith("0 events imported, 8 stored already")
    assert f"skipped {sum(words != '' for *_, words in files.values()) - 10} more" in done.stderr


def test_import_says_what_to_do_when_the_monitor_takes_no_more(running, tmp_path):
    export = tmp_path / "export.ndjson"
    export.write_text(json.dumps({"id": "x", "eventType": "message", "sessionId": "far", "data": {}}) + "\n")
    os.kill(running.pid, signal.SIGSTOP)
    os.unlink(running.socket_path)  # as while it stops
    refused = in_process(running, "import", str(export))
    assert refused.returncode == 1 and "import again" in refused.stderr.splitlines()[-1], refused.stderr
    os.kill(running.pid, signal.SIGCONT)
    eventually(lambda: os.path.exists(running.socket_path), what="the socket")
    assert in_process(running, "import", str(export)).stdout.startswith("1 event imported")


def test_the_directory_of_the_node_monitor_is_imported(monitor: RunningMonitor, tmp_path: Any) -> None:
    running = monitor.serve(sessions={"endedHours": 87_600})  # its sessions are silent since 2026-11-24
    # As its daemon keeps a session with a subagent, and one that a person has hidden: while a Task runs all events of its
    # session have an id that it makes up.
    shutil.copytree(ROOT + "/.ci/stories/node-monitor", tmp_path, dirs_exist_ok=True)
    done = in_process(running, "import", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "12 events imported, 0 stored already\n"), done.stderr
    sessions = running.sessions()
    assert set(sessions) == {"0123456789abcdef", "fedcba9876543210"}
    main, other = sessions["0123456789abcdef"], sessions["fedcba9876543210"]
    assert (main["label"], main["labelSource"], main["isPinned"]) == ("The plan", "user", True)
    assert list(main["tokenUsage"].values()) == [30, 60, 15, 9]
    (agent,) = main["agents"]
    assert (agent["agentId"], agent["agentType"], agent["state"]) == ("a7", "explore", "ended")
    assert (main["state"], main["counts"]["toolCalls"], main["openCalls"]) == ("idle", 1, [])
    assert (other["hidden"], other["parentSessionId"]) == (True, "0123456789abcdef")
    assert other["tokenUsage"]["totalOutput"] == 6 and other["estimatedCostUsd"]
    index_ready(running)
    totals = running.get("/api/stats")["totals"]
    assert totals["tokenUsage"]["totalOutput"] == 66 and totals["prompts"] == 2
    # What a person does here counts from then on.
    client = running.websocket("rows")
    client.ask("session_update", type="rename_session", sessionId="0123456789abcdef", label="Mine")
    path = tmp_path / "sessions/0123456789abcdef/meta.json"
    path.write_text(path.read_text().replace("The plan", "Their plan"))
    again = in_process(running, "import", str(tmp_path))
    assert again.stdout.startswith("0 events imported") and again.returncode == 0
    write_files(tmp_path, {"sessions/0123456789abcdef/meta.json": " ", "raw/1-half.json": '{"id": "x", "ev'})
    half = in_process(running, "import", str(tmp_path))
    assert half.returncode == 1 and "raw/1-half.json: it has no events" in half.stderr
    assert running.sessions()["0123456789abcdef"]["label"] == "Mine"


# ---- Metrics: read by Prometheus' own parser ---------------------------------------------------------------


def metrics_of(monitor: RunningMonitor) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return what /metrics has: sample's name → labels → value."""
    from prometheus_client.parser import text_string_to_metric_families

    status, headers, body = monitor.request("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        assert family.documentation and family.type in ("gauge", "counter"), family.name
        for sample in family.samples:
            values, key = found.setdefault(sample.name, {}), tuple(sorted(sample.labels.items()))
            assert key not in values, (sample.name, key)
            values[key] = sample.value
    return found


def test_prometheus_reads_what_is_measured(running):
    # Samples without labels, then others that are there.
    single = {
        "build_info": 1, "received_total": 5, "store_ok": 1, "index_ready": 1, "index_lag_events": 0, "clients": 0,
        "duplicates_total": 1, "spool_bytes": 0, "spool_dropped_total": 0,
    }  # fmt: skip
    name = 'odd "box"\\ with\nlines \ud83d é'
    odd = {"eventType": "message", "machineId": name, "sessionId": "z", "data": {}}
    asks = payload("PermissionRequest", "w", tool_name="Bash", tool_input={"command": "rm"})
    running.emit(odd, asks, odd, {**odd, "id": "twice"}, {**odd, "id": "twice"})
    index_ready(running)
    eventually(lambda: metrics_of(running)["contextuate_disk_bytes"][()] > 0)
    measured = {name.partition("_")[2]: values for name, values in metrics_of(running).items()}

    def by(label: str, name: str) -> dict[str, float]:
        return {dict(key)[label]: value for key, value in measured[name].items()}

    escaped = name.replace("\ud83d", "\\ud83d")
    assert by("machine", "events_total") == {"testbox": 1, escaped: 3}
    assert by("machine", "machine_last_seen_seconds").keys() == {"testbox", escaped}
    sessions = by("state", "sessions")
    assert sessions["waiting"] == 1 and sum(sessions.values()) == 2
    assert {name: sum(measured[name].values()) for name in single} == single
    assert measured["index_bytes"][()] > 0
    boxes = {"1111aa": "box", "2222aa": "box", "3333aa": "box (1111)", "4444aa": "box (1111) (1111aa)"}
    running.emit(*({**odd, "machineKey": key, "machineId": name} for key, name in boxes.items()))
    assert (("machine", "box (2222)"),) in metrics_of(running)["contextuate_events_total"]


# ---- The source itself: its rooms and their order ----------------------------------------------------------


def uses_of_names(code: types.CodeType) -> Iterator[tuple[int, set[str]]]:
    """Yield the first line of each function, class and lambda below `code`, and the module's names it uses."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            loads = (it for it in dis.get_instructions(inner) if it.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
            yield inner.co_firstlineno, {str(it.argval) for it in loads}
            yield from uses_of_names(inner)


def test_the_docstring_ends_with_an_index_of_the_rooms() -> None:
    rooms = re.findall(r"(?m)^# -{75}\n# ([^:\n]+)", install_text(cm.__file__))
    assert len(rooms) > 15 and cm.__doc__
    head, *index = cm.__doc__.rstrip().rpartition("\n\n")[2].splitlines()
    assert head.startswith("Rooms")
    rows = [re.fullmatch(r" {4}(\w+(?: \w+)*) {2,}(\w.*)", line) for line in index]
    assert [row and row[1] for row in rows] == rooms, "name and purpose, in the order of the file"


@pytest.mark.parametrize("module", [ee, cm], ids=["hook", "monitor"])
def test_a_room_uses_only_the_rooms_above_it(module):
    source = install_text(module.__file__)
    tree = ast.parse(source)
    starts = [source.count("\n", 0, it.start()) + 1 for it in re.finditer(r"(?m)^# -{75}\n# [A-Z]", source)]
    assert len(starts) > 7
    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = (it for it in ast.walk(node) if isinstance(it, ast.Name))
            defined.update({it.id: node.lineno for it in names if isinstance(it.ctx, ast.Store)})
    below = [
        f"line {line} uses {name} of line {defined[name]}"
        for line, names in uses_of_names(compile(tree, module.__file__, "exec"))
        for name in names & defined.keys()
        if bisect.bisect(starts, line) < bisect.bisect(starts, defined[name])
    ]
    assert not below


def test_one_event_runs_through_at_most_70_functions() -> None:
    """From a hook's line on the socket to the frames for a page: functions of both modules, in the loop thread.

    Not counted: lambdas, comprehensions, the standard library, and what dataclasses and named tuples generate.
    """
    modules = {str(module.__file__): module.__name__ for module in (cm, ee)}
    called: dict[str, None] = {}

    def note(frame: types.FrameType, what: str, _argument: Any) -> None:
        code = frame.f_code
        if what == "call" and code.co_filename in modules and not code.co_name.startswith("<"):
            called[f"{modules[code.co_filename]}:{code.co_firstlineno} {code.co_name}"] = None

    with protocol_inside() as inside, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        page, rounds = ProtocolPeer(inside.ws_port), []
        page.say(type="subscribe", view="rows")
        page.next("status")
        sock.connect(inside.settings["socketPath"])
        inside.loop.call(lambda: sys.setprofile(note))
        for number in range(12):
            call = {"tool_name": "Bash", "tool_input": {"command": "make"}, "tool_use_id": f"toolu_{number}"}
            hook = payload("PreToolUse", **call)
            line = {"hook": hook, "id": f"event-{number}", "timestamp": ee.now_ms(), "pid": os.getpid()}
            called.clear()
            sock.sendall(json.dumps(line).encode() + b"\n")
            assert sock.recv(1) == ee.ACKNOWLEDGEMENT
            page.next("event")
            inside.loop.call_soon(lambda: rounds.append(dict(called)))  # when its turn has ended
            time.sleep(1.5 * cm.UPDATE_INTERVAL_S)
        page.close()
    # Without what garbage collection or a timer added, and with the session's update, which comes at most every 0.1 s.
    names = min((it for it in rounds[5:] if any(name.endswith(" label") for name in it)), key=len)
    print(len(names), *names, sep="\n")
    assert any(name.endswith(" event_row") for name in names) and 30 < len(names) <= 70


# ---- Documentation: README.md and .docs/ say what the program does -----------------------------------------


DOCUMENT_NAMES = ("README.md", *(f".docs/{it}" for it in os.listdir(ROOT + "/.docs") if it.endswith(".md")))
DOCUMENTS = {name: install_text(f"{ROOT}/{name}") for name in DOCUMENT_NAMES}
PROTOCOL_MD = DOCUMENTS[".docs/protocol.md"]
doc_blocks = ((name, re.findall(r"(?sm)^```(\w*)\n(.*?)^```", text)) for name, text in DOCUMENTS.items())
DOC_BLOCKS = [(name, *block) for name, blocks in doc_blocks for block in blocks]  # (path, language, text)
# Of shell commands:
DOC_LINES = [(path, it) for path, kind, text in DOC_BLOCKS if kind == "sh" for it in text.splitlines()]


def doc_table(path: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = DOCUMENTS[path].partition(f"\n## {heading}\n")[2].partition("\n|")[2].partition("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]


def test_the_readme_is_one_page_and_begins_with_what_to_do() -> None:
    lines = DOCUMENTS["README.md"].splitlines()
    assert len(lines) <= 260 and max(map(len, lines)) <= 120
    for words in ("<picture>", "monitor.py start", "monitor.py install", "## What it is not"):
        assert words in "\n".join(lines[:40]), words


def test_links_of_the_documents_lead_to_files_and_headings() -> None:
    for path, document in DOCUMENTS.items():
        for target in re.findall(r'(?:\]\(|src="|srcset=")(?!https?:)([^)"\s]+)[)"]', document):
            file, _, heading = target.partition("#")
            place = os.path.normpath(os.path.join(os.path.dirname(path), file)) if file else path
            assert os.path.exists(os.path.join(ROOT, place)), (path, target)
            assert not place.endswith(".png") or os.path.getsize(os.path.join(ROOT, place)) < 200_000, target
            headings = re.findall(r"^#+ (.*)", DOCUMENTS.get(place, ""), re.M)
            anchors = [re.sub(r"[^\w -]", "", it).lower().replace(" ", "-") for it in headings]
            assert not heading or heading in anchors, (path, target)


def test_messages_in_the_troubleshooting_tables_are_those_of_the_program() -> None:
    source = inspect.getsource(cm) + inspect.getsource(ee)
    for path in ("README.md", ".docs/redis.md"):
        cells = "".join(row[0] for row in doc_table(path, "Troubleshooting"))
        messages = [words.strip() for words in re.findall("`([^`…]+)[^`]*`", cells)]
        assert len(messages) > 3
        assert [words for words in messages if words not in source] == [], path


def doc_shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: doc_shape(inner) for name, inner in value.items()}
    return [doc_shape(value[0])] if isinstance(value, list) and value else None


@pytest.mark.parametrize("text", [text for _, kind, text in DOC_BLOCKS if kind == "json"])
def test_json_in_the_documents_is_what_the_program_takes_or_gives(text: str, tmp_path: Any) -> None:
    if '"openCalls"' in text:
        call = {"tool_name": "Bash", "tool_input": {"command": "rm -rf build"}, "tool_use_id": "t1"}
        sessions = cm.Sessions()
        hooks = [payload("PreToolUse", **call), payload("SubagentStart", agent_id="a1", agent_type="Explore")]
        totals = {"eventType": "usage", "sessionId": "s1", "data": {"usage": {"models": {}, "agents": {}}}}
        line = {"id": "line", "statusLine": status_line()}
        for event in (*hooks, payload("PermissionRequest", **call), totals, line):
            session = sessions.apply(ee.build_event(event, NOW_MS, "laptop"))
        assert doc_shape(json.loads(text)) == doc_shape(sessions.to_json(session))
    elif '"fiveHour"' in text:
        case = GaugeCase()
        case.hook("SessionStart")
        case.line(five=(5, NOW_MS // 1000 + 3600), seven=(6, NOW_MS // 1000 + DAY_MS // 1000))
        assert doc_shape(json.loads(text)) == doc_shape(case.sessions.limits(NOW_MS))
    elif '"seq"' in text:
        event = json.loads(text)
        assert event.pop("seq") and event.pop("received")
        assert ee.is_whole_event(event) and event["eventType"] == ee.EVENT_TYPES[event["hookType"]]
        assert ee.build_event(dict(event), NOW_MS, "here") == event
    elif '"hook_event_name"' in text:
        event = ee.build_event(json.loads(text), NOW_MS, "here")
        assert ee.is_whole_event(event) and event["eventType"] == "user_prompt" and event["data"]["message"]
    else:
        path = tmp_path / "config.json"
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)  # it may hold a password
        assert cm.load_settings(str(path))[1] == []


def test_the_tables_of_configuration_keys_are_those_of_the_program(capsys: Any) -> None:
    assert cm.main(["config", "--markdown"]) == 0
    assert capsys.readouterr().out in DOCUMENTS[".docs/config.md"]
    rows = doc_table("README.md", "Configuration")
    assert len(rows) == 8
    for key, default, _ in rows:
        assert json.loads(default.strip("`")) == cm.KEYS[key.strip("`")].default, key
    variables = re.findall(r"CONTEXTUATE_[A-Z_]+[A-Z]", inspect.getsource(cm) + inspect.getsource(ee))
    listed = [row[0].strip("`") for row in doc_table(".docs/config.md", "Environment")]
    assert {*listed} == {*variables, "CLAUDE_CONFIG_DIR"}


def test_config_prints_the_values_in_force_and_no_secret(capsys: Any, tmp_path: Any) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"server": {"port": 4000}, "redis": {"password": "pw-1"}}', encoding="utf-8")
    assert cm.main(["config", "--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "\nserver.port = 4000 (default 3847)\n" in printed and "\nretention.days = 30\n" in printed
    assert "\nredis.password = (not shown) (default null)\n" in printed and "pw-1" not in printed


def test_the_readme_lists_every_command_with_options_that_it_has() -> None:
    rows = [(re.findall(r"`([a-z-]+)[^`]*`", row[0]), row[1]) for row in doc_table("README.md", "Commands")]
    named = {it.__name__.partition("_")[2].replace("_", "-"): it for it in cm.COMMANDS}
    commands = {name: cm.COMMANDS[it].split() for name, it in named.items()}
    assert sorted(name for names, _ in rows for name in names) == sorted(commands)
    for names, words in rows:
        for option in re.findall(r"--[a-z-]+", words):
            assert all(option in commands[name] for name in names), (names, option)
    inline = re.findall(r"`python3 contextuate_monitor\.py ([a-z][^`\n]*)`", "".join(DOCUMENTS.values()))
    lines = [line.partition("_monitor.py ")[2] for _, line in DOC_LINES if "contextuate_monitor.py " in line]
    assert len(lines) > 8 and len(inline) > 3
    for line in (*lines, *inline):
        cm.build_parser().parse_args(shlex.split(line, comments=True))  # exits where it is wrong


def test_the_documents_name_every_state_event_and_websocket_message() -> None:
    states = [row[0].strip("*") for row in doc_table("README.md", "The states of a session")]
    assert {*states} == {*cm.SESSION_STATES, "needs you"} - {"waiting"}
    rows = doc_table(".docs/protocol.md", "States")
    assert {re.findall("`([a-z]+)`", row[0])[0] for row in rows} == set(cm.SESSION_STATES)
    hooks = PROTOCOL_MD.partition("| hookType |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"\| (\w+)[^|]* \| `(\w+)`", hooks)) == ee.EVENT_TYPES
    assert [name for name in ee.DATA_NAMES.values() if f"`{name}`" not in PROTOCOL_MD] == []
    listed = [re.findall(r"\w+", row[0])[0] for row in doc_table(".docs/protocol.md", "WebSocket")]
    handled = [name[len("_on_") :] for name in dir(cm.MessageHandlers) if name.startswith("_on_")]
    assert sorted(listed) == sorted([*handled, *cm.MessageHandlers.META])


def test_every_address_of_the_api_is_listed_and_answers_as_listed(running: RunningMonitor) -> None:
    running.emit(payload("UserPromptSubmit", prompt="first"))
    (event,) = running.stored_events()
    rows = [(row[0].strip("`").partition("?")[0], row[1]) for row in doc_table(".docs/protocol.md", "HTTP")]
    routes = [f"{method} {pattern}" for method, pattern, _ in cm.Api.ROUTES]
    assert sorted(address.replace("{id}", "([^/]+)") for address, _ in rows) == sorted(["GET /", *routes])
    for address, answer in rows:
        path = address[4:].replace("{id}", event["id" if "/api/events/" in address else "sessionId"])
        if address.startswith("GET "):
            (status, _, body), names = running.request(path), re.match(r"`{([a-zA-Z, ]+)}`", answer)
            assert status == 200, address
            assert names is None or json.loads(body).keys() == set(names[1].split(", ")), address


def test_the_websocket_conversation_in_the_documents_is_a_real_one(running: RunningMonitor) -> None:
    (text,) = [text for _, _, text in DOC_BLOCKS if text.startswith("> ")]
    running.emit(payload("UserPromptSubmit", prompt="first"), payload("Stop"))
    client = running.websocket(view=None)
    for line in text.splitlines():
        message = json.loads(line[2:])
        if line.startswith("> "):
            client.send(**message)
            continue
        answer = client.next(message["type"])
        for event in answer.get("events", ()):
            message["events"].remove({"seq": event["seq"]})
        assert answer == {**message, **({"events": answer["events"]} if "events" in answer else {})}


@pytest.mark.slow
def test_a_new_user_gets_through_the_commands_of_the_readme():
    home = new_home()
    files, python = f"{home}/monitor", f"{home}/python3"
    os.mkdir(files)
    os.mkdir(f"{home}/.contextuate", 0o700)
    for name in ("contextuate_monitor.py", "emit_event.py", "index.html"):
        shutil.copy2(os.path.join(ROOT, name), files)
    ee.write_atomically(python, f'#!/bin/sh\nexec "{PYTHON}" "$@"\n'.encode(), 0o700)
    made = RunningMonitor(f"{home}/.contextuate")
    kept = {name: it for name, it in os.environ.items() if not name.startswith(("CLAUDE", "CONTEXTUATE"))}
    environment = {**kept, "HOME": home, "PATH": f"{home}:{os.environ['PATH']}"}
    lines = [
        line.partition("  #")[0].strip()
        for path, line in DOC_LINES
        if not re.search(r"\.docs/(containers|redis)|test_monitor|\.ci/", path + line)
    ]
    last = ("demo --remove", "stop", "uninstall", "rm -r")  # in this order, when all others have run
    lines.sort(key=lambda line: next((at for at, words in enumerate(last, 1) if words in line), 0))
    assert len(lines) == 13
    try:
        for line in lines:
            line = line + " --live 0" if line.endswith("demo") else line
            line = line.replace("3847", str(made.know().port)) if "3847" in line else line
            shell = ["/bin/sh", "-c", line]
            done = subprocess.run(shell, cwd=files, env=environment, capture_output=True, check=False)
            assert done.returncode == 0 and (done.stdout or line.startswith(("echo", "rm"))), done
        assert install_text(f"{files}/failed.ndjson").count("\n") > 5
        assert json.loads(install_text(f"{home}/.claude/settings.json")) == {}
        assert not os.path.exists(f"{home}/.contextuate")
    finally:
        clean_up(made)
        shutil.rmtree(home)


@pytest.mark.slow
def test_the_redis_set_up_in_redis_md_works_as_it_is(make, tmp_path):
    blocks = [text for path, _, text in DOC_BLOCKS if path == ".docs/redis.md"]
    folder, port = str(tmp_path), redis_free_port()
    ours = {"redis.example.org": "localhost", "6380": str(port)}
    ours |= dict.fromkeys(("/etc/redis", "/var/lib/redis", "~/.contextuate"), folder)

    def block(words: str) -> str:
        (found,) = [text for text in blocks if words in text]
        return functools.reduce(lambda text, it: text.replace(*it), ours.items(), found)

    subprocess.run(["/bin/sh", "-e", "-c", block("openssl req")], cwd=folder, check=True, capture_output=True)
    users = block("user emitter on")
    ee.write_atomically(folder + "/users.acl", users.encode())
    make(RedisServer, *block("tls-cert-file").splitlines(), port=port, user="both", password="THIRD-PASSWORD")
    machines = {}
    for name, password in re.findall(r"^user (\w+) on >(\S+)", users, re.M):
        config = json.loads(block('"username": "emitter"'))
        config["redis"].update(username=name, password=password)
        machines[name] = make(RedisMachine, config=config, machine_id=name)
    emitter, watcher, both = machines["emitter"], machines["monitor"], machines["both"]
    emitter.say("early")
    at_once(watcher.start, both.start)
    for machine in (watcher, both):
        machine.wait_until("connected")
    emitter.say("late")
    both.say("own")
    for machine in (watcher, both):
        machine.gets(3)
        assert machine.arrivals() == {"emitter": ["early", "late"], "both": ["own"]}
        about = machine.redis()
        assert (about["tls"], about["streamState"], about["streamReason"]) == (True, "ok", None)
    for machine in (emitter, both):
        assert machine.publisher().items() >= {"stream": "ok", "channelState": "ok"}.items()
    strict = ssl.create_default_context(cafile=folder + "/ca.crt")
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 and newer do by themselves
    with socket.create_connection(("localhost", port)) as sock:
        strict.wrap_socket(sock, server_hostname="localhost").close()


# ---- Benchmarks: their tables in .docs/benchmarks.md -------------------------------------------------------


def benchmark_tables(text: str) -> dict[str, list[tuple[str, str]]]:
    sections = re.findall(r"(?ms)^## (.+?)$(.*?)(?=^## |\Z)", text)
    rows = re.compile(r"(?m)^\| (?!figure )(.+?) \|(?:[^|]*\|){3} \**(.*?)\** \|")
    return {title: rows.findall(body) for title, body in sections}


def test_the_tables_of_benchmarks_have_their_rows_and_goals() -> None:
    import bench

    tables = benchmark_tables(install_text(bench.DOCUMENT))
    expected = {bench.ALL: [row for name in bench.BENCHMARKS for row in bench.rows_of(name, bench.SMALL)]}
    expected |= {name: bench.rows_of(name, bench.FULL) for name in tables.keys() & bench.BENCHMARKS}
    assert tables == {title: [(row.name, row.goal) for row in rows] for title, rows in expected.items()}


def test_a_benchmark_replaces_its_own_table_only(tmp_path):
    import bench

    document = tmp_path / "benchmarks.md"
    document.write_text("# Benchmarks\n\nText.\n\n## all\n\nold\n\n## hook\n\nkept\n")
    row = bench.Figure("hook, local mode", "ms", "bare interpreter", "<= 1.3")
    for title, ours in (("all", 20.0), ("idle", 12.0)):
        row.enter(bench.Measured(ours, 10.0, spread=(1.1, 1.4)))
        bench.update_document(str(document), title, bench.section("--bench", [row], [], 5))
    text = document.read_text()
    assert text.startswith("# Benchmarks\n\nText.\n") and "old" not in text and "\nkept\n" in text
    assert list(benchmark_tables(text)) == ["all", "hook", "idle"]
    for ours, ratio, goal in (("20.0", "2.00", "**<= 1.3**"), ("12.0", "1.20", "<= 1.3")):
        cells = f"{ours} ms | 10.0 ms, bare interpreter | {ratio} | {goal} | 1.10 to 1.40"
        assert f"| hook, local mode | {cells} |" in text
