"""The calls of the demo: one function, used bare and guarded."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx

from resilient import Bulkhead, Cache, CircuitBreaker, Pipeline, Retry, RetryBudget, TimedOut, Timeout, runtime
from resilient.demo.server import CLIENT_HEADER

CLIENT_TIMEOUT = 2.0
"""Seconds that both httpx clients allow, in a script of default length; httpx itself would allow 5."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server said.

    Attributes:
        product: What was asked for.
        received_at: When it came, in seconds of the monotonic clock.
    """

    product: int
    received_at: float


Fetch = Callable[[int], Awaitable[Answer]]


def new_client(
    name: str, url: str, scale: float, transport: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Return an httpx client; bare and guarded calls get the same, but for the name that the server counts by.

    Args:
        name: Who is calling.
        url: Of the server.
        scale: What all times are multiplied by.
        transport: Instead of the network.
    """
    return httpx.AsyncClient(
        base_url=url,
        headers={CLIENT_HEADER: name},
        timeout=CLIENT_TIMEOUT * scale,
        limits=httpx.Limits(max_connections=None),  # calls that hang must not hold up others in our own process
        trust_env=False,  # a proxy cannot reach the loopback interface of this machine
        transport=transport,
    )


def fetch_with(client: httpx.AsyncClient) -> Fetch:
    """Return the call, as most people write it."""

    async def fetch(product: int) -> Answer:
        response = await client.get(f"/products/{product}")
        response.raise_for_status()
        return Answer(response.json()["product"], runtime.now())

    return fetch


def transient(error: Exception) -> bool:
    """Tell which errors are worth another try: the other side did not answer, or says that it is to blame."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, httpx.TransportError | TimedOut)


@dataclass(frozen=True, slots=True)
class Guard:
    """The pipeline, and those of its parts that are shown by name."""

    pipeline: Pipeline
    breaker: CircuitBreaker
    budget: RetryBudget


def new_guard(scale: float) -> Guard:
    """Return the pipeline of the guarded calls.

    Args:
        scale: What all times are multiplied by: a shorter script breaks and recovers faster, too.
    """
    # A budget of 40 % pays for what 30 % of errors need; ten tokens are what a dead server gets in retries.
    budget = RetryBudget(ratio=0.4, cap=10, name="retry budget")
    breaker = CircuitBreaker(
        window=2 * scale, minimum_calls=10, open_for=scale, max_open_for=2 * scale, name="circuit breaker"
    )
    pipeline = Pipeline(
        Cache(1e-6, stale=60, name="cache"),  # fresh for no time at all: only failed calls are answered from it
        Timeout(1.0 * scale, name="timeout of the call"),
        Bulkhead(10, name="bulkhead"),
        Retry(3, on=transient, budget=budget, name="retry"),
        breaker,
        Timeout(0.3 * scale, name="timeout of an attempt"),
    )
    return Guard(pipeline, breaker, budget)
