"""The kinds, with policies such as users write."""

import asyncio
import threading

import anyio
import pytest

from resilient import Pipeline, Policy, Rejected, Retry, TimedOut, Timeout, deadline, runtime, testing, workers
from resilient.call import Call
from resilient.edge import Edge
from resilient.errors import ResilientError
from resilient.kinds import MISSING, Gate, Loop, Race, Scope, Stale, Value
from resilient.ticket import Ticket


class Hedge(Race):
    """Start another copy after `delay` seconds, up to `copies` of them."""

    def __init__(self, delay, *, copies=2, name=None):
        super().__init__(name=name)
        self.delay = delay
        self.copies = copies

    def next_start(self, call, started):
        return self.delay if started < self.copies else None


class Watching(Edge):
    """Remembers what it was told to release."""

    def __init__(self):
        self.discarded = []

    def discard(self, outcome):
        self.discarded.append(outcome)


def race(policy, *copies, edge=None):
    """Run copies given as (seconds, outcome) in every colour; return the results of `look` after each run."""
    found = []
    for name in ("sync", "asyncio", "trio"):
        watching = edge or Watching()
        watching.discarded.clear()
        started = []

        def copy(started=started):
            number = len(started)
            started.append(runtime.now())
            return copies[number]

        def work(copy=copy):
            seconds, outcome = copy()
            runtime.sleep(seconds)
            return finish(outcome)

        async def awork(copy=copy):
            seconds, outcome = copy()
            await runtime.asleep(seconds)
            return finish(outcome)

        async def main(watching=watching, awork=awork):
            try:
                return await policy.achain(watching)(Call(awork, (), {})), runtime.now()
            except BaseException as error:
                return error, runtime.now()

        with testing.capture_events(policy) as seen:
            if name == "sync":
                with testing.virtual_time() as clock:
                    try:
                        result = policy.chain(watching)(Call(work, (), {}))
                    except BaseException as error:
                        result = error
                    ended = clock.now()
                    clock.sleep(1000)  # the losers end
            else:
                result, ended = testing.run(main, backend=name)
        found.append((name, result, ended, started, list(watching.discarded), [event.name for event in seen]))
    return found


def finish(outcome):
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def test_a_quick_copy_runs_alone():
    for _, result, ended, started, discarded, events in race(Hedge(2), (1, "first")):
        assert (result, ended, started, discarded, events) == ("first", 1, [0], [], [])


def test_the_second_copy_starts_after_the_delay_and_the_first_result_wins():
    for name, result, ended, started, discarded, events in race(Hedge(2), (10, "first"), (3, "second")):
        assert (result, ended, started) == ("second", 5, [0, 2])
        assert events == ["race.started"]
        assert discarded == (["first"] if name == "sync" else []), "threads go on, tasks are cancelled"


def test_the_first_copy_may_win_all_the_same():
    for name, result, ended, started, discarded, _ in race(Hedge(2), (4, "first"), (9, "second")):
        assert (result, ended, started) == ("first", 4, [0, 2])
        assert discarded == (["second"] if name == "sync" else [])


def test_a_result_that_comes_too_late_is_released():
    for _, result, ended, _, discarded, _ in race(Hedge(2), (5, "first"), (3, "second")):
        assert ended == 5
        assert {result, *discarded} == {"first", "second"}


def test_a_failed_copy_starts_the_next_one_at_once():
    error = OSError("down")
    for _, result, ended, started, discarded, events in race(Hedge(60), (1, error), (1, "second")):
        assert (result, ended, started) == ("second", 2, [0, 1])
        assert discarded == [error]
        assert events == ["race.started"]


def test_all_fail_and_the_error_of_the_first_copy_is_raised():
    errors = [OSError("first"), ValueError("second"), KeyError("third")]
    copies = [(9, errors[0]), (1, errors[1]), (1, errors[2])]
    for _, result, ended, started, discarded, _ in race(Hedge(2, copies=3), *copies):
        assert (result, ended, started) == (errors[0], 9, [0, 2, 3])
        assert sorted(map(str, discarded)) == sorted(map(str, errors[1:]))


def test_the_deadline_around_a_race():
    policy = Pipeline(Timeout(5), Hedge(2), name="p")
    for _, result, ended, started, _, _ in race(policy, (60, "first"), (60, "second")):
        assert isinstance(result, TimedOut)
        assert (ended, started) == (5, [0, 2])


def test_a_published_deadline_ends_a_sync_race():
    policy = Pipeline(Timeout(5, interrupt=False), Hedge(2))
    [(_, result, ended, started, _, _), *_] = race(policy, (60, "first"), (60, "second"))
    assert isinstance(result, TimedOut)
    assert (ended, started) == (5, [0, 2])


def test_a_clock_that_stops_just_before_the_deadline(monkeypatch):
    policy = Pipeline(Timeout(5, interrupt=False), Hedge(2, copies=1))
    with testing.virtual_time() as clock:
        early = iter([False])
        monkeypatch.setattr(runtime, "wait", lambda ticket: next(early, None) or clock.wait(ticket))
        with pytest.raises(TimedOut):
            policy.call(clock.sleep, 60)
        assert clock.now() == 5


class Interrupt(BaseException):
    pass


def test_an_interrupt_of_a_copy_comes_out_as_itself():
    for number, copies in enumerate([((1, Interrupt()), (60, "late")), ((60, "late"), (1, Interrupt()))]):
        for _, result, ended, started, _, _ in race(Hedge(2), *copies):
            assert type(result) is Interrupt
            assert (ended, started) == ((1, [0]), (3, [0, 2]))[number]


def test_two_interrupts_at_once_come_out_together():
    policy = Hedge(0.0)

    async def work():
        try:
            await anyio.sleep_forever()
        finally:
            raise Interrupt

    async def main():
        with anyio.move_on_after(1):
            await policy.acall(work)

    with pytest.raises(BaseExceptionGroup) as caught:
        testing.run(main)
    assert len(caught.value.exceptions) == 2


def test_the_losers_are_cancelled():
    cancelled = []

    async def work():
        started.append(1)
        try:
            await anyio.sleep(60 if len(started) == 1 else 1)
        except BaseException as error:
            cancelled.append(type(error))
            raise

    for backend in ("asyncio", "trio"):
        started = []
        testing.run(Hedge(1).acall, work, backend=backend)
    assert [each.__name__ for each in cancelled] == ["CancelledError", "Cancelled"]


def test_cancelling_a_race_cancels_all_copies():
    ended = []

    async def work():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(1)

    async def main():
        task = asyncio.ensure_future(Hedge(1).acall(work))
        await asyncio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    testing.run(main)
    assert ended == [1, 1]


def test_abandoned_copies_are_known_to_the_call():
    with testing.virtual_time() as clock:
        seconds = iter([60, 1])
        call = Call(lambda: clock.sleep(next(seconds)), (), {})
        Hedge(1).chain(Edge())(call)
        assert [job.finished for job in call.abandoned] == [False]
        clock.sleep(100)
        assert [job.finished for job in call.abandoned] == [True]


class Slow(Watching):
    """Takes its time to release something, which only an async chain can wait for."""

    async def adiscard(self, outcome):
        await anyio.sleep(10)
        self.discard(outcome)


def test_the_losers_of_an_async_race_are_released_in_async_code():
    error = OSError("down")
    _, *found = race(Hedge(60), (1, error), (1, "second"), edge=Slow())
    for _, result, ended, _, discarded, _ in found:
        assert (result, ended, discarded) == ("second", 12, [error])


# -- one policy of each kind, as in a user's code ---------------------------------------------------------------


class TooLate(Rejected):
    pass


class OfficeHours(Gate):
    """Let calls start until `closes`, and after `waits` more seconds not even those who wait."""

    def __init__(self, closes, *, waits=False, name=None):
        super().__init__(name=name)
        self.closes = closes
        self.waits = waits

    def admit(self, call, now):
        if now < self.closes:
            return None
        if self.waits:
            return Ticket(ready_at=now + 10)
        raise TooLate("it is closed", policy=self.label)

    def leave(self, call, ticket):
        return TooLate("nobody waited", policy=self.label)


class Counting(Gate):
    """Counts how calls end."""

    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.ends = []

    def admit(self, call, now):
        return None

    def settle(self, call, error, started, now):
        self.ends.append((type(error).__name__, now - started))


class Persistent(Loop):
    """Try until the third attempt, at once."""

    def next_delay(self, attempts, error, now):
        return 0.0 if attempts.number < 3 else None


class Deadline(Scope):
    def limit(self):
        return 2.0


class Default(Value):
    def recover(self, call, error, now):
        return "default" if isinstance(error, OSError) else MISSING


class Known(Value):
    """Answers at once what it knows, and remembers how the call went if it does not."""

    def __init__(self, answer=MISSING, *, name=None):
        super().__init__(name=name)
        self.answer = answer
        self.log = []

    def lookup(self, call, now):
        return self.answer

    def store(self, call, result, now):
        self.log.append(("store", result))

    def recover(self, call, error, now):
        return MISSING

    def abandon(self, call):
        self.log.append(("abandon",))

    def refresh_failed(self, call, error, now):
        self.log.append(("refresh failed", type(error).__name__))


class Doubling(Policy):
    """Neither kind: its own closures."""

    def link(self, nxt, edge):
        return lambda call: nxt(call) * 2

    def alink(self, nxt, edge):
        async def double(call):
            return await nxt(call) * 2

        return double


def test_a_gate():
    async def scenario(colour):
        policy = OfficeHours(5)
        first = await colour.call(policy, lambda: 1)
        await colour.sleep(5)
        with pytest.raises(TooLate, match="it is closed"):
            await colour.call(policy, lambda: 2)
        return first, await colour.call(OfficeHours(0, waits=True), colour.now)

    testing.run_both(scenario)
    assert issubclass(TooLate, ResilientError)


def test_a_gate_that_settles():
    async def scenario(colour):
        policy = Counting()

        async def work(error):
            await colour.sleep(2)
            if error:
                raise error

        for error in (None, OSError(), KeyboardInterrupt()):
            try:
                await colour.call(policy, work, error)
            except BaseException:
                pass
        return policy.ends

    testing.run_both(scenario)
    policy = Counting()
    with testing.virtual_time(), policy:
        pass
    assert policy.ends == [("NoneType", 0.0)]


class Queue(Gate):
    """Lets everybody wait: `seconds`, or until somebody comes and says so if that is None."""

    def __init__(self, seconds=None, *, name=None):
        super().__init__(name=name)
        self.seconds = seconds
        self.left = []

    def admit(self, call, now):
        self.ticket = Ticket() if self.seconds is None else Ticket(ready_at=now + self.seconds)
        return self.ticket

    def leave(self, call, ticket):
        self.left.append((ticket is self.ticket, ticket.cancelled))
        return TooLate("nobody came", policy=self.label)


@pytest.mark.parametrize("seconds", [None, 100])
@pytest.mark.parametrize("around", [Timeout(5), Timeout(5, interrupt=False)], ids=["enforced", "published"])
@pytest.mark.parametrize("inside", [[Timeout(2)], []], ids=["covered", "alone"])
def test_nobody_waits_past_the_deadline_whatever_the_gate_says(seconds, around, inside):
    """The gates of this library look at the deadline by themselves; one of a user need not."""

    async def scenario(colour):
        queue = Queue(seconds)
        with pytest.raises(TimedOut) as caught:
            await colour.call(Pipeline(around, queue, *inside), lambda: 1)
        await colour.sleep(1)  # for the thread that is abandoned in the queue
        assert [mine for mine, _ in queue.left] == [True]
        return caught.value.policy

    told = testing.run_both(scenario)
    assert [each for each in told if each[0] == "timeout.expired"] == [("timeout.expired", 5.0)]


def test_a_wait_that_ends_before_the_deadline_is_as_long_as_it_is():
    async def scenario(colour):
        queue = Queue(4)
        assert await colour.call(Pipeline(Timeout(5, interrupt=False), queue), lambda: 1) == 1
        return queue.left, colour.now()

    testing.run_both(scenario)
    known = Known(granted(5))
    with testing.virtual_time():
        assert Pipeline(Timeout(5, interrupt=False), known).call(lambda: 6) == 5
        in_time = Ticket(expires_at=3)
        with pytest.raises(NotImplementedError):  # expired, and this one has nothing to give back
            Pipeline(Timeout(5, interrupt=False), Known(in_time)).call(lambda: 6)
        assert in_time.expires_at == 3


class Split(Gate):
    """Guards some edges by another gate."""

    looks_at_calls = False

    def __init__(self, other, *, name=None):
        super().__init__(name=name)
        self.other = other

    def on_edge(self, edge):
        return self.other

    def admit(self, call, now):
        raise AssertionError("the other one guards here")


def test_a_gate_may_leave_an_edge_to_another_one():
    async def scenario(colour):
        other = Counting()
        policy = Split(other)
        assert await colour.call(policy, lambda: 1) == 1
        assert await colour.call(Pipeline(policy), lambda: 2) == 2
        return other.ends

    testing.run_both(scenario)
    other = Counting()
    assert Split(other)(lambda: 3)() == 3, "alone, too"
    assert len(other.ends) == 1


class Body:
    """A result that goes on after it was returned, until somebody ends it."""

    def __init__(self):
        self.end = None


class Streaming(Edge):
    """Returns bodies, and other results that are all there."""

    streams = True

    def released(self, result):
        if isinstance(result, Unreadable):
            raise TypeError("not a result of this edge")
        return not isinstance(result, Body)

    def when_released(self, result, callback):
        if result.end is not None:
            raise RuntimeError("released twice")
        result.end = callback


class Unreadable:
    pass


class HoldingOn(Counting):
    """Counts a call as ended when its result has been released."""

    holds = True


def through(colour, policy, edge, function):
    if colour == "sync":
        return policy.chain(edge)(Call(function, (), {}))

    async def main():
        async def afunction():
            return function()

        return await policy.achain(edge)(Call(afunction, (), {}))

    return testing.run(main, backend=colour)


COLOURS = pytest.mark.parametrize("colour", ["sync", "asyncio", "trio"])


@COLOURS
def test_a_gate_that_holds_on_until_the_result_is_released(colour):
    policy, edge = HoldingOn(), Streaming()
    assert through(colour, policy, edge, lambda: "all there") == "all there"
    assert policy.ends == [("NoneType", 0.0)]
    with pytest.raises(ZeroDivisionError):
        through(colour, policy, edge, lambda: 1 / 0)
    assert [name for name, _ in policy.ends] == ["NoneType", "ZeroDivisionError"]
    policy.ends.clear()
    with testing.virtual_time(start=100) as clock:
        body = policy.chain(edge)(Call(Body, (), {})) if colour == "sync" else through(colour, policy, edge, Body)
        assert policy.ends == []
        clock.sleep(7)
        body.end(OSError("broken"))
    assert [name for name, _ in policy.ends] == ["OSError"]
    if colour == "sync":
        assert policy.ends == [("OSError", 7.0)]


@COLOURS
def test_a_gate_that_does_not_hold_on_ends_when_the_result_is_returned(colour):
    policy = Counting()
    body = through(colour, policy, Streaming(), Body)
    assert (body.end, len(policy.ends)) == (None, 1)


@COLOURS
def test_on_an_edge_that_does_not_stream_there_is_nothing_to_hold_on_to(colour):
    class Whole(Streaming):
        streams = False

    policy = HoldingOn()
    body = through(colour, policy, Whole(), Body)
    assert (body.end, len(policy.ends)) == (None, 1)


@COLOURS
def test_a_gate_that_holds_on_measures_from_after_its_wait(colour):
    class Turnstile(HoldingOn):
        def admit(self, call, now):
            return Ticket(ready_at=now + 5)

    policy = Turnstile()
    with testing.virtual_time():
        body = through(colour, policy, Streaming(), Body)
        assert through(colour, policy, Streaming(), lambda: 1) == 1
        assert policy.ends == [("NoneType", 0.0)]
        with pytest.raises(ZeroDivisionError):
            through(colour, policy, Streaming(), lambda: 1 / 0)
        assert policy.ends[1:] == [("ZeroDivisionError", 0.0)]
    assert body.end is not None


@COLOURS
def test_a_result_that_the_edge_does_not_understand_is_not_held_for_ever(colour):
    policy = HoldingOn()
    with pytest.raises(TypeError, match="not a result of this edge"):
        through(colour, policy, Streaming(), Unreadable)
    known = Body()
    known.end = print
    with pytest.raises(RuntimeError, match="released twice"):
        through(colour, policy, Streaming(), lambda: known)
    assert [name for name, _ in policy.ends] == ["TypeError", "RuntimeError"]


def test_a_gate_that_lets_nobody_wait_has_nothing_to_give_back():
    with pytest.raises(NotImplementedError):
        Gate.leave(Counting(), Call(print, (), {}), Ticket())
    with pytest.raises(NotImplementedError):
        Value.leave(Default(), Call(print, (), {}), Ticket())


def test_a_loop():
    async def scenario(colour):
        flaky = testing.flaky(OSError, OSError, 3)
        assert await colour.call(Persistent(), flaky) == 3
        with pytest.raises(ConnectionError):
            await colour.call(Persistent(), testing.flaky(ConnectionError))
        return len(flaky.calls)

    testing.run_both(scenario)
    with pytest.raises(TypeError, match="Persistent cannot guard a `with` block, because"), Persistent():
        pass


def test_a_scope():
    async def scenario(colour):
        async def work():
            await colour.sleep(60)

        policy = Deadline(name="d")
        with pytest.raises(TimedOut, match="d: not done after 2 s"):
            await colour.call(policy, work)
        return colour.now(), await colour.call(policy, lambda: 1)

    testing.run_both(scenario)


class Patient(Edge):
    """Looks at the deadline by itself, as the edges of HTTP do: by the timeouts of the socket."""

    keeps_deadlines = True


def test_an_edge_that_keeps_deadlines_needs_no_thread(monkeypatch):
    monkeypatch.setattr(workers, "start", None)
    seen = []

    def work():
        seen.append((threading.get_ident(), deadline.current().scope, deadline.remaining()))
        runtime.sleep(60)
        return "late"

    with testing.virtual_time():
        for policy in (Timeout(2), Pipeline(Timeout(9), Timeout(2))):
            assert policy.chain(Patient())(Call(work, (), {})) == "late", "nobody but the edge ends it"
        assert deadline.current() is None
        with pytest.raises(ZeroDivisionError):
            Timeout(2).chain(Patient())(Call(lambda: 1 / 0, (), {}))
        assert deadline.current() is None
    assert [thread for thread, _, _ in seen] == [threading.get_ident()] * 2
    assert [(scope.seconds, left) for _, scope, left in seen] == [(2, 2), (2, 2)]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_edge_that_keeps_deadlines_is_cancelled_all_the_same_in_async_code(backend):
    async def main():
        with pytest.raises(TimedOut):
            await Timeout(2).achain(Patient())(Call(anyio.sleep, (60,), {}))
        return runtime.now()

    assert testing.run(main, backend=backend) == 2


def test_a_value():
    async def scenario(colour):
        flaky = testing.flaky(OSError, 7, LookupError)
        assert await colour.call(Default(), flaky) == "default"
        assert await colour.call(Default(), flaky) == 7
        with pytest.raises(LookupError):
            await colour.call(Default(), flaky)

    testing.run_both(scenario)


def granted(value=None, error=None):
    ticket = Ticket()
    ticket.value, ticket.error = value, error
    ticket.grant()
    return ticket


def test_a_value_that_looks_first():
    async def scenario(colour):
        known, unknown = Known(3), Known()
        assert await colour.call(known, lambda: 4) == 3
        assert await colour.call(unknown, lambda: 4) == 4
        with pytest.raises(ConnectionError):
            await colour.call(unknown, testing.flaky(ConnectionError))
        with pytest.raises(KeyboardInterrupt):
            await colour.call(unknown, testing.flaky(KeyboardInterrupt))
        return known.log, unknown.log

    testing.run_both(scenario)


def test_a_value_that_hands_out_tickets():
    async def scenario(colour):
        assert await colour.call(Known(granted(5)), lambda: 6) == 5
        assert await colour.call(Known(granted(MISSING)), lambda: 6) == 6
        with pytest.raises(ConnectionError):
            await colour.call(Known(granted(error=ConnectionError())), lambda: 6)

    testing.run_both(scenario)


def test_a_value_that_serves_what_is_stale():
    async def scenario(colour):
        logs = []
        for outcome in (8, OSError()):
            policy = Known(Stale("old"))
            assert await colour.call(policy, testing.flaky(outcome)) == "old"
            await colour.sleep(1)
            logs.append(policy.log)
        return logs

    testing.run_both(scenario)


def test_no_thread_for_a_refresh(monkeypatch):
    def no_more(function, name):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(runtime, "start_thread", no_more)
    policy = Known(Stale("old"))
    assert policy.call(lambda: 1) == "old"
    assert policy.log == [("refresh failed", "RuntimeError")]


def test_an_interrupted_refresh_is_abandoned():
    policy = Known(Stale("old"))

    async def main():
        async def work():
            await asyncio.sleep(60)

        assert await policy.acall(work) == "old"
        await asyncio.sleep(1)
        for task in runtime._tasks:
            task.cancel()
        await asyncio.sleep(1)

    testing.run(main)
    assert ("abandon",) in policy.log

    def interrupted():
        raise KeyboardInterrupt

    policy = Known(Stale("old"))
    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "start_thread", lambda function, name: started.append(function))
        assert policy.call(interrupted) == "old"
        with pytest.raises(KeyboardInterrupt):
            started[0]()
    assert policy.log == [("abandon",)]


def test_a_policy_of_its_own_kind():
    async def scenario(colour):
        return await colour.call(Doubling() | Retry(on=OSError, wait=1), testing.flaky(OSError, 4))

    assert testing.run_both(scenario) == [("retry.scheduled", 0.0)]
    assert Doubling().call(lambda: 4) == 8
    with pytest.raises(TypeError, match="Doubling cannot guard a `with` block"), Doubling():
        pass
    assert Doubling().statistics() is None
    assert Doubling().idle(0.0)


def test_missing_shows_itself():
    assert repr(MISSING) == "MISSING"
