"""What `Cache` is around an ASGI application: it keeps what a shared cache may, and serves it in need.

One cache answers everybody, so it keeps less than the one on a client (`resilient.http.cache`), by the same rules
(RFC 9111 and RFC 5861, in `resilient.http.rfc9111`). This is what happens to one request:

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

Nobody knows who asks but the application, so requests with credentials (`WHO`) are answered apart from all others,
and for them only what says that it is for everybody is kept (RFC 9111 3.5), unless there is a `key=`.
"""

import math
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel
from cachetools import LRUCache

from resilient import deadline, events, options, runtime
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
from resilient.asgi.exchange import AsgiCall, Fields, Message, Receive, Scope, Send
from resilient.call import AsyncNext, Call, Next
from resilient.edge import Edge
from resilient.errors import FailedResponse, Rejected
from resilient.http import rfc9111
from resilient.http.cache_flights import ALONE, Flights, Passenger
from resilient.http.cache_store import BODY_BYTES, Entry, Store, said
from resilient.http.headers import lines
from resilient.kinds import MISSING, _background
from resilient.policy import Policy

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
_NO_USE = rfc9111.Use(now=False, while_refreshing=False, on_error=False)
_FOLLOW = object()  # instead of a response: wait for the ticket
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


class _Visit(Passenger):
    """One request on its way through the cache.

    Attributes:
        call: The call.
        headers: The fields of its request, as they came.
        demands: What the request demands of a cache.
        gets: Whether it is a GET; the other ones are HEAD.
        conditional: Whether the client has something to compare with.
        known: Whether it says who asks, and there is no `key=` to tell people apart.
        primary: What its responses are kept under.
        names: What a write forgets these responses by, once it goes on.
        number: Its number among all requests, once it goes on.
        sent: When it went on.
        began: When its response began.
        renewal: The visit in the background that renews what this one was served.
        scope: The scope for it; only visits in the background have one.
    """

    __slots__ = (
        "began",
        "call",
        "conditional",
        "demands",
        "gets",
        "headers",
        "known",
        "names",
        "number",
        "primary",
        "renewal",
        "scope",
        "sent",
    )

    scope: Scope

    def __init__(self, call: AsgiCall, headers: Fields, demands: rfc9111.Demands) -> None:
        super().__init__()
        self.call = call
        self.headers = headers
        self.demands = demands
        self.gets = call.scope["method"] == "GET"
        self.conditional = self.known = False
        self.primary: Hashable = None
        self.names: tuple[Hashable, ...] = ()
        self.number = 0
        self.sent = call.now
        self.began: float | None = None
        self.renewal: _Visit | None = None


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


class AsgiCache(Policy):
    """What a `Cache` is around ASGI applications: all that share the `Cache` share this.

    Args:
        cache: The policy whose options these are, and which reports events and statistics.

    Emits:
        CacheStaleServed, CacheRefreshFailed.
    """

    def __init__(self, cache: "Cache") -> None:
        super().__init__(name=cache.name)
        self.cache = cache
        self._store = Store(cache.max_entries)
        self._flights = Flights()
        self._for_all: LRUCache[Hashable, None] = LRUCache(cache.max_entries)  # what those who are known may share
        self._statuses = rfc9111.STALE_ON | options.statuses(cache.on)
        self._decides = not isinstance(cache.on, type | tuple)

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
            while answer is _FOLLOW:
                try:
                    granted = await runtime.await_ticket(visit.ticket)
                except BaseException:
                    self._leave(visit)
                    raise
                answer = self._followed(visit, granted)
            if visit.renewal is not None:
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
                self._not_renewed(visit, tee, error)
            finally:
                self._abandon(visit)

        return cached

    def clear(self) -> None:
        """Forget all responses. Requests under way are not affected, and theirs will be kept."""
        with self._lock:
            self._store.clear()

    def idle(self, now: float) -> bool:
        return not len(self._store) and not len(self._flights)

    @property
    def entries(self) -> int:
        """How many responses are kept."""
        return len(self._store)

    def after_fork(self) -> None:
        super().after_fork()
        self._flights.clear()  # who leads them and who follows is not in this process

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

    def _own_key(self, scope: Scope) -> Hashable:
        """Return what `key=` returns as something that no digest is equal to."""
        assert self.cache.key is not None  # noqa: S101 - for mypy
        key = self.cache.key(scope)
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"{self.cache.label}: what key= returned is not hashable") from error
        return "key", key

    def _look(self, visit: _Visit) -> Any:
        """Return a response, FOLLOW, or MISSING if the request has to go on."""
        now, cached_only = visit.call.now, visit.demands.only_if_cached
        with self._lock:
            entry, variant = self._store.find(visit.primary, visit.headers)
            use = _NO_USE if entry is None else visit.demands.allow(entry.age(now), entry.lifetime)
            key = visit.primary, variant
            if entry is not None and not use.now and entry.over(now) and self._flights.get(key) is None:
                self._store.remove(entry)
                key = visit.primary, self._store.find(visit.primary, visit.headers)[1]  # as those who come next
            if not use.now and not cached_only:
                if entry is None or not use.while_refreshing:
                    return self._join(visit, key, now)
                if self._flights.get(key) is None:
                    self.cache._misses.add()
                    visit.renewal = self._renewal_of(visit)
                    self._flights.lead(visit.renewal, key, next(self._store.numbers))
        if entry is None or (cached_only and not use.now):
            fields = [(b"content-length", b"0"), (b"cache-status", b"resilient; detail=only-if-cached")]
            return StoredResponse(_GATEWAY_TIMEOUT, fields, b"")
        return self._hit(visit, entry, now) if use.now else self._serve_stale(visit, entry, now)

    def _join(self, visit: _Visit, key: Hashable, now: float) -> Any:
        """Have a request follow one that is under way, or lead, or go on alone; the caller holds the lock."""
        visit.names = name_of(url_of(visit.call.scope)), visit.primary
        alone = not visit.gets or self._flights.apart(visit.primary, now)
        alone = alone or (visit.known and visit.primary not in self._for_all)
        flight = self._flights.get(key)
        if flight is not None and self._store.outdated(visit.names, flight.number):
            flight = None
        if flight is not None and not alone and _wants_no_newer(visit):
            assert isinstance(flight.leader, _Visit)  # noqa: S101
            began = flight.leader.began
            if began is None or began + PATIENCE_SECONDS > now:
                self.cache._shared.add()
                self._flights.follow(visit, flight, _patience(began))
                return _FOLLOW
        self.cache._misses.add()
        if flight is None and not alone and not visit.conditional:  # 304 is for one client only
            self._flights.lead(visit, key, next(self._store.numbers))
        return MISSING

    def _followed(self, visit: _Visit, granted: bool) -> Any:  # noqa: FBT001 - what waiting returns
        """Return what the one who was followed has got for us, MISSING or FOLLOW, or raise."""
        now = visit.call.now = runtime.now()
        if not granted:
            self._leave(visit)
            limit = deadline.current()
            if limit is None or limit.at != visit.ticket.expires_at:
                with self._lock:
                    self._flights.set_apart(visit.primary, now)
                return MISSING
            late = limit.timed_out()
            answer = self._stale_on(visit, late)
            if answer is MISSING:
                raise late
            return answer
        outcome = visit.ticket.value
        if outcome is _BEGUN:
            flight = visit.followed
            with self._lock:
                if self._flights.get(flight.key) is flight:
                    assert isinstance(flight.leader, _Visit)  # noqa: S101
                    self._flights.follow(visit, flight, _patience(flight.leader.began))
                    return _FOLLOW
                outcome, _variant = self._store.find(visit.primary, visit.headers)  # it has ended meanwhile
        if isinstance(outcome, Exception):
            return self._stale_on(visit, outcome)
        return self._collapsed(visit, outcome, now) if isinstance(outcome, Entry) else MISSING

    def _renewal_of(self, visit: _Visit) -> _Visit:
        """Return the visit that renews what this one is served."""
        renewal = _Visit(visit.call, visit.headers, visit.demands)
        renewal.scope = plain_get(visit.call.scope)
        renewal.known, renewal.primary = visit.known, visit.primary
        renewal.names = name_of(url_of(renewal.scope)), visit.primary
        return renewal

    # -- after: what comes of it ----------------------------------------------------------------------------------

    def _go(self, visit: _Visit) -> AsgiCall:
        """Take note that a request goes on."""
        visit.number = next(self._store.numbers)
        visit.sent = visit.call.now
        return visit.call

    def _passed(self, scope: Scope, message: Message) -> None:
        """Forget what a write has made obsolete."""
        if message["type"] != "http.response.start":
            return
        urls = rfc9111.invalidated(scope["method"], message["status"], url_of(scope), message.get("headers", ()))
        if not urls:
            return
        names: list[Hashable] = [name_of(url) for url in urls]
        if self.cache.key is not None:
            names.append(self._own_key(scope))
        with self._lock:
            self._store.wrote(names)

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
        status, fields = (
            response.status_code,
            response.headers,
        )  # those of the application, without those of limits
        told = rfc9111.Directives.of_response(fields)
        if self.cache.key is not None:  # it tells people apart
            asked = [field for field in sent if field[0] != b"authorization"]
        elif (visit.known or tells_who(visit.call.scope, sent)) and not is_for_all(told):
            return None
        else:
            asked = sent
        if not rfc9111.storable("GET", asked, status, fields, shared=True):
            return None
        if any(line.startswith("text/event-stream") for line in lines(fields, "content-type")):
            return None
        error = status >= _BAD_REQUEST  # those are kept only if the application says for how long
        lifetime = rfc9111.lifetime(
            fields,
            status,
            received=time.time(),
            default_fresh=0.0 if error else self.cache.ttl,
            default_stale=0.0 if error else self.cache.stale,
            default_refresh=0.0 if error else self.cache.refresh,
            shared=True,
        )
        names = {name.strip().lower() for line in lines(fields, "vary") for name in line.split(",")} - {""}
        vary = ", ".join(sorted(names))
        lengths = [int(line) for line in lines(fields, "content-length") if line.isdecimal()]
        entry = Entry(
            primary=visit.primary,
            names=visit.names,
            number=visit.number,
            vary=vary,
            variant=said(vary, sent),
            status=status,
            fields=rfc9111.stored_headers(fields),
            extensions={},
            lifetime=lifetime,
            delay=now - visit.sent,
            received=now,
            length=max(lengths, default=None),
        )
        return None if entry.over(now) else entry

    def _ended(self, visit: _Visit, entry: Entry) -> bool:
        """Keep a response that has ended, if it is whole; tell whether it was."""
        with self._lock:
            if entry.whole:
                self._store.add(entry)
                self._flights.land(visit, entry)
            else:
                self._flights.set_apart(visit.primary, runtime.now())
                self._flights.land(visit, ALONE)
        return entry.whole

    def _failed(self, visit: _Visit, error: Exception) -> Any:
        """Return an old response for a request that has failed, or MISSING."""
        limit = deadline.current()
        if limit is not None and visit.call.edge.timed_out(error) and runtime.now() >= limit.at:
            self._abandon(visit)  # the time of this caller is over, not that of those who follow
        # A refusal can be about this client alone, and to be refused one after the other would take long.
        self._land(visit, ALONE if isinstance(error, Rejected) else error)
        return MISSING if visit.call.started else self._stale_on(visit, error)

    def _not_renewed(self, visit: _Visit, tee: _Tee, error: Exception) -> None:
        """Take note of a failure in the background, if it is one: who declines a response lets its sender fail."""
        failure = visit.call.failure
        if tee.done and failure is None:
            return
        self._land(visit, ALONE if isinstance(error, Rejected) else error)
        self.cache.emit(events.CacheRefreshFailed, error=type(failure or error).__name__)

    def _stale_on(self, visit: _Visit, error: Exception) -> Any:
        """Return an old response in place of an error, or MISSING."""
        if not self._wanted(error):
            return MISSING
        now = runtime.now()
        with self._lock:
            entry, _variant = self._store.find(visit.primary, visit.headers)
        use = _NO_USE if entry is None else visit.demands.allow(entry.age(now), entry.lifetime)
        if entry is None or not use.on_error:
            return MISSING
        if use.now:  # somebody else has been luckier meanwhile
            return self._hit(visit, entry, now)
        return self._serve_stale(visit, entry, now, error)

    def _wanted(self, error: Exception) -> bool:
        """Tell whether an old response may stand in for an error."""
        if not self.cache._matches(error):
            return False
        return self._decides or not isinstance(error, FailedResponse) or error.status in self._statuses

    def _land(self, visit: _Visit, outcome: Any) -> None:
        with self._lock:
            self._flights.land(visit, outcome)

    def _abandon(self, visit: _Visit) -> None:
        with self._lock:
            self._flights.abandon(visit)

    def _leave(self, visit: _Visit) -> None:
        with self._lock:
            self._flights.leave(visit)

    # -- responses ------------------------------------------------------------------------------------------------

    def _hit(self, visit: _Visit, entry: Entry, now: float) -> StoredResponse:
        self.cache._hits.add()
        return _response(visit, entry, rfc9111.cache_status(ttl=entry.lifetime.fresh - entry.age(now)), now)

    def _collapsed(self, visit: _Visit, entry: Entry, now: float) -> Any:
        age = entry.age(now)
        if not entry.fits(visit.headers) or not visit.demands.allow(age, entry.lifetime).now:
            return MISSING
        ttl = entry.lifetime.fresh - age
        return _response(visit, entry, rfc9111.cache_status("miss", ttl=ttl, stored=True, collapsed=True), now)

    def _serve_stale(
        self, visit: _Visit, entry: Entry, now: float, error: Exception | None = None
    ) -> StoredResponse:
        age = entry.age(now)
        reason, served = ("refresh", "stale-while-revalidate") if error is None else ("error", "stale-if-error")
        got = error.status if isinstance(error, FailedResponse) else None
        ttl = entry.lifetime.fresh - age
        status = rfc9111.cache_status(None if error is None else "stale", status=got, ttl=ttl, detail=served)
        self.cache._stale.add()
        self.cache.emit(events.CacheStaleServed, age=age, reason=reason)
        return _response(visit, entry, status, now)


def _response(visit: _Visit, entry: Entry, status: str, now: float) -> StoredResponse:
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


def _patience(began: float | None) -> float | None:
    return deadline.tightest(None if began is None else began + PATIENCE_SECONDS)


def _wants_no_newer(visit: _Visit) -> bool:
    """Tell whether a request may have a response that was asked for before it came."""
    asked = visit.demands.directives
    return "no-cache" not in asked and asked.seconds.get("max-age", 1.0) > 0
