"""What the caches of responses have in common: the private one of HTTP clients, and the shared one of ASGI apps.

The rules of what a request gets stand here, and what comes of it for those who wait:

    look      a fresh answer is served; an old one too, if a new one may be asked for in the background
    join      else it follows the same request that is under way, leads, or goes on alone (RFC 9111 4)
    follow    it gets what the one who leads has got, if that fits; else it goes on
    fail      an old answer stands in for a failure, if it may and is wanted (RFC 5861 4)
    write     what it has made obsolete is forgotten (RFC 9111 4.4)

What a response is, when those who follow hear of it, and what else must not be kept differs: see
`resilient.http.cache` and `resilient.asgi.cache`.
"""

from abc import abstractmethod
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeVar

from resilient import deadline, events, options, runtime
from resilient.call import Call
from resilient.errors import FailedResponse
from resilient.http import rfc9111
from resilient.http.cache_flights import ALONE, Flights, Passenger
from resilient.http.cache_store import Entry, Store, said
from resilient.http.headers import Headers, lines
from resilient.kinds import MISSING
from resilient.policy import Policy

if TYPE_CHECKING:
    from resilient.policies.cache import Cache

FOLLOW: Final = object()
"""Instead of an answer: wait for the ticket."""

_CLIENT_ERROR = 400
_NO_USE = rfc9111.Use(now=False, while_refreshing=False, on_error=False)


class Visit(Passenger):
    """One request on its way through a cache.

    Attributes:
        call: The call.
        headers: The fields of its request, as they came.
        demands: What the request demands of a cache.
        gets: Whether it is a GET; the other ones are HEAD.
        conditional: Whether the client has something to compare with; False unless the cache says otherwise.
        primary: What its answers are kept under.
        names: What a write forgets these answers by.
        number: Its number among all requests, once it goes on.
        sent: When it went on.
        renewal: The visit in the background that renews what this one was served.
    """

    __slots__ = (
        "call",
        "conditional",
        "demands",
        "gets",
        "headers",
        "names",
        "number",
        "primary",
        "renewal",
        "sent",
    )

    call: Call
    renewal: "Visit | None"

    def __init__(self, call: Call, method: str, headers: Any, demands: rfc9111.Demands) -> None:
        super().__init__()
        self.call = call
        self.headers = headers
        self.demands = demands
        self.gets = method == "GET"
        self.conditional = False
        self.primary: Hashable = None
        self.names: tuple[Hashable, ...] = ()
        self.number = 0
        self.sent = call.now
        self.renewal = None


V = TypeVar("V", bound=Visit)


class ResponseCache(Policy, Generic[V]):
    """What a `Cache` is where results are responses: all edges of a kind that share the `Cache` share this.

    Args:
        cache: The policy whose options these are, and which reports events and statistics.

    Emits:
        CacheStaleServed, CacheRefreshFailed.
    """

    shared: ClassVar[bool]
    """Whether it serves several users."""

    renews_for_head: ClassVar[bool]
    """Whether a HEAD has an old answer renewed, by a GET."""

    def __init__(self, cache: "Cache") -> None:
        super().__init__(name=cache.name)
        self.cache = cache
        self._store = Store(cache.max_entries)
        self._flights = Flights()
        self._statuses = rfc9111.STALE_ON | options.statuses(cache.on)
        self._decides = not isinstance(cache.on, type | tuple)

    def clear(self) -> None:
        """Forget all answers. Requests under way are not affected, and theirs will be kept."""
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

    # -- what differs ---------------------------------------------------------------------------------------------

    @abstractmethod
    def _name_of(self, url: str) -> Hashable:
        """Return what a write forgets the answers of a URL by."""

    @abstractmethod
    def _renewal_of(self, visit: V, entry: Entry) -> V:
        """Return a visit that asks for a new answer in the background: it has no caller and no deadline."""

    @abstractmethod
    def _answer(self, visit: V, entry: Entry, served: str, status: str, now: float) -> Any:
        """Return a stored answer as a new response; `status` is what `Cache-Status` says."""

    @abstractmethod
    def _not_cached(self, visit: V) -> Any:
        """Return the response to one who wants nothing but a stored answer, if there is none (504)."""

    def _alone(self, visit: V, now: float) -> bool:
        """Tell whether a request neither follows nor leads; the caller holds the lock."""
        return not visit.gets or self._flights.apart(visit.primary, now)

    def _patience(self, leader: Passenger) -> float | None:
        """Return until when others follow somebody; None, unless the cache says otherwise: to the end."""
        return None

    def _gave_up(self, visit: V) -> Any:
        """Return what a request gets that has waited long enough, MISSING if it has to go on, or raise."""
        limit = deadline.current()
        assert limit is not None  # noqa: S101 - nothing else ends the wait
        late = visit.call.edge.own(limit.timed_out(), visit.call)
        answer = self._stale_on(visit, late)
        if answer is MISSING:
            raise late
        return answer

    def _told(self, error: Exception) -> Any:
        """Return the outcome of a failure for those who follow."""
        return error

    def _same_failure(self, visit: V, error: Exception) -> Exception | None:
        """Return the failure of the one we followed as our own, None if we had better try ourselves."""
        return None

    # -- before: what a request gets ------------------------------------------------------------------------------

    def _own_key(self, request: Any) -> Hashable:
        """Return what `key=` returns as something that no URL and no digest is equal to."""
        assert self.cache.key is not None  # noqa: S101 - for mypy
        key = self.cache.key(request)
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(f"{self.cache.label}: what key= returned is not hashable") from error
        return "key", key

    def _look(self, visit: V) -> Any:
        """Return an answer, FOLLOW, or MISSING if the request has to go on."""
        now, cached_only = visit.call.now, visit.demands.only_if_cached
        with self._lock:
            entry, variant = self._store.find(visit.primary, visit.headers)
            use = _NO_USE if entry is None else visit.demands.allow(entry.age(now), entry.lifetime)
            key = visit.primary, variant
            if entry is not None and not use.now and entry.over(now) and self._flights.get(key) is None:
                self._store.remove(entry)
                key = visit.primary, self._store.find(visit.primary, visit.headers)[1]  # as those who come next
            if not use.now and not cached_only:
                if entry is None or not use.while_refreshing or not (visit.gets or self.renews_for_head):
                    return self._join(visit, key, now)
                if self._flights.get(key) is None:
                    self.cache._misses.add()
                    visit.renewal = renewal = self._renewal_of(visit, entry)
                    self._flights.lead(renewal, key, next(self._store.numbers))
        if entry is None or (cached_only and not use.now):
            return self._not_cached(visit)
        return self._hit(visit, entry, now) if use.now else self._serve_stale(visit, entry, now)

    def _join(self, visit: V, key: Hashable, now: float) -> Any:
        """Have a request follow one that is under way, or lead, or go on alone; the caller holds the lock."""
        alone = self._alone(visit, now)
        flight = self._flights.get(key)
        if flight is not None and self._store.outdated(visit.names, flight.number):
            flight = None
        if flight is not None and not alone and _wants_no_newer(visit):
            until = self._patience(flight.leader)
            if until is None or until > now:
                self.cache._shared.add()
                self._flights.follow(visit, flight, deadline.tightest(until))
                return FOLLOW
        self.cache._misses.add()
        if flight is None and not alone and not visit.conditional:  # 304 is for one client only
            self._flights.lead(visit, key, next(self._store.numbers))
        return MISSING

    def _follow(self, visit: V) -> Any:
        """Wait for the one who leads; return an answer, MISSING if the request has to go on, or raise."""
        answer = FOLLOW
        while answer is FOLLOW:
            try:
                granted = runtime.wait(visit.ticket)
            except BaseException:
                self._leave(visit)
                raise
            answer = self._followed(visit, granted)
        return answer

    async def _afollow(self, visit: V) -> Any:
        answer = FOLLOW
        while answer is FOLLOW:
            try:
                granted = await runtime.await_ticket(visit.ticket)
            except BaseException:
                self._leave(visit)
                raise
            answer = self._followed(visit, granted)
        return answer

    def _followed(self, visit: V, granted: bool) -> Any:  # noqa: FBT001 - what waiting returns
        visit.call.now = runtime.now()
        if granted:
            return self._heard(visit, visit.ticket.value)
        self._leave(visit)
        return self._gave_up(visit)

    def _heard(self, visit: V, outcome: Any) -> Any:
        """Return what the one who was followed has got for us, MISSING or FOLLOW, or raise."""
        if isinstance(outcome, Entry):
            return self._collapsed(visit, outcome, visit.call.now)
        if not isinstance(outcome, Exception):
            return MISSING
        answer = self._stale_on(visit, outcome)
        failure = self._same_failure(visit, outcome) if answer is MISSING else None
        if failure is not None:
            raise failure
        return answer

    # -- after: what comes of it ----------------------------------------------------------------------------------

    def _go(self, visit: V) -> Call:
        """Take note that a request goes on."""
        visit.number = next(self._store.numbers)
        visit.sent = visit.call.now
        return visit.call

    def _wrote(self, request: Any, method: str, status: int, url: object, headers: Headers) -> None:
        """Forget what a write has made obsolete: the one whose response has this status and these fields."""
        urls = rfc9111.invalidated(method, status, url, headers)
        if not urls:
            return
        names = [self._name_of(each) for each in urls]
        if self.cache.key is not None:
            names.append(self._own_key(request))
        with self._lock:
            self._store.wrote(names)

    def _entry_of(
        self,
        visit: V,
        status: int,
        fields: rfc9111.Fields,
        sent: Headers,
        *,
        now: float,
        received: float,
        length: int | None,
        extensions: dict[str, Any],
    ) -> Entry | None:
        """Return a response that may be kept as an entry, None if that is of no use.

        Args:
            visit: Its request.
            status: Its status code.
            fields: Its fields.
            sent: The fields of its request, with what was added further in.
            now: The time of the monotonic clock.
            received: The same, in seconds since the epoch.
            length: How many bytes its body has to have, None if that is not known.
            extensions: What else is needed to hand it out again.
        """
        error = status >= _CLIENT_ERROR  # those are kept only if the response says for how long
        lifetime = rfc9111.lifetime(
            fields,
            status,
            received=received,
            default_fresh=0.0 if error else self.cache.ttl,
            default_stale=0.0 if error else self.cache.stale,
            default_refresh=0.0 if error else self.cache.refresh,
            shared=self.shared,
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
            extensions=extensions,
            lifetime=lifetime,
            delay=now - visit.sent,
            received=now,
            length=length,
        )
        return None if entry.over(now) else entry

    def _keep(self, visit: V, entry: Entry, now: float) -> None:
        """Keep an answer whose body has ended, if it is whole; the caller holds the lock."""
        if entry.whole:
            self._store.add(entry)
            self._flights.land(visit, entry)
        else:
            self._flights.set_apart(visit.primary, now)
            self._flights.land(visit, ALONE)

    def _failed(self, visit: V, error: Exception) -> Any:
        """Return an old answer for a request that has failed, or MISSING."""
        limit = deadline.current()
        if limit is not None and visit.call.edge.timed_out(error) and runtime.now() >= limit.at:
            self._abandon(visit)  # the time of this caller is over, not that of those who follow
        self._land(visit, self._told(error))
        return self._stale_on(visit, error) if visit.call.edge.replaceable(visit.call) else MISSING

    def _not_renewed(self, visit: V, error: Exception, cause: BaseException) -> None:
        self._land(visit, self._told(error))
        self.cache.emit(events.CacheRefreshFailed, error=type(cause).__name__)

    def _stale_on(self, visit: V, error: Exception) -> Any:
        """Return an old answer in place of an error, or MISSING."""
        if not self._wanted(visit, error):
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

    def _wanted(self, visit: V, error: Exception) -> bool:
        """Tell whether an old answer may stand in for an error."""
        if not self.cache._matches(error):
            return False
        return self._decides or not isinstance(error, FailedResponse) or error.status in self._statuses

    def _land(self, visit: V, outcome: Any) -> None:
        with self._lock:
            self._flights.land(visit, outcome)

    def _abandon(self, visit: V) -> None:
        with self._lock:
            self._flights.abandon(visit)

    def _leave(self, visit: V) -> None:
        with self._lock:
            self._flights.leave(visit)

    # -- answers --------------------------------------------------------------------------------------------------

    def _hit(self, visit: V, entry: Entry, now: float) -> Any:
        self.cache._hits.add()
        status = rfc9111.cache_status(ttl=entry.lifetime.fresh - entry.age(now))
        return self._answer(visit, entry, "hit", status, now)

    def _collapsed(self, visit: V, entry: Entry, now: float) -> Any:
        age = entry.age(now)
        if not entry.fits(visit.headers) or not visit.demands.allow(age, entry.lifetime).now:
            return MISSING
        status = rfc9111.cache_status("miss", ttl=entry.lifetime.fresh - age, stored=True, collapsed=True)
        return self._answer(visit, entry, "collapsed", status, now)

    def _serve_stale(self, visit: V, entry: Entry, now: float, error: Exception | None = None) -> Any:
        age = entry.age(now)
        reason, served = ("refresh", "stale-while-revalidate") if error is None else ("error", "stale-if-error")
        got = error.status if isinstance(error, FailedResponse) else None
        ttl = entry.lifetime.fresh - age
        status = rfc9111.cache_status(None if error is None else "stale", status=got, ttl=ttl, detail=served)
        self.cache._stale.add()
        self.cache.emit(events.CacheStaleServed, age=age, reason=reason)
        return self._answer(visit, entry, served, status, now)


def _wants_no_newer(visit: Visit) -> bool:
    """Tell whether a request may have an answer that was asked for before it came."""
    asked = visit.demands.directives
    return "no-cache" not in asked and asked.seconds.get("max-age", 1.0) > 0
