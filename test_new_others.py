# ruff: noqa: D103, E501, I001, E402
"""Tests of issue 16, rows 10, 11, 13, 14 and 15; they are moved into the rooms of test_monitor.py."""

from __future__ import annotations

from test_monitor import *  # noqa: F403
from test_monitor import (
    BROWSER_ALERTS, NOW_MS, RECORDED, REDIS_CHANNEL, BrowserTab, RedisMachine, RedisServer, RunningMonitor, cm, ee, eventually,
    hook_call, in_process, index_ready, payload, write_files,
)  # fmt: skip
import dataclasses
import glob
import json
import os
import re
import subprocess
import time
from typing import Any

import pytest

# room: Event model

NODE = {"timestamp": NOW_MS, "machineId": "mac", "workingDirectory": "/w"}
NODE_STOP = {"eventType": "session_end", "hookType": "Stop", "sessionId": "0123456789abcdef"}
NODE_START = {
    "eventType": "subagent_start", "hookType": "SubagentStart", "sessionId": "a1b2c3d4", "parentSessionId": "p1",
}  # fmt: skip
NODE_SUMS = {"input": 30, "output": 60, "cacheRead": 15, "cacheCreation5m": 7, "cacheCreation1h": 2}
NODE_COUNTS = {"input": 30, "output": 60, "cacheRead": 15, "cacheCreation": 9, "cacheCreation1h": 2}
# What the Node.js emitter sends → fields of our event; None: it is not there.
NODE_EVENTS = {
    "its sums are tokens of the session": (
        {**NODE_STOP, "data": {"model": "claude-opus-4-5", "sessionTokenUsage": NODE_SUMS}},
        {"usage": {"models": {"claude-opus-4-5": NODE_COUNTS}, "agents": {}}},
    ),
    "sums of odd types cost nothing": (
        {**NODE_STOP, "data": {"model": 5, "sessionTokenUsage": {"input": "many", "cacheCreation5m": None}}},
        {"usage": {"models": {"unknown": {**dict.fromkeys(ee.COUNT_NAMES), "input": "many", "cacheCreation": 0}},
                   "agents": {}}},
    ),
    "a subagent is an agent of its session": (
        {**NODE_START, "data": {"subagent": {"type": "explore"}}},
        {"sessionId": "p1", "agentId": "a1b2c3d4", "agentType": "explore", "parentSessionId": None},
    ),
    "a session below another stays a session": (
        {**NODE_START, "hookType": "Stop", "data": {"subagent": {"type": "explore"}}},
        {"sessionId": "a1b2c3d4", "agentId": None, "parentSessionId": "p1"},
    ),
    "an odd parent is content": (
        {**NODE_START, "parentSessionId": 5, "data": {"subagent": {"type": 7}}},
        {"sessionId": "unknown", "agentId": "a1b2c3d4", "agentType": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", NODE_EVENTS)
def test_an_event_of_the_node_emitter_gets_our_names(rule: str) -> None:
    given, wanted = NODE_EVENTS[rule]
    event = ee.build_event({**NODE, **given}, NOW_MS, "box")
    shown = {name: event.get(name, event["data"].get(name)) for name in wanted}
    assert shown == {**wanted, **({"agentType": 7} if "odd parent" in rule else {})}
    cm.Sessions().apply(event)


# room: Token usage


def test_a_transcript_that_is_here_counts_instead_of_the_sums(running: RunningMonitor) -> None:
    (transcript,) = glob.glob(f"{RECORDED}/transcripts/parallel/*.jsonl")
    data = {"transcriptPath": transcript, "sessionTokenUsage": {**NODE_SUMS, "input": 10**9}}
    running.emit({**NODE, **NODE_STOP, "machineId": "testbox", "timestamp": cm.now_ms(), "data": data})
    used = eventually(lambda: running.sessions()["0123456789abcdef"]["tokenUsage"])
    assert used["totalOutput"] and used["totalInput"] < 10**9


# room: Journal


def test_the_status_names_a_slow_write(running: RunningMonitor, tmp_path: Any, monkeypatch: Any) -> None:
    store, write = cm.Journal(str(tmp_path)), os.write
    for pause_s in (0.0, 0.12):
        assert store.slow_write[1] == 0
        monkeypatch.setattr(os, "write", lambda *given, pause_s=pause_s: time.sleep(pause_s) or write(*given))
        store.append([ee.build_event(payload("Stop"), NOW_MS, "box")], NOW_MS)
    assert store.slow_write[1] >= 120
    status = running.get("/api/status")
    assert status["store"]["slowWriteMs"] is None
    status["store"]["slowWriteMs"] = 340
    (problem,) = cm.status_problems(status, 0)
    assert (
        problem["kind"] == "store"
        and "took 340 ms" in problem["words"]
        and "faster disk" in problem["advice"]
    )


# room: Redis mode

REDIS_GUIDE = """# ~/.contextuate/monitor.config.json
{
  "mode": "redis",   // "local" or "redis"
  "server": {"host": "127.0.0.1", "port": 0, "wsPort": 0},
  "redis": {
    "host": "localhost",  // shared Redis server
    "port": %d,
    "password": %s,  /* null without one */
    "channel": "contextuate:events",
  },
  "persistence": {"enabled": true, "type": "file"},
  "socketPath": "%s",
}
"""


def test_the_guide_to_redis_mode_holds_command_by_command(make: Any) -> None:
    server = make(RedisServer, password="a-long-password")
    one, two = make(RedisMachine, machine_id="one"), make(RedisMachine, machine_id="two")

    def configure(machine: RedisMachine, password: str) -> None:
        text = REDIS_GUIDE % (server.port, json.dumps(password), machine.socket_path)
        ee.write_atomically(machine.home + "/monitor.config.json", text.encode("ascii"))

    def debugged(machine: RedisMachine, **fields: Any) -> tuple[str, float]:
        environment, began = {**machine.environment, "CONTEXTUATE_DEBUG": "1"}, time.monotonic()
        done = hook_call(machine.hook, payload("UserPromptSubmit", **fields), environment)
        return done, time.monotonic() - began

    for machine in (one, two):
        configure(machine, "a-long-password")
    assert server.cli("PING") == "PONG"
    # `start` returns; what is published by hand right then is shown by this monitor and a subscriber.
    one.start()
    command = ["redis-cli", "-p", str(server.port), "SUBSCRIBE", REDIS_CHANNEL]
    login = {**os.environ, "REDISCLI_AUTH": server.password}
    subscriber = subprocess.Popen(command, env=login, stdout=subprocess.PIPE, text=True)
    try:
        assert server.cli("PUBLISH", REDIS_CHANNEL, '{"test":"message"}') >= "1"
        eventually(lambda: "unknown" in one.sessions(), what="the message that was published by hand")
        assert one.stored_events()[0]["data"] == {"test": "message"}
        eventually(lambda: server.cli("PUBSUB", "NUMSUB", REDIS_CHANNEL).split()[1] == "2")
        # Debug lines: the configuration, the mode, the connection, who got it.
        words, _ = debugged(one, session="first", prompt="hello")
        for part in (
            r"config \S+/monitor\.config\.json",
            "mode redis",
            f"localhost:{server.port}",
            "2 subscribers",
        ):
            assert re.search(part, words), (part, words)
        plain = next(line for line in subscriber.stdout or () if "hello" in line)
        assert json.loads(plain)["data"]["message"] == "hello", "redis-cli shows the event itself"
    finally:
        subscriber.kill()
        subscriber.wait()
    # A second monitor gets what was said before it and what is said now; so does the first.
    two.start()
    debugged(two, session="second", prompt="hello")
    for machine in (one, two):
        eventually(lambda machine=machine: {"first", "second"} <= set(machine.sessions()))
        assert {machine.sessions()[it]["machineId"] for it in ("first", "second")} == {"one", "two"}
    # A wrong password: nobody waits, everyone says so, nothing is lost.
    configure(two, "wrong")
    two.end_publisher()
    two.command("restart")
    two.know()
    words, took_s = debugged(two, session="third", prompt="hello")
    assert "password" in words and "wrong" not in words.replace("wrong password", "") and took_s < 8, (
        words,
        took_s,
    )
    assert "password" in two.wait_until("waiting")["reason"]
    assert "password" in two.command("doctor", check=False).stdout
    configure(two, "a-long-password")
    two.command("restart")
    two.know()
    for machine in (one, two):
        eventually(lambda machine=machine: "third" in machine.sessions(), 60)


# room: Browser


def test_a_wait_is_news_once_it_has_lasted_a_second(tab: BrowserTab, open_tab: Any) -> None:
    tab = open_tab(tab.monitor, script=BROWSER_ALERTS, permissions=["notifications"])
    tab.page.evaluate("localStorage.setItem('contextuate.notify', 'true')")
    tab.load()
    tab.emit("@short prompt short work; @long prompt long work")
    eventually(lambda: tab.counts() == {"working": 2})
    tab.page.evaluate(
        """() => {
            window.said = [];
            const live = document.getElementById('announce');
            const note = () => {
              const now = `${document.title}/${live.textContent}`;
              if (now !== 'Contextuate Monitor/') said.push(now);
            };
            for (const it of [document.querySelector('title'), live])
              new MutationObserver(note).observe(it, { childList: true, characterData: true, subtree: true });
        }"""
    )
    short = 0  # waits that the page has seen for less than a second: on a busy machine some last longer
    for number in range(10):
        began = time.monotonic()
        tab.emit(f"@short call rm {number}; @short ask rm {number}")
        eventually(lambda: tab.counts().get("waiting") == 1)
        tab.emit(f"@short result rm {number} => done")
        eventually(lambda: "waiting" not in tab.counts())
        if time.monotonic() - began > 0.9:
            tab.page.evaluate("said.length = alerts.length = 0")
            continue
        assert tab.page.evaluate("said.concat(alerts)") == []
        short += 1
    if not short:
        pytest.skip("the machine is too busy to answer within a second")
    tab.emit("@long call make; @long ask make")
    eventually(lambda: tab.page.title() == "(1) Contextuate Monitor")
    assert [title for title, _ in tab.page.evaluate("alerts")][-1:] == ["long work needs you"]
    eventually(lambda: tab.page.inner_text("#announce") == "1 session needs you")
    tab.emit("@long result make => done")
    eventually(lambda: tab.page.title() == "Contextuate Monitor")
    assert tab.page.inner_text("#announce") == "No session needs you"


# room: Index


def test_what_two_interpreters_deliver_counts_once(running: RunningMonitor) -> None:
    command = running.installed_command()
    environment = {**running.environment, "CLAUDE_PID": str(os.getpid())}
    use = {"tool_name": "Bash", "tool_use_id": "toolu_1", "tool_input": {"command": "make pudding"}}
    steps = [
        ("UserPromptSubmit", {"prompt": "make pudding"}), ("PreToolUse", use),
        ("PostToolUseFailure", {**use, "error": "no pudding", "duration_ms": 40}),
    ]  # fmt: skip
    for hook, fields in steps:
        for _ in range(2):
            hook_call(command, payload(hook, **fields), environment)
    counts = running.sessions()["s1"]["counts"]
    assert (counts["prompts"], counts["toolCalls"], counts["toolErrors"], counts["events"]) == (1, 1, 1, 3)
    index_ready(running)
    totals = running.get("/api/stats")["totals"]
    assert [totals[name] for name in ("events", "prompts", "toolCalls", "failures")] == [3, 1, 1, 1]
    assert len(running.get("/api/search?q=pudding")["results"]) == 3
    metrics = running.request("/metrics")[2].decode()
    assert (
        'failures_total{tool="Bash"} 1\n' in metrics and 'duration_seconds_count{tool="Bash"} 1\n' in metrics
    )
    assert running.get("/api/status")["events"]["duplicates"] == 3


# Events as HOOK@MS[#FIELD=VALUE], of one client → which of them are stored.
SECOND_DELIVERIES = {
    "a call, delivered again seconds later": ("PreToolUse@0#toolUseId=a PreToolUse@4000#toolUseId=a", "0"),
    "steps of one call are different events": ("PreToolUse@0#toolUseId=a PostToolUse@1#toolUseId=a", "01"),
    "a prompt, at once, before or after": ("UserPromptSubmit@500 UserPromptSubmit@100", "0"),
    "the same words again are a prompt of their own": ("UserPromptSubmit@0 UserPromptSubmit@600", "01"),
    "each is compared with the first": ("UserPromptSubmit@0 UserPromptSubmit@400 UserPromptSubmit@800", "02"),
    "an agent may ask twice for the same": ("PermissionRequest@0 PermissionRequest@1", "01"),
    "calls of old clients have no id": ("PreToolUse@0 PreToolUse@1", "01"),
}


@pytest.mark.parametrize("rule", SECOND_DELIVERIES)
def test_a_second_delivery_is_stored_once(tmp_path: Any, rule: str) -> None:
    story, kept = SECOND_DELIVERIES[rule]
    journal = cm.Journal(str(tmp_path / "events"))
    ingest = cm.Ingest(
        cm.Settings(str(tmp_path), "", "box", ee.default_values()), journal, lambda event: None
    )
    for number, (hook, at, name, value) in enumerate(re.findall(r"(\w+)@(\d+)(?:#(\w+)=(\w+))?", story)):
        event = {
            "id": str(number),
            "timestamp": NOW_MS + int(at),
            "sessionId": "s",
            "machineId": "box",
            "pid": 9,
        }
        data = {"message": "same", **({name: value} if name else {})}
        ingest.take(
            [ee.encode_json({**event, "hookType": hook, "eventType": ee.EVENT_TYPES[hook], "data": data})]
        )
    ingest.close()
    assert "".join(cm.line_id(line) for line in journal.lines()) == kept


# room: Retention


@dataclasses.dataclass
class ClockStory:
    """A machine with a clock that is set, and events that are kept for 30 days."""

    home: str
    patch: Any
    wall_ms: int = NOW_MS
    steady_ms: int = 0
    boot: int = 0

    def __post_init__(self) -> None:
        self.patch.setattr(cm, "now_ms", lambda: self.wall_ms)
        self.patch.setattr(cm, "steady_ms", lambda: float(self.steady_ms))
        self.patch.setattr(cm, "boot_id", lambda: f"boot {self.boot}")
        self.store = cm.Journal(self.home + "/events")
        self.memory: Any = None

    def step(self, verb: str, words: str) -> None:
        """Do one step: a capital letter stores an event of that session; `soon`: the next is in its second."""
        words, soon = words.removesuffix("soon").strip(), words.endswith("soon")
        amount = (
            int(float(words[:-1]) * {"y": 365, "d": 1, "h": 1 / 24}[words[-1]] * 86_400_000) if words else 0
        )
        if verb in ("pass", "set", "off"):
            self.wall_ms += amount
            self.steady_ms += amount if verb == "pass" else 0
        if verb == "off":
            self.steady_ms, self.boot = 0, self.boot + 1
        if verb == "stop":
            self.memory.look(self.store.seq, save=True)
            self.memory = None
        elif verb == "start":
            self.memory = cm.ClockMemory(self.home + "/clock.json")
        elif verb == "kill":
            self.memory = None
        elif verb == "damage":
            ee.write_atomically(self.home + "/clock.json", b'{"time": 5, "steps": 7}')
        elif verb.isupper():
            event = ee.build_event(payload("Stop", verb.lower()), self.wall_ms, "box")
            self.store.append([event], self.wall_ms)
        if self.memory and not soon:
            self.memory.look(self.store.seq)

    def kept(self, limit: int | None = None) -> str:
        """Return the sessions that retention keeps now."""
        plan = cm.plan_retention(self.home, self.wall_ms, 30, limit, frozenset(), self.memory.steps)
        left = {file.path for file in self.store.files()} - {file.path for file in plan.files}
        return "".join(sorted(os.path.basename(path)[0].upper() for path in left))


# Steps, and after → which sessions are kept; `off`: the machine is, and boots then; `set`: the clock, by so much.
CLOCK_STORIES = {
    "time that passes makes events old": "start; A; pass 20d; B → AB; pass 11d → B; pass 20d → ",
    "a clock that stood at 1970": "set -56y; start; A; set +56y; B; stop; start → AB; pass 29d → AB; pass 2d → ",
    "it was set while the monitor did not run": "set -56y; start; A; stop; set +56y; start; B → AB; pass 31d → ",
    "an event of the second in which it was set": "set -56y; start; A soon; set +56y; pass 2d → A",
    "an event of the second in which it was set back": "start; set -56y soon; A; set +56y; pass 2d → A",
    "a kill forgets no step": "set -56y; start; A; set +56y; kill; start; B → AB; pass 31d → ",
    "it was set before the next boot": "set -56y; start; A; stop; off 1h; set +56y; start; B → AB; pass 31d → ",
    "the clock is 1970 after each boot": "start; A; stop; off 1h; set -56y; start; B; set +56y; C → ABC; pass 31d → ",
    "a clock wrongly set forward": "start; A; set +4y; B → AB; stop; start → AB; set -4y; C → ABC; pass 31d → B",
    "and found out at another boot": "start; A; set +4y; stop; start → A; stop; off 1h; set -4y; start → A",
    "no event is too old on a day on which it was set": "start; A; pass 31d; set +2h → A; pass 1d → ",
    "but a correction by minutes is none": "start; A; pass 31d; set +0.5h → ",
    "weeks in which the machine was off count": "start; A; stop; off 31d; start → ",
    "a damaged memory is none": "start; A; stop; damage; start → A; pass 31d → ",
}


@pytest.mark.parametrize("rule", CLOCK_STORIES)
def test_events_are_deleted_by_their_real_age(tmp_path: Any, monkeypatch: Any, rule: str) -> None:
    story = ClockStory(str(tmp_path), monkeypatch)
    for step in CLOCK_STORIES[rule].split("; "):
        did, is_checked, kept = step.partition(" →")
        story.step(*did.partition(" ")[::2])
        assert not is_checked or story.kept() == kept.strip(), step


def test_the_oldest_by_real_age_is_deleted_first(tmp_path: Any, monkeypatch: Any) -> None:
    story = ClockStory(str(tmp_path), monkeypatch)
    for step in "start; A; pass 5d; stop; off 1h; set -56y; start; B; set +56y; pass 2d; C".split("; "):
        story.step(*step.partition(" ")[::2])
    assert [story.kept(limit) for limit in (1 << 20, 900, 0)] == ["ABC", "BC", "C"]


def test_a_spool_of_a_machine_without_a_clock_is_kept(tmp_path: Any) -> None:
    for start in ("90000000", str(ee.now_ms()), str(ee.now_ms() - 8 * 86_400_000)):
        (tmp_path / f"{start}-0a.jsonl").write_bytes(b"{}\n")
    ee.drop_old_segments(str(tmp_path))
    assert sorted(int(path.name.split("-")[0]) > 10**12 for path in tmp_path.glob("*.jsonl")) == [False, True]


@pytest.mark.slow
def test_a_day_that_is_more_than_the_limit_is_named(monitor: RunningMonitor) -> None:
    monitor.write_config({"retention": {"maxMegabytes": 16}})
    monitor.serve()
    in_process(monitor, "prune")
    assert "maxMegabytes" not in monitor.command("status").stdout
    monitor.emit(*(payload("UserPromptSubmit", f"s{number}", prompt="x " * 450_000) for number in range(20)))
    in_process(monitor, "prune")
    for command in ("status", "doctor"):
        assert "more than retention.maxMegabytes" in monitor.command(command, check=False).stdout


# room: Import


def node_directory(folder: Any) -> None:
    """Write what the Node.js monitor keeps of a session with a subagent, and of one that a person has hidden."""
    main = {**NODE, "sessionId": "0123456789abcdef"}
    named = {"parentSessionId": main["sessionId"], "data": {"subagent": {"type": "explore", "agentId": "a7"}}}
    call = {"toolName": "Task", "toolInput": {"subagent_type": "explore"}}
    events = [
        {**main, "eventType": "user_prompt", "hookType": "UserPromptSubmit", "data": {"message": "plan it"}},
        {**main, "eventType": "tool_call", "hookType": "PreToolUse", "data": call},
        {**main, **named, "sessionId": "a7", "eventType": "subagent_start", "hookType": "SubagentStart"},
        {**main, **named, "sessionId": "a7", "eventType": "subagent_stop", "hookType": "SubagentStop"},
        {**main, "eventType": "tool_result", "hookType": "PostToolUse", "data": call},
        {**main, "eventType": "session_end", "hookType": "Stop",
         "data": {"model": "claude-opus-4-5", "sessionTokenUsage": NODE_SUMS}},
    ]  # fmt: skip
    events = [{**event, "id": f"n{at}", "timestamp": NOW_MS + 1000 * at} for at, event in enumerate(events)]
    meta = {
        **NODE,
        "startTime": NOW_MS,
        "endTime": NOW_MS + 9000,
        "status": "completed",
        "childSessionIds": [],
    }
    used = {"totalInput": 5, "totalOutput": 6, "totalCacheRead": 7, "totalCacheCreation": 8}
    metas = [
        {**meta, "sessionId": "0123456789abcdef", "label": "The plan", "isPinned": True, "tokenUsage": used},
        {**meta, "sessionId": "fedcba9876543210", "hidden": True, "model": "claude-opus-4-5", "tokenUsage": used,
         "manualParentSessionId": "0123456789abcdef"},
        {**meta, "sessionId": "beef0001", "agentType": "explore", "isPinned": True, "tokenUsage": used},
    ]  # fmt: skip
    files = {f"sessions/{it['sessionId']}/meta.json": json.dumps(it, indent=2) for it in metas}
    for event in events[:4]:
        files[f"processed/{event['timestamp']}-{event['sessionId']}-{event['id']}.json"] = json.dumps(
            event, indent=2
        )
    files[f"raw/{events[4]['timestamp']}-x.json"] = json.dumps(events[4], indent=2)
    # As its daemon keeps them: while a Task runs all events of its session have an id that it makes up.
    moved = [{**event, "sessionId": "beef0001", "parentSessionId": main["sessionId"]} for event in events[4:]]
    files["sessions/0123456789abcdef/events.jsonl"] = "".join(json.dumps(it) + "\n" for it in events[:2])
    files["sessions/beef0001/events.jsonl"] = "".join(json.dumps(it) + "\n" for it in moved)
    files["sessions/fedcba9876543210/events.jsonl"] = json.dumps(
        {**events[0], "id": "f1", "sessionId": "fedcba9876543210"}
    )
    write_files(folder, {**files, "config.json": "{}", "daemon.state.json": "{}", "daemon.log": "x"})


def test_the_directory_of_the_node_monitor_is_imported(running: RunningMonitor, tmp_path: Any) -> None:
    node_directory(tmp_path)
    done = in_process(running, "import", str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "12 events imported, 0 were stored already\n"), done.stderr
    sessions = running.sessions()
    assert set(sessions) == {"0123456789abcdef", "fedcba9876543210"}
    main, other = sessions["0123456789abcdef"], sessions["fedcba9876543210"]
    assert (main["label"], main["labelSource"], main["isPinned"]) == ("The plan", "user", True)
    assert main["tokenUsage"] == dict(zip(("totalInput", "totalOutput", "totalCacheRead", "totalCacheCreation"),
                                          (30, 60, 15, 9)))  # fmt: skip
    assert [(agent["agentId"], agent["agentType"], agent["state"]) for agent in main["agents"]] == [
        ("a7", "explore", "ended")
    ]
    assert (main["state"], main["counts"]["toolCalls"], main["openCalls"]) == ("idle", 1, [])
    assert (other["hidden"], other["parentSessionId"]) == (True, "0123456789abcdef")
    assert other["tokenUsage"]["totalOutput"] == 6 and other["estimatedCostUsd"]
    index_ready(running)
    totals = running.get("/api/stats")["totals"]
    assert totals["tokenUsage"]["totalOutput"] == 66 and totals["prompts"] == 2
    # What a person does here counts from then on.
    client = running.websocket("rows")
    client.ask("session_update", type="rename_session", sessionId="0123456789abcdef", label="Mine")
    client.close()
    path = tmp_path / "sessions/0123456789abcdef/meta.json"
    path.write_text(path.read_text().replace("The plan", "Their plan"))
    again = in_process(running, "import", str(tmp_path))
    assert again.stdout.startswith("0 events imported") and again.returncode == 0
    write_files(tmp_path, {"sessions/0123456789abcdef/meta.json": " ", "raw/1-half.json": '{"id": "x", "ev'})
    half = in_process(running, "import", str(tmp_path))
    assert half.returncode == 1 and "raw/1-half.json: it has no events" in half.stderr
    assert running.sessions()["0123456789abcdef"]["label"] == "Mine"


def test_import_names_the_file_that_it_did_not_understand(running: RunningMonitor, tmp_path: Any) -> None:
    event = json.dumps({**NODE, "id": "e", "sessionId": "s", "eventType": "message"})
    transcript = "0000000a-0000-4000-8000-000000000000.jsonl"
    line = {"type": "user", "uuid": "u", "sessionId": "s2", "timestamp": "2026-11-24T06:03:18.373Z"}
    files = {
        "export.jsonl": f'{event}\n[1]\n{{"a": 1}}\n\n', "whole.ndjson": event + "\n",
        transcript: json.dumps({**line, "message": {"content": "hi"}}) + '\n{ broken\n\n{"type": "being wri',
        "odd.jsonl": "no json\n", "settings.json": "{}",
    }  # fmt: skip
    write_files(tmp_path, files)
    done = in_process(running, "import", str(tmp_path))
    assert done.returncode == 1 and done.stdout.startswith("4 events imported")
    said = [words.rpartition("/")[2] for words in done.stderr.splitlines() if "skipped" in words]
    assert sorted(said) == sorted([
        "export.jsonl: 2 lines are no events", "odd.jsonl: it has no events", f"{transcript}: 1 lines are not JSON",
    ])  # fmt: skip
