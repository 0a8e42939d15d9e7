"""The cases, and how each library is used in them: as its own documentation would have it, at its best.

A subject is a function that guards a function. It imports its library itself, so that one that is missing is
missed in its own rows only.
"""

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from inspect import iscoroutinefunction
from itertools import count, cycle
from typing import Any

import resilient
from benchmarks import checks
from benchmarks.checks import INSTEAD, Failure
from benchmarks.harness import ANSWER, OURS, Case, Colour, Make, settled

Function = Callable[..., Any]

PLENTY = 10_000_000  # calls a second: more than any subject reaches, so that no limiter ever refuses
ROOMY = 100  # places at the same time
LONG = 3600.0  # s: longer than any benchmark
HAND = "by hand"
REFUSED = "refused"
IN_A_ROW = " (failures in a row)"

_names = count()


def _name() -> str:
    return f"benchmark-{next(_names)}"  # some libraries keep their objects by name


# -- retry ----------------------------------------------------------------------------------------------------


def resilient_retry(function: Function) -> Function:
    return resilient.Retry(3, on=Failure, wait=0)(function)


def resilient_retry_strategies(function: Function) -> Function:
    import tenacity

    on = tenacity.retry_if_exception_type(Failure)
    return resilient.Retry(tenacity.stop_after_attempt(3), on=on, wait=tenacity.wait_none())(function)


def tenacity_retry(function: Function) -> Function:
    import tenacity

    return tenacity.retry(
        stop=tenacity.stop_after_attempt(3),
        retry=tenacity.retry_if_exception_type(Failure),
        wait=tenacity.wait_none(),
        reraise=True,
    )(function)


def stamina_retry(function: Function) -> Function:
    import stamina

    stamina.instrumentation.set_on_retry_hooks([])
    return stamina.retry(on=Failure, attempts=3, timeout=None, wait_initial=0, wait_max=0, wait_jitter=0)(function)


def backoff_retry(function: Function) -> Function:
    import backoff

    return backoff.on_exception(backoff.constant, Failure, max_tries=3, interval=0, jitter=None)(function)


def nopanic_retry(function: Function) -> Function:
    import nopanic

    return nopanic.retry(3, on=Failure, backoff=0.0)(function)


def hyx_retry(function: Function) -> Function:
    from hyx.retry import retry

    return retry(on=Failure, attempts=2, backoff=0)(function)  # it counts the attempts after the first one


def pyresilience_retry(function: Function) -> Function:
    import pyresilience

    retry = pyresilience.RetryConfig(max_attempts=3, delay=0, jitter=False, retry_on=(Failure,))
    return pyresilience.resilient(retry=retry)(function)


def hand_retry(function: Function) -> Function:
    def guarded():
        for left in (2, 1, 0):
            try:
                return function()
            except Failure:
                if not left:
                    raise
        raise AssertionError

    async def aguarded():
        for left in (2, 1, 0):
            try:
                return await function()
            except Failure:
                if not left:
                    raise
                await asyncio.sleep(0)
        raise AssertionError

    return aguarded if iscoroutinefunction(function) else guarded


# -- circuit breaker ------------------------------------------------------------------------------------------


def resilient_breaker(function: Function) -> Function:
    return resilient.CircuitBreaker(open_for=LONG, max_open_for=LONG)(function)


def pybreaker_breaker(function: Function) -> Function:
    import pybreaker

    return pybreaker.CircuitBreaker(fail_max=5, reset_timeout=LONG)(function)


def circuitbreaker_breaker(function: Function) -> Function:
    import circuitbreaker

    return circuitbreaker.circuit(failure_threshold=5, recovery_timeout=int(LONG), name=_name())(function)


def purgatory_breaker(function: Function) -> Function:
    import purgatory

    colour = "Async" if iscoroutinefunction(function) else "Sync"
    factory = getattr(purgatory, f"{colour}CircuitBreakerFactory")(default_threshold=5, default_ttl=LONG)
    return factory(_name())(function)


def hyx_breaker(function: Function) -> Function:
    from hyx.circuitbreaker import consecutive_breaker

    return consecutive_breaker(failure_threshold=5, recovery_time_secs=LONG)(function)


def interlock_breaker(function: Function) -> Function:
    return _interlock()(function)


def _interlock() -> Any:
    import interlock

    config = interlock.Config(
        window_type=interlock.WindowType.TIME_BASED, window_size=30, wait_duration_in_open=LONG
    )
    return interlock.CircuitBreaker(name=_name(), config=config)


def nopanic_breaker(function: Function) -> Function:
    import nopanic

    return nopanic.circuit_breaker(reset_timeout=LONG)(function)


def pyresilience_breaker(function: Function) -> Function:
    import pyresilience

    return pyresilience.resilient(circuit_breaker=_pyresilience_breaker())(function)


def _pyresilience_breaker() -> Any:
    import pyresilience

    return pyresilience.CircuitBreakerConfig(
        sliding_window_size=100, minimum_calls=20, failure_rate_threshold=0.5, recovery_timeout=LONG
    )


def hand_breaker(function: Function) -> Function:
    lock = threading.Lock()
    failures = 0

    def guarded():
        nonlocal failures
        if failures >= 5:
            raise RuntimeError(REFUSED)
        try:
            result = function()
        except Exception:
            with lock:
                failures += 1
            raise
        failures = 0
        return result

    async def aguarded():
        nonlocal failures
        if failures >= 5:
            raise RuntimeError(REFUSED)
        try:
            result = await function()
        except Exception:
            failures += 1
            raise
        failures = 0
        return result

    return aguarded if iscoroutinefunction(function) else guarded


# -- rate limit -----------------------------------------------------------------------------------------------


def resilient_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    return resilient.RateLimit(resilient.Rate(limit, per=per))(function)


def aiolimiter_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    import aiolimiter

    limiter = aiolimiter.AsyncLimiter(limit, per)

    async def guarded():
        async with limiter:
            return await function()

    return guarded


def limits_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    import limits

    item = limits.RateLimitItemPerSecond(limit, per)
    if iscoroutinefunction(function):
        import limits.aio

        ahit = limits.aio.strategies.FixedWindowRateLimiter(limits.aio.storage.MemoryStorage()).hit

        async def aguarded():
            if not await ahit(item, "key"):
                raise RuntimeError(REFUSED)
            return await function()

        return aguarded
    hit = limits.strategies.FixedWindowRateLimiter(limits.storage.MemoryStorage()).hit

    def guarded():
        if not hit(item, "key"):
            raise RuntimeError(REFUSED)
        return function()

    return guarded


def throttled_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    import throttled

    library = throttled.asyncio if iscoroutinefunction(function) else throttled
    quota = throttled.per_duration(timedelta(seconds=per), limit, burst=limit)
    return library.Throttled(key=_name(), using="gcra", quota=quota, store=library.MemoryStore())(function)


def nopanic_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    import nopanic

    return nopanic.rate_limit(limit, per, max_wait=0)(function)


def hyx_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    from hyx.ratelimit import tokenbucket

    return tokenbucket(limit, per)(function)


def pyresilience_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    import pyresilience

    config = pyresilience.RateLimiterConfig(max_calls=limit, period=per)
    return pyresilience.resilient(rate_limiter=config)(function)


def hand_rate_limit(function: Function, limit: int = PLENTY, per: int = 1) -> Function:
    lock, monotonic = threading.Lock(), time.monotonic
    step, tolerance = per / limit, per
    drained_at = 0.0

    def admit():
        nonlocal drained_at
        with lock:
            now = monotonic()
            due = max(drained_at, now) + step
            if due - now > tolerance + step / 2:
                raise RuntimeError(REFUSED)
            drained_at = due

    def guarded():
        admit()
        return function()

    async def aguarded():
        admit()
        return await function()

    return aguarded if iscoroutinefunction(function) else guarded


# -- one limit or breaker for each key ------------------------------------------------------------------------


def resilient_rate_limit_keys(
    function: Function, limit: int = PLENTY, per: int = 1, key: Function = lambda: "key"
) -> Function:
    return resilient.RateLimit(resilient.Rate(limit, per=per), key=key)(function)


def nopanic_rate_limit_keys(
    function: Function, limit: int = PLENTY, per: int = 1, key: Function = lambda: "key"
) -> Function:
    import nopanic

    return nopanic.keyed(lambda _key: nopanic.rate_limit(limit, per, max_wait=0), key=key)(function)


def limits_rate_limit_keys(
    function: Function, limit: int = PLENTY, per: int = 1, key: Function = lambda: "key"
) -> Function:
    import limits

    item = limits.RateLimitItemPerSecond(limit, per)
    hit = limits.strategies.FixedWindowRateLimiter(limits.storage.MemoryStorage()).hit

    def guarded():
        if not hit(item, key()):
            raise RuntimeError(REFUSED)
        return function()

    return guarded


def resilient_breaker_keys(function: Function, key: Function = lambda: "key") -> Function:
    return resilient.Keyed(resilient.CircuitBreaker, key=key)(function)


def nopanic_breaker_keys(function: Function, key: Function = lambda: "key") -> Function:
    import nopanic

    return nopanic.keyed(lambda _key: nopanic.circuit_breaker(reset_timeout=LONG), key=key)(function)


def interlock_breaker_keys(function: Function, key: Function = lambda: "key") -> Function:
    import interlock

    config = interlock.Config(
        window_type=interlock.WindowType.TIME_BASED, window_size=30, wait_duration_in_open=LONG
    )
    registry = interlock.Registry(config=config)

    def guarded():
        return registry.get(key()).call_sync(function)

    async def aguarded():
        return await registry.get(key()).call_async(function)

    return aguarded if iscoroutinefunction(function) else guarded


# -- bulkhead -------------------------------------------------------------------------------------------------


def resilient_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    return resilient.Bulkhead(limit)(function)


def nopanic_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    import nopanic

    return nopanic.bulkhead(limit, max_wait=0)(function)


def hyx_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    from hyx.bulkhead import bulkhead

    return bulkhead(limit, limit)(function)


def interlock_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    import interlock

    return interlock.Pipeline(interlock.BulkheadStrategy(limit))(function)


def pyresilience_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    import pyresilience

    return pyresilience.resilient(bulkhead=pyresilience.BulkheadConfig(max_concurrent=limit))(function)


def hand_bulkhead(function: Function, limit: int = ROOMY) -> Function:
    if iscoroutinefunction(function):
        places = asyncio.Semaphore(limit)

        async def aguarded():
            async with places:
                return await function()

        return aguarded
    permits = threading.Semaphore(limit)

    def guarded():
        if not permits.acquire(blocking=False):
            raise RuntimeError(REFUSED)
        try:
            return function()
        finally:
            permits.release()

    return guarded


# -- timeout --------------------------------------------------------------------------------------------------


def resilient_timeout(function: Function, seconds: float = 10.0) -> Function:
    return resilient.Timeout(seconds)(function)


def asyncio_timeout(function: Function, seconds: float = 10.0) -> Function:
    async def guarded():
        async with asyncio.timeout(seconds):
            return await function()

    return guarded


def anyio_timeout(function: Function, seconds: float = 10.0) -> Function:
    import anyio

    async def guarded():
        with anyio.fail_after(seconds):
            return await function()

    return guarded


def nopanic_timeout(function: Function, seconds: float = 10.0) -> Function:
    import nopanic

    return nopanic.timeout(seconds)(function)


def hyx_timeout(function: Function, seconds: float = 10.0) -> Function:
    from hyx.timeout import timeout

    return timeout(seconds)(function)


def interlock_timeout(function: Function, seconds: float = 10.0) -> Function:
    import interlock

    return interlock.Pipeline(interlock.TimeoutStrategy(seconds))(function)


def pyresilience_timeout(function: Function, seconds: float = 10.0) -> Function:
    import pyresilience

    return pyresilience.resilient(timeout=pyresilience.TimeoutConfig(seconds=seconds))(function)


def thread_timeout(function: Function, seconds: float = 10.0) -> Function:
    from concurrent.futures import ThreadPoolExecutor

    threads = ThreadPoolExecutor(4)

    def guarded():
        return threads.submit(function).result(seconds)

    return guarded


# -- fallback and cache ---------------------------------------------------------------------------------------


def resilient_fallback(function: Function) -> Function:
    return resilient.Fallback(INSTEAD)(function)


def nopanic_fallback(function: Function) -> Function:
    import nopanic

    return nopanic.fallback(INSTEAD)(function)


def hyx_fallback(function: Function) -> Function:
    from hyx.fallback import fallback

    async def instead(*_args, **_kwargs):
        return INSTEAD

    return fallback(instead, on=Exception)(function)


def interlock_fallback(function: Function) -> Function:
    import interlock

    return interlock.Pipeline(interlock.FallbackStrategy(lambda _error: INSTEAD))(function)


def pyresilience_fallback(function: Function) -> Function:
    import pyresilience

    config = pyresilience.FallbackConfig(handler=lambda _error: INSTEAD)
    return pyresilience.resilient(fallback=config)(function)


def hand_fallback(function: Function) -> Function:
    def guarded():
        try:
            return function()
        except Exception:
            return INSTEAD

    async def aguarded():
        try:
            return await function()
        except Exception:
            return INSTEAD

    return aguarded if iscoroutinefunction(function) else guarded


def resilient_cache(function: Function) -> Function:
    return resilient.Cache(LONG)(function)


def nopanic_cache(function: Function) -> Function:
    import nopanic

    return nopanic.cache(LONG)(function)


def pyresilience_cache(function: Function) -> Function:
    import pyresilience

    return pyresilience.resilient(cache=pyresilience.CacheConfig(ttl=LONG))(function)


def cachetools_cache(function: Function) -> Function:
    import cachetools

    lock = threading.Lock()
    return cachetools.cached(cachetools.TTLCache(1024, LONG), lock=lock)(function)


# -- stacks ---------------------------------------------------------------------------------------------------


def resilient_stack(function: Function) -> Function:
    return resilient.Pipeline(*_resilient_stack())(function)


def resilient_stack_timeout(function: Function) -> Function:
    return resilient.Pipeline(*_resilient_stack(), resilient.Timeout(10.0))(function)


def _resilient_stack() -> tuple[resilient.Policy, ...]:
    return (
        resilient.Fallback(INSTEAD),
        resilient.Retry(3, on=Failure, wait=0),
        resilient.CircuitBreaker(),
        resilient.RateLimit(resilient.Rate(PLENTY, per=1)),
        resilient.Bulkhead(ROOMY),
    )


def nopanic_stack(function: Function) -> Function:
    import nopanic

    return nopanic.compose(*_nopanic_stack())(function)


def nopanic_stack_timeout(function: Function) -> Function:
    import nopanic

    return nopanic.compose(*_nopanic_stack(), nopanic.timeout(10.0))(function)


def _nopanic_stack() -> tuple[Any, ...]:
    import nopanic

    return (
        nopanic.fallback(INSTEAD),
        nopanic.retry(3, on=Failure, backoff=0.0),
        nopanic.circuit_breaker(reset_timeout=LONG),
        nopanic.rate_limit(PLENTY, 1, max_wait=0),
        nopanic.bulkhead(ROOMY, max_wait=0),
    )


def interlock_stack(function: Function) -> Function:
    return _interlock_stack().build()(function)


def interlock_stack_timeout(function: Function) -> Function:
    return _interlock_stack().timeout(10.0).build()(function)


def _interlock_stack() -> Any:
    import interlock
    import tenacity

    return (
        interlock.Pipeline.builder()
        .fallback(lambda _error: INSTEAD)
        .retry(attempts=3, retry=tenacity.retry_if_exception_type(Failure), wait=tenacity.wait_none())
        .circuit_breaker(_interlock())
        .bulkhead(ROOMY)
    )


def pyresilience_stack(function: Function, **more: Any) -> Function:
    import pyresilience

    return pyresilience.resilient(
        fallback=pyresilience.FallbackConfig(handler=lambda _error: INSTEAD),
        retry=pyresilience.RetryConfig(max_attempts=3, delay=0, jitter=False, retry_on=(Failure,)),
        circuit_breaker=_pyresilience_breaker(),
        rate_limiter=pyresilience.RateLimiterConfig(max_calls=PLENTY, period=1),
        bulkhead=pyresilience.BulkheadConfig(max_concurrent=ROOMY),
        **more,
    )(function)


def pyresilience_stack_timeout(function: Function) -> Function:
    import pyresilience

    return pyresilience_stack(function, timeout=pyresilience.TimeoutConfig(seconds=10.0))


def hyx_stack_timeout(function: Function) -> Function:
    function = hyx_bulkhead(hyx_timeout(function))
    return hyx_fallback(hyx_retry(hyx_breaker(hyx_rate_limit(function))))


def tenacity_stack(function: Function) -> Function:
    function = pybreaker_breaker(limits_rate_limit(hand_bulkhead(function)))
    return hand_fallback(tenacity_retry(function))


def stamina_stack_timeout(function: Function) -> Function:
    function = aiolimiter_rate_limit(hand_bulkhead(asyncio_timeout(function)))
    return hand_fallback(stamina_retry(circuitbreaker_breaker(function)))


def hand_stack(function: Function) -> Function:
    return hand_fallback(hand_retry(hand_breaker(hand_rate_limit(hand_bulkhead(function)))))


def hand_stack_timeout(function: Function) -> Function:
    return hand_stack(asyncio_timeout(function))


# -- what is called in the loop -------------------------------------------------------------------------------


def fails_twice(make: Make, colour: Colour) -> Function:
    """Prepare a function that fails, fails and succeeds, again and again."""
    fails = cycle((True, True, False)).__next__

    def third_time():
        if fails():
            raise Failure
        return ANSWER

    async def athird_time():
        if fails():
            raise Failure
        return ANSWER

    return make(third_time if colour == "sync" else athird_time)


async def opened(make: Make, colour: Colour) -> Callable[[], Any] | Callable[[], Awaitable[Any]]:
    """Prepare a breaker that is open, with a `try` around it; the same for all, and part of the number."""
    guarded = make(checks.scripted(colour, checks.always_fails)[0])
    for _ in range(100):
        with suppress(Exception):
            await settled(guarded())

    def refused():
        try:
            guarded()
        except Failure:
            return "not refused"
        except Exception:
            return REFUSED

    async def arefused():
        try:
            await guarded()
        except Failure:
            return "not refused"
        except Exception:
            return REFUSED

    return refused if colour == "sync" else arefused


@contextmanager
def free_sleep() -> Iterator[None]:
    """Let `time.sleep(0)` cost nothing: the kernel makes 60 us of it, which are nobody's achievement."""
    sleep = time.sleep

    @functools.wraps(sleep)
    def skip_nothing(seconds: float) -> None:
        if seconds:
            sleep(seconds)

    time.sleep = skip_nothing
    try:
        yield
    finally:
        time.sleep = sleep


# -- the cases ------------------------------------------------------------------------------------------------

_RETRY = {
    OURS: resilient_retry,
    "tenacity": tenacity_retry,
    "stamina": stamina_retry,
    "backoff": backoff_retry,
    "nopanic": nopanic_retry,
    "pyresilience": pyresilience_retry,
    HAND: hand_retry,
}
_BREAKER = {
    OURS: resilient_breaker,
    f"circuitbreaker{IN_A_ROW}": circuitbreaker_breaker,
    f"purgatory{IN_A_ROW}": purgatory_breaker,
    "interlock-cb": interlock_breaker,
    "nopanic": nopanic_breaker,
    "pyresilience": pyresilience_breaker,
    HAND + IN_A_ROW: hand_breaker,
}
_PYBREAKER = {f"pybreaker{IN_A_ROW}": pybreaker_breaker}  # does not see the failures of async functions
_HYX_BREAKER = {f"hyx{IN_A_ROW}": hyx_breaker}
_RATE_LIMIT = {
    OURS: resilient_rate_limit,
    "limits (fixed window)": limits_rate_limit,
    "throttled-py": throttled_rate_limit,
    "nopanic": nopanic_rate_limit,
    "pyresilience": pyresilience_rate_limit,
    HAND: hand_rate_limit,
}
_BULKHEAD = {
    OURS: resilient_bulkhead,
    "interlock-cb": interlock_bulkhead,
    "nopanic": nopanic_bulkhead,
    "pyresilience": pyresilience_bulkhead,
    "a semaphore": hand_bulkhead,
}
_FALLBACK = {
    OURS: resilient_fallback,
    "interlock-cb": interlock_fallback,
    "nopanic": nopanic_fallback,
    "pyresilience": pyresilience_fallback,
    HAND: hand_fallback,
}
_CACHE = {OURS: resilient_cache, "nopanic": nopanic_cache, "pyresilience": pyresilience_cache}

CASES = [
    Case("Retry", "sync", _RETRY, checks.retries, target=12),
    Case("Retry", "async", _RETRY | {"hyx": hyx_retry}, checks.retries, target=8),
    Case("CircuitBreaker", "sync", _BREAKER | _PYBREAKER, checks.opens, target=25),
    Case("CircuitBreaker", "async", _BREAKER | _HYX_BREAKER | _PYBREAKER, checks.opens),
    Case("RateLimit", "sync", _RATE_LIMIT, checks.limits, target=25),
    Case(
        "RateLimit",
        "async",
        _RATE_LIMIT | {"aiolimiter": aiolimiter_rate_limit, "hyx": hyx_rate_limit},
        checks.limits,
    ),
    Case("Bulkhead", "sync", _BULKHEAD, checks.bounds),
    Case("Bulkhead", "async", _BULKHEAD | {"hyx": hyx_bulkhead}, checks.bounds),
    Case(
        "Timeout",
        "sync",
        {
            OURS: resilient_timeout,
            "interlock-cb": interlock_timeout,
            "nopanic": nopanic_timeout,
            "pyresilience": pyresilience_timeout,
            "a thread pool": thread_timeout,
        },
        checks.times_out,
        note="in a worker thread",
    ),
    Case(
        "Timeout",
        "async",
        {
            OURS: resilient_timeout,
            "asyncio.timeout": asyncio_timeout,
            "anyio": anyio_timeout,
            "hyx": hyx_timeout,
            "interlock-cb": interlock_timeout,
            "nopanic": nopanic_timeout,
            "pyresilience": pyresilience_timeout,
        },
        checks.times_out,
        target=20,
    ),
    Case("Fallback", "sync", _FALLBACK, checks.falls_back),
    Case("Fallback", "async", _FALLBACK | {"hyx": hyx_fallback}, checks.falls_back),
    Case("Cache hit", "sync", _CACHE | {"cachetools (TTL, lock)": cachetools_cache}, checks.caches),
    Case("Cache hit", "async", _CACHE, checks.caches),
    Case(
        "Stack of 5",
        "sync",
        {
            OURS: resilient_stack,
            "nopanic": nopanic_stack,
            "interlock-cb (no rate limit)": interlock_stack,
            "pyresilience": pyresilience_stack,
            "tenacity + pybreaker + limits": tenacity_stack,
            HAND: hand_stack,
        },
        checks.stacks,
        target=50,
        note="fallback, retry, breaker, rate limit, bulkhead",
    ),
    Case(
        "Stack of 5 and a timeout",
        "async",
        {
            OURS: resilient_stack_timeout,
            "nopanic": nopanic_stack_timeout,
            "interlock-cb (no rate limit)": interlock_stack_timeout,
            "pyresilience": pyresilience_stack_timeout,
            "hyx": hyx_stack_timeout,
            "stamina + circuitbreaker + aiolimiter": stamina_stack_timeout,
            HAND: hand_stack_timeout,
        },
        checks.stacks,
        target=40,
        note="fallback, retry, breaker, rate limit, bulkhead, timeout",
    ),
    Case(
        "3 attempts, no wait",
        "sync",
        _RETRY | {"resilient, tenacity's strategies": resilient_retry_strategies},
        checks.retries,
        prepare=fails_twice,
        around=free_sleep,
        target=250,
        note="the first two fail",
    ),
    Case(
        "3 attempts, no wait",
        "async",
        _RETRY | {"hyx": hyx_retry, "resilient, tenacity's strategies": resilient_retry_strategies},
        checks.retries,
        prepare=fails_twice,
        note="the first two fail; the event loop gets its turn in between",
    ),
    Case(
        "Refusal of an open breaker",
        "sync",
        _BREAKER | _PYBREAKER,
        checks.opens,
        prepare=opened,
        answer=REFUSED,
        note="with a try/except around it",
    ),
    Case(
        "Refusal of an open breaker",
        "async",
        _BREAKER | _HYX_BREAKER,
        checks.opens,
        prepare=opened,
        answer=REFUSED,
        note="with a try/except around it",
    ),
    Case(
        "Keyed CircuitBreaker",
        "sync",
        {
            OURS: resilient_breaker_keys,
            "interlock-cb": interlock_breaker_keys,
            "nopanic": nopanic_breaker_keys,
        },
        checks.separates,
        note="one key; the key function is included",
    ),
    Case(
        "Keyed RateLimit",
        "sync",
        {
            OURS: resilient_rate_limit_keys,
            "limits (fixed window)": limits_rate_limit_keys,
            "nopanic": nopanic_rate_limit_keys,
        },
        checks.limits_each,
        note="one key; the key function is included",
    ),
]
