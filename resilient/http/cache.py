"""What `Cache` is on an HTTP client: it keeps what a private cache may, and serves it when nothing newer comes.

What may be kept, for how long and for whom is said by RFC 9111 and RFC 5861. Their rules are in
`resilient.http.rfc9111`, the answers in `resilient.http.cache_store`, the requests under way in
`resilient.http.cache_flights`, and what is the same around an ASGI application in `resilient.http.cache_policy`.
This is what happens to one request:

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
from typing import Any

from resilient import runtime
from resilient.call import AsyncNext, Call, Next
from resilient.edge import Edge
from resilient.errors import FailedResult, Rejected
from resilient.http import rfc9111
from resilient.http.cache_flights import ALONE
from resilient.http.cache_policy import FOLLOW, ResponseCache, Visit
from resilient.http.cache_store import BODY_BYTES, Entry
from resilient.http.edge import HttpCall, HttpEdge, _goes_on, _length
from resilient.http.headers import lines
from resilient.http.streams import Watch, aclose_quietly, close_quietly, watch
from resilient.kinds import MISSING, _background

_NOT_MODIFIED = 304
_GATEWAY_TIMEOUT = 504
_KEPT_EXTENSIONS = ("http_version", "reason_phrase")
_TELLING = frozenset(
    name.encode()
    for name in (
        *rfc9111._CONDITIONS,
        *("cache-control", "content-length", "pragma", "transfer-encoding", "upgrade"),
    )
)


class _Visit(Visit):
    """One request on its way through the cache.

    Attributes:
        edge: What its call ends at.
        owner: A digest of who asks.
        timeouts: What the client has set for it.
        renews: The stored answer that is renewed; only visits in the background have one.
        asked: The stored answer that the origin is asked about.
        entry: What is to be kept, while its body is being read.
    """

    __slots__ = ("asked", "edge", "entry", "owner", "renews", "timeouts")

    call: HttpCall
    renewal: "_Visit | None"
    entry: Entry

    def __init__(
        self,
        call: HttpCall,
        demands: rfc9111.Demands,
        owner: str | None,
        primary: Hashable,
        names: tuple[Hashable, ...],
    ) -> None:
        super().__init__(call, call.request.method, call.request.headers, demands)
        self.edge = call.edge
        self.timeouts = call.request.extensions.get("timeout")
        self.owner = owner
        self.primary = primary
        self.names = names
        self.renews: Entry | None = None
        self.asked: Entry | None = None

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


class HttpCache(ResponseCache[_Visit]):
    """What a `Cache` is on HTTP clients: all transports that share the `Cache` share this."""

    shared = False
    renews_for_head = False

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
            if answer is FOLLOW:
                answer = self._follow(visit)
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
                self._not_renewed(visit, error, error)

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
                self._not_renewed(visit, error, error)
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
            if answer is FOLLOW:
                answer = await self._afollow(visit)
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
                self._not_renewed(visit, error, error)
            finally:
                over(visit)

        return cached

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
        primary = self._own_key(request)
        return _Visit(call, demands, owner, primary, (url, primary))

    def _renewal_of(self, visit: _Visit, entry: Entry) -> _Visit:
        call = visit.call.copy()
        call.around = None
        raw = [*visit.headers.raw, *rfc9111.revalidation_headers(entry.fields)]
        asks = len(raw) > len(visit.headers.raw)
        call.request.headers = type(visit.headers)(raw)
        renewal = _Visit(call, visit.demands, visit.owner, visit.primary, visit.names)
        renewal.headers = type(visit.headers)(visit.headers.raw)  # the caller may change his
        renewal.renews = entry
        renewal.asked = entry if asks else None
        return renewal

    def _same_failure(self, visit: _Visit, error: Exception) -> Exception | None:
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

    def _passed(self, call: Call, response: Any) -> None:
        """Forget what a write has made obsolete."""
        assert isinstance(call, HttpCall)  # noqa: S101
        request = call.request
        self._wrote(request, request.method, response.status_code, request.url, response.headers)

    def _name_of(self, url: str) -> Hashable:
        return rfc9111.cache_key("GET", url)

    def _arrived(self, visit: _Visit, response: Any) -> Any:
        """Take note of a good response; return its body if that has to be read now."""
        if not visit.gets:
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
        entry = self._entry_of(
            visit,
            status,
            fields,
            sent,
            now=now,
            received=time.time(),
            length=None if body is not None or "transfer-encoding" in response.headers else _length(response),
            extensions={name: kept[name] for name in _KEPT_EXTENSIONS if name in kept},
        )
        if entry is not None:
            entry.body = body
        return entry

    def _read(self, visit: _Visit, response: Any, body: bytes | None) -> None:
        """Take note of the body that somebody waits for; None if it is too long."""
        visit.entry.body = body
        if body is not None:
            response.stream = visit.edge.byte_stream(body)
        with self._lock:
            self._keep(visit, visit.entry, runtime.now())

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

    def _wanted(self, visit: _Visit, error: Exception) -> bool:
        if not super()._wanted(visit, error):
            return False
        if self.cache.on is not Exception:
            return True
        # the default: not what is wrong on our side
        return isinstance(error, Rejected | FailedResult) or visit.edge.transient(error)

    def _set_apart(self, visit: _Visit, now: float) -> None:
        """Let nobody follow for a while; the caller holds the lock."""
        self._flights.set_apart(visit.primary, now)
        if visit.renews is None:
            self._flights.land(visit, ALONE)
        else:
            self._flights.tell(visit, ALONE)  # the flight goes on, as there must be no second renewal

    def _answer(self, visit: _Visit, entry: Entry, served: str, status: str, now: float) -> Any:
        call, family = visit.call, visit.edge.family
        body = entry.body if visit.gets else b""
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

    def _not_cached(self, visit: _Visit) -> Any:
        family = visit.edge.family
        return family.Response(
            _GATEWAY_TIMEOUT,
            headers=[(b"Content-Length", b"0"), (b"Cache-Status", b"resilient; detail=only-if-cached")],
            stream=family.ByteStream(b""),
            extensions={"resilient": {"cache": "only-if-cached"}},
        )


def _telling(headers: Any) -> list[tuple[bytes, bytes]]:
    """Return the fields of a request that tell a cache something: to look at a few many times takes less long."""
    says_who = rfc9111.says_who
    return [field for field in headers.raw if field[0].lower() in _TELLING or says_who(field[0])]


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
