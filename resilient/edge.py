"""What a pipeline knows about the thing it guards.

A policy cannot know whether a 503 is a failure, whether a POST may be repeated, or how long the server asked
it to wait. The edge knows. A plain function is the simplest edge: only exceptions are failures. A failing
*result* becomes an error once, at the innermost point, and turns back into that same result at the outermost:
the policies between only ever see errors.
"""

import time
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from inspect import isawaitable
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from resilient.call import AsyncNext, Call, Next
from resilient.errors import FailedResponse, FailedResult, TimedOut

if TYPE_CHECKING:
    from resilient.http.headers import Quota
    from resilient.policies.cache import Cache
    from resilient.policy import Policy

_TOO_MANY_REQUESTS = 429

Judge: TypeAlias = Callable[[Call, Any], BaseException | None]


class Edge:
    """The contract of all edges, with the answers of a plain function.

    An edge for something else overrides what differs: see the transports and the middleware.
    """

    knows_failures = False
    """Whether `transient` can tell good errors to retry from others, so that `Retry` needs no `on=`."""

    partitions = False
    """Whether policies keep separate state for each `key` by default."""

    keeps_deadlines = False
    """Whether sync calls end at the published deadline by themselves, so that `Timeout` needs no thread."""

    streams = False
    """Whether a result may go on after it was returned, see `when_released`."""

    tells_keys = False
    """Whether keys may be shown in errors and events: not where a user chose them, as they may be secrets."""

    notes_keys = False
    """Whether a call remembers the keys that rate limits count it by, in its attribute `keys`."""

    cache: "Callable[[Cache], Policy] | None" = None
    """What `Cache` is here, if results cannot be kept as they are."""

    judges = False
    """Whether `end` raises the errors of failing results itself, and who calls the chain turns them back."""

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
        if isinstance(asked, int | float):
            return float(asked)
        response = error.result if isinstance(error, FailedResponse) else getattr(error, "response", None)
        return _asked_by(response)

    def quota(self, result: Any) -> "Quota | None":
        """Return what a response says about how many calls the other side will take, or None."""
        if not _is_response(result):
            return None
        from resilient.http import headers

        wait = _asked_by(result) if result.status_code == _TOO_MANY_REQUESTS else None
        return headers.quota(result.headers, time.time()) if wait is None else headers.Quota(None, 0, wait)

    def blames(self, error: Exception) -> bool | None:
        """Tell whether an error is the fault of the dependency.

        Returns:
            True if it is, False if it shows the dependency at work, None if it says nothing about it.
        """
        return True

    def timed_out(self, error: BaseException) -> bool:
        """Tell whether an error means that the time was over, so that the other side may still be at work."""
        return isinstance(error, TimeoutError)

    def own(self, error: TimedOut, call: Call) -> Exception:
        """Return the error of a deadline as policies are to see it: `on=` may name what users know it as."""
        return error

    def repeatable(self, call: Call, error: Exception | None = None) -> bool:
        """Tell whether the call may be made more than once.

        Args:
            call: The call.
            error: How its last attempt ended; None if there was none yet.
        """
        return True

    def replaceable(self, call: Call) -> bool:
        """Tell whether another answer can still take the place of what has failed."""
        return True

    def alternative(self, alternative: Any, call: Call) -> Any:
        """Return what an alternative of a `Fallback` answers: itself, or what it returns for the call."""
        return alternative(*call.args, **call.kwargs) if callable(alternative) else alternative

    def key(self, call: Call) -> Hashable:
        """Return the partition that the call belongs to by default."""
        return None

    def discard(self, outcome: Any) -> None:
        """Release a result, or what an error holds, that nobody will see because another one is used."""

    async def adiscard(self, outcome: Any) -> None:
        """Do the same in an async chain."""
        self.discard(outcome)

    def released(self, result: Any) -> bool:
        """Tell whether a result is all there, so that nothing will go on after it was returned."""
        return True

    def when_released(self, result: Any, callback: Callable[[BaseException | None], object]) -> None:
        """Call back once a result that goes on has ended, with the error that broke it or None."""


FUNCTION = Edge()
"""The edge of plain functions, sync and async."""

Call.edge = FUNCTION


def _is_response(result: Any) -> bool:
    """Tell whether this has a status code and headers; what only looks so (a mock) is not to be read."""
    headers = getattr(result, "headers", None)
    return isinstance(getattr(result, "status_code", None), int) and isinstance(headers, Mapping | list | tuple)


def _asked_by(response: Any) -> float | None:
    """Return how long a response asks to wait; None for anything that is no response."""
    if not _is_response(response):
        return None
    from resilient.http import headers  # most calls never come here

    return headers.throttled_for(response.status_code, response.headers, time.time())


def _invoke(call: Call) -> Any:
    kwargs = call.kwargs
    result = call.function(*call.args, **kwargs) if kwargs else call.function(*call.args)
    if result.__class__ is CoroutineType:
        refuse_coroutine(call.function, result)
    return result


def _ainvoke(call: Call) -> Any:
    kwargs = call.kwargs
    result = call.function(*call.args, **kwargs) if kwargs else call.function(*call.args)
    if result.__class__ is not CoroutineType and not isawaitable(result):
        raise TypeError(
            f"{call.function!r} was called as an async function but returned {type(result).__name__}, which "
            "cannot be awaited; use call() for sync functions"
        )
    return result


def refuse_coroutine(function: Callable[..., Any], coroutine: "CoroutineType[Any, Any, Any]") -> NoReturn:
    """Refuse what a function returned that looked like a sync one: no policy would guard its body."""
    coroutine.close()
    raise TypeError(
        f"{function!r} was called as a sync function but returned a coroutine, which no policy would guard; make "
        "it an `async def` function, or use acall()"
    )


def judge_statuses(statuses: Container[int]) -> Judge:
    """Return a judge of responses by their status: whatever has an attribute `status_code`."""

    def judge(_call: Call, result: Any) -> BaseException | None:
        return FailedResponse(result) if getattr(result, "status_code", None) in statuses else None

    return judge


def error_of(judges: Sequence[Judge], call: Call, result: Any) -> BaseException | None:
    """Return the first error that anybody sees in a result, or None; all are asked, as some learn from it."""
    return next((error for error in [judge(call, result) for judge in judges] if error is not None), None)


def judged(end: Next, judges: Sequence[Judge]) -> Next:
    """Raise the errors that failing results stand for, if there is anybody to ask."""

    def judge(call: Call) -> Any:
        try:
            result = end(call)
        except FailedResult as failure:  # the edge has judged, but others may learn from it
            error_of(judges, call, failure.result)
            raise
        error = error_of(judges, call, result)
        if error is not None:
            raise error
        return result

    return judge


def ajudged(end: AsyncNext, judges: Sequence[Judge]) -> AsyncNext:
    """Do the same for an async chain."""

    async def judge(call: Call) -> Any:
        try:
            result = await end(call)
        except FailedResult as failure:
            error_of(judges, call, failure.result)
            raise
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
