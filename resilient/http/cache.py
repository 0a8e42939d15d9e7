"""What `Cache` is on an HTTP client: it keeps what a private cache may, and serves it when nothing newer comes.

What may be kept, for how long and for whom is said by RFC 9111 and RFC 5861. Their rules are in
`resilient.http.rfc9111`, the answers in `resilient.http.cache_store`, the requests under way in
`resilient.http.cache_flights`. Here is what happens to one request:

    keeps out    not GET or HEAD, conditions or a range of the caller's own, `no-store`, a body, an upgrade. If it
                 was a write and went well, what it made obsolete is forgotten.
    served       a stored answer that is fresh; or an old one, while a new one is asked for in the background
    follows      the same is being asked right now: wait for that answer
    goes on      to the policies further in. A good answer passes through as it came; it is kept once its reader
                 has read it to the end. If it fails, an old answer may be served in its place.

Those who follow hear from the one who leads

    as soon as the headers say that they cannot have it    they all go on by themselves
    when the body is there                                 those whom it fits are served, the others go on
    when it has failed to get through                      they get an old answer, or the same failure
    when it has got a failing response                     they get an old answer, or go on
    when it was cancelled, or its time was over            the one who has waited longest leads

Only if somebody follows is a body read before it is passed on.
"""

import copy
import time
import weakref
from collections.abc import Callable, Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

from resilient import deadline, events, options, runtime
from resilient.call import AsyncNext, Call, Next
from resilient.edge import Edge
from resilient.errors import FailedResponse, FailedResult, Rejected
from resilient.http import rfc9111
from resilient.http.cache_flights import ALONE, Flights, Passenger
from resilient.http.cache_store import BODY_BYTES, Entry, Store, said
from resilient.http.edge import HttpCall, HttpEdge, _goes_on, _length
from resilient.http.headers import lines
from resilient.http.streams import Watch, aclose_quietly, close_quietly, watch
from resilient.kinds import MISSING, _background
from resilient.policy import Policy

if TYPE_CHECKING:
    from resilient.policies.cache import Cache

_CLIENT_ERROR = 400
_NOT_MODIFIED = 304
_GATEWAY_TIMEOUT = 504
_KEPT_EXTENSIONS = ("http_version", "reason_phrase")
_TELLING = frozenset(
    name.encode()
    for name in (
        *rfc9111.CREDENTIALS,
        *rfc9111._CONDITIONS,
        *("cache-control", "content-length", "pragma", "transfer-encoding", "upgrade"),
    )
)
_NO_USE = rfc9111.Use(now=False, while_refreshing=False, on_error=False)
_FOLLOW = object()  # instead of an answer: wait for the ticket


class _Visit(Passenger):
    """One request on its way through the cache.

    Attributes:
        call: The call.
        edge: What it ends at.
        headers: The fields of its request.
        demands: What the request demands of a cache.
        owner: A digest of who asks.
        primary: What its answers are kept under.
        names: What a write forgets these answers by.
        number: Its number among all requests, once it goes on.
        sent: When it went on.
        timeouts: What the client has set for it.
        renewal: The visit in the background that renews what this one was served.
        renews: The stored answer that is renewed; only visits in the background have one.
        asked: The stored answer that the origin is asked about.
        entry: What is to be kept, while its body is being read.
    """

    __slots__ = (
        "asked",
        "call",
        "demands",
        "edge",
        "entry",
        "headers",
        "names",
        "number",
        "owner",
        "primary",
        "renewal",
        "renews",
        "sent",
        "timeouts",
    )

    entry: Entry

    def __init__(
        self,
        call: HttpCall,
        demands: rfc9111.Demands,
        owner: str | None,
        primary: Hashable,
        names: tuple[Hashable, ...],
    ) -> None:
        super().__init__()
        self.call = call
        self.edge = call.edge
        self.headers = call.request.headers
        self.timeouts = call.request.extensions.get("timeout")
        self.demands = demands
        self.owner = owner
        self.primary = primary
        self.names = names
        self.number = 0
        self.sent = call.now
        self.renewal: _Visit | None = None
        self.renews: Entry | None = None
        self.asked: Entry | None = None

    def renew(self, entry: Entry) -> "_Visit":
        """Return a visit that asks for a new answer in the background: it has no caller and no deadline."""
        call = self.call.copy()
        call.around = None
        raw = [*self.headers.raw, *rfc9111.revalidation_headers(entry.fields)]
        asks = len(raw) > len(self.headers.raw)
        call.request.headers = type(self.headers)(raw)
        other = _Visit(call, self.demands, self.owner, self.primary, self.names)
        other.headers = type(self.headers)(self.headers.raw)  # the caller may change his
        other.renews = entry
        other.asked = entry if asks else None
        return other

    def ask_anew(self) -> None:
        """Ask once more, without conditions."""
        self.call = self.call.copy()
        self.call.around = None
        self.call.request.headers = self.headers
        self.asked = None


class _Tee:
    """Collects what somebody reads, up to a bound.

    Args:
        watched: The body. It is not held on to, so that it can still tell when nobody has it any more.
        read: What is called with all of it, once it has been read to the end.
    """

    def __init__(self, watched: Watch, read: Callable[[bytes], object]) -> None:
        self._watched = weakref.ref(watched)
        self._read = read
        self._chunks: list[bytes] = []
        self._size = 0
        self._other = watched.tap
        for chunk in watched._ahead:
            self._collect(chunk)
        watched.tap = self
        watched.when_released(self.released)

    def __call__(self, chunk: bytes) -> None:
        self._collect(chunk)
        if self._other is not None:
            self._other(chunk)

    def _collect(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > BODY_BYTES:
            self._chunks.clear()
        else:
            self._chunks.append(chunk)

    def released(self, _error: BaseException | None) -> None:
        watched = self._watched()
        if watched is not None and watched.finished and self._size <= BODY_BYTES:
            self._read(b"".join(self._chunks))


class HttpCache(Policy):
    """What a `Cache` is on HTTP clients: all transports that share the `Cache` share this.

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
        self._statuses = rfc9111.STALE_ON | options.statuses(cache.on)
        self._decides = not isinstance(cache.on, type | tuple)

    def link(self, nxt: Next, edge: Edge) -> Next:
        assert isinstance(edge, HttpEdge)  # noqa: S101 - it has sent us here
        background = edge.background

        def cached(call: Call) -> Any:
            visit = self._enter(call)
            if visit is None:
                response = nxt(call)
                self._passed(call, response)
                return response
            answer = self._look(visit)
            if answer is _FOLLOW:
                try:
                    granted = runtime.wait(visit.ticket)
                except BaseException:
                    self._leave(visit)
                    raise
                answer = self._followed(visit, granted)
            elif visit.renewal is not None:
                start(visit.renewal)
            return fetch(visit) if answer is MISSING else answer

        def fetch(visit: _Visit) -> Any:
            try:
                response = nxt(self._go(visit))
                body = self._arrived(visit, response)
                if body is not None:
                    self._read(visit, response, body.buffer(BODY_BYTES))
                return response
            except Exception as error:
                answer = self._failed(visit, error)
                if answer is MISSING:
                    raise
                return answer
            except BaseException:
                self._abandon(visit)
                raise

        def start(visit: _Visit) -> None:
            if not background.begin(visit):
                self._abandon(visit)
                return
            context = _background()
            try:
                runtime.start_thread(lambda: context.run(renew, visit), "resilient-refresh")
            except RuntimeError as error:  # no more threads: the old answer still serves
                background.end(visit)
                self._not_renewed(visit, error)

        def renew(visit: _Visit) -> None:
            try:
                try:
                    response = nxt(self._go(visit))
                    if self._is_about_another(visit, response):
                        edge.discard(response)
                        visit.ask_anew()
                        response = nxt(self._go(visit))
                    body = self._arrived(visit, response)
                    if body is not None:
                        self._read(visit, response, body.buffer(BODY_BYTES))
                finally:
                    if visit.call.response is not None:
                        close_quietly(visit.call.response)
            except Exception as error:
                self._not_renewed(visit, error)
            finally:
                self._abandon(visit)
                background.end(visit)

        return cached

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        assert isinstance(edge, HttpEdge)  # noqa: S101
        background = edge.background

        async def cached(call: Call) -> Any:
            visit = self._enter(call)
            if visit is None:
                response = await nxt(call)
                self._passed(call, response)
                return response
            answer = self._look(visit)
            if answer is _FOLLOW:
                try:
                    granted = await runtime.await_ticket(visit.ticket)
                except BaseException:
                    self._leave(visit)
                    raise
                answer = self._followed(visit, granted)
            elif visit.renewal is not None:
                start(visit.renewal)
            return await fetch(visit) if answer is MISSING else answer

        async def fetch(visit: _Visit) -> Any:
            try:
                response = await nxt(self._go(visit))
                body = self._arrived(visit, response)
                if body is not None:
                    self._read(visit, response, await body.buffer(BODY_BYTES))
                return response
            except Exception as error:
                answer = self._failed(visit, error)
                if answer is MISSING:
                    raise
                return answer
            except BaseException:
                self._abandon(visit)
                raise

        def start(visit: _Visit) -> None:
            if background.begin(visit):
                runtime.start_task(lambda: renew(visit), _background(), lambda: over(visit))
            else:
                self._abandon(visit)

        def over(visit: _Visit) -> None:
            self._abandon(visit)
            background.end(visit)

        async def renew(visit: _Visit) -> None:
            try:
                try:
                    response = await nxt(self._go(visit))
                    if self._is_about_another(visit, response):
                        await edge.adiscard(response)
                        visit.ask_anew()
                        response = await nxt(self._go(visit))
                    body = self._arrived(visit, response)
                    if body is not None:
                        self._read(visit, response, await body.buffer(BODY_BYTES))
                finally:
                    if visit.call.response is not None:
                        await aclose_quietly(visit.call.response)
            except Exception as error:
                self._not_renewed(visit, error)
            finally:
                over(visit)

        return cached

    def clear(self) -> None:
        """Forget all answers. Requests under way are not affected, and will keep theirs."""
        with self._lock:
            self._store.clear()

    def idle(self, now: float) -> bool:
        return not len(self._store) and not len(self._flights)

    @property
    def entries(self) -> int:
        """How many answers are kept."""
        return len(self._store)

    def after_fork(self) -> None:
        super().after_fork()
        self._flights.clear()  # who leads them and who follows is not in this process

    # -- before: what a request gets ------------------------------------------------------------------------------

    def _enter(self, call: Call) -> _Visit | None:
        """Return the visit that begins here, None if the cache keeps out of this request."""
        assert isinstance(call, HttpCall)  # noqa: S101 - no other calls come from an `HttpEdge`
        request = call.request
        if request.method not in {"GET", "HEAD"}:
            return None
        fields = _telling(request.headers)
        demands = rfc9111.demands(request.method, fields)
        if demands.bypass or lines(fields, "upgrade"):
            return None
        url = rfc9111.cache_key("GET", request.url)
        owner = rfc9111.credentials_key(fields)
        if self.cache.key is None:
            return _Visit(call, demands, owner, (url, owner), (url,))
        primary = self._primary(self.cache.key(request))
        return _Visit(call, demands, owner, primary, (url, primary))

    def _primary(self, key: Hashable) -> Hashable:
        """Return what `key=` has returned as something that no URL is equal to."""
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"{self.cache.label}: what key= returned is not hashable") from error
        return "key", key

    def _look(self, visit: _Visit) -> Any:
        """Return an answer, FOLLOW, or MISSING if the request has to go on."""
        now, gets, cached_only = visit.call.now, visit.call.request.method == "GET", visit.demands.only_if_cached
        with self._lock:
            entry, variant = self._store.find(visit.primary, visit.headers)
            use = _NO_USE if entry is None else visit.demands.allow(entry.age(now), entry.lifetime)
            key = visit.primary, variant
            if entry is not None and not use.now and entry.over(now) and self._flights.get(key) is None:
                self._store.remove(entry)
                key = visit.primary, self._store.find(visit.primary, visit.headers)[1]  # as those who come next
            if not use.now and not cached_only:
                if entry is None or not gets or not use.while_refreshing:
                    return self._join(visit, key, now)
                if self._flights.get(key) is None:
                    self.cache._misses.add()
                    visit.renewal = visit.renew(entry)
                    self._flights.lead(visit.renewal, key, next(self._store.numbers))
        if entry is None or (cached_only and not use.now):
            return _not_cached(visit)
        if not use.now:
            return self._serve_stale(visit, entry, now)
        return self._hit(visit, entry, now)

    def _join(self, visit: _Visit, key: Hashable, now: float) -> Any:
        """Have a request follow one that is under way, or lead, or go on alone; the caller holds the lock."""
        apart = visit.call.request.method != "GET" or self._flights.apart(visit.primary, now)
        flight = self._flights.get(key)
        if flight is not None and self._store.outdated(visit.names, flight.number):
            flight = None
        if flight is not None and not apart and _may_follow(visit):
            self.cache._shared.add()
            self._flights.follow(visit, flight, deadline.tightest(None))
            return _FOLLOW
        self.cache._misses.add()
        if flight is None and not apart:
            self._flights.lead(visit, key, next(self._store.numbers))
        return MISSING

    def _followed(self, visit: _Visit, granted: bool) -> Any:  # noqa: FBT001 - what waiting returns
        """Return what the one who was followed has got for us, MISSING if we have to go on, or raise."""
        visit.call.now = runtime.now()
        if not granted:
            self._leave(visit)
            limit = deadline.current()
            assert limit is not None  # noqa: S101 - nothing else ends the wait
            late = visit.edge.family.own(limit.timed_out(), visit.call.request)
            answer = self._stale_on(visit, late)
            if answer is MISSING:
                raise late
            return answer
        outcome = visit.ticket.value
        if isinstance(outcome, Entry):
            return self._shared(visit, outcome)
        if isinstance(outcome, Exception):
            answer = self._stale_on(visit, outcome)
            failure = self._same_failure(visit, outcome) if answer is MISSING else None
            if failure is not None:
                raise failure
            return answer
        return MISSING

    def _shared(self, visit: _Visit, entry: Entry) -> Any:
        now = visit.call.now
        age = entry.age(now)
        if not entry.fits(visit.headers) or not visit.demands.allow(age, entry.lifetime).now:
            return MISSING
        status = rfc9111.cache_status("miss", ttl=entry.lifetime.fresh - age, stored=True, collapsed=True)
        return self._answer(visit, entry, "collapsed", status, now)

    def _same_failure(self, visit: _Visit, error: Exception) -> Exception | None:
        """Return the failure of the one we followed as our own, None if we had better try ourselves."""
        edge, leader = visit.edge, visit.followed.leader
        assert isinstance(leader, _Visit)  # noqa: S101
        if isinstance(error, FailedResult) or not edge.transient(error):
            return None
        if edge.timed_out(error) and leader.timeouts != visit.timeouts:
            return None
        try:
            own = copy.copy(error)
        except Exception:  # whoever made this class did not think of copies
            return None
        own.__cause__, own.__suppress_context__ = error.__cause__, error.__suppress_context__
        if hasattr(error, "__notes__"):
            own.__notes__ = list(error.__notes__)
        if isinstance(own, edge.family.module.RequestError):
            own.request = visit.call.request
        return own

    # -- after: what comes of it ----------------------------------------------------------------------------------

    def _go(self, visit: _Visit) -> HttpCall:
        """Take note that a request goes on."""
        visit.number = next(self._store.numbers)
        visit.sent = visit.call.now
        return visit.call

    def _passed(self, call: Call, response: Any) -> None:
        """Forget what a write has made obsolete."""
        assert isinstance(call, HttpCall)  # noqa: S101
        request = call.request
        urls = rfc9111.invalidated(request.method, response.status_code, request.url, response.headers)
        if not urls:
            return
        names: list[Hashable] = [rfc9111.cache_key("GET", url) for url in urls]
        if self.cache.key is not None:
            names.append(self._primary(self.cache.key(request)))
        with self._lock:
            self._store.wrote(names)

    def _arrived(self, visit: _Visit, response: Any) -> Any:
        """Take note of a good response; return its body if that has to be read now."""
        if visit.call.request.method != "GET":
            return None
        now = runtime.now()
        entry = self._entry(visit, response, now)
        if entry is None:  # what was there before goes too: the origin does not stand by it any more
            with self._lock:
                self._store.drop(visit.primary, visit.headers)
                self._set_apart(visit, now)
            return None
        entry.body = entry.body if entry.body is not None else _in_memory(visit.edge, response)
        too_long = (entry.length or 0) > BODY_BYTES
        with self._lock:
            if too_long or entry.age(now) >= entry.lifetime.fresh:
                self._set_apart(visit, now)
            else:
                self._flights.unite(visit.primary)
            if entry.body is not None:
                self._keep(visit, entry, now)
            if too_long or entry.body is not None:
                return None
            waited_for = visit.renews is not None or (visit.flight is not None and bool(visit.flight.waiting))
            if not waited_for:
                self._flights.land(visit, ALONE)
        watched = watch(visit.edge.family, response, visit.call.request, visit.edge._watch_kind)
        if waited_for:
            visit.entry = entry
            return watched
        _Tee(watched, partial(self._add, entry))
        return None

    def _entry(self, visit: _Visit, response: Any, now: float) -> Entry | None:
        """Return what is to be kept of a response, None if it must not be kept or is of no use."""
        sent = visit.call.request.headers  # with what policies and transports further in have added
        status, fields, kept = response.status_code, response.headers.raw, response.extensions
        body, asked = None, visit.asked
        if status == _NOT_MODIFIED and asked is not None:
            status, kept, body = asked.status, asked.extensions, asked.body
            fields = rfc9111.freshened(asked.fields, response.headers)
        if not rfc9111.storable("GET", _telling(sent), status, fields) or _goes_on(response):
            return None
        if _is_used_up(visit.edge, response):
            return None
        if self.cache.key is None and rfc9111.credentials_key(_telling(sent)) != visit.owner:
            return None
        error = status >= _CLIENT_ERROR  # those are kept only if the origin says for how long
        lifetime = rfc9111.lifetime(
            fields,
            status,
            received=time.time(),
            default_fresh=0.0 if error else self.cache.ttl,
            default_stale=0.0 if error else self.cache.stale,
            default_refresh=0.0 if error else self.cache.refresh,
        )
        names = {name.strip().lower() for line in lines(fields, "vary") for name in line.split(",")} - {""}
        vary = ", ".join(sorted(names))
        entry = Entry(
            primary=visit.primary,
            names=visit.names,
            number=visit.number,
            vary=vary,
            variant=said(vary, sent),
            status=status,
            fields=rfc9111.stored_headers(fields),
            extensions={name: kept[name] for name in _KEPT_EXTENSIONS if name in kept},
            lifetime=lifetime,
            delay=now - visit.sent,
            received=now,
            length=None if body is not None or "transfer-encoding" in response.headers else _length(response),
        )
        entry.body = body
        return None if entry.over(now) else entry

    def _read(self, visit: _Visit, response: Any, body: bytes | None) -> None:
        """Take note of the body that somebody waits for; None if it is too long."""
        visit.entry.body = body
        if body is not None:
            response.stream = visit.edge.byte_stream(body)
        with self._lock:
            self._keep(visit, visit.entry, runtime.now())

    def _keep(self, visit: _Visit, entry: Entry, now: float) -> None:
        if entry.whole:
            self._store.add(entry)
            self._flights.land(visit, entry)
        else:
            self._set_apart(visit, now)
            self._flights.land(visit, ALONE)

    def _add(self, entry: Entry, body: bytes) -> None:
        entry.body = body
        if entry.whole:
            with self._lock:
                self._store.add(entry)

    def _is_about_another(self, visit: _Visit, response: Any) -> bool:
        """Tell whether a 304 confirms some other answer than the one that the origin was asked about."""
        if response.status_code != _NOT_MODIFIED or visit.asked is None:
            return False
        return not rfc9111.confirms(response.headers, visit.asked.fields)

    def _failed(self, visit: _Visit, error: Exception) -> Any:
        """Return an old answer for a request that has failed, or MISSING."""
        limit = deadline.current()
        if limit is not None and visit.edge.timed_out(error) and runtime.now() >= limit.at:
            self._abandon(visit)  # the time of this caller is over, not that of those who follow
        with self._lock:
            self._flights.land(visit, error)
        return self._stale_on(visit, error)

    def _not_renewed(self, visit: _Visit, error: Exception) -> None:
        with self._lock:
            self._flights.land(visit, error)
        self.cache.emit(events.CacheRefreshFailed, error=type(error).__name__)

    def _stale_on(self, visit: _Visit, error: Exception) -> Any:
        """Return an old answer in place of an error, or MISSING."""
        if not self._wanted(visit.edge, error):
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

    def _wanted(self, edge: HttpEdge, error: Exception) -> bool:
        """Tell whether an old answer may stand in for an error."""
        if not self.cache._matches(error):
            return False
        if isinstance(error, FailedResponse) and not self._decides:
            return error.status in self._statuses
        if self.cache.on is Exception:  # the default: not what is wrong on our side
            return isinstance(error, Rejected | FailedResult) or edge.transient(error)
        return True

    def _set_apart(self, visit: _Visit, now: float) -> None:
        """Let nobody follow for a while; the caller holds the lock."""
        self._flights.set_apart(visit.primary, now)
        if visit.renews is None:
            self._flights.land(visit, ALONE)
        else:
            self._flights.tell(visit, ALONE)  # the flight goes on, as there must be no second renewal

    def _abandon(self, visit: _Visit) -> None:
        with self._lock:
            self._flights.abandon(visit)

    def _leave(self, visit: _Visit) -> None:
        with self._lock:
            self._flights.leave(visit)

    # -- answers --------------------------------------------------------------------------------------------------

    def _hit(self, visit: _Visit, entry: Entry, now: float) -> Any:
        self.cache._hits.add()
        status = rfc9111.cache_status(ttl=entry.lifetime.fresh - entry.age(now))
        return self._answer(visit, entry, "hit", status, now)

    def _serve_stale(self, visit: _Visit, entry: Entry, now: float, error: Exception | None = None) -> Any:
        age = entry.age(now)
        reason, served = ("refresh", "stale-while-revalidate") if error is None else ("error", "stale-if-error")
        got = error.status if isinstance(error, FailedResponse) else None
        ttl = entry.lifetime.fresh - age
        status = rfc9111.cache_status(None if error is None else "stale", status=got, ttl=ttl, detail=served)
        self.cache._stale.add()
        self.cache.emit(events.CacheStaleServed, age=age, reason=reason)
        return self._answer(visit, entry, served, status, now)

    def _answer(self, visit: _Visit, entry: Entry, served: str, status: str, now: float) -> Any:
        """Return a stored answer as a new response."""
        call, family = visit.call, visit.edge.family
        body = entry.body if call.request.method == "GET" else b""
        response = family.Response(
            entry.status,
            headers=[
                *entry.shown,
                (b"Age", b"%d" % int(entry.age(now))),
                (b"Cache-Status", status.encode()),
            ],
            stream=family.ByteStream(body),
            extensions={**entry.extensions, "resilient": {"cache": served}},
        )
        if call.response is None:
            call.response = response  # it belongs to this call alone, so the transport need not copy it
        return response


def _telling(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return the fields of a request that tell a cache something: to look at a few many times takes less long."""
    return [field for field in headers.raw if field[0].lower() in _TELLING]


def _in_memory(edge: HttpEdge, response: Any) -> bytes | None:
    """Return the body of a response as it came over the network, None if somebody has yet to read it."""
    if response.stream.__class__ is edge.byte_stream:
        return b"".join(response.stream)
    return getattr(response, "_content", None)


def _is_used_up(edge: HttpEdge, response: Any) -> bool:
    """Tell whether a transport further in has read a body so that nobody can know what came over the network."""
    if not response.is_stream_consumed or response.stream.__class__ is edge.byte_stream:
        return False
    return "content-encoding" in response.headers or not hasattr(response, "_content")


def _may_follow(visit: _Visit) -> bool:
    """Tell whether a request may have an answer that was asked for before it came."""
    asked = visit.demands.directives
    return "no-cache" not in asked and asked.seconds.get("max-age", 1.0) > 0


def _not_cached(visit: _Visit) -> Any:
    family = visit.edge.family
    return family.Response(
        _GATEWAY_TIMEOUT,
        headers=[(b"Content-Length", b"0"), (b"Cache-Status", b"resilient; detail=only-if-cached")],
        stream=family.ByteStream(b""),
        extensions={"resilient": {"cache": "only-if-cached"}},
    )
