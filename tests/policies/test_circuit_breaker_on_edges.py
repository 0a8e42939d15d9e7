"""The circuit breaker where calls go to many places: a breaker for each, and who is to blame."""

import copy
import pickle
from types import SimpleNamespace

import pybreaker
import pytest

from resilient import (
    CircuitBreaker,
    CircuitOpen,
    FailedResponse,
    FailedResult,
    Pipeline,
    RateLimited,
    Retry,
    TimedOut,
    Timeout,
)
from resilient.call import Call
from resilient.edge import FUNCTION, Edge
from resilient.events import PartitionsFull
from resilient.policies.circuit_breaker import CircuitBreakerStatistics
from resilient.table import OVERFLOW
from resilient.testing import capture_events, flaky, run, run_both, virtual_time


class NotOurFault(Exception):
    """Shows the other side at work, as a 429 does."""


class Unclear(Exception):
    """Says nothing about the other side, as a full connection pool does."""


class Origins(Edge):
    """Knows where calls go to, and who is to blame."""

    partitions = True
    tells_keys = True

    def key(self, call):
        return call.args[0]

    def blames(self, error):
        return False if isinstance(error, NotOurFault) else None if isinstance(error, Unclear) else True


ORIGINS = Origins()


class OriginCall(Call):
    """A call that ends at the edge of origins."""

    edge = ORIGINS


def works(origin):
    return origin


def breaks(origin):
    raise OSError(origin)


def send(policy, origin, function=works):
    """Send one call through a chain to the edge of origins."""
    return policy.chain(ORIGINS)(OriginCall(function, (origin,), {}))


def fail(policy, *origins):
    for origin in origins:
        with pytest.raises(OSError, match=origin):
            send(policy, origin, breaks)


def refused(policy, origin):
    with pytest.raises(CircuitOpen) as caught:
        send(policy, origin)
    return caught.value


def breaker(**given):
    return CircuitBreaker(**{"consecutive": 1, "open_for": 5, "jitter": 0, "probes": 1, "name": "b", **given})


@pytest.fixture
def clock():
    with virtual_time() as clock:
        yield clock


# -- a breaker for each key ---------------------------------------------------------------------------------------


def test_one_bad_origin_does_not_stop_the_others():
    def check(seen):
        assert [(event.name, event.policy) for event in seen] == [
            ("circuit.opened", "b[a]"),
            ("circuit.rejected", "b[a]"),
            ("circuit.half_opened", "b[a]"),
            ("circuit.closed", "b[a]"),
        ]

    policy = breaker()
    with virtual_time() as clock, capture_events(policy) as seen:
        fail(policy, "a")
        assert send(policy, "b") == "b"
        assert str(refused(policy, "a")) == "b[a]: the circuit is open; retry after 5 s"
        clock.sleep(5)
        assert send(policy, "a") == "a"
    check(seen)

    async def main():
        policy = breaker()
        chain = policy.achain(ORIGINS)

        async def acall(origin, error=None):
            async def function(origin):
                if error is not None:
                    raise error
                return origin

            return await chain(OriginCall(function, (origin,), {}))

        with capture_events(policy) as seen:
            with pytest.raises(OSError, match="broken"):
                await acall("a", OSError("broken"))
            assert await acall("b") == "b"
            with pytest.raises(CircuitOpen):
                await acall("a")
            await Pipeline().acall(sleep, 5)
            assert await acall("a") == "a"
        check(seen)

    import anyio

    sleep = anyio.sleep
    for backend in ("asyncio", "trio"):
        run(main, backend=backend)


def test_plain_functions_share_one_breaker_unless_there_is_a_key():
    async def scenario(colour):
        alone, keyed = breaker(name="alone"), breaker(name="keyed", key=lambda host: host)
        for policy in (alone, keyed):
            with pytest.raises(OSError, match="a"):
                await colour.call(policy, breaks, "a")
        with pytest.raises(CircuitOpen):
            await colour.call(alone, works, "b")
        assert await colour.call(keyed, works, "b") == "b"
        with pytest.raises(CircuitOpen) as refused:
            await colour.call(keyed, works, "a")
        assert refused.value.policy == "keyed", "a key of the user may be nobody's business"
        assert (alone.statistics().partitions, set(keyed.statistics().partitions)) == ({}, {"a", "b"})

    run_both(scenario)


def test_a_key_of_ones_own_comes_before_that_of_the_edge(clock):
    policy = breaker(key=lambda host: host.upper())
    fail(policy, "a")
    assert set(policy.statistics().partitions) == {"A"}
    assert refused(policy, "a").policy == "b"


def test_as_a_decorator_and_in_a_pipeline(clock):
    calls = []

    def counted(host):
        calls.append(host)
        breaks(host)

    @breaker(key=lambda host: host)
    def fetch(host):
        return counted(host)

    guard = Pipeline(Retry(2, on=OSError, wait=0), breaker(key=lambda host: host), Timeout(1, interrupt=False))
    for function in (fetch, guard(counted)):
        for host in "ab":
            with pytest.raises((OSError, CircuitOpen)):
                function(host)  # the second attempt is refused
            with pytest.raises(CircuitOpen):
                function(host)
    assert sorted(calls) == list("aabb")


def test_of_gives_the_breaker_of_a_key(clock):
    policy = breaker()
    early = policy.of("a")
    assert early.current_state == "closed"
    early.isolate()
    assert refused(policy, "a").retry_after is None
    assert policy.of("a") is early
    assert send(policy, "b") == "b"
    early.close()
    assert send(policy, "a") == "a"
    fail(policy, "a")
    assert early.statistics() == policy.statistics().partitions["a"]
    assert (early.name, early.consecutive) == ("b[a]", 1)


def test_a_single_state_is_the_breaker_of_every_key(clock):
    for policy in (
        CircuitBreaker(pybreaker.CircuitBreaker(fail_max=1)),
        breaker(storage=pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)),
        breaker().of("a"),
    ):
        assert policy.of("x") is policy
        fail(policy, "a")
        assert refused(policy, "b").policy == policy.label
        assert policy.statistics().partitions == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"breaker": pybreaker.CircuitBreaker()}, "give None, as an existing breaker holds a single state"),
        (
            {"storage": pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)},
            "give None, as storage= holds a single state",
        ),
    ],
)
def test_a_single_state_has_no_key(given, message):
    with pytest.raises(ValueError, match=f"CircuitBreaker: key=.* is not allowed; {message}"):
        CircuitBreaker(**given, key=works)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"key": "host"}, TypeError, "CircuitBreaker: key='host' is not allowed; give a function"),
        ({"max_keys": 0}, ValueError, "CircuitBreaker: max_keys=0 is not allowed; give an int >= 1"),
    ],
)
def test_bad_options(given, kind, message):
    with pytest.raises(kind, match=message):
        CircuitBreaker(**given)


def test_an_unhashable_key_is_named(clock):
    with pytest.raises(TypeError, match="b: key= returned list, which is not hashable"):
        breaker(key=lambda host: [host]).call(works, "a")


@pytest.mark.parametrize("enter", ["block", "ablock"])
def test_a_block_has_no_arguments_to_take_a_key_from(enter):
    message = "CircuitBreaker: key= is a function of the call's arguments, and a block has none"
    with pytest.raises(TypeError, match=message):
        getattr(breaker(key=works), enter)()


def test_copies_have_the_key_and_a_state_of_their_own(clock):
    policy = breaker(key=works, max_keys=7)
    assert repr(policy).endswith("key=works, max_keys=7, name='b')")
    fail(policy, "a")
    for twin in (policy.fresh(), copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert repr(twin) == repr(policy)
        assert send(twin, "a") == "a"
    refused(policy, "a")


# -- looking at all of them ---------------------------------------------------------------------------------------


def test_the_whole_is_as_bad_as_the_worst(clock):
    policy = breaker()
    assert policy.current_state == "closed"
    send(policy, "a")
    fail(policy, "b", "c")
    assert policy.current_state == "open"
    policy.of("c").close()
    clock.sleep(5)

    def look(origin):
        assert policy.of(origin).current_state == "half-open"
        assert policy.current_state == policy.statistics().state == "half-open"
        return origin

    send(policy, "b", look)
    assert policy.current_state == "closed"


def test_open_is_worse_than_half_open(clock):
    policy = breaker()
    fail(policy, "a")
    clock.sleep(5)
    fail(policy, "b")

    def look(origin):
        assert {part.state for part in policy.statistics().partitions.values()} == {"open", "half-open"}
        assert policy.current_state == "open"
        return origin

    send(policy, "a", look)


def test_the_refusal_of_a_function_tells_of_its_own_state(clock):
    policy = breaker()
    with pytest.raises(OSError, match="f"):
        policy.call(breaks, "f")
    clock.sleep(5)
    fail(policy, "a")

    def probe(_):
        with pytest.raises(CircuitOpen, match="the circuit is half-open, and its probe is under way"):
            policy.call(works, "f")

    policy.call(probe, "f")


def test_statistics_are_the_sums(clock):
    policy = breaker(consecutive=None, minimum_calls=3, slow=1.0)
    for origin in "aab":
        send(policy, origin)
    send(policy, "a", lambda _: clock.sleep(2))
    fail(policy, "b", "b")
    refused(policy, "b")
    statistics = policy.statistics()
    assert statistics.partitions == {
        "a": CircuitBreakerStatistics("closed", 3, 0, 1, 0, 0),
        "b": CircuitBreakerStatistics("open", 3, 2, 0, 1, 1),
    }
    assert statistics == CircuitBreakerStatistics("open", 6, 2, 1, 1, 1, statistics.partitions)


def test_a_breaker_of_functions_that_has_keys_too(clock):
    """One object may guard a client and a function; what the function did counts as well."""
    policy = breaker()
    send(policy, "a")
    with pytest.raises(OSError, match="f"):
        policy.call(breaks, "f")
    assert send(policy, "a") == "a"
    with pytest.raises(CircuitOpen, match="b: the circuit is open"):
        policy.call(works, "f")
    assert (policy.current_state, policy.statistics().state) == ("open", "open")
    statistics = policy.statistics()
    assert (statistics.failures, statistics.opened, statistics.rejected) == (1, 1, 1)
    clock.sleep(5)
    fail(policy, "a")
    policy.call(works, "f")
    assert policy.current_state == "open", "because of a"


def test_a_block_counts_as_a_function(clock):
    policy = breaker()
    send(policy, "a")
    with pytest.raises(OSError, match="block"), policy:
        raise OSError("block")
    assert policy.current_state == "open"

    async def main():
        policy = breaker()
        policy.of("a")
        with pytest.raises(OSError, match="block"):
            async with policy:
                raise OSError("block")
        return policy.current_state

    assert run(main) == "open"


def test_it_is_idle_when_all_of_them_are(clock):
    policy = breaker()
    send(policy, "a")
    assert policy.idle(0.0)
    fail(policy, "b")
    assert not policy.idle(1e9)
    policy.of("b").close()
    assert policy.idle(0.0)


def test_closed_and_quiet_ones_are_forgotten_first(clock):
    policy = breaker(max_keys=2)
    fail(policy, "bad")
    for origin in "abc":
        send(policy, origin)
    assert set(policy.statistics().partitions) == {"bad", "c"}
    refused(policy, "bad")


def test_origins_that_share_a_breaker_are_not_called_by_the_name_of_one(clock):
    policy = breaker(max_keys=1)
    with capture_events(policy) as seen:
        fail(policy, "a", "b")
        assert refused(policy, "c").policy == "b[OVERFLOW]"
    assert [type(event) for event in seen if event.name.startswith("part")] == [PartitionsFull] * 2
    assert set(policy.statistics().partitions) == {"a", OVERFLOW}


# -- by hand ------------------------------------------------------------------------------------------------------


def test_isolating_reaches_all_of_them_and_those_to_come(clock):
    policy = breaker()
    send(policy, "a")
    policy.isolate()
    for origin in "ab":
        assert refused(policy, origin).retry_after is None
    clock.sleep(1e6)
    refused(policy, "c")
    policy.of("b").close()
    assert send(policy, "b") == "b"
    assert policy.current_state == "open"
    policy.close()
    for origin in "abcd":
        assert send(policy, origin) == origin
    assert policy.current_state == "closed"


def test_isolating_before_the_first_call(clock):
    policy = breaker()
    policy.isolate()
    assert policy.current_state == "open"
    refused(policy, "a")


def test_forcing_reaches_all_of_them_and_not_those_to_come(clock):
    policy = breaker()
    for origin in "ab":
        send(policy, origin)
    with capture_events(policy) as seen:
        policy.force_open("maintenance")
        for origin in "ab":
            assert refused(policy, origin).retry_after == 5.0
    opened = [(event.policy, event.reason) for event in seen if event.name == "circuit.opened"]
    assert sorted(opened) == [("b", "maintenance"), ("b[a]", "maintenance"), ("b[b]", "maintenance")]
    assert send(policy, "c") == "c"
    clock.sleep(5)
    for origin in "ab":
        assert send(policy, origin) == origin
    assert policy.current_state == "closed", "all of them are well again"
    statistics = policy.statistics()
    assert statistics.opened == sum(part.opened for part in statistics.partitions.values()) == 2


def test_closing_reaches_all_of_them(clock):
    policy = breaker()
    fail(policy, "a", "b")
    with capture_events(policy) as seen:
        policy.close()
    assert sorted((event.name, event.policy) for event in seen) == [
        ("circuit.closed", "b[a]"),
        ("circuit.closed", "b[b]"),
    ]
    assert send(policy, "a") == "a"


@pytest.mark.parametrize("act", ["isolate", "close"])
def test_a_key_that_comes_while_all_are_moved_is_moved_too(clock, monkeypatch, act):
    policy = breaker()
    send(policy, "a")
    if act == "close":
        policy.isolate()
    members = policy._members

    def members_and_one_more():
        found = members()
        monkeypatch.undo()
        policy.of("late")
        return found

    monkeypatch.setattr(policy, "_members", members_and_one_more)
    getattr(policy, act)()
    assert {part.state for part in policy.statistics().partitions.values()} == {
        "open" if act == "isolate" else "closed"
    }


def test_a_listener_may_look_at_the_breaker_of_a_new_key(clock):
    """It would wait for ever if it was told while the table is locked."""
    policy = breaker()
    policy.isolate()
    states = []
    with policy.listen(lambda event: states.append((event.name, policy.statistics().state))):
        refused(policy, "new")
    assert states == [("circuit.rejected", "open")], "that it is isolated was told when it happened"


def test_pybreakers_listeners_hear_all_of_them(clock):
    class Ear(pybreaker.CircuitBreakerListener):
        def __init__(self):
            self.heard = []

        def failure(self, cb, exc):
            self.heard.append((cb.label, str(exc), cb.fail_counter, cb.current_state))

        def state_change(self, cb, old_state, new_state):
            self.heard.append((cb.label, old_state.name, new_state.name))

    ear = Ear()
    policy = breaker(listeners=[ear])
    fail(policy, "a")
    policy.of("b").isolate()
    assert ear.heard == [
        ("b[a]", "a", 0, "closed"),
        ("b[a]", "closed", "open"),
        ("b[b]", "closed", "open"),
    ]


def test_a_listener_that_came_late_hears_all_of_them(clock):
    policy = breaker()
    send(policy, "a")
    guard = Pipeline(policy)
    with capture_events(guard) as seen:
        fail(policy, "a", "b")
    assert [event.policy for event in seen] == ["b[a]", "b[b]"]


# -- who is to blame ----------------------------------------------------------------------------------------------


def response(status):
    return FailedResponse(SimpleNamespace(status_code=status))


class WithStatus(NotOurFault):
    status_code = 429


VERDICTS = [
    # on=, the error, and whether it is a failure, a success (False) or nothing (None)
    (Exception, None, False),
    (Exception, OSError(), True),
    (Exception, NotOurFault(), False),
    (Exception, Unclear(), None),
    (Exception, FailedResult(1), True),
    (Exception, response(503), True),
    (Exception, WithStatus(), False),
    (OSError, OSError(), True),
    (OSError, KeyError(), False),
    (OSError, FailedResult(1), True),
    (OSError, response(503), False),
    (NotOurFault, NotOurFault(), False),
    ((503, OSError), response(503), True),
    ((503, OSError), response(500), False),
    ((503, OSError), OSError(), True),
    ((503, OSError), FailedResult(1), True),
    ((429, OSError), WithStatus(), True),
    ((429, NotOurFault), NotOurFault(), False),
    (lambda error: isinstance(error, NotOurFault), NotOurFault(), True),
    (lambda error: isinstance(error, NotOurFault), OSError(), False),
    (lambda error: isinstance(error, Unclear), Unclear(), True),
    (lambda error: False, FailedResult(1), False),
    (lambda error: error.status == 503, response(503), True),
    (Exception, RateLimited("no", policy="p"), None),
    (lambda error: True, RateLimited("no", policy="p"), None),
    (Exception, KeyboardInterrupt(), None),
    (lambda error: True, KeyboardInterrupt(), None),
    (Exception, TimedOut(policy="somebody else's"), True),
]


@pytest.mark.parametrize(("on", "error", "expected"), VERDICTS, ids=lambda value: repr(value)[:40])
def test_the_verdict(on, error, expected):
    policy = CircuitBreaker(on=on)
    verdict = policy.verdict(OriginCall(works, ("a",), {}), error, 0.0, 1.0)
    assert verdict is expected


@pytest.mark.parametrize(
    ("error", "calls", "failures"), [(OSError, 1, 1), (NotOurFault, 1, 0), (Unclear, 0, 0)], ids=repr
)
@pytest.mark.parametrize("listeners", [(), [pybreaker.CircuitBreakerListener()]], ids=["plain", "observed"])
def test_what_a_call_counts_as(clock, error, calls, failures, listeners):
    policy = CircuitBreaker(listeners=listeners)

    def raising(_origin):
        raise error

    with pytest.raises(error):
        send(policy, "a", raising)
    statistics = policy.statistics()
    assert (statistics.calls, statistics.failures) == (calls, failures)


@pytest.mark.parametrize(("error", "closes"), [(NotOurFault, True), (Unclear, False)], ids=repr)
def test_what_a_probe_counts_as(clock, error, closes):
    policy = breaker()
    fail(policy, "a")
    clock.sleep(5)

    def raising(_origin):
        raise error

    with pytest.raises(error):
        send(policy, "a", raising)
    assert policy.current_state == ("closed" if closes else "half-open")
    assert send(policy, "a") == "a"


@pytest.mark.parametrize(
    ("error", "heard"), [(OSError, ["failure"]), (NotOurFault, ["success"]), (Unclear, [])], ids=repr
)
def test_what_pybreaker_is_told(clock, error, heard):
    class Ear(pybreaker.CircuitBreakerListener):
        def __init__(self):
            self.heard = []

        def success(self, cb):
            self.heard.append("success")

        def failure(self, cb, exc):
            self.heard.append("failure")

    def raising(_origin):
        raise error

    ear, borrowing_ear = Ear(), Ear()
    borrowed = pybreaker.CircuitBreaker(fail_max=5, listeners=[borrowing_ear])
    for policy in (CircuitBreaker(listeners=[ear]), CircuitBreaker(borrowed)):
        with pytest.raises(error):
            send(policy, "a", raising)
    assert ear.heard == heard
    assert borrowing_ear.heard == heard
    assert borrowed.fail_counter == (heard == ["failure"])


def test_a_status_named_by_on_makes_the_responses_of_a_function_failures():
    async def scenario(colour):
        policy = CircuitBreaker(consecutive=2, on={503, OSError})
        answers = [SimpleNamespace(status_code=status) for status in (503, 500, 503, 503)]
        for answer in answers:
            assert policy.current_state == "closed"
            assert await colour.call(policy, lambda answer=answer: answer) is answer
        assert policy.current_state == "open"

    run_both(scenario)


def test_a_predicate_decides_alone_about_failing_results(clock):
    policy = CircuitBreaker(consecutive=1, on=lambda error: isinstance(error, OSError))
    guard = Pipeline(policy, failed=lambda status: status >= 500)
    assert guard.call(lambda: 503) == 503
    assert policy.current_state == "closed"


def test_a_predicate_beside_other_things_makes_an_error_a_failure_and_does_not_decide_about_the_rest(clock):
    policy = CircuitBreaker(last=20, on=(OSError, lambda error: "busy" in str(error)))
    for error in (OSError(), ValueError("busy"), ValueError("other")):
        with pytest.raises(type(error)):
            policy.call(flaky(error))
    guard = Pipeline(policy, failed=lambda status: status >= 500)
    assert guard.call(lambda: 503) == 503
    assert (policy.statistics().calls, policy.statistics().failures) == (4, 3)


def test_a_group_is_a_failure_if_each_error_in_it_is_named_in_some_way(clock):
    class Busy(Exception):
        status = 503

    policy = CircuitBreaker(last=20, on=(OSError, 503, lambda error: "late" in str(error)))
    named = [OSError(), Busy(), ValueError("late")]
    for errors in (named, [*named, ValueError("other")]):
        with pytest.raises(ExceptionGroup):
            policy.call(flaky(ExceptionGroup("several", errors)))
    assert (policy.statistics().calls, policy.statistics().failures) == (2, 1)


def test_the_edge_of_functions_blames_the_function():
    assert FUNCTION.blames(Unclear()) is True
