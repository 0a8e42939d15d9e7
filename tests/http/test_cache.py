"""`Cache` on the transport of a client: what is kept, what is served, and what the caller sees of it.

The tests of requests that run at the same time are in `test_cache_flights.py`. C1 to C36 and A16 to A28 are the
traps that a test looks into.
"""

import gc
import gzip
from email.utils import formatdate
from types import SimpleNamespace

import pytest

import resilient.http.cache
from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Keyed,
    Pipeline,
    Retry,
    TimedOut,
    Timeout,
    deadline,
    runtime,
)
from resilient.errors import FailedResponse
from resilient.http import cache_store
from resilient.http.cache import HttpCache
from resilient.http.cache_flights import APART_SECONDS
from resilient.policies.cache import CacheStatistics
from resilient.testing import capture_events, run, virtual_time

from .flaky_server import FlakyServer, ok, status, truncated
from .web import URL, Origin, Web, reply, served, zipped

WALL = 1_800_000_000.0  # what the wall clock shows when virtual time begins
OTHER = "https://example.com/b"


class Wall:
    """A wall clock that can be set."""

    def __init__(self):
        self.offset = WALL

    def time(self):
        return self.offset + runtime.now()

    def date(self, seconds=0.0):
        return formatdate(self.time() + seconds, usegmt=True)


@pytest.fixture(autouse=True)
def wall(monkeypatch):
    wall = Wall()
    monkeypatch.setattr(resilient.http.cache, "time", SimpleNamespace(time=wall.time))
    return wall


def counts(cache):
    statistics = cache.statistics()
    return statistics.hits, statistics.misses, statistics.shared, statistics.stale


def ages(kit, pipeline, *steps, at, **options):
    """Ask for the same URL at these times; return status, text and what the cache says, and the origin."""

    async def scenario():
        origin = Origin(*(step(kit) if getattr(step, "__name__", "") == "<lambda>" else step for step in steps))
        web = Web(kit, pipeline, origin)
        seen = []
        for moment in at:
            await kit.sleep(moment - runtime.now())
            try:
                response = await web.get(**options)
            except Exception as error:
                seen.append(type(error).__name__)
            else:
                seen.append((response.status_code, response.text, served(response)))
        assert origin.open == 0, "a body was left open"
        return seen, origin

    return kit.run(scenario)


# -- served on errors ---------------------------------------------------------------------------------------------


def errors_of(http):
    return [
        http.ConnectError("refused"),
        http.ConnectTimeout("slow"),
        http.ReadTimeout("slow"),
        http.ReadError("reset"),
        http.RemoteProtocolError("what?"),
        http.PoolTimeout("full"),
        TimeoutError(),
        ConnectionResetError(),
    ]


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_c1_an_old_answer_stands_in_for_a_failing_status(kit, status):
    fields = {"cache_control": "max-age=10, stale-if-error=20"}
    old = reply(200, b"o", b"ld", **fields)
    seen, origin = ages(kit, Cache(0), old, reply(status, b"broken"), at=(0, 9.5, 10, 29.5, 30))
    assert seen == [
        (200, "old", None),
        (200, "old", "hit"),
        (200, "old", "stale-if-error"),
        (200, "old", "stale-if-error"),
        (status, "broken", None),
    ]
    assert origin.asked == 4


@pytest.mark.parametrize("number", range(8))
def test_c1_an_old_answer_stands_in_for_a_connection_that_fails(sync_kit, number):
    old = reply(200, b"old", cache_control="max-age=10, stale-if-error=20")
    error = errors_of(sync_kit.http)[number]
    seen, _ = ages(sync_kit, Cache(0), old, error, at=(0, 29.5, 30))
    assert seen == [(200, "old", None), (200, "old", "stale-if-error"), type(error).__name__]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 410, 422, 425, 429, 501, 505])
def test_c1_other_statuses_are_answers(sync_kit, status):
    old = reply(200, b"old", cache_control="max-age=10, stale-if-error=1000")
    seen, _ = ages(sync_kit, Cache(0), old, reply(status, b"no"), at=(0, 20))
    assert seen[1] == (status, "no", None)


def test_c1_the_window_of_the_user_is_for_answers_without_one(sync_kit):
    seen, _ = ages(sync_kit, Cache(10, stale=20), reply(200, b"old"), reply(503), at=(0, 29.9, 30))
    assert [each[0] for each in seen] == [200, 200, 503]
    told = reply(200, b"old", cache_control="max-age=1, stale-if-error=5")
    seen, _ = ages(sync_kit, Cache(10, stale=20), told, reply(503), at=(0, 5.9, 6))
    assert [each[0] for each in seen] == [200, 200, 503]


def test_c1_what_is_wrong_on_our_side_is_not_hidden(sync_kit):
    async def scenario():
        mistakes = [sync_kit.http.UnsupportedProtocol("x"), sync_kit.http.LocalProtocolError("x"), KeyError("bug")]
        web = Web(sync_kit, Cache(1, stale=1000), Origin(reply(200, b"old"), *mistakes))
        await web.get()
        await sync_kit.sleep(2)
        for mistake in mistakes:
            with pytest.raises(type(mistake)):
                await web.get()

    sync_kit.run(scenario)


def is_response(error):
    return isinstance(error, FailedResponse)


@pytest.mark.parametrize(
    ("on", "outcomes"),
    [
        (lambda http: (503,), {"503": True, "500": False, "429": False, "refused": False}),
        (lambda http: {429, OSError}, {"503": False, "429": True, "refused": False, "reset": True}),
        (lambda http: http.TransportError, {"503": False, "refused": True}),
        (lambda http: FailedResponse, {"503": True, "429": False, "refused": False}),
        (lambda http: is_response, {"503": True, "429": True, "refused": False}),
        (lambda http: (Exception, 404), {"404": True, "500": True, "429": False, "bug": True, "refused": True}),
        (lambda http: lambda error: True, {"bug": True, "429": True, "404": False}),
    ],
)
def test_on_says_for_which_errors(sync_kit, on, outcomes):
    failures = {
        "refused": sync_kit.http.ConnectError("x"),
        "reset": ConnectionResetError(),
        "bug": KeyError("bug"),
    }
    for name, expected in outcomes.items():
        step = failures[name] if name in failures else reply(int(name))
        cache = Cache(1, stale=1000, on=on(sync_kit.http))
        seen, _ = ages(sync_kit, cache, reply(200, b"old"), step, at=(0, 2))
        assert (seen[1] == (200, "old", "stale-if-error")) == expected, name


@pytest.mark.parametrize(
    "forbids", ["must-revalidate", "no-cache", "max-age=1, must-revalidate, stale-if-error=1000"]
)
def test_c2_what_must_be_asked_for_is_never_served_old(sync_kit, forbids):
    old = reply(200, b"old", cache_control=forbids)
    cache = Cache(1, stale=1000, refresh=1000)
    seen, _ = ages(sync_kit, cache, old, reply(503), sync_kit.http.ConnectError("x"), at=(0, 2, 3))
    assert seen[1:] == [(503, "", None), "ConnectError"]


def test_c2_of_a_shared_cache_only(sync_kit):
    old = reply(200, b"old", cache_control="max-age=1, s-maxage=1, proxy-revalidate")
    seen, _ = ages(sync_kit, Cache(1, stale=1000), old, reply(503), at=(0, 2))
    assert seen[1] == (200, "old", "stale-if-error")


@pytest.mark.parametrize(
    ("demand", "at_5", "at_15"),
    [
        ("stale-if-error=3", "hit", None),
        ("stale-if-error=6", "hit", "stale-if-error"),
        ("max-age=3", None, None),
        ("max-age=3, stale-if-error=60", "stale-if-error", "stale-if-error"),
        ("max-age=0", None, None),
        ("min-fresh=6", None, None),
        ("min-fresh=4", "hit", None),
        ("max-stale=6", "hit", "hit"),
        ("max-stale=4", "hit", None),
        ("max-stale", "hit", "hit"),
        ("no-cache", None, None),
        ("no-store", None, None),
        ("only-if-cached", "hit", "only-if-cached"),
    ],
)
def test_c3_what_a_request_demands_is_kept(sync_kit, demand, at_5, at_15):
    for moment, expected in ((5, at_5), (15, at_15)):

        async def scenario(moment=moment, expected=expected):
            old = reply(200, b"old", cache_control="max-age=10, stale-if-error=1000")
            origin = Origin(old, reply(503))
            web = Web(sync_kit, Cache(0), origin)
            await web.get()
            await sync_kit.sleep(moment)
            response = await web.get(headers={"Cache-Control": demand})
            assert served(response) == expected
            assert response.status_code == (504 if expected == "only-if-cached" else 200 if expected else 503)
            assert origin.asked == (1 if expected in {"hit", "only-if-cached"} else 2)

        sync_kit.run(scenario)


def test_c3_pragma_stands_in_for_cache_control(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"1", cache_control="max-age=10"), reply(200, b"2"))
        web = Web(sync_kit, Cache(0), origin)
        await web.get()
        assert (await web.get(headers={"Pragma": "no-cache"})).text == "2"

    sync_kit.run(scenario)


def test_c3_only_if_cached_without_an_answer_is_504(sync_kit):
    async def scenario():
        origin = Origin(reply(200))
        web = Web(sync_kit, Cache(0, stale=60), origin)
        response = await web.get(headers={"Cache-Control": "only-if-cached"})
        assert (response.status_code, response.content, origin.asked) == (504, b"", 0)
        assert response.headers["Cache-Status"] == "resilient; detail=only-if-cached"
        assert counts_of(web) == (0, 0, 0, 0)

    def counts_of(web):
        return counts(web.transport.pipeline)

    sync_kit.run(scenario)


def test_no_store_in_a_request_neither_answers_nor_stores(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"1", cache_control="max-age=99"), reply(200, b"2", cache_control="max-age=99"))
        web = Web(sync_kit, Cache(0), origin)
        texts = [
            (await web.get(headers=headers)).text
            for headers in ({"Cache-Control": "no-store"}, {}, {"Cache-Control": "no-store"}, {})
        ]
        assert texts == ["1", "2", "2", "2"]
        assert origin.asked == 3

    sync_kit.run(scenario)


def test_a_request_for_something_newer_is_stored(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"1", cache_control="max-age=99"), reply(200, b"2", cache_control="max-age=99"))
        web = Web(sync_kit, Cache(0), origin)
        texts = [(await web.get(headers=headers)).text for headers in ({}, {"Cache-Control": "no-cache"}, {})]
        assert texts == ["1", "2", "2"]

    sync_kit.run(scenario)


def test_the_time_of_the_whole_call_may_be_over(kit):
    async def scenario():
        origin = Origin(reply(200, b"old"), reply(200, wait=100))
        web = Web(kit, Pipeline(Cache(1, stale=1000), Timeout(3)), origin)
        await web.get()
        await kit.sleep(2)
        response = await web.get()
        assert (response.text, served(response), runtime.now()) == (
            "old",
            "stale-if-error",
            5 if not kit.sync else 102,
        )

    kit.run(scenario)


def test_an_old_answer_stands_in_for_a_refusal(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=1, open_for=60)
        origin = Origin(reply(200, b"old"), reply(503, b"broken"))
        web = Web(kit, Pipeline(Cache(1, stale=1000), breaker), origin)
        texts = []
        for _ in range(4):
            texts.append((await web.get()).text)
            await kit.sleep(2)
        assert texts == ["old"] * 4
        assert origin.asked == 2
        response = await web.get()
        assert response.headers["Cache-Status"] == "resilient; fwd=stale; ttl=-7; detail=stale-if-error"
        with pytest.raises(CircuitOpen):
            await web.get(OTHER)

    kit.run(scenario)


def test_c28_for_the_policies_further_in_it_was_a_failure(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=4, open_for=60, name="breaker")
        guard = Cache(1, stale=1000) | Retry(2, wait=1) | breaker
        origin = Origin(reply(200, b"old"), reply(503, b"broken"))
        web = Web(kit, guard, origin)
        await web.get()
        await kit.sleep(2)
        with capture_events(guard) as seen:
            for expected in (3, 5, 5):
                response = await web.get()
                assert (response.text, served(response)) == ("old", "stale-if-error")
                assert origin.asked == expected
        opened, stale = "circuit.opened", "cache.stale_served"
        names = [event.name for event in seen if event.name in {opened, stale}]
        assert names == [stale, opened, stale, stale]
        assert origin.open == 0

    kit.run(scenario)


def test_a16_the_failing_response_is_closed(kit):
    async def scenario():
        origin = Origin(reply(200, b"old"), reply(503, b"x" * 100_000))
        web = Web(kit, Pipeline(Cache(1, stale=1000), Bulkhead(1)), origin)
        await web.get()
        for _ in range(3):
            await kit.sleep(2)
            assert (await web.get(stream=True)).status_code == 200
            assert origin.open == 0

    kit.run(scenario)


def test_a19_a_failing_response_that_nothing_stands_in_for_is_open_and_unread(kit):
    async def scenario():
        origin = Origin(reply(503, b"bro", b"ken"))
        response = await Web(kit, Cache(1, stale=1000), origin).get(stream=True)
        assert (origin.open, origin.started) == (1, 0)
        assert await kit.read(response) == b"broken"
        assert origin.open == 0

    kit.run(scenario)


def test_events_tell_age_and_reason(kit):
    async def scenario():
        cache = Cache(10, stale=60, refresh=5, name="answers")
        web = Web(kit, cache, Origin(reply(200, b"old"), reply(503)))
        await web.get()
        with capture_events(cache) as seen:
            await kit.sleep(12)
            await web.get()
            await kit.sleep(8)
            await web.get()
        return seen

    told = kit.run(scenario)
    stale = [event for event in told if event.name == "cache.stale_served"]
    assert [(event.age, event.reason) for event in stale] == [(12.0, "refresh"), (20.0, "error")]
    failed = [event for event in told if event.name == "cache.refresh_failed"]
    assert [event.error for event in failed] == ["FailedResponse"]
    assert {event.policy for event in told} == {"answers"}


# -- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (200, {"cache_control": "no-store"}),
        (200, {"cache_control": "max-age=10, no-store"}),
        (200, {"cache_control": "max-age=10; no-store"}),
        (206, {"cache_control": "max-age=10", "content_range": "bytes 0-1/2"}),
        (304, {"cache_control": "max-age=10"}),
        (299, {}),
        (302, {}),
        (599, {"cache_control": "max-age=10"}),
        (500, {"cache_control": "max-age=10"}),
        (501, {"cache_control": "max-age=10"}),
        (418, {"cache_control": "max-age=10, must-understand, no-store"}),
        (200, {"vary": "*", "cache_control": "max-age=10"}),
        (200, {"vary": "Accept, *", "cache_control": "max-age=10"}),
        (200, {"cache_control": "max-age=0"}),
        (200, {"content_type": "text/event-stream", "cache_control": "max-age=10"}),
    ],
)
def test_c6_what_must_not_be_kept(sync_kit, status, fields):
    async def scenario():
        cache = Cache(60 if fields != {"cache_control": "max-age=0"} else 0)
        origin = Origin(reply(status, b"x", **fields))
        web = Web(sync_kit, cache, origin)
        for _ in range(3):
            response = await web.get()
            assert (response.status_code, served(response)) == (status, None)
        assert (origin.asked, cache.statistics().entries) == (3, 0)

    sync_kit.run(scenario)


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (200, {"cache_control": "max-age=10"}),
        (200, {"cache_control": "private, max-age=10"}),
        (200, {"cache_control": "max-age=10, must-understand, no-store"}),
        (203, {}),
        (204, {}),
        (301, {}),
        (308, {}),
        (302, {"cache_control": "max-age=10"}),
        (404, {"cache_control": "max-age=10"}),
        (410, {"cache_control": "max-age=10"}),
        (418, {"cache_control": "max-age=10"}),
    ],
)
def test_c6_what_may_be_kept(sync_kit, status, fields):
    for memory in (False, True):
        step = reply(status, b"" if status == 204 else b"x", memory=memory, **fields)
        seen, origin = ages(sync_kit, Cache(10), step, at=(0, 9, 10))
        text = "" if status == 204 else "x"
        assert seen == [(status, text, None), (status, text, "hit"), (status, text, None)]
        assert origin.asked == 2


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "QUERY"])
def test_c14_only_get_is_kept(sync_kit, method):
    async def scenario():
        origin = Origin(reply(200, b"x", cache_control="max-age=10"))
        web = Web(sync_kit, Cache(10), origin)
        for _ in range(2):
            await web.request(method, content=b"body" if method in {"POST", "QUERY"} else None)
        assert origin.asked == 2
        assert served(await web.get()) is None

    sync_kit.run(scenario)


def test_c14_a_get_with_a_body_has_no_key(kit):
    async def scenario():
        origin = Origin(reply(200, b"x", cache_control="max-age=10"))
        web = Web(kit, Cache(10), origin)
        for content in (b"one", b"two", iter([b"three"])) if kit.sync else (b"one", b"two"):
            await web.request("GET", content=content)
        await web.get()
        assert (origin.asked, web.transport.pipeline.statistics().entries) == (len(origin.requests), 1)
        assert origin.asked == (4 if kit.sync else 3)

    kit.run(scenario)


@pytest.mark.parametrize("status", [400, 404, 405, 410, 414, 451])
def test_c29_errors_are_kept_only_if_the_origin_says_so(sync_kit, status):
    async def scenario():
        origin = Origin(reply(200, b"good"), reply(status, b"error"), reply(503, b"broken"))
        web = Web(sync_kit, Cache(10, stale=1000, refresh=1000), origin)
        await web.get()
        await sync_kit.sleep(10_000)
        assert (await web.get()).status_code == status
        # Neither the error nor what it has replaced: the origin does not stand by that any more.
        assert (await web.get()).status_code == 503

    sync_kit.run(scenario)


def test_what_the_origin_takes_back_is_forgotten(sync_kit):
    async def scenario():
        fresh = reply(200, b"old", cache_control="max-age=10, stale-if-error=1000")
        origin = Origin(fresh, reply(200, b"secret", cache_control="no-store"), reply(503))
        web = Web(sync_kit, Cache(0), origin)
        await web.get()
        await sync_kit.sleep(20)
        assert (await web.get()).text == "secret"
        assert (await web.get()).status_code == 503

    sync_kit.run(scenario)


def test_c18_without_a_word_from_the_origin(sync_kit):
    seen, origin = ages(
        sync_kit, Cache(0, stale=60), reply(200, b"1"), reply(200, b"2"), reply(503), at=(0, 1, 2, 60.9, 61)
    )
    assert seen == [
        (200, "1", None),
        (200, "2", None),
        (200, "2", "stale-if-error"),
        (200, "2", "stale-if-error"),
        (503, "", None),
    ]
    old = {"last_modified": formatdate(0, usegmt=True)}
    seen, origin = ages(sync_kit, Cache(0, stale=60), reply(200, b"1", **old), at=(0, 1))
    assert origin.asked == 2, "no freshness is made up from Last-Modified"


def test_c16_age_counts_caches_on_the_way_and_the_time_it_took(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"x", cache_control="max-age=100", age="40", wait=7), reply(200))
        web = Web(sync_kit, Cache(0), origin)
        await web.get()
        await sync_kit.sleep(52.5)
        response = await web.get()
        assert response.headers.get_list("Age") == ["99"]
        assert response.headers["Cache-Status"] == "resilient; hit; ttl=0"
        await sync_kit.sleep(0.5)
        assert served(await web.get()) is None

    sync_kit.run(scenario)


def test_c16_retries_count_as_the_time_it_took(kit):
    async def scenario():
        origin = Origin(reply(503), reply(200, b"x", cache_control="max-age=100"))
        web = Web(kit, Pipeline(Cache(0), Retry(wait=30)), origin)
        await web.get()
        assert (await web.get()).headers["Age"] == "30"

    kit.run(scenario)


def test_c16_what_is_old_when_it_comes_is_not_fresh(sync_kit):
    old = reply(200, b"x", cache_control="max-age=100, stale-if-error=10", age="105")
    seen, _ = ages(sync_kit, Cache(0), old, reply(503), at=(0, 4.9, 5))
    assert [each[0] for each in seen] == [200, 200, 503]


def test_c17_dates(sync_kit, wall):
    async def scenario():
        for make, fresh in [
            (lambda: {"expires": "0"}, 0),
            (lambda: {"expires": "-1"}, 0),
            (lambda: {"expires": wall.date(30)}, 30),
            (lambda: {"expires": wall.date(-3000), "date": wall.date(-3030)}, 30),
            (lambda: {"expires": wall.date(30), "cache_control": "max-age=20"}, 20),
            (lambda: {"expires": wall.date(30), "cache_control": "s-maxage=20"}, 30),
            (lambda: {"cache_control": "max-age=20, max-age=10"}, 10),
            (lambda: {"cache_control": "max-age=soon"}, 0),
        ]:
            web = Web(sync_kit, Cache(5), Origin(reply(200, b"x", **make())))
            await web.get()
            if fresh:
                await sync_kit.sleep(fresh - 0.5)
                assert served(await web.get()) == "hit", make()
                await sync_kit.sleep(0.5)
            assert served(await web.get()) is None, make()

        web = Web(sync_kit, Cache(5), Origin(reply(200, b"x", cache_control="max-age=99999999999999999999")))
        await web.get()
        assert (await web.get()).headers["Cache-Status"] == f"resilient; hit; ttl={2**31}"

    sync_kit.run(scenario)


@pytest.mark.parametrize("step", [-100_000.0, 100_000.0])
def test_c33_the_wall_clock_may_be_set(sync_kit, wall, step):
    async def scenario():
        web = Web(sync_kit, Cache(0), Origin(reply(200, b"x", expires=wall.date(60), date=wall.date())))
        await web.get()
        wall.offset += step
        await sync_kit.sleep(59)
        assert served(await web.get()) == "hit"
        await sync_kit.sleep(1)
        assert served(await web.get()) is None

    sync_kit.run(scenario)


# -- for whom -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Authorization", "Cookie", "X-Api-Key", "X-Auth-Token", "Private-Token"])
def test_c8_nobody_gets_what_another_one_has_asked_for(sync_kit, name):
    async def scenario():
        answers = {None: b"public", "Lovelace": b"of ada", "bob": b"of bob"}
        origin = Origin(
            lambda request: reply(200, answers[request.headers.get(name)], cache_control="public, max-age=9")
        )
        web = Web(sync_kit, Cache(0), origin)
        for _ in range(2):
            for who, text in answers.items():
                response = await web.get(headers={name: who} if who else {})
                assert response.content == text
        assert (origin.asked, web.transport.pipeline.statistics().entries) == (3, 3)
        assert b"Lovelace" not in repr(vars(next(iter(web.transport.pipeline._on_edges.values())))).encode()

    sync_kit.run(scenario)


def test_c8_old_answers_are_not_for_others_either(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"of ada", cache_control="public, max-age=1, stale-if-error=99"), reply(503))
        web = Web(sync_kit, Cache(0), origin)
        await web.get(headers={"Authorization": "ada"})
        await sync_kit.sleep(2)
        assert (await web.get(headers={"Authorization": "bob"})).status_code == 503
        assert (await web.get()).status_code == 503
        assert (await web.get(headers={"Authorization": "ada"})).text == "of ada"

    sync_kit.run(scenario)


def test_c8_credentials_that_are_added_further_in(kit):
    """Who asks is then nothing that the cache could know beforehand, so nothing is kept."""

    class Signs:
        def __init__(self, inner):
            self.inner = inner

        def handle_request(self, request):
            request.headers["Authorization"] = "ada"
            return self.inner.handle_request(request)

        async def handle_async_request(self, request):
            request.headers["Authorization"] = "ada"
            return await self.inner.handle_async_request(request)

        def close(self):
            self.inner.close()

        async def aclose(self):
            await self.inner.aclose()

    async def scenario():
        for cache, asked in ((Cache(60), 2), (Cache(60, key=lambda request: "told"), 1)):
            origin = Origin(reply(200, b"of ada"))
            web = Web(kit, cache, origin, around=Signs)
            for _ in range(2):
                await web.get()
            assert origin.asked == asked

    kit.run(scenario)


def test_key_tells_what_answers_are_shared_by(sync_kit):
    async def scenario():
        cache = Cache(60, key=lambda request: request.url.path)
        origin = Origin(lambda request: reply(200, str(request.url).encode(), vary="Accept"))
        web = Web(sync_kit, cache, origin)
        await web.get("https://one.example/a?x", headers={"Authorization": "ada"})
        response = await web.get("https://two.example/a", headers={"Authorization": "bob"})
        assert (response.text, served(response)) == ("https://one.example/a?x", "hit")
        assert served(await web.get("https://two.example/a", headers={"Accept": "text/html"})) is None
        assert served(await web.get("https://two.example/b")) is None
        assert cache.statistics().entries == 3

    sync_kit.run(scenario)


def test_a_key_has_to_be_hashable(sync_kit):
    async def scenario():
        web = Web(sync_kit, Cache(60, key=lambda request: [request.url.path], name="answers"), Origin(reply(200)))
        with pytest.raises(TypeError, match=r"answers: what key= returned is not hashable"):
            await web.get()

    sync_kit.run(scenario)


def test_c9_cookies_are_set_once(sync_kit):
    async def scenario():
        raw = ((b"Set-Cookie", b"a=1"), (b"X-Other", b"1"), (b"set-cookie", b"b=2"), (b"X-Other", b"2"))
        web = Web(sync_kit, Cache(60), Origin(reply(200, b"x", raw=raw)))
        first = await web.get()
        assert first.headers.get_list("Set-Cookie") == ["a=1", "b=2"]
        web.client.cookies.clear()
        second = await web.get()
        assert served(second) == "hit"
        assert "Set-Cookie" not in second.headers
        assert second.headers.get_list("X-Other") == ["1", "2"]
        assert not web.client.cookies

    sync_kit.run(scenario)


def test_c10_answers_in_several_variants(sync_kit):
    async def scenario():
        def answer(request):
            language = request.headers.get("Accept-Language", "none")
            return reply(200, language.encode(), vary="Accept-Language", cache_control="max-age=60")

        origin = Origin(answer)
        web = Web(sync_kit, Cache(0), origin)
        for _ in range(2):
            for sent in ("en", "de", "en, de", "", None):
                response = await web.get(headers=None if sent is None else {"Accept-Language": sent})
                assert response.text == ("none" if sent is None else sent)
        assert (origin.asked, web.transport.pipeline.statistics().entries) == (5, 5)
        for same in ("en,de", " en ,  de"):
            assert served(await web.get(headers={"Accept-Language": same})) == "hit"
        lines = [("Accept-Language", "en"), ("accept-language", "de")]
        assert served(await web.get(headers=lines)) == "hit"

    sync_kit.run(scenario)


def test_c10_an_answer_without_vary_next_to_ones_with_it(sync_kit):
    async def scenario():
        fields = {"cache_control": "max-age=60"}
        origin = Origin(
            reply(200, b"de", vary="Accept-Language", **fields),
            reply(200, b"any", **fields),
            reply(200, b"new", **fields),
        )
        web = Web(sync_kit, Cache(0), origin)
        german = {"Accept-Language": "de"}
        assert (await web.get(headers=german)).text == "de"
        assert (await web.get(headers={"Accept-Language": "en"})).text == "any"
        assert (await web.get(headers={"Accept-Language": "fr"})).text == "any"
        assert (await web.get(headers=german)).text == "any", "of all that fit, the latest"
        assert origin.asked == 2

    sync_kit.run(scenario)


def test_c10_several_vary(sync_kit):
    async def scenario():
        def answer(request):
            vary = "Accept" if "Accept-Language" in request.headers else "Accept-Language, accept"
            return reply(200, b"x", vary=vary, cache_control="max-age=60")

        origin = Origin(answer)
        web = Web(sync_kit, Cache(0), origin)
        for _ in range(2):
            await web.get(headers={"Accept": "a"})
            await web.get(headers={"Accept": "b", "Accept-Language": "en"})
        assert origin.asked == 2

    sync_kit.run(scenario)


def test_c11_vary_is_about_the_request_as_it_was_sent(kit):
    class Adds:
        languages = iter(["en", "de", "de"])

        def __init__(self, inner):
            self.inner = inner

        def handle_request(self, request):
            request.headers["Accept-Language"] = next(self.languages)
            return self.inner.handle_request(request)

        async def handle_async_request(self, request):
            request.headers["Accept-Language"] = next(self.languages)
            return await self.inner.handle_async_request(request)

    async def scenario():
        Adds.languages = iter(["en", "de", "de"])
        origin = Origin(
            lambda request: reply(
                200, request.headers["Accept-Language"].encode(), vary="Accept-Language", age="0"
            )
        )
        web = Web(kit, Cache(60), origin, around=Adds)
        assert (await web.get()).text == "en"
        assert (await web.get()).text == "de", "the request did not say en by itself"
        assert (await web.get(headers={"Accept-Language": "en"})).text == "en"
        assert origin.asked == 2

    kit.run(scenario)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("https://example.com/a", "https://example.com/a#part", True),
        ("https://example.com", "https://example.com/", True),
        ("https://example.com/a", "https://EXAMPLE.com:443/a", True),
        ("https://example.com/a", "https://user:password@example.com/a", False),
        ("https://example.com/a", "http://example.com/a", False),
        ("https://example.com/a", "https://example.com:444/a", False),
        ("https://example.com/a", "https://example.com/A", False),
        ("https://example.com/a", "https://example.com/a?", False),
        ("https://example.com/a?x=1&y=2", "https://example.com/a?y=2&x=1", False),
    ],
)
def test_c12_which_urls_are_the_same(sync_kit, one, other, same):
    async def scenario():
        web = Web(sync_kit, Cache(60), Origin(reply(200, b"x")))
        await web.get(one)
        assert (served(await web.get(other)) == "hit") == same

    sync_kit.run(scenario)


def test_c12_head_is_answered_by_get_and_not_the_other_way_round(kit):
    async def scenario():
        fields = {
            "cache_control": "max-age=10, stale-while-revalidate=20, stale-if-error=100",
            "content_length": "4",
        }
        origin = Origin(reply(200, **fields), reply(200, b"body", **fields), reply(200, **fields), reply(503))
        web = Web(kit, Cache(0), origin)
        assert served(await web.request("HEAD")) is None
        assert served(await web.get()) is None
        response = await web.request("HEAD")
        assert (served(response), response.content, response.headers["Content-Length"]) == ("hit", b"", "4")
        await kit.sleep(15)
        assert served(await web.request("HEAD")) is None, (
            "it cannot renew an answer, so it does not get an old one"
        )
        response = await web.request("HEAD")
        assert (served(response), response.content) == ("stale-if-error", b"")
        assert [seen.method for seen in origin.requests] == ["HEAD", "GET", "HEAD", "HEAD"]

    kit.run(scenario)


def test_c12_a_head_that_fails_or_is_gone_changes_nothing(sync_kit):
    async def scenario():
        origin = Origin(reply(200, b"old", cache_control="max-age=1, stale-if-error=99"), reply(404), reply(503))
        web = Web(sync_kit, Cache(0), origin)
        await web.get()
        await sync_kit.sleep(2)
        assert (await web.request("HEAD")).status_code == 404
        assert (await web.get()).text == "old"

    sync_kit.run(scenario)


@pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Http-Method-Override", "X-Original-Url"])
def test_c13_fields_that_the_key_does_not_know_have_no_meaning(sync_kit, name):
    async def scenario():
        origin = Origin(reply(200, b"x"))
        web = Web(sync_kit, Cache(60), origin)
        await web.request("POST", headers={name: "GET"})
        assert served(await web.get(headers={name: "evil"})) is None
        assert served(await web.get()) == "hit"

    sync_kit.run(scenario)


# -- writes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "status", "forgets"),
    [
        ("POST", 200, True),
        ("PUT", 204, True),
        ("PATCH", 200, True),
        ("DELETE", 303, True),
        ("UNKNOWN", 200, True),
        ("POST", 409, False),
        ("POST", 503, False),
        ("OPTIONS", 200, False),
        ("QUERY", 200, False),
        ("GET", 200, False),
    ],
)
def test_c15_a_write_makes_answers_obsolete(sync_kit, method, status, forgets):
    async def scenario():
        def answer(request):
            if request.method == method and request.headers.get("Range") is None and method == "GET":
                return reply(200, b"x", vary="Accept")
            return reply(200, b"x", vary="Accept") if request.method == "GET" else reply(status)

        web = Web(sync_kit, Cache(60), Origin(answer))
        variants = [{"Accept": "a"}, {"Accept": "b"}, {"Accept": "a", "Authorization": "ada"}]
        for headers in variants:
            await web.get(headers=headers)
            await web.get(OTHER, headers=headers)
        await web.request(method, headers={"Range": "bytes=0-1"} if method == "GET" else {"Authorization": "bob"})
        for headers in variants:
            assert served(await web.get(OTHER, headers=headers)) == "hit"
            assert served(await web.get(headers=headers)) == (None if forgets else "hit")

    sync_kit.run(scenario)


def test_c15_what_location_names_goes_too_if_it_is_of_the_same_origin(sync_kit):
    async def scenario():
        locations = {"location": "/b", "content_location": "https://other.example/c"}
        origin = Origin(lambda request: reply(201, **locations) if request.method == "POST" else reply(200, b"x"))
        web = Web(sync_kit, Cache(60), origin)
        urls = {URL: None, OTHER: None, "https://other.example/c": "hit", "https://example.com/d": "hit"}
        for url in urls:
            await web.get(url)
        await web.request("POST")
        assert {url: served(await web.get(url)) for url in urls} == urls

    sync_kit.run(scenario)


def test_c15_with_a_key_it_goes_by_that_too(sync_kit):
    async def scenario():
        cache = Cache(60, key=lambda request: request.url.path)
        web = Web(sync_kit, cache, Origin(reply(200, b"x")))
        for url in (URL, OTHER, "https://one.example/c"):
            await web.get(url)
        await web.request("POST", "https://two.example/c")
        await web.request("DELETE")
        assert served(await web.get("https://one.example/c")) is None
        assert served(await web.get()) is None
        assert served(await web.get(OTHER)) == "hit"

    sync_kit.run(scenario)


def test_c15_old_answers_go_too(sync_kit):
    async def scenario():
        old = reply(200, b"old", cache_control="max-age=1, stale-if-error=1000")
        web = Web(sync_kit, Cache(0), Origin(old, reply(204), reply(503)))
        await web.get()
        await sync_kit.sleep(2)
        await web.request("PUT")
        assert (await web.get()).status_code == 503

    sync_kit.run(scenario)


def test_c15_what_was_asked_for_before_a_write_is_not_kept_after_it(kit):
    async def scenario():
        origin = Origin(reply(200, b"old"), reply(204), reply(200, b"new"))
        web = Web(kit, Cache(60), origin)
        response = await web.get(stream=True)
        await web.request("PUT")
        assert await kit.read(response) == b"old"
        assert (await web.get()).text == "new"
        assert (await web.get()).text == "new"
        assert origin.asked == 3

    kit.run(scenario)


# -- in the background --------------------------------------------------------------------------------------------


def test_c4_an_old_answer_at_once_and_a_new_one_in_the_background(kit):
    async def scenario():
        fields = {"cache_control": "max-age=10, stale-while-revalidate=20"}
        origin = Origin(*(reply(200, b"%d" % number, wait=3, **fields) for number in range(1, 9)))
        cache = Cache(0)
        web = Web(kit, cache, origin)
        await web.get()
        await kit.sleep(12 - runtime.now())
        for _ in range(3):  # one of them is enough
            began = runtime.now()
            response = await web.get()
            assert (response.text, served(response)) == ("1", "stale-while-revalidate")
            assert response.headers["Cache-Status"] == "resilient; hit; ttl=-2; detail=stale-while-revalidate"
            assert runtime.now() == began
        assert origin.asked == 1, "it has yet to begin"
        await kit.sleep(5)
        assert origin.asked == 2
        response = await web.get()
        assert (response.text, served(response), origin.open) == ("2", "hit", 0)
        await kit.sleep(100)  # past the window
        response = await web.get()
        assert (response.text, served(response)) == ("3", None)
        assert counts(cache) == (1, 3, 0, 3)

    kit.run(scenario)


def test_c4_the_window_of_the_user_is_for_answers_without_one(sync_kit):
    for fields, at, expected in [
        ({}, 29.9, "stale-while-revalidate"),
        ({}, 30, None),
        ({"cache_control": "max-age=1, stale-while-revalidate=5"}, 5.9, "stale-while-revalidate"),
        ({"cache_control": "max-age=1, stale-while-revalidate=5"}, 6, None),
        ({"cache_control": "no-cache"}, 1, None),
    ]:

        async def scenario(fields=fields, at=at, expected=expected):
            web = Web(sync_kit, Cache(10, refresh=20), Origin(reply(200, b"x", **fields)))
            await web.get()
            await sync_kit.sleep(at)
            assert served(await web.get()) == expected

        sync_kit.run(scenario)


def test_c5_it_does_not_inherit_the_time_of_the_request(kit):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=50))
        web = Web(kit, Pipeline(Cache(1, refresh=1000)), origin)
        await web.get()
        await kit.sleep(2)
        limits = []

        def noticing(request):
            limits.append(deadline.current())
            return reply(200, b"2", wait=50)

        origin.steps[1] = noticing
        with deadline.published(deadline.Deadline(runtime.now() + 1, Timeout(1))):
            assert (await web.get()).text == "1"
        await kit.sleep(60)
        assert limits == [None]
        assert (await web.get()).text == "2"

    kit.run(scenario)


def test_c5_it_outlives_a_request_that_is_cancelled(async_kit):
    import anyio

    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=5))
        web = Web(async_kit, Cache(1, refresh=1000), origin)
        await web.get()
        await async_kit.sleep(2)
        with anyio.CancelScope() as scope:
            await web.get()
            scope.cancel()
            await anyio.sleep(1)
        await async_kit.sleep(6)
        assert (await web.get()).text == "2"

    async_kit.run(scenario)


def test_c5_it_keeps_the_deadlines_of_the_policies_further_in(kit):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=50))
        guard = Pipeline(Cache(1, refresh=1000), Timeout(5))
        web = Web(kit, guard, origin)
        await web.get()
        await kit.sleep(2)
        with capture_events(guard) as seen:
            await web.get()
            await kit.sleep(60)
        assert [event.error for event in seen if event.name == "cache.refresh_failed"] == ["TimedOut"]
        assert (await web.get()).text == "1"

    kit.run(scenario)


def test_c5_closing_waits_for_it_and_starts_no_more(kit):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=0.25, gap=0.25), reply(200, b"3"))
        cache = Cache(1, refresh=1000)
        web = Web(kit, cache, origin)
        await web.get()
        await kit.sleep(2)
        await web.get()
        await kit.sleep(0)
        await web.close()
        assert (runtime.now(), origin.closed, origin.asked) == (2.5, True, 2)
        await kit.sleep(2)
        again = Web(kit, cache, origin)
        again.transport._edge.background.close() if kit.sync else await again.transport._edge.background.aclose()
        for _ in range(2):
            assert (await again.get()).text == "2", "old as it is"
            await kit.sleep(1)
        assert origin.asked == 2
        assert not cache._on_edges[again.transport._edge.cache]._flights
        assert not again.transport._edge.background._running

    kit.run(scenario)


def test_c5_closing_does_not_wait_for_ever(kit):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=100))
        web = Web(kit, Cache(1, refresh=1000), origin)
        await web.get()
        await kit.sleep(2)
        await web.get()
        await kit.sleep(0)
        async_close = web.transport.__exit__ if kit.sync else web.transport.__aexit__
        await kit.do(async_close)
        assert (runtime.now(), origin.closed) == (3.0, True)
        await kit.sleep(200)

    kit.run(scenario)


def test_c5_closing_without_any_does_not_wait(kit):
    async def scenario():
        web = Web(kit, Cache(1), Origin(reply(200)))
        await web.get()
        await web.close()
        assert runtime.now() == 0

    kit.run(scenario)


def test_c5_a_cancelled_close_waits_all_the_same(async_kit):
    import anyio

    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2", wait=0.5))
        web = Web(async_kit, Cache(1, refresh=1000), origin)
        await web.get()
        await async_kit.sleep(2)
        await web.get()
        await async_kit.sleep(0)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await web.transport.aclose()
        assert (runtime.now(), origin.closed) == (2.5, True)

    async_kit.run(scenario)


def test_c5_an_event_loop_that_ends_takes_it_along():
    """On asyncio a task may be cancelled before its first step; the next event loop must find no trace of it."""
    import httpx

    from .conftest import FAMILIES, Kit

    kit = Kit(*FAMILIES["httpx"], "asyncio")
    origin = Origin(reply(200, b"1"), reply(200, b"2", wait=5))
    cache = Cache(1, refresh=1000)
    web = Web(kit, cache, origin)

    async def begin():
        await web.get()
        await kit.sleep(2)
        assert (await web.get()).text == "1"

    async def go_on():
        await kit.sleep(2)
        assert (await web.get()).text == "1"
        await kit.sleep(6)
        assert (await web.get()).text == "2"
        await web.close()

    run(begin)
    assert not web.transport._edge.background._running
    run(go_on, start=10)
    assert httpx.__name__ == "httpx"


def test_c5_without_threads_there_is_no_refresh(sync_kit, monkeypatch):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(200, b"2"))
        cache = Cache(1, refresh=1000)
        web = Web(sync_kit, cache, origin)
        await web.get()
        await sync_kit.sleep(2)

        def refuse(function, name):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch, capture_events(cache) as seen:
            patch.setattr(runtime, "start_thread", refuse)
            assert (await web.get()).text == "1"
        assert [event.name for event in seen] == ["cache.stale_served", "cache.refresh_failed"]
        await web.get()
        await sync_kit.sleep(0.5)
        assert (await web.get()).text == "2"
        await web.close()
        assert runtime.now() == 2.5

    sync_kit.run(scenario)


@pytest.mark.parametrize("validators", [{"etag": '"1"'}, {"last_modified": "Sat, 01 Jan 2022 00:00:00 GMT"}])
def test_c19_it_asks_whether_the_old_answer_is_still_good(kit, validators):
    async def scenario():
        fields = {"cache_control": "max-age=10, stale-while-revalidate=100", **validators}
        news = {"cache_control": "max-age=20, stale-while-revalidate=100", "x_new": "1", "content_type": "no"}
        origin = Origin(
            zipped(b"body", age="3", content_type="text/plain", **fields),
            reply(304, **validators, **news, content_encoding="br", content_length="0"),
        )
        web = Web(kit, Cache(0), origin)
        await web.get(headers={"X-Mine": "1"})
        await kit.sleep(8)
        response = await web.get(headers={"X-Mine": "2"})
        assert (response.content, served(response)) == (b"body", "stale-while-revalidate")
        await kit.sleep(1)
        sent = origin.requests[1].headers
        assert sent["x-mine"] == "2"
        asked = {name: sent[name] for name in ("if-none-match", "if-modified-since") if name in sent}
        assert list(asked.values()) == list(validators.values())
        await kit.sleep(18.5)
        response = await web.get()  # C20: the answer is as young as its confirmation
        assert (response.content, served(response), response.headers["Age"]) == (b"body", "hit", "19")
        assert response.headers["X-New"] == "1"
        assert response.headers["Content-Encoding"] == "gzip"
        assert response.headers["Content-Type"] == "text/plain"
        assert response.headers.get_list("Age") == ["19"]
        await kit.sleep(1)
        assert served(await web.get()) == "stale-while-revalidate"
        await kit.sleep(1)
        assert (origin.asked, origin.open) == (3, 0)

    kit.run(scenario)


def test_c19_a_304_about_something_else_is_asked_about_again(kit):
    async def scenario():
        fields = {"cache_control": "max-age=10, stale-while-revalidate=100"}
        origin = Origin(
            reply(200, b"1", etag='"1"', **fields), reply(304, etag='"2"'), reply(200, b"2", etag='"2"', **fields)
        )
        web = Web(kit, Cache(0), origin)
        await web.get()
        await kit.sleep(12)
        await web.get()
        await kit.sleep(1)
        assert [seen.headers.get("if-none-match") for seen in origin.requests] == [None, '"1"', None]
        assert ((await web.get()).text, origin.open) == ("2", 0)

    kit.run(scenario)


def test_c19_weak_tags_confirm(kit):
    async def scenario():
        fields = {"cache_control": "max-age=10, stale-while-revalidate=100"}
        origin = Origin(reply(200, b"1", etag='W/"1"', **fields), reply(304, etag='"1"'), reply(304, etag='W/"1"'))
        web = Web(kit, Cache(0), origin)
        await web.get()
        await kit.sleep(12)
        await web.get()
        await kit.sleep(1)
        assert [seen.headers.get("if-none-match") for seen in origin.requests][1] == 'W/"1"'

    kit.run(scenario)


def test_c19_without_validators_it_just_asks(kit):
    async def scenario():
        origin = Origin(reply(200, b"1"), reply(304), reply(200, b"2"))
        web = Web(kit, Cache(1, refresh=100), origin)
        await web.get()
        await kit.sleep(2)
        await web.get()
        await kit.sleep(1)
        assert not {"if-none-match", "if-modified-since"} & origin.requests[1].headers.keys()
        assert (await web.get()).text == "2", "a 304 that nobody has asked for confirms nothing"

    kit.run(scenario)


def test_c19_a_304_for_the_caller_passes(kit):
    async def scenario():
        origin = Origin(reply(200, b"1", etag='"1"', cache_control="max-age=10"), reply(304, etag='"1"'))
        web = Web(kit, Cache(0), origin)
        await web.get()
        response = await web.get(headers={"If-None-Match": '"1"'})
        assert (response.status_code, served(response)) == (304, None)
        assert served(await web.get()) == "hit"

    kit.run(scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {"If-None-Match": '"1"'},
        {"If-Modified-Since": "Sat, 01 Jan 2022 00:00:00 GMT"},
        {"If-Match": '"1"'},
        {"If-Unmodified-Since": "Sat, 01 Jan 2022 00:00:00 GMT"},
        {"Range": "bytes=0-1"},
        {"Range": "bytes=0-1", "If-Range": '"1"'},
        {"Connection": "Upgrade", "Upgrade": "websocket"},
    ],
)
def test_c21_it_keeps_out_of_requests_for_something_else(sync_kit, headers):
    async def scenario():
        fields = {"cache_control": "max-age=10, stale-if-error=1000"}
        origin = Origin(reply(200, b"1", **fields), reply(200, b"2", **fields), reply(503))
        web = Web(sync_kit, Cache(0), origin)
        await web.get()
        assert (await web.get(headers=headers)).text == "2"
        assert (await web.get()).text == "1"
        assert (await web.get(headers=headers)).status_code == 503

    sync_kit.run(scenario)


def test_z8_a_protocol_upgrade_passes_untouched(kit):
    async def scenario():
        network = object()
        origin = Origin(reply(101, b"frames", extensions={"network_stream": network}))
        web = Web(kit, Cache(60, stale=60), origin)
        request = web.client.build_request("GET", URL, headers={"Upgrade": "websocket"})
        response = await kit.send(web.transport, request)
        assert response.extensions["network_stream"] is network
        assert (origin.open, origin.started) == (1, 0)
        assert type(response.stream).__name__ == "Stream"
        await kit.close(response)

    kit.run(scenario)


def test_a_refresh_that_finds_something_else(kit):
    """What the origin does not stand by any more is forgotten, whoever hears it."""
    for step, after in [
        (reply(200, b"2", cache_control="no-store"), (200, "3", None)),
        (reply(404, b"gone"), (200, "3", None)),
        (reply(503, b"broken"), (200, "1", "stale-while-revalidate")),
        (ConnectionError(), (200, "1", "stale-while-revalidate")),
        (reply(429, b"busy"), (200, "1", "stale-while-revalidate")),
        (reply(200, b"2", breaks=TimeoutError()), (200, "1", "stale-while-revalidate")),
        (reply(200, b"x" * (cache_store.BODY_BYTES + 1)), (200, "1", "stale-while-revalidate")),
        (reply(200, b"x", content_length="2000000"), (200, "1", "stale-while-revalidate")),
        (reply(200, b"x", content_length="2"), (200, "1", "stale-while-revalidate")),
    ]:

        async def scenario(step=step, after=after):
            origin = Origin(reply(200, b"1"), step, reply(200, b"3"))
            web = Web(kit, Cache(1, refresh=100), origin)
            await web.get()
            await kit.sleep(2)
            await web.get()
            await kit.sleep(1)
            response = await web.get()
            assert (response.status_code, response.text, served(response)) == after
            await kit.sleep(1)
            assert origin.open == 0

        kit.run(scenario)


def test_one_refresh_at_a_time_even_if_its_answers_are_never_fresh(kit):
    async def scenario():
        fields = {"cache_control": "max-age=0, stale-while-revalidate=100"}
        origin = Origin(
            reply(200, b"1", **fields), reply(200, b"2", wait=1, gap=5, **fields), reply(200, b"3", **fields)
        )
        web = Web(kit, Cache(0), origin)
        await web.get()
        for _ in range(5):
            assert (await web.get()).text == "1"
            await kit.sleep(1)
        assert origin.asked == 2
        await kit.sleep(5)
        assert (await web.get()).text == "2"

    kit.run(scenario)


def test_a_refresh_sends_what_the_caller_sent_then(kit):
    async def scenario():
        steps = [reply(200, b"1", etag='"1"'), reply(304, etag='"2"', wait=1), reply(200, b"2", vary="X-Mine")]
        origin = Origin(*steps)
        web = Web(kit, Cache(1, refresh=100), origin)
        await web.get()
        await kit.sleep(2)
        request = web.client.build_request("GET", URL, headers={"X-Mine": "before"}, timeout=7)
        await web.send(request)
        request.headers["X-Mine"] = "after"
        await kit.sleep(1.5)
        assert [seen.headers.get("x-mine") for seen in origin.requests] == [None, "before", "before"]
        assert origin.requests[1].extensions["timeout"]["read"] == 7
        assert served(await web.get(headers={"X-Mine": "before"})) == "hit"

    kit.run(scenario)


def test_tags_keep_their_bytes(sync_kit):
    async def scenario():
        raw = ((b"ETag", b'"\xe4"'),)
        origin = Origin(reply(200, b"1", raw=raw), reply(200, b"2"))
        web = Web(sync_kit, Cache(1, refresh=100), origin)
        await web.get()
        await sync_kit.sleep(2)
        await web.get()
        await sync_kit.sleep(1)
        assert (b"If-None-Match", b'"\xe4"') in origin.requests[1].raw

    sync_kit.run(scenario)


# -- bodies -------------------------------------------------------------------------------------------------------


def test_c22_bodies_are_kept_as_they_came(kit):
    async def scenario():
        for memory in (False, True):
            step = zipped(b"text" * 100, content_length=str(len(gzip.compress(b"text" * 100))))
            step.memory = memory
            web = Web(kit, Cache(60), Origin(step))
            for expected in (None, "hit", "hit"):
                response = await web.get()
                assert (response.content, served(response)) == (b"text" * 100, expected)
                assert response.headers["Content-Encoding"] == "gzip"
            request = web.client.build_request("GET", URL)
            response = await kit.send(web.transport, request)
            raw = b"".join(await kit.chunks(response.stream))
            assert gzip.decompress(raw) == b"text" * 100
            assert int(response.headers["Content-Length"]) == len(raw)

    kit.run(scenario)


@pytest.mark.parametrize("encoded", [False, True])
def test_c23_a_transport_further_in_that_reads_bodies(kit, encoded):
    """It has used up the stream, and what it keeps is decoded: without an encoding that is what came."""

    class Reads:
        def __init__(self, inner):
            self.inner = inner

        def handle_request(self, request):
            response = self.inner.handle_request(request)
            response.read()
            return response

        async def handle_async_request(self, request):
            response = await self.inner.handle_async_request(request)
            await response.aread()
            return response

    async def scenario():
        origin = Origin(zipped(b"text") if encoded else reply(200, b"te", b"xt"))
        web = Web(kit, Cache(60), origin, around=Reads)
        seen = [((response := await web.get()).text, served(response)) for _ in range(2)]
        assert seen == [("text", None), ("text", None if encoded else "hit")]

    kit.run(scenario)


def test_c23_a_transport_further_in_that_uses_bodies_up(sync_kit):
    class UsesUp:
        def __init__(self, inner):
            self.inner = inner

        def handle_request(self, request):
            response = self.inner.handle_request(request)
            list(response.iter_raw())
            return response

    async def scenario():
        origin = Origin(reply(200, b"text"))
        cache = Cache(60)
        web = Web(sync_kit, cache, origin, around=UsesUp)
        await sync_kit.send(web.transport, sync_kit.request())
        assert cache.statistics().entries == 0

    sync_kit.run(scenario)


def test_c24_only_what_was_read_to_its_end_is_kept(kit):
    async def scenario():
        cache = Cache(60)
        origin = Origin(reply(200, b"a", b"b", b"c"))
        web = Web(kit, cache, origin)
        response = await web.get(stream=True)
        await kit.close(response)
        assert (origin.open, cache.statistics().entries) == (0, 0)

        response = await kit.send(web.transport, kit.request("GET", URL))
        chunks = iter(response.stream) if kit.sync else aiter(response.stream)
        assert (next(chunks) if kit.sync else await anext(chunks)) == b"a"
        await kit.do(chunks.close if kit.sync else chunks.aclose)
        await kit.close(response)
        assert (origin.open, cache.statistics().entries) == (0, 0)

        response = await web.get(stream=True)
        assert cache.statistics().entries == 0
        assert await kit.read(response) == b"abc"
        assert (origin.open, cache.statistics().entries) == (0, 1)

    kit.run(scenario)


def test_c24_not_what_breaks_off(kit):
    async def scenario():
        cache = Cache(60)
        origin = Origin(reply(200, b"a", b"b", breaks=kit.http.ReadError("reset")))
        web = Web(kit, cache, origin)
        with pytest.raises(kit.http.ReadError):
            await web.get()
        assert (origin.open, cache.statistics().entries) == (0, 0)

    kit.run(scenario)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("length", ["1", "3", "0", "2, 2", "many"])
def test_c24_not_what_is_shorter_or_longer_than_it_says(sync_kit, length, memory):
    async def scenario():
        cache = Cache(60)
        web = Web(sync_kit, cache, Origin(reply(200, b"ab", content_length=length, memory=memory)))
        assert (await web.get()).content == b"ab"
        assert cache.statistics().entries == (length in {"2, 2", "many"})

    sync_kit.run(scenario)


def test_c24_a_length_next_to_an_encoding_of_the_connection_means_nothing(sync_kit):
    async def scenario():
        cache = Cache(60)
        fields = {"content_length": "7", "transfer_encoding": "chunked"}
        web = Web(sync_kit, cache, Origin(reply(200, b"ab", **fields)))
        await web.get()
        assert cache.statistics().entries == 1

    sync_kit.run(scenario)


def test_c24_not_what_is_cut_by_a_cancellation(async_kit):
    import anyio

    async def scenario():
        cache = Cache(60)
        origin = Origin(reply(200, b"a", b"b", gap=5))
        web = Web(async_kit, cache, origin)
        with anyio.move_on_after(7):
            await web.get()
        assert (runtime.now(), origin.open, cache.statistics().entries) == (7, 0, 0)

    async_kit.run(scenario)


def test_a21_a_body_that_nobody_reads_is_known_to_be_gone(kit):
    """It must be found by its reference count: a permit that waits for the garbage collector may wait for long."""

    async def scenario():
        cache = Cache(60)
        web = Web(kit, cache, Origin(reply(200, b"a")))
        response = await kit.send(web.transport, kit.request("GET", URL))
        told = []
        response.stream.when_released(told.append)
        gc.disable()
        try:
            del response
            await kit.send(web.transport, kit.request("GET", URL))
        finally:
            gc.enable()
        assert told == [None]
        assert cache.statistics().entries == 0

    kit.run(scenario)


def test_c25_the_first_byte_is_not_delayed(kit):
    async def scenario():
        origin = Origin(reply(200, b"a", b"b", b"c", gap=1))
        web = Web(kit, Cache(60), origin)
        response = await web.get(stream=True)
        assert (runtime.now(), origin.started) == (0, 0)
        seen = []
        if kit.sync:
            seen = [(chunk, runtime.now()) for chunk in response.iter_raw()]
        else:
            async for chunk in response.aiter_raw():
                seen.append((chunk, runtime.now()))
        assert seen == [(b"a", 1), (b"b", 2), (b"c", 3)]
        assert (await web.get()).content == b"abc"

    kit.run(scenario)


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("memory", [False, True])
def test_c25_what_is_too_long_is_passed_on_all_the_same(sync_kit, memory, length):
    async def scenario():
        piece = b"x" * 1024
        for pieces, kept in ((1024, 1), (1025, 0)):
            fields = {"content_length": str(pieces * 1024)} if length else {}
            cache = Cache(60)
            web = Web(sync_kit, cache, Origin(reply(200, *[piece] * pieces, memory=memory, **fields)))
            assert len((await web.get()).content) == pieces * 1024
            assert cache.statistics().entries == kept

    sync_kit.run(scenario)


@pytest.mark.parametrize("buffer", [2, 3, 4, True])
def test_c25_what_the_transport_has_read_ahead_is_not_missed(kit, buffer):
    async def scenario():
        origin = Origin(reply(200, b"a", b"b", b"c", b"d"))
        web = Web(kit, Cache(60), origin, buffer=buffer)
        for _ in range(2):
            assert (await web.get()).content == b"abcd"
        assert (origin.asked, origin.open) == (1, 0)

    kit.run(scenario)


def test_two_caches_listen_to_one_body(kit):
    async def scenario():
        outer, inner = Cache(60), Cache(60)
        web = Web(kit, Pipeline(outer, inner), Origin(reply(200, b"a", b"b")))
        await web.get()
        assert (outer.statistics().entries, inner.statistics().entries) == (1, 1)
        outer.clear()
        response = await web.get()
        assert (response.content, served(response)) == (b"ab", "hit")
        assert response.headers.get_list("Age") == ["0"]

    kit.run(scenario)


def test_c26_fields_of_one_connection_are_not_kept(sync_kit):
    async def scenario():
        fields = {
            "connection": "keep-alive, X-Hop",
            "keep_alive": "timeout=5",
            "proxy_authenticate": "Basic",
            "te": "trailers",
            "trailer": "X-Sum",
            "transfer_encoding": "chunked",
            "x_hop": "1",
            "x_end": "2",
        }
        web = Web(sync_kit, Cache(60), Origin(reply(200, b"x", **fields)))
        first = await web.get()
        assert first.headers["X-Hop"] == "1"
        second = await web.get()
        assert set(second.headers) == {"x-end", "age", "cache-status"}

    sync_kit.run(scenario)


def test_a24_a25_an_answer_that_passes_is_not_changed(kit):
    async def scenario():
        raw = ((b"X-B", b"1"), (b"x-a", b"2"), (b"X-B", b"3"), (b"Set-Cookie", b"a=1"), (b"Set-Cookie", b"b=2"))
        extensions = {
            "http_version": b"HTTP/2",
            "reason_phrase": b"Fine",
            "stream_id": 7,
            "network_stream": object(),
        }
        step = reply(200, b"x", raw=raw, extensions=extensions)
        web = Web(kit, Cache(60), Origin(step))
        first = await web.get(stream=True)
        assert (first.headers.raw, first.extensions) == (list(raw), extensions)
        await kit.read(first)
        assert (first.headers.raw, first.extensions) == (list(raw), extensions)
        web.client.cookies.clear()  # with them, another one would ask
        second = await web.get()
        assert second.headers.raw[:3] == list(raw[:3])
        assert (second.http_version, second.reason_phrase) == ("HTTP/2", "Fine")
        assert second.extensions.keys() == {"http_version", "reason_phrase", "resilient"}

    kit.run(scenario)


def test_a26_a_stream_of_events_is_not_buffered(kit):
    async def scenario():
        origin = Origin(
            reply(200, b"data: 1\n\n", b"data: 2\n\n", gap=5, content_type="text/event-stream; charset=utf-8")
        )
        web = Web(kit, Cache(60, stale=60), origin)
        response = await web.get(stream=True)
        assert (runtime.now(), origin.started) == (0, 0)
        assert type(response.stream.__dict__.get("_stream", response.stream)).__name__ == "Stream"
        await kit.read(response)

    kit.run(scenario)


@pytest.mark.parametrize("headers", [[("Age", "5")], [("Age", "5"), ("age", "7")]])
def test_c27_what_is_served_is_marked(sync_kit, headers):
    async def scenario():
        raw = tuple((name.encode(), value.encode()) for name, value in headers)
        step = reply(
            200, b"x", raw=raw, cache_control="max-age=60, stale-if-error=1000", cache_status="Upstream; hit"
        )
        web = Web(sync_kit, Cache(0), Origin(step, reply(504)))
        first = await web.get()
        assert (first.headers["Cache-Status"], "resilient" in first.extensions) == ("Upstream; hit", False)
        await sync_kit.sleep(2.7)
        second = await web.get()
        assert second.headers.get_list("Age") == ["7"]
        assert second.headers.get_list("Cache-Status") == ["Upstream; hit", "resilient; hit; ttl=52"]
        assert second.extensions["resilient"] == {"cache": "hit"}
        await sync_kit.sleep(60)
        third = await web.get()
        assert third.headers["Age"] == "67"
        assert third.headers.get_list("Cache-Status")[1] == (
            "resilient; fwd=stale; fwd-status=504; ttl=-8; detail=stale-if-error"
        )
        assert third.extensions["resilient"] == {"cache": "stale-if-error"}
        assert "Warning" not in third.headers

    sync_kit.run(scenario)


def test_c34_everybody_gets_a_response_of_his_own(kit):
    async def scenario():
        web = Web(kit, Cache(60), Origin(reply(200, b"body", extensions={"http_version": b"HTTP/1.1"})))
        await web.get()
        first, second = await web.get(), await web.get()
        assert first is not second
        first.headers["X-Mine"] = "1"
        first.extensions["resilient"]["cache"] = "mine"
        first.extensions["mine"] = 1
        third = await web.get()
        assert "X-Mine" not in third.headers
        assert third.extensions == {"http_version": b"HTTP/1.1", "resilient": {"cache": "hit"}}
        assert third.content == b"body"
        streamed = await web.get(stream=True)
        assert await kit.read(streamed) == b"body"
        assert streamed.request.url == URL
        assert streamed.elapsed.total_seconds() >= 0

    kit.run(scenario)


def test_a_served_answer_needs_no_copy_by_the_transport(kit):
    async def scenario():
        web = Web(kit, Cache(60), Origin(reply(200, b"body")))
        await web.get()
        web.transport._check_answer = None
        assert served(await kit.send(web.transport, web.client.build_request("GET", URL))) == "hit"

    kit.run(scenario)


# -- the policy ---------------------------------------------------------------------------------------------------


def test_statistics(sync_kit):
    async def scenario():
        cache = Cache(10, stale=10)
        web = Web(sync_kit, cache, Origin(reply(200, b"x"), reply(200, b"x"), reply(503)))
        cache.call(abs, -1) if sync_kit.sync else None
        for moment in (0, 0, 12, 12, 25):
            await sync_kit.sleep(moment - runtime.now())
            await web.get()
        made = sync_kit.sync
        assert cache.statistics() == CacheStatistics(entries=1 + made, hits=2, misses=3 + made, shared=0, stale=1)

    sync_kit.run(scenario)


def test_clear_and_idle(kit):
    async def scenario():
        cache = Cache(60)
        web = Web(kit, cache, Origin(reply(200, b"x")))
        assert cache.idle(runtime.now())
        response = await web.get(stream=True)
        assert cache.idle(runtime.now())
        await kit.read(response)
        assert not cache.idle(runtime.now())
        cache.clear()
        assert cache.idle(runtime.now())
        assert served(await web.get()) is None
        assert served(await web.get()) == "hit"
        if kit.sync:
            cache.clear()
            cache.call(abs, 1)
            assert not cache.idle(runtime.now())

    kit.run(scenario)


def test_an_answer_that_was_under_way_is_kept_after_a_clear(kit):
    async def scenario():
        cache = Cache(60)
        web = Web(kit, cache, Origin(reply(200, b"1"), reply(200, b"2")))
        response = await web.get(stream=True)
        cache.clear()
        assert (await web.get()).text == "2"
        await kit.read(response)
        assert (await web.get()).text == "2", "an answer never replaces one that was asked for later"

    kit.run(scenario)


def test_entries_that_are_of_no_use_any_more_go(sync_kit):
    async def scenario():
        cache = Cache(10, stale=20)
        web = Web(sync_kit, cache, Origin(reply(200, b"x"), reply(503)))
        await web.get()
        await sync_kit.sleep(29)
        await web.get()
        assert cache.statistics().entries == 1
        await sync_kit.sleep(1)
        await web.get()
        assert cache.statistics().entries == 0

    sync_kit.run(scenario)


def test_max_entries(sync_kit):
    async def scenario():
        cache = Cache(60, max_entries=2)
        web = Web(sync_kit, cache, Origin(reply(200, b"x")))
        for path in "abab":
            await web.get(f"https://example.com/{path}")
        await web.get("https://example.com/a")
        await web.get("https://example.com/c")
        assert served(await web.get("https://example.com/b")) is None
        assert served(await web.get("https://example.com/c")) == "hit"
        assert cache.statistics().entries == 2

    sync_kit.run(scenario)


def test_one_cache_in_several_transports_families_and_colours():
    from .conftest import COLOURS, FAMILIES, Kit

    cache = Cache(60)
    origin = Origin(reply(200, b"x"))
    seen = []
    for family in FAMILIES.values():
        for colour in COLOURS:
            kit = Kit(*family, colour)

            async def scenario(kit=kit):
                response = await Web(kit, Pipeline(cache, Retry()), origin).get()
                seen.append((response.content, type(response).__module__.partition(".")[0]))

            kit.run(scenario)
    assert seen == [(b"x", name) for name in FAMILIES for _ in COLOURS]
    assert origin.asked == 1
    assert len(cache._on_edges) == 1
    assert cache.call(abs, -2) == 2, "and it still guards functions"


def test_copies_have_a_state_of_their_own(sync_kit):
    async def scenario():
        cache = Cache(60)
        await Web(sync_kit, cache, Origin(reply(200, b"x"))).get()
        assert served(await Web(sync_kit, cache.fresh(), Origin(reply(200, b"y"))).get()) is None

    sync_kit.run(scenario)


def test_in_partitions(kit):
    async def scenario():
        origin = Origin(reply(200, b"x"))
        keyed = Keyed(lambda: Cache(60))
        web = Web(kit, keyed, origin)
        for url in ("https://one.example/", "https://two.example/") * 2:
            await web.get(url)
        assert origin.asked == 2
        assert {key: value.entries for key, value in keyed.statistics().items()} == {
            "https://one.example": 1,
            "https://two.example": 1,
        }

    kit.run(scenario)


def test_a_fallback_outside_answers_where_there_is_nothing_old(kit):
    async def scenario():
        nothing = kit.http.Response(200, content=b"nothing")
        web = Web(kit, Pipeline(Fallback(nothing), Cache(1, stale=1000)), Origin(reply(200, b"old"), reply(503)))
        await web.get()
        await kit.sleep(2)
        assert (await web.get()).text == "old"
        assert (await web.get(OTHER)).text == "nothing"

    kit.run(scenario)


def test_a_fallback_inside_is_an_answer_like_any_other(kit):
    async def scenario():
        nothing = kit.http.Response(200, content=b"nothing")
        origin = Origin(reply(200, b"old"), kit.http.ConnectError("x"))
        web = Web(kit, Pipeline(Cache(1, refresh=1000), Fallback(nothing)), origin)
        await web.get()
        await kit.sleep(2)
        assert (await web.get()).text == "old"
        await kit.sleep(0.5)
        assert (await web.get()).text == "nothing"

    kit.run(scenario)


def test_a_judge_of_results_is_heard(sync_kit):
    async def scenario():
        def fails(response):
            return response.headers.get("X-Error") is not None

        origin = Origin(reply(200, b"old"), reply(200, b"bad", x_error="1"))
        web = Web(sync_kit, Pipeline(Cache(1, stale=1000), failed=fails), origin)
        await web.get()
        await sync_kit.sleep(2)
        response = await web.get()
        assert (response.text, served(response), origin.open) == ("old", "stale-if-error", 0)
        assert response.headers["Cache-Status"] == "resilient; fwd=stale; ttl=-1; detail=stale-if-error"
        assert (await web.get(OTHER)).text == "bad"

    sync_kit.run(scenario)


def test_it_survives_a_fork():
    cache = HttpCache(Cache(60))
    cache._flights.lead(SimpleNamespace(flight=None), "key", 1)
    lock = cache._lock
    cache.after_fork()
    assert cache._lock is not lock
    assert cache.idle(0)


def test_a_refusal_of_the_outer_time_is_not_hidden(sync_kit):
    """The deadline of a caller around the transport ends the request; what is old is served in no time."""

    async def scenario():
        web = Web(sync_kit, Cache(1, stale=100), Origin(reply(200, b"old"), reply(200, b"new", wait=10)))
        with deadline.published(deadline.Deadline(runtime.now() + 5, Timeout(5))):
            await web.get()
        await sync_kit.sleep(2)
        with deadline.published(deadline.Deadline(runtime.now() + 5, Timeout(5))):
            assert (await web.get()).text == "old"
            with pytest.raises(TimedOut):
                await web.get(OTHER)

    sync_kit.run(scenario)


def test_on_real_connections(kit):
    """One connection is all there is: whoever does not read to the end, or close, makes the next one fail."""

    async def scenario():
        fields = {"Cache-Control": "max-age=0, stale-if-error=60"}
        steps = [ok(b"old", headers=fields), status(503, b"x" * 100_000), truncated(), ok(b"new", headers=fields)]
        with FlakyServer(steps) as server:
            limits = kit.http.Limits(max_connections=1)
            transport = kit.Transport(kit.HTTPTransport(limits=limits), pipeline=Cache(0))
            async with kit.client(transport, trust_env=False, timeout=5) as client:
                seen = []
                for _ in range(4):
                    try:
                        response = await kit.do(client.get, server.url)
                        seen.append((response.text, served(response)))
                    except kit.http.RemoteProtocolError:
                        seen.append("cut")
        assert seen == [("old", None), ("old", "stale-if-error"), "cut", ("new", None)]
        assert transport.pipeline.statistics().entries == 1

    kit.run_really(scenario)


def test_how_long_requests_stay_apart():
    assert APART_SECONDS == 120
    assert (cache_store.BODY_BYTES, cache_store.TOTAL_BYTES) == (2**20, 2**26)


def test_in_a_pipeline_of_functions_nothing_changes():
    with virtual_time():
        guard = Pipeline(Cache(10))
        assert guard.call(abs, -1) == 1
