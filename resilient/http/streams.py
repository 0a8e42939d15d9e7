"""The body of a response, watched: it ends by its deadline, and somebody hears when it has been released.

A transport hands out a response before its body has been read. So a deadline of the whole call has to be kept
while the caller reads, and what is counted until the end (a permit, a request in flight) ends only when the body
does: read to its end, broken, closed, or never read and collected.
"""

import asyncio
import functools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, NoReturn, Self

import anyio

from resilient import runtime
from resilient.deadline import Deadline, _current
from resilient.http.family import Family
from resilient.timers import Alarm, Timer

Released = Callable[[BaseException | None], object]

CLOCKS_DIFFER = 0.001
"""Seconds by which a socket may time out before our own clock says so."""

CLOSE_SECONDS = 1.0
"""How long closing a connection may take when it can no longer be cancelled."""


_NOTHING: Final[deque[bytes]] = deque()


class Watch:
    """What the watched bodies of both colours have in common.

    Args:
        family: The family of the response.
        stream: The body as the transport gave it.
        request: What it answers.

    Attributes:
        limit: The deadline of the body, None for one that has none.
        finished: Whether it was read to its end.
        tap: What is shown each chunk as it passes, or None.
    """

    limit: Deadline | None = None
    finished = False
    tap: Callable[[bytes], object] | None = None
    _chunks: Any = None
    _ahead: deque[bytes] = _NOTHING  # what `buffer` has read
    _alarm: Alarm | None = None

    def __init__(self, family: Family, stream: Any, request: Any) -> None:
        self.stream = stream
        self._family = family
        self._request = request
        self._callbacks: list[Released] = []

    def when_released(self, callback: Released) -> None:
        """Call back once the body has ended: with the error that broke it, or None."""
        self._callbacks.append(callback)

    def release(self, error: BaseException | None) -> None:
        """Tell everybody who waits, but once."""
        if self._alarm is not None:
            self._alarm.disarm()
        callbacks = self._callbacks
        while callbacks:
            try:
                callback = callbacks.pop(0)
            except IndexError:  # another thread has closed it meanwhile
                return
            callback(error)

    def __del__(self) -> None:
        if self._callbacks:  # nobody has read or closed it
            _leaked.append(self._callbacks)

    def rest(self) -> Any:
        """Return what is left of the body, to be read by somebody who keeps no deadline and tells nobody."""
        return self.stream if self._chunks is None else self._chunks

    def _soonest(self) -> Deadline | None:
        """Return the deadline of what is read ahead: it is part of the attempt, whose deadline may be sooner."""
        around, limit = _current.get(), self.limit
        return around if limit is None or (around is not None and around.at < limit.at) else limit

    def _is_due(self, limit: Deadline, error: BaseException) -> bool:
        timeouts = (self._family.module.TimeoutException, TimeoutError)
        return isinstance(error, timeouts) and runtime.now() >= limit.at - CLOCKS_DIFFER

    def _timed_out(self, limit: Deadline) -> Exception:
        return self._family.own(limit.timed_out(), self._request)


class SyncWatch(Watch):
    """A watched body in sync code."""

    def __iter__(self) -> Iterator[bytes]:
        while self._ahead:
            yield self._ahead.popleft()
        while (chunk := self._next(self.limit)) is not None:
            yield chunk

    def buffer(self, bound: int) -> bytes | None:
        """Read the whole body now; None if it is longer than `bound` bytes, which is still read from the front."""
        size, ahead = 0, deque(self._ahead)
        self._ahead = ahead
        limit = self._soonest()
        while size <= bound:
            chunk = self._next(limit)
            if chunk is None:
                self.close()
                return b"".join(ahead)
            ahead.append(chunk)
            size += len(chunk)
        return None

    def _next(self, limit: Deadline | None) -> bytes | None:
        chunks = self._chunks
        if chunks is None:
            chunks = self._chunks = iter(self.stream)
        try:
            chunk: bytes | None = next(chunks, None) if limit is None else self._next_within(limit, chunks)
        except BaseException as error:
            self.release(error)
            raise
        if chunk is None:
            self.finished = True
            self.release(None)
        elif self.tap is not None:
            self.tap(chunk)
        return chunk

    def _next_within(self, limit: Deadline, chunks: Iterator[bytes]) -> bytes | None:
        around = _current.get()
        if around is not None and around.at < limit.at:
            limit = around
        token = _current.set(limit)  # deadline.published(), in place
        try:
            chunk = next(chunks, None)
        except Exception as error:
            if not self._is_due(limit, error):
                raise
            self.stream.close()
            raise self._timed_out(limit) from error
        finally:
            _current.reset(token)
        if chunk is not None and runtime.now() >= limit.at:
            self.stream.close()
            raise self._timed_out(limit)
        return chunk

    def close(self) -> None:
        """Release the connection."""
        try:
            self.stream.close()
        finally:
            self.release(None)


class AsyncWatch(Watch):
    """A watched body in async code."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while self._ahead:
                yield self._ahead.popleft()
            while (chunk := await self._next(self.limit)) is not None:
                yield chunk
        finally:
            if not self.finished:
                await self._stop()

    async def buffer(self, bound: int) -> bytes | None:
        """Read the whole body now; None if it is longer than `bound` bytes, which is still read from the front."""
        size, ahead = 0, deque(self._ahead)
        self._ahead = ahead
        limit = self._soonest()
        while size <= bound:
            chunk = await self._next(limit)
            if chunk is None:
                await _close_to_the_end(self.aclose)
                return b"".join(ahead)
            ahead.append(chunk)
            size += len(chunk)
        return None

    async def _next(self, limit: Deadline | None) -> bytes | None:
        chunks = self._chunks
        if chunks is None:
            chunks = self._chunks = self.stream.__aiter__()
        try:
            if limit is None:
                chunk: bytes | None = await anext(chunks, None)
            else:
                alarm = self._alarm
                if alarm is None or alarm.at != limit.at:
                    alarm = self._until(limit)
                try:
                    with alarm as scope:
                        chunk = await anext(chunks, None)
                except Exception as error:
                    if not self._is_due(limit, error):
                        raise
                    await self._time_out(limit, error)
                if scope.cancelled_caught:
                    await self._time_out(limit, None)
        except BaseException as error:
            self.release(error)
            raise
        if chunk is None:
            self.finished = True
            self.release(None)
        elif self.tap is not None:
            self.tap(chunk)
        return chunk

    async def _time_out(self, limit: Deadline, cause: BaseException | None) -> NoReturn:
        await _close_to_the_end(self.stream.aclose)
        raise self._timed_out(limit) from cause

    def _until(self, limit: Deadline) -> Any:
        """Return what ends a step of the running task in time; on asyncio it is kept for the steps that follow."""
        if runtime.in_trio():
            return anyio.move_on_after(limit.at - runtime.now())
        around = _current.get()
        if isinstance(around, Timer) and around.at <= limit.at and around.task is asyncio.current_task():
            return _NO_ALARM
        if self._alarm is not None:  # the limit has changed
            self._alarm.disarm()
        self._alarm = Alarm(limit)
        return self._alarm

    async def aclose(self) -> None:
        """Release the connection."""
        try:
            if not self.finished:
                await self._stop()
            await self.stream.aclose()
        finally:
            self.release(None)

    async def _stop(self) -> None:
        """End a generator that is not read to its end, which event loops do not like to find by themselves."""
        if not getattr(self._chunks, "ag_running", True):
            await self._chunks.aclose()


class _NoAlarm:
    """What ends no step, as the task is in a scope that cancels it by then.

    To cancel it twice would cut short what httpcore does when it is cancelled: to close the connection.
    """

    cancelled_caught = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing."""


_NO_ALARM: Final = _NoAlarm()


def close_quietly(response: Any) -> None:
    """Close a response that nobody wants; if that fails, there is an error already that matters more."""
    try:
        response.close()
    except Exception:  # noqa: S110
        pass


async def aclose_quietly(response: Any) -> None:
    """Do the same in async code, for at most a moment, and in a cancelled task too: that may be the reason."""
    if not response.is_closed:
        await _close_to_the_end(response.aclose)


async def _close_to_the_end(close: Callable[[], Awaitable[None]]) -> None:
    """Close something quietly, however often the task is cancelled meanwhile.

    httpcore closes once: if that is cut short, its pool counts the connection for ever. The shields of anyio do
    not keep off what cancels an asyncio task by itself, as our own deadlines do, so there another task closes it.
    """
    if runtime.in_trio():
        await _close(close)
        return
    closing = asyncio.create_task(_close(close))
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not closing.done():
            try:
                await asyncio.wait((closing,))
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


async def _close(close: Callable[[], Awaitable[None]]) -> None:
    try:
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await close()
    except Exception:  # noqa: S110
        pass


_leaked: deque[list[Released]] = deque()


def release_leaked() -> None:
    """Release the bodies that were collected unread; called when the next request is sent.

    Not by their finalizers: a garbage collection can run in the middle of anything, also where the thread holds
    the very lock that a callback needs.
    """
    while _leaked:
        for callback in _leaked.popleft():
            callback(None)


def watch(family: Family, response: Any, request: Any, kind: Any) -> Any:
    """Watch the body of a response; None if there is nothing to watch, as all of it is in memory.

    Args:
        family: The family of the response.
        response: What the transport returned; its stream is replaced, once.
        request: What it answers.
        kind: `SyncWatch` or `AsyncWatch`.
    """
    stream = response.stream
    if isinstance(stream, Watch):
        return stream
    if stream.__class__ is family.ByteStream:
        return None
    watched = _of_family(kind, family)(family, stream, request)
    response.stream = watched
    return watched


@functools.cache
def _of_family(kind: Any, family: Family) -> Any:
    """Return the class that the clients of this family accept: they insist on their own base class."""
    base = family.module.SyncByteStream if kind is SyncWatch else family.module.AsyncByteStream
    return type(kind.__name__, (kind, base), {"__module__": __name__})
