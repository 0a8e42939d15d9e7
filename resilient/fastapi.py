"""Rate limits as dependencies of FastAPI.

    app = FastAPI()
    install(app)

    @app.get("/search", dependencies=[Depends(limit("5/minute"))])
    async def search(q: str): ...

The route needs no parameter for it. What is left of a limit is told in the fields of every response, whether the
route returns a value or a `Response` or raises an `HTTPException`; for that there is `install`, as a dependency
does not see what is sent. A request that is over the limit is refused as by the middleware, before the route is
called, and the 429 is in the OpenAPI schema.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from fastapi import FastAPI, routing
from fastapi.dependencies.models import Dependant
from starlette.exceptions import WebSocketException
from starlette.requests import HTTPConnection

from resilient.asgi.clients import client_address
from resilient.asgi.limits import NOTED
from resilient.asgi.middleware import REFUSED, ResilienceMiddleware
from resilient.call import Call
from resilient.edge import Edge
from resilient.errors import RateLimited
from resilient.pipeline import Pipeline
from resilient.policies.rate_limit import RateLimit
from resilient.policy import Policy
from resilient.rate import Rate

__all__ = ["Limit", "install", "limit"]

_INSTALLED = "resilient.installed"  # where in the scope the innermost application is that has the middleware
_TRY_AGAIN_LATER = 1013
# Newer versions of FastAPI do not make the routes of an included router routes of the application any more.
_each_of: Callable[[Any], Iterator[Any]] = getattr(routing, "iter_route_contexts", iter)
_PROBLEM = {
    "type": "object",
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "violated-policies": {"type": "array", "items": {"type": "string"}},
    },
}
_RESPONSE: dict[str, Any] = {
    "description": "Too many requests",
    "headers": {
        "Retry-After": {"description": "In how many seconds to try again", "schema": {"type": "integer"}},
        "RateLimit": {"description": "What is left of the limits", "schema": {"type": "string"}},
        "RateLimit-Policy": {"description": "What the limits are", "schema": {"type": "string"}},
    },
    "content": {"application/problem+json": {"schema": _PROBLEM}},
}


class _Edge(Edge):
    """The edge of a dependency: it remembers what a request was counted by, as the middleware tells that."""

    notes_keys = True


_EDGE = _Edge()


class _Count(Call):
    """One request that is counted.

    Attributes:
        key: What it is counted by; no value until it is known.
    """

    __slots__ = ("key",)

    edge = _EDGE

    key: Hashable

    def note_key(self, _limit: RateLimit, key: Hashable) -> None:
        """Remember the key."""
        self.key = key


class Limit:
    """A dependency that counts requests by a rate limit; made by `limit`.

    Args:
        policy: The limit; share the object to share what is left.
    """

    def __init__(self, policy: RateLimit) -> None:
        self.policy = policy
        self._chain = policy.achain(_EDGE)

    def __repr__(self) -> str:
        return f"Limit({self.policy!r})"

    async def __call__(self, connection: HTTPConnection) -> None:
        """Count a request, or the handshake of a websocket.

        Raises:
            RateLimited: There were too many, for the middleware to answer.
            WebSocketException: The same for a websocket, which FastAPI refuses by it.
            RuntimeError: `install` was not called for the application of the route.
        """
        scope = connection.scope
        noted = scope.get(NOTED)
        # A mounted application answers 500 to what it does not know, before the middleware around it could see it.
        if scope["type"] == "http" and (noted is None or scope[_INSTALLED] is not scope["app"]):
            raise RuntimeError(
                f"{self!r} needs the middleware: call resilient.fastapi.install(app) where you make the "
                "application that has the route, a mounted one too"
            )
        call = _Count(_admitted, (scope,), {})
        try:
            await self._chain(call)
        except RateLimited as error:
            if noted is None:
                raise WebSocketException(_TRY_AGAIN_LATER, "Quota exceeded") from error
            scope[REFUSED].append(error)
            raise
        finally:
            if noted is not None and (self.policy.key is None or hasattr(call, "key")):
                noted.append((self.policy, getattr(call, "key", None)))


def limit(
    rate: str | Rate | RateLimit,
    *,
    key: Callable[[Any], Hashable] | None = client_address,
    burst: int | None = None,
    name: str | None = None,
) -> Limit:
    """Return a dependency that lets so many requests through in so much time, as in `Depends(limit("5/minute"))`.

    Each one that is made has a state of its own; use it at several routes to have them share it.

    Args:
        rate: How many requests: `"100/minute"`, a `Rate`, or a `RateLimit`, which then has all other options
            itself.
        key: What they are counted by, a function of the scope; None counts all of them together. Default
            `client_address`, the peer: see it for services behind a proxy.
        burst: How many may come at once after a quiet time. Default: as many as the rate names.
        name: What the limit is called in the `RateLimit` fields. Default `"default"`.

    Raises:
        ValueError: A bad option.
        TypeError: An option of the wrong type.
    """
    if isinstance(rate, RateLimit):
        for option, given, default in (("key", key, client_address), ("burst", burst, None), ("name", name, None)):
            if given is not default:
                raise TypeError(f"limit: {option}={given!r} is not allowed beside a RateLimit; give it to that")
        return Limit(rate)
    return Limit(RateLimit(rate, key=key, burst=burst, name=name))


def install(app: FastAPI, *, pipeline: Policy | None = None, **options: Any) -> None:
    """Add the middleware that the limits of an application need, and their 429 to its OpenAPI schema.

    Args:
        app: The application.
        pipeline: A pipeline for all its requests. Default None: none but the limits of the routes.
        **options: Those of `ResilienceMiddleware`.

    Raises:
        TypeError: No application of FastAPI, or a bad option.
        ValueError: A bad option.
        RuntimeError: The application has begun to serve.
    """
    if not isinstance(app, FastAPI):
        raise TypeError(f"install: app={app!r} is not allowed; give an application of FastAPI")
    _LimitsMiddleware(app, pipeline=pipeline or Pipeline(), **options)  # a bad option is refused here and now
    app.add_middleware(_LimitsMiddleware, pipeline=pipeline or Pipeline(), **options)
    schema_of = app.openapi

    def openapi() -> dict[str, Any]:
        schema = schema_of()
        for route in _each_of(app.routes):
            dependant, methods = getattr(route, "dependant", None), getattr(route, "methods", None)
            if dependant is not None and any(_limits_of(dependant)):
                for method in methods or ():  # a websocket has none
                    operation = schema["paths"].get(route.path_format, {}).get(method.lower())
                    if operation is not None:
                        operation["responses"].setdefault("429", _RESPONSE)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


class _LimitsMiddleware(ResilienceMiddleware):
    """The middleware, with places in the scope where dependencies note what they have counted by and refused."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope.setdefault(NOTED, [])
            scope.setdefault(REFUSED, [])
            scope[_INSTALLED] = scope["app"]
        await super().__call__(scope, receive, send)


async def _admitted(_scope: Any) -> None:
    """Stand in for the function that a limit guards."""


def _limits_of(dependant: Dependant) -> Iterator[Limit]:
    for each in dependant.dependencies:
        if isinstance(each.call, Limit):
            yield each.call
        yield from _limits_of(each)
