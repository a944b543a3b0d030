#!/usr/bin/env python3
"""Hand one Claude Code hook event to the Contextuate Monitor, unnoticed.

As a program it is a hook: Claude Code starts it for every event with one JSON object on standard input.
It exits with 0 whatever happens, writes nothing to standard output, and waits for the monitor's
acknowledgement for at most 250 ms; an event that nobody acknowledged goes to the spool, where the monitor
finds it. `CONTEXTUATE_DEBUG=1` makes it tell on standard error what it did.

With many machines (mode "redis") the event goes to the spool at once, and a publisher, one for each user,
takes it from there to Redis: this same file, started by a hook that finds none running, gone after 60 s of
quiet.

As a module it is what hook and monitor share: configuration, event model, redaction, token usage, spool and
publisher.

The interpreter compiles a script anew at each start, so the hot path comes first and needs none of the rest:
`contextuate_monitor.py install` puts the text above the line "end of the hot path" into a module of its own,
which a launcher of a few lines imports from its bytecode, and this whole file beside it for the rare paths.
Registered as it is, this file works too; a hook call then takes several times as long.
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
    notes: list[str] = []
    try:
        import _signal

        # A hook of StopFailure is told to stop 40 ms after its start (print mode).
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_IGN)
        payload = read_payload(0, time.monotonic() + STDIN_DEADLINE_S)
        if payload:
            deliver(payload, notes)
        else:
            notes.append("nothing on standard input")
            whole().log_failure("no hook payload on standard input")
    except BaseException as error:  # a hook that fails loudly blocks Claude, so nothing may get out
        reason = f"{type(error).__name__}: {error}"  # names the file, which repr does not
        notes.append(f"failed: {reason}")
        try:
            whole().log_failure(reason)
        except BaseException as second:  # e.g. a full disk: there is no place left to tell it
            notes.append(f"and could not log it: {second!r}")
    if debugging():
        try:
            posix.write(2, "".join(f"contextuate: {note}\n" for note in notes).encode("utf-8", "replace"))
        except OSError:
            pass
    posix._exit(0)


def debugging() -> bool:
    """True when CONTEXTUATE_DEBUG asks for notes on standard error."""
    return posix.environ.get(b"CONTEXTUATE_DEBUG", b"") not in (b"", b"0")


def read_payload(fd: int, deadline: float) -> bytes:
    """Read one JSON object from `fd`, stripped; what came by `deadline` (time.monotonic) if it never ends.

    Ends at EOF, at the newline of a one-line object, or when the object is whole and nothing follows: old
    clients send no newline and a pipe may be held open by others.
    """
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN | select.POLLHUP)
    chunks: list[bytes] = []
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
    environ: dict[bytes, bytes] = posix.environ
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
    if mode == "redis":
        notes.append(ensure_publisher(home))
        if debugging():
            notes.extend(whole().publisher_outcome(home, line))


def places(environ: "dict[bytes, bytes]") -> "tuple[str, str]":
    """Return our directory (CONTEXTUATE_HOME) and the configuration file's path (CONTEXTUATE_CONFIG).

    Where HOME is another user's, as after `sudo`, it is not used: files of root in it would stop its owner.
    """
    # An installed hook belongs to the directory that it is installed in.
    home = environ.get(b"CONTEXTUATE_HOME", b"").decode("utf-8", "surrogateescape")
    folder = __file__.rpartition("/")[0]
    if not home and folder.endswith("/hooks/lib"):
        home = folder[: -len("/hooks/lib")]
    user_home = environ.get(b"HOME", b"").decode("utf-8", "surrogateescape")
    if home[:2] == "~/":  # of a file of settings, where no shell expands it
        home = user_home + home[1:]
    try:
        is_ours = posix.stat(home or user_home).st_uid == posix.getuid()
    except OSError:
        is_ours = (home or user_home) != ""
    if not is_ours:
        import pwd

        home, user_home = "", pwd.getpwuid(posix.getuid()).pw_dir
    home = home or user_home + "/.contextuate"
    config = environ.get(b"CONTEXTUATE_CONFIG", b"").decode("utf-8", "surrogateescape")
    if config[:2] == "~/":
        config = user_home + config[1:]
    return home, config or home + "/monitor.config.json"


def hook_settings(home: str, config_path: str) -> "tuple[str, str]":
    """Return (mode, socket path); a derived file for this very configuration spares parsing JSON."""
    try:
        about = posix.stat(config_path)
    except OSError:
        return "local", DEFAULT_SOCKET_PATH
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}"
    try:
        fd = posix.open(home + "/hook.cache", posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
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
    """Return the user id of a Unix socket's other end; -1 if unknown."""
    if sys.platform == "linux":  # SOL_SOCKET, SO_PEERCRED: struct ucred {pid, uid, gid}
        credentials = connection.getsockopt(1, 17, 12)
    else:  # macOS SOL_LOCAL, LOCAL_PEERCRED: struct xucred {version, uid, …}
        credentials = connection.getsockopt(0, 1, 76)
    return int.from_bytes(credentials[4:8], sys.byteorder) if len(credentials) >= 8 else -1


def append_to_spool(directory: str, line: bytes) -> str:
    """Append `line` to the newest segment of the spool and return the segment's path.

    Safe with any number of writers and one drainer: a writer holds a shared lock on the segment while it
    writes, and writes only when the locked file still has its name; the drainer renames a segment first and
    then asks for the exclusive lock, after which nobody can be writing to it. Nobody waits for a lock, so a
    writer that was stopped holds up no other. No segment is begun under a name that was taken: what has it
    may still wait to be read. A line begins with a newline of its own, so what a full disk or a kill tore
    stands alone.
    """
    import fcntl

    pass_over = False  # the newest segment, which is not ours
    for _ in range(1000):
        path, is_new = current_segment(directory, pass_over)
        flags = posix.O_WRONLY | posix.O_APPEND | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK
        try:
            fd = posix.open(path, flags | posix.O_CREAT | posix.O_EXCL if is_new else flags, 0o600)
        except FileNotFoundError:
            continue  # the drainer has just taken it
        except OSError:
            if is_new:
                raise
            pass_over = True
            continue
        try:
            about = posix.fstat(fd)
            if about.st_mode & 0o170000 != 0o100000 or about.st_uid != posix.getuid():
                pass_over = True
                continue
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if posix.stat(path).st_ino != about.st_ino:
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


def current_segment(directory: str, pass_over: bool = False) -> "tuple[str, bool]":
    """Return the path of the segment to append to, and whether it is new: the newest is full or a day old.

    `pass_over` begins a new one in any case.

    Segments are read in the order of their names, so a new one never has the time of one that is there, also
    when the clock was set back since.
    """
    now_ms = time.time_ns() // 1_000_000
    try:
        names = [name for name in posix.listdir(directory) if name.endswith((".jsonl", ".taken"))]
    except OSError:
        whole().make_spool(directory)
        names = []
    if not names:
        return new_segment(directory, now_ms), True
    newest = max(names)
    started = newest.partition("-")[0]
    age_ms = now_ms - int(started) if started.isdigit() else SEGMENT_LIMIT_MS
    if newest.endswith(".jsonl") and not pass_over:
        path = f"{directory}/{newest}"
        try:
            if age_ms < SEGMENT_LIMIT_MS and posix.stat(path).st_size < SEGMENT_LIMIT_BYTES:
                return path, False
        except OSError:
            pass  # taken by the drainer since it was listed
        whole().drop_old_segments(directory)
    return new_segment(directory, max(now_ms, now_ms - age_ms + 1)), True


def new_segment(directory: str, start_ms: int) -> str:
    """Return a new segment's path."""
    return f"{directory}/{start_ms:013d}-{posix.urandom(4).hex()}.jsonl"


def ensure_publisher(home: str) -> str:
    """Start a publisher unless one runs for `home`; return in words what was done. After an append only.

    Whoever holds the lock on publisher.lock publishes. The new publisher inherits the locked file, so there
    is no moment in which a second hook could start another.
    """
    import fcntl

    path = home + "/publisher.lock"
    flags = posix.O_RDWR | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW
    try:
        fd = posix.open(path, flags, 0o600)
    except OSError:
        whole().set_aside(path)
        fd = posix.open(path, flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        posix.set_inheritable(fd, True)
        python = publisher_python(home)
        pid = posix.posix_spawn(
            python,
            [python, "-E", (__file__.rpartition("/")[0] or ".") + "/emit_event.py", "--publish", str(fd)],
            posix.environ,
            file_actions=[
                (posix.POSIX_SPAWN_OPEN, 0, "/dev/null", posix.O_RDONLY, 0),
                (posix.POSIX_SPAWN_OPEN, 1, "/dev/null", posix.O_WRONLY, 0),
                (posix.POSIX_SPAWN_OPEN, 2, "/dev/null", posix.O_WRONLY, 0),
            ],
            setsid=True,
        )
        return f"publisher started, process {pid}"
    except BlockingIOError:
        return "a publisher runs already"
    finally:
        posix.close(fd)


def publisher_python(home: str) -> str:
    """Return the interpreter that `install` or `start` found to have redis-py; without one the hook's own."""
    try:
        fd = posix.open(home + "/hooks/publisher-python", posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    except OSError:
        return sys.executable
    try:
        return posix.read(fd, 4096).decode("utf-8", "surrogateescape").partition("\n")[0] or sys.executable
    finally:
        posix.close(fd)


def whole() -> "Any":
    """Import the whole of this file, for what is too rare to be compiled at every call."""
    here = __file__.rpartition("/")[0] or "."
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    import emit_event

    return emit_event


if __name__ == "__main__":
    if sys.argv[1:2] == ["--publish"]:
        whole().run_publisher(int(sys.argv[2]))
    else:
        run_hook()

# --- end of the hot path ---

import collections  # noqa: E402 - the hot path above must not pay for these
import contextlib  # noqa: E402
import difflib  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import inspect  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import pwd  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import signal  # noqa: E402
import stat  # noqa: E402
import threading  # noqa: E402
import urllib.parse  # noqa: E402
import uuid  # noqa: E402
from collections.abc import Iterable, Iterator, Sequence  # noqa: E402
from typing import Any, Callable, NamedTuple, Optional  # noqa: E402

JsonObject = dict[str, Any]

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


# ---------------------------------------------------------------------------
# Common ground: the time, numbers, and files of our own
#
# Every file of ours is for this user only, never written through a link, and replaced whole or appended to.
# ---------------------------------------------------------------------------

EMIT_LOG_LIMIT_BYTES = 256 << 10


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def is_number(value: Any) -> bool:
    """True for a number in JSON; for Python, true and false are numbers too."""
    return type(value) in (int, float)


def is_integer(value: Any) -> bool:
    """True for an integer in JSON."""
    return type(value) is int


def make_private_directory(path: str) -> None:
    """Make `path` and its parents, for this user only; raise OSError where something else is in its place."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    about = os.lstat(path)
    if not os.path.isdir(path) or about.st_uid != os.getuid():
        raise PermissionError(f"{path} is not a directory of this user")
    if about.st_mode & 0o077:
        os.chmod(path, 0o700)


def make_spool(path: str) -> None:
    """Make the directory of the spool; set aside what is in its place."""
    try:
        make_private_directory(path)
    except (PermissionError, FileExistsError):
        set_aside(path)
        make_private_directory(path)


def set_aside(path: str) -> None:
    """Rename what is in the place of a file of ours, so that one can be made; `foreign_files` lists it.

    In a directory of ours only, where nothing else belongs; raises PermissionError elsewhere.
    """
    if os.stat(os.path.dirname(path)).st_uid != os.getuid():
        raise PermissionError(f"{path} is not this user's")
    os.rename(path, f"{path}.{os.urandom(4).hex()}.foreign")


def foreign_files(home: str) -> "list[tuple[str, str, str]]":
    """Return (path, owner, command that mends it) of what lies in our directories and is of no use."""
    found = []
    for directory in (home, home + "/spool", home + "/events", home + "/hooks"):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                is_useless = stat.S_ISFIFO(about.st_mode) or entry.name.endswith(".foreign")
                if about.st_uid != os.getuid() or is_useless:
                    command = "rm -r" if is_useless else f"chown {user_name(os.getuid())}"
                    command = f"sudo {command} {shlex.quote(entry.path)}"
                    found.append((entry.path, user_name(about.st_uid), command))
    return found


def user_name(uid: int) -> str:
    """Return the name of a user; its number where it has none, as in many containers."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def open_own(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of this user, and nothing else: a FIFO would wait; raise OSError.

    For `open` as its opener, too.
    """
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    about = os.fstat(fd)
    if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid():
        return fd
    os.close(fd)
    raise PermissionError(errno.EPERM, "it is not a regular file of this user", path)


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


def open_for_append(path: str, _flags: int = 0) -> int:
    """Open a file of ours to add to its end, made when there is none; `open` takes this as its opener."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        return open_own(path, flags)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENOENT):
            raise
        set_aside(path)
        return open_own(path, flags)


def append_bounded(path: str, content: bytes, limit_bytes: int) -> None:
    """Add to a file that is moved aside once it is beyond its limit, so two exist at most."""
    if os.path.exists(path) and os.path.getsize(path) > limit_bytes:
        os.replace(path, path + ".1")
    with os.fdopen(open_for_append(path), "wb") as file:
        file.write(content)


def log_failure(reason: str) -> None:
    """Add one line to emit.log in our directory."""
    home = places(os.environb)[0]  # type: ignore[arg-type]
    make_private_directory(home)
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {os.getpid()} {reason}\n"
    append_bounded(home + "/emit.log", line.encode("utf-8", "backslashreplace"), EMIT_LOG_LIMIT_BYTES)


# ---------------------------------------------------------------------------
# Config: one table of keys, read from one file
#
# Knows: what every key must look like. Does not know: what the values are used for.
# ---------------------------------------------------------------------------

PRICE_NAMES = ("input", "output", "cacheRead", "cacheWrite5m", "cacheWrite1h")


class ConfigError(Exception):
    """A configuration that cannot be used; the message names file, key and what was expected."""


class Key(NamedTuple):
    """One configuration key: its default, a check, and the check in words."""

    default: Any
    expected: str
    accepts: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _integer(default: Optional[int], low: int, high: int, null: str = "", about_low: str = "") -> Key:
    """Describe an integer; `null` says what null means where it is allowed."""
    expected = f"an integer from {low}{about_low} to {high}" + (f", or null ({null})" if null else "")
    return Key(
        default,
        expected,
        lambda value: (value is None and null != "") or (is_integer(value) and low <= value <= high),
    )


def _one_of(*choices: str) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _flag(default: bool) -> Key:
    return Key(default, "true or false", lambda value: isinstance(value, bool))


def _optional_text(what: str) -> Key:
    return Key(None, f"null or {what}", _optional(_text))


def host_and_port(node: str, default_port: int) -> "tuple[str, int]":
    """Split "host", "host:port" or "[IPv6]:port"; raise ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/@\s]+))(?::([0-9]{1,5}))?", node)
    if match is None or not 0 < int(match[3] or default_port) < 65536:
        raise ValueError(f"not host:port: {node}")
    return match[1] or match[2], int(match[3] or default_port)


def _nodes(value: Any) -> bool:
    try:
        return isinstance(value, list) and all(_text(node) and host_and_port(node, 1) for node in value)
    except ValueError:
        return False


def _redis_url(value: Any) -> bool:
    """True when an address means what it looks like; a "/" or "#" in a password would end it early."""
    try:
        parts = urllib.parse.urlsplit(value if _text(value) else "")
        port_is_good = parts.port is None or parts.port > 0
    except ValueError:
        return False
    if parts.scheme == "unix":
        return parts.path.startswith("/") and not parts.fragment
    path_is_good = re.fullmatch(r"(?:/\d{0,5})?", parts.path) is not None
    return parts.scheme in ("redis", "rediss") and port_is_good and path_is_good and not parts.fragment


def _prices(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _text(name)
        and isinstance(price, dict)
        and {"input", "output"} <= price.keys() <= set(PRICE_NAMES)
        and all(is_number(amount) and 0 <= amount <= 1e6 for amount in price.values())
        for name, price in value.items()
    )


KEYS: dict[str, Key] = {
    "mode": Key("local", '"local" or "redis"', _one_of("local", "redis")),
    "socketPath": Key(
        DEFAULT_SOCKET_PATH,
        "an absolute path of at most 100 bytes",
        lambda value: _text(value) and value.startswith("/") and len(os.fsencode(value)) <= 100,
    ),
    "server.host": Key("127.0.0.1", "a host name or an IP address", _text),
    "server.port": _integer(3847, 0, 65535, about_low=" (any free port)"),
    "server.wsPort": _integer(3848, 0, 65535, about_low=" (any free port)"),
    "server.allowedHosts": Key(
        [], "a list of host names", lambda value: isinstance(value, list) and all(map(_text, value))
    ),
    "server.auth": Key("auto", '"auto", "token" or "off"', _one_of("auto", "token", "off")),
    "redis.url": Key(
        None,
        "null or redis://[user[:password]@]host[:port][/db], rediss://… or unix://path, special characters "
        "of a password percent-encoded",
        _optional(_redis_url),
    ),
    "redis.host": Key("localhost", "a host name or an IP address", _text),
    "redis.port": _integer(6379, 1, 65535),
    "redis.username": _optional_text("a user name"),
    "redis.password": _optional_text("a string"),
    "redis.db": _integer(0, 0, 65535),
    "redis.channel": Key(
        "contextuate:events",
        "a name of at most 200 characters",
        lambda value: _text(value) and len(value) <= 200,
    ),
    "redis.tls": _flag(False),
    "redis.verify": _flag(True),
    "redis.caFile": _optional_text("a path"),
    "redis.certFile": _optional_text("a path"),
    "redis.keyFile": _optional_text("a path"),
    "redis.sentinels": Key([], 'a list of "host:port" (26379 is the default port)', _nodes),
    "redis.master": Key("mymaster", "the name that the sentinels have for the primary", _text),
    "redis.sentinelPassword": _optional_text("a string"),
    "redis.cluster": Key(
        False,
        'true (redis.host is a node of a cluster), false, or a list of its nodes as "host:port"',
        lambda value: isinstance(value, bool) or (_nodes(value) and value != []),
    ),
    "redis.streamMaxLength": _integer(10_000, 0, 10_000_000, about_low=" (no stream)"),
    "redis.maxRetries": _integer(10, 1, 1_000_000, "for ever"),
    "persistence.enabled": _flag(True),
    "persistence.type": Key(
        "file", '"file" (events are kept in plain files; nothing else is offered)', _one_of("file")
    ),
    "limits.fieldBytes": _integer(1 << 20, 1024, 8 << 20),
    "limits.connections": _integer(256, 1, 10_000),
    "limits.clientQueueBytes": _integer(1 << 20, 1 << 16, 64 << 20),
    "sessions.quietSeconds": _integer(120, 5, 86_400),
    "sessions.endedHours": _integer(12, 1, 720),
    "retention.days": _integer(30, 1, 36_500, "for ever"),
    "retention.maxMegabytes": _integer(2048, 16, 10**9, "no limit"),
    "privacy.redact": _flag(True),
    "privacy.level": Key("full", '"full" or "metadata"', _one_of("full", "metadata")),
    "prices": Key(
        {},
        'an object of models in USD per million tokens, such as {"opus-4-5": {"input": 5, "output": 25}},'
        ' each with or without "cacheRead", "cacheWrite5m" and "cacheWrite1h"',
        _prices,
    ),
}
NO_LONGER_USED = ("retention.compressAfterDays",)
# Never shown: not in errors, logs, /api/config or on a command line.
SECRET_KEYS = ("redis.password", "redis.url", "redis.sentinelPassword")
REDIS_FIELD_BYTES = 64 << 10  # the default of limits.fieldBytes where every event crosses a network

_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.S)
_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.S)


def parse_relaxed_json(text: str) -> Any:
    """Parse JSON with `//`, `#` and `/* */` comments and trailing commas; raise ValueError with the line."""

    def blank(match: "re.Match[str]") -> str:
        token = match.group()
        return token if token.startswith('"') else re.sub(r"[^\n]", " ", token)

    return json.loads(_TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text)))


def load_config(path: str) -> "tuple[dict[str, Any], list[str]]":
    """Read the configuration at `path`.

    Returns every key of KEYS with its value, and warnings in words. A missing file means defaults.
    Raises ConfigError for what cannot be used.
    """
    given, readable_by_others = _read_config(path)
    values, warnings = default_values(), []
    said: JsonObject = {}
    for name, value in given.items():
        if not any(key.startswith(name + ".") for key in KEYS):
            said[name] = value
        elif isinstance(value, dict):
            said.update((f"{name}.{inner}", inner_value) for inner, inner_value in value.items())
        else:
            raise ConfigError(f"{path}: {name}: expected an object, got {_shown(value)}")
    for name, value in said.items():
        if name in NO_LONGER_USED:
            warnings.append(f"{path}: {name} is no longer used; remove it")
        elif name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"{path}: {name}: unknown key, ignored{hint}")
        elif KEYS[name].accepts(value):
            values[name] = value
        else:
            shown = "something else" if name in SECRET_KEYS else _shown(value)
            raise ConfigError(f"{path}: {name}: expected {KEYS[name].expected}, got {shown}")
    if values["mode"] == "redis" and "limits.fieldBytes" not in said:
        values["limits.fieldBytes"] = REDIS_FIELD_BYTES
    if values["redis.tls"] is False and any(said.get(f"redis.{name}File") for name in ("ca", "cert", "key")):
        warnings.append(f"{path}: redis.tls: is false, so the certificate files are not used")
    if values["redis.sentinels"] and values["redis.cluster"]:
        raise ConfigError(f"{path}: redis.sentinels and redis.cluster cannot both be used; remove one")
    secrets = values["redis.password"], values["redis.sentinelPassword"], "@" in (values["redis.url"] or "")
    if readable_by_others and any(secrets):
        warnings.append(f"{path}: holds a password that others can read; run: chmod 600 {path}")
    return values, warnings


def default_values() -> "dict[str, Any]":
    """Return every key of KEYS with its default."""
    return {name: key.default for name, key in KEYS.items()}


def _read_config(path: str) -> "tuple[JsonObject, bool]":
    """Return what the file says, and whether other users can read it."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
            readable_by_others = os.fstat(file.fileno()).st_mode & 0o077 != 0
        given = parse_relaxed_json(text) if text.strip() else {}
    except FileNotFoundError:
        return {}, False
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {_shown(given)}")
    return given, readable_by_others


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def derive_hook_settings(home: str, config_path: str, key: str) -> "tuple[str, str]":
    """Read mode and socket path from the configuration and leave them for the next hooks in hook.cache.

    `key` names the configuration file's device, inode, size and time; the derived file is valid for it alone.
    An unusable configuration means defaults: the monitor is the one to complain.
    """
    try:
        values = load_config(config_path)[0]
        mode, socket_path = values["mode"], values["socketPath"]
    except ConfigError as error:  # not remembered either, so that every call complains until it is mended
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
    "SessionStart": "session_start", "SessionEnd": "session_end", "UserPromptSubmit": "user_prompt",
    "PreToolUse": "tool_call", "PostToolUse": "tool_result", "PostToolUseFailure": "tool_error",
    "SubagentStart": "subagent_start", "SubagentStop": "subagent_stop",
    "Stop": "turn_end", "StopFailure": "turn_error", "Notification": "notification",
    "PermissionRequest": "permission_request", "PermissionDenied": "permission_denied",
    "Elicitation": "elicitation", "ElicitationResult": "elicitation_result",
    "PreCompact": "pre_compact", "PostCompact": "post_compact",
    "TaskCreated": "task_created", "TaskCompleted": "task_completed", "Monitor": "session_meta",
}  # fmt: skip

# Payload field → name in `data`. Where two lead to one name the first present wins, the other keeps its own.
DATA_NAMES = {
    "tool_name": "toolName", "tool_input": "toolInput", "tool_use_id": "toolUseId",
    "tool_response": "toolOutput", "tool_output": "toolOutput",
    "message": "message", "prompt": "message", "last_assistant_message": "assistantResponse",
    "error": "error", "model": "model", "source": "source", "reason": "reason",
    "transcript_path": "transcriptPath", "duration_ms": "durationMs", "permission_mode": "permissionMode",
    "notification_type": "notificationType",
}  # fmt: skip

# What a payload says about its event; a value that does not fit there is content.
_ABOUT_EVENT = {
    "session_id": "sessionId", "cwd": "workingDirectory", "agent_id": "agentId",
    "agent_type": "agentType",  # without agent_id it is the type of an `--agent` session's main thread
}  # fmt: skip
# None: not in `data`
_PLACES: dict[str, Optional[str]] = {**DATA_NAMES, **dict.fromkeys((*_ABOUT_EVENT, "hook_event_name"))}
# Of an event, not of the wrapper around a payload: where one has it all the same, it is content.
_SAID_BY_HOOK = frozenset(("agentId", "agentType", "workingDirectory", "hookType", "eventType", "data"))
_NOT_OF_WRAPPER = frozenset(("hook", "seq", "received"))  # the last two are assigned by the store
_ID_LIMIT = 256


class MalformedEvent(ValueError):
    """What came is not one JSON object."""


_parse_json = json.JSONDecoder(parse_constant=str).raw_decode
_encoder = functools.partial(json.JSONEncoder, separators=(",", ":"), allow_nan=False, check_circular=False)
_to_json, _to_plain_json = _encoder().encode, _encoder(ensure_ascii=False).encode


def parse_event_line(line: bytes) -> JsonObject:
    """Parse one line into a JSON object; raise MalformedEvent with the reason for anything else.

    Bytes that are not UTF-8 are replaced, NaN and infinities become strings: the event is kept all the same.
    """
    try:
        text = line.decode("utf-8", "replace")
        try:
            value, end = _parse_json(text)
            if end < len(text) and text[end:].strip(" \t\r\n"):
                raise ValueError("Extra data")
        except ValueError:  # perhaps only for space before it, or an integer longer than Python converts
            value = json.loads(
                text, parse_constant=str, parse_int=lambda digits: digits if digits[4000:] else int(digits)
            )
    except RecursionError:
        raise MalformedEvent("nested too deeply") from None
    except ValueError as error:
        raise MalformedEvent(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedEvent(f"one JSON object was expected, not {type(value).__name__}")
    return value


def is_json_object(data: bytes) -> bool:
    """True if `data` is one whole JSON object."""
    try:
        parse_event_line(data)
    except MalformedEvent:
        return False
    return True


def encode_json(value: Any) -> bytes:
    """Encode to one line of compact ASCII JSON: lone surrogates stay escaped, infinities become strings."""
    try:
        return _to_json(value).encode("ascii")
    except ValueError:
        return _to_json(_finite(value)).encode("ascii")


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
    hook, event_type = given.get("hook"), given.get("eventType")
    if isinstance(hook, dict) and isinstance(given.get("id"), str) and not isinstance(event_type, str):
        return _event_from_hook(hook, given, received_ms, machine_id)
    if isinstance(given.get("hook_event_name"), str):
        return _event_from_hook(given, {}, received_ms, machine_id)
    if isinstance(event_type, str):
        return _event_from_event(dict(given), received_ms, machine_id)
    return _event({}, received_ms, machine_id, "", "message", dict(given))


def _event_from_hook(hook: JsonObject, wrapper: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    data: JsonObject = {}
    for field, value in hook.items():
        place = _PLACES.get(field, field)
        if place in data:
            data = _data_of_clashing(hook)
            break
        if place is not None:
            data[place] = value
    about: JsonObject = {}
    for name, value in wrapper.items():
        if name in _SAID_BY_HOOK:
            _keep(data, name, value)
        elif name not in _NOT_OF_WRAPPER:
            about["workingDirectory" if name == "cwd" else name] = value
    for field, name in _ABOUT_EVENT.items():
        if field in hook:
            value = hook[field]
            if _EVENT_CHECKS[name](value) and (name != "agentType" or "agentId" in about):
                about[name] = value
            else:
                _keep(data, field, value)
    hook_type = hook.get("hook_event_name")
    if not isinstance(hook_type, str):
        if hook_type is not None:
            _keep(data, "hook_event_name", hook_type)
        hook_type = ""
    return _event(about, received_ms, machine_id, hook_type, EVENT_TYPES.get(hook_type, "message"), data)


def _data_of_clashing(hook: JsonObject) -> JsonObject:
    """Return the `data` of a payload of which two fields lead to one name: the first in DATA_NAMES has it."""
    data: JsonObject = {}
    for field in (*DATA_NAMES, *(field for field in hook if field not in _PLACES)):
        if field in hook:
            name = DATA_NAMES.get(field, field)
            _keep(data, field if name in data else name, hook[field])
    return data


def _event_from_event(rest: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    content, hook_type, event_type = rest.pop("data", None), rest.pop("hookType", ""), rest.pop("eventType")
    data = dict(content) if isinstance(content, dict) else {} if content is None else {"data": content}
    if "tool_output" in data and "toolOutput" not in data:
        data["toolOutput"] = data.pop("tool_output")
    if not isinstance(hook_type, str):
        _keep(data, "hookType", hook_type)
        hook_type = ""
    for assigned in ("seq", "received"):
        rest.pop(assigned, None)
    return _event(rest, received_ms, machine_id, hook_type, event_type, data)


def _event(
    about: JsonObject, received_ms: int, machine_id: str, hook_type: str, event_type: str, data: JsonObject
) -> JsonObject:
    """Put the fields of an event together; what has a wrong type moves into `data` under its own name."""
    event: JsonObject = {
        "id": "", "timestamp": received_ms, "sessionId": "unknown", "machineId": machine_id,
        "workingDirectory": "", "hookType": hook_type, "eventType": event_type,
    }  # fmt: skip
    for name, value in about.items():
        check = _EVENT_CHECKS.get(name)
        if check is None or check(value):
            event[name] = value
        elif value is not None:
            _keep(data, name, value)
    event["id"] = event["id"] or str(uuid.uuid4())
    event["timestamp"] = int(event["timestamp"])
    event["data"] = data
    return event


def _keep(data: JsonObject, name: str, value: Any) -> None:
    """Put a value into `data` under its name, or one like it where the name is taken."""
    while name in data:
        name += "_"
    data[name] = value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _ID_LIMIT


def _is_pid(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


_EVENT_CHECKS: dict[str, Callable[[Any], bool]] = {
    "id": _is_id, "timestamp": lambda value: type(value) in (int, float) and 0 < value < 1e14,
    "sessionId": _is_id, "machineId": _is_id, "workingDirectory": _is_text,
    "agentId": _is_id, "agentType": _is_text, "parentSessionId": _is_id, "pid": _is_pid,
}  # fmt: skip
_REQUIRED_FIELDS = frozenset(
    ("id", "timestamp", "sessionId", "machineId", "workingDirectory", "hookType", "eventType", "data")
)
_EVENT_FIELDS = _REQUIRED_FIELDS.union(_EVENT_CHECKS, ("demo",))


def is_whole_event(event: JsonObject) -> bool:
    """True when every field of an event is there and of its type."""
    for name, check in _EVENT_CHECKS.items():
        if name in event and not check(event[name]):
            return False
    return (
        event.keys() >= _REQUIRED_FIELDS
        and isinstance(event["data"], dict)
        and type(event["hookType"]) is type(event["eventType"]) is str
    )


def this_machine() -> str:
    """Return this machine's name: CONTEXTUATE_MACHINE_ID, else the host name."""
    return os.environ.get("CONTEXTUATE_MACHINE_ID") or os.uname().nodename or "unknown"


# ---------------------------------------------------------------------------
# Redaction: secrets out, long fields cut, before an event is stored or sent on
#
# Knows: what secrets look like. Best effort: a secret of a shape that nobody described stays.
# ---------------------------------------------------------------------------


class SecretShape(NamedTuple):
    """One kind of secret: without `hint` in the text there is none, which is quickly seen.

    A hint that is in no harmless text spares the search: "ghp_", not "gh".
    A pattern begins with a fixed text, so that its search is nearly as fast, and it never asks for something
    behind a run of unbounded length that may overlap with the next one: time would grow with the square of
    the text. It also matches where lines stand before and after the text. Its group `secret`, or the whole
    match, is what gets replaced. `folded` ones are matched against
    the text in lower case. `is_secret` looks at what is around a match, where the shape alone says too
    little.
    """

    kind: str
    hint: str
    pattern: "re.Pattern[str]"
    folded: bool = False
    is_secret: "Optional[Callable[[str, re.Match[str]], bool]]" = None


# A value that only says where the secret is, or what type it has.
_REFERS = re.compile(r"\[redacted:|[$%<{]|(?:self|this|os|process|config|settings|env|args|e|t)\.[A-Za-z_]")
_PLACEHOLDER = re.compile(
    r"(?:true|false|none|null|undefined|include|omit|same-origin|required|optional|string|number|boolean|object)$",
    re.I,
)
_TYPE_NAME = re.compile(r"(?:u?int|bytes|float|sha|utf|base|md|[iuf])[-_]?\d+|[A-Z][a-z]+\d+[A-Z]")
_IDENTIFIER = re.compile(r"[A-Za-z_$]+(?:\.[A-Za-z_$][\w$]*)*$")
_SAYS_SECRET = re.compile(r"pass|secret|token|key|credential", re.I)


def _is_assigned_secret(text: str, match: "re.Match[str]") -> bool:
    """True if NAME=value, name: value or "name": "value" gives a secret away and is no code."""
    start = match.start()
    before, first = text[max(0, start - 1) : start], text[start]
    if first in "sStTcC" and before.isalnum() and not (before.islower() and first.isupper()):
        return False  # part of another word
    group = str(match.lastgroup)
    value = text[match.start(group) : match.end(group)]
    if _REFERS.match(value) or _PLACEHOLDER.match(value):
        return False
    digits = sum(map(str.isdigit, value))
    if group == "quoted":
        if match.group("named") or match.group("operator") == "=":
            return " " not in value or not _SAYS_SECRET.search(value)  # "password": "Enter your password"
        return digits > 0 and " " not in value and not _SAYS_SECRET.match(value)
    return _is_bare_secret(text, match, value, digits)


def _is_bare_secret(text: str, match: "re.Match[str]", value: str, digits: int) -> bool:
    named, operator = match.group("named"), match.group("operator")
    after = text[match.end() : match.end() + 1]
    if digits == len(value):
        return digits >= 6
    if named or len(value) < 6 or after in ("(", "<", "`") or "[" in value:
        return False
    if operator == "=":  # `f(token=name, …)`: code; in capitals it is a shell's variable, whatever follows
        return (
            text[match.start() : match.start() + 3].isupper()
            or after not in tuple("),;{}")
            or not _IDENTIFIER.match(value)
        )
    is_expression = "=" in operator and after not in tuple('\r\n\\"') and after
    is_code = is_expression or after in tuple(";{)") or _TYPE_NAME.match(value) or _SAYS_SECRET.match(value)
    return digits > 1 and operator[-1].isspace() and not is_code


def _is_authorization(text: str, match: "re.Match[str]") -> bool:
    """True if a value of `authorization` is one, and not code that makes it or prose on it."""
    value = text[match.start("secret") : match.end("secret")]
    return "(" not in value and not _REFERS.match(value) and not _IDENTIFIER.match(value)


def _token(kind: str, hint: str, rest: str) -> SecretShape:
    """Describe a token that begins with `hint`, in its own case, and not in the middle of a word."""
    head = re.escape(hint)
    return SecretShape(kind, hint, re.compile(rf"{head}(?<!\w{head}){rest}"))


def _folded(kind: str, hint: str, rest: str, is_secret: Any = None) -> SecretShape:
    """Describe a secret that follows `hint` in any case; `rest` is in lower case."""
    return SecretShape(kind, hint, re.compile(re.escape(hint) + rest), True, is_secret)


_QUOTE = r"(?:\\{0,3}[\"'])"  # also in JSON that is a text in JSON
# What follows a name: the operator, then the value in quotes, or as far as a shell, a URL or YAML would read
# it. Only so much of it as it takes to decide: _REST has the rest.
_ASSIGNED = (
    rf"(?P<named>{_QUOTE})?(?P<operator>[ \t]{{0,8}}(?:=(?![=>~])|:(?![:=]))[ \t]{{0,8}})"
    r"(?:\\{0,3}[\"'`](?P<quoted>(?! )(?:[^\"'`\\\r\n]|\\(?![\"'])){6,200})"
    r"|(?P<bare>(?:[^\s\"'`,;&|()<>{}\\]|\\(?![\"'nrt])){4,200}))"
)
_REST = {
    "secret": re.compile(r"[^\s\"',;<>\[\]\\]*"),
    "quoted": re.compile(r"(?:[^\"'`\\\r\n]|\\(?![\"']))*"),
    "bare": re.compile(r"(?:[^\s\"'`,;&|()<>{}\\]|\\(?![\"'nrt]))*"),
}
_KEYS = "|".join(
    f"(?<={word}{gap}key)" for word in ("api", "access", "private", "secret", "auth") for gap in ("", "[_-]")
)
_NAMES = r"(?:pass(?:word|wd|phrase)|secret|token|(?:api|access|private|secret|auth)[_-]?key|credentials?)"


def _assigned(hint: str, rest: str = "") -> SecretShape:
    return _folded("assignment", hint, rest + _ASSIGNED, _is_assigned_secret)


SECRET_SHAPES = (
    SecretShape("private-key", "PRIVATE KEY",
        # one whose end was cut off reaches to the end of the text
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
            r"(?:.*?-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|.*\Z)",
            re.S,
        )),
    _token("anthropic", "sk-ant-", r"[A-Za-z0-9_-]{20,}"),
    _token("openai", "sk-", r"(?!ant-)(?:proj-|svcacct-|admin-)?[A-Za-z0-9_-]{20,}"),
    *(_token("github", f"gh{letter}_", r"[A-Za-z0-9]{30,}") for letter in "pousr"),
    _token("github", "github_pat_", r"[A-Za-z0-9_]{40,}"),
    *(_token("gitlab", f"gl{kind}-", r"[A-Za-z0-9_-]{20,}") for kind in ("pat", "ptt", "dt", "rt")),
    _token("bitbucket", "ATATT3", r"[A-Za-z0-9_=-]{40,}"),
    _token("aws", "AKIA", r"[A-Z2-7]{16}\b"),
    _token("aws", "ASIA", r"[A-Z2-7]{16}\b"),
    _token("google", "AIza", r"[A-Za-z0-9_-]{35}"),
    _token("google", "ya29.", r"[A-Za-z0-9_-]{20,}"),
    _folded("azure", "accountkey=", r"(?P<secret>[a-z0-9+/]{40,}={0,2})"),
    *(_token("digitalocean", f"do{letter}_v1_", r"[a-f0-9]{40,}") for letter in "por"),
    _token("vault", "hvs.", r"[A-Za-z0-9_-]{24,}"),
    _token("docker", "dckr_pat_", r"[A-Za-z0-9_-]{20,}"),
    _token("slack", "xox", r"[abeoprs]-[A-Za-z0-9-]{10,}"),
    _token("slack", "hooks.slack.com/", r"services/(?P<secret>[A-Za-z0-9/]{20,})"),
    _folded("discord", "discord", r"(?:app)?\.com/api/webhooks/(?P<secret>\d{1,30}/[a-z0-9_-]{30,})"),
    SecretShape("telegram", ":AA", re.compile(r":AA(?<=\d{8}:AA)(?P<secret>[A-Za-z0-9_-]{32,})")),
    *(_token("stripe", hint, r"(?:live|test)_[A-Za-z0-9]{16,}") for hint in ("sk_", "rk_", "pk_")),
    _token("stripe", "whsec_", r"[A-Za-z0-9]{16,}"),
    _token("shopify", "shpat_", r"[a-f0-9]{32}"),
    _token("npm", "npm_", r"[A-Za-z0-9]{36}"),
    _token("pypi", "pypi-", r"[A-Za-z0-9_-]{40,}"),
    _token("huggingface", "hf_", r"[A-Za-z0-9]{30,}"),
    _token("groq", "gsk_", r"[A-Za-z0-9]{40,}"),
    _token("xai", "xai-", r"[A-Za-z0-9]{60,}"),
    _token("sendgrid", "SG.", r"[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}"),
    SecretShape("jwt", ".eyJ",
        re.compile(r"eyJ(?<![\w-]eyJ)[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}")),
    _folded("authorization", "authorization",
        rf"(?<!\[redacted:authorization){_QUOTE}?\s{{0,20}}[:=]\s{{0,20}}{_QUOTE}?"
        r"(?:(?:bearer|basic|token|digest)\s{1,20})?(?P<secret>[^\s\"',;<>\[\]\\]{8,200})",
        _is_authorization),
    _folded("authorization", "bearer", r"(?<!\wbearer)\s{1,20}(?P<secret>[a-z0-9._~+/=-]{20,})"),
    _folded("cookie", "cookie",
        rf"{_QUOTE}?: ?{_QUOTE}?(?P<secret>[^\s=;\"'<>:]{{1,100}}=[^\r\n\"'<>\\]{{6,}})"),
    _folded("url-password", "://",
        r"(?<=[a-z0-9+.-]://)[^\s/:@\"'<>]{0,256}:(?P<secret>(?!\[redacted:)[^\s/\"'<>]{1,256})@"),
    *(_assigned(hint) for hint in ("password", "passwd", "passphrase")),
    _assigned("secret"),
    _assigned("token"),
    _assigned("credential", "s?"),
    _assigned("key", f"(?:{_KEYS})"),
    _folded("assignment", "--",
        rf"(?<![\w-]--)(?:[a-z0-9]{{1,20}}-){{0,3}}{_NAMES} {_QUOTE}?"
        r"(?P<secret>(?!\[redacted:)(?=[^\s\"']{0,64}\d)[^\s\"'$<{`]{6,})"),
)  # fmt: skip

SHORTEST_SECRET = 7  # a://:b@
REDACTION_ROUNDS = 8
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:password|passwd|pwd|passphrase|secret|token|api_?key|access_?key|private_?key|secret_?key"
    r"|auth_?key|credentials?|client_?secret|authorization|cookie|set_?cookie|bearer)$"
)
_METADATA_KEYS = frozenset((
    "toolName", "toolUseId", "durationMs", "permissionMode", "source", "reason", "notificationType", "model",
    "usage", "agentMeta", "truncated", "agent_type", "is_interrupt", "prompt_id", "trigger", "action",
    "label", "pinned", "hidden", "parentSessionId",
))  # fmt: skip
_DEPTH_LIMIT = 100
_LATER_BYTES = bytes(range(0x80, 0xC0))  # of a character in UTF-8
CUT_WORDS_BYTES = 80  # room for the words that tell what was cut


@functools.lru_cache(maxsize=4096)
def _names_a_secret(key: str) -> bool:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key[:200]).replace("-", "_").replace(".", "_").lower()
    return _SECRET_KEY.search(snake) is not None


def _replacement(kind: str, secret: str) -> str:
    digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
    return f"[redacted:{kind}:{digest[:8]}]"


_RankedShape = tuple[int, SecretShape]  # its place in SECRET_SHAPES, and the shape
# Hints have these parts in common: a text without the part is not searched for each of them. A part of one
# rare letter is found or missed in a fifth of the time.
_COMMON_PARTS = ("gh", "gl", "pat_", "_v1_", "k_", "i-", "sk-", *"AJSwxz", "ssw", "cre", "key")


def _by_part(folded: bool) -> "list[tuple[str, list[_RankedShape]]]":
    shapes: dict[str, list[_RankedShape]] = {}
    for ranked in enumerate(SECRET_SHAPES):
        hint = ranked[1].hint
        if ranked[1].folded == folded:
            shapes.setdefault(next((part for part in _COMMON_PARTS if part in hint), hint), []).append(ranked)
    return list(shapes.items())


_SHAPES, _FOLDED_SHAPES = _by_part(folded=False), _by_part(folded=True)


def redact_text(text: str, shapes: "Sequence[_RankedShape] | None" = None) -> str:
    """Replace what looks like a secret in `text` by `[redacted:<kind>:<first 8 hex of sha256>]`.

    `shapes` are those that `_shapes_in` found in what `text` is part of. Once more while there was something,
    so that what is redacted already stays as it is: what stood beside a secret may look like one only now.
    """
    for _ in range(REDACTION_ROUNDS):
        if len(text) < SHORTEST_SECRET:
            break
        folded = _folded_text(text)
        if shapes is None:
            shapes = _shapes_in(text, folded)
        else:
            shapes = [each for each in shapes if each[1].hint in (folded if each[1].folded else text)]
        secrets: list[tuple[int, int, int]] = []
        for start, end, rank in sorted(_secrets_in(text, folded, shapes)):
            if secrets and start < secrets[-1][1]:  # they overlap: the shape that is described first names it
                start, last_end, last_rank = secrets.pop()
                end, rank = max(last_end, end), min(last_rank, rank)
            secrets.append((start, end, rank))
        if not secrets:
            break
        pieces: list[str] = []
        done = 0
        for start, end, rank in secrets:
            pieces += text[done:start], _replacement(SECRET_SHAPES[rank].kind, text[start:end])
            done = end
        text = "".join(pieces) + text[done:]
        shapes = None
    return text


def _folded_text(text: str) -> str:
    """Return the text in lower case, each character in its place."""
    if text.isascii():
        return text.lower()
    return text.replace("\u0130", "I").lower()  # the one character whose lower case has another length


def _shapes_in(text: str, folded: str) -> "list[_RankedShape]":
    """Return the shapes of which a secret may be in `text`, or in any part of it: their hints are there."""
    found: list[_RankedShape] = []
    for by_part, searched in ((_SHAPES, text), (_FOLDED_SHAPES, folded)):
        for part, shapes in by_part:
            if part in searched:
                found += [ranked for ranked in shapes if ranked[1].hint in searched]
    return found


def _secrets_in(text: str, folded: str, shapes: "Sequence[_RankedShape]") -> "Iterator[tuple[int, int, int]]":
    """Yield every match of some shapes as (start, end, its shape's place); they may overlap."""
    for rank, shape in shapes:
        searched = folded if shape.folded else text
        match = shape.pattern.search(searched)
        while match is not None:
            end = match.end()
            if shape.is_secret is not None and not shape.is_secret(text, match):
                end = match.start() + len(shape.hint)
            else:
                group = match.lastgroup or 0
                if shape.is_secret is not None:
                    end = _REST[str(group)].match(text, end).end()  # type: ignore[union-attr]  # may be empty
                yield match.start(group), end if shape.is_secret else match.end(group), rank
            match = shape.pattern.search(searched, end)


class Privacy(NamedTuple):
    """What may leave: `redact` replaces secrets, `metadata_only` drops content, longer strings are cut."""

    redact: bool = True
    metadata_only: bool = False
    field_limit_bytes: int = 1 << 20


def protect(event: JsonObject, privacy: Privacy) -> "tuple[JsonObject, bytes]":
    """Return `event` with its `data` redacted and cut as `privacy` says, and its JSON.

    `data.truncated` maps the path of a cut field, such as "toolOutput.stdout", to its original size in bytes.
    """
    try:
        text = _to_plain_json(event)
    except (ValueError, RecursionError):  # infinite or too deep
        return _protect_each_value(event, privacy, None)
    is_plain = text.isascii() and "\x7f" not in text
    is_clean = len(text) <= privacy.field_limit_bytes // 4 and not privacy.metadata_only
    shapes: list[_RankedShape] = []
    if privacy.redact:
        # Few of the many shapes are anywhere in an event, so they are looked for once and not in each of its
        # texts. No hint has a character that JSON must escape.
        searched = text
        if event.keys() <= _EVENT_FIELDS:
            searched = text[max(0, text.find('"data":')) :]  # nothing is taken out of the other fields
        folded = searched.lower() if is_plain else _folded_text(searched)
        shapes = _shapes_in(searched, folded)
        # Every other name of a secret has a hint in it.
        in_doubt = shapes or "pwd" in folded or searched.count("{") + searched.count("[") >= _DEPTH_LIMIT
        is_clean = is_clean and not (in_doubt and _may_have_secrets(event, shapes))
    if is_clean:
        return event, text.encode() if is_plain else encode_json(event)
    return _protect_each_value(event, privacy, shapes)


def _may_have_secrets(event: JsonObject, shapes: "list[_RankedShape]") -> bool:
    """True when a text has one of some shapes, a name is that of a secret, or a value is too deep to look at.

    All texts are searched together, as lines of one: what matches in a text matches there too.
    """
    texts: list[str] = []
    level: list[Any] = [event]
    for _ in range(_DEPTH_LIMIT):
        deeper = []
        for value in level:
            if isinstance(value, dict):
                if any(map(_names_a_secret, value)):
                    return True
                texts += value
                value = value.values()
            for inner in value:
                if isinstance(inner, str):
                    texts.append(inner)
                elif isinstance(inner, (dict, list)):
                    deeper.append(inner)
        if not deeper:
            break
        level = deeper
    else:
        return True
    text = "\n".join(texts)
    folded = _folded_text(text)
    return any(shape.pattern.search(folded if shape.folded else text) for _, shape in shapes)


def _protect_each_value(
    event: JsonObject, privacy: Privacy, shapes: "list[_RankedShape] | None"
) -> "tuple[JsonObject, bytes]":
    data = event["data"]
    if privacy.metadata_only:
        data = {name: value for name, value in data.items() if name in _METADATA_KEYS}
        if event["hookType"] != "SessionEnd":
            data.pop("reason", None)  # of a denial it is prose
    protector = _Protector(privacy, shapes)
    for name in [name for name in event if name not in _EVENT_FIELDS]:
        if privacy.metadata_only:
            del event[name]
        else:
            event[name] = protector.value(event[name], name, name)
    data = protector.value(data, "", "")
    if protector.cuts:
        earlier = data.get("truncated")  # what the hook has cut already keeps its first size
        data["truncated"] = {**protector.cuts, **(earlier if isinstance(earlier, dict) else {})}
    event["data"] = data
    return event, encode_json(event)


class _Protector:
    """Redact and cut the values of one object; `cuts` maps the path of what was cut to its size in bytes.

    `shapes` are those that may be anywhere in the object; None when it was not looked through.
    """

    def __init__(self, privacy: Privacy, shapes: "list[_RankedShape] | None" = None) -> None:
        self.cuts: dict[str, int] = {}
        self._privacy = privacy
        self._shapes = shapes if privacy.redact else []

    def value(self, value: Any, key: str, path: str, depth: int = 0) -> Any:
        """Return a value that stands under `key`, and under `path` from the top, as it may be shown."""
        if isinstance(value, str):
            return self._text(value, key, path)
        if isinstance(value, (dict, list)) and depth >= _DEPTH_LIMIT:
            return self._text(json.dumps(value), key, path)
        if isinstance(value, dict):
            return {
                self._clean(name): self.value(inner, name, f"{path}.{name}" if path else name, depth + 1)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self.value(inner, key, f"{path}[{at}]", depth + 1) for at, inner in enumerate(value)]
        # a small number under such a name counts something; a larger one could be a password or a PIN
        if self._privacy.redact and is_number(value) and abs(value) >= 1000 and _names_a_secret(key):
            return _replacement("key", str(value))
        return value

    def _clean(self, text: str) -> str:
        return text if self._shapes == [] else redact_text(text, self._shapes)

    def _text(self, text: str, key: str, path: str) -> str:
        if self._privacy.redact and text and _names_a_secret(key):
            return text if text.startswith("[redacted:") else _replacement("key", text)
        limit = self._privacy.field_limit_bytes
        if len(text) <= limit // 4:  # a character is at most four bytes
            return self._clean(text)
        size = len(text.encode("utf-8", "surrogatepass"))
        if size <= limit:
            return self._clean(text)
        self.cuts[path] = size
        # What is left is no longer than the limit, with the words in its middle: it is not cut a second time.
        half = max(1, (limit - CUT_WORDS_BYTES) // 2)
        # Redacted with a margin, so that a secret across the cut is seen whole and leaves no half behind. The
        # margin itself never shows, however much shorter what was redacted before it has become.
        margin = 4096
        head = self._clean(text[: half + margin])
        tail = self._clean(text[-half - margin :])
        unseen = margin if half + margin < len(text) else 0
        # No half of a character is left either.
        start = head[: max(0, len(head) - unseen)].encode("utf-8", "surrogatepass")
        end = tail[unseen:].encode("utf-8", "surrogatepass")[-half:].lstrip(_LATER_BYTES)
        if start[half : half + 1].strip(_LATER_BYTES) == b"" and len(start) > half:
            start = start[:half].rstrip(_LATER_BYTES)[:-1]
        head, tail = (part.decode("utf-8", "surrogatepass") for part in (start[:half], end))
        return f"{head}\n[… {size - 2 * half} of {size} bytes cut …]\n{tail}"


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
        protector = _Protector(Privacy(redact=redact, field_limit_bytes=limit))
        hook = protector.value(wrapped["hook"], "", "")
        truncated = {}  # as the fields are called in `data`
        for path, size in protector.cuts.items():
            field, rest = re.match(r"([^.\[]*)(.*)", path, re.S).groups()  # type: ignore[union-attr]
            truncated[DATA_NAMES.get(field, field) + rest] = size
        line = encode_json({**wrapped, "hook": {**hook, "truncated": truncated}}) + b"\n"
        limit //= 4
    if len(line) > LINE_LIMIT_BYTES:
        raise ValueError(f"the payload has {len(line)} bytes and could not be cut to {LINE_LIMIT_BYTES}")
    return line


# ---------------------------------------------------------------------------
# Token usage from transcripts: what each session and agent has used so far
#
# TranscriptParser: bytes in, usage of messages out, no I/O. UsageReader owns usage.db, which knows how far
# each transcript was read and what was counted. A message counts once, by its id, whichever lines and files
# repeat it, so usage.db may be lost at any time: everything is then read again and counts the same.
# UsageWorker: the thread that reads, so that no event waits for a transcript.
# AgentNoteReader: the client's notes on its subagents, which lie beside their transcripts.
# ---------------------------------------------------------------------------

USAGE_HOOKS = frozenset(("Stop", "StopFailure", "SubagentStop", "SessionEnd"))
SYNTHETIC_MODEL = "<synthetic>"  # what the client itself wrote, such as the text of an API error
TRANSCRIPT_CHUNK_BYTES = 256 << 10  # read and counted in one transaction
TRANSCRIPT_LINE_LIMIT_BYTES = 64 << 20
TRANSCRIPTS_LIMIT = 10_000  # files of subagents of one session
COUNTED_MESSAGES_LIMIT = 200_000  # about 25 MB; beyond it the sessions that were read longest ago go
AGENTS_IN_USAGE = 50  # an event names the agents that used tokens last; each has been named before
PENDING_USAGE_LIMIT = 1000  # sessions whose transcripts are still to be read, and whose totals are remembered
USAGE_SCHEMA = 1
_USAGE_FIELDS = ("sessionId", "machineId", "workingDirectory", "timestamp")  # of the event it belongs to
COUNT_NAMES = ("input", "output", "cacheRead", "cacheCreation", "cacheCreation1h")
AGENTS_REMEMBERED = 4096
AGENT_NOTE_LIMIT_BYTES = 64 << 10
_AGENT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_AGENT_NOTE_FIELDS = ("agentType", "toolUseId", "parentAgentId", "requestShape")
_USAGE_TABLES = """
DROP TABLE IF EXISTS sessions;
DROP TABLE IF EXISTS files;
DROP TABLE IF EXISTS messages;
CREATE TABLE sessions (number INTEGER PRIMARY KEY, name TEXT UNIQUE, read_ms INTEGER, model TEXT);
CREATE TABLE files (path TEXT PRIMARY KEY, session INTEGER, device INTEGER, inode INTEGER, position INTEGER,
                    mark BLOB);
CREATE TABLE messages (id BLOB PRIMARY KEY, session INTEGER, agent TEXT, model TEXT, input INTEGER,
                       output INTEGER, cache_read INTEGER, cache_creation INTEGER, cache_creation_1h INTEGER);
CREATE INDEX messages_of_session ON messages (session);
CREATE INDEX files_of_session ON files (session)
"""
# Of several lines of one message the largest numbers are true.
_COUNT_MESSAGE = """
INSERT INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
    input = max(input, excluded.input), output = max(output, excluded.output),
    cache_read = max(cache_read, excluded.cache_read),
    cache_creation = max(cache_creation, excluded.cache_creation),
    cache_creation_1h = max(cache_creation_1h, excluded.cache_creation_1h)
"""


class MessageUsage(NamedTuple):
    """What one message of a model used; `agent_id` "" is the main agent."""

    message_id: str
    agent_id: str
    model: str
    counts: "tuple[int, int, int, int, int]"  # tokens, as in COUNT_NAMES; the last is part of the one before


class TranscriptParser:
    """Find the usage in a transcript that is fed in pieces of any size; a line counts once its end has come.

    `consumed` says how many of the bytes fed so far are done with: the next reader begins there.
    """

    def __init__(self, agent_id: str = "") -> None:
        self.consumed = 0
        self._agent_id = agent_id
        self._begun: list[bytes] = []  # of a line whose end has not come yet

    def feed(self, data: bytes) -> "list[MessageUsage]":
        """Take the next bytes; return the usage in the lines that they complete, one entry a line."""
        head, newline, rest = data.partition(b"\n")
        self._begun.append(head)
        if not newline:
            size = sum(map(len, self._begun))
            if size > TRANSCRIPT_LINE_LIMIT_BYTES:  # given up; what is left of it is no JSON object
                self.consumed += size
                self._begun = []
            return []
        whole_lines, newline, rest = rest.rpartition(b"\n")
        lines = [b"".join(self._begun), *(whole_lines.split(b"\n") if newline else ())]
        self.consumed += sum(len(line) + 1 for line in lines)
        self._begun = [rest]
        return [usage for usage in map(self._usage_of, lines) if usage is not None]

    def _usage_of(self, line: bytes) -> "MessageUsage | None":
        if b'"assistant"' not in line or b'"usage"' not in line:
            return None  # most of a transcript is what tools gave back
        try:
            entry = parse_event_line(line)
        except MalformedEvent:
            return None
        message, agent_id = entry.get("message"), entry.get("agentId")
        if entry.get("type") != "assistant" or not isinstance(message, dict):
            return None
        message_id, model, usage = message.get("id"), message.get("model"), message.get("usage")
        if not _is_id(message_id) or not _is_id(model) or not isinstance(usage, dict):
            return None
        if model == SYNTHETIC_MODEL:
            return None
        by_lifetime = usage.get("cache_creation")
        for_an_hour = by_lifetime.get("ephemeral_1h_input_tokens") if isinstance(by_lifetime, dict) else 0
        input_, output, cache_read, created = (
            _tokens(usage.get(f"{kind}_tokens"))
            for kind in ("input", "output", "cache_read_input", "cache_creation_input")
        )
        counts = (input_, output, cache_read, created, min(created, _tokens(for_an_hour)))
        return MessageUsage(message_id, agent_id if _is_id(agent_id) else self._agent_id, model, counts)  # type: ignore[arg-type]


def _tokens(value: Any) -> int:
    return value if is_integer(value) and 0 <= value < 1 << 40 else 0


class UsageReader:
    """Read transcripts; make events of their own with what the sessions of this machine have used.

    The event of a session holds totals so far, so one that is lost, repeated or late does no harm:
    `{"eventType": "usage", "hookType": "", "sessionId", "machineId", "workingDirectory", "timestamp", "data":
    {"usage": {"models": {model: counts}, "agents": {agent id or "": {model: counts}}, "model": the main
    agent's last, "partial": true when there were too many messages to count}}}`, and `counts` `{"input",
    "output", "cacheRead", "cacheCreation", "cacheCreation1h"?}`.

    It is to be used by one thread and stops early, without a result, once `stopping` is set; what was read
    until then is not read again. A second process is kept out by SQLite's own lock.
    """

    def __init__(self, home: str, machine_id: str, stopping: "threading.Event | None" = None) -> None:
        self._home = home
        self._machine_id = machine_id
        self._stopping = stopping or threading.Event()
        self._database: Any = None  # sqlite3.Connection, once it is needed
        self._delivered: dict[str, int] = {}  # session → hash of the totals in its last event
        self._complaint = ""

    def usage_event(self, event: JsonObject) -> "JsonObject | None":
        """Read on in the transcripts that an event names; return the usage event, None for nothing new."""
        data, session_id = event["data"], event["sessionId"]
        if event["hookType"] not in USAGE_HOOKS or event["machineId"] != self._machine_id:
            return None
        try:
            files = transcripts_of(data.get("transcriptPath"), data.get("agent_transcript_path"))
            usage = self._read(session_id, files) if files else None
        except Exception as error:  # whatever is wrong with a transcript, it costs the usage only
            self._recover(error)
            return None
        key = hash(encode_json(usage))
        if usage is None or self._delivered.get(session_id) == key:
            return None
        self._delivered[session_id] = key
        if len(self._delivered) > PENDING_USAGE_LIMIT:
            del self._delivered[next(iter(self._delivered))]
        about = {name: event[name] for name in _USAGE_FIELDS}
        return {"eventType": "usage", "hookType": "", **about, "data": {"usage": usage}}

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _recover(self, error: Exception) -> None:
        """Log what went wrong, once, and begin a new file when the old one is damaged."""
        complaint, self._complaint = self._complaint, f"token usage could not be read: {error!r}"
        with contextlib.suppress(OSError):
            if self._complaint != complaint:
                log_failure(self._complaint)
        with contextlib.suppress(Exception):  # e.g. a damaged file cannot be closed in order either
            self.close()
        if type(error).__name__ == "DatabaseError":  # sqlite3's own, not one of its kinds: it is no database
            for suffix in ("", "-journal"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._home}/usage.db{suffix}")

    def _open(self) -> Any:
        """Return the open database; a new one when there is none or another version wrote it."""
        import sqlite3

        if self._database is not None:
            return self._database
        make_private_directory(self._home)
        path = self._home + "/usage.db"
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        database = sqlite3.connect(path, timeout=2.0)
        # Nothing waits for the disk: after a loss of power everything can be read again.
        database.execute("PRAGMA synchronous = OFF")
        database.execute("PRAGMA journal_mode = TRUNCATE")
        with database:
            if database.execute("PRAGMA user_version").fetchone()[0] != USAGE_SCHEMA:
                for statement in _USAGE_TABLES.split(";"):
                    database.execute(statement)
                database.execute(f"PRAGMA user_version = {USAGE_SCHEMA}")
        self._database = database
        return database

    def _read(self, session_id: str, files: "list[tuple[str, str]]") -> "JsonObject | None":
        """Read what is new in the files of one session; return its totals, None when there are none."""
        database = self._open()
        find = "SELECT number FROM sessions WHERE name = ?"
        is_known = database.execute(find, (session_id,)).fetchone() is not None
        if not is_known and not any(_stat_own(path) for path, _ in files):
            return None  # nobody here can read them, and nothing need be remembered of that
        with database:
            database.execute(
                "INSERT INTO sessions (name, read_ms) VALUES (?, ?)"
                " ON CONFLICT (name) DO UPDATE SET read_ms = excluded.read_ms",
                (session_id, now_ms()),
            )
            (session,) = database.execute(find, (session_id,)).fetchone()
            (count,) = database.execute("SELECT COUNT(*) FROM messages").fetchone()
            # What was read longest ago is forgotten; a session is read again from its start when it goes on.
            others = "SELECT number FROM sessions WHERE number != ? ORDER BY read_ms, number LIMIT 1"
            while count >= COUNTED_MESSAGES_LIMIT:
                oldest = database.execute(others, (session,)).fetchone()
                if oldest is None:
                    break
                count -= database.execute("DELETE FROM messages WHERE session = ?", oldest).rowcount
                database.execute("DELETE FROM files WHERE session = ?", oldest)
                database.execute("DELETE FROM sessions WHERE number = ?", oldest)
            has_room = count < COUNTED_MESSAGES_LIMIT
        for path, agent_id in files if has_room else ():
            self._read_transcript(session, path, agent_id)
        usage = None if self._stopping.is_set() else _session_usage(database, session)
        return usage if has_room or usage is None else {**usage, "partial": True}

    def _read_transcript(self, session: int, path: str, agent_id: str) -> None:
        """Count what is new in one transcript."""
        seen = _stat_own(path)
        if seen is None:
            return
        find = "SELECT device, inode, position, mark FROM files WHERE path = ?"
        row = self._database.execute(find, (path,)).fetchone()
        # As SQLite can hold them: some file systems use all 64 bits.
        identity = (seen.st_dev & (1 << 63) - 1, seen.st_ino & (1 << 63) - 1)
        start, mark = row[2:] if row and row[:2] == identity and row[2] <= seen.st_size else (0, b"")
        if start and start == seen.st_size:
            return
        try:
            fd = _open_own(path, seen)
        except OSError:
            return  # gone, or not for us
        try:
            if start and mark != _mark(fd, start):
                start = 0  # rewritten in place
            self._count((path, session, *identity), TranscriptParser(agent_id), fd, start)
        finally:
            os.close(fd)

    def _count(self, file: "tuple[Any, ...]", parser: TranscriptParser, fd: int, start: int) -> None:
        """Count the messages from a position of a transcript to its end, a chunk in each transaction.

        `file` is what the first columns of its row hold: path, session, device, inode.
        """
        place, size = start, os.fstat(fd).st_size
        while place < size and not self._stopping.is_set():
            chunk = os.pread(fd, min(TRANSCRIPT_CHUNK_BYTES, size - place), place)
            if not chunk:
                return  # it has become shorter
            place += len(chunk)
            messages = [_message_row(file[1], message) for message in parser.feed(chunk)]
            position = start + parser.consumed
            with self._database:
                self._database.executemany(_COUNT_MESSAGE, messages)
                row = (*file, position, _mark(fd, position))
                self._database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)


class UsageWorker:
    """Read transcripts in a thread of its own, so that no event waits for them, and hand over usage events.

    `put` belongs to the thread that stores events; `deliver` is called from ours and must not raise. What is
    pending at the end is made up for at the next event of its session.
    """

    def __init__(self, home: str, machine_id: str, deliver: "Callable[[JsonObject], Any]") -> None:
        self._deliver = deliver
        self._closing = threading.Event()
        self._reader = UsageReader(home, machine_id, self._closing)
        self._wake = threading.Condition()  # guards _pending
        # (session, an agent's own transcript or "") → what is to be read; stays until it has been read
        self._pending: dict[tuple[str, str], JsonObject] = {}
        self._thread: Optional[threading.Thread] = None  # begins with the first event

    @property
    def is_busy(self) -> bool:
        """True while something is still to be read."""
        return bool(self._pending)

    def put(self, event: JsonObject) -> None:
        """Have the transcripts read that an event names; the newest event of a session takes the place."""
        if event["hookType"] not in USAGE_HOOKS:
            return
        names = ("transcriptPath", "agent_transcript_path")
        paths = {name: path for name in names if _is_transcript_path(path := event["data"].get(name))}
        kept = {**{name: event[name] for name in _USAGE_FIELDS}, "hookType": event["hookType"], "data": paths}
        with self._wake:
            self._pending[event["sessionId"], paths.get("agent_transcript_path", "")] = kept
            if len(self._pending) > PENDING_USAGE_LIMIT:
                del self._pending[next(iter(self._pending))]
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="usage", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """End the thread; it stops within one chunk."""
        self._closing.set()
        with self._wake:
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._pending or self._closing.is_set())
                if self._closing.is_set():
                    break
                key, event = next(iter(self._pending.items()))
            usage = self._reader.usage_event(event)
            if usage is not None:
                self._deliver(usage)
            with self._wake:
                if self._pending.get(key) is event:
                    del self._pending[key]
        self._reader.close()  # SQLite wants it in the thread that opened it


def transcripts_of(main_path: Any, agent_path: Any = None) -> "list[tuple[str, str]]":
    """List a session's transcripts as (path, agent id): the main one, then those of its subagents.

    Subagents write beside the session in older clients, and into `<session>/subagents/` in newer ones.
    """
    if not _is_transcript_path(main_path):
        return []
    found = {main_path: ""}
    folder = main_path[: -len(".jsonl")] + "/subagents"
    try:
        names = sorted(os.listdir(folder)[:TRANSCRIPTS_LIMIT])
    except (OSError, ValueError):
        names = []
    paths = [f"{folder}/{name}" for name in names if name.startswith("agent-")]
    for path in filter(_is_transcript_path, (*paths, agent_path)):
        name = path.rpartition("/")[2]
        found.setdefault(path, name[len("agent-") : -len(".jsonl")] if name.startswith("agent-") else "")
    return list(found.items())


def _is_transcript_path(path: Any) -> bool:
    return isinstance(path, str) and path.startswith("/") and path.endswith(".jsonl") and len(path) <= 4096


def _stat_own(path: str) -> "os.stat_result | None":
    """Look at a file; None unless it is a regular file of this user: its path is what a client said."""
    try:
        about = os.lstat(path)
    except (OSError, ValueError):
        return None
    return about if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid() else None


def _open_own(path: str, seen: os.stat_result) -> int:
    """Open the file that was seen by `_stat_own`; raise OSError when another is in its place."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    if not os.path.samestat(os.fstat(fd), seen):
        os.close(fd)
        raise FileNotFoundError(path)
    return fd


def _mark(fd: int, position: int) -> bytes:
    """Return a hash of the bytes before `position`: it says whether a file still has them."""
    length = min(position, 256)
    return hashlib.blake2b(os.pread(fd, length, position - length), digest_size=8).digest()


def _message_row(session: int, message: MessageUsage) -> "tuple[Any, ...]":
    key = hashlib.blake2b(message.message_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    # SQLite takes no half of a surrogate pair.
    texts = (text.encode("utf-8", "replace").decode() for text in (message.agent_id, message.model))
    return (key, session, *texts, *message.counts)


def _session_usage(database: Any, session: int) -> "JsonObject | None":
    """Return a session's totals in the form of `data.usage`, None when nothing was counted."""
    models: dict[str, JsonObject] = {}
    agents: dict[str, dict[str, JsonObject]] = {}
    newest: dict[str, tuple[int, str]] = {}  # agent → its latest message's row and model
    for agent, model, *counts, row in database.execute(
        "SELECT agent, model, SUM(input), SUM(output), SUM(cache_read), SUM(cache_creation),"
        " SUM(cache_creation_1h), MAX(rowid) FROM messages WHERE session = ? GROUP BY 1, 2",
        (session,),
    ):
        newest[agent] = max((row, model), newest.get(agent, (0, "")))
        for by_model in (models, agents.setdefault(agent, {})):
            add_counts(by_model.setdefault(model, {}), counts)
    if not models:
        return None
    named = sorted(newest, key=lambda agent: (agent != "", -newest[agent][0]))[:AGENTS_IN_USAGE]
    usage: JsonObject = {"models": models, "agents": {agent: agents[agent] for agent in named}}
    return {**usage, "model": newest[""][1]} if "" in newest else usage


def add_counts(totals: JsonObject, counts: "Iterable[int]") -> None:
    """Add the numbers of COUNT_NAMES to totals by name; the last one is left out while it is 0."""
    for name, count in zip(COUNT_NAMES, counts):
        if count or name != "cacheCreation1h":
            totals[name] = totals.get(name, 0) + count


class AgentNoteReader:
    """Put `data.agentMeta` on a subagent's first event for which the client has noted where it comes from.

    `agentMeta` holds of `agentType`, `toolUseId`, `parentAgentId`, `spawnDepth` and `requestShape` what the
    note has, `data.agentDescription` what the launching agent called it. The note is not there yet when
    the subagent starts, but at its first tool call; of nested agents nothing else says the parent.
    """

    def __init__(self, machine_id: str) -> None:
        self._machine_id = machine_id
        # (session, agent) → id of the event that carried the note on the agent
        self._noted: dict[tuple[str, str], str] = {}

    def add_note(self, event: JsonObject) -> None:
        """Add what the client has noted on the event's subagent, once; a note of any other form is none."""
        agent_id = event.get("agentId")
        if not agent_id:
            return
        data, key = event["data"], (event["sessionId"], agent_id)
        path = data.get("transcriptPath")
        if (
            event["machineId"] != self._machine_id
            or self._noted.get(key, event["id"]) != event["id"]  # the same event again was not kept before
            or not _is_transcript_path(path)
            or not _AGENT_ID.fullmatch(agent_id)
        ):
            return
        note_path = f"{path[: -len('.jsonl')]}/subagents/agent-{agent_id}.meta.json"
        seen = _stat_own(note_path)
        if seen is None or seen.st_size > AGENT_NOTE_LIMIT_BYTES:
            return
        try:
            with os.fdopen(_open_own(note_path, seen), "rb") as file:
                note = parse_event_line(file.read(AGENT_NOTE_LIMIT_BYTES))
        except (OSError, MalformedEvent):
            return  # gone, or only half written
        if len(self._noted) >= AGENTS_REMEMBERED:
            del self._noted[next(iter(self._noted))]
        self._noted[key] = event["id"]
        kept = {name: note[name] for name in _AGENT_NOTE_FIELDS if _is_id(note.get(name))}
        if type(note.get("spawnDepth")) is int:
            kept["spawnDepth"] = note["spawnDepth"]
        _keep(data, "agentMeta", kept)
        if isinstance(note.get("description"), str):
            _keep(data, "agentDescription", note["description"])


# ---------------------------------------------------------------------------
# Spool: the drainer's side (the writer's side is in the hot path)
#
# Owns: spool/, segments named <start in ms>-<random>.jsonl, taken ones .taken, and dropped.jsonl.
# ---------------------------------------------------------------------------

SPOOL_LIMIT_BYTES = 64 << 20
SPOOL_LIMIT_MS = 7 * 24 * 3600 * 1000
QUARANTINE_LIMIT_BYTES = 4 << 20
QUARANTINED_HEAD_BYTES = 4096


def drop_old_segments(directory: str) -> None:
    """Drop whole segments, oldest first, until the spool is within 64 MiB and 7 days; count what is lost."""
    segments = spool_segments(directory)
    total = sum(size for _, size in segments)
    oldest_ms = now_ms() - SPOOL_LIMIT_MS
    for path, size in segments:
        too_old = segment_start_ms(path) < oldest_ms
        if path.endswith(".taken") or (total <= SPOOL_LIMIT_BYTES and not too_old):
            continue  # what is taken is being delivered
        try:
            with open(path, "rb", opener=open_own) as file:
                events = sum(1 for line in file if line.strip())
            os.unlink(path)
        except OSError:
            continue  # another writer, or the drainer, was first
        total -= size
        reason = "older than 7 days" if too_old else "over 64 MiB"
        record = {"timestamp": now_ms(), "events": events, "bytes": size, "reason": reason}
        with os.fdopen(open_for_append(directory + "/dropped.log"), "wb") as log:
            log.write(encode_json(record) + b"\n")


def spool_segments(directory: str) -> "list[tuple[str, int]]":
    """List our segments as (path, bytes), oldest first; of one name what was taken comes first."""
    segments = []
    with contextlib.suppress(FileNotFoundError):  # of the directory
        names = os.listdir(directory)
        for name in sorted(names, key=lambda name: (name.rpartition(".")[0], name.endswith(".jsonl"))):
            if name.endswith((".jsonl", ".taken")):
                about = _stat_own(f"{directory}/{name}")  # None when it was drained since it was listed
                if about is not None:
                    segments.append((f"{directory}/{name}", about.st_size))
    return segments


def segment_start_ms(path: str) -> int:
    """Return the time in a segment's name; 0, the oldest of all, when the name is not ours."""
    start = path.rpartition("/")[2].partition("-")[0]
    return int(start) if start.isdigit() else 0


def take_segment(path: str) -> str:
    """Take one segment away from its writers and return its new path; after this nobody writes to it.

    Raises BlockingIOError while a writer that opened it under its old name is not done, or while one that was
    taken under the same name is not drained (a hook of an older version begins one anew): try again later.
    """
    taken = path if path.endswith(".taken") else path[: -len(".jsonl")] + ".taken"
    if taken != path:
        if os.path.lexists(taken):
            raise BlockingIOError(f"{taken} is still to be drained")
        os.rename(path, taken)
    with open(taken, "rb", opener=open_own) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return taken


def take_dropped(directory: str) -> "tuple[int, int]":
    """Return how many (events, bytes) the spool has had to drop since the last call, and forget them."""
    path, taken = directory + "/dropped.log", directory + "/dropped.taken"
    events = size = 0
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if not os.path.exists(taken):
            os.rename(path, taken)
        with open(taken, "rb", opener=open_own) as file:
            for line in file:
                with contextlib.suppress(MalformedEvent, TypeError, ValueError):  # torn by a full disk
                    record = parse_event_line(line)
                    events += int(record.get("events", 0))
                    size += int(record.get("bytes", 0))
        os.unlink(taken)
    return events, size


def keep_in_quarantine(path: str, line: bytes, reason: str) -> None:
    """Keep the beginning of what was not one JSON object, for a person to look at. Raises OSError."""
    record = {"received": now_ms(), "reason": reason, "bytes": len(line)}
    record["head"] = line[:QUARANTINED_HEAD_BYTES].decode("utf-8", "backslashreplace")
    append_bounded(path, encode_json(record) + b"\n", QUARANTINE_LIMIT_BYTES)


# ---------------------------------------------------------------------------
# Redis publisher: from the spool to Redis
#
# Owns: publisher.lock, publisher.json, and one connection. redis-py is imported when a client is made.
# redis-py's timeouts count from one recv to the next and not at all while a name is looked up, so a server
# that drips bytes holds it for ever: each exchange runs in a thread that is left behind at its deadline.
# ---------------------------------------------------------------------------

PUBLISHER_QUIET_S = 60.0
PUBLISHER_PYTHON = "CONTEXTUATE_PUBLISHER_PYTHON"  # the interpreter that a publisher has changed to
BUSY_S = 2.0  # after an event
BUSY_POLL_S = 0.005  # between two looks at the spool
IDLE_POLL_S = 0.02
EXCHANGE_DEADLINE_S = 5.0
SLOW_LINK_BYTES_A_S = 50_000  # large batches get this much more time
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 30.0
BATCH_LIMIT_EVENTS = 200
BATCH_LIMIT_BYTES = 256 << 10
RESEND_S = 10.0  # what was sent so long before a connection broke is sent again: a new primary may lack it
RESEND_BYTES = 1 << 20
STATE_INTERVAL_S = 0.25
WRITER_PATIENCE_S = 1.0
RECENT_OUTCOMES = 50
_Batch = list[tuple[str, bytes]]  # events on their way to Redis: (id, JSON)


class Overrun(Exception):
    """An exchange with Redis did not end by its deadline."""


def within(deadline_s: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread of its own and return its result; leave it at the deadline and raise Overrun."""
    outcome: list[tuple[Any, Any]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:  # belongs to the caller
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="redis exchange", daemon=True)
    thread.start()
    thread.join(deadline_s)
    result, error = outcome[0] if outcome else (None, Overrun(f"no whole answer within {deadline_s:.0f} s"))
    if error is not None:
        raise error
    return result


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 0.1 s, doubled each time, at most 30 s."""
    return float(min(BACKOFF_LAST_S, BACKOFF_FIRST_S * 2 ** min(failures - 1, 20)))


def redis_client(values: "dict[str, Any]") -> Any:
    """Return a redis-py client of the server that has the stream, which has not connected yet.

    With `redis.sentinels` or `redis.cluster` it asks them first which server that is. Raises
    ModuleNotFoundError without redis-py, ValueError for a url that it cannot use, and redis-py's errors. Off
    are redis-py's retries, which reconnect silently, and what it sends about itself with each connection
    (HELLO, CLIENT SETINFO), which an access list would have to allow.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    options: dict[str, Any] = {"host": values["redis.host"], "port": values["redis.port"]}
    kind: Any = redis.connection.SSLConnection if values["redis.tls"] else redis.connection.Connection
    if values["redis.url"]:
        options = dict(redis.connection.parse_url(values["redis.url"]))  # type: ignore[no-untyped-call]
        kind = options.pop("connection_class", kind)
    options.setdefault("db", values["redis.db"])
    password = os.environ.get("CONTEXTUATE_REDIS_PASSWORD") or values["redis.password"]
    for name, value in (("username", values["redis.username"]), ("password", password)):
        if value:
            options[name] = value
    if issubclass(kind, redis.connection.SSLConnection):
        for name, key in (("ca_certs", "caFile"), ("certfile", "certFile"), ("keyfile", "keyFile")):
            options["ssl_" + name] = values["redis." + key] and os.path.expanduser(values["redis." + key])
        options["ssl_cert_reqs"] = "required" if values["redis.verify"] else "none"
        options["ssl_check_hostname"] = values["redis.verify"]
    options.update(socket_timeout=EXCHANGE_DEADLINE_S, retry=Retry(NoBackoff(), 0))
    # Not every redis-py knows these: a timeout of a Unix socket, another protocol, what it says of itself.
    silent = {"socket_connect_timeout": 1.0, "protocol": 2, "lib_name": None, "lib_version": None}
    known: set[str] = set()
    for base in kind.__mro__:
        parameters = inspect.signature(base.__init__).parameters
        known.update(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break  # else what it does not name goes on to the class that it is made of
    options.update((name, value) for name, value in silent.items() if name in known)

    def client_of(address: "tuple[str, int] | None" = None, **changes: Any) -> Any:
        own = {**options, **changes, **(dict(zip(("host", "port"), address)) if address else {})}
        return redis.Redis(connection_pool=redis.ConnectionPool(connection_class=kind, **own))

    if values["redis.sentinels"]:
        login = {"db": 0, "username": None, "password": values["redis.sentinelPassword"]}
        nodes = [host_and_port(node, 26379) for node in values["redis.sentinels"]]
        return client_of(
            _primary_of_sentinels([client_of(it, **login) for it in nodes], values["redis.master"])
        )
    if values["redis.cluster"]:
        first = options.get("host", "localhost"), options.get("port", 6379)
        listed = values["redis.cluster"]
        nodes = [first] if listed is True else [host_and_port(node, 6379) for node in listed]
        tls = issubclass(kind, redis.connection.SSLConnection)
        rest = {name: value for name, value in options.items() if name not in ("host", "port", "db")}
        return client_of(
            _cluster_node(nodes, stream_name(values) or values["redis.channel"], ssl=tls, **rest), db=0
        )
    return client_of()


def _primary_of_sentinels(sentinels: "list[Any]", name: str) -> "tuple[str, int]":
    from redis.sentinel import Sentinel

    manager: Any = Sentinel([])  # type: ignore[no-untyped-call]
    manager.sentinels = sentinels
    try:
        host, port = manager.discover_master(name)
    finally:
        for sentinel in sentinels:
            sentinel.connection_pool.disconnect()
    return host, port


def _cluster_node(nodes: "list[tuple[str, int]]", key: str, **options: Any) -> "tuple[str, int]":
    """Return the address of the node that has a key: PUBLISH there reaches subscribers of every node."""
    from redis.cluster import ClusterNode, RedisCluster

    startup: Any = [ClusterNode(*node) for node in nodes]  # type: ignore[no-untyped-call]
    cluster: Any = RedisCluster(startup_nodes=startup, require_full_coverage=False, **options)
    try:
        node = cluster.get_node_from_key(key)
    finally:
        cluster.close()
    return node.host, node.port


def redis_address(client: Any) -> "tuple[Any, Any]":
    """Return (host, port) of a client that `redis_client` made."""
    options = client.connection_pool.connection_kwargs
    return options.get("host"), options.get("port")


def stream_name(values: "dict[str, Any]") -> "Optional[str]":
    """Return the key of the stream; None when it is switched off."""
    return f"{values['redis.channel']}:stream" if values["redis.streamMaxLength"] else None


def redis_place(values: "dict[str, Any]") -> str:
    """Return where Redis is, for people: "host:port/db" or a socket's path, never a password."""
    url = values["redis.url"]
    if values["redis.sentinels"]:
        return f"{values['redis.master']} of the sentinels {', '.join(values['redis.sentinels'])}"
    if isinstance(values["redis.cluster"], list):
        return f"the cluster of {', '.join(values['redis.cluster'])}"
    if not url:
        return f"{values['redis.host']}:{values['redis.port']}/{values['redis.db']}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "unix":
        return urllib.parse.unquote(parts.path)
    database = parts.path.strip("/") or values["redis.db"]
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}/{database}"


def redis_py_advice(python: str) -> str:
    """Say what to do where an interpreter lacks redis-py: pip, unless a distribution manages it (PEP 668)."""
    prefix = os.path.dirname(os.path.dirname(os.path.abspath(python)))
    managed = glob.glob(glob.escape(prefix) + "/lib/python3*/EXTERNALLY-MANAGED")
    if managed and not os.path.exists(prefix + "/pyvenv.cfg"):
        return (
            "install your system's package for it (Debian, Ubuntu: apt install python3-redis), or run "
            "`install` and `start` with the Python of a venv that has it"
        )
    return f"run `{shlex.quote(python)} -m pip install --upgrade redis`, then try again"


# What an error's text holds → what to tell a person. redis-py leaves the code (NOAUTH) out of some texts.
_REDIS_TROUBLES = (
    ("No module named 'redis'", "redis-py is missing: {advice}"),
    ("No module named 'redis.", "redis-py is too old: {advice}"),
    ("Authentication required|NOAUTH",
     "Redis at {place} asks for a password (NOAUTH): set redis.password, or CONTEXTUATE_REDIS_PASSWORD "
     "for hooks and monitor"),
    ("invalid username-password|WRONGPASS|invalid password|without any password configured",
     "Redis at {place} refuses user name or password (WRONGPASS): check redis.username and redis.password "
     "(or CONTEXTUATE_REDIS_PASSWORD)"),
    ("NOPERM|has no permissions|No permissions to access",
     "the Redis user lacks a right (NOPERM: {text}): the README lists the ACL rules"),
    ("READONLY|read only replica|read-only replica|previous master",
     "Redis at {place} is a read-only replica (READONLY): set redis.host to the primary, or redis.sentinels "
     "to have it found"),
    ("MOVED|MovedError", "Redis at {place} is a node of a cluster (MOVED): set redis.cluster to true"),
    ("CLUSTERDOWN|ClusterDownError|hash slot not served|is not covered by the cluster",
     "the cluster at {place} is down (CLUSTERDOWN): no node has the stream now"),
    ("Cluster mode is not enabled", "Redis at {place} is no cluster: set redis.cluster to false"),
    ("No master found", "no sentinel of {place} knows a primary: check redis.sentinels, redis.master and "
     "redis.sentinelPassword ({text})"),
    ("OOM|used memory",
     "Redis at {place} is out of memory (OOM): raise maxmemory there or lower redis.streamMaxLength"),
    ("MISCONF", "Redis at {place} cannot save to its disk and refuses writes (MISCONF): look into its log"),
    ("LOADING|is loading the dataset", "Redis at {place} is still loading its data (LOADING)"),
    ("WRONGTYPE", "the stream's key holds something else (WRONGTYPE): choose another redis.channel"),
    ("Hostname mismatch|IP address mismatch|doesn't match",
     "the certificate of Redis is for another name: set redis.host to a name in the certificate ({text})"),
    ("certificate has expired", "the certificate of Redis has expired: renew it on the server"),
    ("CERTIFICATE_VERIFY_FAILED",
     "the certificate of Redis cannot be verified: set redis.caFile to its authority's file ({text})"),
    ("certificate required|CERTIFICATE_REQUIRED|peer did not return a certificate",
     "Redis at {place} asks for a client certificate: set redis.certFile and redis.keyFile"),
    ("WRONG_VERSION_NUMBER|wrong version number|record layer failure|UNEXPECTED_MESSAGE|UNEXPECTED_EOF",
     "{place} does not speak TLS: set redis.tls to false, or redis.port to the server's TLS port"),
    ("Protocol Error|InvalidResponse",
     "{place} does not answer like Redis: if it is a TLS port, set redis.tls to true"),
    ("No such file or directory", "{missing} is not there: check the paths in the Redis configuration"),
    ("Name or service not known|nodename nor servname|name resolution|No address",
     "{host} is not a known host name: check redis.host"),
    ("Connection refused", "nothing answers at {place}: is Redis running there, and is the port right?"),
    ("Connection closed by server|Connection reset|Broken pipe|EOF occurred in violation",
     "Redis at {place} closed the connection{closed_hint}"),
    ("Timeout|timed out|whole answer", "Redis at {place} does not answer in time{silence_hint}"),
    ("unreachable|No route", "{place} cannot be reached from this machine"),
)  # fmt: skip


def redis_trouble(error: BaseException, values: "dict[str, Any]", connected: bool = False) -> str:
    """Say in one sentence what is wrong with Redis and what to do about it.

    `connected`: this configuration has worked before, so a connection that ends has other causes.
    """
    text = " ".join(str(error).split())[:300]
    text = re.sub(r"^Error -?\d+ connecting to \S+\. |\s*\(_ssl\.c:\d+\)\.?", "", text)
    tls = values["redis.tls"] or (values["redis.url"] or "").startswith("rediss:")
    silence_hint = "if that port is without TLS, set redis.tls to false"
    closed_hint = "is a client certificate asked for?" if tls else "if that is a TLS port, set redis.tls"
    named = [values[f"redis.{name}File"] for name in ("ca", "cert", "key")]
    if (values["redis.url"] or "").startswith("unix:"):
        named.append(redis_place(values))
    missing = [path for path in named if path and not os.path.exists(os.path.expanduser(path))]
    facts = {
        "text": text,
        "place": redis_place(values),
        "host": values["redis.host"] if not values["redis.url"] else redis_place(values).rpartition(":")[0],
        "missing": ", ".join(missing) or "a file",
        "advice": redis_py_advice(sys.executable),
        "closed_hint": "" if connected else f" ({closed_hint})",
        "silence_hint": "" if connected or not tls else f" ({silence_hint})",
    }
    for signs, words in _REDIS_TROUBLES:
        if any(sign in text or sign == type(error).__name__ for sign in signs.split("|")):
            return words.format(**facts)
    return f"{type(error).__name__} from Redis at {facts['place']}: {text}"


def privacy_of(values: "dict[str, Any]") -> Privacy:
    """Return what a configuration lets out."""
    metadata_only = values["privacy.level"] == "metadata"
    return Privacy(values["privacy.redact"], metadata_only, values["limits.fieldBytes"])


def run_publisher(lock_fd: int) -> None:
    """Be the publisher until the spool has been quiet for 60 s (the program with --publish).

    `lock_fd` is publisher.lock, locked and handed down by the hook that started this process.
    """
    home, config_path = (os.path.abspath(path) for path in places(os.environb))  # type: ignore[arg-type]
    try:
        os.umask(0o077)
        os.chdir("/")  # the project's directory may be removed or unmounted meanwhile
        os.closerange(3, lock_fd)  # whatever else was handed down is not ours to hold open
        os.closerange(lock_fd + 1, 256)
        os.set_inheritable(lock_fd, False)
        publisher = Publisher(home, config_path, lock_fd)
        signal.signal(signal.SIGTERM, lambda *_: setattr(publisher, "stopping", True))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        publisher.run()
    except BaseException as error:  # nobody sees a traceback; the next hook starts another publisher
        with contextlib.suppress(OSError):
            log_failure(f"the publisher stopped: {error!r}")
    os._exit(0)  # an exchange that was left behind may still hold its thread


class Publisher:
    """Send what is in the spool to Redis, in its order, and follow it until it has been quiet for a while."""

    def __init__(self, home: str, config_path: str, lock_fd: int) -> None:
        self._home = home
        self._spool = home + "/spool"
        self._config_path = config_path
        self._lock_fd = lock_fd
        self._values: dict[str, Any] = {}
        self._config_key: Any = None  # what the configuration file was when `_values` was read
        self._client: Any = None
        self._usage_events: collections.deque[JsonObject] = collections.deque()  # for the next batch
        self._usage = UsageWorker(home, this_machine(), self._usage_events.append)
        self._agent_notes = AgentNoteReader(this_machine())
        self._segment: Any = None  # the file that is being read
        self._blocked_since: Optional[float] = None  # time.monotonic; a writer holds the oldest segment
        self._batch: _Batch = []  # read, not delivered yet
        self._sent: collections.deque[tuple[float, _Batch]] = collections.deque()  # of the last RESEND_S
        self._failures = 0  # in a row
        self._next_attempt = 0.0  # time.monotonic
        self.stopping = False  # True: `run` returns after the exchange under way; the spool keeps the rest
        self._outcomes: collections.deque[list[Any]] = collections.deque(maxlen=RECENT_OUTCOMES)
        self._state: JsonObject = {
            "pid": os.getpid(), "state": "connecting", "reason": None, "since": now_ms(), "server": None,
            "published": 0, "subscribers": None, "channelState": None, "channelReason": None, "stream": None,
            "streamReason": None, "nextAttemptAt": None, "dropped": 0, "quarantined": 0,
        }  # fmt: skip
        self._told: JsonObject = {}  # the state as it is in publisher.json
        self._told_at = 0.0

    def run(self) -> None:
        """Publish until it has been quiet for PUBLISHER_QUIET_S, or the mode is no longer Redis."""
        last_event = time.monotonic()
        while not self.stopping:
            now = time.monotonic()
            self._follow_config()
            if self._values["mode"] != "redis":
                break
            if now >= self._next_attempt and (self._batch or self._read_batch()):
                self._publish()
                last_event = now
                if not self._failures:
                    continue
            self._tell()
            if self._batch:
                time.sleep(min(0.2, max(0.001, self._next_attempt - now)))
            elif now - last_event < PUBLISHER_QUIET_S or self._usage.is_busy or self._usage_events:
                if now - last_event >= BUSY_S:
                    self._enter("idle", None)
                time.sleep(BUSY_POLL_S if now - last_event < BUSY_S else IDLE_POLL_S)
            elif self._leave():
                return
            else:
                last_event = now
        self._enter("stopped", None)
        self._tell(now=True)

    def _leave(self) -> bool:
        """Give up the lock, unless there is something in the spool again.

        No event is left behind: a hook appends first and asks for the lock then. If it was refused, its
        append came before our release, so the look after it sees it; if not, it starts the next publisher.
        """
        self._enter("stopped", None)
        self._tell(now=True)  # before the next publisher may tell of itself
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        if not spool_segments(self._spool):
            return True
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True  # a hook was faster: the next publisher runs
        self._enter("idle", None)
        return False

    def _follow_config(self) -> None:
        """Read the configuration if it has changed; one that cannot be used leaves the last one in force."""
        try:
            about = os.stat(self._config_path)
            key: Any = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns)
        except OSError:
            key = "none"
        if key == self._config_key:
            return
        self._config_key = key
        try:
            self._values = load_config(self._config_path)[0]
        except ConfigError as error:
            log_failure(f"the publisher goes on as before: {error}")
            self._values = self._values or default_values()
        self._state["server"] = redis_place(self._values)
        self._drop_client()
        self._failures, self._next_attempt = 0, 0.0

    # Reading the spool

    def _read_batch(self) -> bool:
        """Read the next events of one segment; a segment that is read and delivered is removed."""
        privacy = privacy_of(self._values)
        while self._usage_events:
            usage = build_event(self._usage_events.popleft(), now_ms(), this_machine())
            self._batch.append((usage["id"], protect(usage, privacy)[1]))
        if self._segment is None and not self._open_segment():
            return bool(self._batch)
        size = 0
        while len(self._batch) < BATCH_LIMIT_EVENTS and size < BATCH_LIMIT_BYTES:
            line = self._segment.readline()
            if not line:
                break
            event = self._build(line.strip(), privacy) if line.strip() else None
            if event:
                self._batch.append(event)
                size += len(event[1])
        if not self._batch:
            self._segment.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._segment.name)
            self._segment = None
            return self._read_batch()
        return True

    def _open_segment(self) -> bool:
        """Open the oldest segment; tell if there is one that can be read now."""
        blocked = False
        for path, _ in spool_segments(self._spool):
            try:
                self._segment = open(take_segment(path), "rb", opener=open_own)  # noqa: SIM115 - over many rounds
            except BlockingIOError:
                blocked = True
                self._blocked_since = self._blocked_since or time.monotonic()
                if time.monotonic() - self._blocked_since < WRITER_PATIENCE_S:
                    return False  # a writer is at it: what comes after it waits, to keep the order
                continue
            except OSError:  # drained meanwhile, or not readable
                continue
            self._blocked_since = self._blocked_since if blocked else None
            self._report_dropped()
            return True
        return False

    def _build(self, line: bytes, privacy: Privacy) -> "tuple[str, bytes] | None":
        """Build and protect one event; what is none goes to the quarantine."""
        try:
            event = build_event(parse_event_line(line), now_ms(), this_machine())
            self._usage.put(event)
            self._agent_notes.add_note(event)
            event, encoded = protect(event, privacy)
            return (event["id"], encoded)
        except Exception as error:  # no line may stop those after it
            reason = str(error) if isinstance(error, MalformedEvent) else f"could not be built: {error!r}"
        self._state["quarantined"] += 1
        with contextlib.suppress(OSError):
            log_failure(f"not an event ({reason}): {line[:200]!r}")
            keep_in_quarantine(self._home + "/quarantine.log", line, reason)
        return None

    def _report_dropped(self) -> None:
        """Report to the monitors what the spool has had to drop on this machine: an event like any other."""
        events, size = take_dropped(self._spool)
        if not events:
            return
        self._state["dropped"] += events
        words = f"the spool of this machine was full: {events} events ({size} bytes) were dropped"
        report = {"eventType": "message", "data": {"message": words, "spoolDropped": events}}
        event = build_event(report, now_ms(), this_machine())
        self._batch.append((event["id"], encode_json(event)))

    # Sending

    def _publish(self) -> None:
        """Send the batch once; after a failure only its first event, to see whether it is over."""
        batch = self._batch[: 1 if self._failures else None]
        deadline_s = EXCHANGE_DEADLINE_S + sum(len(line) for _, line in batch) / SLOW_LINK_BYTES_A_S
        try:
            if self._client is None:
                self._client = within(2 * EXCHANGE_DEADLINE_S, lambda: redis_client(self._values))
            client = self._client
            replies = within(deadline_s, lambda: self._send(client, batch))
        except Exception as error:  # whatever it is, the events stay in the spool
            if isinstance(error, ImportError):
                self._change_interpreter()
            self._fail(redis_trouble(error, self._values, connected=self._state["published"] > 0))
            self._send_again()
            return
        self._settle(batch, replies)

    def _send(self, client: Any, batch: "_Batch") -> "list[Any]":
        """Return the replies (values or exceptions) of one pipeline: two an event if there is a stream."""
        pipeline = client.pipeline(transaction=False)  # in a MULTI, one refused command would discard all
        stream, limit = stream_name(self._values), self._values["redis.streamMaxLength"]
        for _, line in batch:
            pipeline.publish(self._values["redis.channel"], line)
            if stream:
                pipeline.xadd(stream, {"event": line}, maxlen=limit, approximate=True)
        return list(pipeline.execute(raise_on_error=False))

    def _settle(self, batch: "_Batch", replies: "list[Any]") -> None:
        """Keep what has not arrived: an event that the stream has not or, without one, no subscriber got.

        A node of a cluster counts only its own subscribers, so there it is enough that PUBLISH was taken.
        """
        stream = stream_name(self._values)
        step = 2 if stream else 1
        kept: _Batch = []
        sent: _Batch = []
        for event, at in zip(batch, range(0, len(replies), step)):
            subscribers = replies[at] if isinstance(replies[at], int) else None
            streamed = bool(stream) and not isinstance(replies[at + 1], Exception)
            self._outcomes.append([event[0], subscribers, streamed])
            published = bool(subscribers) or (subscribers == 0 and self._values["redis.cluster"])
            (sent if streamed or (not stream and published) else kept).append(event)
        # For publisher.json: how the last event fared on the channel and in the stream.
        published_last: Any = replies[-step]
        added: Any = replies[-1] if stream else None
        refused, unstreamed = isinstance(published_last, Exception), isinstance(added, Exception)
        self._state.update(
            channelState="refused" if refused else "ok",
            channelReason=redis_trouble(published_last, self._values) if refused else None,
            subscribers=None if refused else published_last,
            stream="refused" if unstreamed else "off" if added is None else "ok",
            streamReason=redis_trouble(added, self._values) if unstreamed else None,
        )
        self._state["published"] += len(sent)
        self._batch = kept + self._batch[len(batch) :]
        self._sent.append((time.monotonic(), sent))
        while self._sent and (
            time.monotonic() - self._sent[0][0] > RESEND_S
            or sum(len(line) for _, events in self._sent for _, line in events) > RESEND_BYTES
        ):
            self._sent.popleft()
        if not kept:
            self._failures = 0
            self._enter("publishing", None)
            return
        reasons = [self._state["channelReason"], self._state["streamReason"]]
        unheard = f"no monitor is subscribed to {self._values['redis.channel']}"
        self._fail("; ".join(reason for reason in reasons if reason) or unheard)
        if stream:
            self._send_again()

    def _send_again(self) -> None:
        """Put what was sent just now before the batch: the server that had it may have been replaced."""
        recent = [
            event
            for sent_at, events in self._sent
            if time.monotonic() - sent_at < RESEND_S
            for event in events
        ]
        self._sent.clear()
        self._batch = recent + self._batch

    def _fail(self, reason: str) -> None:
        self._failures += 1
        delay_s = backoff_s(self._failures)
        self._next_attempt = time.monotonic() + delay_s
        self._drop_client()
        self._enter("waiting", reason)
        self._state["nextAttemptAt"] = now_ms() + int(delay_s * 1000)
        drop_old_segments(self._spool)

    def _change_interpreter(self) -> None:
        """Go on in the interpreter that `install` has recorded meanwhile; the lock goes with us."""
        python = publisher_python(self._home)
        if python in (sys.executable, os.environ.get(PUBLISHER_PYTHON)) or not os.access(python, os.X_OK):
            return
        os.set_inheritable(self._lock_fd, True)
        arguments = [python, "-E", os.path.abspath(__file__), "--publish", str(self._lock_fd)]
        os.execve(python, arguments, {**os.environ, PUBLISHER_PYTHON: python})

    def _drop_client(self) -> None:
        """Close the connection, also under the hands of an exchange that was left behind."""
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.connection_pool.disconnect(inuse_connections=True)

    # publisher.json

    def _enter(self, state: str, reason: "Optional[str]") -> None:
        if (state, reason) != (self._state["state"], self._state["reason"]):
            self._state.update(state=state, reason=reason, since=now_ms())
            if reason:
                with contextlib.suppress(OSError):
                    log_failure(f"publisher: {reason}")
        self._state["nextAttemptAt"] = None

    def _tell(self, now: bool = False) -> None:
        """Write publisher.json when something is new, a few times a second at most."""
        if self._state == self._told or (not now and time.monotonic() - self._told_at < STATE_INTERVAL_S):
            return
        self._told_at = time.monotonic()
        content = {**self._state, "updatedAt": now_ms(), "recent": list(self._outcomes)}
        with contextlib.suppress(OSError):
            write_atomically(self._home + "/publisher.json", encode_json(content) + b"\n")
            self._told = dict(self._state)


def publisher_state(home: str) -> JsonObject:
    """Return what publisher.json says, and whether that process runs (`running`)."""
    try:
        with open(home + "/publisher.json", "rb", opener=open_own) as file:
            state = parse_event_line(file.read(1 << 20))
    except (OSError, MalformedEvent):
        state = {"state": "stopped"}
    state.pop("recent", None)
    running = state.get("state") != "stopped" and _is_pid(state.get("pid")) and _is_publisher(state["pid"])
    return {**state, "running": True} if running else {**state, "state": "stopped", "running": False}


def _is_publisher(pid: int) -> bool:
    """True if the process of this number is a publisher; without /proc, if it is one of ours."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"\0--publish\0" in file.read(65536)
    except OSError:
        if os.path.exists("/proc/self/cmdline"):
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def lock_is_held(path: str) -> bool:
    """True while a process holds the lock on a file.

    Only where no reader takes "it is held" for "it is at work": the look itself holds it for a moment.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def publisher_outcome(home: str, line: bytes, deadline_s: float = 5.0) -> "list[str]":
    """Wait for the publisher to tell what became of one wrapped line; return it in words, for debugging."""
    event_id = parse_event_line(line)["id"]
    deadline = time.monotonic() + deadline_s
    state: JsonObject = {}
    while time.monotonic() < deadline:
        try:
            with open(home + "/publisher.json", "rb", opener=open_own) as file:
                state = parse_event_line(file.read(1 << 20))
        except (OSError, MalformedEvent):
            pass  # it is still to be written
        for known, count, streamed in state.get("recent", []):
            if known == event_id:
                got = "the channel was refused" if count is None else f"{count} subscribers got it"
                kept = "it is in the stream" if streamed else f"not in the stream ({state.get('stream')})"
                return [f"Redis at {state.get('server')}: {got}, {kept}"]
        time.sleep(0.02)
    return [f"Redis at {state.get('server')}: nothing known after {deadline_s:.0f} s: {state.get('reason')}"]
