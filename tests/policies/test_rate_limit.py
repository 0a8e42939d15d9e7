"""The rate limit: exact in numbers, fair in its queue, and never over the limit."""

import random
import sys
from fractions import Fraction
from threading import Barrier, Thread

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from resilient import FailedResponse, Pipeline, Rate, RateLimit, RateLimited, Retry, TimedOut, Timeout
from resilient.call import Call
from resilient.edge import Edge
from resilient.policies.rate_limit import RateLimitStatistics
from resilient.table import OVERFLOW
from resilient.testing import capture_events, run, run_both, virtual_time

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])
MICRO = Fraction(1, 1_000_000)
TWO_YEARS = 2 * 365 * 86_400 * 1_000_000  # in microseconds


@pytest.fixture
def impatient_threads():
    """Switch threads as often as Python can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def function(*args, **kwargs):
    """Stand for the guarded function where the hook is called by numbers."""


def a_call(*args, **kwargs):
    return Call(function, args, kwargs)


def admitted(limit, now, *args):
    """Tell how long a call has to wait: 0, a time, or None if it is refused."""
    try:
        ticket = limit.admit(a_call(*args), now)
    except RateLimited:
        return None
    return 0.0 if ticket is None else ticket.ready_at - now


def refusal(limit, now, *args):
    with pytest.raises(RateLimited) as caught:
        limit.admit(a_call(*args), now)
    return caught.value


# -- exact ----------------------------------------------------------------------------------------------------


def test_so_many_at_once_and_then_at_the_rate():
    async def scenario(colour):
        limit = RateLimit("4/2s", name="r")
        log = []
        for _ in range(30):
            try:
                await colour.call(limit, lambda: None)
                log.append(colour.now())
            except RateLimited:
                pass
            await colour.sleep(0.125)
        assert log == [0.0, 0.125, 0.25, 0.375, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
        return limit.statistics()

    assert len(run_both(scenario)) == 30 - 11


def test_the_refusal_says_who_why_and_when_to_come_back():
    limit = RateLimit("3/minute", name="api")
    assert [admitted(limit, 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, None]
    error = refusal(limit, 105.0)
    assert str(error) == "api: more than 3 per 60 s; retry after 15 s"
    assert (error.policy, error.reason, error.retry_after) == ("api", "more than 3 per 60 s", 15.0)


def test_refusals_change_nothing():
    limit = RateLimit("1/s")
    assert admitted(limit, 0.0) == 0.0
    for tenth in range(1, 10):
        assert refusal(limit, tenth / 10).retry_after == pytest.approx(1 - tenth / 10)
    assert admitted(limit, 1.0) == 0.0
    assert limit.statistics() == RateLimitStatistics(keys=1, rejected=9, queued=0)


def test_a_long_quiet_time_gives_one_burst_and_no_more():
    limit = RateLimit("5/s")
    for now in (0.0, 1e6, 2e9):
        assert [admitted(limit, now) for _ in range(6)] == [0.0] * 5 + [None]


def test_burst():
    limit = RateLimit("10/s", burst=2)
    assert [admitted(limit, 0.0) for _ in range(3)] == [0.0, 0.0, None]
    assert refusal(limit, 0.0).retry_after == 0.1
    assert [admitted(limit, 0.1) for _ in range(2)] == [0.0, None]
    big = RateLimit("1/s", burst=5)
    assert [admitted(big, 0.0) for _ in range(6)] == [0.0] * 5 + [None]
    assert refusal(big, 0.0).retry_after == 1.0


def test_a_clock_that_goes_back_gives_nothing_away():
    limit = RateLimit("1/s")
    assert admitted(limit, 100.0) == 0.0
    assert refusal(limit, 50.0).retry_after == 51.0
    assert refusal(limit, 100.5).retry_after == 0.5
    assert admitted(limit, 101.0) == 0.0


@pytest.mark.parametrize("start", [0.0, 1e-7, 12_345.678901, 1e9])
def test_the_clock_may_start_anywhere(start):
    limit = RateLimit("4/s")
    assert [admitted(limit, start) for _ in range(5)] == [0.0] * 4 + [None]
    assert refusal(limit, start).retry_after == pytest.approx(0.25, abs=2e-6)
    assert admitted(limit, start + 0.25 + 2e-6) == 0.0


def test_a_rate_that_is_no_whole_number_of_microseconds_does_not_drift():
    limit = RateLimit(Rate(3, per=1))
    now, count = 0, 0  # in microseconds
    while now < 1_000 * 1_000_000:
        try:
            limit.admit(a_call(), now / 1e6)
            count += 1
        except RateLimited as error:
            now += round(error.retry_after * 1e6)
    assert count == 3_000 + 2  # the burst, and then exactly three in each second


@settings(deadline=None, max_examples=200)
@given(
    limit=st.integers(1, 1_000),
    period=st.integers(1, 10**11),
    burst=st.integers(1, 50),
    start=st.integers(0, 10**15),
    cost=st.integers(1, 50),
    pauses=st.lists(st.integers(0, 10**7), max_size=20),
)
def test_waiting_as_told_is_always_enough_and_a_microsecond_less_is_not(
    *, limit, period, burst, start, cost, pauses
):
    """All in microseconds, as large as a clock that has run for 30 years; for 2 years if the number is a float."""
    cost = min(cost, burst)
    policy = RateLimit(Rate(limit, per=period / 1e6), burst=burst, cost=cost)
    now = start % TWO_YEARS if policy._lone else start
    for pause in pauses:
        now += pause
        if admitted(policy, now / 1e6) is None:
            wait = round(refusal(policy, now / 1e6).retry_after * 1e6)
            assert wait >= 1
            assert admitted(policy, (now + wait - 1) / 1e6) is None
            now += wait
            assert admitted(policy, now / 1e6) == 0.0


# -- cost -----------------------------------------------------------------------------------------------------


def test_a_call_may_cost_more_than_one():
    limit = RateLimit("10/s", cost=4)
    assert [admitted(limit, 0.0) for _ in range(3)] == [0.0, 0.0, None]
    assert refusal(limit, 0.0).retry_after == 0.2  # 8 of 10 are taken, and 4 have to fit


def test_the_cost_may_depend_on_the_arguments():
    limit = RateLimit("10/s", cost=lambda size: size)
    assert admitted(limit, 0.0, 7) == 0.0
    assert refusal(limit, 0.0, 4).retry_after == 0.1
    assert admitted(limit, 0.0, 3) == 0.0
    assert refusal(limit, 0.0, 1).retry_after == 0.1


@pytest.mark.parametrize("cost", [0, -1, 11])
def test_a_bad_cost(cost):
    limit = RateLimit("10/s", cost=lambda: cost, name="r")
    with pytest.raises(ValueError, match=f"r: cost= returned {cost}; return an int from 1 to burst=10"):
        limit.call(function)
    assert limit.statistics() == RateLimitStatistics(keys=0, rejected=0, queued=0)


@pytest.mark.parametrize("cost", [1.0, None, "1", True])
def test_a_cost_of_another_type(cost):
    limit = RateLimit("10/s", cost=lambda: cost, name="r")
    with pytest.raises(TypeError, match=r"r: cost= returned .*; return an int from 1 to burst=10"):
        limit.call(function)


# -- keys -----------------------------------------------------------------------------------------------------


def test_each_key_has_the_whole_rate_for_itself():
    async def scenario(colour):
        limit = RateLimit("2/s", key=lambda user, **_: user, name="r")
        log = []
        for user in "ababab":
            try:
                await colour.call(limit, log.append, user)
            except RateLimited:
                log.append(user.upper())
        assert log == ["a", "b", "a", "b", "A", "B"]
        return limit.statistics()

    assert len(run_both(scenario)) == 2


def test_none_is_a_key_like_any_other():
    limit = RateLimit("1/s", key=lambda user: user)
    assert [admitted(limit, 0.0, user) for user in (None, "a", None)] == [0.0, 0.0, None]


def test_an_unhashable_key():
    limit = RateLimit("1/s", key=lambda user: [user], name="r")
    with pytest.raises(TypeError, match="r: key= returned list, which is not hashable"):
        limit.call(function, "a")


def test_keys_that_are_in_use_are_kept_and_new_ones_share_one_limit():
    limit = RateLimit("1/s", key=lambda user: user, max_keys=2, name="r")
    assert [admitted(limit, 0.0, user) for user in "ab"] == [0.0, 0.0]
    with capture_events(limit) as seen:
        assert [admitted(limit, 0.0, user) for user in "cd"] == [0.0, None]
    assert [event.name for event in seen] == ["partitions.full", "partitions.full", "rate_limit.rejected"]
    assert seen[0].max_keys == 2
    assert [admitted(limit, 0.5, user) for user in "abcd"] == [None] * 4
    assert limit.statistics().keys == 2


def test_keys_whose_limit_is_untouched_are_forgotten_first():
    limit = RateLimit("1/s", key=lambda user: user, max_keys=2)
    assert admitted(limit, 0.0, "a") == 0.0
    assert admitted(limit, 0.9, "b") == 0.0
    with capture_events() as seen:
        assert admitted(limit, 1.0, "c") == 0.0  # in the place of a
    assert seen == []
    assert admitted(limit, 1.0, "b") is None
    assert limit.statistics().keys == 2


def test_a_key_that_gets_an_entry_of_its_own_does_not_get_a_second_limit():
    limit = RateLimit("1/s", key=lambda user: user, max_keys=1)
    assert admitted(limit, 0.0, "a") == 0.0
    assert admitted(limit, 0.9, "b") == 0.0  # shares the overflow entry
    assert admitted(limit, 1.0, "b") is None  # in the place of a, but not with a fresh limit
    assert refusal(limit, 1.0, "b").retry_after == pytest.approx(0.9)
    assert admitted(limit, 1.9, "b") == 0.0


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from([0, 0, 0, 1, 2, 9])), max_size=150),
)
def test_forgetting_a_key_never_refills_it(max_keys, steps):
    """Whatever comes by: no key gets more than its bucket, and the table stays small."""
    limit = RateLimit("2/4s", key=lambda user: user, max_keys=max_keys)
    started = {}
    now = 0
    for user, pause in steps:
        now += pause
        if admitted(limit, float(now), user) == 0.0:
            started.setdefault(user, []).append(now)
    for times in started.values():
        for first, begin in enumerate(times):
            for count, end in enumerate(times[first:], 1):
                assert count <= 2 + (end - begin) / 2
    assert limit.statistics().keys <= max_keys + 1


def test_it_is_idle_when_no_key_owes_anything():
    limit = RateLimit("1/s", key=lambda user: user)
    assert limit.idle(0.0)
    admitted(limit, 0.0, "a")
    admitted(limit, 0.5, "b")
    assert not limit.idle(1.4)
    assert limit.idle(1.5)


# -- edges ----------------------------------------------------------------------------------------------------


class Origins(Edge):
    """Knows where calls go to, and raises failing answers itself, as the edges of HTTP do."""

    partitions = True
    judges = True

    def key(self, call):
        return call.args[0]

    def end(self):
        def end(call):
            answer = call.function(*call.args)
            if getattr(answer, "status_code", 200) >= 400:
                raise FailedResponse(answer)
            return answer

        return end

    def aend(self):
        end = self.end()

        async def aend(call):
            return end(call)

        return aend


class OriginCall(Call):
    """A call that ends at the edge of origins."""

    edge = Origins()


def send(policy, origin, answer="answer", *, asynchronous=False):
    """Send one call to an origin; return what comes back, a failing answer too."""
    call = OriginCall(lambda _origin: answer, (origin,), {})

    async def main():
        return await policy.achain(OriginCall.edge)(call)

    try:
        return run(main) if asynchronous else policy.chain(OriginCall.edge)(call)
    except FailedResponse as failure:
        return failure.result


def refused_by(policy, origin, **options):
    with pytest.raises(RateLimited) as caught:
        send(policy, origin, **options)
    return caught.value


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_each_origin_has_the_whole_rate_for_itself(asynchronous):
    limit = RateLimit("2/s", name="r")
    with virtual_time(), capture_events(limit) as seen:
        for origin in "abab":
            assert send(limit, origin, asynchronous=asynchronous) == "answer"
        error = refused_by(limit, "a", asynchronous=asynchronous)
        assert (error.policy, error.retry_after) == ("r", 0.5)
        assert [event.policy for event in seen] == ["r"]
        assert limit.statistics() == RateLimitStatistics(keys=2, rejected=1, queued=0)
        assert not limit.idle(0.5)
        assert limit.idle(1.0)
        for _ in range(2):  # what is not sent to an origin has a limit of its own
            limit.call(function)
        with pytest.raises(RateLimited):
            limit.call(function)
        assert limit.statistics() == RateLimitStatistics(keys=3, rejected=2, queued=0)
        assert not limit.idle(0.9)
        for _ in range(2):
            assert send(limit.fresh(), "a") == "answer"


def test_the_options_hold_for_each_origin():
    limit = RateLimit("1/s", burst=2, wait=2, cost=2, max_keys=1)
    with virtual_time() as clock, capture_events(limit) as seen:
        send(limit, "a")
        send(limit, "a")
        assert clock.now() == 2
        send(limit, "b")  # no room: it takes over the limit of those who share
        assert [event.name for event in seen] == ["rate_limit.queued", "partitions.full"]
        assert limit.statistics().queued == 1


def test_a_key_of_ones_own_comes_before_that_of_the_edge():
    limit = RateLimit("1/s", key=lambda origin: "all")
    with virtual_time():
        send(limit, "a")
        refused_by(limit, "b")


def test_an_unhashable_key_of_the_edge():
    limit = RateLimit("1/s", name="r")
    with pytest.raises(TypeError, match="r: key= returned list, which is not hashable"):
        send(limit, ["a"])


def test_a_block_has_no_origin():
    limit = RateLimit("1/s")
    with virtual_time():
        send(limit, "a")
        with limit:
            pass
        with pytest.raises(RateLimited), limit:
            raise AssertionError("never entered")


def test_threads_that_link_it_first_share_its_origins(impatient_threads):
    for _ in range(100):
        limit = RateLimit("1000/s")
        start = Barrier(8)
        found = []

        def link(limit=limit, start=start, found=found):
            start.wait()
            found.append(limit.on_edge(OriginCall.edge))

        threads = [Thread(target=link) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1


# -- learning -------------------------------------------------------------------------------------------------


class Answer:
    """What a function returns that calls a server, with some client or other."""

    def __init__(self, headers=None, status_code=200):
        self.headers = headers or {}
        self.status_code = status_code


def told(remaining=None, reset=None, *, status=200, **fields):
    if remaining is not None:
        fields["X-RateLimit-Remaining"] = str(remaining)
    if reset is not None:
        fields["X-RateLimit-Reset"] = str(reset)
    return Answer({name.replace("_", "-"): value for name, value in fields.items()}, status)


def admitted_at_once(limit):
    count = 0
    while True:
        try:
            limit.call(lambda: None)
        except RateLimited as error:
            return count, round(error.retry_after, 6)
        count += 1


def after(answer, **options):
    """Return how many calls start at once after such an answer, and how long the next one has to wait."""
    with virtual_time(start=1_000):
        limit = RateLimit("10/s", learn=True, **options)
        assert limit.call(lambda: answer) is answer
        return admitted_at_once(limit)


def test_what_a_limit_learns():
    untouched = 9, 0.1
    assert after("no response") == untouched
    assert after(Answer()) == untouched
    assert after(told(0, 60)) == (0, 60.0), "nothing is left until then"
    assert after(told(3, 60)) == (3, 0.1), "so many, and then at our own rate"
    assert after(told(8, 60)) == (8, 0.1)
    assert after(told(9, 60)) == after(told(100, 60)) == untouched, "it never speeds up"
    assert after(told(0)) == after(told(None, 60)) == untouched, "half of it says nothing"
    assert after(told(0, 0)) == (1, 0.1)
    assert after(told(0, 0.25)) == (0, 0.25)
    assert after(told(0, 3_600)) == (0, 3_600.0)
    assert after(told(0, 86_400)) == (0, 3_600.0), "an hour at most"
    assert after(told(status=429, Retry_After="7")) == (0, 7.0)
    assert after(told(5, 60, status=429, Retry_After="7")) == (0, 7.0)
    assert after(told(status=503, Retry_After="7")) == untouched, "that is not about the number of calls"
    assert after(told(status=429)) == untouched


def test_a_function_that_it_guards_alone_teaches_it_too():
    with virtual_time():
        answer = RateLimit("10/s", learn=True)(lambda: told(0, 60))
        answer()
        with pytest.raises(RateLimited):
            answer()


def test_without_learning_nothing_is_learned():
    with virtual_time():
        limit = RateLimit("10/s")
        limit.call(lambda: told(0, 60))
        assert admitted_at_once(limit) == (9, 0.1)


def test_after_the_reset_it_goes_on_at_its_own_rate():
    async def scenario(colour):
        limit = RateLimit("10/s", learn=True, wait=120, name="r")
        await colour.call(limit, lambda: told(0, 60))
        times = []
        for _ in range(4):
            await colour.call(limit, lambda: times.append(round(colour.now(), 6)))
        assert times == [60.0, 60.1, 60.2, 60.3]
        return limit.statistics()

    assert {name for name, _ in run_both(scenario)} == {"rate_limit.queued"}


def test_a_call_that_costs_more_waits_for_more():
    with virtual_time():
        limit = RateLimit("10/s", learn=True, cost=5)
        limit.call(lambda: told(0, 60))
        with pytest.raises(RateLimited) as refused:
            limit.call(function)
        assert refused.value.retry_after == pytest.approx(60.4)


def test_the_last_answer_does_not_undo_the_one_before():
    with virtual_time() as clock:
        limit = RateLimit("10/s", learn=True)
        answers = iter([told(0, 60), told(100, 60), told(0, 1)])
        later = [limit.admit(a_call(), 0.0) for _ in range(3)]  # under way at the same time
        assert later == [None] * 3
        for answer in answers:
            limit.judge(a_call(), answer)
        assert admitted_at_once(limit) == (0, 60.0)
        clock.sleep(60)
        assert admitted_at_once(limit) == (1, 0.1)


def test_each_key_learns_for_itself():
    with virtual_time():
        limit = RateLimit("10/s", learn=True, key=lambda user: user)
        limit.call(lambda user: told(0, 60), "ada")
        limit.call(lambda user: told(100, 60), "bob")
        with pytest.raises(RateLimited):
            limit.call(function, "ada")
        limit.call(function, "bob")


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_each_origin_learns_for_itself_also_from_failures(asynchronous):
    limit = Pipeline(RateLimit("10/s", learn=True))
    with virtual_time():
        for origin, answer in (
            ("a", told(0, 60)),
            ("b", told(100, 60)),
            ("c", told(status=429, Retry_After="7")),
            ("d", told(status=500)),
        ):
            assert send(limit, origin, answer, asynchronous=asynchronous) is answer
        assert round(refused_by(limit, "a", asynchronous=asynchronous).retry_after) == 60
        assert round(refused_by(limit, "c", asynchronous=asynchronous).retry_after) == 7
        for origin in "bd":
            assert send(limit, origin, asynchronous=asynchronous) == "answer"


def test_a_failing_answer_teaches_whoever_else_calls_it_a_failure():
    async def scenario(colour):
        limit = RateLimit("10/s", learn=True, name="r")
        guard = Pipeline(Retry(2, on={429}, wait=0), limit, name="p")
        answer = told(status=429, Retry_After="7")
        assert await colour.call(guard, lambda: answer) is answer
        assert 7 <= colour.now() <= 7.7
        assert limit.statistics().rejected == 0
        with pytest.raises(RateLimited):
            await colour.call(limit, lambda: answer)

    run_both(scenario)


def test_what_shares_one_limit_does_not_learn():
    """Else one user who is sent away would stop all that have no entry of their own."""
    with virtual_time():
        limit = RateLimit("10/s", learn=True, key=lambda user: user, max_keys=1)
        limit.call(lambda user: told(100, 60), "ada")
        limit.call(lambda user: told(0, 60), "bob")
        limit.call(function, "eve")
        assert limit.statistics().keys == 1


def test_it_learns_about_a_key_that_was_forgotten_meanwhile():
    with virtual_time() as clock:
        limit = RateLimit("10/s", learn=True, key=lambda user: user, max_keys=1)

        def slow(user):
            clock.sleep(50)
            limit.call(function, "bob")  # in the place of ada
            clock.sleep(50)
            return told(0, 60)

        limit.call(slow, "ada")
        with pytest.raises(RateLimited):
            limit.call(function, "ada")


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 12), st.integers(0, 30)), min_size=1, max_size=12),
    st.integers(1, 12),
)
def test_it_never_exceeds_what_it_was_told_nor_its_own_rate(steps, burst):
    """No more calls start at once than an answer says are left, and none before the reset if that is 0."""
    with virtual_time() as clock:
        limit = RateLimit("4/s", burst=burst, learn=True)
        starts, closed_until = [], 0.0
        for milliseconds, remaining, reset in steps:
            clock.sleep(milliseconds / 1_000)
            limit.judge(a_call(), told(remaining, reset))
            if not remaining:
                closed_until = max(closed_until, clock.now() + reset)
            count, wait = admitted_at_once(limit)
            assert count <= min(burst, max(remaining, 1))
            assert not count or clock.now() >= closed_until - 1e-6
            assert clock.now() + wait >= closed_until - 1e-6
            starts += [clock.now()] * count
        for first, begin in enumerate(starts):
            for number, end in enumerate(starts[first:], 1):
                assert number <= burst + 4 * (end - begin) + 1e-6


# -- waiting --------------------------------------------------------------------------------------------------


def test_calls_wait_for_their_turn_first_come_first_served():
    async def scenario(colour):
        limit = RateLimit("2/s", burst=1, wait=2, name="r")
        log = []

        def caller(number):
            async def call():
                await colour.sleep(number / 64)
                try:
                    await colour.call(limit, lambda: log.append((number, colour.now())))
                except RateLimited as error:
                    log.append((number, "refused", round(error.retry_after, 6)))

            return call

        await colour.gather(*map(caller, range(6)))
        assert log == [(0, 0.0), (5, "refused", 2.421875), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
        return limit.statistics()

    assert [name for name, _ in run_both(scenario)] == ["rate_limit.queued"] * 4 + ["rate_limit.rejected"]


@pytest.mark.parametrize("wait", [1, 8.2])
def test_a_wait_of_exactly_the_limit_is_allowed(wait):
    limit = RateLimit(Rate(1, per=wait), wait=wait)
    assert [admitted(limit, 0.0) for _ in range(3)] == [0.0, wait, None]


def test_a_big_cost_is_not_starved_by_small_ones():
    limit = RateLimit("10/s", wait=2, cost=lambda size: size)
    assert admitted(limit, 0.0, 10) == 0.0
    assert admitted(limit, 0.0, 10) == 1.0
    waits = [admitted(limit, tenth / 10, 1) for tenth in range(1, 10)]
    assert waits == pytest.approx([1.0] * 9)  # all of them behind it: at 1.1, 1.2, ...


def test_a_wait_past_the_deadline_is_refused_at_once():
    async def scenario(colour):
        limit = RateLimit("1/s", wait=10, name="r")
        hurried = Pipeline(Timeout(0.5, name="t"), limit)
        await colour.call(limit, lambda: None)
        with pytest.raises(RateLimited) as caught:
            await colour.call(hurried, lambda: None)
        assert (colour.now(), caught.value.retry_after) == (0.0, 1.0)
        await colour.call(Pipeline(Timeout(1.5), limit), lambda: None)
        assert colour.now() == 1.0
        return limit.statistics()

    assert run_both(scenario) == [("rate_limit.rejected", 0.0), ("rate_limit.queued", 0.0)]


def test_a_wait_that_ends_exactly_at_the_deadline_is_refused():
    limit = RateLimit("1/s", wait=10)
    with virtual_time():
        limit.call(function)
        with pytest.raises(RateLimited):
            Pipeline(Timeout(1, interrupt=False), limit).call(function)


@BACKENDS
def test_a_cancelled_wait_gives_the_reservation_back(backend):
    async def main():
        limit = RateLimit("1/s", wait=10)
        await limit.acall(anyio.sleep, 0)
        for _ in range(20):
            with anyio.move_on_after(0.01) as scope:
                await limit.acall(anyio.sleep, 0)
            assert scope.cancelled_caught
        await limit.acall(anyio.sleep, 0)
        return anyio.current_time(), limit.statistics()

    start = 0.0
    ended, statistics = run(main, backend=backend, start=start)
    assert ended == pytest.approx(1.0)
    assert statistics == RateLimitStatistics(keys=1, rejected=0, queued=21)


def test_the_turn_of_a_cancelled_one_is_for_the_next_call_and_those_behind_keep_theirs():
    limit = RateLimit("1/s", wait=10)
    first, second, third, fourth = (limit.admit(a_call(), 0.0) for _ in range(4))
    assert (first, second.ready_at, third.ready_at, fourth.ready_at) == (None, 1.0, 2.0, 3.0)
    limit.leave(a_call(), third)
    limit.leave(a_call(), second)
    assert [admitted(limit, 0.5) for _ in range(3)] == [0.5, 1.5, 3.5]
    assert limit._vacant == {}
    assert admitted(limit, 0.5) == 4.5


def test_a_vacant_turn_that_has_passed_is_lost():
    limit = RateLimit("1/s", wait=10)
    _, second, _ = (limit.admit(a_call(), 0.0) for _ in range(3))
    limit.leave(a_call(), second)
    assert admitted(limit, 1.5) == 1.5  # at 3, not at 1.5: the third one starts at 2
    assert limit._vacant == {}


def test_a_vacant_turn_must_be_long_enough_and_come_in_time():
    limit = RateLimit("4/4s", wait=2, cost=lambda cost: cost)
    limit.admit(a_call(4), 0.0)
    small, _ = (limit.admit(a_call(1), 0.0) for _ in range(2))
    limit.leave(a_call(1), small)
    assert admitted(limit, 0.0, 2) is None  # would start at 4, behind the others
    with virtual_time():
        with pytest.raises(RateLimited):
            Pipeline(Timeout(0.5, interrupt=False), limit).call(function, 1)
        assert admitted(limit, 0.0, 1) == 1.0


def test_vacant_turns_are_not_remembered_for_ever():
    limit = RateLimit("1/s", wait=10, key=lambda user: user)
    for user in range(1_500):
        limit.admit(a_call(user), 0.0)
        ticket, _ = (limit.admit(a_call(user), 0.0) for _ in range(2))
        limit.leave(a_call(user), ticket)
    assert len(limit._vacant) == 500
    assert [admitted(limit, 0.0, user) for user in (0, 1_499)] == [3.0, 1.0]


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["ask", "ask", "ask", "leave"]), st.integers(1, 3)),
        max_size=60,
    ),
)
def test_whoever_gives_up_nobody_exceeds_the_limit(burst, steps):
    limit = RateLimit("1/s", burst=burst, wait=8, cost=lambda cost: cost)
    now, started, waiting = 0.0, [], []
    for pause, what, number in steps:
        now += pause / 2
        if what == "ask":
            cost = min(number, burst)
            try:
                ticket = limit.admit(a_call(cost), now)
            except RateLimited:
                continue
            if ticket is None:
                started.append((now, cost))
            else:
                waiting.append((ticket, cost))
        elif waiting:
            ticket, cost = waiting.pop(number % len(waiting))
            if ticket.ready_at > now:
                limit.leave(a_call(cost), ticket)
            else:
                started.append((ticket.ready_at, cost))
    started += [(ticket.ready_at, cost) for ticket, cost in waiting]
    started.sort()
    for first, (begin, _) in enumerate(started):
        total = 0
        for end, cost in started[first:]:
            total += cost
            assert total <= burst + (end - begin)


def test_the_last_ones_give_their_places_back_one_by_one():
    limit = RateLimit("1/s", wait=10)
    _, second, third = (limit.admit(a_call(), 0.0) for _ in range(3))
    limit.leave(a_call(), third)
    limit.leave(a_call(), second)
    assert limit.admit(a_call(), 0.5).ready_at == 1.0


def test_a_reservation_of_a_key_that_was_forgotten_meanwhile():
    limit = RateLimit("1/s", key=lambda user: user, max_keys=1, wait=10)
    limit.admit(a_call("a"), 0.0)
    ticket = limit.admit(a_call("a"), 0.0)
    assert admitted(limit, 50.0, "b") == 0.0  # the task of the ticket was too busy to notice
    error = limit.leave(a_call("a"), ticket)
    assert isinstance(error, RateLimited)
    assert admitted(limit, 50.0, "b") == 1.0


@BACKENDS
def test_random_cancellation_never_exceeds_the_limit(backend):
    async def main(seed):
        dice = random.Random(seed)
        limit = RateLimit("4/s", burst=2, wait=3)
        started = []

        async def work():
            started.append(anyio.current_time())

        async def caller():
            await anyio.sleep(dice.random() * 8)
            with anyio.move_on_after(dice.random() * 2):
                try:
                    await limit.acall(work)
                except RateLimited:
                    pass

        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(caller)
        return started

    for seed in range(20):
        started = run(main, seed, backend=backend)
        assert len(started) > 20
        for first, begin in enumerate(started):
            for count, end in enumerate(started[first:], 1):
                assert count <= 2 + 4 * (end - begin) + 1e-4


@BACKENDS
def test_the_timeout_around_it_ends_a_wait_that_began_in_time(backend):
    """The deadline is looked at before the wait, so only somebody else's can end it."""

    async def main():
        limit = RateLimit("1/s", wait=10)
        await limit.acall(anyio.sleep, 0)
        with anyio.move_on_after(0.5) as scope:
            await limit.acall(anyio.sleep, 0)
        assert scope.cancelled_caught
        with pytest.raises(TimedOut):
            await Pipeline(Timeout(1), limit).acall(anyio.sleep, 9)
        return anyio.current_time()

    assert run(main, backend=backend) == pytest.approx(1.5)


# -- blocks ---------------------------------------------------------------------------------------------------


def test_as_a_block():
    async def scenario(colour):
        limit = RateLimit("1/s", wait=1, name="r")
        times = []

        async def enter():
            if colour.name == "sync":
                with limit:
                    times.append(colour.now())
            else:
                async with limit:
                    times.append(colour.now())

        await enter()
        await enter()
        assert times == [0.0, 1.0]
        await enter()
        return times

    assert run_both(scenario) == [("rate_limit.queued", 0.0), ("rate_limit.queued", 1.0)]


@pytest.mark.parametrize("option", ["key", "cost"])
def test_a_block_has_no_arguments_to_ask_about(option):
    limit = RateLimit("1/s", **{option: lambda user: user})
    with (
        pytest.raises(TypeError, match=f"RateLimit: {option}= is a function of the call's arguments, and a block"),
        limit,
    ):
        raise AssertionError("never entered")


# -- threads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, lambda user: user], ids=["one", "keyed"])
def test_8_threads_never_exceed_the_limit(impatient_threads, key):
    with virtual_time() as clock:
        for trial in range(40):
            limit = RateLimit("50/s", key=key, wait=0)
            start = Barrier(8)
            admissions = []

            def hammer(limit=limit, start=start, admissions=admissions):
                start.wait()
                for _ in range(20):
                    try:
                        limit.call(admissions.append, "user")
                    except RateLimited:
                        pass

            for seconds, total in ((0, 50), (0.5, 75)):
                clock.sleep(seconds)
                threads = [Thread(target=hammer) for _ in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                assert len(admissions) == total, trial
            assert limit.statistics().rejected == 320 - 75


def test_a_forked_child_has_its_baton_back():
    limit = RateLimit("2/s")
    limit._baton.take()  # as if another thread had held it
    limit.after_fork()
    limit.call(function)
    limit._baton.take()
    with pytest.raises(IndexError):
        limit._baton.take()


# -- a model --------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """Against a bucket in fractions: it holds `level`, drains at the rate, and overflows at `burst`."""

    @initialize(
        limit=st.integers(1, 7),
        period=st.sampled_from([1, 3, 1_000_003, 60_000_000]),
        burst=st.integers(1, 5),
        wait=st.sampled_from([0, 1, 2_500_000]),
        start=st.integers(0, 10**15),
    )
    def make(self, limit, period, burst, wait, start):
        self.policy = RateLimit(
            Rate(limit, per=period / 1e6), burst=burst, wait=wait / 1e6, cost=lambda cost: cost
        )
        self.speed = Fraction(limit, period)  # per microsecond
        self.burst, self.wait = burst, wait
        self.now = start
        self.level, self.at = Fraction(0), start
        self.tickets = []

    def drain(self):
        self.level = max(Fraction(0), self.level - self.speed * (self.now - self.at))
        self.at = self.now

    @rule(pause=st.one_of(st.integers(1, 10), st.integers(1, 10**6), st.integers(1, 10**8)))
    def time_passes(self, pause):
        self.now += pause

    @rule(cost=st.integers(1, 5), times=st.integers(1, 6))
    def ask(self, cost, times):
        cost = min(cost, self.burst)
        for _ in range(times):
            self.drain()
            micros = max(Fraction(0), (self.level + cost - self.burst) / self.speed)
            whole = -(-micros.numerator // micros.denominator)
            refused = ticket = None
            try:
                ticket = self.policy.admit(a_call(cost), self.now / 1e6)
            except RateLimited as error:
                refused = error
            assert (refused is None) == (micros <= self.wait)
            if refused is not None:
                assert round(refused.retry_after * 1e6) == whole
                continue
            self.level += cost
            if ticket is None:
                assert micros == 0
                self.tickets.clear()
            else:
                assert round(ticket.ready_at * 1e6) - self.now == whole
                self.tickets.append((ticket, cost))

    @precondition(lambda self: getattr(self, "tickets", None))
    @rule()
    def the_last_one_gives_up(self):
        ticket, cost = self.tickets.pop()
        self.drain()
        self.policy.leave(a_call(cost), ticket)
        self.level = max(Fraction(0), self.level - cost)


TestRateLimit = Machine.TestCase
TestRateLimit.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


# -- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "options", "kind", "message"),
    [
        ("often", {}, ValueError, "RateLimit: rate='often' is not allowed"),
        (100, {}, TypeError, "RateLimit: rate=100 is not allowed"),
        (function, {}, TypeError, "with parentheses"),
        ("1/s", {"key": "user"}, TypeError, "key='user' is not allowed; give a function"),
        ("1/s", {"burst": 0}, ValueError, "burst=0 is not allowed"),
        ("1/s", {"wait": -1}, ValueError, "wait=-1 is not allowed"),
        ("1/s", {"cost": 0}, ValueError, "cost=0 is not allowed"),
        ("1/s", {"cost": 2}, ValueError, "cost=2 is not allowed; give an int up to burst=1"),
        ("1/s", {"cost": int}, TypeError, "cost=<class 'int'> is not allowed; give a function"),
        ("1/s", {"max_keys": 0}, ValueError, "max_keys=0 is not allowed"),
        ("1/s", {"learn": 1}, TypeError, "learn=1 is not allowed; give True or False"),
    ],
)
def test_bad_options(rate, options, kind, message):
    with pytest.raises(kind, match=message):
        RateLimit(rate, **options)


def test_an_async_key_is_refused():
    async def key(user):
        return user

    with pytest.raises(TypeError, match="a sync function"):
        RateLimit("1/s", key=key)


def test_repr_and_copies():
    limit = RateLimit("100/minute", burst=5)
    assert limit.rate == Rate(100, per=60)
    assert "100" in repr(limit)
    assert "burst=5" in repr(limit)
    for _ in range(5):
        limit.call(function)
    limit.fresh().call(function)
    with pytest.raises(RateLimited):
        limit.call(function)
    assert OVERFLOW not in limit._table.entries


@pytest.mark.parametrize("rate", ["5/s", "999/s"])  # kept as the baton itself, and in the table
def test_a_limit_without_a_key_counts_as_one_key_once_it_is_used(rate):
    with virtual_time():
        limit = RateLimit(rate)
        assert limit.statistics().keys == 0
        limit.call(str)
        assert limit.statistics().keys == 1
