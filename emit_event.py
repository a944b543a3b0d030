#!/usr/bin/env python3
"""Hand one Claude Code hook event to the Contextuate Monitor, unnoticed.

As a program it is a hook: Claude Code starts it for every event with one JSON object on standard input.
It exits with 0 whatever happens, writes nothing to standard output, and waits for the monitor's
acknowledgement for at most 250 ms; an event that nobody acknowledged goes to the spool, where the monitor
finds it. `CONTEXTUATE_DEBUG=1` makes it tell on standard error what it did.

As a module it is what hook and monitor share: configuration, event model, redaction and spool.

The interpreter compiles a script anew at each start, so the hot path comes first and needs none of the rest:
`contextuate_monitor.py install` puts the text above the line "end of the hot path" into a module of its own,
which a launcher of a few lines imports from its bytecode, and this whole file beside it for the rare paths.
Registered as it is, this file works too; a hook call then takes about twice as long.
"""

# ---------------------------------------------------------------------------
# Hot path: what every hook call runs
#
# Knows: built-in and C modules only; importing os, json, socket or signal costs more than all it does.
# Owns: the wrapped line, the way to the socket, the append to the spool.
# ---------------------------------------------------------------------------

import posix
import sys
import time

STDIN_DEADLINE_S = 2.0
ACKNOWLEDGEMENT_DEADLINE_S = 0.25
ACKNOWLEDGEMENT = b"\x06"
LINE_LIMIT_BYTES = 16 << 20  # what the monitor takes as one line
PAYLOAD_LIMIT_BYTES = 64 << 20  # what a hook holds in memory
SEGMENT_LIMIT_BYTES = 4 << 20
SEGMENT_LIMIT_MS = 24 * 3600 * 1000
DEFAULT_SOCKET_PATH = "/tmp/contextuate-monitor.sock"


def run_hook() -> None:
    """Take one hook call from standard input to the monitor or the spool; end the process with status 0."""
    notes: "list[str]" = []
    try:
        import _signal

        # A hook of StopFailure is told to stop 40 ms after its start (CLAUDE_HOOKS: print mode).
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
        payload = read_payload(0, time.monotonic() + STDIN_DEADLINE_S)
        if payload:
            deliver(payload, notes)
        else:
            notes.append("nothing on standard input")
            whole().log_failure("no hook payload on standard input")
    except BaseException as error:  # a hook that fails loudly blocks Claude, so nothing may get out
        notes.append(f"failed: {error!r}")
        try:
            whole().log_failure(repr(error))
        except BaseException as second:  # e.g. a full disk: there is no place left to tell it
            notes.append(f"and could not log it: {second!r}")
    if posix.environ.get(b"CONTEXTUATE_DEBUG", b"") not in (b"", b"0"):
        try:
            posix.write(2, "".join(f"contextuate: {note}\n" for note in notes).encode("utf-8", "replace"))
        except OSError:
            pass
    posix._exit(0)


def read_payload(fd: int, deadline: float) -> bytes:
    """Read one JSON object from `fd`, stripped; what came by `deadline` (time.monotonic) if it never ends.

    Ends at EOF, at the newline of a one-line object, or when the object is whole and nothing follows: old
    clients send no newline and a pipe may be held open by others.
    """
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    chunks: "list[bytes]" = []
    size = 0
    tail = b""  # the last three bytes of all chunks
    one_line = True  # no newline so far but the last byte
    while size <= PAYLOAD_LIMIT_BYTES:
        left_ms = int((deadline - time.monotonic()) * 1000)
        maybe_whole = tail.endswith((b"}", b"}\n", b"}\r\n"))
        if left_ms <= 0 or not poll.poll(min(left_ms, 30) if maybe_whole else left_ms):
            if left_ms <= 0 or (maybe_whole and whole().is_json_object(b"".join(chunks))):
                break
            continue
        chunk = posix.read(fd, 1 << 20)
        one_line = one_line and b"\n" not in chunk[:-1]
        chunks.append(chunk)
        size += len(chunk)
        tail = (tail + chunk[-3:])[-3:]
        if not chunk or (one_line and tail.endswith((b"}\n", b"}\r\n"))):
            break
        one_line = one_line and not chunk.endswith(b"\n")
    if size > PAYLOAD_LIMIT_BYTES:
        raise ValueError(f"the payload is larger than {PAYLOAD_LIMIT_BYTES} bytes")
    return b"".join(chunks).strip()


def deliver(payload: bytes, notes: "list[str]") -> None:
    """Send one payload the way the configuration says; append to `notes` what happened."""
    environ: "dict[bytes, bytes]" = posix.environ
    home, config_path = places(environ)
    mode, socket_path = hook_settings(home, config_path)
    notes.append(f"config {config_path}: mode {mode}, socket {socket_path}")
    line = wrap(payload, environ)
    if len(line) > LINE_LIMIT_BYTES // 2:
        line = whole().shrink_line(line, config_path)
    if mode == "local":
        outcome = send(socket_path, line, time.monotonic() + ACKNOWLEDGEMENT_DEADLINE_S)
        if not outcome:
            notes.append(f"the monitor has stored {len(line)} bytes")
            return
        notes.append(f"the monitor did not take it: {outcome}")
    notes.append("kept in the spool: " + append_to_spool(home + "/spool", line))


def places(environ: "dict[bytes, bytes]") -> "tuple[str, str]":
    """Return our directory and the configuration file's path (CONTEXTUATE_HOME, CONTEXTUATE_CONFIG).

    An installed hook belongs to the directory that it is installed in.
    """
    home = environ.get(b"CONTEXTUATE_HOME", b"").decode("utf-8", "surrogateescape")
    folder = __file__.rpartition("/")[0]
    if not home and folder.endswith("/hooks/lib"):
        home = folder[: -len("/hooks/lib")]
    if not home:
        user_home = environ.get(b"HOME", b"").decode("utf-8", "surrogateescape")
        if not user_home:
            import pwd

            user_home = pwd.getpwuid(posix.getuid()).pw_dir
        home = user_home + "/.contextuate"
    config = environ.get(b"CONTEXTUATE_CONFIG", b"").decode("utf-8", "surrogateescape")
    return home, config or home + "/monitor.config.json"


def hook_settings(home: str, config_path: str) -> "tuple[str, str]":
    """Return (mode, socket path) without parsing JSON where a derived file for this very configuration
    exists.
    """
    try:
        about = posix.stat(config_path)
    except OSError:
        return "local", DEFAULT_SOCKET_PATH
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}"
    try:
        fd = posix.open(home + "/hook.cache", posix.O_RDONLY | posix.O_CLOEXEC)
        try:
            fields = posix.read(fd, 8192).decode("utf-8", "surrogateescape").split("\n")
        finally:
            posix.close(fd)
        if len(fields) == 4 and fields[0] == key:
            return fields[1], fields[2]
    except OSError:
        pass
    return whole().derive_hook_settings(home, config_path, key)  # type: ignore[no-any-return]


def wrap(payload: bytes, environ: "dict[bytes, bytes]") -> bytes:
    """Return the line for one payload: the payload untouched, and beside it what only the hook knows.

    `{"id", "timestamp", "machineId", "pid"?, "sessionId"?, "cwd"?, "parentSessionId"?, "hook": <payload>}`
    """
    digits = posix.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]  # RFC 9562 section 5.4
    event_id = f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
    machine = environ.get(b"CONTEXTUATE_MACHINE_ID", b"").decode("utf-8", "surrogateescape")
    head = (
        f'{{"id":"{event_id}","timestamp":{time.time_ns() // 1_000_000},'
        f'"machineId":{quote(machine or posix.uname().nodename)}'
    )
    pid = environ.get(b"CLAUDE_PID", b"")
    if pid.isdigit() and len(pid) < 10:
        head += f',"pid":{int(pid)}'
    parent = environ.get(b"CONTEXTUATE_PARENT_SESSION", b"")
    if parent:
        head += f',"parentSessionId":{quote(parent.decode("utf-8", "surrogateescape"))}'
    if b'"session_id"' not in payload and environ.get(b"CLAUDE_CODE_SESSION_ID"):
        session = environ[b"CLAUDE_CODE_SESSION_ID"].decode("utf-8", "surrogateescape")
        head += f',"sessionId":{quote(session)}'
    if b'"cwd"' not in payload:
        try:
            head += f',"cwd":{quote(posix.getcwd())}'
        except OSError:  # it has been removed
            pass
    # In JSON a line end can only stand between tokens, so a space in its place changes nothing.
    return head.encode() + b',"hook":' + payload.replace(b"\n", b" ").replace(b"\r", b" ") + b"}\n"


def quote(text: str) -> str:
    """Return `text` as a JSON string, ASCII only."""
    if text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").replace("/", "").isalnum():
        return f'"{text}"'
    from _json import encode_basestring_ascii

    return encode_basestring_ascii(text)


def send(socket_path: str, line: bytes, deadline: float) -> str:
    """Send `line` to the monitor and wait for its acknowledgement; return "" or why there was none."""
    import _socket

    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(ACKNOWLEDGEMENT_DEADLINE_S)
        connection.connect(socket_path)
        if peer_uid(connection) != posix.getuid():
            return f"{socket_path} belongs to another user"
        connection.sendall(line)
        left = deadline - time.monotonic()
        if left <= 0:
            return "no time left to wait for an acknowledgement"
        connection.settimeout(left)
        return "" if connection.recv(1) == ACKNOWLEDGEMENT else "it closed the connection"
    except OSError as error:
        return f"{type(error).__name__} {error}"
    finally:
        connection.close()


def peer_uid(connection: "Any") -> int:
    """Return the user id of a Unix socket's other end (SO_PEERCRED, on macOS LOCAL_PEERCRED).

    -1 if unknown.
    """
    if sys.platform == "linux":
        credentials = connection.getsockopt(
            1, 17, 12
        )  # SOL_SOCKET, SO_PEERCRED: struct ucred {pid, uid, gid}
    else:
        credentials = connection.getsockopt(
            0, 1, 76
        )  # SOL_LOCAL, LOCAL_PEERCRED: struct xucred {version, uid, …}
    return int.from_bytes(credentials[4:8], sys.byteorder) if len(credentials) >= 8 else -1


def append_to_spool(directory: str, line: bytes) -> str:
    """Append `line` to the newest segment of the spool and return the segment's path.

    Safe with any number of writers and one drainer: a writer holds a shared lock on the segment while it
    writes, and writes only when the locked file still has its name; the drainer renames a segment first and
    then asks for the exclusive lock, after which nobody can be writing to it. Nobody waits for a lock, so a
    writer that was stopped holds up no other. A line begins with a newline of its own, so what a full disk or
    a kill tore stands alone.
    """
    import fcntl

    for _ in range(1000):
        path = current_segment(directory)
        flags = posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
        fd = posix.open(path, flags, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if posix.stat(path).st_ino != posix.fstat(fd).st_ino:
                continue
            written = posix.write(fd, b"\n" + line)
            if written <= len(line):
                raise ValueError(f"only {written} of {len(line)} bytes fitted into {path}")
            return path
        except (BlockingIOError, FileNotFoundError):
            continue  # the drainer has just taken it
        finally:
            posix.close(fd)
    raise ValueError(f"no segment in {directory} could be written")


def current_segment(directory: str) -> str:
    """Return the path of the segment to append to; begin a new one when the newest is full or a day old."""
    now_ms = time.time_ns() // 1_000_000
    try:
        names = [name for name in posix.listdir(directory) if name.endswith(".jsonl")]
    except OSError:
        whole().make_private_directory(directory)
        names = []
    if names:
        newest = max(names)
        path = f"{directory}/{newest}"
        started = newest.partition("-")[0]
        try:
            if (
                started.isdigit()
                and 0 <= now_ms - int(started) < SEGMENT_LIMIT_MS
                and posix.stat(path).st_size < SEGMENT_LIMIT_BYTES
            ):
                return path
        except OSError:
            pass  # taken by the drainer since it was listed
        whole().drop_old_segments(directory)
    return f"{directory}/{now_ms:013d}-{posix.urandom(4).hex()}.jsonl"


def whole() -> "Any":
    """Import the whole of this file, for what is too rare to be compiled at every call."""
    here = __file__.rpartition("/")[0] or "."
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    import emit_event

    return emit_event


if __name__ == "__main__":
    run_hook()

# --- end of the hot path ---

import contextlib  # noqa: E402 - the hot path above must not pay for these
import dataclasses  # noqa: E402
import difflib  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import re  # noqa: E402
import socket  # noqa: E402
import uuid  # noqa: E402
from typing import Any, Callable, Dict, Iterator, List, Tuple  # noqa: E402

JsonObject = Dict[str, Any]

# What Claude Code runs once it is installed; a fault of any kind ends without a word, as in run_hook.
LAUNCHER = """\
import posix
import sys

try:
    sys.path.insert(0, __file__.rpartition("/")[0] + "/lib")
    import hot_path

    hot_path.run_hook()
except BaseException:
    posix._exit(0)
"""
HOT_PATH_END = "# --- end of the hot path ---\n"


def make_private_directory(path: str) -> None:
    """Make `path` and its parents, for this user only; refuse one that belongs to somebody else."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    about = os.lstat(path)
    if not os.path.isdir(path) or about.st_uid != os.getuid():
        raise PermissionError(f"{path} is not a directory of this user")
    if about.st_mode & 0o077:
        os.chmod(path, 0o700)


def write_atomically(path: str, content: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path` in one step, so that nobody ever reads half of it."""
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def log_failure(reason: str) -> None:
    """Add one line to emit.log in our directory.

    At 256 KiB the file is moved aside once, so two exist at most.
    """
    home = places(os.environb)[0]  # type: ignore[arg-type]
    make_private_directory(home)
    path = home + "/emit.log"
    if os.path.exists(path) and os.path.getsize(path) > 256 << 10:
        os.replace(path, path + ".1")
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{stamp} {os.getpid()} {reason}\n")


# ---------------------------------------------------------------------------
# Config: one table of keys, read from one file
#
# Knows: what every key must look like. Does not know: what the values are used for.
# ---------------------------------------------------------------------------


class ConfigError(Exception):
    """A configuration that cannot be used; the message names file, key and what was expected."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One configuration key: its default, a check, and the check in words."""

    default: Any
    expected: str
    accepts: Callable[[Any], bool]


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(_text(name) for name in value)


KEYS: "Dict[str, Key]" = {
    "mode": Key("local", '"local"', _one_of("local")),
    "socketPath": Key(
        DEFAULT_SOCKET_PATH,
        "an absolute path of at most 100 bytes",
        lambda value: _text(value) and value.startswith("/") and len(os.fsencode(value)) <= 100,
    ),
    "server.host": Key("127.0.0.1", "a host name or an IP address", _text),
    "server.port": Key(3847, "an integer from 0 (any free port) to 65535", _integer(0, 65535)),
    "server.wsPort": Key(3848, "an integer from 0 (any free port) to 65535", _integer(0, 65535)),
    "server.allowedHosts": Key([], "a list of host names", _names),
    "server.auth": Key("auto", '"auto", "token" or "off"', _one_of("auto", "token", "off")),
    "persistence.enabled": Key(True, "true or false", _flag),
    "persistence.type": Key(
        "file", '"file" (events are kept in plain files; nothing else is offered)', _one_of("file")
    ),
    "limits.fieldBytes": Key(1 << 20, "an integer from 1024 to 8388608", _integer(1024, 8 << 20)),
    "limits.connections": Key(256, "an integer from 1 to 10000", _integer(1, 10_000)),
    "limits.clientQueueBytes": Key(1 << 20, "an integer from 65536 to 67108864", _integer(1 << 16, 64 << 20)),
    "sessions.quietSeconds": Key(120, "an integer from 5 to 86400", _integer(5, 86_400)),
    "sessions.endedHours": Key(12, "an integer from 1 to 720", _integer(1, 720)),
    "privacy.redact": Key(True, "true or false", _flag),
    "privacy.level": Key("full", '"full" or "metadata"', _one_of("full", "metadata")),
}

# Known from the documentation of other versions: no spelling mistakes, but nothing here reads them.
UNUSED_SECTIONS = ("redis", "retention", "prices")

_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.S)
_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.S)


def parse_relaxed_json(text: str) -> Any:
    """Parse JSON that may hold `//`, `#` and `/* */` comments and trailing commas.

    Raise ValueError with the line.
    """

    def blank(match: "re.Match[str]") -> str:
        token = match.group()
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return json.loads(_TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text)))


def load_config(path: str) -> "Tuple[Dict[str, Any], List[str]]":
    """Read the configuration at `path`.

    Returns every key of KEYS with its value, and warnings in words. A missing file means defaults.
    Raises ConfigError for what cannot be used.
    """
    values = {name: key.default for name, key in KEYS.items()}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return values, []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        given = parse_relaxed_json(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {_shown(given)}")
    warnings = []
    for name, value in _flatten(given, path):
        if name in KEYS:
            if not KEYS[name].accepts(value):
                raise ConfigError(f"{path}: {name}: expected {KEYS[name].expected}, got {_shown(value)}")
            values[name] = value
        elif name.partition(".")[0] in UNUSED_SECTIONS:
            warnings.append(f"{path}: {name}: this version does not use it")
        else:
            near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{path}: {name}: unknown key, ignored{hint}")
    return values, warnings


def _flatten(given: JsonObject, path: str) -> "Iterator[Tuple[str, Any]]":
    sections = {name.partition(".")[0] for name in KEYS if "." in name}
    for name, value in given.items():
        if name in sections:
            if not isinstance(value, dict):
                raise ConfigError(f"{path}: {name}: expected an object, got {_shown(value)}")
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def derive_hook_settings(home: str, config_path: str, key: str) -> "Tuple[str, str]":
    """Read mode and socket path from the configuration and leave them for the next hooks in hook.cache.

    `key` names the configuration file's device, inode, size and time; the derived file is valid for it alone.
    An unusable configuration means defaults: the monitor is the one to complain.
    """
    try:
        values = load_config(config_path)[0]
        mode, socket_path = values["mode"], values["socketPath"]
    except ConfigError as error:
        # Not remembered either, so that every call complains until it is mended.
        with contextlib.suppress(OSError):
            log_failure(f"defaults used: {error}")
        return "local", DEFAULT_SOCKET_PATH
    if "\n" not in socket_path:
        content = f"{key}\n{mode}\n{socket_path}\n"
        with contextlib.suppress(OSError):  # it only saves time
            make_private_directory(home)
            write_atomically(home + "/hook.cache", content.encode("utf-8", "surrogateescape"))
    return mode, socket_path


# ---------------------------------------------------------------------------
# Event model: from anything that is one JSON object to one event
#
# Knows: payload fields and event fields. Does no I/O.
# ---------------------------------------------------------------------------

EVENT_TYPES = {
    "SessionStart": "session_start",
    "SessionEnd": "session_end",
    "UserPromptSubmit": "user_prompt",
    "PreToolUse": "tool_call",
    "PostToolUse": "tool_result",
    "PostToolUseFailure": "tool_error",
    "SubagentStart": "subagent_start",
    "SubagentStop": "subagent_stop",
    "Stop": "turn_end",
    "StopFailure": "turn_error",
    "Notification": "notification",
    "PermissionRequest": "permission_request",
    "PermissionDenied": "permission_denied",
    "Elicitation": "elicitation",
    "ElicitationResult": "elicitation_result",
    "PreCompact": "pre_compact",
    "PostCompact": "post_compact",
    "TaskCreated": "task_created",
    "TaskCompleted": "task_completed",
    "Monitor": "session_meta",
}

# Payload field → name in `data`. Where two lead to one name the first present wins, the other keeps its own.
DATA_NAMES = {
    "tool_name": "toolName",
    "tool_input": "toolInput",
    "tool_response": "toolOutput",
    "tool_output": "toolOutput",
    "tool_use_id": "toolUseId",
    "message": "message",
    "prompt": "message",
    "error": "error",
    "model": "model",
    "transcript_path": "transcriptPath",
    "duration_ms": "durationMs",
    "permission_mode": "permissionMode",
    "source": "source",
    "reason": "reason",
    "notification_type": "notificationType",
    "last_assistant_message": "assistantResponse",
}

_WRAPPER_FIELDS = (
    "id",
    "timestamp",
    "sessionId",
    "machineId",
    "cwd",
    "parentSessionId",
    "pid",
    "hook",
    "seq",
    "received",
)
_HOOK_FIELDS = ("hook_event_name", "session_id", "cwd", "agent_id", "agent_type")
_ID_LIMIT = 256


class MalformedEvent(ValueError):
    """What came is not one JSON object."""


_parse_json = json.JSONDecoder(parse_constant=str).decode


def parse_event_line(line: bytes) -> JsonObject:
    """Parse one line into a JSON object; raise MalformedEvent with the reason for anything else.

    Bytes that are not UTF-8 are replaced, NaN and infinities become strings: the event is kept all the same.
    """
    try:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            text = line.decode("utf-8", "replace")
        try:
            value = _parse_json(text)
        except ValueError:  # perhaps only for an integer longer than Python converts
            value = json.loads(text, parse_constant=str, parse_int=_int_or_text)
    except RecursionError:
        raise MalformedEvent("nested too deeply") from None
    except ValueError as error:
        raise MalformedEvent(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedEvent(f"one JSON object was expected, not {type(value).__name__}")
    return value


def _int_or_text(digits: str) -> Any:
    return int(digits) if len(digits) <= 4000 else digits


def is_json_object(data: bytes) -> bool:
    """Tell whether `data` is one whole JSON object."""
    try:
        parse_event_line(data)
    except MalformedEvent:
        return False
    return True


def encode_json(value: Any) -> bytes:
    """Encode to one line of compact ASCII JSON: lone surrogates stay escaped, infinities become strings."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).encode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return value


def build_event(given: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    """Build an event (README "The event") from a wrapped payload, a raw one, an event or any other object.

    `received_ms` and `machine_id` fill in for what the sender did not say. Never raises on wrong types: a
    value that does not fit its place is kept in `data`.
    """
    hook = given.get("hook")
    is_event = isinstance(given.get("eventType"), str)
    if isinstance(hook, dict) and isinstance(given.get("id"), str) and not is_event:
        return _event_from_hook(hook, given, received_ms, machine_id)
    if isinstance(given.get("hook_event_name"), str):
        return _event_from_hook(given, {}, received_ms, machine_id)
    if is_event:
        return _event_from_event(given, received_ms, machine_id)
    return _envelope({}, received_ms, machine_id, "", "message", dict(given))


def _event_from_hook(hook: JsonObject, wrapper: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    hook_name = hook.get("hook_event_name")
    hook_type = hook_name if isinstance(hook_name, str) else ""
    data: JsonObject = {}
    for field, new_name in DATA_NAMES.items():
        if field in hook:
            _keep(data, field if new_name in data else new_name, hook[field])
    for field, value in hook.items():
        if field not in DATA_NAMES and field not in _HOOK_FIELDS:
            _keep(data, field, value)
    envelope = {
        "id": wrapper.get("id"),
        "timestamp": wrapper.get("timestamp"),
        "sessionId": hook["session_id"] if _is_id(hook.get("session_id")) else wrapper.get("sessionId"),
        "machineId": wrapper.get("machineId"),
        "workingDirectory": hook["cwd"] if isinstance(hook.get("cwd"), str) else wrapper.get("cwd"),
        "agentId": hook.get("agent_id"),
        "parentSessionId": wrapper.get("parentSessionId"),
        "pid": wrapper.get("pid"),
    }
    for name, value in wrapper.items():
        if name in ("agentId", "agentType", "workingDirectory", "hookType", "eventType", "data"):
            _keep(data, name, value)
        elif name not in _WRAPPER_FIELDS:
            envelope[name] = value
    for field, check in (("session_id", _is_id), ("cwd", _is_text), ("agent_id", _is_id)):
        if field in hook and not check(hook[field]):
            _keep(data, field, hook[field])
    if not isinstance(hook_name, str) and hook_name is not None:
        _keep(data, "hook_event_name", hook_name)
    if "agent_type" in hook:
        if _is_id(hook.get("agent_id")) and isinstance(hook["agent_type"], str):
            envelope["agentType"] = hook["agent_type"]
        else:
            _keep(data, "agent_type", hook["agent_type"])  # the main thread of an `--agent` session
    return _envelope(
        envelope, received_ms, machine_id, hook_type, EVENT_TYPES.get(hook_type, "message"), data
    )


def _event_from_event(given: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    rest = dict(given)
    content = rest.pop("data", None)
    data = dict(content) if isinstance(content, dict) else {} if content is None else {"data": content}
    if "tool_output" in data and "toolOutput" not in data:
        data["toolOutput"] = data.pop("tool_output")
    hook_type = rest.pop("hookType", "")
    if not isinstance(hook_type, str):
        _keep(data, "hookType", hook_type)
        hook_type = ""
    for assigned in ("seq", "received"):
        rest.pop(assigned, None)  # given anew by whoever stores it
    event_type = rest.pop("eventType")
    return _envelope(rest, received_ms, machine_id, hook_type, event_type, data)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _ID_LIMIT


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e14


def _is_pid(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


_ENVELOPE_CHECKS: "Dict[str, Callable[[Any], bool]]" = {
    "id": _is_id,
    "timestamp": _is_time,
    "sessionId": _is_id,
    "machineId": _is_id,
    "workingDirectory": _is_text,
    "agentId": _is_id,
    "agentType": _is_text,
    "parentSessionId": _is_id,
    "pid": _is_pid,
}


_EVENT_FIELDS = frozenset((*_ENVELOPE_CHECKS, "hookType", "eventType", "data", "demo"))


def _keep(data: JsonObject, name: str, value: Any) -> None:
    """Put a value into `data` under its name, or one like it where the name is taken."""
    while name in data:
        name += "_"
    data[name] = value


def _envelope(
    given: JsonObject, received_ms: int, machine_id: str, hook_type: str, event_type: str, data: JsonObject
) -> JsonObject:
    """Put the fields of the event in their order.

    What has a wrong type moves into `data` under its own name.
    """
    good: JsonObject = {}
    for name, value in given.items():
        check = _ENVELOPE_CHECKS.get(name)
        if value is None and check is not None:
            continue
        if check is None or check(value):
            good[name] = value
        else:
            _keep(data, name, value)
    event: JsonObject = {
        "id": good.pop("id", None) or str(uuid.uuid4()),
        "timestamp": int(good.pop("timestamp", received_ms)),
        "sessionId": good.pop("sessionId", "unknown"),
        "machineId": good.pop("machineId", machine_id),
        "workingDirectory": good.pop("workingDirectory", ""),
        "hookType": hook_type,
        "eventType": event_type,
    }
    for name in ("agentId", "agentType", "parentSessionId", "pid"):
        if name in good:
            event[name] = good.pop(name)
    event.update(good)
    event["data"] = data
    return event


_REQUIRED_FIELDS = (
    "id", "timestamp", "sessionId", "machineId", "workingDirectory", "hookType", "eventType", "data",
)  # fmt: skip


def is_whole_event(event: JsonObject) -> bool:
    """Tell whether every field of an event is there and of its type."""
    for name in _REQUIRED_FIELDS:
        if event.get(name) is None:
            return False
    for name, check in _ENVELOPE_CHECKS.items():
        if name in event and not check(event[name]):
            return False
    return (
        isinstance(event["hookType"], str)
        and isinstance(event["eventType"], str)
        and isinstance(event["data"], dict)
    )


def this_machine() -> str:
    """Return this machine's name: CONTEXTUATE_MACHINE_ID, else the host name."""
    return os.environ.get("CONTEXTUATE_MACHINE_ID") or socket.gethostname() or "unknown"


# ---------------------------------------------------------------------------
# Redaction: secrets out, long fields cut, before an event is stored or sent on
#
# Knows: what secrets look like. Best effort: a secret of a shape that nobody described stays.
# ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SecretShape:
    """One kind of secret: `hints` are the fixed, lower-case parts without which the pattern cannot match.

    The pattern's group `secret`, or the whole match, is what gets replaced.
    """

    kind: str
    hints: "Tuple[str, ...]"
    pattern: "re.Pattern[str]"


def _shape(kind: str, hints: str, pattern: str, flags: int = 0) -> SecretShape:
    return SecretShape(kind, tuple(hints.split()), re.compile(pattern, flags))


_SECRET_NAME = (
    r"(?:password|passwd|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|secret[_-]?key"
    r"|auth[_-]?key|credentials?|client[_-]?secret)"
)

SECRET_SHAPES = (
    _shape(
        "private-key",
        "private",
        # one whose end was cut off reaches to the end of the text
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:.*?-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|.*\Z)",
        re.S,
    ),
    _shape("anthropic", "sk-ant-", r"\bsk-ant-[A-Za-z0-9_-]{20,}"),
    _shape("openai", "sk-", r"\bsk-(?!ant-)(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}"),
    _shape("github", "ghp_ gho_ ghu_ ghs_ ghr_", r"\bgh[pousr]_[A-Za-z0-9]{30,}"),
    _shape("github", "github_pat_", r"\bgithub_pat_[A-Za-z0-9_]{40,}"),
    _shape("gitlab", "glpat- glptt- gldt- glrt-", r"\bgl(?:pat|ptt|dt|rt)-[A-Za-z0-9_-]{20,}"),
    _shape("aws", "akia asia", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
    _shape("google", "aiza", r"\bAIza[A-Za-z0-9_-]{35}"),
    _shape("google", "ya29.", r"\bya29\.[A-Za-z0-9_-]{20,}"),
    _shape("azure", "accountkey=", r"(?i)AccountKey=(?P<secret>[A-Za-z0-9+/]{40,}={0,2})"),
    _shape("slack", "xox", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    _shape("slack", "hooks.slack.com", r"hooks\.slack\.com/services/(?P<secret>[A-Za-z0-9/]{20,})"),
    _shape("discord", "discord", r"discord(?:app)?\.com/api/webhooks/(?P<secret>\d+/[A-Za-z0-9_-]{30,})"),
    _shape("telegram", ":aa", r"\b\d{8,10}:AA[A-Za-z0-9_-]{32,}"),
    _shape("stripe", "_live_ _test_ whsec_", r"\b(?:(?:sk|rk|pk)_(?:live|test)_|whsec_)[A-Za-z0-9]{16,}"),
    _shape("npm", "npm_", r"\bnpm_[A-Za-z0-9]{36}"),
    _shape("pypi", "pypi-", r"\bpypi-[A-Za-z0-9_-]{40,}"),
    _shape("huggingface", "hf_", r"\bhf_[A-Za-z0-9]{30,}"),
    _shape("sendgrid", "sg.", r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    _shape("jwt", "eyj", r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"),
    _shape(
        "authorization",
        "authorization",
        r"(?i)(?<!\[redacted:)authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token|digest)\s+)?"
        r"(?P<secret>[^\s\"',;<>\[\]]{8,})",
    ),
    _shape("authorization", "bearer", r"(?i)\bbearer\s+(?P<secret>[A-Za-z0-9._~+/=-]{20,})"),
    _shape(
        "url-password", "://", r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"'<>]*:(?P<secret>[^\s/@\"'<>]{1,256})@", re.I
    ),
    _shape(
        "assignment",
        "pass secret token key credential",
        # NAME=value and "name": "value" in the text of a file or a command, not code such as `token = read()`
        r"(?i)(?:\b|_)" + _SECRET_NAME + r"(?:=(?![=>])|[\"']\s*:\s*(?=[\"']))"
        r"(?P<quote>[\"']?)(?P<secret>(?!\[redacted:|\$)[^\s\"'`,;&|()<>{}]{6,})",
    ),
)

_SECRET_KEY = re.compile(
    r"(?:^|_)(?:password|passwd|pwd|passphrase|secret|token|api_?key|access_?key|private_?key|secret_?key"
    r"|auth_?key|credentials?|client_?secret|authorization|cookie|set_?cookie|bearer)$"
)
_METADATA_KEYS = frozenset(
    (
        "toolName",
        "toolUseId",
        "durationMs",
        "permissionMode",
        "source",
        "reason",
        "notificationType",
        "model",
        "usage",
        "truncated",
        "agent_type",
        "is_interrupt",
        "prompt_id",
        "trigger",
        "action",
        "label",
        "pinned",
        "hidden",
        "parentSessionId",
    )
)
_DEPTH_LIMIT = 100


@functools.lru_cache(maxsize=4096)
def _names_a_secret(key: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:200]).replace("-", "_").replace(".", "_").lower()
    return _SECRET_KEY.search(snake) is not None


def _replacement(kind: str, secret: str) -> str:
    digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
    return f"[redacted:{kind}:{digest[:8]}]"


def redact_text(text: str) -> str:
    """Replace what looks like a secret in `text` by `[redacted:<kind>:<first 8 hex of sha256>]`."""
    lowered = text.lower()
    for shape in SECRET_SHAPES:
        if any(hint in lowered for hint in shape.hints):
            text = shape.pattern.sub(functools.partial(_redact_match, shape.kind), text)
    return text


def _redact_match(kind: str, match: "re.Match[str]") -> str:
    group = "secret" if "secret" in match.re.groupindex else 0
    secret = match.group(group)
    if secret.startswith("[redacted:"):
        return match.group()
    start, end = match.start(group) - match.start(), match.end(group) - match.start()
    whole_match = match.group()
    return whole_match[:start] + _replacement(kind, secret) + whole_match[end:]


@dataclasses.dataclass(frozen=True)
class Privacy:
    """What may leave: `redact` replaces secrets, `metadata_only` drops content, longer strings are cut."""

    redact: bool = True
    metadata_only: bool = False
    field_limit_bytes: int = 1 << 20


def protect(event: JsonObject, privacy: Privacy) -> JsonObject:
    """Return `event` with its `data` redacted and cut as `privacy` says; cuts are named in `data.truncated`.

    `truncated` maps the path of a cut field, such as "toolOutput.stdout", to its original size in bytes.
    """
    cuts: "Dict[str, int]" = {}
    data = event["data"]
    if privacy.metadata_only:
        data = {name: value for name, value in data.items() if name in _METADATA_KEYS}
    for name in [name for name in event if name not in _EVENT_FIELDS]:
        if privacy.metadata_only:
            del event[name]
        else:
            event[name] = _protect_value(event[name], name, name, privacy, cuts, 0)
    data = _protect_value(data, "", "", privacy, cuts, 0)
    if cuts:
        earlier = data.get("truncated")  # what the hook has cut already keeps its first size
        data["truncated"] = {**cuts, **(earlier if isinstance(earlier, dict) else {})}
    event["data"] = data
    return event


def _protect_value(
    value: Any, key: str, path: str, privacy: Privacy, cuts: "Dict[str, int]", depth: int
) -> Any:
    if isinstance(value, str):
        return _protect_text(value, key, path, privacy, cuts)
    if depth >= _DEPTH_LIMIT and isinstance(value, (dict, list)):
        return _protect_text(json.dumps(value), key, path, privacy, cuts)
    if isinstance(value, dict):
        kept: JsonObject = {}
        for name, inner in value.items():
            inner_path = f"{path}.{name}" if path else name
            kept[redact_text(name) if privacy.redact else name] = _protect_value(
                inner, name, inner_path, privacy, cuts, depth + 1
            )
        return kept
    if isinstance(value, list):
        return [
            _protect_value(inner, key, f"{path}[{index}]", privacy, cuts, depth + 1)
            for index, inner in enumerate(value)
        ]
    return value


def _protect_text(text: str, key: str, path: str, privacy: Privacy, cuts: "Dict[str, int]") -> str:
    if privacy.redact and text and _names_a_secret(key):
        return text if text.startswith("[redacted:") else _replacement("key", text)
    clean = redact_text if privacy.redact else str
    limit = privacy.field_limit_bytes
    if len(text) <= limit // 4:  # a character is at most four bytes
        return clean(text)
    size = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
    if size <= limit:
        return clean(text)
    cuts[path] = size
    half = max(1, limit * len(text) // size // 2)
    # Redacted with a margin, so that a secret that stands across the cut is seen whole and leaves no half
    # behind.
    # The margin itself never shows, however much shorter what was redacted before it has become.
    margin = 4096
    head = clean(text[: half + margin])
    tail = clean(text[-half - margin :])
    unseen = margin if half + margin < len(text) else 0
    head = head[: max(0, min(half, len(head) - unseen))]
    tail = tail[min(len(tail), max(len(tail) - half, unseen)) :]
    return f"{head}\n[… {size - limit} of {size} bytes cut …]\n{tail}"


def shrink_line(line: bytes, config_path: str = "") -> bytes:
    """Cut the fields of one wrapped payload so that the line fits what a monitor takes.

    Redacts before it cuts, unless the configuration says otherwise: no half of a secret may be left over.
    """
    wrapped = parse_event_line(line)
    try:
        redact = bool(load_config(config_path)[0]["privacy.redact"])
    except ConfigError:
        redact = True
    limit = LINE_LIMIT_BYTES // 8
    while len(line) > LINE_LIMIT_BYTES // 2 and limit >= 1024:
        cuts: "Dict[str, int]" = {}
        privacy = Privacy(redact=redact, field_limit_bytes=limit)
        hook = _protect_value(wrapped["hook"], "", "", privacy, cuts, 0)
        line = encode_json({**wrapped, "hook": {**hook, "truncated": _named_in_data(cuts)}}) + b"\n"
        limit //= 4
    if len(line) > LINE_LIMIT_BYTES:
        raise ValueError(f"the payload has {len(line)} bytes and could not be cut to {LINE_LIMIT_BYTES}")
    return line


def _named_in_data(cuts: "Dict[str, int]") -> "Dict[str, int]":
    """Rename the paths of a payload's cut fields to those that the fields have in `data`."""
    renamed = {}
    for path, size in cuts.items():
        field, rest = re.match(r"([^.\[]*)(.*)", path, re.S).groups()  # type: ignore[union-attr]
        renamed[DATA_NAMES.get(field, field) + rest] = size
    return renamed


# ---------------------------------------------------------------------------
# Spool: the drainer's side (the writer's side is in the hot path)
#
# Owns: spool/, segments named <start in ms>-<random>.jsonl, taken ones .taken, and dropped.jsonl.
# ---------------------------------------------------------------------------

SPOOL_LIMIT_BYTES = 64 << 20
SPOOL_LIMIT_MS = 7 * 24 * 3600 * 1000


def drop_old_segments(directory: str) -> None:
    """Drop whole segments, oldest first, until the spool is within 64 MiB and 7 days; count what is lost."""
    segments = spool_segments(directory)
    total = sum(size for _, size in segments)
    oldest_ms = time.time_ns() // 1_000_000 - SPOOL_LIMIT_MS
    for path, size in segments:
        too_old = segment_start_ms(path) < oldest_ms
        if total <= SPOOL_LIMIT_BYTES and not too_old:
            continue
        try:
            with open(path, "rb") as file:
                events = sum(1 for line in file if line.strip())
            os.unlink(path)
        except FileNotFoundError:
            continue  # another writer, or the drainer, was first
        total -= size
        record = {
            "timestamp": time.time_ns() // 1_000_000,
            "events": events,
            "bytes": size,
            "reason": "older than 7 days" if too_old else "over 64 MiB",
        }
        fd = os.open(directory + "/dropped.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as log:
            log.write(encode_json(record) + b"\n")


def spool_segments(directory: str) -> "List[Tuple[str, int]]":
    """List the spool's segments as (path, bytes), oldest first."""
    segments = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    for name in names:
        if name.endswith((".jsonl", ".taken")):
            try:
                segments.append((f"{directory}/{name}", os.path.getsize(f"{directory}/{name}")))
            except FileNotFoundError:
                continue  # drained since it was listed
    return segments


def segment_start_ms(path: str) -> int:
    """Return the time in a segment's name; 0, the oldest of all, when the name is not ours."""
    start = path.rpartition("/")[2].partition("-")[0]
    return int(start) if start.isdigit() else 0


def take_segment(path: str) -> str:
    """Take one segment away from its writers and return its new path; after this nobody writes to it.

    Raises BlockingIOError while a writer that opened it under its old name is not done: try again later.
    """
    import fcntl

    taken = path if path.endswith(".taken") else path[: -len(".jsonl")] + ".taken"
    if taken != path:
        os.rename(path, taken)
    fd = os.open(taken, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
    return taken


def take_dropped(directory: str) -> "Tuple[int, int]":
    """Return how many (events, bytes) the spool has had to drop since the last call, and forget them."""
    path, taken = directory + "/dropped.log", directory + "/dropped.taken"
    events = size = 0
    try:
        if not os.path.exists(taken):
            os.rename(path, taken)
        with open(taken, "rb") as file:
            for line in file:
                try:
                    record = parse_event_line(line)
                    events += int(record.get("events", 0))
                    size += int(record.get("bytes", 0))
                except (MalformedEvent, TypeError, ValueError):
                    continue  # a line torn by a full disk counts as nothing
        os.unlink(taken)
    except FileNotFoundError:
        pass
    return events, size
