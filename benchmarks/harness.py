"""The method: turns, batches and minima. What is measured stands in `cases`."""

import asyncio
import gc
import inspect
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter_ns
from typing import Any, Literal

ANSWER = 42
OURS = "resilient"
BARE = "bare call"
BATCH = 1_000_000  # ns: long against the clock's resolution, short against the scheduler's time slices

Colour = Literal["sync", "async"]
Make = Callable[..., Callable[[], Any]]
"""Guards a function; limits and keys are keyword arguments whose defaults are what is measured."""


def trivial(colour: Colour) -> Callable[[], Any]:
    """Return the function that everybody guards."""

    def answer():
        return ANSWER

    async def aanswer():
        return ANSWER

    return answer if colour == "sync" else aanswer


def guard_trivial(make: Make, colour: Colour) -> Callable[[], Any]:
    """Prepare a subject for the success path."""
    return make(trivial(colour))


@dataclass(frozen=True, slots=True)
class Case:
    """One question, and those who answer it.

    Attributes:
        name: What is measured.
        colour: `sync` or `async`.
        subjects: What guards a function, by the name of the library.
        check: Raises an error if a subject does not do what it is measured for.
        prepare: Turns a subject into the function that is called in the loop; may be async.
        answer: What that function has to return.
        around: Makes the context in which all of it happens.
        bare: Makes the function that is called in the loop without any guard: it is the unit.
        unit: What the unit is called.
        rounds: How many times as many rounds it needs as others do, to tell apart what is nearly equal.
        target: The ratio that this library sets out to reach, or None.
        rival: The subject that this library also sets out to be faster than, or None.
        note: What a reader has to know to compare the numbers.
    """

    name: str
    colour: Colour
    subjects: Mapping[str, Make]
    check: Callable[[Make, Colour], Awaitable[None]]
    prepare: Callable[[Make, Colour], Any] = guard_trivial
    answer: Any = ANSWER
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    bare: Callable[[Colour], Callable[[], Any]] = trivial
    unit: str = BARE
    rounds: int = 1
    target: float | None = None
    rival: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """What came out for one subject of a case; `ns` and `ratio` are None if it was not measured.

    `to_beat` is the ratio of the rival, if there is one and it was measured.
    """

    case: str
    colour: Colour
    subject: str
    ns: float | None
    ratio: float | None
    target: float | None = None
    note: str = ""
    to_beat: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether all that was set out for was reached; None if that is nothing, or if there is no number."""
        if self.ratio is None or (self.target is None and self.to_beat is None):
            return None
        reached = self.target is None or self.ratio <= self.target
        return reached and (self.to_beat is None or self.ratio < self.to_beat)


def measure(case: Case, *, rounds: int, batch: int = BATCH) -> list[Row]:
    """Measure the subjects of a case, in turns.

    Args:
        case: What to measure.
        rounds: How many batches each subject gets.
        batch: The length of a batch in ns.

    Returns:
        One row for each subject, and one for the bare call.
    """
    with case.around():
        failed = {}
        for name, make in case.subjects.items():
            try:
                asyncio.run(case.check(make, case.colour))
            except Exception as error:
                failed[name] = _reason(error)
        if case.colour == "sync":
            ready = asyncio.run(_prepare(case, failed))  # sync code is measured where no event loop runs
            best = _turns(ready, rounds, batch)
        else:
            best = asyncio.run(_aturns(case, failed, rounds, batch))
    return [_row(case, name, best, failed) for name in (case.unit, *case.subjects)]


async def _prepare(case: Case, failed: dict[str, str]) -> dict[str, Callable[[], Any]]:
    """Return what is called in the loop, by subject; add to `failed` who does not return the answer."""
    ready: dict[str, Callable[[], Any]] = {case.unit: case.bare(case.colour)}
    for name, make in case.subjects.items():
        if name in failed:
            continue
        try:
            call = await settled(case.prepare(make, case.colour))
            result = await settled(call())
        except Exception as error:
            failed[name] = _reason(error)
            continue
        if result == case.answer:
            ready[name] = call
        else:
            failed[name] = f"returned {result!r} instead of {case.answer!r}"
    return ready


def _turns(ready: dict[str, Callable[[], Any]], rounds: int, batch: int) -> dict[str, float]:
    times = {name: _calibrate(call, batch) for name, call in ready.items()}
    best = dict.fromkeys(ready, float("inf"))
    with _long_lived():
        for name in _in_turns(ready, rounds):
            best[name] = min(best[name], _batch(ready[name], times[name]) / times[name])
    return best


def _in_turns(ready: Mapping[str, Any], rounds: int) -> Iterator[str]:
    """Name each subject once a round, in another order each time, with the garbage of the one before collected.

    Else who comes after a subject that leaves garbage would pay for its collection, always the same one.
    """
    shuffle, names = random.Random(0).shuffle, list(ready)
    for _ in range(rounds):
        shuffle(names)
        for name in names:
            gc.collect()
            yield name


def _calibrate(call: Callable[[], Any], batch: int) -> int:
    times = 1
    while (took := _batch(call, times)) < batch / 2:
        times *= 2
    return max(1, round(times * batch / took))


def _batch(call: Callable[[], Any], times: int) -> int:
    gc.disable()
    try:
        started = perf_counter_ns()
        for _ in repeat(None, times):
            call()
        return perf_counter_ns() - started
    finally:
        gc.enable()


async def _aturns(case: Case, failed: dict[str, str], rounds: int, batch: int) -> dict[str, float]:
    ready = await _prepare(case, failed)
    times = {name: await _acalibrate(call, batch) for name, call in ready.items()}
    best = dict.fromkeys(ready, float("inf"))
    with _long_lived():
        for name in _in_turns(ready, rounds):
            best[name] = min(best[name], await _abatch(ready[name], times[name]) / times[name])
            await asyncio.sleep(0)  # the loop throws away the timers that were cancelled
    return best


async def _acalibrate(call: Callable[[], Any], batch: int) -> int:
    times = 1
    while (took := await _abatch(call, times)) < batch / 2:
        times *= 2
        await asyncio.sleep(0)
    return max(1, round(times * batch / took))


async def _abatch(call: Callable[[], Any], times: int) -> int:
    gc.disable()
    try:
        started = perf_counter_ns()
        for _ in repeat(None, times):
            await call()
        return perf_counter_ns() - started
    finally:
        gc.enable()


async def settled(result: Any) -> Any:
    """Return a result, awaited if it has to be."""
    return await result if inspect.isawaitable(result) else result


@contextmanager
def _long_lived():
    """Spare the collector the walk through everything that was imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")


def _row(case: Case, name: str, best: Mapping[str, float], failed: Mapping[str, str]) -> Row:
    ours = name == OURS
    target, note = (case.target, case.note) if ours else (None, "")
    if name in failed:
        return Row(case.name, case.colour, name, None, None, target, f"not measured: {failed[name]}")
    ns, unit = best[name], best[case.unit]
    to_beat = best[case.rival] / unit if ours and case.rival in best else None
    return Row(case.name, case.colour, name, ns, ns / unit, target, note, to_beat)
