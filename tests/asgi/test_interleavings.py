"""Requests that are cancelled at each of their awaits, and requests that get in each other's way.

In the first part one request is cancelled at its first await, in a new run at its second one, and so on until it
gets through. In the others, a seed decides who goes on, who fails, who goes away and who is cancelled.
"""

import asyncio
import random
from dataclasses import dataclass, field
from types import coroutine
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from interleave import explore

from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    Fallback,
    Pipeline,
    Priority,
    RateLimit,
    Retry,
    Timeout,
    deadline,
    priority,
    runtime,
)
from resilient.asgi import ResilienceMiddleware
from resilient.asgi.drain import Drain
from resilient.errors import TimedOut
from resilient.testing import run

from .driver import Connection, scope_of

ORDERS = 3000
SEEDS = 150

# -- cancelled at each await ----------------------------------------------------------------------------------


@coroutine
def stepped(steps, at, cancel):
    """Await a coroutine, and cancel at one of its awaits, counted from 1; return how many there were."""
    awaits, value, error = 0, None, None
    while True:
        try:
            awaited = steps.send(value) if error is None else steps.throw(error)
        except StopIteration:
            return awaits
        awaits += 1
        if awaits == at:
            cancel()
        try:
            value, error = (yield awaited), None
        except BaseException as thrown:
            value, error = None, thrown


class Slow(Connection):
    """A connection with an await wherever there can be one."""

    async def receive(self):
        await anyio.lowlevel.checkpoint()
        return await super().receive()


class App:
    """An application with many awaits, that answers by these statuses one after another, the last one for ever.

    Args:
        statuses: The statuses; None answers nothing until it is cancelled.
        cleans_up: Whether it awaits something when it is cancelled.

    Attributes:
        began: When its runs began.
    """

    def __init__(self, *statuses, cleans_up=False):
        self.statuses = list(statuses)
        self.cleans_up = cleans_up
        self.inside = 0
        self.began = []

    async def __call__(self, scope, receive, send):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        self.inside += 1
        self.began.append(runtime.now())
        try:
            while (await receive())["more_body"]:
                pass
            if status is None:
                await anyio.sleep(100)
            await anyio.lowlevel.checkpoint()
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await anyio.lowlevel.checkpoint()
            await send({"type": "http.response.body", "body": b"b", "more_body": False})
            await anyio.sleep(1)  # in the background
            await anyio.lowlevel.checkpoint()
        except BaseException:
            if self.cleans_up:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(1)
                    await anyio.lowlevel.checkpoint()
            raise
        finally:
            self.inside -= 1


async def other(scope, receive, send):
    await send({"type": "http.response.start", "status": 203, "headers": []})
    await send({"type": "http.response.body", "body": b"o", "more_body": True})
    await send({"type": "http.response.body", "body": b"ther"})


@dataclass
class Case:
    """What is cancelled.

    Attributes:
        policies: The policies around the application.
        app: The application.
        options: Those of the middleware.
        status: That of a request afterwards, when all is well.
        before: What happens before, given the middleware.
        after: What has to be so at the end.
        patience: For how many seconds requests may have to wait afterwards.
        method: The method of its requests.
    """

    policies: Any
    app: App = field(default_factory=lambda: App(200))
    options: dict = field(default_factory=dict)
    status: int = 200
    before: Any = None
    after: Any = None
    patience: float = 50
    method: str = "PUT"

    def __post_init__(self):
        self.middleware = ResilienceMiddleware(self.app, pipeline=Pipeline(*self.policies), **self.options)


async def request(case):
    connection = Slow(b"1", b"2")
    await case.middleware(scope_of(method=case.method), connection.receive, connection.send)
    return connection.answer


async def first(case, group):
    await request(case)


def queued():
    """Another request has the only permit, and gives it back in the end."""

    async def hold(case, group):
        group.start_soon(request, case)
        await anyio.wait_all_tasks_blocked()

    return Case([Bulkhead(1, queue=1)], App(200, cleans_up=True), before=hold)


def waiting():
    """The limit has nothing left for an hour."""

    async def in_turn(case):
        assert case.app.began == [3600 * turn for turn in range(len(case.app.began))], "a turn is lost"

    return Case([RateLimit("1/hour", wait=10_000)], before=first, after=in_turn, patience=10_000)


def half_open():
    """The request is the only probe that is let through."""

    async def fail(case, group):
        await request(case)
        assert breaker.statistics().state == "open"
        await anyio.sleep(5)

    async def closed(case):
        assert (breaker.statistics().state, breaker.statistics().opened) == ("closed", 1)

    breaker = CircuitBreaker(consecutive=1, open_for=5, jitter=0, probes=1)
    return Case([breaker], App(500, 200), before=fail, after=closed)


def counted():
    """A breaker sees what was answered, and no cancellation."""

    async def unharmed(case):
        statistics = breaker.statistics()
        assert (statistics.state, statistics.failures) == ("closed", 0)

    breaker = CircuitBreaker(consecutive=1)
    return Case([breaker, Timeout(50)], after=unharmed)


def stored():
    """Nothing but a whole response gets into the cache."""
    return Case([Cache(1000)], method="GET")


def everything():
    return Case(
        [
            Timeout(50),
            RateLimit("10/second"),
            Fallback(other),
            Cache(60),
            Bulkhead(1, queue=1),
            CircuitBreaker(),
            Retry(wait=1),
            Timeout(20),
        ],
        App(503, 200, cleans_up=True),
        {
            "drain": Drain(),
            "priority": {"/": Priority.HIGH},
            "cancel_on_disconnect": True,
            "deadline_header": "x-timeout",
        },
    )


CASES = {
    "queue": queued,
    "limit": waiting,
    "half open": half_open,
    "breaker": counted,
    "cache": stored,
    "timeout": lambda: Case([Timeout(50)]),
    "timeouts": lambda: Case([Timeout(50), Bulkhead(1), Timeout(40), Timeout(40)]),
    "timed out": lambda: Case([Bulkhead(1), Timeout(2)], App(None, 200)),
    "timed out, cleans up": lambda: Case([Bulkhead(1), Timeout(2)], App(None, 200, cleans_up=True)),
    "timed out, again": lambda: Case([Bulkhead(1), Retry(wait=1), Timeout(2)], App(None, 200, cleans_up=True)),
    "retry": lambda: Case([Retry(wait=1)], App(503, 200)),
    "fallback": lambda: Case([Bulkhead(1), Fallback(other)], App(500), status=203),
    "refusal": lambda: Case([Fallback(other, on=OSError), RateLimit("1/day")], status=429, before=first),
    "failure": lambda: Case([Bulkhead(1), Fallback(other, on=OSError)], App(500), status=500),
    "drain": lambda: Case([], options={"drain": Drain()}),
    "priority": lambda: Case([Bulkhead(1)], options={"priority": {"/": Priority.HIGH}}),
    "listener": lambda: Case([Bulkhead(1), Timeout(50)], options={"cancel_on_disconnect": True}),
    "listener, no body": lambda: Case([Timeout(50)], options={"cancel_on_disconnect": True}, method="GET"),
    "everything": everything,
}


async def cancelled_at(at, case, *, by_task):
    """Make a request that is cancelled at one await; return what it sent, how it ended, and its awaits."""
    connection = Slow(b"1", b"2")
    ended, awaits = None, 0

    async def inside(cancel):
        nonlocal ended, awaits
        before = deadline.current(), priority.current()
        try:
            awaits = await stepped(
                case.middleware(scope_of(method=case.method), connection.receive, connection.send), at, cancel
            )
        except BaseException as error:
            ended = error
            raise
        finally:
            assert (deadline.current(), priority.current()) == before

    if by_task:
        task = asyncio.ensure_future(inside(lambda: asyncio.current_task().cancel()))
        await asyncio.wait([task])
        assert task.cancelled() == (ended is not None)
    else:
        with anyio.CancelScope() as scope:
            await inside(scope.cancel)
        assert scope.cancelled_caught == (ended is not None)
        await anyio.sleep(200)  # no timer has been left that would cancel this task
    assert ended is None or isinstance(ended, anyio.get_cancelled_exc_class())
    return connection.answer, ended, awaits


@pytest.mark.parametrize(("backend", "by_task"), [("asyncio", True), ("asyncio", False), ("trio", False)])
@pytest.mark.parametrize("name", CASES)
def test_a_request_may_be_cancelled_at_each_await(name, backend, by_task):
    async def scenario(at):
        case = CASES[name]()
        async with anyio.create_task_group() as group:
            if case.before is not None:
                await case.before(case, group)
            answer, ended, awaits = await cancelled_at(at, case, by_task=by_task)
        assert case.app.inside == 0
        assert_released(case)
        await anyio.sleep(100)
        with anyio.fail_after(case.patience):
            while (after := await request(case)).status == 503 and None in case.app.statuses:
                pass  # this one times out as well
        assert after.whole
        assert after.status == case.status
        assert_released(case)
        if case.after is not None:
            await case.after(case)
        sent = [(message["type"], message.get("status"), message.get("body")) for message in answer.messages]
        return sent, ended is not None, awaits

    whole, _cancelled, _awaits = run(scenario, 0, backend=backend)
    assert [kind for kind, *_rest in whole].count("http.response.start") == 1
    at, was_cancelled = 0, True
    while was_cancelled:
        at += 1
        messages, was_cancelled, awaits = run(scenario, at, backend=backend)  # trio may take one await less
        assert was_cancelled or awaits < at, f"cancellation at await {at} of {awaits} got lost"
        assert messages == whole[: len(messages)], f"cancelled at await {at} it sent something else"
    assert at > 2


def assert_released(case):
    for policy in case.middleware.pipeline.walk():
        if isinstance(policy, Bulkhead):
            assert (policy.statistics().in_use, policy.statistics().queued) == (0, 0)
    if case.middleware.drain is not None:
        assert case.middleware.drain.statistics().in_flight == 0


# -- in every order, without time -----------------------------------------------------------------------------


class Gone(OSError):
    """The client has gone."""


class Client:
    """A client of one run of the interleaver, who may go away at any time."""

    def __init__(self, world):
        self.world = world
        self.messages = []
        self.told = True  # until the middleware returns as if all were well

    async def receive(self):
        await self.world.pause()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message):
        await self.world.pause()
        if self.world.draw(20) == 0:
            raise Gone
        self.messages.append(message)

    async def ask(self, middleware):
        await middleware(scope_of(), self.receive, self.send)
        self.told = False

    def check(self, bodies):
        """Check that what came is whole, or visibly not so."""
        kinds = [message["type"].removeprefix("http.response.") for message in self.messages]
        assert kinds == ["start", "body", "body"][: len(kinds)] or kinds == ["start", "body"], kinds
        whole = len(kinds) > 1 and not self.messages[-1].get("more_body", False)
        assert whole or self.told, "it was cut off, and the server is not told"
        if whole:
            content = b"".join(message.get("body", b"") for message in self.messages[1:])
            assert content in bodies[self.messages[0]["status"]], f"{self.messages} is taken for whole"


BODIES = {200: [b"ab"], 500: [b"ab"], 503: [b"ab"], 203: [b"other"]}


def crowd(world):
    """Requests under everything that needs no event loop."""
    bulkhead, limit = Bulkhead(2, queue=1, wait=3), RateLimit("4/second", wait=1)
    drain = Drain(grace=2, timeout=5)
    policies = [Fallback(other, on={500, 429, ConnectionError}), limit, bulkhead]
    policies += [CircuitBreaker(consecutive=3, open_for=1), Retry(2, wait=1)]
    inside = [0]

    async def app(scope, receive, send):
        inside[0] += 1
        assert inside[0] <= 2, "more at the same time than there are permits"
        try:
            await receive()
            if world.draw(2):
                await world.asleep(float(world.draw(3)))
            manner = world.draw(12)
            if manner == 0:
                raise ConnectionError
            status = {1: 500, 2: 503, 3: 503}.get(manner, 200)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            if manner == 4:
                raise RuntimeError
            await world.pause()
            await send({"type": "http.response.body", "body": b"b"})
            await world.pause()
            if manner == 5:
                raise RuntimeError
        finally:
            inside[0] -= 1

    middleware = ResilienceMiddleware(app, pipeline=Pipeline(*policies), drain=drain, on_rejected=says_other)
    clients = [Client(world) for _ in range(3 + world.draw(3))]
    for client in clients:
        world.spawn(client.ask(middleware), RuntimeError, OSError)

    async def end():
        await world.asleep(float(world.draw(4)))
        drain.begin()

    if world.draw(2):
        world.spawn(end())

    def check():
        for client in clients:
            client.check(BODIES)
        assert inside == [0]
        assert (bulkhead.statistics().in_use, bulkhead.statistics().queued) == (0, 0)
        assert drain.statistics().in_flight == 0

    return check


def says_other(scope, refusal):
    return other


def test_requests_in_every_order():
    assert explore(crowd, runs=ORDERS) == ORDERS


# -- at the same time, on real event loops --------------------------------------------------------------------


class Visitor(Connection):
    """A client who may go away, and whose request may be cancelled; all times are whole seconds, so they meet.

    Args:
        chance: Where the choices come from.
    """

    def __init__(self, chance):
        super().__init__(b"1", b"2", gone=anyio.Event())
        self.comes, self.goes, self.is_cancelled = chance.randrange(4), chance.randrange(12), chance.randrange(12)
        self.works = [chance.randrange(4) for _ in range(4)]
        self.status = chance.choice([200, 200, 503, None])
        self.scope = scope_of("/", method=chance.choice(["GET", "PUT"]))
        self.error = None

    async def visit(self, middleware, group):
        await anyio.sleep(self.comes)
        group.start_soon(self.leave)
        with anyio.CancelScope() as self.request:
            group.start_soon(self.cancel, self.request)
            try:
                await middleware(self.scope, self.receive, self.send)
            except BaseException as error:
                self.error = error
                if not isinstance(error, TimedOut | RuntimeError):
                    raise

    async def leave(self):
        await anyio.sleep(self.goes)
        if self.goes < 8:
            self.gone.set()

    async def cancel(self, scope):
        await anyio.sleep(self.is_cancelled)
        if self.is_cancelled < 6:
            scope.cancel()


@pytest.mark.parametrize("watch", [False, True])
def test_requests_at_the_same_time(backend, watch):
    async def scenario(seed):
        chance = random.Random(seed)
        bulkhead, drain, inside = Bulkhead(2, queue=2, wait=4), Drain(), [0]
        others = [
            Timeout(chance.randrange(3, 9)),
            Timeout(chance.randrange(1, 5)),
            Timeout(chance.randrange(1, 5), interrupt=False),
            RateLimit("2/second", wait=2),
            CircuitBreaker(consecutive=3, open_for=1, jitter=0),
            Retry(wait=1),
            Fallback(other),
            Cache(2, stale=chance.randrange(9)),
        ]
        policies = [bulkhead, *chance.sample(others, chance.randrange(len(others)))]
        chance.shuffle(policies)

        async def app(scope, receive, send):
            visitor = scope["visitor"]
            inside[0] += 1
            assert inside[0] <= 2
            try:
                while (await receive()).get("more_body"):
                    pass
                await anyio.sleep(visitor.works[0])
                if visitor.status is None:
                    raise RuntimeError
                await send({"type": "http.response.start", "status": visitor.status, "headers": []})
                await anyio.sleep(visitor.works[1])
                await send({"type": "http.response.body", "body": b"a", "more_body": True})
                await anyio.sleep(visitor.works[2])
                await send({"type": "http.response.body", "body": b"b"})
                await anyio.sleep(visitor.works[3])
            finally:
                inside[0] -= 1

        middleware = ResilienceMiddleware(
            app, pipeline=Pipeline(*policies), drain=drain, cancel_on_disconnect=watch, on_rejected=says_other
        )
        visitors = [Visitor(chance) for _ in range(chance.randrange(3, 6))]
        with anyio.fail_after(1000):
            async with anyio.create_task_group() as group:
                for visitor in visitors:
                    visitor.scope["visitor"] = visitor
                    group.start_soon(visitor.visit, middleware, group)
        assert inside == [0]
        assert (bulkhead.statistics().in_use, bulkhead.statistics().queued) == (0, 0)
        assert drain.statistics().in_flight == 0
        for visitor in visitors:
            answer = visitor.answer
            if answer.messages and answer.whole:
                assert answer.body in BODIES[answer.status]
                assert not isinstance(visitor.error, TimedOut), "its time was up although it was answered"
            else:
                left = visitor.gone.is_set() and watch
                assert visitor.error is not None or left, "it was cut off, and the server is not told"
            assert answer.types.count("start") == bool(answer.messages)

    for seed in range(SEEDS):
        try:
            run(scenario, seed, backend=backend, seed=seed)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("ends", [(1, 2), (2, 1), (1, 1), (3, 1, 2), (2, 3, 1)])
def test_responses_are_complete_in_another_order_than_requests_end(backend, ends):
    async def app(scope, receive, send):
        await other(scope, receive, send)
        await anyio.sleep(scope["ends"])

    async def scenario():
        middleware = ResilienceMiddleware(app, pipeline=Timeout(10))
        async with anyio.create_task_group() as group:
            for seconds in ends:
                connection = Connection()
                group.start_soon(middleware, scope_of(ends=seconds), connection.receive, connection.send)
        await anyio.sleep(100)
        return [*middleware.pipeline._queues.last.pending] if backend == "asyncio" else []

    assert run(scenario, backend=backend) == []


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_has_not_come_to_the_application_may_be_run_again(backend, method):
    async def scenario():
        bulkhead = Bulkhead(1, queue=1)
        retry = Retry(on=BulkheadFull, wait=1)
        middleware = ResilienceMiddleware(other, pipeline=Pipeline(retry, Timeout(2), bulkhead))
        connection = Connection()
        async with anyio.create_task_group() as group:
            group.start_soon(bulkhead.acall, anyio.sleep, 2.5)
            await anyio.wait_all_tasks_blocked()
            await middleware(scope_of(method=method), connection.receive, connection.send)
        return connection.answer.status, runtime.now()

    assert run(scenario, backend=backend) == (203, 2.99)
