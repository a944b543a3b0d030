"""A hook whose monitor is slow, and debugging while Redis is away."""

# ruff: noqa: D103, F403, F405
from test_monitor import *

# room: The hook as a process


def test_after_three_time_outs_in_a_row_hooks_do_not_wait_for_10_s(hook_alone):
    path = hook_alone.home + "/hook.timeouts"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(hook_alone.home + "/m.sock")
        listener.listen()
        for tries in (1, 2, 3):
            assert "no acknowledgement" in hook_alone() and os.path.getsize(path) == tries
        begin = time.monotonic()
        assert "not sent, after 3 time-outs" in hook_alone()
        assert time.monotonic() - begin < ee.ACKNOWLEDGEMENT_DEADLINE_S
        for age_s in (11, -3600):  # it is over, or the clock was set back
            os.utime(path, (time.time() - age_s,) * 2)
            assert "not sent" not in hook_alone()
        assert os.path.getsize(path) == 5 and len(hook_alone.spooled()) == 6
    os.utime(path, (0, 0))
    assert "ConnectionRefused" in hook_alone() and not os.path.exists(path), "that costs no time"


def test_a_monitor_that_answers_again_ends_the_pause_of_the_hooks(monitor):
    path = monitor.home + "/hook.timeouts"
    monitor.start()
    ee.write_atomically(path, b"...")
    os.utime(path, (0, 0))
    hook_call(monitor.installed_command(), payload("Stop", "again"), monitor.environment)
    assert "again" in monitor.sessions() and not os.path.exists(path)


# room: Redaction

SECRET_PARTS = st.lists(
    st.sampled_from(["password", "name", "value", "key: ", WORD])
    | st.sampled_from([*TOKENS.values(), *HARMLESS.split("\n"), *hook_hints()])
    | ESCAPES,
    max_size=5,
).map("".join)
NESTED = st.recursive(
    SECRET_PARTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SECRET_PARTS, inner, max_size=3)
)


@settings(deadline=None, max_examples=200)
@given(NESTED)
def test_an_event_passes_at_once_only_if_each_value_passes_alone(content):
    event = {**ee.build_event({"eventType": "message", "data": {"x": content}}, 5, "m"), "beside": content}
    shown, alone = (
        ee.protect(dict(event), ee.Privacy()),
        ee._protect_each_value(dict(event), ee.Privacy(), None),
    )
    assert (shown[0] == event) == (alone[0] == event)


# room: Redis mode


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.77"], ids=["refused", "black hole"])
def test_debug_holds_a_hook_up_for_a_second_at_most(make, host):
    machine = make(RedisMachine, config={"mode": "redis", "redis": {"host": host, "port": 1}})
    hook, taken_s = machine.hook, []
    for _ in range(5):
        begin = time.monotonic()
        notes = hook_call(hook, payload("Stop"), machine.environment, CONTEXTUATE_DEBUG="1")
        taken_s.append(time.monotonic() - begin)
        assert "no outcome after 600 ms: " in notes, notes
    assert min(taken_s) < 1.0
