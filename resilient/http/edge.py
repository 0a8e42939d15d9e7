"""What policies may know about an HTTP request: which answers are failures, and what may be sent again.

| question                | answer                                                                               |
|-------------------------|--------------------------------------------------------------------------------------|
| failure                 | transport errors; 408, 425, 429 and 5xx, but not 501 and 505, which stay as they are  |
| worth another try       | transport errors but our own mistakes; 408, 425 (once), 429, 502, 503, 504            |
| may be sent again       | idempotent methods (RFC 9110 9.2.2), requests with an `Idempotency-Key`, and what was |
|                         | never sent; but never a body that can be read only once                              |
| fault of the dependency | all but 4xx, a full connection pool, and mistakes in the request itself               |
| default partition       | the origin: scheme, host and port                                                    |
"""

from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import ref

import anyio

from resilient import deadline, runtime
from resilient.call import AsyncNext, Call, Next
from resilient.deadline import Deadline, _current
from resilient.edge import Edge
from resilient.errors import FailedResponse, FailedResult, Rejected, TimedOut
from resilient.http.background import Background
from resilient.http.bodies import IN_MEMORY, Body, examine, guard
from resilient.http.deadline_header import DeadlineHeader
from resilient.http.family import Family
from resilient.http.streams import (
    CLOCKS_DIFFER,
    AsyncWatch,
    SyncWatch,
    Watch,
    aclose_quietly,
    close_quietly,
    watch,
)
from resilient.policies.timeout import Timeout

if TYPE_CHECKING:
    from resilient.policies.cache import Cache
    from resilient.policy import Policy

Repeatable: TypeAlias = Collection[str] | Callable[[Any], object]

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"})
"""RFC 9110 9.2.2, and QUERY of RFC 10008."""

TRANSIENT = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses after which another try may succeed."""

_FINAL = frozenset({501, 505})
_TOO_EARLY = 425
_REFUSED_STREAM = 7  # RFC 9113 7
_ANSWERED_LATE = (
    "ConnectionInputs.RECV_"  # h2 refuses what comes after GOAWAY, and httpcore calls that our mistake
)
_PROTOCOLS = frozenset({"h2", "httpcore", "httpcore2"})
_REMEMBERED = 16  # connections that have ended a moment ago
_TIMEOUTS = ("connect", "read", "write", "pool")
_DRAIN_BYTES = 64 * 1024


def origin(request: Any) -> str:
    """Return where a request goes to (RFC 6454): `https://example.com`, with the port if it is not the usual one.

    Args:
        request: A request of httpx or httpx2.
    """
    url = request.url
    try:
        parts = url._uri_reference  # private, but what is public takes as long as a policy
        place = parts.scheme, parts.host, parts.port
    except AttributeError:
        return _origin(url)
    last, found = _last[0]
    if place != last:
        found = _origin(url)
        _last[0] = place, found
    return found


def _origin(url: Any) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii').lower()}"  # the clients leave IPv6 addresses as they are


_last: list[tuple[Any, str]] = [(None, "")]  # where the last request went to, and its origin


class HttpCall(Call):
    """One request on its way through a pipeline.

    Attributes:
        request: The request, the same for all attempts.
        body: Whether it can be sent again.
        around: The deadline that was there before the pipeline.
        response: The last response that came from the transport and was not released.
        partition: The key of its partition, None until somebody asks.
        early: Whether it was answered with 425 before.
    """

    __slots__ = ("around", "body", "early", "edge", "partition", "request", "response", "tried")

    early: bool
    tried: list[Any]

    def __init__(self, edge: "HttpEdge", request: Any) -> None:
        self.function = edge.send  # not by super(): this is made for every request
        self.args = (request,)
        self.kwargs = _NO_KEYWORDS
        self.now = runtime.now()
        self.attempt = 1
        self.abandoned = ()
        self.edge: HttpEdge = edge
        self.request = request
        self.response: Any = None
        self.partition: Hashable = None
        self.around = deadline.current()
        self.body: Body = IN_MEMORY
        if request.stream.__class__ is not edge.byte_stream:
            self.body = examine(edge.family, request)

    def copy(self) -> "HttpCall":
        """Return a call that can run at the same time: of a request of its own, with the same body."""
        clone = object.__new__(type(self.request))
        clone.__dict__.update(self.request.__dict__)
        clone.headers = self.request.headers.copy()  # each tells its server its own deadline
        other = HttpCall(self.edge, clone)
        other.body, other.around = self.body, self.around
        if self.edge.balances:
            other.tried = self.tried = self.replicas()
        return other

    def replicas(self) -> list[Any]:
        """Return the list of the replicas that a load balancer has tried."""
        if not hasattr(self, "tried"):
            self.tried = []
        return self.tried


class HttpEdge(Edge):
    """The edge of a transport.

    Args:
        family: The family of the transport.
        send: The method of the wrapped transport that sends a request.
        asynchronous: Whether it is to be awaited.
        repeatable: What else may be sent again: methods, or a function of the request.
        partition: A function of the request that returns the key of its partition.
        buffer: How many bytes of a body to read as part of the attempt.
        tells: The header in which the server is told how long we will wait, None for none.
        balances: Whether the wrapped transport wants to know which replicas were tried.
        drains: Whether a body that nobody wants can be read within a time limit.
        of_attempts: The scopes that limit an attempt. They do not limit the body.
    """

    knows_failures = True
    partitions = True
    keeps_deadlines = True
    streams = True
    judges = True

    def __init__(
        self,
        family: Family,
        send: Callable[[Any], Any],
        *,
        asynchronous: bool,
        repeatable: Repeatable,
        partition: Callable[[Any], Hashable],
        buffer: int,
        tells: DeadlineHeader | None,
        balances: bool,
        drains: bool,
        of_attempts: Collection[object] = (),
    ) -> None:
        self.family = family
        self.send = send
        self.repeats = repeatable
        self.partition = partition
        self.tells_keys = partition is origin
        self.buffer = buffer
        self.tells = tells
        self.balances = balances
        self.byte_stream = family.ByteStream
        self.background = Background()
        self._drains = drains
        self._of_attempts = of_attempts
        self._watch_kind: type[Watch] = AsyncWatch if asynchronous else SyncWatch
        errors = family.module
        self._transport_errors = (errors.TransportError, TimeoutError, ConnectionError)
        self._timeouts = (errors.TimeoutException, TimeoutError)
        self._our_mistakes = (errors.UnsupportedProtocol, errors.LocalProtocolError)
        self._not_theirs = (errors.PoolTimeout, *self._our_mistakes)
        self._before_sending = (errors.ConnectTimeout, errors.PoolTimeout)
        self._never_sent = (errors.ConnectError, errors.ConnectTimeout, errors.PoolTimeout, Rejected)
        self._reports: tuple[tuple[ref[Any], ref[Exception]], ...] = ()

    @staticmethod
    def cache(cache: "Cache") -> "Policy":
        from resilient.http.cache import HttpCache  # which is built on this module

        return HttpCache(cache)

    # -- what an answer or an error means ---------------------------------------------------------------------

    def failed(self, result: Any) -> BaseException | None:
        status = result.status_code
        if status < 400 or (status < 500 and status not in TRANSIENT) or status in _FINAL:  # noqa: PLR2004
            return None
        return FailedResponse(result)

    def transient(self, error: BaseException) -> bool:
        if isinstance(error, FailedResponse):
            return error.status in TRANSIENT
        if isinstance(error, self._our_mistakes):
            return _ANSWERED_LATE in str(error)
        return isinstance(error, self._transport_errors)

    def timed_out(self, error: BaseException) -> bool:
        return isinstance(error, self._timeouts)

    def blames(self, error: Exception) -> bool | None:
        if isinstance(error, FailedResponse):
            return error.status >= 500  # noqa: PLR2004
        if isinstance(_cut_short(error), self._not_theirs):
            return None
        return None if self._told_before(error) else True

    def _told_before(self, error: Exception) -> bool:
        """Tell whether this is the end of an HTTP/2 connection that another of its requests has reported.

        Each of them gets an error of its own, but with the same event or the same error as the cause.
        """
        source = error.__cause__ if _event(error) is None else _event(error)
        if source is None or type(source).__module__.partition(".")[0] not in _PROTOCOLS:
            return False
        for told, first in self._reports:
            if told() is source:
                return first() is not error
        self._reports = (*self._reports[1 - _REMEMBERED :], (ref(source), ref(error)))
        return False

    def own(self, error: TimedOut, call: Call) -> Exception:
        assert isinstance(call, HttpCall)  # noqa: S101 - no other calls end here
        return self.family.own(error, call.request)

    # -- what may be sent again -------------------------------------------------------------------------------

    def repeatable(self, call: Call, error: Exception | None = None) -> bool:
        assert isinstance(call, HttpCall)  # noqa: S101 - no other calls end here
        if not call.body.replayable:
            return False
        if isinstance(error, FailedResponse) and error.status == _TOO_EARLY:
            if hasattr(call, "early"):  # RFC 8470 5.2: once
                return False
            call.early = True
        return self._may_repeat(call.request) or self._was_never_sent(call, error)

    def _may_repeat(self, request: Any) -> bool:
        if request.method in IDEMPOTENT or "idempotency-key" in request.headers:
            return True
        return bool(self.repeats(request)) if callable(self.repeats) else request.method in self.repeats

    def _was_never_sent(self, call: HttpCall, error: Exception | None) -> bool:
        if isinstance(_cut_short(error), self._never_sent):
            return True
        return call.response is None and _was_not_processed(_event(error))  # else it was the body that broke

    def key(self, call: HttpCall) -> Hashable:  # type: ignore[override]  # no other calls end here
        key = call.partition
        if key is None:
            key = call.partition = self.partition(call.request)
        return key

    # -- sending ----------------------------------------------------------------------------------------------

    def end(self) -> Next:
        send, plain, current, byte_stream = (
            self.send,
            not (self.balances or self.buffer or self.tells),
            _current,
            self.byte_stream,
        )

        def sending(call: HttpCall) -> Any:
            if call.response is not None:
                _forget(call)
            if call.body is not IN_MEMORY:
                self._prepare(call)
            request = call.request
            limit = current.get()
            try:
                if plain and (limit is None or _keeps(request, limit.at - call.now)):
                    response = call.response = send(request)
                    if limit is not None and (
                        response.stream.__class__ is not byte_stream or runtime.now() >= limit.at
                    ):
                        self._bound_body(call, response, limit)
                else:
                    response = self._send_within(limit, call)
            except Exception as error:
                if call.response is not None:  # before anybody waits
                    close_quietly(call.response)
                if limit is not None and self._is_due(limit, error):
                    runtime.sleep(max(0.0, limit.at - runtime.now()))  # or somebody begins another try in no time
                    raise self.own(limit.due().timed_out(), call) from error
                raise
            if response.status_code >= 400:  # noqa: PLR2004 - to ask would cost as much as a policy
                failure = self.failed(response)
                if failure is not None:
                    raise failure
            return response

        return sending  # type: ignore[return-value]

    def _prepare(self, call: HttpCall) -> None:
        if call.body.rewind is not None:
            call.body.rewind()
        else:  # there is no third kind of body that is not in memory
            guard(self.family, call.request, asynchronous=self._watch_kind is AsyncWatch)

    def _send_within(self, limit: Deadline | None, call: HttpCall) -> Any:
        request = call.request
        own, timeouts = self._extensions(limit, call)
        request.extensions = own
        try:
            response = call.response = self.send(request)
        finally:
            own.put_back(request)
        if limit is not None:
            total = self._bound_body(call, response, limit)
            self._bound_reads(call, response, total, timeouts)
        watched = self._worth_buffering(call, response)
        if watched is not None:
            body = watched.buffer(self.buffer)
            if body is not None:
                response.stream = self.byte_stream(body)
        return response

    def aend(self) -> AsyncNext:
        send, plain, current, byte_stream = (
            self.send,
            not (self.balances or self.buffer or self.tells),
            _current,
            self.byte_stream,
        )

        async def sending(call: HttpCall) -> Any:
            if call.response is not None:
                await _aforget(call)
            if call.body is not IN_MEMORY:
                self._prepare(call)
            request = call.request
            limit = current.get()
            try:
                if plain and (limit is None or _keeps(request, limit.at - call.now)):
                    response = call.response = await send(request)
                    if limit is not None and (
                        response.stream.__class__ is not byte_stream or not limit.scope.interrupt
                    ):
                        self._bound_body(call, response, limit)
                else:
                    response = await self._asend_within(limit, call)
            except Exception as error:
                if call.response is not None:
                    await aclose_quietly(call.response)
                if limit is not None and self._is_due(limit, error):
                    if limit.scope.interrupt and not isinstance(error, self._before_sending):
                        # Its cancellation is on the way, and has to find us here.
                        await runtime.asleep(max(0.0, limit.at - runtime.now()) + 10 * CLOCKS_DIFFER)
                    raise self.own(limit.due().timed_out(), call) from error
                raise
            if response.status_code >= 400:  # noqa: PLR2004 - to ask would cost as much as a policy
                failure = self.failed(response)
                if failure is not None:
                    raise failure
            return response

        return sending  # type: ignore[return-value]

    async def _asend_within(self, limit: Deadline | None, call: HttpCall) -> Any:
        request = call.request
        own, timeouts = self._extensions(limit, call)
        request.extensions = own
        try:
            response = call.response = await self.send(request)
        finally:
            own.put_back(request)
        if limit is not None:
            total = self._bound_body(call, response, limit)
            self._bound_reads(call, response, total, timeouts)
        watched = self._worth_buffering(call, response)
        if watched is not None:
            body = await watched.buffer(self.buffer)
            if body is not None:
                response.stream = self.byte_stream(body)
        return response

    def _is_due(self, limit: Deadline, error: Exception) -> bool:
        """Tell whether a timeout of the client is really that of a deadline."""
        if not isinstance(error, self._timeouts) or isinstance(error, TimedOut):
            return False
        sooner = deadline.SOONER if isinstance(error, self._before_sending) else 0.0
        return runtime.now() >= limit.at - sooner - CLOCKS_DIFFER

    def _worth_buffering(self, call: HttpCall, response: Any) -> Any:
        if not self.buffer or _goes_on(response) or (_length(response) or 0) > self.buffer:
            return None
        return watch(self.family, response, call.request, self._watch_kind)

    def _extensions(self, limit: Deadline | None, call: HttpCall) -> tuple["_Extensions", dict[str, Any]]:
        """Return the extensions for one attempt, and the timeouts in them: none is later than the deadline."""
        theirs = call.request.extensions
        if isinstance(theirs, _Extensions) and theirs.edge is self:
            theirs = theirs.theirs
        extensions = _Extensions(theirs)
        extensions.theirs, extensions.edge, extensions.told = theirs, self, None
        timeouts = dict(extensions.get("timeout") or {})
        if limit is not None:
            left = limit.at - runtime.now()
            if left <= 0:
                raise self.own(limit.timed_out(), call)
            _clip(timeouts, left)
            extensions["timeout"] = timeouts
            if self.tells is not None and self.tells.name not in call.request.headers:  # else the caller tells it
                call.request.headers[self.tells.name] = self.tells.format(left)
                extensions.told = self.tells.name
        if self.balances:
            extensions["resilient.tried"] = call.replicas()
        return extensions, timeouts

    def _bound_body(self, call: HttpCall, response: Any, limit: Deadline) -> Deadline | None:
        """Have the body end by the deadline of the whole call; an attempt's was kept when the answer came.

        What is meant to go on (a protocol upgrade, server-sent events) has no deadline.

        Returns:
            That deadline, None if there is none or the body is in memory.

        Raises:
            TimedOut: The answer came too late, from a transport that does not look at its timeouts.
        """
        if runtime.now() >= limit.at:
            raise self.own(limit.due().timed_out(), call)
        if response.stream.__class__ is self.byte_stream or _goes_on(response):
            return None
        total = self._total(call, limit)
        if total is not None:
            watched = watch(self.family, response, call.request, self._watch_kind)
            if watched.limit is None or total.at < watched.limit.at:  # a guard further in has its own
                watched.limit = total
        return total

    def _bound_reads(
        self, call: HttpCall, response: Any, total: Deadline | None, timeouts: dict[str, Any]
    ) -> None:
        """Replace the timeouts of an attempt by those for the body: transports look at them again before it."""
        if response.stream.__class__ is not self.byte_stream:
            timeouts.clear()
            timeouts.update(call.request.extensions.get("timeout") or {})
            if total is not None:
                _clip(timeouts, max(total.at - runtime.now(), CLOCKS_DIFFER))

    def _total(self, call: HttpCall, limit: Deadline) -> Deadline | None:
        """Return the deadline of the whole call: the soonest of those that are not an attempt's, or None."""
        inner: Deadline | None = limit
        while inner is not None and inner is not call.around:
            if inner.scope not in self._of_attempts:
                return inner
            inner = inner.outer
        return call.around

    # -- releasing --------------------------------------------------------------------------------------------

    def released(self, result: Any) -> bool:
        stream = result.stream
        if stream.__class__ is self.byte_stream:
            return True
        return not (isinstance(stream, Watch) and stream.limit is not None) and _goes_on(result)

    def when_released(self, result: Any, callback: Callable[[BaseException | None], object]) -> None:
        watch(self.family, result, None, self._watch_kind).when_released(callback)

    def discard(self, outcome: Any) -> None:
        response = outcome.result if isinstance(outcome, FailedResult) else outcome
        if not isinstance(response, self.family.Response):
            return
        try:
            if self._drains and self._is_short(response):
                with deadline.published(Deadline(_soon(), _DRAIN)):
                    for _chunk in _rest(response):
                        pass
        except Exception:  # noqa: S110 - then the connection is given up, as it would be without reading
            pass
        finally:
            close_quietly(response)

    async def adiscard(self, outcome: Any) -> None:
        response = outcome.result if isinstance(outcome, FailedResult) else outcome
        if not isinstance(response, self.family.Response):
            return
        try:
            if self._is_short(response):
                with anyio.move_on_after(_DRAIN.limit()):
                    async for _chunk in _rest(response):
                        pass
        except Exception:  # noqa: S110 - see above
            pass
        finally:
            await aclose_quietly(response)

    def _is_short(self, response: Any) -> bool:
        """Tell whether it is cheaper to read a body than to open a new connection."""
        length = _length(response)
        return length is not None and length <= _DRAIN_BYTES and response.stream.__class__ is not self.byte_stream


class _Extensions(dict[str, Any]):
    """The extensions of a request during one attempt.

    Attributes:
        theirs: Those of the caller, which are put back.
        edge: Who puts them back.
        told: The header that was added for this attempt, and goes with it: a client may send the same request
            again later, or its fields to somebody else. None if there is none.
    """

    __slots__ = ("edge", "theirs", "told")

    theirs: dict[str, Any]
    edge: HttpEdge
    told: str | None

    def put_back(self, request: Any) -> None:
        """Leave the request as the caller has made it."""
        request.extensions = self.theirs
        if self.told is not None:
            request.headers.pop(self.told, None)


_NO_KEYWORDS: dict[str, Any] = {}
_DRAIN = Timeout(0.05, interrupt=False)


def _forget(call: HttpCall) -> None:
    """Release what an earlier attempt has left, if an error of somebody else's came in between."""
    close_quietly(call.response)
    call.response = None


async def _aforget(call: HttpCall) -> None:
    await aclose_quietly(call.response)
    call.response = None


def _rest(response: Any) -> Any:
    """Return what is left of a body, without the deadlines of those who meant to read it."""
    return response.stream.rest() if isinstance(response.stream, Watch) else response.stream


def _soon() -> float:
    soon = runtime.now() + _DRAIN.limit()
    around = deadline.current()
    return soon if around is None else min(soon, around.at)


def _keeps(request: Any, left: float) -> bool:
    """Tell whether the timeouts of a request are no longer than what is left, so that none has to be cut."""
    extensions = request.extensions
    if extensions.__class__ is _Extensions:  # not the caller's: somebody else is sending the same request
        return False
    try:
        connect, read, write, pool = extensions["timeout"].values()
        return connect <= left and read <= left and write <= left and pool <= left  # type: ignore[no-any-return]
    except (AttributeError, KeyError, TypeError, ValueError):  # not all four, or None among them
        return False


def _clip(timeouts: dict[str, Any], left: float) -> None:
    for name in _TIMEOUTS:
        own = timeouts.get(name)
        most = left if name in {"read", "write"} else deadline.waiting_time(left)
        if own is None or own > most:
            timeouts[name] = most


def _length(response: Any) -> int | None:
    given = response.headers.get("content-length", "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 20 else None  # noqa: PLR2004


def _goes_on(response: Any) -> bool:
    """Tell whether the body is a stream without an end that one could wait for."""
    kind: str = response.headers.get("content-type", "")
    return response.status_code == 101 or kind.lower().startswith("text/event-stream")  # noqa: PLR2004


def _cut_short(error: Exception | None) -> BaseException | None:
    """Return what went on when a deadline passed, if it is known, or else the error itself."""
    return error.__cause__ if isinstance(error, TimedOut) and error.__cause__ is not None else error


def _event(error: Exception | None) -> Any:
    """Return the HTTP/2 event that is the cause of an error, as httpcore hands it on."""
    cause = getattr(error, "__cause__", None)
    return cause.args[0] if cause is not None and cause.args and hasattr(cause.args[0], "error_code") else None


def _was_not_processed(event: Any) -> bool:
    """Tell whether a request was refused unseen: alone, or with all others of its connection (RFC 9113 8.7)."""
    if event is None:
        return False
    last: int | None = getattr(event, "last_stream_id", None)
    return bool(event.error_code == _REFUSED_STREAM) if last is None else last == 0
