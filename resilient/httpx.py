"""Resilient clients of `httpx`; `resilient.httpx2` offers the same for `httpx2`.

    client = httpx.Client(transport=ResilientTransport())
    transport = httpx.AsyncHTTPTransport(http2=True)
    client = httpx.AsyncClient(transport=AsyncResilientTransport(transport, pipeline=guard))

A transport is put around another one, and everything else of the client works as before: authentication, cookies,
redirects, event hooks, mounts, streaming. Each hop of a redirect and each step of an authentication is a request
of its own to the pipeline.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import httpx

from resilient.http.auth import TokenFlow, TokenRefreshFailed
from resilient.http.balancer import AsyncBalancer, Balancer, SyncBalancer
from resilient.http.edge import Repeatable, origin
from resilient.http.family import Family
from resilient.http.installation import Installation, install_in
from resilient.http.tokens import Token
from resilient.http.transport import AsyncGuard, SyncGuard
from resilient.policy import Policy

__all__ = [
    "AsyncLoadBalancer",
    "AsyncResilientTransport",
    "Installation",
    "LoadBalancer",
    "ResilientTransport",
    "Token",
    "TokenAuth",
    "TokenRefreshFailed",
    "install",
    "origin",
]

_FAMILY = Family(httpx, __name__)


class ResilientTransport(SyncGuard, httpx.BaseTransport):
    """A pipeline around a sync transport.

    Deadlines hold for all of a request, its body included; those inside of a `Retry` for one attempt, until its
    headers are there, and so do those inside of another one if there is no `Retry`. Before anything that may
    block, the sockets of `httpx.HTTPTransport` look at what is left; what they cannot bound is in
    `resilient.http.network`. Other transports are looked at between two steps.

    Args:
        transport: The transport to guard. Give your own for TLS, HTTP/2, proxies or limits, as the client ignores
            these options once it is given a transport. Default None: `httpx.HTTPTransport()`.
        pipeline: The policies, a `Pipeline` or a single one. Transports that share it share its state. Default
            None: `resilient.presets.http_client()`.
        repeatable: What may be sent again besides idempotent methods and requests with an `Idempotency-Key`:
            methods such as `{"POST"}`, or a function of the request. A body that can be read only once is never
            sent again. Default: nothing.
        key: A function of the request that returns the partition (hashable) for breakers, rate limits and retry
            budgets. Default: its origin.
        buffer: True reads bodies of up to 1 MiB as part of the attempt, so that one that breaks off is tried
            again; a number sets another bound in bytes. What is longer is passed on from where it is; server-sent
            events are never read ahead. Default False: a body that breaks is the error of who reads it.
        deadline_header: The header that tells the server how long this attempt will wait, if there is a deadline:
            `"grpc-timeout"`, `"x-envoy-expected-rq-timeout-ms"` (in milliseconds as all names that end so), or one
            in seconds. One that the request has already stays as it is. Default None: servers are told nothing.

    Raises:
        TypeError: A transport of another package or colour, or a bad option.
        httpx.TimeoutException: A deadline passed (at requests): a `resilient.TimedOut` too.
        httpx.TransportError: A policy refused the request: a `resilient.Rejected` too, such as `CircuitOpen`.
    """

    _family = _FAMILY

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        pipeline: Policy | None = None,
        repeatable: Repeatable = (),
        key: Callable[[httpx.Request], Hashable] = origin,
        buffer: bool | int = False,
        deadline_header: str | None = None,
    ) -> None:
        super().__init__(
            transport,
            pipeline=pipeline,
            repeatable=repeatable,
            key=key,
            buffer=buffer,
            deadline_header=deadline_header,
        )

    if TYPE_CHECKING:

        def handle_request(self, request: httpx.Request) -> httpx.Response: ...


class AsyncResilientTransport(AsyncGuard, httpx.AsyncBaseTransport):
    """A pipeline around an async transport, on asyncio and on trio.

    Args:
        transport: The transport to guard. Default None: `httpx.AsyncHTTPTransport()`.
        pipeline: The policies. Default None: `resilient.presets.http_client()`.
        repeatable: What may be sent again, see `ResilientTransport`.
        key: A function of the request that returns the partition, see `ResilientTransport`.
        buffer: Whether bodies are read as part of the attempt, see `ResilientTransport`.
        deadline_header: The header that tells servers how long we wait, see `ResilientTransport`.

    Raises:
        TypeError: A transport of another package or colour, or a bad option.
        httpx.TimeoutException: A deadline passed (at requests): a `resilient.TimedOut` too.
        httpx.TransportError: A policy refused the request: a `resilient.Rejected` too, such as `CircuitOpen`.
    """

    _family = _FAMILY

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        pipeline: Policy | None = None,
        repeatable: Repeatable = (),
        key: Callable[[httpx.Request], Hashable] = origin,
        buffer: bool | int = False,
        deadline_header: str | None = None,
    ) -> None:
        super().__init__(
            transport,
            pipeline=pipeline,
            repeatable=repeatable,
            key=key,
            buffer=buffer,
            deadline_header=deadline_header,
        )

    if TYPE_CHECKING:

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response: ...


class LoadBalancer(SyncBalancer, httpx.BaseTransport):  # noqa: D101 - below
    __doc__ = Balancer.__doc__
    _family = _FAMILY

    if TYPE_CHECKING:

        def handle_request(self, request: httpx.Request) -> httpx.Response: ...


class AsyncLoadBalancer(AsyncBalancer, httpx.AsyncBaseTransport):  # noqa: D101 - below
    __doc__ = Balancer.__doc__
    _family = _FAMILY

    if TYPE_CHECKING:

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response: ...


class TokenAuth(TokenFlow, httpx.Auth):  # noqa: D101 - below
    __doc__ = "Bearer tokens that are renewed in time.\n\n" + (TokenFlow.__doc__ or "").partition("\n\n")[2]
    _family = _FAMILY


def install(
    client: httpx.Client | httpx.AsyncClient,
    pipeline: Policy | None = None,
    *,
    repeatable: Repeatable = (),
    key: Callable[[httpx.Request], Hashable] = origin,
    buffer: bool | int = False,
    deadline_header: str | None = None,
) -> Installation:
    """Guard a client that exists already, such as the one that an SDK has made.

    Args:
        client: The client; all its transports are wrapped, its mounts too.
        pipeline: The policies. Default None: `resilient.presets.http_client()`.
        repeatable: What may be sent again, see `ResilientTransport`.
        key: A function of the request that returns the partition, see `ResilientTransport`.
        buffer: Whether bodies are read as part of the attempt, see `ResilientTransport`.
        deadline_header: The header that tells servers how long we wait, see `ResilientTransport`.

    Returns:
        The installation: `uninstall()` undoes it, and so does the end of `with install(client):`.

    Raises:
        TypeError: Not a client of `httpx`.
        ValueError: It is guarded already.
    """
    kinds = (ResilientTransport, AsyncResilientTransport)
    return install_in(
        client,
        pipeline,
        kinds,
        repeatable=repeatable,
        key=key,
        buffer=buffer,
        deadline_header=deadline_header,
    )
