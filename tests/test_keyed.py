"""Partitions: one policy for each key."""

import gc
import sys
import weakref
from threading import Barrier, Thread

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Keyed,
    Pipeline,
    Policy,
    RateLimit,
    RateLimited,
    Retry,
    TimedOut,
    Timeout,
)
from resilient.call import Call
from resilient.edge import Edge
from resilient.errors import FailedResult
from resilient.table import OVERFLOW
from resilient.testing import capture_events, flaky, run, run_both, virtual_time


@pytest.fixture
def clock():
    with virtual_time() as clock:
        yield clock


@pytest.fixture
def impatient_threads():
    """Switch threads as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def breaker():
    return CircuitBreaker(consecutive=1, open_for=5, jitter=0)


def by_host(host, *_, **__):
    return host


def works(host):
    return host


def breaks(host):
    raise OSError(host)


def fail(keyed, host):
    with pytest.raises(OSError, match=str(host)):
        keyed.call(breaks, host)


# -- partitions -----------------------------------------------------------------------------------------------


def test_one_bad_host_does_not_stop_the_others():
    async def scenario(colour):
        keyed = Keyed(breaker, key=by_host, name="k")
        for host in "ab":
            await colour.call(keyed, works, host)
        with pytest.raises(OSError, match="a"):
            await colour.call(keyed, breaks, "a")
        with pytest.raises(CircuitOpen):
            await colour.call(keyed, works, "a")
        assert await colour.call(keyed, works, "b") == "b"
        await colour.sleep(5)
        assert await colour.call(keyed, works, "a") == "a"
        return {key: policy.current_state for key, policy in keyed.policies().items()}

    assert [name for name, _ in run_both(scenario)] == [
        "circuit.opened",
        "circuit.rejected",
        "circuit.half_opened",
    ]


def test_it_may_be_a_class(clock):
    keyed = Keyed(CircuitBreaker, key=by_host)
    keyed.call(works, "a")
    assert isinstance(keyed.of("a"), CircuitBreaker)


def test_as_a_decorator_for_functions_of_both_colours(clock):
    limit = Keyed(lambda: RateLimit("1/s"), key=by_host)

    @limit
    def get(host):
        return host

    @limit
    async def aget(host):
        return host

    assert get("a") == "a"
    with pytest.raises(RateLimited):
        get("a")

    async def main():
        with pytest.raises(RateLimited):
            await aget("a")
        return await aget("b")

    assert run(main) == "b"


def test_plain_functions_have_one_partition_by_default(clock):
    keyed = Keyed(breaker)
    fail(keyed, "a")
    with pytest.raises(CircuitOpen):
        keyed.call(works, "b")
    assert list(keyed.policies()) == [None]


def test_the_edge_names_the_default_partition(clock):
    class Hosts(Edge):
        def key(self, call):
            return call.args[0]

    keyed = Keyed(breaker)
    chain, achain = keyed.chain(Hosts()), keyed.achain(Hosts())
    with pytest.raises(OSError, match="a"):
        chain(Call(breaks, ("a",), {}))
    assert chain(Call(works, ("b",), {})) == "b"

    async def main():
        with pytest.raises(CircuitOpen):
            await achain(Call(works, ("a",), {}))

    run(main)
    assert set(keyed.policies()) == {"a", "b"}


def test_a_key_of_ones_own_comes_before_that_of_the_edge(clock):
    class Hosts(Edge):
        def key(self, call):
            raise AssertionError("not asked")

    keyed = Keyed(breaker, key=by_host)
    keyed.chain(Hosts())(Call(works, ("a",), {}))
    assert set(keyed.policies()) == {"a"}


def test_an_unhashable_key(clock):
    keyed = Keyed(breaker, key=lambda host: [host], name="k")
    with pytest.raises(TypeError, match="k: key= returned list, which is not hashable"):
        keyed.call(works, "a")


def test_one_policy_whatever_it_was_linked_to(clock):
    keyed = Keyed(lambda: Bulkhead(1), key=by_host)
    inside = Pipeline(keyed)

    def nested(host):
        with pytest.raises(BulkheadFull):
            inside.call(works, host)
        return inside.call(works, "another")

    assert keyed.call(nested, "a") == "another"
    assert set(keyed.policies()) == {"a", "another"}


def test_of_and_policies_and_statistics(clock):
    keyed = Keyed(breaker, key=by_host)
    fail(keyed, "a")
    keyed.call(works, "b")
    assert keyed.of("a").current_state == "open"
    keyed.of("b").isolate()
    with pytest.raises(CircuitOpen):
        keyed.call(works, "b")
    keyed.of("a").close()
    assert keyed.call(works, "a") == "a"
    assert keyed.of("new").current_state == "closed"
    assert {key: snapshot.state for key, snapshot in keyed.statistics().items()} == {
        "a": "closed",
        "b": "open",
        "new": "closed",
    }
    assert keyed.policies()["a"] is keyed.of("a")


def test_threads_that_come_first_share_one_partition(impatient_threads):
    made = []

    def factory():
        made.append(1)
        return Bulkhead(8)

    for _ in range(50):
        keyed = Keyed(factory, key=by_host)
        keyed.call(works, "other")  # links it, which several threads might do at the same time
        made.clear()
        start = Barrier(8)
        found = []

        def caller(keyed=keyed, start=start, found=found):
            start.wait()
            keyed.call(works, "a")
            found.append(keyed.of("a"))

        threads = [Thread(target=caller) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1
        assert len(made) == 1
        assert keyed.of("a").statistics().in_use == 0


# -- bounded --------------------------------------------------------------------------------------------------


def test_the_idle_partition_used_last_long_ago_goes_first(clock):
    keyed = Keyed(breaker, key=by_host, max_keys=2)
    for host in "abac":
        keyed.call(works, host)
    assert set(keyed.policies()) == {"a", "c"}


def test_an_open_breaker_is_never_forgotten(clock):
    keyed = Keyed(breaker, key=by_host, max_keys=2)
    fail(keyed, "bad")
    for number in range(50):
        assert keyed.call(works, number) == number
    assert set(keyed.policies()) == {"bad", 49}
    with pytest.raises(CircuitOpen):
        keyed.call(works, "bad")


def test_without_an_idle_partition_new_keys_share_one(clock):
    keyed = Keyed(breaker, key=by_host, max_keys=2, name="k")
    fail(keyed, "a")
    fail(keyed, "b")
    with capture_events(keyed) as seen:
        assert keyed.call(works, "c") == "c"
    assert [(event.name, event.policy, event.max_keys) for event in seen] == [("partitions.full", "k", 2)]
    fail(keyed, "c")
    with pytest.raises(CircuitOpen):
        keyed.call(works, "d")
    assert set(keyed.policies()) == {"a", "b", OVERFLOW}
    keyed.of("a").close()
    with capture_events(keyed) as seen:
        assert keyed.call(works, "e") == "e"  # a is idle now
    assert seen == []
    assert set(keyed.policies()) == {"b", "e", OVERFLOW}


def test_the_search_for_an_idle_partition_is_bounded_and_goes_on(clock):
    keyed = Keyed(breaker, key=by_host, max_keys=64)
    for number in range(64):
        fail(keyed, number)
    keyed.of(40).close()
    assert keyed.policies()[40].idle(0.0)
    for number in range(100, 106):
        keyed.call(works, number)
    assert 40 not in keyed.policies()
    assert len(keyed.policies()) == 65
    assert sum(policy.current_state == "open" for policy in keyed.policies().values()) == 63


def test_a_limit_that_is_used_up_is_not_forgotten(clock):
    keyed = Keyed(lambda: RateLimit("1/s"), key=by_host, max_keys=1)
    keyed.call(works, "a")
    keyed.call(works, "b")  # overflow
    with pytest.raises(RateLimited):
        keyed.call(works, "a")
    clock.sleep(1)
    keyed.call(works, "c")
    assert set(keyed.policies()) == {"c", OVERFLOW}


def test_it_is_idle_when_all_of_them_are(clock):
    keyed = Keyed(breaker, key=by_host)
    keyed.call(works, "a")
    assert keyed.idle(0.0)
    fail(keyed, "b")
    assert not keyed.idle(0.0)


def test_keyed_in_keyed(clock):
    inner = lambda: Keyed(lambda: RateLimit("1/s"), key=lambda host, user: user)  # noqa: E731
    keyed = Keyed(inner, key=by_host)
    for host in "ab":
        for user in "xy":
            keyed.call(lambda host, user: None, host, user)
    with pytest.raises(RateLimited):
        keyed.call(lambda host, user: None, "a", "x")


class Idle(Policy):
    """Is idle when it is told so, and remembers when it was called."""

    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.busy = False

    def link(self, nxt, edge):
        return nxt

    alink = link

    def idle(self, now):
        return not self.busy


class Machine(RuleBasedStateMachine):
    """Against a list of keys, least recently used first: the partition that was used last is found without it."""

    KEYS = st.integers(0, 5)

    @initialize(max_keys=st.integers(1, 4))
    def make(self, max_keys):
        self.keyed = Keyed(Idle, key=by_host, max_keys=max_keys)
        self.max_keys = max_keys
        self.order = []  # keys that have a partition of their own
        self.policies = {}

    def policy_of(self, key):
        """Return the place and the policy that a call of this key has to get, the policy None for a new one."""
        if key in self.order:
            self.touch(key)
            return key, self.policies[key]
        self.touch(OVERFLOW)
        place = key if len(self.own()) < self.max_keys or self.room() else OVERFLOW
        policy = None if place is key else self.policies.get(OVERFLOW)
        if policy is None:
            self.order.append(place)
        return place, policy

    def own(self):
        return [key for key in self.order if key is not OVERFLOW]

    def touch(self, key):
        if key in self.order:
            self.order.remove(key)
            self.order.append(key)

    def room(self):
        for _ in range(16):  # probes
            key = self.order.pop(0)
            if key is not OVERFLOW and not self.policies[key].busy:
                return True
            self.order.append(key)
        return False

    @rule(key=KEYS, times=st.integers(1, 3))
    def use(self, key, times):
        for _ in range(times):
            place, expected = self.policy_of(key)
            with capture_events(self.keyed) as told:
                assert self.keyed.call(works, key) == key
            policy = self.peek()[place]
            assert policy is expected or (expected is None and policy not in self.policies.values())
            self.policies[place] = policy
            assert [event.name for event in told] == ["partitions.full"] * (place is OVERFLOW)

    @rule()
    def look(self):
        assert set(self.keyed.policies()) == set(self.order)
        assert set(self.keyed.statistics()) == set(self.peek())

    @precondition(lambda self: getattr(self, "order", None))
    @rule(data=st.data(), busy=st.booleans())
    def change(self, data, busy):
        self.policies[data.draw(st.sampled_from(self.order))].busy = busy

    def peek(self):
        return {key: partition.policy for key, partition in vars(self.keyed._partitions)["_Cache__data"].items()}

    @precondition(lambda self: hasattr(self, "order"))
    @invariant()
    def the_same_keys_in_the_same_order(self):
        assert list(vars(self.keyed._partitions)["_LRUCache__order"]) == self.order
        last = self.keyed._last
        assert last is None or (last.key == self.order[-1] and last.policy is self.policies[last.key])


TestOrder = Machine.TestCase
TestOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_to_look_at_the_partitions_is_not_to_use_them(clock):
    keyed = Keyed(breaker, key=by_host, max_keys=2)
    for host in "aba":
        keyed.call(works, host)
    keyed.policies(), keyed.statistics(), keyed.idle(0.0)
    keyed.call(works, "a")
    keyed.call(works, "c")
    assert set(keyed.policies()) == {"a", "c"}


def test_the_partition_used_last_is_found_without_the_lock(clock):
    keyed = Keyed(breaker, key=by_host)
    keyed.call(works, "a")
    with keyed._lock:
        assert keyed.call(works, "a") == "a"  # would wait for ever


@pytest.mark.parametrize("key", [[1], {"a": 1}, set()])
def test_an_unhashable_key_after_a_good_one(clock, key):
    keyed = Keyed(breaker, key=lambda key: key, name="k")
    keyed.call(works, 1)
    with pytest.raises(TypeError, match=f"k: key= returned {type(key).__name__}, which is not hashable"):
        keyed.call(works, key)


@pytest.mark.parametrize("max_keys", [1, 2, 64])
def test_threads_never_get_the_partition_of_another_key(impatient_threads, max_keys):
    """Each partition remembers the key it was made for; calls of all keys are mixed as wildly as can be."""

    class Marked(Policy):
        def __init__(self, *, name=None):
            super().__init__(name=name)
            self.keys = set()

        def link(self, nxt, edge):
            def mark(call):
                self.keys.add(call.args[0])
                return nxt(call)

            return mark

        alink = link

    made = []

    def factory():
        made.append(Marked())
        return made[-1]

    keyed = Keyed(factory, key=by_host, max_keys=max_keys)
    start = Barrier(8)

    def caller(number):
        start.wait()
        for step in range(300):
            key = number % 4 if step % 3 else step % 7
            assert keyed.call(works, key) == key

    threads = [Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(policy.keys) <= 1 for policy in made), "nothing is busy here, so that nobody has to share"
    assert len(keyed.policies()) <= max_keys


# -- any kind of policy ---------------------------------------------------------------------------------------


def test_retry():
    async def scenario(colour):
        keyed = Keyed(lambda: Retry(3, on=OSError, wait=1), key=by_host)
        function = flaky(OSError, OSError, "well")
        return await colour.call(keyed, function, "a"), colour.now()

    assert [name for name, _ in run_both(scenario)] == ["retry.scheduled"] * 2


def test_timeout():
    async def scenario(colour):
        keyed = Keyed(lambda: Timeout(1), key=by_host)

        async def hang(host):
            await colour.sleep(5)

        with pytest.raises(TimedOut):
            await colour.call(keyed, hang, "a")
        return colour.now()

    assert run_both(scenario) == [("timeout.expired", 1.0)]


def test_cache(clock):
    keyed = Keyed(lambda: Cache(10, max_entries=1), key=by_host)
    made = []

    def fetch(host, number):
        made.append((host, number))

    for host, number in [("a", 1), ("b", 1), ("a", 1), ("a", 2), ("b", 1), ("a", 1)]:
        keyed.call(fetch, host, number)
    assert made == [("a", 1), ("b", 1), ("a", 2), ("a", 1)]


def test_fallback():
    async def scenario(colour):
        keyed = Keyed(lambda: Fallback("instead", on=OSError), key=by_host)
        return await colour.call(keyed, breaks, "a")

    assert [name for name, _ in run_both(scenario)] == ["fallback.used"]


def test_bulkhead_with_waiting_tasks():
    async def scenario(colour):
        keyed = Keyed(lambda: Bulkhead(1, queue=5), key=by_host)

        async def work(host):
            await colour.sleep(1)

        def caller(host):
            async def call():
                await colour.call(keyed, work, host)
                return host, colour.now()

            return call

        return sorted(await colour.gather(*map(caller, "aab")))

    run_both(scenario)
    with virtual_time() as clock:
        keyed = Keyed(lambda: Bulkhead(1, queue=5), key=by_host)

        def work(host):
            clock.sleep(1)
            return clock.now()

        assert clock.run_threads(*(lambda host=host: keyed.call(work, host) for host in "aab")) == [1.0, 2.0, 1.0]


def test_a_pipeline():
    async def scenario(colour):
        keyed = Keyed(lambda: Pipeline(Retry(2, on=OSError, wait=1), breaker()), key=by_host)
        with pytest.raises(CircuitOpen):
            await colour.call(keyed, breaks, "a")
        assert await colour.call(keyed, works, "b") == "b"
        return colour.now()

    names = [name for name, _ in run_both(scenario)]
    assert names[0] == "circuit.opened"


def test_inside_a_pipeline_between_others():
    async def scenario(colour):
        guard = Pipeline(
            Retry(3, on=OSError, wait=1), Keyed(lambda: CircuitBreaker(consecutive=5), key=by_host), Timeout(1)
        )
        function = flaky(OSError, OSError, "well")
        return await colour.call(guard, function, "a")

    run_both(scenario)


def test_judges_pass_through():
    async def scenario(colour):
        keyed = Keyed(lambda: Pipeline(breaker(), failed=lambda status: status >= 500), key=by_host)
        answers = [
            await colour.call(keyed, lambda host: 200, "a"),
            await colour.call(keyed, lambda host: 503, "a"),
        ]
        assert answers == [200, 503]
        with pytest.raises(CircuitOpen):
            await colour.call(keyed, lambda host: 200, "a")
        return await colour.call(keyed, lambda host: 200, "b")

    assert [name for name, _ in run_both(scenario)] == ["circuit.opened", "circuit.rejected"]


def test_the_judge_gives_the_first_error_that_anybody_sees(clock):
    keyed = Keyed(lambda: Pipeline(Pipeline(failed=lambda n: n == 1), failed=lambda n: n == 2))
    call = Call(works, (), {})
    assert [type(keyed.judge(call, number)) for number in range(3)] == [type(None), FailedResult, FailedResult]
    assert Keyed(breaker).judge is None


def test_each_partition_judges_for_itself():
    async def scenario(colour):
        keyed = Keyed(lambda: Pipeline(RateLimit("9/s", learn=True), failed=lambda _: False), key=by_host)

        def answer(host):
            return Response({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "60"} if host == "busy" else {})

        for host in ("busy", "well", "well"):
            await colour.call(keyed, answer, host)
        with pytest.raises(RateLimited) as refused:
            await colour.call(keyed, answer, "busy")
        return refused.value.retry_after

    assert [name for name, _ in run_both(scenario)] == ["rate_limit.rejected"]


class Response:
    status_code = 200

    def __init__(self, headers):
        self.headers = headers


def test_each_partition_judges_for_itself_by_the_key_of_the_edge(clock):
    class Hosts(Edge):
        def key(self, call):
            return call.args[0]

    class HostCall(Call):
        edge = Hosts()

    keyed = Keyed(lambda: RateLimit("9/s", learn=True))
    chain = keyed.chain(HostCall.edge)
    answer = lambda host: Response({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "60"})  # noqa: E731
    chain(HostCall(answer, ("a",), {}))
    chain(HostCall(answer, ("b",), {}))
    for host in "ab":
        with pytest.raises(RateLimited):
            chain(HostCall(answer, (host,), {}))


def test_a_policy_that_does_not_fit_says_so_when_it_is_linked():
    keyed = Keyed(Retry)
    with pytest.raises(TypeError, match="on"):
        keyed(works)

    async def aworks():
        """Stand for an async function."""

    with pytest.raises(TypeError, match="on"):
        keyed(aworks)


def test_cancellation_in_a_partition_passes_through():
    async def main():
        keyed = Keyed(lambda: Bulkhead(1), key=by_host)
        with anyio.move_on_after(1) as scope:
            await keyed.acall(lambda host: anyio.sleep(5), "a")
        return scope.cancelled_caught, keyed.of("a").statistics().in_use

    for backend in ("asyncio", "trio"):
        assert run(main, backend=backend) == (True, 0)


# -- listening ------------------------------------------------------------------------------------------------


def test_a_listener_hears_partitions_that_exist_and_those_to_come(clock):
    keyed = Keyed(lambda: Pipeline(Retry(1, on=OSError), breaker()), key=by_host)
    keyed.call(works, "a")
    seen = []
    with keyed.listen(seen.append):
        fail(keyed, "a")
        fail(keyed, "b")
    fail(keyed, "c")
    assert [event.name for event in seen if event.name == "circuit.opened"] == ["circuit.opened"] * 2


def test_a_pipeline_around_it_hears_them_as_well(clock):
    keyed = Keyed(breaker, key=by_host)
    guard = Pipeline(keyed)
    with capture_events(guard) as seen:
        fail(guard, "a")
    assert [event.name for event in seen] == ["circuit.opened"]


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [None, "CircuitBreaker", CircuitBreaker(), Pipeline()])
def test_a_bad_factory(factory):
    with pytest.raises(
        TypeError, match=r"Keyed: factory=.* is not allowed; give a function that makes a new policy"
    ):
        Keyed(factory)


def test_a_factory_that_makes_something_else():
    with pytest.raises(TypeError, match="Keyed: factory returned 5, which is not a policy"):
        Keyed(lambda: 5)
    with pytest.raises(TypeError, match=r"Keyed: factory returned \{\}, which is not a policy"):
        Keyed(dict)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"key": "host"}, TypeError, "Keyed: key='host' is not allowed; give a function"),
        ({"max_keys": 0}, ValueError, "Keyed: max_keys=0 is not allowed; give an int >= 1"),
        ({"name": 5}, TypeError, "Keyed: name=5 is not allowed"),
    ],
)
def test_bad_options(options, kind, message):
    with pytest.raises(kind, match=message):
        Keyed(breaker, **options)


def test_a_block_cannot_be_keyed():
    with pytest.raises(TypeError, match="Keyed"), Keyed(breaker):
        raise AssertionError("never entered")


def test_a_copy_has_partitions_of_its_own(clock):
    keyed = Keyed(breaker, key=by_host)
    fail(keyed, "a")
    assert keyed.fresh().call(works, "a") == "a"
    assert "by_host" in repr(keyed)


def test_a_block_has_no_arguments_to_take_a_key_from():
    keyed = Keyed(lambda: Bulkhead(1))
    for enter in (keyed.block, keyed.ablock):
        with pytest.raises(
            TypeError, match="Keyed cannot guard a `with` block: the key is taken from the arguments"
        ):
            enter()


def test_a_partition_that_was_forgotten_is_let_go():
    keyed = Keyed(lambda: CircuitBreaker(consecutive=1), key=lambda number: number, max_keys=2)
    guarded = keyed(lambda number: number)
    guarded(0)
    first = weakref.ref(keyed.of(0))
    for number in (1, 2, 3):
        guarded(number)
    gc.collect()
    assert first() is None
