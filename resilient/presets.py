"""Pipelines that are good without thinking: what the transports and the middleware use when they get none."""

from collections.abc import Callable, Hashable

from resilient import options
from resilient.pipeline import Pipeline
from resilient.policies.bulkhead import Bulkhead
from resilient.policies.circuit_breaker import CircuitBreaker
from resilient.policies.load_shed import LoadShed
from resilient.policies.rate_limit import RateLimit
from resilient.policies.retry import Retry
from resilient.policies.retry_budget import RetryBudget
from resilient.policies.timeout import Timeout
from resilient.policy import Policy
from resilient.rate import Rate


def http_client(
    *,
    timeout: options.Seconds = 30.0,
    attempt_timeout: options.Seconds | None = None,
    attempts: int = 3,
    concurrency: int = 100,
    rate: str | Rate | None = None,
    cache: Policy | None = None,
) -> Pipeline:
    """Return a pipeline for the transport of an HTTP client, with a state of its own.

    Outermost first: `cache` (if given), a deadline for everything, a bulkhead, retries paid from a budget, a
    circuit breaker, `rate` (if given) and a deadline for each attempt. Breaker, budget and rate limit count by
    origin.

    With the defaults one request makes at most 3 attempts and takes at most 30 s, its body included (but for
    server-sent events, which have no end). Attempts take at most 10 s each, until the headers are there; between
    them it waits up to 0.1 s and then up to 0.2 s, or as long as the server asks if that fits. A dependency that
    fails at every call gets 10 retries at once and then one every 10 s from each process (the budget), until its
    breaker opens: when half of at least 20 calls in 30 s have failed.

    Args:
        timeout: Seconds for the whole request: all attempts, the waits between them, and the body. Default 30 s.
        attempt_timeout: Seconds for one attempt, until its headers have come. Default None: 10 s, or `timeout` if
            that is shorter.
        attempts: How many times a request is sent at most. Default 3; 1 for no retries.
        concurrency: How many requests run at the same time. More wait, as long as the deadline allows. Default
            100, as many as the connection pool of httpx holds.
        rate: How many requests may start in so much time at one origin, such as `"50/s"`; more wait up to 1 s.
            Default None: any number.
        cache: A `Cache` or a `Fallback` to be the outermost policy. Default None.

    Raises:
        ValueError: `attempt_timeout` is longer than `timeout`, or another bad option.
    """
    total = options.seconds("http_client", "timeout", timeout)
    if attempt_timeout is None:
        attempt_timeout = min(10.0, total)
    attempt = options.seconds("http_client", "attempt_timeout", attempt_timeout)
    if attempt > total:
        raise options.refuse("http_client", "attempt_timeout", attempt_timeout, f"up to timeout={total:g}")
    if cache is not None and not isinstance(cache, Policy):
        raise options.refuse(
            "http_client", "cache", cache, "a policy such as Cache(0, stale=3600), or None", TypeError
        )
    attempts = options.whole("http_client", "attempts", attempts)
    concurrency = options.whole("http_client", "concurrency", concurrency)
    policies: list[Policy] = [] if cache is None else [cache]
    policies += [Timeout(total, name="timeout"), Bulkhead(concurrency, queue=10 * concurrency, name="bulkhead")]
    policies += [Retry(attempts, budget=RetryBudget(name="retry budget"), name="retry")] if attempts > 1 else []
    policies += [CircuitBreaker(probe_lease=max(10.0, 2 * attempt), name="circuit breaker")]
    policies += [] if rate is None else [RateLimit(rate, wait=1.0, name="rate limit")]
    policies += [Timeout(attempt, name="attempt timeout")]
    return Pipeline(*policies, name="http_client")


def http_server(
    *,
    timeout: options.Seconds = 30.0,
    concurrency: int = 200,
    queue: int | None = None,
    rate: str | Rate | None = None,
    key: Callable[..., Hashable] | None = None,
) -> Pipeline:
    """Return a pipeline for the middleware of an HTTP server, with a state of its own.

    Outermost first: `rate` (if given), a deadline, a bulkhead with a queue, and load shedding behind the queue.

    With the defaults a request has 30 s until its response is complete, 200 run at the same time and as many wait.
    When the event loop lags behind, or the queue does not get empty any more, some are refused so that the others
    are served in time.

    Args:
        timeout: Seconds until the response is complete; server-sent events have no deadline once they have begun,
            and downloads need a longer one or a route of their own. Default 30 s.
        concurrency: How many requests run at the same time. Default 200. Sync endpoints run in a pool of 40
            threads, and wait there unseen if more are let in.
        queue: How many more may wait. Default None: as many as run.
        rate: How many requests a client may make in so much time, such as `"100/minute"`. Default None: any
            number, as only you know whether the peer is a client or a proxy that speaks for all of them.
        key: What `rate` is counted by, a function of the scope. Default None: `resilient.asgi.client_address`,
            which is the peer.

    Raises:
        ValueError: A `key` without a `rate`, or another bad option.
    """
    from resilient.asgi.clients import client_address  # which few users of the other presets need

    concurrency = options.whole("http_server", "concurrency", concurrency)
    waiting = concurrency if queue is None else options.whole("http_server", "queue", queue, minimum=0)
    if rate is None and key is not None:
        raise options.refuse("http_server", "key", key, "None without rate=, as there is nothing to count")
    limits = [] if rate is None else [RateLimit(rate, key=key or client_address, name="rate limit")]
    return Pipeline(
        *limits,
        Timeout(options.seconds("http_server", "timeout", timeout), name="timeout"),
        Bulkhead(concurrency, queue=waiting, name="bulkhead"),
        LoadShed(name="load shed"),
        name="http_server",
    )
