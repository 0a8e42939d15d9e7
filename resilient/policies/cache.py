"""Cache: answer from memory what was fetched a moment ago, and what is old when nothing newer can be had.

The age of an entry decides (the directives in brackets are their cousins in HTTP, RFC 5861):

    0 ........... ttl ........... ttl + refresh ........... ttl + stale ...........
    fresh: served | served, and fetched anew in the    | served only if the      | gone
                  | background (stale-while-revalidate) | call fails (stale-if-error) |

Calls that miss the same key at the same time run once (single flight): one leads, the others wait for its
result. They share its failure too, since asking a failing dependency once for each of them would help nobody.
If the leader is cancelled, the next one leads.

What it is on an HTTP client, where results are streams and the server has a say, is in `resilient.http.cache`, and
around an ASGI application in `resilient.asgi.cache`.

A `LRUCache` of cachetools bounds the entries. Not its `TTLCache`: that drops what is stale, and stale is what
we are after.
"""

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache
from cachetools.keys import hashkey

from resilient import deadline, events, options
from resilient.call import AsyncNext, Call, Next
from resilient.counter import Counter
from resilient.edge import Edge
from resilient.kinds import MISSING, Stale, Value
from resilient.policy import Policy
from resilient.ticket import Ticket


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of a `Cache`.

    Attributes:
        entries: How many results are kept.
        hits: Calls that were answered with a fresh entry.
        misses: Calls that were made.
        shared: Calls that waited for the result of another one.
        stale: Calls that were answered with an entry older than `ttl`.
    """

    entries: int
    hits: int
    misses: int
    shared: int
    stale: int


class _Entry:
    """A result and when it was stored."""

    __slots__ = ("stored_at", "value")

    def __init__(self, value: Any, stored_at: float) -> None:
        self.value = value
        self.stored_at = stored_at


class _Flight:
    """A call that is under way, and those who wait for its result."""

    __slots__ = ("key", "waiting")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.waiting: deque[tuple[Ticket, Call]] = deque()


class Cache(Value):
    """Answer from memory; serve old answers when there is nothing newer.

    Results are kept as they are, not copied: treat them as read-only. The key holds on to the arguments, for
    methods also to `self`; give `key` if that matters.

    On the transport of an HTTP client it keeps what RFC 9111 lets a private cache keep. `ttl`, `stale` and
    `refresh` are then for answers in which the server says nothing, and `key` is a function of the request. Around
    an ASGI application it is a shared cache, and `key` a function of the scope that has to tell users apart.

    Args:
        ttl: For how many seconds a result is fresh; 0 keeps results for stale answers only.
        stale: For how many seconds more a result is served if the call fails. Default 0: never.
        refresh: For how many seconds after `ttl` a result is served at once while a new one is fetched in the
            background. Default 0: never.
        max_entries: How many results are kept; the least recently used goes first. Default 1024.
        key: A function of the call's arguments that returns what results are kept by (hashable). Default: all
            arguments. The function itself is always part of the key.
        on: For which errors stale results are served: exception classes, HTTP status codes (such responses are
            not kept) and functions of the error. Default `Exception`, which includes the refusals of policies
            further in.
        name: What events call this policy. Default: its repr.

    Raises:
        TypeError: The arguments cannot be hashed, and there is no `key`.
        TimedOut: The deadline passed while waiting for another call's result.

    Emits:
        CacheStaleServed, CacheRefreshFailed.
    """

    def __init__(
        self,
        ttl: options.Seconds,
        *,
        stale: options.Seconds = 0.0,
        refresh: options.Seconds = 0.0,
        max_entries: int = 1024,
        key: Callable[..., Hashable] | None = None,
        on: "options.Errors" = Exception,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.ttl = options.seconds("Cache", "ttl", ttl, zero=True)
        self.stale = options.seconds("Cache", "stale", stale, zero=True)
        self.refresh = options.seconds("Cache", "refresh", refresh, zero=True)
        self.max_entries = options.whole("Cache", "max_entries", max_entries)
        self.key = None if key is None else options.function("Cache", "key", key)
        self.on = options.errors("Cache", "on", on)
        self.judge_statuses_of(self.on)
        self._matches = options.matcher(self.on)
        self._kept_for = self.ttl + max(self.stale, self.refresh)
        self._entries: LRUCache[Hashable, _Entry] = LRUCache(maxsize=self.max_entries)
        self._flights: dict[Hashable, _Flight] = {}
        self._led: dict[Call, _Flight] = {}
        self._hits = Counter()
        self._misses = Counter()
        self._shared = Counter()
        self._stale = Counter()
        self._on_edges: dict[Any, Any] = {}  # what this policy is where results cannot be kept as they are

    def link(self, nxt: Next, edge: Edge) -> Next:
        return super().link(nxt, edge) if edge.cache is None else self._on(edge.cache).link(nxt, edge)

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        return super().alink(nxt, edge) if edge.cache is None else self._on(edge.cache).alink(nxt, edge)

    def _on(self, kind: "Callable[[Cache], Policy]") -> Policy:
        with self._lock:
            if kind not in self._on_edges:
                self._on_edges[kind] = kind(self)
            policy: Policy = self._on_edges[kind]
            return policy

    def lookup(self, call: Call, now: float) -> Any:
        key = self._key_of(call)
        with self._lock:
            entry = self._live_entry(key, now)
            age = 0.0 if entry is None else now - entry.stored_at
            if entry is not None and age < self.ttl:
                self._hits.add()
                return entry.value
            flight = self._flights.get(key)
            refreshing = entry is not None and age < self.ttl + self.refresh
            if flight is None:
                self._misses.add()
                self._lead(call, key)
            elif not refreshing:
                self._shared.add()
                ticket = Ticket(expires_at=deadline.tightest(None))
                ticket.value = flight
                flight.waiting.append((ticket, call))
                return ticket
        if entry is None or not refreshing:
            return MISSING
        self._serve_stale(age, "refresh")
        return Stale(entry.value) if flight is None else entry.value

    def store(self, call: Call, result: Any, now: float) -> None:
        with self._lock:
            flight = self._land(call)
            if flight is None:
                return
            self._entries[flight.key] = _Entry(result, now)
            for ticket, _call in flight.waiting:
                ticket.value = result
                ticket.grant()

    def recover(self, call: Call, error: Exception, now: float) -> Any:
        entry = self._fail(call, error, now)
        if entry is None:
            return MISSING
        self._serve_stale(now - entry.stored_at, "error")
        return entry.value

    def refresh_failed(self, call: Call, error: Exception, now: float) -> None:
        self._fail(call, error, now)
        self.emit(events.CacheRefreshFailed, error=type(error).__name__)

    def abandon(self, call: Call) -> None:
        """Let the one who has waited longest make the call."""
        with self._lock:
            flight = self._led.pop(call, None)
            while flight is not None and flight.waiting:
                ticket, next_call = flight.waiting.popleft()
                self._led[next_call] = flight
                ticket.value = MISSING
                if ticket.grant():
                    return
                del self._led[next_call]
            if flight is not None and self._flights.get(flight.key) is flight:
                del self._flights[flight.key]

    def leave(self, call: Call, ticket: Ticket) -> BaseException:
        with self._lock:
            flight: _Flight | None = ticket.value if isinstance(ticket.value, _Flight) else None
            if flight is not None and (ticket, call) in flight.waiting:
                flight.waiting.remove((ticket, call))
        if ticket.granted and ticket.value is MISSING:  # just as the caller gave up: somebody else has to lead
            self.abandon(call)
        limit = None if ticket.cancelled else deadline.current()
        return TimeoutError("cancelled while waiting") if limit is None else limit.timed_out()

    def clear(self) -> None:
        """Forget all results. Calls under way are not affected, and will store theirs."""
        with self._lock:
            self._entries.clear()
        for policy in list(self._on_edges.values()):
            policy.clear()

    def idle(self, now: float) -> bool:
        if self._entries or self._flights:
            return False
        return all(policy.idle(now) for policy in list(self._on_edges.values()))

    def statistics(self) -> CacheStatistics:
        """Return how many results are kept, and how calls were answered."""
        return CacheStatistics(
            entries=len(self._entries) + sum(policy.entries for policy in list(self._on_edges.values())),
            hits=self._hits.value,
            misses=self._misses.value,
            shared=self._shared.value,
            stale=self._stale.value,
        )

    def after_fork(self) -> None:
        super().after_fork()
        self._flights.clear()  # who led them and who waits for them is not in this process
        self._led.clear()

    def _key_of(self, call: Call) -> Hashable:
        if self.key is None:
            key = call.function, hashkey(*call.args, **call.kwargs)
        else:
            key = call.function, self.key(*call.args, **call.kwargs)
        try:
            hash(key)
        except TypeError as error:
            which = "the arguments are" if self.key is None else "what key= returned is"
            raise TypeError(
                f"{self.label}: {which} not hashable; give key= a function that makes a key"
            ) from error
        return key

    def _live_entry(self, key: Hashable, now: float) -> _Entry | None:
        entry: _Entry | None = self._entries.get(key)
        if entry is not None and now - entry.stored_at >= self._kept_for:
            del self._entries[key]
            return None
        return entry

    def _lead(self, call: Call, key: Hashable) -> None:
        self._flights[key] = self._led[call] = _Flight(key)

    def _land(self, call: Call) -> _Flight | None:
        flight = self._led.pop(call, None)
        if flight is not None:
            del self._flights[flight.key]
        return flight

    def _fail(self, call: Call, error: Exception, now: float) -> _Entry | None:
        """End a flight that failed; return the stale entry to answer with, if there is one."""
        wanted = self._matches(error)
        with self._lock:
            flight = self._land(call)
            if flight is None:
                return None
            entry = self._live_entry(flight.key, now)
            if entry is None or not wanted or now - entry.stored_at >= self.ttl + self.stale:
                entry = None
            for ticket, _call in flight.waiting:
                ticket.value = None if entry is None else entry.value
                ticket.error = error if entry is None else None
                if ticket.grant() and entry is not None:
                    self._stale.add()
            return entry

    def _serve_stale(self, age: float, reason: str) -> None:
        self._stale.add()
        self.emit(events.CacheStaleServed, age=age, reason=reason)
