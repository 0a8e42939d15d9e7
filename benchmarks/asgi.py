"""The cases of ASGI applications: what the middleware costs, beside slowapi.

The application is a trivial one of Starlette, called by hand: no server and no socket (see `servers` for these). A
subject is a function that takes a limit, makes such an application of its own and guards it, inside of Starlette
as the documentation of each has it. All of them tell their limit in the headers of each response.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import resilient
from benchmarks.cases import HAND
from benchmarks.harness import OURS, Case, Colour, Row
from resilient.asgi import ResilienceMiddleware, client_address

CASE = "ASGI request"
APP = "bare app"
PRESET = f"{OURS}, preset"
RIVAL = "slowapi"
PLENTY = "100000000/minute"
ROUNDS = 3
MOST_ADDED = 0.5  # of a bare request
MOST_SHARE = 1 / 3  # of what the rival adds

SCOPE = {
    "type": "http",
    "asgi": {"version": "3.0", "spec_version": "2.3"},
    "http_version": "1.1",
    "server": ("127.0.0.1", 8000),
    "client": ("192.0.2.1", 50000),
    "scheme": "http",
    "method": "GET",
    "root_path": "",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "headers": [(b"host", b"localhost:8000"), (b"user-agent", b"benchmark/1.0"), (b"accept", b"*/*")],
}  # as uvicorn makes it

Subject = Callable[..., Any]


# -- applications ---------------------------------------------------------------------------------------------


def bare() -> Any:
    return _app(_hello)


async def _hello(request):
    from starlette.responses import JSONResponse

    return JSONResponse({"hello": "world"})


def _app(endpoint: Any) -> Any:
    from starlette.applications import Starlette
    from starlette.routing import Route

    return Starlette(routes=[Route("/", endpoint)])


def resilient_guard(limit: str = PLENTY) -> Any:
    guard = resilient.Pipeline(
        resilient.RateLimit(limit, key=client_address), resilient.Timeout(10), resilient.Bulkhead(200)
    )
    app = bare()
    app.add_middleware(ResilienceMiddleware, pipeline=guard)
    return app


def resilient_preset(limit: str | None = None) -> Any:
    app = bare()
    app.add_middleware(ResilienceMiddleware, pipeline=resilient.presets.http_server(rate=limit))
    return app


def resilient_limit(limit: str = PLENTY) -> Any:
    app = bare()
    app.add_middleware(ResilienceMiddleware, pipeline=resilient.RateLimit(limit, key=client_address))
    return app


def _slowapi(limiter: Any, endpoint: Any) -> Any:
    import slowapi.errors

    app = _app(endpoint)
    app.state.limiter = limiter
    app.add_exception_handler(slowapi.errors.RateLimitExceeded, slowapi._rate_limit_exceeded_handler)
    return app


def slowapi_asgi(limit: str = PLENTY) -> Any:
    return _slowapi_middleware("SlowAPIASGIMiddleware", limit)


def slowapi_middleware(limit: str = PLENTY) -> Any:
    return _slowapi_middleware("SlowAPIMiddleware", limit)


def _slowapi_middleware(name: str, limit: str) -> Any:
    import slowapi.middleware
    import slowapi.util

    by = slowapi.util.get_remote_address
    app = _slowapi(slowapi.Limiter(key_func=by, default_limits=[limit], headers_enabled=True), _hello)
    app.add_middleware(getattr(slowapi.middleware, name))
    return app


def slowapi_decorator(limit: str = PLENTY) -> Any:
    import slowapi.util
    from starlette.responses import JSONResponse

    limiter = slowapi.Limiter(key_func=slowapi.util.get_remote_address, headers_enabled=True)

    @limiter.limit(limit)
    async def hello(request):
        return JSONResponse({"hello": "world"})

    return _slowapi(limiter, hello)


def by_hand(limit: str = PLENTY) -> Any:
    app = bare()
    app.add_middleware(partial(_ByHand, limit=int(limit.partition("/")[0])))
    return app


class _ByHand:
    """A rate limit by the minute, a timeout and a bulkhead, as one would write them for one application."""

    def __init__(self, app, limit):
        self.app = app
        self.limit = limit
        self.step = 60 / limit
        self.drained: dict[str, float] = {}
        self.running = 0
        self.policy = b'"default";q=%d;w=60' % limit

    async def __call__(self, scope, receive, send):
        now, client = time.monotonic(), scope["client"][0]
        due = max(self.drained.get(client, 0.0), now) + self.step
        left = int((60 - (due - now)) / self.step + 0.5)
        state = b'"default";r=%d;t=%d' % (left, due - now + 1)

        async def tell(message):
            if message["type"] == "http.response.start":
                fields = [(b"ratelimit-policy", self.policy), (b"ratelimit", state)]
                message = {**message, "headers": [*message["headers"], *fields]}
            await send(message)

        if due - now > 60 + self.step / 2:
            await self.refuse(429, scope, receive, send)
            return
        self.drained[client] = due
        if self.running >= 200:
            await self.refuse(503, scope, receive, send)
            return
        self.running += 1
        try:
            async with asyncio.timeout(10):
                await self.app(scope, receive, tell)
        except TimeoutError:
            await self.refuse(503, scope, receive, send)
        finally:
            self.running -= 1

    async def refuse(self, status, scope, receive, send):
        from starlette.responses import JSONResponse

        await JSONResponse({"status": status}, status)(scope, receive, send)


SUBJECTS: dict[str, Subject] = {
    OURS: resilient_guard,
    PRESET: resilient_preset,
    f"{OURS}, RateLimit alone": resilient_limit,
    f"{RIVAL} (ASGI middleware)": slowapi_asgi,
    f"{RIVAL} (middleware)": slowapi_middleware,
    f"{RIVAL} (decorator)": slowapi_decorator,
    HAND: by_hand,
}
"""Applications, and how they are guarded; limits never reached are the default."""


# -- what is called in the loop -------------------------------------------------------------------------------


def requests_to(app: Any, messages: list[Any] | None = None) -> Callable[..., Any]:
    """Return a GET to an application, without a server; it returns the status.

    Args:
        app: The application.
        messages: What it sends goes here. Default: a list that nobody sees.
    """
    sent: list[Any] = [] if messages is None else messages

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    async def request(**changes):
        sent.clear()
        scope = {**SCOPE, **changes}
        scope["state"] = {}
        await app(scope, receive, send)
        return sent[0]["status"]

    return request


async def limits(make: Subject, colour: Colour) -> None:
    """Check that a client gets as many requests as the limit says, that others do too, and that it is told."""
    messages: list[Any] = []
    request = requests_to(make(limit="2/minute"), messages)
    assert (status := await request()) == 200, f"answered the first request with {status}"
    told = {name for name, _value in messages[0]["headers"]}
    assert told & {b"ratelimit", b"x-ratelimit-remaining"}, "does not tell its limit"
    statuses = [await request() for _ in range(3)]
    assert statuses == [200, 429, 429], f"answered with {statuses} after 1 of 2 requests in a minute"
    status = await request(client=("192.0.2.2", 50000))
    assert status == 200, f"answered another client with {status}"


def _prepare(make: Subject, colour: Colour) -> Callable[[], Any]:
    return requests_to(make())


CASES = [
    Case(
        CASE,
        "async",
        SUBJECTS,
        limits,
        prepare=_prepare,
        answer=200,
        bare=lambda colour: requests_to(bare()),
        unit=APP,
        rounds=ROUNDS,
        target=1 + MOST_ADDED,
        note="RateLimit | Timeout | Bulkhead",
    )
]


# -- what is added --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AddedRow(Row):
    """A row of which counts what the guard adds.

    Attributes:
        added: What it adds to a request, in units of the bare one; None if it was not measured.
        share: The same in units of what the cheapest way of the rival adds; None if that was not measured.
        most_share: The share that this library sets out to reach, or None.
    """

    added: float | None = None
    share: float | None = None
    most_share: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether all that was set out for was reached; None if that is nothing, or if there is no number."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target and (
            self.most_share is None or self.share is None or self.share <= self.most_share
        )


def compared(rows: Sequence[Row]) -> list[Row]:
    """Return rows with what each guard adds, if they are of this case; others as they are."""
    cheapest = min(
        (row.ratio - 1 for row in rows if row.ratio is not None and row.subject.startswith(RIVAL)), default=None
    )
    return [_compared(row, cheapest) if row.case == CASE else row for row in rows]


def _compared(row: Row, cheapest: float | None) -> Row:
    fields = (row.case, row.colour, row.subject, row.ns, row.ratio, row.target, row.note, row.to_beat)
    if row.ratio is None or row.subject == APP:
        return AddedRow(*fields)
    added = row.ratio - 1
    share = added / cheapest if cheapest else None
    return AddedRow(*fields, added, share, MOST_SHARE if row.subject == OURS else None)
