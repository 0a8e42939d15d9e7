"""Rate limits as dependencies of FastAPI."""

import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from resilient import RateLimit, Timeout
from resilient.asgi import ResilienceMiddleware
from resilient.fastapi import install, limit
from resilient.testing import run

from .driver import ask, scope_of


@pytest.fixture
def app():
    app = FastAPI()
    install(app)
    return app


def at_a(app, *limits, **options):
    """Have an application answer at /a under limits."""

    @app.get("/a", dependencies=[Depends(each) for each in limits], **options)
    async def route():
        return {"ok": True}

    return app


async def thrice(app, path="/a"):
    return [await ask(app, path) for _ in range(3)]


def test_a_limit_is_a_dependency(app, backend):
    answers = run(thrice, at_a(app, limit("2/minute")), backend=backend)
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert [answer.headers["ratelimit"] for answer in answers] == [
        '"default";r=1;t=30',
        '"default";r=0;t=30',
        '"default";r=0;t=30',
    ]
    assert answers[2].headers["content-type"] == "application/problem+json"
    assert answers[2].headers["retry-after"] == "30"
    assert b'"violated-policies": ["default"]' in answers[2].body


def test_middleware_in_between_may_copy_the_scope():
    class Copying:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            await self.app({**scope}, receive, send)

    app = FastAPI(middleware=[Middleware(Copying)])
    install(app)
    answers = run(thrice, at_a(app, limit("2/minute")))
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert b'"violated-policies": ["default"]' in answers[2].body


@pytest.mark.parametrize("outcome", [HTTPException(404), PlainTextResponse("a response of its own"), {"ok": True}])
def test_the_fields_survive_whatever_the_route_does(app, outcome):
    @app.get("/a")
    def route(_limited=Depends(limit("2/minute"))):
        if isinstance(outcome, HTTPException):
            raise outcome
        return outcome

    answer = run(ask, app, "/a")
    assert answer.status == (404 if isinstance(outcome, HTTPException) else 200)
    assert answer.headers["ratelimit-policy"] == '"default";q=2;w=60'


def test_several_limits_and_those_of_the_pipeline():
    app = FastAPI()
    install(app, pipeline=RateLimit("9/minute", name="all"), legacy_headers=True)
    at_a(app, limit("2/minute", key=None, name="route"), limit(RateLimit("5/minute", name="shared")))
    answer = run(ask, app, "/a")
    assert answer.headers["ratelimit"] == '"all";r=8;t=7, "route";r=1;t=30, "shared";r=4;t=12'
    assert answer.headers["x-ratelimit-remaining"] == "1"


def test_clients_are_counted_one_by_one(app):
    async def scenario():
        at_a(app, limit("1/minute"))
        peers = [("192.0.2.1", 1), ("192.0.2.1", 2), ("192.0.2.2", 1)]
        return [(await ask(app, "/a", client=peer)).status for peer in peers]

    assert run(scenario) == [200, 429, 200]


def test_routes_share_a_limit_if_they_share_the_object(app):
    shared, router = limit("1/minute"), APIRouter(dependencies=[Depends(limit("9/minute"))])

    @router.get("/b")
    @router.get("/c")
    async def route(_limited=Depends(shared)):
        return None

    app.include_router(router)

    async def scenario():
        return [(await ask(app, path)).status for path in ("/b", "/c")]

    assert run(scenario) == [200, 429]


def test_the_429_is_in_the_schema(app):
    at_a(app, limit("1/minute"), responses={200: {"description": "Fine"}})
    router = APIRouter(prefix="/r", dependencies=[Depends(limit("9/minute"))])

    @router.post("/{id:int}", responses={429: {"description": "Mine"}})
    async def own(id: int):  # noqa: A002
        return None

    def nested(_limited=Depends(limit("9/minute"))):
        return None

    @app.get("/nested", dependencies=[Depends(nested)])
    @app.get("/hidden", dependencies=[Depends(nested)], include_in_schema=False)
    async def deep():
        return None

    @app.get("/free")
    async def free():
        return None

    @router.get("/list")
    async def listed():
        return None

    @router.websocket("/ws")
    async def no_operation(websocket: WebSocket):
        return None

    around, inside = APIRouter(), APIRouter()

    @inside.get("/inside")
    async def within():
        return None

    around.include_router(inside, prefix="/v1", dependencies=[Depends(limit("9/minute"))])
    app.include_router(router)
    app.include_router(around)
    for _ in range(2):
        paths = app.openapi()["paths"]
        assert "429" not in paths["/free"]["get"]["responses"]
        assert paths["/r/{id}"]["post"]["responses"]["429"]["description"] == "Mine"
        for path in ("/a", "/nested", "/r/list", "/v1/inside"):
            told = paths[path]["get"]["responses"]["429"]
            assert set(told["headers"]) == {"Retry-After", "RateLimit", "RateLimit-Policy"}
            assert "application/problem+json" in told["content"]


def test_a_websocket_is_refused(app):
    @app.websocket("/ws")
    async def route(websocket: WebSocket, _limited=Depends(limit("1/minute"))):
        await websocket.accept()
        await websocket.close()

    async def scenario():
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        for _ in range(2):
            scope = {**scope_of("/ws"), "type": "websocket", "subprotocols": []}
            await app(scope, receive, send)
        return [message["type"] for message in sent], sent[-1]["code"]

    assert run(scenario) == (["websocket.accept", "websocket.close", "websocket.close"], 1013)


def test_without_the_middleware_a_limit_says_what_is_missing():
    app = at_a(FastAPI(), limit("1/minute"))
    answer = run(ask, app, "/a")
    assert isinstance(answer.error, RuntimeError)
    assert "call resilient.fastapi.install(app) where" in str(answer.error)


def test_without_the_middleware_of_its_own_a_limit_of_a_mounted_application_says_so():
    app = FastAPI()
    install(app)
    app.mount("/inner", at_a(FastAPI(), limit("1/minute")))
    answer = run(ask, app, "/inner/a")
    assert isinstance(answer.error, RuntimeError)
    assert "a mounted one too" in str(answer.error)


def test_the_middleware_of_a_mounted_application_keeps_what_was_noted():
    inner, outer = FastAPI(), FastAPI()
    install(inner)
    install(outer)
    outer.mount("/inner", at_a(inner, limit("2/minute")))
    assert [answer.status for answer in run(thrice, outer, "/inner/a")] == [200, 200, 429]


def test_the_limit_of_the_middleware_and_that_of_a_route_are_both_told():
    app = FastAPI()
    install(app, pipeline=RateLimit("9/minute", name="all"))
    answer = run(ask, at_a(app, limit("2/minute", name="route")), "/a")
    (told,) = [value for name, value in answer.messages[0]["headers"] if name == b"ratelimit"]
    assert [member.partition(b";")[0] for member in told.split(b", ")] == [b'"all"', b'"route"']


def test_one_middleware_of_several_tells_of_a_limit():
    app = FastAPI()
    install(app)
    app.add_middleware(ResilienceMiddleware, pipeline=RateLimit("9/minute", name="all"))
    for answer in run(thrice, at_a(app, limit("2/minute", name="route"))):
        told = [value for name, value in answer.messages[0]["headers"] if name == b"ratelimit"]
        names = [member.partition(b";")[0] for member in b", ".join(told).split(b", ")]
        assert names == [b'"route"', b'"all"']


@pytest.mark.parametrize(
    ("app", "options", "kind", "message"),
    [
        (3, {}, TypeError, "app=3 is not allowed; give an application of FastAPI"),
        (FastAPI(), {"gateway": 3}, TypeError, "gateway=3"),
        (FastAPI(), {"pipeline": 3}, TypeError, "pipeline=3"),
    ],
)
def test_what_cannot_be_installed(app, options, kind, message):
    with pytest.raises(kind, match=message):
        install(app, **options)


@pytest.mark.parametrize(("rate", "kind"), [("often", ValueError), (3, TypeError), (Timeout(2), TypeError)])
def test_a_bad_limit_is_refused(rate, kind):
    with pytest.raises(kind, match="RateLimit: rate="):
        limit(rate)


@pytest.mark.parametrize("options", [{"key": None}, {"burst": 2}, {"name": "mine"}])
def test_options_beside_a_rate_limit_are_refused(options):
    with pytest.raises(TypeError, match=f"limit: {next(iter(options))}=.* beside a RateLimit"):
        limit(RateLimit("5/minute"), **options)


def test_a_limit_says_what_it_is():
    assert repr(limit("5/minute", key=None)) == "Limit(RateLimit(Rate(5, per=60), burst=5))"


def test_the_key_is_asked_once(app):
    def key(scope):
        asked.append(scope["path_params"]["tenant"])
        return asked[-1]

    @app.get("/{tenant}", dependencies=[Depends(limit("2/minute", key=key))])
    async def route(tenant: str):
        return tenant

    asked = []
    answers = run(thrice, app, "/acme")
    assert asked == ["acme"] * 3
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[1].headers["ratelimit"] == '"default";r=0;t=30'


def test_the_middleware_can_be_mounted_by_hand_too():
    app = FastAPI()
    app.add_middleware(ResilienceMiddleware, pipeline=RateLimit("1/minute"))
    assert [answer.status for answer in run(thrice, at_a(app))] == [200, 429, 429]
