"""Tests of bounds: what is sent of a session, fairness between machines, machines, rest, older events."""

# ruff: noqa: D103, F811 (as in test_monitor.py)

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import statistics
import threading
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import contextuate_monitor as cm
import emit_event as ee
from test_monitor import RunningMonitor, eventually, monitor, payload, running  # noqa: F401

# room: Journal


def test_older_events_of_all_sessions_come_through_the_index(monitor: RunningMonitor) -> None:
    now = cm.now_ms()
    for number in range(60):  # three days of twenty files, two events and a usage in each
        received = now - (number // 20) * 86_400_000
        folder = f"{monitor.home}/events/{cm.day_of(received)}"
        os.makedirs(folder, exist_ok=True)
        lines = []
        for at, kind in enumerate(("turn_end", "usage", "turn_end")):
            event = {
                "id": f"{number}-{at}",
                "timestamp": received,
                "sessionId": f"s{number}",
                "eventType": kind,
            }
            event.update(machineId="m", workingDirectory="/w", hookType="", data={})
            lines.append(
                cm.numbered_line(3 * (59 - number) + at + 1, received, ee.encode_json(event)) + b"\n"
            )
        with open(f"{folder}/s{number}.jsonl", "wb") as file:
            file.writelines(lines)
    monitor.serve()
    eventually(lambda: monitor.get("/api/status")["index"]["state"] == "ready")
    client = monitor.websocket("full")
    for before, limit in ((181, 7), (100, 50), (61, 100), (2, 5), (1, 5)):
        expected = list(range(max(1, before - limit), before))
        page = monitor.get(f"/api/events?limit={limit}&before={before}")
        answer = client.ask("all_events", type="get_all_recent_events", limit=limit, before=before)
        for found in (page, answer):
            assert [event["seq"] for event in found["events"]] == expected
            assert found["more"] is (before - limit > 1)
    client.close()


def test_the_index_reads_a_page_of_older_events_without_other_files(tmp_path: Any, monkeypatch: Any) -> None:
    journal = cm.Journal(str(tmp_path / "events"))
    journal.open()
    history = cm.History(journal, str(tmp_path / "index.db"))
    history.start()
    for number in range(40):
        event = ee.build_event({"hook_event_name": "Stop", "session_id": f"s{number}"}, cm.now_ms(), "m")
        history.add([entry for entry in journal.append([event], cm.now_ms()) if entry])
    eventually(lambda: history.status()["lagEvents"] == 0 and history.status()["state"] == "ready")
    opened: list[str] = []
    read = cm.JournalFile.__init__
    monkeypatch.setattr(
        cm.JournalFile, "__init__", lambda it, path, about: (opened.append(path), read(it, path, about))[1]
    )
    assert [cm.line_seq(line) for line in history.newest(3, None, 20)] == [19, 18, 17]
    assert len(opened) == 3
    history.stop()


# room: Sessions


def calls_of(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Return events of so many calls without a result."""
    call = {"tool_name": "Bash", "tool_input": {"command": "make"}, **fields}
    hooks = [payload("PreToolUse", tool_use_id=f"t{number}", **call) for number in range(count)]
    return [ee.build_event(hook, 1000 + number, "m") for number, hook in enumerate(hooks)]


@pytest.mark.parametrize(("count", "limit"), [(3, 5000), (20, 5000), (50, 5000), (50, 30)])
def test_a_session_is_sent_with_its_newest_calls_and_their_number(
    count: int, limit: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(cm, "CALLS_LIMIT", limit)
    book = cm.Sessions()
    for event in calls_of(count):
        book.apply(event)
    sent = book.to_json(book.sessions["s1"])
    assert [call["toolUseId"] for call in sent["openCalls"]] == [f"t{it}" for it in range(count)[-20:]]
    assert (sent["openCallCount"], sent["counts"]["interrupted"]) == (
        min(count, limit),
        max(0, count - limit),
    )
    end = payload("PostToolUse", tool_name="Bash", tool_use_id="t0", tool_input={"command": "make"})
    sent = book.to_json(book.apply(ee.build_event(end, 9000, "m")))
    assert sent["counts"]["toolCalls"] == count
    assert (sent["openCallCount"], sent["counts"]["interrupted"]) == (
        min(count - 1, limit),
        max(0, count - limit - 1),
    )


def test_running_agents_are_sent_before_those_that_ended() -> None:
    book, agents = cm.Sessions(), [f"a{number}" for number in range(60)]
    events = [(agent, "SubagentStart") for agent in agents] + [
        (agent, "SubagentStop") for agent in agents[5:]
    ]
    for number, (agent, hook) in enumerate(events):
        book.apply(ee.build_event(payload(hook, agent_id=agent, agent_type="Explore"), 1000 + number, "m"))
    sent = book.to_json(book.sessions["s1"])
    assert [agent["agentId"] for agent in sent["agents"]] == agents[:5] + agents[45:]
    assert sent["agentCount"] == 60


@given(
    st.lists(
        st.tuples(
            st.integers(0, 4),
            st.sampled_from(("UserPromptSubmit", "Stop", "SubagentStart", "SessionEnd", "wait")),
            st.integers(1, 9000),
        ),
        max_size=30,
    )
)
def test_looking_when_something_is_due_gives_what_looking_always_gives(
    steps: list[tuple[int, str, int]],
) -> None:
    books = [cm.Sessions(quiet_ms=120_000, ended_ms=3_600_000) for _ in range(2)]
    now = 1_000_000
    for number, (session, hook, seconds) in enumerate(steps):
        now += seconds * 1000
        event = payload(hook, f"s{session}", **({"agent_id": "a"} if hook == "SubagentStart" else {}))
        for always, book in enumerate(books):
            if hook != "wait":
                book.apply(ee.build_event(event, now, f"m{session % 3}") | {"id": str(number)})
            if always:  # every session is due
                book._due = sorted((0, each) for each in book.sessions)
                book._due_at = dict.fromkeys(book.sessions, 0)
            book.tick(now, now)
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


# room: Event loop


def lines_of(machine: str, count: int) -> list[tuple[bytes, str]]:
    """Return arrivals of one machine as the hook writes them, and of which number each is."""
    return [
        (
            b'{"hook":{"tool_input":"%s"},"id":"1","machineId":"%s","pid":1}'
            % (rb"\"machineId\":\"x\"", machine.encode()),
            f"{machine}{number}",
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("waiting", "taken"),
    [
        ({"a": 3}, [["a0", "a1", "a2"]]),
        ({"a": 7, "b": 1}, [["a0", "a1", "b0"], ["a2", "a3", "a4", "a5"], ["a6"]]),
        ({"a": 3, "b": 3, "c": 3}, [["a0", "b0", "c0"], ["a1", "b1", "c1"], ["a2", "b2", "c2"]]),
        ({"a": 2, "b": 1, "c": 1, "d": 1, "e": 1}, [["a0", "b0", "c0", "d0"], ["e0", "a1"]]),
    ],
)  # fmt: skip
def test_machines_take_turns(waiting: dict[str, int], taken: list[list[str]], monkeypatch: Any) -> None:
    monkeypatch.setattr(cm, "TURN_LINES", 4)
    turns = cm.Turns()
    for machine, count in waiting.items():
        turns.add(*lines_of(machine, count))
    rounds = []
    while turns:
        rounds.append([number for _, number in turns.take()])
    assert (rounds, turns.size, turns.take()) == (taken, 0, [])


def test_a_flood_of_one_machine_does_not_delay_another(running: RunningMonitor) -> None:
    client, stopping = running.websocket("rows", changes=True), threading.Event()
    line = {
        "id": "",
        "timestamp": cm.now_ms(),
        "machineId": "flood",
        "hook": payload("PreToolUse", "flood", tool_name="Bash"),
    }

    def flood(worker: int) -> None:
        with running.connect() as sock:
            for number in itertools.count():
                if stopping.is_set():
                    return
                batch = [{**line, "id": f"{worker}-{number}-{at}"} for at in range(200)]
                sock.sendall(b"".join(ee.encode_json(each) + b"\n" for each in batch))
                with contextlib.suppress(BlockingIOError):
                    sock.recv(1 << 16, socket.MSG_DONTWAIT)

    senders = [threading.Thread(target=flood, args=(worker,)) for worker in range(8)]
    for sender in senders:
        sender.start()
    eventually(lambda: running.get("/api/status")["events"]["stored"] > 1000)
    delays = []
    for number in range(5):
        session, begun = f"asks-{number}", time.monotonic()
        request = payload("PermissionRequest", session, tool_name="Bash", tool_input={"command": "ls"})
        running.emit({"id": session, "timestamp": cm.now_ms(), "machineId": "calm", "hook": request})
        while client.next("session_update")["session"]["sessionId"] != session:
            pass
        delays.append(time.monotonic() - begun)
    stopping.set()
    client.close()
    for sender in senders:
        sender.join(30)
    assert statistics.median(delays) < 1, delays


def test_a_page_that_reads_too_slowly_misses_rows_and_no_state(running: RunningMonitor) -> None:
    running.write_config({"limits": {"clientQueueBytes": 200_000}})
    running.stop()
    client = running.serve().websocket("rows", changes=True)
    command = {"command": "make " + "x" * 150}
    for number in range(60):  # more than sockets and queue take: nothing is read meanwhile
        running.emit(
            *(
                payload("PreToolUse", tool_name="Bash", tool_use_id=f"{number}-{at}", tool_input=command)
                for at in range(200)
            )
        )
    running.emit(payload("PermissionRequest", "asks", tool_name="Bash"))
    rows, sent = 0, {}
    while not (sent.get("type") == "skipped" and rows):
        sent = json.loads(client.connection.recv(timeout=30))
        rows += sent["type"] == "event"
        if sent["type"] == "session_update" and sent["session"]["sessionId"] == "asks":
            assert sent["session"]["state"] == "waiting"
    assert 0 < rows < rows + sent["events"] == 12_001
    client.close()


def test_an_update_has_only_what_changed(running: RunningMonitor) -> None:
    page, other = running.websocket("rows", changes=True), running.websocket("rows")

    def updates(*hooks: dict[str, Any]) -> list[dict[str, Any]]:
        running.emit(*hooks)
        last = running.sessions()["s1"]["lastEventTime"]
        found = []
        for client in (page, other):
            update = {}
            while update.get("lastEventTime") != last:
                update = client.next("session_update")["session"]
            found.append(update)
        return found

    first, whole = updates(payload("UserPromptSubmit", prompt="work"))
    assert first == whole
    call = payload("PreToolUse", tool_name="Bash", tool_use_id="t1")
    changes, whole = updates(call)
    assert set(changes) == {"sessionId", "lastEventTime", "counts", "activity", "openCalls", "openCallCount"}
    assert {**first, **changes} == whole
    page.ask("sessions", type="get_sessions")  # may be newer than the last update
    changes, whole = updates(payload("Stop"))
    assert changes == whole
    page.close(), other.close()


# room: The Monitor


def test_machines_beyond_a_thousand_are_a_number(running: RunningMonitor) -> None:
    hook = {"hook": payload("Stop"), "timestamp": cm.now_ms()}
    running.emit(*({**hook, "id": str(number), "machineId": f"box-{number}"} for number in range(1200)))
    status = running.get("/api/status")
    assert {it["machineId"] for it in status["machines"]} == {f"box-{number}" for number in range(200, 1200)}
    assert status["otherMachines"] == 200
    assert "200 others" in str(status["facts"])
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
