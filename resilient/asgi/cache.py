"""What `Cache` is around an ASGI application: it keeps what a shared cache may, and serves it in need.

One cache answers everybody, so it keeps less than the one on a client (`resilient.http.cache`), by the same rules
(RFC 9111 and RFC 5861, in `resilient.http.rfc9111` and `resilient.http.cache_policy`). This is what happens to one
request:

    keeps out    not GET or HEAD, a range, `no-store`, a body. If it was a write and goes well, what it has made
                 obsolete is forgotten before its response goes out.
    served       a stored response that is fresh; or an old one, while the application runs in the background
    follows      the application is answering the same right now: wait for that
    goes on      to the policies further in. The response goes out as it comes, and is collected on its way. If
                 there is a failure instead, and nothing has gone out, an old response may be served.

Those who follow hear from the one who leads

    when the response begins, but is not for them    they all go on by themselves
    when it begins, and may be for them              they give it `PATIENCE_SECONDS` more, as it goes out no faster
                                                     than a client reads
    when it is there                                 those whom it fits are served, the others go on
    when there is a failure                          they get an old response, or go on. It is never shared: it may
                                                     be about the request of the one who leads
    when he was cancelled, or his time was over      the one who has waited longest leads

Nobody knows who asks but the application, so requests with credentials (`rfc9111.WHO`) are answered apart from all
others, and for them only what says that it is for everybody is kept (RFC 9111 3.5), unless there is a `key=`.
"""

import math
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
from cachetools import LRUCache

from resilient import deadline, runtime
from resilient.asgi.cache_rules import (
    CONDITIONS,
    disowned,
    has_the_same,
    is_for_all,
    name_of,
    nothing_more,
    plain_get,
    target_of,
    tells_who,
    url_of,
)
from resilient.asgi.edge import AsgiEdge
from resilient.asgi.exchange import AsgiCall, Fields, Message, Receive, Scope, Send, is_event_stream
from resilient.call import AsyncNext, Call, Next
from resilient.edge import Edge
from resilient.errors import Rejected
from resilient.http import rfc9111
from resilient.http.cache_flights import ALONE, Passenger
from resilient.http.cache_policy import FOLLOW, ResponseCache, Visit
from resilient.http.cache_store import BODY_BYTES, Entry
from resilient.http.headers import lines
from resilient.kinds import MISSING, _background

if TYPE_CHECKING:
    from resilient.policies.cache import Cache

PATIENCE_SECONDS: Final = 1.0
"""For how long those who follow wait for the rest of a response that has begun."""

RENEWAL_SECONDS: Final = 300.0
"""How long the application may take to answer in the background."""

_OK = 200
_NO_CONTENT = 204
_BAD_REQUEST = 400
_SERVER_ERROR = 500
_NOT_MODIFIED = 304
_GATEWAY_TIMEOUT = 504
_GONE = frozenset({404, 410})
_DEMANDS = frozenset(
    b"cache-control content-length if-match if-range if-unmodified-since pragma range transfer-encoding".split()
)  # to look at a few many times takes less long
_OF_THE_BODY = frozenset({b"content-length", b"content-type", b"content-encoding", b"content-language"})
_BESIDE = frozenset({"http.response.early_hint", "http.response.push", "http.response.debug"})
_BEGUN = object()  # an outcome: the response has begun


class StoredResponse:
    """A response from memory; an ASGI application.

    Args:
        status_code: Its status.
        headers: Its fields, as pairs of bytes.
        body: Its body.
    """

    __slots__ = ("body", "headers", "status_code")

    def __init__(self, status_code: int, headers: Fields, body: bytes) -> None:
        self.status_code = status_code
        self.headers = headers
        self.body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body})


class _Visit(Visit):
    """One request on its way through the cache.

    Attributes:
        known: Whether it says who asks, and there is no `key=` to tell people apart.
        began: When its response began.
        scope: The scope of its request; only visits in the background have one.
    """

    __slots__ = ("began", "known", "scope")

    call: AsgiCall
    renewal: "_Visit | None"
    scope: Scope

    def __init__(self, call: AsgiCall, headers: Fields, demands: rfc9111.Demands) -> None:
        super().__init__(call, call.scope["method"], headers, demands)
        self.known = False
        self.began: float | None = None


class _Tee:
    """Collects a response on its way out, up to a bound. It never raises and never waits.

    Attributes:
        done: Whether there is nothing more to collect.
        declined: Whether the response is not to be kept.
    """

    __slots__ = ("_cache", "_chunks", "_entry", "_size", "_visit", "declined", "done")

    def __init__(self, cache: "AsgiCache", visit: _Visit) -> None:
        self._cache = cache
        self._visit = visit
        self._chunks: list[bytes] = []
        self._size = 0
        self._entry: Entry | None = None
        self.done = self.declined = False

    def __call__(self, message: Message) -> None:
        kind = message["type"]
        if self.done or kind in _BESIDE:
            return
        if kind == "http.response.start":
            self._entry = self._cache._arrived(self._visit, message)
            self.done = self.declined = self._entry is None
            return
        if self._entry is None:
            return
        if kind == "http.response.body":
            chunk = bytes(message.get("body", b""))
            self._size += len(chunk)
            self._chunks.append(chunk)
            if message.get("more_body", False) and self._size <= BODY_BYTES:
                return
            self._entry.body = b"".join(self._chunks)
        self.done = True  # any other message is a body that the server gets from elsewhere
        self._chunks.clear()
        self.declined = not self._cache._ended(self._visit, self._entry)


class AsgiCache(ResponseCache[_Visit]):
    """What a `Cache` is around ASGI applications: all that share the `Cache` share this."""

    shared = True
    renews_for_head = True

    def __init__(self, cache: "Cache") -> None:
        super().__init__(cache)
        self._for_all: LRUCache[Hashable, None] = LRUCache(cache.max_entries)  # what those who are known may share

    def link(self, nxt: Next, edge: Edge) -> Next:
        raise TypeError(f"{self.cache.label}: there are no sync ASGI applications")

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        assert isinstance(edge, AsgiEdge)  # noqa: S101 - it has sent us here

        async def cached(call: Call) -> Any:
            assert isinstance(call, AsgiCall)  # noqa: S101 - no other calls come from an `AsgiEdge`
            visit = self._enter(call)
            if visit is None:
                return await nxt(call)
            answer = self._look(visit)
            if answer is FOLLOW:
                answer = await self._afollow(visit)
            elif visit.renewal is not None:
                start(visit.renewal)
            return await fetch(visit) if answer is MISSING else answer

        async def fetch(visit: _Visit) -> Any:
            call, tee = visit.call, _Tee(self, visit)
            if visit.gets:
                call.tees = [*(call.tees or ()), tee]
            try:
                result = await nxt(self._go(visit))
            except Exception as error:
                answer = self._failed(visit, error)
                if answer is MISSING:
                    raise
                return answer
            except BaseException:
                self._abandon(visit)
                raise
            finally:
                if visit.gets:
                    call.tees = [other for other in call.tees or () if other is not tee] or None
            self._land(visit, ALONE)  # if nothing has landed it: it was not whole, or not the application's
            return result

        def start(visit: _Visit) -> None:
            runtime.start_task(lambda: renew(visit), _background(), lambda: self._abandon(visit))

        async def renew(visit: _Visit) -> None:
            tee = _Tee(self, visit)
            try:
                with anyio.fail_after(RENEWAL_SECONDS) as limit:

                    async def send(_message: Message) -> None:
                        await anyio.lowlevel.checkpoint()
                        if tee.declined:
                            raise OSError("nobody wants the rest")  # as if the client had gone: it may be endless
                        if tee.done:
                            limit.deadline = math.inf  # background tasks of the application may take their time

                    visit.call = AsgiCall(edge, visit.scope, nothing_more(), send, runtime.now())
                    visit.call.tees = [tee]
                    await nxt(self._go(visit))
            except Exception as error:
                failure = visit.call.failure
                if not tee.done or failure is not None:  # who declines a response lets its sender fail
                    self._not_renewed(visit, error, failure or error)
            finally:
                self._abandon(visit)

        return cached

    # -- before: what a request gets ------------------------------------------------------------------------------

    def _enter(self, call: AsgiCall) -> _Visit | None:
        """Return the visit that begins here, None if the cache keeps out of this request."""
        scope = call.scope
        if scope["method"] not in {"GET", "HEAD"}:
            call.tees = [*(call.tees or ()), lambda message: self._passed(scope, message)]
            return None
        headers = list(scope["headers"])
        demands = rfc9111.demands(scope["method"], [field for field in headers if field[0] in _DEMANDS])
        if demands.bypass:
            return None
        visit = _Visit(call, headers, demands)
        visit.conditional = any(name in CONDITIONS for name, _value in headers)
        visit.known = self.cache.key is None and tells_who(scope, headers)
        visit.primary = target_of(scope, headers, visit.known) if self.cache.key is None else self._own_key(scope)
        return visit

    def _join(self, visit: _Visit, key: Hashable, now: float) -> Any:
        visit.names = name_of(url_of(visit.call.scope)), visit.primary
        return super()._join(visit, key, now)

    def _alone(self, visit: _Visit, now: float) -> bool:
        return super()._alone(visit, now) or (visit.known and visit.primary not in self._for_all)

    def _patience(self, leader: Passenger) -> float | None:
        assert isinstance(leader, _Visit)  # noqa: S101
        return None if leader.began is None else leader.began + PATIENCE_SECONDS

    def _gave_up(self, visit: _Visit) -> Any:
        limit = deadline.current()
        if limit is not None and limit.at == visit.ticket.expires_at:
            return super()._gave_up(visit)
        with self._lock:
            self._flights.set_apart(visit.primary, visit.call.now)
        return MISSING

    def _heard(self, visit: _Visit, outcome: Any) -> Any:
        if outcome is _BEGUN:
            flight = visit.followed
            with self._lock:
                if self._flights.get(flight.key) is flight:
                    self._flights.follow(visit, flight, deadline.tightest(self._patience(flight.leader)))
                    return FOLLOW
                outcome, _variant = self._store.find(visit.primary, visit.headers)  # it has ended meanwhile
        return super()._heard(visit, outcome)

    def _renewal_of(self, visit: _Visit, entry: Entry) -> _Visit:
        renewal = _Visit(visit.call, visit.headers, visit.demands)
        renewal.scope = plain_get(visit.call.scope)
        renewal.known, renewal.primary = visit.known, visit.primary
        renewal.names = name_of(url_of(renewal.scope)), visit.primary
        return renewal

    # -- after: what comes of it ----------------------------------------------------------------------------------

    def _passed(self, scope: Scope, message: Message) -> None:
        """Forget what a write has made obsolete."""
        if message["type"] == "http.response.start":
            self._wrote(scope, scope["method"], message["status"], url_of(scope), message.get("headers", ()))

    def _name_of(self, url: str) -> Hashable:
        return name_of(url)

    def _arrived(self, visit: _Visit, message: Message) -> Entry | None:
        """Take note that a response begins; return what is to be kept of it, or None."""
        now, status, fields = runtime.now(), message["status"], message.get("headers", ())
        entry = None if message.get("trailers", False) else self._entry(visit, now)
        told = rfc9111.Directives.of_response(fields)
        with self._lock:
            if entry is not None and entry.age(now) < entry.lifetime.fresh and (entry.length or 0) <= BODY_BYTES:
                self._flights.unite(visit.primary)
                if visit.known:
                    self._for_all[visit.primary] = None
                visit.began = now
                self._flights.tell(visit, _BEGUN)
                return entry
            self._flights.land(visit, ALONE)
            if entry is None and (status in _GONE or (status < _BAD_REQUEST and disowned(told))):
                self._store.drop(visit.primary, visit.headers)  # the application does not stand by it any more
            if status < _SERVER_ERROR:
                self._flights.set_apart(visit.primary, now)
        return None if entry is None or (entry.length or 0) > BODY_BYTES else entry

    def _entry(self, visit: _Visit, now: float) -> Entry | None:
        """Return what is to be kept of a response, None if it must not be kept or is of no use."""
        response, sent = visit.call.response, list(visit.call.scope["headers"])
        assert response is not None  # noqa: S101 - it has just begun
        status, fields = response.status_code, response.headers  # the application's, without those about limits
        told = rfc9111.Directives.of_response(fields)
        if self.cache.key is not None:  # it tells people apart
            asked = [field for field in sent if field[0] != b"authorization"]
        elif (visit.known or tells_who(visit.call.scope, sent)) and not is_for_all(told):
            return None
        else:
            asked = sent
        if not rfc9111.storable("GET", asked, status, fields, shared=True):
            return None
        if is_event_stream(fields):
            return None
        lengths = [int(line) for line in lines(fields, "content-length") if line.isdecimal()]
        return self._entry_of(
            visit,
            status,
            fields,
            sent,
            now=now,
            received=time.time(),
            length=max(lengths, default=None),
            extensions={},
        )

    def _ended(self, visit: _Visit, entry: Entry) -> bool:
        """Keep a response that has ended, if it is whole; tell whether it was."""
        with self._lock:
            self._keep(visit, entry, runtime.now())
        return entry.whole

    def _told(self, error: Exception) -> Any:
        # A refusal can be about this client alone, and to be refused one after the other would take long.
        return ALONE if isinstance(error, Rejected) else error

    # -- responses ------------------------------------------------------------------------------------------------

    def _not_cached(self, visit: _Visit) -> StoredResponse:
        fields = [(b"content-length", b"0"), (b"cache-status", b"resilient; detail=only-if-cached")]
        return StoredResponse(_GATEWAY_TIMEOUT, fields, b"")

    def _answer(self, visit: _Visit, entry: Entry, served: str, status: str, now: float) -> StoredResponse:
        """Return a kept response for one request: whole, without its body, or 304 if the client has the same."""
        body = entry.body or b""
        fields = [*entry.shown, (b"age", b"%d" % int(entry.age(now))), (b"cache-status", status.encode())]
        if visit.conditional and entry.status == _OK and has_the_same(visit.headers, entry.shown):
            return StoredResponse(
                _NOT_MODIFIED, [field for field in fields if field[0].lower() not in _OF_THE_BODY], b""
            )
        if entry.length is None and entry.status != _NO_CONTENT:
            fields.append((b"content-length", b"%d" % len(body)))
        return StoredResponse(entry.status, fields, body if visit.gets else b"")
