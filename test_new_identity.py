"""Tests of who a process, a machine and a directory is; each group says into which room it belongs."""
# ruff: noqa: D103, F403, F405

from __future__ import annotations

from test_monitor import *

for _name in [name for name in globals() if name.startswith("test_")]:
    del globals()[_name]  # they run in their own file

BWRAP, UNSHARE = shutil.which("bwrap"), shutil.which("unshare")
needs_containers = pytest.mark.skipif(not (BWRAP or UNSHARE), reason="bubblewrap and unshare are missing")


def contained(place: str, *command: str, flags: str = "") -> list[str]:
    """Return the command line that runs a command in a container of its own, with `place` to write in.

    `flags`: "net" for a network of its own, "user" for the user 4242 that has no entry and no home.
    """
    name = "3f2a9c1b77de"
    if BWRAP:
        options = f"--unshare-pid --unshare-uts --hostname {name} --die-with-parent --proc /proc"
        options += " --unshare-net" * ("net" in flags)
        options += " --unshare-user --uid 4242 --gid 4242" * ("user" in flags)
        mounts = f"{BWRAP} --ro-bind / / --dev /dev {options} --bind {place} {place} --"
        return [*mounts.split(), *command]
    options = "--pid --fork --kill-child --mount-proc --uts" + " --net" * ("net" in flags)
    options += " --user --map-user=4242" if "user" in flags else " --user" * (os.geteuid() != 0)
    return [
        str(UNSHARE),
        *options.split(),
        "sh",
        "-c",
        'hostname "$0" 2>/dev/null; exec "$@"',
        name,
        *command,
    ]


@contextlib.contextmanager
def in_container(monitor: RunningMonitor, *command: str, flags: str = "") -> Iterator[Any]:
    """Run a command in a container while the block runs; its directory is the monitor's, mounted."""
    environment = monitor.environment
    del environment["CONTEXTUATE_MACHINE_ID"]
    argv, pipe = contained(monitor.home, *command, flags=flags), subprocess.PIPE
    process = subprocess.Popen(
        argv,
        env=environment,
        cwd=ROOT,
        text=True,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def said_in_container(monitor: RunningMonitor, *command: str, flags: str = "") -> str:
    """Run a command in a container; return what it has said."""
    with in_container(monitor, *command, flags=flags) as process:
        return str(process.communicate(timeout=60)[0])


def client_script(*payloads: dict[str, Any], then: str = "sleep 60") -> list[str]:
    """Return a command that stands for the client: it runs the hook on each payload, then goes on."""
    hook = f"{shlex.quote(PYTHON)} -I -S {ROOT}/emit_event.py"
    calls = [f"printf %s {shlex.quote(json.dumps(it))} | CLAUDE_PID=$$ {hook}" for it in payloads]
    return ["sh", "-c", "; ".join([*calls, then])]


# room: Hook


@pytest.mark.parametrize("views", ["devices", "configurations"])
def test_the_hook_derives_its_settings_once_for_each_view(tmp_path, monkeypatch, views):
    derived, paths = [], [str(tmp_path / name) for name in ("a.json", "b.json")]
    for number, path in enumerate(paths):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"socketPath": f"/of/{number} {number}"}, file)
    derive, names, about = ee.derive_hook_settings, vars(ee.posix), os.stat(paths[0])
    monkeypatch.setattr(ee, "whole", lambda: ee)
    monkeypatch.setattr(ee, "derive_hook_settings", lambda *given: derived.append(given) or derive(*given))
    about = {name: getattr(about, name) for name in ("st_size", "st_mtime_ns")}
    for turn in range(12):
        number = turn % 2 if views == "configurations" else 0
        if views == "devices":  # of one file, as a container sees it
            seen = types.SimpleNamespace(st_dev=turn % 2, st_ino=turn % 2, **about)
            view = {**names, "stat": lambda _, seen=seen: seen}
            monkeypatch.setattr(ee, "posix", types.SimpleNamespace(**view))
        assert ee.hook_settings(str(tmp_path), paths[number]) == ("local", f"/of/{number} {number}")
    assert len(derived) == 2
    monkeypatch.undo()
    for size in range(20):
        ee.derive_hook_settings(str(tmp_path), paths[0], f"1 2 {size} 4")
    assert len((tmp_path / "hook.cache").read_bytes().splitlines()) == ee.HOOK_CACHE_LINES


@needs_containers
def test_a_user_without_home_and_entry_loses_no_event_and_sees_one_line(monitor):
    program = monitor.home + "/p"
    os.mkdir(program)
    for name in ("contextuate_monitor.py", "emit_event.py"):
        shutil.copy(os.path.join(ROOT, name), program)
    event, bare = (
        shlex.quote(json.dumps(payload("Stop"))),
        f"env -i PATH=$PATH CONTEXTUATE_HOME=$0 {PYTHON} {program}",
    )
    for home, place in (("", program + "/.contextuate"), (monitor.home + "/own", monitor.home + "/own")):
        hook = ("sh", "-c", f"printf %s {event} | {bare}/emit_event.py", home)
        assert said_in_container(monitor, *hook, flags="user") == ""
        assert [line["hook"]["hook_event_name"] for line in hook_spooled(place)] == ["Stop"]
    for command in ("status", "doctor", "install", "stop", "sessions", "uninstall"):
        shell = ("sh", "-c", f"{bare}/contextuate_monitor.py {command} 2>&1 >/dev/null", "")
        first, *more = said_in_container(monitor, *shell, flags="user").splitlines()
        assert re.search("no home directory.*; set (CONTEXTUATE_HOME|HOME)", first) and not more[1:], first
        assert command not in ("doctor", "install") or "CLAUDE_CONFIG_DIR" in [first, *more][-1]
    assert not os.path.exists(program + "/~") and not os.path.exists(monitor.home + "/~")


def test_the_machine_key_is_made_once_and_kept_whatever_the_name(tmp_path, monkeypatch):
    home = str(tmp_path / "new")
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        (key,) = set(pool.map(ee.machine_key, [home] * 12))
    base, _, namespace = key.partition("/")
    assert re.fullmatch("[0-9a-f]{16}", base) and int(namespace or 0) == ee.pid_namespace()
    assert hook_mode_of(home + "/machine-key") == 0o600 and hook_mode_of(home) == 0o700
    monkeypatch.setenv("CONTEXTUATE_MACHINE_ID", "other")
    assert ee.machine_key(home) == key
    for damage in (b"", b"../x\n", b"\xff\xfe"):
        with open(home + "/machine-key", "wb") as file:
            file.write(damage)
        remade = ee.machine_key(home)
        assert re.fullmatch("[0-9a-f]{16}", remade.partition("/")[0]) and ee.machine_key(home) == remade
    assert ee.machine_key("/proc/none") == ""
    monkeypatch.setattr(ee, "pid_namespace", lambda: 4026532999)
    assert ee.machine_key(home) == remade.partition("/")[0] + "/4026532999"
    assert f'"machineKey":"{ee.machine_key(home)}"'.encode() in ee.wrap(b"{}", {}, ee.machine_key(home))
    assert b"machineKey" not in ee.wrap(b"{}", {})


# room: Event model / Ingest

# Where it came from, what it says → its key ("own": this machine's)
MACHINE_KEYS = {
    "local, of this name": (False, {"machineId": "box"}, "own"),
    "local, without a name": (False, {}, "own"),
    "local, host renamed since the start": (False, {"machineId": "box.new"}, "own"),
    "local, of another name": (False, {"machineId": "other"}, None),
    "local, with a key": (False, {"machineId": "box", "machineKey": "k/5"}, "k/5"),
    "remote, of this name": (True, {"machineId": "box"}, None),
    "remote, with a key": (True, {"machineId": "box", "machineKey": "k"}, "k"),
    "a key of a wrong type": (False, {"machineId": "other", "machineKey": 5}, None),
}


@pytest.mark.parametrize(("remote", "fields", "key"), MACHINE_KEYS.values(), ids=MACHINE_KEYS)
def test_an_event_without_a_key_has_ours_only_if_it_is_of_this_machine(
    tmp_path, monkeypatch, remote, fields, key
):
    monkeypatch.setattr(ee, "this_machine", lambda: "box.new")
    here = cm.Settings(str(tmp_path), "", "box", ee.default_values())
    line = json.dumps({"hook": payload("Stop"), "id": "e1", **fields}).encode()
    (stored,) = cm.Ingest(here, cm.MemoryJournal(), lambda usage: None).take([line], remote)[1]
    assert stored.event.get("machineKey") == (here.machine_key if key == "own" else key)
    assert stored.event["machineId"] == fields.get("machineId", "unknown" if remote else "box")


# room: Sessions

# Our namespace, events as NAME KEY PID/NAMESPACE, what runs (and our pid of it in a container) → the state
MACHINE_STORIES = {
    "a renamed host's client is gone": (0, "a own 7/0, b own 7/0", {}, "ended"),
    "a renamed host's client runs": (0, "a own 7/0, b own 7/0", {7: 7}, "working"),
    "another machine has our name": (0, "box other 7/0", {}, "working"),
    "another machine has our name and no key": (0, "box - 7/0", {}, "working"),
    "an older event of ours has no key": (0, "old - 7/0", {}, "ended"),
    "a container's client that was never seen": (0, "c own/9 7/9", {}, "working"),
    "a container's client that runs": (0, "c own/9 7/9", {(7, 9): 70, 70: 70}, "working"),
    "a container's client that was found and is gone": (0, "c own/9 7/9", {(7, 9): 70}, "ended"),
    "one that was seen before a restart and is gone": (0, "c own/9 7/9 seen", {}, "ended"),
    "one that is not to be seen from another container": (8, "c own/9 7/9 seen", {}, "working"),
    "another host's container, a namespace of that number": (0, "c k/9 7/9", {(7, 9): 70}, "working"),
}


@pytest.mark.parametrize("story", MACHINE_STORIES.values(), ids=MACHINE_STORIES)
def test_only_a_process_that_this_machine_may_look_at_is_believed_to_be_gone(story):
    namespace, events, here, state = story
    book = cm.Sessions(own_machine=f"own/{namespace}" if namespace else "own", own_name="old")
    for number, words in enumerate(events.split(", ")):
        name, key, process, *seen = words.split()
        pid, its_namespace = map(int, process.split("/"))
        about = {"machineId": name, "pid": pid, **({} if key == "-" else {"machineKey": key})}
        about.update({"pidNamespace": its_namespace} if its_namespace else {})
        event = hook_wrapped(payload("UserPromptSubmit", prompt="x"), **about, id=f"e{number}")
        session = book.apply(ee.build_event(event, NOW_MS, "box"))
        session.processes[pid, its_namespace] = NOW_MS if seen else 0  # by a monitor before a restart
    book.check_processes(namespace, lambda pid, _: pid in here, NOW_MS + 1, True, lambda it: here.get(it, 0))
    assert (session.state, session.machine_id) == (state, name)


# room: Token usage


def test_tokens_are_read_where_the_file_is_whatever_the_machine_is_called(tmp_path):
    path = usage_transcript("simple")
    event = {**usage_event(path), "machineId": "3f2a9c1b77de", "machineKey": "k/9"}
    usage = ee.UsageReader(str(tmp_path)).usage_event(event)
    assert usage_output(usage["data"]["usage"]) == 210
    assert (usage["machineId"], usage["machineKey"]) == ("3f2a9c1b77de", "k/9")


# room: Status

# Machines as NAME KEY, on build-box with the key h → the lines (*: its name is another's, too)
MACHINE_LINES = {
    "one": ("build-box h", ["build-box 1"]),
    "one name, two machines": ("build-box h, build-box abcdef", ["build-box (abcd) 1*", "build-box (h) 1*"]),
    "a machine without a key has our name": ("build-box build-box", ["build-box 1*"]),
    "two others have one name": ("mac 111122, mac 333344", ["mac (1111) 1*", "mac (3333) 1*"]),
    "a renamed machine": ("old h, build-box h", ["build-box 2"]),
    "containers": ("111111111111 h/1, 222222222222 h/2, 333333333333 h/3", ["build-box, 3 containers 3"]),
    "one container": ("111111111111 h/1", ["111111111111 1"]),
    "named containers": ("web h/1, web h/2, 1111aaaa1111 h/3", ["1111aaaa1111 1", "web 2"]),
    "a container with its host's name": ("build-box h, build-box h/1", ["build-box 2"]),
    "containers of an unknown host": ("111111111111 j/1, 222222222222 k/2", ["2 containers 2"]),
    "containers of two hosts": (
        "mac k, 111111111111 k/1, 222222222222 k/2, 333333333333 h/1, 444444444444 h/2",
        ["build-box, 2 containers 2", "mac 1", "mac, 2 containers 2"],
    ),
}


@pytest.mark.parametrize(("machines", "lines"), MACHINE_LINES.values(), ids=MACHINE_LINES)
def test_machines_with_one_name_are_apart_and_containers_without_one_together(tmp_path, machines, lines):
    settings = cm.Settings(str(tmp_path), "", "build-box", ee.default_values())
    settings.__dict__["machine_key"] = "h"
    by_key: dict[str, dict[str, Any]] = {}
    for number, words in enumerate(machines.split(", ")):
        name, key = words.split()
        about = by_key.setdefault(key, {"machineKey": key, "events": 0, "dropped": 0, "clockSkewMs": 0})
        about.update(machineId=name, events=about["events"] + 1, lastSeen=number)
    found = cm.machine_lines(by_key.values(), settings)
    assert [f"{it['label']} {it['events']}{'*' * it['sameName']}" for it in found] == lines


def test_status_and_doctor_name_a_name_that_two_machines_have(monitor):
    monitor.serve()
    for number, key in enumerate(("1111aa", "2222bb")):
        event = hook_wrapped(payload("UserPromptSubmit", f"s{number}"), id=f"e{number}", machineKey=key)
        monitor.emit({**event, "machineId": "macbook"})
    for command in ("status", "doctor"):
        assert "Several machines have the same name, macbook" in monitor.command(command, check=False).stdout
    assert "macbook (1111): 1 events" in monitor.command("status").stdout
    metrics = monitor.request("/metrics")[2].decode()
    assert 'machine="macbook (1111)"' in metrics and 'machine="macbook (2222)"' in metrics
    keys = {it["sessionId"]: it["machineKey"] for it in monitor.get("/api/sessions")["sessions"]}
    assert (keys["s0"], keys["s1"]) == ("1111aa", "2222bb")


# room: Processes


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full", "1</dev/null", "| :"])
def test_start_ends_with_0_when_its_output_cannot_be_written(monitor, streams):
    command = f"set -o pipefail; {sys.executable} -m contextuate_monitor start --no-open {streams}"
    options: dict[str, Any] = {"cwd": ROOT, "env": monitor.environment, "timeout": 60, "check": True}
    assert subprocess.run(["bash", "-c", command], **options, stderr=subprocess.PIPE).stderr == b""
    assert monitor.know().get("/health")["status"] == "ok"


def test_another_monitor_is_not_stopped_in_place_of_ours(monitor, shared):
    monitor.serve()
    body = json.dumps({"startedAt": monitor.about["startedAt"]}).encode()
    headers = {"Authorization": "Bearer " + cm.read_token(shared.home + "/token")}
    headers["Content-Type"] = "application/json"
    assert shared.request("/api/stop", "POST", body, headers)[0] == 409
    with open(monitor.home + "/monitor.run.json", "w", encoding="utf-8") as file:
        json.dump({**monitor.about, "port": shared.port}, file)  # as seen from another network
    assert f"stopped (pid {monitor.pid})" in monitor.command("stop").stdout
    assert not alive(monitor.pid) and alive(shared.pid)


@needs_containers
def test_stop_in_another_container_signals_no_process(monitor):
    serve = [sys.executable, "-m", "contextuate_monitor", "start", "--foreground", "--no-open"]
    with in_container(monitor, *serve) as first:
        eventually(lambda: os.path.exists(monitor.home + "/monitor.run.json"), 30)
        assert monitor.know().about["pid"] < 10, "it is that of its namespace"
        # The shell has the monitor's pid, in a namespace of its own.
        script = f"echo shell $$; {sys.executable} -m contextuate_monitor $0; echo status $?"
        run = functools.partial(said_in_container, monitor, "sh", "-c", script)
        for said, words in (
            (run("stop", flags="net"), ("in another container", "run `stop` where it runs", "status 1")),
            (run("status"), ("running  in another container", "status 0")),
            (run("stop"), ("stopped (in another container)", "status 0")),
        ):
            assert all(word in said for word in (f"shell {monitor.pid}", *words)), said
        eventually(lambda: first.poll() is not None)
    with in_container(monitor, *serve):  # seen from its host, the kernel numbers it in another way
        eventually(lambda: "running  pid" in monitor.command("status", check=False).stdout, 30)
        pid = cm.listening_pid(monitor.socket_path)
        assert pid not in (monitor.know().pid, 0, None)
        assert f"stopped (pid {pid})" in monitor.command("stop").stdout
        assert not alive(pid)


# room: Containers (new; .docs/containers.md)


@needs_containers
def test_a_container_with_the_mounted_directory_has_name_tokens_and_end(running):
    session = str(uuid.uuid4())
    os.makedirs(running.claude_home + "/projects/p")
    transcript = f"{running.claude_home}/projects/p/{session}.jsonl"
    shutil.copy(usage_transcript("simple"), transcript)
    said = payload("UserPromptSubmit", session, prompt="x", transcript_path=transcript)
    ask = payload("PermissionRequest", session, tool_name="Bash", tool_input={"command": "x"})
    with in_container(running, *client_script(said, {**said, "hook_event_name": "Stop"}, said, ask)):
        eventually(lambda: running.sessions().get(session, {}).get("state") == "waiting")
        found = running.sessions()[session]
        assert found["machineId"] == "3f2a9c1b77de"
        base, _, namespace = found["machineKey"].partition("/")
        assert base == cm.machine_host(ee.machine_key(running.home)) and namespace
        eventually(lambda: running.sessions()[session]["tokenUsage"])
        time.sleep(3.5)  # the monitor has looked at its process
        assert running.sessions()[session]["state"] == "waiting"
    ended = eventually(lambda: (it := running.sessions()[session])["state"] == "ended" and it, 30)
    assert ended["reason"]["detail"] == "its process exited"


@needs_containers
@pytest.mark.skipif(not BWRAP, reason="bubblewrap is missing")
def test_a_directory_mounted_at_another_path_delivers_through_the_spool(running):
    inner = ["env", "CONTEXTUATE_HOME=/mnt", *client_script(payload("Stop", "far"), then=":")]
    argv = contained(running.home, *inner)
    argv[argv.index("--bind") : argv.index("--bind")] = ["--tmpfs", "/tmp"]
    argv[argv.index("--bind") + 2] = "/mnt"
    subprocess.run(argv, env=running.environment, timeout=30, check=True)
    assert eventually(lambda: running.sessions().get("far"))["machineId"] == "testbox"
    (event,) = running.stored_events()
    assert event["spooled"] and event["machineKey"].startswith(
        cm.machine_host(ee.machine_key(running.home)) + "/"
    )


@needs_containers
def test_a_container_reports_through_redis_from_a_directory_of_its_own(make):
    server = make(RedisServer)
    host = make(RedisMachine, config=server.settings())
    host.start()
    host.wait_until("connected")
    guest = make(RedisMachine, config=server.settings(), machine_id="guest")
    hook = f"printf %s {shlex.quote(json.dumps(payload('Stop', 'far')))} | CLAUDE_PID=$$ {guest.hook}"
    with in_container(guest, "sh", "-c", f"{hook}; sleep 60"):
        host.gets(1, "far")
    (event,) = [it for it in host.stored_events() if it["sessionId"] == "far"]
    base = cm.machine_host(ee.machine_key(guest.home))
    assert event["machineId"] == "3f2a9c1b77de" and event["machineKey"].startswith(base + "/")
    assert not ee.machine_key(host.home).startswith(base) and host.sessions()["far"]["state"] == "idle"


@needs_containers
def test_a_container_reports_by_http_hooks_with_the_token_only(running):
    token = cm.read_token(running.home + "/token")
    code = (
        "import sys, urllib.request as u; url, body, token = sys.argv[1:]; "
        "headers = {'Content-Type': 'application/json', 'Authorization': 'Bearer ' + token}; "
        "print(u.urlopen(u.Request(url, body.encode(), headers)).status)"
    )
    given = json.dumps(payload("UserPromptSubmit", "web", prompt="x"))
    post = (PYTHON, "-c", code, running.url + "api/hooks", given, token)
    assert said_in_container(running, *post) == "200\n"
    session = running.sessions()["web"]
    # What they lack: the name of the machine, and the process.
    assert (session["machineId"], session["pid"], session["state"]) == ("testbox", None, "working")
    assert session["machineKey"] == ee.machine_key(running.home)


# room: Browser


@needs_browser
def test_machines_with_one_name_are_shown_apart_and_containers_as_one(tab):
    keys = {
        "s1": ("macbook", "1111aa"),
        "s2": ("macbook", "2222bb"),
        "s3": ("0123456789ab", "c/1"),
        "s4": ("ba9876543210", "c/2"),
    }
    for session, (name, key) in keys.items():
        event = hook_wrapped(payload("UserPromptSubmit", session, prompt=session), id=str(uuid.uuid4()))
        tab.monitor.emit({**event, "machineId": name, "machineKey": key})
    for session, words in (("s1", "macbook (1111)"), ("s2", "macbook (2222)"), ("s3", "0123456789ab")):
        tab.until(
            f"document.querySelector('[data-session-id={session}] .machine')?.textContent === '{words}'"
        )
    tab.load("#status")
    tab.until("document.body.innerText.includes('2 containers')")
    tab.until("document.body.innerText.includes('macbook (2222)')")
