#!/usr/bin/env python3
"""Tests and benchmarks of the Contextuate Monitor.

    python3 test_monitor.py --setup           get everything the tests need, then run them all
    python3 test_monitor.py [pytest options]  run the tests (-k NAME for some of them)
    python3 test_monitor.py --bench [NAME] [--json FILE]   run the benchmarks in less than five minutes, or one at full size

The tests use real parts: the installed hook command, monitor and Redis processes, an independent WebSocket client,
headless Chromium, recorded payloads (.ci/recorded), kills and full disks. What a machine lacks is skipped and
listed loudly at the end. The program itself needs none of this.

Order: set-up · helpers and fixtures · then the rooms of the program in their order, from hook to page ·
faults · benchmarks.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys

# ---------------------------------------------------------------------------
# Set-up: what the tests need on a fresh machine
#
# Runs on a bare Python; nothing below this room is reached before the packages are there.
# ---------------------------------------------------------------------------

ROOT = os.path.dirname(os.path.abspath(__file__))
ENVIRONMENT = os.path.join(ROOT, ".venv")
ENVIRONMENT_PYTHON = os.path.join(ENVIRONMENT, "bin", "python")
PACKAGES = (
    "axe-playwright-python==0.1.8",
    "hypothesis==6.170.15",
    "kosoku==0.1.0",
    "mypy==2.4.1",
    "playwright==1.65.2",
    "prometheus_client==0.26.0",
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",
    "redis==8.1.0",
    "ruff==0.17.6",
    "websockets==17.4",
)
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Program → the names any of which will do, and its package for each package manager.
SYSTEM_PROGRAMS = {
    "redis-server": (("redis-server",), {"apt-get": "redis-server", "dnf": "redis", "brew": "redis"}),
    "openssl": (("openssl",), {"apt-get": "openssl", "dnf": "openssl", "brew": "openssl"}),
    "chromium": (CHROMIUM_NAMES, {"apt-get": "chromium", "dnf": "chromium", "brew": "chromium"}),
}


def find_program(names: tuple[str, ...]) -> str | None:
    """Return the path of the first of some programs that is there."""
    return next((path for path in map(shutil.which, names) if path), None)


def say(words: str) -> None:
    """Tell how far the set-up is."""
    print(f"setup: {words}", flush=True)


def set_up() -> None:
    """Make the test environment and get the system's programs.

    Exit with a sentence when that is impossible.
    """
    if sys.version_info < (3, 10):
        sys.exit("setup: the tests need Python 3.10 or newer (the program itself runs on 3.9)")
    set_up_environment()
    missing = [name for name, (names, _) in SYSTEM_PROGRAMS.items() if not find_program(names)]
    if missing:
        install_programs(missing)


def set_up_environment() -> None:
    """Make .venv with the pinned packages; does nothing when it is up to date."""
    stamp = os.path.join(ENVIRONMENT, "packages.txt")
    wanted = "\n".join((sys.version, *PACKAGES))
    if os.path.exists(stamp):
        with open(stamp, encoding="utf-8") as file:
            if file.read() == wanted:
                return
    say(f"making {ENVIRONMENT} with {', '.join(PACKAGES)}")
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=False)
    if made.returncode:
        sys.exit("setup: no virtual environment could be made; on Debian: apt-get install python3-venv")
    pip = [ENVIRONMENT_PYTHON, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if subprocess.run([*pip, "install", *PACKAGES], check=False).returncode:
        sys.exit("setup: the test packages could not be installed; is there a network?")
    with open(stamp, "w", encoding="utf-8") as file:
        file.write(wanted)


def install_programs(missing: list[str]) -> None:
    """Install missing programs with the system's package manager where we may.

    The tests tell what they skip.
    """
    manager = next((name for name in ("apt-get", "dnf", "brew") if shutil.which(name)), None)
    if manager is None:
        say(f"no package manager known here: install {', '.join(missing)} by hand")
        return
    packages = [SYSTEM_PROGRAMS[name][1][manager] for name in missing]
    become = [] if os.geteuid() == 0 or manager == "brew" else ["sudo", "-n"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    say(f"installing {', '.join(packages)} with {manager}")
    if manager == "apt-get":
        subprocess.run([*become, manager, "-qq", "update"], check=False, env=environment)
    options = (
        ["install"]
        if manager == "brew"
        else ["install", "-y", *(["-qq"] if manager == "apt-get" else ["-q"])]
    )
    done = subprocess.run(
        [*become, manager, *options, *packages], check=False, env=environment, stdout=subprocess.DEVNULL
    )
    if done.returncode:
        say(f"{manager} could not install them; by hand: {' '.join(['sudo', manager, *options, *packages])}")


def parse_command_line() -> tuple[argparse.Namespace, list[str]]:
    """Return our own options, and those for pytest."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks of the Contextuate Monitor.")
    parser.add_argument(
        "--setup", action="store_true", help="get everything the tests need, then run them all"
    )
    parser.add_argument(
        "--bench",
        nargs="?",
        const="all",
        metavar="NAME",
        help="run every benchmark in less than five minutes, or one at full size (a wrong name lists them)",
    )
    parser.add_argument("--json", metavar="FILE", help="with --bench: write the figures to a file, too")
    return parser.parse_known_args()


def use_environment() -> None:
    """Start again with the test environment's Python when this one lacks the packages.

    Exit if there is none.
    """
    if all(importlib.util.find_spec(name) for name in ("pytest", "hypothesis", "websockets", "playwright")):
        return
    if not os.path.exists(ENVIRONMENT_PYTHON) or os.path.realpath(sys.prefix) == os.path.realpath(
        ENVIRONMENT
    ):
        sys.exit("the tests' packages are missing; run: python3 test_monitor.py --setup")
    arguments = [argument for argument in sys.argv[1:] if argument != "--setup"]
    os.execv(ENVIRONMENT_PYTHON, [ENVIRONMENT_PYTHON, os.path.abspath(__file__), *arguments])


if __name__ == "__main__":
    OPTIONS, PYTEST_OPTIONS = parse_command_line()
    if OPTIONS.setup:
        set_up()
    use_environment()
    if OPTIONS.bench is None:
        os.chdir(ROOT)
        # Most tests wait for other processes; several workers wait at the same time.
        workers = str(2 * (os.cpu_count() or 1))
        options = [
            "-q",
            "-ra",
            "-p",
            "no:cacheprovider",
            "-n",
            workers,
            "--dist",
            "worksteal",
            *PYTEST_OPTIONS,
        ]
        os.execv(sys.executable, [sys.executable, "-m", "pytest", os.path.abspath(__file__), *options])

# ---------------------------------------------------------------------------
# Helpers and fixtures
# ---------------------------------------------------------------------------

import ast  # noqa: E402
import asyncio  # noqa: E402
import base64  # noqa: E402
import bisect  # noqa: E402
import collections  # noqa: E402 - the set-up above runs without the packages below
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import csv  # noqa: E402
import ctypes  # noqa: E402
import dataclasses  # noqa: E402
import dis  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import http.client  # noqa: E402
import inspect  # noqa: E402
import io  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import pickle  # noqa: E402
import pwd  # noqa: E402
import queue  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import selectors  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sqlite3  # noqa: E402
import ssl  # noqa: E402
import stat  # noqa: E402
import statistics  # noqa: E402
import struct  # noqa: E402
import tarfile  # noqa: E402
import tempfile  # noqa: E402
import termios  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
import urllib.request  # noqa: E402
import uuid  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Iterable, Iterator  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

sys.path.insert(0, ROOT)
import playwright.sync_api  # noqa: E402
import pytest  # noqa: E402
import websockets  # noqa: E402
import websockets.sync.client  # noqa: E402
from hypothesis import HealthCheck, example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import contextuate_monitor as cm  # noqa: E402
import emit_event as ee  # noqa: E402

with contextlib.suppress(ValueError):  # not in the main thread
    # Where the tests run in the background SIGINT is ignored, and every process that they start inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

RECORDED = os.path.join(ROOT, ".ci", "recorded", "hook-payloads")
PYTHON = cm.base_interpreter()
BROWSER = find_program(CHROMIUM_NAMES)
NOW_MS = 1_795_500_000_000  # a fixed "now" for tests without a clock


def unmount(place: str | os.PathLike[str]) -> None:
    """Take a mounted disk away, though the threads of a killed process may hold its files a moment longer."""
    subprocess.run(["umount", "-l", place], check=True)


def eventually(condition: Any, timeout_s: float = 15.0, what: str = "") -> Any:
    """Return the condition's first true value; fail when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_s} s: {what or condition}; last value {value!r}")
        time.sleep(0.02)


def protected(event: dict[str, Any], privacy: ee.Privacy) -> dict[str, Any]:
    """Protect an event; its JSON, which comes along, must be what anybody would make of it."""
    event, encoded = ee.protect(event, privacy)
    assert encoded == ee.encode_json(event)
    return event


def recording_names() -> list[str]:
    """List the recorded sessions."""
    return sorted(os.path.basename(path)[: -len(".jsonl")] for path in glob.glob(RECORDED + "/*.jsonl"))


def recorded_lines(name: str) -> list[bytes]:
    """Return a recording's payloads as the client sent them; lines end at \\n only."""
    with open(f"{RECORDED}/{name}.jsonl", "rb") as file:
        return [line for line in file.read().split(b"\n") if line]


@functools.cache
def _recorded(name: str) -> tuple[str, ...]:
    return tuple(line.decode("utf-8") for line in recorded_lines(name))


def recorded(name: str) -> list[dict[str, Any]]:
    """Return a recording's payloads, parsed."""
    return [json.loads(line) for line in _recorded(name)]


@dataclasses.dataclass
class RunningMonitor:
    """A monitor process of its own home, and what tests do with it."""

    home: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    program: str = os.path.join(ROOT, "contextuate_monitor.py")

    def __post_init__(self) -> None:
        self.socket_path = self.home + "/m.sock"
        self.claude_home = self.home + "/claude"
        self.write_config({})
        self.about: dict[str, Any] = {}

    def write_config(self, more: dict[str, Any]) -> None:
        """Write the configuration: free ports, a socket of its own, and what the test wants."""
        config: dict[str, Any] = {"socketPath": self.socket_path, "server": {"port": 0, "wsPort": 0}}
        for key, value in {**self.config, **more}.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        with open(self.home + "/monitor.config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process that belongs to this monitor."""
        kept = {
            name: value
            for name, value in os.environ.items()
            # bytecode is allowed, whatever holds here: users have it, and a start takes half the time
            if not name.startswith(("CONTEXTUATE", "CLAUDE", "PYTHONDONTWRITEBYTECODE"))
        }
        return {
            **kept,
            "CONTEXTUATE_HOME": self.home,
            "CLAUDE_CONFIG_DIR": self.claude_home,
            "CONTEXTUATE_MACHINE_ID": "testbox",
        }

    def command(
        self, *arguments: str, check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
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
        """Start it in the background, as a user does."""
        self.command("start", "--no-open")
        return self.know()

    def serve(self) -> RunningMonitor:
        """Start what `start` starts, without the process in between: a quarter of a second less for each test."""
        reader, writer = os.pipe()
        command = ["-m", "contextuate_monitor", "start", "--foreground", "--report-fd", str(writer)]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=self.environment, pass_fds=[writer],
            start_new_session=True, **quiet,
        )  # fmt: skip
        threading.Thread(target=process.wait, daemon=True).start()  # nobody shall find a zombie
        os.close(writer)
        with open(reader, "rb", buffering=0) as reports:
            assert reports.read(1 << 16) == b"ready\n"
        return self.know()

    def know(self) -> RunningMonitor:
        """Read what the running monitor says about itself."""
        with open(self.home + "/monitor.run.json", encoding="utf-8") as file:
            self.about = json.load(file)
        return self

    @property
    def pid(self) -> int:
        """The monitor's process id."""
        return int(self.about["pid"])

    @property
    def port(self) -> int:
        """The HTTP port."""
        return int(self.about["port"])

    @property
    def ws_port(self) -> int:
        """The WebSocket port."""
        return int(self.about["wsPort"])

    @property
    def url(self) -> str:
        """The page's address."""
        return f"http://127.0.0.1:{self.port}/"

    def kill(self) -> None:
        """End it with SIGKILL and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: not alive(self.pid), what="the monitor's end")

    def stop(self) -> None:
        """Stop it as a user does."""
        self.command("stop")

    def request(
        self, path: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Make one HTTP request; return status, headers in lower case, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            return (
                response.status,
                {name.lower(): value for name, value in response.getheaders()},
                response.read(),
            )
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """GET JSON."""
        status, _, body = self.request(path)
        assert status == 200, (path, status, body)
        return json.loads(body)

    def sessions(self) -> dict[str, dict[str, Any]]:
        """Return every session by its id, once every stored one has been read."""
        eventually(lambda: self.get("/api/status")["loading"] is None, 60, "the stored sessions")
        return self.sessions_so_far()

    def sessions_so_far(self) -> dict[str, dict[str, Any]]:
        """Return the sessions that have been read by now."""
        return {session["sessionId"]: session for session in self.get("/api/sessions?hidden=1")["sessions"]}

    def stored_events(self) -> list[dict[str, Any]]:
        """Read every event file, in order of arrival; a write that is under way is waited for."""

        def whole_lines(path: str) -> list[str]:
            with open(path, encoding="ascii") as file:
                content = file.read()
            return content.splitlines() if content.endswith("\n") else []

        events = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            if os.path.getsize(path):
                lines = eventually(functools.partial(whole_lines, path), 5, f"a whole last line in {path}")
                events += [json.loads(line) for line in lines]
        return sorted(events, key=lambda event: event["seq"])

    def stored_events_allowing_a_torn_line(self) -> list[dict[str, Any]]:
        """Read every event file right after a kill: a last line may be torn, it was not acknowledged."""
        events = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            with open(path, "rb") as file:
                events += [json.loads(line) for line in file if line.endswith(b"\n")]
        return events

    def websocket(self, view: str | None = "full", **subscription: Any) -> TestClient:
        """Connect an independent WebSocket client, and subscribe."""
        client = TestClient(websockets.sync.client.connect(
            f"ws://127.0.0.1:{self.ws_port}/", max_size=None, open_timeout=10, close_timeout=2,
            compression=None,
        ))  # fmt: skip
        client.hello = client.next("hello")
        if view is not None:
            client.send(type="subscribe", view=view, **subscription)
            client.subscribed = client.next("subscribed")
        return client

    def connect(self) -> socket.socket:
        """Connect to the Unix socket."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(15)
        sock.connect(self.socket_path)
        return sock

    def emit(self, *events: dict[str, Any]) -> None:
        """Send events over the Unix socket and wait until they are stored."""
        with self.connect() as sock:
            sock.sendall(b"".join(json.dumps(event).encode() + b"\n" for event in events))
            received = b""
            while len(received) < len(events):
                piece = sock.recv(4096)
                assert piece, "the monitor closed the connection"
                received += piece
            assert received == ee.ACKNOWLEDGEMENT * len(events)

    def installed_command(self) -> str:
        """Install the hook and return the command that Claude Code would run."""
        self.command("install")
        with open(self.claude_home + "/settings.json", encoding="utf-8") as file:
            hooks = json.load(file)["hooks"]
        return str(hooks["PreToolUse"][0]["hooks"][0]["command"])


class TestClient:
    """A WebSocket client by another author, with the messages it has not been asked for yet."""

    __test__ = False

    def __init__(self, connecting: Any) -> None:
        self._connecting = connecting
        self.connection = connecting.__enter__()
        self.hello: dict[str, Any] = {}
        self.subscribed: dict[str, Any] = {}
        self.others: collections.deque[dict[str, Any]] = collections.deque()

    def send(self, **message: Any) -> None:
        """Send one message."""
        self.connection.send(json.dumps(message))

    def next(self, kind: str, timeout_s: float = 15.0, **fields: Any) -> dict[str, Any]:
        """Return the next message of one kind with these fields; others are kept for later."""
        for message in list(self.others):
            if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                self.others.remove(message)
                return message
        deadline = time.monotonic() + timeout_s
        while True:
            message = json.loads(self.connection.recv(timeout=max(0.001, deadline - time.monotonic())))
            if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                return dict(message)
            self.others.append(message)

    def ask(self, answer: str, **message: Any) -> dict[str, Any]:
        """Send one message and return the answer of one kind."""
        self.send(**message)
        return self.next(answer)

    def events(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Return the next `count` events."""
        return [self.next("event", timeout_s)["event"] for _ in range(count)]

    def close(self) -> None:
        """Close the connection."""
        self._connecting.__exit__(None, None, None)


def alive(pid: int) -> bool:
    """Tell whether a process runs (a zombie does not)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def run_hook(
    command: str, payload: bytes, environment: dict[str, str], timeout_s: float = 30
) -> subprocess.CompletedProcess[bytes]:
    """Run the hook as Claude Code does: through /bin/sh, in a session of its own."""
    return subprocess.run(
        ["/bin/sh", "-c", command], input=payload, env=environment, capture_output=True, timeout=timeout_s,
        check=False, start_new_session=True,
    )  # fmt: skip


def new_home() -> str:
    """Make a short-named directory for a monitor: a Unix socket's path has at most 107 bytes."""
    return tempfile.mkdtemp(prefix="ctx-", dir="/tmp")


def clean_up(monitor: RunningMonitor) -> None:
    """End the monitor if it runs, and remove its directory."""
    about = cm.running_monitor(cm.Settings(monitor.home, "", "", {}))
    if about is not None:
        os.kill(about["pid"], signal.SIGCONT)
        os.kill(about["pid"], signal.SIGKILL)
        eventually(lambda: not alive(about["pid"]))
    shutil.rmtree(monitor.home, ignore_errors=True)


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


def payload(hook: str, session: str = "s1", **fields: Any) -> dict[str, Any]:
    """Return a hook payload with the fields every payload has."""
    return {
        "session_id": session, "transcript_path": "/nowhere.jsonl", "cwd": "/home/dev/shop",
        "hook_event_name": hook, **fields,
    }  # fmt: skip


# ---------------------------------------------------------------------------
# The hook as a process: nobody must notice it
#
# The installed command, through /bin/sh. One installation serves every test: CONTEXTUATE_HOME says whose
# spool it is. In that copy the default socket is a path of our own, so that no test reaches a developer's
# monitor.
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class HookInstallation:
    """The installed hook: its command, its directory, and the socket it takes for the default one."""

    command: str
    directory: str
    default_socket: str

    @property
    def argv(self) -> list[str]:
        """The command without the shell."""
        return shlex.split(self.command)[:4]


@pytest.fixture(scope="module")
def hook_installed() -> Iterator[HookInstallation]:
    made = RunningMonitor(new_home())
    command = made.installed_command()
    directory, default_socket = made.home + "/hooks", made.home + "/default.sock"
    for path in (directory + "/lib/hot_path.py", directory + "/lib/emit_event.py"):
        hook_replace(path, '"/tmp/contextuate-monitor.sock"', f'"{default_socket}"')
    yield HookInstallation(command, directory, default_socket)
    shutil.rmtree(made.home)


def hook_replace(path: str, old: str, new: str) -> None:
    """Change one file of a program that a test has to itself."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert old in text
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace(old, new))


def hook_call(command: str, given_payload: Any, environment: dict[str, str], **more: str) -> str:
    """Run the hook on bytes or an object; check what must hold for every run; return its standard error."""
    line = given_payload if isinstance(given_payload, bytes) else json.dumps(given_payload).encode() + b"\n"
    done = run_hook(command, line, {**environment, **more})
    assert (done.returncode, done.stdout) == (0, b""), done
    return done.stderr.decode()


def hook_spooled(home: str, place: str = "spool") -> list[Any]:
    """Return what lies in the spool, parsed, in the order of its segments."""
    found = []
    for path, _ in ee.spool_segments(f"{home}/{place}"):
        with open(path, "rb") as file:
            found += [json.loads(line) for line in file.read().split(b"\n") if line]
    return found


def hook_mode_of(path: object) -> int:
    return stat.S_IMODE(os.lstat(str(path)).st_mode)


HOOK_INPUTS = {
    "one line": b'{"session_id":"hook-in","hook_event_name":"Stop","cwd":"/w"}\n',
    "no newline": b'{"session_id":"hook-in","hook_event_name":"Stop","cwd":"/w"}',
    "many lines": b'{\n  "session_id": "hook-in",\r\n  "hook_event_name": "Stop"\n}\n\n',
    "empty": b"",
    "blank": b" \n\n ",
    "half": b'{"session_id":"hook-in","hook_ev',
    "garbage": bytes(range(256)) * 40,
    "garbage that ends like an object": b"\xff\xfe{\x00}\n",
    "a list": b"[1,2]\n",
    "two objects": b"{}\n{}\n",
    "not UTF-8": b'{"session_id":"hook-in","hook_event_name":"Stop","x":"\xff\xc0"}\n',
    "deep": b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "20 MB": b'{"session_id":"hook-in","hook_event_name":"PostToolUse","tool_response":"'
    + b"x" * 20_000_000
    + b'"}\n',
    "9 MB of garbage": b"\x00\n" * 4_500_000,
}


@pytest.mark.parametrize("given_input", HOOK_INPUTS.values(), ids=HOOK_INPUTS.keys())
def test_whatever_comes_the_hook_ends_with_0_and_says_nothing(hook_installed, monitor, shared, given_input):
    assert hook_call(hook_installed.command, given_input, monitor.environment) == ""
    assert hook_call(hook_installed.command, given_input, shared.environment) == ""
    session = f"hook-{uuid.uuid4()}"
    hook_call(hook_installed.command, payload("Stop", session), shared.environment)
    assert shared.sessions()[session]["state"] == "idle", "the stream goes on"


def test_a_whole_payload_is_stored_before_the_hook_ends_or_spooled(hook_installed, monitor, shared):
    session = f"hook-{uuid.uuid4()}"
    given_payload = payload("PreToolUse", session, tool_name="Bash", tool_input={"command": "ls"})
    hook_call(hook_installed.command, given_payload, shared.environment, CLAUDE_PID=str(os.getpid()))
    (event,) = shared.get(f"/api/sessions/{session}/events")["events"]
    assert (event["sessionId"], event["hookType"], event["pid"]) == (session, "PreToolUse", os.getpid())
    assert event["machineId"] == "testbox" and event["workingDirectory"] == "/home/dev/shop"
    assert uuid.UUID(event["id"]).version == 4 and abs(event["timestamp"] - event["received"]) < 60_000
    assert hook_spooled(shared.home) == []
    hook_call(hook_installed.command, given_payload, monitor.environment, CLAUDE_PID="12")
    (line,) = hook_spooled(monitor.home)
    assert line["hook"] == given_payload and (line["machineId"], line["pid"]) == ("testbox", 12)


def test_what_only_the_environment_knows_is_put_beside_the_payload(hook_installed, monitor):
    more = {
        "CLAUDE_CODE_SESSION_ID": 'from "outside" é', "CONTEXTUATE_PARENT_SESSION": "par\nent",
        "CONTEXTUATE_MACHINE_ID": "",
        "CLAUDE_PID": "x12",
    }  # fmt: skip
    hook_call(hook_installed.command, b'{"hook_event_name":"Stop"}', monitor.environment, **more)
    (line,) = hook_spooled(monitor.home)
    assert line["sessionId"] == 'from "outside" é' and line["parentSessionId"] == "par\nent"
    assert line["machineId"] == os.uname().nodename and line["cwd"] == os.getcwd() and "pid" not in line
    event = ee.build_event(line, 1, "m")
    assert (event["sessionId"], event["workingDirectory"]) == ('from "outside" é', os.getcwd())


def test_a_closed_standard_input_or_output_or_error_is_no_failure(hook_installed, monitor):
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"):
        command = f"{{ {hook_installed.command}; }} {closed}"
        done = run_hook(command, b"{}\n", {**monitor.environment, "CONTEXTUATE_DEBUG": "1"})
        assert (done.returncode, done.stdout) == (0, b""), closed
    assert len(hook_spooled(monitor.home)) == 3  # all that had an input


def test_a_standard_input_that_never_ends_is_not_waited_for_once_the_object_is_whole(hook_installed, monitor):
    # In a copy whose deadline is an hour away, only the object's own end can end the hook.
    copy = monitor.home + "/copy"
    shutil.copytree(hook_installed.directory, copy)
    hook_replace(copy + "/lib/hot_path.py", "STDIN_DEADLINE_S = 2.0", "STDIN_DEADLINE_S = 3600.0")
    for given_input in (b'{"a": {"b": 1}}', b'{"a": "}"}\n', b'{\n"a": {"b": 2}\n}\n'):
        hook = subprocess.Popen(
            [*hook_installed.argv[:3], copy + "/emit_event.py"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=monitor.environment,
        )  # fmt: skip
        for piece in (given_input[:3], given_input[3:9], given_input[9:]):
            hook.stdin.write(piece)
            hook.stdin.flush()
        try:
            assert hook.wait(20) == 0
        finally:
            hook.kill()
            assert hook.communicate()[0] == b""
    assert [line["hook"]["a"] for line in hook_spooled(monitor.home)] == [{"b": 1}, "}", {"b": 2}]


def hook_unread(fd: int) -> int:
    """Return how many bytes wait in a pipe."""
    return int(struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0])


@pytest.mark.parametrize("given_input", [b'{"a":{"b":1}}\n', b'{"a":\n{"b":1}\r\n}\n', b'{"a":{"b":1}}'])
def test_a_payload_that_comes_byte_by_byte_into_an_open_pipe_is_whole_at_its_end(given_input):
    reader, writer = os.pipe()
    taken: list[bytes] = []
    thread = threading.Thread(
        target=lambda: taken.append(ee.read_payload(reader, time.monotonic() + 3600)), daemon=True
    )
    thread.start()
    try:
        for at in range(len(given_input)):
            os.write(writer, given_input[at : at + 1])
            eventually(lambda: taken or not hook_unread(reader))
        eventually(lambda: taken, what="the end of the payload")
    finally:
        os.close(writer)
        thread.join(20)
        os.close(reader)
    assert taken == [given_input.strip()]


def test_half_an_object_is_waited_for_two_seconds_and_no_longer(hook_installed, monitor):
    assert ee.STDIN_DEADLINE_S == 2.0
    begin = time.monotonic()
    hook = subprocess.Popen(
        hook_installed.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=monitor.environment
    )
    hook.stdin.write(b'{"session_id":"s","x":{}')
    hook.stdin.flush()
    try:
        assert hook.wait(20) == 0
        assert time.monotonic() - begin > 1.9, "it gave up too early"
    finally:
        hook.kill()
        assert hook.communicate()[0] == b""


HOOK_ODD_ENVIRONMENTS = {
    "no HOME": {"HOME": None},
    "empty HOME": {"HOME": ""},
    "no environment at all but the home": None,
    "home is a file": {"CONTEXTUATE_HOME": "{home}/file"},
    "home below a file": {"CONTEXTUATE_HOME": "{home}/file/below"},
    "home where nothing can be made": {"CONTEXTUATE_HOME": "/proc/none"},
    "home is /dev/null": {"CONTEXTUATE_HOME": "/dev/null"},
    "home is a link in a circle": {"CONTEXTUATE_HOME": "{home}/circle"},
    "home with a long name": {"CONTEXTUATE_HOME": "{home}/" + "x" * 300},
    "config is a directory": {"CONTEXTUATE_CONFIG": "{home}"},
    "config is missing": {"CONTEXTUATE_CONFIG": "{home}/none.json"},
    "config is /dev/null": {"CONTEXTUATE_CONFIG": "/dev/null"},
    "machine": {"CONTEXTUATE_MACHINE_ID": 'a"b\\\n\x01\udcff' + "y" * 1000},
    "parent": {"CONTEXTUATE_PARENT_SESSION": "\udcff\n"},
    "debug": {"CONTEXTUATE_DEBUG": "\udcff"},
    "pid": {"CLAUDE_PID": "99999999999999999999"},
    "python": {"PYTHONPATH": "/nowhere", "PYTHONSTARTUP": "/nowhere", "PYTHONINSPECT": "1", "LC_ALL": "zz"},
}


@pytest.mark.parametrize("odd", HOOK_ODD_ENVIRONMENTS.values(), ids=HOOK_ODD_ENVIRONMENTS.keys())
def test_an_odd_environment_is_no_failure(hook_installed, monitor, odd):
    with open(monitor.home + "/file", "w", encoding="ascii"):
        pass
    os.symlink("circle", monitor.home + "/circle")
    environment = dict(monitor.environment)
    if odd is None:
        environment = {"CONTEXTUATE_HOME": monitor.home}
    for name, value in (odd or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value.replace("{home}", monitor.home)
    hook_call(hook_installed.command, payload("Stop"), environment)
    if "CONTEXTUATE_HOME" not in (odd or {}):
        (line,) = hook_spooled(monitor.home)
        assert line["hook"] == payload("Stop")
        assert ee.build_event(line, 1, "m")["hookType"] == "Stop"


def test_a_missing_home_is_made_for_its_user_alone(hook_installed, monitor):
    home = monitor.home + "/a/b"
    hook_call(hook_installed.command, payload("Stop"), {**monitor.environment, "CONTEXTUATE_HOME": home})
    (segment,) = glob.glob(home + "/spool/*")
    assert hook_mode_of(home + "/spool") == 0o700 and hook_mode_of(segment) == 0o600


def test_without_home_the_users_own_directory_is_looked_up():
    assert ee.places({b"HOME": b""}) == ee.places({})
    home, config = ee.places({})
    assert home == os.path.expanduser("~" + pwd.getpwuid(os.getuid()).pw_name) + "/.contextuate"
    assert config == home + "/monitor.config.json"
    assert ee.places({b"HOME": b"/h"}) == ("/h/.contextuate", "/h/.contextuate/monitor.config.json")
    assert ee.places({b"CONTEXTUATE_HOME": b"/c", b"CONTEXTUATE_CONFIG": b"/d"}) == ("/c", "/d")


@pytest.mark.parametrize("mode", [0o500, 0o000])
def test_a_home_or_a_config_that_may_not_be_written_or_read_is_no_failure(hook_installed, monitor, mode):
    closed = monitor.home + "/closed"
    os.mkdir(closed)
    with open(closed + "/c.json", "w", encoding="ascii") as file:
        file.write("{}")
    os.chmod(closed, mode)
    hook_call(
        hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_CONFIG=closed + "/c.json"
    )
    assert len(hook_spooled(monitor.home)) == 1
    hook_call(hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_HOME=closed)
    os.chmod(closed, 0o700)


@pytest.mark.parametrize(
    "config",
    [b"{", b"[]", b'{"mode": "none"}', b'{"socketPath": 5}', b"\xff\xfe", b'{"server": 1}'],
    ids=repr,
)
def test_with_a_broken_config_the_hook_uses_defaults(hook_installed, monitor, config):
    with open(monitor.home + "/monitor.config.json", "wb") as file:
        file.write(config)
    words = hook_call(hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_DEBUG="1")
    assert f"mode local, socket {hook_installed.default_socket}" in words
    assert len(hook_spooled(monitor.home)) == 1
    with open(monitor.home + "/emit.log", encoding="utf-8") as log:
        assert monitor.home + "/monitor.config.json" in log.read()


def test_an_event_is_delivered_even_where_our_directory_cannot_be_written(hook_installed, running):
    # The monitor is there and listens; only what the hook would like to remember has no place.
    with open(running.home + "/file", "w", encoding="ascii"):
        pass
    where = {
        "CONTEXTUATE_HOME": running.home + "/file",
        "CONTEXTUATE_CONFIG": running.home + "/monitor.config.json",
    }
    words = hook_call(
        hook_installed.command,
        payload("Stop", "no-home"),
        {**running.environment, **where},
        CONTEXTUATE_DEBUG="1",
    )
    assert "no-home" in running.sessions(), words


def test_an_event_without_a_directory_is_kept_when_the_working_directory_is_gone(hook_installed, monitor):
    gone = monitor.home + "/gone"
    os.mkdir(gone)
    command = f"cd '{gone}' && rmdir '{gone}' && {{ {hook_installed.command}; }}"
    hook_call(command, b'{"hook_event_name":"Stop","session_id":"s"}', monitor.environment)
    (line,) = hook_spooled(monitor.home)
    assert line["hook"]["session_id"] == "s"


def test_debug_tells_the_config_the_mode_and_where_the_event_went(hook_installed, monitor, shared):
    words = hook_call(
        hook_installed.command, payload("Stop", "hook-d"), shared.environment, CONTEXTUATE_DEBUG="1"
    )
    assert f"config {shared.home}/monitor.config.json: mode local, socket {shared.socket_path}" in words
    assert "the monitor has stored" in words and "spool" not in words
    words = hook_call(hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_DEBUG="1")
    assert f"config {monitor.home}/monitor.config.json: mode local, socket {monitor.socket_path}" in words
    assert "did not take it" in words and f"kept in the spool: {monitor.home}/spool/" in words
    assert "nothing on standard input" in hook_call(
        hook_installed.command, b"", monitor.environment, CONTEXTUATE_DEBUG="1"
    )
    assert (
        hook_call(hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_DEBUG="0") == ""
    )


def test_the_hooks_log_is_bounded(monkeypatch, tmp_path):
    monkeypatch.setenv("CONTEXTUATE_HOME", str(tmp_path))
    for _ in range(4):
        ee.log_failure("x" * (200 << 10))
    assert sorted(os.listdir(tmp_path)) == ["emit.log", "emit.log.1"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1 << 20
    assert hook_mode_of(tmp_path / "emit.log") == 0o600


def test_without_its_library_the_launcher_ends_with_0_and_in_silence(hook_installed, monitor):
    copy = monitor.home + "/copy"
    shutil.copytree(hook_installed.directory, copy)
    command = hook_installed.command.replace(hook_installed.directory, copy)
    with open(copy + "/lib/hot_path.py", "w", encoding="ascii") as file:
        file.write("raise SystemExit(2)\n")
    assert hook_call(command, payload("Stop"), monitor.environment) == ""
    shutil.rmtree(copy + "/lib")
    assert hook_call(command, payload("Stop"), monitor.environment) == ""
    assert hook_call(hook_installed.command.replace("emit_event.py", "gone.py"), b"{}", monitor.environment)


def test_the_whole_file_is_a_hook_too(monitor, shared):
    command = cm.hook_command(PYTHON, os.path.join(ROOT, "emit_event.py"))
    hook_call(command, payload("Stop", "hook-whole"), shared.environment)
    assert "hook-whole" in shared.sessions()
    hook_call(command, payload("Stop"), monitor.environment)
    assert len(hook_spooled(monitor.home)) == 1


def hook_ignores_sigterm(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        ignored = next(line for line in file if line.startswith("SigIgn"))
    return bool(int(ignored.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_a_sigterm_does_not_stop_the_hook(hook_installed, shared):
    session = f"hook-{uuid.uuid4()}"
    hook = subprocess.Popen(
        hook_installed.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=shared.environment
    )
    try:
        eventually(lambda: hook_ignores_sigterm(hook.pid))
        for _ in range(3):
            hook.send_signal(signal.SIGTERM)
        output, _ = hook.communicate(json.dumps(payload("StopFailure", session)).encode(), timeout=20)
    finally:
        hook.kill()
    assert (hook.returncode, output) == (0, b"") and session in shared.sessions()


def test_a_sigterm_at_any_moment_loses_nothing_of_a_hook_that_ends_with_0(hook_installed, running):
    rng = random.Random(4)
    survived = []
    for number in range(40):
        session = f"term-{number}"
        hook = subprocess.Popen(
            hook_installed.argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=running.environment
        )
        hook.stdin.write(json.dumps(payload("StopFailure", session)).encode())
        hook.stdin.flush()
        threading.Event().wait(rng.uniform(0, 0.03))  # the moment is what is tried
        hook.send_signal(signal.SIGTERM)
        output, _ = hook.communicate(timeout=20)
        assert output == b"" and hook.returncode in (0, -signal.SIGTERM)
        survived += [session] if hook.returncode == 0 else []
    assert survived
    eventually(lambda: not hook_spooled(running.home))
    assert set(survived) <= set(running.sessions())


def hook_listen(path: str, answer: Any) -> tuple[threading.Thread, list[bytes]]:
    """Listen in the monitor's place for one hook; `answer(connection)` decides what it gets."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(8)
    listener.settimeout(20)
    received: list[bytes] = []

    def serve() -> None:
        with listener, contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                answer(connection)
                with contextlib.suppress(OSError):
                    while piece := connection.recv(1 << 16):
                        received.append(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread, received


HOOK_BAD_MONITORS = {
    "silent": lambda connection: None,
    "closes": lambda connection: connection.close(),
    "closes after reading": lambda connection: (connection.recv(1 << 16), connection.close()),
    "answers something else": lambda connection: connection.sendall(b"?"),
}


@pytest.mark.parametrize("answer", HOOK_BAD_MONITORS.values(), ids=HOOK_BAD_MONITORS.keys())
def test_what_nobody_acknowledged_is_spooled(hook_installed, monitor, answer):
    assert ee.ACKNOWLEDGEMENT_DEADLINE_S == 0.25
    thread, _ = hook_listen(monitor.socket_path, answer)
    hook_call(hook_installed.command, payload("Stop"), monitor.environment)
    thread.join(20)
    (line,) = hook_spooled(monitor.home)
    assert line["hook"] == payload("Stop")


def test_an_acknowledged_event_is_not_spooled(hook_installed, monitor):
    thread, _ = hook_listen(monitor.socket_path, lambda connection: connection.sendall(b"\x06"))
    hook_call(hook_installed.command, payload("Stop"), monitor.environment)
    thread.join(20)
    assert hook_spooled(monitor.home) == []


def test_a_listener_that_never_accepts_does_not_hold_the_hook(hook_installed, monitor):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(monitor.socket_path)
        listener.listen(0)
        with contextlib.ExitStack() as stack:
            for _ in range(3):  # fill the backlog, so that connecting itself blocks
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                waiting.setblocking(False)
                waiting.connect_ex(monitor.socket_path)
            hook_call(hook_installed.command, payload("Stop"), monitor.environment)
    assert len(hook_spooled(monitor.home)) == 1


HOOK_FOREIGN_LISTENER = """
import os, socket, sys
os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
print("ready", flush=True)
connection, _ = listener.accept()
size = 0
while True:
    piece = connection.recv(65536)
    if not piece:
        break
    size += len(piece)
    connection.sendall(b"\\x06")
print(size, flush=True)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_another_users_socket_gets_nothing(hook_installed, monitor):
    os.chmod(monitor.home, 0o777)
    listener = subprocess.Popen(
        [PYTHON, "-I", "-c", HOOK_FOREIGN_LISTENER, monitor.socket_path], stdout=subprocess.PIPE
    )
    try:
        assert listener.stdout.readline() == b"ready\n"
        words = hook_call(hook_installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_DEBUG="1")
        assert listener.stdout.readline() == b"0\n"
    finally:
        listener.kill()
        listener.communicate()
    assert "another user" in words and len(hook_spooled(monitor.home)) == 1


def hook_socket_used(installed: HookInstallation, monitor: RunningMonitor) -> str:
    """Return the socket that the hook takes from its configuration, as it tells."""
    words = hook_call(installed.command, payload("Stop"), monitor.environment, CONTEXTUATE_DEBUG="1")
    return re.search(r"socket (\S+)", words)[1]


def test_the_derived_settings_are_used_while_the_config_is_the_same_file(hook_installed, monitor):
    path, cache = monitor.home + "/monitor.config.json", monitor.home + "/hook.cache"
    assert hook_socket_used(hook_installed, monitor) == monitor.socket_path
    assert hook_mode_of(cache) == 0o600
    marked = monitor.home + "/x.sock"  # what only the cache says
    about = os.stat(path)

    def mark() -> None:
        hook_replace(cache, monitor.socket_path, marked)
        assert hook_socket_used(hook_installed, monitor) == marked

    def same_time_and_size() -> None:
        with open(path, "rb") as file:
            content = file.read()
        with open(path + ".new", "wb") as file:
            file.write(content)
        os.replace(path + ".new", path)
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))

    def longer() -> None:
        with open(path, "ab") as file:
            file.write(b"\n")
        os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))

    for change in (lambda: os.utime(path, ns=(1, 1)), same_time_and_size, longer):
        mark()
        change()
        assert hook_socket_used(hook_installed, monitor) == monitor.socket_path
    mark()
    os.unlink(path)
    assert hook_socket_used(hook_installed, monitor) == hook_installed.default_socket


@pytest.mark.parametrize(
    "content", [b"", b"\n\n\n", b"\xff" * 10_000, b"0 0 0 0\nlocal\n/x\n", b"{key}\nlocal\n"]
)
def test_a_corrupt_cache_is_harmless(hook_installed, monitor, content):
    about = os.stat(monitor.home + "/monitor.config.json")
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}".encode()
    with open(monitor.home + "/hook.cache", "wb") as file:
        file.write(content.replace(b"{key}", key))
    assert hook_socket_used(hook_installed, monitor) == monitor.socket_path
    assert len(hook_spooled(monitor.home)) == 1


def test_a_cache_that_cannot_be_replaced_loses_no_event(hook_installed, monitor):
    os.mkdir(monitor.home + "/hook.cache")
    hook_call(hook_installed.command, payload("Stop"), monitor.environment)
    assert len(hook_spooled(monitor.home)) == 1


def test_what_was_cut_in_the_hook_keeps_its_original_size_under_its_name_in_data(hook_installed, running):
    content = "x" * 20_000_000
    hook_call(
        hook_installed.command,
        payload("PreToolUse", "cut", tool_name="Write", tool_input={"content": content, "file_path": "/f"}),
        running.environment,
    )
    (event,) = eventually(running.stored_events)  # through the spool when storing took too long
    assert event["data"]["truncated"] == {"toolInput.content": 20_000_000}
    assert event["data"]["toolInput"]["file_path"] == "/f"
    assert len(event["data"]["toolInput"]["content"]) <= (1 << 20) + 100


def test_a_secret_across_the_hooks_own_cut_leaves_no_half(monkeypatch):
    monkeypatch.setattr(ee, "LINE_LIMIT_BYTES", 256 << 10)  # then the hook cuts at 32 KiB
    secret = hook_token("AKIA", 16, "ABCDEFGH234567")
    cut_at = (256 << 10) // 8 // 2
    for back in (1, 6, 10, 14, 19):
        text = "x " * ((cut_at - back) // 2) + ("" if (cut_at - back) % 2 == 0 else " ")
        text += secret + " y" * 100_000
        line = ee.shrink_line(ee.encode_json({"id": "i", "hook": {"tool_input": {"content": text}}}) + b"\n")
        event = protected(ee.build_event(json.loads(line), 1, "m"), ee.Privacy(field_limit_bytes=8 << 20))
        assert not hook_traces(secret, event), back


# ---------------------------------------------------------------------------
# Config: relaxed JSON, one table of keys
# ---------------------------------------------------------------------------

hook_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(["http://a/b", "# no comment", "/* no */ // comment", ",]", ",}", '"', "\\", '\\",]//'])
    | st.integers(0xD800, 0xDFFF).map(chr),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
hook_objects = st.dictionaries(st.text(max_size=8), hook_json, max_size=5)
HOOK_COMMENTS = (
    "",
    " ",
    "\n",
    "// line\n",
    '# "hash" ,]\n',
    "/* block\n , } */",
    '/* " */',
    "//\n",
    "/**/",
    "// */\n",
)


def hook_relaxed(value: Any, rng: random.Random) -> str:
    """Write a value as JSON with comments and trailing commas at every place where they may stand."""

    def gap() -> str:
        return rng.choice(HOOK_COMMENTS) + rng.choice(HOOK_COMMENTS)

    if isinstance(value, dict):
        parts = [
            f"{gap()}{json.dumps(name)}{gap()}:{hook_relaxed(inner, rng)}" for name, inner in value.items()
        ]
    elif isinstance(value, list):
        parts = [hook_relaxed(inner, rng) for inner in value]
    else:
        return gap() + json.dumps(value, ensure_ascii=rng.random() < 0.5) + gap()
    comma = gap() + "," if parts and rng.random() < 0.5 else ""
    inside = ",".join(parts) + comma + gap()
    return gap() + ("{%s}" if isinstance(value, dict) else "[%s]") % inside + gap()


@settings(deadline=None, max_examples=150)
@given(hook_json, st.randoms(use_true_random=False))
def test_comments_and_trailing_commas_change_nothing(value, rng):
    assert json.dumps(ee.parse_relaxed_json(hook_relaxed(value, rng))) == json.dumps(value)


@pytest.mark.parametrize(
    ("text", "place"),
    [('{"a": 1 "b"}', "line 1"), ("{\n// c\n/* d\n*/ x}", "line 4"), ('{"a": /* 1}', "line 1")],
)
def test_what_is_still_no_json_is_refused_with_its_line(text, place):
    with pytest.raises(ValueError, match=place):
        ee.parse_relaxed_json(text)


# For every key: values that must be refused, and one that is taken.
HOOK_WRONG_VALUES: dict[str, tuple[list[Any], Any]] = {
    "mode": (["", "Local", "both", 1, None, ["local"]], "local"),
    "socketPath": (["", "relative.sock", 5, None, "/" + "x" * 100, "/" + "é" * 50, ["/a"]], "/" + "x" * 99),
    "server.host": (["", 1, None, ["127.0.0.1"]], "::1"),
    "server.port": ([-1, 65536, "3847", 1.0, True, None, 10**30, float("inf"), float("nan")], 0),
    "server.wsPort": ([-1, 65536, "3848", 1.5, False, None], 65535),
    "server.allowedHosts": (["a", [1], [""], {"a": 1}, None], ["a", "b"]),
    "server.auth": (["none", True, None, "AUTO"], "token"),
    "redis.url": (
        [
            "",
            "http://a",
            "localhost:6379",
            1,
            "redis://:a/b@h:1/0",
            "redis://:a#b@h:1",
            "redis://h:0",
            "unix:x",
        ],
        "rediss://u:p@redis.example.org:6380/2",
    ),
    "redis.host": (["", 1, None], "redis.example.org"),
    "redis.port": ([0, 65536, "6379", True, None], 6380),
    "redis.username": (["", 1, True], "monitor"),
    "redis.password": (["", 1, True, ["a"]], None),
    "redis.db": ([-1, "0", None, 65536], 3),
    "redis.channel": (["", None, 5, "x" * 201], "team:events"),
    "redis.tls": ([1, "true", None], True),
    "redis.verify": ([0, "false", None], False),
    "redis.caFile": (["", 1, False], None),
    "redis.certFile": (["", 1, False], None),
    "redis.keyFile": (["", 1, False], None),
    "redis.streamMaxLength": ([-1, 10_000_001, "1", None, True], 0),
    "redis.maxRetries": ([0, -1, "10", False, 1.5], None),
    "persistence.enabled": ([1, 0, "true", None], False),
    "persistence.type": (["sqlite", "redis", "", None], "file"),
    "limits.fieldBytes": ([1023, (8 << 20) + 1, "1024", True, None], 1024),
    "limits.connections": ([0, 10_001, "1", True, None], 10_000),
    "limits.clientQueueBytes": ([65_535, (64 << 20) + 1, 1e6, None], 65_536),
    "sessions.quietSeconds": ([4, 86_401, "5", True, None], 5),
    "sessions.endedHours": ([0, 721, 1.5, None], 720),
    "retention.days": ([0, -1, "30", 1.5, True, 36_501], None),
    "retention.maxMegabytes": ([15, "2048", 1.5, True, 10**9 + 1], None),
    "privacy.redact": (["false", 0, 1, None], False),
    "privacy.level": (["none", True, None, "FULL"], "metadata"),
    "prices": (
        [
            7,
            None,
            {"opus": 7},
            {"opus": {"input": 1}},
            {"opus": {"input": -1, "output": 1}},
            {"opus": {"input": 1, "output": True}},
            {"opus": {"input": 1, "output": 1, "cache": 1}},
            {"": {"input": 1, "output": 1}},
        ],
        {"opus": {"input": 1, "output": 5.5, "cacheRead": 0}},
    ),
}


def hook_write_config(path: object, key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    with open(str(path), "w", encoding="utf-8") as file:
        json.dump({section: {name: value}} if dot else {section: value}, file)


def test_every_key_has_its_wrong_values_here():
    assert set(HOOK_WRONG_VALUES) == set(ee.KEYS)


def test_fields_are_cut_shorter_where_every_event_crosses_a_network(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"mode": "redis"}')
    values, warnings = ee.load_config(str(path))
    assert (values["mode"], values["limits.fieldBytes"], warnings) == ("redis", 64 << 10, [])
    path.write_text('{"mode": "redis", "limits": {"fieldBytes": 2048}}')
    assert ee.load_config(str(path))[0]["limits.fieldBytes"] == 2048


def test_a_password_that_others_can_read_is_warned_about(tmp_path):
    path = tmp_path / "c.json"
    for text in ('{"redis": {"password": "p"}}', '{"redis": {"url": "redis://u:p@h"}}'):
        path.write_text(text)
        path.chmod(0o644)
        assert ee.load_config(str(path))[1] == [
            f"{path}: holds a password that others can read; run: chmod 600 {path}"
        ]
        path.chmod(0o600)
        assert ee.load_config(str(path))[1] == []


def test_a_wrong_password_is_not_shown(tmp_path):
    path = tmp_path / "c.json"
    for key, value in (("password", 12345678), ("url", "http://u:12345678@h")):
        hook_write_config(path, f"redis.{key}", value)
        with pytest.raises(ee.ConfigError) as caught:
            ee.load_config(str(path))
        assert key in str(caught.value) and "12345678" not in str(caught.value)


@pytest.mark.parametrize("key", sorted(HOOK_WRONG_VALUES))
def test_a_wrong_value_is_refused_with_file_key_and_expectation(tmp_path, key):
    wrong, right = HOOK_WRONG_VALUES[key]
    path = tmp_path / "c.json"
    for value in wrong:
        hook_write_config(path, key, value)
        with pytest.raises(ee.ConfigError) as caught:
            ee.load_config(str(path))
        words = str(caught.value)
        assert (
            words.startswith(f"{path}: {key}: expected {ee.KEYS[key].expected}, got ") and "\n" not in words
        )
    hook_write_config(path, key, right)
    path.chmod(0o600)
    values, warnings = ee.load_config(str(path))
    assert values[key] == right and warnings == []
    assert {name for name in values if name != key and values[name] != ee.KEYS[name].default} == set()


def test_certificates_without_tls_are_warned_about(tmp_path):
    for name in ("caFile", "certFile", "keyFile"):
        hook_write_config(tmp_path / "c.json", "redis." + name, "/some.pem")
        (warning,) = ee.load_config(str(tmp_path / "c.json"))[1]
        assert "redis.tls" in warning


@pytest.mark.parametrize("section", ["server", "redis", "persistence", "limits", "sessions", "privacy"])
def test_a_section_that_is_no_object_is_refused(tmp_path, section):
    for value in (1, "x", [], None):
        hook_write_config(tmp_path / "c.json", section, value)
        with pytest.raises(ee.ConfigError, match=f"c.json: {section}: expected an object"):
            ee.load_config(str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("server.prot", "did you mean server.port?"),
        ("sockeTpath", "did you mean socketPath?"),
        ("privacy.redakt", "did you mean privacy.redact?"),
        ("zzzzzzzz", None),
    ],
)
def test_an_unknown_key_is_warned_about_with_the_nearest_one(tmp_path, key, hint):
    path = tmp_path / "c.json"
    hook_write_config(path, key, 1)
    values, (warning,) = ee.load_config(str(path))
    assert warning.startswith(f"{path}: {key}: unknown key")
    assert hint in warning if hint else "did you mean" not in warning
    assert values == {name: rule.default for name, rule in ee.KEYS.items()}


@pytest.mark.parametrize("content", [None, b"", b" \n", b"{}", b"// nothing\n{}"])
def test_no_config_means_defaults(tmp_path, content):
    if content is not None:
        (tmp_path / "c.json").write_bytes(content)
    values, warnings = ee.load_config(str(tmp_path / "c.json"))
    assert warnings == [] and (values["server.port"], values["server.wsPort"]) == (3847, 3848)
    assert values["socketPath"] == "/tmp/contextuate-monitor.sock" and values["server.host"] == "127.0.0.1"
    assert values["privacy.redact"] is True and values["persistence.enabled"] is True


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b'{"server": {"port": "x"}}', "server.port: expected an integer"),
        (b'{"persistence": {"type": "sqlite"}}', "persistence.type: expected"),
        (b'{"a": 1,, }', "not valid JSON"),
        (b"[1]", "one JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a":' + b"[" * 100_000, "not valid JSON"),
        (b'{"server": {"port": 5000, "wsPort": 5000}}', "server.wsPort: expected a port other than"),
        (b'{"server": {"host": "0.0.0.0", "auth": "off"}}', "server.auth"),
    ],
)
def test_the_monitor_does_not_start_with_a_config_that_cannot_be_used(monitor, config, words):
    path = monitor.home + "/monitor.config.json"
    with open(path, "wb") as file:
        file.write(config)
    done = monitor.command("start", "--no-open", check=False)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert path in line and words in line
    assert os.listdir(monitor.home) == ["monitor.config.json"]


def test_the_monitor_starts_with_a_pasted_config_and_warns_of_unknown_keys(monitor):
    with open(monitor.home + "/monitor.config.json", encoding="utf-8") as file:
        text = file.read()
    with open(monitor.home + "/monitor.config.json", "w", encoding="utf-8") as file:
        file.write(f'// mine\n{text[:-1]}, # more\n "socketPaht": 1, /* \n */ }}\n')
    done = monitor.command("start", "--no-open")
    assert "unknown key" in done.stderr and "did you mean socketPath?" in done.stderr


# ---------------------------------------------------------------------------
# Event model: from anything that is one JSON object to one event
# ---------------------------------------------------------------------------

HOOK_EVENT_TYPES = {
    "SessionStart": "session_start", "SessionEnd": "session_end", "UserPromptSubmit": "user_prompt",
    "PreToolUse": "tool_call", "PostToolUse": "tool_result", "PostToolUseFailure": "tool_error",
    "SubagentStart": "subagent_start", "SubagentStop": "subagent_stop", "StopFailure": "turn_error",
    "Notification": "notification", "PermissionRequest": "permission_request",
    "PermissionDenied": "permission_denied", "Elicitation": "elicitation",
    "ElicitationResult": "elicitation_result", "PreCompact": "pre_compact", "PostCompact": "post_compact",
    "TaskCreated": "task_created", "TaskCompleted": "task_completed", "Stop": "turn_end",
    "PostToolBatch": "message", "InstructionsLoaded": "message", "Setup": "message",
    "ConfigChange": "message",
    "SomethingOfTomorrow": "message", "": "message",
}  # fmt: skip
HOOK_DATA_NAMES = {
    "tool_name": "toolName", "tool_input": "toolInput", "tool_response": "toolOutput",
    "tool_output": "toolOutput",
    "tool_use_id": "toolUseId", "message": "message", "prompt": "message", "error": "error", "model": "model",
    "transcript_path": "transcriptPath", "duration_ms": "durationMs", "permission_mode": "permissionMode",
    "source": "source", "reason": "reason", "notification_type": "notificationType",
    "last_assistant_message": "assistantResponse",
}  # fmt: skip
HOOK_REQUIRED = {
    "id": str, "timestamp": int, "sessionId": str, "machineId": str, "workingDirectory": str, "hookType": str,
    "eventType": str, "data": dict,
}  # fmt: skip
HOOK_OPTIONAL = {"agentId": str, "agentType": str, "parentSessionId": str, "pid": int}


def hook_check_form(event: dict[str, Any]) -> None:
    """Check that an event has every field in its type, goes through the encoder, and comes back the same."""
    for name, kind in HOOK_REQUIRED.items():
        assert type(event[name]) is kind, (name, event[name])
    for name, kind in HOOK_OPTIONAL.items():
        assert name not in event or type(event[name]) is kind, (name, event[name])
    assert event["id"] and event["sessionId"] and event["timestamp"] >= 0
    line = ee.encode_json(event)
    assert line.isascii() and b"\n" not in line
    json.loads(line, parse_constant=pytest.fail)
    assert ee.encode_json(ee.parse_event_line(line)) == line


def hook_wrapped(given_payload: Any, **more: Any) -> dict[str, Any]:
    return {"id": "5f0c", "timestamp": 1_795_500_000_000, "machineId": "box", "hook": given_payload, **more}


@pytest.mark.parametrize("hook_type", sorted(HOOK_EVENT_TYPES))
def test_each_hook_has_its_event_type(hook_type):
    event = ee.build_event(hook_wrapped(payload(hook_type)), 5, "m")
    assert (event["hookType"], event["eventType"]) == (hook_type, HOOK_EVENT_TYPES[hook_type])


@pytest.mark.parametrize("name", recording_names())
def test_no_field_of_a_recorded_payload_is_lost(name):
    for given_payload in recorded(name):
        for form in (hook_wrapped(given_payload, pid=77), given_payload):
            event = ee.build_event(json.loads(json.dumps(form)), 5, "m")
            hook_check_form(event)
            expected = dict(given_payload)
            assert event["sessionId"] == expected.pop("session_id")
            assert event["workingDirectory"] == expected.pop("cwd")
            hook_type = expected.pop("hook_event_name")
            assert (event["hookType"], event["eventType"]) == (
                hook_type,
                HOOK_EVENT_TYPES.get(hook_type, "message"),
            )
            if "agent_id" in expected:
                assert event["agentId"] == expected.pop("agent_id")
                assert event.get("agentType") == expected.pop("agent_type", None)
            else:
                assert "agentId" not in event and "agentType" not in event
            named = {HOOK_DATA_NAMES.get(field, field): value for field, value in expected.items()}
            assert len(named) == len(expected) and event["data"] == named
            if form is given_payload:
                assert (event["timestamp"], event["machineId"]) == (5, "m") and uuid.UUID(
                    event["id"]
                ).version == 4
            else:
                about = (event["id"], event["timestamp"], event["machineId"], event["pid"])
                assert about == ("5f0c", 1_795_500_000_000, "box", 77)


@pytest.mark.parametrize("name", recording_names())
def test_a_recorded_payload_arrives_the_same_through_the_hooks_line(name):
    for line in recorded_lines(name):
        wrapped = ee.wrap(line, {b"CLAUDE_PID": b"5", b"CONTEXTUATE_MACHINE_ID": b"box"})
        assert wrapped.count(b"\n") == 1 and wrapped.endswith(b"}\n")
        assert ee.parse_event_line(wrapped)["hook"] == json.loads(line)


def test_two_fields_of_one_meaning_are_both_kept():
    event = ee.build_event(
        payload("Elicitation", message="m", prompt="p", tool_response=1, tool_output=2), 5, "m"
    )
    assert (event["data"]["message"], event["data"]["prompt"]) == ("m", "p")
    assert (event["data"]["toolOutput"], event["data"]["tool_output"]) == (1, 2)
    assert ee.build_event(payload("UserPromptSubmit", prompt="p"), 5, "m")["data"]["message"] == "p"


@pytest.mark.parametrize("form", [hook_wrapped, dict])
def test_a_payload_field_that_is_called_like_one_of_ours_overwrites_nothing(form):
    given_payload = payload("PreToolUse", tool_name="Bash", toolName="other", prompt="p")
    data = ee.build_event(form(given_payload), 5, "m")["data"]
    assert data["toolName"] == "Bash" and "other" in data.values() and data["message"] == "p"


def test_the_type_of_a_main_thread_is_no_subagents_type():
    event = ee.build_event(payload("SessionStart", agent_type="reviewer"), 5, "m")
    assert "agentType" not in event and event["data"]["agent_type"] == "reviewer"


def test_events_of_the_node_emitter_are_taken_as_they_are():
    given_event = {
        "id": "0198c7a1-0000-7000-8000-000000000001", "timestamp": 1_795_500_000_123,
        "sessionId": "00ff00ff00ff00ff",
        "machineId": "laptop", "workingDirectory": "/w", "hookType": "PostToolUse",
        "eventType": "tool_result",
        "parentSessionId": "aa00aa00aa00aa00",
        "data": {"toolName": "Bash", "toolInput": {"command": "ls"}, "tool_output": {"stdout": "a"},
        "agentId": "x1"},
    }  # fmt: skip
    event = ee.build_event(json.loads(json.dumps(given_event)), 5, "m")
    hook_check_form(event)
    data = {
        "toolName": "Bash",
        "toolInput": {"command": "ls"},
        "toolOutput": {"stdout": "a"},
        "agentId": "x1",
    }
    assert event == {**given_event, "data": data}
    with_number = ee.build_event({**given_event, "seq": 9, "received": 9, "future": [1]}, 5, "m")
    assert "seq" not in with_number and "received" not in with_number and with_number["future"] == [1]


@pytest.mark.parametrize(
    "given_object",
    [{"test": "message"}, {}, {"id": "x", "timestamp": 1, "data": {"a": 1}}, {"eventType": 5}, {"hook": 1}],
)
def test_any_other_object_is_a_message_of_an_unknown_session(given_object):
    event = ee.build_event(dict(given_object), 5, "m")
    hook_check_form(event)
    assert (event["sessionId"], event["eventType"], event["timestamp"]) == ("unknown", "message", 5)
    assert event["data"] == given_object


HOOK_FIELDS = (
    *HOOK_DATA_NAMES, *HOOK_DATA_NAMES.values(), "hook_event_name", "session_id", "cwd", "agent_id",
    "agent_type",
    "id", "timestamp", "sessionId", "machineId", "workingDirectory", "hookType", "eventType", "agentId",
    "agentType",
    "parentSessionId", "pid", "data", "truncated", "usage", "seq", "received",
)  # fmt: skip
hook_fields = st.dictionaries(st.sampled_from(HOOK_FIELDS) | st.text(max_size=4), hook_json, max_size=12)
hook_texts = st.text(min_size=1, max_size=9)
hook_anything = st.one_of(
    hook_fields,
    st.builds(lambda fields, name: {**fields, "hook_event_name": name}, hook_fields, hook_texts),
    st.builds(lambda fields, name: {**fields, "eventType": name}, hook_fields, hook_texts),
    st.builds(
        lambda fields, hook, name: {**{k: v for k, v in fields.items() if k != "eventType"},
        "hook": hook, "id": name},
        hook_fields, hook_fields, hook_texts,
    ),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(hook_anything)
def test_no_object_is_too_odd_for_an_event(given_object):
    event = ee.build_event(json.loads(json.dumps(given_object)), 1_795_500_000_000, "m")
    hook_check_form(event)
    event = protected(event, ee.Privacy())
    hook_check_form(event)
    book = cm.Sessions(120_000, 43_200_000, "m")
    for seq in (1, 2):  # what is stored must not stop whoever reads it
        session = book.apply({"seq": seq, "received": 1_795_500_000_000 + seq, **event})
        ee.encode_json(book.to_json(session))
    ee.encode_json(cm.event_row({"seq": 1, "received": 1_795_500_000_000, **event}))


def hook_all_values(value: Any) -> list[str]:
    """List the JSON text of a value and of everything in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [json.dumps(value), *(text for part in inner for text in hook_all_values(part))]


def test_a_host_that_gets_another_name_stays_the_same_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "this_machine", lambda: "box.example.org")
    here = cm.Settings(str(tmp_path), "", "box", ee.default_values())
    ingest = cm.Ingest(here, cm.MemoryJournal(), lambda usage: None)
    stored = []
    for number, name in enumerate(("box", "box.example.org", "elsewhere")):
        wrapped = {"hook": payload("Stop"), "id": f"e{number}", "timestamp": NOW_MS, "machineId": name}
        stored += ingest.take([json.dumps(wrapped).encode()])[1]
    assert [entry.event["machineId"] for entry in stored] == ["box", "box", "elsewhere"]
    assert [json.loads(entry.line)["machineId"] for entry in stored] == ["box", "box", "elsewhere"]


@settings(deadline=None, max_examples=200)
@given(hook_anything)
def test_every_value_that_came_is_somewhere_in_the_event(given_object):
    event = ee.build_event(json.loads(json.dumps(given_object)), 1_795_500_000_000, "m")
    there = collections.Counter(hook_all_values(event))
    fields = dict(given_object)
    is_wrapped = (
        isinstance(fields.get("hook"), dict)
        and isinstance(fields.get("id"), str)
        and "eventType" not in fields
    )
    is_event = isinstance(fields.get("eventType"), str) and not isinstance(fields.get("hook_event_name"), str)
    opened = "hook" if is_wrapped else "data" if is_event and isinstance(fields.get("data"), dict) else None
    if opened:
        fields.update({(opened, inner): value for inner, value in fields.pop(opened).items()})
    for name, value in fields.items():
        if value is None or name in ("seq", "received"):
            continue  # nothing was said; numbers are given anew
        if name == "timestamp" and isinstance(value, float):
            continue  # whole milliseconds
        text = json.dumps(value)
        assert there[text] > 0, (name, value, event)
        there[text] -= 1


@pytest.mark.parametrize(
    "name", ["seq", "received", "hookType", "data", "sessionId", "workingDirectory", "agentId"]
)
@pytest.mark.parametrize("value", [5, "x", [1], {"a": 1}])
def test_a_field_beside_a_wrapped_payload_breaks_no_field_of_ours(name, value):
    event = ee.build_event(hook_wrapped(payload("Stop"), **{name: value}), 5, "m")
    hook_check_form(event)
    assert (event["hookType"], event["eventType"], event["sessionId"]) == ("Stop", "turn_end", "s1")
    assert event["workingDirectory"] == "/home/dev/shop"
    stored = json.loads(cm.numbered_line(7, 8, ee.encode_json(event)))
    assert (stored["seq"], stored["received"]) == (7, 8), "the store's own numbers hold"


def test_no_event_that_was_taken_keeps_the_monitor_from_starting_again(running):
    odd = [
        hook_wrapped(payload("Stop", "odd"), id=f"odd-{number}", **more)
        for number, more in enumerate(
            [{"seq": "x"}, {"received": None}, {"seq": 10**9}, {"hookType": 5}, {"data": 3}]
        )
    ]
    odd += [{"eventType": "message", "seq": "y", "id": "odd-e", "sessionId": 5}, {"seq": [1], "id": 7}]
    running.emit(*odd)
    assert running.get("/api/status")["events"]["stored"] == len(odd)
    running.kill()
    running.start()
    assert running.get("/api/status")["seq"] == len(odd)
    assert [event["seq"] for event in running.stored_events()] == list(range(1, len(odd) + 1))


HOOK_ODD_JSON = {
    "NaN": (b'{"n": NaN, "m": -Infinity}', {"n": "NaN", "m": "-Infinity"}),
    "a lone surrogate": (b'{"n": "\\ud83d", "\\udc00": 1}', {"n": "\ud83d", "\udc00": 1}),
    "not UTF-8": (b'{"n": "a\xffb"}', {"n": "a\ufffdb"}),
    "a long integer": (b'{"n": ' + b"9" * 4000 + b"}", {"n": 10**4000 - 1}),
    "raw U+2028": ('{"n": "a\u2028b"}'.encode(), {"n": "a\u2028b"}),
    "a name twice": (b'{"n": 1, "n": 2}', {"n": 2}),
}


@pytest.mark.parametrize(("line", "value"), HOOK_ODD_JSON.values(), ids=HOOK_ODD_JSON.keys())
def test_odd_json_is_parsed_and_survives_the_round_trip(line, value):
    assert ee.parse_event_line(line) == value
    event = ee.build_event(ee.parse_event_line(line), 5, "m")
    hook_check_form(event)
    assert json.loads(ee.encode_json(event))["data"] == value


def test_a_number_beyond_floats_becomes_text():
    given_object = ee.parse_event_line(b'{"eventType": "x", "timestamp": 1e999, "n": [1e999, {"m": -1e999}]}')
    event = ee.build_event(given_object, 5, "m")
    hook_check_form(event)
    assert json.loads(ee.encode_json(event))["n"] == ["inf", {"m": "-inf"}] and event["timestamp"] == 5


def test_an_integer_of_any_length_is_no_reason_to_refuse_an_object():
    digits = b"7" * 6000  # Python 3.11 and newer refuse to convert more than 4300 digits
    event = ee.build_event(ee.parse_event_line(b'{"eventType": "x", "n": ' + digits + b"}"), 5, "m")
    assert digits in ee.encode_json(protected(event, ee.Privacy()))


@pytest.mark.parametrize("depth", [99, 100, 101, 300, 700])
def test_deep_objects_are_kept_with_their_depth_as_text_below_a_hundred_levels(depth):
    line = b'{"hook_event_name": "Stop", "x": ' + b"[" * depth + b'"core"' + b"]" * depth + b"}"
    event = protected(ee.build_event(ee.parse_event_line(line), 5, "m"), ee.Privacy())
    assert b"core" in ee.encode_json(event)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[1]",
        b'"text"',
        b"5",
        b"null",
        b'{"a":',
        b"{}{}",
        b"{} x",
        b"{}\xc2\xa0",  # a space, but none of JSON's
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_not_one_object_is_malformed_and_nothing_worse(line):
    with pytest.raises(ee.MalformedEvent):
        ee.parse_event_line(line)
    assert not ee.is_json_object(line)


@settings(deadline=None, max_examples=150)
@given(hook_objects)
def test_what_is_encoded_parses_to_the_same(value):
    line = ee.encode_json(value)
    assert line.isascii() and b"\n" not in line and ee.parse_event_line(line) == value
    assert ee.is_json_object(line)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=60))
def test_no_bytes_break_the_parser(data):
    with contextlib.suppress(ee.MalformedEvent):
        hook_check_form(ee.build_event(ee.parse_event_line(data), 5, "m"))


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=12) | st.integers(0xD800, 0xDFFF).map(chr))
def test_the_hooks_own_quoting_is_json(text):
    assert json.loads(ee.quote(text)) == text and ee.quote(text).isascii()


# ---------------------------------------------------------------------------
# Redaction: secrets out, long fields cut
# ---------------------------------------------------------------------------

HOOK_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def hook_token(head: str, length: int, alphabet: str = HOOK_LETTERS) -> str:
    """Make up a secret of a known shape; it stands nowhere in this file."""
    rng = random.Random(head + str(length))
    return head + "".join(rng.choice(alphabet) for _ in range(length))


def hook_key_block(length: int = 1600, kind: str = "RSA ") -> str:
    body = hook_token("MII", length, HOOK_LETTERS + "+/")
    lines = "\n".join(body[at : at + 64] for at in range(0, len(body), 64))
    return f"-----BEGIN {kind}PRIVATE " + f"KEY-----\n{lines}\n-----END {kind}PRIVATE " + "KEY-----"


def hook_secrets() -> list[tuple[str, str, str]]:
    """List (kind, secret, text around it with {} in its place)."""
    jwt = ".".join((hook_token("ey" + "J", 30), hook_token("ey" + "J", 60), hook_token("", 43)))
    plain = [
        ("private-key", hook_key_block()),
        ("private-key", hook_key_block(kind="")),
        ("private-key", hook_key_block(kind="OPENSSH ")),
        ("anthropic", hook_token("sk-" + "ant-api03-", 90)),
        ("openai", hook_token("sk-" + "proj-", 48)),
        ("openai", hook_token("sk-", 48)),
        *(("github", hook_token("gh" + f"{letter}_", 36)) for letter in "pousr"),
        ("github", hook_token("github" + "_pat_", 82)),
        ("gitlab", hook_token("gl" + "pat-", 20)),
        ("aws", hook_token("AK" + "IA", 16, "ABCDEFGHIJ234567")),
        ("aws", hook_token("AS" + "IA", 16, "ABCDEFGHIJ234567")),
        ("google", hook_token("AI" + "za", 35)),
        ("google", hook_token("ya" + "29.", 60)),
        ("slack", hook_token("xox" + "b-", 40)),
        *(
            ("stripe", hook_token(f"{kind}_" + f"{mode}_", 24))
            for kind in ("sk", "rk") for mode in ("live", "test")
        ),
        ("bitbucket", hook_token("ATA" + "TT3", 180)),
        ("digitalocean", hook_token("do" + "p_v1_", 64, "0123456789abcdef")),
        ("vault", hook_token("hv" + "s.", 90)),
        ("docker", hook_token("dckr" + "_pat_", 27)),
        ("shopify", hook_token("shp" + "at_", 32, "0123456789abcdef")),
        ("groq", hook_token("gs" + "k_", 52)),
        ("xai", hook_token("xa" + "i-", 80)),
        ("stripe", hook_token("wh" + "sec_", 32)),
        ("npm", hook_token("np" + "m_", 36)),
        ("pypi", hook_token("py" + "pi-", 90)),
        ("huggingface", hook_token("h" + "f_", 34)),
        ("sendgrid", hook_token("S" + "G.", 22) + "." + hook_token("", 43)),
        ("jwt", jwt),
    ]  # fmt: skip
    word = hook_token("", 24)
    around = [
        ("azure", hook_token("", 86) + "==", "AccountName=a;Account" + "Key={};x"),
        ("slack", hook_token("T0/B0/", 24), "https://hooks.slack.com/" + "services/{} "),
        ("telegram", hook_token("", 33), "https://api.telegram.org/bot123456789:" + "AA{}/getMe"),
        ("telegram", hook_token("", 33), "TELEGRAM=123456789:" + "AA{}"),
        ("discord", "12345678/" + hook_token("", 68), "https://discord.com/" + "api/webhooks/{} "),
        ("authorization", word, "curl -H 'Authorization: Bearer {}' x"),
        ("authorization", word, "Authorization: Basic {}\r\n"),
        ("authorization", word, '"authorization": "{}"'),
        ("authorization", word, "AUTHORIZATION=token {}"),
        ("authorization", word, "with bearer {} in it"),
        ("url-password", word, "postgres://me:{}@db.example/x"),
        ("url-password", word, "redis://:{}@host:6379/0"),
        ("url-password", word, "git clone HTTPS://x-access-token:{}@host/r.git"),
        ("assignment", word, "export DB_PASSWORD={} && run"),
        ("assignment", word, "API_KEY='{}'"),
        ("assignment", word, '{{"clientSecret": 1, "client_secret": "{}"}}'),
        ("assignment", word, "?access_token={}&x=1"),
        ("assignment", word, "MY_TOKEN={}\nOTHER=1"),
        ("url-password", "p@ss" + word, "mysql://root:{}@db:3306/shop"),
        ("cookie", f"sid={word}; theme=dark", "Cookie: {}\r\nHost: a"),
        ("cookie", f"sid={word}", '"Set-Cookie": "{}"'),
        ("assignment", "12345678", "password: {}\n"),
        ("assignment", "12345678", '"password": {},'),
        ("assignment", "12345678", "PASSWORD={} "),
        ("assignment", "correct horse; battery", 'DB_PASSWORD="{}"'),
        ("assignment", word, 'const githubToken = "{}";'),
        ("assignment", word, "api_key = '{}'"),
        ("assignment", word, "aws_secret_access_key = {}\n"),
        ("assignment", word, "X-Api-Key: {}\r\n"),
        ("assignment", word, "  clientSecret: {}\n"),
        ("assignment", word, "docker login --password {} registry"),
        ("assignment", word, "gh auth --access-token='{}'"),
        ("assignment", word, "PGPASSWORD={} psql"),
        ("assignment", word, '{{\\"api_key\\": \\"{}\\"}}'),
        ("assignment", word, "connect(host=h, password='{}')"),
    ]
    return [(kind, secret, "see {} there") for kind, secret in plain] + around


def hook_traces(secret: str, event: Any, length: int = 8) -> list[str]:
    """List the pieces of a secret that stand in an event."""
    text = json.dumps(event)
    pieces = {secret[at : at + length] for at in range(4, len(secret) - length + 1)}
    return sorted(piece for piece in pieces if json.dumps(piece)[1:-1] in text)


def hook_surroundings(secret: str) -> dict[str, str]:
    """Return texts that a secret may stand in: what tools read, write and print."""
    return {
        "shell output": f"$ cat x\n{secret}\n$ ",
        "JSON": json.dumps({"a": [1, {"value": secret}]}),
        "JSON in JSON": json.dumps({"stdout": json.dumps({"value": secret})}),
        "environment file": f"A=1\nTHING={secret}\nexport OTHER='{secret}'\n",
        "URL": f"GET https://api.example/v1?x=1&thing={secret}&y=2",
        "header": f"> POST / HTTP/1.1\r\n> X-Thing: {secret}\r\n",
        "code": f'client = Client("{secret}", timeout=5)  # {secret}',
        "diff": f"@@ -1 +1 @@\n-thing: {secret}\n+thing: none",
        "other languages": f"Schlüssel: «{secret}» İstanbul ẞ {secret}",
    }


def hook_corpus() -> list[tuple[str, str, str]]:
    """List (kind, secret, text) for every secret in every surrounding that it can stand in."""
    corpus = []
    for kind, secret, around in hook_secrets():
        text = around.format(secret)
        if around == "see {} there":
            corpus += [(kind, secret, inside) for inside in hook_surroundings(secret).values()]
        corpus += [(kind, secret, text), (kind, secret, json.dumps(text)), (kind, secret, f"ünd İ {text}")]
    return corpus


def hook_missed() -> list[tuple[str, str]]:
    """List (kind, text) of the corpus that still show eight letters of their secret."""
    return [(kind, text) for kind, secret, text in hook_corpus() if hook_traces(secret, ee.redact_text(text))]


def test_a_secret_is_found_in_whatever_surrounds_it():
    assert hook_missed() == [] and len(hook_corpus()) > 300


def test_every_kind_of_secret_has_an_example_here():
    assert {kind for kind, _, _ in hook_secrets()} == {shape.kind for shape in ee.SECRET_SHAPES}


@pytest.mark.parametrize("number", range(len(hook_secrets())), ids=lambda number: hook_secrets()[number][0])
def test_a_secret_is_replaced_wherever_it_stands(number):
    kind, secret, around = hook_secrets()[number]
    digest = hashlib.sha256(secret.encode()).hexdigest()[:8]
    text, expected = around.format(secret), around.format(f"[redacted:{kind}:{digest}]")
    assert ee.redact_text(text) == expected
    assert ee.redact_text(expected) == expected, "twice is the same as once"
    assert ee.redact_text(f"{text}\n{text}") == f"{expected}\n{expected}"
    given_payload = payload(
        "PostToolUse",
        tool_input={"command": text, text: "as a name"},
        tool_response=[{"stdout": ["a", text]}],
        future=text,
    )
    event = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy())
    assert not hook_traces(secret, event)
    assert (
        event["data"]["toolOutput"] == [{"stdout": ["a", expected]}] and event["data"]["future"] == expected
    )
    again = protected(json.loads(json.dumps(event)), ee.Privacy())
    assert again == event
    other = protected({**ee.build_event({"eventType": "x"}, 5, "m"), "beside": [text]}, ee.Privacy())
    assert other["beside"] == [expected]
    kept = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy(redact=False))
    assert kept["data"]["future"] == text


@pytest.mark.parametrize(
    "name",
    ["password", "PASSWORD", "dbPassword", "db-password", "apiKey", "API_KEY", "api-key", "x-api-key",
     "apikey", "ACCESS_TOKEN",
     "accessToken", "githubToken", "token", "secret", "client_secret", "clientSecret",
     "AWS_SECRET_ACCESS_KEY", "privateKey",
     "Authorization", "passphrase", "credentials", "Cookie", "Set-Cookie", "passwd", "my.api.key",
     "pwd", "dbPwd", "auth-key", "secretKey", "bearer", "to\u212aen"],
)  # fmt: skip
def test_the_value_of_a_name_that_says_secret_is_replaced(name):
    for value in ("short", "short é"):
        digest = hashlib.sha256(value.encode()).hexdigest()[:8]
        given_payload = payload("PreToolUse", tool_input={"env": {name: value}, "list": {name: [value]}})
        data = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy())["data"]
        assert data["toolInput"] == {
            "env": {name: f"[redacted:key:{digest}]"}, "list": {name: [f"[redacted:key:{digest}]"]}
        }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["tokens", "tokenCount", "input_tokens", "max_tokens", "tool_use_id", "key", "keyboard", "secretary",
     "passwordless",
     "session_id", "token_type", "author", "cookies_accepted", "compass", "old_string", "file_path"],
)  # fmt: skip
def test_the_value_of_any_other_name_stays(name):
    given_payload = payload("PreToolUse", tool_input={name: "some value", "usage": {name: 12}})
    data = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy())["data"]
    assert data["toolInput"] == {name: "some value", "usage": {name: 12}}


def hook_harmless_texts() -> list[str]:
    rng = random.Random(9)
    image = base64.b64encode(rng.randbytes(60_000)).decode()
    return [
        str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        hashlib.sha256(b"x").hexdigest(),
        "commit " + hashlib.sha1(b"x").hexdigest() + "\nAuthor: A <a@b.example>",
        "diff --git a/x.py b/x.py\nindex 83db48f..bf2a9d1 100644\n--- a/x.py\n+++ b/x.py\n"
        "@@ -1,3 +1,3 @@\n-token = old()\n+token = new()",
        image,
        "data:image/png;base64," + image[:4000],
        "token = get_token()\npassword = input('password: ')\nsecret: str\nif token == other_token: pass",
        "const { token, secret } = useAuth(); headers.authorization = auth",
        "the password is wrong; enter a token, then the key",
        "input_tokens: 1200, output_tokens: 87",
        "toolu_01" + "A" * 22,
        "msg_01XFDUDYJgAACzvnptvVoYEL",
        "https://example.com:8443/path?x=1#y and ssh://git@host/repo and user@example.com",
        "export TOKEN=$TOKEN; curl -H \"x: $API_KEY\" password=${PASSWORD}",
        "task-list risk-free desk-lamp-with-many-parts disk-usage-report-of-the-month",
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI me@box",
        "login(token=get_token(), password=self.password, secret=name, api_key=keys[0])",
        "f(token=get_token()) or f(password=other.field); token=x.y;",
        "const t=e=>{var n=t.token,r=e.password;n.secret=r.token,i.accessToken=n.accessToken;return token===r}",
        "interface A { password: string; token: Uint8Array; secret: bytes32; apiKey?: string }",
        "fetch(u, { credentials: 'include', token: null, headers: { authorization: getAuthorization() } })",
        "credentials: true\nsecret: optional\ntoken: required\npassword: none\nauthorization: required",
        '{"password": null, "token": true, "secret": {"a": 1}, "token": [1, 2], "token": 50256}',
        'labels = {"password": "Enter your password", "token": "The token to use"}',
        "if path == '/' and \"token=\" in query_text: pass",
        "for token in tokens: print(token); token = tokens[3]; secret = sha256(x); token = error62 ?? t",
        "usage: x [--token TOKEN] [--password PASSWORD] --api-key KEY; see --token",
        "MAX_TOKEN=4096 key=value primary_key: id12345 keyboard=qwertyuiop1 monkey: banana123",
        "password = os.environ['DB_PASSWORD']; token=process.env.TOKEN1; secret={{ vault.secret1 }}",
        '"integrity": "sha512-' + base64.b64encode(rng.randbytes(64)).decode() + '",\n"resolved": "https://r.example/a.tgz"',
        'name = "serde"\nchecksum = "' + hashlib.sha256(b"y").hexdigest() + '"',
        "golang.org/x/net v0.1.0 h1:" + base64.b64encode(rng.randbytes(32)).decode() + "=\n",
        "3.14159265358979 1700000000000 0xdeadbeefcafebabe 550e8400e29b41d4a716446655440000 12345678901234567890",
        "the cookie: a small biscuit; cookies: 2; bearer of news; ask-me-anything-about-this-long-task",
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(hook_harmless_texts())))
def test_what_is_no_secret_stays_as_it_is(number):
    text = hook_harmless_texts()[number]
    assert ee.redact_text(text) == text


@pytest.mark.parametrize("module", [http.client, json, socket, tempfile, urllib.request, cm, inspect, uuid])
def test_source_code_stays_as_it_is(module):
    with open(module.__file__, encoding="utf-8") as file:
        text = file.read()
    redacted = ee.redact_text(text)
    # the one thing like a secret in them: an example in urllib's documentation
    assert redacted.count("[redacted:") - text.count("[redacted:") == (module is urllib.request)


@pytest.mark.parametrize("value", [12345678, 1234, -99999, 1234.5])
def test_a_number_that_may_be_a_password_is_replaced(value):
    given_payload = payload("PreToolUse", tool_input={"password": value, "pins": {"secret": [value]}})
    told = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy())["data"]["toolInput"]
    digest = hashlib.sha256(str(value).encode()).hexdigest()[:8]
    assert told == {"password": f"[redacted:key:{digest}]", "pins": {"secret": [f"[redacted:key:{digest}]"]}}


@pytest.mark.parametrize("value", [None, True, False, 0, 7, 999])
def test_no_number_or_switch_that_can_be_no_password_is_replaced(value):
    given_payload = payload("PreToolUse", tool_input={"password": value, "n": {"token": value}})
    told = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy())["data"]["toolInput"]
    assert told == {"password": value, "n": {"token": value}}


def hook_hints() -> list[str]:
    return sorted({shape.hint for shape in ee.SECRET_SHAPES})


# What a pattern would like to see next, over and over: each of these has cost somebody's program its square.
HOOK_REPEATED = (
    *("{}", "-{}", "{}-", "{}=", '{}": "', "{}=$", "{}: {}", "x{}a.", "{}://a:", " {} ", "{}\n"),
    *("-----BEGIN A {}", "-----BEGIN PRIVATE KEY----- -----END {}", "-eyJaaaaaaaa.{}", "eyJaaaaaaaaa.eyJ{}-"),
    *("authorization {}", "bearer   {}", "12345678:{}", "a://{}:", "--a-{}-", '"token": "{}"', "token=\\{}"),
)


def redaction_seconds(text: str) -> float:
    """Return the processor's time for one text, the shortest of three."""
    times = []
    for _ in range(3):
        begin = time.process_time()
        ee.redact_text(text)
        times.append(time.process_time() - begin)
    return min(times)


@pytest.mark.parametrize("pattern", HOOK_REPEATED)
def test_the_time_for_redaction_grows_with_the_length_and_no_faster(pattern):
    for hint in ("", "token", "eyJ", "://", "authorization"):
        unit = pattern.replace("{}", hint)
        if not unit:
            continue
        small, middle, large = (
            redaction_seconds((unit * (size // len(unit) + 1))[:size]) for size in (10_000, 40_000, 160_000)
        )
        # Sixteen times as long; a square would be 256 times as slow.
        assert large < 60 * max(small, 0.001) and middle < 15 * max(small, 0.001), (
            unit,
            small,
            middle,
            large,
        )


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*HOOK_REPEATED[:11], *hook_hints(), "=", ": ", '"', "'", " ", "\n", "a1b2c3d4", "\\"]),
       min_size=1, max_size=6), st.sampled_from(hook_hints()))  # fmt: skip
def test_no_mixture_of_what_the_shapes_look_for_takes_long_or_is_changed_twice(parts, hint):
    unit = "".join(parts).replace("{}", hint)
    once = ee.redact_text(unit)
    assert ee.redact_text(once) == once
    text = (unit * (40_000 // len(unit) + 1))[:40_000]
    assert redaction_seconds(text) < 2.0  # the square would take minutes


def test_recorded_payloads_hold_nothing_that_looks_like_a_secret():
    for name in recording_names():
        for given_payload in recorded(name):
            built = ee.build_event(hook_wrapped(given_payload), 5, "m")
            assert protected(json.loads(json.dumps(built)), ee.Privacy()) == built


@settings(deadline=None, max_examples=150)
@given(hook_anything, st.booleans(), st.booleans())
def test_protecting_twice_is_protecting_once(given_object, redact, metadata_only):
    privacy = ee.Privacy(redact, metadata_only, 1024)
    once = protected(ee.build_event(json.loads(json.dumps(given_object)), 5, "m"), privacy)
    assert protected(json.loads(json.dumps(once)), privacy) == once


@pytest.mark.parametrize("letter", ["a", "é", "€", "😀", "\ud83d"])
@pytest.mark.parametrize("over", [0, 1, 500, 100_000])
def test_a_long_field_is_cut_in_the_middle_with_its_size(letter, over):
    limit = 4096
    width = len(letter.encode("utf-8", "surrogatepass"))
    text = "head" + letter * ((limit - 8) // width + over) + "tail"
    size = len(text.encode("utf-8", "surrogatepass"))
    given_payload = payload(
        "PostToolUse", tool_response={"stdout": text, "lines": ["x", text]}, tool_input={"a": "b"}
    )
    data = protected(ee.build_event(given_payload, 5, "m"), ee.Privacy(field_limit_bytes=limit))["data"]
    cut = data["toolOutput"]["stdout"]
    if size <= limit:
        assert cut == text and "truncated" not in data
        return
    assert (
        cut.startswith("head" + letter)
        and cut.endswith(letter + "tail")
        and data["toolOutput"]["lines"][1] == cut
    )
    assert data["truncated"] == {"toolOutput.stdout": size, "toolOutput.lines[1]": size}
    assert len(cut.encode("utf-8", "surrogatepass")) <= limit + 100 and str(size) in cut
    assert data["toolInput"] == {"a": "b"}


@pytest.mark.parametrize("letter", ["a", "é", "€", "😀"])
@pytest.mark.parametrize("limit", [1024, 4096, 65536])
def test_what_was_cut_once_is_not_cut_again(letter, limit):
    for size in range(limit - 50, limit + 300, 7):
        event = ee.build_event(payload("Stop", x=letter * size), 5, "m")
        once = protected(event, ee.Privacy(field_limit_bytes=limit))
        assert protected(json.loads(json.dumps(once)), ee.Privacy(field_limit_bytes=limit)) == once
        assert len(once["data"]["x"].encode()) <= limit
        mixed = ee.build_event(
            payload("Stop", x=letter * size + "a" * size, y=["b" * size + letter * size]), 5, "m"
        )
        once = protected(mixed, ee.Privacy(field_limit_bytes=limit))
        assert protected(json.loads(json.dumps(once)), ee.Privacy(field_limit_bytes=limit)) == once


def test_a_secret_is_judged_once_more_when_what_was_beside_it_is_gone():
    text = "OqTOKEN=`1bc9ade0 on: x Authorization: Bearst" + "uvwOqTOKEN=`1bc9adef on: Bx"
    assert ee.redact_text(ee.redact_text(text)) == ee.redact_text(text)


def test_a_field_cut_before_keeps_its_first_size():
    event = ee.build_event(payload("Stop", last_assistant_message="x" * 50_000), 5, "m")
    once = protected(event, ee.Privacy(field_limit_bytes=8192))
    twice = protected(once, ee.Privacy(field_limit_bytes=1024))
    assert twice["data"]["truncated"] == {"assistantResponse": 50_000}


@pytest.mark.parametrize("number", range(len(hook_secrets())), ids=lambda number: hook_secrets()[number][0])
def test_a_secret_across_the_cut_leaves_no_half(number):
    _, secret, around = hook_secrets()[number]
    privacy = ee.Privacy(field_limit_bytes=16_384)
    text = around.format(secret)
    total = 60_000
    for edge in (8192, total - 8192):
        for back in range(0, len(text), max(1, len(text) // 12)):
            before = (
                "word " * ((edge - back) // 5) + "." * ((edge - back) % 5 - 1) + " " * ((edge - back) % 5 > 0)
            )
            long_text = before + text
            long_text += " word" * ((total - len(long_text)) // 5)
            event = protected(ee.build_event(payload("Stop", x=long_text), 5, "m"), privacy)
            assert "truncated" in event["data"] and not hook_traces(secret, event), (edge, back)


def test_secrets_before_the_cut_do_not_pull_half_a_secret_into_view():
    # What is replaced becomes shorter, so that the head reaches further into the text than its length says.
    limit, margin = 32_768, 4096
    secret = hook_token("AK" + "IA", 16, "ABCDEFGHIJ234567")
    blocks = "\n\n".join(hook_key_block(1600) for _ in range(5)) + "\n"
    for edge in (limit // 2, limit // 2 + margin):
        for back in (2, 8, 12, 18):
            start = blocks + "x " * ((edge - back - len(blocks)) // 2)
            start += " " * (edge - back - len(start))
            text = start + secret + " y" * 60_000
            mirrored = "y " * 60_000 + secret + start[::-1].replace(blocks[::-1], blocks)
            for tried in (text, mirrored):
                event = ee.build_event(payload("Stop", x=tried), 5, "m")
                event = protected(event, ee.Privacy(field_limit_bytes=limit))
                assert not hook_traces(secret, event), (edge, back, tried is text)


def test_at_the_level_of_metadata_no_content_leaves():
    privacy = ee.Privacy(metadata_only=True)
    word = "content-of-a-person"
    given_payload = payload(
        "PostToolUse", tool_name="Bash", tool_use_id="t1", duration_ms=5, tool_input={"command": word},
        tool_response=word,
        message=word, prompt=word, error=word, last_assistant_message=word, future=word,
        tool_calls=[word], title=word,
        session_title=word, model="claude-x", permission_mode="default",
    )  # fmt: skip
    event = protected(ee.build_event(hook_wrapped(given_payload), 5, "m"), privacy)
    assert word not in json.dumps(event)
    assert event["data"] == {
        "toolName": "Bash", "toolUseId": "t1", "durationMs": 5, "model": "claude-x",
        "permissionMode": "default"
    }  # fmt: skip
    assert event["sessionId"] == "s1" and event["hookType"] == "PostToolUse"


def test_at_the_level_of_metadata_the_reason_of_an_end_stays_and_prose_goes():
    for hook, kept in (("SessionEnd", "other"), ("PermissionDenied", None)):
        event = ee.build_event(payload(hook, reason="other"), NOW_MS, "box")
        assert ee.protect(event, ee.Privacy(True, True, 1 << 20))[0]["data"].get("reason") == kept


@pytest.mark.parametrize(
    "given_object",
    [
        {"eventType": "message", "text": "content-of-a-person"},
        {"eventType": "message", "data": {"text": "content-of-a-person"}},
        {"eventType": "message", "data": "content-of-a-person"},
        {"test": "content-of-a-person"},
        hook_wrapped({"hook_event_name": "Stop"}, beside={"text": "content-of-a-person"}),
    ],
)
def test_at_the_level_of_metadata_other_programs_content_stays_out_too(given_object):
    event = protected(ee.build_event(given_object, 5, "m"), ee.Privacy(metadata_only=True))
    assert "content-of-a-person" not in json.dumps(event)


def test_the_config_decides_what_is_stored(monitor):
    secret = hook_token("gh" + "p_", 36)
    given_event = hook_wrapped(payload("UserPromptSubmit", prompt=f"use {secret} " + "x" * 3000))
    seen = []
    for config in (
        {},
        {"privacy": {"redact": False}, "limits": {"fieldBytes": 1024}},
        {"privacy": {"level": "metadata"}},
    ):
        monitor.write_config(config)
        monitor.start()
        monitor.emit({**given_event, "id": f"e{len(seen)}"})
        seen.append(monitor.stored_events()[-1]["data"])
        monitor.stop()
    assert seen[0]["message"].startswith("use [redacted:github:") and "truncated" not in seen[0]
    assert seen[1]["message"].startswith(f"use {secret}") and seen[1]["truncated"] == {"message": 3045}
    assert "message" not in seen[2]


# ---------------------------------------------------------------------------
# Spool: what waits while no monitor takes it
# ---------------------------------------------------------------------------

SPOOL_WRITER = """
import random, sys
sys.path.insert(0, sys.argv[1])
import emit_event
emit_event.SEGMENT_LIMIT_BYTES = 40_000
rng = random.Random(sys.argv[3])
for number in range(int(sys.argv[4])):
    pad = "x" * rng.choice((0, 10, 1000, 9000))
    line = '{"id":"%s-%d","pad":"%s","end":1}\\n' % (sys.argv[3], number, pad)
    emit_event.append_to_spool(sys.argv[2], line.encode())
"""


def spool_line(event_id: str, session: str = "s1", **fields: Any) -> bytes:
    """Return one wrapped payload as the hook writes it."""
    return (
        json.dumps({"id": event_id, "timestamp": NOW_MS, "hook": payload("Stop", session, **fields)}).encode()
        + b"\n"
    )


def spool_read(path: str) -> list[bytes]:
    with open(path, "rb") as file:
        return [line for line in file.read().split(b"\n") if line]


def test_many_writers_and_a_drainer_at_once_lose_double_and_tear_nothing(tmp_path):
    directory, writers, each = str(tmp_path / "spool"), 8, 250
    processes = [
        subprocess.Popen([PYTHON, "-I", "-S", "-c", SPOOL_WRITER, ROOT, directory, str(writer), str(each)])
        for writer in range(writers)
    ]
    drained: list[bytes] = []
    segments = 0

    def drain() -> bool:
        nonlocal segments
        for path, _ in ee.spool_segments(directory):
            try:
                taken = ee.take_segment(path)
            except (FileNotFoundError, BlockingIOError):
                continue
            drained.extend(spool_read(taken))
            os.unlink(taken)
            segments += 1
        return all(process.poll() is not None for process in processes)

    try:
        eventually(drain, timeout_s=60)
        drain()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * writers
    found = collections.Counter(json.loads(line)["id"] for line in drained)
    assert found == {f"{writer}-{number}": 1 for writer in range(writers) for number in range(each)}
    assert segments > 10 and ee.spool_segments(directory) == []


def test_a_torn_piece_does_not_spoil_its_neighbours(monitor):
    directory = monitor.home + "/spool"
    path = ee.append_to_spool(directory, spool_line("one"))
    with open(path, "ab") as file:
        file.write(b"\n" + spool_line("torn")[:40])  # what a kill in the middle of a write leaves
    assert ee.append_to_spool(directory, spool_line("two")) == path
    monitor.start()
    eventually(lambda: {event["id"] for event in monitor.stored_events()} == {"one", "two"})
    eventually(lambda: os.listdir(directory) == [])
    assert monitor.get("/api/status")["events"]["quarantined"] == 1


def test_a_segment_ends_when_it_is_full_or_a_day_old(tmp_path, monkeypatch):
    directory = str(tmp_path / "spool")
    assert ee.SEGMENT_LIMIT_BYTES == 4 << 20 and ee.SEGMENT_LIMIT_MS == 86_400_000
    first = ee.append_to_spool(directory, b"x" * (4 << 20) + b"\n")
    now = time.time_ns()
    monkeypatch.setattr(ee.time, "time_ns", lambda: now + 5_000_000)
    second = ee.append_to_spool(directory, b"{}\n")
    assert second != first and ee.append_to_spool(directory, b"{}\n") == second
    monkeypatch.setattr(ee.time, "time_ns", lambda: now + 86_300_000 * 1_000_000)
    assert ee.append_to_spool(directory, b"{}\n") == second
    monkeypatch.setattr(ee.time, "time_ns", lambda: now + 86_400_010 * 1_000_000)
    third = ee.append_to_spool(directory, b"{}\n")
    assert third not in (first, second) and [path for path, _ in ee.spool_segments(directory)] == [
        first,
        second,
        third,
    ]
    monkeypatch.setattr(ee.time, "time_ns", lambda: now - 86_400_000 * 1_000_000)
    assert ee.append_to_spool(directory, b"{}\n") == third, "a clock that was set back is no reason to stop"


def test_segments_keep_their_order_also_within_one_millisecond(tmp_path, monkeypatch):
    directory = str(tmp_path / "spool")
    monkeypatch.setattr(ee.time, "time_ns", lambda: NOW_MS * 1_000_000)
    for number in range(20):
        ee.append_to_spool(directory, b"%d\n" % number)
        if number % 3 == 0:  # the drainer takes what there is in the middle of it
            for path, _ in ee.spool_segments(directory):
                ee.take_segment(path)
    segments = [path for path, _ in ee.spool_segments(directory)]
    assert [int(line) for path in segments for line in spool_read(path)] == list(range(20))
    assert 7 <= len(segments) <= 8


def test_a_segment_that_a_slow_writer_has_chosen_is_not_begun_anew_once_it_is_taken(tmp_path, monkeypatch):
    directory, choose = str(tmp_path / "spool"), ee.current_segment
    path = ee.append_to_spool(directory, b'{"n":1}\n')
    chosen = [choose(directory)]  # and then the writer is held up
    with open(path, "rb") as other:
        ee.fcntl.flock(other, ee.fcntl.LOCK_SH)
        with pytest.raises(BlockingIOError):
            ee.take_segment(path)  # it has another name now, and is not drained
    monkeypatch.setattr(
        ee, "current_segment", lambda directory: chosen.pop() if chosen else choose(directory)
    )
    assert ee.append_to_spool(directory, b'{"n":2}\n') != path and not chosen
    taken = [ee.take_segment(segment) for segment, _ in ee.spool_segments(directory)]
    assert [spool_read(segment) for segment in taken] == [[b'{"n":1}'], [b'{"n":2}']]


def test_what_an_older_hook_wrote_under_the_name_of_a_taken_segment_replaces_nothing(monitor):
    directory = monitor.home + "/spool"
    path = ee.append_to_spool(directory, spool_line("first"))
    os.rename(path, path[: -len("jsonl")] + "taken")
    with open(path, "wb") as file:
        file.write(spool_line("second"))
    with pytest.raises(BlockingIOError):
        ee.take_segment(path)
    monitor.start()
    eventually(lambda: not ee.spool_segments(directory), what="an empty spool")
    assert len(monitor.stored_events()) == 2


def test_directory_and_segments_are_for_their_user_alone(tmp_path):
    mask = os.umask(0)
    try:
        path = ee.append_to_spool(str(tmp_path / "a/spool"), b"{}\n")
    finally:
        os.umask(mask)
    assert hook_mode_of(tmp_path / "a/spool") == 0o700 and hook_mode_of(path) == 0o600


def test_a_link_in_the_place_of_a_segment_is_not_followed(hook_installed, monitor):
    directory = monitor.home + "/spool"
    os.mkdir(directory, 0o700)
    target = monitor.home + "/precious"
    with open(target, "wb") as file:
        file.write(b"mine")
    os.symlink(target, f"{directory}/{time.time_ns() // 1_000_000:013d}-1.jsonl")
    hook_call(hook_installed.command, payload("Stop"), monitor.environment)
    with pytest.raises(OSError):
        ee.append_to_spool(directory, b"{}\n")
    with open(target, "rb") as file:
        assert file.read() == b"mine"
    with pytest.raises(OSError):
        ee.take_segment(glob.glob(directory + "/*.jsonl")[0])


def test_the_spool_is_bounded_and_counts_what_it_drops(tmp_path, monkeypatch):
    assert ee.SPOOL_LIMIT_BYTES == 64 << 20 and ee.SPOOL_LIMIT_MS == 7 * 86_400_000
    directory = str(tmp_path / "spool")
    monkeypatch.setattr(ee, "SEGMENT_LIMIT_BYTES", 10_000)
    monkeypatch.setattr(ee, "SPOOL_LIMIT_BYTES", 50_000)
    now = itertools.count(time.time_ns(), 1_000_000)  # each segment begins in a millisecond of its own
    monkeypatch.setattr(ee.time, "time_ns", lambda: next(now))
    for number in range(400):
        ee.append_to_spool(directory, b'{"n":%d,"pad":"%s"}\n' % (number, b"x" * 480))
        assert sum(size for _, size in ee.spool_segments(directory)) <= 50_000 + 10_000 + 1000
    kept = [json.loads(line)["n"] for path, _ in ee.spool_segments(directory) for line in spool_read(path)]
    assert kept == list(range(400 - len(kept), 400)), "the oldest go first"
    events, size = ee.take_dropped(directory)
    assert events == 400 - len(kept) and size > events * 480
    assert ee.take_dropped(directory) == (0, 0)


def test_what_is_older_than_seven_days_goes(tmp_path, monkeypatch):
    directory = str(tmp_path / "spool")
    old = ee.append_to_spool(directory, b"{}\n")
    ee.append_to_spool(directory, b"{}\n")
    later = time.time_ns() + 6 * 86_400_000 * 1_000_000
    monkeypatch.setattr(ee.time, "time_ns", lambda: later)
    recent = ee.append_to_spool(directory, b"{}\n")
    monkeypatch.setattr(ee.time, "time_ns", lambda: later + 2 * 86_400_000 * 1_000_000)
    newest = ee.append_to_spool(directory, b"{}\n")
    assert [path for path, _ in ee.spool_segments(directory)] == [recent, newest] and not os.path.exists(old)
    assert ee.take_dropped(directory)[0] == 2


def test_what_the_spool_dropped_is_told_by_the_monitor(monitor, monkeypatch):
    directory = monitor.home + "/spool"
    for number in range(3):
        ee.append_to_spool(directory, spool_line(f"gone-{number}"))
    monkeypatch.setattr(ee, "SPOOL_LIMIT_BYTES", 0)
    ee.drop_old_segments(directory)
    assert ee.spool_segments(directory) == []
    monitor.start()
    eventually(lambda: monitor.get("/api/status")["spool"] == {"segments": 0, "bytes": 0, "dropped": 3})
    monkeypatch.undo()
    ee.append_to_spool(directory, spool_line("kept"))
    eventually(lambda: [event["id"] for event in monitor.stored_events()] == ["kept"])


def test_after_the_clock_was_set_back_the_spool_goes_on_where_it_was(tmp_path):
    name = f"{ee.now_ms() + 3_600_000:013d}-abcdef01.jsonl"
    (tmp_path / name).write_bytes(b"")
    for _ in range(3):
        assert os.path.basename(ee.append_to_spool(str(tmp_path), b"{}\n")) == name
    (tmp_path / name).write_bytes(bytes(ee.SEGMENT_LIMIT_BYTES))
    following = os.path.basename(ee.append_to_spool(str(tmp_path), b"{}\n"))
    assert following > name and len(list(tmp_path.iterdir())) == 2


def test_what_is_being_delivered_is_never_dropped_as_too_old(tmp_path):
    day_ms = 86_400_000
    for number, name in enumerate(("taken", "jsonl")):
        (tmp_path / f"{ee.now_ms() - 9 * day_ms + number:013d}-x.{name}").write_text("{}\n")
    ee.drop_old_segments(str(tmp_path))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".log", ".taken"]
    assert ee.take_dropped(str(tmp_path))[0] == 1


def test_a_fault_while_the_spool_is_drained_does_not_stop_it_for_good(tmp_path):
    calls: list[Any] = []
    loop = types.SimpleNamespace(call_every=lambda *_: None, call_soon=calls.append)
    (tmp_path / "spool").mkdir()
    ee.append_to_spool(str(tmp_path / "spool"), b'{"a":1}\n')
    taken: list[bytes] = []

    def take(lines: list[bytes]) -> bool:
        if not taken:
            taken.append(b"")
            raise OSError("a damaged file")
        taken.extend(lines)
        return True

    drain = cm.SpoolDrain(loop, str(tmp_path), take)
    for _ in range(2):
        drain.look()
        while calls:
            calls.pop(0)()
    assert taken == [b"", b'{"a":1}'] and not ee.spool_segments(str(tmp_path / "spool"))


def test_one_file_that_cannot_be_written_does_not_hold_up_other_sessions(monitor: RunningMonitor) -> None:
    in_the_way = f"{monitor.home}/events/{cm.day_of(cm.now_ms())}/bad.jsonl"
    os.makedirs(in_the_way)
    spool = monitor.home + "/spool"
    ee.make_private_directory(spool)
    for number, session in enumerate(("bad", "good", "bad", "better")):
        wrapped = {"hook": payload("UserPromptSubmit", session, prompt=str(number)), "id": f"e{number}"}
        ee.append_to_spool(spool, json.dumps({**wrapped, "timestamp": cm.now_ms()}).encode() + b"\n")
    monitor.start()
    eventually(lambda: {"good", "better"} <= monitor.sessions().keys() and not ee.spool_segments(spool))
    assert len(hook_spooled(monitor.home, "unsaved")) == 2
    assert levels(examine(monitor)[1], "unsaved") == ["warn"]
    monitor.stop()
    os.rmdir(in_the_way)
    monitor.start()
    eventually(lambda: "bad" in monitor.sessions() and monitor.sessions()["bad"]["counts"]["prompts"] == 2)
    assert not ee.spool_segments(monitor.home + "/unsaved")


def test_the_monitor_drains_the_spool_at_its_start_and_while_it_runs(hook_installed, monitor):
    for number in range(3):
        hook_call(hook_installed.command, payload("Stop", f"before-{number}"), monitor.environment)
    taken = [line["timestamp"] for line in hook_spooled(monitor.home)]
    monitor.start()
    eventually(lambda: len(monitor.stored_events()) == 3)
    assert [event["timestamp"] for event in monitor.stored_events()] == taken
    for number in range(900):  # more than one turn takes
        ee.append_to_spool(monitor.home + "/spool", spool_line(f"during-{number}", "during"))
    eventually(lambda: len(monitor.stored_events()) == 903)
    eventually(lambda: ee.spool_segments(monitor.home + "/spool") == [])
    during = [event["id"] for event in monitor.stored_events()[3:]]
    assert during == [f"during-{number}" for number in range(900)], "in the order of the spool"


def test_what_is_stored_already_is_not_stored_again_out_of_the_spool(monitor):
    directory = monitor.home + "/spool"

    def ids() -> list[str]:
        return [event["id"] for event in monitor.stored_events()]

    monitor.start()
    monitor.emit(json.loads(spool_line("a")), json.loads(spool_line("b")))
    for line in ("a", "b", "c", "c"):
        ee.append_to_spool(directory, spool_line(line))
    eventually(lambda: "c" in ids())
    assert ids() == ["a", "b", "c"] and monitor.get("/api/status")["events"]["duplicates"] == 3
    monitor.kill()
    for line in ("a", "c", "d"):
        ee.append_to_spool(directory, spool_line(line))
    monitor.start()
    eventually(lambda: "d" in ids())
    assert ids() == ["a", "b", "c", "d"] and monitor.get("/api/status")["events"]["duplicates"] == 2


def test_a_segment_that_was_being_drained_when_the_monitor_died_is_drained_again(monitor):
    directory = monitor.home + "/spool"
    path = ee.append_to_spool(directory, spool_line("a") + b"\n" + spool_line("b"))
    taken = ee.take_segment(path)
    assert taken.endswith(".taken") and ee.take_segment(taken) == taken
    monitor.start()
    eventually(lambda: [event["id"] for event in monitor.stored_events()] == ["a", "b"])
    eventually(lambda: not os.path.exists(taken))


def test_a_segment_with_a_writer_in_it_is_not_taken_yet(tmp_path):
    path = ee.append_to_spool(str(tmp_path), b'{"n":1}\n')
    with open(path, "ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_SH)
        with pytest.raises(BlockingIOError):
            ee.take_segment(path)
        other = ee.append_to_spool(str(tmp_path), b'{"n":2}\n')
        assert other.endswith(".jsonl")
        writer.write(b'{"n":3}\n')
    (taken,) = glob.glob(str(tmp_path / "*.taken"))
    assert spool_read(ee.take_segment(taken)) == [b'{"n":1}', b'{"n":3}'] and spool_read(other) == [
        b'{"n":2}'
    ]


def test_two_segments_of_one_millisecond_and_process_do_not_replace_each_other(tmp_path, monkeypatch):
    # A writer that lost its segment to the drainer begins another one, under the same name if it is quick.
    now = time.time_ns()
    monkeypatch.setattr(ee.time, "time_ns", lambda: now)
    lines = []
    ee.take_segment(ee.append_to_spool(str(tmp_path), b'{"n":1}\n'))
    ee.append_to_spool(str(tmp_path), b'{"n":2}\n')
    while segments := ee.spool_segments(str(tmp_path)):
        for path, _ in segments:
            with contextlib.suppress(BlockingIOError):
                taken = ee.take_segment(path)
                lines += spool_read(taken)
                os.unlink(taken)
                break
    assert sorted(lines) == [b'{"n":1}', b'{"n":2}']


# ---------------------------------------------------------------------------
# Journal: events on disk, one file per day and session
# ---------------------------------------------------------------------------

DAY_MS = 86_400_000
STORE_SESSIONS = ("s1", "s2", "../../etc/x", "odd id \u2028")


def store_event(number: int, session: str, size: int = 0) -> dict[str, Any]:
    return ee.build_event(
        {"eventType": "message", "id": f"id-{number}", "timestamp": NOW_MS, "sessionId": session,
        "data": {"x": "é" * (size // 6)}},
        NOW_MS, "m",
    )  # fmt: skip


def journal_opened(root: Any) -> cm.Journal:
    """Open a journal as a monitor does at its start."""
    journal = cm.Journal(str(root))
    journal.open()
    return journal


def journal_seqs(lines: Iterable[bytes]) -> list[int]:
    return [cm.line_seq(line) for line in lines]


def journal_plain_lines(root: str) -> list[bytes]:
    """Read every whole line of ours out of the files, the plain way; return them by seq."""
    lines = []
    for path in glob.glob(glob.escape(root) + "/*/*.jsonl"):
        with open(path, "rb") as file:
            lines += [line for line in file.read().split(b"\n")[:-1] if re.match(rb'{"seq":\d+,', line)]
    return sorted(lines, key=cm.line_seq)


class JournalModel:
    """A journal beside what it should hold: a list of lines, changed by the same operations.

    A line that lost nothing but its newline cannot be read until the next append to its file completes it.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.journal: Any = journal_opened(root) if root else cm.MemoryJournal()
        self.kept: list[tuple[int, str, bytes, str]] = []  # (seq, session, line, path)
        self.torn: dict[
            str, tuple[int, str, bytes, str] | None
        ] = {}  # path → its last line, if only \\n is missing
        self.time_ms, self.count, self.highest = NOW_MS, 0, 0

    def append(self, days: int, batch: list[tuple[str, int]]) -> None:
        self.time_ms += days * DAY_MS
        events = [store_event(self.count + at, *about) for at, about in enumerate(batch)]
        self.count += len(events)
        stored = self.journal.append(events, self.time_ms)
        assert len(stored) == len(events) and self.journal.error is None
        for entry, event in zip(stored, events):
            assert (
                json.loads(entry.line) == {"seq": entry.seq, "received": self.time_ms, **event} == entry.event
            )
            assert entry.seq > self.highest
            self.highest = entry.seq
            name = cm.session_file_name(event["sessionId"])
            path = f"{self.root}/{self.journal.newest_day}/{name}" if self.root else ""
            completed = self.torn.pop(path, None)
            self.kept += [completed] if completed else []
            self.kept.append((entry.seq, event["sessionId"], entry.line, path))

    def delete(self, session: str) -> None:
        self.journal.delete_session(session)
        self.kept = [entry for entry in self.kept if entry[1] != session]
        self.forget_torn()

    def path(self, number: int) -> str | None:
        paths = sorted(glob.glob(self.root + "/*/*.jsonl")) if self.root else []
        return paths[number % len(paths)] if paths else None

    def remove(self, number: int, with_day: bool) -> None:
        path = self.path(number)
        if path is None:
            return
        if with_day:
            shutil.rmtree(os.path.dirname(path))
        else:
            os.unlink(path)
        self.kept = [entry for entry in self.kept if os.path.exists(entry[3])]
        self.forget_torn()

    def forget_torn(self) -> None:
        self.torn = {path: line for path, line in self.torn.items() if os.path.exists(path)}

    def edit(self, number: int, added: bytes) -> None:
        path = self.path(number)
        if path is not None and path not in self.torn:
            with open(path, "ab") as file:
                file.write(added)

    def tear(self, number: int, size: int) -> None:
        """Cut bytes off the last line of a file, as a loss of power does."""
        path = self.path(number)
        mine = [entry for entry in self.kept if entry[3] == path]
        if path is None or path in self.torn or not mine:
            return
        last = max(mine)
        with open(path, "r+b") as file:
            content = file.read()
            if content.endswith(last[2] + b"\n"):
                file.truncate(len(content) - min(size, len(last[2])))
                self.kept.remove(last)
                self.torn[path] = last if size == 1 else None
        self.restart()

    def restart(self) -> None:
        if not self.root:
            return
        self.journal.close()
        self.journal = journal_opened(self.root)
        here = [entry[0] for entry in self.kept] + [entry[0] for entry in self.torn.values() if entry]
        assert self.journal.seq >= max(here, default=0)
        self.journal.seq = max(self.journal.seq, self.highest)  # as `last-seq` does

    def check(self, session: str | None = None, after: int | None = None, before: int | None = None) -> None:
        expected = [
            line for seq, owner, line, _ in sorted(self.kept)
            if session in (None, owner) and seq > (after or 0) and (before is None or seq < before)
        ]  # fmt: skip
        for journal in [self.journal] + ([cm.Journal(self.root)] if self.root else []):
            assert list(journal.lines(session, after or 0, before)) == expected
            assert list(journal.lines(session, after or 0, before, backwards=True)) == expected[::-1]


journal_numbers = st.none() | st.integers(0, 60)
journal_batches = st.lists(
    st.tuples(st.sampled_from(STORE_SESSIONS), st.sampled_from([0, 0, 0, 40, 700, 20_000, 200_000])),
    max_size=6,
)
journal_operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.sampled_from([0, 0, 0, 1, 3, -1, -2, -5]), journal_batches),
        st.tuples(st.just("append"), st.sampled_from([0, 1]), journal_batches),
        st.tuples(st.just("delete"), st.sampled_from(STORE_SESSIONS)),
        st.tuples(st.just("remove"), st.integers(0, 9), st.booleans()),
        st.tuples(st.just("tear"), st.integers(0, 9), st.sampled_from([1, 2, 30, 10_000_000])),
        st.tuples(st.just("edit"), st.integers(0, 9), st.sampled_from([b"\n", b"none\n", b'{"seq":x}\n\n'])),
        st.tuples(st.just("restart")),
        st.tuples(
            st.just("check"), st.none() | st.sampled_from(STORE_SESSIONS), journal_numbers, journal_numbers
        ),
    ),
    max_size=20,
)


@pytest.mark.parametrize("kind", ["files", "memory"])
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from([(7, 7), (64, 50), (4 << 10, 64 << 10)]), journal_operations)
def test_the_journal_reads_back_what_a_list_would(kind, sizes, operations):
    with tempfile.TemporaryDirectory(prefix="ctx-") as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cm, "_TAIL_BYTES", sizes[0])
        patch.setattr(cm, "_BLOCK_BYTES", sizes[1])
        model = JournalModel(root if kind == "files" else "")
        for name, *arguments in operations:
            getattr(model, name)(*arguments)
            model.check()
        for session in STORE_SESSIONS:
            model.check(session)
        for seq, owner, line, _ in model.kept[:: max(1, len(model.kept) // 4)]:
            event_id = cm.line_id(line)
            for about in (
                (),
                (owner,),
                (owner, seq),
                (None, seq),
                (owner, seq + 1),
            ):  # a wrong seq costs time only
                assert model.journal.find(event_id, *about) == line
        assert model.journal.find("nothing") is None and list(model.journal.lines("nobody")) == []
        model.journal.close()


@pytest.mark.parametrize("size", [0, 50, 1000, 70_000])
def test_any_place_in_a_file_is_found_by_bisection(tmp_path, size):
    journal = journal_opened(tmp_path)
    rng = random.Random(size)
    seqs = []
    for number in range(300 if size < 10_000 else 30):
        journal.seq += rng.randrange(4)  # other sessions' events take numbers too
        (entry,) = journal.append([store_event(number, "s", rng.randrange(size + 1))], NOW_MS)
        seqs.append(entry.seq)
    with open(tmp_path / cm.day_of(NOW_MS) / "s.jsonl", "r+b") as file:
        content = file.read()
        middle = content.index(b"\n", len(content) // 2) + 1
        file.seek(middle)
        file.write(b"not ours\n" * 20 + content[middle:])
    for seq in rng.sample(range(seqs[-1] + 3), min(120, seqs[-1])):
        assert journal_seqs(journal.lines(after=seq)) == [number for number in seqs if number > seq]
        assert journal_seqs(journal.lines(before=seq, backwards=True)) == [n for n in seqs if n < seq][::-1]
    journal.close()


@pytest.mark.parametrize("edge", [-2, -1, 0, 1, 2])
def test_newlines_at_the_edges_of_blocks_are_met_in_both_directions(tmp_path, edge):
    (tmp_path / "2026-01-20").mkdir()
    path = tmp_path / "2026-01-20" / "f.jsonl"
    lines = []
    for number in range(1, 7):
        head = b'{"seq":%d,"received":1,"id":"i%d","x":"' % (number, number)
        lines.append(head + b"x" * (cm._BLOCK_BYTES // 2 + edge - len(head) - 3) + b'"}')
    journal = cm.Journal(str(tmp_path))
    for content, expected in ((b"\n".join(lines) + b"\n", lines), (b"\n".join(lines), lines[:-1])):
        path.write_bytes(content)  # the last one of the second is still being written
        assert list(journal.lines()) == expected and list(journal.lines(backwards=True)) == expected[::-1]


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\n\n\n", b'{"seq":1,', b"no event\n", b"no event\n\n{}\n", b"x" * 10_000]
)
def test_files_without_events_have_no_lines(tmp_path, content):
    (tmp_path / "2026-01-20").mkdir()
    (tmp_path / "2026-01-20" / "f.jsonl").write_bytes(content)
    journal = journal_opened(tmp_path)
    assert journal.seq == (1 if b'"seq":1,' in content else 0), "the number of a torn line is not given again"
    assert (
        list(journal.lines())
        == list(journal.lines("f", backwards=True))
        == list(journal.lines(after=1))
        == []
    )
    (entry,) = journal.append([store_event(1, "g")], NOW_MS)
    assert list(journal.lines()) == [entry.line]
    journal.close()


@pytest.mark.parametrize("size", [0, 100, 5000, 100_000])
def test_the_ends_of_a_file_tell_its_first_and_last_number(tmp_path, size):
    path = str(tmp_path / "s.jsonl")
    content = b"not ours\n"
    for seq in (3, 14, 159):
        content += cm.numbered_line(seq, NOW_MS, ee.encode_json(store_event(seq, "s", size))) + b"\n"
        for tail, expected in ((b"", seq), (b'{"seq":4', seq), (b'{"seq":%d,"re' % (seq + 1), seq + 1)):
            with open(path, "wb") as file:
                file.write(content + tail)
            about = cm.JournalFile(path, os.stat(path))
            assert (about.first, about.last) == (3, expected)


@pytest.mark.parametrize("size", [20, 66_000, 200_000])
def test_a_torn_last_line_is_cut_off_and_a_whole_one_completed_and_both_counted(tmp_path, size):
    for torn, expected in ((slice(0, -30), [1, 3]), (slice(0, -1), [1, 2, 3]), (slice(0, 5), [1, 3])):
        root = tmp_path / str(uuid.uuid4())
        journal = journal_opened(root)
        entries = journal.append([store_event(1, "s", size), store_event(2, "s", size)], NOW_MS)
        journal.close()
        with open(root / cm.day_of(NOW_MS) / "s.jsonl", "wb") as file:
            file.write(entries[0].line + b"\n" + (entries[1].line + b"\n")[torn])
        journal = journal_opened(root)
        journal.seq = 2
        journal.append([store_event(3, "s")], NOW_MS)
        assert journal.repaired == 1 and journal_seqs(journal.lines("s")) == expected
        journal.append([store_event(4, "s")], NOW_MS)
        assert journal.repaired == 1
        journal.close()


def test_what_is_read_while_events_come_in_has_no_gap(tmp_path):
    # A consumer goes on after the last number it has seen: what it missed before that it would never see.
    journal = journal_opened(tmp_path)
    seen: list[int] = []
    stopping = threading.Event()

    def follow() -> None:
        while not stopping.is_set() or seen[-1:] != [journal.seq]:
            seen.extend(journal_seqs(journal.lines(after=seen[-1] if seen else 0)))

    reader = threading.Thread(target=follow)
    reader.start()
    rng = random.Random(3)
    for number in range(300):
        journal.append(
            [store_event(number, f"s{rng.randrange(40)}", 3000) for _ in range(rng.randrange(30))], NOW_MS
        )
    stopping.set()
    reader.join(60)
    assert seen == list(range(1, journal.seq + 1))
    journal.close()


@pytest.mark.parametrize("backwards", [False, True])
def test_files_that_are_removed_or_replaced_end_there_for_a_reader(tmp_path, monkeypatch, backwards):
    monkeypatch.setattr(cm, "_BLOCK_BYTES", 4096)
    journal = journal_opened(tmp_path)
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
    assert len(seen) < 90
    assert list(journal.lines("s0")) == []
    journal.close()


def test_more_files_are_merged_than_may_be_open(tmp_path):
    journal = journal_opened(tmp_path)
    for turn in range(3):
        journal.append([store_event(turn * 300 + number, f"s{number}") for number in range(300)], NOW_MS)
    journal.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert journal_seqs(journal.lines()) == list(range(1, 901))
        assert journal_seqs(journal.lines(backwards=True)) == list(range(900, 0, -1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_reader_opens_only_the_files_that_it_needs(tmp_path, monkeypatch):
    journal = journal_opened(tmp_path)
    for day in range(10):
        events = [store_event(day * 20 + number, f"s{number}") for number in range(20)]
        journal.append(events, NOW_MS + day * DAY_MS)
    opened: dict[str, set[int]] = {"_read": set(), "_offset_of": set()}  # how → days since the first

    def note(name: str) -> None:
        do = getattr(cm.JournalFile, name)

        def noted(file: Any, *about: Any) -> Any:
            opened[name].add(journal.days().index(os.path.basename(os.path.dirname(file.path))))
            return do(file, *about)

        monkeypatch.setattr(cm.JournalFile, name, noted)

    note("_read")
    note("_offset_of")
    for about, limit, seqs, read, bisected in (
        ({"after": 197}, 9, [198, 199, 200], {8, 9}, set()),
        ({"after": 180}, 1, [181], {8, 9}, set()),
        ({"backwards": True}, 2, [200, 199], {9}, set()),
        ({"before": 101, "backwards": True}, 2, [100, 99], {4, 5, 6, 7, 8, 9}, set()),
        ({"session": "s1", "after": 1, "before": 3}, 9, [2], set(range(10)), set()),
    ):
        for days in opened.values():
            days.clear()
        assert journal_seqs(itertools.islice(journal.lines(**about), limit)) == seqs
        assert (opened["_read"], opened["_offset_of"]) == (read, bisected), about
    journal.close()


def test_a_clock_set_back_over_midnight_goes_on_in_the_newest_day(tmp_path):
    journal = journal_opened(tmp_path)
    midnight = NOW_MS // DAY_MS * DAY_MS
    for at in (midnight + 1000, midnight - 5000, midnight + 2000, midnight - 23 * 3_600_000):
        journal.append([store_event(at, "s")], at)
    assert journal.days() == [cm.day_of(midnight)] and journal.in_order
    journal.append([store_event(9, "s")], midnight - 25 * 3_600_000)
    assert len(journal.days()) == 2 and not journal.in_order
    assert journal_seqs(journal.lines("s")) == [1, 2, 3, 4, 5]
    journal.close()


def test_days_count_as_in_order_only_while_that_is_known(tmp_path):
    mark = tmp_path / ".in-order"
    journal = journal_opened(tmp_path)
    assert journal.in_order and mark.exists()
    for age in (3, 2, 40, 1):
        journal.append([store_event(age, "s")], NOW_MS - age * DAY_MS)
    journal.close()
    assert not mark.exists()
    for _ in range(2):
        journal = journal_opened(tmp_path)
        assert not journal.in_order and not mark.exists() and journal.seq == 4
        assert journal_seqs(journal.lines()) == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / cm.day_of(NOW_MS - 40 * DAY_MS))
    assert journal_seqs(cm.Journal(str(tmp_path)).lines()) == [1, 2, 4]
    assert journal_opened(tmp_path).in_order and mark.exists() and cm.Journal(str(tmp_path)).in_order


def pack_as_before(path: str, block_bytes: int = 2000) -> None:
    """Put a packed file in the place of a plain one, as versions did that packed closed days."""

    def member(kind: bytes, content: bytes, size: int) -> bytes:
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = packer.compress(content) + packer.flush()
        head = b"\x1f\x8b\x08\x04" + struct.pack("<IBBH2sHQQ", 0, 0, 255, 20, kind, 16, 40 + len(body), size)
        return head + body + struct.pack("<II", zlib.crc32(content), len(content))

    with open(path, "rb") as file:
        content = file.read()
    blocks = [content[start : start + block_bytes] for start in range(0, len(content), block_bytes)]
    with open(path + ".gz", "wb") as file:
        file.write(member(b"CT", b"", len(content)))
        file.writelines(member(b"CB", block, len(block)) for block in blocks)
    os.unlink(path)


def test_packed_days_of_older_versions_are_unpacked_once(tmp_path):
    root = str(tmp_path)
    journal = journal_opened(root)
    for number in range(120):
        journal.append([store_event(number, f"s{number % 4}", 600)], NOW_MS + number // 50 * DAY_MS)
    journal.close()

    def contents() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in tmp_path.glob("*/*.jsonl")}

    before = contents()
    lines = list(journal.lines())
    for number, path in enumerate(sorted(before)[:-2]):
        if number == 0:  # by hand
            subprocess.run(["gzip", path], check=True)
            continue
        pack_as_before(path)
        packed = subprocess.run(["gzip", "-dc", path + ".gz"], capture_output=True, check=True).stdout
        assert packed == before[path], "packed as before"
        if number == 1:  # killed before the packed one went: the plain one is whole, and the one that counts
            with open(path + ".gz", "wb") as file:
                file.write(b"not looked at")
            with open(path, "wb", opener=ee.open_for_append) as file:
                file.write(before[path])
        if number == 2:  # killed while it was written
            with open(path + ".tmp", "wb") as file:
                file.write(before[path][:999] * 99)
    os.unlink(root + "/.in-order")
    journal = journal_opened(root)
    assert not glob.glob(root + "/*/*.gz") and not glob.glob(root + "/*/*.tmp")
    assert contents() == before
    assert {hook_mode_of(path) for path in before} == {0o600}
    assert list(journal.lines()) == lines and journal.seq == 120 and journal.in_order


PACK_DAMAGES = {
    "cut short": lambda content: content[:-5000],
    "a wrong byte in its middle": lambda content: (
        content[: len(content) // 3] + b"!" + content[len(content) // 3 + 1 :]
    ),
    "a wrong byte at its end": lambda content: content[:-3000] + b"!" + content[-2999:],
    "garbage behind its first part": lambda content: content[: len(content) // 2] + bytes(5000),
}


@pytest.mark.parametrize("damage", PACK_DAMAGES.values(), ids=PACK_DAMAGES.keys())
def test_a_damaged_packed_file_costs_only_what_is_damaged(tmp_path: Any, caplog: Any, damage: Any) -> None:
    journal = journal_opened(tmp_path)
    events = [store_event(number, "broken") for number in range(600)]
    for event in events:
        event["data"]["x"] = os.urandom(500).hex()
    lines = [entry.line for entry in journal.append(events, NOW_MS) if entry is not None]
    journal.close()
    path = str(tmp_path / cm.day_of(NOW_MS) / "broken.jsonl")
    pack_as_before(path, 20_000)
    with open(path + ".gz", "r+b") as file:
        content = damage(file.read())
        file.seek(0)
        file.write(content)
        file.truncate()
    journal = journal_opened(tmp_path)
    left = [line for line in journal.lines() if ee.is_json_object(line)]
    assert 250 < len(left) < 600 and [line for line in lines if line in set(left)] == left
    assert "broken.jsonl.gz is damaged" in caplog.text and not os.path.exists(path + ".gz")
    (entry,) = journal.append([store_event(601, "broken")], NOW_MS)
    assert entry is not None and list(journal.lines())[-1] == entry.line
    journal.close()


def test_what_cannot_be_unpacked_stays_and_stops_nothing(tmp_path, caplog):
    journal = journal_opened(tmp_path)
    (entry,) = journal.append([store_event(1, "s")], NOW_MS)
    journal.close()
    day = tmp_path / cm.day_of(NOW_MS)
    (day / "none.jsonl.gz").write_bytes(b"no gzip at all")
    (day / "odd.jsonl.gz").mkdir()
    assert list(journal_opened(tmp_path).lines()) == [entry.line]
    assert caplog.text.count("stays packed") == 2 and (day / "none.jsonl.gz").exists()


def test_what_is_no_readable_file_is_skipped_and_logged_once(tmp_path, caplog, monkeypatch):
    journal = journal_opened(tmp_path)
    (entry, _) = journal.append([store_event(1, "s"), store_event(2, "foreign")], NOW_MS)
    day = tmp_path / cm.day_of(NOW_MS)
    (day / "folder.jsonl").mkdir()
    os.mkfifo(day / "pipe.jsonl")
    (day / "dangling.jsonl").symlink_to("nowhere")
    (tmp_path / "2026-01-20").write_bytes(b"no directory")
    access = os.access
    monkeypatch.setattr(cm.os, "access", lambda path, mode: "foreign" not in path and access(path, mode))
    for _ in range(3):
        assert list(journal.lines()) == list(cm.Journal(str(tmp_path)).lines(backwards=True)) == [entry.line]
        assert list(journal.lines("folder")) == list(journal.lines("foreign")) == []
    assert sorted(re.findall(r"(\w+)\.jsonl is left out", caplog.text)) == ["folder", "foreign", "pipe"]
    journal.close()


def test_seen_ids_are_the_last_ones(monkeypatch):
    monkeypatch.setattr(cm, "REMEMBERED_IDS", 10)
    for least, size in ((0, 10), (10, 10), (25, 25)):
        seen = cm.SeenIds(least)
        for number in [*range(100), 99, 98, 90]:
            seen.add(str(number))
        assert [number for number in range(100) if str(number) in seen] == list(range(100 - size, 100))
    assert cm.SeenIds()._limit == 64_000


def test_a_file_that_is_nothing_but_a_torn_line_is_begun_anew(tmp_path):
    store = journal_opened(tmp_path)
    path = tmp_path / cm.day_of(NOW_MS) / "s.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"seq":1,"rec')
    (entry,) = store.append([store_event(1, "s")], NOW_MS)
    assert path.read_bytes() == entry.line + b"\n" and store.repaired == 1
    store.close()


STORE_ODD_IDS = [
    "../../x", "/etc/passwd", "..", ".", "a/b", "a\0b", "\n", "", " ", "x" * 65, "x" * 10_000, "é",
    "\ud83d", "a\\b",
    "con:1", "*", "s1\n", "~", ".hidden", "-rf",
]  # fmt: skip


@pytest.mark.parametrize("session", [*STORE_ODD_IDS, "s1", "A.b_c-d", "x" * 64])
def test_no_session_id_leads_out_of_its_folder(tmp_path, session):
    root = tmp_path / "events"
    store = journal_opened(root)
    (entry,) = store.append([{**store_event(1, "s"), "sessionId": session}], NOW_MS)
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.parent == root / cm.day_of(NOW_MS) and re.fullmatch(r"[A-Za-z0-9._-]{1,70}\.jsonl", path.name)
    assert list(store.lines(session)) == list(store.lines()) == [entry.line]
    plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", session) is not None and session[-1] != "\n"
    assert (path.name == session + ".jsonl") == plain
    store.close()


def test_odd_session_ids_have_different_files():
    assert len({cm.session_file_name(session) for session in STORE_ODD_IDS}) == len(STORE_ODD_IDS)


def test_files_and_directories_are_for_their_user_alone(tmp_path):
    mask = os.umask(0)
    try:
        store = journal_opened(tmp_path / "events")
        store.append([store_event(1, "s")], NOW_MS)
    finally:
        os.umask(mask)
    assert hook_mode_of(tmp_path / "events") == hook_mode_of(tmp_path / "events" / cm.day_of(NOW_MS)) == 0o700
    assert hook_mode_of(tmp_path / "events" / cm.day_of(NOW_MS) / "s.jsonl") == 0o600
    store.close()


def test_files_removed_by_hand_while_they_are_open_are_begun_anew(tmp_path):
    store = journal_opened(tmp_path)
    store.append([store_event(1, "s"), store_event(2, "other")], NOW_MS)
    day = tmp_path / cm.day_of(NOW_MS)
    os.unlink(day / "s.jsonl")
    store.append([store_event(3, "s")], NOW_MS)
    assert journal_seqs(store.lines()) == [2, 3]
    shutil.rmtree(day)
    store.append([store_event(4, "s")], NOW_MS)
    assert journal_seqs(store.lines()) == [4] and store.error is None
    store.close()


def test_more_sessions_than_files_may_be_open_are_no_problem(tmp_path):
    store = journal_opened(tmp_path)
    for turn in range(2):
        store.append([store_event(turn * 200 + number, f"s{number}") for number in range(200)], NOW_MS)
    assert len(store._descriptors) <= store.OPEN_FILES and store.size()[0] == 200
    assert all(len(list(store.lines(f"s{number}"))) == 2 for number in range(200))
    store.close()
    assert not store._descriptors


def test_a_deleted_session_is_gone_and_the_day_with_it_when_it_was_the_last(tmp_path):
    store = journal_opened(tmp_path)
    store.append([store_event(1, "s", 5000), store_event(2, "other")], NOW_MS)
    store.append([store_event(3, "s")], NOW_MS + DAY_MS)
    size = store.size()[1]
    freed = store.delete_session("s")
    assert freed == size - store.size()[1] > 5000 and store.days() == [cm.day_of(NOW_MS)]
    assert store.delete_session("s") == 0 and list(store.lines("s")) == []
    store.append([store_event(4, "s")], NOW_MS)
    assert journal_seqs(store.lines("s")) == [4]
    store.close()


@pytest.mark.parametrize("written", [0, 1, 100, -1, OSError(28, "No space left on device")])
def test_an_event_that_could_not_be_written_whole_leaves_no_trace(tmp_path, monkeypatch, written):
    store = journal_opened(tmp_path)
    store.append([store_event(1, "s"), store_event(2, "other")], NOW_MS)
    write = os.write

    def full_disk(fd: int, data: bytes) -> int:
        if b"second" not in data:
            return write(fd, data)
        if isinstance(written, OSError):
            raise written
        return write(fd, data[:written])

    event = {**store_event(3, "s"), "data": {"x": "second"}}
    with monkeypatch.context() as patch:
        patch.setattr(cm.os, "write", full_disk)
        failed, fine = store.append([event, store_event(4, "other")], NOW_MS)
        assert failed is None and fine is not None and "s.jsonl" in store.error
        assert store.append([event], NOW_MS) == [None]
    (entry,) = store.append([event], NOW_MS)
    assert store.error is None
    path = tmp_path / cm.day_of(NOW_MS) / "s.jsonl"
    assert [json.loads(line)["id"] for line in path.read_bytes().splitlines()] == ["id-1", "id-3"]
    assert journal_seqs(store.lines("s")) == [1, entry.seq] and store.repaired == 0
    store.close()


@pytest.fixture
def store_tiny_disk(tmp_path):
    place = tmp_path / "tiny"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "tmpfs", place], capture_output=True
    ).returncode:
        pytest.skip("no small file system can be mounted here")
    yield place
    unmount(place)


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_refuses_events_whole_and_takes_them_again_when_there_is_room(store_tiny_disk):
    store = journal_opened(store_tiny_disk / "events")
    kept = []
    for number in range(60):
        (entry,) = store.append([store_event(number, "s", 9000)], NOW_MS)
        kept += [entry.line] if entry else []
    assert 5 < len(kept) < 60 and "s.jsonl: " in store.error
    assert list(store.lines("s")) == kept
    os.unlink(store_tiny_disk / "events" / cm.day_of(NOW_MS) / "s.jsonl")
    (entry,) = store.append([store_event(99, "s", 9000)], NOW_MS)
    assert entry is not None and store.error is None and list(store.lines("s")) == [entry.line]
    store.close()


@pytest.mark.parametrize("kind", [cm.Journal, cm.MemoryJournal])
def test_an_empty_journal_answers_with_nothing(tmp_path, kind):
    journal = kind(str(tmp_path)) if kind is cm.Journal else kind()
    journal.open()
    assert journal.append([], NOW_MS) == [] == list(journal.lines()) == list(journal.lines("s", 1, 5, True))
    assert journal.find("x") is None and journal.find("x", "s", 0) is None and journal.has_room()
    assert journal.size() == (0, 0) and journal.delete_session("s") == 0
    journal.close()


def test_memory_forgets_the_oldest_events_beyond_its_limit(monkeypatch):
    monkeypatch.setattr(cm.MemoryJournal, "LIMIT_BYTES", 20_000)
    journal = cm.MemoryJournal()
    for number in range(50):
        journal.append([store_event(number, "s", 1000)], NOW_MS)
        assert sum(map(len, journal.lines())) <= 20_000
    seqs = journal_seqs(journal.lines())
    assert seqs == list(range(51 - len(seqs), 51)) and len(seqs) > 10


def test_numbers_go_on_after_a_restart_and_nothing_acknowledged_is_lost(monitor):
    monitor.start()
    monitor.emit(*(json.loads(spool_line(f"a{number}", f"s{number % 3}")) for number in range(7)))
    monitor.kill()
    monitor.start()
    assert monitor.get("/api/status")["seq"] == 7
    monitor.emit(json.loads(spool_line("b", "s1")))
    assert [(event["seq"], event["id"]) for event in monitor.stored_events()] == [
        *((number + 1, f"a{number}") for number in range(7)), (8, "b")
    ]  # fmt: skip
    listed = monitor.get("/api/sessions/s1/events")["events"]
    assert [event["id"] for event in listed] == ["a1", "a4", "b"]


def test_lines_edited_by_hand_do_not_keep_the_monitor_from_starting(monitor):
    monitor.start()
    monitor.emit(json.loads(spool_line("a", "s")))
    monitor.stop()
    (path,) = glob.glob(monitor.home + "/events/*/s.jsonl")
    with open(path, encoding="ascii") as file:
        good = json.loads(file.read())
    edited = [
        {key: value for key, value in good.items() if key != gone}
        for gone in ("id", "sessionId", "data", "received")
    ]
    edited += [{**good, "data": 5}, {**good, "timestamp": "x"}, {**good, "id": 7}]
    with open(path, "a", encoding="ascii") as file:
        for number, event in enumerate(edited):
            file.write(json.dumps({**event, "seq": number + 2}, separators=(",", ":")) + "\n")
        file.write('{"seq":99,"received":1,"id":"half"\nnot json\n\n')
    monitor.start()
    monitor.emit(json.loads(spool_line("b", "s2")))
    assert {"s", "s2"} <= set(monitor.sessions())
    assert monitor.get("/api/sessions/s2/events")["events"][0]["seq"] > 1


# ---------------------------------------------------------------------------
# Hook installation: what is merged, what is refused, what the shell makes of the command
# ---------------------------------------------------------------------------

INSTALL_COMMAND = cm.hook_command("/usr/bin/python3", "/home/me/.contextuate/hooks/emit_event.py")
INSTALL_HANDLER = {"type": "command", "command": INSTALL_COMMAND, "timeout": 10}
INSTALL_ALL_NAMES = cm.event_names((99, 0, 0))
INSTALL_ODD_NAMES = [
    "a b", 'a"b', "a$HOME b", "a`id`b", "a\\b", "a\\", "a'b", "$(exit 3)", "é\u2028", "a;b", "!x", "a\nb",
]  # fmt: skip
INSTALL_OTHERS_COMMANDS = [
    "node /opt/x/emit-event.js",
    "python3 /home/me/project/hooks/emit_event.py",
    "python3 -I /home/me/.contextuate/hooks/emit_event.py",
    "python3 -S -I /srv/hooks/emit_event.py",
    "python3 -I -S /srv/other/emit_event.py",
    "python3 -I -S /srv/hooks/emit_event.py.bak",
    "python3 -I -S /srv/hooks/my_emit_event.py || :",
    "python3 -I -S /srv/hooks/emit_event.py && make",
    "make; python3 -I -S /srv/hooks/emit_event.py || :",
    "echo 'python3 -I -S /srv/hooks/emit_event.py || :'",
    'echo "open',
    "",
]

install_handlers = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("command"), "command": st.sampled_from(INSTALL_OTHERS_COMMANDS)},
        optional={"timeout": st.integers(1, 60), "async": st.booleans(), "args": st.just(["x"])},
    ),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["http", "prompt", "agent"]), "url": st.just(INSTALL_COMMAND)}
    ),
    st.dictionaries(st.text(max_size=6), hook_json, max_size=3).filter(lambda value: "command" not in value),
)
install_groups = st.fixed_dictionaries(
    {"hooks": st.lists(install_handlers, max_size=3)},
    optional={"matcher": st.sampled_from(["", "*", "Bash", "Edit|Write"]), "future": hook_json},
)
install_hooks = st.dictionaries(
    st.sampled_from([*INSTALL_ALL_NAMES, "WorktreeCreate"]) | st.text(max_size=6),
    st.lists(install_groups, max_size=3),
    max_size=5,
)
install_settings = st.builds(
    lambda others, hooks, at: dict([*list(others.items())[:at], *hooks, *list(others.items())[at:]]),
    st.dictionaries(st.text(max_size=6).filter(lambda key: key != "hooks"), hook_json, max_size=4),
    st.lists(install_hooks.map(lambda hooks: ("hooks", hooks)), max_size=1),
    st.integers(0, 4),
)
install_versions = st.none() | st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(0, 400))
install_examples = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])


def install_handlers_in(value: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Name the event of every handler that equals `entry`."""
    return [
        name
        for name, groups in value.get("hooks", {}).items()
        for group in groups
        for handler in group["hooks"]
        if handler == entry
    ]


def install_without_emptied(value: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Apply the documented removal: an empty list that was given our entry goes when the entry goes."""
    if "hooks" not in value:
        return value
    kept = {name: groups for name, groups in value["hooks"].items() if groups or name not in names}
    result = {**value, "hooks": kept}
    if not kept and names:
        del result["hooks"]
    return result


@install_examples
@given(install_settings, install_versions)
def test_install_then_uninstall_gives_back_other_peoples_settings(given_settings, version):
    names = cm.event_names(version)
    before = json.dumps(given_settings)
    installed = cm.merge_hooks(given_settings, INSTALL_COMMAND, names)
    assert sorted(install_handlers_in(installed, INSTALL_HANDLER)) == sorted(names)
    expected = json.dumps(install_without_emptied(json.loads(before), names))
    assert json.dumps(cm.merge_hooks(installed, "", [])) == expected
    assert json.dumps(given_settings) == before, "the argument was changed"
    assert list(installed)[: len(given_settings)] == list(given_settings)
    hooks = given_settings.get("hooks", {})
    assert list(installed["hooks"])[: len(hooks)] == list(hooks)
    assert all(installed["hooks"][name][: len(groups)] == groups for name, groups in hooks.items())


@install_examples
@given(install_settings, install_versions, install_versions)
def test_installing_again_changes_nothing_and_the_last_installation_decides(given_settings, first, second):
    once = cm.merge_hooks(given_settings, INSTALL_COMMAND, cm.event_names(first))
    assert json.dumps(cm.merge_hooks(once, INSTALL_COMMAND, cm.event_names(first))) == json.dumps(once)
    other = cm.merge_hooks(once, INSTALL_COMMAND, cm.event_names(second))
    assert sorted(install_handlers_in(other, INSTALL_HANDLER)) == sorted(cm.event_names(second))


@install_examples
@given(install_settings)
def test_settings_without_a_hook_of_ours_are_not_changed_and_render_as_they_were(given_settings):
    assert json.dumps(cm.merge_hooks(given_settings, "", [])) == json.dumps(given_settings)
    text = cm.render_settings(given_settings, "")
    text.encode("utf-8")
    assert json.dumps(json.loads(text)) == json.dumps(given_settings)


def test_the_installed_entry_has_the_documented_form():
    merged = cm.merge_hooks({}, INSTALL_COMMAND, ["Stop"])
    assert merged == {"hooks": {"Stop": [{"hooks": [INSTALL_HANDLER]}]}}
    assert INSTALL_COMMAND == '"/usr/bin/python3" -I -S "/home/me/.contextuate/hooks/emit_event.py" || :'


@pytest.mark.parametrize("command", INSTALL_OTHERS_COMMANDS)
def test_other_peoples_commands_are_not_ours(command):
    others = {"hooks": {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}}
    assert cm.merge_hooks(others, "", []) == others


@pytest.mark.parametrize(
    "command",
    [
        INSTALL_COMMAND,
        "python3 -I -S /x/hooks/emit_event.py",
        "'/odd place/pypy' -I -S '/b c/hooks/emit_event.py' || :",
        *(cm.hook_command(f"/{odd}/python", f"/{odd}/hooks/emit_event.py") for odd in INSTALL_ODD_NAMES),
    ],
)
def test_our_commands_are_recognised_whatever_the_interpreter_and_home(command):
    ours = {"hooks": {"Stop": [{"hooks": [{"type": "command", "command": command}]}]}}
    assert cm.merge_hooks(ours, "", []) == {}
    ours["hooks"]["Stop"][0]["hooks"][0]["args"] = []  # then no shell runs it, and it is somebody else's
    assert cm.merge_hooks(ours, "", []) == ours


def test_an_outdated_entry_is_updated_in_place_and_doubles_and_old_names_go():
    old = {"type": "command", "command": "python3 -I -S /old/hooks/emit_event.py", "timeout": 5, "note": 1}
    other = {"type": "command", "command": "make"}
    before = {
        "hooks": {
            "FileChanged": [{"hooks": [old]}],
            "Stop": [
                {"hooks": [other, old]},
                {"matcher": "x", "hooks": [other]},
                {"hooks": [INSTALL_HANDLER]},
            ],
            "PreToolUse": [{"matcher": "Bash", "hooks": [old, other]}],
        }
    }
    assert cm.merge_hooks(before, INSTALL_COMMAND, ["Stop", "PreToolUse"]) == {
        "hooks": {
            "Stop": [{"hooks": [other, {**INSTALL_HANDLER, "note": 1}]}, {"matcher": "x", "hooks": [other]}],
            # A matcher would keep most events from us.
            "PreToolUse": [{"matcher": "Bash", "hooks": [other]}, {"hooks": [INSTALL_HANDLER]}],
        }
    }


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"hooks": []}, "hooks:"),
        ({"hooks": None}, "hooks:"),
        ({"hooks": {"Stop": {}}}, "hooks.Stop:"),
        ({"hooks": {"odd name": 1}}, 'hooks."odd name":'),
        ({"hooks": {"Stop": [{"hooks": []}, "x"]}}, "hooks.Stop[1]:"),
        ({"hooks": {"Stop": [{"matcher": "x"}]}}, "hooks.Stop[0].hooks:"),
        ({"hooks": {"Stop": [{"hooks": [{}, "x"]}]}}, "hooks.Stop[0].hooks[1]:"),
    ],
)
def test_hooks_of_another_shape_are_refused_with_their_place(value, place):
    for command, names in ((INSTALL_COMMAND, ["Stop"]), ("", [])):
        with pytest.raises(cm.InstallError, match="^" + re.escape(place)):
            cm.merge_hooks(value, command, names)


INSTALL_NINE = {
    "PreToolUse", "PostToolUse", "Notification", "UserPromptSubmit", "Stop", "SubagentStop", "PreCompact",
    "SessionStart", "SessionEnd",
}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "added"),
    [
        (None, ""),
        ((1, 0, 0), ""),
        ((2, 0, 42), ""),
        ((2, 0, 43), "SubagentStart"),
        ((2, 0, 77), "SubagentStart PermissionRequest"),
        ((2, 1, 69), "SubagentStart PermissionRequest InstructionsLoaded"),
        (
            (2, 1, 78),
            "SubagentStart PermissionRequest InstructionsLoaded PostCompact Elicitation StopFailure",
        ),
    ],
)
def test_an_old_client_gets_only_names_it_knows_for_sure(version, added):
    assert set(cm.event_names(version)) == INSTALL_NINE | set(added.split())


def test_a_new_client_gets_all_names_but_three_and_one_before_1_0_none():
    names = cm.event_names((2, 1, 101))
    assert len(names) == len(set(names)) == 30 and cm.event_names((2, 1, 330)) == names
    assert not {"MessageDisplay", "WorktreeCreate", "FileChanged"} & set(names)
    assert len(cm.event_names((2, 1, 100))) == 15 and cm.event_names((0, 9, 9)) == []


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo '2.1.330 (Claude Code)'", (2, 1, 330)),
        ("printf 'claude 1.0.128'", (1, 0, 128)),
        ("echo 2.1", None),
        ("echo 2.1.3; exit 1", None),
        ('[ "$1" = --version ] && [ "$KEPT" = yes ] && echo 3.0.0', (3, 0, 0)),
        ("exec /bin/sleep 60", None),
        (None, None),
    ],
)
def test_the_client_is_asked_for_its_version(tmp_path, monkeypatch, script, version):
    if script is not None:
        program = tmp_path / "claude"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        if "sleep" in script:
            monkeypatch.setattr(cm, "CLAUDE_VERSION_TIMEOUT_S", 0.2)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KEPT", "yes")
    assert cm.claude_version() == version


def test_claude_config_dir_replaces_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    assert cm.settings_path(None) == "/home/me/.claude/settings.json"
    monkeypatch.setenv("CLAUDE_CONFIG_DIR", "/etc/cc")
    assert cm.settings_path(None) == "/etc/cc/settings.json"
    monkeypatch.chdir(tmp_path)
    assert cm.settings_path(".") == f"{tmp_path}/.claude/settings.json"


def test_the_installed_interpreter_is_not_one_of_a_virtual_environment():
    interpreter = cm.base_interpreter()
    assert os.path.isabs(interpreter) and os.access(interpreter, os.X_OK)
    assert sys.prefix == sys.base_prefix or not interpreter.startswith(sys.prefix + os.sep)


@pytest.mark.parametrize("odd", INSTALL_ODD_NAMES)
def test_the_shell_runs_exactly_the_named_files(tmp_path, odd):
    directory = tmp_path / odd / "hooks"
    directory.mkdir(parents=True)
    script = directory / "emit_event.py"
    script.write_text("import sys; print(sys.flags.isolated, sys.flags.no_site, ascii(sys.argv))")
    interpreter = tmp_path / odd / "python"
    interpreter.symlink_to(PYTHON)
    done = run_hook(cm.hook_command(str(interpreter), str(script)), b"", dict(os.environ))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"1 1 {ascii([str(script)])}\n"
    for gone in (interpreter, script):
        gone.unlink()
        done = run_hook(cm.hook_command(str(interpreter), str(script)), b"", dict(os.environ))
        assert (done.returncode, done.stdout) == (0, b"")


@settings(deadline=None, max_examples=40)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_any_path_survives_the_shell(name):
    path = os.path.abspath("/" + name)
    command = cm.hook_command("/usr/bin/printf", path).replace(" -I -S ", " %s ", 1)
    assert run_hook(command, b"", dict(os.environ)).stdout == path.encode()


def test_a_path_that_json_cannot_carry_is_refused():
    with pytest.raises(cm.InstallError, match="UTF-8"):
        cm.hook_command("/usr/bin/python3", os.fsdecode(b"/\xff/hooks/emit_event.py"))


def install_text(path: object) -> str:
    with open(str(path), encoding="utf-8") as file:
        return file.read()


def test_the_hook_is_copied_privately_and_runs_from_bytecode(tmp_path):
    home = tmp_path / 'my "home" $x'
    script = cm.install_hook_files(str(home))
    assert script == cm.hook_script(str(home)) == f"{home}/hooks/emit_event.py"
    library = home / "hooks/lib"
    whole_text, hot_path = install_text(ee.__file__), install_text(library / "hot_path.py")
    assert install_text(script) == ee.LAUNCHER and install_text(library / "emit_event.py") == whole_text
    assert whole_text.startswith(hot_path + ee.HOT_PATH_END)
    compiled = {path.name.partition(".")[0] for path in (library / "__pycache__").iterdir()}
    assert compiled == {"emit_event", "hot_path"}
    for directory in (home, home / "hooks", library):
        assert hook_mode_of(directory) == 0o700
    for path in (script, library / "emit_event.py", library / "hot_path.py"):
        assert hook_mode_of(path) == 0o600
    (home / "monitor.config.json").write_text(json.dumps({"socketPath": f"{tmp_path}/none.sock"}))
    command = cm.hook_command(PYTHON, script)
    assert hook_call(command, payload("Stop"), dict(os.environ), CONTEXTUATE_HOME=str(home)) == ""
    shutil.rmtree(library / "__pycache__")  # it works without, too
    assert hook_call(command, payload("Stop"), dict(os.environ), CONTEXTUATE_HOME=str(home)) == ""
    assert [line["hook"] for line in hook_spooled(str(home))] == [payload("Stop")] * 2


def test_the_installed_copy_can_install_itself_again_and_a_part_of_it_cannot(tmp_path, monkeypatch):
    cm.install_hook_files(str(tmp_path))
    names = ("emit_event.py", "lib/emit_event.py", "lib/hot_path.py")
    before = [install_text(tmp_path / "hooks" / name) for name in names]
    monkeypatch.setattr(ee, "__file__", str(tmp_path / "hooks/lib/emit_event.py"))
    cm.install_hook_files(str(tmp_path))
    assert [install_text(tmp_path / "hooks" / name) for name in names] == before
    for part in ("lib/hot_path.py", "emit_event.py"):
        monkeypatch.setattr(ee, "__file__", str(tmp_path / "hooks" / part))
        with pytest.raises(cm.InstallError, match="not whole"):
            cm.install_hook_files(str(tmp_path))
    assert [install_text(tmp_path / "hooks" / name) for name in names] == before


def test_a_home_that_cannot_be_made_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(cm.InstallError) as caught:
        cm.install_hook_files(str(tmp_path / "file" / "home"))
    assert "\n" not in str(caught.value)


INSTALL_BROKEN = {
    "not json": (b'{\n  "a": 1,\n  b\n}', "line 3, column 3"),
    "a comment": (b'{\n// "a": 1\n}', "line 2, column 1"),
    "a list": (b"[]", "one JSON object"),
    "a key twice": (b'{"a": {"hooks": 1, "hooks": 2}}', '"hooks" stands twice'),
    "no utf-8": (b'{\n"a": "\xff"}', "line 2 is not UTF-8"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "huge": (b'{"a": 1e999}', "too large"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    "hooks": (b'{"hooks": {"Stop": [1]}}', r"hooks\.Stop\[0\]"),
}


@pytest.fixture
def install_project(tmp_path):
    (tmp_path / "project/.claude").mkdir(parents=True)
    return tmp_path / "project"


@pytest.mark.parametrize(("content", "words"), INSTALL_BROKEN.values(), ids=INSTALL_BROKEN.keys())
def test_settings_that_cannot_be_read_are_refused_and_left_alone(install_project, content, words):
    path = install_project / ".claude/settings.json"
    path.write_bytes(content)
    for plan in (
        lambda: cm.plan_install("/h", str(install_project), None),
        lambda: cm.plan_uninstall(str(install_project)),
    ):
        with pytest.raises(cm.InstallError, match=words) as caught:
            plan()
        assert str(path) in str(caught.value) and "nothing was changed" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == content and os.listdir(path.parent) == ["settings.json"]


def test_planning_writes_nothing(install_project):
    home = install_project / "home"
    plan = cm.plan_install(str(home), str(install_project), (2, 1, 330))
    assert not home.exists() and os.listdir(install_project / ".claude") == []
    assert (plan.old_text, plan.names) == ("", tuple(INSTALL_ALL_NAMES))
    entry = {**INSTALL_HANDLER, "command": cm.hook_command(PYTHON, f"{home}/hooks/emit_event.py")}
    assert install_handlers_in(json.loads(plan.new_text), entry) == INSTALL_ALL_NAMES


def test_a_missing_project_and_a_client_without_hooks_are_refused(tmp_path):
    with pytest.raises(cm.InstallError, match="no such directory"):
        cm.plan_install("/h", str(tmp_path / "gone"), None)
    with pytest.raises(cm.InstallError, match="no such directory"):
        cm.plan_uninstall(str(tmp_path / "gone"))
    with pytest.raises(cm.InstallError, match="update it"):
        cm.plan_install("/h", str(tmp_path), (0, 2, 1))


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("indent", ["\t", "  ", "    ", ""], ids=["tab", "two", "four", "none"])
@pytest.mark.parametrize(("mark", "final"), [("", True), ("\ufeff", False)], ids=["plain", "bom"])
def test_the_layout_of_the_settings_is_kept_and_comes_back(install_project, line_end, indent, mark, final):
    path = install_project / ".claude/settings.json"
    other = {"Stop": [{"hooks": [{"type": "command", "command": "make"}]}]}
    text = json.dumps({"model": "é\u2028", "hooks": other, "n": {}}, indent=indent, ensure_ascii=False)
    content = (mark + (text + "\n" * final).replace("\n", line_end)).encode()
    path.write_bytes(content)
    plan = cm.plan_install("/h", str(install_project), None)
    backup = cm.write_settings(plan.path, plan.new_text, plan.old_text)
    changed = path.read_bytes().decode()
    assert changed.startswith(mark + "{" + line_end + indent + '"model": "é\u2028"')
    assert changed.count("\n") == changed.count(line_end) and changed.endswith("\n") == final
    with open(backup, "rb") as file:
        assert file.read() == content
    again = cm.plan_install("/h", str(install_project), None)
    assert again.new_text == again.old_text == plan.new_text
    back = cm.plan_uninstall(str(install_project))
    assert set(back.names) == INSTALL_NINE
    cm.write_settings(back.path, back.new_text, back.old_text)
    assert path.read_bytes() == content


def test_half_pairs_stay_escaped_in_the_settings_and_whole_ones_do_not():
    text = cm.render_settings(json.loads('{"a": "\\ud83d", "b": "\\ud83d\\ude00"}'), "{}")
    assert text == '{\n  "a": "\\ud83d",\n  "b": "😀"\n}'


def test_settings_that_need_no_change_keep_their_layout(install_project):
    path = install_project / ".claude/settings.json"
    path.write_text('{ "a":[1,2] , "b": 1.50}')
    plan = cm.plan_uninstall(str(install_project))
    assert plan.new_text == plan.old_text and plan.names == ()
    assert cm.write_settings(plan.path, plan.new_text, plan.old_text) is None
    assert os.listdir(path.parent) == ["settings.json"]
    compact = json.dumps(json.loads(cm.plan_install("/h", str(install_project), None).new_text))
    path.write_text(compact)
    assert cm.plan_install("/h", str(install_project), None).new_text == compact


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf"])
def test_a_blank_file_holds_no_settings(install_project, content):
    path = install_project / ".claude/settings.json"
    path.write_bytes(content)
    plan = cm.plan_install("/h", str(install_project), None)
    cm.write_settings(plan.path, plan.new_text, plan.old_text)
    assert path.read_bytes().endswith(b"}\n")


def test_missing_settings_are_made_with_their_directories_and_no_backup(tmp_path):
    path = tmp_path / "new/.claude/settings.json"
    assert cm.write_settings(str(path), '{"é": 1}\n', "") is None
    assert install_text(path) == '{"é": 1}\n'
    assert os.listdir(path.parent) == ["settings.json"] and hook_mode_of(path) == 0o600


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o440])
def test_a_link_to_settings_is_followed_the_mode_kept_and_the_backup_private(tmp_path, mode):
    target, link = tmp_path / "dotfiles/claude.json", tmp_path / "claude/settings.json"
    target.parent.mkdir()
    link.parent.mkdir()
    target.write_text("{}")
    target.chmod(mode)
    link.symlink_to("../dotfiles/claude.json")
    backup = cm.write_settings(str(link), '{"a": 1}', "{}")
    assert link.is_symlink() and install_text(target) == '{"a": 1}' and hook_mode_of(target) == mode
    assert re.fullmatch(re.escape(str(link)) + r"\.contextuate-backup-\d{8}-\d{6}", backup)
    assert install_text(backup) == "{}" and hook_mode_of(backup) == 0o600
    assert os.listdir(target.parent) == ["claude.json"]


def test_a_link_to_nothing_yet_leads_to_new_settings(tmp_path):
    link = tmp_path / "settings.json"
    link.symlink_to("later/claude.json")
    assert cm.read_settings(str(link)) == ("", {})
    assert cm.write_settings(str(link), "{}", "") is None
    assert link.is_symlink() and install_text(tmp_path / "later/claude.json") == "{}"


def test_two_backups_in_one_second_are_both_kept(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text("{}")
    monkeypatch.setattr(cm.time, "strftime", lambda _: "20300102-030405")
    first = cm.write_settings(str(path), '{"a": 1}', "{}")
    second = cm.write_settings(str(path), '{"a": 2}', '{"a": 1}')
    assert first == f"{path}.contextuate-backup-20300102-030405" and second == first + "-2"
    assert [install_text(first), install_text(second)] == ["{}", '{"a": 1}']


@pytest.mark.parametrize("now", [b"{ }", None])
def test_settings_changed_meanwhile_are_left_alone(tmp_path, now):
    path = tmp_path / "settings.json"
    path.write_bytes(b"{}")
    if now is None:
        path.unlink()
    else:
        path.write_bytes(now)
    with pytest.raises(cm.InstallError, match="nothing was changed"):
        cm.write_settings(str(path), '{"a": 1}', "{}")
    assert (path.read_bytes() if path.exists() else None) == now
    assert os.listdir(tmp_path) == ([] if now is None else ["settings.json"])


def test_settings_that_cannot_be_replaced_leave_no_backup_behind(tmp_path, monkeypatch):
    path = tmp_path / "settings.json"
    path.write_text("{}")
    write = ee.write_atomically

    def full_disk(target: str, content: bytes, mode: int = 0o600) -> None:
        if target == str(path):
            raise OSError(28, "No space left on device")
        write(target, content, mode)

    monkeypatch.setattr(ee, "write_atomically", full_disk)
    with pytest.raises(cm.InstallError, match="No space left"):
        cm.write_settings(str(path), '{"a": 1}', "{}")
    assert os.listdir(tmp_path) == ["settings.json"] and install_text(path) == "{}"


@pytest.mark.parametrize("name", ["pipe", "loop", ".", "file/settings.json"])
def test_settings_that_are_no_regular_file_are_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(cm.InstallError):
        cm.read_settings(str(tmp_path / name))


def test_the_diff_shows_what_will_change(install_project):
    path = install_project / ".claude/settings.json"
    path.write_text('{\n  "a": "x\u2028y"\n}')
    plan = cm.plan_install("/h", str(install_project), None)
    diff = cm.diff_settings(plan.path, plan.old_text, plan.new_text)
    assert diff.startswith(f"--- {path}\n+++ {path}\n@@ -1,3 +1,")
    assert '-  "a": "x\u2028y"\n' in diff and '+  "a": "x\u2028y",\n' in diff
    assert "\n\\ No newline at end of file\n" in diff
    assert cm.diff_settings(plan.path, plan.old_text, plan.old_text) == ""
    assert cm.diff_settings("/new", "", "{}\n") == "--- /dev/null\n+++ /new\n@@ -0,0 +1 @@\n+{}\n"


def test_where_claude_does_not_tell_its_version_what_was_registered_stays(install_project):
    path = install_project / ".claude/settings.json"
    known = cm.plan_install("/h", str(install_project), (2, 1, 200))
    path.write_text(known.new_text)
    again = cm.plan_install("/h", str(install_project), None)
    assert again.new_text == known.new_text and sorted(again.names) == sorted(known.names)
    path.write_text("{}")
    assert len(cm.plan_install("/h", str(install_project), None).names) < len(known.names)


def test_claude_is_found_where_its_installers_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/bin")
    assert cm.claude_version() is None
    program = tmp_path / ".claude/local/claude"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho '2.1.200 (Claude Code)'\n")
    program.chmod(0o700)
    assert cm.claude_version() == (2, 1, 200)


def test_the_commands_install_and_uninstall_do_what_their_dry_runs_say(monitor):
    path = monitor.claude_home + "/settings.json"
    dry = monitor.command("install", "--dry-run")
    assert "+" in dry.stdout and not os.path.exists(path) and not os.path.exists(monitor.home + "/hooks")
    monitor.command("install")
    installed = install_text(path)
    assert set(json.loads(installed)["hooks"]) >= INSTALL_NINE
    assert "nothing to change" in monitor.command("install", "--dry-run").stdout
    monitor.command("install")
    assert install_text(path) == installed
    assert "-" in monitor.command("uninstall", "--dry-run").stdout and install_text(path) == installed
    monitor.command("uninstall")
    assert json.loads(install_text(path)) == {}
    assert "no hook of ours" in monitor.command("uninstall").stdout


def test_installing_into_broken_settings_is_refused_in_one_line(monitor):
    os.mkdir(monitor.claude_home)
    with open(monitor.claude_home + "/settings.json", "w", encoding="ascii") as file:
        file.write("{,}")
    done = monitor.command("install", check=False)
    assert done.returncode == 1 and monitor.claude_home + "/settings.json" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    assert not os.path.exists(monitor.home + "/hooks")
    assert install_text(monitor.claude_home + "/settings.json") == "{,}"


# ---------------------------------------------------------------------------
# WebSocket framing, the opening handshake, the protocol of both ports
#
# Frames come from another author's serializer where they are valid, and are made by hand where they are not.
# What a running monitor says is read from raw sockets or by that author's client.
# ---------------------------------------------------------------------------

PROTOCOL_MASK = b"\x37\xfa\x21\x3d"
PROTOCOL_KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455 section 1.3, as its answer below
PROTOCOL_ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
PROTOCOL_ROW_FIELDS = {
    "seq", "received", "id", "timestamp", "sessionId", "machineId", "hookType", "eventType", "agentId", "agentType",
    "demo", "partial", "data",
}  # fmt: skip
PROTOCOL_ROW_DATA = {
    "toolName", "toolUseId", "durationMs", "target", "text", "notificationType", "source", "reason", "isInterrupt",
}  # fmt: skip


def protocol_frame(opcode: int, payload: bytes = b"", fin: bool = True, mask: bool = True) -> bytes:
    """Serialize one valid frame with the other author's code."""
    frame = websockets.frames.Frame(websockets.frames.Opcode(opcode), payload, fin)
    return frame.serialize(mask=mask)


def protocol_raw_frame(
    first: int, payload: bytes = b"", length_bytes: int = 0, mask: bytes | None = PROTOCOL_MASK
) -> bytes:
    """Build a frame by hand, valid or not: any first byte, the length in 0, 2 or 8 extra bytes."""
    flag = 0x80 if mask else 0
    if length_bytes == 0:
        head = bytes([first, flag | len(payload)])
    else:
        code, form = {2: (126, "!H"), 8: (127, "!Q")}[length_bytes]
        head = bytes([first, flag | code]) + struct.pack(form, len(payload))
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))


def protocol_text(text: str) -> cm.Message:
    """Return a whole text message."""
    return cm.Message(cm.Opcode.TEXT, text)


def protocol_binary(data: bytes) -> cm.Message:
    """Return a whole binary message."""
    return cm.Message(cm.Opcode.BINARY, data)


def protocol_feed(parser: cm.FrameParser, data: bytes, sizes: list[int]) -> list[Any]:
    """Feed bytes in chunks of these sizes, in turn; return everything that came out."""
    received: list[Any] = []
    turn = itertools.cycle(sizes)
    while data:
        size = next(turn)
        received += parser.feed(data[:size])
        data = data[size:]
    return received


def protocol_feed_anew(data: bytes, sizes: list[int]) -> list[Any]:
    """Feed bytes in chunks as the monitor does: whenever a parser is at rest it is thrown away."""
    received: list[Any] = []
    parser, turn = cm.FrameParser(), itertools.cycle(sizes)
    while data:
        size = next(turn)
        received += parser.feed(data[:size])
        data = data[size:]
        parser = cm.FrameParser() if parser.is_at_rest else parser
    return received


def protocol_pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at these places, taken modulo their length."""
    places = sorted(cut % (len(data) + 1) for cut in cuts)
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)])]


protocol_controls = st.lists(st.tuples(st.sampled_from([9, 10]), st.binary(max_size=125)), max_size=2)
protocol_conversations = st.lists(
    st.tuples(
        st.one_of(
            st.text(max_size=200), st.binary(max_size=400), st.builds(bytes, st.integers(65530, 65540))
        ),
        st.lists(st.integers(0, 1 << 20), max_size=4),
        st.lists(protocol_controls, min_size=6, max_size=6),
    ),
    max_size=5,
)


@pytest.fixture(scope="module")
def spoken() -> Iterator[RunningMonitor]:
    """A running monitor for this section; every test uses sessions of its own."""
    made = RunningMonitor(new_home()).start()
    yield made
    clean_up(made)


@given(protocol_conversations, st.lists(st.integers(1, 70000), min_size=1, max_size=8))
@settings(deadline=None, max_examples=150)
def test_messages_come_out_the_same_whatever_the_fragments_and_chunks(
    conversation: list[Any], sizes: list[int]
) -> None:
    wire, expected = b"", []
    for message, cuts, controls in conversation:
        data = message.encode() if isinstance(message, str) else message
        pieces = protocol_pieces(data, cuts)
        for index, piece in enumerate(pieces):
            opcode = 0 if index else 1 if isinstance(message, str) else 2
            wire += protocol_frame(opcode, piece, fin=index == len(pieces) - 1)
            if index == len(pieces) - 1:
                whole = protocol_text if isinstance(message, str) else protocol_binary
                expected.append(whole(message))
            for control, content in controls[index]:
                wire += protocol_frame(control, content)
                expected.append(cm.Message(cm.Opcode(control), content))
    assert protocol_feed(cm.FrameParser(), wire, sizes) == expected
    assert protocol_feed_anew(wire, sizes) == expected


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4), st.lists(st.integers(0, 100), max_size=5))
@settings(deadline=None, max_examples=80)
def test_every_message_comes_out_with_the_byte_that_completes_it(texts: list[str], cuts: list[int]) -> None:
    parser = cm.FrameParser()
    for text in texts:
        pieces = protocol_pieces(text.encode(), cuts)
        wire = b"".join(
            protocol_frame(0 if index else 1, piece, fin=index == len(pieces) - 1)
            for index, piece in enumerate(pieces)
        )
        assert protocol_feed(parser, wire[:-1], [1]) == []
        assert parser.feed(wire[-1:]) == [protocol_text(text)]


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_our_frames_are_those_of_the_other_author(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert cm.encode_frame(cm.Opcode.BINARY, data) == protocol_frame(2, data, mask=False)
    form = 0 if size < 126 else 2 if size < 65536 else 8
    assert cm.FrameParser().feed(protocol_raw_frame(0x82, data, form)) == [protocol_binary(data)]


@given(st.binary(max_size=70), st.binary(min_size=4, max_size=4), st.integers(0, 50))
def test_masking_is_the_xor_of_the_rfc_at_any_offset(data: bytes, mask: bytes, offset: int) -> None:
    expected = bytes(byte ^ mask[(offset + index) % 4] for index, byte in enumerate(data))
    assert cm.apply_mask(data, mask, offset) == expected


PROTOCOL_VIOLATIONS = {
    "reserved bit 1": (protocol_raw_frame(0xC1, b"x"), 1002),
    "reserved bit 2": (protocol_raw_frame(0xA1, b"x"), 1002),
    "reserved bit 3": (protocol_raw_frame(0x91, b"x"), 1002),
    "reserved bit on a control frame": (protocol_raw_frame(0xC9, b"x"), 1002),
    **{f"opcode {code}": (protocol_raw_frame(0x80 | code, b"x"), 1002) for code in (3, 4, 5, 6, 7)},
    **{f"opcode {code}": (protocol_raw_frame(0x80 | code, b"x"), 1002) for code in (11, 12, 13, 14, 15)},
    "unmasked": (protocol_raw_frame(0x81, b"x", mask=None), 1002),
    "unmasked and empty": (protocol_raw_frame(0x81, b"", mask=None), 1002),
    "unmasked ping": (protocol_raw_frame(0x89, b"x", mask=None), 1002),
    "fragmented ping": (protocol_raw_frame(0x09, b"x"), 1002),
    "fragmented close": (protocol_raw_frame(0x08, b""), 1002),
    "long ping": (protocol_raw_frame(0x89, b"x" * 126, 2), 1002),
    "long close": (protocol_raw_frame(0x88, b"\x03\xe8" + b"x" * 124, 2), 1002),
    "ping with a needlessly long length": (protocol_raw_frame(0x89, b"x", 2), 1002),
    "continuation of nothing": (protocol_raw_frame(0x80, b"x"), 1002),
    "unfinished continuation of nothing": (protocol_raw_frame(0x00, b"x"), 1002),
    "text within a text": (protocol_raw_frame(0x01, b"a") + protocol_raw_frame(0x81, b"b"), 1002),
    "binary within a text": (protocol_raw_frame(0x01, b"a") + protocol_raw_frame(0x82, b"b"), 1002),
    "text within a binary": (protocol_raw_frame(0x02, b"a") + protocol_raw_frame(0x01, b"b"), 1002),
    "text within a text that is empty so far": (protocol_raw_frame(0x01) + protocol_raw_frame(0x81), 1002),
    "125 bytes in the 16-bit form": (protocol_raw_frame(0x81, b"x" * 125, 2), 1002),
    "65535 bytes in the 64-bit form": (protocol_raw_frame(0x82, b"x" * 65535, 8), 1002),
    "length with the top bit": (b"\x82\xff" + b"\xff" * 8, 1002),
    "too big": (b"\x82\xff" + struct.pack("!Q", cm.MESSAGE_LIMIT_BYTES + 1), 1009),
    "much too big": (b"\x81\xff" + struct.pack("!Q", (1 << 63) - 1), 1009),
    "bad UTF-8": (protocol_raw_frame(0x81, b"\xff"), 1007),
    "unfinished UTF-8": (protocol_raw_frame(0x81, "é".encode()[:1]), 1007),
    "a surrogate in UTF-8": (protocol_raw_frame(0x81, b"\xed\xa0\x80"), 1007),
    "unfinished UTF-8 over fragments": (
        protocol_raw_frame(0x01, b"\xf0\x9f") + protocol_raw_frame(0x80, b"\x98"), 1007,
    ),
    "close payload of one byte": (protocol_raw_frame(0x88, b"\x03"), 1002),
    "close reason that is not UTF-8": (protocol_raw_frame(0x88, b"\x03\xe8\xff"), 1007),
    "close reason that is not finished": (protocol_raw_frame(0x88, b"\x03\xe8\xc3"), 1007),
    **{
        f"close code {code}": (protocol_raw_frame(0x88, struct.pack("!H", code)), 1002)
        for code in (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PROTOCOL_VIOLATIONS)
@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_every_violation_fails_with_its_code_and_nothing_follows(name: str, size: int) -> None:
    wire, code = PROTOCOL_VIOLATIONS[name]
    good = protocol_frame(1, b"before")
    received = protocol_feed(cm.FrameParser(), good + wire + protocol_frame(1, b"after") * 3, [size])
    assert received[0] == protocol_text("before")
    assert (received[-1].code, received[-1].by_peer) == (code, False)
    assert not any(isinstance(item, cm.Close) or item.opcode < cm.Opcode.CLOSE for item in received[1:-1])


@pytest.mark.parametrize(
    ("code", "reason"),
    [(1000, ""), (1001, "going"), (1003, ""), (1007, ""), (1011, "ä" * 61), (1012, ""), (1014, ""), (3000, ""), (4999, "x" * 123)],
)  # fmt: skip
def test_good_close_frames_are_told_and_nothing_follows(code: int, reason: str) -> None:
    wire = protocol_frame(8, struct.pack("!H", code) + reason.encode())
    received = protocol_feed(cm.FrameParser(), wire + protocol_frame(1, b"late") + b"\xff" * 50, [1])
    assert received == [cm.Close(code, reason)]


def test_a_close_frame_may_stand_between_fragments_and_may_be_empty() -> None:
    wire = protocol_frame(1, b"half", fin=False) + protocol_frame(8) + protocol_frame(0, b"other half")
    assert cm.FrameParser().feed(wire) == [cm.Close(None, "")]


@given(st.integers(1000, 4999), st.text(max_size=200))
def test_our_close_frames_fit_and_can_be_read_back(code: int, reason: str) -> None:
    frame = cm.encode_close(code, reason)
    assert len(frame) <= 127
    assert frame[:2] == bytes((0x88, len(frame) - 2)) and struct.unpack("!H", frame[2:4]) == (code,)
    told = frame[4:].decode()
    assert reason.startswith(told)
    assert len(told.encode()) > 119 or told == reason


@pytest.mark.parametrize(
    ("good", "bad"),
    [(b"\xce\xba\xe1\xbd\xb9", b"\xff"), (b"", b"\xc0"), (b"", b"\x80"), (b"a\xed", b"\xa0"), (b"\xe0", b"\x80"),
     (b"\xf4", b"\x90"), (b"\xf0", b"\x8f"), (b"", b"\xf5"), (b"\xf0\x9f\x98", b"a"), (b"\xc3", b"(")],
)  # fmt: skip
@pytest.mark.parametrize("fragmented", [False, True])
def test_bad_utf8_fails_with_the_very_byte(good: bytes, bad: bytes, fragmented: bool) -> None:
    parser = cm.FrameParser()
    if fragmented:
        assert parser.feed(protocol_frame(1, b"ok" + good, fin=False)) == []
        frame = protocol_raw_frame(0x00, bad + b"x" * 90)
        upto = 2 + 4
    else:
        frame = protocol_raw_frame(0x81, good + bad + b"x" * 90)
        upto = 2 + 4 + len(good)
    assert protocol_feed(parser, frame[:upto], [1]) == []
    (failure,) = parser.feed(frame[upto : upto + 1])
    assert (failure.code, failure.by_peer) == (1007, False)
    assert parser.feed(frame[upto + 1 :]) == []


def test_a_character_may_be_cut_by_fragments_anywhere() -> None:
    text = "aé€😀\U0010ffff"
    wire = b"".join(
        protocol_frame(0 if index else 1, bytes([byte]), fin=False)
        for index, byte in enumerate(text.encode())
    )
    assert cm.FrameParser().feed(wire + protocol_frame(0, b"")) == [protocol_text(text)]


def test_a_message_of_the_limit_passes_and_one_byte_more_fails_before_it_comes() -> None:
    assert cm.FrameParser(limit_bytes=1000).feed(protocol_frame(2, b"x" * 1000)) == [
        protocol_binary(b"x" * 1000)
    ]
    (failure,) = cm.FrameParser(limit_bytes=1000).feed(b"\x82\xfe" + struct.pack("!H", 1001))
    assert failure.code == 1009


def test_the_limit_counts_all_fragments_of_one_message_and_no_control_frames() -> None:
    parser = cm.FrameParser(limit_bytes=300)
    third = protocol_frame(0, b"x" * 100, fin=False)
    for _ in range(3):  # the count starts anew with each message
        assert parser.feed(protocol_frame(1, b"x" * 100, fin=False) + third) == []
        assert parser.feed(protocol_frame(9, b"p" * 125)) == [cm.Message(cm.Opcode.PING, b"p" * 125)]
        assert parser.feed(protocol_frame(0, b"x" * 100)) == [protocol_text("x" * 300)]
    assert parser.feed(protocol_frame(2, b"x" * 100, fin=False) + third + third) == []
    (failure,) = parser.feed(protocol_raw_frame(0x80, b"y"))
    assert failure.code == 1009


@given(st.binary(max_size=300), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(deadline=None, max_examples=400)
def test_arbitrary_bytes_never_raise_and_chunks_change_nothing(data: bytes, sizes: list[int]) -> None:
    whole = cm.FrameParser().feed(data)
    assert protocol_feed(cm.FrameParser(), data, sizes) == whole
    ends = [index for index, item in enumerate(whole) if isinstance(item, cm.Close)]
    assert ends in ([], [len(whole) - 1])


@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.binary(max_size=130), st.sampled_from([0, 0, 0, 2, 8])), max_size=8
    ),
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=300)
def test_frames_of_any_kind_never_raise_and_chunks_change_nothing(
    frames: list[tuple[int, bytes, int]], sizes: list[int]
) -> None:
    data = b"".join(
        protocol_raw_frame(first, content if form else content[:125], form) for first, content, form in frames
    )
    whole = cm.FrameParser().feed(data)
    assert protocol_feed(cm.FrameParser(), data, sizes) == whole
    assert protocol_feed_anew(data, sizes) == whole
    for item in whole[:-1]:
        assert not isinstance(item, cm.Close)


# -- the opening handshake -----------------------------------------------------


def protocol_head(
    *changes: tuple[str, str | None], line: str = "GET / HTTP/1.1", more: tuple[str, ...] = ()
) -> bytes:
    """Return a request head for a WebSocket without its blank line; changes replace headers, None removes one."""
    headers: dict[str, str | None] = {
        "Host": "localhost", "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": PROTOCOL_KEY,
        "Sec-WebSocket-Version": "13",
    }  # fmt: skip
    headers.update(changes)
    lines = [line, *(f"{name}: {value}" for name, value in headers.items() if value is not None), *more]
    return "\r\n".join(lines).encode("latin-1")


def protocol_answer(head: bytes) -> tuple[int, dict[str, str]]:
    """Return the status and the headers that a head gets."""
    try:
        response = cm.handshake_response(cm.parse_request_head(head)).decode("ascii")
    except cm.RequestError as error:
        return error.status, {name.lower(): value for name, value in error.headers}
    assert response.endswith("\r\n\r\n")
    first, *lines = response[:-4].split("\r\n")
    assert first.startswith("HTTP/1.1 ")
    return int(first.split()[1]), {
        name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
    }


def test_the_sample_of_the_rfc_gets_its_answer() -> None:
    status, headers = protocol_answer(protocol_head())
    assert status == 101
    assert headers == {
        "upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": PROTOCOL_ACCEPT,
    }  # fmt: skip


@pytest.mark.parametrize(
    "head",
    [
        protocol_head(("Upgrade", "WebSocket"), ("Connection", "UPGRADE")),
        protocol_head(("Connection", "keep-alive, Upgrade")),
        protocol_head(("Connection", "keep-alive"), more=("connection:upgrade",)),
        protocol_head(("Upgrade", "h2c, websocket")),
        protocol_head(("Sec-WebSocket-Version", None), more=("SEC-WEBSOCKET-VERSION:\t13 ",)),
        protocol_head(("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits, x-other")),
        protocol_head(("Sec-WebSocket-Protocol", "chat, superchat")),
        protocol_head(line="GET /any/where?x=%20y HTTP/1.1"),
        protocol_head(("X-Latin", "\xe9")),
    ],
)
def test_a_correct_handshake_in_any_spelling_is_accepted_without_extensions(head: bytes) -> None:
    status, headers = protocol_answer(head)
    assert status == 101
    assert set(headers) == {"upgrade", "connection", "sec-websocket-accept"}


@pytest.mark.parametrize(
    ("head", "status", "header"),
    [
        (protocol_head(line="POST / HTTP/1.1"), 405, ("allow", "GET")),
        (protocol_head(line="HEAD / HTTP/1.1"), 405, ("allow", "GET")),
        (protocol_head(line="GET / HTTP/1.0"), 505, None),
        (protocol_head(line="GET /"), 400, None),
        (protocol_head(line="GET  / HTTP/1.1"), 400, None),
        (protocol_head(line="GET / http/1.1"), 400, None),
        (protocol_head(line=""), 400, None),
        (protocol_head(("Upgrade", None)), 426, ("upgrade", "websocket")),
        (protocol_head(("Upgrade", "h2c")), 426, ("upgrade", "websocket")),
        (protocol_head(("Upgrade", "websockets")), 426, ("upgrade", "websocket")),
        (protocol_head(("Connection", "keep-alive")), 426, ("upgrade", "websocket")),
        (protocol_head(("Connection", None)), 426, ("upgrade", "websocket")),
        (protocol_head(("Sec-WebSocket-Version", None)), 426, ("sec-websocket-version", "13")),
        (protocol_head(("Sec-WebSocket-Version", "8")), 426, ("sec-websocket-version", "13")),
        (protocol_head(("Sec-WebSocket-Version", "013")), 426, ("sec-websocket-version", "13")),
        (protocol_head(more=("Sec-WebSocket-Version: 13",)), 400, None),
        (protocol_head(("Sec-WebSocket-Key", None)), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "")), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "c2hvcnQ=")), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ")), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=\xe9")), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25j!Q==")), 400, None),
        (protocol_head(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZTEyMw==")), 400, None),
        (protocol_head(more=(f"Sec-WebSocket-Key: {PROTOCOL_KEY}",)), 400, None),
        (protocol_head(more=("no colon here",)), 400, None),
        (protocol_head(more=("X-Folded: a", " b")), 400, None),
        (protocol_head(more=("Bad Name: x",)), 400, None),
        (protocol_head(more=("Before-Colon : x",)), 400, None),
        (protocol_head(more=(": x",)), 400, None),
        (protocol_head(("X-Null", "a\0b")), 400, None),
        (protocol_head(("X-Newline", "a\nOrigin: b")), 400, None),
        (protocol_head(("X-Return", "a\rb")), 400, None),
    ],
)  # fmt: skip
def test_each_violation_of_the_handshake_is_refused_with_its_status(
    head: bytes, status: int, header: tuple[str, str] | None
) -> None:
    got, headers = protocol_answer(head)
    assert got == status
    if header:
        assert headers[header[0]] == header[1]


@given(st.binary(max_size=200))
def test_any_bytes_for_a_head_are_refused_in_order(head: bytes) -> None:
    status, _ = protocol_answer(head)
    assert status in (400, 405, 426, 505)


# -- a running monitor's WebSocket port ----------------------------------------


class ProtocolPeer:
    """A WebSocket client that sends whatever bytes it is told, and reads frames by hand."""

    def __init__(
        self, port: int, receive_bytes: int = 0, host: str = "127.0.0.1", more: tuple[str, ...] = ()
    ) -> None:
        self.sock = socket.socket()
        if receive_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(15)
        self.sock.connect((host, port))
        self.sock.sendall(protocol_head(("Host", f"{host}:{port}"), more=more) + b"\r\n\r\n")
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self.buffer += self.sock.recv(4096)
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        assert b" 101 " in head and PROTOCOL_ACCEPT.encode() in head, head

    def _take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            piece = self.sock.recv(1 << 18)
            if not piece:
                raise EOFError
            self.buffer += piece
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def frame(self) -> tuple[int, bytes] | None:
        """Return the next frame's opcode and payload; None when the connection has ended."""
        try:
            first, second = self._take(2)
            assert first & 0xF0 == 0x80 and second < 0x80, "a server's frames are whole and unmasked"
            size = second
            if size == 126:
                (size,) = struct.unpack("!H", self._take(2))
            elif size == 127:
                (size,) = struct.unpack("!Q", self._take(8))
            return first & 0x0F, self._take(size)
        except (EOFError, ConnectionError):
            return None

    def rest(self) -> list[tuple[int, bytes]]:
        """Return every frame until the connection ends."""
        return list(iter(self.frame, None))

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(data)

    def say(self, **message: Any) -> None:
        """Send one message in one frame."""
        self.send(protocol_frame(1, json.dumps(message).encode()))

    def next(self, kind: str) -> bytes:
        """Return the text of the next message of one kind."""
        while True:
            frame = self.frame()
            assert frame is not None, f"the connection ended before {kind}"
            if frame[0] == 1 and json.loads(frame[1])["type"] == kind:
                return frame[1]

    def close(self) -> None:
        """Let go of the connection without a word."""
        self.sock.close()


def protocol_close_code(frames: list[tuple[int, bytes]]) -> int:
    """Return the code of the close frame that ends a list of frames."""
    opcode, content = frames[-1]
    assert opcode == 8, frames[-1]
    (code,) = struct.unpack("!H", content[:2])
    content[2:].decode("utf-8")
    return int(code)


def protocol_exchange(
    port: int, data: bytes, method: str = "GET"
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send a request's bytes to either port; return status, headers in lower case, body."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as sock:
        sock.sendall(data)
        response = http.client.HTTPResponse(sock, method=method)
        response.begin()
        return (
            response.status,
            [(name.lower(), value) for name, value in response.getheaders()],
            response.read(),
        )


def protocol_events(session: str, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Make some events of a session, told apart by their prompt."""
    return [
        payload("UserPromptSubmit", session, prompt=f"{session} {index}", **fields) for index in range(count)
    ]


def protocol_lines(monitor: RunningMonitor, session: str | None = None) -> list[bytes]:
    """Read the stored lines of a session (or all) from the files, in order of arrival."""
    lines: list[bytes] = []
    for path in glob.glob(f"{monitor.home}/events/*/{session or '*'}.jsonl"):
        with open(path, "rb") as file:
            lines += file.read().splitlines()
    return sorted(lines, key=lambda line: json.loads(line)["seq"])


def test_hello_comes_first_and_says_who_speaks(spoken: RunningMonitor) -> None:
    client = spoken.websocket(None)
    assert not client.others
    hello = client.hello
    assert (hello["mode"], hello["machineId"], hello["wsProtocol"]) == ("local", "testbox", 1)
    assert hello["version"] == cm.__version__
    assert hello["seq"] == spoken.get("/api/status")["seq"]
    client.close()


def test_replies_of_one_kind_come_in_the_order_asked_with_their_request_ids(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("order", 3))
    client = spoken.websocket()
    for number in range(40):
        client.send(type="get_sessions", requestId=number)
        client.send(type="get_events", sessionId="order", limit=2, requestId=f"e{number}")
        client.send(type="nothing", requestId=number)
    assert [client.next("sessions")["requestId"] for _ in range(40)] == list(range(40))
    assert [client.next("events")["requestId"] for _ in range(40)] == [f"e{number}" for number in range(40)]
    assert [client.next("error")["requestId"] for _ in range(40)] == list(range(40))
    client.close()


def test_an_offer_of_compression_is_answered_without_it(spoken: RunningMonitor) -> None:
    with websockets.sync.client.connect(
        f"ws://127.0.0.1:{spoken.ws_port}/", compression="deflate", subprotocols=None
    ) as connection:
        assert "permessage-deflate" in connection.request.headers["Sec-WebSocket-Extensions"]
        assert "Sec-WebSocket-Extensions" not in connection.response.headers
        assert json.loads(connection.recv(timeout=15))["type"] == "hello"


def test_a_ping_gets_its_payload_back_also_between_fragments(spoken: RunningMonitor) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.next("hello")
    peer.send(protocol_frame(9, b"") + protocol_frame(9, b"p" * 125))
    assert [peer.frame(), peer.frame()] == [(10, b""), (10, b"p" * 125)]
    peer.send(protocol_frame(1, b'{"type":"get_', fin=False) + protocol_frame(9, b"inside"))
    assert peer.frame() == (10, b"inside")
    peer.send(protocol_frame(10, b"unasked") + protocol_frame(0, b'sessions"}'))
    opcode, content = peer.frame() or (0, b"")
    assert (opcode, json.loads(content)["type"]) == (1, "sessions")
    peer.close()


@pytest.mark.parametrize(
    ("content", "codes"), [(b"\x03\xe8bye", {1000}), (b"\x03\xe9", {1001}), (b"\x0f\xa0", {4000}), (b"", {1000, None})]
)  # fmt: skip
def test_a_close_frame_is_answered_and_the_connection_ends(
    spoken: RunningMonitor, content: bytes, codes: set[int | None]
) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.next("hello")
    peer.send(protocol_frame(8, content) + protocol_frame(1, b'{"type":"get_sessions"}'))
    frames = peer.rest()
    assert len(frames) == 1  # nothing follows it, and it was not answered twice
    assert (protocol_close_code(frames) if frames[0][1] else None) in codes
    peer.close()


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (PROTOCOL_VIOLATIONS[name][0], PROTOCOL_VIOLATIONS[name][1])
        for name in ("reserved bit 1", "opcode 3", "opcode 11", "unmasked", "fragmented ping", "too big", "bad UTF-8",
                     "continuation of nothing", "125 bytes in the 16-bit form", "close code 1005",
                     "close payload of one byte", "close reason that is not UTF-8")
    ] + [(protocol_raw_frame(0x82, b"\0\1"), 1003)],
)  # fmt: skip
def test_a_client_that_breaks_the_protocol_is_closed_with_the_code(
    spoken: RunningMonitor, wire: bytes, code: int
) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.next("hello")
    peer.send(wire)
    frame = peer.frame()
    assert frame is not None
    assert protocol_close_code([frame]) == code
    peer.send(protocol_frame(8, struct.pack("!H", code)))
    assert peer.frame() is None
    peer.close()


def test_what_follows_a_binary_message_is_not_carried_out(spoken: RunningMonitor) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.next("hello")
    peer.send(protocol_frame(2, b"x") + protocol_frame(1, b'{"type":"get_sessions"}') + protocol_frame(8))
    frames = peer.rest()
    assert len(frames) == 1
    assert protocol_close_code(frames) == 1003
    peer.close()


PROTOCOL_BAD_MESSAGES = [
    ("not json", None),
    ("", None),
    ("[1, 2]", None),
    ("null", None),
    ('{"requestId": 7}', None),
    ('{"type": 5, "requestId": 7}', None),
    ('{"type": ["subscribe"], "requestId": 7}', None),
    ('{"type": "', None),
    ('{"type": ' + "[" * 100_000, None),
    ('{"type": "no such thing", "requestId": 7}', "no such thing"),
    ('{"type": "search", "query": 7, "requestId": 7}', "search"),
    ('{"type": "subscribe", "view": "half", "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "view": 1, "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "sessionIds": "s1", "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "sessionIds": [1], "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "since": -1, "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "since": "3", "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "since": 1.5, "requestId": 7}', "subscribe"),
    ('{"type": "subscribe", "since": true, "requestId": 7}', "subscribe"),
    ('{"type": "unsubscribe", "requestId": 7}', "unsubscribe"),
    ('{"type": "get_events", "requestId": 7}', "get_events"),
    ('{"type": "get_events", "sessionId": 4, "requestId": 7}', "get_events"),
    ('{"type": "get_events", "sessionId": "x", "limit": "5", "requestId": 7}', "get_events"),
    ('{"type": "get_events", "sessionId": "x", "before": [], "requestId": 7}', "get_events"),
    ('{"type": "get_all_recent_events", "limit": -2, "requestId": 7}', "get_all_recent_events"),
    ('{"type": "get_event_detail", "sessionId": "x", "requestId": 7}', "get_event_detail"),
    ('{"type": "get_event_detail", "sessionId": "x", "eventId": {}, "requestId": 7}', "get_event_detail"),
    ('{"type": "rename_session", "sessionId": "nobody", "label": "x", "requestId": 7}', "rename_session"),
    ('{"type": "toggle_pin", "sessionId": "nobody", "requestId": 7}', "toggle_pin"),
    ('{"type": "hide_session", "requestId": 7}', "hide_session"),
    ('{"type": "unhide_session", "sessionId": null, "requestId": 7}', "unhide_session"),
    ('{"type": "delete_session", "sessionId": "nobody", "requestId": 7}', "delete_session"),
    ('{"type": "set_parent", "sessionId": "nobody", "parentSessionId": null, "requestId": 7}', "set_parent"),
]


@pytest.mark.parametrize(("text", "request_type"), PROTOCOL_BAD_MESSAGES)
def test_a_message_that_cannot_be_carried_out_gets_an_error_that_names_it(
    spoken: RunningMonitor, text: str, request_type: str | None
) -> None:
    client = spoken.websocket(None)
    client.connection.send(text)
    error = client.next("error")
    assert error["request"] == request_type
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error.get("requestId") == (7 if '"requestId": 7' in text else None)
    assert client.ask("sessions", type="get_sessions", requestId="after")["requestId"] == "after"
    client.close()


@pytest.mark.parametrize("request_id", [0, -1.5, "", "x" * 1000, "\ud800", 1 << 60, None, [1, {"a": None}]])
def test_a_request_id_of_any_kind_comes_back(spoken: RunningMonitor, request_id: Any) -> None:
    client = spoken.websocket(None)
    assert client.ask("sessions", type="get_sessions", requestId=request_id)["requestId"] == request_id
    assert "requestId" not in client.ask("sessions", type="get_sessions")
    client.close()


@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(["subscribe", "unsubscribe", "get_events", "get_event_detail", "set_parent",
                                      "rename_session", "get_all_recent_events", "set_show_hidden", "toggle_pin"])},
            optional={
                name: st.one_of(
                    st.none(), st.booleans(), st.integers(-5, 1 << 70), st.floats(), st.text(max_size=5),
                    st.lists(st.text(max_size=3), max_size=2), st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
                )
                for name in ("sessionId", "sessionIds", "view", "since", "limit", "before", "eventId", "seq", "label",
                             "parentSessionId", "showHidden", "requestId")
            },
        ),
        max_size=12,
    )
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_no_fields_of_any_type_end_a_connection(
    spoken: RunningMonitor, messages: list[dict[str, Any]]
) -> None:
    client = spoken.websocket(None)
    for message in messages:
        client.send(**message)
    assert client.ask("sessions", type="get_sessions", requestId="the last")
    client.close()


def test_the_full_view_carries_the_very_bytes_that_are_stored(spoken: RunningMonitor) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.say(type="subscribe", view="full", requestId="r")
    assert json.loads(peer.next("subscribed"))["requestId"] == "r"
    spoken.emit(
        payload("PreToolUse", "bytes", tool_name="Bash", tool_use_id="t1", tool_input={"command": "a\n\u2028é\ud800" * 300}),
        payload("Notification", "bytes", message="x", odd={"null": None, "float": 1e300, "big": 1 << 70}),
    )  # fmt: skip
    texts = [peer.next("event"), peer.next("event")]
    lines = protocol_lines(spoken, "bytes")
    assert len(lines) == 2
    for text, line in zip(texts, lines):
        message = json.loads(text)
        assert set(message) == {"type", "seq", "event"}
        assert message["seq"] == json.loads(line)["seq"]
        assert line in text
    peer.close()


def test_a_row_is_small_and_has_the_fields_of_the_contract(spoken: RunningMonitor) -> None:
    client = spoken.websocket("rows")
    long = "first line\n" + "word " * 50_000
    spoken.emit(
        payload("PreToolUse", "row", tool_name="Bash", tool_use_id="t1", tool_input={"command": long}, agent_id="a1",
                agent_type="Explore"),
        payload("PostToolUse", "row", tool_name="Bash", tool_use_id="t1", tool_input={"command": long}, duration_ms=12,
                tool_response={"stdout": long}, agent_id="a1", agent_type="Explore"),
        payload("PostToolUseFailure", "row", tool_name="Read", tool_use_id="t2", tool_input={"file_path": "/home/dev/shop/a.py"},
                error=long, is_interrupt=True),
        payload("UserPromptSubmit", "row", prompt=long),
        payload("Notification", "row", message={"odd": [long]}, notification_type="idle_prompt"),
        payload("SessionStart", "row", source="startup", model=long),
        {"eventType": "message", "sessionId": "row", "data": {"toolName": long, "reason": ["x"]}},
    )  # fmt: skip
    rows = client.events(7)
    whole = {event["seq"]: event for event in map(json.loads, protocol_lines(spoken, "row"))}
    for row in rows:
        event = whole[row["seq"]]
        assert set(row) <= PROTOCOL_ROW_FIELDS
        assert set(row["data"]) <= PROTOCOL_ROW_DATA
        assert row["partial"] is True
        for name in set(row) - {"partial", "data"}:
            assert row[name] == event[name]
        for name in ("target", "text"):
            assert len(row["data"].get(name, "")) <= 160
            assert "\n" not in row["data"].get(name, "")
        assert len(json.dumps(row)) < 1000
    call, result, failure, prompt, notice, start, _other = rows
    assert call["agentId"] == "a1"
    assert call["agentType"] == "Explore"
    assert call["data"]["target"].startswith("first line word")
    assert (result["data"]["durationMs"], result["data"]["toolUseId"]) == (12, "t1")
    assert (failure["data"]["target"], failure["data"]["isInterrupt"]) == ("a.py", True)
    assert failure["data"]["text"].startswith("first line")
    assert prompt["data"]["text"].startswith("first line word")
    assert notice["data"]["notificationType"] == "idle_prompt"
    assert start["data"]["source"] == "startup"
    client.close()


def test_a_client_gets_the_events_of_the_sessions_it_asked_for(spoken: RunningMonitor) -> None:
    some = spoken.websocket(sessionIds=["filter-a", "filter-c"])
    everything = spoken.websocket()
    spoken.emit(*(protocol_events(f"filter-{letter}", 1)[0] for letter in "abcab"))
    assert [event["sessionId"] for event in everything.events(5)] == [
        f"filter-{letter}" for letter in "abcab"
    ]
    assert [event["sessionId"] for event in some.events(3)] == ["filter-a", "filter-c", "filter-a"]
    some.send(type="unsubscribe", sessionIds=["filter-a", "never heard of"])
    some.ask("sessions", type="get_sessions")
    spoken.emit(*(protocol_events(f"filter-{letter}", 1)[0] for letter in "abcab"))
    assert [event["sessionId"] for event in some.events(1)] == ["filter-c"]
    everything.events(5)
    some.send(type="unsubscribe", sessionIds=["filter-c"])
    some.ask("sessions", type="get_sessions")
    spoken.emit(*(protocol_events(f"filter-{letter}", 1)[0] for letter in "abc"))
    everything.events(3)
    some.ask("sessions", type="get_sessions")
    assert not [message for message in some.others if message["type"] == "event"]
    some.close(), everything.close()


def test_nobody_gets_events_before_subscribing(spoken: RunningMonitor) -> None:
    silent = spoken.websocket(None)
    client = spoken.websocket()
    spoken.emit(*protocol_events("unsubscribed", 2))
    client.events(2)
    silent.ask("sessions", type="get_sessions")
    assert not silent.others
    silent.close(), client.close()


@pytest.mark.parametrize("view", ["full", "rows"])
def test_what_was_missed_comes_in_order_before_what_is_live(spoken: RunningMonitor, view: str) -> None:
    since = spoken.get("/api/status")["seq"]
    sent = [
        event
        for pair in zip(protocol_events("since-a", 20), protocol_events("since-b", 20))
        for event in pair
    ]
    spoken.emit(*sent)
    client = spoken.websocket(view, since=since)
    spoken.emit(*protocol_events("since-c", 2))
    assert (client.subscribed["missed"], client.subscribed["resync"]) == (40, False)
    assert client.subscribed["seq"] == since + 40
    events = client.events(42)
    assert [event["seq"] for event in events] == list(range(since + 1, since + 43))
    assert all(event.get("partial", False) is (view == "rows") for event in events)
    client.close()


def test_a_client_with_a_filter_is_told_how_many_missed_events_follow(spoken: RunningMonitor) -> None:
    since = spoken.get("/api/status")["seq"]
    spoken.emit(*protocol_events("missed-a", 5), *protocol_events("missed-b", 7))
    client = spoken.websocket(since=since, sessionIds=["missed-b"])
    spoken.emit(*protocol_events("missed-b", 1, live=True))
    following = client.events(8)
    assert {event["sessionId"] for event in following} == {"missed-b"}
    assert following[-1]["data"]["live"] is True
    assert client.subscribed["missed"] == 7
    client.close()


def test_who_missed_nothing_gets_nothing_and_who_is_ahead_must_resync(spoken: RunningMonitor) -> None:
    seq = spoken.get("/api/status")["seq"]
    client = spoken.websocket(since=seq)
    assert (client.subscribed["missed"], client.subscribed["resync"], client.subscribed["seq"]) == (
        0,
        False,
        seq,
    )
    ahead = client.ask("subscribed", type="subscribe", view="full", since=seq + 1)
    assert (ahead["missed"], ahead["resync"]) == (0, True)
    assert client.ask("subscribed", type="subscribe", view="full")["resync"] is False
    client.close()


def test_who_was_away_for_too_long_is_told_to_resync(running: RunningMonitor) -> None:
    running.emit(*protocol_events("long", cm.CATCH_UP_EVENTS + 1))
    client = running.websocket(since=0)
    assert client.subscribed["resync"] is True
    client.ask("sessions", type="get_sessions")
    assert not [message for message in client.others if message["type"] == "event"]
    exact = running.websocket("rows", since=1)
    assert (exact.subscribed["missed"], exact.subscribed["resync"]) == (cm.CATCH_UP_EVENTS, False)
    assert [event["seq"] for event in exact.events(cm.CATCH_UP_EVENTS)] == list(
        range(2, cm.CATCH_UP_EVENTS + 2)
    )
    client.close(), exact.close()


def test_a_client_that_comes_and_goes_while_events_flow_misses_and_doubles_none(
    running: RunningMonitor,
) -> None:
    count = 400

    def emit_all() -> None:
        for event in protocol_events("flow", count):
            running.emit(event)

    sender = threading.Thread(target=emit_all)
    sender.start()
    seen: list[int] = []
    rng = random.Random(5)
    while len(seen) < count:
        client = running.websocket("rows", since=seen[-1] if seen else 0)
        for _ in range(min(rng.randint(1, 60), count - len(seen))):
            seen.append(client.events(1)[0]["seq"])
        client.close()
    sender.join()
    assert seen == list(range(1, count + 1))


@pytest.mark.parametrize("view", ["full", "rows", None])
def test_paging_back_through_a_session_loses_and_doubles_nothing(
    spoken: RunningMonitor, view: str | None
) -> None:
    name = f"paging-{view}"
    for index in range(23):
        spoken.emit(
            payload("UserPromptSubmit", name, prompt=f"n {index}"), *protocol_events("paging-other", 1)
        )
    client = spoken.websocket(view)
    pages, before, more = [], None, True
    while more:
        extra = {} if before is None else {"before": before}
        page = client.ask("events", type="get_events", sessionId=name, limit=5, **extra)
        assert page["sessionId"] == name
        more, before = page["more"], page["events"][0]["seq"]
        pages.insert(0, page["events"])
    stored = [json.loads(line) for line in protocol_lines(spoken, name)]
    assert [len(page) for page in pages] == [3, 5, 5, 5, 5]
    events = [event for page in pages for event in page]
    assert [event["seq"] for event in events] == [event["seq"] for event in stored]
    if view == "rows":
        assert all(event["partial"] for event in events)
    else:
        assert events == stored
    exact = client.ask("events", type="get_events", sessionId=name, limit=23)
    assert (len(exact["events"]), exact["more"]) == (23, False)
    nothing = client.ask("events", type="get_events", sessionId=name, limit=5, before=stored[0]["seq"])
    assert (nothing["events"], nothing["more"]) == ([], False)
    unknown = client.ask("events", type="get_events", sessionId="../../token", limit=5)
    assert (unknown["events"], unknown["more"]) == ([], False)
    client.close()


def test_paging_back_through_all_events_loses_and_doubles_nothing(running: RunningMonitor) -> None:
    for index in range(31):
        running.emit(payload("UserPromptSubmit", f"all-{index % 4}", prompt=f"n {index}"))
    client = running.websocket("rows")
    seqs: list[int] = []
    more = True
    while more:
        extra = {"before": seqs[0]} if seqs else {}
        page = client.ask("all_events", type="get_all_recent_events", limit=10, **extra)
        more = page["more"]
        assert all(row["partial"] for row in page["events"])
        seqs[:0] = [row["seq"] for row in page["events"]]
    assert seqs == list(range(1, 32))
    client.close()


def test_the_whole_event_comes_on_demand_with_and_without_its_number(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("detail", 6))
    stored = [json.loads(line) for line in protocol_lines(spoken, "detail")]
    client = spoken.websocket("rows")
    for event in stored:
        ask = {"type": "get_event_detail", "sessionId": "detail", "eventId": event["id"]}
        for more in ({}, {"seq": event["seq"]}, {"seq": stored[0]["seq"]}, {"seq": 1 << 50}):
            detail = client.ask("event_detail", **ask, **more)
            assert (detail["sessionId"], detail["eventId"], detail["event"]) == ("detail", event["id"], event)
    nobody = client.ask(
        "event_detail", type="get_event_detail", sessionId="detail", eventId="no", requestId=1
    )
    assert (nobody["event"], nobody["requestId"], nobody["eventId"]) == (None, 1, "no")
    client.close()


def test_sessions_come_with_every_field_of_the_contract(spoken: RunningMonitor) -> None:
    spoken.emit(
        payload("PreToolUse", "fields", tool_name="Bash", tool_use_id="t", tool_input={"command": "ls"})
    )
    client = spoken.websocket("rows")
    sessions = client.ask("sessions", type="get_sessions")["sessions"]
    (session,) = [session for session in sessions if session["sessionId"] == "fields"]
    assert set(session) >= {
        "sessionId", "machineId", "workingDirectory", "label", "labelSource", "model", "startTime", "lastEventTime",
        "endTime", "state", "reason", "stateSince", "activity", "parentSessionId", "childSessionIds", "continuedFrom",
        "agents", "openCalls", "counts", "tokenUsage", "estimatedCostUsd", "stuck", "isPinned", "hidden", "isImported",
        "demo", "pid",
    }  # fmt: skip
    assert set(session["counts"]) == {"events", "toolCalls", "toolErrors", "interrupted", "prompts"}
    assert session == spoken.sessions()["fields"]
    client.close()


# -- what the user does --------------------------------------------------------


def test_rename_reaches_the_other_client_and_an_empty_name_takes_it_back(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("rename", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    mine.send(type="rename_session", sessionId="rename", label="Checkout flow")
    eventually(
        lambda: other.next("session_update")["session"]["label"] == "Checkout flow", what="the new name"
    )
    mine.send(type="rename_session", sessionId="rename", label="")
    session = eventually(
        lambda: next(
            (s for s in [other.next("session_update")["session"]] if s["labelSource"] != "user"), None
        )
    )
    assert (session["label"], session["labelSource"]) == ("rename 0", "prompt")
    mine.send(type="rename_session", sessionId="rename", label=5)
    assert mine.next("error")["request"] == "rename_session"
    mine.close(), other.close()


def protocol_update(client: TestClient, session_id: str, **fields: Any) -> dict[str, Any]:
    """Wait until an update tells these fields of a session."""
    while True:
        session = client.next("session_update")["session"]
        if session["sessionId"] == session_id and all(
            session[name] == value for name, value in fields.items()
        ):
            return dict(session)


def test_a_pin_is_set_and_taken_away(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("pin", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    for pinned in (True, False, True):
        mine.send(type="toggle_pin", sessionId="pin")
        protocol_update(other, "pin", isPinned=pinned)
    mine.close(), other.close()


def test_a_hidden_session_goes_from_every_list_but_of_those_who_show_hidden_ones(
    spoken: RunningMonitor,
) -> None:
    spoken.emit(*protocol_events("hide", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")

    def listed(client: TestClient) -> bool:
        sessions = client.ask("sessions", type="get_sessions")["sessions"]
        return "hide" in [session["sessionId"] for session in sessions]

    shown = other.ask("sessions", type="set_show_hidden", showHidden=True, requestId="s")
    assert shown["requestId"] == "s"
    assert listed(mine)
    mine.send(type="hide_session", sessionId="hide")
    protocol_update(other, "hide", hidden=True)
    assert not listed(mine)
    assert listed(other)
    assert "hide" not in {session["sessionId"] for session in spoken.get("/api/sessions")["sessions"]}
    spoken.emit(*protocol_events("hide", 1))  # goes on unseen
    assert not listed(mine)
    mine.send(type="unhide_session", sessionId="hide")
    protocol_update(other, "hide", hidden=False)
    protocol_update(mine, "hide", hidden=False)
    assert listed(mine)
    off = other.ask("sessions", type="set_show_hidden", showHidden=False)
    assert all(not session["hidden"] for session in off["sessions"])
    mine.close(), other.close()


def test_a_client_that_shows_no_hidden_sessions_learns_that_one_was_hidden(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("hide-told", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    for client in (mine, other):
        client.ask("sessions", type="get_sessions")
    mine.send(type="hide_session", sessionId="hide-told")
    for client in (other, mine):
        assert protocol_update(client, "hide-told", hidden=True)["hidden"] is True
    mine.close(), other.close()


def test_a_parent_is_set_and_removed_and_cycles_are_refused(spoken: RunningMonitor) -> None:
    spoken.emit(*(protocol_events(f"tree-{letter}", 1)[0] for letter in "abc"))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    mine.send(type="set_parent", sessionId="tree-b", parentSessionId="tree-a")
    protocol_update(other, "tree-b", parentSessionId="tree-a")
    protocol_update(mine, "tree-a", childSessionIds=["tree-b"])
    mine.send(type="set_parent", sessionId="tree-c", parentSessionId="tree-b")
    protocol_update(other, "tree-c", parentSessionId="tree-b")
    protocol_update(mine, "tree-b", childSessionIds=["tree-c"])
    sessions = spoken.sessions()
    assert sessions["tree-a"]["childSessionIds"] == ["tree-b"]
    assert sessions["tree-b"]["childSessionIds"] == ["tree-c"]
    for child, parent in (("a", "a"), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "nobody")):
        refused = mine.ask(
            "error", type="set_parent", sessionId=f"tree-{child}", parentSessionId=f"tree-{parent}", requestId=child
        )  # fmt: skip
        assert (refused["request"], refused["requestId"]) == ("set_parent", child)
    assert mine.ask("error", type="set_parent", sessionId="tree-a", parentSessionId=["tree-b"])
    assert spoken.sessions()["tree-a"]["parentSessionId"] is None
    mine.send(type="set_parent", sessionId="tree-b", parentSessionId=None)
    protocol_update(other, "tree-b", parentSessionId=None)
    protocol_update(mine, "tree-a", childSessionIds=[])
    mine.send(type="set_parent", sessionId="tree-a", parentSessionId="tree-c")
    protocol_update(other, "tree-a", parentSessionId="tree-c")
    protocol_update(mine, "tree-c", childSessionIds=["tree-a"])
    mine.send(type="delete_session", sessionId="tree-a")
    protocol_update(other, "tree-c", childSessionIds=[])
    mine.close(), other.close()


def test_a_session_that_is_linked_to_another_only_later_is_told_to_the_clients(
    running: RunningMonitor,
) -> None:
    client = running.websocket("rows")
    running.emit(payload("UserPromptSubmit", "old", prompt="go"))
    running.emit(payload("SessionStart", "new", source="clear"))
    protocol_update(client, "new", continuedFrom=None)
    running.emit(payload("SessionEnd", "old", reason="clear"))
    protocol_update(client, "new", continuedFrom="old")
    client.close()


def test_a_deleted_session_is_gone_from_list_and_disk_and_others_stay(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("delete", 3), *protocol_events("delete-not", 1))
    mine, other = spoken.websocket("rows"), spoken.websocket("rows")
    mine.send(type="delete_session", sessionId="delete")
    for client in (other, mine):
        assert client.next("session_deleted")["sessionId"] == "delete"
    assert protocol_lines(spoken, "delete") == []
    assert len(protocol_lines(spoken, "delete-not")) == 1
    assert "delete" not in spoken.sessions()
    assert spoken.request("/api/sessions/delete")[0] == 404
    spoken.emit(*protocol_events("delete", 1))  # a session may come back
    assert spoken.sessions()["delete"]["counts"]["events"] == 1
    mine.close(), other.close()


def test_all_sessions_are_hidden_and_deleted_at_once(running: RunningMonitor) -> None:
    running.emit(*(protocol_events(f"many-{index}", 1)[0] for index in range(5)))
    mine, other, showing = (running.websocket("rows") for _ in range(3))
    showing.ask("sessions", type="set_show_hidden", showHidden=True)
    mine.send(type="hide_all_sessions")
    for client in (mine, other):
        assert client.next("sessions_updated")["sessions"] == []
    hidden = showing.next("sessions_updated")["sessions"]
    assert sorted(session["sessionId"] for session in hidden) == [f"many-{index}" for index in range(5)]
    assert all(session["hidden"] for session in hidden)
    mine.send(type="delete_all_sessions")
    for client in (mine, other, showing):
        assert client.next("sessions_updated")["sessions"] == []
    assert running.sessions() == {}
    assert running.stored_events() == []
    running.stop()
    running.start()
    assert running.sessions() == {}


def test_what_the_user_did_survives_a_restart_from_the_files_alone(running: RunningMonitor) -> None:
    running.emit(*(protocol_events(f"keep-{index}", 2)[0] for index in range(5)))
    client = running.websocket("rows")
    client.ask("sessions", type="set_show_hidden", showHidden=True)
    client.send(type="rename_session", sessionId="keep-0", label="By hand é")
    client.send(type="toggle_pin", sessionId="keep-1")
    client.send(type="hide_session", sessionId="keep-2")
    client.send(type="set_parent", sessionId="keep-3", parentSessionId="keep-0")
    client.send(type="delete_session", sessionId="keep-4")
    client.next("session_deleted")
    before = running.sessions()
    assert (before["keep-0"]["label"], before["keep-0"]["labelSource"]) == ("By hand é", "user")
    assert before["keep-1"]["isPinned"]
    assert before["keep-2"]["hidden"]
    assert before["keep-3"]["parentSessionId"] == "keep-0"
    assert "keep-4" not in before
    running.stop()
    for name in os.listdir(running.home):
        path = os.path.join(running.home, name)
        if name not in ("events", "monitor.config.json"):
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
    running.start()
    assert running.sessions() == before
    actions = [event for event in running.stored_events() if event["hookType"] == "Monitor"]
    assert len(actions) == 4
    assert {event["eventType"] for event in actions} == {"session_meta"}


def test_a_number_is_never_given_twice_though_the_newest_session_was_deleted(running: RunningMonitor) -> None:
    running.emit(*protocol_events("first", 1), *protocol_events("newest", 9))
    client = running.websocket("rows")
    client.send(type="delete_session", sessionId="newest")
    client.next("session_deleted")
    client.close()
    running.stop()
    running.start()
    running.emit(*protocol_events("later", 12))
    back = running.websocket("rows", since=10)  # it was away since before the restart
    if not back.subscribed["resync"]:
        assert back.subscribed["missed"] == 12
        assert [event["data"]["text"] for event in back.events(12)] == [
            f"later {index}" for index in range(12)
        ]
    back.close()


def test_the_status_comes_on_subscribing_and_when_something_in_it_changes(running: RunningMonitor) -> None:
    running.emit(*protocol_events("status", 2))
    client = running.websocket("rows")
    status = client.next("status")
    assert status["events"] == {"received": 2, "stored": 2, "duplicates": 0, "quarantined": 0}
    assert (status["seq"], status["sessions"], status["clients"], status["demo"]) == (2, 1, 1, False)
    assert (status["mode"], status["machineId"], status["version"]) == ("local", "testbox", cm.__version__)
    assert status["store"]["path"] == running.home + "/events"
    assert (status["store"]["ok"], status["store"]["error"], status["store"]["persistent"]) == (
        True,
        None,
        True,
    )
    assert set(status["spool"]) >= {"bytes", "segments", "dropped"}
    assert status["loading"] is None
    assert abs(status["startedAt"] - time.time() * 1000) < 600_000
    running.emit({"eventType": "message", "sessionId": "status-demo", "demo": True})
    assert client.next("status", demo=True)["sessions"] == 2
    assert running.get("/api/status")["demo"] is True
    client.close()


def test_a_test_event_is_stored_and_reaches_everyone(spoken: RunningMonitor) -> None:
    mine, other = spoken.websocket("rows"), spoken.websocket("full")
    mine.send(type="send_test_event")
    row, event = mine.events(1)[0], other.events(1)[0]
    assert row["id"] == event["id"]
    assert event["eventType"] == "notification"
    assert spoken.get(f"/api/events/{event['id']}") == event
    mine.close(), other.close()


# -- clients that are slow or silent -------------------------------------------


def test_a_client_that_never_reads_is_closed_and_the_others_get_everything(monitor: RunningMonitor) -> None:
    monitor.write_config({"limits": {"clientQueueBytes": 65536}})
    monitor.start()
    slow = ProtocolPeer(monitor.ws_port, receive_bytes=4096)
    slow.say(type="subscribe", view="full")
    slow.next("subscribed")
    others = [monitor.websocket() for _ in range(4)]
    text = "no secrets here " * 2000
    seqs: list[list[int]] = [[] for _ in others]
    batch, rounds = 10, 26  # 8 MB: more than the kernel holds for one connection
    for _ in range(rounds):
        monitor.emit(*protocol_events("slow", batch, text=text))
        for client, mine in zip(others, seqs):
            mine += [event["seq"] for event in client.events(batch)]
    total = batch * rounds
    assert all(mine == list(range(1, total + 1)) for mine in seqs)
    frames = slow.rest()
    got = [
        json.loads(content)["seq"] for opcode, content in frames if opcode == 1 and b'"event"' in content[:20]
    ]
    assert got == list(range(1, len(got) + 1))
    assert len(got) < total, "it was never closed"
    assert metrics_of(monitor)["contextuate_clients_closed_slow_total"][()] >= 1
    if frames[-1][0] == 8:
        assert protocol_close_code(frames) == 1013
    slow.close()
    for _ in range(10):
        if len(got) == total:
            break
        client = monitor.websocket(since=got[-1])
        assert client.subscribed["resync"] is False
        with contextlib.suppress(websockets.ConnectionClosed):
            got += [event["seq"] for event in client.events(total - len(got))]
        client.close()
    assert got == list(range(1, total + 1))
    for client in others:
        client.ask("sessions", type="get_sessions")
        client.close()


def test_a_client_that_reads_is_not_closed_for_a_large_answer(monitor: RunningMonitor) -> None:
    monitor.write_config({"limits": {"clientQueueBytes": 65536}})
    monitor.start()
    text = "no secrets here " * 30_000
    for event in protocol_events("large", 24, text=text):  # 11 MB
        monitor.emit(event)
    client = monitor.websocket(None)
    page = client.ask("events", type="get_events", sessionId="large", limit=100)
    assert len(page["events"]) == 24
    client.send(type="subscribe", view="full", since=0)
    subscribed = client.next("subscribed")
    if not subscribed["resync"]:
        assert [event["seq"] for event in client.events(24)] == list(range(1, 25))
    monitor.emit(*protocol_events("large", 1))
    assert client.events(1)[0]["seq"] == 25
    client.close()


@contextlib.contextmanager
def protocol_inside(**config: Any) -> Iterator[cm.Monitor]:
    """Run a monitor in a thread of this process, so that a test can shorten its deadlines beforehand."""
    place = RunningMonitor(new_home(), config)
    values, _ = ee.load_config(place.home + "/monitor.config.json")
    made = cm.Monitor(cm.Settings(place.home, place.home + "/monitor.config.json", "testbox", values))
    made.open()
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join(15)
        shutil.rmtree(place.home, ignore_errors=True)
        assert not thread.is_alive()


def protocol_drip(port: int, data: bytes) -> bytes:
    """Send a head byte by byte, for ever if it is let; return what came back before the connection was cut."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.03) as sock:
        received = b""
        deadline = time.monotonic() + 15
        for byte in itertools.chain(data, itertools.repeat(ord("x"))):
            assert time.monotonic() < deadline, "the connection was not cut"
            try:
                sock.sendall(bytes([byte]))
                piece = sock.recv(4096)
                if not piece:
                    return received
                received += piece
            except socket.timeout:
                pass
            except OSError:
                return received
    raise AssertionError


def test_a_head_that_drips_in_is_cut_off_on_both_ports(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "HEAD_DEADLINE_S", 0.3)
    monkeypatch.setattr(cm, "REQUEST_DEADLINE_S", 0.3)
    with protocol_inside() as inside:
        good = ProtocolPeer(inside.ws_port)
        good.next("hello")
        with concurrent.futures.ThreadPoolExecutor() as pool:
            drips = [
                pool.submit(protocol_drip, inside.ws_port, b"GET / HTTP/1.1\r\nX: "),
                pool.submit(protocol_drip, inside.port, b"GET / HTTP/1.1\r\nX: "),
                pool.submit(protocol_drip, inside.port, b""),
            ]
            for drip in drips:
                assert b" 101 " not in drip.result(20)
        good.say(type="get_sessions")  # who has shaken hands is left in peace
        assert good.next("sessions")
        good.close()


def test_a_connection_that_says_nothing_is_cut_off_on_both_ports(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "HEAD_DEADLINE_S", 0.2)
    monkeypatch.setattr(cm, "REQUEST_DEADLINE_S", 0.2)
    with protocol_inside() as inside:
        for port in (inside.ws_port, inside.port):
            with socket.create_connection(("127.0.0.1", port), timeout=15) as sock:
                assert sock.recv(100) == b""


def test_a_body_that_stops_coming_does_not_hold_its_connection(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm.RequestHandler, "timeout", 0.3)
    with protocol_inside() as inside:
        head = f"POST /api/hooks HTTP/1.1\r\nHost: 127.0.0.1:{inside.port}\r\nOrigin: http://127.0.0.1:{inside.port}\r\n"
        with socket.create_connection(("127.0.0.1", inside.port), timeout=15) as sock:
            sock.sendall(head.encode() + b'Content-Length: 100\r\n\r\n{"half')
            received = b""
            while piece := sock.recv(4096):
                received += piece
        assert b" 200 " not in received
        assert inside.loop.call(lambda: inside.ingest.counts["stored"]) == 0


def test_a_client_that_answers_no_ping_is_dropped_and_one_that_does_stays(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "PING_INTERVAL_S", 0.15)
    with protocol_inside() as inside:
        answering, silent = ProtocolPeer(inside.ws_port), ProtocolPeer(inside.ws_port)
        pings = 0
        answering.next("hello")
        while pings < 5:
            assert answering.frame() == (9, b"")
            pings += 1
            answering.send(protocol_frame(10, b""))
        frames = list(itertools.islice(iter(silent.frame, None), 20))
        assert [opcode for opcode, _ in frames] in ([1, 9, 9], [1, 9, 9, 8])
        answering.say(type="get_sessions")
        assert answering.next("sessions")
        answering.close(), silent.close()


def test_a_connection_too_many_gets_503_on_both_ports(monitor: RunningMonitor) -> None:
    monitor.write_config({"limits": {"connections": 3}})
    monitor.start()
    for port in (monitor.port, monitor.ws_port):
        held = [socket.create_connection(("127.0.0.1", port), timeout=15) for _ in range(3)]
        status, headers, body = protocol_exchange(port, b"")
        assert status == 503
        assert ("content-type", "application/json") in headers
        assert "error" in json.loads(body)
        for sock in held:
            sock.close()
    eventually(lambda: protocol_open(monitor), what="a place for a new connection")
    assert monitor.get("/health")["status"] == "ok"


def protocol_open(monitor: RunningMonitor) -> bool:
    """Tell whether both ports have room for one more connection."""
    try:
        monitor.websocket(None).close()
        return monitor.request("/health")[0] == 200
    except (websockets.WebSocketException, OSError, http.client.HTTPException, AssertionError):
        return False  # websockets 17.4 fails an assertion of its own when it is cut off while it connects


def test_a_head_that_is_too_large_is_refused_on_both_ports(spoken: RunningMonitor) -> None:
    head = protocol_head(("Host", f"127.0.0.1:{spoken.ws_port}"), ("X-Long", "x" * cm.HEAD_LIMIT_BYTES))
    status, _, body = protocol_exchange(spoken.ws_port, head + b"\r\n\r\n")
    assert (status, "error" in json.loads(body)) == (431, True)
    host = f"Host: 127.0.0.1:{spoken.port}\r\n".encode()
    for request, expected in (
        (b"GET / HTTP/1.1\r\n" + host + b"X: " + b"x" * 65534, 431),
        (b"GET / HTTP/1.1\r\n" + host + b"X: y\r\n" * 101, 431),
        (b"GET /" + b"x" * 65532, 414),
    ):
        status, headers, body = protocol_exchange(spoken.port, request)
        assert status == expected
        assert ("content-type", "application/json") in headers
        assert "error" in json.loads(body)


@pytest.mark.parametrize(
    ("changes", "line", "status"),
    [
        ((("Upgrade", None),), "GET / HTTP/1.1", 426),
        ((("Sec-WebSocket-Version", "12"),), "GET / HTTP/1.1", 426),
        ((("Sec-WebSocket-Key", "x"),), "GET / HTTP/1.1", 400),
        ((), "POST / HTTP/1.1", 405),
        ((), "GET / HTTP/1.0", 505),
        ((), "GARBAGE", 400),
    ],
)
def test_a_bad_handshake_gets_its_status_in_json_and_the_connection_ends(
    spoken: RunningMonitor, changes: tuple[tuple[str, str | None], ...], line: str, status: int
) -> None:
    head = protocol_head(("Host", f"127.0.0.1:{spoken.ws_port}"), *changes, line=line)
    got, headers, body = protocol_exchange(spoken.ws_port, head + b"\r\n\r\n")
    assert got == status
    assert ("x-content-type-options", "nosniff") in headers
    assert json.loads(body)["error"]


# -- HTTP ----------------------------------------------------------------------


def protocol_origin(monitor: RunningMonitor) -> dict[str, str]:
    """Return the page's Origin header."""
    return {"Origin": f"http://127.0.0.1:{monitor.port}"}


def test_every_route_answers_json_with_the_headers_that_protect(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("routes", 2))
    event = json.loads(protocol_lines(spoken, "routes")[0])
    bodies = {}
    for path in (
        "/health", "/api/status", "/api/config", "/api/sessions", "/api/sessions?hidden=1", "/api/sessions/routes",
        "/api/sessions/routes/events", "/api/events", f"/api/events/{event['id']}",
        f"/api/events/{event['id']}?session=routes&seq={event['seq']}", "/api/events/none?session=routes",
        "/api/nothing", "/api/search?limit=0", "/api/stats?utcOffset=x", "/api/events?limit=0",
    ):  # fmt: skip
        status, headers, body = spoken.request(path)
        bodies[path] = (status, json.loads(body))
        assert headers["content-type"] == "application/json", path
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert headers["x-frame-options"] == "DENY", path
        assert headers["cache-control"] == "no-store", path
        assert not [name for name in headers if name.startswith("access-control")], path
        assert "Python" not in headers.get("server", ""), path
    assert bodies["/health"] == (200, {"status": "ok", "version": cm.__version__})
    assert bodies["/api/config"][1]["server"]["port"] == spoken.port
    assert bodies["/api/config"][1]["server"]["wsPort"] == spoken.ws_port
    assert bodies["/api/config"][1]["mode"] == "local"
    assert bodies["/api/sessions/routes"][1]["sessionId"] == "routes"
    assert bodies["/api/sessions/routes"][1]["counts"]["events"] == 2
    assert bodies[f"/api/events/{event['id']}"] == (200, event)
    assert bodies[f"/api/events/{event['id']}?session=routes&seq={event['seq']}"] == (200, event)
    for path, status in (("/api/nothing", 404), ("/api/events/none?session=routes", 404), ("/api/search?limit=0", 400),
                         ("/api/stats?utcOffset=x", 400)):  # fmt: skip
        assert bodies[path][0] == status
        assert bodies[path][1]["error"]


def test_a_wrong_method_is_told_which_one_is_right(spoken: RunningMonitor) -> None:
    origin = protocol_origin(spoken)
    for method, path in (("POST", "/api/status"), ("DELETE", "/api/sessions/x"), ("PUT", "/"), ("POST", "/index.html"),
                         ("PATCH", "/api/events"), ("OPTIONS", "/api/export")):  # fmt: skip
        status, headers, body = spoken.request(path, method, headers=origin)
        assert (method, path, status) == (method, path, 405)
        assert "GET" in headers["allow"]
        assert json.loads(body)["error"]
    status, headers, _ = spoken.request("/api/hooks")
    assert (status, headers["allow"]) == (405, "POST")
    assert spoken.request("/nowhere", "POST", headers=origin)[0] == 404


def test_a_head_request_gets_the_headers_without_the_body(spoken: RunningMonitor) -> None:
    for path in ("/", "/api/config", "/api/nothing", "/api/export?session=none"):
        status, headers, body = spoken.request(path)
        head_status, head_headers, head_body = spoken.request(path, "HEAD")
        assert (head_status, head_body) == (status, b"")
        for name in ("content-type", "content-length", "transfer-encoding", "content-security-policy"):
            assert head_headers.get(name) == headers.get(name), (path, name)


def test_one_connection_serves_many_requests(spoken: RunningMonitor) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", spoken.port, timeout=15)
    sockets = set()
    for path in ("/health", "/", "/api/status", "/api/events?limit=0", "/api/export?session=x", "/health"):
        connection.request("GET", path)
        connection.getresponse().read()
        sockets.add(id(connection.sock))
    assert len(sockets) == 1
    began = time.monotonic()
    for _ in range(50):
        connection.request("GET", "/health")
        connection.getresponse().read()
    assert time.monotonic() - began < 1.0, "no answer waits for the acknowledgement of a part of it (40 ms)"
    connection.close()


def protocol_policy(headers: dict[str, str]) -> dict[str, list[str]]:
    """Parse a Content-Security-Policy into its directives."""
    parts = [part.split() for part in headers["content-security-policy"].split(";")]
    assert len({part[0] for part in parts}) == len(parts)
    return {part[0]: part[1:] for part in parts}


def protocol_check_page(monitor: RunningMonitor) -> str:
    """Check that the page's policy fits what is in it; return the page."""
    status, headers, body = monitor.request("/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert headers["x-frame-options"] == "DENY"
    policy = protocol_policy(headers)
    for name in ("default-src", "form-action", "base-uri", "frame-ancestors", "trusted-types"):
        assert policy[name] == ["'none'"], name
    assert policy["require-trusted-types-for"] == ["'script'"]
    assert policy["img-src"] == ["'self'", "data:"]
    assert policy["connect-src"][0] == "'self'"
    assert f"ws://127.0.0.1:{monitor.ws_port}" in policy["connect-src"]
    assert not [source for source in policy["connect-src"][1:] if "127.0.0.1" not in source]
    page = body.decode("utf-8")
    for kind in ("script", "style"):
        elements = re.findall(rf"<{kind}\b([^>]*)>(.*?)</{kind}\s*>", page, re.S | re.I)
        assert len(elements) == 1, kind
        attributes, content = elements[0]
        assert not attributes.strip()
        digest = hashlib.sha256(content.encode("utf-8")).digest()
        expected = "'sha256-" + base64.b64encode(digest).decode() + "'"
        assert policy[f"{kind}-src"] == [expected], kind
    outside = re.sub(r"<(script|style)>.*?</\1>", "", page, flags=re.S)
    assert not re.search(r"\s(on\w+|style)\s*=", outside)
    return page


def test_the_page_comes_with_a_policy_that_fits_it(spoken: RunningMonitor) -> None:
    page = protocol_check_page(spoken)
    with open(os.path.join(ROOT, "index.html"), encoding="utf-8", newline="") as file:
        assert page == file.read()
    assert spoken.request("/index.html")[2] == page.encode()


def test_a_built_in_page_stands_in_for_a_missing_one(monitor: RunningMonitor) -> None:
    folder = monitor.home + '/a <b> "quoted" folder'
    os.mkdir(folder)
    for name in ("contextuate_monitor.py", "emit_event.py"):
        shutil.copy(os.path.join(ROOT, name), folder)
    monitor.program = folder + "/contextuate_monitor.py"
    monitor.start()
    page = protocol_check_page(monitor)
    assert "index.html" in page
    assert folder not in page  # its name cannot end the script
    with open(folder + "/index.html", "w", encoding="utf-8") as file:
        file.write("<!doctype html>\n<style>b{}</style><script>\nlet a;\n</script>")
    assert protocol_check_page(monitor).endswith("let a;\n</script>")  # seen without a restart


def protocol_get(host: str | None, *more: str, path: str = "/health", method: str = "GET") -> bytes:
    """Return the bytes of an HTTP request with this Host."""
    lines = [f"{method} {path} HTTP/1.1", *([f"Host: {host}"] if host is not None else []), *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def protocol_upgrade(host: str | None, *more: str) -> bytes:
    """Return the bytes of a handshake with this Host."""
    return protocol_head(("Host", host), more=more) + b"\r\n\r\n"


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("127.0.0.1:PORT", True), ("localhost:PORT", True), ("LocalHost:PORT", True), ("[::1]:PORT", True),
        ("127.0.0.1", False), ("localhost", False), (None, False), ("", False), ("127.0.0.1:1", False),
        ("127.0.0.1:OTHER", False), ("evil.example:PORT", False), ("127.0.0.1.evil.example:PORT", False),
        ("localhost.evil.example:PORT", False), ("evil@127.0.0.1:PORT", False), ("127.0.0.1:PORT:PORT", False),
        ("0.0.0.0:PORT", False), ("192.168.1.1:PORT", False), ("[::2]:PORT", False), ("localhost:PORT/x", False),
        ("2130706433:PORT", False), ("127.0.0.1:0PORT", None),
    ],
)  # fmt: skip
def test_a_host_that_is_not_ours_is_refused_on_both_ports(
    spoken: RunningMonitor, host: str | None, good: bool | None
) -> None:
    for port, other, build, success in (
        (spoken.port, spoken.ws_port, protocol_get, 200),
        (spoken.ws_port, spoken.port, protocol_upgrade, 101),
    ):
        given_host = host and host.replace("PORT", str(port)).replace("OTHER", str(other))
        status, _, body = protocol_exchange(port, build(given_host))
        if good is not None:
            assert status == (success if good else 421)
        if status == 421:
            assert json.loads(body)["error"]


def test_several_host_or_origin_headers_are_refused_on_both_ports(spoken: RunningMonitor) -> None:
    for port, build in ((spoken.port, protocol_get), (spoken.ws_port, protocol_upgrade)):
        host, origin = f"127.0.0.1:{port}", f"Origin: http://127.0.0.1:{spoken.port}"
        for more in ((f"Host: {host}",), ("Host: evil.example",), (origin, origin), (origin, "Origin: null")):
            assert protocol_exchange(port, build(host, *more))[0] == 400


@pytest.mark.parametrize(
    ("origin", "good"),
    [
        ("http://127.0.0.1:PORT", True), ("null", False), ("http://127.0.0.1", False), ("http://127.0.0.1:WS", False),
        ("http://127.0.0.1:1", False), ("https://127.0.0.1:PORT", False), ("http://evil.example", False),
        ("http://evil.example:PORT", False), ("http://sub.127.0.0.1:PORT", False),
        ("http://127.0.0.1:PORT.evil.example", False), ("http://127.0.0.1:PORT/", False),
        ("http://evil.example#http://127.0.0.1:PORT", False), ("file://", False), ("http://[::1]:PORT", False),
        ("chrome-extension://abcdef", False), ("http://127.0.0.1:PORT http://evil.example", False),
    ],
)  # fmt: skip
def test_another_sites_origin_is_refused_on_both_ports(
    spoken: RunningMonitor, origin: str, good: bool
) -> None:
    origin = origin.replace("PORT", str(spoken.port)).replace("WS", str(spoken.ws_port))
    for port, build, success in ((spoken.port, protocol_get, 200), (spoken.ws_port, protocol_upgrade, 101)):
        status, headers, _ = protocol_exchange(port, build(f"127.0.0.1:{port}", f"Origin: {origin}"))
        assert status == (success if good else 403)
        assert not [name for name, _ in headers if name.startswith("access-control")]


def test_sub_domains_of_localhost_are_other_sites(spoken: RunningMonitor) -> None:
    for port, build, success in ((spoken.port, protocol_get, 200), (spoken.ws_port, protocol_upgrade, 101)):
        for name, expected in (("localhost", success), ("evil.localhost", 403), ("evillocalhost", 403)):
            origin = f"Origin: http://{name}:{spoken.port}"
            assert protocol_exchange(port, build(f"localhost:{port}", origin))[0] == expected


def test_a_configured_host_is_served_with_its_origin_and_no_other(monitor: RunningMonitor) -> None:
    monitor.write_config({"server": {"allowedHosts": ["Monitor.example", "proxy.example:8443"]}})
    monitor.start()
    for port, build, success in ((monitor.port, protocol_get, 200), (monitor.ws_port, protocol_upgrade, 101)):
        for host, origin, status in (
            (f"monitor.example:{port}", None, success),
            (f"monitor.example:{port}", f"http://monitor.example:{monitor.port}", success),
            ("monitor.example", "https://monitor.example", success),
            ("proxy.example:8443", "https://proxy.example:8443", success),
            (f"monitor.example:{port}", f"http://127.0.0.1:{monitor.port}", 403),
            (f"monitor.example:{port}", "http://proxy.example:8443", 403),
            (f"monitor.example:{port}", "http://sub.monitor.example", 403),
            (f"sub.monitor.example:{port}", None, 421),
            ("proxy.example:8444", None, 421),
        ):
            more = (f"Origin: {origin}",) if origin else ()
            assert (host, origin, protocol_exchange(port, build(host, *more))[0]) == (host, origin, status)


def test_a_posted_hook_is_stored_before_it_is_answered(spoken: RunningMonitor) -> None:
    client = spoken.websocket(sessionIds=["posted"])
    body = json.dumps(payload("UserPromptSubmit", "posted", prompt="over HTTP"), indent=2).encode()
    status, headers, answer = spoken.request("/api/hooks", "POST", body, protocol_origin(spoken))
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(answer) == {}
    (line,) = protocol_lines(spoken, "posted")
    event = json.loads(line)
    assert (event["hookType"], event["data"]["message"]) == ("UserPromptSubmit", "over HTTP")
    assert client.events(1) == [event]
    client.close()


def test_a_post_needs_the_pages_origin_or_the_token(spoken: RunningMonitor) -> None:
    with open(spoken.home + "/token", encoding="ascii") as file:
        token = file.read().strip()
    body = json.dumps(payload("Stop", "post-origin")).encode()
    for headers, expected in (
        ({}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": f"http://127.0.0.1:{spoken.ws_port}"}, 403),
        ({"Origin": f"http://localhost:{spoken.port}"}, 403),
        ({"Authorization": "Bearer wrong"}, 403),
        ({"Authorization": f"Basic {token}"}, 403),
        ({"Origin": "https://evil.example", "Authorization": f"Bearer {token}"}, 403),
        ({"Cookie": f"contextuate_token_{spoken.port}={token}"}, 200),
        ({"Authorization": f"Bearer {token}"}, 200),
        (protocol_origin(spoken), 200),
    ):
        assert (headers, spoken.request("/api/hooks", "POST", body, headers)[0]) == (headers, expected)
        status, _, answer = spoken.request("/api/message", "POST", b'{"type":"send_test_event"}', headers)
        assert (headers, status) == (headers, expected), answer
    assert len(protocol_lines(spoken, "post-origin")) == 3


def protocol_post(monitor: RunningMonitor, **message: Any) -> tuple[int, dict[str, Any]]:
    """Post one message as the page might; return status and reply."""
    body = json.dumps(message).encode()
    status, _, answer = monitor.request("/api/message", "POST", body, protocol_origin(monitor))
    return status, json.loads(answer)


def test_a_posted_message_is_carried_out_and_answered(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("posted", 3))
    status, reply = protocol_post(spoken, type="get_events", sessionId="posted", limit=2, requestId=7)
    assert (status, reply["type"], reply["requestId"], reply["more"]) == (200, "events", 7, True)
    assert [event["data"]["message"] for event in reply["events"]] == ["posted 1", "posted 2"]
    assert protocol_post(spoken, type="rename_session", sessionId="posted", label="By post")[0] == 200
    assert spoken.get("/api/sessions/posted")["label"] == "By post"
    assert protocol_post(spoken, type="prune", dryRun=True)[1]["type"] == "pruned"
    assert protocol_post(spoken, type="delete_session", sessionId="posted")[0] == 200
    assert spoken.request("/api/sessions/posted")[0] == 404


@pytest.mark.parametrize(
    ("message", "words"),
    [({"type": "no such"}, "unknown type"), ({}, "unknown type"), ({"type": "get_events"}, "sessionId"),
     ({"type": "rename_session", "sessionId": "posted-nowhere", "label": "x"}, "sessionId"),
     ({"type": "reconnect_redis"}, "Redis"), ({"type": "search", "limit": -1}, "limit")],
)  # fmt: skip
def test_a_posted_message_that_cannot_be_carried_out_gets_400(
    spoken: RunningMonitor, message: dict[str, Any], words: str
) -> None:
    status, reply = protocol_post(spoken, **message)
    assert status == 400 and words in reply["error"], reply


@pytest.mark.parametrize("path", ["/api/hooks", "/api/message"])
@pytest.mark.parametrize(
    "body", [b"", b"garbage", b"[1]", b'"text"', b"null", b'{"a":1', b"{}{}", b"\xff\xfe", b"[" * 99999]
)
def test_garbage_that_is_posted_is_refused_and_not_stored(
    spoken: RunningMonitor, body: bytes, path: str
) -> None:
    seq = spoken.get("/api/status")["seq"]
    status, _, answer = spoken.request(path, "POST", body, protocol_origin(spoken))
    assert status == 400
    assert json.loads(answer)["error"]
    assert spoken.get("/api/status")["seq"] == seq


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (f"Content-Length: {ee.LINE_LIMIT_BYTES + 1}", 413), ("Content-Length: 999999999999", 413),
        ("Content-Length: -1", 400), ("Content-Length: 1e3", 400), ("Content-Length: +5", 400),
        ("Content-Length: 2\r\nContent-Length: 3", 400), ("Transfer-Encoding: chunked", 411),
    ],
)  # fmt: skip
def test_a_body_without_a_sensible_length_is_refused_before_it_is_read(
    spoken: RunningMonitor, header: str, expected: int
) -> None:
    origin = f"Origin: http://127.0.0.1:{spoken.port}"
    request = protocol_get(f"127.0.0.1:{spoken.port}", origin, header, path="/api/hooks", method="POST")
    status, _, body = protocol_exchange(spoken.port, request)
    assert status == expected
    assert json.loads(body)["error"]


def test_a_body_that_nobody_wants_is_not_taken_for_the_next_request(spoken: RunningMonitor) -> None:
    host = f"127.0.0.1:{spoken.port}"
    for path in ("/", "/index.html", "/health"):
        inner = protocol_get(host, path="/api/nothing")
        with socket.create_connection(("127.0.0.1", spoken.port), timeout=15) as sock:
            sock.sendall(
                protocol_get(host, f"Content-Length: {len(inner)}", path=path)
                + inner
                + protocol_get(host, "Connection: close")
            )
            stream = sock.makefile("rb").read()
        statuses = re.findall(rb"^HTTP/1\.1 (\d+) ", stream, re.M)
        assert b"404" not in statuses, path
        assert statuses in ([b"200", b"200"], [b"400"], [b"200"]), path


def test_an_old_client_gets_an_export_it_can_read(spoken: RunningMonitor) -> None:
    spoken.emit(*protocol_events("old", 3))
    request = f"GET /api/export?session=old HTTP/1.0\r\nHost: 127.0.0.1:{spoken.port}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", spoken.port), timeout=15) as sock:
        sock.sendall(request.encode())
        head, _, body = sock.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert body.splitlines() == protocol_lines(spoken, "old")


def test_with_auth_token_everyone_needs_it(monitor: RunningMonitor) -> None:
    monitor.write_config({"server": {"auth": "token"}})
    monitor.start()
    path = monitor.home + "/token"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with open(path, encoding="ascii") as file:
        token = file.read().strip()
    assert len(token) >= 32  # 192 bits in base64
    bearer = {"Authorization": f"Bearer {token}"}
    wrong = {"Authorization": f"Bearer {token[:-1]}{'y' if token[-1] == 'x' else 'x'}"}
    for address in (
        "/",
        "/index.html",
        "/health",
        "/api/status",
        "/api/config",
        "/api/events",
        "/api/export",
    ):
        status, _, body = monitor.request(address)
        assert status == 401, address
        assert json.loads(body)["error"]
        assert monitor.request(address, headers=wrong)[0] == 401
        assert monitor.request(address, headers={"Cookie": f"contextuate_token_{monitor.port}=x"})[0] == 401
        status, _, body = monitor.request(address, headers=bearer)
        assert status == 200, address
        assert token.encode() not in body, address
    host = f"127.0.0.1:{monitor.ws_port}"
    origin = f"Origin: http://127.0.0.1:{monitor.port}"
    for more, expected in (
        ((), 401),
        ((origin,), 401),
        (("Authorization: Bearer nonsense",), 401),
        ((f"Authorization: bearer {token}",), 101),
        ((origin, f"Cookie: a=b; contextuate_token_{monitor.port}={token}"), 101),
        (
            (
                f"Origin: http://evil.example:{monitor.port}",
                f"Cookie: contextuate_token_{monitor.port}={token}",
            ),
            403,
        ),
    ):
        assert (more, protocol_exchange(monitor.ws_port, protocol_upgrade(host, *more))[0]) == (
            more,
            expected,
        )


def test_a_link_with_the_token_is_exchanged_for_a_cookie(monitor: RunningMonitor) -> None:
    monitor.write_config({"server": {"auth": "token"}})
    monitor.start()
    link = re.search(r"http://\S+?/\?token=(\S+)", monitor.command("url").stdout)
    assert link
    token = link.group(1)
    status, headers, body = monitor.request(f"/?token={token}")
    assert (status, headers["location"], token.encode() in body) == (303, "/", False)
    name, *attributes = [part.strip() for part in headers["set-cookie"].split(";")]
    assert {"httponly", "samesite=strict", "path=/"} <= {attribute.lower() for attribute in attributes}
    assert not [attribute for attribute in attributes if attribute.lower().startswith("domain")]
    assert monitor.request("/", headers={"Cookie": name})[0] == 200
    assert monitor.request("/api/status", headers={"Cookie": f"other=1; {name}"})[0] == 200
    for wrong in ("/?token=", "/?token=x", f"/?token={token}x", f"/?token={token[:-1]}", "/?token=%ff%00"):
        status, headers, _ = monitor.request(wrong)
        assert (wrong, status) == (wrong, 401)
        assert "set-cookie" not in headers
    for host, expected in ((f"evil.example:{monitor.port}", 421), (f"127.0.0.1:{monitor.port}", 303)):
        assert protocol_exchange(monitor.port, protocol_get(host, path=f"/?token={token}"))[0] == expected
    for folder, _, names in os.walk(monitor.home):
        for file_name in names:
            if file_name != "token" and not file_name.endswith(".sock"):
                with open(os.path.join(folder, file_name), "rb") as file:
                    assert token.encode() not in file.read(), file_name


def test_open_to_the_network_without_a_token_is_refused_at_start(monitor: RunningMonitor) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        monitor.write_config({"server": {"auth": "off", "host": host}})
        done = monitor.command("start", "--no-open", check=False)
        assert done.returncode != 0
        assert "server.auth" in done.stderr
        assert not os.path.exists(monitor.home + "/monitor.run.json")
    monitor.write_config({"server": {"auth": "off"}})
    done = monitor.command("start", "--no-open", "--host", "0.0.0.0", check=False)
    assert done.returncode != 0
    monitor.start()  # on loopback it is allowed
    assert monitor.get("/health")["status"] == "ok"


@pytest.mark.parametrize(
    "path",
    [
        "/../token", "/../../etc/passwd", "/%2e%2e/token", "/..%2ftoken", "/token", "/monitor.run.json", "/index.html/../token",
        "/api/sessions/..%2f..%2ftoken", "/api/sessions/..%2ftoken/events", "/api/events/..%2f..%2ftoken",
        "/api/events/x?session=..%2f..%2ftoken", "/api/events/x?session=%2Fetc%2Fpasswd&seq=1", "/api/sessions/%00/events",
        "/api/sessions/*/events", "/api/sessions/..", "/api/sessions/%ff%fe", "/%00", "//etc/passwd", "/./", "/api//status",
        "/api/status/", "/emit_event.py", "/contextuate_monitor.py",
    ],
)  # fmt: skip
def test_no_path_leads_out_of_the_api(spoken: RunningMonitor, path: str) -> None:
    status, headers, body = spoken.request(path)
    assert status in (400, 404)
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:PORT/health", "http://evil.example/", "*", "health", "?x"]
)
def test_a_target_that_is_no_path_is_refused(spoken: RunningMonitor, target: str) -> None:
    host = f"127.0.0.1:{spoken.port}"
    request = protocol_get(host, path=target.replace("PORT", str(spoken.port)))
    assert protocol_exchange(spoken.port, request)[0] == 400


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"\r\n\x16\x03\x01\x02\0\x01\0\r\n\r\n", 400), (b"GET / HTTP/2.0\r\n\r\n", 505), (b"GET / FTP/1.1\r\n\r\n", 400),
     (b"BREW /pot HTTP/1.1\r\nHost: x\r\n\r\n", 501)],
)  # fmt: skip
def test_what_is_not_http_gets_an_error_in_json(spoken: RunningMonitor, data: bytes, expected: int) -> None:
    with socket.create_connection(("127.0.0.1", spoken.port), timeout=15) as sock:
        sock.sendall(data)
        stream = sock.makefile("rb").read()
    if stream:
        head, _, body = stream.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % expected)
        assert json.loads(body)["error"]
    assert spoken.get("/health")["status"] == "ok"


def test_an_export_is_the_stored_lines_with_its_filters(running: RunningMonitor) -> None:
    for number in range(1200):
        name = f"export-{number % 3}" if number < 60 else "export-0"
        event = {
            "eventType": "message",
            "sessionId": name,
            "timestamp": 1_000_000 + number,
            "data": {"n": number},
        }
        if number % 400 == 0:
            batch = []
        batch.append(event)
        if number % 400 == 399:
            running.emit(*batch)
    everything = protocol_lines(running)
    assert len(everything) == 1200

    def exported(query: str = "") -> list[bytes]:
        status, headers, body = running.request(f"/api/export{query}")
        assert (status, headers["content-type"]) == (200, "application/x-ndjson")
        assert "attachment" in headers["content-disposition"]
        assert body == b"" or body.endswith(b"\n")
        return body.splitlines()

    assert sorted(exported()) == sorted(everything)
    for session in ("export-0", "export-1"):
        assert exported(f"?session={session}") == protocol_lines(running, session)
        assert [line for line in exported() if json.loads(line)["sessionId"] == session] == protocol_lines(
            running, session
        )
    assert exported("?session=nobody") == []

    def within(start: int, end: int) -> list[bytes]:
        return sorted(line for line in everything if start <= json.loads(line)["timestamp"] < end)

    assert sorted(exported("?from=1000010&to=1000020")) == within(1_000_010, 1_000_020)
    assert len(within(1_000_010, 1_000_020)) == 10
    assert sorted(exported("?from=1000010")) == within(1_000_010, 1 << 60)
    assert sorted(exported("?to=1000020")) == within(0, 1_000_020)
    assert exported("?from=1000020&to=1000020") == []
    numbers = [
        json.loads(line)["data"]["n"] for line in exported("?session=export-1&from=1000010&to=1000020")
    ]
    assert numbers == [10, 13, 16, 19]
    for query, field in (
        ("from=x", "from"),
        ("to=-1", "to"),
        ("from=99999999999999999", "from"),
        ("to=", "to"),
    ):
        status, _, body = running.request(f"/api/export?{query}")
        assert (status, json.loads(body)["field"]) == (400, field)


def test_pages_of_events_lose_and_double_nothing_in_either_direction(running: RunningMonitor) -> None:
    for index in range(29):
        running.emit(payload("UserPromptSubmit", f"pages-{index % 2}", prompt=f"n {index}"))

    def back(path: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        more = True
        while more:
            before = f"&before={events[0]['seq']}" if events else ""
            page = running.get(f"{path}?limit=4{before}")
            assert set(page) == {"events", "more"}
            assert len(page["events"]) <= 4
            more = page["more"]
            events[:0] = page["events"]
        return events

    stored = running.stored_events()
    assert len(stored) == 29
    assert back("/api/events") == stored
    mine = [event for event in stored if event["sessionId"] == "pages-1"]
    assert back("/api/sessions/pages-1/events") == mine
    forward: list[dict[str, Any]] = []
    more = True
    while more:
        after = forward[-1]["seq"] if forward else 0
        page = running.get(f"/api/sessions/pages-1/events?limit=4&after={after}")
        more = page["more"]
        forward += page["events"]
    assert forward == mine
    forward, more = [], True
    while more:
        after = forward[-1]["seq"] if forward else 0
        page = running.get(f"/api/events?limit=4&after={after}")
        more = page["more"]
        forward += page["events"]
    assert forward == stored
    first, last = stored[2]["seq"], stored[6]["seq"]
    assert running.get(f"/api/events?after={first}&before={last}") == {"events": stored[3:6], "more": False}
    assert running.get(f"/api/events?after={stored[-1]['seq']}") == {"events": [], "more": False}
    between = running.get(f"/api/sessions/pages-1/events?after={mine[2]['seq']}&before={mine[6]['seq']}")
    assert between == {"events": mine[3:6], "more": False}
    assert running.get("/api/events?limit=29") == {"events": stored, "more": False}
    assert running.get("/api/events?limit=28") == {"events": stored[1:], "more": True}
    assert running.get("/api/events?before=1") == {"events": [], "more": False}
    assert running.request("/api/sessions/nobody/events")[0] == 404


@pytest.mark.parametrize("path", ["/api/events", "/api/sessions/limits/events"])
@pytest.mark.parametrize(
    ("query", "field"),
    [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=-1", "limit"), ("limit=ten", "limit"), ("limit=", "limit"),
     ("limit=1.5", "limit"), ("limit=1e2", "limit"), ("limit=+5", "limit"), ("before=x", "before"), ("before=-1", "before"),
     ("before=99999999999999999999", "before"), ("after=x", "after"), ("after=-1", "after"), ("after=", "after")],
)  # fmt: skip
def test_a_parameter_out_of_its_bounds_is_named(
    spoken: RunningMonitor, path: str, query: str, field: str
) -> None:
    spoken.emit(*protocol_events("limits", 1))
    status, _, body = spoken.request(f"{path}?{query}")
    answer = json.loads(body)
    assert (status, answer["field"]) == (400, field)
    assert field in answer["error"]
    for limit in (1, 1000):
        assert spoken.request(f"{path}?limit={limit}")[0] == 200


def test_the_configuration_tells_no_secret(spoken: RunningMonitor) -> None:
    with open(spoken.home + "/token", encoding="ascii") as file:
        token = file.read().strip()
    for path in ("/api/config", "/api/status", "/", "/api/sessions"):
        assert token.encode() not in spoken.request(path)[2]


# ---------------------------------------------------------------------------
# Sessions: what each event says about who works, who waits and who is gone
#
# Pure: events in, sessions out. Where the real client was recorded the recording is replayed; where it was not,
# a tale is told in the same shapes. What a user would call wrong comes first: a "working" that is none, and a
# person who is needed and not told.
# ---------------------------------------------------------------------------

SESSION_MACHINE = "box"


@dataclasses.dataclass
class SessionTale:
    """A book and a clock, and what clients say; every word returns the session as the API would give it."""

    book: cm.Sessions = dataclasses.field(default_factory=lambda: cm.Sessions(own_machine=SESSION_MACHINE))
    time: int = NOW_MS
    set_by: int = 0  # how far this machine's clock was set forward
    count: int = 0
    session: str = "s1"
    pid: int | None = None
    machine: str = SESSION_MACHINE

    def say(
        self, hook: str, *, agent: str = "", at: int | None = None, session: str = "", **fields: Any
    ) -> dict[str, Any]:
        """Let a hook payload arrive a second after the last one; `at`: it happened then and was overtaken."""
        self.time += 1000
        if agent:
            fields.update(agent_id=agent, agent_type="general-purpose")
        return self.tell(payload(hook, session or self.session, **fields), at)

    def tell(self, hook_payload: dict[str, Any], at: int | None = None) -> dict[str, Any]:
        """Let one payload arrive now."""
        event_id = f"e{self.count + 1}"
        wrapped = {"hook": hook_payload, "id": event_id, "machineId": self.machine, "pid": self.pid}
        return self.apply({**wrapped, "timestamp": self.time if at is None else at})

    def apply(self, given: dict[str, Any]) -> dict[str, Any]:
        """Let anything arrive now, as the monitor would take it."""
        self.count += 1
        event = ee.build_event(given, self.time, self.machine)
        return self.book.to_json(self.book.apply({"seq": self.count, "received": self.time, **event}))

    def call(self, tool: str, call_id: str, agent: str = "", **tool_input: Any) -> dict[str, Any]:
        """Begin a tool call."""
        return self.say("PreToolUse", agent=agent, tool_name=tool, tool_input=tool_input, tool_use_id=call_id)

    def ask(self, tool: str, agent: str = "", at: int | None = None, **tool_input: Any) -> dict[str, Any]:
        """Ask for a permission; such requests name no call."""
        return self.say("PermissionRequest", agent=agent, at=at, tool_name=tool, tool_input=tool_input)

    def result(
        self, tool: str, call_id: str, agent: str = "", response: Any = "", **tool_input: Any
    ) -> dict[str, Any]:
        """End a tool call."""
        return self.say(
            "PostToolUse", agent=agent, tool_name=tool, tool_input=tool_input, tool_use_id=call_id,
            tool_response=response,
        )  # fmt: skip

    def batch(self, *calls: tuple[str, str, Any], agent: str = "") -> dict[str, Any]:
        """End a round of (tool, id, response)."""
        listed = [
            {"tool_name": tool, "tool_input": {}, "tool_use_id": call_id, "tool_response": response}
            for tool, call_id, response in calls
        ]
        return self.say("PostToolBatch", agent=agent, tool_calls=listed)

    def notify(self, kind: str | None, message: str = "Claude needs you") -> dict[str, Any]:
        """Notify, as new clients with a type, as old ones without."""
        return self.say(
            "Notification", message=message, **({} if kind is None else {"notification_type": kind})
        )

    def stop(self, *running: str, **fields: Any) -> dict[str, Any]:
        """End the turn while the named tasks run on."""
        tasks = [
            {"id": name, "type": "subagent", "status": "running", "description": name} for name in running
        ]
        return self.say("Stop", stop_hook_active=False, background_tasks=tasks, **fields)

    def prompt(self, words: str = "go on") -> dict[str, Any]:
        """Say what a person typed."""
        return self.say("UserPromptSubmit", prompt=words)

    def task_ended(self, task: str, status: str = "completed") -> dict[str, Any]:
        """Let the client tell itself that a background task is over."""
        words = (
            f"<task-notification>\n<task-id>{task}</task-id>\n<status>{status}</status>\n</task-notification>"
        )
        return self.prompt(words)

    def launch(self, agent: str, call_id: str, by: str = "", description: str = "inner job") -> None:
        """Start a background agent: call, start, result."""
        self.call("Agent", call_id, by, description=description, prompt="do it")
        self.say("SubagentStart", agent=agent)
        launched = {"isAsync": True, "status": "async_launched", "agentId": agent}
        self.result("Agent", call_id, by, launched, description=description, prompt="do it")

    def now(self) -> dict[str, Any]:
        """Return the session as it stands."""
        return self.book.to_json(self.book.sessions[self.session])

    def wait(self, milliseconds: int) -> dict[str, Any]:
        """Let time pass."""
        self.time += milliseconds
        self.tick()
        return self.now()

    def tick(self) -> list[str]:
        """Look at the clock; return the ids of the sessions that changed."""
        changed = self.book.tick(self.time, self.time - self.set_by)
        return [session.session_id for session in changed]


def session_tale(**fields: Any) -> SessionTale:
    """Begin a session with a prompt."""
    tale = SessionTale(**fields)
    tale.say("SessionStart", source="startup", model="claude-opus-5-5")
    tale.prompt("make the cart work")
    return tale


def session_events(name: str) -> list[dict[str, Any]]:
    """Build the events of a recording, a second apart."""
    return [
        {
            "seq": number,
            "received": NOW_MS + number * 1000,
            **ee.build_event(
                {"hook": told, "id": f"{name}-{number}", "timestamp": NOW_MS + number * 1000}, NOW_MS, SESSION_MACHINE
            ),
        }
        for number, told in enumerate(recorded(name), 1)
    ]  # fmt: skip


def session_replay(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every session after these events, in order of their start."""
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in events:
        book.apply(event)
    return sorted((book.to_json(each) for each in book.sessions.values()), key=lambda each: each["startTime"])


def session_steps(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Replay a recording; yield each event and its session after it."""
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in session_events(name):
        yield event, book.to_json(book.apply(event))


def session_after(name: str, hook: str, which: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a recording's nth event of a hook, and the session right after it."""
    return [(event, told) for event, told in session_steps(name) if event["hookType"] == hook][which]


def session_open(told: dict[str, Any]) -> list[str]:
    """Return the tools that a session shows as running."""
    return [call["toolName"] for call in told["openCalls"]]


def session_agent(told: dict[str, Any], agent_id: str) -> dict[str, Any]:
    """Return one agent of a session."""
    return next(agent for agent in told["agents"] if agent["agentId"] == agent_id)


# Recordings ----------------------------------------------------------------

# Recording → for each session: state, why it ended, open calls, agents (label, parent's label), human prompts,
# calls shown as interrupted, failed calls.
SESSION_ENDS = {
    "apierror529": [("ended", "other", [], [], 1, 0, 0)],
    "bgbash": [("ended", "other", [], [], 1, 0, 0)],
    "failing": [("ended", "other", [], [], 1, 0, 6)],
    "i-clear": [("ended", "clear", [], [], 1, 0, 0), ("ended", "prompt_input_exit", [], [], 2, 0, 0)],
    "i-interrupt": [("ended", "prompt_input_exit", [], [], 2, 1, 0)],
    "i-misc": [("ended", "prompt_input_exit", [], [("inner job", None)], 2, 0, 1)],
    "i-perm": [("ended", "prompt_input_exit", [], [], 1, 1, 0)],
    "i-sigKILL": [("working", None, ["Bash"], [], 1, 0, 0)],
    "large": [("ended", "other", [], [], 1, 0, 0)],
    "mcp": [("ended", "other", [], [], 1, 0, 1)],
    "nested": [("ended", "other", [], [("outer job", None), ("inner job", "outer job")], 1, 0, 1)],
    "p-perm": [("ended", "other", [], [], 1, 0, 2)],
    "parallel": [("ended", "other", [], [("left job", None), ("right job", None)], 1, 0, 0)],
    "paralleltools": [("ended", "other", [], [], 1, 0, 0)],
    "simple": [("ended", "other", [], [], 1, 0, 0)],
    "subagent": [("ended", "other", [], [("inner job", None)], 1, 0, 2)],
    "subagent-default": [("ended", "other", [], [("inner job", None)], 1, 0, 1)],
    "surrogate": [("ended", "other", [], [], 1, 0, 0)],
    "tasks": [("ended", "other", [], [], 1, 0, 0)],
    "thinking": [("ended", "other", [], [], 1, 0, 0)],
    "unicode": [("ended", "other", [], [], 1, 0, 0)],
    "v1.0.128-subagent": [("ended", "other", [], [], 1, 1, 0)],
    "v2.0.77-subagent": [("ended", "other", [], [], 1, 1, 0)],
    "v2.1.112-subagent": [("ended", "other", [], [("inner job", None)], 1, 0, 2)],
    "worktree": [("ended", "other", [], [("wt job", None)], 1, 0, 1)],
}


def session_end_of(told: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the table of ends says of a session."""
    labels = {agent["agentId"]: agent["label"] for agent in told["agents"]}
    counts = told["counts"]
    return (
        told["state"],
        told["reason"] and told["reason"]["detail"],
        session_open(told),
        [(agent["label"], labels.get(agent["parentAgentId"])) for agent in told["agents"]],
        counts["prompts"],
        counts["interrupted"],
        counts["toolErrors"],
    )


def test_the_table_of_session_ends_has_every_recording():
    assert sorted(SESSION_ENDS) == recording_names()


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_every_recording_ends_in_a_sensible_state(name):
    assert [session_end_of(told) for told in session_replay(session_events(name))] == SESSION_ENDS[name]


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_a_recorded_sessions_counts_are_those_of_its_payloads(name):
    expected = []
    payloads = recorded(name)
    for session_id in dict.fromkeys(told["session_id"] for told in payloads):
        mine = [told for told in payloads if told["session_id"] == session_id]
        hooks = collections.Counter(told["hook_event_name"] for told in mine)
        named, ended_well, failed, batched = set(), set(), set(), set()
        for told in mine:
            kinds = {"PostToolUse": ended_well, "PostToolUseFailure": failed}
            if "tool_use_id" in told:
                named.add(told["tool_use_id"])
                kinds.get(told["hook_event_name"], set()).add(told["tool_use_id"])
            batched.update(call["tool_use_id"] for call in told.get("tool_calls", ()))
        unnamed = sum(told["hook_event_name"] == "PreToolUse" and "tool_use_id" not in told for told in mine)
        prompts = [told["prompt"] for told in mine if told["hook_event_name"] == "UserPromptSubmit"]
        expected.append(
            {
                "events": sum(hooks.values()),
                "toolCalls": len(named | batched) + unnamed,
                # What only its round ended never ran: unknown tool, bad input, a denial.
                "toolErrors": len(failed | (batched - ended_well)),
                "prompts": sum("task-notification" not in words for words in prompts),
            }
        )
    told = session_replay(session_events(name))
    assert [{key: each["counts"][key] for key in expected[0]} for each in told] == expected


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_a_recorded_agents_counts_add_up(name):
    payloads = recorded(name)
    for told in session_replay(session_events(name)):
        for agent in told["agents"]:
            mine = [each for each in payloads if each.get("agent_id") == agent["agentId"]]
            hooks = collections.Counter(each["hook_event_name"] for each in mine)
            assert agent["counts"] == {
                "events": len(mine), "toolCalls": hooks["PreToolUse"], "toolErrors": hooks["PostToolUseFailure"]
            }  # fmt: skip
            assert agent["state"] == "ended" and agent["endTime"] >= agent["startTime"]


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_at_every_step_of_a_recording_the_session_makes_sense(name):
    for event, told in session_steps(name):
        agents = {agent["agentId"]: agent for agent in told["agents"]}
        assert told["state"] in ("waiting", "working", "idle", "failed", "ended"), event
        assert (told["reason"] is not None) == (told["state"] in ("waiting", "failed", "ended")), event
        assert (told["endTime"] is not None) == (told["state"] == "ended"), event
        assert told["lastEventTime"] == event["timestamp"] and told["startTime"] <= told["stateSince"], event
        assert all(call["agentId"] is None or call["agentId"] in agents for call in told["openCalls"]), event
        if told["openCalls"]:
            assert told["state"] in ("working", "waiting") and told["activity"], event
        elif not event["data"].get("background_tasks"):
            assert told["activity"] in ("", "background: bg", "background: inner job"), event
        if any(agent["state"] != "ended" for agent in agents.values()):
            assert told["state"] in ("working", "waiting"), event
        for agent in agents.values():
            assert agent["parentAgentId"] is None or agent["parentAgentId"] in agents, event
        json.dumps(told)


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_replaying_a_recording_gives_the_same_sessions(name):
    first = session_replay(session_events(name))
    again = session_replay(json.loads(json.dumps(session_events(name))))
    assert json.dumps(first) == json.dumps(again)


def test_replaying_files_gives_what_being_there_gave():
    # Live, time passes between events: the session was quiet. A restart reads the files in one go.
    live, restarted = session_tale(), session_tale()
    live.call("Bash", "t1", command="make")
    restarted.call("Bash", "t1", command="make")
    assert live.wait(300_000)["state"] == "quiet"
    restarted.time += 300_000
    assert live.result("Bash", "t1") == restarted.result("Bash", "t1")


# Permission ----------------------------------------------------------------


def test_a_permission_wait_names_tool_command_and_since_when():
    request, told = session_after("i-perm", "PermissionRequest")
    assert told["state"] == "waiting" and told["stateSince"] == request["timestamp"]
    assert told["reason"] == {
        "kind": "permission",
        "tool": "Bash",
        "detail": request["data"]["toolInput"]["command"],
        "since": request["timestamp"],
    }
    request, told = session_after("i-perm", "PermissionRequest", 1)
    assert (told["reason"]["tool"], told["reason"]["detail"]) == ("Write", "perm.txt")


def test_a_notification_repeats_a_permission_request_and_neither_ends_nor_renews_it():
    request, before = session_after("i-perm", "PermissionRequest")
    _, after = session_after("i-perm", "Notification")
    assert after["reason"] == before["reason"] and after["stateSince"] == request["timestamp"]


def test_a_granted_permission_ends_with_the_tools_result():
    _, told = session_after("i-perm", "PostToolUse")
    assert (told["state"], told["reason"], told["openCalls"]) == ("working", None, [])


def test_a_permission_denied_in_print_mode_ends_with_the_batch():
    for which in (0, 1):
        assert session_after("p-perm", "PermissionRequest", which)[1]["state"] == "waiting"
        _, told = session_after("p-perm", "PostToolBatch", which)
        assert (told["state"], told["openCalls"]) == ("working", [])
        assert told["counts"]["toolErrors"] == which + 1, "a denied call did not succeed"


@pytest.mark.parametrize(
    "end", ["PostToolUse", "PostToolUseFailure", "PermissionDenied", "PostToolBatch", "Stop", "StopFailure"]
)
def test_a_permission_wait_ends_with_any_later_event_of_the_same_agent(end):
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    assert tale.ask("Bash", command="make")["state"] == "waiting"
    told = tale.say(end, tool_name="Bash", tool_input={"command": "make"}, tool_use_id="t1", tool_calls=[])
    assert told["state"] != "waiting"


@pytest.mark.parametrize(
    "hook",
    ["Notification", "InstructionsLoaded", "ConfigChange", "MessageDisplay", "TaskCreated", "CwdChanged"],
)
def test_what_comes_by_itself_does_not_end_a_permission_wait(hook):
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    before = tale.ask("Bash", command="make")
    after = tale.say(hook, message="x", notification_type="auth_success")
    assert after["reason"] == before["reason"]


@pytest.mark.parametrize("other", ["Read", "Bash"])
def test_a_parallel_calls_result_does_not_end_a_permission_wait(other):
    tale = session_tale()
    tale.call(other, "t1", command="ls")
    tale.call("Bash", "t2", command="make install")
    tale.ask("Bash", command="make install")
    told = tale.result(other, "t1", command="ls")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make install"
    assert tale.result("Bash", "t2", command="make install")["state"] == "working"


def test_a_call_of_the_round_that_began_after_the_request_does_not_end_a_permission_wait():
    tale = session_tale()
    tale.call("WebFetch", "t1", url="https://one.example")
    tale.ask("WebFetch", url="https://one.example")
    assert tale.call("Read", "t2", file_path="/w/a")["state"] == "waiting"
    assert tale.result("Read", "t2", file_path="/w/a")["state"] == "waiting"
    assert tale.result("WebFetch", "t1", url="https://one.example")["state"] == "working"


def test_a_request_that_overtook_its_call_ends_with_it():
    tale = session_tale()
    tale.ask("Bash", command="make")
    tale.call("Bash", "t1", command="make")
    assert tale.result("Bash", "t1", command="make")["state"] == "working"


@pytest.mark.parametrize("hook", ["Stop", "StopFailure", "PostToolUseFailure"])
def test_what_the_end_of_the_session_overtook_does_not_bring_it_back(hook):
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    tale.say("SessionEnd", reason="other")
    told = tale.say(
        hook, tool_name="Bash", tool_use_id="t1", tool_input={"command": "make"}, error="rate_limit"
    )
    assert told["state"] == "ended" and told["openCalls"] == []
    assert tale.say("SessionStart", source="resume")["state"] == "idle"


def test_what_closes_ends_nothing_that_began_after_it():
    tale = session_tale()
    tale.launch("ag1", "t1")
    tale.call("Bash", "t2", "ag1", command="make test")
    tale.stop("ag1")
    for hook in ("Stop", "SessionStart", "UserPromptSubmit", "SessionEnd"):
        tale.wait(10_000)  # long after, so that it is late
        told = tale.say(hook, at=NOW_MS - 3_600_000, prompt="of long ago", source="startup", reason="other")
        assert [call["toolName"] for call in told["openCalls"]] == ["Bash"], hook
        assert [agent["state"] for agent in told["agents"]] == ["working"], hook
    assert told["counts"]["interrupted"] == 0


def test_a_session_that_is_resumed_on_another_machine_is_that_ones():
    tale = session_tale(pid=4711)
    tale.say("SessionEnd", reason="other")
    tale.machine, tale.pid = "laptop", 999_999
    tale.say("SessionStart", source="resume")
    told = tale.prompt()
    assert (told["state"], told["machineId"], told["pid"]) == ("working", "laptop", 999_999)
    assert not any(it.pid and it.machine_id == SESSION_MACHINE for it in tale.book.sessions.values())
    tale.machine, tale.pid = SESSION_MACHINE, 4711
    assert tale.say("Stop", at=NOW_MS)["machineId"] == "laptop", "that is from before"


def test_a_session_that_goes_on_in_a_new_container_is_not_silent():
    tale = session_tale(machine="container1")
    tale.say("SessionEnd", reason="other")
    tale.time += 13 * 3_600_000
    tale.machine = "container2"
    tale.say("SessionStart", source="resume")
    tale.prompt()
    assert tale.wait(1000)["state"] == "working"


def test_no_session_stands_below_itself_whatever_is_told_of_parents():
    tale = session_tale(session="A")
    tale.say("SessionEnd", reason="clear")
    tale.say("SessionStart", session="B", source="clear")
    book = tale.book
    parent = {"eventType": "session_meta", "hookType": "Monitor", "sessionId": "B"}
    tale.apply({**parent, "data": {"action": "set_parent", "parentSessionId": "A"}})
    tale.say("SessionEnd", session="B", reason="resume")
    tale.say("SessionStart", source="resume")
    assert (book.sessions["A"].parent_id, book.sessions["B"].parent_id) == (None, "A")
    assert (book.sessions["A"].continued_from, book.sessions["B"].continued_from) == (None, "A")
    for child, above in (("C", "D"), ("D", "E"), ("E", "C")):
        said = {"eventType": "user_prompt", "sessionId": child, "parentSessionId": above}
        tale.apply({**said, "timestamp": tale.time, "data": {}})
    assert [book.sessions[name].parent_id for name in "CDE"] == ["D", "E", None]


def test_a_parallel_failure_does_not_end_a_permission_wait():
    tale = session_tale()
    tale.call("Bash", "t1", command="false")
    tale.call("Bash", "t2", command="make install")
    tale.ask("Bash", command="make install")
    told = tale.say(
        "PostToolUseFailure", tool_name="Bash", tool_input={"command": "false"}, tool_use_id="t1", error="1"
    )
    assert told["state"] == "waiting"


def test_of_two_requests_the_first_is_shown_then_the_second():
    tale = session_tale()
    tale.call("WebFetch", "t1", url="https://one.example")
    tale.call("WebFetch", "t2", url="https://two.example")
    first = tale.ask("WebFetch", url="https://one.example")
    both = tale.ask("WebFetch", url="https://two.example")
    assert both["reason"] == first["reason"], "the dialog on the screen is the first one"
    told = tale.result("WebFetch", "t1", url="https://one.example")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "https://two.example"
    assert tale.result("WebFetch", "t2", url="https://two.example")["state"] == "working"


def test_of_two_requests_the_second_answered_leaves_the_first():
    tale = session_tale()
    tale.call("WebFetch", "t1", url="https://one.example")
    tale.call("WebFetch", "t2", url="https://two.example")
    tale.ask("WebFetch", url="https://one.example")
    tale.ask("WebFetch", url="https://two.example")
    told = tale.result("WebFetch", "t2", url="https://two.example")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "https://one.example"


def test_another_agents_events_do_not_end_an_agents_permission_wait():
    tale = session_tale()
    for agent, call in (("a1", "t1"), ("a2", "t2")):
        tale.launch(agent, call)
    tale.call("Bash", "t3", "a1", command="rm -r build")
    told = tale.ask("Bash", "a1", command="rm -r build")
    assert session_agent(told, "a1")["state"] == "waiting" and session_agent(told, "a2")["state"] == "working"
    tale.call("Bash", "t4", "a2", command="ls")
    told = tale.result("Bash", "t4", "a2", command="ls")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "rm -r build"
    assert tale.stop("a1", "a2")["state"] == "waiting"
    told = tale.result("Bash", "t3", "a1", command="rm -r build")
    assert told["state"] == "working" and session_agent(told, "a1")["state"] == "working"


def test_a_permission_wait_ends_when_its_tool_ran_whoever_says_so():
    # Older clients ask for a subagent's permission in the main agent's name.
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="make")
    assert tale.ask("Bash", command="make")["state"] == "waiting"
    assert tale.result("Bash", "t2", "a1", command="make")["state"] == "working"


def test_a_stopped_agent_waits_for_nobody():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    tale.ask("Bash", "a1", command="make")
    told = tale.say("SubagentStop", agent="a1", background_tasks=[])
    assert told["state"] == "working" and told["openCalls"] == []


def test_a_permission_is_told_before_an_idle_prompt():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.stop("a1")
    assert tale.notify("idle_prompt")["reason"]["kind"] == "input"
    tale.call("Bash", "t2", "a1", command="make")
    told = tale.ask("Bash", "a1", command="make")
    assert told["state"] == "waiting" and told["reason"]["kind"] == "permission"


def test_an_old_clients_notification_without_a_type_is_a_permission_wait():
    tale = session_tale()
    tale.say("PreToolUse", tool_name="Bash", tool_input={"command": "make"})
    told = tale.notify(None, "Claude needs your permission to use Bash")
    assert (told["reason"]["kind"], told["reason"]["tool"], told["reason"]["detail"]) == (
        "permission",
        "Bash",
        "make",
    )
    told = tale.say("PostToolUse", tool_name="Bash", tool_input={"command": "make"}, tool_response="")
    assert (told["state"], told["openCalls"]) == ("working", [])


def test_an_old_clients_notification_names_the_tool_that_it_names():
    tale = session_tale()
    tale.say("PreToolUse", tool_name="Bash", tool_input={"command": "make"})
    tale.say("PreToolUse", tool_name="Read", tool_input={"file_path": "/etc/hosts"})
    told = tale.notify(None, "Claude needs your permission to use Bash")
    assert (told["reason"]["tool"], told["reason"]["detail"]) == ("Bash", "make")
    told = tale.say("PostToolUse", tool_name="Read", tool_input={"file_path": "/etc/hosts"}, tool_response="")
    assert told["state"] == "waiting", "only the file was read"


def test_an_old_clients_notification_without_a_type_is_an_idle_prompt():
    tale = session_tale()
    told = tale.notify(None, "Claude is waiting for your input")
    assert (told["state"], told["reason"]["kind"]) == ("waiting", "input")


@pytest.mark.parametrize("kind", ["auth_success", "elicitation_response", "something_new"])
def test_other_notifications_ask_for_nobody(kind):
    assert session_tale().notify(kind, "Signed in")["state"] == "working"


# Questions -----------------------------------------------------------------


def test_a_question_to_the_user_waits_until_it_is_answered():
    states = [(event["hookType"], told) for event, told in session_steps("i-misc")][3:8]
    assert [hook for hook, _ in states] == [
        "PreToolUse",
        "PermissionRequest",
        "Notification",
        "PostToolUse",
        "PostToolBatch",
    ]
    for _, told in states[:3]:
        reason = told["reason"]
        assert (reason["kind"], reason["tool"], reason["detail"]) == (
            "question",
            "AskUserQuestion",
            "Red or blue?",
        )
    assert states[3][1]["state"] == "working"


def test_a_plan_waits_for_approval_in_its_own_words():
    tale = session_tale()
    told = tale.call("ExitPlanMode", "t1", plan="Add a cart\n\n1. model\n2. view")
    assert told["reason"]["kind"] == "question"
    told = tale.ask("ExitPlanMode", plan="Add a cart\n\n1. model\n2. view")
    assert (told["state"], told["reason"]["kind"], told["reason"]["tool"]) == (
        "waiting",
        "question",
        "ExitPlanMode",
    )
    assert told["reason"]["detail"].startswith("Add a cart")
    assert tale.result("ExitPlanMode", "t1")["state"] == "working"


def test_an_elicitation_waits_until_it_is_answered():
    asked, told = session_after("mcp", "Elicitation")
    assert told["state"] == "waiting"
    assert told["reason"] == {
        "kind": "question", "tool": "demo", "detail": "Your name?", "since": asked["timestamp"]
    }  # fmt: skip
    _, told = session_after("mcp", "ElicitationResult")
    assert told["state"] == "working"
    _, told = session_after("mcp", "Notification")
    assert told["state"] == "working", "the notification of the answer is no question"


def test_a_parallel_calls_result_does_not_end_a_question():
    tale = session_tale()
    tale.call("Bash", "t1", command="npm test")
    tale.call("mcp__demo__ask", "t2", text="x")
    tale.say("Elicitation", mcp_server_name="demo", message="Your name?", mode="form")
    assert tale.result("Bash", "t1", command="npm test")["state"] == "waiting"
    assert tale.say("ElicitationResult", mcp_server_name="demo", action="accept")["state"] == "working"
    tale.call("Read", "t3", file_path="x")
    tale.call("AskUserQuestion", "t4", questions=[{"question": "Red?"}])
    assert tale.result("Read", "t3", file_path="x")["state"] == "waiting"
    assert tale.result("AskUserQuestion", "t4")["state"] == "working"


def test_of_two_servers_questions_each_is_ended_by_its_own_answer():
    tale = session_tale()
    tale.call("mcp__one__ask", "t1", text="x")
    tale.call("mcp__two__ask", "t2", text="y")
    tale.say("Elicitation", mcp_server_name="one", message="Your name?", mode="form")
    tale.say("Elicitation", mcp_server_name="two", message="Your colour?", mode="form")
    told = tale.say("ElicitationResult", mcp_server_name="one", action="decline")
    assert (told["state"], told["reason"]["tool"], told["reason"]["detail"]) == (
        "waiting",
        "two",
        "Your colour?",
    )
    assert tale.say("ElicitationResult", mcp_server_name="two", action="accept")["state"] == "working"


def test_a_question_of_a_subagents_server_is_not_ended_by_the_main_agents_progress():
    tale = session_tale()
    tale.launch("a1", "t1")
    told = tale.say("Elicitation", agent="a1", mcp_server_name="demo", message="Open this page?", mode="url")
    assert (told["state"], told["reason"]["detail"]) == ("waiting", "Open this page?")
    assert session_agent(told, "a1")["state"] == "waiting"
    tale.call("Read", "t2", file_path="x")
    assert tale.result("Read", "t2", file_path="x")["state"] == "waiting"
    told = tale.say("ElicitationResult", agent="a1", mcp_server_name="demo", action="cancel")
    assert (told["state"], session_agent(told, "a1")["state"]) == ("working", "working")


def test_a_server_that_asks_while_nobody_answers_is_over_with_its_turn():
    tale = session_tale()
    tale.call("mcp__demo__ask", "t1", text="x")
    tale.say("Elicitation", mcp_server_name="demo", message="Your name?", mode="form")
    assert tale.stop()["state"] == "idle"


@pytest.mark.parametrize("sign", ["UserPromptSubmit", "idle_prompt", "Stop"])
def test_a_plan_that_was_not_approved_needs_nobody_after_the_next_sign(sign):
    tale = session_tale()
    tale.call("ExitPlanMode", "t1", plan="Add a cart")
    assert tale.ask("ExitPlanMode", plan="Add a cart")["reason"]["kind"] == "question"
    if sign == "idle_prompt":
        told = tale.notify("idle_prompt")
        assert told["reason"]["kind"] == "input"
    else:
        told = tale.prompt("another way") if sign == "UserPromptSubmit" else tale.stop()
        assert told["reason"] is None
    assert told["openCalls"] == []


def test_a_denied_permission_closes_its_call_as_failed_and_says_why():
    tale = session_tale()
    tale.call("Bash", "t1", command="rm -rf /")
    told = tale.say("PermissionDenied", tool_name="Bash", tool_input={"command": "rm -rf /"}, tool_use_id="t1",
        reason="destructive")  # fmt: skip
    assert (told["state"], told["openCalls"], told["counts"]["toolErrors"]) == ("working", [], 1)
    again = tale.batch(("Bash", "t1", "denied"))
    assert again["counts"]["toolErrors"] == 1, "its round says the same once more"


def test_a_denial_leaves_the_other_permission_that_is_asked_for():
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    tale.call("Bash", "t2", command="rm -rf build")
    tale.ask("Bash", command="make")
    tale.ask("Bash", command="rm -rf build")
    told = tale.say("PermissionDenied", tool_name="Bash", tool_input={"command": "make"}, tool_use_id="t1")
    assert (told["state"], told["reason"]["detail"]) == ("waiting", "rm -rf build")
    told = tale.say(
        "PermissionDenied", tool_name="Bash", tool_input={"command": "rm -rf build"}, tool_use_id="t2"
    )
    assert (told["state"], told["openCalls"]) == ("working", [])


def test_an_idle_teammate_needs_nobody_and_moves_nothing():
    for before in ("working", "waiting", "idle"):
        tale = session_tale()
        if before == "waiting":
            tale.ask("Bash", command="ls")
        elif before == "idle":
            tale.stop()
        state, since = tale.now()["state"], tale.now()["stateSince"]
        told = tale.say("TeammateIdle", teammate_name="reviewer", team_name="shop")
        assert (told["state"], told["stateSince"], told["agents"]) == (state, since, []) and state == before


def test_a_teammates_tasks_are_no_prompts_and_no_agents():
    tale = session_tale()
    tale.say("TaskCreated", task_id="1", task_subject="Review", teammate_name="reviewer")
    told = tale.say("TaskCompleted", task_id="1", task_subject="Review", teammate_name="reviewer")
    assert (told["state"], told["agents"], told["counts"]["prompts"]) == ("working", [], 1)


def test_the_main_thread_of_an_agent_session_is_no_subagent():
    tale = SessionTale()
    tale.say("SessionStart", source="startup", agent_type="reviewer")
    tale.say("UserPromptSubmit", prompt="review it", agent_type="reviewer")
    told = tale.say(
        "PreToolUse", tool_name="Read", tool_use_id="t1", tool_input={"file_path": "a"}, agent_type="reviewer"
    )
    assert (told["state"], told["agents"], told["openCalls"][0]["agentId"]) == ("working", [], None)
    assert tale.say("Stop", agent_type="reviewer")["state"] == "idle"


def test_an_agent_in_a_worktree_does_not_move_its_session_there():
    directories = {event["cwd"] for event in recorded("worktree")}
    assert len(directories) == 2
    for event, told in session_steps("worktree"):
        assert told["workingDirectory"] == "/home/dev/acme-shop", event


# Idle prompt, Esc and rejections -------------------------------------------


def test_an_idle_prompt_waits_for_input_until_the_next_prompt():
    notified, told = session_after("i-misc", "Notification", 1)
    assert told["state"] == "waiting"
    assert told["reason"] == {
        "kind": "input", "tool": None, "detail": "Claude is waiting for your input", "since": notified["timestamp"]
    }  # fmt: skip
    tale = session_tale()
    tale.stop()
    tale.notify("idle_prompt")
    assert tale.prompt()["state"] == "working"


def test_esc_is_seen_at_the_next_prompt():
    _, told = session_after("i-interrupt", "UserPromptSubmit", 1)
    assert (told["state"], told["openCalls"], told["counts"]["interrupted"]) == ("working", [], 1)
    assert told["activity"] == ""


def test_esc_is_seen_at_the_idle_prompt():
    tale = session_tale()
    tale.call("Bash", "t1", command="sleep 25")
    told = tale.notify("idle_prompt", "Claude is waiting for your input")
    assert (told["state"], told["reason"]["kind"]) == ("waiting", "input")
    assert (told["openCalls"], told["counts"]["interrupted"], told["activity"]) == ([], 1, "")


@pytest.mark.parametrize("sign", ["idle", "prompt"])
def test_a_rejected_permission_is_seen_at_the_idle_prompt_or_the_next_prompt(sign):
    tale = session_tale()
    tale.call("Write", "t1", file_path="x")
    tale.ask("Write", file_path="x")
    told = tale.notify("idle_prompt") if sign == "idle" else tale.prompt()
    assert (told["openCalls"], told["counts"]["interrupted"]) == ([], 1)
    assert told["reason"] is None or told["reason"]["kind"] == "input"


def test_a_rejected_permission_ends_with_the_session():
    _, told = session_after("i-perm", "SessionEnd")
    assert (told["state"], told["openCalls"], told["counts"]["interrupted"]) == ("ended", [], 1)


@pytest.mark.parametrize("sign", ["idle", "prompt"])
def test_esc_during_a_foreground_agent_ends_the_agent_and_its_calls(sign):
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="sleep 25")
    told = tale.notify("idle_prompt") if sign == "idle" else tale.prompt()
    assert (told["openCalls"], told["counts"]["interrupted"]) == ([], 2)
    assert session_agent(told, "a1")["state"] == "ended"
    if sign == "idle":
        tale.prompt()
    assert tale.stop()["state"] == "idle", "nothing works here any more"


def test_esc_in_a_foreground_agents_permission_dialog_leaves_no_permission_behind():
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="make")
    tale.ask("Bash", "a1", command="make")
    assert tale.notify("idle_prompt")["reason"]["kind"] == "input"


def test_a_prompt_does_not_end_background_agents():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    tale.stop("a1")
    told = tale.prompt("meanwhile, look at this")
    assert session_agent(told, "a1")["state"] == "working" and session_open(told) == ["Bash"]
    assert tale.stop("a1")["state"] == "working"
    told = tale.notify("idle_prompt")
    assert session_agent(told, "a1")["state"] == "working" and told["counts"]["interrupted"] == 0


def test_a_background_agents_own_agents_live_with_it():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Agent", "t2", "a1", description="deep job")
    tale.say("SubagentStart", agent="a2")
    tale.call("Bash", "t3", "a2", command="make")
    told = tale.stop("a1")
    assert session_agent(told, "a2")["state"] == "working" and session_open(told) == ["Agent", "Bash"]


def test_a_late_result_takes_an_interruption_back():
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    assert tale.prompt("and now?")["counts"]["interrupted"] == 1
    told = tale.result("Bash", "t1", command="make")
    assert (told["counts"]["interrupted"], told["counts"]["toolCalls"], told["openCalls"]) == (0, 1, [])


def test_a_command_with_an_exclamation_mark_is_a_stop_without_a_prompt():
    told = SessionTale().stop()
    assert (told["state"], told["counts"]["prompts"]) == ("idle", 0)
    tale = session_tale()
    tale.stop()
    tale.notify("idle_prompt")
    assert tale.stop()["state"] == "idle"


# Open calls ----------------------------------------------------------------


def test_a_result_closes_its_own_call():
    tale = session_tale()
    tale.call("Bash", "t1", command="a")
    told = tale.call("Bash", "t2", command="b")
    assert [(call["toolUseId"], call["target"], call["agentId"]) for call in told["openCalls"]] == [
        ("t1", "a", None),
        ("t2", "b", None),
    ]
    told = tale.result("Bash", "t1", command="a")
    assert [call["toolUseId"] for call in told["openCalls"]] == ["t2"] and told["activity"] == "Bash: b"


def test_recorded_parallel_tools_are_open_together_and_close_one_by_one():
    opened = [sorted(session_open(told)) for _, told in session_steps("paralleltools")]
    assert opened[3:10] == [
        ["Read"],
        ["Bash", "Read"],
        ["Bash", "Bash", "Read"],
        ["Bash", "Bash"],
        ["Bash"],
        [],
        [],
    ]


def test_a_batch_closes_what_nothing_else_closes_and_counts_it_as_failed():
    errors = [
        told["counts"]["toolErrors"]
        for event, told in session_steps("failing")
        if event["hookType"] == "PostToolBatch"
    ]
    calls = [
        told["counts"]["toolCalls"]
        for event, told in session_steps("failing")
        if event["hookType"] == "PostToolBatch"
    ]
    assert errors == [1, 2, 3, 4, 5, 6] and calls == [1, 2, 3, 4, 5, 6]


def test_a_subagents_bad_input_counts_for_the_agent_too():
    tale = session_tale()
    tale.launch("a1", "t1")
    told = tale.batch(("Read", "t2", "<tool_use_error>InputValidationError"), agent="a1")
    assert session_agent(told, "a1")["counts"] == {"events": 2, "toolCalls": 1, "toolErrors": 1}
    assert told["counts"]["toolErrors"] == 1


@pytest.mark.parametrize("order", list(itertools.permutations(("call", "result", "batch"))))
@pytest.mark.parametrize("failed", [False, True])
def test_call_result_and_batch_count_once_in_any_order(order, failed):
    tale = session_tale()
    began = tale.time
    hook = "PostToolUseFailure" if failed else "PostToolUse"
    fields = {"tool_name": "Bash", "tool_input": {"command": "make"}, "tool_use_id": "t1"}
    listed = [
        {
            "tool_name": "Bash",
            "tool_input": {},
            "tool_use_id": "t1",
            "tool_response": "Exit code 1" if failed else "ok",
        }
    ]
    says = {
        "call": lambda: tale.say("PreToolUse", at=began + 1, **fields),
        "result": lambda: tale.say(hook, at=began + 2, tool_response="", error="Exit code 1", **fields),
        "batch": lambda: tale.say("PostToolBatch", at=began + 3, tool_calls=listed),
    }
    for step in order:
        told = says[step]()
    counts = told["counts"]
    assert (counts["toolCalls"], counts["toolErrors"], counts["interrupted"]) == (1, int(failed), 0)
    assert told["openCalls"] == [] and told["state"] == "working"


def test_a_result_before_its_call_opens_nothing():
    tale = session_tale()
    tale.result("Bash", "t1", command="make")
    told = tale.say(
        "PreToolUse", at=tale.time - 10, tool_name="Bash", tool_input={"command": "make"}, tool_use_id="t1"
    )
    assert (told["openCalls"], told["activity"], told["counts"]["toolCalls"]) == ([], "", 1)


@pytest.mark.parametrize("hook", ["Stop", "StopFailure", "SessionEnd"])
def test_the_end_of_a_turn_or_session_interrupts_what_runs(hook):
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    told = tale.say(hook, error="server_error", reason="other")
    assert (told["openCalls"], told["counts"]["interrupted"], told["activity"]) == ([], 1, "")


def test_the_end_of_a_turn_leaves_a_background_agents_call_open():
    _, told = session_after("subagent-default", "Stop")
    assert session_open(told) == ["Bash"] and told["openCalls"][0]["agentId"].startswith("a90ac")
    assert told["counts"]["interrupted"] == 0


def test_the_end_of_an_agent_interrupts_its_calls_only():
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="make")
    told = tale.say("SubagentStop", agent="a1", background_tasks=[])
    assert (session_open(told), told["counts"]["interrupted"]) == (["Agent"], 1)


def test_a_subagents_failed_turn_is_not_the_main_agents():
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="make")
    told = tale.say("StopFailure", agent="a1", error="server_error")
    assert told["state"] == "working" and "Agent" in session_open(told)


@pytest.mark.parametrize("hook", ["Stop", "SubagentStop", "SessionEnd"])
def test_a_call_that_was_overtaken_by_the_end_is_not_open_for_ever(hook):
    tale = session_tale()
    agent = "a1" if hook == "SubagentStop" else ""
    if agent:
        tale.launch("a1", "t0")
    began = tale.time + 500
    tale.say(hook, agent=agent, reason="other", background_tasks=[])
    told = tale.say("PreToolUse", agent=agent, at=began, tool_name="Bash", tool_input={}, tool_use_id="t1")
    assert (told["openCalls"], told["counts"]["interrupted"], told["counts"]["toolCalls"] > 0) == (
        [],
        1,
        True,
    )
    assert all(each["state"] == "ended" for each in told["agents"])
    assert told["state"] == {"Stop": "idle", "SubagentStop": "working", "SessionEnd": "ended"}[hook]


def test_a_stop_that_was_overtaken_leaves_the_next_turn_as_it_is():
    tale = session_tale()
    ended = tale.time + 500
    tale.prompt("next")
    tale.call("Bash", "t1", command="make")
    told = tale.say("Stop", at=ended, background_tasks=[])
    assert (told["state"], session_open(told), told["activity"]) == ("working", ["Bash"], "Bash: make")


@pytest.mark.parametrize("source", ["startup", "resume"])
def test_a_new_process_shows_that_the_old_ones_calls_and_agents_are_over(source):
    tale = session_tale(pid=100)
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", command="sleep 25")
    tale.pid = 200
    told = tale.say("SessionStart", source=source)
    assert (told["state"], told["openCalls"], told["counts"]["interrupted"]) == ("idle", [], 1)
    assert session_agent(told, "a1")["state"] == "ended" and told["pid"] == 200


def test_a_compaction_within_a_turn_interrupts_nothing():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    tale.say("PreCompact", trigger="auto")
    told = tale.say("SessionStart", source="compact")
    assert (told["state"], session_open(told)) == ("working", ["Bash"])
    assert session_agent(told, "a1")["state"] == "working"


def test_old_clients_pair_the_result_with_the_newest_open_call_of_the_tool():
    tale = session_tale()
    for command in ("a", "b"):
        tale.say("PreToolUse", tool_name="Bash", tool_input={"command": command})
    tale.say("PreToolUse", tool_name="Read", tool_input={"file_path": "x"})
    told = tale.say("PostToolUse", tool_name="Bash", tool_input={"command": "b"}, tool_response="")
    assert [call["target"] for call in told["openCalls"]] == ["a", "x"]
    told = tale.say("PostToolUse", tool_name="Grep", tool_input={}, tool_response="")
    assert len(told["openCalls"]) == 2


def test_an_old_clients_nameless_subagent_stop_does_not_interrupt_the_task_that_ran_it():
    _, told = session_after("v1.0.128-subagent", "SubagentStop")
    assert "Task" in session_open(told)
    _, told = session_after("v1.0.128-subagent", "Stop")
    assert (told["openCalls"], told["counts"]["interrupted"]) == ([], 1), "only the failing Bash got no end"


def test_a_round_that_ends_after_hundreds_of_other_calls_counts_each_call_once():
    tale = session_tale()
    for agent, call in (("a1", "left"), ("a2", "right")):
        tale.call("Agent", call, description=call)
        tale.say("SubagentStart", agent=agent)
    tale.say("SubagentStop", agent="a1", background_tasks=[])
    tale.result("Agent", "left", response={"status": "completed", "agentId": "a1"})
    for number in range(300):
        tale.call("Read", f"r{number}", "a2", file_path="x")
        tale.result("Read", f"r{number}", "a2")
    tale.result("Agent", "right", response={"status": "completed", "agentId": "a2"})
    told = tale.batch(("Task", "left", "done"), ("Task", "right", "done"))
    assert (told["counts"]["toolCalls"], told["counts"]["toolErrors"]) == (302, 0)


# Agents --------------------------------------------------------------------


def test_a_session_works_on_while_a_background_agent_runs_after_its_turn():
    states = [
        (event["hookType"], event.get("agentId"), told["state"])
        for event, told in session_steps("subagent-default")
    ]
    first_stop = next(index for index, (hook, _, _) in enumerate(states) if hook == "Stop")
    assert {state for _, _, state in states[first_stop:-2]} == {"working"}
    assert [state for _, _, state in states[-2:]] == ["idle", "ended"]


def test_a_session_works_on_while_a_background_command_runs_after_its_turn():
    _, told = session_after("bgbash", "Stop")
    assert (told["state"], told["activity"], told["openCalls"]) == ("working", "background: bg", [])
    _, told = session_after("bgbash", "Stop", 1)
    assert (told["state"], told["activity"]) == ("idle", "")


@pytest.mark.parametrize("status", ["completed", "failed", "killed"])
def test_a_task_notification_ends_its_background_agent(status):
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.launch("a2", "t2")
    tale.call("Bash", "t3", "a1", command="make")
    tale.stop("a1", "a2")
    told = tale.task_ended("a1", status)
    assert session_agent(told, "a1")["state"] == "ended" and told["openCalls"] == []
    assert session_agent(told, "a2")["state"] == "working"
    assert tale.stop("a2")["state"] == "working"
    tale.task_ended("a2", status)
    assert tale.stop()["state"] == "idle"


def test_a_turns_end_without_running_tasks_shows_that_no_agent_runs():
    # A killed agent says nothing; the client's own list is the truth.
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.stop("a1")
    tale.prompt("stop it")
    told = tale.stop()
    assert told["state"] == "idle" and session_agent(told, "a1")["state"] == "ended"


def test_an_old_clients_stop_without_a_task_list_leaves_background_agents():
    tale = session_tale()
    tale.launch("a1", "t1")
    told = tale.say("Stop", stop_hook_active=False)
    assert told["state"] == "working" and session_agent(told, "a1")["state"] == "working"


def test_a_task_notification_is_no_persons_prompt():
    _, told = session_after("bgbash", "UserPromptSubmit", 1)
    assert (told["counts"]["prompts"], told["state"]) == (1, "working")
    tale = SessionTale()
    told = tale.task_ended("b1")
    assert (told["counts"]["prompts"], told["labelSource"]) == (0, "project")
    tale.call("Bash", "t1", command="make")
    assert session_open(tale.task_ended("b2")) == ["Bash"], "the client's own word interrupts nothing"


@pytest.mark.parametrize("name", ["i-clear", "v2.0.77-subagent"])
def test_stops_without_a_start_make_no_ghost_agent(name):
    for _, told in session_steps(name):
        assert told["agents"] == []


def test_a_stop_without_a_start_leaves_waits_and_calls_alone():
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    before = tale.ask("Bash", command="make")
    after = tale.say("SubagentStop", agent_id="ghost", agent_type="", background_tasks=[])
    assert after["reason"] == before["reason"] and after["openCalls"] == before["openCalls"]


def test_a_start_that_was_overtaken_by_its_stop_makes_no_agent_that_runs_for_ever():
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    began = tale.time + 500
    tale.say("SubagentStop", agent="a1", background_tasks=[])
    told = tale.say("SubagentStart", agent="a1", at=began)
    assert all(agent["state"] == "ended" for agent in told["agents"])
    tale.result("Agent", "t1", response={"status": "completed", "agentId": "a1"})
    assert tale.stop()["state"] == "idle"


def test_a_call_that_was_overtaken_by_its_agents_stop_does_not_wake_the_agent():
    tale = session_tale()
    tale.launch("a1", "t1")
    began = tale.time + 500
    tale.result("Bash", "t2", "a1", command="make")
    tale.say("SubagentStop", agent="a1", background_tasks=[])
    told = tale.say("PreToolUse", agent="a1", at=began, tool_name="Bash", tool_input={}, tool_use_id="t2")
    assert session_agent(told, "a1")["state"] == "ended" and told["openCalls"] == []


def test_a_stopped_agent_that_is_sent_on_works_again():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.say("SubagentStop", agent="a1", background_tasks=[])
    told = tale.call("Bash", "t2", "a1", command="make")
    assert session_agent(told, "a1")["state"] == "working" and session_agent(told, "a1")["endTime"] is None


def test_nested_agents_know_their_parents_and_jobs():
    told = session_replay(session_events("nested"))[0]
    outer, inner = told["agents"]
    assert (outer["label"], outer["parentAgentId"]) == ("outer job", None)
    assert (inner["label"], inner["parentAgentId"]) == ("inner job", outer["agentId"])
    assert {agent["agentType"] for agent in told["agents"]} == {"general-purpose"}


def test_parallel_agents_get_their_own_labels():
    told = session_replay(session_events("parallel"))[0]
    assert [(agent["agentId"][:3], agent["label"], agent["parentAgentId"]) for agent in told["agents"]] == [
        ("adf", "left job", None),
        ("a28", "right job", None),
    ]


def test_an_agent_has_its_label_from_its_start_when_it_is_the_only_one():
    _, told = session_after("subagent", "SubagentStart")
    assert [(agent["label"], agent["state"]) for agent in told["agents"]] == [("inner job", "working")]


@pytest.mark.parametrize("by", ["", "a0"])
def test_a_launch_result_before_the_agents_start_names_it_all_the_same(by):
    tale = session_tale()
    if by:
        tale.launch("a0", "t0", description="outer job")
    tale.call("Agent", "t1", by, description="inner job")
    tale.result("Agent", "t1", by, {"status": "async_launched", "agentId": "a1"}, description="inner job")
    told = tale.say("SubagentStart", agent="a1")
    agent = session_agent(told, "a1")
    assert (agent["label"], agent["parentAgentId"], agent["state"]) == ("inner job", by or None, "working")


def test_agents_end_with_their_session():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    told = tale.say("SessionEnd", reason="other")
    assert (told["state"], told["openCalls"], session_agent(told, "a1")["state"]) == ("ended", [], "ended")
    told = tale.say("SubagentStart", agent="a2", at=tale.time - 1500)
    assert all(agent["state"] == "ended" for agent in told["agents"]) and told["state"] == "ended"


# Late words and needed people ----------------------------------------------


def test_a_subagents_request_is_not_lost_because_the_main_agent_moved_on():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    asked = tale.time + 500
    tale.stop("a1")
    told = tale.ask("Bash", "a1", at=asked, command="make")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make"


def test_a_request_is_not_lost_because_a_parallel_calls_result_was_faster():
    tale = session_tale()
    tale.call("Read", "t1", file_path="x")
    tale.call("Bash", "t2", command="make")
    asked = tale.time + 500
    tale.result("Read", "t1", file_path="x")
    told = tale.ask("Bash", at=asked, command="make")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make"


@pytest.mark.parametrize("agent", ["", "a1"])
def test_an_earlier_event_that_arrives_later_does_not_end_a_wait(agent):
    tale = session_tale()
    if agent:
        tale.launch("a1", "t0")
    began = tale.time + 500
    tale.ask("Bash", agent, command="make")
    told = tale.say(
        "PreToolUse",
        agent=agent,
        at=began,
        tool_name="Bash",
        tool_input={"command": "make"},
        tool_use_id="t1",
    )
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make"
    assert tale.result("Bash", "t1", agent, command="make")["state"] == "working"


def test_a_request_that_was_overtaken_by_its_own_answer_needs_nobody():
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    asked = tale.time + 500
    tale.result("Bash", "t1", command="make")
    assert tale.ask("Bash", at=asked, command="make")["state"] == "working"


def test_a_notification_that_overtook_an_agents_request_leaves_no_wait_behind():
    tale = session_tale()
    tale.call("Agent", "t1", description="inner job")
    tale.say("SubagentStart", agent="a1")
    tale.call("Bash", "t2", "a1", command="make")
    asked = tale.time + 500
    tale.notify("permission_prompt", "Claude needs your permission")
    told = tale.ask("Bash", "a1", at=asked, command="make")
    assert (told["reason"]["tool"], told["reason"]["detail"]) == ("Bash", "make")
    assert tale.result("Bash", "t2", "a1", command="make")["state"] == "working"


def test_an_idle_prompt_that_was_overtaken_by_a_prompt_needs_nobody():
    tale = session_tale()
    tale.stop()
    fired = tale.time + 500
    tale.prompt()
    told = tale.say("Notification", at=fired, message="Claude is waiting", notification_type="idle_prompt")
    assert told["state"] == "working"


# After a pause or a full disk the spool comes behind what is said live: minutes late, in the order of each agent.


def session_goes_on(tale: SessionTale, rounds: int = 10) -> None:
    """Let the main agent work for twice as long as events are kept to be put in order."""
    for number in range(rounds):
        tale.call("Read", f"on{number}", file_path="x")
        tale.result("Read", f"on{number}", file_path="x")


def test_an_agents_request_that_comes_long_after_others_went_on_still_needs_a_person():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    asked = tale.time + 500
    session_goes_on(tale)
    told = tale.ask("Bash", "a1", at=asked, command="make")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make"
    assert tale.result("Bash", "t2", "a1", command="make")["state"] == "working"


def test_a_request_for_a_call_that_still_runs_counts_however_late():
    tale = session_tale()
    tale.call("Bash", "t1", command="make")
    asked = tale.time + 500
    session_goes_on(tale)
    told = tale.ask("Bash", at=asked, command="make")
    assert told["state"] == "waiting" and told["reason"]["detail"] == "make"
    tale.result("Bash", "t1", command="make")
    assert tale.ask("Bash", at=asked, command="make")["state"] == "working", "it has run"


def test_a_stop_that_comes_long_after_a_background_agent_went_on_ends_the_turn():
    tale = session_tale()
    tale.launch("a1", "t1")
    stopped = tale.time + 500
    for number in range(10):
        tale.call("Bash", f"t{number + 2}", "a1", command="make")
        tale.result("Bash", f"t{number + 2}", "a1", command="make")
    told = tale.say("SubagentStop", agent="a1", background_tasks=[])
    assert told["state"] == "working"
    assert tale.say("Stop", at=stopped, background_tasks=[])["state"] == "idle"


@pytest.mark.parametrize("hook", ["SubagentStart", "PreToolUse", "PostToolUse"])
@pytest.mark.parametrize("known", [True, False])
def test_what_comes_long_after_its_agents_stop_does_not_wake_the_agent(hook, known):
    tale = session_tale()
    if known:
        tale.launch("a1", "t1")
    before = tale.time + 500
    tale.say("SubagentStop", agent="a1", background_tasks=[])
    session_goes_on(tale)
    told = tale.say(hook, agent="a1", at=before, tool_name="Bash", tool_input={}, tool_use_id="t2")
    assert [agent["state"] for agent in told["agents"]] == ["ended"] and told["openCalls"] == []


def test_a_call_that_comes_long_after_its_turn_is_not_open():
    tale = session_tale()
    before = tale.time + 500
    tale.stop()
    tale.wait(10_000)
    told = tale.say("PreToolUse", at=before, tool_name="Bash", tool_input={}, tool_use_id="t1")
    assert (told["state"], told["openCalls"], told["counts"]["interrupted"]) == ("idle", [], 1)


def test_a_burst_in_disorder_does_not_tell_everything_anew_for_each_event(monkeypatch):
    told, real = itertools.count(), cm.apply_event
    monkeypatch.setattr(cm, "apply_event", lambda *given, **named: (next(told), real(*given, **named)))
    chance, arrivals = random.Random(1), []
    for number in range(800):
        for hook, happened in (("PreToolUse", NOW_MS + 5 * number), ("PostToolUse", NOW_MS + 5 * number + 1)):
            said = payload(hook, tool_name="Bash", tool_input={"command": "ls"}, tool_use_id=f"t{number}")
            event = ee.build_event(
                {"hook": said, "id": f"{hook}{number}", "timestamp": happened}, happened, "box"
            )
            arrivals.append({"received": happened + chance.randrange(2000), **event})
    book = cm.Sessions(own_machine="box")
    for event in session_numbered(arrivals):
        session = book.apply(event)
    assert (session.counts["toolCalls"], session.open_calls) == (800, {})
    assert next(told) <= 300 * len(arrivals)


# /clear, resume, fork, models ----------------------------------------------


def test_after_clear_the_new_session_continues_the_old_one():
    old, new = session_replay(session_events("i-clear"))
    assert new["continuedFrom"] == old["sessionId"] and old["continuedFrom"] is None
    assert old["reason"] == {"kind": "ended", "tool": None, "detail": "clear", "since": old["endTime"]}


def test_after_clear_the_users_label_pin_and_parent_stay_and_the_models_name_too():
    tale = session_tale(pid=7)
    tale.say("SessionStart", session="boss", source="startup")
    for action in (
        {"action": "rename", "label": "Frontend"},
        {"action": "pin", "pinned": True},
        {"action": "set_parent", "parentSessionId": "boss"},
    ):
        tale.apply({"eventType": "session_meta", "hookType": "Monitor", "sessionId": "s1", "data": action})
    tale.say("SessionEnd", reason="clear")
    told = tale.say("SessionStart", session="s2", source="clear")
    assert (told["continuedFrom"], told["label"], told["labelSource"]) == ("s1", "Frontend", "user")
    assert told["model"] == "claude-opus-5-5"
    assert (told["isPinned"], told["parentSessionId"]) == (True, "boss")


def test_a_start_after_clear_that_overtook_the_end_is_linked_all_the_same():
    tale = session_tale(pid=7)
    ended = tale.time + 500
    tale.say("SessionStart", session="s2", source="clear")
    tale.say("SessionEnd", at=ended, reason="clear")
    assert tale.book.to_json(tale.book.sessions["s2"])["continuedFrom"] == "s1"


def test_clear_in_one_of_two_terminals_links_the_right_session():
    tale = SessionTale()
    for pid, name in ((1, "one"), (2, "two")):
        tale.pid = pid
        tale.say("SessionStart", session=name, source="startup")
        tale.say("SessionEnd", session=name, reason="clear")
    for pid, name, before in ((2, "three", "two"), (1, "four", "one")):
        tale.pid = pid
        assert tale.say("SessionStart", session=name, source="clear")["continuedFrom"] == before


def test_sessions_that_end_are_not_compared_with_every_other_one(monkeypatch):
    compared, real = itertools.count(), cm.Sessions._makes_way
    monkeypatch.setattr(cm.Sessions, "_makes_way", lambda *given: (next(compared), real(*given))[1])
    tale = SessionTale()
    for number in range(300):
        tale.time += 120_000
        tale.say("SessionStart", session=f"a{number}", source="startup")
        tale.say("SessionEnd", session=f"a{number}", reason="clear" if number % 2 else "other")
        if number % 2:
            told = tale.say("SessionStart", session=f"b{number}", source="clear")
            assert told["continuedFrom"] == f"a{number}"
    assert next(compared) <= 600


def test_a_plain_start_in_the_same_directory_is_a_stranger():
    tale = session_tale()
    tale.say("SessionEnd", reason="clear")
    assert tale.say("SessionStart", session="s2", source="startup")["continuedFrom"] is None
    tale.time += 600_000
    assert tale.say("SessionStart", session="s3", source="clear")["continuedFrom"] is None


@pytest.mark.parametrize("source", ["resume", "fork"])
def test_resume_and_fork_from_within_a_session_are_linked_to_it(source):
    tale = session_tale(pid=7)
    tale.say("SessionEnd", reason="resume")
    assert tale.say("SessionStart", session="s2", source=source)["continuedFrom"] == "s1"


def test_a_resumed_session_is_alive_again():
    tale = session_tale()
    tale.say("SessionEnd", reason="other")
    told = tale.say("SessionStart", source="resume")
    assert (told["state"], told["endTime"], told["reason"]) == ("idle", None, None)
    assert tale.prompt()["counts"]["prompts"] == 2


def test_a_model_switch_shows_the_new_model():
    models = [
        told["model"] for event, told in session_steps("i-clear") if event["sessionId"].startswith("e189")
    ]
    switched = [
        event["hookType"] for event, _ in session_steps("i-clear") if event["sessionId"].startswith("e189")
    ]
    at = switched.index("PostModelSwitch")
    assert set(models[:at]) == {"claude-opus-5-5"} and set(models[at:]) == {"claude-sonnet-5-5"}


def test_a_subagents_model_is_not_the_sessions():
    tale = session_tale()
    tale.launch("a1", "t1")
    assert (
        tale.say("SubagentStop", agent="a1", model="claude-haiku-5", background_tasks=[])["model"]
        == "claude-opus-5-5"
    )


# Failed, quiet, ended ------------------------------------------------------


def test_a_failed_turn_says_which_error():
    stopped, told = session_after("apierror529", "StopFailure")
    assert told["state"] == "failed"
    assert (told["reason"]["kind"], told["reason"]["since"]) == ("error", stopped["timestamp"])
    assert told["reason"]["detail"].startswith("server_error: API Error: 529")
    tale = session_tale()
    assert tale.say("StopFailure", error="rate_limit")["reason"]["detail"] == "rate_limit"
    assert tale.prompt("again")["state"] == "working"
    tale.say("StopFailure", error="rate_limit")
    assert tale.stop()["state"] == "idle"


def test_a_working_session_is_quiet_after_quiet_seconds_and_back_with_the_next_event():
    tale = session_tale()
    told = tale.call("Bash", "t1", command="make")
    since = tale.time
    assert tale.wait(119_999)["state"] == "working"
    told = tale.wait(1)
    assert (told["state"], told["stateSince"], session_open(told)) == ("quiet", since + 120_000, ["Bash"])
    tale.time += 1
    assert tale.tick() == []
    tale.time -= 1
    told = tale.result("Bash", "t1", command="make")
    assert (told["state"], told["stateSince"]) == ("working", tale.time)
    assert tale.wait(120_000)["state"] == "quiet"


@pytest.mark.parametrize("state", ["idle", "waiting", "failed"])
def test_only_a_working_session_becomes_quiet(state):
    tale = session_tale()
    if state == "idle":
        tale.stop()
    elif state == "waiting":
        tale.ask("Bash", command="make")
    else:
        tale.say("StopFailure", error="rate_limit")
    assert tale.wait(3_600_000)["state"] == state
    assert tale.prompt()["state"] == "working", "it has just been heard"


def test_a_background_agents_silence_is_quiet_too():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.stop("a1")
    assert tale.wait(120_000)["state"] == "quiet"


def test_quiet_is_measured_on_the_other_machines_clock():
    tale = session_tale(machine="far")
    for skew in (-3_600_000, 3_600_000):
        tale = SessionTale(machine="far")
        for hook in ("SessionStart", "UserPromptSubmit"):
            told = tale.say(hook, at=tale.time + 1000 + skew, prompt="go", source="startup")
        assert told["state"] == "working"
        assert tale.wait(119_000)["state"] == "working", skew
        assert tale.wait(1_000)["state"] == "quiet", skew


def session_far(clock_ms: int = 0) -> tuple[SessionTale, Any]:
    """Return a tale of another machine that works, and a way to let it speak with its clock so far off."""
    tale = SessionTale(machine="far")

    def say(hook: str, clock_ms: int = clock_ms, **fields: Any) -> dict[str, Any]:
        return tale.say(hook, at=tale.time + 1000 + clock_ms, **fields)

    say("UserPromptSubmit", prompt="go")
    return tale, say


@pytest.mark.parametrize("before_ms", [0, 3_600_000, -3_600_000])
@pytest.mark.parametrize("step_ms", [-65_000, -3_600_000, -26 * 3_600_000])
def test_what_a_machine_says_after_its_clock_was_set_back_is_not_late(before_ms, step_ms):
    tale, say = session_far(before_ms)
    say("PreToolUse", tool_name="Bash", tool_use_id="t1", tool_input={"command": "make"})
    after_ms = before_ms + step_ms
    ask = {"tool_name": "Bash", "tool_input": {"command": "make"}}
    told = say("PermissionRequest", after_ms, **ask)
    assert (told["state"], told["reason"]["kind"]) == ("waiting", "permission")
    assert told["reason"]["since"] == told["lastEventTime"] == tale.time
    told = say("PostToolUse", after_ms, tool_use_id="t1", tool_response="", **ask)
    assert (told["state"], told["openCalls"]) == ("working", [])
    assert tale.wait(119_000)["state"] == "working" and tale.wait(2000)["state"] == "quiet"
    assert say("Stop", after_ms, background_tasks=[])["state"] == "idle"
    assert say("Stop", before_ms, background_tasks=[])["state"] == "idle", "and set right again"
    assert say("UserPromptSubmit", before_ms, prompt="go")["state"] == "working"
    assert tale.wait(119_000)["state"] == "working" and tale.wait(2000)["state"] == "quiet"


def test_what_a_spool_or_an_import_brings_long_after_is_late_and_shows_no_clock_that_was_set():
    for mark in ("spooled", "imported"):
        tale, say = session_far()
        say("PermissionRequest", tool_name="Bash", tool_input={"command": "make"})
        stop = {
            "hook": payload("Stop", "s1", background_tasks=[]),
            "id": mark,
            "timestamp": tale.time - 3_600_000,
        }
        event = ee.build_event(stop, tale.time, "far")
        session = tale.book.apply({**event, "seq": 99, "received": tale.time, mark: True})
        assert (session.state, session.last_event) == ("waiting", tale.time)


def test_a_clock_set_forward_makes_nothing_older_for_retention(tmp_path, monkeypatch):
    wall_ms, steady_ms = NOW_MS, 5_000.0
    monkeypatch.setattr(cm, "now_ms", lambda: wall_ms)
    monkeypatch.setattr(cm, "steady_ms", lambda: steady_ms)
    values = ee.default_values()
    retention = cm.Retention(
        cm.Settings(str(tmp_path), "", "box", values), cm.EventLoop(), frozenset, lambda names: None
    )
    wall_ms, steady_ms = wall_ms + 90_000, steady_ms + 90_000
    assert retention.least_now_ms() == wall_ms
    wall_ms += 3_600_000
    assert retention.least_now_ms() == wall_ms - 3_600_000
    wall_ms -= 2 * 3_600_000
    assert retention.least_now_ms() == wall_ms


@pytest.mark.parametrize("machine", [SESSION_MACHINE, "far"])
@pytest.mark.parametrize("step_ms", [3_600_000, 14 * 3_600_000, -3_600_000, -14 * 3_600_000])
def test_nobody_is_silent_for_the_time_that_our_own_clock_was_set_by(machine, step_ms):
    tale = SessionTale(machine=machine)
    tale.say("PermissionRequest", session="s2", tool_name="Bash", tool_input={})
    tale.say("UserPromptSubmit", prompt="go")
    assert tale.wait(100_000)["state"] == "working"
    tale.time += step_ms
    tale.set_by = step_ms
    theirs_ms = 0 if machine == SESSION_MACHINE else -step_ms
    assert tale.wait(10_000)["state"] == "working"
    assert tale.book.sessions["s2"].state == "waiting"
    if step_ms > 0 or machine != SESSION_MACHINE:
        assert tale.wait(11_000)["state"] == "quiet", "121 seconds have really passed"
    told = tale.say(
        "PreToolUse", at=tale.time + 1000 + theirs_ms, tool_name="Bash", tool_input={}, tool_use_id="t"
    )
    assert (told["state"], told["lastEventTime"]) == ("working", tale.time)
    assert tale.wait(119_000)["state"] == "working"
    assert tale.wait(1_000)["state"] == "quiet"
    tale.wait(12 * 3_600_000)
    assert tale.book.sessions["s2"].state == "ended", "12 hours have really passed"


def test_a_clock_that_was_wrong_for_a_while_does_not_make_its_machine_look_quiet_for_ever():
    tale, say = session_far(3_600_000)
    for minutes in range(12):
        say("PreToolUse", 0, tool_name="Read", tool_input={}, tool_use_id=f"t{minutes}")
        tale.time += 59_000
    # Our own clock was set forward while no monitor ran: what was measured before is forgotten after a while.
    for minutes in range(12):
        say("PreToolUse", -3_600_000, tool_name="Read", tool_input={}, tool_use_id=f"u{minutes}")
        tale.time += 59_000
    say("PreToolUse", -3_600_000, tool_name="Read", tool_input={}, tool_use_id="last")
    assert tale.wait(119_000)["state"] == "working"


def test_a_silent_machines_sessions_end_after_ended_hours():
    tale = session_tale(machine="far")
    tale.call("Bash", "t1", command="make")
    heard = tale.time
    assert tale.wait(12 * 3_600_000 - 1)["state"] == "quiet"
    told = tale.wait(1)
    assert (told["state"], told["endTime"], told["openCalls"]) == ("ended", heard, [])
    assert "12 hours" in told["reason"]["detail"] and told["counts"]["interrupted"] == 1


def test_a_session_does_not_end_by_silence_while_its_machine_talks():
    tale = session_tale(machine="far")
    tale.ask("Bash", command="make")
    for _ in range(13):
        tale.wait(3_600_000)
        tale.say("UserPromptSubmit", session="other", prompt="go")
    told = tale.now()
    assert told["state"] == "waiting", "someone is still needed there"


def test_a_wait_on_our_own_machine_lasts_as_long_as_its_process():
    # The person went home; in the morning the dialog is still there.
    tale = session_tale(pid=7)
    tale.ask("Bash", command="make")
    told = tale.wait(14 * 3_600_000)
    assert (told["state"], told["reason"]["kind"]) == ("waiting", "permission")
    told = tale.book.to_json(tale.book.end_gone("s1", tale.time))
    assert told["state"] == "ended"


def test_a_session_that_was_thought_ended_lives_with_its_next_event():
    for hook, agent, state in (
        ("PreToolUse", "a1", "working"),
        ("PermissionRequest", "a1", "waiting"),
        ("UserPromptSubmit", "", "working"),
    ):
        tale = session_tale(machine="far")
        tale.launch("a1", "t1")
        assert tale.wait(13 * 3_600_000)["state"] == "ended"
        told = tale.say(hook, agent=agent, tool_name="Bash", tool_input={"command": "make"}, prompt="go")
        assert (told["state"], told["endTime"]) == (state, None), hook


def test_a_gone_process_ends_its_session():
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in session_events("i-sigKILL"):
        session = book.apply(event)
    told = book.to_json(book.end_gone(session.session_id, NOW_MS + 60_000))
    assert (told["state"], told["endTime"], told["openCalls"]) == ("ended", NOW_MS + 60_000, [])
    assert told["reason"]["detail"] == "its process is gone" and told["counts"]["interrupted"] == 1
    assert book.tick(NOW_MS + 9_000_000) == []


@pytest.mark.parametrize("reason", ["clear", "resume", "logout", "prompt_input_exit", "other"])
def test_a_session_end_says_why(reason):
    tale = session_tale()
    tale.ask("Bash", command="make")
    told = tale.say("SessionEnd", reason=reason)
    assert (told["state"], told["endTime"], told["activity"]) == ("ended", tale.time, "")
    assert told["reason"] == {"kind": "ended", "tool": None, "detail": reason, "since": tale.time}
    assert tale.say("MessageDisplay", delta="bye")["state"] == "ended"
    assert tale.notify("idle_prompt")["state"] == "ended" or reason == "resume"


def test_what_was_overtaken_by_the_end_does_not_wake_the_session():
    for hook in ("PostToolUse", "Stop", "UserPromptSubmit", "PermissionRequest", "SessionStart"):
        tale = session_tale()
        before = tale.time + 500
        tale.say("SessionEnd", reason="other")
        assert tale.say(hook, at=before, tool_name="Bash", tool_use_id="t1")["state"] == "ended", hook


# State → a tale that ends in it, and what the README says of it.
SESSION_STATES = {
    "waiting": ("needs you", lambda tale: tale.ask("Bash", command="rm -rf build")),
    "working": ("working", lambda tale: tale.call("Bash", "t1", command="make")),
    "quiet": ("quiet", lambda tale: tale.wait(120_000)),
    "idle": ("idle", lambda tale: tale.stop()),
    "failed": ("failed", lambda tale: tale.say("StopFailure", error="rate_limit")),
    "ended": ("ended", lambda tale: tale.say("SessionEnd", reason="other")),
}


@pytest.mark.parametrize("state", sorted(SESSION_STATES))
def test_every_state_is_reached_stands_in_the_table_and_is_explained_to_the_user(state):
    name, tell = SESSION_STATES[state]
    assert tell(session_tale())["state"] == state
    assert state in cm.SESSION_STATES
    with open(ROOT + "/README.md", encoding="utf-8") as file:
        table = file.read().partition("### What each state means")[2].partition("\n## ")[0]
    assert f"| **{name}**" in table


def test_the_table_of_states_has_no_state_that_nobody_reaches():
    assert set(cm.SESSION_STATES) == set(SESSION_STATES)


# Stuck ---------------------------------------------------------------------


def session_fail(
    tale: SessionTale, number: int, error: str = "no match", tool: str = "Edit", **more: Any
) -> Any:
    """Let one call fail; return the signals."""
    tale.call(tool, f"f{number}", more.get("agent_id", ""), file_path="a.py")
    return tale.say(
        "PostToolUseFailure", tool_name=tool, tool_use_id=f"f{number}", error=error, tool_input={}, **more
    )["stuck"]


def session_turn(tale: SessionTale, number: int, tool: str | None, **tool_input: Any) -> list[str]:
    """Let a turn with one call pass; return the kinds of signals."""
    tale.prompt()
    if tool:
        tale.call(tool, f"c{number}", **tool_input)
        tale.result(tool, f"c{number}", **tool_input)
    return [signal["kind"] for signal in tale.stop()["stuck"]]


def test_stuck_when_the_same_tool_fails_the_same_way_5_times_in_a_row():
    tale = session_tale()
    first = tale.time + 2000
    for number in range(4):
        assert session_fail(tale, number) == []
        tale.call("Read", f"r{number}")
        tale.result("Read", f"r{number}")
    (signal,) = session_fail(tale, 4)
    assert signal == {
        "kind": "failing",
        "since": first,
        "detail": "Edit failed 5 times the same way: no match",
    }
    assert session_fail(tale, 5)[0]["detail"].startswith("Edit failed 6 times")


@pytest.mark.parametrize(
    "end",
    [
        lambda tale: tale.result("Edit", "ok"),
        lambda tale: tale.prompt("try something else"),
        lambda tale: tale.say("SessionEnd", reason="other"),
        lambda tale: session_fail(tale, 99, "another error") or tale.now(),
    ],
)
def test_a_tool_that_is_no_longer_failing_the_same_way_is_no_signal(end):
    tale = session_tale()
    told = [session_fail(tale, number) for number in range(5)]
    assert told[-1] and end(tale)["stuck"] == []


def test_failures_that_differ_or_belong_to_different_agents_are_no_signal():
    tale = session_tale()
    tale.say("SubagentStart", agent="a1")
    for number in range(4):
        assert session_fail(tale, number) == []
        assert session_fail(tale, number + 100, agent_id="a1") == []
        assert session_fail(tale, number + 200, f"error {number}", "Grep") == []


def test_an_agents_failures_are_a_signal_until_it_ends():
    tale = session_tale()
    tale.say("SubagentStart", agent="a1")
    told = [session_fail(tale, number, agent_id="a1") for number in range(5)]
    assert [signal["kind"] for signal in told[-1]] == ["failing"]
    assert tale.say("SubagentStop", agent="a1")["stuck"] == []


def test_what_only_the_round_shows_as_failed_counts_and_a_second_delivery_does_not():
    tale = session_tale()
    for number in range(5):
        told = tale.batch(("NoSuchTool", f"n{number}", "No such tool available"))
        assert [signal["kind"] for signal in told["stuck"]] == (["failing"] if number == 4 else [])
        again = tale.batch(("NoSuchTool", f"n{number}", "No such tool available"))
        assert again["stuck"] == told["stuck"]


def test_an_interruption_is_no_failure_of_the_tool():
    tale = session_tale()
    for number in range(6):
        assert session_fail(tale, number, "Interrupted by user", "Bash", is_interrupt=True) == []


def test_stuck_after_3_turns_without_any_change_in_files():
    tale = SessionTale()
    start = tale.time + 1000
    for number in range(3):
        kinds = session_turn(tale, number, "Read", file_path="a.py")
        assert kinds == (["unchanged"] if number == 2 else [])
    (signal,) = tale.now()["stuck"]
    assert signal == {"kind": "unchanged", "since": start, "detail": "3 turns without a change in files"}
    tale.prompt()
    assert tale.call("Edit", "e", file_path="a.py")["stuck"] == [signal]
    assert tale.result("Edit", "e", file_path="a.py")["stuck"] == []
    assert tale.stop()["stuck"] == []


@pytest.mark.parametrize(
    ("tool", "tool_input", "changes"),
    [
        ("Write", {"file_path": "a"}, True),
        ("NotebookEdit", {"notebook_path": "a"}, True),
        ("Read", {"file_path": "a"}, False),
        ("Bash", {"command": "npm test 2>&1 | tail"}, False),
        ("Bash", {"command": "grep -rn 'a -> b' src 2>/dev/null; echo done >&2"}, False),
        ("Bash", {"command": "git status && git diff && git log"}, False),
        ("Bash", {"command": "echo x > a.txt"}, True),
        ("Bash", {"command": "cat <<E >> a.txt\nx\nE"}, True),
        ("Bash", {"command": "sed -i s/a/b/ a.txt"}, True),
        ("Bash", {"command": "cd x && mv a b"}, True),
        ("Bash", {"command": "git commit -am x"}, True),
        ("mcp__files__write_file", {"path": "a"}, True),
        ("mcp__files__list", {"path": "a"}, False),
    ],
)
def test_what_counts_as_a_change_in_files(tool, tool_input, changes):
    tale = SessionTale()
    told = [session_turn(tale, number, tool, **tool_input) for number in range(3)]
    assert told == [[], [], [] if changes else ["unchanged"]]


def test_turns_without_tools_and_commands_with_an_exclamation_mark_are_no_signal():
    tale = SessionTale()
    assert [session_turn(tale, number, None) for number in range(5)] == [[]] * 5
    assert [tale.stop()["stuck"] for _ in range(5)] == [[]] * 5


def test_turns_that_esc_ended_count_too():
    tale = SessionTale()
    for number in range(3):
        tale.prompt()
        tale.call("Read", f"c{number}")
    assert [signal["kind"] for signal in tale.prompt()["stuck"]] == ["unchanged"]


def test_a_change_by_a_subagent_is_a_change():
    tale = SessionTale()
    told = []
    for number in range(3):
        tale.prompt()
        tale.launch(f"a{number}", f"t{number}")
        tale.result("Edit", f"e{number}", f"a{number}", file_path="a.py")
        told.append(tale.stop()["stuck"])
    assert told == [[], [], []]


def test_stuck_when_a_turn_takes_longer_than_2_hours():
    tale = session_tale()
    start = tale.time
    for _ in range(119):
        tale.time += 59_000
        assert tale.say("PreToolUse", tool_name="Bash", tool_input={}, tool_use_id="t")["stuck"] == []
    told = tale.wait(61_000)
    assert told["stuck"] == [
        {"kind": "long", "since": start, "detail": "busy for more than 2 hours without an end"}
    ]
    assert tale.stop()["stuck"] == []
    tale.prompt()
    assert tale.call("Bash", "t2", command="ls")["stuck"] == []


def test_time_alone_makes_a_session_stuck_and_tells_so():
    tale = session_tale()
    tale.wait(130_000)
    tale.time += 7_000_000
    assert tale.tick() == []
    tale.time += 200_000
    assert tale.tick() == ["s1"]
    assert [signal["kind"] for signal in tale.now()["stuck"]] == ["long"]


def test_who_waits_for_a_person_or_rests_is_not_stuck_however_long():
    tale = session_tale(pid=1)
    tale.ask("Bash", command="ls")
    assert tale.wait(9 * 3_600_000)["stuck"] == []
    idle = session_tale()
    idle.stop()
    assert idle.wait(9 * 3_600_000)["stuck"] == []


def test_an_agent_that_runs_longer_than_2_hours_after_its_turn_is_a_signal():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.stop("a1")
    assert [signal["kind"] for signal in tale.wait(7_300_000)["stuck"]] == ["long"]
    assert tale.task_ended("a1")["stuck"] == []


@pytest.mark.parametrize("name", sorted(SESSION_ENDS))
def test_no_recorded_session_is_stuck_at_its_end(name):
    assert [told["stuck"] for told in session_replay(session_events(name))] == [[]] * len(SESSION_ENDS[name])


# Labels, activity, the user ------------------------------------------------


def test_a_label_is_the_users_else_the_title_else_the_prompt_else_the_project():
    tale = SessionTale()
    told = tale.say("SessionStart", source="startup")
    assert (told["label"], told["labelSource"]) == ("shop", "project")
    told = tale.prompt("  make\nthe cart   work  ")
    assert (told["label"], told["labelSource"]) == ("make the cart work", "prompt")
    assert tale.prompt("something else")["label"] == "make the cart work"
    told = tale.say("UserPromptSubmit", prompt="x", session_title="Cart")
    assert (told["label"], told["labelSource"]) == ("Cart", "title")
    rename = {"eventType": "session_meta", "hookType": "Monitor", "sessionId": "s1"}
    told = tale.apply({**rename, "data": {"action": "rename", "label": "Mine"}})
    assert (told["label"], told["labelSource"]) == ("Mine", "user")
    told = tale.say("UserPromptSubmit", prompt="x", session_title="Another title")
    assert (told["label"], told["labelSource"]) == ("Mine", "user")
    told = tale.apply({**rename, "data": {"action": "rename", "label": ""}})
    assert (told["label"], told["labelSource"]) == ("Another title", "title")


def test_what_the_user_did_wins_over_later_guesses():
    tale = session_tale()
    meta = {"eventType": "session_meta", "hookType": "Monitor", "sessionId": "s1"}
    for data in (
        {"action": "set_parent", "parentSessionId": "mine"},
        {"action": "hide", "hidden": True},
        {"action": "pin", "pinned": True},
    ):
        tale.apply({**meta, "data": data})
    events = tale.now()["counts"]["events"]
    told = tale.apply(
        {
            "eventType": "user_prompt",
            "hookType": "UserPromptSubmit",
            "sessionId": "s1",
            "parentSessionId": "guess",
            "data": {"message": "x"},
        }
    )
    assert (told["parentSessionId"], told["hidden"], told["isPinned"]) == ("mine", True, True)
    assert told["counts"]["events"] == events + 1, "what the user does is no event of the session's work"
    told = tale.apply({**meta, "data": {"action": "set_parent", "parentSessionId": None}})
    assert told["parentSessionId"] is None
    told = tale.apply(
        {
            "eventType": "user_prompt",
            "hookType": "UserPromptSubmit",
            "sessionId": "s1",
            "parentSessionId": "guess",
            "data": {"message": "x"},
        }
    )
    assert told["parentSessionId"] is None, "the user took it out of there"


def test_a_users_action_changes_neither_state_nor_wait():
    tale = session_tale()
    before = tale.ask("Bash", command="make")
    after = tale.apply(
        {
            "eventType": "session_meta",
            "hookType": "Monitor",
            "sessionId": "s1",
            "data": {"action": "pin", "pinned": True},
        }
    )
    assert {**after, "isPinned": False} == before


def test_the_parent_session_is_linked_on_both_sides():
    tale = session_tale()
    tale.apply(
        {
            "eventType": "session_start",
            "hookType": "SessionStart",
            "sessionId": "child",
            "parentSessionId": "s1",
        }
    )
    assert tale.now()["childSessionIds"] == ["child"]
    told = tale.apply({"eventType": "user_prompt", "sessionId": "s1", "parentSessionId": "s1"})
    assert told["parentSessionId"] is None, "no session is its own parent"


@pytest.mark.parametrize(
    ("tool", "tool_input", "words"),
    [
        ("Bash", {"command": "npm test", "description": "Run tests"}, "Bash: npm test"),
        ("Edit", {"file_path": "/home/dev/shop/src/app.py", "old_string": "a"}, "Edit: src/app.py"),
        ("Read", {"file_path": "/etc/hosts"}, "Read: /etc/hosts"),
        ("WebFetch", {"url": "https://a.example/x", "prompt": "read"}, "WebFetch: https://a.example/x"),
        ("Agent", {"description": "inner job", "prompt": "do it"}, "Agent: inner job"),
        ("Bash", {"command": "cat <<E\nlong\n\ttext\nE"}, "Bash: cat <<E long text E"),
        ("Bash", {"command": "echo a:"}, "Bash: echo a:"),
        ("ListAll", {}, "ListAll"),
        ("TaskCreate", {"subject": "First task", "description": "Do it"}, "TaskCreate: First task"),
        ("TaskUpdate", {"taskId": "1", "status": "completed"}, "TaskUpdate: task 1: completed"),
        ("mcp__demo__echo", {"text": "hello mcp"}, "mcp__demo__echo: hello mcp"),
        ("mcp__git__issue", {"repo": "shop", "n": 7, "e": ""}, "mcp__git__issue: repo: shop, n: 7"),
        ("mcp__db__rows", {"tables": ["a", "b"]}, 'mcp__db__rows: ["a", "b"]'),
    ],
)
def test_activity_says_tool_and_target(tool, tool_input, words):
    tale = session_tale()
    tale.call("Bash", "t0", command="sleep 1")
    assert tale.call(tool, "t1", **tool_input)["activity"] == words
    assert tale.result("Bash", "t0", command="sleep 1")["activity"] == words
    assert tale.result(tool, "t1")["activity"] == ""


def test_activity_and_targets_are_one_short_line():
    told = session_tale().call("Bash", "t1", command="x " * 5000)
    assert len(told["openCalls"][0]["target"]) <= 160 and len(told["activity"]) <= 180


def test_an_agents_activity_is_its_own():
    tale = session_tale()
    tale.launch("a1", "t1")
    tale.call("Bash", "t2", "a1", command="make")
    told = tale.call("Read", "t3", file_path="x")
    assert (told["activity"], session_agent(told, "a1")["activity"]) == ("Read: x", "Bash: make")
    told = tale.result("Read", "t3")
    assert told["activity"] == "Bash: make"
    assert session_agent(tale.result("Bash", "t2", "a1"), "a1")["activity"] == ""


# Other programs' events ----------------------------------------------------


def test_a_node_emitters_stop_is_a_turns_end_though_it_says_session_end():
    tale = SessionTale(session="0123456789abcdef")
    node = {
        "sessionId": "0123456789abcdef",
        "machineId": "node",
        "workingDirectory": "/w",
        "timestamp": NOW_MS,
    }
    tale.apply(
        {
            **node,
            "id": "n1",
            "hookType": "UserPromptSubmit",
            "eventType": "message",
            "data": {"message": "hi"},
        }
    )
    assert tale.now()["state"] == "working" and tale.now()["counts"]["prompts"] == 1
    told = tale.apply({**node, "id": "n2", "hookType": "Stop", "eventType": "session_end", "data": {}})
    assert (told["state"], told["endTime"]) == ("idle", None)
    told = tale.apply({**node, "id": "n3", "hookType": "SessionEnd", "eventType": "session_end", "data": {}})
    assert told["state"] == "ended"


def test_an_event_without_a_hook_goes_by_its_event_type():
    tale = SessionTale()
    told = tale.apply(
        {
            "eventType": "tool_call",
            "sessionId": "s1",
            "data": {"toolName": "Bash", "toolInput": {"command": "ls"}},
        }
    )
    assert (told["state"], told["activity"]) == ("working", "Bash: ls")
    assert tale.apply({"eventType": "session_end", "sessionId": "s1"})["state"] == "ended"


def test_anything_else_is_a_message_of_session_unknown():
    told = SessionTale().apply({"test": "message"})
    assert (told["sessionId"], told["state"], told["counts"]["events"]) == ("unknown", "idle", 1)


SESSION_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SESSION_FIELDS = (
    "tool_name", "tool_input", "tool_use_id", "tool_response", "message", "prompt", "error", "model", "source", "reason",
    "notification_type", "last_assistant_message", "background_tasks", "tool_calls", "session_title", "to_model",
    "agent_id", "agent_type", "mcp_server_name", "error_details", "action", "label", "cwd", "parentSessionId", "pid",
)  # fmt: skip
SESSION_LIKELY = st.sampled_from(
    ["Bash", "Agent", "AskUserQuestion", "a1", "t1", "running", "idle_prompt", "permission_prompt", "clear", "compact",
     "<task-notification><task-id>a1</task-id>", [{"tool_use_id": ["t1"]}], [{"status": "running", "id": {}}],
     {"agentId": ["a1"]}, {"questions": [{"question": {}}]}, {"agentId": "a1", "status": {}}]
)  # fmt: skip


@settings(deadline=None, max_examples=250)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*ee.EVENT_TYPES, "PostToolBatch", "PostModelSwitch", "New", ""]),
            st.dictionaries(st.sampled_from(SESSION_FIELDS), SESSION_LIKELY | SESSION_ANY_JSON, max_size=8),
        ),
        max_size=12,
    )
)
@example([("PermissionRequest", {"tool_name": "Bash"}), ("PreToolUse", {"tool_use_id": ["t1"]})])
def test_fields_of_wrong_types_never_raise(told):
    tale = SessionTale()
    for hook, fields in told:
        tale.tell({"session_id": "s1", "hook_event_name": hook, **fields})
        tale.wait(50_000)
    for session in tale.book.each_json(True):
        json.loads(ee.encode_json(session))


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([*ee.EVENT_TYPES, "PostToolBatch", ""]),
    st.dictionaries(
        st.sampled_from(
            [
                "toolName",
                "toolInput",
                "toolUseId",
                "toolOutput",
                "message",
                "error",
                "data",
                "action",
                "durationMs",
            ]
        ),
        SESSION_ANY_JSON,
    ),
)
def test_other_programs_events_of_wrong_types_never_raise(hook, data):
    tale = session_tale()
    tale.ask("Bash", command="make")
    event = ee.build_event(
        {"eventType": "tool_call", "hookType": hook, "sessionId": "s1", "data": data}, tale.time, "m"
    )
    tale.book.apply({"seq": 1, "received": tale.time, **event})
    json.loads(ee.encode_json(tale.now()))
    assert len(ee.encode_json(cm.event_row({"seq": 1, "received": 1, **event}))) < 6000


# Order ---------------------------------------------------------------------


def session_essence(told: list[dict[str, Any]]) -> list[Any]:
    """Return what must not depend on the order in which events arrive."""
    return [
        (
            each["sessionId"], each["state"], each["reason"] and (each["reason"]["kind"], each["reason"]["detail"]),
            sorted(call["toolUseId"] for call in each["openCalls"]), each["counts"], each["stuck"],
            each["label"], each["model"], each["tokenUsage"], each["isPinned"],
            sorted((agent["agentId"], agent["state"]) for agent in each["agents"]),
        )
        for each in sorted(told, key=lambda each: str(each["sessionId"]))
    ]  # fmt: skip


def session_arrivals(
    events: list[dict[str, Any]], gaps: list[int], delays: list[int]
) -> list[dict[str, Any]]:
    """Return the events as they arrive: happened `gaps` apart, each on its way for one of `delays`."""
    happened = itertools.accumulate(gaps[: len(events)], initial=NOW_MS)
    moved = [
        {**event, "timestamp": time_ms, "received": time_ms + delay}
        for event, time_ms, delay in zip(events, happened, delays)
    ]
    return session_numbered(moved)


def session_numbered(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return events in the order of their arrival, numbered in it."""
    arrived = sorted(events, key=lambda event: event["received"])
    return [{**event, "seq": number} for number, event in enumerate(arrived, 1)]


def session_in_order(arrived: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events as they would have arrived without any delay."""
    return session_numbered([{**event, "received": event["timestamp"]} for event in arrived])


SESSION_NAMED = [
    name for name in sorted(SESSION_ENDS) if not name.startswith("v1.")
]  # pairing by name only guesses
SESSION_GAPS = st.lists(st.integers(1, 1500), min_size=40, max_size=40)
SESSION_DELAYS = st.lists(st.integers(0, 2000), min_size=40, max_size=40)


@settings(deadline=None, max_examples=250)
@given(st.sampled_from(SESSION_NAMED), SESSION_GAPS, SESSION_DELAYS)
def test_the_order_of_arrival_does_not_change_how_a_session_ends(name, gaps, delays):
    events = session_events(name)
    arrived = session_arrivals(events, gaps, delays)
    assert session_essence(session_replay(arrived)) == session_essence(
        session_replay(session_in_order(arrived))
    )


@settings(deadline=None, max_examples=250)
@given(st.data(), st.sampled_from(SESSION_NAMED), SESSION_GAPS, SESSION_DELAYS)
def test_the_order_of_arrival_does_not_change_what_is_open_or_who_is_needed(data, name, gaps, delays):
    events = session_events(name)
    arrived = session_arrivals(events[: data.draw(st.integers(1, len(events)))], gaps, delays)
    assert session_essence(session_replay(arrived)) == session_essence(
        session_replay(session_in_order(arrived))
    )


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(SESSION_NAMED), st.lists(st.integers(50, 1500), min_size=40, max_size=40), SESSION_DELAYS,
    st.lists(st.integers(0, 40), min_size=40, max_size=40),
)  # fmt: skip
def test_an_event_that_a_plugin_delivers_too_changes_nothing_in_any_order(name, gaps, delays, later):
    once = session_in_order(session_arrivals(session_events(name), gaps, delays))
    doubled = list(once)
    for event, delay, after in zip(once, reversed(delays), later):
        if after:
            time_ms = event["timestamp"] + after
            doubled.append(
                {**event, "id": event["id"] + "b", "timestamp": time_ms, "received": time_ms + delay}
            )
    ends = session_replay(once), session_replay(session_numbered(doubled))
    for told in itertools.chain(*ends):
        del told["counts"]["events"]
    assert session_essence(ends[0]) == session_essence(ends[1])


def test_the_same_words_again_are_a_prompt_of_their_own_unless_they_come_at_once():
    tale = SessionTale()
    tale.prompt("yes")
    assert tale.say("UserPromptSubmit", at=tale.time + 300, prompt="yes")["counts"]["prompts"] == 1
    assert tale.prompt("yes")["counts"]["prompts"] == 2
    assert tale.say("UserPromptSubmit", prompt="yes", prompt_id="p1")["counts"]["prompts"] == 3
    assert tale.say("UserPromptSubmit", prompt="yes", prompt_id="p1")["counts"]["prompts"] == 3
    assert tale.say("UserPromptSubmit", prompt="yes", prompt_id="p2")["counts"]["prompts"] == 4


# Snapshots -----------------------------------------------------------------


def session_restored(book: cm.Sessions) -> cm.Sessions:
    """Return a book made from the snapshots of another, as after a restart."""
    restored = cm.Sessions(own_machine=SESSION_MACHINE)
    names = ["", *book.sessions]
    random.Random(len(names)).shuffle(names)
    restored.restore([(name, book.snapshot(name)) for name in names])
    return restored


def session_stream(rng: random.Random) -> list[dict[str, Any]]:
    """Return what happens to several sessions at once: recordings in disorder, spooled ones, /clear, user actions."""
    events: list[dict[str, Any]] = []
    for number, name in enumerate(rng.sample(sorted(SESSION_ENDS), 4) + ["i-clear"]):
        at = NOW_MS + rng.randrange(60_000)
        machine = rng.choice((SESSION_MACHINE, "far"))
        clock_ms = 0 if machine == SESSION_MACHINE else -3_600_000
        spooled_ms = rng.choice((0, 0, 300_000))
        for event in session_events(name):
            at += rng.choice((1, 300, 3000, 20_000, 200_000))
            more = {"spooled": True} if spooled_ms and rng.random() < 0.5 else {}
            delay = spooled_ms if more else rng.randrange(2000)
            told = {"id": f"{number}-{event['id']}", "machineId": machine, "pid": 4000 + number}
            events.append({**event, **told, **more, "timestamp": at + clock_ms, "received": at + delay})
            if rng.random() < 0.1:
                data = rng.choice((
                    {"action": "rename", "label": f"Job {number}"}, {"action": "pin", "pinned": True},
                    {"action": "set_parent", "parentSessionId": events[0]["sessionId"]},
                ))  # fmt: skip
                events.append({**event, "id": f"u{at}", "machineId": SESSION_MACHINE, "hookType": "Monitor",
                    "eventType": "session_meta", "timestamp": at, "received": at, "data": data})  # fmt: skip
            if rng.random() < 0.1:
                usage = {"usage": usage_told(at % 1000)}
                events.append({**event, "id": f"t{at}", "machineId": machine, "hookType": "", "eventType": "usage",
                    "timestamp": at + clock_ms, "received": at, "data": usage})  # fmt: skip
    return session_numbered(events)


def session_overtakes(events: list[dict[str, Any]], cut: int) -> bool:
    """Return whether events of one session overtake each other across a place in the stream."""
    last: dict[str, int] = {}
    for event in events[:cut]:
        if event["eventType"] not in ("session_meta", "usage"):
            last[event["sessionId"]] = max(event["timestamp"], last.get(event["sessionId"], 0))
    return any(event["timestamp"] < last.get(event["sessionId"], 0) for event in events[cut:])


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 1 << 32), st.floats(0, 1))
def test_a_restart_with_snapshots_gives_what_processing_live_gives(seed, share):
    """Snapshots of all sessions, then the rest of the events: but for events that overtake each other across the
    moment of the snapshot, which then count in the order of their arrival."""
    rng = random.Random(seed)
    events = session_stream(rng)
    cut = round(share * len(events))
    while session_overtakes(events, cut):
        cut += 1
    live = cm.Sessions(own_machine=SESSION_MACHINE)
    restored = live
    gone = rng.sample(range(len(events)), 2)
    for place, event in enumerate([*events, None]):
        if place == cut:
            restored = session_restored(live)
            assert restored.sessions == live.sessions
            for earlier in rng.sample(events[:cut], min(cut, 5)):
                restored.apply(earlier)  # a checkpoint is older than some snapshots
            assert restored.sessions == live.sessions
        if event is None:
            break
        for book in (live, restored) if restored is not live else (live,):
            book.apply(event)
            if place in gone:
                book.tick(event["received"] + 130_000, event["received"])
            elif place - 1 in gone and event["sessionId"] in book.sessions:
                book.end_gone(event["sessionId"], event["received"])
    assert restored.sessions == live.sessions
    assert {name: restored.skew_ms(name) for name in (SESSION_MACHINE, "far")} == {
        name: live.skew_ms(name) for name in (SESSION_MACHINE, "far")
    }


def test_a_snapshot_is_small_and_holds_no_heard_event():
    book = cm.Sessions(own_machine=SESSION_MACHINE)
    for event in session_events("large"):
        session = book.apply(event)
    assert len(book.snapshot(session.session_id)) < 4000


class SessionForeign:
    """None of the classes that a snapshot may hold."""


@pytest.mark.parametrize("row", [
    b"", b"x", pickle.dumps(7), pickle.dumps((0, ())), pickle.dumps(os.system), pickle.dumps(SessionForeign()),
    pickle.dumps((cm._SNAPSHOT_FORM, (1, 2))), pickle.dumps((cm._SNAPSHOT_FORM, (SessionForeign(),) * 62)),
], ids=range(8))  # fmt: skip
def test_a_damaged_or_foreign_snapshot_is_refused_and_takes_over_nothing(row):
    tale = session_tale()
    restored = cm.Sessions()
    with pytest.raises(ValueError, match="snapshot of 's2'"):
        restored.restore([("s1", tale.book.snapshot("s1")), ("s2", row)])
    assert restored.sessions == {} and restored.skew_ms(SESSION_MACHINE) is None


# Tokens as events of their own, calls of two agents, clocks ---------------------


def test_token_totals_move_nothing_but_the_totals():
    tale = session_tale()
    before = tale.ask("Bash", command="make")
    usage = {"eventType": "usage", "hookType": "", "sessionId": "s1", "data": {"usage": usage_told(7)}}
    tale.time += 200_000
    after = tale.apply({**usage, "timestamp": tale.time})
    assert after["tokenUsage"]["totalOutput"] == 7
    names = ("tokenUsage", "estimatedCostUsd")
    assert {**after, **dict.fromkeys(names)} == {**before, **dict.fromkeys(names)}
    assert tale.say("SessionEnd", reason="other")["state"] == "ended"
    assert tale.apply({**usage, "timestamp": tale.time})["state"] == "ended"
    tale.book.delete("s1")
    tale.apply(usage)
    assert tale.book.sessions == {}, "the user deleted it"


def test_two_agents_that_ask_for_the_same_command_wait_each_for_itself():
    tale = session_tale()
    for agent, call in (("a1", "t1"), ("b1", "t2")):
        tale.launch(agent, f"launch-{agent}")
        tale.call("Bash", call, agent, command="npm test")
        tale.ask("Bash", agent, command="npm test")
    told = tale.result("Bash", "t1", "a1", command="npm test")
    assert told["state"] == "waiting" and session_agent(told, "a1")["state"] == "working"
    assert session_agent(told, "b1")["state"] == "waiting"
    assert tale.result("Bash", "t2", "b1", command="npm test")["state"] == "working"


def test_what_waited_in_a_spool_has_waited_since_then():
    tale, say = session_far(-3_600_000)
    say("PreToolUse", tool_name="Bash", tool_use_id="t1", tool_input={"command": "make"})
    asked = tale.time + 500
    event = ee.build_event({
        "hook": payload("PermissionRequest", "s1", tool_name="Bash", tool_input={"command": "make"}),
        "id": "late", "timestamp": asked - 3_600_000,
    }, tale.time, "far")  # fmt: skip
    tale.time += 600_000
    told = tale.book.to_json(tale.book.apply({**event, "seq": 9, "received": tale.time, "spooled": True}))
    assert (told["state"], told["reason"]["since"], told["stateSince"]) == ("waiting", asked, asked)
    assert tale.wait(100_000)["state"] == "waiting"


def test_the_skew_of_a_machine_is_the_least_delay_lately():
    book = cm.Sessions(own_machine="m")
    told = {"hookType": "", "eventType": "message", "sessionId": "s", "workingDirectory": "", "data": {}}

    def say(delay: int, machine: str = "far", **more: Any) -> int | None:
        seq = next(numbers)
        book.apply({**told, **more, "id": f"e{seq}", "seq": seq, "machineId": machine,
            "timestamp": NOW_MS + seq * 1000, "received": NOW_MS + seq * 1000 + delay})  # fmt: skip
        return book.skew_ms(machine)

    numbers = itertools.count(1)
    assert book.skew_ms("far") is None and say(50_000, spooled=True) is None
    assert [say(900), say(20), say(-3_600_000), say(-3_599_800)] == [900, 20, -3_600_000, -3_599_999]
    assert say(86_400_000, imported=True) == say(500_000, demo=True) == -3_599_999
    assert say(30) == 30, "its clock was set back"
    for _ in range(2000):
        slow = say(1030)
    assert slow is not None and 1000 < slow <= 1030, "a clock that drifts is followed"
    assert say(500, "m") == 0


# Rows ----------------------------------------------------------------------

SESSION_ROW_FIELDS = {
    "seq",
    "received",
    "id",
    "timestamp",
    "sessionId",
    "machineId",
    "hookType",
    "eventType",
    "agentId",
    "agentType",
    "demo",
    "partial",
    "data",
}
SESSION_ROW_DATA = {
    "toolName",
    "toolUseId",
    "durationMs",
    "target",
    "text",
    "notificationType",
    "source",
    "reason",
    "isInterrupt",
    "toolUseIds",
}


def test_rows_are_about_three_hundred_bytes_and_have_the_agreed_fields():
    sizes = []
    for name in recording_names():
        for event in session_events(name):
            event["id"] = str(uuid.UUID(int=event["seq"]))
            row = cm.event_row(event)
            assert set(row) <= SESSION_ROW_FIELDS and set(row["data"]) <= SESSION_ROW_DATA
            assert row["partial"] is True and all(
                row[key] == event[key] for key in row if key not in ("data", "partial")
            )
            assert all(len(str(row["data"].get(key, ""))) <= 160 for key in ("target", "text"))
            assert "\n" not in row["data"].get("text", "") + row["data"].get("target", "")
            sizes.append(len(ee.encode_json(row)))
    assert 200 < statistics.median(sizes) < 400 and max(sizes) < 900


def test_a_row_says_what_the_event_was_about():
    rows = {event["hookType"]: cm.event_row(event)["data"] for event in session_events("failing")}
    assert rows["PostToolUseFailure"]["text"] == "Exit code 143 Command timed out after 1s"
    assert (
        rows["PostToolUseFailure"]["isInterrupt"] is False
        and rows["PostToolUseFailure"]["durationMs"] == 1033
    )
    assert (rows["PreToolUse"]["toolName"], rows["PreToolUse"]["target"]) == ("Bash", "sleep 5")
    assert rows["UserPromptSubmit"]["text"] == "[[scn:failing]] please do it"
    assert rows["Stop"]["text"] == "Failures seen." and rows["SessionEnd"]["reason"] == "other"
    rows = {event["hookType"]: cm.event_row(event)["data"] for event in session_events("i-misc")}
    assert rows["Notification"] == {
        "notificationType": "idle_prompt",
        "text": "Claude is waiting for your input",
    }
    assert (
        cm.event_row({"id": "x", "workingDirectory": "", "hookType": "", "data": {"test": "message"}})[
            "data"
        ]["text"]
        == '{"test": "message"}'
    )


# Many sessions -------------------------------------------------------------


def test_sessions_are_listed_newest_first_and_hidden_ones_on_demand():
    tale = session_tale()
    tale.say("SessionStart", session="s2", source="startup")
    tale.apply(
        {
            "eventType": "session_meta",
            "hookType": "Monitor",
            "sessionId": "s1",
            "data": {"action": "hide", "hidden": True},
        }
    )
    assert [told["sessionId"] for told in tale.book.each_json(True)] == ["s2", "s1"]
    assert [told["sessionId"] for told in tale.book.each_json(False)] == ["s2"]


def test_all_recordings_in_one_book_do_not_disturb_each_other():
    alone = {
        told["sessionId"]: told for name in recording_names() for told in session_replay(session_events(name))
    }
    streams = [session_events(name) for name in recording_names()]
    mixed = [event for group in itertools.zip_longest(*streams) for event in group if event is not None]
    together = {told["sessionId"]: told for told in session_replay(mixed)}
    assert together == alone


def test_a_deleted_session_is_forgotten():
    tale = session_tale()
    assert tale.book.delete("s1") is True and tale.book.delete("s1") is False
    assert tale.prompt("new words")["counts"] == {
        "events": 1, "toolCalls": 0, "toolErrors": 0, "interrupted": 0, "prompts": 1
    }  # fmt: skip


# ---------------------------------------------------------------------------
# Token usage: what transcripts say, read once, and what it costs
#
# The recorded transcripts end with the client's own sums (`cost-state`): ours must be the same, to the token and
# to the cent.
# ---------------------------------------------------------------------------

USAGE_MACHINE = "box"
USAGE_OF_MAIN = ("simple", "failing", "thinking")
USAGE_WITH_AGENTS = ("subagent", "subagent-default", "nested", "parallel")
USAGE_RECORDINGS = USAGE_OF_MAIN + USAGE_WITH_AGENTS


def usage_transcript(name: str) -> str:
    """Return the path of a recording's transcript."""
    (path,) = glob.glob(f"{RECORDED}/transcripts/{name}/*.jsonl")
    return path


def usage_event(path: str, session: str = "s1", hook: str = "Stop", **fields: Any) -> dict[str, Any]:
    """Return the event of one hook that names a transcript."""
    return ee.build_event(
        {**payload(hook, session, **fields), "transcript_path": path}, NOW_MS, USAGE_MACHINE
    )


def usage_read(reader: ee.UsageReader, path: str, session: str = "s1", **fields: Any) -> Any:
    """Return what the reader makes of an event that names a transcript; None when there is nothing new."""
    event = usage_event(path, session, **fields)
    before = json.dumps(event)
    told = reader.usage_event(event)
    assert json.dumps(event) == before
    if told is None:
        return None
    same = ("sessionId", "machineId", "workingDirectory", "timestamp")
    assert told == {
        "eventType": "usage", "hookType": "", **{name: event[name] for name in same},
        "data": {"usage": told["data"]["usage"]},
    }  # fmt: skip
    return told["data"]["usage"]


def usage_reader(home: object) -> ee.UsageReader:
    """Return a reader with its own directory."""
    return ee.UsageReader(str(home), USAGE_MACHINE)


def usage_line(message_id: str, output: int, model: str = "claude-opus-4-5-20251101", **more: int) -> bytes:
    """Return one assistant line of a transcript."""
    usage = {"input_tokens": 1, "output_tokens": output, **more}
    message = {"id": message_id, "type": "message", "role": "assistant", "model": model, "usage": usage}
    return json.dumps({"type": "assistant", "isSidechain": False, "message": message}).encode() + b"\n"


def usage_output(usage: Any) -> int:
    """Return the output tokens of all models."""
    return sum(counts["output"] for counts in usage["models"].values())


def usage_cost_state(name: str) -> dict[str, Any]:
    """Return the client's own sums at the end of a recorded transcript."""
    with open(usage_transcript(name), encoding="utf-8") as file:
        return [json.loads(line) for line in file if '"cost-state"' in line][-1]


@pytest.mark.parametrize("name", USAGE_RECORDINGS)
def test_tokens_and_cost_are_those_that_the_client_itself_counted(tmp_path, name):
    usage = usage_read(usage_reader(tmp_path), usage_transcript(name))
    own = usage_cost_state(name)
    assert {
        model: (
            told["inputTokens"], told["outputTokens"], told["cacheReadInputTokens"],
            told["cacheCreationInputTokens"], told["cacheCreationEphemeral1hInputTokens"],
        )
        for model, told in own["modelUsage"].items()
    } == {model: tuple(counts[name] for name in ee.COUNT_NAMES) for model, counts in usage["models"].items()}  # fmt: skip
    tale = session_tale()
    told = tale.say("SessionEnd", reason="other", usage=usage)
    assert told["estimatedCostUsd"] == pytest.approx(own["totalCostUSD"], abs=1e-6)


def test_a_message_of_several_lines_counts_once(tmp_path):
    path = usage_transcript("simple")
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    naive = sum(line["message"]["usage"]["output_tokens"] for line in lines if line["type"] == "assistant")
    assert (naive, usage_output(usage_read(usage_reader(tmp_path), path))) == (250, 210)


@pytest.mark.parametrize("name", USAGE_WITH_AGENTS)
def test_the_tokens_of_agents_add_up_to_those_of_the_session(tmp_path, name):
    usage = usage_read(usage_reader(tmp_path), usage_transcript(name))
    agents = {event["agent_id"] for event in recorded(name) if event["hook_event_name"] == "SubagentStart"}
    assert set(usage["agents"]) == {"", *agents}
    by_agent = [counts for by_model in usage["agents"].values() for counts in by_model.values()]
    for count in ee.COUNT_NAMES:
        assert sum(counts[count] for counts in by_agent) == sum(
            counts[count] for counts in usage["models"].values()
        )


def test_an_old_clients_agent_transcript_beside_the_session_counts_for_its_agent(tmp_path):
    main, agent = tmp_path / "s1.jsonl", tmp_path / "agent-a94648d.jsonl"
    main.write_bytes(usage_line("m1", 5))
    agent.write_bytes(usage_line("m2", 7))
    told = usage_read(
        usage_reader(tmp_path), str(main), hook="SubagentStop", agent_transcript_path=str(agent)
    )
    assert {name: usage_output({"models": used}) for name, used in told["agents"].items()} == {
        "": 5, "a94648d": 7,
    }  # fmt: skip


def test_a_fork_counts_only_what_is_its_own(tmp_path):
    reader, old, fork = usage_reader(tmp_path), tmp_path / "old.jsonl", tmp_path / "fork.jsonl"
    old.write_bytes(usage_line("m1", 5) + usage_line("m2", 6))
    assert usage_output(usage_read(reader, str(old), "old")) == 11
    fork.write_bytes(old.read_bytes())
    assert usage_read(reader, str(fork), "fork") is None
    fork.write_bytes(old.read_bytes() + usage_line("m3", 7))
    assert usage_output(usage_read(reader, str(fork), "fork")) == 7
    assert usage_read(reader, str(old), "old") is None
    assert usage_output(usage_read(usage_reader(tmp_path), str(old), "old")) == 11


def test_what_the_client_wrote_itself_is_no_model(tmp_path):
    path = tmp_path / "s1.jsonl"
    path.write_bytes(usage_line("m1", 3, "<synthetic>"))
    assert usage_read(usage_reader(tmp_path), str(path)) is None


def test_a_last_line_without_its_end_waits_for_it(tmp_path):
    reader, path = usage_reader(tmp_path), tmp_path / "s1.jsonl"
    line = usage_line("m2", 7)
    path.write_bytes(usage_line("m1", 5) + line[:-20])
    assert usage_output(usage_read(reader, str(path))) == 5
    with path.open("ab") as file:
        file.write(line[-20:])
    assert usage_output(usage_read(reader, str(path))) == 12


def test_what_was_read_is_not_read_again(tmp_path, monkeypatch):
    path, read = tmp_path / "s1.jsonl", []
    path.write_bytes(b"".join(usage_line(f"m{number}", 1) for number in range(5000)))
    real = os.pread
    reader = usage_reader(tmp_path)
    assert usage_output(usage_read(reader, str(path))) == 5000
    monkeypatch.setattr(os, "pread", lambda fd, length, at: (read.append(length), real(fd, length, at))[1])
    assert usage_read(reader, str(path)) is None and read == []
    with path.open("ab") as file:
        file.write(usage_line("more", 1))
    assert usage_output(usage_read(usage_reader(tmp_path), str(path))) == 5001  # also by another process
    assert sum(read) < 2000


@pytest.mark.parametrize("how", ["another file", "rewritten in place", "shortened"])
def test_a_replaced_transcript_is_read_from_its_start(tmp_path, how):
    reader, path = usage_reader(tmp_path), tmp_path / "s1.jsonl"
    path.write_bytes(usage_line("m1", 5) + usage_line("m2", 6))
    assert usage_output(usage_read(reader, str(path))) == 11
    content = usage_line("m9", 100) + (b"" if how == "shortened" else usage_line("m2", 6) * 3)
    if how == "another file":
        (tmp_path / "new").write_bytes(content)
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(content)
    assert usage_output(usage_read(reader, str(path))) == 111


def test_of_several_lines_of_one_message_the_largest_numbers_count(tmp_path):
    reader, path = usage_reader(tmp_path), tmp_path / "s1.jsonl"
    for output, expected in ((1, 1), (40, 40), (7, None), (41, 41)):
        with path.open("ab") as file:
            file.write(usage_line("m1", output))
        usage = usage_read(reader, str(path))
        assert (usage and usage_output(usage)) == expected


@given(
    outputs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 999), st.integers(0, 3)), max_size=30),
    cuts=st.lists(st.integers(0, 8000), max_size=8),
    forget=st.integers(0, 8),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_however_a_transcript_grows_its_totals_are_the_same(outputs, cuts, forget):
    noise = (b"", b"not json\n", b'{"type":"user","usage":"assistant"}\n', b"\n")
    whole = b"".join(usage_line(f"m{key}", output) + noise[odd] for key, output, odd in outputs)
    expected = sum(
        max(given_output for key, given_output, _ in outputs if key == each)
        for each in {key for key, *_ in outputs}
    )
    with tempfile.TemporaryDirectory() as home:
        path, usage, place = home + "/s1.jsonl", None, 0
        reader = usage_reader(home)
        for number, cut in enumerate([*sorted(min(cut, len(whole)) for cut in cuts), len(whole)]):
            with open(path, "ab") as file:
                file.write(whole[place:cut])
            place = cut
            if number == forget:
                reader.close()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(home + "/usage.db")
            usage = usage_read(reader, path) or usage
        reader.close()
    assert (usage_output(usage) if usage else 0) == expected


@given(data=st.binary(max_size=600), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_no_bytes_break_the_transcript_parser_and_pieces_change_nothing(data, sizes):
    data = usage_line("m1", 3)[:-1] + data + b"\n" + usage_line("m2", 4)
    whole, pieces, place = ee.TranscriptParser(), ee.TranscriptParser(), 0
    found = []
    for size in itertools.cycle(sizes):
        found += pieces.feed(data[place : place + size])
        place += size
        if place >= len(data):
            break
    assert found == whole.feed(data) and pieces.consumed == whole.consumed == len(data)
    assert found[-1].message_id == "m2"


@pytest.mark.parametrize("value", [None, -1, 1.5, "7", True, 1 << 70, [], {}])
def test_odd_numbers_of_tokens_count_as_none(tmp_path, value):
    path = tmp_path / "s1.jsonl"
    path.write_bytes(
        usage_line("m1", value, cache_creation=value) + usage_line("m2", 4, cache_creation_input_tokens=9)
    )
    assert usage_read(usage_reader(tmp_path), str(path))["models"] == {
        "claude-opus-4-5-20251101": {"input": 2, "output": 4, "cacheRead": 0, "cacheCreation": 9}
    }


@pytest.mark.parametrize(
    "what", ["fifo", "link", "directory", "device", "missing", "another users", "relative", "text"]
)
def test_only_a_regular_file_of_this_user_is_read(tmp_path, what):
    path = str(tmp_path / "s1.jsonl")
    content = usage_line("m1", 3)
    if what == "fifo":
        os.mkfifo(path)
    elif what == "link":
        (tmp_path / "target").write_bytes(content)
        os.symlink(tmp_path / "target", path)
    elif what == "directory":
        os.mkdir(path)
    elif what == "device":
        path = "/dev/zero"
    elif what == "another users":
        if os.geteuid():
            pytest.skip("only root can give files away")
        (tmp_path / "s1.jsonl").write_bytes(content)
        os.chown(path, 12345, -1)
    elif what == "relative":
        path = os.path.relpath(usage_transcript("simple"))
    elif what == "text":
        path = str(tmp_path / "s1.txt")
        (tmp_path / "s1.txt").write_bytes(content)
    before = time.monotonic()
    assert usage_read(usage_reader(tmp_path), path) is None
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "path", [None, 7, "", [], "/x\0y.jsonl", "/\ud800.jsonl", "/" + "x" * 9000 + ".jsonl"]
)
def test_an_odd_transcript_path_is_no_failure(tmp_path, path):
    reader = usage_reader(tmp_path)
    assert usage_read(reader, path) is None
    agent = usage_read(reader, usage_transcript("simple"), hook="SubagentStop", agent_transcript_path=path)
    assert usage_output(agent) == 210 and not (tmp_path / "emit.log").exists()


def test_only_events_that_end_something_on_this_machine_are_given_usage(tmp_path):
    path = usage_transcript("simple")
    told = {hook for hook in ee.EVENT_TYPES if usage_read(usage_reader(tmp_path), path, hook=hook)}
    assert told == {"Stop", "StopFailure", "SubagentStop", "SessionEnd"}
    foreign = {**usage_event(path), "machineId": "elsewhere"}
    assert usage_reader(tmp_path).usage_event(foreign) is None


def test_a_reader_that_must_stop_loses_nothing_of_what_it_has_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "TRANSCRIPT_CHUNK_BYTES", 5000)
    path, stopping, read = tmp_path / "s1.jsonl", threading.Event(), []
    path.write_bytes(b"".join(usage_line(f"m{number}", 1) for number in range(500)))
    real = os.pread

    def pread(fd: int, length: int, at: int) -> bytes:
        read.append(length)
        if len(read) == 9:
            stopping.set()
        return real(fd, length, at)

    monkeypatch.setattr(os, "pread", pread)
    assert usage_read(ee.UsageReader(str(tmp_path), USAGE_MACHINE, stopping), str(path)) is None
    stopped = sum(read)
    assert usage_output(usage_read(usage_reader(tmp_path), str(path))) == 500
    assert 20_000 < stopped < 60_000 < sum(read) < path.stat().st_size * 1.3


def test_a_session_of_too_many_messages_says_that_its_totals_are_not_all(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "COUNTED_MESSAGES_LIMIT", 100)
    reader, path = usage_reader(tmp_path), tmp_path / "s1.jsonl"
    path.write_bytes(b"".join(usage_line(f"m{number}", 1) for number in range(150)))
    assert "partial" not in usage_read(reader, str(path))
    with path.open("ab") as file:
        file.write(usage_line("more", 1))
    usage = usage_read(reader, str(path))
    assert (usage_output(usage), usage["partial"]) == (150, True)


def test_events_do_not_wait_for_transcripts_and_each_session_is_read_once_more(tmp_path, monkeypatch):
    told, reading, goes_on = [], threading.Event(), threading.Event()
    for name in ("s1", "s2"):
        (tmp_path / f"{name}.jsonl").write_bytes(usage_line(name, 5))
    real = ee._session_usage

    def slow(*arguments: Any) -> Any:
        reading.set()
        goes_on.wait(10)
        return real(*arguments)

    monkeypatch.setattr(ee, "_session_usage", slow)
    worker = ee.UsageWorker(str(tmp_path), USAGE_MACHINE, told.append)
    worker.put(usage_event(str(tmp_path / "s1.jsonl"), "s1", "PreToolUse"))
    assert not worker.is_busy
    worker.put(usage_event(str(tmp_path / "s1.jsonl"), "s1"))
    assert reading.wait(10) and worker.is_busy
    with (tmp_path / "s1.jsonl").open("ab") as file:
        file.write(usage_line("late", 2))
    for number in range(50):
        worker.put({**usage_event(str(tmp_path / "s1.jsonl"), "s1"), "timestamp": NOW_MS + number})
        worker.put(usage_event(str(tmp_path / "s2.jsonl"), "s2"))
    goes_on.set()
    eventually(lambda: not worker.is_busy)
    assert [(event["sessionId"], usage_output(event["data"]["usage"])) for event in told] == [
        ("s1", 5), ("s1", 7), ("s2", 5),
    ]  # fmt: skip
    assert told[1]["timestamp"] == NOW_MS + 49
    worker.close()
    assert not any(thread.name == "usage" for thread in threading.enumerate())


def test_what_is_pending_is_bounded_and_a_worker_that_never_worked_closes(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "PENDING_USAGE_LIMIT", 3)
    monkeypatch.setattr(ee.UsageReader, "usage_event", lambda self, event: self._stopping.wait(10) and None)
    ee.UsageWorker(str(tmp_path), USAGE_MACHINE, pytest.fail).close()
    worker = ee.UsageWorker(str(tmp_path), USAGE_MACHINE, pytest.fail)
    for number in range(9):
        worker.put(usage_event("/t.jsonl", f"s{number}"))
    assert {session for session, _ in worker._pending} == {"s6", "s7", "s8"}
    worker.close()


def test_the_totals_of_a_large_transcript_are_an_event_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "TRANSCRIPT_CHUNK_BYTES", 5000)
    path = tmp_path / "s1.jsonl"
    huge = b'{"type":"user","message":"' + b"x" * 50_000 + b'"}\n'
    path.write_bytes(
        b"".join(usage_line(f"m{number}", 1) for number in range(300)) + huge + usage_line("m", 1)
    )
    with protocol_inside() as monitor:
        stop = json.dumps(payload("Stop", "s1", transcript_path=str(path))).encode()
        session = monitor.loop.call(lambda: monitor.take_now(stop) and monitor.status.session_json("s1"))
        assert session["tokenUsage"] is None
        before = {name: session[name] for name in ("counts", "state", "lastEventTime", "stateSince")}
        session = eventually(
            lambda: (
                (told := monitor.loop.call(lambda: monitor.status.session_json("s1")))
                and told["tokenUsage"] and told
            ), 1,
        )  # fmt: skip
        assert session["tokenUsage"]["totalOutput"] == 301 and "partial" not in session["tokenUsage"]
        assert {name: session[name] for name in before} == before
        stored = [json.loads(line) for line in monitor.journal.lines()]
        assert [event["eventType"] for event in stored] == ["turn_end", "usage"]
        assert "usage" not in stored[0]["data"] and stored[0]["timestamp"] == stored[1]["timestamp"]
        book = cm.Sessions(own_machine=monitor.settings.machine_id)
        for event in stored:
            book.apply(event)
        assert book.to_json(book.sessions["s1"])["tokenUsage"] == session["tokenUsage"]


def test_usage_that_a_kill_kept_from_being_stored_comes_with_the_next_end(tmp_path):
    path = tmp_path / "s1.jsonl"
    path.write_bytes(usage_line("m1", 5))
    reader = usage_reader(tmp_path)
    assert usage_output(usage_read(reader, str(path))) == 5
    reader.close()  # counted, but its process is killed before the event is stored
    again = usage_reader(tmp_path)
    assert usage_output(usage_read(again, str(path), hook="SessionEnd")) == 5
    assert usage_read(again, str(path), hook="SessionEnd") is None


def test_a_line_longer_than_is_waited_for_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "TRANSCRIPT_LINE_LIMIT_BYTES", 4000)
    monkeypatch.setattr(ee, "TRANSCRIPT_CHUNK_BYTES", 1000)
    huge = b'{"type":"user","message":"' + b"x" * 30_000 + b'"}\n'
    path = tmp_path / "s1.jsonl"
    path.write_bytes(usage_line("m1", 5) + huge + usage_line("m2", 6))
    assert usage_output(usage_read(usage_reader(tmp_path), str(path))) == 11


def test_transcripts_that_nobody_can_read_leave_no_trace_and_those_that_went_keep_their_count(tmp_path):
    reader, path = usage_reader(tmp_path), tmp_path / "s1.jsonl"
    assert usage_read(reader, str(path)) is None
    assert reader._open().execute("SELECT COUNT(*) FROM sessions").fetchone()[0] == 0
    path.write_bytes(usage_line("m1", 5))
    assert usage_output(usage_read(reader, str(path))) == 5
    path.unlink()
    assert usage_output(usage_read(usage_reader(tmp_path), str(path))) == 5


def test_the_file_of_what_was_counted_is_private_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(ee, "COUNTED_MESSAGES_LIMIT", 100)
    reader = usage_reader(tmp_path)
    for number in range(10):
        path = tmp_path / f"s{number}.jsonl"
        path.write_bytes(b"".join(usage_line(f"{number}-{each}", 1) for each in range(40)))
        assert usage_output(usage_read(reader, str(path), f"s{number}")) == 40
    for name in os.listdir(tmp_path):
        if name.startswith("usage.db"):
            assert hook_mode_of(tmp_path / name) == 0o600
    rows = reader._open().execute("SELECT COUNT(*) FROM messages").fetchone()[0]
    assert rows <= 140
    with (tmp_path / "s0.jsonl").open("ab") as file:
        file.write(usage_line("0-more", 1))
    assert usage_output(usage_read(reader, str(tmp_path / "s0.jsonl"), "s0")) == 41  # forgotten, read again


@pytest.mark.parametrize("damage", [b"no database at all" * 100, b"", None])
def test_a_damaged_file_of_what_was_counted_is_made_anew(tmp_path, damage):
    path = usage_transcript("simple")
    reader = usage_reader(tmp_path)
    assert usage_output(usage_read(reader, path)) == 210
    reader.close()
    content = (tmp_path / "usage.db").read_bytes()
    spoilt = content[:100] + b"\xff" * (len(content) - 100) if damage is None else damage
    (tmp_path / "usage.db").write_bytes(spoilt)
    told = [usage_read(usage_reader(tmp_path), path) for _ in range(2)]
    assert usage_output(told[-1]) == 210


def test_a_directory_that_cannot_be_written_costs_the_usage_only(tmp_path):
    (tmp_path / "file").write_text("")
    assert usage_read(usage_reader(tmp_path / "file" / "home"), usage_transcript("simple")) is None


def test_a_reader_killed_at_any_moment_counts_nothing_twice(tmp_path):
    path, script = tmp_path / "s1.jsonl", tmp_path / "read.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "import emit_event as ee\n"
        f"reader = ee.UsageReader({str(tmp_path)!r}, {USAGE_MACHINE!r})\n"
        f"event = ee.build_event({{'hook_event_name': 'Stop', 'session_id': 's1', 'transcript_path': {str(path)!r}}}, 1,"
        f" {USAGE_MACHINE!r})\n"
        "print(flush=True)\n"
        "while True:\n"
        "    reader.usage_event(event)\n"
    )
    chance, count = random.Random(7), 0
    for _ in range(8):
        reading = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
        assert reading.stdout is not None
        reading.stdout.read(1)
        for _ in range(20):
            with path.open("ab") as file:
                file.write(b"".join(usage_line(f"m{count + each}", 1) for each in range(50)))
            count += 50
            time.sleep(chance.random() * 0.01)
        reading.kill()
        reading.wait()
        reading.stdout.close()
    assert usage_output(usage_read(usage_reader(tmp_path), str(path))) == count


# Where subagents come from ---------------------------------------------------


def usage_copied(name: str, directory: object) -> list[dict[str, Any]]:
    """Copy a recording's transcripts; return its payloads with their paths in the copy."""
    (path,) = glob.glob(f"{RECORDED}/transcripts/{name}/*.jsonl")
    shutil.copytree(os.path.dirname(path), f"{directory}/{name}")
    return [
        {**told, "transcript_path": f"{directory}/{name}/{os.path.basename(path)}"} for told in recorded(name)
    ]


def usage_noted(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events of these payloads with the client's notes on them."""
    reader, events = ee.AgentNoteReader(USAGE_MACHINE), []
    for number, each in enumerate(told):
        events.append(
            ee.build_event({"hook": each, "id": f"n{number}", "timestamp": NOW_MS + number}, 1, USAGE_MACHINE)
        )
        reader.add_note(events[-1])
    return events


def test_each_agents_first_event_carries_the_note_on_it_once(tmp_path):
    events = usage_noted(usage_copied("nested", tmp_path))
    noted = [event for event in events if "agentMeta" in event["data"]]
    assert [(event["data"]["agentMeta"].get("parentAgentId"), event["data"]["agentDescription"]) for event in noted] == [
        (None, "outer job"), ("a8bdf82a3b7eac1f1", "inner job"),
    ]  # fmt: skip
    assert [event["agentId"] for event in noted] == ["a8bdf82a3b7eac1f1", "a10958c072d3ed1c1"]
    assert noted[1]["data"]["agentMeta"] == {
        "agentType": "general-purpose", "toolUseId": "toolu_fake_83f675246c204e179b",
        "parentAgentId": "a8bdf82a3b7eac1f1", "requestShape": "foreground", "spawnDepth": 2,
    }  # fmt: skip


def test_a_note_that_is_written_later_comes_with_the_next_event(tmp_path):
    copied = usage_copied("subagent", tmp_path)
    (note,) = glob.glob(f"{tmp_path}/subagent/*/subagents/*.meta.json")
    os.rename(note, note + ".later")
    mine = [told for told in copied if "agent_id" in told]
    reader = ee.AgentNoteReader(USAGE_MACHINE)
    for number, told in enumerate(mine[:4]):
        if number == 1:
            with open(note, "w") as file:
                file.write('{"half": ')
        elif number == 2:
            os.replace(note + ".later", note)
        event = ee.build_event(told, NOW_MS, USAGE_MACHINE)
        reader.add_note(event)
        assert ("agentMeta" in event["data"]) == (number == 2)


def test_an_event_that_could_not_be_kept_has_its_note_when_it_comes_again(tmp_path):
    copied = [told for told in usage_copied("subagent", tmp_path) if "agent_id" in told]
    reader, noted = ee.AgentNoteReader(USAGE_MACHINE), []
    for number in (0, 0, 1):
        given_object = {"hook": copied[number], "id": f"e{number}", "timestamp": NOW_MS}
        event = ee.build_event(given_object, NOW_MS, USAGE_MACHINE)
        reader.add_note(event)
        noted.append("agentMeta" in event["data"])
    assert noted == [True, True, False]


def test_the_note_says_which_agent_is_whose_while_nothing_else_does_yet(tmp_path):
    book = cm.Sessions(own_machine=USAGE_MACHINE)
    for event in usage_noted(usage_copied("parallel", tmp_path)):
        told = book.to_json(book.apply(event))
        if event["hookType"] == "PostToolUse" and event["data"]["toolName"] == "Agent":
            break  # until here the calls are open, and either could have started either
        noted = [agent["label"] for agent in told["agents"]]
    assert sorted(noted) == ["left job", "right job"]


def test_the_clients_note_wins_over_every_guess():
    tale = session_tale()
    tale.call("Agent", "t1", description="a guess")
    tale.say("SubagentStart", agent="a1")
    tale.say("SubagentStart", agent="a2")
    told = tale.say("PreToolUse", agent="a2", tool_name="Read", tool_use_id="r", tool_input={},
        agentMeta={"parentAgentId": "a1", "requestShape": "background"}, agentDescription="the truth")  # fmt: skip
    assert [(agent["label"], agent["parentAgentId"]) for agent in told["agents"]] == [
        ("a guess", None), ("the truth", "a1"),
    ]  # fmt: skip
    told = tale.result(
        "Agent", "t1", response={"agentId": "a2", "status": "completed"}, description="a guess"
    )
    assert (told["agents"][1]["label"], told["agents"][1]["parentAgentId"]) == ("the truth", "a1")


@pytest.mark.parametrize(
    "note", [None, 7, [], "x", {}, {"parentAgentId": 7}, {"parentAgentId": "gone"}, {"parentAgentId": "a1"}]
)
def test_an_odd_note_makes_no_odd_agent(note):
    tale = session_tale()
    told = tale.say("SubagentStart", agent="a1", agentMeta=note, agentDescription=[note])
    (agent,) = told["agents"]
    assert agent["parentAgentId"] is None and agent["state"] == "working"
    json.dumps(tale.stop("a1"))


@pytest.mark.parametrize("agent", ["../../x", "a/b", "", "x" * 200, "\ud800", "a\0b"])
def test_no_agent_id_leads_to_another_file(tmp_path, agent):
    copied = usage_copied("subagent", tmp_path)[0]
    event = ee.build_event({**copied, "agent_id": agent}, NOW_MS, USAGE_MACHINE)
    ee.AgentNoteReader(USAGE_MACHINE).add_note(event)
    assert "agentMeta" not in event["data"]


def test_at_the_level_of_metadata_a_note_keeps_its_ids_and_loses_its_words(tmp_path):
    events = [
        protected(event, ee.Privacy(metadata_only=True))
        for event in usage_noted(usage_copied("nested", tmp_path))
    ]
    noted = [event["data"] for event in events if "agentMeta" in event["data"]]
    assert len(noted) == 2 and not any("agentDescription" in data for data in noted)
    assert "inner job" not in json.dumps(events)


def test_nested_agents_know_their_parents_through_real_hooks_and_after_a_restart(hook_installed, running):
    for told in usage_copied("nested", running.home):
        if told["hook_event_name"] == "PostToolUse" and told.get("tool_name") == "Agent":
            break
        hook_call(hook_installed.command, told, running.environment)
    (session,) = running.sessions().values()
    tree = {agent["label"]: agent["parentAgentId"] for agent in session["agents"]}
    assert tree == {"outer job": None, "inner job": session["agents"][0]["agentId"]}
    running.stop()
    running.start()
    (again,) = running.sessions().values()
    assert again["agents"] == session["agents"]


# In sessions ----------------------------------------------------------------


def usage_told(output: int, model: str = "claude-opus-4-5", **more: Any) -> dict[str, Any]:
    """Return `data.usage` with one model."""
    counts = {"input": 10, "output": output, "cacheRead": 0, "cacheCreation": 0}
    return {"models": {model: counts}, "agents": {"": {model: counts}}, "model": model, **more}


def test_the_newest_usage_is_the_sessions_whatever_the_order_of_arrival():
    for order in itertools.permutations((5, 9, 30)):
        tale = session_tale()
        start, tale.time = tale.time, tale.time + 60_000
        for output in order:
            told = tale.say("Stop", at=start + output * 1000, usage=usage_told(output))
        assert told["tokenUsage"] == {
            "totalInput": 10, "totalOutput": 30, "totalCacheRead": 0, "totalCacheCreation": 0,
        }  # fmt: skip
        assert told["estimatedCostUsd"] == pytest.approx((10 * 5 + 30 * 25) / 1e6)


def test_a_session_learns_its_model_from_its_transcript_when_nobody_said_it():
    tale = SessionTale()
    assert tale.prompt()["model"] is None
    assert tale.say("Stop", usage=usage_told(5))["model"] == "claude-opus-4-5"
    assert tale.say("SessionStart", source="startup", model="claude-fable-5")["model"] == "claude-fable-5"
    assert tale.say("Stop", usage=usage_told(6))["model"] == "claude-fable-5"


def test_each_agent_has_its_own_tokens(tmp_path):
    usage = usage_read(usage_reader(tmp_path), usage_transcript("parallel"))
    (last,) = [told for event, told in session_steps("parallel") if event["hookType"] == "SessionEnd"]
    assert [agent["tokenUsage"] for agent in last["agents"]] == [None, None]  # nobody read anything
    tale = SessionTale(session=recorded("parallel")[0]["session_id"])
    for given_payload in recorded("parallel"):
        more = {"usage": usage} if given_payload["hook_event_name"] == "SessionEnd" else {}
        told = tale.tell({**given_payload, **more})
    outputs = sorted(agent["tokenUsage"]["totalOutput"] for agent in told["agents"])
    assert outputs == [123, 166] and told["tokenUsage"]["totalOutput"] == 370


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": 7, "output_tokens": 8}, 7, "x", [], None, {"models": 1, "agents": {}}, {"models": {}, "agents": []},
    ],
)  # fmt: skip
def test_what_other_programs_call_usage_is_left_alone(usage):
    tale = session_tale()
    told = tale.say("Stop", usage=usage)
    assert (told["state"], told["tokenUsage"], told["estimatedCostUsd"]) == ("idle", None, None)


@pytest.mark.parametrize(
    "usage",
    [
        {"models": {"m": 7}, "agents": {"": 7}},
        {"models": {"m": {"input": "x", "output": -3, "cacheRead": 1e9, "over100k": 7}}, "agents": {"a": {"m": []}}},
        {"models": {"": {}}, "agents": {}, "model": 9, "partial": "yes"},
    ],
)  # fmt: skip
def test_odd_usage_counts_as_nothing(usage):
    told = session_tale().say("Stop", usage=usage)
    assert set(told["tokenUsage"].values()) == {0} and told["estimatedCostUsd"] == 0


def test_usage_that_is_not_whole_yet_says_so():
    tale = session_tale()
    assert tale.say("Stop", usage=usage_told(5, partial=True))["tokenUsage"]["partial"] is True
    assert "partial" not in tale.say("Stop", usage=usage_told(6))["tokenUsage"]


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("claude-opus-5-5", "opus-5-5"),
        ("claude-opus-4-5-20251101", "opus-4-5"),
        ("claude-opus-4-20250514", "opus-4"),
        ("claude-opus-4-0", "opus-4"),
        ("claude-sonnet-4-5@20250929", "sonnet-4-5"),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "sonnet-4-5"),
        ("anthropic/claude-sonnet-5.5", "sonnet-5-5"),
        ("claude-opus-4-6[1m]", "opus-4-6"),
        ("claude-3-7-sonnet-20250219", "sonnet-3-7"),
        ("claude-3-5-haiku-latest", "haiku-3-5"),
        ("claude-3-opus-20240229", "opus-3"),
        ("gpt-6", ""),
        ("", ""),
    ],
)
def test_the_family_of_a_model_is_found_in_any_clouds_spelling(model, family):
    assert cm.model_family(model) == family


def usage_cost(model: str, prices: dict[str, Any] | None = None, **counts: int) -> Any:
    """Return the estimate for a million tokens of each named kind."""
    usage = cm.SessionUsage(1, {model: cm.Tokens(**counts)})
    return cm.PriceList(prices).estimate(usage)


def test_every_price_follows_the_rules_of_the_price_list():
    assert all(family == cm.model_family("claude-" + family) or family[-1] == "3" for family in cm.PRICES)
    for family, price in cm.PRICES.items():
        assert price.output == pytest.approx(5 * price.input), family
        assert price.cache_write_5m == pytest.approx(1.25 * price.input, rel=0.05), family
        assert price.cache_write_1h == pytest.approx(2 * price.input), family
        assert 0.02 * price.input < price.cache_read < 0.13 * price.input, family


def test_each_kind_of_token_has_its_price():
    million, model = 1_000_000, "claude-opus-4-1-20250805"
    assert usage_cost(model, input=million) == 15
    assert usage_cost(model, output=million) == 75
    assert usage_cost(model, cache_read=million) == 1.5
    assert usage_cost(model, cache_creation=million) == 18.75
    assert usage_cost(model, cache_creation=million, cache_creation_1h=million) == 30


def test_an_unknown_model_has_tokens_and_no_cost_and_half_a_sum_is_none():
    tale = session_tale()
    told = tale.say("Stop", usage=usage_told(7, "some-model"))
    assert (told["tokenUsage"]["totalOutput"], told["estimatedCostUsd"]) == (7, None)
    both = usage_told(7, "some-model")
    both["models"]["claude-opus-5-5"] = {"input": 1, "output": 1}
    assert tale.say("Stop", usage=both)["estimatedCostUsd"] is None


def test_configured_prices_win_by_model_by_family_and_by_kind():
    price = {"input": 100, "output": 200}
    for name in ("claude-opus-4-5-20251101", "opus-4-5", "opus"):
        assert usage_cost("claude-opus-4-5-20251101", {name: price}, input=10_000) == 1
    assert usage_cost("claude-sonnet-4-5", {"opus": price}, input=10_000) == 0.03
    assert usage_cost("my-model", {"my-model": price}, output=10_000) == 2
    assert usage_cost("my-model", {"my-model": price}, cache_read=10_000) == 0.1
    exact = {**price, "cacheRead": 7, "cacheWrite5m": 8, "cacheWrite1h": 9}
    million = 1_000_000
    assert (
        usage_cost(
            "m", {"m": exact}, cache_read=million, cache_creation=2 * million, cache_creation_1h=million
        )
        == 24
    )


def test_tokens_and_cost_arrive_through_real_hooks_and_survive_a_restart(hook_installed, monitor):
    monitor.write_config(
        {"prices": {"opus-5-5": {"input": 40, "output": 200}}, "privacy": {"level": "metadata"}}
    )
    monitor.start()
    shutil.copytree(os.path.dirname(usage_transcript("subagent")), monitor.home + "/transcripts")
    (path,) = glob.glob(monitor.home + "/transcripts/*.jsonl")
    session = os.path.basename(path)[: -len(".jsonl")]
    with open(path, "rb") as file:
        lines = file.read().splitlines(keepends=True)
    outputs = [0]
    for part in (lines[:5], lines):
        with open(path, "wb") as file:
            file.write(b"".join(part))
        outputs.append(0)
        hook_call(
            hook_installed.command, {**payload("Stop", session), "transcript_path": path}, monitor.environment
        )
        told = eventually(
            lambda: (
                (told := monitor.sessions()[session])["tokenUsage"]
                and told["tokenUsage"]["totalOutput"] > outputs[-2]
                and told
            ), 1,
        )  # fmt: skip
        outputs[-1] = told["tokenUsage"]["totalOutput"]
    assert told["tokenUsage"] == {
        "totalInput": 88, "totalOutput": 333, "totalCacheRead": 26664, "totalCacheCreation": 1776,
    }  # fmt: skip
    assert told["model"] == "claude-opus-5-5"
    expected = (88 * 40 + 333 * 200 + 26664 * 4 + 1600 * 50 + 176 * 80) / 1e6
    assert told["estimatedCostUsd"] == pytest.approx(expected, abs=1e-6)
    stored = monitor.stored_events()
    assert [event["eventType"] for event in stored] == ["turn_end", "usage"] * 2
    assert (
        [usage_output(event["data"]["usage"]) for event in stored[1::2]] == outputs[1:] == [outputs[1], 333]
    )
    monitor.stop()
    monitor.start()
    again = monitor.sessions()[session]
    assert again["tokenUsage"] == told["tokenUsage"] and again["estimatedCostUsd"] == told["estimatedCostUsd"]


def test_through_redis_totals_come_once_after_the_event_they_belong_to(make):
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    path = machine.home + "/s1.jsonl"
    with open(path, "wb") as file:
        file.write(usage_line("m1", 5) + usage_line("m2", 6))
    for hook in ("Stop", "SessionEnd"):
        hook_call(machine.hook, payload(hook, "s1", transcript_path=path), machine.environment)
    streamed = eventually(
        lambda: len(found := server.streamed()) >= 3 and [json.loads(each) for each in found]
    )
    stop, *usage = [event for event in streamed if event["hookType"] != "SessionEnd"]
    assert (stop["hookType"], "usage" in stop["data"]) == ("Stop", False)
    (told,) = usage
    assert (told["eventType"], told["hookType"], told["sessionId"]) == ("usage", "", "s1")
    assert told["machineId"] == machine.machine_id and usage_output(told["data"]["usage"]) == 11
    assert len({event["id"] for event in streamed}) == 3


def test_a_fifo_for_a_transcript_holds_neither_monitor_nor_hook(hook_installed, running):
    os.mkfifo(running.home + "/t.jsonl")
    given_payload = {**payload("Stop", "fifo"), "transcript_path": running.home + "/t.jsonl"}
    hook_call(hook_installed.command, given_payload, running.environment)
    told = eventually(lambda: running.sessions().get("fifo"))
    assert told["tokenUsage"] is None and told["state"] == "idle"


# Loading: what is stored is read behind the page, and the state is that of one replay in the order of arrival
# ---------------------------------------------------------------------------

# What a month of work leaves behind, in any size, out of recorded turns.

HISTORY_TURNS = (
    "simple", "paralleltools", "failing", "subagent", "thinking", "tasks", "parallel", "mcp", "unicode",
    "i-perm", "nested", "worktree", "bgbash", "p-perm",
)  # fmt: skip
HISTORY_MACHINES = (b"testbox", b"build-7", b"laptop")
HISTORY_DAYS = 30


@functools.cache
def history_turn(name: str) -> tuple[bytes, ...]:
    """Return the events of a recorded turn from their directory on, with SESSION and TURN for its ids."""
    lines = []
    for given_payload in recorded(name):
        event = ee.build_event(given_payload, NOW_MS, "m")
        if event["eventType"] in ("session_start", "session_end"):
            continue
        session_id = event["sessionId"].encode()
        for field in ("id", "timestamp", "sessionId", "machineId"):
            del event[field]
        if event["eventType"] == "tool_result":
            event["data"]["stdoutTail"] = "ok src/cart/totals_test.py::test_rounding PASSED\n" * (
                len(lines) % 40
            )
        line = ee.encode_json(event)[1:].replace(session_id, b"SESSION").replace(b"toolu_", b"toolu_TURN")
        if "agentId" in event:
            line = line.replace(event["agentId"].encode(), b"TURN" + event["agentId"].encode())
        lines.append(line)
    return tuple(lines)


def history_single(hook: str, session_id: str, **fields: Any) -> bytes:
    """Return one event of a hook, in the same form as a recorded turn's."""
    event = ee.build_event(payload(hook, session_id, **fields), NOW_MS, "m")
    for field in ("id", "timestamp", "sessionId", "machineId"):
        del event[field]
    return ee.encode_json(event)[1:]


@dataclasses.dataclass
class HistorySession:
    """One session of a made-up history, and what it says: (arrival, timestamp, event from its directory on)."""

    session_id: str
    machine: bytes
    pid: int
    said: list[tuple[int, int, bytes]] = dataclasses.field(default_factory=list)

    def work(self, rng: random.Random, begin_ms: int, events: int, source: str) -> int:
        """Begin, and do turns until there are so many events; return when the last one was."""
        at = begin_ms
        self.say(at, history_single("SessionStart", self.session_id, source=source))
        turn = 0
        while len(self.said) < events - 1:
            turn += 1
            mark = b"%04d" % turn
            for line in history_turn(rng.choice(HISTORY_TURNS)):
                if len(self.said) >= events - 1:
                    break
                at += rng.randrange(5, 4000)
                chance = rng.random()
                late_ms = 0 if chance > 0.02 else rng.randrange(2000) if chance > 0.001 else 300_000
                line = line.replace(b"SESSION", self.session_id.encode()).replace(b"TURN", mark)
                self.say(at, line, late_ms)
            at += rng.randrange(1000, 120_000)
        return at

    def end(self, at: int, reason: str) -> None:
        """End as the client does."""
        self.say(at, history_single("SessionEnd", self.session_id, reason=reason))

    def say(self, at: int, line: bytes, late_ms: int = 0) -> None:
        """Say something at a time; it arrives so much later."""
        self.said.append((at + late_ms, at, b'"pid":%d,' % self.pid + line))

    def act(self, at: int, **data: Any) -> None:
        """Let the user do something with the session."""
        event = {"workingDirectory": "", "hookType": "Monitor", "eventType": "session_meta", "data": data}
        self.said.append((at, at, ee.encode_json(event)[1:]))


def history_goes_on(number: int) -> bool:
    """Tell whether the session of this number goes on where the one before it made way."""
    return number % 8 == 7 or number % 40 in (26, 27, 28, 29)


def history_sessions(sessions: int, events: int, now_ms: int, seed: int) -> list[HistorySession]:
    """Make up sessions of the last days.

    One in four goes on after /clear as the next one, some are resumed from within another, some have a name,
    a pin or a parent; the last ones have not ended.
    """
    rng = random.Random(seed)
    weights = [rng.lognormvariate(0, 1.1) for _ in range(sessions)]
    scale = events / sum(weights)
    made: list[HistorySession] = []
    at = 0
    for number, weight in enumerate(weights):
        session = HistorySession(
            str(uuid.UUID(int=rng.getrandbits(128), version=4)), rng.choice(HISTORY_MACHINES),
            4_000_000 + number,
        )  # fmt: skip
        begin = now_ms - HISTORY_DAYS * 86_400_000 * (sessions - number) // sessions
        source = "startup"
        if made and history_goes_on(number):
            session.machine, session.pid = made[-1].machine, made[-1].pid
            begin, source = at + rng.randrange(5, 300), rng.choice(("clear", "clear", "fork", "resume"))
            made[-1].end(at, "clear" if source == "clear" else "resume")
        at = session.work(rng, begin, max(3, round(weight * scale)), source)
        if number % 11 == 3:
            session.act(begin + 1000, action="rename", label=f"Job {number}")
        if number % 50 == 9:
            session.act(begin + 2000, action="pin", pinned=True)
        if number % 40 in (17, 18):
            session.act(begin + 3000, action="set_parent", parentSessionId=made[-1].session_id)
        if not history_goes_on(number + 1) and number < sessions * 0.99:
            at += rng.randrange(1000, 600_000)
            session.end(at, rng.choice(("prompt_input_exit", "other", "logout")))
            if number % 60 == 21:
                at = session.work(rng, at + 3_600_000, len(session.said) + 20, "resume")
        made.append(session)
    return made


def write_history(root: str, sessions: int, events: int, now_ms: int, seed: int = 1) -> list[str]:
    """Write a made-up history as the store writes it; return the ids of the sessions, oldest first."""
    made = history_sessions(sessions, events, now_ms, seed)
    order = sorted(
        (min(arrival, now_ms), number, place)
        for number, session in enumerate(made)
        for place, (arrival, _, _) in enumerate(session.said)
    )
    files: dict[str, list[bytes]] = collections.defaultdict(list)
    ids = random.Random(seed)
    for seq, (received, number, place) in enumerate(order, 1):
        session, (_, at, line) = made[number], made[number].said[place]
        event_id = uuid.UUID(int=ids.getrandbits(128), version=4).hex.encode()
        files[f"{root}/{cm.day_of(received)}/{session.session_id}.jsonl"].append(
            b'{"seq":%d,"received":%d,"id":"%s","timestamp":%d,"sessionId":"%s","machineId":"%s",%s\n'
            % (seq, received, event_id, at, session.session_id.encode(), session.machine, line)
        )
    for path, lines in files.items():
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.writelines(lines)
    return [session.session_id for session in made]


# What was loaded


def loading_reference(root: str) -> cm.Sessions:
    """Apply everything that is stored, in the order of arrival."""
    book = cm.Sessions(own_machine="testbox")
    for line in journal_plain_lines(root):
        book.apply(cm.parse_stored(line))
    return book


def loading_monitor(home: str) -> cm.Monitor:
    """Return a monitor in this process, not yet open."""
    values, _ = ee.load_config(home + "/monitor.config.json")
    return cm.Monitor(cm.Settings(home, home + "/monitor.config.json", "testbox", values))


@contextlib.contextmanager
def loaded_here(home: str) -> Iterator[cm.Monitor]:
    """Run a monitor in this process, from when it has read what is stored."""
    made = loading_monitor(home)
    made.open()
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        eventually(lambda: made.loading is None, 60)
        yield made
    finally:
        made.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("saved", ["nothing", "at the stop", "before a kill"])
def test_what_was_loaded_is_what_processing_live_gives(seed, saved):
    """From no snapshot, from those of an orderly stop, and from those that a killed monitor had saved."""
    home = RunningMonitor(new_home()).home
    root = home + "/events"
    write_history(root, 120, 7000, cm.now_ms(), seed)
    for path in glob.glob(root + "/*/*.jsonl"):  # nothing may end by itself while this runs
        with open(path, "rb+") as file:
            content = re.sub(rb'"pid":\d+,?', b"", file.read())
            file.seek(0)
            file.write(content)
            file.truncate()
    if saved != "nothing":
        with loaded_here(home) as made:
            if saved == "before a kill":
                made.loop.call(lambda: collections.deque(made._snapshot_steps(), 0))
                eventually(lambda: not made.history._jobs)
                made._snapshot_steps = lambda: iter(())  # type: ignore[method-assign]
            for number in range(50):
                event = {
                    "hook": payload("UserPromptSubmit", f"later-{number % 7}", prompt=str(number)),
                    "id": f"later {number}", "timestamp": cm.now_ms(), "machineId": "later-box",
                }  # fmt: skip
                made.loop.call(lambda event=event: made.take_now(ee.encode_json(event)))
    expected = loading_reference(root)
    with loaded_here(home) as made:
        expected.tick(cm.now_ms())
        assert made.sessions.sessions.keys() == expected.sessions.keys()
        wanted = {session["sessionId"]: session for session in expected.each_json(True)}
        for session in made.loop.call(lambda: list(made.sessions.each_json(True))):
            for one in (session, wanted[session["sessionId"]]):
                one["childSessionIds"].sort()
            assert session == wanted[session["sessionId"]]
    shutil.rmtree(home)


@contextlib.contextmanager
def loading_held(monkeypatch: Any, sessions: int = 40, events: int = 2000) -> Iterator[Any]:
    """Run a monitor here that reads nothing of what is stored until the gate is opened."""
    gate = threading.Event()
    advance = cm.Monitor._advance

    def held(self: cm.Monitor, steps: Iterator[None]) -> None:
        if gate.is_set():
            advance(self, steps)
        else:
            self.loop.call_later(0.01, functools.partial(held, self, steps))

    monkeypatch.setattr(cm.Monitor, "_advance", held)
    place = RunningMonitor(new_home())
    ids = write_history(place.home + "/events", sessions, events, cm.now_ms())
    made = loading_monitor(place.home)
    made.open()
    place.about = {
        "pid": os.getpid(), "host": "127.0.0.1", "port": made.port, "wsPort": made.ws_port,
        "addresses": ["127.0.0.1"], "socketPath": place.socket_path,
    }  # fmt: skip
    ee.write_atomically(place.home + "/monitor.run.json", ee.encode_json(place.about))
    thread = threading.Thread(target=made.run)
    thread.start()
    try:
        yield place, ids, gate
    finally:
        gate.set()
        made.stop()
        thread.join(15)
        shutil.rmtree(place.home, ignore_errors=True)
        assert not thread.is_alive()


def loading_same(place: RunningMonitor, leave_out: tuple[str, ...] = ()) -> bool:
    """Return True if the monitor's sessions are those of one pass; what the present changes is left out."""

    def essence(told: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value
            for name, value in told.items()
            if name not in ("state", "stateSince", "reason", "endTime", "agents", "openCalls", "activity")
            or told["state"] not in ("ended", "quiet")
        }

    expected = loading_reference(place.home + "/events")
    expected.tick(cm.now_ms())
    for session in list(expected.sessions.values()):
        ours = session.machine_id == "testbox" and session.pid is not None
        if ours and session.state != "ended" and not cm.process_ran_at(session.pid, session.last_event):
            expected.end_gone(session.session_id, cm.now_ms())
    told = place.sessions()
    wanted = {session["sessionId"]: session for session in expected.each_json(True)}
    states = {name: session["state"] for name, session in told.items()}
    assert states == {name: session["state"] for name, session in wanted.items()}
    for name, session in told.items():
        for one in (session, wanted[name]):
            one["childSessionIds"].sort()
        assert essence(session) == essence(wanted[name])
    return True


def test_page_and_hooks_are_served_before_anything_is_read(monkeypatch):
    with loading_held(monkeypatch) as (place, ids, gate):
        assert place.request("/")[0] == 200
        nothing_yet = {"done": 0, "total": len(place.stored_events())}
        assert place.get("/api/status")["loading"] == nothing_yet
        client = place.websocket()
        client.next("status", loading=nothing_yet)
        assert client.ask("sessions", type="get_sessions")["sessions"] == []
        machine = next(e["machineId"] for e in place.stored_events() if e["sessionId"] == ids[3])
        for hook in (
            payload("SessionEnd", ids[3], reason="clear"), payload("SessionStart", "new", source="clear")
        ):  # fmt: skip
            place.emit(
                {"hook": hook, "id": hook["session_id"], "timestamp": cm.now_ms(), "machineId": machine}
            )
        assert [event["sessionId"] for event in client.events(2)] == [ids[3], "new"]
        assert place.sessions_so_far() == {}
        assert place.request("/api/sessions/" + ids[3])[0] == 503
        assert place.get(f"/api/sessions/{ids[3]}/events?limit=1")["events"][0]["hookType"] == "SessionEnd"
        gate.set()
        listed = client.next("sessions_updated")["sessions"]
        assert {session["sessionId"] for session in listed} == {*ids, "new"}
        client.next("status", loading=None)
        assert place.sessions()["new"]["continuedFrom"] == ids[3] and loading_same(place)


def test_actions_wait_until_all_sessions_are_read_and_keep_their_order(monkeypatch):
    with loading_held(monkeypatch) as (place, ids, gate):
        client = place.websocket()
        client.send(type="rename_session", sessionId=ids[1], label="first")
        client.send(type="rename_session", sessionId=ids[1], label="second")
        client.send(type="toggle_pin", sessionId=ids[2])
        client.send(type="set_parent", sessionId=ids[4], parentSessionId=ids[5])
        client.send(type="set_parent", sessionId=ids[16], parentSessionId=ids[18])  # 18 below 17 below 16
        before_others = {
            it.continued_from for it in loading_reference(place.home + "/events").sessions.values()
        }
        victim = next(name for name in ids[19:] if name not in before_others)
        client.send(type="delete_session", sessionId=victim)
        posted = place.request("/api/message", "POST", b'{"type":"prune"}', protocol_origin(place))
        assert posted[0] == 503
        gate.set()
        client.next("sessions_updated")
        assert "below itself" in client.next("error", request="set_parent")["message"]
        client.next("session_deleted", sessionId=victim)
        told = place.sessions()
        assert victim not in told and len(told) == 39
        assert told[ids[1]]["label"] == "second" and told[ids[2]]["isPinned"]
        assert told[ids[4]]["parentSessionId"] == ids[5]
        assert not glob.glob(f"{place.home}/events/*/{victim}.jsonl")
        assert loading_same(place)


def test_the_command_line_says_that_loading_is_under_way(monkeypatch):
    with loading_held(monkeypatch) as (place, ids, gate):
        nothing_yet = f"0 of {len(place.stored_events())} stored events have been read"
        assert nothing_yet in place.command("status").stdout
        assert nothing_yet in place.command("sessions").stderr
        tail = subprocess.Popen(
            [sys.executable, place.program, "tail"], env=place.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert tail.stderr is not None and nothing_yet in tail.stderr.readline()
            place.emit(payload("UserPromptSubmit", ids[0], prompt="go on"))
            assert tail.stdout is not None and "go on" in tail.stdout.readline()
        finally:
            tail.kill()
            tail.communicate()
        gate.set()
        eventually(lambda: place.get("/api/status")["loading"] is None)
        assert "stored events have" not in place.command("status").stdout


def test_a_stop_while_loading_ends_at_once_and_the_next_start_reads_all(monitor):
    ids = write_history(monitor.home + "/events", 200, 20_000, cm.now_ms())
    assert "stored events have been read" in monitor.command("start", "--no-open").stdout
    monitor.stop()
    with open(monitor.home + "/last-seq", "rb") as file:
        highest = int(file.read())
    assert highest == max(event["seq"] for event in monitor.stored_events())
    monitor.start()
    eventually(lambda: monitor.get("/api/status")["loading"] is None, 120)
    assert set(monitor.sessions()) == set(ids) and loading_same(monitor)


def test_kill_9_while_loading_and_hooks_send_loses_nothing_and_doubles_no_number(monitor):
    rng = random.Random(9)
    ids = write_history(monitor.home + "/events", 200, 20_000, cm.now_ms())
    acknowledged: set[str] = set()
    for round_number in range(5):
        monitor.start()
        deadline = time.monotonic() + rng.uniform(0.05, 0.8)
        while time.monotonic() < deadline:
            session = rng.choice((*ids[-40:], f"new-{round_number}"))
            event_id = str(uuid.uuid4())
            monitor.emit({
                "hook": payload(rng.choice(("UserPromptSubmit", "Stop", "SessionStart")), session, prompt="x"),
                "id": event_id, "timestamp": cm.now_ms(), "machineId": "build-7",
            })  # fmt: skip
            acknowledged.add(event_id)
        monitor.kill()
    monitor.start()
    eventually(lambda: monitor.get("/api/status")["loading"] is None, 120)
    stored = monitor.stored_events()
    assert acknowledged <= {event["id"] for event in stored}
    assert len({event["seq"] for event in stored}) == len(stored) == len({event["id"] for event in stored})
    for path in glob.glob(monitor.home + "/events/*/*.jsonl"):
        with open(path, "rb") as file:
            numbers = [cm.line_seq(line) for line in file]
        assert numbers == sorted(numbers)
    assert loading_same(monitor)


# An older version's directory


def test_a_directory_of_version_0_1_0_is_taken_over_without_a_loss():
    """Made by commit 9080103: packed and plain days, index, usage, spool, settings with its hooks, user's acts."""
    python, folder = PYTHON, new_home()
    with tarfile.open(os.path.join(ROOT, ".ci", "recorded", "home-0.1.0.tar.gz")) as archive:
        archive.extractall(folder, filter="data")
    for path in glob.glob(folder + "/**/*.json*", recursive=True, include_hidden=True):
        if not path.endswith(".gz"):
            with open(path, encoding="utf-8") as file:
                text = file.read().replace("@HOME@", folder).replace("@PYTHON@", python)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    home = folder + "/.contextuate"
    config = {
        "server": {"port": 0, "wsPort": 0},
        "socketPath": folder + "/m.sock",
        "retention": {"days": None},
    }
    environment = {
        "HOME": folder, "PATH": os.environ["PATH"], "LANG": "C.UTF-8", "CONTEXTUATE_MACHINE_ID": "oldbox"
    }  # fmt: skip
    old_config = json.loads(open(home + "/monitor.config.json", encoding="utf-8").read())  # noqa: SIM115
    ee.write_atomically(home + "/monitor.config.json", ee.encode_json({**old_config, **config}))
    with open(folder + "/expected-sessions.json", encoding="utf-8") as file:
        expected = {session["sessionId"]: session for session in json.load(file)}

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, os.path.join(ROOT, "contextuate_monitor.py"), *words],
            env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    assert "Contextuate Monitor runs" in command("start", "--no-open").stdout
    try:
        # The hook that the old version installed sends to the new monitor, and the old spool comes in.
        hook = subprocess.run(
            [python, "-I", "-S", home + "/hooks/emit_event.py"], env=environment, capture_output=True,
            input=ee.encode_json(payload("PreToolUse", "live", tool_name="Bash", tool_use_id="t3", tool_input={})),
        )  # fmt: skip
        assert (hook.returncode, hook.stdout) == (0, b"")
        eventually(lambda: not os.listdir(home + "/spool"), what="the old spool")
        known = {
            session["sessionId"]: session
            for session in json.loads(command("sessions", "--all", "--json").stdout)
        }
        assert known.keys() == expected.keys()
        same = ("label", "isPinned", "hidden", "parentSessionId", "startTime", "tokenUsage", "model")
        for session_id, session in expected.items():
            assert {name: known[session_id][name] for name in same} == {name: session[name] for name in same}
            counts = dict(session["counts"])
            if session_id == "live":  # its notification from the spool, and the call just sent
                counts.update(events=counts["events"] + 2, toolCalls=counts["toolCalls"] + 1)
            assert known[session_id]["counts"] == counts, command("export", "--session", session_id).stdout
        assert not glob.glob(home + "/events/*/*.gz")
        exported = [json.loads(line) for line in command("export").stdout.splitlines()]
        assert len({event["id"] for event in exported}) == len(exported)
        calls = sum(event["hookType"] == "PreToolUse" for event in exported)
        search = ("search", "--type", "PreToolUse", "--json", "--limit", "500")
        eventually(lambda: len(command(*search).stdout.splitlines()) == calls)
        command("install")
        with open(folder + "/.claude/settings.json", encoding="utf-8") as file:
            hooks = json.load(file)["hooks"]
        assert all(len(group["hooks"]) == 1 for groups in hooks.values() for group in groups)
    finally:
        assert command("stop").returncode == 0
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------
# Processes: the installed hook, the monitor, the command line, kills and bad days
# ---------------------------------------------------------------------------

RENAMED_FIELDS = {
    "tool_name": "toolName",
    "tool_input": "toolInput",
    "tool_response": "toolOutput",
    "tool_use_id": "toolUseId",
    "prompt": "message",
    "transcript_path": "transcriptPath",
    "duration_ms": "durationMs",
    "permission_mode": "permissionMode",
    "notification_type": "notificationType",
    "last_assistant_message": "assistantResponse",
}
ENVELOPE_FIELDS = {"session_id", "cwd", "hook_event_name", "agent_id", "agent_type"}


def expected_data(sent: dict[str, Any]) -> dict[str, Any]:
    """Return what `data` must be for a recorded payload: every other field, under the names of the README."""
    data = {
        RENAMED_FIELDS.get(name, name): value for name, value in sent.items() if name not in ENVELOPE_FIELDS
    }
    if "agent_type" in sent and "agent_id" not in sent:
        data["agent_type"] = sent["agent_type"]
    return data


def check_event(event: dict[str, Any], sent: dict[str, Any]) -> None:
    """Compare one event, however it came, with the payload it was made from."""
    assert event["data"] == expected_data(sent)
    assert event["sessionId"] == sent["session_id"]
    assert event["workingDirectory"] == sent["cwd"]
    assert event["hookType"] == sent["hook_event_name"]
    assert event["machineId"] == "testbox"
    assert event.get("agentId") == sent.get("agent_id")
    assert event.get("agentType") == (sent.get("agent_type") if "agent_id" in sent else None)
    assert uuid.UUID(event["id"]).version == 4
    assert abs(event["timestamp"] - time.time() * 1000) < 300_000


def test_every_recorded_session_comes_out_as_it_went_in(running: RunningMonitor) -> None:
    command = running.installed_command()
    client = running.websocket("full")
    sent: list[dict[str, Any]] = []
    for name in recording_names():
        for line in recorded_lines(name):
            done = run_hook(command, line + b"\n", running.environment)
            assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
            sent.append(json.loads(line))
    assert len(sent) > 390
    shown = client.events(len(sent))
    stored = running.stored_events()
    assert len(stored) == len(sent)
    for event, live, original in zip(stored, shown, sent):
        check_event(event, original)
        assert live == event
    assert len({event["id"] for event in stored}) == len(sent)
    assert [event["seq"] for event in stored] == sorted({event["seq"] for event in stored})
    by_session = collections.Counter(original["session_id"] for original in sent)
    assert {
        session_id: session["counts"]["events"] for session_id, session in running.sessions().items()
    } == by_session
    for session_id, count in by_session.items():
        page = running.get(f"/api/sessions/{session_id}/events?limit=1000")
        assert page["more"] is False
        assert page["events"] == [event for event in stored if event["sessionId"] == session_id]
        assert len(page["events"]) == count
    assert not glob.glob(running.home + "/spool/*.jsonl")
    assert not os.path.exists(running.home + "/quarantine.log")
    client.close()


def test_a_restart_tells_the_same_truth(running: RunningMonitor) -> None:
    for name in recording_names():
        running.emit(*recorded(name))
    before = running.sessions()
    running.kill()
    running.start()
    assert running.sessions() == before


# Runs the hook for each payload on its standard input, in a process of its own that need not start an interpreter;
# answers each with what that hook said.
HOOKS_IN_A_ROW = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import emit_event
for line in sys.stdin.buffer:
    reader, writer = os.pipe()
    told, said = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(reader, 0), os.dup2(said, 2)
        os.close(writer)
        emit_event.run_hook()
    os.close(reader), os.close(said)
    os.write(writer, line)
    os.close(writer)
    with open(told, encoding="utf-8") as file:
        words = file.read()
    print(json.dumps([os.waitpid(pid, 0)[1], words]), flush=True)
"""


@contextlib.contextmanager
def hooks_in_a_row(environment: dict[str, str]) -> Iterator[Any]:
    """Give a function that calls the hook for one event, and returns what it said to one who debugs."""
    command = [sys.executable, "-c", HOOKS_IN_A_ROW, ROOT]
    environment = {**environment, "CONTEXTUATE_DEBUG": "1"}
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as hooks:

        def call(event: dict[str, Any]) -> str:
            print(json.dumps(event), file=hooks.stdin, flush=True)
            status, words = json.loads(hooks.stdout.readline())
            assert status == 0
            return str(words)

        yield call


def test_kill_9_at_any_moment_loses_no_event(running: RunningMonitor) -> None:
    permitted = threading.Semaphore(0)  # hooks that may still be called
    stopping = threading.Event()
    outcomes: dict[str, bool] = {}  # marker → whether the hook got its acknowledgement

    def emit(worker: int) -> None:
        with hooks_in_a_row(running.environment) as call:
            for number in itertools.count():
                permitted.acquire()
                if stopping.is_set():
                    return
                marker = f"{worker}-{number}"
                words = call(payload("PreToolUse", f"w{worker}", tool_use_id=marker))
                assert ("has stored" in words) != ("kept in the spool" in words), words
                outcomes[marker] = "has stored" in words

    def stored_markers() -> list[str]:
        return [event["data"]["toolUseId"] for event in running.stored_events()]

    dice = random.Random(5)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(emit, worker) for worker in range(4)]
        try:
            for _ in range(20):
                permitted.release(150)
                # the others find a monitor that dies, or nobody
                enough = len(outcomes) + dice.randrange(20, 100)
                eventually(lambda enough=enough: len(outcomes) >= enough, 60)
                running.kill()
                acknowledged = {marker for marker, stored in outcomes.copy().items() if stored}
                torn_allowed = running.stored_events_allowing_a_torn_line()
                assert acknowledged <= {event["data"]["toolUseId"] for event in torn_allowed}
                some_more = len(outcomes) + 5
                eventually(lambda some_more=some_more: len(outcomes) >= some_more, 60)
                running.start()
        finally:
            stopping.set()
            permitted.release(4)
        for worker in workers:
            worker.result()
    eventually(lambda: not ee.spool_segments(running.home + "/spool"), 30, "an empty spool")
    assert sorted(stored_markers()) == sorted(outcomes)
    assert len(outcomes) > 2000
    assert 100 < sum(outcomes.values()) < len(outcomes)


def test_ten_thousand_hooks_in_a_row_at_full_speed_are_each_stored_once(running: RunningMonitor) -> None:
    workers, each = 4, 2500

    def emit(worker: int) -> None:
        with hooks_in_a_row(running.environment) as call:
            for number in range(each):
                call(payload("UserPromptSubmit", f"w{worker}", prompt=str(number)))

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(emit, range(workers)))
    eventually(lambda: running.get("/api/status")["events"]["stored"] >= workers * each, 120)
    told = [(event["sessionId"], int(event["data"]["message"])) for event in running.stored_events()]
    assert sorted(told) == [(f"w{worker}", number) for worker in range(workers) for number in range(each)]


def test_a_thousand_hooks_at_once_while_the_monitor_is_paused(running: RunningMonitor) -> None:
    command = shlex.split(running.installed_command())[:4]
    os.kill(running.pid, signal.SIGSTOP)
    resume = threading.Timer(2.0, os.kill, (running.pid, signal.SIGCONT))
    resume.start()
    pids = []
    for number in range(1000):
        reader, writer = os.pipe()
        os.write(writer, json.dumps(payload("PreToolUse", tool_use_id=f"t{number}")).encode() + b"\n")
        os.close(writer)
        pids.append(
            os.posix_spawn(
                command[0], command, running.environment, file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)]
            )
        )
        os.close(reader)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 1000
    resume.join()
    eventually(lambda: running.get("/api/status")["spool"]["segments"] == 0, 30, "an empty spool")
    markers = [event["data"]["toolUseId"] for event in running.stored_events()]
    assert sorted(markers) == sorted(f"t{number}" for number in range(1000))


WRONG_TYPES = [None, True, -1, 1.5, 10**30, "", "x" * 300, [], [1, {"a": None}], {}, {"b": [[]]}]


def test_bad_input_never_stops_the_stream_of_others(running: RunningMonitor) -> None:
    steady = running.connect()
    drip = running.connect()
    drip.sendall(b'{"hook_event_na')  # and then a byte at a time
    silent = running.connect()

    def one_more(number: int) -> None:
        """A well-behaved sender gets its acknowledgement, whatever the others do."""
        steady.sendall(json.dumps(payload("PreToolUse", "steady", tool_use_id=str(number))).encode() + b"\n")
        assert steady.recv(10) == ee.ACKNOWLEDGEMENT
        drip.sendall(b"x")

    bad = [
        os.urandom(5000).replace(b"\n", b"") + b"\n",
        b"\xff\xfe\x00\n",
        b"not json at all\n",
        b"[1, 2, 3]\n",
        b'"a string"\n',
        b"nul" + b"\0" * 100 + b"\n",
        b"[" * 100_000 + b"]" * 100_000 + b"\n",
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"\n",
        b'{"hook":' + b"[" * 3000 + b"\n",
    ]
    for number, line in enumerate(bad):
        with running.connect() as sock:
            sock.sendall(line)
            assert sock.recv(10) == ee.ACKNOWLEDGEMENT
        one_more(number)
    odd = [
        b'{"hook_event_name":"X","session_id":"odd","n":NaN,"i":-Infinity,"f":1e999,"s":"\\ud83d"}\n',
        b'{"hook_event_name":"X","session_id":"odd","deep":' + b"[" * 400 + b"]" * 400 + b"}\n",
        b'{"hook_event_name":"X","session_id":"odd","latin":"caf\xe9"}\n',
        b'{"test":"message"}\n',
    ]
    fields = [
        "session_id",
        "cwd",
        "hook_event_name",
        "agent_id",
        "agent_type",
        *RENAMED_FIELDS,
        "background_tasks",
        "tool_calls",
    ]
    odd += [
        json.dumps({**payload("PostToolUse", "odd"), field: value}).encode() + b"\n"
        for field in fields
        for value in WRONG_TYPES
    ]
    envelope = [
        "id",
        "timestamp",
        "sessionId",
        "machineId",
        "workingDirectory",
        "hookType",
        "data",
        "pid",
        "agentId",
    ]
    odd += [
        json.dumps({"eventType": "message", "sessionId": "odd", field: value}).encode() + b"\n"
        for field in envelope
        for value in WRONG_TYPES
    ]
    for number, line in enumerate(odd):
        with running.connect() as sock:
            sock.sendall(line)
            assert sock.recv(10) == ee.ACKNOWLEDGEMENT, line
        one_more(100 + number)
    with running.connect() as flood:
        chunk = b"x" * (1 << 20)
        for number in range(20):
            flood.sendall(chunk)
            one_more(1000 + number)
    status = running.get("/api/status")
    assert status["events"]["quarantined"] == len(bad) + 1
    assert status["store"]["ok"] is True
    stored = running.stored_events()
    assert sum(event["sessionId"] == "steady" for event in stored) == len(bad) + len(odd) + 20
    # An "id" of a right type repeats among the odd ones, so a few of them are second deliveries.
    assert (
        len(stored)
        == status["events"]["received"] - status["events"]["quarantined"] - status["events"]["duplicates"]
    )
    assert status["events"]["duplicates"] <= 2
    assert stored == [json.loads(json.dumps(event)) for event in stored]
    with open(running.home + "/quarantine.log", encoding="utf-8") as file:
        kept = [json.loads(line) for line in file]
    assert len(kept) == len(bad) + 1
    assert any("longer than" in record["reason"] for record in kept)
    with open(running.home + "/monitor.log", encoding="utf-8") as file:
        words = file.read()
    assert "Traceback" not in words
    for sock in (steady, drip, silent):
        sock.close()


def test_many_events_on_one_connection_and_one_without_a_newline(running: RunningMonitor) -> None:
    running.emit(*[payload("PreToolUse", tool_use_id=str(number)) for number in range(500)])
    with running.connect() as sock:
        sock.sendall(json.dumps(payload("Stop")).encode())
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(10) == ee.ACKNOWLEDGEMENT
    assert len(running.stored_events()) == 501


def test_events_of_the_nodejs_emitter_and_of_anybody_are_shown(running: RunningMonitor) -> None:
    client = running.websocket("rows")
    common = {"sessionId": "0123456789abcdef", "machineId": "old-box", "workingDirectory": "/srv/app"}
    node = [
        {
            "eventType": "tool_call",
            "hookType": "PreToolUse",
            "data": {"toolName": "Bash", "toolInput": {"command": "ls"}},
        },
        {
            "eventType": "tool_result",
            "hookType": "PostToolUse",
            "data": {"toolName": "Bash", "tool_output": "a b"},
        },
        {
            "eventType": "agent_complete",
            "hookType": "SubagentStop",
            "parentSessionId": "fedcba9876543210",
            "data": {},
        },
        {"eventType": "session_end", "hookType": "Stop", "data": {"sessionTokenUsage": {"input": 5}}},
    ]
    events = [
        {"id": str(uuid.uuid4()), "timestamp": 1_700_000_000_000 + n, **common, **event}
        for n, event in enumerate(node)
    ]
    running.emit(*events, {"test": "message"})
    rows = client.events(5)
    assert [row["eventType"] for row in rows] == [
        "tool_call",
        "tool_result",
        "agent_complete",
        "session_end",
        "message",
    ]
    assert rows[0]["data"]["target"] == "ls"
    assert rows[4]["data"]["text"] == '{"test": "message"}'
    sessions = running.sessions()
    assert sessions["0123456789abcdef"]["state"] != "ended", (
        "a Stop of the Node.js emitter ends a turn, not the session"
    )
    assert sessions["0123456789abcdef"]["parentSessionId"] == "fedcba9876543210"
    assert sessions["0123456789abcdef"]["machineId"] == "old-box"
    stored = running.stored_events()
    assert stored[1]["data"]["toolOutput"] == "a b"
    assert [event["id"] for event in stored[:4]] == [event["id"] for event in events]
    assert stored[4]["sessionId"] == "unknown"
    assert stored[4]["data"] == {"test": "message"}
    assert sessions["unknown"]["counts"]["events"] == 1
    client.close()


def test_a_second_delivery_is_not_stored_twice(running: RunningMonitor) -> None:
    event = {"id": str(uuid.uuid4()), "eventType": "message", "sessionId": "twice", "data": {"n": 1}}
    running.emit(event, event)
    running.emit(event)
    assert len(running.stored_events()) == 1
    running.kill()
    running.start()
    running.emit(event)
    assert len(running.stored_events()) == 1
    assert running.get("/api/status")["events"]["duplicates"] == 1


@needs_root
def test_a_full_disk_loses_nothing_and_heals_by_itself(monitor: RunningMonitor) -> None:
    events = monitor.home + "/events"
    os.mkdir(events, 0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", events], check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        monitor.start()
        command = monitor.installed_command()
        client = monitor.websocket("rows")
        big = "x" * 50_000
        for number in range(30):
            sent = json.dumps(
                payload("PreToolUse", tool_use_id=str(number), tool_input={"command": big})
            ).encode()
            assert run_hook(command, sent, monitor.environment).returncode == 0
        status = eventually(lambda: (s := monitor.get("/api/status"))["store"]["error"] and s)
        assert status["store"]["ok"] is False
        assert "No space left" in status["store"]["error"] or "could be written" in status["store"]["error"]
        assert status["spool"]["bytes"] > 0
        stored = len(monitor.stored_events())  # every line of the files is whole
        assert 0 < stored < 30
        subprocess.run(["mount", "-o", "remount,size=64m", events], check=True)
        whole = monitor.stored_events_allowing_a_torn_line  # one may just be written
        eventually(lambda: len(whole()) == 30, 30, "the rest out of the spool")
        assert sorted(int(event["data"]["toolUseId"]) for event in monitor.stored_events()) == list(range(30))
        eventually(lambda: monitor.get("/api/status")["store"]["ok"])
        client.close()
        monitor.stop()
    finally:
        about = cm.running_monitor(cm.Settings(monitor.home, "", "", {}))
        if about:
            os.kill(about["pid"], signal.SIGKILL)
            eventually(lambda: not alive(about["pid"]))
        unmount(events)


def test_only_one_of_many_simultaneous_starts_runs(monitor: RunningMonitor) -> None:
    command = [sys.executable, "-m", "contextuate_monitor", "start", "--no-open"]
    starts = [
        subprocess.Popen(
            command, cwd=ROOT, env=monitor.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(50)
    ]
    outputs = [start.communicate(timeout=180) for start in starts]
    assert any(start.returncode == 0 for start in starts)
    for start, (_, errors) in zip(starts, outputs):
        assert start.returncode == 0 or b"another monitor" in errors
    with open(monitor.home + "/monitor.run.json", encoding="utf-8") as file:
        pid = json.load(file)["pid"]
    found = subprocess.run(
        ["pgrep", "-f", "--", "--report-fd"], capture_output=True, text=True, check=False
    ).stdout.split()
    mine = []
    for other in found:
        with open(f"/proc/{other}/environ", errors="replace") as file:
            mine += [int(other)] if monitor.home in file.read() else []
    assert mine == [pid]


def test_a_start_that_hangs_is_told_and_not_waited_for_without_end(
    monitor: RunningMonitor, monkeypatch: Any, tmp_path: Any
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho $$ > "$0.pid"\nexec sleep 60\n')
    python.chmod(0o700)
    monkeypatch.setattr(cm.sys, "executable", str(python))
    monkeypatch.setattr(cm, "START_DEADLINE_S", 0.5)
    settings = cm.Settings(monitor.home, "", "", {})
    args = argparse.Namespace(host=None, port=None, ws_port=None, config=None)
    with pytest.raises(cm.StartError, match=r"process \d+.* says nothing.*monitor\.log may tell why"):
        cm.start_in_background(settings, args)
    pid = int(
        eventually(lambda: python.with_suffix(".pid").exists() and python.with_suffix(".pid").read_text())
    )
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_live_socket_is_never_stolen_and_a_dead_one_is_replaced(running: RunningMonitor) -> None:
    other = RunningMonitor(new_home(), config={"socketPath": running.socket_path})
    try:
        refused = other.command("start", "--no-open", check=False)
        assert refused.returncode == 1
        assert running.socket_path in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
        running.emit(payload("Stop"))
        running.kill()
        assert os.path.exists(running.socket_path)
        other.socket_path = running.socket_path
        other.start().emit(payload("Stop"))
        assert stat.S_IMODE(os.stat(running.socket_path).st_mode) == 0o600
    finally:
        clean_up(other)


def test_something_else_at_the_sockets_place_is_left_alone(monitor: RunningMonitor) -> None:
    with open(monitor.socket_path, "w", encoding="utf-8") as file:
        file.write("precious")
    refused = monitor.command("start", "--no-open", check=False)
    assert refused.returncode == 1
    assert "not our socket" in refused.stderr
    with open(monitor.socket_path, encoding="utf-8") as file:
        assert file.read() == "precious"


def test_a_removed_socket_file_comes_back(running: RunningMonitor) -> None:
    os.unlink(running.socket_path)
    eventually(lambda: os.path.exists(running.socket_path), 15)
    running.emit(payload("Stop"))


def test_a_port_in_use_is_told_in_one_line(running: RunningMonitor) -> None:
    other = RunningMonitor(new_home(), config={"server": {"port": running.port}})
    try:
        refused = other.command("start", "--no-open", check=False)
        assert refused.returncode == 1
        assert f"port {running.port} is in use" in refused.stderr
        assert "--port" in refused.stderr
    finally:
        clean_up(other)


def test_events_can_be_kept_in_memory_only(monitor: RunningMonitor) -> None:
    monitor.write_config({"persistence": {"enabled": False}})
    monitor.start().emit(payload("UserPromptSubmit", prompt="hello"), payload("Stop"))
    assert len(monitor.get("/api/sessions/s1/events")["events"]) == 2
    assert not os.path.exists(monitor.home + "/events")
    assert monitor.get("/api/status")["store"]["persistent"] is False


def test_everything_of_ours_is_for_our_user_only(running: RunningMonitor) -> None:
    run_hook(running.installed_command(), json.dumps(payload("Stop")).encode(), running.environment)
    running.emit({"test": 1})
    with running.connect() as sock:
        sock.sendall(b"garbage\n")
        sock.recv(1)
    for folder, folders, files in os.walk(running.home):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if (
                name not in ("monitor.config.json", "claude")
                and "/claude" not in path
                and "__pycache__" not in path
            ):
                assert stat.S_IMODE(os.stat(path).st_mode) & 0o077 == 0, path


@pytest.fixture
def client() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that stands for Claude Code's client and does nothing."""
    process = subprocess.Popen([PYTHON, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


def test_a_client_that_was_killed_ends_its_session(running: RunningMonitor, client: Any) -> None:
    command = running.installed_command()
    environment = {**running.environment, "CLAUDE_PID": str(client.pid)}
    for line in recorded_lines("i-sigKILL"):
        run_hook(command, line, environment)
    session_id = recorded("i-sigKILL")[0]["session_id"]
    assert running.sessions()[session_id]["state"] == "working"
    assert running.sessions()[session_id]["pid"] == client.pid
    client.kill()
    client.wait()
    session = eventually(lambda: (s := running.sessions()[session_id])["state"] == "ended" and s)
    assert session["reason"]["detail"] == "its process is gone"
    assert session["openCalls"] == []
    running.kill()
    running.start()
    assert running.sessions()[session_id]["state"] == "ended"


def test_a_client_that_was_killed_while_nobody_looked_ended_with_its_last_event(
    running: RunningMonitor, client: Any
) -> None:
    command = running.installed_command()
    line = json.dumps(payload("UserPromptSubmit", "gone", prompt="go")).encode()
    run_hook(command, line, {**running.environment, "CLAUDE_PID": str(client.pid)})
    told = running.sessions()["gone"]
    assert told["state"] == "working"
    running.stop()
    client.kill()
    client.wait()
    time.sleep(0.5)  # what passes before anybody looks is no part of the session
    running.start()
    again = running.sessions()["gone"]
    assert again["state"] == "ended"
    assert again["endTime"] == again["stateSince"] == told["lastEventTime"]
    assert again["reason"]["detail"] == "its process is gone"


# The command line


def test_every_command_has_help(monitor: RunningMonitor) -> None:
    words = monitor.command("--help").stdout
    commands = re.findall(r"^    ([a-z][a-z-]+)", words, re.M)
    assert {
        "start",
        "stop",
        "restart",
        "status",
        "url",
        "install",
        "uninstall",
        "tail",
        "sessions",
        "export",
    } <= set(commands)
    for command in commands:
        assert "usage:" in monitor.command(command, "--help").stdout
    wrong = monitor.command("no-such-command", check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "--help" in wrong.stderr


def test_a_look_whether_a_monitor_runs_keeps_none_from_starting(tmp_path, monkeypatch):
    path = str(tmp_path / "monitor.pid")
    with open(path, "wb") as looker:
        fcntl.flock(looker, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as running_monitor does, for a moment
        monkeypatch.setattr(cm.time, "sleep", lambda _: fcntl.flock(looker, fcntl.LOCK_UN))
        os.close(cm.lock_file(path, "another monitor runs"))
    monkeypatch.setattr(cm.time, "sleep", lambda _: None)
    holder = cm.lock_file(path, "another monitor runs (pid {pid})")
    with pytest.raises(cm.StartError, match=rf"another monitor runs \(pid {os.getpid()}\)"):
        cm.lock_file(path, "another monitor runs (pid {pid})")
    os.close(holder)


def test_a_monitor_that_has_stopped_leaves_nothing_in_the_way_of_another_user(
    monitor: RunningMonitor,
) -> None:
    monitor.start()
    lock = monitor.socket_path + ".lock"
    assert cm.lock_holder(lock) == monitor.pid
    monitor.stop()
    assert not os.path.exists(lock) and not os.path.exists(monitor.socket_path)


def test_a_lock_that_is_taken_away_while_it_is_waited_for_is_taken_anew(tmp_path, monkeypatch):
    path = str(tmp_path / "lock")
    holder = cm.lock_file(path, "held by {pid}")
    monkeypatch.setattr(cm.time, "sleep", lambda _: cm.unlock_file(path, holder))
    second = cm.lock_file(path, "held by {pid}")
    assert cm.lock_holder(path) == os.getpid()
    with open(path, "rb") as file:
        assert os.path.samestat(os.fstat(file.fileno()), os.fstat(second)), "not the one that is gone"
    cm.unlock_file(path, second)
    assert not os.path.exists(path)


def test_stop_names_a_monitor_whose_directory_was_removed(monitor: RunningMonitor) -> None:
    monitor.start()
    pid = monitor.pid
    os.rename(monitor.home + "/monitor.pid", monitor.home + "/away")
    refused = monitor.command("stop", check=False)
    assert refused.returncode == 1 and f"`kill {pid}` ends it" in refused.stderr
    os.rename(monitor.home + "/away", monitor.home + "/monitor.pid")
    monitor.stop()


def test_the_beginning_of_a_sessions_id_is_enough_where_it_is_the_only_one(running: RunningMonitor) -> None:
    running.emit(*(payload("UserPromptSubmit", f"{name}-4711", prompt=f"of {name}") for name in ("ab", "ac")))
    assert "of ab" in eventually(lambda: running.command("search", "--session", "ab", check=False).stdout)
    assert running.command("export", "--session", "ac").stdout.count("\n") == 1
    refused = running.command("export", "--session", "a", check=False)
    assert refused.returncode == 1 and "ab-4711, ac-4711; write more" in refused.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("search", "--from", "yesterday", "x"), "write 2026-11-24"),
        (("export", "--to", "24.11.2026"), "write 2026-11-24"),
        (("demo", "--live", "-5"), "expected a number of seconds"),
        (("start", "--port", "4711", "--ws-port", "4711"), "command line: server.wsPort"),
    ],
)
def test_a_wrong_option_is_status_2_and_one_line(monitor: RunningMonitor, command: Any, words: str) -> None:
    refused = monitor.command(*command, check=False)
    assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1


@needs_root
def test_a_start_with_another_users_events_says_so(monitor: RunningMonitor) -> None:
    events = monitor.home + "/events"
    os.makedirs(events)
    os.chown(events, 65534, 65534)
    refused = monitor.command("start", "--no-open", check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"contextuate: error: {events} is not a directory of this user\n"


def test_a_file_or_directory_that_cannot_be_used_is_one_line(running: RunningMonitor) -> None:
    running.emit(payload("Stop"))
    for command, words in (
        (("export", "--output", "/nonexistent/x"), "/nonexistent/x: No such file or directory"),
        (("export", "--output", running.home), f"{running.home}: Is a directory"),
    ):
        refused = running.command(*command, check=False)
        assert refused.returncode == 1
        assert refused.stderr == f"contextuate: error: {words}\n"


def test_start_status_url_restart_stop(monitor: RunningMonitor) -> None:
    assert monitor.command("status", check=False).returncode == 1
    refused = monitor.command("url", check=False)
    assert refused.returncode == 1
    assert "start" in refused.stderr
    started = monitor.command("start", "--no-open").stdout
    address = re.search(r"http://localhost:\d+/", started)
    assert address
    assert "install" in started
    assert "already running" in monitor.command("start", "--no-open").stdout
    assert "running" in monitor.command("status").stdout
    assert json.loads(monitor.command("status", "--json").stdout)["running"] is True
    assert monitor.command("url").stdout.strip() == address.group()
    assert re.fullmatch(r"http://localhost:\d+/\?token=[\w-]{32}\n", monitor.command("url", "--token").stdout)
    before = json.loads(monitor.command("status", "--json").stdout)["pid"]
    monitor.command("restart", "--no-open")
    assert json.loads(monitor.command("status", "--json").stdout)["pid"] != before
    assert "stopped" in monitor.command("stop").stdout
    assert "not running" in monitor.command("stop").stdout
    assert not os.path.exists(monitor.socket_path)


def test_sigterm_ends_it_cleanly_and_clients_are_told(running: RunningMonitor) -> None:
    client = running.websocket("rows")
    running.emit(payload("Stop"))
    os.kill(running.pid, signal.SIGTERM)
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        while True:
            client.connection.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1001
    eventually(lambda: not alive(running.pid))
    assert not os.path.exists(running.socket_path)


def test_test_event_goes_the_hooks_way(running: RunningMonitor) -> None:
    words = running.command("test-event").stdout
    assert "has stored" in words
    assert [event["hookType"] for event in running.stored_events()] == ["Notification"]
    running.stop()
    refused = running.command("test-event", check=False)
    assert refused.returncode == 1
    assert "spool" in refused.stderr


@contextlib.contextmanager
def tailing(monitor: RunningMonitor, *options: str) -> Iterator[Any]:
    """Run `tail`, and give a function that returns its next line, without those of the session "chosen-r"."""
    command = [sys.executable, monitor.program, "tail", *options]
    with subprocess.Popen(command, env=monitor.environment, stdout=subprocess.PIPE, text=True) as tail:
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


def test_tail_prints_what_comes_and_waits_for_a_restarted_monitor(running: RunningMonitor) -> None:
    running.emit(payload("Stop", "before"))
    with tailing(running, "--json") as line, tailing(running, "--type", "PermissionRequest") as plain:
        waiting = recorded("i-perm")[:5]
        running.emit(*waiting)
        stored = [
            event for event in running.stored_events() if event["sessionId"] == waiting[0]["session_id"]
        ]
        assert [json.loads(line()) for _ in waiting] == stored
        words = plain()
        assert "PermissionRequest" in words and "touch" in words and "\x1b" not in words
        running.stop()
        run_hook(
            running.installed_command(), json.dumps(payload("Stop", "away")).encode(), running.environment
        )
        running.start()
        assert json.loads(line())["sessionId"] == "away"
    with tailing(running, "--session", "chosen") as line:
        running.emit(*(payload("Stop", f"{name}-1") for _ in range(1200) for name in ("chosen", "x")))
        assert all("chosen-" in line() for _ in range(1200))


def test_sessions_and_export_tell_what_the_page_tells(running: RunningMonitor) -> None:
    running.emit(*recorded("i-perm")[:5])
    words = running.command("sessions").stdout
    assert words.startswith("waiting")
    assert "permission" in words
    as_json = json.loads(running.command("sessions", "--json", "--all").stdout)
    assert as_json == list(running.sessions().values())
    exported = running.command("export").stdout.splitlines()
    assert [json.loads(line) for line in exported] == running.stored_events()
    assert running.command("export", "--session", "nobody").stdout == ""
    assert running.command("export", "--from", "2199-01-01").stdout == ""
    assert running.command("export", "--state", "waiting").stdout.splitlines() == exported
    assert running.command("export", "--state", "idle").stdout == ""
    target = running.home + "/out.ndjson"
    assert "5 events" in running.command("export", "--output", target).stdout
    with open(target, encoding="utf-8") as file:
        assert file.read().splitlines() == exported
    for number in range(5):
        running.emit(
            payload(
                "PostToolUseFailure", "stuck", tool_name="Edit", tool_use_id=f"t{number}", error="no match"
            )
        )
    assert "Edit failed 5 times the same way: no match" in running.command("sessions").stdout


@pytest.mark.parametrize(
    "command",
    [
        ("sessions",),
        ("search", "x"),
        ("prune",),
        ("tail",),
        ("demo",),
        ("import",),
        ("export", "--state", "idle"),
    ],
)
def test_what_needs_a_running_monitor_says_how_to_start_it(monitor: RunningMonitor, command: Any) -> None:
    refused = monitor.command(*command, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    words = "the monitor is not running; start it with: python3 contextuate_monitor.py start"
    assert refused.stderr == f"contextuate: error: {words}\n"


def test_an_export_needs_no_running_monitor(running: RunningMonitor) -> None:
    running.emit(*recorded("simple"))
    exported = running.command("export").stdout
    calls = running.command("export", "--format", "csv").stdout
    running.stop()
    assert running.command("export").stdout == exported
    assert running.command("export", "--format", "csv").stdout == calls


def test_what_comes_from_elsewhere_cannot_steer_the_terminal() -> None:
    assert cm.safe_line("a\x1b[31mred\n\u202eb \t") == "a\ufffd[31mred\ufffd\ufffdb \ufffd"


def test_a_search_holds_its_first_moment_and_not_its_end(running: RunningMonitor) -> None:
    running.emit(payload("UserPromptSubmit", prompt="zebra"))
    at = running.stored_events()[0]["timestamp"]
    index_ready(running)
    for start, end, found in ((at, at + 1, 1), (at + 1, at + 9, 0), (at - 9, at, 0)):
        assert len(running.get(f"/api/search?q=zebra&from={start}&to={end}")["results"]) == found


@pytest.mark.parametrize("matcher", ["", "*", ".*", "Bash"])
def test_our_handler_is_updated_in_place_where_its_matcher_takes_all(matcher: str) -> None:
    old, new = (
        cm.hook_command("/usr/bin/python3", f"/home/{who}/.contextuate/hooks/emit_event.py") for who in "ab"
    )
    group = {"matcher": matcher, "hooks": [{"type": "command", "command": old}]}
    groups = cm.merge_hooks({"hooks": {"Stop": [group]}}, new, ["Stop"])["hooks"]["Stop"]
    assert [entry["command"] for group in groups for entry in group["hooks"]] == [new]
    assert groups[0].get("matcher", "") == ("" if matcher == "Bash" else matcher)


def test_status_prints_facts_and_problems(running: RunningMonitor) -> None:
    status = running.get("/api/status")
    facts = {fact["name"]: fact["words"] for fact in cm.status_facts(status)}
    assert list(facts) == ["mode", "events", "sessions", "store", "index", "spool", "lost"]
    words = running.command("status").stdout
    for name, fact in facts.items():
        steady = fact.partition(",")[0] if name == "store" else fact  # its size grows meanwhile
        assert f"{name:<8} {steady}" in words or name == "index", words
    link = {"state": "waiting", "server": "redis:6379", "tls": True, "attempt": 2, "maxRetries": 9}
    link.update(reason="refused", position=None, streamReason="", streamState="ok", gaps=1)
    machine = {"machineId": "far", "events": 3, "lastSeen": cm.now_ms(), "clockSkewMs": -7000}
    publisher = {"running": True, "state": "connected", "published": 4}
    status = {**status, "redis": link, "publisher": publisher, "machines": [machine]}
    facts = {fact["name"]: fact["words"] for fact in cm.status_facts(status)}
    assert facts["redis"] == "redis:6379 with TLS: waiting, attempt 2 of 9: refused"
    assert facts["stream"] == "read up to its start" and facts["gaps"].startswith("1 times")
    assert facts["publish"] == "connected: 4 events since it was started"
    assert facts["machine"] == "far: 3 events, last 0 s ago, clock 7 s ahead"


def test_a_demo_that_is_played_again_takes_the_place_of_the_first(running: RunningMonitor) -> None:
    running.command("demo", "--live", "0")
    first = running.sessions()
    assert "demo sessions removed" in running.command("demo", "--live", "0").stdout
    second = running.sessions()
    assert len(second) == len(first) and not set(second) & set(first)
    labels = [sorted(session["label"] for session in played.values()) for played in (first, second)]
    assert labels[0] == labels[1]


def test_the_demo_shows_every_kind_of_row_and_wait() -> None:
    book, hooks, tools = cm.Sessions(own_machine="testbox"), set(), set()
    for seq, (at, sent) in enumerate(cm.demo_day(NOW_MS, 0), 1):
        event = {**ee.build_event(sent, at, "testbox"), "seq": seq, "received": at}
        hooks.add(event["hookType"])
        tools.add(event["data"].get("toolName"))
        book.apply(event)
    book.tick(NOW_MS)
    assert hooks >= {
        "SessionStart", "SessionEnd", "UserPromptSubmit", "PreToolUse", "PostToolUse", "PostToolUseFailure",
        "PermissionRequest", "Notification", "Stop", "StopFailure", "SubagentStart", "SubagentStop",
        "TaskCreated", "TaskCompleted",
    }  # fmt: skip
    assert tools >= {
        "Bash", "Read", "Write", "Edit", "Grep", "Glob", "WebFetch", "TodoWrite", "TaskCreate", "TaskUpdate", "Agent",
        "AskUserQuestion", "ExitPlanMode", "mcp__github__get_pull_request",
    }  # fmt: skip
    shown = [book.to_json(session) for session in book.sessions.values()]
    assert {"waiting", "working", "quiet", "failed", "idle", "ended"} == {one["state"] for one in shown}
    waits = {(one["reason"]["kind"], one["reason"]["tool"]) for one in shown if one["state"] == "waiting"}
    assert waits == {
        ("permission", "Bash"), ("question", "AskUserQuestion"), ("question", "ExitPlanMode"), ("input", None)
    }  # fmt: skip
    assert any(one["counts"]["interrupted"] for one in shown)
    assert any(agent["parentAgentId"] for one in shown for agent in one["agents"]), "none is nested"
    assert sum(agent["state"] == "working" for one in shown for agent in one["agents"]) == 2, (
        "in the background"
    )


def test_the_demo_fills_every_state_and_can_be_removed(running: RunningMonitor) -> None:
    running.emit(payload("UserPromptSubmit", "mine", prompt="keep me"))
    words = running.command("demo", "--live", "0").stdout
    assert "demo --remove" in words
    every_state = {"waiting", "working", "quiet", "failed", "idle", "ended"}
    eventually(lambda: {session["state"] for session in running.sessions().values()} == every_state)
    sessions = running.sessions()
    assert all(session["demo"] for session in sessions.values() if session["sessionId"] != "mine")
    assert any(agent["state"] == "working" for session in sessions.values() for agent in session["agents"])
    assert sum(bool(session["estimatedCostUsd"]) for session in sessions.values()) >= 10
    running.command("demo", "--remove")
    assert list(running.sessions()) == ["mine"]
    assert {event["sessionId"] for event in running.stored_events()} == {"mine"}


def test_an_installed_hook_belongs_to_the_directory_it_is_installed_in(running: RunningMonitor) -> None:
    environment = {name: value for name, value in running.environment.items() if name != "CONTEXTUATE_HOME"}
    command = running.installed_command()
    assert run_hook(command, json.dumps(payload("Stop")).encode(), environment).returncode == 0
    assert [event["hookType"] for event in running.stored_events()] == ["Stop"]


# ---------------------------------------------------------------------------
# Doctor: each broken link is named, with what to do
# ---------------------------------------------------------------------------


def examine(monitor: RunningMonitor) -> tuple[int, dict[str, list[dict[str, str]]]]:
    """Run `doctor --json`; return its exit status and the findings by the name of their check."""
    done = monitor.command("doctor", "--json", check=False)
    answer = json.loads(done.stdout)
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in answer["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    assert answer["ok"] == (done.returncode == 0)
    return done.returncode, findings


def levels(findings: dict[str, list[dict[str, str]]], check: str) -> list[str]:
    return [finding["level"] for finding in findings[check]]


def test_doctor_finds_nothing_wrong_where_nothing_is(running):
    running.command("install")
    status, findings = examine(running)
    assert status == 0, findings
    for check in ("config", "files", "hook", "registered", "spool", "monitor", "socket", "index", "probe"):
        assert levels(findings, check) == ["ok"], findings[check]
    assert "reached the monitor" in findings["probe"][0]["words"]
    events = running.get("/api/events?limit=10")["events"]
    assert [event["data"]["message"].startswith("doctor ") for event in events] == [True]
    words = running.command("doctor").stdout
    assert words.startswith("ok   config") and words.endswith("Everything that was examined works.\n")


def test_doctor_says_that_the_monitor_does_not_run_and_loses_no_event(monitor):
    monitor.start().command("install")
    monitor.command("stop")
    status, findings = examine(monitor)
    assert status == 1
    assert levels(findings, "monitor") == levels(findings, "probe") == ["fail"]
    assert findings["monitor"][0]["advice"] == "run: python3 contextuate_monitor.py start"
    assert levels(examine(monitor)[1], "spool") == ["warn"]  # the first probe waits there
    monitor.start()
    eventually(lambda: len(monitor.get("/api/events?limit=10")["events"]) == 2)
    assert examine(monitor)[0] == 0


def test_doctor_says_that_the_hook_is_missing_not_registered_or_of_another_version(running):
    status, findings = examine(running)
    assert status == 1 and levels(findings, "hook") == levels(findings, "registered") == ["fail"]
    assert "install" in findings["hook"][0]["advice"]
    running.command("install")
    with open(running.home + "/hooks/lib/emit_event.py", "a", encoding="utf-8") as file:
        file.write("# another version\n")
    status, findings = examine(running)
    assert status == 0 and levels(findings, "hook") == ["warn"]
    os.unlink(running.home + "/hooks/lib/emit_event.py")
    assert levels(examine(running)[1], "hook")[0] == "fail"


def test_doctor_knows_a_hook_that_is_registered_for_the_project_only(running):
    project = running.home + "/project"
    os.mkdir(project)
    running.command("install", "--project", project)
    asked = subprocess.run(
        [sys.executable, running.program, "doctor", "--json"], cwd=project, env=running.environment,
        capture_output=True, check=False,
    )  # fmt: skip
    (told,) = [one for one in json.loads(asked.stdout)["findings"] if one["check"] == "registered"]
    assert told["level"] == "ok" and project in told["words"]
    assert levels(examine(running)[1], "registered") == ["fail"]


def test_doctor_sees_that_claude_code_runs_no_hooks(running):
    running.command("install")
    path = running.claude_home + "/settings.json"
    with open(path, encoding="utf-8") as file:
        settings = json.load(file)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({**settings, "disableAllHooks": True}, file)
    status, findings = examine(running)
    assert status == 1 and findings["registered"][0]["level"] == "fail"
    assert "disableAllHooks" in findings["registered"][0]["words"]


def test_doctor_names_what_is_wrong_in_the_configuration(monitor):
    monitor.write_config({"server": {"port": "many"}})
    status, findings = examine(monitor)
    assert status == 1 and list(findings) == ["config"]
    assert "server.port: expected an integer" in findings["config"][0]["words"]
    monitor.write_config({"sever": {"port": 1}})
    assert levels(examine(monitor)[1], "config") == ["ok", "warn"]


def test_doctor_sees_files_that_are_open_to_others_and_that_a_port_is_taken(monitor):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monitor.write_config({"server": {"port": port, "wsPort": 0}})
        os.chmod(monitor.home, 0o755)
        status, findings = examine(monitor)
    assert status == 1 and levels(findings, "files") == ["warn"]
    assert f"{port}" in findings["ports"][0]["words"] and levels(findings, "ports") == ["fail"]


# ---------------------------------------------------------------------------
# Redis mode: many machines, several monitors, and a Redis that misbehaves
#
# Real redis-server processes, real monitors, installed hooks. A machine is a directory and a name of its own.
# ---------------------------------------------------------------------------

REDIS_OUTAGE_S = 20.0  # the long one; the others last as long as what is tested in them
REDIS_CHANNEL = "contextuate:events"
REDIS_STREAM = "contextuate:events:stream"


def redis_ports() -> Iterator[int]:
    """Give each port once: no outgoing connection and no other test is given it while its server is down."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 10
    first = 20_000 + 1_000 * worker
    for port in random.Random().sample(range(first, first + 1_000), 1_000):
        with socket.socket() as sock:
            nobody_answers = sock.connect_ex(("127.0.0.1", port)) != 0
        if nobody_answers:
            yield port


REDIS_PORTS = redis_ports()
REDIS_PORTS_LOCK = threading.Lock()


def redis_free_port() -> int:
    """Return a free port that is nobody else's in this run of the tests."""
    with REDIS_PORTS_LOCK:
        return next(REDIS_PORTS)


@dataclasses.dataclass(frozen=True)
class RedisCertificates:
    """A certificate authority, and what it gave to a server and to a client, as PEM files."""

    directory: str

    @classmethod
    def make(cls, directory: str, names: str = "DNS:localhost,IP:127.0.0.1") -> RedisCertificates:
        """Make them with openssl; `names` is what the server's certificate is for."""
        made = cls(directory)
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        made.openssl(
            "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=test authority",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
        )  # fmt: skip
        for who, usage in (("server", "serverAuth"), ("client", "clientAuth")):
            with open(f"{directory}/{who}.ext", "w", encoding="ascii") as file:
                file.write(
                    f"basicConstraints=critical,CA:FALSE\nextendedKeyUsage={usage}\nsubjectAltName={names}\n"
                    "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nkeyUsage=digitalSignature\n"
                )
            made.openssl("req", *key, "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
            made.openssl(
                "x509", "-req", "-in", f"{who}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial",
                "-out", f"{who}.crt", "-days", "2", "-extfile", f"{who}.ext",
            )  # fmt: skip
        return made

    def openssl(self, *arguments: str) -> None:
        """Run one openssl command in the directory."""
        subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True)

    def path(self, name: str) -> str:
        """Return a file's path: "ca.crt", "server.crt", "server.key", "client.crt", "client.key"."""
        return f"{self.directory}/{name}"


class RedisServer:
    """A redis-server process with a directory and a port of its own; both stay when it is started again.

    `lines` go into its configuration. What it had is kept over `stop` and `start`.
    """

    def __init__(
        self,
        *lines: str,
        user: str = "default",
        password: str = "",
        certificates: RedisCertificates | None = None,
        port: int = 0,
    ) -> None:
        self.directory = new_home()
        self.socket_path = self.directory + "/redis.sock"
        self.port = port or redis_free_port()
        self.user, self.password = user, password
        self.certificates = certificates
        ports = [f"port {self.port}"]
        if certificates is not None:
            ports = [
                "port 0",
                f"tls-port {self.port}",
                f"tls-cert-file {certificates.path('server.crt')}",
                f"tls-key-file {certificates.path('server.key')}",
                f"tls-ca-cert-file {certificates.path('ca.crt')}",
                "tls-auth-clients no",
            ]
        secret = [f"requirepass {password}"] if password and user == "default" else []
        common = [
            "bind 127.0.0.1", f"dir {self.directory}", f"unixsocket {self.socket_path}", 'save ""',
            "appendonly yes", "appendfsync everysec", f"logfile {self.directory}/redis.log",
        ]  # fmt: skip
        with open(self.directory + "/redis.conf", "w", encoding="ascii") as file:
            file.write("\n".join((*ports, *common, *secret, *lines)) + "\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> RedisServer:
        """Start it, on the same port, with what it had, and wait until it answers."""
        command = ["redis-server", self.directory + "/redis.conf"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        eventually(lambda: self.cli("PING", check=False) == "PONG", what=f"Redis on port {self.port}")
        return self

    def stop(self) -> None:
        """Stop it in order; what it had is kept."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, how: int) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(30)
            self.process = None

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open, nobody answers."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)

    def remove(self) -> None:
        """End it and remove its directory."""
        self.thaw()
        self.kill()
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
        """Publish any bytes on the channel."""
        self.cli("PUBLISH", REDIS_CHANNEL, given=message)

    def streamed(self) -> list[str]:
        """Return every event in the stream, as text, oldest first."""
        said = self.cli("--json", "XRANGE", REDIS_STREAM, "-", "+")
        return [dict(zip(fields[::2], fields[1::2]))["event"] for _, fields in json.loads(said)]

    def clients(self, kind: str) -> int:
        """Count its connections of one type: "normal" (ours included) or "pubsub"."""
        return len(self.cli("CLIENT", "LIST", "TYPE", kind).splitlines())

    def cut_connections(self) -> None:
        """Close every connection but our own."""
        for kind in ("normal", "pubsub"):
            self.cli("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")

    def settings(self, **more: Any) -> dict[str, Any]:
        """Return the configuration of a machine that uses it."""
        redis = {"host": "127.0.0.1", "port": self.port, **more}
        if self.certificates is not None:
            redis = {"tls": True, "caFile": self.certificates.path("ca.crt"), **redis}
        return {"mode": "redis", "redis": redis}


@dataclasses.dataclass
class RedisMachine(RunningMonitor):
    """One machine in Redis mode: its hook, its spool, its publisher, and a monitor if one is started."""

    machine_id: str = "testbox"
    more_environment: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process of this machine."""
        return {**super().environment, "CONTEXTUATE_MACHINE_ID": self.machine_id, **self.more_environment}

    @functools.cached_property
    def hook(self) -> str:
        """The installed hook's command."""
        return self.installed_command()

    def say(self, marker: str, session: str = "s1", **fields: Any) -> None:
        """Run one real hook with an event that `marker` tells from others; it must end in order."""
        hook_call(self.hook, payload("PreToolUse", session, tool_use_id=marker, **fields), self.environment)

    def spool(self, marker: str, session: str = "s1", **fields: Any) -> None:
        """Put one event into the spool as a hook does, without starting a process."""
        given_payload = payload("PreToolUse", session, tool_use_id=marker, **fields)
        environment = {name.encode(): value.encode() for name, value in self.environment.items()}
        ee.append_to_spool(self.home + "/spool", ee.wrap(json.dumps(given_payload).encode(), environment))

    def spooled(self) -> int:
        """Count the bytes in the spool."""
        return sum(size for _, size in ee.spool_segments(self.home + "/spool"))

    def redis(self) -> dict[str, Any]:
        """Return what the monitor says about its Redis."""
        return dict(self.get("/api/status")["redis"])

    def publisher(self) -> dict[str, Any]:
        """Return what the publisher has told about itself; nothing before it has begun."""
        try:
            with open(self.home + "/publisher.json", encoding="utf-8") as file:
                return dict(json.load(file))
        except FileNotFoundError:
            return {}

    def wait_until(self, state: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until the monitor's Redis is in a state; return what it says then."""
        return dict(
            eventually(
                lambda: (about := self.redis())["state"] == state and about,
                timeout_s, f"{self.machine_id}: {state}",
            )
        )  # fmt: skip

    def arrivals(self, session: str = "s1") -> dict[str, list[str]]:
        """Return what the monitor has stored of a session: machine → markers, in order of arrival."""
        found: dict[str, list[str]] = {}
        for event in self.stored_events():
            if event["sessionId"] == session:
                found.setdefault(event["machineId"], []).append(event["data"].get("toolUseId"))
        return found

    def has(self, session: str, count: int) -> bool:
        """Tell whether the monitor shows at least so many events of a session."""
        return bool(self.sessions().get(session, {"counts": {"events": 0}})["counts"]["events"] >= count)

    def publishers(self) -> list[int]:
        """List the process ids of this machine's publishers."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as arguments:
                if b"--publish" not in arguments.read().split(b"\0"):
                    continue
                with open(f"/proc/{name}/environ", "rb") as environ:
                    if f"CONTEXTUATE_HOME={self.home}".encode() in environ.read().split(b"\0"):
                        found.append(int(name))
        return found

    def end_publisher(self) -> None:
        """End this machine's publisher, if one runs, with SIGKILL."""
        for pid in self.publishers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: not alive(pid), what="the publisher's end")

    def remove(self) -> None:
        """End everything of this machine and remove its directory."""
        if self.about and alive(self.pid):
            self.kill()
        self.end_publisher()
        clean_up(self)


def at_once(*jobs: Any) -> list[Any]:
    """Call all of some functions at the same time; return what they returned, in order."""
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
    """Make servers and machines for one test."""
    with redis_parts() as maker:
        yield maker


@dataclasses.dataclass
class RedisTeam:
    """Three machines that emit, two that only watch, one Redis."""

    server: RedisServer
    emitters: list[RedisMachine]
    monitors: list[RedisMachine]

    def mend(self) -> None:
        """Undo whatever a test has done to it."""
        self.server.thaw()
        if self.server.process is None:
            self.server.start()
        self.server.cli("CONFIG", "SET", "maxmemory", "0")
        self.server.cli("CONFIG", "SET", "client-output-buffer-limit", "pubsub 33554432 8388608 60")
        self.server.cli("ACL", "SETUSER", "default", "allcommands", "allkeys", "allchannels")
        self.server.cli("XTRIM", REDIS_STREAM, "MAXLEN", "200")  # every monitor has what is older
        for monitor in self.monitors:
            if not alive(monitor.pid):
                monitor.start()
            os.kill(monitor.pid, signal.SIGCONT)
            monitor.wait_until("connected")


@pytest.fixture(scope="module")
def redis_team() -> Iterator[RedisTeam]:
    with redis_parts() as maker:
        server = maker(RedisServer)
        made = RedisTeam(
            server,
            [maker(RedisMachine, config=server.settings(), machine_id=f"box{n}") for n in range(3)],
            [maker(RedisMachine, config=server.settings(), machine_id=f"watcher{n}") for n in range(2)],
        )
        at_once(*[lambda machine=machine: machine.hook for machine in made.emitters])
        at_once(*[monitor.start for monitor in made.monitors])
        yield made


@pytest.fixture
def team(redis_team: RedisTeam) -> Iterator[RedisTeam]:
    """The team in good order: every monitor is connected, and each test leaves it so."""
    redis_team.mend()
    yield redis_team
    redis_team.mend()


class RedisFlow:
    """Events of one session, said on every machine of a team in turn, and the check that all arrived."""

    def __init__(self, team: RedisTeam, session: str) -> None:
        self.team = team
        self.session = session
        self.said: dict[str, list[str]] = {machine.machine_id: [] for machine in team.emitters}

    def hooks(self, count: int) -> None:
        """Run so many real hooks, on all machines at once; every one has returned when this returns."""
        shares = self._shares(count)

        def run(machine: RedisMachine) -> None:
            for marker in shares[machine.machine_id]:
                machine.say(marker, self.session)

        at_once(*[functools.partial(run, machine) for machine in self.team.emitters])

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

    def check(self, timeout_s: float = 90.0) -> None:
        """Both monitors get every event once, each machine's in its order; no spool keeps any."""
        count = sum(map(len, self.said.values()))
        for monitor in self.team.monitors:
            eventually(
                lambda monitor=monitor: monitor.has(self.session, count), timeout_s,
                f"{count} events at {monitor.machine_id}",
            )  # fmt: skip
        for machine in self.team.emitters:
            eventually(lambda machine=machine: not machine.spooled(), timeout_s, "an empty spool")
        for monitor in self.team.monitors:
            assert monitor.arrivals(self.session) == self.said


def without_arrival(event: dict[str, Any]) -> dict[str, Any]:
    """Return an event without what each monitor adds for itself."""
    return {name: value for name, value in event.items() if name not in ("seq", "received")}


def test_every_monitor_has_every_machines_events_once_and_in_order(team: RedisTeam) -> None:
    clients = [monitor.websocket("full") for monitor in team.monitors]
    flow = RedisFlow(team, "three-machines")
    flow.hooks(60)
    flow.bulk(60, tool_name="Bash", tool_input={"command": "ls"})
    flow.check()
    first, second = (
        {e["id"]: without_arrival(e) for e in monitor.stored_events() if e["sessionId"] == flow.session}
        for monitor in team.monitors
    )
    assert first == second and len(first) == 120
    for client, monitor in zip(clients, team.monitors):
        shown = [event for event in client.events(120) if event["sessionId"] == flow.session]
        assert {event["id"]: without_arrival(event) for event in shown} == first
        client.close()
        about = {machine["machineId"]: machine for machine in monitor.get("/api/status")["machines"]}
        for machine in team.emitters:
            assert about[machine.machine_id]["events"] >= 40
            assert abs(about[machine.machine_id]["lastSeen"] - time.time() * 1000) < 300_000
    for machine in team.emitters:
        eventually(lambda machine=machine: machine.publisher()["published"] >= 40)
        assert machine.publisher()["subscribers"] == 2
        assert len(machine.publishers()) == 1
    assert {json.dumps(json.loads(line)) for line in team.server.streamed()} >= {
        json.dumps(event) for event in first.values()
    }


def test_a_redis_that_was_stopped_for_20_seconds_costs_no_event(team: RedisTeam) -> None:
    """1,000 real hooks. One that waited for Redis would never return: it comes back when all 400 have."""
    flow = RedisFlow(team, "outage")
    flow.hooks(300)
    team.server.stop()
    began = time.monotonic()
    flow.hooks(400)
    assert all(machine.spooled() > 0 for machine in team.emitters)
    time.sleep(max(0.0, began + REDIS_OUTAGE_S - time.monotonic()))
    assert not any(monitor.has(flow.session, 601) for monitor in team.monitors)
    team.server.start()
    flow.hooks(300)
    flow.check()
    for monitor in team.monitors:
        about = monitor.wait_until("connected")
        assert (about["attempt"], about["reason"]) == (0, None)


def test_a_redis_that_was_frozen_costs_no_event(team: RedisTeam) -> None:
    flow = RedisFlow(team, "frozen")
    flow.bulk(400)
    team.server.freeze()
    flow.bulk(300)
    flow.hooks(60)
    assert all(machine.spooled() > 0 for machine in team.emitters)
    for machine in team.emitters:
        eventually(lambda machine=machine: machine.publisher().get("reason"), 30, "the publisher's deadline")
    team.server.thaw()
    flow.bulk(240)
    flow.check()


def test_a_redis_that_was_killed_costs_no_event(team: RedisTeam) -> None:
    flow = RedisFlow(team, "killed")
    flow.bulk(150)
    team.server.kill()
    flow.bulk(150)
    team.server.start()
    flow.bulk(150)
    flow.check()


def test_fifty_cut_connections_cost_no_event(team: RedisTeam) -> None:
    flow = RedisFlow(team, "cut")
    dice = random.Random(50)
    for _ in range(50):
        flow.bulk(dice.randrange(16, 24))
        time.sleep(dice.random() * 0.05)
        team.server.cut_connections()
    flow.bulk(60)
    flow.check()
    assert sum(map(len, flow.said.values())) > 900


def test_a_monitor_that_redis_cut_off_for_being_slow_catches_up(team: RedisTeam) -> None:
    team.server.cli("CONFIG", "SET", "client-output-buffer-limit", "pubsub 1000000 1000000 1")
    fast, slow = team.monitors
    os.kill(slow.pid, signal.SIGSTOP)
    flow = RedisFlow(team, "slow")
    flow.bulk(999, tool_name="Write", tool_input={"file_path": "/a", "content": "words " * 5000})
    eventually(lambda: fast.has(flow.session, 999), 60, "999 events at the fast one")
    eventually(lambda: team.server.clients("pubsub") == 1, 30, "the slow one's connection cut")
    assert not slow.arrivals(flow.session)
    os.kill(slow.pid, signal.SIGCONT)
    flow.check()


def test_a_monitor_that_was_down_catches_up(team: RedisTeam) -> None:
    down = team.monitors[1]
    flow = RedisFlow(team, "down")
    flow.bulk(300)
    down.kill()
    flow.bulk(300)
    down.start()
    flow.bulk(300)
    for _ in range(3):
        down.kill()
        flow.bulk(33)
        down.start()
    flow.check()


def test_a_new_monitor_gets_what_the_stream_still_has(team: RedisTeam, make: Any) -> None:
    flow = RedisFlow(team, "before")
    flow.bulk(30)
    flow.check()
    late = make(RedisMachine, config=team.server.settings(), machine_id="late").start()
    eventually(lambda: late.has(flow.session, 30), 30, "the events of before it was there")
    assert late.arrivals(flow.session) == flow.said


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (["ACL", "SETUSER", "default", "-xadd"], "xadd"),
        (["ACL", "SETUSER", "default", "resetkeys", "~other"], "key"),
        (["CONFIG", "SET", "maxmemory", "1"], "memory"),
        (["SET", REDIS_STREAM, "no stream"], "wrong kind|not a stream|WRONGTYPE"),
    ],
    ids=["no right to XADD", "no right to the key", "out of memory", "no stream under its name"],
)
def test_a_refused_xadd_does_not_stop_the_publish(team: RedisTeam, refuse: list[str], words: str) -> None:
    if not team.server.streamed():  # this test is the team's first
        before = RedisFlow(team, "before-" + hashlib.sha256(refuse[-1].encode()).hexdigest()[:4])
        before.bulk(30)
        before.check()
    stream_before = team.server.streamed()
    if refuse[0] == "SET":
        team.server.cli("RENAME", REDIS_STREAM, "aside")
    team.server.cli(*refuse)
    flow = RedisFlow(team, "refused-" + hashlib.sha256(refuse[-1].encode()).hexdigest()[:4])
    try:
        flow.bulk(90)
        flow.check()
        for machine in team.emitters:
            about = eventually(
                lambda machine=machine: (p := machine.publisher())["stream"] == "refused" and p
            )
            assert re.search(words, about["streamReason"], re.I), about
            assert about["channelState"] == "ok"
    finally:
        if refuse[0] == "SET":
            team.server.cli("RENAME", "aside", REDIS_STREAM)
    team.mend()
    assert team.server.streamed() == stream_before
    flow.bulk(30)
    flow.check()
    assert len(team.server.streamed()) == len(stream_before) + 30
    for machine in team.emitters:
        eventually(
            lambda machine=machine: machine.publisher()["stream"] == "ok", what="the stream's recovery"
        )


def test_a_refused_publish_does_not_stop_the_xadd(team: RedisTeam) -> None:
    team.server.cli("ACL", "SETUSER", "default", "-publish")
    flow = RedisFlow(team, "no-publish")
    flow.bulk(90)
    flow.check()
    for machine in team.emitters:
        about = eventually(
            lambda machine=machine: (p := machine.publisher())["channelState"] == "refused" and p
        )
        assert "publish" in about["channelReason"].lower()
        assert about["stream"] == "ok"


def test_anything_published_by_redis_cli_is_shown(team: RedisTeam) -> None:
    clients = [monitor.websocket("full") for monitor in team.monitors]
    assert team.server.cli("PUBLISH", REDIS_CHANNEL, '{"test":"message"}') == "2"
    for client, monitor in zip(clients, team.monitors):
        (event,) = client.events(1)
        assert (event["sessionId"], event["eventType"], event["data"]) == (
            "unknown",
            "message",
            {"test": "message"},
        )
        shown = monitor.get("/api/events?limit=1")["events"]
        assert [shown_event["id"] for shown_event in shown] == [event["id"]]
        client.close()


def test_redis_cli_sees_plain_events(team: RedisTeam) -> None:
    with subprocess.Popen(
        ["redis-cli", "-s", team.server.socket_path, "SUBSCRIBE", REDIS_CHANNEL], stdout=subprocess.PIPE
    ) as watching:
        assert watching.stdout is not None
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


def test_garbage_from_redis_is_quarantined_and_never_stops_the_stream(team: RedisTeam) -> None:
    garbage = [
        bytes(range(256)), b"", b" ", b"not JSON", b'"text"', b"[1,2]", b"1" * 5000, b"null", b"\x00",
        b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, os.urandom(1 << 20),
        b"x" * (17 << 20), b'{"a":"' + b"x" * (17 << 20) + b'"}',
    ]  # fmt: skip
    odd = [
        b'{"eventType":"message","sessionId":"odd","data":{"n":NaN,"f":1e999,"s":"\\ud83d","latin":"caf\xe9"}}',
        b'{"eventType":"message","sessionId":"odd","deep":' + b"[" * 400 + b"]" * 400 + b"}",
        *(
            json.dumps({"eventType": "message", "sessionId": "odd", field: value}).encode()
            for field in ("timestamp", "machineId", "workingDirectory", "hookType", "data", "pid", "agentId")
            for value in WRONG_TYPES
        ),
    ]
    before = [monitor.get("/api/status")["events"] for monitor in team.monitors]
    flow = RedisFlow(team, "among-garbage")
    for message in garbage:
        team.server.publish(message)
    for message in odd:
        team.server.publish(message)
    team.server.cli("XADD", REDIS_STREAM, "*", "nothing", "of ours")
    team.server.cli("XADD", REDIS_STREAM, "*", "event", given=bytes(range(256)))
    flow.bulk(30)
    flow.check()
    for monitor, events in zip(team.monitors, before):
        now = eventually(
            lambda monitor=monitor, events=events: (
                (told := monitor.get("/api/status")["events"])["quarantined"]
                >= events["quarantined"] + len(garbage)
                and told
            )
        )
        assert now["quarantined"] <= events["quarantined"] + len(garbage) + 2
        measured = eventually(
            lambda monitor=monitor: (
                (told := metrics_of(monitor))["contextuate_redis_inbox_bytes"][()] == 0 and told
            )
        )
        assert measured["contextuate_redis_connected"] == {(("state", "connected"),): 1}
        assert len(monitor.arrivals("odd").popitem()[1]) > 0
        assert sum(map(len, monitor.arrivals("odd").values())) == len(odd) or len(monitor.arrivals("odd")) > 1
        with open(monitor.home + "/monitor.log", encoding="utf-8") as file:
            assert "Traceback" not in file.read()
        os.path.getsize(monitor.home + "/quarantine.log")


HOSTILE_NAMES = (
    "../../../../tmp/ctx-hostile", "/tmp/ctx-hostile", "..", ".", "a/b", "a\\b", "a\0b", "x" * 5000, "-rf", "~root",
    "$(touch /tmp/ctx-hostile)", "\n", "\u202e", "CON", "events", "\ud83d", "%2e%2e%2f",
)  # fmt: skip


def test_no_name_that_comes_from_redis_leads_out_of_our_directory(team: RedisTeam) -> None:
    def places(monitor: RedisMachine) -> set[str]:
        return {
            os.path.relpath(os.path.join(folder, name), monitor.home)
            for folder, _, names in os.walk(monitor.home)
            for name in names
        }

    before = [places(monitor) for monitor in team.monitors]
    markers = []
    for name in HOSTILE_NAMES:
        for fields in ({"machineId": name}, {"sessionId": name}, {"machineId": name, "sessionId": name}):
            markers.append(f"hostile-{len(markers)}")
            event = {
                "eventType": "message",
                "sessionId": "hostile",
                **fields,
                "data": {"toolUseId": markers[-1]},
            }
            team.server.publish(json.dumps(event).encode())
    for monitor, known in zip(team.monitors, before):
        eventually(
            lambda monitor=monitor: (
                {event["data"].get("toolUseId") for event in monitor.get("/api/events?limit=1000")["events"]}
                >= set(markers)
            ),
            what="the hostile events",
        )
        new = {path for path in places(monitor) - known if not path.startswith("redis-position.json")}
        assert all(
            re.fullmatch(r"events/\d{4}-\d\d-\d\d/[A-Za-z0-9._-]{1,80}\.jsonl", path) for path in new
        ), [path for path in new if not path.startswith("events")]
    assert not glob.glob("/tmp/ctx-hostile*")


def test_nobody_renames_pins_hides_or_moves_a_session_through_redis(team: RedisTeam) -> None:
    for monitor in team.monitors:
        monitor.emit(payload("UserPromptSubmit", "ours", prompt="our words"))
    before = [monitor.sessions()["ours"] for monitor in team.monitors]
    actions = (
        {"action": "rename", "label": "theirs"}, {"action": "pin", "pinned": True}, {"action": "hide", "hidden": True},
        {"action": "set_parent", "parentSessionId": "theirs"},
    )  # fmt: skip
    sent = 0
    for action in actions:
        for message in (
            {"eventType": "session_meta", "hookType": "Monitor", "sessionId": "ours", "data": action},
            {"eventType": "session_meta", "sessionId": "ours", "data": action},
            {"eventType": "message", "hookType": "Monitor", "sessionId": "ours", "data": action},
            {"hook_event_name": "Monitor", "session_id": "ours", **action},
            {"id": str(uuid.uuid4()), "hook": {"hook_event_name": "Monitor", "session_id": "ours", **action}},
        ):
            team.server.publish(json.dumps(message).encode())
            sent += 1
    for monitor, session in zip(team.monitors, before):
        eventually(
            lambda monitor=monitor: sum(e["sessionId"] == "ours" for e in monitor.stored_events()) == 1 + sent
        )
        for _ in ("live", "from the files"):
            now = monitor.sessions()["ours"]
            for name in ("label", "isPinned", "hidden", "parentSessionId"):
                assert now[name] == session[name], name
            monitor.kill()
            monitor.start()


def test_secrets_and_long_fields_stay_on_their_machine(team: RedisTeam) -> None:
    secret = hook_token("ghp_", 36)
    machine = team.emitters[0]
    machine.say(
        "secret", "secret", tool_name="Write", tool_input={"token": secret, "text": f"use {secret} now"}
    )
    machine.say("long", "secret", tool_name="Write", tool_input={"content": "é" * 50_000, "rest": "kept"})
    for monitor in team.monitors:
        eventually(lambda monitor=monitor: monitor.has("secret", 2))
    eventually(lambda: not machine.spooled(), what="an empty spool")
    places = [machine.home, team.server.directory, *(monitor.home for monitor in team.monitors)]
    found = subprocess.run(["grep", "-rlF", secret, *places], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    events = {event["data"]["toolUseId"]: event for event in team.monitors[0].stored_events()
              if event["sessionId"] == "secret"}  # fmt: skip
    assert events["secret"]["data"]["toolInput"]["token"].startswith("[redacted:")
    cut = events["long"]["data"]
    assert cut["truncated"] == {"toolInput.content": 100_000} and cut["toolInput"]["rest"] == "kept"
    assert 65_000 < len(cut["toolInput"]["content"].encode()) < 66_000


def test_the_clock_of_another_machine_is_measured(team: RedisTeam) -> None:
    behind = team.emitters[2]
    hour_ms = 3_600_000
    line = json.dumps(
        {
            "id": str(uuid.uuid4()), "timestamp": int(time.time() * 1000) - hour_ms, "machineId": "slow-clock",
            "hook": payload("Stop", "skewed"),
        }
    ).encode() + b"\n"  # fmt: skip
    ee.append_to_spool(behind.home + "/spool", line)
    behind.say("now", "skewed")
    for monitor in team.monitors:
        eventually(lambda monitor=monitor: monitor.has("skewed", 2))
        about = {told["machineId"]: told for told in monitor.get("/api/status")["machines"]}
        assert abs(about["slow-clock"]["clockSkewMs"] - hour_ms) < 60_000
        assert abs(about["box2"]["clockSkewMs"]) < 60_000


def test_one_publisher_serves_any_number_of_hooks(team: RedisTeam) -> None:
    machine = team.emitters[1]
    machine.end_publisher()
    flow = RedisFlow(team, "one-publisher")
    seen: set[int] = set()
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.update(machine.publishers())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        shares = [f"box1-{number}" for number in range(80)]
        flow.said["box1"] = sorted(shares)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda marker: machine.say(marker, flow.session), shares))
        eventually(lambda: not machine.spooled(), what="an empty spool")
    finally:
        stop.set()
        watching.join()
    assert len(seen) == 1
    for monitor in team.monitors:
        eventually(lambda monitor=monitor: monitor.has(flow.session, 80))
        assert sorted(monitor.arrivals(flow.session)["box1"]) == flow.said["box1"]


def test_a_publisher_that_was_killed_in_the_flow_loses_and_doubles_nothing(team: RedisTeam) -> None:
    flow = RedisFlow(team, "killed-publisher")
    for _ in range(8):
        flow.bulk(150)
        at_once(*[machine.end_publisher for machine in team.emitters])
    flow.hooks(6)
    flow.check()


def test_the_monitor_starts_a_publisher_for_what_lies_in_the_spool(team: RedisTeam) -> None:
    watcher = team.monitors[0]
    watcher.end_publisher()
    watcher.spool("left", "left-over")
    for monitor in team.monitors:
        eventually(lambda monitor=monitor: monitor.has("left-over", 1), 30, "what was left over")
    assert watcher.arrivals("left-over") == {"watcher0": ["left"]}
    assert watcher.get("/api/status")["publisher"]["running"] is True


# Reasons ----------------------------------------------------------------------------------------------------------
#
# One machine for each thing that can be wrong, all started at once; the tests below look at what each of them says.

REDIS_PASSWORD = "correct-horse-battery-9217"
REDIS_WRONG_PASSWORD = "wrong-staple-4711"


@dataclasses.dataclass(frozen=True)
class RedisFault:
    """What is wrong, as a machine's configuration, and the words that its reason must and must not have."""

    words: str
    config: dict[str, Any]


def redis_faults(make: Any) -> dict[str, RedisFault]:
    """Make the servers; return name → fault."""
    certificates, strange, elsewhere = (
        RedisCertificates.make(make(Folder).path),
        RedisCertificates.make(make(Folder).path),
        RedisCertificates.make(make(Folder).path, "DNS:redis.example"),
    )
    plain, locked = make(RedisServer), make(RedisServer, password=REDIS_PASSWORD)
    ruled = make(
        RedisServer,
        "user default on nopass ~* &* +@all",
        f"user nothing on >{REDIS_PASSWORD} resetchannels +ping",
        f"user elsewhere on >{REDIS_PASSWORD} ~other &other +@all",
    )
    tls = make(RedisServer, certificates=certificates)
    tls_elsewhere = make(RedisServer, certificates=elsewhere)
    tls_asking = make(RedisServer, "tls-auth-clients yes", certificates=certificates)
    replica = make(RedisServer, f"replicaof 127.0.0.1 {plain.port}")

    def with_password(server: RedisServer, **more: Any) -> dict[str, Any]:
        return server.settings(password=REDIS_PASSWORD, **more)

    return {
        "wrong password": RedisFault("password", locked.settings(password=REDIS_WRONG_PASSWORD)),
        "no password": RedisFault("password", locked.settings()),
        "wrong user": RedisFault("user|password", with_password(ruled, username="nobody")),
        "no rights": RedisFault("right|permission|NOPERM", with_password(ruled, username="nothing")),
        "another channel": RedisFault("channel|NOPERM", with_password(ruled, username="elsewhere")),
        "nobody listens": RedisFault(
            "nothing answers", {"mode": "redis", "redis": {"port": redis_free_port()}}
        ),
        "no such host": RedisFault("host|name", plain.settings(host="no-such-host.invalid")),
        "no such socket": RedisFault("/nowhere/redis.sock", plain.settings(url="unix:///nowhere/redis.sock")),
        "TLS to a plain port": RedisFault("TLS", plain.settings(tls=True)),
        "plain to a TLS port": RedisFault("TLS", tls.settings(tls=False)),
        "unknown authority": RedisFault("certificate|caFile", tls.settings(caFile=strange.path("ca.crt"))),
        "another host's certificate": RedisFault("certificate|host name", tls_elsewhere.settings()),
        "no client certificate": RedisFault("certFile|client certificate", tls_asking.settings()),
        "no CA file": RedisFault("/nowhere/ca.crt", tls.settings(caFile="/nowhere/ca.crt")),
        "read-only replica": RedisFault("replica|read-only", replica.settings()),
        "no such database": RedisFault("db|database", plain.settings(db=99)),
    }


@dataclasses.dataclass
class Folder:
    """A directory that is removed at the end."""

    path: str = dataclasses.field(default_factory=new_home)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class RedisComplaint:
    """What one machine with a fault says; `words`: "monitor" or "publisher" → its sentence."""

    machine: RedisMachine
    fault: RedisFault
    words: dict[str, str]


@pytest.fixture(scope="module")
def redis_complaints() -> Iterator[dict[str, RedisComplaint]]:
    """Let every fault happen, all at the same time."""
    with redis_parts() as maker:
        faults = redis_faults(maker)
        machines = {name: maker(RedisMachine, config=fault.config) for name, fault in faults.items()}

        def complain(name: str) -> RedisComplaint:
            machine = machines[name]
            machine.spool("kept")
            machine.start()  # and that starts a publisher for what lies in the spool

            def publishers_words() -> str:
                told = machine.publisher()
                return str(told.get("reason") or told.get("streamReason") or "")

            words = {"publisher": eventually(publishers_words, 60, name + ": publisher")}
            if name != "read-only replica":  # one can listen to it
                words["monitor"] = eventually(lambda: machine.redis()["reason"], 60, name + ": monitor")
                assert machine.redis()["state"] in ("waiting", "connecting", "given_up")
            return RedisComplaint(machine, faults[name], words)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            yield dict(zip(machines, pool.map(complain, machines)))


REDIS_FAULT_NAMES = [
    "wrong password", "no password", "wrong user", "no rights", "another channel", "nobody listens", "no such host",
    "no such socket", "TLS to a plain port", "plain to a TLS port", "unknown authority",
    "another host's certificate", "no client certificate", "no CA file", "read-only replica", "no such database",
]  # fmt: skip


@pytest.mark.parametrize("name", REDIS_FAULT_NAMES)
def test_every_fault_has_its_own_clear_sentence(
    redis_complaints: dict[str, RedisComplaint], name: str
) -> None:
    assert set(redis_complaints) == set(REDIS_FAULT_NAMES)
    complaint = redis_complaints[name]
    for who, sentence in complaint.words.items():
        assert re.search(complaint.fault.words, sentence, re.I), (who, sentence)
        assert len(sentence) < 300 and "\n" not in sentence
        assert not re.search(r"Traceback|Error\(|Errno|None|<class|_ssl\.c", sentence), (who, sentence)
        others = {other: told.words.get(who) for other, told in redis_complaints.items() if other != name}
        assert sentence not in others.values(), (who, sentence)


def test_no_password_is_told_anywhere(redis_complaints: dict[str, RedisComplaint]) -> None:
    machines = [
        told.machine for told in redis_complaints.values() if "password" in told.machine.config["redis"]
    ]
    assert len(machines) == 4
    for machine in machines:
        said = [
            json.dumps(machine.get("/api/config")), json.dumps(machine.get("/api/status")),
            machine.command("status", check=False).stdout, json.dumps(machine.sessions()),
        ]  # fmt: skip
        for folder, _, names in os.walk(machine.home):
            for name in names:
                path = os.path.join(folder, name)
                if name != "monitor.config.json" and stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "rb") as file:
                        said.append(file.read().decode("utf-8", "replace"))
        for pid in [machine.pid, *machine.publishers()]:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                said.append(file.read().decode())
        for text in said:
            assert REDIS_PASSWORD not in text and REDIS_WRONG_PASSWORD not in text
    assert any(machine.publishers() for machine in machines)


def test_an_event_that_redis_does_not_take_stays_in_the_spool(
    redis_complaints: dict[str, RedisComplaint],
) -> None:
    for name, complaint in redis_complaints.items():
        if name == "read-only replica":  # its monitor has got it by the channel
            assert complaint.machine.arrivals() == {"testbox": ["kept"]}
            continue
        (kept,) = hook_spooled(complaint.machine.home)
        assert kept["hook"]["tool_use_id"] == "kept"


# Ways to a Redis --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RedisWay:
    """How a machine is told to reach a server, the server, and where the events must be then."""

    redis: Any  # server, certificates → keys of the section `redis`
    tls: bool = False
    password: str = ""
    lines: tuple[str, ...] = ()
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    database: str = "0"
    channel: str = REDIS_CHANNEL
    has_stream: bool = True


REDIS_WAYS = {
    "TLS, a password, a database": RedisWay(
        lambda server, _: {"host": "localhost", "password": REDIS_PASSWORD, "db": 5},
        tls=True, password=REDIS_PASSWORD, database="5",
    ),
    "TLS without verification": RedisWay(lambda server, _: {"caFile": None, "verify": False}, tls=True),
    "a client certificate": RedisWay(
        lambda server, made: {"certFile": made.path("client.crt"), "keyFile": made.path("client.key")},
        tls=True, lines=("tls-auth-clients yes",),
    ),
    "a user, the password from the environment": RedisWay(
        lambda server, _: {"username": "team", "password": "not this one"},
        password="of-the-default-user", lines=(f"user team on >{REDIS_PASSWORD} ~* &* +@all",),
        environment={"CONTEXTUATE_REDIS_PASSWORD": REDIS_PASSWORD},
    ),
    "a url, another channel": RedisWay(
        lambda server, _: {"url": f"redis://:{REDIS_PASSWORD}@127.0.0.1:{server.port}/3", "channel": "other:channel"},
        password=REDIS_PASSWORD, database="3", channel="other:channel",
    ),
    "a url with TLS": RedisWay(
        lambda server, _: {"tls": False, "url": f"rediss://default:{REDIS_PASSWORD}@localhost:{server.port}/0"},
        tls=True, password=REDIS_PASSWORD,
    ),
    "a url of a socket, no stream": RedisWay(
        lambda server, _: {"url": f"unix://{server.socket_path}", "streamMaxLength": 0}, has_stream=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REDIS_WAYS)
def test_every_way_to_a_redis_works(make: Any, redis_certificates: RedisCertificates, name: str) -> None:
    way = REDIS_WAYS[name]
    server = make(
        RedisServer, *way.lines, password=way.password, certificates=redis_certificates if way.tls else None
    )
    config = server.settings(**way.redis(server, redis_certificates))
    machine = make(RedisMachine, config=config, more_environment=way.environment)
    machine.start()
    about = machine.wait_until("connected")
    machine.say("there")
    eventually(lambda: machine.has("s1", 1), 30, "the event through Redis")
    assert machine.arrivals() == {"testbox": ["there"]}
    assert (about["tls"], about["channel"]) == (way.tls, way.channel)
    assert about["stream"] == (f"{way.channel}:stream" if way.has_stream else None)
    assert about["streamState"] == ("ok" if way.has_stream else "off")
    assert server.cli("-n", way.database, "EXISTS", f"{way.channel}:stream") == str(int(way.has_stream))
    told = json.dumps([machine.get("/api/config"), machine.get("/api/status")])
    assert REDIS_PASSWORD not in told and "not this one" not in told


@pytest.fixture(scope="module")
def redis_certificates() -> Iterator[RedisCertificates]:
    folder = Folder()
    yield RedisCertificates.make(folder.path)
    folder.remove()


def test_the_set_up_of_the_readme_works_as_it_stands(make: Any) -> None:
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        blocks = re.findall(r"^```\w*\n(.*?)^```", file.read(), re.S | re.M)
    folder, port = make(Folder).path, redis_free_port()

    def block(words: str) -> str:
        (found,) = [text for text in blocks if words in text]
        for theirs, ours in (
            ("redis.example.org", "localhost"), ("/etc/redis", folder), ("6380", str(port)), ("~/.contextuate", folder)
        ):  # fmt: skip
            found = found.replace(theirs, ours)
        return found

    subprocess.run(["/bin/sh", "-e", "-c", block("openssl req")], cwd=folder, check=True, capture_output=True)
    users = block("user emitter on")
    with open(folder + "/users.acl", "w", encoding="ascii") as file:
        file.write(users)
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
        eventually(lambda machine=machine: machine.has("s1", 3), 30, "all three events")
        assert machine.arrivals() == {"emitter": ["early", "late"], "both": ["own"]}
        about = machine.redis()
        assert (about["tls"], about["streamState"], about["streamReason"]) == (True, "ok", None)
    for machine in (emitter, both):
        told = machine.publisher()
        assert (told["stream"], told["channelState"]) == ("ok", "ok")
    strict = ssl.create_default_context(cafile=folder + "/ca.crt")
    strict.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 and newer do by themselves
    with socket.create_connection(("localhost", port)) as sock:
        strict.wrap_socket(sock, server_hostname="localhost").close()


# A Redis that is no Redis -----------------------------------------------------------------------------------------


class StubbornServer:
    """A TCP server that accepts and never answers as Redis would.

    `manner`: "silent" says nothing, "drip" sends a byte of an endless answer now and then, "half" begins the
    first answer and stops, "deaf" does not even accept: its queue is full, so that further SYNs are dropped.
    """

    def __init__(self, manner: str) -> None:
        self.manner = manner
        self.port = redis_free_port()
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", self.port))
        self.listener.listen(0 if manner == "deaf" else 16)
        self.connections: list[socket.socket] = []
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._fill if manner == "deaf" else self._serve)
        self.thread.start()

    def _fill(self) -> None:
        while not self.stopping.wait(0.05):  # until nothing more fits, and again when one has timed out
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self.connections.append(sock)
            if len(self.connections) > 40:
                self.stopping.wait()

    def _serve(self) -> None:
        self.listener.settimeout(0.1)
        while not self.stopping.is_set():
            with contextlib.suppress(OSError):
                self.connections.append(self.listener.accept()[0])
                if self.manner != "silent":
                    self.connections[-1].sendall({"drip": b"$100000\r\n", "half": b"+O"}[self.manner])
            if self.manner == "drip":
                for sock in self.connections:
                    with contextlib.suppress(OSError):
                        sock.send(b"x")

    def remove(self) -> None:
        """Close everything; the port is free afterwards."""
        self.stopping.set()
        self.thread.join()
        for sock in (self.listener, *self.connections):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


def redis_suffer(make: Any, manner: str) -> None:
    """Start a monitor and a hook against a stubborn server; both notice, and go on when there is a Redis."""
    stubborn = make(StubbornServer, manner)
    redis = {"host": "127.0.0.1", "port": stubborn.port, "password": "p", "maxRetries": None}
    machine = make(RedisMachine, config={"mode": "redis", "redis": redis}, machine_id=manner)
    machine.start()
    machine.say("first")
    eventually(lambda: machine.redis()["attempt"] >= 1, 40, manner + ": the monitor notices")
    eventually(lambda: machine.publisher().get("reason"), 40, manner + ": the publisher notices")
    assert machine.publisher()["state"] in ("waiting", "connecting")
    for sentence in (machine.redis()["reason"], machine.publisher()["reason"]):
        assert re.search(r"answer|time|reach", sentence), (manner, sentence)
    machine.say("second")
    os.kill(machine.pid, signal.SIGTERM)
    eventually(lambda: not alive(machine.pid), 15, manner + ": SIGTERM ends the monitor")
    machine.start()
    stubborn.remove()
    make(RedisServer, password="p", port=stubborn.port)
    os.kill(machine.pid, signal.SIGHUP)
    eventually(lambda: machine.has("s1", 2), 60, manner + ": both events once there is a Redis")
    assert machine.arrivals() == {manner: ["first", "second"]}


def redis_fall_silent(make: Any) -> None:
    """Freeze a Redis under a monitor that is connected; it notices by itself, and comes back by itself."""
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings()).start()
    machine.wait_until("connected")
    server.freeze()
    told = eventually(
        lambda: (about := machine.redis())["state"] != "connected" and about, 60, "the silence noticed"
    )
    assert told["reason"]
    server.thaw()
    machine.wait_until("connected")
    machine.say("after")
    eventually(lambda: machine.has("s1", 1), 30)


def test_a_server_that_does_not_answer_holds_nobody_and_costs_no_event(make: Any) -> None:
    manners = ("silent", "drip", "half", "deaf")
    sufferings = [functools.partial(redis_suffer, make, manner) for manner in manners]
    at_once(*sufferings, functools.partial(redis_fall_silent, make))


# Giving up, and coming back ---------------------------------------------------------------------------------------


def test_after_its_attempts_the_monitor_gives_up_until_somebody_asks(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings(maxRetries=2))
    machine.start().wait_until("connected")
    client = machine.websocket("rows")

    def ask() -> None:
        assert client.ask("status", type="reconnect_redis")["redis"]["state"] in ("connecting", "connected")

    def hang_up() -> None:
        os.kill(machine.pid, signal.SIGHUP)

    def restart() -> None:
        client.close()
        machine.command("restart", "--no-open")
        with open(machine.home + "/monitor.run.json", encoding="utf-8") as file:
            machine.about = json.load(file)

    for number, come_back in enumerate((ask, hang_up, restart)):
        server.stop()
        told = machine.wait_until("given_up")
        assert (told["maxRetries"], told["nextAttemptAt"]) == (2, None) and told["attempt"] >= 2
        assert told["reason"]
        assert machine.request("/health")[0] == 200
        machine.say(f"away-{number}")
        server.start()
        assert machine.redis()["state"] == "given_up"
        come_back()
        machine.wait_until("connected")
        eventually(lambda number=number: machine.has("s1", number + 1), 60, "the events of meanwhile")
    assert machine.arrivals() == {"testbox": ["away-0", "away-1", "away-2"]}
    with open(machine.home + "/monitor.log", encoding="utf-8") as file:
        log = file.read()
    assert re.search(r"gives? up|gave up|given up", log)


def test_asking_for_redis_in_local_mode_is_an_error(running: RunningMonitor) -> None:
    client = running.websocket("rows")
    assert "redis" in json.dumps(client.ask("error", type="reconnect_redis")).lower()
    client.close()
    status = running.get("/api/status")
    assert (status["redis"], status["publisher"]) == (None, None)


def test_a_monitor_starts_though_redis_is_down_and_connects_when_it_comes(make: Any) -> None:
    server = make(RedisServer)
    server.stop()
    machine = make(RedisMachine, config=server.settings()).start()
    machine.say("early")
    eventually(lambda: machine.redis()["attempt"] >= 2 and machine.redis()["nextAttemptAt"])
    server.start()
    machine.wait_until("connected")
    eventually(lambda: machine.has("s1", 1), 60)
    assert machine.arrivals() == {"testbox": ["early"]}


def test_back_in_local_mode_the_monitor_takes_what_was_not_published(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    machine.start().wait_until("connected")
    machine.say("published")
    eventually(lambda: machine.has("s1", 1))
    server.stop()
    for number in range(20):
        machine.say(f"kept-{number}")
    machine.stop()
    machine.config = {"mode": "local"}
    machine.write_config({})
    machine.start()
    machine.say("local")
    eventually(lambda: machine.has("s1", 22), 60, "all of them")
    server.start()
    eventually(lambda: not machine.publishers() or machine.spooled() == 0)
    markers = machine.arrivals()["testbox"]
    assert sorted(markers) == sorted(["published", "local", *(f"kept-{number}" for number in range(20))])
    assert [marker for marker in markers if marker.startswith("kept")] == [
        f"kept-{number}" for number in range(20)
    ]
    machine.stop()
    machine.config = server.settings()
    machine.write_config({})
    machine.start().wait_until("connected")
    machine.say("again")
    eventually(lambda: machine.has("s1", 23), 60)
    assert sorted(machine.arrivals()["testbox"]) == sorted([*markers, "again"])


def test_the_monitor_remembers_its_place_in_the_stream(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    for number in range(5):
        machine.spool(str(number))
    machine.say("5")
    eventually(lambda: not machine.spooled())
    machine.start()
    eventually(lambda: machine.has("s1", 6) and machine.redis()["position"])
    machine.stop()
    machine.spool("6")
    machine.say("7")
    eventually(lambda: not machine.spooled())
    machine.start()
    eventually(lambda: machine.has("s1", 8))
    about = machine.wait_until("connected")
    assert (about["fromStream"], about["gaps"]) == (2, 0)
    assert machine.get("/api/status")["events"]["duplicates"] == 0


def test_what_the_stream_no_longer_has_is_told_as_a_gap(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings(streamMaxLength=100))
    machine.say("before")
    machine.start()
    eventually(lambda: machine.has("s1", 1) and machine.redis()["position"])
    machine.stop()
    for number in range(600):
        machine.spool(f"n{number}")
    machine.say("last")
    eventually(lambda: not machine.spooled(), 30)
    kept = len(server.streamed())
    assert 100 <= kept < 601
    machine.start()
    eventually(lambda: machine.has("s1", 1 + kept), 30)
    assert machine.wait_until("connected")["gaps"] == 1
    assert machine.arrivals()["testbox"][-1] == "last"


def test_debug_tells_how_many_monitors_got_it(team: RedisTeam) -> None:
    machine = team.emitters[0]
    told = hook_call(machine.hook, payload("Stop", "debug"), machine.environment, CONTEXTUATE_DEBUG="1")
    assert "mode redis" in told and re.search(r"\b2 (subscribers|monitors)", told), told


def test_without_the_publishers_python_no_event_is_lost_and_the_log_says_why(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    machine.say("first")
    eventually(lambda: len(server.streamed()) == 1 and not ee.spool_segments(machine.home + "/spool"))
    machine.end_publisher()
    with open(machine.home + "/hooks/publisher-python", "w", encoding="ascii") as file:
        file.write("/nowhere/python\n")
    machine.say("second")
    assert [line["hook"]["tool_use_id"] for line in hook_spooled(machine.home)] == ["second"]
    with open(machine.home + "/emit.log", encoding="utf-8") as file:
        assert "/nowhere/python" in file.read()
    machine.installed_command()  # with a Python that is there
    machine.say("third")
    eventually(lambda: len(server.streamed()) == 3)
    told = [json.loads(event)["data"]["toolUseId"] for event in server.streamed()]
    assert told == ["first", "second", "third"]


@needs_root
def test_a_full_disk_at_a_monitor_loses_nothing_that_redis_brings(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    events = machine.home + "/events"
    os.mkdir(events, 0o700)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", events], check=False).returncode:
        pytest.skip("mounting is not permitted")
    try:
        machine.start().wait_until("connected")
        for number in range(40):
            machine.spool(str(number), tool_name="Write", tool_input={"content": "x" * 50_000})
        machine.say("40")
        status = eventually(lambda: (told := machine.get("/api/status"))["store"]["error"] and told)
        assert status["store"]["ok"] is False and status["redis"]["state"] == "connected"
        stored = machine.stored_events_allowing_a_torn_line  # it is being written
        assert 0 < len(stored()) < 41
        subprocess.run(["mount", "-o", "remount,size=64m", events], check=True)
        eventually(lambda: len(stored()) == 41, 30, "the rest")
        assert machine.arrivals() == {"testbox": [str(number) for number in range(41)]}
        machine.kill()
    finally:
        if alive(machine.pid):
            machine.kill()
        machine.end_publisher()
        unmount(events)


def test_a_publisher_without_redis_py_goes_on_in_the_python_that_install_finds(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    without = machine.home + "/python-without"
    with open(without, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec "{cm.base_interpreter()}" -S "$@"\n')
    os.chmod(without, 0o700)
    hook = machine.hook
    with open(machine.home + "/hooks/publisher-python", "w", encoding="utf-8") as file:
        file.write(without + "\n")
    hook_call(hook, payload("PreToolUse", tool_use_id="first"), machine.environment)
    eventually(lambda: "redis-py is missing" in str(machine.publisher().get("reason")))
    pid = machine.publisher()["pid"]
    assert not server.streamed()
    assert cm.record_publisher_python(machine.home)
    eventually(lambda: len(server.streamed()) == 1, 60, "by itself")
    assert machine.publisher()["pid"] == pid, "the lock went with it"


def test_what_to_do_without_redis_py_depends_on_whose_python_it_is(tmp_path: Any) -> None:
    python = tmp_path / "bin" / "python3"
    assert f"{python} -m pip install" in ee.redis_py_advice(str(python))
    library = tmp_path / "lib" / "python3.11"
    library.mkdir(parents=True)
    (library / "EXTERNALLY-MANAGED").write_text("")
    assert "apt install python3-redis" in ee.redis_py_advice(str(python))
    (tmp_path / "pyvenv.cfg").write_text("")
    assert f"{python} -m pip install" in ee.redis_py_advice(str(python))


def test_what_waited_in_the_stream_for_long_says_nothing_of_a_machines_clock(make: Any) -> None:
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings())
    for session, hours in (("days", 60), ("hours", 2)):
        at = cm.now_ms() - hours * 3_600_000
        for number in range(2):
            hook = payload("UserPromptSubmit", session, prompt="go")
            wrapped = {"hook": hook, "id": f"{session}{number}", "timestamp": at, "machineId": session}
            event = ee.encode_json(ee.build_event(wrapped, at, session)).decode()
            server.cli("XADD", "contextuate:events:stream", f"{at}-{number + 1}", "event", event)
    machine.start()
    eventually(lambda: machine.has("hours", 2) and machine.has("days", 2))
    eventually(
        lambda: [machine.sessions()[name]["state"] for name in ("days", "hours")] == ["ended", "quiet"]
    )


# The publisher's exit ---------------------------------------------------------------------------------------------

# Emits at moments around the exit of the publisher that the event before had started. A new publisher is a fork of
# this process, which has imported redis-py already: 2,000 new interpreters would take minutes.
REDIS_RACER = """
import os, posix, random, signal, sys, time
root, home, rounds, seed = sys.argv[1:]
sys.path.insert(0, root)
import redis
import emit_event as ee
ee.PUBLISHER_QUIET_S, ee.BUSY_S, ee.IDLE_POLL_S = 0.005, 0.0, 0.001

class Forking:
    def __getattr__(self, name):
        return getattr(posix, name)

    def posix_spawn(self, python, arguments, environment, **_):
        pid = os.fork()
        if pid == 0:
            ee.run_publisher(int(arguments[-1]))
        return pid

ee.posix = Forking()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
dice = random.Random(seed)
started, wait_s = 0, ee.PUBLISHER_QUIET_S
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


def test_no_event_is_left_behind_around_the_publishers_exit(make: Any) -> None:
    server = make(RedisServer)
    workers, rounds = 6, 350
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
    started = sum(int(out) for out, _, _ in outcomes)
    total = workers * rounds
    assert total >= 2000 and total * 0.2 < started < total * 0.8, (
        started
    )  # it was met before and after its exit
    found = [json.loads(line)["id"] for line in server.streamed()]
    assert sorted(found) == sorted(f"racer{n}-{number}" for n in range(workers) for number in range(rounds))


REFUSED_WRITES = {
    # what is done to Redis → what the publisher says
    "a read-only replica": (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "READONLY"),
    "out of memory": (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "OOM"),
    "no right to add": (
        ("ACL", "SETUSER", "default", "-xadd"), ("ACL", "SETUSER", "default", "+xadd"), "NOPERM",
    ),
    "a key that is no stream": (
        ("SET", REDIS_STREAM, "x"), ("DEL", REDIS_STREAM), "WRONGTYPE",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("refuse", "permit", "reason"), REFUSED_WRITES.values(), ids=REFUSED_WRITES.keys())
def test_an_event_that_the_stream_refuses_stays_in_the_spool(make, refuse, permit, reason):
    server = make(RedisServer)
    machine = make(RedisMachine, config=server.settings()).serve()
    machine.wait_until("connected")
    server.cli(*refuse)
    machine.say("refused")
    eventually(lambda: reason in (machine.publisher().get("reason") or ""), what=reason)
    assert machine.publisher()["state"] == "waiting" and machine.spooled()
    server.cli(*permit)
    eventually(lambda: not machine.spooled(), 40, "an empty spool")
    assert ["refused" in event for event in server.streamed()] == [True]
    eventually(lambda: machine.has("s1", 1), 20)
    assert list(machine.arrivals().values()) == [["refused"]]


class RedisSentinels:
    """Three sentinels that watch one primary and its replicas, and fail over within seconds."""

    def __init__(self, primary: RedisServer) -> None:
        self.servers = []
        for _ in range(3):
            port, directory = redis_free_port(), new_home()
            with open(directory + "/sentinel.conf", "w", encoding="ascii") as file:
                file.write(
                    f"port {port}\nbind 127.0.0.1\ndir {directory}\nlogfile {directory}/log\n"
                    f"sentinel monitor team 127.0.0.1 {primary.port} 2\n"
                    "sentinel down-after-milliseconds team 700\nsentinel failover-timeout team 4000\n"
                )
            command = ["redis-server", directory + "/sentinel.conf", "--sentinel"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.servers.append((port, directory, process))
        eventually(
            lambda: all("num-other-sentinels\n2" in self.ask(at) for at in range(3)), 30, "the sentinels"
        )

    def ask(self, at: int) -> str:
        """Return what a sentinel says about the primary."""
        command = ["redis-cli", "-p", str(self.servers[at][0]), "SENTINEL", "MASTER", "team"]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout

    def settings(self) -> dict[str, Any]:
        """Return the configuration of a machine that asks them."""
        nodes = [f"127.0.0.1:{port}" for port, _, _ in self.servers]
        return {"mode": "redis", "redis": {"sentinels": nodes, "master": "team", "port": 1}}

    def remove(self) -> None:
        """End them and remove their directories."""
        for _, directory, process in self.servers:
            process.kill()
            process.wait()
            shutil.rmtree(directory)


class RedisCluster:
    """Three primaries with all slots between them, and a replica of the one that has the stream."""

    def __init__(self, make: Any) -> None:
        lines = ("cluster-enabled yes", "cluster-node-timeout 1000", "cluster-replica-validity-factor 0")
        self.servers = [make(RedisServer, *lines) for _ in range(4)]
        addresses = [f"127.0.0.1:{server.port}" for server in self.servers]
        self.cli("--cluster", "create", *addresses[:3], "--cluster-yes")
        eventually(lambda: "cluster_state:ok" in self.servers[0].cli("CLUSTER", "INFO"), 30, "the cluster")
        slot = int(self.servers[0].cli("CLUSTER", "KEYSLOT", REDIS_STREAM))
        self.primary = self.servers[slot * 3 // 16384]
        self.replica = self.servers[3]
        primary_id = self.primary.cli("CLUSTER", "MYID")
        self.cli(
            "--cluster",
            "add-node",
            addresses[3],
            addresses[0],
            "--cluster-slave",
            "--cluster-master-id",
            primary_id,
        )
        eventually(
            lambda: "master_link_status:up" in self.replica.cli("INFO", "replication"), 30, "the replica"
        )
        eventually(
            lambda: all("slave" in it.cli("CLUSTER", "NODES") for it in self.servers), 30, "the news of it"
        )

    @staticmethod
    def cli(*arguments: str) -> None:
        """Run redis-cli without a server of its own."""
        subprocess.run(["redis-cli", *arguments], check=True, capture_output=True, timeout=60)

    def settings(self) -> dict[str, Any]:
        """Return the configuration of a machine that uses it."""
        return {"mode": "redis", "redis": {"cluster": [f"127.0.0.1:{it.port}" for it in self.servers[:3]]}}


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
def test_a_failover_loses_and_doubles_no_event(make, kind):
    if kind == "sentinels":
        primary = make(RedisServer)
        replicas = [make(RedisServer, f"replicaof 127.0.0.1 {primary.port}") for _ in range(2)]
        eventually(lambda: "connected_slaves:2" in primary.cli("INFO", "replication"), 30, "the replicas")
        config = make(RedisSentinels, primary).settings()
    else:
        cluster = RedisCluster(make)
        primary, replicas, config = cluster.primary, [cluster.replica], cluster.settings()
    config["redis"]["maxRetries"] = None
    emitter, other = (make(RedisMachine, config=config, machine_id=name) for name in ("m1", "m2"))
    for machine in (emitter, other):
        machine.serve()
        machine.wait_until("connected")
    wanted = [f"t{number}" for number in range(120)]
    for number, marker in enumerate(wanted):
        if number == 40:
            primary.kill()
        emitter.say(marker)
    eventually(
        lambda: any("role:master" in it.cli("INFO", "replication") for it in replicas), 30, "a primary"
    )
    eventually(lambda: not emitter.spooled(), 60, "an empty spool")
    for machine in (emitter, other):
        eventually(lambda machine=machine: machine.has("s1", len(wanted)), 60, machine.machine_id)
        (stored,) = machine.arrivals().values()
        assert (len(stored), set(stored)) == (len(wanted), set(wanted))
    primary.start()  # it comes back as a replica, which takes no events
    emitter.say("after")
    for machine in (emitter, other):
        eventually(lambda machine=machine: machine.has("s1", len(wanted) + 1), 60, machine.machine_id)
    assert "ok" in emitter.command("doctor").stdout


# ---------------------------------------------------------------------------
# Safe and unbreakable: strangers, other users, hostile bytes, and bad days for disks, clocks and processes
#
# What other rooms test of this stands there: Host, Origin, token and paths in the room of the protocol, kills and
# full disks in the room of processes.
# ---------------------------------------------------------------------------

# Runs as another user of the machine and tells what it gets, one JSON object.
SAFE_STRANGER = """
import encodings.idna, http.client, json, os, socket, sys
job = json.loads(sys.argv[1])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def request(port, method, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body=job["body"] if method == "POST" else None, headers=headers)
    response = connection.getresponse()
    body = response.read() if response.status != 101 else b""
    return [response.status, any(word in body.decode() for word in ("precious", "testbox"))]
upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13",
           "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
bearer = {"Authorization": "Bearer " + job["token"]}
origin = {"Origin": f"http://127.0.0.1:{job['port']}"}
told = {
    "page": request(job["port"], "GET", "/"), "api": request(job["port"], "GET", "/api/events"),
    "post": request(job["port"], "POST", "/api/hooks", **origin),
    "websocket": request(job["wsPort"], "GET", "/", **upgrade),
    "websocket of the page": request(job["wsPort"], "GET", "/", **upgrade, **origin),
    "api with token": request(job["port"], "GET", "/api/events", **bearer),
    "websocket with token": request(job["wsPort"], "GET", "/", **upgrade, **bearer),
}
hook = socket.socket(socket.AF_UNIX)
hook.settimeout(20)
try:
    hook.connect(job["socket"])
    hook.sendall(job["body"].encode() + b"\\n")
    told["socket"] = hook.recv(1).hex()
except OSError as error:
    told["socket"] = type(error).__name__
for path in job["files"]:
    try:
        open(path, "rb").read()
        told[path] = "read"
    except OSError as error:
        told[path] = type(error).__name__
print(json.dumps(told))
"""


def safe_stranger(monitor: RunningMonitor, **more: Any) -> dict[str, Any]:
    """Let another user of this machine try everything; return what it got."""
    with open(monitor.home + "/token", encoding="ascii") as file:
        token = file.read().strip()
    body = json.dumps(payload("Stop", "stranger"))
    job = {"port": monitor.port, "wsPort": monitor.ws_port, "token": token, "socket": monitor.socket_path,
           "body": body, "files": [], **more}  # fmt: skip
    done = subprocess.run(
        [PYTHON, "-I", "-c", SAFE_STRANGER, json.dumps(job)],
        cwd="/", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/net/tcp")
def test_another_user_of_the_machine_gets_nothing_without_the_token(running: RunningMonitor) -> None:
    running.emit(payload("UserPromptSubmit", prompt="precious"))
    run_hook(running.installed_command(), json.dumps(payload("Stop")).encode(), running.environment)
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(running.home) for name in names]
    paths = [path for path in paths if "/claude" not in path and not path.endswith(".sock")]
    for mode in (
        0o700,
        0o777,
    ):  # our directory keeps others out; so does every file in it, should it stand open
        for folder, folders, _ in os.walk(running.home):
            for name in ("", *folders):
                os.chmod(os.path.join(folder, name), mode)
        told = safe_stranger(running, files=paths)
        for asked in ("page", "api", "post", "websocket", "websocket of the page"):
            assert told[asked] == [401, False], (mode, asked)
        assert told["api with token"] == [200, True]
        assert told["websocket with token"] == [101, False]
        assert told["socket"] == "PermissionError"
        config = running.home + "/monitor.config.json"
        read = [path for path in paths if told[path] == "read" and "__pycache__" not in path]
        assert [path for path in read if path != config] == []
    os.chmod(running.socket_path, 0o777)  # and if the socket stood open, its user would still be looked at
    assert safe_stranger(running)["socket"] in ("", "ConnectionResetError", "BrokenPipeError")
    assert "stranger" not in running.sessions()


def test_tokens_are_compared_in_constant_time_only(monkeypatch: Any) -> None:
    compared = []
    real = cm.hmac.compare_digest
    monkeypatch.setattr(cm.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    access = cm.Access("token", "t" * 32, [], [])
    ways = ((("authorization", "Bearer {}"),), (("cookie", "a=b; contextuate_token_0={}"),))
    for candidate, good in (
        ("t" * 32, True),
        ("t" * 31 + "u", False),
        ("u" * 32, False),
        ("", False),
        ("é", False),
    ):
        for headers in ways:
            request = cm.Request(
                "GET", "/", tuple((name, value.format(candidate)) for name, value in headers)
            )
            before = len(compared)
            assert access.has_token(request) is good
            assert compared[before:] == [(candidate.encode(), b"t" * 32)]


def test_a_body_that_drips_in_is_cut_off(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "BODY_DEADLINE_S", 0.3)
    with protocol_inside() as inside:
        head = protocol_get(
            f"127.0.0.1:{inside.port}", f"Origin: http://127.0.0.1:{inside.port}", "Content-Length: 9000000",
            path="/api/hooks", method="POST",
        )  # fmt: skip
        assert b" 200 " not in protocol_drip(inside.port, head)
        assert inside.loop.call(lambda: inside.ingest.counts["stored"]) == 0


def test_another_sites_preflight_and_simple_post_change_nothing(spoken: RunningMonitor) -> None:
    host = f"127.0.0.1:{spoken.port}"
    seq = spoken.get("/api/status")["seq"]
    body = json.dumps(payload("Stop", "csrf"))
    for method, *more in (
        ("OPTIONS", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"),
        ("OPTIONS", "Access-Control-Request-Private-Network: true"),
        ("POST", "Content-Type: text/plain"), ("POST", "Content-Type: application/x-www-form-urlencoded"),
        ("PUT",), ("DELETE",), ("PATCH",),
    ):  # fmt: skip
        for origin in ("https://evil.example", "null", f"http://evil.example:{spoken.port}"):
            length = f"Content-Length: {len(body)}"
            head = protocol_get(host, f"Origin: {origin}", length, *more, path="/api/hooks", method=method)
            status, headers, _ = protocol_exchange(spoken.port, head + body.encode())
            assert status == 403
            assert not [name for name, _ in headers if name.startswith("access-control")]
    assert spoken.get("/api/status")["seq"] == seq


@pytest.mark.parametrize("method", ["OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "HEAD"])
def test_no_other_method_does_anything_even_for_the_page_itself(spoken: RunningMonitor, method: str) -> None:
    host, origin = f"127.0.0.1:{spoken.port}", f"Origin: http://127.0.0.1:{spoken.port}"
    for path in ("/", "/api/hooks", "/api/sessions/x"):
        status, _, body = protocol_exchange(
            spoken.port, protocol_get(host, origin, path=path, method=method), method
        )
        assert status in ((405, 404) if method != "HEAD" else (200, 405, 404))
        assert b"Origin" not in body  # TRACE would give it back
    head = protocol_head(("Host", f"127.0.0.1:{spoken.ws_port}"), line=f"{method} / HTTP/1.1")
    assert protocol_exchange(spoken.ws_port, head + b"\r\n\r\n", method)[0] == 405


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/", "http://evil.example/", "*", "evil", "?x", "ws://a/"]
)
def test_the_websocket_port_takes_paths_only(spoken: RunningMonitor, target: str) -> None:
    head = protocol_head(("Host", f"127.0.0.1:{spoken.ws_port}"), line=f"GET {target} HTTP/1.1")
    assert protocol_exchange(spoken.ws_port, head + b"\r\n\r\n")[0] == 400


def test_behind_a_proxy_everybody_needs_the_token(monitor: RunningMonitor) -> None:
    monitor.write_config({"server": {"auth": "token", "allowedHosts": ["monitor.example"]}})
    monitor.start()
    with open(monitor.home + "/token", encoding="ascii") as file:
        token = file.read().strip()
    origin = "Origin: https://monitor.example"
    page, sockets = "monitor.example", f"monitor.example:{monitor.ws_port}"
    for port, build, host in (
        (monitor.port, protocol_get, page),
        (monitor.ws_port, protocol_upgrade, sockets),
    ):
        assert protocol_exchange(port, build(host, origin))[0] == 401
    status, headers, _ = protocol_exchange(monitor.port, protocol_get(page, path=f"/?token={token}"))
    cookie = "Cookie: " + dict(headers)["set-cookie"].partition(";")[0]
    assert status == 303
    status, headers, _ = protocol_exchange(monitor.port, protocol_get(page, cookie, path="/"))
    assert status == 200
    assert f"wss://monitor.example:{monitor.ws_port}" in dict(headers)["content-security-policy"]
    assert protocol_exchange(monitor.ws_port, protocol_upgrade(sockets, origin, cookie))[0] == 101
    assert (
        protocol_exchange(monitor.ws_port, protocol_upgrade(sockets, "Origin: https://evil.example", cookie))[
            0
        ]
        == 403
    )


def test_every_line_of_the_readmes_list_names_tests_that_exist() -> None:
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        listed = file.read().partition("### What was tried")[2].partition("\n## ")[0]
    lines = [line for line in listed.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 20
    for line in lines:
        names = re.findall(r"`(test_\w+)`", line)
        assert names and [name for name in names if name not in globals()] == [], line


# -- files and sockets ----------------------------------------------------------


def safe_open_modes(home: str, until: threading.Event) -> set[str]:
    """Return what of ours was ever open to others, looking without a pause until told to stop."""
    seen = set()
    while not until.is_set():
        for folder, folders, names in os.walk(home):
            for name in (*folders, *names):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    if os.lstat(path).st_mode & 0o077:
                        seen.add(re.sub(r"[0-9a-f]{8,}|\d+", "N", path[len(home) :]))
    return seen


def test_nothing_of_ours_is_open_to_others_at_any_moment_whatever_the_umask(monitor: RunningMonitor) -> None:
    done = threading.Event()
    command = monitor.installed_command()
    os.chmod(monitor.home + "/monitor.config.json", 0o600)
    shutil.rmtree(monitor.claude_home)
    line = json.dumps(payload("PreToolUse", tool_use_id="t", tool_input={})).encode()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        watch = pool.submit(safe_open_modes, monitor.home, done)
        mask = os.umask(0)
        try:
            run_hook(command, line, monitor.environment)  # into the spool
            monitor.start()
            run_hook(command, line, monitor.environment)
            monitor.command("test-event")
            monitor.stop()
            monitor.write_config({"mode": "redis", "redis": {"port": 1}})
            os.chmod(monitor.home + "/monitor.config.json", 0o600)
            run_hook(command, line, monitor.environment)  # with a publisher
            eventually(lambda: os.path.exists(monitor.home + "/publisher.json"))
        finally:
            os.umask(mask)
            done.set()
        seen = watch.result(30)
        pid = json.loads(open(monitor.home + "/publisher.json", "rb").read())["pid"]  # noqa: SIM115
        os.kill(pid, signal.SIGKILL)
    # the configuration is the user's own file; bytecode holds nothing but our program
    assert {path for path in seen if "__pycache__" not in path and "monitor.config.json" not in path} == set()


SAFE_FILES = (
    "monitor.log", "emit.log", "monitor.pid", "monitor.run.json", "hook.cache", "publisher.lock", "publisher.json",
    "usage.db", "index.db", "redis-position.json", "last-seq", "token", "quarantine.log", "spool/dropped.log",
    "hooks/publisher-python",
)  # fmt: skip


@pytest.mark.parametrize("name", [*SAFE_FILES, "spool", "events"])
def test_a_link_in_the_place_of_a_file_of_ours_is_never_written_through(
    monitor: RunningMonitor, name: str
) -> None:
    command = monitor.installed_command()
    with tempfile.TemporaryDirectory() as outside:
        victim = outside + "/victim"
        with open(victim, "w", encoding="utf-8") as file:
            file.write("precious")
        os.chmod(victim, 0o644)
        place = f"{monitor.home}/{name}"
        os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place)
        os.symlink(victim, place)
        monitor.write_config({"limits": {"fieldBytes": 2048}})
        run_hook(command, json.dumps(payload("Stop", "link")).encode(), monitor.environment)
        monitor.command("start", "--no-open", check=False)
        run_hook(command, json.dumps(payload("Stop", "link")).encode(), monitor.environment)
        run_hook(command, b"not json", monitor.environment)
        monitor.command("stop", check=False)
        with open(victim, encoding="utf-8") as file:
            assert file.read() == "precious"
        assert stat.S_IMODE(os.stat(victim).st_mode) == 0o644
        assert os.listdir(outside) == ["victim"]


@pytest.mark.parametrize("squatted", ["m.sock", "m.sock.lock"])
@pytest.mark.parametrize("kind", ["link", "broken link", "directory", "fifo", "another user's file"])
def test_who_squats_on_the_sockets_place_gets_neither_events_nor_files(
    monitor: RunningMonitor, squatted: str, kind: str
) -> None:
    if kind == "another user's file" and os.geteuid() != 0:
        pytest.skip("only root can make one")
    place = f"{monitor.home}/{squatted}"
    with tempfile.TemporaryDirectory() as outside:
        victim = outside + "/victim"
        with open(victim, "w", encoding="utf-8") as file:
            file.write("precious")
        if kind == "directory":
            os.mkdir(place)
        elif kind == "fifo":
            os.mkfifo(place)
        elif kind == "another user's file":
            with open(place, "w", encoding="utf-8"):
                os.chown(place, 65534, 65534)
        else:
            os.symlink(victim if kind == "link" else outside + "/none", place)
        refused = monitor.command("start", "--no-open", check=False)
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()) == 1 and monitor.socket_path in refused.stderr
        run_hook(monitor.installed_command(), json.dumps(payload("Stop")).encode(), monitor.environment)
        assert len(hook_spooled(monitor.home)) == 1
        with open(victim, encoding="utf-8") as file:
            assert file.read() == "precious"
        assert os.listdir(outside) == ["victim"]


# -- WebSocket conformance ------------------------------------------------------


class SafeEcho(cm.ClientServer):
    """The monitor's own WebSocket side, which gives back what it gets."""

    def __init__(self, loop: cm.EventLoop, listener: socket.socket) -> None:
        super().__init__(
            loop, listener, lambda request, sock: None, lambda client: None, self._echo,
            connection_limit=64, queue_limit_bytes=1 << 20,
        )  # fmt: skip

    def _echo(self, client: cm.Client, text: str) -> None:
        self.answer(client, cm.encode_frame(cm.Opcode.TEXT, text.encode()))

    def _take_binary(self, client: cm.Client, data: bytes) -> None:
        self.answer(client, cm.encode_frame(cm.Opcode.BINARY, data))


def safe_serve_echo(listener: socket.socket) -> None:
    """Run the echo server."""
    loop = cm.EventLoop()
    SafeEcho(loop, listener)
    loop.run()


def safe_run_cases(port: int, **which: Any) -> dict[str, Any]:
    """Let the fuzzing client run cases against a server; return their results by number."""
    kosoku = pytest.importorskip("kosoku", reason="kosoku is missing: python3 test_monitor.py --setup")
    try:
        results = asyncio.run(safe_awaited(kosoku.run_fuzzingclient(f"ws://127.0.0.1:{port}", **which)))
    except kosoku.FailureError as failure:
        results = failure.results
    return {result.case_id: result for result in results}


def safe_given_up_early(result: Any) -> bool:
    """Tell whether the client closed before the time was over that it says it gave the case.

    It (kosoku 0.1.0) does so now and then on a busy machine, whatever the server does.
    """
    allowed = re.search(r"not .* within (\d+) seconds", result.result)
    return allowed is not None and result.duration < int(allowed.group(1)) * 1000


def test_the_public_case_list_of_rfc_6455_passes_strictly() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener, serving(safe_serve_echo, listener):
        port = listener.getsockname()[1]
        # 12 and 13 are of compression, which is declined
        results = safe_run_cases(port, exclude_cases=["12.*", "13.*"], concurrency=4)
        assert len(results) == 301
        for _ in range(5):
            again = [case for case, result in results.items() if safe_given_up_early(result)]
            if again:
                results.update(safe_run_cases(port, cases=again))
    verdicts = {case: (str(result.behavior), str(result.behavior_close)) for case, result in results.items()}
    good = {("Behavior.OK", "BehaviorClose.OK"), ("Behavior.INFORMATIONAL", "BehaviorClose.INFORMATIONAL")}
    assert {case: verdict for case, verdict in verdicts.items() if verdict not in good} == {}


async def safe_awaited(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, 300)


def test_compression_is_declined_and_a_compressed_frame_is_an_error(spoken: RunningMonitor) -> None:
    peer = ProtocolPeer(spoken.ws_port)
    peer.send(protocol_raw_frame(0xC1, b"\x7a\x00\x00\x00"))
    assert protocol_close_code(peer.rest()) == 1002


def test_what_came_before_a_violation_is_answered_before_the_close_frame(spoken: RunningMonitor) -> None:
    for violation, code in ((b"\x83\x80abcd", 1002), (protocol_frame(1, b"\xff"), 1007), (b"\x81\x00", 1002)):
        peer = ProtocolPeer(spoken.ws_port)
        peer.next("hello")
        ask = protocol_frame(1, b'{"type":"get_sessions","requestId":7}')
        peer.send(ask + protocol_frame(9, b"mark") + ask + violation + ask + protocol_frame(9, b"never"))
        frames = peer.rest()
        assert [opcode for opcode, _ in frames] == [1, 10, 1, 8]
        assert frames[1][1] == b"mark" and json.loads(frames[0][1])["type"] == "sessions"
        assert protocol_close_code(frames) == code


def test_a_client_that_reads_slowly_gets_everything_in_order(running: RunningMonitor) -> None:
    peer = ProtocolPeer(running.ws_port, receive_bytes=4096)
    peer.next("hello")
    peer.say(type="subscribe", view="full")
    peer.next("subscribed")
    big = "x" * 2000
    running.emit(*(payload("UserPromptSubmit", prompt=f"{number} {big}") for number in range(200)))
    for number in range(200):
        event = json.loads(peer.next("event"))["event"]
        assert event["data"]["message"].startswith(f"{number} ")
        if number % 20 == 0:
            time.sleep(0.01)
    peer.close()


# -- clocks ---------------------------------------------------------------------

# Shifts the clock of a Python process by what stands in a file, at each look at it.
SAFE_CLOCK = """
import os, time
_real, _path = time.time_ns, os.environ["SAFE_CLOCK"]
def _now():
    try:
        with open(_path, encoding="ascii") as file:
            return _real() + int(file.read() or 0) * 1_000_000
    except (OSError, ValueError):
        return _real()
time.time_ns = _now
time.time = lambda: _now() / 1e9
"""


class SafeClockMonitor(RunningMonitor):
    """A monitor whose clock a test can set."""

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "SAFE_CLOCK": self.home + "/clock", "PYTHONPATH": self.home + "/site"}

    def set_clock(self, shift_ms: int) -> None:
        """Set the clock off by so much."""
        os.makedirs(self.home + "/site", exist_ok=True)
        with open(self.home + "/site/sitecustomize.py", "w", encoding="utf-8") as file:
            file.write(SAFE_CLOCK)
        ee.write_atomically(self.home + "/clock", str(shift_ms).encode())
        self.shift_ms = shift_ms

    def say(self, hook: str, **fields: Any) -> None:
        """Send one event as a hook of this clock does."""
        number = next(SAFE_NUMBERS)
        wrapped = {
            "id": f"safe-{number}", "timestamp": time.time_ns() // 1_000_000 + self.shift_ms, "machineId": "testbox",
            "hook": payload(hook, **fields),
        }  # fmt: skip
        self.emit(wrapped)

    def state(self) -> str:
        """Return the state of the one session."""
        return str(self.sessions()["s1"]["state"])


SAFE_NUMBERS = itertools.count()


@pytest.fixture
def clocked() -> Iterator[SafeClockMonitor]:
    """A running monitor with a clock of its own."""
    made = SafeClockMonitor(new_home())
    made.set_clock(0)
    yield made
    clean_up(made)


@pytest.mark.parametrize("step_ms", [-3_600_000, 3_600_000, -7_000, -20 * 3_600_000])
def test_a_clock_that_is_set_changes_no_state_and_loses_no_event(
    clocked: SafeClockMonitor, step_ms: int
) -> None:
    clocked.start()
    clocked.say("UserPromptSubmit", prompt="go")
    clocked.say("PreToolUse", tool_name="Bash", tool_use_id="a", tool_input={"command": "ls"})
    eventually(lambda: clocked.state() == "working")
    clocked.set_clock(step_ms)
    clocked.say("PostToolUse", tool_name="Bash", tool_use_id="a", tool_input={}, tool_response={})
    assert clocked.state() == "working"
    clocked.say("PermissionRequest", tool_name="Bash", tool_input={"command": "rm x"})
    assert clocked.state() == "waiting"
    clocked.say("PreToolUse", tool_name="Bash", tool_use_id="b", tool_input={"command": "rm x"})
    clocked.say("PostToolUse", tool_name="Bash", tool_use_id="b", tool_input={}, tool_response={})
    assert clocked.state() == "working"
    clocked.say("Stop", background_tasks=[])
    eventually(lambda: clocked.state() == "idle")
    session = clocked.sessions()["s1"]
    now_ms = time.time_ns() // 1_000_000 + step_ms
    assert session["stateSince"] <= now_ms + 1000 and session["openCalls"] == []
    before = clocked.stored_events()
    assert [event["seq"] for event in before] == list(range(1, 8))
    clocked.stop()
    clocked.start()
    again = clocked.sessions()["s1"]
    assert (again["state"], again["counts"]) == (session["state"], session["counts"])
    lines = clocked.get("/api/events?limit=100")["events"]
    assert [event["seq"] for event in lines] == [event["seq"] for event in before]


def test_midnight_passes_in_the_middle_of_a_session(clocked: SafeClockMonitor) -> None:
    day_ms = 24 * 3_600_000
    to_midnight_ms = day_ms - time.time_ns() // 1_000_000 % day_ms
    clocked.set_clock(to_midnight_ms - 60_000)
    clocked.start()
    clocked.say("UserPromptSubmit", prompt="go")
    clocked.say("PreToolUse", tool_name="Bash", tool_use_id="a", tool_input={"command": "ls"})
    clocked.set_clock(to_midnight_ms + 1_000)
    clocked.say("PostToolUse", tool_name="Bash", tool_use_id="a", tool_input={}, tool_response={})
    clocked.say("Stop", background_tasks=[])
    clocked.set_clock(to_midnight_ms - 60_000)  # and once more, because the clock was wrong
    clocked.say("UserPromptSubmit", prompt="again")
    clocked.set_clock(to_midnight_ms + 5_000)
    clocked.say("Stop", background_tasks=[])
    assert len(retention_days(clocked.home)) == 2
    for _ in range(2):
        pages = [clocked.get("/api/sessions/s1/events?limit=4")]
        pages.insert(0, clocked.get(f"/api/sessions/s1/events?limit=4&before={pages[0]['events'][0]['seq']}"))
        assert [event["seq"] for page in pages for event in page["events"]] == [1, 2, 3, 4, 5, 6]
        assert [event["seq"] for event in clocked.get("/api/events?limit=9")["events"]] == [1, 2, 3, 4, 5, 6]
        session = clocked.sessions()["s1"]
        assert session["state"] == "idle" and session["counts"]["prompts"] == 2
        clocked.stop()
        clocked.start()


# -- bad days -------------------------------------------------------------------


def safe_told(monitor: RunningMonitor, numbers: list[int]) -> list[int]:
    """Send one numbered event each on a connection of its own; return the numbers that were acknowledged."""
    acknowledged = []
    for number in numbers:
        event = {"hook_event_name": "UserPromptSubmit", "session_id": f"s{number % 3}", "prompt": str(number)}
        with contextlib.suppress(OSError), monitor.connect() as sock:
            sock.sendall(json.dumps(event).encode() + b"\n")
            if sock.recv(1) == ee.ACKNOWLEDGEMENT:
                acknowledged.append(number)
    return acknowledged


def safe_stored(monitor: RunningMonitor) -> list[int]:
    """Return the numbers of all stored events."""
    return sorted(int(event["data"]["message"]) for event in monitor.stored_events())


@contextlib.contextmanager
def safe_disk(monitor: RunningMonitor, size: str) -> Iterator[Any]:
    """Put the monitor's whole directory on a small disk of its own; give a function that remounts it."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", monitor.home], check=False
    ).returncode:
        pytest.skip("mounting is not permitted")
    monitor.write_config({})

    def remount(options: str) -> None:
        command = ["mount", "-o", f"remount,{options}", monitor.home]
        # the threads of a killed process may hold its files a moment longer than the process
        eventually(lambda: not subprocess.run(command, check=False).returncode, 30, options)

    try:
        yield remount
    finally:
        remount("rw")
        about = cm.running_monitor(cm.Settings(monitor.home, "", "", {}))
        if about:
            os.kill(about["pid"], signal.SIGKILL)
            eventually(lambda: not alive(about["pid"]))
        unmount(monitor.home)


@needs_root
def test_a_disk_that_is_full_for_everything_loses_nothing_that_was_acknowledged(
    monitor: RunningMonitor,
) -> None:
    with safe_disk(monitor, "4m"):
        command = monitor.installed_command()
        monitor.start()
        sure = safe_told(monitor, list(range(10)))
        assert sure == list(range(10))

        def fill() -> None:
            """Fill the disk until no byte is left, for events, spool, logs, usage and all."""
            with open(monitor.home + "/filler", "ab") as filler, contextlib.suppress(OSError):
                while True:
                    os.write(filler.fileno(), b"x" * 4096)

        fill()
        refused = safe_told(monitor, list(range(10, 200)))
        big = {"hook_event_name": "UserPromptSubmit", "session_id": "s9", "prompt": "1000"}
        for _ in range(3):  # neither monitor nor spool can keep it: the hook is silent all the same
            done = run_hook(command, json.dumps({**big, "pad": "x" * 9000}).encode(), monitor.environment)
            assert (done.returncode, done.stdout) == (0, b"")
        assert len(refused) < 190
        numbers = itertools.count(1001)

        def is_told() -> bool:
            """Tell whether an event that cannot be written shows; the index may have given a page back."""
            fill()
            refused.extend(safe_told(monitor, [next(numbers)]))
            store = monitor.get("/api/status")["store"]
            return store["ok"] is False and bool(store["error"])

        eventually(is_told)
        os.unlink(monitor.home + "/filler")
        sure += refused + safe_told(monitor, list(range(200, 210)))
        assert set(sure) <= set(safe_stored(monitor)) and set(range(200, 210)) <= set(sure)
        assert monitor.get("/api/status")["store"]["ok"] is True
        with open(monitor.home + "/monitor.log", encoding="utf-8") as file:
            assert "events can be written again" in file.read()  # the log goes on, too
        monitor.kill()
        monitor.start()
        assert set(sure) <= set(safe_stored(monitor))
        assert sum(session["counts"]["prompts"] for session in monitor.sessions().values()) >= len(sure)


@needs_root
def test_a_directory_that_became_read_only_is_told_and_loses_nothing(monitor: RunningMonitor) -> None:
    with safe_disk(monitor, "16m") as remount:
        command = monitor.installed_command()
        monitor.start()
        sure = safe_told(monitor, [1, 2, 3])
        monitor.kill()  # a file that is open for writing would forbid the change
        remount("ro")
        refused = monitor.command("start", "--no-open", check=False)
        assert refused.returncode == 1
        assert len(refused.stderr.strip().splitlines()) == 1
        assert "Read-only" in refused.stderr
        done = run_hook(command, b'{"hook_event_name": "Stop"}', monitor.environment)
        assert (done.returncode, done.stdout) == (0, b"")
        remount("rw")
        monitor.start()
        sure += safe_told(monitor, [4])
        assert safe_stored(monitor) == sure == [1, 2, 3, 4]


@dataclasses.dataclass
class SafeFailingDisk:
    """A disk of its own at `place` that can break: the system then makes it read-only under all who use it."""

    place: str
    image: str
    devices: list[str]

    def mount(self) -> None:
        """Put the disk in its place."""
        command = ["losetup", "-f", "--show", self.image]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be made here: {done.stderr.strip()}")
        self.devices.append(done.stdout.strip())
        mount = ["mount", "-t", "ext4", "-o", "errors=remount-ro", self.devices[-1], self.place]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted")
        os.chmod(self.place, 0o700)

    def fail(self) -> None:
        """Let the file system find an error, as it does when a disk breaks."""
        subprocess.run(["sync", "-f", self.place], check=True)
        device = os.path.basename(self.devices[-1])
        try:
            with open(f"/sys/fs/ext4/{device}/trigger_fs_error", "w", encoding="ascii") as file:
                file.write("a test")
        except OSError as error:
            pytest.skip(f"no error can be made here: {error}")

    def replace(self) -> None:
        """Put a repaired copy in its place; who has a file of the broken one open keeps that."""
        shutil.copyfile(self.image, self.image + "2")
        self.image += "2"
        subprocess.run(["e2fsck", "-fy", self.image], capture_output=True, check=False)
        unmount(self.place)
        self.mount()

    def remove(self) -> None:
        """Take everything away again."""
        subprocess.run(["umount", "-l", self.place], capture_output=True, check=False)
        for device in self.devices:
            subprocess.run(["losetup", "-d", device], capture_output=True, check=False)


@needs_root
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("mkfs.ext4"), reason="makes an ext4 disk")
def test_a_disk_that_breaks_under_a_running_monitor_is_told_and_its_replacement_goes_on(
    monitor: RunningMonitor, tmp_path: Any
) -> None:
    disk = SafeFailingDisk(monitor.home + "/events", str(tmp_path / "disk"), [])
    os.mkdir(disk.place)
    with open(disk.image, "wb") as file:
        file.truncate(24 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.image], check=True)
    try:
        disk.mount()
        command = monitor.installed_command()
        monitor.start()
        sure = safe_told(monitor, list(range(6)))
        store = cm.Journal(disk.place)
        assert sure == list(range(6)) and store.has_room()
        disk.fail()
        assert safe_told(monitor, list(range(6, 12))) == []
        told = monitor.get("/api/status")["store"]
        assert told["ok"] is False and "Read-only" in told["error"]
        assert not store.has_room(), "it looks writable"
        for number in range(12, 15):
            event = {
                "hook_event_name": "UserPromptSubmit",
                "session_id": f"s{number % 3}",
                "prompt": str(number),
            }
            done = run_hook(command, json.dumps(event).encode(), monitor.environment)
            assert (done.returncode, done.stdout) == (0, b"")
        assert len(hook_spooled(monitor.home)) == 3
        assert len(monitor.get("/api/events?limit=100")["events"]) == 6, "what is there can be read"
        disk.replace()
        eventually(lambda: safe_stored(monitor) == [*range(6), 12, 13, 14], 30, "what was spooled")
        assert safe_told(monitor, [20]) == [20]
        assert monitor.get("/api/status")["store"]["ok"] is True and store.has_room()
        assert [event["seq"] for event in monitor.stored_events()] == sorted(
            event["seq"] for event in monitor.get("/api/events?limit=100")["events"]
        )
    finally:
        clean_up(monitor)
        disk.remove()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of another process is changed")
def test_a_monitor_without_file_descriptors_goes_on_when_it_has_some(running: RunningMonitor) -> None:
    command = running.installed_command()
    sure = safe_told(running, [0])
    limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{running.pid}/fd"))
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (used + 4, limits[1]))
    held = [
        socket.create_connection(("127.0.0.1", port), 15) for port in (running.port, running.ws_port) * 10
    ]
    for number in range(1, 6):
        event = {"hook_event_name": "UserPromptSubmit", "session_id": f"s{number}", "prompt": str(number)}
        assert run_hook(command, json.dumps(event).encode(), running.environment).returncode == 0
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, limits)
    for sock in held:
        sock.close()
    eventually(lambda: safe_told(running, [6]) == [6], 30, "an acknowledgement")
    eventually(lambda: set(safe_stored(running)) >= {*sure, 1, 2, 3, 4, 5, 6}, 30, "every event")
    assert len(safe_stored(running)) == len(set(safe_stored(running)))
    assert running.get("/health")["status"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_no_signal_at_any_moment_costs_an_acknowledged_event(running: RunningMonitor, number: int) -> None:
    rng = random.Random(int(number))
    stop = threading.Event()
    sure: list[int] = []

    def write() -> None:
        for event in itertools.count():
            if stop.is_set():
                return
            sure.extend(safe_told(running, [event]))

    with concurrent.futures.ThreadPoolExecutor() as pool:
        writing = pool.submit(write)
        try:
            for _ in range(4):
                at = len(sure) + rng.randrange(1, 40)
                eventually(lambda: len(sure) >= at, 30, "more events")  # noqa: B023 - called at once
                os.kill(running.pid, number)
                if number != signal.SIGHUP:
                    pid = running.pid
                    eventually(lambda: not alive(pid), 30, "its end")  # noqa: B023 - called at once
                    running.start()
        finally:
            stop.set()
        writing.result(60)
    stored = safe_stored(running)
    assert len(stored) == len(set(stored)) and set(sure) <= set(stored)
    assert sum(session["counts"]["prompts"] for session in running.sessions().values()) == len(stored)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_hook_that_is_killed_at_any_moment_spoils_no_other_event(
    monitor: RunningMonitor, number: int
) -> None:
    rng = random.Random(int(number))
    command = shlex.split(monitor.installed_command())[:4]
    line = json.dumps(payload("UserPromptSubmit", prompt="x" * 20_000)).encode() + b"\n"
    ended_well = 0
    for round_number in range(30):
        if round_number == 15:
            monitor.start()
        hook = subprocess.Popen(
            command, stdin=subprocess.PIPE, env=monitor.environment, stderr=subprocess.DEVNULL
        )
        assert hook.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            hook.stdin.write(line)
            hook.stdin.close()
        time.sleep(rng.random() * 0.05)
        hook.send_signal(number)
        # A SIGINT before the hook's first line ends it with 0, like every other fault: it must not block Claude.
        ended_well += hook.wait(30) == 0 and number != signal.SIGINT
    run_hook(shlex.join(command), line, monitor.environment)
    eventually(lambda: not hook_spooled(monitor.home), 30, "an empty spool")
    events = monitor.stored_events()
    assert len(events) >= ended_well + 1
    assert {event["data"].get("message") for event in events} == {"x" * 20_000}
    assert not os.path.exists(monitor.home + "/quarantine.log")


def test_a_client_that_went_earlier_in_the_same_turn_is_left_alone() -> None:
    loop = cm.EventLoop()
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.closing(loop):
        server = cm.ClientServer(
            loop, listener, admit=lambda request, sock: None, opened=lambda client: None,
            received=lambda client, text: None, connection_limit=9, queue_limit_bytes=1 << 20,
        )  # fmt: skip
        with socket.create_connection(listener.getsockname()):
            loop.call_soon(loop.stop)
            loop.run()  # one turn
            [client] = server.clients.values()
            server.send(client, bytes(16 << 20))
            assert client.queue, "the test needs a client that could not take all"
            server._drop(client)  # as another one's message may have it
            server._ready(client, selectors.EVENT_READ | selectors.EVENT_WRITE)
        assert not server.clients


def test_a_stuck_tab_among_fifty_holds_up_nobody(running: RunningMonitor) -> None:
    peers = [ProtocolPeer(running.ws_port, receive_bytes=4096 if index == 0 else 0) for index in range(50)]
    for peer in peers:
        peer.say(type="subscribe", view="full")
    for peer in peers[1:]:
        peer.next("subscribed")
    big = "x" * 100_000
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        reads = [pool.submit(lambda peer=peer: [peer.next("event") for _ in range(60)]) for peer in peers[1:]]
        for number in range(60):
            running.emit(payload("UserPromptSubmit", prompt=f"{number} {big}"))
        read = [reading.result(120) for reading in reads]
    assert {json.loads(line)["seq"] for line in read[0]} == set(range(1, 61))
    assert all(lines == read[0] for lines in read)
    assert eventually(lambda: "does not read" in open(running.home + "/monitor.log", encoding="utf-8").read())  # noqa: SIM115
    for peer in peers:
        peer.close()


def test_three_hundred_clients_get_every_event(monitor: RunningMonitor) -> None:
    monitor.write_config({"limits": {"connections": 300}})
    monitor.start()
    peers = []
    for _ in range(300):
        peers.append(ProtocolPeer(monitor.ws_port))
        peers[-1].say(type="subscribe", view="rows")
    for peer in peers:
        peer.next("subscribed")
    assert protocol_exchange(monitor.ws_port, b"")[0] == 503  # the next one is one too many
    for number in range(20):
        monitor.emit(payload("UserPromptSubmit", prompt=str(number)))
    for peer in peers:
        assert [json.loads(peer.next("event"))["seq"] for _ in range(20)] == list(range(1, 21))
        peer.close()
    eventually(lambda: protocol_open(monitor), what="room again")


@dataclasses.dataclass
class SafeCable:
    """A network of its own with one cable to this machine: `host` is this machine's address on it."""

    host: str
    name: str

    def inside(self, work: Any) -> Any:
        """Do something in that network, in a thread of its own; its sockets stay there."""

        def enter() -> Any:
            with open(f"/run/netns/{self.name}", "rb") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), 0x40000000):  # CLONE_NEWNET
                    raise OSError(ctypes.get_errno(), "setns")
            return work()

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result(30)

    def cut(self) -> None:
        """Cut the cable: nothing comes through any more, not even that a connection ended."""
        subprocess.run(["ip", "-n", self.name, "link", "set", f"{self.name}b", "down"], check=True)


@contextlib.contextmanager
def safe_cable() -> Iterator[SafeCable]:
    """Lay a cable to a network of its own; skip where that is not permitted."""
    number = os.getpid() % 60_000
    name, net = f"cm{number}", f"10.213.{number >> 8}.{number & 0xFC}"
    host, peer = (
        f"{net.rpartition('.')[0]}.{(number & 0xFC) + 1}",
        f"{net.rpartition('.')[0]}.{(number & 0xFC) + 2}",
    )
    try:
        for command in (
            f"netns add {name}", f"link add {name}a type veth peer name {name}b netns {name}",
            f"addr add {host}/30 dev {name}a", f"link set {name}a up",
            f"-n {name} addr add {peer}/30 dev {name}b", f"-n {name} link set {name}b up",
        ):  # fmt: skip
            try:
                done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
            except FileNotFoundError:
                pytest.skip("ip is missing")
            if done.returncode:
                pytest.skip(f"no network can be made here: {done.stderr.strip()}")
        yield SafeCable(host, name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="makes a network namespace")
def test_clients_whose_cable_is_cut_are_dropped_and_hold_up_nobody(monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "PING_INTERVAL_S", 1.5)
    monkeypatch.setattr(cm, "CLOSE_DEADLINE_S", 0.5)
    monkeypatch.setattr(cm, "REQUEST_DEADLINE_S", 0.5)
    with (
        safe_cable() as cable,
        protocol_inside(server={"host": cable.host, "port": 0, "wsPort": 0}) as inside,
    ):
        with open(inside.settings.path("token"), encoding="ascii") as file:
            bearer = "Authorization: Bearer " + file.read().strip()

        def peer(view: str) -> ProtocolPeer:
            made = ProtocolPeer(inside.ws_port, host=cable.host, more=(bearer,))
            made.say(type="subscribe", view=view)
            made.next("subscribed")
            return made

        def asking() -> socket.socket:
            sock = socket.create_connection((cable.host, inside.port), 15)
            sock.sendall(b"GET /health HTTP/1.1\r\n")
            return sock

        near = peer("full")
        # one that gets more than is kept for it, one that gets little, and one that has not finished its request
        far = cable.inside(lambda: [peer("full").sock, peer("rows").sock, asking()])
        assert inside.loop.call(lambda: len(inside.clients.clients)) == 3
        cable.cut()
        most = seen = 0
        line = json.dumps(payload("UserPromptSubmit", prompt="x" * 100_000)).encode()

        def send() -> None:
            for _ in range(40):  # what the kernel and the queue of a client hold, and more
                inside.loop.call(lambda: inside.take_now(line))

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            sending = pool.submit(send)
            while seen < 40 or inside.loop.call(lambda: len(inside.clients.clients)) > 1:
                opcode, said = near.frame() or (8, b"")
                assert opcode != 8, said
                if opcode == 9:
                    near.send(protocol_frame(10, b""))
                seen += b'"type":"event"' in said[:40]
                queues = inside.loop.call(
                    lambda: [client.queued for client in inside.clients.clients.values()]
                )
                most = max(most, *queues)
            sending.result(30)
        assert most <= inside.settings["limits.clientQueueBytes"]
        near.say(type="get_sessions")
        assert near.next("sessions")
        places = inside.settings["limits.connections"]
        eventually(lambda: inside.http._places._value == places, what="the end of the other connection")
        for sock in far:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # it knows of nothing
                while True:
                    assert sock.recv(1 << 20)
            sock.close()
        near.close()


@pytest.mark.parametrize("damage", ["deleted with its log", "another file in its place", "overwritten"])
def test_an_index_that_goes_under_a_running_monitor_comes_back_and_disturbs_nobody(
    running: RunningMonitor, damage: str
) -> None:
    running.emit(*(payload("UserPromptSubmit", prompt=f"quokka {number}") for number in range(60)))
    index_ready(running)
    client = running.websocket("rows")
    INDEX_DAMAGE[damage](running.home + "/index.db")
    for number in range(3):
        running.emit(payload("UserPromptSubmit", prompt=f"later {number}"))
        assert client.next("event")["event"]["sessionId"] == "s1"
        page = running.get("/api/search?q=quokka&limit=100")
        assert len(page["results"]) == 60 or not page["complete"]

    def counted() -> int | None:
        status, _, body = running.request("/api/stats")
        return json.loads(body)["totals"]["events"] if status == 200 else None

    eventually(lambda: counted() == 63, 30, "statistics of the new index")
    assert len(running.get("/api/search?q=later")["results"]) == 3
    assert index_ready(running)["error"] is None
    assert running.get("/api/status")["store"]["ok"] is True


SAFE_GARBAGE = {
    "empty": b"", "zeros": b"\0" * 4096, "text": b"garbage\n", "json": b'{"pid": "x", "position": [], "state": 7}\n',
    "list": b"[1, 2]\n", "huge": b'{"pid": 99999999999999999999999}', "not utf-8": b"\xff\xfe" * 100,
}  # fmt: skip
SAFE_KEPT = (
    *SAFE_FILES, "hooks/lib/hot_path.py", "events/2020-01-01/s7.jsonl", "spool/1000000000000-abcdef00.jsonl",
    "spool/1000000000001-abcdef00.taken", "events/garbage",
)  # fmt: skip


@pytest.mark.parametrize("kind", SAFE_GARBAGE)
def test_a_damaged_file_of_any_kind_costs_no_event_and_no_start(monitor: RunningMonitor, kind: str) -> None:
    command = monitor.installed_command()
    monitor.start()
    sure = safe_told(monitor, list(range(9)))
    transcript = monitor.home + "/t.jsonl"
    with open(transcript, "w", encoding="utf-8") as file:
        file.write('{"type":"assistant","message":{"id":"a","model":"m","usage":{"output_tokens":5}}}\n')
    run_hook(
        command, json.dumps({**payload("Stop"), "transcript_path": transcript}).encode(), monitor.environment
    )
    before = {name: session["counts"] for name, session in monitor.sessions().items()}
    monitor.kill()
    for name in SAFE_KEPT:
        path = f"{monitor.home}/{name}"
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with open(path, "wb") as file:
            file.write(SAFE_GARBAGE[kind])
    monitor.start()
    after = {name: session["counts"] for name, session in monitor.sessions().items()}
    assert {name: after.get(name) for name in before} == before
    done = run_hook(
        command, json.dumps({**payload("UserPromptSubmit"), "prompt": "99"}).encode(), monitor.environment
    )
    assert (done.returncode, done.stdout) == (0, b"")
    sure += safe_told(monitor, [100])
    lines = [json.loads(line) for line in monitor.request("/api/export")[2].splitlines()]
    told = {event["data"].get("message") for event in lines if event["sessionId"] in ("s0", "s1", "s2")}
    assert {str(number) for number in sure} <= told
    monitor.command("status"), monitor.command("sessions"), monitor.command("doctor", check=False)
    monitor.stop()


def test_a_configuration_that_became_nonsense_stops_nobody_who_runs(running: RunningMonitor) -> None:
    command = running.installed_command()
    config = running.home + "/monitor.config.json"
    with open(config, encoding="utf-8") as file:
        good = file.read()
    for nonsense in (
        "",
        "{",
        "[]",
        '{"socketPath": 5}',
        '{"mode": "moon"}',
        "\0\0",
        '{"limits": {"fieldBytes": -1}}',
    ):
        with open(config, "w", encoding="utf-8") as file:
            file.write(nonsense)
        done = run_hook(command, json.dumps(payload("UserPromptSubmit")).encode(), running.environment)
        assert (done.returncode, done.stdout) == (0, b"")
        running.emit(payload("Stop"))
        assert running.get("/health")["status"] == "ok"
        if nonsense not in ("", "{}"):
            refused = running.command("restart", "--no-open", check=False)
            assert refused.returncode in (1, 2) and config in refused.stderr
            assert alive(running.pid)
    with open(config, "w", encoding="utf-8") as file:
        file.write(good)
    eventually(lambda: len(running.stored_events()) == 14, 30, "what the hooks had to spool, too")


# -- fuzzing: what is well-formed, and then not quite ----------------------------

SAFE_HEADS = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n\r\n",
    b"GET /api/events?limit=5&before=9 HTTP/1.1\r\nHost: localhost:PORT\r\nOrigin: http://localhost:PORT\r\n\r\n",
    b"POST /api/hooks HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}",
    b"GET /?token=abc HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nCookie: contextuate_token_1=x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x85abcd\x09\x07\x0f\x08\x0e",
    b"GET /export HTTP/1.0\r\n\r\n", b"GET /\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
)  # fmt: skip
SAFE_LINES = (
    b'{"hook_event_name":"PreToolUse","session_id":"f","tool_name":"Bash","tool_use_id":"t","tool_input":{"command":"ls"}}',
    b'{"id":"1","timestamp":5,"machineId":"m","pid":3,"hook":{"hook_event_name":"Stop","background_tasks":[{}]}}',
    b'{"eventType":"tool_call","sessionId":"0123456789abcdef","data":{"toolName":"Bash"},"timestamp":1.5e3}',
    b'{"hookType":"Monitor","eventType":"session_meta","sessionId":"f","data":{"label":"x","hidden":true}}',
    b'{"test":"message"}', b'{"a":"\\ud83d","b":[[[[{}]]]],"c":1e999,"d":-0}', b'{"hook_event_name":null,"session_id":7}',
)  # fmt: skip
SAFE_CONFIGS = (
    b'{"mode": "redis", "redis": {"host": "a", "port": 6379, "url": null, "tls": true}, "server": {"allowedHosts": ["x"]}}',
    b'{"limits": {"fieldBytes": 1024}, "prices": {"opus": {"input": 1, "output": 2.5}}, /* c */ "privacy": {"redact": false},}',
    b'{"socketPath": "/tmp/x.sock", "persistence": {"enabled": true, "type": "file"}, "retention": {"days": 3}}',
)  # fmt: skip
SAFE_TRANSCRIPTS = (
    b'{"type":"assistant","message":{"id":"a","model":"claude-x","usage":{"input_tokens":5,"output_tokens":7}}}\n'
    b'{"type":"user","message":{"content":"x"}}\n{"type":"cost-state","totalCostUSD":0.5}\n',
)
SAFE_SPLICES = (
    b"", b"\0", b"\r\n", b"\r", b"\n", b"{", b"}", b'"', b"\\", b",", b":", b"null", b"[" * 300, b"1e9999", b"-1", b"\xff",
    b"\xed\xa0\x80", b"9" * 400, b"Host: evil.example\r\n", b"x" * 5000, b"Transfer-Encoding: chunked\r\n", b"%00", b"\\ud800",
)  # fmt: skip


@st.composite
def safe_mutants(draw: Any, corpus: tuple[bytes, ...]) -> bytes:
    """Take one of the corpus and cut, repeat, splice and flip it here and there."""
    data = draw(st.sampled_from(corpus))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        how = draw(st.sampled_from(("cut", "twice", "splice", "other", "flip")))
        if how == "cut":
            data = data[:start] + data[end:]
        elif how == "twice":
            data = data[:end] + data[start:]
        elif how == "splice":
            data = data[:start] + draw(st.sampled_from(SAFE_SPLICES)) + data[end:]
        elif how == "other":
            other = draw(st.sampled_from(corpus))
            data = data[:start] + other[min(start, len(other)) :]
        else:
            data = (
                data[:start]
                + bytes(byte ^ draw(st.integers(1, 255)) for byte in data[start:end])
                + data[end:]
            )
    return data


def safe_spoken_to(port: int, data: bytes) -> bytes:
    """Send bytes to a port, and nothing more; return what comes back until it closes or says no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as sock:
        received = b""
        with contextlib.suppress(OSError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(1 << 16):
                received += piece
        return received


SAFE_FUZZ = settings(deadline=None, max_examples=120, suppress_health_check=list(HealthCheck))


@SAFE_FUZZ
@given(safe_mutants(SAFE_HEADS))
def test_no_bytes_sent_to_either_port_do_harm(spoken: RunningMonitor, data: bytes) -> None:
    for port in (spoken.port, spoken.ws_port):
        answer = safe_spoken_to(port, data.replace(b"PORT", str(port).encode()))
        assert answer == b"" or re.match(rb"HTTP/1\.1 (?:101|200|303|4\d\d|501|505) ", answer), answer[:200]
        assert b"Traceback" not in answer
    assert spoken.request("/health")[0] == 200


@SAFE_FUZZ
@given(st.lists(safe_mutants(SAFE_LINES), min_size=1, max_size=5))
def test_no_bytes_sent_by_a_hook_stop_the_next_event(shared: RunningMonitor, lines: list[bytes]) -> None:
    with shared.connect() as sock:
        sock.sendall(b"\n".join(lines) + b"\n")
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(4096):
            pass
    shared.emit({"hook_event_name": "Notification", "session_id": "after"})
    assert alive(shared.pid)


def test_a_monitor_that_was_sent_garbage_for_long_starts_again_with_all_it_kept(
    running: RunningMonitor,
) -> None:
    rng = random.Random(11)
    for _ in range(40):
        lines = []
        for _ in range(20):
            line = bytearray(rng.choice(SAFE_LINES))
            line[rng.randrange(len(line))] = rng.randrange(256)
            lines.append(bytes(line).replace(b"\n", b" "))
        with running.connect() as sock:
            sock.sendall(b"\n".join(lines) + b"\n")
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
    running.emit(payload("Stop", "last"))
    stored = len(running.stored_events())
    assert stored > 100
    counts = {name: session["counts"] for name, session in running.sessions().items()}
    running.kill()
    running.start()
    eventually(lambda: {name: session["counts"] for name, session in running.sessions().items()} == counts)
    with open(running.home + "/monitor.log", encoding="utf-8") as file:
        assert "unexpected error" not in file.read()


@SAFE_FUZZ
@given(safe_mutants(SAFE_LINES))
def test_no_line_or_redis_payload_breaks_what_takes_it(line: bytes) -> None:
    try:
        given_event = ee.parse_event_line(line)
    except ee.MalformedEvent:
        return
    event = protected(ee.build_event(given_event, 5, "m"), ee.Privacy(field_limit_bytes=1024))
    event = ee.parse_event_line(ee.encode_json(event))  # numbers without an end are text from here on
    assert ee.parse_event_line(ee.encode_json(event)) == event
    assert protected(json.loads(json.dumps(event)), ee.Privacy(field_limit_bytes=1024)) == event
    book = cm.Sessions(own_machine="m")
    book.apply({"seq": 1, "received": 5, **event})
    book.tick(10**13)
    json.dumps([cm.event_row({"seq": 1, "received": 5, **event}), *book.each_json(True)])


@SAFE_FUZZ
@given(safe_mutants(SAFE_CONFIGS))
def test_no_configuration_does_worse_than_being_refused_with_its_name(text: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(text)
        file.flush()
        try:
            values, warnings = ee.load_config(file.name)
        except ee.ConfigError as error:
            assert file.name in str(error) and "\n" not in str(error)
        else:
            assert set(values) == set(ee.KEYS) and all(isinstance(words, str) for words in warnings)


@SAFE_FUZZ
@given(safe_mutants(SAFE_TRANSCRIPTS))
def test_no_transcript_breaks_the_count(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with open(folder + "/t.jsonl", "wb") as file:
            file.write(text)
        event = ee.build_event(
            {**payload("Stop"), "transcript_path": folder + "/t.jsonl"}, 5, ee.this_machine()
        )
        json.dumps(ee.UsageReader(folder, ee.this_machine()).usage_event(event))


# ---------------------------------------------------------------------------
# Browser: the page in headless Chromium against a real monitor
# ---------------------------------------------------------------------------


def test_no_line_of_the_page_is_longer_than_120_columns() -> None:
    with open(os.path.join(ROOT, "index.html"), encoding="utf-8") as file:
        assert [number for number, line in enumerate(file, 1) if len(line.rstrip("\n")) > 120] == []


BROWSER_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--in-process-gpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One browser for this section."""
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


# Asked and answered at once: each question to the browser of its own costs some milliseconds of both.
SEEN = """(selector) => [...document.querySelectorAll(selector)].filter((part) => {
  const box = part.getBoundingClientRect();
  return box.width && box.height && getComputedStyle(part).visibility === 'visible';
})"""


@dataclasses.dataclass
class BrowserTab:
    """A page, and whatever its console said."""

    page: Any
    url: str
    said: list[str] = dataclasses.field(default_factory=list)

    def rows(self, words: str = "", **marks: str) -> list[Any]:
        """Return the visible rows that show some words and have these data attributes, from the top."""
        wanted = "".join(f'[data-{name}="{value}"]' for name, value in marks.items())
        found = self.page.evaluate_handle(
            f"([rows, words]) => ({SEEN})(rows).filter((row) => (row.innerText + '\\n').includes(words))",
            [f"[data-testid=row]{wanted}", words],
        )
        return [row.as_element() for row in found.get_properties().values()]

    def row_with(self, words: str, timeout_s: float = 15) -> Any:
        """Return the first row that shows these words, once there is one."""
        return self.row_of(
            eventually(
                lambda: [row.get_attribute("data-event-id") for row in self.rows(words)], timeout_s, words
            )[0]
        )

    def row_of(self, event_id: str) -> Any:
        """Return the row of one event, wherever it moves: the page fills its elements with other rows."""
        return self.page.locator(f'[data-testid=row][data-event-id="{event_id}"]').locator("visible=true")

    def text(self, testid: str) -> str:
        """Return the text of one part of the page, "" when it is hidden."""
        return str(
            self.page.evaluate(
                f"(part) => ({SEEN})(part).slice(0, 1).map((part) => part.innerText).join()",
                f"[data-testid={testid}]",
            )
        )

    def shows(self, testid: str, words: str) -> None:
        """Wait until a part of the page shows some words."""
        eventually(
            lambda: words in self.text(testid), 15, f"{words!r} in {testid}, not {self.text(testid)!r}"
        )


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Any]:
    """Open tabs that fail the test when the console says anything at all."""
    tabs = []

    def open_one(
        monitor: RunningMonitor, path: str = "", width: int = 1440, scheme: str = "light"
    ) -> BrowserTab:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab = BrowserTab(context.new_page(), monitor.url.replace("127.0.0.1", "localhost") + path)
        tab.page.on("console", lambda message: tab.said.append(message.text))
        tab.page.on("pageerror", lambda error: tab.said.append(f"error: {error}"))
        tab.page.goto(tab.url)
        tabs.append((context, tab))
        return tab

    yield open_one
    for context, tab in tabs:
        context.close()
        assert tab.said == []


def browser_call(number: int, session: str = "s1", **result: Any) -> list[dict[str, Any]]:
    """Return a call of Bash, with its result if there is one."""
    call = {
        "tool_name": "Bash",
        "tool_input": {"command": f"make step-{number}"},
        "tool_use_id": f"t{number}",
    }
    events = [payload("PreToolUse", session, **call)]
    if result:
        events.append(payload("PostToolUse", session, **call, duration_ms=1234, **result))
    return events


@needs_browser
def test_the_first_visit_says_what_to_do_and_sends_a_test_event(
    running: RunningMonitor, open_tab: Any
) -> None:
    tab = open_tab(running)
    tab.shows("firstvisit", "contextuate_monitor.py install")
    tab.page.click("[data-testid=send-test]")
    tab.row_with("Test event")
    assert tab.text("firstvisit") == ""
    assert len(running.stored_events()) == 1


@needs_browser
def test_call_and_result_are_one_row_and_come_live(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="fix the cart"))
    tab = open_tab(running)
    tab.row_with("fix the cart")
    running.emit(*browser_call(1))
    assert tab.row_with("make step-1").get_attribute("data-status") == "running"
    running.emit(browser_call(1, tool_response={"stdout": "ok"})[1])
    eventually(lambda: tab.row_with("make step-1").get_attribute("data-status") == "done")
    assert "1.2 s" in tab.row_with("make step-1").inner_text()
    assert len(tab.rows("make step-1")) == 1
    failing = browser_call(2, tool_response="")
    running.emit(failing[0], {**failing[1], "hook_event_name": "PostToolUseFailure", "error": "Exit code 2"})
    eventually(lambda: tab.row_with("make step-2").get_attribute("data-status") == "failed")
    running.emit(*browser_call(3), payload("UserPromptSubmit", prompt="stop that"))
    eventually(lambda: tab.row_with("make step-3").get_attribute("data-status") == "interrupted")


@needs_browser
def test_a_call_that_only_its_batch_ended_failed_as_the_server_says(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*recorded("p-perm"))
    (session,) = running.sessions().values()
    assert session["counts"]["toolErrors"] == 2
    tab = open_tab(running)
    eventually(lambda: len(tab.rows(status="failed")) == 2)
    many = [browser_call(number, "many")[0] for number in range(1, 61)]
    batch = [
        {"tool_name": "Bash", "tool_use_id": call["tool_use_id"], "tool_response": "denied"} for call in many
    ]
    running.emit(*many, payload("PostToolBatch", "many", tool_calls=batch))
    tab.row_with("make step-60")
    wanted = "contextuate.store.rows.filter((row) => row.sid === 'many').map((row) => row.outcome)"
    eventually(lambda: sorted(tab.page.evaluate(wanted)) == ["interrupted"] * 10 + ["refused"] * 50)


@needs_browser
def test_who_needs_a_person_stands_first_and_in_the_title(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", "busy", prompt="busy work"))
    tab = open_tab(running)
    eventually(lambda: tab.page.query_selector("[data-session-id=busy][data-state=working]"))
    ask = {"tool_name": "Bash", "tool_input": {"command": "rm -rf build"}}
    running.emit(
        payload("UserPromptSubmit", "asks", prompt="clean up"),
        payload("PreToolUse", "asks", tool_use_id="t1", **ask),
        payload("PermissionRequest", "asks", **ask),
    )
    eventually(lambda: tab.page.query_selector("[data-session-id=asks][data-state=waiting]"))
    first = tab.page.query_selector_all("[data-testid=session]")[0]
    assert first.get_attribute("data-session-id") == "asks"
    assert "rm -rf build" in first.inner_text()
    eventually(lambda: "1" in tab.page.title())
    assert "1" in tab.text("counter-waiting")
    running.emit(payload("PostToolUse", "asks", tool_use_id="t1", tool_response="", duration_ms=1, **ask))
    eventually(lambda: tab.page.query_selector("[data-session-id=asks][data-state=working]"))
    eventually(lambda: "1" not in tab.page.title())


@needs_browser
@pytest.mark.parametrize(
    "name", ["simple", "failing", "subagent", "tasks", "mcp", "i-misc", "unicode", "large"]
)
def test_every_row_of_a_recording_opens_and_shows_its_own(
    running: RunningMonitor, open_tab: Any, name: str
) -> None:
    running.emit(*recorded(name))
    tab = open_tab(running)
    eventually(lambda: len(tab.rows()) > 3)
    tab.page.focus("[data-testid=table]")
    tab.page.keyboard.press("g")
    seen = set()
    for _ in range(min(len(tab.rows()), 14)):
        tab.page.keyboard.press("Enter")
        eventually(lambda: "Loading" not in tab.text("drawer") and tab.text("drawer"))
        seen.add(tab.text("drawer")[:60])
        tab.page.keyboard.press("Escape")
        tab.page.keyboard.press("j")
    assert len(seen) > 2


@needs_browser
def test_the_drawer_shows_a_command_with_its_output_and_an_edit_as_a_diff(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*recorded("simple"))
    tab = open_tab(running)
    tab.row_with("echo hello").click()
    tab.shows("drawer", "echo hello")
    tab.shows("drawer", "Say hello")
    tab.rows("Edit")[0].click()
    tab.shows("drawer", "line two")
    tab.shows("drawer", "line 2")
    tab.rows("please do it")[0].click()
    tab.shows("drawer", "[[scn:simple]] please do it")


@needs_browser
def test_keyboard_only_from_the_first_visit_to_raw_json(running: RunningMonitor, open_tab: Any) -> None:
    tab = open_tab(running)
    tab.shows("firstvisit", "install")
    for _ in range(20):
        if tab.page.evaluate("document.activeElement.dataset.testid") == "send-test":
            break
        tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Enter")
    tab.row_with("Test event")
    tab.page.keyboard.press("j")
    tab.page.keyboard.press("Enter")
    tab.shows("drawer", "Test event")
    tab.page.keyboard.press("r")
    tab.shows("drawer", '"hookType": "Notification"')
    tab.page.keyboard.press("Escape")
    eventually(lambda: tab.text("drawer") == "")
    tab.page.keyboard.press("?")
    eventually(lambda: tab.page.query_selector("dialog[open]"))


@needs_browser
def test_words_and_states_filter(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        *browser_call(1, "one", tool_response=""),
        *browser_call(2, "two", tool_response=""),
        payload("Stop", "two"),
    )
    tab = open_tab(running)
    tab.row_with("make step-1")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("step-2")
    eventually(lambda: not tab.rows("step-1"))
    tab.row_with("make step-2")
    tab.page.fill("[data-testid=filter]", "")
    tab.row_with("make step-1")
    tab.page.click("[data-testid=counter-idle]")
    eventually(lambda: not tab.rows("step-1"))
    tab.row_with("make step-2")


@needs_browser
def test_a_session_can_be_read_back_to_its_first_event(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        *[event for number in range(1, 601) for event in browser_call(number, "long", tool_response="")]
    )
    running.emit(
        *[event for number in range(601, 1301) for event in browser_call(number, "later", tool_response="")]
    )
    tab = open_tab(running)
    tab.row_with("make step-1300")
    eventually(lambda: tab.page.query_selector("[data-session-id=long]"))
    tab.page.click("[data-session-id=long]")
    tab.row_with("make step-600")
    eventually(lambda: browser_scrolled_up(tab, "make step-1\n"), 20)
    loaded = tab.page.evaluate(
        "contextuate.store.rows.filter((row) => row.sid === 'long').map((row) => row.target)"
    )
    assert sorted(loaded) == sorted(f"make step-{number}" for number in range(1, 601))
    tab.page.keyboard.press("Escape")
    tab.row_with("make step-1300")
    eventually(lambda: browser_scrolled_up(tab, "make step-1\n"), 20)


def browser_scrolled_up(tab: BrowserTab, words: str) -> bool:
    """Scroll the table to its top; tell whether a row there shows these words."""
    tab.page.evaluate(
        "(() => { const grid = document.querySelector('[data-testid=table]'); grid.scrollTop = 0; })()"
    )
    return bool(tab.rows(words))


@needs_browser
def test_a_link_brings_back_session_and_event(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        *browser_call(1, "one", tool_response={"stdout": "first output"}),
        *browser_call(2, "two", tool_response=""),
    )
    tab = open_tab(running)
    tab.page.click("[data-session-id=one]")
    tab.row_with("make step-1").click()
    tab.shows("drawer", "first output")
    link = tab.page.evaluate("location.hash")
    other = open_tab(running, link)
    other.shows("drawer", "first output")
    eventually(lambda: not other.rows("step-2"))


@needs_browser
def test_the_menu_renames_pins_hides_and_deletes(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        payload("UserPromptSubmit", "one", prompt="first work"),
        payload("UserPromptSubmit", "two", prompt="other"),
    )
    tab = open_tab(running)

    def choose(words: str) -> None:
        tab.page.click("[data-session-id=one]", button="right")
        tab.page.click(f"[data-testid=menu] >> text={words}")

    choose("Rename")
    tab.page.fill("dialog input", "My work")
    tab.page.keyboard.press("Enter")
    eventually(lambda: running.sessions()["one"]["label"] == "My work")
    tab.shows("rail", "My work")
    choose("Pin")
    eventually(lambda: running.sessions()["one"]["isPinned"])
    choose("Hide")
    eventually(lambda: running.sessions()["one"]["hidden"])
    eventually(lambda: not tab.page.query_selector("[data-session-id=one]"))
    running.request("/")
    client = running.websocket("rows")
    client.send(type="unhide_session", sessionId="one")
    eventually(lambda: tab.page.query_selector("[data-session-id=one]"))
    choose("Delete")
    tab.page.click("dialog >> text=Cancel")
    assert "one" in running.sessions()
    choose("Delete")
    tab.page.click("dialog button.danger")
    eventually(lambda: list(running.sessions()) == ["two"])
    eventually(lambda: not tab.page.query_selector("[data-session-id=one]"))
    client.close()


@needs_browser
def test_the_page_says_how_far_loading_is_and_fills_without_a_reload(
    monkeypatch: pytest.MonkeyPatch, open_tab: Any
) -> None:
    with loading_held(monkeypatch) as (place, ids, gate):
        tab = open_tab(place)
        tab.shows("banner", "Reading history: 0 of 2")
        assert not tab.page.query_selector("[data-testid=session]")
        gate.set()
        eventually(lambda: "Reading history" not in tab.text("banner"))
        eventually(lambda: "ended" in tab.text("rail").lower())
        tab.page.close()


@needs_browser
def test_a_lost_connection_is_shown_and_heals_without_a_reload(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(payload("UserPromptSubmit", prompt="before"))
    running.write_config({"server": {"port": running.port, "wsPort": running.ws_port}})
    tab = open_tab(running)
    tab.row_with("before")
    running.kill()
    tab.shows("banner", "Not connected")
    running.start()
    running.emit(payload("UserPromptSubmit", "s2", prompt="meanwhile"))
    tab.row_with("meanwhile", 30)
    eventually(lambda: "Not connected" not in tab.text("banner"))
    assert len(tab.rows("before")) == 1
    assert all("WebSocket" in words or "ERR_CONNECTION_REFUSED" in words for words in tab.said)
    tab.said.clear()


def browser_bar(tab: BrowserTab, target: str, at_ms: int | None = None) -> dict[str, Any]:
    """Return where the timeline shows a call: the middle of its bar in the page, and its colour there.

    With `at_ms` it is that moment in the call's lane.
    """
    return dict(tab.page.evaluate(
        """([target, at]) => {
          const { timeline, store } = contextuate;
          const row = store.rows.find((row) => row.target === target);
          const index = timeline.shown.findIndex((lane) => lane.sid === row.sid && lane.agent === row.agent);
          const to = timeline.live ? Date.now() + timeline.span * 0.02 : timeline.to;
          const place = (ms) => timeline.left + (ms - to + timeline.span) / timeline.span * (timeline.width - timeline.left);
          const end = row.outcome ? row.time + row.duration : Date.now();
          const middle = Math.max(place(row.time) + 1, Math.min(place((row.time + end) / 2), place(row.time) + 30));
          const x = at === null ? middle : place(at);
          const y = 24 + 2 + index * 20 + 5 - timeline.top;
          const canvas = document.querySelector('#timeline-canvas');
          const box = canvas.getBoundingClientRect();
          const scale = canvas.width / box.width;
          const copy = Object.assign(document.createElement('canvas'), { width: 1, height: 1 });
          const pen = copy.getContext('2d', { willReadFrequently: true });
          pen.drawImage(canvas, Math.round(x * scale), Math.round(y * scale), 1, 1, 0, 0, 1, 1);
          const pixel = pen.getImageData(0, 0, 1, 1).data;
          return { x: box.x + x, y: box.y + y, index, colour: [...pixel.slice(0, 3)] };
        }""", [target, at_ms]
    ))  # fmt: skip


def browser_colour(tab: BrowserTab, name: str) -> list[int]:
    """Return one colour of the page's palette as red, green, blue."""
    words = tab.page.evaluate(
        f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
    ).strip()
    return [int(words[at : at + 2], 16) for at in (1, 3, 5)]


@needs_browser
def test_the_timeline_shows_each_agent_with_its_calls_and_how_they_went(
    running: RunningMonitor, open_tab: Any
) -> None:
    agent = {"agent_id": "a1", "agent_type": "explorer"}
    long = {"tool_response": "", "duration_ms": 40_000}
    running.emit(
        payload("UserPromptSubmit", prompt="go"),
        *({**event, **(long if "tool_response" in event else {})} for event in browser_call(1, tool_response="")),
        payload("SubagentStart", **agent),
        *({**event, **agent} for event in browser_call(2)),
        {**browser_call(2)[0], **agent, "hook_event_name": "PostToolUseFailure", "error": "no",
         "duration_ms": 20_000},
        payload("UserPromptSubmit", "other", prompt="else"),
        *page_ask("other", "rm -rf build")[:2],
    )  # fmt: skip
    tab = open_tab(running)
    eventually(lambda: tab.page.evaluate("contextuate.timeline.shown.length") == 3)
    tab.page.focus("#timeline-canvas")
    for _ in range(3):
        tab.page.keyboard.press("+")
    told = "contextuate.timeline.shown.map((lane) => [lane.sid, lane.agent, lane.depth, lane.label])"
    assert tab.page.evaluate(told) == [
        ["other", "", 0, "else"], ["s1", "", 0, "go"], ["s1", "a1", 1, "explorer"],
    ]  # fmt: skip
    eventually(lambda: browser_bar(tab, "make step-1")["colour"] == browser_colour(tab, "bar"))
    eventually(lambda: browser_bar(tab, "make step-2")["colour"] == browser_colour(tab, "red"))
    eventually(lambda: browser_bar(tab, "rm -rf build")["colour"] == browser_colour(tab, "amber"))
    place = browser_bar(tab, "make step-2")
    tab.page.mouse.move(place["x"], place["y"])
    for words in ("Bash", "make step-2", "failed", "20 s", "go \u203a explorer"):
        tab.shows("tip", words)
    tab.page.mouse.click(place["x"], place["y"])
    tab.shows("drawer", "make step-2")
    tab.page.keyboard.press("Escape")
    name = tab.page.query_selector("#timeline-canvas").bounding_box()
    tab.page.mouse.click(name["x"] + 40, name["y"] + 24 + 2 + 20 * 2 + 10)
    eventually(lambda: "a=a1" in tab.page.evaluate("location.hash"))


@needs_browser
def test_the_timeline_shows_who_waited_for_a_person_and_how_long(
    running: RunningMonitor, open_tab: Any
) -> None:
    start = cm.now_ms() - 600_000
    agent = {"agent_id": "a1", "agent_type": "explorer"}

    def at(second: int, event: dict[str, Any]) -> dict[str, Any]:
        return {
            "hook": event,
            "id": str(uuid.uuid4()),
            "timestamp": start + second * 1000,
            "machineId": "testbox",
        }

    granted, rejected, agents = (
        page_ask("s1", command, command) for command in ("granted", "rejected", "agents")
    )
    question = {
        "tool_name": "AskUserQuestion",
        "tool_use_id": "q",
        "tool_input": {"questions": [{"question": "Which?"}]},
    }
    running.emit(
        at(0, payload("UserPromptSubmit", prompt="go")),
        at(10, granted[0]), at(10, granted[1]), at(170, {**granted[2], "duration_ms": 60_000}),
        at(180, rejected[0]), at(180, rejected[1]), at(240, payload("UserPromptSubmit", prompt="not that")),
        at(250, payload("PreToolUse", **question)),
        at(310, payload("PostToolUse", tool_response={}, duration_ms=5, **question)),
        at(320, payload("Stop", last_assistant_message="done")),
        at(330, {**agents[0], **agent}), at(331, {**agents[1], **agent}),
    )  # fmt: skip
    tab = open_tab(running)
    eventually(lambda: tab.page.evaluate("contextuate.timeline.shown.length") == 2)
    amber, bar, ground = "amber", "bar", ""  # of the last there is nothing, or a line that marks a minute
    names = {str(browser_colour(tab, name)): name for name in (amber, bar)}

    def colours(target: str, *seconds: int) -> list[str]:
        seen = (browser_bar(tab, target, start + second * 1000)["colour"] for second in seconds)
        return [names.get(str(colour), ground) for colour in seen]

    eventually(lambda: colours("granted", 40, 140) == [amber, bar])
    assert colours("granted", 6, 200, 235, 245, 280, 315, 330) == [
        ground, amber, amber, ground, amber, ground, ground,
    ]  # fmt: skip
    assert colours("agents", 200, 400, 590) == [ground, amber, amber], "it still waits"
    place = browser_bar(tab, "granted", start + 60_000)
    tab.page.mouse.click(place["x"], place["y"])
    tab.shows("drawer", "granted")
    running.emit(at(600, {**agents[2], **agent, "duration_ms": 100_000}))
    eventually(lambda: colours("agents", 400, 590) == [amber, bar], what="it was decided after 170 s")


@needs_browser
def test_a_brushed_part_of_the_timeline_filters_the_table(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="go"), *browser_call(1, tool_response=""))
    tab = open_tab(running)
    tab.row_with("make step-1")
    box = tab.page.query_selector("#timeline-canvas").bounding_box()

    def brush(start: float, end: float) -> None:
        tab.page.mouse.move(box["x"] + box["width"] * start, box["y"] + 8)
        tab.page.mouse.down()
        tab.page.mouse.move(box["x"] + box["width"] * (start + end) / 2, box["y"] + 8)
        tab.page.mouse.move(box["x"] + box["width"] * end, box["y"] + 8)
        tab.page.mouse.up()

    brush(0.3, 0.5)
    tab.shows("range", "\u2013")
    eventually(lambda: not tab.rows(), 15, "rows of that time only")
    link = tab.page.evaluate("location.hash")
    assert re.fullmatch(r"#t=\d+-\d+", link)
    other = open_tab(running, link)
    other.shows("range", "\u2013")
    assert not other.rows()
    tab.page.click("[data-testid=range]")
    tab.row_with("make step-1")
    brush(0.6, 0.999)
    tab.shows("range", "\u2013")
    tab.row_with("make step-1")
    tab.page.keyboard.press("Escape")
    eventually(lambda: tab.text("range") == "")


@needs_browser
def test_the_timeline_is_moved_and_zoomed_by_wheel_drag_keys_and_buttons(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(payload("UserPromptSubmit", prompt="go"), *browser_call(1, tool_response=""))
    tab = open_tab(running)
    tab.row_with("make step-1")

    def span() -> float:
        return float(tab.page.evaluate("contextuate.timeline.span"))

    assert span() == 15 * 60_000
    box = tab.page.query_selector("#timeline-canvas").bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 60)
    tab.page.mouse.wheel(0, 200)
    eventually(lambda: span() > 15 * 60_000)
    tab.page.mouse.wheel(0, -4000)
    tab.page.mouse.wheel(0, -4000)
    tab.page.mouse.wheel(0, -4000)
    tab.page.mouse.wheel(0, -4000)
    eventually(lambda: span() == 60_000, 15, "no shorter than a minute")
    tab.page.focus("#time-out")
    for _ in range(11):
        tab.page.keyboard.press("Enter")
    eventually(lambda: span() == 24 * 3_600_000 and tab.page.is_disabled("#time-out"))
    tab.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 60, steps=4)
    tab.page.mouse.up()
    eventually(lambda: tab.page.is_visible("#time-now"))
    tab.page.click("#time-now")
    eventually(lambda: not tab.page.is_visible("#time-now"))
    tab.page.keyboard.press("t")
    eventually(lambda: tab.text("timeline") == "")
    tab.page.reload()
    tab.row_with("make step-1")
    assert tab.text("timeline") == "", "it stays away"
    tab.page.keyboard.press("t")
    eventually(lambda: tab.text("timeline"))


@needs_browser
def test_two_fingers_zoom_the_timeline_and_one_moves_it(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="go"), *browser_call(1, tool_response=""))
    tab = open_tab(running)
    tab.row_with("make step-1")
    box = tab.page.query_selector("#timeline-canvas").bounding_box()
    touch = tab.page.context.new_cdp_session(tab.page)

    def fingers(kind: str, *places: float) -> None:
        points = [
            {"x": box["x"] + box["width"] * place, "y": box["y"] + 60, "id": number}
            for number, place in enumerate(places)
        ]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", 0.45, 0.55)
    for step in range(1, 5):
        fingers("touchMove", 0.45 - 0.05 * step, 0.55 + 0.05 * step)
    fingers("touchEnd")
    span = tab.page.evaluate("contextuate.timeline.span")
    assert span == pytest.approx(15 * 60_000 * 0.1 / 0.5, rel=0.1)
    eventually(lambda: tab.page.is_visible("#time-now"), 15, "zoomed around the fingers, not around now")
    to = tab.page.evaluate("contextuate.timeline.to")
    fingers("touchStart", 0.5)
    fingers("touchMove", 0.6)
    fingers("touchMove", 0.7)
    fingers("touchEnd")
    assert tab.page.evaluate("contextuate.timeline.to") < to - span * 0.1
    assert tab.page.evaluate("contextuate.timeline.span") == span


def page_ask(session: str, command: str, use: str = "asked") -> list[dict[str, Any]]:
    """Return a call of Bash that waits for a permission, and its result."""
    call = {"tool_name": "Bash", "tool_input": {"command": command}}
    return [
        payload("PreToolUse", session, tool_use_id=use, **call),
        payload("PermissionRequest", session, **call),
        payload("PostToolUse", session, tool_use_id=use, tool_response="", duration_ms=7, **call),
    ]


HOSTILE = [
    "<script>window.acted = 1</script>",
    "<img src=x onerror='window.acted = 1'>",
    "javascript:window.acted=1",
    '"><svg onload=window.acted=1>',
    "{{constructor.constructor('window.acted=1')()}} ${window.acted=1}",
    "\u202egnihtyna\u202c \u2066x",
    "\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[2J",
]


@needs_browser
def test_nothing_that_an_event_says_can_act(running: RunningMonitor, open_tab: Any) -> None:
    for number, words in enumerate(HOSTILE):
        session = f"s{number}"
        evil = {
            "command": words,
            "file_path": words,
            "description": words,
            "__proto__": {"acted": 1},
            words: words,
        }
        call = {
            "tool_name": words,
            "tool_input": evil,
            "tool_use_id": words,
            "cwd": words,
            "agent_type": words,
        }
        running.emit(
            payload("UserPromptSubmit", session, prompt=words, session_title=words),
            payload("PreToolUse", session, **call),
            payload(
                "PostToolUse", session, tool_response={"stdout": words, "stderr": words, words: words}, **call
            ),
            payload("PreToolUse", session, **{**call, "tool_name": "Bash", "tool_use_id": "b"}),
            payload(
                "PostToolUseFailure",
                session,
                error=words,
                **{**call, "tool_name": "Bash", "tool_use_id": "b"},
            ),
            payload("PreToolUse", session, **{**call, "tool_name": "Edit", "tool_use_id": "e"}),
            payload("Notification", session, message=words, notification_type=words),
            payload(words, session, anything=words),
        )
    tab = open_tab(running)
    eventually(lambda: len(tab.rows()) > 10)
    tab.page.focus("[data-testid=table]")
    tab.page.keyboard.press("g")
    for _ in range(len(HOSTILE) * 6):
        tab.page.keyboard.press("Enter")
        eventually(lambda: "Loading" not in tab.text("drawer") and tab.text("drawer"))
        tab.page.keyboard.press("r")
        tab.page.keyboard.press("r")
        tab.page.keyboard.press("j")
    assert tab.page.evaluate("window.acted === undefined && ({}).acted === undefined")
    assert tab.page.query_selector_all("img, iframe, object, script[src], a[href^='javascript']") == []
    assert len(tab.page.query_selector_all("script")) == 1
    assert tab.rows("<script>") or "<script>" in tab.text("rail")


def browser_told(tab: BrowserTab, **status: Any) -> None:
    """Let the page hear the monitor's status with some fields different, now and each time it tells one."""
    tab.page.evaluate(
        """(fields) => {
          const { store } = contextuate;
          if (!store.differently) {
            const hear = store.apply.bind(store);
            store.differently = {};
            store.apply = (message) =>
              hear(message.type === 'status' ? { ...message, ...store.differently } : message);
          }
          Object.assign(store.differently, fields);
          store.apply({ ...store.status, type: 'status' });
        }""",
        status,
    )


@needs_browser
def test_the_status_view_tells_what_the_monitor_tells(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="first"))
    tab = open_tab(running, "#status")
    tab.shows("status", "local, this machine")
    for words in (cm.__version__, str(running.pid), running.home + "/events", "1 event", "testbox"):
        tab.shows("status", words)
    running.emit(payload("UserPromptSubmit", prompt="second"), payload("Stop"))
    tab.shows("status", "3 events")
    assert "Redis" not in tab.text("status") and tab.text("banner") == ""
    tab.page.keyboard.press("Escape")
    tab.row_with("second")
    assert tab.text("status") == "" and tab.page.evaluate("location.hash") == ""
    tab.page.keyboard.press(str(1 + [view["id"] for view in browser_views(tab)].index("status")))
    tab.shows("status", "Machines")
    assert tab.page.evaluate("location.hash") == "#status"
    tab.page.click("[data-testid=counter-idle]")
    tab.row_with("first")


def browser_views(tab: BrowserTab) -> list[dict[str, str]]:
    """Return the views that the page offers, in their order."""
    return list(tab.page.evaluate(
        "[...document.querySelectorAll('.views button')].map((el) => ({ id: el.dataset.view, name: el.title }))"
    ))  # fmt: skip


@needs_browser
def test_views_are_reached_by_key_click_and_link(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="first"))
    tab = open_tab(running)
    tab.row_with("first")
    views = [view["id"] for view in browser_views(tab)]
    assert views == ["live", "history", "stats", "status"]
    for number, view in enumerate(views[1:], 2):
        tab.page.keyboard.press(str(number))
        eventually(lambda view=view: tab.page.evaluate("location.hash").startswith(f"#{view}"))
        heading = tab.page.inner_text("[data-testid=sheet] h2")
        assert heading == {"history": "History", "stats": "Statistics", "status": "Status"}[view]
        assert tab.page.evaluate("document.querySelectorAll('.views [aria-current]').length") == 1
        link = open_tab(running, tab.page.evaluate("location.hash"))
        eventually(lambda link=link, heading=heading: heading in link.text("sheet"))
        tab.page.keyboard.press("1")
        tab.row_with("first")
    tab.page.click("[data-testid=view-history]")
    eventually(lambda: "History" in tab.text("sheet"))
    tab.page.keyboard.press("Escape")
    tab.row_with("first")


REPLAY_STEP_S = 30


@needs_browser
def test_a_session_is_replayed_as_it_went(running: RunningMonitor, open_tab: Any) -> None:
    start = cm.now_ms() - 3_600_000
    steps = []
    for number in range(6):
        call, result = browser_call(number, tool_response="")
        at = start + number * REPLAY_STEP_S * 1000
        steps += [
            {"hook": call, "id": str(uuid.uuid4()), "timestamp": at, "machineId": "testbox"},
            {"hook": {**result, "duration_ms": 20_000}, "id": str(uuid.uuid4()), "timestamp": at + 20_000,
             "machineId": "testbox"},
        ]  # fmt: skip
    running.emit(*steps)
    tab = open_tab(running, "#s=s1")
    tab.row_with("make step-5")
    tab.page.keyboard.press("y")
    tab.shows("replay", " of 2 min 50 s")
    eventually(lambda: tab.rows(status="running") and not tab.rows("step-3"))
    tab.page.keyboard.press(" ")
    eventually(lambda: tab.page.get_attribute("[data-testid=replay-play]", "aria-label") == "Play")
    assert tab.page.evaluate("location.hash").startswith("#s=s1&replay=")

    def seek(offset_ms: int) -> None:
        tab.page.evaluate(
            """(to) => { const range = document.querySelector('[data-testid=replay] input[type=range]');
              range.value = to; range.dispatchEvent(new Event('input')); }""", offset_ms
        )  # fmt: skip

    seek(70_000)
    eventually(lambda: [row.get_attribute("data-status") for row in sorted(
        tab.rows(), key=lambda row: int(row.get_attribute("aria-rowindex")))] == ["done", "done", "running"])  # fmt: skip
    assert "10 s" in tab.row_with("make step-2").inner_text()
    link = open_tab(running, f"#s=s1&replay={start + 70_000}")
    eventually(lambda: len(link.rows()) == 3 and len(link.rows(status="running")) == 1)
    tab.page.select_option("[data-testid=replay] select", "60")
    seek(0)
    tab.page.keyboard.press(" ")
    eventually(lambda: len(tab.rows(status="done")) == 6, 20, "played to its end")
    tab.page.keyboard.press("Escape")
    eventually(lambda: tab.text("replay") == "" and tab.page.evaluate("location.hash") == "#s=s1")


def browser_press(tab: BrowserTab, part: Any, meanwhile: Any) -> None:
    """Press the middle of a part of the page, and let the button go when something has happened."""
    box = part.bounding_box()
    tab.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.page.mouse.down()
    meanwhile()
    tab.page.mouse.up()


@needs_browser
def test_what_was_pressed_is_clicked_though_events_come_before_the_button_is_let_go(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*(browser_call(number)[0] for number in range(60)))
    tab = open_tab(running, "#s=s1")
    tab.row_with("make step-59")
    counter = itertools.count(60)

    def come() -> None:
        number = next(counter)
        running.emit(*browser_call(number))
        eventually(lambda: f"{number + 1} calls" in tab.page.inner_text("#panehead"))
        tab.row_with(f"make step-{number}")

    browser_press(tab, tab.row_with("make step-59"), come)
    tab.shows("drawer", "make step-59")
    tab.page.keyboard.press("Escape")
    follow = tab.page.query_selector("[aria-label=Follow]")
    browser_press(tab, follow, come)
    eventually(lambda: follow.get_attribute("aria-pressed") == "false")
    come()
    tab.shows("new-count", "1 new")
    browser_press(tab, tab.page.query_selector("[data-testid=new-count] svg"), come)
    eventually(lambda: tab.text("new-count") == "" and follow.get_attribute("aria-pressed") == "true")
    follow.focus()
    tab.page.keyboard.press("Enter")
    eventually(lambda: follow.get_attribute("aria-pressed") == "false")
    come()
    assert tab.page.evaluate("document.activeElement.ariaLabel") == "Follow"


class BrowserWire:
    """A page's connection to the monitor: `cut` takes it away until `mend`."""

    def __init__(self, tab: BrowserTab) -> None:
        self._sides: list[Any] = []
        self._is_cut = False
        tab.page.route_web_socket("**/*", self._opened)
        tab.page.reload()

    def _opened(self, page_side: Any) -> None:
        if self._is_cut:
            page_side.close()
            return
        monitor_side = page_side.connect_to_server()
        page_side.on_message(monitor_side.send)
        monitor_side.on_message(page_side.send)
        self._sides.append(page_side)

    def cut(self) -> None:
        """Close the connection, and every one that is tried."""
        self._is_cut = True
        while self._sides:
            self._sides.pop().close()

    def mend(self, tab: BrowserTab) -> None:
        """Let the page connect again, and wait until it has."""
        self._is_cut = False
        eventually(lambda: browser_store(tab, "store.phase") == "open", 30)


# A page that nobody looks at, whose notifications are kept in `notes`.
BROWSER_UNWATCHED = """
  window.notes = [];
  window.Notification = class { constructor(words) { notes.push(words); } static permission = 'granted'; };
  Document.prototype.hasFocus = () => false;
  localStorage.setItem('contextuate.notify', 'true');
"""


@needs_browser
def test_what_happened_while_the_link_was_away_is_alerted_loaded_and_let_go(
    running: RunningMonitor, open_tab: Any
) -> None:
    start = cm.now_ms() - 3_600_000
    call, result = browser_call(1, "old", tool_response={"stdout": "out of long ago", "stderr": ""})
    hooks = [call, result, *(payload("UserPromptSubmit", "busy", prompt=f"word {n}") for n in range(1100))]
    running.emit(
        *(
            {"hook": hook, "id": f"e{number}", "timestamp": start + number}
            for number, hook in enumerate(hooks)
        ),
        *browser_call(2, "gone"),
    )
    tab = open_tab(running)
    tab.page.add_init_script(BROWSER_UNWATCHED)
    wire = BrowserWire(tab)
    tab.row_with("make step-2")
    wire.cut()
    tab.shows("banner", "Not connected")
    running.emit(payload("PermissionRequest", "busy", tool_name="Bash", tool_input={"command": "rm x"}))
    client = running.websocket("rows")
    client.ask("session_deleted", type="delete_session", sessionId="gone")
    wire.mend(tab)
    eventually(lambda: len(tab.page.evaluate("notes")) == 1, what="the wait is alerted, once")
    eventually(lambda: not tab.rows("make step-2"), what="the deleted session's rows are gone")
    wire.cut()
    tab.page.evaluate("location.hash = '#s=old'")
    wire.mend(tab)
    assert tab.row_with("make step-1").get_attribute("data-status") == "done"
    alone = open_tab(running, "#s0=old&e=e0")
    alone.shows("drawer", "out of long ago")
    assert len(tab.page.evaluate("notes")) == 1


@needs_browser
def test_a_wait_on_a_machine_whose_clock_is_wrong_is_as_long_as_it_is(
    running: RunningMonitor, open_tab: Any
) -> None:
    for session, machine, minutes in (
        ("first", "testbox", 0),
        ("behind", "laptop", -20),
        ("ahead", "desk", 10),
    ):
        events = [
            {"hook": hook, "id": str(uuid.uuid4()), "timestamp": cm.now_ms() + minutes * 60_000 + number,
             "machineId": machine}
            for number, hook in enumerate((
                payload("UserPromptSubmit", session, prompt=session),
                payload("PermissionRequest", session, tool_name="Bash", tool_input={"command": "rm x"}),
            ))
        ]  # fmt: skip
        running.emit(*events)
        time.sleep(1.1)  # so that they can be told apart
    tab = open_tab(running)
    order = ["first", "behind", "ahead"]
    eventually(lambda: [session for session, _ in page_rail(tab)] == order, what="the longest wait first")
    timers = "[...document.querySelectorAll('[data-testid=session] .timer')].map((el) => el.textContent)"
    eventually(
        lambda: all(re.fullmatch(r"\d+ s", words) and words != "0 s" for words in tab.page.evaluate(timers))
    )


@needs_browser
def test_the_details_of_a_deleted_session_are_closed(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*browser_call(1, "s1"), payload("UserPromptSubmit", "s2", prompt="stays"))
    tab = open_tab(running)
    tab.row_with("make step-1").click()
    tab.shows("drawer", "make step-1")
    running.websocket("rows").ask("session_deleted", type="delete_session", sessionId="s1")
    eventually(lambda: tab.text("drawer") == "" and "e=" not in tab.page.evaluate("location.hash"))


@needs_browser
def test_the_keyboard_stays_where_it_is_in_details_replay_and_head(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*browser_call(1), *browser_call(2))
    tab = open_tab(running, "#s=s1")
    focused = "document.activeElement.dataset.act || document.activeElement.id"
    tab.row_with("make step-1").click()
    tab.shows("drawer", "make step-1")
    tab.page.focus(".drawerbody")
    running.emit(browser_call(1, tool_response={"stdout": "here it is", "stderr": ""})[1])
    tab.shows("drawer", "here it is")
    assert tab.page.evaluate(focused) == "body"
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("y")
    tab.shows("replay", " of ")
    skip = tab.page.query_selector("[data-testid=replay] input[type=checkbox]")
    skip.focus()
    tab.page.keyboard.press(" ")
    assert not skip.is_checked()
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("R")
    tab.page.wait_for_selector("dialog[open]")
    left = tab.page.evaluate("(document.querySelector('dialog .first').click(), document.activeElement.id)")
    assert left == "grid", "not the dialog's field until the next frame"
    tab.page.focus("[aria-label='Show all sessions']")
    tab.page.keyboard.press("Enter")
    eventually(lambda: tab.page.evaluate(focused) == "grid")


@needs_browser
def test_a_link_that_changes_while_its_view_is_open_is_followed(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*(payload("UserPromptSubmit", f"s{n}", prompt=f"zebra {n}") for n in range(3)))
    running.emit(*browser_call(1, tool_response={"stdout": "ok", "stderr": ""}))
    eventually(lambda: len(running.get("/api/search?q=zebra")["results"]) == 3)
    tab = open_tab(running, "#history&q=zebra")
    found = "document.querySelectorAll('[data-testid=hit]').length"
    eventually(lambda: tab.page.evaluate(found) == 3)
    tab.page.evaluate("location.hash = '#history&q=step-1'")
    eventually(lambda: tab.page.evaluate(found) == 1 and "make step-1" in tab.text("sheet"))
    (event,) = [one for one in running.stored_events() if one["data"].get("message") == "zebra 1"]
    for _ in range(2):
        tab.page.evaluate(f"location.hash = '#s0=s1&e={event['id']}'")
        tab.shows("drawer", "zebra 1")
        tab.page.keyboard.press("Escape")
        eventually(lambda: tab.text("drawer") == "")


@needs_browser
def test_at_360_pixels_a_replay_is_seen(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*browser_call(1), payload("Stop"))
    tab = open_tab(running, width=360)
    tab.page.click("[data-session-id=s1] [aria-label=Actions]")
    tab.page.click("[data-testid=menu] >> text=Replay")
    tab.shows("replay", "60\u00d7")


@needs_browser
def test_what_the_filter_looks_for_may_come_with_a_result(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*browser_call(1))
    tab = open_tab(running)
    tab.row_with("make step-1")
    tab.page.fill("#filter", "boomerr")
    eventually(lambda: not tab.rows("make step-1"))
    failing = browser_call(1, tool_response="")[1]
    running.emit({**failing, "hook_event_name": "PostToolUseFailure", "error": "boomerr"})
    tab.row_with("make step-1")


@needs_browser
def test_a_replay_that_begins_before_its_session_is_loaded_plays_when_it_is(
    running: RunningMonitor, open_tab: Any
) -> None:
    start = cm.now_ms() - 3_600_000
    running.emit(
        *({"hook": browser_call(number)[0], "id": str(uuid.uuid4()), "timestamp": start + number * 60_000}
          for number in range(3))
    )  # fmt: skip
    held: list[Any] = []

    def hold_pages(page_side: Any) -> None:
        monitor_side = page_side.connect_to_server()

        def pass_on(text: str) -> None:
            held.append(text) if json.loads(text)["type"] == "events" else page_side.send(text)

        page_side.on_message(monitor_side.send)
        monitor_side.on_message(pass_on)
        held.append(page_side)

    tab = open_tab(running, "#s=s1")
    tab.page.route_web_socket("**/*", hold_pages)
    tab.page.reload()
    tab.row_with("make step-2")
    page_side, page_of_rows = eventually(lambda: held if len(held) == 2 else None)
    tab.page.keyboard.press("y")
    tab.shows("replay", "Loading\u2026")
    tab.page.evaluate("new Promise((seen) => requestAnimationFrame(() => requestAnimationFrame(seen)))")
    page_side.send(page_of_rows)
    tab.shows("replay", " of 2 min")
    eventually(lambda: tab.rows("step-1") and not tab.rows("step-2"), what="it plays")


REDIS_AWAY = {
    "state": "waiting", "server": "cache:6379/0", "tls": True, "channel": "contextuate:events",
    "stream": "contextuate:events:stream", "attempt": 3, "maxRetries": 10, "reason": "connection refused",
    "since": NOW_MS, "nextAttemptAt": NOW_MS, "lastHeardAt": NOW_MS, "position": "1-0", "streamState": "ok",
    "streamReason": None, "gaps": 0, "received": 7, "fromStream": 2,
}  # fmt: skip


@needs_browser
def test_what_is_wrong_with_redis_is_said_in_words(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="first"))
    tab = open_tab(running)
    tab.row_with("first")
    assert tab.text("banner") == "" and tab.text("loss") == ""
    sent: list[str] = []
    tab.page.on("websocket", lambda channel: channel.on("framesent", lambda text: sent.append(text)))
    tab.page.reload()
    tab.row_with("first")
    away = problem("redis", "Redis does not answer (attempt 3 of 10).", "Start it.")
    browser_told(tab, redis=REDIS_AWAY, problems=[away])
    tab.shows("banner", "Redis does not answer (attempt 3 of 10).")
    assert tab.page.get_attribute("[data-testid=banner] span", "title") == "Start it."
    tab.page.click("[data-testid=banner] >> text=Reconnect")
    eventually(lambda: any('"reconnect_redis"' in text for text in sent))
    given_up = {**REDIS_AWAY, "state": "given_up", "attempt": 10}
    browser_told(tab, redis=given_up, problems=[problem("redis", "Redis did not answer 10 times.")])
    tab.shows("banner", "Redis did not answer 10 times.")
    tab.page.click("[data-testid=banner] >> text=Reconnect")
    lost = [
        problem("spool", "The spool was full."),
        problem("gaps", "The stream was cut.", "Make it longer."),
    ]
    browser_told(
        tab, redis={**REDIS_AWAY, "state": "connected", "attempt": 0, "gaps": 2},
        spool={"segments": 1, "bytes": 10, "dropped": 5},
        problems=[problem("stream", "Redis refuses the stream."), problem("new kind", "Whatever."), *lost],
    )  # fmt: skip
    tab.shows("banner", "Redis refuses the stream.")
    tab.shows("banner", "Whatever.")
    tab.shows("loss", "5 events lost, 2 gaps")
    for words in ("does not answer", "Reconnect", "was full", "was cut"):
        assert words not in tab.text("banner"), words
    tab.page.click("[data-testid=loss]")
    for words in ("The spool was full.", "The stream was cut. Make it longer.", "Whatever."):
        tab.shows("status", words)


def problem(kind: str, words: str, advice: str = "") -> dict[str, str]:
    """Return a problem as the status tells it."""
    return {"kind": kind, "level": "warn", "words": words, "advice": advice}


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1024, 1440])
def test_the_page_fits_every_width(
    shared_demo: RunningMonitor, open_tab: Any, width: int, scheme: str
) -> None:
    tab = open_tab(shared_demo, width=width, scheme=scheme)
    eventually(lambda: tab.page.query_selector("[data-testid=session]"))
    assert tab.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    folder = os.environ.get("CONTEXTUATE_SCREENSHOTS")
    if folder:
        tab.page.wait_for_timeout(500)
        tab.page.screenshot(path=f"{folder}/{scheme}-{width}.png")
        tab.page.click("[data-testid=session]")
        tab.page.wait_for_timeout(500)
        tab.page.screenshot(path=f"{folder}/{scheme}-{width}-session.png")


@pytest.fixture(scope="module")
def shared_demo() -> Iterator[RunningMonitor]:
    """A running monitor with the demo in it."""
    made = RunningMonitor(new_home()).start()
    made.command("demo", "--live", "0")
    yield made
    clean_up(made)


def page_rail(tab: BrowserTab) -> list[tuple[str, str]]:
    """Return the sessions of the rail, from the top: id and state."""
    found = tab.page.evaluate(
        "[...document.querySelectorAll('[data-testid=session]')]"
        ".map((el) => [el.dataset.sessionId, el.dataset.state])"
    )
    return [(session, state) for session, state in found]


def page_counts(tab: BrowserTab) -> dict[str, int]:
    """Return the numbers of the counters in the top bar, -1 where it says "?"."""
    found = tab.page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.counter')].map((el) => "
        "[el.dataset.testid.slice(8), Number(el.querySelector('b').textContent.replace('?', '-1'))]))"
    )
    return {name: int(number) for name, number in found.items()}


@needs_browser
def test_the_title_and_the_rail_tell_who_waits_the_longest_wait_first(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*(payload("UserPromptSubmit", session, prompt=session) for session in ("a", "b", "c")))
    tab = open_tab(running)
    eventually(lambda: page_counts(tab)["working"] == 3)
    assert tab.page.title() == "Contextuate Monitor"
    for number, session in enumerate(("c", "a"), 1):
        since = {name: value["stateSince"] for name, value in running.sessions().items()}
        eventually(lambda since=since: cm.now_ms() > max(since.values()) + 1)  # two waits, two times
        running.emit(*page_ask(session, f"rm {session}")[:2])
        eventually(lambda number=number: tab.page.title() == f"({number}) Contextuate Monitor")
    eventually(lambda: page_rail(tab) == [("c", "waiting"), ("a", "waiting"), ("b", "working")])
    assert "Allow Bash: rm c" in tab.page.inner_text("[data-session-id=c]")
    assert "Needs you" in tab.text("rail") and tab.text("rail").index("Needs you") < tab.text("rail").index(
        "Working"
    )
    tab.page.click("[data-testid=counter-waiting]")
    eventually(lambda: [session for session, _ in page_rail(tab)] == ["c", "a"])
    tab.page.click("[data-testid=counter-waiting]")
    eventually(lambda: len(page_rail(tab)) == 3)
    running.emit(page_ask("c", "rm c")[2])
    eventually(lambda: page_rail(tab)[0] == ("a", "waiting") and ("c", "working") in page_rail(tab))
    assert tab.page.title() == "(1) Contextuate Monitor"
    running.emit(page_ask("a", "rm a")[2])
    eventually(lambda: tab.page.title() == "Contextuate Monitor" and page_counts(tab)["waiting"] == 0)


@needs_browser
def test_counters_tell_what_the_monitor_tells_and_filters_can_be_taken_back(
    running: RunningMonitor, open_tab: Any
) -> None:
    for session, last in {"w": None, "i": "Stop", "f": "StopFailure", "e": "SessionEnd"}.items():
        running.emit(payload("UserPromptSubmit", session, prompt=f"work of {session}"))
        if last:
            running.emit(payload(last, session, error="server_error", reason="logout"))
    running.emit(*page_ask("n", "rm x")[:2])
    told = collections.Counter(session["state"] for session in running.sessions().values())
    assert told == {"working": 1, "idle": 1, "failed": 1, "ended": 1, "waiting": 1}
    tab = open_tab(running)
    eventually(lambda: page_counts(tab) == {**dict.fromkeys(page_counts(tab), 0), **told})
    for state, session in {"working": "w", "idle": "i", "failed": "f", "ended": "e"}.items():
        tab.page.click(f"[data-testid=counter-{state}]")
        eventually(lambda session=session: [name for name, _ in page_rail(tab)] == [session])
        tab.row_with(f"work of {session}")
        assert {row.query_selector(".c-session").inner_text() for row in tab.rows()} == {f"work of {session}"}
        tab.page.keyboard.press("Escape")
        eventually(lambda: len(page_rail(tab)) == 5)
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("no such words")
    eventually(lambda: "No loaded row has \u201cno such words\u201d" in tab.page.inner_text("#tablenote"))
    again = open_tab(running, tab.page.evaluate("location.hash"))
    eventually(lambda: "no such words" in again.page.inner_text("#tablenote"), 15, "the link keeps the words")
    tab.page.keyboard.press("Escape")
    tab.row_with("work of w")


@needs_browser
def test_what_one_tab_does_every_tab_shows(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*(payload("UserPromptSubmit", name, prompt=f"work of {name}") for name in ("one", "two")))
    acting, watching = open_tab(running), open_tab(running)
    eventually(lambda: len(page_rail(watching)) == 2)
    watching.page.click("[data-session-id=one]")
    for words, key in (("Rename", "named elsewhere"), ("Pin", None), ("Delete", None)):
        acting.page.click("[data-session-id=one]", button="right")
        acting.page.click(f"[data-testid=menu] >> text={words}")
        if key:
            acting.page.fill("dialog input", key)
            acting.page.keyboard.press("Enter")
            watching.shows("rail", key)
            eventually(lambda: "named elsewhere" in watching.page.title())
        elif words == "Pin":
            eventually(lambda: page_rail(watching)[0][0] == "one")
        else:
            acting.page.click("dialog button.danger")
    eventually(lambda: [session for session, _ in page_rail(watching)] == ["two"])
    eventually(lambda: watching.page.evaluate("location.hash") == "", 15, "the deleted session is left")
    watching.row_with("work of two")
    assert "one" not in running.sessions()


@needs_browser
def test_a_parent_is_set_in_the_menu_and_the_child_stands_below_it(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*(payload("UserPromptSubmit", name, prompt=f"work of {name}") for name in ("top", "below")))
    tab = open_tab(running)
    for chosen, parent in (("top", "top"), ("", None)):
        tab.page.click("[data-session-id=below]", button="right")
        tab.page.click("[data-testid=menu] >> text=Set parent")
        options = tab.page.evaluate("[...document.querySelectorAll('dialog option')].map((el) => el.value)")
        assert options == ["", "top"], "not itself"
        tab.page.select_option("dialog select", chosen)
        tab.page.click("dialog button.first")
        eventually(lambda parent=parent: running.sessions()["below"]["parentSessionId"] == parent)
        child = "[data-session-id=below].child"
        eventually(lambda child=child, parent=parent: bool(tab.page.query_selector(child)) == bool(parent))
        if parent:
            assert [session for session, _ in page_rail(tab)] == ["top", "below"]


def browser_store(tab: BrowserTab, expression: str) -> Any:
    """Look something up in what the page keeps."""
    return tab.page.evaluate(f"(() => {{ const store = window.contextuate.store; return {expression}; }})()")


def browser_fits(tab: BrowserTab) -> bool:
    """Tell whether nothing sticks out at the right of the page or of a pane."""
    return bool(
        tab.page.evaluate(
            """() => [document.documentElement, document.body, ...document.querySelectorAll(
            '.topbar, .banner, .panes, .rail, .tree, .tablepane, .grid, .panehead, .drawer, .drawerbody'
            )].every((part) => part.clientWidth === 0 || part.scrollWidth <= part.clientWidth)"""
        )
    )


BROWSER_DRAWERS = [
    ("simple", "Bash", "echo hello", ["Say hello", "echo hello", "Output\nCopy\nhello", "24 ms"]),
    ("simple", "Write", "note.txt", ["note.txt", "1\nline one\n2\nline two"]),
    ("simple", "Read", "note.txt", ["note.txt", "1\nline one\n2\nline two"]),
    ("simple", "Edit", "note.txt", ["note.txt", "+1 \u22121", "\u2212\nline two", "+\nline 2"]),
    ("simple", "Prompt", "do it", ["[[scn:simple]] please do it"]),
    ("failing", "Bash", "exit 3", ["A failing command", "Exit code 3", "out\nerr", "failed"]),
    ("failing", "Bash", "sleep 5", ["Exit code 143", "Command timed out after 1s", "1.0 s"]),
    ("failing", "Read", "does-not-exist.txt", ["File does not exist"]),
    ("tasks", "TaskCreate", "", ["Task 1", "First task", "Do the first thing"]),
    ("tasks", "TaskUpdate", "", ["Task 1", "in_progress \u2192 completed"]),
    ("mcp", "demo \u203a echo", "", ["hello mcp", "echo: hello mcp"]),
    ("mcp", "demo \u203a fail", "", ["boom", "fail: boom", "failed"]),
    ("mcp", "Question", "Your name?", ["Your name?", "demo"]),
    ("i-misc", "AskUserQuestion", "", ["Color", "Red or blue?", "Red", "Blue"]),
    ("i-misc", "Permission asked", "", ["AskUserQuestion", "Red or blue?"]),
    ("subagent", "Agent", "inner job", ["general-purpose", "do the inner job", "Inner result: 42", "Totals"]),
    ("v2.0.77-subagent", "Task", "", ["do it", "Inner result: 42", "3,608"]),
    ("bgbash", "Bash", "bg-finished", ["Runs in the background as bpqoxp5ye"]),
    ("p-perm", "Write", "perm.txt", ["you haven't granted it yet"]),
    ("apierror529", "Turn failed", "", ["server_error", "529 fake: Overloaded"]),
    ("large", "Bash", "print('x'*1000000)", ["1 MB of output", "xxxxxxxx", "The whole output is in"]),
    ("large", "Read", "lines.txt", ["lines.txt", "Show 500 more of"]),
]


def browser_rows_are_of(tab: BrowserTab, session: str) -> bool:
    """Tell whether the table shows no row of another session."""
    rows = "[...document.querySelectorAll('[data-testid=row]:not([hidden])')]"
    return bool(
        browser_store(tab, f"{rows}.every((row) => store.byId.get(row.dataset.eventId).sid === '{session}')")
    )


def browser_row_of(tab: BrowserTab, tool: str, words: str) -> Any:
    """Return the last row of one tool, or of one kind of event, with these words."""

    def found() -> Any:
        rows = [row for row in tab.rows(words) if row.query_selector(".c-tool").inner_text() == tool]
        last = max(rows, key=lambda row: int(row.get_attribute("aria-rowindex")), default=None)
        return last and last.get_attribute("data-event-id")

    return tab.row_of(eventually(found, 30, f"a row {tool} {words}"))


@pytest.fixture(scope="module")
def browser_recordings() -> Iterator[RunningMonitor]:
    """A running monitor into which one of each recording that the drawer is shown for was played."""
    made = RunningMonitor(new_home()).start()
    for name in dict.fromkeys(name for name, *_ in BROWSER_DRAWERS):
        made.emit(*({**event, "session_id": name.replace(".", "-")} for event in recorded(name)))
    yield made
    clean_up(made)


@needs_browser
def test_the_drawer_shows_of_every_kind_what_a_person_wants(
    browser_recordings: RunningMonitor, open_tab: Any
) -> None:
    tab = open_tab(browser_recordings)
    eventually(lambda: browser_store(tab, "store.loaded"))  # until then it may write the link of its own view
    for name, tool, words, wanted in BROWSER_DRAWERS:
        session = name.replace(".", "-")
        tab.page.evaluate(f"location.hash = 's={session}'")
        eventually(lambda session=session: browser_rows_are_of(tab, session))
        browser_row_of(tab, tool, words).click()
        for each in wanted:
            eventually(
                lambda each=each: each in tab.text("drawer"), 10, f"{name}: {each!r} for {tool} {words}"
            )
        tab.page.keyboard.press("Escape")
    browser_row_of(tab, "Read", "lines.txt").click()
    assert "\n777\n" not in tab.text("drawer")
    tab.page.click(".showmore >> nth=0")
    eventually(lambda: "\n777\n" in tab.text("drawer"))


@needs_browser
def test_an_event_that_the_monitor_cannot_read_is_not_loading_for_ever(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*browser_call(1))

    def refuse_details(page_side: Any) -> None:
        monitor_side = page_side.connect_to_server()
        monitor_side.on_message(page_side.send)

        def pass_on(text: str) -> None:
            asked = json.loads(text)["type"]
            error = {"type": "error", "request": asked, "message": "could not be read: an I/O error"}
            page_side.send(json.dumps(error)) if asked == "get_event_detail" else monitor_side.send(text)

        page_side.on_message(pass_on)

    tab = open_tab(running)
    tab.page.route_web_socket("**/*", refuse_details)
    tab.page.reload()
    tab.row_with("make step-1").click()
    tab.shows("drawer", "The monitor cannot read this event")
    assert "make step-1" in tab.text("drawer")


@needs_browser
def test_colours_of_a_terminal_are_colours_and_no_text(running: RunningMonitor, open_tab: Any) -> None:
    words = "\x1b[31mred\x1b[0m \x1b[1;32mgreen\x1b[0m \x1b[38;5;208morange\x1b[0m plain"
    words += " \x1b]0;title\x07end\x1b[2J"
    running.emit(*browser_call(1, tool_response={"stdout": words, "stderr": ""}))
    tab = open_tab(running)
    tab.row_with("make step-1").click()
    tab.shows("drawer", "red green orange plain end")
    found = tab.page.evaluate(
        "[...document.querySelectorAll('.drawer .block span')]"
        ".map((el) => [el.textContent, getComputedStyle(el).color])"
    )
    assert [text for text, _ in found] == ["red", "green", "orange"]
    assert found[2][1] == "rgb(255, 135, 0)" and len({colour for _, colour in found}) == 3


@needs_browser
def test_rows_stay_where_they_are_while_others_come_above_and_below(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*[event for number in range(1200) for event in browser_call(number, tool_response="")])
    tab = open_tab(running)
    tab.row_with("make step-1199")
    oldest = browser_store(tab, "store.rows[0].seq")
    tab.page.hover("[data-testid=table]")
    tab.page.mouse.wheel(0, -100_000)
    eventually(lambda: browser_store(tab, "store.rows[0].seq") < oldest, 15, "an older page")
    eventually(lambda: not browser_store(tab, "store.loadingOlder"))

    def at_top() -> list[str]:
        return sorted(row.inner_text() for row in tab.rows("step") if row.bounding_box()["y"] < 400)

    tab.page.mouse.wheel(0, 1300)
    tab.page.wait_for_timeout(200)
    before = at_top()
    assert before and not any("step-1199" in text for text in before)
    running.emit(*browser_call(5000), *browser_call(5001))
    tab.shows("new-count", "2 new")
    assert at_top() == before
    tab.page.click("[data-testid=new-count]")
    tab.row_with("make step-5001")
    assert tab.text("new-count") == ""


@needs_browser
def test_the_keyboard_reaches_sessions_menus_and_who_waits(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        payload("UserPromptSubmit", "busy", prompt="busy work"),
        payload("UserPromptSubmit", "asks", prompt="clean up"),
        payload("PreToolUse", "asks", **BROWSER_ASK),
        payload("PermissionRequest", "asks", tool_name="Bash", tool_input=BROWSER_ASK["tool_input"]),
    )
    tab = open_tab(running)
    eventually(lambda: tab.page.query_selector("[data-session-id=asks][data-state=waiting]"))
    tab.page.keyboard.press("n")
    eventually(lambda: "asks" in tab.page.evaluate("location.hash"))
    eventually(lambda: not tab.rows("busy work"))
    tab.page.keyboard.press("m")
    tab.shows("menu", "Rename")
    tab.page.keyboard.press("ArrowDown")
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.type("By keys")
    tab.page.keyboard.press("Enter")
    eventually(lambda: running.sessions()["asks"]["label"] == "By keys")
    tab.page.keyboard.press("Escape")
    eventually(lambda: tab.page.evaluate("location.hash") == "")
    tab.page.focus("[data-testid=rail]")
    for key in ("Home", "ArrowDown", "ArrowDown", "Enter"):
        tab.page.keyboard.press(key)
    eventually(lambda: "s=asks" in tab.page.evaluate("location.hash"))


@needs_browser
def test_a_phone_shows_one_pane_at_a_time_and_everything_fits(
    shared_demo: RunningMonitor, open_tab: Any
) -> None:
    tab = open_tab(shared_demo, width=360)
    tab.shows("banner", "demo --remove")
    assert tab.page.query_selector("[data-testid=banner]").bounding_box()["height"] < 40, "one line"
    tab.page.click("text=Got it")
    eventually(lambda: tab.text("banner") == "")
    tab.page.reload()
    eventually(lambda: tab.page.query_selector("[data-testid=session]"))
    eventually(lambda: browser_store(tab, "store.status !== null"))
    assert tab.text("banner") == "" and browser_fits(tab)
    tab.page.click("[data-testid=session]")
    eventually(tab.rows)
    assert tab.text("rail") == "" and browser_fits(tab)
    for name in ("Edit", "Bash", "Prompt"):
        tab.rows(name)[0].click()
        tab.shows("drawer", name)
        eventually(lambda: "Loading" not in tab.text("drawer"))
        assert browser_fits(tab), name
        tab.page.click("[aria-label='Close (Esc)']")
        eventually(lambda: tab.text("drawer") == "")
    tab.page.click("[aria-label='Back to the sessions']")
    eventually(lambda: tab.text("rail"))
    assert not tab.rows()


@needs_browser
@pytest.mark.parametrize("width", [1024, 1440])
def test_nothing_sticks_out_with_the_drawer_open(
    shared_demo: RunningMonitor, open_tab: Any, width: int
) -> None:
    tab = open_tab(shared_demo, width=width)
    eventually(lambda: len(tab.rows()) > 5)
    tab.rows()[-2].click()
    eventually(lambda: tab.text("drawer") and "Loading" not in tab.text("drawer"))
    assert browser_fits(tab)


BROWSER_ASK = {"tool_name": "Bash", "tool_input": {"command": "rm -rf build"}, "tool_use_id": "asked"}


BROWSER_WATCH = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) => violations.push(event.violatedDirective));
window.strange = new Set();
const known = new Set(`HTML HEAD BODY META TITLE LINK STYLE SCRIPT HEADER MAIN ASIDE SECTION DIV SPAN LABEL
  INPUT BUTTON I B H1 H2 H3 P OL UL LI CODE SMALL DL DT DD svg path CANVAS DIALOG SELECT
  OPTION KBD HR PROGRESS NAV TABLE THEAD TBODY TR TH TD H4 BLOCKQUOTE STRONG EM S`.split(/\\s+/));
function look(node) {
  if (node.nodeType !== 1) return;
  for (const el of [node, ...node.querySelectorAll('*')]) {
    if (!known.has(el.tagName)) strange.add(el.tagName);
    for (const { name } of el.attributes)
      if (/^(on|href|src|action|formaction)/i.test(name) && el.tagName !== 'LINK') strange.add(name);
  }
}
const seen = new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach(look)));
seen.observe(document, { childList: true, subtree: true });
"""


@needs_browser
def test_names_that_come_from_events_and_people_are_only_ever_text(
    running: RunningMonitor, open_tab: Any, chromium: Any
) -> None:
    deep = {
        "__proto__": {"acted": 1},
        "constructor": {"prototype": {"acted": 1}},
        "toString": "x",
        "hasOwnProperty": 1,
    }
    sessions = {f"evil-{number}{words}": words for number, words in enumerate(HOSTILE)}
    for session, words in sessions.items():
        each = {
            "cwd": words,
            "transcript_path": words,
            "model": words,
            "agent_id": words,
            "agent_type": words,
        }
        call = {
            "tool_name": words,
            "tool_input": {**deep, words: {words: [words, deep]}},
            "tool_use_id": words,
            **each,
        }
        question = {
            "question": words,
            "header": words,
            "options": [{"label": words, "description": words}, deep],
        }
        ask = {
            "tool_name": "AskUserQuestion",
            "tool_use_id": "q",
            "tool_input": {"questions": [question, words]},
        }
        items = [
            {"content": words, "status": words},
            {"content": words, "status": "constructor"},
            words,
            None,
            1,
        ]
        todos = {"todos": items}
        edit = {"file_path": words, "old_string": words}
        patch = {"tool_response": {"structuredPatch": [{"lines": [words, "+" + words, 7]}, words, None]}}
        running.emit(
            payload("SessionStart", session, source=words, **each),
            payload("UserPromptSubmit", session, prompt=words, cwd=words),
            payload("PreToolUse", session, **call),
            payload("PostToolUse", session, **call, tool_response=[deep, words], usage=deep, __proto__=deep),
            payload("PreToolUse", session, **ask),
            payload("PermissionRequest", session, **ask, permission_suggestions=[deep, words]),
            payload("PreToolUse", session, tool_name="TodoWrite", tool_use_id="t", tool_input=todos),
            payload("PostToolUse", session, tool_name="Edit", tool_use_id="e", tool_input=edit, **patch),
            payload("Stop", session, last_assistant_message=f"# {words}\n- {words}\n[{words}]({words})"),
            payload("StopFailure", session, error=words, error_details=words),
            payload("__proto__", session, **{"__proto__": words, words: deep}),
            payload("constructor", session, message=deep),
        )  # fmt: skip
    client = running.websocket("rows")
    for session, words in sessions.items():
        client.send(type="rename_session", sessionId=session, label=words)
    eventually(lambda: all(session["labelSource"] == "user" for session in running.sessions().values()))
    client.close()
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    context.add_init_script(BROWSER_WATCH)
    tab = BrowserTab(context.new_page(), running.url)
    tab.page.on("console", lambda message: tab.said.append(message.text))
    tab.page.on("pageerror", lambda error: tab.said.append(f"error: {error}"))
    tab.page.on("dialog", lambda dialog: tab.said.append(f"dialog: {dialog.message}"))
    try:
        tab.page.goto(running.url.replace("127.0.0.1", "localhost"))
        eventually(lambda: len(tab.rows()) > 20)
        rail = tab.text("rail")
        assert "<script>window.acted = 1</script>" in rail and "{{constructor.constructor" in rail
        assert "\u202e" not in tab.page.inner_text("body") and "\x1b" not in tab.page.inner_text("body")
        for item in tab.page.query_selector_all("[data-testid=session]")[: len(HOSTILE)]:
            item.click()
            tab.page.focus("[data-testid=table]")
            tab.page.keyboard.press("g")
            for _ in range(10):
                tab.page.keyboard.press("Enter")
                eventually(lambda: tab.text("drawer") and "Loading" not in tab.text("drawer"))
                assert "unusual form" not in tab.text("drawer")
                tab.page.keyboard.press("j")
            assert "\u202e" not in tab.page.inner_text("body")
            tab.page.keyboard.press("m")
            tab.page.click("[data-testid=menu] >> text=Delete")
            tab.page.click("dialog >> text=Cancel")
            tab.page.keyboard.press("m")
            tab.page.click("[data-testid=menu] >> text=Set parent")
            tab.page.click("dialog >> text=Cancel")
        assert tab.page.evaluate("[window.acted ?? null, ({}).acted ?? null, [...strange], violations]") == [
            None, None, [], [],
        ]  # fmt: skip
        assert tab.said == []
        refused = (
            "(() => { try { document.body.innerHTML = '<i></i>'; } catch (error) { return error.name; } })()"
        )
        assert tab.page.evaluate(refused) == "TypeError", "the browser itself takes no text for markup"
        assert tab.page.evaluate("violations") == ["require-trusted-types-for"]
    finally:
        context.close()


MARKDOWN = """# What I did

Fixed **all** of it, see `totals.ts` and [the notes](javascript:alert(1)).

- first
  - nested *one*
1. step

> quoted

| file | lines |
|---|---|
| a.ts | 3 |

```ts
const a = '<b>not bold</b>';
```
"""


@needs_browser
def test_an_answer_is_formatted_text_and_nothing_to_click(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(payload("UserPromptSubmit", prompt="go"), payload("Stop", last_assistant_message=MARKDOWN))
    tab = open_tab(running)
    tab.row_with("What I did").click()
    tab.shows("drawer", "Fixed all of it, see totals.ts and the notes (javascript:alert(1)).")
    found = tab.page.evaluate(
        """Object.fromEntries(['h4', 'strong', 'p code', 'ul li', 'ul ul em', 'ol li', 'blockquote', 'td', '.block']
          .map((name) => [name, (document.querySelector('.drawer .md ' + name) || {}).textContent]))"""
    )
    assert found == {
        "h4": "What I did", "strong": "all", "p code": "totals.ts", "ul li": "firstnested one", "ul ul em": "one",
        "ol li": "step", "blockquote": "quoted", "td": "a.ts", ".block": "const a = '<b>not bold</b>';",
    }  # fmt: skip
    assert tab.page.query_selector_all(".drawer :is(a, b, img)") == []
    assert tab.page.evaluate("contextuate.markdownBlocks('*'.repeat(1e6) + '_'.repeat(1e6)).length") == 1


@needs_browser
def test_a_call_that_started_an_agent_leads_to_it(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*recorded("subagent"))
    tab = open_tab(running)
    browser_row_of(tab, "Agent", "inner job").click()
    tab.page.click("[data-testid=jump]")
    eventually(lambda: "a=" in tab.page.evaluate("location.hash"))
    agents = {row.query_selector(".c-session").inner_text() for row in tab.rows()}
    assert len(agents) == 1


@needs_browser
def test_keys_act_on_the_session_that_is_shown(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*(payload("UserPromptSubmit", name, prompt=f"work of {name}") for name in ("one", "two")))
    tab = open_tab(running, "#s=one")
    tab.row_with("work of one")
    tab.page.keyboard.press("P")
    eventually(lambda: running.sessions()["one"]["isPinned"])
    tab.page.keyboard.press("R")
    tab.page.fill("dialog input", "named")
    tab.page.keyboard.press("Enter")
    eventually(lambda: running.sessions()["one"]["label"] == "named")
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.keyboard.press("C")
    eventually(lambda: tab.page.evaluate("navigator.clipboard.readText()") == "claude --resume one")
    tab.page.keyboard.press("H")
    eventually(lambda: running.sessions()["one"]["hidden"])
    assert not running.sessions()["two"]["hidden"]


WATCH_ALERTS = """
window.told = [];
window.Notification = class extends Notification {
  constructor(title, options) { super(title, options); told.push([title, options.body]); }
};
document.hasFocus = () => false;
const make = AudioContext.prototype.createOscillator;
AudioContext.prototype.createOscillator = function () { told.push('tone'); return make.call(this); };
"""


@needs_browser
def test_one_more_that_needs_a_person_is_told_by_notification_and_sound_once_wanted(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(payload("UserPromptSubmit", "quiet", prompt="quiet work"), *page_ask("quiet", "rm a")[:2])
    tab = open_tab(running)
    tab.page.context.grant_permissions(["notifications"])
    tab.page.add_init_script(WATCH_ALERTS)
    tab.page.reload()
    tab.row_with("rm a")
    running.emit(payload("UserPromptSubmit", "first", prompt="first work"), *page_ask("first", "rm b")[:2])
    eventually(lambda: tab.page.title() == "(2) Contextuate Monitor")
    assert tab.page.evaluate("told") == [], "nobody asked for alerts"
    icon = "decodeURIComponent(document.querySelector('link[rel=icon]').href)"
    assert ">2</text>" in tab.page.evaluate(icon), "the number stands in the tab's icon too"
    tab.page.click("[data-testid=alerts]")
    tab.page.click("[data-testid=menu] >> text=Notify")
    tab.page.click("[data-testid=menu] >> text=Sound")
    eventually(lambda: tab.page.evaluate("told") == ["tone", "tone"], 15, "the sound is tried out")
    tab.page.keyboard.press("Escape")
    running.emit(payload("UserPromptSubmit", "next", prompt="next work"), *page_ask("next", "rm -rf c")[:2])
    wanted = ["next work needs you", "Allow Bash: rm -rf c\ntestbox"]
    eventually(lambda: wanted in tab.page.evaluate("told"))
    running.emit(payload("Notification", "next", message="still", notification_type="permission_prompt"))
    tab.row_with("still")
    assert tab.page.evaluate("told") == ["tone", "tone", "tone", "tone", wanted], "each is told once"


@needs_browser
def test_a_redis_that_comes_back_is_reconnected_from_the_page(make: Any, open_tab: Any) -> None:
    server = make(RedisServer)
    machine = make(
        RedisMachine, config={**server.settings(), "redis": {"port": server.port, "maxRetries": 1}}
    )
    server.stop()
    machine.start()
    machine.wait_until("given_up")
    tab = open_tab(machine)
    tab.shows(
        "banner", "Redis did not answer, and the monitor no longer tries (attempt 1 of 1): nothing answers at"
    )
    other = open_tab(machine, "#status")
    other.shows("status", "given up")
    server.start()
    tab.page.click("[data-testid=banner] >> text=Reconnect")
    eventually(lambda: tab.text("banner") == "")
    other.shows("status", "connected")
    machine.say("after", "from-redis")
    eventually(lambda: tab.page.query_selector("[data-session-id=from-redis]"), 30)
    other.shows("status", "1 event")


@needs_browser
def test_history_finds_what_is_stored_and_opens_it(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        payload("UserPromptSubmit", "one", prompt="rename the zebra column"),
        *browser_call(1, "one", tool_response={"stdout": "zebra crossing"}),
        *browser_call(2, "two", tool_response={"stdout": "nothing"}),
        payload("Stop", "one", last_assistant_message="The <b>zebra</b> is renamed"),
    )
    eventually(lambda: running.get("/api/search?q=zebra")["results"], what="the index to know it")
    tab = open_tab(running, "#history&q=zebra")

    def hits() -> list[str]:
        return [hit.inner_text() for hit in tab.page.query_selector_all("[data-testid=hit]")]

    eventually(lambda: len(hits()) == 3)
    assert (
        tab.page.evaluate("[...document.querySelectorAll('.hit mark')].map((el) => el.textContent)")
        == ["zebra"] * 3
    )
    assert "<b>" in hits()[0], "text stays text"
    tab.page.select_option("[aria-label=Kind]", "tool_result")
    eventually(lambda: len(hits()) == 1)
    tab.page.click("[data-testid=hit]")
    tab.shows("drawer", "zebra crossing")
    link = tab.page.evaluate("location.hash")
    assert "q=zebra" in link and "type=tool_result" in link and "e=" in link
    other = open_tab(running, link)
    other.shows("drawer", "zebra crossing")
    tab.page.select_option("[aria-label=Kind]", "")
    eventually(lambda: len(hits()) == 3)
    tab.page.keyboard.press("Escape")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type(" crossing")
    eventually(lambda: len(hits()) == 1)
    tab.page.keyboard.press("Enter")
    tab.page.keyboard.press("j")
    tab.shows("drawer", "zebra crossing")
    tab.page.keyboard.press("/")
    tab.page.fill("[data-testid=history-query]", "no such words")
    tab.shows("sheet", "Nothing stored fits")
    tab.page.fill("[data-testid=history-query]", "zebra")
    eventually(lambda: len(hits()) == 3)
    tab.page.select_option("[aria-label='State now']", "working")
    tab.shows("sheet", "Nothing stored fits")
    assert "state=working" in tab.page.evaluate("location.hash")
    tab.page.select_option("[aria-label='State now']", "idle")
    eventually(lambda: len(hits()) == 3)
    tab.page.select_option("[aria-label='State now']", "")
    eventually(lambda: len(hits()) == 3)
    tab.page.select_option("[aria-label=Time]", "custom")
    tab.page.fill("[aria-label=To]", "2020-01-01T00:00")
    tab.page.press("[aria-label=To]", "Tab")
    tab.shows("sheet", "Nothing stored fits")
    tab.page.fill("[aria-label=From]", "2020-01-01T00:00")
    tab.page.fill("[aria-label=To]", "2099-01-01T00:00")
    tab.page.press("[aria-label=To]", "Tab")
    eventually(lambda: len(hits()) == 3)
    assert "when=custom&from=" in tab.page.evaluate("location.hash")
    tab.page.select_option("[aria-label=Time]", "")
    tab.page.fill("[data-testid=history-query]", "")
    eventually(lambda: len(hits()) == 4, 15, "no words: everything, a call and its result as one")


@needs_browser
def test_what_sessions_do_takes_the_keyboards_place_from_no_hit_and_no_session(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(*(payload("UserPromptSubmit", f"s{n}", prompt=f"word {n}") for n in range(5)))
    eventually(lambda: len(running.get("/api/search?q=word")["results"]) == 5)
    tab = open_tab(running, "#history&q=word")
    tab.page.focus("[data-testid=hit] >> nth=2")
    focused = tab.page.evaluate("document.activeElement.innerText")
    running.emit(payload("Stop", "s0"), payload("UserPromptSubmit", "s9", prompt="another"))
    eventually(lambda: browser_store(tab, "store.sessions.size") == 6)
    browser_told(tab)  # the view is drawn anew
    eventually(lambda: "word 0" in tab.text("sheet"))
    assert tab.page.evaluate("document.activeElement.innerText") == focused
    tab.page.evaluate(
        """() => { window.moved = []; new MutationObserver((changes) => {
          for (const { addedNodes } of changes) for (const el of addedNodes) moved.push(el.dataset.sessionId); })
          .observe(document.getElementById('tree'), { childList: true }); }"""
    )
    before = [session for session, _ in page_rail(tab)]
    running.emit(payload("Stop", before[0]))
    eventually(lambda: [session for session, _ in page_rail(tab)] != before)
    assert set(tab.page.evaluate("moved")) <= {before[0], None}, "the others stay where they are"


@needs_browser
def test_history_goes_on_to_the_oldest(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*(payload("UserPromptSubmit", f"s{n % 3}", prompt=f"word {n}") for n in range(250)))
    eventually(lambda: running.get("/api/status")["index"]["lagEvents"] == 0)
    tab = open_tab(running, "#history&q=word")
    found = "document.querySelectorAll('[data-testid=hit]').length"
    eventually(lambda: tab.page.evaluate(found) == 100)
    for wanted in (200, 250):
        tab.page.click("[data-testid=sheet] > div > .showmore")
        eventually(lambda wanted=wanted: tab.page.evaluate(found) == wanted)
    words = tab.page.evaluate("[...document.querySelectorAll('.hit .c-target')].map((el) => el.textContent)")
    assert sorted(words) == sorted(f"word {n}" for n in range(250))
    start = cm.now_ms() - 60_000
    call, result = browser_call(1, "s0", tool_response="")
    running.emit(*(
        {"hook": hook, "id": str(uuid.uuid4()), "timestamp": start + at_ms, "machineId": "testbox"}
        for at_ms, hook in ((0, call), (5000, payload("UserPromptSubmit", "s1", prompt="before step-1 ends")), (9000, result))
    ))  # fmt: skip
    eventually(lambda: len(running.get("/api/search?q=step-1")["results"]) == 3)
    tab.page.fill("[data-testid=history-query]", "step-1")
    told = "[...document.querySelectorAll('.hit .c-target')].map((el) => el.textContent)"
    eventually(
        lambda: tab.page.evaluate(told) == ["make step-1", "before step-1 ends"], what="what came last first"
    )
    assert not tab.page.is_visible("[data-testid=sheet] > div > .showmore")


@needs_browser
def test_statistics_count_what_happened_and_lead_to_it(running: RunningMonitor, open_tab: Any) -> None:
    slow = browser_call(1, "one", tool_response={"stdout": "slow output"})
    running.emit(
        payload("UserPromptSubmit", "one", prompt="first work"),
        slow[0], {**slow[1], "duration_ms": 65_000},
        *(event for number in range(2, 5) for event in browser_call(number, "one", tool_response="")),
    )  # fmt: skip
    for _ in range(2):
        call = browser_call(9, "two")[0]
        call["tool_use_id"] = str(uuid.uuid4())
        running.emit(call, {**call, "hook_event_name": "PostToolUseFailure", "error": "Exit code 2\nboom"})
    eventually(lambda: running.get("/api/stats")["totals"]["toolCalls"] >= 6, what="the index to count them")
    told = running.get("/api/stats")
    tab = open_tab(running, "#stats")
    tab.shows("stats", f"{told['totals']['toolCalls']} calls")
    tab.shows("stats", "2 failed")
    for words in ("1 min 05 s", "make step-1", "make step-9", "Exit code 2 boom", "first work", "testbox"):
        tab.shows("stats", words)
    tab.page.click("[data-testid=stats] tr.open >> text=make step-1")
    tab.shows("drawer", "slow output")
    tab.page.keyboard.press("Escape")
    eventually(lambda: tab.text("drawer") == "")
    tab.page.select_option("[aria-label=Time]", "1h")
    eventually(lambda: tab.page.evaluate("location.hash") == "#stats&when=1h")
    tab.page.click("[data-testid=stats] table[aria-label=Sessions] tr.open >> text=first work")
    tab.row_with("make step-1")
    assert tab.page.evaluate("location.hash") == "#s=one"
    tab.page.keyboard.press("m")
    tab.page.click("[data-testid=menu] >> text=Its statistics")
    eventually(lambda: "session=one" in tab.page.evaluate("location.hash"))
    tab.shows("stats", "4 calls")
    assert "step-9" not in tab.text("stats")


@needs_browser
def test_statistics_follow_what_arrives_and_take_nobodys_place(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(
        payload("UserPromptSubmit", "one", prompt="first work"), *browser_call(1, "one", tool_response="")
    )
    eventually(lambda: running.get("/api/stats")["totals"]["toolCalls"] == 1, what="the index to count it")
    tab = open_tab(running, "#stats")
    tab.page.focus("[data-testid=stats] table[aria-label='Slowest calls'] tr.open")
    tab.page.evaluate("document.querySelector('#sheet').scrollTop = 40")
    place = "[document.activeElement.closest('table')?.ariaLabel, document.querySelector('#sheet').scrollTop]"
    before = tab.page.evaluate(place)
    assert before[0] == "Slowest calls"
    running.emit(*browser_call(2, "one", tool_response=""))
    eventually(lambda: running.get("/api/stats")["totals"]["toolCalls"] == 2, what="the index to count it")

    def count_again() -> str:
        tab.page.evaluate("contextuate.counted.at = 0")  # half a minute has passed
        return tab.text("stats")

    eventually(lambda: "2 calls" in count_again() and "make step-2" in tab.text("stats"))
    assert tab.page.evaluate(place) == before
    asked: list[str] = []
    tab.page.on("request", lambda request: asked.append(request.url) if "/api/stats" in request.url else None)
    for _ in range(3):
        count_again()
        tab.page.evaluate("contextuate.tick()")
    assert asked == [], "nothing new is not counted again"
    running.emit(*browser_call(3, "one", tool_response=""))
    tab.page.evaluate(
        "getSelection().selectAllChildren(document.querySelector('[data-testid=stats] .summary'))"
    )
    eventually(lambda: tab.page.evaluate("contextuate.store.seq") >= 7)
    count_again()
    tab.page.evaluate("contextuate.tick()")
    assert asked == [], "whoever marks a text is not disturbed"
    tab.page.evaluate("getSelection().removeAllRanges()")
    eventually(lambda: "3 calls" in count_again())


@needs_browser
def test_a_monitor_without_an_index_is_searched_and_not_counted(
    monitor: RunningMonitor, open_tab: Any
) -> None:
    os.makedirs(monitor.home + "/index.db/in-the-way")
    monitor.start().emit(payload("UserPromptSubmit", prompt="find the zebra"))
    tab = open_tab(monitor, "#history&q=zebra")
    tab.shows("hits", "find the zebra")
    tab.shows("banner", "There is no index")
    eventually(lambda: monitor.get("/api/status")["index"]["state"] == "off")
    tab.page.reload()
    tab.shows("hits", "find the zebra")
    tab.page.keyboard.press("3")
    tab.shows("banner", "there are no statistics")
    eventually(lambda: tab.page.query_selector("[data-testid=sheet] .note.bad"))


@needs_browser
def test_what_happened_while_the_monitor_was_away_comes_in_order_even_if_it_was_much(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.write_config({"server": {"port": running.port, "wsPort": running.ws_port}})
    running.emit(*browser_call(0, tool_response=""))
    tab = open_tab(running)
    tab.row_with("make step-0")
    running.stop()
    tab.shows("banner", "Not connected")
    running.start()
    running.emit(
        *[
            event
            for number in range(1, cm.CATCH_UP_EVENTS)
            for event in browser_call(number, tool_response="")
        ]
    )
    tab.row_with(f"make step-{cm.CATCH_UP_EVENTS - 1}", 40)
    eventually(lambda: tab.text("banner") == "")
    eventually(lambda: browser_store(tab, "store.phase === 'open' && store.loaded"))
    targets = browser_store(tab, "store.rows.map((row) => row.target)")
    assert len(targets) == len(set(targets)), "nothing twice"
    numbers = [int(target.rpartition("-")[2]) for target in targets]
    assert numbers == list(range(numbers[0], cm.CATCH_UP_EVENTS)), "no gap"
    assert {
        browser_store(tab, "store.rows.map((row) => row.outcome).filter((o) => o !== 'done').length")
    } == {0}
    assert all("WebSocket" in words or "ERR_CONNECTION_REFUSED" in words for words in tab.said)
    tab.said.clear()


@needs_browser
def test_a_link_to_an_event_from_long_ago_opens_it(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*browser_call(1, "old", tool_response={"stdout": "ancient output"}))
    running.emit(
        *[event for number in range(2, 600) for event in browser_call(number, "new", tool_response="")]
    )
    wanted = next(event for event in running.stored_events() if event["hookType"] == "PostToolUse")
    tab = open_tab(running, f"#s0=old&e={wanted['id']}")
    tab.shows("drawer", "ancient output")
    gone = open_tab(running, f"#s=old&e={uuid.uuid4()}")
    gone.row_with("make step-1")
    assert gone.text("drawer") == ""


@needs_browser
def test_widths_are_kept(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(*browser_call(1, tool_response=""))
    tab = open_tab(running)
    tab.row_with("make step-1").click()

    def widths() -> list[float]:
        return [round(tab.page.query_selector(part).bounding_box()["width"]) for part in (".rail", ".drawer")]

    eventually(lambda: tab.text("drawer"))
    assert widths() == [280, 560]
    tab.page.focus("#rail-split")
    tab.page.keyboard.press("ArrowRight")
    box = tab.page.query_selector("#drawer-split").bounding_box()
    tab.page.mouse.move(box["x"] + 3, 400)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] - 57, 400)
    tab.page.mouse.up()
    eventually(lambda: widths() == [296, 620], 5, f"{widths()}")
    tab.page.reload()
    eventually(lambda: tab.text("drawer"))
    assert widths() == [296, 620]


@needs_browser
def test_hidden_sessions_can_be_seen_and_shown_again(running: RunningMonitor, open_tab: Any) -> None:
    running.emit(
        payload("UserPromptSubmit", "one", prompt="first"),
        payload("UserPromptSubmit", "two", prompt="second"),
    )
    tab = open_tab(running)
    eventually(lambda: tab.page.query_selector("[data-session-id=one]"))
    browser_choose(tab, "one", "Hide")
    eventually(lambda: not tab.page.query_selector("[data-session-id=one]"))
    eventually(lambda: not tab.rows("first"), 15, "its rows go too")
    tab.page.click("text=Show hidden (1)")
    eventually(lambda: tab.page.query_selector("[data-session-id=one]"))
    tab.row_with("first")
    browser_choose(tab, "one", "Show again")
    eventually(lambda: not running.sessions()["one"]["hidden"])
    browser_choose(tab, "one", "Pin")
    eventually(lambda: running.sessions()["one"]["isPinned"])
    shown = "[...document.querySelectorAll('[data-testid=session]')].map((el) => el.dataset.sessionId)"
    eventually(lambda: tab.page.evaluate(shown) == ["one", "two"])
    browser_choose(tab, "one", "Unpin")
    eventually(lambda: not running.sessions()["one"]["isPinned"])


def browser_choose(tab: BrowserTab, session: str, words: str) -> None:
    """Choose one entry of a session's menu."""
    tab.page.click(f"[data-session-id={session}]", button="right")
    tab.page.click(f"[data-testid=menu] >> text={words}")


@needs_browser
def test_trouble_with_disk_spool_and_versions_is_said_and_taken_back(
    running: RunningMonitor, open_tab: Any
) -> None:
    running.emit(payload("UserPromptSubmit", prompt="first"))
    tab = open_tab(running)
    tab.row_with("first")
    store = running.get("/api/status")["store"]
    full = problem("store", "Events cannot be saved: No space left on device.")
    browser_told(tab, store={**store, "ok": False, "error": "No space left on device"}, problems=[full])
    tab.shows("banner", "Events cannot be saved: No space left on device")
    reading = problem("loading", "Sessions are being read.")
    browser_told(tab, store=store, loading={"done": 40, "total": 100}, problems=[reading])
    tab.shows("banner", "Reading history: 40 of 100")
    assert "being read" not in tab.text("banner"), "the bar says it"
    assert "cannot be saved" not in tab.text("banner")
    browser_told(tab, loading=None, spool={"segments": 0, "bytes": 0, "dropped": 3})
    eventually(lambda: tab.text("banner") == "")
    tab.shows("loss", "3 events lost")
    tab.page.click("[data-testid=loss]")
    tab.shows("status", "Machines")
    tab.page.evaluate("contextuate.store.apply({ ...contextuate.store.hello, wsProtocol: 99 })")
    tab.shows("banner", "This page is older than the monitor.")
    tab.page.click("text=Reload the page")
    tab.shows("status", "Lost")
    eventually(lambda: tab.text("banner") == "")


# What a person has done before the page is checked: a link, then clicks and keys.
CHECKED_SCREENS: dict[str, tuple[str, list[str]]] = {
    "live": ("", []),
    "call": ("", ["click [data-testid=session]", "click [data-testid=row]"]),
    "replay": ("", ["click [data-testid=session][data-state=idle]", "press y"]),
    "menu": ("", ["click [data-testid=session]", "press m"]),
    "alerts": ("", ["click [data-testid=alerts]"]),
    "help": ("", ["press ?"]),
    "history": ("#history", []),
    "statistics": ("#stats", []),
    "status": ("#status", []),
}


@needs_browser
@pytest.mark.parametrize(
    ("scheme", "width"),
    [("light", 1440), ("dark", 1440), ("light", 360)],  # colours are the same at every width
)
def test_axe_finds_nothing_to_complain_about(
    shared_demo: RunningMonitor, open_tab: Any, scheme: str, width: int
) -> None:
    from axe_playwright_python.sync_playwright import Axe  # noqa: PLC0415 - only this test needs it

    tab = open_tab(shared_demo, width=width, scheme=scheme)
    for name, (link, acts) in CHECKED_SCREENS.items():
        tab.page.goto("about:blank")
        tab.page.goto(tab.url + link)
        eventually(lambda: browser_store(tab, "store.loaded && store.status"))
        for act in acts:
            verb, _, what = act.partition(" ")
            if verb == "click":
                tab.page.click(what)
            else:
                tab.page.keyboard.press(what)
        report = Axe().run(tab.page, options={"resultTypes": ["violations"]})
        found = [(each["id"], each["nodes"][0]["html"]) for each in report.response["violations"]]
        assert found == [], name


@needs_browser
def test_without_index_html_a_small_page_shows_the_bare_facts_live(open_tab: Any) -> None:
    folder = new_home()
    for name in ("contextuate_monitor.py", "emit_event.py"):
        shutil.copy(os.path.join(ROOT, name), folder)
    bare = RunningMonitor(new_home(), program=folder + "/contextuate_monitor.py")
    try:
        bare.start().emit(payload("UserPromptSubmit", prompt="early"))
        tab = open_tab(bare)
        eventually(lambda: folder + "/index.html" in tab.page.inner_text("body"))
        eventually(lambda: "early" in tab.page.inner_text("#events"))
        bare.emit(payload("UserPromptSubmit", "later", prompt="later <b>work</b>"))
        eventually(lambda: "later <b>work</b>" in tab.page.inner_text("#events"))
        eventually(lambda: "later <b>work</b>" in tab.page.inner_text("#sessions"))
    finally:
        clean_up(bare)
        shutil.rmtree(folder)


# ---------------------------------------------------------------------------
# Index: search and statistics over everything stored
#
# What the index answers is compared with reading every file, which is slow and plain.
# ---------------------------------------------------------------------------


class IndexCase:
    """Event files and the history over them, in this process; `store` is written to as the monitor would."""

    def __init__(self, folder: str | None = None) -> None:
        self.home = folder or new_home()
        self.store = journal_opened(self.home + "/events")
        self.history = cm.History(self.store, self.home + "/index.db")
        self.started = False

    def add(self, *events: dict[str, Any], day_ms: int = NOW_MS) -> None:
        """Store events as if they arrived at `day_ms`; payloads are made events."""
        built = [ee.build_event(given, given.get("timestamp", day_ms), "testbox") for given in events]
        stored = self.store.append(built, day_ms)
        assert None not in stored
        self.history.add(stored)

    def ready(self) -> IndexCase:
        """Start the index, and wait until it is complete."""
        if not self.started:
            self.started = True
            self.history.start()
        eventually(self.is_complete, what="a complete index")
        return self

    def is_complete(self) -> bool:
        status = self.history.status()
        return bool(status["state"] == "ready" and status["lagEvents"] == 0)

    def search(self, words: str = "", **wanted: Any) -> list[dict[str, Any]]:
        """Return every result, over all pages."""
        results, cursor = [], None
        while True:
            page = self.history.search(
                cm.search_query({"q": words, "limit": 200, **wanted, "cursor": cursor})
            )
            results += page["results"]
            cursor = page["next"]
            if cursor is None:
                return results

    def ids(self, words: str = "", **wanted: Any) -> list[str]:
        return [result["id"] for result in self.search(words, **wanted)]

    def events(self) -> list[dict[str, Any]]:
        """Read every event in the files."""
        found = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            with open(path, "rb") as file:
                found += [json.loads(line) for line in file]
        return found


@pytest.fixture
def indexed() -> Iterator[IndexCase]:
    """An empty store with a history."""
    case = IndexCase()
    yield case
    case.history.stop()
    case.store.close()
    shutil.rmtree(case.home, ignore_errors=True)


def index_prompt(number: int, text: str, session: str = "s1", **more: Any) -> dict[str, Any]:
    """Return a prompt event with a known id, a second after the one with the number before."""
    return {
        "eventType": "user_prompt", "hookType": "UserPromptSubmit", "id": f"e{number}", "sessionId": session,
        "timestamp": NOW_MS + number * 1000, "workingDirectory": "/home/dev/shop", "data": {"message": text}, **more,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("apple", [4, 1, 0]), ("APPLE", [4, 1, 0]), ("apple pear", [1]), ("app*", [4, 3, 1, 0]), ("app", [3]),
        ('"apple pie"', [4, 0]), ('"pie apple"', []), ("src/app.py", [3]), ("app.py", [3]), ("py.app", []), ("Grusse", [2]),
        ("Grüße", []), ("Grüsse", [2]), ("gru*", [2]), ("*", [7, 6, 5, 4, 3, 2, 1, 0]), ("nothing", []), ('"unclosed', []),
        ("日本", [5]), ("fail", [7]), ('"fail cart"', [7]), ("31mFAIL", []), ("本語", [5]), ("本日", []), ("toolu_9", []), ("naïve_name", [6]), ("naive", [6]), ("OR", []),
        ("apple NOT pie", []), ("(apple", [4, 1, 0]), ('"', [7, 6, 5, 4, 3, 2, 1, 0]), ("apple AND pear", [1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["full text", "no full text", "no index"])
def test_words_beginnings_and_phrases_are_found_newest_first(
    indexed: IndexCase, monkeypatch: Any, how: str, typed: str, found: list[int]
) -> None:
    texts = ("Apple pie", "pear and apple", "Grüsse aus Köln", "edit src/app.py now", "an apple\n  pie, warm",
             "これは日本語です", "naïve_name \ud83d and more", "\x1b[1;31mFAIL\x1b[0m c\x1b[4mart")  # fmt: skip
    indexed.add(*(index_prompt(number, text) for number, text in enumerate(texts)))
    if how == "no full text":
        monkeypatch.setattr(cm, "has_full_text", lambda db: False)
    if how == "no index":
        os.mkdir(indexed.home + "/index.db")
    else:
        indexed.ready()
    assert indexed.ids(typed) == [f"e{number}" for number in found]


index_texts = st.lists(
    st.lists(st.sampled_from(["alpha", "Beta", "gäbe", "x1", "日本", "a", "ab", "über-all", "\u00e9", "e\u0301", "-", "_", "İ", "ß",
                              "\ud83d", "\U0001f600", "\ue0003", "कि", "한국어", "Ａ", "ﬁ", "ǅ", "\x00", "1½", "²"])
             | st.text(max_size=6), max_size=6).map(" ".join),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(index_texts, st.data())
def test_the_index_finds_just_what_reading_every_event_finds(texts: list[str], data: Any) -> None:
    case = IndexCase()
    try:
        case.add(*(index_prompt(number, text, f"s{number % 2}") for number, text in enumerate(texts)))
        case.ready()
        for _ in range(6):
            source = cm.fold(data.draw(st.sampled_from(texts)))
            start = data.draw(st.integers(0, len(source)))
            typed = source[start : start + data.draw(st.integers(1, 8))] + data.draw(
                st.sampled_from(["", "*"])
            )
            if data.draw(st.booleans()):
                typed = f'"{typed}"'
            query = cm.search_query({"q": typed})
            expected = [event["id"] for event in case.events() if query.takes(event)]
            assert sorted(case.ids(typed)) == sorted(expected), typed
    finally:
        case.history.stop()
        case.store.close()
        shutil.rmtree(case.home)


def test_every_filter_takes_what_it_says(indexed: IndexCase, monkeypatch: Any) -> None:
    for number in range(60):
        hook = ("PreToolUse", "PostToolUse", "PostToolUseFailure")[number % 3]
        indexed.add({
            "hook": payload(hook, f"s{number % 4}", tool_name=("Bash", "Read")[number % 2], tool_use_id=f"t{number}",
                            tool_input={"command": f"number {number % 5}"}),
            "id": f"e{number}", "timestamp": NOW_MS + number * 1000, "machineId": f"box{number % 3}",
        }, day_ms=NOW_MS + (number // 20) * 86_400_000)  # fmt: skip
    indexed.ready()
    every = sorted(indexed.events(), key=lambda event: -event["timestamp"])
    wanted: list[tuple[dict[str, Any], Any]] = [
        ({}, lambda event: True),
        ({"session": "s2"}, lambda event: event["sessionId"] == "s2"),
        ({"session": "none"}, lambda event: False),
        ({"machine": "box1"}, lambda event: event["machineId"] == "box1"),
        ({"tool": "Read"}, lambda event: event["data"]["toolName"] == "Read"),
        ({"type": "tool_error"}, lambda event: event["eventType"] == "tool_error"),
        ({"type": "PostToolUse"}, lambda event: event["hookType"] == "PostToolUse"),
        ({"type": "tool"}, lambda event: False),
        ({"from": NOW_MS + 7000}, lambda event: event["timestamp"] >= NOW_MS + 7000),
        ({"to": NOW_MS + 7000}, lambda event: event["timestamp"] < NOW_MS + 7000),
        ({"from": NOW_MS + 7000, "to": NOW_MS + 7001}, lambda event: event["timestamp"] == NOW_MS + 7000),
    ]
    for one, other in itertools.product(wanted, repeat=2):
        both = {**one[0], **other[0]}
        if len(both) < len(one[0]) + len(other[0]):
            continue
        expected = [event for event in every if one[1](event) and other[1](event)]
        assert indexed.ids(**both) == [event["id"] for event in expected], both
        numbered = [event["id"] for event in expected if event["data"]["toolInput"]["command"] == "number 3"]
        assert indexed.ids('"number 3"', **both) == numbered, both
    for limit in (500, 1):  # sessions by the index, or by the line in the file
        monkeypatch.setattr(cm, "SESSIONS_MATCHED", limit)
        query = cm.search_query({"q": "number", "tool": "Bash"}, frozenset(("s0", "s1", "none")))
        assert [one["id"] for one in indexed.history.search(query)["results"]] == [
            event["id"] for event in every
            if event["sessionId"] in ("s0", "s1") and event["data"]["toolName"] == "Bash"
        ]  # fmt: skip


def test_pages_follow_each_other_without_gap_or_double(indexed: IndexCase) -> None:
    # Many in one millisecond, over two days of arrival, told in any order, while others arrive.
    numbers = list(range(500))
    random.Random(3).shuffle(numbers)
    for start in range(0, 500, 50):
        for number in numbers[start : start + 50]:
            event = index_prompt(number, "word")
            indexed.add(
                {**event, "timestamp": NOW_MS + number // 100 * 1000},
                day_ms=NOW_MS + (start // 250) * 86_400_000,
            )
    indexed.ready()
    seen, cursor = [], None
    while True:
        page = indexed.history.search(cm.search_query({"q": "word", "limit": 7, "cursor": cursor}))
        assert len(page["results"]) <= 7
        seen += page["results"]
        cursor = page["next"]
        if cursor is None:
            break
        indexed.add(index_prompt(1000 + len(seen), "word"))
        indexed.ready()
    assert [result["id"] for result in seen] == [f"e{number}" for number in reversed(numbers)]


def days_of_arrival(*days: float) -> Iterator[tuple[int, int]]:
    """Yield (number, time of arrival) of three events on each of some days, counted from NOW_MS."""
    for place, day in enumerate(days):
        yield from ((place * 3 + n, NOW_MS + int(day * 86_400_000) + n) for n in range(3))


@pytest.mark.parametrize("days", [(0, 1, 2), (3, 0.9, 0.95, 4), (5, 1, 5.1, 1.1), (1, 0.3, 1.1)], ids=str)
def test_results_come_in_order_of_arrival_whatever_the_clock_did(
    indexed: IndexCase, days: tuple[float, ...]
) -> None:
    arrived = list(days_of_arrival(*days))
    for number, at in arrived[: len(arrived) // 2]:
        indexed.add(index_prompt(number, "word", f"s{number % 2}"), day_ms=at)
    indexed.ready()
    for number, at in arrived[len(arrived) // 2 :]:
        indexed.add(index_prompt(number, "word", f"s{number % 2}"), day_ms=at)
    indexed.ready()
    for wanted in ({}, {"words": "word"}):
        assert indexed.ids(limit=2, **wanted) == [f"e{number}" for number, _ in reversed(arrived)]
        odd = [f"e{number}" for number, _ in reversed(arrived) if number % 2]
        assert indexed.ids(session="s1", limit=1, **wanted) == odd
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == len(arrived)


def test_what_is_not_indexed_yet_is_found_in_the_journal(indexed: IndexCase, monkeypatch: Any) -> None:
    indexed.add(*(index_prompt(number, "word") for number in range(5)))
    assert indexed.ids("word") == [f"e{number}" for number in reversed(range(5))]  # nothing runs yet
    assert not os.path.exists(indexed.home + "/index.db")
    indexed.ready()
    monkeypatch.setattr(cm.IndexFile, "add", lambda *_: time.sleep(0.2))
    indexed.add(*(index_prompt(number, "word") for number in range(5, 9)))
    page = indexed.history.search(cm.search_query({"q": "word", "limit": 6}))
    assert [result["id"] for result in page["results"]] == [f"e{number}" for number in range(8, 2, -1)]
    assert page["complete"] is True and page["next"] == "4"


def test_a_line_is_found_by_its_number_also_in_an_edited_file(tmp_path: Any) -> None:
    rng = random.Random(5)
    for in_order in (True, False):
        seqs = rng.sample(range(1, 900), 200)
        content = b""
        for seq in sorted(seqs) if in_order else seqs:
            event = ee.build_event(index_prompt(seq, "x" * rng.choice([1, 500, 20_000])), NOW_MS, "m")
            content += (
                rng.choice([b"", b"not ours\n"])
                + cm.numbered_line(seq, NOW_MS, ee.encode_json(event))
                + b"\n"
            )
        day = tmp_path / f"events{in_order:d}" / "2026-01-01"
        day.mkdir(parents=True)
        (day / "s.jsonl").write_bytes(content)
        journal = journal_opened(day.parent)
        for seq in range(1, 900, 1 if in_order else 30):
            line = journal.line(seq, "2026-01-01", "s.jsonl")
            assert (line and cm.line_seq(line)) == (seq if seq in seqs else None)
        assert journal.line(1, "2026-01-01", "gone.jsonl") is None


def test_more_than_the_queue_holds_is_read_from_the_journal(indexed: IndexCase, monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "INDEX_QUEUE_BYTES", 3000)
    monkeypatch.setattr(cm, "INDEX_SLICE_EVENTS", 3)
    monkeypatch.setattr(cm, "INDEX_BATCH_S", 0)
    indexed.ready()
    for number in range(200):
        indexed.add(index_prompt(number, "word " * 50, f"s{number % 7}"))
        if number % 50 == 0:
            indexed.ready()
    assert indexed.ready().ids("word") == [f"e{number}" for number in reversed(range(200))]
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 200


def test_an_idle_index_looks_only_now_and_then(indexed: IndexCase, monkeypatch: Any) -> None:
    looks = []
    is_gone = cm.IndexFile.is_gone
    monkeypatch.setattr(cm.IndexFile, "is_gone", lambda file: looks.append(1) or is_gone(file))
    indexed.add(index_prompt(1, "word"))
    indexed.ready()
    time.sleep(0.3)
    looks.clear()
    time.sleep(2)
    assert len(looks) <= 1


def test_a_result_shows_where_it_was_found(indexed: IndexCase) -> None:
    long = "before " * 100 + "the needle in\n   here " + "after " * 100
    indexed.add(
        payload("PostToolUse", tool_name="Bash", tool_use_id="t1", tool_input={"command": "find hay"},
                tool_response={"stdout": long, "stderr": ""}),
    )  # fmt: skip
    (result,) = indexed.ready().search('needle "here after"')
    assert result["field"] == "toolOutput"
    text = "".join(piece["text"] for piece in result["snippet"])
    assert text.startswith("…") and text.endswith("…") and len(text) < 260 and "\n" not in text
    assert [piece["text"] for piece in result["snippet"] if piece.get("hit")] == ["needle", "here after"]
    assert result["data"]["target"] == "find hay" and result["partial"] is True


INDEX_DAMAGE: dict[str, Any] = {
    "deleted": os.unlink,
    "deleted with its log": cm.remove_index,
    "truncated": lambda path: os.truncate(path, 5000),
    "emptied": lambda path: os.truncate(path, 0),
    "overwritten": lambda path: write_at(path, 0, b"this is no database" * 4000),
    "zeros inside": lambda path: write_at(path, 4096, bytes(60_000)),
    "of another version": lambda path: write_at(path, 60, struct.pack(">I", 999)),
    "without its log": lambda path: remove_beside(path, "-wal", "-shm"),
    "without its map": lambda path: remove_beside(path, "-shm"),
    "another file in its place": lambda path: ee.write_atomically(path, b"this is no database" * 4000),
}


def remove_beside(path: str, *suffixes: str) -> None:
    """Remove what SQLite keeps beside its file while it is open."""
    for suffix in suffixes:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


def write_at(path: str, offset: int, content: bytes) -> None:
    """Overwrite a part of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("damage", sorted(INDEX_DAMAGE))
def test_an_index_that_was_spoilt_while_nobody_used_it_is_made_anew(indexed: IndexCase, damage: str) -> None:
    indexed.add(*(index_prompt(number, f"word{number % 7} all") for number in range(300)))
    before = indexed.ready().search("all"), indexed.history.statistics(0, 1 << 53, None, 0)
    indexed.history.stop()
    INDEX_DAMAGE[damage](indexed.home + "/index.db")
    again = IndexCase(indexed.home)
    try:
        again.ready()
        eventually(lambda: again.search("all") == before[0])
        again.add(index_prompt(5000, "later"))
        again.ready()
        eventually(lambda: [result["id"] for result in again.search("later")] == ["e5000"])
        assert again.ready().history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 301
    finally:
        again.history.stop()


@pytest.mark.parametrize("damage", sorted(INDEX_DAMAGE))
def test_an_index_that_is_spoilt_while_it_is_used_misleads_nobody(indexed: IndexCase, damage: str) -> None:
    indexed.add(*(index_prompt(number, f"word{number % 7} all") for number in range(300)))
    before = indexed.ready().search("all")
    INDEX_DAMAGE[damage](indexed.home + "/index.db")
    for number in range(3):
        eventually(lambda: indexed.search("all") == before)
        indexed.add(index_prompt(1000 + number, "later"))
        eventually(lambda number=number: len(indexed.search("later")) == number + 1)


def test_an_index_that_cannot_be_kept_hinders_nothing_and_comes_back(
    indexed: IndexCase, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.1)
    os.mkdir(indexed.home + "/index.db")
    indexed.add(index_prompt(1, "still found"))
    indexed.history.start()
    indexed.started = True
    status = eventually(lambda: indexed.history.status()["state"] == "off" and indexed.history.status())
    assert status["error"]
    assert indexed.ids("found") == ["e1"]
    with pytest.raises(cm.NoStatistics, match="index"):
        indexed.history.statistics(0, 1 << 53, None, 0)
    os.rmdir(indexed.home + "/index.db")
    indexed.ready()
    assert indexed.ids("found") == ["e1"]
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 1


def test_statistics_that_are_asked_for_while_the_index_is_made_wait_for_it(
    indexed: IndexCase, monkeypatch: Any
) -> None:
    connect = cm.IndexFile._connect

    def connect_slowly(file: Any) -> Any:
        db = connect(file)
        time.sleep(0.3)  # there is a file, and nothing in it
        return db

    monkeypatch.setattr(cm.IndexFile, "_connect", connect_slowly)
    indexed.history.start()
    indexed.started = True
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 0
    assert indexed.history.search(cm.search_query({"q": "nothing"}))["results"] == []


@needs_root
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_disk_that_is_too_small_for_the_index_hinders_nothing_and_heals(
    indexed: IndexCase, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.2)
    place = indexed.home + "/small"
    os.mkdir(place)
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k,mode=700", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    history = cm.History(indexed.store, place + "/index.db")
    try:
        rng = random.Random(1)
        for start in range(0, 3000, 500):
            texts = (" ".join(f"w{rng.randrange(100_000)}" for _ in range(50)) for _ in range(500))
            indexed.add(*(index_prompt(start + number, text) for number, text in enumerate(texts)))
        indexed.add(index_prompt(9999, "quokka"))
        history.start()
        status = eventually(lambda: history.status()["state"] == "off" and history.status(), 30)
        assert "full" in status["error"]
        assert [one["id"] for one in history.search(cm.search_query({"q": "quokka"}))["results"]] == ["e9999"]
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        eventually(lambda: history.status()["state"] == "ready", 30)
        assert history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 3001
        assert [one["id"] for one in history.search(cm.search_query({"q": "quokka"}))["results"]] == ["e9999"]
    finally:
        history.stop()
        unmount(place)


def test_files_removed_changed_or_added_by_hand_are_noticed(indexed: IndexCase) -> None:
    for day in range(3):
        indexed.add(
            *(index_prompt(day * 100 + n, f"day{day} word", f"s{n % 2}") for n in range(10)),
            day_ms=NOW_MS + day * 86_400_000,
        )
    indexed.ready()
    days = indexed.store.days()
    shutil.rmtree(f"{indexed.home}/events/{days[0]}")
    os.unlink(f"{indexed.home}/events/{days[1]}/s1.jsonl")
    changed = f"{indexed.home}/events/{days[2]}/s0.jsonl"
    with open(changed, encoding="ascii") as file:
        kept = file.read().split("\n")[1:]
    with open(changed + ".new", "w", encoding="ascii") as file:
        file.write("\n".join(kept))
    os.replace(changed + ".new", changed)
    with open(f"{indexed.home}/events/{days[2]}/s9.jsonl", "wb") as file:
        file.write(
            cm.numbered_line(
                8,
                NOW_MS,
                ee.encode_json(ee.build_event(index_prompt(999, "word by hand", "s9"), NOW_MS, "m")),
            )
            + b"\n"
        )
        file.write(b"{ this is no event\n")
    indexed.history.rescan()
    indexed.ready()
    expected = sorted(event["id"] for event in (json.loads(line) for path in glob.glob(indexed.home + "/events/*/*.jsonl")
                                                for line in open(path) if line.startswith('{"')))  # noqa: SIM115  # fmt: skip
    assert sorted(indexed.ids("word")) == expected and len(expected) == 15
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == 15


def test_the_space_of_deleted_days_is_given_back(indexed: IndexCase) -> None:
    rng = random.Random(1)
    for part in range(4):
        texts = (" ".join(f"w{rng.randrange(100_000)}" for _ in range(100)) for _ in range(500))
        indexed.add(
            *(index_prompt(part * 1000 + n, text, f"s{part}") for n, text in enumerate(texts)),
            day_ms=NOW_MS + part * 86_400_000,
        )
    indexed.ready()
    full = indexed.history.status()["bytes"]
    for part in range(3):
        for path in glob.glob(f"{indexed.home}/events/*/s{part}.jsonl"):
            os.unlink(path)
    indexed.history.rescan()
    eventually(
        lambda: indexed.is_complete() and indexed.history.status()["bytes"] < full * 0.5,
        what="a smaller index",
    )
    assert len(indexed.search(limit=200)) == len(indexed.search("w*")) == 500


# Snapshots


SNAPSHOTS = {"": b"machines", "s1": b"\x00\xff" * 3000, "s\ud8001": b""}


@pytest.fixture
def saved(indexed: IndexCase) -> IndexCase:
    """A stopped index with SNAPSHOTS and the checkpoint 2, and events of their sessions."""
    indexed.add(index_prompt(1, "one"), index_prompt(2, "two", "s\ud8001"))
    indexed.ready()
    indexed.history.save_snapshots(indexed.history.generation, {"s1": b"old", "": b"machines"}, None)
    indexed.history.save_snapshots(indexed.history.generation, SNAPSHOTS, 2)
    indexed.history.stop()  # writes what is queued
    return indexed


def snapshots_of(case: IndexCase) -> tuple[int, dict[str, bytes]]:
    """Return the checkpoint and the snapshots as the next monitor would load them."""
    checkpoint, rows = cm.History(case.store, case.home + "/index.db").load_snapshots()
    return checkpoint, dict(rows)


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


def test_snapshots_of_sessions_without_files_are_left_out(saved: IndexCase) -> None:
    (path,) = glob.glob(saved.home + "/events/*/s1.jsonl")
    os.unlink(path)
    assert snapshots_of(saved) == (2, {"": b"machines", "s\ud8001": b""})
    again = IndexCase(saved.home)
    again.ready().history.stop()
    with contextlib.closing(sqlite3.connect(saved.home + "/index.db")) as db:
        assert db.execute("SELECT count(*) FROM snapshots").fetchone() == (2,)


def spoil_snapshot(path: str) -> None:
    """Change one byte of a snapshot."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE snapshots SET state = x'00ee' WHERE session = CAST('s1' AS BLOB)")


@pytest.mark.parametrize(
    "damage", sorted({*INDEX_DAMAGE, "changed", "unreadable"} - {"without its log", "without its map"})
)
def test_snapshots_of_a_damaged_index_are_as_if_there_were_none(saved: IndexCase, damage: str) -> None:
    ways: dict[str, Any] = {
        **INDEX_DAMAGE,
        "changed": spoil_snapshot,
        "unreadable": lambda path: (os.unlink(path), os.mkdir(path)),
    }
    ways[damage](saved.home + "/index.db")
    assert snapshots_of(saved) == (0, {})


def test_a_new_index_has_a_new_generation_and_no_checkpoint(indexed: IndexCase, monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "INDEX_RETRY_S", 0.1)
    indexed.add(index_prompt(1, "one"))
    indexed.ready()
    history, path = indexed.history, indexed.home + "/index.db"
    first = history.generation
    history.save_snapshots(first, {"s1": b"a"}, 1)
    eventually(lambda: snapshots_of(indexed) == (1, {"s1": b"a"}))
    os.unlink(path)
    indexed.search("one")  # whoever finds it missing wakes the thread
    eventually(lambda: history.generation > first and history.status()["state"] == "ready")
    history.save_snapshots(first, {"s1": b"b"}, 2)
    history.save_snapshots(history.generation, {"s1": b"c"}, None)
    second = history.generation
    add = cm.IndexFile.add
    monkeypatch.setattr(cm.IndexFile, "add", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    indexed.add(index_prompt(2, "two"))
    eventually(lambda: history.status()["state"] == "off")
    assert snapshots_of(indexed) == (0, {})
    history.save_snapshots(second, {"s1": b"lost"}, 2)  # what cannot be written is not remembered
    monkeypatch.setattr(cm.IndexFile, "add", add)
    eventually(lambda: history.generation > second and history.status()["state"] == "ready")
    history.save_snapshots(history.generation, {"s1": b"d"}, 2)
    eventually(lambda: snapshots_of(indexed) == (2, {"s1": b"d"}))


# Statistics


def calls_by_hand(events: list[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """Tell of every call its tool, when it began and ended, and how."""
    calls: dict[Any, dict[str, Any]] = {}
    for event in sorted(events, key=lambda event: event["seq"]):
        data, hook = event["data"], event["hookType"]
        if hook in ("PreToolUse", "PostToolUse", "PostToolUseFailure"):
            call = calls.setdefault(
                (event["sessionId"], data["toolUseId"]),
                {"tool": data["toolName"], "start": 1 << 60, "how": ""},
            )
            start = event["timestamp"] - (data.get("durationMs", 0) if hook != "PreToolUse" else 0)
            call["start"] = min(call["start"], start)
            if hook == "PreToolUse":
                call["begun"] = start
            if hook != "PreToolUse":
                call["how"] = (
                    "ok" if hook == "PostToolUse" else "interrupted" if data.get("is_interrupt") else "failed"
                )
                call["end"], call["told"] = event["timestamp"], data.get("durationMs")
        elif hook == "PostToolBatch":
            for one in data["tool_calls"]:
                call = calls.setdefault((event["sessionId"], one["tool_use_id"]), {
                    "tool": one["tool_name"], "start": event["timestamp"], "how": ""})  # fmt: skip
                call["how"] = call["how"] or "failed"
    return calls


def tools_by_hand(calls: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    """Count calls by tool."""
    tools: dict[str, Any] = {}
    for call in calls.values():
        tool = tools.setdefault(call["tool"], {"calls": 0, "failures": 0, "interrupted": 0, "durations": []})
        tool["calls"] += 1
        tool["failures"] += call["how"] == "failed"
        tool["interrupted"] += call["how"] == "interrupted"
        if call.get("told") is not None:
            tool["durations"].append(call["told"])
        elif "end" in call and "begun" in call:
            tool["durations"].append(call["end"] - call["begun"])
    for tool in tools.values():
        ordered = sorted(tool.pop("durations"))
        tool["timed"], tool["maxMs"], tool["totalMs"] = len(ordered), max(ordered, default=None), sum(ordered)
        for percent in (50, 95):
            least = next(
                (
                    ms
                    for ms in ordered
                    if sum(other <= ms for other in ordered) * 100 >= percent * len(ordered)
                ),
                None,
            )
            tool[f"p{percent}Ms"] = least
    return tools


def count_by_hand(events: list[dict[str, Any]], offset_minutes: int = 0) -> dict[str, Any]:
    """Count what the statistics tell, another way: one event after the other, all durations in lists."""
    events = [event for event in events if event["hookType"] != "Monitor"]
    calls = calls_by_hand(events)
    tools = tools_by_hand(calls)
    days = collections.Counter(
        time.strftime("%Y-%m-%d", time.gmtime(event["timestamp"] / 1000 + offset_minutes * 60))
        for event in events
    )
    return {
        "tools": tools,
        "days": dict(days),
        "machines": dict(collections.Counter(event["machineId"] for event in events)),
        "prompts": sum(
            event["hookType"] == "UserPromptSubmit" and "<task-" not in str(event["data"]["message"])
            for event in events
        ),
        "events": len(events),
        "sessions": len({event["sessionId"] for event in events}),
        "failures": sum(call["how"] == "failed" for call in calls.values()),
        "slowest": max((ms for tool in tools.values() for ms in [tool["maxMs"] or 0]), default=0),
    }


def check_statistics(figures: dict[str, Any], by_hand: dict[str, Any]) -> None:
    """Compare the statistics with what was counted by hand."""
    names = ("calls", "failures", "interrupted", "timed", "maxMs", "totalMs", "p50Ms", "p95Ms")
    assert {tool["toolName"]: {name: tool[name] for name in names} for tool in figures["tools"]} == by_hand[
        "tools"
    ]
    assert {day["day"]: day["events"] for day in figures["days"] if day["events"]} == by_hand["days"]
    assert {machine["machineId"]: machine["events"] for machine in figures["machines"]} == by_hand["machines"]
    totals = figures["totals"]
    assert {name: totals[name] for name in ("events", "prompts", "sessions", "failures")} == {
        name: by_hand[name] for name in ("events", "prompts", "sessions", "failures")}  # fmt: skip
    assert totals["toolCalls"] == sum(tool["calls"] for tool in by_hand["tools"].values())
    for group in ("projects", "machines", "days", "hours", "timeline", "sessions"):
        assert sum(row["events"] for row in figures[group]) == by_hand["events"], group
        assert sum(row["toolCalls"] for row in figures[group]) == totals["toolCalls"], group
        assert sum(row["failures"] for row in figures[group]) == totals["failures"], group
    assert not figures["slowest"] or figures["slowest"][0]["durationMs"] == by_hand["slowest"]
    durations = [call["durationMs"] for call in figures["slowest"]]
    assert durations == sorted(durations, reverse=True)
    assert sum(row["failures"] for row in figures["failing"]) <= totals["failures"]


def index_work(rng: random.Random, count: int) -> list[dict[str, Any]]:
    """Return made-up work of some sessions on two machines over three days, told out of order."""
    told = []
    for number in range(count):
        session, at = f"s{rng.randrange(6)}", NOW_MS + rng.randrange(3 * 86_400_000)
        tool, length = rng.choice(["Bash", "Read", "Edit"]), int(rng.lognormvariate(5, 2))
        about = {
            "tool_name": tool,
            "tool_use_id": f"t{number}",
            "tool_input": {"command": f"run {rng.randrange(5)}"},
        }
        hooks = [("PreToolUse", {}, at), rng.choice([
            ("PostToolUse", {"duration_ms": length}, at + length), ("PostToolUse", {}, at + length),
            ("PostToolUseFailure", {"duration_ms": length, "error": "no"}, at + length + 1),
            ("PostToolUseFailure", {"error": "no", "is_interrupt": True}, at + 3), ("UserPromptSubmit", {"prompt": "hi"}, at),
        ])]  # fmt: skip
        if number % 9 == 0:
            hooks = hooks[1:]
        for place, (hook, more, timestamp) in enumerate(hooks):
            fields = {**about, **more} if "ToolUse" in hook else more
            told.append({"hook": payload(hook, session, **fields), "id": f"e{number}.{place}", "timestamp": timestamp,
                         "machineId": f"box{session[1] in '123'}"})  # fmt: skip
        if number % 7 == 0:
            batch = [{key: about[key] for key in ("tool_name", "tool_use_id", "tool_input")},
                     {"tool_name": "Gone", "tool_use_id": f"gone{number}", "tool_input": {}}]  # fmt: skip
            told.append({"hook": payload("PostToolBatch", session, tool_calls=batch), "id": f"b{number}", "timestamp": at + length + 5,
                         "machineId": f"box{session[1] in '123'}"})  # fmt: skip
    rng.shuffle(told)
    return told


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("offset", [0, 60, -570])
def test_statistics_are_what_counting_the_files_gives(indexed: IndexCase, seed: int, offset: int) -> None:
    work = index_work(random.Random(seed), 300)
    indexed.add(*work[:400])
    indexed.ready()
    indexed.add(*work[400:], day_ms=NOW_MS + 86_400_000)
    indexed.ready()
    check_statistics(
        indexed.history.statistics(0, 1 << 53, None, offset), count_by_hand(indexed.events(), offset)
    )
    for session in ("s1", "s4"):
        own = [event for event in indexed.events() if event["sessionId"] == session]
        check_statistics(indexed.history.statistics(0, 1 << 53, session, offset), count_by_hand(own, offset))


def index_usage(number: int, session: str, **models: tuple[int, int]) -> dict[str, Any]:
    """Return the end of a turn that tells what a session has used so far: (input, output) by model."""
    told = {
        name.replace("_", "-"): {"input": used[0], "output": used[1], "cacheRead": 7}
        for name, used in models.items()
    }
    return {
        **index_prompt(number, "", session), "eventType": "turn_end", "hookType": "Stop",
        "data": {"usage": {"models": told, "agents": {}}},
    }  # fmt: skip


def test_tokens_count_when_they_were_used_by_model_project_and_session(indexed: IndexCase) -> None:
    day = 86_400
    indexed.add(
        index_usage(0, "a", claude_opus_4_5=(1000, 100)),
        index_usage(60, "a", claude_opus_4_5=(5000, 500)),  # the totals grow
        index_usage(day, "a", claude_opus_4_5=(6000, 600), claude_haiku_4_5=(50, 5)),
        index_usage(day + 3000, "a", claude_opus_4_5=(6000, 600), claude_haiku_4_5=(50, 5)),  # told again
        {**index_usage(30, "b", strange_model=(10, 1)), "workingDirectory": "/home/dev/bank"},
        {**index_prompt(40, "", "c"), "data": {"usage": {"input_tokens": 5}}},  # another program's form
    )
    figures = indexed.ready().history.statistics(0, 1 << 53, None, 0)

    def tokens(rows: str, name: str) -> dict[str, Any]:
        return {row[name]: row["tokenUsage"] and (row["tokenUsage"]["totalInput"], row["tokenUsage"]["totalOutput"])
                for row in figures[rows]}  # fmt: skip

    first, second = cm.day_of(NOW_MS), cm.day_of(NOW_MS + day * 1000)
    assert tokens("days", "day") == {first: (5010, 501), second: (1050, 105)}
    assert tokens("models", "model") == {
        "claude-opus-4-5": (6000, 600),
        "claude-haiku-4-5": (50, 5),
        "strange-model": (10, 1),
    }
    assert tokens("projects", "project") == {"/home/dev/shop": (6050, 605), "/home/dev/bank": (10, 1)}
    assert tokens("sessions", "sessionId") == {"a": (6050, 605), "b": (10, 1), "c": None}
    assert (
        figures["totals"]["tokenUsage"]["totalInput"] == 6060
        and figures["totals"]["estimatedCostUsd"] is None
    )
    costs = {row["model"]: row["estimatedCostUsd"] for row in figures["models"]}
    prices = cm.PriceList()
    assert costs["strange-model"] is None and costs["claude-opus-4-5"] == prices.estimate(
        cm.SessionUsage(0, {"claude-opus-4-5": cm.Tokens(6000, 600, 7)}))  # fmt: skip
    later = indexed.history.statistics(NOW_MS + (day - 3600) * 1000, 1 << 53, "a", 0)
    assert later["totals"]["tokenUsage"]["totalInput"] == 1050


def test_token_totals_that_come_as_events_are_no_events_of_their_session(indexed: IndexCase) -> None:
    totals = index_usage(60, "a", claude_opus_4_5=(5000, 500))
    indexed.add(
        index_usage(0, "a", claude_opus_4_5=(1000, 100)),  # as clients of older monitors stored them
        {**totals, "eventType": "usage", "hookType": ""},
        {**totals, "eventType": "usage", "hookType": "", "id": "alone", "sessionId": "b"},
    )
    for figures in (indexed.ready().history.statistics(0, 1 << 53, None, 0),):
        assert (figures["totals"]["events"], figures["totals"]["sessions"]) == (1, 2)
        assert figures["totals"]["tokenUsage"]["totalInput"] == 10_000
        assert {row["sessionId"]: row["events"] for row in figures["sessions"]} == {"a": 1, "b": 0}
    assert indexed.ids() == indexed.ids(type="turn_end") == ["e0"] and indexed.ids(type="usage") == []
    indexed.history.stop()
    os.unlink(indexed.home + "/index.db")
    assert indexed.ids() == ["e0"]  # by reading the files too


def test_odd_events_of_other_programs_do_not_stop_the_index(indexed: IndexCase) -> None:
    odd: list[dict[str, Any]] = [
        {"sessionId": "s\ud800", "machineId": "m\udfff", "workingDirectory": "\ud83d/x", "data": {"toolName": "\ud800"}},
        {"hookType": "PreToolUse", "data": {"toolName": ["x"], "toolUseId": {}, "toolInput": 7, "durationMs": "soon"}},
        {"hookType": "PostToolUse", "data": {"toolName": None, "durationMs": 1 << 70, "toolUseId": "\ud800"}},
        {"hookType": "PostToolUse", "data": {"durationMs": -5}}, {"hookType": "PostToolUse", "data": {"durationMs": True}},
        {"hookType": "PostToolBatch", "data": {"tool_calls": [1, {}, {"tool_use_id": 5}, {"tool_use_id": "t", "tool_name": {}}]}},
        {"data": {"usage": {"models": {"\ud800": {"input": 1 << 80, "output": "x"}, "m": 5}, "agents": 3}}},
        {"timestamp": 1}, {"timestamp": 99_999_999_999_999}, {"data": {"deep": [[[["bottom"]]]] * 3}},
        {"hookType": "Unheard % of_", "data": {"x" * 5000: "y" * 5000}},
    ]  # fmt: skip
    indexed.add(
        *(
            {"eventType": "message", "id": f"odd{number}", "timestamp": NOW_MS, **given}
            for number, given in enumerate(odd)
        )
    )
    indexed.ready()
    assert indexed.history.status()["error"] is None
    assert sorted(indexed.ids()) == sorted(f"odd{number}" for number in range(len(odd)))
    assert indexed.ids("bottom") == ["odd9"]
    assert indexed.ids(session="s\ud800") == indexed.ids(machine="m\udfff") == ["odd0"]
    assert len(indexed.ids(type="Unheard % of_")) == 1 and indexed.ids(type="%") == []
    assert indexed.history.statistics(0, 1 << 53, None, 0)["totals"]["events"] == len(odd)


def test_statistics_of_a_stretch_of_time_leave_the_rest_out(indexed: IndexCase) -> None:
    indexed.add(*(index_prompt(number * 60, "hi") for number in range(24 * 60)))
    indexed.ready()
    start, end = NOW_MS + 3 * 3_600_000 + 1, NOW_MS + 5 * 3_600_000
    figures = indexed.history.statistics(start, end, None, 0)
    assert (
        figures["from"] <= start < figures["from"] + 900_000
        and figures["to"] - 900_000 < end <= figures["to"]
    )
    inside = [event for event in indexed.events() if figures["from"] <= event["timestamp"] < figures["to"]]
    assert figures["totals"]["events"] == figures["totals"]["prompts"] == len(inside)
    empty = indexed.history.statistics(NOW_MS - 10 * 86_400_000, NOW_MS - 9 * 86_400_000, None, 0)
    assert empty["totals"]["events"] == 0 and empty["tools"] == empty["days"] == []


@pytest.mark.parametrize("name", recording_names())
def test_a_recorded_session_counts_the_same_in_statistics_and_in_its_state(
    indexed: IndexCase, name: str
) -> None:
    book = cm.Sessions(own_machine="testbox")
    indexed.add(*({"hook": given, "id": f"e{number}", "timestamp": NOW_MS + number * 10, "machineId": "testbox"}
                  for number, given in enumerate(recorded(name))))  # fmt: skip
    for event in sorted(indexed.events(), key=lambda event: event["seq"]):
        book.apply(event)
    indexed.ready()
    figures = {row["sessionId"]: row for row in indexed.history.statistics(0, 1 << 53, None, 0)["sessions"]}
    interrupted = sum(
        tool["interrupted"] for tool in indexed.history.statistics(0, 1 << 53, None, 0)["tools"]
    )
    assert set(figures) == set(book.sessions)
    for session_id, row in figures.items():
        session = book.sessions[session_id]
        assert (row["events"], row["prompts"], row["toolCalls"]) == (
            session.counts["events"],
            session.counts["prompts"],
            session.counts["toolCalls"],
        )
    assert sum(row["failures"] for row in figures.values()) + interrupted == sum(
        session.counts["toolErrors"] for session in book.sessions.values())  # fmt: skip


# In the running monitor


def index_ready(monitor: RunningMonitor) -> dict[str, Any]:
    """Wait until everything that is stored is in the index; return its status."""

    def complete() -> dict[str, Any] | None:
        index: dict[str, Any] = monitor.get("/api/status")["index"]
        return index if index["state"] == "ready" and index["lagEvents"] == 0 else None

    return dict(eventually(complete, 30, "a complete index"))


def test_what_is_read_before_it_is_handed_over_is_not_counted_as_missing(indexed: IndexCase) -> None:
    stored = indexed.store.append([ee.build_event(index_prompt(1, "quokka"), NOW_MS, "testbox")], NOW_MS)
    indexed.ready()
    indexed.history.add(stored)
    assert indexed.history.status()["lagEvents"] <= 1
    eventually(lambda: indexed.history.status()["lagEvents"] == 0)
    indexed.add(index_prompt(2, "wombat"))
    eventually(lambda: indexed.ids("wombat"))
    eventually(lambda: indexed.history.status()["lagEvents"] == 0)


def test_what_has_the_same_timestamp_is_found_in_order_of_arrival(indexed: IndexCase) -> None:
    names = [f"s{number * 7 % 20}" for number in range(20)]
    indexed.add(*(payload("UserPromptSubmit", name, prompt="quokka", timestamp=NOW_MS) for name in names))
    assert [found["sessionId"] for found in indexed.ready().search("quokka")] == names[::-1]


def test_what_was_just_stored_is_found_over_http_and_websocket(running: RunningMonitor) -> None:
    running.emit(payload("UserPromptSubmit", "a", prompt="where is the quokka?"), payload("UserPromptSubmit", "b", prompt="quokka"),
                 payload("Notification", "b", message="Claude needs your permission", notification_type="permission_prompt"))  # fmt: skip
    eventually(lambda: len(running.get("/api/search?q=quokka")["results"]) == 2)
    page = running.get("/api/search?q=quokka&limit=1")
    assert (
        [result["sessionId"] for result in page["results"]] == ["b"]
        and page["next"]
        and page["complete"] is True
    )
    rest = running.get(f"/api/search?q=quokka&limit=1&cursor={page['next']}")
    assert [result["sessionId"] for result in rest["results"]] == ["a"]
    assert [one["sessionId"] for one in running.get("/api/search?q=quokka&state=waiting")["results"]] == ["b"]
    assert running.get("/api/search?q=quokka&state=failed")["results"] == []
    assert running.get("/api/search?q=quokka&state=waiting&session=a")["results"] == []
    client = running.websocket("rows")
    answer = client.ask(
        "search_results", type="search", query="quokka", eventType="user_prompt", session="a", requestId=7
    )
    assert answer["requestId"] == 7 and [one["sessionId"] for one in answer["results"]] == ["a"]
    assert answer["results"][0]["snippet"][1] == {"text": "quokka", "hit": True}
    answer = client.ask("search_results", type="search", query="quokka", state="working")
    assert [one["sessionId"] for one in answer["results"]] == ["a"]
    client.send(type="search", state="asleep")
    assert "waiting" in client.next("error")["message"]
    client.send(type="search", query="quokka", cursor="nonsense", requestId=8)
    assert client.next("error")["requestId"] == 8
    client.send(type="search", limit=100_000)
    assert "limit" in client.next("error")["message"]
    figures = running.get("/api/stats")
    assert figures["totals"]["prompts"] == 2
    assert {row["sessionId"]: row["label"] for row in figures["sessions"]} == {
        "a": "where is the quokka?",
        "b": "quokka",
    }
    assert stat.S_IMODE(os.stat(running.home + "/index.db").st_mode) == 0o600
    client.close()


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=x",
        "from=-1",
        "state=x",
        "cursor=x",
        "cursor=i",
        "to=x",
        "cursor=i99999999999999999999999",
    ],
)
def test_a_search_that_makes_no_sense_is_refused_with_the_parameter(
    shared: RunningMonitor, query: str
) -> None:
    status, _, body = shared.request("/api/search?" + query)
    assert status == 400 and json.loads(body)["field"] == query.partition("=")[0]


@pytest.mark.parametrize("query", ["utcOffset=7", "utcOffset=900", "from=x", "to=-5", "utcOffset=%C2%B2"])
def test_statistics_that_make_no_sense_are_refused_with_the_parameter(
    shared: RunningMonitor, query: str
) -> None:
    status, _, body = shared.request("/api/stats?" + query)
    assert status == 400 and json.loads(body)["field"] == query.partition("=")[0]


def test_a_deleted_session_is_found_no_more(running: RunningMonitor) -> None:
    running.emit(
        payload("UserPromptSubmit", "a", prompt="quokka"), payload("UserPromptSubmit", "b", prompt="quokka")
    )
    eventually(lambda: len(running.get("/api/search?q=quokka")["results"]) == 2)
    client = running.websocket("rows")
    client.ask("session_deleted", type="delete_session", sessionId="a")
    eventually(lambda: [one["sessionId"] for one in running.get("/api/search?q=quokka")["results"]] == ["b"])
    eventually(lambda: running.get("/api/stats")["totals"]["sessions"] == 1)
    client.close()


def test_killed_at_any_moment_of_indexing_everything_is_found_again(monitor: RunningMonitor) -> None:
    store = cm.Journal(monitor.home + "/events")
    events = [index_prompt(number, f"needle word{number % 100} " + "hay " * 200) for number in range(12_000)]
    for start in range(0, len(events), 500):
        store.append(
            [ee.build_event(event, NOW_MS, "m") for event in events[start : start + 500]],
            NOW_MS + start * 20_000,
        )
    store.close()
    rng = random.Random(4)
    for _ in range(4):
        monitor.start()
        eventually(lambda: monitor.get("/api/status")["index"]["done"] > 0)
        time.sleep(rng.random() * 0.3)
        monitor.kill()
    monitor.start()
    index_ready(monitor)
    assert monitor.get("/api/stats")["totals"]["events"] == 12_000
    found, cursor = [], ""
    while cursor is not None:
        page = monitor.get(f"/api/search?q=needle+word42&limit=50&cursor={cursor}")
        found += [result["id"] for result in page["results"]]
        cursor = page["next"]
    assert found == [f"e{number}" for number in range(11_942, 0, -100)]


def test_the_search_command_prints_what_the_monitor_finds(running: RunningMonitor) -> None:
    running.emit(
        payload("UserPromptSubmit", "a", prompt="where is the \x1b[1;31mquokka\x1b[31m?"),
        payload(
            "PreToolUse",
            "b",
            tool_name="Bash",
            tool_use_id="t1",
            tool_input={"command": "grep -r quokka src"},
        ),
        payload("UserPromptSubmit", "b", prompt="nothing of the kind"),
    )
    eventually(lambda: len(running.get("/api/search?q=quokka")["results"]) == 2)
    lines = running.command("search", "quok*").stdout.splitlines()
    assert "grep -r quokka src" in lines[0] and "Bash" in lines[0] and "where is the quokka?" in lines[1]
    assert len(lines) == 2 and "\x1b" not in lines[1]
    assert "there is more" in running.command("search", "quokka", "--limit", "1").stderr
    lines = running.command("search", "--json", "--tool", "Bash").stdout.splitlines()
    assert [json.loads(line)["sessionId"] for line in lines] == ["b"]
    nothing = running.command("search", "wombat", check=False)
    assert (nothing.returncode, nothing.stdout) == (1, "") and "nothing was found" in nothing.stderr
    assert running.command("search", "quokka", "--to", "2020-01-01", check=False).returncode == 1
    assert "src" in running.command("search", "quokka", "--state", "working").stdout
    assert running.command("search", "quokka", "--state", "idle", check=False).returncode == 1
    refused = running.command("search", "--from", "soon", check=False)
    assert refused.returncode == 2 and "no time" in refused.stderr
    refused = running.command("search", "--limit", "0", check=False)
    assert refused.returncode == 2 and "at least 1" in refused.stderr


def test_in_memory_only_the_last_events_can_be_searched(monitor: RunningMonitor) -> None:
    monitor.write_config({"persistence": {"enabled": False}})
    monitor.start()
    monitor.emit(
        payload("UserPromptSubmit", "a", prompt="quokka one"),
        payload("UserPromptSubmit", "a", prompt="quokka two"),
    )
    first = monitor.get("/api/search?q=quokka&limit=1")
    rest = monitor.get(f"/api/search?q=quokka&limit=1&cursor={first['next']}")
    assert [page["results"][0]["data"]["text"] for page in (first, rest)] == ["quokka two", "quokka one"]
    assert monitor.request("/api/stats")[0] == 503
    assert not os.path.exists(monitor.home + "/index.db")


# ---------------------------------------------------------------------------
# Retention: whole days of events go, the oldest first
# ---------------------------------------------------------------------------


def retention_days(home: str) -> list[str]:
    """List the days that have events."""
    return sorted(name for name in os.listdir(home + "/events") if name != ".in-order")


def retention_fill(home: str, ages: tuple[int, ...], size: int = 100, sessions: int = 2) -> dict[int, str]:
    """Store events that arrived so many days ago; return the name of each day."""
    store = cm.Journal(home + "/events")
    now, made = cm.now_ms(), {}
    for age in sorted(ages, reverse=True):
        at = now - age * 86_400_000
        for number in range(sessions):
            given = {
                **index_prompt(0, "x" * size + f" age{age}", f"s{number}-{age}"),
                "timestamp": at,
                "id": f"{age}.{number}",
            }
            store.append([ee.build_event(given, at, "testbox")], at)
        made[age] = cm.day_of(at)
    store.close()
    return made


def test_days_that_are_too_old_go_with_their_sessions_and_pinned_ones_stay(monitor: RunningMonitor) -> None:
    monitor.config["retention"] = {"days": 5}
    monitor.write_config({"retention": {"days": 1000}})
    days = retention_fill(monitor.home, (0, 1, 4, 7, 8, 40))
    monitor.start()
    client = monitor.websocket("rows")
    client.send(type="toggle_pin", sessionId="s1-8")
    eventually(lambda: monitor.sessions()["s1-8"]["isPinned"])
    highest = monitor.get("/api/status")["seq"]
    monitor.stop()
    monitor.write_config({})
    monitor.start()
    eventually(lambda: set(retention_days(monitor.home)) == {days[age] for age in (0, 1, 4, 8)})
    assert os.listdir(f"{monitor.home}/events/{days[8]}") == ["s1-8.jsonl"]
    gone = {f"s{n}-{age}" for n, age in ((0, 7), (1, 7), (0, 8), (0, 40), (1, 40))}
    eventually(lambda: not gone & set(monitor.sessions()))
    assert "s1-8" in monitor.sessions() and "s0-4" in monitor.sessions()
    eventually(lambda: len(monitor.get("/api/search?q=age8")["results"]) == 1)
    assert monitor.get("/api/search?q=age40")["results"] == []
    assert monitor.get("/api/status")["seq"] >= highest
    disk = eventually(lambda: monitor.get("/api/status")["disk"])
    assert disk["oldestDay"] == days[8] and disk["error"] is None and disk["limitBytes"] == 2048 << 20


def test_the_status_says_how_much_is_on_disk_while_events_come_and_go(running: RunningMonitor) -> None:
    def told() -> dict[str, Any]:
        return dict(running.get("/api/status")["disk"])

    def on_disk() -> int:
        return sum(os.path.getsize(path) for path in glob.glob(running.home + "/events/*/*"))

    eventually(lambda: running.get("/api/status")["disk"], what="the first measurement")
    running.emit(payload("UserPromptSubmit", "a", prompt="x" * 50_000), payload("UserPromptSubmit", "b"))
    disk = told()
    assert disk["eventsBytes"] == on_disk() > 50_000
    assert disk["bytes"] >= disk["eventsBytes"] + disk["indexBytes"]  # of one moment: the index grows
    client = running.websocket("rows")
    client.ask("session_deleted", type="delete_session", sessionId="a")
    assert told()["eventsBytes"] == on_disk() < 50_000
    client.close()


def test_numbers_go_on_when_the_latest_events_were_too_old(monitor: RunningMonitor) -> None:
    retention_fill(monitor.home, (50, 60))
    monitor.start()
    eventually(lambda: retention_days(monitor.home) == [])
    monitor.stop()
    monitor.start()
    monitor.emit(payload("UserPromptSubmit", prompt="again"))
    assert monitor.stored_events()[-1]["seq"] == 5


def test_all_our_files_count_and_the_oldest_days_go_first_but_never_today(tmp_path: Any) -> None:
    home = str(tmp_path)
    days = retention_fill(home, (0, 1, 2, 3), size=1 << 20, sessions=1)
    now = cm.now_ms()

    def going(
        limit_megabytes: int | None, kept: frozenset[str] = frozenset(), keep_days: int | None = None
    ) -> list[str]:
        limit = None if limit_megabytes is None else limit_megabytes << 20
        return cm.plan_retention(home, now, keep_days, limit, kept).days

    assert going(None) == going(5) == []
    assert going(4) == [days[3]]
    assert going(2) == [days[3], days[2], days[1]] == going(0)
    assert going(4, frozenset(["s0-3.jsonl"])) == [days[2]]
    assert going(None, keep_days=1) == [days[3], days[2]]
    with open(home + "/quarantine.log", "wb") as file:
        file.write(b"x" * (3 << 20))
    assert going(5) == [days[3], days[2], days[1]]
    plan = cm.plan_retention(home, now, None, 5 << 20, frozenset())
    assert plan.total == sum(
        os.path.getsize(f"{folder}/{name}") for folder, _, names in os.walk(home) for name in names
    )
    assert cm.carry_out(home, plan) == {"s0-1.jsonl", "s0-2.jsonl", "s0-3.jsonl"}
    assert retention_days(home) == [days[0]]


def test_prune_without_a_monitor_keeps_what_took_its_pin_over(monitor: RunningMonitor) -> None:
    monitor.write_config({"retention": {"days": 5}})
    began = cm.now_ms() - 10 * 86_400_000
    store = cm.Journal(monitor.home + "/events")

    def tell(at_ms: int, session: str, hook: str = "", **fields: Any) -> None:
        given = payload(hook, session, **fields) if hook else {
            "eventType": "session_meta", "hookType": "Monitor", "sessionId": session, "data": fields
        }  # fmt: skip
        event = {**ee.build_event(given, began + at_ms, "testbox"), "timestamp": began + at_ms}
        store.append([event], began + at_ms)

    tell(0, "before", "SessionStart", source="startup")
    tell(1000, "before", action="pin", pinned=True)
    tell(2000, "before", "SessionEnd", reason="clear")
    tell(2010, "after", "SessionStart", source="clear")
    tell(3000, "after", "SessionEnd", reason="other")
    tell(60_000, "before", action="pin", pinned=False)
    store.close()
    monitor.start().command("prune")
    left = glob.glob(monitor.home + "/events/*/*.jsonl")
    assert [os.path.basename(path) for path in left] == ["after.jsonl"]


def test_prune_tells_what_would_go_and_deletes_it(monitor: RunningMonitor) -> None:
    monitor.write_config({"retention": {"days": 1000}})
    monitor.start()
    assert "nothing is too old" in monitor.command("prune").stdout
    monitor.stop()
    monitor.write_config({"retention": {"days": 10}})
    monitor.start()
    days = retention_fill(monitor.home, (0, 3, 20, 30))
    told = monitor.command("prune", "--dry-run").stdout
    assert "4 files of 4 sessions" in told and days[30] in told and days[20] in told and "would be" in told
    assert len(retention_days(monitor.home)) == 4
    assert "deleted" in monitor.command("prune").stdout
    assert retention_days(monitor.home) == sorted([days[0], days[3]])
    assert "nothing is too old" in monitor.command("prune").stdout


def test_a_foreign_file_in_a_day_is_left_alone(monitor: RunningMonitor) -> None:
    days = retention_fill(monitor.home, (0, 50))
    note = f"{monitor.home}/events/{days[50]}/note.txt"
    with open(note, "w", encoding="ascii") as file:
        file.write("mine")
    monitor.start()
    eventually(lambda: os.listdir(os.path.dirname(note)) == ["note.txt"])


def test_a_clock_set_back_by_days_makes_no_event_old(tmp_path: Any) -> None:
    store = journal_opened(tmp_path / "events")
    day_ms, now = 86_400_000, cm.now_ms()
    for number, age in enumerate((3, 2, 40, 40, 1)):  # for two events the clock was wrong
        event = ee.build_event(index_prompt(number, "x"), now, "m")
        store.append([event], now - age * day_ms)
    store.close()
    assert cm.plan_retention(str(tmp_path), now, 30, None, frozenset()).files == ()
    assert len(cm.plan_retention(str(tmp_path), now + 40 * day_ms, 30, None, frozenset()).files) >= 2


def test_killed_at_any_moment_of_deleting_the_rest_goes_the_next_time(monitor: RunningMonitor) -> None:
    retention_fill(monitor.home, tuple(range(90)), sessions=5)
    rng = random.Random(2)
    for _ in range(3):
        before = len(retention_days(monitor.home))
        monitor.start()
        eventually(lambda before=before: len(retention_days(monitor.home)) < max(before, 32), 60)
        time.sleep(rng.random() * 0.02)
        monitor.kill()
    monitor.start()
    eventually(lambda: 30 <= len(retention_days(monitor.home)) <= 31, 60)
    index_ready(monitor)
    stored = len(monitor.stored_events())
    eventually(lambda: monitor.get("/api/stats")["totals"]["events"] == stored)
    assert len(monitor.get("/api/search?q=age7")["results"]) == 5


def test_packed_days_are_shown_found_counted_and_deleted_like_others(monitor: RunningMonitor) -> None:
    monitor.config["retention"] = {"days": 20}
    monitor.write_config({})
    days = retention_fill(monitor.home, (0, 1, 2, 9, 30), size=5000)
    for age in (2, 9, 30):
        for path in glob.glob(f"{monitor.home}/events/{days[age]}/*.jsonl"):
            pack_as_before(path)
    monitor.start()
    index_ready(monitor)
    eventually(lambda: days[30] not in retention_days(monitor.home))
    assert not glob.glob(monitor.home + "/events/*/*.gz")
    eventually(lambda: set(monitor.sessions()) == {f"s{n}-{age}" for n in range(2) for age in (0, 1, 2, 9)})
    eventually(lambda: monitor.get("/api/stats")["totals"]["events"] == 8)
    assert len(monitor.get("/api/search?q=age9")["results"]) == 2
    assert len(monitor.get("/api/sessions/s1-9/events")["events"]) == 1
    assert monitor.request("/api/export?q=age9")[2].count(b"\n") == 2
    assert monitor.get("/api/events/9.1?session=s1-9")["id"] == "9.1"


# ---------------------------------------------------------------------------
# Export: events as they are, tool calls as a table
# ---------------------------------------------------------------------------


def export_table(lines: list[bytes]) -> list[dict[str, str]]:
    """Read a table of calls the way a spreadsheet does."""
    text = b"".join(line + b"\n" for line in cm.call_table(lines)).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize("seed", range(3))
def test_the_table_has_each_call_once_as_counting_the_files_gives(indexed: IndexCase, seed: int) -> None:
    work = index_work(random.Random(seed), 300)
    work.sort(key=lambda event: (float(event["id"][1:]), event["id"][0] == "b"))  # a result after its call
    indexed.add(*work)
    by_hand = count_by_hand(indexed.events())["tools"]
    rows = export_table(list(indexed.store.lines()))
    assert len({(row["sessionId"], row["toolUseId"]) for row in rows}) == len(rows)
    for tool, counts in by_hand.items():
        own = [row for row in rows if row["toolName"] == tool]
        durations = [int(row["durationMs"]) for row in own if row["durationMs"]]
        assert (len(own), len(durations), sum(durations)) == (
            counts["calls"],
            counts["timed"],
            counts["totalMs"],
        )
        assert sum(row["outcome"] == "failed" for row in own) == counts["failures"]
        assert sum(row["outcome"] == "interrupted" for row in own) == counts["interrupted"]


def test_the_table_survives_any_text_and_no_cell_is_a_formula(indexed: IndexCase) -> None:
    nasty = '=cmd|"calc"!A1, and\nmore \ud83d é'
    indexed.add(
        payload("PreToolUse", "+s", tool_name="-Bash", tool_use_id="@t1", tool_input={"command": nasty}),
        payload("PostToolUseFailure", "+s", tool_name="-Bash", tool_use_id="@t1", tool_input={"command": nasty},
                error="\x1b[31m" + nasty, duration_ms=5),
        payload("PreToolUse", "old", tool_name="Read", tool_input={"file_path": "/home/dev/shop/a.txt"}),
        payload("PostToolUse", "old", tool_name="Read", tool_input={"file_path": "/home/dev/shop/a.txt"}),
        payload("PostToolUse", "gone", tool_name=["odd"], tool_use_id=5, tool_input=None),
    )  # fmt: skip
    first, second, third = export_table(list(indexed.store.lines()))
    assert first["error"] == "'" + nasty.replace("\ud83d", "\\ud83d")
    assert [first[name] for name in ("sessionId", "toolName", "outcome", "durationMs")] == [
        "'+s",
        "'-Bash",
        "failed",
        "5",
    ]
    assert first["target"].startswith("'=cmd|")
    assert (second["target"], second["outcome"], second["durationMs"]) == ("a.txt", "ok", "0")
    assert third["outcome"] == "ok"


def test_export_takes_the_filters_of_search_over_http_and_from_the_command_line(
    running: RunningMonitor,
) -> None:
    for number in range(6):
        about = {
            "tool_name": ("Bash", "Read")[number % 2],
            "tool_use_id": f"t{number}",
            "tool_input": {"command": f"word{number}"},
        }
        running.emit(
            payload("PreToolUse", f"s{number % 3}", **about),
            payload("PostToolUse", f"s{number % 3}", **about, duration_ms=number),
        )
    running.emit(payload("Stop", "s1"), payload("Stop", "s2"))
    stored = running.stored_events()
    for parameters, command, chosen in (
        ("", (), lambda event: True),
        ("tool=Bash&session=s0", ("--tool", "Bash", "--session", "s0"),
         lambda event: event["sessionId"] == "s0" and event["data"].get("toolName") == "Bash"),
        ("type=PostToolUse&machine=testbox", ("--type", "PostToolUse", "--machine", "testbox"),
         lambda event: event["hookType"] == "PostToolUse"),
        ("q=word3", ("word3",), lambda event: event["data"].get("toolInput") == {"command": "word3"}),
        ("machine=other", ("--machine", "other"), lambda event: False),
        ("state=idle", ("--state", "idle"), lambda event: event["sessionId"] != "s0"),
        ("state=working&session=s0", ("--state", "working", "--session", "s0"),
         lambda event: event["sessionId"] == "s0"),
        ("state=failed", ("--state", "failed"), lambda event: False),
    ):  # fmt: skip
        expected = [event["id"] for event in stored if chosen(event)]
        status, headers, body = running.request(f"/api/export?{parameters}")
        assert status == 200 and headers["content-type"] == "application/x-ndjson"
        assert sorted(json.loads(line)["id"] for line in body.splitlines()) == sorted(expected)
        assert sorted(running.command("export", *command).stdout.splitlines()) == sorted(
            body.decode().splitlines()
        )
    status, headers, body = running.request("/api/export?format=csv&tool=Read")
    assert headers["content-type"].startswith("text/csv") and "calls.csv" in headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(body.decode(), newline="")))
    assert [(row["toolName"], row["outcome"]) for row in rows] == [("Read", "ok")] * 3
    target = running.home + "/calls.csv"
    assert "14 events" in running.command("export", "--format", "csv", "--output", target).stdout
    with open(target, newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 6
    assert stat.S_IMODE(os.stat(target).st_mode) == 0o600
    status, _, body = running.request("/api/export?format=xml")
    assert status == 400 and json.loads(body)["field"] == "format"


# ---------------------------------------------------------------------------
# Import: history from before the monitor was there
# ---------------------------------------------------------------------------

IMPORT_TRANSCRIPTS = sorted(os.listdir(RECORDED + "/transcripts"))


def import_copy(monitor: RunningMonitor, name: str) -> str:
    """Put a recorded session's transcripts where Claude Code keeps them; return the session's id."""
    shutil.copytree(f"{RECORDED}/transcripts/{name}", f"{monitor.claude_home}/projects/{name}")
    return next(iter(glob.glob(f"{RECORDED}/transcripts/{name}/*.jsonl"))).rpartition("/")[2][
        : -len(".jsonl")
    ]


def import_usage(name: str) -> int:
    """Return the output tokens in a recorded session's transcripts, each message once."""
    used = {}
    for path in glob.glob(f"{RECORDED}/transcripts/{name}/**/*.jsonl", recursive=True):
        with open(path, "rb") as file:
            for line in file:
                message = json.loads(line).get("message") or {}
                if message.get("usage") and message.get("role") == "assistant":
                    used[message["id"]] = message["usage"]["output_tokens"]
    return sum(used.values())


def test_transcripts_become_the_sessions_that_hooks_would_have_told(running: RunningMonitor) -> None:
    names = {import_copy(running, name): name for name in IMPORT_TRANSCRIPTS}
    told = running.command("import").stdout
    assert re.fullmatch(r"\d+ events imported, 0 were known already\n", told)
    stored = len(running.stored_events())
    assert told.startswith(f"{stored} events")
    again = running.command("import", running.claude_home).stdout
    assert (
        again == f"0 events imported, {stored} were known already\n"
        and len(running.stored_events()) == stored
    )
    sessions = running.sessions()
    assert set(sessions) == set(names)
    index_ready(running)
    figures = {row["sessionId"]: row for row in running.get("/api/stats")["sessions"]}
    for session_id, name in names.items():
        session = sessions[session_id]
        book = cm.Sessions(own_machine="testbox")
        for number, one in enumerate(recorded(name)):
            book.apply(
                ee.build_event(
                    {"hook": one, "id": f"e{number}", "timestamp": NOW_MS + number}, NOW_MS, "testbox"
                )
            )
        by_hooks = book.sessions[session_id]
        assert session["isImported"] is True and session["state"] == "ended" and session["openCalls"] == []
        counts = session["counts"]
        assert (counts["toolCalls"], counts["prompts"]) == (
            by_hooks.counts["toolCalls"],
            by_hooks.counts["prompts"],
        ), name
        assert counts["toolErrors"] == by_hooks.counts["toolErrors"], name
        assert {agent["agentId"] for agent in session["agents"]} == set(by_hooks.agents), name
        assert session["label"] == by_hooks.label[0] and session["workingDirectory"] == by_hooks.directory
        assert session["model"] == by_hooks.model or by_hooks.model is None
        assert (
            session["tokenUsage"]["totalOutput"]
            == import_usage(name)
            == figures[session_id]["tokenUsage"]["totalOutput"]
        )


@pytest.mark.parametrize("name", IMPORT_TRANSCRIPTS)
def test_what_hooks_have_told_is_not_told_again_by_the_transcript(running: RunningMonitor, name: str) -> None:
    session_id = import_copy(running, name)
    start = min(
        cm.iso_time_ms(json.loads(line)["timestamp"]) or 0
        for line in open(f"{RECORDED}/transcripts/{name}/{session_id}.jsonl", "rb") if b'"uuid"' in line  # noqa: SIM115
    )  # fmt: skip
    given = [{"hook": one, "id": f"h{number}", "timestamp": start + number, "machineId": "testbox"}
             for number, one in enumerate(recorded(name))]  # fmt: skip
    running.emit(*given)
    before = running.sessions()[session_id]["counts"]
    assert running.command("import").stdout.startswith("0 events imported")
    assert running.sessions()[session_id]["counts"] == before


def test_of_a_session_that_hooks_know_in_part_only_what_was_before_is_imported(
    running: RunningMonitor,
) -> None:
    session_id = import_copy(running, "failing")
    with open(f"{RECORDED}/transcripts/failing/{session_id}.jsonl", "rb") as file:
        entries = [json.loads(line) for line in file if b'"tool_use"' in line]
    late = entries[4]
    use = late["message"]["content"][0]
    at = (cm.iso_time_ms(late["timestamp"]) or 0) + 60_000  # its clock may differ: the call's name tells
    running.emit({"hook": payload("PreToolUse", session_id, tool_name=use["name"], tool_use_id=use["id"], tool_input=use["input"]),
                  "id": "late", "timestamp": at, "machineId": "testbox"})  # fmt: skip
    running.command("import")
    stored = running.stored_events()
    calls = collections.Counter(
        event["data"]["toolUseId"] for event in stored if event["hookType"] == "PreToolUse"
    )
    assert calls[use["id"]] == 1 and calls[entries[0]["message"]["content"][0]["id"]] == 1
    assert all(event.get("imported") or event["id"] == "late" for event in stored)
    assert not any(event["hookType"] == "SessionEnd" for event in stored)
    assert running.sessions()[session_id]["isImported"] is True


def test_exports_of_this_and_of_the_node_monitor_are_taken_in_once(monitor: RunningMonitor) -> None:
    other = RunningMonitor(new_home())
    try:
        other.start().emit(*recorded("simple"), payload("UserPromptSubmit", "x", prompt="hello there"))
        export = other.home + "/export.ndjson"
        other.command("export", "--output", export)
        expected = other.stored_events()
        node = {"version": 1, "sessions": [{"sessionId": "0123456789abcdef", "events": [
            {"id": "n1", "timestamp": NOW_MS, "sessionId": "0123456789abcdef", "machineId": "mac", "eventType": "tool_call",
             "hookType": "PreToolUse", "data": {"toolName": "Bash", "toolInput": {"command": "ls"}}},
            {"timestamp": NOW_MS + 5, "sessionId": "0123456789abcdef", "machineId": "mac", "eventType": "tool_result",
             "hookType": "PostToolUse", "data": {"toolName": "Bash", "tool_output": "a b"}},
        ]}]}  # fmt: skip
        with open(other.home + "/node.json", "w", encoding="utf-8") as file:
            json.dump(node, file, indent=1)
        monitor.start()
        for count in (len(expected) + 2, 0):
            told = monitor.command("import", export, other.home + "/node.json").stdout
            assert told.startswith(f"{count} events imported")
        stored = {event["id"]: event for event in monitor.stored_events()}
        for event in expected:
            kept = stored[event["id"]]
            assert {**kept, "seq": 0, "received": 0} == {**event, "seq": 0, "received": 0, "imported": True}
        session = monitor.sessions()["0123456789abcdef"]
        assert (
            session["isImported"] is True
            and session["machineId"] == "mac"
            and session["counts"]["toolCalls"] == 1
        )
        assert len(stored) == len(expected) + 2
    finally:
        clean_up(other)


@pytest.mark.parametrize(
    "content", [b"", b"not json\nat all", b"[]", b"{}", b'{"type":"user"}\n' * 3, b"\xff\x00", b"[" * 100_000]
)
def test_a_file_without_history_is_no_reason_to_fail_badly(running: RunningMonitor, content: bytes) -> None:
    path = running.home + "/odd.jsonl"
    with open(path, "wb") as file:
        file.write(content)
    done = running.command("import", path, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr
    assert running.stored_events() == []
    assert "error" in running.command("import", running.home + "/missing.json", check=False).stderr


def test_odd_transcripts_are_read_as_far_as_they_make_sense() -> None:
    base = {"sessionId": "s", "cwd": 5, "timestamp": "2026-11-24T06:03:18.373Z"}
    lines = [
        b"{ broken",
        b"[]",
        b"",
        json.dumps({**base, "type": "user", "uuid": 7, "message": {"content": "x"}}).encode(),
        json.dumps({**base, "type": "user", "uuid": "a", "message": {"content": None}}).encode(),
        json.dumps(
            {**base, "type": "user", "uuid": "b", "timestamp": "soon", "message": {"content": "x"}}
        ).encode(),
        json.dumps(
            {
                **base,
                "type": "user",
                "uuid": "c",
                "message": {"content": [1, {"type": "tool_result"}, {"text": 5}]},
            }
        ).encode(),
        json.dumps(
            {
                **base,
                "type": "assistant",
                "uuid": "d",
                "message": {"content": [{"type": "tool_use", "id": 5}]},
            }
        ).encode(),
        json.dumps(
            {**base, "type": "user", "uuid": "e", "isMeta": True, "message": {"content": "meta"}}
        ).encode(),
        json.dumps({**base, "type": "user", "uuid": "f", "message": {"content": "hello"}}).encode(),
        json.dumps({**base, "type": "user", "uuid": "f", "message": {"content": "hello"}}).encode(),
    ]
    events = cm.TranscriptReader("s", "m", set()).events(lines)
    assert [event["hookType"] for event in events] == [
        "SessionStart",
        "PostToolUse",
        "UserPromptSubmit",
        "SessionEnd",
    ]
    assert events[2]["data"] == {"message": "hello"}
    assert len({event["id"] for event in events}) == 4


# ---------------------------------------------------------------------------
# Metrics: read by Prometheus' own parser
# ---------------------------------------------------------------------------


def metrics_of(monitor: RunningMonitor) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return what /metrics tells: sample's name → labels → value."""
    status, headers, body = monitor.request("/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(body.decode()):
        assert family.documentation and family.type in ("gauge", "counter", "histogram"), family.name
        for sample in family.samples:
            values = found.setdefault(sample.name, {})
            key = tuple(sorted(sample.labels.items()))
            assert key not in values, (sample.name, key)
            values[key] = sample.value
    return found


def test_prometheus_reads_what_is_measured(running: RunningMonitor) -> None:
    odd = 'odd "box"\\ with\nlines \ud83d é'
    for number, (hook, more) in enumerate((
        ("PostToolUse", {"duration_ms": 10}), ("PostToolUse", {"duration_ms": 11}), ("PostToolUse", {"duration_ms": 700_000}),
        ("PostToolUseFailure", {"duration_ms": 2500, "error": "no"}), ("PostToolUse", {}),
    )):  # fmt: skip
        running.emit(payload(hook, tool_name="Bash", tool_use_id=f"t{number}", tool_input={}, **more))
    running.emit({"eventType": "message", "machineId": odd, "sessionId": "z", "data": {}},
                 payload("PermissionRequest", "w", tool_name="Bash", tool_input={"command": "rm"}))  # fmt: skip
    running.emit({"eventType": "message", "machineId": odd, "sessionId": "z", "data": {}})
    measured = metrics_of(running)
    events = {dict(key)["type"]: value for key, value in measured["contextuate_events_total"].items()}
    assert events == {"tool_result": 4, "tool_error": 1, "message": 2, "permission_request": 1}
    machines = {dict(key)["machine"] for key in measured["contextuate_events_total"]}
    assert machines == {"testbox", 'odd "box"\\ with\nlines \\ud83d é'}
    buckets = {
        dict(key)["le"]: value for key, value in measured["contextuate_tool_duration_seconds_bucket"].items()
    }
    assert (buckets["0.01"], buckets["0.05"], buckets["2.5"], buckets["600.0"], buckets["+Inf"]) == (
        1,
        2,
        3,
        3,
        4,
    )
    assert list(measured["contextuate_tool_duration_seconds_count"].values()) == [4]
    assert list(measured["contextuate_tool_duration_seconds_sum"].values()) == [702.521]
    assert list(measured["contextuate_tool_failures_total"].values()) == [1]
    sessions = {dict(key)["state"]: value for key, value in measured["contextuate_sessions"].items()}
    assert sessions["waiting"] == 1 and sum(sessions.values()) == 3
    assert list(measured["contextuate_build_info"].values()) == [1]
    assert measured["contextuate_received_total"][()] == 8 and measured["contextuate_store_ok"][()] == 1
    index_ready(running)
    measured = metrics_of(running)
    assert measured["contextuate_index_ready"][()] == 1 and measured["contextuate_index_lag_events"][()] == 0
    assert measured["contextuate_index_bytes"][()] > 0
    eventually(lambda: metrics_of(running)["contextuate_disk_bytes"][()] > 0)
    names = set(metrics_of(running))
    assert {
        "contextuate_spool_bytes",
        "contextuate_spool_dropped_total",
        "contextuate_client_queue_bytes",
        "contextuate_clients_closed_slow_total",
    } <= names


def test_made_up_names_do_not_make_metrics_endless() -> None:
    counts = cm.EventCounts()
    for number in range(3000):
        counts.note({"machineId": f"m{number}", "hookType": "PostToolUse", "eventType": "x",
                     "data": {"toolName": f"tool{number}", "durationMs": 5}})  # fmt: skip
    assert len(counts.events) == len(counts.durations) == cm.LABELS_LIMIT + 1
    assert sum(counts.events.values()) == sum(sum(buckets) for buckets in counts.durations.values()) == 3000


# ---------------------------------------------------------------------------
# The source itself: its rooms and their order
# ---------------------------------------------------------------------------


def uses_of_names(code: types.CodeType) -> Iterator[tuple[int, set[str]]]:
    """Yield the first line of each function, class and lambda below `code`, and the module's names it uses."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            loads = (it for it in dis.get_instructions(inner) if it.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
            yield inner.co_firstlineno, {str(it.argval) for it in loads}
            yield from uses_of_names(inner)


@pytest.mark.parametrize("module", [ee, cm], ids=["hook", "monitor"])
def test_a_room_uses_only_the_rooms_above_it(module: types.ModuleType) -> None:
    with open(str(module.__file__), encoding="utf-8") as file:
        source = file.read()
    tree = ast.parse(source)
    starts = [source.count("\n", 0, it.start()) + 1 for it in re.finditer(r"(?m)^# -{75}\n# [A-Z]", source)]
    assert len(starts) > 7
    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node.lineno
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [
                it.id for it in ast.walk(node) if isinstance(it, ast.Name) and isinstance(it.ctx, ast.Store)
            ]
            defined.update(dict.fromkeys(names, node.lineno))
    below = [
        f"line {line} uses {name} of line {defined[name]}"
        for line, names in uses_of_names(compile(tree, str(module.__file__), "exec"))
        for name in names & defined.keys()
        if bisect.bisect(starts, line) < bisect.bisect(starts, defined[name])
    ]
    assert not below


def test_one_event_runs_through_at_most_70_functions() -> None:
    """From a hook's line on the socket to the frames for a page: functions of both modules, in the loop thread.

    Not counted: lambdas, comprehensions, the standard library, and what dataclasses and named tuples generate.
    """
    modules = {str(module.__file__): module.__name__ for module in (cm, ee)}
    rounds: list[dict[str, None]] = []

    def note(frame: types.FrameType, what: str, _argument: Any) -> None:
        code = frame.f_code
        if what == "call" and code.co_filename in modules and not code.co_name.startswith("<"):
            rounds[-1][f"{modules[code.co_filename]}:{code.co_firstlineno} {code.co_name}"] = None

    def read(sock: socket.socket) -> None:
        rounds.append({})
        sys.setprofile(note)
        really_read(sock)

    def end_turn() -> None:
        really_end_turn()
        sys.setprofile(None)

    with protocol_inside() as inside, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        page = ProtocolPeer(inside.ws_port)
        page.say(type="subscribe", view="rows")
        page.next("status")
        sock.connect(inside.settings["socketPath"])
        really_read, really_end_turn = inside._hooks._read, inside.loop.turn_end
        inside._hooks._read, inside.loop.turn_end = read, end_turn  # type: ignore[method-assign]
        for number in range(12):
            call = {"tool_name": "Bash", "tool_input": {"command": "make"}, "tool_use_id": f"toolu_{number}"}
            hook = payload("PreToolUse", **call)
            line = {"hook": hook, "id": f"event-{number}", "timestamp": ee.now_ms(), "pid": os.getpid()}
            sock.sendall(json.dumps(line).encode() + b"\n")
            assert sock.recv(1) == ee.ACKNOWLEDGEMENT
            page.next("event")
            time.sleep(1.5 * cm.UPDATE_INTERVAL_S)
        page.close()
    # Without what garbage collection or a timer added, and with the session's update, which comes at most every 0.1 s.
    whole = [names for names in rounds[5:] if any(name.endswith(" label") for name in names)]
    names = min(whole, key=len)
    print(len(names), *names, sep="\n")
    assert any(name.endswith(" event_row") for name in names), "the page's frame was made in another turn"
    assert 30 < len(names) <= 70


# ---------------------------------------------------------------------------
# Benchmarks: each figure beside its limit, measured in the same run
#
# A benchmark is a generator of Figures; what it has to say meanwhile goes to standard error. `--bench` runs all of
# them at small sizes, in less than five minutes; `--bench NAME` runs one at full size. What is compared takes turns,
# round by round, so that whatever else the machine does hits both.
# ---------------------------------------------------------------------------


class BenchError(Exception):
    """The figures would mean nothing, in words."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One row of the table: what ours took, what the limit or the peer took in the same run, and their ratio."""

    name: str
    ours: float
    unit: str
    limit: float | None
    peer: str  # what `limit` is
    ratio: float | None
    at_most: float | None = None  # the goal for the ratio
    at_least: float | None = None
    spread: tuple[float, float] | None = None  # the least and the largest ratio of the rounds

    @property
    def misses(self) -> bool:
        """Tell whether the ratio is not what it should be."""
        if self.ratio is None:
            return False
        too_much = self.at_most is not None and self.ratio > self.at_most
        return too_much or (self.at_least is not None and self.ratio < self.at_least)

    def row(self) -> str:
        """Return the line of the table."""
        goal = "" if self.at_most is None else f"<= {self.at_most:.2f}"
        goal = goal if self.at_least is None else f">= {self.at_least:.2f}"
        limit = "" if self.limit is None else f"{bench_number(self.limit)} {self.unit}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}"
        spread = "" if self.spread is None else f"{self.spread[0]:.2f}..{self.spread[1]:.2f}"
        ours = f"{bench_number(self.ours)} {self.unit}"
        mark = "MISS" if self.misses else ""
        return f"{self.name:<64}{ours:>13}{limit:>13}{ratio:>7}{goal:>9}{spread:>13} {mark:<5}{self.peer}".rstrip()


BENCH_HEAD = (
    f"{'figure':<64}{'ours':>13}{'limit':>13}{'ratio':>7}{'goal':>9}{'spread':>13} {'':<5}the limit is"
)


def bench_number(value: float) -> str:
    """Return a number with three digits that mean something."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def paired(name: str, pairs: list[tuple[float, float]], unit: str, peer: str, **goal: float) -> Figure:
    """Return the row of pairs (ours, limit), one a round: their medians, the median ratio and its spread."""
    ratios = [ours / limit for ours, limit in pairs]
    ours, limit = (statistics.median(values) for values in zip(*pairs, strict=True))
    spread = (min(ratios), max(ratios))
    return Figure(name, ours, unit, limit, peer, statistics.median(ratios), spread=spread, **goal)


def against(
    name: str, ours: float, limit: float, unit: str, peer: str = "the goal", at_most: float | None = 1.0
) -> Figure:
    """Return the row of one figure that must not be above its limit."""
    return Figure(name, ours, unit, limit, peer, ours / limit, at_most=at_most)


def bench_tell(words: str) -> None:
    """Say how far a benchmark is."""
    print(f"  {words}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much the benchmarks do."""

    hook_pairs: int
    latency_rates: (
        tuple[tuple[int, int, bool], ...]  # events a second, seconds, whether each is a hook process
    )
    restart: tuple[int, int]  # sessions, events
    page_s: float  # of watching one state of the page
    page_events: int  # that the page has read
    history_events: int
    storm_hooks: int
    rounds: int
    round_s: float
    idle_s: float


# At high rates hook processes themselves would fill a small machine, and their start is what `--bench hook` measures.
FULL_SIZES = Sizes(
    hook_pairs=60,
    latency_rates=((1, 10, True), (20, 5, True), (100, 4, False), (1000, 4, False)),
    restart=(5000, 1_000_000),
    page_s=10,
    page_events=100_000,
    history_events=int(os.environ.get("CONTEXTUATE_BENCH_EVENTS", "1000000")),
    storm_hooks=10_000,
    rounds=9,
    round_s=0.5,
    idle_s=20,
)
SMALL_SIZES = Sizes(
    hook_pairs=20,
    latency_rates=((20, 2, True), (100, 2, False), (1000, 2, False)),
    restart=(500, 100_000),
    page_s=2,
    page_events=20_000,
    history_events=100_000,
    storm_hooks=1000,
    rounds=5,
    round_s=0.25,
    idle_s=10,
)


def bench_hook(sizes: Sizes) -> Iterator[Figure]:
    """Time the hook against a bare interpreter, in turn."""
    monitor = RunningMonitor(new_home())
    try:
        command = shlex.split(monitor.installed_command())[:4]
        monitor.start()
        line = recorded_lines("simple")[4] + b"\n"
        whole = [*command[:3], os.path.join(ROOT, "emit_event.py")]
        yield timed_hook("hook, local mode, acknowledged", command, line, monitor, sizes, at_most=1.3)
        yield timed_hook("hook, the same from the whole file, not installed", whole, line, monitor, sizes)
        stored = monitor.get("/api/status")["events"]["stored"]
        expected = 2 * (sizes.hook_pairs + WARM_UP_PAIRS)
        if stored != expected:
            raise BenchError(f"{stored} events were stored instead of {expected}")
        monitor.stop()
        yield timed_hook("hook, no monitor, spooled", command, line, monitor, sizes, at_most=1.3)
    finally:
        clean_up(monitor)


def bench_hook_redis(sizes: Sizes) -> Iterator[Figure]:
    """Time the part of Redis mode that Claude Code waits for, against a bare interpreter, in turn."""
    with redis_parts() as maker:
        server = maker(RedisServer)
        machine = maker(RedisMachine, config=server.settings())
        command = shlex.split(machine.hook)[:4]
        line = recorded_lines("simple")[4] + b"\n"
        machine.say("the publisher starts")
        eventually(lambda: machine.publisher().get("published"))
        few = dataclasses.replace(sizes, hook_pairs=sizes.hook_pairs // 3)
        yield timed_hook("hook, Redis mode, a publisher runs", command, line, machine, sizes, at_most=1.4)
        yield timed_hook(
            "hook, Redis mode, the first of a burst starts one", command, line, machine, few,
            before_each=machine.end_publisher, at_most=1.4,
        )  # fmt: skip
        machine.say("a publisher that stays")
        expected = 2 + sizes.hook_pairs + few.hook_pairs + 2 * WARM_UP_PAIRS
        eventually(lambda: len(server.streamed()) == expected, 30, f"{expected} events in Redis")
        server.stop()
        eventually(
            lambda: machine.say("away") or machine.publisher()["state"] == "waiting",
            what="a publisher that waits",
        )
        yield timed_hook("hook, Redis mode, Redis is away", command, line, machine, sizes, at_most=1.4)


WARM_UP_PAIRS = 3


def timed_hook(
    name: str, ours: list[str], line: bytes, monitor: RunningMonitor, sizes: Sizes,
    before_each: Any = lambda: None, **goal: float,
) -> Figure:  # fmt: skip
    """Run our command and a bare interpreter in turn, each after `before_each()`; return the row."""
    bare = [ours[0], "-I", "-S", "-c", "pass"]

    def timed(command: list[str]) -> float:
        before_each()
        return timed_run(command, line, monitor.environment) * 1000

    for _ in range(WARM_UP_PAIRS):
        timed(ours), timed(bare)
    pairs = [(timed(ours), timed(bare)) for _ in range(sizes.hook_pairs)]
    return paired(name, pairs, "ms", "a bare interpreter", **goal)


def timed_run(command: list[str], line: bytes, environment: dict[str, str]) -> float:
    """Return the seconds one process takes, from its start to its end; its input lies ready in a pipe."""
    reader, writer = os.pipe()
    os.write(writer, line)
    os.close(writer)
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0)]
    begin = time.perf_counter()
    pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
    _, status = os.waitpid(pid, 0)
    seconds = time.perf_counter() - begin
    os.close(reader)
    if status:
        raise BenchError(f"{command} ended with status {status}")
    return seconds


def bench_storm(sizes: Sizes) -> Iterator[Figure]:
    """Run hooks at full speed, as many at once as there are processors, and bare interpreters likewise, in turn.

    Each event must be stored once.
    """
    monitor = RunningMonitor(new_home())
    count, parts = sizes.storm_hooks, 5
    try:
        command = shlex.split(monitor.installed_command())[:4]
        monitor.start()
        lines = [
            json.dumps(payload("UserPromptSubmit", f"s{n % 7}", prompt=str(n))).encode() for n in range(count)
        ]
        pairs = []
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in range(parts):
                said = lines[part * count // parts : (part + 1) * count // parts]
                pairs.append((
                    storm_rate(pool, command, said, monitor),
                    storm_rate(pool, [command[0], "-I", "-S", "-c", "pass"], said, monitor),
                ))  # fmt: skip
        stored = eventually(lambda: len(events := monitor.stored_events()) >= count and events, 120)
        numbers = sorted(int(event["data"]["message"]) for event in stored)
        if numbers != list(range(count)):
            raise BenchError(f"{len(set(numbers))} of {count} events arrived, {len(numbers)} times")
        yield paired(f"{count:,} hooks in a row, each stored once", pairs, "/s", "bare interpreters")
    finally:
        clean_up(monitor)


def storm_rate(pool: Any, command: list[str], lines: list[bytes], monitor: RunningMonitor) -> float:
    """Return how many processes a second come to their end."""
    begin = time.perf_counter()
    list(pool.map(lambda line: timed_run(command, line, monitor.environment), lines))
    return len(lines) / (time.perf_counter() - begin)


# Ingest: from the socket to the file


def least_work(lines: bytes) -> bytes:
    """Do with whole lines what no monitor in Python does without: parse, look for each hint of a secret, encode."""
    done = []
    for line in lines.splitlines():
        text = line.decode()
        folded = text.lower()
        for shape in ee.SECRET_SHAPES:
            shape.hint in (folded if shape.folded else text)  # noqa: B015 - its time is all that counts
        done.append(ee.encode_json(json.loads(text)) + b"\n")
    return b"".join(done)


def serve_bare_ingest(listener: socket.socket, path: str, work: Any = bytes) -> None:
    """Do what ingest cannot do without: read, append, acknowledge.

    One `selectors` loop. Each turn accepts who waits, reads from each connection that is ready once, appends what
    `work` makes of what all of them said to one file by one write, and then sends each one byte for every newline
    that it sent.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        taken = []
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
                continue
            connection = key.fileobj  # type: ignore[assignment]
            data = connection.recv(256 << 10)
            if data:
                taken.append((connection, data))
            else:
                selector.unregister(connection)
                connection.close()
        if taken:
            os.write(file, work(b"".join(data for _, data in taken)))
            for connection, data in taken:
                connection.send(ee.ACKNOWLEDGEMENT * data.count(b"\n"))


@contextlib.contextmanager
def serving(serve: Any, *arguments: Any) -> Iterator[None]:
    """Let a function serve in a process of its own while the block runs."""
    process = multiprocessing.get_context("fork").Process(target=serve, args=arguments, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


def hook_lines(count: int) -> list[bytes]:
    """Return lines as the hook sends them, each event once: recorded sessions, over and over, of 20 sessions."""
    told = [line for name in ("simple", "parallel", "subagent") for line in recorded_lines(name)]
    lines = []
    for number, line in zip(range(count), itertools.cycle(told)):
        session = re.search(rb'"session_id":"([^"]+)"', line)
        assert session is not None
        own = b"bench-%d" % (number // len(told) % 20)
        lines.append(ee.wrap(line.replace(session.group(1), own), {b"CONTEXTUATE_MACHINE_ID": b"testbox"}))
    return lines


def acknowledged(sock: socket.socket, line: bytes) -> None:
    """Send a line and wait for its acknowledgement."""
    sock.sendall(line)
    if sock.recv(1) != ee.ACKNOWLEDGEMENT:
        raise BenchError("an event was not acknowledged")


def rate_over_one_connection(socket_path: str, lines: list[bytes], seconds: float) -> float:
    """Return the events a second that are acknowledged when one is said after the other over one connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(15)
        sock.connect(socket_path)
        said, begin = 0, time.perf_counter()
        while said < len(lines) and time.perf_counter() - begin < seconds:
            acknowledged(sock, lines[said])
            said += 1
        return said / (time.perf_counter() - begin)


def rate_over_a_connection_each(socket_path: str, lines: list[bytes], seconds: float) -> float:
    """Return the events a second that are acknowledged when each comes over a connection of its own, as hooks do."""
    said, begin = 0, time.perf_counter()
    while said < len(lines) and time.perf_counter() - begin < seconds:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(15)
            sock.connect(socket_path)
            acknowledged(sock, lines[said])
        said += 1
    return said / (time.perf_counter() - begin)


def rate_of_a_stream(socket_path: str, lines: list[bytes], seconds: float) -> float:
    """Return the events a second that are acknowledged when 32 may be under way over one connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(15)
        sock.connect(socket_path)
        begin = time.perf_counter()
        said = safe = 0
        while safe < said or (said < len(lines) and time.perf_counter() - begin < seconds):
            if time.perf_counter() - begin < seconds:
                sock.sendall(b"".join(lines[said : safe + 32]))
                said = min(len(lines), max(said, safe + 32))
            if safe < said:
                safe += len(sock.recv(64))
        return safe / (time.perf_counter() - begin)


def settled(monitor: RunningMonitor, timeout_s: float = 60) -> None:
    """Wait until the monitor's index has caught up: it must not take part in what is measured next."""
    eventually(
        lambda: (
            (index := monitor.get("/api/status")["index"])["lagEvents"] == 0 and index["state"] == "ready"
        ),
        timeout_s,
    )


INGEST_WAYS = (
    ("ingest over one connection, one event after the other", rate_over_one_connection, {"at_least": 0.75}),
    ("ingest, a connection for each event", rate_over_a_connection_each, {"at_least": 0.65}),
    ("ingest over one connection, 32 under way", rate_of_a_stream, {}),
)


def bench_ingest(sizes: Sizes) -> Iterator[Figure]:
    """Send the hooks' lines to the monitor and to two bare loops in turn; the limits are `serve_bare_ingest`.

    The first loop knows nothing of what it writes; the second does `least_work`.
    """
    monitor = RunningMonitor(new_home())
    with contextlib.ExitStack() as stack:
        stack.callback(clean_up, monitor)
        paths = [monitor.home + "/bare.sock", monitor.home + "/least.sock"]
        for path, work in zip(paths, (bytes, least_work)):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(512)
            stack.enter_context(serving(serve_bare_ingest, listener, path + ".jsonl", work))
        monitor.start()
        for name, rate, goal in INGEST_WAYS:
            rounds = []
            for _ in range(sizes.rounds):
                lines = hook_lines(int(60_000 * sizes.round_s))
                settled(monitor)
                bare, least = (rate(path, lines, sizes.round_s) for path in paths)
                rounds.append((rate(monitor.socket_path, lines, sizes.round_s), bare, least))
            bare_pairs = [(ours, bare) for ours, bare, _ in rounds]
            yield paired(name, bare_pairs, "/s", "a bare loop that appends")
            least_pairs = [(ours, least) for ours, _, least in rounds]
            yield paired(
                f"{name}; minimal loop", least_pairs, "/s", "that loop with the minimal work", **goal
            )


# Broadcast: from the store to many clients

EVENT_MARK = b"`"  # stands once in every event of these benchmarks, and in no other message
LISTENERS = (1, 50, 200, 1000)


def marked_payload(output_lines: int) -> dict[str, Any]:
    """Return a payload whose event has EVENT_MARK once, as a row, too."""
    return payload(
        "PostToolUse", "marked", tool_name="Bash", tool_use_id=EVENT_MARK.decode(), duration_ms=1200,
        tool_input={"command": "make test", "description": "Run the tests"},
        tool_response={"stdout": "all 212 tests passed\n" * output_lines, "stderr": "", "interrupted": False},
    )  # fmt: skip


def stored_event(seq: int) -> cm.StoredEvent:
    """Return a marked event as the store gives it to the broadcast."""
    event = ee.build_event(marked_payload(output_lines=20), NOW_MS, "testbox")
    numbered = {"seq": seq, "received": NOW_MS, **event}
    return cm.StoredEvent(seq, numbered, cm.numbered_line(seq, NOW_MS, ee.encode_json(event)))


def websocket_request(port: int) -> bytes:
    """Return an opening handshake."""
    return (
        f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


class Audience:
    """WebSocket clients in one loop that only counts events, so that the server's time is what is measured."""

    def __init__(
        self, port: int, count: int, ready: bytes, view: str = "full", receive_bytes: int | None = None
    ) -> None:
        """Connect and subscribe; a client is ready when it has got `ready`."""
        self.sockets: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        message = ee.encode_json({"type": "subscribe", "view": view})
        opening = websocket_request(port) + protocol_frame(cm.Opcode.TEXT, message)
        for number in range(count):
            sock = socket.socket()
            sock.settimeout(15)
            if receive_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.connect(("127.0.0.1", port))
            sock.sendall(opening)
            got = b""
            while ready not in got:
                piece = sock.recv(65536)
                if not piece:
                    raise BenchError(f"a client was turned away: {got!r}")
                got += piece
            sock.setblocking(False)
            self.sockets.append(sock)
            self._selector.register(sock, selectors.EVENT_READ, number)

    def close(self) -> None:
        """Leave."""
        self._selector.close()
        for sock in self.sockets:
            sock.close()

    def listen(self, say: Any, in_flight: int, seconds: float) -> tuple[float, list[float]]:
        """Have `say(count)` say events for some time, at most `in_flight` that not everybody has got.

        Returns the events a second that everybody got, and for each time that somebody got some the seconds since
        the first of them was said, sorted.
        """
        got = [0] * len(self.sockets)
        said_at: list[float] = []
        delays: list[float] = []
        begin = time.perf_counter()
        complete = 0
        while True:
            now = time.perf_counter()
            if now - begin < seconds:
                more = in_flight - (len(said_at) - complete)
                said_at += [now] * more
                say(more)
            elif complete == len(said_at):
                return complete / (now - begin), sorted(delays)
            self._take(got, complete + 1, said_at, delays)
            complete = min(got)

    def _take(self, got: list[int], wanted: int, said_at: list[float], delays: list[float]) -> None:
        """Read until everybody has got `wanted` events."""
        behind = sum(count < wanted for count in got)
        while behind:
            ready = self._selector.select(15)
            if not ready:
                raise BenchError(f"{behind} of {len(got)} clients got no event")
            for key, _ in ready:
                data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                if not data:
                    raise BenchError("a client was cut off")
                count, before = data.count(EVENT_MARK), got[key.data]
                if count:
                    delays.append(time.perf_counter() - said_at[before])
                    got[key.data] = before + count
                    behind -= before < wanted <= before + count


def share(values: list[float], percent: int) -> float:
    """Return the value that `percent` of 100 sorted values do not exceed."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


@functools.lru_cache(maxsize=1)
def events_to_frame() -> list[cm.StoredEvent]:
    """Return more events than are ever in flight."""
    return [stored_event(seq) for seq in range(1, 65)]


def framed_events(count: int) -> bytes:
    """Return the frames of so many stored events, made as no server in Python can do without."""
    messages = [
        b'{"type":"event","seq":%d,"event":%b}' % (seq, line) for seq, _, line in events_to_frame()[:count]
    ]
    return b"".join([struct.pack("!BBH", 0x81, 126, len(message)) + message for message in messages])


def serve_bare_broadcast(listener: socket.socket, told: socket.socket, frames_of: Any) -> None:
    """Send to every client a frame for each byte that is told.

    One `selectors` loop. What one turn was told, `frames_of` so many, goes to each client by one send; with one event
    in flight that is one frame a send.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(told, selectors.EVENT_READ)
    clients: list[socket.socket] = []
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setblocking(False)
                selector.register(client, selectors.EVENT_READ)
            elif key.fileobj is told:
                joined = frames_of(len(told.recv(4096)))
                for client in clients:
                    client.send(joined)
            elif key.fileobj.recv(65536):  # type: ignore[union-attr]
                key.fileobj.send(b"ready\r\n\r\n")  # type: ignore[union-attr]
                clients.append(key.fileobj)  # type: ignore[arg-type]
            else:
                selector.unregister(key.fileobj)
                clients.remove(key.fileobj)  # type: ignore[arg-type]


def serve_broadcast(listener: socket.socket, told: socket.socket) -> None:
    """Let the monitor's own loop and client server send stored events: one for each byte that is told."""
    loop = cm.EventLoop()
    waiting = 0

    def opened(client: cm.Client) -> None:
        client.view = "full"

    def take(_ready: int) -> None:
        nonlocal waiting
        waiting += len(told.recv(4096))

    def end_turn() -> None:
        nonlocal waiting
        if waiting:
            clients.broadcast(events_to_frame()[:waiting])
            waiting = 0

    clients = cm.ClientServer(
        loop, listener, admit=lambda request, sock: None, opened=opened, received=lambda client, text: None,
        connection_limit=2000, queue_limit_bytes=1 << 20,
    )  # fmt: skip
    loop.turn_end = end_turn
    loop.watch(told, selectors.EVENT_READ, take)
    loop.run()


@contextlib.contextmanager
def audience_of(serve: Any, count: int, *arguments: Any) -> Iterator[tuple[Audience, Any]]:
    """Give clients of a server that runs in a process of its own, and the function that has it send events."""
    ours, told = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, ours, told:
        told.setblocking(False)
        with serving(serve, listener, told, *arguments):
            audience = Audience(listener.getsockname()[1], count, b"\r\n\r\n")
            try:
                yield audience, lambda events: ours.sendall(b"e" * events)
            finally:
                audience.close()


def bench_broadcast(sizes: Sizes) -> Iterator[Figure]:
    """Send stored events to many clients by the monitor's own loop, and by a bare one, in turn.

    Beside one client there is a second bare loop, which frames each event.
    """
    [frame] = cm.event_frames([stored_event(1)], "full")
    for count in LISTENERS:
        bench_tell(f"{count} clients")
        with contextlib.ExitStack() as stack:
            ways = [(serve_broadcast,), (serve_bare_broadcast, lambda number: frame * number)]
            if count == 1:
                ways.append((serve_bare_broadcast, framed_events))
            audiences = [stack.enter_context(audience_of(way[0], count, *way[1:])) for way in ways]
            for in_flight, peer in ((1, "a bare loop, a frame a send"), (32, "a bare loop, a turn joined")):
                yield from broadcast_figures(
                    f"broadcast to {count}, {in_flight} in flight", audiences, in_flight, peer, sizes
                )


def broadcast_figures(
    name: str, audiences: list[tuple[Audience, Any]], in_flight: int, peer: str, sizes: Sizes
) -> Iterator[Figure]:
    """Compare the first audience's server with the others' in turn: rates and delays, of a third one rates only."""
    rounds = [
        [audience.listen(say, in_flight, sizes.round_s) for audience, say in audiences]
        for _ in range(sizes.rounds)
    ]
    rates = [[rate for rate, _ in one] for one in rounds]
    tails = [[share(delays, 99) * 1000 for _, delays in one] for one in rounds]
    yield paired(name, [(one[0], one[1]) for one in rates], "/s", peer, at_least=0.9)
    yield paired(name + ", p99", [(one[0], one[1]) for one in tails], "ms", peer, at_most=1.2)
    if len(audiences) > 2:
        least = [(one[0], one[2]) for one in rates]
        yield paired(name + "; the least", least, "/s", "that loop framing each event")


@contextlib.contextmanager
def listened_to(monitor: RunningMonitor, count: int, **options: Any) -> Iterator[Audience]:
    """Give a monitor an audience for a while."""
    audience = Audience(monitor.ws_port, count, b'"type":"status"', **options)
    try:
        yield audience
    finally:
        audience.close()


@contextlib.contextmanager
def monitor_teller(monitor: RunningMonitor, output_lines: int = 20) -> Iterator[Any]:
    """Give a function that has a monitor take so many marked events."""
    line = ee.encode_json(marked_payload(output_lines)) + b"\n"
    with monitor.connect() as sock:

        def say(count: int) -> None:
            sock.sendall(line * count)
            with contextlib.suppress(BlockingIOError):
                sock.recv(4096, socket.MSG_DONTWAIT)  # acknowledgements

        yield say


def bench_clients(sizes: Sizes) -> Iterator[Figure]:
    """Measure what clients cost the whole monitor: memory of each, and what those that never read do to others."""
    monitor = RunningMonitor(new_home(), {"limits": {"connections": 2000}})
    try:
        monitor.start()
        with monitor_teller(monitor, output_lines=800) as say, listened_to(monitor, 18) as others:
            others.listen(say, 32, 1.0)
            rates, grown_mb = [], []
            for _ in range(sizes.rounds // 2 + 1):
                alone, _ = others.listen(say, 32, 2 * sizes.round_s)
                settled(monitor)
                before_mb = bench_memory_mb(monitor.pid, "VmRSS")
                with listened_to(monitor, 2, receive_bytes=4096):
                    beside, _ = others.listen(say, 32, 2 * sizes.round_s)
                    rates.append((beside, alone))
                    until_closed(monitor, 18, lambda: others.listen(say, 32, sizes.round_s))
                    grown_mb.append(bench_memory_mb(monitor.pid, "VmRSS") - before_mb)
            yield paired(
                "18 of 20 clients while two never read", rates, "/s", "18 clients alone", at_least=0.95
            )
            yield against("memory for the two that never read", max(grown_mb), 3, "MB")
    finally:
        clean_up(monitor)
    yield against("memory of each of 1,000 clients", client_memory_kb(1000), 2, "kB")


def until_closed(monitor: RunningMonitor, left: int, say_more: Any) -> None:
    """Say more until the monitor has closed the clients that do not read."""
    for _ in range(100):
        if monitor.get("/api/status")["clients"] == left:
            return
        say_more()
    raise BenchError("clients that never read were not closed")


def client_memory_kb(count: int) -> float:
    """Return by how much a new monitor's memory grows for each of so many clients."""
    monitor = RunningMonitor(new_home(), {"limits": {"connections": 2000}})
    try:
        monitor.start().emit(payload("UserPromptSubmit", prompt="begin"))
        settled(monitor)
        with listened_to(monitor, 1, view="rows"):
            before_mb = bench_memory_mb(monitor.pid, "VmRSS")
            with listened_to(monitor, count, view="rows"):
                return (bench_memory_mb(monitor.pid, "VmRSS") - before_mb) * 1024 / count
    finally:
        clean_up(monitor)


# A monitor that has nothing to do


def bench_idle(sizes: Sizes) -> Iterator[Figure]:
    """Measure what the monitor needs while nothing happens, without and with a page's connection."""
    monitor = RunningMonitor(new_home())
    try:
        monitor.start().emit(payload("UserPromptSubmit", prompt="begin"), payload("Stop"))
        settled(monitor)
        time.sleep(1)
        yield from idle_figures(monitor, "idle, nobody looks", sizes)
        with listened_to(monitor, 1, view="rows"):
            yield from idle_figures(monitor, "idle, one page looks", sizes)
    finally:
        clean_up(monitor)


def idle_figures(monitor: RunningMonitor, name: str, sizes: Sizes) -> Iterator[Figure]:
    """Watch a monitor for some seconds."""
    before, switches, begin = bench_processor_s(monitor.pid), bench_switches(monitor.pid), time.monotonic()
    time.sleep(sizes.idle_s)
    seconds = time.monotonic() - begin
    percent = (bench_processor_s(monitor.pid) - before) / seconds * 100
    wake_ups = (bench_switches(monitor.pid) - switches) / seconds
    yield against(f"{name}: processor", percent, 0.25, "%")
    yield against(f"{name}: wake-ups", wake_ups, 4, "/s")
    yield against(f"{name}: memory", bench_memory_mb(monitor.pid, "VmRSS"), 35, "MB")


def bench_processor_s(pid: int) -> float:
    """Return the processor time that a process's threads have taken, finer than the ticks of /proc/PID/stat."""
    total_ns = 0
    for path in glob.glob(f"/proc/{pid}/task/*/schedstat"):
        with open(path, encoding="ascii") as file:
            total_ns += int(file.read().split()[0])
    return total_ns / 1e9


def bench_switches(pid: int) -> int:
    """Return how often the threads of a process have waited for something (proc(5): voluntary switches)."""
    total = 0
    for path in glob.glob(f"/proc/{pid}/task/*/status"):
        with open(path, encoding="ascii") as file:
            total += sum(int(line.split()[1]) for line in file if line.startswith("voluntary_ctxt"))
    return total


def bench_memory_mb(pid: int, field: str) -> float:
    """Return a process's resident memory (VmRSS) or the peak of it (VmHWM)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


# Growth: what each more of it costs


GROWTH_EVENTS = (10_000, 30_000, 100_000)
GROWTH_SESSIONS = (100, 300, 1000)
GROWTH_CLIENTS = (100, 300, 1000)
GROWTH_AT_MOST = 1.2  # times the cost of one at the smallest size; 1 is linear
GROWTH_ROUNDS = 3


class StartedOnHistory(NamedTuple):
    """A monitor that has read what was stored, and what that cost."""

    monitor: RunningMonitor
    start_ms: float
    memory_mb: float


def bench_growth(sizes: Sizes) -> Iterator[Figure]:
    """Measure what an event, a session and a client costs at three sizes each.

    The limit is what it costs at the smallest.
    """
    with started_on_history(1, 2) as empty:
        empty_mb = empty.memory_mb
    for thing, counts, histories in (
        ("events", GROWTH_EVENTS, [(100, count) for count in GROWTH_EVENTS]),
        ("sessions", GROWTH_SESSIONS, [(count, count * 30) for count in GROWTH_SESSIONS]),
    ):
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(started_on_history(*history)) for history in histories]
            ingest_us = ingest_in_turn([one.monitor for one in found], sizes)
        starts = [one.start_ms * 1000 / count for one, count in zip(found, counts, strict=True)]
        memory = [
            max(0.01, one.memory_mb - empty_mb) * 1024 / count
            for one, count in zip(found, counts, strict=True)
        ]
        yield growth_figure(f"start, for each of {growth_words(counts, thing)}", starts, "us")
        yield growth_figure(f"memory, for each of {growth_words(counts, thing)}", memory, "kB")
        yield growth_figure(f"ingest of an event beside {growth_words(counts, thing)}", ingest_us, "us")
    yield from growth_of_clients(sizes)


def growth_words(counts: tuple[int, ...], thing: str) -> str:
    """Say the sizes."""
    return "/".join(f"{count:,}" for count in counts) + " " + thing


def growth_figure(name: str, costs: list[float], unit: str) -> Figure:
    """Return the row of the costs of one at three sizes; the smaller two are in the name of the limit."""
    peer = "each at the smallest; at the second " + f"{bench_number(costs[1])} {unit}"
    return against(name, costs[2], costs[0], unit, peer, at_most=GROWTH_AT_MOST)


@contextlib.contextmanager
def started_on_history(sessions: int, events: int) -> Iterator[StartedOnHistory]:
    """Start a monitor on a history, measure what that costs, and leave it running for a while."""
    monitor = RunningMonitor(new_home())
    try:
        write_history(monitor.home + "/events", sessions, events, cm.now_ms())
        os.sync()  # what was just written is not written out while time is taken
        begin = time.perf_counter()
        monitor.start()
        eventually(lambda: monitor.get("/api/status")["loading"] is None, 300, "the stored sessions")
        start_ms = (time.perf_counter() - begin) * 1000
        settled(monitor)
        yield StartedOnHistory(monitor, start_ms, bench_memory_mb(monitor.pid, "VmRSS"))
    finally:
        clean_up(monitor)


def ingest_in_turn(monitors: list[RunningMonitor], sizes: Sizes) -> list[float]:
    """Return for each monitor the microseconds that an event of a stream takes."""
    rates: list[list[float]] = [[] for _ in monitors]
    for _ in range(GROWTH_ROUNDS):
        for monitor, found in zip(monitors, rates, strict=True):
            lines = hook_lines(int(40_000 * sizes.round_s))
            settled(monitor)
            found.append(rate_of_a_stream(monitor.socket_path, lines, sizes.round_s))
    return [1e6 / statistics.median(found) for found in rates]


def growth_of_clients(sizes: Sizes) -> Iterator[Figure]:
    """Measure what each client costs, for memory and for an event that all of them get."""
    monitor = RunningMonitor(new_home(), {"limits": {"connections": 2000}})
    try:
        monitor.start()
        memory_kb, delivery_us = [], []
        with monitor_teller(monitor) as say:
            for count in GROWTH_CLIENTS:
                memory_kb.append(max(0.01, client_memory_kb(count)))
                with listened_to(monitor, count, view="rows") as audience:
                    rate, _ = audience.listen(say, 1, 2 * sizes.round_s)
                    delivery_us.append(1e6 / rate / count)
        words = growth_words(GROWTH_CLIENTS, "clients")
        yield growth_figure(f"memory, for each of {words}", memory_kb, "kB")
        yield growth_figure(f"delivery of an event to each of {words}", delivery_us, "us")
    finally:
        clean_up(monitor)


# Latency: from a hook's start to a WebSocket client

# Says events at a steady rate, as hook processes or by the hook's own code in this one process; each event holds the
# time when its hook started.
LATENCY_LOAD = """
import json, os, sys, time
job = json.loads(sys.argv[1])
sys.path.insert(0, job["root"])
import emit_event as ee
environment = os.environb
begin = time.monotonic()
for number in range(job["count"]):
    time.sleep(max(0.0, begin + number / job["rate"] - time.monotonic()))
    payload = job["payload"].replace("@start", str(time.time_ns())).encode()
    if job["command"]:
        reader, writer = os.pipe()
        os.write(writer, payload + b"\\n")
        os.close(writer)
        os.posix_spawn(
            job["command"][0], job["command"], environment, file_actions=[(os.POSIX_SPAWN_DUP2, reader, 0)]
        )
        os.close(reader)
    elif job["mode"] == "local":
        refused = ee.send(job["socket"], ee.wrap(payload, environment), time.monotonic() + 5)
        if refused:
            sys.exit(refused)
    else:
        ee.append_to_spool(job["spool"], ee.wrap(payload, environment))
        ee.ensure_publisher(os.environ["CONTEXTUATE_HOME"])
print(job["count"] / (time.monotonic() - begin))
"""


def bench_latency(sizes: Sizes) -> Iterator[Figure]:
    """Measure from the start of the hook to the WebSocket client, on one machine, in both modes."""
    with redis_parts() as maker:
        server = maker(RedisServer)
        for config in ({"mode": "local"}, server.settings()):
            machine = maker(RedisMachine, config=config).start()
            command = shlex.split(machine.hook)[:4]
            if config["mode"] == "redis":
                machine.wait_until("connected")
            client = machine.websocket("rows")
            machine.say("begin")  # the publisher has started, the caches are warm
            client.events(1)
            for rate, seconds, with_processes in sizes.latency_rates:
                said_by = command if with_processes else []
                delays_ms = latencies_ms(machine, client, rate, rate * seconds, said_by)
                if with_processes:
                    yield process_latency(
                        f"{config['mode']}, hook to client, {rate} a second", delays_ms, command
                    )
                else:
                    name = f"{config['mode']}, event to client, {rate} a second"
                    is_goal = config["mode"] == "local"
                    for percent, limit_ms in ((50, 2.0), (99, 15.0)):
                        ours = share(delays_ms, percent)
                        peer, at_most = ("the goal", 1.0) if is_goal else ("the goal of local mode", None)
                        yield against(f"{name}, p{percent}", ours, limit_ms, "ms", peer, at_most)
            client.close()
            machine.stop()


def process_latency(name: str, delays_ms: list[float], command: list[str]) -> Figure:
    """Return the row of whole hook processes, whose interpreter alone takes most of the time."""
    bare = [timed_run([command[0], "-I", "-S", "-c", "pass"], b"", {}) * 1000 for _ in range(20)]
    ours, limit = statistics.median(delays_ms), statistics.median(bare)
    spread = (delays_ms[0] / limit, share(delays_ms, 99) / limit)
    return Figure(
        f"{name}, p50", ours, "ms", limit, "a bare interpreter; spread up to p99", ours / limit, spread=spread
    )


def latencies_ms(
    machine: RedisMachine, client: TestClient, rate: int, count: int, command: list[str]
) -> list[float]:
    """Say `count` events at a rate; return the ms that each took to the client, sorted."""
    job = {
        "root": ROOT, "mode": machine.config["mode"], "socket": machine.socket_path, "spool": machine.home + "/spool",
        "rate": rate, "count": count, "command": command,
        "payload": json.dumps(payload("PreToolUse", tool_name="Bash", tool_use_id="@start", tool_input={"command": "ls"})),
    }  # fmt: skip
    taken = []
    with subprocess.Popen(
        [sys.executable, "-c", LATENCY_LOAD, json.dumps(job)], env=machine.environment, stdout=subprocess.PIPE
    ) as load:
        assert load.stdout is not None
        while len(taken) < count:
            message = client.connection.recv(timeout=30)
            now_ns = time.time_ns()
            event = json.loads(message).get("event")
            if event:
                taken.append((now_ns - int(event["data"]["toolUseId"])) / 1e6)
        real_rate = float(load.stdout.read())
    if load.returncode or real_rate < 0.9 * rate:
        raise BenchError(f"{real_rate:.0f} events a second were said instead of {rate}")
    return sorted(taken)


# Redaction


def bench_redact(sizes: Sizes) -> Iterator[Figure]:
    """Measure redaction: what it finds of the corpus, what it takes for a secret, and how fast it is.

    The limit is the time of one `in` for each hint over the same text in the same run; the text has every hint.
    """
    corpus, missed = hook_corpus(), hook_missed()
    for kind, text in missed:
        bench_tell(f"missed {kind}: {text[:80]!r}")
    found = len(corpus) - len(missed)
    yield Figure(
        "secrets found in their surroundings",
        found,
        "",
        len(corpus),
        "all of them",
        found / len(corpus),
        at_least=1,
    )
    harmless = hook_harmless_texts()
    untouched = sum(ee.redact_text(text) == text for text in harmless)
    yield Figure(
        "harmless texts left as they are", untouched, "", len(harmless), "all of them", untouched / len(harmless),
        at_least=1,
    )  # fmt: skip
    code = redaction_code()
    alarms = ee.redact_text(code).count("[redacted:") - code.count("[redacted:")
    yield Figure(f"false alarms in {len(code) / 1e6:.1f} MB of Python's library", alarms, "", None, "", None)
    text = (code[:4_000_000] + " ".join(hook_hints())) + code[4_000_000:8_000_000]
    for name, tried in (("code that has every hint", text), ("recorded payloads", redaction_recorded())):
        megabytes = len(tried) / 1e6
        pairs = [(megabytes / timed_redaction(tried), megabytes / timed_hints(tried)) for _ in range(5)]
        yield paired(f"redaction of {name}", pairs, "MB/s", "one `in` for each hint")


def redaction_code() -> str:
    """Return the source of Python's own library, ASCII only."""
    texts = []
    for path in sorted(glob.glob(os.path.dirname(inspect.__file__) + "/*.py")):
        with open(path, "rb") as file:
            texts.append(file.read().decode("ascii", "ignore"))
    return "".join(texts)


def redaction_recorded() -> str:
    """Return the recorded payloads as one text of some megabytes."""
    text = "\n".join(line.decode("utf-8") for name in recording_names() for line in recorded_lines(name))
    return text * (4_000_000 // len(text) + 1)


def timed_redaction(text: str) -> float:
    begin = time.process_time()
    ee.redact_text(text)
    return time.process_time() - begin


def timed_hints(text: str) -> float:
    """Return the time that looking for each hint takes when none is there."""
    begin = time.process_time()
    found = [shape for shape in ee.SECRET_SHAPES if shape.hint + "\0" in text]
    if found:
        raise BenchError("the text has NUL characters: the speed means nothing")
    return time.process_time() - begin


# The page


MEASURE_FRAMES = """(ms) => new Promise((done) => {
  const frames = [], long = [];
  const seen = new PerformanceObserver((list) => list.getEntries().forEach((entry) => long.push(entry.duration)));
  seen.observe({ type: 'longtask' });
  let last = 0;
  const end = performance.now() + ms;
  requestAnimationFrame(function next(now) {
    if (last) frames.push(now - last);
    last = now;
    if (now < end) requestAnimationFrame(next); else setTimeout(() => { seen.disconnect(); done({ frames, long }); }, 100);
  });
})"""
USE_THE_PAGE = """(ms) => {
  const grid = document.querySelector('[data-testid=table]');
  const canvas = document.querySelector('#timeline-canvas');
  const box = canvas.getBoundingClientRect();
  let step = 0;
  const timer = setInterval(() => {
    step += 1;
    grid.scrollTop = grid.scrollHeight * Math.abs(Math.sin(step / 40));
    canvas.dispatchEvent(new WheelEvent('wheel', { deltaY: step % 80 < 40 ? 60 : -60, clientX: box.x + box.width * 0.6,
      clientY: box.y + 60, cancelable: true }));
  }, 16);
  setTimeout(() => clearInterval(timer), ms);
}"""
PAGE_EVENTS_PER_S = 1000
PAGE_EVENTS_LOADED = 100_000


def page_traffic(first: int, count: int) -> list[dict[str, Any]]:
    """Return calls and results of 20 sessions, two agents each; some fail, some start a turn."""
    events = []
    for number in range(first, first + count // 2):
        session = f"load-{number % 20}"
        agent = {"agent_id": f"a{number % 20}", "agent_type": "explorer"} if number % 3 == 0 else {}
        call, result = browser_call(number, session, tool_response={"stdout": "ok"})
        failed = {"hook_event_name": "PostToolUseFailure", "error": "Exit code 1"} if number % 23 == 0 else {}
        events += [{**call, **agent}, {**result, **agent, **failed, "duration_ms": 5 + number % 400}]
    return events


@contextlib.contextmanager
def page_load(monitor: RunningMonitor, first: int, per_s: int) -> Iterator[None]:
    """Send events at a steady rate while the block runs."""
    ended = threading.Event()

    def send() -> None:
        number, begin, sent = first, time.monotonic(), 0
        while not ended.wait(0.02):
            due = int((time.monotonic() - begin) * per_s) // 2 * 2 - sent
            if due:
                monitor.emit(*page_traffic(number, due))
                number, sent = number + due // 2, sent + due

    sender = threading.Thread(target=send)
    sender.start()
    yield
    ended.set()
    sender.join()


SEE_WAITS = """() => {
  window.seen = {};
  new MutationObserver(() => {
    for (const el of document.querySelectorAll('[data-testid=session][data-state=waiting]')) seen[el.dataset.sessionId] ??= Date.now();
  }).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ['data-state'] });
}"""


def page_wait_times(monitor: RunningMonitor, tab: Any, command: str, count: int) -> list[float]:
    """Run the installed hook with permission requests; return the ms from its start to the rail's amber row."""
    tab.evaluate(SEE_WAITS)
    times = []
    for number in range(count):
        session = f"asks-{number}"
        monitor.emit(payload("UserPromptSubmit", session, prompt="work"))
        ask = payload("PermissionRequest", session, tool_name="Bash", tool_input={"command": f"rm {number}"})
        begin = time.time()
        run_hook(command, json.dumps(ask).encode(), monitor.environment)
        shown = eventually(lambda session=session: tab.evaluate(f"seen['{session}'] || 0"))
        times.append(shown - begin * 1000)
    return sorted(times)


class PageFigures(NamedTuple):
    """What was seen of a tab for some seconds; times in ms.

    Frames and long tasks are wall time, which other programs' work is part of; `busy` is the processor time of the
    page's main thread, for each frame of 16.7 ms.
    """

    frame_p95: float
    longest_frame: float
    longest_task: float
    busy: float
    heap_mb: float


def watch_page(tab: Any, seconds: float) -> PageFigures:
    """Measure a tab for some seconds."""
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy_s() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    begin, busy_before = time.monotonic(), busy_s()
    found = tab.evaluate(MEASURE_FRAMES, seconds * 1000)
    busy_ms = (busy_s() - busy_before) / (time.monotonic() - begin) * 1000 / 60
    frames = sorted(found["frames"])
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return PageFigures(share(frames, 95), frames[-1], max(found["long"], default=0), busy_ms, heap / 1e6)


def page_rows(name: str, seen: PageFigures, empty: PageFigures) -> Iterator[Figure]:
    """Return the rows of one state of the page, beside an empty page."""
    bench_tell(f"{name}: longest frame {seen.longest_frame:.1f} ms, longest task {seen.longest_task:.1f} ms")
    yield against(
        f"page, {name}: frame p95", seen.frame_p95, empty.frame_p95, "ms", "an empty page", at_most=1.2
    )
    yield against(f"page, {name}: busy in a frame", seen.busy, 16.7, "ms", "a frame")
    yield Figure(f"page, {name}: heap", seen.heap_mb, "MB", empty.heap_mb, "an empty page", None)


def bench_page(sizes: Sizes) -> Iterator[Figure]:
    """Measure frames, work and memory of the page under load, beside an empty page in the same run."""
    if BROWSER is None:
        raise BenchError("Chromium is missing")
    made = RunningMonitor(new_home())
    size = {"width": 1440, "height": 900}
    with playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=BROWSER, args=BROWSER_OPTIONS)
        try:
            made.start().emit(*page_traffic(0, 200))
            empty, tab = browser.new_page(viewport=size), browser.new_page(viewport=size)
            tab.goto(made.url.replace("127.0.0.1", "localhost"))
            yield from page_rows(
                "nothing happens", watch_page(tab, sizes.page_s), beside_an_empty_page(empty, tab, sizes)
            )
            waits = page_wait_times(made, tab, made.installed_command(), 20)
            yield against(
                "page, from a permission hook to the rail, p50", waits[10], 100, "ms", "what feels at once"
            )
            with page_load(made, 1000, PAGE_EVENTS_PER_S):
                seen = watch_page(tab, 2 * sizes.page_s)
                while_busy = beside_an_empty_page(empty, tab, sizes)
            yield from page_rows("1,000 events a second", seen, while_busy)
            fill_page(made, tab, sizes.page_events)
            held = tab.evaluate("contextuate.store.rows.length")
            bench_tell(f"{sizes.page_events:,} events read, {held:,} rows held")
            with page_load(made, 400_000, PAGE_EVENTS_PER_S):
                tab.evaluate(USE_THE_PAGE, sizes.page_s * 1000)
                seen = watch_page(tab, sizes.page_s)
            name = f"with {sizes.page_events:,} events, scrolled and zoomed"
            yield from page_rows(name, seen, while_busy)
        finally:
            browser.close()
            clean_up(made)


def beside_an_empty_page(empty: Any, tab: Any, sizes: Sizes) -> PageFigures:
    """Measure an empty page while ours stands in the background."""
    empty.bring_to_front()
    seen = watch_page(empty, sizes.page_s)
    tab.bring_to_front()
    return seen


def fill_page(monitor: RunningMonitor, tab: Any, count: int) -> None:
    """Let the page read so many events."""
    for first in range(200_000, 200_000 + count // 2, 1000):
        monitor.emit(*page_traffic(first, 2000))
    last = f"make step-{200_000 + count // 2 - 1}"
    eventually(lambda: tab.evaluate("contextuate.store.rows.at(-1).target") == last, 60)


# History: search and statistics


HISTORY_DAYS = 30
HISTORY_SESSIONS = 600
HISTORY_TOOLS = ("Bash", "Read", "Edit", "Write", "Grep", "Glob", "WebFetch", "Agent")


class HistoryMaker:
    """Made-up events of about 2 kB each: words as frequent as in a language, tool calls in pairs."""

    def __init__(self, count: int, seed: int = 5) -> None:
        self.rng = random.Random(seed)
        self.count = count
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self.rng.choices(letters, k=self.rng.randint(3, 10))) for _ in range(40_000)]
        weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(self.words))))
        self.phrases = [
            " ".join(self.rng.choices(self.words, cum_weights=weights, k=26)) for _ in range(20_000)
        ]
        self.common, self.middle, self.rare = self.words[1], self.words[400], "heliotropium"

    def text(self, phrases: int) -> str:
        return "\n".join(self.rng.choices(self.phrases, k=phrases))

    def event(self, number: int, timestamp: int, session: str) -> dict[str, Any]:
        """Return event `number`: a call, or the result of the call before it."""
        tool = HISTORY_TOOLS[(number // 2) % len(HISTORY_TOOLS)]
        call = {
            "session_id": session, "cwd": f"/home/dev/project{hash(session) % 12}", "tool_name": tool,
            "tool_use_id": f"toolu_{session}_{number // 2}", "transcript_path": f"/home/dev/.claude/{session}.jsonl",
            "permission_mode": "default",
        }  # fmt: skip
        if number % 2 == 0:
            call |= {"hook_event_name": "PreToolUse", "tool_input": {"command": self.text(8)}}
        else:
            call |= {
                "hook_event_name": "PostToolUse", "tool_input": {"file_path": f"/src/{self.rng.choice(self.words)}.py"},
                "tool_response": {"stdout": self.text(8)}, "duration_ms": int(self.rng.lognormvariate(6, 2)),
            }  # fmt: skip
            if number % 40 == 1:
                call |= {"hook_event_name": "PostToolUseFailure", "error": "exit status 1"}
        if number % 50_000 == 77:
            call["note"] = self.rare
        return ee.build_event({**call, "timestamp": timestamp}, timestamp, f"machine{number % 3}")


def write_long_history(root: str, maker: HistoryMaker, now_ms: int) -> int:
    """Write the events as the store would have, over HISTORY_DAYS days; return their bytes."""
    step = HISTORY_DAYS * 86_400_000 / maker.count
    per_session = max(2, maker.count // HISTORY_SESSIONS // 2 * 2)
    size = 0
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for number in range(maker.count):
            timestamp = int(now_ms - (maker.count - number) * step)
            session = f"session-{number // (4 * per_session) * 4 + (number // 2) % 4}"
            path = f"{root}/{cm.day_of(timestamp)}/{session}.jsonl"
            if path not in files:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                if len(files) > 200:
                    stack.close()
                    files.clear()
                files[path] = stack.enter_context(open(path, "ab"))
            line = (
                cm.numbered_line(
                    number + 1, timestamp, ee.encode_json(maker.event(number, timestamp, session))
                )
                + b"\n"
            )
            files[path].write(line)
            size += len(line)
    return size


def bench_history(sizes: Sizes) -> Iterator[Figure]:
    """Search and count in events of 2 kB (CONTEXTUATE_BENCH_EVENTS at full size), and ingest with the index and
    without.
    """
    home, count = new_home(), sizes.history_events
    try:
        maker = HistoryMaker(count)
        begin = time.monotonic()
        size = write_long_history(home + "/events", maker, cm.now_ms())
        bench_tell(f"{count:,} events of {size / count:.0f} bytes made in {time.monotonic() - begin:.0f} s")
        journal = cm.Journal(home + "/events")
        journal.open()
        history = cm.History(journal, home + "/index.db")
        begin = time.monotonic()
        history.start()
        try:
            eventually(lambda: history.status()["state"] == "ready", 1800, "the index")
            seconds = time.monotonic() - begin
            bench_tell(f"index made in {seconds:.0f} s, {count / seconds:,.0f} events a second")
            yield from history_figures(history, maker, home + "/events", size)
        finally:
            history.stop()
    finally:
        shutil.rmtree(home)


def history_figures(history: Any, maker: HistoryMaker, root: str, size: int) -> Iterator[Figure]:
    """Time searches and statistics (95th percentile), and take the size of the index."""
    session, among = "session-8", f"in {maker.count:,} events"
    common = cm.SearchQuery(cm.parse_terms(maker.common))
    sought = {
        "search, rare word": (cm.SearchQuery(cm.parse_terms(maker.rare)), 100),
        "search, common word": (common, 100),
        "search, middling word": (cm.SearchQuery(cm.parse_terms(maker.middle)), 100),
        "search, two common words": (cm.SearchQuery(cm.parse_terms(f"{maker.common} {maker.words[3]}")), 100),
        "search, beginning of a word": (cm.SearchQuery(cm.parse_terms(maker.middle[:3] + "*")), 100),
        "search, common word of a session": (
            cm.SearchQuery(cm.parse_terms(maker.common), frozenset([session])), 100),
        "search, nothing found": (cm.SearchQuery(cm.parse_terms("nowheretobefound")), 100),
        "one session, first page": (cm.SearchQuery((), frozenset([session])), 30),
    }  # fmt: skip
    for name, (query, limit_ms) in sought.items():
        found = len(history.search(query)["results"])
        if not found and "nothing" not in name:
            raise BenchError(f"{name}: nothing was found")
        ours = percentile_ms(lambda query=query: history.search(query), 40)
        yield against(f"{name} {among} ({found}), p95", ours, limit_ms, "ms")
    pairs = [(percentile_ms(lambda: history.search(common), 3), read_everything_ms(root)) for _ in range(5)]
    yield paired(f"search, common word {among}", pairs, "ms", "reading the bytes once", at_most=1.0)
    ours = percentile_ms(lambda: history.statistics(0, 1 << 53, None, 60), 10)
    yield against(f"statistics of {HISTORY_DAYS} days {among}, p95", ours, 500, "ms")
    ours = percentile_ms(lambda: history.statistics(0, 1 << 53, session, 60), 10)
    yield against("statistics of one session, p95", ours, 500, "ms")
    yield against("index, of the events on disk", history.status()["bytes"] / size * 100, 60, "%")


def read_everything_ms(root: str) -> float:
    """Return the time to read the event files from beginning to end, without looking at them."""
    begin = time.perf_counter()
    for path in glob.glob(root + "/*/*.jsonl"):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    return (time.perf_counter() - begin) * 1000


def percentile_ms(call: Any, times: int) -> float:
    """Return the time that 95 of 100 calls do not exceed."""
    measured = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        measured.append((time.perf_counter() - begin) * 1000)
    return share(sorted(measured), 95)


WITHOUT_INDEX = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import contextuate_monitor as cm
cm.History.start = lambda *_: None
sys.exit(cm.main(sys.argv[1:]))
"""


def bench_index(sizes: Sizes) -> Iterator[Figure]:
    """Send events of 2 kB as fast as they are taken, with the index and without, in turn."""
    count = int(40_000 * sizes.round_s)
    maker = HistoryMaker(count)
    lines = [
        ee.encode_json(maker.event(number, NOW_MS, f"s{number % 40}")) + b"\n" for number in range(count)
    ]
    pairs = [(ingest_rate(lines, True), ingest_rate(lines, False)) for _ in range(sizes.rounds // 2 + 1)]
    yield paired(
        f"ingest of {count:,} events with the index", pairs, "/s", "without the index", at_least=0.85
    )


def ingest_rate(lines: list[bytes], with_index: bool) -> float:
    """Return the events a second that a new monitor stores and acknowledges."""
    home = new_home()
    monitor = RunningMonitor(home)
    if not with_index:
        monitor.program = home + "/without_index.py"
        with open(monitor.program, "w", encoding="utf-8") as file:
            file.write(WITHOUT_INDEX.replace("sys.argv.pop(1)", repr(ROOT)))
    process = subprocess.Popen(
        [sys.executable, monitor.program, "start", "--foreground", "--no-open"],
        env=monitor.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        eventually(lambda: os.path.exists(monitor.socket_path), what="the monitor's socket")
        eventually(lambda: os.path.exists(home + "/monitor.run.json"), what="the monitor")
        begin = time.perf_counter()
        with monitor.connect() as sock:
            sender = threading.Thread(
                target=lambda: [
                    sock.sendall(b"".join(lines[at : at + 50])) for at in range(0, len(lines), 50)
                ]
            )
            sender.start()
            taken = 0
            while taken < len(lines):
                piece = sock.recv(65536)
                if not piece:
                    raise BenchError("the monitor closed the connection")
                taken += len(piece)
            sender.join()
        return len(lines) / (time.perf_counter() - begin)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home)


# Start


def bench_restart(sizes: Sizes) -> Iterator[Figure]:
    """Start the monitor on a long history, first without an index, then with it."""
    sessions, events = sizes.restart
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monitor = RunningMonitor(new_home(), {"server": {"port": port}})
    on = f"on {events:,} events of {sessions:,} sessions"
    try:
        write_history(monitor.home + "/events", sessions, events, cm.now_ms())
        os.sync()
        for case, known_goal_s in (("without an index", 45 * events / 1e6), ("with the index", 3.0)):
            monitor.about = {"port": port}
            begin = time.perf_counter()
            starting = subprocess.Popen(
                [sys.executable, monitor.program, "start", "--no-open"],
                env=monitor.environment, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            served_s = eventually(
                lambda begin=begin: bench_page_answers(monitor) and time.perf_counter() - begin
            )
            if starting.wait():
                raise BenchError("the monitor did not start")
            with open(monitor.home + "/monitor.run.json", encoding="utf-8") as file:
                monitor.about = json.load(file)
            eventually(lambda: monitor.get("/api/status")["loading"] is None, 600)
            known_s = time.perf_counter() - begin
            if len(monitor.sessions()) < sessions * 0.9:
                raise BenchError("not every session was loaded")
            yield against(f"start {on}, {case}: page served", served_s * 1000, 500, "ms")
            yield against(f"start {on}, {case}: all known", known_s, known_goal_s, "s")
            settled(monitor, 600)
            yield against(
                f"start {on}, {case}: peak of memory", bench_memory_mb(monitor.pid, "VmHWM"), 110, "MB"
            )
            monitor.stop()
    finally:
        clean_up(monitor)


def bench_page_answers(monitor: RunningMonitor) -> bool:
    """Tell whether the page comes, whole."""
    try:
        status, _, body = monitor.request("/")
    except OSError:
        return False
    return status == 200 and body.rstrip().endswith(b"</html>")


BENCHMARKS: dict[str, Any] = {
    "hook": bench_hook,
    "hook-redis": bench_hook_redis,
    "storm": bench_storm,
    "ingest": bench_ingest,
    "broadcast": bench_broadcast,
    "clients": bench_clients,
    "latency": bench_latency,
    "idle": bench_idle,
    "growth": bench_growth,
    "restart": bench_restart,
    "history": bench_history,
    "index": bench_index,
    "redact": bench_redact,
    "page": bench_page,
}


def run_benchmarks(name: str, json_path: str | None) -> int:
    """Run one benchmark at full size, or all at small sizes; print one table, and write it as JSON, too."""
    if name != "all" and name not in BENCHMARKS:
        print(f"no benchmark is called {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    chosen, sizes = (list(BENCHMARKS), SMALL_SIZES) if name == "all" else ([name], FULL_SIZES)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's monitor runs from its bytecode, too
    gc.freeze()  # what the tests have imported is not looked through again and again while time is taken
    begin = time.monotonic()
    figures, failed = [], []
    print(BENCH_HEAD, flush=True)
    for number, each in enumerate(chosen, 1):
        print(
            f"bench {number}/{len(chosen)}: {each}, {time.monotonic() - begin:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        try:
            for figure in BENCHMARKS[each](sizes):
                figures.append(figure)
                print(figure.row(), flush=True)
        except (BenchError, AssertionError, OSError, pytest.skip.Exception) as error:
            failed.append(f"{each}: {error}")
            print(f"bench: {failed[-1]}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begin
    missed = sum(figure.misses for figure in figures)
    print(
        f"\n{len(figures)} figures in {seconds:.0f} s, {missed} miss their goal",
        *failed,
        sep="\nnot measured: ",
    )
    if json_path is not None:
        rows = [{**dataclasses.asdict(figure), "misses": figure.misses} for figure in figures]
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump({"figures": rows, "failed": failed, "seconds": round(seconds, 1)}, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_benchmarks(OPTIONS.bench, OPTIONS.json))
