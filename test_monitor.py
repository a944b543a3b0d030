#!/usr/bin/env python3
"""Tests and benchmarks of the Contextuate Monitor.

    python3 test_monitor.py --setup           get everything the tests need, then run them all
    python3 test_monitor.py [pytest options]  run the tests (-k NAME for some of them)
    python3 test_monitor.py --bench [NAME]    run the benchmarks, or one of: hook

The tests use real parts: the installed hook command, monitor processes, an independent WebSocket client,
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
    "hypothesis==6.170.15",
    "mypy==2.4.1",
    "playwright==1.65.2",
    "pytest==9.2.0",
    "redis==8.1.0",
    "ruff==0.17.6",
    "websockets==17.4",
)
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Program → the names any of which will do, and its package for each package manager.
SYSTEM_PROGRAMS = {
    "redis-server": (("redis-server",), {"apt-get": "redis-server", "dnf": "redis", "brew": "redis"}),
    "chromium": (CHROMIUM_NAMES, {"apt-get": "chromium", "dnf": "chromium", "brew": "chromium"}),
}


def find_program(names: "tuple[str, ...]") -> "str | None":
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


def install_programs(missing: "list[str]") -> None:
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


def parse_command_line() -> "tuple[argparse.Namespace, list[str]]":
    """Return our own options, and those for pytest."""
    parser = argparse.ArgumentParser(description="Tests and benchmarks of the Contextuate Monitor.")
    parser.add_argument(
        "--setup", action="store_true", help="get everything the tests need, then run them all"
    )
    parser.add_argument(
        "--bench", nargs="?", const="all", metavar="NAME", help="run the benchmarks, or one: hook"
    )
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
    if OPTIONS.bench is None or OPTIONS.setup:
        use_environment()

# ---------------------------------------------------------------------------
# Helpers and fixtures
# ---------------------------------------------------------------------------

import collections  # noqa: E402 - the set-up above runs without the packages below
import concurrent.futures  # noqa: E402
import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import http.client  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import stat  # noqa: E402
import statistics  # noqa: E402
import struct  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

sys.path.insert(0, ROOT)
import contextuate_monitor as cm  # noqa: E402
import emit_event as ee  # noqa: E402

if __name__ != "__main__" or OPTIONS.bench is None:
    import pytest
    import websockets
    import websockets.sync.client
    from hypothesis import HealthCheck, example, given, settings
    from hypothesis import strategies as st

RECORDED = os.path.join(ROOT, ".ci", "recorded", "hook-payloads")
PYTHON = cm.base_interpreter()
BROWSER = find_program(CHROMIUM_NAMES)
NOW_MS = 1_795_500_000_000  # a fixed "now" for tests without a clock


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


def recording_names() -> "list[str]":
    """List the recorded sessions."""
    return sorted(os.path.basename(path)[: -len(".jsonl")] for path in glob.glob(RECORDED + "/*.jsonl"))


def recorded_lines(name: str) -> "list[bytes]":
    """Return a recording's payloads as the client sent them; lines end at \\n only."""
    with open(f"{RECORDED}/{name}.jsonl", "rb") as file:
        return [line for line in file.read().split(b"\n") if line]


@functools.lru_cache(maxsize=None)
def _recorded(name: str) -> "tuple[str, ...]":
    return tuple(line.decode("utf-8") for line in recorded_lines(name))


def recorded(name: str) -> "list[dict[str, Any]]":
    """Return a recording's payloads, parsed."""
    return [json.loads(line) for line in _recorded(name)]


@dataclasses.dataclass
class RunningMonitor:
    """A monitor process of its own home, and what tests do with it."""

    home: str
    config: "dict[str, Any]" = dataclasses.field(default_factory=dict)
    program: str = os.path.join(ROOT, "contextuate_monitor.py")

    def __post_init__(self) -> None:
        self.socket_path = self.home + "/m.sock"
        self.claude_home = self.home + "/claude"
        self.write_config({})
        self.about: dict[str, Any] = {}

    def write_config(self, more: "dict[str, Any]") -> None:
        """Write the configuration: free ports, a socket of its own, and what the test wants."""
        config: dict[str, Any] = {"socketPath": self.socket_path, "server": {"port": 0, "wsPort": 0}}
        for key, value in {**self.config, **more}.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        with open(self.home + "/monitor.config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)

    @property
    def environment(self) -> "dict[str, str]":
        """The environment of every process that belongs to this monitor."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CONTEXTUATE", "CLAUDE"))
        }
        return {
            **kept,
            "CONTEXTUATE_HOME": self.home,
            "CLAUDE_CONFIG_DIR": self.claude_home,
            "CONTEXTUATE_MACHINE_ID": "testbox",
        }

    def command(
        self, *arguments: str, check: bool = True, **options: Any
    ) -> "subprocess.CompletedProcess[str]":
        """Run one command of the command line."""
        done = subprocess.run(
            [sys.executable, self.program, *arguments],
            env=self.environment, capture_output=True, text=True, timeout=60, check=False, **options,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{arguments} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def start(self) -> "RunningMonitor":
        """Start it in the background, as a user does."""
        self.command("start", "--no-open")
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
        self,
        path: str,
        method: str = "GET",
        body: "bytes | None" = None,
        headers: "dict[str, str] | None" = None,
    ) -> "tuple[int, dict[str, str], bytes]":
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

    def sessions(self) -> "dict[str, dict[str, Any]]":
        """Return every session by its id."""
        return {session["sessionId"]: session for session in self.get("/api/sessions?hidden=1")["sessions"]}

    def stored_events(self) -> "list[dict[str, Any]]":
        """Read every event file, in order of arrival."""
        events = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            with open(path, encoding="ascii") as file:
                events += [json.loads(line) for line in file]
        return sorted(events, key=lambda event: event["seq"])

    def stored_events_allowing_a_torn_line(self) -> "list[dict[str, Any]]":
        """Read every event file right after a kill: a last line may be torn, it was not acknowledged."""
        events = []
        for path in glob.glob(self.home + "/events/*/*.jsonl"):
            with open(path, "rb") as file:
                events += [json.loads(line) for line in file if line.endswith(b"\n")]
        return events

    def websocket(self, view: "str | None" = "full", **subscription: Any) -> "TestClient":
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

    def emit(self, *events: "dict[str, Any]") -> None:
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

    def next(self, kind: str, timeout_s: float = 15.0, **fields: Any) -> "dict[str, Any]":
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

    def ask(self, answer: str, **message: Any) -> "dict[str, Any]":
        """Send one message and return the answer of one kind."""
        self.send(**message)
        return self.next(answer)

    def events(self, count: int, timeout_s: float = 30.0) -> "list[dict[str, Any]]":
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
    command: str, payload: bytes, environment: "dict[str, str]", timeout_s: float = 30
) -> "subprocess.CompletedProcess[bytes]":
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


if __name__ != "__main__" or OPTIONS.bench is None:

    @pytest.fixture
    def monitor() -> "Iterator[RunningMonitor]":
        """A monitor of its own, not yet started."""
        made = RunningMonitor(new_home())
        yield made
        clean_up(made)

    @pytest.fixture
    def running(monitor: RunningMonitor) -> RunningMonitor:
        """A running monitor of its own."""
        return monitor.start()

    @pytest.fixture(scope="module")
    def shared() -> "Iterator[RunningMonitor]":
        """A running monitor for tests that leave no trace for others."""
        made = RunningMonitor(new_home()).start()
        yield made
        clean_up(made)

    needs_browser = pytest.mark.skipif(BROWSER is None, reason="Chromium is missing")
    needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")


def payload(hook: str, session: str = "s1", **fields: Any) -> "dict[str, Any]":
    """Return a hook payload with the fields every payload has."""
    return {
        "session_id": session, "transcript_path": "/nowhere.jsonl", "cwd": "/home/dev/shop",
        "hook_event_name": hook, **fields,
    }  # fmt: skip


# ---------------------------------------------------------------------------
# Benchmarks: each figure paired with its limit in one run
# ---------------------------------------------------------------------------


def bench_hook(pairs: int = 60) -> "list[tuple[str, float, float, float]]":
    """Time the hook against a bare interpreter, in turn; return (name, ours ms, bare ms, ratio), medians."""
    home = new_home()
    monitor = RunningMonitor(home)
    try:
        command = shlex.split(monitor.installed_command())[:4]
        monitor.start()
        line = recorded_lines("simple")[4] + b"\n"
        rows = [
            ("hook, local mode, acknowledged", command),
            ("the same from the whole file", [*command[:3], os.path.join(ROOT, "emit_event.py")]),
        ]
        results = [(name, *paired_times(ours, line, monitor.environment, pairs)) for name, ours in rows]
        stored = monitor.get("/api/status")["events"]["stored"]
        expected = 2 * (pairs + 3)
        if stored != expected:
            sys.exit(f"bench: {stored} events were stored instead of {expected}: the times mean nothing")
        monitor.stop()
        results.append(
            ("hook, no monitor, spooled", *paired_times(command, line, monitor.environment, pairs))
        )
        return results
    finally:
        clean_up(monitor)


def paired_times(
    ours: "list[str]", line: bytes, environment: "dict[str, str]", pairs: int
) -> "tuple[float, float, float]":
    """Run our command and a bare interpreter in turn.

    Return their median ms and the median ratio of the pairs.
    """
    bare = [ours[0], "-I", "-S", "-c", "pass"]
    for _ in range(3):
        timed_run(ours, line, environment), timed_run(bare, line, environment)
    times = [(timed_run(ours, line, environment), timed_run(bare, line, environment)) for _ in range(pairs)]
    return (
        statistics.median(mine for mine, _ in times) * 1000,
        statistics.median(limit for _, limit in times) * 1000,
        statistics.median(mine / limit for mine, limit in times),
    )


def timed_run(command: "list[str]", line: bytes, environment: "dict[str, str]") -> float:
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
        sys.exit(f"bench: {command} ended with status {status}")
    return seconds


BENCHMARKS = {"hook": bench_hook}


def run_benchmarks(name: str) -> int:
    """Run the chosen benchmarks and print one table."""
    chosen = BENCHMARKS if name == "all" else {key: run for key, run in BENCHMARKS.items() if key == name}
    if not chosen:
        print(f"no benchmark is called {name!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    print(f"{'figure':<36}{'ours':>10}{'limit':>10}{'ratio':>8}")
    for run in chosen.values():
        for figure, ours_ms, limit_ms, ratio in run():
            print(f"{figure:<36}{ours_ms:>7.2f} ms{limit_ms:>7.2f} ms{ratio:>8.2f}", flush=True)
    return 0


if __name__ == "__main__":
    if OPTIONS.bench is not None:
        sys.exit(run_benchmarks(OPTIONS.bench))
    sys.exit(pytest.main([os.path.abspath(__file__), "-q", "-ra", "-p", "no:cacheprovider", *PYTEST_OPTIONS]))
