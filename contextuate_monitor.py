#!/usr/bin/env python3
"""Contextuate Monitor: who is working, who waits for you, and what happened, live in a browser.

    python3 contextuate_monitor.py start      start the monitor and print the page's address
    python3 contextuate_monitor.py install    register the hook in Claude Code's settings
    python3 contextuate_monitor.py --help     everything else

Claude Code's hooks (`emit_event.py`) hand events to the monitor over a Unix socket, or over Redis from any
number of machines. The monitor writes each event to a file before it acknowledges it, keeps the state of
every session, and sends both to the dashboard (`index.html`) over WebSocket. The README describes events,
files and protocol.

Threads, and who owns what:
- The loop thread owns all state: sessions, clients, ingest connections, and every write to the event store.
- HTTP threads (one a request) and the reader thread (history for WebSocket clients) read event files, which
  only ever grow or go as a whole, and ask the loop thread for anything else through `EventLoop.call`.
- The Redis subscriber thread owns its connections; it puts lines into an inbox that the loop empties.
- The index thread fills index.db from the event files; who searches or counts has connections of its own.
- The retention thread plans, deletes and packs whole days of files; the loop forgets what is gone.
Nothing else is shared but the queue and the wake-up socket of the loop.

Not here: TLS for the page (put a reverse proxy in front).
"""

from __future__ import annotations

import argparse
import base64
import binascii
import bisect
import calendar
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import enum
import errno
import fcntl
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
import os
import py_compile
import random
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import threading
import time
import unicodedata
import urllib.parse
import uuid
import webbrowser
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Callable, NamedTuple, NoReturn, Protocol, TypeVar, Union

if sys.version_info < (3, 9):  # noqa: UP036 - it is told in words and not by a traceback
    sys.exit(f"contextuate: Python 3.9 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
try:
    import emit_event
except ModuleNotFoundError:
    sys.exit("contextuate: emit_event.py is missing: copy it into the folder of contextuate_monitor.py")

from emit_event import ConfigError, JsonObject, MalformedEvent, Privacy, encode_json, now_ms

__version__ = "0.1.0"
__all__ = [
    "EventLoop",
    "EventStore",
    "FrameParser",
    "Monitor",
    "SessionBook",
    "Settings",
    "load_settings",
    "main",
]

log = logging.getLogger("contextuate")


def steady_ms() -> float:
    """Return the milliseconds of a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) * 1000


# ---------------------------------------------------------------------------
# Config: what the monitor is told, checked once
#
# Owns: Settings, and where each of our files lies. The keys themselves are in emit_event.KEYS.
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything the monitor is told, from the configuration file, the environment and the command line."""

    home: str
    config_path: str
    machine_id: str
    values: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def privacy(self) -> Privacy:
        """Return what may be stored."""
        return emit_event.privacy_of(self.values)

    def path(self, name: str) -> str:
        """Return the path of one of our files."""
        return os.path.join(self.home, name)


def load_settings(
    config_path: str | None = None, overrides: dict[str, Any] | None = None
) -> tuple[Settings, list[str]]:
    """Read the configuration; return settings and warnings in words. Raise ConfigError if it cannot be used.

    `overrides` maps configuration keys to values of the command line, which win over the file.
    """
    home, path = emit_event.places(os.environb)  # type: ignore[arg-type]
    path = os.path.abspath(config_path or path)
    if config_path and not os.path.exists(path):
        raise ConfigError(f"{path}: no such file; leave --config out to use defaults")
    values, warnings = emit_event.load_config(path)
    for key, value in (overrides or {}).items():
        rule = emit_event.KEYS[key]
        if not rule.accepts(value):
            raise ConfigError(f"command line: {key}: expected {rule.expected}, got {value!r}")
        values[key] = value
    settings = Settings(os.path.abspath(home), path, emit_event.this_machine(), values)
    if settings["server.auth"] == "off" and not is_loopback(settings["server.host"]):
        raise ConfigError(
            f'{path}: server.auth: "off" is refused with server.host {settings["server.host"]}: everybody in '
            'the network could read your sessions; use "auto" or "token", or bind 127.0.0.1'
        )
    same_port = settings["server.port"] == settings["server.wsPort"] != 0
    if same_port:
        raise ConfigError(
            f"{'command line' if overrides else path}: server.wsPort: expected a port other than server.port "
            f"({settings['server.port']}){'; give --ws-port, too' if overrides else ''}"
        )
    return settings, warnings


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address means this machine only."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------------------
# Words for people: on a terminal and in the log
#
# What comes from elsewhere may hold anything; on a terminal it goes through `safe_line`.
# ---------------------------------------------------------------------------


def tell(words: str) -> None:
    """Say something to the person, beside the output."""
    print(f"contextuate: {words}", file=sys.stderr, flush=True)


def safe_line(text: str) -> str:
    """Return text as one line that cannot steer the terminal it is printed on."""
    return "".join(char if char.isprintable() else "�" for char in text).rstrip()


def human_duration(duration_ms: float) -> str:
    """Return a duration in its largest fitting unit."""
    seconds = max(0, int(duration_ms / 1000))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def human_size(size: int) -> str:
    """Return a number of bytes in its largest fitting unit."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


class Progress:
    """Tell once a second how far long work is."""

    def __init__(self, total_bytes: int, what: str, quiet: bool) -> None:
        self.count = 0
        self._done = 0
        self._total = total_bytes
        self._what = what
        self._quiet = quiet
        self._told = time.monotonic()

    def add(self, count: int, size: int) -> None:
        """Take note of work that is done."""
        self.count += count
        self._done += size
        if not self._quiet and time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            tell(f"{self.count} {self._what}, {human_size(self._done)} of at most {human_size(self._total)}")

    def counting(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Pass lines on and count them."""
        for line in lines:
            self.add(1, len(line) + 1)
            yield line


# ---------------------------------------------------------------------------
# WebSocket framing: RFC 6455 without I/O
#
# Bytes in, messages out, in wire order. Knows: frames. Does not know: sockets, clients, what messages mean.
# Extensions are never agreed on, so every reserved bit is an error (section 5.2).
# ---------------------------------------------------------------------------

WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MESSAGE_LIMIT_BYTES = 16 << 20
CONTROL_LIMIT_BYTES = 125
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
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    TRY_AGAIN_LATER = 1013


class ProtocolError(Exception):
    """The peer broke the protocol: the close code that says how, and the reason in words."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(f"{int(code)} {reason}")
        self.code = code
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Text:
    """One whole text message."""

    text: str


@dataclasses.dataclass(frozen=True)
class Binary:
    """One whole binary message."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Ping:
    """A ping, to be answered by a pong with the same payload."""

    payload: bytes


@dataclasses.dataclass(frozen=True)
class Pong:
    """A pong."""

    payload: bytes


@dataclasses.dataclass(frozen=True)
class Close:
    """The peer's close frame; code None when it carried none. Nothing follows it."""

    code: int | None
    reason: str


@dataclasses.dataclass(frozen=True)
class Failure:
    """The peer broke the protocol; answer with a close frame of this code. Nothing follows it."""

    code: CloseCode
    reason: str


Received = Union[Text, Binary, Ping, Pong, Close, Failure]


def frame_head(opcode: Opcode, size: int, mask_bit: int = 0) -> bytes:
    """Encode what stands before a final frame's mask and payload; `mask_bit` is 0x80 where a mask is."""
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, mask_bit | size)
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, mask_bit | 126, size)
    return struct.pack("!BBQ", 0x80 | opcode, mask_bit | 127, size)


def encode_frame(opcode: Opcode, payload: bytes, mask: bytes | None = None) -> bytes:
    """Encode one final frame in the minimal length form (RFC 6455 section 5.2).

    `mask` is a client's 4 bytes.
    """
    if mask is None:
        return frame_head(opcode, len(payload)) + payload
    return frame_head(opcode, len(payload), 0x80) + mask + apply_mask(payload, mask)


def encode_close(code: int, reason: str = "", mask: bytes | None = None) -> bytes:
    """Encode a close frame; the reason is cut to the 123 bytes that a control frame has for it."""
    text = reason.encode()[: CONTROL_LIMIT_BYTES - 2].decode("utf-8", "ignore").encode()
    return encode_frame(Opcode.CLOSE, struct.pack("!H", code) + text, mask)


def apply_mask(data: bytes, mask: bytes, offset: int = 0) -> bytes:
    """XOR `data` with the 4-byte `mask` (RFC 6455 section 5.3), `offset` bytes into the payload."""
    size = len(data)
    turn = offset % 4
    key = (mask[turn:] + mask[:turn]) * (size // 4 + 1)
    return (int.from_bytes(data, "big") ^ int.from_bytes(key[:size], "big")).to_bytes(size, "big")


def is_sendable_close_code(code: int) -> bool:
    """Tell whether a peer may send this code in a close frame (RFC 6455 section 7.4)."""
    return 3000 <= code <= 4999 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))


class FrameParser:
    """Turn a peer's bytes into messages.

    `feed(data)` returns what became whole, in wire order; after a Close or a Failure it returns nothing more.
    `masked` says which side this is: a server takes masked frames only, a client unmasked ones only.
    """

    def __init__(self, masked: bool = True, limit_bytes: int = MESSAGE_LIMIT_BYTES) -> None:
        self._masked = masked
        self._limit_bytes = limit_bytes
        self._buffer = bytearray()
        self._received: list[Received] = []
        self._opcode: Opcode | None = None  # of the message whose fragments are coming in, else None
        self._size = 0  # of that message so far, bytes
        self._parts: list[Any] = []  # of that message: str pieces of a text, bytes pieces of a binary one
        self._in_frame = False  # also when nothing more is to be parsed
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parser = self._parse()
        next(self._parser)

    def feed(self, data: bytes) -> list[Received]:
        """Take bytes of any size; return the messages they completed."""
        self._buffer += data
        next(self._parser)
        received, self._received = self._received, []
        return received

    @property
    def is_at_rest(self) -> bool:
        """Tell whether nothing is under way: a new parser would go on in the same way."""
        return not self._in_frame and not self._buffer and self._opcode is None

    def _parse(self) -> Generator[None, None, None]:
        try:
            while True:
                yield from self._parse_frame()
                self._in_frame = False
        except ProtocolError as error:
            self._received.append(Failure(error.code, error.reason))
        except StopIteration:
            pass
        # Closed is another parser, not a flag that every step tests.
        while True:
            self._buffer.clear()
            self._parts.clear()
            yield

    def _take(self, size: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < size:
            yield
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _parse_frame(self) -> Generator[None, None, None]:
        first, second = yield from self._take(2)
        self._in_frame = True
        final, opcode = bool(first & 0x80), self._check_head(first, second)
        size = second & 0x7F
        if size == 126:
            (size,) = struct.unpack("!H", (yield from self._take(2)))
            self._check_minimal(size, 126)
        elif size == 127:
            (size,) = struct.unpack("!Q", (yield from self._take(8)))
            if size >> 63:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the length has its top bit set")
            self._check_minimal(size, 1 << 16)
        if opcode < Opcode.CLOSE and self._size + size > self._limit_bytes:
            raise ProtocolError(CloseCode.MESSAGE_TOO_BIG, f"a message may have {self._limit_bytes} bytes")
        mask = (yield from self._take(4)) if self._masked else b""
        if opcode >= Opcode.CLOSE:
            payload = yield from self._take(size)
            yield from self._finish_control(opcode, apply_mask(payload, mask) if mask else payload)
        else:
            self._opcode = self._opcode if opcode is Opcode.CONTINUATION else opcode
            yield from self._parse_data(size, mask, final)

    def _check_head(self, first: int, second: int) -> Opcode:
        """Check the two first bytes of a frame; return its opcode."""
        if first & 0x70:
            raise ProtocolError(
                CloseCode.PROTOCOL_ERROR, "a reserved bit is set and no extension was agreed on"
            )
        try:
            opcode = Opcode(first & 0x0F)
        except ValueError:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"unknown opcode {first & 0x0F}") from None
        if bool(second & 0x80) is not self._masked:
            wanted = "masked" if self._masked else "unmasked"
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"every frame must be {wanted}")
        if opcode >= Opcode.CLOSE:
            if not first & 0x80:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a control frame must not be fragmented")
            if second & 0x7F > CONTROL_LIMIT_BYTES:
                raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a control frame has at most 125 bytes")
        elif opcode is Opcode.CONTINUATION and self._opcode is None:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "nothing to continue")
        elif opcode is not Opcode.CONTINUATION and self._opcode is not None:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the message before this one is not finished")
        return opcode

    @staticmethod
    def _check_minimal(size: int, least: int) -> None:
        if size < least:
            raise ProtocolError(CloseCode.PROTOCOL_ERROR, "the length is not in its shortest form")

    def _parse_data(self, size: int, mask: bytes, final: bool) -> Generator[None, None, None]:
        """Take a data frame's payload as it arrives, so that bad UTF-8 fails at once and not at the end."""
        done = 0
        while done < size:
            while not self._buffer:
                yield
            piece = bytes(self._buffer[: size - done])
            del self._buffer[: size - done]
            self._add(apply_mask(piece, mask, done) if mask else piece)
            done += len(piece)
        self._size += size
        if final:
            self._finish_message()

    def _add(self, piece: bytes, last: bool = False) -> None:
        if self._opcode is Opcode.BINARY:
            self._parts.append(piece)
            return
        try:
            self._parts.append(self._decoder.decode(piece, last))
        except UnicodeDecodeError:
            raise ProtocolError(CloseCode.INVALID_DATA, "a text message must be UTF-8") from None
        pending = self._decoder.getstate()[0]
        if pending[:1] == b"\xed" and pending[1:2] >= b"\xa0":  # a surrogate, which Python judges a byte late
            raise ProtocolError(CloseCode.INVALID_DATA, "a text message must be UTF-8")

    def _finish_message(self) -> None:
        if self._opcode is Opcode.BINARY:
            self._received.append(Binary(b"".join(self._parts)))
        else:
            self._add(b"", last=True)
            self._received.append(Text("".join(self._parts)))
        self._opcode, self._size, self._parts = None, 0, []
        self._decoder.reset()

    def _finish_control(self, opcode: Opcode, payload: bytes) -> Generator[None, None, None]:
        if opcode is Opcode.PING:
            self._received.append(Ping(payload))
        elif opcode is Opcode.PONG:
            self._received.append(Pong(payload))
        else:
            self._received.append(parse_close(payload))
            while True:  # whatever follows a close frame is not looked at (section 5.5.1)
                self._buffer.clear()
                yield


def parse_close(payload: bytes) -> Close:
    """Parse a close frame's payload (RFC 6455 section 5.5.1); raise ProtocolError."""
    if not payload:
        return Close(None, "")
    if len(payload) == 1:
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, "a close code has two bytes")
    (code,) = struct.unpack("!H", payload[:2])
    if not is_sendable_close_code(code):
        raise ProtocolError(CloseCode.PROTOCOL_ERROR, f"close code {code} must not be sent")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        raise ProtocolError(CloseCode.INVALID_DATA, "a close reason must be UTF-8") from None


class RequestError(Exception):
    """A request that is refused: HTTP status, reason in words, and headers that help the client."""

    def __init__(self, status: int, reason: str, headers: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status
        self.reason = reason
        self.headers = headers


@dataclasses.dataclass(frozen=True)
class Request:
    """The head of an HTTP request; `headers` in order, names in lower case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Return every value of one header."""
        return [value for field, value in self.headers if field == name]

    def one(self, name: str) -> str:
        """Return the value of a header, "" when it is missing.

        Raise RequestError(400) when it comes twice.
        """
        values = self.all(name)
        if len(values) > 1:
            raise RequestError(400, f"several {name} headers")
        return values[0] if values else ""

    def tokens(self, name: str) -> list[str]:
        """Return the comma-separated tokens of a header in lower case, over all its lines."""
        return [token.strip().lower() for value in self.all(name) for token in value.split(",")]


_HEADER_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+\Z")


def parse_request_head(head: bytes) -> Request:
    """Parse an HTTP/1.1 request head without its final blank line; raise RequestError(400)."""
    lines = head.split(b"\r\n")
    parts = lines[0].split(b" ")
    if len(parts) != 3 or not re.fullmatch(rb"HTTP/1\.\d", parts[2]):
        raise RequestError(400, "the request line is malformed")
    if not parts[1].startswith(b"/"):
        raise RequestError(400, "the request target must be a path")
    headers = []
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon or not _HEADER_NAME.match(name) or b"\0" in value or b"\n" in value or b"\r" in value:
            raise RequestError(400, "a header line is malformed")
        headers.append((name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")))
    if parts[2] != b"HTTP/1.1":
        raise RequestError(505, "a WebSocket needs HTTP/1.1")
    return Request(parts[0].decode("latin-1"), parts[1].decode("latin-1"), tuple(headers))


def accept_key(key: str) -> str:
    """Compute Sec-WebSocket-Accept for a client's key (RFC 6455 section 4.2.2)."""
    return base64.b64encode(hashlib.sha1(key.encode("ascii") + WEBSOCKET_GUID).digest()).decode("ascii")


def handshake_response(request: Request) -> bytes:
    """Return the 101 response to an opening handshake (RFC 6455 section 4.2); raise RequestError.

    Extensions and subprotocols are declined by leaving them out.
    """
    if request.method != "GET":
        raise RequestError(405, "a WebSocket is opened with GET", [("Allow", "GET")])
    if "websocket" not in request.tokens("upgrade") or "upgrade" not in request.tokens("connection"):
        raise RequestError(
            426, "this is the WebSocket port", [("Upgrade", "websocket"), ("Connection", "Upgrade")]
        )
    if request.one("sec-websocket-version") != "13":
        raise RequestError(426, "WebSocket version 13 is needed", [("Sec-WebSocket-Version", "13")])
    key = request.one("sec-websocket-key")
    try:
        good_key = len(base64.b64decode(key.encode("ascii"), validate=True)) == 16
    except (binascii.Error, UnicodeEncodeError):
        good_key = False
    if not good_key:
        raise RequestError(400, "Sec-WebSocket-Key must be 16 bytes in base64")
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n"
    ).encode("ascii")


# ---------------------------------------------------------------------------
# Event store: events on disk, one file per day and session
#
# Owns: the files below events/, and the numbers (seq) that order arrival.
# Knows: nothing of clients, sessions' states or sockets.
# A line begins {"seq":…,"received":…,"id":…}, so that a place in a file is found without parsing JSON.
# ---------------------------------------------------------------------------

_SAFE_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")  # neither hidden nor like an option
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z")
_SEQ = re.compile(rb'\{"seq":(\d+),')
_BLOCK_BYTES = 64 << 10
FREE_BYTES_TO_GO_ON = 4 << 20
DIRECTORY_SETTLES_NS = 2_000_000_000  # two changes of a directory within a tick of the clock look like one
_TAIL_BYTES = 4 << 10


class StoredEvent(NamedTuple):
    """An event that is on disk: its number, itself, and its line without the final newline."""

    seq: int
    event: JsonObject
    line: bytes


def session_file_name(session_id: str) -> str:
    """Return the file name for a session; ids that are not plain names are hashed."""
    if _SAFE_FILE_NAME.match(session_id):
        return session_id + ".jsonl"
    digest = hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()
    return f"sha256-{digest[:40]}.jsonl"


def day_of(time_ms: int) -> str:
    """Return the UTC day, YYYY-MM-DD, whose folder holds what arrived at `time_ms`."""
    return _day_name(time_ms // 86_400_000)


@functools.lru_cache(maxsize=64)
def _day_name(days: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(days * 86_400))


def numbered_line(seq: int, received_ms: int, encoded: bytes) -> bytes:
    """Make the JSON of an event its line in the store, without the newline."""
    return b'{"seq":%d,"received":%d,' % (seq, received_ms) + encoded[1:]


class EventStore:
    """Append events to the session files of a day and read them back.

    `append` is for the loop thread; everything that reads is safe in any thread.
    """

    OPEN_FILES = 64

    def __init__(self, root: str) -> None:
        self.root = root
        self.seq = 0  # the number last given
        self.error: str | None = None  # why the last write failed, in words; None when it did not
        self.repaired = 0  # torn last lines found
        self._files: collections.OrderedDict[str, int] = collections.OrderedDict()  # path → descriptor
        self._listings: dict[str, tuple[int, frozenset[str]]] = {}  # day → (time of change, files' names)
        emit_event.make_private_directory(root)
        self.newest_day = max(self.days(), default="")  # that events were written to
        self.in_order = True  # False: the clock was set back by days, so later days do not hold later numbers

    # Writing

    def append(
        self, events: Sequence[JsonObject], received_ms: int, encoded: Sequence[bytes] | None = None
    ) -> list[StoredEvent | None]:
        """Number the events and write them, with one write for each file; return them in the same order.

        `encoded` is the JSON of each, where the caller has it. None stands where the event could not be
        written; `error` then says why.
        """
        stored: list[StoredEvent | None] = []
        by_path: dict[str, list[int]] = {}
        day = self._day_for(received_ms)
        for index, (event, text) in enumerate(zip(events, encoded or map(encode_json, events))):
            self.seq += 1
            line = numbered_line(self.seq, received_ms, text)
            stored.append(StoredEvent(self.seq, {"seq": self.seq, "received": received_ms, **event}, line))
            by_path.setdefault(f"{self.root}/{day}/{session_file_name(event['sessionId'])}", []).append(index)
        self.error = None
        for path, indexes in by_path.items():
            data = b"".join(stored[index].line + b"\n" for index in indexes)  # type: ignore[union-attr]
            try:
                self._write(path, data)
            except OSError as error:
                self._forget(path)
                self.error = f"{path}: {error.strerror or error}"
                for index in indexes:
                    stored[index] = None
        return stored

    def has_room(self) -> bool:
        """Tell whether events can be written: a disk that broke, or a quota, shows only when one tries."""
        path = f"{self.root}/.room"
        try:
            free = os.statvfs(self.root)
            if free.f_bavail * free.f_frsize <= FREE_BYTES_TO_GO_ON:
                return False
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                return os.write(fd, bytes(_BLOCK_BYTES)) == _BLOCK_BYTES
            finally:
                os.close(fd)
                os.unlink(path)
        except OSError:
            return False

    def _day_for(self, received_ms: int) -> str:
        """Return the day to write to: a clock set back over midnight does not put numbers out of order."""
        day = day_of(received_ms)
        if day < self.newest_day <= day_of(received_ms + 24 * 3_600_000):
            return self.newest_day
        self.in_order = self.in_order and day >= self.newest_day
        self.newest_day = day
        return day

    def _write(self, path: str, data: bytes) -> None:
        fd = self._open(path)
        written = os.write(fd, data)
        if written != len(data):
            os.ftruncate(fd, os.fstat(fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self, path: str) -> int:
        fd = self._files.get(path)
        if fd is not None:
            if os.fstat(fd).st_nlink:
                self._files.move_to_end(path)
                return fd
            self._forget(path)  # somebody has removed the file: `rm` is how events are deleted by hand
        emit_event.make_private_directory(os.path.dirname(path))
        if os.path.exists(path + PACKED) and not os.path.exists(path):
            unpack_file(path)  # the clock was set back to a day that is closed
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._files[path] = fd
        self.repaired += repair_last_line(fd)
        while len(self._files) > self.OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return fd

    def _forget(self, path: str) -> None:
        fd = self._files.pop(path, None)
        if fd is not None:
            os.close(fd)

    def delete_session(self, session_id: str) -> int:
        """Remove every file of a session; return the bytes that became free."""
        freed = 0
        for path in self._session_paths(session_id):
            self._forget(path)
            for kept_as in (path, path + PACKED):
                with contextlib.suppress(FileNotFoundError):
                    freed += os.path.getsize(kept_as)
                    os.unlink(kept_as)
            with contextlib.suppress(OSError):  # other sessions' files keep the day
                os.rmdir(os.path.dirname(path))
        return freed

    def close(self) -> None:
        """Close every file."""
        for path in list(self._files):
            self._forget(path)

    # Reading

    def days(self) -> list[str]:
        """List the days that have events, oldest first."""
        try:
            return sorted(name for name in os.listdir(self.root) if _DAY.match(name))
        except FileNotFoundError:
            return []

    def day_paths(self, day: str) -> list[str]:
        """List the files of a day in the order in which their sessions began that day."""
        paths = sorted(f"{self.root}/{day}/{name}" for name, _ in stored_files(self.root, day))
        return sorted(paths, key=first_seq)

    def _session_paths(self, session_id: str) -> list[str]:
        return self._paths_of(session_file_name(session_id), self.days())

    def _paths_of(self, name: str, days: Sequence[str]) -> list[str]:
        return [f"{self.root}/{day}/{name}" for day in days if name in self._names_of(day)]

    def _names_of(self, day: str) -> frozenset[str]:
        """Return the names of a day's files; a day is listed anew only when its directory has changed."""
        try:
            changed_ns = os.stat(f"{self.root}/{day}").st_mtime_ns
        except FileNotFoundError:
            return frozenset()
        known = self._listings.get(day)
        if known is not None and known[0] == changed_ns:
            return known[1]
        names = frozenset(name for name, _ in stored_files(self.root, day))
        if time.time_ns() - changed_ns > DIRECTORY_SETTLES_NS:
            self._listings[day] = (changed_ns, names)
        return names

    def last_seqs(self) -> dict[str, int]:
        """Return the last number of every session by its files' name; reads no more than the files' ends."""
        found: dict[str, int] = {}
        highest = 0
        for day in self.days():
            paths = {name: f"{self.root}/{day}/{name}" for name, _ in stored_files(self.root, day)}
            lasts = {name: last_seq(path) for name, path in paths.items()}
            found.update((name, max(found.get(name, 0), last)) for name, last in lasts.items())
            self.in_order = self.in_order and all(first_seq(path) > highest for path in paths.values())
            highest = max([highest, *lasts.values()])
        return found

    def lines_of(self, names: Iterable[str], after: int = 0) -> Iterator[bytes]:
        """Yield the lines of sessions, by their files' names, in order of arrival; those after a seq."""
        days = self.days()
        streams = []
        for name in names:
            paths = self._paths_of(name, days)
            lines = [lines_from(path, after + 1 if after else 0) for path in paths]
            if not self.in_order:
                streams += [(max(after, first_seq(path)), each) for path, each in zip(paths, lines)]
            elif paths:
                streams.append((max(after, first_seq(paths[0])), itertools.chain.from_iterable(lines)))
        return streams[0][1] if len(streams) == 1 else merged(streams)

    def session_lines(
        self, session_id: str, limit: int, before: int | None = None, after: int | None = None
    ) -> list[bytes]:
        """Return at most `limit` lines of a session in order of arrival: the last, the last before, or the
        first after.
        """
        lines: list[bytes] = []
        paths = self._session_paths(session_id)
        if not self.in_order:
            found = self.lines_of([session_file_name(session_id)], after or 0)
            if after is not None:
                found = itertools.islice(found, limit)
            chosen = (line for line in found if before is None or line_seq(line) < before)
            return list(collections.deque(chosen, limit))
        if after is not None:
            for path in paths:
                lines.extend(itertools.islice(lines_from(path, after + 1), limit - len(lines)))
            return [line for line in lines if before is None or line_seq(line) < before]
        for path in reversed(paths):
            lines.extend(itertools.islice(lines_back(path, before), limit - len(lines)))
        return lines[::-1]

    def recent_lines(self, limit: int, before: int | None = None, after: int | None = None) -> list[bytes]:
        """Return at most `limit` last lines of all sessions (before / after a seq), in order of arrival."""
        if not self.in_order:
            return self._recent_by_number(limit, before, after)
        lines: list[bytes] = []
        for day in reversed(self.days()):
            readers = [lines_back(path, before) for path in self.day_paths(day)]
            for line in heapq.merge(*readers, key=line_seq, reverse=True):
                if len(lines) == limit or (after is not None and line_seq(line) <= after):
                    return lines[::-1]
                lines.append(line)
        return lines[::-1]

    def _recent_by_number(self, limit: int, before: int | None, after: int | None) -> list[bytes]:
        """Do the same whatever the days are called: read the files' ends, the latest number first."""
        lasts = [(last_seq(path), path) for day in self.days() for path in self.day_paths(day)]
        lines: list[bytes] = []
        for last, path in sorted(lasts, reverse=True):
            if len(lines) >= limit and last < line_seq(lines[-1]):
                break
            lines += itertools.islice(lines_back(path, before), limit)
            lines = sorted(lines, key=line_seq, reverse=True)[:limit]
        return [line for line in reversed(lines) if after is None or line_seq(line) > after]

    def find(self, event_id: str, session_id: str | None = None, seq: int | None = None) -> bytes | None:
        """Return the line of one event; a session, and better still a seq, saves reading every file."""
        if session_id is not None:
            paths = self._session_paths(session_id)[::-1]
        else:
            paths = [path for day in reversed(self.days()) for path in self.day_paths(day)]
        needle = b'"id":' + encode_json(event_id)
        for path in paths:
            if seq is not None:
                line = next(lines_from(path, seq), b"")
                if line_seq(line) == seq and needle in line:
                    return line
        lines = (line for path in paths for line in lines_from(path, 0) if needle in line)
        return next((line for line in lines if line_id(line) == event_id), None)

    def ids(self, session_id: str) -> set[str]:
        """Return the ids of every stored event of a session."""
        return {line_id(line) for path in self._session_paths(session_id) for line in lines_from(path, 0)}

    def all_lines(self) -> Iterator[bytes]:
        """Yield every stored line, session after session within a day, in the order the sessions began."""
        for day in self.days():
            for path in self.day_paths(day):
                yield from lines_from(path, 0)

    def size(self) -> tuple[int, int]:
        """Return (files, bytes of lines) of everything stored."""
        sizes = [about.size for day in self.days() for _, about in stored_files(self.root, day)]
        return len(sizes), sum(sizes)


class MemoryStore:
    """The same as EventStore for `persistence.enabled: false`: the last events, in memory only."""

    LIMIT_BYTES = 64 << 20

    def __init__(self) -> None:
        self.root = ""
        self.seq = 0
        self.error: str | None = None
        self.repaired = 0
        self._lines: collections.deque[tuple[int, str, bytes]] = (
            collections.deque()
        )  # (seq, session id, line)
        self._bytes = 0
        self._lock = threading.Lock()  # the loop thread appends while others read

    def append(
        self, events: Sequence[JsonObject], received_ms: int, encoded: Sequence[bytes] | None = None
    ) -> list[StoredEvent | None]:
        """Keep the events, forgetting the oldest ones beyond the limit."""
        stored: list[StoredEvent | None] = []
        for event, text in zip(events, encoded or map(encode_json, events)):
            self.seq += 1
            line = numbered_line(self.seq, received_ms, text)
            stored.append(StoredEvent(self.seq, {"seq": self.seq, "received": received_ms, **event}, line))
        with self._lock:
            for kept in stored:
                if kept is not None:
                    self._lines.append((kept.seq, kept.event["sessionId"], kept.line))
                    self._bytes += len(kept.line)
            while self._bytes > self.LIMIT_BYTES:
                self._bytes -= len(self._lines.popleft()[2])
        return stored

    def delete_session(self, session_id: str) -> int:
        """Forget a session's events; return their bytes."""
        with self._lock:
            before = self._bytes
            self._lines = collections.deque(entry for entry in self._lines if entry[1] != session_id)
            self._bytes = sum(len(entry[2]) for entry in self._lines)
            return before - self._bytes

    def has_room(self) -> bool:
        """Tell that events can be kept: the oldest make room."""
        return True

    def close(self) -> None:
        """Do nothing: there is no file."""

    def _select(
        self, session_id: str | None, limit: int, before: int | None, after: int | None
    ) -> list[bytes]:
        with self._lock:
            lines = [
                line
                for seq, session, line in self._lines
                if (session_id is None or session == session_id)
                and (before is None or seq < before)
                and (after is None or seq > after)
            ]
        return lines[:limit] if after is not None and session_id is not None else lines[-limit:]

    def last_seqs(self) -> dict[str, int]:
        """Return nothing: what memory held before this monitor is gone."""
        return {}

    def lines_of(self, names: Iterable[str], after: int = 0) -> Iterator[bytes]:
        """Yield lines as EventStore.lines_of does."""
        wanted = set(names)
        with self._lock:
            kept = list(self._lines)
        return (line for seq, owner, line in kept if seq > after and session_file_name(owner) in wanted)

    def session_lines(
        self, session_id: str, limit: int, before: int | None = None, after: int | None = None
    ) -> list[bytes]:
        """Return lines as EventStore.session_lines does."""
        return self._select(session_id, limit, before, after)

    def recent_lines(self, limit: int, before: int | None = None, after: int | None = None) -> list[bytes]:
        """Return lines as EventStore.recent_lines does."""
        return self._select(None, limit, before, after)

    def find(self, event_id: str, session_id: str | None = None, seq: int | None = None) -> bytes | None:
        """Return the line of one event."""
        lines = self._select(session_id, len(self._lines) + 1, None, None)
        return next((line for line in lines if line_id(line) == event_id), None)

    def ids(self, session_id: str) -> set[str]:
        """Return the ids of the events that are still kept of a session."""
        return {line_id(line) for line in self._select(session_id, len(self._lines) + 1, None, None)}

    def all_lines(self) -> Iterator[bytes]:
        """Yield every line that is still kept."""
        return iter(self._select(None, len(self._lines) + 1, None, None))

    def size(self) -> tuple[int, int]:
        """Return (0 files, bytes in memory)."""
        return 0, self._bytes


def repair_last_line(fd: int) -> int:
    """Mend a file whose last line has no newline; return 1 if it was torn, else 0.

    A whole event that lacks only its newline gets it; the torn beginning of one, never acknowledged, goes.
    """
    size = os.fstat(fd).st_size
    if size == 0 or os.pread(fd, 1, size - 1) == b"\n":
        return 0
    start = size
    tail = b""
    while start > 0 and b"\n" not in tail:
        start = max(0, start - _BLOCK_BYTES)
        tail = os.pread(fd, size - start, start)
    last_line = tail.rpartition(b"\n")[2]
    if emit_event.is_json_object(last_line):
        os.write(fd, b"\n")
    else:
        os.ftruncate(fd, size - len(last_line))
    return 1


def line_seq(line: bytes) -> int:
    """Return the number at the front of a stored line, 0 when there is none."""
    match = _SEQ.match(line)
    return int(match.group(1)) if match else 0


def parse_stored(line: bytes) -> JsonObject:
    """Parse a stored line; one that somebody edited is made an event again.

    Raise MalformedEvent if it is none.
    """
    event = emit_event.parse_event_line(line)
    if emit_event.is_whole_event(event) and isinstance(event.get("received"), int):
        return event
    received = event.get("received")
    received_ms = received if isinstance(received, int) else 0
    rebuilt = emit_event.build_event(event, received_ms, "unknown")
    return {"seq": line_seq(line), "received": received_ms or rebuilt["timestamp"], **rebuilt}


_ID = re.compile(rb'\{"seq":\d+,"received":\d+,"id":("(?:[^"\\]|\\.)*")')


def line_id(line: bytes) -> str:
    """Return the event id at the front of a stored line, "" when there is none."""
    match = _ID.match(line)
    return str(json.loads(match.group(1))) if match else ""


def first_seq(path: str) -> int:
    """Return the number of the first event in a file, 0 when there is none."""
    try:
        with open_stored(path) as file:
            head = file.readline(64)
            return line_seq(head) if len(head) == 64 or head.endswith(b"\n") else 0
    except FileNotFoundError:
        return 0


def last_seq(path: str) -> int:
    """Return the number of the last event in a file, also of one that lacks its newline; 0 for none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return next(map(line_seq, lines_back(path)), 0)  # a packed one ends with a whole line
    try:
        start, tail = os.fstat(fd).st_size, b""
        while start > 0:
            size = min(start, len(tail) + _TAIL_BYTES)  # ever longer steps, should the last line be long
            start -= size
            tail = os.pread(fd, size, start) + tail
            numbers = [line_seq(line) for line in tail.split(b"\n")[1 if start else 0 :]]
            if any(numbers):
                return max(numbers)
        return 0
    finally:
        os.close(fd)


def merged(streams: Sequence[tuple[int, Iterator[bytes]]]) -> Iterator[bytes]:
    """Merge sorted streams of lines by seq; each comes with its first seq and is not begun before that."""
    waiting = sorted(streams, key=lambda stream: stream[0], reverse=True)
    heads: list[tuple[int, int, bytes, Iterator[bytes]]] = []
    number = 0
    while waiting or heads:
        if waiting and (not heads or waiting[-1][0] <= heads[0][0]):
            stream = waiting.pop()[1]
        else:
            _, _, line, stream = heapq.heappop(heads)
            yield line
        following = next(stream, None)
        if following is not None:
            number += 1
            heapq.heappush(heads, (line_seq(following), number, following, stream))


def offset_of_seq(file: Any, size: int, seq: int) -> int:
    """Find by bisection where the first line with a number of at least `seq` begins.

    `size` if there is none.
    """
    # Lines that begin before low are smaller; those that begin in [low, high) are unknown; answer is the
    # first known one.
    low, high, answer = 0, size, size
    while low < high:
        middle = (low + high) // 2
        start = low
        if middle > low:
            file.seek(middle - 1)
            file.readline()
            start = file.tell()
        if start >= high:
            high = middle
            continue
        file.seek(start)
        line = file.readline()
        if line_seq(line) >= seq:
            answer, high = start, middle
        else:
            low = start + len(line)
    return answer


def lines_from(path: str, seq: int) -> Iterator[bytes]:
    """Yield the whole lines of a file, without newlines, from the first with a number of at least `seq`."""
    try:
        with open_stored(path) as file:
            if seq > 0:
                file.seek(offset_of_seq(file, file.seek(0, os.SEEK_END), seq))
            for line in file:
                if line.endswith(b"\n") and _SEQ.match(line):
                    yield line[:-1]
    except FileNotFoundError:
        return


def lines_back(path: str, before: int | None = None) -> Iterator[bytes]:
    """Yield the whole lines of a file from the last one (with a number below `before`) to the first."""
    try:
        with open_stored(path) as file:
            end = file.seek(0, os.SEEK_END)
            if before is not None:
                end = offset_of_seq(file, end, before)
            rest: list[bytes] = []  # of the line that is being read backwards: its pieces, last one first
            in_whole_line = False  # what stands after the last newline is still being written
            while end > 0:
                start = max(0, end - _BLOCK_BYTES)
                file.seek(start)
                first, *others = file.read(end - start).split(b"\n")
                end = start
                for piece in reversed(others):
                    line = piece + b"".join(reversed(rest))
                    rest = []
                    if in_whole_line and _SEQ.match(line):
                        yield line
                    in_whole_line = True
                rest.append(first)
            line = b"".join(reversed(rest))
            if in_whole_line and _SEQ.match(line):
                yield line
    except FileNotFoundError:
        return


# Files as they lie on disk: a closed day's may be packed, which whoever reads need not know


PACKED = ".gz"
PACK_BLOCK_BYTES = 256 << 10
# A gzip member's header (RFC 1952) with one extra field: its kind, the member's bytes, the content's bytes.
_PACK_HEAD = struct.Struct("<4sIBBH2sHQQ")
_PACK_TOTAL, _PACK_BLOCK = b"CT", b"CB"


class StoredFile(NamedTuple):
    """A file of the store: its inode (0 when it is packed), its bytes of lines, its bytes on disk."""

    inode: int
    size: int
    bytes_on_disk: int


_UID = os.getuid()


def stored_files(root: str, day: str) -> Iterator[tuple[str, StoredFile]]:
    """Yield what each file of a day is, by the name it has when it is not packed."""
    found: dict[str, StoredFile] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(f"{root}/{day}") as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                about = entry.stat()
                if not (about.st_uid == _UID or os.access(entry.path, os.R_OK)):
                    note_left_out(entry.path, "belongs to another user: its events")
                elif not stat.S_ISREG(about.st_mode):
                    continue
                elif entry.name.endswith(".jsonl"):
                    found[entry.name] = StoredFile(about.st_ino, about.st_size, about.st_size)
                elif entry.name.endswith(".jsonl" + PACKED):
                    size = packed_size(entry.path)
                    if size is not None:
                        found.setdefault(entry.name[: -len(PACKED)], StoredFile(0, size, about.st_size))
    yield from found.items()


def inode_of(path: str) -> int:
    """Return a file's inode, 0 when it is packed."""
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def open_stored(path: str) -> BinaryIO:
    """Open a file of lines for reading, packed or not; raise FileNotFoundError."""
    with contextlib.suppress(FileNotFoundError):
        return open(path, "rb")
    return io.BufferedReader(PackedFile(path + PACKED), PACK_BLOCK_BYTES)


def packed_size(path: str) -> int | None:
    """Return the bytes of lines in a packed file; None when it was not packed by this program."""
    try:
        with open(path, "rb") as file:
            head = _PACK_HEAD.unpack(file.read(_PACK_HEAD.size))
    except (OSError, struct.error):
        return None
    return int(head[8]) if head[5] == _PACK_TOTAL else None


class PackedFile(io.RawIOBase):
    """Read a packed file from any place: it is a sequence of gzip members that say how long they are."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with this one
        self._starts: list[int] = []  # where each block begins in the content
        self._blocks: list[tuple[int, int]] = []  # (offset, bytes) of each member in the file
        self._at = self._size = 0
        self._number, self._content = -1, b""  # the block that was read last
        offset = 0
        while True:
            self._file.seek(offset)
            head = self._file.read(_PACK_HEAD.size)
            if len(head) < _PACK_HEAD.size:
                return
            *_, kind, _, length, content = _PACK_HEAD.unpack(head)
            if kind not in (_PACK_TOTAL, _PACK_BLOCK) or length < _PACK_HEAD.size:
                note_left_out(path, "is damaged: the events from there on")
                return  # where the next member begins is not known
            if kind == _PACK_BLOCK:
                self._starts.append(self._size)
                self._blocks.append((offset, length))
                self._size += content
            offset += length

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read from any place."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the content."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        """Read what is left of the block at this place, or as much as is wanted."""
        if self._at >= self._size:
            return 0
        number = bisect.bisect_right(self._starts, self._at) - 1
        if number != self._number:
            self._content, self._number = self._unpacked(number), number
        start = self._at - self._starts[number]
        piece = self._content[start : start + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)

    def _unpacked(self, number: int) -> bytes:
        """Return a block's content; of a damaged one nothing but empty lines, as many bytes."""
        offset, length = self._blocks[number]
        end = self._starts[number + 1] if number + 1 < len(self._starts) else self._size
        size = end - self._starts[number]
        self._file.seek(offset)
        try:
            content = gzip.decompress(self._file.read(length))
        except (OSError, EOFError, zlib.error, struct.error):
            content = b""
        if len(content) == size:
            return content
        note_left_out(str(self._file.name), "is damaged: the events in that part of it")
        return b"\n" * size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


@functools.lru_cache(maxsize=1000)
def note_left_out(path: str, why: str) -> None:
    """Say once of a file that something in it cannot be read."""
    log.warning("%s %s are left out", path, why)


def _gzip_member(kind: bytes, content: bytes, told: int) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(content) + packer.flush()
    end = struct.pack("<II", zlib.crc32(content), len(content))
    length = _PACK_HEAD.size + len(body) + len(end)
    # FLG 4: there is an extra field; its length is that of kind, length and the two numbers.
    return _PACK_HEAD.pack(b"\x1f\x8b\x08\x04", 0, 0, 255, 20, kind, 16, length, told) + body + end


def pack_file(path: str) -> None:
    """Put a packed file in the place of a plain one; at every moment one of them is there and whole."""
    with open(path, "rb") as source:
        total = os.fstat(source.fileno()).st_size
        blocks = iter(lambda: source.read(PACK_BLOCK_BYTES), b"")
        members = (_gzip_member(_PACK_BLOCK, block, len(block)) for block in blocks)
        _replace(path + PACKED, itertools.chain([_gzip_member(_PACK_TOTAL, b"", total)], members))
    os.unlink(path)


def unpack_file(path: str) -> None:
    """Put the plain file back in the place of a packed one."""
    with open_stored(path) as source:
        _replace(path, iter(lambda: source.read(PACK_BLOCK_BYTES), b""))
    os.unlink(path + PACKED)


def _replace(path: str, pieces: Iterable[bytes]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path + ".tmp", flags, 0o600), "wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


REMEMBERED_IDS = 64 << 10


class SeenIds:
    """The ids of recent events, for live de-duplication: at least the last REMEMBERED_IDS / 2, in bounded
    memory.
    """

    def __init__(self) -> None:
        self._young: set[str] = set()
        self._old: set[str] = set()

    def add(self, event_id: str) -> None:
        """Remember an id."""
        self._young.add(event_id)
        if len(self._young) >= REMEMBERED_IDS // 2:
            self._old, self._young = self._young, set()

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._young or event_id in self._old


# ---------------------------------------------------------------------------
# Sessions: what each event says about who works, who waits and who is gone
#
# Events and time in, sessions and agents out; no I/O, so replaying the files gives what being there gave.
# `apply_event` tells one session one event, in the order in which things happened; SessionBook sees to that
# order, to time, and to what links sessions. What moves a session's turn stands in TURN_AFTER; the functions
# below it are the surprises of the real client, each under its own name.
#
# A session's state follows from STATES, the first row that holds; `quiet` is `working` after quietSeconds
# without a word, and comes with time alone.
# ---------------------------------------------------------------------------

MAIN = ""  # the agent id of a session's main agent

# Event type → the turn of the main agent after it. What is not here leaves the turn as it was.
TURN_AFTER = {
    "session_start": "idle",
    "user_prompt": "working",
    "tool_call": "working",
    "tool_result": "working",
    "tool_error": "working",
    "permission_request": "working",
    "permission_denied": "working",
    "elicitation": "working",
    "elicitation_result": "working",
    "turn_end": "idle",
    "turn_error": "failed",
    "session_end": "ended",
}

# State → what holds in it, in words and as a test; the first row that holds is the session's state.
STATES: tuple[tuple[str, str, Callable[[Session], bool]], ...] = (
    ("ended", "it ended, its process is gone, or its machine is silent", lambda it: it.turn == "ended"),
    ("waiting", "some agent of it waits for a person", lambda it: bool(it.waits)),
    ("failed", "the last turn ended with an error", lambda it: it.turn == "failed"),
    ("working", "a turn, an agent or a background task runs", lambda it: it.is_running),
    ("idle", "nothing of all that", lambda it: True),
)
SESSION_STATES = ("waiting", "failed", "working", "quiet", "idle", "ended")  # the most urgent first

QUESTION_TOOLS = ("AskUserQuestion", "ExitPlanMode")
AGENT_TOOLS = ("Agent", "Task")
TOGETHER_MS = 5000  # calls of one round begin within this time; events overtake each other by less
CLOCK_STEP_MS = 5000  # a clock that goes back by more was set back; events never arrive before earlier ones
OVERTAKEN_MS = (
    60_000  # what Redis brings is overtaken by less: a timestamp that goes back by more was set back
)
TOGETHER_EVENTS = 256  # at most so many of a session are kept for that: each late one tells them anew
STUCK_FAILURES = 5  # the same tool of one agent failed so often in a row, the same way
STUCK_TURNS = 3  # so many turns used tools and changed no file
STUCK_MS = 2 * 3_600_000  # a turn or an agent runs for longer
SECOND_DELIVERY_MS = 500  # a hook that is registered twice runs twice at the same time
LINK_MS = 60_000  # within this time the next session begins after /clear, resume or fork

_TARGET_KEYS = (
    "command",
    "file_path",
    "notebook_path",
    "path",
    "pattern",
    "url",
    "query",
    "subject",
    "description",
    "skill",
    "plan",
    "prompt",
    "name",
)


_Class = TypeVar("_Class", bound=type)


def with_slots(cls: _Class) -> _Class:
    """Make a dataclass over with __slots__, a fourth of the memory; dataclass does so from Python 3.10 on."""
    names = tuple(field.name for field in dataclasses.fields(cls))
    kept = {
        name: value for name, value in vars(cls).items() if name not in (*names, "__dict__", "__weakref__")
    }
    return type(cls)(cls.__name__, cls.__bases__, {**kept, "__slots__": names})


@with_slots
@dataclasses.dataclass(frozen=True)
class OpenCall:
    """A tool call without a result so far."""

    tool_use_id: str
    tool_name: str
    target: str
    agent_id: str  # MAIN for the main agent
    since: int
    description: str = ""  # of an Agent call: the label of the agent it starts

    @property
    def words(self) -> str:
        """Return the call as an activity."""
        return f"{self.tool_name}: {self.target}" if self.target else self.tool_name


@with_slots
@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a session waits, failed or ended."""

    kind: str  # permission, question, input, error, ended
    tool: str | None
    detail: str
    since: int
    agent_id: str = MAIN  # who waits
    tool_use_id: str | None = None  # the call that waits, where it is known: requests do not name theirs
    beside: frozenset[str] = frozenset()  # calls that run beside it: their results do not end the wait


class Tokens(NamedTuple):
    """Tokens that were used."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_creation: int = 0
    cache_creation_1h: int = 0  # the part of cache_creation that is kept for an hour

    def __add__(self, other: Tokens) -> Tokens:  # type: ignore[override]
        return Tokens(*map(operator.add, tuple(self), tuple(other)))

    def __sub__(self, other: Tokens) -> Tokens:
        return Tokens(*map(operator.sub, tuple(self), tuple(other)))

    def to_json(self) -> JsonObject:
        """Return them as the API gives them."""
        return {
            "totalInput": self.input,
            "totalOutput": self.output,
            "totalCacheRead": self.cache_read,
            "totalCacheCreation": self.cache_creation,
        }


@dataclasses.dataclass(frozen=True)
class ModelUsage:
    """What a session used of one model."""

    all: Tokens
    long_prompts: Tokens  # the part that answered prompts beyond 100,000 tokens: some models cost more there


@dataclasses.dataclass(frozen=True)
class SessionUsage:
    """What a session used until `time`, by model."""

    time: int
    models: dict[str, ModelUsage]
    model: str | None = None  # that the main agent used last
    partial: bool = False  # its transcripts could not be read to their end yet

    @property
    def total(self) -> Tokens:
        """Return the sum over all models."""
        return sum((usage.all for usage in self.models.values()), Tokens())

    def to_json(self) -> JsonObject:
        """Return the totals as the API gives them."""
        return {**self.total.to_json(), **({"partial": True} if self.partial else {})}


class Streak(NamedTuple):
    """Failures of one tool, in a row and the same way."""

    error: str
    times: int
    since: int


@with_slots
@dataclasses.dataclass
class Agent:
    """A subagent of a session."""

    agent_id: str
    agent_type: str
    start: int
    label: str = ""
    parent_id: str = MAIN
    background: bool = False  # it outlives the turn that launched it
    is_told: bool = False  # label and parent come from the client's own note on it
    end: int | None = None
    events: int = 0
    tool_calls: int = 0
    tool_errors: int = 0


TEST_SESSION_ID = "contextuate-test"  # of `test-event`, `doctor` and the page's button


@with_slots
@dataclasses.dataclass
class Session:
    """What is known of one session; times in milliseconds of the emitting machine's clock."""

    session_id: str
    machine_id: str
    directory: str
    start: int
    last_event: int
    state_since: int
    state: str = "idle"
    user_label: str = ""
    title: str = ""
    first_prompt: str = ""
    last_prompt: tuple[int, str, str] | None = None  # (timestamp, prompt id, its beginning)
    model: str | None = None
    usage: SessionUsage | None = None
    agent_usage: dict[str, tuple[int, Tokens]] = dataclasses.field(
        default_factory=dict
    )  # agent id → (timestamp, tokens)
    start_source: str = ""  # of its last SessionStart
    source_time: int = 0
    turn: str = "idle"
    turn_since: int = 0  # timestamp of the event that set the turn
    last_step: dict[str, int] = dataclasses.field(
        default_factory=dict
    )  # agent id → timestamp of the last event that moved it
    background: list[str] = dataclasses.field(default_factory=list)  # what runs on after the turn, in words
    failure: Reason | None = None
    streaks: dict[tuple[str, str], Streak] = dataclasses.field(
        default_factory=dict
    )  # (agent id, tool) → its last failures
    clock: int = 0  # the time it is on its machine, as far as known
    turn_start: int = 0  # when the running turn began
    turn_calls: int = 0  # tools used since then
    turn_changed: bool = False  # a file was changed since then
    unchanged_turns: int = 0  # the last turns in a row that used tools and changed no file
    unchanged_since: int = 0  # when the first of them began
    end: int | None = None
    end_reason: str = ""
    end_presumed: bool = False  # nobody said that it ended: its next event shows that it lives
    waits: list[Reason] = dataclasses.field(default_factory=list)
    agents: dict[str, Agent] = dataclasses.field(default_factory=dict)
    launched: dict[str, tuple[str, str, bool]] = dataclasses.field(
        default_factory=dict
    )  # agent id → (label, parent, background), from launch results
    open_calls: dict[str, OpenCall] = dataclasses.field(default_factory=dict)  # by tool use id
    calls: dict[str, str] = dataclasses.field(
        default_factory=dict
    )  # tool use id → open, ok, failed, interrupted
    parent_id: str | None = None
    parent_by_user: bool = False
    continued_from: str | None = None
    events: int = 0
    tool_calls: int = 0
    tool_errors: int = 0
    interrupted: int = 0
    prompts: int = 0
    pid: int | None = None
    demo: bool = False
    imported: bool = False  # some of its history came by `import`
    pinned: bool = False
    hidden: bool = False

    def clone(self) -> Session:
        """Return a copy that shares nothing that changes."""
        return dataclasses.replace(
            self,
            background=list(self.background),
            waits=list(self.waits),
            agents={agent_id: dataclasses.replace(agent) for agent_id, agent in self.agents.items()},
            launched=dict(self.launched),
            agent_usage=dict(self.agent_usage),
            streaks=dict(self.streaks),
            last_step=dict(self.last_step),
            open_calls=dict(self.open_calls),
            calls=dict(self.calls),
        )

    @property
    def label(self) -> tuple[str, str]:
        """Return (label, where it comes from): the user, the title, the first prompt or the project."""
        if self.user_label:
            return self.user_label, "user"
        if self.title:
            return self.title, "title"
        if self.first_prompt:
            return self.first_prompt, "prompt"
        if self.session_id == TEST_SESSION_ID:
            return "Test events", "title"
        return os.path.basename(self.directory.rstrip("/")) or self.session_id[:8], "project"

    @property
    def reason(self) -> Reason | None:
        """Return why the session is in its state, where that needs saying; of several waits the first."""
        if self.state == "ended":
            return Reason("ended", None, self.end_reason, self.end or self.last_event)
        if self.state == "waiting":
            return min(self.waits, key=lambda wait: (wait.kind == "input", wait.since))
        return self.failure if self.state == "failed" else None

    @property
    def is_running(self) -> bool:
        """Tell whether a turn, an agent or a background task runs."""
        return (
            self.turn == "working"
            or bool(self.background)
            or any(agent.end is None for agent in self.agents.values())
        )

    @property
    def activity(self) -> str:
        """Return what it does right now: its newest open call, else what runs in the background."""
        if self.open_calls:
            return next(reversed(list(self.open_calls.values()))).words
        return f"background: {self.background[0]}" if self.background else ""


# Words and targets


def effective_type(event: JsonObject) -> str:
    """Return our category of an event: by its hook where it has one (other emitters name types otherwise)."""
    return emit_event.EVENT_TYPES.get(event["hookType"]) or str(event["eventType"])


def received_time(event: JsonObject) -> int:
    """Return when an event arrived, on this machine's clock."""
    return int(event["received"]) if "received" in event else int(event["timestamp"])


def one_line(text: str, limit: int = 160) -> str:
    """Return the beginning of a text as one line."""
    line = " ".join(text[: limit * 4].split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def text_of(value: Any) -> str:
    """Return a JSON value as text for one line."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def tool_target(tool_input: Any, directory: str = "") -> str:
    """Return what a tool works on, in one line; paths below `directory` are shortened."""
    if not isinstance(tool_input, dict):
        return one_line(text_of(tool_input))
    questions = tool_input.get("questions")
    if isinstance(questions, list) and questions and isinstance(questions[0], dict):
        return one_line(text_of(questions[0].get("question")))
    if isinstance(tool_input.get("todos"), list):
        return f"{len(tool_input['todos'])} items"
    if tool_input.get("taskId") not in (None, ""):
        status = text_of(tool_input.get("status"))
        return one_line(f"task {text_of(tool_input['taskId'])}" + (f": {status}" if status else ""))
    for key in _TARGET_KEYS:
        value = tool_input.get(key)
        if value not in (None, ""):
            text = text_of(value)
            if directory and text.startswith(directory.rstrip("/") + "/"):
                text = text[len(directory.rstrip("/")) + 1 :]
            return one_line(text)
    # Tools of MCP servers name their input as they like.
    named = [(name, text_of(value)[:400]) for name, value in itertools.islice(tool_input.items(), 10)]
    if len(named) == 1:
        return one_line(named[0][1])
    return one_line(", ".join(f"{name}: {value}" for name, value in named if value))


def task_notification(event: JsonObject) -> str | None:
    """Return the id of the background task whose end a UserPromptSubmit tells, None for a person's prompt.

    The client tells itself so; "" when it names none.
    """
    words = text_of(event["data"].get("message")).lstrip()
    if not words.startswith("<task-notification>"):
        return None
    match = re.search(r"<task-id>\s*([^<\s]+)\s*</task-id>", words[:2000])
    return match.group(1) if match else ""


# One session, one event


def apply_event(session: Session, event: JsonObject, kind: str, quiet_ms: int, late: bool = False) -> None:
    """Tell a session one event, in the order in which things happened.

    A `late` one happened long before what the session knows already. Where its own agent went on since, it is
    counted, its calls and agents are paired, but it moves neither the turn nor a wait.
    """
    agent_id = event.get("agentId", MAIN)
    late = late and event["timestamp"] < session.last_step.get(agent_id, 0)
    if kind in TURN_AFTER or kind == "subagent_stop":
        session.last_step[agent_id] = max(event["timestamp"], session.last_step.get(agent_id, 0))
    quiet_before = event["timestamp"] - session.last_event >= quiet_ms
    session.events += 1
    session.last_event = max(session.last_event, event["timestamp"])
    session.clock = max(session.clock, event["timestamp"])
    if session.end_presumed and not late:
        session.turn, session.end, session.end_reason, session.end_presumed = "idle", None, "", False
    _learn(session, event, kind)
    _apply_agent(session, event, kind)
    closed = _apply_calls(session, event, kind)
    if not late:
        _end_waits(session, event, kind, closed)
        _apply_turn(session, event, kind)
    if not late or _asks_for_open_call(session, event, kind):
        _begin_wait(session, event, kind)
    _derive(session, event["timestamp"], quiet_before)


def _derive(session: Session, time_ms: int, restart: bool = False) -> None:
    """Set the state from its parts, and since when; `restart`: it was quiet until now."""
    state = next(state for state, _, holds in STATES if holds(session))
    if state != session.state or (restart and state == "working"):
        session.state, session.state_since = state, time_ms


def _is_persons_prompt(event: JsonObject, kind: str) -> bool:
    return kind == "user_prompt" and task_notification(event) is None


def _begins_process(event: JsonObject, kind: str) -> bool:
    """Tell whether a client's process begins with this event; compaction starts a session anew within one."""
    return kind == "session_start" and event["data"].get("source") != "compact"


def _learn(session: Session, event: JsonObject, kind: str) -> None:
    """Take over what an event says about the session as such."""
    data = event["data"]
    by_main = "agentId" not in event
    session.demo = session.demo or event.get("demo") is True
    session.imported = session.imported or event.get("imported") is True
    session.pid = event.get("pid", session.pid)
    session.start = min(session.start, event["timestamp"])
    if not session.directory or (kind == "session_start" and by_main):
        session.directory = event["workingDirectory"] or session.directory
    if not session.parent_by_user and event.get("parentSessionId") not in (None, session.session_id):
        session.parent_id = session.parent_id or event["parentSessionId"]
    if isinstance(data.get("session_title"), str) and data["session_title"].strip():
        session.title = one_line(data["session_title"])
    model = data.get("to_model") if event["hookType"] == "PostModelSwitch" else data.get("model")
    if isinstance(model, str) and model and by_main:
        session.model = model
    if isinstance(data.get("usage"), dict):
        _learn_usage(session, data["usage"], event["timestamp"])
    if _is_persons_prompt(event, kind):
        session.prompts += not _is_second_delivery(session, event)
        session.first_prompt = session.first_prompt or one_line(text_of(data.get("message")), 80)
    if _begins_process(event, kind):
        session.start_source, session.source_time = text_of(data.get("source")), event["timestamp"]


def _is_second_delivery(session: Session, event: JsonObject) -> bool:
    """Tell whether a prompt is the last one again: a plugin's hook delivers what that of the settings did."""
    data = event["data"]
    prompt_id = text_of(data.get("prompt_id"))
    before, session.last_prompt = (
        session.last_prompt,
        (event["timestamp"], prompt_id, text_of(data.get("message"))[:200]),
    )
    within_ms = TOGETHER_MS if prompt_id else SECOND_DELIVERY_MS
    return (
        before is not None
        and before[1:] == session.last_prompt[1:]
        and event["timestamp"] - before[0] <= within_ms
    )


# Tokens and cost

MODELS_LIMIT = 50  # what a foreign event says beyond these is not kept
AGENTS_LIMIT = 5000


def _learn_usage(session: Session, usage: JsonObject, time_ms: int) -> None:
    """Take the totals that the reader of the transcripts put on an event; the newest are the whole truth.

    What other programs call `usage` has another form and says nothing of a session's totals.
    """
    models, agents = usage.get("models"), usage.get("agents")
    if not isinstance(models, dict) or not isinstance(agents, dict):
        return
    model = usage.get("model")
    told = SessionUsage(
        time_ms,
        {
            text_of(name): _model_usage(counts)
            for name, counts in itertools.islice(models.items(), MODELS_LIMIT)
        },
        model if isinstance(model, str) else None,
        usage.get("partial") is True,
    )
    if session.usage is None or (time_ms, told.total) >= (session.usage.time, session.usage.total):
        session.usage = told
    for agent_id, by_model in itertools.islice(agents.items(), emit_event.AGENTS_IN_USAGE):
        if not isinstance(by_model, dict) or len(session.agent_usage) >= AGENTS_LIMIT:
            continue
        total = sum((_model_usage(counts).all for counts in by_model.values()), Tokens())
        session.agent_usage[agent_id] = max(
            (time_ms, total), session.agent_usage.get(agent_id, (0, Tokens()))
        )


def _model_usage(counts: Any) -> ModelUsage:
    over = counts.get("over100k") if isinstance(counts, dict) else None
    return ModelUsage(_tokens_of(counts), _tokens_of(over))


def _tokens_of(counts: Any) -> Tokens:
    if not isinstance(counts, dict):
        return Tokens()
    values = (counts.get(name) for name in emit_event.COUNT_NAMES)
    return Tokens(*(value if type(value) is int and 0 <= value < 1 << 53 else 0 for value in values))


class Price(NamedTuple):
    """USD for a million tokens."""

    input: float
    output: float
    cache_read: float
    cache_write_5m: float
    cache_write_1h: float

    def cost(self, used: Tokens) -> float:
        """Return what tokens cost, in USD."""
        for_an_hour = used.cache_creation_1h
        return (
            used.input * self.input
            + used.output * self.output
            + used.cache_read * self.cache_read
            + (used.cache_creation - for_an_hour) * self.cache_write_5m
            + for_an_hour * self.cache_write_1h
        ) / 1_000_000


# List prices of https://platform.claude.com/docs/en/about-claude/pricing, as of 2026-10-24. Fast mode, web
# searches, batches and regions are left out: what comes of it is an estimate. The configured `prices` win.
PRICES = {
    "fable-5-1": Price(10, 50, 0.25, 12.5, 20),
    "fable-5": Price(10, 50, 1, 12.5, 20),
    "mythos-5-1": Price(10, 50, 0.25, 12.5, 20),
    "mythos-5": Price(10, 50, 1, 12.5, 20),
    "opus-5-5": Price(4, 20, 0.2, 5, 8),
    "opus-5": Price(5, 25, 0.5, 6.25, 10),
    "opus-4-8": Price(5, 25, 0.5, 6.25, 10),
    "opus-4-7": Price(5, 25, 0.5, 6.25, 10),
    "opus-4-6": Price(5, 25, 0.5, 6.25, 10),
    "opus-4-5": Price(5, 25, 0.5, 6.25, 10),
    "opus-4-1": Price(15, 75, 1.5, 18.75, 30),
    "opus-4": Price(15, 75, 1.5, 18.75, 30),
    "opus-3": Price(15, 75, 1.5, 18.75, 30),
    "sonnet-5-5": Price(2, 10, 0.1, 2.5, 4),
    "sonnet-5": Price(2, 10, 0.2, 2.5, 4),
    "sonnet-4-6": Price(3, 15, 0.3, 3.75, 6),
    "sonnet-4-5": Price(3, 15, 0.3, 3.75, 6),
    "sonnet-4": Price(3, 15, 0.3, 3.75, 6),
    "sonnet-3-7": Price(3, 15, 0.3, 3.75, 6),
    "sonnet-3-5": Price(3, 15, 0.3, 3.75, 6),
    "sonnet-3": Price(3, 15, 0.3, 3.75, 6),
    "haiku-5-5": Price(0.1, 0.5, 0.01, 0.125, 0.2),
    "haiku-4-5": Price(1, 5, 0.1, 1.25, 2),
    "haiku-3-5": Price(0.8, 4, 0.08, 1, 1.6),
    "haiku-3": Price(0.25, 1.25, 0.03, 0.3, 0.5),
}
# The same for prompts beyond 100,000 tokens, where they differ.
LONG_PROMPT_PRICES = {"haiku-5-5": Price(0.5, 2.5, 0.05, 0.625, 1)}

_MODEL_KIND = r"(opus|sonnet|haiku|fable|mythos)"
_NEW_MODEL = re.compile(_MODEL_KIND + r"-(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)")  # claude-opus-4-5-20251101
_OLD_MODEL = re.compile(r"claude-(\d)(?:[-.](\d))?-" + _MODEL_KIND)  # claude-3-5-haiku-20241022


def model_family(model: str) -> str:
    """Return a model's family, such as "opus-4-5", whichever cloud names it; "" for one of no known kind."""
    new, old = _NEW_MODEL.search(model), _OLD_MODEL.search(model)
    if old:
        major, minor, kind = old.groups()
    elif new:
        kind, major, minor = new.groups()
    else:
        return ""
    return f"{kind}-{major}" if minor in (None, "0") else f"{kind}-{major}-{minor}"


class PriceList:
    """What models cost: our table, and before it the configuration's `prices`.

    Those are named by model, by family ("opus-4-5") or by kind ("opus").
    """

    def __init__(self, configured: dict[str, dict[str, float]] | None = None) -> None:
        self._own = {name: _configured_price(given) for name, given in (configured or {}).items()}

    def estimate(self, usage: SessionUsage) -> float | None:
        """Return what a session cost, in USD; None when a model is not known: half a sum would mislead."""
        costs = [self._cost(model, used) for model, used in usage.models.items()]
        known = [cost for cost in costs if cost is not None]
        return round(sum(known), 6) if len(known) == len(costs) else None

    def _cost(self, model: str, used: ModelUsage) -> float | None:
        family = model_family(model)
        for name in (model, family, family.partition("-")[0]):
            if name in self._own:
                return self._own[name].cost(used.all)
        if family not in PRICES:
            return 0.0 if used.all == Tokens() else None
        price = PRICES[family]
        long_price = LONG_PROMPT_PRICES.get(family, price)
        return price.cost(used.all - used.long_prompts) + long_price.cost(used.long_prompts)


def _configured_price(given: dict[str, float]) -> Price:
    """Return a price; what was left out follows from the price of input as it does for most models."""
    base = given["input"]
    return Price(
        base,
        given["output"],
        given.get("cacheRead", base * 0.1),
        given.get("cacheWrite5m", base * 1.25),
        given.get("cacheWrite1h", base * 2),
    )


# Agents


def _apply_agent(session: Session, event: JsonObject, kind: str) -> None:
    """Keep the subagents: known by `agent_id`, ended by their stop; a stop without a start makes no ghost."""
    if kind == "tool_result":
        _note_launch(session, event)
    agent_id = event.get("agentId")
    if agent_id is None:
        return
    agent = session.agents.get(agent_id)
    if agent is None:
        if kind == "subagent_stop":
            return
        agent = _new_agent(session, event)
    agent.events += 1
    agent.agent_type = event.get("agentType") or agent.agent_type
    _learn_origin(agent, event["data"])
    if kind == "subagent_stop":
        _end_agents(session, {agent_id}, event["timestamp"])
    elif session.turn != "ended" and kind in TURN_AFTER and event["timestamp"] > (agent.end or 0):
        agent.end = None  # a stopped agent may be sent on


def _new_agent(session: Session, event: JsonObject) -> Agent:
    agent = Agent(event["agentId"], event.get("agentType", ""), event["timestamp"])
    launches = [call for call in session.open_calls.values() if call.tool_name in AGENT_TOOLS]
    if agent.agent_id in session.launched:
        agent.label, agent.parent_id, agent.background = session.launched[agent.agent_id]
    elif len(launches) == 1 and launches[0].agent_id != agent.agent_id:
        agent.label, agent.parent_id = launches[0].description, launches[0].agent_id
    if session.turn == "ended" or _was_over(session, agent.agent_id, event["timestamp"]):
        agent.end = event["timestamp"]
    session.agents[agent.agent_id] = agent
    return agent


def _learn_origin(agent: Agent, data: JsonObject) -> None:
    """Take an agent's parent and label from the client's note on it, the only sure word on nested agents."""
    note = data.get("agentMeta")
    if not isinstance(note, dict):
        return
    parent_id = note.get("parentAgentId")
    agent.is_told = True
    agent.parent_id = parent_id if isinstance(parent_id, str) and parent_id != agent.agent_id else MAIN
    agent.background = agent.background or note.get("requestShape") == "background"
    agent.label = one_line(text_of(data.get("agentDescription"))) or agent.label


def _note_launch(session: Session, event: JsonObject) -> None:
    """Take an agent's label, parent and kind from the result of the call that launched it."""
    data = event["data"]
    output, tool_input = data.get("toolOutput"), data.get("toolInput")
    if not isinstance(output, dict) or data.get("toolName") not in AGENT_TOOLS:
        return
    agent_id = output.get("agentId")
    if not isinstance(agent_id, str) or agent_id == event.get("agentId"):
        return
    label = text_of(tool_input.get("description")) if isinstance(tool_input, dict) else ""
    background = output.get("status") == "async_launched"
    session.launched[agent_id] = (one_line(label), event.get("agentId", MAIN), background)
    agent = session.agents.get(agent_id)
    if agent is None:
        return
    if not agent.is_told:
        agent.label, agent.parent_id = one_line(label) or agent.label, event.get("agentId", MAIN)
    agent.background = background
    if output.get("status") == "completed":
        _end_agents(session, {agent_id}, event["timestamp"])


def _was_over(session: Session, agent_id: str, time_ms: int) -> bool:
    """Tell whether what an agent did at `time_ms` is known to be over: agent, turn or session ended since."""
    if session.turn == "ended" and not session.end_presumed:
        return time_ms <= (session.end or 0)
    if agent_id == MAIN:
        return session.turn != "working" and time_ms < session.turn_since
    agent = session.agents.get(agent_id)
    if agent is None:
        return time_ms < session.last_step.get(agent_id, 0)  # it stopped before it was heard of
    return agent.end is not None and time_ms <= agent.end


def _lineage(session: Session, agent: Agent) -> list[Agent]:
    """Return an agent and those above it, the nearest first."""
    line = [agent]
    while line[-1].parent_id in session.agents and session.agents[line[-1].parent_id] not in line:
        line.append(session.agents[line[-1].parent_id])
    return line


def _not_settled(session: Session) -> list[Agent]:
    """Return the agents that run, wait or have open calls, and those above them: ends concern no others."""
    busy = {call.agent_id for call in session.open_calls.values()}
    busy.update(wait.agent_id for wait in session.waits)
    found: dict[str, Agent] = {}
    for agent in session.agents.values():
        if agent.end is None or agent.agent_id in busy:
            found.update((above.agent_id, above) for above in _lineage(session, agent))
    return list(found.values())


def _end_agents(session: Session, agent_ids: set[str], time_ms: int) -> None:
    """End agents and everything below them, but for what began after `time_ms`.

    Their open calls are interrupted and nobody waits there any more.
    """
    gone = {
        agent.agent_id
        for agent in _not_settled(session)
        if agent.start <= time_ms and any(above.agent_id in agent_ids for above in _lineage(session, agent))
    }
    for agent_id in gone:
        agent = session.agents[agent_id]
        agent.end = time_ms if agent.end is None else agent.end
    session.streaks = {key: streak for key, streak in session.streaks.items() if key[0] not in gone}
    session.waits = [wait for wait in session.waits if wait.agent_id not in gone]
    _interrupt(session, gone, time_ms)


def _end_foreground(session: Session, time_ms: int) -> None:
    """End what cannot outlive the main agent's turn: its own calls, and agents that do not run in the
    background.
    """
    _interrupt(session, {MAIN}, time_ms)
    foreground = {
        agent.agent_id
        for agent in _not_settled(session)
        if not any(above.background for above in _lineage(session, agent))
    }
    _end_agents(session, foreground, time_ms)


# Calls


def _apply_calls(session: Session, event: JsonObject, kind: str) -> str | None:
    """Pair tool calls with what closes them; what nothing closed is interrupted, never running for ever.

    Returns the tool use id of the call that the event closed, if it closed one.
    """
    agent_id = event.get("agentId", MAIN)
    time_ms = event["timestamp"]
    closed = None
    if kind == "tool_call":
        _open_call(session, event, agent_id)
    elif kind in ("tool_result", "tool_error"):
        closed = _close_call(session, event, agent_id, "failed" if kind == "tool_error" else "ok")
    elif event["hookType"] == "PostToolBatch":
        _close_round(session, event, agent_id)
    elif kind == "permission_denied" and event["data"].get("toolUseId"):
        closed = _close_call(session, event, agent_id, "failed")  # it will not run
    elif kind == "session_end" or (kind == "session_start" and _begins_process(event, kind)):
        _interrupt(session, None, time_ms)
        _end_agents(session, set(session.agents), time_ms)
    elif kind == "user_prompt":
        _end_before_prompt(session, event)
    elif kind in ("turn_end", "turn_error") and agent_id == MAIN:
        _end_turn(session, event)
    elif kind in ("turn_end", "turn_error"):
        _interrupt(session, {agent_id}, time_ms)
    return closed


def _close_round(session: Session, event: JsonObject, agent_id: str) -> None:
    """Close the calls of a round: what only that closes never ran (unknown tool, bad input, a denial)."""
    for call in _batch_calls(event):
        call_id = call.get("tool_use_id")
        if isinstance(call_id, str) and _settle(session, call_id, agent_id, "failed"):
            error = text_of(call.get("tool_response"))
            _note_failure(session, agent_id, text_of(call.get("tool_name")), error, event["timestamp"])


def _end_before_prompt(session: Session, event: JsonObject) -> None:
    """End what a prompt shows to be over: all where Esc fired nothing, or the task that it tells of."""
    task = task_notification(event)
    if task is None:  # a person's: Esc and a rejected permission fire nothing
        _end_foreground(session, event["timestamp"])
    elif task in session.agents:
        _end_agents(session, {task}, event["timestamp"])


def _end_turn(session: Session, event: JsonObject) -> None:
    """End what the main agent's turn had running; the client's list of tasks is the truth about agents."""
    _end_foreground(session, event["timestamp"])
    tasks = event["data"].get("background_tasks")
    if isinstance(tasks, list):
        running = {text_of(task.get("id")) for task in tasks if isinstance(task, dict) and _is_running(task)}
        over = {
            agent.agent_id
            for agent in _not_settled(session)
            if not any(above.agent_id in running for above in _lineage(session, agent))
        }
        _end_agents(session, over, event["timestamp"])
    if not any(agent.end is None for agent in session.agents.values()):
        session.calls = dict.fromkeys(session.open_calls, "open")  # rounds of this turn are over
        session.launched = {}


def _open_call(session: Session, event: JsonObject, agent_id: str) -> None:
    data = event["data"]
    named = data.get("toolUseId")
    # Clients before 2.0.43 name no call: their events are paired by tool and agent, newest first.
    tool_use_id = named if isinstance(named, str) and named else f"unnamed:{event['id']}"
    if tool_use_id in session.calls:
        return  # its end is known already
    _count_call(session, tool_use_id, agent_id, "open")
    tool_input = data.get("toolInput")
    description = text_of(tool_input.get("description")) if isinstance(tool_input, dict) else ""
    if _was_over(session, agent_id, event["timestamp"]):
        session.calls[tool_use_id] = "interrupted"
        session.interrupted += 1
        return
    session.open_calls[tool_use_id] = OpenCall(
        tool_use_id,
        text_of(data.get("toolName")) or "?",
        tool_target(tool_input, session.directory),
        agent_id,
        event["timestamp"],
        one_line(description),
    )


def _count_call(session: Session, tool_use_id: str, agent_id: str, outcome: str) -> None:
    session.calls[tool_use_id] = outcome
    session.tool_calls += 1
    session.turn_calls += 1
    if agent_id in session.agents:
        session.agents[agent_id].tool_calls += 1


def _close_call(session: Session, event: JsonObject, agent_id: str, outcome: str) -> str | None:
    """Close the call that a result belongs to; return its id, None when it is not known."""
    data, tool = event["data"], text_of(event["data"].get("toolName"))
    named = data.get("toolUseId")
    tool_use_id = named if isinstance(named, str) and named else _newest_call(session, agent_id, tool)
    if tool_use_id is None:
        session.tool_errors += outcome == "failed"
    elif not _settle(session, tool_use_id, agent_id, outcome):
        return tool_use_id
    if outcome == "failed":
        error = text_of(data.get("error") or data.get("reason"))
        if data.get("is_interrupt") is not True:
            _note_failure(session, agent_id, tool, error, event["timestamp"])
    else:
        _note_success(session, agent_id, tool, data.get("toolInput"))
    return tool_use_id


def _newest_call(session: Session, agent_id: str, tool: str) -> str | None:
    same = [
        call.tool_use_id
        for call in session.open_calls.values()
        if (call.tool_name, call.agent_id) == (tool, agent_id)
    ]
    return same[-1] if same else None


def _settle(session: Session, tool_use_id: str, agent_id: str, outcome: str) -> bool:
    """Record how a call ended, once: its own result says more than its round, an interruption least.

    Returns whether that was news.
    """
    before = session.calls.get(tool_use_id)
    if before in ("ok", "failed"):
        return False
    if before is None:
        _count_call(session, tool_use_id, agent_id, outcome)
    elif before == "interrupted":
        session.interrupted -= 1  # it was only late
    session.calls[tool_use_id] = outcome
    session.open_calls.pop(tool_use_id, None)
    if outcome == "failed":
        session.tool_errors += 1
        if agent_id in session.agents:
            session.agents[agent_id].tool_errors += 1
    return True


def _interrupt(session: Session, agent_ids: set[str] | None, time_ms: int) -> None:
    """Close the open calls of some agents (None: of all) that nothing else will close, begun by `time_ms`."""
    for call in list(session.open_calls.values()):
        if call.since <= time_ms and (agent_ids is None or call.agent_id in agent_ids):
            del session.open_calls[call.tool_use_id]
            session.calls[call.tool_use_id] = "interrupted"
            session.interrupted += 1


def _batch_calls(event: JsonObject) -> list[JsonObject]:
    calls = event["data"].get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _is_running(task: JsonObject) -> bool:
    return bool(task.get("status") == "running")


# Stuck


_EDITING_TOOLS = ("Edit", "MultiEdit", "NotebookEdit", "Write")
# A command that writes, as far as one can tell by its look; what tests and reads files does not.
_EDITING_COMMAND = re.compile(
    r"(?<![<>&\d=-])>>?(?!\s*(?:/dev/|[&>]))|\bsed\s+-\w*i"
    r"|(?:^|[;&|(]\s*|\bsudo\s+)(?:tee|mv|cp|rm|mkdir|touch|patch|ln|install|unzip|tar\s+-?x)\s"
    r"|\bgit\s+(?:apply|am|add|commit|checkout|switch|merge|rebase|cherry-pick|restore|revert|reset|stash|mv|rm|pull|clone)\b"
)
_EDITING_SERVER_TOOL = re.compile(
    r"write|edit|create|update|insert|replace|delete|move|rename|apply|patch", re.I
)
_STREAKS_LIMIT = 64


def _note_failure(session: Session, agent_id: str, tool: str, error: str, time_ms: int) -> None:
    """Count failures of a tool that are the same and in a row; other tools may run in between."""
    words = one_line(error)
    before = session.streaks.pop((agent_id, tool), None)
    if before is not None and before.error == words:
        session.streaks[agent_id, tool] = before._replace(times=before.times + 1)
        return
    if len(session.streaks) >= _STREAKS_LIMIT:
        del session.streaks[next(iter(session.streaks))]
    session.streaks[agent_id, tool] = Streak(words, 1, time_ms)


def _note_success(session: Session, agent_id: str, tool: str, tool_input: Any) -> None:
    session.streaks.pop((agent_id, tool), None)
    if tool == "Bash":
        command = text_of(tool_input.get("command")) if isinstance(tool_input, dict) else ""
        changes = _EDITING_COMMAND.search(command[:10_000]) is not None
    elif tool.startswith("mcp__"):
        changes = _EDITING_SERVER_TOOL.search(tool.rpartition("__")[2]) is not None
    else:
        changes = tool in _EDITING_TOOLS
    if changes:
        session.turn_changed, session.unchanged_turns = True, 0


def _begin_turn(session: Session, time_ms: int) -> None:
    _finish_turn(session)  # one that Esc ended has told nobody so far
    session.turn_start = time_ms


def _finish_turn(session: Session) -> None:
    """Count the turn that is over if it used tools and changed nothing."""
    if session.turn_calls and not session.turn_changed:
        session.unchanged_since = session.unchanged_since if session.unchanged_turns else session.turn_start
        session.unchanged_turns += 1
    session.turn_calls, session.turn_changed = 0, False


def _busy_since(session: Session) -> int | None:
    """Return since when a turn or an agent runs without an end, None when none does."""
    starts = [agent.start for agent in session.agents.values() if agent.end is None]
    if session.turn == "working":
        starts.append(session.turn_start)
    return min(starts) if starts and session.state in ("working", "quiet") else None


def _runs_too_long(session: Session) -> bool:
    busy_since = _busy_since(session)
    return busy_since is not None and session.clock - busy_since >= STUCK_MS


def stuck_signals(session: Session) -> list[JsonObject]:
    """Return what makes one think that a session goes in circles: signs, no verdict."""
    if session.state == "ended":
        return []
    signals = [
        {
            "kind": "failing",
            "since": streak.since,
            "detail": f"{tool} failed {streak.times} times the same way: {streak.error}",
        }
        for (_, tool), streak in session.streaks.items()
        if streak.times >= STUCK_FAILURES
    ]
    if session.unchanged_turns >= STUCK_TURNS:
        words = f"{session.unchanged_turns} turns without a change in files"
        signals.append({"kind": "unchanged", "since": session.unchanged_since, "detail": words})
    if _runs_too_long(session):
        words = f"busy for more than {STUCK_MS // 3_600_000} hours without an end"
        signals.append({"kind": "long", "since": _busy_since(session), "detail": words})
    return signals


# Waits


def _end_waits(session: Session, event: JsonObject, kind: str, closed: str | None) -> None:
    """End the waits that an event shows to be over."""
    if kind == "session_end" or _begins_process(event, kind) or _is_persons_prompt(event, kind):
        session.waits = []
        return
    session.waits = [wait for wait in session.waits if not _ends_wait(session, wait, event, kind, closed)]
    if kind == "tool_call" and isinstance(event["data"].get("toolUseId"), str):
        session.waits = [_beside_call(session, wait, event) for wait in session.waits]


def _beside_call(session: Session, wait: Reason, event: JsonObject) -> Reason:
    """Return a wait that knows of another call of its round, which began after the request and may end."""
    data = event["data"]
    its = (text_of(data.get("toolName")), tool_target(data.get("toolInput"), session.directory))
    if wait.agent_id != event.get("agentId", MAIN) or its == (wait.tool, wait.detail):
        return wait
    return dataclasses.replace(wait, beside=wait.beside | {data["toolUseId"]})


def _ends_wait(session: Session, wait: Reason, event: JsonObject, kind: str, closed: str | None) -> bool:
    """Tell whether an event ends one wait: progress of the same agent, or the tool's run, whoever says so."""
    data = event["data"]
    same_agent = wait.agent_id == event.get("agentId", MAIN)
    tool, target = text_of(data.get("toolName")), tool_target(data.get("toolInput"), session.directory)
    is_its_call = wait.kind != "input" and (wait.tool, wait.detail) == (tool, target)
    if kind in ("tool_result", "tool_error"):
        if is_its_call:
            return closed is None or closed not in wait.beside
        return same_agent and (wait.kind == "input" or closed not in wait.beside)
    if not same_agent:
        return False
    if kind == "permission_denied":
        return is_its_call or not tool or wait.kind == "input"
    if kind == "tool_call":
        # Calls of one round begin together, so only a later one shows that this one is decided.
        return wait.kind == "input" or event["timestamp"] - wait.since > TOGETHER_MS
    if kind == "elicitation_result":
        server = text_of(data.get("mcp_server_name"))
        return wait.kind == "input" or (
            wait.kind == "question" and (not server or wait.tool in (None, server))
        )
    if kind in ("permission_request", "elicitation", "user_prompt"):
        return wait.kind == "input"
    return kind in ("turn_end", "turn_error") or event["hookType"] == "PostToolBatch"


def _begin_wait(session: Session, event: JsonObject, kind: str) -> None:
    reason = _wait_reason(session, event, kind)
    if reason is None or session.turn == "ended":
        return
    if reason.kind == "input":
        # The client sits at its prompt: Esc or a rejection came before and fired nothing.
        _end_foreground(session, event["timestamp"])
        session.waits = [wait for wait in session.waits if wait.agent_id != MAIN]
        session.turn = "idle" if session.turn == "working" else session.turn
    elif kind == "notification" and any(wait.kind != "input" for wait in session.waits):
        return  # it repeats what the request itself has said, without saying which agent
    elif any((w.agent_id, w.kind, w.tool, w.detail, w.tool_use_id) == (
        reason.agent_id, reason.kind, reason.tool, reason.detail, reason.tool_use_id
    ) for w in session.waits):  # fmt: skip
        return  # a question's call and its request are one
    session.waits.append(reason)


def _asks_for_open_call(session: Session, event: JsonObject, kind: str) -> bool:
    """Tell whether a permission is asked for a call that still runs: such a request counts however late."""
    return kind == "permission_request" and any(
        (call.tool_name, call.agent_id) == (event["data"].get("toolName"), event.get("agentId", MAIN))
        and call.target == tool_target(event["data"].get("toolInput"), session.directory)
        and call.since <= event["timestamp"]
        for call in session.open_calls.values()
    )


def _wait_reason(session: Session, event: JsonObject, kind: str) -> Reason | None:
    """Return why a person is needed after this event, None when nobody is."""
    data = event["data"]
    agent_id = event.get("agentId", MAIN)
    tool = text_of(data.get("toolName")) or None
    if kind == "permission_request" or (kind == "tool_call" and tool in QUESTION_TOOLS):
        target = tool_target(data.get("toolInput"), session.directory)
        what = "question" if tool in QUESTION_TOOLS else "permission"
        return _wait_for_call(session, event, what, tool, target, agent_id)
    if kind == "elicitation":
        server = text_of(data.get("mcp_server_name")) or None
        words = one_line(text_of(data.get("message")))
        return Reason(
            "question", server, words, event["timestamp"], agent_id, None, frozenset(session.open_calls)
        )
    return _notified_reason(session, event) if kind == "notification" else None


def _wait_for_call(
    session: Session, event: JsonObject, what: str, tool: str | None, target: str, agent_id: str
) -> Reason:
    """Return a wait for the call that a request is about: the first open one of the same tool and target."""
    taken = {wait.tool_use_id for wait in session.waits if (wait.tool, wait.detail) != (tool, target)}
    call_id = next(
        (
            call.tool_use_id
            for call in session.open_calls.values()
            if (call.tool_name, call.target) == (tool, target) and call.tool_use_id not in taken
        ),
        None,
    )
    beside = frozenset(session.open_calls) - {call_id}
    return Reason(what, tool, target, event["timestamp"], agent_id, call_id, frozenset(beside))


def _notified_reason(session: Session, event: JsonObject) -> Reason | None:
    """Return what a notification asks a person for; old clients give it no type, only words."""
    words = one_line(text_of(event["data"].get("message")))
    about = event["data"].get("notificationType")
    if about == "permission_prompt" or (about is None and "needs your permission" in words):
        calls = list(session.open_calls.values())
        named = re.search(r"permission to use (\S+)", words)
        candidates = [call for call in calls if named and call.tool_name == named.group(1)]
        candidates = candidates or [call for call in calls if call.agent_id == MAIN] or calls
        if not candidates:
            return Reason("permission", None, words, event["timestamp"])
        call = candidates[-1]
        return _wait_for_call(session, event, "permission", call.tool_name, call.target, call.agent_id)
    if about == "idle_prompt" or (about is None and "waiting for your input" in words):
        return Reason("input", None, words, event["timestamp"])
    if about == "elicitation_dialog":
        return Reason("question", None, words, event["timestamp"])
    return None


# Turns


def _has_just_ended(session: Session, time_ms: int) -> bool:
    """Tell whether the client said a moment ago that the session is over."""
    ended = session.turn == "ended" and not session.end_presumed
    return ended and time_ms - (session.end or 0) <= TOGETHER_MS


def _apply_turn(session: Session, event: JsonObject, kind: str) -> None:
    turn = TURN_AFTER.get(kind)
    data = event["data"]
    if turn is None or "agentId" in event or (turn == "idle" and not _ends_or_begins(event, kind)):
        return  # a subagent's events do not move the main agent's turn, nor does compaction
    begins = kind == "session_start" or _is_persons_prompt(event, kind)
    if _has_just_ended(session, event["timestamp"]) and turn != "ended" and not begins:
        return  # it was overtaken by the word that all is over
    if turn == "working" and (session.turn != "working" or _is_persons_prompt(event, kind)):
        _begin_turn(session, event["timestamp"])
    elif kind in ("turn_end", "turn_error"):
        _finish_turn(session)
    if turn == "ended" or _begins_process(event, kind) or _is_persons_prompt(event, kind):
        session.streaks = {}  # a person is there, or nobody
    session.turn, session.turn_since = turn, event["timestamp"]
    session.background = []
    if turn == "ended":
        end_session(session, event["timestamp"], text_of(data.get("reason")) or "ended", presumed=False)
        return
    session.end, session.end_reason, session.failure = None, "", None
    if kind == "turn_end":
        session.background = _running_background(event)
    elif kind == "turn_error":
        words = one_line(text_of(data.get("assistantResponse")) or text_of(data.get("error_details")))
        error = text_of(data.get("error")) or "error"
        session.failure = Reason("error", None, f"{error}: {words}" if words else error, event["timestamp"])


def _ends_or_begins(event: JsonObject, kind: str) -> bool:
    return kind == "turn_end" or _begins_process(event, kind)


def _running_background(event: JsonObject) -> list[str]:
    """Return what runs on in the background after a turn, in words."""
    tasks = event["data"].get("background_tasks")
    if not isinstance(tasks, list):
        return []
    running = [task for task in tasks if isinstance(task, dict) and _is_running(task)]
    return [
        one_line(text_of(task.get("description") or task.get("command") or task.get("id")))
        for task in running
    ]


def end_session(session: Session, time_ms: int, why: str, presumed: bool) -> None:
    """End a session and everything in it; `presumed` when nobody said so."""
    session.turn, session.end, session.end_reason, session.end_presumed = "ended", time_ms, why, presumed
    session.waits, session.background = [], []
    _interrupt(session, None, max(time_ms, session.last_event))
    _end_agents(session, set(session.agents), max(time_ms, session.last_event))


# All sessions


@with_slots
@dataclasses.dataclass
class Track:
    """What puts a session's events in order: as it was some seconds ago, and what happened since."""

    base: Session
    recent: list[tuple[int, int, JsonObject, str]] = dataclasses.field(
        default_factory=list
    )  # timestamp, number, …


@dataclasses.dataclass
class ClockSkew:
    """How far a machine's clock is behind ours: the least difference between arrival and timestamp lately.

    What the network and a busy machine add only makes the difference larger. Lately: in the last two windows
    in which something arrived. The order of arrival stands in the numbers (seq), so what several replays
    know of one machine can be put together.
    """

    WINDOW_MS = 300_000

    windows: dict[int, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )  # window → (its last number, least difference)
    since_seq: int = 0  # when the clock was last set back, as far as its events show

    def add(self, difference_ms: int, arrived_ms: int, seq: int) -> None:
        """Take one event into account."""
        self._note(arrived_ms // self.WINDOW_MS, seq, difference_ms)

    def begin_anew(self, seq: int) -> None:
        """Forget what came before this number: the clock was set since."""
        self.since_seq = max(seq, self.since_seq)
        self.windows = {number: about for number, about in self.windows.items() if about[0] >= self.since_seq}

    def shift(self, step_ms: int) -> None:
        """Go on after our own clock was set forward by so much."""
        self.windows = {number: (seq, least + step_ms) for number, (seq, least) in self.windows.items()}

    def merge(self, other: ClockSkew) -> None:
        """Take over what another replay knows of the same machine."""
        for number, (seq, least) in other.windows.items():
            self._note(number, seq, least)
        self.begin_anew(other.since_seq)

    @property
    def value_ms(self) -> int | None:
        """Return the skew in ms; None before the first event."""
        return min((least for _, least in self.windows.values()), default=None)

    def _note(self, window: int, seq: int, least: int) -> None:
        known = self.windows.get(window, (seq, least))
        self.windows[window] = max(seq, known[0]), min(least, known[1])
        if len(self.windows) > 2:
            del self.windows[min(self.windows, key=lambda number: self.windows[number][0])]


class SessionBook:
    """All sessions, kept up to date by `apply` and `tick`.

    Hooks run in parallel, so events overtake each other. Those of the last seconds are kept; one that comes
    too late for its place is put there, and what followed is told anew. `quiet_ms` and `ended_ms` are how
    long a working session may say nothing before it is quiet, and a machine before its sessions have ended.
    """

    def __init__(
        self,
        quiet_ms: int = 120_000,
        ended_ms: int = 12 * 3_600_000,
        own_machine: str = "",
        prices: PriceList | None = None,
    ) -> None:
        self.sessions: dict[str, Session] = {}
        self.patience = (quiet_ms, ended_ms, own_machine)  # what makes another book like this one
        self._tracks: dict[str, Track] = {}
        self._quiet_ms = quiet_ms
        self._ended_ms = ended_ms
        self._own_machine = own_machine
        self._prices = prices or PriceList()
        self._skews: dict[str, ClockSkew] = {}  # of other machines
        self._set_forward_ms: dict[
            str, int
        ] = {}  # session of ours → steps of our clock since its latest event
        self._heard_ms: dict[str, int] = {}  # machine → timestamp of its latest event
        self._received_ms: dict[str, int] = {}  # session id → when its latest event arrived
        self._numbers = itertools.count()
        # Sorted (time, session id): who made way for another session, and who began after such a one.
        self._ends: list[tuple[int, str]] = []
        self._starts: list[tuple[int, str]] = []
        self._continued_by: dict[str, str] = {}
        self._linked: set[str] = set()  # ids of sessions that changed because of another one
        self.complete = True  # False while stored sessions are still to come: no machine's silence is known

    # What happens

    def apply(self, event: JsonObject) -> Session:
        """Take one event into account; return its session."""
        machine, timestamp = event["machineId"], event["timestamp"]
        session_id, kind = event["sessionId"], effective_type(event)
        if session_id not in self.sessions:
            self.sessions[session_id] = Session(
                session_id, machine, event["workingDirectory"], timestamp, timestamp, timestamp
            )
        parent_before = self.sessions[session_id].parent_id
        if kind == "session_meta":
            for session in self._versions(session_id):
                _apply_user_action(session, event["data"])
                if isinstance(event["data"].get("usage"), dict):  # counted later than the event it belongs to
                    _learn_usage(session, event["data"]["usage"], timestamp)
        else:
            self._apply_hook(event, kind)
        session = self.sessions[session_id]
        if session.parent_id != parent_before and session_id in self.lineage(session.parent_id):
            for version in self._versions(session_id):
                version.parent_id = parent_before
        if session.parent_id != parent_before:
            self._linked.update(parent for parent in (parent_before, session.parent_id) if parent)
        return session

    def lineage(self, session_id: str | None) -> Iterator[str]:
        """Yield a session's id and those of its parents, the nearest first, each once even in a ring."""
        return self._chain(session_id, "parent_id")

    def _chain(self, session_id: str | None, link: str) -> Iterator[str]:
        seen: set[str] = set()
        while session_id and session_id not in seen:
            seen.add(session_id)
            yield session_id
            session_id = getattr(self.sessions.get(session_id), link, None)

    def _went_on_as(self, session: Session, later: Session) -> bool:
        """Tell whether one session, by way of others, continues another."""
        return session.session_id in self._chain(later.continued_from, "continued_from")

    def linked_changes(self) -> list[Session]:
        """Return, once, the sessions that changed because of another one: its parents, those it continues."""
        linked, self._linked = self._linked, set()
        return [self.sessions[session_id] for session_id in linked if session_id in self.sessions]

    def _apply_hook(self, event: JsonObject, kind: str) -> None:
        machine, timestamp, session_id = event["machineId"], event["timestamp"], event["sessionId"]
        arrived_ms = received_time(event)
        self._follow_its_clock(event, arrived_ms)
        if arrived_ms < self._received_ms.get(session_id, 0) - CLOCK_STEP_MS:
            self._set_clock_back(session_id, timestamp)
        self._received_ms[session_id] = arrived_ms
        self._set_forward_ms.pop(session_id, None)
        self._heard_ms[machine] = max(self._heard_ms.get(machine, 0), timestamp)
        self._follow_to_machine(event, kind)
        self._tell(session_id, event, kind)
        self._link(self.sessions[session_id], kind)

    def _follow_its_clock(self, event: JsonObject, arrived_ms: int) -> None:
        """Measure another machine's clock, and see when it was set back.

        Its events come in the order in which they happened, but for those that a spool kept and for imported
        ones; without this rule all it says would count as late until its clock is where it was before.
        """
        machine, timestamp, seq = event["machineId"], event["timestamp"], int(event.get("seq", 0))
        if machine == self._own_machine or event.get("spooled") or event.get("imported"):
            return
        skew = self._skews.setdefault(machine, ClockSkew())
        if timestamp < self._latest_ms(event["sessionId"]) - OVERTAKEN_MS:
            skew.begin_anew(seq)
            self._set_clock_back(event["sessionId"], timestamp)
        skew.add(arrived_ms - timestamp, arrived_ms, seq)

    def _follow_to_machine(self, event: JsonObject, kind: str) -> None:
        """Go on with a session on the machine where it is resumed: its pid and its clock are that one's."""
        session = self.sessions[event["sessionId"]]
        if event["machineId"] == session.machine_id or event.get("imported") or "agentId" in event:
            return
        if not _begins_process(event, kind) and event["timestamp"] < self._latest_ms(session.session_id):
            return  # from before it moved
        self._set_clock_back(session.session_id, event["timestamp"])
        for version in self._versions(session.session_id):
            version.machine_id, version.pid = event["machineId"], None

    def _latest_ms(self, session_id: str) -> int:
        """Return the timestamp of a session's latest event."""
        track = self._tracks.get(session_id)
        if track is None:
            return self.sessions[session_id].last_event
        return track.recent[-1][0] if track.recent else track.base.last_event

    def clock_was_set(self, step_ms: int) -> None:
        """Go on after our own clock was set forward (below 0: back); what came since is told after this.

        Nobody was silent for that time. After a step back `tick` and the next events see to our own sessions:
        nothing may begin in the future.
        """
        for skew in self._skews.values():
            skew.shift(step_ms)
        self._heard_ms[self._own_machine] = self._heard_ms.get(self._own_machine, 0) + step_ms
        for session in self.sessions.values():
            if session.machine_id == self._own_machine:
                forward_ms = self._set_forward_ms.get(session.session_id, 0) + step_ms
                self._set_forward_ms[session.session_id] = max(0, forward_ms)

    def _tell(self, session_id: str, event: JsonObject, kind: str) -> None:
        """Tell a session an event at its place among those of the last seconds."""
        timestamp = event["timestamp"]
        session = self.sessions[session_id]
        track = self._tracks.get(session_id)
        if track is None:
            track = self._tracks[session_id] = Track(session.clone())
        entry = (timestamp, next(self._numbers), event, kind)
        if timestamp < track.base.last_event and track.base.events:
            for version in (track.base, self._up_to_date(session_id, track)):
                apply_event(version, event, kind, self._quiet_ms, late=True)
            return
        in_order = not track.recent or timestamp >= track.recent[-1][0]
        track.recent.append(entry)
        if in_order:
            self._go_on(session, event, kind)
        else:
            track.recent.sort(key=lambda entry: entry[:2])
            self._tell_anew(session_id, track)
        settled = track.recent[-1][0] - TOGETHER_MS
        while track.recent[0][0] < settled or len(track.recent) > TOGETHER_EVENTS:
            _, _, earlier, its_kind = track.recent.pop(0)
            apply_event(track.base, earlier, its_kind, self._quiet_ms)

    def _go_on(self, session: Session, event: JsonObject, kind: str) -> None:
        apply_event(session, event, kind, self._quiet_ms)

    def _tell_anew(self, session_id: str, track: Track) -> None:
        session = self.sessions[session_id] = track.base.clone()
        for _, _, event, kind in track.recent:
            apply_event(session, event, kind, self._quiet_ms)

    def _up_to_date(self, session_id: str, track: Track) -> Session:
        return self.sessions[session_id]

    def _versions(self, session_id: str) -> list[Session]:
        track = self._tracks.get(session_id)
        return [self.sessions[session_id], *([track.base] if track else [])]

    def tick(self, time_ms: int) -> list[Session]:
        """Let time pass until `time_ms` (this machine's clock); return the sessions that changed."""
        changed = []
        for session in list(self.sessions.values()):
            silence = self._silence(self.last_event_now(session), session.machine_id, time_ms)
            if silence < -CLOCK_STEP_MS:
                self._set_clock_back(session.session_id, session.last_event + silence)
                silence = 0
            ran_too_long = _runs_too_long(session)
            session.clock = max(session.clock, session.last_event + silence)
            if silence > TOGETHER_MS:
                self._tracks.pop(session.session_id, None)  # nothing will come between any more
            if session.state == "ended":
                continue
            machine_silence = self._silence(
                self._heard_ms.get(session.machine_id, 0), session.machine_id, time_ms
            )
            watched = session.machine_id == self._own_machine and session.pid is not None
            if self.complete and machine_silence >= self._ended_ms and not watched:
                hours = self._ended_ms // 3_600_000
                why = f"nothing heard from {session.machine_id} for {hours} hours"
                end_session(session, session.last_event, why, presumed=True)
                _derive(session, session.last_event)
                changed.append(session)
            elif session.state == "working" and silence >= self._quiet_ms:
                session.state, session.state_since = "quiet", session.last_event + self._quiet_ms
                changed.append(session)
            elif _runs_too_long(session) != ran_too_long:
                changed.append(session)
        return changed

    def _set_clock_back(self, session_id: str, time_ms: int) -> None:
        """Go on from `time_ms` after the clock was set back.

        What comes now is not late, and nothing begins in the future.
        """
        track = self._tracks.pop(session_id, None)
        session = self._up_to_date(session_id, track) if track else self.sessions[session_id]
        if session.last_event <= time_ms:
            return
        self._heard_ms[session.machine_id] = min(self._heard_ms.get(session.machine_id, 0), time_ms)
        session.last_event = session.clock = time_ms
        session.last_step = {agent_id: min(step, time_ms) for agent_id, step in session.last_step.items()}
        session.state_since = min(session.state_since, time_ms)
        session.turn_since, session.turn_start = (
            min(session.turn_since, time_ms),
            min(session.turn_start, time_ms),
        )
        session.waits = [dataclasses.replace(wait, since=min(wait.since, time_ms)) for wait in session.waits]
        for use_id, call in session.open_calls.items():
            session.open_calls[use_id] = dataclasses.replace(call, since=min(call.since, time_ms))

    def last_event_now(self, session: Session) -> int:
        """Return when a session's latest event was, on its machine's clock as it is set now."""
        return session.last_event + self._set_forward_ms.get(session.session_id, 0)

    def _silence(self, last_ms: int, machine_id: str, time_ms: int) -> int:
        skew = self._skews.get(machine_id)
        return time_ms - last_ms - ((skew.value_ms if skew else None) or 0)

    def end_gone(self, session_id: str, time_ms: int) -> Session:
        """Take into account that a session's process is gone; it said no word."""
        session = self.sessions[session_id]
        self._tracks.pop(session_id, None)
        end_session(session, time_ms, "its process is gone", presumed=True)
        _derive(session, time_ms)
        return session

    def delete(self, session_id: str) -> bool:
        """Forget a session; return whether there was one."""
        self._tracks.pop(session_id, None)
        self._received_ms.pop(session_id, None)
        self._set_forward_ms.pop(session_id, None)
        gone = self.sessions.pop(session_id, None)
        if gone is not None and gone.parent_id:
            self._linked.add(gone.parent_id)
        return gone is not None

    def finish(self) -> None:
        """Bring every session up to date."""

    def take_over(self, other: SessionBook) -> None:
        """Take over the sessions of another book, in place of ours, and what it has heard of machines."""
        other.finish()
        self.sessions.update(other.sessions)
        self._tracks.update(other._tracks)
        for session in other.sessions.values():
            self._note_place(session)
            if session.continued_from:
                self._continued_by[session.continued_from] = session.session_id
        self._received_ms.update(other._received_ms)
        for machine, skew in other._skews.items():
            self._skews.setdefault(machine, ClockSkew()).merge(skew)
        for machine, heard_ms in other._heard_ms.items():
            self._heard_ms[machine] = max(self._heard_ms.get(machine, 0), heard_ms)

    # What links sessions

    def _link(self, session: Session, kind: str) -> None:
        """Link a session that begins after /clear, resume or fork to the one that made way for it."""
        if kind == "session_start" and session.start_source in _MADE_WAY:
            self._note_place(session)
            before = [
                other for other in self._near(self._ends, session.source_time) if _makes_way(other, session)
            ]
            before = [
                other for other in before if self._continued_by.get(other.session_id) not in self.sessions
            ]
            before = [other for other in before if not self._went_on_as(session, other)]
            if before and not session.continued_from:
                self._continue(session, max(before, key=lambda other: other.end or 0))
        elif kind == "session_end" and session.end is not None and session.end_reason in _MADE_WAY.values():
            self._note_place(session)
            after = [other for other in self._near(self._starts, session.end) if _makes_way(session, other)]
            after = [
                other for other in after if not other.continued_from and not self._went_on_as(other, session)
            ]
            if after:
                self._continue(min(after, key=lambda other: other.source_time), session)

    def _note_place(self, session: Session) -> None:
        """Note when a session made way for another, and when it began after one that did."""
        if session.start_source in _MADE_WAY:
            _insert_once(self._starts, (session.source_time, session.session_id))
        if session.end is not None and session.end_reason in _MADE_WAY.values():
            _insert_once(self._ends, (session.end, session.session_id))

    def _near(self, times: list[tuple[int, str]], time_ms: int) -> list[Session]:
        """Return the sessions that began, or ended, about that time."""
        first = bisect.bisect_left(times, (time_ms - LINK_MS, ""))
        last = bisect.bisect_left(times, (time_ms + LINK_MS + 1, ""))
        return [self.sessions[each] for _, each in times[first:last] if each in self.sessions]

    def _continue(self, session: Session, before: Session) -> None:
        self._continued_by[before.session_id] = session.session_id
        self._linked.update((session.session_id, before.session_id, before.parent_id or before.session_id))
        for version in self._versions(session.session_id):
            version.continued_from = before.session_id
            version.user_label = version.user_label or before.user_label
            version.model = version.model or before.model
            version.pinned = version.pinned or before.pinned
            inherits = not version.parent_by_user and version.parent_id is None
            if inherits and session.session_id not in self.lineage(before.parent_id):
                version.parent_id, version.parent_by_user = before.parent_id, before.parent_by_user

    # What others ask

    def to_json(self, session: Session, children: dict[str, list[str]] | None = None) -> JsonObject:
        """Return a session as the API and the WebSocket give it (README "WebSocket")."""
        label, source = session.label
        reason = session.reason
        if children is None:
            children = self.children(session.session_id)
        return {
            "sessionId": session.session_id,
            "machineId": session.machine_id,
            "workingDirectory": session.directory,
            "label": label,
            "labelSource": source,
            "model": session.model or (session.usage and session.usage.model),
            "startTime": session.start,
            "lastEventTime": session.last_event,
            "endTime": session.end,
            "state": session.state,
            "reason": reason
            and {"kind": reason.kind, "tool": reason.tool, "detail": reason.detail, "since": reason.since},
            "stateSince": session.state_since,
            "activity": session.activity,
            "parentSessionId": session.parent_id,
            "childSessionIds": children.get(session.session_id, []),
            "continuedFrom": session.continued_from,
            "agents": [_agent_json(session, agent) for agent in session.agents.values()],
            "openCalls": [
                {
                    "toolUseId": call.tool_use_id,
                    "toolName": call.tool_name,
                    "target": call.target,
                    "agentId": call.agent_id or None,
                    "since": call.since,
                }
                for call in session.open_calls.values()
            ],
            "counts": {
                "events": session.events,
                "toolCalls": session.tool_calls,
                "toolErrors": session.tool_errors,
                "interrupted": session.interrupted,
                "prompts": session.prompts,
            },
            "tokenUsage": session.usage and session.usage.to_json(),
            "estimatedCostUsd": session.usage and self._prices.estimate(session.usage),
            "stuck": stuck_signals(session),
            "isPinned": session.pinned,
            "hidden": session.hidden,
            "isImported": session.imported,
            "demo": session.demo,
            "pid": session.pid,
        }

    def children(self, parent_id: str | None = None) -> dict[str, list[str]]:
        """Return the ids of the sessions below each session, or below one."""
        children: dict[str, list[str]] = {}
        for session in self.sessions.values():
            if session.parent_id and parent_id in (None, session.parent_id):
                children.setdefault(session.parent_id, []).append(session.session_id)
        return children

    def each_json(self, with_hidden: bool) -> Iterator[JsonObject]:
        """Yield every session, newest event first."""
        children = self.children()
        chosen = [session for session in self.sessions.values() if with_hidden or not session.hidden]
        chosen.sort(key=lambda session: session.last_event, reverse=True)
        return (self.to_json(session, children) for session in chosen)

    def all_json(self, with_hidden: bool) -> list[JsonObject]:
        """Return every session, newest event first."""
        return list(self.each_json(with_hidden))

    def in_state(self, state: str) -> frozenset[str]:
        """Return the ids of the sessions that are in a state now."""
        return frozenset(session.session_id for session in self.sessions.values() if session.state == state)


class ReplayBook(SessionBook):
    """A book that is told one session's history and asked only after `finish`: then it is as SessionBook is.

    SessionBook tells each event twice: to the session, and later to what it was some seconds ago. Here only
    the latter is told, and the session made from it at the end. In between it is kept just from an event that
    came very late until the next that came out of its place, since SessionBook tells it those in that order.
    """

    def __init__(self, *patience: Any) -> None:
        super().__init__(*patience)
        self._kept: set[str] = set()  # ids of those that `sessions` has as they are now

    def finish(self) -> None:
        for session_id, track in self._tracks.items():
            self._up_to_date(session_id, track)

    def _link(self, session: Session, kind: str) -> None:
        """Leave links to whoever tells all sessions that they concern."""

    def _go_on(self, session: Session, event: JsonObject, kind: str) -> None:
        if session.session_id in self._kept:
            super()._go_on(session, event, kind)

    def _tell_anew(self, session_id: str, track: Track) -> None:
        self._kept.discard(session_id)

    def _up_to_date(self, session_id: str, track: Track) -> Session:
        if session_id not in self._kept:
            super()._tell_anew(session_id, track)
            self._kept.add(session_id)
        return self.sessions[session_id]


def _insert_once(times: list[tuple[int, str]], entry: tuple[int, str]) -> None:
    place = bisect.bisect_left(times, entry)
    if times[place : place + 1] != [entry]:
        times.insert(place, entry)


# SessionStart's source → the SessionEnd's reason of the session that made way.
_MADE_WAY = {"clear": "clear", "resume": "resume", "fork": "resume"}


def _makes_way(before: Session, after: Session) -> bool:
    """Tell whether `before` ended so that `after` could begin: same machine, directory, process and time."""
    return (
        before.session_id != after.session_id
        and before.end is not None
        and before.end_reason == _MADE_WAY.get(after.start_source)
        and (before.machine_id, before.directory) == (after.machine_id, after.directory)
        and (before.pid == after.pid or None in (before.pid, after.pid))
        and abs(after.source_time - before.end) < LINK_MS
    )


class LinkPoint(NamedTuple):
    """A moment at which a session makes way, or begins where another one made way."""

    session_id: str
    machine_id: str
    reason: str  # of the end that it is or that it follows
    begins: bool
    time_ms: int


def link_point(session: Session, event: JsonObject) -> LinkPoint | None:
    """Return what an event of a session has to do with links between sessions, None for most."""
    kind = effective_type(event)
    if kind == "session_start":
        reason = _MADE_WAY.get(text_of(event["data"].get("source")), "")
    elif kind == "session_end":
        reason = text_of(event["data"].get("reason"))
    else:
        return None
    if reason not in _MADE_WAY.values():
        return None
    begins = kind == "session_start"
    return LinkPoint(session.session_id, session.machine_id, reason, begins, event["timestamp"])


def may_be_linked(points: Iterable[LinkPoint]) -> list[frozenset[str]]:
    """Group the ids of sessions that may be linked with each other, directly or through others.

    A group may be too large, never too small: nothing outside of it can change the links within.
    """
    chronicle: dict[tuple[str, str], list[LinkPoint]] = {}
    for point in points:
        chronicle.setdefault((point.machine_id, point.reason), []).append(point)
    group_of: dict[str, set[str]] = {}
    for moments in chronicle.values():
        ends = sorted((point.time_ms, point.session_id) for point in moments if not point.begins)
        for point in moments:
            if not point.begins:
                continue
            for time_ms, before in ends[bisect.bisect_left(ends, (point.time_ms - LINK_MS, "")) :]:
                if time_ms > point.time_ms + LINK_MS:
                    break
                group = group_of.get(before, {before}) | group_of.get(point.session_id, {point.session_id})
                group_of.update(dict.fromkeys(group, group))
    unique = {id(group): frozenset(group) for group in group_of.values() if len(group) > 1}
    return list(unique.values())


def _apply_user_action(session: Session, data: JsonObject) -> None:
    """Apply what the user did; their word wins over every guess."""
    action = data.get("action")
    if action == "rename":
        session.user_label = one_line(text_of(data.get("label")))
    elif action == "pin":
        session.pinned = data.get("pinned") is True
    elif action == "hide":
        session.hidden = data.get("hidden") is True
    elif action == "set_parent":
        parent = data.get("parentSessionId")
        session.parent_id = parent if isinstance(parent, str) and parent else None
        session.parent_by_user = True


def _agent_json(session: Session, agent: Agent) -> JsonObject:
    own = [call for call in session.open_calls.values() if call.agent_id == agent.agent_id]
    waits = any(wait.agent_id == agent.agent_id for wait in session.waits)
    return {
        "agentId": agent.agent_id,
        "agentType": agent.agent_type,
        "label": agent.label or agent.agent_type or "agent",
        "parentAgentId": agent.parent_id if agent.parent_id in session.agents else None,
        "state": "ended" if agent.end is not None else "waiting" if waits else "working",
        "startTime": agent.start,
        "endTime": agent.end,
        "activity": own[-1].words if own else "",
        "counts": {"events": agent.events, "toolCalls": agent.tool_calls, "toolErrors": agent.tool_errors},
        "tokenUsage": session.agent_usage[agent.agent_id][1].to_json()
        if agent.agent_id in session.agent_usage
        else None,
    }


_ROW_DATA = {
    "toolName": "toolName",
    "toolUseId": "toolUseId",
    "durationMs": "durationMs",
    "notificationType": "notificationType",
    "source": "source",
    "reason": "reason",
    "is_interrupt": "isInterrupt",
}
# Whichever comes first says in words what an event without a tool is about.
_ROW_TEXTS = (
    "error",
    "message",
    "assistantResponse",
    "action",
    "file_path",
    "task_subject",
    "to_model",
    "new_cwd",
    "compact_summary",
    "command_name",
)
_ROW_BATCH_IDS = 50
_ROW_FIELDS = ("seq", "received", "id", "timestamp", "sessionId", "machineId", "hookType", "eventType")


def event_row(event: JsonObject) -> JsonObject:
    """Reduce an event to what a list row needs, about 300 bytes; the whole one comes on demand."""
    row = {name: event[name] for name in _ROW_FIELDS if name in event}
    row.update({name: event[name] for name in ("agentId", "agentType", "demo") if name in event})
    data = event["data"]
    small: JsonObject = {}
    for name, row_name in _ROW_DATA.items():
        value = data.get(name)
        if isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) <= 200):
            small[row_name] = value
    if "toolInput" in data:
        small["target"] = tool_target(data["toolInput"], event["workingDirectory"])
    batch = [call["tool_use_id"] for call in _batch_calls(event) if isinstance(call.get("tool_use_id"), str)]
    if batch:
        small["toolUseIds"] = batch[:_ROW_BATCH_IDS]
    text = next((data[name] for name in _ROW_TEXTS if data.get(name)), None)
    if text is None and not event["hookType"]:
        text = data
    if text is not None:
        small["text"] = one_line(text_of(text))
    return {**row, "partial": True, "data": small}


# ---------------------------------------------------------------------------
# Index: search and statistics over everything stored
#
# Owns: index.db, which may be deleted at any time: it is filled from the event files, and they are the truth.
# Knows: the store's files and what an event says. Does not know: clients, or the states of sessions.
#
# One thread fills it through one connection, behind the live path: the loop thread only names the files that
# grew, and this thread reads them from where it stopped. While events arrive it takes a tenth of the time at
# most. Who searches or counts has read-only connections of his own, so that nobody waits for anybody.
#
# No text is kept. For each day of the store there is a table of words, which goes as a whole with its day; it
# names candidates, newest first, and the line in the file decides. An event's row id is its timestamp, or the
# next number that is free.
# ---------------------------------------------------------------------------

INDEX_VERSION = 2
INDEX_BATCH_EVENTS = 1000
INDEX_BATCH_BYTES = 2 << 20
INDEX_SLICE_EVENTS = 50  # after so many it looks whether the live path wants the time
INDEX_BATCH_S = 0.5
NAMES_KEPT = 10_000  # in memory; any other is looked up
INDEX_GATHER_S = 0.1  # what arrives together is indexed together
INDEX_RETRY_S = 10.0
INDEX_OPENS_S = 3.0  # at most, on a busy machine
LIVE_S = 0.1  # events are arriving when the last one came within this time
LIVE_SHARE = 0.1  # of the time that filling may take meanwhile
SEARCH_BUDGET_S = 2.0
SEARCH_LIMIT = 200
SESSIONS_MATCHED = 500  # by the table of words; of more (all that ended), the line in the file decides
SNIPPET_CHARS = 160
QUARTER_MS = 900_000
EXTREMES = 20  # slowest calls, most failing calls
COMPARED_SESSIONS = 200

_INDEX_SCHEMA = """
CREATE TABLE days(id INTEGER PRIMARY KEY, name TEXT UNIQUE, low INTEGER, high INTEGER, ahead INTEGER,
  removed INTEGER);
CREATE TABLE names(id INTEGER PRIMARY KEY, kind TEXT, name TEXT, UNIQUE(kind, name));
CREATE TABLE files(id INTEGER PRIMARY KEY, day INTEGER, name TEXT, inode INTEGER, position INTEGER,
  session INTEGER, machine INTEGER, project INTEGER, UNIQUE(day, name));
CREATE TABLE events(id INTEGER PRIMARY KEY, file INTEGER, offset INTEGER, length INTEGER);
CREATE TABLE activity(file INTEGER, quarter INTEGER, events INTEGER, prompts INTEGER, first INTEGER,
  last INTEGER, PRIMARY KEY(file, quarter)) WITHOUT ROWID;
CREATE TABLE usage(file INTEGER, model INTEGER, quarter INTEGER,
  c0 INTEGER, c1 INTEGER, c2 INTEGER, c3 INTEGER, c4 INTEGER,
  l0 INTEGER, l1 INTEGER, l2 INTEGER, l3 INTEGER, l4 INTEGER,
  PRIMARY KEY(file, model, quarter)) WITHOUT ROWID;
CREATE TABLE calls(key INTEGER PRIMARY KEY, file INTEGER, session INTEGER, tool INTEGER, target INTEGER,
  begun INTEGER, quarter INTEGER, finish INTEGER, duration INTEGER, outcome INTEGER, event INTEGER);
CREATE INDEX calls_by_tool ON calls(tool, duration, quarter, session, outcome);
CREATE INDEX calls_by_session ON calls(session, quarter, outcome);
CREATE INDEX calls_by_target ON calls(target, quarter, session);
CREATE INDEX calls_failed ON calls(tool, target, quarter, session, event) WHERE outcome IN (1, 3);
"""


class Outcome(enum.IntEnum):
    """How a tool call ended; what is told later with a higher number wins, whatever came first."""

    OPEN = 0
    FAILED_BY_ROUND = 1  # only its round (PostToolBatch) closed it: it never ran
    OK = 2
    FAILED = 3
    INTERRUPTED = 4


# Words


_WORD = re.compile(r"[^\W_]+")
_BETWEEN_WORDS = re.compile(r"[\W_]+")
_QUERY_PART = re.compile(r'"([^"]*)"?|(\S+)')
_APART = re.compile("([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3\uf900-\ufaff])")  # scripts without spaces
_MARKS = re.compile("[\u0300-\u036f]")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]")  # its letter is no part of the word that follows
_UNFIT = re.compile("[\ue000\ud800-\udfff]")
_MARK = "\ue000"  # begins a word that says what an event is (its session, tool, …), not what it holds
# What nobody searches for, or what stands in every event of a session.
_NOT_SEARCHED = frozenset(
    (
        "toolUseId",
        "tool_use_id",
        "transcriptPath",
        "agent_transcript_path",
        "permissionMode",
        "prompt_id",
        "usage",
        "truncated",
        "effort",
        "type",
        "signature",
    )
)


def fold(text: str) -> str:
    """Return text in the form in which words are compared: without case and accents, CJK characters apart.

    What is no word is a space: this Python alone decides what is one, whatever SQLite knows of Unicode.
    """
    if text.isascii():
        return text.lower()
    plain = unicodedata.normalize("NFD", _APART.sub(r" \1 ", _UNFIT.sub(" ", text)))
    return _BETWEEN_WORDS.sub(" ", _MARKS.sub("", plain).lower())


def without_colours(text: str) -> str:
    """Return a text without what sets colours on a terminal."""
    return _TERMINAL_CODE.sub("", text) if "\x1b" in text else text


@dataclasses.dataclass(frozen=True)
class Term:
    """Words that must stand next to each other; the last one may be only a beginning."""

    words: tuple[str, ...]
    is_prefix: bool = False

    def found_in(self, folded: str) -> bool:
        """Tell whether the term occurs in a folded text."""
        if not all(word in folded for word in self.words):
            return False
        between = r"[\W_]+".join(map(re.escape, self.words))
        return (
            re.search(rf"(?<![^\W_]){between}" + ("" if self.is_prefix else r"(?![^\W_])"), folded)
            is not None
        )

    @property
    def pattern(self) -> str:
        """Return the pattern that finds the term in a text as it was written."""
        between = r"[\W_]*".join(map(re.escape, self.words))
        start, end = (r"(?<![^\W_])", r"(?![^\W_])") if between.isascii() else ("", "")
        return start + between + (r"\w*" if self.is_prefix else end)


def parse_terms(text: str) -> tuple[Term, ...]:
    """Parse what a person types: words, `begin*`, `"words in a row"`; src/app.py is a row of three."""
    terms = []
    for quoted, bare in _QUERY_PART.findall(text):
        words = tuple(_WORD.findall(fold(quoted or bare)))
        if words:
            terms.append(Term(words, bare.endswith("*")))
    return tuple(dict.fromkeys(terms))


def collect_texts(value: Any, found: list[str]) -> None:
    """Append every text inside a JSON value that a person may search for."""
    if isinstance(value, str):
        found.append(without_colours(value))
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _NOT_SEARCHED:
                collect_texts(inner, found)
    elif isinstance(value, list):
        for inner in value:
            collect_texts(inner, found)


def event_texts(event: JsonObject) -> Iterator[tuple[str, str]]:
    """Yield (name in data, text) of everything in an event that a person may search for."""
    for name, value in event["data"].items():
        if name not in _NOT_SEARCHED:
            found: list[str] = []
            collect_texts(value, found)
            yield from ((name, text) for text in found)


def snippet_of(event: JsonObject, terms: Sequence[Term]) -> tuple[str | None, list[JsonObject]]:
    """Return the field in which the terms are found and a line of it, in pieces, those found marked."""
    pattern = re.compile("|".join(term.pattern for term in terms), re.IGNORECASE)
    first = ""
    for name, text in event_texts(event):
        match = pattern.search(text)
        if match:
            return name, _marked(text, match, pattern)
        first = first or name
    return first or None, []


def _marked(text: str, match: re.Match[str], pattern: re.Pattern[str]) -> list[JsonObject]:
    start = max(0, match.start() - SNIPPET_CHARS // 3)
    end = min(len(text), max(match.end(), start + SNIPPET_CHARS))
    pieces: list[JsonObject] = []
    at = start
    for hit in pattern.finditer(text, start, end):
        if hit.end() > hit.start() >= at:
            pieces += [{"text": text[at : hit.start()]}, {"text": hit.group(), "hit": True}]
            at = hit.end()
    pieces.append({"text": text[at:end] + ("…" if end < len(text) else "")})
    if start:
        pieces[0]["text"] = "…" + pieces[0]["text"]
    for piece in pieces:
        piece["text"] = re.sub(r"\s+", " ", piece["text"])
    return [piece for piece in pieces if piece["text"]]


@dataclasses.dataclass(frozen=True)
class SearchQuery:
    """What is searched for. `session_ids` (None: any) and times in ms, from <= timestamp < to."""

    terms: tuple[Term, ...] = ()
    session_ids: frozenset[str] | None = None
    machine: str | None = None
    tool: str | None = None
    kind: str | None = None  # eventType or hookType
    from_ms: int = 0
    to_ms: int = 1 << 53
    limit: int = 50
    cursor: str | None = None

    def takes(self, event: JsonObject) -> bool:
        """Tell whether an event is one of those searched for."""
        if self.session_ids is not None and event["sessionId"] not in self.session_ids:
            return False
        if self.machine is not None and event["machineId"] != self.machine:
            return False
        if self.tool is not None and event["data"].get("toolName") != self.tool:
            return False
        if self.kind is not None and self.kind not in (effective_type(event), event["hookType"]):
            return False
        if not self.from_ms <= event["timestamp"] < self.to_ms:
            return False
        if not self.terms:
            return True
        folded = fold("\n".join(text for _, text in event_texts(event)))
        return all(term.found_in(folded) for term in self.terms)


SEARCH_FIELDS = ("q", "session", "machine", "tool", "type", "state", "cursor")


def search_query(wanted: Mapping[str, Any], session_ids: frozenset[str] | None = None) -> SearchQuery:
    """Return the query that some SEARCH_FIELDS, `from`, `to` and `limit` ask for; raise SearchError.

    `session_ids` are those of the state that was asked for, if one was.
    """
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
    start, end = wanted.get("from"), wanted.get("to")
    return SearchQuery(
        parse_terms(texts.get("q", "")[:1000]),
        session_ids,
        texts.get("machine"),
        texts.get("tool"),
        texts.get("type"),
        start or 0,
        1 << 53 if end is None else end,
        limit or 50,
        texts.get("cursor"),
    )


class SearchError(Exception):
    """A search that cannot be carried out: the parameter and what was expected."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: expected {expected}")
        self.field = field
        self.expected = expected


def search_page(query: SearchQuery, candidates: Iterator[tuple[str, bytes]]) -> JsonObject:
    """Return the first events among candidates (cursor, line) that are searched for, as the API gives them.

    Ends early, with a cursor to go on from, when the time for one answer is over.
    """
    begin = time.monotonic()
    results: list[JsonObject] = []
    cursor, complete = query.cursor, True
    for next_cursor, line in candidates:
        if len(results) == query.limit:
            break
        if time.monotonic() - begin > SEARCH_BUDGET_S:
            complete = False
            break
        cursor = next_cursor
        with contextlib.suppress(MalformedEvent):
            event = parse_stored(line)
            if query.takes(event):
                results.append(_search_result(event, query.terms))
    else:
        cursor = None
    took_ms = round((time.monotonic() - begin) * 1000, 1)
    return {"results": results, "next": cursor, "complete": complete, "tookMs": took_ms}


def _search_result(event: JsonObject, terms: Sequence[Term]) -> JsonObject:
    row = {**event_row(event), "snippet": []}
    if terms:
        field, row["snippet"] = snippet_of(event, terms)
        if field:
            row["field"] = field
    return row


def scan_candidates(store: EventStore | MemoryStore, query: SearchQuery) -> Iterator[tuple[str, bytes]]:
    """Yield every stored line that may be one, last arrived first, where there is no index to ask."""
    before = None
    if query.cursor:
        if not re.fullmatch(r"s\d{1,16}", query.cursor):
            raise SearchError("cursor", "the `next` of the page before; search anew")
        before = int(query.cursor[1:])
    needles = [word.encode() for term in query.terms for word in term.words if word.isascii()]
    for line in lines_newest_first(store, before):
        lowered = line.lower() if needles else line
        # An escape may be a letter with an accent, which is as good as one without.
        if all(needle in lowered for needle in needles) or b"\\u" in line:
            yield f"s{line_seq(line)}", line


def lines_newest_first(store: EventStore | MemoryStore, before: int | None) -> Iterator[bytes]:
    """Yield every stored line (with a number below `before`), last arrived first."""
    if isinstance(store, MemoryStore):
        yield from reversed(store.recent_lines(1 << 30, before))
        return
    for day in reversed(store.days()):
        readers = [lines_back(path, before) for path in store.day_paths(day)]
        yield from heapq.merge(*readers, key=line_seq, reverse=True)


# What an event contributes


def fit_name(name: str) -> str:
    """Return a name as SQLite can keep it: a lone surrogate becomes its escape."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


class CallFact(NamedTuple):
    """What one event says about one tool call; times in ms."""

    key: int
    tool: str
    target: int
    start: int
    finish: int | None
    duration: int | None
    outcome: Outcome


class Document(NamedTuple):
    """One event, ready for the index."""

    timestamp: int
    seq: int
    file_id: int
    offset: int
    length: int
    words: str
    counts: bool  # False for what the user did to a session: it is no event of it
    is_prompt: bool
    calls: tuple[CallFact, ...]
    usage: tuple[tuple[str, ModelUsage], ...]  # (model, what the session has used of it until now)


def stable_hash(*parts: str) -> int:
    """Return 63 bits that stand for some texts, the same in every run."""
    digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def is_duration(value: Any) -> bool:
    """Tell whether a value can be a duration in milliseconds; clients say all sorts of things."""
    return emit_event.is_number(value) and 0 <= value < 1 << 40


def call_facts(event: JsonObject, kind: str) -> tuple[CallFact, ...]:
    """Return what an event says about tool calls that have a name (clients since 2.0.43)."""
    data = event["data"]
    timestamp = event["timestamp"]
    if event["hookType"] == "PostToolBatch":
        return tuple(
            _call_fact(event, text_of(call.get("tool_name")), call.get("tool_input"), call["tool_use_id"],
                       timestamp, None, Outcome.FAILED_BY_ROUND)
            for call in _batch_calls(event)
            if isinstance(call.get("tool_use_id"), str)
        )  # fmt: skip
    if kind not in ("tool_call", "tool_result", "tool_error"):
        return ()
    duration = data.get("durationMs")
    duration_ms = round(duration) if is_duration(duration) else None
    outcome = Outcome.OPEN if kind == "tool_call" else Outcome.OK
    if kind == "tool_error":
        outcome = Outcome.INTERRUPTED if data.get("is_interrupt") is True else Outcome.FAILED
    named = data.get("toolUseId")
    use_id = named if isinstance(named, str) and named else f"unnamed:{event['id']}"
    start = timestamp if outcome is Outcome.OPEN else timestamp - (duration_ms or 0)
    fact = _call_fact(
        event, text_of(data.get("toolName")), data.get("toolInput"), use_id, start, duration_ms, outcome
    )
    return (fact,)


def _call_fact(
    event: JsonObject,
    tool: str,
    tool_input: Any,
    use_id: str,
    start: int,
    duration: int | None,
    outcome: Outcome,
) -> CallFact:
    target = stable_hash(tool, tool_target(tool_input, event["workingDirectory"]))
    ran = outcome not in (Outcome.OPEN, Outcome.FAILED_BY_ROUND)
    finish = event["timestamp"] if ran else None
    return CallFact(
        stable_hash(event["sessionId"], use_id), tool or "?", target, start, finish, duration, outcome
    )


class UnnamedCalls:
    """Pair calls of clients before 2.0.43, which have no name: a result ends the newest open call like it."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, str, str], list[int]] = {}  # (session, agent, tool) → keys

    def paired(self, event: JsonObject, facts: tuple[CallFact, ...]) -> tuple[CallFact, ...]:
        """Return the facts of an event, a result with the key of the call that it belongs to."""
        if event["hookType"] == "PostToolBatch" or not facts or event["data"].get("toolUseId"):
            return facts
        fact = facts[0]
        keys = self._open.setdefault((event["sessionId"], event.get("agentId", MAIN), fact.tool), [])
        if fact.outcome is Outcome.OPEN:
            keys.append(fact.key)
            del keys[:-100]
        elif keys:
            return (fact._replace(key=keys.pop()),)
        return facts


def usage_facts(event: JsonObject) -> tuple[tuple[str, ModelUsage], ...]:
    """Return (model, total) of what the session of an event has used so far; events that tell it are few."""
    usage = event["data"].get("usage")
    models = usage.get("models") if isinstance(usage, dict) else None
    if not isinstance(models, dict):
        return ()
    return tuple(
        (model[:200], _model_usage(counts))
        for model, counts in itertools.islice(models.items(), MODELS_LIMIT)
    )


# The file


class IndexFile:
    """The SQLite file and what is written to it; one thread, one connection. Errors are sqlite3.Error."""

    _ADD_CALL = """
        INSERT INTO calls(key, file, session, tool, target, begun, quarter, finish, duration, outcome, event)
        VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        ON CONFLICT(key) DO UPDATE SET
          file = CASE WHEN excluded.outcome > outcome THEN excluded.file ELSE file END,
          quarter = min(quarter, excluded.quarter),
          finish = CASE WHEN excluded.outcome > outcome THEN excluded.finish ELSE finish END,
          duration = CASE WHEN excluded.outcome > outcome
            THEN ifnull(excluded.duration, max(0, excluded.finish - begun))
            ELSE ifnull(duration, max(0, finish - ifnull(begun, excluded.begun))) END,
          begun = ifnull(begun, excluded.begun),
          event = CASE WHEN excluded.outcome > outcome THEN excluded.event ELSE event END,
          outcome = max(outcome, excluded.outcome)
        """
    _ADD_ACTIVITY = """
        INSERT INTO activity(file, quarter, events, prompts, first, last) VALUES(?, ?, ?, ?, ?, ?)
        ON CONFLICT(file, quarter) DO UPDATE SET
          events = events + excluded.events, prompts = prompts + excluded.prompts,
          first = min(first, excluded.first), last = max(last, excluded.last)
        """

    _COUNTS = (
        "c0",
        "c1",
        "c2",
        "c3",
        "c4",
        "l0",
        "l1",
        "l2",
        "l3",
        "l4",
    )  # of Tokens: all, and of long prompts
    _ADD_USAGE = (
        f"INSERT INTO usage(file, model, quarter, {', '.join(_COUNTS)}) "
        f"VALUES({', '.join('?' * 13)}) "
        "ON CONFLICT(file, model, quarter) DO UPDATE SET "
        + ", ".join(f"{name} = max({name}, excluded.{name})" for name in _COUNTS)
    )

    def __init__(self, path: str) -> None:
        """Open the file; begin a new one when there is none, or one of another version."""
        self.path = path
        self.db = self._connect()
        if self.db.execute("PRAGMA user_version").fetchone()[0] != INDEX_VERSION:
            self.db.close()
            remove_index(path)
            self.db = self._connect()
            self.db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.executescript(f"BEGIN; {_INDEX_SCHEMA} PRAGMA user_version = {INDEX_VERSION}; COMMIT;")
        self.full_text = has_full_text(self.db)
        self._names: dict[tuple[str, str], int] = {
            (kind, name): number
            for number, kind, name in self.db.execute(
                "SELECT id, kind, name FROM names LIMIT ?", (NAMES_KEPT,)
            )
        }
        self.inodes = index_inodes(path)

    def _connect(self) -> sqlite3.Connection:
        if not os.path.exists(self.path):
            remove_index(self.path)  # a log that was left behind does not belong to the next file
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=5)
        # A power failure costs the last transactions, never the file; they are read from the events again.
        for pragma in ("synchronous = NORMAL", "cache_size = -8192", "wal_autocheckpoint = 2000"):
            db.execute(f"PRAGMA {pragma}")
        return db

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def is_gone(self) -> bool:
        """Tell whether somebody has removed or replaced the file, or one that SQLite keeps beside it."""
        return index_inodes(self.path) != self.inodes

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Do everything inside or nothing."""
        self.db.execute("BEGIN")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self.db.execute("ROLLBACK")
            self._names.clear()
            raise
        self.db.execute("COMMIT")

    def name_id(self, kind: str, name: str) -> int:
        """Return the number that stands for a name, a new one when it is new."""
        name = fit_name(name)
        number = self._names.get((kind, name))
        if number is None:
            found = self.db.execute(
                "SELECT id FROM names WHERE kind = ? AND name = ?", (kind, name)
            ).fetchone()
            number = found[0] if found else None
        if number is None:
            number = (
                self.db.execute("INSERT INTO names(kind, name) VALUES(?, ?)", (kind, name)).lastrowid or 0
            )
        if len(self._names) >= NAMES_KEPT:
            self._names.clear()
        self._names[kind, name] = number
        return number

    def day_id(self, day: str) -> int:
        """Return the number of a day of the store; make its table of words when it is new."""
        found = self.db.execute("SELECT id FROM days WHERE name = ?", (day,)).fetchone()
        if found:
            return int(found[0])
        added = self.db.execute("INSERT INTO days(name, ahead, removed) VALUES(?, 0, 0)", (day,))
        number = added.lastrowid or 0
        if self.full_text:
            self.db.execute(
                f"CREATE VIRTUAL TABLE words_{number} USING fts5(words, content='', columnsize=0, "
                "detail=none, tokenize=ascii)"
            )
            # Fewer, larger pieces: twice as fast to fill and less to merge.
            self.db.execute(
                f"INSERT INTO words_{number}(words_{number}, rank) VALUES('hashsize', {16 << 20})"
            )
        return number

    def files(self) -> dict[str, tuple[int, int, int]]:
        """Return "day/name" → (number, inode, position) of every file that is known."""
        rows = self.db.execute(
            "SELECT days.name, files.name, files.id, inode, position FROM files JOIN days ON days.id = day"
        )
        return {f"{day}/{name}": (number, inode, position) for day, name, number, inode, position in rows}

    def add_file(self, day: str, name: str, inode: int, event: JsonObject) -> int:
        """Make a file known by its first event; return its number."""
        row = (
            self.day_id(day),
            name,
            inode,
            self.name_id("session", event["sessionId"]),
            self.name_id("machine", event["machineId"]),
            self.name_id("project", event["workingDirectory"]),
        )
        added = self.db.execute(
            "INSERT INTO files(day, name, inode, position, session, machine, project) "
            "VALUES(?, ?, ?, 0, ?, ?, ?)",
            row,
        )
        return added.lastrowid or 0

    def add(self, day_id: int, documents: list[Document], positions: Mapping[int, int]) -> None:
        """Write events of one day, and how far their files have been read (file number → position)."""
        documents.sort(key=lambda document: (document.timestamp, document.seq))
        numbered = list(zip(self._free_ids(documents), documents))
        self.db.executemany(
            "INSERT INTO events(id, file, offset, length) VALUES(?, ?, ?, ?)",
            [(number, doc.file_id, doc.offset, doc.length) for number, doc in numbered],
        )
        if self.full_text:
            self.db.executemany(
                f"INSERT INTO words_{day_id}(rowid, words) VALUES(?, ?)",
                [(number, doc.words) for number, doc in numbered],
            )
        sessions = dict(self.db.execute("SELECT id, session FROM files WHERE day = ?", (day_id,)))
        self.db.executemany(self._ADD_CALL, list(self._call_rows(numbered, sessions)))
        self.db.executemany(self._ADD_ACTIVITY, activity_rows(documents))
        self.db.executemany(self._ADD_USAGE, list(self._usage_rows(documents)))
        self.db.executemany(
            "UPDATE files SET position = ? WHERE id = ?", [(at, file) for file, at in positions.items()]
        )
        if numbered:
            ahead = max(number - document.timestamp for number, document in numbered)
            self.db.execute(
                "UPDATE days SET low = min(ifnull(low, ?), ?), high = max(ifnull(high, ?), ?), "
                "ahead = max(ahead, ?) WHERE id = ?",
                (*[numbered[0][0]] * 2, *[numbered[-1][0]] * 2, ahead, day_id),
            )

    def _free_ids(self, documents: Sequence[Document]) -> Iterator[int]:
        last = -1
        for document in documents:
            number = max(document.timestamp, last + 1)
            while self.db.execute("SELECT 1 FROM events WHERE id = ?", (number,)).fetchone():
                number += 1
            last = number
            yield number

    def _call_rows(
        self, numbered: Sequence[tuple[int, Document]], sessions: Mapping[int, int]
    ) -> Iterator[tuple[Any, ...]]:
        for number, document in numbered:
            for call in document.calls:
                yield (
                    call.key,
                    document.file_id,
                    sessions[document.file_id],
                    self.name_id("tool", call.tool),
                    call.target,
                    call.start if call.outcome is Outcome.OPEN else None,
                    call.start // QUARTER_MS,
                    call.finish,
                    call.duration,
                    call.outcome,
                    number,
                )

    def _usage_rows(self, documents: Sequence[Document]) -> Iterator[tuple[int, ...]]:
        for document in documents:
            for model, used in document.usage:
                quarter = document.timestamp // QUARTER_MS
                yield (document.file_id, self.name_id("model", model), quarter, *used.all, *used.long_prompts)

    def forget_file(self, file_id: int) -> None:
        """Take out everything that came from one file, and its day with its last file."""
        day_id = self.db.execute("SELECT day FROM files WHERE id = ?", (file_id,)).fetchone()[0]
        removed = self.db.execute("DELETE FROM events WHERE file = ?", (file_id,)).rowcount
        for table in ("calls", "activity", "usage"):
            self.db.execute(f"DELETE FROM {table} WHERE file = ?", (file_id,))
        self.db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self.db.execute("UPDATE days SET removed = removed + ? WHERE id = ?", (removed, day_id))
        if not self.db.execute("SELECT 1 FROM files WHERE day = ? LIMIT 1", (day_id,)).fetchone():
            self.forget_day(day_id)

    def forget_day(self, day_id: int) -> None:
        """Take out a whole day."""
        for (file_id,) in self.db.execute("SELECT id FROM files WHERE day = ?", (day_id,)).fetchall():
            for table in ("events", "calls", "activity", "usage"):
                self.db.execute(f"DELETE FROM {table} WHERE file = ?", (file_id,))
        self.db.execute("DELETE FROM files WHERE day = ?", (day_id,))
        self.db.execute("DELETE FROM days WHERE id = ?", (day_id,))
        if self.full_text:
            self.db.execute(f"DROP TABLE IF EXISTS words_{day_id}")

    def worn_days(self) -> list[int]:
        """Return the days whose words are mostly of files that are gone: they are worth reading anew."""
        rows = self.db.execute(
            "SELECT id FROM days WHERE removed > 1000 AND removed > "
            "(SELECT count(*) FROM events WHERE file IN (SELECT id FROM files WHERE day = days.id))"
        )
        return [day_id for (day_id,) in rows]

    def give_back(self) -> None:
        """Give the space of what was taken out back to the file system."""
        if self.db.execute("PRAGMA freelist_count").fetchone()[0]:
            # One page a step, and only executescript steps to the end.
            self.db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE);")


def activity_rows(documents: Sequence[Document]) -> list[tuple[int, ...]]:
    """Return (file, quarter of an hour, events, prompts, first ms, last ms) of some events."""
    rows: dict[tuple[int, int], list[int]] = {}
    for document in documents:
        if not document.counts:
            continue
        at = document.timestamp
        row = rows.setdefault((document.file_id, at // QUARTER_MS), [0, 0, at, at])
        row[0] += 1
        row[1] += document.is_prompt
        row[2], row[3] = min(row[2], at), max(row[3], at)
    return [(*key, *row) for key, row in rows.items()]


def has_full_text(db: sqlite3.Connection) -> bool:
    """Tell whether this SQLite was built with FTS5."""
    try:
        db.execute("CREATE VIRTUAL TABLE temp.probe USING fts5(words)")
        db.execute("DROP TABLE temp.probe")
    except sqlite3.OperationalError:
        return False
    return True


def index_inodes(path: str) -> tuple[int, ...]:
    """Return the inodes of the index and of what SQLite keeps beside it while it is open; 0 for none."""
    return inode_of(path), inode_of(path + "-wal"), inode_of(path + "-shm")


def remove_index(path: str) -> None:
    """Remove the index and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm", "-journal"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)


# Filling


class Indexer:
    """Fill the index from the event files, in a thread of its own.

    `grown` is for the loop thread, `look_again` and `status` for any.
    """

    def __init__(self, store: EventStore, path: str) -> None:
        self._store = store
        self._path = path
        self._file: IndexFile | None = None
        self._lock = threading.Lock()
        self._grown: dict[str, int] = {}  # "day/name" → bytes that were added and not yet looked at
        self._look_again = True
        self._wake = threading.Event()
        self._is_open = threading.Event()  # there is an index that can be asked, complete or not
        self._stopping = False
        self._last_live = 0.0  # time.monotonic() of the last event
        self._state, self._error = "building", ""
        self._full_text = True
        self._done = self._total = 0
        self._indexed = 0  # events since the start, for the average length of a line
        self._indexed_bytes = 0
        self._closed_calls = SeenIds()
        self._unnamed = UnnamedCalls()
        self._thread = threading.Thread(target=self._run, name="index", daemon=True)

    def start(self) -> None:
        """Begin to fill."""
        self._thread.start()

    def stop(self) -> None:
        """End after the batch at hand."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(10)

    def grown(self, stored: Sequence[StoredEvent]) -> None:
        """Take note of events that were just written to their files."""
        with self._lock:
            for entry in stored:
                name = f"{self._store.newest_day}/{session_file_name(entry.event['sessionId'])}"
                self._grown[name] = self._grown.get(name, 0) + len(entry.line) + 1
        self._last_live = time.monotonic()
        if not self._wake.is_set():
            self._wake.set()

    def look_again(self) -> None:
        """Compare with the files on disk once more: some were removed, replaced or added."""
        self._look_again = True
        self._wake.set()

    def make_anew(self) -> None:
        """Throw the index away and fill a new one: what was read from it made no sense."""
        self._state = "building"  # before anybody can find the new one empty
        self._is_open.clear()
        with contextlib.suppress(OSError):
            remove_index(self._path)
        self._wake.set()

    def status(self) -> JsonObject:
        """Return what /api/status shows of the index."""
        with self._lock:
            behind = sum(self._grown.values())
        total, done = self._total + behind, self._done
        line_bytes = self._indexed_bytes / self._indexed if self._indexed else 1000
        return {
            "state": self._state,
            "done": done,
            "total": total,
            "lagEvents": math.ceil(max(0, total - done) / line_bytes),
            "bytes": index_bytes(self._path),
            "fullText": self._full_text,
            "error": self._error or None,
        }

    def wait_until_open(self) -> None:
        """Wait, not for long, while the index is just being opened or made anew."""
        if self._state == "building" and self._thread.is_alive():
            self._is_open.wait(INDEX_OPENS_S)

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._file = IndexFile(self._path)
                self._is_open.set()
                self._full_text = self._file.full_text
                self._state = "building"
                self._look_again = True
                self._fill(self._file)
                if not self._stopping:
                    log.warning("the index is made anew: its files were removed or replaced")
                    self._state = "building"
                    self._close()
                    remove_index(self._path)
            except (sqlite3.Error, OSError) as error:
                self._fail(error)
            except Exception:  # nobody foresaw it; searching the files still works
                log.exception("the index ended unexpectedly")
                self._state, self._error = "off", "it ended unexpectedly, the log tells why"
                self._pause(INDEX_RETRY_S)
            finally:
                self._close()

    def _close(self) -> None:
        self._is_open.clear()
        if self._file is not None:
            with contextlib.suppress(sqlite3.Error):
                self._file.close()
            self._file = None

    def _fail(self, error: Exception) -> None:
        """Begin anew when the file is damaged; wait when it cannot be written."""
        words = str(error)
        if isinstance(error, sqlite3.Error) and not re.search("full|readonly|unable to open|locked", words):
            log.warning("the index is made anew: %s", words)
            self._state = "building"
            self._close()
            with contextlib.suppress(OSError):
                remove_index(self._path)
            self._pause(0.5)
            return
        if words != self._error:
            log.warning("the index cannot be written, searches read the files: %s", words)
        self._state, self._error = "off", words
        self._pause(INDEX_RETRY_S)

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < deadline:
            time.sleep(0.05)

    def _fill(self, file: IndexFile) -> None:
        while not self._stopping and not file.is_gone():
            self._wake.clear()
            with self._lock:
                grown, self._grown = self._grown, {}
            if self._look_again:
                self._look_again = False
                self._compare(file)
            else:
                self._total += sum(grown.values())
                self._read_files(file, sorted(grown))
            if self._stopping or self._look_again:
                continue
            if file.is_gone():
                return
            if self._state != "ready":
                log.info("the index is complete: %d bytes of events", self._done)
            # All is read. What came since is in _grown, and so is what was read before it was told.
            self._total = self._done
            self._state, self._error = "ready", ""
            self._wake.wait(2.0)
            time.sleep(INDEX_GATHER_S)

    def _compare(self, file: IndexFile) -> None:
        """Bring the index to where the files are, the latest day first: what is new is wanted soonest."""
        on_disk = {
            f"{day}/{name}": about
            for day in self._store.days()
            for name, about in stored_files(self._store.root, day)
        }
        known = file.files()
        with file.transaction():
            for name, (file_id, inode, position) in known.items():
                now = on_disk.get(name)
                if now is None or (now.inode and inode and now.inode != inode) or now.size < position:
                    file.forget_file(file_id)
            for day_id in file.worn_days():
                file.forget_day(day_id)
        file.give_back()
        known = file.files()
        self._total = sum(about.size for about in on_disk.values())
        self._done = sum(position for _, _, position in known.values())
        behind = [name for name, now in on_disk.items() if now.size > known.get(name, (0, 0, 0))[2]]
        self._read_files(file, sorted(behind, key=lambda name: name.partition("/")[0], reverse=True))

    def _read_files(self, file: IndexFile, names: Sequence[str]) -> None:
        """Index what was added to some files ("day/name"), in batches of one day each."""
        for day, group in itertools.groupby(names, key=lambda name: name.partition("/")[0]):
            batch = IndexBatch()
            for name in group:
                self._read_file(file, day, name.partition("/")[2], batch)
                if self._stopping or file.is_gone():
                    return
            self._write(file, day, batch)

    def _read_file(self, file: IndexFile, day: str, name: str, batch: IndexBatch) -> None:
        row = file.db.execute(
            "SELECT files.id, position FROM files JOIN days ON days.id = day "
            "WHERE days.name = ? AND files.name = ?",
            (day, name),
        ).fetchone()
        file_id, position = row or (None, 0)
        path = f"{self._store.root}/{day}/{name}"
        try:
            source = open_stored(path)
        except FileNotFoundError:  # removed meanwhile
            self._look_again = True
            return
        with source:
            source.seek(position)
            began = time.monotonic()
            for line in source:
                if not line.endswith(b"\n"):
                    break
                event = self._event_of(line)
                if event is not None:
                    if file_id is None:
                        with file.transaction():
                            file_id = file.add_file(day, name, inode_of(path), event)
                    batch.documents.append(self._document(file, event, file_id, position, line))
                position += len(line)
                batch.size += len(line)
                if file_id is not None:
                    batch.positions[file_id] = position
                if len(batch.documents) % INDEX_SLICE_EVENTS == 0:
                    began = self._yield_to_live_path(began)
                if batch.is_full():
                    self._write(file, day, batch)
                    began = self._yield_to_live_path(began)
                    if self._stopping or file.is_gone():
                        return

    def _yield_to_live_path(self, began: float) -> float:
        """Rest after work that began at `began`, if events are arriving; return when work goes on."""
        now = time.monotonic()
        if now - self._last_live < LIVE_S and not self._stopping:
            time.sleep(min(1.0, (now - began) * (1 - LIVE_SHARE) / LIVE_SHARE))
        return time.monotonic()

    @staticmethod
    def _event_of(line: bytes) -> JsonObject | None:
        try:
            return parse_stored(line)
        except MalformedEvent:  # edited by hand
            return None

    def _document(
        self, file: IndexFile, event: JsonObject, file_id: int, offset: int, line: bytes
    ) -> Document:
        kind = effective_type(event)
        calls = self._unnamed.paired(event, call_facts(event, kind))
        texts: list[str] = []
        for name, value in event["data"].items():
            if name == "tool_calls" and event["hookType"] == "PostToolBatch":
                # Each call has told the same itself; what only its round tells is not in the set.
                told = [
                    call
                    for call in _batch_calls(event)
                    if text_of(call.get("tool_use_id")) not in self._closed_calls
                ]
                collect_texts(told, texts)
            elif name not in _NOT_SEARCHED:
                collect_texts(value, texts)
        if kind in ("tool_result", "tool_error"):
            self._closed_calls.add(text_of(event["data"].get("toolUseId")))
        marks = [
            ("session", event["sessionId"]),
            ("machine", event["machineId"]),
            ("kind", f"{kind}\n{event['hookType']}"),
        ]
        if isinstance(event["data"].get("toolName"), str):
            marks.append(("tool", event["data"]["toolName"]))
        marked = " ".join(f"{_MARK}{file.name_id(mark, name)}" for mark, name in marks)
        return Document(
            event["timestamp"],
            line_seq(line),
            file_id,
            offset,
            len(line),
            fold("\n".join(texts)).replace(_MARK, " ") + "\n" + marked,
            kind != "session_meta",
            _is_persons_prompt(event, kind),
            calls,
            usage_facts(event),
        )

    def _write(self, file: IndexFile, day: str, batch: IndexBatch) -> None:
        if batch.positions:
            with file.transaction():
                file.add(file.day_id(day), batch.documents, batch.positions)
        self._done += batch.size
        self._indexed += len(batch.documents)
        self._indexed_bytes += batch.size
        batch.clear()


class IndexBatch:
    """Events that are read but not yet written to the index."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self.documents: list[Document] = []
        self.positions: dict[int, int] = {}
        self.size = 0
        self._began = time.monotonic()

    def is_full(self) -> bool:
        """Tell whether it is time to write."""
        return (
            len(self.documents) >= INDEX_BATCH_EVENTS
            or self.size >= INDEX_BATCH_BYTES
            or time.monotonic() - self._began > INDEX_BATCH_S
        )


def index_bytes(path: str) -> int:
    """Return how much room the index takes on disk."""
    size = 0
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(OSError):
            size += os.path.getsize(path + suffix)
    return size


# Asking


class IndexReader:
    """A read-only connection for any thread; one question at a time."""

    def __init__(self, path: str, root: str) -> None:
        self._path = path
        self._root = root
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._inodes: tuple[int, ...] = ()
        self._is_full_text = True

    @contextlib.contextmanager
    def _reading(self, budget_s: float) -> Iterator[sqlite3.Connection]:
        """Give a connection that sees one moment of the index; raise sqlite3.Error when there is none."""
        with self._lock:
            inodes = index_inodes(self._path)
            if not inodes[0]:
                raise sqlite3.OperationalError("there is no index")
            if self._db is not None and inodes != self._inodes:
                self._db.close()
                self._db = None
            if self._db is None:
                address = f"file:{urllib.parse.quote(self._path)}?mode=ro"
                self._db = sqlite3.connect(address, uri=True, isolation_level=None, check_same_thread=False)
                self._is_full_text = has_full_text(self._db)
                self._db.execute("PRAGMA cache_size = -32768")  # what statistics read several times fits in
                self._inodes = inodes
            db = self._db
            deadline = time.monotonic() + budget_s
            db.set_progress_handler(lambda: int(time.monotonic() > deadline), 20_000)
            db.execute("BEGIN")
            try:
                yield db
            finally:
                db.set_progress_handler(None, 0)
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def search(self, query: SearchQuery) -> JsonObject:
        """Return one page of what is searched for; raise sqlite3.Error when the index cannot tell."""
        if query.cursor and not re.fullmatch(r"i\d{1,18}", query.cursor):
            raise SearchError("cursor", "the `next` of the page before; search anew")
        below = int(query.cursor[1:]) if query.cursor else None
        with self._reading(SEARCH_BUDGET_S * 2) as db, LineReader(db, self._root) as lines:
            ids = index_candidates(db, query, below, self._is_full_text)
            try:
                return search_page(query, lines.numbered(ids))
            except sqlite3.OperationalError as error:
                if "interrupt" in str(error):
                    raise SearchError(
                        "q", "longer words: so many begin like this that it takes too long"
                    ) from None
                raise

    def statistics(
        self, from_ms: int, to_ms: int, session_id: str | None, offset_minutes: int, prices: PriceList
    ) -> JsonObject:
        """Return the figures of [from_ms, to_ms) in whole quarters of an hour, as /api/stats gives them."""
        with self._reading(60.0) as db, LineReader(db, self._root) as lines:
            return Statistics(db, lines, from_ms, to_ms, session_id, offset_minutes, prices).to_json()


class LineReader:
    """Read events' lines from their files by their number in the index."""

    def __init__(self, db: sqlite3.Connection, root: str) -> None:
        self._db = db
        self._root = root
        self._sources: dict[int, Any] = {}  # file number → open file, None when it is gone

    def __enter__(self) -> LineReader:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._sources.values():
            if source is not None:
                source.close()

    def line(self, number: int) -> bytes | None:
        """Return a line without its newline; None when it is gone."""
        row = self._db.execute("SELECT file, offset, length FROM events WHERE id = ?", (number,)).fetchone()
        if row is None:
            return None
        file_id, offset, length = row
        if file_id not in self._sources:
            self._sources[file_id] = self._open(file_id)
        source = self._sources[file_id]
        if source is None:
            return None
        source.seek(offset)
        line: bytes = source.read(length)
        return line[:-1] if line.endswith(b"\n") and _SEQ.match(line) else None

    def _open(self, file_id: int) -> Any:
        day, name = self._db.execute(
            "SELECT days.name, files.name FROM files JOIN days ON days.id = day WHERE files.id = ?",
            (file_id,),
        ).fetchone()
        try:
            return open_stored(f"{self._root}/{day}/{name}")
        except FileNotFoundError:
            return None

    def numbered(self, numbers: Iterable[int]) -> Iterator[tuple[str, bytes]]:
        """Yield (cursor, line) for each number whose line is there."""
        for number in numbers:
            line = self.line(number)
            if line is not None:
                yield f"i{number}", line


def index_candidates(
    db: sqlite3.Connection, query: SearchQuery, below: int | None, is_full_text: bool
) -> Iterator[int]:
    """Yield the numbers of the events that may be searched for, newest first."""
    # Where more events came than milliseconds passed, numbers ran ahead of timestamps; by no more than that.
    ahead = db.execute("SELECT ifnull(max(ahead), 0) FROM days").fetchone()[0]
    low, high = query.from_ms, query.to_ms + ahead
    if below is not None:
        high = min(high, below)
    match = match_expression(db, query)
    if match is None:
        return
    if not match or not is_full_text:
        rows = db.execute("SELECT id FROM events WHERE id >= ? AND id < ? ORDER BY id DESC", (low, high))
        yield from (number for (number,) in rows)
        return
    yield from _word_candidates(db, query, match, low, high)


def _word_candidates(
    db: sqlite3.Connection, query: SearchQuery, match: str, low: int, high: int
) -> Iterator[int]:
    """Merge what the days' tables of words answer; an older day is asked only when it is reached."""
    sql = "SELECT id, high FROM days WHERE high >= ? AND low < ?"
    parameters: list[Any] = [low, high]
    if query.session_ids is not None and len(query.session_ids) == 1:
        sql += (
            " AND id IN (SELECT day FROM files WHERE session IN "
            "(SELECT id FROM names WHERE kind = 'session' AND name = ?))"
        )
        parameters += map(fit_name, query.session_ids)
    waiting: collections.deque[tuple[int, int]] = collections.deque(
        db.execute(sql + " ORDER BY high DESC", parameters)
    )
    heads: list[tuple[int, int, Iterator[tuple[int]]]] = []  # (minus the next number, day, what follows)
    while waiting or heads:
        while waiting and (not heads or waiting[0][1] >= -heads[0][0]):
            day_id, _ = waiting.popleft()
            rows: Iterator[tuple[int]] = db.execute(
                f"SELECT rowid FROM words_{day_id} WHERE words_{day_id} MATCH ? AND rowid >= ? AND rowid < ? "
                "ORDER BY rowid DESC",
                (match, low, high),
            )
            first = next(rows, None)
            if first is not None:
                heapq.heappush(heads, (-first[0], day_id, rows))
        if not heads:
            return
        number, day_id, rows = heads[0]
        yield -number
        following = next(rows, None)
        if following is None:
            heapq.heappop(heads)
        else:
            heapq.heapreplace(heads, (-following[0], day_id, rows))


def match_expression(db: sqlite3.Connection, query: SearchQuery) -> str | None:
    """Return what is searched for in FTS5's language; "" for anything, None when nothing can be found."""
    sessions = query.session_ids
    if sessions is not None and len(sessions) > SESSIONS_MATCHED:
        sessions = None
    parts = []
    for term in query.terms:
        parts += [f'"{word}"' for word in term.words]
        if term.is_prefix:
            parts[-1] += " *"
    for kind, wanted in (
        ("session", sessions),
        ("machine", query.machine and {query.machine}),
        ("tool", query.tool and {query.tool}),
        ("kind", query.kind and {query.kind}),
    ):
        if wanted is None:
            continue
        fitting = {fit_name(name) for name in wanted}
        names = db.execute("SELECT id, name FROM names WHERE kind = ?", (kind,))
        # A kind has two names: ours, and that of the hook.
        numbers = [
            number
            for number, name in names
            if not fitting.isdisjoint(name.split("\n") if kind == "kind" else (name,))
        ]
        if not numbers:
            return None
        parts.append("(" + " OR ".join(f'"{_MARK}{number}"' for number in numbers) + ")")
    return " AND ".join(parts)


class Statistics:
    """The figures of a stretch of time, of all sessions or of one, counted in quarters of an hour."""

    def __init__(
        self,
        db: sqlite3.Connection,
        lines: LineReader,
        from_ms: int,
        to_ms: int,
        session_id: str | None,
        offset_minutes: int,
        prices: PriceList,
    ) -> None:
        self._db = db
        self._lines = lines
        self._prices = prices
        self._session_id = session_id
        self._offset_minutes = offset_minutes
        first, last = db.execute("SELECT min(quarter), max(quarter) FROM activity").fetchone()
        self._from, self._to = from_ms // QUARTER_MS, -(-to_ms // QUARTER_MS)
        shown_from = max(self._from, first or 0)
        self._shown = (shown_from, max(shown_from, min(self._to, (last or -1) + 1)))
        self._names: dict[int, str] = dict(db.execute("SELECT id, name FROM names"))
        self._bounds: tuple[Any, ...] = (self._from, self._to)
        self._where = "quarter >= ? AND quarter < ?"
        if session_id is not None:
            self._where += " AND session = ?"
            found = db.execute(
                "SELECT id FROM names WHERE kind = 'session' AND name = ?", (fit_name(session_id),)
            ).fetchone()
            self._bounds += (found[0] if found else -1,)

    def to_json(self) -> JsonObject:
        """Return everything."""
        sums = self._sums()
        tools = list(self._tools())
        return {
            "from": self._shown[0] * QUARTER_MS,
            "to": self._shown[1] * QUARTER_MS,
            "utcOffset": self._offset_minutes,
            "session": self._session_id,
            **sums,
            "tools": [figures for figures, _ in tools],
            "slowest": self._slowest(call for _, slowest in tools for call in slowest),
            "failing": self._failing(),
        }

    def _tools(self) -> Iterator[tuple[JsonObject, list[tuple[int, int, int]]]]:
        """Yield each tool's figures and its slowest calls (duration, outcome, event), most calls first."""
        ends: dict[int, dict[int, int]] = collections.defaultdict(dict)
        for tool, outcome, count in self._db.execute(
            f"""SELECT tool, outcome, count(*) FROM calls INDEXED BY calls_by_tool
            WHERE outcome <> {Outcome.OK:d} AND {self._where} GROUP BY tool, outcome""",
            self._bounds,
        ):
            ends[tool][outcome] = count
        rows = self._db.execute(
            f"""SELECT tool, count(*), count(duration), ifnull(sum(duration), 0)
            FROM calls INDEXED BY calls_by_tool WHERE {self._where} GROUP BY tool""",
            self._bounds,
        ).fetchall()
        for tool, calls, timed, total in sorted(rows, key=lambda row: (-row[1], self._names[row[0]])):
            slowest = self._slowest_of(tool)
            yield (
                {
                    "toolName": self._names[tool],
                    "calls": calls,
                    "failures": ends[tool].get(Outcome.FAILED, 0)
                    + ends[tool].get(Outcome.FAILED_BY_ROUND, 0),
                    "interrupted": ends[tool].get(Outcome.INTERRUPTED, 0),
                    "unfinished": ends[tool].get(Outcome.OPEN, 0),
                    "timed": timed,
                    "p50Ms": self._percentile(tool, timed, 50),
                    "p95Ms": self._percentile(tool, timed, 95),
                    "maxMs": slowest[0][0] if slowest else None,
                    "totalMs": total,
                },
                slowest,
            )

    def _slowest_of(self, tool: int) -> list[tuple[int, int, int]]:
        return self._db.execute(
            f"""SELECT duration, outcome, event FROM calls INDEXED BY calls_by_tool
            WHERE tool = ? AND duration IS NOT NULL AND {self._where}
            ORDER BY duration DESC LIMIT {EXTREMES}""",
            (tool, *self._bounds),
        ).fetchall()

    def _percentile(self, tool: int, count: int, percent: int) -> int | None:
        """Return the duration that so many percent of the calls do not exceed (the nearest rank)."""
        if not count:
            return None
        row = self._db.execute(
            f"""SELECT duration FROM calls INDEXED BY calls_by_tool WHERE tool = ? AND duration IS NOT NULL
            AND {self._where} ORDER BY duration LIMIT 1 OFFSET ?""",
            (tool, *self._bounds, -(-count * percent // 100) - 1),
        ).fetchone()
        return int(row[0])

    def _slowest(self, calls: Iterable[tuple[int, int, int]]) -> list[JsonObject]:
        found = []
        for duration, outcome, number in heapq.nlargest(EXTREMES, calls):
            event = self._event(number)
            if event is not None:
                failed = outcome in (Outcome.FAILED, Outcome.FAILED_BY_ROUND)
                found.append({"durationMs": duration, "failed": failed, **_example(event)})
        return found

    def _failing(self) -> list[JsonObject]:
        rows = self._db.execute(
            f"""SELECT target, count(*), max(event) FROM calls INDEXED BY calls_failed
            WHERE outcome IN (1, 3) AND {self._where} GROUP BY tool, target
            ORDER BY 2 DESC, 3 DESC LIMIT {EXTREMES}""",
            self._bounds,
        ).fetchall()
        marks = ",".join("?" * len(rows))
        calls = dict(
            self._db.execute(
                f"""SELECT target, count(*) FROM calls INDEXED BY calls_by_target
                WHERE target IN ({marks}) AND {self._where} GROUP BY target""",
                (*(target for target, _, _ in rows), *self._bounds),
            )
        )
        found = []
        for target, failures, number in rows:
            event = self._event(number)
            if event is not None:
                last_error = one_line(without_colours(text_of(event["data"].get("error"))), 300)
                counts = {"failures": failures, "calls": calls.get(target, failures)}
                found.append({**counts, "lastError": last_error, **_example(event)})
        return found

    def _event(self, number: int) -> JsonObject | None:
        line = self._lines.line(number)
        try:
            return parse_stored(line) if line is not None else None
        except MalformedEvent:
            return None

    # Sums: cells of one session and one hour of the clock on the wall, added up by session and by hour

    def _sums(self) -> JsonObject:
        by_session: dict[int, Sums] = collections.defaultdict(Sums)
        by_hour: dict[int, Sums] = collections.defaultdict(Sums)
        places: dict[int, tuple[int, int]] = {}  # session → (machine, project)
        for session, machine, project, hour, events, prompts, first, last in self._activity():
            places.setdefault(session, (machine, project))
            for sums in (by_session[session], by_hour[hour]):
                sums.add_activity(session, events, prompts, first, last)
        for session, hour, calls, failures in self._calls():
            if session not in places:
                places[session] = self._place_of(session)
            for sums in (by_session[session], by_hour[hour]):
                sums.add_calls(session, calls, failures)
        models: dict[int, ModelUsage] = {}
        for session, model, quarter, used in self._usage():
            models[model] = add_usage(models.get(model), used)
            if session not in places:
                places[session] = self._place_of(session)
            for sums in (by_session[session], by_hour[(quarter * 15 + self._offset_minutes) // 60]):
                sums.add_usage(session, self._names[model], used)
        groups = self._groups(by_session, by_hour, places)
        by_model = sorted(models.items(), key=lambda item: (-sum(item[1].all), item[0]))
        return {
            "models": [
                {"model": self._names[key], **self._tokens_json({self._names[key]: used})}
                for key, used in by_model
            ],
            **self._sums_json({**groups, "session": by_session}, places),
        }

    def _groups(
        self,
        by_session: Mapping[int, Sums],
        by_hour: Mapping[int, Sums],
        places: Mapping[int, tuple[int, int]],
    ) -> dict[str, dict[Any, Sums]]:
        """Add up sessions by machine and project, hours (since the epoch, of the viewer) by day and time."""
        groups: dict[str, dict[Any, Sums]] = collections.defaultdict(lambda: collections.defaultdict(Sums))
        for session, sums in by_session.items():
            machine, project = places[session]
            for group, key in (("all", None), ("machine", machine), ("project", project)):
                groups[group][key].merge(sums)
        for hour, sums in by_hour.items():
            utc_ms = hour * 3_600_000 - self._offset_minutes * 60_000
            for group, key in (("day", hour // 24), ("hour", hour % 24), ("time", utc_ms)):
                groups[group][key].merge(sums)
        return groups

    def _usage(self) -> Iterator[tuple[int, int, int, ModelUsage]]:
        """Yield (session, model, quarter, used in it): what the totals grew by that sessions tell."""
        where = "quarter < ?" + (" AND session = ?" if self._session_id is not None else "")
        rows = self._db.execute(
            f"""SELECT session, model, quarter, {", ".join(f"max({name})" for name in IndexFile._COUNTS)}
            FROM usage JOIN files ON files.id = file WHERE {where}
            GROUP BY session, model, quarter ORDER BY session, model, quarter""",
            self._bounds[1:],
        )
        of: tuple[int, int] | None = None
        before: list[int] = []
        for session, model, quarter, *counts in rows:
            if (session, model) != of:
                of, before = (session, model), [0] * len(counts)
            grown = [max(0, now - then) for now, then in zip(counts, before)]
            before = [max(now, then) for now, then in zip(counts, before)]
            if quarter >= self._from:
                yield session, model, quarter, ModelUsage(Tokens(*grown[:5]), Tokens(*grown[5:]))

    def _tokens_json(self, usage: dict[str, ModelUsage]) -> JsonObject:
        told = SessionUsage(0, usage)
        return {
            "tokenUsage": told.to_json() if usage else None,
            "estimatedCostUsd": self._prices.estimate(told) if usage else None,
        }

    def _group_json(self, sums: Sums) -> JsonObject:
        return {**sums.to_json(), **self._tokens_json(sums.usage)}

    def _sums_json(
        self, groups: Mapping[str, Mapping[Any, Sums]], places: Mapping[int, tuple[int, int]]
    ) -> JsonObject:
        by_size = {
            name: sorted(groups.get(name, {}).items(), key=lambda item: (-item[1].events, item[0]))
            for name in ("project", "machine")
        }
        latest = sorted(groups["session"].items(), key=lambda item: (-item[1].last, item[0]))[
            :COMPARED_SESSIONS
        ]
        hours, times = groups.get("hour", {}), groups.get("time", {})
        return {
            "totals": self._group_json(groups.get("all", {}).get(None, Sums())),
            "projects": [
                {"project": self._names[key], **self._group_json(sums)} for key, sums in by_size["project"]
            ],
            "machines": [
                {"machineId": self._names[key], **self._group_json(sums)} for key, sums in by_size["machine"]
            ],
            "days": [
                {"day": day_of(day * 86_400_000), **self._group_json(sums)}
                for day, sums in sorted(groups.get("day", {}).items())
            ],
            "hours": [{"hour": hour, **hours.get(hour, Sums()).of_hour()} for hour in range(24)],
            "timeline": [{"time": time_ms, **sums.of_hour()} for time_ms, sums in sorted(times.items())],
            "sessions": [
                {
                    "sessionId": self._names[session],
                    "label": None,
                    "machineId": self._names[places[session][0]],
                    "project": self._names[places[session][1]],
                    "start": sums.first,
                    "end": sums.last,
                    **{name: value for name, value in self._group_json(sums).items() if name != "sessions"},
                }
                for session, sums in latest
            ],
        }

    def _activity(self) -> Iterator[tuple[int, ...]]:
        yield from self._db.execute(
            f"""SELECT session, machine, project, (quarter * 15 + {self._offset_minutes}) / 60 AS hour,
            sum(events), sum(prompts), min(first), max(last)
            FROM activity JOIN files ON files.id = file WHERE {self._where}
            GROUP BY file, hour ORDER BY hour DESC""",
            self._bounds,
        )

    def _calls(self) -> Iterator[tuple[int, ...]]:
        # The inner groups are in the order of the index, so that only their few sums are sorted.
        yield from self._db.execute(
            f"""SELECT session, (quarter * 15 + {self._offset_minutes}) / 60 AS hour,
            sum(calls), sum(failures)
            FROM (SELECT session, quarter, count(*) AS calls, sum(outcome IN (1, 3)) AS failures
            FROM calls INDEXED BY calls_by_session WHERE {self._where} GROUP BY session, quarter)
            GROUP BY session, hour""",
            self._bounds,
        )

    def _place_of(self, session: int) -> tuple[int, int]:
        row = self._db.execute("SELECT machine, project FROM files WHERE session = ?", (session,)).fetchone()
        return (int(row[0]), int(row[1]))


def _example(event: JsonObject) -> JsonObject:
    data = event["data"]
    return {
        "toolName": text_of(data.get("toolName")) or "?",
        "target": tool_target(data.get("toolInput"), event["workingDirectory"]),
        "timestamp": event["timestamp"],
        "sessionId": event["sessionId"],
        "seq": event["seq"],
        "eventId": event["id"],
    }


def add_usage(one: ModelUsage | None, other: ModelUsage) -> ModelUsage:
    """Add two amounts of one model's tokens."""
    return other if one is None else ModelUsage(one.all + other.all, one.long_prompts + other.long_prompts)


class Sums:
    """What is added up for a group: a day, a project, a session …"""

    def __init__(self) -> None:
        self.sessions: set[int] = set()
        self.events = self.prompts = self.calls = self.failures = 0
        self.first: int | None = None
        self.last = 0
        self.usage: dict[str, ModelUsage] = {}

    def add_usage(self, session: int, model: str, used: ModelUsage) -> None:
        """Add what one session used of one model in one quarter of an hour."""
        self.sessions.add(session)
        self.usage[model] = add_usage(self.usage.get(model), used)

    def add_activity(self, session: int, events: int, prompts: int, first: int, last: int) -> None:
        """Add what happened in one quarter of an hour of one session."""
        self.sessions.add(session)
        self.events += events
        self.prompts += prompts
        self.first = first if self.first is None else min(self.first, first)
        self.last = max(self.last, last)

    def add_calls(self, session: int, calls: int, failures: int) -> None:
        """Add the calls of one quarter of an hour of one session."""
        self.sessions.add(session)
        self.calls += calls
        self.failures += failures

    def merge(self, other: Sums) -> None:
        """Add what another group has added up."""
        self.sessions |= other.sessions
        self.events += other.events
        self.prompts += other.prompts
        self.calls += other.calls
        self.failures += other.failures
        for model, used in other.usage.items():
            self.usage[model] = add_usage(self.usage.get(model), used)
        if other.first is not None:
            self.first = other.first if self.first is None else min(self.first, other.first)
        self.last = max(self.last, other.last)

    def of_hour(self) -> JsonObject:
        """Return what is shown of an hour."""
        return {"events": self.events, "toolCalls": self.calls, "failures": self.failures}

    def to_json(self) -> JsonObject:
        """Return what is shown of any other group."""
        return {
            "sessions": len(self.sessions),
            "events": self.events,
            "prompts": self.prompts,
            "toolCalls": self.calls,
            "failures": self.failures,
        }


class History:
    """Search and statistics, for any thread: from the index, or from the events when there is none."""

    def __init__(self, store: EventStore | MemoryStore, path: str, prices: PriceList | None = None) -> None:
        self._store = store
        self._prices = prices or PriceList()
        self._indexer = Indexer(store, path) if isinstance(store, EventStore) else None
        self._searcher = IndexReader(path, store.root)
        self._counter = IndexReader(path, store.root)

    def start(self) -> None:
        """Begin to fill the index."""
        if self._indexer is not None:
            self._indexer.start()

    def stop(self) -> None:
        """End the thread and close everything."""
        if self._indexer is not None:
            self._indexer.stop()
        self._searcher.close()
        self._counter.close()

    def grown(self, stored: Sequence[StoredEvent]) -> None:
        """Take note of events that were just stored; for the loop thread."""
        if self._indexer is not None:
            self._indexer.grown(stored)

    def look_again(self) -> None:
        """Take note that files were removed, added or replaced."""
        if self._indexer is not None:
            self._indexer.look_again()

    def status(self) -> JsonObject:
        """Return the index's state, how far it is, and its size."""
        if self._indexer is not None:
            return self._indexer.status()
        nothing = {"done": 0, "total": 0, "lagEvents": 0, "bytes": 0, "fullText": False}
        return {"state": "off", **nothing, "error": "events are kept in memory only"}

    def search(self, query: SearchQuery) -> JsonObject:
        """Return a page of results, newest first; raise SearchError for a search that makes no sense."""
        status = self.status()
        page: JsonObject | None = None
        began_in_files = (query.cursor or "").startswith("s")
        if status["state"] != "off" and not began_in_files:
            try:
                page = self._searcher.search(query)
                page["complete"] = page["complete"] and status["state"] == self.status()["state"] == "ready"
            except sqlite3.Error as error:
                self._complain(error)
        if page is None:
            page = search_page(query, scan_candidates(self._store, query))
        return {**page, "index": status}

    def statistics(self, from_ms: int, to_ms: int, session_id: str | None, offset_minutes: int) -> JsonObject:
        """Return the figures of a stretch of time; raise NoStatistics when there is no index to count in."""
        if self._indexer is not None:
            self._indexer.wait_until_open()
        status = self.status()
        if status["state"] == "off":
            raise NoStatistics(f"statistics need the index: {status['error']}")
        try:
            counted = self._counter.statistics(from_ms, to_ms, session_id, offset_minutes, self._prices)
        except sqlite3.Error as error:
            self._complain(error)
            raise NoStatistics(f"the index cannot be read just now: {error}") from None
        return {**counted, "index": status}

    def _complain(self, error: sqlite3.Error) -> None:
        """Have the index made anew when it is damaged; what is being made anew at this moment is none."""
        log.info("the index could not be asked: %s", error)
        if self._indexer is not None and not isinstance(error, sqlite3.OperationalError):
            self._indexer.make_anew()


class NoStatistics(Exception):
    """Statistics cannot be given now, in words."""


# ---------------------------------------------------------------------------
# Export: stored lines by session, time and words, tool calls as a table
#
# Lines in, lines out; reads event files through a store and knows nothing of who wants them.
# ---------------------------------------------------------------------------

EXPORT_CHUNK_BYTES = 256 << 10
EXPORT_PAGE_EVENTS = 1000  # of one session, read at a time
EXPORT_FORMS = {
    "ndjson": ("application/x-ndjson", "contextuate-events.ndjson"),
    "csv": ("text/csv; charset=utf-8", "contextuate-calls.csv"),
}
CALL_COLUMNS = (
    "time",
    "sessionId",
    "machineId",
    "workingDirectory",
    "agentId",
    "toolName",
    "target",
    "outcome",
    "durationMs",
    "error",
    "toolUseId",
)
_OUTCOME_WORDS = {
    Outcome.OPEN: "unfinished",
    Outcome.FAILED_BY_ROUND: "failed",
    Outcome.OK: "ok",
    Outcome.FAILED: "failed",
    Outcome.INTERRUPTED: "interrupted",
}


def export_lines(
    store: EventStore | MemoryStore, session_id: str | None, from_ms: int, to_ms: int
) -> Iterator[bytes]:
    """Yield stored lines with a timestamp in [from_ms, to_ms), of one session or of all, as they are in the
    files.
    """
    lines = store.all_lines() if session_id is None else _session_lines(store, session_id)
    return (line for line in lines if from_ms <= line_timestamp(line) < to_ms)


def _session_lines(store: EventStore | MemoryStore, session_id: str) -> Iterator[bytes]:
    after = 0
    while page := store.session_lines(session_id, EXPORT_PAGE_EVENTS, after=after):
        yield from page
        after = line_seq(page[-1])


def chosen_lines(store: EventStore | MemoryStore, query: SearchQuery) -> Iterator[bytes]:
    """Yield the stored lines that a query asks for, as they are in the files."""
    only = next(iter(query.session_ids)) if query.session_ids and len(query.session_ids) == 1 else None
    is_one_of_many = query.session_ids is not None and only is None
    is_filtered = query.terms or query.machine or query.tool or query.kind or is_one_of_many
    for line in export_lines(store, only, query.from_ms, query.to_ms):
        with contextlib.suppress(MalformedEvent):
            if not is_filtered or query.takes(parse_stored(line)):
                yield line


def line_timestamp(line: bytes) -> int:
    """Return the timestamp of a stored line."""
    match = _TIMESTAMP.match(line)
    return int(match.group(1)) if match else int(json.loads(line).get("timestamp", 0))


_TIMESTAMP = re.compile(rb'\{"seq":\d+,"received":\d+,"id":"(?:[^"\\]|\\.)*","timestamp":(\d+)')


def in_chunks(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Join lines, each with its newline, into chunks worth sending."""
    chunk: list[bytes] = []
    size = 0
    for line in lines:
        chunk.append(line + b"\n")
        size += len(line) + 1
        if size >= EXPORT_CHUNK_BYTES:
            yield b"".join(chunk)
            chunk, size = [], 0
    if chunk:
        yield b"".join(chunk)


def call_table(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the tool calls in some stored lines as CSV: a row when a call ends, those without an end last."""
    yield _csv_row(CALL_COLUMNS)
    unnamed = UnnamedCalls()
    begun: dict[int, tuple[CallFact, JsonObject]] = {}
    ended: set[int] = set()
    for event in _readable_events(lines):
        for fact in unnamed.paired(event, call_facts(event, effective_type(event))):
            if fact.key in ended:
                continue
            if fact.outcome < Outcome.OK:
                _note_begun(begun, fact, event)
                continue
            ended.add(fact.key)
            earlier = begun.pop(fact.key, None)
            yield _call_row(fact, event, earlier[0] if earlier else None)
    for fact, event in begun.values():
        yield _call_row(fact, event, fact)


def _readable_events(lines: Iterable[bytes]) -> Iterator[JsonObject]:
    for line in lines:
        with contextlib.suppress(MalformedEvent):
            yield parse_stored(line)


def _note_begun(begun: dict[int, tuple[CallFact, JsonObject]], fact: CallFact, event: JsonObject) -> None:
    """Keep of a call that has not ended when it began, and the event that tells most of it."""
    earlier = begun.get(fact.key)
    if earlier is None:
        begun[fact.key] = (fact, event)
    elif fact.outcome > earlier[0].outcome:
        begun[fact.key] = (earlier[0]._replace(outcome=fact.outcome), event)


def _call_row(fact: CallFact, event: JsonObject, earlier: CallFact | None) -> bytes:
    start = earlier.start if earlier else fact.start
    duration = fact.duration
    if duration is None and earlier is not None and fact.finish is not None:
        duration = max(0, fact.finish - earlier.start)
    call = _call_content(fact, event)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(start / 1000))
    failed = fact.outcome in (Outcome.FAILED, Outcome.FAILED_BY_ROUND, Outcome.INTERRUPTED)
    values = (
        f"{stamp}.{start % 1000:03d}Z",
        event["sessionId"],
        event["machineId"],
        event["workingDirectory"],
        event.get("agentId", ""),
        fact.tool,
        tool_target(call.get("toolInput"), event["workingDirectory"]),
        _OUTCOME_WORDS[fact.outcome],
        duration if duration is not None else "",
        without_colours(text_of(call.get("error"))) if failed else "",
        text_of(call.get("toolUseId")),
    )
    return _csv_row(values)


def _call_content(fact: CallFact, event: JsonObject) -> JsonObject:
    """Return what an event holds of a call: `data`, or of the event of a round the part about this call."""
    names = {"toolInput": "tool_input", "toolUseId": "tool_use_id", "error": "tool_response"}
    for call in _batch_calls(event):
        if stable_hash(event["sessionId"], text_of(call.get("tool_use_id"))) == fact.key:
            return {name: call.get(its_name) for name, its_name in names.items()}
    data: JsonObject = event["data"]
    return data


def _csv_row(values: Iterable[Any]) -> bytes:
    """Return one row; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    row = io.StringIO()
    texts = [
        f"'{value}" if isinstance(value, str) and value[:1] in set("=+-@\t\r") else value for value in values
    ]
    csv.writer(row, lineterminator="").writerow(texts)
    return row.getvalue().encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------------------
# Retention: whole days of events go, the oldest first, until what is left is young and small enough
#
# Owns: the decision which files go, and their end. Knows: the files of our directory. Today's never go.
# What a kill kept from being done is planned again the next time.
# ---------------------------------------------------------------------------

RETENTION_INTERVAL_S = 60.0


class RetentionPlan(NamedTuple):
    """What is to be deleted, and what there is; sizes in bytes."""

    paths: tuple[str, ...]  # event files
    size: int  # of these files
    total: int  # of every file of ours
    events: int  # of all event files
    index_size: int
    oldest_day: str | None  # that stays
    closed_days: tuple[str, ...]  # to which no event can come any more

    @property
    def days(self) -> list[str]:
        """Return the days that lose files."""
        return sorted({os.path.basename(os.path.dirname(path)) for path in self.paths})

    def to_json(self, dry_run: bool) -> JsonObject:
        """Return what `prune` tells."""
        sessions = {os.path.basename(path) for path in self.paths}
        counts = {"files": len(self.paths), "sessions": len(sessions), "bytes": self.size}
        return {"days": self.days, **counts, "dryRun": dry_run}


def plan_retention(
    home: str, time_ms: int, days: int | None, limit_bytes: int | None, kept_names: frozenset[str]
) -> RetentionPlan:
    """Choose what goes: what is older than `days`, then more, until everything of ours is within the limit.

    Files called like those of pinned sessions (`kept_names`) stay.
    """
    store = EventStore(os.path.join(home, "events"))
    sizes = {day: dict(stored_files(store.root, day)) for day in store.days()}
    events = sum(about.bytes_on_disk for files in sizes.values() for about in files.values())
    # What a day's events free in the index comes a little later, but it belongs to them.
    index_size = index_bytes(os.path.join(home, "index.db"))
    total = bytes_below(home)  # after its parts, which grow meanwhile
    with_index = 1 + index_size / max(1, events)
    first_kept = day_of(time_ms - days * 86_400_000) if days is not None else ""
    today = day_of(time_ms)
    paths: list[str] = []
    size, left, oldest = 0, float(total), None
    for day, files in sizes.items():
        is_over = limit_bytes is not None and left > limit_bytes
        going = {name: it.bytes_on_disk for name, it in files.items() if name not in kept_names}
        goes = going and day < today and (day < first_kept or is_over)
        if not goes or not arrived_first(store, day, [later for later in sizes if day < later < today]):
            going = {}
        if len(going) < len(files):
            oldest = oldest or day
        paths += (f"{store.root}/{day}/{name}" for name in going)
        size += sum(going.values())
        left -= sum(going.values()) * with_index
    closed = tuple(day for day in sizes if day < today)
    return RetentionPlan(tuple(paths), size, total, events, index_size, oldest, closed)


def arrived_first(store: EventStore, day: str, later_days: Sequence[str]) -> bool:
    """Tell whether all of a day's events came before those of later days.

    If not, the clock was wrong when they came, and the day is not as old as it is called.
    """
    last = max(map(last_seq, store.day_paths(day)), default=0)
    return all(first_seq(path) > last for later in later_days for path in store.day_paths(later)[:1])


def carry_out(home: str, plan: RetentionPlan) -> frozenset[str]:
    """Delete what was planned; return the names of session files of which no day is left."""
    if plan.paths:
        remember_seq(home, max(next(map(line_seq, lines_back(path)), 0) for path in plan.paths))
    for path in plan.paths:
        for kept_as in (path, path + PACKED, path + PACKED + ".tmp"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(kept_as)
    store = EventStore(os.path.join(home, "events"))
    for day in plan.closed_days:  # also those that a kill left empty the last time
        with contextlib.suppress(OSError):  # it has files
            os.rmdir(f"{store.root}/{day}")
    names = frozenset(os.path.basename(path) for path in plan.paths)
    return names - {name for day in store.days() for name, _ in stored_files(store.root, day)}


def files_to_pack(root: str, time_ms: int, days: int) -> list[str]:
    """Return the plain files of days that were closed at least `days` days ago."""
    last = day_of(time_ms - days * 86_400_000)
    return [
        f"{root}/{day}/{name}"
        for day in EventStore(root).days()
        if day < last
        for name, about in stored_files(root, day)
        if about.inode
    ]


def remember_seq(home: str, seq: int) -> None:
    """Keep the highest number that goes with its file; given again, it would hide events from clients."""
    path = os.path.join(home, "last-seq")
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        seq = max(seq, int(file.read(20)))
    with contextlib.suppress(OSError):
        emit_event.write_atomically(path, b"%d\n" % seq)


def bytes_below(path: str) -> int:
    """Return the size of every file below a directory."""
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


class DiskUse:
    """How much room our files take: measured with each plan; what comes and goes in between is added up.

    For the loop thread.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.events_added = 0  # bytes since the start, less what the user deleted
        self._limit_bytes = limit_bytes
        self._plan: RetentionPlan | None = None
        self._deleted = 0
        self._added_before = 0
        self._error: str | None = None

    def measured(self, plan: RetentionPlan, was_carried_out: bool, events_added: int) -> None:
        """Take what a plan has measured; `events_added` is from when it began to."""
        self._plan, self._deleted = plan, plan.size if was_carried_out else 0
        self._added_before, self._error = events_added, None

    def failed(self, words: str) -> None:
        """Note why nothing can be measured or deleted."""
        self._error = words

    def to_json(self, index_size: int) -> JsonObject | None:
        """Return what the status shows, None before the first measurement; `index_size` is that of now."""
        plan = self._plan
        if plan is None:
            return {"error": self._error} if self._error else None
        since = self.events_added - self._added_before - self._deleted
        return {
            "bytes": max(0, plan.total - plan.index_size + since + index_size),
            "limitBytes": self._limit_bytes,
            "eventsBytes": max(0, plan.events + since),
            "indexBytes": index_size,
            "oldestDay": plan.oldest_day,
            "error": self._error,
        }


# ---------------------------------------------------------------------------
# Metrics: what /metrics tells, in the text form of Prometheus
#
# Owns: counts since the start. Knows: what an event says; everything else is handed to it when it is asked.
# ---------------------------------------------------------------------------

DURATION_BUCKETS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
LABELS_LIMIT = 500  # of one metric; what other programs make up beyond that counts as "other"


class EventCounts:
    """Counts of events, failures and durations since the start; for the loop thread."""

    def __init__(self) -> None:
        self.events: dict[tuple[str, str], int] = {}  # (machine, our type) → events
        self.failures: dict[str, int] = {}  # tool → calls that failed
        self.durations: dict[str, list[int]] = {}  # tool → calls in each bucket, the last one without end
        self.duration_sums_ms: dict[str, float] = {}

    def note(self, event: JsonObject) -> None:
        """Count one event."""
        kind = effective_type(event)
        key = (event["machineId"], kind)
        key = key if key in self.events or len(self.events) < LABELS_LIMIT else ("other", "other")
        self.events[key] = self.events.get(key, 0) + 1
        if kind not in ("tool_result", "tool_error"):
            return
        data = event["data"]
        tool = text_of(data.get("toolName")) or "?"
        tool = tool if tool in self.durations or len(self.durations) < LABELS_LIMIT else "other"
        buckets = self.durations.setdefault(tool, [0] * (len(DURATION_BUCKETS_S) + 1))
        if kind == "tool_error":
            self.failures[tool] = self.failures.get(tool, 0) + 1
        duration = data.get("durationMs")
        if is_duration(duration):
            buckets[bisect.bisect_left(DURATION_BUCKETS_S, duration / 1000)] += 1
            self.duration_sums_ms[tool] = self.duration_sums_ms.get(tool, 0) + duration


class MetricsText:
    """Write metrics one after the other."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(
        self, name: str, kind: str, about: str, values: Iterable[tuple[Mapping[str, str], float]]
    ) -> None:
        """Add one metric with its values by labels; one without values is left out."""
        lines = [_sample(name, labels, value) for labels, value in values]
        if lines:
            self._lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}", *lines]

    def add_histogram(self, name: str, about: str, counts: EventCounts) -> None:
        """Add the durations of tool calls, in seconds."""
        if counts.durations:
            self._lines += [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
        for tool, buckets in sorted(counts.durations.items()):
            reached = 0
            for limit, count in zip((*map(str, DURATION_BUCKETS_S), "+Inf"), buckets):
                reached += count
                self._lines.append(_sample(f"{name}_bucket", {"tool": tool, "le": limit}, reached))
            seconds = counts.duration_sums_ms.get(tool, 0) / 1000
            self._lines.append(_sample(f"{name}_sum", {"tool": tool}, seconds))
            self._lines.append(_sample(f"{name}_count", {"tool": tool}, reached))

    def encode(self) -> bytes:
        """Return the whole text."""
        return ("\n".join(self._lines) + "\n").encode("utf-8", "backslashreplace")


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    shown = ",".join(f'{label}="{_escaped_label(text)}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {value}" if shown else f"{name} {value}"


def _escaped_label(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class QueueFigures(NamedTuple):
    """What waits in memory for others to take it, and how often one was cut off for not taking it."""

    client_bytes: int
    clients_closed: int
    redis_bytes: int  # that Redis brought and the loop has not stored yet


def metrics_text(
    status: JsonObject, counts: EventCounts, states: Mapping[str, int], queues: QueueFigures
) -> bytes:
    """Return everything that can be measured; `states` are sessions by state."""
    text = MetricsText()
    about = {"version": status["version"], "mode": status["mode"], "python": sys.version.split()[0]}
    text.add("contextuate_build_info", "gauge", "What runs here.", [(about, 1)])
    for name, kind, words, value in _single_metrics(status, queues):
        text.add(f"contextuate_{name}", kind, words, [({}, value)])
    events = [
        ({"machine": machine, "type": kind}, count)
        for (machine, kind), count in sorted(counts.events.items())
    ]
    text.add("contextuate_events_total", "counter", "Events stored since the start.", events)
    by_state = [({"state": state}, states.get(state, 0)) for state in SESSION_STATES]
    text.add("contextuate_sessions", "gauge", "Sessions by state.", by_state)
    failures = [({"tool": tool}, count) for tool, count in sorted(counts.failures.items())]
    text.add("contextuate_tool_failures_total", "counter", "Tool calls that failed.", failures)
    text.add_histogram("contextuate_tool_duration_seconds", "Durations of tool calls.", counts)
    for name, field, words in (
        ("last_seen_seconds", "lastSeen", "When a machine was last heard."),
        ("clock_skew_seconds", "clockSkewMs", "How far a machine's clock is off."),
    ):
        values = [
            ({"machine": machine["machineId"]}, machine[field] / 1000)
            for machine in status["machines"]
            if machine[field] is not None
        ]
        text.add(f"contextuate_machine_{name}", "gauge", words, values)
    redis = status["redis"]
    if redis:
        connected = [({"state": redis["state"]}, int(redis["state"] == "connected"))]
        text.add("contextuate_redis_connected", "gauge", "1 when Redis is connected.", connected)
        for name, kind, words, value in (
            ("inbox_bytes", "gauge", "Bytes from Redis that are not stored yet.", queues.redis_bytes),
            ("gaps_total", "counter", "Times events may be missing.", redis["gaps"]),
        ):
            text.add(f"contextuate_redis_{name}", kind, words, [({}, value)])
    return text.encode()


def _single_metrics(status: JsonObject, queues: QueueFigures) -> Iterator[tuple[str, str, str, float]]:
    """Yield (name, kind, words, value) of what has no labels."""
    events, spool, index, disk = status["events"], status["spool"], status["index"], status["disk"]
    yield "start_time_seconds", "gauge", "When the monitor started.", status["startedAt"] / 1000
    yield "received_total", "counter", "Lines that came in.", events["received"]
    yield "duplicates_total", "counter", "Events that were delivered twice.", events["duplicates"]
    yield "quarantined_total", "counter", "Lines that were no events.", events["quarantined"]
    yield "clients", "gauge", "Subscribed WebSocket clients.", status["clients"]
    yield "client_queue_bytes", "gauge", "Bytes queued for WebSocket clients.", queues.client_bytes
    yield "clients_closed_slow_total", "counter", "Clients cut off: they did not read.", queues.clients_closed
    yield "store_ok", "gauge", "1 when events can be written.", int(status["store"]["ok"])
    yield "spool_bytes", "gauge", "Bytes that wait in the spool.", spool["bytes"]
    yield "spool_segments", "gauge", "Files that wait in the spool.", spool["segments"]
    yield "spool_dropped_total", "counter", "Events that full spools dropped.", spool["dropped"]
    yield "index_ready", "gauge", "1 when the index holds everything.", int(index["state"] == "ready")
    yield "index_lag_events", "gauge", "Events that are not yet in the index.", index["lagEvents"]
    yield "index_bytes", "gauge", "Size of the index.", index["bytes"]
    if disk and "bytes" in disk:
        yield "disk_bytes", "gauge", "Size of all our files.", disk["bytes"]


# ---------------------------------------------------------------------------
# Event loop: ingest, WebSocket clients, timers
#
# One thread. Owns: the selector, every socket but HTTP's, and what is queued for clients.
# Knows: bytes, lines and frames; what an event or a message means is the Monitor's business.
# ---------------------------------------------------------------------------

RECEIVE_BYTES = 256 << 10
HEAD_DEADLINE_S = 10.0
PING_INTERVAL_S = 20.0
UNANSWERED_PINGS = 2
CLOSE_DEADLINE_S = 5.0
INGEST_CONNECTIONS = 2048
ANSWER_LIMIT_BYTES = 32 << 20


class Timer:
    """A call that the loop makes later; `cancel` takes it back."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Take the call back; harmless when it has been made."""
        self.callback = None


class EventLoop:
    """Call back when sockets are ready, when time has come, and when other threads ask.

    `turn_end` is called after each round of ready sockets: what one round brought is handled together.
    """

    def __init__(self) -> None:
        self.turn_end: Callable[[], None] = lambda: None
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []  # heap of (time.monotonic, number, timer)
        self._timer_numbers = itertools.count()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()  # appended by any thread
        self._running = False
        self._thread: threading.Thread | None = None
        self._wake_reader, self.wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self.wake_writer.setblocking(False)
        self.watch(self._wake_reader, selectors.EVENT_READ, self._drain_wake_ups)

    def watch(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(ready events)` whenever the socket, which is not watched yet, is ready."""
        self._selector.register(sock, events, callback)

    def wait_for(self, sock: socket.socket, events: int) -> None:
        """Change what a watched socket is to be ready for."""
        self._selector.modify(sock, events, self._selector.get_key(sock).data)

    def forget(self, sock: socket.socket) -> None:
        """Stop watching a socket; harmless when it is not watched."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer:
        """Call back once in `delay_s` seconds."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_numbers), timer))
        return timer

    def call_every(self, interval_s: float, callback: Callable[[], None]) -> None:
        """Call back every `interval_s` seconds, whatever the call before it did."""

        def again() -> None:
            self.call_later(interval_s, again)
            callback()

        self.call_later(interval_s, again)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back in the loop thread; for any thread and for signal handlers."""
        self._calls.append(callback)
        with contextlib.suppress(
            BlockingIOError, OSError
        ):  # full: a wake-up is under way; closed: the loop has ended
            self.wake_writer.send(b"\0")

    def call(self, function: Callable[[], Any], timeout_s: float = 10.0) -> Any:
        """Run `function` in the loop thread and return its result to another thread; raise TimeoutError."""
        if threading.current_thread() is self._thread:
            return function()
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:  # belongs to the caller
                future.set_exception(error)

        self.call_soon(run)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            raise TimeoutError("the monitor is too busy to answer") from None

    def run(self) -> None:
        """Serve until `stop`."""
        self._thread = threading.current_thread()
        self._running = True
        while self._running:
            self._turn()

    def stop(self) -> None:
        """Let `run` return after the turn that is under way."""
        self._running = False

    def close(self) -> None:
        """Let go of the selector and the wake-up sockets."""
        self._selector.close()
        self._wake_reader.close()
        self.wake_writer.close()

    def _turn(self) -> None:
        timeout: float | None = None
        if self._calls:
            timeout = 0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        for key, events in self._selector.select(timeout):
            self._guarded(key.data, events)
        while self._timers and self._timers[0][0] <= time.monotonic():
            timer = heapq.heappop(self._timers)[2]
            if timer.callback:
                self._guarded(timer.callback)
        for _ in range(len(self._calls)):
            self._guarded(self._calls.popleft())
        self._guarded(self.turn_end)

    @staticmethod
    def _guarded(callback: Callable[..., None], *arguments: int) -> None:
        try:
            callback(*arguments)
        except Exception:  # one connection's fault must not stop everybody's stream
            log.exception("unexpected error in the event loop; it goes on")

    def _drain_wake_ups(self, _events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_reader.recv(4096):
                pass


class Listener:
    """Accept connections for one listening socket; pauses when file descriptors run out."""

    def __init__(
        self, loop: EventLoop, sock: socket.socket, accepted: Callable[[socket.socket], None]
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._accepted = accepted
        sock.setblocking(False)
        loop.watch(sock, selectors.EVENT_READ, self._accept)

    def _accept(self, _events: int) -> None:
        for _ in range(128):
            try:
                connection, _address = self.sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.warning("no file descriptor left for a new connection (%s); trying again", error)
                self._loop.forget(self.sock)
                self._loop.call_later(
                    0.2, lambda: self._loop.watch(self.sock, selectors.EVENT_READ, self._accept)
                )
                return
            connection.setblocking(False)
            self._accepted(connection)

    def close(self) -> None:
        """Stop listening."""
        self._loop.forget(self.sock)
        self.sock.close()


class TooLong(NamedTuple):
    """A line beyond the limit: its first bytes, the rest is thrown away."""

    head: bytes


class LineSplitter:
    """Cut a byte stream into lines; no I/O. A line beyond `limit_bytes` comes out as TooLong, once."""

    def __init__(self, limit_bytes: int = emit_event.LINE_LIMIT_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._pieces: list[bytes] = []  # of the line that is not finished
        self._size = 0
        self._discarding = False  # the rest of a line that was too long

    def feed(self, data: bytes) -> list[bytes | TooLong]:
        """Take bytes; return the lines they finished, without newlines and without empty ones."""
        lines: list[bytes | TooLong] = []
        *finished, rest = data.split(b"\n")
        for piece in finished:
            self._add(piece, lines)
            line = b"".join(self._pieces).strip()
            if line and not self._discarding:
                lines.append(line)
            self._pieces, self._size, self._discarding = [], 0, False
        if rest:
            self._add(rest, lines)
        return lines

    def _add(self, piece: bytes, lines: list[bytes | TooLong]) -> None:
        if self._discarding:
            return
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._limit_bytes:
            lines.append(TooLong(b"".join(self._pieces)[:200]))
            self._pieces, self._size, self._discarding = [], 0, True


class IngestConnection:
    """One program that sends events over the Unix socket, one per line, and gets a byte back for each."""

    def __init__(
        self,
        loop: EventLoop,
        sock: socket.socket,
        received: Callable[[IngestConnection, bytes | TooLong], None],
        closed: Callable[[IngestConnection], None],
    ) -> None:
        self.sock = sock
        self._loop = loop
        self._received = received
        self._closed = closed
        self._splitter = LineSplitter()
        self._at_end = False
        loop.watch(sock, selectors.EVENT_READ, self._read)

    def _read(self, _events: int) -> None:
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for line in self._splitter.feed(data):
            self._received(self, line)
        if not data:
            self._finish()

    def _finish(self) -> None:
        """Take what stands before EOF without a newline as a line, too; close after its acknowledgement."""
        self._at_end = True
        self._loop.forget(self.sock)
        lines = self._splitter.feed(b"\n")
        for line in lines:
            self._received(self, line)
        if not lines:
            self.close()

    def acknowledge(self, count: int) -> None:
        """Tell the sender that `count` more of its lines are safe."""
        try:
            self.sock.send(emit_event.ACKNOWLEDGEMENT * count)
        except BlockingIOError:
            pass  # a sender that never reads its acknowledgements does not want them
        except OSError:
            self.close()
            return
        if self._at_end:
            self.close()

    def close(self) -> None:
        """Let go of the connection; a sender that still waits for an acknowledgement learns that there is
        none.
        """
        if not self._at_end:
            self._loop.forget(self.sock)
        self.sock.close()
        self._closed(self)


class Client:
    """One WebSocket client: what it wants, and what is queued for it. It is small: there may be thousands."""

    __slots__ = (
        "sock", "head", "is_open", "parser", "queue", "queued_bytes", "answer_bytes", "unanswered_pings",
        "closing", "peer_closed", "view", "session_ids", "show_hidden",
    )  # fmt: skip

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = b""  # of the opening handshake, as far as it came
        self.is_open = False  # the handshake is done
        self.parser: FrameParser | None = None  # while a message of the client is coming in
        self.queue: list[memoryview] = []
        self.queued_bytes = 0
        self.answer_bytes = 0  # of those: at most this many are answers to its own requests
        self.unanswered_pings = 0
        self.closing = False  # our close frame is queued or sent: nothing may follow it
        self.peer_closed = False  # its close frame came: the TCP connection ends once ours is out
        self.view: str | None = None  # "full" or "rows" once subscribed
        self.session_ids: set[str] | None = None  # None: all
        self.show_hidden = False

    def wants(self, session_id: str) -> bool:
        """Tell whether the client subscribed to a session."""
        return self.view is not None and (self.session_ids is None or session_id in self.session_ids)


class ClientServer:
    """The WebSocket side: handshakes, frames, pings, bounded queues.

    `admit(request, socket)` raises RequestError to refuse a handshake; `received(client, text)` gets each
    text message; `opened` and `gone` tell about clients.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        admit: Callable[[Request, socket.socket], None],
        opened: Callable[[Client], None],
        received: Callable[[Client, str], None],
        gone: Callable[[Client], None],
        connection_limit: int,
        queue_limit_bytes: int,
    ) -> None:
        self.clients: dict[socket.socket, Client] = {}
        self.closed_slow = 0  # clients that did not read, since the start
        self._loop = loop
        self._admit = admit
        self._opened = opened
        self._received = received
        self._gone = gone
        self._connection_limit = connection_limit
        self._queue_limit_bytes = queue_limit_bytes
        self._listener = Listener(loop, listener, self._accept)
        loop.call_every(PING_INTERVAL_S, self._ping_all)

    # Sending

    def send(self, client: Client, frames: bytes) -> None:
        """Send whole frames to one client, or queue them; one that does not read is closed with 1013."""
        if client.closing:
            return
        if client.queue and client.queued_bytes - client.answer_bytes + len(frames) > self._queue_limit_bytes:
            self._close_slow(client)
            return
        self._write(client, frames)

    def answer(self, client: Client, frames: bytes) -> None:
        """Send what a client asked for; that may be much, and does not count as falling behind while it
        drains.
        """
        if client.closing:
            return
        if client.queue and client.answer_bytes + len(frames) > ANSWER_LIMIT_BYTES:
            self._close_slow(client)
            return
        before = client.queued_bytes
        self._write(client, frames)
        client.answer_bytes += client.queued_bytes - before

    def _close_slow(self, client: Client) -> None:
        self.closed_slow += 1
        log.info("a client does not read; closed until it comes back for what it missed")
        self.close(client, CloseCode.TRY_AGAIN_LATER, "too slow; subscribe again with since")

    def answer_json(self, client: Client, message: JsonObject) -> None:
        """Answer with one message."""
        self.answer(client, encode_frame(Opcode.TEXT, encode_json(message)))

    def broadcast_json(self, message: JsonObject) -> None:
        """Send one message, encoded once, to every subscribed client."""
        if self.clients:
            self.broadcast_events((), encode_frame(Opcode.TEXT, encode_json(message)))

    def broadcast_events(self, stored: Sequence[StoredEvent], frames_for_all: bytes = b"") -> None:
        """Send the events of one turn to everyone who wants them, and after them some frames to everyone.

        Encoded once a view, joined, one call a client.
        """
        if not stored and not frames_for_all:
            return
        frames: dict[str, list[bytes]] = {}
        joined: dict[str, bytes] = {}
        for client in list(self.clients.values()):
            view = client.view
            if view is None:
                continue
            if view not in frames:
                frames[view] = event_frames(stored, view)
                joined[view] = b"".join(frames[view]) + frames_for_all
            if client.session_ids is None:
                self.send(client, joined[view])
                continue
            wanted = [
                frame
                for entry, frame in zip(stored, frames[view])
                if entry.event["sessionId"] in client.session_ids
            ]
            if wanted or frames_for_all:
                self.send(client, b"".join(wanted) + frames_for_all)

    def close(self, client: Client, code: int, reason: str = "") -> None:
        """Begin the closing handshake (RFC 6455 section 7.1.2).

        The connection is cut if it takes too long.
        """
        if client.closing:
            return
        if not client.is_open:
            self._drop(client)
            return
        self._write(client, encode_close(code, reason))
        client.closing = True
        self._loop.call_later(CLOSE_DEADLINE_S, lambda: self._drop(client))
        self._finish_close(client)

    def close_all(self) -> None:
        """Stop listening and say goodbye to every client."""
        self._listener.close()
        for client in list(self.clients.values()):
            self.close(client, CloseCode.GOING_AWAY, "the monitor stops")

    def _write(self, client: Client, data: bytes) -> None:
        sent = 0
        if not client.queue:
            try:
                sent = client.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                self._drop(client)
                return
            if sent == len(data):
                return
            self._loop.wait_for(client.sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
        client.queue.append(memoryview(data)[sent:])
        client.queued_bytes += len(data) - sent

    def _flush(self, client: Client) -> None:
        while client.queue:
            piece = client.queue[0]
            try:
                sent = client.sock.send(piece)
            except BlockingIOError:
                return
            except OSError:
                self._drop(client)
                return
            client.queued_bytes -= sent
            client.answer_bytes = max(0, client.answer_bytes - sent)
            if sent < len(piece):
                client.queue[0] = piece[sent:]
                return
            del client.queue[0]
        self._loop.wait_for(client.sock, selectors.EVENT_READ)
        self._finish_close(client)

    def _finish_close(self, client: Client) -> None:
        """Once both close frames have passed, end our side.

        The rest of the peer's bytes is read until its EOF.
        """
        if client.closing and client.peer_closed and not client.queue:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)

    # Receiving

    def _accept(self, sock: socket.socket) -> None:
        if len(self.clients) >= self._connection_limit:
            with contextlib.suppress(OSError):
                sock.send(
                    refusal(RequestError(503, "too many connections; close some or raise limits.connections"))
                )
            sock.close()
            return
        with contextlib.suppress(OSError):  # the peer may be gone already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = Client(sock)
        self.clients[sock] = client
        self._loop.watch(sock, selectors.EVENT_READ, functools.partial(self._ready, client))
        self._loop.call_later(HEAD_DEADLINE_S, lambda: None if client.is_open else self._drop(client))

    def _ready(self, client: Client, ready: int) -> None:
        if client.sock not in self.clients:
            return  # dropped earlier in this turn
        if ready & selectors.EVENT_WRITE:
            self._flush(client)
        if ready & selectors.EVENT_READ and client.sock in self.clients:
            try:
                data = client.sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(client)
            elif client.is_open:
                self._take_frames(client, data)
            else:
                self._take_head(client, data)

    def _take_head(self, client: Client, data: bytes) -> None:
        client.head += data
        head, end, rest = client.head.partition(b"\r\n\r\n")
        if not end and len(client.head) <= HEAD_LIMIT_BYTES:
            return
        try:
            if len(head) > HEAD_LIMIT_BYTES:
                raise RequestError(431, f"a request head may have {HEAD_LIMIT_BYTES} bytes")
            request = parse_request_head(head)
            self._admit(request, client.sock)
            response = handshake_response(request)
        except RequestError as error:
            with contextlib.suppress(OSError):
                client.sock.send(refusal(error))
            self._drop(client)
            return
        client.head, client.is_open = b"", True
        self._write(client, response)
        self._opened(client)
        self._take_frames(client, rest)

    def _take_frames(self, client: Client, data: bytes) -> None:
        """Act on what the client says; between its messages it needs no parser, which has most memory."""
        parser = client.parser or FrameParser()
        received = parser.feed(data)
        client.parser = None if parser.is_at_rest else parser
        self._take_messages(client, received)

    def _take_messages(self, client: Client, received: Iterable[Received]) -> None:
        for message in received:
            if isinstance(message, Text):
                if not client.closing:
                    self._received(client, message.text)
            elif isinstance(message, Ping):
                self.send(client, encode_frame(Opcode.PONG, message.payload))
            elif isinstance(message, Pong):
                client.unanswered_pings = 0
            elif isinstance(message, Binary):
                self.close(client, CloseCode.UNSUPPORTED_DATA, "messages are JSON text")
            elif isinstance(message, Failure):
                client.peer_closed = True  # its next bytes mean nothing, so its close frame is not waited for
                self.close(client, message.code, message.reason)
            else:
                client.peer_closed = True
                self.close(client, CloseCode.NORMAL if message.code is None else message.code)
                self._finish_close(client)

    def _ping_all(self) -> None:
        for client in list(self.clients.values()):
            if not client.is_open or client.closing:
                continue
            if client.unanswered_pings >= UNANSWERED_PINGS:
                log.info("a client has not answered %d pings; closed", client.unanswered_pings)
                self._drop(client)
                continue
            client.unanswered_pings += 1
            self.send(client, encode_frame(Opcode.PING, b""))

    def _drop(self, client: Client) -> None:
        if self.clients.pop(client.sock, None) is None:
            return
        self._loop.forget(client.sock)
        client.sock.close()
        client.queue.clear()
        if client.is_open:
            self._gone(client)


def event_frames(stored: Iterable[StoredEvent], view: str) -> list[bytes]:
    """Encode each event's message for a view; the full view carries the very bytes that were stored."""
    opcode = Opcode.TEXT  # looking it up for each event takes half as long as the head itself
    messages = [
        b'{"type":"event","seq":%d,"event":%b}'
        % (seq, line if view == "full" else encode_json(event_row(event)))
        for seq, event, line in stored
    ]
    return [frame_head(opcode, len(message)) + message for message in messages]


def refusal(error: RequestError) -> bytes:
    """Encode the HTTP response that refuses a request, JSON body and all."""
    body = encode_json({"error": error.reason})
    reason = http.client.responses.get(error.status, "Refused")
    head = [f"HTTP/1.1 {error.status} {reason}", *(f"{name}: {value}" for name, value in error.headers)]
    if not any(name == "Connection" for name, _ in error.headers):
        head.append("Connection: close")
    head += [
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
    ]
    return "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + body


# ---------------------------------------------------------------------------
# Redis subscriber thread: events from many machines
#
# Owns: one thread at a time with two connections, and the position in the stream. The channel brings an event
# at once, the stream tells which ones there were: it is read from the last position after each confirmation
# of the subscription (redis-py subscribes again without a word) and every few seconds, so whatever the
# channel did not bring is found. The thread receives, parses and hands over; the loop stores.
# ---------------------------------------------------------------------------

SUBSCRIBER_DEADLINE_S = 15.0  # without a sign of life the connection counts as dead
CONNECT_DEADLINE_S = 8.0  # from the start of an attempt to the first confirmation
REDIS_PING_INTERVAL_S = 5.0
STREAM_INTERVAL_S = 5.0
STREAM_HURRY_S = 0.5  # while the channel leaves events out
STREAM_PAGE_EVENTS = 200  # at most; a slow link gets smaller pages
INBOX_LIMIT_BYTES = 16 << 20
INBOX_LINES_A_TURN = 200
STREAM_START = "0-0"
_POSITION = re.compile(r"\d{1,20}-\d{1,20}")
_ID_AT_START = re.compile(rb'\s*\{\s*"id"\s*:\s*"([^"\\]{1,256})"')


class RemoteLine(NamedTuple):
    """One event as Redis brought it; `position` is its id in the stream, None when it came by the channel.

    An empty line with a position only says how far the stream was read; one without was really published.
    """

    line: bytes
    position: str | None

    @property
    def is_marker(self) -> bool:
        """Tell whether it brings no event, only a position."""
        return not self.line and self.position is not None


def position_key(position: str) -> tuple[int, int]:
    """Return what stream ids are ordered by: the time in ms of the clock of Redis, then a number."""
    time_part, _, number = position.partition("-")
    return int(time_part), int(number or 0)


def stream_time(position: str) -> int:
    """Return the time in a stream id, in ms of the clock of Redis."""
    return position_key(position)[0]


def after_position(position: str) -> str:
    """Return the smallest stream id behind `position` (Redis before 6.2 has no exclusive ranges)."""
    time_ms, number = position_key(position)
    return f"{time_ms}-{number + 1}"


class Inbox:
    """What one thread hands to the loop, in order and bounded in bytes; safe for one thread on each side."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._items: collections.deque[RemoteLine] = collections.deque()
        self.size = 0  # bytes
        self._awaited = True  # the loop has seen it empty and wants to be woken

    def put(self, item: RemoteLine, wake: Callable[[], None]) -> bool:
        """Add one item and wake the loop if it waits; False while there is no room."""
        with self._lock:
            if self.size > self._limit_bytes:
                return False
            self._items.append(item)
            self.size += len(item.line)
            awaited, self._awaited = self._awaited, False
        if awaited:
            wake()
        return True

    def head(self, count: int) -> list[RemoteLine]:
        """Return the first items; after an empty list `put` wakes the loop again."""
        with self._lock:
            self._awaited = not self._items
            return list(itertools.islice(self._items, count))

    def drop(self, count: int) -> None:
        """Forget the first items."""
        with self._lock:
            for _ in range(count):
                self.size -= len(self._items.popleft().line)


class Subscription(threading.Thread):
    """One attempt to follow the channel, from connecting to the first error.

    It fills the link's inbox; `heard` is the time (monotonic) of the last sign of life. After a confirmation
    it reads the stream before it reads on from the channel, so that events stay in their order. Later looks
    go up to what the stream held at the look before: by then the channel must have brought it.
    """

    def __init__(self, link: RedisLink, position: str) -> None:
        super().__init__(name="redis subscriber", daemon=True)
        self.heard = time.monotonic()
        self.confirmed = False
        self.abandoned = False
        self._position = position  # of the stream; handed over up to here
        self._horizon = position  # the newest id at the last look
        self._link = link
        self._client: Any = None
        self._seen = SeenIds()  # by the channel
        self._next_ping = 0.0
        self._next_look = 0.0

    def run(self) -> None:
        """Follow the channel until something goes wrong, and tell the link what it was."""
        try:
            self._follow()
        except Exception as error:  # the link puts it into words
            self._link.attempt_ended(self, error)
        finally:
            self._disconnect()

    def abandon(self) -> None:
        """Let go of it, whatever it is doing; for the loop thread."""
        self.abandoned = True
        self._disconnect()

    def _disconnect(self) -> None:
        if self._client is not None:
            with contextlib.suppress(Exception):  # another thread may be using it at this moment
                self._client.connection_pool.disconnect(inuse_connections=True)

    def _follow(self) -> None:
        values = self._link.values
        self._client = emit_event.redis_client(values)
        pubsub = self._client.pubsub()
        pubsub.subscribe(values["redis.channel"])
        while not self.abandoned:
            if pubsub.connection.can_read(timeout=0.5):
                # Only now: get_message with a short timeout would give up in the middle of a long message.
                message = pubsub.get_message(timeout=emit_event.EXCHANGE_DEADLINE_S)
                self.heard = time.monotonic()
                if message is not None:
                    self._take(message)
            now = time.monotonic()
            if self.confirmed and now >= self._next_ping:
                self._next_ping = now + REDIS_PING_INTERVAL_S
                pubsub.ping()
            if self.confirmed and now >= self._next_look:
                self._look_into_stream()

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "subscribe":
            self._link.subscribed(self)
            self._catch_up()
            self.confirmed = True
        elif message["type"] == "message":
            line = message["data"]
            self._seen.add(event_key(line))
            self._hand_over(RemoteLine(line, None))

    def _catch_up(self) -> None:
        """Read everything behind the position, for we cannot know what the channel has left out."""
        if self._link.stream is None:
            return
        with self._reading_stream():
            self._check_position(self._link.stream)
            self._read_stream(self._link.stream, "+")
        self._horizon = self._position
        self._next_look = time.monotonic() + STREAM_INTERVAL_S

    def _look_into_stream(self) -> None:
        """Compare the stream with what the channel has brought; soon again while it leaves things out."""
        if self._link.stream is None:
            self._next_look = math.inf
            return
        found = False
        with self._reading_stream():
            if self._horizon != self._position:
                found = self._read_stream(self._link.stream, self._horizon)
            newest = self._client.xrevrange(self._link.stream, "+", "-", 1)
            self._horizon = newest[0][0].decode("ascii") if newest else self._position
        self._next_look = time.monotonic() + (STREAM_HURRY_S if found else STREAM_INTERVAL_S)

    @contextlib.contextmanager
    def _reading_stream(self) -> Iterator[None]:
        """Tell the link how reading the stream went; a refusal leaves the channel to go on alone."""
        import redis

        try:
            yield
        except redis.ResponseError as error:
            self._link.stream_read(self, error)
        else:
            self._link.stream_read(self, None)
        self.heard = time.monotonic()

    def _read_stream(self, stream: str, last: str) -> bool:
        """Hand over what the stream holds up to `last` and the channel left out; tell if there is any."""
        found = False
        while not self.abandoned:
            count = self._link.page_events
            page = self._client.xrange(stream, after_position(self._position), last, count)
            self._link.page_events = min(STREAM_PAGE_EVENTS, count * 2)
            self.heard = time.monotonic()
            for raw_id, fields in page:
                self._position = raw_id.decode("ascii")
                line = fields.get(b"event", b"")
                if line and event_key(line) not in self._seen:
                    found = True
                    self._hand_over(RemoteLine(line, self._position))
            if page:
                self._hand_over(RemoteLine(b"", self._position))
            if len(page) < count:
                break
        return found

    def _check_position(self, stream: str) -> None:
        """Begin anew when the stream did, and tell when it was cut before we had read it."""
        if self._position == STREAM_START:
            return
        newest = self._client.xrevrange(stream, "+", "-", 1)
        oldest = self._client.xrange(stream, "-", "+", 1)
        if newest and position_key(newest[0][0].decode("ascii")) < position_key(self._position):
            log.warning(
                "Redis: the stream has begun anew since this monitor last read it; it is read from its start"
            )
            self._position = STREAM_START
        elif oldest and position_key(oldest[0][0].decode("ascii")) > position_key(self._position):
            self._link.gap_found(self)

    def _hand_over(self, remote: RemoteLine) -> None:
        """Give one line to the loop; waits while the loop has enough, which is no silence of Redis."""
        while not self.abandoned and not self._link.offer(remote):
            self.heard = time.monotonic()
            time.sleep(0.01)


def event_key(line: bytes) -> str:
    """Return what tells unparsed events apart: the id, or a digest if a line begins with none."""
    match = _ID_AT_START.match(line)
    return match.group(1).decode("utf-8", "replace") if match else hashlib.sha256(line).hexdigest()


class RedisLink:
    """Keep one Subscription alive, hand what it brings to `take`, and know how things stand.

    `take` stores a batch and returns whether it is safe; until it is, the batch is offered again and the
    position stays. After `redis.maxRetries` failed attempts in a row it gives up until `reconnect`. `changed`
    is called when the state did. All but `offer`, `subscribed`, `stream_read`, `gap_found` and
    `attempt_ended`, which are for the subscription's thread, belongs to the loop thread.
    """

    def __init__(
        self,
        loop: EventLoop,
        settings: Settings,
        take: Callable[[Sequence[RemoteLine]], bool],
        changed: Callable[[], None],
    ) -> None:
        self.values = settings.values
        self.page_events = STREAM_PAGE_EVENTS  # how many the subscription asks for at once
        self.stream = f"{settings['redis.channel']}:stream" if settings["redis.streamMaxLength"] else None
        self._loop = loop
        self._take = take
        self._changed = changed
        self._position_path = settings.path("redis-position.json")
        self._position = self._load_position()  # stored up to here
        self._saved_position = self._position
        self._inbox = Inbox(INBOX_LIMIT_BYTES)
        self._subscription: Subscription | None = None
        self._failures = 0  # in a row
        self._retry: Timer | None = None
        self._retry_at: int | None = None  # ms
        self._state = "connecting"
        self._reason: str | None = None
        self._since = now_ms()
        self._stream_reason: str | None = None
        self._heard_ms: int | None = None
        self._gaps = 0
        self._by_channel = 0
        self._by_stream = 0
        loop.call_soon(self.reconnect)
        loop.call_every(0.5, self._supervise)
        loop.call_every(1.0, self._save_position)

    # For the loop thread

    def reconnect(self) -> None:
        """Connect at once, with all attempts before us again."""
        self._failures = 0
        self._begin_attempt()

    def close(self) -> None:
        """Let go of the connection and note the position."""
        self._drop_subscription()
        self._save_position()

    @property
    def inbox_bytes(self) -> int:
        """Return how much was received and is not stored yet."""
        return self._inbox.size

    def status(self) -> JsonObject:
        """Return how things stand, for /api/status; never a password."""
        url = self.values["redis.url"] or ""
        if self._subscription is not None and self._state == "connected":
            self._heard_ms = now_ms() - int((time.monotonic() - self._subscription.heard) * 1000)
        return {
            "state": self._state,
            "server": emit_event.redis_place(self.values),
            "tls": self.values["redis.tls"] or url.startswith("rediss:"),
            "channel": self.values["redis.channel"],
            "stream": self.stream,
            "attempt": self._failures,
            "maxRetries": self.values["redis.maxRetries"],
            "reason": self._reason,
            "since": self._since,
            "nextAttemptAt": self._retry_at,
            "lastHeardAt": self._heard_ms,
            "position": None if self._position == STREAM_START else self._position,
            "streamState": "off" if self.stream is None else "refused" if self._stream_reason else "ok",
            "streamReason": self._stream_reason,
            "gaps": self._gaps,
            "received": self._by_channel,
            "fromStream": self._by_stream,
        }

    def _begin_attempt(self) -> None:
        self._drop_subscription()
        self._enter("connecting", self._reason)
        self._subscription = Subscription(self, self._position)
        self._subscription.start()

    def _drop_subscription(self) -> None:
        """Leave the thread behind; what it has handed over stays in the inbox."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.abandon()
        if self._retry is not None:
            self._retry.cancel()
        self._retry = self._retry_at = None

    def _supervise(self) -> None:
        """End an attempt that shows no sign of life."""
        subscription = self._subscription
        if subscription is None:
            return
        deadline_s = SUBSCRIBER_DEADLINE_S if subscription.confirmed else CONNECT_DEADLINE_S
        if time.monotonic() - subscription.heard > deadline_s:
            self._fail(subscription, emit_event.Overrun(f"no whole answer within {deadline_s:.0f} s"))

    def _fail(self, subscription: Subscription, error: BaseException) -> None:
        """Count a failed attempt or a lost connection; try again in a while or give up."""
        self._drop_subscription()
        self._failures += 1
        self.page_events = max(1, self.page_events // 4)  # perhaps too much for the link to bring in time
        reason = emit_event.redis_trouble(error, self.values, connected=subscription.confirmed)
        most = self.values["redis.maxRetries"]
        if most is not None and self._failures >= most:
            self._enter("given_up", reason)
            log.error("Redis: given up after %d attempts: %s; SIGHUP or Reconnect tries again", most, reason)
            return
        delay_s = emit_event.backoff_s(self._failures)
        self._retry = self._loop.call_later(delay_s, self._begin_attempt)
        self._retry_at = now_ms() + int(delay_s * 1000)
        of = "" if most is None else f" of {most}"
        log.warning("Redis: attempt %d%s: %s; next in %.1f s", self._failures, of, reason, delay_s)
        self._enter("waiting", reason)

    def _enter(self, state: str, reason: str | None) -> None:
        if state != self._state:
            self._since = now_ms()
        self._state, self._reason = state, reason
        self._changed()

    def _note_subscribed(self, subscription: Subscription) -> None:
        if subscription is not self._subscription:
            return
        self._failures = 0
        log.info(
            "Redis: connected to %s, channel %s",
            emit_event.redis_place(self.values),
            self.values["redis.channel"],
        )
        self._enter("connected", None)

    def _note_stream(self, subscription: Subscription, reason: str | None) -> None:
        if subscription is not self._subscription or reason == self._stream_reason:
            return
        self._stream_reason = reason
        if reason:
            log.warning(
                "Redis: the stream cannot be read, so what the channel leaves out is lost: %s", reason
            )
        else:
            log.info("Redis: the stream can be read again")
        self._changed()

    def _note_gap(self, subscription: Subscription) -> None:
        if subscription is not self._subscription:
            return
        self._gaps += 1
        log.warning(
            "Redis: the stream no longer reaches back to %s: events from while this monitor was away may be "
            "missing; a larger redis.streamMaxLength keeps more",
            self._position,
        )
        self._changed()

    def _note_end(self, subscription: Subscription, error: BaseException) -> None:
        if subscription is self._subscription:
            self._fail(subscription, error)

    def _take_some(self) -> None:
        """Store the first lines of the inbox; what cannot be stored stays there and is tried again."""
        batch = self._inbox.head(INBOX_LINES_A_TURN)
        if not batch:
            return
        try:
            safe = self._take([remote for remote in batch if not remote.is_marker])
        except Exception:  # whatever it is: who stops here stops for good
            log.exception("Redis: events could not be taken; trying again")
            safe = False
        if not safe:
            self._loop.call_later(1.0, self._take_some)
            return
        self._inbox.drop(len(batch))
        for remote in batch:
            self._position = remote.position or self._position
            if remote.position is None:
                self._by_channel += 1
            elif not remote.is_marker:
                self._by_stream += 1
        self._loop.call_soon(self._take_some)

    def _load_position(self) -> str:
        """Return how far the stream of this very Redis and channel was read."""
        with contextlib.suppress(OSError, MalformedEvent), open(self._position_path, "rb") as file:
            saved = emit_event.parse_event_line(file.read(4096))
            position = saved.get("position")
            if (
                saved.get("of") == self._stream_name()
                and isinstance(position, str)
                and _POSITION.fullmatch(position)
            ):
                return position
        return STREAM_START

    def _save_position(self) -> None:
        if self._position == self._saved_position:
            return
        content = {"of": self._stream_name(), "position": self._position}
        with contextlib.suppress(OSError):  # full disk: an older position only means reading more again
            emit_event.write_atomically(self._position_path, encode_json(content) + b"\n")
            self._saved_position = self._position

    def _stream_name(self) -> str:
        return f"{emit_event.redis_place(self.values)} {self.stream}"

    # For the subscription's thread

    def offer(self, remote: RemoteLine) -> bool:
        """Take one line for the loop; False while there is no room."""
        return self._inbox.put(remote, lambda: self._loop.call_soon(self._take_some))

    def subscribed(self, subscription: Subscription) -> None:
        """Note a confirmation of the subscription."""
        self._loop.call_soon(lambda: self._note_subscribed(subscription))

    def stream_read(self, subscription: Subscription, error: BaseException | None) -> None:
        """Note that the stream was read, or why not."""
        reason = emit_event.redis_trouble(error, self.values) if error else None
        if reason != self._stream_reason:
            self._loop.call_soon(lambda: self._note_stream(subscription, reason))

    def gap_found(self, subscription: Subscription) -> None:
        """Note that the stream was cut beyond our position."""
        self._loop.call_soon(lambda: self._note_gap(subscription))

    def attempt_ended(self, subscription: Subscription, error: BaseException) -> None:
        """Note why the subscription's thread has ended."""
        self._loop.call_soon(lambda: self._note_end(subscription, error))


# ---------------------------------------------------------------------------
# HTTP: the page, the API, and who may use them
#
# Owns: the HTTP port and its threads, the access rules for both ports, the built-in page.
# A handler thread reads event files itself and asks the loop thread (`Api.ask`) for everything else.
# ---------------------------------------------------------------------------

REQUEST_DEADLINE_S = 10.0
BODY_DEADLINE_S = 60.0
TOKEN_COOKIE = "contextuate_token"


class Access:
    """Decide who may use the ports: Host, Origin, then the peer's user or the token."""

    def __init__(self, auth: str, token: str, own_names: Iterable[str], allowed_hosts: Iterable[str]) -> None:
        self.port = 0  # of the page; set once the port is bound
        self._auth = auth
        self._token = token.encode()
        self._own_names = frozenset(name.lower() for name in own_names)
        self._allowed = frozenset(host.lower() for host in allowed_hosts)

    def check(self, request: Request, sock: socket.socket, port: int, writes: bool = False) -> None:
        """Raise RequestError unless the request may go on; `port` is the one it came to.

        421 for a Host that is not ours (DNS rebinding), 403 for another site's Origin, 401 without a token.
        A request that `writes` needs an Origin of ours or the token, whoever's process sends it.
        """
        host = self.check_host(request, port)
        origin = request.one("origin")
        if origin:
            self._check_origin(origin, host)
        has_token = self.has_token(request)
        if writes and not origin and not has_token:
            raise RequestError(403, "a request that changes something needs the page's Origin or the token")
        if self._auth == "off" or has_token:
            return
        if self._auth == "auto" and same_user_on_loopback(sock):
            return
        raise RequestError(
            401, "a token is needed: `contextuate_monitor.py url --token` prints the link that carries it"
        )

    def has_token(self, request: Request) -> bool:
        """Tell whether the request carries the token, as a bearer header or as the page's cookie."""
        authorization = request.one("authorization")
        if authorization[:7].lower() == "bearer " and self.is_token(authorization[7:].strip()):
            return True
        for value in request.all("cookie"):
            for pair in value.split(";"):
                name, _, content = pair.strip().partition("=")
                if name == f"{TOKEN_COOKIE}_{self.port}" and self.is_token(content):
                    return True
        return False

    def is_token(self, candidate: str) -> bool:
        """Compare with the token in constant time."""
        return hmac.compare_digest(candidate.encode("utf-8", "surrogateescape"), self._token)

    def check_host(self, request: Request, port: int) -> str:
        """Return the name in the Host header if it is ours; raise RequestError(421)."""
        host = request.one("host")
        match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", host)
        if match is not None:
            name, given_port = match[1].lower(), int(match[2]) if match[2] else None
            if self._is_allowed(host.lower(), name, given_port, port) or self._is_own(name, given_port, port):
                return name
        raise RequestError(421, "this Host is not served here; add it to server.allowedHosts if it should be")

    def _is_allowed(self, host: str, name: str, given_port: int | None, port: int) -> bool:
        """Tell whether server.allowedHosts has it: with this very port, or without one for the usual ones."""
        return host in self._allowed or (name in self._allowed and given_port in (None, 80, 443, port))

    def _is_own(self, name: str, given_port: int | None, port: int) -> bool:
        is_ours = is_loopback(name) or name.strip("[]") in self._own_names
        return is_ours and (80 if given_port is None else given_port) == port

    def _check_origin(self, origin: str, host_name: str) -> None:
        """Raise RequestError(403) unless the origin is the dashboard's, under the very name of the Host
        header.
        """
        good = {f"http://{host_name}:{self.port}"}
        if self.port == 80:
            good.add(f"http://{host_name}")
        for allowed in self._allowed:
            if allowed.partition(":")[0] == host_name or allowed == host_name:
                good |= {f"https://{allowed}", f"http://{allowed}"}
        if origin.lower() not in good:
            raise RequestError(403, "requests from other sites are refused")


def same_user_on_loopback(sock: socket.socket) -> bool:
    """Tell whether a TCP connection comes from this machine and, where /proc tells (Linux), from our user."""
    try:
        peer, local = sock.getpeername(), sock.getsockname()
    except OSError:
        return False
    if not is_loopback(peer[0].partition("%")[0].replace("::ffff:", "")):
        return False
    if sys.platform != "linux":
        return True
    return peer_user(peer, local) == os.getuid()


def peer_user(peer: tuple[Any, ...], local: tuple[Any, ...]) -> int | None:
    """Look up the user of the other end of a loopback connection in /proc/net/tcp.

    None if it is not there.
    """
    wanted = (_proc_address(peer), _proc_address(local))
    for table in ("/proc/net/tcp6", "/proc/net/tcp"):
        with contextlib.suppress(OSError), open(table, encoding="ascii") as file:
            for line in file:
                fields = line.split()
                # Their end of the connection is a row of its own: local and remote the other way round.
                if (
                    len(fields) > 7
                    and fields[1] == wanted[0][table]
                    and fields[2] == wanted[1][table]
                    and fields[3] != "06"
                ):
                    return int(fields[7])
    return None


def _proc_address(address: tuple[Any, ...]) -> dict[str, str]:
    """Write an address as both tables of /proc/net do: 32-bit words in machine byte order, port in hex."""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    v4 = ip if ip.version == 4 else getattr(ip, "ipv4_mapped", None)
    packed6 = ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed

    def words(packed: bytes) -> str:
        return "".join(
            f"{int.from_bytes(packed[start : start + 4], sys.byteorder):08X}"
            for start in range(0, len(packed), 4)
        )

    port = f":{address[1]:04X}"
    return {"/proc/net/tcp": words(v4.packed) + port if v4 else "-", "/proc/net/tcp6": words(packed6) + port}


def read_token(path: str) -> str:
    """Return the token in our 0600 file, 192 random bits; make it when there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii", errors="replace") as file:
        token = file.read().strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{32,}", token):
            os.chmod(path, 0o600)
            return token
    token = secrets.token_urlsafe(24)
    emit_event.write_atomically(path, token.encode() + b"\n")
    return token


def own_addresses(host: str) -> list[str]:
    """List the names and addresses under which a server bound to `host` can be reached."""
    if host not in ("0.0.0.0", "::", ""):
        return [host]
    names = {socket.gethostname(), "127.0.0.1"}
    with contextlib.suppress(OSError):
        names.update(
            str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(socket.gethostname(), None)
        )
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        # Connecting a datagram socket sends nothing; it tells which address the way out would use.
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            names.add(probe.getsockname()[0])
    return sorted(name for name in names if ":" not in name or host != "0.0.0.0")


@dataclasses.dataclass
class Response:
    """What a handler answers; `body` is bytes, or an iterator of bytes that is sent as it comes."""

    status: int
    body: bytes | Iterator[bytes]
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


def json_response(value: Any, status: int = 200) -> Response:
    """Answer with JSON."""
    return Response(status, encode_json(value))


class ParameterError(Exception):
    """A query parameter that cannot be used: its name and what was expected."""

    def __init__(self, field: str, expected: str) -> None:
        super().__init__(f"{field}: expected {expected}")
        self.field = field


class Query:
    """The query parameters of a request, checked as they are read."""

    def __init__(self, text: str) -> None:
        self._values = urllib.parse.parse_qs(text, keep_blank_values=True)

    def text(self, name: str) -> str | None:
        """Return a parameter; None when it is missing."""
        values = self._values.get(name)
        return values[-1] if values else None

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """Return an integer parameter within its bounds."""
        text = self.text(name)
        if text is None:
            return default
        if not re.fullmatch(r"\d{1,16}", text) or not low <= int(text) <= high:
            raise ParameterError(name, f"an integer from {low} to {high}")
        return int(text)


class Api:
    """Answer the API's requests. Runs in HTTP threads: reads event files, and asks the loop thread for the
    rest.
    """

    LIMIT = 1000

    def __init__(
        self,
        store: EventStore | MemoryStore,
        ask: Callable[[Callable[[], Any]], Any],
        state: ApiState,
        history: History,
        take: Callable[[bytes], bool],
    ) -> None:
        self._store = store
        self._history = history
        self._ask = ask
        self._state = state
        self._take = take  # an event to be stored at once; tells whether it is safe

    def answer(self, method: str, path: str, query: Query, body: bytes) -> Response:
        """Route one request; raise RequestError or ParameterError for one that cannot be answered."""
        for allowed, pattern, handler in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                if method != allowed:
                    raise RequestError(405, f"{path} takes {allowed}", [("Allow", allowed)])
                arguments = [urllib.parse.unquote(part) for part in match.groups()]
                return handler(self, query, body, *arguments)
        raise RequestError(404, "no such address; the README lists them")

    def _health(self, _query: Query, _body: bytes) -> Response:
        return json_response({"status": "ok", "version": __version__})

    def _status(self, _query: Query, _body: bytes) -> Response:
        return json_response(self._ask(self._state.status))

    def _config(self, _query: Query, _body: bytes) -> Response:
        return json_response(self._ask(self._state.config))

    def _sessions(self, query: Query, _body: bytes) -> Response:
        hidden = query.text("hidden") in ("1", "true")
        return Response(200, self._ask(lambda: self._state.sessions_json(hidden)))

    def _session(self, _query: Query, _body: bytes, session_id: str) -> Response:
        return json_response(self._ask(lambda: self._state.session_json(session_id)))

    def _session_events(self, query: Query, _body: bytes, session_id: str) -> Response:
        limit, before, after = self._page(query)
        lines = self._store.session_lines(session_id, limit + 1, before, after)
        if not lines:
            self._ask(lambda: self._state.session_json(session_id))  # there is no such session perhaps
        return self._events_response(lines, limit, from_start=after is not None)

    def _events(self, query: Query, _body: bytes) -> Response:
        limit, before, _ = self._page(query)
        return self._events_response(self._store.recent_lines(limit + 1, before), limit, from_start=False)

    def _page(self, query: Query) -> tuple[int, int | None, int | None]:
        limit = query.integer("limit", 100, 1, self.LIMIT) or 100
        return limit, query.integer("before", None, 0, 1 << 53), query.integer("after", None, 0, 1 << 53)

    @staticmethod
    def _events_response(lines: list[bytes], limit: int, from_start: bool) -> Response:
        more = len(lines) > limit
        page = (lines[:limit] if from_start else lines[-limit:]) if more else lines
        body = b'{"events":[' + b",".join(page) + b'],"more":' + (b"true}" if more else b"false}")
        return Response(200, body)

    def _event(self, query: Query, _body: bytes, event_id: str) -> Response:
        line = self._store.find(event_id, query.text("session"), query.integer("seq", None, 0, 1 << 53))
        if line is None:
            raise RequestError(404, "no event with this id is stored")
        return Response(200, line)

    def _export(self, query: Query, _body: bytes) -> Response:
        lines = chosen_lines(self._store, self._query(query))
        form = query.text("format") or "ndjson"
        if form not in EXPORT_FORMS:
            raise ParameterError("format", " or ".join(EXPORT_FORMS))
        content_type, file_name = EXPORT_FORMS[form]
        disposition = ("Content-Disposition", f'attachment; filename="{file_name}"')
        table = call_table(lines) if form == "csv" else lines
        return Response(200, in_chunks(table), content_type, (disposition,))

    def _hooks(self, _query: Query, body: bytes) -> Response:
        try:
            emit_event.parse_event_line(body)
        except MalformedEvent as error:
            raise RequestError(400, f"a hook payload is one JSON object: {error}") from None
        if not self._ask(lambda: self._take(body)):
            raise RequestError(503, "the event could not be stored", [("Retry-After", "5")])
        return json_response({})

    def _search(self, query: Query, _body: bytes) -> Response:
        try:
            return json_response(self._history.search(self._query(query)))
        except SearchError as error:
            raise ParameterError(error.field, error.expected) from None

    def _query(self, query: Query) -> SearchQuery:
        """Return the query that a request asks for."""
        wanted = {name: query.text(name) for name in SEARCH_FIELDS}
        numbers = {name: query.integer(name, None, 0, 1 << 53) for name in ("from", "to", "limit")}
        in_state = wanted["state"]
        sessions = self._ask(lambda: self._state.sessions_in_state(in_state)) if in_state else None
        try:
            return search_query({**wanted, **numbers}, sessions)
        except SearchError as error:
            raise ParameterError(error.field, error.expected) from None

    def _stats(self, query: Query, _body: bytes) -> Response:
        start, end = query.integer("from", 0, 0, 1 << 53), query.integer("to", 1 << 53, 0, 1 << 53)
        offset = query.text("utcOffset") or "0"
        if not re.fullmatch(r"-?\d{1,3}", offset) or abs(int(offset)) > 840 or int(offset) % 15:
            raise ParameterError("utcOffset", "minutes east of UTC, from -840 to 840 in steps of 15")
        try:
            figures = self._history.statistics(
                start or 0, end if end is not None else 1 << 53, query.text("session"), int(offset)
            )
        except NoStatistics as error:
            raise RequestError(503, str(error)) from None
        labels = self._ask(self._state.labels)
        for session in figures["sessions"]:
            session["label"] = labels.get(session["sessionId"])
        return json_response(figures)

    def _metrics(self, _query: Query, _body: bytes) -> Response:
        return Response(200, self._ask(self._state.metrics), "text/plain; version=0.0.4; charset=utf-8")

    ROUTES: tuple[tuple[str, str, Callable[..., Response]], ...] = (
        ("GET", r"/health", _health),
        ("GET", r"/api/status", _status),
        ("GET", r"/api/config", _config),
        ("GET", r"/api/sessions", _sessions),
        ("GET", r"/api/sessions/([^/]+)", _session),
        ("GET", r"/api/sessions/([^/]+)/events", _session_events),
        ("GET", r"/api/events", _events),
        ("GET", r"/api/events/([^/]+)", _event),
        ("GET", r"/api/export", _export),
        ("GET", r"/api/search", _search),
        ("GET", r"/api/stats", _stats),
        ("GET", r"/metrics", _metrics),
        ("POST", r"/api/hooks", _hooks),
    )


class ApiState(Protocol):
    """What the API asks in the loop thread; the Overview is one."""

    def status(self) -> JsonObject:
        """Return what /api/status shows."""

    def config(self) -> JsonObject:
        """Return the configuration without secrets."""

    def sessions_json(self, with_hidden: bool) -> bytes:
        """Return what /api/sessions shows: the sessions that are known so far."""

    def session_json(self, session_id: str) -> JsonObject:
        """Return one session; raise RequestError(404), or 503 while it is being loaded."""

    def sessions_in_state(self, state: str) -> frozenset[str]:
        """Return the ids of the sessions that are in a state now."""

    def labels(self) -> dict[str, str]:
        """Return the label of every session."""

    def metrics(self) -> bytes:
        """Return the metrics in the text form of Prometheus."""


BUILT_IN_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,"><title>Contextuate Monitor</title>
<style>
:root{color-scheme:light dark;font:13px/1.5 system-ui,sans-serif}
body{margin:16px;max-width:1100px}
p{border-left:3px solid #b45309;padding-left:8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{text-align:left;padding:2px 12px 2px 0;white-space:nowrap;overflow:hidden;
  text-overflow:ellipsis;max-width:420px}
</style></head><body>
<h1>Contextuate Monitor</h1>
<p>The dashboard file is missing. Copy <code>index.html</code> to <code id="place"></code> and reload;
until then this page shows the bare facts.</p>
<h2>Sessions</h2><table><tbody id="sessions"></tbody></table>
<h2>Latest events</h2><table><tbody id="events"></tbody></table>
<script>
"use strict";
const place = "@PLACE@", wsPort = @WSPORT@, sessions = new Map();
document.getElementById("place").textContent = place;
function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) line.appendChild(document.createElement("td")).textContent = cell ?? "";
  return line;
}
function showSessions() {
  const order = [...sessions.values()].sort((a, b) => b.lastEventTime - a.lastEventTime).slice(0, 50);
  document.getElementById("sessions").replaceChildren(...order.map((s) =>
    row([s.state, s.label, s.machineId,
      s.reason ? s.reason.kind + " " + (s.reason.detail || "") : s.activity])));
}
function showEvent(e) {
  const data = e.data || {}, body = document.getElementById("events");
  body.prepend(row([new Date(e.timestamp).toLocaleTimeString(), e.hookType || e.eventType, data.toolName,
    data.target || data.text]));
  while (body.childElementCount > 100) body.lastChild.remove();
}
function connect() {
  const scheme = location.protocol === "https:" ? "wss://" : "ws://";
  const socket = new WebSocket(scheme + location.hostname + ":" + wsPort + "/");
  socket.onopen = () => {
    for (const message of [{type: "subscribe", view: "rows"}, {type: "get_sessions"},
      {type: "get_all_recent_events", limit: 100}]) socket.send(JSON.stringify(message));
  };
  socket.onmessage = (frame) => {
    const m = JSON.parse(frame.data);
    if (m.type === "sessions" || m.type === "sessions_updated") {
      sessions.clear();
      for (const s of m.sessions) sessions.set(s.sessionId, s);
    } else if (m.type === "session_update") sessions.set(m.session.sessionId, m.session);
    else if (m.type === "session_deleted") sessions.delete(m.sessionId);
    else if (m.type === "event") showEvent(m.event);
    else if (m.type === "all_events") m.events.forEach(showEvent);
    showSessions();
  };
  socket.onclose = () => setTimeout(connect, 1000);
}
connect();
</script></body></html>
"""


class Page:
    """The dashboard: index.html beside the program, else the built-in page.

    With the policy that fits its scripts.
    """

    def __init__(self, folder: str, ws_port: int) -> None:
        self._path = os.path.join(folder, "index.html")
        self._ws_port = ws_port
        self._lock = threading.Lock()
        self._key: tuple[int, int, int] | None = None  # of the file as it was read: inode, size, time
        self._body = b""
        self._sources = ""

    def response(self, host: str) -> Response:
        """Return the page for a request with this Host header."""
        with self._lock:
            self._refresh()
            body, sources = self._body, self._sources
        name = re.sub(r":\d+$", "", host)
        sockets = f"ws://{name}:{self._ws_port} wss://{name}:{self._ws_port} wss://{name}"
        policy = (
            f"default-src 'none'; {sources}; img-src 'self' data:; connect-src 'self' {sockets}; "
            "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
            "require-trusted-types-for 'script'; trusted-types 'none'"
        )
        return Response(200, body, "text/html; charset=utf-8", (("Content-Security-Policy", policy),))

    def _refresh(self) -> None:
        try:
            about = os.stat(self._path)
            key: tuple[int, int, int] | None = (about.st_ino, about.st_size, about.st_mtime_ns)
        except OSError:
            key = None
        if key == self._key and self._body:
            return
        if key is None:
            place = json.dumps(self._path)[1:-1].replace("<", "\\u003c")
            text = BUILT_IN_PAGE.replace("@PLACE@", place).replace("@WSPORT@", str(self._ws_port))
            body = text.encode()
        else:
            with open(self._path, "rb") as file:
                body = file.read()
        self._key, self._body = key, body
        self._sources = "; ".join(f"{kind}-src {self._hashes(kind, body)}" for kind in ("script", "style"))

    @staticmethod
    def _hashes(kind: str, body: bytes) -> str:
        pattern = rb"<%b>(.*?)</%b>" % (kind.encode(), kind.encode())
        digests = [
            base64.b64encode(hashlib.sha256(inline.replace(b"\r\n", b"\n")).digest()).decode()
            for inline in re.findall(pattern, body, re.S)
        ]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


class HttpServer(http.server.ThreadingHTTPServer):
    """The HTTP port: a thread a connection, a bound on their number, and a deadline for request heads."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self, sock: socket.socket, access: Access, page: Page, api: Api, connection_limit: int
    ) -> None:
        super().__init__(sock.getsockname()[:2], RequestHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = sock
        self.server_name, self.server_port = "localhost", sock.getsockname()[1]
        self.access = access
        self.page = page
        self.api = api
        self._places = threading.BoundedSemaphore(connection_limit)
        self._lock = threading.Lock()
        self._awaited: dict[socket.socket, float] = {}  # connection whose request comes in → deadline

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or refuse it when too many are open."""
        if not self._places.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.sendall(refusal(RequestError(503, "too many connections; raise limits.connections")))
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.has_come(request)
            self._places.release()

    def awaits(self, sock: socket.socket, deadline_s: float) -> None:
        """Start the deadline for a request's head, or for its body."""
        with self._lock:
            self._awaited[sock] = time.monotonic() + deadline_s

    def has_come(self, sock: socket.socket) -> None:
        """End that deadline."""
        with self._lock:
            self._awaited.pop(sock, None)

    def service_actions(self) -> None:
        """Cut connections whose head or body drips in beyond its deadline.

        Called by serve_forever about twice a second.
        """
        now = time.monotonic()
        with self._lock:
            overdue = [sock for sock, deadline in self._awaited.items() if deadline < now]
        for sock in overdue:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a handler did not expect; a connection that broke is nothing unexpected."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError, socket.timeout)):
            log.exception("unexpected error in an HTTP request")


SAFE_HEADERS = (
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


class RequestHandler(http.server.BaseHTTPRequestHandler):
    """One HTTP connection."""

    server: HttpServer
    protocol_version = "HTTP/1.1"
    server_version = "contextuate"
    sys_version = ""
    timeout = REQUEST_DEADLINE_S

    def handle_one_request(self) -> None:
        """Read one request under the deadline for heads and answer it."""
        self.server.awaits(self.connection, REQUEST_DEADLINE_S)
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Parse the head, which ends its deadline."""
        parsed = super().parse_request()
        self.server.has_come(self.connection)
        if parsed and self.request_version == "HTTP/0.9":  # it would get an answer without a head
            self.send_error(505, "HTTP/1.0 or newer is needed")
            return False
        return parsed

    def _handle(self) -> None:
        try:
            response = self._answer()
        except ParameterError as error:
            response = json_response({"error": str(error), "field": error.field}, 400)
        except RequestError as error:
            response = Response(
                error.status, encode_json({"error": error.reason}), headers=tuple(error.headers)
            )
            self.close_connection = True
        except TimeoutError as error:
            response = json_response({"error": str(error)}, 503)
        self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _handle

    def _answer(self) -> Response:
        headers = tuple((name.lower(), value.strip()) for name, value in self.headers.items())
        request = Request(self.command, self.path, headers)
        if not self.path.startswith("/"):
            raise RequestError(400, "the request target must be a path")
        path, _, query_text = self.path.partition("?")
        method = "GET" if self.command == "HEAD" else self.command
        access, port = self.server.access, self.server.server_port
        if path == "/" and "token=" in query_text:
            return self._exchange_token(request, Query(query_text))
        access.check(request, self.connection, port, writes=method not in ("GET", "HEAD"))
        body = self._body(request)
        if path in ("/", "/index.html"):
            if method != "GET":
                raise RequestError(405, f"{path} takes GET", [("Allow", "GET")])
            return self.server.page.response(request.one("host"))
        return self.server.api.answer(method, path, Query(query_text), body)

    def _exchange_token(self, request: Request, query: Query) -> Response:
        """Swap the token of a link for a cookie, so that it stays out of the browser's history."""
        access = self.server.access
        self.close_connection = True  # whatever body it may have is not read
        access.check_host(request, self.server.server_port)
        token = query.text("token") or ""
        if not access.is_token(token):
            raise RequestError(
                401,
                "this link's token is not valid here; `contextuate_monitor.py url --token` prints a new one",
            )
        cookie = f"{TOKEN_COOKIE}_{access.port}={token}; HttpOnly; SameSite=Strict; Path=/; Max-Age=31536000"
        return Response(303, b"", "text/plain", (("Location", "/"), ("Set-Cookie", cookie)))

    def _body(self, request: Request) -> bytes:
        if request.all("transfer-encoding"):
            raise RequestError(411, "a body needs a Content-Length")
        length = request.one("content-length") or "0"
        if not re.fullmatch(r"\d{1,12}", length):
            raise RequestError(400, "the Content-Length is malformed")
        if int(length) > emit_event.LINE_LIMIT_BYTES:
            raise RequestError(413, f"a body may have {emit_event.LINE_LIMIT_BYTES} bytes")
        self.server.awaits(self.connection, BODY_DEADLINE_S)
        body = self.rfile.read(int(length))
        self.server.has_come(self.connection)
        if len(body) < int(length):
            raise RequestError(400, "the body ended early")
        return body

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        for name, value in (*self._ends_of(response.body), *SAFE_HEADERS, *response.headers):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(response.body)

    def _ends_of(self, body: bytes | Iterator[bytes]) -> list[tuple[str, str]]:
        """Return the headers that tell where the body ends, and whether the connection does too."""
        headers = []
        if isinstance(body, bytes):
            headers.append(("Content-Length", str(len(body))))
        elif self.request_version != "HTTP/1.0":
            headers.append(("Transfer-Encoding", "chunked"))
        else:
            self.close_connection = True
        if self.close_connection:
            headers.append(("Connection", "close"))
        return headers

    def _send_body(self, body: bytes | Iterator[bytes]) -> None:
        if isinstance(body, bytes):
            self.wfile.write(body)
        elif self.request_version == "HTTP/1.0":
            self.wfile.writelines(body)
        else:
            self.wfile.writelines(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in body)
            self.wfile.write(b"0\r\n\r\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what BaseHTTPRequestHandler refuses in our form."""
        self.close_connection = True
        self.request_version = "HTTP/1.1"
        self.command = getattr(self, "command", None) or "GET"
        self._send(json_response({"error": message or http.client.responses.get(code, "refused")}, code))

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing for each request: a link may carry the token."""


# ---------------------------------------------------------------------------
# The Monitor: what wires them
#
# hook → ingest → event → store → session state → clients, one batch a turn of the loop.
# ---------------------------------------------------------------------------

UPDATE_INTERVAL_S = 0.1
TICK_INTERVAL_S = 1.0
SPOOL_INTERVAL_S = 1.0
SPOOL_LINES_A_TURN = 200
LOAD_SLICE_S = 0.004
LINK_EVERY = 100
CATCH_UP_EVENTS = 2000
HISTORY_LIMIT = 1000
PROCESS_START_SLACK_MS = 5000
LOCK_ATTEMPTS = 25
LOCK_PAUSE_S = 0.02
FRESH_MS = 30_000


class StartError(Exception):
    """The monitor cannot start; the message says why and what to do."""


class Quarantine:
    """Keep what was not one JSON object, for a person to look at."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.count = 0

    def add(self, line: bytes, reason: str) -> None:
        """Count and keep the beginning of one line."""
        self.count += 1
        log.warning("not an event (%s): %r", reason, line[:200])
        try:
            emit_event.keep_in_quarantine(self._path, line, reason)
        except OSError as error:
            log.warning("the quarantine could not be written: %s", error)


class StoredIds:
    """The ids in sessions' files, to tell a second delivery of which SeenIds may no longer know.

    What was read is kept for a while: what is stored in the meantime SeenIds knows.
    """

    LIMIT = 100_000  # ids

    def __init__(self, store: EventStore | MemoryStore) -> None:
        self._store = store
        self._known: dict[str, set[str]] = {}  # session → ids
        self._read_seq = 0  # the store's number when the first of them was read

    def has(self, session_id: str, event_id: str) -> bool:
        """Tell whether a session's files hold an event."""
        count = sum(map(len, self._known.values()))
        if self._store.seq - self._read_seq > REMEMBERED_IDS // 4 or count > self.LIMIT:
            self._known = {}
            self._read_seq = self._store.seq
        if session_id not in self._known:
            try:
                self._known[session_id] = self._store.ids(session_id)
            except OSError as error:  # rather twice than not at all
                log.warning("what is stored of session %s cannot be read: %s", session_id, error)
                self._known[session_id] = set()
        return event_id in self._known[session_id]


class Via(enum.Enum):
    """How an event came: what follows from it for trust, doubles and clocks."""

    LOCAL = "local"  # the socket or POST /api/hooks: our own user, at once
    SPOOL = "spool"  # our own user, late, and perhaps for the second time
    CHANNEL = "channel"  # whoever may publish
    STREAM = "stream"  # the same, perhaps late and for the second time


LATE_MS = 60_000  # in the stream of Redis


class Incoming(NamedTuple):
    """One line that wants to be an event; `sent_ms` is when it was sent on, None if long before."""

    line: bytes
    via: Via
    sent_ms: int | None


class ClockWatch:
    """Notices that the clock on the wall was set, by a clock that nobody sets."""

    def __init__(self) -> None:
        self._first_ms = self._ahead_ms = (
            now_ms() - steady_ms()
        )  # how far the wall is ahead of the steady one

    def step_ms(self) -> int:
        """Return how far the clock was set forward since the last call (below 0: back), 0 if it was not."""
        before_ms, self._ahead_ms = self._ahead_ms, now_ms() - steady_ms()
        step_ms = self._ahead_ms - before_ms
        return int(step_ms) if abs(step_ms) > CLOCK_STEP_MS else 0

    def least_ms(self) -> int:
        """Return what time it is at least, by today's clock and by the one that ran at the start."""
        return int(steady_ms() + min(self._first_ms, now_ms() - steady_ms()))


@dataclasses.dataclass
class Machine:
    """What is known of one machine."""

    events: int = 0  # since the start
    last_seen: int = 0  # ms, our clock
    dropped: int = 0  # events that its spool had no room for
    skew: ClockSkew = dataclasses.field(default_factory=ClockSkew)


def without_authority(event: JsonObject) -> JsonObject:
    """Take away what only our own user may say: events of others rename, hide or delete nothing here."""
    event.pop("demo", None)
    if "session_meta" in (event["eventType"], effective_type(event)):
        event.update(eventType="message", hookType="")  # either name would make it the user's word
    return event


class Arrival(NamedTuple):
    """One line that came in, and the connection that waits for its acknowledgement (None: the spool)."""

    line: bytes
    connection: IngestConnection | None


class HookPort:
    """The Unix socket that hooks send to: takes our own user's connections only, keeps its place.

    `received(connection, line)` gets each line. Raises StartError when another monitor uses the socket.
    """

    def __init__(
        self, loop: EventLoop, path: str, received: Callable[[IngestConnection, bytes | TooLong], None]
    ) -> None:
        self._loop = loop
        self._path = path
        self._received = received
        self._connections: set[IngestConnection] = set()
        otherwise = (
            f"another monitor uses {path} (pid {{pid}}); `kill {{pid}}` ends it, or choose another socketPath"
        )
        self._lock = lock_file(path + ".lock", otherwise)
        self._listening = False
        self._listen()

    def _listen(self) -> None:
        self._listener = Listener(self._loop, bind_unix(self._path), self._accept)
        self._inode = os.stat(self._path).st_ino
        self._listening = True

    def _accept(self, sock: socket.socket) -> None:
        if emit_event.peer_uid(sock) != os.getuid() or len(self._connections) >= INGEST_CONNECTIONS:
            sock.close()
            return
        self._connections.add(IngestConnection(self._loop, sock, self._received, self._connections.discard))

    def look(self) -> None:
        """Put the socket back when something removed it."""
        if self._listening and not os.path.exists(self._path):
            log.warning("%s was removed; it is made anew", self._path)
            self._listener.close()
            self._listen()

    def stop_listening(self) -> None:
        """Take no more connections; those that are there may still send."""
        self._listening = False
        self._listener.close()
        with contextlib.suppress(OSError):
            if os.lstat(self._path).st_ino == self._inode:
                os.unlink(self._path)

    def close(self) -> None:
        """Let go of the connections and of the socket's place."""
        if self._listening:
            self.stop_listening()
        for connection in list(self._connections):
            connection.close()
        unlock_file(self._path + ".lock", self._lock)


class SpoolDrain:
    """Read the spool's segments into the monitor, a few lines a turn.

    A segment is removed when all its events are safe. After a failure it is read again from its beginning;
    ids tell what is stored already.
    """

    def __init__(self, loop: EventLoop, home: str, take: Callable[[Sequence[bytes]], bool]) -> None:
        self.directory = os.path.join(home, "spool")
        self.dropped = 0  # events that the spool had to drop because nobody drained it
        self._home = home
        self._loop = loop
        self._take = take
        self._draining = False
        loop.call_soon(self.look)
        loop.call_every(SPOOL_INTERVAL_S, self.look)

    def look(self) -> None:
        """Begin to drain when there is something."""
        if self._draining:
            return
        if emit_event.lock_is_held(self._home + "/publisher.lock"):
            return  # the mode was changed a moment ago: the publisher sees that and leaves
        try:
            events, _ = emit_event.take_dropped(self.directory)
            if events:
                self.dropped += events
                log.warning("the spool was full: %d events were dropped before the monitor ran", events)
            for path, size in emit_event.spool_segments(self.directory):
                with contextlib.suppress(FileNotFoundError, BlockingIOError):
                    self._drain(emit_event.take_segment(path), size)
                    return
        except OSError as error:
            log.warning("the spool cannot be read: %s", error)

    def _drain(self, path: str, size: int) -> None:
        log.info("draining %s (%d bytes)", os.path.basename(path), size)
        file = open(path, "rb")  # noqa: SIM115 - read over many turns
        self._draining = True
        self._loop.call_soon(lambda: self._drain_some(file, path))

    def _drain_some(self, file: Any, path: str) -> None:
        try:
            lines = [line.strip() for line in itertools.islice(file, SPOOL_LINES_A_TURN)]
            finished = len(lines) < SPOOL_LINES_A_TURN
            safe = self._take([line for line in lines if line])
        except Exception:  # whatever it is: who stops here stops for good
            log.exception("the spool could not be drained; trying again")
            safe = finished = False
        if safe and not finished:
            self._loop.call_soon(lambda: self._drain_some(file, path))
            return
        file.close()
        self._draining = False
        if safe:
            with contextlib.suppress(FileNotFoundError):  # a hook found the spool too large and dropped it
                os.unlink(path)
            self._loop.call_soon(self.look)


@dataclasses.dataclass(eq=False)
class Telling:
    """Sessions that are told their stored events together, in a book of their own until all is told."""

    names: frozenset[str]  # of their files
    book: SessionBook | None = None  # None: not begun
    steps: Iterator[None] = iter(())


class Loader:
    """Rebuild the sessions from the files, the one heard last first, in slices between other work.

    A session appears when all its events are told. What arrives for it until then is only stored: it is told
    when its turn comes in the file, so the state is that of one replay in the order of arrival. Links depend
    on the order of events of several sessions, so those that may be linked are told once more, together.
    """

    def __init__(
        self,
        store: EventStore | MemoryStore,
        book: SessionBook,
        seen: SeenIds,
        loaded: Callable[[Iterable[Session]], None],
    ) -> None:
        self.events = 0  # told so far
        self._store = store
        self._book = book
        self._seen = seen
        self._loaded = loaded
        self._queue: list[Telling] = []  # the next one last
        self._held: dict[str, Telling] = {}  # file name → the telling that is still to be done
        self._touched: set[str] = set()  # file names of held sessions that got live events
        self._points: set[LinkPoint] = set()
        self._together: dict[str, frozenset[str]] = {}  # file name → those it was told together with
        last_seqs = store.last_seqs()
        store.seq = max([store.seq, *last_seqs.values()])
        self._recent_seq = store.seq - REMEMBERED_IDS // 2
        for name in sorted(last_seqs, key=lambda name: last_seqs[name]):
            self._enqueue(frozenset((name,)))
        self._total = len(last_seqs)
        book.complete = not last_seqs

    @property
    def progress(self) -> JsonObject | None:
        """Return how many sessions are complete, of how many; None when all are."""
        return {"done": self._total - len(self._held), "total": self._total} if self._held else None

    def holds(self, session_id: str) -> bool:
        """Tell whether a session is still to be told its stored events; if so, it is now the next one."""
        telling = self._held.get(session_file_name(session_id)) if self._held else None
        if telling is None:
            return False
        if self._queue[-1] is not telling:
            self._queue.remove(telling)
            self._queue.append(telling)
        return True

    def takes(self, event: JsonObject) -> bool:
        """Tell whether a live event, which is stored, will be told to its session out of the file."""
        if not self.holds(event["sessionId"]):
            return False
        self._touched.add(session_file_name(event["sessionId"]))
        return True

    def note(self, session: Session, event: JsonObject) -> None:
        """Note what an event, which its session was told, has to do with links while any are still open."""
        point = link_point(session, event) if self._held else None
        if point is not None:
            self._points.add(point)

    def work(self, seconds: float) -> None:
        """Go on for some time; afterwards `progress` is None if nothing is left to do."""
        deadline = time.monotonic() + seconds
        while self._queue:
            telling = self._queue[-1]
            if telling.book is None:
                kind = SessionBook if len(telling.names) > 1 else ReplayBook
                telling.book = kind(*self._book.patience)
                telling.steps = self._steps(telling.names, telling.book)
            try:
                for _ in telling.steps:
                    if time.monotonic() >= deadline:
                        return
            except OSError as error:
                log.error("stored events cannot be read: %s", error)
            self._finish(telling.names, telling.book)

    def _enqueue(self, names: frozenset[str]) -> None:
        telling = Telling(names)
        self._queue.append(telling)
        self._held.update(dict.fromkeys(names, telling))

    def _steps(self, names: frozenset[str], book: SessionBook) -> Iterator[None]:
        """Tell sessions all that is stored, one event a step; also what is stored meanwhile."""
        told_seq = 0
        while not told_seq or names & self._touched:
            self._touched -= names
            until = self._store.seq
            for line in self._store.lines_of(names, told_seq):
                if line_seq(line) > until:
                    break  # what came before it to another of these sessions may not have been met
                self._tell(book, line)
                yield
            told_seq = max(1, until)

    def _tell(self, book: SessionBook, line: bytes) -> None:
        self.events += 1
        try:
            event = parse_stored(line)
            self.note(book.apply(event), event)
        except MalformedEvent:
            log.warning("a stored line is not an event and was passed over: %r", line[:200])
        except Exception:  # nobody foresaw it: the log tells, and the others are told all the same
            log.exception("a stored event could not be taken into account: %r", line[:200])
        else:
            if line_seq(line) > self._recent_seq:
                self._seen.add(event["id"])

    def _finish(self, names: frozenset[str], book: SessionBook) -> None:
        """Let sessions appear whose events are all told; look for links now and then, and at the end."""
        self._queue.pop()
        for name in names:
            del self._held[name]
            self._together[name] = names
        for session_id in list(book.sessions):
            # Somebody has put its events into another session's file; what its own file tells stands.
            if session_file_name(session_id) not in names and session_id in self._book.sessions:
                book.delete(session_id)
        self._book.take_over(book)
        if len(self._queue) % LINK_EVERY == 0:
            self._tell_linked_together()
        if not self._queue:
            self._book.complete = True
            self._points, self._together = set(), {}
        self._loaded(book.sessions.values())

    def _tell_linked_together(self) -> None:
        """Enqueue those that may be linked and were not told together: at the end all, before it those whose
        number has doubled, so that a long row of sessions is not told again for each.
        """
        at_end = not self._queue
        for group in may_be_linked(self._points):
            names = frozenset(map(session_file_name, group))
            known = max(len(self._together.get(name, ())) for name in names)
            is_told = all(self._together.get(name) == names for name in names)
            if not is_told and not self._held.keys() & names and (at_end or len(names) >= 2 * known):
                self._total += len(names)
                self._enqueue(names)


def loading_words(progress: JsonObject) -> str:
    """Say how far a Loader is."""
    return f"{progress['done']} of {progress['total']} stored sessions have been read"


CATCH_UP_INTERVAL_S = 1.0
CATCH_UP_SESSIONS = 1000
CATCH_UP_PATIENCE = 20  # readings without a new total: one line may be larger than what is read at once


class Behind(NamedTuple):
    """The event that told a session's usage last, and how often reading on has told nothing new since."""

    event: JsonObject
    idle: int


class UsageCatchUp:
    """Read on, a little at a time, where a session's transcripts were too much to be read at its event.

    Without it the totals of a session that says nothing more would stay "at least" for ever. Each reading
    takes no longer than one at an event, which hooks wait for.
    """

    def __init__(self, usage: emit_event.UsageReader) -> None:
        self._usage = usage
        self._behind: dict[str, Behind] = {}  # by session

    def note(self, event: JsonObject) -> None:
        """Take note of how far the transcripts of an event's session were read."""
        if event["hookType"] not in emit_event.USAGE_HOOKS:
            return
        session_id, usage = event["sessionId"], event["data"].get("usage")
        self._behind.pop(session_id, None)
        is_behind = isinstance(usage, dict) and usage.get("partial") is True
        if is_behind and len(self._behind) < CATCH_UP_SESSIONS:
            data = event["data"]
            paths = {name: data.get(name) for name in ("transcriptPath", "agent_transcript_path")}
            self._behind[session_id] = Behind({**event, "data": {**paths, "usage": usage}}, 0)

    def read_on(self) -> JsonObject | None:
        """Read on for one session; return an event with its totals when they are complete."""
        if not self._behind:
            return None
        session_id, (event, idle) = self._behind.popitem()
        before = event["data"].pop("usage")
        self._usage.add_usage(event)
        usage = event["data"].get("usage")
        if usage is None:  # the transcripts are gone
            return None
        if usage.get("partial"):
            idle = idle + 1 if usage == before else 0
            if idle < CATCH_UP_PATIENCE:
                self._behind[session_id] = Behind(event, idle)
            return None
        kept = {name: event[name] for name in ("sessionId", "machineId", "workingDirectory")}
        told = {"action": "usage", "usage": usage}
        return {"eventType": "session_meta", "hookType": "Monitor", **kept, "data": told}


class Intake:
    """Make events of the lines that come in, store each once, and know what came from which machine."""

    def __init__(self, settings: Settings, store: EventStore | MemoryStore) -> None:
        self.received = 0
        self.duplicates = 0
        self.quarantine = Quarantine(settings.path("quarantine.log"))
        self.machines: dict[str, Machine] = {}
        self.seen = SeenIds()
        self._store = store
        self._stored_ids = StoredIds(store)
        self._machine_id = settings.machine_id
        self._privacy = settings.privacy
        # A hook waits for what this thread does, so it reads for 0.1 s at most and goes on at the next event.
        self._usage = emit_event.UsageReader(settings.home, settings.machine_id, limit_s=0.1)
        self.catch_up = UsageCatchUp(self._usage)
        self._agent_notes = emit_event.AgentNoteReader(settings.machine_id)

    @staticmethod
    def _is_late(incoming: Incoming, received_ms: int) -> bool:
        """Tell whether an event may come long after what happened later: its delay says nothing of clocks."""
        if incoming.via is Via.STREAM:
            return received_ms - (incoming.sent_ms or 0) > LATE_MS
        return incoming.via is Via.SPOOL

    def take(self, lines: Sequence[Incoming]) -> tuple[list[bool], list[StoredEvent]]:
        """Store the events of a batch of lines.

        Returns for each line whether nothing more need be done about it, and what was stored.
        """
        received_ms = now_ms()
        events: list[JsonObject] = []
        encoded: list[bytes] = []
        sources: list[Incoming] = []  # for each event the line that it came in
        places: list[int | None] = []  # for each line its place in events; None: nothing to store
        batch_ids: set[str] = set()
        for incoming in lines:
            self.received += 1
            event, text = self._event_of(incoming, received_ms)
            if event is None:
                places.append(None)
            elif event["id"] in batch_ids or self._is_stored(event, incoming):
                self.duplicates += 1
                places.append(None)
            else:
                if self._is_late(incoming, received_ms):
                    event["spooled"] = True
                    text = text[:-1] + b',"spooled":true}'
                batch_ids.add(event["id"])
                places.append(len(events))
                events.append(event)
                encoded.append(text)
                sources.append(incoming)
        stored = self._store.append(events, received_ms, encoded)
        for entry, incoming in zip(stored, sources):
            if entry is not None:
                self.seen.add(entry.event["id"])
                self._note_arrival(entry, incoming, received_ms)
        safe = [place is None or stored[place] is not None for place in places]
        return safe, [entry for entry in stored if entry is not None]

    def take_too_long(self, line: TooLong) -> None:
        """Count and keep the beginning of a line that is no event because of its length."""
        self.received += 1
        self.quarantine.add(line.head, f"longer than {emit_event.LINE_LIMIT_BYTES} bytes")

    def clock_was_set(self, step_ms: int) -> None:
        """Go on after our own clock was set forward (below 0: back) by so much."""
        for name, machine in self.machines.items():
            if name != self._machine_id:
                machine.skew.shift(step_ms)

    def close(self) -> None:
        """Let go of files; say in the log what came from where."""
        for name, machine in sorted(self.machines.items()):
            log.info("%d events from machine %s since the start", machine.events, name)
        self._usage.close()

    def _event_of(self, incoming: Incoming, received_ms: int) -> tuple[JsonObject | None, bytes]:
        """Parse, build, redact and encode one event; what is none goes to the quarantine."""
        remote = incoming.via in (Via.CHANNEL, Via.STREAM)
        if len(incoming.line) > emit_event.LINE_LIMIT_BYTES:  # Redis itself takes 512 MiB
            self.quarantine.add(incoming.line, f"longer than {emit_event.LINE_LIMIT_BYTES} bytes")
            return None, b""
        try:
            given = emit_event.parse_event_line(incoming.line)
            if remote:
                event = without_authority(emit_event.build_event(given, received_ms, "unknown"))
            else:  # of a remote event the publisher has read the transcripts
                event = emit_event.build_event(given, received_ms, self._machine_id)
                if event["machineId"] != self._machine_id and event["machineId"] == emit_event.this_machine():
                    event["machineId"] = self._machine_id  # the host has got another name since the start
                self._usage.add_usage(event)
                self.catch_up.note(event)
                self._agent_notes.add_note(event)
            event.pop("spooled", None)  # we alone say so
            return emit_event.protect(event, self._privacy)
        except MalformedEvent as error:
            self.quarantine.add(incoming.line, str(error))
        except Exception:  # no event may stop the stream; the log tells what nobody foresaw
            log.exception("an event could not be built")
            self.quarantine.add(incoming.line, "could not be built")
        return None, b""

    def _is_stored(self, event: JsonObject, incoming: Incoming) -> bool:
        """Tell whether the event is a second delivery."""
        if event["id"] in self.seen:
            return True
        if incoming.via is Via.LOCAL or (incoming.via is Via.CHANNEL and not self._is_old(event, incoming)):
            return False
        return self._stored_ids.has(event["sessionId"], event["id"])

    def _is_old(self, event: JsonObject, incoming: Incoming) -> bool:
        """Tell whether an event has waited so long that its first delivery may be forgotten."""
        machine = self.machines.get(event["machineId"])
        skew_ms = machine.skew.value_ms if machine else None
        if skew_ms is None or incoming.sent_ms is None:
            return True
        return bool(incoming.sent_ms - event["timestamp"] - skew_ms > FRESH_MS)

    def _note_arrival(self, entry: StoredEvent, incoming: Incoming, received_ms: int) -> None:
        """Note what comes from where; the log tells a machine's first event, when debugging each."""
        event = entry.event
        name = event["machineId"]
        machine = self.machines.get(name)
        if machine is None:
            log.info("first event from machine %s", name)
            machine = self.machines[name] = Machine()
        machine.events += 1
        machine.last_seen = received_ms
        if incoming.sent_ms is not None and not event.get("demo") and not event.get("imported"):
            machine.skew.add(incoming.sent_ms - event["timestamp"], received_ms, entry.seq)
        dropped = event["data"].get("spoolDropped")
        if isinstance(dropped, int) and 0 < dropped < 1 << 31:
            machine.dropped += dropped
            log.warning("machine %s had to drop %d events: its spool was full", name, dropped)
        if log.isEnabledFor(logging.DEBUG):
            what = event["hookType"] or event["eventType"]
            tool = text_of(event["data"].get("toolName"))
            log.debug("event %d from %s, session %s: %s %s", entry.seq, name, event["sessionId"], what, tool)


class SessionFeed:
    """What clients are told of the sessions: what changed, together and not too often, or all."""

    def __init__(self, loop: EventLoop, book: SessionBook, clients: ClientServer) -> None:
        self._loop = loop
        self._book = book
        self._clients = clients
        self._changed: dict[str, Session] = {}  # sessions whose update is still to be sent
        self._updates_due = False

    def note(self, sessions: Iterable[Session]) -> None:
        """Note sessions whose update is to be sent, and those that were linked with them."""
        for session in itertools.chain(sessions, self._book.linked_changes()):
            self._changed[session.session_id] = session

    def take(self) -> bytes:
        """Return the updates to be sent now; b"" soon after the last ones, the next come in a moment."""
        if self._updates_due or not self._changed:
            return b""
        self._updates_due = True
        self._loop.call_later(UPDATE_INTERVAL_S, self._end_interval)
        changed, self._changed = self._changed, {}
        if not self._clients.clients:
            return b""
        children = self._book.children() if len(changed) > 1 else None
        messages = (
            {"type": "session_update", "session": self._book.to_json(session, children)}
            for session in changed.values()
            if session.session_id in self._book.sessions
        )
        return b"".join(encode_frame(Opcode.TEXT, encode_json(message)) for message in messages)

    def send_soon(self) -> None:
        """Send the changed sessions at once, or together in a moment."""
        self._clients.broadcast_events((), self.take())

    def _end_interval(self) -> None:
        self._updates_due = False
        self.send_soon()

    def forget(self, session_id: str) -> None:
        """Tell that a session is deleted."""
        self._changed.pop(session_id, None)
        self._clients.broadcast_json({"type": "session_deleted", "sessionId": session_id})

    def send_list(self) -> None:
        """Send everyone the sessions; the list may be much and does not count as falling behind."""
        self._book.linked_changes()
        self._changed.clear()
        for with_hidden in (False, True):
            frame = b""
            for client in list(self._clients.clients.values()):
                if client.view is not None and client.show_hidden == with_hidden:
                    frame = frame or encode_frame(
                        Opcode.TEXT,
                        encode_with_sessions({"type": "sessions_updated"}, self._book, with_hidden),
                    )
                    self._clients.answer(client, frame)


def encode_with_sessions(message: JsonObject, book: SessionBook, with_hidden: bool) -> bytes:
    """Encode a message with the sessions that are known so far.

    All are much (2 kB each), so that they are not held one by one beside the whole.
    """
    body = bytearray(encode_json(message)[:-1] + b',"sessions":[')
    for session in book.each_json(with_hidden):
        body += encode_json(session) + b","
    if body.endswith(b","):
        del body[-1]
    body += b"]}"
    return bytes(body)


class Retention:
    """Deletes what the configuration says is too old or too much, packs closed days: in its own thread.

    `pinned()` gives the names of the files to keep; `removed(names)` hears whose events are all gone. Both
    are called in the loop thread.
    """

    def __init__(
        self,
        settings: Settings,
        loop: EventLoop,
        clock: ClockWatch,
        pinned: Callable[[], frozenset[str]],
        removed: Callable[[frozenset[str]], None],
    ) -> None:
        megabytes = settings["retention.maxMegabytes"]
        self.disk = DiskUse(megabytes and megabytes << 20)
        self._settings = settings
        self._loop = loop
        self._clock = clock
        self._pinned = pinned
        self._removed = removed
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "retention")
        self._closing = False

    def begin(self) -> None:
        """Do it now, and from time to time."""
        self._retain()
        self._loop.call_every(RETENTION_INTERVAL_S, self._retain)

    def _retain(self) -> None:
        """Delete what is too old or too much; a clock that was set forward makes nothing older."""
        self.prune(dry_run=False, done=lambda plan: None)

    def prune(self, dry_run: bool, done: Callable[[RetentionPlan], None]) -> None:
        """Plan what must go, let it go unless `dry_run`, and hand the plan to `done`."""
        kept = self._pinned()
        added = self.disk.events_added

        def work() -> None:
            try:
                plan = retention_plan(self._settings, kept, self._clock.least_ms())
                gone = frozenset() if dry_run else carry_out(self._settings.home, plan)
                if not dry_run:
                    self._pack()
            except OSError as error:
                words = f"old events cannot be deleted: {error}"
                log.warning("%s", words)
                self._loop.call_soon(lambda: self.disk.failed(words))
                return
            self._loop.call_soon(lambda: self.disk.measured(plan, not dry_run, added))
            self._loop.call_soon(lambda: self._pruned(plan, gone, dry_run))
            self._loop.call_soon(lambda: done(plan))

        with contextlib.suppress(RuntimeError):  # the monitor stops
            self._thread.submit(work)

    def _pack(self) -> None:
        """Pack the files of closed days when the configuration says so; in the thread."""
        days = self._settings["retention.compressAfterDays"]
        time_ms = self._clock.least_ms()
        paths = files_to_pack(self._settings.path("events"), time_ms, days) if days is not None else []
        for path in paths:
            if self._closing:
                return
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                pack_file(path)
        if paths:
            log.info("%d files of closed days are packed", len(paths))

    def _pruned(self, plan: RetentionPlan, gone: frozenset[str], dry_run: bool) -> None:
        if plan.paths and not dry_run:
            days, size = plan.days, human_size(plan.size)
            log.info("%d files of %s to %s deleted, %s", len(plan.paths), days[0], days[-1], size)
        self._removed(gone)

    def close(self) -> None:
        """End the thread; what it is about is finished."""
        self._closing = True
        self._thread.shutdown(wait=True)


class Conversation:
    """What WebSocket clients ask for and what they are told: one line in HANDLERS and one method each."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def greet(self, client: Client) -> None:
        """Say who we are."""
        hello = {
            "type": "hello",
            "version": __version__,
            "mode": self._monitor.settings["mode"],
            "machineId": self._monitor.settings.machine_id,
            "seq": self._monitor.store.seq,
            "wsProtocol": 1,
        }
        self._monitor.clients.answer_json(client, hello)

    def take(self, client: Client, text: str) -> None:
        """Carry out one message, or say why not."""
        message: Any = None
        try:
            message = emit_event.parse_event_line(text.encode("utf-8", "surrogatepass"))
            handler = self.HANDLERS.get(text_of(message.get("type")))
            if handler is None:
                raise MessageError(f"unknown type {one_line(text_of(message.get('type')), 40)!r}")
            handler(self, client, message)
        except StillLoading:
            self._monitor.loop.call_soon(lambda: self.take(client, text))
        except (MalformedEvent, MessageError, TypeError) as error:
            self._reply(client, message or {}, {"type": "error", "message": str(error)})

    def _reply(self, client: Client, message: JsonObject, reply: JsonObject) -> None:
        """Answer one message; an error names it, and its requestId comes back."""
        if reply["type"] == "error":
            reply["request"] = message.get("type") if isinstance(message.get("type"), str) else None
        if "requestId" in message:
            reply["requestId"] = message["requestId"]
        self._monitor.clients.answer_json(client, reply)

    def _read(self, client: Client, message: JsonObject, read: Callable[[], JsonObject]) -> None:
        """Let the reader thread look something up in the files, and answer with it from the loop thread."""

        def work() -> None:
            try:
                reply = read()
            except Exception as error:  # e.g. a file that cannot be read: the client asked, so it is told
                log.exception("a look-up failed")
                reply = {"type": "error", "message": f"could not be read: {error}"}
            self._monitor.loop.call_soon(lambda: self._reply(client, message, reply))

        with contextlib.suppress(RuntimeError):  # the monitor stops
            self._monitor.reader.submit(work)

    def _on_subscribe(self, client: Client, message: JsonObject) -> None:
        view = message.get("view", "full")
        if view not in ("full", "rows"):
            raise MessageError('view: expected "full" or "rows"')
        ids = message.get("sessionIds")
        since = _integer_field(message, "since", None)
        wanted = set(_text_list(message, "sessionIds")) if ids else None
        if wanted is not None and client.view == view and client.session_ids is not None:
            wanted |= client.session_ids
        client.view, client.session_ids = view, wanted
        missed: list[bytes] = []
        resync = since is not None and (
            since > self._monitor.store.seq or self._monitor.store.seq - since > CATCH_UP_EVENTS
        )
        if since is not None and not resync:
            missed = self._monitor.store.recent_lines(CATCH_UP_EVENTS, after=since)
        entries = [StoredEvent(line_seq(line), parse_stored(line), line) for line in missed]
        frames = event_frames([entry for entry in entries if client.wants(entry.event["sessionId"])], view)
        reply = {
            "type": "subscribed",
            "seq": self._monitor.store.seq,
            "resync": resync,
            "missed": len(frames),
        }
        self._reply(client, message, reply)
        if frames:
            self._monitor.clients.answer(client, b"".join(frames))
        self._monitor.clients.answer_json(client, {"type": "status", **self._monitor.overview.status()})

    def _on_unsubscribe(self, client: Client, message: JsonObject) -> None:
        ids = _text_list(message, "sessionIds")
        if client.session_ids is not None:
            client.session_ids -= set(ids)

    def _on_get_sessions(self, client: Client, message: JsonObject) -> None:
        reply: JsonObject = {"type": "sessions"}
        if "requestId" in message:
            reply["requestId"] = message["requestId"]
        body = encode_with_sessions(reply, self._monitor.book, client.show_hidden)
        self._monitor.clients.answer(client, encode_frame(Opcode.TEXT, body))

    def _on_get_events(self, client: Client, message: JsonObject) -> None:
        session_id = _text_field(message, "sessionId")
        limit, before = self._page_of(message)

        def read() -> JsonObject:
            lines = self._monitor.store.session_lines(session_id, limit + 1, before)
            return {"type": "events", "sessionId": session_id, **_page_reply(lines, limit, client.view)}

        self._read(client, message, read)

    def _on_get_all_recent_events(self, client: Client, message: JsonObject) -> None:
        limit, before = self._page_of(message)

        def read() -> JsonObject:
            return {
                "type": "all_events",
                **_page_reply(self._monitor.store.recent_lines(limit + 1, before), limit, client.view),
            }

        self._read(client, message, read)

    @staticmethod
    def _page_of(message: JsonObject) -> tuple[int, int | None]:
        limit = _integer_field(message, "limit", 100) or 100
        return min(limit, HISTORY_LIMIT), _integer_field(message, "before", None)

    def _on_get_event_detail(self, client: Client, message: JsonObject) -> None:
        session_id, event_id = _text_field(message, "sessionId"), _text_field(message, "eventId")
        seq = _integer_field(message, "seq", None)

        def read() -> JsonObject:
            line = self._monitor.store.find(event_id, session_id, seq)
            event = parse_stored(line) if line is not None else None
            return {"type": "event_detail", "sessionId": session_id, "eventId": event_id, "event": event}

        self._read(client, message, read)

    def _on_search(self, client: Client, message: JsonObject) -> None:
        names = {**{name: name for name in SEARCH_FIELDS}, "q": "query", "type": "eventType"}
        wanted = {name: message.get(sent_as) for name, sent_as in names.items()}
        wanted.update({name: _integer_field(message, name, None) for name in ("from", "to", "limit")})
        in_state = wanted["state"]
        sessions = (
            self._monitor.overview.sessions_in_state(in_state)
            if isinstance(in_state, str) and in_state
            else None
        )
        try:
            query = search_query(wanted, sessions)
        except SearchError as error:
            raise MessageError(str(error)) from None

        def read() -> JsonObject:
            try:
                return {"type": "search_results", **self._monitor.history.search(query)}
            except SearchError as error:
                return {"type": "error", "message": str(error)}

        self._read(client, message, read)

    def _on_rename_session(self, client: Client, message: JsonObject) -> None:
        label = message.get("label")
        if not isinstance(label, str):
            raise MessageError("label: expected text")
        self._act(self._known_session(message), {"action": "rename", "label": label[:200]})

    def _on_toggle_pin(self, client: Client, message: JsonObject) -> None:
        session = self._known_session(message)
        self._act(session, {"action": "pin", "pinned": not session.pinned})

    def _on_hide_session(self, client: Client, message: JsonObject) -> None:
        self._act(self._known_session(message), {"action": "hide", "hidden": True})

    def _on_unhide_session(self, client: Client, message: JsonObject) -> None:
        self._act(self._known_session(message), {"action": "hide", "hidden": False})

    def _on_set_parent(self, client: Client, message: JsonObject) -> None:
        session = self._known_session(message)
        parent = message.get("parentSessionId")
        if parent is not None:
            self._known_session(message, "parentSessionId")
            for ancestor in self._monitor.book.lineage(parent):
                if ancestor == session.session_id:
                    raise MessageError("parentSessionId: a session cannot stand below itself")
                if self._monitor.loader.holds(ancestor):
                    raise StillLoading
        self._act(session, {"action": "set_parent", "parentSessionId": parent})

    def _on_hide_all_sessions(self, client: Client, message: JsonObject) -> None:
        self._refuse_while_loading()
        for session in list(self._monitor.book.sessions.values()):
            if not session.hidden:
                self._act(session, {"action": "hide", "hidden": True})
        self._monitor.feed.send_list()

    def _on_delete_session(self, client: Client, message: JsonObject) -> None:
        self._monitor.delete(self._known_session(message))

    def _on_delete_all_sessions(self, client: Client, message: JsonObject) -> None:
        self._refuse_while_loading()
        for session in list(self._monitor.book.sessions.values()):
            self._monitor.delete(session)
        self._monitor.feed.send_list()

    def _on_set_show_hidden(self, client: Client, message: JsonObject) -> None:
        client.show_hidden = message.get("showHidden") is True
        self._on_get_sessions(client, message)

    def _on_reconnect_redis(self, client: Client, message: JsonObject) -> None:
        if not self._monitor.redis:
            raise MessageError("the monitor runs in local mode: there is no Redis to connect to")
        self._monitor.redis.reconnect()
        self._reply(client, message, {"type": "status", **self._monitor.overview.status()})

    def _on_send_test_event(self, client: Client, message: JsonObject) -> None:
        self._monitor.take_now(encode_json(test_event(self._monitor.settings.machine_id)))

    def _known_session(self, message: JsonObject, name: str = "sessionId") -> Session:
        session_id = _text_field(message, name)
        if self._monitor.loader.holds(session_id):
            raise StillLoading
        session = self._monitor.book.sessions.get(session_id)
        if session is None:
            raise MessageError(f"{name}: no session with this id is known")
        return session

    def _refuse_while_loading(self) -> None:
        if self._monitor.loader.progress is not None:
            raise MessageError(f"{loading_words(self._monitor.loader.progress)}; try again when all have")

    def _act(self, session: Session, data: JsonObject) -> None:
        """Store what the user did as an event of its own, so that the files alone tell everything."""
        event = {
            "eventType": "session_meta",
            "hookType": "Monitor",
            "sessionId": session.session_id,
            "machineId": self._monitor.settings.machine_id,
            "workingDirectory": session.directory,
            "data": data,
        }
        if not self._monitor.take_now(encode_json(event)):
            raise MessageError(f"it could not be stored: {self._monitor.store.error}")

    def _on_prune(self, client: Client, message: JsonObject) -> None:
        dry_run = message.get("dryRun") is True
        if not self._monitor.settings["persistence.enabled"]:
            raise MessageError("events are kept in memory only, there is nothing to delete")
        if self._monitor.overview.status()["loading"] is not None:
            raise MessageError("stored sessions are still being read; try again in a moment")
        self._monitor.retention.prune(
            dry_run, lambda plan: self._reply(client, message, {"type": "pruned", **plan.to_json(dry_run)})
        )

    HANDLERS: dict[str, Callable[[Conversation, Client, JsonObject], None]] = {
        "subscribe": _on_subscribe,
        "unsubscribe": _on_unsubscribe,
        "get_sessions": _on_get_sessions,
        "get_events": _on_get_events,
        "get_all_recent_events": _on_get_all_recent_events,
        "get_event_detail": _on_get_event_detail,
        "search": _on_search,
        "rename_session": _on_rename_session,
        "toggle_pin": _on_toggle_pin,
        "hide_session": _on_hide_session,
        "unhide_session": _on_unhide_session,
        "delete_session": _on_delete_session,
        "hide_all_sessions": _on_hide_all_sessions,
        "delete_all_sessions": _on_delete_all_sessions,
        "set_show_hidden": _on_set_show_hidden,
        "set_parent": _on_set_parent,
        "reconnect_redis": _on_reconnect_redis,
        "send_test_event": _on_send_test_event,
        "prune": _on_prune,
    }


class Overview:
    """What the API and the clients ask about the whole: status, configuration, sessions, metrics.

    Reads what the monitor's parts know, in the loop thread, and changes nothing.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._last_told: JsonObject = {}

    def status(self) -> JsonObject:
        """Return what /api/status and the `status` message show."""
        segments = emit_event.spool_segments(self._monitor.settings.path("spool"))
        index = self._monitor.history.status()
        return {
            "version": __version__,
            "mode": self._monitor.settings["mode"],
            "machineId": self._monitor.settings.machine_id,
            "startedAt": self._monitor.started_at,
            "pid": os.getpid(),
            "seq": self._monitor.store.seq,
            "events": {
                "received": self._monitor.intake.received,
                "stored": self._monitor.stored,
                "duplicates": self._monitor.intake.duplicates,
                "quarantined": self._monitor.intake.quarantine.count,
            },
            "sessions": len(self._monitor.book.sessions),
            "clients": sum(client.view is not None for client in self._monitor.clients.clients.values()),
            "store": {
                "path": self._monitor.store.root,
                "persistent": self._monitor.settings["persistence.enabled"],
                "ok": self._monitor.store_error is None,
                "error": self._monitor.store_error,
                "repaired": self._monitor.store.repaired,
            },
            "spool": {
                "segments": len(segments),
                "bytes": sum(size for _, size in segments),
                "dropped": self._dropped(),
            },
            "index": index,
            "disk": self._monitor.retention.disk.to_json(index["bytes"]),
            "machines": [
                {
                    "machineId": name,
                    "events": machine.events,
                    "lastSeen": machine.last_seen,
                    "clockSkewMs": machine.skew.value_ms,
                    "dropped": machine.dropped,
                }
                for name, machine in sorted(self._monitor.intake.machines.items())
            ],
            "redis": self._monitor.redis.status() if self._monitor.redis else None,
            "publisher": emit_event.publisher_state(self._monitor.settings.home)
            if self._monitor.redis
            else None,
            "loading": self._monitor.loader.progress,
            "demo": any(session.demo for session in self._monitor.book.sessions.values()),
        }

    def sessions_in_state(self, state: str) -> frozenset[str]:
        """Return the ids of the sessions that are in a state now."""
        return self._monitor.book.in_state(state)

    def labels(self) -> dict[str, str]:
        """Return the label of every session."""
        return {session.session_id: session.label[0] for session in self._monitor.book.sessions.values()}

    def metrics(self) -> bytes:
        """Return the metrics in the text form of Prometheus."""
        states = collections.Counter(session.state for session in self._monitor.book.sessions.values())
        clients, redis = self._monitor.clients, self._monitor.redis
        queues = QueueFigures(
            sum(client.queued_bytes for client in clients.clients.values()),
            clients.closed_slow,
            redis.inbox_bytes if redis else 0,
        )
        return metrics_text(self.status(), self._monitor.counts, states, queues)

    def _dropped(self) -> int:
        """Return how many events full spools had to drop, as far as this monitor was told."""
        own = self._monitor.spool.dropped if self._monitor.spool else 0
        return own + sum(machine.dropped for machine in self._monitor.intake.machines.values())

    def config(self) -> JsonObject:
        """Return the configuration in force; there is no secret in it."""
        nested: JsonObject = {
            "version": __version__,
            "machineId": self._monitor.settings.machine_id,
            "path": self._monitor.settings.config_path,
        }
        for key, value in self._monitor.settings.values.items():
            section, dot, name = key.partition(".")
            if key in emit_event.SECRET_KEYS and value is not None:
                value = "(not shown)"
            if dot:
                nested.setdefault(section, {})[name] = value
            else:
                nested[section] = value
        nested["server"]["port"], nested["server"]["wsPort"] = self._monitor.port, self._monitor.ws_port
        return nested

    def sessions_json(self, with_hidden: bool) -> bytes:
        """Return the sessions that are known so far, and how many of the stored ones those are."""
        return encode_with_sessions(
            {"loading": self._monitor.loader.progress}, self._monitor.book, with_hidden
        )

    def session_json(self, session_id: str) -> JsonObject:
        """Return one session; raise RequestError(404), or 503 while it is being loaded."""
        if self._monitor.loader.holds(session_id):
            raise RequestError(503, "this session's events are being read; ask again in a moment")
        session = self._monitor.book.sessions.get(session_id)
        if session is None:
            raise RequestError(404, "no session with this id is known")
        return self._monitor.book.to_json(session)

    def news(self) -> JsonObject | None:
        """Return the status when more than its counters changed since the last time, else None."""
        status = self.status()
        steady = {name: status[name] for name in ("store", "spool", "loading", "demo", "mode")}
        index = status["index"]
        percent = (
            100 * index["done"] // index["total"] if index["total"] and index["state"] != "ready" else 100
        )
        steady["index"] = (index["state"], index["error"], percent)
        if self._monitor.redis:
            steady["redis"] = [
                status["redis"][name] for name in ("state", "attempt", "reason", "streamState", "gaps")
            ]
            steady["publisher"] = [
                status["publisher"].get(name) for name in ("running", "state", "reason", "stream")
            ]
            steady["machines"] = [machine["machineId"] for machine in status["machines"]]
        if steady == self._last_told:
            return None
        self._last_told = steady
        return status


class Monitor:
    """The running program. `run` serves until `stop`.

    Everything but `__init__` happens in the loop thread.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = EventLoop()
        self.started_at = now_ms()
        self._clock = ClockWatch()
        self.book = session_book(settings)
        self.store: EventStore | MemoryStore = (
            EventStore(settings.path("events")) if settings["persistence.enabled"] else MemoryStore()
        )
        self.intake = Intake(settings, self.store)
        self.stored = 0  # events since the start
        self.counts = EventCounts()
        self.store_error: str | None = None  # as it was told last
        self._arrivals: list[Arrival] = []  # of this turn
        self._alive_ms: dict[str, int] = {}  # session → when its process was last seen
        self.reader = concurrent.futures.ThreadPoolExecutor(1, "reader")
        self.history = History(self.store, settings.path("index.db"), PriceList(settings["prices"]))
        self.retention = Retention(settings, self.loop, self._clock, self._pinned_files, self._removed)
        self.overview = Overview(self)
        self._stopping = False

    # Start and stop

    def open(self) -> None:
        """Open every port and begin to serve the page; raise StartError."""
        emit_event.make_private_directory(self.settings.home)
        otherwise = "another monitor runs for this directory (pid {pid}); `stop` ends it"
        self._lock = lock_file(self.settings.path("monitor.pid"), otherwise)
        token = read_token(self.settings.path("token"))
        host = self.settings["server.host"]
        self.addresses = own_addresses(host)
        self.access = Access(
            self.settings["server.auth"], token, self.addresses, self.settings["server.allowedHosts"]
        )
        http_socket = bind_tcp(host, self.settings["server.port"], "server.port", "--port")
        ws_socket = bind_tcp(host, self.settings["server.wsPort"], "server.wsPort", "--ws-port")
        self.port, self.ws_port = http_socket.getsockname()[1], ws_socket.getsockname()[1]
        self.access.port = self.port
        self._hooks = HookPort(self.loop, self.settings["socketPath"], self._line_arrived)
        limit = self.settings["limits.connections"]
        page = Page(os.path.dirname(os.path.abspath(__file__)), self.ws_port)
        api = Api(self.store, self.loop.call, self.overview, self.history, self.take_now)
        self.http = HttpServer(http_socket, self.access, page, api, limit)
        self._http_thread = threading.Thread(target=self.http.serve_forever, name="http", daemon=True)
        self._http_thread.start()
        self._begin_loading()
        conversation = Conversation(self)
        self.clients = ClientServer(
            self.loop,
            ws_socket,
            admit=lambda request, sock: self.access.check(request, sock, self.ws_port),
            opened=conversation.greet,
            received=conversation.take,
            gone=lambda client: None,
            connection_limit=limit,
            queue_limit_bytes=self.settings["limits.clientQueueBytes"],
        )
        self.feed = SessionFeed(self.loop, self.book, self.clients)
        self.loop.turn_end = self._handle_arrivals
        self._connect_sources()
        self.loop.call_every(TICK_INTERVAL_S, self._tick)
        self.loop.call_every(5.0, self._look_after_files)
        self.loop.call_every(CATCH_UP_INTERVAL_S, self._catch_up)
        self.history.start()

    def _connect_sources(self) -> None:
        """Read our own spool, or, with Redis, what everybody's publishers send there."""
        self._bring_back_unsaved()
        self.spool: SpoolDrain | None = None
        self.redis: RedisLink | None = None
        if self.settings["mode"] == "local":
            self.spool = SpoolDrain(self.loop, self.settings.home, self._take_spooled)
            return
        self.redis = RedisLink(self.loop, self.settings, self._take_remote, self._tell_status)
        self.loop.call_every(SPOOL_INTERVAL_S, self._keep_publisher)

    def run(self) -> None:
        """Serve until `stop`, then close everything in an order that loses nothing."""
        gc.freeze()  # what is there stays: looking through it for garbage would only hold up the loop
        try:
            self.loop.run()
        finally:
            self._close()

    def stop(self) -> None:
        """Take what has come in, say goodbye to the clients, and let `run` return; for any thread."""
        self.loop.call_soon(self._begin_stop)

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._hooks.stop_listening()
        self.clients.close_all()
        # One more round, so that lines which have arrived are stored and acknowledged.
        self.loop.call_later(0.1, self.loop.stop)

    def _close(self) -> None:
        self._handle_arrivals()
        if self.redis:
            self.redis.close()
        self.http.shutdown()
        self.http.server_close()
        self.reader.shutdown(wait=True)
        self.retention.close()
        self.history.stop()
        self._hooks.close()
        # the newest files may be removed by hand before the next start
        remember_seq(self.settings.home, self.store.seq)
        self.store.close()
        self.intake.close()
        self.loop.close()
        os.close(self._lock)

    def _begin_loading(self) -> None:
        """Find the highest number, so that none is given twice; read what is stored in the loop's turns."""
        with contextlib.suppress(OSError, ValueError), open(self.settings.path("last-seq"), "rb") as file:
            self.store.seq = max(0, int(file.read(20)))
        self.loader = Loader(self.store, self.book, self.intake.seen, self._show_loaded)
        if self.loader.progress is None:
            self.loop.call_soon(self._begin_to_retain)
            return
        log.info("%d stored sessions are being read", self.loader.progress["total"])
        self.loop.call_soon(self._load_some)

    def _load_some(self) -> None:
        try:
            self.loader.work(LOAD_SLICE_S)
        finally:
            if self.loader.progress is None:
                self._end_loading()
            else:
                self.loop.call_soon(self._load_some)

    def _show_loaded(self, sessions: Iterable[Session]) -> None:
        """Show sessions that are complete now and have not ended; the others come with the whole list."""
        self.feed.note(session for session in sessions if session.state != "ended")
        self.feed.send_soon()

    def _end_loading(self) -> None:
        seconds = (now_ms() - self.started_at) / 1000
        log.info("%d stored events read, %.1f s after the start", self.loader.events, seconds)
        self.book.tick(now_ms())
        self._end_sessions_whose_process_is_gone()
        gc.freeze()
        self.feed.send_list()
        self._tell_status()
        self._begin_to_retain()

    def _begin_to_retain(self) -> None:
        """Let old events go once it is known which sessions are pinned."""
        if self.settings["persistence.enabled"]:
            self.retention.begin()

    # Events that come in

    def _line_arrived(self, connection: IngestConnection, line: bytes | TooLong) -> None:
        if isinstance(line, TooLong):
            self.intake.take_too_long(line)
            connection.acknowledge(1)
            return
        self._arrivals.append(Arrival(line, connection))

    def _handle_arrivals(self) -> None:
        """Store what this turn brought, acknowledge it, then show it: no hook waits for the page."""
        arrivals, self._arrivals = self._arrivals, []
        if not arrivals:
            return
        received_ms = now_ms()
        safe, stored = self._store([Incoming(arrival.line, Via.LOCAL, received_ms) for arrival in arrivals])
        self._answer(arrivals, safe)
        self._show(stored)

    @staticmethod
    def _answer(arrivals: Sequence[Arrival], safe: Sequence[bool]) -> None:
        """Acknowledge what is safe; close the connection of what could not be stored."""
        counts: dict[IngestConnection, int] = {}
        failed: set[IngestConnection] = set()
        for arrival, is_safe in zip(arrivals, safe):
            connection = arrival.connection
            if connection is None or connection in failed:
                continue
            if is_safe:
                counts[connection] = counts.get(connection, 0) + 1
            else:
                failed.add(connection)
        for connection, count in counts.items():
            connection.acknowledge(count)
        for connection in failed:
            connection.close()  # its sender spools at once instead of waiting

    def _take_spooled(self, lines: Sequence[bytes]) -> bool:
        return self._take_all([Incoming(line, Via.SPOOL, None) for line in lines])

    def _take_remote(self, lines: Sequence[RemoteLine]) -> bool:
        received_ms = now_ms()
        return self._take_all(
            [
                Incoming(remote.line, Via.STREAM, stream_time(remote.position))
                if remote.position
                else Incoming(remote.line, Via.CHANNEL, received_ms)
                for remote in lines
            ]
        )

    def _take_all(self, lines: Sequence[Incoming]) -> bool:
        """Store lines that wait in order; tell whether nothing more need be done about any of them.

        Where one session's file cannot be written and others can, its events must not hold up the rest: they
        are put into unsaved/ and come back through the spool at the next start.
        """
        safe = self._store_lines(lines)
        if all(safe):
            return True
        if not self.store.has_room():
            return False
        left = [line.line for line, is_safe in zip(lines, safe) if not is_safe]
        log.error("%d events are kept in unsaved/ until the next start: %s", len(left), self.store.error)
        place = self.settings.path("unsaved")
        emit_event.make_private_directory(place)
        for line in left:
            emit_event.append_to_spool(place, line + b"\n")
        return True

    def _bring_back_unsaved(self) -> None:
        """Let what could not be saved before come in by the spool again."""
        spool = self.settings.path("spool")
        for path, _ in emit_event.spool_segments(self.settings.path("unsaved")):
            emit_event.make_private_directory(spool)
            os.rename(path, os.path.join(spool, os.path.basename(path)))

    def take_now(self, line: bytes) -> bool:
        """Store one line at once, without a connection that waits for it; return whether it is safe."""
        return self._store_lines([Incoming(line.replace(b"\n", b" "), Via.LOCAL, now_ms())])[0]

    def _keep_publisher(self) -> None:
        """See to it that nothing waits in this machine's spool while nobody publishes."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)  # a publisher that we started and that has left
        if emit_event.spool_segments(self.settings.path("spool")):
            try:
                emit_event.ensure_publisher(self.settings.home)
            except OSError as error:
                log.warning("the publisher cannot be started: %s", error)

    def _catch_up(self) -> None:
        event = self.intake.catch_up.read_on()
        if event is not None and event["sessionId"] in self.book.sessions:  # it may be deleted by now
            self.take_now(encode_json(event))

    def _store_lines(self, lines: Sequence[Incoming]) -> list[bool]:
        """Store and show a batch of lines; return for each whether nothing more need be done about it."""
        safe, stored = self._store(lines)
        self._show(stored)
        return safe

    def _store(self, lines: Sequence[Incoming]) -> tuple[list[bool], list[StoredEvent]]:
        """Store a batch of lines; return for each whether nothing more need be done, and the new events."""
        self._follow_clock()
        safe, stored = self.intake.take(lines)
        self._note_store_error()
        return safe, stored

    def _show(self, stored: Sequence[StoredEvent]) -> None:
        """Let stored events change the sessions, and send them to the clients."""
        if not stored:
            return
        self.stored += len(stored)
        changed: list[Session] = []
        self.retention.disk.events_added += sum(len(entry.line) + 1 for entry in stored)
        for entry in stored:
            self.counts.note(entry.event)
            changed += self._take_into_account(entry.event)
        self.feed.note(changed)
        self.clients.broadcast_events(stored, self.feed.take())
        self.history.grown(stored)

    def _take_into_account(self, event: JsonObject) -> tuple[Session, ...]:
        """Let an event change its session, and return it; whatever a stored event does, it stops nothing."""
        if self.loader.takes(event):
            return ()
        try:
            session = self.book.apply(event)
            self.loader.note(session, event)
            return (session,)
        except Exception:  # nobody foresaw it: the log tells, and the stream goes on
            log.exception("event %s could not be taken into account", event.get("id"))
            return ()

    # Time

    def _follow_clock(self) -> None:
        """See whether this machine's clock was set; what came since is told after that."""
        step_ms = self._clock.step_ms()
        if not step_ms:
            return
        forward = "forward" if step_ms > 0 else "back"
        log.warning("the clock of this machine was set %s by %s", forward, human_duration(abs(step_ms)))
        self.book.clock_was_set(step_ms)
        self.intake.clock_was_set(step_ms)

    def _tick(self) -> None:
        self._follow_clock()
        changed = self.book.tick(now_ms()) + self._end_sessions_whose_process_is_gone()
        self.feed.note(changed)
        self.feed.send_soon()
        self._tell_status()

    def _tell_status(self) -> None:
        """Tell clients about the status when more than counters moved."""
        status = self.overview.news()
        if status is not None:
            self.clients.broadcast_json({"type": "status", **status})

    def _end_sessions_whose_process_is_gone(self) -> list[Session]:
        return end_sessions_without_process(self.book, self.settings.machine_id, self._alive_ms)

    def _look_after_files(self) -> None:
        """Come back from a full disk by ourselves, and put the socket back when something removed it."""
        if self.store_error and self.store.has_room():
            self.store.error = None
            self._note_store_error()
        if self.loader.progress is not None:
            log.info("%s", loading_words(self.loader.progress))
        self._hooks.look()

    def _note_store_error(self) -> None:
        if self.store.error == self.store_error:
            return
        self.store_error = self.store.error
        if self.store_error:
            log.error("events cannot be written, hooks keep them in the spool: %s", self.store_error)
        else:
            log.info("events can be written again")
        self._tell_status()

    # What users ask for

    def reconnect_redis(self) -> None:
        """Connect to Redis at once, also after it was given up; for any thread."""
        if self.redis:
            self.loop.call_soon(self.redis.reconnect)

    def delete(self, session: Session) -> None:
        """Delete a session with its events, as the user asks for."""
        remember_seq(self.settings.home, self.store.seq)
        freed = self.store.delete_session(session.session_id)
        self.retention.disk.events_added -= freed
        self.history.look_again()
        log.info("session %s deleted by the user, %d bytes", session.session_id, freed)
        self._forget(session.session_id)
        self.feed.note(())
        self.feed.send_soon()

    def _forget(self, session_id: str) -> None:
        self.book.delete(session_id)
        self._alive_ms.pop(session_id, None)
        self.feed.forget(session_id)

    # What retention asks and tells

    def _pinned_files(self) -> frozenset[str]:
        return frozenset(
            session_file_name(session.session_id) for session in self.book.sessions.values() if session.pinned
        )

    def _removed(self, names: frozenset[str]) -> None:
        """Let go of sessions that have no events left; look, too, at what was removed or added by hand."""
        self.history.look_again()
        for session in list(self.book.sessions.values()):
            if session_file_name(session.session_id) in names:
                self._forget(session.session_id)
        self.feed.note(())
        self.feed.send_soon()


def retention_plan(settings: Settings, kept_names: frozenset[str], time_ms: int) -> RetentionPlan:
    """Return what the configuration says is to be deleted at this time."""
    limit = settings["retention.maxMegabytes"]
    return plan_retention(
        settings.home, time_ms, settings["retention.days"], limit and limit << 20, kept_names
    )


def session_book(settings: Settings) -> SessionBook:
    """Return an empty book with the configured patience."""
    return SessionBook(
        settings["sessions.quietSeconds"] * 1000,
        settings["sessions.endedHours"] * 3_600_000,
        settings.machine_id,
        PriceList(settings["prices"]),
    )


def end_sessions_without_process(
    book: SessionBook, machine_id: str, alive_ms: dict[str, int]
) -> list[Session]:
    """End the sessions of this machine whose client is no longer there: a kill fires no hook.

    `alive_ms` is kept here: session → when its process was last seen. A process may have gone long before
    anybody looked, so its session ends when it was last seen, or with its last event.
    """
    gone = []
    for session in list(book.sessions.values()):
        if session.pid is None or session.state == "ended" or session.machine_id != machine_id:
            continue
        if process_ran_at(session.pid, book.last_event_now(session)):
            alive_ms[session.session_id] = now_ms()
        else:
            seen_ms = alive_ms.pop(session.session_id, session.last_event)
            gone.append(book.end_gone(session.session_id, max(seen_ms, session.last_event)))
    return gone


class StillLoading(Exception):
    """A client's message about a session whose stored events are being read; it is carried out after that."""


class MessageError(Exception):
    """A client's message that cannot be carried out, in words for its sender."""


def _text_field(message: JsonObject, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str) or not value:
        raise MessageError(f"{name}: expected text")
    return value


def _text_list(message: JsonObject, name: str) -> list[str]:
    value = message.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MessageError(f"{name}: expected a list of texts")
    return value


def _integer_field(message: JsonObject, name: str, default: int | None) -> int | None:
    value = message.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MessageError(f"{name}: expected an integer of at least 0")
    return value


def _page_reply(lines: list[bytes], limit: int, view: str | None) -> JsonObject:
    """Return `events` and `more` from at most limit + 1 lines, of which the first only tells that there is
    more.
    """
    events = [parse_stored(line) for line in lines[-limit:]]
    if view == "rows":
        events = [event_row(event) for event in events]
    return {"events": events, "more": len(lines) > limit}


def test_event(machine_id: str) -> JsonObject:
    """Return the event of `test-event` and of the page's button."""
    return {
        "id": str(uuid.uuid4()),
        "timestamp": now_ms(),
        "sessionId": TEST_SESSION_ID,
        "machineId": machine_id,
        "workingDirectory": os.getcwd(),
        "hookType": "Notification",
        "eventType": "notification",
        "data": {"message": "Test event: the way from here to the page works.", "notificationType": "test"},
    }


def _locked_soon(fd: int) -> bool:
    """Take the lock on a file; who only looks whether it is held (`running_monitor`) has it for a moment."""
    for _ in range(LOCK_ATTEMPTS):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_PAUSE_S)
    return False


def lock_file(path: str, otherwise: str) -> int:
    """Take the lock at `path` for as long as this process lives; raise StartError with the words `otherwise`,
    in which "{pid}" is who has it.

    The file holds our pid, for whoever wants to know who has the lock. `unlock_file` takes it away again.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StartError(_no_lock(path, f"cannot be opened: {error.strerror}")) from None
        about = os.fstat(fd)
        if about.st_uid != os.getuid() or not stat.S_ISREG(about.st_mode):
            os.close(fd)
            raise StartError(_no_lock(path, "is not a file of ours"))
        if not _locked_soon(fd):
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StartError(otherwise.replace("{pid}", owner or "unknown"))
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), about):
                break
        os.close(fd)  # taken away between our opening and locking it
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    return fd


def unlock_file(path: str, fd: int) -> None:
    """Give the lock back and leave no file, which would be in the way of another user."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), os.fstat(fd)):
            os.unlink(path)
    os.close(fd)


def lock_holder(path: str) -> int | None:
    """Return the process that has the lock at `path`, None when nobody has it."""
    try:
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except OSError:
                return int(file.read(32).strip() or b"0") or None
    except (FileNotFoundError, ValueError):
        return None


def _no_lock(path: str, why: str) -> str:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_uid != os.getuid():
            why = "belongs to another user"
    return f"{path}: {why}; choose another socketPath in the configuration"


def bind_tcp(host: str, port: int, key: str, option: str) -> socket.socket:
    """Listen on a TCP port; raise StartError that names the key and the option to change."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(info[0], socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(info[4])
        sock.listen(128)
        return sock
    except OSError as error:
        what = (
            "is in use" if error.errno == errno.EADDRINUSE else f"cannot be opened: {error.strerror or error}"
        )
        raise StartError(f"{host} port {port} {what}; choose another with {option} or {key}") from None


def bind_unix(path: str) -> socket.socket:
    """Listen on a Unix socket of mode 0600; the caller holds its lock.

    Raise StartError rather than steal one.
    """
    try:
        about = os.lstat(path)
    except FileNotFoundError:
        about = None
    if about is not None:
        if not stat.S_ISSOCK(about.st_mode) or about.st_uid != os.getuid():
            raise StartError(
                f"{path} is there already and is not our socket; remove it or choose another socketPath"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            if probe.connect_ex(path) == 0:
                raise StartError(
                    f"{path}: another program listens there; stop it or choose another socketPath"
                )
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # 0600 from the first moment
    try:
        sock.bind(path)
    except OSError as error:
        raise StartError(f"{path}: cannot be made: {error.strerror}; choose another socketPath") from None
    finally:
        os.umask(mask)
    sock.listen(4096)
    return sock


def process_ran_at(pid: int, time_ms: int) -> bool:
    """Tell whether a process runs that ran at `time_ms` already, so is not a later one with the same pid.

    On Linux by its start time (proc(5): stat field 22, in ticks since boot); elsewhere any process counts.
    """
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return False
    if fields[0] in (b"Z", b"X"):
        return False
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return now_ms() - age_s * 1000 <= time_ms + PROCESS_START_SLACK_MS


# ---------------------------------------------------------------------------
# Running monitor: found, asked and talked to by other processes
#
# Knows: the files in which a monitor tells of itself, and its doors: HTTP, WebSocket, the hooks' socket.
# ---------------------------------------------------------------------------


class CommandError(Exception):
    """A command that cannot be carried out; the message says what to do."""


def running_monitor(settings: Settings) -> JsonObject | None:
    """Return {"pid", "host", "port", "wsPort", …} of the monitor that runs for this directory, None if there
    is none.
    """
    pid = lock_holder(settings.path("monitor.pid"))
    if pid is None:
        return None
    try:
        with open(settings.path("monitor.run.json"), "rb") as file:
            about = emit_event.parse_event_line(file.read())
    except (FileNotFoundError, MalformedEvent):
        return None
    return about if about.get("pid") == pid else None


def needed_monitor(settings: Settings) -> JsonObject:
    """Return the running monitor; raise CommandError that says how to start it."""
    about = running_monitor(settings)
    if about is None:
        raise CommandError("the monitor is not running; start it with: python3 contextuate_monitor.py start")
    return about


def page_links(settings: Settings, about: JsonObject, with_token: bool) -> list[str]:
    """Return the addresses of the page; with the token where one is needed to come in."""
    needs_token = with_token or settings["server.auth"] == "token" or not is_loopback(about["host"])
    token = (
        f"?token={read_token(settings.path('token'))}"
        if needs_token and settings["server.auth"] != "off"
        else ""
    )
    links = []
    for name in about["addresses"]:
        shown = f"[{name}]" if ":" in name else "localhost" if name == "127.0.0.1" else name
        links.append(f"http://{shown}:{about['port']}/{token}")
    return links


def reachable_host(about: JsonObject) -> str:
    """Return the address at which this machine reaches the running monitor."""
    return "127.0.0.1" if about["host"] in ("0.0.0.0", "::") else text_of(about["host"])


def connect_http(settings: Settings, about: JsonObject) -> tuple[http.client.HTTPConnection, dict[str, str]]:
    """Return a connection to the running monitor's HTTP port, and the headers that let us in."""
    connection = http.client.HTTPConnection(reachable_host(about), about["port"], timeout=15)
    return connection, {"Authorization": f"Bearer {read_token(settings.path('token'))}"}


def ask_monitor(settings: Settings, about: JsonObject, path: str) -> JsonObject:
    """GET one address of the running monitor's API; raise CommandError."""
    connection, headers = connect_http(settings, about)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        answer = emit_event.parse_event_line(response.read())
    except (OSError, http.client.HTTPException, MalformedEvent) as error:
        raise CommandError(f"the monitor (pid {about['pid']}) does not answer: {error}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise CommandError(f"the monitor answered {response.status}: {answer.get('error')}")
    return answer


class MonitorConnection:
    """A WebSocket client of the running monitor, for the commands that follow or change it."""

    def __init__(self, settings: Settings, about: JsonObject) -> None:
        address = reachable_host(about), about["wsPort"]
        self._sock = socket.create_connection(address, timeout=10)
        self._parser = FrameParser(masked=False)
        self._messages: collections.deque[JsonObject] = collections.deque()
        self._take(self._upgrade(*address, read_token(settings.path("token"))))

    def _upgrade(self, host: str, port: int, token: str) -> bytes:
        """Make a WebSocket of the connection (RFC 6455 section 4.1); return what came behind the answer."""
        key = base64.b64encode(os.urandom(16)).decode()
        request = (
            f"GET / HTTP/1.1\r\nHost: {f'[{host}]' if ':' in host else host}:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"Authorization: Bearer {token}\r\n\r\n"
        )
        self._sock.sendall(request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            piece = self._sock.recv(4096)
            if not piece:
                raise ConnectionError("the monitor closed the connection")
            head += piece
        head, _, rest = head.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101") or accept_key(key).encode() not in head:
            answer = head.splitlines()[0].decode("latin-1")
            raise CommandError(f"the monitor refused the connection: {answer}")
        return rest

    def send(self, message: JsonObject) -> None:
        """Send one message."""
        self._sock.sendall(encode_frame(Opcode.TEXT, encode_json(message), os.urandom(4)))

    def receive(self, timeout_s: float | None = None) -> JsonObject:
        """Return the next message; raise ConnectionError at the connection's end, TimeoutError after
        `timeout_s`.
        """
        self._sock.settimeout(timeout_s)
        while not self._messages:
            try:
                data = self._sock.recv(RECEIVE_BYTES)
            except socket.timeout:
                raise TimeoutError("no answer from the monitor") from None
            if not data:
                raise ConnectionError("the monitor closed the connection")
            self._take(data)
        return self._messages.popleft()

    def wait_for(self, kind: str, timeout_s: float = 15.0) -> JsonObject:
        """Return the next message of one type, passing over others; raise CommandError for an error."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self.receive(max(0.01, deadline - time.monotonic()))
            if message.get("type") == kind:
                return message
            if message.get("type") == "error":
                raise CommandError(f"the monitor answered: {message.get('message')}")

    def _take(self, data: bytes) -> None:
        for received in self._parser.feed(data):
            if isinstance(received, Text):
                self._messages.append(
                    emit_event.parse_event_line(received.text.encode("utf-8", "surrogatepass"))
                )
            elif isinstance(received, Ping):
                self._sock.sendall(encode_frame(Opcode.PONG, received.payload, os.urandom(4)))
            elif isinstance(received, (Close, Failure)):
                raise ConnectionError(
                    f"the monitor closed the connection: {received.reason or received.code}"
                )

    def close(self) -> None:
        """Say goodbye."""
        with contextlib.suppress(OSError):
            self._sock.sendall(encode_close(CloseCode.NORMAL, mask=os.urandom(4)))
        self._sock.close()


class EventSender:
    """Hand events to the running monitor the hooks' way; safe when `send` returns."""

    BATCH = 200

    def __init__(self, socket_path: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(60)
        self._sock.connect(socket_path)

    def __enter__(self) -> EventSender:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, events: Sequence[JsonObject]) -> None:
        """Send events; raise CommandError when they cannot be stored."""
        for start in range(0, len(events), self.BATCH):
            batch = events[start : start + self.BATCH]
            self._sock.sendall(b"".join(encode_json(event) + b"\n" for event in batch))
            taken = 0
            while taken < len(batch):
                answer = self._sock.recv(self.BATCH)
                if not answer:
                    raise CommandError("the monitor could not store an event; `status` may tell why")
                taken += len(answer)


# ---------------------------------------------------------------------------
# Hook installation: our hook in Claude Code's settings
#
# Owns: hooks/ in our directory, and our own entries in Claude Code's settings.json, nobody else's.
# Knows: which event names which client understands, and how a settings file is laid out. Does not know: the
# running monitor. Planning reads only; what is written is exactly what a plan has shown before.
# ---------------------------------------------------------------------------

Version = tuple[int, int, int]

HOOK_TIMEOUT_S = 10
CLAUDE_PLACES = ("claude", "~/.claude/local/claude", "~/.local/bin/claude")
CLAUDE_VERSION_TIMEOUT_S = 10

# Before 2.1.101 one name that the client does not know disables every hook of the file, so a name stands here
# with the first version that is known to have it, and without such knowledge with 2.1.101.
# Missing on purpose: MessageDisplay (ten a second, holds up the display), WorktreeCreate (its output is taken
# as a path, a failure fails the worktree), FileChanged (needs a list of files).
EVENT_NAMES_SINCE: tuple[tuple[Version, tuple[str, ...]], ...] = (
    (
        (1, 0, 0),
        (
            "SessionStart",
            "SessionEnd",
            "UserPromptSubmit",
            "PreToolUse",
            "PostToolUse",
            "Notification",
            "Stop",
            "SubagentStop",
            "PreCompact",
        ),
    ),
    ((2, 0, 43), ("SubagentStart",)),
    ((2, 0, 45), ("PermissionRequest",)),
    ((2, 1, 69), ("InstructionsLoaded",)),
    ((2, 1, 76), ("PostCompact", "Elicitation")),
    ((2, 1, 78), ("StopFailure",)),
    (
        (2, 1, 101),
        (
            "Setup",
            "UserPromptExpansion",
            "PermissionDenied",
            "PostToolUseFailure",
            "PostToolBatch",
            "TaskCreated",
            "TaskCompleted",
            "TeammateIdle",
            "PreModelSwitch",
            "PostModelSwitch",
            "ConfigChange",
            "CwdChanged",
            "DirectoryAdded",
            "WorktreeRemove",
            "ElicitationResult",
        ),
    ),
)


class InstallError(Exception):
    """An installation that is refused; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class InstallPlan:
    """What an installation or its removal would do to one settings file.

    `old_text` is the file as it was read, "" when there is none; `new_text` equals it when nothing is to do.
    `names` are the events that get our hook, or lose it. `command` is what Claude Code will run, "" for a
    removal. `version` is the client's, None when it is not known or does not matter.
    """

    path: str
    old_text: str
    new_text: str
    names: tuple[str, ...]
    command: str
    version: Version | None


def plan_install(home: str, project: str | None, version: Version | None) -> InstallPlan:
    """Plan to register our hook; write nothing.

    `home` is our directory, `project` a project's directory or None for the user's own settings, `version`
    what claude_version() said. Raises InstallError for settings that cannot be changed safely.
    """
    names = event_names(version)
    if not names:
        raise InstallError("this version of Claude Code has no hooks; update it, then run install again")
    command = hook_command(base_interpreter(), hook_script(home))
    path = _existing_project_settings(project)
    old_text, settings = read_settings(path)
    with _naming(path):
        if version is None:  # what was registered when it was known stays
            had = [name for name, groups in _checked_hooks(settings).items() if _any_ours(groups)]
            names += [
                name for _, later in EVENT_NAMES_SINCE for name in later if name in had and name not in names
            ]
        merged = merge_hooks(settings, command, names)
        new_text = old_text if merged == settings else render_settings(merged, old_text)
    return InstallPlan(path, old_text, new_text, tuple(names), command, version)


def plan_uninstall(project: str | None) -> InstallPlan:
    """Plan to take our hook out of the settings of `project`, None for the user's own; write nothing.

    Raises InstallError for settings that cannot be changed safely.
    """
    path = _existing_project_settings(project)
    old_text, settings = read_settings(path)
    with _naming(path):
        names = tuple(name for name, groups in _checked_hooks(settings).items() if _any_ours(groups))
        new_text = render_settings(remove_hooks(settings), old_text) if names else old_text
    return InstallPlan(path, old_text, new_text, names, "", None)


def _existing_project_settings(project: str | None) -> str:
    if project is not None and not os.path.isdir(project):
        raise InstallError(f"{project}: no such directory; name the project's top directory")
    return settings_path(project)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Put the file's name before a refusal that comes from its content."""
    try:
        yield
    except InstallError as error:
        raise InstallError(f"{path}: {error}") from None


# Which events, which file, which command


def event_names(version: Version | None) -> list[str]:
    """List the event names that a client of `version` certainly understands; of the oldest one for None."""
    known = EVENT_NAMES_SINCE[0][0] if version is None else version
    return [name for since, names in EVENT_NAMES_SINCE if known >= since for name in names]


def claude_version() -> Version | None:
    """Ask `claude` for its version; None when there is none or it does not tell.

    It is looked for on the search path, then where its installers put it: a shell may know that by an alias.
    """
    program = next(filter(None, (shutil.which(os.path.expanduser(place)) for place in CLAUDE_PLACES)), None)
    if program is None:
        return None
    try:
        answer = subprocess.run(
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=CLAUDE_VERSION_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(rb"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", answer.stdout)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def settings_path(project: str | None) -> str:
    """Return the absolute path of the settings file of `project`, or of the user's own for None.

    CLAUDE_CONFIG_DIR replaces ~/.claude, it does not add to it.
    """
    if project is not None:
        return os.path.abspath(os.path.join(project, ".claude", "settings.json"))
    directory = os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude")
    return os.path.abspath(os.path.join(directory, "settings.json"))


def base_interpreter() -> str:
    """Return the absolute path of the interpreter below any virtual environment, which may go one day.

    Links outside the environment stay as they are: /usr/bin/python3 survives an upgrade, its target does not.
    """
    path = os.path.abspath(getattr(sys, "_base_executable", None) or sys.executable or "")
    if sys.prefix != sys.base_prefix:
        # Up to Python 3.10 the base executable of an environment is the environment's own link.
        while path.startswith(sys.prefix + os.sep) and os.path.islink(path):
            path = os.path.abspath(os.path.join(os.path.dirname(path), os.readlink(path)))
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise InstallError(f"{path}: no interpreter there; run install with the Python that hooks shall use")
    return path


def hook_script(home: str) -> str:
    """Return the absolute path at which our directory `home` holds the script that Claude Code runs."""
    return os.path.abspath(os.path.join(home, "hooks", "emit_event.py"))


def hook_command(interpreter: str, script: str) -> str:
    """Return the line for /bin/sh that runs `script`; it ends with status 0 even when either file is gone.

    A missing script would end with 2, and with that Claude Code blocks every tool call and every prompt.
    """
    program, argument = (_shell_quoted(os.path.abspath(path)) for path in (interpreter, script))
    return f"{program} -I -S {argument} || :"


def _shell_quoted(path: str) -> str:
    """Quote `path` for a POSIX shell, in double quotes as the documentation shows the command."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        # JSON could not carry such a path: Claude Code would run another one.
        raise InstallError(f"{path!a}: not a UTF-8 path; use another CONTEXTUATE_HOME or Python") from None
    return '"' + re.sub(r'([\\"$`])', r"\\\1", path) + '"'


# The hook's files


def install_hook_files(home: str) -> str:
    """Copy the hook below `home` and return the path of the script that Claude Code is to run.

    hooks/emit_event.py is the launcher, hooks/lib/hot_path.py what it imports from bytecode at every call,
    hooks/lib/emit_event.py the whole module for the rare paths.
    Raises InstallError when the module beside the monitor is not whole, or a file cannot be written.
    """
    source, script = os.path.abspath(emit_event.__file__), hook_script(home)
    library = os.path.join(os.path.dirname(script), "lib")
    modules = [os.path.join(library, name) for name in ("emit_event.py", "hot_path.py")]
    try:
        with open(source, "rb") as file:
            content = file.read()
        hot_path, marker, _ = content.partition(b"\n" + emit_event.HOT_PATH_END.encode())
        if not marker:
            raise InstallError(f"{source}: not whole; copy emit_event.py beside the monitor once more")
        for private in (os.path.abspath(home), os.path.dirname(script), library):
            emit_event.make_private_directory(private)
        # In this order, so that no part ever meets an older one that it needs.
        for path, text in zip(modules, (content, hot_path + b"\n")):
            emit_event.write_atomically(path, text)
        emit_event.write_atomically(script, emit_event.LAUNCHER.encode())
    except OSError as error:
        _refuse(f"the hook could not be copied from {source} to {library}", error)
    # Bytecode made now saves the first calls time; without it they make it themselves.
    for path in modules:
        with contextlib.suppress(OSError, py_compile.PyCompileError):
            py_compile.compile(path, doraise=True)
    return script


def run_in_python(python: str, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line in an interpreter that is started as the publisher is: PYTHONPATH does not count."""
    return subprocess.run([python, "-E", "-c", line], stdin=subprocess.DEVNULL, capture_output=True)


def record_publisher_python(home: str) -> bool:
    """Leave this interpreter's path for the hooks to run publishers with, if it has redis-py; tell if so."""
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('redis') is None)"
    if run_in_python(sys.executable, look).returncode:
        return False
    emit_event.make_private_directory(os.path.join(home, "hooks"))
    emit_event.write_atomically(
        os.path.join(home, "hooks", "publisher-python"), os.fsencode(sys.executable) + b"\n"
    )
    return True


def _refuse(what: str, error: OSError) -> NoReturn:
    raise InstallError(f"{what}: {error.strerror or error}; correct this, then try again") from error


# Our entries among everybody's


def merge_hooks(settings: JsonObject, command: str, names: list[str]) -> JsonObject:
    """Return `settings` with our handler once under each of `names` and under no other event.

    What is up to date stays where it is, what is outdated is updated in place, doubles go. Everything else
    stays as it is, in its order. Raises InstallError for hooks that are not laid out as documented.
    """
    handler = {"type": "command", "command": command, "timeout": HOOK_TIMEOUT_S}
    return _with_handler(settings, handler, names)


def remove_hooks(settings: JsonObject) -> JsonObject:
    """Return `settings` without our handlers, and without the groups and lists that held nothing else.

    Raises InstallError for hooks that are not laid out as documented.
    """
    return _with_handler(settings, {}, [])


def _with_handler(settings: JsonObject, handler: JsonObject, names: list[str]) -> JsonObject:
    """Return `settings` with `handler` as the only one of ours under each of `names`, and none elsewhere."""
    hooks = _checked_hooks(settings)
    changed: JsonObject = {}
    for name, groups in hooks.items():
        kept = _groups_with(groups, handler if name in names else None)
        if kept or not groups:  # a list that was empty before is somebody else's
            changed[name] = kept
    for name in names:
        if name not in hooks:
            changed[name] = _groups_with([], handler)
    result = dict(settings)
    if changed:
        result["hooks"] = changed
    elif hooks:
        del result["hooks"]
    return result


def _groups_with(groups: list[JsonObject], handler: JsonObject | None) -> list[JsonObject]:
    """Return one event's groups with `handler` as the only one of ours, with none of ours for None."""
    result = []
    wanted = handler
    for group in groups:
        kept = []
        for entry in group["hooks"]:
            if not _is_ours(entry):
                kept.append(entry)
            elif wanted is not None and group.get("matcher", "") in ("", "*", ".*"):
                kept.append({**entry, **wanted})
                wanted = None
        if kept or not group["hooks"]:
            result.append({**group, "hooks": kept})
    if wanted is not None:
        result.append({"hooks": [wanted]})
    return result


def _any_ours(groups: list[JsonObject]) -> bool:
    return any(_is_ours(entry) for group in groups for entry in group["hooks"])


def _is_ours(entry: JsonObject) -> bool:
    """Tell whether a handler runs a hook that we installed, with whatever interpreter, for whatever home.

    The whole command must have the form of ours: what somebody has put around it is not ours to throw away.
    """
    command = entry.get("command")
    if entry.get("type") != "command" or not isinstance(command, str) or "args" in entry:
        return False
    try:
        words = shlex.split(command)
    except ValueError:  # a quote is open
        return False
    return (
        len(words) >= 4
        and words[1:3] == ["-I", "-S"]
        and words[3].endswith("/hooks/emit_event.py")
        and words[4:] in ([], ["||", ":"])
    )


def _checked_hooks(settings: JsonObject) -> dict[str, list[JsonObject]]:
    """Return the hooks of `settings` by event name, {} when it has none.

    Raises InstallError with the place of whatever is not the documented object or list.
    """
    hooks: dict[str, list[JsonObject]] = settings.get("hooks", {})
    _expect(dict, hooks, "hooks")
    for name, groups in hooks.items():
        place = f"hooks.{name if name.isidentifier() else json.dumps(name)}"
        _expect(list, groups, place)
        for index, group in enumerate(groups):
            _expect(dict, group, f"{place}[{index}]")
            _expect(list, group.get("hooks"), f"{place}[{index}].hooks")
            for inner, entry in enumerate(group["hooks"]):
                _expect(dict, entry, f"{place}[{index}].hooks[{inner}]")
    return hooks


def _expect(kind: type, value: object, place: str) -> None:
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise InstallError(f"{place}: expected {expected}; correct it by hand first, nothing was changed")


# The settings file


def read_settings(path: str) -> tuple[str, JsonObject]:
    """Read a settings file; return its text, byte order mark and line ends included, and its object.

    A missing or blank file holds {}. Raises InstallError for anything but one unambiguous JSON object.
    """
    content = _file_content(path) or b""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        words = f"{path}: line {line} is not UTF-8; correct it first, nothing was changed"
        raise InstallError(words) from None
    bare = text[1:] if text.startswith("\ufeff") else text
    if not bare.strip():
        return text, {}
    try:
        settings = json.loads(
            bare, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float
        )
    except json.JSONDecodeError as error:
        raise InstallError(
            f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}; "
            "correct it first, nothing was changed"
        ) from None
    except (ValueError, RecursionError) as error:
        raise InstallError(f"{path}: {error}; correct it first, nothing was changed") from None
    if not isinstance(settings, dict):
        raise InstallError(f"{path}: expected one JSON object; correct it first, nothing was changed")
    return text, settings


def _file_content(path: str) -> bytes | None:
    """Return the bytes of a regular file, None when there is none; raise InstallError for anything else."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InstallError(f"{path}: not a regular file; move it away first, nothing was changed")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        _refuse(f"{path} cannot be read", error)


def _unique_keys(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice)} stands twice in one object")
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large to be written back")
    return number


def render_settings(settings: JsonObject, like: str) -> str:
    """Return `settings` as JSON with the indentation, line ends, final newline and byte order mark of `like`.

    Two spaces and a final newline where `like` does not show any. Raises InstallError when nested too deeply.
    """
    shown = re.match(r'\ufeff?\s*\{\s*\n([ \t]*)"', like)
    try:
        text = json.dumps(settings, indent=shown[1] if shown else "  ", ensure_ascii=False, allow_nan=False)
    except RecursionError:
        raise InstallError("nested too deeply to be written back; nothing was changed") from None
    # UTF-8 has no half pairs, JSON has: they stay escaped.
    text = re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)
    if like.endswith("\n") or not like.strip("\ufeff \t\r\n"):
        text += "\n"
    first_line, line_feed, _ = like.partition("\n")
    if line_feed and first_line.endswith("\r"):
        text = text.replace("\n", "\r\n")
    return "\ufeff" + text if like.startswith("\ufeff") else text


def diff_settings(path: str, old_text: str, new_text: str) -> str:
    """Return the unified diff between two texts of the file at `path`, "" when they are the same."""
    lines = difflib.unified_diff(
        _diff_lines(old_text), _diff_lines(new_text), path if old_text else "/dev/null", path, lineterm=""
    )
    return "".join(line + "\n" for line in lines)


def _diff_lines(text: str) -> list[str]:
    """Split at line feeds only: a JSON string may hold U+2028 and the like, which splitlines() splits at."""
    lines = text.split("\n")
    last = lines.pop()
    return [*lines, last + "\n\\ No newline at end of file"] if last else lines


def write_settings(path: str, text: str, old_text: str) -> str | None:
    """Replace the settings at `path`, read as `old_text`, by `text` in one step.

    Follows a symbolic link and keeps the file's mode and owner. Returns the path of the backup beside it,
    None when there was nothing to keep. Raises InstallError when the file has changed since it was read.
    """
    current = _file_content(path)
    if (current or b"") != old_text.encode("utf-8"):
        raise InstallError(f"{path}: somebody has just changed it; try again, nothing was changed")
    if text == old_text:
        return None
    target = os.path.realpath(path)
    backup = None
    try:
        if current is None:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            emit_event.write_atomically(target, text.encode("utf-8"))
            return None
        about = os.stat(target)
        backup = _write_backup(path, current)
        emit_event.write_atomically(target, text.encode("utf-8"), stat.S_IMODE(about.st_mode))
    except OSError as error:
        if backup is not None:
            os.unlink(backup)
        _refuse(f"{path} cannot be written, nothing was changed", error)
    with contextlib.suppress(OSError):  # a file system without owners or modes has none to keep
        if (about.st_uid, about.st_gid) != (os.geteuid(), os.getegid()):
            os.chown(target, about.st_uid, about.st_gid)
    with contextlib.suppress(OSError):
        os.chmod(target, stat.S_IMODE(about.st_mode))  # the umask has taken bits away
    return backup


def _write_backup(path: str, content: bytes) -> str:
    """Keep `content` beside `path`, for its owner only: settings hold keys. Return the backup's path."""
    first_choice = backup = f"{path}.contextuate-backup-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while os.path.lexists(backup):
        number += 1
        backup = f"{first_choice}-{number}"
    emit_event.write_atomically(backup, content)
    return backup


# Trying it


def send_through_hook(settings: Settings, fields: JsonObject) -> str:
    """Run the hook as Claude Code does, with a test notification; return what it says when debugging."""
    script = hook_script(settings.home)
    if not os.path.exists(script):
        script = os.path.abspath(emit_event.__file__)
    payload = {"session_id": TEST_SESSION_ID, "hook_event_name": "Notification", "cwd": os.getcwd(), **fields}
    environment = {
        **os.environ,
        "CONTEXTUATE_DEBUG": "1",
        "CONTEXTUATE_HOME": settings.home,
        "CONTEXTUATE_CONFIG": settings.config_path,
    }
    process = subprocess.run(
        [base_interpreter(), "-I", "-S", script],
        input=encode_json(payload),
        capture_output=True,
        env=environment,
        timeout=30,
        check=False,
    )
    return process.stderr.decode("utf-8", "replace")


def was_delivered(words: str) -> bool:
    """Tell from the hook's words whether a monitor has the event, or Redis keeps it for one."""
    return re.search(r"has stored|it is in the stream|\b[1-9]\d* subscribers got it", words) is not None


# ---------------------------------------------------------------------------
# Doctor: the whole chain, link by link, from the configuration to an event that arrives
#
# Each check of CHECKS yields findings; one that fails does not keep the next from looking. Changes nothing,
# but a test event is sent, as `test-event` does.
# ---------------------------------------------------------------------------

PROBE_DEADLINE_S = 15.0
LOW_DISK_BYTES = 200 << 20
RECENT_FAILURE_S = 24 * 3600
_RUN_INSTALL = "run: python3 contextuate_monitor.py install"


class Finding(NamedTuple):
    """What one check has found: `level` is "ok", "warn" (works, but look at it) or "fail"."""

    check: str
    level: str
    words: str
    advice: str = ""

    def lines(self) -> list[str]:
        """Return what `doctor` prints."""
        lines = [f"{self.level:5}{self.check:11}{safe_line(self.words)}"]
        return [*lines, f"{'':16}→ {self.advice}"] if self.advice and self.level != "ok" else lines


@dataclasses.dataclass
class Examination:
    """What the checks look at, and what an earlier one has left for the later ones."""

    settings: Settings
    warnings: Sequence[str]
    about: JsonObject | None  # the running monitor
    redis: Any = None  # redis-py's client, once Redis has answered

    @property
    def only_shows(self) -> bool:
        """Tell whether this looks like a team's monitor, on a machine where nobody runs Claude Code."""
        has_hook = os.path.exists(hook_script(self.settings.home))
        return self.settings["mode"] == "redis" and not has_hook and shutil.which("claude") is None


def _check_config(case: Examination) -> Iterator[Finding]:
    path = case.settings.config_path
    where = path if os.path.exists(path) else f"no {path}, so defaults"
    yield Finding(
        "config", "ok", f"{where}; mode {case.settings['mode']}, machine {case.settings.machine_id}"
    )
    for warning in case.warnings:
        yield Finding("config", "warn", warning, "correct the file, then restart the monitor")


def _check_files(case: Examination) -> Iterator[Finding]:
    home = case.settings.home
    if not os.path.isdir(home):
        yield Finding("files", "warn", f"{home} is not there yet", "start or install makes it")
        return
    about = os.stat(home)
    if about.st_uid != os.getuid():
        yield Finding("files", "fail", f"{home} belongs to another user", "set CONTEXTUATE_HOME to your own")
    elif not os.access(home, os.W_OK):
        yield Finding("files", "fail", f"{home} cannot be written", f"run: chmod u+rwx {shlex.quote(home)}")
    elif about.st_mode & 0o077:
        advice = f"run: chmod 700 {shlex.quote(home)}"
        yield Finding("files", "warn", f"{home} is open to other users", advice)
    else:
        yield Finding("files", "ok", f"{home}, for this user only")
    disk = os.statvfs(home)
    free = disk.f_bavail * disk.f_frsize
    if free < LOW_DISK_BYTES:
        yield Finding("files", "warn", f"only {human_size(free)} are free on its disk", "make room")


def _check_claude(case: Examination) -> Iterator[Finding]:
    if case.only_shows:
        return
    version = claude_version()
    if version is None:
        advice = (
            "install it, or put it on the PATH; without its version only the oldest events are registered"
        )
        yield Finding("claude", "warn", "`claude` was not found or does not tell its version", advice)
    else:
        yield Finding("claude", "ok", f"Claude Code {'.'.join(map(str, version))}")


def _check_hook(case: Examination) -> Iterator[Finding]:
    script = hook_script(case.settings.home)
    if case.only_shows:
        yield Finding("hook", "ok", "none, and no Claude Code: this machine only shows what others send")
        return
    if not os.path.exists(script):
        yield Finding("hook", "fail", f"no hook at {script}", _RUN_INSTALL)
        return
    with open(os.path.abspath(emit_event.__file__), "rb") as file:
        current = file.read()
    try:
        with open(os.path.join(os.path.dirname(script), "lib", "emit_event.py"), "rb") as file:
            installed = file.read()
    except OSError as error:
        yield Finding("hook", "fail", f"the hook is not whole: {error}", _RUN_INSTALL)
        return
    if installed != current:
        yield Finding("hook", "warn", f"{script} is of another version than the monitor", _RUN_INSTALL)
    else:
        yield Finding("hook", "ok", script)
    yield from _hook_failures(case)


def _hook_failures(case: Examination) -> Iterator[Finding]:
    path = case.settings.path("emit.log")
    try:
        if time.time() - os.path.getmtime(path) > RECENT_FAILURE_S:
            return
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 4096))
            last = file.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    except OSError:
        return
    yield Finding("hook", "warn", f"its last trouble: {safe_line(last)}", f"see {path}")


def _check_registration(case: Examination) -> Iterator[Finding]:
    if case.only_shows:
        return
    plan = plan_install(case.settings.home, None, claude_version())
    _, claude_settings = read_settings(plan.path)
    advice = f"{_RUN_INSTALL}; then start Claude Code again"
    if claude_settings.get("disableAllHooks"):
        words = f"{plan.path} has disableAllHooks, so no hook runs"
        yield Finding("registered", "fail", words, "take disableAllHooks out of it")
    if plan.new_text == plan.old_text:
        yield Finding("registered", "ok", f"{len(plan.names)} events in {plan.path}")
    elif remove_hooks(claude_settings) == claude_settings:
        here = _registered_in_project(os.getcwd())
        if here:
            yield Finding("registered", "ok", f"in {here}, for this project only")
        else:
            yield Finding("registered", "fail", f"no hook of ours in {plan.path}", advice)
    else:
        yield Finding("registered", "warn", f"{plan.path} is not as this version would register", advice)


def _registered_in_project(directory: str) -> str:
    """Return the settings of a project in which our hook is registered, "" when it is in none."""
    for name in ("settings.json", "settings.local.json"):
        path = os.path.join(directory, ".claude", name)
        with contextlib.suppress(InstallError):
            settings = read_settings(path)[1]
            if remove_hooks(settings) != settings:
                return path
    return ""


def _check_spool(case: Examination) -> Iterator[Finding]:
    unsaved = sum(size for _, size in emit_event.spool_segments(case.settings.path("unsaved")))
    if unsaved:
        words = f"{human_size(unsaved)} of events could not be written to their session's file"
        advice = f"{case.settings.path('monitor.log')} names it; correct it, then run: restart"
        yield Finding("unsaved", "warn", words, advice)
    segments = emit_event.spool_segments(case.settings.path("spool"))
    size = sum(size for _, size in segments)
    if not size:
        yield Finding("spool", "ok", "empty: no event waits on this machine")
        return
    oldest = human_duration(now_ms() - emit_event.segment_start_ms(segments[0][0]))
    waits_for = "the monitor" if case.settings["mode"] == "local" else "the publisher"
    words = f"{human_size(size)} of events wait for {waits_for}, the oldest for {oldest}"
    yield Finding("spool", "warn", words, "they are delivered when what follows is in order")


def _check_monitor(case: Examination) -> Iterator[Finding]:
    if case.about is None:
        yield from _without_monitor(case)
        return
    status = ask_monitor(case.settings, case.about, "/api/status")
    page = page_links(case.settings, case.about, False)[0]
    yield Finding("monitor", "ok", f"pid {case.about['pid']}, version {status['version']}, {page}")
    if status["version"] != __version__ or status["mode"] != case.settings["mode"]:
        words = f"it runs version {status['version']} in mode {status['mode']}"
        advice = "run: python3 contextuate_monitor.py restart"
        yield Finding(
            "monitor", "warn", f"{words}, not {__version__} in mode {case.settings['mode']}", advice
        )
    if not status["store"]["ok"]:
        yield Finding("store", "fail", f"events cannot be written: {status['store']['error']}", "make room")
    if status["spool"]["dropped"]:
        words = f"{status['spool']['dropped']} events were dropped by full spools"
        yield Finding("store", "warn", words, "keep a monitor (or Redis) running while agents work")
    path = case.about["socketPath"]
    if not os.path.exists(path) or os.lstat(path).st_uid != os.getuid():
        yield Finding("socket", "fail", f"{path} is not this user's", "set socketPath to a place of your own")
    else:
        yield Finding("socket", "ok", path)
    yield from _about_index(status["index"])


def _about_index(index: JsonObject) -> Iterator[Finding]:
    if index["state"] == "ready":
        yield Finding("index", "ok", f"{human_size(index['bytes'])}, {index['lagEvents']} events behind")
    elif index["state"] == "building":
        words = f"being made: {human_size(index['done'])} of {human_size(index['total'])} are read"
        yield Finding("index", "ok", words)
    else:
        words = f"off, so searches read every file: {index['error']}"
        yield Finding("index", "warn", words, "make room, or correct what it says; it is then made by itself")


def _without_monitor(case: Examination) -> Iterator[Finding]:
    advice = "run: python3 contextuate_monitor.py start"
    if case.settings["mode"] == "local":
        yield Finding("monitor", "fail", "not running: events wait in the spool", advice)
    else:
        yield Finding("monitor", "ok", "not running on this machine, which only sends events then")
        return
    for key, option in (("server.port", "--port"), ("server.wsPort", "--ws-port")):
        try:
            bind_tcp(case.settings["server.host"], case.settings[key], key, option).close()
        except StartError as error:
            yield Finding("ports", "fail", str(error))


# Redis


def _check_redis_package(case: Examination) -> Iterator[Finding]:
    python = emit_event.publisher_python(case.settings.home)
    try:
        answer = run_in_python(python, "import redis; print(redis.__version__)")
    except OSError as error:
        yield Finding("redis-py", "fail", f"{python}: {error}", _RUN_INSTALL)
        return
    if answer.returncode:
        advice = emit_event.redis_py_advice(python)
        yield Finding("redis-py", "fail", f"{python}, which runs the publisher, lacks it", advice)
    else:
        yield Finding("redis-py", "ok", f"{answer.stdout.decode().strip()} for {python}")


def _check_redis(case: Examination) -> Iterator[Finding]:
    values = case.settings.values
    started = time.monotonic()
    try:
        client = emit_event.redis_client(values)
        emit_event.within(emit_event.EXCHANGE_DEADLINE_S, client.ping)
    except Exception as error:
        if not lacks_right(error):  # else it has let us in, which is all that is asked here
            yield Finding("redis", "fail", emit_event.redis_trouble(error, values))
            return
    case.redis = client
    yield Finding("redis", "ok", f"{emit_event.redis_place(values)} answers ({_ms_since(started)})")
    yield from _compare_clocks(client)


def _compare_clocks(client: Any) -> Iterator[Finding]:
    try:
        before = time.time()
        seconds, micros = emit_event.within(emit_event.EXCHANGE_DEADLINE_S, client.time)
    except Exception:
        return  # TIME is no right that anybody needs
    off_s = (before + time.time()) / 2 - (seconds + micros / 1e6)
    if abs(off_s) > 2:
        side = "ahead of" if off_s > 0 else "behind"
        words = f"this machine's clock is {human_duration(abs(off_s) * 1000)} {side} that of Redis"
        yield Finding("clock", "warn", words, "let a time service set both")
    else:
        yield Finding("clock", "ok", "this machine and Redis agree")


def _check_redis_rights(case: Examination) -> Iterator[Finding]:
    """Try what a monitor needs; what an emitter needs the probe shows."""
    if case.redis is None:
        return
    channel = case.settings["redis.channel"]
    stream = f"{channel}:stream"
    yield _try_right(case, "channel", channel, lambda: _subscribe(case.redis, channel).close())
    if case.settings["redis.streamMaxLength"]:
        yield _try_right(case, "stream", stream, lambda: case.redis.xrevrange(stream, "+", "-", 1))
    else:
        yield Finding("stream", "warn", "off: a monitor that was away misses what happened meanwhile")


def _try_right(case: Examination, check: str, name: str, attempt: Callable[[], Any]) -> Finding:
    try:
        emit_event.within(emit_event.EXCHANGE_DEADLINE_S, attempt)
    except Exception as error:
        if case.about is None and lacks_right(error):
            return Finding(check, "ok", "this user may not read it, which only a monitor needs")
        return Finding(check, "fail", emit_event.redis_trouble(error, case.settings.values))
    return Finding(check, "ok", name)


def _subscribe(client: Any, channel: str) -> Any:
    """Return a confirmed subscription of our own."""
    pubsub = client.pubsub()
    pubsub.subscribe(channel)
    if pubsub.get_message(timeout=emit_event.EXCHANGE_DEADLINE_S) is None:
        raise emit_event.Overrun("no whole answer")
    return pubsub


def _check_publisher(case: Examination) -> Iterator[Finding]:
    state = emit_event.publisher_state(case.settings.home)
    if not state["running"]:
        yield Finding(
            "publisher", "ok", "none runs: it comes with the next event and leaves when it is quiet"
        )
    elif state.get("reason"):
        yield Finding("publisher", "fail", f"pid {state['pid']} waits: {state['reason']}")
    else:
        heard = f"the last heard by {state['subscribers']} subscribers"
        words = f"pid {state['pid']}, {state['published']} events published, {heard}"
        yield Finding("publisher", "ok", words)
        for name in ("channelReason", "streamReason"):
            if state.get(name):
                yield Finding("publisher", "warn", f"refused: {state[name]}")


# The probe


def _check_by_event(case: Examination) -> Iterator[Finding]:
    """Send one event as Claude Code would, and look for it at the other end."""
    token = f"doctor {uuid.uuid4()}"
    started = time.monotonic()
    heard = None
    if case.redis is not None:
        with contextlib.suppress(Exception):  # the check before this one has told why
            heard = _subscribe(case.redis, case.settings["redis.channel"])
    trouble = _send_to_redis(case, token) if case.only_shows else _send_by_hook(case, token)
    if trouble is not None:
        yield trouble
        return
    if heard is not None and not _hears(heard, token):
        words = "the event is in Redis, but the channel did not bring it to a subscriber"
        yield Finding("probe", "warn", words)
    where = "in Redis" if case.settings["mode"] == "redis" else "stored"
    if case.about is None:
        yield Finding("probe", "ok", f"an event is {where} ({_ms_since(started)})")
    elif _monitor_shows(case, token):
        yield Finding("probe", "ok", f"an event has reached the monitor ({_ms_since(started)})")
    else:
        advice = "look at `status` for what the monitor says of Redis"
        yield Finding("probe", "fail", f"an event is {where}, but the monitor does not show it", advice)


def _send_by_hook(case: Examination, token: str) -> Finding | None:
    """Send the probe through the hook; return what went wrong."""
    words = send_through_hook(case.settings, {"message": token, "notification_type": "test"})
    if was_delivered(words):
        return None
    last = words.strip().rpartition("\n")[2].removeprefix("contextuate: ")
    return Finding("probe", "fail", f"an event did not get through: {last}", "see the findings above")


def _send_to_redis(case: Examination, token: str) -> Finding | None:
    """Publish the probe ourselves, where there is no hook; return what kept us from it."""
    if case.redis is None:
        return Finding("probe", "fail", "not sent: Redis does not answer", "see the findings above")
    event = test_event(case.settings.machine_id)
    event["data"]["message"] = token
    send = functools.partial(case.redis.publish, case.settings["redis.channel"], encode_json(event))
    try:
        emit_event.within(emit_event.EXCHANGE_DEADLINE_S, send)
    except Exception as error:
        if lacks_right(error):
            words = "not sent: this user may not publish, which only a machine with a hook needs"
            return Finding("probe", "ok", words)
        words = emit_event.redis_trouble(error, case.settings.values)
        return Finding("probe", "fail", f"an event could not be published: {words}")
    return None


def _hears(pubsub: Any, token: str) -> bool:
    deadline = time.monotonic() + PROBE_DEADLINE_S
    while time.monotonic() < deadline:
        message = pubsub.get_message(timeout=1.0)
        if message is not None and message["type"] == "message" and token.encode() in message["data"]:
            return True
    return False


def _monitor_shows(case: Examination, token: str) -> bool:
    deadline = time.monotonic() + PROBE_DEADLINE_S
    while time.monotonic() < deadline:
        answer = ask_monitor(case.settings, case.about or {}, "/api/events?limit=200")
        if any(event["data"].get("message") == token for event in answer["events"]):
            return True
        time.sleep(0.05)
    return False


def lacks_right(error: BaseException) -> bool:
    """Tell whether Redis refused a command to this user (redis-py's NoPermissionError)."""
    return type(error).__name__ == "NoPermissionError"


def _ms_since(started: float) -> str:
    return f"{(time.monotonic() - started) * 1000:.0f} ms"


# In the order in which an event travels: the mode that a check is for (None: both), its name, the check.
CHECKS: tuple[tuple[str | None, str, Callable[[Examination], Iterator[Finding]]], ...] = (
    (None, "config", _check_config),
    (None, "files", _check_files),
    (None, "claude", _check_claude),
    (None, "hook", _check_hook),
    (None, "registered", _check_registration),
    (None, "spool", _check_spool),
    (None, "monitor", _check_monitor),
    ("redis", "redis-py", _check_redis_package),
    ("redis", "redis", _check_redis),
    ("redis", "rights", _check_redis_rights),
    ("redis", "publisher", _check_publisher),
    (None, "probe", _check_by_event),
)


def examine(settings: Settings, warnings: Sequence[str]) -> Iterator[Finding]:
    """Yield what every check of CHECKS finds; `warnings` are those of the configuration."""
    case = Examination(settings, warnings, running_monitor(settings))
    for mode, name, check in CHECKS:
        if mode not in (None, settings["mode"]):
            continue
        try:
            yield from check(case)
        except Exception as error:  # one check must not keep the others from looking
            yield Finding(name, "fail", f"could not be examined: {type(error).__name__}: {error}")


# ---------------------------------------------------------------------------
# Demo: a working day of a small team, made up, marked as a demo
#
# Owns: the story, told in wrapped payloads of the shapes the real client sends.
# Does no I/O and knows nothing of the monitor. A scene has its own seeded random and times relative to "now":
# a day always tells the same.
# ---------------------------------------------------------------------------

_Step = tuple[str, ...]  # tool ("!" = it fails), target, detail, output; see _SHAPES for each tool
_Turn = tuple[int, str, str, str]  # minutes before now, prompt, step letters (a blank ends a batch), answer

_DEMO_MODEL = "claude-opus-5-5"
_RED, _GREEN, _BOLD, _OFF = "\x1b[31m", "\x1b[32m", "\x1b[1m", "\x1b[0m"
_DEMO_HOMES = {"mira-laptop": "/home/mira", "build-box": "/home/ci", "jonas-mac": "/Users/jonas"}

# fmt: off
# Which payloads carry permission_mode (P) and effort (E).
_DEMO_MODES: Mapping[str, str] = {
    "UserPromptSubmit": "P", "StopFailure": "E", "PreToolUse": "PE", "PermissionRequest": "PE",
    "PostToolUse": "PE", "PostToolUseFailure": "PE", "PostToolBatch": "PE", "Stop": "PE",
    "SubagentStop": "PE",
}
# "<tool> <target>" begins with → from, to (ms); the first that fits.
_DEMO_DURATIONS_MS: tuple[tuple[str, int, int], ...] = (
    ("Bash npm", 3800, 14000), ("Bash uv run", 2900, 9000), ("Bash cargo", 2500, 16000),
    ("Bash terraform", 5000, 21000), ("Bash mkdocs", 1800, 4200), ("Bash", 35, 900), ("WebFetch", 900, 3800),
    ("mcp__", 250, 1400), ("", 4, 60),
)
_DEMO_TASK, _DEMO_WHY = "Name the text in range errors", "Error::NoRange should carry what was typed"
_SHOP_STEPS: Mapping[str, _Step] = {
    "g": ("Grep", "applyDiscount", "src", "src/cart/totals.ts:41:export function applyDiscount("),
    "G": ("Glob", "src/checkout/**/*.tsx", "", "src/checkout/Address.tsx\nsrc/checkout/Payment.tsx"),
    "r": ("Read", "src/cart/totals.ts", "  if (!coupon) return net;\n  return net - net * coupon.rate;\n}"),
    "R": ("Read", "src/checkout/Payment.tsx", "  const [busy, setBusy] = useState(false);\n"),
    "e": ("Edit", "src/cart/totals.ts", "  if (!coupon) return net;\n  return net - net * coupon.rate;",
          "  if (!coupon) return net;\n  return Math.max(0, net - roundCents(net * coupon.rate));"),
    "E": ("Edit", "src/checkout/Payment.tsx", 'type="submit"', 'type="submit" disabled={busy}'),
    "w": ("Write", "src/cart/round.ts", "export const roundCents = (n) => Math.round(n * 100) / 100;\n"),
    "T": ("Bash!", "npm test -- cart", "Run the cart tests", f"{_RED}FAIL{_OFF} test/cart/totals.test.ts\n"
          f"  {_RED}✕ a coupon never makes a total negative (6 ms){_OFF}\n    Expected: {_GREEN}0{_OFF}\n"
          f"    Received: {_RED}-4.99{_OFF}\n\nTests: {_RED}1 failed{_OFF}, 23 passed, 24 total"),
    "t": ("Bash", "npm test -- cart", "Run the cart tests", f"{_GREEN}PASS{_OFF} test/cart/totals.test.ts\n"
          f"{_GREEN}PASS{_OFF} test/cart/round.test.ts\n\nTests: {_GREEN}27 passed{_OFF}, 27 total"),
    "l": ("Bash", "npm run lint", "Lint the project", "\n> tidewater-shop@4.2.0 lint\n> eslint src test\n"),
    "d": ("Bash", "git diff --stat", "List changes", " src/cart/round.ts  | 1 +\n src/cart/totals.ts | 2 +-"),
    "o": ("TodoWrite", "1", "Reproduce the negative total|Round in one place|Cover coupons over 100 %"),
    "p": ("mcp__github__get_pull_request", "", '{"owner": "tidewater", "repo": "shop", "pull_number": 418}',
          '{"number": 418, "title": "Coupons: clamp totals at zero", "state": "open", "changed_files": 3}'),
    "f": ("WebFetch", "https://developer.mozilla.org/docs/Web/HTML/Element/button", "What does disabled do?",
          "A disabled button takes no clicks and no focus, and is not submitted."),
}
_CLI_STEPS: Mapping[str, _Step] = {
    "g": ("Grep", "fn parse_range", "src", "src/range.rs:18:pub fn parse_range(text: &str) -> Result {"),
    "r": ("Read", "src/range.rs", "pub struct Range {\n    from: Option<Time>,\n    to: Option<Time>,\n}"),
    "R": ("Read", "src/main.rs", "fn main() -> ExitCode {\n    run(&Args::parse()).into()\n}"),
    "e": ("Edit", "src/range.rs", ".ok_or(Error::NoRange)?;", ".ok_or(Error::NoRange(text.into()))?;"),
    "E": ("Edit", "src/error.rs", "pub enum Error {\n    NoRange,", "pub enum Error {\n    NoRange(String),"),
    "m": ("Edit", "src/main.rs", "        Error::NoRange => 2,", "        Error::NoRange(_) => 2,"),
    "w": ("Write", "tests/range.rs", '#[test]\nfn open() {\n    assert!(parse("12:00..").is_ok());\n}\n'),
    "B": ("Bash!", "cargo build", "Build", f"{_RED}{_BOLD}error[E0532]{_OFF}{_BOLD}: expected unit, found "
          f"tuple variant `Error::NoRange`{_OFF}\n --> src/main.rs:57:9\n   |\n57 |     Error::NoRange => 2\n"
          f"   |     {_RED}^^^^^^^^^^^^^^{_OFF} help: use `Error::NoRange(_)`\n\nerror: could not compile"),
    "b": ("Bash", "cargo build", "Build", f"    {_GREEN}Finished{_OFF} dev profile in 4.31s"),
    "t": ("Bash", "cargo test", "Test", f"test result: {_GREEN}ok{_OFF}. 41 passed; 0 failed; 0 ignored"),
    "c": ("Bash", "cargo clippy -- -D warnings", "Lint", f"    {_GREEN}Finished{_OFF} dev profile in 2.07s"),
    "1": ("TaskCreate", _DEMO_TASK, _DEMO_WHY, "1"),
    "2": ("TaskUpdate", "1", "in_progress"),
    "3": ("TaskUpdate", "1", "completed"),
    "d": ("Bash", "git diff src/main.rs", "Show it", f"{_BOLD}--- a/src/main.rs\n+++ b/src/main.rs{_OFF}\n"
          f"{_RED}-        Error::NoRange => 2,{_OFF}\n{_GREEN}+        Error::NoRange(_) => 2,{_OFF}"),
}
_INFRA_STEPS: Mapping[str, _Step] = {
    "g": ("Grep", "instance_class", "modules", "modules/db/main.tf:24:  instance_class = var.instance_class"),
    "r": ("Read", "modules/db/main.tf", "  instance_class = var.instance_class\n  multi_az       = false\n}"),
    "R": ("Read", "envs/staging.tfvars", 'region         = "eu-central-1"\ninstance_class = "db.t4g.medium"'),
    "e": ("Edit", "modules/db/main.tf", "  multi_az       = false", "  multi_az       = var.multi_az"),
    "w": ("Write", "modules/db/variables.tf", 'variable "multi_az" {\n  type = bool\n  default = false\n}\n'),
    "v": ("Bash", "terraform validate", "Check", f"{_GREEN}Success!{_OFF} The configuration is valid."),
    "p": ("Bash", "terraform plan -out=staging", "Plan staging", f"  {_GREEN}~{_OFF} aws_db_instance.main\n"
          f"      multi_az: false -> true\n\n{_BOLD}Plan:{_OFF} 0 to add, 1 to change, 0 to destroy."),
    "P": ("Bash!", "terraform plan -out=prod.plan", "Plan production",
          f"{_RED}Error:{_OFF} Error acquiring the state lock\n\n  Who: ci@build-box\n  Created: 14 min ago"),
    "s": ("Bash", "git status --short", "List changes", " M modules/db/main.tf\n?? modules/db/variables.tf"),
}
_DATA_STEPS: Mapping[str, _Step] = {
    "g": ("Grep", "tz_localize", "pipeline", 'pipeline/hourly.py:63: index = rows.index.tz_localize("UTC")'),
    "G": ("Glob", "pipeline/**/*.py", "", "pipeline/hourly.py\npipeline/load.py\npipeline/export.py"),
    "r": ("Read", "pipeline/hourly.py", 'rows.index = rows.index.tz_localize("UTC")\nreturn rows'),
    "R": ("Read", "pipeline/load.py", "def load(day: date) -> Rows:\n    return read_parquet(path(day))"),
    "e": ("Edit", "pipeline/hourly.py", '    rows.index = rows.index.tz_localize("UTC")\n    return rows',
          '    if not rows.index.tz:\n        rows.index = rows.index.tz_localize("UTC")\n    return rows'),
    "E": ("Edit", "pipeline/load.py", "read_parquet(path(day))", "read_parquet(path(day), columns=COLUMNS)"),
    "w": ("Write", "tests/test_dst.py", "def test_long_night():\n    assert len(hourly(OCT_26)) == 25\n"),
    "T": ("Bash!", "uv run pytest -q --color=yes tests", "Run the tests", f"..........{_RED}F{_OFF}......\n"
          f"{_RED}{_BOLD}____ test_long_night ____{_OFF}\n>   assert len(hourly(OCT_26)) == 25\n{_BOLD}{_RED}"
          f"E   assert 24 == 25{_OFF}\n\n{_RED}FAILED tests/test_dst.py{_OFF}\n1 failed, 16 passed in 2.71s"),
    "t": ("Bash", "uv run pytest -q --color=yes tests", "Run the tests", f"{_GREEN}17 passed{_OFF} in 2.58s"),
    "q": ("Bash", "duckdb meter.db 'select count(*) from readings'", "Count readings", "│ 18403112 │"),
    "l": ("Bash", "uv run ruff check pipeline tests", "Lint", "All checks passed!"),
    "o": ("TodoWrite", "2", "Reproduce the missing hour|Localise naive times only|Backfill October"),
}
_DOCS_STEPS: Mapping[str, _Step] = {
    "g": ("Grep", "on-call", "docs", "docs/operations/rota.md:3:# On-call rota\ndocs/index.md:19:- On-call"),
    "r": ("Read", "docs/operations/rota.md", "# On-call rota\n\nThe rota changes on Mondays at 10:00."),
    "e": ("Edit", "docs/operations/rota.md", "on Mondays at 10:00.", "on Mondays at 10:00, in a call."),
    "w": ("Write", "docs/operations/handover.md", "# Handing over\n\n1. Incidents\n2. Planned changes\n"),
    "b": ("Bash", "mkdocs build --strict", "Build the site", "INFO    -  Documentation built in 1.62 s"),
    "B": ("Bash!", "mkdocs build --strict", "Build the site", "WARNING -  'index.md' contains a link "
          "'operations/handovers.md', but the target is not found.\n\nAborted with 1 warning in strict mode"),
    "x": ("Edit", "docs/index.md", "(operations/handovers.md)", "(operations/handover.md)"),
}
_DEMO_STEPS: Mapping[str, Mapping[str, _Step]] = {
    "tidewater-shop": _SHOP_STEPS, "logslice": _CLI_STEPS, "platform-infra": _INFRA_STEPS,
    "meter-pipeline": _DATA_STEPS, "handbook": _DOCS_STEPS,
}
# name: (machine, project, permission mode), its turns, how it ended ("" = it did not)
_DEMO_SESSIONS: Mapping[str, tuple[tuple[str, str, str], tuple[_Turn, ...], str]] = {
    "nightly": (("build-box", "tidewater-shop", "bypassPermissions"), (
        (480, "Update the patch-level dependencies and report what breaks.", "gG r t l d T r e t l d",
         "All updates are in. A changed rounding helper broke one cart test; it is fixed."),), "other"),
    "rota": (("jonas-mac", "handbook", "acceptEdits"), (
        (462, "The on-call page should say how we hand over", "g r e w B x b", "Added, with a checklist."),
        (441, "Shorter, two points are enough", "r w e b", "Cut to two points.")), "prompt_input_exit"),
    "review": (("mira-laptop", "tidewater-shop", "default"), (
        (408, "Review pull request 418, in particular the rounding", "p gr R d t",
         "Sound overall. A coupon above 100 % still gives a negative total, and rounding happens twice."),
        (391, "Fix both on the branch", "o r w e T r e t l d", "Both fixed, with tests for large coupons."),
        (366, "Can the pay button be pressed twice?", "f R E t", "Not any more.")), "prompt_input_exit"),
    "staging": (("build-box", "platform-infra", "acceptEdits"), (
        (352, "Make multi-AZ a variable of the database module and plan staging", "g rR e w v p s",
         "The module takes `multi_az`; staging plans one change in place, nothing is replaced."),
        (333, "Also plan production, do not apply", "R P s P", "Another run holds the lock.")), "other"),
    "missing-hour": (("mira-laptop", "meter-pipeline", "default"), (
        (318, "Why does the last Sunday of October have 24 hours in the hourly export?", "gG r q T",
         "Times that are already aware are localised again, and the repeated hour is merged."),
        (302, "Fix it and add a test", "o w r e T rR E t l", "Fixed; the night now has 25 hours."),
        (274, "Does the backfill need anything else?", "R q g", "No, October again is enough.")), "clear"),
    "checkout": (("mira-laptop", "tidewater-shop", "default"), (
        (176, "Customers can press Pay twice, stop that", "gG R r E t l", "The button is now disabled."),
        (121, "Cover it with a test", "R w T R E t d", "A test presses it twice and expects one order."),
        (7, "Make a clean production build and check its size", "d l R t", "")), ""),
    "ranges": (("jonas-mac", "logslice", "default"), (
        (143, "Range errors should say what was typed", "1 2 g rR e E B m b t 3 d", "They quote it now."),
        (97, "Add open-ended ranges like 12:00..", "rR e w b t c", "`12:00..` and `..12:00` are tested."),
        (12, "What should happen with 14:00..12:00?", "r g E", "")), ""),
    "style-guide": (("jonas-mac", "handbook", "acceptEdits"), (
        (84, "Check the operation pages against our style", "g r r e b", "Four deviate; three corrected."),
        (18, "Take the fourth as well", "r e B x b", "Done. Shall I rename it to match its title?")), ""),
    "backfill": (("build-box", "meter-pipeline", "bypassPermissions"), (
        (66, "Prepare the October backfill: what will change?", "G rR q g l t", "Only one hour changes."),
        (3, "Check both halves of October in parallel, then write the runbook", "G q", "")), ""),
    "follow": (("jonas-mac", "logslice", "acceptEdits"), (
        (52, "Plan a --follow that survives rotation", "g R r g d", "Watch the inode, reopen on change."),
        (3, "Good plan. Implement it", "rR", "")), ""),
    "drift": (("build-box", "platform-infra", "acceptEdits"), (
        (58, "Compare staging with what is deployed", "R g r v p s", "One drift: `multi_az`, set by hand."),
        (8, "Refresh the state of production and compare again", "R s v", "")), ""),
    "export": (("mira-laptop", "meter-pipeline", "default"), (
        (47, "The export takes 9 minutes, where does the time go?", "G rR q g E t l", "On unused columns."),
        (24, "Then read only the columns that are needed, everywhere", "G rR g E t r T", "")), ""),
    "invoice": (("mira-laptop", "tidewater-shop", "plan"), (
        (155, "Which parts of the code compute VAT?", "gG r R g", "Only `totals.ts`; all reuse it."),), ""),
}
# fmt: on


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


class _Doing(NamedTuple):
    """One step of _DEMO_STEPS as it is done: where, from which line on, and what its table says."""

    cwd: str
    start: int
    target: str
    detail: str
    output: str

    @property
    def path(self) -> str:
        """Return the file that the step is about."""
        return f"{self.cwd}/{self.target}"


_Shape = tuple[JsonObject, Any, Any]  # tool_input, tool_response, the words that the model gets


def _shape(step: _Step, cwd: str, rng: random.Random) -> _Shape:
    """Return what the client tells of one step of _DEMO_STEPS."""
    tool, target, detail, output = (*step, "", "")[:4]
    shape = _SHAPES.get(tool.rstrip("!"), _server_tool_shape)
    return shape(_Doing(cwd, rng.randrange(12, 90), target, detail, output))


def _bash_shape(it: _Doing) -> _Shape:
    return {"command": it.target, "description": it.detail}, _bash_response(it.output), it.output


def _bash_response(output: str) -> JsonObject:
    return {"stdout": output, "stderr": "", "interrupted": False, "isImage": False, "noOutputExpected": False}


def _read_shape(it: _Doing) -> _Shape:
    lines = it.detail.splitlines()
    file = {"filePath": it.path, "content": it.detail, "numLines": len(lines), "startLine": it.start}
    file["totalLines"] = it.start + 40
    words = "\n".join(f"{it.start + i}\t{line}" for i, line in enumerate(lines))
    return {"file_path": it.path}, {"type": "text", "file": file}, words


def _edit_shape(it: _Doing) -> _Shape:
    old, new = it.detail.splitlines(), it.output.splitlines()
    diff = [line[0] + line[2:] for line in difflib.ndiff(old, new) if line[0] != "?"]
    hunk = {"oldStart": it.start, "oldLines": len(old), "newStart": it.start, "newLines": len(new)}
    given = {"file_path": it.path, "old_string": it.detail, "new_string": it.output, "replace_all": False}
    response: JsonObject = {"filePath": it.path, "oldString": it.detail, "newString": it.output}
    response.update(originalFile=it.detail + "\n", structuredPatch=[{**hunk, "lines": diff}])
    response.update(userModified=False, replaceAll=False)
    return given, response, f"The file {it.path} has been updated successfully."


def _write_shape(it: _Doing) -> _Shape:
    response: JsonObject = {"type": "create", "filePath": it.path, "content": it.detail}
    response.update(structuredPatch=[], originalFile=None, userModified=False)
    given = {"file_path": it.path, "content": it.detail}
    return given, response, f"File created successfully at: {it.path}"


def _grep_shape(it: _Doing) -> _Shape:
    given = {"pattern": it.target, "path": f"{it.cwd}/{it.detail}", "output_mode": "content", "-n": True}
    response = {"mode": "content", "numFiles": 0, "filenames": [], "content": it.output}
    return given, {**response, "numLines": len(it.output.splitlines())}, it.output


def _glob_shape(it: _Doing) -> _Shape:
    names = [f"{it.cwd}/{name}" for name in it.output.splitlines()]
    response = {"filenames": names, "durationMs": it.start, "numFiles": len(names), "truncated": False}
    return {"pattern": it.target}, response, "\n".join(names)


def _todo_shape(it: _Doing) -> _Shape:
    old_todos, new_todos = (_todos(it.detail.split("|"), int(it.target) - back) for back in (1, 0))
    response = {"oldTodos": old_todos, "newTodos": new_todos}
    return {"todos": new_todos}, response, "Todos have been modified successfully."


def _todos(subjects: list[str], done: int) -> list[JsonObject]:
    statuses = ["completed"] * done + ["in_progress"] + ["pending"] * len(subjects)
    return [{"content": text, "status": now, "activeForm": text} for text, now in zip(subjects, statuses)]


def _task_create_shape(it: _Doing) -> _Shape:
    task = {"id": it.output, "subject": it.target, "description": it.detail}
    given = {"subject": it.target, "description": it.detail, "activeForm": it.target}
    return given, {"task": task}, f"Task #{it.output} created successfully: {it.target}"


def _task_update_shape(it: _Doing) -> _Shape:
    change = {"from": "pending" if it.detail == "in_progress" else "in_progress", "to": it.detail}
    response = {"success": True, "taskId": it.target, "updatedFields": ["status"], "statusChange": change}
    return {"taskId": it.target, "status": it.detail}, response, f"Updated task #{it.target} status"


def _fetch_shape(it: _Doing) -> _Shape:
    response = {"bytes": it.start * 731, "code": 200, "codeText": "OK", "result": it.output, "url": it.target}
    return {"url": it.target, "prompt": it.detail}, {**response, "durationMs": it.start * 29}, it.output


def _server_tool_shape(it: _Doing) -> _Shape:
    content = [{"type": "text", "text": it.output}]
    return json.loads(it.detail), content, content


_SHAPES: Mapping[str, Callable[[_Doing], _Shape]] = {
    "Bash": _bash_shape,
    "Read": _read_shape,
    "Edit": _edit_shape,
    "Write": _write_shape,
    "Grep": _grep_shape,
    "Glob": _glob_shape,
    "TodoWrite": _todo_shape,
    "TaskCreate": _task_create_shape,
    "TaskUpdate": _task_update_shape,
    "WebFetch": _fetch_shape,
}


class _Scene:
    """One session, or one of its subagents, and its clock `at` (ms); each method tells what happens next."""

    def __init__(self, key: str, at: float, place: tuple[str, str, str], source: str = "startup") -> None:
        """Start a session; all its ids come from `key`; `place` is machine, project, permission mode."""
        self.at = int(at)
        self.key = key
        self.rng = random.Random(self.key)
        self.machine, self.project, self.mode = place
        home = _DEMO_HOMES[self.machine]
        self.cwd = f"{home}/projects/{self.project}"
        self.session_id = _uuid(self.rng)
        self.transcript = f"{home}/.claude/projects/{self.cwd.replace('/', '-')}/{self.session_id}"
        self.prompt_id = ""
        self.events: list[tuple[int, JsonObject]] = []  # shared with the subagents, as is the next one
        self.background: list[JsonObject] = []  # background_tasks that run
        self.spent: dict[str, dict[str, int]] = {}  # agent id, "" for the main one → its tokens so far
        self.agent_fields: JsonObject = {}  # agent_id, agent_type of a subagent
        self.agent_call: JsonObject = {}  # the Agent call that started this subagent
        self.began = self.at
        self.tools_used: list[str] = []
        self.pace_s = (1.2, 6.0)  # between two batches
        self.longest_ms = 60_000  # of one call
        interactive = self.mode != "bypassPermissions" and source == "startup"
        self.emit("SessionStart", source=source, **({"model": _DEMO_MODEL} if interactive else {}))
        path = f"{self.cwd}/CLAUDE.md"
        self.emit("InstructionsLoaded", file_path=path, memory_type="Project", load_reason="session_start")

    def emit(self, name: str, **fields: Any) -> None:
        """Add one wrapped payload at the clock's time."""
        hook: JsonObject = {"session_id": self.session_id, "transcript_path": f"{self.transcript}.jsonl"}
        hook["cwd"] = self.cwd
        modes = _DEMO_MODES.get(name, "")
        if self.prompt_id:
            hook["prompt_id"] = self.prompt_id
        if "P" in modes:
            hook["permission_mode"] = self.mode
        hook.update(self.agent_fields)
        if "E" in modes:
            hook["effort"] = {"level": "medium"}
        hook.update(hook_event_name=name, **fields)
        event_id = _uuid(random.Random(f"{self.key}/{len(self.events)}/{name}"))
        wrapped = {"id": event_id, "timestamp": self.at, "machineId": self.machine, "demo": True}
        self.events.append((self.at, {**wrapped, "hook": hook}))

    def pause(self, low_s: float, high_s: float) -> None:
        self.at += int(self.rng.uniform(low_s, high_s) * 1000)

    def wait_until(self, at: float) -> None:
        self.at = max(self.at, int(at))

    def hurry(self, longest_ms: int) -> None:
        """Take short steps from here on: somebody is watching."""
        self.pace_s, self.longest_ms = (0.8, 2.5), longest_ms

    def prompt(self, text: str) -> None:
        self.prompt_id = _uuid(self.rng)
        self.emit("UserPromptSubmit", prompt=text)
        self.pause(1, 3)

    def open_call(self, tool: str, tool_input: JsonObject) -> JsonObject:
        """Emit PreToolUse and return the fields that its later events repeat."""
        call: JsonObject = {"tool_name": tool, "tool_input": tool_input}
        call["tool_use_id"] = f"toolu_{self.rng.getrandbits(72):018x}"
        if tool.startswith("mcp__"):
            call["mcp_server"] = {"name": tool.split("__")[1], "source": "user"}
        self.tools_used.append(tool)
        self.emit("PreToolUse", **call)
        return call

    def close_calls(self, closing: list[tuple[int, int, JsonObject, Any, Any]]) -> None:
        """Emit results and their batch from (end, duration in ms, call, response or None, words)."""
        batch = []
        for end, duration_ms, call, response, words in sorted(closing, key=lambda result: result[0]):
            self.wait_until(end)
            given = call["tool_input"]
            if call["tool_name"] == "TaskCreate":
                self.emit("TaskCreated", task_id="1", task_subject=_DEMO_TASK, task_description=_DEMO_WHY)
            elif given.get("status") == "completed":
                self.emit("TaskCompleted", task_id="1", task_subject=_DEMO_TASK, task_description=_DEMO_WHY)
            if response is None:
                failure = {"error": words, "is_interrupt": False, "duration_ms": duration_ms}
                self.emit("PostToolUseFailure", **call, **failure)
            else:
                self.emit("PostToolUse", **call, tool_response=response, duration_ms=duration_ms)
            told = {key: value for key, value in call.items() if key != "mcp_server"}
            batch.append({**told, "tool_response": words})
        self.at += self.rng.randrange(4, 25)
        self.emit("PostToolBatch", tool_calls=batch)
        self.answer_is_made()

    def answer_is_made(self) -> None:
        """Count the tokens of one answer: it reads what was read before from the cache, and a little more."""
        spent = self.spent.setdefault(
            self.agent_fields.get("agent_id", ""),
            {"input": 0, "output": 0, "cacheRead": 0, "cacheCreation": 14_000},
        )
        spent["cacheRead"] += spent["cacheCreation"]
        spent["cacheCreation"] += 900
        spent["input"] += 6
        spent["output"] += 280

    def usage(self) -> JsonObject:
        """Return the session's tokens so far, as they are told on the real client's events."""
        total: dict[str, int] = {}
        for spent in self.spent.values():
            for name, count in spent.items():
                total[name] = total.get(name, 0) + count
        agents = {agent: {_DEMO_MODEL: dict(spent)} for agent, spent in self.spent.items()}
        return {"models": {_DEMO_MODEL: total}, "agents": agents, "model": _DEMO_MODEL}

    def work(self, letters: str) -> None:
        """Do steps of the project's table; those of one word run in parallel."""
        for word in letters.split():
            self.pause(*self.pace_s)
            closing = []
            for step in (_DEMO_STEPS[self.project][letter] for letter in word):
                tool_input, response, words = _shape(step, self.cwd, self.rng)
                tool = step[0].rstrip("!")
                named = f"{tool} {step[1]}"
                low, high = next(row[1:] for row in _DEMO_DURATIONS_MS if named.startswith(row[0]))
                duration_ms = min(self.rng.randrange(low, high), self.longest_ms + self.rng.randrange(400))
                if step[0].endswith("!"):
                    response, words = None, f"Exit code 1\n{words}"
                call = self.open_call(tool, tool_input)
                closing.append((self.at + duration_ms, duration_ms, call, response, words))
                self.at += self.rng.randrange(2, 12)
            self.close_calls(closing)

    def work_until(self, letters: str, until: float) -> None:
        """Repeat the steps as long as the clock is before `until`."""
        words = itertools.cycle(letters.split())
        while self.at + self.pace_s[1] * 1000 < until:
            self.work(next(words))

    def ask_permission(self, tool: str, tool_input: JsonObject) -> JsonObject:
        """Open a call that needs a person's permission; AskUserQuestion asks in the same way."""
        call = self.open_call(tool, tool_input)
        self.at += self.rng.randrange(10, 60)
        commands = tool_input.get("command", "").split(" && ")
        rules = [{"toolName": tool, "ruleContent": command} for command in commands]
        suggestion = {"type": "addRules", "rules": rules, "behavior": "allow", "destination": "localSettings"}
        extra = {"permission_suggestions": [suggestion]} if tool == "Bash" else {}
        self.emit("PermissionRequest", tool_name=tool, tool_input=tool_input, **extra)
        self.at += 6000
        message = "Claude needs your permission"
        self.emit("Notification", message=message, notification_type="permission_prompt")
        return call

    def finish_command(self, call: JsonObject, at: float, duration_ms: int, output: str) -> None:
        """Let an open Bash call come to its end."""
        self.close_calls([(int(at), duration_ms, call, _bash_response(output), output)])

    def agent(self, kind: str, title: str, brief: str, background: bool = False) -> _Scene:
        """Start a subagent and return its scene; `hand_back` ends it."""
        self.pause(*self.pace_s)
        given: JsonObject = {"description": title, "prompt": brief, "subagent_type": kind}
        call = self.open_call("Agent", given if background else {**given, "run_in_background": False})
        agent_id = f"a{self.rng.getrandbits(64):016x}"
        child = copy.copy(self)
        child.agent_fields = {"agent_id": agent_id, "agent_type": kind}
        child.agent_call, child.tools_used, child.began = call, [], self.at
        child.at += self.rng.randrange(20, 90)
        child.emit("SubagentStart")
        if background:
            task = {"id": agent_id, "type": "subagent", "status": "running", "description": title}
            self.background.append({**task, "agent_type": kind})
            output = f"/tmp/claude-501/{self.session_id}/tasks/{agent_id}.output"
            launched: JsonObject = {"isAsync": True, "status": "async_launched", "agentId": agent_id}
            launched.update(description=title, resolvedModel=_DEMO_MODEL, prompt=brief)
            launched.update(outputFile=output, canReadOutputFile=True, canContinueAgent=True)
            words = [{"type": "text", "text": f"Async agent launched successfully.\nagentId: {agent_id}"}]
            self.close_calls([(self.at + 130, 15, call, launched, words)])
        return child

    def hand_back(self, child: _Scene, report: str) -> None:
        """End a subagent: the result of its call, or for a background one the notification."""
        child.pause(1, 3)
        child.answer_is_made()
        agent_id, call = child.agent_fields["agent_id"], child.agent_call
        ended: JsonObject = {"background_tasks": list(self.background), "session_crons": []}
        path = f"{self.transcript}/subagents/agent-{agent_id}.jsonl"
        ended.update(agent_transcript_path=path, last_assistant_message=report)
        child.emit("SubagentStop", stop_hook_active=False, usage=child.usage(), **ended)
        duration_ms, uses = child.at - child.began, len(child.tools_used)
        tokens = 9000 + 1_700 * uses
        self.wait_until(child.at + 8)
        if any(task["id"] == agent_id for task in self.background):
            self.background[:] = [task for task in self.background if task["id"] != agent_id]
            self.prompt(
                f"<task-notification>\n<task-id>{agent_id}</task-id>\n"
                f"<tool-use-id>{call['tool_use_id']}</tool-use-id>\n<status>completed</status>\n"
                f'<summary>Agent "{call["tool_input"]["description"]}" finished</summary>\n'
                f"<result>{report}</result>\n<usage><subagent_tokens>{tokens}</subagent_tokens>"
                f"<tool_uses>{uses}</tool_uses><duration_ms>{duration_ms}</duration_ms>"
                "</usage>\n</task-notification>"
            )
            return
        content = [{"type": "text", "text": report}]
        child_fields = {"agentId": agent_id, "agentType": child.agent_fields["agent_type"]}
        response: JsonObject = {"status": "completed", "prompt": call["tool_input"]["prompt"]}
        response.update(child_fields, toolsUsed=sorted(set(child.tools_used)))
        response.update(content=content, resolvedModel=_DEMO_MODEL, totalDurationMs=duration_ms)
        response.update(totalTokens=tokens, totalToolUseCount=uses, canContinueAgent=True)
        self.close_calls([(self.at, duration_ms, call, response, content)])

    def stop(self, answer: str) -> None:
        self.pause(1, 3)
        self.answer_is_made()
        tasks = {"background_tasks": list(self.background), "session_crons": []}
        self.emit("Stop", stop_hook_active=False, last_assistant_message=answer, usage=self.usage(), **tasks)


def demo_day(now_ms: int, live_s: float, seed: int = 7) -> Iterator[tuple[int, JsonObject]]:
    """Yield (timestamp_ms, wrapped payload) in time order: about 8 hours before now_ms, then live_s seconds.

    All ids come from `seed` and `now_ms`.
    """
    story = f"{seed}/{now_ms}"
    end_ms = now_ms + max(live_s, 300.0) * 1000  # of the story; what comes after live_s is left out
    scenes: dict[str, _Scene] = {}
    for name, (place, turns, ending) in _DEMO_SESSIONS.items():
        scene = scenes[name] = _Scene(f"{story}/{name}", now_ms - turns[0][0] * 60_000 - 9000, place)
        for minutes, prompt, letters, answer in turns:
            scene.wait_until(now_ms - minutes * 60_000)
            scene.prompt(prompt)
            scene.work(letters)
            if name in ("review", "staging") and minutes == turns[0][0]:
                _demo_consult(scene)
            if answer:  # else the turn goes on below
                scene.stop(answer)
        if ending:
            scene.pause(5, 240)
            scene.emit("SessionEnd", reason=ending)
    cleared_at = scenes["missing-hour"].at + 140
    cleared = _Scene(f"{story}/cleared", cleared_at, _DEMO_SESSIONS["missing-hour"][0], source="clear")
    cleared.pause(20, 60)
    cleared.prompt("Write the note to the analysts about the corrected October export")
    cleared.work("r q w l")
    cleared.stop("The note is in `notes/october.md`: which hour changed and which reports are affected.")
    late = _Scene(f"{story}/late", now_ms + 96_000, ("jonas-mac", "platform-infra", "acceptEdits"))
    late.hurry(1500)
    late.prompt("Which modules still pin the old provider version?")
    late.work_until("g rR s e v", end_ms - 9000)
    late.stop("Two modules did; both now take the version of the root module. The configuration validates.")
    _demo_waits(scenes, now_ms)
    _demo_works(scenes, now_ms, end_ms)
    told = [event for scene in (*scenes.values(), cleared, late) for event in scene.events]
    told.sort(key=lambda event: event[0])
    yield from (event for event in told if event[0] <= now_ms + live_s * 1000)


def _demo_consult(scene: _Scene) -> None:
    """Ask a subagent, which in turn asks one of its own."""
    outer = scene.agent("general-purpose", "Find every caller", "List who uses this and what they expect.")
    outer.work("g r")
    inner = outer.agent("Explore", "Check the settings", "Which settings matter to these callers?")
    inner.work("gr R")
    outer.hand_back(inner, "Only the staging settings differ.")
    outer.work("R g")
    scene.hand_back(outer, "Three callers; two rely on the default, one sets the value itself.")


def _demo_waits(scenes: Mapping[str, _Scene], now_ms: int) -> None:
    """Bring the sessions that wait, hang or failed to where they are now, and two of them on from there."""
    checkout = scenes["checkout"]
    checkout.wait_until(now_ms - 240_000)
    build = {"command": "rm -rf build && npm run build", "description": "Build from scratch"}
    call = checkout.ask_permission("Bash", build)
    size = f"{_GREEN}✓ built in 4.87s{_OFF}\nbuild/app.js  214.6 kB │ gzip: 71.3 kB"
    checkout.finish_command(call, now_ms + 41_000, 5200, size)
    checkout.hurry(1200)
    checkout.work_until("d g r R l t", now_ms + 128_000)
    checkout.stop("The clean build is 214.6 kB, 71.3 kB compressed: 2 kB less than the last release.")

    choices = (("Refuse it", "Exit with status 2 and name both ends"), ("Swap the ends", "Warn and go on"))
    options = [{"label": label, "description": text} for label, text in choices]
    question = {"question": "What should a backwards range do?", "header": "Ranges", "options": options}
    scenes["ranges"].wait_until(now_ms - 540_000)
    scenes["ranges"].ask_permission("AskUserQuestion", {"questions": [{**question, "multiSelect": False}]})

    guide = scenes["style-guide"]
    guide.at += 60_000
    guide.emit("Notification", message="Claude is waiting for your input", notification_type="idle_prompt")

    drift = scenes["drift"]
    drift.wait_until(now_ms - 360_000)
    began, command = drift.at, "terraform apply -refresh-only -auto-approve -lock-timeout=15m"
    call = drift.open_call("Bash", {"command": command, "description": "Refresh the production state"})
    applied = f"{_GREEN}Apply complete!{_OFF} Resources: 0 added, 0 changed, 0 destroyed."
    drift.finish_command(call, now_ms + 212_000, now_ms + 212_000 - began, applied)
    drift.stop("The lock was free after nine minutes. Production has no drift.")

    scenes["export"].pause(2, 4)
    limit = "API Error: Rate limit reached"
    scenes["export"].emit("StopFailure", error="rate_limit", last_assistant_message=limit)


def _demo_works(scenes: Mapping[str, _Scene], now_ms: int, end_ms: float) -> None:
    """Bring the two working sessions to now and on: one asks for a permission, one has two subagents."""
    follow = scenes["follow"]
    follow.work_until("e g E B m b t", now_ms)
    follow.hurry(1500)
    follow.work_until("c r e b R t g", now_ms + 75_000)
    install = {"command": "cargo install --path . --force", "description": "Try the build on a real log"}
    call = follow.ask_permission("Bash", install)
    replaced = f"   {_GREEN}Replaced{_OFF} package `logslice v0.9.0` with `logslice v0.9.1`"
    follow.finish_command(call, now_ms + 152_000, 3900, replaced)
    follow.work_until("t r e b c d", end_ms - 6000)
    follow.stop("`--follow` reopens the file when it is rotated or truncated; 4 new tests cover it.")

    backfill = scenes["backfill"]
    brief = "Compare hourly sums before and after the correction for {} October. Report what differs."
    first, second = (
        backfill.agent("general-purpose", f"Check {days} October", brief.format(days), background=True)
        for days in ("1 to 15", "16 to 31")
    )
    backfill.stop("Two subagents compare the halves of October; the runbook follows when both are back.")
    first.work_until("r q g R t", now_ms)
    second.work_until("g q R r l", now_ms)
    for scene in (first, second, backfill):
        scene.hurry(900)
    first.work_until("q r q g R", now_ms + 58_000)
    backfill.hand_back(first, "1 to 15 October: no day differs.")
    backfill.work("R w q")
    backfill.stop("The first half is unchanged. Waiting for the second.")
    second.work_until("q R q l r g", now_ms + 176_000)
    backfill.hand_back(second, "16 to 31 October: only the 26th differs, by the hour that comes twice.")
    backfill.work_until("o r w t l q", now_ms + 236_000)
    backfill.stop("Only 26 October changes, by one hour. The runbook is in `docs/backfill.md`.")


# ---------------------------------------------------------------------------
# Import: history from before the monitor was there
#
# Lines of other files in, events out, marked `imported`; no I/O but the reading of those files.
# An event's id comes from where it stood, so that importing twice gives the same events. What hooks have told
# of a session is never told again: of such a session only what was before is taken.
# ---------------------------------------------------------------------------

IMPORT_MARGIN_MS = 2000  # a hook's event and the transcript's line about the same thing are no further apart


class ImportSession(NamedTuple):
    """The files that tell of one session: a transcript and those of its subagents."""

    session_id: str
    paths: tuple[str, ...]


class StoredSession(NamedTuple):
    """What is stored of a session already."""

    ids: frozenset[str]
    tool_use_ids: frozenset[str]
    first_told_ms: int | None  # of the first event that did not come by import


def stored_session(store: EventStore, session_id: str) -> StoredSession:
    """Read what is stored of a session."""
    ids: set[str] = set()
    tool_use_ids: set[str] = set()
    first: int | None = None
    for event in map(parse_stored, export_lines(store, session_id, 0, 1 << 62)):
        ids.add(event["id"])
        tool_use_ids.add(text_of(event["data"].get("toolUseId")))
        if not event.get("imported") and event["hookType"] != "Monitor":
            first = event["timestamp"] if first is None else min(first, event["timestamp"])
    return StoredSession(frozenset(ids), frozenset(tool_use_ids), first)


def wanted_events(events: Iterable[JsonObject], stored: StoredSession) -> Iterator[JsonObject]:
    """Yield the events of one session that tell something new."""
    for event in events:
        if event["id"] in stored.ids:
            continue
        if stored.first_told_ms is not None:
            is_earlier = event.get("timestamp", 0) < stored.first_told_ms - IMPORT_MARGIN_MS
            named = event["data"].get("toolUseId") if isinstance(event.get("data"), dict) else None
            told = named is not None and text_of(named) in stored.tool_use_ids
            if not is_earlier or told or event.get("hookType") == "SessionEnd":
                continue
        yield event


def import_sources(paths: Sequence[str]) -> tuple[list[ImportSession], list[str]]:
    """Return the transcripts and the exports among some files and directories."""
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            found += sorted(glob.glob(f"{glob.escape(path)}/**/*.json*", recursive=True))
        else:
            found.append(path)
    transcripts: dict[str, list[str]] = {}
    exports = []
    for path in found:
        if path.endswith(".meta.json"):
            continue
        lines = first_lines(path)
        session_id = transcript_session(lines)
        if session_id is not None:
            transcripts.setdefault(session_id, []).append(path)
        elif path in paths or (
            path.endswith((".jsonl", ".ndjson")) and lines and emit_event.is_json_object(lines[0])
        ):
            exports.append(path)  # what a directory holds besides is nobody's business here
    return [ImportSession(name, tuple(files)) for name, files in transcripts.items()], exports


def first_lines(path: str) -> list[bytes]:
    """Return a few lines of a file, whole ones of a sane length."""
    try:
        with open(path, "rb") as file:
            return list(itertools.islice(iter(lambda: file.readline(1 << 20), b""), 50))
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None


def transcript_session(lines: Iterable[bytes]) -> str | None:
    """Return whose transcript these lines begin, None when they are none of Claude Code's."""
    for line in lines:
        with contextlib.suppress(MalformedEvent):
            entry = emit_event.parse_event_line(line)
            if entry.get("type") in ("user", "assistant") and isinstance(entry.get("message"), dict):
                session_id = entry.get("sessionId")
                return session_id if isinstance(session_id, str) and session_id else None
    return None


# Transcripts of Claude Code


class TranscriptReader:
    """Turn a session's transcript, and those of its subagents, into the events that hooks would have told."""

    def __init__(self, session_id: str, machine_id: str, seen: set[str]) -> None:
        self._session_id = session_id
        self._machine_id = machine_id
        self._seen = seen  # lines of any transcript so far: a resumed or forked session begins with copies
        self._calls: dict[str, JsonObject] = {}  # tool use id → its block
        self._agents: set[str] = set()
        self._messages: dict[tuple[str, str], emit_event.MessageUsage] = {}
        self._model: str | None = None

    def events(self, lines: Iterable[bytes]) -> list[JsonObject]:
        """Return the events in order of time; [] when the lines tell nothing new."""
        entries = [entry for entry in map(self._entry_of, lines) if entry is not None]
        entries.sort(key=lambda entry: entry["timestamp_ms"])
        events = [event for entry in entries for event in self._events_of(entry)]
        if not events:
            return []
        start, end = entries[0], entries[-1]
        begun: JsonObject = {"source": "import", **({"model": self._model} if self._model else {})}
        closing = {"reason": "import", **self._usage()}
        return [
            self._event({**start, "agentId": None}, "SessionStart", "start", begun),
            *events,
            self._event({**end, "agentId": None}, "SessionEnd", "end", closing),
        ]

    def _entry_of(self, line: bytes) -> JsonObject | None:
        try:
            entry = emit_event.parse_event_line(line)
        except MalformedEvent:
            return None
        message, place = entry.get("message"), entry.get("uuid")
        time_ms = iso_time_ms(entry.get("timestamp"))
        if entry.get("type") not in ("user", "assistant") or not isinstance(message, dict) or time_ms is None:
            return None
        if not isinstance(place, str) or place in self._seen or entry.get("isMeta") is True:
            return None
        self._seen.add(place)
        return {**entry, "timestamp_ms": time_ms}

    def _events_of(self, entry: JsonObject) -> Iterator[JsonObject]:
        agent_id = entry.get("agentId")
        if isinstance(agent_id, str) and agent_id not in self._agents:
            self._agents.add(agent_id)
            yield self._event(entry, "SubagentStart", "begin", {})
        content = entry["message"].get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        blocks = [block for block in blocks if isinstance(block, dict)] if isinstance(blocks, list) else []
        if entry["type"] == "user":
            yield from self._of_user(entry, blocks)
        else:
            yield from self._of_assistant(entry, blocks)

    def _of_user(self, entry: JsonObject, blocks: list[JsonObject]) -> Iterator[JsonObject]:
        texts = [block["text"] for block in blocks if isinstance(block.get("text"), str)]
        results = [block for block in blocks if block.get("type") == "tool_result"]
        if texts and not results and not isinstance(entry.get("agentId"), str):
            yield self._event(entry, "UserPromptSubmit", "prompt", {"message": "\n".join(texts)})
        for number, block in enumerate(results):
            use_id = text_of(block.get("tool_use_id"))
            call = self._calls.get(use_id, {})
            data = {"toolName": call.get("name"), "toolInput": call.get("input"), "toolUseId": use_id}
            told = entry.get("toolUseResult") if len(results) == 1 else None
            if block.get("is_error") is True:
                data["error"] = _block_text(block.get("content"))
                yield self._event(entry, "PostToolUseFailure", f"result{number}", data)
            else:
                data["toolOutput"] = told if told is not None else block.get("content")
                yield self._event(entry, "PostToolUse", f"result{number}", data)

    def _of_assistant(self, entry: JsonObject, blocks: list[JsonObject]) -> Iterator[JsonObject]:
        message = entry["message"]
        self._count(entry)
        for number, block in enumerate(blocks):
            if block.get("type") == "tool_use" and isinstance(block.get("id"), str):
                self._calls[block["id"]] = block
                data = {
                    "toolName": block.get("name"),
                    "toolInput": block.get("input"),
                    "toolUseId": block["id"],
                }
                yield self._event(entry, "PreToolUse", f"call{number}", data)
        texts = [block["text"] for block in blocks if isinstance(block.get("text"), str)]
        if texts and message.get("stop_reason") in ("end_turn", "stop_sequence", "max_tokens"):
            hook = "SubagentStop" if isinstance(entry.get("agentId"), str) else "Stop"
            yield self._event(entry, hook, "stop", {"assistantResponse": "\n".join(texts), **self._usage()})

    def _count(self, entry: JsonObject) -> None:
        agent_id = entry.get("agentId")
        parser = emit_event.TranscriptParser()
        for used in parser.feed(encode_json(entry) + b"\n"):
            self._messages["", used.message_id] = used
            if not isinstance(agent_id, str):
                self._model = used.model

    def _usage(self) -> JsonObject:
        """Return `data.usage` with what was used so far: totals, each message once."""
        models: dict[str, JsonObject] = {}
        for used in self._messages.values():
            counts = models.setdefault(used.model, {})
            emit_event.add_counts(counts, used.counts)
            if used.input + used.cache_read + used.cache_creation > emit_event.LONG_PROMPT_TOKENS:
                emit_event.add_counts(counts.setdefault("over100k", {}), used.counts)
        return {"usage": {"models": models, "agents": {}}} if models else {}

    def _event(self, entry: JsonObject, hook: str, place: str, data: JsonObject) -> JsonObject:
        agent_id = entry.get("agentId")
        directory = entry.get("cwd")
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{self._session_id} {entry['uuid']} {place}")),
            "timestamp": entry["timestamp_ms"],
            "sessionId": self._session_id,
            "machineId": self._machine_id,
            "workingDirectory": directory if isinstance(directory, str) else "",
            "hookType": hook,
            "eventType": emit_event.EVENT_TYPES[hook],
            "imported": True,
            **({"agentId": agent_id, "agentType": ""} if isinstance(agent_id, str) else {}),
            "data": {name: value for name, value in data.items() if value is not None},
        }


def _block_text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(text_of(block.get("text")) for block in content if isinstance(block, dict))
    return text_of(content)


def iso_time_ms(text: Any) -> int | None:
    """Parse a time such as 2026-11-24T06:03:18.373Z; None for anything else."""
    match = (
        re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
        if isinstance(text, str)
        else None
    )
    if match is None:
        return None
    try:
        seconds = calendar.timegm(time.strptime(match.group(1), "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
    time_ms = seconds * 1000 + int((match.group(2) or "0").ljust(3, "0")[:3])
    return time_ms if time_ms > 0 else None


# Exports of this monitor and of the Node.js one


def export_events(path: str) -> Iterator[JsonObject]:
    """Yield the events of an export: one JSON object a line, or one document that holds lists of events."""
    with open(path, "rb") as file:
        head = file.read(1 << 16).lstrip()
        file.seek(0)
        is_lines = b"\n" in head and emit_event.is_json_object(head.partition(b"\n")[0])
        if is_lines:
            for line in file:
                with contextlib.suppress(MalformedEvent):
                    yield from _events_in(emit_event.parse_event_line(line))
            return
        try:
            document = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{path}: is no export: {error}") from None
    yield from _events_in(document)


def _events_in(value: Any) -> Iterator[JsonObject]:
    """Yield what looks like an event in a document, at most a few levels down."""
    if isinstance(value, list):
        for inner in value:
            yield from _events_in(inner)
    elif isinstance(value, dict):
        if isinstance(value.get("eventType"), str) or isinstance(value.get("hook_event_name"), str):
            yield imported_event(value)
            return
        for name in ("events", "sessions", "data"):
            inner = value.get(name)
            if isinstance(inner, (list, dict)):
                yield from _events_in(
                    list(inner.values()) if name == "sessions" and isinstance(inner, dict) else inner
                )


def imported_event(given: JsonObject) -> JsonObject:
    """Return an event of an export, marked, with an id that is the same every time."""
    rest = {name: value for name, value in given.items() if name not in ("seq", "received")}
    digest = uuid.uuid5(uuid.NAMESPACE_OID, encode_json(rest).decode("ascii"))
    if isinstance(given.get("eventType"), str):
        return {**rest, "id": text_of(given.get("id")) or str(digest), "imported": True}
    return {"hook": rest, "id": str(digest), "imported": True}


def transcript_events(source: ImportSession, machine_id: str, seen: set[str]) -> list[JsonObject]:
    """Read a session's transcripts and return their events."""
    lines: list[bytes] = []
    for path in source.paths:
        with open(path, "rb") as file:
            lines += file.read().split(b"\n")
    return TranscriptReader(source.session_id, machine_id, seen).events(lines)


def import_batches(
    transcripts: Sequence[ImportSession], exports: Sequence[str], machine_id: str
) -> Iterator[tuple[str, list[JsonObject], int]]:
    """Yield (session id, its events, bytes that were read for them); of transcripts the oldest first."""
    seen: set[str] = set()
    for source in sorted(transcripts, key=lambda source: min(map(os.path.getmtime, source.paths))):
        size = sum(map(os.path.getsize, source.paths))
        yield source.session_id, transcript_events(source, machine_id, seen), size
    for path in exports:
        by_session: dict[str, list[JsonObject]] = {}
        for event in export_events(path):
            built = emit_event.build_event(event, now_ms(), machine_id)
            by_session.setdefault(built["sessionId"], []).append(built)
        size = os.path.getsize(path)
        for session_id, events in by_session.items():
            yield session_id, events, size
            size = 0


# ---------------------------------------------------------------------------
# Command line
#
# Every command is a function that takes the parsed arguments and returns the exit status; what goes wrong is
# raised as one of OUR_ERRORS and told by `main` in one line.
# ---------------------------------------------------------------------------

LOG_LIMIT_BYTES = 2 << 20
LOG_FILES = 3
START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 15.0
PROGRESS_INTERVAL_S = 2.0


def settings_of(args: argparse.Namespace) -> Settings:
    """Load the configuration with the options of the command line; warnings go to standard error."""
    overrides = {
        key: getattr(args, option)
        for key, option in (("server.host", "host"), ("server.port", "port"), ("server.wsPort", "ws_port"))
        if getattr(args, option, None) is not None
    }
    settings, warnings = load_settings(args.config, overrides)
    for warning in warnings:
        tell(f"warning: {warning}")
    return settings


# Starting and stopping


def command_start(args: argparse.Namespace) -> int:
    """Start the monitor, in the background unless --foreground."""
    settings = settings_of(args)
    if settings["mode"] == "redis" and not importlib.util.find_spec("redis"):
        raise StartError(f'mode "redis" needs redis-py: {emit_event.redis_py_advice(sys.executable)}')
    about = running_monitor(settings)
    if about is not None and args.report_fd is None:
        print(f"already running (pid {about['pid']}): {page_links(settings, about, False)[0]}")
        if any(getattr(args, name) is not None for name in ("host", "port", "ws_port")):
            tell("it stays where it is; `restart` with the same options moves it")
        return 0
    if args.foreground:
        return serve(settings, args)
    about = start_in_background(settings, args)
    tell_what_next(settings, about)
    if not args.no_open and can_open_browser():
        webbrowser.open(page_links(settings, about, False)[0])
    return 0


def tell_what_next(settings: Settings, about: JsonObject) -> None:
    """Say where the page is, how far loading is, and what to do for the first events."""
    print(f"Contextuate Monitor runs (pid {about['pid']}). Open:")
    for link in page_links(settings, about, False):
        print(f"  {link}")
    loading = ask_monitor(settings, about, "/api/status")["loading"]
    if loading is not None:
        print(f"{loading_words(loading)}, the others follow; the page and `status` tell how far it is.")
    if not os.path.exists(hook_script(settings.home)):
        print("Next: python3 contextuate_monitor.py install   (registers the hook; then start Claude Code)")


def can_open_browser() -> bool:
    """Tell whether opening a browser makes sense: a person at this machine's own screen."""
    if not sys.stdout.isatty() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def start_in_background(settings: Settings, args: argparse.Namespace) -> JsonObject:
    """Start a detached process and wait until it serves; raise StartError with its words when it cannot."""
    emit_event.make_private_directory(settings.home)
    reader, writer = os.pipe()
    folder, name = os.path.split(os.path.abspath(__file__))
    module = os.path.splitext(name)[0]
    # As a module it comes from its bytecode: compiling this file takes a moment, and 30 MB that stay in use.
    program = ["-m", module] if module.isidentifier() else [os.path.join(folder, name)]
    command = [sys.executable, *program, "start", "--foreground", "--report-fd", str(writer)]
    for option in ("host", "port", "ws_port", "config"):
        value = getattr(args, option)
        if value is not None:
            command += [
                f"--{option.replace('_', '-')}",
                os.path.abspath(value) if option == "config" else str(value),
            ]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writer],
        start_new_session=True,
        cwd=folder,
    )
    os.close(writer)
    with open(reader, "rb", buffering=0) as reports:
        report = read_report(reports, START_DEADLINE_S)
    kind, _, words = report.partition(" ")
    if kind == "ready":
        return needed_monitor(settings)
    if kind == "error":
        raise StartError(words)
    what = "ended at once" if report else f"(process {process.pid}) says nothing; end it and start it again"
    raise StartError(f"the monitor {what}; {settings.path('monitor.log')} may tell why")


def read_report(pipe: io.FileIO, deadline_s: float) -> str:
    """Return a Reporter's line; "ended" when it ends without one, "" when it says nothing in time."""
    deadline = time.monotonic() + deadline_s
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return ""
            piece = pipe.read(4096)
            if not piece:
                return "ended"
            line += piece
    return line.decode("utf-8", "replace").rstrip("\n")


def serve(settings: Settings, args: argparse.Namespace) -> int:
    """Run the monitor in this process until it is told to stop."""
    os.umask(0o077)
    if args.report_fd is not None:
        os.chdir("/")  # in the background no directory is kept from being removed or unmounted
    emit_event.make_private_directory(settings.home)
    report = Reporter(args.report_fd)
    try:
        set_up_log(settings, to_stderr=args.report_fd is None)
    except OSError as error:
        words = f"{settings.path('monitor.log')} cannot be written: {error.strerror}"
        report.error(words)
        raise StartError(words) from None
    allow_many_files()
    if settings["mode"] == "redis" and not os.path.exists(settings.path("hooks/publisher-python")):
        record_publisher_python(settings.home)
    try:
        monitor = Monitor(settings)
        monitor.open()
    except (StartError, OSError) as error:
        log.error("cannot start: %s", error)
        report.error(str(error))
        raise StartError(str(error)) from None
    about = write_run_file(settings, monitor)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: monitor.stop())
    signal.signal(signal.SIGHUP, lambda *_: monitor.reconnect_redis())
    page = f"http://{about['host']}:{about['port']}/"
    log.info("version %s serves %s, hooks on %s", __version__, page, about["socketPath"])
    if args.report_fd is None:
        for link in page_links(settings, about, False):
            print(link, flush=True)
    report.ready()
    monitor.run()
    log.info("stopped")
    return 0


def write_run_file(settings: Settings, monitor: Monitor) -> JsonObject:
    """Leave where this monitor can be reached for `running_monitor`, and return it."""
    about = {
        "pid": os.getpid(),
        "host": settings["server.host"],
        "port": monitor.port,
        "wsPort": monitor.ws_port,
        "addresses": monitor.addresses,
        "socketPath": settings["socketPath"],
        "startedAt": monitor.started_at,
        "version": __version__,
    }
    emit_event.write_atomically(settings.path("monitor.run.json"), encode_json(about) + b"\n")
    return about


class Reporter:
    """Tell the process that started us how it went, in one line: "ready" or "error …"."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def _write(self, line: str) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):  # it has gone away; the log has it all
                os.write(self._fd, line.encode("utf-8", "replace"))

    def error(self, words: str) -> None:
        """Report that there will be no monitor."""
        self._write(f"error {words}\n")

    def ready(self) -> None:
        """Report that the monitor serves."""
        self._write("ready\n")
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


class PrivateLog(logging.handlers.RotatingFileHandler):
    """A log that rotates, for our user only, and never written through a link."""

    def _open(self) -> Any:
        opener = emit_event.open_for_append
        return open(self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=opener)


def set_up_log(settings: Settings, to_stderr: bool) -> None:
    """Log to monitor.log, which rotates, and in the foreground to standard error too."""
    handlers: list[logging.Handler] = [
        PrivateLog(
            settings.path("monitor.log"),
            maxBytes=LOG_LIMIT_BYTES,
            backupCount=LOG_FILES,
            encoding="utf-8",
            errors="backslashreplace",
        )
    ]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
    log.setLevel(logging.DEBUG if os.environ.get("CONTEXTUATE_DEBUG") else logging.INFO)
    logging.raiseExceptions = (
        False  # a full disk must not end in a traceback for every line that cannot be logged
    )

    def uncaught(kind: Any, error: Any, trace: Any) -> None:
        log.critical("ended by an unexpected error", exc_info=(kind, error, trace))

    sys.excepthook = uncaught


def allow_many_files() -> None:
    """Raise our own limit of open files, so that a thousand hooks at once find a place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def command_stop(args: argparse.Namespace) -> int:
    """Stop the running monitor and wait until it is gone; a configuration that is wrong is no hindrance."""
    try:
        settings = settings_of(args)
    except ConfigError as error:
        tell(f"warning: {error}")
        home, path = emit_event.places(os.environb)  # type: ignore[arg-type]
        machine_id, defaults = emit_event.this_machine(), emit_event.default_values()
        settings = Settings(os.path.abspath(home), os.path.abspath(path), machine_id, defaults)
    about = running_monitor(settings)
    if about is None:
        stray = None
        with contextlib.suppress(PermissionError):  # another user's
            stray = lock_holder(settings["socketPath"] + ".lock")
        if stray is not None:
            raise CommandError(
                f"no monitor runs for {settings.home}, but process {stray} has {settings['socketPath']}; "
                f"`kill {stray}` ends it"
            )
        print("not running")
        return 0
    stop_monitor(settings, about)
    print(f"stopped (pid {about['pid']})")
    return 0


def stop_monitor(settings: Settings, about: JsonObject) -> None:
    """End the running monitor; raise CommandError if it does not go."""
    os.kill(about["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_DEADLINE_S
    while time.monotonic() < deadline:
        if running_monitor(settings) is None:
            return
        time.sleep(0.05)
    raise CommandError(
        f"pid {about['pid']} has not ended in {STOP_DEADLINE_S:.0f} s; `kill -9 {about['pid']}` loses nothing"
    )


def command_restart(args: argparse.Namespace) -> int:
    """Stop the monitor if it runs, and start it."""
    settings = settings_of(args)
    about = running_monitor(settings)
    if about is not None:
        stop_monitor(settings, about)
    return command_start(args)


def command_status(args: argparse.Namespace) -> int:
    """Tell how the monitor is; exit status 1 when it does not run."""
    settings = settings_of(args)
    about = running_monitor(settings)
    if about is None:
        spooled = emit_event.spool_segments(settings.path("spool"))
        if args.json:
            print(json.dumps({"running": False, "spoolBytes": sum(size for _, size in spooled)}))
        else:
            print("not running; start it with: python3 contextuate_monitor.py start")
            if spooled:
                print(f"spool    {human_size(sum(size for _, size in spooled))} of events wait for it")
        return 1
    status = ask_monitor(settings, about, "/api/status")
    if args.json:
        print(json.dumps({"running": True, **status}))
        return 0
    for line in status_lines(settings, about, status):
        print(line)
    return 0


def status_lines(settings: Settings, about: JsonObject, status: JsonObject) -> list[str]:
    """Say how the running monitor is doing."""
    store, spool, events = status["store"], status["spool"], status["events"]
    since = human_duration(now_ms() - status["startedAt"])
    loading = f" ({loading_words(status['loading'])})" if status["loading"] else ""
    return [
        f"running  pid {about['pid']}, version {status['version']}, for {since}, mode {status['mode']}",
        f"page     {page_links(settings, about, False)[0]}   {status['clients']} open",
        f"hooks    {about['socketPath']}",
        f"events   {events['stored']} stored since the start, {events['duplicates']} delivered twice, "
        f"{events['quarantined']} malformed",
        f"sessions {status['sessions']}{loading}",
        f"store    {store['path'] or 'in memory'}: {'ok' if store['ok'] else store['error']}",
        f"spool    {human_size(spool['bytes'])} waiting, {spool['dropped']} events dropped",
        *(redis_lines(status["redis"], status["publisher"]) if status["redis"] else ()),
        *(map(machine_line, status["machines"]) if status["redis"] else ()),
    ]


def redis_lines(link: JsonObject, publisher: JsonObject) -> list[str]:
    """Say how Redis and this machine's publisher are doing."""
    words = link["state"].replace("_", " ")
    if link["state"] != "connected":
        most = "" if link["maxRetries"] is None else f" of {link['maxRetries']}"
        words += f", attempt {link['attempt']}{most}: {link['reason'] or 'no answer yet'}"
    read = {"off": "off", "ok": f"read up to {link['position'] or 'its start'}"}
    lines = [
        f"redis    {link['server']}{' with TLS' if link['tls'] else ''}: {words}",
        f"stream   {link['streamReason'] or read.get(link['streamState'])}",
    ]
    if link["gaps"]:
        lines.append(f"gaps     {link['gaps']} times the stream had been cut before it was read")
    about = publisher.get("reason") or f"{publisher.get('published', 0)} events since it was started"
    lines.append(
        f"publish  {publisher['state']}: {about}" if publisher["running"] else "publish  not needed now"
    )
    return lines


def machine_line(machine: JsonObject) -> str:
    """Say how one machine is doing, and how far its clock is off where that is worth a word."""
    skew_ms, age = machine["clockSkewMs"], human_duration(now_ms() - machine["lastSeen"])
    clock = ""
    if skew_ms is not None and abs(skew_ms) > 2000:
        clock = f", clock {human_duration(abs(skew_ms))} {'behind' if skew_ms > 0 else 'ahead'}"
    return f"machine  {safe_line(machine['machineId'])}: {machine['events']} events, last {age} ago{clock}"


def command_url(args: argparse.Namespace) -> int:
    """Print the page's address."""
    settings = settings_of(args)
    for link in page_links(settings, needed_monitor(settings), args.token):
        print(link)
    return 0


# The hook


def command_install(args: argparse.Namespace) -> int:
    """Copy the hook and register it in Claude Code's settings."""
    settings = settings_of(args)
    version = claude_version()
    plan = plan_install(settings.home, args.project, version)
    if version is None:
        tell(
            "`claude` did not tell its version, so only events that every version knows are added; put it on "
            "the PATH and run install again"
        )
    if args.dry_run:
        print(diff_settings(plan.path, plan.old_text, plan.new_text) or f"{plan.path}: nothing to change")
        return 0
    script = install_hook_files(settings.home)
    print(f"hook     {script}")
    backup = None
    if plan.new_text != plan.old_text:
        backup = write_settings(plan.path, plan.new_text, plan.old_text)
    print(f"settings {plan.path}: {len(plan.names)} events registered")
    if read_settings(plan.path)[1].get("disableAllHooks"):
        tell(f"{plan.path} has disableAllHooks, so no hook runs: take it out")
    if settings["mode"] == "redis" and not record_publisher_python(settings.home):
        tell(
            "redis-py is missing, so no event can leave this machine: "
            + emit_event.redis_py_advice(sys.executable)
        )
    if backup:
        print(f"backup   {backup}")
    print("Sessions of Claude Code that are open now pick the hook up when they are started again.")
    return 0


def command_uninstall(args: argparse.Namespace) -> int:
    """Take our hook out of Claude Code's settings; everything else there stays."""
    settings = settings_of(args)
    plan = plan_uninstall(args.project)
    if args.dry_run:
        print(diff_settings(plan.path, plan.old_text, plan.new_text) or f"{plan.path}: nothing to change")
        return 0
    if plan.new_text == plan.old_text:
        print(f"{plan.path}: no hook of ours is registered")
        return 0
    backup = write_settings(plan.path, plan.new_text, plan.old_text)
    print(f"settings {plan.path}: our hook is taken out" + (f", backup {backup}" if backup else ""))
    print(f"Events and configuration stay in {settings.home}; remove that directory to forget everything.")
    return 0


def command_test_event(args: argparse.Namespace) -> int:
    """Send one event the way every hook's event goes, and tell what happened."""
    settings = settings_of(args)
    data = test_event(settings.machine_id)["data"]
    fields = {"message": data["message"], "notification_type": data["notificationType"]}
    words = send_through_hook(settings, fields)
    sys.stdout.write(words)
    if was_delivered(words):
        return 0
    goal = "a monitor" if settings["mode"] == "local" else "Redis"
    left = "waits in the spool" if "kept in the spool" in words else "is lost"
    raise CommandError(f"the event did not reach {goal}; it {left}. `doctor` looks for the cause")


def command_doctor(args: argparse.Namespace) -> int:
    """Walk through the whole chain and say what to do for each failure; exit status 1 when one is broken."""
    try:
        settings, warnings = load_settings(args.config)
        findings: Iterable[Finding] = examine(settings, warnings)
    except ConfigError as error:
        findings = [Finding("config", "fail", str(error), "correct the file")]
    told = []
    for finding in findings:
        told.append(finding)
        if not args.json:
            print("\n".join(finding.lines()), flush=True)
    broken = sum(finding.level == "fail" for finding in told)
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [finding._asdict() for finding in told]}, indent=2))
    elif broken:
        print(f"\n{broken} broken: begin with the first")
    else:
        print("\nEverything that was examined works.")
    return 1 if broken else 0


# Looking


def command_sessions(args: argparse.Namespace) -> int:
    """List sessions, those that need a person first."""
    sessions = known_sessions(settings_of(args), args.all)
    if not args.all:
        sessions = [session for session in sessions if session["state"] != "ended"]
    sessions.sort(key=lambda session: (SESSION_STATES.index(session["state"]), session["stateSince"]))
    if args.json:
        print(json.dumps(sessions))
        return 0
    if not sessions:
        print("no sessions" + ("" if args.all else " that have not ended; --all shows those too"))
    for session in sessions:
        print(session_line(session))
    return 0


def known_sessions(settings: Settings, with_hidden: bool) -> list[JsonObject]:
    """Return the sessions that the running monitor knows, else those that the files tell of."""
    about = running_monitor(settings)
    if about is None:
        tell("the monitor is not running; this is what the files tell")
        return stored_sessions(settings).all_json(with_hidden)
    answer = ask_monitor(settings, about, f"/api/sessions?hidden={int(with_hidden)}")
    if answer["loading"]:
        tell(f"{loading_words(answer['loading'])}; the list is not complete yet")
    sessions: list[JsonObject] = answer["sessions"]
    return sessions


def session_line(session: JsonObject) -> str:
    """Return one line of `sessions`."""
    reason, detail = session["reason"], session["activity"]
    if reason:
        detail = f"{reason['kind']}: {reason['detail']}"
    elif session["stuck"] and session["state"] == "working":
        detail = session["stuck"][0]["detail"] or detail
    since = human_duration(now_ms() - session["stateSince"])
    label, machine = session["label"], session["machineId"]
    return safe_line(f"{session['state']:<8} {since:>7}  {label:<40.40} {machine:<14.14} {detail}")


def stored_sessions(settings: Settings) -> SessionBook:
    """Read every session out of the files, telling every few seconds how far it is."""
    book = session_book(settings)
    loader = Loader(EventStore(settings.path("events")), book, SeenIds(), lambda sessions: None)
    while True:
        loader.work(PROGRESS_INTERVAL_S)
        if loader.progress is None:
            break
        tell(loading_words(loader.progress))
    book.tick(now_ms())
    end_sessions_without_process(book, settings.machine_id, {})
    return book


def command_tail(args: argparse.Namespace) -> int:
    """Print events as they happen until Ctrl-C."""
    settings = settings_of(args)
    about = needed_monitor(settings)
    last_seq: int | None = None
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    while True:
        try:
            for seq, event in events_since(settings, about, last_seq):
                last_seq = seq
                if event is not None and tail_wants(args, event):
                    print(tail_line(event, args.json, colours), flush=True)
        except OSError as error:
            tell(f"{error}; waiting for the monitor")
            while running_monitor(settings) is None:
                time.sleep(1)
            time.sleep(0.5)
            about = needed_monitor(settings)


def events_since(
    settings: Settings, about: JsonObject, last_seq: int | None
) -> Iterator[tuple[int, JsonObject | None]]:
    """Yield (seq, event) as events come, with what was missed since `last_seq`; OSError when it breaks off.

    The event is None where only the number is known: of a monitor that still reads what it has stored.
    """
    connection = MonitorConnection(settings, about)
    since = {} if last_seq is None else {"since": last_seq}
    connection.send({"type": "subscribe", "view": "full", **since})
    is_told = last_seq is not None
    while True:
        message = connection.receive()
        if message.get("type") == "event":
            is_told = True
            yield message["seq"], message["event"]
        elif message.get("type") == "status" and message.get("loading") and not is_told:
            is_told = True
            tell(f"{loading_words(message['loading'])}; new events are shown all the same")
            yield message["seq"], None


def tail_wants(args: argparse.Namespace, event: JsonObject) -> bool:
    """Tell whether an event passes the filters of `tail`."""
    if args.session and not event["sessionId"].startswith(args.session):
        return False
    if args.machine and event["machineId"] != args.machine:
        return False
    return not args.type or args.type in (event["eventType"], event["hookType"])


def tail_line(event: JsonObject, as_json: bool, colours: bool) -> str:
    """Return one line of `tail`."""
    if as_json:
        return encode_json(event).decode("ascii")
    row = event_row(event)["data"]
    clock = time.strftime("%H:%M:%S", time.localtime(event["timestamp"] / 1000))
    what = event["hookType"] or event["eventType"]
    tool = row.get("toolName", "")
    duration = f"  {row['durationMs']} ms" if "durationMs" in row else ""
    words = row.get("target") or row.get("text") or ""
    who = f"{event['machineId']:<12.12} {event['sessionId'][:8]}"
    line = safe_line(f"{clock}  {who}  {what:<20} {tool:<12} {words}{duration}")
    colour = {"tool_error": "31", "turn_error": "31", "permission_request": "33", "elicitation": "33"}
    code = colour.get(effective_type(event)) if colours else None
    return f"\x1b[{code}m{line}\x1b[0m" if code else line


def command_prune(args: argparse.Namespace) -> int:
    """Delete what the configuration says is too old or too much, now, or only tell what would go."""
    settings = settings_of(args)
    about = running_monitor(settings)
    if about is not None:
        connection = MonitorConnection(settings, about)
        connection.send({"type": "prune", "dryRun": args.dry_run})
        pruned = connection.wait_for("pruned", 120)
        connection.close()
    else:
        sessions = stored_sessions(settings).sessions
        kept = frozenset(session_file_name(name) for name, session in sessions.items() if session.pinned)
        plan = retention_plan(settings, kept, now_ms())
        if not args.dry_run:
            carry_out(settings.home, plan)
        pruned = plan.to_json(args.dry_run)
    if not pruned["files"]:
        print("nothing is too old or too much")
        return 0
    verb = "would be deleted" if args.dry_run else "deleted"
    days = pruned["days"]
    print(
        f"{pruned['files']} files of {pruned['sessions']} sessions, {human_size(pruned['bytes'])}, "
        f"of {days[0]} to {days[-1]} {verb}"
    )
    return 0


def command_import(args: argparse.Namespace) -> int:
    """Take history into the running monitor: transcripts of Claude Code and exports of monitors."""
    settings = settings_of(args)
    about = needed_monitor(settings)
    paths = args.paths or [os.path.join(os.path.dirname(settings_path(None)), "projects")]
    transcripts, exports = import_sources([os.path.abspath(path) for path in paths])
    sizes = sum(os.path.getsize(path) for source in transcripts for path in source.paths)
    progress = Progress(sizes + sum(map(os.path.getsize, exports)), "events", quiet=False)
    store = EventStore(settings.path("events"))
    known = 0
    with EventSender(about["socketPath"]) as sender:
        for session_id, events, size in import_batches(transcripts, exports, settings.machine_id):
            wanted = list(wanted_events(events, stored_session(store, session_id)))
            known += len(events) - len(wanted)
            sender.send(wanted)
            progress.add(len(wanted), size)
    print(f"{progress.count} events imported, {known} were known already")
    return 0


def command_search(args: argparse.Namespace) -> int:
    """Find stored events; without a running monitor their files are read."""
    settings = settings_of(args)
    wanted: dict[str, Any] = {
        "q": " ".join(args.words),
        "session": whole_session_id(settings, args.session),
        "machine": args.machine,
        "tool": args.tool,
        "type": args.type,
        "state": args.state,
        "from": args.start,
        "to": args.end,
    }
    colours = sys.stdout.isatty()
    count, page = 0, {}
    for page in pages(page_source(settings, wanted), wanted, args.limit):
        count += len(page["results"])
        for result in page["results"]:
            print(json.dumps(result) if args.json else search_line(result, colours), flush=True)
    if not count and not args.json:
        tell("nothing was found")
    elif page["next"] is not None:
        tell(f"there is more; --limit {args.limit * 4} shows it")
    if page["index"]["state"] == "building":
        tell("the index is still being made, so there may be more")
    return 0 if count else 1


def pages(ask: Callable[[JsonObject], JsonObject], wanted: JsonObject, limit: int) -> Iterator[JsonObject]:
    """Yield the pages of a search until there are no more results, or `limit`."""
    cursor = None
    while limit > 0:
        page = ask({**wanted, "limit": min(limit, SEARCH_LIMIT), "cursor": cursor})
        yield page
        limit, cursor = limit - len(page["results"]), page["next"]
        if cursor is None:
            return


def page_source(settings: Settings, wanted: Mapping[str, Any]) -> Callable[[JsonObject], JsonObject]:
    """Return what answers for one page of a search: the running monitor, or the event files."""
    about = running_monitor(settings)
    if about is None:
        tell("the monitor is not running; the event files are read, which takes longer")
        store = EventStore(settings.path("events"))
        sessions = stored_sessions(settings).in_state(wanted["state"]) if wanted["state"] else None
        nothing = {"index": {"state": "off"}}

        def scan(parameters: JsonObject) -> JsonObject:
            query = search_query(parameters, sessions)
            return {**search_page(query, scan_candidates(store, query)), **nothing}

        return scan
    running = about

    def ask(parameters: JsonObject) -> JsonObject:
        given = {name: value for name, value in parameters.items() if value is not None}
        return ask_monitor(settings, running, "/api/search?" + urllib.parse.urlencode(given))

    return ask


def search_line(result: JsonObject, colours: bool) -> str:
    """Return one line for one result, what was found in bold on a terminal."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(result["timestamp"] / 1000))
    what = result["hookType"] or result["eventType"]
    who = f"{safe_line(result['machineId']):<12.12} {safe_line(result['sessionId'])[:8]}"
    tool = safe_line(text_of(result["data"].get("toolName")))
    head = f"{clock}  {who}  {safe_line(what):<18.18} {tool:<10.10} "
    pieces = result["snippet"] or [{"text": result["data"].get("target") or result["data"].get("text") or ""}]
    words = []
    for piece in pieces:
        text = "".join(char if char.isprintable() else " " for char in without_colours(piece["text"]))
        words.append(f"\x1b[1m{text}\x1b[0m" if colours and piece.get("hit") else text)
    return (head + " " + "".join(words)).rstrip()


def command_export(args: argparse.Namespace) -> int:
    """Write stored events as NDJSON, or tool calls as CSV."""
    settings = settings_of(args)
    store = EventStore(settings.path("events"))
    wanted = {name: getattr(args, name) for name in ("machine", "tool", "type")}
    wanted["session"] = whole_session_id(settings, args.session)
    sessions = None
    if args.state:
        known = known_sessions(settings, with_hidden=True)
        sessions = frozenset(session["sessionId"] for session in known if session["state"] == args.state)
    period = {"from": args.start or 0, "to": args.end or 1 << 53}
    if not settings["persistence.enabled"]:
        tell("persistence.enabled is false: only what was stored before is there to export")
    query = search_query({**wanted, **period, "q": " ".join(args.words)}, sessions)
    counter = Progress(store.size()[1], "events", quiet=not args.output)
    lines: Iterable[bytes] = counter.counting(chosen_lines(store, query))
    if args.format == "csv":
        lines = call_table(lines)
    with contextlib.ExitStack() as stack:
        target: Any = sys.stdout.buffer
        if args.output:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            target = stack.enter_context(os.fdopen(os.open(args.output, flags, 0o600), "wb"))
        for chunk in in_chunks(lines):
            target.write(chunk)
        target.flush()
    if args.output:
        what = "tool calls of " if args.format == "csv" else ""
        print(f"{what}{counter.count} events written to {args.output}")
    return 0


def whole_session_id(settings: Settings, beginning: str | None) -> str | None:
    """Return the id of the one stored session whose id begins so; raise CommandError if several do."""
    if beginning is None:
        return None
    store = EventStore(settings.path("events"))
    names = {
        os.path.basename(path).partition(".jsonl")[0] for day in store.days() for path in store.day_paths(day)
    }
    found = (
        [beginning] if beginning in names else sorted(name for name in names if name.startswith(beginning))
    )
    if len(found) > 1:
        shown = ", ".join(found[:5]) + (" …" if len(found) > 5 else "")
        raise CommandError(f"{len(found)} sessions begin with {beginning!r}: {shown}; write more of the id")
    return found[0] if found else beginning


def command_demo(args: argparse.Namespace) -> int:
    """Play a made-up day into the running monitor, or take it out again."""
    settings = settings_of(args)
    about = needed_monitor(settings)
    if args.remove:
        return remove_demo(settings, about)
    if ask_monitor(settings, about, "/api/status")["demo"]:
        remove_demo(settings, about)  # two of them would look like one that repeats itself
    begin = now_ms()
    sent = 0
    with EventSender(about["socketPath"]) as sender:
        for timestamp, event in demo_day(begin, args.live):
            wait_s = (timestamp - now_ms()) / 1000
            if wait_s > 0:
                tell_demo_progress(sent, (timestamp - begin) // 1000)
                time.sleep(wait_s)
            sender.send([event])
            sent += 1
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{sent} demo events sent; `demo --remove` takes them out again")
    return 0


def tell_demo_progress(sent: int, live_s: int) -> None:
    """Say on a terminal, in the same line each time, how far the demo is."""
    if sys.stderr.isatty():
        words = f"\rdemo: {sent} events sent, live for {live_s} s, Ctrl-C ends it "
        print(words, end="", file=sys.stderr)


def remove_demo(settings: Settings, about: JsonObject) -> int:
    """Delete the sessions that the demo made."""
    connection = MonitorConnection(settings, about)
    connection.send({"type": "set_show_hidden", "showHidden": True})
    sessions = connection.wait_for("sessions")["sessions"]
    demo = [session["sessionId"] for session in sessions if session["demo"]]
    connection.send({"type": "subscribe", "view": "rows", "sessionIds": ["-"]})
    for session_id in demo:
        connection.send({"type": "delete_session", "sessionId": session_id})
        connection.wait_for("session_deleted")
    connection.close()
    print(f"{len(demo)} demo sessions removed")
    return 0


# The parser


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line and end with status 2."""
        self.exit(2, f"contextuate: error: {message}; `{self.prog} --help` tells more\n")


class CommandOption(NamedTuple):
    """One option or argument of a command, as `add_argument` takes it."""

    names: tuple[str, ...]
    about: Mapping[str, Any]


def option(*names: str, **about: Any) -> CommandOption:
    """Describe an option or an argument."""
    return CommandOption(names, about)


def switch(name: str, words: str) -> CommandOption:
    """Describe an option without a value."""
    return option(name, action="store_true", help=words)


def moment_ms(text: str) -> int:
    """Parse milliseconds since the epoch, or a date or time in ISO form (local time)."""
    if re.fullmatch(r"\d{10,16}", text):
        return int(text)
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S"):
        with contextlib.suppress(ValueError):
            return int(time.mktime(time.strptime(text, form)) * 1000)
    raise argparse.ArgumentTypeError(
        f"{text!r} is no time; write 2026-11-24, 2026-11-24T14:30 or milliseconds since the epoch"
    )


def seconds(text: str) -> float:
    """Parse a length of time."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1e9:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text}")


def at_least_one(text: str) -> int:
    """Parse a number of things."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


_CONFIG = option(
    "--config", metavar="FILE", help="configuration file (default ~/.contextuate/monitor.config.json)"
)
_SERVING = (
    option("--port", type=int, help="port of the page (default 3847, 0: any free one)"),
    option("--ws-port", type=int, help="port of the live connection (default 3848, 0: any free one)"),
    option("--host", help="address to listen on (default 127.0.0.1)"),
    switch("--foreground", "stay in the foreground and log to the terminal"),
    switch("--no-open", "do not open a browser"),
    option("--report-fd", type=int, help=argparse.SUPPRESS),
)
_INSTALLING = (
    option("--project", nargs="?", const=".", metavar="DIR",
           help="in the settings of one project (default: of the user)"),
    switch("--dry-run", "show what would change, and change nothing"),
)  # fmt: skip
_TYPE = option("--type", help="only this hook or event type, such as PreToolUse or tool_error")
_MACHINE = option("--machine", help="only this machine")
_FILTERS = (
    option("--session", metavar="ID", help="only this session (the id's beginning is enough)"),
    _MACHINE,
    option("--tool", help="only this tool, such as Bash"),
    _TYPE,
    option("--state", choices=SESSION_STATES, help="only sessions that are so now"),
    option(
        "--from",
        dest="start",
        type=moment_ms,
        metavar="TIME",
        help="from then on: 2026-11-24, 2026-11-24T14:30 (local time) or milliseconds since the epoch",
    ),
    option("--to", dest="end", type=moment_ms, metavar="TIME", help="before that time"),
)
_JSON = switch("--json", "for programs: as JSON")
_JSON_LINES = switch("--json", "for programs: one JSON object a line")


class Command(NamedTuple):
    """One command: its name, what carries it out, what `--help` says of it, and its options."""

    name: str
    function: Callable[[argparse.Namespace], int]
    words: str
    options: tuple[CommandOption, ...] = ()


COMMANDS = (
    Command("start", command_start, "start the monitor in the background and print the page's address",
            _SERVING),
    Command("stop", command_stop, "stop the monitor"),
    Command("restart", command_restart, "stop the monitor and start it again", _SERVING),
    Command("status", command_status, "tell how the monitor is", (_JSON,)),
    Command("url", command_url, "print the page's address", (
        switch("--token", "with the token, for another user or another machine"),)),
    Command("install", command_install, "register the hook in Claude Code's settings", _INSTALLING),
    Command("uninstall", command_uninstall, "take the hook out of Claude Code's settings", _INSTALLING),
    Command("sessions", command_sessions, "list sessions, those that need you first", (
        switch("--all", "ended and hidden ones too"), _JSON)),
    Command("tail", command_tail, "print events as they happen", (
        option("--session", metavar="ID", help="only this session (the id's beginning is enough)"),
        _MACHINE, _TYPE, _JSON_LINES)),
    Command("search", command_search, "find stored events, newest first", (
        option("words", nargs="*", help='words, begin* or "words in a row" that must all occur'),
        *_FILTERS,
        option("--limit", type=at_least_one, default=50, help="at most so many (default 50)"),
        _JSON_LINES)),
    Command("export", command_export, "write stored events as NDJSON, or tool calls as CSV", (
        option("words", nargs="*", help="only events that hold these words, as in `search`"),
        option("--format", choices=tuple(EXPORT_FORMS), default="ndjson", help="csv: one row a tool call"),
        *_FILTERS,
        option("--output", metavar="FILE", help="write there (default: standard output)"))),
    Command("import", command_import, "take in transcripts of Claude Code and exports of monitors", (
        option("paths", nargs="*", metavar="PATH",
               help="files or directories (default: every transcript of Claude Code)"),)),
    Command("prune", command_prune, "delete events that are too old or too much for the configuration", (
        switch("--dry-run", "tell what would go, and delete nothing"),)),
    Command("doctor", command_doctor, "examine the whole chain and say what to do", (_JSON,)),
    Command("test-event", command_test_event, "send one event through the hook and tell what happened"),
    Command("demo", command_demo, "play a made-up working day into the running monitor", (
        option("--live", type=seconds, default=300, metavar="SECONDS",
               help="how long it goes on (default 300); 0: the past only"),
        switch("--remove", "take the demo's sessions out again"))),
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(
        prog="contextuate_monitor.py",
        description="A live monitor for coding agents.",
        epilog="`COMMAND --help` tells more of one, README.md of everything.",
    )
    parser.add_argument("--version", action="version", version=f"contextuate {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, words, options in COMMANDS:
        command = commands.add_parser(name, help=words, description=f"{words[0].upper()}{words[1:]}.")
        command.set_defaults(function=function)
        for names, about in (_CONFIG, *options):
            command.add_argument(*names, **about)
    return parser


OUR_ERRORS = (ConfigError, StartError, CommandError, InstallError, SearchError, ConnectionError, TimeoutError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 1 for what could not be done, 2 for a command line that is wrong."""
    args = build_parser().parse_args(arguments)
    try:
        return int(args.function(args))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has gone; be silent at exit
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OUR_ERRORS as error:
        tell(f"error: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:  # a file or directory that is not as we need it
        tell(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
