#!/usr/bin/env python3
"""Contextuate Monitor: who is working, who waits for you, and what happened, live in a browser.

    python3 contextuate_monitor.py start      start the monitor and print the page's address
    python3 contextuate_monitor.py install    register the hook in Claude Code's settings
    python3 contextuate_monitor.py --help     everything else

Claude Code's hooks (`emit_event.py`) send events to the monitor over a Unix socket, or over Redis from any
number of machines (`.docs/protocol.md`). Each consumer of the journal continues at its position in it:

    hook → ingest → journal (files), acknowledgement → sessions (state machine) → clients, over WebSocket
                                                     → index.db (search, statistics, snapshots)

Threads, and who owns what; apart from this they share only the queue and the wake-up socket of the loop:
- The loop thread owns all state: sessions, clients, ingest connections, and every write to the journal.
- HTTP threads and the reader thread (history for clients) read journal files, which only grow or are deleted
  as a whole, and run everything else in the loop thread through `EventLoop.call`.
- The Redis subscriber thread owns its connections; it passes events to the loop in batches.
- The index thread fills index.db from the journal; readers have their own connections to it.
- The notify thread sends messages; the loop decides which, and takes the outcomes.
- The retention thread plans and deletes whole days of files; the loop then deletes their sessions.
- The registry thread and the usage thread read files of clients; the loop stores the events made of them.
- The answers threads check who may answer, and talk to Redis; the loop carries out what they decide.

Rooms, in the order of this file; each uses only those above it:
    Config                   the settings of the monitor, and the paths of its files
    Console                  output for people, on a terminal and in the log
    WebSocket framing        RFC 6455 without I/O: handshake, frames, messages
    Journal                  events on disk, one file per day and session
    Sessions                 the state machine: who works, who waits and who has ended
    Index                    search and statistics over everything stored, in index.db
    Export                   stored events as lines
    Retention                which days are deleted because they are too old or take too much space
    Metrics                  what /metrics returns, in the text format of Prometheus
    Event loop               ingest, WebSocket clients, timers
    Redis subscriber thread  events from many machines
    HTTP                     the page, the API, and who may use them
    Answers                  a person answers what a session asks, from the page or a terminal
    Notifications            messages to people about waits, failures and limits
    The Monitor              what wires all of these
    Running monitor          how other processes find a running monitor and ask it
    Hook installation        the hook in the settings of Claude Code and of other programs
    Service                  starts the monitor at login and after a crash
    Doctor                   checks of the whole chain, from the configuration to an event that arrives
    Demo                     a made-up working day of a small team
    Import                   history from before the monitor was there
    Command line             the commands, their options, and `main`
"""

from __future__ import annotations

import fcntl
import os
import sys


def print_short_status() -> int | None:
    """Print the line of `status --short` and return the exit status; None: a rare case, for `main`."""
    home = os.environ.get("CONTEXTUATE_HOME") or os.environ.get("HOME", "") + "/.contextuate"
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        if not home.startswith("/") or os.stat(home).st_uid != os.getuid() or sys.stdout.encoding != "utf-8":
            return None
        with os.fdopen(os.open(home + "/monitor.pid", flags)) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                line = ""  # no monitor holds it
            except BlockingIOError:
                with os.fdopen(os.open(home + "/short", flags), encoding="utf-8") as file:
                    line = file.read().strip()
    except (OSError, AttributeError):
        return None
    print(line or "not running")
    return 0 if line else 1


is_short = __name__ == "__main__" and sys.argv[1:] == ["status", "--short"]  # a prompt waits for it
if is_short and (short_status := print_short_status()) is not None:
    sys.exit(short_status)

import argparse
import base64
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import enum
import errno
import filecmp
import functools
import gc
import glob
import gzip
import hashlib
import heapq
import hmac
import http.client
import http.server
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import math
import operator
import pickle
import pwd
import random
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import uuid
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, NoReturn, Union

try:
    import sqlite3
except ImportError:  # a Python built without it has no index
    sqlite3 = None  # type: ignore[assignment]
if sys.version_info < (3, 9):  # noqa: UP036 - print a message, not a traceback
    sys.exit(f"contextuate: Python 3.9 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
try:
    import emit_event
    from emit_event import ConfigError, JsonObject, Key, MalformedEvent, encode_json, integer_key, now_ms
except ImportError as error:
    what = "missing" if isinstance(error, ModuleNotFoundError) else "of another version"
    sys.exit(f"contextuate: emit_event.py is {what}: copy it into the folder of contextuate_monitor.py")

__version__ = "1.0.0"
__all__ = ["EventLoop", "Journal", "Monitor", "Sessions", "Settings", "load_settings", "main"]

log = logging.getLogger("contextuate")


def steady_ms() -> float:
    """Return the milliseconds of a clock that is never set and also counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) * 1000


# ---------------------------------------------------------------------------
# Config: the settings of the monitor, checked once
#
# Owns: Settings, the paths of our files, and the keys that only the monitor reads.
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, from the configuration file, the environment and the command line."""

    home: str
    config_path: str
    machine_id: str
    values: dict[str, Any]
    options: JsonObject = dataclasses.field(default_factory=dict)  # of `start`, kept by `restart`

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def privacy(self) -> emit_event.Privacy:
        """Return what may be stored."""
        return emit_event.privacy_of(self.values)

    @functools.cached_property
    def machine_key(self) -> str:
        """Return the key of this machine, which a new name does not change; its name if it has no key."""
        return emit_event.machine_key(self.home) or self.machine_id

    @property
    def notify_targets(self) -> list[NotifyTarget]:
        """Return the targets of notifications; raise ConfigError."""
        try:
            return [NotifyTarget(number, given) for number, given in enumerate(self["notify"], 1)]
        except ValueError as error:
            raise ConfigError(f"{self.config_path}: notify: {error}") from None

    def path(self, name: str) -> str:
        """Return the path of one of our files."""
        return os.path.join(self.home, name)


NOTICE_KINDS = {  # kind → the beginning of the message's title
    "permission": "Needs your permission", "question": "Asks you a question", "plan": "Has a plan to approve",
    "input": "Waits for your prompt", "dialog": "Shows a dialog", "failed": "Has failed",
    "stuck": "May be stuck", "collision": "Edits the same file as another session",
    "limit": "Is near a limit", "ended": "Has ended",
}  # fmt: skip


def _all_in(value: Any, check: Callable[[str], bool]) -> bool:
    return isinstance(value, list) and all(isinstance(it, str) and check(it) for it in value)


def _matches(pattern: str) -> Callable[[Any], bool]:
    return lambda it: isinstance(it, str) and re.fullmatch(pattern, it) is not None


_HOURS = r"([01]\d|2[0-3]):[0-5]\d"
_is_url = _matches(r"https?://([^/?#@\s]*@)?(\[[0-9A-Fa-f:.]+\]|[^/?#@:\s]+)(:\d{1,5})?([/?#]\S*)?")
# The keys of one target, an object in the list `notify`: (default, meaning, what else it may be, check)
NOTIFY_KEYS: dict[str, tuple[Any, str, str, Callable[[Any], bool]]] = {
    "url": (None, "where to send; never shown", "an http or https URL", _is_url),
    "format": ("ntfy", "what the URL takes; `slack` is for all that take Slack's webhooks",
               '"ntfy", "slack" or "json"', lambda it: it in ("ntfy", "slack", "json")),
    "command": (None, "program to run instead, without a shell; {title}, {text}, {kind}, {link} are replaced",
                "a list of texts", lambda it: it != [] and _all_in(it, bool)),
    "when": ([kind for kind in NOTICE_KINDS if kind != "ended"], "kinds of messages",
             f"a list of {', '.join(NOTICE_KINDS)}", lambda it: _all_in(it, NOTICE_KINDS.__contains__)),
    "afterSeconds": (30, "what is over sooner is not sent", "a number from 0 to 86400",
                     lambda it: type(it) in (int, float) and 0 <= it <= 86_400),
    "quietHours": (None, "nothing is sent then; what still holds afterwards is", 'null or "22:00-07:00"',
                   _matches(f"{_HOURS}-{_HOURS}")),
    "unlessSeen": (True, "send nothing while a page is open and visible", "true or false",
                   lambda it: isinstance(it, bool)),
    "content": (False, "send the command or question too, redacted", "true or false",
                lambda it: isinstance(it, bool)),
    "link": (None, "the page's address, for a link in the message", "null or an http or https URL", _is_url),
}  # fmt: skip


def _is_price_list(value: Any) -> bool:
    required, known = {"input", "output"}, {*"input output cacheRead cacheWrite5m cacheWrite1h".split()}
    return isinstance(value, dict) and all(
        isinstance(price, dict)
        and name
        and required <= price.keys() <= known
        and all(type(amount) in (int, float) and 0 <= amount <= 1e6 for amount in price.values())
        for name, price in value.items()
    )


KEYS: dict[str, Key] = {  # what hooks and publisher read too, and what only the monitor reads
    **emit_event.KEYS,
    "server.host": Key("127.0.0.1", "a host name or an IP address", _matches(".+")),
    "server.port": integer_key(3847, 0, 65535, about_low=" (any free port)"),
    "server.wsPort": integer_key(3848, 0, 65535, about_low=" (any free port)"),
    "server.allowedHosts": Key([], "a list of host names", lambda it: _all_in(it, bool)),
    "server.auth": Key("auto", '"auto", "token" or "off"', ("auto", "token", "off").__contains__),
    "redis.maxRetries": integer_key(10, 1, 1_000_000, "for ever"),
    "persistence.enabled": Key(True, "true or false", lambda it: isinstance(it, bool)),
    "persistence.type": Key("file", '"file" (nothing else is offered)', ("file",).__contains__),
    "limits.connections": integer_key(256, 1, 10_000),
    "limits.clientQueueBytes": integer_key(1 << 20, 1 << 16, 64 << 20),
    "sessions.quietSeconds": integer_key(120, 5, 86_400),
    "sessions.endedHours": integer_key(12, 1, 87_600),
    "retention.days": integer_key(30, 1, 36_500, "for ever"),
    "retention.maxMegabytes": integer_key(2048, 16, 10**9, "no limit"),
    "notify": Key([], "a list of targets", lambda it: emit_event.objects_in(it) == it),
    "prices": Key({}, 'an object of models in USD per million tokens, such as {"opus-4-5": {"input": 5, '
                  '"output": 25}}, each with or without "cacheRead", "cacheWrite5m" and "cacheWrite1h"',
                  _is_price_list),
}  # fmt: skip


class NotifyTarget:
    """One entry of `notify`; raises ValueError with its number, the key and what was expected."""

    def __init__(self, number: int, given: JsonObject) -> None:
        where = f"target {number}: "
        for name, value in given.items():
            if name not in NOTIFY_KEYS:
                raise ValueError(f"{where}{name}: unknown key; known are {', '.join(NOTIFY_KEYS)}")
            default, _, expected, accepts = NOTIFY_KEYS[name]
            if value is not default and not accepts(value):
                raise ValueError(f"{where}{name}: expected {expected}")
        values = {name: given.get(name, rule[0]) for name, rule in NOTIFY_KEYS.items()}
        if (values["url"] is None) == (values["command"] is None):
            raise ValueError(f'{where}expected either "url" or "command"')
        self.url, self.command = values["url"], values["command"]
        self.format = "command" if self.command else values["format"]
        self.name = f"target {number} ({self.format})"  # the address is a secret
        self.id = hashlib.sha256(encode_json([self.url, self.command])).hexdigest()[:16]
        self.kinds, self.after_ms = frozenset(values["when"]), int(values["afterSeconds"] * 1000)
        self.quiet = (values["quietHours"] or "00:00-00:00").split("-")
        self.unless_seen, self.content, self.link = values["unlessSeen"], values["content"], values["link"]

    def is_quiet(self, clock: str) -> bool:
        """True in the quiet hours; `clock` is such as "22:30"."""
        start, end = self.quiet
        return start <= clock < end if start <= end else clock >= start or clock < end


def load_settings(
    config_path: str | None = None, overrides: dict[str, Any] | None = None
) -> tuple[Settings, list[str]]:
    """Return (settings, warnings) of the file and of {key: value} `overrides`; raise ConfigError."""
    home, path = emit_event.places(os.environb)  # type: ignore[arg-type]
    path = os.path.abspath(config_path or path)
    if config_path and not os.path.exists(path):
        raise ConfigError(f"{path}: no such file; omit --config to use the defaults")
    values, given = emit_event.load_config(path, KEYS)
    warnings = [f"{path}: {name}: unknown key, ignored" for name in given if name not in KEYS]
    if not values["redis.tls"] and any(given.get(f"redis.{name}File") for name in ("ca", "cert", "key")):
        warnings.append(f"{path}: redis.tls: is false, so the certificate files are not used")
    keys = (it for it in emit_event.SECRET_KEYS if it != "redis.url" or "@" in (values[it] or ""))
    if any(map(values.get, keys)) and os.stat(path).st_mode & 0o077:
        warnings.append(f"{path}: holds a password that others can read; run: chmod 600 {path}")
    place = os.path.dirname(os.path.abspath(emit_event.__file__))
    if os.path.abspath(home) == place + "/.contextuate" and os.environ.get("HOME") != place:
        user = f"user {os.getuid()} has no home directory"
        warnings.append(f"{user}, so {home} is used; set CONTEXTUATE_HOME to another one")
    for key, value in (overrides or {}).items():
        if not KEYS[key].accepts(value):
            raise ConfigError(f"command line: {key}: expected {KEYS[key].expected}, got {value!r}")
        values[key] = value
    settings = Settings(os.path.abspath(home), path, emit_event.this_machine(), values)
    _ = settings.notify_targets
    if settings["server.auth"] == "off" and not is_loopback(settings["server.host"]):
        text = f'server.auth: "off" is refused with server.host {settings["server.host"]}: everyone in the'
        raise ConfigError(f'{path}: {text} network could read your sessions; use "auto" or bind 127.0.0.1')
    if (port := settings["server.port"]) == settings["server.wsPort"] != 0:
        place = "command line" if overrides else path
        raise ConfigError(f"{place}: server.wsPort: expected a port other than server.port ({port})")
    return settings, warnings


def is_loopback(host: str) -> bool:
    """True if a host name or address means this machine only."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    return host.lower().rstrip(".") == "localhost"


# ---------------------------------------------------------------------------
# Console: output for people, on a terminal and in the log
#
# Text from other programs may contain anything; before it is printed it passes through `safe_line`.
# ---------------------------------------------------------------------------


def print_status(message: str) -> None:
    """Print a message on stderr, apart from the output."""
    lines = map(safe_line, message.split("\n"))  # a file's name may contain anything
    print("contextuate: " + "\n".join(lines), file=sys.stderr, flush=True)


def safe_line(text: str) -> str:
    """Return text as one line without control characters for the terminal."""
    return "".join(char if char.isprintable() else "�" for char in text).rstrip()


def human_duration(duration_ms: float) -> str:
    """Return a duration in its largest fitting unit."""
    seconds = max(0, int(duration_ms / 1000))
    unit, size = next((it for it in (("d", 86400), ("h", 3600), ("m", 60)) if seconds >= it[1]), ("s", 1))
    return f"{seconds // size} {unit}"


def human_size(size: int) -> str:
    """Return a number of bytes in its largest fitting unit."""
    sizes = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    return next((f"{size / of:.1f} {unit}" for unit, of in sizes if size >= of), f"{size} B")


def plural(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 event" and "1,200 events"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


class Progress:
    """Count the events of long work, and print its progress once a second."""

    def __init__(self, total_bytes: int, quiet: bool) -> None:
        self.count, self._done, self._total = 0, 0, human_size(total_bytes)
        self._next_s = math.inf if quiet else time.monotonic() + 1

    def add(self, count: int, size: int) -> None:
        """Count work that is done."""
        self.count += count
        self._done += size
        if time.monotonic() > self._next_s:
            self._next_s = time.monotonic() + 1
            print_status(f"{plural(self.count, 'event')}, {human_size(self._done)} of at most {self._total}")

    def counting(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Pass lines on and count them."""
        for line in lines:
            self.add(1, len(line) + 1)
            yield line


# ---------------------------------------------------------------------------
# WebSocket framing: RFC 6455 without I/O
#
# The server's side: bytes in, messages out, in wire order, and the opening handshake, without extensions.
# Knows: frames. Does not know: sockets, clients, what messages mean.
# ---------------------------------------------------------------------------

WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MESSAGE_LIMIT_BYTES = 16 << 20
HEAD_LIMIT_BYTES = 16 << 10


class Opcode(enum.IntEnum):
    """Frame opcodes, RFC 6455 section 5.2."""

    CONTINUATION = 0x0
    TEXT = 0x1
    BINARY = 0x2
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


class CloseCode(enum.IntEnum):
    """The close codes this program sends, RFC 6455 section 7.4.1 and the IANA registry."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    INVALID_DATA = 1007
    MESSAGE_TOO_BIG = 1009
    TRY_AGAIN_LATER = 1013


class ProtocolError(Exception):
    """A protocol violation by the peer; its arguments are a CloseCode and the reason."""


class Message(NamedTuple):
    """A whole TEXT (data: str) or BINARY message (bytes), or a PING or PONG (bytes)."""

    opcode: Opcode
    data: Any


class Close(NamedTuple):
    """The peer's close frame (`code` is None if it has none); not `by_peer`: the one to send to the peer."""

    code: int | None
    reason: str
    by_peer: bool = True


def encode_frame(opcode: int, payload: bytes) -> bytes:
    """Encode one final frame of a server in the minimal length form (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


def parse_close(payload: bytes) -> Close:
    """Parse a close frame's payload (RFC 6455 section 7.4); raise ProtocolError or UnicodeDecodeError."""
    if not payload:
        return Close(None, "")
    code = int.from_bytes(payload[:2], "big") if len(payload) > 1 else 0
    if not (3000 <= code <= 4999 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))):
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the close code is invalid")
    return Close(code, payload[2:].decode())


def apply_mask(data: bytes, mask: bytes, offset: int = 0) -> bytes:
    """XOR `data` with the 4-byte `mask` (RFC 6455 section 5.3), `offset` bytes into the payload."""
    size, shift = len(data), offset % 4
    key = (mask[shift:] + mask[:shift]) * (size // 4 + 1)
    return (int.from_bytes(data, "big") ^ int.from_bytes(key[:size], "big")).to_bytes(size, "big")


class FrameParser:
    """Parses a client's bytes into messages, in wire order; after a Close it returns nothing."""

    def __init__(self, limit_bytes: int = MESSAGE_LIMIT_BYTES) -> None:
        self._limit_bytes, self._buffer = limit_bytes, bytearray()
        self._received: list[Message | Close] = []
        self._opcode: Opcode | None = None  # of the message that is partly received, else None
        self._size = 0  # of that message so far, bytes
        self._parts: list[Any] = []  # of that message: str pieces of a text, bytes pieces of a binary one
        self.is_between_messages = True  # no message is partly received: a new parser can continue
        self._decoder, self._parser = codecs.getincrementaldecoder("utf-8")(), self._parse()
        next(self._parser)

    def feed(self, data: bytes) -> list[Message | Close]:
        """Parse bytes of any size; return the messages that they complete."""
        self._buffer += data
        next(self._parser)
        received, self._received = self._received, []
        return received

    def _parse(self) -> Generator[None, None, None]:
        try:
            while not (self._received and isinstance(self._received[-1], Close)):
                self.is_between_messages = self._opcode is None
                yield from self._parse_frame()
        except ProtocolError as error:
            code, reason = error.args
            self._received.append(Close(code, reason, by_peer=False))
        except UnicodeDecodeError:
            self._received.append(Close(CloseCode.INVALID_DATA, "text must be UTF-8", by_peer=False))
        self._parts.clear()
        while True:  # bytes after a close frame are discarded (section 5.5.1)
            self._buffer.clear()
            yield

    def _take(self, least: int, most: int = 0) -> Generator[None, None, bytes]:
        while len(self._buffer) < least:
            self.is_between_messages = self.is_between_messages and not self._buffer
            yield
        data = bytes(self._buffer[: most or least])
        del self._buffer[: most or least]
        self.is_between_messages = False
        return data

    def _parse_frame(self) -> Generator[None, None, None]:
        first, second = yield from self._take(2)
        opcode, size = self._check_head(first, second), second & 0x7F
        if size > 125:
            width, minimum = (2, 126) if size == 126 else (8, 1 << 16)
            size = int.from_bytes((yield from self._take(width)), "big")
            if size >> 63:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the length has its top bit set")
            if size < minimum:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the length is not in its shortest form")
        if opcode < Opcode.CLOSE and self._size + size > self._limit_bytes:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, f"a message may have {self._limit_bytes} bytes")
        mask = yield from self._take(4)
        if opcode >= Opcode.CLOSE:
            data = apply_mask((yield from self._take(size)), mask)
            self._received.append(parse_close(data) if opcode is Opcode.CLOSE else Message(opcode, data))
            return
        kind = self._opcode = self._opcode or opcode
        self._size += size
        done = 0
        while done < size:  # decoded as it arrives, so that bad UTF-8 fails at once
            piece = apply_mask((yield from self._take(1, size - done)), mask, done)
            self._parts.append(self._decoder.decode(piece) if kind is Opcode.TEXT else piece)
            done += len(piece)
        if first & 0x80:
            self._decoder.decode(b"", True)  # raises if a character is incomplete
            self._received.append(Message(kind, ("" if kind is Opcode.TEXT else b"").join(self._parts)))
            self._opcode, self._size, self._parts = None, 0, []
            self._decoder.reset()

    def _check_head(self, first: int, second: int) -> Opcode:
        is_known = first & 0x0F in Opcode.__members__.values()
        opcode = Opcode(first & 0x0F) if is_known else Opcode.CONTINUATION
        is_control, is_begun = opcode >= Opcode.CLOSE, self._opcode is not None
        for is_wrong, reason in (
            (first & 0x70, "a reserved bit is set without an extension"),
            (not is_known, f"unknown opcode {first & 0x0F}"),
            (not second & 0x80, "every frame of a client must be masked"),
            (is_control and not first & 0x80, "a control frame must not be fragmented"),
            (is_control and second & 0x7F > 125, "a control frame has at most 125 bytes"),
            (opcode is Opcode.CONTINUATION and not is_begun, "there is no message to continue"),
            (opcode in (1, 2) and is_begun, "the previous message is not finished"),
        ):
            if is_wrong:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, reason)
        return opcode


class RequestError(Exception):
    """A refused request: HTTP status, reason, additional headers of the response."""

    def __init__(self, status: int, reason: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(reason)
        self.status, self.reason, self.headers = status, reason, headers


class Request(NamedTuple):
    """The head of an HTTP request; `headers` in order, their names in lower case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    version: str = "HTTP/1.1"
    address: str = ""  # of ours, at which it arrived

    def all(self, name: str) -> list[str]:
        """Return every value of one header."""
        return [value for field, value in self.headers if field == name]

    def one(self, name: str) -> str:
        """Return the value of a header, "" if it is missing; raise RequestError(400) if it is repeated."""
        if len(values := self.all(name)) > 1:
            raise RequestError(400, f"several {name} headers")
        return values[0] if values else ""

    def tokens(self, name: str) -> list[str]:
        """Return the comma-separated tokens of a header in lower case, from all its lines."""
        return [token.strip().lower() for value in self.all(name) for token in value.split(",")]


_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%b) ([!-~\x80-\xff]+) (HTTP/[0-9]\.[0-9])" % _TOKEN)
_HEADER_LINE = re.compile(rb"(%b):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)


def parse_request_head(head: bytes) -> Request:
    """Parse a request head without its blank line, strictly (RFC 9112 sections 3, 5); raise RequestError."""
    first, *lines = head.split(b"\r\n")
    if not (request_line := _REQUEST_LINE.fullmatch(first)):
        raise RequestError(400, "the request line is malformed")
    method, target, version = (part.decode("latin-1") for part in request_line.groups())
    if not target.startswith("/"):
        raise RequestError(400, "the request target must be a path")
    headers = []
    for line in lines:
        if not (header := _HEADER_LINE.fullmatch(line)):
            raise RequestError(400, "a header line is malformed")
        headers.append((header[1].decode("ascii").lower(), header[2].rstrip(b" \t").decode("latin-1")))
    if version not in ("HTTP/1.0", "HTTP/1.1"):
        raise RequestError(505, "use HTTP/1.1")
    return Request(method, target, tuple(headers), version)


def response_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Encode the head of an HTTP response, with the blank line."""
    phrase = http.client.responses.get(status, "Refused")
    lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def handshake_response(request: Request) -> bytes:
    """Return the 101 response to an opening handshake (RFC 6455 section 4.2); raise RequestError."""
    if request.method != "GET":
        raise RequestError(405, "a WebSocket is opened with GET", [("Allow", "GET")])
    if request.version != "HTTP/1.1":
        raise RequestError(505, "a WebSocket needs HTTP/1.1")
    upgrade = [("Upgrade", "websocket"), ("Connection", "Upgrade")]  # no extension, no subprotocol
    if "websocket" not in request.tokens("upgrade") or "upgrade" not in request.tokens("connection"):
        raise RequestError(426, "a WebSocket handshake is expected here", upgrade)
    if request.one("sec-websocket-version") != "13":
        raise RequestError(426, "WebSocket version 13 is needed", [("Sec-WebSocket-Version", "13")])
    if not re.fullmatch(r"[A-Za-z0-9+/]{22}==", key := request.one("sec-websocket-key")):
        raise RequestError(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    accept = base64.b64encode(hashlib.sha1(key.encode() + WEBSOCKET_GUID).digest()).decode("ascii")
    return response_head(101, [*upgrade, ("Sec-WebSocket-Accept", accept)])


# ---------------------------------------------------------------------------
# Journal: events on disk, one file per day and session
#
# Owns: the files below events/, and the numbers (seq) that order arrival.
# Does not know: clients, states of sessions, sockets.
# A line begins {"seq":…,"received":…,"id":…}, so that it is found without parsing JSON. Within a file, seq
# ascends, and from day to day unless the clock was set back by more than a day. The empty file
# events/.in-order marks days in order; without it, reading merges all days, which is slower.
# ---------------------------------------------------------------------------

_SAFE_FILE_NAME = re.compile(r"[a-z0-9_][a-z0-9._-]{0,63}\Z")  # not hidden, no option of a command
_SEQ = re.compile(rb'\{"seq":(\d{1,15}),')
_ID = re.compile(rb'\{"seq":\d+,"received":\d+,"id":("[^"\\]*(?:\\.[^"\\]*)*")')
_DAY_MS = 86_400_000
_BLOCK_BYTES = 64 << 10  # read at once; less per file while many are merged
_TAIL_BYTES = 4 << 10
REMEMBERED_IDS = 64_000
SLOW_WRITE_MS = 100
SLOW_WRITE_SHOWN_S = 600.0


class StoredEvent(NamedTuple):
    """An event on disk, with its number and its line without the newline."""

    seq: int
    event: JsonObject
    line: bytes


def session_file_name(session_id: str) -> str:
    """Return the file name for a session, unique even if the file system ignores case."""
    if _SAFE_FILE_NAME.match(session_id) and not session_id.startswith("sha256-"):
        return session_id + ".jsonl"
    return "sha256-" + hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()[:40] + ".jsonl"


def day_of(time_ms: int) -> str:
    """Return the UTC day, YYYY-MM-DD, that names the folder of events that arrived at `time_ms`."""
    return time.strftime("%Y-%m-%d", time.gmtime(time_ms // 1000))


def numbered_line(seq: int, received_ms: int, encoded: bytes) -> bytes:
    """Return the journal line of an encoded event, without the newline."""
    return b'{"seq":%d,"received":%d,' % (seq, received_ms) + encoded[1:]


class Journal:
    """Appends events to the session files of a day, in the loop thread; any thread can read them."""

    OPEN_FILES = 64
    forgotten = 0  # events up to this seq may be missing: with these alone, a client must load all again
    slow_write = (-math.inf, 0)  # when (time.monotonic()) a write last took longer than SLOW_WRITE_MS; its ms

    def __init__(self, root: str) -> None:
        self.root = root
        self.seq = 0  # the last number that was written
        self.error: str | None = None  # why the last write failed; None if it succeeded
        self.repaired = 0  # incomplete last lines that were repaired
        # session id → its open file of newest_day: (descriptor, path, inode, size after the last write)
        self._open_files: dict[str, tuple[int, str, int, int]] = {}
        self._day_number = -1  # of the last write, in days since 1970
        self._is_open = False  # events may be appended while other threads read
        emit_event.make_private_directory(root)
        self.newest_day = max(self.days(), default="")  # events are written to its folder
        self.in_order = not self.newest_day or os.path.exists(root + "/.in-order")

    def open(self) -> None:
        """Find the last number, and adapt files of older versions; must be called before `append`."""
        for path in glob.glob(glob.escape(self.root) + "/*/*.jsonl.gz"):
            unpack(path)
        for path in glob.glob(glob.escape(self.root) + "/*/*[A-Z]*.jsonl"):
            with contextlib.suppress(OSError, MalformedEvent), open(path, "rb") as file:
                session_id = parse_stored(file.readline())["sessionId"]
                name = os.path.join(os.path.dirname(path), session_file_name(session_id))
                if not os.path.exists(name):
                    os.rename(path, name)
        if not self.in_order:
            days = [[file for file in self.day_files(day) if file.last_seq] for day in self.days()]
            ends = [(min(f.first_seq for f in day), max(f.last_seq for f in day)) for day in days if day]
            self.in_order = all(ends[i][1] < ends[i + 1][0] for i in range(len(ends) - 1))
        if self.in_order:
            with contextlib.suppress(OSError):
                os.close(emit_event.open_own(self.root + "/.in-order", os.O_WRONLY | os.O_CREAT))
        newest = next(filter(None, self._runs(None, 0, sys.maxsize)), [])
        self.seq = max([self.seq, *(file.last_seq for file in newest)])
        self._is_open = True

    def append(
        self, events: Sequence[JsonObject], received_ms: int, encoded: Sequence[bytes] | None = None
    ) -> list[StoredEvent | None]:
        """Number and write the events, one write per file; None for one that was not: `error` says why."""
        stored: list[StoredEvent | None] = []
        by_session: dict[str, list[StoredEvent]] = {}
        for seq, (event, text) in enumerate(zip(events, encoded or map(encode_json, events)), self.seq + 1):
            line = numbered_line(seq, received_ms, text)
            entry = StoredEvent(seq, {"seq": seq, "received": received_ms, **event}, line)
            stored.append(entry)
            by_session.setdefault(event["sessionId"], []).append(entry)
        self.error = None
        for session_id, entries in by_session.items():
            started = time.monotonic()
            try:
                self._write(session_id, b"".join([entry.line + b"\n" for entry in entries]), received_ms)
            except OSError as error:
                self.close()
                self.error = f"{self.newest_day}/{session_file_name(session_id)}: {error.strerror or error}"
                for entry in entries:
                    stored[entry.seq - self.seq - 1] = None
            if (took_ms := round((time.monotonic() - started) * 1000)) > SLOW_WRITE_MS:
                self.slow_write = time.monotonic(), took_ms
        self.seq += len(stored)  # set last, since readers stop there: they never see a part of this batch
        return stored

    def _write(self, session_id: str, data: bytes, received_ms: int) -> None:
        if received_ms // _DAY_MS != self._day_number:
            self.close()
            self._day_number, day = received_ms // _DAY_MS, day_of(received_ms)
            if day >= self.newest_day:
                self.newest_day = day
            elif day_of(received_ms + _DAY_MS) < self.newest_day:  # else set back over midnight
                self.newest_day, self.in_order = day, False
                with contextlib.suppress(OSError):
                    os.unlink(self.root + "/.in-order")
        try:
            fd, path, *known = self._open_files[session_id]
            about = os.stat(path)
            is_ours = [about.st_ino, about.st_size] == known
        except (LookupError, FileNotFoundError):
            is_ours = False
        if not is_ours:  # users delete, move and edit files
            fd, path, about = self._open_to_append(session_id)
        if (written := os.write(fd, data)) != len(data):
            os.ftruncate(fd, about.st_size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._open_files[session_id] = fd, path, about.st_ino, about.st_size + written

    def _open_to_append(self, session_id: str) -> tuple[int, str, os.stat_result]:
        if session_id in self._open_files or len(self._open_files) == self.OPEN_FILES:
            self.close()
        path = f"{self.root}/{self.newest_day}/{session_file_name(session_id)}"
        emit_event.make_private_directory(os.path.dirname(path))
        fd = emit_event.open_own(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        self._open_files[session_id] = fd, path, 0, 0
        torn = next(JournalFile(path, os.fstat(fd)).segments_back())
        self.repaired += bool(torn)
        if torn and emit_event.is_json_object(torn):
            os.write(fd, b"\n")  # only the newline is missing
        elif torn:  # the event was not acknowledged
            os.ftruncate(fd, os.fstat(fd).st_size - len(torn))
        return fd, path, os.fstat(fd)

    def close(self) -> None:
        """Close every file."""
        while self._open_files:
            os.close(self._open_files.popitem()[1][0])

    def is_writable(self) -> bool:
        """True if events can be written; writes a test file, since quotas and broken disks show only then."""
        with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=self.root, buffering=0) as file:
            free = os.statvfs(self.root)
            return file.write(bytes(_BLOCK_BYTES)) == _BLOCK_BYTES and free.f_bavail * free.f_frsize > 4 << 20
        return False

    def delete_session(self, session_id: str) -> int:
        """Delete every file of a session; return the bytes that were freed."""
        self.close()
        freed = 0
        for file in self.files(session_id):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.path)
                freed += file.size
            with contextlib.suppress(OSError):  # the day has files of other sessions
                os.rmdir(os.path.dirname(file.path))
        return freed

    def lines(
        self, session: str | None = None, after: int = 0, before: int | None = None, backwards: bool = False
    ) -> Iterator[bytes]:
        """Yield the lines with after < seq < before, stored so far, without newlines, in order of seq."""
        return (line for line, _ in self.placed_lines(session, after, before, backwards))

    def placed_lines(
        self, session: str | None = None, after: int = 0, before: int | None = None, backwards: bool = False
    ) -> Iterator[tuple[bytes, str]]:
        """Yield lines, as `lines`, each with the day of its file."""
        end = min(sys.maxsize if before is None else before, self.seq + 1 if self._is_open else sys.maxsize)
        runs = self._runs(session, after, end)
        for files in runs if backwards else reversed(list(runs)):
            block = min(_BLOCK_BYTES, max(_TAIL_BYTES, (8 << 20) // max(1, len(files))))
            keyed = heapq.merge(*(file.lines(after, end, backwards, block) for file in files))
            yield from ((line, day) for _, line, day in keyed if line)

    def _runs(self, session: str | None, after: int, before: int) -> Iterator[list[JournalFile]]:
        """Yield the files that can contain these numbers, day by day, newest first."""
        days = self.days()[::-1]
        for group in [[day] for day in days] if self.in_order else [days]:
            files = [file for day in group for file in self.day_files(day, session) if file.last_seq]
            if files and max(file.last_seq for file in files) <= after:
                return
            yield [file for file in files if file.last_seq > after and file.first_seq < before]

    def find(self, event_id: str, session_id: str | None = None, seq: int | None = None) -> bytes | None:
        """Return the line of one event; `session_id` or `seq` avoid reading every file."""
        near = [] if seq is None else self.lines(session_id, seq - 1, seq + 1)
        lines = itertools.chain(near, self.lines(session_id, backwards=True))
        needle = b'"id":' + encode_json(event_id)
        return next((line for line in lines if needle in line and line_id(line) == event_id), None)

    def days(self) -> list[str]:
        """Return the days that have events, oldest first."""
        return sorted(map(os.path.basename, glob.glob(glob.escape(self.root) + "/[12]???-[01]?-[0-3]?")))

    def day_files(self, day: str, session: str | None = None) -> list[JournalFile]:
        """Return the files of a day, of one session or of all."""
        found, folder = [], f"{self.root}/{day}/"
        one = [folder + session_file_name(session or "")]
        for path in glob.glob(glob.escape(folder) + "*.jsonl") if session is None else one:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                about = os.stat(path)
                if stat.S_ISREG(about.st_mode) and os.access(path, os.R_OK):
                    found.append(JournalFile(path, about))
                else:
                    warn_skipped_once(path)
        return found

    def files(self, session: str | None = None) -> list[JournalFile]:
        """Return the files of all days, of one session or of all."""
        return [file for day in self.days() for file in self.day_files(day, session)]

    def line(self, seq: int, day: str, name: str) -> bytes | None:
        """Return the line with this seq from a file of a day; None if it was deleted."""
        path = f"{self.root}/{day}/{name}"
        with contextlib.suppress(FileNotFoundError):
            _, line = JournalFile(path, os.stat(path)).find(seq)
            return line[:-1] if line_seq(line) == seq and line.endswith(b"\n") else None
        return None


class MemoryJournal(Journal):
    """The journal for `persistence.enabled: false`: the last events, in memory only."""

    LIMIT_BYTES = 64 << 20

    def __init__(self) -> None:
        self.root, self.seq, self.error, self.repaired = "", 0, None, 0
        self._open_files = {}
        self._kept: collections.deque[tuple[int, str, bytes]] = collections.deque()  # (seq, session id, line)
        self._bytes = 0
        self._lock = threading.Lock()  # the loop thread appends while others read

    def open(self) -> None:
        """Count on from a number above those of an earlier monitor: there is no file."""
        self.seq = self.forgotten = max(self.seq, now_ms())

    def _write(self, session_id: str, data: bytes, received_ms: int) -> None:
        with self._lock:
            self._kept.extend((line_seq(line), session_id, line) for line in data.splitlines())
            self._bytes += len(data)
            while self._bytes > self.LIMIT_BYTES:
                seq, _, line = self._kept.popleft()
                self.forgotten = max(self.forgotten, seq)
                self._bytes -= len(line) + 1

    def delete_session(self, session_id: str) -> int:
        """Delete a session's events; return the bytes that were freed."""
        with self._lock:
            freed = sum(len(line) + 1 for _, owner, line in self._kept if owner == session_id)
            self._kept = collections.deque(entry for entry in self._kept if entry[1] != session_id)
            self._bytes -= freed
        return freed

    def lines(
        self, session: str | None = None, after: int = 0, before: int | None = None, backwards: bool = False
    ) -> Iterator[bytes]:
        """Yield stored lines, as `Journal.lines` does."""
        end = self.seq + 1 if before is None else before
        with self._lock:
            kept = [it for it in self._kept if after < it[0] < end and session in (None, it[1])]
        for _, _, line in sorted(kept, reverse=backwards):  # a batch was written session after session
            yield line


class JournalFile:
    """A file of lines with the size it had when it was listed; each read opens and closes it."""

    def __init__(self, path: str, about: os.stat_result) -> None:
        self.path, self.inode, self.size = path, about.st_ino, about.st_size
        *_, self.day, self.name = path.split("/")

    @functools.cached_property
    def last_seq(self) -> int:
        """The number of the last event, even an incomplete one; 0 if there is none. Reads only the end."""
        return next(filter(None, map(line_seq, self.segments_back(block=_TAIL_BYTES))), 0)

    @functools.cached_property
    def first_seq(self) -> int:
        """The number of the first complete event, else `last_seq`."""
        return next(filter(None, map(line_seq, self._whole_lines(0, _TAIL_BYTES))), self.last_seq)

    def lines(self, after: int, before: int, backwards: bool, block: int) -> Iterator[tuple[int, bytes, str]]:
        """Yield (seq or -seq, line, day), first without a line: a merge reads a file in its turn."""
        yield (-self.last_seq if backwards else self.first_seq), b"", self.day
        if not backwards:
            segments = self._whole_lines(self.find(after + 1)[0] if self.first_seq <= after else 0, block)
        else:
            end = None if self.last_seq < before else self.find(before)[0]
            segments = itertools.islice(self.segments_back(end, block), 1, None)
        for line in segments:
            if after < (seq := line_seq(line)) < before:
                yield (-seq if backwards else seq), line, self.day
            elif seq and (seq <= after) == backwards:
                return

    def _whole_lines(self, start: int, block: int) -> Iterator[bytes]:
        rest, size = b"", block
        while data := self._read(size, start):
            start += len(data)
            *lines, rest = (rest + data).split(b"\n")
            size = block if lines else 2 * size
            yield from lines

    def segments_back(self, end: int | None = None, block: int = _BLOCK_BYTES) -> Iterator[bytes]:
        """Yield the lines from the end to the start; the first is incomplete or empty."""
        rest, size, end = b"", block, self.size if end is None else end
        while end > 0:
            start = max(0, end - size)
            rest, *lines = (self._read(end - start, start) + rest).split(b"\n")
            end, size = start, block if lines else 2 * size
            yield from reversed(lines)
        yield rest

    def _read(self, size: int, offset: int) -> bytes:
        """Return a block of the file; b"" if it was deleted or replaced, or where its disk is broken."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_ino == self.inode:
                    return os.pread(file.fileno(), size, offset)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EIO):
                raise
            if error.errno == errno.EIO:
                warn_skipped_once(self.path)
        return b""

    def find(self, seq: int) -> tuple[int, bytes]:
        """Return the offset of the first line with a number of at least `seq`, else the end, and the line."""
        low, high = 0, self.size  # lines that begin before `low` are below, from `high` on none is
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb", _TAIL_BYTES) as file:
            while high - low > _TAIL_BYTES:
                middle = (low + high) // 2
                file.seek(middle - 1)
                start = middle - 1 + len(file.readline())  # of the first line that does not begin before
                is_below = next(filter(None, map(line_seq, file)), seq) < seq
                low, high = (start, high) if is_below else (low, middle)
            file.seek(low)
            for line in file:
                if line_seq(line) >= seq:
                    return low, line
                low += len(line)
        return low, b""


def line_seq(line: bytes) -> int:
    """Return the seq at the beginning of a stored line, 0 if there is none."""
    match = _SEQ.match(line)
    return int(match[1]) if match else 0


def line_id(line: bytes) -> str:
    """Return the event id at the beginning of a stored line, "" if there is none."""
    match = _ID.match(line)
    text = match[1].decode("utf-8", "replace") if match else '""'
    return str(json.loads(text)) if "\\" in text else text[1:-1]


def parse_stored(line: bytes) -> JsonObject:
    """Parse a stored line into a valid event, even if it was edited by hand; raise MalformedEvent."""
    event = emit_event.parse_event_line(line)
    received_ms = event["received"] if isinstance(event.get("received"), int) else 0
    if received_ms and emit_event.is_whole_event(event):
        return event
    rebuilt = emit_event.build_event(event, received_ms, "unknown")
    return {"seq": line_seq(line), "received": received_ms or rebuilt["timestamp"], **rebuilt}


SKIPPED_WORDS = "%s is skipped: it is not a regular file that this user can read, or its disk is broken"
warn_skipped_once = functools.lru_cache(maxsize=1000)(functools.partial(log.warning, SKIPPED_WORDS))


def unpack(path: str) -> None:
    """Replace a gzip file of an older version with a plain one; a damaged file stays as it is."""
    plain = path[: -len(".gz")]
    try:
        if not os.path.exists(plain):
            with open(path, "rb") as packed:
                content = gzip.decompress(packed.read())
            with open(plain + ".tmp", "wb", opener=emit_event.open_own) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(plain + ".tmp", plain)
        os.unlink(path)
    except (OSError, EOFError, zlib.error) as error:
        log.warning("%s cannot be unpacked, its events are skipped: %s", path, error)


def _drop_oldest(entries: dict[Any, Any], limit: int) -> list[Any]:
    """Drop what is beyond the limit; return its keys."""
    oldest = list(itertools.islice(entries, len(entries) - limit)) if len(entries) > limit else []
    for key in oldest:
        del entries[key]
    return oldest


class SeenIds:
    """The ids of the last events, at least REMEMBERED_IDS and `minimum` of them, to detect duplicates."""

    def __init__(self, minimum: int = REMEMBERED_IDS) -> None:
        self.limit = max(minimum, REMEMBERED_IDS)
        # Digests, concatenated in buckets of about 16: a fifth of the memory of a set of strings.
        self._new, self._old = ([b""] * (self.limit // 16 + 1) for _ in range(2))
        self._count = 0

    def add(self, event_id: str) -> None:
        """Add a new id."""
        number, digest = self._place(event_id)
        self._new[number] += digest
        self._count += 1
        if self._count % self.limit == 0:
            self._old, self._new = self._new, [b""] * len(self._new)

    def __contains__(self, event_id: str) -> bool:
        number, digest = self._place(event_id)
        return digest in self._new[number] or digest in self._old[number]

    def _place(self, event_id: str) -> tuple[int, bytes]:
        digest = hashlib.blake2b(event_id.encode("utf-8", "surrogatepass"), digest_size=10).digest()
        return hash(digest) % len(self._new), digest


class DeletedIds:
    """The ids of what was deleted last, in a file: events may be in the Redis stream, sessions may go on."""

    def __init__(self, path: str, limit: int) -> None:
        self._path, self._limit = path, limit
        self.ids: dict[str, None] = {}  # oldest first
        with contextlib.suppress(TypeError):
            self.ids = dict.fromkeys(emit_event.read_state(path).get("ids", ()))

    def add(self, event_ids: Sequence[str]) -> None:
        """Add ids; keep the last `limit` of all."""
        self.ids = dict.fromkeys([*self.ids, *event_ids][-self._limit :])
        try:
            emit_event.write_atomically(self._path, encode_json({"ids": list(self.ids)}) + b"\n")
        except OSError as error:
            log.warning("deleted events and sessions may return after a restart: %s", error)


# ---------------------------------------------------------------------------
# Sessions: the state machine: who works, who waits and who has ended
#
# Without I/O: `Sessions.apply` applies every event once, in order of arrival (`seq`), live or from files;
# `tick` applies the passing of time. An event that a later one overtook is `late`. All times are on the
# monitor's clock: the time of an event is computed once, when it arrives (`Sessions._clock`).
#
# RULES defines the effects of each kind of event; the special cases of the client follow it as functions.
# ---------------------------------------------------------------------------

MAIN = ""  # the agent id of a session's main agent


class Rule(NamedTuple):
    """The effects of an event."""

    turn: str = ""  # the new turn of the main agent, if the event is its own; "": unchanged
    ends: str = ""  # the calls and agents that end
    waits: str = ""  # the waits that end, besides those of calls that end


# The effects of each kind of event (`kind_of`). When an agent ends, so do those below it and all their calls.
#   ends:  call (that the event names), agent (that sent it), task (that it names), foreground (what does not
#          outlive a turn), turn (the same, and agents missing from the client's list of tasks), all
#   waits: input (its agent's, at the prompt; more in `_end_waits`), agent (all of its agent), all
_RULED = (
    (Rule("idle", "all", "all"), "session_start"),
    (Rule("working", "foreground", "all"), "user_prompt"),  # Esc and a rejected permission fire nothing
    (Rule("working", "task", "input"), "task_notification"),
    (Rule("working", "call", "input"), "tool_result", "tool_error", "permission_denied"),
    (Rule("working", "", "input"), "tool_call", "queued_prompt", "permission_request", "permission_result",
     "elicitation", "elicitation_result", "pre_compact"),
    (Rule("idle", "", ""), "compacted", "prompt_blocked"),  # a compaction that a person asked for
    (Rule("", "call", "agent"), "round_end"),
    (Rule("", "agent", ""), "subagent_stop"),
    (Rule("", "task", ""), "task_killed"),
    (Rule("idle", "foreground", "agent"), "interrupted"),
    (Rule("idle", "turn", "agent"), "turn_end"),
    (Rule("failed", "turn", "agent"), "turn_error"),
    (Rule("ended", "all", "all"), "session_end", "client_exited", "replaced"),  # by another session
)  # fmt: skip
RULES = {kind: rule for rule, *kinds in _RULED for kind in kinds}
_NOTHING = Rule()

# The most urgent first. `apply_event` chooses one at its end; `tick` turns `working` into `quiet`.
SESSION_STATES = ("waiting", "failed", "working", "quiet", "idle", "ended")

QUESTION_TOOLS = ("AskUserQuestion", "ExitPlanMode")
AGENT_TOOLS = ("Agent", "Task")
REORDER_WINDOW_MS = 5000  # hooks overtake each other by less; calls of one round begin within this time
STUCK_FAILURES = 5  # failures of one tool of one agent in a row, with the same error
STUCK_TURNS = 3  # turns that used tools and changed no file
STUCK_MS = 2 * 3_600_000  # duration of a turn or an agent
STILL_BUSY_MS = 1500  # a client that is busy so long after the end of a turn goes on
SENT_OF_EACH = 20  # open calls of a session, and agents; clients get the number of all
RESET_TOLERANCE_MS = 60_000  # two times of a reset that differ by less are the same
PACE_MS = 3_600_000  # over which a limit's pace is measured
TEST_SESSION_ID = "contextuate-test"  # of `test-event`, `doctor` and the page's button
HOOK_DEADLINE_S = 30.0  # for the hook that these run
_EXITED = "its process exited"
_NEVER = 1 << 62  # later than any time in ms
FIGURE_KINDS = ("usage", "status_line")  # totals of a session; not what an agent does
READ_KINDS = (*FIGURE_KINDS, emit_event.WORDS)  # read from files: they change no state, and begin no session
_SLOTS: dict[str, Any] = {"slots": True} if sys.version_info >= (3, 10) else {}  # a quarter of the memory
COUNTS = ("events", "toolCalls", "toolErrors", "interrupted", "prompts")  # an agent has the first three


class OpenCall(NamedTuple):
    """A tool call that has no result yet."""

    tool_use_id: str
    tool_name: str
    target: str
    agent_id: str  # MAIN for the main agent
    since: int
    description: str = ""  # of an Agent call: the label of the agent it starts
    digest: int = 0  # of the whole input; the target is only its beginning

    @property
    def activity(self) -> str:
        """Return the call as one line."""
        return f"{self.tool_name}: {self.target}" if self.target else self.tool_name


class Reason(NamedTuple):
    """Why a session waits, has failed or has ended."""

    kind: str  # permission, question, dialog, input, error, ended
    tool: str | None
    detail: str
    since: int
    agent_id: str = MAIN  # who waits
    tool_use_id: str | None = None  # the call that waits; None: no call; only a guess without `tool`
    by_client: bool = False  # from the client's registry, not from a hook
    event_id: str = ""  # of the event that asks
    held_until: int = 0  # until then the client may wait for the hook, before it shows a dialog


class Tokens(NamedTuple):
    """Numbers of used tokens."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    cache_creation_1h: int = 0  # the part of cache_creation with a lifetime of an hour

    def __add__(self, other: Tokens) -> Tokens:  # type: ignore[override]
        return Tokens(*map(operator.add, tuple(self), tuple(other)))

    def to_json(self) -> JsonObject:
        """Return the totals in the form of the API."""
        return dict(zip(("totalInput", "totalOutput", "totalCacheRead", "totalCacheCreation"), self))


class SessionUsage(NamedTuple):
    """Tokens that a session used until `time`, by model."""

    time: int
    models: dict[str, Tokens]
    model: str | None = None  # the last one of the main agent
    context: int | None = None  # tokens in the main agent's last request

    @property
    def total(self) -> Tokens:
        """Return the sum over all models."""
        return sum(self.models.values(), Tokens())


class LimitWindow(NamedTuple):
    """One window of an account's limits, such as the current five hours."""

    resets_at: int
    # (time, percent), each higher than the last: of the last hour, and one before
    samples: list[tuple[int, float]]
    costs: dict[str, tuple[float, float]]  # session id → its cost when the window began, and now


class Account(NamedTuple):
    """A subscription: the machines that report the same times of resets."""

    machines: dict[str, None]  # their keys
    windows: dict[str, LimitWindow]  # by name in LIMIT_WINDOWS


@dataclasses.dataclass(**_SLOTS)
class Agent:
    """A subagent of a session."""

    agent_id: str
    agent_type: str
    start: int
    label: str = ""
    parent_id: str = MAIN
    background: bool = False  # continues after the turn that launched it
    has_metadata: bool = False  # label and parent come from the client's metadata file
    end: int | None = None
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS[:3], 0))


@dataclasses.dataclass(**_SLOTS)
class Session:
    """The state of one session; times in milliseconds of the monitor's clock."""

    session_id: str
    machine_id: str
    directory: str
    start: int
    last_event: int
    state_since: int
    received: int  # when its last event arrived
    seq: int = 0  # of the last event that was applied
    last_timestamp: int = 0  # the last one of its machine: an event with a lower one was overtaken
    clock: int = 0  # time of the last event, or when it had been busy for too long
    state: str = "idle"
    user_label: str = ""
    title: str = ""
    client_name: str = ""  # from a person, by /rename
    has_hooks: bool = False
    first_prompt: str = ""
    prompt_id: str = ""  # of the last prompt
    queued: int = 0  # prompts that hooks reported while the turn ran
    model: str | None = None
    usage: SessionUsage | None = None
    agent_usage: dict[str, tuple[int, Tokens]] = dataclasses.field(default_factory=dict)  # (time, tokens)
    gauges: JsonObject | None = None  # of its last status line, in the form of the API
    gauges_time: int = 0
    effort: str = ""
    start_source: str = ""  # of its last SessionStart
    source_time: int = 0
    terminal: JsonObject = dataclasses.field(default_factory=dict)  # variables of the one in which it started
    turn: str = "idle"
    turn_since: int = 0  # the time of the event that set the turn
    turn_start: int = 0  # when the running turn began
    turn_calls: int = 0  # tools used since then
    turn_changed: bool = False  # a file was changed since then
    unchanged_turns: int = 0  # the last turns in a row that used tools and changed no file
    unchanged_since: int = 0  # when the first of them began
    # (agent id, tool) → its failures in a row with the same error: (error, count, since)
    streaks: dict[tuple[str, str], tuple[str, int, int]] = dataclasses.field(default_factory=dict)
    last_step: dict[str, int] = dataclasses.field(default_factory=dict)  # agent id → its last progress
    background: list[str] = dataclasses.field(default_factory=list)  # labels of the running background tasks
    wakeup: str = ""  # when the session continues by itself, as text
    failure: Reason | None = None
    unseen_failure: bool = False  # it ended by an error, and no person has seen it
    end: int | None = None
    end_reason: str = ""
    end_presumed: bool = False  # without SessionEnd: its next event shows that it is alive
    waits: list[Reason] = dataclasses.field(default_factory=list)
    agents: dict[str, Agent] = dataclasses.field(default_factory=dict)
    # agent id → (label, parent, background), from results of calls that launched agents
    launched: dict[str, tuple[str, str, bool]] = dataclasses.field(default_factory=dict)
    open_calls: dict[str, OpenCall] = dataclasses.field(default_factory=dict)  # by tool use id
    closed_calls: dict[str, int] = dataclasses.field(default_factory=dict)  # id → Outcome; OPEN: no end came
    parent_id: str | None = None
    parent_by_user: bool = False
    continued_from: str | None = None
    forked_from: str | None = None  # by its transcript; that one may go on, too
    counts: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    # (pid, namespace) of clients that run it, most recently active last → last time seen alive (0: never)
    processes: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    # process → the status that its client reported last: (status, waitingFor)
    client_status: dict[tuple[int, int] | None, tuple[str, str]] = dataclasses.field(default_factory=dict)
    demo: bool = False
    imported: bool = False  # a part of its history was imported
    pinned: bool = False
    hidden: bool = False
    machine_key: str = ""  # which machine; `machine_id` is only its name
    agent: str = ""  # which program, of emit_event.AGENTS; "": Claude Code
    branch: str = ""
    root: str = ""  # of its worktree
    project: str = ""  # the same for all worktrees of a repository
    # (path, other session) → (its agent, when the later one of the two edited)
    collisions: dict[tuple[str, str], tuple[str, int]] = dataclasses.field(default_factory=dict)

    @property
    def process(self) -> tuple[int, int] | None:
        """Return (pid, namespace) of the most recently active process."""
        return next(reversed(self.processes), None)

    @property
    def label(self) -> tuple[str, str]:
        """Return (label, its source): from the user, /rename, the title, the first prompt or the project."""
        title = self.title or ("Test events" if self.session_id == TEST_SESSION_ID else "")
        project = os.path.basename(self.directory.rstrip("/")) or self.session_id[:8]
        labels = (self.user_label, self.client_name, title, self.first_prompt, project)
        return next(it for it in zip(labels, ("user", "name", "title", "prompt", "project")) if it[0])

    @property
    def reason(self) -> Reason | None:
        """Return why the session waits, has failed or has ended; of several waits the first."""
        if self.state == "ended":
            why = f"failed: {self.failure.detail}" if self.failure else self.end_reason
            return Reason("ended", None, why, self.end or self.last_event)
        if self.state == "waiting":
            return min(self.waits, key=lambda wait: (wait.kind == "input", wait.since))
        return self.failure if self.state == "failed" else None

    @property
    def activity(self) -> str:
        """Return what the session does now: its newest open call, else a background task."""
        if self.open_calls:
            return self.open_calls[next(reversed(self.open_calls))].activity
        return f"background: {self.background[0]}" if self.background else self.wakeup


# Text and targets
_TARGET_KEYS = (
    "command", "file_path", "notebook_path", "path", "pattern", "url", "query", "subject", "question",
    "description", "skill", "plan", "prompt", "name",
)  # fmt: skip
PATCH = "*** Begin Patch"  # begins the input of `apply_patch`, in a field of any name
_PATCHED_FILE = re.compile(r"^\*\*\* (?:Add|Update|Delete) File: (.+)$", re.M)


def effective_type(event: JsonObject) -> str:
    """Return our category of an event: by its hook if it has one, since other emitters use other types."""
    return emit_event.EVENT_TYPES.get(event["hookType"]) or str(event["eventType"])


def one_line(text: str, limit: int = 160) -> str:
    """Return the beginning of a text as one line."""
    line = " ".join(text[: limit * 4].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def object_of(value: Any) -> JsonObject:
    """Return a JSON value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def text_of(value: Any) -> str:
    """Return a JSON value as text for one line."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)


def tool_target(tool_input: Any, directory: str = "") -> str:
    """Return the main argument of a tool call as one line, with paths relative to `directory`."""
    if not isinstance(tool_input, dict):
        return one_line(text_of(tool_input))
    questions, todos, task = tool_input.get("questions"), tool_input.get("todos"), tool_input.get("taskId")
    if isinstance(questions, list) and questions and isinstance(questions[0], dict):
        return one_line(text_of(questions[0].get("question")))
    if isinstance(todos, list):
        return f"{len(todos)} items"
    if task not in (None, ""):
        status = text_of(tool_input.get("status"))
        return one_line(f"task {text_of(task)}" + (f": {status}" if status else ""))
    below = directory.rstrip("/") + "/" if directory else ""
    for value in tool_input.values():
        if isinstance(value, str) and value.startswith(PATCH):
            paths = [path.removeprefix(below) for path in _PATCHED_FILE.findall(value)]
            return one_line(", ".join(paths) or value)
    for key in _TARGET_KEYS:
        if text := text_of(tool_input.get(key)):
            return one_line(text.removeprefix(below))
    # Tools of MCP servers have fields of any name.
    named = [(name, text_of(value)[:400]) for name, value in itertools.islice(tool_input.items(), 10)]
    if len(named) == 1:
        return one_line(named[0][1])
    return one_line(", ".join(f"{name}: {value}" for name, value in named if value))


class Outcome(enum.IntEnum):
    """The outcome of a tool call; in statistics and exports the highest of several events counts."""

    OPEN = 0
    FAILED_BY_ROUND = 1  # never ran: it was denied, or only its round (PostToolBatch) closed it
    OK = 2
    FAILED = 3
    INTERRUPTED = 4


FAILED = (1, 3)  # outcomes


class CallFact(NamedTuple):
    """What one event reports about one tool call; times in ms of the emitter's clock."""

    use_id: str
    tool: str
    tool_input: Any  # unchanged from the client
    agent_id: str
    begun_ms: int
    finish_ms: int | None  # None: it did not run, or has not ended
    duration_ms: int | None  # None: not reported
    outcome: Outcome
    error: Any  # from the client, of any type


# What the client writes around pasted text and errors, and the ids in its reports of tasks.
_CLIENT_TAGS = re.compile(
    r"</?(?:pasted_content|tool_use_error)\b[^>]*>|<(task-id|tool-use-id|output-file)>[^<]*</\1>"
)
UNNAMED = "unnamed:"  # begins the ids that we give to calls without one
_OUTCOMES = {
    "tool_call": Outcome.OPEN,
    "tool_result": Outcome.OK,
    "tool_error": Outcome.FAILED,
    "permission_denied": Outcome.FAILED_BY_ROUND,
}


def call_facts(event: JsonObject) -> list[CallFact]:
    """Return what an event reports about tool calls; a call without an id gets one from its event."""
    data, timestamp, agent_id = event["data"], event["timestamp"], event.get("agentId", MAIN)
    if event["hookType"] == "PostToolBatch":
        return [
            CallFact(call["tool_use_id"], text_of(call.get("tool_name")) or "?", call.get("tool_input"),
                     agent_id, timestamp, None, None, Outcome.FAILED_BY_ROUND, call.get("tool_response"))
            for call in _batch_calls(event)
        ]  # fmt: skip
    outcome, use_id = _OUTCOMES.get(effective_type(event)), data.get("toolUseId")
    if outcome is None or (outcome is Outcome.FAILED_BY_ROUND and not use_id):
        return []
    if outcome is Outcome.FAILED and data.get("is_interrupt") is True:
        outcome = Outcome.INTERRUPTED
    if not isinstance(use_id, str) or not use_id:
        use_id = UNNAMED + event["id"]
    finish, given = (timestamp if outcome >= Outcome.OK else None), data.get("durationMs")
    is_plausible = finish is not None and type(given) in emit_event.NUMBERS and 0 <= given < 1 << 40
    duration = round(given) if is_plausible else None
    error = None if outcome is Outcome.OK else data.get("error") or data.get("reason")
    tool, begun = text_of(data.get("toolName")) or "?", timestamp - (duration or 0)
    return [CallFact(use_id, tool, data.get("toolInput"), agent_id, begun, finish, duration, outcome, error)]


class UnnamedCalls:
    """Pairs results without ids with the newest open call of the same agent and tool, first by input."""

    def __init__(self) -> None:
        # (session, agent, tool) → (use id, hash of the input)
        self.open: dict[tuple[str, str, str], list[tuple[str, int]]] = {}

    def paired(self, event: JsonObject, facts: list[CallFact]) -> list[CallFact]:
        """Return the facts of an event; a result without an id gets that of its call."""
        if not facts or not facts[0].use_id.startswith(UNNAMED):
            return facts
        key = (event["sessionId"], facts[0].agent_id, facts[0].tool)
        calls, digest = self.open.setdefault(key, []), zlib.crc32(encode_json(facts[0].tool_input))
        if facts[0].outcome is Outcome.OPEN:
            calls.append((facts[0].use_id, digest))
            del calls[:-100]
        elif calls:
            call = next((it for it in reversed(calls) if it[1] == digest), calls[-1])
            calls.remove(call)
            facts = [facts[0]._replace(use_id=call[0])]
        if not calls:
            del self.open[key]
        return facts


def _batch_calls(event: JsonObject) -> list[JsonObject]:
    calls = emit_event.objects_in(event["data"].get("tool_calls"))
    return [call for call in calls if isinstance(call.get("tool_use_id"), str)]


# Statuses that are no client's own: its process has ended, or its transcript is evidence.
_STATUS_KINDS = {
    emit_event.CLIENT_EXITED: "client_exited", "interrupted": "interrupted", "killed": "task_killed",
    "failed": "turn_error", "stopped": "message", "blocked": "prompt_blocked",
}  # fmt: skip


def kind_of(event: JsonObject) -> str:
    """Return the kind of an event for RULES: our category, or a special case of the client."""
    kind = effective_type(event)
    if event["hookType"] == "PostToolBatch":
        return "round_end"
    if kind == "session_start" and event["data"].get("source") == "compact":
        return "compaction"  # within the same process
    if kind == "user_prompt" and task_notification(event) is not None:
        return "task_notification"  # not from a person
    if kind == "post_compact" and event["data"].get("trigger") == "manual":
        return "compacted"
    if event["hookType"] == "TeammateIdle" and "agentId" in event:
        return "subagent_stop"  # until it begins again
    if kind == "client_status":
        return _STATUS_KINDS.get(text_of(event["data"].get("status")), kind)
    if kind == "tool_error" and not event["hookType"] and {"exitCode", "is_interrupt"} & {*event["data"]}:
        return "exit_code"  # from a transcript; the call, and perhaps the turn, have ended before
    return kind


def task_notification(event: JsonObject) -> str | None:
    """Return the id of the task whose end a UserPromptSubmit reports; "": unnamed; None: a prompt."""
    text = text_of(event["data"].get("message"))[:2000]
    match = re.match(r"\s*<task-notification>(?:.*?<task-id>\s*([^<\s]+)\s*</task-id>)?", text, re.S)
    return (match[1] or "") if match else None


def apply_event(
    session: Session, event: JsonObject, kind: str, at: int, facts: list[CallFact], quiet_ms: int, late: bool
) -> None:
    """Apply one event to its session; a `late` one, which others overtook, ends nothing that began later."""
    agent_id = event.get("agentId", MAIN)
    if kind == "user_prompt" and session.turn == "working":
        prompt_id = text_of(event["data"].get("prompt_id"))
        kind = "queued_prompt" if prompt_id and prompt_id == session.prompt_id else kind
    if kind == "pre_compact" and event["data"].get("trigger") == "manual" and _client_status(session)[0]:
        kind = "message"  # the client reports whether it has anything to compact
    if kind == "turn_end" and event["data"].get("mayBeSubagent"):
        runs_agent = any(call.tool_name in AGENT_TOOLS for call in session.open_calls.values())
        kind = "message" if runs_agent else kind  # the end of its turn, which names no agent
    is_queued = kind == "prompt_blocked" and _client_status(session)[0] != "idle"  # it was, in a turn
    kind = "message" if is_queued else kind
    rule = _NOTHING if _is_second_process(session, event, kind, at, late) else RULES.get(kind, _NOTHING)
    is_shared = rule.waits in ("agent", "all") and not agent_id and _goes_on_elsewhere(session, event)
    rule = Rule(rule.turn.replace("idle", ""), "", "input") if is_shared else rule  # the rest is not its own
    until, silence_ms = at if late else _NEVER, at - session.last_event
    is_stale = late and kind != "replaced" and at < session.last_step.get(agent_id, 0)
    session.last_event = session.clock = max(session.last_event, at) if late else at
    session.last_timestamp = session.last_timestamp if late else event["timestamp"]
    if not is_stale:
        if rule.turn or kind in ("round_end", "subagent_stop"):
            session.last_step[agent_id] = at
        if session.end_presumed:
            session.turn, session.end, session.end_reason, session.end_presumed = "idle", None, "", False
    _apply_metadata(session, event, kind, at)
    if agent_id or kind == "tool_result":
        _apply_agent(session, event, kind, at, until)
    is_progress = rule.ends == "call" and not facts
    for fact in facts:
        is_progress = _apply_call(session, fact, at, late) and fact.outcome is not Outcome.OPEN
    if rule.ends and not facts:
        _apply_ends(session, event, rule.ends, at, until)
    if session.waits:
        over = "" if is_stale else "agent" if is_progress and rule.waits == "input" else rule.waits
        _end_waits(session, event, kind, at, over)
    # A late event may bring the reason of a known end, or the error that caused it.
    is_cause = kind == "turn_error" and session.turn in ("idle", "ended")
    explains_end = is_cause and session.turn_since - at < REORDER_WINDOW_MS
    explains_end = explains_end or (kind == "session_end" and session.end_reason == "replaced")
    if rule.turn and not agent_id and (explains_end or not is_stale):
        _apply_turn(session, event, kind, at, late)
    ends_one = kind in ("client_exited", "session_end")  # of several processes
    shows = kind == "client_status" or (ends_one and _client_status(session)[0] not in ("", "waiting"))
    if shows and session.turn != "ended":
        _apply_client_status(session, event, at, until, silence_ms, is_stale)
    if kind in _ASKING_KINDS or (kind == "tool_call" and event["data"].get("toolName") in QUESTION_TOOLS):
        _begin_wait(session, event, kind, at, until, is_stale)
    state = _state_of(session)
    if state != session.state or (silence_ms >= quiet_ms and state == "working"):
        session.state, session.state_since = state, at


def _state_of(session: Session) -> str:
    if session.turn == "ended":  # by SessionEnd, exit of its process or silence of its machine
        return "failed" if session.unseen_failure else "ended"
    if session.waits:  # one of its agents waits for a person
        return "waiting"
    if session.turn == "failed":  # the last turn ended with an error
        return "failed"
    has_agents = any(agent.end is None for agent in session.agents.values())  # they outlive the turn
    return "working" if has_agents or session.turn == "working" or session.background else "idle"


def process_of(event: JsonObject) -> tuple[int, int] | None:
    """Return (pid, namespace) of the client's process that sent an event; None: not known."""
    return (event["pid"], event.get("pidNamespace", 0)) if "pid" in event else None


def _is_second_process(session: Session, event: JsonObject, kind: str, at: int, late: bool) -> bool:
    """Record the processes of a session; return True if the event starts or ends it in one of several."""
    process, last = process_of(event), next(reversed(session.processes), None)
    if process is None or (process == last and RULES.get(kind, _NOTHING).ends != "all"):
        return False
    if kind in ("replaced", "client_exited") and session.turn == "ended":
        return True
    others = {other: alive_at for other, alive_at in session.processes.items() if other != process}
    if kind in ("session_end", "replaced", "client_exited"):
        session.processes = others or {process: session.processes.get(process, 0)}
        return bool(others)
    if late and session.processes:
        return False
    if kind == "session_start":  # processes not seen alive recently may have been killed
        is_open, since = session.turn != "ended", at - REORDER_WINDOW_MS
        others = {other: alive_at for other, alive_at in others.items() if is_open and alive_at > since}
    session.processes = {**dict(list(others.items())[-7:]), process: session.processes.get(process, 0)}
    return kind == "session_start" and bool(others)


def _apply_metadata(session: Session, event: JsonObject, kind: str, at: int) -> None:
    data, parent_id, by_main = event["data"], event.get("parentSessionId"), "agentId" not in event
    session.agent = event.get("agent", session.agent)
    session.counts["events"] += kind != "replaced" and event["eventType"] != "client_status"  # no hook's
    session.has_hooks = session.has_hooks or event["hookType"] != ""
    session.demo = session.demo or event.get("demo") is True
    session.imported = session.imported or event.get("imported") is True
    session.start = min(session.start, at)
    if not session.directory or (by_main and kind in ("session_start", "compaction")):
        session.directory = event["workingDirectory"] or session.directory
    if not session.parent_by_user and parent_id not in (None, session.session_id):
        session.parent_id = session.parent_id or parent_id
    if isinstance(data.get("session_title"), str) and data["session_title"].strip():
        session.title = one_line(data["session_title"])
    model = data.get("to_model") if event["hookType"] == "PostModelSwitch" else data.get("model")
    if by_main and isinstance(model, str) and model:
        session.model = one_line(model)
    if "usage" in data:
        _apply_usage(session, data["usage"], at)
    if by_main and isinstance(data.get("git"), dict):
        place = map(data["git"].get, ("branch", "root", "project"))
        session.branch, session.root, session.project = (one_line(text_of(it), 4096) for it in place)
    if by_main and isinstance(data.get("effort"), dict):
        session.effort = one_line(text_of(data["effort"].get("level")), 20) or session.effort
    if kind in ("user_prompt", "queued_prompt", "task_notification"):
        session.prompt_id, is_typed = text_of(data.get("prompt_id")), kind != "task_notification"
        session.counts["prompts"] += is_typed
        session.queued = (session.queued + is_typed) * (session.turn == "working")
        if is_typed and not session.first_prompt:
            session.first_prompt = one_line(_CLIENT_TAGS.sub("", text_of(data.get("message"))[:2000]), 80)
    elif kind == "session_start":
        session.start_source, session.source_time = text_of(data.get("source")), at
        session.terminal = object_of(data.get("terminal"))
    elif text_of(data.get("notificationType")).startswith("quota_auto_resume"):
        session.wakeup = one_line(text_of(data.get("message")))  # it goes on by itself, or no longer
    elif kind == "client_status":
        if data.get("nameSource") == "user" and isinstance(data.get("name"), str):
            session.client_name = one_line(data["name"])
        if not session.has_hooks and "previous" not in data:
            session.source_time = at


# Tokens and cost

MODELS_LIMIT = 50  # of one session; more, from a foreign event, are ignored
AGENTS_LIMIT = 5000
CALLS_LIMIT = 5000  # of one session; the oldest open one counts as interrupted
WAITS_LIMIT = 100  # of a session; each event goes through them, and each update contains them


def _apply_usage(session: Session, usage: Any, time_ms: int) -> None:
    """Apply the totals from the transcripts, the newest; other programs' `usage` has another form."""
    models, agents, model, context = map(object_of(usage).get, ("models", "agents", "model", "context"))
    if not isinstance(models, dict) or not isinstance(agents, dict):
        return
    used = {text_of(name): tokens_of(it) for name, it in itertools.islice(models.items(), MODELS_LIMIT)}
    context = context if type(context) is int and 0 < context <= 1e9 else None
    read = SessionUsage(time_ms, used, one_line(model) if isinstance(model, str) else None, context)
    if session.usage is None or (time_ms, read.total) >= (session.usage.time, session.usage.total):
        session.usage = read
    known = (session.gauges or _NO_GAUGES)["context"]
    is_far = abs((context or 0) - (known["used"] or 0)) * 100 > (known["size"] or 0)
    if is_far and session.gauges_time < session.source_time < time_ms:
        session.gauges = None  # of the run before; a status line would have reported 1 %: this is `claude -p`
    for agent_id, by_model in itertools.islice(agents.items(), emit_event.AGENTS_IN_USAGE):
        if isinstance(by_model, dict) and len(session.agent_usage) < AGENTS_LIMIT:
            before = session.agent_usage.get(agent_id, (0, Tokens()))
            total = sum(map(tokens_of, by_model.values()), Tokens())
            session.agent_usage[agent_id] = max((time_ms, total), before)


# Gauges: figures of the status line. Any program can send them, so each is checked.

Limit = tuple[str, float, int]  # (name of a window, used percent, time of its reset)
# Name in JSON → (the client's name, its length)
LIMIT_WINDOWS = {"fiveHour": ("five_hour", 5 * 3_600_000), "sevenDay": ("seven_day", 7 * 86_400_000)}


def gauges_of(given: Any, time_ms: int) -> tuple[JsonObject, list[Limit]]:
    """Return the plausible figures in the objects of a status line: those of the session, and its limits."""

    def figure(path: str, limit: float, unit: int = 0) -> Any:  # with a unit: as a whole number of these
        value = given
        for name in path.split("."):
            value = object_of(value).get(name)
        if type(value) not in emit_event.NUMBERS or not 0 <= value <= limit:
            return None
        return int(value * unit) if unit else min(value, 100) if name == "used_percentage" else value

    limits = []
    for window, (name, length_ms) in LIMIT_WINDOWS.items():
        used = figure(f"rate_limits.{name}.used_percentage", 200)  # it may be exceeded by a little
        resets_at = figure(f"rate_limits.{name}.resets_at", 1e11, 1000) or 0
        if used is not None and time_ms < resets_at <= time_ms + length_ms + RESET_TOLERANCE_MS:
            limits.append((window, used, resets_at))
    gauges = {
        "context": {
            "percent": figure("context_window.used_percentage", 200),
            "used": figure("context_window.total_input_tokens", 1e9, 1),
            "size": figure("context_window.context_window_size", 1e9, 1) or None,
        },
        "costUsd": figure("cost.total_cost_usd", 1e6),
        "linesAdded": figure("cost.total_lines_added", 1e9, 1),
        "linesRemoved": figure("cost.total_lines_removed", 1e9, 1),
        "cacheExpiresAt": figure("prompt_cache.expires_at", 1e11, 1000) or None,
    }
    return gauges, limits


def _apply_gauges(session: Session, data: JsonObject, at: int) -> list[Limit]:
    """Apply the data of a status line, unless it is older than the last one; return its limits."""
    if at < session.gauges_time:
        return []
    session.gauges_time, (session.gauges, limits) = at, gauges_of(data.get("gauges"), at)
    level, model = object_of(data.get("effort")).get("level"), data.get("model")
    session.effort = one_line(level, 20) if isinstance(level, str) else session.effort
    session.model = one_line(model) if isinstance(model, str) and model else session.model
    return limits


def _apply_limits(account: Account, session: Session, limits: list[Limit], at: int) -> None:
    cost: float | None = (session.gauges or _NO_GAUGES)["costUsd"]
    for name, percent, resets_at in limits:
        window = account.windows.get(name)
        if window is None or resets_at > window.resets_at + RESET_TOLERANCE_MS:
            costs = {it: (now, now) for it, (_, now) in window.costs.items()} if window else {}
            window = account.windows[name] = LimitWindow(resets_at, [], costs)
        elif resets_at < window.resets_at - RESET_TOLERANCE_MS:
            continue  # a late report, of the window before
        if not window.samples or percent > window.samples[-1][1]:  # an idle client reports an old one
            window.samples.append((at, percent))
            while len(window.samples) > 2 and window.samples[1][0] <= at - PACE_MS:
                del window.samples[0]
        if cost is not None:
            is_inside = session.start >= window.resets_at - LIMIT_WINDOWS[name][1]
            first, last = window.costs.get(session.session_id, (0.0 if is_inside else cost, cost))
            window.costs[session.session_id] = first, max(cost, last)
            _drop_oldest(window.costs, 500)


def _window_json(name: str, window: LimitWindow, time_ms: int) -> JsonObject:
    """Return a window; `forecast`: when it is full at the last hour's pace; `shares`: percent by cost."""
    (at, percent), begun = window.samples[-1], window.resets_at - LIMIT_WINDOWS[name][1]
    since = max(begun, at - PACE_MS)
    grown, took_ms = percent - (0.0 if since == begun else window.samples[0][1]), at - since
    full_at = round(at + (100 - percent) * took_ms / grown) if grown > 0 and took_ms > 0 else None
    if full_at and percent < 100 and (full_at <= time_ms or time_ms - at > PACE_MS):
        full_at = None  # nothing has grown since
    spent = {session_id: now - first for session_id, (first, now) in window.costs.items() if now > first}
    unit = percent / sum(spent.values()) if spent else 0
    shares = [{"sessionId": it, "percent": round(spent[it] * unit, 1)} for it in spent]
    return {
        "percent": percent,
        "resetsAt": window.resets_at,
        "forecast": full_at if full_at and full_at < window.resets_at else None,
        "shares": heapq.nlargest(SENT_OF_EACH, shares, key=operator.itemgetter("percent")),
    }


def tokens_of(counts: Any) -> Tokens:
    """Return the `counts` of a usage; other names, such as over100k in stored events, are ignored."""
    values = map(object_of(counts).get, emit_event.COUNT_NAMES)
    return Tokens(*(value if type(value) is int and 0 <= value < 1 << 53 else 0 for value in values))


class Price(NamedTuple):
    """USD per million tokens."""

    input: float
    output: float
    cache_read: float
    cache_write_5m: float
    cache_write_1h: float

    @classmethod
    def of(cls, input: float, **given: float) -> Price:
        """Return a price by its names in the configuration; missing ones follow from the usual factors."""
        factors = {"output": 5.0, "cacheRead": 0.1, "cacheWrite5m": 1.25, "cacheWrite1h": 2.0}
        return cls(input, *(given.get(name, input * factor) for name, factor in factors.items()))

    def cost(self, used: Tokens) -> float:
        """Return the cost of tokens in USD."""
        counts = (used.input, used.output, used.cache_read, used.cache_creation - used.cache_creation_1h)
        return sum(count * usd for count, usd in zip((*counts, used.cache_creation_1h), self)) / 1_000_000


# List prices of https://platform.claude.com/docs/en/about-claude/pricing, as of 2026-10-24. Fast mode, web
# searches, batches and regions are ignored, so costs are estimates. The configured `prices` override them.
_PRICED = (
    (Price.of(8, cacheRead=0.2), "fable-5-2", "mythos-5-2"),
    (Price.of(10, cacheRead=0.25), "fable-5-1", "mythos-5-1"),
    (Price.of(10), "fable-5", "mythos-5"),
    (Price.of(4, cacheRead=0.2), "opus-5-5"),
    (Price.of(5), "opus-5", "opus-4-8", "opus-4-7", "opus-4-6", "opus-4-5"),
    (Price.of(15), "opus-4-1", "opus-4", "opus-3"),
    (Price.of(2, cacheRead=0.1), "sonnet-5-5"),
    (Price.of(2), "sonnet-5"),
    (Price.of(3), "sonnet-4-6", "sonnet-4-5", "sonnet-4", "sonnet-3-7", "sonnet-3-5", "sonnet-3"),
    (Price.of(0.1), "haiku-5-5"),
    (Price.of(1), "haiku-4-5"),
    (Price.of(0.8), "haiku-3-5"),
    (Price.of(0.25, cacheRead=0.03, cacheWrite5m=0.3), "haiku-3"),
)
PRICES: dict[str, Price] = {family: price for price, *families in _PRICED for family in families}
# An alias ("opus", "claude-sonnet-latest") has the price of the newest of its kind, the first one above.
PRICES.update({family.partition("-")[0]: PRICES[family] for family in reversed(list(PRICES))})

_NO_GAUGES = gauges_of(None, 0)[0]
# Families with a context of 200,000 tokens, in Claude Code 2.1.332; newer ones have 1,000,000.
_SMALL_CONTEXT = re.compile(r"(?:opus|sonnet|haiku)-[34](?:-[0-6])?")
# claude-opus-4-5-20251101, claude-3-5-haiku-20241022
_MODEL_KIND = r"(?P<kind>opus|sonnet|haiku|fable|mythos)"
_NEW_MODEL = re.compile(_MODEL_KIND + r"-(?P<major>\d{1,2})(?:[-.](?P<minor>\d{1,2}))?(?!\d)")
_OLD_MODEL = re.compile(r"claude-(?P<major>\d)(?:[-.](?P<minor>\d))?-" + _MODEL_KIND)
_ALIAS = re.compile(r"(?:.*\bclaude-)?" + _MODEL_KIND + r"(?:-latest)?(?:\[\w+\])?")


def model_family(model: str) -> str:
    """Return the family of a model, such as "opus-4-5" (any cloud's name), an alias's kind, else ""."""
    if (found := _OLD_MODEL.search(model) or _NEW_MODEL.search(model)) is None:
        alias = _ALIAS.fullmatch(model)
        return alias["kind"] if alias else ""
    kind, major, minor = found.group("kind", "major", "minor")
    return f"{kind}-{major}" if minor in (None, "0") else f"{kind}-{major}-{minor}"


def _estimated_context(session: Session, usage: SessionUsage) -> JsonObject | None:
    """Return the context of a session without a status line, as far as its transcript gives it."""
    used, model = usage.context, session.model or usage.model or ""
    if not used:
        return None
    family = model_family(model)
    is_small = _SMALL_CONTEXT.fullmatch(family) and "[1m]" not in model and used <= 200_000
    size = 200_000 if is_small else 1_000_000 if family else None
    percent = min(100, round(100 * used / size)) if size else None
    return {"percent": percent, "used": used, "size": size, "estimated": True}


def estimated_usd(usage: SessionUsage, configured: Mapping[str, Price]) -> float | None:
    """Return the cost of a session in USD; None if a model is not known, as a part would mislead.

    `configured` prices are those of a model, a family ("opus-4-5") or a kind; they come before PRICES.
    """
    cost = 0.0
    for model, used in usage.models.items():
        family = model_family(model)
        own = map(configured.get, (model, family, family.partition("-")[0]))
        price = next(filter(None, own), PRICES.get(family))
        if price is None and any(used):
            return None
        cost += price.cost(used) if price else 0.0
    return round(cost, 6)


def _apply_agent(session: Session, event: JsonObject, kind: str, at: int, until: int) -> None:
    """Update the subagent that sent an event; a stop without a start creates none."""
    if kind == "tool_result" and event["data"].get("toolName") in AGENT_TOOLS:
        _apply_launch(session, event, at, until)
    agent_id = event.get("agentId", MAIN)
    agent, is_start = session.agents.get(agent_id), kind == "subagent_start"
    if not agent_id or (agent is None and kind == "subagent_stop"):
        return
    if agent is None:
        agent = session.agents[agent_id] = Agent(agent_id, "", at)
        _drop_oldest(session.agents, AGENTS_LIMIT)
        launches = [call for call in session.open_calls.values() if call.tool_name in AGENT_TOOLS]
        if agent_id in session.launched:
            agent.label, agent.parent_id, agent.background = session.launched[agent_id]
        elif len(launches) == 1 and launches[0].agent_id != agent_id:
            agent.label, agent.parent_id = launches[0].description, launches[0].agent_id
        if session.turn == "ended" or (until == at and at < session.last_step.get(agent_id, 0)):
            agent.end = at  # its first event arrived after its end
    elif agent.end is not None and session.turn != "ended" and (is_start or RULES.get(kind, _NOTHING).turn):
        agent.end = agent.end if until < agent.end or at == agent.end else None  # it may be resumed
    agent.counts["events"] += 1
    agent.agent_type, note = event.get("agentType") or agent.agent_type, event["data"].get("agentMeta")
    if isinstance(note, dict):  # the client's metadata, the only reliable source on nested agents
        parent_id, agent.has_metadata = note.get("parentAgentId"), True
        agent.parent_id = parent_id if isinstance(parent_id, str) and parent_id != agent_id else MAIN
        agent.background = agent.background or note.get("requestShape") == "background"
        agent.label = one_line(text_of(event["data"].get("agentDescription"))) or agent.label


def _apply_launch(session: Session, event: JsonObject, at: int, until: int) -> None:
    """Apply an agent's label, parent and kind from the result of the call that launched it."""
    output, parent_id = event["data"].get("toolOutput"), event.get("agentId", MAIN)
    agent_id = output.get("agentId") if isinstance(output, dict) else None
    if not isinstance(agent_id, str) or agent_id == parent_id:
        return
    label = _description(event["data"].get("toolInput"))
    background = output.get("status") in ("async_launched", "teammate_spawned")
    session.launched[agent_id] = (label, parent_id, background)
    if (agent := session.agents.get(agent_id)) is None:
        return
    if not agent.has_metadata:
        agent.label, agent.parent_id = label or agent.label, parent_id
    agent.background = background
    if output.get("status") == "completed":
        _end_agents(session, lambda lineage: agent in lineage, at, until)


def _description(tool_input: Any) -> str:
    about = object_of(tool_input)
    return one_line(text_of(about.get("description") or about.get("message")))


def _lineage(session: Session, agent: Agent) -> list[Agent]:
    """Return an agent and its ancestors, the nearest first."""
    lineage = [agent]
    while lineage[-1].parent_id in session.agents and session.agents[lineage[-1].parent_id] not in lineage:
        lineage.append(session.agents[lineage[-1].parent_id])
    return lineage


def _apply_ends(session: Session, event: JsonObject, ends: str, at: int, until: int) -> None:
    """End the agents and calls that an event ends, except those that began after `until`."""
    agent_id = event.get("agentId", MAIN)
    ended_id = task_notification(event) if ends == "task" else agent_id
    # At the end of a turn, the client's list of tasks is complete.
    has_list = ends == "turn" and isinstance(event["data"].get("background_tasks"), list)
    tasks, teammates = _running_tasks(event)
    going = {text_of(it.get("id")) for it in tasks} | {text_of(it.get("description")) for it in teammates}
    if ends == "task":  # a command's is known by its label only
        text = text_of(event["data"].get("message"))
        session.background = [it for it in session.background if f'"{it}"' not in text]

    def is_over(lineage: list[Agent]) -> bool:
        if ends in ("agent", "task"):
            outlives = lineage[0].agent_id != ended_id and lineage[0].agent_id in going
            return not outlives and any(agent.agent_id == ended_id for agent in lineage)
        continues = not has_list or any({it.agent_id, it.label or it.agent_id} & going for it in lineage)
        return ends == "all" or not continues or not any(agent.background for agent in lineage)

    if ends in ("foreground", "turn", "all"):
        _interrupt(session, None if ends == "all" else {agent_id if ends == "turn" else MAIN}, until)
    if ends != "call" and not (ends == "turn" and agent_id):
        _end_agents(session, is_over, at, until)
    if ends == "turn" and not agent_id and all(agent.end is not None for agent in session.agents.values()):
        session.launched = {}
        _drop_oldest(session.closed_calls, 8)  # whose end, or that of their round, may be late


def _end_agents(session: Session, is_over: Callable[[list[Agent]], bool], at: int, until: int) -> None:
    """End the agents for whose lineage `is_over` is true, with their waits; interrupt their calls."""
    busy = {call.agent_id for call in session.open_calls.values()} | {it.agent_id for it in session.waits}
    ending = set()
    for agent_id, agent in session.agents.items():
        is_left = (agent.end is None or agent_id in busy) and agent.start <= until
        if is_left and is_over(_lineage(session, agent)):
            ending.add(agent_id)
            agent.end = at if agent.end is None else agent.end
    if ending:
        session.streaks = {key: streak for key, streak in session.streaks.items() if key[0] not in ending}
        session.waits = [wait for wait in session.waits if wait.agent_id not in ending]
        _interrupt(session, ending, until)


def _interrupt(session: Session, agent_ids: set[str] | None, until: int) -> None:
    """Close the open calls of some agents (None: of all) as interrupted."""
    for call in list(session.open_calls.values()):
        if call.since <= until and (agent_ids is None or call.agent_id in agent_ids):
            del session.open_calls[call.tool_use_id]
            session.closed_calls[call.tool_use_id] = 0
            session.counts["interrupted"] += 1


def _running_tasks(event: JsonObject) -> tuple[list[JsonObject], list[JsonObject]]:
    """Return the running tasks, and the teammates, which are always `running` and have ids of their own."""
    tasks = emit_event.objects_in(event["data"].get("background_tasks"))
    running = [task for task in tasks if task.get("status") == "running"]
    mates = [task for task in running if task.get("type") == "teammate"]
    return [task for task in running if task not in mates], mates


def _apply_call(session: Session, fact: CallFact, at: int, late: bool) -> bool:
    """Open or close a call, of which the highest outcome counts; return True if it is new."""
    agent = session.agents.get(fact.agent_id)
    own_counts = (session.counts, agent.counts) if agent else (session.counts,)
    before = session.closed_calls.get(fact.use_id)  # None: not closed
    is_new = before is None and fact.use_id not in session.open_calls
    if is_new:
        session.turn_calls += fact.agent_id == MAIN
        for counts in own_counts:
            counts["toolCalls"] += 1
    if fact.outcome > (before or Outcome.OPEN):
        is_interrupted = fact.outcome is Outcome.INTERRUPTED
        session.counts["interrupted"] += is_interrupted - (before == Outcome.OPEN)  # its end arrived late
        session.open_calls.pop(fact.use_id, None)
        session.closed_calls[fact.use_id] = int(fact.outcome)
        for counts in own_counts:
            counts["toolErrors"] += (fact.outcome in FAILED) - (before in FAILED)
        if not is_interrupted:
            _apply_outcome(session, fact, at)
    elif is_new and _already_ended(session, fact.agent_id, at, late):
        session.closed_calls[fact.use_id] = 0
        session.counts["interrupted"] += 1
    elif is_new:
        target = tool_target(fact.tool_input, session.directory)
        label = _description(fact.tool_input) if fact.tool in AGENT_TOOLS else ""
        digest = zlib.crc32(encode_json(fact.tool_input))
        call = OpenCall(fact.use_id, fact.tool, target, fact.agent_id, at, label, digest)
        session.open_calls[fact.use_id] = call
    for dropped in _drop_oldest(session.open_calls, CALLS_LIMIT):
        session.closed_calls[dropped] = 0
        session.counts["interrupted"] += 1
    _drop_oldest(session.closed_calls, CALLS_LIMIT)
    return is_new


def _already_ended(session: Session, agent_id: str, at: int, late: bool) -> bool:
    """True if the agent, its turn or the session is known to have ended after this time."""
    if session.turn == "ended":
        return agent_id != MAIN or _has_just_ended(session, at, late)
    if agent_id == MAIN:
        return late and at < (session.turn_start if session.turn == "working" else session.turn_since)
    agent = session.agents.get(agent_id)
    return agent is not None and agent.end is not None and (late or at == agent.end) and at <= agent.end


_EDITING_TOOLS = ("Edit", "MultiEdit", "NotebookEdit", "Write")
# A shell command that probably writes files.
_EDITING_COMMAND = re.compile(
    r"(?<![<>&\d=-])>>?(?!\s*(?:/dev/|[&>]))|\bsed\s+-\w*i"
    r"|(?:^|[;&|(]\s*|\bsudo\s+)(?:apply_patch|tee|mv|cp|rm|mkdir|touch|patch|ln|install|unzip|tar\s+-?x)\s"
    r"|\bgit\s+(?:apply|am|add|commit|checkout|switch|merge|rebase|cherry-pick|restore|revert|reset|stash|mv|rm|pull|clone)\b"
)
# Tools of MCP servers and of other agents, such as Codex's apply_patch.
_EDITING_NAME = re.compile(
    r"(?!.*(?:plan|todo)).*(?:write|edit|create|update|insert|replace|delete|move|rename|apply|patch)", re.I
)
COLLISION_MS = 600_000  # two sessions that edit a file within this time collide


def edited_files(event: JsonObject) -> set[str]:
    """Return the absolute paths of the files that a successful call has changed, as its tool says."""
    tool, given = event["data"].get("toolName"), event["data"].get("toolInput")
    if tool not in (*_EDITING_TOOLS, "apply_patch", "Bash") or not isinstance(given, dict):
        return set()
    paths = [given.get("file_path"), given.get("notebook_path")]
    if tool == "apply_patch":
        paths = [it for text in given.values() if isinstance(text, str) for it in _PATCHED_FILE.findall(text)]
    elif tool == "Bash":  # clients since 2.1.300 report what a command has changed
        files = object_of(object_of(event["data"].get("toolOutput")).get("bashEditDiff")).get("changedFiles")
        paths = files if isinstance(files, list) else []
    named = (path for path in paths if isinstance(path, str) and 0 < len(path) <= 4096)
    places = (os.path.normpath(os.path.join(event["workingDirectory"], path)) for path in named)
    return {place for place in places if place.startswith("/")}  # else nothing says where it is


def _apply_outcome(session: Session, fact: CallFact, at: int) -> None:
    """Count a tool's failures in a row with the same error; record whether a success changed files."""
    key = (fact.agent_id, fact.tool)
    error, times, since = session.streaks.pop(key, ("", 0, at))
    if fact.outcome is not Outcome.OK:
        new_error = one_line(text_of(fact.error))
        session.streaks[key] = (new_error, times + 1, since) if new_error == error else (new_error, 1, at)
        _drop_oldest(session.streaks, 64)
        return
    is_foreign = fact.tool.startswith("mcp__") or fact.tool.islower()
    named = _EDITING_NAME.match(fact.tool.rpartition("__")[2]) if is_foreign else fact.tool in _EDITING_TOOLS
    if named or _EDITING_COMMAND.search(text_of(object_of(fact.tool_input).get("command"))[:10_000]):
        session.turn_changed, session.unchanged_turns = True, 0


def _busy_since(session: Session) -> int:
    """Return since when a turn or an agent has been running, _NEVER if there is none."""
    if session.state not in ("working", "quiet", "waiting"):
        return _NEVER
    starts = [session.turn_start] if session.turn == "working" else []
    return min(starts + [it.start for it in session.agents.values() if it.end is None], default=_NEVER)


def stuck_signals(session: Session) -> list[JsonObject]:
    """Return the signs that a session may be stuck."""
    if session.state == "ended":
        return []
    signals = [
        ("failing", since, f"{tool} failed {times} times the same way: {error}")
        for (_, tool), (error, times, since) in session.streaks.items()
        if times >= STUCK_FAILURES
    ]
    if session.unchanged_turns >= STUCK_TURNS:
        turns = f"{session.unchanged_turns} turns without a change in files"
        signals.append(("unchanged", session.unchanged_since, turns))
    since = _busy_since(session)
    if session.clock - since >= STUCK_MS and session.state != "waiting":
        signals.append(("long", since, f"busy for more than {STUCK_MS // 3_600_000} hours"))
    return [{"kind": kind, "since": since, "detail": detail} for kind, since, detail in signals]


# Waits: each belongs to one agent, and to the call that waits, if there is one; it ends with that call.

_ASKING_KINDS = frozenset(("permission_request", "elicitation", "notification"))
# What a notification asks a person for, by its type, or by its text where old clients give no type.
_NOTICE_KINDS = {
    "permission_prompt": "permission", "worker_permission_prompt": "permission", "idle_prompt": "input",
    "prompt_shown": "prompt",  # at once after every turn: nothing waits
    "elicitation_dialog": "question", "elicitation_url_dialog": "question", "agent_needs_input": "dialog",
}  # fmt: skip
_NOTICE_TEXTS = {"needs your permission": "permission", "waiting for your input": "input"}


def _end_waits(session: Session, event: JsonObject, kind: str, at: int, over: str) -> None:
    """End the waits that an event ends; one without a call is tied to its call when that begins."""
    kept, data, is_only = [], event["data"], not _goes_on_elsewhere(session, event)
    use_id = text_of(data.get("toolUseId")) or UNNAMED + event["id"]
    begun = session.open_calls.get(use_id) if kind == "tool_call" else None
    server = text_of(data.get("mcp_server_name"))
    is_shown = over != "all" and _client_status(session)[0] == "waiting"
    for wait in session.waits:
        is_own = wait.agent_id == event.get("agentId", MAIN)
        if is_shown and wait.by_client:  # its call is only guessed: the client says when it is over
            kept.append(wait)
            continue
        may_end = is_own and over != ""
        is_answer = kind == "elicitation_result" and wait.kind == "question"
        names_it = data.get("toolUseId", wait.tool_use_id) == wait.tool_use_id
        if (
            over == "all"
            or (wait.tool_use_id is not None and wait.tool_use_id not in session.open_calls)
            or (may_end and (over == "agent" or wait.kind == "input"))
            # Calls of one round begin together, so only a later call proves that this one was decided.
            or (may_end and kind == "tool_call" and is_only and abs(at - wait.since) > REORDER_WINDOW_MS)
            or (may_end and kind == "permission_result" and names_it)
            or (may_end and is_answer and (not server or wait.tool in (None, server)))
            or (kind == "answer" and data.get("outcome") == "delivered" and wait.event_id == data.get("to"))
        ):
            continue
        asked = session.open_calls.get(wait.tool_use_id or "")
        is_open = asked is None or asked.agent_id != wait.agent_id  # the request overtook its call
        if is_own and begun and is_open and (begun.tool_name, begun.target) == wait[1:3]:
            if data.get("isPermitted"):
                continue
            wait = wait._replace(tool_use_id=begun.tool_use_id)
        kept.append(wait)
    session.waits = kept


def precedes_dialog(event: JsonObject) -> bool:
    """True if the hook of an event waits for an answer, and the client's dialog comes only afterwards."""
    is_held = event["hookType"] == "Elicitation" or "agentId" in event or "agent" in event
    return "answerable" in event and is_held


def _begin_wait(session: Session, event: JsonObject, kind: str, at: int, until: int, is_stale: bool) -> None:
    """Add the wait for a person that an event begins; a request for an open call may be late."""
    wait = _wait_of(session, event, kind, at, until)
    if wait is None or session.turn == "ended" or (is_stale and kind == "notification"):
        return
    if wait.tool_use_id is None and (is_stale or kind == "tool_call"):
        return  # its call has ended
    if kind != "notification":
        held_until = at + event["answerable"] * 1000 if precedes_dialog(event) else 0
        wait = wait._replace(event_id=event["id"], held_until=held_until)
    if wait.kind in ("input", "prompt"):
        if _goes_on_elsewhere(session, event):
            return
        # The client shows its prompt: Esc or a rejection, which fire no hook, ended the turn.
        _apply_ends(session, event, "foreground", at, until)
        session.waits = [other for other in session.waits if other.agent_id != MAIN]
        session.turn = "idle" if session.turn == "working" else session.turn
        if wait.kind == "prompt":
            return
    elif kind == "notification" and any(not (it.kind == "input" or it.by_client) for it in session.waits):
        return  # it repeats the request, without its agent
    for number, other in enumerate(session.waits):
        is_same = other[:3] == wait[:3] and other.agent_id == wait.agent_id and not other.tool_use_id
        if other.tool_use_id == wait.tool_use_id if wait.tool_use_id else is_same:
            # The call of a question and its request are one wait, which the request can answer.
            if kind == "permission_request":
                session.waits[number] = wait._replace(since=other.since, agent_id=other.agent_id)
            return
    if kind == "notification":
        kept = [it for it in session.waits if not it.by_client]
    else:  # a request says more than the client's status, or a notification that overtook it
        kept = [it for it in session.waits if it.event_id or it.kind == "input"]
    began = [it.since for it in session.waits if it.by_client and it not in kept]
    is_shown = kind == "notification" and bool(began)
    session.waits = [*kept, wait._replace(since=min([wait.since, *began]), by_client=is_shown)][-WAITS_LIMIT:]


# The client's own status, from its registry: it also shows what a person did at the terminal, unlike hooks.

_CLIENT_STATUSES = ("waiting", "busy", "shell", "idle")  # of several processes of a session the first counts
_DIALOGS = {"permission prompt": "permission", "sandbox request": "permission", "input needed": "question"}


def _client_status(session: Session, besides: tuple[int, int] | None = None) -> tuple[str, str]:
    """Return the status that counts, `besides` that of a process: (status, waitingFor); ("", ""): unknown."""
    reported = [session.client_status.get(it, ("", "")) for it in session.processes if it != besides]
    ranks = {status: rank for rank, status in enumerate(_CLIENT_STATUSES)}
    return min((it for it in reported if it[0] in ranks), key=lambda it: ranks[it[0]], default=("", ""))


def _goes_on_elsewhere(session: Session, event: JsonObject) -> bool:
    """True if another process of the session works or asks, e.g. after `--resume` in a second terminal."""
    is_known = "pid" in event or len(session.processes) > 1  # a transcript names none
    return is_known and _client_status(session, process_of(event))[0] in ("waiting", "busy")


def _apply_client_status(
    session: Session, event: JsonObject, at: int, until: int, silence_ms: int, is_stale: bool
) -> None:
    """Apply a status of the client if it changed or the hooks are silent; a stale one is only recorded."""
    before, before_for = _client_status(session)
    reported = (text_of(event["data"].get("status")), text_of(event["data"].get("waitingFor")))
    known = session.client_status
    session.client_status = {it: known[it] for it in session.processes if it in known}
    session.client_status[process_of(event)] = reported
    status, waits_for = _client_status(session)
    is_change = (before != "" or status == "shell") and (status, waits_for) != (before, before_for)
    has_ended = kind_of(event) != "client_status"
    if status == before and (has_ended or event["data"].get("previous") == ""):  # one between was too short
        is_change = status != "waiting"
    if before == "waiting" != status:
        session.waits = [it for it in session.waits if not it.by_client or it.since > at]
    if is_stale or not (is_change or silence_ms >= 5000 or not session.has_hooks):
        return
    if before == "waiting" or status != "waiting":
        kept = ("input",) if status == "idle" else (_DIALOGS.get(waits_for),) if status == "waiting" else ()
        session.waits = [it for it in session.waits if max(it.since, it.held_until) > at or it.kind in kept]
    if status == "waiting":  # a dialog is open
        session.waits = [it if it.since > at else it._replace(held_until=0) for it in session.waits]
    if status in ("idle", "shell") and session.turn == "working":  # Esc, "No", or the end of a `!` command
        _apply_ends(session, event, "foreground", at, until)
        session.turn, session.turn_since = "idle", at
        session.last_step[MAIN] = at
    if status == "shell":
        session.background = session.background or ["a command"]
    elif status == "idle" and before in ("shell", "waiting"):
        session.background = []
    # A `!` command, or compaction.
    if status == "busy" and before != "waiting" and session.turn in ("idle", "failed"):
        session.turn, session.turn_since, session.turn_start, session.failure = "working", at, at, None
        session.last_step[MAIN] = at
    if status == "waiting" and all(it.kind == "input" for it in session.waits):
        kind, calls = _DIALOGS.get(waits_for, "dialog"), list(session.open_calls.values())
        detail = "A dialog is open in the terminal" if waits_for in ("", "dialog open") else waits_for
        wait = _wait_of_one(kind, [] if kind == "dialog" else calls, detail, at)
        session.waits.append(wait._replace(by_client=True))


def _wait_of(session: Session, event: JsonObject, kind: str, at: int, until: int) -> Reason | None:
    """Return what an event asks a person for, and for which call; None if it asks for nothing."""
    data, agent_id = event["data"], event.get("agentId", MAIN)
    text, calls = one_line(text_of(data.get("message"))), list(session.open_calls.values())
    if kind == "elicitation":
        return Reason("question", text_of(data.get("mcp_server_name")) or None, text, at, agent_id)
    if kind != "notification":
        # A request names no call: it is tied to the first open one of the same agent, tool and input without
        # another wait. Clients before 2.1.69 send requests of subagents as the main agent.
        tool = text_of(data.get("toolName")) or None
        target = tool_target(data.get("toolInput"), session.directory)
        taken = {wait.tool_use_id for wait in session.waits}
        digest = zlib.crc32(encode_json(data.get("toolInput")))
        calls = [it for it in calls if it[1:3] == (tool, target) and it.since <= until]
        calls = [it for it in calls if agent_id in (it.agent_id, MAIN)]
        ranks = [(it.agent_id != agent_id, it.digest != digest, it.tool_use_id in taken) for it in calls]
        use_id = calls[ranks.index(min(ranks))].tool_use_id if calls else None
        about = "question" if tool in QUESTION_TOOLS else "permission"
        return Reason(about, tool, target, at, agent_id, use_id)
    given, named = data.get("notificationType"), re.search(r"permission to use (\S+)", text)
    about = _NOTICE_KINDS.get(text_of(given), "")
    if given is None:
        about = next((about for part, about in _NOTICE_TEXTS.items() if part in text), "")
    by_tool = [call for call in calls if named and call.tool_name == named.group(1)]
    calls = (by_tool or calls) if about == "permission" else []
    return _wait_of_one(about, calls, text, at) if about else None


def _wait_of_one(kind: str, calls: list[OpenCall], text: str, at: int) -> Reason:
    """Return the wait of one of these calls; `text` is in place of its name where it may be another's."""
    if not (calls := [it for it in calls if it.tool_name not in AGENT_TOOLS] or calls):
        return Reason(kind, None, text, at)
    call, is_known = sorted(calls, key=lambda it: it.agent_id == MAIN)[-1], len(calls) == 1
    tool, detail = (call.tool_name, call.target) if is_known else (None, text)
    return Reason(kind, tool, detail, at, call.agent_id, call.tool_use_id)


def _has_just_ended(session: Session, at: int, late: bool) -> bool:
    """True if the session ended within REORDER_WINDOW_MS of `at`: SessionEnd may overtake other events."""
    since_ms = at - (session.end or 0)
    return since_ms <= REORDER_WINDOW_MS and (late or since_ms >= -REORDER_WINDOW_MS)


def _apply_turn(session: Session, event: JsonObject, kind: str, at: int, late: bool) -> None:
    turn, data, failure = RULES[kind].turn, event["data"], None
    is_new = turn == "ended" or kind in ("session_start", "user_prompt")  # not about the previous turn
    if kind == "turn_error":
        text = one_line(text_of(data.get("assistantResponse")) or text_of(data.get("error_details")))
        error = one_line(text_of(data.get("error"))) or "error"
        failure = Reason("error", None, f"{error}: {text}" if text else error, at)
    if session.turn == "ended" and not is_new and _has_just_ended(session, at, late):
        if failure and late and session.end_reason == "other":  # `claude -p` may end before this hook
            session.failure, session.unseen_failure = failure, True
        return
    if kind == "turn_end" and session.turn == "failed" and at - session.turn_since < REORDER_WINDOW_MS:
        return  # clients before 2.1.78 end a failed turn like any other
    if kind == "turn_end" and data.get("stop_hook_active") and _client_status(session)[0] == "busy":
        turn = "working"  # a Stop hook blocked the last one, and perhaps this one: the status `idle` ends it
    begins = kind == "user_prompt" or (turn == "working" and session.turn != "working")
    if begins or kind in ("turn_end", "turn_error"):  # a turn that Esc ended fires no hook
        if session.turn_calls and not session.turn_changed:
            since = session.unchanged_since if session.unchanged_turns else session.turn_start or at
            session.unchanged_turns, session.unchanged_since = session.unchanged_turns + 1, since
        session.turn_calls, session.turn_changed = 0, False
        if begins:  # perhaps by a call that overtook its prompt
            since = at if kind == "user_prompt" else session.turn_since
            session.turn_start = max(since, at - REORDER_WINDOW_MS)
    if is_new:
        session.streaks = {}
    is_esc = kind == "interrupted" and _client_status(session)[0] == "shell"
    if not (is_esc or kind in ("pre_compact", "compacted")):  # a command outlives these
        session.background = []
    session.turn, session.turn_since, session.wakeup = turn, at, ""
    if turn == "ended":
        is_exit = kind == "client_exited"
        why = _EXITED if is_exit else one_line(text_of(data.get("reason"))) or "ended"
        session.unseen_failure = why == "other" and session.failure is not None  # of `claude -p`
        end_session(session, at, why, presumed=is_exit)
        return
    session.end, session.end_reason, session.failure, session.unseen_failure = None, "", failure, False
    if kind == "turn_end":
        session.background = [
            one_line(text_of(task.get("description") or task.get("command") or task.get("id")))
            for task in _running_tasks(event)[0]
        ]
        for it in emit_event.objects_in(data.get("session_crons"))[:1]:
            schedule = one_line(text_of(it.get("schedule")), 40)
            daily = re.fullmatch(r"(\d{1,2}) (\d{1,2}) \* \* \*", schedule)
            when = f"at {int(daily[2]):02}:{int(daily[1]):02}" if daily else f"by schedule {schedule}"
            session.wakeup = f"wakes up {when}"


def end_session(session: Session, time_ms: int, why: str, presumed: bool) -> None:
    """End a session and everything in it; `presumed` if there was no SessionEnd."""
    session.turn, session.end, session.end_reason, session.end_presumed = "ended", time_ms, why, presumed
    session.waits, session.background = [], []
    if session.state != _state_of(session):
        session.state, session.state_since = _state_of(session), time_ms
    _end_agents(session, lambda lineage: True, time_ms, _NEVER)
    _interrupt(session, None, _NEVER)


def machine_host(key: str) -> str:
    """Return the part of a machine's key (emit_event.machine_key) that containers share with their host."""
    return key.partition("/")[0]


class MachineClock(NamedTuple):
    """The clock of one machine."""

    skew: float | None = None  # how far its clock is behind ours, in ms; None: not known yet
    last_event: int = 0  # the time of its latest event
    seq: int = 0  # of that event


class Sessions:
    """All sessions, updated by `apply` and `tick`; `own_name`: our machine in events without a key."""

    def __init__(
        self,
        quiet_ms: int = 120_000,
        ended_ms: int = 12 * 3_600_000,
        own_machine: str = "",
        prices: Mapping[str, Price] = {},
        own_name: str = "",
    ) -> None:
        self.sessions: dict[str, Session] = {}
        self._quiet_ms, self._ended_ms = quiet_ms, ended_ms
        self._own_machine, self._own_name = own_machine, own_name
        self._prices = prices
        self._machines: dict[str, MachineClock] = {}  # by key
        self._unnamed = UnnamedCalls()
        self._accounts: list[Account] = []  # the most recently active last
        # (machine's key, file) → session id → when it edited it last, its agent, its path; newest last
        self._edits: dict[tuple[str, str], dict[str, tuple[int, str, str]]] = {}
        self._ahead_ms = math.nan  # how far our clock was ahead of the steady clock in the last tick
        self._set_at = 0  # when our clock was set last, since the start
        # (machine's key, (pid, namespace)) → the session that this process runs; a process runs one at a time
        self._running: dict[tuple[str, tuple[int, int] | None], str] = {}
        self.linked: set[str] = set()  # ids of sessions that an event of another session changed
        self.answerable: set[str] = set()  # ids of events whose hook waits for an answer
        self._due_at: dict[str, int] = {}  # session id → when `tick` checks it next; those to be checked only
        self._with_process: dict[str, None] = {}  # ids of sessions of this machine, the next to check first

    def apply(self, event: JsonObject) -> Session:
        """Apply one event once, by its `seq`; return its session, or a temporary one if it creates none."""
        session_id, kind, seq = event["sessionId"], kind_of(event), int(event.get("seq", 0))
        received, at = self._clock(event, kind, seq)
        if (session := self.sessions.get(session_id)) is None:
            session = Session(session_id, event["machineId"], event["workingDirectory"], at, at, at, received)
            session.machine_key = self._key_of(event)
            if kind in READ_KINDS or (kind == "session_end" and "agent" in event):
                return session  # Codex ends windows that never had a prompt
            self.sessions[session_id] = session
        elif 0 < seq <= session.seq or (kind == "client_exited" and session.turn == "ended"):
            return session
        elif event["eventType"] == "client_status" and self._key_of(event) != session.machine_key:
            return session  # only hooks move a session to another machine
        parent_before = session.parent_id
        # No hook reports a queued `!` or `/` command.
        if kind == "prompt_blocked" or (session.queued and event["data"].get("role") == "withdrawn"):
            session.counts["prompts"] -= session.counts["prompts"] > 0
            session.queued -= session.queued > 0
            session.first_prompt = session.first_prompt if session.counts["prompts"] else ""
        if kind in ("session_meta", *READ_KINDS):
            if kind == "session_meta":
                _apply_user_action(session, event["data"])
            elif kind == "status_line" and (limits := _apply_gauges(session, event["data"], at)):
                _apply_limits(self._account_of(session.machine_key, limits), session, limits, at)
            _apply_usage(session, event["data"].get("usage"), at)
            origin = text_of(object_of(event["data"].get("usage")).get("origin"))
            if origin in self.sessions and self.sessions[origin].forked_from != session_id != origin:
                session.forked_from = origin
        else:
            self._apply_step(session, event, kind, at, received)
            if kind == "tool_result" and "imported" not in event:
                self._find_collisions(session, event, at)
            self._end_replaced(session, event, kind, received)
            if kind in ("session_start", "session_end"):
                self._link(session, kind)
        session.seq, check_ms = seq, STILL_BUSY_MS if session.state == "idle" else self._quiet_ms
        self._schedule_check(session, session.last_event + min(check_ms, self._ended_ms))
        if session.parent_id != parent_before:
            if session_id in self.lineage(session.parent_id):
                session.parent_id = parent_before
            self.linked.update(parent for parent in (parent_before, session.parent_id) if parent)
        return session

    def _clock(self, event: JsonObject, kind: str, seq: int) -> tuple[int, int]:
        """Return when an event arrived and when it happened (not later), on our clock."""
        timestamp = event["timestamp"]
        received: int = event.get("received") or timestamp
        key = self._key_of(event)
        machine = self._machines.get(key) or MachineClock()
        difference, skew = received - timestamp, machine.skew
        is_new = kind not in ("session_meta", *READ_KINDS) and not 0 < seq <= machine.seq
        if key == self._own_machine:
            skew = 0
        elif is_new and not (event.get("spooled") or event.get("imported") or event.get("demo")):
            is_step = skew is None or not skew <= difference <= skew + 60_000
            # The recent minimum, since delays only add to it.
            skew = difference if is_step else skew + (difference - skew) / 256
        at = min(received, round(timestamp + (skew or 0)))
        if is_new:
            self._machines[key] = MachineClock(skew, max(at, machine.last_event), seq)
        return received, at

    def _key_of(self, event: JsonObject) -> str:
        name: str = event["machineId"]
        return str(event.get("machineKey") or (self._own_machine if name == self._own_name else name))

    def _account_of(self, key: str, limits: list[Limit]) -> Account:
        """Return the account of a machine: its windows are the same, or one begins after the other."""

        def is_same(account: Account) -> bool:
            known = [it for it in limits if it[0] in account.windows]
            apart = [(name, abs(at - account.windows[name].resets_at)) for name, _, at in known]
            others = [(name, ms) for name, ms in apart if ms > RESET_TOLERANCE_MS]
            are_whole = all(ms >= LIMIT_WINDOWS[name][1] - RESET_TOLERANCE_MS for name, ms in others)
            return are_whole and (len(others) < len(apart) or key in account.machines)

        account = next(filter(is_same, reversed(self._accounts)), None) or Account({}, {})
        account.machines[key] = None
        self._accounts = [*(it for it in self._accounts if it is not account), account][-32:]
        return account

    def limits(self, time_ms: int) -> list[JsonObject]:
        """Return the accounts whose windows are not over, with the keys of their machines."""
        found = []
        for account in self._accounts:
            current = {name: it for name, it in account.windows.items() if it.resets_at > time_ms}
            windows = {name: _window_json(name, it, time_ms) for name, it in current.items()}
            found += [{"machines": list(account.machines), **windows}] if windows else []
        return found

    def _find_collisions(self, session: Session, event: JsonObject, at: int) -> None:
        """Mark sessions that edited the same file, also in another worktree, a short time ago."""
        agent_id = event.get("agentId", MAIN)
        for path in edited_files(event):
            below = path.removeprefix(session.root + "/") if session.root else path
            key = session.machine_key, path if below == path else f"{session.project}/{below}"
            edits = self._edits.pop(key, {})
            edits.pop(session.session_id, None)
            for other_id, (edited_at, their_agent, their_path) in list(edits.items()):
                other = self.sessions.get(other_id)
                if other is None or abs(at - edited_at) > COLLISION_MS:
                    del edits[other_id]
                    continue
                sides = (session, path, other, their_agent), (other, their_path, session, agent_id)
                lineages = [self.lineage(side[0].session_id, "continued_from") for side in sides]
                if session.session_id in lineages[1] or other_id in lineages[0]:
                    continue  # one conversation
                for one, its_path, editor, editor_agent in sides:
                    self.linked.add(one.session_id)
                    one.collisions.pop((its_path, editor.session_id), None)
                    one.collisions[its_path, editor.session_id] = editor_agent, max(at, edited_at)
                    _drop_oldest(one.collisions, SENT_OF_EACH)
            self._edits[key] = {**edits, session.session_id: (at, agent_id, path)}
            _drop_oldest(self._edits, 2000)

    def _is_watched(self, session: Session) -> bool:
        """True if the session's process is on this machine, so that we can check it."""
        is_here = machine_host(session.machine_key) == machine_host(self._own_machine)
        return is_here and bool(session.processes)

    def _end_replaced(self, session: Session, event: JsonObject, kind: str, received: int) -> None:
        """End the session that the process ran before (/clear, --resume), perhaps without SessionEnd."""
        if (process := process_of(event)) is None:
            return
        runner = self._key_of(event), process
        other = self.sessions.get(self._running.setdefault(runner, session.session_id), session)
        if other is session or (kind != "session_start" and (kind != "client_status" or session.has_hooks)):
            return
        before, after = sorted((other, session), key=lambda each: each.source_time)
        self._running[runner] = after.session_id
        if before.turn == "ended" or before.machine_key != runner[0] or process not in before.processes:
            return
        at = after.source_time
        end = {**event, "sessionId": before.session_id, "hookType": "", "eventType": "session_end"}
        end.update(data={"reason": "replaced"}, timestamp=event["timestamp"] + at - session.source_time)
        self._apply_step(before, end, "replaced", at, received)
        self.linked.add(before.session_id)
        if before is session:  # else the start of the session is linked next
            self._link(before, "session_end")

    def forget_machines(self, since_ms: int) -> None:
        """Forget the clocks of machines that sent nothing since then."""
        self._machines = {name: it for name, it in self._machines.items() if it.last_event >= since_ms}

    def skew_ms(self, machine: str) -> int | None:
        """Return how far a machine's clock is behind ours (below 0: ahead); None if not known."""
        known = self._machines.get(machine)
        return None if known is None or known.skew is None else round(known.skew)

    def _apply_step(self, session: Session, event: JsonObject, kind: str, at: int, received: int) -> None:
        key, timestamp = self._key_of(event), event["timestamp"]
        is_elsewhere = key != session.machine_key and not event.get("imported")
        if kind == "session_end" and session.processes and "pid" in event:
            is_elsewhere = is_elsewhere and process_of(event) in session.processes
        if is_elsewhere and "agentId" not in event and (kind == "session_start" or at >= session.last_event):
            # The session was resumed on another machine, which has its own pids and timestamps.
            session.machine_key, session.processes, session.last_timestamp = key, {}, 0
        if key == session.machine_key:
            session.machine_id = event["machineId"]
        # Events of one machine are in the order of its clock, unless that or ours was set back.
        late = timestamp < session.last_timestamp and at < session.last_event and received >= session.received
        session.received = received
        if (facts := call_facts(event)) and facts[0].use_id.startswith(UNNAMED):
            facts = self._unnamed.paired(event, facts)
        apply_event(session, event, kind, at, facts, self._quiet_ms, late)

    def tick(self, time_ms: int, steady_now_ms: float | None = None) -> list[Session]:
        """Apply the passing of time until `time_ms` (our clock); return the sessions that changed."""
        ahead_ms = time_ms - (steady_ms() if steady_now_ms is None else steady_now_ms)
        if abs(ahead_ms - self._ahead_ms) > 5000:  # our clock was set: silence begins now
            self._set_at = time_ms
            for each in self.sessions.values():
                each.last_event = min(each.last_event, time_ms)
                self._schedule_check(each, time_ms)
        self._ahead_ms, changed = ahead_ms, []
        for session_id in [it for it, due_at in self._due_at.items() if due_at <= time_ms]:
            del self._due_at[session_id]
            if (session := self.sessions[session_id]).turn == "ended":
                continue
            # Silence starts at the time of the last event, even if it arrived late.
            quiet_at = max(session.last_event, self._set_at) + self._quiet_ms
            busy_at = _busy_since(session) + STUCK_MS
            # Many other programs end without an event, and none has a process.
            machine = None if session.agent else self._machines.get(session.machine_key)
            heard_at = max(machine.last_event if machine else session.last_event, self._set_at)
            ended_at = _NEVER if self._is_watched(session) else heard_at + self._ended_ms
            is_long = session.clock < busy_at <= time_ms
            session.clock = busy_at if is_long else session.clock
            is_quiet = session.state == "working" and time_ms >= quiet_at
            # A slow or blocking Stop hook, or a queued command; hooks report none of them.
            is_busy = session.state == "idle" and _client_status(session)[0] == "busy"
            on_at = max(session.last_event, self._set_at) + STILL_BUSY_MS if is_busy else _NEVER
            if time_ms >= on_at:
                session.turn, session.turn_since, session.turn_start = "working", on_at, on_at
                session.state, session.state_since = "working", on_at
            if time_ms >= ended_at:
                self._end_silent(session, session.agent or session.machine_id)
            elif is_quiet:
                session.state, session.state_since = "quiet", quiet_at
            if time_ms >= min(ended_at, on_at) or is_quiet or is_long:
                changed.append(session)
            times = (quiet_at if session.state == "working" else _NEVER, busy_at, ended_at, on_at)
            self._schedule_check(session, min((at for at in times if at > time_ms), default=_NEVER))
        return changed

    def _end_silent(self, session: Session, source: str) -> None:
        why = f"no event from {source} for {self._ended_ms // 3_600_000} hours"
        end_session(session, session.last_event, why, presumed=True)

    def _schedule_check(self, session: Session, time_ms: int) -> None:
        """Schedule the next check of a session, at this time at the latest, and those of its processes."""
        if time_ms < self._due_at.get(session.session_id, _NEVER):
            self._due_at[session.session_id] = time_ms
        if session.session_id not in self._with_process and self._is_watched(session):
            self._with_process[session.session_id] = None

    def check_processes(
        self,
        namespace: int,
        was_running: Callable[[int, int], bool],
        time_ms: int,
        is_sure: bool,
        find: Callable[[tuple[int, int]], int] = lambda _: 0,
    ) -> list[Session]:
        """End the sessions of this machine whose process has exited, since a kill fires no hook; return them.

        `namespace`: of our pids; `find(process)` returns our pid of one in a container, or 0. `is_sure`: no
        other machine has a copy of our key; else only a process that was seen alive can have exited.
        """
        ended = []
        for session_id in list(itertools.islice(self._with_process, 256)):
            del self._with_process[session_id]
            session = self.sessions.get(session_id)
            if session is None or session.turn == "ended" or not self._is_watched(session):
                continue
            self._with_process[session_id] = None  # after the others
            for process, alive_at in list(session.processes.items()):
                pid = process[0] if process[1] == namespace else find(process)
                # The first namespace sees all others; from another one nothing may be seen any more.
                is_visible = pid or (alive_at and namespace == 0)
                if pid and was_running(pid, max(session.last_event, self._set_at)):
                    session.processes[process] = time_ms
                elif is_visible and (alive_at or is_sure):
                    if len(session.processes) > 1:
                        del session.processes[process]
                    else:
                        end_session(session, max(alive_at, session.last_event), _EXITED, presumed=True)
            silent_ms = time_ms - max(session.last_event, self._set_at)
            is_unseen = session.turn != "ended" and not any(session.processes.values())
            if is_unseen and silent_ms >= self._ended_ms:  # e.g. in a container
                self._end_silent(session, "it")
            if session.turn == "ended":
                ended.append(session)
        return ended

    def delete(self, session_id: str) -> bool:
        """Delete a session; return True if it existed."""
        self._due_at.pop(session_id, None)
        if (deleted := self.sessions.pop(session_id, None)) is None:
            return False
        for process in deleted.processes:
            if self._running.get((deleted.machine_key, process)) == session_id:
                del self._running[deleted.machine_key, process]
        if deleted.parent_id:
            self.linked.add(deleted.parent_id)
        return True

    # Snapshots

    def snapshot(self, session_id: str) -> bytes:
        """Return a session for `restore`; for "" the rest: machines, open calls without ids, accounts."""
        rest = (self._machines, self._unnamed.open, self._accounts, self._edits)
        return pickle.dumps((_SNAPSHOT_FORMAT, _values(self.sessions[session_id]) if session_id else rest), 4)

    def restore(self, rows: Iterable[tuple[str, bytes]]) -> None:
        """Restore (session id, snapshot) into empty Sessions; raise ValueError if one cannot be used."""
        states: dict[str, Any] = {"": (self._machines, self._unnamed.open, self._accounts, self._edits)}
        for session_id, row in rows:
            try:
                form, state = _SnapshotReader(io.BytesIO(row)).load()
                if form != _SNAPSHOT_FORMAT:
                    raise ValueError("made by another version")
                states[session_id] = Session(*state) if session_id else state
            except Exception as error:  # pickle raises many types
                raise ValueError(f"snapshot of {session_id or 'the machines'!r}: {error}") from error
        self._machines, self._unnamed.open, self._accounts, self._edits = states.pop("")
        self.sessions.update(states)
        # A session that was replaced may be restored after the one that replaced it.
        for session in sorted(self.sessions.values(), key=lambda it: (it.turn != "ended", it.seq)):
            self._schedule_check(session, _NEVER if session.state == "ended" else session.last_event)
            for process in session.processes:
                self._running[session.machine_key, process] = session.session_id

    # Links between sessions

    def lineage(self, session_id: str | None, link: str = "parent_id") -> Iterator[str]:
        """Yield the ids of a session and its ancestors (`link`: of what it continues), nearest first."""
        seen: set[str] = set()
        while session_id and session_id not in seen:
            seen.add(session_id)
            yield session_id
            session_id = getattr(self.sessions.get(session_id), link, None)

    def _link(self, session: Session, kind: str) -> None:
        """Link a session that begins by /clear, resume or fork to the one that it continues."""
        begins = kind == "session_start" and session.start_source in _CONTINUED_REASONS
        if not begins and (kind != "session_end" or session.end_reason not in _CONTINUABLE_REASONS):
            return
        pairs, continued = [], {it.continued_from for it in self.sessions.values()}
        for other in self.sessions.values():
            before, after = (other, session) if begins else (session, other)
            gap_ms = _NEVER if before.end is None else abs(after.source_time - before.end)
            if (
                gap_ms < 60_000
                and other is not session
                and before.end_reason in _CONTINUED_REASONS.get(after.start_source, ())
                and (before.machine_key, before.directory) == (after.machine_key, after.directory)
                and (before.process == after.process or None in (before.process, after.process))
                and not (after.continued_from or before.session_id in continued)
                and after.session_id not in self.lineage(before.continued_from, "continued_from")
            ):
                pairs.append((before.end_reason == "replaced", gap_ms, before, after))
        if not pairs:
            return
        *_, before, session = min(pairs, key=operator.itemgetter(0, 1))
        self.linked.update((session.session_id, before.session_id, before.parent_id or before.session_id))
        session.continued_from = before.session_id
        session.user_label = session.user_label or before.user_label
        session.model, session.pinned = session.model or before.model, session.pinned or before.pinned
        if session.start_source == "clear" and session.state == "idle":  # the background goes on here
            left = (it for it in before.agents.values() if it.background and it.end == before.end)
            kept = {it.agent_id: dataclasses.replace(it, end=None, counts=dict(it.counts)) for it in left}
            session.agents = {**kept, **session.agents}
            session.state = _state_of(session)
        inherits = not session.parent_by_user and session.parent_id is None
        if inherits and session.session_id not in self.lineage(before.parent_id):
            session.parent_id, session.parent_by_user = before.parent_id, before.parent_by_user

    # JSON for clients

    def to_json(self, session: Session, children: dict[str, list[str]] | None = None) -> JsonObject:
        """Return a session in the form of the API and the WebSocket (`.docs/protocol.md`)."""
        label, label_source = session.label
        children = self.children(session.session_id) if children is None else children
        usage, reason = session.usage, session.reason
        estimate = usage and estimated_usd(usage, self._prices)
        gauges = session.gauges or {**_NO_GAUGES, "context": usage and _estimated_context(session, usage)}
        costs = {"client": gauges["costUsd"], "estimate": estimate}
        source = next((name for name, cost_usd in costs.items() if cost_usd is not None), None)
        waits = (it for it in session.waits if it.event_id)
        asks = ((it.event_id, it.agent_id or None, it.since, it.event_id in self.answerable) for it in waits)
        return {
            **{name: getattr(session, field) for name, field in _SESSION_JSON.items()},
            "label": label,
            "labelSource": label_source,
            "continuedFrom": session.continued_from or session.forked_from,
            "model": session.model or (usage and usage.model),
            "reason": reason and dict(zip(_REASON_JSON, (*reason[:4], reason.tool and reason.tool_use_id))),
            "asks": [dict(zip(_ASK_JSON, ask)) for ask in asks],
            "childSessionIds": children.get(session.session_id, []),
            "agents": _agents_json(session) if session.agents else [],
            "agentCount": len(session.agents),
            "openCalls": [
                {**dict(zip(_CALL_JSON, call)), "agentId": call.agent_id or None}
                for call in list(session.open_calls.values())[-SENT_OF_EACH:]
            ],
            "openCallCount": len(session.open_calls),
            "counts": dict(session.counts),
            "tokenUsage": usage and usage.total.to_json(),
            "estimatedCostUsd": estimate,
            **gauges,
            "costUsd": source and costs[source],
            "costSource": source,
            "collisions": [
                {"path": path, "sessionId": other, **({"agent": agent} if agent else {}), "time": at}
                for (path, other), (agent, at) in session.collisions.items()
            ],
            "stuck": stuck_signals(session),
            "pid": next((pid for pid, _ in reversed(session.processes)), None),
            "withoutHooks": bool(session.client_status) and not session.has_hooks,
            "terminal": terminal_of(session.terminal) if session.terminal else None,
        }

    def children(self, parent_id: str | None = None) -> dict[str, list[str]]:
        """Return the ids of the child sessions of each session, or of one."""
        children: dict[str, list[str]] = {}
        for session in self.sessions.values():
            if session.parent_id and parent_id in (None, session.parent_id):
                children.setdefault(session.parent_id, []).append(session.session_id)
        return children

    def each_json(self, with_hidden: bool) -> Iterator[JsonObject]:
        """Yield every session, newest event first."""
        children = self.children()
        newest = sorted(self.sessions.values(), key=lambda it: it.last_event, reverse=True)
        return (self.to_json(it, children) for it in newest if with_hidden or not it.hidden)


_values = operator.attrgetter(*(field.name for field in dataclasses.fields(Session)))
# The format of a snapshot, derived from the fields of its classes.
_SAVED = (Account, Agent, LimitWindow, MachineClock, OpenCall, Reason, SessionUsage, Tokens)
_SNAPSHOT_FORMAT = zlib.crc32(repr([[*it.__annotations__] for it in (Session, *_SAVED)]).encode())
_SNAPSHOT_CLASSES = {it.__name__: it for it in _SAVED}


class _SnapshotReader(pickle.Unpickler):
    """Loads only our classes, by name, since this module also runs as __main__."""

    def find_class(self, module: str, name: str) -> Any:
        return _SNAPSHOT_CLASSES[name]  # KeyError: not allowed in a snapshot


# Source of a SessionStart → end reasons of the session that it continues.
_CONTINUED_REASONS = {"clear": ("clear", "replaced"), "resume": ("resume",), "fork": ("resume", "replaced")}
_CONTINUABLE_REASONS = frozenset(itertools.chain(*_CONTINUED_REASONS.values()))

# Name in JSON → attribute; `to_json` adds the rest.
_SESSION_JSON = {
    "sessionId": "session_id", "machineId": "machine_id", "machineKey": "machine_key", "activity": "activity",
    "workingDirectory": "directory", "startTime": "start", "lastEventTime": "last_event", "endTime": "end",
    "state": "state", "stateSince": "state_since", "parentSessionId": "parent_id", "demo": "demo",
    "isPinned": "pinned", "hidden": "hidden", "isImported": "imported", "openedTime": "source_time",
    "agent": "agent", "effort": "effort", "branch": "branch", "project": "project",
}  # fmt: skip
_REASON_JSON = ("kind", "tool", "detail", "since", "toolUseId")
_CALL_JSON = ("toolUseId", "toolName", "target", "agentId", "since")
_ASK_JSON = ("eventId", "agentId", "since", "answerable")

# Variables of a terminal (pattern of each, whose groups are numbered on) → its name, and the command for a
# shell that brings it to the front. The first row that fits decides; the patterns leave nothing to be quoted.
_PATH = r"([/@][\w@%+=:,./-]{1,150})"
_TERMINALS: tuple[tuple[dict[str, str], str, str], ...] = (
    ({"TMUX_PANE": r"(%\d{1,9})", "TMUX": rf"{_PATH},\d+,\d+"}, "tmux {0}",
     r"tmux -S {1} select-window -t {0} \; select-pane -t {0} \; switch-client -t {0}"),
    ({"KITTY_WINDOW_ID": r"(\d{1,9})", "KITTY_LISTEN_ON": f"unix:{_PATH}"}, "kitty {0}",
     "kitty @ --to unix:{1} focus-window --match id:{0}"),
    ({"KITTY_WINDOW_ID": r"(\d{1,9})"}, "kitty {0}", ""),
    ({"WEZTERM_PANE": r"(\d{1,9})"}, "WezTerm {0}", "wezterm cli activate-pane --pane-id {0}"),
    ({"ITERM_SESSION_ID": r"(?:\w{1,20}:)?([0-9A-Fa-f-]{36})"}, "iTerm",
     "open 'iterm2:///reveal?sessionid={0}'"),
    ({"SSH_CONNECTION": r"([0-9A-Fa-f.:]{2,45}) .*"}, "ssh {0}", ""),
    ({"TERM_PROGRAM": r"([\w. -]{1,40})"}, "{0}", ""),
)  # fmt: skip
# Program → the command that resumes one of its sessions, by id.
RESUME_COMMANDS = {
    "": "claude --resume", "codex": "codex resume", "gemini": "gemini --resume", "kimi": "kimi --session",
    "copilot": "copilot --resume", "qwen": "qwen --resume",
}  # fmt: skip


def terminal_of(variables: JsonObject) -> JsonObject | None:
    """Return {"name", "command"?} of a terminal, from its variables; None if it is unknown."""
    for patterns, name, command in _TERMINALS:
        found = [re.fullmatch(it, text_of(variables.get(key)), re.A) for key, it in patterns.items()]
        values = [match[1] for match in found if match]
        if len(values) == len(patterns):
            return {"name": name.format(*values), **({"command": command.format(*values)} if command else {})}
    return None


def _apply_user_action(session: Session, data: JsonObject) -> None:
    if (action := data.get("action")) == "rename":
        session.user_label = one_line(text_of(data.get("label")))
    elif action == "pin":
        session.pinned = data.get("pinned") is True
    elif action == "hide":
        session.hidden = data.get("hidden") is True
    elif action == "seen":
        session.unseen_failure = False
        session.state = _state_of(session) if session.turn == "ended" else session.state
    elif action == "set_parent":
        parent = data.get("parentSessionId")
        session.parent_id = parent if isinstance(parent, str) and parent else None
        session.parent_by_user = True


def _agents_json(session: Session) -> list[JsonObject]:
    """Return the newest agents; those that run come before others."""
    agents = session.agents.values()
    newest = heapq.nlargest(SENT_OF_EACH, agents, key=lambda agent: (agent.end is None, agent.start))
    sent, waiting = {agent.agent_id for agent in newest}, {it.agent_id for it in session.waits if it.tool}
    activities = {call.agent_id: call.activity for call in session.open_calls.values()}
    tokens = {it: session.agent_usage[it][1].to_json() for it in sent & session.agent_usage.keys()}
    return [
        {
            "agentId": agent.agent_id,
            "agentType": agent.agent_type,
            "label": agent.label or agent.agent_type or "agent",
            "parentAgentId": agent.parent_id if agent.parent_id in session.agents else None,
            "state": "ended" if agent.end is not None else ("working", "waiting")[agent.agent_id in waiting],
            "startTime": agent.start,
            "endTime": agent.end,
            "activity": activities.get(agent.agent_id, ""),
            "counts": dict(agent.counts),
            "tokenUsage": tokens.get(agent.agent_id),
        }
        for agent in agents
        if agent.agent_id in sent
    ]


_IN_ROW = (
    "toolName", "toolUseId", "durationMs", "notificationType", "source", "reason", "is_interrupt",
    "isPermitted", "to", "outcome", "role",
)  # fmt: skip
# The first of these that an event has is the text of its row.
_ROW_TEXTS = (
    "assistantResponse", "error", "message", "text", "action", "file_path", "task_subject", "to_model",
    "new_cwd", "compact_summary", "command_name",
)  # fmt: skip
_ROW_FIELDS = (
    "seq", "received", "id", "timestamp", "sessionId", "machineId", "hookType", "eventType", "agent",
    "agentId", "agentType", "demo",
)  # fmt: skip


def event_row(event: JsonObject) -> JsonObject:
    """Return the fields of an event that a list row needs, about 300 bytes; clients ask for the rest."""
    data = event["data"]
    small: JsonObject = {}
    for name in _IN_ROW:
        value = data.get(name)
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 200):
            small["isInterrupt" if name == "is_interrupt" else name] = value
    if "toolInput" in data:
        small["target"] = tool_target(data["toolInput"], event["workingDirectory"])
    if batch := _batch_calls(event):
        small["calls"] = [
            {
                "toolUseId": call["tool_use_id"],
                "toolName": text_of(call.get("tool_name"))[:200],
                "target": tool_target(call.get("tool_input"), event["workingDirectory"]),
            }
            for call in batch[:50]
        ]
    text = next((data[name] for name in _ROW_TEXTS if data.get(name)), None)
    if text is None and not event["hookType"]:
        text = _text_of_figures(event) or data
    if text is not None:
        small["text"] = one_line(_CLIENT_TAGS.sub("", text_of(text)[:2000]))
    return {**{name: event[name] for name in _ROW_FIELDS if name in event}, "partial": True, "data": small}


def _text_of_figures(event: JsonObject) -> str:
    """Return the words for tokens, a status line or the client's status; "" for any other event."""
    data = event["data"]
    if models := object_of(object_of(data.get("usage")).get("models")):
        used = sum(map(tokens_of, models.values()), Tokens())
        return f"{used.input + used.cache_read + used.cache_creation:,} tokens in, {used.output:,} out"
    gauges, _ = gauges_of(data.get("gauges"), event["timestamp"])
    percent, cost_usd = gauges["context"]["percent"], gauges["costUsd"]
    is_status = event["eventType"] == "client_status"
    texts = [text_of(data.get(it)) for it in ("status", "waitingFor") if is_status]
    texts += [f"{percent:g} % of the context"] if percent is not None else []
    texts += [f"${cost_usd:.2f}"] if cost_usd is not None else []
    return ", ".join(filter(None, texts))


# ---------------------------------------------------------------------------
# Index: search and statistics over everything stored
#
# Owns: index.db, which may be deleted at any time: it is rebuilt from the journal.
# Knows: the journal's lines and the fields of events. Does not know: clients, or the states of sessions.
#
# One thread reads the journal and fills the file, at most a tenth of the time while events arrive. Readers
# have connections of their own, so they never block writes; what is not indexed yet they read in the journal.
# The file contains no text. Each day has a table of words (rowid = seq), dropped with its day; the lines that
# it finds are then checked. Snapshots of sessions are opaque bytes here.
# ---------------------------------------------------------------------------

INDEX_VERSION = 6
INDEX_BATCH_S = 0.5  # in one transaction
INDEX_SLICE_BYTES = 64 << 10  # of lines; then rows are written, and while events arrive the thread pauses
SNAPSHOTS_WAITING = 100  # snapshots in the queue; the loop then pauses making more
INDEX_GATHER_S = 0.5  # between the first event of a batch and indexing it
INDEX_CHECK_S = 5.0  # between two checks that the file still exists
INDEX_WAITS = "full|readonly|unable to open|locked"  # errors of SQLite after which the file is kept
INDEX_RETRY_S = 10.0
LIVE_S = 0.1  # events are arriving if the last one is younger than this
LIVE_SHARE = 0.1  # of the time in which the thread may work while events are arriving
NAMES_KEPT = 10_000  # in memory; any other is looked up
SEARCH_BUDGET_S = 2.0
SEARCH_LIMIT = 200
SESSIONS_MATCHED = 500  # found by the table of words; for more (all that ended), only the lines are checked
SNIPPET_CHARS = 160
QUARTER_MS = 900_000
EXTREMES = 20  # slowest calls, most failing calls
COMPARED_SESSIONS = 200

# Columns of tokens, in the order of emit_event.COUNT_NAMES.
_COUNTS = ("c0", "c1", "c2", "c3", "c4")
_COUNTED = ("events", "prompts", "toolCalls", "failures")  # in each row of the statistics
_USED = ("tokenUsage", "estimatedCostUsd", "costUsd", "estimatedPartUsd")
_CLIENT_COST = "\0client"  # in place of a model: the client's own cost of a session, in millionths of a USD
_TOOL_FIGURES = {
    "calls": "count(*)",
    "failures": f"sum(outcome IN {FAILED})",
    "noResult": f"sum(outcome IN ({Outcome.OPEN:d}, {Outcome.INTERRUPTED:d}))",  # perhaps it runs
    "timed": "count(duration)",
    "totalMs": "ifnull(sum(duration), 0)",
    "maxMs": "max(duration)",
}
_VERSION = "PRAGMA user_version"
_INDEX_SCHEMA = f"""
PRAGMA auto_vacuum = INCREMENTAL; PRAGMA journal_mode = WAL; BEGIN;
CREATE TABLE meta(name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
INSERT INTO meta VALUES('indexed', 0), ('checkpoint', 0);
CREATE TABLE snapshots(session BLOB PRIMARY KEY, state BLOB);
CREATE TABLE names(id INTEGER PRIMARY KEY, name BLOB UNIQUE);
CREATE TABLE days(id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE files(id INTEGER PRIMARY KEY, day INTEGER, name TEXT, session INTEGER, machine INTEGER,
  project INTEGER, agent INTEGER, bytes INTEGER DEFAULT 0, first_seq INTEGER DEFAULT {1 << 62},
  earliest INTEGER DEFAULT {1 << 62}, latest INTEGER DEFAULT 0, UNIQUE(day, name));
CREATE TABLE events(seq INTEGER PRIMARY KEY, file INTEGER, timestamp INTEGER);
CREATE TABLE cells(file INTEGER, quarter INTEGER, events INTEGER, prompts INTEGER, first INTEGER,
  last INTEGER, PRIMARY KEY(file, quarter)) WITHOUT ROWID;
CREATE TABLE usage(file INTEGER, model INTEGER, quarter INTEGER, {" INTEGER, ".join(_COUNTS)} INTEGER,
  PRIMARY KEY(file, model, quarter)) WITHOUT ROWID;
CREATE TABLE calls(key INTEGER PRIMARY KEY, file INTEGER, session INTEGER, tool INTEGER, target INTEGER,
  begun INTEGER, quarter INTEGER, finish INTEGER, duration INTEGER, outcome INTEGER, event INTEGER);
CREATE INDEX calls_by_tool ON calls(tool, duration, quarter, session, outcome);
CREATE INDEX calls_by_session ON calls(session, quarter, outcome);
CREATE INDEX calls_failed ON calls(target, quarter, event) WHERE outcome IN {FAILED};
PRAGMA user_version = {INDEX_VERSION}; COMMIT;
"""


def stable_hash(*parts: str) -> int:
    """Return a hash of some texts, 63 bits, the same in every run."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


TimeZone = Union[datetime.tzinfo, None]  # None: this machine's
_WORD = re.compile(r"[^\W_]+")
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_QUERY_PART = re.compile(r'"([^"]*)"?|(\S+)')
_APART = re.compile("([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff])")  # scripts without spaces
_MARKS = re.compile(r"[\u0300-\u036f\u3099\u309a]")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]")  # its letter is no part of the word that follows
_UNFIT = re.compile("[\ue000\ud800-\udfff]")
_MARK = "\ue000"  # begins a word for an attribute of an event (its session, tool, …), not for its text
# Names in data that are not searched, or are the same in every event of a session; the `tool_calls` of a
# PostToolBatch have events of their own.
_NOT_SEARCHED = frozenset(
    "toolUseId tool_use_id transcriptPath agent_transcript_path permissionMode prompt_id usage truncated "
    "effort type signature messageId tool_calls".split()
)


def fold(text: str) -> str:
    """Return text as words are compared: lower case, no accents, CJK characters apart, the rest spaces."""
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFD", _APART.sub(r" \1 ", _UNFIT.sub(" ", text)))
    # Words are split here and not by SQLite, whose Unicode tables may differ.
    return _BETWEEN_WORDS.sub(" ", _MARKS.sub("", plain).lower())


def without_colours(text: str) -> str:
    """Return a text without the escape sequences for colours."""
    return _TERMINAL_CODE.sub("", text) if "\x1b" in text else text


@dataclasses.dataclass(frozen=True)
class Term:
    """Adjacent words; the last one may be a prefix."""

    words: tuple[str, ...]
    is_prefix: bool = False

    def found_in(self, folded: str) -> bool:
        """True if the term occurs in a folded text."""
        if not all(word in folded for word in self.words):
            return False
        between = r"[\W_]+".join(map(re.escape, self.words))
        end = "" if self.is_prefix else r"(?![^\W_])"
        return re.search(rf"(?<![^\W_]){between}{end}", folded) is not None

    @functools.cached_property
    def pattern(self) -> str:
        """Return the pattern that finds the term in the original text, decomposed (NFD)."""
        marks = _MARKS.pattern  # [\W_] has them, too: a second way for each would let a search take minutes
        between = r"[\W_]*".join(f"{marks}*".join(map(re.escape, it)) for it in self.words) + f"{marks}*"
        # A Korean syllable without a last consonant begins others.
        start, more = (rf"(?<![^\W_]|{marks})", r"[^\W_]") if between.isascii() else ("", r"[\u11a8-\u11ff]")
        return start + between + (rf"(?:\w|{marks})*" if self.is_prefix else rf"(?!{more}|{marks})")


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse what a person types: words, `begin*`, `"words in a row"`; src/app.py is a row of three."""
    terms = []
    for quoted, bare in _QUERY_PART.findall(text):
        if words := tuple(_WORD.findall(fold(quoted or bare))):
            terms.append(Term(words, bare.endswith("*")))
    return tuple(dict.fromkeys(terms))


def event_texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (field, text) of everything in an event's data that a person may search for."""
    if isinstance(value, str):
        yield field, without_colours(value)
    elif isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else (("", it) for it in value):
            if name not in _NOT_SEARCHED:
                yield from event_texts(inner, field or name)


def snippet_of(event: JsonObject, terms: Sequence[Term]) -> JsonObject:
    """Return the `field` in which the terms are found and a `snippet` of it: pieces, those found marked."""
    words = re.compile("(" + "|".join(term.pattern for term in terms) + ")", re.IGNORECASE)
    first: JsonObject = {"snippet": []}
    for name, text in event_texts(event["data"]) if terms else ():
        text = unicodedata.normalize("NFD", text)
        if match := words.search(text):
            start = max(0, match.start() - SNIPPET_CHARS // 3)
            end = max(match.end(), start + SNIPPET_CHARS)
            found = words.split(re.sub(r"\s+", " ", text[start:end]))
            pieces = [unicodedata.normalize("NFC", piece) for piece in found]
            pieces[0] = ("…" if start else "") + pieces[0]
            pieces[-1] += "…" if end < len(text) else ""
            marked = ({"text": piece, **({"hit": True} if at % 2 else {})} for at, piece in enumerate(pieces))
            return {"field": name, "snippet": [piece for piece in marked if piece["text"]]}
        first.setdefault("field", name)
    return first


@dataclasses.dataclass(frozen=True)
class SearchQuery:
    """Criteria of a search. `session_ids` (None: any) and times in ms, from <= timestamp < to."""

    terms: tuple[Term, ...] = ()
    session_ids: frozenset[str] | None = None
    machine: str | None = None
    tool: str | None = None
    kind: str | None = None  # eventType or hookType
    from_ms: int = 0
    to_ms: int = 1 << 53
    limit: int = 50
    before: int | None = None  # seq: where the previous page ended

    def takes(self, event: JsonObject) -> bool:
        """True if an event matches."""
        is_chosen = (
            (self.session_ids is None or event["sessionId"] in self.session_ids)
            and self.machine in (None, event["machineId"])
            and self.tool in (None, event["data"].get("toolName"))
            and self.kind in (None, effective_type(event), event["hookType"])
            and self.from_ms <= event["timestamp"] < self.to_ms
        )
        if not is_chosen or not self.terms:
            return is_chosen
        folded = fold("\n".join(text for _, text in event_texts(event["data"])))
        return all(term.found_in(folded) for term in self.terms)

    @property
    def only_session(self) -> str | None:
        """The id of the one session whose events are searched for; None when there may be more."""
        ids = self.session_ids or ()
        return next(iter(ids)) if len(ids) == 1 else None


SEARCH_FIELDS = ("q", "session", "machine", "tool", "type", "state", "cursor")


def search_query(wanted: Mapping[str, Any], session_ids: frozenset[str] | None = None) -> SearchQuery:
    """Return the query of SEARCH_FIELDS, `from`, `to`, `limit` in these sessions; raise SearchError."""
    for name in SEARCH_FIELDS:
        if not isinstance(wanted.get(name), (str, type(None))):
            raise SearchError(name, "text")
    texts = {name: value for name, value in wanted.items() if isinstance(value, str) and value}
    if texts.get("state", SESSION_STATES[0]) not in SESSION_STATES:
        raise SearchError("state", "one of " + ", ".join(SESSION_STATES))
    if "session" in texts:
        named = frozenset((texts["session"],))
        session_ids = named if session_ids is None else named & session_ids
    limit = wanted.get("limit")
    if limit is not None and not 1 <= limit <= SEARCH_LIMIT:
        raise SearchError("limit", f"an integer from 1 to {SEARCH_LIMIT}")
    if (cursor := texts.get("cursor", "")) and not re.fullmatch("[0-9]{1,18}", cursor):
        raise SearchError("cursor", "the `next` of the previous page; search again")
    machine, tool, kind = map(texts.get, ("machine", "tool", "type"))
    times = (wanted.get("from") or 0, 1 << 53 if wanted.get("to") is None else wanted["to"])
    terms, before = parse_terms(texts.get("q", "")[:1000]), int(cursor) if cursor else None
    if texts.get("q", "").strip('*" ') and not terms:  # no letter and no digit
        session_ids = frozenset()
    return SearchQuery(terms, session_ids, machine, tool, kind, *times, limit or 50, before)


def moment_ms(name: str, text: str, zone: TimeZone, is_end: bool = False) -> int:
    """Return the ms of a time in ms or ISO form in a zone, of a day its start or end; raise SearchError."""
    if re.fullmatch(r"[0-9]{10,16}", text):
        return int(text)
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S"):
        with contextlib.suppress(ValueError, OverflowError, OSError):
            moment = datetime.datetime.strptime(text, form).replace(tzinfo=zone)
            if is_end and form == "%Y-%m-%d":
                return int(moment.replace(hour=23, minute=59, second=59).timestamp() * 1000) + 1000
            return int(moment.timestamp() * 1000)
    raise SearchError(name, "a time such as 2026-11-24 or 2026-11-24T14:30, or milliseconds since the epoch")


def time_range(start: str | None, end: str | None, zone: TimeZone = None) -> tuple[int, int]:
    """Return [from, to) in ms; from a day to the same day is that day; raise SearchError."""
    first = 0 if start is None else moment_ms("from", start, zone)
    return first, 1 << 53 if end is None else moment_ms("to", end, zone, end == start)


def time_zone(name: str | None) -> TimeZone:
    """Return a time zone by its name, such as Europe/Berlin, ours without one; raise SearchError."""
    import zoneinfo  # not every system that lacks its data lacks them for all of the program

    try:
        return zoneinfo.ZoneInfo(name) if name else None
    except (KeyError, ValueError, OSError):
        raise SearchError("timeZone", "a time zone of this system's tzdata, such as Europe/Berlin") from None


class SearchError(Exception):
    """A search that cannot be carried out: the parameter and what was expected."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: expected {expected}")
        self.field, self.expected = field, expected


def search_page(query: SearchQuery, lines: Iterable[bytes]) -> JsonObject:
    """Return the first matches, last arrived first, as the API does; ends when SEARCH_BUDGET_S is over."""
    begin = time.monotonic()
    needles = [word.encode() for term in query.terms for word in term.words if word.isascii()]
    results: list[JsonObject] = []
    last, complete, more = query.before, True, False  # seq
    for line in lines:
        # The first line is always searched, so that the next page begins further on.
        complete = last == query.before or time.monotonic() - begin <= SEARCH_BUDGET_S
        if more := len(results) == query.limit or not complete:
            break
        last = line_seq(line)
        # A cheap check first. An escape may be a letter with an accent, which matches the letter without.
        lowered = line.lower() if needles else line
        if b"\\u" not in line and not all(needle in lowered for needle in needles):
            continue
        with contextlib.suppress(MalformedEvent):
            event = parse_stored(line)
            if effective_type(event) not in FIGURE_KINDS and query.takes(event):
                results.append({**event_row(event), **snippet_of(event, query.terms)})
    took_ms = round((time.monotonic() - begin) * 1000, 1)
    return {"results": results, "next": str(last) if more else None, "complete": complete, "tookMs": took_ms}


class IndexFile:
    """The SQLite file and what is written to it; one thread, one connection. Errors are sqlite3.Error.

    `add` collects rows, `flush` writes them. After an error inside a transaction the file must be closed.
    """

    _ADD_FILE = """
        UPDATE files SET bytes = bytes + ?, first_seq = min(first_seq, ?),
          earliest = min(earliest, ?), latest = max(latest, ?) WHERE id = ?"""
    _ADD_CELL = """
        INSERT INTO cells VALUES(?, ?, 1, ?, ?, ?) ON CONFLICT(file, quarter) DO UPDATE SET
          events = events + 1, prompts = prompts + excluded.prompts,
          first = min(first, excluded.first), last = max(last, excluded.last)"""
    _ADD_CALL = """
        INSERT INTO calls VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(key) DO UPDATE SET
          file = CASE WHEN excluded.outcome > outcome THEN excluded.file ELSE file END,
          quarter = min(quarter, excluded.quarter),
          finish = CASE WHEN excluded.outcome > outcome THEN excluded.finish ELSE finish END,
          duration = CASE WHEN excluded.outcome > outcome
            THEN ifnull(excluded.duration, max(0, excluded.finish - begun))
            ELSE ifnull(duration, max(0, finish - ifnull(begun, excluded.begun))) END,
          begun = ifnull(begun, excluded.begun),
          event = CASE WHEN excluded.outcome > outcome THEN excluded.event ELSE event END,
          outcome = max(outcome, excluded.outcome)"""
    _ADD_USAGE = (
        f"INSERT INTO usage VALUES(?, ?, ?{', ?' * len(_COUNTS)}) ON CONFLICT(file, model, quarter) "
        "DO UPDATE SET " + ", ".join(f"{name} = max({name}, excluded.{name})" for name in _COUNTS)
    )

    _FULL_TEXT = ("ENABLE_FTS5",)

    def __init__(self, path: str) -> None:
        self.path = path
        self.db = self._connect()
        self.is_new = self.db.execute(_VERSION).fetchone() != (INDEX_VERSION,)
        if self.is_new:
            self.db.close()
            remove_index(path)
            self.db = self._connect()
            self.db.executescript(_INDEX_SCHEMA)
        self.full_text = self._FULL_TEXT in self.db.execute("PRAGMA compile_options").fetchall()
        (self.indexed,) = self.db.execute("SELECT value FROM meta WHERE name = 'indexed'").fetchone()
        self._rows: dict[str, list[tuple[Any, ...]]] = collections.defaultdict(list)  # statement → rows
        self._name_id = functools.lru_cache(NAMES_KEPT)(self._find_name)
        self._file_of, self._unnamed = functools.lru_cache(NAMES_KEPT)(self._find_file), UnnamedCalls()
        self._inodes = index_inodes(path)

    def _connect(self) -> sqlite3.Connection:
        if not os.path.exists(self.path):
            remove_index(self.path)  # an old write-ahead log does not belong to the next file
        os.close(emit_event.open_own(self.path, os.O_RDWR | os.O_CREAT))
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5)
        # A power failure costs the last transactions, never the file; the events are read again.
        for pragma in ("synchronous = NORMAL", "cache_size = -1024", "wal_autocheckpoint = 2000"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def is_removed(self) -> bool:
        """True if the file, or one that SQLite keeps beside it, was removed or replaced."""
        return self._inodes != index_inodes(self.path)

    def transaction(self) -> sqlite3.Connection:
        """Begin a transaction, for `with`: all of it is committed, or nothing."""
        self.db.execute("BEGIN")
        return self.db

    def _find_name(self, name: str) -> int:
        self.db.execute("INSERT OR IGNORE INTO names(name) VALUES(?)", (name_key(name),))
        return int(self.db.execute("SELECT id FROM names WHERE name = ?", (name_key(name),)).fetchone()[0])

    def _find_file(
        self, day: str, session: str, machine: str, project: str, agent: str | None
    ) -> tuple[int, int, int]:
        """Return the ids of (file, day, session); insert new ones."""
        is_new = self.db.execute("INSERT OR IGNORE INTO days(name) VALUES(?)", (day,)).rowcount
        (day_id,) = self.db.execute("SELECT id FROM days WHERE name = ?", (day,)).fetchone()
        if is_new and self.full_text:
            words = f"words_{day_id}"
            options = "content='', columnsize=0, detail=none, tokenize=ascii"
            self.db.execute(f"CREATE VIRTUAL TABLE {words} USING fts5(words, {options})")
            # Fewer, larger pieces: twice as fast to fill and less to merge.
            self.db.execute(f"INSERT INTO {words}({words}, rank) VALUES('hashsize', {16 << 20})")
        key, names = (day_id, session_file_name(session)), map(self._name_id, (session, machine, project))
        self.db.execute(
            "INSERT INTO files(day, name, session, machine, project, agent) VALUES(?, ?, ?, ?, ?, ?) "
            "ON CONFLICT(day, name) DO UPDATE SET agent = ifnull(agent, excluded.agent)",
            (*key, *names, agent and self._name_id(agent)),
        )
        found = self.db.execute("SELECT id, day, session FROM files WHERE day = ? AND name = ?", key)
        file: tuple[int, int, int] = found.fetchone()
        return file

    def add(self, entry: StoredEvent, day: str) -> None:
        """Collect what one event contributes; `day`: the folder of its file."""
        seq, event, line = entry
        kind, timestamp = effective_type(event), event["timestamp"]
        quarter, rows = timestamp // QUARTER_MS, self._rows
        about = (event["sessionId"], event["machineId"], event["workingDirectory"], event.get("agent"))
        file_id, day_id, session = self._file_of(day, *about)
        models = object_of(object_of(event["data"].get("usage")).get("models"))  # totals so far
        if kind == "status_line":
            cost_usd = gauges_of(event["data"].get("gauges"), timestamp)[0]["costUsd"]
            models = {} if cost_usd is None else {_CLIENT_COST: {"input": round(cost_usd * 1e6)}}
        for model, used in itertools.islice(models.items(), MODELS_LIMIT):
            rows[self._ADD_USAGE].append((file_id, self._name_id(model[:200]), quarter, *tokens_of(used)))
        rows[self._ADD_FILE].append((len(line) + 1, seq, timestamp, timestamp, file_id))
        rows["INSERT OR IGNORE INTO events VALUES(?, ?, ?)"].append((seq, file_id, timestamp))
        if kind in FIGURE_KINDS:
            return
        if self.full_text:
            marks = zip("smkkt", (*about[:2], kind, event["hookType"], event["data"].get("toolName")))
            marked = (f"{_MARK}{letter}{stable_hash(it)}" for letter, it in marks if isinstance(it, str))
            text = fold("\n".join(text for _, text in event_texts(event["data"]))).replace(_MARK, " ")
            row = (seq, "\n".join((text, *marked)))
            rows[f"INSERT INTO words_{day_id}(rowid, words) VALUES(?, ?)"].append(row)
        # No events of their session; a window of Codex that never had a prompt has none.
        if kind not in ("session_meta", emit_event.WORDS) and (kind != "session_end" or "agent" not in event):
            is_prompt = kind_of(event) == "user_prompt"
            rows[self._ADD_CELL].append((file_id, quarter, is_prompt, timestamp, timestamp))
        for call in self._unnamed.paired(event, call_facts(event)):
            begun = call.begun_ms if call.outcome is Outcome.OPEN else None
            target = stable_hash(call.tool, tool_target(call.tool_input, event["workingDirectory"]))
            key = stable_hash(event["sessionId"], call.use_id)
            place = (key, file_id, session, self._name_id(call.tool), target)
            times = (begun, call.begun_ms // QUARTER_MS, call.finish_ms, call.duration_ms)
            rows[self._ADD_CALL].append((*place, *times, call.outcome, seq))

    def flush(self, seq: int) -> None:
        """Write the collected rows, and up to which seq events are indexed; inside a transaction."""
        for statement, rows in self._rows.items():
            self.db.executemany(statement, rows)
        self._rows.clear()
        self.indexed = max(self.indexed, seq)
        self.db.execute("UPDATE meta SET value = ? WHERE name = 'indexed'", (self.indexed,))

    def forget_files(self, where: str, *parameters: Any) -> None:
        """Delete rows of some files, and days without files; words are dropped with their day."""
        with self.transaction():
            if not self.db.execute(f"DELETE FROM files WHERE {where}", parameters).rowcount:
                return
            for table in ("events", "cells", "usage", "calls"):
                self.db.execute(f"DELETE FROM {table} WHERE file NOT IN (SELECT id FROM files)")
            empty = "FROM days WHERE id NOT IN (SELECT day FROM files)"
            for (day_id,) in self.db.execute(f"SELECT id {empty}").fetchall():
                self.db.execute(f"DROP TABLE IF EXISTS words_{day_id}")
            self.db.execute(f"DELETE {empty}")
        self._file_of.cache_clear()
        # One page a step, and only executescript steps to the end.
        self.db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")

    def forget_session(self, session_id: str) -> None:
        """Delete all rows of a session, and its snapshot."""
        self.forget_files("name = ?", session_file_name(session_id))
        self.db.execute("DELETE FROM snapshots WHERE session = ?", (name_key(session_id),))


def name_key(name: str) -> bytes:
    """Return a name as the index stores it; it may contain lone surrogates."""
    return name.encode("utf-8", "surrogatepass")


def key_name(key: bytes) -> str:
    """Return the name of a `name_key`."""
    return key.decode("utf-8", "surrogatepass")


def index_inodes(path: str) -> tuple[int, ...]:
    """Return what changes when the index, or a file that SQLite keeps beside it, is removed or replaced."""
    return tuple(about.st_ino for about in index_files(path).values())


def index_files(path: str) -> dict[str, os.stat_result]:
    """Return path → stat result of the index and of the files that SQLite keeps beside it."""
    found = {}
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(OSError):  # such as a link in a loop
            found[path + suffix] = os.stat(path + suffix)
    return found


def remove_index(path: str) -> None:
    """Remove the index and the files that SQLite keeps beside it."""
    for name in index_files(path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def readable(lines: Iterable[bytes]) -> Iterator[StoredEvent]:
    """Parse stored lines; skip lines that are not events (edited by hand)."""
    for line in lines:
        with contextlib.suppress(MalformedEvent):
            yield StoredEvent(line_seq(line), parse_stored(line), line)


class IndexReader:
    """Read-only connections for any thread; one is kept, as to open it takes longer than to search."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._kept: dict[tuple[int, ...], sqlite3.Connection] = {}  # by the inodes of its files

    @contextlib.contextmanager
    def reading(self, budget_s: float) -> Iterator[sqlite3.Connection]:
        """Yield a connection in a transaction; raise sqlite3.Error, "interrupt…" after `budget_s`."""
        if not os.path.isfile(self._path):  # a FIFO would block
            raise sqlite3.OperationalError("there is no index file")
        inodes, deadline = index_inodes(self._path), time.monotonic() + budget_s
        if not (db := self._kept.pop(inodes, None)):
            address = f"file:{urllib.parse.quote(os.fsencode(self._path))}?mode=ro"
            db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
            db.execute("PRAGMA cache_size = -16384")  # what statistics read several times fits in
        with contextlib.ExitStack() as failed:
            failed.callback(db.close)
            db.set_progress_handler(lambda: int(time.monotonic() > deadline), 20_000)
            db.execute("BEGIN")
            if db.execute(_VERSION).fetchone() != (INDEX_VERSION,):
                raise sqlite3.OperationalError("there is no index of this version yet")
            yield db
            db.rollback()
            failed.pop_all()
        self.close()
        self._kept[inodes] = db

    def close(self) -> None:
        """Close the connection that is kept."""
        with contextlib.suppress(KeyError):
            while True:
                self._kept.popitem()[1].close()


_PLACE = "seq, days.name, files.name"  # what `Journal.line` takes
_IN_FILES = "CROSS JOIN files ON files.id = file CROSS JOIN days ON days.id = day"


def indexed_lines(db: sqlite3.Connection, journal: Journal, query: SearchQuery) -> Iterator[bytes]:
    """Yield the lines that may match, newest first; those not indexed yet come from the journal."""
    (indexed,) = db.execute("SELECT value FROM meta WHERE name = 'indexed'").fetchone()
    if indexed < min(journal.seq, (query.before or 1 << 62) - 1):
        yield from journal.lines(query.only_session, indexed, query.before, backwards=True)
    match = match_expression(query)
    limits = {"before": query.before or 1 << 62, "from": query.from_ms, "to": query.to_ms, "match": match}
    bounded = "seq < :before AND timestamp >= :from AND timestamp < :to"

    def of_day(day_id: int) -> Iterator[tuple[int, str, str]]:
        words = f"words_{day_id}"
        tables = f"{words} CROSS JOIN events ON seq = {words}.rowid {_IN_FILES}"
        chosen = f"{words} MATCH :match AND {words}.rowid < :before AND {bounded}"
        return db.execute(f"SELECT {_PLACE} FROM {tables} WHERE {chosen} ORDER BY {words}.rowid DESC", limits)

    places: Iterable[tuple[int, str, str]]
    if match:
        days = db.execute(
            "SELECT day FROM files JOIN days ON days.id = day GROUP BY day HAVING min(first_seq) < :before "
            "AND max(latest) >= :from AND min(earliest) < :to ORDER BY days.name DESC",
            limits,
        ).fetchall()
        of_days, in_order = (of_day(day_id) for (day_id,) in days), journal.in_order
        places = itertools.chain.from_iterable(of_days) if in_order else heapq.merge(*of_days, reverse=True)
    else:
        chosen = f"FROM events {_IN_FILES} WHERE {bounded} ORDER BY seq DESC"
        places = db.execute(f"SELECT {_PLACE} {chosen}", limits)
    yield from filter(None, itertools.starmap(journal.line, places))


def match_expression(query: SearchQuery) -> str:
    """Return the query in FTS5's language; "" for anything."""
    parts = []
    for term in query.terms:
        parts += [f'"{word}"' for word in term.words]
        if term.is_prefix:
            parts[-1] += " *"
    named = {"m": query.machine, "t": query.tool, "k": query.kind}
    wanted: dict[str, Iterable[str]] = {letter: (name,) for letter, name in named.items() if name is not None}
    if query.session_ids is not None and len(query.session_ids) <= SESSIONS_MATCHED:
        wanted["s"] = query.session_ids or (_MARK,)  # a name that no session has
    for letter, names in wanted.items():
        parts.append("(" + " OR ".join(f'"{_MARK}{letter}{stable_hash(name)}"' for name in names) + ")")
    return " AND ".join(parts)


class Cell(NamedTuple):
    """Counts of a session in an hour of the viewer's clock, or its tokens of one model there."""

    session: int
    hour: int  # the quarter that it begins with
    counts: tuple[int, ...] = (0,) * len(_COUNTED)
    model: str | None = None  # of the tokens
    tokens: Tokens = Tokens()


class Statistics:
    """Statistics for a time range, of all sessions or of one, counted in quarters of an hour."""

    def __init__(
        self, db: sqlite3.Connection, journal: Journal, prices: Mapping[str, Price], session_id: str | None
    ) -> None:
        self._db, self._journal, self._prices, self._session_id = db, journal, prices, session_id
        self._names = {number: key_name(key) for number, key in db.execute("SELECT id, name FROM names")}
        self._until = "quarter < :to" + (" AND session = :session" if session_id is not None else "")
        self._where = f"quarter >= :from AND {self._until}"
        session = next((number for number, name in self._names.items() if name == session_id), -1)
        self._bounds = {"session": session}

    def _select(self, query: str) -> list[Any]:
        return self._db.execute(query, self._bounds).fetchall()

    def to_json(self, from_ms: int, to_ms: int, zone: TimeZone) -> JsonObject:
        """Return the answer of /api/stats; days and hours are those of the zone."""
        self._bounds.update({"from": from_ms // QUARTER_MS, "to": -(-to_ms // QUARTER_MS)})
        failing = self._select(
            f"""WITH failed AS (
                SELECT target, count(*) AS failures, max(event) AS example
                FROM calls INDEXED BY calls_failed WHERE outcome IN {FAILED} AND {self._where}
                GROUP BY target ORDER BY 2 DESC, 3 DESC LIMIT {EXTREMES})
              SELECT failures, count(*), target, example FROM calls CROSS JOIN failed USING (target)
              WHERE {self._where} GROUP BY target ORDER BY 1 DESC, 4 DESC"""
        )
        return {
            **{name: self._bounds[name] * QUARTER_MS for name in ("from", "to")},
            "timeZone": zone and str(zone),
            "session": self._session_id,
            **self._groups(zone),
            **self._tools(),
            "failing": list(self._examples(("failures", "calls"), failing)),
        }

    def _groups(self, zone: TimeZone) -> JsonObject:
        """Add up each session's counts in each hour of the zone's clock."""
        names, table = self._names, self._table

        @functools.lru_cache(None)
        def minutes(quarter: int) -> int:  # since 1970 by the zone's clock
            try:
                utc = datetime.datetime.fromtimestamp(quarter * QUARTER_MS / 1000, datetime.timezone.utc)
                offset = utc.astimezone(zone).utcoffset() or datetime.timedelta()
            except (OverflowError, ValueError, OSError):  # a year that no calendar has
                return quarter * 15
            return quarter * 15 + int(offset.total_seconds()) // 60

        # SQL groups by hours, which begin at one minute unless the zone sets its clock by a part of an hour.
        some = self._select(f"SELECT DISTINCT earliest / {_DAY_MS} * 96 FROM files")  # one of each day
        shifts = {minutes(quarter) % 60 // 15 for (quarter,) in some}
        hour = f"quarter - (quarter + {shifts.pop()}) % 4" if len(shifts) == 1 else "quarter"
        self._cells = list(self._read_cells(hour, lambda quarter: quarter - minutes(quarter) % 60 // 15))
        # session → the last hour for which its client has given the cost
        self._exact = {cell.session: cell.hour for cell in self._cells if cell.model == _CLIENT_COST}
        agent = "ifnull(max(agent) OVER (PARTITION BY session), 0)"
        latest = f"SELECT session, machine, project, {agent} FROM files JOIN days ON days.id = day"
        places = {row[0]: row for row in self._select(f"{latest} ORDER BY days.name")}
        spans = "SELECT session, min(first), max(last) FROM cells JOIN files ON files.id = file "
        span_of = {row[0]: row for row in self._select(f"{spans} WHERE {self._where} GROUP BY session")}
        every, of_hour = ("sessions", *_COUNTED, *_USED), ("events", "toolCalls", "failures")

        def by_place(at: int, field: str) -> list[JsonObject]:
            rows = table(every, lambda cell: places[cell.session][at], lambda it: {field: names.get(it, "")})
            return sorted(rows, key=lambda row: (-row["events"], row[field]))

        def about_session(session: int) -> JsonObject:
            (_, machine, project, _), (_, start, end) = places[session], span_of.get(session, (0, None, 0))
            place = {"machineId": names[machine], "project": names[project]}
            return {"sessionId": names[session], "label": None, **place, "start": start, "end": end}

        models = table(_USED[:2], lambda cell: cell.model, lambda it: {"model": it})
        models = [row for row in models if row["model"] != _CLIENT_COST]
        sessions = table(every[1:], lambda cell: cell.session, about_session)
        sessions.sort(key=lambda row: -row["end"])
        hours, days = (lambda cell: minutes(cell.hour) // 60 % 24), (lambda cell: minutes(cell.hour) // 1440)
        return {
            "totals": table(every, lambda _: 0, lambda _: {}, keys=(0,))[0],
            "models": sorted(models, key=lambda row: -sum(row["tokenUsage"].values())),
            "projects": by_place(2, "project"),
            "machines": by_place(1, "machineId"),
            "programs": by_place(3, "agent"),
            "days": table(every, days, lambda it: {"day": day_of(it * _DAY_MS)}),
            "hours": table(of_hour, hours, lambda it: {"hour": it}, range(24)),
            "timeline": table(of_hour, lambda cell: cell.hour, lambda it: {"time": it * QUARTER_MS}),
            "sessions": sessions[:COMPARED_SESSIONS],
        }

    def _table(
        self,
        fields: Iterable[str],
        key_of: Callable[[Cell], Any],
        about: Callable[[Any], JsonObject],
        keys: Iterable[int] = (),
    ) -> list[JsonObject]:
        """Return a row of `about(key)` and `fields` for each key of the cells but None, and for `keys`."""
        groups: dict[Any, list[Cell]] = collections.defaultdict(list, {key: [] for key in keys})
        for cell in self._cells:
            if (key := key_of(cell)) is not None:
                groups[key].append(cell)
        rows = ((key, self._row(groups[key])) for key in sorted(groups))
        return [{**about(key), **{name: row[name] for name in fields}} for key, row in rows]

    def _row(self, cells: Sequence[Cell]) -> JsonObject:
        """Return what some cells add up to."""
        used: dict[str, Tokens] = collections.defaultdict(Tokens)
        rest: dict[str, Tokens] = collections.defaultdict(Tokens)  # of sessions without the client's own cost
        for cell in cells:
            if cell.model is not None:
                used[cell.model] += cell.tokens
                if cell.hour > self._exact.get(cell.session, -1):
                    rest[cell.model] += cell.tokens
        exact = used.pop(_CLIENT_COST, Tokens()).input
        usage, part = SessionUsage(0, used), estimated_usd(SessionUsage(0, rest), self._prices)
        is_known = part is not None and bool(used or exact)
        return {
            "sessions": len({cell.session for cell in cells}),
            **dict(zip(_COUNTED, map(sum, zip((0,) * len(_COUNTED), *(cell.counts for cell in cells))))),
            "tokenUsage": usage.total.to_json() if used else None,
            "estimatedCostUsd": estimated_usd(usage, self._prices) if used else None,
            "costUsd": round(exact / 1e6 + (part or 0), 6) if is_known else None,
            "estimatedPartUsd": part if is_known else None,
        }

    def _read_cells(self, hour: str, hour_of: Callable[[int], int]) -> Iterator[Cell]:
        """Yield each session's counts in each `hour`, and the tokens that it used of each model."""
        for session, quarter, *counts in self._select(
            f"""SELECT session, {hour}, sum(events), sum(prompts), sum(calls), sum(failures) FROM (
                SELECT session, quarter, events, prompts, 0 AS calls, 0 AS failures
                FROM cells JOIN files ON files.id = file WHERE {self._where}
                UNION ALL
                SELECT session, quarter, 0, 0, count(*), sum(outcome IN {FAILED})
                FROM calls INDEXED BY calls_by_session WHERE {self._where} GROUP BY session, quarter)
              GROUP BY 1, 2"""
        ):
            yield Cell(session, hour_of(quarter), tuple(counts))
        known: dict[tuple[int, int], Tokens] = collections.defaultdict(Tokens)
        totals = ", ".join(f"max({name})" for name in _COUNTS)
        for session, model, quarter, *used in self._select(
            f"SELECT session, model, quarter, {totals} FROM usage JOIN files "
            f"ON files.id = file WHERE {self._until} GROUP BY 1, 2, 3 ORDER BY 3"
        ):
            # Events carry totals: each counts by its increase.
            before = known[session, model]
            known[session, model] = after = Tokens(*map(max, before, used))
            if quarter >= self._bounds["from"]:
                increase = Tokens(*map(operator.sub, after, before))
                yield Cell(session, hour_of(quarter), model=self._names[model], tokens=increase)

    def _tools(self) -> JsonObject:
        """Return the `tools`, most calls first, and the `slowest` calls of all of them."""
        chosen, totals = f"FROM calls INDEXED BY calls_by_tool WHERE {self._where}", _TOOL_FIGURES.values()
        tools: list[JsonObject] = []
        slowest: list[tuple[int, int, int, int]] = []
        for tool, *counts in self._select(f"SELECT tool, {', '.join(totals)} {chosen} GROUP BY tool"):
            figures: JsonObject = {"toolName": self._names[tool], **dict(zip(_TOOL_FIGURES, counts))}
            timed = f"{chosen} AND tool = {tool} AND duration IS NOT NULL ORDER BY duration"
            for percent in (50, 95):  # the nearest rank
                rank = -(-figures["timed"] * percent // 100) - 1
                found = self._select(f"SELECT duration {timed} LIMIT 1 OFFSET {rank}")
                figures[f"p{percent}Ms"] = found[0][0] if found else None
            example = f"duration, outcome IN {FAILED}, target, event"
            slowest += self._select(f"SELECT {example} {timed} DESC LIMIT {EXTREMES}")
            tools.append(figures)
        return {
            "tools": sorted(tools, key=lambda tool: (-tool["calls"], tool["toolName"])),
            "slowest": list(self._examples(("durationMs", "failed"), heapq.nlargest(EXTREMES, slowest))),
        }

    def _examples(self, names: Iterable[str], rows: Iterable[Sequence[int]]) -> Iterator[JsonObject]:
        """Yield rows, which end with a call's hash and the seq of its event, with that call, if stored."""
        for *values, target, seq in rows:
            places = self._db.execute(f"SELECT {_PLACE} FROM events {_IN_FILES} WHERE seq = ?", (seq,))
            for _, event, _ in readable(filter(None, itertools.starmap(self._journal.line, places))):
                folder = event["workingDirectory"]
                calls = [(it.tool, tool_target(it.tool_input, folder), it.error) for it in call_facts(event)]
                calls.sort(key=lambda it: stable_hash(*it[:2]) != target)  # a batch has several
                for tool, words, error in calls[:1]:
                    yield {
                        **dict(zip(names, values)),
                        "lastError": one_line(_CLIENT_TAGS.sub("", without_colours(text_of(error))), 300),
                        "toolName": tool,
                        "target": words,
                        **{name: event[name] for name in ("timestamp", "sessionId", "seq")},
                        "eventId": event["id"],
                    }


class History:
    """Search, statistics and snapshots. Methods are for any thread unless their docstrings restrict it.

    `generation` grows with each new index file and after each failed write: saved snapshots may be lost then,
    and all must be saved again.
    """

    def __init__(self, journal: Journal, path: str, prices: Mapping[str, Price] = {}) -> None:
        self._journal, self._path, self._prices = journal, path, prices
        self.generation, self._error = 0, ""
        self._reader = IndexReader(path)
        if sqlite3 is None:
            self._error = "this Python has no sqlite3; install it, or start the monitor with another Python 3"
        elif isinstance(journal, MemoryJournal):
            self._error = "events are kept in memory only"
        self._is_used = not self._error
        self._state = "building" if self._is_used else "off"
        self._counting = threading.Lock()
        self._jobs: collections.deque[Callable[[IndexFile], None]] = collections.deque()  # on the file
        self._written = self._indexed = 0  # seq
        self._last_live = 0.0  # time.monotonic() of the last event
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)

    def start(self) -> None:
        """Start to fill the index; for the thread that appends to the journal."""
        if self._is_used:
            self._written = self._journal.seq
            self._thread.start()

    def stop(self) -> None:
        """Do what is queued, and end the thread."""
        self._stopping.set()
        self._wake.set()
        self._reader.close()  # first: SQLite's log of changes goes with the last connection that may write
        if self._thread.ident is not None:
            self._thread.join(10)

    def add(self, stored: Sequence[StoredEvent]) -> None:
        """Index events that were just stored; for the thread that appends to the journal."""
        if self._thread.ident is not None and stored:
            self._written, self._last_live = stored[-1].seq, time.monotonic()
            self._wake.set()

    def rescan(self) -> None:
        """Compare with the files on disk again: some were removed, replaced or added."""
        self._state = "building" if self._state == "ready" else self._state
        self._queue(self._compare)

    def forget(self, session_id: str) -> None:
        """Delete the rows and the snapshot of a session whose events were deleted."""
        self._queue(lambda file: file.forget_session(session_id))

    def load_snapshots(self) -> tuple[int, list[tuple[str, bytes]]]:
        """Return the checkpoint and saved (session, state), (0, []) without an index; before `start`."""
        if not self._is_used or not os.path.exists(self._path):
            return 0, []
        try:
            with self._reader.reading(60.0) as db:
                (checkpoint,) = db.execute("SELECT value FROM meta WHERE name = 'checkpoint'").fetchone()
                rows = db.execute("SELECT session, state FROM snapshots").fetchall()
            names = {session_file_name(""), *(file.name for file in self._journal.files())}
            found = [(key_name(key), state) for key, state in rows]
        except Exception as error:  # the journal has everything
            log.warning("snapshots of sessions cannot be read, so all events are read again: %s", error)
            return 0, []
        return checkpoint, [row for row in found if checkpoint and session_file_name(row[0]) in names]

    def save_snapshots(self, generation: int, rows: Mapping[str, bytes], checkpoint: int | None) -> bool:
        """Queue snapshots for the file of `generation`; return whether the queue is long.

        `checkpoint`: the seq up to which every session is saved with them; None: more snapshots follow.
        """

        def save(file: IndexFile) -> None:
            if generation == self.generation:
                with file.transaction() as db:
                    snapshots = [(name_key(name), state) for name, state in rows.items()]
                    db.executemany("INSERT OR REPLACE INTO snapshots VALUES(?, ?)", snapshots)
                    if checkpoint is not None:
                        db.execute("UPDATE meta SET value = ? WHERE name = 'checkpoint'", (checkpoint,))

        self._queue(save)
        return len(self._jobs) > SNAPSHOTS_WAITING

    def _queue(self, job: Callable[[IndexFile], None]) -> None:
        if self._state != "off":  # a new file has nothing to forget, and is compared with the files on disk
            self._jobs.append(job)
            self._wake.set()

    def status(self) -> JsonObject:
        """Return the index's state, progress and size."""
        return {
            "state": self._state,
            "done": self._indexed,
            "total": self._written,
            "lagEvents": max(0, self._written - self._indexed),
            "bytes": sum(about.st_size for about in index_files(self._path).values()),
            "error": self._error or None,
        }

    def search(self, query: SearchQuery) -> JsonObject:
        """Return a page of results, newest arrival first; raise SearchError."""
        page: JsonObject | None = None
        before = self._state
        try:
            if self._is_used:
                with self._reader.reading(SEARCH_BUDGET_S * 2) as db:
                    page = search_page(query, indexed_lines(db, self._journal, query))
                page["complete"] = page["complete"] and before == self._state == "ready"
        except sqlite3.Error as error:  # also where SQLite has no full-text search
            if "interrupt" in str(error):
                raise SearchError("q", "longer words: too many words begin like this") from None
            self._read_failed(error)
        if page is None:
            lines = self._journal.lines(query.only_session, 0, query.before, backwards=True)
            page = search_page(query, lines)
        return {**page, "index": self.status()}

    def newest(self, count: int, session_id: str | None, before: int | None) -> list[bytes]:
        """Return the last lines before a seq, newest first; of all sessions the index knows the files."""
        if session_id is None and before and self._state == "ready":
            with contextlib.suppress(sqlite3.Error), self._reader.reading(SEARCH_BUDGET_S) as db:
                lines = indexed_lines(db, self._journal, SearchQuery(before=before))
                return list(itertools.islice(lines, count))
        return list(itertools.islice(self._journal.lines(session_id, 0, before, backwards=True), count))

    def statistics(
        self, from_ms: int, to_ms: int, session_id: str | None = None, zone: TimeZone = None
    ) -> JsonObject:
        """Return the statistics for a time range; raise RequestError(503) without an index."""
        wanted, deadline = self._written, time.monotonic() + 2.0  # for what was stored before
        while self._state != "off" and (self._state != "ready" or self._indexed < wanted):
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        if (status := self.status())["state"] == "off":
            raise RequestError(503, f"statistics need the index: {status['error']}")
        try:
            with self._counting, self._reader.reading(60.0) as db:  # one at a time, for its memory
                counted = Statistics(db, self._journal, self._prices, session_id)
                return {**counted.to_json(from_ms, to_ms, zone), "index": status}
        except sqlite3.Error as error:
            self._read_failed(error)
            raise RequestError(503, f"the index cannot be read now: {error}") from None

    def _read_failed(self, error: sqlite3.Error) -> None:
        if not isinstance(error, sqlite3.OperationalError):  # it is damaged; the thread notices a missing one
            self._remove(str(error))
        self._wake.set()

    def _remove(self, why: str) -> None:
        log.warning("the index is rebuilt: %s", why)
        self._state = "building"
        self._reader.close()
        with contextlib.suppress(OSError):
            remove_index(self._path)

    # The thread

    def _run(self) -> None:
        was_open, pause_s = False, 0.0
        while not self._stopping.wait(pause_s):
            pause_s = 0.0
            try:
                file = IndexFile(self._path)
                with contextlib.closing(file.db):
                    self._state = "building"  # from here on snapshots are queued, for this generation or none
                    self.generation += file.is_new or was_open
                    self._indexed = file.indexed
                    self._fill(file)
                if not self._stopping.is_set():
                    self._remove("its files were removed or replaced")
            except Exception as error:  # searching the files still works
                words = str(error)
                if isinstance(error, sqlite3.Error) and not re.search(INDEX_WAITS, words):
                    self._remove(words)
                    pause_s = 0.5
                else:
                    if words != self._error:
                        trace = not isinstance(error, (sqlite3.Error, OSError))
                        log.warning("the index cannot be written: %s", words, exc_info=trace)
                    self._state, self._error, pause_s = "off", words, INDEX_RETRY_S
            was_open = True
            self._jobs.clear()

    def _fill(self, file: IndexFile) -> None:
        self._compare(file)
        while not file.is_removed():
            self._wake.clear()
            while self._jobs:
                self._jobs.popleft()(file)
            if self._stopping.is_set():
                return
            until = self._written
            if file.indexed < until:
                entries = self._journal.placed_lines(after=file.indexed, before=until + 1)
                while self._batch(file, entries):
                    if self._jobs or self._stopping.is_set() or file.is_removed():
                        break
                else:
                    file.flush(until)
                    self._indexed = until
                continue
            if self._state != "ready":
                log.info("the index is complete: events up to %d", until)
            self._state, self._error = "ready", ""
            if self._wake.wait(INDEX_CHECK_S):
                self._stopping.wait(INDEX_GATHER_S)

    def _compare(self, file: IndexFile) -> None:
        """Delete rows of files that were removed, and read files that were added by hand."""
        on_disk = {(it.day, it.name): it for it in self._journal.files()}
        rows = "SELECT days.name, files.name, files.id, bytes FROM files JOIN days ON days.id = day"
        known = {(day, name): row for day, name, *row in file.db.execute(rows)}
        # A file shorter than its indexed size was replaced.
        gone = [key for key, (_, size) in known.items() if key not in on_disk or on_disk[key].size < size]
        file.forget_files(f"id IN ({','.join(str(known.pop(key)[0]) for key in gone)})")
        for day, name in sorted(on_disk.keys() - known.keys()):
            lines = on_disk[day, name].lines(0, file.indexed + 1, False, 64 << 10)
            self._batch(file, (it[1:] for it in lines if it[1]), True)
        names = {name for _, name in on_disk}
        for (key,) in file.db.execute("SELECT session FROM snapshots WHERE session <> x''").fetchall():
            if session_file_name(key_name(key)) not in names:
                file.forget_session(key_name(key))

    def _batch(self, file: IndexFile, lines: Iterator[tuple[bytes, str]], to_end: bool = False) -> bool:
        """Write events of lines, each with its day, in a transaction; return whether there may be more."""
        size, seq, more = 0, 0, False
        began = slice_began = time.monotonic()
        with file.transaction():
            for entry, day in ((entry, day) for line, day in lines for entry in readable((line,))):
                file.add(entry, day)
                size, seq = size + len(entry.line), entry.seq
                if size > INDEX_SLICE_BYTES:
                    file.flush(seq)
                    size, now = 0, time.monotonic()
                    if now - self._last_live < LIVE_S:
                        self._stopping.wait(min(1.0, (now - slice_began) * (1 - LIVE_SHARE) / LIVE_SHARE))
                    slice_began, more = time.monotonic(), not to_end and now - began > INDEX_BATCH_S
                    if more:
                        break
            file.flush(seq)
        self._indexed = file.indexed
        return more


# ---------------------------------------------------------------------------
# Export: stored lines by session, time and words
#
# Stored lines in, lines out. Does not know: HTTP, the command line.
# ---------------------------------------------------------------------------

EXPORT_CHUNK_LINES = 100


def matching_lines(journal: Journal, query: SearchQuery) -> Iterator[bytes]:
    """Yield the stored lines that match a query, in order of arrival."""
    return (line for _, event, line in readable(journal.lines(query.only_session)) if query.takes(event))


def in_chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines, each with its newline, into chunks of EXPORT_CHUNK_LINES."""
    rest = iter(lines)
    while chunk := b"".join(line + b"\n" for line in itertools.islice(rest, EXPORT_CHUNK_LINES)):
        yield chunk


# ---------------------------------------------------------------------------
# Retention: deletes whole days of events, oldest first, until the rest is within the limits of age and size
#
# Owns: which files are deleted, and deleting them. Knows: the files of our directory. Today's files are kept.
# What a kill interrupted is planned again the next time.
# Our clock names the days. ClockMemory remembers each time that it was set, and corrects the age of the days
# before; on a day on which it was set, no event is too old.
# ---------------------------------------------------------------------------

RETENTION_INTERVAL_S = 300.0
CLOCK_SET_MS = 3_600_000  # a clock that differs this much more from the steady clock was set
ClockStep = tuple[int, int, int]  # the clock was set: (last seq before, ms that it showed before, and after)


def boot_id() -> str:
    """Return the id of this boot of the machine; "" where there is none."""
    return emit_event.read_small("/proc/sys/kernel/random/boot_id").decode().strip()


class ClockMemory:
    """Each time that the clock was set, kept over restarts in a file; for the loop thread."""

    def __init__(self, path: str) -> None:
        self.steps: list[ClockStep] = []
        self._path, self._boot = path, boot_id()
        self._ahead_ms = self._time_ms = self._seq = 0  # ahead of the steady clock, which is that of a boot
        known = emit_event.read_state(path)
        with contextlib.suppress(ValueError, LookupError, TypeError, ArithmeticError):
            steps = [(int(seq), int(before), int(after)) for seq, before, after in known["steps"]]
            time_ms, ahead_ms = int(known["time"]), int(known["ahead"])
            if not known["boot"] or known["boot"] != self._boot:
                # Only the clock shows how long the machine was off, unless it went back or was not set.
                is_wrong = now_ms() < time_ms or time_ms < emit_event.NO_CLOCK_MS
                ahead_ms = (time_ms if is_wrong else now_ms()) - round(steady_ms())
            self.steps, self._time_ms, self._seq, self._ahead_ms = steps, time_ms, int(known["seq"]), ahead_ms

    def compare(self, seq: int, save: bool = False) -> None:
        """Compare the clocks and record a step; `seq`: of the last event; `save`: also without a step."""
        time_ms = now_ms()
        ahead_ms = round(time_ms - steady_ms())
        step_ms = ahead_ms - self._ahead_ms if self._time_ms else 0
        if was_set := abs(step_ms) >= CLOCK_SET_MS:
            # Events since the last comparison came before or after the step; they count as the younger.
            step = (seq if step_ms > 0 else self._seq, time_ms - step_ms, time_ms)
            self.steps = [*self.steps, step][-1000:]
            log.warning("the clock was set from %s to %s", day_of(step[1]), day_of(time_ms))
        if was_set or not self._time_ms:
            self._ahead_ms = ahead_ms
        self._time_ms, self._seq = time_ms, seq
        if save or was_set:
            state = {"boot": self._boot, "time": time_ms, "seq": seq, "ahead": self._ahead_ms}
            with contextlib.suppress(OSError):
                emit_event.write_atomically(self._path, encode_json({**state, "steps": self.steps}) + b"\n")


class RetentionPlan(NamedTuple):
    """The files to delete, and the sizes of all files, in bytes."""

    files: tuple[JournalFile, ...]
    size: int  # of these files
    total: int  # of all our files
    events: int  # of all event files
    index_size: int
    oldest_day: str | None  # that is kept
    today: str  # events are never added to an earlier day
    is_over: bool  # even without them the rest is more than the limit

    @property
    def days(self) -> list[str]:
        """The days with files to delete."""
        return sorted({file.day for file in self.files})

    def to_json(self, dry_run: bool) -> JsonObject:
        """Return the reply to `prune`."""
        sessions = {file.name for file in self.files}
        counts = {"files": len(self.files), "sessions": len(sessions), "bytes": self.size}
        return {"days": self.days, **counts, "dryRun": dry_run}


def plan_retention(
    home: str,
    time_ms: int,
    days: int | None,
    limit_bytes: int | None,
    kept_names: frozenset[str],
    steps: Sequence[ClockStep] = (),
) -> RetentionPlan:
    """Choose the files to delete: older than `days`, then more until all our files fit into the limit.

    Files of `kept_names` are kept; so is a day with events that arrived after those of a later day, unless
    `steps` explain that: it is newer than its name.
    """
    journal = Journal(home + "/events")
    files = journal.files()
    events = sum(file.size for file in files)
    # The index shrinks later than the files are deleted, but its part counts with them.
    index_size = sum(about.st_size for about in index_files(home + "/index.db").values())
    total = 0  # measured after its parts, which may grow meanwhile
    linked = [journal.root] if os.path.islink(journal.root) else []  # events on another disk
    for folder, _, names in itertools.chain(*map(os.walk, (home, *linked))):
        for name in names if not folder.startswith(home + "/venv") else ():  # that of `.docs/redis.md`
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(folder, name)).st_size
    with_index, today = 1 + index_size / max(1, events), day_of(time_ms)
    was_set_today = any(day_of(after_ms) == today for _, _, after_ms in steps)
    first_kept = day_of(time_ms - days * _DAY_MS) if days is not None and not was_set_today else ""
    to_delete: list[JournalFile] = []
    size = 0

    def is_over() -> bool:
        return limit_bytes is not None and total - size * with_index > limit_bytes

    by_day = []
    for day, group in itertools.groupby(files, lambda file: file.day):
        of_day = list(group)
        last = max(file.last_seq for file in of_day) if steps else 0
        shift_ms = sum(after_ms - before_ms for seq, before_ms, after_ms in steps if last <= seq)
        real_ms = moment_ms("day", day, datetime.timezone.utc) + shift_ms if shift_ms else 0
        by_day.append((day_of(real_ms) if shift_ms else day, day, of_day))
    for real_day, day, of_day in sorted(by_day):
        chosen = [file for file in of_day if file.name not in kept_names]
        if max(real_day, day) >= today or not (real_day < first_kept or is_over()):
            continue
        last = 0 if journal.in_order or real_day != day else max(file.last_seq for file in of_day)
        if all(file.first_seq > last for file in files if last and day < file.day < today and file.last_seq):
            to_delete += chosen
            size += sum(file.size for file in chosen)
    oldest = min((file.day for file in set(files) - set(to_delete)), default=None)
    return RetentionPlan(tuple(to_delete), size, total, events, index_size, oldest, today, is_over())


def delete_planned(home: str, plan: RetentionPlan) -> frozenset[str]:
    """Delete the planned files; return the names of session files that no day has any more."""
    if plan.files:
        save_last_seq(home, max(file.last_seq for file in plan.files))
    for file in plan.files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.path)
    journal = Journal(home + "/events")
    for day in journal.days():  # including days that a kill left empty
        if day < plan.today:
            with contextlib.suppress(OSError):  # it has files
                os.rmdir(f"{journal.root}/{day}")
    return frozenset(file.name for file in plan.files) - {file.name for file in journal.files()}


def save_last_seq(home: str, seq: int) -> None:
    """Save the highest deleted number; if it were used again, clients would miss events."""
    path = os.path.join(home, "last-seq")
    with contextlib.suppress(ValueError):
        seq = max(seq, int(emit_event.read_small(path, 14)))
    with contextlib.suppress(OSError):
        emit_event.write_atomically(path, b"%d\n" % seq)


# ---------------------------------------------------------------------------
# Metrics: what /metrics returns, in the text format of Prometheus
#
# Knows: the status.
# ---------------------------------------------------------------------------

LABEL_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


def metrics_text(status: JsonObject, states: Mapping[str, int]) -> bytes:
    """Return all metrics; `states` are sessions by state."""
    events, spool, index, redis = status["events"], status["spool"], status["index"], status["redis"] or {}

    def of_machines(field: str, divisor: int = 1) -> list[tuple[JsonObject, float]]:
        known = {it["label"]: it[field] / divisor for it in status["machines"] if it[field] is not None}
        return [({"machine": label}, value) for label, value in known.items()]  # a series twice is invalid

    build = {"version": status["version"], "mode": status["mode"], "python": sys.version.split()[0]}
    connected = [({"state": redis["state"]}, int(redis["state"] == "connected"))] if redis else None
    # (name, help, values); values are a number, a list of (labels, number), or None: omitted
    rows: tuple[tuple[str, str, Any], ...] = (
        ("build_info", "Version, mode and Python of the monitor.", [(build, 1)]),
        ("start_time_seconds", "When the monitor started.", status["startedAt"] / 1000),
        ("received_total", "Lines received.", events["received"]),
        ("duplicates_total", "Events that were delivered twice.", events["duplicates"]),
        ("quarantined_total", "Lines that were not events.", events["quarantined"]),
        ("events_total", "Events of a machine since the start.", of_machines("events")),
        ("clients", "Subscribed WebSocket clients.", status["clients"]),
        ("store_ok", "1 when events can be written.", int(status["store"]["ok"])),
        ("spool_bytes", "Bytes that wait in the spool.", spool["bytes"]),
        ("spool_segments", "Files that wait in the spool.", spool["segments"]),
        ("spool_dropped_total", "Events that full spools dropped.", spool["dropped"]),
        ("index_ready", "1 when the index contains all events.", int(index["state"] == "ready")),
        ("index_lag_events", "Events that are not yet in the index.", index["lagEvents"]),
        ("index_bytes", "Size of the index.", index["bytes"]),
        ("disk_bytes", "Size of all our files.", (status["disk"] or {}).get("bytes")),
        ("sessions", "Sessions by state.", [({"state": it}, states.get(it, 0)) for it in SESSION_STATES]),
        ("machine_last_seen_seconds", "When a machine last sent an event.", of_machines("lastSeen", 1000)),
        ("machine_clock_skew_seconds", "How far its clock is behind.", of_machines("clockSkewMs", 1000)),
        ("redis_connected", "1 when Redis is connected.", connected),
        ("redis_gaps_total", "Gaps: times that events may have been missed.", redis.get("gaps")),
    )
    lines: list[str] = []
    for name, about, values in rows:
        samples = values if isinstance(values, list) else [] if values is None else [({}, values)]
        if samples:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP contextuate_{name} {about}", f"# TYPE contextuate_{name} {kind}"]
        for labels, value in samples:
            shown = ",".join(f'{it}="{str(text).translate(LABEL_ESCAPES)}"' for it, text in labels.items())
            lines.append(f"contextuate_{name}{f'{{{shown}}}' if shown else ''} {value}")
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------
# Event loop: ingest, WebSocket clients, timers
#
# One thread. Owns: the selector, every socket but HTTP's, and the queues of clients.
# Knows: bytes, lines and frames. Does not know: the meaning of events and messages.
# ---------------------------------------------------------------------------

RECEIVE_BYTES = 256 << 10
PING_INTERVAL_S = 20.0
UNANSWERED_PINGS = 2
CLOSE_DEADLINE_S = 5.0
INGEST_CONNECTIONS = 2048
REPLY_LIMIT_BYTES = 32 << 20


class EventLoop:
    """Calls callbacks of ready sockets, of timers and from other threads, and `on_turn_end` after each turn.

    `steps` grows before each callback that may change something; `on_turn_end` increments it itself.
    """

    def __init__(self) -> None:
        self.on_turn_end: Callable[[], None] = lambda: None
        self.steps, self._selector = 0, selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []  # heap of (time.monotonic, number, …)
        self._timer_numbers = itertools.count()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()  # appended by any thread
        self._running = False
        self._thread: threading.Thread | None = None
        self._wake_reader, self.wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self.wake_writer.setblocking(False)
        self.watch(self._wake_reader, selectors.EVENT_READ, lambda _events: self._wake_reader.recv(4096))

    def watch(self, sock: socket.socket | int, events: int, callback: Callable[[int], object]) -> None:
        """Call `callback(ready events)` whenever the socket or fd is ready; it must not be watched yet."""
        self._selector.register(sock, events, callback)

    def modify(self, sock: socket.socket, events: int) -> None:
        """Change the events for which a socket is watched."""
        self._selector.modify(sock, events, self._selector.get_key(sock).data)

    def unwatch(self, sock: socket.socket | int) -> None:
        """Stop watching a socket or fd; do nothing if it is not watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` once after `delay_s` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_numbers), callback))

    def call_every(self, interval_s: float, callback: Callable[[], object]) -> None:
        """Call `callback` every `interval_s` seconds, even after an error; all of one interval together."""

        def again() -> None:
            self.call_every(interval_s, callback)
            callback()

        self.call_later(interval_s + 0.01 - (time.monotonic() + 0.01) % interval_s, again)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop thread; for any thread and for signal handlers."""
        self._calls.append(callback)
        with contextlib.suppress(OSError):  # full: a wake-up is pending; closed: the loop has ended
            self.wake_writer.send(b"\0")

    def call(self, function: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        """Run `function` in the loop thread for another thread; TimeoutError: it did not and will not run."""
        if threading.current_thread() is self._thread:
            return function()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(function())
            except Exception as error:  # raised in the calling thread
                future.set_exception(error)

        self.call_soon(run)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            if not future.cancel():  # it runs, or has just ended
                return future.result()
            raise TimeoutError("the monitor is too busy to answer") from None

    def run(self) -> None:
        """Run until `stop`."""
        self._thread, self._running = threading.current_thread(), True
        while self._running:
            until_timer_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            ready = self._selector.select(0 if self._calls else until_timer_s)
            due: list[Callable[[], None]] = [functools.partial(key.data, events) for key, events in ready]
            while self._timers and self._timers[0][0] <= time.monotonic():
                due.append(heapq.heappop(self._timers)[2])
            due += [self._calls.popleft() for _ in range(len(self._calls))]
            due.append(self.on_turn_end)
            for callback in due:
                self.steps += callback is not self.on_turn_end  # which does nothing in most turns
                try:
                    callback()
                except Exception:  # an error in one connection must not stop the others
                    log.exception("unexpected error in the event loop, which continues: %r", callback)

    def stop(self) -> None:
        """Make `run` return after the current turn."""
        self._running = False

    def close(self) -> None:
        """Close the selector and the wake-up sockets."""
        self._selector.close()
        self._wake_reader.close()
        self.wake_writer.close()


TURN_LINES = 200  # stored in one turn of the loop


class Turns:
    """Lines that wait to be stored. Machines take turns, so that the events of one never delay others."""

    def __init__(self) -> None:
        self.size = 0  # bytes
        self.waiting: dict[bytes, collections.deque[Any]] = {}  # machine → its entries; the next one first

    def add(self, *entries: tuple[bytes, Any]) -> None:
        """Add entries that begin with a line; its machine is what looks like it, without parsing."""
        for entry in entries:
            line = entry[0]
            start = line.rfind(b'"machineId":') + 12
            machine = line[start : line.find(b",", start)] if start > 11 else b""
            self.waiting.setdefault(machine, collections.deque()).append(entry)
            self.size += len(line)

    def put_back(self, taken: Sequence[Any]) -> None:
        """Add entries that were taken before those that still wait."""
        waiting = itertools.chain.from_iterable(self.waiting.values())
        self.waiting, self.size = {}, 0
        self.add(*taken, *waiting)

    def take(self) -> list[Any]:
        """Remove and return up to TURN_LINES entries, the same number of each machine."""
        taken: list[Any] = []
        share = max(1, TURN_LINES // max(1, len(self.waiting)))
        for machine in list(itertools.islice(self.waiting, TURN_LINES)):
            own = self.waiting.pop(machine)
            taken += [own.popleft() for _ in range(min(share, len(own)))]
            if own:
                self.waiting[machine] = own
        self.size = self.size - sum(len(it[0]) for it in taken) if self.waiting else 0
        return taken


class LineSplitter:
    """Splits a byte stream into lines, without I/O; a line is cut after LINE_LIMIT_BYTES and one byte."""

    def __init__(self) -> None:
        self._rest = bytearray()  # of the unfinished line

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; return the lines that they complete, without newlines and empty lines."""
        self._rest += data
        ended: list[bytearray] = []
        if b"\n" in data:
            *ended, self._rest = self._rest.split(b"\n")
        kept_bytes = emit_event.LINE_LIMIT_BYTES + 1
        del self._rest[kept_bytes:]
        return [line for it in ended if (line := bytes(it[:kept_bytes].strip()))]


@dataclasses.dataclass(eq=False)
class Client:
    """One WebSocket client: its subscription and its queue. It is small, since there may be thousands."""

    sock: socket.socket
    parser: FrameParser | None = None  # while a message of the client is partly received
    queue: list[memoryview] = dataclasses.field(default_factory=list)
    queued: int = 0  # bytes in it
    reply_bytes: int = 0  # of these, at most this many are replies to its own requests
    unanswered_pings: int = 0
    closing: bool = False  # our close frame is queued or sent, so nothing may follow it
    peer_closed: bool = False  # its close frame was received: we end the connection once ours is sent
    view: str | None = None  # "full" or "rows" once subscribed
    session_ids: frozenset[str] | None = None  # None: all
    show_hidden: bool = False
    visible: bool = False  # a page that a person can see now
    # Its session updates have changed fields only, and rows are dropped while it reads too slowly.
    changes: bool = False
    skipped: int = 0  # rows that were not sent because it reads too slowly, until it is sent their number
    pairing: str = ""  # id of the pairing of its browser


@dataclasses.dataclass(eq=False)
class WebSocketServer:
    """The connections of WebSocket clients, after their handshakes: frames, pings, bounded queues."""

    loop: EventLoop
    opened: Callable[[Client], None]
    received: Callable[[Client, str | bytes], None]  # gets the content of a text or binary message
    connection_limit: int
    queue_limit_bytes: int
    clients: dict[socket.socket, Client] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loop.call_every(PING_INTERVAL_S, self._ping_all)

    # Sending

    def send(self, client: Client, frames: bytes, is_reply: bool = False) -> None:
        """Send or queue whole frames; replies have their own limit. A slow client is closed with 1013."""
        if client.closing:
            return
        before = client.queued
        waiting = client.reply_bytes if is_reply else before - client.reply_bytes
        if before and waiting + len(frames) > (REPLY_LIMIT_BYTES if is_reply else self.queue_limit_bytes):
            log.info("a client reads too slowly; it was closed and can reconnect for the missed events")
            self.close(client, CloseCode.TRY_AGAIN_LATER, "too slow; subscribe again with since")
            return
        self._write(client, frames)
        if is_reply:
            client.reply_bytes += client.queued - before

    def broadcast(
        self, stored: Sequence[StoredEvent], frames_for_all: bytes = b"", changes: bytes | None = None
    ) -> None:
        """Send events to subscribers, then `frames_for_all` to all, `changes` to those that want these."""
        frames: dict[tuple[str, bool, frozenset[str] | None], bytes] = {}  # by subscription
        for client in list(self.clients.values()):
            view, ids = client.view, client.session_ids
            if view is None:
                continue
            for_all = changes if client.changes and changes is not None else frames_for_all
            if (key := (view, client.changes, ids)) not in frames:
                own = [it for it in stored if ids is None or it.event["sessionId"] in ids]
                frames[key] = text_frames(event_messages(own, view), client.changes) + for_all
            wanted, room = frames[key], self.queue_limit_bytes - client.queued
            if client.changes and (len(wanted) > room or room < self.queue_limit_bytes * 3 // 4):
                client.skipped, wanted = client.skipped + len(stored), for_all
            if wanted:
                self.send(client, wanted)

    def report_skipped(self) -> None:
        """Send clients that read again how many rows they were not sent."""
        for client in list(self.clients.values()):
            if client.skipped and not client.queue:
                self.send(client, text_frame({"type": "skipped", "events": client.skipped}))
                client.skipped = 0

    def close(self, client: Client, code: int, reason: str = "") -> None:
        """Start the closing handshake (RFC 6455 section 7.1.2); drop the connection if it takes too long."""
        if client.closing:
            return
        client.closing = True
        self.loop.call_later(CLOSE_DEADLINE_S, lambda: self._drop(client))
        self._write(client, encode_frame(Opcode.CLOSE, struct.pack("!H", code) + reason.encode()))

    def _write(self, client: Client, data: bytes) -> None:
        was_waiting = bool(client.queue)
        try:
            sent = 0 if was_waiting else client.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._drop(client)
            return
        if sent < len(data):
            client.queue.append(memoryview(data)[sent:])
            client.queued += len(data) - sent
            if not was_waiting:
                self.loop.modify(client.sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        elif client.closing:
            self._finish_close(client)

    def _flush(self, client: Client) -> None:
        try:
            while client.queue:
                sent = client.sock.send(client.queue[0])
                client.queued -= sent
                client.reply_bytes = max(0, client.reply_bytes - sent)
                client.queue[:1] = [client.queue[0][sent:]] if sent < len(client.queue[0]) else []
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        self.loop.modify(client.sock, selectors.EVENT_READ)
        if client.closing:
            self._finish_close(client)

    def _finish_close(self, client: Client) -> None:
        """Shut down our side after both close frames; the peer's bytes are read until its EOF."""
        if client.peer_closed and not client.queue:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)

    # Receiving

    def adopt(self, sock: socket.socket, response: bytes, rest: bytes, pairing: str = "") -> None:
        """Take a connection whose handshake `response` ends; `rest` came after it. Refuse too many."""
        sock.setblocking(False)
        if len(self.clients) >= self.connection_limit:
            with contextlib.suppress(OSError):
                sock.send(refusal())
            sock.close()
            return
        with contextlib.suppress(OSError):  # the peer may have disconnected
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = self.clients[sock] = Client(sock, pairing=pairing)
        self.loop.watch(sock, selectors.EVENT_READ, functools.partial(self._ready, client))
        self._write(client, response)
        self.opened(client)
        self._take_frames(client, rest)

    def _ready(self, client: Client, ready: int) -> None:
        if client.sock in self.clients and ready & selectors.EVENT_WRITE:
            self._flush(client)
        if client.sock not in self.clients or not ready & selectors.EVENT_READ:
            return  # perhaps dropped earlier in this turn
        try:
            data = client.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        else:
            self._take_frames(client, data)

    def _take_frames(self, client: Client, data: bytes) -> None:
        parser = client.parser or FrameParser()
        received = parser.feed(data)
        client.parser = None if parser.is_between_messages else parser  # it holds most of the memory
        for message in received:
            if isinstance(message, Close):
                client.peer_closed = True  # also after a protocol error, since further bytes are ignored
                code = CloseCode.NORMAL if message.code is None else message.code
                self.close(client, code, "" if message.by_peer else message.reason)
                self._finish_close(client)
            elif message.opcode is Opcode.PING:
                self.send(client, encode_frame(Opcode.PONG, message.data))
            elif message.opcode is Opcode.PONG:
                client.unanswered_pings = 0
            elif not client.closing:
                self.received(client, message.data)

    def _ping_all(self) -> None:
        for client in [client for client in self.clients.values() if not client.closing]:
            if client.unanswered_pings >= UNANSWERED_PINGS:
                log.info("a client was closed: it did not answer %d pings", client.unanswered_pings)
                self._drop(client)
            else:
                client.unanswered_pings += 1
                self.send(client, encode_frame(Opcode.PING, b""))

    def _drop(self, client: Client) -> None:
        if self.clients.pop(client.sock, None) is not None:
            self.loop.unwatch(client.sock)
            client.sock.close()
            client.queue.clear()


def event_messages(stored: Iterable[StoredEvent], view: str) -> list[bytes]:
    """Encode the message of each event for a view; the full view contains the stored bytes unchanged."""
    form = b'{"type":"event","seq":%d,"event":%b}'
    bodies = ((seq, line if view == "full" else encode_json(event_row(event))) for seq, event, line in stored)
    return [form % body for body in bodies]


def text_frames(messages: Sequence[bytes], in_one: bool = False) -> bytes:
    """Encode messages in frames, or several in one: a frame costs a browser more than a message."""
    if in_one and len(messages) > 1:
        messages = [b'{"type":"several","messages":[%b]}' % b",".join(messages)]
    return b"".join(encode_frame(Opcode.TEXT, it) for it in messages)


def text_frame(message: JsonObject) -> bytes:
    """Encode a message to a client."""
    return encode_frame(Opcode.TEXT, encode_json(message))


def encode_with_sessions(message: JsonObject, sessions: Sessions, with_hidden: bool) -> Iterator[bytes]:
    """Encode a message with all sessions, one by one, since each has about 2 kB."""
    yield encode_json(message)[:-1] + b',"sessions":['
    for number, session in enumerate(sessions.each_json(with_hidden)):
        yield b"," * (number > 0) + encode_json(session)
    yield b"]}"


def refusal() -> bytes:
    """Encode the HTTP response to one connection too many, with a JSON body; it closes the connection."""
    body = encode_json({"error": "too many connections; close some or raise limits.connections"})
    ends = ("Connection", "close"), ("Content-Length", str(len(body)))
    form = ("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")
    return response_head(503, [*form, *ends]) + body


# ---------------------------------------------------------------------------
# Redis subscriber thread: events from many machines
#
# Owns: a thread with two connections, and the position in the stream. The channel delivers events
# at once, the stream contains all of them. It is read on after each confirmation of the
# subscription (redis-py resubscribes silently), before further messages of the channel, and after each ping.
# Duplicates are removed by id. The thread receives; the loop stores.
# ---------------------------------------------------------------------------

SUBSCRIBER_DEADLINE_S = 15.0  # without any reply, until the connection is given up
CONNECT_DEADLINE_S = 8.0  # from the start of an attempt to the first confirmation
REDIS_PING_INTERVAL_S = 5.0
STREAM_PAGE_EVENTS = 1000  # at most: over a slow link, a page must take less than SUBSCRIBER_DEADLINE_S
QUICK_S = 1.0  # after a page in less time the next one is twice as large, else half
READ_BYTES = 1 << 20  # at once: each read waits for the loop, which holds the interpreter's lock
BATCH_LINES = 200  # passed to the loop together
INBOX_BYTES = 64 << 20  # that wait for their turn; the rest waits in Redis
STREAM_START = "0-0"
RemoteLine = tuple[bytes, Union[str, None]]  # an event, and its id in the stream; None: from the channel
_POSITION = re.compile(r"\d{1,20}-\d{1,20}")
_ID_AT_START = re.compile(rb'\s*\{\s*"id"\s*:\s*"([^"\\]{1,256})"')


def position_key(position: str) -> tuple[int, int]:
    """Return the sort key of a stream id: the time in ms of the clock of Redis, then a number."""
    time_part, _, number = position.partition("-")
    return int(time_part), int(number or 0)


def event_key(line: bytes) -> str:
    """Return a key that identifies an unparsed event: its id, or a digest if the line begins without one."""
    match = _ID_AT_START.match(line)
    return match.group(1).decode("utf-8", "replace") if match else hashlib.sha256(line).hexdigest()


def attempt_words(state: JsonObject) -> str:
    """Return the number of failed attempts in a row, and its limit, as text; `state`: RedisLink.status()."""
    limit = "" if state["maxRetries"] is None else f" of {state['maxRetries']}"
    return f"attempt {state['attempt']}{limit}"


def redis_py_advice(python: str) -> str:
    """Return how to install redis-py for an interpreter."""
    command = f"run `{shlex.quote(python)} -m pip install --upgrade redis`"
    return f"{command}, or install your system's package (apt install python3-redis), then try again"


# Part of a reason → what to do. redis-py leaves the code (NOAUTH, MOVED) out of some texts.
REDIS_ADVICE = (
    ("Authentication required|NOAUTH|WRONGPASS|invalid username-password|invalid password|any password",
     "check redis.username and redis.password, or CONTEXTUATE_REDIS_PASSWORD for hooks and monitor"),
    ("NOPERM|has no permissions|No permissions to access", "NOPERM: .docs/redis.md lists the rights"),
    ("READONLY|read only replica|read-only replica|previous master",
     "READONLY: set redis.host to the primary, or redis.sentinels to have it found"),
    (r"MOVED|: \d+ \S+:\d+", "it is a node of a cluster: set redis.cluster to true"),
    ("No master found", "check redis.sentinels, redis.master and redis.sentinelPassword"),
    ("certificate required|CERTIFICATE_REQUIRED|return a certificate", "set redis.certFile, redis.keyFile"),
    ("certificate verify failed|CERTIFICATE_VERIFY_FAILED", "check redis.host and redis.caFile"),
    ("No such file or directory", "check the paths in the Redis configuration"),
    ("Name or service not known|nodename nor servname|name resolution|No address", "check redis.host"),
    ("Connection refused", "is Redis running there?"),
    ("unreachable|No route to host", "check redis.host, and that this machine can reach it"),
    ("SSL|WRONG_VERSION_NUMBER|Protocol Error|InvalidResponse|Connection closed|Connection reset"
     "|Broken pipe|EOF occurred|timed out|Timeout|whole answer",
     "if it has never worked, check redis.port, redis.tls and redis.certFile"),
)  # fmt: skip


def redis_advised(reason: str) -> str:
    """Return a reason of `emit_event.redis_trouble`, with what to do."""
    if missing := re.match("redis-py is missing or too old for (.+)", reason):
        return f"{reason}: {redis_py_advice(missing[1])}"
    return reason + next((f" ({it})" for signs, it in REDIS_ADVICE if re.search(signs, reason)), "")


class RedisLink(threading.Thread):
    """Follows channel and stream; `take` stores events in the loop, or returns False: they come again."""

    def __init__(
        self,
        loop: EventLoop,
        settings: Settings,
        take: Callable[[Sequence[RemoteLine]], bool],
        changed: Callable[[], None],
    ) -> None:
        super().__init__(name="redis subscriber", daemon=True)
        values = self._values = settings.values
        self._loop, self._take, self._changed = loop, take, changed
        self._stream = emit_event.stream_name(values)
        self.inbox = Turns()  # what channel and stream delivered
        self.state: JsonObject = {  # for the status; never with a password
            "state": "connecting",
            "server": emit_event.redis_place(values),
            "tls": values["redis.tls"] or (values["redis.url"] or "").startswith("rediss:"),
            "channel": values["redis.channel"],
            "stream": self._stream,
            "maxRetries": values["redis.maxRetries"],
            "attempt": 0,
            "gaps": 0,
            **dict.fromkeys(("reason", "streamReason")),
        }
        self._position_path = settings.path("redis-position.json")
        self._stream_name = f"{self.state['server']} {self._stream}"
        saved = emit_event.read_state(self._position_path)
        position = text_of(saved.get("position"))
        is_ours = saved.get("of") == self._stream_name and _POSITION.fullmatch(position)
        self._position = self._saved_position = position if is_ours else STREAM_START  # stored up to here
        # Positions in the stream: read and passed on by the thread, arrived in the loop's inbox.
        self._read = self._passed_on = self._arrived = self._position
        self._batch: list[RemoteLine] = []  # what was delivered since the last hand-over
        self._at_once = threading.Event()  # set: connect without waiting, or end
        self._closing = False
        self._client: Any = None  # while connected
        self._last_alive = 0.0  # time.monotonic() of Redis's last reply, or of the last wait for the loop
        loop.call_every(1.0, self._check)
        self.start()

    def reconnect(self) -> None:
        """Connect at once, also after the last attempt failed."""
        self.state["state"] = "connecting"
        self._at_once.set()
        self._disconnect()

    def close(self) -> None:
        """Close the connection, store what it delivered, and save the position."""
        self._closing = True
        self.reconnect()
        turn: list[RemoteLine] = []
        while self.inbox.waiting and self._take(turn := self.inbox.take()):
            turn = []
        self.inbox.put_back(turn)
        self._check()

    def status(self) -> JsonObject:
        """Return the state for /api/status."""
        stream = "off" if self._stream is None else "refused" if self.state["streamReason"] else "ok"
        position = None if self._position == STREAM_START else self._position
        return {**self.state, "position": position, "streamState": stream}

    # In the thread

    def run(self) -> None:
        """Connect and follow; after an error again, later each time."""
        failures, limit = 0, self._values["redis.maxRetries"]
        while not self._closing:
            self._at_once.clear()
            self._set(state="connecting", attempt=failures)
            try:
                self._connect()
                failures = 0
                self._follow()
            except Exception as error:
                reason = redis_advised(emit_event.redis_trouble(error, self._values))
            if self._client and self._is_silent():
                reason = f"no whole answer within {SUBSCRIBER_DEADLINE_S:.0f} s"
            self._disconnect()
            self._client = None
            self._hand_over()
            if self._at_once.is_set():
                failures = 0
                continue
            failures += 1
            delay_s = None if failures == limit else emit_event.backoff_s(failures)
            later = f"next in {delay_s:.1f} s" if delay_s else "given up: SIGHUP or Reconnect tries again"
            log.warning("Redis: attempt %d: %s; %s", failures, reason, later)
            self._set(state="waiting" if delay_s else "given_up", reason=reason, attempt=failures)
            if self._at_once.wait(delay_s):
                failures = 0

    def _set(self, **changes: Any) -> None:
        """Update the state, in the loop thread."""

        def update() -> None:
            self.state.update(changes)
            self._changed()

        self._loop.call_soon(update)

    def _connect(self) -> None:
        """Subscribe to the channel, and wait for the confirmation."""

        def connect() -> tuple[Any, Any, Any]:
            client = emit_event.redis_client(self._values)
            client.connection_pool.connection_kwargs["socket_read_size"] = READ_BYTES
            pubsub = client.pubsub()
            pubsub.subscribe(self._values["redis.channel"])
            return client, pubsub, pubsub.get_message(timeout=CONNECT_DEADLINE_S)

        client, self._pubsub, confirmation = emit_event.within(CONNECT_DEADLINE_S, connect)
        self._seen, self._page_events = SeenIds(), 1  # twice as many after each page that was quick
        self._last_alive, self._client = time.monotonic(), client
        self._receive(confirmation)

    def _follow(self) -> None:
        next_ping = time.monotonic() + REDIS_PING_INTERVAL_S
        while not self._at_once.is_set() and not self._is_silent():
            can_read = self._pubsub.connection.can_read(timeout=0 if self._batch else REDIS_PING_INTERVAL_S)
            if can_read:
                # Not before: get_message with a short timeout would stop in the middle of a message.
                self._receive(self._pubsub.get_message(timeout=emit_event.EXCHANGE_DEADLINE_S))
            if not can_read or len(self._batch) >= BATCH_LINES:
                self._hand_over()
            if time.monotonic() >= next_ping:
                next_ping = time.monotonic() + REDIS_PING_INTERVAL_S
                self._pubsub.ping()
                if not self.inbox.waiting:  # during a flood the channel must not wait
                    self._read_stream()

    def _receive(self, message: dict[str, Any] | None) -> None:
        self._last_alive, kind = time.monotonic(), message["type"] if message else ""
        if kind == "subscribe":
            log.info("Redis: connected to %s, channel %s", self.state["server"], self.state["channel"])
            self._set(state="connected", reason=None, attempt=0)
            self._read_stream(may_have_gap=True)
        elif message and kind == "message" and (key := event_key(message["data"])) not in self._seen:
            self._seen.add(key)
            self._batch.append((message["data"], None))

    def _is_silent(self) -> bool:
        return time.monotonic() - self._last_alive > SUBSCRIBER_DEADLINE_S

    def _disconnect(self) -> None:
        """End the connection, even during an exchange; for both threads."""
        with contextlib.suppress(Exception):  # the other thread may be using it
            self._client.connection_pool.disconnect(inuse_connections=True)

    def _read_stream(self, may_have_gap: bool = False) -> None:
        """Pass on the events after those read; if Redis refuses the stream, only the channel is read."""
        import redis

        self._hand_over()
        stream, reason = self._stream, None
        try:
            if stream and may_have_gap and self._read != STREAM_START:
                oldest = self._client.xrange(stream, "-", "+", 1)
                newest = self._client.xrevrange(stream, "+", "-", 1)
                if oldest and position_key(oldest[0][0].decode("ascii")) > position_key(self._read):
                    words = "events may be missing; a larger redis.streamMaxLength keeps more"
                    log.warning("Redis: the stream was trimmed beyond %s: %s", self._read, words)
                    self._set(gaps=self.state["gaps"] + 1)
                elif not newest or position_key(newest[0][0].decode("ascii")) < position_key(self._read):
                    self._read = STREAM_START  # it was deleted, and is filled by a clock that is behind
            is_last = stream is None
            while not is_last and not self._at_once.is_set():
                time_ms, number = position_key(self._read)  # Redis before 6.2 has no exclusive ranges
                count, begun = self._page_events, time.monotonic()
                page = self._client.xrange(stream, f"{time_ms}-{number + 1}", "+", count)
                self._last_alive, is_last = time.monotonic(), len(page) < count
                is_quick = self._last_alive - begun < QUICK_S
                self._page_events = min(2 * count, STREAM_PAGE_EVENTS) if is_quick else max(1, count // 2)
                for raw_id, fields in page:
                    self._read, line = raw_id.decode("ascii"), fields.get(b"event", b"")
                    if line and (key := event_key(line)) not in self._seen:
                        self._seen.add(key)
                        self._batch.append((line, self._read))
                self._hand_over()
        except redis.ResponseError as error:
            if type(error).__name__ in ("MovedError", "AskError", "ClusterDownError"):
                raise  # another node has the stream
            reason = redis_advised(emit_event.redis_trouble(error, self._values))
        if reason != self.state["streamReason"]:
            trouble = f"cannot be read, so events that the channel misses are lost: {reason}"
            log.warning("Redis: the stream %s", trouble if reason else "can be read again")
            self._set(streamReason=reason)

    def _hand_over(self) -> None:
        """Pass what was delivered to the loop, which stores it; wait while too much is not stored there."""
        batch, self._batch = self._batch, []
        if batch or self._read != self._passed_on:
            self._passed_on = self._read
            self._loop.call_soon(functools.partial(self._store, batch, self._read))
        while self.inbox.size > INBOX_BYTES and not self._at_once.is_set():
            time.sleep(0.02)
            self._last_alive = time.monotonic()

    # In the loop thread

    def _store(self, batch: Sequence[RemoteLine] = (), read: str = "") -> None:
        """Add to the inbox what was `read` up to a position of the stream, and store a turn of it.

        The rest is stored in the next turn of the loop, or later.
        """
        is_due = bool(read and self.inbox.waiting)
        self.inbox.add(*batch)
        self._arrived = read or self._arrived
        if is_due:
            return
        turn, is_stored = self.inbox.take(), False
        try:
            is_stored = self._take(turn)
        finally:
            if not is_stored:
                self.inbox.put_back(turn)
            if self.inbox.waiting:
                self._loop.call_later(0 if is_stored else 1.0, self._store)

    def _check(self) -> None:
        """Save the position, and end a silent connection."""
        self._position = self._position if self.inbox.waiting else self._arrived
        if self._position != self._saved_position:
            content = {"of": self._stream_name, "position": self._position}
            with contextlib.suppress(OSError):  # with an older position, some events are only read again
                emit_event.write_atomically(self._position_path, encode_json(content) + b"\n")
                self._saved_position = self._position
        if self._is_silent():
            self._disconnect()


# ---------------------------------------------------------------------------
# HTTP: the page, the API, and who may use them
#
# Owns: both TCP ports, their threads, and the access rules. The WebSocket port takes handshakes only.
# A handler thread reads event files itself and asks the loop thread (`Api.ask`) for everything else.
# ---------------------------------------------------------------------------

REQUEST_DEADLINE_S = 10.0
BODY_DEADLINE_S = 60.0
HISTORY_LIMIT = 1000  # events of one response
TOKEN_COOKIE = "contextuate_token"
COOKIE_RULES = "HttpOnly; SameSite=Strict; Max-Age=31536000"
PAGE_PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "index.html")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[^\r\n]*)?\r\n")


class Access:
    """Decides who may use the ports, by Host, Origin, then the peer's user or the token."""

    def __init__(self, auth: str, token: str, own_names: Iterable[str], allowed_hosts: Iterable[str]) -> None:
        self.port = 0  # of the page; set once the port is bound
        self._auth, self._token = auth, token.encode()
        self._own_names = frozenset(name.lower() for name in own_names)
        self._allowed = frozenset(host.lower() for host in allowed_hosts)

    def check(self, request: Request, port: int, same_user: Callable[[], bool], writes: bool = False) -> None:
        """Raise RequestError: 421 for a foreign Host (DNS rebinding), 403 for another site's Origin, 401.

        `port` received it. To write takes our Origin or a bearer token: browsers add cookies themselves.
        """
        name, origin = self.check_host(request), request.one("origin")
        host, schemes = request.one("host").lower(), ("http", "https")
        good = {f"{scheme}://{host}" for scheme in schemes}
        if port != self.port:  # a WebSocket on the port of its own comes from the page's
            good = {f"http://{name}:{self.port}", *([f"http://{name}"] if self.port == 80 else ())}
            good |= {f"{scheme}://{it}" for it in self._allowed & {name, host} for scheme in schemes}
        is_foreign = request.one("sec-fetch-site") in ("cross-site", "same-site")
        is_embedded = is_foreign and request.one("sec-fetch-dest") != "document"  # its time could be measured
        if origin.lower() not in good if origin else is_embedded:
            advice = "a proxy must pass the Host header of the browser on (.docs/security.md)"
            raise RequestError(403, f"requests from other sites are refused; {advice}")
        scheme, _, bearer = request.one("authorization").partition(" ")
        has_bearer = scheme.lower() == "bearer" and self.is_token(bearer.strip())
        if writes and not has_bearer and (is_foreign or not origin):
            raise RequestError(403, "a request that changes something needs the page's Origin or the token")
        cookies = (pair.strip().partition("=") for it in request.all("cookie") for pair in it.split(";"))
        tokens = [value for name, _, value in cookies if name == f"{TOKEN_COOKIE}_{self.port}"]
        has_token = has_bearer or any(map(self.is_token, tokens))
        if self._auth != "off" and not has_token and not (self._auth == "auto" and same_user()):
            raise RequestError(401, "a token is needed; `contextuate_monitor.py url --token` prints a link")

    def is_token(self, candidate: str) -> bool:
        """True if `candidate` is the token; compares in constant time."""
        return hmac.compare_digest(candidate.encode("utf-8", "surrogateescape"), self._token)

    def check_host(self, request: Request) -> str:
        """Return the name in the Host header if it is ours (any port: tunnels); raise RequestError(421)."""
        host = request.one("host").lower()
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", host)
        name = match[1] if match else ""
        # Networks change: where it arrived is an address of ours that may be newer than the list of them.
        is_own = name.strip("[]") in {*self._own_names, request.address} or is_loopback(name)
        if name and (is_own or {name, host} & self._allowed):
            return name
        line = f'{{"server": {{"allowedHosts": ["{name}"]}}}}'
        advice = f": if it is yours, write {line} into ~/.contextuate/monitor.config.json and run `restart`"
        raise RequestError(421, "this Host is not allowed" + advice * bool(name))


def socket_address(name: Callable[[], Any]) -> str:
    """Return the IP address that a connection's getpeername or getsockname gives; "" once it is closed."""
    with contextlib.suppress(OSError):
        return str(name()[0]).partition("%")[0].replace("::ffff:", "")
    return ""


def peer_owner(sock: socket.socket) -> tuple[int, str]:
    """Return (user, inode) of the other end of a TCP connection on this Linux machine; (-1, "") elsewhere."""
    try:
        peer, local = _proc_address(sock.getpeername()), _proc_address(sock.getsockname())
    except OSError:
        return -1, ""
    # The peer's end of the connection is a row of its own, with local and remote address exchanged.
    is_ipv4 = peer.startswith(_proc_address(("::ffff:0.0.0.0", 0))[:24])
    for table, skipped in [("/proc/net/tcp", 24)] * is_ipv4 + [("/proc/net/tcp6", 0)]:
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            _, *found = file.read().split(f": {peer[skipped:]} {local[skipped:]} ")
            for fields in (it.split(None, 7) for it in found):
                if fields[6] != "0":  # closed, so its user reads as root
                    return int(fields[4]), fields[6]
    return -1, ""


def _proc_address(address: tuple[Any, ...]) -> str:
    """Format an address as in /proc/net/tcp6: 32-bit words in machine byte order, port in hex."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    packed = ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed
    return "{:08X}{:08X}{:08X}{:08X}:{:04X}".format(*struct.unpack("=4I", packed), address[1])


def read_token(path: str) -> str:
    """Return the token from our 0600 file, 192 random bits; create it if there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb", opener=emit_event.open_own) as file:
        if re.fullmatch(r"[A-Za-z0-9_-]{32,}", token := file.read().decode("ascii", "replace").strip()):
            os.chmod(path, 0o600)
            return token
    token = secrets.token_urlsafe(24)
    emit_event.write_atomically(path, token.encode() + b"\n")
    return token


def own_addresses(host: str) -> list[str]:
    """Return the names and addresses at which a server bound to `host` can be reached."""
    if host not in ("0.0.0.0", "::", ""):
        return [host]
    names = {socket.gethostname(), "127.0.0.1"}
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(socket.gethostname(), None)
        names.update(str(info[4][0]).partition("%")[0] for info in found)
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a datagram socket sends nothing; it only selects our address on the route.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            names.add(probe.getsockname()[0])
    return sorted(name for name in names if ":" not in name or host != "0.0.0.0")


class Response(NamedTuple):
    """An HTTP response; `body` is bytes, or an iterator whose chunks are sent one by one."""

    status: int
    body: bytes | Iterator[bytes]
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class Query(dict[str, str]):
    """The query parameters of a request, checked as they are read."""

    def integer(self, name: str, low: int = 0, high: int = 1 << 53) -> int | None:
        """Return an integer parameter within its bounds."""
        if (text := self.get(name)) is None:
            return None
        if not re.fullmatch("[0-9]{1,16}", text) or not low <= int(text) <= high:
            raise SearchError(name, f"an integer from {low} to {high}")
        return int(text)

    def time_range(self) -> tuple[int, int]:
        """Return the range that `from` and `to` ask for: ms, or days and times of the zone."""
        start, end = (it.zfill(10) if it and it.isdigit() else it for it in map(self.get, ("from", "to")))
        return time_range(start, end, time_zone(self.get("timeZone")))


class Api:
    """Handles requests to the API in HTTP threads; `ask` runs a function in the loop thread."""

    def __init__(self, monitor: Monitor, handle_message: Callable[[JsonObject], JsonObject]) -> None:
        self.ask, self.status = monitor.loop.call, monitor.status
        self._monitor, self._handle = monitor, handle_message

    def respond(self, method: str, path: str, query: Query, body: bytes) -> Response:
        """Route one request; raise RequestError, and errors that `RequestHandler` sends as 400 or 503."""
        for allowed, pattern, handler in self.ROUTES:
            if (match := re.fullmatch(pattern, path)) and method != allowed:
                raise RequestError(405, f"{path} takes {allowed}", [("Allow", allowed)])
            if match:
                answer = handler(self, query, body, *map(urllib.parse.unquote, match.groups()))
                return answer if isinstance(answer, Response) else Response(200, encode_json(answer))
        raise RequestError(404, "no such path; .docs/protocol.md lists them")

    def page(self, host: str) -> Response:
        """Return the page, or the built-in one without its file, and its policy, for this Host header."""
        ws_port, name = self._monitor.ws_port, re.sub(r":\d+$", "", host)
        body = BUILT_IN_PAGE.replace("@PLACE@", json.dumps(PAGE_PATH)[1:-1].replace("<", "\\u003c")).encode()
        with contextlib.suppress(OSError), open(PAGE_PATH, "rb") as file:
            body = file.read()
        policy = f"{page_policy(body)}connect-src 'self' ws://{host} wss://{host} ws://{name}:{ws_port} "
        policy += f"wss://{name}:{ws_port} wss://{name}; img-src 'self' data:; frame-ancestors 'none'"
        return Response(200, body, "text/html; charset=utf-8", (("Content-Security-Policy", policy),))

    def _sessions(self, query: Query, _body: bytes) -> Response:
        hidden = query.get("hidden") in ("1", "true")
        pieces = encode_with_sessions({"loading": self._monitor.loading}, self._monitor.sessions, hidden)
        # The loop encodes 50 at a time, so that it is not blocked for long and memory stays small.
        body = iter(lambda: self.ask(lambda: b"".join(itertools.islice(pieces, 50))), b"")
        return Response(200, itertools.chain([next(body)], body))

    def _events(self, query: Query, _body: bytes, session_id: str | None = None) -> Response:
        limit = query.integer("limit", 1, HISTORY_LIMIT) or 100
        before, after = (query.integer(name) for name in ("before", "after"))
        if after is None:
            lines = self._monitor.history.newest(limit + 1, session_id, before)
        else:
            found: Iterable[bytes] = self._monitor.journal.lines(session_id, after, before)
            for field, name in (("eventType", "types"), ("toolName", "tools")):
                if query.get(name):
                    names = b"|".join(map(re.escape, query[name].encode().split(b",")))
                    pattern = b'"%b": ?"(?:%b)"' % (field.encode(), names)
                    if name == "tools" and query.get("field"):
                        pattern += b'|"%b":' % re.escape(query["field"].encode())
                    found = filter(re.compile(pattern).search, found)
            lines = list(itertools.islice(found, limit + 1))
        if not lines and session_id is not None:
            self.ask(lambda: self.status.session_json(session_id))  # raises if there is no such session
        shown = lines[:limit] if after is not None else lines[:limit][::-1]
        page = b",".join(line for line in shown if emit_event.is_json_object(line))  # not edited by hand
        return Response(200, b'{"events":[%b],"more":%b}' % (page, encode_json(len(lines) > limit)))

    def _event(self, query: Query, _body: bytes, event_id: str) -> Response:
        if (line := self._monitor.journal.find(event_id, query.get("session"), query.integer("seq"))) is None:
            raise RequestError(404, "no event with this id is stored")
        return Response(200, line)

    def _export(self, query: Query, _body: bytes) -> Response:
        lines = matching_lines(self._monitor.journal, self._search_query(query))
        if (form := query.get("format") or "ndjson") not in ("ndjson", "html"):
            raise SearchError("format", "ndjson or html")
        content_type, name = "application/x-ndjson", "contextuate-events.ndjson"
        if form == "html":
            content_type, name = "text/html; charset=utf-8", "contextuate-session.html"
            session = self.ask(lambda: self.status.session_json(query.get("session") or ""))
            if not os.path.isfile(PAGE_PATH):
                raise RequestError(503, f"the page is missing; copy index.html to {PAGE_PATH}")
            lines = session_page(session, lines)
        headers = (("Content-Disposition", f'attachment; filename="{name}"'),)
        return Response(200, in_chunks(lines), content_type, headers)

    def _hooks(self, _query: Query, body: bytes) -> JsonObject:
        emit_event.parse_event_line(body)
        if not self.ask(lambda: self._monitor.take_now(body)):
            raise RequestError(503, "the event could not be stored", [("Retry-After", "5")])
        return {}

    def _stop(self, _query: Query, body: bytes) -> JsonObject:
        if emit_event.parse_event_line(body).get("startedAt") != self._monitor.started_at:
            raise RequestError(409, "another monitor is asked to stop")
        self._monitor.stop()
        return {}

    def _search_query(self, query: Query) -> SearchQuery:
        start, end = query.time_range()
        wanted = {**query, "limit": query.integer("limit"), "from": start, "to": end}
        asked: SearchQuery = self.ask(lambda: self._monitor.search_query(wanted))
        return asked

    def _stats(self, query: Query, _body: bytes) -> JsonObject:
        zone = time_zone(query.get("timeZone"))
        figures = self._monitor.history.statistics(*query.time_range(), query.get("session"), zone)
        sessions = self._monitor.sessions.sessions
        labels = self.ask(lambda: {name: session.label[0] for name, session in sessions.items()})
        for row in figures["sessions"]:
            row["label"] = labels.get(row["sessionId"])
        return figures

    ROUTES: tuple[tuple[str, str, Callable[..., Response | JsonObject]], ...] = (
        ("POST", r"/api/hooks", _hooks),
        ("GET", r"/health", lambda *_: {"status": "ok", "version": __version__}),
        ("GET", r"/api/status", lambda api, *_: Response(200, api.status.encoded())),
        ("GET", r"/api/config", lambda api, *_: api.ask(api.status.config)),
        ("GET", r"/api/sessions", _sessions),
        ("GET", r"/api/sessions/([^/]+)", lambda api, *it: api.ask(lambda: api.status.session_json(it[-1]))),
        ("GET", r"/api/sessions/([^/]+)/events", _events),
        ("GET", r"/api/events", _events),
        ("GET", r"/api/events/([^/]+)", _event),
        ("GET", r"/api/export", _export),
        ("GET", r"/api/search", lambda api, query, _: api._monitor.history.search(api._search_query(query))),
        ("GET", r"/api/stats", _stats),
        ("GET", r"/metrics", lambda api, *_: Response(200, api.ask(api.status.metrics), METRICS_TYPE)),
        ("POST", r"/api/message", lambda api, _, body: api._handle(emit_event.parse_event_line(body))),
        ("POST", r"/api/stop", _stop),
    )


BUILT_IN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><title>Contextuate Monitor</title>
<style>:root{color-scheme:light dark;font:13px/1.5 system-ui,sans-serif}
p{border-left:3px solid #b45309;padding-left:8px}pre{tab-size:16;overflow:auto}
</style></head><body><h1>Contextuate Monitor</h1>
<p>The dashboard file is missing. Copy <code>index.html</code> to <code id="place"></code> and reload.
Until then, this page shows a summary.</p>
<h2>Sessions</h2><pre id="sessions"></pre><h2>Latest events</h2><pre id="events"></pre>
<script>
const show = (id, text) => document.getElementById(id).textContent = text;
const table = (rows) => rows.map((cells) => cells.filter((it) => it).join("\\t")).join("\\n");
const ask = async (path) => (await fetch(path)).json();
show("place", "@PLACE@");
async function refresh() {
  if (document.hidden) return;
  const {sessions} = await ask("api/sessions"), {events} = await ask("api/events?limit=100");
  sessions.sort((a, b) => b.lastEventTime - a.lastEventTime);
  show("sessions", table(sessions.slice(0, 50).map((s) => [s.state, s.label, s.machineId,
    s.reason ? s.reason.kind + " " + (s.reason.detail || "") : s.activity])));
  show("events", table(events.reverse().map((e) => [new Date(e.timestamp).toLocaleTimeString(),
    e.hookType || e.eventType, e.data.toolName, e.data.target || e.data.text || e.data.message])));
}
refresh();
setInterval(() => refresh().catch(() => {}), 2000);
</script></body></html>
"""


def page_policy(body: bytes) -> str:
    """Return the part of a page's policy that does not depend on where it comes from."""
    policy = "default-src 'none'; form-action 'none'; base-uri 'none'; "
    policy += "require-trusted-types-for 'script'; trusted-types 'none'; "
    for kind in ("script", "style"):
        found = re.findall(rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode()), body, re.S)
        digests = [hashlib.sha256(inline.replace(b"\r\n", b"\n")).digest() for inline in found]
        hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        policy += f"{kind}-src " + (hashes or "'none'") + "; "
    return policy


def session_page(session: JsonObject, lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the page with the events of a session inside, in lines: it opens without a monitor."""
    with open(PAGE_PATH, "rb") as file:
        body = file.read()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{page_policy(body)}img-src data:">'
    body = body.replace(b'<meta charset="utf-8">', b'<meta charset="utf-8">\n' + policy.encode(), 1)
    head, script, rest = body.partition(b"<script>")
    about = encode_json({"at": now_ms(), "session": session})[:-1].replace(b"<", b"\\u003c")
    yield head + b'<script type="application/json" id="recorded">' + about + b',"events":[null'
    for _, event, _ in readable(lines):
        row = event_row(event)["data"]
        more = {name: row[name] for name in row if name not in event["data"]}
        yield b"," + encode_json({**event, "row": more}).replace(b"<", b"\\u003c")
    yield b"]}</script>\n" + script + rest


class HttpServer(http.server.ThreadingHTTPServer):
    """A TCP port: one thread per connection, with a limit on their number and deadlines for requests."""

    daemon_threads, block_on_close = True, False
    timeout: float | None = 2.0  # how often deadlines are checked while there are any, seconds

    def __init__(self, sock: socket.socket, access: Access, api: Api, answers: Answers, limit: int) -> None:
        super().__init__(sock.getsockname()[:2], RequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_name, self.server_port = "localhost", sock.getsockname()[1]
        self.access, self.api, self.answers = access, api, answers
        self.upgraded_sockets: set[socket.socket] = set()  # WebSockets whose HTTP thread still runs
        self._free_connections = threading.BoundedSemaphore(limit)
        self.deadlines: dict[socket.socket, float] = {}  # of connections whose head or body is being read
        self._stopping, self._thread = False, threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop accepting connections; return after the last one was accepted."""
        self._stopping = True
        with contextlib.suppress(OSError):  # a connection wakes up the accepting thread
            socket.create_connection(self.socket.getsockname()[:2], HttpServer.timeout).close()
        self._thread.join(HttpServer.timeout)  # if its address has gone, nothing wakes it up
        self.server_close()

    def _serve(self) -> None:
        while not self._stopping:
            self.timeout = HttpServer.timeout if self.deadlines else None
            self.handle_request()
            now = time.monotonic()
            for sock, deadline in self.deadlines.copy().items():
                if deadline < now:  # the head or body arrives too slowly
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> Any:
        """Accept a connection; pause after an error such as too many open files, which would come at once."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.2)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it when too many are open."""
        if self._free_connections.acquire(blocking=False):
            self.deadlines[request] = time.monotonic() + REQUEST_DEADLINE_S
            try:
                super().process_request(request, client_address)
                return
            except RuntimeError:  # the system allows no more threads
                del self.deadlines[request]
                self._free_connections.release()
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(refusal())
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection until it ends or the loop takes it over; broken ones are expected."""
        try:
            self.finish_request(request, client_address)
        except (ConnectionError, TimeoutError, socket.timeout):
            pass
        except Exception:  # unexpected: log and continue
            log.exception("unexpected error in an HTTP request")
        if request in self.upgraded_sockets:
            self.upgraded_sockets.discard(request)
        else:
            self.shutdown_request(request)
        self.deadlines.pop(request, None)
        self._free_connections.release()


SAFE_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
)


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """One HTTP connection."""

    server: HttpServer
    rfile: io.BufferedReader
    timeout = REQUEST_DEADLINE_S
    disable_nagle_algorithm = True  # else a response may wait for the acknowledgement of the previous one

    def handle_one_request(self) -> None:
        """Read one request, by the rules of the WebSocket port, and respond; head and body have deadlines."""
        self.server.deadlines[self.connection] = time.monotonic() + REQUEST_DEADLINE_S
        line = head = self.rfile.readline(HEAD_LIMIT_BYTES + 1)
        while line.endswith(b"\r\n") and line != b"\r\n" and len(head) <= HEAD_LIMIT_BYTES:
            line = self.rfile.readline(HEAD_LIMIT_BYTES + 1)
            head += line
        self.server.deadlines.pop(self.connection, None)
        self.command, self.request_version, self.close_connection = "GET", "HTTP/1.1", True
        if line and (response := self._respond(head)):  # else the peer has disconnected, or it is a WebSocket
            self._send(response)

    def _respond(self, head: bytes) -> Response | None:
        request = None
        try:
            if len(head) > HEAD_LIMIT_BYTES:
                raise RequestError(431, f"a request head may have {HEAD_LIMIT_BYTES} bytes")
            request = parse_request_head(head.removesuffix(b"\r\n\r\n"))
            request = request._replace(address=socket_address(self.connection.getsockname))
            self.command, self.request_version = request.method, request.version
            self.close_connection = request.version != "HTTP/1.1" or "close" in request.tokens("connection")
            if "100-continue" in request.tokens("expect") and request.version == "HTTP/1.1":
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return self._answer(request)
        except RequestError as error:
            self.close_connection = True  # its body may not have been read
            response = Response(error.status, encode_json({"error": error.reason}), headers=(*error.headers,))
            if request and any("text/html" in accepted for accepted in request.all("accept")):  # a person's
                text = f"Contextuate Monitor: {error.reason}\n".encode()
                response = response._replace(body=text, content_type="text/plain; charset=utf-8")
            return response
        except SearchError as error:
            return Response(400, encode_json({"error": str(error), "field": error.field}))
        except MalformedEvent as error:
            return Response(400, encode_json({"error": f"the body must be one JSON object: {error}"}))
        except (TimeoutError, concurrent.futures.TimeoutError) as error:
            return Response(503, encode_json({"error": str(error) or "the monitor is too busy to answer"}))
        except (ConnectionError, socket.timeout):
            raise
        except Exception:  # unexpected: log and answer
            self.close_connection = True
            log.exception("a request could not be answered")
            words = "it could not be answered; monitor.log has the reason"
            return Response(500, encode_json({"error": words}))

    @functools.cached_property
    def _is_own_user(self) -> bool:  # on Linux by /proc/net/tcp, which may be long: once a connection
        """True if the connection comes from this machine and, on Linux, from our user."""
        is_local = is_loopback(socket_address(self.connection.getpeername))
        return is_local and (sys.platform != "linux" or peer_owner(self.connection)[0] == os.getuid())

    def _answer(self, request: Request) -> Response | None:
        path, _, query_text = request.target.encode("latin-1").decode("utf-8", "replace").partition("?")
        query, server = Query(urllib.parse.parse_qsl(query_text, keep_blank_values=True)), self.server
        is_websocket = path == "/ws" or server.server_port != server.access.port
        if path == "/" and "token=" in query_text and not is_websocket:
            return self._exchange_token(request, query.get("token") or "")
        method = "GET" if request.method == "HEAD" else request.method
        server.access.check(request, server.server_port, lambda: self._is_own_user, writes=method != "GET")
        if is_websocket:
            response = handshake_response(request)
            self.close_connection = True  # ends this thread, not the connection
            self.connection.setblocking(False)
            rest = self.rfile.peek()  # what came with the head
            server.upgraded_sockets.add(self.connection)
            server.answers.adopt(request, self.connection, response, rest)
            return None
        body = self._body(request)
        if path in ("/pair", "/api/answer"):
            return server.answers.by_http(path, request, self.connection, body)
        if path not in ("/", "/index.html"):
            return server.api.respond(method, path, query, body)
        if method != "GET":
            raise RequestError(405, f"{path} takes GET", [("Allow", "GET")])
        return server.api.page(request.one("host"))

    def _exchange_token(self, request: Request, token: str) -> Response:
        """Exchange the token of a link for a cookie, so that it stays out of the browser's history."""
        access, self.close_connection = self.server.access, True  # a body is not read
        access.check_host(request)
        if not access.is_token(token):
            raise RequestError(401, "this link is not valid; `contextuate_monitor.py url --token` prints one")
        cookie = f"{TOKEN_COOKIE}_{access.port}={token}; {COOKIE_RULES}"
        # Both are relative, since a proxy may show the page below a path.
        return Response(303, b"", "text/plain", (("Location", "./"), ("Set-Cookie", cookie)))

    def _body(self, request: Request) -> bytes:
        coding, length = request.one("transfer-encoding").lower(), request.one("content-length")
        if (coding and length) or coding not in ("", "chunked") or not re.fullmatch("[0-9]{0,12}", length):
            raise RequestError(400, "a body needs either a Content-Length or Transfer-Encoding: chunked")
        self.server.deadlines[self.connection] = time.monotonic() + BODY_DEADLINE_S
        body, size, malformed = bytearray(), int(length or 0), RequestError(400, "a chunk is malformed")
        try:
            while coding or not body:
                if coding:
                    if (match := CHUNK_SIZE.fullmatch(self.rfile.readline(1024))) is None:
                        raise malformed
                    size = int(match[1], 16)
                if len(body) + size > emit_event.LINE_LIMIT_BYTES:
                    raise RequestError(413, f"a body may have {emit_event.LINE_LIMIT_BYTES} bytes")
                if len(data := self.rfile.read(size)) < size:
                    raise RequestError(400, "the body ended early")
                body += data
                if size == 0:
                    break
                if coding and self.rfile.read(2) != b"\r\n":
                    raise malformed
            while coding and (line := self.rfile.readline(1024)) != b"\r\n":  # trailers are ignored
                if not line.endswith(b"\r\n"):
                    raise malformed
        except socket.timeout:  # since Python 3.10 a TimeoutError
            raise RequestError(408, "the body did not arrive in time") from None
        self.server.deadlines.pop(self.connection, None)
        return bytes(body)

    def _send(self, response: Response) -> None:
        body = response.body
        headers = [("Date", self.date_time_string()), ("Content-Type", response.content_type)]
        if isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        elif self.request_version != "HTTP/1.0":  # whose connection is closed in any case
            headers.append(("Transfer-Encoding", "chunked"))
            body = itertools.chain((b"%x\r\n%b\r\n" % (len(it), it) for it in body), [b"0\r\n\r\n"])
        if self.close_connection:
            headers.append(("Connection", "close"))
        head = response_head(response.status, [*headers, *SAFE_HEADERS, *response.headers])
        if self.command == "HEAD":
            self.wfile.write(head)
        elif isinstance(body, bytes):
            self.wfile.write(head + body)
        else:
            self.wfile.writelines(itertools.chain([head], body))


# ---------------------------------------------------------------------------
# Answers: a person answers what a session asks, from the page or a terminal
#
# Owns: the connections of hooks that wait, the paired browsers, and the right to answer.
# No agent answers itself: it runs as this user, so neither the user nor loopback nor the token is a right. A
# browser gets it by a code that only a person's terminal prints; on Linux no process below an agent has it.
# Checks and Redis run in threads of their own; what they decide is carried out in the loop thread.
# ---------------------------------------------------------------------------

PAIRING_COOKIE = "contextuate_answer"
CODE_LIFE_S = 120
TAKEN_DEADLINE_S = 5.0  # for a hook to print an answer
LOOKING_S = 15  # how long a mark in Redis lasts that a page is looking
UNKNOWN_WORDS = "it is not known whether the hook took it; look at what the session does"
AGENT_VARIABLES = {  # in the shells of agents
    "CLAUDECODE", "CLAUDE_PID", "CLAUDE_CODE_ENTRYPOINT", "CLAUDE_CODE_SESSION_ID", "GEMINI_CLI", "QWEN_CODE",
    "COPILOT_CLI", "CODEX_THREAD_ID",
}  # fmt: skip


def agent_above(pid: int, clients: frozenset[int] = frozenset()) -> str:
    """Return what shows that a process is an agent's, one of `clients` (pids) or below, else ""."""
    while pid > 0:
        variables: set[str] = set()
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", encoding="latin-1") as file:
            variables = {it.partition("=")[0] for it in file.read().split("\0")}
        name, rest = _process_fields(pid)
        if pid in clients or name in ("claude", *emit_event.AGENTS) or variables & AGENT_VARIABLES:
            return f"process {pid} ({safe_line(name)}) is an agent's"
        pid = int(rest[1]) if rest else 0
    return ""


def _process_fields(pid: int) -> tuple[str, list[str]]:
    """Return a process's name and the fields after it in /proc/PID/stat; ("", []) without such a file."""
    found = emit_event.read_small(f"/proc/{pid}/stat").decode("utf-8", "replace")
    name, _, rest = found.partition("(")[2].rpartition(")")
    return name, rest.split()


@dataclasses.dataclass(eq=False)
class OpenQuestion:
    """A question whose hook waits."""

    event: JsonObject
    sock: socket.socket | None  # None: it waits at Redis
    until: float  # time.monotonic
    is_taken: bool = False  # an answer is on its way
    done: concurrent.futures.Future[bool] = dataclasses.field(default_factory=concurrent.futures.Future)


class Answers:
    """Hooks that wait for an answer, and who may give it; for the loop thread where nothing else is said."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._settings, self._loop = monitor, monitor.settings, monitor.loop
        self.questions: dict[str, OpenQuestion] = {}  # by event id
        self._path = self._settings.path("pairings.json")
        self._pairings = emit_event.objects_in(emit_event.read_state(self._path).get("pairings"))
        self._code, self._code_until, self._tries = "", 0.0, 0
        self._refusals: collections.deque[tuple[int, str]] = collections.deque(maxlen=20)
        self.threads = concurrent.futures.ThreadPoolExecutor(4, "answers")
        self._looking_until = 0.0  # of the mark in Redis, time.monotonic

    # Questions

    def take(self, stored: Sequence[StoredEvent], waiting: Mapping[str, socket.socket]) -> None:
        """Wait for answers to stored events whose hooks wait: at a connection of `waiting`, or at Redis."""
        at_redis = self._monitor.redis and emit_event.read_answer_key(self._settings.home)
        for event in (entry.event for entry in stored if "answerable" in entry.event):
            sock = waiting.get(event["id"])
            limit = "answers.backgroundSeconds" if precedes_dialog(event) else "answers.waitSeconds"
            if (sock or (at_redis and "spooled" not in event)) and len(self.questions) <= 1000:
                left = min(event["answerable"], self._settings[limit]) - (now_ms() - event["received"]) / 1000
                self.questions[event["id"]] = OpenQuestion(event, sock, time.monotonic() + left)
                self._monitor.sessions.answerable.add(event["id"])
        for event_id, sock in waiting.items():
            self._monitor.hooks.release(sock)
            question = self.questions.get(event_id)
            if question and question.sock is sock:  # and no other connection that names the same event
                self._loop.watch(sock, selectors.EVENT_READ, functools.partial(self._heard, event_id))
            else:
                sock.close()
        if self.questions:
            self.look()

    def look(self) -> None:
        """End the waits that are over: answered at the terminal, too old, or before a dialog and unseen."""
        is_seen = any(client.visible and client.pairing for client in self._monitor.clients.clients.values())
        now, sessions = time.monotonic(), self._monitor.sessions.sessions
        for event_id, question in list(self.questions.items()):
            session = sessions.get(question.event["sessionId"])
            wait = next((it for it in session.waits if it.event_id == event_id), None) if session else None
            is_late = now > question.until or (wait and wait.held_until and question.sock and not is_seen)
            if (wait is None or is_late) and not question.is_taken and self._monitor.loading is None:
                self._end(event_id)
        if is_seen and self._monitor.redis and now > self._looking_until - LOOKING_S / 2:
            self._looking_until = now + LOOKING_S
            self.threads.submit(self._at_redis, lambda it, key: it.set(key, b"1", ex=LOOKING_S), "looking")

    def _heard(self, event_id: str, _events: int) -> None:
        """The hook has printed the answer, or has gone."""
        question, data = self.questions.get(event_id), b""
        if question is None:  # it ended earlier in this turn
            return
        with contextlib.suppress(OSError):
            data = question.sock.recv(16) if question.sock else b""
        if question.is_taken:
            question.done.set_result(data == emit_event.ACKNOWLEDGEMENT)
        self._end(event_id)

    def _end(self, event_id: str) -> None:
        """End one wait; its hook then prints nothing."""

        def push_nothing(client: Any, place: str) -> None:
            client.rpush(place, b"")
            client.pexpire(place, emit_event.ANSWER_AGE_MS)

        question = self.questions.pop(event_id)
        self._monitor.sessions.answerable.discard(event_id)
        if question.sock:
            self._loop.unwatch(question.sock)
            question.sock.close()
        elif not question.is_taken:
            self.threads.submit(self._at_redis, push_nothing, "answer", event_id)
        self._monitor.feed.changed[question.event["sessionId"]] = None

    def close(self) -> None:
        """End all waits."""
        for sock in filter(None, (question.sock for question in self.questions.values())):
            sock.close()
        self.threads.shutdown(wait=True)

    # Answering

    def answer(self, session_id: str, event_id: str, answer: Any, by: str) -> JsonObject:
        """Send one answer to its hook and record it, outside the loop thread; raise RequestError."""
        if (line := self._monitor.journal.find(event_id, session_id)) is None:
            raise RequestError(400, "eventId: no such question is stored")
        event = parse_stored(line)
        asked = {**event["data"], "hook_event_name": event["hookType"]}
        asked.update(tool_name=asked.get("toolName"), tool_input=asked.get("toolInput"))
        if emit_event.client_answer(asked, answer) is None or len(encode_json(answer)) > 100 << 10:
            raise RequestError(400, "answer: it does not fit what is asked")
        hides = b"[redacted:" in line or b"\\u001b" in line.replace(b"\\\\", b"")  # which can hide a command
        if (hides or "truncated" in asked) and answer["do"] in ("allow", "always", "accept"):
            raise RequestError(400, "it is not shown whole, so it can only be allowed in the terminal")
        if (question := self._loop.call(lambda: self._begin(event["id"], answer))) is None:
            outcome, words = "late", "it was answered elsewhere, or the client no longer waits"
        elif question.sock:
            outcome, words = "unknown", UNKNOWN_WORDS
            with contextlib.suppress(concurrent.futures.TimeoutError):
                is_done = question.done.result(TAKEN_DEADLINE_S)
                outcome, words = ("delivered", "") if is_done else ("late", "the client no longer waits")
        else:
            outcome, words = self._send_signed(event, answer)
        self._loop.call_soon(lambda: self._finish(question, event, answer, by, outcome))
        return {"type": "answered", "eventId": event_id, "outcome": outcome, "words": words}

    def _begin(self, event_id: str, answer: JsonObject) -> OpenQuestion | None:
        """Send an answer to the hook that waits for it; return its question, None if it is too late."""
        question = self.questions.get(event_id)
        with contextlib.suppress(OSError):  # the hook has gone
            if question is not None and not question.is_taken:
                if question.sock:
                    question.sock.send(encode_json(answer) + b"\n")
                question.is_taken = True
                return question
        return None

    def _finish(
        self, question: OpenQuestion | None, event: JsonObject, answer: Any, by: str, outcome: str
    ) -> None:
        """Store an answer as an event, and end its wait unless another answer can be given."""
        if question and outcome == "failed":
            question.is_taken = False
        elif question and event["id"] in self.questions:
            self._end(event["id"])
        same = ("sessionId", "machineId", "machineKey", "workingDirectory", "agentId", "agentType")
        data = {"to": event["id"], "answer": answer["do"], "outcome": outcome, "by": by}
        words = {"delivered": "", "late": " (too late)", "failed": " (not delivered)"}.get(outcome, " (?)")
        data |= {"message": f"{answer_words(event, answer)}, from {by}{words}"}
        own_id = str(uuid.uuid4())
        about = {"id": own_id, "timestamp": event["timestamp"] + now_ms() - event["received"]}
        about |= {"eventType": "answer", "hookType": "", "data": data}
        log.info("%s to %s, from %s: %s", answer["do"], event["id"], by, outcome)
        self._monitor.ingest.own_answers.add(own_id)
        self._monitor.take_now(encode_json({**{it: event[it] for it in same if it in event}, **about}))
        self._monitor.ingest.own_answers.discard(own_id)

    # Through Redis, in our threads

    def _at_redis(self, work: Callable[[Any, str], Any], kind: str, event_id: str = "") -> Any:
        """Return `work(client, key)` with a connection of its own."""
        values = self._settings.values
        place = emit_event.answer_place(values, kind, event_id)
        client = emit_event.within(emit_event.EXCHANGE_DEADLINE_S, lambda: emit_event.redis_client(values))
        with contextlib.closing(client):
            return emit_event.within(2 * TAKEN_DEADLINE_S, lambda: work(client, place))

    def _send_signed(self, event: JsonObject, answer: Any) -> tuple[str, str]:
        """Put a signed answer into the question's list; return (outcome, why) when a hook has taken one."""
        key, nonce = emit_event.read_answer_key(self._settings.home), secrets.token_hex(8)
        outcome = "failed"  # until it is in the list

        def send(client: Any, place: str) -> tuple[str, str]:
            nonlocal outcome
            taken_key = emit_event.answer_place(self._settings.values, "answered", event["id"])
            at = emit_event.redis_ms(client)
            mac = emit_event.signature(key, event, answer, at, nonce)
            value = encode_json({"answer": answer, "at": at, "nonce": nonce, "mac": mac})
            if not client.exists(taken_key) and outcome:  # else the page has said that it failed
                outcome = "unknown"
                client.rpush(place, value)
                client.pexpire(place, emit_event.ANSWER_AGE_MS)
            deadline = time.monotonic() + TAKEN_DEADLINE_S
            while time.monotonic() < deadline:
                taken = emit_event.parse_event_line(client.get(taken_key) or b"{}")
                if taken.get("mac") == emit_event.signature(key, event, "taken", 0, taken.get("nonce")):
                    is_ours = taken.get("nonce") == nonce
                    return ("delivered", "") if is_ours else ("late", "another answer came first")
                time.sleep(0.02)
            if client.lrem(place, 0, value):
                return "failed", "no hook took it: is the key another, or answers.remote off there?"
            return "unknown", UNKNOWN_WORDS

        try:
            found: tuple[str, str] = self._at_redis(send, "answer", event["id"])
        except Exception as error:  # Redis does not answer
            found = outcome, redis_advised(emit_event.redis_trouble(error, self._settings.values))
            outcome = ""  # so that nothing is sent later
        return found

    # The right to answer

    def adopt(self, request: Request, sock: socket.socket, response: bytes, rest: bytes) -> None:
        """Hand a WebSocket to the loop; for any thread."""
        pairing = self._pairing_of(request, sock)
        self._loop.call_soon(lambda: self._monitor.clients.adopt(sock, response, rest, pairing))

    def _pairing_of(self, request: Request, sock: socket.socket) -> str:
        """Return the id of the pairing of a request's browser, "" if it has none; for any thread."""
        name = f"{PAIRING_COOKIE}_{self._monitor.port}"
        pairs = [pair.strip().partition("=") for it in request.all("cookie") for pair in it.split(";")]
        secret = next((value for it, _, value in pairs if it == name), "")
        found, address = self._find_pairing(_digest(secret)), socket_address(sock.getpeername)
        if found and found.get("address") != address:
            self._refused(f"the cookie of {found.get('name')} came from {address}")
            return ""
        return text_of(found.get("hash"))

    def _find_pairing(self, digest: str) -> JsonObject:
        return next((it for it in self._pairings if hmac.compare_digest(text_of(it.get("hash")), digest)), {})

    def check_page(self, client: Client) -> str:
        """Return from where a page answers; raise RequestError without the right; in a thread."""
        if not (pairing := self._find_pairing(client.pairing) if client.pairing else {}):
            raise self._refused("a page that is not paired tried to answer; `answers pair` prints a code")
        self._check_process(client.sock)
        return text_of(pairing.get("name"))

    def _check_process(self, sock: socket.socket) -> int:
        """Return the process at the other end, 0 if it is on another machine; refuse an agent's (Linux)."""
        if sys.platform != "linux":
            return 0
        _, inode = peer_owner(sock)
        address = socket_address(sock.getpeername)  # "": it has disconnected, so it could be any process
        if not inode and address and not is_loopback(address):
            return 0
        pids, here = [], emit_event.pid_namespace()
        for path in glob.glob("/proc/[0-9]*/fd/*") if inode else ():
            with contextlib.suppress(OSError):
                if os.readlink(path) == f"socket:[{inode}]":
                    pids.append(int(path.split("/")[2]))
        sessions = list(self._monitor.sessions.sessions.values())
        clients = frozenset(pid for it in sessions for pid, space in list(it.processes) if space == here)
        reason = next(filter(None, (agent_above(pid, clients) for pid in pids)), "")
        if reason or not pids:
            raise self._refused(f"an agent must not answer: {reason or 'the process cannot be found'}")
        return pids[0]

    def by_http(self, path: str, request: Request, sock: socket.socket, body: bytes) -> Response:
        """Pair a browser (/pair), or serve a person's terminal (/api/answer); in an HTTP thread."""
        given, pid = emit_event.parse_event_line(body), self._check_process(sock)
        if path == "/pair":
            return self._pair(text_of(given.get("code")), request, sock)
        if not request.one("authorization") or not is_loopback(socket_address(sock.getpeername)):
            raise self._refused("commands that answer run on the monitor's machine, with its token")
        # The controlling terminal, as major and minor number of its device.
        terminal, refused = [text_of(given.get("terminal"))], text_of(given.get("refused"))
        if sys.platform == "linux":
            terminal = _process_fields(pid)[1][4:5]
        if refused or terminal in ([], ["0"], [""]):
            raise self._refused(refused or f"process {pid} has no terminal, so no person uses it")
        if given.get("do") == "code":
            self._code, self._tries = f"{secrets.randbelow(10**8):08}", 0
            self._code_until = time.monotonic() + CODE_LIFE_S
            log.info("a code to pair a browser was printed")
            return Response(200, encode_json({"code": self._code}))
        wanted = text_of(given.get("sessionId")), text_of(given.get("eventId")), given.get("answer")
        return Response(200, encode_json(self.answer(*wanted, "a terminal")))

    def _pair(self, code: str, request: Request, sock: socket.socket) -> Response:
        is_known = self._code != "" and time.monotonic() < self._code_until
        self._tries += 1
        is_right = is_known and hmac.compare_digest(code.encode("utf-8", "replace"), self._code.encode())
        if is_right or self._tries >= 3:
            self._code = ""
        if not is_right:
            raise self._refused("a wrong code" if is_known else "no code is valid: `answers pair` prints one")
        secret, address = secrets.token_urlsafe(32), socket_address(sock.getpeername)
        known = {"Edg": "Edge", "OPR": "Opera", "Firefox": "Firefox", "Chrome": "Chrome", "Safari": "Safari"}
        agent = request.one("user-agent")
        browser = next((name for mark, name in known.items() if f"{mark}/" in agent), "a browser")
        name = f"{browser} on {address}"
        entry = {"hash": _digest(secret), "name": name, "address": address, "at": now_ms()}
        words = f"{name} may answer from now on"
        self._loop.call(lambda: self._save_pairings([*self._pairings, entry], words))
        cookie = f"{PAIRING_COOKIE}_{self._monitor.port}={secret}; {COOKIE_RULES}"
        return Response(200, b"{}", headers=(("Set-Cookie", cookie),))

    def end_pairing(self, pairing: str) -> None:
        """Take the right to answer from a browser; `pairing`: its id in the status."""
        for entry in [it for it in self._pairings if pairing and text_of(it.get("hash")).startswith(pairing)]:
            left = [it for it in self._pairings if it is not entry]
            self._save_pairings(left, f"{entry.get('name')} may no longer answer")
            for client in list(self._monitor.clients.clients.values()):
                if client.pairing == entry["hash"]:
                    self._monitor.clients.close(client, CloseCode.GOING_AWAY, "its pairing has ended")

    def _save_pairings(self, pairings: list[JsonObject], words: str) -> None:
        emit_event.write_atomically(self._path, encode_json({"pairings": pairings}) + b"\n")
        self._pairings = pairings
        log.warning("%s", words)
        self._monitor.clients.broadcast((), text_frame({"type": "notice", "words": words}))

    def _refused(self, words: str) -> RequestError:
        """Log an attempt that is refused, and show it on the page; return the error; for any thread."""
        log.warning("refused: %s", words)
        self._refusals.append((now_ms(), words))
        return RequestError(403, words)

    def status(self) -> JsonObject:
        """Return the paired browsers and the attempts that were refused in the last hour."""
        names = [(text_of(it.get("hash"))[:12], it.get("name"), it.get("at")) for it in self._pairings]
        since = now_ms() - 3_600_000
        return {
            "pairings": [dict(zip(("id", "name", "at"), it)) for it in names],
            "refused": [{"at": at, "words": words} for at, words in self._refusals if at > since],
        }


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def answer_words(event: JsonObject, answer: JsonObject) -> str:
    """Return an answer as one line."""
    do, given = answer["do"], event["data"].get("toolInput")
    done = {"allow": "Allowed once", "deny": "Denied", "accept": "Form sent", "decline": "Declined"}
    if do == "always":
        offered = emit_event.objects_in(event["data"].get("permission_suggestions"))
        return "Always allowed: " + "; ".join(suggestion_words(offered[it]) for it in answer["suggestions"])
    if do == "answer":
        texts = []
        for question, picked in zip(emit_event.objects_in(given["questions"]), answer["answers"]):
            labels = [text_of(it.get("label")) for it in emit_event.objects_in(question.get("options"))]
            texts.append(", ".join(it if isinstance(it, str) else labels[it] for it in picked))
        return "Answered: " + one_line("; ".join(texts), 1000)
    words = f": {one_line(answer['message'], 1000)}" if answer.get("message") else ""
    return done.get(do, "Cancelled") + words


_DESTINATIONS = {
    "session": "this session", "localSettings": "this project, for you", "userSettings": "all your projects",
    "projectSettings": "this project, for everyone",
}  # fmt: skip


def suggestion_words(suggestion: JsonObject) -> str:
    """Return one of the client's suggestions, as a sentence."""
    given = {name: text_of(value) for name, value in suggestion.items()}
    kind, where = given.get("type"), given.get("destination", "")
    where = f" in {_DESTINATIONS.get(where, where)}" if where else ""
    if kind == "addRules":
        rules = emit_event.objects_in(suggestion.get("rules"))
        parts = ((it.get("toolName"), it.get("ruleContent")) for it in rules)
        names = [text_of(tool) + (f"({text_of(rule)})" if rule else "") for tool, rule in parts]
        words = f"{given.get('behavior', 'allow')} {', '.join(names)}"
    elif kind == "setMode":
        words = f"switch to the mode {given.get('mode')}"
    elif kind == "addDirectories" and isinstance(suggestion.get("directories"), list):
        words = f"allow work in {', '.join(map(text_of, suggestion['directories']))}"
    else:
        words = text_of(suggestion)
    return " ".join((words + where).split())  # whole: all of it is allowed


# ---------------------------------------------------------------------------
# Notifications: messages to people, to a phone or a chat, about waits, failures and limits
#
# NoticeBook decides what is due, from the sessions and the time, without I/O. Notifier sends, in one thread,
# and saves what was sent, so that a restart sends nothing twice. The rest happens in the loop thread.
# ---------------------------------------------------------------------------

NOTICE_DEADLINE_S = 10.0  # of one attempt to send
NOTICE_PAUSES_S = (2.0, 30.0)  # after the first and the second failed attempt; the third one is the last
NOTICE_QUEUE_MS = 600_000  # a message that could not be sent for this long is dropped; so is an old end
NOTICE_AGE_MS = 12 * 3_600_000  # what began earlier is no news to a monitor that starts
LIMIT_PERCENT = 80  # of a context or an account's limit
LIMIT_LABELS = {"fiveHour": "account, 5 hours", "sevenDay": "account, 7 days"}


class Notice(NamedTuple):
    """A fact that people may want to know while it holds; `key` is the same after a restart."""

    key: str
    kind: str  # of NOTICE_KINDS, or "test"; "": what was sent still holds, and is no news
    session_id: str
    label: str
    machine: str
    detail: str
    since: int  # ms; 0: not known


class Delivery(NamedTuple):
    """A message to one target: that something holds or, if `over`, no longer does."""

    target: NotifyTarget
    notice: Notice
    over: bool
    queued_at: int  # ms
    attempts: int = 0


def notices_of(session: Session, context_percent: float | None) -> list[Notice]:
    """Return the notices of a session that hold now."""
    about = session.session_id, session.label[0], session.machine_id
    found: list[Notice] = []

    def add(part: str, kind: str, detail: str, since: int) -> None:
        began = since * (kind != "collision")  # each edit renews it
        found.append(Notice(_notice_key(about[0], part, began), kind, *about, detail, since))

    for it in session.waits if session.state == "waiting" else ():
        kind = "plan" if it.tool == "ExitPlanMode" else it.kind
        detail = ": ".join(filter(None, (it.tool, it.detail)))
        add(f"wait {it.agent_id}", kind, detail, it.since)  # the kind may change
    if session.reason and session.state in ("failed", "ended"):
        add(session.state, session.state, session.reason.detail, session.state_since)
    for stuck in stuck_signals(session):
        add(stuck["kind"], "stuck", stuck["detail"], stuck["since"])
    since = _busy_since(session)
    if session.state == "waiting" and session.clock - since >= STUCK_MS:
        add("long", "", "", since)  # it goes on after the wait
    for (path, other), (_, at) in session.collisions.items():
        if session.session_id < other and session.state != "ended":  # one message for both
            add(f"collision {path} {other}", "collision", path, at)
    if session.state != "ended" and (context_percent or 0) >= LIMIT_PERCENT:
        add("context", "limit", f"context {context_percent:.0f} % full", 0)
    return [] if session.hidden or session.demo else found


def limit_notices(accounts: Sequence[JsonObject], names: Mapping[str, str]) -> list[Notice]:
    """Return the limits that are nearly reached, of the accounts in the status; `names`: by machine key."""
    found = []
    windows = ((name, it[name], it["machines"]) for it in accounts for name in LIMIT_WINDOWS if name in it)
    for name, it, keys in windows:
        if it["percent"] >= LIMIT_PERCENT:
            machines = ", ".join(sorted({names[key] for key in keys if key in names})) or "another machine"
            about = "limit", "", LIMIT_LABELS[name], machines, f"{it['percent']:.0f} % used", 0
            found.append(Notice(_notice_key(name, keys[0], it["resetsAt"]), *about))
    return found


def _notice_key(*parts: Any) -> str:
    return hashlib.sha256(encode_json(parts)).hexdigest()[:24]


class NoticeBook:
    """What holds now, and what was sent of it."""

    def __init__(self, targets: Sequence[NotifyTarget], sent: dict[str, JsonObject]) -> None:
        self.targets = targets
        self.sent = sent  # key → {"to": [ids of targets], "notice": without its detail}, for the next start
        # Session id ("": accounts) → key → (what holds, ids of targets for which it was queued)
        self.open: dict[str, dict[str, tuple[Notice, set[str]]]] = {}

    def update(self, session_id: str, notices: Sequence[Notice], time_ms: int) -> None:
        """Record what holds for a session now."""
        before, after = self.open.pop(session_id, {}), {}
        for it in notices:
            limit = NOTICE_QUEUE_MS if it.kind == "ended" else NOTICE_AGE_MS
            if it.key in before:
                after[it.key] = it._replace(since=before[it.key][0].since), before[it.key][1]
            elif it.key in self.sent or not it.since or time_ms - it.since <= limit:
                since = min(it.since or time_ms, time_ms)
                after[it.key] = it._replace(since=since), set(self.sent.get(it.key, {"to": ()})["to"])
        if after:
            self.open[session_id] = after

    def holds(self, key: str) -> bool:
        """True if what a message says still holds."""
        return any(key in notices for notices in self.open.values())

    def due(self, time_ms: int, clock: str, is_seen: bool) -> list[Delivery]:
        """Return the messages to send now, each once. `clock` as "22:30"; `is_seen`: a page is visible."""
        messages = []
        for notice, queued in itertools.chain(*(notices.values() for notices in self.open.values())):
            for it in self.targets:
                # What lasts less than a second may have been answered by a hook.
                lasts = time_ms - notice.since >= max(it.after_ms, 1000)
                may_send = not it.is_quiet(clock) and not (it.unless_seen and is_seen)
                if lasts and may_send and notice.kind in it.kinds and it.id not in queued:
                    queued.add(it.id)
                    messages.append(Delivery(it, notice, False, time_ms))
        for key in [key for key in self.sent if not self.holds(key)]:
            record = self.sent.pop(key)
            notice = Notice(key, *record["notice"])
            able = (it for it in self.targets if it.format == "ntfy" and it.id in record["to"])
            messages += [Delivery(it, notice, True, time_ms) for it in able if notice.kind != "ended"]
        return messages

    def record(self, message: Delivery) -> None:
        """Record that a message was sent, and is to be ended."""
        record = {"to": [], "notice": message.notice._replace(detail="")[1:]}
        self.sent.setdefault(message.notice.key, record)["to"].append(message.target.id)


def message_words(message: Delivery) -> tuple[str, str, str]:
    """Return (title, text, link) of a message without control characters; none begins like an option."""

    def plain(text: str, limit: int = 80) -> str:
        text = emit_event.redact_text(text)
        return one_line("".join(char if char.isprintable() else " " for char in text), limit)

    notice, target = message.notice, message.target
    title = NOTICE_KINDS.get(notice.kind, "Test")
    title = f"Over: {title[0].lower()}{title[1:]}" if message.over else title
    text = f"On {plain(notice.machine)}"
    if target.content and notice.detail:
        text += f": {plain(notice.detail, 300)}"
    link = f"{target.link}#{urllib.parse.urlencode({'s': notice.session_id})}" if target.link else ""
    return f"{title}: {plain(notice.label)}", text, link


_SLACK_SAFE = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "@\u200b", "]": "]\u200b"})
# (sent, words without the address, pause in s before another attempt; None: there is none)
SendOutcome = tuple[bool, str, Union[float, None]]


def http_request(message: Delivery) -> tuple[str, bytes, dict[str, str]]:
    """Return (URL, body, headers) of the request that sends a message to its target."""
    target, notice, (title, text, link) = message.target, message.notice, message_words(message)
    parts = urllib.parse.urlsplit(target.url)
    user, _, place = parts.netloc.rpartition("@")
    headers = {"Content-Type": "application/json", "User-Agent": f"contextuate/{__version__}"}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(urllib.parse.unquote(user).encode()).decode()}"
    if target.format == "ntfy":
        headers["Title"] = f"=?utf-8?b?{base64.b64encode(title.encode()).decode()}?="
        # A later message with the same sequence replaces this one.
        headers |= {"Content-Type": "text/plain; charset=utf-8", "X-Sequence-ID": notice.key}
        headers |= {"Priority": "min"} if message.over else {"Click": link} if link else {}
        body = text.encode()
    elif target.format == "slack":
        words = "\n".join(filter(None, (title, text, link)))
        body = encode_json({"text": words.translate(_SLACK_SAFE), "mrkdwn": False})
    else:
        names = {"id": notice.key, "kind": notice.kind, "sessionId": notice.session_id, "link": link or None}
        body = encode_json({"title": title, "text": text, **names, "since": notice.since or None})
    return parts._replace(netloc=place, fragment="").geturl(), body, headers


def post_message(message: Delivery) -> SendOutcome:
    """Send a message to a URL once."""
    import urllib.error
    import urllib.request  # 0.5 MB that a monitor without such a target does not need

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:  # another server must not get the message
            return None

    try:
        request = urllib.request.Request(*http_request(message))
        with urllib.request.build_opener(NoRedirect).open(request, timeout=NOTICE_DEADLINE_S) as response:
            return True, f"answered {response.status}", None
    except urllib.error.HTTPError as error:
        error.close()
        wait, code = error.headers.get("Retry-After") or "0", error.code
        words = f"answered {code}" + "; redirects are not followed" * (code // 100 == 3)
        may_retry = code in (408, 429) or code >= 500
        pause_s = min(float(wait), NOTICE_QUEUE_MS / 1000) if wait.isdecimal() else 0.0
        return False, words, pause_s if may_retry else None


def run_message(message: Delivery) -> SendOutcome:
    """Run a target's command once."""
    values = dict(zip(("title", "text", "link"), message_words(message)), kind=message.notice.kind)
    values = {name: text.replace("<", "‹") for name, text in values.items()}  # notify-send knows tags
    fill = functools.partial(re.sub, r"\{(title|text|kind|link)\}", lambda match: values[match[1]])
    null, command = subprocess.DEVNULL, list(map(fill, message.target.command))
    process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    try:
        status = process.wait(NOTICE_DEADLINE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return status == 0, f"ended with status {status}", 0.0


def attempt(message: Delivery) -> SendOutcome:
    """Send a message once."""
    send = run_message if message.target.command else post_message
    try:
        outcome: SendOutcome = emit_event.within(NOTICE_DEADLINE_S + 1, lambda: send(message))
    except Exception as error:  # the network, TLS, the program, a value that it does not take
        reason: Any = getattr(error, "reason", error)
        words = getattr(reason, "verify_message", None) or getattr(reason, "strerror", None)
        words = words or (str(error) if isinstance(error, TimeoutError) else type(reason).__name__)
        outcome = False, words, 0.0
    return outcome


class Notifier:
    """Sends what is due, one message at a time; while a target rests after a failure, others are served."""

    def __init__(self, targets: Sequence[NotifyTarget], path: str, loop: EventLoop) -> None:
        self.targets, self._path, self._loop = targets, path, loop
        self.kinds = frozenset(("", *(kind for target in targets for kind in target.kinds)))
        self._results: dict[str, JsonObject] = {}  # target's id → {ok, at, words} of its last attempt
        self._rests: dict[str, float] = {}  # target's id → time.monotonic() of its next attempt
        self._queue: list[Delivery] = []
        self._running: tuple[Delivery, concurrent.futures.Future[SendOutcome]] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "notify")
        sent: dict[str, JsonObject] = {}
        with contextlib.suppress(AttributeError, LookupError, TypeError):  # a damaged file
            for key, it in emit_event.read_state(path)["sent"].items():
                sent[key] = {"to": [*it["to"]], "notice": Notice(key, *it["notice"][:6])[1:]}
        self._book = NoticeBook(targets, sent)

    def look(self, current: Mapping[str, list[Notice]], is_seen: bool) -> None:
        """Record what now holds for sessions, and send what is due; `is_seen`: a page is visible."""
        time_ms = now_ms()
        for session_id, notices in current.items():
            self._book.update(session_id, [it for it in notices if it.kind in self.kinds], time_ms)
        self._queue += self._book.due(time_ms, time.strftime("%H:%M"), is_seen)
        self._send_next()

    def test(self) -> concurrent.futures.Future[JsonObject]:
        """Send a message to every target now; the result has {name, ok, words} of each."""
        notice = Notice(uuid.uuid4().hex, "test", "", "it works", emit_event.this_machine(), "", 0)

        def send() -> JsonObject:
            results = []
            for target in self.targets:
                is_sent, words, _ = attempt(Delivery(target, notice, False, 0))
                self._loop.call_soon(functools.partial(self._note, target, is_sent, words))
                results.append({"name": target.name, "ok": is_sent, "words": words})
            return {"type": "notify_tested", "results": results}

        return self._thread.submit(send)

    def status(self) -> list[JsonObject]:
        """Return the last result of each target: {name, ok, at, words}; ok is None before the first one."""
        unused = {"ok": None, "at": None, "words": "nothing sent since the start"}
        return [{"name": it.name, **self._results.get(it.id, unused)} for it in self.targets]

    def close(self) -> None:
        """Wait for the current attempt, and save its outcome."""
        self._queue.clear()
        self._thread.shutdown(wait=True)
        self._finish()

    def _send_next(self) -> None:
        """Send the first message whose target does not rest; drop those that are old or no longer true."""
        if self._running is not None:
            return
        waiting, self._queue = self._queue, []
        for message in waiting:
            if self._book.holds(message.notice.key) is message.over:
                continue
            if now_ms() - message.queued_at > NOTICE_QUEUE_MS:
                self._note(message.target, False, f"not sent within {human_duration(NOTICE_QUEUE_MS)}")
            elif self._running is None and self._rests.get(message.target.id, 0.0) <= time.monotonic():
                self._running = message, self._thread.submit(attempt, message)
                self._running[1].add_done_callback(lambda _: self._loop.call_soon(self._finish))
            else:
                self._queue.append(message)

    def _finish(self) -> None:
        """Take the outcome of the running attempt; save it, or try again later."""
        if self._running is None:
            return
        (message, future), self._running = self._running, None
        is_sent, words, pause_s = future.result()
        if is_sent and not message.over:
            self._book.record(message)
        elif not is_sent and pause_s is not None and message.attempts < len(NOTICE_PAUSES_S):
            pause_s = max(pause_s, NOTICE_PAUSES_S[message.attempts])
            self._rests[message.target.id] = time.monotonic() + pause_s
            self._queue.insert(0, message._replace(attempts=message.attempts + 1))
            words += "; trying again"
        self._note(message.target, is_sent, words)
        try:
            emit_event.write_atomically(self._path, encode_json({"sent": self._book.sent}))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error.strerror)
        self._send_next()

    def _note(self, target: NotifyTarget, is_sent: bool, words: str) -> None:
        if self._results.get(target.id, {}).get("ok") is not is_sent:
            log.log(logging.INFO if is_sent else logging.WARNING, "notify: %s: %s", target.name, words)
        self._results[target.id] = {"ok": is_sent, "at": now_ms(), "words": words}


# ---------------------------------------------------------------------------
# The Monitor: what wires them
#
# hook → ingest → journal → acknowledgement → sessions → clients, one batch a turn of the loop. Every
# consumer of the journal has a position: a start restores the sessions' snapshots and applies later events.
# ---------------------------------------------------------------------------

UPDATE_INTERVAL_S = 0.1
SENT_UPDATES = 256  # that are kept, so that the next ones have only what changed
TICK_INTERVAL_S = 1.0
STATUS_INTERVAL_S = 4.0  # to notice what no part reports, such as a full spool
STATUS_AGE_S = 0.1
SNAPSHOT_INTERVAL_S = 30.0
REGISTRY_REST_S = 5.0  # between two polls while no client runs
SECOND_CALL_MS, SECOND_PROMPT_MS = 5000, 500  # a hook that is registered twice runs twice within this time
CATCH_UP_EVENTS = 2000
CONTAINERS_INTERVAL_S = 2.0  # at least, between two searches for the processes of containers
CONTAINER_NAME = re.compile("[0-9a-f]{12}")  # as engines name a container that was given no name
MACHINES_SHOWN = 1000  # in the status; of the others the number
LOADING = "stored sessions are still being read; try again in a moment"
ASKING_LINE = re.compile(rb'\{"id":"([0-9a-f-]{36})",[^{]*"answerable":\d+,[^{]*"hook":\{')  # its hook waits


class CommandError(Exception):
    """A command failed, or the monitor cannot start; the message says why and what to do."""


@dataclasses.dataclass
class HookPort:
    """The Unix socket that hooks of this user send events to, one a line, each acknowledged with one byte.

    `received` gets each line and its connection, which is not read again before its lines are acknowledged.
    """

    loop: EventLoop
    path: str
    received: Turns
    connections: dict[socket.socket, LineSplitter] = dataclasses.field(default_factory=dict)
    waiting: dict[socket.socket, int] = dataclasses.field(default_factory=dict)  # its lines to be stored
    paused: set[socket.socket] = dataclasses.field(default_factory=set)  # not watched until these are stored

    def __post_init__(self) -> None:
        in_use = f"another monitor uses {self.path}"
        self._lock = lock_file(self.path + ".lock", lambda: in_use + stop_advice(self.path))
        self._listener: socket.socket | None = None

    def listen(self) -> None:
        """Bind the socket, which is locked already, and accept connections; pause after an error."""
        listener = self._listener = bind_unix(self.path)
        listener.setblocking(False)
        self._inode = os.stat(self.path).st_ino

        def accept(_events: int) -> None:
            for _ in range(128):
                try:
                    sock, _address = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    return
                except OSError as error:  # too many open files
                    log.warning("a connection cannot be accepted (%s); trying again", error)
                    self.loop.unwatch(listener)
                    self.loop.call_later(0.2, watch)
                    return
                sock.setblocking(False)
                if emit_event.peer_uid(sock) == os.getuid() and len(self.connections) < INGEST_CONNECTIONS:
                    self.connections[sock] = LineSplitter()
                    self._watch(sock)
                else:
                    sock.close()

        watch = functools.partial(self.loop.watch, listener, selectors.EVENT_READ, accept)
        watch()

    def _watch(self, sock: socket.socket) -> None:
        self.loop.watch(sock, selectors.EVENT_READ, lambda _events: self._read(sock))

    def _read(self, sock: socket.socket) -> None:
        if self.waiting.get(sock):
            self.loop.unwatch(sock)
            self.paused.add(sock)
            return
        try:
            data = sock.recv(RECEIVE_BYTES)
            lines = self.connections[sock].feed(data or b"\n")  # EOF ends a line, too
        except BlockingIOError:
            return
        except (OSError, MemoryError):
            self.drop(sock)
            return
        self.waiting[sock] = len(lines)
        self.received.add(*((line, sock) for line in lines))
        if not data and not lines:
            self.drop(sock)

    def acknowledge(self, sock: socket.socket, count: int) -> None:
        """Acknowledge `count` more lines of a connection."""
        if sock not in self.connections:
            return  # dropped when an earlier line could not be stored
        self.waiting[sock] -= count
        try:
            with contextlib.suppress(BlockingIOError):  # the sender does not read its acknowledgements
                sock.send(emit_event.ACKNOWLEDGEMENT * count)
        except OSError:
            self.drop(sock)
        if sock in self.paused and self.waiting[sock] == 0:
            self.paused.discard(sock)
            self._watch(sock)

    def drop(self, sock: socket.socket) -> None:
        """Close a connection; a hook that waits for an acknowledgement then spools its event."""
        self.release(sock)
        sock.close()

    def release(self, sock: socket.socket) -> None:
        """Stop reading a connection without closing it."""
        self.connections.pop(sock, None)
        self.waiting.pop(sock, None)
        self.paused.discard(sock)
        self.loop.unwatch(sock)

    def restore(self) -> None:
        """Bind the socket again when it was removed."""
        if self._listener is not None and not os.path.exists(self.path):
            log.warning("%s was removed; it is bound again", self.path)
            removed = self._listener
            self.listen()
            self.loop.unwatch(removed)
            removed.close()

    def stop_listening(self) -> None:
        """Accept no more connections; open ones may still send."""
        if self._listener is not None:
            self.loop.unwatch(self._listener)
            self._listener.close()
            self._listener = None
            with contextlib.suppress(OSError):
                if os.lstat(self.path).st_ino == self._inode:
                    os.unlink(self.path)

    def close(self) -> None:
        """Close the connections and release the lock."""
        self.stop_listening()
        for sock in list(self.connections):
            self.drop(sock)
        unlock_file(self.path + ".lock", self._lock)


Deliver = Callable[[list[JsonObject]], bool]  # for other threads: returns whether the events are stored


def like_ours(given: JsonObject) -> JsonObject:
    """Return an event of the Node.js Contextuate emitter with our names; any other object as it is."""
    data = given.get("data")
    if not isinstance(given.get("eventType"), str) or not isinstance(data, dict):
        return given
    subagent, sums = data.get("subagent"), data.get("sessionTokenUsage")
    if "tool_output" in data and "toolOutput" not in data:
        data["toolOutput"] = data.pop("tool_output")
    is_agent = given.get("hookType") in ("SubagentStart", "SubagentStop") and "agentId" not in given
    if is_agent and isinstance(subagent, dict) and "parentSessionId" in given:
        given.update(agentId=given.get("sessionId"), agentType=subagent.get("type"))
        given["sessionId"] = given.pop("parentSessionId")
    if isinstance(sums, dict) and "usage" not in data:
        five, hour = (sums.get(f"cacheCreation{time}") for time in ("5m", "1h"))
        cached = sum(count for count in (five, hour) if type(count) is int)
        counts = {it: sums.get(it) for it in ("input", "output", "cacheRead")}
        counts.update(cacheCreation=cached, cacheCreation1h=hour)
        data["usage"] = {"models": {emit_event.id_or(data.get("model"), "unknown"): counts}, "agents": {}}
    return given


class Ingest:
    """Build events from received lines, store each once, and count them by machine."""

    def __init__(self, settings: Settings, journal: Journal, deliver: Deliver) -> None:
        self.counts = {"received": 0, "stored": 0, "duplicates": 0, "quarantined": 0}  # since the start
        self.machines: dict[str, JsonObject] = {}  # key → its part of the status, most recent last
        self.seen = SeenIds(2 * settings["redis.streamMaxLength"])
        self.own_answers: set[str] = set()  # ids of events of answers that are being stored
        self._first: dict[int, tuple[str, int]] = {}  # digest of an event's content → its id and timestamp
        self.deleted = DeletedIds(settings.path("deleted-ids"), self.seen.limit)
        self._journal, self._quarantine_path = journal, settings.path("quarantine.log")
        self._machine_id, self._machine_key = settings.machine_id, settings.machine_key
        self._privacy, self.registry = settings.privacy, RegistryThread(settings.machine_key, deliver)
        self._usage = emit_event.UsageWorker(settings.home, deliver, not settings.privacy.metadata_only)
        self._noted: dict[tuple[str, str], Any] = {}  # see emit_event.add_agent_note

    def take(
        self, lines: Sequence[bytes], remote: bool = False, late: Sequence[bool] = ()
    ) -> tuple[list[bool], list[StoredEvent]]:
        """Store lines; return for each whether it is settled (or no event), and the stored events."""
        # `remote`: through Redis, where others may publish. `late`: it waited, so it measures no clock.
        received_ms = now_ms()
        fresh: dict[str, tuple[int, JsonObject, bytes]] = {}  # event id → number of its line, event, encoded
        self.counts["received"] += len(lines)
        settled = [True] * len(lines)
        for number, line in enumerate(lines):
            try:
                if len(line) > emit_event.LINE_LIMIT_BYTES:
                    raise MalformedEvent(f"longer than {emit_event.LINE_LIMIT_BYTES} bytes")
                event, text = self._build(line, remote, received_ms)
            except MemoryError:
                log.error("out of memory: an event of %d bytes is left to its sender", len(line))
                settled[number] = False
                continue
            except Exception as error:  # no event may stop the stream
                self._quarantine(line, error)
                continue
            ids = {event["id"], self._first_id(event, text)}
            is_known = any(it in fresh or it in self.seen or it in self.deleted.ids for it in ids)
            if is_known and (remote or "imported" not in event):  # an import looks at what is stored itself
                self.counts["duplicates"] += 1
                continue
            gone, is_back = event["sessionId"] in self.deleted.ids, event["hookType"] or "imported" in event
            if gone and is_back:  # only what its hooks report, or an import, brings a deleted session back
                del self.deleted.ids[event["sessionId"]]
                self.deleted.add(())
            elif gone and event["eventType"] == "client_status":
                continue
            if late and late[number]:
                event["spooled"] = True
                text = text[:-1] + b',"spooled":true}'
            fresh[event["id"]] = number, event, text
        numbers, events, encoded = zip(*fresh.values()) if fresh else ((), (), ())
        stored = []
        for number, entry in zip(numbers, self._journal.append(events, received_ms, encoded)):
            settled[number] = entry is not None
            if entry is not None:
                stored.append(entry)
                self.seen.add(entry.event["id"])
                self._count(entry, received_ms)
        self.counts["stored"] += len(stored)
        return settled, stored

    def forget_machines(self, since_ms: int) -> None:
        """Forget the machines that sent nothing since then."""
        self.machines = {name: it for name, it in self.machines.items() if it["lastSeen"] >= since_ms}

    def read_transcripts(self, session_id: str, is_over: bool = True) -> None:
        """Read on in the transcript of a session's last event: its client was killed, or we were away."""
        newest = itertools.islice(readable(self._journal.lines(session_id, backwards=True)), 100)
        named = (event for _, event, _ in newest if "transcriptPath" in event["data"])
        for event in itertools.islice(named, 1):
            self._usage.put({**event, "hookType": "SessionEnd"} if is_over else event)

    def close(self) -> None:
        """Stop the reader of transcripts; log the number of events by machine."""
        for machine in sorted(self.machines.values(), key=operator.itemgetter("machineId")):
            log.info("%d events from machine %s since the start", machine["events"], machine["machineId"])
        self._usage.close()
        self.registry.close()

    def _build(self, line: bytes, remote: bool, received_ms: int) -> tuple[JsonObject, bytes]:
        """Parse, build, redact and encode one event; raise MalformedEvent."""
        given = emit_event.parse_event_line(line)
        given = like_ours(given) if "eventType" in given else given
        event = emit_event.build_event(given, received_ms, "unknown" if remote else self._machine_id)
        event.pop("spooled", None)  # only the monitor sets it
        if event["eventType"] == "answer" and event["id"] not in self.own_answers:
            event["eventType"] = "message"  # a program must not pretend that a person has answered
        if remote:
            event.pop("demo", None)  # other machines may not rename, hide or delete sessions here
            if "session_meta" in (event["eventType"], effective_type(event)):
                event.update(eventType="message", hookType="")
        else:
            data, name = event.pop("data"), event["machineId"]
            if name == self._machine_id or name == emit_event.this_machine():  # renamed since the start
                event.setdefault("machineKey", self._machine_key)
            event["data"] = data  # the last one: what is before it is not searched for secrets
            if "sessionTokenUsage" in data and os.path.exists(text_of(data.get("transcriptPath"))):
                data.pop("usage", None)  # the transcript is exact: it counts each message once
            if "agentId" in event:
                emit_event.add_agent_note(event, self._noted)
            emit_event.add_git_place(event)
            self._usage.put(event)  # for remote events, the publisher reads transcripts and registry
            if event["hookType"] in ("SessionStart", "UserPromptSubmit", "Stop"):
                self.registry.learn(event)
        return emit_event.protect(event, self._privacy)

    def _first_id(self, event: JsonObject, encoded: bytes) -> str:
        """Return the id of the prompt or call that a hook registered twice delivers again, else its own."""
        data, own = event["data"], (str(event["id"]), event["timestamp"])
        is_prompt = event["hookType"] == "UserPromptSubmit" and ("pid" in event or "prompt_id" in data)
        if not (is_prompt or data.get("toolUseId")):
            return own[0]
        within_ms = SECOND_PROMPT_MS if is_prompt else SECOND_CALL_MS
        place = event["sessionId"], event.get("agentId"), event["hookType"]
        digest = hash((place, encoded[encoded.find(b',"data":') :]))
        first = self._first.pop(digest, own)
        self._first[digest] = first = first if abs(own[1] - first[1]) <= within_ms else own
        _drop_oldest(self._first, 4096)
        return first[0]

    def _quarantine(self, line: bytes, error: Exception) -> None:
        self.counts["quarantined"] += 1
        shown, reason, trace = emit_event.shown_head(line, 200, self._privacy), str(error), None
        if not isinstance(error, MalformedEvent):  # its text may quote content
            reason, trace = type(error).__name__, None if self._privacy.metadata_only else error
        log.warning("not an event (%s): %r", reason, shown, exc_info=trace)
        try:
            emit_event.keep_in_quarantine(self._quarantine_path, line, reason, self._privacy)
        except OSError as trouble:
            log.warning("the quarantine could not be written: %s", trouble)

    def _count(self, entry: StoredEvent, received_ms: int) -> None:
        event, name = entry.event, entry.event["machineId"]
        key = event.get("machineKey") or name
        if (machine := self.machines.pop(key, None)) is None:
            log.info("first event from machine %s (%s)", name, key)
            machine = {"machineKey": key, "events": 0, "dropped": 0}
        self.machines[key] = machine
        machine.update(machineId=name, events=machine["events"] + 1, lastSeen=received_ms)
        dropped = event["data"].get("spoolDropped")
        if isinstance(dropped, int) and 0 < dropped < 1 << 31:
            machine["dropped"] += dropped
            log.warning("machine %s dropped %d events: its spool was full", name, dropped)
        if log.isEnabledFor(logging.DEBUG):
            what, tool = event["hookType"] or event["eventType"], text_of(event["data"].get("toolName"))
            log.debug("event %d from %s, session %s: %s %s", entry.seq, name, event["sessionId"], what, tool)


class RegistryThread(threading.Thread):
    """Reads the registry of this machine's clients, whose disk may be slow; calls `deliver` with events."""

    def __init__(self, machine_key: str, deliver: Deliver) -> None:
        super().__init__(name="registry", daemon=True)
        self.watcher, self._deliver = emit_event.RegistryWatcher(machine_key), deliver
        self._wake, self._closing = threading.Event(), threading.Event()

    def learn(self, event: JsonObject) -> None:
        """Read the registry of the event's client too; at once, if the client may be new."""
        self.watcher.learn(event)
        if not self.watcher.clients:
            self._wake.set()

    def close(self) -> None:
        """End the thread."""
        self._closing.set()
        self._wake.set()
        if self.is_alive():
            self.join(1)

    def run(self) -> None:
        """Deliver changes of clients' statuses until `close`."""
        events: list[JsonObject] = []  # not stored yet
        while not self._closing.wait(emit_event.REGISTRY_POLL_S):
            try:
                events += self.watcher.poll(now_ms())
                events = [] if self._deliver(events) else events
            except Exception:  # unexpected: log and continue
                log.exception("the registry of clients could not be read")
            if not self.watcher.clients:
                self._wake.wait(REGISTRY_REST_S)
            self._wake.clear()


@dataclasses.dataclass
class SessionFeed:
    """Send clients the changed sessions, together and at most every UPDATE_INTERVAL_S, or all sessions."""

    loop: EventLoop
    sessions: Sessions
    clients: WebSocketServer
    changed: dict[str, None] = dataclasses.field(default_factory=dict)  # ids whose update is still to be sent
    sent: dict[str, JsonObject] = dataclasses.field(default_factory=dict)  # the last updates, by session id
    updates_due: bool = False

    def send(self, stored: Sequence[StoredEvent] = ()) -> None:
        """Send events, and the changed sessions now or together at the end of the interval."""
        whole = changes = b""
        if self.changed and not self.updates_due:
            self.updates_due = True
            self.loop.call_later(UPDATE_INTERVAL_S, self._end_interval)
            sessions = [it for it in map(self.sessions.sessions.get, self.changed) if it is not None]
            self.changed.clear()
            children = self.sessions.children() if len(sessions) > 1 else None
            clients, changed = self.clients.clients.values(), []
            rows = [self.sessions.to_json(session, children) for session in sessions if clients]
            for row in rows:
                before = self.sent.pop(row["sessionId"], {})
                names = (it for it in row if it == "sessionId" or it not in before or before[it] != row[it])
                changed.append({name: row[name] for name in names})
                self.sent[row["sessionId"]] = row
            _drop_oldest(self.sent, SENT_UPDATES if clients else 0)
            is_whole = not all(client.changes for client in clients)
            whole, changes = (
                text_frames([encode_json({"type": "session_update", "session": row}) for row in kind], in_one)
                for kind, in_one in ((rows if is_whole else (), False), (changed, True))
            )
        self.clients.broadcast(stored, whole, changes)

    def _end_interval(self) -> None:
        self.updates_due = False
        self.send()

    def send_list(self) -> None:
        """Send all sessions to every client; the list may be large and does not count as falling behind."""
        self.changed.clear()
        self.sent.clear()
        clients = [client for client in self.clients.clients.values() if client.view is not None]
        for with_hidden in {client.show_hidden for client in clients}:
            message = b"".join(encode_with_sessions({"type": "sessions_updated"}, self.sessions, with_hidden))
            for client in [client for client in clients if client.show_hidden == with_hidden]:
                self.clients.send(client, encode_frame(Opcode.TEXT, message), is_reply=True)


class Retention:
    """Deletes events beyond the configured age or size, in a thread; all else is in the loop thread."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor, self._settings = monitor, monitor.settings
        self.events_added = 0  # bytes since the start, less what the user deleted
        self.clock = ClockMemory(self._settings.path("clock.json"))  # to be compared at least once a second
        self._plan: RetentionPlan | None = None  # the last one
        self._measured_at = 0  # `events_added` at the time of the plan, plus what the plan deleted
        self._error: str | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "retention")

    def prune(self, dry_run: bool = False) -> concurrent.futures.Future[JsonObject]:
        """Plan what to delete, and delete it unless `dry_run`; return the reply to `prune`."""
        sessions, added, home = self._monitor.sessions.sessions, self.events_added, self._settings.home
        kept = frozenset(session_file_name(it.session_id) for it in sessions.values() if it.pinned)
        days, limit = self._settings["retention.days"], self._settings["retention.maxMegabytes"]
        self.clock.compare(self._monitor.journal.seq, save=True)
        time_ms, steps = now_ms(), self.clock.steps

        def work() -> JsonObject:
            try:
                plan = plan_retention(home, time_ms, days, limit and limit << 20, kept, steps)
                gone = frozenset() if dry_run else delete_planned(home, plan)
            except OSError as error:
                self._error = f"old events cannot be deleted: {error}"
                log.warning("%s", self._error)
                raise RequestError(503, self._error) from None
            self._monitor.loop.call_soon(lambda: finish(plan, gone))  # before the reply is sent
            return {"type": "pruned", **plan.to_json(dry_run)}

        def finish(plan: RetentionPlan, gone: frozenset[str]) -> None:
            self._plan, self._error = plan, None
            self._measured_at = added if dry_run else added + plan.size
            if plan.files and not dry_run:
                days = f"{plan.days[0]} to {plan.days[-1]}"
                log.info("%d files of %s deleted, %s", len(plan.files), days, human_size(plan.size))
            self._monitor.forget_files(gone)

        return self._thread.submit(work)

    def disk_use(self, index_size: int) -> JsonObject | None:
        """Return the disk use for the status, None before the first plan; `index_size`: the current one."""
        if (plan := self._plan) is None:
            return {"error": self._error} if self._error else None
        since = self.events_added - self._measured_at
        return {
            "bytes": max(0, plan.total - plan.index_size + since + index_size),
            "limitBytes": (self._settings["retention.maxMegabytes"] or 0) << 20 or None,
            "eventsBytes": max(0, plan.events + since),
            "indexBytes": index_size,
            "oldestDay": plan.oldest_day,
            "overLimit": plan.is_over,
            "error": self._error,
        }

    def close(self) -> None:
        """End the thread after its current work."""
        self._thread.shutdown(wait=True)


Answer = Union[JsonObject, bytes, "concurrent.futures.Future[JsonObject]", None]


class MessageHandlers:
    """Handlers of client messages, `_on_` a type, or a line of META; each returns a message or None."""

    QUESTIONS = frozenset(
        "subscribe unsubscribe get_sessions set_show_hidden get_events get_all_recent_events "
        "get_event_detail search reconnect_redis send_test_event set_visible notify_test".split()
    )
    # Action of the user on a session → data of the stored event
    META: dict[str, Callable[[Session, JsonObject], JsonObject]] = {
        "rename_session": lambda session, message: {"action": "rename", "label": message["label"][:200]},
        "toggle_pin": lambda session, message: {"action": "pin", "pinned": not session.pinned},
        "hide_session": lambda session, message: {"action": "hide", "hidden": True},
        "unhide_session": lambda session, message: {"action": "hide", "hidden": False},
        "mark_seen": lambda session, message: {"action": "seen"},
    }
    FIELDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (  # names, what is expected, its check
        ("sessionId eventId parentSessionId", "text", lambda it: isinstance(it, str) and it != ""),
        ("label", "text, perhaps empty", lambda it: isinstance(it, str)),
        ("sessionIds", "a list of texts", lambda it: isinstance(it, list) and {*map(type, it)} <= {str}),
        ("limit before since seq from to", *integer_key(0, 0, 1 << 53)[1:]),
        ("view", '"full" or "rows"', lambda it: it in ("full", "rows")),
    )
    NEEDED = (  # type.field
        "unsubscribe.sessionIds get_events.sessionId get_event_detail.sessionId get_event_detail.eventId "
        "rename_session.label answer.sessionId answer.eventId".split()
    )

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def greet(self, client: Client) -> None:
        """Send a new client the greeting."""
        settings, seq = self._monitor.settings, self._monitor.journal.seq
        about = {"version": __version__, "mode": settings["mode"], "machineId": settings.machine_id}
        about["mayAnswer"] = client.pairing != ""
        self._reply(client, {}, {"type": "hello", **about, "seq": seq, "wsProtocol": 1})

    def take(self, client: Client, data: str | bytes) -> None:
        """Carry out one WebSocket message and answer it."""
        if isinstance(data, bytes):
            self._monitor.clients.close(client, CloseCode.UNSUPPORTED_DATA, "messages are JSON text")
            return
        try:
            message = emit_event.parse_event_line(data.encode("utf-8", "surrogatepass"))
        except MalformedEvent as error:
            self._reply(client, {}, error)
        else:
            self._carry_out(client, message, functools.partial(self._reply, client, message))

    def take_by_http(self, message: JsonObject) -> JsonObject:
        """Carry out one message for POST /api/message, in an HTTP thread; raise RequestError."""
        kind = emit_event.id_or(message.get("type"), "")
        if kind in ("subscribe", "unsubscribe", "set_show_hidden", "set_visible", "get_sessions"):
            raise RequestError(400, "this message is for a WebSocket")
        client = Client(socket.socket.__new__(socket.socket))  # a stand-in: nothing is sent to it
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._monitor.loop.call_soon(lambda: self._carry_out(client, message, done.set_result))
        if isinstance(answer := done.result(120), Exception):
            raise answer
        return with_request_id(message, answer or {"type": "done"})

    def _carry_out(self, client: Client, message: JsonObject, done: Callable[[Any], None]) -> None:
        """Call `done` with the answer to a message, or the exception, in the loop thread."""
        kind, monitor = emit_event.id_or(message.get("type"), ""), self._monitor
        handler = getattr(self, f"_on_{kind}", self._act if kind in self.META else None)
        try:
            if handler is None:
                raise RequestError(400, f"unknown type {one_line(kind, 40)!r}")
            if monitor.loading is not None and kind not in self.QUESTIONS:
                raise RequestError(503, LOADING)
            for names, expected, is_good in self.FIELDS:
                for name in names.split():
                    value = message.get(name)
                    if f"{kind}.{name}" in self.NEEDED if value is None else not is_good(value):
                        raise RequestError(400, f"{name}: expected {expected}")
            answer = handler(client, message)
        except Exception as error:  # the client gets an error in any case
            answer = error
        if isinstance(answer, concurrent.futures.Future):
            call_soon = monitor.loop.call_soon
            answer.add_done_callback(lambda it: call_soon(lambda: done(it.exception() or it.result())))
        else:
            done(answer)

    def _reply(self, client: Client, message: JsonObject, answer: Any) -> None:
        """Send the answer to a message; an error names it, and its requestId comes back."""
        if isinstance(answer, Exception):
            words, kind = str(answer), message.get("type")
            if not isinstance(answer, (MalformedEvent, RequestError, SearchError)):  # e.g. an unreadable file
                log.error("a message could not be answered", exc_info=answer)
                words = f"could not be read: {words}"
            answer = {"type": "error", "message": words, "request": kind if isinstance(kind, str) else None}
        if isinstance(answer, dict):
            answer = encode_json(with_request_id(message, answer))
        if answer is not None:
            self._monitor.clients.send(client, encode_frame(Opcode.TEXT, answer), is_reply=True)

    def _on_subscribe(self, client: Client, message: JsonObject) -> None:
        journal, seq, since = self._monitor.journal, self._monitor.journal.seq, message.get("since")
        view, wanted = message.get("view") or "full", frozenset(message.get("sessionIds") or ()) or None
        if wanted is not None and client.view == view and client.session_ids is not None:
            wanted |= client.session_ids
        client.view, client.session_ids, client.changes = view, wanted, message.get("changes") is True
        resync = since is not None and not max(seq - CATCH_UP_EVENTS, journal.forgotten) <= since <= seq
        lines = () if since is None or resync else journal.lines(after=since)
        missed = [it for it in readable(lines) if wanted is None or it.event["sessionId"] in wanted]
        reply = {"type": "subscribed", "seq": seq, "resync": resync, "missed": len(missed)}
        self._reply(client, message, reply)
        status = encode_json({"type": "status", **self._monitor.status.to_json()})
        frames = text_frames([*event_messages(missed, view), status], client.changes)
        self._monitor.clients.send(client, frames, is_reply=True)

    def _on_unsubscribe(self, client: Client, message: JsonObject) -> None:
        if client.session_ids is not None:
            client.session_ids -= set(message["sessionIds"])

    def _on_get_sessions(self, client: Client, message: JsonObject) -> Answer:
        reply = with_request_id(message, {"type": "sessions"})
        self._monitor.feed.sent.clear()  # it may be newer than what was sent
        return b"".join(encode_with_sessions(reply, self._monitor.sessions, client.show_hidden))

    def _on_set_show_hidden(self, client: Client, message: JsonObject) -> Answer:
        client.show_hidden = message.get("showHidden") is True
        return self._on_get_sessions(client, message)

    def _on_get_events(self, client: Client, message: JsonObject) -> Answer:
        limit, before = min(message.get("limit") or 100, HISTORY_LIMIT), message.get("before")
        head: JsonObject = {"type": "all_events"}
        if message["type"] == "get_events":
            head = {"type": "events", "sessionId": message["sessionId"]}

        def read() -> JsonObject:
            lines = self._monitor.history.newest(limit + 1, head.get("sessionId"), before)
            found = readable(reversed(lines[:limit]))
            events = [event_row(event) if client.view == "rows" else event for _, event, _ in found]
            return {**head, "events": events, "more": len(lines) > limit}

        return self._monitor.reader.submit(read)

    _on_get_all_recent_events = _on_get_events

    def _on_get_event_detail(self, client: Client, message: JsonObject) -> Answer:
        session_id, event_id = message["sessionId"], message["eventId"]

        def read() -> JsonObject:
            line = self._monitor.journal.find(event_id, session_id, message.get("seq"))
            event = parse_stored(line) if line is not None else None
            offers = emit_event.objects_in(event["data"].get("permission_suggestions")) if event else []
            about = {"type": "event_detail", "sessionId": session_id, "eventId": event_id}
            return {**about, "event": event, "offers": list(map(suggestion_words, offers))}

        return self._monitor.reader.submit(read)

    def _on_search(self, client: Client, message: JsonObject) -> Answer:
        wanted = {**message, "q": message.get("query"), "type": message.get("eventType")}
        history, query = self._monitor.history, self._monitor.search_query(wanted)
        return self._monitor.reader.submit(lambda: {"type": "search_results", **history.search(query)})

    def _on_reconnect_redis(self, client: Client, message: JsonObject) -> Answer:
        if not self._monitor.redis:
            raise RequestError(400, "the monitor runs in local mode: there is no Redis to connect to")
        self._monitor.redis.reconnect()
        return {"type": "status", **self._monitor.status.to_json()}

    def _on_set_visible(self, client: Client, message: JsonObject) -> None:
        client.visible = message.get("visible") is True
        self._monitor.answers.look()

    def _on_notify_test(self, client: Client, message: JsonObject) -> Answer:
        if not self._monitor.notifier.targets:
            raise RequestError(400, 'no target is configured: add "notify" to the configuration')
        return self._monitor.notifier.test()

    def _on_send_test_event(self, client: Client, message: JsonObject) -> None:
        self._monitor.take_now(encode_json(test_event()))

    def _on_answer(self, client: Client, message: JsonObject) -> Answer:
        answers = self._monitor.answers
        asked = message["sessionId"], message["eventId"], message.get("answer")
        return answers.threads.submit(lambda: answers.answer(*asked, answers.check_page(client)))

    def _on_end_pairing(self, client: Client, message: JsonObject) -> None:
        self._monitor.answers.end_pairing(text_of(message.get("pairing")))

    def _act(self, client: Client, message: JsonObject) -> None:
        session = self._session(message)
        self._store_action(session, self.META[message["type"]](session, message))

    def _on_set_parent(self, client: Client, message: JsonObject) -> None:
        session, parent = self._session(message), message.get("parentSessionId")
        if parent is not None:
            self._session(message, "parentSessionId")
            if session.session_id in self._monitor.sessions.lineage(parent):
                raise RequestError(400, "parentSessionId: a session cannot be below itself")
        self._store_action(session, {"action": "set_parent", "parentSessionId": parent})

    def _on_hide_all_sessions(self, client: Client, message: JsonObject) -> None:
        for session in [it for it in self._monitor.sessions.sessions.values() if not it.hidden]:
            self._store_action(session, {"action": "hide", "hidden": True})
        self._monitor.feed.send_list()

    def _on_delete_session(self, client: Client, message: JsonObject) -> None:
        self._monitor.delete(self._session(message))

    def _on_delete_all_sessions(self, client: Client, message: JsonObject) -> None:
        for session in list(self._monitor.sessions.sessions.values()):
            self._monitor.delete(session)
        self._monitor.feed.send_list()

    def _on_prune(self, client: Client, message: JsonObject) -> Answer:
        if not self._monitor.settings["persistence.enabled"]:
            raise RequestError(400, "events are kept in memory only, there is nothing to delete")
        return self._monitor.retention.prune(bool(message.get("dryRun")))  # a wrong value deletes nothing

    def _session(self, message: JsonObject, name: str = "sessionId") -> Session:
        if (session := self._monitor.sessions.sessions.get(message.get(name) or "")) is None:
            raise RequestError(400, f"{name}: no session with this id is known")
        return session

    def _store_action(self, session: Session, data: JsonObject) -> None:
        """Store an action of the user as an event, so that sessions can be rebuilt from the files alone."""
        kind = {"eventType": "session_meta", "hookType": "Monitor", "data": data}
        where = {"sessionId": session.session_id, "workingDirectory": session.directory}
        if not self._monitor.take_now(encode_json({**where, **kind})):
            raise RequestError(503, f"it could not be stored: {self._monitor.journal.error}")


def with_request_id(message: JsonObject, answer: JsonObject) -> JsonObject:
    """Return the answer with the message's requestId, if it has one: text or a number, nothing nested."""
    request_id = message.get("requestId", [])
    return answer if isinstance(request_id, (dict, list)) else {**answer, "requestId": request_id}


def test_event() -> JsonObject:
    """Return the event of `test-event` and of the page's button."""
    data = {"message": "Test event: the way from here to the page works.", "notificationType": "test"}
    kind = {"hookType": "Notification", "eventType": "notification", "data": data}
    return {"sessionId": TEST_SESSION_ID, "workingDirectory": os.getcwd(), **kind}


def foreign_problems(home: str) -> list[JsonObject]:
    """Return a problem, with the command that repairs it, for up to nine of our files that we cannot use."""
    found = []
    for directory in (home, home + "/spool", home + "/events", home + "/hooks"):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                is_useless = stat.S_ISFIFO(about.st_mode) or entry.name.endswith(".foreign")
                if about.st_uid != os.getuid() or is_useless:
                    command = "rm -r" if is_useless else f"chown {user_name(os.getuid())}"
                    words = f"{entry.path} (owner: {user_name(about.st_uid)}) cannot be used by this user"
                    advice = f"Run: sudo {command} {shlex.quote(entry.path)}"
                    found.append({"kind": "files", "level": "warn", "words": words, "advice": advice})
    return found[:9]


def user_name(uid: int) -> str:
    """Return the name of a user; the number where there is none, as in many containers."""
    with contextlib.suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def machine_lines(machines: Iterable[JsonObject], own: Settings) -> list[JsonObject]:
    """Return a line for each machine, with its `label`; a host's containers without a given name are one."""
    machines, own_host = sorted(machines, key=operator.itemgetter("lastSeen")), machine_host(own.machine_key)
    hosts = {it["machineKey"]: it["machineId"] for it in machines if "/" not in it["machineKey"]}
    hosts[own_host] = own.machine_id
    lines: dict[tuple[str, str], JsonObject] = {}  # by (key of the host, name; "/": those without a name)
    for it in machines:
        place = (machine_host(it["machineKey"]), it["machineId"])
        if "/" in it["machineKey"] and CONTAINER_NAME.fullmatch(place[1]):
            place = (place[0] if place[0] in hosts else "", "/")
        elif "/" not in it["machineKey"]:
            place = (place[0], hosts[place[0]])
        line = lines.setdefault(place, {"events": 0, "dropped": 0, "containers": 0})
        sums = {name: line[name] + it[name] for name in ("events", "dropped")}
        line.update({**it, **sums, "containers": line["containers"] + (place[1] == "/")})
    names = collections.Counter(name for _, name in {*lines, (own_host, own.machine_id)})
    for (host, name), line in lines.items():
        line["sameName"], line["label"] = name != "/" and names[name] > 1, line["machineId"]
        if line["containers"] > 1:
            line["label"] = (f"{hosts[host]}, " if host else "") + f"{line['containers']} containers"
        elif line["sameName"] and line["machineKey"] != name:
            line["label"] += f" ({line['machineKey'][:4]})"
    labels = collections.Counter(line["label"] for line in lines.values())
    for line in lines.values():
        line["label"] += f" ({machine_host(line['machineKey'])})" * (labels[line["label"]] > 1)
    return sorted(lines.values(), key=operator.itemgetter("label"))


def publisher_state(home: str) -> JsonObject:
    """Return the publisher's state, and whether its process runs (`running`)."""
    state = {"state": "stopped", **emit_event.read_state(home + "/publisher.json")}
    state.pop("recent", None)
    reasons = ("reason", "channelReason", "streamReason")
    state.update((it, redis_advised(state[it])) for it in reasons if state.get(it))
    running = state["state"] != "stopped" and lock_holder(home + "/publisher.lock") is not None
    return {**state, "running": True} if running else {**state, "state": "stopped", "running": False}


class Status:
    """The monitor's state for the API and the clients, read from its parts in the loop thread."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._encoded = (-1, 0.0, b"")  # (steps of the loop, time.monotonic() of its end, answer)

    def encoded(self) -> bytes:
        """Return `to_json` encoded, for any thread; up to STATUS_AGE_S old while the loop does nothing."""
        loop, kept = self._monitor.loop, self._encoded
        if kept[0] != loop.steps or time.monotonic() > kept[1]:
            until = time.monotonic() + STATUS_AGE_S
            kept = self._encoded = loop.call(lambda: (loop.steps, until, encode_json(self.to_json())))
        return kept[2]

    def to_json(self) -> JsonObject:
        """Return the response of /api/status and the `status` message."""
        monitor = self._monitor
        machines, skew_ms = monitor.ingest.machines, monitor.sessions.skew_ms
        keys = itertools.islice(reversed(machines), MACHINES_SHOWN)
        shown = [{**machines[key], "clockSkewMs": skew_ms(key)} for key in keys]
        segments, index = emit_event.spool_segments(monitor.settings.path("spool")), monitor.history.status()
        slow_at, slow_ms = monitor.journal.slow_write
        status: JsonObject = {
            "version": __version__,
            "mode": monitor.settings["mode"],
            "machineId": monitor.settings.machine_id,
            "startedAt": monitor.started_at,
            "pid": os.getpid(),
            "seq": monitor.journal.seq,
            "events": dict(monitor.ingest.counts),
            "sessions": len(monitor.sessions.sessions),
            "clients": sum(client.view is not None for client in monitor.clients.clients.values()),
            "store": {
                "path": monitor.journal.root,
                "persistent": monitor.settings["persistence.enabled"],
                "ok": monitor.store_error is None,
                "error": monitor.store_error,
                "slowWriteMs": slow_ms if time.monotonic() - slow_at < SLOW_WRITE_SHOWN_S else None,
                "repaired": monitor.journal.repaired,
            },
            "spool": {
                "segments": len(segments),
                "bytes": sum(size for _, size in segments),
                "dropped": monitor.spool_dropped + sum(it["dropped"] for it in machines.values()),
            },
            "index": index,
            "disk": monitor.retention.disk_use(index["bytes"]),
            "machines": machine_lines(shown, monitor.settings),
            "otherMachines": max(0, len(machines) - MACHINES_SHOWN),
            "answers": monitor.answers.status(),
            "redis": monitor.redis.status() if monitor.redis else None,
            "publisher": publisher_state(monitor.settings.home) if monitor.redis else None,
            "loading": monitor.loading,
            "demo": any(session.demo for session in monitor.sessions.sessions.values()),
            "limits": monitor.sessions.limits(now_ms()),
            "notify": monitor.notifier.status(),
        }
        unsaved = sum(size for _, size in emit_event.spool_segments(monitor.settings.path("unsaved")))
        problems = status_problems(status, unsaved) + foreign_problems(monitor.settings.home)
        return {**status, "problems": problems, "facts": status_facts(status)}

    def metrics(self) -> bytes:
        """Return the metrics in the text form of Prometheus."""
        states = collections.Counter(session.state for session in self._monitor.sessions.sessions.values())
        return metrics_text(self.to_json(), states)

    def config(self) -> JsonObject:
        """Return the configuration in force, without secrets."""
        settings = self._monitor.settings
        about = {"version": __version__, "machineId": settings.machine_id, "path": settings.config_path}
        nested: JsonObject = {**about}
        for key, value in settings.values.items():
            section, _, name = key.rpartition(".")
            place = nested.setdefault(section, {}) if section else nested
            place[name] = "(not shown)" if key in emit_event.SECRET_KEYS and value else value
        nested["server"].update(port=self._monitor.port, wsPort=self._monitor.ws_port)
        return nested

    def session_json(self, session_id: str) -> JsonObject:
        """Return one session; raise RequestError(404), or 503 while stored ones are being read."""
        if (session := self._monitor.sessions.sessions.get(session_id)) is not None:
            return self._monitor.sessions.to_json(session)
        if self._monitor.loading is not None:
            raise RequestError(503, LOADING)
        raise RequestError(404, "no session with this id is known")


class Monitor:
    """The running program: `run` serves until `stop`; all but `__init__` happens in the loop thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.loop, self.started_at = settings, EventLoop(), now_ms()
        quiet_ms = settings["sessions.quietSeconds"] * 1000
        ended_ms = settings["sessions.endedHours"] * 3_600_000
        prices = {name: Price.of(**given) for name, given in settings["prices"].items()}
        persistent = settings["persistence.enabled"]
        own_name = settings.machine_id if settings["mode"] == "local" else ""  # others may have it, too
        self.sessions = Sessions(quiet_ms, ended_ms, settings.machine_key, prices, own_name)
        self.journal: Journal = Journal(settings.path("events")) if persistent else MemoryJournal()
        self.ingest = Ingest(settings, self.journal, self._take_own)
        self.store_error: str | None = None  # the journal's error that the clients know
        self.loading: JsonObject | None = None  # {done, total} of events until all sessions are known
        self.spool_dropped = 0  # events that the spool of this machine dropped because it was full
        self._is_draining = False
        self.redis: RedisLink | None = None
        self._publisher = 0  # pid of one that was started here, until it has ended
        self._replaced: Any = None  # pid of the one before, for which no other is started
        self.notifier = Notifier(settings.notify_targets, settings.path("notified.json"), self.loop)
        self._notice_changes: set[str] = set()  # ids of sessions whose notices may have changed
        self._short = ""  # content of the file `short`, for prompts
        self._arrivals = Turns()  # of lines, each with the connection to acknowledge it on
        self._dirty: set[str] = set()  # sessions that changed since their last snapshot
        self._generation = -1  # of the index file that has a snapshot of every session
        self.reader = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self.history = History(self.journal, settings.path("index.db"), prices)
        self.retention = Retention(self)
        self._containers, self._namespace = Containers(), emit_event.pid_namespace()
        self.answers, self.status = Answers(self), Status(self)
        self._sent_status: list[object] = []

    # Start and stop

    def open(self) -> None:
        """Open every port and start to serve the page; raise CommandError."""
        settings = self.settings
        emit_event.make_private_directory(settings.home)
        in_use = "another monitor runs for this directory; `stop` ends it"
        self._lock = lock_file(settings.path("monitor.pid"), lambda: in_use)
        host = settings["server.host"]
        self.addresses, token = own_addresses(host), read_token(settings.path("token"))
        access = Access(settings["server.auth"], token, self.addresses, settings["server.allowedHosts"])
        http_socket = bind_tcp(host, settings["server.port"], "server.port", "--port")
        ws_socket = bind_tcp(host, settings["server.wsPort"], "server.wsPort", "--ws-port")
        self.port, self.ws_port = http_socket.getsockname()[1], ws_socket.getsockname()[1]
        access.port = self.port
        with contextlib.suppress(ValueError):  # missing, or damaged; later numbers always fit into _SEQ
            self.journal.seq = int(emit_event.read_small(settings.path("last-seq"), 14))
        self.journal.open()
        self.about = {"pid": os.getpid(), "version": __version__, "startedAt": self.started_at}
        self.about |= {"host": host, "port": self.port, "wsPort": self.ws_port, "options": settings.options}
        self.about |= {"socketPath": settings["socketPath"], "addresses": self.addresses}
        self.loading = {"done": 0, "total": self.journal.seq}
        self.hooks = HookPort(self.loop, settings["socketPath"], self._arrivals)
        handlers = MessageHandlers(self)
        limit, queue_bytes = settings["limits.connections"], settings["limits.clientQueueBytes"]
        self.clients = WebSocketServer(self.loop, handlers.greet, handlers.take, limit, queue_bytes)
        self.feed = SessionFeed(self.loop, self.sessions, self.clients)
        api = Api(self, handlers.take_by_http)
        self.http = [HttpServer(it, access, api, self.answers, limit) for it in (http_socket, ws_socket)]
        # The page is served meanwhile; what takes events waits for the loop.
        for line in itertools.islice(self.journal.lines(backwards=True), self.ingest.seen.limit):
            self.ingest.seen.add(line_id(line))
        self.hooks.listen()
        self.retention.clock.compare(self.journal.seq)
        self._write_about()
        self.loop.on_turn_end = self._store_received
        self._advance(self._load())

    def _write_about(self) -> None:  # for other processes, to find this monitor
        emit_event.write_atomically(self.settings.path("monitor.run.json"), encode_json(self.about) + b"\n")

    def run(self) -> None:
        """Serve until `stop`, then close everything in an order that loses nothing."""
        gc.freeze()  # loaded modules stay: collecting them again would only block the loop
        sys.setswitchinterval(0.001)  # of a busy loop the other threads get their share sooner
        try:
            self.loop.run()
        finally:
            self._close()

    def stop(self) -> None:
        """Store received events, close the clients, and make `run` return; for any thread."""

        def begin() -> None:
            self.hooks.stop_listening()
            for client in list(self.clients.clients.values()):
                self.clients.close(client, CloseCode.GOING_AWAY, "the monitor stops")
            self.loop.call_later(0.1, self.loop.stop)  # lines that have arrived are still stored

        self.loop.call_soon(begin)

    def _close(self) -> None:
        while self._arrivals.waiting:
            self._store_received()
        if self.redis:
            self.redis.close()
        for server in self.http:
            server.stop()
        self.answers.close()
        self.notifier.close()
        with contextlib.suppress(OSError):
            os.unlink(self.settings.path("short"))
        self.reader.shutdown(wait=True)
        self.retention.close()
        self.ingest.close()
        if self.loading is None:
            collections.deque(self._snapshot_steps(), 0)
        self.history.stop()
        self.hooks.close()
        # A user may remove the newest files before the next start.
        save_last_seq(self.settings.home, self.journal.seq)
        self.journal.close()
        self.loop.close()
        os.close(self._lock)

    # Loading: snapshots, then later events

    def _advance(self, steps: Iterator[bool]) -> None:
        """Do long work for some ms a turn; `steps` yields after each piece of it: True to pause for 0.1 s."""
        deadline = time.monotonic() + 0.004
        for must_pause in steps:
            if must_pause or time.monotonic() >= deadline:
                self.loop.call_later(0.1 * must_pause, functools.partial(self._advance, steps))
                return

    def _load(self) -> Iterator[bool]:
        """Restore the sessions: load snapshots, then apply later events, also those that arrive meanwhile."""
        checkpoint, rows = self.history.load_snapshots()
        self._generation = self.history.generation if checkpoint else -1
        unsaved, spool = self.settings.path("unsaved"), self.settings.path("spool")
        for path, _ in emit_event.spool_segments(unsaved):
            try:
                emit_event.make_spool(spool)
                shutil.move(path, os.path.join(spool, os.path.basename(path)))  # perhaps to another disk
            except OSError as error:
                log.warning("%s is kept for the next start: %s", path, error)
        if self.settings["mode"] == "redis":
            self.redis = RedisLink(self.loop, self.settings, self._take_remote, self._send_status)
        else:
            self.ingest.registry.start()
        self.loop.call_every(TICK_INTERVAL_S, self._check_files)
        try:
            self.sessions.restore(rows)
        except ValueError as error:
            log.warning("snapshots of sessions cannot be used, so all events are read again: %s", error)
            checkpoint, self._generation = 0, -1
        begun = applied = checkpoint  # seq up to which the stored events are in the sessions
        while applied < self.journal.seq:
            until = self.journal.seq
            for line in self.journal.lines(after=applied):
                applied = line_seq(line)
                try:
                    self._apply(parse_stored(line))
                except MalformedEvent:
                    shown = emit_event.shown_head(line, 200, self.settings.privacy)
                    log.warning("a stored line is not an event and is skipped: %r", shown)
                self.loading = {"done": applied - begun, "total": self.journal.seq - begun}
                yield False
            applied = max(applied, until)
        seconds = (now_ms() - self.started_at) / 1000
        log.info("%d sessions known, %.1f s after the start", len(self.sessions.sessions), seconds)
        self.loading = None
        self._note_changes([it for it in self.sessions.sessions.values() if it.seq > begun])
        self._pass_time()
        for name, session in self.sessions.sessions.items():
            if self.redis and session.waits:  # hooks may have waited there since before the start
                asked = (self.journal.find(it.event_id, name) for it in session.waits if it.event_id)
                found = readable(filter(None, asked))
                self.answers.take([it for it in found if it.event["id"] not in self.answers.questions], {})
            elif self.redis is None and session.turn == "working" and session.processes:
                self.ingest.read_transcripts(name, is_over=False)
        gc.freeze()
        self.feed.send_list()
        self._send_status()
        self.history.start()
        if self.settings["persistence.enabled"]:
            self.retention.prune()
            self.loop.call_every(RETENTION_INTERVAL_S, self.retention.prune)
            self.loop.call_every(SNAPSHOT_INTERVAL_S, lambda: self._advance(self._snapshot_steps()))
        self.loop.call_every(TICK_INTERVAL_S, self._tick)
        self.loop.call_every(STATUS_INTERVAL_S, self._send_status)
        if self.notifier.targets:
            self._notice_changes = {*self.sessions.sessions, ""}
            self.loop.call_every(0.2, self._notify)

    def _snapshot_steps(self) -> Iterator[bool]:
        """Save snapshots of changed sessions, or of all in a new index file; a start continues from them."""
        generation, checkpoint = self.history.generation, self.journal.seq
        if generation != self._generation:
            self._generation, self._dirty = generation, set(self.sessions.sessions)
        dirty, changed = self._dirty, list(self._dirty)
        for session_id in changed:
            dirty.discard(session_id)
            if session_id in self.sessions.sessions:
                rows = {session_id: self.sessions.snapshot(session_id)}
                yield self.history.save_snapshots(generation, rows, None)
        if changed:
            self.history.save_snapshots(generation, {"": self.sessions.snapshot("")}, checkpoint)

    # Received events

    def _store_received(self) -> None:
        """Store events, acknowledge them, then send them to clients."""
        if not self._arrivals.waiting:
            return
        self.loop.steps += 1
        arrivals: list[tuple[bytes, socket.socket]] = self._arrivals.take()
        if self._arrivals.waiting:
            self.loop.call_soon(lambda: None)  # the rest in the next turn
        settled, stored = self.ingest.take([line for line, _ in arrivals])
        counts = collections.Counter(itertools.compress((sender for _, sender in arrivals), settled))
        for sender, count in counts.items():
            self.hooks.acknowledge(sender, count)
        for (_, sender), is_settled in zip(arrivals, settled):
            if not is_settled:
                self.hooks.drop(sender)
        found = ((ASKING_LINE.match(line), sender) for line, sender in arrivals)
        self._show(stored, {match[1].decode(): sender for match, sender in found if match})

    def _drain_spool(self) -> Iterator[bool]:
        """Store the spool's segments, and remove each that is stored; after a failure it is read again."""
        self._is_draining, spool = True, self.settings.path("spool")
        try:
            if events := emit_event.take_dropped(spool):
                self.spool_dropped += events
                log.warning("the spool was full: %d events were dropped before the monitor ran", events)
            for segment, size in emit_event.spool_segments(spool):
                try:
                    path = emit_event.take_segment(segment)
                except OSError as error:
                    if not isinstance(error, (FileNotFoundError, BlockingIOError)):
                        log.warning("%s cannot be drained: %s", segment, error.strerror)
                    continue
                log.info("draining %s (%d bytes)", os.path.basename(path), size)
                with open(path, "rb", opener=emit_event.open_own) as file:
                    while lines := list(itertools.islice(file, 200)):
                        yield False
                        if not self._take_all([it.strip() for it in lines if it.strip()], remote=False):
                            return
                with contextlib.suppress(FileNotFoundError):  # a hook found the spool too large
                    os.unlink(path)
        except (OSError, MemoryError) as error:
            log.warning("the spool could not be drained, trying again: %s", str(error) or "out of memory")
        finally:
            self._is_draining = False

    def _take_remote(self, lines: Sequence[RemoteLine]) -> bool:
        since = now_ms() - 60_000  # what waited longer in the stream is no measure of clocks
        late = [position is not None and position_key(position)[0] < since for _, position in lines]
        return self._take_all([line for line, _ in lines], remote=True, late=late)

    def _take_all(self, lines: Sequence[bytes], remote: bool, late: Sequence[bool] = ()) -> bool:
        """Store lines of the spool or of Redis in order; return whether all are settled.

        Where only some files cannot be written, their events go to unsaved/, for the spool of the next start.
        """
        settled, stored = self.ingest.take(lines, remote, late or [not remote] * len(lines))
        self._show(stored)
        if all(settled):
            return True
        if not self.journal.is_writable():
            return False
        left = [line for line, is_settled in zip(lines, settled) if not is_settled]
        reason = self.journal.error or "out of memory"
        log.error("%d events are kept in unsaved/ until the next start: %s", len(left), reason)
        directory = self.settings.path("unsaved")
        emit_event.make_spool(directory)
        for line in left:
            emit_event.append_to_spool(directory, line + b"\n")
        return True

    def take_now(self, line: bytes) -> bool:
        """Store one event and send it to clients at once; return whether it is settled (`Ingest.take`)."""
        settled, stored = self.ingest.take([line.replace(b"\n", b" ")])
        self._show(stored)
        return settled[0]

    def _take_own(self, events: list[JsonObject]) -> bool:
        """Store what transcripts contain, or statuses of clients; return whether all is stored within 1 s.

        For the threads that read them: what is not stored is read again, and has the same ids.
        """

        def store(part: list[JsonObject]) -> bool:
            is_read = (it["eventType"] in READ_KINDS and self.loading is None for it in part)
            known = self.sessions.sessions  # what was read does not restore a deleted session
            new = [it for it, read in zip(part, is_read) if not read or it["sessionId"] in known]
            settled, stored = self.ingest.take(list(map(encode_json, new)))
            self._show(stored)
            for event in part:
                if event["data"].get("status") == emit_event.CLIENT_EXITED:
                    self.ingest.read_transcripts(event["sessionId"])
            return all(settled)

        with contextlib.suppress(TimeoutError):
            parts = (events[at : at + 50] for at in range(0, len(events), 50))
            return all(self.loop.call(functools.partial(store, part), 1.0) for part in parts)
        return False

    def _show(self, stored: Sequence[StoredEvent], waiting: Mapping[str, socket.socket] = {}) -> None:
        """Apply stored events, send them to clients and index; `waiting`: event id → hook's connection."""
        if self.journal.error != self.store_error:
            self.store_error = self.journal.error
            if self.store_error:
                log.error("events cannot be written, hooks keep them while they can: %s", self.store_error)
            else:
                log.info("events can be written again")
            self._send_status()
        if not stored and not waiting:
            return
        changed: list[Session] = []
        for entry in stored if self.loading is None else ():
            changed += self._apply(entry.event)
        self._note_changes(changed)
        if waiting or self.redis or self.answers.questions:
            self.answers.take(stored, waiting)
        self.feed.send(stored)
        self.history.add(stored)
        self.retention.events_added += sum(len(entry.line) + 1 for entry in stored)

    def _apply(self, event: JsonObject) -> list[Session]:
        try:
            return [self.sessions.apply(event)]
        except Exception:  # unexpected: log and continue
            log.exception("event %s could not be applied", event.get("id"))
            return []

    def _note_changes(self, changed: Sequence[Session]) -> None:
        """Mark sessions, and those that changed with them, as changed for clients and snapshots."""
        ids = {session.session_id for session in changed} | self.sessions.linked
        self.sessions.linked.clear()
        self._dirty.update(ids)
        self._notice_changes.update(ids)
        self.feed.changed.update(dict.fromkeys(ids))

    def _notify(self) -> None:
        current: dict[str, list[Notice]] = {it: [] for it in self._notice_changes}
        with_limits = "limit" in self.notifier.kinds
        for session in filter(None, map(self.sessions.sessions.get, current)):
            row = self.sessions.to_json(session) if with_limits else {}
            current[session.session_id] = notices_of(session, (row.get("context") or {}).get("percent"))
        if with_limits and "" in current:
            names = {it.machine_key: it.machine_id for it in self.sessions.sessions.values()}
            current[""] = limit_notices(self.sessions.limits(now_ms()), names)
        self._notice_changes = set()
        self.notifier.look(current, any(client.visible for client in self.clients.clients.values()))

    def _pass_time(self) -> None:
        changed = self.sessions.tick(now_ms())
        # Sessions of this machine end with their client; through Redis events of a copy of it may arrive.
        is_sure, find = self.redis is None, self._containers.find
        gone = self.sessions.check_processes(self._namespace, ran_at, now_ms(), is_sure, find)
        for session in gone:
            self.ingest.read_transcripts(session.session_id)
        self._note_changes(changed + gone)

    def _tick(self) -> None:
        self._pass_time()
        self.answers.look()
        self._notice_changes.add("")  # the limits of accounts
        counts = collections.Counter(it.state for it in self.sessions.sessions.values() if not it.hidden)
        names = {"waiting": "need you", "failed": "failed", "working": "working", "quiet": "quiet"}
        shown = [f"{counts[state]} {name}" for state, name in names.items() if counts[state]]
        if (words := " · ".join(shown) or "all idle") != self._short:
            with contextlib.suppress(OSError):  # tried again
                emit_event.write_atomically(self.settings.path("short"), f"{words}\n".encode())
                self._short = words
        self.feed.send()
        self.clients.report_skipped()
        self.retention.clock.compare(self.journal.seq)

    def _send_status(self) -> None:
        """Send the status to the clients when more than counters and times changed."""
        if not self.clients.clients:
            return
        status = self.status.to_json()
        index, redis, publisher = status["index"], status["redis"] or {}, status["publisher"] or {}
        names = ("problems", "store", "spool", "loading", "demo", "limits", "answers", "otherMachines")
        steady = [status[name] for name in names] + [len(status["machines"]), index["state"]]
        steady += [index["state"] != "ready" and 100 * index["done"] // (index["total"] or 1)]
        steady += [redis.get(name) for name in ("state", "attempt")]
        steady += [publisher.get(name) for name in ("running", "state", "stream")]
        if steady != self._sent_status:
            self._sent_status = steady
            self.clients.broadcast((), text_frame({"type": "status", **status}))

    def _check_files(self) -> None:
        """Drain the spool (or start a publisher), recover from a full disk, bind a removed socket."""
        if self.redis is None:
            if not self._is_draining and lock_holder(self.settings.path("publisher.lock")) is None:
                self._advance(self._drain_spool())
        else:
            with contextlib.suppress(ChildProcessError):  # SIGCHLD may be ignored since before our start
                if self._publisher and os.waitpid(self._publisher, os.WNOHANG)[0]:
                    self._publisher = 0
            last = emit_event.read_state(self.settings.path("publisher.json"))
            was_killed = last.get("state", "stopped") != "stopped" and last.get("pid") != self._replaced
            if was_killed or emit_event.spool_segments(self.settings.path("spool")):
                try:
                    started = emit_event.ensure_publisher(self.settings.home)
                    if pid := re.sub(r"\D", "", started):
                        self._publisher, self._replaced = int(pid), last.get("pid")
                except OSError as error:
                    log.warning("the publisher cannot be started: %s", error)
        if self.store_error and self.journal.is_writable():
            self.journal.error = None
            self._show(())
        if self.loading is not None:
            log.info("%s", loading_words(self.loading))
            self._send_status()
        with contextlib.suppress(OSError, CommandError):  # tried again
            about = emit_event.read_small(self.settings.path("monitor.run.json"))
            if about != encode_json(self.about) + b"\n":  # removed or damaged, perhaps all of the directory
                emit_event.make_private_directory(self.settings.home)
                key = machine_host(self.settings.machine_key).encode() + b"\n"  # hooks would make another one
                emit_event.write_atomically(self.settings.path("machine-key"), key)
                self._write_about()
            for handler in log.handlers:
                if isinstance(handler, logging.FileHandler) and not os.path.exists(handler.baseFilename):
                    handler.close()  # it opens its file again
                    log.warning("%s was removed; a new one begins", handler.baseFilename)
            if not os.path.exists(self.settings.path("monitor.pid")):
                removed, self._lock = self._lock, lock_file(self.settings.path("monitor.pid"), lambda: "")
                os.close(removed)
            self.hooks.restore()

    def search_query(self, wanted: JsonObject) -> SearchQuery:
        """Return a query of the API or of a client, whose `state` is that of sessions now."""
        state, sessions = wanted.get("state"), self.sessions.sessions.values()
        found = frozenset(it.session_id for it in sessions if it.state == state) if state else None
        return search_query(wanted, found)

    def delete(self, session: Session) -> None:
        """Delete a session with its events, at the user's request."""
        save_last_seq(self.settings.home, self.journal.seq)
        # The Redis stream may still have them, and be read again.
        lines = self.journal.lines(session.session_id, backwards=True) if self.redis else ()
        ids = map(line_id, itertools.islice(lines, self.ingest.seen.limit))
        self.ingest.deleted.add([*ids, session.session_id])
        freed = self.journal.delete_session(session.session_id)
        self.retention.events_added -= freed
        log.info("session %s deleted by the user, %d bytes", session.session_id, freed)
        self._forget([session])

    def forget_files(self, names: frozenset[str]) -> None:
        """Delete the sessions of these file names, and compare the index with the files on disk."""
        self.history.rescan()
        if self.settings["retention.days"]:
            since = now_ms() - self.settings["retention.days"] * _DAY_MS
            self.ingest.forget_machines(since)
            self.sessions.forget_machines(since)
        sessions = self.sessions.sessions.values()
        self._forget([session for session in sessions if session_file_name(session.session_id) in names])

    def _forget(self, sessions: Sequence[Session]) -> None:
        for session_id in [it.session_id for it in sessions]:
            self.sessions.delete(session_id)
            self.history.forget(session_id)
            self.feed.sent.pop(session_id, None)
            self._notice_changes.add(session_id)
            self.clients.broadcast((), text_frame({"type": "session_deleted", "sessionId": session_id}))
        self._note_changes(())
        self.feed.send()


def loading_words(progress: JsonObject) -> str:
    """Return the progress of loading as text."""
    return f"{progress['done']} of {progress['total']} stored events have been read"


def status_facts(status: JsonObject) -> list[JsonObject]:
    """Return the state of the monitor's parts as [{"name": a word, "words": a line}]."""
    events, store, spool, index = (status[name] for name in ("events", "store", "spool", "index"))
    loading = f" ({loading_words(status['loading'])})" if status["loading"] else ""
    disk, stored, lag = status["disk"] or {}, events["stored"], index["lagEvents"]
    kept = f", {human_size(disk['bytes'])} with the index" if "bytes" in disk else ""
    kept += f", since {disk['oldestDay'] or 'today'}" if kept else ""
    facts = {
        "mode": "local, this machine" if status["mode"] == "local" else "redis, many machines",
        "events": f"{stored:,} event{'s' * (stored != 1)} stored since the start, "
        f"{events['duplicates']:,} delivered twice, {events['quarantined']:,} malformed",
        "sessions": f"{status['sessions']:,}{loading}",
        "store": f"{store['path'] or 'in memory'}: {'ok' if store['ok'] else store['error']}{kept}",
        "index": {
            "ready": f"{human_size(index['bytes'])}" + (f", behind by {lag:,}" if lag else ""),
            "building": f"being built: {index['done']:,} of {index['total']:,} events are read",
        }.get(index["state"], f"off: {index['error']}"),
        "spool": f"{human_size(spool['bytes'])} waiting",
        "lost": f"{plural(spool['dropped'], 'event')} lost to full spools, "
        f"{plural(store['repaired'], 'torn line')} repaired",
    }
    link, publisher = status["redis"], status["publisher"]
    if link:
        words = link["state"].replace("_", " ")
        if link["state"] != "connected":
            words += f", {attempt_words(link)}: {link['reason'] or 'no answer yet'}"
        read = {"off": "off", "ok": f"read up to {link['position'] or 'its start'}"}
        sent = plural(publisher.get("published", 0), "event")
        published = publisher.get("reason") or f"{sent} since its start"
        facts["redis"] = f"{link['server']}{' with TLS' if link['tls'] else ''}: {words}"
        facts["stream"] = str(link["streamReason"] or read.get(link["streamState"]))
        facts["publish"] = f"{publisher['state']}: {published}" if publisher["running"] else "not needed now"
    rows = [{"name": name, "words": words} for name, words in facts.items()]
    for target in status.get("notify", ()):
        age = f", {human_duration(now_ms() - target['at'])} ago" if target["at"] else ""
        rows.append({"name": "notify", "words": f"{target['name']}: {target['words']}{age}"})
    for machine in status["machines"] if link or status["machines"][1:] else ():
        skew_ms, age = machine["clockSkewMs"], human_duration(now_ms() - machine["lastSeen"])
        words = f"{machine['label']}: {plural(machine['events'], 'event')}, last {age} ago"
        if skew_ms is not None and abs(skew_ms) > 2000:
            words += f", clock {human_duration(abs(skew_ms))} {'behind' if skew_ms > 0 else 'ahead'}"
        rows.append({"name": "machine", "words": words})
    if status["otherMachines"]:
        rows.append({"name": "machines", "words": f"{status['otherMachines']} others, silent for longer"})
    return rows


def status_problems(status: JsonObject, unsaved_bytes: int) -> list[JsonObject]:
    """Return what is wrong as [{"kind", "level", "words", "advice"}]."""
    store, spool, index, disk = status["store"], status["spool"], status["index"], status["disk"] or {}
    redis, publisher, refused = status["redis"] or {}, status["publisher"] or {}, status["answers"]["refused"]
    state, tried = redis.get("state"), attempt_words(redis) if redis else ""
    same_names = sorted({machine["machineId"] for machine in status["machines"] if machine["sameName"]})
    # (kind, level, whether it is so, words, the reason after them, advice)
    rows: tuple[tuple[str, str, Any, str, str | None, str], ...] = (
        ("redis", "fail", state in ("waiting", "connecting") and redis["attempt"],
         f"Redis does not answer ({tried})", redis.get("reason"),
         "The page shows the events that this machine has stored."),
        ("redis", "fail", state == "given_up",
         f"Redis did not answer, and the monitor no longer tries ({tried})", redis.get("reason"),
         "Reconnect, or send the monitor SIGHUP."),
        ("stream", "fail", redis.get("streamState") == "refused", "Redis refuses the stream",
         redis.get("streamReason"), "Events sent while this monitor is not running will be missing."),
        ("channel", "fail", publisher.get("channelState") == "refused", "Redis refuses this machine's events",
         publisher.get("channelReason"), "Correct the user's rights in Redis."),
        ("publisher", "fail", state == "connected" and publisher.get("state") == "waiting",
         "Events of this machine wait in the spool, since Redis does not accept them",
         publisher.get("reason"), "The publisher sends them when it does."),
        ("gaps", "warn", redis.get("gaps"),
         f"{plural(redis.get('gaps', 0), 'time')} the stream lacked events not read yet: some may be missing",
         None, "Raise redis.streamMaxLength, or let Redis save its data."),
        ("store", "fail", not store["ok"],
         "Events cannot be written, hooks keep them in the spool while they can", store["error"],
         "Free space on its disk, or make it writable; the monitor then continues by itself."),
        ("unsaved", "warn", unsaved_bytes,
         f"{human_size(unsaved_bytes)} of events could not be written to their session's file",
         None, "monitor.log names the file; correct it, then run: restart"),
        ("spool", "warn", spool["dropped"], f"Full spools dropped {plural(spool['dropped'], 'event')}",
         None, "Keep a monitor (or Redis) running while agents work."),
        ("index", "warn", index["state"] == "off" and store["persistent"],
         "There is no index: searches read every file, and there are no statistics", index["error"],
         "Correct its cause; the index is then rebuilt."),
        ("disk", "warn", disk.get("error"), disk.get("error") or "", None,
         "Correct this; it is tried again within 5 minutes."),
        ("disk", "warn", disk.get("overLimit"),
         "Today's events and pinned sessions alone take more than retention.maxMegabytes",
         None, "Raise it, or delete sessions."),
        ("store", "warn", store["slowWriteMs"] is not None,
         f"A write to {store['path']} took {store['slowWriteMs']} ms, for which hooks wait",
         None, "Move CONTEXTUATE_HOME to a faster disk."),
        ("answers", "warn", refused, f"{plural(len(refused), 'attempt')} to answer refused, the last",
         refused[-1]["words"] if refused else None,
         "If that was not you, look at what runs on this machine."),
        *(("machines", "warn", True, f"Several machines have the same name, {safe_line(name)}",
           None, "They are shown apart by their keys; set CONTEXTUATE_MACHINE_ID on each to name them.")
          for name in same_names),
        *(("notify", "warn", target["ok"] is False, f"Notifications do not arrive: {target['name']}",
           target["words"], "Correct `notify` in the configuration; `notify-test` sends a message now.")
          for target in status["notify"]),
    )  # fmt: skip
    shown = (
        (kind, level, f"{words}: {reason.rstrip('.')}" if reason else words, advice)
        for kind, level, is_so, words, reason, advice in rows
        if is_so
    )
    return [dict(zip(("kind", "level", "words", "advice"), it)) for it in shown]


def lock_file(path: str, in_use: Callable[[], str]) -> int:
    """Lock a file until this process exits, write our pid, return its descriptor, else raise `in_use()`."""
    for _ in range(25):
        try:
            fd = emit_event.open_own(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            advice = "remove it, or choose another "
            advice += "socketPath" if path.endswith(".lock") else "CONTEXTUATE_HOME"
            raise CommandError(f"{path}: cannot be opened: {error.strerror}; {advice}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(fd)):
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                return fd
        except FileNotFoundError:
            pass  # removed between opening and locking it
        except BlockingIOError:  # held by `running_monitor` for a moment, or by another monitor
            time.sleep(0.02)
        os.close(fd)
    raise CommandError(in_use())


def unlock_file(path: str, fd: int) -> None:
    """Release the lock and remove the file, which would block another user."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            os.unlink(path)
    os.close(fd)


def lock_holder(path: str) -> int | None:
    """Return the pid in a file while it is locked (0: none is in it), else None; locks it for a moment."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb", opener=emit_event.open_own) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return int(file.read(32).strip() or b"0")
    return None


def listening_pid(path: str) -> int | None:
    """Return the kernel's pid of our process that listens at `path`: None without one, 0 in a container."""
    option = (1, 17) if sys.platform == "linux" else (0, 2)  # SO_PEERCRED, macOS: LOCAL_PEERPID
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1)
        sock.connect(path)
        if emit_event.peer_uid(sock) == os.getuid():
            return int.from_bytes(sock.getsockopt(*option, 4), sys.byteorder)
    return None


def stop_advice(socket_path: str) -> str:
    """Return how to stop the monitor that listens on a socket, as the end of a message."""
    pid = listening_pid(socket_path)
    advice = f" (pid {pid}); `kill {pid}` ends it" if pid else " in another container; stop it there"
    return f"{advice}, or choose another socketPath"


def bind_tcp(host: str, port: int, key: str, option: str) -> socket.socket:
    """Listen on a TCP port; raise a CommandError that names the key and the option to change."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        sock.listen(128)
        return sock
    except (OSError, UnicodeError) as error:  # UnicodeError: such as of a..b, which is no host name
        number = getattr(error, "errno", None)
        is_in_use, is_port = number == errno.EADDRINUSE, number in (errno.EADDRINUSE, errno.EACCES)
        what = "is in use" if is_in_use else f"cannot be opened: {getattr(error, 'strerror', None) or error}"
        way = f"{option} or {key}" if is_port else "--host or server.host"
        raise CommandError(f"{host} port {port} {what}; choose another with {way}") from None


def bind_unix(path: str) -> socket.socket:
    """Listen on a Unix socket (0600) whose lock we have; raise CommandError if something else is there."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        about = os.lstat(path)
        probe.settimeout(1)
        if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.getuid():
            raise CommandError(f"{path} exists and is not a socket; remove it or choose another socketPath")
        if probe.connect_ex(path) == 0:
            raise CommandError(f"{path}: another program listens there{stop_advice(path)}")
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # 0600 from the first moment
    try:
        sock.bind(path)
    except OSError as error:
        words = f"{path}: cannot be created: {error.strerror}"
        raise CommandError(f"{words}; choose another socketPath") from None
    finally:
        os.umask(mask)
    sock.listen(4096)
    return sock


def ran_at(pid: int, time_ms: int) -> bool:
    """True if a process with this pid runs and began by `time_ms`; a later one is another process."""
    start = emit_event.process_start(pid)
    if start is None or sys.platform != "linux":
        return start is not None
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK")
    return now_ms() - age_s * 1000 <= time_ms + 5000  # clocks differ by less


class Containers:
    """Finds processes of this user in containers of this machine, in the loop thread."""

    def __init__(self) -> None:
        self._contained: dict[tuple[int, int], int] = {}  # last search: (pid there, its namespace) → here
        self._found: dict[tuple[int, int], int] = {}  # what `find` has returned: that process may have ended
        self._next_search_s = 0.0  # time.monotonic()

    def find(self, process: tuple[int, int]) -> int:
        """Return our pid of a process (pid, namespace) in a container; 0 if it cannot be seen from here."""
        started = time.monotonic()
        if process not in self._found and started >= self._next_search_s:
            self._contained = {}
            for path in glob.glob("/proc/[0-9]*/ns/pid"):
                with contextlib.suppress(OSError):  # another user's, or gone
                    if not os.path.samefile(path, "/proc/self/ns/pid"):
                        with open(f"{path[:-7]}/status", encoding="ascii", errors="replace") as file:
                            pids = next((line.split() for line in file if line.startswith("NSpid:")), ["0"])
                        self._contained[int(pids[-1]), os.stat(path).st_ino] = int(path.split("/")[2])
            self._next_search_s = started + max(CONTAINERS_INTERVAL_S, 500 * (time.monotonic() - started))
        if process not in self._found and process in self._contained:
            self._found[process] = self._contained[process]
        return self._found.get(process, 0)


# ---------------------------------------------------------------------------
# Running monitor: found and queried by other processes
#
# Knows: the files with a monitor's address, its HTTP port, the hooks' socket.
# ---------------------------------------------------------------------------

RUN_RESTART = "run: python3 contextuate_monitor.py restart"


def running_monitor(settings: Settings) -> JsonObject | None:
    """Return {"pid" (of `listening_pid`), "process" (as text), "host", "port", …} of our monitor, or None."""
    pid = lock_holder(settings.path("monitor.pid"))
    about = emit_event.read_state(settings.path("monitor.run.json"))
    if pid is None or about.get("pid") != pid:
        return None
    about["pid"] = pid = listening_pid(about["socketPath"])
    where = "in another container" if pid == 0 else "its socket does not answer"
    return {**about, "process": f"pid {pid}" if pid else where}


def needed_monitor(settings: Settings) -> JsonObject:
    """Return the running monitor; raise a CommandError with how to start it."""
    if (about := running_monitor(settings)) is None:
        raise CommandError("the monitor is not running; start it with: python3 contextuate_monitor.py start")
    return about


def page_links(settings: Settings, about: JsonObject, with_token: bool = False) -> list[str]:
    """Return the addresses of the page, with the token where one is needed."""
    auth = settings["server.auth"]
    needs_token = with_token or auth == "token" or not is_loopback(about["host"])
    token = f"?token={read_token(settings.path('token'))}" if needs_token and auth != "off" else ""
    names = ("localhost" if name == "127.0.0.1" else name for name in about["addresses"])
    return [f"http://{f'[{name}]' if ':' in name else name}:{about['port']}/{token}" for name in names]


def ask_monitor(settings: Settings, path: str, message: JsonObject | None = None) -> JsonObject:
    """Return the running monitor's response to GET `path`, or to POST of `message`; raise CommandError."""
    about = needed_monitor(settings)
    if about["version"].partition(".")[0] != __version__.partition(".")[0]:  # its answers are other ones
        raise CommandError(f"{about['process']} is of version {about['version']}; {RUN_RESTART}")
    host = "127.0.0.1" if about["host"] in ("0.0.0.0", "::") else about["host"]
    timeout_s = 120 if path in ("/api/message", "/api/answer") else 15
    connection = http.client.HTTPConnection(host, about["port"], timeout=timeout_s)
    headers = {"Authorization": f"Bearer {read_token(settings.path('token'))}"}
    method, body = ("GET", None) if message is None else ("POST", encode_json(message))
    try:
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = emit_event.parse_event_line(response.read())
    except (OSError, http.client.HTTPException, MalformedEvent) as error:
        words = f"the monitor ({about['process']}) does not answer: {error}"
        raise CommandError(f"{words}; if it still does not, run: restart") from None
    if response.status != 200:
        raise CommandError(str(answer.get("error") or f"the monitor answered {response.status}"))
    return answer


def send_events(settings: Settings, events: Sequence[JsonObject]) -> None:
    """Send events to the running monitor as hooks do, until they are stored; raise CommandError, OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, sock.makefile("rb") as answers:
        sock.settimeout(60)
        sock.connect(needed_monitor(settings)["socketPath"])
        for start in range(0, len(events), 200):
            batch = events[start : start + 200]
            sock.sendall(b"".join(encode_json(event) + b"\n" for event in batch))
            if len(answers.read(len(batch))) < len(batch):
                raise CommandError("the monitor could not store an event; run `status` for the reason")


# ---------------------------------------------------------------------------
# Hook installation: our hook in Claude Code's settings and in those of other programs
#
# Owns: hooks/ in our directory, and our own entries in the files of PROGRAMS, no others.
# Knows: which event names which client understands, and how a settings file is laid out. Does not know: the
# running monitor. Planning writes nothing; then exactly what the plan shows is written.
# ---------------------------------------------------------------------------

Version = tuple[int, int, int]

CLAUDE = "claude"
HOOK_TIMEOUT_S = 10
CLAUDE_VERSION_TIMEOUT_S = 10
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

# Before 2.1.101, one event name that the client does not know disables every hook of the file. So each name
# is listed under the first version that is known to have it; if none is known, under 2.1.101.
# Omitted: MessageDisplay (ten a second, and the display waits for each), WorktreeCreate (the client uses the
# hook's output as a path, and a failure fails the worktree), FileChanged (needs a list of files).
EVENT_NAMES_SINCE: dict[Version, str] = {
    (1, 0, 0): "SessionStart SessionEnd UserPromptSubmit PreToolUse PostToolUse Notification Stop"
    " SubagentStop PreCompact",
    (2, 0, 43): "SubagentStart",
    (2, 0, 45): "PermissionRequest",
    (2, 1, 69): "InstructionsLoaded",
    (2, 1, 76): "PostCompact Elicitation",
    (2, 1, 78): "StopFailure",
    (2, 1, 101): "Setup UserPromptExpansion PermissionDenied PostToolUseFailure PostToolBatch TaskCreated"
    " TaskCompleted TeammateIdle ConfigChange CwdChanged WorktreeRemove ElicitationResult",
    (2, 1, 250): "DirectoryAdded",
    (2, 1, 330): "PreModelSwitch PostModelSwitch",
    (2, 1, 332): "PreSkillShellCommand",
}

OPTIONAL_EVENTS = ("PermissionRequest",)  # for `install --without`: the registry reports the same
MANAGED_DIRECTORIES = {"darwin": "/Library/Application Support/ClaudeCode", "linux": "/etc/claude-code"}
# Claude Code's names of the events that a turn consists of; Gemini has its own.
_TURN_EVENTS = "SessionStart SessionEnd UserPromptSubmit PreToolUse PostToolUse Stop"


class Program(NamedTuple):
    """Where and how a program registers hooks. Not registered: events that hold up every request."""

    file: str  # in its directory
    events: str
    fields: JsonObject  # of each entry, besides the command
    advice: str = "Restart its open sessions: they run the hook from then on."
    answers: str = ""  # the key of how long a question waits for an answer; "": it cannot be answered


PROGRAMS = {
    CLAUDE: Program(  # events by version
        "settings.json", "", {"type": "command", "timeout": HOOK_TIMEOUT_S}, answers="answers.waitSeconds"
    ),
    # Without a time limit: Codex allows SessionEnd 3 s at most. A changed entry must be trusted once more.
    "codex": Program(
        "hooks.json",
        f"{_TURN_EVENTS} PermissionRequest PreCompact PostCompact SubagentStart SubagentStop Interrupt",
        {"type": "command"},
        "Start codex and choose “Trust all” when it asks; until then it skips the hook.",
        "answers.backgroundSeconds",
    ),
    "gemini": Program(
        "settings.json",
        "SessionStart SessionEnd BeforeAgent BeforeTool AfterTool AfterAgent Notification",
        {"type": "command", "name": "contextuate", "timeout": HOOK_TIMEOUT_S * 1000},  # it shows the name
    ),
    "copilot": Program(
        "hooks/contextuate.json",
        f"{_TURN_EVENTS} PostToolUseFailure Notification SubagentStart SubagentStop PreCompact ErrorOccurred",
        {"type": "command", "timeoutSec": HOOK_TIMEOUT_S},
    ),
    "qwen": Program(
        "settings.json",
        f"{_TURN_EVENTS} PostToolUseFailure StopFailure PermissionRequest PermissionDenied Notification"
        " SubagentStart SubagentStop PreCompact PostCompact",
        {"type": "command", "timeout": HOOK_TIMEOUT_S},
        answers="answers.backgroundSeconds",
    ),
    "kimi": Program(
        "config.toml",
        f"{_TURN_EVENTS} PostToolUseFailure StopFailure PermissionRequest PermissionResult Interrupt"
        " SubagentStart SubagentStop PreCompact PostCompact",
        {"timeout": HOOK_TIMEOUT_S},
    ),
}
# The words of our command, with zero bytes between them.
_OUR_WORDS = r"[^\0]+\0-I\0-S\0[^\0]*/hooks/emit_event\.py(\0--(answer|agent)(\0\w+)?)?"
_OUR_COMMAND = re.compile(rf"{_OUR_WORDS}(\0\|\|\0{_OUR_WORDS})*(\0\|\|\0:)?")


class ClientFile(NamedTuple):
    """A file from which Claude Code reads hooks; `trouble`: why it cannot use it (`settings` is {})."""

    path: str
    settings: JsonObject
    is_managed: bool
    trouble: str


class StatusLine(NamedTuple):
    """Our status line in a settings file; `wrapped`: the command that was there before, which it runs."""

    command: str
    wrapped: str | None


class InstallPlan(NamedTuple):
    """The change of a settings file ("": no file); events and status line that are registered then."""

    path: str
    old_text: str
    new_text: str
    names: list[str]
    status_line: StatusLine | None = None


def agents_here() -> list[str]:
    """Return the other programs that are installed, or have a directory."""
    names = (name for name in PROGRAMS if name != CLAUDE)
    return [name for name in names if shutil.which(name) or os.path.isdir(emit_event.agent_directory(name))]


def plan_install(
    home: str,
    program: str = CLAUDE,
    project: str | None = None,
    version: Version | None = None,
    without: Sequence[str] = (),
    line: bool = False,
    wait_s: int = 0,
) -> InstallPlan:
    """Plan to register the hook of `home` with a program; `home` "": to remove it; raise CommandError.

    `version`, `without`: of which client the events are registered, and which are not. `line`: the status
    line, too; a registered one stays. `wait_s`: how long hooks wait for an answer; 0: they do not.
    """
    if project is not None and not os.path.isdir(project):
        raise CommandError(f"{project}: no such directory; name the project's top directory")
    if line and project is not None:
        raise CommandError("the status line is registered for the user: run install without --project too")
    about, is_claude = PROGRAMS[program], program == CLAUDE
    directory = "" if is_claude else emit_event.agent_directory(program)
    path = settings_path(project) if is_claude else os.path.abspath(os.path.join(directory, about.file))
    command = hook_command(base_interpreter(), hook_script(home), program) if home else ""
    names = about.events.split() if home else []
    if program == "kimi":
        text = read_text(path)
        return InstallPlan(path, text, merge_toml(path, text, command, names, about.fields), names)
    if program == "copilot":  # a file of our own
        hooks = {name: [{**about.fields, "bash": command}] for name in names}
        text = render_settings({"version": 1, "hooks": hooks}, "") if home else ""
        return InstallPlan(path, read_text(path), text, names)
    old, settings = read_settings(path)
    if is_claude and home:
        if not (names := event_names(version)):
            raise CommandError("this version of Claude Code has no hooks; update it, then try again")
        names += [] if version else sorted(our_hooks(settings).keys() - names)
        names = [name for name in names if name not in without]
    changed = merge_hooks(settings, command, names, wait_s, about.fields)
    if is_claude and (line or status_line_in(settings)):
        changed = merge_status_line(changed, home)
    new = render_settings(changed, old) if changed or is_claude else ""
    return InstallPlan(path, old, old if changed == settings else new, names, status_line_in(changed))


def merge_toml(path: str, text: str, command: str, names: Sequence[str], fields: JsonObject) -> str:
    """Return the text of a TOML file with our hook for each of `names` in a block of its own."""
    others = re.sub(r"\n?# contextuate: our hooks\n.*?# contextuate: end\n", "", text, flags=re.S)
    if not names:
        return others
    if re.search(r"^\s*hooks\s*=", others, re.M):
        raise CommandError(f"{path}: hooks are one list there; write each as [[hooks]] first")
    block = others + "\n" * (2 - others.endswith("\n")) if others else ""
    block += "# contextuate: our hooks\n"
    for name in names:
        # TOML has no escapes for halves of surrogate pairs.
        values = {"event": json.dumps(name), "command": json.dumps(command, ensure_ascii=False), **fields}
        block += "[[hooks]]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())
    return block + "# contextuate: end\n"


def event_names(version: Version | None) -> list[str]:
    """Return the event names that a client of `version` surely knows; None: a client of any version."""
    known = version or (1, 0, 0)
    return " ".join(names for since, names in EVENT_NAMES_SINCE.items() if known >= since).split()


def claude_version() -> Version | None:
    """Return the version of `claude` on the PATH or where its installers put it; None if it prints none."""
    places = ("claude", "~/.claude/local/claude", "~/.local/bin/claude")
    program = next(filter(None, (shutil.which(os.path.expanduser(place)) for place in places)), "")
    null, timeout_s = subprocess.DEVNULL, CLAUDE_VERSION_TIMEOUT_S
    try:
        answer = subprocess.check_output([program, "--version"], stdin=null, stderr=null, timeout=timeout_s)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(rb"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", answer)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def settings_path(project: str | None, name: str = "settings.json") -> str:
    """Return the absolute path of a settings file of `project`, None: of the user; raise CommandError."""
    directory = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
    if directory.startswith("~"):
        raise CommandError("this user has no home directory; set HOME, or CLAUDE_CONFIG_DIR to Claude Code's")
    directory = os.path.join(project, ".claude") if project is not None else directory
    return os.path.abspath(os.path.join(directory, name))


def client_files(project: str) -> list[ClientFile]:
    """Return the files from which Claude Code reads hooks in `project`, in order of precedence."""
    managed = f"{MANAGED_DIRECTORIES.get(sys.platform, '')}/managed-settings"
    paths = [*sorted(glob.glob(f"{glob.escape(managed)}.d/*.json"), reverse=True), f"{managed}.json"]
    paths += [settings_path(project, "settings.local.json"), settings_path(project), settings_path(None)]
    files = []
    for path in dict.fromkeys(paths):
        settings, trouble = {}, ""
        try:
            settings = read_settings(path)[1]
        except CommandError as error:
            trouble = str(error).rpartition(";")[0]
        files.append(ClientFile(path, settings, path.startswith(managed), trouble))
    return files


def files_that_run(files: list[ClientFile]) -> tuple[list[ClientFile], str]:
    """Return (files whose hooks Claude Code runs, why it runs no others or "")."""
    managed, others = ([file for file in files if file.is_managed is wanted] for wanted in (True, False))
    for key, deciding, running in (
        ("disableAllHooks", managed, []),
        ("allowManagedHooksOnly", managed, managed),
        ("disableAllHooks", others, managed),
    ):
        file = next((file for file in deciding if key in file.settings), None)
        if file and file.settings[key] is True:
            return running, f"{file.path} has {key}, so the hook does not run"
    return files, ""


def _handlers(settings: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    for name, groups in settings.get("hooks", {}).items():
        yield from ((name, entry) for group in groups for entry in group["hooks"])


def our_hooks(settings: JsonObject) -> dict[str, str]:
    """Return the commands of our hook in these settings, unchanged, by event name."""
    return {name: entry["command"] for name, entry in _handlers(settings) if _is_ours(entry)}


def registered_twice(files: Iterable[ClientFile]) -> tuple[list[str], list[str]]:
    """Return (event names, paths) of events that several hooks of any kind send to a monitor."""
    places: dict[str, dict[str, str]] = {}  # event name → command or URL, which the client runs once → a file
    for file in files:
        for name, entry in _handlers(file.settings):
            what = text_of(entry.get("command") or entry.get("url"))
            if re.search(r"emit[_-]event\.(py|js)\b|/api/hooks$", what):
                places.setdefault(name, {}).setdefault(what, file.path)
    twice = {name: found for name, found in places.items() if len(found) > 1}
    return list(twice), list(dict.fromkeys(path for found in twice.values() for path in found.values()))


def base_interpreter() -> str:
    """Return the interpreter outside any virtual environment, which may be deleted."""
    if sys.prefix == sys.base_prefix:
        return os.path.abspath(sys.executable or "python3")
    return os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info))


def hook_script(home: str) -> str:
    """Return the absolute path of the script that Claude Code runs, in our directory `home`."""
    return os.path.abspath(os.path.join(home, "hooks", "emit_event.py"))


def _quoted(path: str) -> str:
    """Return the absolute path for /bin/sh; raise CommandError if it is not UTF-8."""
    path = os.path.abspath(path)
    if _LONE_SURROGATE.search(path):  # written as JSON, it would be another path
        raise CommandError(f"{path!a}: not a UTF-8 path; use another CONTEXTUATE_HOME or Python")
    return '"' + re.sub(r'([\\"$`])', r"\\\1", path) + '"'


def status_line_command(interpreter: str, script: str, wrapped: str | None) -> str:
    """Return the command of /bin/sh for `script` around another line, which runs alone if that cannot run."""
    python, path = _quoted(interpreter), _quoted(script)
    first = "" if wrapped is None else f"{shlex.quote(wrapped)} "
    return (
        f'set -- {first}; for p in {python} python3; do command -v "$p" >/dev/null && [ -f {path} ] &&'
        f' exec "$p" -I -S {path} --status-line "$LC_CTYPE" "$@"; done; [ $# = 0 ] || exec /bin/sh -c "$1"'
    )


def status_line_in(settings: JsonObject) -> StatusLine | None:
    """Return our status line in `settings`; None if there is none, or another one."""
    command = object_of(settings.get("statusLine")).get("command")
    with contextlib.suppress(ValueError):  # a quote is open
        words = shlex.split(command) if isinstance(command, str) else []
        is_ours = words[:2] == ["set", "--"] and "--status-line" in words
        if is_ours and any(word.endswith("/hooks/emit_event.py") for word in words):
            return StatusLine(str(command), words[2] if words[3] == ";" else None)
    return None


def merge_status_line(settings: JsonObject, home: str) -> JsonObject:
    """Return `settings` with our status line around the one that is there; `home` "": without ours."""
    entry, ours = settings.get("statusLine", {"type": "command"}), status_line_in(settings)
    given = ours.wrapped if ours else object_of(entry).get("command")
    is_usable = isinstance(given, str) and object_of(entry).get("type") == "command"
    if not (ours or is_usable or "statusLine" not in settings):
        raise CommandError("statusLine: expected a command in your settings; nothing was changed")
    if not home and given is None:
        return {key: value for key, value in settings.items() if key != "statusLine"}
    command = status_line_command(base_interpreter(), hook_script(home), given) if home else given
    return {**settings, "statusLine": {**entry, "command": command}}


def hook_command(interpreter: str, script: str, program: str = CLAUDE) -> str:
    """Return the command for /bin/sh that runs `script`, with `python3` if `interpreter` does not start.

    It always exits with 0: Python exits with 2 for a missing script, and then Claude Code blocks every call
    and prompt. The second try uses $HOME for the default place: a container may mount it elsewhere.
    """
    python, first = _quoted(interpreter), _quoted(script)
    is_default = os.path.abspath(script) == hook_script(os.path.expanduser("~/.contextuate"))
    second = '"$HOME/.contextuate/hooks/emit_event.py"' if is_default else first
    option = f" --agent {program}" if program != CLAUDE else ""
    return f"{python} -I -S {first}{option} || python3 -I -S {second}{option} || :"


# What Claude Code runs once it is installed; any failure is silent, as in run_hook.
LAUNCHER = """\
import posix
import sys

try:
    sys.path.insert(0, __file__.rpartition("/")[0] + "/lib")
    if sys.argv[1:2] == ["--status-line"]:
        import status_line

        status_line.run_status_line(sys.argv[2:])
    import hot_path

    hot_path.run_hook()
except BaseException:
    if sys.argv[3:]:
        posix.execv("/bin/sh", ["/bin/sh", "-c", sys.argv[3]])
    posix._exit(0)
"""


def install_hook_files(home: str) -> str:
    """Copy the hook below `home`, return the script that Claude Code runs; raise CommandError.

    hooks/emit_event.py is the launcher; in hooks/lib/ is what it imports from bytecode at every call, what
    the status line needs besides, and the whole module for the rare paths.
    """
    import compileall

    source, script = os.path.abspath(emit_event.__file__), hook_script(home)
    library = os.path.join(os.path.dirname(script), "lib")
    try:
        with open(source, "rb") as file:
            content = file.read()
        hot_path, _, rest = content.partition(b"\n# --- end of the hot path ---\n")
        status_line, marker, _ = rest.partition(b"# --- end of the status line ---\n")
        if not marker:
            raise CommandError(f"{source}: not whole; copy emit_event.py beside the monitor once more")
        for private in (os.path.abspath(home), os.path.dirname(script), library):
            emit_event.make_private_directory(private)
        # Each file is replaced before those that import it, since hooks run meanwhile.
        emit_event.write_atomically(f"{library}/emit_event.py", content)
        emit_event.write_atomically(f"{library}/hot_path.py", hot_path + b"\n")
        emit_event.write_atomically(f"{library}/status_line.py", b"from hot_path import *\n" + status_line)
        emit_event.write_atomically(script, LAUNCHER.encode())
    except OSError as error:
        words = f"the hook could not be copied from {source} to {library}: {error.strerror or error}"
        raise CommandError(f"{words}; correct this, then try again") from error
    compileall.compile_dir(library, force=True, quiet=2)  # else the first calls compile
    return script


def run_in_python(python: str, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of Python with the options of the publisher: -E ignores PYTHONPATH."""
    return subprocess.run([python, "-E", "-c", line], stdin=subprocess.DEVNULL, capture_output=True)


def record_publisher_python(home: str) -> bool:
    """Record this interpreter as the one that runs publishers; return False if it has no redis-py."""
    if run_in_python(sys.executable, "import redis").returncode:
        return False
    hooks = os.path.join(home, "hooks")
    emit_event.make_private_directory(hooks)
    emit_event.write_atomically(os.path.join(hooks, "publisher-python"), os.fsencode(sys.executable) + b"\n")
    return True


def merge_hooks(
    settings: JsonObject, command: str, names: list[str], wait_s: int = 0, fields: JsonObject | None = None
) -> JsonObject:
    """Return `settings` with our handler once for each of `names`, where it was; the rest is unchanged."""
    recording = {**(fields or {"type": "command", "timeout": HOOK_TIMEOUT_S}), "command": command}
    command = re.sub(r'(/hooks/emit_event\.py")(?: --agent)?', r"\1 --answer", command)
    answering = {"type": "command", "command": command, "timeout": wait_s + HOOK_TIMEOUT_S}
    hooks: dict[str, list[JsonObject]] = settings.get("hooks", {})
    changed: JsonObject = {}
    for name in {**hooks, **dict.fromkeys(names)}:
        handler = answering if wait_s and name in emit_event.ANSWERED_HOOKS else recording
        missing, groups = handler if name in names else None, []  # until a group has it
        for group in hooks.get(name, ()):
            entries = []
            for entry in group["hooks"]:
                if not _is_ours(entry):
                    entries.append(entry)
                elif missing is not None and group.get("matcher", "") in ("", "*", ".*"):
                    entries.append({**entry, **missing})
                    missing = None
            if entries or not group["hooks"]:
                groups.append({**group, "hooks": entries})
        groups += [] if missing is None else [{"hooks": [missing]}]
        if groups or hooks.get(name) == []:  # a list that was empty before is not ours
            changed[name] = groups
    if changed:
        return {**settings, "hooks": changed}
    return {key: value for key, value in settings.items() if key != "hooks" or not hooks}


def _is_ours(entry: JsonObject) -> bool:
    """True for a handler that `install` wrote; one whose command a person has extended is theirs."""
    with contextlib.suppress(ValueError):  # a quote is open
        words = "\0".join(shlex.split(text_of(entry.get("command"))))
        is_command = entry.get("type") == "command" and "args" not in entry
        return is_command and _OUR_COMMAND.fullmatch(words) is not None
    return False


def open_regular(path: str) -> io.BufferedReader:
    """Open a regular file to read; raise OSError for anything else: a FIFO would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "is no regular file", path)
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))


def read_text(path: str) -> str:
    """Return the text of a settings file, "" if it is missing; raise CommandError."""
    try:
        with open_regular(path) as file:
            return file.read().decode()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        trouble = getattr(error, "strerror", None) or str(error)
    raise CommandError(f"{path}: {trouble}; correct it first, nothing was changed")


def read_settings(path: str) -> tuple[str, JsonObject]:
    """Return a settings file's text and its object, {} if missing or blank; raise CommandError."""
    text, trouble = read_text(path), "expected one JSON object"
    bare, settings = text.removeprefix("\ufeff"), None
    try:
        settings = json.loads(bare) if bare.strip() else {}
    except (ValueError, RecursionError) as error:
        trouble = f"not valid JSON: {error}"
    if isinstance(settings, dict):
        hooks, trouble = settings.get("hooks", {}), ""
        for name, groups in hooks.items() if isinstance(hooks, dict) else [("*", None)]:
            lists = [object_of(it).get("hooks") for it in (groups if isinstance(groups, list) else [None])]
            if not all(isinstance(it, list) and all(isinstance(hook, dict) for hook in it) for it in lists):
                trouble = f"hooks.{one_line(name)}: expected {{event: [{{hooks: [{{…}}]}}]}}"
        if not trouble:
            return text, settings
    raise CommandError(f"{path}: {trouble}; correct it first, nothing was changed")


def render_settings(settings: JsonObject, like: str) -> str:
    """Return `settings` as JSON, indented and ended as in `like`; raise CommandError."""
    shown = re.match(r'\ufeff?\s*\{\s*\n([ \t]*)"', like)
    try:
        text = json.dumps(settings, indent=shown[1] if shown else "  ", ensure_ascii=False, allow_nan=False)
    except (RecursionError, ValueError):
        why = "a number or the depth of its objects is no valid JSON"
        raise CommandError(f"{why}, so it cannot be written back; nothing was changed") from None
    # UTF-8 cannot encode a lone surrogate, so it stays escaped.
    text = _LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    if like.endswith("\n") or not like.strip("\ufeff \t\r\n"):
        text += "\n"
    if like.partition("\n")[0].endswith("\r"):
        text = text.replace("\n", "\r\n")
    return "\ufeff" + text if like.startswith("\ufeff") else text


def diff_settings(path: str, old_text: str, new_text: str) -> str:
    """Return the unified diff between two texts of the file at `path`, "" if they are the same."""
    import difflib

    # splitlines() would also split at U+2028, which a JSON string may contain.
    old, new = (re.findall(r"[^\n]*\n|[^\n]+", text) for text in (old_text, new_text))
    diff = difflib.unified_diff(old, new, path if old_text else "/dev/null", path)
    return "".join(it if it.endswith("\n") else f"{it}\n\\ No newline at end of file\n" for it in diff)


def write_settings(path: str, text: str, old_text: str) -> str | None:
    """Replace the settings at `path`, read as `old_text`, in one step, through links; raise CommandError.

    Returns the backup beside it (with mode 0600, since settings contain keys), if any. Mode and owner stay.
    """
    if read_text(path) != old_text:
        raise CommandError(f"{path}: another program has just changed it, so nothing was changed; try again")
    if text == old_text:
        return None
    target, backup = os.path.realpath(path), None
    try:
        if os.path.exists(path):
            about, stamp = os.stat(target), time.strftime("%Y%m%d-%H%M%S")
            backup = f"{path}.contextuate-backup-{stamp}-{time.time_ns() % 10**9:09}"
            emit_event.write_atomically(backup, old_text.encode())
            emit_event.write_atomically(target, text.encode(), stat.S_IMODE(about.st_mode))
            with contextlib.suppress(OSError):  # another owner's file, or a file system without owners
                os.chmod(target, stat.S_IMODE(about.st_mode))  # as it was: the umask has changed it
                os.chown(target, about.st_uid, about.st_gid)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            emit_event.write_atomically(target, text.encode())
    except OSError as error:
        if backup:
            with contextlib.suppress(OSError):  # perhaps it was not written either
                os.unlink(backup)
        words = f"{path} cannot be written, nothing was changed: {error.strerror or error}"
        raise CommandError(f"{words}; correct this, then try again") from error
    return backup


def send_through_hook(settings: Settings, message: str) -> subprocess.CompletedProcess[str]:
    """Run the hook as Claude Code does, with a test notification; its standard error reports the delivery."""
    payload = {"session_id": TEST_SESSION_ID, "hook_event_name": "Notification", "cwd": os.getcwd()}
    payload.update(message=message, notification_type="test")
    environment, files = {**os.environ, "CONTEXTUATE_DEBUG": "wait"}, client_files(os.getcwd())
    running = files_that_run(files)[0]
    command = next((it for file in [*running, *files] for it in our_hooks(file.settings).values()), None)
    if command is not None:
        for file in reversed(files):
            values = object_of(file.settings.get("env")).items()
            environment.update((name, value) for name, value in values if isinstance(value, str))
        arguments = ["/bin/sh", "-c", command]
    else:
        script = hook_script(settings.home)
        script = script if os.path.exists(script) else os.path.abspath(emit_event.__file__)
        environment.update(CONTEXTUATE_HOME=settings.home, CONTEXTUATE_CONFIG=settings.config_path)
        arguments = [base_interpreter(), "-I", "-S", script]
    given = encode_json(payload).decode()
    options: Any = {"encoding": "utf-8", "errors": "replace", "start_new_session": True, "env": environment}
    try:
        return subprocess.run(arguments, input=given, capture_output=True, timeout=HOOK_DEADLINE_S, **options)
    except subprocess.TimeoutExpired:
        words = f"contextuate: the hook did not end within {HOOK_DEADLINE_S:g} s: {shlex.join(arguments)}\n"
        return subprocess.CompletedProcess(arguments, 0, "", words)


def was_delivered(report: str) -> bool:
    """True if the hook reports that a monitor has stored the event, or that Redis delivered or keeps it."""
    return re.search(r"has stored|it is in the stream|\b[1-9]\d* subscribers got it", report) is not None


# ---------------------------------------------------------------------------
# Service: starts the monitor at login, and again after a crash
#
# Owns: the file of a systemd user unit or a launchd agent; the system's own commands do the rest.
# ---------------------------------------------------------------------------

SERVICE_NAME = "contextuate-monitor"
SERVICE_VARIABLES = ("CONTEXTUATE_HOME", "CONTEXTUATE_CONFIG", "CONTEXTUATE_MACHINE_ID", "CLAUDE_CONFIG_DIR")


def start_command(options: JsonObject) -> tuple[list[str], str]:
    """Return the command that runs a monitor from its bytecode (30 MB less in use), and its directory."""
    folder, name = os.path.split(os.path.abspath(__file__))
    flags = ((f"--{name.replace('_', '-')}", str(it)) for name, it in options.items() if it is not None)
    command = [sys.executable, "-m", name.removesuffix(".py"), "start", "--foreground"]
    return [*command, *itertools.chain.from_iterable(flags)], folder


def systemd_unit(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> bytes:
    """Return a systemd user unit that keeps a command running."""

    def quoted(text: str) -> str:
        return '"' + re.sub(r'(["\\])', r"\\\1", text).replace("%", "%%") + '"'

    lines = [
        "[Unit]", "Description=Contextuate Monitor", "", "[Service]",
        f"ExecStart={' '.join(quoted(part).replace('$', '$$') for part in command)}",
        f"WorkingDirectory={folder.replace('%', '%%')}",
        *(f"Environment={quoted(f'{name}={value}')}" for name, value in environment.items()),
        "Restart=on-failure", "RestartSec=2",
        "StandardOutput=null",  # it may contain the token
        "", "[Install]", "WantedBy=default.target", "",
    ]  # fmt: skip
    return "\n".join(lines).encode()


def launchd_agent(command: Sequence[str], folder: str, environment: Mapping[str, str]) -> bytes:
    """Return a launchd agent that keeps a command running."""
    import plistlib

    about: JsonObject = {"Label": SERVICE_NAME, "ProgramArguments": list(command), "WorkingDirectory": folder}
    about |= {"EnvironmentVariables": dict(environment), "RunAtLoad": True}
    return plistlib.dumps({**about, "KeepAlive": {"SuccessfulExit": False}})


class Service(NamedTuple):
    """How a system keeps a program running, as commands."""

    path: str  # of the file that describes the service
    content: Callable[[Sequence[str], str, Mapping[str, str]], bytes]
    probe: str  # succeeds where services of this user can run
    check: str  # succeeds while this one runs
    start: tuple[str, ...]  # with a new file
    stop: str
    restart: str


def this_service() -> Service:
    """Return how services run on this system."""
    name = SERVICE_NAME
    if sys.platform == "darwin":
        path, run = os.path.expanduser(f"~/Library/LaunchAgents/{name}.plist"), "launchctl"
        domain, place = f"gui/{os.getuid()}", f"gui/{os.getuid()}/{name}"
        start, restart = (f"{run} bootstrap {domain} {shlex.quote(path)}",), f"{run} kickstart -k {place}"
        checks = f"{run} print {domain}", f"{run} print {place}"
        return Service(path, launchd_agent, *checks, start, f"{run} bootout {place}", restart)
    path = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    run, path = "systemctl --user", f"{path}/systemd/user/{name}.service"
    checks, restart = (f"{run} show-environment", f"{run} is-active {name}"), f"{run} restart {name}"
    start = f"{run} daemon-reload", f"{run} enable {name}", restart
    return Service(path, systemd_unit, *checks, start, f"{run} disable --now {name}", restart)


def trouble_of(command: str) -> str | None:
    """Run a command of the system; return None, or why it failed."""
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command.split()[0]}: {getattr(error, 'strerror', None) or 'no answer'}"
    return one_line(done.stderr or done.stdout or f"status {done.returncode}") if done.returncode else None


def run_steps(commands: Iterable[str]) -> None:
    """Run commands of the system; raise CommandError for the first one that fails."""
    for command in commands:
        if (trouble := trouble_of(command)) is not None:
            raise CommandError(f"`{command}` failed: {trouble}")


# ---------------------------------------------------------------------------
# Doctor: the whole chain, link by link, from the configuration to an event that arrives
#
# Each check yields findings, and runs even if the one before failed. A running monitor reports its own facts
# and problems in its status. Doctor sends a test event and changes nothing else.
# ---------------------------------------------------------------------------

_RUN_INSTALL = "run: python3 contextuate_monitor.py install"


class Finding(NamedTuple):
    """A result of one check; `level`: "ok", "warn" (it works, but may need a change) or "fail"."""

    level: str
    check: str
    words: str
    advice: str = ""


Findings = Iterator[Finding]
_ok, _warn, _fail = (functools.partial(Finding, level) for level in ("ok", "warn", "fail"))
_in_time = functools.partial(emit_event.within, emit_event.EXCHANGE_DEADLINE_S)


def codex_trust(path: str, count: int) -> str:
    """Return "trusted" if Codex reports that it runs our `count` hooks in a file; else why not, or ""."""
    calls: list[JsonObject] = [
        {"id": 1, "method": "initialize", "params": {"clientInfo": {"name": "doctor", "version": "1"}}},
        {"method": "initialized"},
        {"id": 2, "method": "hooks/list", "params": {"cwds": [os.getcwd()]}},
    ]
    command, pipe, null = ["codex", "app-server"], subprocess.PIPE, subprocess.DEVNULL
    try:
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True)
    except FileNotFoundError:
        return ""
    with server:  # closes its input, at which it ends
        try:
            assert server.stdin and server.stdout
            server.stdin.write(b"".join(encode_json(call) + b"\n" for call in calls))
            server.stdin.flush()
            answers = map(json.loads, server.stdout)
            result = _in_time(lambda: next(it["result"] for it in answers if it.get("id") == 2))
            hooks = [it for place in result["data"] for it in place["hooks"] if it["sourcePath"] == path]
            ours = [hook for hook in hooks if _is_ours({**hook, "type": "command"})]
            run = sum(hook["trustStatus"] == "trusted" and hook["enabled"] for hook in ours)
        except Exception as error:
            with contextlib.suppress(OSError):
                os.killpg(server.pid, signal.SIGKILL)
            return f"Codex does not report whether it trusts them ({type(error).__name__})"
    return "trusted" if run == count else f"Codex runs {run} of them: the others are not trusted, or off"


class Doctor:
    """Checks the whole chain; `run` yields the findings. `warnings` are those of `load_settings`."""

    def __init__(self, settings: Settings, warnings: Sequence[str]) -> None:
        self._settings, self._warnings, self._is_redis = settings, warnings, settings["mode"] == "redis"
        self._about, self._client_files = running_monitor(settings), client_files(os.getcwd())

    def run(self) -> Findings:
        """Yield the findings of every check, in the order of an event's way."""
        has_hook = os.path.exists(hook_script(self._settings.home)) or shutil.which(CLAUDE)
        only_receives = self._is_redis and not has_hook  # a monitor for other machines
        if only_receives:
            yield _ok("hook", "none, and no Claude Code: this machine only receives events of others")
        hook = () if only_receives else (self._hook, self._registered, self._status_line)
        redis = (self._redis_py, self._redis, self._publisher) if self._is_redis else ()
        probe = () if only_receives else (self._probe,)
        for check in (self._config, self._files, *hook, self._spool, self._monitor, *redis, *probe):
            try:
                yield from check()
            except Exception as error:  # the other checks still run
                name = check.__name__.strip("_").replace("_", "-")
                what = "" if isinstance(error, CommandError) else f"{type(error).__name__}: "
                yield _fail(name, f"could not be checked: {what}{error}")

    def _config(self) -> Findings:
        path = self._settings.config_path
        where = path if os.path.exists(path) else f"no {path}, so defaults"
        yield _ok("config", f"{where}; mode {self._settings['mode']}, machine {self._settings.machine_id}")
        for warning in self._warnings:
            yield _warn("config", warning, "correct the file, then restart the monitor")

    def _files(self) -> Findings:
        home = self._settings.home
        about = os.stat(home) if os.path.isdir(home) else None
        if about is None or about.st_uid != os.getuid() or not os.access(home, os.W_OK):
            advice = f"run `start`, or chmod u+rwx {shlex.quote(home)}, or set CONTEXTUATE_HOME"
            yield _fail("files", f"{home} is missing, cannot be written, or is another user's", advice)
        elif about.st_mode & 0o077:
            yield _warn("files", f"{home} is open to other users", f"run: chmod 700 {shlex.quote(home)}")
        else:
            yield _ok("files", f"{home} is for this user only")

    def _hook(self) -> Findings:
        if (version := claude_version()) is None:
            advice = "install it, or put it on the PATH; until then only the oldest events are registered"
            yield _warn("claude", "`claude` was not found or does not print its version", advice)
        else:
            yield _ok("claude", f"Claude Code {'.'.join(map(str, version))}")
        script = hook_script(self._settings.home)
        installed = os.path.join(os.path.dirname(script), "lib", "emit_event.py")
        if not (os.path.exists(script) and os.path.exists(installed)):
            yield _fail("hook", f"no hook at {script}, or not all of it", _RUN_INSTALL)
        elif filecmp.cmp(emit_event.__file__, installed, shallow=False):
            yield _ok("hook", script)
        else:
            yield _warn("hook", f"{script} is of another version than the monitor", _RUN_INSTALL)

    def _registered(self) -> Findings:
        for file in self._client_files:
            if file.trouble:
                level = "fail" if file.path == settings_path(None) else "warn"
                yield Finding(level, "registered", f"no hook of this file runs: {file.trouble}", "correct it")
        running, off = files_that_run(self._client_files)
        ours = [file.path for file in self._client_files if our_hooks(file.settings)]
        if off and not any(our_hooks(file.settings) for file in running):
            yield _fail("registered", off, "remove that setting, or ask this machine's administrator")
        if is_local := ours and settings_path(None) not in ours:
            yield _ok("registered", f"in {ours[0]}, for this directory")
        for program in agents_here() if is_local else (CLAUDE, *agents_here()):
            yield from self._program(program)
        names, paths = registered_twice(running)
        if names:
            words = f"{', '.join(names)} would come twice: hooks in {' and '.join(paths)}"
            yield _warn("registered", words, "keep one of them")

    def _program(self, program: str) -> Findings:
        """Compare a program's registration with what `install` would write, with the same options."""
        check, version = ("registered", claude_version()) if program == CLAUDE else ("agents", None)
        try:
            removed, key = plan_install("", program), PROGRAMS[program].answers
            commands = our_hooks(read_settings(removed.path)[1]) if key else {}
            without = [event for event in OPTIONAL_EVENTS if commands and event not in commands]
            answers = any("--answer" in command for command in commands.values())
            wait_s = self._settings[key] if answers else 0
            plan = plan_install(self._settings.home, program, None, version, without, wait_s=wait_s)
        except CommandError as error:
            yield _warn(check, str(error), "correct it")
            return
        options = " --answers" * answers + "".join(f" --without {it}" for it in without)
        advice = f"{_RUN_INSTALL} --agent {program}{options}; then restart {program}"
        if removed.new_text == removed.old_text:
            level = "fail" if program == CLAUDE else "ok"
            yield Finding(level, check, f"the hook is not registered in {plan.path}", advice)
        elif plan.new_text != plan.old_text:
            yield _warn(check, f"{plan.path} is not as this version would register", advice)
        else:
            words = f", without {', '.join(without)}" if without else ""
            asked = "forms of MCP servers" if without else "questions"
            words += f", {asked} can be answered on the page" if answers else ""
            trust = codex_trust(plan.path, len(plan.names)) if program == "codex" else ""
            words += f"; {trust}" if trust else ""
            level = "warn" if trust not in ("", "trusted") else "ok"
            words = f"{plural(len(plan.names), 'event')} of {program} in {plan.path}{words}"
            yield Finding(level, check, words, "start codex and choose “Trust all”, or give it /hooks")
        has_remote = self._settings["answers.remote"] and emit_event.read_answer_key(self._settings.home)
        if answers and self._is_redis and program == CLAUDE and not has_remote:
            words = "no answer comes through Redis: that takes answers.remote and a key"
            yield _warn("answers", words, "set answers.remote to true, and run: answers key")

    def _status_line(self) -> Findings:
        """Run our status line, without the one that it wraps, with an object that is not handed on."""
        user, check = settings_path(None), "statusline"
        shown = next((file for file in self._client_files if "statusLine" in file.settings), None)
        ours = next((status_line_in(file.settings) for file in self._client_files if file.path == user), None)
        if ours is None or shown is None:
            yield _ok(check, "not registered, so context and cost are estimates; see `install --status-line`")
            return
        if shown.path != user:
            yield _warn(check, f"Claude Code shows the one of {shown.path} instead", "remove that one")
        about = {"session_id": TEST_SESSION_ID, "cwd": os.getcwd(), "model": {"display_name": "Test"}}
        wrapped = "" if ours.wrapped is None else f"{shlex.quote(ours.wrapped)} "
        command = ["/bin/sh", "-c", ours.command.replace(f"set -- {wrapped}", "set -- ", 1)]
        done = subprocess.run(command, input=encode_json(about) + b"\n", capture_output=True, timeout=10)
        said = one_line(done.stdout.decode("utf-8", "replace"), 60)
        words = f"prints {said!r}" + ("" if said == "Test" else ", so it hands on no figures")
        words += f"; it runs {ours.wrapped}" if ours.wrapped else ""
        yield Finding("ok" if said == "Test" else "fail", check, words, f"{_RUN_INSTALL} --status-line")

    def _spool(self) -> Findings:
        segments = emit_event.spool_segments(self._settings.path("spool"))
        if size := sum(size for _, size in segments):
            oldest = human_duration(now_ms() - emit_event.segment_start_ms(segments[0][0]))
            words = f"{human_size(size)} of events wait to leave, the oldest for {oldest}"
            yield _warn("spool", words, "they are delivered once the checks below pass")
        else:
            yield _ok("spool", "empty: no event waits on this machine")

    def _monitor(self) -> Findings:
        mode, about, facts = self._settings["mode"], self._about, []
        problems = foreign_problems(self._settings.home)  # as the status of a monitor has them
        if about is None and self._is_redis:
            yield _ok("monitor", "not running: this machine only sends events")
        elif about is None:
            path, words = self._settings["socketPath"], "events wait in the spool"
            if is_used := lock_holder(path + ".lock") is not None:
                words = f"another one takes the events: it uses {path}{stop_advice(path)}"
            advice = "" if is_used else "run: python3 contextuate_monitor.py start"
            yield _fail("monitor", f"not running: {words}", advice)
            for key, option in (("server.port", "--port"), ("server.wsPort", "--ws-port")):
                try:
                    bind_tcp(self._settings["server.host"], self._settings[key], key, option).close()
                except CommandError as error:
                    yield _fail("ports", str(error))
        else:
            status = ask_monitor(self._settings, "/api/status")
            problems, facts = status["problems"], status["facts"]
            words = f"{about['process']}, version {status['version']}, mode {status['mode']}"
            path = about["socketPath"]
            if (status["version"], status["mode"], path) == (__version__, mode, self._settings["socketPath"]):
                yield _ok("monitor", f"{words}, {page_links(self._settings, about)[0]}")
            else:
                yield _warn("monitor", f"{words}, {path}: not as configured for {__version__}", RUN_RESTART)
            is_ours = os.path.exists(path) and os.lstat(path).st_uid == os.getuid()
            advice = "set socketPath to a place of your own"
            yield _ok("socket", path) if is_ours else _fail("socket", f"{path} is not this user's", advice)
        for problem in problems:
            yield Finding(problem["level"], problem["kind"], problem["words"], problem["advice"])
        good = {"store", "index", "notify", "stream"} - {problem["kind"] for problem in problems}
        yield from (_ok(fact["name"], fact["words"]) for fact in facts if fact["name"] in good)

    def _redis_py(self) -> Findings:
        python = emit_event.publisher_python(self._settings.home)
        if (answer := run_in_python(python, "import redis; print(redis.__version__)")).returncode:
            yield _fail("redis-py", f"{python}, which runs the publisher, lacks it", redis_py_advice(python))
        else:
            yield _ok("redis-py", f"{answer.stdout.decode().strip()} for {python}")

    def _redis(self) -> Findings:
        """Connect as hooks do. The probe tests a hook's rights; a monitor's status has its own."""
        values, client, off_s = self._settings.values, None, 0.0
        try:
            client, before = _in_time(lambda: emit_event.redis_client(values)), time.time()
            seconds, micros = _in_time(client.time)
            off_s = (before + time.time()) / 2 - (seconds + micros / 1e6)
        except Exception as error:
            # A user without the right to TIME is connected, too.
            if client is None or type(error).__name__ != "NoPermissionError":
                yield _fail("redis", redis_advised(emit_event.redis_trouble(error, values)))
                return
        yield _ok("redis", f"{emit_event.redis_place(values)} answers")
        if abs(off_s) > 2:
            off = f"{human_duration(abs(off_s) * 1000)} {'ahead of' if off_s > 0 else 'behind'}"
            words = f"this machine's clock is {off} that of Redis"
            yield _warn("clock", words, "set both clocks by a time service")
        if not values["redis.streamMaxLength"]:
            yield _warn("stream", "off: a monitor misses events sent while it does not run")

    def _publisher(self) -> Findings:
        state = publisher_state(self._settings.home)
        reasons = [state[it] for it in ("reason", "channelReason", "streamReason") if state.get(it)]
        if not state["running"]:
            yield _ok("publisher", "none runs: a hook starts one with the next event; it exits when idle")
            return
        got = plural(state["subscribers"] or 0, "subscriber")  # None before the first event
        words = f"pid {state['pid']}, {plural(state['published'], 'event')} published, the last to {got}"
        words = "; ".join(reasons) or words
        yield Finding("fail" if state.get("reason") else "warn" if reasons else "ok", "publisher", words)

    def _probe(self) -> Findings:
        """Run the hook as Claude Code does, and look for its event where it should arrive."""
        token, about, path = f"doctor {uuid.uuid4()}", self._about, self._settings.config_path
        done = send_through_hook(self._settings, token)
        lines = done.stderr.strip().splitlines()
        foreign = [line for line in lines if not line.startswith("contextuate: ")]  # of the shell
        read = re.search(r"^contextuate: config (.*): mode ", done.stderr, re.MULTILINE)
        if read and read[1] != path:
            words = f"the hook reads {read[1]}, this command {path}"
            yield _warn("hook", words, "set CONTEXTUATE_CONFIG where Claude Code is started, too")
        trouble = [*foreign, *lines[-1:], "the hook says nothing"][0].removeprefix("contextuate: ")
        if done.returncode or done.stdout:
            trouble = f"the hook ends with status {done.returncode} and prints {done.stdout[:80]!r}"
        if done.returncode or done.stdout or not was_delivered(done.stderr):
            yield _fail("probe", f"an event did not get through: {trouble}", "see the findings above")
            return
        if foreign:
            yield _warn("hook", f"{foreign[0]}: another Python 3 runs the hook instead", _RUN_INSTALL)
        where, is_shown = "in Redis" if self._is_redis else "stored", about is None
        deadline = time.monotonic() + 15
        while not is_shown and time.monotonic() < deadline:
            time.sleep(0.05)
            is_shown = token in str(ask_monitor(self._settings, "/api/events?limit=200"))
        if is_shown:
            yield _ok("probe", f"an event {f'is {where}' if about is None else 'has reached the monitor'}")
        else:
            advice = "`status` shows the monitor's connection to Redis"
            yield _fail("probe", f"an event is {where}, but the monitor does not show it", advice)


# ---------------------------------------------------------------------------
# Demo: a fictitious working day of a small team, marked as a demo
#
# Owns: the story, two tables of text, and a small player that turns it into payloads of the real client.
# Does no I/O and knows nothing of the monitor. Ids and pauses depend on the time of the call alone.
# ---------------------------------------------------------------------------

# Letter, tool ("!": it fails), what _DEMO_INPUTS names or JSON | output. \n begins a line, <31> that colour.
_DEMO_STEPS = r"""
g Grep applyDiscount | src | src/cart/totals.ts:41:export function applyDiscount(
G Glob src/**/*.ts | src/cart/totals.ts\n src/cart/round.ts\n src/checkout/Payment.tsx
r Read src/cart/totals.ts |   if (!coupon) return net;\n  return net - net * coupon.rate;\n}
e Edit src/cart/totals.ts |   return net - net * coupon.rate; |   return Math.max(0, net * (1 - coupon.rate));
w Write src/cart/round.ts | export const roundCents = (n) => Math.round(n * 100) / 100;
T Bash! npm test -- cart | Run the cart tests | <31>FAIL<0> cart/totals.test.ts\n    Received: <31>-4.99<0>
t Bash npm test -- cart | Run the cart tests | <32>PASS<0> test/cart/totals.test.ts\n\nTests: <32>27 passed<0>
d Bash git diff --stat | List changes |  src/cart/round.ts  | 1 +\n src/cart/totals.ts | 2 +-
B Bash! npm run build | Build | <31>error TS2322<0>: Type 'string' is not assignable to type 'number'.
b Bash rm -rf build && npm run build | Build from scratch | <32>✓ built in 4.87s<0>\nbuild/app.js  214.6 kB
a Bash npm run bench | Compare with the last release | totals  <32>-11.8 %<0>  improved
o TodoWrite {"todos": [{"content": "Find", "status": "completed"}, {"content": "Mend", "status": "pending"}]}
p mcp__github__get_pull_request {"pull_number": 418} | {"title": "Coupons: clamp totals at 0"}
f WebFetch https://developer.mozilla.org/docs/Web/HTML/Element/button | What does disabled do? | No clicks.
q AskUserQuestion {"questions": [{"question": "Swap?", "options": [{"label": "No"}, {"label": "Yes"}]}]}
x ExitPlanMode {"plan": "## --follow\n1. Watch the inode\n2. Reopen on change"}
1 TaskCreate {"subject": "Name the text", "description": "The error should carry what was typed"}
2 TaskUpdate {"taskId": "1", "status": "in_progress"}
3 TaskUpdate {"taskId": "1", "status": "completed"}
"""
# The sessions: machine, directory, permission mode, how it ends if it does. Below: [earliest time] verb words
# and a subagent's lines below its own. > prompt, = steps, < answer; `until` a time repeats steps, `open`
# lasts until then or for ever, and so does `ask`, which waits for a person first. Any other verb is a hook,
# with its fields in JSON.
_DEMO_STORY = """
build-box /home/ci/tidewater-shop bypassPermissions other
  -480m > Update the patch-level dependencies = g r t d T r e t d < All are in; one cart test is fixed.
mira-laptop /home/mira/tidewater-shop default prompt_input_exit
  -408m > Review pull request 418, in particular the rounding = p g r d t
  agent general-purpose Find every caller
    = g r
    agent Explore Check the settings
      = g r < Only the staging settings differ.
    = r g < Three callers; two rely on the default, one sets the value itself.
  < Sound overall. A coupon above 100 % still gives a negative total, and rounding happens twice.
  -391m > Fix both on the branch = o f r w e T r e t d < Both fixed, with tests for large coupons.
mira-laptop /home/mira/tidewater-api default clear
  -318m > Why does a range over midnight find nothing? = g G r B r b t < Its end lies before its start.
mira-laptop /home/mira/tidewater-api default
  > Write it into the manual = r G e t < The manual has a section on midnight now.
mira-laptop /home/mira/tidewater-shop default
  -176m > Customers can press Pay twice, stop that = g r e t < The button is now disabled.
  -7m > Make a clean production build and check its size = d r t
  -4m ask b +41s
  until +128s d g r t < The clean build is 214.6 kB: 2 kB less than the last release.
jonas-mac /Users/jonas/tidewater-api default
  -143m > Quote what was typed in an error = 1 TaskCreated {"task_id": "1", "task_subject": "Name the text"}
  = 2 g r e B e b t 3 TaskCompleted {"task_id": "1", "task_subject": "Name the text"} < They quote it now.
  -12m > What should happen with 14:00..12:00? = r g e
  -9m ask q
jonas-mac /Users/jonas/tidewater-shop acceptEdits
  -18m > Check the code style of the checkout = g r e t < Three corrected. Shall I rename the fourth?
  -16m Notification {"message": "Claude is waiting for your input", "notification_type": "idle_prompt"}
build-box /home/ci/tidewater-shop bypassPermissions
  -3m > Check the cart and the checkout in parallel, then tidy up the rounding = g r
  background general-purpose Check the cart
    until +58s r g d t g < The cart rounds once, in `round.ts`.
  background general-purpose Check the checkout
    until +176s g r d < The checkout sends each payment once.
  < Two subagents check; the rounding follows when both are back.
  +178s until +236s g r w t d < Both are fine. Amounts are rounded in `round.ts` only.
jonas-mac /Users/jonas/tidewater-api acceptEdits
  -52m > Plan a --follow that survives rotation = g r g < Watch the inode, reopen on change.
  -3m > Good plan. Implement it = r e g B e B r B e B B
  until end e b t r e b t g
build-box /home/ci/tidewater-api acceptEdits
  -21m > Is --follow as fast as it was? = r
  open t
  -9m > Not all tests, only the benchmark = r
  -6m open a +212s
  < It is 12 % faster than the last release.
mira-laptop /home/mira/tidewater-shop default
  -24m > Where does the build lose its time? = g r < On old browsers. > Leave them out = g e t T
  StopFailure {"error": "rate_limit", "last_assistant_message": "API Error: Rate limit reached"}
mira-laptop /home/mira/tidewater-api plan
  -11m > How should --follow notice a truncated file? = g r g r
  ask x
"""
_DEMO_VERB = re.compile(r"(?:([-+]\d+[ms]) )?(\S+) (.*?)(?: (?=[=<>] |[A-Z]\w+ \{)|$)")
_DEMO_MODEL = "claude-opus-5-5"
_DEMO_TOKENS = (6, 280, 30_000, 1500, 0)  # of each call, by COUNT_NAMES
_DEMO_INPUTS = {
    "Bash": "command description", "Read": "file_path", "Edit": "file_path old_string new_string",
    "Write": "file_path content", "Grep": "pattern path", "Glob": "pattern", "WebFetch": "url prompt",
}  # fmt: skip


class _DemoAgent:
    """A session's main agent or a subagent, with a clock of its own: `at`, in ms."""

    def __init__(self, header: str, key: str, now: int, end: int, steps: dict[str, list[str]]) -> None:
        self.steps = steps
        self.machine, self.cwd, self.mode, *self.ending = header.split()
        self.rng, self.now, self.end, self.at = random.Random(key), now, end, now
        self.session_id = self.new_id()
        self.fields: JsonObject = {}  # of a subagent: agent_id, agent_type
        # A session and its subagents have these together:
        self.events: list[JsonObject] = []
        self.running: list[tuple[int, JsonObject]] = []  # until when, and the background task
        self.usage: JsonObject = {"models": {}, "agents": {}, "model": _DEMO_MODEL}

    def new_id(self) -> str:
        return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))

    def moment(self, text: str) -> int:
        return self.end if text == "end" else self.now + int(text[:-1]) * {"m": 60_000, "s": 1000}[text[-1]]

    def pause(self) -> None:
        self.at += self.rng.randrange(800, 6000 if self.at < self.now else 2500)  # live, a person is watching

    def record(self, **event: Any) -> None:
        about = {"id": self.new_id(), "timestamp": self.at, "machineId": self.machine, "demo": True}
        self.events.append({**about, **event})

    def hook(self, name: str, **fields: Any) -> None:
        common = {"session_id": self.session_id, "cwd": self.cwd, "permission_mode": self.mode, **self.fields}
        self.record(hook={**common, "hook_event_name": name, **fields})

    def play(self, story: str) -> None:
        for block in re.split(r"\n(?=\S)", story):
            line, _, inner = block.replace("\n  ", "\n").partition("\n")
            for moment, verb, words in _DEMO_VERB.findall(line):
                self.at = max(self.at, self.moment(moment)) if moment else self.at
                first, _, rest = words.partition(" ")
                if verb == ">":
                    self.hook("UserPromptSubmit", prompt=words)
                elif verb == "=":
                    for letter in words.split():
                        self.run(letter)
                elif verb == "until":
                    letters = itertools.cycle(rest.split())
                    while self.at <= self.moment(first) - 5000:
                        self.run(next(letters))
                elif verb == "<":
                    self.answer(words)
                elif verb in ("open", "ask"):
                    self.run(first, self.moment(rest) if rest else math.inf, verb == "ask")
                elif verb in ("agent", "background"):
                    self.start_agent(first, rest, inner, verb == "background")
                else:
                    self.hook(verb, **json.loads(words))

    def call(self, tool: str, given: JsonObject) -> JsonObject:
        emit_event.add_counts(self.usage["models"].setdefault(_DEMO_MODEL, {}), _DEMO_TOKENS)
        use_id = f"toolu_{self.rng.getrandbits(72):018x}"
        call = {"tool_name": tool, "tool_input": given, "tool_use_id": use_id}
        self.hook("PreToolUse", **call)
        return call

    def run(self, letter: str, end: float = 0, asks: bool = False) -> None:
        """Do one step, which ends by itself, at a time, or never (infinity)."""
        self.pause()
        tool, *texts = self.steps[letter]
        name = tool.rstrip("!")
        fields = _DEMO_INPUTS.get(name, "").split()
        given = dict(zip(fields, texts)) if fields else json.loads(texts[0], strict=False)
        output = " | ".join(texts[len(fields) or 1 :])
        if "file_path" in given:
            given["file_path"] = f"{self.cwd}/{texts[0]}"
        call = self.call(name, given)
        took_ms: float = self.rng.randrange(4, 60 if name != "Bash" else 9000 if self.at < self.now else 2000)
        if asks:
            rules = {"type": "addRules", "rules": [{"toolName": name}], "behavior": "allow"}
            offer = {**rules, "destination": "session"}
            self.hook("PermissionRequest", tool_name=name, tool_input=given, permission_suggestions=[offer])
        elif end:
            took_ms = end - self.at
        if end == math.inf:
            return
        self.at = int(end or self.at + took_ms)
        if tool != name:
            self.hook("PostToolUseFailure", **call, error=f"Exit code 1\n{output}", duration_ms=took_ms)
        else:
            made = {"Bash": {"stdout": output}, "Edit": {}, "Write": {"originalFile": None}}
            response = made.get(name, output)
            self.hook("PostToolUse", **call, tool_response=response, duration_ms=took_ms)

    def answer(self, text: str) -> None:
        self.pause()
        tasks = [task for end, task in self.running if end > self.at]
        name = "SubagentStop" if self.fields else "Stop"
        self.hook(name, last_assistant_message=text, background_tasks=tasks)
        if not self.fields:
            place = {"sessionId": self.session_id, "workingDirectory": self.cwd, "hookType": ""}
            self.record(**place, eventType="usage", data={"usage": copy.deepcopy(self.usage)})

    def start_agent(self, kind: str, job: str, story: str, in_background: bool) -> None:
        self.pause()
        agent_id = f"a{self.rng.getrandbits(64):016x}"
        given = {"description": job, "prompt": f"{job}. Report what you find.", "subagent_type": kind}
        call = self.call("Agent", {**given, "run_in_background": in_background})
        child = copy.copy(self)
        child.fields, child.at = {"agent_id": agent_id, "agent_type": kind}, self.at + 40
        child.hook("SubagentStart")
        child.play(story)
        result: JsonObject = {"agentId": agent_id, "status": "async_launched"}
        if in_background:
            task = {"id": agent_id, "type": "subagent", "status": "running", "description": job}
            self.running.append((child.at, task))
        else:
            report = self.events[-1]["hook"]["last_assistant_message"]
            result.update(status="completed", content=[{"type": "text", "text": report}])
            self.at = child.at
        self.hook("PostToolUse", **call, tool_response=result)


def demo_day(now_ms: int, live_s: float) -> Iterator[tuple[int, JsonObject]]:
    """Yield (timestamp_ms, event to send) in order of time: 8 hours before now_ms, then live_s seconds."""
    end_ms = now_ms + int(max(live_s, 300) * 1000)  # of the story; what comes after live_s is left out
    text = re.sub(r"<(\d+)>", "\x1b[\\1m", _DEMO_STEPS.strip().replace("\\n", "\n"))
    lines = (re.sub(r"^(\S+ \S+) ", r"\1 | ", line) for line in re.split(r"\n(?=\w \w+!? )", text))
    steps = {line[0]: line[2:].split(" | ") for line in lines}
    events: list[JsonObject] = []
    cleared_at = 0
    for number, block in enumerate(re.split(r"\n(?=\S)", _DEMO_STORY.strip())):
        header, story = block.replace("\n  ", "\n").split("\n", 1)
        session = _DemoAgent(header, f"{now_ms}/{number}", now_ms, end_ms, steps)
        session.at = cleared_at or session.moment(story.split()[0]) - 9000
        session.hook("SessionStart", source="clear" if cleared_at else "startup", model=_DEMO_MODEL)
        session.play(story)
        if session.ending:
            session.pause()
            session.hook("SessionEnd", reason=session.ending[0])
        cleared_at = session.at + 140 if session.ending == ["clear"] else 0
        events += session.events
    events.sort(key=operator.itemgetter("timestamp"))
    return ((event["timestamp"], event) for event in events if event["timestamp"] <= now_ms + live_s * 1000)


# ---------------------------------------------------------------------------
# Import: history from before the monitor was installed
#
# Lines of other files in, events out, marked `imported`; reads those files and does no other I/O.
# An event's id depends on its place, so that importing twice gives the same events. Events of hooks are not
# repeated: of a session with such events, only earlier ones are imported.
# A transcript's name is the id of its session. Tokens follow the rules of emit_event.UsageReader.
# ---------------------------------------------------------------------------

_UUID = re.compile("[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TITLES = {"custom-title": "customTitle", "ai-title": "aiTitle", "summary": "summary"}  # the best first
# In the directory of the Node.js Contextuate monitor: an event each; the events of a session, and its data.
_NODE_FILE = re.compile(r".*/(?:(?:raw|processed)/[^/]+\.json|sessions/[^/]+/(?:events\.jsonl|meta\.json))")
_NODE_ACTIONS = (
    ("rename", "label", "label"), ("pin", "pinned", "isPinned"), ("hide", "hidden", "hidden"),
    ("set_parent", "parentSessionId", "manualParentSessionId"),
)  # fmt: skip


def new_events(store: Journal, session_id: str, events: Iterable[JsonObject]) -> list[JsonObject]:
    """Return the events of one session that are not stored yet."""
    ids, calls, said_ms = set(), set(), set()  # of stored events; when words were said that were read
    first_hook_ms, was_edited = math.inf, False  # a person's label, pin or the like here must last
    for _, stored, _ in readable(store.lines(session_id)):
        is_action, is_own = stored["hookType"] == "Monitor", not stored.get("imported")
        was_edited = was_edited or (is_action and is_own)
        ids.add(stored["id"])
        calls.add(text_of(stored["data"].get("toolUseId")))
        if stored["eventType"] == emit_event.WORDS:
            said_ms.add(stored["timestamp"])
        elif is_own and not is_action:
            first_hook_ms = min(first_hook_ms, stored["timestamp"])

    def is_new(event: JsonObject) -> bool:
        hook, time_ms, use_id = event["hookType"], event["timestamp"], text_of(event["data"].get("toolUseId"))
        if event["id"] in ids or (was_edited and hook == "Monitor"):
            return False
        is_known = hook == "SessionEnd" or (use_id != "" and use_id in calls)
        # A hook's event and the transcript's line about the same thing are at most 2 s apart.
        is_early = time_ms < first_hook_ms - 2000 and not is_known
        is_said = hook == "UserPromptSubmit" and time_ms in said_ms
        return not is_said and (is_early or first_hook_ms == math.inf)

    return list(filter(is_new, events))


def import_sources(paths: Sequence[str], skipped: list[str]) -> list[tuple[str, list[str]]]:
    """Return (session id, its transcripts), oldest first, and ("", exports); add to `skipped`."""
    transcripts: dict[str, list[str]] = {}
    exports: list[str] = []
    for given in paths:
        walk = os.walk(given, onerror=lambda error: skipped.append(f"{error.filename}: {error.strerror}"))
        inside = (os.path.join(folder, name) for folder, _, names in walk for name in names)
        named = (it for it in inside if re.search(r"/[^./][^/]*\.json[^/]*(?<!\.meta\.json)$", it))
        for path in sorted(named) if os.path.isdir(given) else [given]:
            try:
                with open_regular(path) as file:
                    lines = list(itertools.islice(iter(functools.partial(file.readline, 1 << 20), b""), 50))
            except OSError as error:
                skipped.append(f"{path}: {error.strerror or error}")
                if path == given:
                    raise CommandError(skipped[-1]) from None
                continue
            session_id = _transcript_session(path, lines)
            is_export = path.endswith((".jsonl", ".ndjson")) and "/subagents/" not in path
            if session_id is not None:
                transcripts.setdefault(session_id, []).append(path)
            elif path == given or is_export or _NODE_FILE.fullmatch(path):
                exports.append(path)  # other files of a directory are ignored
    sources = sorted(transcripts.items(), key=lambda source: min(map(os.path.getmtime, source[1])))
    exports.sort(key=lambda path: path.endswith("/meta.json"))  # sums of tokens after the events
    return [*sources, ("", exports)]


def _transcript_session(path: str, lines: Iterable[bytes]) -> str | None:
    """Return the session id of a transcript by its first lines, None for any other file."""
    folder, _, name = path.rpartition("/")
    above, is_below, _ = folder.rpartition("/subagents")
    is_agent, stem = name.startswith("agent-"), name.partition(".")[0]
    for line in lines:
        with contextlib.suppress(MalformedEvent):
            entry = emit_event.parse_event_line(line)
            session_id = text_of(entry.get("sessionId"))
            if isinstance(entry.get("type"), str) and session_id:
                if is_below:
                    return os.path.basename(above) if is_agent else None
                return stem if _UUID.fullmatch(stem) else session_id
    return None


def import_batches(
    sources: list[tuple[str, list[str]]], machine: str, is_stored: Callable[[str], bool], skipped: list[str]
) -> Iterator[tuple[str, list[JsonObject], int]]:
    """Yield (session id, its events, bytes read for them); add what is not understood to `skipped`."""
    seen: set[str] = set()
    usage, ids = emit_event.UsageReader(""), {session_id for session_id, _ in sources}
    for session_id, paths in sources:
        size = sum(map(os.path.getsize, paths))
        by_session: dict[str, list[JsonObject]] = {}
        found: set[str] = set()  # ids of events, and of the sessions whose events contain their tokens
        if session_id:
            by_session[session_id] = TranscriptReader(
                session_id, machine, seen, lambda name: name in ids or is_stored(name), usage, skipped
            ).events(paths)
        else:
            for event in itertools.chain.from_iterable(export_events(path, skipped) for path in paths):
                built = emit_event.build_event(like_ours(event), now_ms(), machine)
                session, is_sum = built["sessionId"], built["eventType"] == "usage"
                if built["id"] not in found and not (is_sum and session in found):
                    found |= {built["id"], session if "usage" in built["data"] and not is_sum else ""}
                    by_session.setdefault(session, []).append(built)
        for name, events in by_session.items():
            yield name, events, size
            size = 0


@dataclasses.dataclass
class TranscriptReader:
    """Converts transcripts of a session and its subagents to the events that hooks would have sent."""

    session_id: str
    machine_id: str
    seen: set[str]  # lines and words of any transcript so far: a resumed session begins with copies
    is_known: Callable[[str], bool]  # True for a session that another source has
    usage: emit_event.UsageReader  # of the whole import
    skipped: list[str]  # gets what is not understood
    _calls: dict[str, JsonObject] = dataclasses.field(default_factory=dict)  # tool use id → its block
    _agents: set[str] = dataclasses.field(default_factory=set)
    _titles: list[tuple[str, JsonObject]] = dataclasses.field(default_factory=list)  # type of line, line
    _sums: list[Any] = dataclasses.field(default_factory=list)  # the client's own
    _used: JsonObject = dataclasses.field(default_factory=dict)

    def events(self, paths: Iterable[str]) -> list[JsonObject]:
        """Return the events in order of time; [] when there are none."""
        entries = [entry for path in paths for entry in self._entries_of(path)]
        entries.sort(key=lambda entry: entry["timestamp_ms"])
        self._used = self.usage.begin(self.session_id)
        if not (events := [event for entry in entries for event in self._events_of(entry)]):
            return []
        self.usage.count(self.session_id, self._sums, self._used)  # they have no time
        start, end = ({**entry, "agentId": None} for entry in (entries[0], entries[-1]))
        own = {entry["uuid"] for entry in entries}  # a summary may be one of another session
        kept = [it for it in self._titles if it[0] != "summary" or text_of(it[1].get("leafUuid")) in own]
        titles = {kind: line[_TITLES[kind]] for kind, line in kept}
        usage = list(self._usage_event(end, "end"))
        about = {"source": "import", "model": usage[0]["data"]["usage"].get("model") if usage else None}
        about["session_title"] = next((titles[kind] for kind in _TITLES if kind in titles), None)
        begin = self._event(start, "SessionStart", "start", about)
        return [begin, *events, *usage, self._event(end, "SessionEnd", "end", {"reason": "import"})]

    def _entries_of(self, path: str) -> Iterator[JsonObject]:
        """Yield the lines with messages, each with the `facts` that the parser finds in it."""
        name = os.path.basename(path)
        agent_id = name[len("agent-") :].partition(".")[0] if name.startswith("agent-") else ""
        parser, malformed = emit_event.TranscriptParser(agent_id), 0
        with open_regular(path) as file:
            lines = file.read().split(b"\n")
        for line in filter(bytes.strip, lines):
            try:
                entry = emit_event.as_message(emit_event.parse_event_line(line))
            except MalformedEvent:
                malformed += line is not lines[-1]  # which may still be written
                continue
            facts = list(parser.facts_in(entry, line))
            place, origin, kind = entry.get("uuid"), entry.get("sessionId"), text_of(entry.get("type"))
            time_ms = emit_event.iso_time_ms(entry.get("timestamp"))
            if isinstance(origin, str) and origin != self.session_id and self.is_known(origin):
                continue
            if kind in _TITLES and text_of(entry.get(_TITLES[kind])).strip():
                self._titles.append((kind, entry))
            if kind == "cost-state":
                self._sums += facts
            is_message = kind in ("user", "assistant") and isinstance(entry.get("message"), dict)
            if is_message and time_ms and isinstance(place, str) and place not in self.seen:
                self.seen.add(place)
                agent = entry["agentId"] if isinstance(entry.get("agentId"), str) else agent_id or None
                blocks = emit_event.objects_in(entry["message"].get("content"))
                yield {**entry, "agentId": agent, "facts": facts, "timestamp_ms": time_ms, "blocks": blocks}
        if malformed:
            self.skipped.append(f"{path}: not JSON: {plural(malformed, 'line')}")

    def _events_of(self, entry: JsonObject) -> Iterator[JsonObject]:
        agent_id, message = entry.get("agentId"), entry.get("message", {})
        if isinstance(agent_id, str) and agent_id not in self._agents:
            self._agents.add(agent_id)
            yield self._event(entry, "SubagentStart", "begin", {})
        events = emit_event.objects_in(entry["facts"])
        self.usage.count(self.session_id, [it for it in entry["facts"] if it not in events], self._used)
        words = [it for it in events if it["eventType"] == emit_event.WORDS]
        for shown in events:
            if shown["data"].get("role") in ("user", "queued"):
                yield self._event(entry, "UserPromptSubmit", "prompt", {"message": shown["data"]["text"]})
            elif shown["id"] not in self.seen:
                self.seen.add(shown["id"])
                yield {**self._event(entry, "", "", shown["data"]), **shown}
        ended = [shown["data"].get("toolUseId", "") for shown in events]  # denied or interrupted
        results = [block for block in entry["blocks"] if block.get("type") == "tool_result"]
        for number, block in enumerate(results):
            if block.get("tool_use_id") not in ended:
                yield self._result(entry, block, number, len(results) == 1)
        for number, block in enumerate(entry["blocks"]):
            use_id = block.get("id")
            if block.get("type") == "tool_use" and isinstance(use_id, str):
                self._calls[use_id] = block
                data = {"toolName": block.get("name"), "toolInput": block.get("input"), "toolUseId": use_id}
                yield self._event(entry, "PreToolUse", f"call{number}", data)
        is_end = words and message.get("stop_reason") in ("end_turn", "stop_sequence", "max_tokens")
        if is_end and (agent_id or entry.get("isSidechain") is not True):
            text = "\n".join(emit_event.texts_of(message.get("content")))
            hook = "SubagentStop" if agent_id else "Stop"
            yield self._event(entry, hook, "stop", {"assistantResponse": text})
            yield from self._usage_event(entry, "stop")

    def _result(self, entry: JsonObject, block: JsonObject, number: int, is_only: bool) -> JsonObject:
        use_id, content, hook = text_of(block.get("tool_use_id")), block.get("content"), "PostToolUse"
        call = self._calls.get(use_id, {})
        data = {"toolName": call.get("name"), "toolInput": call.get("input"), "toolUseId": use_id}
        if block.get("is_error") is True:
            hook, data["error"] = "PostToolUseFailure", "\n".join(emit_event.texts_of(content))
        else:
            whole = entry.get("toolUseResult") if is_only else None
            data["toolOutput"] = content if whole is None else whole
        return self._event(entry, hook, f"result{number}", data)

    def _usage_event(self, entry: JsonObject, place: str) -> Iterator[JsonObject]:
        if usage := emit_event.totals_in(self._used):
            yield self._event({**entry, "agentId": None}, "", f"usage at {place}", {"usage": usage})

    def _event(self, entry: JsonObject, hook: str, place: str, data: JsonObject) -> JsonObject:
        place = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self.session_id} {entry['uuid']} {place}"))
        kind = {"hookType": hook, "eventType": emit_event.EVENT_TYPES[hook] if hook else "usage"}
        kind |= {"agentId": entry["agentId"], "agentType": ""} if entry["agentId"] else {}
        where = {"machineId": self.machine_id, "workingDirectory": text_of(entry.get("cwd"))}
        data = {name: value for name, value in data.items() if value is not None}
        event = {"id": place, "timestamp": entry["timestamp_ms"], "sessionId": self.session_id}
        return {**event, **where, **kind, "imported": True, "data": data}


def export_events(path: str, skipped: list[str]) -> Iterator[JsonObject]:
    """Yield the events of an export, one JSON object a line or one document; add to `skipped`."""
    with open_regular(path) as file:
        first = next(filter(bytes.strip, file), b"")
        file.seek(0)
        is_document, missed = not first.endswith(b"\n") or not emit_event.is_json_object(first), 0
        for part in [file.read()] if is_document else file:
            events, value = [], None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(part)
                events = list(_events_in(value))
            missed += not (events or part.isspace() or _is_node_session(value))
            yield from events
    if missed:
        words = "it has no events" if is_document else f"no events: {plural(missed, 'line')}"
        skipped.append(f"{path}: {words}")


def _events_in(value: Any) -> Iterator[JsonObject]:
    """Yield the events in a document, marked as imported, each with an id that every import gives it."""
    if isinstance(value, list):
        for inner in value:
            yield from _events_in(inner)
    elif isinstance(value, dict):
        is_event = isinstance(value.get("eventType"), str)
        if is_event or isinstance(value.get("hook_event_name"), str):
            rest = {name: field for name, field in value.items() if name not in ("seq", "received")}
            event_id = text_of(value.get("id")) if is_event else ""
            event_id = event_id or str(uuid.uuid5(uuid.NAMESPACE_OID, encode_json(rest).decode("ascii")))
            # While a Task runs the Node.js monitor keeps its session's events under an id that it makes up.
            is_made_up = re.fullmatch("[0-9a-f]{8}", text_of(value.get("sessionId"))) is not None
            is_agent = value.get("hookType") in ("SubagentStart", "SubagentStop")
            if is_made_up and not is_agent and "parentSessionId" in rest:
                rest["sessionId"] = rest.pop("parentSessionId")
            yield {**(rest if is_event else {"hook": rest}), "id": event_id, "imported": True}
            return
        for name in ("events", "sessions", "data"):
            below: Any = value.get(name)
            by_id = name == "sessions" and isinstance(below, dict)
            yield from _events_in(list(below.values()) if by_id else below)
        if _is_node_session(value):
            yield from _events_of_node_session(value)


def _is_node_session(value: Any) -> bool:
    is_named = isinstance(value, dict) and isinstance(value.get("sessionId"), str)
    return is_named and isinstance(value.get("tokenUsage"), dict)


def _events_of_node_session(session: JsonObject) -> Iterator[JsonObject]:
    if isinstance(session.get("agentType"), str):
        return  # a subagent of another
    about = {name: session.get(name) for name in ("sessionId", "machineId", "workingDirectory")}
    about["timestamp"] = session.get("endTime") or session.get("startTime")
    for action, field, name in _NODE_ACTIONS:
        if session.get(name):
            data = {"action": action, field: session[name]}
            yield from _events_in({**about, "hookType": "Monitor", "eventType": "session_meta", "data": data})
    counts = {name[5:6].lower() + name[6:]: count for name, count in session["tokenUsage"].items()}
    usage = {"models": {text_of(session.get("model")) or "unknown": counts}, "agents": {}}
    if any(tokens_of(counts)):
        yield from _events_in({**about, "eventType": "usage", "data": {"usage": usage}})


# ---------------------------------------------------------------------------
# Command line
#
# Every command is a function of the settings and the parsed arguments that returns the exit status. `main`
# prints the error of a failure in one line.
# ---------------------------------------------------------------------------

START_DEADLINE_S = 60.0
TAIL_COLOURS = {"tool_error": "31", "turn_error": "31", "permission_request": "33", "elicitation": "33"}


def settings_of(args: argparse.Namespace) -> Settings:
    """Load the configuration with the options of the command line; warnings go to standard error."""
    options = {"server.host": "host", "server.port": "port", "server.wsPort": "ws_port"}
    given = {key: it for key, name in options.items() if (it := getattr(args, name, None)) is not None}
    try:
        settings, warnings = load_settings(args.config, given)
    except ConfigError as error:
        if args.function not in (command_stop, command_uninstall):  # the monitor may run, with an earlier one
            raise
        home = os.path.abspath(emit_event.places(os.environb)[0])  # type: ignore[arg-type]
        settings, warnings = Settings(home, "", "", emit_event.load_config("", KEYS)[0]), [str(error)]
    settings.options.update((options[key], it) for key, it in given.items())
    settings.options.update({"config": settings.config_path} if args.config else {})
    for warning in warnings:
        print_status(f"warning: {warning}")
    return settings


def command_start(settings: Settings, args: argparse.Namespace) -> int:
    """Start the monitor in the background and print the page's address."""
    if settings["mode"] == "redis" and not importlib.util.find_spec("redis"):
        raise CommandError(f'mode "redis" needs redis-py: {redis_py_advice(sys.executable)}')
    if (about := running_monitor(settings)) is not None and not args.detached:
        print(f"already running ({about['process']}): {page_links(settings, about)[0]}")
        if about["version"] != __version__:
            print_status(f"it is of version {about['version']}, this is {__version__}; {RUN_RESTART}")
        if not args.host is args.port is args.ws_port is None:
            print_status("the options have no effect; `restart` with the same options applies them")
        return 0
    if args.foreground:
        return serve(settings, args)
    about, deadline = start_in_background(settings), time.monotonic() + 2
    while True:  # Redis gets a moment
        status = ask_monitor(settings, "/api/status")
        redis = status["redis"] or {"state": "off"}
        if redis["state"] in ("connected", "off") or redis["reason"] or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    lines = [f"Contextuate Monitor runs ({about['process']}). Open:"]
    lines += [f"  {link}" for link in page_links(settings, about)]
    if status["loading"]:
        lines.append(f"{loading_words(status['loading'])}, the rest follows; `status` shows the progress.")
    if redis["state"] == "connected":
        lines.append(f"Connected to Redis at {redis['server']}.")
    elif redis["state"] != "off":
        lines.append(f"Not connected yet, trying again: {redis['reason'] or 'Redis does not answer'}")
    if not os.path.exists(hook_script(settings.home)):
        lines.append("Next: python3 contextuate_monitor.py install   (then start Claude Code)")
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:  # it runs, whether that can be printed or not
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # A browser is opened only on this machine's own screen.
    has_screen = sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not args.no_open and sys.stdout.isatty() and has_screen and not os.environ.get("SSH_CONNECTION"):
        import webbrowser

        webbrowser.open(page_links(settings, about)[0])
    return 0


def start_in_background(settings: Settings) -> JsonObject:
    """Start a detached process, wait until it serves and closes its standard error; raise CommandError."""
    import compileall  # it would add 1 MB to the process that serves

    emit_event.make_private_directory(settings.home)
    command, place = start_command(settings.options)
    advice = f"{settings.path('monitor.log')} may name the reason"
    compileall.compile_file(os.path.abspath(__file__), quiet=2)
    null, pipe, command = subprocess.DEVNULL, subprocess.PIPE, [*command, "--detached"]
    child = subprocess.Popen(command, stdin=null, stdout=null, stderr=pipe, start_new_session=True, cwd=place)
    try:
        said = emit_event.within(START_DEADLINE_S, lambda: child.stderr and child.stderr.read())
    except TimeoutError:
        words = f"the monitor (process {child.pid}) does not answer; end it, start again"
        raise CommandError(f"{words}; {advice}") from None
    if failed := re.search(r"^contextuate: error: (.*)", said.decode("utf-8", "replace"), re.M):
        raise CommandError(failed[1])
    if (about := running_monitor(settings)) is None:
        raise CommandError(f"the monitor ended at once; {advice}")
    return about


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Run the monitor until a signal ends it; log to monitor.log, in the foreground to stderr, too."""
    os.umask(0o077)
    if args.detached:
        os.chdir("/")  # so that any directory can be removed or unmounted
    emit_event.make_private_directory(settings.home)
    # For a thousand hooks at once.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        log_file = PrivateLog(settings.path("monitor.log"), maxBytes=2 << 20, backupCount=3)
        for handler in (log_file, *(() if args.detached else (logging.StreamHandler(),))):
            handler.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(handler)
        log.setLevel(logging.DEBUG if os.environ.get("CONTEXTUATE_DEBUG") else logging.INFO)
        logging.raiseExceptions = False  # no traceback on a full disk
        sys.excepthook = lambda *error: log.critical("ended by an unexpected error", exc_info=error)
        if settings["mode"] == "redis" and not os.path.exists(settings.path("hooks/publisher-python")):
            record_publisher_python(settings.home)
        monitor = Monitor(settings)
        monitor.open()
    except (CommandError, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            error.filename = error.filename or settings.home  # a write names no file
        log.error("cannot start: %s", error)
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: monitor.stop())
    reconnect = monitor.redis.reconnect if monitor.redis else lambda: None  # at once, also after giving up
    signal.signal(signal.SIGHUP, lambda *_: monitor.loop.call_soon(reconnect))
    place = f"{settings['server.host']}, port {monitor.port}"
    log.info("version %s serves %s, hooks on %s", __version__, place, settings["socketPath"])
    if args.detached:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    else:
        print(*page_links(settings, monitor.about), sep="\n", flush=True)
    monitor.run()
    log.info("stopped")
    return 0


class PrivateLog(logging.handlers.RotatingFileHandler):
    """A log that rotates, readable by this user only, and never written through a link."""

    def _open(self) -> Any:
        opener, errors = emit_event.open_for_append, "backslashreplace"
        return open(self.baseFilename, "a", encoding="utf-8", errors=errors, opener=opener)


class RedactingFormatter(logging.Formatter):
    """Remove secrets and control characters from every line of the log; names in it may come from others."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = safe_line(record.getMessage()), ()
        return emit_event.redact_text("\n".join(map(safe_line, super().format(record).split("\n"))))


def command_stop(settings: Settings, args: argparse.Namespace) -> int:
    """Stop the monitor and wait until it has exited."""
    if (about := running_monitor(settings)) is not None:
        stop_monitor(settings, about)
        print(f"stopped ({about['process']})")
    elif lock_holder(settings["socketPath"] + ".lock") is not None:
        words = f"no monitor runs for {settings.home}, but another one uses {settings['socketPath']}"
        raise CommandError(words + stop_advice(settings["socketPath"]))
    else:
        print("not running")
    return 0


def stop_monitor(settings: Settings, about: JsonObject) -> None:
    """Stop the running monitor, by a signal if it does not answer; raise CommandError if it still runs."""
    try:
        ask_monitor(settings, "/api/stop", {"startedAt": about["startedAt"]})
    except (CommandError, OSError) as error:  # no answer, or no usable token
        if about["pid"] == 0:
            raise CommandError(f"{error}; run `stop` where it runs") from None
        with contextlib.suppress(ProcessLookupError, TypeError):  # it has ended, or its socket
            os.kill(about["pid"], signal.SIGTERM)
    deadline = time.monotonic() + 15
    while lock_holder(settings.path("monitor.pid")) is not None:
        if time.monotonic() > deadline:
            way = f"; `kill -9 {about['pid']}` loses nothing" if about["pid"] else ""
            raise CommandError(f"the monitor ({about['process']}) has not ended in 15 s{way}")
        time.sleep(0.05)


def command_restart(settings: Settings, args: argparse.Namespace) -> int:
    """Stop the monitor if it runs, and start it."""
    service, has_options = this_service(), not args.host is args.port is args.ws_port is args.config is None
    home, unit = os.environ.get("CONTEXTUATE_HOME", ""), read_text(service.path)
    is_its = re.search(re.escape(home) + '["<]', unit) if home else "CONTEXTUATE_HOME" not in unit != ""
    if (about := running_monitor(running := settings)) is not None:
        given = {name: value for name, value in vars(args).items() if value is not None}
        vars(args).update({**(about.get("options") or {}), **given})
        settings = settings_of(args)  # a fault in the configuration stops nothing
    if is_its and not has_options and trouble_of(service.check) is None:
        start_service(settings, [service.restart], service.check)
        return 0
    if about is not None:
        stop_monitor(running, about)
    return command_start(settings, args)


def command_service(settings: Settings, args: argparse.Namespace) -> int:
    """Start the monitor at login and after a crash, by systemd or launchd."""
    service = this_service()
    trouble, is_installed = trouble_of(service.probe), os.path.exists(service.path)
    if trouble is not None:
        words = f"neither systemd nor launchd runs services of this user here ({trouble})"
        raise CommandError(f"{words}; run `start` where your session begins instead")
    if args.action == "status":
        is_running = is_installed and trouble_of(service.check) is None
        print("running" if is_running else "installed, not running" if is_installed else "not installed")
        return 0 if is_running else 1
    if is_installed:
        run_steps([service.stop])
    if args.action == "remove":
        with contextlib.suppress(FileNotFoundError):
            os.unlink(service.path)
        print(f"{service.path} removed" if is_installed else "not installed")
        return 0
    if (about := running_monitor(settings)) is not None:
        stop_monitor(settings, about)
    command, folder = start_command({**((about or {}).get("options") or {}), **settings.options})
    given = {name: os.environ[name] for name in SERVICE_VARIABLES if name in os.environ}
    os.makedirs(os.path.dirname(service.path), exist_ok=True)
    emit_event.write_atomically(service.path, service.content(command, folder, given))
    print(f"{service.path} installed; the monitor starts with your login, and again after a crash")
    start_service(settings, service.start, service.check)
    return 0


def start_service(settings: Settings, steps: Iterable[str], check: str) -> None:
    """Start the monitor by commands of the system, print its address once it serves; raise CommandError."""
    path, started_ms, deadline = settings.path("monitor.log"), now_ms(), time.monotonic() + START_DEADLINE_S
    before = len(read_text(path))
    run_steps(steps)
    while (about := running_monitor(settings)) is None or about["startedAt"] < started_ms:
        has_ended = trouble_of(check) is not None or time.monotonic() > deadline
        if (failed := re.search("cannot start: (.*)", read_text(path)[before:])) or has_ended:
            raise CommandError(failed[1] if failed else f"the monitor did not start; see {path}")
        time.sleep(0.1)
    print(f"Contextuate Monitor runs ({about['process']}): {page_links(settings, about)[0]}", flush=True)


def command_status(settings: Settings, args: argparse.Namespace) -> int:
    """Print the monitor's state, with exit status 1 when it does not run."""
    if args.short:
        runs = lock_holder(settings.path("monitor.pid")) is not None
        line = emit_event.read_small(settings.path("short")).decode().strip()
        print((line or "starting") if runs else "not running")
        return 0 if runs and line else 1
    if (about := running_monitor(settings)) is None:
        waiting = sum(size for _, size in emit_event.spool_segments(settings.path("spool")))
        status: JsonObject = {"running": False, "spoolBytes": waiting}
        lines = ["not running; start it with: python3 contextuate_monitor.py start"]
        lines += [f"spool    {human_size(waiting)} of events wait to leave"] if waiting else []
    else:
        status = {"running": True, **ask_monitor(settings, "/api/status")}
        since = human_duration(now_ms() - status["startedAt"])
        what = f"version {status['version']}, for {since}, mode {status['mode']}"
        lines = [f"running  {about['process']}, {what}"]
        lines.append(f"page     {page_links(settings, about)[0]}   {status['clients']} open")
        lines.append(f"hooks    {about['socketPath']}")
        lines += [f"{it['name']:<8} {safe_line(it['words'])}" for it in status["facts"]]
        lines += [f"{it['level']:<8} {safe_line(it['words'])}: {it['advice']}" for it in status["problems"]]
    print(json.dumps(status) if args.json else "\n".join(lines))
    return 0 if status["running"] else 1


def command_url(settings: Settings, args: argparse.Namespace) -> int:
    """Print the page's address."""
    print(*page_links(settings, needed_monitor(settings), args.token), sep="\n")
    return 0


# What each of KEYS is for.
KEY_MEANINGS = """
mode                     how events reach the monitor: on this machine only, or through Redis
answers.waitSeconds      how long a hook of `install --answers` waits for an answer from the page
answers.backgroundSeconds  the same for subagents and MCP servers, whose dialog appears only afterwards
answers.remote           take answers that come through Redis, signed with the key of `answers key`
socketPath               Unix socket on which the monitor takes events from hooks
server.host              address of the page and the WebSocket; `0.0.0.0` for all, then others need the token
server.port              port of the page and the API
server.wsPort            port of the WebSocket
server.allowedHosts      more names for the page's address, such as that of a reverse proxy
server.auth              who needs the token: all but this user's own processes (`auto`), all, none
redis.url                address in one piece, instead of host, port and db; `rediss:` is with TLS
redis.host               where Redis is
redis.port               its port
redis.username           user of Redis; none: its default user
redis.password           `CONTEXTUATE_REDIS_PASSWORD` in the environment replaces it; never shown
redis.db                 number of the database
redis.channel            channel of the events; with `:stream` after it, the stream
redis.tls                connect with TLS
redis.verify             check the server's certificate and its name
redis.caFile             authority of the server's certificate; none: those of the system
redis.certFile           certificate of this client
redis.keyFile            key of that certificate
redis.sentinels          Redis Sentinels that know where the primary is; they replace host, port and url
redis.master             name of the primary there
redis.sentinelPassword   password of the sentinels; never shown
redis.cluster            use a Redis Cluster; its nodes, or `true` where redis.host is one
redis.streamMaxLength    about how many events Redis keeps
redis.maxRetries         failed attempts in a row after which a monitor stops trying
persistence.enabled      store events in files; `false`: only the last 64 MiB, in memory
persistence.type         how events are stored
limits.fieldBytes        longer texts in an event are cut in the middle; in Redis mode the default is 65536
limits.connections       connections at the same time, for each of the two ports
limits.clientQueueBytes  data queued for a page that does not read before its connection is closed
sessions.quietSeconds    silence after which a working session is quiet
sessions.endedHours      silence of a machine after which its sessions count as ended
retention.days           age in whole days at which events are deleted; their real age where the clock was set
retention.maxMegabytes   size of all files of the monitor above which the oldest days are deleted
privacy.redact           replace what looks like a secret before an event is stored or sent
privacy.level            `metadata`: store names, ids, times and durations only, no content
notify                   where messages to people are sent; never shown
prices                   prices of models, in place of the built-in ones
"""


def command_config(settings: Settings, args: argparse.Namespace) -> int:
    """Print every configuration key: value, default, meaning and what it may be."""
    meanings = dict(re.findall(r"(\S+) +(.+)", KEY_MEANINGS))
    keys = {it: (key.default, meanings[it], key.expected) for it, key in KEYS.items()}
    targets = {name: row[:3] for name, row in NOTIFY_KEYS.items()}
    if args.markdown:
        for title, rows in ("", keys), ("\nEach target of `notify` is an object:\n\n", targets):
            print(f"{title}| key | default | meaning | may be |\n|---|---|---|---|")
            for name, (default, words, expected) in rows.items():
                print(f"| `{name}` | `{json.dumps(default)}` | {words} | {expected} |")
        return 0
    found = "" if os.path.exists(settings.config_path) else " (does not exist: defaults)"
    print(f"{settings.config_path}{found}")
    for name, (default, words, expected) in keys.items():
        is_hidden = name in emit_event.SECRET_KEYS and settings[name]
        value = "(not shown)" if is_hidden else json.dumps(settings[name])
        value += f" (default {json.dumps(default)})" if settings[name] != default else ""
        print(f"\n{name} = {value}\n    {words}\n    {expected}")
    print("\nA target of notify has:", *(f"{name}: {row[1]}" for name, row in targets.items()), sep="\n    ")
    return 0


def command_answers(settings: Settings, args: argparse.Namespace) -> int:
    """Print a code that pairs a browser, so that it may answer, or the key for answers through Redis."""
    if args.what == "pair":
        code = ask_to_answer(settings, {"do": "code"})["code"]
        print(f"{code}   type it on the page within {CODE_LIFE_S // 60} minutes; it works once")
        return 0
    path = settings.path("answers.key")
    if not emit_event.read_answer_key(settings.home):
        emit_event.make_private_directory(settings.home)
        emit_event.write_atomically(path, secrets.token_hex(32).encode() + b"\n")
    print(emit_event.read_answer_key(settings.home).decode())
    print_status(f"this is in {path}; copy that file to each machine that asks or answers, with mode 0600")
    return 0


def ask_to_answer(settings: Settings, request: JsonObject) -> JsonObject:
    """Return the monitor's response to a request that only a person's terminal may make."""
    refused = agent_above(os.getpid()) or ", ".join(AGENT_VARIABLES & os.environ.keys())
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        refused = refused or "a command that answers needs a terminal"
    terminal = os.ttyname(0) if sys.stdin.isatty() else ""
    about = {"refused": refused, "terminal": terminal}  # the monitor logs it, and looks for itself
    return ask_monitor(settings, "/api/answer", {**request, **about})


def command_answer(settings: Settings, args: argparse.Namespace) -> int:
    """Print what a session asks, and answer it."""
    session_id = whole_session_id(settings, args.session) or ""
    session = ask_monitor(settings, f"/api/sessions/{urllib.parse.quote(session_id, safe='')}")
    if not session["asks"]:
        raise CommandError("this session asks nothing now")
    asked = next((it for it in session["asks"] if it["answerable"]), session["asks"][0])
    query = urllib.parse.urlencode({"session": session_id})
    event = ask_monitor(settings, f"/api/events/{urllib.parse.quote(asked['eventId'], safe='')}?{query}")
    if not args.answer:
        print(*map(safe_line, question_lines(event)), sep="\n")
        if not asked["answerable"]:
            print_status("it can only be answered in the client: no hook of `install --answers` waits")
        return 0
    answer = given_answer(event, args.answer[0], args.answer[1:])
    result = ask_to_answer(settings, {"sessionId": session_id, "eventId": event["id"], "answer": answer})
    if result["outcome"] != "delivered":
        what = "too late" if result["outcome"] == "late" else "not delivered"
        raise CommandError(f"{what}: {result['words']}")
    print(safe_line(answer_words(event, answer)))
    return 0


def question_lines(event: JsonObject) -> Iterator[str]:
    """Yield what an event asks, whole, and how to answer it, as lines."""
    data, given = event["data"], object_of(event["data"].get("toolInput"))
    fields, answers = given, "allow, always NUMBER …, deny [WHY]"
    if event["hookType"] == "Elicitation":
        yield f"{text_of(data.get('mcp_server_name'))} asks: {text_of(data.get('message'))}"
        fields = object_of(object_of(data.get("requested_schema")).get("properties"))
        answers = "accept NAME=VALUE …, decline, cancel"
    elif data.get("toolName") == "AskUserQuestion":
        for question in emit_event.objects_in(given.get("questions")):
            yield text_of(question.get("question"))
            for number, option in enumerate(emit_event.objects_in(question.get("options")), 1):
                yield f"  {number}  {text_of(option.get('label'))}: {text_of(option.get('description'))}"
        fields = {}
        answers = "choose, then for each question a number, several (1,2) or own words; deny [WHY]"
    else:
        yield f"{text_of(data.get('toolName'))}:"
    for name, value in fields.items():
        yield from f"  {name}: {text_of(value)}".replace("\n", "\n    ").split("\n")
    for number, it in enumerate(emit_event.objects_in(data.get("permission_suggestions")), 1):
        yield f"always {number}: {suggestion_words(it)}"
    yield f"answer with: {answers}"


def given_answer(event: JsonObject, do: str, words: Sequence[str]) -> JsonObject:
    """Return the answer that the words of a command give; raise CommandError."""
    if do == "deny":
        return {"do": do, "message": " ".join(words)} if words else {"do": do}
    if do == "choose":
        chosen = [it.split(",") if re.fullmatch(r"[\d,]+", it) else it for it in words]
        numbers = [[int(it or 0) - 1 for it in word] if isinstance(word, list) else [word] for word in chosen]
        return {"do": "answer", "answers": numbers}
    if do == "always":
        return {"do": do, "suggestions": [int(it) - 1 if it.isdecimal() else it for it in words]}
    if do == "accept":
        fields = object_of(object_of(event["data"].get("requested_schema")).get("properties"))
        content: JsonObject = {}
        for name, _, value in (word.partition("=") for word in words):
            content[name], is_text = value, object_of(fields.get(name)).get("type") == "string"
            with contextlib.suppress(ValueError):
                content[name] = value if is_text else json.loads(value)
        return {"do": do, "content": content}
    if do in ("allow", "decline", "cancel") and not words:
        return {"do": do}
    raise CommandError(f"{do}: no answer; without one, this command prints how to answer")


def command_install(settings: Settings, args: argparse.Namespace) -> int:
    """Register the hook in Claude Code's settings."""

    def planned(program: str) -> tuple[InstallPlan, str]:
        key = PROGRAMS[program].answers if args.answers else ""
        if args.answers and not key:
            print_status(f"{program} takes no answers from the page: its hook only records")
        version = claude_version() if program == CLAUDE else None
        given = (args.project, version, args.without or (), args.status_line, settings[key] if key else 0)
        plan = plan_install(settings.home, program, *given)
        if program == CLAUDE and version is None:
            words = "`claude` did not print its version, so only events that every version knows are added"
            words += ", and the page cannot answer" if args.answers else ""
            print_status(f"{words}; put it on the PATH and run install again")
        if not args.dry_run:
            install_hook_files(settings.home)
        words = f"{plural(len(plan.names), 'event')} registered"
        if " --answer" in plan.new_text:
            words += ", answers on the page (pair a browser: `answers pair`)"
        elif " --answer" in plan.old_text:
            words += ", answers on the page switched off"
        if plan.status_line:
            words += ", and the status line" + (f", around {it}" if (it := plan.status_line.wrapped) else "")
        return plan, words

    done, status = carry_out(args, planned)
    if args.dry_run or not done:
        return status
    running, off = files_that_run(client_files(args.project or os.getcwd()))
    if off and not any(our_hooks(file.settings) for file in running):
        print_status(f"{off}: remove that setting, or ask this machine's administrator")
    if settings["mode"] == "redis" and not record_publisher_python(settings.home):
        advice = redis_py_advice(sys.executable)
        print_status(f"redis-py is missing, so no event can leave this machine: {advice}")
    print(*{PROGRAMS[program].advice for program in done}, sep="\n")
    return status


def command_uninstall(settings: Settings, args: argparse.Namespace) -> int:
    """Remove the hook from Claude Code's settings; everything else there stays."""

    def planned(program: str) -> tuple[InstallPlan, str]:
        plan = plan_install("", program, args.project)
        return plan, "hook removed" if plan.new_text != plan.old_text else "the hook is not registered"

    done, status = carry_out(args, planned)
    if done:
        print_status(f"events and configuration stay in {settings.home}; remove it to delete everything")
    return status


def carry_out(
    args: argparse.Namespace, planned: Callable[[str], tuple[InstallPlan, str]]
) -> tuple[list[str], int]:
    """Write or print each plan for `--agent`; return (the programs that have no error, exit status)."""
    done, programs = [], [*agents_here(), CLAUDE] if args.agent == "all" else [args.agent or CLAUDE]
    if args.project is not None and programs != [CLAUDE]:
        raise CommandError("--project is for Claude Code only; leave out --agent or --project")
    for program in programs:
        try:
            plan, words = planned(program)
            if args.dry_run:
                diff = diff_settings(plan.path, plan.old_text, plan.new_text)
                print(diff or f"{plan.path}: nothing to change")
            else:
                backup = write_settings(plan.path, plan.new_text, plan.old_text)
                if backup and not plan.new_text:
                    os.unlink(plan.path)  # the file had our hooks only
                print(f"{program:8} {plan.path}: {words}" + (f", backup {backup}" if backup else ""))
            done.append(program)
        except CommandError as error:  # the other programs have files of their own
            print_status(f"error: {error}")
    return done, int(done != programs)


def command_notify_test(settings: Settings, args: argparse.Namespace) -> int:
    """Send a notification to every target now and print the outcome."""
    answer = ask_monitor(settings, "/api/message", {"type": "notify_test"})
    for result in answer["results"]:
        print(f"{'ok' if result['ok'] else 'fail':5}{result['name']}: {safe_line(result['words'])}")
    return 0 if all(result["ok"] for result in answer["results"]) else 1


def command_test_event(settings: Settings, args: argparse.Namespace) -> int:
    """Send one event through the hook and print what happened."""
    words = send_through_hook(settings, test_event()["data"]["message"]).stderr
    sys.stdout.write(words)
    if was_delivered(words):
        return 0
    goal = "a monitor" if settings["mode"] == "local" else "Redis"
    left = "waits in the spool" if "kept in the spool" in words else "is lost"
    raise CommandError(f"the event did not reach {goal} and {left}; run `doctor` to find the cause")


def command_doctor(args: argparse.Namespace) -> int:
    """Check the whole chain and print what to do, with exit status 1 when a check fails."""
    try:
        findings: Iterable[Finding] = Doctor(*load_settings(args.config)).run()
    except ConfigError as error:
        findings = [Finding("fail", "config", str(error), "correct the file")]
    found = []
    for finding in findings:
        found.append(finding)
        advice = f"\n{'':16}→ {finding.advice}" if finding.advice and finding.level != "ok" else ""
        if not args.json:
            print(f"{finding.level:5}{finding.check:11}{safe_line(finding.words)}{advice}", flush=True)
    levels = [finding.level for finding in found]
    broken = levels.count("fail")
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [finding._asdict() for finding in found]}, indent=2))
    else:
        passed = "No check failed; see what says warn." if "warn" in levels else "All checks passed."
        print(f"\n{broken} failed: begin with the first" if broken else f"\n{passed}")
    return 1 if broken else 0


def known_sessions(settings: Settings, with_hidden: bool) -> list[JsonObject]:
    """Return the running monitor's sessions; print a warning while it is still reading stored ones."""
    if (answer := ask_monitor(settings, f"/api/sessions?hidden={int(with_hidden)}")).get("loading"):
        print_status(f"{loading_words(answer['loading'])}; the list is not complete yet")
    return list(answer["sessions"])


def command_sessions(settings: Settings, args: argparse.Namespace) -> int:
    """List sessions, those that need a person first."""
    known = known_sessions(settings, args.all)
    sessions = [session for session in known if args.all or session["state"] != "ended"]
    sessions.sort(key=lambda session: (SESSION_STATES.index(session["state"]), session["stateSince"]))
    if args.json:
        print(json.dumps(sessions))
        return 0
    if not sessions:
        print("no sessions" + ("" if args.all else " that have not ended; --all shows those too"))
    for session in sessions:
        reason, detail = session["reason"], session["activity"]
        if reason:
            detail = f"{reason['kind']}: {reason['detail']}"
        elif session["stuck"] and session["state"] == "working":
            detail = session["stuck"][0]["detail"] or detail
        since = human_duration(now_ms() - session["stateSince"])
        text = f"{session['state']:<8} {since:>7}  {session['sessionId'][:8]:<8}  {session['label']:<40.40} "
        text += f"{session['machineId']:<14.14} "
        print(safe_line(without_colours(text + detail)))
    return 0


def command_go(settings: Settings, args: argparse.Namespace) -> int:
    """Bring the terminal of a session to the front."""
    known, wanted = known_sessions(settings, with_hidden=True), args.session.lower()
    found = [it for it in known if it["sessionId"].startswith(args.session)]
    found = found or [it for it in known if it["label"].lower().startswith(wanted)]
    found = [it for it in found if it["state"] != "ended"] or found
    if len(found) != 1:
        names = "".join(f"; {it['sessionId'][:8]} {safe_line(it['label'])}" for it in found[:5])
        raise CommandError(f"{len(found) or 'no'} sessions begin with {args.session!r}{names}")
    session, terminal = found[0], found[0]["terminal"] or {}
    where = f"in {terminal['name']}" if terminal else "in an unknown terminal"
    if session["state"] == "ended":
        is_option = session["sessionId"].startswith("-")
        resume = "" if is_option else RESUME_COMMANDS.get(session["agent"], "")
        command = f"{resume} {shlex.quote(session['sessionId'])}" if resume else "its program"
        place = shlex.quote(session["workingDirectory"])
        print(safe_line(f"it has ended; to continue: cd {place} && {command}"))
    elif session["machineKey"] != settings.machine_key:
        raise CommandError(f"it runs on {safe_line(session['machineId'])}, {where}; run `go` there")
    elif "command" not in terminal:
        raise CommandError(f"it runs {where}; no command brings that to the front")
    else:
        run_steps([terminal["command"]])
    return 0


def command_tail(settings: Settings, args: argparse.Namespace) -> int:
    """Print events as they happen, until Ctrl-C."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    status, is_waiting, begin = ask_monitor(settings, "/api/status"), False, args.session or ""
    if status["loading"]:
        print_status(f"{loading_words(status['loading'])}; new events are shown meanwhile")
    elif begin and not any(it["sessionId"].startswith(begin) for it in known_sessions(settings, True)):
        print_status(f"no session begins with {begin!r}; waiting for one")
    last_seq = status["seq"]
    while True:
        try:
            if is_waiting:  # in memory only, the numbers begin again with each start
                last_seq = min(last_seq, ask_monitor(settings, "/api/status")["seq"])
            page = ask_monitor(settings, f"/api/events?after={last_seq}&limit=1000")
        except CommandError as error:
            if not is_waiting:
                print_status(f"{error}; waiting for the monitor")
            is_waiting = True
            time.sleep(1)  # before the next attempt
            continue
        is_waiting = False
        for event in page["events"]:
            last_seq, is_of_session = event["seq"], event["sessionId"].startswith(begin)
            is_of_type = args.type in (None, event["eventType"], event["hookType"])
            if is_of_session and is_of_type and args.machine in (None, event["machineId"]):
                row, colour = event_row(event), TAIL_COLOURS.get(effective_type(event), "") if colours else ""
                line = encode_json(event).decode() if args.json else event_line(row, "%H:%M:%S", colour)
                print(line, flush=True)
        if not page["more"]:
            time.sleep(0.25)


def event_line(event: JsonObject, form: str, colour: str = "") -> str:
    """Return one line for a row of an event or a search result; matches in bold where there are colours."""
    clock, data = time.strftime(form, time.localtime(event["timestamp"] / 1000)), event["data"]
    what, tool = event["hookType"] or event["eventType"], text_of(data.get("toolName"))
    who = f"{event['machineId']:<12.12} {event['sessionId'][:8]}"
    line = f"\x1b[{colour}m" if colour else ""
    head = f"{clock}  {who}  {what:<18.18} {tool:<12.12}  "
    line += safe_line(head).ljust(len(head))
    for piece in event.get("snippet") or [{"text": data.get("target") or data.get("text") or ""}]:
        text = "".join(char if char.isprintable() else " " for char in without_colours(piece["text"]))
        line += f"\x1b[1m{text}\x1b[0m" if colour and piece.get("hit") else text
    line += f"  {data['durationMs']} ms" if "durationMs" in data else ""
    return line.rstrip() + ("\x1b[0m" if colour else "")


def command_prune(settings: Settings, args: argparse.Namespace) -> int:
    """Delete events that are too old or too much for the configuration."""
    pruned = ask_monitor(settings, "/api/message", {"type": "prune", "dryRun": args.dry_run})
    if not pruned["files"]:
        print("nothing is too old or too much")
        return 0
    verb = "would be deleted" if args.dry_run else "deleted"
    what = f"{plural(pruned['files'], 'file')} of {plural(pruned['sessions'], 'session')}"
    print(f"{what}, {human_size(pruned['bytes'])}, of {pruned['days'][0]} to {pruned['days'][-1]} {verb}")
    return 0


def command_import(settings: Settings, args: argparse.Namespace) -> int:
    """Import transcripts of Claude Code and exports of monitors."""
    needed_monitor(settings)
    paths = args.paths or [os.path.join(os.path.dirname(settings_path(None)), "projects")]
    skipped: list[str] = []
    sources = import_sources([os.path.abspath(path) for path in paths], skipped)
    sizes = sum(os.path.getsize(path) for _, files in sources for path in files)
    progress = Progress(sizes, quiet=False)
    store, known = Journal(settings.path("events")), 0
    machine, names = settings.machine_id, {file.name for file in store.files()}
    batches = import_batches(sources, machine, lambda it: session_file_name(it) in names, skipped)
    for session_id, events, size in batches:
        wanted = new_events(store, session_id, events)
        known += len(events) - len(wanted)
        try:
            send_events(settings, wanted)
        except OSError as error:  # its socket is gone, or closed
            words = f"the monitor takes no more events: {error.strerror or error}"
            raise CommandError(f"{words}; when `status` shows that it runs, import again") from None
        progress.add(len(wanted), size)
    for words in skipped[:10]:
        print_status(f"skipped {words}")
    if len(skipped) > 10:
        print_status(f"skipped {len(skipped) - 10} more")
    print(f"{plural(progress.count, 'event')} imported, {known:,} stored already")
    return 1 if skipped else 0


def command_search(settings: Settings, args: argparse.Namespace) -> int:
    """Find stored events, newest first."""
    if args.limit < 1:
        raise SearchError("--limit", "an integer from 1")
    wanted = {**filters_of(settings, args), "state": args.state}
    colour, left, cursor = "0" if sys.stdout.isatty() else "", args.limit, None
    while True:
        asked = {**wanted, "limit": min(left, SEARCH_LIMIT), "cursor": cursor}
        given = urllib.parse.urlencode({name: value for name, value in asked.items() if value is not None})
        page = ask_monitor(settings, f"/api/search?{given}")
        for result in page["results"]:
            line = json.dumps(result) if args.json else event_line(result, "%Y-%m-%d %H:%M:%S", colour)
            print(line, flush=True)
        left, cursor = left - len(page["results"]), page["next"]
        if cursor is None or not left:
            break
    if left == args.limit and not args.json:
        print_status("no results")
    elif cursor is not None:
        print_status(f"there are more results; --limit {args.limit * 4} shows more")
    if page["index"]["state"] == "building":
        print_status("the index is still being built, so there may be more results")
    return 0 if left < args.limit else 1


def command_export(settings: Settings, args: argparse.Namespace) -> int:
    """Write stored events as NDJSON, or a session as a page; --state and html need a running monitor."""
    store, wanted, sessions = Journal(settings.path("events")), filters_of(settings, args), None
    if args.state:
        known = known_sessions(settings, with_hidden=True)
        sessions = frozenset(session["sessionId"] for session in known if session["state"] == args.state)
    if not settings["persistence.enabled"]:
        print_status("persistence.enabled is false: only events stored before can be exported")
    query = search_query(wanted, sessions)
    counter = Progress(sum(file.size for file in store.files()), quiet=not args.output)
    lines: Iterable[bytes] = counter.counting(matching_lines(store, query))
    if args.format == "html":
        if not args.session:
            raise SearchError("--session", "an id, for --format html")
        place = "/api/sessions/" + urllib.parse.quote(wanted["session"] or "?", "")
        lines = session_page(ask_monitor(settings, place), lines)
    chunks = in_chunks(lines)
    if not args.output:
        sys.stdout.buffer.writelines(chunks)
        sys.stdout.buffer.flush()
    else:
        first = next(chunks, b"")  # without one, the content of a file that is there stays
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if first else 0)
        with os.fdopen(os.open(args.output, flags, 0o600), "wb") as file:
            file.writelines(itertools.chain([first], chunks))
        print(f"{plural(counter.count, 'event')} written to {args.output}")
    if not counter.count:
        print_status("no event matches")
    return 0 if counter.count else 1


def whole_session_id(settings: Settings, beginning: str | None) -> str | None:
    """Return the id of the stored session with this prefix; raise CommandError if there are several."""
    if beginning is None:
        return None
    paths = glob.glob(f"{glob.escape(settings.path('events'))}/*/{glob.escape(beginning)}*.jsonl*")
    ids = {os.path.basename(path).partition(".jsonl")[0] for path in paths}
    if not settings["persistence.enabled"] and running_monitor(settings):
        ids |= {it["sessionId"] for it in known_sessions(settings, with_hidden=True)}
    found = sorted(it for it in ids if it.startswith(beginning))
    if len(found) > 1 and beginning not in found:
        shown = ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
        raise CommandError(f"{len(found)} sessions begin with {beginning!r}: {shown}; give more of the id")
    return found[0] if len(found) == 1 else beginning


def command_demo(settings: Settings, args: argparse.Namespace) -> int:
    """Send a fictitious working day to the running monitor, or remove it again."""
    if args.remove or ask_monitor(settings, "/api/status")["demo"]:
        # Two demos at once would look like one that repeats itself.
        demo = [it["sessionId"] for it in known_sessions(settings, with_hidden=True) if it["demo"]]
        for session_id in demo:
            ask_monitor(settings, "/api/message", {"type": "delete_session", "sessionId": session_id})
        print(f"{len(demo)} demo sessions removed")
    if args.remove:
        return 0
    if args.live:
        print_status(f"the page shows the demo live for {args.live:.0f} s; Ctrl-C ends it")
    day = list(demo_day(now_ms(), args.live))
    for timestamp, event in day:
        time.sleep(max(0.0, (timestamp - now_ms()) / 1000))
        for left in reversed(range(60)):  # the monitor may restart meanwhile
            try:
                send_events(settings, [event])
                break
            except (OSError, CommandError):
                if not left:
                    raise
                time.sleep(0.5)
    print(f"{len(day)} demo events sent; `demo --remove` deletes them")
    return 0


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print an error of the command line and exit with status 2."""
        self.exit(2, f"contextuate: error: {message}; see `{self.prog} --help`\n")


def filters_of(settings: Settings, args: argparse.Namespace) -> JsonObject:
    """Return what to search for, of the options; explain a range that ends with a day."""
    try:
        start, end = time_range(args.start, args.end, time_zone(args.time_zone))
    except SearchError as error:
        raise SearchError("--" + error.field.replace("timeZone", "time-zone"), error.expected) from None
    if args.end and args.start != args.end and not re.search("[ T:]|[0-9]{5}", args.end):
        print_status(f"--to {args.end} means before that day; --from {args.end} as well is the day itself")
    given = {"machine": args.machine, "tool": args.tool, "type": args.type, "q": " ".join(args.words)}
    return {**given, "session": whole_session_id(settings, args.session), "from": start, "to": end}


def _option(words: str, **about: Any) -> JsonObject:
    return {"help": words, **about}


_switch = functools.partial(_option, action="store_true")
OPTIONS = {  # what `add_argument` takes
    "--config": _option("configuration (default ~/.contextuate/monitor.config.json)", metavar="FILE"),
    "--port": _option("port of the page (default 3847, 0: any free one)", type=int),
    "--ws-port": _option("port of the live connection (default 3848, 0: any free one)", type=int),
    "--host": _option("address to listen on (default 127.0.0.1)"),
    "--foreground": _switch("stay in the foreground and log to the terminal"),
    "--no-open": _switch("do not open a browser"),
    "--detached": _switch(argparse.SUPPRESS),
    "--short": _switch("one line, for a prompt; `python3 -m` is faster"),
    "--token": _switch("with the token, for another user or another machine"),
    "what": _option("pair: a code for a browser; key: the one for Redis", choices=("pair", "key")),
    "session": _option("beginning of its id; for `go` also of its label", metavar="SESSION"),
    "answer": _option("allow, always, deny …; without it, print what is asked", nargs="*", metavar="ANSWER"),
    "--markdown": _switch("as a table in Markdown, with defaults only"),
    "--agent": _option("for this program, or all here (default: Claude Code)", choices=(*PROGRAMS, "all")),
    "--project": _option("in this project's settings, not the user's", nargs="?", const=".", metavar="DIR"),
    "--dry-run": _switch("print what would change, and change nothing"),
    "--answers": _switch("let questions be answered on the page: their hooks wait for a decision"),
    "--without": _option(
        "no hook of it, if /remote-control denies requests beside one; the page then cannot answer them",
        action="append",
        choices=OPTIONAL_EVENTS,
    ),  # fmt: skip
    "--status-line": _switch("also show context, exact cost and limits, by Claude Code's status line"),
    "--all": _switch("also ended and hidden ones"),
    "words": _option('words, begin* or "words in a row" that must all occur', nargs="*"),
    "--session": _option("only this session (the id's beginning is enough)", metavar="ID"),
    "--machine": _option("only this machine"),
    "--type": _option("only this hook or event type, such as PreToolUse or tool_error"),
    "--tool": _option("only this tool, such as Bash"),
    "--state": _option("only sessions in this state now", choices=SESSION_STATES),
    "--from": _option("2026-11-24, 2026-11-24T14:30 or ms since the epoch", metavar="TIME", dest="start"),
    "--to": _option("before then; from a day to the same day is that day", metavar="TIME", dest="end"),
    "--time-zone": _option("zone of these times, such as Europe/Berlin (default: ours)", metavar="NAME"),
    "--limit": _option("most results (default 50)", type=int, default=50),
    "--json": _switch("for programs: as JSON; events and results as one object a line"),
    "--format": _option("html: a page with one --session", choices=("ndjson", "html"), default="ndjson"),
    "--output": _option("file to write to (default: standard output)", metavar="FILE"),
    "paths": _option("files or directories (default: all transcripts)", nargs="*", metavar="PATH"),
    "action": _option("what to do", choices=("install", "remove", "status")),
    "--live": _option("live events (default 300 s; 0: none)", type=int, default=300, metavar="SECONDS"),
    "--remove": _switch("delete the demo's sessions"),
}
_SERVING = "--port --ws-port --host --foreground --no-open --detached"
_FILTERS = "words --session --machine --type --tool --state --from --to --time-zone"
# In the order of `--help`, which takes the name from the function and the text from its docstring.
COMMANDS: dict[Callable[..., int], str] = {
    command_start: _SERVING,
    command_stop: "",
    command_restart: _SERVING,
    command_status: "--json --short",
    command_url: "--token",
    command_answers: "what",
    command_answer: "session answer",
    command_config: "--markdown",
    command_install: "--agent --project --dry-run --answers --without --status-line",
    command_uninstall: "--agent --project --dry-run",
    command_sessions: "--all --json",
    command_go: "session",
    command_tail: "--session --machine --type --json",
    command_search: f"{_FILTERS} --limit --json",
    command_export: f"{_FILTERS} --format --output",
    command_import: "paths",
    command_prune: "--dry-run",
    command_service: "action",
    command_doctor: "--json",
    command_test_event: "",
    command_notify_test: "",
    command_demo: "--live --remove",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(prog="contextuate_monitor.py", description="A live monitor for coding agents.")
    parser.add_argument("--version", action="version", version=f"contextuate {__version__}")
    title = "commands (`COMMAND --help` shows the options of each)"
    commands = parser.add_subparsers(title=title, metavar="COMMAND", required=True)
    for function, options in COMMANDS.items():
        name = function.__name__.removeprefix("command_").replace("_", "-")
        words = str(function.__doc__).splitlines()[0]
        command = commands.add_parser(name, help=f"{words[0].lower()}{words[1:-1]}", description=words)
        command.set_defaults(function=function, parser=command)
        for option in ("--config", *options.split()):
            command.add_argument(option, **OPTIONS[option])
    return parser


def prepare_output() -> None:
    """Prepare standard output for any text, and for being closed."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif isinstance(stream, io.TextIOWrapper):
            is_utf8 = codecs.lookup(stream.encoding).name == "utf-8"
            stream.reconfigure(encoding="utf-8" if is_utf8 else "ascii", errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 1 for a failure, 2 for a bad command line or configuration."""
    prepare_output()
    args, rest = build_parser().parse_known_args(arguments)
    if rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        for name in ("CONTEXTUATE_HOME", "CONTEXTUATE_CONFIG", "CLAUDE_CONFIG_DIR"):
            if (path := os.environ.get(name, "")) and not path.startswith(("/", "~/")):
                os.environ[name] = os.path.abspath(path)  # for the monitor, which runs in another directory
        if args.function is command_doctor:  # reports whether the configuration is usable
            return int(args.function(args))
        return int(args.function(settings_of(args), args))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of the output has exited; be silent at exit
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ConfigError, CommandError, SearchError) as error:
        print_status(f"error: {error}")
        return 2 if isinstance(error, (ConfigError, SearchError)) else 1
    except UnicodeEncodeError as error:
        print_status(f"error: {error.object!a} is not UTF-8 text")
        return 2
    except OSError as error:  # an unusable file or directory
        print_status(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
