"""Benchmarks: each figure beside its limit, measured in the same run.

    python3 test_monitor.py --bench                 all benchmarks at small sizes, about five minutes
    python3 test_monitor.py --bench NAME            one of them at full size
    python3 test_monitor.py --bench … --json FILE   write the figures to a file as well

Both write their table into .docs/benchmarks.md. A benchmark is a generator that measures the rows named above
it, in their order. What is compared takes turns, round by round, so that other load hits both sides.

Order: rows and figures · sizes · helpers · the benchmarks, from hook to page · document and main.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import gc
import glob
import http.client
import http.server
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import random
import re
import resource
import selectors
import shlex
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import setup

sys.path.insert(0, setup.ROOT)

import playwright.sync_api
import pytest
import redis

import contextuate_monitor as cm
import emit_event as ee
import test_monitor as tests

# ---- Rows and figures ----


class BenchError(Exception):
    """The benchmark did not do what it should measure."""


class Measured(NamedTuple):
    """What a benchmark measures for one row of its table."""

    ours: float
    limit: float | None = None  # missing where the row has a fixed limit, or none
    ratio: float | None = None  # missing where it is ours / limit
    spread: tuple[float, float] | None = None  # the smallest and the largest ratio


@dataclasses.dataclass
class Figure:
    """A row of the table; what is measured is missing until then."""

    name: str
    unit: str
    limit_is: str  # a fixed number, or what is measured beside ours; empty if there is no limit
    goal: str  # for the ratio of ours to the limit: "<= 1.2", ">= 0.9" or empty
    measured: Measured | None = None
    misses: bool = False  # the goal

    def enter(self, measured: Measured) -> None:
        """Enter what was measured."""
        ours, limit, ratio, spread = measured
        if limit is None and self.limit_is:
            limit = float(self.limit_is)
        if ratio is None and limit is not None:
            ratio = ours / limit
        if ratio is not None and self.goal:
            sign, bound = self.goal.split()
            self.misses = ratio > float(bound) if sign == "<=" else ratio < float(bound)
        self.measured = Measured(ours, limit, ratio, spread)

    def cells(self) -> list[str]:
        """Return the cells of the row, as in COLUMNS."""
        if self.measured is None:
            return [self.name, "not measured", "", "", self.goal, ""]
        ours, limit, ratio, spread = self.measured
        limit_is = self.with_unit(limit) if limit is not None else ""
        if limit_is and not self.limit_is.replace(".", "").isdigit():
            limit_is += f", {self.limit_is}"
        ratio_is = "" if ratio is None else f"{ratio:.2f}"
        spread_is = "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}"
        return [self.name, self.with_unit(ours), limit_is, ratio_is, self.goal, spread_is]

    def with_unit(self, value: float) -> str:
        """Return a count as it is, another number with three significant digits, and the row's unit."""
        digits = 0 if abs(value) >= 100 or isinstance(value, int) else 1 if abs(value) >= 10 else 2
        return f"{value:,.{digits}f} {self.unit}".rstrip()


COLUMNS = ("figure", "ours", "limit", "ratio", "goal", "spread")
WIDTHS = (56, 11, 34, 5, 7, 13)


def console_line(cells: Iterable[str]) -> str:
    """Return one line of the table for a terminal."""
    return " ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS)).rstrip()


def note(message: str) -> None:
    """Print progress, apart from the table."""
    print(message, file=sys.stderr, flush=True)


def paired(pairs: list[tuple[float, float]]) -> Measured:
    """Return the medians of pairs (ours, limit), one for each round, the median ratio and its spread."""
    ratios = [ours / limit for ours, limit in pairs]
    ours, limit = (statistics.median(values) for values in zip(*pairs))
    return Measured(ours, limit, statistics.median(ratios), (min(ratios), max(ratios)))


def percentile(ordered: list[float], percent: int) -> float:
    """Return the value that `percent` of 100 values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


# ---- Sizes, and the table of benchmarks ----


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much the benchmarks do; rows may name a field in braces."""

    hook_pairs: int
    storm_hooks: int
    rounds: int
    round_s: float
    latency_s: int
    idle_s: float
    restart_sessions: int
    restart_events: int
    restart_limit_s: float  # to read them without an index
    history_events: int
    page_s: float  # to watch one state of the page
    page_events: int  # loaded by the page


SMALL = Sizes(
    hook_pairs=20, storm_hooks=1000, rounds=5, round_s=0.25, latency_s=2, idle_s=10, restart_sessions=500,
    restart_events=100_000, restart_limit_s=4.5, history_events=100_000, page_s=4, page_events=20_000,
)  # fmt: skip
FULL = Sizes(
    hook_pairs=60, storm_hooks=10_000, rounds=9, round_s=0.5, latency_s=5, idle_s=20, restart_sessions=5000,
    restart_events=1_000_000, restart_limit_s=45, history_events=1_000_000, page_s=10, page_events=100_000,
)  # fmt: skip

Benchmark = Callable[[Sizes], Iterator[Measured]]
BENCHMARKS: dict[str, Benchmark] = {}
ROWS: dict[str, tuple[str, ...]] = {}  # of each benchmark, in the order of measurement


def benchmark(name: str, *rows: str) -> Callable[[Benchmark], Benchmark]:
    """Register a benchmark and its rows, each "name | unit | limit | goal"."""

    def register(function: Benchmark) -> Benchmark:
        BENCHMARKS[name], ROWS[name] = function, rows
        return function

    return register


def rows_of(name: str, sizes: Sizes) -> list[Figure]:
    """Return the rows of a benchmark at a size, not yet measured."""
    rows = (row.format(**dataclasses.asdict(sizes)) for row in ROWS[name])
    cells = ([cell.strip() for cell in row.split("|")] for row in rows)
    return [Figure(name, unit, limit_is, goal) for name, unit, limit_is, goal in cells]


# ---- Helpers ----

Call = Callable[[], object]

BARE_INTERPRETER = [tests.PYTHON, "-I", "-S", "-c", "pass"]
HOOK_INPUT = tests.recorded_lines("simple")[4] + b"\n"
MANY_CLIENTS = {"connections": 2000}


@contextlib.contextmanager
def new_monitor(**config: Any) -> Iterator[tests.RunningMonitor]:
    """Give a monitor that is not yet started; remove it at the end."""
    monitor = tests.RunningMonitor(tests.new_home(), config)
    try:
        yield monitor
    finally:
        tests.clean_up(monitor)


def hook_of(monitor: tests.RunningMonitor) -> list[str]:
    """Install the hook and return its command without the shell: interpreter, options, script."""
    return shlex.split(monitor.installed_command())[:4]


def timed_ms(call: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the milliseconds that a call takes."""
    begin = clock()
    call()
    return (clock() - begin) * 1000


def p95_ms(call: Call, times: int) -> float:
    """Return the time that 95 of 100 calls do not exceed."""
    return percentile(sorted(timed_ms(call) for _ in range(times)), 95)


def spawn(command: list[str], given: bytes, environment: dict[str, str]) -> int:
    """Start a process whose input lies ready in a pipe; return its id."""
    reader, writer = os.pipe()
    os.write(writer, given)
    os.close(writer)
    quiet = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
    actions = [(os.POSIX_SPAWN_DUP2, reader, 0), quiet]
    pid = os.posix_spawn(command[0], command, environment, file_actions=actions)
    os.close(reader)
    return pid


def timed_process(command: list[str], given: bytes, environment: dict[str, str]) -> float:
    """Return the milliseconds from a process's start to its end."""
    begin = time.perf_counter()
    _, status = os.waitpid(spawn(command, given, environment), 0)
    if status:
        raise BenchError(f"{command} ended with status {status}")
    return (time.perf_counter() - begin) * 1000


def wait_for_sessions(monitor: tests.RunningMonitor) -> None:
    """Wait until every stored session has been read."""
    tests.eventually(lambda: monitor.get("/api/status")["loading"] is None, 600, "the stored sessions")


def sum_of_threads(pid: int, file_name: str, pattern: str) -> int:
    """Return the sum of a number in /proc/PID/task/*/FILE."""
    paths = pathlib.Path(f"/proc/{pid}/task").glob("*/" + file_name)
    return sum(int(re.findall(pattern, path.read_text())[0]) for path in paths)


def at_rest(pid: int, seconds: float) -> tuple[float, float]:
    """Return what a process uses of one processor in percent, and its wake-ups a second."""

    def used() -> tuple[float, int]:  # finer than the ticks of /proc/PID/stat
        switches = sum_of_threads(pid, "status", r"\nvoluntary_ctxt_switches:\s+(\d+)")
        return sum_of_threads(pid, "schedstat", r"^(\d+)") / 1e9, switches

    before, begin = used(), time.monotonic()
    time.sleep(seconds)
    processor_s, switches = (after - start for after, start in zip(used(), before))
    seconds = time.monotonic() - begin
    return processor_s / seconds * 100, switches / seconds


def memory_mb(pid: int, field: str = "VmRSS") -> float:
    """Return a process's resident memory, or its peak (VmHWM)."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


# ---- Hook: the process that Claude Code waits for ----

WARM_UP_PAIRS = 3


@benchmark(
    "hook",
    "hook, local mode | ms | bare interpreter | <= 1.3",
    "hook, local mode, source file instead of installed | ms | bare interpreter |",
    "hook, no monitor, spooled | ms | bare interpreter | <= 1.3",
)
def bench_hook(sizes: Sizes) -> Iterator[Measured]:
    """Time the hook in local mode."""
    with new_monitor() as monitor:
        installed = hook_of(monitor)
        monitor.start()
        yield timed_hook(installed, monitor, sizes.hook_pairs)
        source = os.path.join(setup.ROOT, "emit_event.py")
        yield timed_hook([*installed[:3], source], monitor, sizes.hook_pairs)
        stored = monitor.get("/api/status")["events"]["stored"]
        expected = 2 * (sizes.hook_pairs + WARM_UP_PAIRS)
        if stored != expected:
            raise BenchError(f"{stored} events were stored instead of {expected}")
        monitor.stop()
        yield timed_hook(installed, monitor, sizes.hook_pairs)


@benchmark(
    "status-line",
    "status line, nothing changed | ms | bare interpreter | <= 1.3",
    "status line around another one, nothing changed | ms | bare interpreter and that one | <= 1.3",
    "status line, how much later than the one it wraps, p95, figures changed | ms | 50 | <= 1",
)
def bench_status_line(sizes: Sizes) -> Iterator[Measured]:
    """Time the status line, after its figures were handed on, and when all of them change each time."""
    with new_monitor() as monitor:
        ours, wrapped = [*hook_of(monitor), "--status-line", ""], "echo shown"
        monitor.start()

        def timed(command: list[str], number: int = 0) -> float:
            line = json.dumps(tests.status_line(cost={"total_cost_usd": 1 + number})).encode() + b"\n"
            return timed_process(command, line, monitor.environment)

        alone, around = ["/bin/sh", "-c", wrapped], [*ours, wrapped]
        timed(ours)
        tests.eventually(lambda: glob.glob(monitor.home + "/gauges/s1"), 15, "figures that were handed on")
        rounds = range(WARM_UP_PAIRS + sizes.hook_pairs)
        yield paired([(timed(ours), timed(BARE_INTERPRETER)) for _ in rounds][WARM_UP_PAIRS:])
        pairs = [(timed(around), timed(BARE_INTERPRETER) + timed(alone)) for _ in rounds]
        yield paired(pairs[WARM_UP_PAIRS:])
        yield Measured(percentile([timed(around, number) - timed(alone) for number in rounds], 95))


@benchmark(
    "hook-redis",
    "hook, Redis mode, publisher runs | ms | bare interpreter | <= 1.4",
    "hook, Redis mode, publisher is started | ms | bare interpreter | <= 1.4",
    "hook, Redis mode, Redis is away | ms | bare interpreter | <= 1.4",
)
def bench_hook_redis(sizes: Sizes) -> Iterator[Measured]:
    """Time the part of Redis mode that Claude Code waits for."""
    with tests.redis_parts() as make:
        server = make(tests.RedisServer)
        machine = make(tests.RedisMachine, config=server.settings())
        command = hook_of(machine)
        machine.say("starts the publisher")
        tests.eventually(lambda: machine.publisher().get("published"))
        yield timed_hook(command, machine, sizes.hook_pairs)
        few = sizes.hook_pairs // 3
        yield timed_hook(command, machine, few, before_each=machine.end_publisher)
        machine.say("starts a publisher that stays")
        expected = 2 + sizes.hook_pairs + few + 2 * WARM_UP_PAIRS
        tests.eventually(lambda: len(server.streamed()) == expected, 30, f"{expected} events in Redis")
        server.stop()

        def waits() -> bool:
            machine.say("cannot be published")
            return bool(machine.publisher()["state"] == "waiting")

        tests.eventually(waits, what="a publisher that waits")
        yield timed_hook(command, machine, sizes.hook_pairs)


def timed_hook(
    command: list[str], monitor: tests.RunningMonitor, pairs: int, before_each: Call = lambda: None
) -> Measured:
    """Run the hook and a bare interpreter in turn, each after `before_each()`."""

    def timed(command: list[str]) -> float:
        before_each()
        other = b'"toolu_%d' % time.monotonic_ns()  # the same call again is no event
        return timed_process(command, HOOK_INPUT.replace(b'"toolu_', other), monitor.environment)

    rounds = [(timed(command), timed(BARE_INTERPRETER)) for _ in range(WARM_UP_PAIRS + pairs)]
    return paired(rounds[WARM_UP_PAIRS:])


@benchmark("storm", "{storm_hooks:,} hooks in a row, each stored once | /s | bare interpreters |")
def bench_storm(sizes: Sizes) -> Iterator[Measured]:
    """Run hooks at full speed, one for each processor at a time, in turn with bare interpreters."""
    count, parts = sizes.storm_hooks, 5
    with new_monitor() as monitor, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        command = hook_of(monitor)
        monitor.start()

        def rate(command: list[str], numbers: range) -> float:
            prompts = [tests.payload("UserPromptSubmit", f"s{n % 7}", prompt=str(n)) for n in numbers]
            inputs = [json.dumps(prompt).encode() for prompt in prompts]
            begin = time.perf_counter()
            list(pool.map(lambda given: timed_process(command, given, monitor.environment), inputs))
            return len(inputs) / (time.perf_counter() - begin)

        pairs = []
        for part in range(parts):
            numbers = range(part * count // parts, (part + 1) * count // parts)
            pairs.append((rate(command, numbers), rate(BARE_INTERPRETER, numbers)))
        stored = tests.eventually(lambda: len(events := monitor.stored_events()) >= count and events, 120)
        prompts = sorted(int(event["data"]["message"]) for event in stored)
        if prompts != list(range(count)):
            raise BenchError(f"{len(set(prompts))} of {count} events are stored, {len(prompts)} times")
        yield paired(pairs)


# ---- Ingest: from the socket to the file ----


def minimal_work(lines: bytes) -> bytes:
    """Do what a monitor cannot avoid: parse each line, look for hints of secrets, encode."""
    done = []
    for line in lines.splitlines():
        text = line.decode()
        ee._shapes_in(text)
        done.append(ee.encode_json(json.loads(text)) + b"\n")
    return b"".join(done)


def serve_bare_ingest(listener: socket.socket, path: str, work: Callable[[bytes], bytes]) -> None:
    """Read, append and acknowledge, in one `selectors` loop.

    Each turn accepts what waits, reads once from each ready connection, appends what `work` makes of it all
    with one write, and acknowledges every newline.
    """
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    while True:
        received = []
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ)
                continue
            connection = key.fileobj  # type: ignore[assignment]
            data = connection.recv(256 << 10)
            if data:
                received.append((connection, data))
            else:
                selector.unregister(connection)
                connection.close()
        if received:
            os.write(file, work(b"".join(data for _, data in received)))
            for connection, data in received:
                connection.send(ee.ACKNOWLEDGEMENT * data.count(b"\n"))


def hook_lines(count: int) -> list[bytes]:
    """Return lines as the hook sends them: recorded sessions, repeated under 20 session ids."""
    recorded = [line for name in ("simple", "parallel", "subagent") for line in tests.recorded_lines(name)]
    lines = []
    for number, line in zip(range(count), itertools.cycle(recorded)):
        session = re.search(rb'"session_id":"([^"]+)"', line)
        assert session is not None
        turn = number // len(recorded)
        line = line.replace(session.group(1), b"bench-%d" % (turn % 20))
        # With the same ids they would count as delivered twice, and not be stored.
        line = re.sub(rb'("(?:tool_use_id|prompt_id)":")', rb"\g<1>%d-" % turn, line)
        lines.append(ee.wrap(line, {b"CONTEXTUATE_MACHINE_ID": b"testbox"}))
    return lines


@contextlib.contextmanager
def connected(socket_path: str) -> Iterator[socket.socket]:
    """Give a connection to a Unix socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(15)
        sock.connect(socket_path)
        yield sock


def rate_connection_each(socket_path: str, lines: list[bytes], seconds: float) -> float:
    """Return the acknowledged events a second, each over a connection of its own as from hooks."""
    sent, begin = 0, time.perf_counter()
    while sent < len(lines) and time.perf_counter() - begin < seconds:
        with connected(socket_path) as sock:
            sock.sendall(lines[sent])
            if sock.recv(1) != ee.ACKNOWLEDGEMENT:
                raise BenchError("an event was not acknowledged")
        sent += 1
    return sent / (time.perf_counter() - begin)


def rate_stream(socket_path: str, lines: list[bytes], seconds: float, in_flight: int = 32) -> float:
    """Return the acknowledged events a second over one connection with up to so many events in flight."""
    with connected(socket_path) as sock:
        begin = time.perf_counter()
        sent = acknowledged = 0
        while acknowledged < sent or (sent < len(lines) and time.perf_counter() - begin < seconds):
            if time.perf_counter() - begin < seconds:
                sock.sendall(b"".join(lines[sent : acknowledged + in_flight]))
                sent = min(len(lines), max(sent, acknowledged + in_flight))
            if acknowledged < sent:
                acknowledged += len(sock.recv(64))
        return acknowledged / (time.perf_counter() - begin)


@benchmark(
    "ingest",
    "ingest, one connection | /s | bare loop |",
    "ingest, one connection; minimal loop | /s | minimal loop | >= 0.75",
    "ingest, a connection for each event | /s | bare loop |",
    "ingest, a connection for each event; minimal loop | /s | minimal loop | >= 0.65",
    "ingest, one connection, 32 in flight | /s | bare loop |",
    "ingest, one connection, 32 in flight; minimal loop | /s | minimal loop |",
)
def bench_ingest(sizes: Sizes) -> Iterator[Measured]:
    """Send the hook's lines to the monitor, and in turn to a bare loop and to one with `minimal_work`."""
    with new_monitor() as monitor, contextlib.ExitStack() as stack:
        paths = [monitor.home + "/bare.sock", monitor.home + "/minimal.sock"]
        for path, work in zip(paths, (bytes, minimal_work)):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(512)
            stack.enter_context(tests.serving(serve_bare_ingest, listener, path + ".jsonl", work))
        monitor.start()
        for rate in (functools.partial(rate_stream, in_flight=1), rate_connection_each, rate_stream):
            rounds = []
            for _ in range(sizes.rounds):
                lines = hook_lines(int(60_000 * sizes.round_s))
                tests.index_ready(monitor)
                bare, minimal = (rate(path, lines, sizes.round_s) for path in paths)
                rounds.append((rate(monitor.socket_path, lines, sizes.round_s), bare, minimal))
            yield paired([(ours, bare) for ours, bare, _ in rounds])
            yield paired([(ours, minimal) for ours, _, minimal in rounds])


START = "import sys, contextuate_monitor as cm; sys.exit(cm.main(['start', '--foreground', '--no-open']))"
START_WITHOUT_INDEX = START.replace("; ", "; cm.History.start = lambda history: None; ", 1)


@benchmark(
    "http",
    "GET /api/status, one connection | /s | bare http.server | >= 0.6",
    "POST /api/hooks, one connection | /s | bare http.server | >= 0.6",
)
def bench_http(sizes: Sizes) -> Iterator[Measured]:
    """Make requests back to back, in turn to the monitor and to an `http.server` with the same answers."""
    body = json.dumps(tests.payload("UserPromptSubmit", prompt="over HTTP")).encode()
    with new_monitor() as monitor:
        monitor.start()
        origin = {"Origin": f"http://127.0.0.1:{monitor.port}"}
        for method, path, given in (("GET", "/api/status", None), ("POST", "/api/hooks", body)):
            _, headers, answer = monitor.request(path, method, given, origin)
            bare = socket.create_server(("127.0.0.1", 0), backlog=16)
            with bare, tests.serving(serve_bare_http, bare, headers, answer):
                ports = (monitor.port, bare.getsockname()[1])
                asked = (method, path, given, origin, sizes.round_s)
                rounds = [[request_rate(port, *asked) for port in ports] for _ in range(sizes.rounds)]
                yield paired([(ours, bare_rate) for ours, bare_rate in rounds])


def serve_bare_http(listener: socket.socket, headers: dict[str, str], answer: bytes) -> None:
    """Answer every request with the same status, headers and body, head and body in one write."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    response = f"HTTP/1.1 200 OK\r\n{head}\r\n".encode("latin-1") + answer

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.wfile.write(response)

        do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def request_rate(
    port: int, method: str, path: str, body: bytes | None, headers: dict[str, str], seconds: float
) -> float:
    """Return the requests a second over one connection that is kept open."""
    count, begin = 0, time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        while time.perf_counter() - begin < seconds:
            connection.request(method, path, body=body, headers=headers)
            with connection.getresponse() as response:
                response.read()
            if response.status != 200:
                raise BenchError(f"{method} {path} was answered with {response.status}")
            count += 1
        return count / (time.perf_counter() - begin)


@benchmark("index", "ingest of events of 2 kB with the index | /s | without the index | >= 0.85")
def bench_index(sizes: Sizes) -> Iterator[Measured]:
    """Send large events as fast as they are stored, in turn to a monitor with the index and one without."""
    maker = LargeEvents(int(40_000 * sizes.round_s))
    events = [maker.event(number, tests.NOW_MS, f"s{number % 40}") for number in range(maker.count)]
    lines = [ee.encode_json(event) + b"\n" for event in events]

    def rate(program: str) -> float:
        with new_monitor() as monitor:
            about, command = monitor.home + "/monitor.run.json", [sys.executable, "-c", program]
            options: Any = {"cwd": setup.ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(command, env=monitor.environment, **options)
            try:
                tests.eventually(lambda: os.path.exists(about), what="the monitor")
                return rate_stream(monitor.socket_path, lines, 600)
            finally:
                process.kill()
                process.wait()

    yield paired([(rate(START), rate(START_WITHOUT_INDEX)) for _ in range(sizes.rounds // 2 + 1)])


# Broadcast and clients: from the store to many clients, and what each of them costs

EVENT_MARK = b"`~"  # exactly once in each event of these benchmarks, and in no other message
CLIENT_COUNTS = (1, 50, 200, 1000)


def marked_payload(output_lines: int = 20) -> dict[str, Any]:
    """Return a payload whose event has EVENT_MARK once, as a row too."""
    return tests.payload(
        "PostToolUse", "marked", tool_name="Bash", tool_use_id=EVENT_MARK.decode(), duration_ms=1200,
        tool_input={"command": "make test", "description": "Run the tests"},
        tool_response={"stdout": "all 212 tests passed\n" * output_lines, "stderr": "", "interrupted": False},
    )  # fmt: skip


Sender = Callable[[int], object]  # has the server send so many events
FramesOf = Callable[[int], bytes]  # returns the frames of so many events


class Audience:
    """WebSocket clients in one loop that only count events, so that the server's time is measured."""

    def __init__(
        self, port: int, count: int, ready: bytes, view: str = "full", receive_bytes: int | None = None
    ) -> None:
        """Connect and subscribe; a client is ready when it has received `ready`."""
        self.sockets: list[socket.socket] = []
        self._halves: dict[int, bytes] = {}  # of marks in two reads; one byte could be a frame's length
        self._selector = selectors.DefaultSelector()
        subscription = ee.encode_json({"type": "subscribe", "view": view})
        opening = tests.protocol_upgrade(f"127.0.0.1:{port}")
        opening += tests.protocol_frame(cm.Opcode.TEXT, subscription)
        for number in range(count):
            sock = socket.socket()
            sock.settimeout(15)
            if receive_bytes is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            sock.connect(("127.0.0.1", port))
            sock.sendall(opening)
            received = b""
            while ready not in received:
                piece = sock.recv(65536)
                if not piece:
                    raise BenchError(f"a client was refused: {received!r}")
                received += piece
            sock.setblocking(False)
            self.sockets.append(sock)
            self._selector.register(sock, selectors.EVENT_READ, number)

    def close(self) -> None:
        """Close every connection."""
        self._selector.close()
        for sock in self.sockets:
            sock.close()

    def measure(self, send: Sender, in_flight: int, seconds: float) -> tuple[float, list[float]]:
        """Have events sent for some time, at most `in_flight` that not every client has received.

        Return the events a second that all clients received and, sorted, the seconds from sending an event to
        each read that brought it.
        """
        counts = [0] * len(self.sockets)
        sent_at: list[float] = []
        delays: list[float] = []
        begin = time.perf_counter()
        complete = 0
        while True:
            now = time.perf_counter()
            if now - begin < seconds:
                more = in_flight - (len(sent_at) - complete)
                sent_at += [now] * more
                send(more)
            elif complete == len(sent_at):
                return complete / (now - begin), sorted(delays)
            self._receive(counts, complete + 1, sent_at, delays)
            complete = min(counts)

    def _receive(self, counts: list[int], wanted: int, sent_at: list[float], delays: list[float]) -> None:
        """Read until every client has received `wanted` events."""
        behind = sum(count < wanted for count in counts)
        while behind:
            ready = self._selector.select(15)
            if not ready:
                raise BenchError(f"{behind} of {len(counts)} clients received no event")
            for key, _ in ready:
                data = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                if not data:
                    raise BenchError("a client was disconnected")
                data = self._halves.pop(key.data, b"") + data
                self._halves |= {key.data: EVENT_MARK[:1]} if data[-1:] == EVENT_MARK[:1] else {}
                count, before = data.count(EVENT_MARK), counts[key.data]
                if count:
                    delays.append(time.perf_counter() - sent_at[before])
                    counts[key.data] = before + count
                    behind -= before < wanted <= before + count


@functools.lru_cache(maxsize=1)
def stored_events() -> list[cm.StoredEvent]:
    """Return marked events as the store hands them to the broadcast, more than are ever in flight."""
    now_ms = tests.NOW_MS
    event = ee.build_event(marked_payload(), now_ms, "testbox")
    encoded = ee.encode_json(event)
    numbered = [(seq, {"seq": seq, "received": now_ms, **event}) for seq in range(1, 65)]
    return [cm.StoredEvent(seq, event, cm.numbered_line(seq, now_ms, encoded)) for seq, event in numbered]


def framed_events(count: int) -> bytes:
    """Return the frames of so many stored events, with the minimal work."""
    events = stored_events()[:count]
    messages = [b'{"type":"event","seq":%d,"event":%b}' % (seq, line) for seq, _, line in events]
    return b"".join([struct.pack("!BBH", 0x81, 126, len(message)) + message for message in messages])


def serve_bare_broadcast(listener: socket.socket, orders: socket.socket, frames_of: FramesOf) -> None:
    """Send one frame to every client for each byte on `orders`, in one `selectors` loop.

    The frames of one turn, which `frames_of(count)` makes, go to each client in one send.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(orders, selectors.EVENT_READ)
    clients: list[socket.socket] = []
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.setblocking(False)
                selector.register(client, selectors.EVENT_READ)
            elif key.fileobj is orders:
                joined = frames_of(len(orders.recv(4096)))
                for client in clients:
                    client.send(joined)
            elif key.fileobj.recv(65536):  # type: ignore[union-attr]
                key.fileobj.send(b"ready\r\n\r\n")  # type: ignore[union-attr]
                clients.append(key.fileobj)  # type: ignore[arg-type]
            else:
                selector.unregister(key.fileobj)
                clients.remove(key.fileobj)  # type: ignore[arg-type]


def serve_broadcast(listener: socket.socket, orders: socket.socket) -> None:
    """Have the monitor's own loop and client server send one stored event for each byte on `orders`."""
    loop = cm.EventLoop()
    waiting = 0

    def receive(_ready: int) -> None:
        nonlocal waiting
        waiting += len(orders.recv(4096))

    def end_turn() -> None:
        nonlocal waiting
        if waiting:
            clients.broadcast(stored_events()[:waiting])
            waiting = 0

    clients = cm.WebSocketServer(
        loop, lambda client: setattr(client, "view", "full"), lambda client, text: None, 2000, 1 << 20
    )
    tests.serve_handshakes(listener, clients)
    loop.on_turn_end = end_turn
    loop.watch(orders, selectors.EVENT_READ, receive)
    loop.run()


@contextlib.contextmanager
def audience_of(count: int, serve: Any, *arguments: Any) -> Iterator[tuple[Audience, Sender]]:
    """Give clients of a server in a process of its own, and the function that has it send events."""
    ours, orders = socket.socketpair()
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener, ours, orders:
        orders.setblocking(False)
        with tests.serving(serve, listener, orders, *arguments), contextlib.ExitStack() as closing:
            audience = Audience(listener.getsockname()[1], count, b"\r\n\r\n")
            closing.callback(audience.close)
            yield audience, lambda events: ours.sendall(b"e" * events)


def broadcast_rows() -> Iterator[str]:
    """Yield the rows of the broadcast; its frames are compared for one client only."""
    for count in CLIENT_COUNTS:
        for in_flight in (1, 32):
            name = f"broadcast to {count:,}, {in_flight} in flight"
            yield f"{name} | /s | bare loop | >= 0.9"
            yield f"{name}, p99 | ms | bare loop | <= 1.2"
            if count == 1:
                yield f"{name}; minimal loop | /s | minimal loop |"


@benchmark("broadcast", *broadcast_rows())
def bench_broadcast(sizes: Sizes) -> Iterator[Measured]:
    """Send stored events to clients by the monitor's own loop, in turn with bare loops."""
    frame = cm.text_frames(cm.event_messages(stored_events()[:1], "full"))
    for count in CLIENT_COUNTS:
        note(f"  {count} clients")
        with contextlib.ExitStack() as stack:
            servers = [audience_of(count, serve_broadcast)]
            servers.append(audience_of(count, serve_bare_broadcast, lambda number: frame * number))
            if count == 1:
                servers.append(audience_of(count, serve_bare_broadcast, framed_events))
            audiences = [stack.enter_context(server) for server in servers]
            for in_flight in (1, 32):
                rates, tails = [], []
                for _ in range(sizes.rounds):
                    measured = [it.measure(send, in_flight, sizes.round_s) for it, send in audiences]
                    rates.append([rate for rate, _ in measured])
                    tails.append([percentile(delays, 99) * 1000 for _, delays in measured])
                yield paired([(ours, bare) for ours, bare, *_ in rates])
                yield paired([(ours, bare) for ours, bare, *_ in tails])
                if count == 1:
                    yield paired([(ours, minimal) for ours, _, minimal in rates])


def audience_in(monitor: tests.RunningMonitor, count: int, **options: Any) -> Any:
    """Give so many clients of a monitor, as a context that closes them."""
    return contextlib.closing(Audience(monitor.ws_port, count, b'"type":"status"', **options))


def sender_to(monitor: tests.RunningMonitor, output_lines: int = 20) -> Sender:
    """Return the function that sends a monitor so many marked events."""
    line, numbers = ee.encode_json(marked_payload(output_lines)), itertools.count(time.time_ns())
    send = publisher_of(monitor)

    def numbered() -> bytes:  # the same call again would count as its second delivery
        return line.replace(EVENT_MARK, b"%b%d" % (EVENT_MARK, next(numbers)), 1)

    return lambda count: send([numbered() for _ in range(count)])


@benchmark(
    "clients",
    "18 of 20 clients while two never read | /s | the 18 alone | >= 0.95",
    "memory for two clients that never read | MB | 3 | <= 1",
    "memory of each of 1,000 clients | kB | 2 | <= 1",
)
def bench_clients(sizes: Sizes) -> Iterator[Measured]:
    """Measure what clients that never read do to the others, and the memory of each client."""
    with new_monitor(limits=MANY_CLIENTS) as monitor:
        monitor.start()
        send = sender_to(monitor, output_lines=800)
        with audience_in(monitor, 18) as others:
            others.measure(send, 32, 1.0)
            rates, grown_mb = [], []
            for _ in range(sizes.rounds // 2 + 1):
                alone, _ = others.measure(send, 32, 2 * sizes.round_s)
                tests.index_ready(monitor)
                before_mb = memory_mb(monitor.pid)
                with audience_in(monitor, 2, receive_bytes=4096):
                    beside, _ = others.measure(send, 32, 2 * sizes.round_s)
                    rates.append((beside, alone))
                    for _ in range(100):  # until the monitor closes the two
                        if monitor.get("/api/status")["clients"] == 18:
                            break
                        others.measure(send, 32, sizes.round_s)
                    else:
                        raise BenchError("clients that never read were not closed")
                    grown_mb.append(memory_mb(monitor.pid) - before_mb)
        yield paired(rates)
        yield Measured(max(grown_mb))
    yield Measured(client_memory_kb(1000))


def client_memory_kb(count: int) -> float:
    """Return by how much a new monitor's memory grows for each of so many clients."""
    with new_monitor(limits=MANY_CLIENTS) as monitor:
        monitor.start().emit(tests.payload("UserPromptSubmit", prompt="begin"))
        tests.index_ready(monitor)
        with audience_in(monitor, 1, view="rows"):
            before_mb = memory_mb(monitor.pid)
            with audience_in(monitor, count, view="rows"):
                return max(0.01, (memory_mb(monitor.pid) - before_mb) * 1024 / count)


# ---- Latency: from the hook to a WebSocket client ----

HOOKS_PER_S, EVENTS_PER_S = 20, (100, 1000)  # more hook processes would fill a small machine


def latency_rows(mode: str, goal: str) -> Iterator[str]:
    """Yield the rows of one mode."""
    yield f"{mode} mode, hook to client, {HOOKS_PER_S} a second, p50 | ms | bare interpreter |"
    for rate in EVENTS_PER_S:
        yield f"{mode} mode, event to client, {rate:,} a second, p50 | ms | 2 {goal}"
        yield f"{mode} mode, event to client, {rate:,} a second, p99 | ms | 15 {goal}"


@benchmark("latency", *latency_rows("local", "| <= 1"), *latency_rows("Redis", "|"))
def bench_latency(sizes: Sizes) -> Iterator[Measured]:
    """Measure from the hook's start, as a process and as a call of its code, to the client."""
    with tests.redis_parts() as make:
        for config in ({"mode": "local"}, make(tests.RedisServer).settings()):
            machine = make(tests.RedisMachine, config=config).start()
            command = hook_of(machine)
            if config["mode"] == "redis":
                machine.wait_until("connected")
            client = machine.websocket("rows")
            machine.say("warms up the caches, starts the publisher")
            client.events(1)
            hooks_ms = latencies_ms(machine, client, HOOKS_PER_S, sizes.latency_s, *command)
            bare_ms = statistics.median(timed_process(BARE_INTERPRETER, b"", {}) for _ in range(20))
            spread = (hooks_ms[0] / bare_ms, percentile(hooks_ms, 99) / bare_ms)
            yield Measured(percentile(hooks_ms, 50), bare_ms, spread=spread)
            for rate in EVENTS_PER_S:
                events_ms = latencies_ms(machine, client, rate, sizes.latency_s)
                yield Measured(percentile(events_ms, 50))
                yield Measured(percentile(events_ms, 99))
            client.close()
            machine.stop()


def latencies_ms(
    machine: tests.RedisMachine, client: tests.TestClient, rate: int, seconds: int, *hook: str
) -> list[float]:
    """Return, sorted, the milliseconds that events sent at a rate took to the client."""
    count = rate * seconds
    taken: list[float] = []
    result, sender = multiprocessing.Pipe(duplex=False)
    with tests.serving(send_at_rate, machine, rate, count, list(hook), sender):
        while len(taken) < count:
            message = client.connection.recv(timeout=30)
            now_ns = time.time_ns()
            event = json.loads(message).get("event")
            if event:
                taken.append((now_ns - int(event["data"]["toolUseId"])) / 1e6)
        achieved = result.recv() if result.poll(10) else 0
    if achieved < 0.9 * rate:
        raise BenchError(f"{achieved:.0f} events a second were sent instead of {rate}")
    return sorted(taken)


def send_at_rate(machine: tests.RedisMachine, rate: int, count: int, hook: list[str], result: Any) -> None:
    """Send events at a steady rate, by hook processes or the hook's code; a call's id is its start time."""
    os.environ.update(machine.environment)
    ee.ACKNOWLEDGEMENT_DEADLINE_S = 5.0
    environment, begin = dict(os.environb), time.monotonic()
    for number in range(count):
        time.sleep(max(0.0, begin + number / rate - time.monotonic()))
        call = tests.payload("PreToolUse", tool_name="Bash", tool_use_id=str(time.time_ns()))
        given = json.dumps({**call, "tool_input": {"command": "ls"}}).encode()
        if hook:
            spawn(hook, given + b"\n", machine.environment)
        elif machine.config["mode"] == "local":
            refused = ee.send(machine.home, machine.socket_path, ee.wrap(given, environment))
            if refused:
                raise BenchError(refused)
        else:
            ee.append_to_spool(machine.home + "/spool", ee.wrap(given, environment))
            ee.ensure_publisher(machine.home)
    result.send(count / (time.monotonic() - begin))


# ---- Idle, growth and start ----

IDLE_SESSIONS = 13  # open, each with a client's process
IDLE_EVENTS = 10_000


@benchmark(
    "idle",
    "idle, 13 open sessions, no client: processor | % | 0.3 | <= 1",
    "idle, 13 open sessions, no client: wake-ups | /s | 4 | <= 1",
    "idle, 13 open sessions, no client: memory | MB | 35 | <= 1",
    "idle, 13 open sessions, one page: processor | % | 0.3 | <= 1",
    "idle, 13 open sessions, one page: wake-ups | /s | 4 | <= 1",
    "idle, 13 open sessions, one page: memory | MB | 35 | <= 1",
)
def bench_idle(sizes: Sizes) -> Iterator[Measured]:
    """Watch a monitor with sessions and stored events to which nothing happens, without and with a page."""
    with new_monitor() as monitor, contextlib.ExitStack() as clients_of_sessions:
        tests.write_history(monitor.home + "/events", 100, IDLE_EVENTS, ee.now_ms())
        monitor.start()
        wait_for_sessions(monitor)
        for number in range(IDLE_SESSIONS):
            client = clients_of_sessions.enter_context(subprocess.Popen(["sleep", "600"]))
            clients_of_sessions.callback(client.kill)
            environment = {b"CLAUDE_PID": b"%d" % client.pid, b"CONTEXTUATE_MACHINE_ID": b"testbox"}
            calls = [tests.payload("UserPromptSubmit", f"open-{number}", prompt="begin")]
            if number % 3:
                calls.append(tests.payload("Stop", f"open-{number}"))
            monitor.emit(*(json.loads(ee.wrap(ee.encode_json(call), environment)) for call in calls))
        tests.index_ready(monitor)
        time.sleep(cm.SNAPSHOT_INTERVAL_S + 2)  # until the snapshots of all are saved
        for clients in (0, 1):
            with audience_in(monitor, clients, view="rows"):
                yield from map(Measured, at_rest(monitor.pid, sizes.idle_s))
                yield Measured(memory_mb(monitor.pid))
        states = [each["state"] for each in monitor.get("/api/sessions")["sessions"] if each.get("pid")]
        if sum(state != "ended" for state in states) < IDLE_SESSIONS:
            raise BenchError(f"the sessions were not open: {states}")


GROWTH_EVENTS, GROWTH_SESSIONS = (10_000, 30_000, 100_000), (100, 300, 1000)
GROWTH_CLIENTS, GROWTH_ROUNDS = GROWTH_SESSIONS, 3


@benchmark(
    "growth",
    "start per event, 10,000 to 100,000 events | us | at 10,000 | <= 1.2",
    "memory per event, 10,000 to 100,000 events | kB | at 10,000 | <= 1.2",
    "ingest of an event beside 10,000 to 100,000 events | us | at 10,000 | <= 1.2",
    "start per session, 100 to 1,000 sessions | us | at 100 | <= 1.2",
    "memory per session, 100 to 1,000 sessions | kB | at 100 | <= 1.2",
    "ingest of an event beside 100 to 1,000 sessions | us | at 100 | <= 1.2",
    "memory per client, 100 to 1,000 clients | kB | at 100 | <= 1.2",
    "delivery per client, 100 to 1,000 clients | us | at 100 | <= 1.2",
)
def bench_growth(sizes: Sizes) -> Iterator[Measured]:
    """Measure what one event, session or client costs at three sizes; a ratio of 1 is linear growth."""
    with started_on_history(1, 2) as (_, _, empty_mb):
        pass
    of_events, of_sessions = [(100, it) for it in GROWTH_EVENTS], [(it, it * 30) for it in GROWTH_SESSIONS]
    for counts, histories in ((GROWTH_EVENTS, of_events), (GROWTH_SESSIONS, of_sessions)):
        with contextlib.ExitStack() as stack:
            started = [stack.enter_context(started_on_history(*history)) for history in histories]
            ingest_us = ingest_in_turn([monitor for monitor, _, _ in started], sizes)
        yield growth([ms * 1000 / count for (_, ms, _), count in zip(started, counts)])
        used_kb = [max(0.01, mb - empty_mb) * 1024 for _, _, mb in started]
        yield growth([used / count for used, count in zip(used_kb, counts)])
        yield growth(ingest_us)
    yield growth([client_memory_kb(count) for count in GROWTH_CLIENTS])
    with new_monitor(limits=MANY_CLIENTS) as monitor:
        monitor.start()
        delivery_us = []
        send = sender_to(monitor)
        for count in GROWTH_CLIENTS:
            with audience_in(monitor, count, view="rows") as audience:
                rate, _ = audience.measure(send, 1, 2 * sizes.round_s)
                delivery_us.append(1e6 / rate / count)
        yield growth(delivery_us)


def growth(costs: list[float]) -> Measured:
    """Compare the cost at the largest size with that at the smallest; the spread has the middle size."""
    smallest, middle, largest = costs
    ratios = sorted((middle / smallest, largest / smallest))
    return Measured(largest, smallest, spread=(ratios[0], ratios[1]))


@contextlib.contextmanager
def started_on_history(sessions: int, events: int) -> Iterator[tuple[tests.RunningMonitor, float, float]]:
    """Give a monitor that has just been started on a history, the start's milliseconds and its megabytes."""
    with new_monitor() as monitor:
        tests.write_history(monitor.home + "/events", sessions, events, ee.now_ms())
        os.sync()  # written out before the time is taken
        begin = time.perf_counter()
        monitor.start()
        wait_for_sessions(monitor)
        start_ms = (time.perf_counter() - begin) * 1000
        tests.index_ready(monitor)
        yield monitor, start_ms, memory_mb(monitor.pid)


def ingest_in_turn(monitors: list[tests.RunningMonitor], sizes: Sizes) -> list[float]:
    """Return for each monitor the microseconds that an event of a stream takes."""
    rates: list[list[float]] = [[] for _ in monitors]
    for _ in range(GROWTH_ROUNDS):
        for monitor, measured in zip(monitors, rates):
            lines = hook_lines(int(40_000 * sizes.round_s))
            tests.index_ready(monitor)
            measured.append(rate_stream(monitor.socket_path, lines, sizes.round_s))
    return [1e6 / statistics.median(measured) for measured in rates]


@benchmark(
    "restart",
    "start on {restart_events:,} events, no index: page answers | ms | 500 | <= 1",
    "start on {restart_events:,} events, no index: all known | s | {restart_limit_s:g} | <= 1",
    "start on {restart_events:,} events, no index: peak memory | MB | 110 | <= 1",
    "start on {restart_events:,} events, with index: page answers | ms | 500 | <= 1",
    "start on {restart_events:,} events, with index: all known | s | 3 | <= 1",
    "start on {restart_events:,} events, with index: peak memory | MB | 110 | <= 1",
)
def bench_restart(sizes: Sizes) -> Iterator[Measured]:
    """Start the monitor on a long history, first without an index, then with the index of the first start."""
    port = tests.redis_free_port()
    with new_monitor(server={"port": port}) as monitor:
        size = sizes.restart_sessions, sizes.restart_events
        tests.write_history(monitor.home + "/events", *size, ee.now_ms())
        os.sync()
        for _ in range(2):
            monitor.about = {"port": port}
            begin = time.perf_counter()
            command = [sys.executable, monitor.program, "start", "--no-open"]
            with subprocess.Popen(command, env=monitor.environment, stdout=subprocess.DEVNULL) as starting:
                while starting.poll() is None and not page_answers(monitor):
                    time.sleep(0.005)
                yield Measured((time.perf_counter() - begin) * 1000)
            if starting.returncode:
                raise BenchError("the monitor did not start")
            monitor.know()
            wait_for_sessions(monitor)
            known_s = time.perf_counter() - begin
            if len(monitor.sessions()) < size[0] * 0.9:
                raise BenchError("not every session was loaded")
            yield Measured(known_s)
            tests.index_ready(monitor, 600)
            yield Measured(memory_mb(monitor.pid, "VmHWM"))
            monitor.stop()


def page_answers(monitor: tests.RunningMonitor) -> bool:
    """True if the whole page arrives."""
    try:
        status, _, body = monitor.request("/")
    except OSError:
        return False
    return status == 200 and body.rstrip().endswith(b"</html>")


# ---- History: search and statistics ----

HISTORY_DAYS, HISTORY_SESSIONS = 30, 600
HISTORY_TOOLS = ("Bash", "Read", "Edit", "Write", "Grep", "Glob", "WebFetch", "Agent")


class LargeEvents:
    """Generated events of about 2 kB: tool calls in pairs, with words as frequent as in a language."""

    def __init__(self, count: int, seed: int = 5) -> None:
        self.rng = random.Random(seed)
        self.count = count
        letters = "abcdefghijklmnopqrstuvwxyz"
        self.words = ["".join(self.rng.choices(letters, k=self.rng.randint(3, 10))) for _ in range(40_000)]
        weights = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(self.words))))
        chosen = (self.rng.choices(self.words, cum_weights=weights, k=26) for _ in range(20_000))
        self.phrases = list(map(" ".join, chosen))
        self.common, self.middling, self.rare = self.words[1], self.words[400], "heliotropium"

    def text(self, phrases: int) -> str:
        """Return some phrases."""
        return "\n".join(self.rng.choices(self.phrases, k=phrases))

    def event(self, number: int, timestamp: int, session: str) -> dict[str, Any]:
        """Return event `number`: a call, or the result of the call before it."""
        call = tests.payload(
            "PostToolUse" if number % 2 else "PreToolUse", session, cwd=f"/home/dev/project{number % 12}",
            tool_use_id=f"toolu_{session}_{number // 2}", transcript_path=f"/home/dev/{session}.jsonl",
            tool_name=HISTORY_TOOLS[number // 2 % len(HISTORY_TOOLS)], tool_input={"command": self.text(8)},
        )  # fmt: skip
        if number % 2:
            call["tool_input"] = {"file_path": f"/src/{self.rng.choice(self.words)}.py"}
            call["tool_response"] = {"stdout": self.text(8)}
            call["duration_ms"] = int(self.rng.lognormvariate(6, 2))
        if number % 40 == 1:
            call |= {"hook_event_name": "PostToolUseFailure", "error": "exit status 1"}
        if number % 50_000 == 77:
            call["note"] = self.rare
        return ee.build_event({**call, "timestamp": timestamp}, timestamp, f"machine{number % 3}")

    def write(self, root: str, now_ms: int) -> int:
        """Write the events as the store does, over HISTORY_DAYS days; return their bytes."""
        step_ms = HISTORY_DAYS * 86_400_000 / self.count
        per_session = max(2, self.count // HISTORY_SESSIONS // 2 * 2)
        size = 0
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for number in range(self.count):
                timestamp = int(now_ms - (self.count - number) * step_ms)
                session = f"session-{number // (4 * per_session) * 4 + (number // 2) % 4}"
                path = f"{root}/{cm.day_of(timestamp)}/{session}.jsonl"
                if path not in files:
                    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                    if len(files) > 200:
                        stack.close()
                        files.clear()
                    files[path] = stack.enter_context(open(path, "ab"))
                event = ee.encode_json(self.event(number, timestamp, session))
                size += files[path].write(cm.numbered_line(number + 1, timestamp, event) + b"\n")
        return size


SEARCHED_SESSION, SEARCH = "session-8", "search in {history_events:,} events"


@benchmark(
    "history",
    f"{SEARCH}, rare word, p95 | ms | 100 | <= 1",
    f"{SEARCH}, common word, p95 | ms | 100 | <= 1",
    f"{SEARCH}, middling word, p95 | ms | 100 | <= 1",
    f"{SEARCH}, two common words, p95 | ms | 100 | <= 1",
    f"{SEARCH}, beginning of a word, p95 | ms | 100 | <= 1",
    f"{SEARCH}, word in a session, p95 | ms | 100 | <= 1",
    f"{SEARCH}, nothing found, p95 | ms | 100 | <= 1",
    "first page of a session, {history_events:,} events, p95 | ms | 30 | <= 1",
    f"{SEARCH}, common word | ms | reading all files | <= 1",
    f"statistics of {HISTORY_DAYS} days, {{history_events:,}} events, p95 | ms | 500 | <= 1",
    "statistics of one session, {history_events:,} events, p95 | ms | 500 | <= 1",
    "index, of the events on disk | % | 60 | <= 1",
)
def bench_history(sizes: Sizes) -> Iterator[Measured]:
    """Search and count in a month of large events."""
    maker = LargeEvents(sizes.history_events)
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as ending:
        root = home + "/events"
        size = maker.write(root, ee.now_ms())
        note(f"  {maker.count:,} events of {size / maker.count:.0f} bytes")
        journal = cm.Journal(root)
        journal.open()
        history = cm.History(journal, home + "/index.db")
        begin = time.monotonic()
        history.start()
        ending.callback(history.stop)
        tests.eventually(lambda: history.status()["state"] == "ready", 1800, "the index")
        note(f"  indexed in {time.monotonic() - begin:.0f} s")
        two, start = f"{maker.common} {maker.words[3]}", maker.middling[:3] + "*"
        everywhere = (maker.rare, maker.common, maker.middling, two, start)
        wanted: list[tuple[str, str | None]] = [(it, None) for it in everywhere]
        wanted += [(maker.common, SEARCHED_SESSION), ("nowheretobefound", None), ("", SEARCHED_SESSION)]
        for words, session in wanted:
            sessions = None if session is None else frozenset([session])
            query = cm.SearchQuery(cm.parse_terms(words), sessions)
            search = functools.partial(history.search, query)
            if bool(search()["results"]) == (words == "nowheretobefound"):
                raise BenchError(f"the search for {words!r} found something else than expected")
            yield Measured(p95_ms(search, 40))
        search = functools.partial(history.search, cm.SearchQuery(cm.parse_terms(maker.common)))
        files = list(pathlib.Path(root).glob("*/*.jsonl"))
        yield paired(
            [(p95_ms(search, 3), timed_ms(lambda: [it.read_bytes() for it in files])) for _ in range(5)]
        )
        for only in (None, SEARCHED_SESSION):
            yield Measured(p95_ms(functools.partial(history.statistics, 0, 1 << 53, only), 10))
        yield Measured(history.status()["bytes"] / size * 100)


# ---- Transcripts ----


def transcript_lines(turn: int, call: int) -> str:
    """Return what the client writes for one call: a recorded text, call and result, with ids of their own."""
    with open(tests.usage_transcript("simple"), encoding="utf-8") as file:
        lines = "".join([line for line in file if "_fake_" in line][:3])
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()[:23]
    lines = re.sub(r'(?<="timestamp":")[^"Z]+', now, re.sub(r'(?<="sessionId":")[^"]+', "s1", lines))
    lines = re.sub(r"\b(msg|req|toolu)_fake_\w+", rf"\1_{turn}_{call}", lines)
    lines = lines.replace('"hello"', json.dumps("a line of code\n" * 30))
    return lines.replace("I will run a command.", f"File {call} of {turn}. " * 6)


@benchmark(
    "reader",
    "reader of transcripts: a turn of 5 calls, a look after each | ms | 2 | <= 1",
    "reader of transcripts: a turn of 20 calls, in 5 looks | ms | 2 | <= 1",
    "reader of transcripts: a turn of 20 calls, a look after each | ms | 2 | <= 1",
)
def bench_reader(sizes: Sizes) -> Iterator[Measured]:
    """Measure the processor time of the reader's thread for a turn, the median of many."""
    for calls, looks in ((5, 5), (20, 5), (20, 20)):
        costs = []
        with tempfile.TemporaryDirectory() as home, open(f"{home}/s1.jsonl", "a") as transcript:
            reader = ee.UsageReader(f"{home}/ours")
            event = {**tests.usage_event(f"{home}/s1.jsonl"), "timestamp": ee.now_ms(), "states": {}}
            for turn in range(20 * sizes.rounds):
                cost = 0.0
                for look in range(looks):
                    share = range(look * calls // looks, (look + 1) * calls // looks)
                    transcript.write("".join(transcript_lines(turn, call) for call in share))
                    transcript.flush()
                    begin = time.thread_time()
                    reader.events(event, is_end=look == looks - 1)
                    cost += time.thread_time() - begin
                costs.append(cost * 1000)
        yield Measured(statistics.median(costs))


# ---- Redaction ----


@benchmark(
    "redact",
    "secrets found in their surroundings | | all | >= 1",
    "harmless texts left as they are | | all | >= 1",
    "false alarms per MB of Python's library | | |",
    "redaction of code that has every hint | MB/s | 20 | >= 1",
    "redaction of recorded payloads | MB/s | 20 | >= 1",
)
def bench_redact(_sizes: Sizes) -> Iterator[Measured]:
    """Measure what redaction finds, its false alarms, and its speed."""
    corpus, missed = tests.hook_corpus(), tests.hook_missed()
    for kind, text in missed:
        note(f"  missed {kind}: {text[:80]!r}")
    yield Measured(len(corpus) - len(missed), len(corpus))
    harmless = tests.hook_harmless_texts()
    yield Measured(sum(ee.redact_text(text) == text for text in harmless), len(harmless))
    library = sorted(pathlib.Path(inspect.__file__).parent.glob("*.py"))
    code = "".join(path.read_bytes().decode("ascii", "ignore") for path in library)
    alarms = ee.redact_text(code).count("[redacted:") - code.count("[redacted:")
    yield Measured(alarms / len(code) * 1e6)
    recorded = [line.decode() for name in tests.recording_names() for line in tests.recorded_lines(name)]
    with_hints = code[:4_000_000] + " ".join(tests.hook_hints()) + code[4_000_000:8_000_000]
    for text in (with_hints, "\n".join(recorded * 3)):
        redact = functools.partial(ee.redact_text, text)
        yield Measured(
            len(text) / 1000 / statistics.median(timed_ms(redact, time.process_time) for _ in range(5))
        )


# ---- Page: frames, work and memory in headless Chromium ----

PAGE_EVENTS_PER_S = 1000


def page_events(first: int, count: int) -> list[dict[str, Any]]:
    """Return calls and results of 20 sessions with two agents each; some calls fail."""
    events = []
    for number in range(first, first + count // 2):
        session = f"load-{number % 20}"
        agent = {"agent_id": f"a{number % 20}", "agent_type": "explorer"} if number % 3 == 0 else {}
        call, result = tests.many_calls([number], session)
        failed = {"hook_event_name": "PostToolUseFailure", "error": "Exit code 1"} if number % 23 == 0 else {}
        events += [{**call, **agent}, {**result, **agent, **failed, "duration_ms": 5 + number % 400}]
    return events


@contextlib.contextmanager
def page_load(monitor: tests.RunningMonitor, first: int) -> Iterator[None]:
    """Send PAGE_EVENTS_PER_S while the block runs."""
    ended = threading.Event()

    def send() -> None:
        number, begin, sent = first, time.monotonic(), 0
        while not ended.wait(0.02):
            due = int((time.monotonic() - begin) * PAGE_EVENTS_PER_S) // 2 * 2 - sent
            if due:
                monitor.emit(*page_events(number, due))
                number, sent = number + due // 2, sent + due

    sender = threading.Thread(target=send)
    sender.start()
    yield
    ended.set()
    sender.join()


def wait_times_ms(monitor: tests.RunningMonitor, tab: Any, count: int) -> list[float]:
    """Return, sorted, the times from the start of a hook with a permission request to its row in the rail."""
    tab.evaluate("look.noteWaits()")
    hook = monitor.installed_command()
    times = []
    for number in range(count):
        session = f"asks-{number}"
        monitor.emit(tests.payload("UserPromptSubmit", session, prompt="work"))
        command = {"command": f"rm {number}"}
        request = tests.payload("PermissionRequest", session, tool_name="Bash", tool_input=command)
        begin_ms = time.time() * 1000
        tests.run_hook(hook, json.dumps(request).encode(), monitor.environment)
        shown_ms = tests.eventually(lambda session=session: tab.evaluate(f"waits['{session}'] || 0"))
        times.append(shown_ms - begin_ms)
    return sorted(times)


def new_page(browser: Any, **options: Any) -> Any:
    """Open an empty page that has what the tests look at a page with."""
    context = browser.new_context(**options)
    context.add_init_script(path=os.path.join(setup.ROOT, ".ci", "page.js"))
    return context.new_page()


class TabFigures(NamedTuple):
    """What was measured of a tab; frames are wall time, which other programs' work is part of."""

    frame_p95_ms: float
    busy_ms: float  # processor time of the main thread in a frame of 1/60 s
    heap_mb: float


def watch_tab(tab: Any, seconds: float) -> TabFigures:
    """Measure a tab for some seconds."""
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy_s() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))

    begin, busy_before = time.monotonic(), busy_s()
    measured = tab.evaluate("(ms) => look.frames(ms)", seconds * 1000)
    busy_ms = (busy_s() - busy_before) / (time.monotonic() - begin) * 1000 / 60
    frames = sorted(measured["frames"])
    note(f"  longest frame {frames[-1]:.1f} ms, longest task {max(measured['long'], default=0):.1f} ms")
    session.send("HeapProfiler.collectGarbage")
    heap = session.send("Runtime.getHeapUsage")["usedSize"]
    session.detach()
    return TabFigures(percentile(frames, 95), busy_ms, heap / 1e6)


def watch_empty_tab(empty: Any, tab: Any, seconds: float) -> TabFigures:
    """Measure an empty tab while ours is in the background."""
    empty.bring_to_front()
    measured = watch_tab(empty, seconds)
    tab.bring_to_front()
    return measured


def tab_figures(ours: TabFigures, empty: TabFigures) -> Iterator[Measured]:
    """Yield the three figures of one state of the page."""
    yield Measured(ours.frame_p95_ms, empty.frame_p95_ms)
    yield Measured(ours.busy_ms)
    yield Measured(ours.heap_mb, empty.heap_mb)


def page_rows(state: str) -> list[str]:
    """Return the rows of `tab_figures`."""
    return [
        f"page, {state}: frame p95 | ms | empty page | <= 1.2",
        f"page, {state}: busy in a frame | ms | 16.7 | <= 1",
        f"page, {state}: heap | MB | empty page |",
    ]


def conversation_ms(tab: Any) -> list[float]:
    """Time until the newest turn of a long conversation is on a page, and until all are."""
    tab.click("[data-session-id=s1]")
    tab.wait_for_selector("[data-testid=row]:visible:has-text('step-1999')")
    tab.wait_for_timeout(500)  # a person sees the session before its conversation
    return list(map(float, tab.evaluate("look.openConversation()")))


@benchmark(
    "page",
    *page_rows("nothing happens"),
    "page, from a permission hook to the rail, p50 | ms | 100 | <= 1",
    *page_rows("1,000 events a second"),
    *page_rows("{page_events:,} events, scrolled"),
    "page, {page_events:,} events, a filter is typed: frame p95 | ms | empty page | <= 1.2",
    "page, {page_events:,} events, a filter is typed: work after a key, p95 | ms | 16 | <= 1",
    "page, a conversation of 100 turns and 2,000 calls opens | ms | 200 | <= 1",
    "page just loaded, that conversation opens: its newest turn | ms | 200 | <= 1",
    "page just loaded, that conversation opens: all turns | ms | 200 | <= 1",
)
def bench_page(sizes: Sizes) -> Iterator[Measured]:
    """Watch the page under load, beside an empty page in the same browser."""
    if tests.BROWSER is None:
        raise BenchError("Chromium is missing")
    with new_monitor() as monitor, playwright.sync_api.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=tests.BROWSER, args=tests.BROWSER_OPTIONS)
        monitor.start().emit(*page_events(0, 200))
        empty, tab = (new_page(browser, viewport={"width": 1440, "height": 900}) for _ in range(2))
        tab.goto(monitor.url.replace("127.0.0.1", "localhost"))
        ours = watch_tab(tab, sizes.page_s)
        yield from tab_figures(ours, watch_empty_tab(empty, tab, sizes.page_s))
        yield Measured(percentile(wait_times_ms(monitor, tab, 20), 50))
        with page_load(monitor, 1000):
            ours = watch_tab(tab, 2 * sizes.page_s)
            while_busy = watch_empty_tab(empty, tab, sizes.page_s)
        yield from tab_figures(ours, while_busy)
        first, last = 200_000, 200_000 + sizes.page_events // 2
        for number in range(first, last, 1000):
            monitor.emit(*page_events(number, 2000))
        is_newest = f"contextuate.store.rows.at(-1).target === 'make step-{last - 1}'"
        tests.eventually(lambda: tab.evaluate(is_newest), 60, "the newest row")
        tests.index_ready(monitor, 600)  # these were many at once
        with page_load(monitor, 400_000):
            tab.evaluate("(ms) => look.scrollAndZoom(ms)", sizes.page_s * 1000)
            ours = watch_tab(tab, sizes.page_s)
            while_busy = watch_empty_tab(empty, tab, sizes.page_s)
        yield from tab_figures(ours, while_busy)
        tab.evaluate("(ms) => look.type(ms)", sizes.page_s * 1000)
        typed_ms = watch_tab(tab, sizes.page_s).frame_p95_ms
        yield Measured(typed_ms, watch_empty_tab(empty, tab, sizes.page_s).frame_p95_ms)
        yield Measured(percentile(sorted(tab.evaluate("keys")), 95))
        tab.close()
        with new_monitor() as quiet:
            quiet.start()
            address, tab = quiet.url.replace("127.0.0.1", "localhost"), new_page(browser)
            tab.goto(address)
            tests.emit_hundred_turns(quiet)
            quiet.emit(*page_events(0, 2000))  # newer events of others, which are loaded first
            yield Measured(conversation_ms(tab)[1])
            tab.close()
            tab = new_page(browser)
            tab.goto(address)
            yield from map(Measured, conversation_ms(tab))


# Bounds: a flood of one machine beside others, and many sessions at rest ----

FLOOD_S, FLOOD_EVENTS_PER_S = 10.0, 10_000
FLOOD_ASKS = 50  # of another machine, spread over the flood
REST_SESSIONS = 10_000  # on as many machines


def machine_event(machine: str, session: str, kind: str, **data: Any) -> bytes:
    """Return the line of one event, with its machine and our category."""
    about = {"machineId": machine, "sessionId": session, "hookType": "", "eventType": kind, "data": data}
    return ee.encode_json({"id": str(uuid.uuid4()), "timestamp": ee.now_ms(), **about})


def publisher_of(machine: tests.RunningMonitor) -> Callable[[list[bytes]], object]:
    """Return a function that sends lines as hooks do: over one connection, or as a publisher of Redis."""
    if machine.config.get("mode") != "redis":
        sock = machine.connect()

        def send(lines: list[bytes]) -> None:
            sock.sendall(b"".join(line + b"\n" for line in lines))
            with contextlib.suppress(BlockingIOError):
                sock.recv(1 << 20, socket.MSG_DONTWAIT)  # acknowledgements

        return send
    options = machine.config["redis"]
    client = redis.Redis(host=options["host"], port=options["port"], password=options.get("password"))

    def publish(lines: list[bytes]) -> None:
        pipeline = client.pipeline(transaction=False)
        for line in lines:
            pipeline.publish("contextuate:events", line)
            pipeline.xadd("contextuate:events:stream", {"event": line}, maxlen=10_000)
        pipeline.execute()

    return publish


def flood(machine: tests.RunningMonitor, is_closed: bool) -> None:
    """Send FLOOD_EVENTS_PER_S calls of one session, with results if `is_closed`, as far as they are taken."""
    send, begin, sent = publisher_of(machine), time.monotonic(), 0
    while (now := time.monotonic()) < begin + FLOOD_S:
        due = int((now - begin) * FLOOD_EVENTS_PER_S) // 2 * 2
        data = {"toolName": "Bash", "toolInput": {"command": "make " + "x" * 300}}
        lines = []
        for number in range(sent, min(due, sent + 500)):
            kind = "tool_result" if is_closed and number % 2 else "tool_call"
            use_id = f"t{number // 2 if is_closed else number}"
            lines.append(machine_event("flood", "flood", kind, toolUseId=use_id, **data))
        send(lines)
        sent += len(lines)
        time.sleep(0.002)
    note(f"  {sent / FLOOD_S:,.0f} events a second were sent")


def flood_waits_ms(machine: tests.RunningMonitor, tab: Any, is_closed: bool) -> list[float]:
    """Return, sorted, the times from requests of a quiet machine during a flood to their rows."""
    send, asked_ms = publisher_of(machine), {}
    tab.evaluate("look.noteWaits()")
    with tests.serving(flood, machine, is_closed):
        for number in range(FLOOD_ASKS):
            time.sleep(FLOOD_S / FLOOD_ASKS)
            session = f"asks-{is_closed}-{number}"
            asked_ms[session] = time.time() * 1000
            send([machine_event("calm", session, "permission_request", toolName="Bash")])
        tests.eventually(lambda: asked_ms.keys() <= tab.evaluate("waits").keys(), 60, "all waits")
        shown_ms = tab.evaluate("waits")
    return sorted(shown_ms[session] - at_ms for session, at_ms in asked_ms.items())


@benchmark(
    "flood",
    "needs you of another machine during a flood by the socket, p99 | ms | 1000 | <= 1",
    "needs you of another machine during a flood of open calls, p99 | ms | 1000 | <= 1",
    "needs you of another machine during a flood by Redis, p99 | ms | 1000 | <= 1",
)
def bench_flood(sizes: Sizes) -> Iterator[Measured]:
    """Flood a monitor with the events of one machine while another one asks, with a page open."""
    with tests.redis_parts() as make, playwright.sync_api.sync_playwright() as tool:
        server = make(tests.RedisServer)
        browser = tool.chromium.launch(executable_path=tests.BROWSER, args=tests.BROWSER_OPTIONS)
        for config, closings in (({"mode": "local"}, (True, False)), (server.settings(), (True,))):
            machine = make(tests.RedisMachine, config=config).start()
            tab = new_page(browser, viewport={"width": 1440, "height": 900})
            tab.goto(machine.url.replace("127.0.0.1", "localhost"))
            if config["mode"] == "redis":
                machine.wait_until("connected")
            for is_closed in closings:
                yield Measured(percentile(flood_waits_ms(machine, tab, is_closed), 99))
            tab.close()
            machine.stop()


@benchmark("rest", f"rest with {REST_SESSIONS:,} sessions of as many machines: processor | % | 0.3 | <= 1")
def bench_rest(sizes: Sizes) -> Iterator[Measured]:
    """Watch a monitor with idle sessions to which nothing happens."""
    with new_monitor() as monitor:
        monitor.start()
        send = publisher_of(monitor)
        for number in range(REST_SESSIONS):
            send([machine_event(f"box-{number}", f"idle-{number}", "turn_end")])
        tests.index_ready(monitor)
        tests.eventually(lambda: monitor.get("/api/status")["events"]["stored"] == REST_SESSIONS, 60)
        time.sleep(2 * cm.SNAPSHOT_INTERVAL_S + 10)  # until the snapshots of all are saved
        yield Measured(at_rest(monitor.pid, sizes.idle_s)[0])


# ---- Document and main ----

DOCUMENT = os.path.join(setup.ROOT, ".docs", "benchmarks.md")
ALL = "All benchmarks at small sizes"  # the title of one table; those at full size have the benchmark's name


def update_document(path: str, title: str, body: str) -> None:
    """Replace the body of one section, or add the section; the rest of the document stays."""
    text, new = pathlib.Path(path).read_text("utf-8"), f"## {title}\n\n{body}\n"
    text, found = re.subn(rf"(?ms)^## {re.escape(title)}$.*?(?=^## |\Z)", lambda _: new + "\n", text)
    pathlib.Path(path).write_text((text if found else f"{text}\n{new}").rstrip() + "\n", "utf-8")


def section(command: str, figures: list[Figure], failures: list[str], seconds: float) -> str:
    """Return the text below a section's heading: where and when it was measured, and the table."""
    lines = [
        f"`{command}` on {datetime.date.today()}, {seconds:.0f} s, {machine_description()}.",
        *(f"Not measured: {failure}." for failure in failures),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for figure in figures:
        *cells, goal, spread = figure.cells()
        lines.append(f"| {' | '.join([*cells, f'**{goal}**' if figure.misses else goal, spread])} |")
    return "\n".join(lines)


def machine_description() -> str:
    """Describe the machine and the Python that figures are from."""
    model = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} processors ({model}), {gigabytes:.0f} GB, {system}"


def measure(name: str, sizes: Sizes) -> tuple[list[Figure], str]:
    """Run one benchmark; return its rows, and why some could not be measured."""
    rows = rows_of(name, sizes)
    try:
        for row, measured in zip(rows, BENCHMARKS[name](sizes)):
            row.enter(measured)
            print(console_line(row.cells()), "MISSED" if row.misses else "", flush=True)
    except (BenchError, AssertionError, OSError, pytest.skip.Exception) as error:
        note(f"not measured: {name}: {error}")
        return rows, f"{name}: {error}"
    return rows, ""


def main(name: str, json_path: str | None = None) -> int:
    """Run one benchmark at full size, or all at small sizes; print the table and write it to the document."""
    if name != "all" and name not in BENCHMARKS:
        note(f"no benchmark is called {name!r}; there are: {', '.join(BENCHMARKS)}")
        return 2
    names, sizes = (list(BENCHMARKS), SMALL) if name == "all" else ([name], FULL)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.freeze()  # what the tests have imported is not collected again and again while time is taken
    print(console_line(COLUMNS), flush=True)
    begin = time.monotonic()
    figures, failures = [], []
    for number, each in enumerate(names, 1):
        note(f"{number}/{len(names)}: {each}, {time.monotonic() - begin:.0f} s")
        measured, failure = measure(each, sizes)
        figures += measured
        failures += [failure] if failure else []
    seconds = time.monotonic() - begin
    missed = sum(figure.misses for figure in figures)
    print(f"\n{len(figures)} figures in {seconds:.0f} s, {missed} miss their goal")
    command = "python3 test_monitor.py --bench" + ("" if name == "all" else f" {name}")
    update_document(DOCUMENT, ALL if name == "all" else name, section(command, figures, failures, seconds))
    if json_path is not None:
        rows = [{**vars(it), "measured": it.measured and it.measured._asdict()} for it in figures]
        whole = {"figures": rows, "failed": failures, "seconds": round(seconds, 1)}
        pathlib.Path(json_path).write_text(json.dumps(whole, indent=1), "utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
