"""A transport over replicas: it sends each request to one of several servers that answer the same.

Which replica gets a request is decided in this order:

1. By health. The *primaries* serve as long as one of them is healthy, except those that are ejected. If none is
   healthy, the *backups* serve, as long as one of them is. If nobody is healthy, everybody serves, ejected or not
   (Envoy's panic mode): when all fail, the cause is more likely elsewhere, and there is nothing to lose.
   What healthy, ejected and spared mean is in `resilient.http.outliers`.
2. By what the call has tried. A retry or a hedge goes to a replica that the call has not been to. Once the call
   has failed at each of them, it goes to the backups, if they are healthy (nginx does that too). After that it
   starts over, but not with the replica that it was at last if there is another.
3. By load: of two that are picked at random, the one with the lower product of requests under way and latency.
   Two choices are nearly as good as asking all, and do not send everybody to the same replica (Mitzenmacher, "The
   Power of Two Choices in Randomized Load Balancing").

The latency is the time to the headers, averaged so that it rises at once and falls slowly (Finagle's peak EWMA):
one slow answer is enough to turn to others. The average fades while a replica gets no requests, so it is tried
again. A failure is often quick, which must not make it attractive: it counts as no quicker than the replica was
before, or, if it has never answered, than the median of its healthy peers.

A request is under way until the body of its response has been released; only then is it a success.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from types import TracebackType
from typing import Any, ClassVar, Final, Self

from resilient import deadline, events, options, runtime
from resilient.component import Component
from resilient.errors import Rejected, TimedOut
from resilient.http.edge import _event
from resilient.http.family import HIGHEST_PORT, Family
from resilient.http.outliers import Ejected, Outliers, Returned
from resilient.http.streams import CLOCKS_DIFFER, AsyncWatch, SyncWatch, release_leaked, watch
from resilient.http.transport import check_transport

FAILURES: Final = frozenset({500, 502, 503, 504})
"""Statuses that are a failure of the replica."""

TRIED: Final = "resilient.tried"
"""The key in the extensions of a request under which the transport around this one keeps a list for each call."""

_UNPROVEN = 1e9  # the latency of a replica that has not answered yet, while it is being tried (Finagle: a penalty)


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """A snapshot of one replica.

    Attributes:
        requests: How many requests it has got.
        in_flight: How many of them are under way, those whose response has not been released included.
        failures: How many of them failed, whether or not that counted against the replica.
        latency: Its latency in seconds as the choice sees it, None if it has not answered yet.
        healthy: Whether it is in service: neither ejected nor spared.
        ejected: When it comes back, in seconds of the monotonic clock; None if it is not ejected.
        backup: Whether it is a backup.
    """

    requests: int
    in_flight: int
    failures: int
    latency: float | None
    healthy: bool
    ejected: float | None
    backup: bool


@dataclass(frozen=True, slots=True)
class LoadBalancerStatistics:
    """A snapshot of a `LoadBalancer`.

    Attributes:
        replicas: Each replica by its URL, primaries first.
        panicking: Whether nobody was healthy when the last request was sent.
    """

    replicas: Mapping[str, ReplicaStatistics]
    panicking: bool


class PeakEwma:
    """An average of latencies that rises at once, falls slowly, and fades while there are none.

    Args:
        decay: After so many seconds, 37 % are left of what was before.
    """

    __slots__ = ("_at", "_decay", "seconds")

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.seconds: float | None = None  # before it fades
        self._at = 0.0

    def read(self, now: float) -> float | None:
        """Return the average in seconds, None if there is nothing to average."""
        return None if self.seconds is None else self.seconds * self._left(now)

    def observe(self, seconds: float, now: float) -> None:
        """Take in a latency."""
        if self.seconds is not None and seconds < self.seconds:
            left = self._left(now)
            seconds = self.seconds * left + seconds * (1 - left)
        self.seconds, self._at = seconds, now

    def at_least(self, seconds: float, now: float) -> None:
        """Take in a latency that is not known to its end: it can only raise the average."""
        average = self.read(now)
        if average is None or average < seconds:
            self.seconds, self._at = seconds, now

    def resume(self, at: float) -> None:
        """Do not let it have faded before this time."""
        self._at = max(self._at, at)

    def _left(self, now: float) -> float:
        return math.exp(min(0.0, self._at - now) / self._decay)


class _Replica:
    """A server, and what is known of it."""

    __slots__ = (
        "_address",
        "answered",
        "event",
        "failures",
        "group",
        "host",
        "in_flight",
        "latency",
        "name",
        "number",
        "prefix",
        "requests",
    )

    def __init__(self, url: Any, decay: float) -> None:
        self.host = url.netloc.decode("ascii")
        self.prefix = url.raw_path.rstrip(b"/")
        self.name = f"{url.scheme}://{self.host}{self.prefix.decode('ascii')}"
        self.latency = PeakEwma(decay)
        self.group: _Group
        self.number = 0
        self.requests = self.in_flight = self.failures = 0
        self.answered = False
        self.event: Any = None  # the end of an HTTP/2 connection that has been counted
        self._address = {"scheme": url.scheme, "host": url.raw_host.decode("ascii"), "port": url.port}

    def load(self, now: float) -> tuple[float, int]:
        """Return what to compare: the product, and where that says nothing, the requests under way."""
        latency = self.latency.read(now)
        if latency is None:
            latency = _UNPROVEN if self.in_flight else -1.0  # first of all
        return latency * (self.in_flight + 1), self.in_flight

    def url(self, logical: Any) -> Any:
        return logical.copy_with(**self._address, raw_path=self.prefix + logical.raw_path)


class _Group:
    """The primaries, or the backups."""

    def __init__(self, replicas: list[_Replica], outliers: Outliers) -> None:
        self.replicas = replicas
        self.outliers = outliers
        for number, replica in enumerate(replicas):
            replica.group, replica.number = self, number

    def usable(self) -> list[_Replica]:
        """Return those that may serve; nobody if nobody is healthy."""
        out = self.outliers.out
        if not out:
            return self.replicas
        if out == len(self.replicas):
            return []
        return [replica for replica in self.replicas if self.outliers.ejected_until(replica.number) is None]

    def median(self, now: float) -> float | None:
        """Return the median latency of the healthy ones that have answered."""
        known = [
            replica.latency.read(now) or 0.0
            for replica in self.replicas
            if replica.answered and self.outliers.healthy(replica.number)
        ]
        return median_low(known) if known else None


class _Tried(str):
    """The name of a replica that a call has tried, and whether it failed there."""

    __slots__ = ("failed",)

    failed: bool


class _Sent:
    """A request that was sent to a replica, until its response is released."""

    __slots__ = ("life", "replica", "started", "tried")

    def __init__(self, replica: _Replica, started: float, life: object, tried: list[Any] | None) -> None:
        self.replica = replica
        self.started = started
        self.life = life
        self.tried = _Tried(replica.name)
        self.tried.failed = False
        if tried is not None:
            tried.append(self.tried)


class Balancer(Component):
    """Spread the requests of a client over replicas: servers that answer the same.

    The client goes on using one logical URL, of which path and query are sent to the replica; scheme, host and
    port are the replica's. The request object that the client sees keeps the logical URL, and so do redirects and
    cookies: a `Location` that names the replica itself is changed to the logical URL.

    Put a `ResilientTransport` with a `Retry` around it: its retries go to other replicas. Without one a request
    is sent once. Cookies of answers that were retried are lost, those for sticky sessions too.

    Every request of the client goes to the replicas, whatever its host, redirects to elsewhere included. If the
    client has other business too, mount it: `httpx.Client(mounts={"https://service.example": LoadBalancer(...)})`.

    Args:
        replicas: The URLs of the servers, such as `["https://a.example", "https://b.example:8443/v1"]`. A path is
            put in front of the path of each request.
        backup: URLs of servers that get requests only when no other is healthy, or when a call has failed at
            each of the others. Default: none.
        transport: What sends the requests to all of them. Default None: the default transport of the package.
        consecutive: A replica that fails so often in a row is an outlier. Default 5.
        failure_rate: So is one of whose requests in the window at least this fraction failed. Default 0.5.
        minimum_calls: Do not judge the rate by fewer requests than this. Default 20.
        window: The window in seconds, in ten slices. Default 30 s.
        eject_for: How long an outlier gets no requests the first time, in seconds; each time it is as much longer
            again. Default 30 s.
        max_eject_for: But never longer than so many seconds. Default 300 s.
        max_ejected: The largest fraction of the replicas (and likewise of the backups) that may be ejected at the
            same time, rounded down. Default 0.5, so a single one is never ejected; it is not healthy all the same,
            and the backups take over.
        decay: Seconds after which 37 % of an old latency still count. Default 10 s.
        preserve_host: Send the `Host` header of the logical URL instead of the replica's. Default False.
        name: What events call this load balancer. Default: its repr.

    Raises:
        ValueError: A URL that is not absolute, has a query, a fragment or a user, or comes twice; or another bad
            option.
        TypeError: A transport of the other package or of the other colour, or an option of the wrong type.

    Emits:
        ReplicaEjected, ReplicaReturned, BackupsUsed, BalancerPanicked.

    Failures are the transport errors of the package, before and in the body, but not `PoolTimeout`,
    `LocalProtocolError` and `UnsupportedProtocol`, which are ours, and the statuses 500, 502, 503 and 504. A
    request that is cancelled before the headers says nothing, unless a deadline of ours cancelled it that had left
    it at least half of its time.
    """

    balances = True
    """Tells the transport around this one that it has to keep a list of replicas for each call."""

    _family: ClassVar[Family]
    _asynchronous: ClassVar[bool]

    def __init__(
        self,
        replicas: Iterable[Any],
        *,
        backup: Iterable[Any] = (),
        transport: Any = None,
        consecutive: int = 5,
        failure_rate: float = 0.5,
        minimum_calls: int = 20,
        window: options.Seconds = 30.0,
        eject_for: options.Seconds = 30.0,
        max_eject_for: options.Seconds = 300.0,
        max_ejected: float = 0.5,
        decay: options.Seconds = 10.0,
        preserve_host: bool = False,
        name: str | None = None,
    ) -> None:
        self._all: list[_Replica] = []  # the process may fork before it is finished, or when it was refused
        super().__init__(name=name)
        me = type(self).__name__
        self.consecutive = options.whole(me, "consecutive", consecutive)
        self.failure_rate = options.fraction(me, "failure_rate", failure_rate)
        self.minimum_calls = options.whole(me, "minimum_calls", minimum_calls)
        self.window = options.seconds(me, "window", window)
        self.eject_for = options.seconds(me, "eject_for", eject_for)
        self.max_eject_for = options.seconds(me, "max_eject_for", max_eject_for)
        if self.max_eject_for < self.eject_for:
            raise options.refuse(me, "max_eject_for", max_eject_for, f"at least eject_for={self.eject_for:g}")
        self.max_ejected = options.fraction(me, "max_ejected", max_ejected, zero=True)
        self.decay = options.seconds(me, "decay", decay)
        self.preserve_host = options.flag(me, "preserve_host", preserve_host)
        primaries = self._check_urls("replicas", replicas)
        backups = self._check_urls("backup", backup, taken=[replica.name for replica in primaries])
        self.replicas = tuple(replica.name for replica in primaries)
        self.backup = tuple(replica.name for replica in backups)
        self.transport = transport
        self._inner = check_transport(me, self._family, transport, asynchronous=self._asynchronous)
        self._all = [*primaries, *backups]
        self._primaries, self._backups = self._group(primaries), self._group(backups)
        self._serving: type[events.Event] | None = None  # what was said of those who serve: None of the primaries
        self._life = object()
        self._news: deque[tuple[type[events.Event], dict[str, Any]]] = deque()
        self._entered = self._closed = False
        of = self._family.module
        self._timeouts: Any = of.TimeoutException
        self._errors: Any = of.TransportError
        self._not_theirs: Any = (of.PoolTimeout, of.LocalProtocolError, of.UnsupportedProtocol, Rejected)

    def _group(self, replicas: list[_Replica]) -> _Group:
        outliers = Outliers(
            len(replicas),
            consecutive=self.consecutive,
            failure_rate=self.failure_rate,
            minimum_calls=self.minimum_calls,
            window=self.window,
            eject_for=self.eject_for,
            max_eject_for=self.max_eject_for,
            max_ejected=self.max_ejected,
        )
        return _Group(replicas, outliers)

    def statistics(self) -> LoadBalancerStatistics:
        """Return what is known of each replica."""
        release_leaked()
        with self._lock:
            now = runtime.now()
            self._age(now)
            replicas = {
                replica.name: ReplicaStatistics(
                    requests=replica.requests,
                    in_flight=replica.in_flight,
                    failures=replica.failures,
                    latency=replica.latency.read(now),
                    healthy=replica.group.outliers.healthy(replica.number),
                    ejected=replica.group.outliers.ejected_until(replica.number),
                    backup=replica.group is self._backups,
                )
                for replica in self._all
            }
            panicking = self._serving is events.BalancerPanicked
        self._tell()
        return LoadBalancerStatistics(replicas=replicas, panicking=panicking)

    def after_fork(self) -> None:
        super().after_fork()
        self._life = object()  # requests that were under way are so in the parent only
        for replica in self._all:
            replica.in_flight = 0

    # -- one request ------------------------------------------------------------------------------------------

    def _send_to_one(self, request: Any) -> _Sent:
        """Choose the replica for a request, which is under way from now on."""
        if not isinstance(request, self._family.Request):
            raise TypeError(
                f"{self._family.name}.{type(self).__name__} got a request of type {type(request).__module__}."
                f"{type(request).__name__}; give it requests of {self._family.package}"
            )
        release_leaked()
        tried = request.extensions.get(TRIED)
        with self._lock:
            now = runtime.now()
            self._age(now)
            replica = self._choose(tried, now)
            replica.requests += 1
            replica.in_flight += 1
            sent = _Sent(replica, now, self._life, tried)
        self._tell()
        return sent

    def _addressed(self, request: Any, replica: _Replica) -> Any:
        """Return a copy of a request that goes to a replica. The body is not copied, it may be a stream."""
        copy = object.__new__(type(request))
        copy.__dict__.update(request.__dict__)
        copy.url = replica.url(request.url)
        copy.headers = request.headers.copy()
        if not self.preserve_host:
            copy.headers["Host"] = replica.host
        copy.extensions = {key: value for key, value in request.extensions.items() if key != TRIED}
        return copy

    def _keep_logical(self, response: Any, request: Any, copy: Any, replica: _Replica) -> None:
        """Have a `Location` at the replica name the logical URL, the only one that the client may know.

        Else a redirect is one to another origin, where the credentials of the client do not go along, and a path
        that all requests to the replica have in front would be there twice.
        """
        location = response.headers.get("Location")
        if location is None:
            return
        logical, real = (url.copy_with(userinfo=b"", fragment=None) for url in (request.url, copy.url))
        try:
            target, followed = real.join(location), logical.join(location)
        except (ValueError, self._family.module.InvalidURL):  # the client says so, if it follows
            return
        path = target.raw_path.removeprefix(replica.prefix)
        is_below = len(path) + len(replica.prefix) == len(target.raw_path) and path[:1] in (b"", b"/", b"?")
        its_own = [copy.url, request.url] if self.preserve_host else [copy.url]
        if is_below and any(_is_of_origin(target, url) for url in its_own):
            path = path if path.startswith(b"/") else b"/" + path
            kept = logical.copy_with(raw_path=path, fragment=target.fragment or None)
            if kept != followed:
                response.headers["Location"] = str(kept)

    def _answered(self, sent: _Sent, status: int, body: Any) -> None:
        """Take note of the headers. If they are good, the body decides whether the request was a success."""
        failed = status in FAILURES
        if body is not None:
            body.when_released(self._when_released(sent, failed=failed))
        with self._lock:
            now = runtime.now()
            if failed:
                self._fail(sent, None, now, now - sent.started)
            else:
                sent.replica.latency.observe(now - sent.started, now)
                sent.replica.answered = True
            if body is None:
                self._finish(sent)
                if not failed:
                    self._succeed(sent, now)
        self._tell()

    def _when_released(self, sent: _Sent, *, failed: bool) -> Callable[[BaseException | None], None]:
        def released(error: BaseException | None) -> None:
            now = runtime.now()
            # If time is up while the body is read, that may be the fault of whoever reads it.
            blames = isinstance(error, Exception) and not isinstance(error, TimedOut)
            broken = blames and not failed and self._blames(error, sent, now)
            with self._lock:
                self._finish(sent)
                if broken:
                    self._fail(sent, error, now, 0.0)  # how long the body took is no latency
                elif error is None and not failed:
                    self._succeed(sent, now)
            self._tell()

        return released

    def _broke(self, sent: _Sent, error: BaseException) -> None:
        """Take note of an error before the headers."""
        now = runtime.now()
        failed = self._blames(error, sent, now)
        with self._lock:
            self._finish(sent)
            if failed:
                self._fail(sent, error, now, now - sent.started)
            elif not isinstance(error, self._not_theirs):
                sent.replica.latency.at_least(now - sent.started, now)
        self._tell()

    def _blames(self, error: BaseException | None, sent: _Sent, now: float) -> bool:
        """Tell whether an error is a failure of the replica; the others say nothing about it."""
        if isinstance(error, self._not_theirs):
            return False
        if isinstance(error, self._timeouts) or runtime.is_cancellation(error):
            limit = deadline.current()
            if limit is not None and now >= limit.at - CLOCKS_DIFFER:
                return now - sent.started >= limit.scope.limit() / 2
        return isinstance(error, self._errors)

    # -- what happens under the lock --------------------------------------------------------------------------

    def _age(self, now: float) -> None:
        for group in (self._primaries, self._backups):
            if group.outliers.out:
                self._report(group, group.outliers.age(now))

    def _fail(self, sent: _Sent, error: Any, now: float, elapsed: float) -> None:
        replica = sent.replica
        replica.failures += 1
        sent.tried.failed = True
        usual = replica.latency.seconds if replica.answered else replica.group.median(now)
        replica.latency.at_least(max(elapsed, usual or 0.0), now)
        event = _event(error)
        if event is not None:
            if event is replica.event:
                return  # one connection may have been that of a hundred requests
            replica.event = event
        changes = replica.group.outliers.record(replica.number, failed=True, started=sent.started, now=now)
        self._report(replica.group, changes)

    def _succeed(self, sent: _Sent, now: float) -> None:
        replica = sent.replica
        changes = replica.group.outliers.record(replica.number, failed=False, started=sent.started, now=now)
        self._report(replica.group, changes)

    def _finish(self, sent: _Sent) -> None:
        if sent.life is self._life:
            sent.replica.in_flight -= 1

    def _report(self, group: _Group, changes: Sequence[Ejected | Returned]) -> None:
        for change in changes:
            replica = group.replicas[change.number]
            if isinstance(change, Ejected):
                facts = {"replica": replica.name, "reason": change.reason, "eject_for": change.seconds}
                self._news.append((events.ReplicaEjected, facts))
            else:
                replica.latency.resume(change.at)  # else everybody would rush to it
                self._news.append((events.ReplicaReturned, {"replica": replica.name}))

    def _choose(self, tried: Sequence[Any] | None, now: float) -> _Replica:
        tiers = [usable for group in (self._primaries, self._backups) if (usable := group.usable())]
        serving: type[events.Event] | None = None
        if not tiers:
            tiers, serving = [self._all], events.BalancerPanicked
        elif tiers[0][0].group is self._backups:
            serving = events.BackupsUsed
        if serving is not self._serving:
            self._serving = serving
            if serving is not None:
                self._news.append((serving, {}))
        among = _not_tried(tiers, tried) if tried else tiers[0]
        count = len(among)
        if count == 1:
            return among[0]
        first = int(runtime.random(0, count)) % count  # it may be rounded up to the end
        second = (first + 1 + int(runtime.random(0, count - 1)) % (count - 1)) % count
        one, other = among[first], among[second]
        return other if other.load(now) < one.load(now) else one

    def _tell(self) -> None:
        """Emit what there is to report; never under the lock."""
        while self._news:
            try:
                event, facts = self._news.popleft()
            except IndexError:  # somebody else has just told it
                return
            self.emit(event, **facts)

    # -- options ----------------------------------------------------------------------------------------------

    def _check_urls(self, option: str, given: Any, taken: Iterable[str] = ()) -> list[_Replica]:
        me, allowed = type(self).__name__, "a list of absolute http or https URLs"
        if isinstance(given, str | bytes | self._family.module.URL) or not isinstance(given, Iterable):
            raise options.refuse(me, option, given, allowed, TypeError)
        found: dict[str, _Replica] = {}
        for each in given:
            replica = _Replica(self._check_url(option, each), self.decay)
            if replica.name in found:
                raise options.refuse(me, option, each, "each replica once")
            if replica.name in taken:
                raise options.refuse(me, option, each, "replicas that are not among the others")
            found[replica.name] = replica
        if option == "replicas" and not found:
            raise options.refuse(me, option, given, f"{allowed}, at least one")
        return list(found.values())

    def _check_url(self, option: str, given: Any) -> Any:
        me, allowed = type(self).__name__, "absolute http or https URLs such as 'https://a.example/v1'"
        if not isinstance(given, str | self._family.module.URL):
            raise options.refuse(me, option, given, f"{allowed}, as str or {self._family.package}.URL", TypeError)
        try:
            url = self._family.module.URL(given)
        except self._family.module.InvalidURL as error:
            raise options.refuse(me, option, given, f"{allowed}: {error}") from None
        if url.userinfo:  # the repr of the parsed URL hides the password
            raise options.refuse(me, option, url, "URLs without a user, and the client its auth=")
        if url.scheme not in ("http", "https") or not url.host:
            raise options.refuse(me, option, given, allowed)
        if (url.port or 0) > HIGHEST_PORT:
            raise options.refuse(me, option, given, f"{allowed}, with a port up to {HIGHEST_PORT}")
        if b"?" in url.raw_path or url.fragment:
            raise options.refuse(me, option, given, "URLs without a query and a fragment")
        return url


def _is_of_origin(url: Any, other: Any) -> bool:
    return (url.scheme, url.host, url.port) == (other.scheme, other.host, other.port)


def _not_tried(tiers: list[list[_Replica]], tried: Sequence[Any]) -> list[_Replica]:
    """Return those among whom a call should choose that has tried some already."""
    failed = {name for name in tried if getattr(name, "failed", True)}
    if not all(replica.name in failed for replica in tiers[0]):
        tiers = tiers[:1]  # a hedge, or a retry after a 429, is none of the backups' business
    for names in (tried, tried[-1:]):
        for members in tiers:
            left = [replica for replica in members if replica.name not in names]
            if left:
                return left
    return tiers[0]


class SyncBalancer(Balancer):
    """A load balancer for sync clients."""

    _asynchronous = False

    @property
    def _pool(self) -> Any:
        """The connections, where `keep_deadlines` looks for them."""
        return getattr(self._inner, "_pool", None)

    def handle_request(self, request: Any) -> Any:
        """Send one request to one of the replicas."""
        sent = self._send_to_one(request)
        try:
            copy = self._addressed(request, sent.replica)
            response = self._inner.handle_request(copy)
            self._keep_logical(response, request, copy, sent.replica)
            body = watch(self._family, response, request, SyncWatch)
        except BaseException as error:
            self._broke(sent, error)
            raise
        self._answered(sent, response.status_code, body)
        return response

    def __enter__(self) -> Self:
        if not self._entered:  # a client enters it once for each pattern that it is mounted at
            self._inner.__enter__()
            self._entered = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if not self._closed:
            self._closed = True
            self._inner.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        """Close the wrapped transport, once."""
        if not self._closed:
            self._closed = True
            self._inner.close()


class AsyncBalancer(Balancer):
    """A load balancer for async clients, on asyncio and on trio."""

    _asynchronous = True

    async def handle_async_request(self, request: Any) -> Any:
        """Send one request to one of the replicas."""
        sent = self._send_to_one(request)
        try:
            copy = self._addressed(request, sent.replica)
            response = await self._inner.handle_async_request(copy)
            self._keep_logical(response, request, copy, sent.replica)
            body = watch(self._family, response, request, AsyncWatch)
        except BaseException as error:
            self._broke(sent, error)
            raise
        self._answered(sent, response.status_code, body)
        return response

    async def __aenter__(self) -> Self:
        if not self._entered:
            await self._inner.__aenter__()
            self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if not self._closed:
            self._closed = True
            await self._inner.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport, once."""
        if not self._closed:
            self._closed = True
            await self._inner.aclose()
