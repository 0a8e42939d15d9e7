"""What a subject has to show before it is measured.

Each check guards a function of its own, which counts its runs, and is an async function so that one text does
for both colours.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import ANSWER, Colour, Make, settled

INSTEAD = "the fallback"
PATIENCE = 0.05  # s: who neither runs nor refuses by then is taken to wait


class Failure(Exception):
    """The error of the guarded functions; everybody is told to handle it."""


def scripted(colour: Colour, behave: Callable[[int], Any]) -> tuple[Callable[[], Any], list[int]]:
    """Return a function that does what `behave` does for the number of the run, and the list of the runs."""
    runs: list[int] = []

    def function():
        runs.append(len(runs) + 1)
        return behave(runs[-1])

    async def afunction():
        return function()

    return function if colour == "sync" else afunction, runs


def fails_twice(run: int) -> int:
    if run <= 2:
        raise Failure
    return ANSWER


def always_fails(run: int) -> int:
    raise Failure


async def attempt(guarded: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Call; return the result, or the error, of which a wait without end is one."""
    try:
        async with asyncio.timeout(patience):
            return await settled(guarded())
    except Exception as error:
        return error


async def retries(make: Make, colour: Colour) -> None:
    function, runs = scripted(colour, fails_twice)
    result = await settled(make(function)())
    assert (result, len(runs)) == (ANSWER, 3), f"returned {result!r} after {len(runs)} runs instead of 3"
    function, runs = scripted(colour, always_fails)
    result = await attempt(make(function))
    assert isinstance(result, Exception), "hid the error of the last attempt"
    assert len(runs) == 3, f"made {len(runs)} attempts instead of 3"


async def opens(make: Make, colour: Colour) -> None:
    function, runs = scripted(colour, always_fails)
    guarded = make(function)
    for _ in range(200):
        await attempt(guarded)
    assert len(runs) < 200, "never opened in 200 failures"


async def limits(make: Make, colour: Colour) -> None:
    function, runs = scripted(colour, lambda _run: ANSWER)
    guarded = make(function, limit=3, per=3600)
    for _ in range(6):
        await attempt(guarded)
    assert len(runs) == 3, f"let {len(runs)} calls through instead of 3"


async def bounds(make: Make, colour: Colour) -> None:
    # The function calls itself while it runs: with one place, the inner call must not run.
    inner: list[Any] = []

    def function():
        inner.append(None)
        if len(inner) == 1:
            try:
                guarded()
            except Exception:  # noqa: S110 - refused, as it should be
                pass
        return ANSWER

    async def afunction():
        inner.append(None)
        if len(inner) == 1:
            await attempt(guarded)
        return ANSWER

    guarded = make(function if colour == "sync" else afunction, limit=1)
    assert await settled(guarded()) == ANSWER, "lost the result"
    assert len(inner) == 1, "let two calls run at the same time"
    inner.append(None)
    assert await settled(guarded()) == ANSWER, "did not give the place back"


async def times_out(make: Make, colour: Colour) -> None:
    def function():
        time.sleep(0.2)
        return ANSWER

    async def afunction():
        await asyncio.sleep(0.2)
        return ANSWER

    guarded = make(function if colour == "sync" else afunction, seconds=0.01)
    try:
        await settled(guarded())
    except Exception:
        return
    raise AssertionError("did not end the call")


async def falls_back(make: Make, colour: Colour) -> None:
    result = await settled(make(scripted(colour, always_fails)[0])())
    assert result == INSTEAD, f"returned {result!r}"


async def caches(make: Make, colour: Colour) -> None:
    function, runs = scripted(colour, lambda _run: ANSWER)
    guarded = make(function)
    results = [await settled(guarded()) for _ in range(3)]
    assert results == [ANSWER] * 3, f"returned {results}"
    assert len(runs) == 1, f"ran {len(runs)} times"


async def stacks(make: Make, colour: Colour) -> None:
    """Check the retry, the fallback and the breaker; the limits are checked in cases of their own."""
    function, runs = scripted(colour, fails_twice)
    result = await settled(make(function)())
    assert (result, len(runs)) == (ANSWER, 3), f"returned {result!r} after {len(runs)} runs instead of 3"
    function, runs = scripted(colour, always_fails)
    guarded = make(function)
    for _ in range(100):
        result = await settled(guarded())
        assert result == INSTEAD, f"returned {result!r} instead of the fallback"
    assert len(runs) < 100, "the breaker never opened"


async def separates(make: Make, colour: Colour) -> None:
    """Check that a key has a breaker of its own."""
    key = "bad"
    failing = True

    def behave(_run: int) -> int:
        if failing:
            raise Failure
        return ANSWER

    function, runs = scripted(colour, behave)
    guarded = make(function, key=lambda: key)
    for _ in range(100):
        await attempt(guarded)
    ran = len(runs)
    assert ran < 100, "never opened in 100 failures"
    key, failing = "good", False
    assert await settled(guarded()) == ANSWER, "another key has the same breaker"


async def limits_each(make: Make, colour: Colour) -> None:
    """Check that a key has a limit of its own."""
    key = "one"
    function, runs = scripted(colour, lambda _run: ANSWER)
    guarded = make(function, limit=3, per=3600, key=lambda: key)
    for _ in range(6):
        await attempt(guarded)
    assert len(runs) == 3, f"let {len(runs)} calls through instead of 3"
    key = "other"
    assert await settled(guarded()) == ANSWER, "another key has the same limit"
