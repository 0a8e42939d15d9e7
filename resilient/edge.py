"""What a pipeline knows about the thing it guards.

A policy cannot know whether a 503 is a failure, whether a POST may be repeated, or how long the server asked
it to wait. The edge knows. A plain function is the simplest edge: only exceptions are failures. A failing
*result* becomes an error once, at the innermost point, and turns back into that same result at the outermost:
the policies between only ever see errors.
"""

from collections.abc import Callable, Hashable, Sequence
from types import CoroutineType
from typing import Any, NoReturn, TypeAlias

from resilient.call import AsyncNext, Call, Next
from resilient.errors import FailedResult

Judge: TypeAlias = Callable[[Call, Any], BaseException | None]


class Edge:
    """The contract of all edges, with the answers of a plain function.

    An edge for something else overrides what differs: see the transports and the middleware.
    """

    knows_failures = False
    """Whether `transient` can tell good errors to retry from others, so that `Retry` needs no `on=`."""

    def end(self) -> Next:
        """Return the innermost function of a sync chain: it makes the call."""
        return _invoke

    def aend(self) -> AsyncNext:
        """Return the innermost function of an async chain: it returns the awaitable of the call."""
        return _ainvoke

    def failed(self, result: Any) -> BaseException | None:
        """Return the error that a result stands for, or None if it is a good one."""
        return None

    def transient(self, error: BaseException) -> bool:
        """Tell whether another try may succeed where this error came up."""
        return isinstance(error, FailedResult)

    def retry_after(self, error: BaseException) -> float | None:
        """Return how many seconds the other side asked to wait, or None if it did not say."""
        asked = getattr(error, "retry_after", None)
        return float(asked) if isinstance(asked, int | float) else None

    def repeatable(self, call: Call) -> bool:
        """Tell whether the call may be made more than once."""
        return True

    def key(self, call: Call) -> Hashable:
        """Return the partition that the call belongs to by default."""
        return None

    def discard(self, outcome: Any) -> None:
        """Release a result, or what an error holds, that nobody will see because another one is used."""


FUNCTION = Edge()
"""The edge of plain functions, sync and async."""


def _invoke(call: Call) -> Any:
    kwargs = call.kwargs
    result = call.function(*call.args, **kwargs) if kwargs else call.function(*call.args)
    if result.__class__ is CoroutineType:
        refuse_coroutine(call.function, result)
    return result


def _ainvoke(call: Call) -> Any:
    kwargs = call.kwargs
    return call.function(*call.args, **kwargs) if kwargs else call.function(*call.args)


def refuse_coroutine(function: Callable[..., Any], coroutine: "CoroutineType[Any, Any, Any]") -> NoReturn:
    """Refuse what a function returned that looked like a sync one: no policy would guard its body."""
    coroutine.close()
    raise TypeError(
        f"{function!r} was called as a sync function but returned a coroutine, which no policy would guard; make "
        "it an `async def` function, or use acall()"
    )


def error_of(judges: Sequence[Judge], call: Call, result: Any) -> BaseException | None:
    """Return the first error that anybody sees in a result, or None."""
    return next((error for judge in judges if (error := judge(call, result)) is not None), None)


def judged(end: Next, judges: Sequence[Judge]) -> Next:
    """Raise the errors that failing results stand for, if there is anybody to ask."""

    def judge(call: Call) -> Any:
        result = end(call)
        error = error_of(judges, call, result)
        if error is not None:
            raise error
        return result

    return judge


def ajudged(end: AsyncNext, judges: Sequence[Judge]) -> AsyncNext:
    """Do the same for an async chain."""

    async def judge(call: Call) -> Any:
        result = await end(call)
        error = error_of(judges, call, result)
        if error is not None:
            raise error
        return result

    return judge


def restoring(chain: Next) -> Next:
    """Turn a failed result that nobody handled back into the result that it is."""

    def restore(call: Call) -> Any:
        try:
            return chain(call)
        except FailedResult as failure:
            return failure.result

    return restore


def arestoring(chain: AsyncNext) -> AsyncNext:
    """Do the same for an async chain."""

    async def restore(call: Call) -> Any:
        try:
            return await chain(call)
        except FailedResult as failure:
            return failure.result

    return restore
