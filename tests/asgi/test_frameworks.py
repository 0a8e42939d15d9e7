"""The middleware in Starlette and FastAPI: where applications have it, and what they have around it."""

from contextlib import asynccontextmanager
from contextvars import ContextVar

import anyio
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI
from fastapi.responses import StreamingResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient

from resilient import (
    Bulkhead,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Pipeline,
    RateLimit,
    Retry,
    Timeout,
    deadline,
)
from resilient.asgi import ResilienceMiddleware
from resilient.errors import TimedOut
from resilient.testing import run

from .driver import ask, scope_of

ORIGIN = {"origin": "https://elsewhere.example"}
VARIABLE = ContextVar("variable", default="")


def used_up():
    """Return a limit that has nothing left."""
    limit = RateLimit("1/hour")
    limit.call(int)
    return limit


def by_argument(app, **options):
    lifespan = app.router.lifespan_context
    middleware = [Middleware(ResilienceMiddleware, **options)]
    return Starlette(routes=app.routes, lifespan=lifespan, middleware=middleware)


def by_method(app, **options):
    app.add_middleware(ResilienceMiddleware, **options)
    return app


def from_outside(app, **options):
    return ResilienceMiddleware(app, **options)


def app_of(endpoint, path="/"):
    return Starlette(routes=[Route(path, endpoint)])


async def good(request):
    return PlainTextResponse("good " * 200)


async def late(request):
    await anyio.sleep(100)


async def broken(request):
    raise ValueError("what nobody may read")


async def unavailable(request):
    raise HTTPException(503, "a reason of its own")


# -- where it stands ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [by_argument, by_method, from_outside])
def test_it_may_stand_anywhere(guarded, backend):
    async def scenario():
        whole = await ask(guarded(app_of(good), pipeline=Timeout(2)))
        refused = await ask(guarded(app_of(good), pipeline=used_up()))
        slow = await ask(guarded(app_of(late), pipeline=Timeout(2)))
        return whole, refused, slow

    whole, refused, slow = run(scenario, backend=backend)
    assert (whole.status, whole.body) == (200, b"good " * 200)
    assert (refused.status, refused.headers["content-type"]) == (429, "application/problem+json")
    assert (slow.status, slow.headers["retry-after"] in {"1", "2"}, slow.error) == (503, True, None)


@pytest.mark.parametrize("guarded", [by_argument, by_method, from_outside])
def test_test_clients_take_it_for_an_application(guarded):
    seen = []

    @asynccontextmanager
    async def lifespan(app):
        seen.append("startup")
        yield {"state": "shared"}
        seen.append("shutdown")

    async def endpoint(request):
        return PlainTextResponse(request.state.state)

    async def echo(websocket):
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    routes = [Route("/", endpoint), WebSocketRoute("/echo", echo)]
    app = guarded(Starlette(routes=routes, lifespan=lifespan))
    with TestClient(app) as client:
        assert client.get("/").text == "shared"
        with client.websocket_connect("/echo") as connection:
            connection.send_text("a")
            assert connection.receive_text() == "a"
        assert seen == ["startup"]
    assert seen == ["startup", "shutdown"]


def test_the_state_outlives_the_middleware():
    app = app_of(good)
    limit = RateLimit("2/hour")
    app.add_middleware(ResilienceMiddleware, pipeline=limit)
    statuses = []
    for _ in range(3):
        app.middleware_stack = None  # frameworks build their middleware anew when something is added
        statuses.append(TestClient(app).get("/").status_code)
    assert statuses == [200, 200, 429]


@pytest.mark.parametrize("inside", [True, False])
def test_refusals_have_cors_headers_inside_of_cors(inside):
    app = app_of(good)
    ours = (ResilienceMiddleware, {"pipeline": used_up()})
    cors = (CORSMiddleware, {"allow_origins": ["*"]})
    for kind, options in (ours, cors) if inside else (cors, ours):  # the last one is the outermost
        app.add_middleware(kind, **options)
    client = TestClient(app)
    refused = client.get("/", headers=ORIGIN)
    assert refused.status_code == 429
    assert refused.headers.get("access-control-allow-origin") == ("*" if inside else None)
    preflight = client.options("/", headers={**ORIGIN, "access-control-request-method": "GET"})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, "*")


@pytest.mark.parametrize("inside", [True, False])
def test_compression(inside):
    async def fails(request):
        return PlainTextResponse("failed " * 200, int(request.url.query))

    app = Starlette(routes=[Route("/", good), Route("/fails", fails)])
    ours = (ResilienceMiddleware, {"pipeline": Fallback(JSONResponse(["other"] * 200), on={503})})
    gzip = (GZipMiddleware, {"minimum_size": 10})
    for kind, options in (ours, gzip) if inside else (gzip, ours):
        app.add_middleware(kind, **options)
    client = TestClient(app)
    whole, failed, replaced = client.get("/"), client.get("/fails?500"), client.get("/fails?503")
    assert (whole.text, whole.headers["content-encoding"]) == ("good " * 200, "gzip")
    assert (failed.status_code, failed.text) == (500, "failed " * 200)
    assert failed.headers["content-encoding"] == "gzip"
    assert replaced.json() == ["other"] * 200
    assert replaced.headers.get("content-encoding") == ("gzip" if inside else None)


# -- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guarded", [by_argument, by_method, from_outside])
@pytest.mark.parametrize("policies", [[], [Bulkhead(5)], [Retry(), Fallback(None, on=OSError)]])
def test_the_framework_answers_errors_and_raises_them(guarded, policies, backend):
    answer = run(ask, guarded(app_of(broken), pipeline=Pipeline(*policies)), backend=backend)
    assert (answer.status, answer.body) == (500, b"Internal Server Error")
    assert type(answer.error) is ValueError
    assert answer.types == ["start", "body"]


@pytest.mark.parametrize("guarded", [by_argument, by_method, from_outside])
@pytest.mark.parametrize("endpoint", [broken, unavailable])
def test_failures_are_seen_and_replaced(guarded, endpoint, backend):
    async def scenario():
        app = guarded(app_of(endpoint), pipeline=Pipeline(Fallback(PlainTextResponse("other")), breaker))
        return [await ask(app) for _ in range(3)]

    breaker = CircuitBreaker(consecutive=2)
    answers = run(scenario, backend=backend)
    assert [(answer.status, answer.body, answer.error) for answer in answers] == [(200, b"other", None)] * 3
    assert breaker.statistics().state == "open"


def test_an_error_of_a_guarded_client_is_no_server_error(backend):
    async def endpoint(request):
        raise CircuitOpen("of somebody behind", policy="secret")

    answer = run(ask, by_method(app_of(endpoint), pipeline=Timeout(2)), backend=backend)
    assert (answer.status, answer.error) == (503, None)
    assert b"secret" not in answer.body


async def read(request):
    return PlainTextResponse(await request.body())


async def stream(request):
    async def parts():
        yield b"one"
        yield b"two"

    return StreamingResponse(parts())


@pytest.mark.parametrize("guarded", [by_argument, by_method, from_outside])
@pytest.mark.parametrize("endpoint", [read, stream])
def test_a_client_that_goes_is_no_failure_of_the_application(guarded, endpoint, backend):
    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError("gone")

    async def scenario():
        with pytest.raises((ClientDisconnect, OSError)):
            await app(scope_of(), receive, send)

    breaker = CircuitBreaker(consecutive=1)
    app = guarded(app_of(endpoint), pipeline=breaker)
    run(scenario, backend=backend)
    assert breaker.statistics().failures == 0


def test_the_framework_does_not_answer_for_a_response_that_was_cut_off(backend):
    async def numbers():
        yield b"0"
        await anyio.sleep(100)

    async def endpoint(request):
        return StreamingResponse(numbers())

    async def scenario(spec, watch):
        app = by_method(app_of(endpoint), pipeline=Timeout(2), cancel_on_disconnect=watch)
        return await ask(app, asgi={"version": "3.0", "spec_version": spec})

    for spec in ("2.0", "2.3", "2.4"):
        for watch in (False, True):
            answer = run(scenario, spec, watch, backend=backend)
            assert (answer.types, answer.whole, type(answer.error)) == (["start", "body"], False, TimedOut)


# -- what applications leave behind ---------------------------------------------------------------------------


@pytest.mark.parametrize("policies", [[Timeout(5), Bulkhead(2)], [Retry()]])
@pytest.mark.parametrize("kind", [Starlette, FastAPI])
def test_what_is_outside_sees_the_route_and_the_context(kind, policies, backend):
    seen = {}

    async def item(item_id):
        VARIABLE.set(f"item {item_id}")
        return {}

    async def of_request(request):
        return PlainTextResponse(str(await item(request.path_params["item_id"])))

    async def outside(scope, receive, send):
        VARIABLE.set("")
        await guarded(scope, receive, send)
        seen.update(scope, variable=VARIABLE.get())

    async def by_fastapi(item_id: int):
        return await item(item_id)

    app = kind()
    app.router.add_route("/items/{item_id:int}", of_request) if kind is Starlette else app.get("/items/{item_id}")(
        by_fastapi
    )
    guarded = by_method(app, pipeline=Pipeline(*policies))
    assert run(ask, outside, "/items/7", backend=backend).status == 200
    assert seen["variable"] == "item 7"
    assert seen["endpoint"] is (of_request if kind is Starlette else by_fastapi)
    assert int(seen["path_params"]["item_id"]) == 7
    if kind is FastAPI:
        assert seen["route"].path == "/items/{item_id}"


@pytest.mark.parametrize("root_path", ["", "/proxied"])
def test_a_mounted_application_is_guarded_by_its_own_paths(root_path, backend):
    inner = Starlette(routes=[Route("/items", good), Route("/free", good)])
    guard = ResilienceMiddleware(inner, pipeline=Pipeline(), routes={"/items": used_up()})
    app = Starlette(routes=[Mount("/api", app=guard), Route("/items", good)])

    async def scenario():
        paths = ("/api/items", "/api/free", "/items", "/api/nothing")
        return [(await ask(app, root_path + path, root_path=root_path)).status for path in paths]

    assert run(scenario, backend=backend) == [429, 200, 200, 404]


# -- FastAPI --------------------------------------------------------------------------------------------------


def test_sync_and_async_endpoints():
    app = FastAPI()

    @app.get("/sync")
    def sync():
        return {"left": deadline.remaining() is not None}

    @app.get("/async")
    async def asynchronous():
        return {"left": deadline.remaining() is not None}

    client = TestClient(by_method(app, pipeline=Pipeline(Timeout(60), Bulkhead(2), Retry())))
    assert client.get("/sync").json() == {"left": True}  # the deadline goes with it into its thread
    assert client.get("/async").json() == {"left": True}
    assert client.get("/nothing").status_code == 404


def test_dependencies_are_left_when_the_time_is_up(backend):
    app, trace = FastAPI(), []

    async def session():
        trace.append("opened")
        try:
            yield
        except BaseException as error:
            trace.append("rolled back" if isinstance(error, anyio.get_cancelled_exc_class()) else repr(error))
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            trace.append("closed")

    @app.get("/", dependencies=[Depends(session)])
    async def endpoint():
        await anyio.sleep(100)

    answer = run(ask, by_method(app, pipeline=Timeout(2)), backend=backend)
    assert (answer.status, answer.error) == (503, None)
    assert trace == ["opened", "rolled back", "closed"]


def test_background_tasks_outlive_the_timeout(backend):
    app, trace, bulkhead = FastAPI(), [], Bulkhead(1)

    async def work():
        await anyio.sleep(100)
        trace.append((bulkhead.statistics().in_use, deadline.remaining()))

    @app.get("/")
    async def endpoint(tasks: BackgroundTasks):
        tasks.add_task(work)
        return "answered"

    answer = run(ask, by_method(app, pipeline=Pipeline(Timeout(2), bulkhead)), backend=backend)
    assert (answer.status, answer.body, answer.error) == (200, b'"answered"', None)
    assert trace == [(1, None)]


def test_streaming_responses(backend):
    app, sent = FastAPI(), []

    async def numbers():
        for number in range(3):
            sent.append(number)
            yield b"%d" % number
            await anyio.sleep(1)

    @app.get("/")
    async def endpoint():
        return StreamingResponse(numbers())

    pipeline = Pipeline(Fallback(None), Retry(), Timeout(50))
    answer = run(ask, by_method(app, pipeline=pipeline), backend=backend)
    assert (answer.types, answer.body) == (["start", *["body"] * 4], b"012")


@pytest.mark.parametrize("inside", [True, False])
def test_function_middleware(inside, backend):
    app = FastAPI()

    @app.get("/good")
    async def endpoint(tasks: BackgroundTasks):
        return "good"

    app.add_api_route("/late", sleeps)
    if not inside:
        by_method(app, pipeline=Timeout(2))

    @app.middleware("http")
    async def add_header(request, call_next):
        response = await call_next(request)
        response.headers["x-added"] = "yes"
        return response

    if inside:
        by_method(app, pipeline=Timeout(2))

    async def scenario():
        return await ask(app, "/good"), await ask(app, "/late")

    whole, slow = run(scenario, backend=backend)
    assert (whole.status, whole.headers["x-added"], whole.error) == (200, "yes", None)
    assert (slow.status, slow.headers.get("x-added"), slow.error) == (503, None if inside else "yes", None)


async def sleeps():
    await anyio.sleep(100)
