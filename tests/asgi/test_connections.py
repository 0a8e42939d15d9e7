"""Deadlines that callers send, clients that go away, and processes that end."""

import asyncio
from functools import partial

import anyio
import pytest

from resilient import Pipeline, Retry, Timeout, deadline, runtime
from resilient.asgi import Drain, Health, ResilienceMiddleware
from resilient.asgi.incoming import Incoming
from resilient.errors import TimedOut
from resilient.testing import capture_events, run

from .driver import Connection, ask, replies, scope_of


def guarded(app, *policies, **options):
    return ResilienceMiddleware(app, pipeline=Pipeline(*policies), **options)


# -- deadlines ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value", "left"),
    [
        ("x-timeout", "5", 4.5),
        ("x-timeout", "100", 59.5),
        ("x-envoy-expected-rq-timeout-ms", "5000", 4.5),
        ("grpc-timeout", "5S", 4.5),
        ("grpc-timeout", "5M", 59.5),
        ("x-timeout", "nonsense", None),
        ("x-timeout", "-5", None),
    ],
)
def test_the_deadline_of_the_caller_is_that_of_the_call(backend, header, value, left):
    seen = []

    async def app(scope, receive, send):
        seen.append(deadline.remaining())
        await replies(200)(scope, receive, send)

    async def scenario():
        return await ask(guarded(app, deadline_header=header, deadline_margin=0.5), headers={header: value})

    assert run(scenario, backend=backend).status == 200
    assert seen == [left]


@pytest.mark.parametrize("policies", [[], [Timeout(30)], [Retry(), Timeout(9)]])
def test_work_ends_at_the_deadline_of_the_caller(backend, policies):
    async def app(scope, receive, send):
        await anyio.sleep(100)

    async def scenario():
        answer = await ask(guarded(app, *policies, deadline_header="x-timeout"), headers={"x-timeout": "3"})
        return answer.status, runtime.now()

    with capture_events() as events:
        status, now = run(scenario, backend=backend)
    assert (status, round(now, 6)) == (503, 2.98)
    assert [(event.policy, event.seconds) for event in events] == [("deadline of the caller", 2.98)]


def test_a_caller_can_only_shorten_what_is_done(backend):
    async def app(scope, receive, send):
        await anyio.sleep(100)

    async def scenario():
        await ask(guarded(app, Timeout(2), deadline_header="x-timeout"), headers={"x-timeout": "30"})
        return runtime.now()

    assert run(scenario, backend=backend) == 2.0


@pytest.mark.parametrize("value", ["0", "0.02", "0.01"])
def test_work_that_cannot_be_done_in_time_is_not_begun(backend, value):
    seen = []

    async def scenario():
        middleware = guarded(replies(200, seen=seen), deadline_header="x-timeout", gateway=True)
        return await ask(middleware, headers={"x-timeout": value})

    assert run(scenario, backend=backend).status == 504
    assert seen == []


def test_the_deadline_of_the_caller_is_told_once():
    incoming = Incoming("x-timeout", cap=9)
    assert incoming.limit() == 9
    with capture_events() as events:
        errors = [incoming.timed_out(), incoming.timed_out(tell=False)]
    assert [str(error) for error in errors] == ["deadline of the caller: the deadline passed"] * 2
    assert [(event.name, event.seconds) for event in events] == [("timeout.expired", 9)]


def test_two_deadlines_are_none(backend):
    seen = []

    async def app(scope, receive, send):
        seen.append(deadline.current())

    async def scenario():
        scope = scope_of(headers={"x-timeout": "1"})
        scope["headers"].append((b"x-timeout", b"2"))
        await guarded(app, deadline_header="X-Timeout")(scope, Connection().receive, Connection().send)

    run(scenario, backend=backend)
    assert seen == [None]


def test_what_runs_after_the_response_is_not_the_callers_business(backend):
    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        await anyio.sleep(100)

    async def scenario():
        answer = await ask(guarded(app, deadline_header="x-timeout"), headers={"x-timeout": "3"})
        return answer.status, answer.error, runtime.now()

    assert run(scenario, backend=backend) == (200, None, 100.0)


def test_answered_requests_leave_no_timers_behind_until_their_deadlines():
    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        left.append([timer for timer in asyncio.get_running_loop()._scheduled if not timer.cancelled()])

    left = []
    run(partial(ask, guarded(app, deadline_header="x-timeout"), headers={"x-timeout": "30"}))
    assert left == [[]]


@pytest.mark.parametrize("policies", [[], [Timeout(30)]])
def test_a_caller_loosens_no_deadline_around_it(backend, policies):
    async def app(scope, receive, send):
        left.append(deadline.remaining())
        await replies(200)(scope, receive, send)
        left.append(deadline.remaining())
        await anyio.sleep(100)

    async def scenario():
        inside = guarded(app, *policies, deadline_header="x-timeout")
        answer = await ask(guarded(inside, Timeout(2)), headers={"x-timeout": "50"})
        return answer.status, answer.error, runtime.now()

    left = []
    assert run(scenario, backend=backend) == (200, None, 100.0)
    assert left == [2.0, None]


def test_a_deadline_that_is_only_published_is_kept(backend):
    async def app(scope, receive, send):
        await anyio.sleep(100)

    async def scenario():
        connection = Connection()
        middleware = guarded(app, deadline_header="x-timeout")
        scope = scope_of(headers={"x-timeout": "30"})
        await Timeout(2, interrupt=False).acall(middleware, scope, connection.receive, connection.send)
        return connection.answer.status, runtime.now()

    assert run(scenario, backend=backend) == (503, 2.0)


def test_the_deadline_around_it_may_come_first(backend):
    async def app(scope, receive, send):
        await anyio.sleep(100)

    async def scenario():
        scope, connection = scope_of(headers={"x-timeout": "30"}), Connection()
        middleware = guarded(app, deadline_header="x-timeout")
        with pytest.raises(TimedOut):
            await Timeout(2).acall(middleware, scope, connection.receive, connection.send)
        return runtime.now()

    assert run(scenario, backend=backend) == 2.0


# -- clients that go away -------------------------------------------------------------------------------------


async def waits(scope, receive, send):
    """Read the request, and then take for ever."""
    while (await receive()).get("more_body"):
        pass
    try:
        await anyio.sleep_forever()
    finally:
        scope["ended"].append(runtime.now())


async def leaves(middleware, *body, after=3, **request):
    """Make a request whose client goes away; return when the application ended, and the answer."""
    gone, ended = anyio.Event(), []
    answers = []

    async def client():
        answers.append(await ask(middleware, "/", *body, gone=gone, ended=ended, **request))

    async with anyio.create_task_group() as group:
        group.start_soon(client)
        await anyio.sleep(after)
        gone.set()
    return ended, answers[0]


@pytest.mark.parametrize(
    "request_",
    [{}, {"method": "POST"}, {"method": "PUT", "headers": {"content-length": "3"}}],
)
@pytest.mark.parametrize("policies", [[], [Timeout(30)], [Retry()]])
def test_what_runs_for_a_client_that_has_gone_is_cancelled(backend, request_, policies):
    async def scenario():
        return await leaves(guarded(waits, *policies, cancel_on_disconnect=True), b"one", b"two", **request_)

    ended, answer = run(scenario, backend=backend)
    assert (ended, answer.messages, answer.error) == ([3.0], [], None)


def test_what_runs_after_the_response_is_not_cancelled_when_the_client_goes(backend):
    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        await anyio.sleep(10)
        scope["ended"].append(runtime.now())

    async def scenario():
        return await leaves(guarded(app, Timeout(5), cancel_on_disconnect=True))

    ended, answer = run(scenario, backend=backend)
    assert (ended, answer.status, answer.error) == ([10.0], 200, None)


def test_a_client_that_goes_before_its_body_is_there(backend):
    async def app(scope, receive, send):
        seen.append((await receive())["type"])
        seen.append((await receive())["type"])
        await anyio.sleep_forever()

    async def scenario():
        connection = Connection(b"one", b"two", gone=anyio.Event())
        connection.parts.pop()
        connection.gone.set()
        await guarded(app, cancel_on_disconnect=True)(scope_of(method="POST"), connection.receive, connection.send)

    seen = []
    run(scenario, backend=backend)
    assert seen == ["http.request", "http.disconnect"]


def test_the_application_hears_of_it_too(backend):
    async def app(scope, receive, send):
        while True:
            seen.append((await receive())["type"])
            if len(seen) == 4:
                break

    async def scenario():
        connection = Connection(b"a", gone=anyio.Event())
        connection.gone.set()
        await guarded(app, cancel_on_disconnect=True)(scope_of(), connection.receive, connection.send)

    seen = []
    run(scenario, backend=backend)
    assert seen[:2] == ["http.request", "http.disconnect"]


def test_who_stays_gets_an_answer_and_whatever_is_raised(backend):
    async def scenario():
        error = KeyError("a bug")
        good = await ask(guarded(replies(200), cancel_on_disconnect=True))
        bad = await ask(guarded(replies(error), cancel_on_disconnect=True))
        return good.status, bad.error is error

    assert run(scenario, backend=backend) == (200, True)


def test_who_waits_in_a_queue_is_dropped_too(backend):
    from resilient import Bulkhead

    async def scenario():
        bulkhead = Bulkhead(1, queue=5)
        middleware = guarded(waits, bulkhead, cancel_on_disconnect=True)
        async with anyio.create_task_group() as group:
            group.start_soon(leaves, middleware)
            await anyio.sleep(1)
            ended, answer = await leaves(middleware, after=1)
            return ended, answer.messages, bulkhead.statistics().queued

    assert run(scenario, backend=backend) == ([], [], 0)


# -- processes that end ---------------------------------------------------------------------------------------


def test_a_draining_process_serves_and_then_refuses(backend):
    async def scenario():
        drain = Drain(grace=5, timeout=20)
        middleware = guarded(replies(200), drain=drain, health=Health(drain=drain))
        answers = [await ask(middleware), await ask(middleware, "/readyz"), await ask(middleware, "/livez")]
        drain.begin()
        answers += [await ask(middleware), await ask(middleware, "/readyz"), await ask(middleware, "/livez")]
        answers += [await ask(middleware, http_version="2")]
        await anyio.sleep(6)
        answers += [
            await ask(middleware),
            await ask(middleware, "/livez"),
            await ask(middleware, http_version="2"),
        ]
        return [(answer.status, answer.headers.get("connection")) for answer in answers]

    assert run(scenario, backend=backend) == [
        (200, None),
        (200, None),
        (200, None),
        (200, "close"),
        (503, None),
        (200, None),
        (200, None),
        (503, "close"),
        (200, None),
        (503, None),
    ]


def test_the_connection_of_a_request_in_flight_is_closed_too(backend):
    async def app(scope, receive, send):
        drain.begin()
        await replies(200)(scope, receive, send)

    drain = Drain(grace=0)
    answer = run(ask, guarded(app, drain=drain), backend=backend)
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def test_requests_in_flight_are_counted_until_they_end(backend):
    async def scenario():
        drain = Drain(grace=1, timeout=20)
        release = anyio.Event()

        async def app(scope, receive, send):
            await release.wait()
            raise KeyError

        counts = []
        async with anyio.create_task_group() as group:
            group.start_soon(ask, guarded(app, drain=drain))
            await anyio.sleep(1)
            counts.append(drain.statistics().in_flight)
            drain.begin()
            await anyio.sleep(5)
            counts.append(drain.statistics().state)
            release.set()
        await drain.wait()
        return [*counts, drain.statistics().in_flight, drain.statistics().state]

    assert run(scenario, backend=backend) == [1, "draining", 0, "drained"]


def test_websockets_are_counted_and_refused(backend):
    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})
        seen.append(drain.statistics().in_flight)

    async def scenario():
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message["type"])

        scope = {**scope_of("/ws"), "type": "websocket"}
        middleware = guarded(app, drain=drain)
        await middleware(scope, receive, send)
        drain.begin()
        await anyio.sleep(2)
        await middleware(scope, receive, send)
        return sent

    seen, drain = [], Drain(grace=1)
    assert run(scenario, backend=backend) == ["websocket.accept", "websocket.close"]
    assert seen == [1]


def test_the_lifespan_passes_by_a_drain(backend):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    async def scenario():
        await guarded(app, drain=Drain(), health=Health())({"type": "lifespan"}, None, None)

    run(scenario, backend=backend)
    assert seen == ["lifespan"]
