"""The middleware: what it lets through untouched, and what policies do to requests."""

from contextvars import ContextVar
from functools import partial

import anyio
import pytest

from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    Fallback,
    Keyed,
    Pipeline,
    Priority,
    RateLimit,
    Retry,
    Timeout,
    deadline,
    presets,
    priority,
    runtime,
)
from resilient.asgi import ResilienceMiddleware
from resilient.asgi.edge import is_app
from resilient.errors import RateLimited, TimedOut
from resilient.kinds import MISSING, Race, Value
from resilient.testing import run

from .driver import Connection, ask, replies, scope_of

NOTHING = Pipeline()


def guarded(app, *policies, **options):
    return ResilienceMiddleware(app, pipeline=Pipeline(*policies), **options)


def used_up():
    """Return a limit that has nothing left."""
    limit = RateLimit("1/hour")
    limit.call(int)
    return limit


async def start(send, status=200, headers=(), **more):
    await send({"type": "http.response.start", "status": status, "headers": list(headers), **more})


async def body(send, content=b"", *, more=False):
    await send({"type": "http.response.body", "body": content, "more_body": more})


class Hedge(Race):
    def next_start(self, call, started):
        return None


# -- what passes untouched ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lifespan", "websocket", "something.else"])
def test_what_is_no_request_passes_as_it_is(backend, kind):
    seen = []

    async def app(*connection):
        seen.append(connection)

    async def scenario():
        await ResilienceMiddleware(app, pipeline=used_up())({"type": kind}, receive, send)

    receive, send = object(), object()
    run(scenario, backend=backend)
    assert seen == [({"type": kind}, receive, send)]


def test_a_good_response_streams_through(backend):
    sent = []

    async def app(scope, receive, send):
        await start(send, headers=[(b"x", b"y")])
        for part in (b"a", b"b"):
            await body(send, part, more=True)
            sent.append(len(connection.answer.messages))
        await body(send)

    async def scenario():
        await guarded(app, Timeout(5), Bulkhead(1), Retry(), Fallback(None), Cache(0))(
            scope_of(), connection.receive, connection.send
        )

    connection = Connection()
    run(scenario, backend=backend)
    assert sent == [2, 3]
    assert connection.answer.messages == [
        {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]},
        {"type": "http.response.body", "body": b"a", "more_body": True},
        {"type": "http.response.body", "body": b"b", "more_body": True},
        {"type": "http.response.body", "body": b"", "more_body": False},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [
            {"type": "http.response.debug", "info": {}},
            {"type": "http.response.start", "status": 200, "headers": []},
        ],
        [
            {"type": "http.response.start", "status": 200, "headers": [], "trailers": True},
            {"type": "http.response.body", "body": b"a"},
            {"type": "http.response.trailers", "headers": [], "more_trailers": True},
            {"type": "http.response.trailers", "headers": []},
        ],
        [
            {"type": "http.response.push", "path": "/style.css", "headers": []},
            {"type": "http.response.early_hint", "links": []},
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.pathsend", "path": "/tmp/a"},
        ],
        [
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.zerocopysend", "file": 3, "more_body": True},
            {"type": "http.response.zerocopysend", "file": 3},
        ],
    ],
)
def test_every_kind_of_message_is_passed_on(backend, messages):
    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    async def scenario():
        return (await ask(guarded(app, Timeout(5)))).messages

    assert run(scenario, backend=backend) == messages


def test_the_scope_and_the_context_are_the_callers(backend):
    variable = ContextVar("variable", default="")

    async def app(scope, receive, send):
        scope["route"] = "/items/{id}"
        variable.set("set")
        await start(send)

    async def scenario():
        await guarded(app, Timeout(5))(scope, Connection().receive, Connection().send)
        return scope["route"], variable.get()

    scope = scope_of()
    assert run(scenario, backend=backend) == ("/items/{id}", "set")


@pytest.mark.parametrize("policies", [[], [Timeout(5)], [Retry()], [Fallback(replies(200), on=OSError)]])
def test_what_the_application_raises_is_raised_as_it_is(backend, policies):
    error = KeyError("a bug")

    async def scenario():
        return await ask(guarded(replies(error), *policies))

    answer = run(scenario, backend=backend)
    assert answer.error is error
    assert answer.messages == []


def test_an_answer_before_the_error_is_the_applications(backend):
    async def app(scope, receive, send):
        await replies(500)(scope, receive, send)
        raise KeyError

    async def scenario():
        return await ask(guarded(app, Retry()))

    answer = run(scenario, backend=backend)
    assert (answer.status, answer.body, type(answer.error)) == (500, b"app 500", KeyError)


def test_an_application_that_answers_nothing_is_left_to_the_server(backend):
    async def app(scope, receive, send):
        pass

    async def scenario():
        return await ask(guarded(app, Timeout(5), Retry()))

    answer = run(scenario, backend=backend)
    assert (answer.messages, answer.error) == ([], None)


def test_a_request_is_refused_before_its_body_is_asked_for(backend):
    async def scenario():
        await guarded(replies(200), used_up())(scope_of(method="POST"), None, connection.send)

    connection = Connection()
    run(scenario, backend=backend)
    assert connection.answer.status == 429


# -- which pipeline -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "GET", 429),
        ("/livez", "GET", 200),
        ("/metrics", "GET", 200),
        ("/search", "GET", 503),
        ("/search/", "GET", 429),
        ("/free", "GET", 200),
        ("/users/7", "GET", 429),
        ("/users/7", "POST", 503),
        ("/health", "GET", 503),
        ("/healthz", "POST", 503),
        ("/healthz", "GET", 200),
    ],
)
def test_routes(path, method, status):
    full = Bulkhead(1)
    full.admit(None, 0)
    routes = {"/search": full, "/free": None, "POST /users/{id:int}": full, "/health": full}
    routes["POST /healthz"] = full

    async def scenario():
        return await ask(guarded(replies(200), used_up(), routes=routes), path, method=method)

    assert run(scenario).status == status


def test_nothing_is_exempt_if_so_wanted():
    async def scenario():
        return await ask(guarded(replies(200), used_up(), exempt=()), "/livez")

    assert run(scenario).status == 429


@pytest.mark.parametrize(
    ("headers", "status"), [({"access-control-request-method": "GET", "origin": "https://b"}, 200), ({}, 429)]
)
def test_preflight_requests_are_not_guarded(headers, status):
    async def scenario():
        return await ask(guarded(replies(200), used_up()), method="OPTIONS", headers=headers)

    assert run(scenario).status == status


def test_with_no_pipeline_there_is_the_preset():
    middleware = ResilienceMiddleware(replies(200))
    assert middleware.pipeline.name == "http_server"
    assert run(ask, middleware).status == 200


def test_the_preset_counts_by_address():
    middleware = ResilienceMiddleware(replies(200), pipeline=presets.http_server(rate="1/minute", queue=3))

    async def scenario():
        peers = [("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.2", 1)]
        return [(await ask(middleware, client=peer)).status for peer in peers]

    assert run(scenario) == [200, 429, 200]
    timeout, bulkhead = middleware.pipeline.policies[1:3]
    assert (timeout.seconds, bulkhead.limit, bulkhead.queue) == (30, 200, 3)
    assert presets.http_server(key=len, rate="1/s").policies[0].key is len
    with pytest.raises(ValueError, match=r"http_server: key=.* is not allowed; give None without rate="):
        presets.http_server(key=len)


# -- failing responses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_failing_response_that_nobody_replaces_comes_out_unchanged(backend, status):
    async def scenario():
        return await ask(guarded(replies(status, headers=[(b"x", b"y")]), Fallback(replies(200), on=KeyError)))

    answer = run(scenario, backend=backend)
    assert (answer.status, answer.headers, answer.body) == (status, {"x": "y"}, b"app %d" % status)
    assert answer.error is None


@pytest.mark.parametrize("status", [404, 429, 501, 505])
def test_what_is_no_failure_is_not_replaced(backend, status):
    async def scenario():
        return await ask(guarded(replies(status), Fallback(replies(200))))

    assert run(scenario, backend=backend).status == status


@pytest.mark.parametrize("fallback", [replies(203), lambda scope: replies(203)])
def test_a_fallback_takes_the_place_of_a_failing_response(backend, fallback):
    async def scenario():
        return await ask(guarded(replies(500), RateLimit("9/minute"), Fallback(fallback)))

    answer = run(scenario, backend=backend)
    assert (answer.status, answer.body) == (203, b"app 203")
    assert answer.headers["ratelimit"] == '"default";r=8;t=7'


def test_a_status_named_by_a_policy_is_a_failure(backend):
    async def scenario():
        return await ask(guarded(replies(404, 200), Retry(on={404}, wait=1)))

    assert run(scenario, backend=backend).status == 200


def test_a_fallback_has_to_be_a_response():
    async def scenario():
        return await ask(guarded(replies(500), Fallback("sorry")))

    answer = run(scenario)
    assert "the pipeline answered 'sorry' instead of a response" in str(answer.error)


def test_a_long_failing_response_goes_out(backend):
    async def app(scope, receive, send):
        await start(send, 500)
        await body(send, b"123", more=True)
        await body(send, b"456", more=True)
        seen.append(len(connection.answer.messages))
        await body(send, b"789")

    async def scenario():
        middleware = guarded(app, Fallback(replies(200)), Retry(), capture=5)
        await middleware(scope_of(), connection.receive, connection.send)

    seen, connection = [], Connection()
    run(scenario, backend=backend)
    assert seen == [3]
    assert (connection.answer.status, connection.answer.body) == (500, b"123456789")


def test_a_breaker_counts_failing_responses_and_errors_but_no_clients_that_have_gone(backend):
    async def gone(message):
        raise OSError("gone")

    async def scenario():
        for app in (replies(500), replies(KeyError())):
            await ask(guarded(app, breaker))
        assert breaker.statistics().failures == 2
        with pytest.raises(OSError, match="gone"):
            await guarded(replies(200), breaker)(scope_of(), Connection().receive, gone)
        assert breaker.statistics().failures == 2
        await ask(guarded(replies(500), breaker))
        return await ask(guarded(replies(200), breaker))

    breaker = CircuitBreaker(consecutive=3)
    answer = run(scenario, backend=backend)
    assert (answer.status, 4 <= int(answer.headers["retry-after"]) <= 6) == (503, True)


def test_a_client_that_has_gone_while_others_watch_is_no_failure(backend):
    async def gone(message):
        raise OSError("gone")

    async def scenario():
        with pytest.raises(OSError, match="gone"):
            await guarded(replies(200), Retry(), breaker, Cache(9))(scope_of(), Connection().receive, gone)

    breaker = CircuitBreaker(consecutive=1)
    run(scenario, backend=backend)
    assert breaker.statistics().failures == 0


# -- retries --------------------------------------------------------------------------------------------------


def test_a_failing_get_is_run_again(backend):
    async def scenario():
        answer = await ask(guarded(replies(503, ConnectionError(), TimeoutError(), 200), Retry(4, wait=1)))
        return answer.status, answer.body, runtime.now()

    assert run(scenario, backend=backend) == (200, b"app 200", 3.0)


@pytest.mark.parametrize("outcome", [500, KeyError()])
def test_what_would_fail_again_is_not_run_again(backend, outcome):
    seen = []
    run(ask, guarded(replies(outcome, seen=seen), Retry(wait=1)), backend=backend)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("request_", "runs"),
    [
        ({"method": "POST"}, 1),
        ({"method": "PUT"}, 2),
        ({"method": "POST", "headers": {"idempotency-key": "1"}}, 2),
        ({"method": "PATCH"}, 2),
    ],
)
def test_only_what_is_idempotent_is_run_again(request_, runs):
    seen = []
    run(ask_with(request_), guarded(replies(503, seen=seen), Retry(2, wait=1), repeatable={"PATCH"}))
    assert len(seen) == runs


def ask_with(changes):
    async def asking(app):
        return await ask(app, **changes)

    return asking


def test_policies_of_a_key_work_like_others(backend):
    def of_path(factory, app, **request):
        return ask(guarded(app, Keyed(factory, key=lambda scope: scope["path"])), "/", **request)

    async def events(scope, receive, send):
        await start(send, headers=[(b"content-type", b"text/event-stream")])
        await anyio.sleep(100)
        await body(send)

    async def scenario():
        once = await of_path(Retry, replies(ConnectionError(), seen=runs), method="POST")
        twice = await of_path(Retry, replies(503, 200))
        other = await of_path(lambda: Fallback(replies(203)), replies(503))
        endless = await of_path(lambda: Timeout(2), events)
        return type(once.error), twice.status, other.status, endless.error

    runs = []
    assert run(scenario, backend=backend) == (ConnectionError, 200, 203, None)
    assert len(runs) == 1


def test_repeatable_may_be_a_function_of_the_scope():
    seen = []
    middleware = guarded(replies(503, seen=seen), Retry(2, wait=1), repeatable=lambda scope: scope["path"] == "/")
    run(ask_with({"method": "POST"}), middleware)
    assert len(seen) == 2


def test_every_run_gets_the_same_body_and_the_same_scope(backend):
    bodies, scopes = [], []

    async def app(scope, receive, send):
        scopes.append({**scope, "headers": list(scope["headers"]), "state": dict(scope["state"])})
        scope["path"] = "/changed"
        scope["headers"].append((b"x-more", b"1"))
        scope["state"]["user"] = "ada"
        scope["endpoint"] = app
        parts = []
        while True:
            message = await receive()
            parts.append(message["body"])
            if not message["more_body"]:
                break
        bodies.append(parts)
        await replies(503 if len(bodies) < 3 else 200)(scope, receive, send)

    async def scenario():
        request = {"method": "PUT", "state": {"pool": 1}}
        return await ask(guarded(app, Retry(wait=1)), "/a", b"one", b"two", **request)

    assert run(scenario, backend=backend).status == 200
    assert bodies == [[b"one", b"two"]] * 3
    assert [scope["path"] for scope in scopes] == ["/a"] * 3
    assert not any("endpoint" in scope for scope in scopes)
    assert [(scope["headers"], scope["state"]) for scope in scopes] == [([(b"host", b"a")], {"pool": 1})] * 3


def test_a_run_that_reads_more_than_the_one_before_goes_on_with_the_connection(backend):
    seen = []

    async def app(scope, receive, send):
        seen.append([(await receive())["body"] for _ in range(len(seen) + 1)])
        await replies(503 if len(seen) < 3 else 200)(scope, receive, send)

    async def scenario():
        return await ask(guarded(app, Retry(wait=1)), "/", b"a", b"b", b"c", method="PUT")

    assert run(scenario, backend=backend).status == 200
    assert seen == [[b"a"], [b"a", b"b"], [b"a", b"b", b"c"]]


def test_a_request_with_a_long_body_is_not_run_again(backend):
    seen = []

    async def app(scope, receive, send):
        seen.append([(await receive())["body"] for _ in range(3)])
        await replies(503)(scope, receive, send)

    async def scenario():
        return await ask(guarded(app, Retry(wait=1), record=5), "/", b"123", b"456", b"7", method="PUT")

    assert run(scenario, backend=backend).status == 503
    assert seen == [[b"123", b"456", b"7"]]


def test_a_response_that_has_begun_is_not_run_again(backend):
    seen = []

    async def app(scope, receive, send):
        seen.append(scope)
        await start(send)
        await body(send, b"half", more=True)
        raise ConnectionError

    async def scenario():
        return await ask(guarded(app, Fallback(replies(203)), Retry(wait=1)))

    answer = run(scenario, backend=backend)
    assert (len(seen), answer.types, type(answer.error)) == (1, ["start", "body"], ConnectionError)


class Remembers(Value):
    """A policy of a user that looks something up, and always has an answer to a failure."""

    def lookup(self, call, now):
        return MISSING

    def recover(self, call, error, now):
        return replies(203)


def test_a_response_that_has_begun_is_not_replaced_by_any_policy(backend):
    async def app(scope, receive, send):
        await start(send)
        raise ConnectionError

    async def scenario():
        begun = await ask(guarded(app, Remembers()))
        failed = await ask(guarded(replies(500), Remembers()))
        return begun.types, type(begun.error), failed.status

    assert run(scenario, backend=backend) == (["start"], ConnectionError, 203)


def test_a_refusal_further_in_is_no_reason_against_another_try(backend):
    async def scenario():
        limit = RateLimit("1/2s")
        middleware = guarded(replies(201), Retry(on=RateLimited, wait=1), limit)
        await ask(middleware, method="POST")
        answer = await ask(middleware, method="POST")
        return answer.status, 2 <= runtime.now() < 2.5

    assert run(scenario, backend=backend) == (201, True)


def test_what_a_replaced_run_still_sends_is_lost(backend):
    late = []

    async def app(scope, receive, send):
        late.append(send)
        if len(late) == 2:
            await start(late[0], 200)
        await replies(503 if len(late) == 1 else 201)(scope, receive, send)

    async def scenario():
        return await ask(guarded(app, Retry(wait=1)))

    assert run(scenario, backend=backend).status == 201


# -- time -----------------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_refused_and_its_application_cancelled(backend):
    ended = []

    async def app(scope, receive, send):
        async def child():
            try:
                await anyio.sleep(100)
            finally:
                ended.append("child")

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(child)
                await anyio.sleep(100)
        finally:
            ended.append("application")

    async def scenario():
        return await ask(guarded(app, Timeout(2))), runtime.now()

    answer, now = run(scenario, backend=backend)
    assert (answer.status, answer.error, now, ended) == (503, None, 2.0, ["child", "application"])


def test_a_response_that_comes_too_late_has_not_begun(backend):
    async def app(scope, receive, send):
        with anyio.CancelScope(shield=True):  # as anyio has it around threads, in which sync endpoints run
            await anyio.sleep(100)
        await replies(200)(scope, receive, send)

    answer = run(ask, guarded(app, Timeout(2)), backend=backend)
    assert (answer.status, answer.error, answer.whole) == (503, None, True)


def test_a_gateway_answers_timeouts_by_504(backend):
    async def app(scope, receive, send):
        await anyio.sleep(9)

    assert run(ask, guarded(app, Timeout(2), gateway=True), backend=backend).status == 504


def test_a_response_that_takes_too_long_is_cut_off(backend):
    async def app(scope, receive, send):
        await start(send)
        await body(send, b"half", more=True)
        await anyio.sleep(100)

    async def scenario():
        return await ask(guarded(app, Timeout(2), Fallback(replies(203))))

    answer = run(scenario, backend=backend)
    assert (answer.types, answer.whole, type(answer.error)) == (["start", "body"], False, TimedOut)


@pytest.mark.parametrize("policies", [[Timeout(2)], [Timeout(3), Timeout(2)], [Timeout(2), Retry(), Timeout(3)]])
def test_what_runs_after_the_response_has_no_deadline(backend, policies):
    left = []

    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        left.append(deadline.remaining())
        await anyio.sleep(100)
        left.append(runtime.now())

    async def scenario():
        answer = await ask(guarded(app, *policies))
        return answer.status, answer.error

    assert run(scenario, backend=backend) == (200, None)
    assert left == [None, 100.0]


@pytest.mark.parametrize(
    ("content_type", "options", "ended"),
    [
        (b"text/event-stream; charset=utf-8", {}, 100.0),
        (b"Text/Event-Stream", {}, 100.0),
        (b"text/plain", {"deadline_until": "start"}, 100.0),
        (b"text/plain", {"deadline_until": "complete"}, 2.0),
        (b"text/plain", {}, 2.0),
    ],
)
def test_when_deadlines_end(backend, content_type, options, ended):
    async def app(scope, receive, send):
        await start(send, headers=[(b"content-type", content_type)])
        try:
            await anyio.sleep(100)
            await body(send)
        finally:
            seen.append(runtime.now())

    seen = []
    run(ask, guarded(app, Timeout(2), **options), backend=backend)
    of_caller = guarded(app, deadline_header="x-timeout", deadline_margin=0, **options)
    run(partial(ask, of_caller, headers={"x-timeout": "2"}), backend=backend)
    assert seen == [ended, ended]


@pytest.mark.parametrize(("until", "ended"), [("start", 100.0), ("complete", 2.0)])
def test_a_failing_response_that_is_too_long_to_be_held_back_begins_too(backend, until, ended):
    async def app(scope, receive, send):
        await start(send, 500)
        await body(send, b"0123456789", more=True)
        try:
            await anyio.sleep(100)
            await body(send)
        finally:
            seen.append(runtime.now())

    seen = []
    middleware = guarded(app, Timeout(2), Fallback(None, on=OSError), capture=5, deadline_until=until)
    run(ask, middleware, backend=backend)
    assert seen == [ended]


@pytest.mark.parametrize("options", [{}, {"deadline_until": "start"}])
def test_the_deadline_until_the_start_holds(backend, options):
    async def app(scope, receive, send):
        await anyio.sleep(100)

    async def scenario():
        return (await ask(guarded(app, Timeout(2), **options))).status, runtime.now()

    assert run(scenario, backend=backend) == (503, 2.0)


def test_a_response_may_be_sent_by_another_task(backend):
    left = []

    async def app(scope, receive, send):
        async with anyio.create_task_group() as group:
            group.start_soon(replies(200), scope, receive, send)
        left.append(deadline.remaining())
        await anyio.sleep(100)
        left.append(runtime.now())

    async def scenario():
        return (await ask(guarded(app, Timeout(2)))).error

    assert run(scenario, backend=backend) is None
    assert left == [2_000_002.0, 100.0]


def test_a_response_that_is_completed_while_the_application_is_cancelled_is_late(backend):
    async def app(scope, receive, send):
        await start(send)
        try:
            await anyio.sleep(100)
        finally:
            with anyio.CancelScope(shield=True):
                await body(send, b"all there is")

    async def scenario():
        return await ask(guarded(app, Timeout(2)))

    answer = run(scenario, backend=backend)
    assert (answer.whole, type(answer.error)) == (True, TimedOut)


def test_the_deadline_around_the_middleware_is_left_alone(backend):
    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        await anyio.sleep(100)

    async def scenario():
        with pytest.raises(TimedOut):
            await Timeout(3).acall(guarded(app, Timeout(2)), scope_of(), Connection().receive, Connection().send)
        return runtime.now()

    assert run(scenario, backend=backend) == 3.0


@pytest.mark.parametrize("inner", [RateLimit("5/s"), Timeout(1), Timeout(3)])
@pytest.mark.parametrize(("content_type", "more"), [(b"text/plain", False), (b"text/event-stream", True)])
def test_a_middleware_inside_hides_no_deadline_from_the_one_around_it(backend, inner, content_type, more):
    async def app(scope, receive, send):
        await start(send, headers=[(b"content-type", content_type)])
        await body(send, b"", more=more)
        await anyio.sleep(100)
        left.append(deadline.remaining())

    async def scenario():
        return (await ask(guarded(guarded(app, inner), Timeout(2)))).error, runtime.now()

    left = []
    assert run(scenario, backend=backend) == (None, 100.0)
    assert left == [None]


def test_without_a_deadline_there_is_none_to_end(backend):
    assert run(ask, guarded(replies(200), Bulkhead(1)), backend=backend).status == 200


def test_a_permit_is_taken_until_the_application_returns(backend):
    async def app(scope, receive, send):
        await replies(200)(scope, receive, send)
        taken.append(bulkhead.statistics().in_use)

    taken, bulkhead = [], Bulkhead(1)
    run(ask, guarded(app, bulkhead), backend=backend)
    assert (taken, bulkhead.statistics().in_use) == ([1], 0)


# -- priorities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "priority_",
    [
        {"/checkout": Priority.HIGH, "/{page}": Priority.LOW},
        lambda scope: {"/checkout": 3, "/a": 1}.get(scope["path"], 2),
    ],
)
def test_requests_have_priorities(backend, priority_):
    seen = []

    async def app(scope, receive, send):
        seen.append(priority.current())

    async def scenario():
        middleware = guarded(app, priority=priority_)
        for path in ("/checkout", "/a", "/b/c"):
            await ask(middleware, path)

    run(scenario, backend=backend)
    assert seen == [Priority.HIGH, Priority.LOW, Priority.NORMAL]


@pytest.mark.parametrize(
    ("values", "level"),
    [
        (["high"], Priority.HIGH),
        ([" Critical"], Priority.CRITICAL),
        (["low"], Priority.LOW),
        (["4"], Priority.NORMAL),
        (["nonsense"], Priority.NORMAL),
        (["high", "high"], Priority.NORMAL),
        ([], Priority.NORMAL),
    ],
)
def test_priorities_may_stand_in_a_header(values, level):
    async def app(scope, receive, send):
        seen.append(priority.current())

    async def scenario():
        scope = scope_of()
        scope["headers"] += [(b"x-priority", value.encode()) for value in values]
        await guarded(app, priority="X-Priority")(scope, Connection().receive, Connection().send)

    seen = []
    run(scenario)
    assert seen == [level]


# -- websockets -----------------------------------------------------------------------------------------------


class Socket:
    def __init__(self, **extensions):
        self.scope = {**scope_of("/ws"), "type": "websocket", "extensions": extensions}
        del self.scope["method"]
        self.sent = []
        self.received = 0

    async def receive(self):
        self.received += 1
        if self.received > 1:  # there is nothing more to come before it is accepted
            await anyio.sleep_forever()
        return {"type": "websocket.connect"}

    async def send(self, message):
        self.sent.append(message)


def test_websockets_pass_unless_they_are_asked_for(backend):
    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})

    async def scenario():
        await guarded(app, used_up())(socket.scope, socket.receive, socket.send)

    socket = Socket()
    run(scenario, backend=backend)
    assert socket.sent == [{"type": "websocket.accept"}]


def test_a_handshake_is_refused(backend):
    async def scenario():
        await guarded(replies(200), websockets=used_up())(socket.scope, socket.receive, socket.send)

    socket = Socket()
    run(scenario, backend=backend)
    assert socket.sent == [{"type": "websocket.close", "code": 1013, "reason": "Quota exceeded"}]
    assert socket.received == 1


def test_a_handshake_is_refused_by_a_response_where_the_server_can_send_one(backend):
    async def scenario():
        middleware = guarded(replies(200), websockets=used_up(), on_rejected=lambda scope, refusal: 1 / 0)
        await middleware(socket.scope, socket.receive, socket.send)

    socket = Socket(**{"websocket.http.response": {}})
    run(scenario, backend=backend)
    assert [message["type"] for message in socket.sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert socket.sent[0]["status"] == 429
    assert b"ratelimit" in dict(socket.sent[0]["headers"])


def test_an_accepted_websocket_has_no_deadline_and_keeps_its_permit(backend):
    async def app(scope, receive, send):
        await send({"type": "websocket.accept"})
        await anyio.sleep(100)
        taken.append(bulkhead.statistics().in_use)
        await send({"type": "websocket.close"})

    async def scenario():
        await guarded(app, websockets=Timeout(2) | bulkhead)(socket.scope, socket.receive, socket.send)
        return runtime.now()

    taken, bulkhead, socket = [], Bulkhead(1), Socket()
    assert run(scenario, backend=backend) == 100.0
    assert taken == [1]


def test_a_handshake_that_takes_too_long_is_refused(backend):
    async def app(scope, receive, send):
        await anyio.sleep(9)

    async def scenario():
        await guarded(app, websockets=Timeout(2))(socket.scope, socket.receive, socket.send)

    socket = Socket()
    run(scenario, backend=backend)
    assert [message["type"] for message in socket.sent] == ["websocket.close"]


def test_a_handshake_that_the_application_has_received_is_refused(backend):
    async def app(scope, receive, send):
        await receive()
        await anyio.sleep(9)

    async def scenario():
        await guarded(app, websockets=Timeout(2))(socket.scope, socket.receive, socket.send)
        return runtime.now()

    socket = Socket()
    assert run(scenario, backend=backend) == 2.0
    assert [message["type"] for message in socket.sent] == ["websocket.close"]
    assert socket.received == 1


class AnApplication:
    async def __call__(self, scope, receive, send):
        pass

    async def method(self, scope, receive, send):
        pass

    async def two(self, scope, receive):
        pass


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (AnApplication(), True),
        (AnApplication().method, True),
        (partial(replies(200)), True),
        (AnApplication().two, False),
        (lambda scope: scope, False),
        (AnApplication, False),
        (print, False),
        (dict, False),
        (Connection(), False),
        (Socket, False),
        (3, False),
    ],
)
def test_what_an_application_is(candidate, expected):
    assert is_app(candidate) is expected
    assert is_app(candidate) is expected


@pytest.mark.parametrize(
    "headers", [lambda: iter([(b"x", b"y")]), lambda: ((b"x", b"y"),)], ids=["iterator", "tuple"]
)
def test_fields_may_be_any_iterable(backend, headers):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": headers()})
        await body(send)

    async def scenario():
        plain = await ask(guarded(app, Timeout(2)))
        limited = await ask(guarded(app, RateLimit("9/minute"), Fallback(None, on=KeyError)))
        return plain.headers, limited.headers["x"]

    assert run(scenario, backend=backend) == ({"x": "y"}, "y")


# -- bad options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"app": 3}, TypeError, "app=3 is not allowed; give an ASGI application"),
        ({"pipeline": Timeout}, TypeError, r"pipeline=.*Write Timeout\(\) with parentheses"),
        ({"pipeline": Hedge()}, TypeError, "Hedge cannot guard an application"),
        ({"pipeline": Keyed(Hedge)}, TypeError, "Hedge cannot guard an application"),
        ({"routes": ["/"]}, TypeError, "routes=.* a mapping of paths to pipelines"),
        ({"routes": {"/": 3}}, TypeError, "routes=3 is not allowed"),
        ({"routes": {"/": Hedge()}}, TypeError, "Hedge cannot guard"),
        ({"exempt": "/livez"}, TypeError, "exempt='/livez'"),
        ({"websockets": Retry(on=OSError)}, TypeError, "websockets=Retry cannot guard a handshake"),
        ({"websockets": Fallback(None)}, TypeError, "websockets=Fallback cannot guard a handshake"),
        ({"websockets": Keyed(lambda: Retry(on=OSError))}, TypeError, "websockets=Retry cannot guard a handshake"),
        ({"websockets": 3}, TypeError, "websockets=3 is not allowed"),
        ({"gateway": 1}, TypeError, "gateway=1 is not allowed; give True or False"),
        ({"legacy_headers": None}, TypeError, "legacy_headers=None"),
        ({"on_rejected": 3}, TypeError, "on_rejected=3"),
        ({"retry_after": 0}, ValueError, "retry_after=0"),
        ({"deadline_until": "end"}, ValueError, "deadline_until='end' is not allowed"),
        ({"repeatable": "POST"}, TypeError, "repeatable='POST'"),
        ({"capture": -1}, ValueError, "capture=-1"),
        ({"record": 1.5}, TypeError, "record=1.5"),
        ({"deadline_header": ""}, ValueError, "''"),
        ({"deadline_header": "x", "max_deadline": 0}, ValueError, "max_deadline=0"),
        ({"deadline_header": "x", "deadline_margin": -1}, ValueError, "deadline_margin=-1"),
        ({"max_deadline": 0}, ValueError, "max_deadline=0"),
        ({"deadline_margin": "1"}, TypeError, "deadline_margin='1'"),
        ({"max_deadline": 1, "deadline_margin": 1}, ValueError, "deadline_margin=1.* below max_deadline=1"),
        ({"cancel_on_disconnect": "yes"}, TypeError, "cancel_on_disconnect='yes'"),
        ({"priority": 3}, TypeError, "priority=3"),
        ({"priority": "a b"}, ValueError, "priority='a b' is not allowed; give the name of a header"),
        ({"priority": {"a": Priority.LOW}}, ValueError, "priority='a' is not allowed; give paths such as"),
        ({"priority": {"/{a:b}": Priority.LOW}}, ValueError, "priority='/{a:b}' is not allowed; give templates"),
        ({"priority": {"/": 3}}, TypeError, "priority=3 is not allowed; give a Priority for each path"),
        ({"health": 3}, TypeError, "health=3 is not allowed; give a Health or None"),
        ({"drain": 3}, TypeError, "drain=3 is not allowed; give a Drain or None"),
    ],
)
def test_a_bad_option_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        ResilienceMiddleware(**{"app": replies(200), "pipeline": NOTHING} | options)
