#!/usr/bin/env python3
"""Hand one Claude Code hook event to the Contextuate Monitor, unnoticed.

As a program it is a hook: Claude Code starts it for every event with one JSON object on standard input.
It exits with 0, writes nothing to standard output, and waits at most 250 ms for the monitor to acknowledge.
An event that is not acknowledged goes to the spool, which the monitor reads. In mode "redis" every event goes
there, and a publisher, one process of this file for each user, sends it to Redis.
With `--answer`, for two events, it then waits for a person's decision and prints it for Claude Code.
`CONTEXTUATE_DEBUG=1` prints what the hook did on stderr. As a module it is what hook and monitor share.

The interpreter compiles a script at each start, so `contextuate_monitor.py install` writes the text above
"end of the hot path" to a module, which a short launcher imports from its bytecode; this file is beside it.
"""

# ---------------------------------------------------------------------------
# Hot path: what every hook call runs
#
# Imports built-in and C modules only: os, json, socket or signal would take longer than all the rest of it.
# Owns: the wrapped line, sending it to the socket, appending it to the spool.
# ---------------------------------------------------------------------------

import posix
import sys
import time

STDIN_DEADLINE_S = 2.0
ACKNOWLEDGEMENT_DEADLINE_S = 0.25
ACKNOWLEDGEMENT = b"\x06"
LINE_LIMIT_BYTES = 16 << 20  # the longest line that the monitor accepts
PAYLOAD_LIMIT_BYTES = 64 << 20  # the longest payload that a hook reads
SEGMENT_LIMIT_BYTES = 4 << 20
DEFAULT_SOCKET_PATH = "/tmp/contextuate-monitor.sock"
TERMINAL_VARIABLES = (
    "TMUX TMUX_PANE KITTY_WINDOW_ID KITTY_LISTEN_ON WEZTERM_PANE ITERM_SESSION_ID SSH_CONNECTION TERM_PROGRAM"
)
DEBUG = posix.environ.get(b"CONTEXTUATE_DEBUG", b"") not in (b"", b"0")  # print the notes on standard error
APPEND = posix.O_WRONLY | posix.O_APPEND | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK


def run_hook() -> None:
    """Send one payload from standard input to the monitor or the spool; exit with status 0."""
    notes: list[str] = []
    try:
        import _signal

        # In print mode, Claude Code sends a hook of StopFailure SIGTERM 40 ms after its start.
        for number in (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP):
            _signal.signal(number, _signal.SIG_IGN)
        if not (payload := read_payload().strip()):
            raise ValueError("no hook payload on standard input")
        if sys.argv[1:2] == ["--answer"]:
            whole().deliver_and_wait(payload, notes)
        else:
            deliver(payload, notes)
    except BaseException as error:  # a hook that exits with an error may block Claude Code
        reason = f"{type(error).__name__}: {error}"  # contains the file's name, which repr does not
        notes.append(f"failed: {reason}")
        whole().log_failure(reason)
    finally:  # whatever fails
        try:
            if DEBUG:
                posix.write(2, "".join(f"contextuate: {note}\n" for note in notes).encode("utf-8", "replace"))
        finally:
            posix._exit(0)


def read_payload() -> bytes:
    """Read one JSON object from standard input, or what arrives in STDIN_DEADLINE_S; raise ValueError."""
    import select

    # It ends at EOF, at the newline of a one-line object, or 30 ms after its end (old clients).
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    data, deadline = bytearray(), time.monotonic() + STDIN_DEADLINE_S
    while len(data) <= PAYLOAD_LIMIT_BYTES:
        left_ms = int((deadline - time.monotonic()) * 1000)
        maybe_whole = data.endswith((b"}", b"}\n", b"}\r\n"))
        if left_ms > 0 and poll.poll(min(left_ms, 30) if maybe_whole else left_ms):
            chunk = posix.read(0, 1 << 20)
            data += chunk
            if not chunk or (data.endswith((b"}\n", b"}\r\n")) and data.find(b"\n") == len(data) - 1):
                return bytes(data)
        elif left_ms <= 0 or (maybe_whole and whole().is_json_object(data)):
            return bytes(data)
    raise ValueError(f"the payload is larger than {PAYLOAD_LIMIT_BYTES} bytes")


def deliver(payload: bytes, notes: "list[str]", name: str = "hook", wait_s: int = 0) -> "list[Any]":
    """Send one payload as configured; return the event's id and, if the monitor has it, the connection."""
    environ: dict[bytes, bytes] = posix.environ
    home, config_path = places(environ)
    mode, socket_path = hook_settings(home, config_path)
    notes.append(f"config {config_path}: mode {mode}, socket {socket_path}")
    line = wrap(payload, environ, machine_key(home), name, wait_s)
    kept: list[Any] = [line[7:43].decode()]
    if len(line) > LINE_LIMIT_BYTES // 2:
        line = whole().shrink_line(line, config_path)
    if mode == "local":
        if not (outcome := send(home, socket_path, line, kept)):
            notes.append(f"the monitor has stored {len(line)} bytes")
            return kept
        notes.append(f"no acknowledgement from the monitor: {outcome}")
    notes.append("kept in the spool: " + append_to_spool(home + "/spool", line))
    if mode == "redis":
        notes.append(ensure_publisher(home))
        if DEBUG:
            notes.extend(whole().publisher_outcome(home, line))
    return kept


def places(environ: "dict[bytes, bytes]") -> "tuple[str, str]":
    """Return our directory (CONTEXTUATE_HOME) and the configuration file's path (CONTEXTUATE_CONFIG)."""
    names = (b"CONTEXTUATE_HOME", b"HOME", b"CONTEXTUATE_CONFIG")
    home, user_home, config = (variable(environ, name) for name in names)
    folder = __file__.rpartition("/")[0]
    if not home and folder.endswith("/hooks/lib"):
        home = folder[: -len("/hooks/lib")]  # in which this hook is installed
    # In a file of settings, no shell expands "~".
    home, config = (user_home + path[1:] if path[:2] == "~/" else path for path in (home, config))
    try:
        is_ours = posix.stat(home or user_home).st_uid == posix.getuid()
    except OSError:
        is_ours = (home or user_home) != ""
    if not is_ours:  # as after `sudo`: the owner could not write to files of root in it
        import pwd

        try:
            home, user_home = "", pwd.getpwuid(posix.getuid()).pw_dir
        except KeyError:  # as of `docker run -u 4242`
            home, user_home = "", folder or "."
    home = home or user_home + "/.contextuate"
    return home, config or home + "/monitor.config.json"


def variable(environ: "dict[bytes, bytes]", name: bytes) -> str:
    """Return a variable of the environment; "" if it is not set."""
    return environ.get(name, b"").decode("utf-8", "surrogateescape")


def hook_settings(home: str, config_path: str) -> "tuple[str, str]":
    """Return (mode, socket path), from the line for this version of the configuration file in hook.cache."""
    try:
        about = posix.stat(config_path)
    except OSError:
        return "local", DEFAULT_SOCKET_PATH
    key = f"{about.st_dev} {about.st_ino} {about.st_size} {about.st_mtime_ns}"
    lines = b"\n" + read_small(home + "/hook.cache")
    found, is_whole, _ = lines.partition(f"\n{key} ".encode())[2].partition(b"\n")
    if found and is_whole:
        mode, _, socket_path = found.decode("utf-8", "surrogateescape").partition(" ")
        return mode, socket_path
    return whole().derive_hook_settings(home, config_path, key)  # type: ignore[no-any-return]


def read_small(path: str, limit_bytes: int = 8192) -> bytes:
    """Return the beginning of a file; b"" where it cannot be read."""
    try:
        fd = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOFOLLOW)
        try:
            return posix.read(fd, limit_bytes)
        finally:
            posix.close(fd)
    except OSError:  # also while reading: a directory, or a process that has exited
        return b""


def machine_key(home: str) -> str:
    """Return this machine's key: the random id in our directory; in a container, with its pid namespace."""
    key = read_small(home + "/machine-key").strip()
    name, namespace = key.decode() if key.isalnum() else whole().make_machine_key(home), pid_namespace()
    return f"{name}/{namespace}" if name and namespace else name


def wrap(
    payload: bytes, environ: "dict[bytes, bytes]", key: str = "", name: str = "hook", wait_s: int = 0
) -> bytes:
    """Return the line for one payload: unchanged, as the last field, behind what only the hook knows."""
    digits = posix.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]  # RFC 9562 section 5.4
    event_id = f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"
    about: dict[str, Any] = {
        "machineId": variable(environ, b"CONTEXTUATE_MACHINE_ID") or posix.uname().nodename,
        "answerable": wait_s,
        "machineKey": key,
        "parentSessionId": variable(environ, b"CONTEXTUATE_PARENT_SESSION"),
    }
    if sys.argv[2:] and sys.argv[1] in ("--agent", "--answer"):
        about["agent"] = sys.argv[2]
    pid = environ.get(b"CLAUDE_PID", b"")
    if pid.isdigit() and len(pid) < 10:
        about["pid"], about["pidNamespace"] = int(pid), pid_namespace()
    if b'"session_id"' not in payload:
        about["sessionId"] = variable(environ, b"CLAUDE_CODE_SESSION_ID")
    if b'"cwd"' not in payload:
        try:
            about["cwd"] = posix.getcwd()
        except OSError:  # the directory has been removed
            pass
    head = f'{{"id":"{event_id}","timestamp":{time.time_ns() // 1_000_000}'
    for field, value in about.items():
        if value:
            head += f',"{field}":{quote(value) if type(value) is str else value}'
    if len(payload) < 4096 and b'"SessionStart"' in payload:
        values = [(it, variable(environ, it.encode())) for it in TERMINAL_VARIABLES.split()]
        head += f',"terminal":{{{",".join(f"{quote(it)}:{quote(value)}" for it, value in values if value)}}}'
    # In JSON, a line end occurs only between tokens, so a space can replace it.
    return f'{head},"{name}":'.encode() + payload.replace(b"\n", b" ").replace(b"\r", b" ") + b"}\n"


def pid_namespace() -> int:
    """Return the inode of this process's pid namespace; 0 is the machine's first one, 1 unknown."""
    try:
        inode = int(posix.readlink("/proc/self/ns/pid")[5:-1])  # "pid:[4026531836]"
    except OSError:
        inode = 1
    return inode if inode != 4026531836 and sys.platform == "linux" else 0  # PROC_PID_INIT_INO of Linux


def quote(text: str) -> str:
    """Return `text` as a JSON string, ASCII only."""
    if text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").replace("/", "").isalnum():
        return f'"{text}"'
    from _json import encode_basestring_ascii

    return encode_basestring_ascii(text)


def send(home: str, socket_path: str, line: bytes, kept: "Any" = None) -> str:
    """Send `line`; return "" or why it is not stored. Pauses for 10 s after three time-outs in a row."""
    import _socket

    path = home + "/hook.timeouts"  # one byte for each time-out in a row; its mtime is the time of the last
    try:
        about = posix.stat(path)
        count, age_s = about.st_size, time.time() - about.st_mtime
    except OSError:
        count, age_s = 0, 0.0
    if count >= 3 and 0 <= age_s < 10:
        return f"not sent, after {count} time-outs in a row, the last {age_s:.0f} s ago"
    deadline = time.monotonic() + ACKNOWLEDGEMENT_DEADLINE_S
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.settimeout(ACKNOWLEDGEMENT_DEADLINE_S)
        connection.connect(socket_path)
        if peer_uid(connection) != posix.getuid():
            return f"{socket_path} belongs to another user"
        connection.sendall(line)
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        outcome = "" if connection.recv(1) == ACKNOWLEDGEMENT else "the monitor closed the connection"
        if kept and not outcome:
            kept.append(connection)  # which is otherwise closed with its last reference
    except OSError as error:
        outcome = f"{type(error).__name__} {error}"
    try:
        if outcome and time.monotonic() >= deadline:
            fd = posix.open(path, APPEND | posix.O_CREAT, 0o600)
            posix.write(fd, b".")
            posix.close(fd)
        elif count:
            posix.unlink(path)
    except OSError:  # the file only saves time
        pass
    return outcome


def peer_uid(connection: "Any") -> int:
    """Return the user id of a Unix socket's other end; -1 if unknown."""
    if sys.platform == "linux":  # SOL_SOCKET, SO_PEERCRED: struct ucred {pid, uid, gid}
        credentials = connection.getsockopt(1, 17, 12)
    else:  # macOS SOL_LOCAL, LOCAL_PEERCRED: struct xucred {version, uid, …}
        credentials = connection.getsockopt(0, 1, 76)
    return int.from_bytes(credentials[4:8], sys.byteorder) if len(credentials) >= 8 else -1


def append_to_spool(directory: str, line: bytes) -> str:
    """Append `line` to the newest segment of the spool and return its path; raise OSError or ValueError."""
    import fcntl

    # No process waits for a lock: writers share it, and write only if the file still has its name; a drainer
    # renames a segment before it locks it. A newline precedes each line: one that is torn damages no other.
    for attempt in range(1000):
        path, is_new = current_segment(directory, attempt > 0)
        try:
            fd = posix.open(path, APPEND | posix.O_CREAT | posix.O_EXCL if is_new else APPEND, 0o600)
        except OSError:  # the drainer has just taken it, or it is no file of ours
            if is_new:
                raise
            continue
        try:
            about = posix.fstat(fd)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_ours = about.st_mode & 0o170000 == 0o100000 and about.st_uid == posix.getuid()
            is_full = about.st_size >= SEGMENT_LIMIT_BYTES
            if is_ours and not is_full and posix.stat(path).st_ino == about.st_ino:
                written = posix.write(fd, b"\n" + line)
                if written <= len(line):
                    raise ValueError(f"only {written} of {len(line)} bytes fitted into {path}")
                return path
        except (BlockingIOError, FileNotFoundError):
            pass  # the drainer has just taken it
        finally:
            posix.close(fd)
    raise ValueError(f"no segment in {directory} could be written")


def current_segment(directory: str, must_be_new: bool = False) -> "tuple[str, bool]":
    """Return (path of the segment to append to unless it is full, whether it is new); makes the spool."""
    newest, now_ms = "", time.time_ns() // 1_000_000
    try:
        newest = max((it for it in posix.listdir(directory) if it.endswith((".jsonl", ".taken"))), default="")
    except OSError:
        whole().make_spool(directory)
    start_ms = int(newest[:13]) if newest[:13].isdigit() else 0
    if newest.endswith(".jsonl"):
        if not must_be_new and now_ms - start_ms < 24 * 3600 * 1000:
            return f"{directory}/{newest}", False
        whole().drop_old_segments(directory)
    # Segments are read in the order of their names: a new one is the last, even if the clock was set back.
    return f"{directory}/{max(now_ms, start_ms + 1):013d}-{posix.urandom(4).hex()}.jsonl", True


def ensure_publisher(home: str) -> str:
    """Start a publisher unless one runs for `home`; return what was done, as text. Raises OSError."""
    import fcntl

    path = home + "/publisher.lock"  # held by a publisher; a new one inherits the locked file
    try:
        fd = posix.open(path, APPEND | posix.O_CREAT, 0o600)
    except OSError:
        fd = whole().open_for_append(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        given, fd = fd, fcntl.fcntl(fd, fcntl.F_DUPFD, 3)  # inherited; in the publisher 0 to 2 are /dev/null
        posix.close(given)
        python = publisher_python(home)
        pid = posix.posix_spawn(
            python,
            [python, "-E", (__file__.rpartition("/")[0] or ".") + "/emit_event.py", "--publish", str(fd)],
            posix.environ,
            file_actions=[(posix.POSIX_SPAWN_OPEN, to, "/dev/null", posix.O_RDWR, 0) for to in (0, 1, 2)],
            setsid=True,
        )
        return f"publisher started, process {pid}"
    except BlockingIOError:
        return "a publisher runs already"
    finally:
        posix.close(fd)


def publisher_python(home: str) -> str:
    """Return the interpreter with redis-py that `install` or `start` recorded, else the hook's own."""
    recorded = read_small(home + "/hooks/publisher-python").decode("utf-8", "surrogateescape")
    python = recorded.partition("\n")[0]
    return python if posix.access(python, posix.X_OK) else sys.executable  # none, or an upgrade removed it


def whole() -> "Any":
    """Return this whole file as a module, for functions too rare to be compiled at every call."""
    here = __file__.rpartition("/")[0] or "."
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    import emit_event

    return emit_event


if __name__ == "__main__":
    if sys.argv[1:2] == ["--publish"]:
        whole().run_publisher(int(sys.argv[2]))
    elif sys.argv[1:2] == ["--wait-at-redis"]:
        whole().wait_at_redis(sys.argv[2], int(sys.argv[3]))
    else:
        run_hook()

# --- end of the hot path ---

# ---------------------------------------------------------------------------
# Status line: hands on the figures that Claude Code gives to its status line, and shows the earlier line
#
# `install` writes this room to a module of its own, with all names of the hot path; the same rules apply.
# Owns: gauges/ in our directory, with the newest figures of each session.
# ---------------------------------------------------------------------------

GAUGES_INTERVAL_S = 5.0  # between two objects of a session that are handed on


def run_status_line(arguments: "list[str]") -> None:
    """Hand on new figures and show a line; `arguments`: the shell's LC_CTYPE, the earlier command."""
    payload, line = b"", ""
    try:
        payload = read_payload()
        session, figures, line = figures_in(payload.strip())
        kept = f"{places(posix.environ)[0]}/gauges/{session[-4:] if session[-4:].isalnum() else '--'}"
        about = f"{quote(session[:128])} {figures}".encode()
        if figures.strip("0. ") and read_small(kept) != about:
            in_background(hand_on_gauges, kept, about, payload.strip())
    except BaseException as error:  # the line is shown whatever happens
        in_background(lambda it: whole().log_failure(it), f"status line: {type(error).__name__}: {error}")
    if not arguments[1:]:
        posix.write(1, f"{line}\n".encode("utf-8", "replace"))
        posix._exit(0)
    import _signal

    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):  # Python ignores them
        _signal.signal(number, _signal.SIG_DFL)
    reading, writing = posix.pipe()
    if len(payload) <= 16384:  # fits into a new pipe, on macOS too
        posix.write(writing, payload)
    else:  # dup2 closes its reading end, so that a command that does not read ends this process
        in_background(lambda: posix.write(posix.dup2(writing, reading), payload))
    posix.dup2(reading, 0)
    posix.close(writing)
    environ = {**posix.environ, b"LC_CTYPE": arguments[0].encode("utf-8", "surrogateescape")}
    if not arguments[0]:
        del environ[b"LC_CTYPE"]  # Python sets one where there is none
    posix.execve("/bin/sh", ["/bin/sh", "-c", arguments[1]], environ)


def in_background(work: "Any", *arguments: "Any") -> None:
    """Call `work` in a process that outlives this one and is no child of it, as a client may end those."""
    if pid := posix.fork():
        posix.waitpid(pid, 0)
        return
    try:
        posix.setsid()
        if not posix.fork():
            null = posix.open("/dev/null", posix.O_RDWR)
            for fd in (0, 1, 2):  # the client waits for the end of the output
                posix.dup2(null, fd)
            work(*arguments)
    except BaseException as error:
        whole().log_failure(f"status line: {type(error).__name__}: {error}")
    finally:
        posix._exit(0)


def hand_on_gauges(kept: str, about: bytes, payload: bytes) -> None:
    """Hand on an object GAUGES_INTERVAL_S after the last one, unless the figures have changed by then."""
    sent = kept + ".sent"  # its mtime is when the last one was handed on
    try:
        write_atomically(kept, about)
    except OSError:
        whole().make_private_directory(kept.rpartition("/")[0])
        write_atomically(kept, about)
    try:
        wait_s = GAUGES_INTERVAL_S + posix.stat(sent).st_mtime - time.time()
    except OSError:
        wait_s = 0
    while 0 < wait_s <= GAUGES_INTERVAL_S and read_small(kept) == about:  # else a newer process waits
        time.sleep(min(0.5, wait_s))
        wait_s -= 0.5
    if read_small(kept) == about:
        write_atomically(sent, b"")
        deliver(payload, [], "statusLine")


def write_atomically(path: str, content: bytes, mode: int = 0o600) -> None:
    """Replace the file at `path`, or set a directory there aside, in one step: no reader sees half of it."""
    temporary = f"{path}.{posix.getpid()}.{posix.urandom(4).hex()}.tmp"
    fd = posix.open(temporary, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL | posix.O_CLOEXEC, mode)
    try:
        if posix.write(fd, content) < len(content):
            raise OSError(28, "No space left on device")
        try:
            posix.rename(temporary, path)
        except IsADirectoryError:
            whole().set_aside(path)
            posix.rename(temporary, path)
    except BaseException as error:
        posix.unlink(temporary)
        if isinstance(error, OSError):
            error.filename = path
        raise
    finally:
        posix.close(fd)


def figures_in(payload: bytes) -> "tuple[str, str, str]":
    """Return (session id, the figures that are compared, a line of our own) of a status line's object."""
    import _json

    class Options:  # of json.JSONDecoder
        strict = False
        object_hook = object_pairs_hook = None
        parse_float, parse_int, parse_constant = float, int, str

    given = _json.make_scanner(Options)(payload.decode("utf-8", "replace"), 0)[0]  # type: ignore[arg-type]

    def at(path: str, digits: int = -1) -> str:  # a text, or a number with so many digits
        value = given
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if digits < 0:
            return value if isinstance(value, str) else ""
        return f"{value:.{digits}f}" if type(value) in (int, float) and 0 <= value < 1e12 else ""

    context, cost = at("context_window.used_percentage", 0), at("cost.total_cost_usd", 2)
    figures = [context, cost, at("cost.total_lines_added", 0), at("cost.total_lines_removed", 0)]
    for window in ("five_hour", "seven_day"):
        figures += [at(f"rate_limits.{window}.{it}", 0) for it in ("used_percentage", "resets_at")]
    parts = (at("model.display_name"), context and f"{context} %", cost and f"${cost}")
    line = "".join(filter(str.isprintable, " · ".join(filter(None, parts))))
    return at("session_id"), " ".join(figures), line


# --- end of the status line ---

import base64  # none of these is for the hot path
import bisect
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import glob
import hashlib
import hmac
import inspect
import itertools
import json
import math
import os
import re
import signal
import stat
import subprocess
import threading
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

JsonObject = dict[str, Any]


# ---------------------------------------------------------------------------
# Common helpers: the time, numbers, and private files
#
# Every file is readable by this user only, never written through a link, and replaced whole or appended to.
# ---------------------------------------------------------------------------

NUMBERS = (int, float)  # types of numbers in JSON, for `type`: Python's bool is an int, too


def now_ms() -> int:
    """Return the time in milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def objects_in(value: Any) -> "list[JsonObject]":
    """Return the objects in a JSON list; [] for a value that is no list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def texts_of(content: Any) -> "list[str]":
    """Return the texts in the content of a message, without blank ones; thinking is no text."""
    blocks = [{"text": content}] if isinstance(content, str) else objects_in(content)
    return [it["text"] for it in blocks if isinstance(it.get("text"), str) and it["text"].strip()]


def make_private_directory(path: str) -> None:
    """Make `path` and its parents, for this user only; raise OSError if anything else has that name."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    if (about := os.lstat(path)).st_uid != os.getuid():
        raise PermissionError(f"{path} is not a directory of this user")
    if about.st_mode & 0o077:
        os.chmod(path, 0o700)


def make_spool(path: str) -> None:
    """Make the directory of the spool; rename anything else that has its name (`set_aside`)."""
    try:
        make_private_directory(path)
    except (PermissionError, FileExistsError):
        set_aside(path)
        make_private_directory(path)


def set_aside(path: str) -> None:
    """Rename a foreign file at one of our paths to `….foreign`; raise OSError in another user's directory."""
    if os.stat(os.path.dirname(path)).st_uid != os.getuid():
        raise PermissionError(f"{path} is not this user's")
    os.rename(path, f"{path}.{os.urandom(4).hex()}.foreign")


def open_own(path: str, flags: int = os.O_RDONLY) -> int:
    """Open a regular file of this user, also as opener of `open`; raise OSError for anything else."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC, 0o600)
    about = os.fstat(fd)
    if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid():
        return fd
    os.close(fd)
    raise PermissionError(errno.EPERM, "it is not a regular file of this user", path)


def open_for_append(path: str, _flags: int = 0) -> int:
    """Open a private file to append to, and make it if it is missing; also as opener of `open`."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        return open_own(path, flags)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in "EPERM EACCES EISDIR ELOOP ENXIO EOPNOTSUPP".split():
            raise  # nothing foreign is there: the disk or the system is at its limit
        set_aside(path)
        return open_own(path, flags)


def append_bounded(path: str, content: bytes, limit_bytes: int) -> None:
    """Append to a file; rename it to `….1` first if it is larger than the limit. Raises OSError."""
    if os.path.exists(path) and os.path.getsize(path) > limit_bytes:
        os.replace(path, path + ".1")
    with os.fdopen(open_for_append(path), "wb") as file:
        file.write(content)


# ---------------------------------------------------------------------------
# Config: one table of keys, read from one file
#
# Knows: which values each key accepts. Does not know: what they are used for.
# ---------------------------------------------------------------------------


class ConfigError(Exception):
    """A configuration that cannot be used; the message contains file, key and the expected value."""


class Key(NamedTuple):
    """One configuration key: its default, a description of its values, and a check."""

    default: Any
    expected: str
    accepts: Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def integer_key(default: int, low: int, high: int, null: str = "", about_low: str = "") -> Key:
    """Describe an integer; `null`: the meaning of null where it is allowed."""
    expected = f"an integer from {low}{about_low} to {high}" + (f", or null ({null})" if null else "")
    return Key(default, expected, lambda n: low <= n <= high if type(n) is int else n is None and null != "")


def _flag(default: bool) -> Key:
    return Key(default, "true or false", lambda value: isinstance(value, bool))


def _optional_text(what: str) -> Key:
    return Key(None, f"null or {what}", lambda value: value is None or _text(value))


def host_and_port(node: str, default_port: int) -> "tuple[str, int]":
    """Split "host", "host:port" or "[IPv6]:port"; raise ValueError for anything else."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/@\s]+))(?::([0-9]{1,5}))?", node)
    if match is None or not 0 < int(match[3] or default_port) < 65536:
        raise ValueError(f"not host:port: {node}")
    return match[1] or match[2], int(match[3] or default_port)


def _nodes(value: Any) -> bool:
    with contextlib.suppress(ValueError):
        return isinstance(value, list) and all(_text(node) and host_and_port(node, 1) for node in value)
    return False


def _redis_url(value: Any) -> bool:
    """True for a URL whose parts are unambiguous; a "/" or "#" in a password would end it early."""
    with contextlib.suppress(ValueError):  # of a port
        parts = urllib.parse.urlsplit(value if _text(value) else "")
        path = re.fullmatch("/.*" if parts.scheme == "unix" else r"(/\d{0,5})?", parts.path)
        is_known = parts.scheme in ("unix", "redis", "rediss") and parts.port != 0
        return is_known and path is not None and not parts.fragment
    return False


KEYS: dict[str, Key] = {
    "mode": Key("local", '"local" or "redis"', ("local", "redis").__contains__),
    "socketPath": Key(DEFAULT_SOCKET_PATH, "an absolute path of at most 100 bytes",
                      lambda it: _text(it) and re.fullmatch(rb"/.{0,99}", os.fsencode(it)) is not None),
    "redis.url": Key(None, "null or redis://[user[:password]@]host[:port][/db], rediss://… or unix://path, "
                     "special characters of a password percent-encoded",
                     lambda it: it is None or _redis_url(it)),
    "redis.host": Key("localhost", "a host name or an IP address", _text),
    "redis.port": integer_key(6379, 1, 65535),
    "redis.username": _optional_text("a user name"),
    "redis.password": _optional_text("a string"),
    "redis.db": integer_key(0, 0, 65535),
    "redis.channel": Key("contextuate:events", "a name of at most 200 characters",
                         lambda it: _text(it) and len(it) <= 200),
    "redis.tls": _flag(False),
    "redis.verify": _flag(True),
    **{f"redis.{name}File": _optional_text("a path") for name in ("ca", "cert", "key")},
    "redis.sentinels": Key([], 'a list of "host:port" (26379 is the default port)', _nodes),
    "redis.master": Key("mymaster", "the name that the sentinels have for the primary", _text),
    "redis.sentinelPassword": _optional_text("a string"),
    "redis.cluster": Key(False, 'true (redis.host is a node of a cluster), false, or a list of its nodes as '
                         '"host:port"', lambda it: isinstance(it, bool) or (_nodes(it) and it != [])),
    "redis.streamMaxLength": integer_key(10_000, 0, 10_000_000, about_low=" (no stream)"),
    "limits.fieldBytes": integer_key(1 << 20, 1024, 8 << 20),
    "answers.waitSeconds": integer_key(3600, 0, 86_400, about_low=" (off)"),
    "answers.backgroundSeconds": integer_key(20, 0, 300, about_low=" (off)"),
    "answers.remote": _flag(False),
    "privacy.redact": _flag(True),
    "privacy.level": Key("full", '"full" or "metadata"', ("full", "metadata").__contains__),
}  # fmt: skip
# Never shown: not in errors, logs, /api/config or on a command line.
SECRET_KEYS = ("redis.password", "redis.url", "redis.sentinelPassword", "notify")
_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|#[^\n]*|/\*.*?\*/', re.S)
_TRAILING_COMMA = re.compile(r'"(?:\\.|[^"\\])*"|,(?=\s*[}\]])', re.S)


def parse_relaxed_json(text: str) -> Any:
    """Parse JSON with `//`, `#` and `/* */` comments and trailing commas; raise ValueError with the line."""

    def blank(match: "re.Match[str]") -> str:
        return match[0] if match[0].startswith('"') else re.sub(r"[^\n]", " ", match[0])

    return json.loads(_TRAILING_COMMA.sub(blank, _COMMENT.sub(blank, text)))


def load_config(path: str, keys: "dict[str, Key]" = KEYS) -> "tuple[dict[str, Any], JsonObject]":
    """Return (the value of each key, by default without a file; what the file has); raise ConfigError."""
    values, flat = {name: key.default for name, key in keys.items()}, JsonObject()
    try:
        with open(path, encoding="utf-8-sig", opener=lambda p, f: os.open(p, f | os.O_NONBLOCK)) as file:
            text = file.read()
        given = parse_relaxed_json(text) if text.strip() else {}
    except FileNotFoundError:
        given = {}
    except (OSError, UnicodeDecodeError, TypeError) as error:  # TypeError: a FIFO without data
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected one JSON object, got {json.dumps(given)[:60]}")
    for name, value in given.items():
        if not any(key.startswith(name + ".") for key in keys):
            flat[name] = value
        elif isinstance(value, dict):
            flat.update((f"{name}.{inner}", inner_value) for inner, inner_value in value.items())
        else:
            raise ConfigError(f"{path}: {name}: expected an object, got {type(value).__name__}")
    for name in flat.keys() & keys.keys():
        values[name] = value = flat[name]
        if not keys[name].accepts(value):
            shown = "something else" if name in SECRET_KEYS else json.dumps(value)[:60]
            raise ConfigError(f"{path}: {name}: expected {keys[name].expected}, got {shown}")
    if values["mode"] == "redis" and "limits.fieldBytes" not in flat:
        values["limits.fieldBytes"] = 64 << 10  # every event crosses a network
    if values["redis.sentinels"] and values["redis.cluster"]:
        raise ConfigError(f"{path}: redis.sentinels and redis.cluster cannot both be used; remove one")
    return values, flat


def derive_hook_settings(home: str, config_path: str, key: str) -> "tuple[str, str]":
    """Return (mode, socket path) as configured, else the defaults; store "KEY MODE SOCKET" in hook.cache."""
    try:
        values = load_config(config_path)[0]
        mode, socket_path = values["mode"], values["socketPath"]
    except ConfigError as error:  # not cached, so that every call logs it until it is corrected
        whole().log_failure(f"defaults used: {error}")
        return "local", DEFAULT_SOCKET_PATH
    path, line = home + "/hook.cache", f"{key} {mode} {socket_path}\n".encode("utf-8", "surrogateescape")
    with contextlib.suppress(OSError):  # the cache only saves time
        make_private_directory(home)
        others = read_small(path).splitlines(True)[:7]  # of other files and views of this one
        write_atomically(path, line + b"".join(others))
    return mode, socket_path


def make_machine_key(home: str) -> str:
    """Return the random id in our directory, and make it if there is none; "" if that fails."""
    path = home + "/machine-key"
    with contextlib.suppress(OSError):
        make_private_directory(home)
        with os.fdopen(open_for_append(path), "wb", 0) as file, open(path, "rb") as reader:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not (key := reader.read(64).strip()).isalnum():
                key = os.urandom(8).hex().encode()
                file.truncate(0)
                file.write(key + b"\n")
        return key.decode()
    return ""


# ---------------------------------------------------------------------------
# Agents: the hooks of other programs, as Claude Code would send them
#
# It has no memory: a payload becomes one payload. A name that Claude Code's hooks do not have, such as
# SubagentPrompt, changes no state. Two fields are ours: `isPermitted` (its permission was given before) and
# `mayBeSubagent` (this Stop is perhaps a subagent's).
# Measured with the versions in `.docs/agents.md`, which says what each program cannot report.
# ---------------------------------------------------------------------------


class AgentFormat(NamedTuple):
    """How the payloads, transcripts and directories of a program differ from Claude Code's."""

    directory: str  # in the home directory
    variable: str = ""  # of the environment: another directory
    events: "dict[str, str]" = {}  # its name → Claude Code's
    fields: "dict[str, str]" = {}
    tools: "dict[str, str]" = {}
    adapt: "Callable[[str, JsonObject], str]" = lambda name, _: name  # changes the payload, returns the name
    transcript: str = ""  # below `directory`, where no payload contains it
    usage: "tuple[str, str, str]" = ("", "", "")  # type of a line with tokens, the object, the key
    counts: str = ""  # names in this object: input, output, read from cache, written to it


def adapt_codex(name: str, hook: JsonObject) -> str:
    """Find the agent that a call launched; the task of a subagent is no person's prompt."""
    if name == "PostToolUse" and hook.get("tool_name") == "Agent":
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):  # no JSON object
            launched = json.loads(hook["tool_response"])
            hook["tool_response"] = {**launched, "agentId": launched["agent_id"], "status": "async_launched"}
    return "SubagentPrompt" if name == "UserPromptSubmit" and "agent_id" in hook else name


_EXIT_CODE = re.compile(r"^Exit Code: [1-9]\d*$|completed with exit code [1-9]\d*>\s*\Z", re.M)


def adapt_gemini(name: str, hook: JsonObject) -> str:
    """Take the text of a result, and find failures and Esc in it."""
    if name == "Stop":
        hook.pop("prompt", None)  # of the turn that ends
    if hook.get("notification_type") == "ToolPermission":
        hook["notification_type"] = "permission_prompt"
    response = hook.get("tool_response")
    if name != "PostToolUse" or not isinstance(response, dict):
        return name
    content, shown, error = (response.get(it) for it in ("llmContent", "returnDisplay", "error"))
    text = "\n".join(texts_of(content))
    hook["tool_response"] = text or response
    if isinstance(shown, str) and "cancelled by user" in shown:
        return "Interrupt"  # and there is no AfterAgent
    if isinstance(error, dict):
        hook["error"] = error.get("message")
    elif hook.get("tool_name") == "Bash" and _EXIT_CODE.search(text):
        hook["error"] = text
    launched = re.search(r"^task_id: (\S+)", text, re.M) if hook.get("tool_name") == "Agent" else None
    if launched and isinstance(shown, dict) and shown.get("executionMode") == "background":
        hook["tool_response"] = {"agentId": launched[1], "status": "async_launched", "text": text}
    return "PostToolUseFailure" if "error" in hook else name


def adapt_qwen(name: str, hook: JsonObject) -> str:
    """Mark calls as permitted, for PreToolUse follows the permission; rename what a person did not do."""
    if name == "UserPromptSubmit" and hook.get("prompt") == "":
        return "ToolsReturned"
    if name == "Notification" and hook.get("notification_type") == "idle_prompt":
        if "agent_id" in hook:
            return "SubagentNotice"
        hook["notification_type"] = "prompt_shown"
    if name == "PreToolUse":
        hook["isPermitted"] = True
    return adapt_gemini(name, hook)


def adapt_copilot(name: str, hook: JsonObject) -> str:
    """Name the events that have no name, and put a subagent's events under its session."""
    if not name:
        # A PermissionRequest comes for every call; only the Notification means that a dialog is open.
        name = "SubagentStart" if "agentName" in hook else "PermissionCheck"
    if hook.get("agent_id") and hook.get("agent_id") == hook.get("session_id"):
        hook["session_id"] = hook.get("parent_agent_id")
        name = {"UserPromptSubmit": "SubagentPrompt", "Stop": "SubagentTurn"}.get(name, name)
    result = hook.get("tool_response")
    if isinstance(result, dict) and isinstance(result.get("text_result_for_llm"), str):
        hook["tool_response"] = text = result["text_result_for_llm"]
        if name == "PostToolUse" and hook.get("tool_name") == "Bash" and _EXIT_CODE.search(text):
            name, hook["error"] = "PostToolUseFailure", text
    if name == "ErrorOccurred" and "error" in hook and hook.get("error_context") == "model_call":
        name, hook["error"], hook["error_details"] = "StopFailure", "error", hook["error"]
    return name


def adapt_kimi(name: str, hook: JsonObject) -> str:
    """Unpack prompts; subagents have a name and no id."""
    if isinstance(hook.get("prompt"), list):
        hook["prompt"] = "\n".join(texts_of(hook["prompt"]))
    if hook.get("agent_id") == "main":
        del hook["agent_id"]
    if name in ("SubagentStart", "SubagentStop"):
        hook["agent_id"] = hook["agent_type"] = hook.get("agent_name")
    if name == "Stop":
        hook["mayBeSubagent"] = True
    return name


_GEMINI_TOOLS = {
    "run_shell_command": "Bash", "read_file": "Read", "write_file": "Write", "replace": "Edit",
    "edit": "Edit", "glob": "Glob", "list_directory": "LS", "search_file_content": "Grep",
    "grep_search": "Grep", "web_fetch": "WebFetch", "google_web_search": "WebSearch",
    "web_search": "WebSearch", "ask_user": "AskUserQuestion", "ask_user_question": "AskUserQuestion",
    "invoke_agent": "Agent", "agent": "Agent", "task": "Agent", "todo_write": "TodoWrite",
    "write_todos": "TodoWrite",
}  # fmt: skip
AGENTS = {
    "codex": AgentFormat(
        ".codex", "CODEX_HOME", tools={"request_user_input": "AskUserQuestion", "spawn_agent": "Agent"},
        adapt=adapt_codex, usage=("token_usage_record", "usage", "response_id"),
        counts="input_tokens output_tokens cached_input_tokens cache_write_input_tokens",
    ),
    "gemini": AgentFormat(
        ".gemini", tools=_GEMINI_TOOLS, fields={"prompt_response": "last_assistant_message"},
        events={"BeforeAgent": "UserPromptSubmit", "BeforeTool": "PreToolUse", "AfterTool": "PostToolUse",
                "AfterAgent": "Stop"},
        adapt=adapt_gemini, usage=("gemini", "tokens", "id"), counts="input output cached -",
    ),
    "copilot": AgentFormat(
        ".copilot", "COPILOT_HOME", fields={"tool_result": "tool_response"}, adapt=adapt_copilot,
        transcript="session-state/{}/events.jsonl", usage=("session.usage_record", "usage", "apiCallId"),
        counts="inputTokens outputTokens cacheReadTokens cacheWriteTokens",
    ),
    "qwen": AgentFormat(
        ".qwen", tools=_GEMINI_TOOLS, adapt=adapt_qwen, usage=("assistant", "usageMetadata", "uuid"),
        counts="promptTokenCount candidatesTokenCount cachedContentTokenCount -",
    ),
    "kimi": AgentFormat(
        ".kimi-code", "KIMI_CODE_HOME",
        fields={"tool_call_id": "tool_use_id", "error_type": "error", "error_message": "error_details"},
        adapt=adapt_kimi, transcript="sessions/*/{}/agents/*/wire.jsonl",
        usage=("usage.record", "usage", ""), counts="inputOther output inputCacheRead inputCacheCreation",
    ),
}  # fmt: skip


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def agent_of(hook: JsonObject) -> str:
    """Return the program that a payload itself proves; "": Claude Code or unknown."""
    if hook.get("client_type") == "kimi_code_cli":
        return "kimi"
    if hook.get("hookName") == "permissionRequest" or "initial_prompt" in hook:
        return "copilot"  # it runs the hooks of a project's `.claude/settings.json`
    match = re.search(r"/\.(codex|gemini|copilot|qwen|kimi)(?:-code)?/", str(hook.get("transcript_path")))
    return match[1] if match else ""


def agent_directory(name: str) -> str:
    """Return the directory of a program's settings and sessions, as its variable or by default."""
    return os.environ.get(AGENTS[name].variable) or os.path.expanduser(f"~/{AGENTS[name].directory}")


def like_claude(agent: str, given: JsonObject) -> JsonObject:
    """Return a payload of a program's hook in the form of Claude Code's."""
    about = AGENTS[agent]
    hook = {about.fields.get(field, field): value for field, value in given.items()}
    name, tool = (_string(hook.get(field)) for field in ("hook_event_name", "tool_name"))
    if tool in about.tools:
        hook["tool_name"] = about.tools[tool]
    if isinstance(hook.get("error"), dict):
        hook["error"] = hook["error"].get("message")
    hook["hook_event_name"] = about.adapt(about.events.get(name, name), hook)
    session_id = _string(hook.get("session_id"))
    if about.transcript and re.fullmatch(r"[\w-]+", session_id):
        hook["transcript_path"] = f"{agent_directory(agent)}/{about.transcript.format(session_id)}"
    return hook


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
    "Interrupt": "interrupted", "PermissionResult": "permission_result",  # other programs' hooks
}  # fmt: skip

# Payload field → name in `data`. Of two fields with one name the first wins, the other keeps its own.
DATA_NAMES = {
    "tool_name": "toolName", "tool_input": "toolInput", "tool_use_id": "toolUseId",
    "tool_response": "toolOutput", "tool_output": "toolOutput",
    "message": "message", "prompt": "message", "last_assistant_message": "assistantResponse",
    "error": "error", "model": "model", "source": "source", "reason": "reason",
    "transcript_path": "transcriptPath", "duration_ms": "durationMs", "permission_mode": "permissionMode",
    "notification_type": "notificationType",
}  # fmt: skip

# Payload field → field of the event; a value of another type is content.
_EVENT_NAMES = {
    "session_id": "sessionId", "cwd": "workingDirectory", "hook_event_name": "hookType",
    "agent_id": "agentId", "agent_type": "agentType",  # alone: of an `--agent` session's main thread
}  # fmt: skip
_PLACES: dict[str, Optional[str]] = {**DATA_NAMES, **dict.fromkeys(_EVENT_NAMES)}  # None: not in `data`
# Of an event, not of the wrapper around a payload: in a wrapper it is content.
_EVENT_ONLY = frozenset(("agentId", "agentType", "workingDirectory", "hookType", "eventType", "data"))
# Name of a payload field in camel case, as VS Code's agent and others send some → its name in Claude Code.
_CAMEL_CASE = {
    re.sub("_(.)", lambda match: match[1].upper(), field): field
    for field in (*_PLACES, *"is_interrupt error_details prompt_id session_title tool_calls background_tasks "
                  "to_model stop_hook_active mcp_server_name agent_transcript_path new_cwd "
                  "permission_suggestions".split())
    if "_" in field
}  # fmt: skip
_ID_LIMIT = 256  # characters


class MalformedEvent(ValueError):
    """A line is not one JSON object."""


_parse_json = json.JSONDecoder(parse_constant=str).decode
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


def parse_event_line(line: bytes) -> JsonObject:
    """Parse one line into a JSON object; raise MalformedEvent with the reason for anything else."""
    text = line.decode("utf-8", "replace")
    try:  # NaN and infinities become strings
        try:
            value = _parse_json(text)
        except ValueError:  # perhaps only for an integer longer than Python converts
            value = json.loads(text, parse_constant=str, parse_int=lambda it: it if it[4000:] else int(it))
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise MalformedEvent(f"expected one JSON object, got {type(value).__name__}")
    return value


def is_json_object(data: bytes) -> bool:
    """True if `data` is one whole JSON object."""
    with contextlib.suppress(MalformedEvent):
        return parse_event_line(data) is not None
    return False


def read_state(path: str, limit_bytes: int = -1) -> JsonObject:
    """Return the JSON object in a file of this user; {} if it is missing, unusable or above the limit."""
    with contextlib.suppress(OSError, MalformedEvent), open(path, "rb", opener=open_own) as file:
        return parse_event_line(file.read(limit_bytes))
    return {}


def encode_json(value: Any) -> bytes:
    """Encode to one line of compact ASCII JSON: lone surrogates stay escaped, infinities become strings."""
    try:
        return _to_json(value).encode("ascii")
    except ValueError:
        return _to_json(json.loads(json.dumps(value), parse_constant=str)).encode("ascii")


def build_event(given: JsonObject, received_ms: int, machine_id: str) -> JsonObject:
    """Build an event (`.docs/protocol.md`) from any object; what has a wrong type is kept in `data`."""
    about = {name: value for name, value in given.items() if name not in ("seq", "received")}
    is_event, is_hook = isinstance(given.get("eventType"), str), isinstance(given.get("hook_event_name"), str)
    is_wrapped = not is_event and isinstance(given.get("id"), str)
    if is_wrapped and isinstance(given.get("hook"), dict):
        about, data = _fields_of_hook(about.pop("hook"), about)
    elif is_wrapped and isinstance(given.get("statusLine"), dict):
        about, data = _fields_of_status_line(about.pop("statusLine"), about)
    elif is_hook or "eventType" not in given and isinstance(given.get("hookEventName"), str):
        about, data = _fields_of_hook(given, {})
    elif is_event:
        content = about.pop("data", None)
        data = dict(content) if isinstance(content, dict) else {} if content is None else {"data": content}
    else:
        about, data = {}, dict(given)
    event: JsonObject = {
        "id": "", "timestamp": received_ms, "sessionId": "unknown", "machineId": machine_id,
        "workingDirectory": "", "hookType": "", "eventType": "message",
    }  # fmt: skip
    for name, value in about.items():
        if name not in _EVENT_CHECKS or _EVENT_CHECKS[name](value):
            event[name] = value
        elif value is not None:
            _keep(data, name, value)
    event["hookType"], event["eventType"] = event["hookType"][:_ID_LIMIT], event["eventType"][:_ID_LIMIT]
    event.update(id=event["id"] or str(uuid.uuid4()), timestamp=int(event["timestamp"]), data=data)
    return event


def _fields_of_hook(hook: JsonObject, wrapper: JsonObject) -> "tuple[JsonObject, JsonObject]":
    """Return (fields of the event, data) of a payload."""
    is_known = "hook_event_name" in hook and "session_id" in hook
    if not is_known:
        hook = {it if _CAMEL_CASE.get(it, it) in hook else _CAMEL_CASE[it]: hook[it] for it in hook}
    if not is_known or "agent" in wrapper or "pid" not in wrapper:  # only Claude Code names its process
        agent = _string(wrapper.get("agent")) or agent_of(hook)
        if agent in AGENTS:
            hook, wrapper = like_claude(agent, hook), {**wrapper, "agent": agent}
    terminal = wrapper.pop("terminal", None)
    known = [it for it in TERMINAL_VARIABLES.split() if it in terminal] if isinstance(terminal, dict) else ()
    plain = {it: re.sub(r"[\x00-\x1f\x7f-\x9f]", "", _string(terminal[it]))[:200] for it in known}
    data: JsonObject = {"terminal": plain} if plain else {}
    for field, value in hook.items():
        if (place := _PLACES.get(field, field)) in data:
            _keep(data, field, value)
        elif place is not None:
            data[place] = value
    for name in _EVENT_ONLY & wrapper.keys():
        _keep(data, name, wrapper.pop(name))
    about = {"workingDirectory" if name == "cwd" else name: value for name, value in wrapper.items()}
    for field, name in _EVENT_NAMES.items():
        if field in hook:
            value = hook[field]
            if _EVENT_CHECKS[name](value) and (name != "agentType" or "agentId" in about):
                if about.get(name) not in (None, value):
                    _keep(data, name, about[name])
                about[name] = value
            else:
                _keep(data, field, value)
    about["eventType"] = EVENT_TYPES.get(about.get("hookType", ""), "message")
    return about, data


def _fields_of_status_line(line: JsonObject, wrapper: JsonObject) -> "tuple[JsonObject, JsonObject]":
    """Return (fields of the event, data) of a status line: the client's own objects with the figures."""
    wrapper.pop("cwd", None)
    about = {name: line[field] for field, name in _EVENT_NAMES.items() if field in line}
    kept = ("context_window", "cost", "rate_limits", "prompt_cache")
    data: JsonObject = {"gauges": {name: line[name] for name in kept if name in line}}
    data.update({"effort": line["effort"]} if "effort" in line else {})
    if isinstance(line.get("model"), dict):
        data["model"] = line["model"].get("id")
    return {**wrapper, **about, "hookType": "", "eventType": "status_line"}, data


def _keep(data: JsonObject, name: str, value: Any) -> None:
    """Put a value into `data` under its name; append `_` to a name that is in use."""
    while name in data:
        name += "_"
    data[name] = value


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _ID_LIMIT


_EVENT_CHECKS: dict[str, Callable[[Any], bool]] = {
    "id": _is_id, "timestamp": lambda value: type(value) in (int, float) and 0 < value < 1e14,
    **dict.fromkeys(("sessionId", "machineId", "machineKey", "agent", "agentId", "parentSessionId"), _is_id),
    **dict.fromkeys(("workingDirectory", "agentType"), lambda it: isinstance(it, str) and len(it) <= 4096),
    "pid": lambda value: type(value) is int and 0 < value < 1 << 31,
    "pidNamespace": lambda value: type(value) is int and 0 < value < 1 << 32,
    "answerable": lambda value: type(value) is int and 0 < value <= 86_400,
    **dict.fromkeys(("hookType", "eventType"), lambda value: isinstance(value, str)),
    "data": lambda value: isinstance(value, dict),
}  # fmt: skip
_REQUIRED = {*"id timestamp sessionId machineId workingDirectory hookType eventType data".split()}
_EVENT_FIELDS = frozenset((*_EVENT_CHECKS, "demo"))


def is_whole_event(event: JsonObject) -> bool:
    """True if an event has every required field, each of its type."""
    fits = all(check(event[name]) for name, check in _EVENT_CHECKS.items() if name in event)
    return fits and event.keys() >= _REQUIRED


def this_machine() -> str:
    """Return this machine's name: CONTEXTUATE_MACHINE_ID, else the host name."""
    return os.environ.get("CONTEXTUATE_MACHINE_ID") or os.uname().nodename or "unknown"


# ---------------------------------------------------------------------------
# Redaction: secrets out, long fields cut, before an event is stored or sent on
#
# Knows: the shapes of secrets. Best effort: a secret of an unknown shape is not found.
# ---------------------------------------------------------------------------


class SecretShape(NamedTuple):
    """One kind of secret. A text without its `hint` contains none, which is fast to check.

    A pattern begins with a fixed text. It must need nothing after an unbounded run that may overlap with the
    next one: its time would be quadratic. Its last group that matched, else the match, is replaced.
    A `folded` one matches the text in lower case; a token's is what follows its hint, which begins a word.
    """

    kind: str
    hint: str
    pattern: str  # compiled when its hint is found, since most never are
    folded: bool = False
    is_secret: "Optional[Callable[[_View, re.Match[str], str], bool]]" = None  # of (view, match, value)
    is_token: bool = False
    rank: int = 0  # of two shapes at one place, the one with the lower rank gives the kind


# Names: the words at the end of a name decide whether its value is a secret, in JSON and in text.
_NAME_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NAME_BEFORE = re.compile(r"[\w.-]*")  # in a reversed text, as the next one
_KEY_LINES_BEFORE = re.compile(r"(?:\n\r?[\w+/=]{1,76}){0,2}(?:\n\r?[\w+/=]{40,76})+(?![^\n\"'`])|")
# What may follow in a name without changing what it is: SECRET_KEY_BASE, DB_PASS_PROD, token2.
_NEUTRAL_WORDS = frozenset(
    "b base data default dev development enc encrypted hex live new old pem plain plaintext primary prod "
    "production raw salt secondary staging str string test text val value".split()
)
_PASS_OWNERS = (  # dbPass and dbpass are passwords, renderPass is none
    "account admin api app client database db email ftp http imap key ldap login mail mongo my mysql pg "
    "become postgres proxy redis require root server sftp smtp sql ssh store sudo svn user vpn web wifi"
)
_KEY_OWNERS = (
    "access account activation admin aes api app auth cipher client consumer crypto deploy encryption fernet "
    "hmac ingest ingestion jwt license master preshared private recovery secret server service session "
    "shared signing ssh storage subscription unseal webhook write"
)
_PASSWORD_ENDS = (*"password passwd passphrase passcode passwort pwd pw".split(),
                  *(it + "pass" for it in _PASS_OWNERS.split()))  # fmt: skip
_SECRET_ENDS = (*"secret token credential credentials creds authorization bearer cookie".split(),
                *(it + "key" for it in _KEY_OWNERS.split()))  # fmt: skip
_OTHER_KEYS = frozenset("cache foreign hash index map object partition primary public sort unique".split())
_OTHER_TOKENS = frozenset("bos cancellation cls eos mask max min pad sep unk".split())


@functools.lru_cache(maxsize=4096)
def _name_class(name: str) -> str:
    """Return "password" or "secret" for the name of one, "weak" if the value decides, else ""."""
    words = [word.lower() for word in _NAME_WORD.findall(name[-200:].replace("\u212a", "k"))]
    while len(words) > 1 and (words[-1] in _NEUTRAL_WORDS or words[-1].isdigit()):
        words.pop()
    if not words or "[redacted:" in name:
        return ""
    owner, last = (words[-2] if len(words) > 1 else ""), words[-1]
    if (owner + last).endswith(_PASSWORD_ENDS) or last == "pass" and owner and name.isupper():
        return "password"
    if (owner + last).endswith(_SECRET_ENDS):
        return "" if owner in _OTHER_TOKENS else "secret"
    return "weak" if last in ("pass", "auth") or last == "key" and owner and owner not in _OTHER_KEYS else ""


# Values that are no secrets: references to one, placeholders, names.
_HARMLESS = re.compile(
    r"(?:(?:[Bb]asic|[Bb]earer|[Tt]oken)\s+)?(?:[<{\[%^\\]|\$(?![\d$]))|\(\?|!|--|\.[*+]|https?://[\w.:/-]*$|\W+$"
    r"|(?:op|vault|file|ref)[:+]|arn:aws|(?:self|this|os|process|config|settings|env|args|e|t|secrets|vars?|data"
    r"|local|module|request|req|params|ctx|props|state|options|opts|System|import)\.[A-Za-z_]"
    r"|(?i:true|false|yes|no|on|off|none|null|nil|undefined|include|omit|same-origin|required|optional|string"
    r"|number|boolean|object|empty|unset|hidden|inherit|changeme|(?P<same>.)(?P=same)+|\.+|v?\d+(?:\.\d+)+"
    r"|your?[-_ ].*|x{3,}.*|(?:basic|bearer|token)\s?)$"
    r"|(?:~|\.{1,2}|[A-Za-z]:)?(?!\S*[A-Za-z0-9]{20})[/\\](?:[\w.@-]{0,40}[/\\])*[\w.@-]{0,40}$"  # a path
)
_IDENTIFIER = re.compile(r"[A-Za-z_$]+$|[A-Za-z_$][\w$]*(?:\.[A-Za-z_$][\w$]*)+$")
_SAYS_SECRET = re.compile(r"pass|secret|token|key|credential", re.I)
_LINE_START = re.compile(r"(?:\S+:\d+:|.*\": ?)?[\s>+*|\"'`#/-]*(?:\d+[:\s]\s*)?(?:export\s+)?[\"'`]?$")
# What precedes NAME VALUE in an assignment: an option, netrc, fish, Docker, C, aws configure.
_SETS = re.compile(
    r"(?im)(?:(?<![\w-])--?(?:[a-z0-9]+-)*|(?:\bmachine\s+\S+|^\s*default)\s+(?:(?:login|account)\s+\S+\s+)*"
    r"|^\s*login\s+\S+\s+|\bset(?:x|env)?\s+(?:-\w+\s+)*"
    r"|#\s*define\s+|(?:^|[:\t+\"])\s*(?:ENV\s+|ARG\s+|(?=require\Z))|\bconfig(?:ure)?\s+(?:set\s+|-\S+\s+)*(?:\S+\.)?|:_?)[\w.-]*\Z"
)
_SQL = re.compile(r"(?:\b(?:user|role|login|encrypted|with|identified|alter|set)\b|,)[^;]{0,120}$", re.I)
_NAMES_ENTRY = re.compile(r"[<:]$|<(?:key|name)>$|(?:name|key|id)[\"']?\s?[:=]\s?[\"']?[\w.:/-]*$", re.I)


def _is_weak_secret(name: str, value: str) -> bool:
    """True if the value looks like a secret; `name` alone does not decide (_name_class: "weak")."""
    if name.lower().endswith("pass"):
        return len(value) >= 5 and any(map(str.isdigit, value)) and sum(map(str.isalpha, value)) > 1
    if re.match(r"(?=.*\d.*\d)(?=.*[A-Za-z].*[A-Za-z])[\w+/.~=-]{16,}$", value):
        return True
    with contextlib.suppress(ValueError):  # `user:password` as Docker and npm write it
        return ":" in base64.b64decode(value, validate=True).decode()
    return False


def _is_assigned_secret(view: "_View", match: "re.Match[str]", value: str) -> bool:
    """True if a name that is followed by a value contains a secret, and is no code."""
    text, start, group = view.text, match.start(), str(match.lastgroup)
    head = str(_NAME_BEFORE.match(text[max(0, start - 60) : start][::-1])[0])[::-1]  # type: ignore[index]
    name = (head + text[start : match.end("tail")]).strip(".-")
    kind = _name_class(name)
    if group == "quoted" and kind:
        value = text[match.start(group) : view.closing_quote(match.start(group) - 1)][:200]
    is_harmless = _HARMLESS.match(value) or name.lower().endswith(value.lower()) or len(value) < 3
    if not kind or is_harmless or kind == "weak" and not _is_weak_secret(name, value):
        return False
    before = text[max(0, start - len(head) - 160) : start - len(head)]
    digits, has_space, says_secret = sum(map(str.isdigit, value)), " " in value, _SAYS_SECRET.match(value)
    is_likely = digits > 0 or name.isupper() or kind == "password" and re.search(r"\w[!@#$%^&*]", value)
    if group == "quoted" and (match["named"] and match["operator"][-2:] != "? " or match["operator"] == "="):
        return not has_space or not _SAYS_SECRET.search(value)  # "password": "Enter your password"
    if group == "quoted":
        return bool(is_likely) and not has_space and _is_value(view, match, value)
    if group == "bare":
        return _is_bare_secret(match, before, name, value, bool(is_likely))
    if group in ("element", "attribute"):  # <password>…</password>, <add key="password" value="…"/>
        return bool(_NAMES_ENTRY.search(before[-60:]) or "{" in text[start : match.start(group)])
    if group == "argument":  # define('DB_PASSWORD', '…')
        return digits > 1 or bool(re.search(r"(?:define|set|put|add|header)\w*\s?\(\s*[\"']$", before, re.I))
    is_sql = match["quote"] == "'" and _SQL.search(before + head)  # NAME VALUE, or in a list
    is_value = match["quote"] or is_likely or re.search("machine|default|login", before + head)
    return bool(is_sql or is_value and not says_secret and _SETS.search(before + head))


def _is_bare_secret(match: "re.Match[str]", before: str, name: str, value: str, is_likely: bool) -> bool:
    operator, after = match["operator"], match.string[match.end() : match.end() + 1]
    if value.isdigit():
        return len(value) >= 6
    is_word, ends_line = _IDENTIFIER.match(value), after in "\r\n\"'#" or len(value) > 199
    is_code = match["named"] or after in tuple("<`[") or re.search(r"[\[\]]|^[\w.]*\($", value + after)
    if is_code or name == "PASS" and ":" in operator or is_word and _SAYS_SECRET.match(value):
        return False
    if operator == "=":  # `f(token=name, …)` is code; a name in capitals is a variable of a shell
        is_connection = after == ";" and (before[-1:] == ";" or name[:1].isupper())
        return name.isupper() or is_connection or after not in tuple("),;{}") or not is_word
    if len(value) < 5 or after in tuple(";{)") or "|" in operator and before.rstrip()[-1:] != "|":
        return False
    if is_likely and ends_line and ":" in operator and _LINE_START.match(before.rpartition("\n")[2]):
        return True
    if "@" in value or is_word and "." in value:
        return False
    is_random = sum(map(str.isdigit, value)) > 1 and len(value) >= 6
    is_random |= len(re.findall("[A-Z](?=[A-Z])", value)) >= 3 <= len(re.findall("[a-z](?=[A-Z])", value))
    return is_random and (ends_line or "=" not in operator)


def _key_start(text: str, end: int) -> int:
    """Return where the lines of a private key before `end` begin; `end` if there are none."""
    begin = max(0, text.rfind("-", 0, end))  # no such line has a dash
    return end - len(_KEY_LINES_BEFORE.match(text[begin:end][::-1])[0])  # type: ignore[index]


def _is_value(_view: "_View", _match: "re.Match[str]", value: str) -> bool:
    return not (_HARMLESS.match(value) or _IDENTIFIER.match(value) and _SAYS_SECRET.search(value))


def _folded(kind: str, hint: str, rest: str, is_secret: Any = None) -> SecretShape:
    return SecretShape(kind, hint, re.escape(hint) + rest, True, is_secret)


# What follows the word of a name: its rest, then the value after an operator, in XML, as a second argument or
# behind a space. At most 200 characters of the value, which are enough to decide: _REST matches the rest.
_ASSIGNED = (
    r"(?=(?P<tail>[\w.-]{0,30}))(?P=tail)(?:"  # without backtracking, which would be slow in a long word
    r"(?P<named>[\"'`\]]{1,3})?(?:[ \t](?:is|for[ \t][\w.@-]{1,40})(?=:)"
    r"|[ \t]{0,2}:?[ \t]{0,2}[&*]?[a-z][\w.]{1,15}(?:\[\w*\])?(?=[ \t]{1,8}=)| \{\s{1,40}"
    r"(?:type\s{1,8}= \w+\s{1,40})?default(?=\s{1,8}=))?(?P<operator>[ \t]{0,20}(?:=>|[:?+|]{0,2}=(?![=~>])"
    r"|={2,3}(?= ?[\"'`])|\*{0,2}:\*{0,2}(?![:=])|(?:\(|[|?]{2} ?)(?=[\"'`])|ist?\b(?! [a-z]*-?\d+\b)|\|"
    r"(?= `?[^\s|]{12,200} ?\|))(?:[ \t]{0,4}(?:[|>][+-]?[ \t]{0,4})?\\?\r?\n[ \t]{0,40}|[ \t]{0,20}))"
    r"(?:[nbfrlu@$]{0,2}(?P<opening>[\"'`])(?P<quoted>(?![ \t])(?:(?!(?P=opening))[^\r\n]){1,200})|"
    r"(?P<bare>[^\s\"'`,;&|()<>{}]{4,200}))|(?:[\"']?>(?:\s{0,40}<(?:!\[cdata\[|value>))?"
    r"|</key>\s{0,40}<string>|</name>\s{0,40}<value>)\s{0,40}(?P<element>[^\s<>]{3,200})\s{0,40}[<\]]|[\"']?"
    r"(?:,|: ?\{)?\s{0,40}(?:\"type\": ?\"\w+\",\s{0,40})?[\"']?value[\"']?\s?[:=]\s?[\"']?"
    r"(?P<attribute>[^\"'<>\r\n]{3,200})|[\"']\s{0,8},\s{0,20}[\"'](?:(?P<argument>[^\"'\r\n]{3,200})"
    r"(?=[\"']\s{0,8}(?:,\s?[\"']?\w+[\"']?)?\))|(?P<item>[^\s\"']{3,200})(?=[\"']\s?[],]))|[ \t]{1,20}"
    r"(?P<quote>[\"'])?(?P<spaced>[^\s\"'`|;&(){}<>=,:][^\s\"'`;|&<>]{3,200}))"
)
_ENV_LINE = re.compile(r"\s*(?:export\s+)?[A-Z][A-Z0-9_]*=$")
_REST, _ENV_REST = re.compile(r"[^\s\"'`,;&|()<>{}]*"), re.compile(r"[^\s\"'`;]*")  # without quotes around


def _command(hint: str, option: str, program: str = r"(?<![\w.]{hint})\w{0,9}") -> SecretShape:
    program = program.replace("{hint}", hint)  # the next one ends it, or many would search the same text
    rest = rf"(?:[^\n|;{hint[0]}]|{hint[0]}(?!{hint[1:]}{program})|\\\n){{0,400}}?\s(?:{option})"
    return _folded("command-line", hint, program + rest, _is_value)


# Tokens by their beginnings, as their makers describe them: what follows, then each kind with its beginnings.
# One that does not begin with A or E and does not end with - _ or . costs a search of its own.
_TOKEN_TABLE = r"""
[A-Za-z0-9_.=+/%~-]{20,}  anthropic: sk-ant- openai: sk-proj- sk-svcacct- sk-admin- sk-or-v1- sk-kimi- sk-lf-
    aws: amzn.mws. amzn1.oa2-cs.v1. ABSK bedrock-api-key- heroku: HRKU- supabase: sbp_ sb_secret_ mongodb:
    mdb_sa_sk_ llamaindex: llx- polar: polar_oat_ pinecone: pcsk_ aiven: AVNS_ cockroach: CCDB1_ vault: hvs.
    hvb. hvr. docker: dckr_pat_ dckr_oat_ circleci: CCIPAT_ CCIPRJ_ paddle: pdl_live_apikey_ pdl_sdbx_apikey_
    wandb: wandb_v1_ midtrans: SB-Mid-server- Mid-server- openvsx: ovsxat_ ovsxp_ together: tgp_v1_ zuplo:
    zpka_ tavily: tvly- tvly-dev- tvly-prod- contentful: CFPAT- defined: dnkey- unkey: unkey_ square: sq0atp-
    sq0csp- gitlab: GR1348941 glpat- glptt- gldt- glrt- glrtr- glcbt- glft- glimt- glagent- gloas- glsoat-
    glffct- glwt- postman: PMAK- brevo: xkeysib- xsmtpsib- age: AGE-SECRET-KEY- grafana: glsa_ glc_
    cloudflare: cfut_ cfat_ cfk_ cfoc_ v1.0- langsmith: lsv2_pt_ lsv2_sk_ sourcegraph: sgp_ github: ghp_ gho_
    ghu_ ghs_ ghr_ github_pat_ tencent: AKID netlify: nfp_ nfc_ nfo_ nfu_ infracost: ico-
    huggingface: api_org_ xai: xai- perplexity: pplx- replicate: r8_ cerebras: csk- runpod: rpa_ apify:
    apify_api_ posthog: phx_ phs_ prefect: pnu_ pnb_ linear: lin_api_ lin_oauth_ notion: ntn_ adobe: p8e-
    artifactory: AKCp cmVmd clojars: CLOJARS_ easypost: EZAK EZTK workos: wos_ adafruit: aio_ readme: rdme_
    google: AIza ya29. GOCSPX- yandex: AQVN t1. y0_ nvidia: nvapi- jina: jina_ pypi: pypi- openshift: sha256~
    figma: figd_ figo_ figoh_ scalingo: tk-us- snyk: snyk_uat. snyk_sat. doppler: dp.pt. dp.st. dp.st.dev.
    dp.st.prd. dp.ct. dp.sa. dp.scim. dp.audit. planetscale: pscale_tkn_ pscale_oauth_ pscale_pw_ bitbucket:
    ATATT3 ATCTT3 BBDC- typeform: tfp_ duffel: duffel_live_ duffel_test_ frameio: fio-u- dynatrace: dt0c01.
    dt0s01. dt0s02. dt0s16. fly: fo1_ fm1a_ fm1r_ fm2_ sentry: sntrys_ sntryu_ sntrya_ sendgrid: SG. harness:
    pat. sat.
[A-Za-z0-9]{20,}  openai: sk- sess- bitbucket: ATBB ATTA render: rnd_ fireworks: fw_ vercel: vcp_ vci_ vca_
    vcr_ vck_ neon: napi_ alibaba: LTAI npm: npm_ huggingface: hf_ groq: gsk_ sonar: sqco_ notion: secret_
[a-fA-F0-9]{32}(?:[a-fA-F0-9]{8,32}|-\d)?(?![A-Za-z0-9])  digitalocean: dop_v1_ doo_v1_ dor_v1_ pulumi: pul-
    buildkite: bkua_ bkct_ shippo: shippo_live_ shippo_test_ shopify: shpat_ shpca_ shppa_ shpss_ shpua_
    shptka_ rubygems: rubygems_ e2b: e2b_ sk_e2b_ elevenlabs: sk_ sonar: sqp_ sqa_ squ_ mailgun: key- intra42:
    s-s4t2ud- s-s4t2af- twilio: SK databricks: dapi
[A-Za-z0-9]{14,}  razorpay: rzp_live_ rzp_test_ settlemint: sm_aat_ sm_pat_ sm_sat_ stripe: sk_live_ sk_test_
    sk_prod_ rk_live_ rk_test_ rk_prod_ pk_live_ pk_test_ whsec_
[A-Za-z0-9%-]{14,}  slack: xoxa- xoxb- xoxc- xoxd- xoxe- xoxo- xoxp- xoxr- xoxs- xapp- flutterwave: FLWSECK-
    FLWSECK_TEST- newrelic: NRAK- NRII- NRIQ- NRRA- NRJS- tailscale: tskey-auth- tskey-api- tskey-client-
    tskey-scim- tskey-webhook-
[a-f0-9]{8}-(?:[a-f0-9]{4}-){3}[a-f0-9]{12}  plaid: access-sandbox- access-development- access-production-
    launchdarkly: sdk- mob- hubspot: pat-na1- pat-na2- pat-eu1- pat-ap1- wakatime: waka_
[A-Z2-7]{16}(?![A-Za-z0-9])(?:[\s"'`,:|]{1,9}[\w+/]{40}(?!\w))?  aws: AKIA ASIA ABIA ACCA
(?<![+/]EAA[A-Z])(?![\w-]{0,200}[+/])[\w-]{60,}  facebook: EAAA EAAB EAAC EAAG EAAM dropbox: sl. sl.u.
eyJ[A-Za-z0-9+/=_.-]{60,}  1password: ops_ mapbox: sk.
[A-Z0-9]{6}(?:-[A-Z0-9]{5,11}){4,5}  1password: A3-
[A-Za-z0-9]{6,12}_[A-Za-z0-9]{20,}  resend: re_
[A-Za-z0-9]{14}\.[a-f0-9]{64}  airtable: pat
[A-Z0-9]{26,}(?![A-Za-z0-9])  octopus: API-
"""
_TOKENS: "list[SecretShape]" = []
for _word in _TOKEN_TABLE.split():
    if "{" in _word:
        _body = _word
    elif _word.endswith(":"):
        _kind = _word[:-1]
    else:
        _TOKENS.append(SecretShape(_kind, _word, _body, is_token=True))
SECRET_SHAPES = tuple(shape._replace(rank=rank) for rank, shape in enumerate((
    SecretShape("private-key", "PRIVATE KEY",  # without its end: to the end of the text
        r"(?s)-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:.*?-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----|.*\Z)"),
    SecretShape("private-key", "-----END ",  # its last lines, which precede the match
        r"-----END (?<=\n-----END )(?P<last>)[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----", False,
        lambda view, match, _value: _key_start(view.text, match.start()) < match.start()),
    _folded("private-key", "private-lines:", r" ?\d+\s{1,2}(?P<secret>(?:[a-z0-9+/=]{8,}\s{0,2})+)"),
    SecretShape("private-key", "LS0tLS1CRU", r"LS0tLS1CRU[\w+/]{0,24}(?:UFJJVkFU|BSSVZBV|QUklWQVR)[\w+/=]*"),
    *_TOKENS,
    SecretShape("telegram", "AA", r"AA(?<=\d{8}:AA)(?P<secret>[A-Za-z0-9_-]{32,})"),
    _folded("mailchimp", "-us", r"\d(?<=(?P<begin>[a-f0-9]{32})-us\d)\d?(?![a-z0-9])"),
    _folded("terraform", ".atlasv1.", r"(?<=(?P<begin>[a-z0-9]{14})\.atlasv1\.)[a-z0-9_=-]{40,}"),
    _folded("azure", "q~", r"(?<=(?P<begin>[a-z0-9_~.]{3}\d)q~)[a-z0-9_~.-]{31,34}(?![a-z0-9])"),
    SecretShape("jwt", "eyJ",
        r"eyJ(?<![\w-]eyJ)(?:[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]{8,}){2,4}|(?:rIjoi|hdXRocyI6)[A-Za-z0-9]{20,}={0,2})"),
    _folded("slack", "hooks.slack.com/", r"(?:services|workflows|triggers)/(?P<secret>[a-z0-9/+]{20,})"),
    _folded("discord", "/webhooks/", r"(?<=/api/webhooks/)(?P<secret>\d{1,30}/[a-z0-9_-]{30,})"),
    _folded("teams", ".office.com/webhook", r"(?:b2)?/(?P<secret>[^\s\"'<>]{40,})"),
    _folded("azure", "accountkey=", r"(?P<secret>[a-z0-9+/]{40,}={0,2})"),
    _folded("azure", "sig=", r"(?<![a-z0-9]sig=)(?P<secret>[a-z0-9+/_-]{40,}={0,2})"),
    _folded("signature", "-signature=", r"(?P<secret>[a-f0-9]{40,})"),  # of URLs to storage, X-Amz-Signature
    _folded("authorization", "authorization",
        r"(?<!\[redacted:authorization)[\"'`]?(?:\s{0,20}[:=]\s{0,20}[\"'`]?(?:[a-z][a-z0-9-]{1,20}\s{1,20})?"
        r"|(?:\s?,\s{0,8}|\s)[\"'](?:basic|bearer|token|apikey)\s{1,20})(?P<secret>[^\s\"',;<>\[\]\\]{8,200})",
        lambda _view, match, value: not ("(" in value or _HARMLESS.match(value)
                                         or _IDENTIFIER.match(value) and "basic" not in match[0])),
    _folded("authorization", "bearer", r"(?<!\wbearer)\s{1,20}(?P<secret>(?=\S*\d)[a-z0-9._~+/=-]{12,})"),
    _folded("cookie", "cookie",
        r"[\"'`]?: ?[\"'`]?(?P<secret>[^\s=;\"'<>:]{1,100}=[^\r\n\"'<>\\]{6,})"),
    SecretShape("url-password", "@",
        r":(?://(?<=[A-Za-z0-9+.-]://)[^\s/:@\"'<>]{0,256}:|(?<=\w:)(?=[^\s/:@\"'<>]{1,256}@tcp\())"
        r"(?P<secret>(?!\[|[$<{][^@\s]{0,256}@|[^@\s]{0,256}\]@)[^\s/\"'<>]{1,256})@"),
    SecretShape("url-password", "@",
        r"://(?<=[A-Za-z0-9+.-]://)(?P<secret>(?=[A-Za-z_-]{0,60}\d)[A-Za-z0-9_-]{24,256})@"),
    *(_folded("assignment", word, _ASSIGNED, _is_assigned_secret)
        for word in ("pass", "pw", "secret", "token", "cred", "key", "auth")),
    *(_folded("assignment", it, r'": ?"(?P<quoted>[^"\n]{3,})', _is_value) for it in ("cookie", "bearer")),
    _folded("assignment", "identified",
        r" (?:with\s{1,4}[\w'\"]{1,40}\s{1,4})?(?:by|as)\s{1,4}(?:password\s{1,4})?['\"](?P<value>[^'\"\n]+)",
        lambda view, match, value: view.text[match.start()] == "I" or any(map(str.isdigit, value))),
    _command("curl", r"(?:-u|--user|--proxy-user)[ =]?[\"']?[^\s:\"']{0,64}:(?P<secret>[^\s\"']{3,200})"),
    _command("curl", r"(?:-b|--cookie)[ =]?[\"']?(?P<secret>[\w.-]{1,60}=[^\s\"']{6,})"),
    _folded("command-line", "echo ", r"(?:-\w+ )?[\"']?(?P<text>[^\s\"'$|]{3,200})[\"' ]*\| ?(?:[\w.-]+ ){,9}"
        r"(?:--password-stdin|--with-token|sudo (?:\S+ ){,9}-s\b|secret (?:set|put)|chpasswd)", _is_value),
    _folded("assignment", "key", r"(?<=(?:pi|ss|et|al) key)s?[*\"'`]{0,3}(?: \d| \[\S+\])?(?: is|:| ?=)[:* ]+"
        r"[\"'`]?(?P<secret>[\w+/.~=-]{16,})", lambda _view, _match, value: _is_weak_secret("", value)),
    _command("mysql", r"-p[\"']?(?P<secret>(?![\s-])[^\s\"']{3,200})"),
    _command("login", r"-p[= ]?[\"']?(?P<secret>[^\s\"']{3,200})|(?<=cargo login |vault login |wandb login )"
        r"(?P<token>(?=\S*\d)[\w.-]{20,200})", r"(?<=[a-z] login)\b"),
    _folded("assignment", "auth", r"=?\([\"'].{1,60}?[\"'], ?[\"'](?P<secret>(?=.*\d)[^\"'\n]{6,99})[\"']\)"),
    *(_command(program, rf"{option} ?[\"']?(?P<secret>(?![\s-])[^\s\"']{{3,200}})") for program, option in (
        ("sshpass", "-p"), ("sqlcmd", "-p"), ("redis-cli", "-a"), ("mongo", "-p"), ("ldap", "-w"),
        ("smbclient", r"-u ?[\"']?[^\s%\"']{1,64}%"))),
    _folded("assignment", "set password",
        r"(?: for [^=;\n]{1,100})? ?= ?(?:password ?\( ?)?'(?P<secret>[^'\r\n]{1,200})", _is_value),
)))  # fmt: skip
_METADATA_KEYS = frozenset(
    "toolName toolUseId durationMs permissionMode source reason notificationType model agent_type "
    "is_interrupt prompt_id trigger action label pinned hidden parentSessionId status previous waitingFor "
    "kind entrypoint version".split()
)
# Of these objects, numbers are kept, and ids under the names below.
_METADATA_OBJECTS = frozenset(("usage", "agentMeta", "truncated", "gauges"))
_METADATA_IDS = frozenset("model origin agentType toolUseId parentAgentId requestShape".split())
_ID_LIKE = re.compile(r"[\w.:@/\[\]-]{0,200}")
_DEPTH_LIMIT = 100
UNSEEN_MARGIN = 4096  # characters beyond a cut that are redacted too, so that no half of a secret is left

# Hints have these parts in common: a text without the part is not searched for each of them.
_COMMON_PARTS = (*"@~='GJKLVq", "ok", "cre", "pass", "auth")
# Many events contain these words, in which such a part is none of a hint.
_COMMON_WORDS = {"pass": "bypass", "ok": 'tokens(?:_details)?[":]', "cre": 'credit"', "-us": "-use"}
_SHAPES_BY_PART: "tuple[dict[str, list[SecretShape]], ...]" = ({}, {})  # folded: the second
_TOKENS_BY_END: "dict[str, list[SecretShape]]" = {}  # by the last two characters of their hints
for _shape in SECRET_SHAPES:
    _hint = _shape.hint
    if _hint[-1] in "-_." or _hint[0] in "AE" or _hint == "pat":
        _TOKENS_BY_END.setdefault(_hint[-2:], []).append(_shape)
    else:
        _part = next((it for it in _COMMON_PARTS if it in _hint), "|" if _hint == "echo " else _hint)  # piped
        _SHAPES_BY_PART[_shape.folded].setdefault(_part, []).append(_shape)
# What follows the last - _ or . of a token's beginning: no words, no constant's name, no piece of a UUID.
_TOKEN_BODY = r"(?=[A-Za-z0-9_+/~-]{14})(?=[a-z_+/-]{0,24}[A-Z0-9])(?![A-Z_]{14}|[a-f0-9]{4}-[a-f0-9]{4})"
# Each of these begins with one fixed letter, to be searched for as fast as a text; none is base64 of zeros.
_TOKEN_HINTS = [re.compile(r"pat(?=[A-Za-z0-9]{14}\.[a-f0-9])")]
for _sign in "-_.":
    _before = "".join(re.escape(end[0]) for end in _TOKENS_BY_END if end[1] == _sign)
    _TOKEN_HINTS.append(re.compile(rf"\{_sign}(?<=[{_before}]\{_sign}){_TOKEN_BODY}"))
for _first in "AE":
    _starts = "|".join(shape.hint[1:] for shape in SECRET_SHAPES if shape.hint[0] == _first)
    _TOKEN_HINTS.append(re.compile(f"{_first}(?!A{{12}})(?:{_starts})(?=[A-Za-z0-9+/_-]{{12}})"))
_compiled = functools.lru_cache(None)(re.compile)


def _names_a_secret(name: str, value: Any = None) -> bool:
    """True if every value of that name is a secret, or this `value` is."""
    kind = _name_class(name)
    return kind != "" and (kind != "weak" or isinstance(value, str) and _is_weak_secret(name, value))


def _replacement(kind: str, secret: str) -> str:
    return f"[redacted:{kind}:{hashlib.sha256(secret.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}]"


# Escapes: a view of a text contains the characters that they encode, so that patterns need not match escapes.
_COLOUR = r"(?:\[[0-?]{0,40}[ -/]{0,4}[@-~]|\][^;\x07\x1b]{0,20};[^;\x07\x1b]{0,40};|[()][AB0])"
_ESCAPES = [re.compile(it) for it in (  # each begins with one sign, which is fast; without a group: a colour
    rf"\x1b{_COLOUR}", r"%(?:25)*(?P<percent>[2-7][0-9A-Fa-f]|0[9AaDd])",
    r"\\(?<!\\\\)\\*(?:(?:[xX]1[bB]|033|e|u001[bB])\[[0-?]{0,40}[@-~]"
    r"|(?:u00|[xX])(?P<hex>[0-7][0-9A-Fa-f])|(?P<letter>[nrtbf\"'`/]))",
    r"&(?:(?P<entity>quot|amp|lt|gt|apos)|#x(?P<code>[2-7][0-9a-fA-F])|#(?P<number>\d{2,3}));",
)]  # fmt: skip
_MEANINGS = dict(zip("nrtbf", "\n\r\t  "), quot='"', amp="&", lt="<", gt=">", apos="'")


class _View:
    """A text as a person reads it, without escapes and colours; maps each position to the raw text."""

    def __init__(self, raw: str, colours: str = "") -> None:
        # `colours` replaces their codes: "" joins a word that `grep` has marked, a space separates two words.
        self.coloured = False
        # For every escape: (position in the view, in the raw text, width there); and the same for its end.
        self._marks = [(0, 0, 0)]
        pieces: list[str] = []
        done = length = 0
        for match in sorted((it for each in _ESCAPES for it in each.finditer(raw)), key=re.Match.start):
            (begin, end), kind, meaning = match.span(), match.lastgroup, colours
            if begin < done:
                continue  # in an escape
            if kind is None:
                self.coloured = True
            elif kind in ("letter", "entity"):
                meaning = _MEANINGS.get(match[kind], match[kind])  # or of a line that ends in a backslash:
                meaning = "\\" * (meaning == "\n" and (end - begin) % 3 == 1) + meaning
            else:
                meaning = chr(int(match[kind], 10 if kind == "number" else 16))
            pieces += raw[done:begin], meaning
            length += begin - done
            self._marks += (length, begin, end - begin), (length + len(meaning), end, 0)
            length += len(meaning)
            done = end
        self.text: str = "".join(pieces) + raw[done:] if pieces else raw

    @functools.cached_property
    def folded(self) -> str:
        return _folded_text(self.text)

    def raw_span(self, start: int, end: int) -> "tuple[int, int]":
        """Return (start, end) in the raw text of a piece of the view."""
        first, last = (self._marks[bisect.bisect(self._marks, (at, math.inf)) - 1] for at in (start, end - 1))
        return first[1] + start - first[0], last[1] + end - 1 - last[0] + (last[2] or 1)

    def closing_quote(self, opening: int) -> int:
        """Return the end of a text in quotes: a quote no more escaped than the opening one, or a line end."""
        level, end = self._width(opening), len(self.text)
        for sign, most in ((self.text[opening], level), ("\n", 1)):
            at = self.text.find(sign, opening + 1, end)
            while at >= 0 and self._width(at) > most:
                at = self.text.find(sign, at + 1, end)
            end = at if at >= 0 else end
        return end

    def _width(self, at: int) -> int:
        start, end = self.raw_span(at, at + 1)
        return end - start


def redact_text(text: str) -> str:
    """Replace secrets by `[redacted:<kind>:<first 8 hex of sha256>]`; a second time changes nothing."""
    for _ in range(8):  # the text beside a secret may look like one afterwards
        if not (shapes := _shapes_in(text)):
            break
        view = _View(text)
        found = set(_secrets_in(view, shapes))
        begin = [shape for shape in shapes if shape.is_token or "(?<!" in shape.pattern]  # begin a word
        if view.coloured and begin:
            found.update(_secrets_in(_View(text, " "), begin))
        if not found:
            break
        secrets: list[tuple[int, int, int]] = []
        for start, end, rank in sorted(found):
            if secrets and start < secrets[-1][1]:  # they overlap
                start, last_end, last_rank = secrets.pop()
                end, rank = max(last_end, end), min(last_rank, rank)
            secrets.append((start, end, rank))
        redacted, done = "", 0
        for start, end, rank in secrets:
            redacted += text[done:start] + _replacement(SECRET_SHAPES[rank].kind, text[start:end])
            done = end
        text = redacted + text[done:]
    return text


def _folded_text(text: str) -> str:
    """Return the text with its ASCII letters in lower case, each character in its place."""
    if text.isascii():
        return text.lower()
    # Five times as fast as lower(); the Kelvin sign is the one other letter whose lower case is ASCII.
    encoded = text.replace("\u212a", "k").encode("utf-8", "surrogatepass")
    return encoded.lower().decode("utf-8", "surrogatepass")


def _shapes_in(text: str) -> "list[SecretShape]":
    """Return the shapes whose hints are in a text or in its JSON: secrets of others are in no part of it."""
    text = re.sub("\x1b" + _COLOUR, "", text) if "\x1b" in text else text
    # Hints are ASCII, which is searched twice as fast; the Kelvin sign is one of them in lower case.
    text = text if text.isascii() else text.replace("\u212a", "k").encode("ascii", "replace").decode()
    found: list[SecretShape] = []
    for by_part, searched in zip(_SHAPES_BY_PART, (text, text.lower())):
        for part in [part for part in by_part if part in searched]:
            words = _COMMON_WORDS.get(part, "") if len(text) < 10_000 else ""
            rest = _compiled(words).sub("", searched) if words else searched
            found += [it for it in by_part[part] if it.hint == part and not words or it.hint in rest]
    for pattern in _TOKEN_HINTS:
        for end in map(re.Match.end, pattern.finditer(text)):
            near = _TOKENS_BY_END.get(text[end - 2 : end], ())
            found += [shape for shape in near if text.endswith(shape.hint, 0, end)]
    return list(dict.fromkeys(found))


def _secrets_in(view: _View, shapes: "Sequence[SecretShape]") -> "Iterator[tuple[int, int, int]]":
    """Yield every match of some shapes as (start, end, rank of its shape); they may overlap."""
    for shape in shapes:
        searched, hint = view.folded if shape.folded else view.text, re.escape(shape.hint)
        pattern = _compiled((f"{hint}(?<![A-Za-z0-9]{hint})" if shape.is_token else "") + shape.pattern)
        match = pattern.search(searched)
        while match is not None:
            group = match.lastgroup or 0
            start, end = match.span(group)
            is_secret, value = shape.is_secret, view.text[start:end]
            if value.startswith("[redacted:") or is_secret is not None and not is_secret(view, match, value):
                next_at = match.start() + len(shape.hint)
            else:
                if group == "begin":  # of a secret whose fixed text is in its middle
                    end = match.end()
                elif group == "last":
                    start, end = _key_start(view.text, match.start()), match.end()
                elif shape.is_secret is not None and view.text[start - 1] in "\"'`":
                    end = max(end, view.closing_quote(start - 1))
                elif shape.is_secret is not None:
                    line = view.text[max(0, match.start() - 80) : start].rpartition("\n")[2]
                    rest = _ENV_REST if _ENV_LINE.match(line) else _REST
                    end = rest.match(view.text, end).end()  # type: ignore[union-attr]  # may be empty
                yield (*view.raw_span(start, end), shape.rank)
                next_at = max(end, match.end())
            match = pattern.search(searched, next_at)


class Privacy(NamedTuple):
    """What may be stored or sent: `redact` replaces secrets, `metadata_only` omits content; texts are cut."""

    redact: bool = True
    metadata_only: bool = False
    field_limit_bytes: int = 1 << 20


def protect(event: JsonObject, privacy: Privacy) -> "tuple[JsonObject, bytes]":
    """Return `event` redacted and cut, and its JSON; `data.truncated`: path → original size in bytes."""
    # An event contains few hints, so they are searched for once and not in each of its texts. No hint has a
    # character that JSON must escape, and every name of a secret has a hint in it.
    try:
        encoded = _to_json(event)
        text = encoded[encoded.find('"data":') if event.keys() <= _EVENT_FIELDS else 0 :]  # ours: only `data`
        text = text.replace("\\u212a", "k").replace("\\u001b", "\x1b")
        hints = {shape.hint.lower() for shape in _shapes_in(text)} if privacy.redact else set()
        is_flat = text.count("{") + text.count("[") < _DEPTH_LIMIT
        if is_flat and not (hints or privacy.metadata_only) and len(encoded) <= privacy.field_limit_bytes:
            return event, encoded.encode("ascii")
    except (ValueError, RecursionError):  # infinite or too deep
        hints = {""}  # of any text
    protector = _Protector(privacy, hints)
    data = _metadata_of(event["data"]) if privacy.metadata_only else event["data"]
    if privacy.metadata_only and event["hookType"] != "SessionEnd":
        data.pop("reason", None)  # the reason of a denial is prose
    for name in [name for name in event if name not in _EVENT_FIELDS]:
        value = event.pop(name)
        if not privacy.metadata_only:
            event[protector.clean(name)] = protector.value(value, name, name)
    data = protector.value(data, "", "")
    if protector.cuts:
        earlier = data.get("truncated")  # the original sizes of fields that the hook has cut
        data["truncated"] = {**protector.cuts, **(earlier if isinstance(earlier, dict) else {})}
    event["data"] = data
    return event, encode_json(event)


def _metadata_of(value: Any, name: str = "", depth: int = 0) -> Any:
    """Return the metadata in `data`: single values under known names; in known objects, numbers and ids."""
    if isinstance(value, dict) and depth < 6 and (depth != 1 or name in _METADATA_OBJECTS):
        kept = {it: _metadata_of(value[it], it, depth + 1) for it in filter(_ID_LIKE.fullmatch, value)}
        return {name: value for name, value in kept.items() if value is not None}
    if depth == 1:
        is_single = not isinstance(value, (dict, list)) and len(str(value)) <= 200
        return value if is_single and name in _METADATA_KEYS else None
    if isinstance(value, str):
        return value if name in _METADATA_IDS and _ID_LIKE.fullmatch(value) else None
    return value if isinstance(value, (bool, int, float)) else None


_clean_name = functools.lru_cache(maxsize=4096)(redact_text)


class _Protector:
    """Redacts and cuts the values of one object whose texts contain `hints` (in lower case) only."""

    def __init__(self, privacy: Privacy, hints: "set[str]") -> None:
        self.cuts: dict[str, int] = {}  # path of a cut value → original size in bytes
        self._privacy, self._hints = privacy, (*hints, "\x1b") if privacy.redact else ()

    def value(self, value: Any, key: str, path: str, depth: int = 0) -> Any:
        """Return a value redacted and cut; `key`: its name, `path`: that from the top of the object."""
        if isinstance(value, str):
            return self._text(value, key, path)
        if isinstance(value, (dict, list)) and depth >= _DEPTH_LIMIT:
            return self._text(json.dumps(value), key, path)
        if isinstance(value, dict):
            # The names of a large object would fill the cache of `_clean_name` in vain.
            path = path and path + "."
            clean = _clean_name if self._hints and len(value) < 1000 else self.clean
            named = _string(value.get("name", value.get("key"))) or "value"  # {"name": "DB_PASSWORD", …}
            return {
                clean(name): self.value(inner, named if name == "value" else name, path + name, depth + 1)
                for name, inner in value.items()
            }
        if isinstance(value, list):
            return [self.value(inner, key, f"{path}[{at}]", depth + 1) for at, inner in enumerate(value)]
        # a small number under such a name counts something; a larger one could be a password or a PIN
        if type(value) in NUMBERS and abs(value) >= 1000 and len(self._hints) > 1 and _names_a_secret(key):
            return _replacement("key", str(value))
        return value

    def clean(self, text: str) -> str:
        return redact_text(text) if any(map(_folded_text(text).__contains__, self._hints)) else text

    def _text(self, text: str, key: str, path: str) -> str:
        if self._privacy.redact and text and _names_a_secret(key, text):
            return text if text.startswith("[redacted:") else _replacement("key", text)
        limit = self._privacy.field_limit_bytes
        size = len(text) if len(text) <= limit // 4 else len(text.encode("utf-8", "surrogatepass"))
        if size <= limit:
            return self.clean(text)
        self.cuts[path] = size
        # With the text in its middle, of at most 80 bytes, the result is within the limit and not cut again.
        half = max(1, (limit - 80) // 2)
        # The margin is removed even if redaction has made the text before it shorter.
        unseen = UNSEEN_MARGIN if half + UNSEEN_MARGIN < len(text) else 0
        head, tail = self.clean(text[: half + UNSEEN_MARGIN]), self.clean(text[-half - UNSEEN_MARGIN :])
        start = head[: max(0, len(head) - unseen)].encode("utf-8", "surrogatepass")[:half]
        end = tail[unseen:].encode("utf-8", "surrogatepass")[-half:]
        rest, first = bytes(range(0x80, 0xC0)), bytes(range(0xC0, 0x100))  # of a character in UTF-8
        head = start.rstrip(rest).rstrip(first).decode("utf-8", "surrogatepass")
        tail = end.lstrip(rest).decode("utf-8", "surrogatepass")
        return f"{head}\n[… {size - 2 * half} of {size} bytes cut …]\n{tail}"


def shown_head(line: bytes, limit: int, privacy: Privacy) -> str:
    """Return the beginning of a malformed line for a log: without secrets; "" at level `metadata`."""
    if privacy.metadata_only:
        return ""
    shown = redact_text(text := line[: limit + UNSEEN_MARGIN].decode("utf-8", "backslashreplace"))
    return shown[: max(0, len(shown) - max(0, len(text) - limit))]


def shrink_line(line: bytes, config_path: str = "") -> bytes:
    """Return the event of one wrapped payload, redacted and cut to LINE_LIMIT_BYTES; raise ValueError."""
    event, redact = build_event(parse_event_line(line), now_ms(), this_machine()), True
    with contextlib.suppress(ConfigError):
        redact = load_config(config_path)[0]["privacy.redact"]
    for shift in range(3, 15, 2):  # fields of 2 MiB, then less and less
        if len(line) > LINE_LIMIT_BYTES // 2:
            event, line = protect(event, Privacy(redact, field_limit_bytes=LINE_LIMIT_BYTES >> shift))
    if len(line) >= LINE_LIMIT_BYTES:
        raise ValueError(f"the payload has {len(line)} bytes and could not be cut to {LINE_LIMIT_BYTES}")
    return line + b"\n"


def log_failure(reason: str) -> None:
    """Add one line to emit.log in our directory, redacted, if the disk allows it."""
    home = places(os.environb)[0]  # type: ignore[arg-type]
    line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {os.getpid()} {redact_text(reason)}\n"
    with contextlib.suppress(OSError):
        make_private_directory(home)
        append_bounded(home + "/emit.log", line.encode("utf-8", "backslashreplace"), 256 << 10)


# ---------------------------------------------------------------------------
# Token usage from transcripts: what each session and agent has used so far
#
# UsageReader owns usage.db: how far transcripts were read at the last totals, and what was counted. A message
# counts once, by its key, whichever lines and files repeat it, so usage.db may be lost: it is made again.
# A transcript also contains what the agent said, and evidence of what fires no hook: Esc, "No", a killed
# command, too many turns. While a session works, its transcripts are looked at every LOOK_S.
# ---------------------------------------------------------------------------

TRANSCRIPT_LINE_LIMIT_BYTES = 64 << 20
AGENTS_IN_USAGE = 50  # an event names the agents that used tokens last; each has been named before
LOOK_S = 1.0  # between two looks at whether a transcript has grown
NOTE_LOOKS = 5  # for the client's note on a subagent: it exists from its first call on, and names its parent
USAGE_QUIET_S = 30.0  # between two totals of a session that works
USAGE_LATE_S = 2.0  # after an end a session is still looked at: the last lines are written after the hook
WORDS_TAIL_BYTES = 16 << 20  # of what was not read yet, words are taken from the last so many bytes
EVIDENCE_MS = 60_000  # older lines are history
USAGE_SCHEMA = 11
_USAGE_FIELDS = "sessionId machineId machineKey agent workingDirectory timestamp".split()  # of its event
COUNT_NAMES = ("input", "output", "cacheRead", "cacheCreation", "cacheCreation1h")
# The same in `usage` of a message (the last in `cache_creation` there), and in the client's sums.
_MESSAGE_COUNTS = "input_tokens output_tokens cache_read_input_tokens cache_creation_input_tokens".split()
_MESSAGE_COUNTS.append("ephemeral_1h_input_tokens")
_CLIENT_COUNTS = "inputTokens outputTokens cacheReadInputTokens cacheCreationInputTokens".split()
_CLIENT_COUNTS.append("cacheCreationEphemeral1hInputTokens")
# Only lines with one of these are parsed, with one of the first three where a tool's result is in it.
_MARKS = b'"usage" "toolDenial "[Request "cost-state >killed< "max_turns "commandMode "pop "ending'.split()
_AGENT_MARKS = (
    b'"usage" "tokens" "usageMetadata" "turn_context" "turn_aborted" "task_complete" "abort" "error"'
    b' "permission.completed" "cancelled" "CommandExecution"'
).split()
# Lines of the type `user` that no person typed.
NOT_TYPED = re.compile(
    r"\s*(?:\[Request interrupted|Caveat: The messages below|$"
    r"|<(?:command-\w+|local-command-\w+|bash-\w+|task-notification|teammate-message|system-reminder)\b)"
)
WORDS = "agent_words"  # the type of events with what was said
SIDECHAIN = "sidechain"  # agent id for all subagents of old clients, whose lines are in the main transcript
CLIENT_FILE_LIMIT_BYTES = 64 << 10  # of a note or a registry file
# `usage` is that of the event, with all agents, the last to use tokens at the end. Words have no `counts`.
_USAGE_TABLES = f"""
BEGIN IMMEDIATE;
DROP TABLE IF EXISTS files; DROP TABLE IF EXISTS messages; DROP TABLE IF EXISTS sessions;
CREATE TABLE sessions (name TEXT PRIMARY KEY, read_ms INTEGER, chain TEXT,
  usage TEXT DEFAULT '{{"models": {{}}, "agents": {{}}}}');
CREATE TABLE files (path TEXT PRIMARY KEY, session TEXT REFERENCES sessions ON DELETE CASCADE, identity TEXT,
  position INTEGER, model TEXT);
CREATE TABLE messages (id BLOB PRIMARY KEY, session TEXT REFERENCES sessions ON DELETE CASCADE, counts TEXT)
  WITHOUT ROWID;
PRAGMA user_version = {USAGE_SCHEMA};
COMMIT;
"""
Counts = tuple[int, int, int, int, int]  # tokens, as in COUNT_NAMES; the last is part of the one before


class MessageUsage(NamedTuple):
    """What one message of a model used; `agent_id` "" is the main agent."""

    key: str  # in all transcripts: its id and its request, as a gateway may give one id to every message
    agent_id: str
    model: str
    counts: Counts
    session: str = ""  # in which it was first: a fork's transcript begins with a copy of its origin's


class CostState(NamedTuple):
    """The client's own sums, for the whole session so far; a fork's include those of its parent."""

    chain: str  # the same for a session and its forks: when the first of them began
    models: "dict[str, Counts]"


class TranscriptParser:
    """Find MessageUsage, CostState and events (words, evidence) in lines; copies of a line have one id."""

    def __init__(self, agent_id: str = "", program: str = "") -> None:
        self._agent_id, self._program = agent_id, program  # of AGENTS; "": Claude Code
        self._marks = _AGENT_MARKS if program else _MARKS
        self._counted = [b"\n\n"]  # usage and ids of the last message, as they are in each of its lines
        self.model = ""  # of the last line that names one, where the lines with tokens do not

    def facts_of(self, line: bytes, has_words: bool = True) -> "list[Any]":
        """Return what is in one line, a message's own usage last; only lines with a mark are parsed."""
        if all(map(line.__contains__, self._counted)) and b'"text"' not in line:
            return []  # each line of a message has all of its usage
        has_words = has_words and not self._program
        is_result = b'"tool_result"' in line and not self._program
        is_prompt = has_words and b'"user"' in line and not is_result
        if is_prompt or any(map(line.__contains__, _MARKS[:3] if is_result else self._marks)):
            with contextlib.suppress(MalformedEvent):
                return list(self.facts_in(as_message(parse_event_line(line)), line, has_words))
        return []

    def facts_in(self, entry: JsonObject, line: bytes, has_words: bool = True) -> "Iterator[Any]":
        """Yield what is in one line, whose JSON object is `entry`."""
        wrapped = entry.get("payload", entry.get("data")) if self._program else entry
        inner: JsonObject = wrapped if isinstance(wrapped, dict) else entry
        shown = _evidence_in(entry, inner, self._agent_id, self._program)
        time_ms = iso_time_ms(shown.pop("at", entry.get("timestamp")))
        if shown and time_ms:
            yield {"id": stable_id(line), "timestamp": time_ms, "hookType": "", **shown}
        if self._program:
            yield from self._program_usage(entry, inner, line)
            return
        kind, message, sums = map(entry.get, ("type", "message", "modelUsage"))
        if kind == "cost-state" and isinstance(sums, dict):
            begun, session_id = entry.get("startTime"), id_or(entry.get("sessionId"), "")
            models = {id_or(it, ""): _counts_of(sums[it], _CLIENT_COUNTS) for it in sums if _is_id(it)}
            yield CostState(str(begun) if type(begun) is int else session_id, models)
        if not isinstance(message, dict):
            return
        texts = texts_of(message.get("content")) if has_words and time_ms else []
        if kind == "user" and texts and b'"tool_result"' not in line:
            text = "\n".join(texts)
            command = re.fullmatch(r"<bash-input>(.*)</bash-input>\s*", text, re.S)  # it fires no hook
            marks = map(entry.get, ("isMeta", "isCompactSummary", "isSidechain"))
            if not self._agent_id and True not in marks and (command or not NOT_TYPED.match(text)):
                role, text = ("shell", command[1].lstrip()) if command else (entry.get("role", "user"), text)
                yield _words(f"{time_ms} {text}", time_ms, "", {"text": text, "role": role})
        model, usage, request = id_or(message.get("model"), ""), message.get("usage"), entry.get("requestId")
        message_id = id_or(message.get("id"), id_or(request, id_or(entry.get("uuid"), "")))
        if kind != "assistant" or not message_id or model in ("", "<synthetic>") or type(usage) is not dict:
            return
        ids = (f'"{it}"'.encode("utf-8", "replace") for it in (message_id, request))
        self._counted, counts = [*ids, encode_json(usage)], _counts_of(usage, _MESSAGE_COUNTS)
        # Without a request: lines of one message have the same input, and more and more output.
        key = f"{message_id} {id_or(request, f'{counts[0]} {counts[2]} {counts[3]}')}"
        sidechain = SIDECHAIN if entry.get("isSidechain") is True else ""
        agent_id = id_or(entry.get("agentId"), self._agent_id or sidechain)
        for text in texts:
            yield _words(f"{key} {text}", time_ms, agent_id, {"text": text, "messageId": message_id})
        own_sums = ("advisor_message", "compaction")  # not in the sums above them
        beside = (it for it in objects_in(usage.get("iterations")) if it.get("type") in own_sums)
        for number, part in enumerate(beside):
            part_model, part_counts = id_or(part.get("model"), model), _counts_of(part, _MESSAGE_COUNTS)
            yield MessageUsage(f"{key} {number}", agent_id, part_model, part_counts)
        said_in = id_or(entry.get("session_id", entry.get("sessionId")), "")
        yield MessageUsage(key, agent_id, model, counts, said_in)

    def _program_usage(self, entry: JsonObject, inner: JsonObject, line: bytes) -> "Iterator[MessageUsage]":
        """Yield what a line of another program's transcript has of usage."""
        about = AGENTS[self._program]
        if entry.get("type") == "turn_context":
            self.model = id_or(inner.get("model"), self.model)
        type_name, place, key_name = about.usage
        usage = inner.get(place)
        if entry.get("type") != type_name or not isinstance(usage, dict):
            return
        sent, received, read, written, _ = _counts_of(usage, [*about.counts.split(), "-"])
        if self._program != "kimi":  # the others' input includes what the cache had
            sent = max(0, sent - read - written)
        if self._program == "gemini":
            received += _counts_of(usage, ["thoughts", "-"])[0]
        thread = inner.get("thread_id") if inner.get("thread_id") != inner.get("session_id") else None
        agent_id = id_or(entry.get("agentId", thread), self._agent_id).replace("main", "", 1)
        model = id_or(usage.get("model", entry.get("model")), self.model) or "unknown"
        key = id_or(usage.get(key_name, inner.get(key_name)), id_or(entry.get("id"), stable_id(line)))
        yield MessageUsage(f"{self._program} {key}", agent_id, model, (sent, received, read, written, 0))


def as_message(entry: JsonObject) -> JsonObject:
    """Return a line as a message's, where it is about a prompt that was typed during a turn."""
    queued = entry.get("attachment")
    if entry.get("operation") in ("popAll", "popOne"):  # before the client has read it
        return {**entry, "type": "user", "role": "withdrawn", "message": {"content": entry.get("content")}}
    if isinstance(queued, dict) and queued.get("commandMode") == "prompt":
        role = "user" if "source_uuid" in queued else "queued"  # clients up to 2.1.200: no hook reports it
        return {**entry, "type": "user", "role": role, "message": {"content": queued.get("prompt")}}
    return entry


def _words(key: str, time_ms: "Optional[int]", agent_id: str, data: JsonObject) -> JsonObject:
    event = {"id": stable_id(encode_json(key)), "timestamp": time_ms, "hookType": "", "eventType": WORDS}
    return {**event, **({"agentId": agent_id} if agent_id else {}), "data": data}


def _evidence_in(entry: JsonObject, inner: JsonObject, agent_id: str, program: str) -> JsonObject:
    """Return the event that a line is evidence of, without id; `at`: its own time; {} if there is none."""
    kind = inner.get("type") if program == "codex" else entry.get("type")
    if kind == "assistant" and "isApiErrorMessage" not in entry:
        return {}
    message, attachment, item, error = map(inner.get, ("message", "attachment", "item", "error"))
    blocks = objects_in(message.get("content") if isinstance(message, dict) else [])
    calls, ending = objects_in(entry.get("toolCalls")), entry.get("promptSubmitEnding")
    text = next((it["text"] for it in blocks if isinstance(it.get("text"), str)), "")
    if entry.get("toolDenialKind") == "user-rejected" and blocks:  # hooks report the other kinds
        shown: JsonObject = {"agentId": agent_id} if agent_id else {}
        version = [int(it) for it in re.findall(r"\d+", str(entry.get("version"))[:40])]
        decided = [it.get("decision") for it in objects_in([entry.get("permissionDecision")])]  # else Esc
        has_run = "reject" not in decided and "toolDenialBeforeRun" not in entry and version >= [2, 1, 332]
        shown["data"] = {"toolUseId": blocks[0].get("tool_use_id"), "is_interrupt": has_run}
        return {"eventType": "tool_error" if has_run else "permission_denied", **shown}
    if agent_id or "agentId" in entry or entry.get("isSidechain") is True:
        return {}
    data, at = {}, {}
    if kind == "permission.completed":
        return {"eventType": "permission_result", "data": {}}
    if kind == "item_completed" and isinstance(item, dict) and item.get("exit_code"):
        data = {"toolName": "Bash", "toolUseId": item.get("id"), "exitCode": item["exit_code"]}
        data["error"] = f"Exit code {item['exit_code']}\n{item.get('aggregated_output')}"
        return {"eventType": "tool_error", "data": data}
    if kind in ("turn_aborted", "abort") or (kind == "user" and text.startswith("[Request interrupted by")):
        data = {"status": "interrupted"}
    elif calls and all(call.get("status") == "cancelled" for call in calls):
        data, at = {"status": "interrupted"}, {"at": calls[-1].get("timestamp")}
    elif kind == "queue-operation" and "<status>killed</status>" in str(entry.get("content")):
        data = {"status": "killed", "message": str(entry["content"])[:2000]}
    elif isinstance(ending, dict):  # of a prompt that a hook has blocked, or stopped once it was sent
        words, _, prompt = str(entry.get("content")).partition("\nOriginal prompt: ")
        is_other = ending.get("promptKept") or prompt.startswith("<task-notification>")  # which nobody typed
        data = {"status": "stopped" if is_other else "blocked", "message": words[:2000]}
    elif (kind == "task_complete" and isinstance(error, dict)) or (kind == "error" and program == "gemini"):
        details = error.get("message") if isinstance(error, dict) else entry.get("content")
        data = {"status": "failed", "error": "error", "error_details": details}
    elif entry.get("isApiErrorMessage") is True:
        data = {"status": "failed", "error": id_or(entry.get("error"), "error"), "assistantResponse": text}
    elif isinstance(attachment, dict) and attachment.get("type") == "max_turns_reached":
        data = {"status": "failed", "error": "max_turns", "assistantResponse": "it ran out of turns"}
    return {"eventType": "client_status", "data": data, **at} if data else {}


def stable_id(content: bytes) -> str:
    """Return an event's id that is derived from its content."""
    return str(uuid.UUID(hashlib.sha256(content).hexdigest()[:32], version=4))


def iso_time_ms(text: Any) -> "Optional[int]":
    """Parse a time such as 2026-11-24T06:03:18.373Z; None for anything else."""
    text = str(text)[:40]
    text = text[:23].rstrip("Z") + "+00:00" if text.endswith("Z") else text
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(text)
        return max(0, round(moment.timestamp() * 1000)) or None if moment.tzinfo else None
    return None


def id_or(value: Any, otherwise: str) -> str:
    """Return `value` without lone surrogates if it can be an id, else `otherwise`."""
    return value.encode("utf-8", "replace").decode() if _is_id(value) else otherwise


def _counts_of(usage: Any, names: "list[str]") -> Counts:
    """Return the numbers of tokens under these names; 0 for anything else."""
    usage = usage if isinstance(usage, dict) else {}
    by_lifetime = usage.get("cache_creation")
    values = map({**usage, **by_lifetime}.get if isinstance(by_lifetime, dict) else usage.get, names)
    *others, created, for_an_hour = (it if type(it) is int and 0 <= it < 1 << 40 else 0 for it in values)
    return (*others, created, min(created, for_an_hour))  # type: ignore[return-value]


class UsageReader:
    """Reads transcripts on this machine; makes `usage` events with the tokens that their sessions have used.

    The event of a session has totals so far: `data.usage` is `{"models": {model: counts}, "agents": {agent id
    or "": {model: counts}}, "model": the main agent's last, "context": of its request, "origin": a fork's}`.
    """

    def __init__(self, home: str, stopping: "threading.Event | None" = None) -> None:
        self._home, self.with_words = home, True  # "": nothing is saved
        self._stopping = stopping or threading.Event()
        self.deliver: Callable[[list[JsonObject]], bool] = lambda events: True  # True once they are stored
        self._database: Any = None  # sqlite3.Connection, once it is needed
        # Until the next totals: path → its row of files; session → what to count; id of words → session
        self._unsaved: tuple[dict[str, Any], dict[str, Any], dict[str, str]] = {}, {}, {}
        # Session → of its last totals the hash, time.monotonic, and timestamp
        self._delivered: dict[str, tuple[int, float, int]] = {}

    def events(self, event: JsonObject, is_end: bool = True) -> "list[JsonObject]":
        """Read on in the transcripts that an event names; deliver and return words, evidence, new usage."""
        data, session, states = event["data"], event["sessionId"], event.get("states", {})
        key, read_at, newest_ms = self._delivered.get(session, (0, -USAGE_QUIET_S, 0))
        is_due = is_end or time.monotonic() - read_at >= USAGE_QUIET_S
        now = {path: (agent_id, *_file_state(path)) for path, (agent_id, *_) in states.items()}
        if now == states and any(it[1] for it in now.values()) and not is_due:
            return []
        about = {name: event[name] for name in _USAGE_FIELDS if name in event}
        about["timestamp"] = newest_ms = max(newest_ms, event["timestamp"])  # else late ones are dropped
        since = int(event.get("since") or event["timestamp"]) - 2000  # a hook and its line: at most 2 s apart
        program = event.get("agent", "") if event.get("agent") in AGENTS else ""
        found: list[JsonObject] = []
        before = self._unsaved
        self._unsaved = {**before[0]}, {**before[1], session: [*before[1].get(session, [])]}, {**before[2]}
        try:
            grown = [it for it in states if now[it] != states[it]]
            # If only transcripts grew, there are no others: a folder, which has no agent, is as it was.
            same = [now[it][0] is not None and now[it][:2] == states[it][:2] for it in grown]
            if is_due or not grown or not all(same):
                files = transcripts_of(data.get("transcriptPath"), data.get("agent_transcript_path"))
                now = {it: (files[it], *_file_state(it)) for it in files}
                there = [it for it in now if now[it][0] is not None and now[it][1]]
                grown = there if is_due else [it for it in there if now[it] != states.get(it)]
            with self._open() as database:  # all or nothing
                # The main one is the last, because the client's sums in it include those of the subagents.
                for path in sorted(grown, key=lambda it: now[it][0] == ""):
                    agent_id = now[path][0] or SIDECHAIN * (program == "codex" and session not in path)
                    parser = TranscriptParser(agent_id, program)
                    found += [{**about, **it} for it in self._read(session, path, parser, since)]
                is_due |= any(it["eventType"] == "client_status" for it in found)  # Esc: no hook
                totals = self._save(session) if is_due else None
                if totals and not self._stopping.is_set() and key != (key := hash(encode_json(totals))):
                    found.append({"eventType": "usage", "hookType": "", **about, "data": {"usage": totals}})
                while found and not self.deliver(found):
                    if self._stopping.wait(LOOK_S):
                        database.rollback()
                        return []
        except Exception as error:  # an unreadable transcript must not stop the thread
            log_failure(f"token usage could not be read: {error!r}")
            with contextlib.suppress(Exception):  # a damaged file cannot always be closed
                self.close()
            self._unsaved = before  # as if this look had not been
            self._delivered.pop(session, None)  # it is read again at the next look
            if type(error).__name__ == "DatabaseError":  # sqlite3's own, not one of its kinds: no database
                self._unsaved, self._delivered = ({}, {}, {}), {}
                for suffix in ("", "-wal", "-shm"):
                    with contextlib.suppress(OSError):
                        os.unlink(f"{self._home}/usage.db{suffix}")
            return []
        states.clear()
        states.update(now)
        if is_due:
            self._unsaved = {}, {}, {}
            self._delivered[session] = key, time.monotonic(), newest_ms
        return found

    def close(self) -> None:
        """Close the file; it is opened again when it is needed."""
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _open(self) -> Any:
        if self._database is None:
            import sqlite3

            path = f"{self._home}/usage.db" if self._home else ":memory:"
            if self._home:
                make_private_directory(self._home)
                os.close(open_own(path, os.O_RDWR | os.O_CREAT))
            database = sqlite3.connect(path, timeout=2.0)
            # Nothing waits for the disk: after a loss of power everything can be read again.
            database.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=WAL; PRAGMA foreign_keys=ON")
            if database.execute("PRAGMA user_version").fetchone()[0] != USAGE_SCHEMA:
                database.executescript(_USAGE_TABLES)
            self._database = database
        return self._database

    def _read(self, session: str, path: str, parser: TranscriptParser, since: int) -> "Iterator[JsonObject]":
        """Read what is new in a transcript; yield new words, and evidence that is no history."""
        (files, found, words), execute = self._unsaved, self._database.execute
        find = functools.partial(execute, "SELECT 1 FROM messages WHERE id = ?")
        with contextlib.suppress(OSError), open(path, "rb", 64 << 10, opener=open_own) as file:
            about = os.fstat(file.fileno())
            size, identity = about.st_size, str(about.st_ino)  # a container may see another device number
            row = files.get(path) or execute("SELECT * FROM files WHERE path = ?", (path,)).fetchone()
            place, parser.model = row[3:] if row and row[2] == identity and row[3] <= size else (0, "")
            file.seek(place)
            while place < size and not self._stopping.is_set():
                line = file.readline(TRANSCRIPT_LINE_LIMIT_BYTES)  # of a longer one a part, which is no JSON
                if not line.endswith(b"\n") and len(line) < TRANSCRIPT_LINE_LIMIT_BYTES:
                    break  # it is still written
                for it in parser.facts_of(line, self.with_words and place >= size - WORDS_TAIL_BYTES):
                    if not isinstance(it, dict):
                        found[session].append(it)
                    elif it["eventType"] != WORDS:
                        if it["timestamp"] > max(now_ms() - EVIDENCE_MS, since):
                            yield it
                    elif not (it["id"] in words or it["timestamp"] < since and find((it["id"],)).fetchone()):
                        words[it["id"]] = session
                        if it["data"].get("role") != "user" or it["timestamp"] < since:
                            yield it
                        elif self.begin(session):  # from its hook: not again after a restart
                            execute("INSERT OR IGNORE INTO messages VALUES (?, ?, NULL)", (it["id"], session))
                place += len(line)
            files[path] = path, session, identity, place, parser.model

    def _save(self, session: str) -> "JsonObject | None":
        """Save what was read of each session; return the totals of one; drop those not read for 30 days."""
        files, found, words = self._unsaved
        # A fork is the last: the copies in its transcript count for its origin.
        forks = [it for it in found if any(getattr(of, "session", it) not in ("", it) for of in found[it])]
        used = {it: self.count(it, found[it], self.begin(it)) for it in sorted(found, key=forks.__contains__)}
        execute = self._database.executemany
        execute("INSERT OR IGNORE INTO messages VALUES (?, ?, NULL)", words.items())
        execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", files.values())
        execute("DELETE FROM sessions WHERE read_ms < ?", [(now_ms() - 30 * 24 * 3600 * 1000,)])
        return totals_in(used[session])

    def begin(self, session: str) -> JsonObject:
        """Return what a session has used so far."""
        execute = self._open().execute
        execute("INSERT OR IGNORE INTO sessions (read_ms, name) VALUES (?, ?)", (now_ms(), session))
        (usage,) = execute("SELECT usage FROM sessions WHERE name = ?", (session,)).fetchone()
        return dict(json.loads(usage))

    def count(self, session: str, found: "list[MessageUsage | CostState]", usage: JsonObject) -> JsonObject:
        """Add what a parser has found to the `usage` of a session that has begun, save it and return it."""
        execute, find = self._database.execute, "SELECT counts FROM messages WHERE id = ?"
        for entry, _ in itertools.groupby(found):  # each line of a message has all of its usage
            for it in [entry] if isinstance(entry, MessageUsage) else self._rest_of(session, entry, usage):
                key = hashlib.blake2b(it.key.encode(), digest_size=16).digest()
                known, counts = [0] * len(COUNT_NAMES), list(it.counts)
                add = execute("INSERT OR IGNORE INTO messages VALUES (?, ?, ?)", (key, session, str(counts)))
                if not add.rowcount:  # of several lines the largest are true
                    known = json.loads(*execute(find, (key,)).fetchone())
                    counts = list(map(max, known, counts))
                    execute("UPDATE messages SET counts = ? WHERE id = ?", (str(counts), key))
                if add.rowcount or counts != known:
                    of_agent = usage["agents"][it.agent_id] = usage["agents"].pop(it.agent_id, {})
                    for models in (usage["models"], of_agent):
                        add_counts(models.setdefault(it.model, {}), map(int.__sub__, counts, known))
                if it is entry and not it.agent_id:
                    usage.update(model=it.model, context=it.counts[0] + it.counts[2] + it.counts[3])
                    usage.update({"origin": it.session} if it.session not in ("", session) else {})
        values = json.dumps(usage), now_ms(), session
        execute("UPDATE sessions SET usage = ?, read_ms = ? WHERE name = ?", values)
        return usage

    def _rest_of(self, session: str, state: CostState, usage: JsonObject) -> "Iterator[MessageUsage]":
        """Yield what the client's sums have beyond what was counted for their chain: no line has it."""
        self._database.execute("UPDATE sessions SET chain = ? WHERE name = ?", (state.chain, session))
        find = "SELECT usage FROM sessions WHERE chain = ? AND name != ?"
        others = [json.loads(row[0]) for row in self._database.execute(find, (state.chain, session))]
        nothing = [0] * len(COUNT_NAMES)
        ours: dict[str, list[int]] = {}
        for model, by in (it for each in (usage, *others) for it in each["models"].items()):
            ours[model] = [by.get(it, 0) + a for it, a in zip(COUNT_NAMES, ours.get(model, nothing))]
        # A model's names may differ (`[1m]`, those of a cloud), so in all no more than all that is left.
        in_all, known = (map(sum, zip(nothing, *by.values())) for by in (state.models, ours))
        left = [a - b for a, b in zip(in_all, known)]
        for model, own in state.models.items():
            more = [max(0, min(a - b, c)) for a, b, c in zip(own, ours.get(model, nothing), left)]
            left = [a - b for a, b in zip(left, more)]
            if any(more):
                key = f"{state.chain} cost-state {model} {own}"
                yield MessageUsage(key, "", model, (more[0], more[1], more[2], more[3], min(more[3:])))


def totals_in(usage: JsonObject) -> "JsonObject | None":
    """Return what an event has of a session's usage; None if that is nothing."""
    agents = usage.get("agents", {})  # in the event the main agent, then those that used tokens last
    newest = ["", *filter(None, reversed(agents))][:AGENTS_IN_USAGE]
    return {**usage, "agents": {it: agents[it] for it in newest if it in agents}} if agents else None


class UsageWorker(threading.Thread):
    """Reads transcripts in a thread of its own, so that no event waits for them; `deliver` runs in it."""

    def __init__(self, home: str, deliver: "Callable[[list[JsonObject]], bool]", with_words: bool) -> None:
        super().__init__(name="usage", daemon=True)  # begins with the first event
        self._closing = threading.Event()
        self.reader = UsageReader(home, self._closing)
        self.reader.deliver, self.reader.with_words = deliver, with_words
        self._wake = threading.Condition()  # guards _pending
        # (session, an agent's own transcript or "") → the event's fields, until when (time.monotonic) they
        # are looked at, whether they are to be read at once, and the files' states
        self._pending: dict[tuple[str, str], JsonObject] = {}

    def is_watching(self, reported: "set[str]") -> bool:
        """True while a session works that is not among the `reported`, those in the registry."""
        now = time.monotonic()
        with self._wake:
            return not reported.issuperset(it[0] for it in self._pending if self._pending[it]["until"] > now)

    def put(self, event: JsonObject) -> None:
        """Queue the transcripts that an event names: to be read now at an end, else when they have grown."""
        names, now = ("transcriptPath", "agent_transcript_path"), time.monotonic()
        is_end = event["hookType"] in ("Stop", "StopFailure", "SubagentStop", "SessionEnd")
        queued = self._pending.get((event["sessionId"], ""), {})
        if not is_end and names[1] not in event["data"] and queued.get("until", 0) > now + 3599:
            return  # a moment ago
        paths = {name: path for name in names if _is_transcript_path(path := event["data"].get(name))}
        if not paths:
            return
        key = (event["sessionId"], paths.get(names[1], ""))
        about = {name: event[name] for name in _USAGE_FIELDS if name in event}
        works = not is_end or (not key[1] and bool(event["data"].get("background_tasks")))
        until = now + (3600.0 if works else USAGE_LATE_S)  # a killed client sends no end
        with self._wake:
            is_first, before = not self._pending, self._pending.get(key, {})
            is_next = not is_end and 0 < before.get("until", 0) <= now + USAGE_LATE_S
            last = {"timestamp": before["timestamp"], "isEnd": True} if is_next else {}  # its tokens first
            new = {**about, "data": paths, "until": until, "isEnd": is_end or before.get("isEnd"), **last}
            self._pending[key] = {"since": event["timestamp"], "states": {}, **before, **new}
            if self.ident is None:
                self.start()
            if is_end or is_next or is_first:  # else the thread wakes up for its next look
                self._wake.notify()

    def close(self) -> None:
        """End the thread, which stops within one chunk."""
        self._closing.set()
        with self._wake:
            self._wake.notify()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        """Read what is due until `close`."""
        next_look = 0.0  # time.monotonic
        while not self._closing.is_set():
            with self._wake:
                rest_s = max(0.0, next_look - time.monotonic()) if self._pending else None
                is_end = any(it["isEnd"] for it in self._pending.values())
                if self._closing.is_set() or is_end or self._wake.wait(rest_s):
                    self._wake.wait_for(self._closing.is_set, LOOK_S / 10)  # for other turns that end
                now = time.monotonic()
                due = [(key, it) for key, it in self._pending.items() if now >= next_look or it["isEnd"]]
                next_look = now + LOOK_S if now >= next_look else next_look
            for key, entry in due:
                is_over = entry["until"] <= now
                self.reader.events(entry, entry["isEnd"] or is_over)
                with self._wake:
                    entry["isEnd"] = False
                    if is_over and self._pending.get(key) is entry:
                        del self._pending[key]
        self.reader.close()  # SQLite wants it in the thread that opened it


def transcripts_of(main_path: Any, agent_path: Any = "") -> "dict[str, Optional[str]]":
    """Find a session's transcripts: path without links → agent id, "" for the main one; None for a folder."""
    places, agents = transcript_places(main_path), []
    found: dict[str, Optional[str]] = dict.fromkeys(places.values(), "")
    for folder, names in agent_folders(places):
        found[folder] = None
        agents += [f"{folder}/{it}" for it in names if it.startswith("agent-") and it.endswith(".jsonl")]
    for path in (*agents, *transcript_places(agent_path)):
        named = re.search(r"/agent-([^/]*)\.jsonl\Z", path)
        found.setdefault(os.path.realpath(path), named[1] if named else "")
    return found


def agent_folders(places: "dict[str, str]") -> "Iterator[tuple[str, list[str]]]":
    """Yield `<session>/subagents`, even where it is missing, and each folder below, with its files' names."""
    for top in dict.fromkeys(it[: -len(".jsonl")] + "/subagents" for it in (*places, *places.values())):
        yield top, []
        for folder, _, names in () if os.path.islink(top) else os.walk(top):  # it may lead to all of the disk
            yield folder, sorted(names)


def transcript_places(path: Any) -> "dict[str, str]":
    """Return where a transcript may be, at its path or in another folder → the same without links."""
    if not _is_transcript_path(path):
        return {}
    places, name, projects = [path], os.path.basename(path), os.path.dirname(os.path.dirname(path))
    if unnamed := re.fullmatch(r"(.*)(/sessions/\*/[\w-]+/agents/\*/wire\.jsonl)", path):
        places = glob.glob(glob.escape(unnamed[1]) + unnamed[2])  # of a program that names none
    elif not os.path.exists(path) and os.path.basename(projects) == "projects":  # named for a worktree
        places += glob.glob(f"{glob.escape(projects)}/*/{glob.escape(name)}")
    return {it: os.path.realpath(it) if os.path.lexists(it) else it for it in sorted(places)}


def _file_state(path: str) -> "tuple[Any, Any]":
    """Return what tells a file or link from another, and when its content changed; None if there is none."""
    with contextlib.suppress(OSError):
        about = os.lstat(path)
        return (about.st_ino, about.st_mode), (about.st_size, about.st_mtime_ns)
    return None, None


def _is_transcript_path(path: Any) -> bool:
    is_path = isinstance(path, str) and path.startswith("/") and path.endswith(".jsonl")
    return is_path and len(path) <= 4096 and path.isprintable()  # no half of a surrogate pair


def add_counts(totals: JsonObject, counts: "Iterable[int]") -> None:
    """Add the numbers of COUNT_NAMES to totals by name; the last one is left out while it is 0."""
    for name, count in zip(COUNT_NAMES, counts):
        if count or name != "cacheCreation1h":
            totals[name] = totals.get(name, 0) + count


# A branch, or a commit's id with its first characters, in `.git/HEAD`: anything else may be a private file.
_GIT_REF = re.compile(r"ref: refs/(?:heads/)?([^\s~^:?*\[\\]{1,255})|([\da-f]{7})[\da-f]{33}(?:[\da-f]{24})?")


def add_git_place(event: JsonObject) -> None:
    """Add `data.git` from `.git` files: the branch, the roots of the worktree and of the main one."""
    is_step = event["eventType"] in ("session_start", "user_prompt", "turn_end", "client_status")
    if not is_step or "agentId" in event or "imported" in event or "git" in event["data"]:
        return

    def read(*path: str) -> str:
        return read_small(os.path.realpath(os.path.join(*path))).decode("utf-8", "replace").strip()

    folders = os.path.normpath(event["workingDirectory"]).split("/")
    is_known = folders[0] == "" and len(folders) <= 256  # a longer path would hold the loop up
    for depth in range(len(folders) if is_known else 0, 0, -1):
        root = project = "/".join(folders[:depth]) or "/"
        if not os.path.exists(git := os.path.join(root, ".git")):
            continue
        with contextlib.suppress(OSError, ValueError):
            if not os.path.isdir(git):
                git = os.path.join(root, read(git).partition("gitdir: ")[2])
                if common := read(git, "commondir"):  # a submodule has none
                    common = os.path.normpath(os.path.join(git, common))
                    project = os.path.dirname(common) if common.endswith("/.git") else common
            if (head := _GIT_REF.fullmatch(read(git, "HEAD"))) and head[0].isprintable():
                event["data"]["git"] = {"branch": head[1] or head[2], "root": root, "project": project}
                return


def add_agent_note(event: JsonObject, noted: "dict[tuple[str, str], Any]") -> None:
    """Add the client's note on a subagent to its first event. `noted`: agent → its id, or failed looks."""
    agent_id, data = event.get("agentId", ""), event["data"]
    key = event["sessionId"], agent_id
    looks = noted.get(key, 0) if "transcriptPath" in data else NOTE_LOOKS
    if looks not in (event["id"], *range(NOTE_LOOKS)) or not re.fullmatch(r"[\w-]{1,128}", agent_id, re.A):
        return
    if not looks and len(noted) >= 4096:
        del noted[next(iter(noted))]
    noted[key] = looks if looks == event["id"] else looks + 1
    places, name = transcript_places(data.get("transcriptPath")), f"agent-{agent_id}.meta.json"
    path = next((f"{folder}/{name}" for folder, names in agent_folders(places) if name in names), "/")
    if not (note := read_state(os.path.realpath(path), CLIENT_FILE_LIMIT_BYTES)):
        return  # not there, or only half written
    noted[key] = event["id"]
    names = "agentType toolUseId parentAgentId requestShape spawnDepth".split()
    known = {name: note[name] for name in names if _is_id(note.get(name)) or type(note.get(name)) is int}
    _keep(data, "agentMeta", known)
    if isinstance(note.get("description"), str):
        _keep(data, "agentDescription", note["description"])


# ---------------------------------------------------------------------------
# Registry: what the client reports of itself
#
# Claude Code writes what each of its processes does to `sessions/<pid>.json` in its configuration directory,
# thus also what a person does (Esc, "No", an answer), which fires no hook. A reader may see half of a file.
# ---------------------------------------------------------------------------

REGISTRY_POLL_S = 0.3
REGISTRY_LIMIT = 256  # directories, and files of each
STATUS_SETTLED_MS = 200  # a status that lasts less is not reported
CLIENT_EXITED = "exited"  # the status of a client whose process has ended
_ABOUT_CLIENT = ("status", "waitingFor", "name", "nameSource", "kind", "entrypoint", "version")


class ClientRecord(NamedTuple):
    """The content of one client's file."""

    pid: int
    started: int  # when its process began, as `process_start`; -1: not given
    session_id: str
    directory: str
    since_ms: int  # when its status began (2.1.150 says only when it wrote the file); 0: not known
    about: "dict[str, str]"  # the event's data: those of _ABOUT_CLIENT that it has


def parse_registry(fields: JsonObject, file_name: str) -> "Optional[ClientRecord]":
    """Parse the object in a client's file; None for another process's file, or an unknown form."""
    pid, session_id, cwd = map(fields.get, ("pid", "sessionId", "cwd"))
    since, ticks = fields.get("statusUpdatedAt", fields.get("updatedAt")), str(fields.get("procStart"))[:20]
    if type(pid) is not int or file_name != f"{pid}.json" or not _is_id(session_id):
        return None
    about = {it: " ".join(fields[it].split())[:200] for it in _ABOUT_CLIENT if type(fields.get(it)) is str}
    since_ms = since if type(since) is int and 0 < since < 1 << 53 else 0
    started = int(ticks) if ticks.isdecimal() else -1
    return ClientRecord(pid, started, str(session_id), _string(cwd), since_ms, about)


def process_start(pid: int) -> "Optional[int]":
    """Return when a process began, in ticks since boot (proc(5): stat, field 22); None if it does not run."""
    if sys.platform == "linux":
        fields = read_small(f"/proc/{pid}/stat").rpartition(b")")[2].split(None, 20)
        return int(fields[19]) if fields and fields[0] not in (b"Z", b"X") else None
    with contextlib.suppress(OSError, OverflowError):
        os.kill(pid, 0)
        return 0  # not known
    return None


class RegistryWatcher:
    """Makes `client_status` events of this user's clients; their ids are derived from their content."""

    def __init__(self, machine_key: str) -> None:
        self._machine_key = machine_key
        self._directories = {os.environ.get("CLAUDE_CONFIG_DIR") or os.path.expanduser("~/.claude"): None}
        # Path → its inode, size and mtime when it was read, or None to read it again
        self._files: dict[str, Optional[tuple[int, int, int]]] = {}
        # Path → a client whose process runs: its `record`, when (ms) its session was seen `first`, until when
        # its process ran another one `before`, and what was `reported` last
        self.clients: dict[str, JsonObject] = {}

    def learn(self, event: JsonObject) -> None:
        """Watch the client's configuration directory that an event's transcript is in, too."""
        directory, below, _ = str(event["data"].get("transcriptPath")).partition("/projects/")
        if below and directory.startswith("/") and len(self._directories) < REGISTRY_LIMIT:
            self._directories[directory] = None

    def poll(self, time_ms: int) -> "list[JsonObject]":
        """Read the files that have changed; return the events for changes. `time_ms`: now."""
        for path, record in self._changed_files():
            if (client := self.clients.get(path)) and client["record"].session_id == record.session_id:
                client["record"] = record
            elif process_start(record.pid) in (record.started, 0):
                before = time_ms if client else 0
                self.clients[path] = {"record": record, "first": time_ms, "before": before, "reported": {}}
        events = []
        for path, client in list(self.clients.items()):
            record, reported, at_ms = client["record"], client["reported"], time_ms
            since_ms = record.since_ms if 0 < record.since_ms <= time_ms else time_ms
            about, key = {**record.about}, record[:3] + record[4:]
            if process_start(record.pid) not in (record.started, 0):
                del self.clients[path]
                about, key, is_news = {"status": CLIENT_EXITED}, (*record[:3], CLIENT_EXITED), reported != {}
            elif not reported:  # a second later: hooks have reported its beginning by then
                is_news, at_ms = time_ms - client["first"] >= 1000, max(since_ms, client["before"])
            else:
                is_settled = not 0 <= time_ms - record.since_ms < STATUS_SETTLED_MS
                is_other = record.since_ms != client["since"]  # or the same again, after a short one
                is_news = is_settled and (is_other or reported != about)
                at_ms, previous = since_ms if is_other else time_ms, reported.get("status", "")
                about["previous"] = "" if is_other and previous == about.get("status") else previous
            if is_news:
                client["reported"], client["since"] = record.about, record.since_ms
                events.append({
                    "id": stable_id(encode_json([self._machine_key, *key])), "timestamp": at_ms,
                    "sessionId": record.session_id, "machineKey": self._machine_key, "pid": record.pid,
                    "workingDirectory": record.directory, "hookType": "", "eventType": "client_status",
                    "data": about, **({"pidNamespace": pid_namespace()} if pid_namespace() else {}),
                })  # fmt: skip
        return events

    def _changed_files(self) -> "Iterator[tuple[str, ClientRecord]]":
        before, self._files = self._files, {}
        for directory in list(self._directories):
            with contextlib.suppress(OSError), os.scandir(directory + "/sessions") as entries:
                for entry in itertools.islice(entries, REGISTRY_LIMIT):
                    if not (entry.name.endswith(".json") and entry.name[:-5].isdigit()):
                        continue
                    about = entry.stat(follow_symlinks=False)
                    state = (about.st_ino, about.st_size, about.st_mtime_ns)
                    # A file that has just changed may change again within the same mtime.
                    self._files[entry.path] = state if time.time_ns() - state[2] >= 100_000_000 else None
                    is_new = before.get(entry.path) != state and state[1] <= CLIENT_FILE_LIMIT_BYTES
                    if is_new and (record := parse_registry(read_state(entry.path), entry.name)):
                        yield entry.path, record


# ---------------------------------------------------------------------------
# Spool: the drainer's side (the writer's side is in the hot path)
#
# Owns: spool/, its segments <start in ms>-<random>.jsonl (while drained: .taken), and dropped.log.
# ---------------------------------------------------------------------------

SPOOL_LIMIT_BYTES = 64 << 20
NO_CLOCK_MS = 10**12  # a time before 2001 is that of a machine whose clock was not set yet


def drop_old_segments(directory: str) -> None:
    """Delete segments, oldest first, until the spool is within 64 MiB and 7 days; log their events."""
    segments = spool_segments(directory)
    total = sum(size for _, size in segments)
    for path, size in segments:
        start_ms = segment_start_ms(path)
        is_young = start_ms >= now_ms() - 7 * 24 * 3600 * 1000 or 0 < start_ms < NO_CLOCK_MS
        if path.endswith(".taken") or (total <= SPOOL_LIMIT_BYTES and is_young):
            continue  # what is taken is being delivered
        try:
            with open(path, "rb", opener=open_own) as file:
                events = sum(1 for line in file if line.strip())
            os.unlink(path)
        except OSError:
            continue  # another writer, or the drainer, was first
        total -= size
        with open(directory + "/dropped.log", "ab", opener=open_for_append) as log:
            log.write(b"%d\n" % events)


def spool_segments(directory: str) -> "list[tuple[str, int]]":
    """Return the segments as (path, bytes), oldest first."""
    segments = []
    with contextlib.suppress(OSError):  # of the directory; `make_spool` sets aside what is none
        for name in sorted(os.listdir(directory)):
            if name.endswith((".jsonl", ".taken")):
                with contextlib.suppress(OSError):  # not ours, or drained since it was listed
                    about = os.lstat(f"{directory}/{name}")
                    if stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid():
                        segments.append((f"{directory}/{name}", about.st_size))
    return segments


def segment_start_ms(path: str) -> int:
    """Return the time in a segment's name; 0, the oldest of all, for any other name."""
    start = path.rpartition("/")[2].partition("-")[0]
    return int(start) if start.isdigit() else 0


def take_segment(path: str) -> str:
    """Rename a segment so that no writer opens it again; BlockingIOError: one is writing to it."""
    taken = path.rpartition(".")[0] + ".taken"
    if taken != path and os.path.lexists(taken):  # of a hook of an older version
        raise BlockingIOError(f"{taken} is still to be drained")
    os.rename(path, taken)
    with open(taken, "rb", opener=open_own) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return taken


def take_dropped(directory: str) -> int:
    """Return how many events the spool has dropped since the last call, and reset the count."""
    taken = directory + "/dropped.taken"
    with contextlib.suppress(OSError):
        if not os.path.exists(taken):  # else of a reader that was killed
            os.rename(directory + "/dropped.log", taken)
        with open(taken, "rb", opener=open_own) as file:
            os.unlink(taken)  # first: on a broken disk nothing is counted twice
            return sum(int(line) for line in file if line.strip().isdigit())
    return 0


def keep_in_quarantine(path: str, line: bytes, reason: str, privacy: Privacy) -> None:
    """Append the beginning of a line that is no event to the quarantine file. Raises OSError."""
    record = {"received": now_ms(), "reason": redact_text(reason), "bytes": len(line)}
    append_bounded(path, encode_json({**record, "head": shown_head(line, 4096, privacy)}) + b"\n", 4 << 20)


# ---------------------------------------------------------------------------
# Redis publisher: from the spool to Redis
#
# Owns: publisher.lock, publisher.json, and one connection. redis-py is imported when a client is made.
# redis-py's timeouts are for each recv, not for DNS: an exchange runs in a thread, abandoned at its deadline.
# ---------------------------------------------------------------------------

PUBLISHER_QUIET_S = 60.0
BUSY_S = 2.0  # after an event
IDLE_POLL_S = 0.02  # between two checks of the spool
EXCHANGE_DEADLINE_S = 5.0
RESEND_S = 10.0  # events sent this long before a connection broke are sent again: a new primary may lack them
RESEND_BYTES = 1 << 20
_Batch = list[tuple[str, bytes]]  # events on their way to Redis: (id, JSON)


def within(deadline_s: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread and return its result; abandon it at the deadline and raise TimeoutError."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome[:] = work(), None
        except BaseException as error:  # belongs to the caller
            outcome[:] = None, error

    thread = threading.Thread(target=run, name="redis exchange", daemon=True)
    thread.start()
    thread.join(deadline_s)
    result, error = outcome or (None, TimeoutError(f"no whole answer within {deadline_s:.0f} s"))
    if error is not None:
        raise error
    return result


def backoff_s(failures: int) -> float:
    """Return how long to wait after so many failures in a row: 0.1 s, doubled each time, at most 30 s."""
    return min(30.0, 0.1 * 2.0 ** min(failures - 1, 20))


def redis_client(values: "dict[str, Any]") -> Any:
    """Return a redis-py client, not yet connected, of the server that has the stream; raise its errors."""
    import redis.cluster
    import redis.sentinel
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    given = {key.partition(".")[2]: value for key, value in values.items() if key.startswith("redis.")}
    options = {"host": given["host"], "port": given["port"], "ssl": given["tls"]}
    if given["url"]:
        options = dict(redis.connection.parse_url(given["url"]))  # type: ignore[no-untyped-call]
        options["ssl"] = options.pop("connection_class", None) is redis.connection.SSLConnection
        if "path" in options:
            options["unix_socket_path"] = options.pop("path")
    options.setdefault("db", given["db"])
    password = os.environ.get("CONTEXTUATE_REDIS_PASSWORD") or given["password"]
    login = {"username": given["username"], "password": password}
    options.update((name, value) for name, value in login.items() if value)
    for name, key in (("ca_certs", "caFile"), ("certfile", "certFile"), ("keyfile", "keyFile")):
        options["ssl_" + name] = path = given[key] and os.path.expanduser(given[key])
        if path:
            open(path, "rb").close()  # raises an error with the path, which that of OpenSSL does not contain
    options["ssl_cert_reqs"] = "required" if given["verify"] else "none"
    options.update(ssl_check_hostname=given["verify"], socket_connect_timeout=1.0)
    # Without retries, which reconnect silently, and without HELLO and CLIENT SETINFO, which need rights.
    options.update(socket_timeout=EXCHANGE_DEADLINE_S, retry=Retry(NoBackoff(), 0))
    known = inspect.signature(redis.Redis.__init__).parameters.keys()
    names = {"driver_info"} & known or {"lib_name", "lib_version"} & known  # where both are, these warn
    options.update(dict.fromkeys(names), **dict.fromkeys({"protocol"} & known, 2))
    rest = {name: value for name, value in options.items() if name not in ("host", "port", "db")}
    if given["sentinels"]:
        nodes = [host_and_port(node, 26379) for node in given["sentinels"]]
        login = {"username": None, "password": given["sentinelPassword"]}
        manager: Any = redis.sentinel.Sentinel(nodes, sentinel_kwargs={**rest, **login})  # type: ignore[no-untyped-call]
        options["host"], options["port"] = manager.discover_master(given["master"])
    elif given["cluster"]:
        nodes = [(options.get("host", "localhost"), options.get("port", 6379))]
        if given["cluster"] is not True:
            nodes = [host_and_port(node, 6379) for node in given["cluster"]]
        first = [redis.cluster.ClusterNode(*node) for node in nodes]  # type: ignore[no-untyped-call]
        cluster: Any = redis.cluster.RedisCluster(startup_nodes=first, require_full_coverage=False, **rest)
        with contextlib.closing(cluster):
            # PUBLISH at the node that has the stream reaches subscribers of every node.
            node = cluster.get_node_from_key(stream_name(values) or given["channel"])
        options.update(host=node.host, port=node.port, db=0)
    return redis.Redis(**options)


def stream_name(values: "dict[str, Any]") -> "Optional[str]":
    """Return the key of the stream; None when it is switched off."""
    return f"{values['redis.channel']}:stream" if values["redis.streamMaxLength"] else None


def redis_place(values: "dict[str, Any]") -> str:
    """Return where Redis is, for people: "host:port/db" or a socket's path, never a password."""
    if values["redis.sentinels"]:
        return f"{values['redis.master']} of the sentinels {', '.join(values['redis.sentinels'])}"
    if isinstance(values["redis.cluster"], list):
        return f"the cluster of {', '.join(values['redis.cluster'])}"
    if not values["redis.url"]:
        return f"{values['redis.host']}:{values['redis.port']}/{values['redis.db']}"
    parts = urllib.parse.urlsplit(values["redis.url"])
    if parts.scheme == "unix":
        return urllib.parse.unquote(parts.path)
    database = parts.path.strip("/") or values["redis.db"]
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}/{database}"


def redis_trouble(error: BaseException, values: "dict[str, Any]") -> str:
    """Return what is wrong with Redis; the monitor adds what to do."""
    if isinstance(error, ImportError):
        return f"redis-py is missing or too old for {sys.executable}"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    text = re.sub(r"^Error -?\d+ connecting to \S+\. |\[Errno -?\d+\] |\s*\(_ssl\.c:\d+\)\.?", "", text)
    return f"Redis at {redis_place(values)}: {text}"


def privacy_of(values: "dict[str, Any]") -> Privacy:
    """Return the privacy settings of a configuration."""
    metadata_only = values["privacy.level"] == "metadata"
    return Privacy(values["privacy.redact"], metadata_only, values["limits.fieldBytes"])


def run_publisher(lock_fd: int) -> None:
    """Run the publisher (the program with --publish); `lock_fd`: publisher.lock, locked by the hook."""
    home, config_path = (os.path.abspath(path) for path in places(os.environb))  # type: ignore[arg-type]
    os.environ["CONTEXTUATE_HOME"] = home  # for `log_failure`, in the directory below
    try:
        os.umask(0o077)
        os.chdir("/")  # the project's directory may be removed or unmounted meanwhile
        os.closerange(3, lock_fd)  # other inherited files are not held open
        os.closerange(lock_fd + 1, 256)
        os.set_inheritable(lock_fd, False)
        publisher = Publisher(home, config_path, lock_fd)
        signal.signal(signal.SIGTERM, lambda *_: setattr(publisher, "stopping", True))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        publisher.run()
    except BaseException as error:  # a traceback would be lost; the next hook starts another publisher
        log_failure(f"the publisher stopped: {error!r}")
    os._exit(0)  # an abandoned exchange may still block its thread


class Publisher:
    """Send the events in the spool to Redis, in order, until it has been quiet for a while."""

    def __init__(self, home: str, config_path: str, lock_fd: int) -> None:
        self._home, self._spool = home, home + "/spool"
        self._config_path, self._lock_fd = config_path, lock_fd
        self._basis, self._values = self._current_basis(), load_config(config_path)[0]
        self._privacy = privacy_of(self._values)
        self._client: Any = None
        self._connection: Any = None
        self._own_events: collections.deque[JsonObject] = collections.deque()  # for the next batch
        self._machine_key = machine_key(home)
        self._noted: dict[tuple[str, str], Any] = {}  # see add_agent_note
        self._registry, self._registry_due = RegistryWatcher(self._machine_key), 0.0  # time.monotonic
        self._usage = UsageWorker(home, self._deliver, not self._privacy.metadata_only)
        self._segment = ""  # that is being read, and its lines
        self._lines: collections.deque[bytes] = collections.deque()
        self._batch: _Batch = []  # read, not delivered yet
        self._sent: list[tuple[float, _Batch]] = []  # when (time.monotonic) and what, within RESEND_BYTES
        self._failures, self._next_attempt, self._at_once = 0, 0.0, 1  # in a row; time.monotonic; events
        self.stopping = False  # `run` returns after the current exchange; the spool keeps the rest
        self._outcomes: collections.deque[list[Any]] = collections.deque(maxlen=50)
        self._state: JsonObject = {
            "pid": os.getpid(), "state": "connecting", "reason": None, "server": redis_place(self._values),
            "published": 0,
            **dict.fromkeys(("subscribers", "channelState", "channelReason", "stream", "streamReason")),
        }  # fmt: skip
        self._written: JsonObject = {}  # the state as it is in publisher.json

    def run(self) -> None:
        """Publish until it has been quiet for PUBLISHER_QUIET_S, or the mode is no longer Redis."""
        last_event, closed, is_redis = time.monotonic(), 0, self._values["mode"] == "redis"
        while is_redis and not self.stopping and self._current_basis() == self._basis:
            now = time.monotonic()
            if now >= self._registry_due:
                self._registry_due = now + REGISTRY_POLL_S
                self._own_events.extend(self._registry.poll(now_ms()))
            if now >= self._next_attempt and not self._batch and self._read_batch():
                last_event, closed = now, 0
            if now >= self._next_attempt and self._batch:
                self._publish()
                if not self._failures and self._state["state"] == self._written.get("state"):
                    continue
            self._write_state()
            if self._batch:
                time.sleep(min(0.2, max(0.001, self._next_attempt - now)))
                continue
            if self._is_closed():
                closed, self._sent = closed + 1, self._sent if closed < 3 else []  # it may close what is idle
                self._fail(redis_trouble(ConnectionError("the connection was closed"), self._values))
                continue
            clients = self._registry.clients.values()
            is_busy = any(it["record"].about.get("status", "idle") != "idle" for it in clients)
            reported = {it["record"].session_id for it in clients if "status" in it["reported"]}
            is_busy = is_busy or bool(self._own_events) or self._usage.is_watching(reported)
            if now - last_event >= PUBLISHER_QUIET_S and not is_busy:
                break
            if now - last_event >= BUSY_S:
                self._enter("idle")
            time.sleep(0.005 if now - last_event < BUSY_S else IDLE_POLL_S)
        self._enter("stopped")
        self._write_state()  # before the next publisher writes its own
        fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
        # A hook appends before it tries the lock: the event of one that failed is seen here.
        is_next = self._current_basis() != self._basis or spool_segments(self._spool)
        if is_redis and is_next and not self.stopping:
            ensure_publisher(self._home)

    def _current_basis(self) -> "tuple[Any, ...]":
        """Return what is the same while a publisher runs: its interpreter and its configuration."""
        return publisher_python(self._home), _file_state(os.path.realpath(self._config_path))

    def _deliver(self, events: "list[JsonObject]") -> bool:
        """Publish events from transcripts; return when they have arrived. For the thread that reads these."""
        self._own_events.extend(events)
        while self._own_events or self._batch:
            time.sleep(IDLE_POLL_S)
        return True

    def _read_batch(self) -> bool:
        """Read the next events of one segment; a segment that is read and delivered is removed."""
        while self._own_events:
            self._add(self._own_events[0])
            self._own_events.popleft()  # it is in the batch now
        if not self._lines and not self._batch:
            with contextlib.suppress(FileNotFoundError):  # "" is none, too
                os.unlink(self._segment)
            self._segment = ""
            for path, _ in spool_segments(self._spool):
                with contextlib.suppress(OSError):  # a writer has it, it was drained, or it is not readable
                    taken = take_segment(path)
                    with open(taken, "rb", opener=open_own) as file:
                        self._lines.extend(filter(None, map(bytes.strip, file)))
                    self._segment = taken
                    break
            if self._segment and (dropped := take_dropped(self._spool)):
                text = f"the spool of this machine was full: {dropped} events were dropped"
                self._add({"eventType": "message", "data": {"message": text, "spoolDropped": dropped}})
        size = 0
        while self._lines and len(self._batch) < 200 and size < 256 << 10:
            line = self._lines.popleft()
            size += len(line)
            try:
                self._add(parse_event_line(line))
            except MemoryError:
                raise  # the next publisher reads it again
            except Exception as error:  # no line may stop those after it
                shown = type(error).__name__ if self._privacy.metadata_only else repr(error)
                reason = str(error) if isinstance(error, MalformedEvent) else f"could not be built: {shown}"
                log_failure(f"not an event ({reason}): {shown_head(line, 200, self._privacy)!r}")
                with contextlib.suppress(OSError):
                    keep_in_quarantine(self._home + "/quarantine.log", line, reason, self._privacy)
        return bool(self._batch)

    def _add(self, given: JsonObject) -> None:
        event = build_event(given, now_ms(), this_machine())
        if self._machine_key and event["machineId"] == this_machine():
            event.setdefault("machineKey", self._machine_key)
        self._usage.put(event)
        self._registry.learn(event)
        add_agent_note(event, self._noted)
        add_git_place(event)
        event, encoded = protect(event, self._privacy)
        self._batch.append((event["id"], encoded))

    def _publish(self) -> None:
        """Send as much of the batch as the link carries in time; keep the events that did not arrive."""
        batch, begun = self._batch[: self._at_once], time.monotonic()
        deadline_s = EXCHANGE_DEADLINE_S + sum(len(line) for _, line in batch) / 10_000  # bytes a second
        channel, stream = self._values["redis.channel"], stream_name(self._values)
        limit, is_cluster = self._values["redis.streamMaxLength"], bool(self._values["redis.cluster"])
        try:
            if self._client is None:
                self._client = within(2 * EXCHANGE_DEADLINE_S, lambda: redis_client(self._values))
                options = self._client.connection_pool.connection_kwargs
                options.update(socket_timeout=None, redis_connect_func=self._connect)  # see `within`
            pipeline = self._client.pipeline(transaction=False)  # a MULTI is refused whole
            for _, line in batch:
                pipeline.publish(channel, line)
                if stream:
                    pipeline.xadd(stream, {"event": line}, maxlen=limit, approximate=True)
            replies = within(deadline_s, lambda: pipeline.execute(raise_on_error=False))
        except Exception as error:  # the events stay in the spool
            self._fail(redis_trouble(error, self._values))
            return
        step, sent, kept = 2 if stream else 1, _Batch(), _Batch()
        for event, reached, added in zip(batch, replies[::step], replies[step - 1 :: step]):
            subscribers = reached if isinstance(reached, int) else None
            streamed = bool(stream) and not isinstance(added, Exception)
            self._outcomes.append([event[0], subscribers, streamed])
            published = bool(subscribers) or (subscribers == 0 and is_cluster)  # a node counts only its own
            (sent if streamed or (not stream and published) else kept).append(event)
        errors = (it if isinstance(it, Exception) else None for it in (reached, added if stream else None))
        reasons = on_channel, on_stream = [redis_trouble(it, self._values) if it else None for it in errors]
        self._state.update(subscribers=subscribers, published=self._state["published"] + len(sent))
        self._state.update(channelState="refused" if on_channel else "ok", channelReason=on_channel)
        stream_state = "refused" if on_stream else "ok" if stream else "off"
        self._state.update(stream=stream_state, streamReason=on_stream)
        self._batch = kept + self._batch[len(batch) :]
        self._sent += [(time.monotonic(), sent)] if sent else []
        while sum(len(line) for _, events in self._sent for _, line in events) > RESEND_BYTES:
            del self._sent[0]
        if kept:
            self._fail("; ".join(filter(None, reasons)) or f"no monitor is subscribed to {channel}")
        else:
            self._failures, is_quick = 0, time.monotonic() - begun < 1
            self._at_once = min(2 * self._at_once, 200) if is_quick else max(1, self._at_once // 2)
            self._enter("publishing")

    def _connect(self, connection: Any) -> None:
        """Log in; after events were sent, refuse another connection, which would hide that theirs broke."""
        if self._sent:
            raise ConnectionError("the connection was closed")
        connection.on_connect()
        self._connection = connection

    def _is_closed(self) -> bool:
        with contextlib.suppress(Exception):
            return self._connection is not None and bool(self._connection.can_read(0))  # no answer is due
        return True

    def _fail(self, reason: str) -> None:
        begin = max((at for at, _ in self._sent), default=0.0) - RESEND_S  # it may have been idle since then
        self._batch = [event for at, events in self._sent if at >= begin for event in events] + self._batch
        self._sent.clear()
        self._failures, self._at_once = self._failures + 1, 1
        self._next_attempt = time.monotonic() + backoff_s(self._failures)
        with contextlib.suppress(Exception):  # also when there is none
            self._client.connection_pool.disconnect(inuse_connections=True)
        self._client = self._connection = None
        self._enter("waiting", reason)
        drop_old_segments(self._spool)
        self.stopping |= not os.path.isdir(self._home)  # removed with all its events

    def _enter(self, state: str, reason: "Optional[str]" = None) -> None:
        if reason and (state, reason) != (self._state["state"], self._state["reason"]):
            log_failure(f"publisher: {reason}")
        self._state.update(state=state, reason=reason)

    def _write_state(self) -> None:
        """Write publisher.json if the state has changed."""
        if self._state != self._written:
            with contextlib.suppress(OSError):
                content = encode_json({**self._state, "recent": list(self._outcomes)})
                write_atomically(self._home + "/publisher.json", content + b"\n")
                self._written = dict(self._state)


def publisher_outcome(home: str, line: bytes) -> "list[str]":
    """Wait for the outcome of one wrapped line in publisher.json, not long; return it as text."""
    event = parse_event_line(line)
    wait_ms = 5000 if os.environ.get("CONTEXTUATE_DEBUG") == "wait" else 600
    while True:
        state = read_state(home + "/publisher.json")
        server = f"Redis at {state['server']}" if state.get("server") else "Redis"
        for known, count, streamed in state.get("recent", []):
            if known == event["id"]:
                got = "the channel was refused" if count is None else f"{count} subscribers got it"
                kept = "it is in the stream" if streamed else f"not in the stream ({state.get('stream')})"
                return [f"{server}: {got}, {kept}"]
        if now_ms() > event["timestamp"] + wait_ms:
            known = state.get("state", "stopped").replace("stopped", "starting")
            return [f"{server}: no outcome after {wait_ms} ms: {state.get('reason') or known}"]
        time.sleep(0.02)


# ---------------------------------------------------------------------------
# Answers: a hook that waits for a person's decision, and what it prints
#
# An answer only chooses: tool input and permission suggestions are printed from the hook's own payload, so
# nothing on the way can change what runs. Every failure prints nothing: the client's dialog stays.
# ---------------------------------------------------------------------------

ANSWERED_HOOKS = ("PermissionRequest", "Elicitation")
ANSWER_AGE_MS = 60_000  # older signed answers are dropped
ANSWER_ROUND_S = 2
_SIGNED = "machineId sessionId workingDirectory toolName toolInput permission_suggestions".split()
_SIGNED += ["mcp_server_name", "message", "requested_schema"]  # what a signed answer allows
_FORM_TYPES = {"string": (str,), "boolean": (bool,), "integer": (int,), "number": NUMBERS, "array": (list,)}


def precedes_dialog(asked: JsonObject) -> bool:
    """True if the client shows its dialog only after the hook: of subagents, and of MCP servers."""
    return asked.get("hook_event_name") == "Elicitation" or "agent_id" in asked


def deliver_and_wait(payload: bytes, notes: "list[str]") -> None:
    """Send one payload as `deliver` does, then wait for the answer and print it (with --answer)."""
    (home, config_path), wait_s, is_redis = places(posix.environ), 0, False
    with contextlib.suppress(Exception):  # the event is delivered in any case
        asked, values = parse_event_line(payload), load_config(config_path)[0]
        is_redis = values["mode"] == "redis"
        may_wait = not is_redis or (values["answers.remote"] and read_answer_key(home))
        is_held = precedes_dialog(asked)
        if sys.argv[2:]:  # another program: only locally, and only a permission
            is_held, tool = True, AGENTS[sys.argv[2]].tools.get(asked["tool_name"])
            may_wait = not is_redis and tool != "AskUserQuestion"
            asked.pop("permission_suggestions", None)
        if may_wait and values["privacy.level"] == "full" and asked.get("hook_event_name") in ANSWERED_HOOKS:
            wait_s = values["answers.backgroundSeconds" if is_held else "answers.waitSeconds"]
    kept = deliver(payload, notes, "hook", wait_s)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, lambda *_: os._exit(0))
    signal.alarm(wait_s + 5)
    if wait_s and is_redis:  # in another interpreter: this one runs without site-packages
        command = [publisher_python(home), "-E", __file__, "--wait-at-redis", kept[0], str(wait_s)]
        subprocess.run(command, input=payload, stderr=subprocess.DEVNULL, check=False)
    elif wait_s and kept[1:]:
        kept[1].settimeout(None)
        with open(kept[1].fileno(), "rb", closefd=False) as lines:
            line = lines.readline(256 << 10)
        if line.endswith(b"\n") and print_answer(asked, line):
            kept[1].sendall(ACKNOWLEDGEMENT)


def print_answer(asked: JsonObject, line: bytes) -> bool:
    """Print an answer in the client's form; return False if it is not a valid one."""
    with contextlib.suppress(ValueError, RecursionError):
        if output := client_answer(asked, json.loads(line.decode("utf-8"))):
            output = {"hookEventName": asked["hook_event_name"], **output}
            with open(1, "wb", closefd=False) as stdout:
                stdout.write(encode_json({"hookSpecificOutput": output}) + b"\n")
            return True
    return False


def client_answer(asked: JsonObject, answer: Any) -> "Optional[JsonObject]":
    """Return an answer to a payload in the client's form; None if it does not fit what was asked.

    `answer`: {"do": "allow"}, {"do": "always", "suggestions": [number, …]}, {"do": "deny", "message"?: text},
    {"do": "answer", "answers": [for each question a list of option numbers and texts]},
    {"do": "accept", "content": {field: value}}, {"do": "decline"} or {"do": "cancel"}.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("do"), str):
        return None
    do, names, tool_input = answer["do"], answer.keys() - {"do"}, asked.get("tool_input")
    hook, tool, decision = asked.get("hook_event_name"), asked.get("tool_name"), None
    if hook == "Elicitation":
        fits = names == {"content"} and fits_form(asked.get("requested_schema"), answer["content"])
        if do == "accept" and fits:
            return {"action": do, "content": answer["content"]}
        return {"action": do} if do in ("decline", "cancel") and not names else None
    if hook != "PermissionRequest" or not isinstance(tool_input, dict):
        return None
    words = answer.get("message", "The user does not want this.")
    if do == "deny" and names <= {"message"} and _is_text(words):
        decision = {"behavior": "deny", "message": words}
    elif tool == "AskUserQuestion":  # allowed without answers, it would return none
        chosen = _chosen(tool_input.get("questions"), answer.get("answers"))
        if do == "answer" and names == {"answers"} and chosen:
            decision = {"behavior": "allow", "updatedInput": {**tool_input, "answers": chosen}}
    elif do == "allow" and not names:  # a plan's is ignored without an input
        decision = {"behavior": "allow", **({"updatedInput": tool_input} if tool == "ExitPlanMode" else {})}
    elif do == "always" and names == {"suggestions"}:
        wanted = _items(asked.get("permission_suggestions"), answer["suggestions"])
        decision = {"behavior": "allow", "updatedPermissions": wanted} if wanted else None
    return decision and {"decision": decision}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and len(value) <= 20_000


def _items(offered: Any, numbers: Any) -> "list[Any]":
    """Return the objects with these numbers, each once; [] if there is not one for each number."""
    offered, numbers = (it if isinstance(it, list) else [] for it in (offered, numbers))
    are_good = all(type(it) is int and 0 <= it < len(offered) for it in numbers)
    found = [offered[it] for it in dict.fromkeys(numbers)] if are_good else []
    return found if found == objects_in(found) else []


def _chosen(questions: Any, answers: Any) -> JsonObject:
    """Return {question: label or own words, several as a list}; {} unless each question is answered."""
    chosen: JsonObject = {}
    if not isinstance(answers, list) or len(objects_in(questions)) != len(answers):
        return {}
    for question, picked in zip(objects_in(questions), answers):
        labels: list[Any] = []
        for it in picked if isinstance(picked, list) else ():
            options = [{"label": it}] if isinstance(it, str) else _items(question.get("options"), [it])
            labels += [option.get("label") for option in options] or [None]
        is_several = question.get("multiSelect") is True
        are_texts = all(map(_is_text, [*labels, question.get("question")]))
        if not labels or not are_texts or (labels[1:] and not is_several):
            return {}
        chosen[question["question"]] = labels if is_several else labels[0]
    return chosen


def fits_form(schema: Any, content: Any) -> bool:
    """True if `content` has the fields that an elicitation's schema asks for, each of its type."""
    schema = schema if isinstance(schema, dict) else {}
    fields, required = schema.get("properties"), schema.get("required") or []
    if not isinstance(content, dict) or not isinstance(fields, dict) or not isinstance(required, list):
        return False
    for name, value in content.items():
        field = fields.get(name)
        if not isinstance(field, dict) or type(value) not in _FORM_TYPES.get(str(field.get("type")), ()):
            return False
        is_good = all(map(_is_text, value)) if isinstance(value, list) else value not in (math.inf, -math.inf)
        if not is_good or (field.get("enum") and value not in field["enum"]):
            return False
    return all(isinstance(it, str) and it in content for it in required)


def read_answer_key(home: str) -> bytes:
    """Return the key that signs answers through Redis; b"" if there is none."""
    key = read_small(home + "/answers.key").strip()
    return key if re.fullmatch(rb"[0-9a-f]{64}", key) else b""


def answer_place(values: "dict[str, Any]", kind: str, event_id: str = "") -> str:
    """Return a key in Redis: of the list `answer`, of `answered` (by which one), or of `looking` (a page)."""
    prefix = values["redis.channel"]
    if values["redis.cluster"] and stream_name(values) and "{" not in prefix:
        prefix = f"{{{stream_name(values)}}}"  # on the node that has the stream
    return f"{prefix}:{kind}:{event_id}" if event_id else f"{prefix}:{kind}"


def signature(key: bytes, asked: JsonObject, answer: Any, at: Any, nonce: Any) -> str:
    """Return the HMAC-SHA256, in hex, of an answer to an event; unless it refuses, of what was shown, too."""
    parts = [asked["id"], answer, at, nonce]
    if isinstance(answer, dict) and answer.get("do") not in ("deny", "decline", "cancel"):
        parts += map({**asked["data"], **asked}.get, _SIGNED)
    return hmac.new(key, encode_json(parts), hashlib.sha256).hexdigest()


def redis_ms(client: Any) -> int:
    """Return the time of Redis's clock in ms."""
    seconds, micros = client.time()
    return int(seconds) * 1000 + int(micros) // 1000


def wait_at_redis(event_id: str, wait_s: int) -> None:
    """Wait for the signed answer to the payload on standard input, and print it (with --wait-at-redis)."""
    home, config_path = places(posix.environ)
    asked, values = parse_event_line(sys.stdin.buffer.read()), load_config(config_path)[0]
    event = protect(build_event({"id": event_id, "hook": asked}, 0, this_machine()), privacy_of(values))[0]
    key, list_key = read_answer_key(home), answer_place(values, "answer", event_id)
    parent, deadline, client = os.getppid(), time.monotonic() + wait_s, None
    dropped: collections.Counter[str] = collections.Counter()

    def round_of(client: Any) -> bool:
        """Wait for one value; return True when the wait is over."""
        if precedes_dialog(asked) and not client.exists(answer_place(values, "looking")):
            return True
        got = client.blpop([list_key], ANSWER_ROUND_S)
        if got is None or got[1] == b"":  # answered at the terminal
            return got is not None
        try:
            given, why = parse_event_line(got[1]), ""
            answer, at, nonce, mac = map(given.__getitem__, ("answer", "at", "nonce", "mac"))
            if not hmac.compare_digest(mac, signature(key, event, answer, at, nonce)):
                why = "foreign"
            elif abs(redis_ms(client) - at) > ANSWER_AGE_MS:
                why = "old"
            elif not print_answer(asked, encode_json(answer)):
                why = "unfit"
        except (MalformedEvent, KeyError, TypeError):
            why = "unsigned"
        if why:
            dropped[why] += 1
            return False
        taken = encode_json({"nonce": nonce, "mac": signature(key, event, "taken", 0, nonce)})
        client.set(answer_place(values, "answered", event_id), taken, px=ANSWER_AGE_MS)
        return True

    while time.monotonic() < deadline and os.getppid() == parent:
        try:
            client = client or within(2 * EXCHANGE_DEADLINE_S, functools.partial(redis_client, values))
            if within(ANSWER_ROUND_S + EXCHANGE_DEADLINE_S, functools.partial(round_of, client)):
                break
        except ImportError:
            break
        except Exception:  # Redis restarts, for example
            client = None
            time.sleep(0.5)
    if dropped:
        text = "Answers through Redis were refused: " + ", ".join(f"{dropped[it]} {it}" for it in dropped)
        hook = {"session_id": asked.get("session_id"), "message": text}
        append_to_spool(home + "/spool", encode_json({"id": str(uuid.uuid4()), "hook": hook}) + b"\n")
        ensure_publisher(home)
    os._exit(0)  # an abandoned exchange may still block its thread
