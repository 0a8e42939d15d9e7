"""The queue of the bulkhead in the order of priority, and full queues that make room for what matters more."""

import asyncio
import contextvars
import random
from collections import Counter
from itertools import pairwise
from threading import Event, Thread

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interleave import explore

from resilient import Bulkhead, BulkheadFull, Pipeline, Priority, Rejected, TimedOut, Timeout, priority, runtime
from resilient.call import Call
from resilient.policies.bulkhead import BulkheadStatistics
from resilient.testing import capture_events, run, run_both, virtual_time

LOW, NORMAL, HIGH, CRITICAL = Priority
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def a_call():
    return Call(print, (), {})


def ask(bulkhead, level, now=0.0):
    """Ask for a permit by the hook, with some priority."""
    with priority.of(level):
        return bulkhead.admit(a_call(), now)


def taken(queue):
    bulkhead = Bulkhead(1, queue=queue, name="b")
    assert bulkhead.admit(a_call(), 0.0) is None
    return bulkhead


def serve(bulkhead, tickets):
    """Give the permit back again and again; return the names of the tickets in the order of their grants."""
    order = []
    for _ in range(len(tickets)):
        bulkhead.settle(a_call(), None, 0.0, 0.0)
        order += [name for name, ticket in tickets.items() if ticket.granted and name not in order]
    return order


# -- the order ----------------------------------------------------------------------------------------------------


def test_higher_priorities_come_first_and_equal_ones_in_the_order_of_arrival():
    with virtual_time():
        bulkhead = taken(queue=20)
        dice = random.Random(1)
        arrivals = [(dice.choice(list(Priority)), number) for number in range(20)]
        tickets = {arrival: ask(bulkhead, arrival[0]) for arrival in arrivals}
        assert serve(bulkhead, tickets) == sorted(arrivals, key=lambda arrival: (-arrival[0], arrival[1]))
        bulkhead.settle(a_call(), None, 0.0, 0.0)
        assert bulkhead.statistics() == BulkheadStatistics(in_use=0, queued=0, rejected=0)


def test_in_all_colours():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=9, name="b")
        order = []

        async def work(name):
            order.append(name)
            await colour.sleep(1)

        def caller(number, level):
            async def call():
                await colour.sleep(number / 16)
                with priority.of(level):
                    await colour.call(bulkhead, work, f"{level.name} {number}")

            return call

        await colour.gather(*(caller(*each) for each in enumerate([NORMAL, LOW, NORMAL, HIGH, LOW, HIGH])))
        return order

    order = []

    async def noted(colour):
        order[:] = await scenario(colour)
        return tuple(order)

    assert len(run_both(noted)) == 5
    assert order == ["NORMAL 0", "HIGH 3", "HIGH 5", "NORMAL 2", "LOW 1", "LOW 4"]


def test_the_event_says_the_place_in_the_queue():
    with virtual_time():
        bulkhead = taken(queue=9)
        with capture_events(bulkhead) as seen:
            for level in (NORMAL, NORMAL, LOW, HIGH, CRITICAL, NORMAL):
                ask(bulkhead, level)
        assert [event.position for event in seen] == [1, 2, 3, 1, 1, 5]


# -- displacement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waiting", "newcomer", "victim"),
    [
        ([LOW], NORMAL, 0),
        ([LOW, LOW], HIGH, 1),
        ([HIGH, LOW, NORMAL, LOW], NORMAL, 3),
        ([HIGH, NORMAL], CRITICAL, 1),
        ([LOW, NORMAL], LOW, None),
        ([NORMAL, NORMAL], NORMAL, None),
        ([CRITICAL], CRITICAL, None),
        ([HIGH, HIGH], NORMAL, None),
        ([], CRITICAL, None),
    ],
)
def test_who_is_displaced_from_a_full_queue(waiting, newcomer, victim):
    with virtual_time():
        bulkhead = taken(queue=len(waiting))
        tickets = [ask(bulkhead, level) for level in waiting]
        with capture_events(bulkhead) as seen:
            if victim is None:
                with pytest.raises(BulkheadFull, match="all 1 permits are taken"):
                    ask(bulkhead, newcomer)
            else:
                tickets.append(ask(bulkhead, newcomer))
        assert seen[0].reason == ("full" if victim is None else "displaced")
        gone = [] if victim is None else [tickets.pop(victim)]
        for ticket in gone:
            assert ticket.granted
            assert isinstance(ticket.error, BulkheadFull)
            assert ticket.error.policy == "b"
        assert not any(ticket.granted for ticket in tickets)
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=len(waiting), rejected=1)


def test_who_has_no_time_to_wait_displaces_nobody():
    with virtual_time() as clock:
        bulkhead = taken(queue=1)
        low = ask(bulkhead, LOW)

        def late():
            clock.sleep(2)
            with priority.of(HIGH):
                bulkhead.call(print)

        with pytest.raises(BulkheadFull):
            Timeout(1, interrupt=False).call(late)
        assert not low.granted
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=1, rejected=1)


def test_the_displaced_are_refused_at_once_in_all_colours():
    async def scenario(colour):
        bulkhead = Bulkhead(1, queue=1, name="b")
        log = []

        async def work(name):
            await colour.sleep(2)
            log.append((name, colour.now()))

        def caller(after, level):
            async def call():
                await colour.sleep(after)
                with priority.of(level):
                    try:
                        await colour.call(bulkhead, work, level.name)
                    except BulkheadFull as error:
                        log.append((str(error), error.retry_after, colour.now()))

            return call

        await colour.gather(caller(0, NORMAL), caller(0.5, LOW), caller(1, HIGH))
        return log, bulkhead.statistics()

    seen = []

    async def noted(colour):
        seen[:] = await scenario(colour)
        return tuple(seen[0]), seen[1]

    trace = run_both(noted)
    assert seen[0] == [
        ("b: a call of a higher priority took the place", None, 1.0),
        ("NORMAL", 2.0),
        ("HIGH", 4.0),
    ]
    assert seen[1] == BulkheadStatistics(in_use=0, queued=0, rejected=1)
    assert sorted(trace) == [
        ("bulkhead.queued", 0.5),
        ("bulkhead.queued", 1.0),
        ("bulkhead.rejected", 1.0),
    ]


@BACKENDS
def test_cancelled_just_as_it_was_displaced_it_releases_no_permit(backend):
    async def main():
        bulkhead = taken(queue=1)
        scope = anyio.CancelScope()

        async def unlucky():
            with scope, priority.of(LOW):
                await bulkhead.acall(anyio.sleep, 0)

        async with anyio.create_task_group() as group:
            group.start_soon(unlucky)
            await anyio.sleep(0.125)
            scope.cancel()
            high = ask(bulkhead, HIGH, runtime.now())
            assert not high.granted
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=1, rejected=1)
        bulkhead.settle(a_call(), None, 0.0, 0.0)
        assert high.granted
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=1)

    run(main, backend=backend)


@pytest.mark.parametrize("cancelled", [True, False])
def test_giving_up_just_as_it_was_displaced_is_refused_once(cancelled):
    with virtual_time():
        bulkhead = taken(queue=1)
        low = ask(bulkhead, LOW)
        ask(bulkhead, HIGH)
        low.cancelled = cancelled
        assert bulkhead.leave(a_call(), low) is low.error
        assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=1, rejected=1)


def test_one_whose_event_loop_has_ended_makes_room_too():
    with virtual_time():
        bulkhead = taken(queue=1)

        def closed():
            raise RuntimeError("the event loop is closed")

        ask(bulkhead, LOW).attach(closed)
        high = ask(bulkhead, HIGH)
        assert bulkhead.statistics().queued == 1
        bulkhead.settle(a_call(), None, 0.0, 0.0)
        assert high.granted


def test_a_thread_that_waits_is_displaced_by_a_task():
    bulkhead = Bulkhead(1, queue=1)
    assert bulkhead.admit(a_call(), runtime.now()) is None
    queued, refused = Event(), []

    def wait():
        try:
            with priority.of(LOW):
                bulkhead.call(print)
        except BulkheadFull as error:
            refused.append(error)

    async def displace():
        with priority.of(HIGH), anyio.move_on_after(0):
            await bulkhead.acall(anyio.sleep, 0)

    with bulkhead.listen(lambda event: queued.set()):
        thread = Thread(target=wait)
        thread.start()
        assert queued.wait(60)
    asyncio.run(displace())
    thread.join(60)
    assert len(refused) == 1
    assert bulkhead.statistics() == BulkheadStatistics(in_use=1, queued=0, rejected=1)


# -- overload -----------------------------------------------------------------------------------------------------

MIX = {LOW: 0.4, NORMAL: 0.3, HIGH: 0.25, CRITICAL: 0.05}


@pytest.mark.parametrize("seed", range(3))
def test_under_twice_the_load_the_high_ones_are_served_and_the_low_ones_refused(seed):
    asked, served = Counter(), Counter()
    dice = random.Random(seed)

    async def main():
        bulkhead = Bulkhead(10, queue=50)  # 100 calls a second; 200 come
        guard = Pipeline(Timeout(2), bulkhead)

        async def caller(level):
            asked[level] += 1
            try:
                await guard.acall(asyncio.sleep, dice.expovariate(10))
            except (Rejected, TimedOut):
                return
            served[level] += 1

        async with asyncio.TaskGroup() as group:
            for level in dice.choices(list(MIX), list(MIX.values()), k=4_000):
                context = contextvars.copy_context()
                context.run(priority._current.set, level)
                group.create_task(caller(level), context=context)
                await asyncio.sleep(dice.expovariate(200))

    run(main)
    share = {level: served[level] / asked[level] for level in Priority}
    assert share[HIGH] >= 0.99
    assert share[CRITICAL] >= 0.99
    assert all(lower <= higher for lower, higher in pairwise(share.values()))
    assert share[LOW] < 0.25
    assert sum(served.values()) >= 0.95 * 4_000 / 2  # the capacity is used


# -- every interleaving -------------------------------------------------------------------------------------------


class Levelled(Bulkhead):
    """Finds the priority among the arguments, as all coroutines of a run share one context."""

    def admit(self, call, now):
        with priority.of(call.args[-1]):
            return super().admit(call, now)


def priority_scenario(policy):
    """Callers of three priorities: never over the limit, no permit or ticket lost."""
    limit = policy.limit

    async def hold(world, inside, level):
        inside[0] += 1
        assert inside[0] <= limit, f"{inside[0]} calls at once, limit {limit}"
        try:
            if world.draw(2):
                await world.asleep(1.0)
            else:
                await world.pause()
        finally:
            inside[0] -= 1

    chain = policy.achain_of_functions

    def setup(world):
        inside = [0]

        async def caller(level):
            try:
                await chain(Call(hold, (world, inside, level), {}))
            except BulkheadFull as error:
                if error.reason.startswith("a call of"):
                    assert level < HIGH, "one of the highest was displaced"

        for level in (LOW, HIGH, NORMAL, LOW, HIGH):
            world.spawn(caller(level))

        def check():
            assert len(set(world.woken)) == len(world.woken), "somebody was called twice"
            assert len(policy._permits) == limit, f"{limit - len(policy._permits)} permits are lost"
            assert not policy._waiting, "tickets are left in the queue"

        return check

    return setup


RUNS = 10_000


def test_in_every_order():
    assert explore(priority_scenario(Levelled(1, queue=2)), runs=RUNS) == RUNS
    assert explore(priority_scenario(Levelled(1, queue=1, wait=1.5)), runs=RUNS) == RUNS
    assert explore(priority_scenario(Levelled(2, queue=2)), runs=RUNS) == RUNS


class ReleasesForTheDisplaced(Levelled):
    def leave(self, call, ticket):
        ticket.error = None
        return super().leave(call, ticket)


class LosesTheDisplaced(Levelled):
    def _queue_up(self, now):
        if self._waiting and len(self._waiting) >= self.queue:
            self._waiting.pop()
        return super()._queue_up(now)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [(ReleasesForTheDisplaced, "calls at once|permits are lost"), (LosesTheDisplaced, "wait for ever")],
)
def test_broken_ones_are_found(broken, complaint):
    with pytest.raises(AssertionError, match=complaint):
        explore(priority_scenario(broken(1, queue=2)), runs=2_000)


# -- a model ------------------------------------------------------------------------------------------------------


class Machine(RuleBasedStateMachine):
    """The hooks against two lists: who runs, and who waits, sorted anew each time."""

    def __init__(self):
        super().__init__()
        self.time = virtual_time()
        self.clock = self.time.__enter__()
        self.running, self.waiting, self.displaced = [], [], []
        self.arrivals = 0

    def teardown(self):
        self.time.__exit__(None, None, None)

    @initialize(limit=st.integers(1, 3), queue=st.integers(0, 4))
    def make(self, limit, queue):
        self.limit, self.queue = limit, queue
        self.bulkhead = Bulkhead(limit, queue=queue)
        self.rejected = 0

    @rule(level=st.sampled_from(Priority))
    def ask(self, level):
        self.arrivals += 1
        entry = (-level, self.arrivals)
        try:
            ticket = ask(self.bulkhead, level)
        except BulkheadFull:
            assert len(self.running) == self.limit
            assert len(self.waiting) == self.queue
            assert not self.waiting or max(self.waiting)[0] <= -level
            self.rejected += 1
            return
        if ticket is None:
            assert len(self.running) < self.limit
            self.running.append(a_call())
            return
        assert len(self.running) == self.limit
        if len(self.waiting) == self.queue:
            last = max(self.waiting)
            assert last[0] > -level
            assert last[2].granted
            assert isinstance(last[2].error, BulkheadFull)
            self.waiting.remove(last)
            self.displaced.append(last[2])
            self.rejected += 1
        self.waiting.append((*entry, ticket))

    def one_comes_in(self):
        if self.waiting:
            first = min(self.waiting)
            self.waiting.remove(first)
            assert first[2].granted
            assert first[2].error is None
            self.running.append(a_call())

    @precondition(lambda self: self.running)
    @rule()
    def end(self):
        self.bulkhead.settle(self.running.pop(), None, self.clock.now(), self.clock.now())
        self.one_comes_in()

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 100))
    def give_up_waiting(self, which):
        *_, ticket = self.waiting.pop(which % len(self.waiting))
        assert isinstance(self.bulkhead.leave(a_call(), ticket), BulkheadFull)
        self.rejected += 1

    @precondition(lambda self: self.running and self.waiting)
    @rule()
    def give_up_just_as_it_is_granted(self):
        *_, ticket = min(self.waiting)
        self.end()
        self.bulkhead.leave(self.running.pop(), ticket)
        self.rejected += 1
        self.one_comes_in()

    @precondition(lambda self: self.displaced)
    @rule(cancelled=st.booleans())
    def give_up_just_as_it_is_displaced(self, cancelled):
        ticket = self.displaced.pop()
        ticket.cancelled = cancelled
        assert self.bulkhead.leave(a_call(), ticket) is ticket.error

    @invariant()
    def they_agree(self):
        if hasattr(self, "bulkhead"):
            assert self.bulkhead.statistics() == BulkheadStatistics(
                in_use=len(self.running), queued=len(self.waiting), rejected=self.rejected
            )
            assert not any(ticket.granted for *_, ticket in self.waiting)


TestPriorities = Machine.TestCase
TestPriorities.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
