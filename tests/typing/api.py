"""What type checkers see of the public surface: mypy --strict and pyright --strict both pass this file.

Nothing here runs; every function states what its types should be.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from datetime import timedelta
from typing import Any, assert_type

import httpx
import httpx2
import tenacity
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response

import resilient.httpx
import resilient.httpx2
from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Event,
    FailedResponse,
    FailedResult,
    Fallback,
    Keyed,
    Pipeline,
    Policy,
    Priority,
    Rate,
    RateLimit,
    RateLimited,
    Rejected,
    ResilientError,
    Retry,
    RetryBudget,
    TimedOut,
    Timeout,
    deadline,
    events,
    instrument,
    listen,
    presets,
)
from resilient.asgi import Drain, Health, Refusal, ResilienceMiddleware, client_address, header, user
from resilient.asgi.exchange import Scope
from resilient.fastapi import Limit, install, limit
from resilient.presets import http_server

guard = Pipeline(Timeout(30), Retry(on=OSError), CircuitBreaker(), Timeout(2))


# -- decorated functions keep their types ----------------------------------------------------------------------


@guard
def fetch(url: str, *, limit: int = 3) -> list[bytes]:
    return [url.encode()] * limit


@guard
async def afetch(url: str, *, limit: int = 3) -> list[bytes]:
    return [url.encode()] * limit


@Retry(on=OSError)
@CircuitBreaker(consecutive=5)
def twice(number: int) -> int:
    return 2 * number


def sync_functions() -> None:
    assert_type(fetch("x"), list[bytes])
    assert_type(fetch("x", limit=2), list[bytes])
    assert_type(twice(2), int)
    as_callable: Callable[[int], int] = twice
    assert_type(as_callable(1), int)
    assert_type(guard(len)("abc"), int)


def misuse_of_sync_functions() -> None:
    fetch(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    fetch("x", 3)  # type: ignore[call-arg,misc,unused-ignore] # pyright: ignore[reportCallIssue]
    twice()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]


async def async_functions() -> None:
    assert_type(await afetch("x"), list[bytes])
    as_coroutine: Coroutine[Any, Any, list[bytes]] = afetch("x")
    task = asyncio.create_task(afetch("x"))
    assert_type(task, asyncio.Task[list[bytes]])
    assert_type(await task, list[bytes])
    assert_type(await asyncio.gather(afetch("x"), afetch("y")), tuple[list[bytes], list[bytes]])
    async with asyncio.TaskGroup() as group:
        assert_type(group.create_task(as_coroutine), asyncio.Task[list[bytes]])
    await afetch(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# -- methods ----------------------------------------------------------------------------------------------------


class Client:
    @guard
    def get(self, key: str) -> int:
        return len(key)

    @guard
    async def aget(self, key: str) -> int:
        return len(key)

    @classmethod
    @guard
    def made(cls, key: str) -> "Client":
        return cls()

    @staticmethod
    @guard
    def size(key: str) -> int:
        return len(key)

    @guard
    @staticmethod
    def outer_size(key: str) -> int:
        return len(key)

    @property
    @guard
    def name(self) -> str:
        return "client"


class Fetcher:
    def __call__(self, url: str) -> bytes:
        return url.encode()


async def methods() -> None:
    client = Client()
    assert_type(client.get("k"), int)
    assert_type(Client.get(client, "k"), int)
    assert_type(await client.aget("k"), int)
    assert_type(asyncio.create_task(client.aget("k")), asyncio.Task[int])
    assert_type(Client.made("k"), Client)
    assert_type(client.size("k"), int)
    assert_type(Client.outer_size("k"), int)
    assert_type(client.name, str)
    assert_type(guard(client.get)("k"), int)
    fetcher = guard(Fetcher())
    assert_type(fetcher, Fetcher)
    assert_type(fetcher("x"), bytes)
    assert_type(guard(functools.partial(fetch, limit=1))("x"), list[bytes])
    client.get(3)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# -- call and acall ---------------------------------------------------------------------------------------------


def plain(number: int, *, text: str = "") -> str:
    return text * number


async def aplain(number: int, *, text: str = "") -> str:
    return text * number


def returns_awaitable(number: int) -> Awaitable[str]:
    return aplain(number)


async def calls() -> None:
    assert_type(guard.call(plain, 2, text="x"), str)
    assert_type(await guard.acall(aplain, 2, text="x"), str)
    assert_type(await guard.acall(returns_awaitable, 2), str)
    assert_type(Retry(on=OSError).call(len, "abc"), int)
    assert_type(asyncio.create_task(guard.acall(aplain, 2)), asyncio.Task[str])
    guard.call(plain, "x")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    await guard.acall(plain, 2)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


# -- composing --------------------------------------------------------------------------------------------------


def composing() -> None:
    assert_type(Timeout(2) | Retry(on=OSError), Pipeline)
    assert_type(guard | Timeout(2), Pipeline)
    assert_type(Timeout(2) | guard, Pipeline)
    assert_type((Timeout(2) | Bulkhead(3))(plain)(1), str)
    policies: list[Policy] = [
        Retry(on=OSError),
        Timeout(2),
        CircuitBreaker(),
        RateLimit("100/minute"),
        Bulkhead(3),
        Cache(60),
        Fallback(None),
        Keyed(CircuitBreaker),
        Pipeline(),
    ]
    assert_type(Pipeline(*policies, failed=bool, name="all"), Pipeline)
    assert_type(Timeout(2).fresh(), Timeout)
    assert_type(guard.policies, tuple[Policy, ...])
    Timeout(2) | plain  # type: ignore[operator] # pyright: ignore[reportOperatorIssue,reportUnusedExpression]


# -- options ----------------------------------------------------------------------------------------------------


def is_busy(error: BaseException) -> bool:
    return isinstance(error, OSError)


def by_attempt(state: tenacity.RetryCallState) -> float:
    return float(state.attempt_number)


def options() -> None:
    budget = RetryBudget(ratio=0.2, cap=5, refill=timedelta(seconds=5))
    Retry(5, on=(OSError, KeyError), wait=0.5, budget=budget, max_retry_after=timedelta(minutes=1))
    Retry(timedelta(minutes=1), on=is_busy, wait=timedelta(seconds=1))
    Retry(on={OSError, KeyError}, wait=by_attempt, stop=lambda state: state.attempt_number > 3)
    Retry(
        tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(10),
        on=tenacity.retry_if_exception_type(OSError) | tenacity.retry_if_result(lambda result: result is None),
        wait=tenacity.wait_exponential() + tenacity.wait_random(0, 1),
    )
    Timeout(timedelta(seconds=2), interrupt=False, max_abandoned=3, name="t")
    CircuitBreaker(on=OSError, slow=timedelta(seconds=1))
    CircuitBreaker(on={429, 503, OSError}, key=per_host, max_keys=10)
    Retry(on={429, 503}, budget=RetryBudget(key=per_host))
    Retry(on=(503, OSError))
    RateLimit(Rate(100, per=60), key=per_host, wait=1)
    RateLimit("1/s", learn=True)
    Fallback(plain, 3, on=(OSError, TimedOut))
    Fallback(plain, on=[503, OSError])
    Cache(ttl=timedelta(minutes=5), stale=3600, key=per_host)
    Timeout("2")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    Bulkhead()  # type: ignore[call-arg] # pyright: ignore[reportCallIssue]
    Retry(5, OSError)  # type: ignore[misc,call-arg,unused-ignore] # pyright: ignore[reportCallIssue]


# -- HTTP clients -----------------------------------------------------------------------------------------------


def is_search(request: httpx.Request) -> bool:
    return request.url.path == "/search"


def tenant(request: httpx2.Request) -> str:
    return request.headers.get("X-Tenant", "")


def http_clients() -> None:
    preset = presets.http_client(timeout=timedelta(seconds=20), attempts=2, rate="50/s", cache=Cache(0, stale=60))
    assert_type(preset, Pipeline)
    transport = resilient.httpx.ResilientTransport(
        httpx.HTTPTransport(), pipeline=preset, repeatable=is_search, buffer=True
    )
    as_transport: httpx.BaseTransport = transport
    httpx.Client(transport=as_transport, mounts={"https://": resilient.httpx.ResilientTransport()})
    assert_type(transport.handle_request(httpx.Request("GET", "https://a.example")), httpx.Response)
    with transport as entered:
        assert_type(entered, resilient.httpx.ResilientTransport)
    transport2 = resilient.httpx2.ResilientTransport(
        pipeline=Retry(), repeatable={"POST"}, key=tenant, buffer=4096
    )
    as_transport2: httpx2.BaseTransport = transport2
    httpx2.Client(transport=as_transport2)
    assert_type(transport2.handle_request(httpx2.Request("GET", "https://a.example")), httpx2.Response)


async def async_http_clients() -> None:
    transport = resilient.httpx.AsyncResilientTransport(httpx.AsyncHTTPTransport(), pipeline=guard)
    httpx.AsyncClient(transport=transport, mounts={"https://": resilient.httpx.AsyncResilientTransport()})
    assert_type(await transport.handle_async_request(httpx.Request("GET", "https://a.example")), httpx.Response)
    transport2 = resilient.httpx2.AsyncResilientTransport(pipeline=guard)
    async with httpx2.AsyncClient(transport=transport2) as client:
        assert_type(await client.get("https://a.example"), httpx2.Response)


def installed_clients(client: httpx.Client, aclient2: httpx2.AsyncClient) -> None:
    with resilient.httpx.install(client, guard, repeatable={"POST"}) as installation:
        assert_type(installation, resilient.httpx.Installation)
        assert_type(installation.pipeline, Policy)
    assert_type(resilient.httpx2.install(aclient2), resilient.httpx2.Installation)


def replicas() -> None:
    balancer = resilient.httpx.LoadBalancer(["https://a.example"], backup=["https://b.example"], eject_for=5)
    as_transport: httpx.BaseTransport = balancer
    httpx.Client(transport=resilient.httpx.ResilientTransport(balancer), mounts={"https://": as_transport})
    assert_type(balancer.statistics().panicking, bool)
    assert_type(balancer.replicas, tuple[str, ...])
    balancer2 = resilient.httpx2.AsyncLoadBalancer([httpx2.URL("https://a.example")], decay=timedelta(seconds=5))
    httpx2.AsyncClient(transport=resilient.httpx2.AsyncResilientTransport(balancer2))


def fetch_token(refresh_token: str | None) -> resilient.httpx.Token:
    return resilient.httpx.Token("token", expires_in=60, refresh_token=refresh_token)


async def afetch_token(refresh_token: str | None) -> resilient.httpx2.Token:
    return resilient.httpx2.Token("token")


def tokens() -> None:
    url = "https://login.example/token"
    auth = resilient.httpx.TokenAuth(fetch_token, early=60, on_rotate=lambda token: len(token.access_token))
    as_auth: httpx.Auth = auth
    httpx.Client(auth=as_auth)
    assert_type(
        resilient.httpx.TokenAuth.client_credentials(url, client_id="a", client_secret="b", params={"c": "d"}),
        resilient.httpx.TokenAuth,
    )
    auth2 = resilient.httpx2.TokenAuth.refresh_token(url, refresh_token="a", client_id="b", client_auth="body")
    assert_type(auth2, resilient.httpx2.TokenAuth)
    httpx2.AsyncClient(auth=resilient.httpx2.TokenAuth(afetch_token))
    error: type[Exception] = resilient.httpx.TokenRefreshFailed
    assert issubclass(error, ResilientError)


def misuse_of_http_clients() -> None:
    resilient.httpx.ResilientTransport(httpx2.HTTPTransport())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    resilient.httpx.AsyncResilientTransport(httpx.HTTPTransport())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    resilient.httpx2.install(httpx.Client())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    resilient.httpx.ResilientTransport(pipeline=Retry)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    httpx2.Client(transport=resilient.httpx.ResilientTransport())  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    presets.http_client(5)  # type: ignore[misc,call-arg,unused-ignore] # pyright: ignore[reportCallIssue]


def statuses() -> None:
    Retry(on={429, 503, httpx.ConnectError})
    CircuitBreaker(on=(503, OSError), key=per_host)
    RateLimit("50/s", learn=True)
    assert_type(CircuitBreaker().of("https://a.example"), CircuitBreaker)


# -- keyed, listeners, blocks, the rest -------------------------------------------------------------------------


def per_host(url: str) -> str:
    return url.partition("/")[0]


@Keyed(lambda: CircuitBreaker(consecutive=5), key=per_host)
def keyed(url: str) -> bytes:
    return url.encode()


def keys() -> None:
    assert_type(keyed("host/path"), bytes)
    breakers = Keyed(CircuitBreaker, key=per_host)
    assert_type(breakers.of("host"), Policy)
    assert_type(CircuitBreaker(key=per_host).of("host"), CircuitBreaker)


def on_event(event: Event) -> None:
    assert_type(event.policy, str)
    assert_type(event.at, float)
    if isinstance(event, events.RetryScheduled):
        assert_type(event.delay, float)


def listeners() -> None:
    subscription = guard.listen(on_event)
    assert_type(subscription, events.Subscription)
    subscription.close()
    with listen(on_event), Timeout(2).listen(lambda event: len(event.name)):
        pass
    guard.listen(is_busy)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]


async def blocks() -> None:
    bulkhead = Bulkhead(3)
    with bulkhead as entered:
        assert_type(entered, Bulkhead)
    async with Timeout(2) as scope, Pipeline(bulkhead) as pipeline:
        assert_type(scope, Timeout)
        assert_type(pipeline, Pipeline)
    retry = Retry(on=OSError)
    for attempt in retry:
        with attempt:
            assert_type(attempt.number, int)
    async for attempt in retry:
        with attempt as same:
            assert_type(same.number, int)
    with instrument("json", "loads", guard) as handle:
        assert_type(handle.active, bool)


def a_block_may_swallow_nothing(number: int) -> str:
    with Bulkhead(3):
        return str(number)  # a `with` statement that could swallow errors would leave the end reachable


def errors(error: ResilientError) -> float | None:
    if isinstance(error, Rejected):
        assert_type(error.retry_after, float | None)
        assert_type(error.policy, str)
        refused: Rejected = error
        return refused.retry_after
    if isinstance(error, FailedResponse):
        assert_type(error.status, int)
        failed: FailedResult = error
        return float(len(str(failed)))
    if isinstance(error, TimedOut):
        as_builtin: TimeoutError = error
        return float(len(str(as_builtin)))
    classes: tuple[type[Rejected], ...] = (CircuitOpen, RateLimited, BulkheadFull)
    return deadline.remaining() if isinstance(error, classes) else None


def statistics() -> None:
    assert_type(Retry(on=OSError).statistics().retries, int)
    assert_type(Bulkhead(3).statistics().in_use, int)
    assert_type(CircuitBreaker().statistics().state, str)
    for key, partition in CircuitBreaker().statistics().partitions.items():
        assert_type(key, Hashable)
        assert_type(partition.failures, int)
    assert_type(RateLimit("1/s").statistics().rejected, int)
    assert_type(Cache(1).statistics().hits, int)
    assert_type(Fallback(1).statistics().used, int)
    assert_type(RetryBudget().statistics().lowest, float)
    assert_type(guard.statistics(), dict[str, Any])


def tenant_of(scope: Scope) -> str:
    return str(scope["path_params"]["tenant"])


async def polite(scope: Scope, refusal: Refusal) -> Response | None:
    return PlainTextResponse(refusal.detail, refusal.status) if refusal.status == 429 else None


def servers(app: Starlette, api: FastAPI) -> None:
    limit_by_address = RateLimit("100/minute", key=client_address)
    behind = RateLimit("100/minute", key=client_address(trusted_hops=1))
    by_key = RateLimit("100/minute", key=header("x-api-key", otherwise=user()))
    drain = Drain(grace=5, timeout=25)
    app.add_middleware(
        ResilienceMiddleware,
        pipeline=limit_by_address | behind | by_key | Fallback(PlainTextResponse("sorry")),
        routes={"/search": None, "/users/{id}": http_server(rate="5/s")},
        on_rejected=polite,
        priority={"/checkout": Priority.HIGH},
        health=Health(drain=drain),
        drain=drain,
    )
    wrapped = ResilienceMiddleware(app, deadline_header="grpc-timeout", cancel_on_disconnect=True)
    install(api, pipeline=limit_by_address)
    assert_type(limit("5/minute", key=tenant_of), Limit)
    assert_type(limit_by_address.left("192.0.2.1"), tuple[int, float])
    ResilienceMiddleware(wrapped, pipeline=Timeout)  # type: ignore[arg-type]
