"""`with policy:` and `for attempt in retry:`: guarding a block instead of a function.

A policy is one shared object, while entering a block is something of the task or thread that does it. What
was entered is therefore kept in a context variable, a stack of its own for every task and thread.
"""

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from resilient import runtime

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilient.kinds import Attempts, Loop
    from resilient.policy import Policy

_entered: "ContextVar[tuple[tuple[Policy, Any], ...]]" = ContextVar("resilient.entered", default=())


def enter(policy: "Policy") -> None:
    """Enter a block guarded by `policy`."""
    block = policy.block()
    block.__enter__()
    _entered.set((*_entered.get(), (policy, block)))


def leave(
    policy: "Policy",
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> bool | None:
    """Leave the block that was entered last in this context."""
    block: AbstractContextManager[None] = _pop(policy)
    return block.__exit__(kind, error, trace)


async def aenter(policy: "Policy") -> None:
    """Enter an async block guarded by `policy`."""
    block = policy.ablock()
    await block.__aenter__()
    _entered.set((*_entered.get(), (policy, block)))


async def aleave(
    policy: "Policy",
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> bool | None:
    """Leave the async block that was entered last in this context."""
    block: AbstractAsyncContextManager[None] = _pop(policy)
    return await block.__aexit__(kind, error, trace)


def _pop(policy: "Policy") -> Any:
    stack = _entered.get()
    for index in range(len(stack) - 1, -1, -1):
        if stack[index][0] is policy:
            _entered.set(stack[:index] + stack[index + 1 :])
            return stack[index][1]
    raise RuntimeError(f"{policy!r} was not entered in this task or thread, so it cannot be left here")


class Attempt:
    """One try of `for attempt in retry:`; the block goes into `with attempt:`.

    Attributes:
        number: 1 for the first attempt.
    """

    def __init__(self, loop: "Loop", attempts: "Attempts") -> None:
        self.number = attempts.number
        self._loop = loop
        self._attempts = attempts
        self._entered = False
        self._delay: float | None = None

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Exception):
            self._delay = self._loop.next_delay(self._attempts, error, runtime.now())
        elif error is None:
            self._loop.succeeded(self._attempts.call)
        return self._delay is not None

    def _outcome(self) -> float | None:
        """Return the seconds to wait for the next attempt, or None if this was the last one."""
        if not self._entered:
            raise RuntimeError(
                f"{self._loop.label} guarded nothing in this loop; put the block under `with attempt:`, "
                "attempt being what the loop gives"
            )
        return self._delay


def attempts_of(loop: "Loop", attempts: "Attempts") -> "Iterator[Attempt]":
    """Yield attempts until one of them succeeds; `with attempt:` raises the error that ends the loop."""
    while True:
        attempt = Attempt(loop, attempts)
        yield attempt
        delay = attempt._outcome()
        if delay is None:
            return
        if delay:
            runtime.sleep(delay)
        attempts.number += 1


class AsyncAttempts:
    """The same for `async for`.

    Not a generator: one that is left early, as by the error that ends the loop, would have to be closed.
    """

    def __init__(self, loop: "Loop", attempts: "Attempts") -> None:
        self._loop = loop
        self._attempts = attempts
        self._last: Attempt | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Attempt:
        if self._last is not None:
            delay = self._last._outcome()
            if delay is None:
                raise StopAsyncIteration
            await runtime.asleep(delay)
            self._attempts.number += 1
        self._last = Attempt(self._loop, self._attempts)
        return self._last
