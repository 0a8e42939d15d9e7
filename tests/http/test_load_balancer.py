"""The load balancer: which replica gets a request, and what it learns from the answer."""

import copy
import dataclasses
import functools
import gc
import importlib
import itertools
import math
import os
import pickle
import random
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import anyio
import httpx
import httpx2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resilient import Rejected, Retry, TimedOut, Timeout, deadline, events, runtime
from resilient.http.balancer import AsyncBalancer, PeakEwma, SyncBalancer
from resilient.http.family import Family
from resilient.http.network import keep_deadlines
from resilient.http.streams import SyncWatch
from resilient.testing import capture_events, run, run_both, virtual_time

PACKAGES = [httpx, httpx2]
FAMILIES = {package: Family(package, f"balancer_tests.{package.__name__}") for package in PACKAGES}
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class LoadBalancer(SyncBalancer, httpx.BaseTransport):
    _family = FAMILIES[httpx]


class AsyncLoadBalancer(AsyncBalancer, httpx.AsyncBaseTransport):
    _family = FAMILIES[httpx]


class LoadBalancer2(SyncBalancer, httpx2.BaseTransport):
    _family = FAMILIES[httpx2]


class AsyncLoadBalancer2(AsyncBalancer, httpx2.AsyncBaseTransport):
    _family = FAMILIES[httpx2]


CLASSES = {httpx: (LoadBalancer, AsyncLoadBalancer), httpx2: (LoadBalancer2, AsyncLoadBalancer2)}


@pytest.fixture(params=PACKAGES, ids=lambda package: package.__name__)
def package(request):
    return request.param


class Ahead:
    """An async iterator over a sync one; no generator, which would have to be closed."""

    def __init__(self, chunks):
        self.chunks = chunks

    def __aiter__(self):
        return self

    async def __anext__(self):
        for chunk in self.chunks:
            return chunk
        raise StopAsyncIteration


@functools.cache
def stream_class(package):
    class Stream(package.SyncByteStream, package.AsyncByteStream):
        """A body of some chunks, which may break after them."""

        def __init__(self, *chunks, error=None):
            self.chunks = chunks
            self.error = error
            self.closed = 0

        def __iter__(self):
            yield from self.chunks
            if self.error is not None:
                raise self.error

        def __aiter__(self):
            return Ahead(iter(self))

        def close(self):
            self.closed += 1

        async def aclose(self):
            self.closed += 1

    return Stream


class World:
    """A load balancer and the replicas behind it, in one colour.

    Attributes:
        answers: What each host answers: a status, an error, a body (a `Stream`), or an async function of the
            request that returns one of them.
        seen: The requests that arrived, in their order.
    """

    def __init__(self, package, colour, replicas="abc", **options):
        self.package = package
        self.colour = colour
        self.sync = colour is None or colour.name == "sync"
        self.answers = {}
        self.seen = []
        handle = self.handle if colour is None else colour.function(self.handle)
        if colour is None:
            handle = lambda request: self.respond(self.arrive(request))  # noqa: E731
        self.inner = package.MockTransport(handle)
        urls = [f"http://{host}" for host in replicas] if "://" not in replicas else [replicas]
        options.setdefault("transport", self.inner)
        if isinstance(options.get("backup"), str):
            options["backup"] = [f"http://{host}" for host in options["backup"]]
        self.lb = CLASSES[package][not self.sync](urls, name="lb", **options)

    def arrive(self, request):
        self.seen.append(request)
        return self.answers.get(request.url.host, 200)

    def respond(self, answer):
        if isinstance(answer, int):
            return self.package.Response(answer)
        if isinstance(answer, BaseException | type):
            raise answer
        return self.package.Response(200, stream=answer)

    async def handle(self, request):
        answer = self.arrive(request)
        if callable(answer) and not isinstance(answer, type):
            answer = await answer(request)
        return self.respond(answer)

    async def send(self, tried=None, url="https://service/path?x=1", **options):
        """Send one request; return its response."""
        extensions = {} if tried is None else {"resilient.tried": tried}
        request = self.package.Request("GET", url, extensions=extensions, **options)
        return self.lb.handle_request(request) if self.sync else await self.lb.handle_async_request(request)

    async def status(self, tried=None):
        """Send one request to its end; return its status, or the name of its error."""
        try:
            response = await self.send(tried)
            return await self.finish(response)
        except Exception as error:
            return type(error).__name__

    async def finish(self, response):
        if self.sync:
            response.read()
        else:
            await response.aread()
        return response.status_code

    async def close(self, response):
        if self.sync:
            response.close()
        else:
            await response.aclose()

    async def many(self, count, each=None):
        """Send so many requests, one after the other; return who got how many of them."""
        before = len(self.seen)
        for _ in range(count):
            await (each or self.status)()
        return Counter(request.url.host for request in self.seen[before:])

    @property
    def hosts(self):
        return "".join(request.url.host for request in self.seen)

    def of(self, host):
        return self.lb.statistics().replicas[f"http://{host}"]

    @property
    def healthy(self):
        return "".join(name[-1] for name, each in self.lb.statistics().replicas.items() if each.healthy)

    @property
    def ejected(self):
        return "".join(
            name[-1] for name, each in self.lb.statistics().replicas.items() if each.ejected is not None
        )

    @property
    def in_flight(self):
        return [each.in_flight for each in self.lb.statistics().replicas.values()]


def in_all_colours(package, scenario, **options):
    """Run a scenario of a `World` in all colours; return the trace."""
    return run_both(lambda colour: scenario(World(package, colour, **options)))


def after(colour, seconds, answer=200):
    async def answer_late(request):
        await colour.sleep(seconds)
        return answer

    return answer_late


@contextmanager
def sync_world(package=httpx, replicas="abc", **options):
    """A world of plain sync code in virtual time."""
    with virtual_time() as clock:
        world = World(package, None, replicas, **options)
        world.clock = clock
        yield world


def get(world, tried=None, **options):
    """Send a request in plain sync code; return the response or the error."""
    extensions = {} if tried is None else {"resilient.tried": tried}
    request = world.package.Request("GET", "https://service/path", extensions=extensions)
    try:
        return world.lb.handle_request(request)
    except Exception as error:
        return error


# -- where a request goes -------------------------------------------------------------------------------------


def test_the_replica_gets_path_and_query_and_the_caller_keeps_its_request(package):
    async def scenario(world):
        headers = {"X-Case": "kept", "host": "service:9"}
        request = package.Request(
            "POST",
            "https://service:9/a%2Fb%20c/?q=%41&r=/?#part",
            headers=headers,
            content=b"body",
            extensions={"timeout": {"read": 3.0}, "sni_hostname": "name", "target": b"/t", "resilient.tried": []},
        )
        before = dict(request.__dict__), list(request.headers.raw), dict(request.extensions)
        if world.sync:
            world.lb.handle_request(request)
        else:
            await world.lb.handle_async_request(request)
        (sent,) = world.seen
        assert (request.__dict__, request.headers.raw, request.extensions) == before
        assert request.url == "https://service:9/a%2Fb%20c/?q=%41&r=/?#part"
        assert (sent.url.scheme, sent.url.host, sent.url.port) == ("http", "a", None)
        assert sent.url.raw_path == b"/a%2Fb%20c/?q=%41&r=/?"
        assert sent.headers["host"] == "a"
        assert [pair for pair in sent.headers.raw if pair[0].lower() != b"host"] == [
            pair for pair in request.headers.raw if pair[0].lower() != b"host"
        ]
        assert type(sent) is package.Request
        assert sent.method == "POST"
        assert sent.stream is request.stream
        assert sent.extensions == {"timeout": {"read": 3.0}, "sni_hostname": "name", "target": b"/t"}
        assert sent.extensions["timeout"] is request.extensions["timeout"]  # read again while the body is read
        assert request.extensions["resilient.tried"] == ["http://a"]

    in_all_colours(package, scenario, replicas="a")


@pytest.mark.parametrize(
    ("replica", "url", "host"),
    [
        ("https://a", "https://a/p?q", "a"),
        ("https://a/", "https://a/p?q", "a"),
        ("https://A:443", "https://a/p?q", "a"),
        ("http://a:443", "http://a:443/p?q", "a:443"),
        ("https://a:8443/v1/", "https://a:8443/v1/p?q", "a:8443"),
        ("https://a/v%201/x", "https://a/v%201/x/p?q", "a"),
        ("http://[::1]:80/v1", "http://[::1]/v1/p?q", "[::1]"),
        ("http://[::1]:8080", "http://[::1]:8080/p?q", "[::1]:8080"),
        ("https://bücher.example", "https://xn--bcher-kva.example/p?q", "xn--bcher-kva.example"),
    ],
)
def test_replica_urls(package, replica, url, host):
    with sync_world(package) as world:
        for given_url in (replica, package.URL(replica)):
            lb = world.lb = CLASSES[package][0]([given_url], transport=world.inner)
            lb.handle_request(package.Request("GET", "https://service:9999/p?q"))
            assert str(world.seen[-1].url) == url
            assert world.seen[-1].headers["host"] == host
            assert list(lb.statistics().replicas) == [url.removesuffix("/p?q")] == list(lb.replicas)


@given(
    prefix=st.sampled_from(["", "/v1", "/v%201/a"]),
    path=st.text(alphabet="ab/%?#&=;:@+.~ ü'\\", max_size=12),
)
def test_path_and_query_arrive_as_they_are(prefix, path):
    for package in PACKAGES:
        world = World(package, None)
        lb = CLASSES[package][0]([f"http://a{prefix}"], transport=world.inner)
        request = package.Request("GET", f"https://service/{path}")
        lb.handle_request(request)
        assert world.seen[-1].url.raw_path == prefix.encode() + request.url.raw_path


def test_the_host_header_of_the_caller_can_be_kept(package):
    with sync_world(package, "a", preserve_host=True) as world:
        request = package.Request("GET", "https://service:9/", headers={"Host": "virtual"})
        world.lb.handle_request(request)
        assert world.seen[0].headers["host"] == "virtual"
        assert world.seen[0].url.host == "a"
        assert world.seen[0].headers is not request.headers


def test_a_request_without_a_host_header_gets_one(package):
    with sync_world(package, "a") as world:
        body = stream_class(package)(b"x")
        world.lb.handle_request(package.Request("GET", "https://service/", stream=body))
        assert world.seen[0].headers.raw == [(b"Host", b"a")]


def test_redirects_and_cookies_follow_the_logical_url(package):
    def answer(request):
        if request.url.path == "/from":
            headers = {"location": "/to", "set-cookie": "session=1"}
            return package.Response(302, headers=headers)
        return package.Response(200, text=request.headers.get("cookie", ""))

    lb = CLASSES[package][0](["http://a", "http://b"], transport=package.MockTransport(answer))
    with package.Client(transport=lb, follow_redirects=True, trust_env=False) as client:
        response = client.get("https://service/from")
    assert response.url == "https://service/to"
    assert [each.url for each in response.history] == ["https://service/from"]
    assert response.text == "session=1"
    assert [cookie.domain for cookie in client.cookies.jar] == ["service.local"]


@pytest.mark.parametrize(
    ("replica", "location", "kept"),
    [
        ("http://a", "http://a/to?x#f", "https://service/to?x#f"),
        ("http://a:80", "http://A", "https://service/"),
        ("http://a", "to", "to"),
        ("http://a", "/to", "/to"),
        ("http://a", "", ""),
        ("http://a", "//a/to", "https://service/to"),
        ("http://a", "https://a/to", "https://a/to"),
        ("http://a", "http://a:8080/to", "http://a:8080/to"),
        ("http://a", "http://b/to", "http://b/to"),
        ("http://a", "https://service/to", "https://service/to"),
        ("http://a", "http://a:port/", "http://a:port/"),
        ("http://a", "http://[a/", "http://[a/"),
        ("http://a/v1", "http://a/v1/to", "https://service/to"),
        ("http://a/v1", "http://a/v1?x", "https://service/?x"),
        ("http://a/v1", "/v1/to", "https://service/to"),
        ("http://a/v1", "to", "to"),
        ("http://a/v1", "/to", "/to"),
        ("http://a/v1", "http://a/v12/to", "http://a/v12/to"),
        ("http://a/v1", "https://service/v1/to", "https://service/v1/to"),
    ],
)
def test_a_redirect_at_the_replica_names_the_logical_url(package, replica, location, kept):
    async def scenario(world):
        world.respond = lambda _: package.Response(302, headers={"Location": location})
        response = await world.send(url="https://me:secret@service/from#f")
        assert response.headers["location"] == kept
        assert response.headers.raw == [(b"Location", kept.encode())]

    in_all_colours(package, scenario, replicas=replica)


@pytest.mark.parametrize(
    ("location", "kept"),
    [
        ("https://service/v1/to", "https://service/to"),
        ("http://a/v1/to", "https://service/to"),
        ("http://service/v1/to", "http://service/v1/to"),
    ],
)
def test_a_replica_that_knows_the_logical_host_redirects_to_it(package, location, kept):
    with sync_world(package, "http://a/v1", preserve_host=True) as world:
        world.respond = lambda _: package.Response(302, headers={"Location": location})
        response = world.lb.handle_request(package.Request("GET", "https://service/from"))
        assert response.headers["location"] == kept


def test_credentials_go_along_with_a_redirect_at_the_replica(package):
    def answer(request):
        if request.url.path == "/v1/from":
            host = request.headers["host"]
            return package.Response(307, headers={"Location": f"http://{host}/v1/to"})
        return package.Response(200, text=f"{request.url.path} {request.headers.get('authorization')}")

    lb = CLASSES[package][0](["http://a/v1", "http://b/v1"], transport=package.MockTransport(answer))
    with package.Client(transport=lb, follow_redirects=True, trust_env=False) as client:
        response = client.get("http://service/from", headers={"Authorization": "Bearer x"})
    assert response.url == "http://service/to"
    assert response.text == "/v1/to Bearer x"


def test_responses_pass_untouched(package):
    async def scenario(world):
        body = stream_class(package)(b"one", b"two")
        answer = package.Response(200, headers=[("X-A", "1"), ("x-a", "2")], stream=body, extensions={"e": 1})
        world.respond = lambda _: answer
        response = await world.send()
        assert response is answer
        assert response.headers.raw == [(b"X-A", b"1"), (b"x-a", b"2")]
        assert response.extensions == {"e": 1}
        assert isinstance(response.stream, package.SyncByteStream if world.sync else package.AsyncByteStream)
        await world.finish(response)
        assert (response.content, body.closed) == (b"onetwo", 1)

    in_all_colours(package, scenario)


# -- power of two choices -------------------------------------------------------------------------------------


def test_each_replica_is_tried_before_any_is_tried_twice():
    for seed in range(20):
        with virtual_time(seed=seed):
            world = World(httpx, None, "ab")
            get(world), get(world)
            assert sorted(world.hosts) == ["a", "b"]


def test_equal_replicas_get_equal_shares(package):
    async def scenario(world):
        for host in "abcd":
            world.answers[host] = after(world.colour, 0.1)
        counts = await world.many(800)
        assert all(140 < counts[host] < 260 for host in "abcd")
        return counts

    in_all_colours(package, scenario, replicas="abcd")


@pytest.mark.parametrize("seed", range(3))
def test_one_slow_of_three_gets_far_fewer(package, seed):
    async def scenario(colour):
        world = World(package, colour)
        world.answers = {"a": after(colour, 0.01), "b": after(colour, 0.01), "c": after(colour, 0.5)}

        async def client():
            return await world.many(100)

        await colour.gather(*[client] * 8)
        counts = Counter(world.hosts)
        assert counts["c"] <= 8  # of 800; one for each client while nothing is known
        assert 200 < counts["a"] < 600
        assert world.in_flight == [0, 0, 0]

    run_both(scenario, seed=seed)


def test_a_replica_that_becomes_slow_is_left_and_tried_again(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 0.1) for host in "ab"}
        assert (await world.many(40))["b"] > 10
        world.answers["b"] = after(world.colour, 5)
        assert (await world.many(100))["b"] == 1  # one is enough
        world.answers["b"] = after(world.colour, 0.1)
        fade = 10 * math.log(5 / 0.1)
        assert (await world.many(int((fade - 11) / 0.1)))["b"] == 0
        assert (await world.many(300))["b"] > 2
        assert (await world.many(300))["b"] > 100

    in_all_colours(package, scenario, replicas="ab")


def test_requests_under_way_count(package):
    """Of replicas that are equally quick, the one with fewer unread responses is chosen."""
    with sync_world(package, "ab") as world:
        world.respond = lambda _: package.Response(200, stream=stream_class(package)(b"x"))
        held = [get(world) for _ in range(20)]
        assert [statistics.in_flight for statistics in world.lb.statistics().replicas.values()] == [10, 10]
        for response, request in zip(held, list(world.seen), strict=True):
            if request.url.host == "a":
                response.close()
        assert world.in_flight == [0, 10]
        held = [get(world) for _ in range(9)]
        assert world.hosts[20:] == "a" * 9


def test_requests_under_way_and_latency_are_multiplied(package):
    with sync_world(package, "ab") as world:
        world.respond = lambda _: package.Response(200, stream=stream_class(package)(b"x"))
        for replica, seconds in zip(world.lb._all, (0.1, 0.35), strict=True):
            replica.latency.observe(seconds, 0.0)
        held = [get(world) for _ in range(9)]
        assert world.hosts == "aaabaaaba"  # 0.1 0.2 0.3 | 0.35 | 0.4 0.5 0.6 0.7 ...
        assert len(held) == sum(world.in_flight)


def test_the_worst_of_all_is_never_chosen():
    with sync_world() as world:
        world.answers["c"] = stream_class(httpx)(b"x")
        waiting = []
        while "c" not in world.hosts:
            waiting.append(get(world))
        before = len(world.seen)
        for _ in range(200):
            assert get(world).status_code == 200
        assert "c" not in world.hosts[before:]


def test_while_nothing_is_known_the_one_with_the_fewest_under_way_is_chosen(package):
    async def scenario(world):
        for host in "ab":
            world.answers[host] = after(world.colour, 10)
        await world.colour.gather(*[world.status] * 10)
        assert sorted(world.hosts) == list("aaaaabbbbb")

    in_all_colours(package, scenario, replicas="ab")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.999, 1.0])
def test_any_random_number_will_do(share):
    """A uniform number may be rounded up to the end of its range; the two replicas differ even then."""
    for slow in range(5):
        with sync_world(replicas="abcde") as world:
            for number, replica in enumerate(world.lb._all):
                replica.latency.observe(10.0 if number == slow else 0.1, 0.0)
            before = runtime.install(
                dataclasses.replace(runtime._installed, random=lambda low, high: low + share * (high - low))
            )
            try:
                assert get(world).status_code == 200
            finally:
                runtime.install(before)
            assert world.hosts != "abcde"[slow]


@given(count=st.integers(2, 6), seed=st.integers(0, 10_000))
def test_the_two_choices_differ(count, seed):
    with virtual_time(seed=seed):
        world = World(httpx, None, "abcdef"[:count])
        quick = world.lb._all[0]
        for replica in world.lb._all:
            replica.latency.observe(1.0, 0.0)
        quick.latency = PeakEwma(10)
        quick.latency.observe(0.001, 0.0)
        if count == 2:
            get(world)
            assert world.hosts == "a"
        else:
            for _ in range(60):
                get(world)
            assert "a" in world.hosts


def test_randomness_comes_from_the_runtime():
    def hosts(seed):
        with virtual_time(seed=seed):
            world = World(httpx, None, "abcde")
            for _ in range(20):
                get(world)
            return world.hosts

    assert hosts(1) == hosts(1)
    assert hosts(1) != hosts(2)


# -- the average ----------------------------------------------------------------------------------------------


def test_the_average_rises_at_once_falls_slowly_and_fades():
    average = PeakEwma(10.0)
    assert average.read(0.0) is None
    average.observe(1.0, 0.0)
    assert average.read(0.0) == 1.0
    average.observe(3.0, 1.0)
    assert average.read(1.0) == 3.0
    average.observe(1.0, 11.0)
    assert average.read(11.0) == pytest.approx(3 * math.exp(-1) + 1 - math.exp(-1))
    assert average.read(21.0) == pytest.approx(average.read(11.0) * math.exp(-1))


def test_a_lower_bound_only_raises():
    average = PeakEwma(10.0)
    average.at_least(2.0, 0.0)
    assert average.read(0.0) == 2.0
    average.at_least(0.1, 5.0)
    assert average.read(5.0) == pytest.approx(2 * math.exp(-0.5))
    average.at_least(1.5, 5.0)
    assert average.read(5.0) == 1.5


def test_it_can_stop_fading():
    average = PeakEwma(10.0)
    average.resume(3.0)
    assert average.read(4.0) is None
    average.observe(1.0, 0.0)
    average.resume(30.0)
    assert (average.read(30.0), average.read(20.0)) == (1.0, 1.0)
    average.resume(10.0)
    assert average.read(40.0) == pytest.approx(math.exp(-1))


@given(
    samples=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 50)), min_size=1),
    decay=st.floats(0.1, 100),
)
@example(samples=[(4.0, 0.0), (3.0, 9.0), (3.0, 27.2890625)], decay=0.96875)
def test_the_average_stays_within_the_samples(samples, decay):
    average, now, previous = PeakEwma(decay), 0.0, 0.0
    for seconds, wait in samples:
        now += wait
        average.observe(seconds, now)
        assert seconds - 1e-9 <= average.read(now) <= max(previous, seconds) + 1e-9  # it is rounded
        previous = average.read(now)
        assert average.read(now + 1) <= previous


def test_the_latency_is_the_time_to_the_headers(package):
    async def scenario(world):
        async def answer(_request):
            await world.colour.sleep(0.25)
            return stream_class(package)(b"x")

        world.answers["a"] = answer
        response = await world.send()
        await world.colour.sleep(60)
        world.lb._all[0].latency.resume(60.25)
        await world.finish(response)
        assert world.of("a").latency == pytest.approx(0.25)

    in_all_colours(package, scenario, replicas="a")


# -- what counts as what --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "failures", "in_a_row"),
    [
        (500, 1, True),
        (502, 1, True),
        (503, 1, True),
        (504, 1, True),
        (501, 0, False),
        (505, 0, False),
        (429, 0, False),
        (408, 0, False),
        (404, 0, False),
        (302, 0, False),
        (200, 0, False),
        ("ConnectError", 1, True),
        ("ConnectTimeout", 1, True),
        ("ReadError", 1, True),
        ("ReadTimeout", 1, True),
        ("WriteTimeout", 1, True),
        ("RemoteProtocolError", 1, True),
        ("ProxyError", 1, True),
        ("PoolTimeout", 0, True),
        ("LocalProtocolError", 0, True),
        ("UnsupportedProtocol", 0, True),
        ("InvalidURL", 0, True),
    ],
)
def test_what_is_a_failure(package, answer, failures, in_a_row):
    """The last column: whether what came before still counts as an unbroken row of failures."""

    async def scenario(world):
        world.answers["a"] = getattr(package, answer)("x") if isinstance(answer, str) else answer
        await world.many(1)
        assert world.of("a").failures == failures
        assert world.in_flight == [0, 0]
        world.answers["a"] = 503
        before = world.lb._all[0].group.outliers._members[0].failures
        assert before == failures
        for expected in (1, 2, 3):
            await world.many(1)
            assert world.lb._all[0].group.outliers._members[0].failures == before + expected
        world.answers["a"] = getattr(package, answer)("x") if isinstance(answer, str) else answer
        await world.many(1)
        kept = world.lb._all[0].group.outliers._members[0].failures != 0 or world.ejected == "a"
        assert kept is in_a_row

    def run_scenario(colour):
        world = World(package, colour, "ab")
        world.lb._primaries.usable = lambda: world.lb._all[:1]
        return scenario(world)

    run_both(run_scenario)


def test_our_own_errors(package):
    """A refusal of a policy around the inner transport says nothing; a timeout there does."""
    own = FAMILIES[package].own
    with sync_world(package, "a") as world:
        world.answers["a"] = own(Rejected("busy", policy="p"), None)
        assert isinstance(get(world), package.TransportError)
        assert (world.of("a").failures, world.of("a").latency) == (0, None)
        world.answers["a"] = own(TimedOut(policy="p", seconds=1), None)
        assert isinstance(get(world), package.TimeoutException)
        assert world.of("a").failures == 1


def test_a_full_pool_is_no_latency(package):
    async def scenario(world):
        world.answers["a"] = after(world.colour, 5, package.PoolTimeout("x"))
        await world.status()
        assert world.of("a").latency is None
        world.answers["a"] = after(world.colour, 5, RuntimeError("x"))
        await world.status()
        assert (world.of("a").latency, world.of("a").failures) == (5, 0)

    in_all_colours(package, scenario, replicas="a")


def test_a_timeout_is_a_latency(package):
    async def scenario(world):
        world.answers["a"] = after(world.colour, 5, package.ReadTimeout("x"))
        await world.status()
        assert (world.of("a").latency, world.of("a").failures) == (5, 1)

    in_all_colours(package, scenario, replicas="a")


def test_one_connection_that_ends_is_one_failure(package):
    """HTTP/2: all requests on a connection get the same event when it ends."""

    class GoAway:
        error_code = 0

    def broken(event):
        error = package.RemoteProtocolError("<ConnectionTerminated>")
        error.__cause__ = ConnectionError(event)
        return error

    with sync_world(package, "a", consecutive=3) as world:
        event = GoAway()
        for _ in range(10):
            world.answers["a"] = broken(event)
            get(world)
        assert (world.of("a").failures, world.healthy) == (10, "a")
        for expected in ("a", ""):
            world.answers["a"] = broken(GoAway())
            get(world)
            assert world.healthy == expected


def test_one_connection_that_ends_under_many_bodies_is_one_failure(package):
    class GoAway:
        error_code = 0

    with sync_world(package, "a", consecutive=2) as world:
        error = package.RemoteProtocolError("<ConnectionTerminated>")
        error.__cause__ = ConnectionError(GoAway())
        world.answers["a"] = stream_class(package)(b"x", error=error)
        for _ in range(5):
            with pytest.raises(package.RemoteProtocolError):
                get(world).read()
        assert (world.of("a").failures, world.healthy) == (5, "a")


def test_a_body_that_breaks_is_a_failure(package):
    async def scenario(world):
        world.answers["a"] = stream_class(package)(b"x", error=package.ReadError("broken"))
        for expected in range(1, 6):
            response = await world.send()
            assert (world.in_flight, world.of("a").failures) == ([1], expected - 1)
            await world.colour.sleep(2)
            with pytest.raises(package.ReadError):
                await world.finish(response)
            assert (world.in_flight, world.of("a").failures) == ([0], expected)
            assert world.of("a").latency < 1  # how long the body took is no latency
        assert world.healthy == ""

    in_all_colours(package, scenario, replicas="a")


def test_a_body_that_breaks_ejects_without_another_request(package):
    async def scenario(world):
        world.answers["a"] = world.answers["b"] = stream_class(package)(b"x", error=package.ReadError("broken"))
        with capture_events() as seen:
            await world.status()
        assert [event.name for event in seen] == ["replica.ejected"]

    assert in_all_colours(package, scenario, replicas="ab", consecutive=1) == [("replica.ejected", 0.0)]


@pytest.mark.parametrize(
    ("error", "failures"),
    [
        ("ReadTimeout", 1),
        ("RemoteProtocolError", 1),
        ("LocalProtocolError", 0),
        ("StreamClosed", 0),
        ("TimedOut", 0),
    ],
)
def test_how_a_body_can_break(package, error, failures):
    with sync_world(package, "a") as world:
        if error == "TimedOut":  # our own deadline: perhaps it was the reader who was slow
            broken = FAMILIES[package].own(TimedOut(policy="p"), None)
        else:
            broken = getattr(package, error)(*(() if error == "StreamClosed" else ("x",)))
        world.answers["a"] = stream_class(package)(b"x", error=broken)
        with pytest.raises(type(broken)):
            get(world).read()
        assert (world.of("a").failures, world.in_flight) == (failures, [0])
        world.answers["a"] = 500
        get(world)
        world.answers["a"] = stream_class(package)(b"x", error=broken)
        with pytest.raises(type(broken)):
            get(world).read()
        assert world.lb._all[0].group.outliers._members[0].failures == 1 + 2 * failures  # none was a success


def test_a_success_counts_when_the_body_has_been_read(package):
    """Headers alone would break the row of failures of a replica all of whose bodies break."""
    with sync_world(package, "a", consecutive=2) as world:
        world.answers["a"] = 500
        get(world)
        world.answers["a"] = stream_class(package)(b"x")
        response = get(world)
        member = world.lb._all[0].group.outliers._members[0]
        assert (world.in_flight, member.failures) == ([1], 1)
        response.read()
        assert (world.in_flight, member.failures) == ([0], 0)


def test_a_failed_answer_counts_once_whatever_becomes_of_its_body(package):
    async def scenario(world):
        broken = stream_class(package)(b"x", error=package.ReadError("broken"))
        world.respond = lambda _: package.Response(503, stream=broken)
        response = await world.send()
        assert (world.of("a").failures, world.in_flight) == (1, [1])
        with pytest.raises(package.ReadError):
            await world.finish(response)
        assert (world.of("a").failures, world.in_flight) == (1, [0])
        world.respond = lambda _: package.Response(503, stream=stream_class(package)(b"x"))
        await world.finish(await world.send())
        assert world.lb._all[0].group.outliers._members[0].failures == 2

    in_all_colours(package, scenario, replicas="a")


def test_bodies_in_memory_are_released_at_once(package):
    with sync_world(package, "a") as world:
        for status in (200, 503):
            world.answers["a"] = status
            response = get(world)
            assert type(response.stream) is package.ByteStream
            assert world.in_flight == [0]
        assert world.of("a").requests == 2


def test_a_body_that_somebody_watches_already(package):
    """As when the inner transport has a pipeline of its own."""
    with sync_world(package, "a") as world:
        response = package.Response(200, stream=stream_class(package)(b"x"))
        watched = type("Watched", (SyncWatch, package.SyncByteStream), {})
        response.stream = watched(FAMILIES[package], response.stream, None)
        stream = response.stream
        world.respond = lambda _: response
        assert get(world).stream is stream
        assert world.in_flight == [1]
        response.close()
        assert world.in_flight == [0]


def test_a_body_that_is_only_partly_read(package):
    async def scenario(world):
        world.answers["a"] = stream_class(package)(b"one", b"two")
        response = await world.send()
        chunks = iter(response.stream) if world.sync else aiter(response.stream)
        first = next(chunks) if world.sync else await anext(chunks)
        assert (first, world.in_flight) == (b"one", [1])
        await world.close(response)
        assert world.in_flight == [0]
        if not world.sync:
            await chunks.aclose()

    in_all_colours(package, scenario, replicas="a")


def test_a_response_that_is_lost_is_no_longer_under_way(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = stream_class(package)(b"x")
        response = get(world)
        assert world.in_flight == [1]
        del response
        gc.collect()
        assert world.in_flight == [0]


def test_a_response_that_is_lost_in_the_middle_of_anything_takes_no_lock(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = stream_class(package)(b"x")
        response = get(world)
        with world.lb._lock:
            del response
            gc.collect()
        assert world.in_flight == [0]


def test_the_next_request_knows_of_a_response_that_is_lost(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = stream_class(package)(b"x")
        response = get(world)
        del response
        gc.collect()
        held = get(world)
        assert world.lb._all[0].in_flight == 1
        held.close()


def test_an_answer_that_is_no_response(package):
    with sync_world(package, "a") as world:
        world.lb._inner.handle_request = lambda request: None
        with pytest.raises(AttributeError):
            world.lb.handle_request(package.Request("GET", "http://service/"))
        assert world.in_flight == [0]


def test_a_url_that_becomes_too_long(package):
    with sync_world(package) as world:
        lb = CLASSES[package][0](["http://a/" + "p" * 1000], transport=world.inner)
        with pytest.raises(package.InvalidURL):
            lb.handle_request(package.Request("GET", "http://service/" + "x" * 65_000))
        assert [each.in_flight for each in lb.statistics().replicas.values()] == [0]


# -- cancellation and deadlines -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_request_says_nothing_but_how_long_it_took(package, backend):
    async def main():
        world = async_world(package, "a")
        world.answers["a"] = 500
        await world.status()
        world.answers["a"] = after(Clock, 100)
        with anyio.move_on_after(3):
            await world.send()
        statistics = world.of("a")
        assert (statistics.in_flight, statistics.failures, statistics.latency) == (0, 1, 3)
        assert world.lb._all[0].group.outliers._members[0].failures == 1
        with anyio.move_on_after(0.5):
            await world.send()
        assert world.of("a").latency == pytest.approx(3 * math.exp(-0.05))

    run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_cancelled_body_says_nothing(package, backend):
    async def main():
        world = async_world(package, "a")

        class Hanging(package.AsyncByteStream):
            async def __aiter__(self):
                await anyio.sleep(100)
                yield b""

        world.answers["a"] = Hanging()
        response = await world.send()
        with anyio.move_on_after(3):
            await response.aread()
        assert (world.of("a").failures, world.in_flight) == (0, [0])
        response = await world.send()
        with pytest.raises(TimedOut):
            await Timeout(3).acall(response.aread)
        assert (world.of("a").failures, world.in_flight) == (0, [0])
        await response.aclose()

    run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(("begins", "failures"), [(0, 1), (4.9, 1), (5.1, 0), (9, 0)])
def test_a_deadline_of_ours_is_a_failure_if_the_replica_had_most_of_the_time(package, backend, begins, failures):
    async def main():
        world = async_world(package, "a")
        world.answers["a"] = after(Clock, 100)

        async def call():
            await runtime.asleep(begins)
            await world.send()

        with pytest.raises(TimedOut):
            await Timeout(10).acall(call)
        assert (world.of("a").failures, world.in_flight) == (failures, [0])
        assert world.of("a").latency == pytest.approx(10 - begins)

    run(main, backend=backend)


@pytest.mark.parametrize(("begins", "failures"), [(0, 1), (4.9, 1), (5.1, 0), (9, 0)])
def test_the_same_in_sync_code(package, begins, failures):
    """There the deadline shows as a timeout of the transport."""
    with sync_world(package, "a") as world:

        def answer(request):
            runtime.sleep(deadline.remaining())
            raise package.ReadTimeout("x")

        world.inner.handler = answer

        def call():
            runtime.sleep(begins)
            raise get(world)

        with pytest.raises(package.ReadTimeout):
            Timeout(10, interrupt=False).call(call)
        assert world.of("a").failures == failures
        assert world.of("a").latency == pytest.approx(10 - begins)


def test_a_timeout_before_the_deadline_is_a_failure(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = package.ReadTimeout("x")

        def call():
            runtime.sleep(9)
            raise get(world)

        with pytest.raises(package.ReadTimeout):
            Timeout(10, interrupt=False).call(call)
        assert world.of("a").failures == 1


def test_an_interrupt_says_nothing(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            get(world)
        assert (world.of("a").failures, world.in_flight) == (0, [0])


class Clock:
    """What stands for a `Colour` where the code is async anyway."""

    name = "async"

    @staticmethod
    async def sleep(seconds):
        await runtime.asleep(seconds)

    @staticmethod
    def function(function):
        return function


def async_world(package, replicas="abc", **options):
    return World(package, Clock, replicas, **options)


# -- ejection -------------------------------------------------------------------------------------------------


def test_five_failures_in_a_row_eject_for_thirty_seconds(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 0.1) for host in "bc"}
        world.answers["a"] = after(world.colour, 0.1, 503)
        while not world.ejected:
            await world.status()
        assert world.of("a").failures == world.of("a").requests == 5
        until = world.of("a").ejected
        assert until == pytest.approx(world.colour.now() + 30)
        assert (await world.many(int(29 / 0.1)))["a"] == 0
        world.answers["a"] = after(world.colour, 0.1)
        await world.many(20)
        assert (await world.many(300))["a"] > 50
        assert (world.ejected, world.healthy) == ("", "abc")
        return round(until, 6)

    trace = in_all_colours(package, scenario)
    assert [name for name, _ in trace] == ["replica.ejected", "replica.returned"]
    assert 30 <= trace[1][1] - trace[0][1] <= 30.2  # noticed by the next request


def test_the_failure_rate_ejects_too(package):
    with sync_world(package, "ab") as world:
        turns = itertools.count()
        world.respond = lambda _: package.Response(200)

        def answer(request):
            bad = request.url.host == "a" and next(turns) % 2
            return package.Response(502 if bad else 200)

        world.inner.handler = answer
        with capture_events() as seen:
            for _ in range(100):
                get(world)
        (ejected,) = seen
        facts = ("lb", "http://a", "failure_rate", 30.0)
        assert (ejected.policy, ejected.replica, ejected.reason, ejected.eject_for) == facts
        assert world.of("a").requests == 20


def test_ejections_grow(package):
    async def scenario(world):
        world.answers = {"a": after(world.colour, 0.01, 503), "b": after(world.colour, 0.01)}
        lengths = []
        with capture_events() as seen:
            while len(lengths) < 5:
                await world.colour.sleep(1)
                await world.many(10)
                lengths = [event.eject_for for event in seen if event.name == "replica.ejected"]
        assert lengths == [30, 60, 90, 100, 100]

    in_all_colours(package, scenario, replicas="ab", max_eject_for=100)


@pytest.mark.parametrize(("hosts", "most"), [("a", 0), ("ab", 1), ("abc", 1), ("abcd", 2), ("abcde", 2)])
def test_at_most_half_is_ejected(package, hosts, most):
    async def scenario(world):
        world.answers = dict.fromkeys(hosts, 503)
        for _ in range(200):
            await world.status()
            assert len(world.ejected) <= most
        assert len(world.ejected) == most
        assert world.healthy == ""

    in_all_colours(package, scenario, replicas=hosts)


def test_a_quick_failure_does_not_attract(package):
    """One that cannot be ejected, because others are, gets no more than its share."""

    async def scenario(world):
        good = after(world.colour, 0.1)
        world.answers = {
            "a": after(world.colour, 0.001, 503),
            "b": after(world.colour, 0.001, 503),
            "c": good,
            "d": good,
        }
        await world.many(60)
        assert world.ejected == "ab"
        world.answers["c"] = after(world.colour, 0.001, 503)
        await world.many(100)
        counts = await world.many(200)
        assert counts["c"] < 140
        assert counts["d"] > 60

    in_all_colours(package, scenario, replicas="abcd", eject_for=1000, max_eject_for=1000)


def test_a_replica_that_never_answered_does_not_attract(package):
    """Nothing but quick failures from the beginning, while the others are known to be slower."""

    async def scenario(world):
        world.answers = {"a": package.ConnectError("x"), "b": after(world.colour, 0.1)}
        counts = await world.many(100)
        assert counts["a"] < 70

    in_all_colours(package, scenario, replicas="ab", consecutive=1000, minimum_calls=1000)


def test_nor_beside_others_that_are_out_and_forgotten(package):
    """The measure are the healthy ones: the latency of those that get no requests has faded."""

    async def scenario(world):
        colour = world.colour
        for host in "abcd":
            world.answers[host] = after(colour, 0.1)
        world.lb._all[2].latency.at_least(1e6, 0.0)  # so that it is not asked yet
        await world.many(40)
        for host in "ab":
            world.answers[host] = after(colour, 0.1, 503)
        while world.ejected != "ab":
            await world.status()
        assert not world.lb._all[2].answered
        await world.many(600)
        world.answers["c"] = after(colour, 0.001, 503)
        world.lb._all[2].latency = PeakEwma(10)
        counts = await world.many(100)
        assert 20 < counts["c"] < 70

    in_all_colours(package, scenario, replicas="abcd", eject_for=1000, max_eject_for=1000)


def test_one_failure_among_slow_ones_does_not_put_one_off_for_long(package):
    """What counts is how quick it was itself, not how slow the others are."""
    with sync_world(package, "ab") as world:
        for replica, seconds in zip(world.lb._all, (0.1, 30.0), strict=True):
            replica.latency.observe(seconds, 0.0)
            replica.answered = True
        sent = world.lb._send_to_one(package.Request("GET", "http://service/"))
        world.clock.sleep(5)
        world.lb._answered(sent, 503, None)
        assert sent.replica.name == "http://a"
        assert sent.replica.latency.read(5.0) == 5.0
        world.lb._fail(sent, None, 15.0, 0.01)
        assert sent.replica.latency.read(15.0) == 5.0  # it did not fade


def test_a_replica_that_comes_back_is_not_flooded(package):
    async def scenario(world):
        world.answers = {"a": after(world.colour, 0.1, 503), "b": after(world.colour, 0.1)}
        while not world.ejected:
            await world.status()
        while world.ejected:
            await world.status()
        before = len(world.seen)
        await world.colour.gather(*[world.status] * 20)
        counts = Counter(world.hosts[before:])
        assert 7 <= counts["a"] <= 13

    in_all_colours(package, scenario, replicas="ab")


def test_what_was_under_way_does_not_count_after_an_ejection(package):
    async def scenario(world):
        colour = world.colour
        world.answers["a"] = after(colour, 40, 503)
        late = [world.status] * 4

        async def five():
            await colour.sleep(1)
            world.answers["a"] = 503
            await world.many(5)
            assert world.ejected == "a"

        async def check():
            await colour.sleep(45)
            assert (world.ejected, world.healthy) == ("", "a")

        await colour.gather(*late, five, check)
        assert world.of("a").failures == 9

    in_all_colours(package, scenario, replicas="a", max_ejected=1.0, minimum_calls=5)


# -- backups and panic ----------------------------------------------------------------------------------------


def test_backups_serve_only_when_no_primary_is_healthy(package):
    async def scenario(world):
        colour = world.colour
        for host in "abxy":
            world.answers[host] = after(colour, 0.1)
        assert not set(await world.many(100)) & set("xy")
        world.answers["a"] = after(colour, 0.1, 503)
        while world.healthy != "bxy":
            await world.status()
        assert set(await world.many(50)) == {"b"}
        world.answers["b"] = after(colour, 0.1, 503)
        while world.healthy != "xy":
            await world.status()
        counts = await world.many(100)
        assert set(counts) == {"x", "y"}
        assert min(counts.values()) > 25
        assert (world.ejected, world.lb.statistics().panicking) == ("a", False)
        world.answers["a"] = world.answers["b"] = after(colour, 0.1)
        while "a" not in world.healthy:
            await world.status()
        assert not set(await world.many(50)) & set("xy")

    trace = in_all_colours(package, scenario, replicas="ab", backup="xy")
    assert [name for name, _ in trace] == ["replica.ejected", "backups.used", "replica.returned"]


def test_a_single_primary_hands_over_to_its_backup_and_gets_back(package):
    async def scenario(world):
        world.answers["a"] = package.ConnectError("refused")
        await world.many(5)
        assert (world.healthy, world.ejected) == ("b", "")
        assert set(await world.many(20)) == {"b"}
        await world.colour.sleep(30)
        assert set(await world.many(5)) == {"a"}
        assert set(await world.many(20)) == {"b"}
        await world.colour.sleep(30)
        assert set(await world.many(20)) == {"b"}  # 60 s this time
        await world.colour.sleep(30)
        world.answers["a"] = 200
        assert set(await world.many(20)) == {"a"}

    assert in_all_colours(package, scenario, replicas="a", backup="b") == [
        ("backups.used", 0.0),
        ("backups.used", 30.0),
    ]


def test_backups_are_ejected_the_same_way(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 0.01, 500) for host in "ax"}
        world.answers["y"] = after(world.colour, 0.01)
        await world.many(5)
        while world.ejected != "x":
            await world.status()
        assert set(await world.many(20)) == {"y"}
        world.answers["y"] = world.answers["a"]
        while "y" in world.healthy:
            await world.status()
        assert set(await world.many(100)) == {"a", "x", "y"}
        assert world.lb.statistics().panicking

    trace = in_all_colours(package, scenario, replicas="a", backup="xy")
    assert [name for name, _ in trace] == ["backups.used", "replica.ejected", "balancer.panicked"]


def test_backups_come_back_too(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 0.01, 500) for host in "axy"}
        while not world.ejected:
            await world.status()
        await world.colour.sleep(29)
        assert world.ejected in ("x", "y")
        await world.colour.sleep(2)
        assert world.ejected == ""

    trace = in_all_colours(package, scenario, replicas="a", backup="xy")
    assert [name for name, _ in trace] == ["backups.used", "replica.ejected", "replica.returned"]


def test_what_is_decided_with_a_request_is_told_before_it_is_sent(package):
    async def scenario(world):
        world.answers["a"] = 500
        await world.many(5)
        world.answers["x"] = after(world.colour, 10)
        await world.status()

    assert in_all_colours(package, scenario, replicas="a", backup="x") == [("backups.used", 0.0)]


def test_panic_when_nobody_is_healthy(package):
    async def scenario(world):
        world.answers = dict.fromkeys("abc", 500)
        while world.healthy:
            await world.status()
        assert (len(world.ejected), world.lb.statistics().panicking) == (1, False)
        counts = await world.many(90)
        assert all(counts[host] > 15 for host in "abc")
        assert world.lb.statistics().panicking

    trace = in_all_colours(package, scenario)
    assert [name for name, _ in trace] == ["replica.ejected", "balancer.panicked"]


def test_panic_ends_when_one_is_healthy_and_is_told_each_time(package):
    async def scenario(world):
        world.answers = dict.fromkeys("ab", 500)
        while not world.lb.statistics().panicking:
            await world.status()
        world.answers = {host: after(world.colour, 0.1) for host in "ab"}
        while world.healthy != "ab":
            await world.status()
        await world.status()
        assert not world.lb.statistics().panicking
        assert world.colour.now() < 5  # successes bring them back, not the time
        world.answers = dict.fromkeys("ab", 500)
        while not world.lb.statistics().panicking:
            await world.status()

    trace = in_all_colours(package, scenario, replicas="ab")
    names = ["replica.ejected", "balancer.panicked", "replica.returned", "replica.ejected", "balancer.panicked"]
    assert [name for name, _ in trace] == names


def test_an_ejected_replica_gets_nothing_while_another_is_healthy(package):
    async def scenario(world):
        world.answers["a"] = 500
        while not world.ejected:
            await world.status()
        for tried in ([], ["http://b"], ["http://b", "http://b"]):
            await world.status(list(tried))
            assert world.hosts[-1] == "b"

    in_all_colours(package, scenario, replicas="ab")


# -- failover -------------------------------------------------------------------------------------------------


async def attempts(world, count):
    """What a retry does: one list for all attempts."""
    tried = []
    before = len(world.hosts)
    for _ in range(count):
        await world.status(tried)
    hosts = world.hosts[before:]
    assert tried == [f"http://{host}" for host in hosts]
    assert all(isinstance(name, str) for name in tried)
    return hosts


def test_a_retry_goes_to_a_replica_that_was_not_tried(package):
    async def scenario(world):
        for host in "abcd":
            world.answers[host] = after(world.colour, 0.1 if host == "a" else 10, 503)
        for _ in range(20):
            assert sorted(await attempts(world, 4)) == list("abcd")

    in_all_colours(package, scenario, replicas="abcd", consecutive=10_000, minimum_calls=10_000)


def test_when_all_were_tried_it_starts_over_with_another_one(package):
    async def scenario(world):
        for host in "abc":
            world.answers[host] = 429
        seen = set()
        for _ in range(50):
            hosts = await attempts(world, 7)
            assert sorted(hosts[:3]) == list("abc")
            assert all(one != other for one, other in itertools.pairwise(hosts))
            seen.add(hosts[3])
        assert seen == set("abc")

    in_all_colours(package, scenario)


def test_one_replica_alone_is_tried_again(package):
    async def scenario(world):
        world.answers["a"] = 429
        assert await attempts(world, 3) == "aaa"

    in_all_colours(package, scenario, replicas="a")


def test_a_call_that_failed_everywhere_goes_to_the_backups(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 0.1, 503) for host in "abxy"}
        for _ in range(20):
            hosts = await attempts(world, 6)
            assert sorted(hosts[:2]) == list("ab")
            assert sorted(hosts[2:4]) == list("xy")
            assert set(hosts[4:]) == set("ab")  # begins anew

    in_all_colours(package, scenario, replicas="ab", backup="xy", consecutive=10_000, minimum_calls=10_000)


def test_backups_that_are_not_healthy_are_no_help(package):
    async def scenario(world):
        world.lb._backups.usable = list
        world.answers = dict.fromkeys("ab", 503)
        assert set(await attempts(world, 6)) == set("ab")

    in_all_colours(package, scenario, replicas="ab", backup="x", consecutive=10_000, minimum_calls=10_000)


def test_a_retry_for_another_reason_does_not_go_to_the_backups(package):
    async def scenario(world):
        for answer in (429, 408, package.PoolTimeout("x")):
            world.answers["a"] = answer
            assert await attempts(world, 3) == "aaa"

    in_all_colours(package, scenario, replicas="a", backup="x")


def test_a_call_that_failed_at_some_only_does_not_go_to_the_backups(package):
    async def scenario(world):
        world.answers = {"a": 503, "b": 429}
        for _ in range(10):
            assert set(await attempts(world, 3)) == {"a", "b"}

    in_all_colours(package, scenario, replicas="ab", backup="x", consecutive=1000, minimum_calls=1000)


def test_a_hedge_moves_on_but_not_to_the_backups(package):
    async def scenario(world):
        world.answers = {host: after(world.colour, 1) for host in "abx"}
        tried = []

        async def attempt():
            return await world.status(tried)

        assert await world.colour.gather(attempt, attempt, attempt) == [200, 200, 200]
        assert (sorted(world.hosts[:2]), set(world.hosts)) == (["a", "b"], {"a", "b"})
        assert tried == [f"http://{host}" for host in world.hosts]

    in_all_colours(package, scenario, replicas="ab", backup="x")


def test_a_body_that_broke_counts_as_tried_in_vain(package):
    async def scenario(world):
        world.answers["a"] = stream_class(package)(b"x", error=package.ReadError("broken"))
        assert await attempts(world, 2) == "ax"

    in_all_colours(package, scenario, replicas="a", backup="x")


def test_names_of_another_origin_in_the_list(package):
    """The list is the caller's: plain strings mean that it was tried in vain."""
    with sync_world(package, "a", backup="x") as world:
        get(world, ["http://a"])
        get(world, ["http://elsewhere"])
        assert world.hosts == "xa"


def test_without_a_list_nothing_is_remembered(package):
    with sync_world(package, "a", backup="x", consecutive=1000) as world:
        world.answers["a"] = 503
        for _ in range(5):
            get(world)
        assert world.hosts == "aaaaa"
        assert all("resilient.tried" not in request.extensions for request in world.seen)


def test_retries_of_a_pipeline_move_on(package):
    async def scenario(world):
        module = importlib.import_module(f"resilient.{package.__name__}")
        transport = module.ResilientTransport if world.sync else module.AsyncResilientTransport
        world.answers = {"a": 503, "b": package.ConnectError("refused")}
        guarded = transport(world.lb, pipeline=Retry(3, wait=0))
        for _ in range(5):
            request = package.Request("GET", "https://service/")
            response = (
                guarded.handle_request(request) if world.sync else await guarded.handle_async_request(request)
            )
            assert response.status_code == 200
            assert "resilient.tried" not in request.extensions
        assert world.of("c").requests == 5
        assert all("resilient.tried" not in request.extensions for request in world.seen)

    in_all_colours(package, scenario, consecutive=1000)


# -- the object -----------------------------------------------------------------------------------------------


def recorder(package):
    class Recorder(package.BaseTransport, package.AsyncBaseTransport):
        def __init__(self):
            self.calls = []

        def __enter__(self):
            self.calls.append("enter")
            return self

        def __exit__(self, *error):
            self.calls.append(("exit", error[0]))

        def close(self):
            self.calls.append("close")

        async def __aenter__(self):
            return self.__enter__()

        async def __aexit__(self, *error):
            self.__exit__(*error)

        async def aclose(self):
            self.close()

        def handle_request(self, request):
            return package.Response(200)

        async def handle_async_request(self, request):
            return package.Response(200)

    return Recorder()


def test_the_inner_transport_is_entered_and_closed_once(package):
    inner = recorder(package)
    lb = CLASSES[package][0](["http://a"], transport=inner)
    with package.Client(transport=lb, trust_env=False) as client:
        assert client.get("http://service/").status_code == 200
    assert inner.calls == ["enter", ("exit", None)]
    lb.close()
    lb.__exit__(None, None, None)
    assert inner.calls == ["enter", ("exit", None)]
    inner = recorder(package)
    lb = CLASSES[package][0](["http://a"], transport=inner)
    with package.Client(mounts={"http://": lb, "https://": lb}, trust_env=False) as client:
        assert client.get("http://service/").status_code == 200
    assert inner.calls == ["enter", ("exit", None)]
    inner = recorder(package)
    lb = CLASSES[package][0](["http://a"], transport=inner)
    lb.close()
    lb.close()
    assert inner.calls == ["close"]
    inner = recorder(package)
    lb = CLASSES[package][0](["http://a"], transport=inner)

    def block():
        with lb as entered:
            assert entered is lb
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert inner.calls == ["enter", ("exit", ZeroDivisionError)]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_same_in_async_code(package, backend):
    async def main():
        inner = recorder(package)
        lb = CLASSES[package][1](["http://a"], transport=inner)
        async with package.AsyncClient(transport=lb, trust_env=False) as client:
            assert (await client.get("http://service/")).status_code == 200
        await lb.aclose()
        await lb.__aexit__(None, None, None)
        assert inner.calls == ["enter", ("exit", None)]
        inner = recorder(package)
        lb = CLASSES[package][1](["http://a"], transport=inner)
        async with package.AsyncClient(mounts={"http://": lb, "https://": lb}, trust_env=False) as client:
            assert (await client.get("http://service/")).status_code == 200
        assert inner.calls == ["enter", ("exit", None)]
        inner = recorder(package)
        lb = CLASSES[package][1](["http://a"], transport=inner)
        await lb.aclose()
        await lb.aclose()
        assert inner.calls == ["close"]
        inner = recorder(package)
        lb = CLASSES[package][1](["http://a"], transport=inner)

        async def block():
            async with lb as entered:
                assert entered is lb
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await block()
        assert inner.calls == ["enter", ("exit", ZeroDivisionError)]

    run(main, backend=backend)


def test_without_a_transport_it_makes_the_one_of_its_colour(package):
    sync, asynchronous = CLASSES[package]
    lb = sync(["http://a"])
    assert type(lb._inner) is package.HTTPTransport
    assert lb.transport is None
    assert keep_deadlines(lb)
    lb.close()
    assert type(asynchronous(["http://a"])._inner) is package.AsyncHTTPTransport
    assert not keep_deadlines(sync(["http://a"], transport=package.MockTransport(None)))
    assert sync.balances is asynchronous.balances is True


def test_transports_that_do_not_fit(package):
    other = httpx if package is httpx2 else httpx2
    sync, asynchronous = CLASSES[package]
    for kind, bad in [
        (sync, other.HTTPTransport()),
        (sync, package.AsyncHTTPTransport()),
        (asynchronous, other.AsyncHTTPTransport()),
        (asynchronous, package.HTTPTransport()),
        (sync, package.HTTPTransport),
        (sync, "http://proxy"),
    ]:
        with pytest.raises(TypeError, match="transport="):
            kind(["http://a"], transport=bad)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_requests_of_the_other_package(package, backend):
    other = httpx if package is httpx2 else httpx2
    sync, asynchronous = (kind(["http://a"], transport=package.MockTransport(None)) for kind in CLASSES[package])
    message = rf"got a request of type {other.__name__}.Request; give it requests of {package.__name__}"
    with pytest.raises(TypeError, match=message):
        sync.handle_request(other.Request("GET", "http://service/"))

    async def main():
        with pytest.raises(TypeError, match=message):
            await asynchronous.handle_async_request(other.Request("GET", "http://service/"))

    run(main, backend=backend)


OTHERS = {httpx: httpx2, httpx2: httpx}


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"replicas": []},
            ValueError,
            r"replicas=\[\] is not allowed; give a list of .*, at least one",
        ),
        ({"replicas": "http://a"}, TypeError, "replicas='http://a' is not allowed; give a list of"),
        ({"replicas": b"http://a"}, TypeError, "replicas=b'http://a'"),
        ({"replicas": 3}, TypeError, "replicas=3"),
        ({"replicas": None}, TypeError, "replicas=None"),
        ({"replicas": [3]}, TypeError, "replicas=3 is not allowed; give absolute http or https URLs"),
        ({"replicas": ["http://a", None]}, TypeError, "replicas=None"),
        ({"replicas": ["a"]}, ValueError, "replicas='a' is not allowed; give absolute http or https URLs"),
        ({"replicas": ["//a"]}, ValueError, "replicas='//a'"),
        ({"replicas": ["/v1"]}, ValueError, "replicas='/v1'"),
        ({"replicas": ["http://"]}, ValueError, "replicas='http://'"),
        ({"replicas": ["ftp://a"]}, ValueError, "replicas='ftp://a'"),
        ({"replicas": ["http://a:b"]}, ValueError, "replicas='http://a:b' .*port"),
        ({"replicas": ["http://a:65536"]}, ValueError, "replicas='http://a:65536' .* a port up to 65535"),
        (
            {"replicas": ["http://a?x=1"]},
            ValueError,
            "replicas='http://a.x=1' .* without a query",
        ),
        ({"replicas": ["http://a?"]}, ValueError, ".* without a query"),
        ({"replicas": ["http://a#x"]}, ValueError, ".* without a query and a fragment"),
        ({"replicas": ["http://me:secret@a"]}, ValueError, ".* without a user"),
        ({"replicas": ["http://a", "http://A:80/"]}, ValueError, "replicas='http://A:80/' .* each replica once"),
        ({"backup": ["http://b", "http://b"]}, ValueError, "backup='http://b' .* each replica once"),
        ({"backup": ["http://a/"]}, ValueError, "backup='http://a/' .* not among the others"),
        ({"backup": "http://b"}, TypeError, "backup='http://b'"),
        ({"backup": ["b"]}, ValueError, "backup='b'"),
        ({"consecutive": 0}, ValueError, "consecutive=0"),
        ({"consecutive": 1.5}, TypeError, "consecutive=1.5"),
        ({"failure_rate": 0}, ValueError, "failure_rate=0"),
        ({"failure_rate": 1.1}, ValueError, "failure_rate=1.1"),
        ({"minimum_calls": 0}, ValueError, "minimum_calls=0"),
        ({"window": 0}, ValueError, "window=0"),
        ({"eject_for": -1}, ValueError, "eject_for=-1"),
        ({"max_eject_for": 0}, ValueError, "max_eject_for=0"),
        ({"max_eject_for": 29}, ValueError, "max_eject_for=29 is not allowed; give at least eject_for=30"),
        ({"max_ejected": 2}, ValueError, "max_ejected=2"),
        ({"max_ejected": -0.1}, ValueError, "max_ejected=-0.1"),
        ({"decay": 0}, ValueError, "decay=0"),
        ({"preserve_host": 1}, TypeError, "preserve_host=1"),
        ({"name": ""}, ValueError, "name=''"),
    ],
    ids=repr,
)
def test_bad_options(package, options, kind, message):
    for colour in CLASSES[package]:
        with pytest.raises(kind, match=f"^{colour.__name__}: {message}") as caught:
            colour(**{"replicas": ["http://a"], "transport": package.MockTransport(None)} | options)
        assert "secret" not in str(caught.value)


def test_a_url_of_the_other_package(package):
    with pytest.raises(TypeError, match="replicas=URL"):
        CLASSES[package][0]([OTHERS[package].URL("http://a")], transport=package.MockTransport(None))


def test_any_collection_of_urls_will_do(package):
    for given_urls in (("http://a",), {"http://a": 1}, iter(["http://a"]), {"http://a"}):
        lb = CLASSES[package][0](given_urls, transport=package.MockTransport(None))
        assert lb.replicas == ("http://a",)


def test_the_repr_and_the_label():
    inner = httpx.MockTransport(None)
    lb = LoadBalancer(["http://a", "http://b/"], backup=["http://c/v1"], transport=inner, eject_for=10)
    start = "LoadBalancer(('http://a', 'http://b'), backup=('http://c/v1',), transport=<"
    assert repr(lb).startswith(start)
    assert repr(lb).endswith(", eject_for=10)")
    assert lb.label == repr(lb)
    assert LoadBalancer(["http://a"], transport=inner, name="api").label == "api"


def test_copies_have_the_same_options_and_a_state_of_their_own(package):
    for kind in CLASSES[package]:
        lb = kind(["http://a"], backup=["http://b"], decay=3, preserve_host=True, max_ejected=0)
        lb._all[0].requests = 7
        for other in (lb.fresh(), copy.copy(lb), copy.deepcopy(lb), pickle.loads(pickle.dumps(lb))):
            assert repr(other) == repr(lb)
            assert other.statistics().replicas["http://a"].requests == 0
            assert other._inner is not lb._inner


def test_statistics(package):
    with sync_world(package, "a", backup="b") as world:
        world.answers["a"] = 500
        for _ in range(5):
            get(world)
        statistics = world.lb.statistics()
        assert list(statistics.replicas) == ["http://a", "http://b"]
        assert dataclasses.asdict(statistics.replicas["http://a"]) == {
            "requests": 5,
            "in_flight": 0,
            "failures": 5,
            "latency": 0.0,
            "healthy": False,
            "ejected": None,
            "backup": False,
        }
        assert statistics.replicas["http://b"].backup
        for frozen, field in ((statistics, "panicking"), (statistics.replicas["http://a"], "requests")):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(frozen, field, 3)


def test_statistics_notice_that_the_time_is_over(package):
    with sync_world(package, "ab") as world, capture_events() as seen:
        world.answers["a"] = 500
        while not world.ejected:
            get(world)
        world.clock.sleep(30)
        assert world.of("a").ejected is None
        assert seen[-1] == events.ReplicaReturned(policy="lb", at=30.0, replica="http://a")


def test_events_are_delivered_outside_of_the_lock(package):
    """A listener may send requests itself."""
    with sync_world(package, "ab") as world:
        world.answers["a"] = 500
        heard = []
        with world.lb.listen(lambda event: heard.append((event.name, get(world).status_code))):
            for _ in range(30):
                get(world)
        assert heard == [("replica.ejected", 200)]


def test_news_that_somebody_else_tells(package):
    with sync_world(package, "a") as world:

        class Emptied(list):
            def popleft(self):
                raise IndexError

        world.lb._news = Emptied([1])
        world.lb._tell()


def test_one_that_was_refused_does_not_disturb_a_fork(package):
    with pytest.raises(ValueError, match="decay=0") as caught:
        CLASSES[package][0](["http://a"], decay=0)
    refused = caught.traceback[1].locals["self"]
    assert isinstance(refused, SyncBalancer)
    refused.after_fork()


@FORKS
def test_a_forked_child_begins_without_requests_under_way(package):
    with sync_world(package, "a") as world:
        world.answers["a"] = stream_class(package)(b"x")
        held, read = get(world), get(world)
        read.close()
        reads, writes = os.pipe()
        world.lb._lock.acquire()  # as if another thread were choosing
        child = os.fork()
        if not child:
            signal.alarm(20)
            try:
                before = world.in_flight
                held.close()
                after_close = world.in_flight
                new = get(world)
                os.write(writes, repr((before, after_close, world.in_flight, new.status_code)).encode())
            finally:
                os._exit(0)
        world.lb._lock.release()
        os.close(writes)
        with os.fdopen(reads) as pipe:
            assert pipe.read() == "([0], [0], [1], 200)"
        assert os.waitpid(child, 0)[1] == 0
        assert world.in_flight == [1]


# -- everything comes back ------------------------------------------------------------------------------------


ENDS = st.sampled_from([200, 429, 500, "ConnectError", "PoolTimeout", "body", "broken", "lost", "held"])


@given(ends=st.lists(st.tuples(ENDS, st.sampled_from([0.0, 0.1, 40.0]), st.booleans()), max_size=60))
def test_nothing_stays_under_way(ends):
    """Whatever happens to the requests, their number comes back to 0, and no more than half is ejected."""
    package = httpx
    with sync_world(package, "abcd", backup="x", consecutive=2) as world:
        stream, held, requests = stream_class(package), [], 0
        tried = []
        for end, wait, retries in ends:
            world.clock.sleep(wait)
            tried = tried if retries else []
            requests += 1
            world.answers = dict.fromkeys("abcdx", 200)
            if isinstance(end, int):
                world.answers = dict.fromkeys("abcdx", end)
            elif hasattr(package, end):
                world.answers = dict.fromkeys("abcdx", getattr(package, end)("x"))
            else:
                error = package.ReadError("x") if end == "broken" else None
                world.respond = lambda _, error=error: package.Response(200, stream=stream(b"x", error=error))
            answer = get(world, tried)
            world.__dict__.pop("respond", None)
            if end == "held":
                held.append(answer)
            elif end in ("body", "broken"):
                with pytest.raises(package.ReadError) if end == "broken" else contextmanager(lambda: (yield))():
                    answer.read()
            del answer
            assert len(world.ejected.replace("x", "")) <= 2
            assert sum(world.in_flight) == len(held)
        for response in held:
            response.close()
        statistics = world.lb.statistics().replicas.values()
        assert sum(each.requests for each in statistics) == requests
        assert [each.in_flight for each in statistics] == [0] * 5


# -- real sockets ---------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # else headers and body are two packets, 40 ms apart

    def do_GET(self):
        self.server.hosts.append(self.headers["Host"])
        body = f"{self.server.server_port} {self.path}".encode()
        self.send_response(503 if self.server.broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def servers(count):
    """Real servers in threads of their own."""
    made = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(count)]
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}) for server in made]
    for server, thread in zip(made, threads, strict=True):
        server.hosts, server.broken, server.daemon_threads = [], False, True
        thread.start()
    try:
        yield made
    finally:
        for server, thread in zip(made, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def test_many_threads_and_real_servers(package):
    with servers(3) as made:
        made[2].broken = True
        ports = [server.server_port for server in made]
        urls = [f"http://127.0.0.1:{port}/v1" for port in ports]
        lb = CLASSES[package][0](urls, eject_for=3600, max_eject_for=3600, decay=0.001)
        statuses, gate = [], threading.Barrier(8)

        def work(client, seed):
            choose = random.Random(seed)
            gate.wait(20)
            for _ in range(30):
                if choose.random() < 0.5:
                    response = client.get("http://service/path")
                    port, path = response.text.split()
                    assert int(port) in ports
                    assert path == "/v1/path"
                else:
                    with client.stream("GET", "http://service/path") as response:
                        pass
                statuses.append(response.status_code)

        with package.Client(transport=lb, trust_env=False, timeout=60) as client:
            threads = [threading.Thread(target=work, args=(client, seed)) for seed in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        assert len(statuses) == 240
        replicas = lb.statistics().replicas
        assert sum(each.requests for each in replicas.values()) == 240
        assert [each.in_flight for each in replicas.values()] == [0, 0, 0]
        assert replicas[urls[2]].ejected is not None
        assert replicas[urls[2]].failures == replicas[urls[2]].requests == statuses.count(503) < 60
        assert all(set(server.hosts) == {f"127.0.0.1:{server.server_port}"} for server in made)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_many_tasks_and_real_servers(package, backend):
    with servers(2) as made:
        urls = [f"http://127.0.0.1:{server.server_port}" for server in made]
        lb = CLASSES[package][1](urls)

        async def work(client):
            for _ in range(5):
                response = await client.get("http://service/path")
                assert response.status_code == 200
                with anyio.move_on_after(0):
                    await client.get("http://service/path")

        async def main():
            async with (
                package.AsyncClient(transport=lb, trust_env=False, timeout=60) as client,
                anyio.create_task_group() as group,
            ):
                for _ in range(6):
                    group.start_soon(work, client)

        anyio.run(main, backend=backend)
        replicas = lb.statistics().replicas
        assert [each.in_flight for each in replicas.values()] == [0, 0]
        assert all(each.requests > 0 and each.failures == 0 for each in replicas.values())


def test_a_server_that_is_gone(package):
    with servers(2) as made:
        urls = [f"http://127.0.0.1:{server.server_port}" for server in made]
        made[0].shutdown()
        made[0].server_close()
        lb = CLASSES[package][0](urls, eject_for=3600, max_eject_for=3600, decay=0.001)
        with package.Client(transport=lb, trust_env=False, timeout=60) as client:
            for _ in range(40):
                try:
                    client.get("http://service/")
                except package.ConnectError:
                    pass
        assert lb.statistics().replicas[urls[0]].requests == lb.statistics().replicas[urls[0]].failures == 5
        assert lb.statistics().replicas[urls[1]].requests == 35
