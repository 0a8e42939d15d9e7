"""`Cache` on the transport of a client: requests that run at the same time, and where their answers are kept."""

import sys
import threading
from contextlib import contextmanager

import anyio
import cachetools
import httpx
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from interleave import explore

import resilient.http.cache
import resilient.http.edge
from resilient import (
    Bulkhead,
    BulkheadFull,
    Cache,
    CircuitBreaker,
    CircuitOpen,
    Fallback,
    Pipeline,
    TimedOut,
    Timeout,
    deadline,
    runtime,
)
from resilient.http import cache_store
from resilient.http.cache_flights import ALONE, APART_SECONDS, LEAD, Flights, Passenger
from resilient.http.cache_store import Entry, Store, said
from resilient.http.edge import HttpCall
from resilient.http.rfc9111 import Lifetime
from resilient.httpx import AsyncResilientTransport, ResilientTransport
from resilient.testing import capture_events

from .web import URL, Origin, Web, gather, reply, served

FRESH = {"cache_control": "max-age=60"}
SECRET = {"cache_control": "no-store"}


def counts(cache):
    statistics = cache.statistics()
    return statistics.hits, statistics.misses, statistics.shared, statistics.stale


@contextmanager
def until(seconds):
    """Have the caller's time end at a deadline that somebody around the transport has published."""
    with deadline.published(deadline.Deadline(seconds, Timeout(seconds))):
        yield


def later(kit, seconds, function, *args, **kwargs):
    """Return a function that waits, calls another one, and returns its result and the time."""

    async def call():
        if seconds:
            await kit.sleep(seconds)
        result = await function(*args, **kwargs)
        return result, runtime.now()

    return call


# -- followers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [False, True])
def test_c30_requests_for_the_same_at_the_same_time_are_sent_once(kit, memory):
    async def scenario():
        cache = Cache(0)
        origin = Origin(reply(200, b"bo", b"dy", wait=1, gap=0 if memory else 1, memory=memory, **FRESH))
        web = Web(kit, cache, origin)
        seen = await gather(kit, *(later(kit, pause, web.get) for pause in (0, 0, 0.5, 2.5 * (not memory))))
        assert [(response.content, served(response)) for response, _ in seen] == [
            (b"body", None),
            *[(b"body", "collapsed")] * 3,
        ]
        assert {moment for _, moment in seen} == {1 if memory else 3}
        assert (origin.asked, origin.open, counts(cache)) == (1, 0, (0, 1, 3, 0))
        status = seen[1][0].headers["Cache-Status"]
        assert status == f"resilient; fwd=miss; ttl={59 if memory else 57}; stored; collapsed"
        assert "Cache-Status" not in seen[0][0].headers
        assert len({id(response) for response, _ in seen}) == 4
        assert served(await web.get()) == "hit"

    kit.run(scenario)


def test_c30_a_body_that_was_read_for_others_is_in_memory(kit):
    async def scenario():
        bulkhead = Bulkhead(2)
        web = Web(kit, Pipeline(bulkhead, Cache(0)), Origin(reply(200, b"bo", b"dy", wait=1, **FRESH)))
        seen = await gather(kit, *[lambda: kit.send(web.transport, kit.request("GET", URL))] * 2)
        assert bulkhead.statistics().in_use == 0
        assert {b"".join(await kit.chunks(each.stream)) for each in seen} == {b"body"}

    kit.run(scenario)


def test_c16_the_time_that_was_waited_for_others_does_not_age_an_answer(kit):
    async def scenario():
        origin = Origin(lambda request: reply(200, b"x", wait=5, vary="Accept", **FRESH))
        web = Web(kit, Cache(0), origin)
        await gather(kit, web.get, lambda: web.get(headers={"Accept": "mine"}))
        assert (await web.get(headers={"Accept": "mine"})).headers["Age"] == "5"

    kit.run(scenario)


def test_c30_nobody_is_held_up_by_a_body_that_somebody_reads_slowly(kit):
    """Those who come after the headers ask for themselves: who knows whether the one who leads will read."""

    async def scenario():
        origin = Origin(reply(200, b"1", **FRESH), reply(200, b"2", **FRESH))
        web = Web(kit, Cache(0), origin)
        first = await web.get(stream=True)
        assert (await web.get()).text == "2"
        assert await kit.read(first) == b"1"
        assert (await web.get()).text == "2"
        assert (origin.asked, origin.open) == (2, 0)

    kit.run(scenario)


def test_c30_a_failure_is_shared_by_new_errors(kit):
    async def scenario():
        error = kit.http.ConnectError("refused")
        error.__cause__ = OSError("cause")
        error.add_note("a note")
        origin = Origin(reply(200, wait=1, breaks=error, **FRESH))
        web = Web(kit, Cache(0), origin)
        headers = [{"X-Mine": str(number)} for number in range(3)]
        seen = await gather(kit, *(later(kit, 0, web.get, headers=each) for each in headers))
        assert [type(each) for each in seen] == [kit.http.ConnectError] * 3
        assert seen[0] is error
        assert len({id(each) for each in seen}) == 3
        assert [each.request.headers["X-Mine"] for each in seen] == ["0", "1", "2"]
        assert {(str(each), str(each.__cause__), *each.__notes__) for each in seen} == {
            ("refused", "cause", "a note")
        }
        seen[1].add_note("mine")
        assert error.__notes__ == ["a note"]
        assert (origin.asked, origin.open) == (1, 0)

    kit.run(scenario)


def test_c30_a_failure_is_shared_with_its_own_request(kit):
    async def scenario():
        web = Web(
            kit, Cache(0), Origin(lambda request: reply(200, wait=1, breaks=kit.http.ReadError("x"), **FRESH))
        )
        requests = [kit.request("GET", URL) for _ in range(2)]
        seen = await gather(kit, *(lambda each=each: kit.send(web.transport, each) for each in requests))
        assert seen[1].request is requests[1]

    kit.run(scenario)


def test_c30_a_failure_of_no_client_is_shared_too(kit):
    async def scenario():
        error = ConnectionResetError("reset")
        web = Web(kit, Cache(0), Origin(reply(200, wait=1, breaks=error, **FRESH)))
        seen = await gather(kit, web.get, web.get)
        assert [type(each) for each in seen] == [ConnectionResetError] * 2
        assert seen[0] is error
        assert seen[1] is not error

    kit.run(scenario)


class Unkind(TimeoutError):
    def __init__(self, first, second):
        super().__init__(first)


@pytest.mark.parametrize("number", range(5))
def test_c30_failures_that_are_not_shared(kit, number):
    error = [
        KeyError("bug"),
        kit.http.LocalProtocolError("bad field"),
        Unkind("cannot", "be copied"),
        BulkheadFull("full", policy="mine"),
        kit.http.UnsupportedProtocol("x"),
    ][number]

    async def scenario():
        steps = iter([error, reply(200, b"1", **SECRET), reply(200, b"2", **SECRET)])

        def answer(_request):
            return next(steps)

        class Slow:
            def __init__(self, inner):
                self.inner = inner

            def handle_request(self, request):
                runtime.sleep(1)
                return self.inner.handle_request(request)

            async def handle_async_request(self, request):
                await runtime.asleep(1)
                return await self.inner.handle_async_request(request)

        web = Web(kit, Cache(0), Origin(answer), around=Slow)
        seen = await gather(kit, *[web.get] * 3)
        assert type(seen[0]).__name__ == type(error).__name__
        assert sorted(each.text for each in seen[1:]) == ["1", "2"]
        assert runtime.now() == 2, "both at the same time"

    kit.run(scenario)


def test_c30_a_failing_response_is_not_shared(kit):
    async def scenario():
        origin = Origin(*(reply(503, b"%d" % number, wait=1) for number in range(3)))
        web = Web(kit, Cache(0), origin)
        seen = await gather(kit, *[web.get] * 3)
        assert sorted(each.text for each in seen) == ["0", "1", "2"]
        assert (runtime.now(), origin.asked, origin.open) == (2, 3, 0)

    kit.run(scenario)


def test_c30_those_who_follow_get_something_old_as_well(kit):
    async def scenario():
        for step in (reply(503, wait=1), kit.http.ConnectError("x")):
            cache = Cache(1, stale=1000)
            origin = Origin(reply(200, b"old"), lambda _request, step=step: step)
            web = Web(kit, cache, origin)
            await web.get()
            await kit.sleep(2)
            with capture_events(cache) as events:
                fussy = {"Cache-Control": "stale-if-error=0"}
                seen = await gather(kit, web.get, web.get, lambda web=web, fussy=fussy: web.get(headers=fussy))
            assert [getattr(each, "text", None) for each in seen[:2]] == ["old"] * 2
            if isinstance(step, Exception):
                assert type(seen[2]) is type(step)
            else:
                assert (seen[2].status_code, origin.asked) == (503, 3)
                assert [event.name for event in events] == ["cache.stale_served"] * 2

    kit.run(scenario)


def test_c30_refused_by_a_breaker_each_hears_it_himself(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=1, open_for=60)
        web = Web(kit, Pipeline(Cache(0), breaker), Origin(reply(200, wait=1, breaks=None, **SECRET), reply(503)))
        breaker.isolate()
        seen = await gather(kit, *[web.get] * 3)
        assert all(isinstance(each, CircuitOpen) for each in seen)
        assert len({id(each) for each in seen}) == 3

    kit.run(scenario)


def test_c30_a_timeout_is_shared_by_those_who_have_the_same(kit):
    async def scenario():
        steps = iter(
            [
                reply(200, wait=1, breaks=kit.http.ReadTimeout("x"), **FRESH),
                reply(200, b"patient", wait=1, **FRESH),
            ]
        )
        web = Web(kit, Cache(0), Origin(lambda _request: next(steps)))
        seen = await gather(kit, web.get, web.get, lambda: web.get(timeout=60))
        assert [type(each) for each in seen[:2]] == [kit.http.ReadTimeout] * 2
        assert seen[2].text == "patient"

    kit.run(scenario)


def test_c30_what_somebody_else_has_got_meanwhile_is_as_good(kit):
    async def scenario():
        cache = Cache(0)
        steps = [reply(200, b"1", wait=3, breaks=kit.http.ReadError("x"), **FRESH), reply(200, b"2", **FRESH)]
        web = Web(kit, cache, Origin(*steps))

        async def insist():
            await kit.sleep(1)
            return await web.get(headers={"Cache-Control": "no-cache"})

        with capture_events(cache) as events:
            seen = await gather(kit, web.get, web.get, insist)
        assert [(each.text, served(each)) for each in seen] == [("2", "hit"), ("2", "hit"), ("2", None)]
        assert seen[1].headers["Cache-Status"] == "resilient; hit; ttl=58"
        assert (events, counts(cache)) == ([], (2, 2, 1, 0))

    kit.run(scenario)


def test_c30_the_time_of_an_attempt_is_shared(kit):
    async def scenario():
        origin = Origin(reply(200, wait=10, **FRESH))
        web = Web(kit, Pipeline(Cache(0), Timeout(5)), origin)
        seen = await gather(kit, *[web.get] * 3)
        assert all(isinstance(each, TimedOut) and isinstance(each, kit.http.TimeoutException) for each in seen)
        assert (origin.asked, len({id(each) for each in seen})) == (1, 3)

    kit.run(scenario)


# -- leaders that go ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 10])
def test_c30_a_cancelled_leader_hands_over_to_the_one_who_has_waited_longest(async_kit, gap):
    async def scenario():
        steps = [reply(200, b"1", wait=0 if gap else 10, gap=gap, **FRESH), reply(200, b"2", wait=1, **FRESH)]
        origin = Origin(*steps)
        cache = Cache(0)
        web = Web(async_kit, cache, origin)
        seen = {}

        async def get(name, give_up=1000):
            with anyio.move_on_after(give_up):
                seen[name] = await web.get(headers={"X-Name": name})

        async with anyio.create_task_group() as group:
            group.start_soon(get, "leader", 2)
            for name, give_up in (("quitter", 1), ("first", 1000), ("second", 1000)):
                await anyio.wait_all_tasks_blocked()
                group.start_soon(get, name, give_up)
        if not gap:
            assert [request.headers["x-name"] for request in origin.requests] == ["leader", "first"]
            assert {name: served(response) for name, response in seen.items()} == {
                "first": None,
                "second": "collapsed",
            }
            assert {response.text for response in seen.values()} == {"2"}
            assert (runtime.now(), counts(cache)) == (3, (0, 1, 3, 0))
        assert origin.open == 0
        assert not cache._on_edges[web.transport._edge.cache]._flights

    async_kit.run(scenario)


def test_c30_a_leader_that_is_cancelled_while_it_reads_for_others(async_kit):
    async def scenario():
        origin = Origin(reply(200, b"1", b"1", wait=1, gap=10, **FRESH), reply(200, b"2", **FRESH))
        web = Web(async_kit, Cache(0), origin)
        seen = []

        async def lead():
            with anyio.move_on_after(5):
                await web.get()

        async def follow():
            seen.append((await web.get()).text)

        async with anyio.create_task_group() as group:
            group.start_soon(lead)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(follow)
        assert (seen, runtime.now(), origin.asked, origin.open) == (["2"], 5, 2, 0)

    async_kit.run(scenario)


def test_c30_a_leader_whose_time_is_over_hands_over(sync_kit):
    """Its deadline, set by somebody around the transport, says nothing about the time of the others."""

    async def scenario():
        origin = Origin(reply(200, wait=10, **FRESH), reply(200, b"2", wait=1, **FRESH))
        web = Web(sync_kit, Cache(0), origin)

        async def lead():
            with until(5):
                return await web.get()

        seen = await gather(sync_kit, lead, web.get, web.get)
        assert isinstance(seen[0], TimedOut)
        assert [(each.text, served(each)) for each in seen[1:]] == [("2", None), ("2", "collapsed")]

    sync_kit.run(scenario)


def test_c30_a_leader_that_is_interrupted_hands_over(sync_kit):
    async def scenario():
        origin = Origin(reply(200, wait=1, breaks=KeyboardInterrupt(), **FRESH), reply(200, b"2", **FRESH))
        web = Web(sync_kit, Cache(0), origin)
        interrupted = []

        async def lead():
            try:
                await web.get()
            except KeyboardInterrupt:
                interrupted.append(runtime.now())

        seen = await gather(sync_kit, lead, web.get)
        assert (interrupted, seen[1].text, origin.open) == ([1], "2", 0)

    sync_kit.run(scenario)


def test_c30_who_is_interrupted_while_he_waits_is_forgotten(sync_kit, monkeypatch):
    async def scenario():
        cache = Cache(0)
        web = Web(sync_kit, cache, Origin(reply(200, b"x", wait=1, **FRESH)))
        wait = runtime.wait

        def interrupt(ticket):
            monkeypatch.setattr(runtime, "wait", wait)
            raise KeyboardInterrupt

        async def follow():
            monkeypatch.setattr(runtime, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                await web.get()
            flight = next(iter(cache._on_edges[web.transport._edge.cache]._flights._flights.values()))
            assert not flight.waiting
            return "forgotten"

        seen = await gather(sync_kit, web.get, follow)
        assert (seen[0].text, seen[1]) == ("x", "forgotten")

    sync_kit.run(scenario)


def test_c32_everybody_keeps_his_own_deadline(kit):
    async def scenario():
        origin = Origin(reply(200, b"x", wait=10, **FRESH))
        cache = Cache(0)
        web = Web(kit, cache, origin)
        moments = []

        async def impatient():
            try:
                with until(3):
                    return await web.get()
            finally:
                moments.append(runtime.now())

        seen = await gather(kit, web.get, impatient, web.get)
        assert isinstance(seen[1], TimedOut)
        assert moments == [3]
        assert [each.text for each in (seen[0], seen[2])] == ["x", "x"]
        assert origin.asked == 1

    kit.run(scenario)


def test_c32_policies_know_the_end_of_the_wait_by_the_name_that_users_know(kit):
    async def scenario():
        origin = Origin(reply(200, b"x", wait=10, **FRESH))
        plan_b = Fallback(lambda request: kit.http.Response(203), on=kit.http.TimeoutException)
        web = Web(kit, plan_b | Cache(0), origin)

        async def impatient():
            with until(3):
                return await web.get()

        seen = await gather(kit, web.get, impatient)
        assert [each.status_code for each in seen] == [200, 203]

    kit.run(scenario)


def test_c32_who_waits_too_long_may_get_something_old(kit):
    async def scenario():
        origin = Origin(reply(200, b"old"), reply(200, b"new", wait=10))
        web = Web(kit, Cache(1, stale=100), origin)
        await web.get()
        await kit.sleep(2)

        async def impatient():
            with until(5):
                return await web.get(), runtime.now()

        seen = await gather(kit, web.get, impatient)
        assert seen[0].text == "new"
        assert (seen[1][0].text, served(seen[1][0]), seen[1][1]) == ("old", "stale-if-error", 5)

    kit.run(scenario)


# -- answers that cannot be shared --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": "no-store"},
        {"cache_control": "max-age=0, stale-if-error=60"},
        {"cache_control": "no-cache"},
        {"vary": "*", "cache_control": "max-age=60"},
        {"cache_control": "max-age=60", "content_length": "1048577"},
        {"cache_control": "max-age=60", "content_type": "text/event-stream"},
        {},
    ],
)
def test_c31_nobody_waits_longer_than_for_the_headers(kit, fields):
    async def scenario():
        origin = Origin(*(reply(200, b"%d" % number, wait=1, gap=100, **fields) for number in range(3)))
        cache = Cache(0, stale=60)
        web = Web(kit, cache, origin)
        moments = []

        async def get():
            response = await web.get(stream=True)
            moments.append(runtime.now())
            await kit.close(response)

        await gather(kit, get, get, get)
        assert moments == [1, 2, 2]
        await gather(kit, get, get, get)
        assert moments[3:] == [3, 3, 3], "now it is known, so nobody waits at all"
        await kit.sleep(APART_SECONDS)
        await gather(kit, get, get)
        assert moments[6:] == [124, 125]
        assert origin.open == 0

    kit.run(scenario)


def test_c31_an_answer_that_can_be_shared_unites_them_again(kit):
    async def scenario():
        steps = [reply(200, b"x", wait=1, **SECRET), reply(200, b"x", **FRESH), reply(200, b"x", wait=1, **FRESH)]
        origin = Origin(*steps)
        cache = Cache(0)
        web = Web(kit, cache, origin)
        await web.get()
        await web.get()
        cache.clear()
        await gather(kit, web.get, web.get)
        assert origin.asked == 3

    kit.run(scenario)


def test_c31_after_a_body_that_is_not_whole_nobody_waits(kit):
    async def scenario():
        broken = {"content_length": "9", "memory": True}
        origin = Origin(reply(200, b"x", **broken, **FRESH), reply(200, b"x", wait=1, **broken, **FRESH))
        web = Web(kit, Cache(0), origin)
        await web.get()
        await gather(kit, web.get, web.get)
        assert (origin.asked, runtime.now()) == (3, 1.0)

    kit.run(scenario)


def test_c31_a_body_without_an_end_is_passed_on_by_the_one_who_leads(kit):
    async def scenario():
        piece = b"x" * 65536
        origin = Origin(reply(200, *[piece] * 17, wait=1, **FRESH))
        web = Web(kit, Cache(0), origin)
        seen = await gather(kit, web.get, web.get, web.get)
        assert [len(each.content) for each in seen] == [17 * 65536] * 3
        assert [served(each) for each in seen] == [None] * 3
        assert (origin.asked, origin.open, runtime.now()) == (3, 0, 2)

    kit.run(scenario)


def test_c31_whom_it_does_not_fit_goes_on_by_himself(kit):
    async def scenario():
        def answer(request):
            language = request.headers["Accept-Language"]
            return reply(200, language.encode(), wait=1, gap=1, vary="Accept-Language", **FRESH)

        origin = Origin(answer)
        cache = Cache(0, stale=1000)
        web = Web(kit, cache, origin)

        def get(language):
            return later(kit, 0, web.get, headers={"Accept-Language": language})

        languages = ["en", "de", "en", "fr", "de"]
        seen = await gather(kit, *map(get, languages))
        assert [response.text for response, _ in seen] == languages
        assert [moment for _, moment in seen] == [2, 4, 2, 4, 4], "and not one after another"
        assert [served(response) for response, _ in seen] == [None, None, "collapsed", None, None]
        assert origin.asked == 4

        await kit.sleep(60)
        seen = await gather(kit, *map(get, languages))
        assert [response.text for response, _ in seen] == languages
        assert {moment for _, moment in seen} == {66}, "now it is known what they have in common"
        assert origin.asked == 7

    kit.run(scenario)


def test_c31_what_a_request_demands_counts_for_those_who_follow(kit):
    async def scenario():
        origin = Origin(reply(200, b"x", wait=1, age="30", **FRESH))
        web = Web(kit, Cache(0), origin)

        def get(demand):
            return lambda: web.get(headers={"Cache-Control": demand})

        demands = ["max-age=30", "max-age=40", "min-fresh=40", "no-cache", "max-age=0", "only-if-cached"]
        seen = await gather(kit, web.get, *map(get, demands))
        assert [served(each) for each in seen] == [None, None, "collapsed", None, None, None, "only-if-cached"]
        assert [request.at for request in origin.requests] == [0, 0, 0, 1, 1]

    kit.run(scenario)


def test_c31_who_asks_counts_for_those_who_follow(kit):
    async def scenario():
        origin = Origin(lambda request: reply(200, request.headers.get("Cookie", "-").encode(), wait=1, **FRESH))
        web = Web(kit, Cache(0), origin)
        headers = [{}, {"Cookie": "a"}, {"Cookie": "b"}, {"Cookie": "a"}]
        seen = await gather(kit, *(lambda each=each: web.get(headers=each) for each in headers))
        assert [each.text for each in seen] == ["-", "a", "b", "a"]
        assert (origin.asked, runtime.now()) == (3, 1)

    kit.run(scenario)


def test_c31_head_requests_neither_lead_nor_follow(kit):
    async def scenario():
        origin = Origin(reply(200, wait=1, **FRESH))
        web = Web(kit, Cache(0), origin)
        await gather(kit, *[lambda: web.request("HEAD")] * 2, web.get, lambda: web.request("HEAD"))
        assert [request.method for request in origin.requests] == ["HEAD", "HEAD", "GET", "HEAD"]
        assert runtime.now() == 1

    kit.run(scenario)


def test_c15_who_comes_after_a_write_does_not_follow_who_came_before(kit):
    async def scenario():
        steps = iter([reply(200, b"old", wait=10, **FRESH), reply(204), reply(200, b"new", wait=1, **FRESH)])
        origin = Origin(lambda _request: next(steps))
        web = Web(kit, Cache(0), origin)

        async def write():
            await kit.sleep(1)
            await web.request("PUT")
            return await gather(kit, web.get, web.get)

        seen = await gather(kit, web.get, web.get, write)
        assert [each.text for each in seen[:2]] == ["old", "old"]
        assert [each.text for each in seen[2]] == ["new", "new"]
        assert (await web.get()).text == "new"
        assert origin.asked == 3

    kit.run(scenario)


def test_c4_who_may_not_have_the_old_answer_follows_its_renewal(kit):
    async def scenario():
        fields = {"cache_control": "max-age=3, stale-while-revalidate=100", "etag": '"1"'}
        for step, expected in [
            (reply(200, b"new", wait=1, **fields), "new"),
            (reply(304, wait=1, **fields), "old"),
            (reply(200, wait=1, breaks=kit.http.ReadError("x"), **fields), "ReadError"),
            (reply(200, b"new", wait=1, **SECRET), "new"),
        ]:
            origin = Origin(reply(200, b"old", **fields), step)
            web = Web(kit, Cache(0), origin)
            await web.get()
            await kit.sleep(5)
            assert (await web.get()).text == "old"
            await kit.sleep(0)
            seen = await gather(kit, lambda web=web: web.get(headers={"Cache-Control": "max-age=2"}))
            assert getattr(seen[0], "text", type(seen[0]).__name__) == expected
            assert origin.asked == (2 if step.headers[0][1] != b"no-store" else 3)
            await kit.sleep(1)
            assert origin.open == 0

    kit.run(scenario)


def test_a_renewal_that_is_cancelled_hands_over(async_kit):
    async def scenario():
        fields = {"cache_control": "max-age=1, stale-while-revalidate=100"}
        origin = Origin(reply(200, b"old", **fields), reply(200, wait=100, **fields), reply(200, b"new", **fields))
        web = Web(async_kit, Cache(0), origin)
        started = []

        def start_task(function, context, cancelled):
            started.append((function, cancelled))

        await web.get()
        await async_kit.sleep(2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtime, "start_task", start_task)
            assert (await web.get()).text == "old"
        function, cancelled = started[0]

        async def follow():
            return await web.get(headers={"Cache-Control": "max-age=1"})

        async def renew():
            with anyio.move_on_after(5):
                await function()
            cancelled()

        origin.steps = [reply(200, wait=100, **fields), *origin.steps[1:]]
        seen = await gather(async_kit, renew, follow)
        assert (seen[1].text, runtime.now()) == ("new", 7)
        await web.close()
        assert runtime.now() == 7

    async_kit.run(scenario)


def test_permits_are_not_held_by_those_who_follow(kit):
    async def scenario():
        bulkhead = Bulkhead(1)
        web = Web(kit, Pipeline(Cache(0), bulkhead), Origin(reply(200, b"x", wait=1, gap=1, **FRESH)))
        seen = await gather(kit, *[web.get] * 5)
        assert [each.text for each in seen] == ["x"] * 5
        assert bulkhead.statistics().in_use == 0

    kit.run(scenario)


# -- threads ------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_a_thread_leads_and_tasks_of_two_event_loops_follow():
    cache = Cache(0)
    leading, go_on = threading.Event(), threading.Event()

    def answer(request):
        leading.set()
        assert go_on.wait(20)
        return httpx.Response(200, content=b"body", headers={"Cache-Control": "max-age=60"})

    sync = ResilientTransport(httpx.MockTransport(answer), pipeline=cache)
    asynchronous = AsyncResilientTransport(httpx.MockTransport(answer), pipeline=cache)
    seen = []

    def lead():
        seen.append(sync.handle_request(httpx.Request("GET", URL)))

    async def follow():
        seen.append(await asynchronous.handle_async_request(httpx.Request("GET", URL)))

    threads = [threading.Thread(target=lead)]
    threads[0].start()
    assert leading.wait(20)
    threads += [
        threading.Thread(target=anyio.run, args=(follow,), kwargs={"backend": name})
        for name in ("asyncio", "trio")
    ]
    for thread in threads[1:]:
        thread.start()
    http = cache._on_edges[sync._edge.cache]
    waiting = next(iter(http._flights._flights.values())).waiting
    while len([each for each in list(waiting) if each.ticket._wake is not None]) < 2:
        pass
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert sorted(map(str, map(served, seen))) == ["None", "collapsed", "collapsed"]
    assert {response.read() for response in seen} == {b"body"}


@pytest.mark.usefixtures("impatient_threads")
def test_c35_nothing_that_threads_store_is_lost():
    cache = Cache(60, max_entries=10_000)

    def answer(request):
        return httpx.Response(200, content=request.headers["X-Variant"].encode(), headers={"Vary": "X-Variant"})

    transport = ResilientTransport(httpx.MockTransport(answer), pipeline=cache)
    wrong = []

    def work(number):
        for variant in range(40):
            name = f"{number}-{variant}"
            for _ in range(2):
                response = transport.handle_request(httpx.Request("GET", URL, headers={"X-Variant": name}))
                if response.read() != name.encode():
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    statistics = cache.statistics()
    assert (statistics.entries, statistics.hits) == (240, 240)


# -- any order ----------------------------------------------------------------------------------------------------


class _Stream(httpx.AsyncByteStream):
    def __init__(self, world, counters, pieces, error=None):
        self.world, self.counters, self.pieces, self.error = world, counters, pieces, error
        self.closed = False

    async def __aiter__(self):
        for piece in self.pieces:
            await self.world.pause()
            yield piece
        if self.error is not None:
            raise self.error

    async def aclose(self):
        if not self.closed:
            self.closed = True
            self.counters["open"] -= 1


async def _close(response):
    await response.aclose()


async def _call(close):
    await close()


def flights_scenario(cache):
    """Callers of two URLs: who is served gets what was asked for, and nothing and nobody is left behind."""
    world_of = []
    counters = {"open": 0, "number": 0}

    async def send(request):
        world = world_of[0]
        manner = world.draw(9)
        await world.pause()
        if manner == 0:
            raise httpx.ConnectError("refused")
        if manner == 1:
            await world.asleep(0.5)
        counters["number"] += 1
        counters["open"] += 1
        variant = request.headers["X-Variant"] if manner == 2 else "*"
        body = f"{request.url.path} {variant} {counters['number']}".encode()
        headers = {
            2: {"Cache-Control": "max-age=5, stale-while-revalidate=9", "Vary": "X-Variant", "ETag": "1"},
            3: {"Cache-Control": "no-store"},
            4: {"Cache-Control": "max-age=0, stale-if-error=60, stale-while-revalidate=20"},
        }.get(manner, {"Cache-Control": "max-age=1, stale-if-error=60, stale-while-revalidate=2"})
        error = httpx.ReadError("cut") if manner == 5 else None
        stream = _Stream(world, counters, [body[:3], body[3:]], error)
        return httpx.Response(503 if manner == 6 else 200, headers=headers, stream=stream)

    transport = AsyncResilientTransport(httpx.MockTransport(send), pipeline=Pipeline(cache))
    edge, chain = transport._edge, transport._chain
    edge.send = send
    chain = transport.pipeline.achain(edge)
    http = cache._on_edges[edge.cache]

    def setup(world):
        world_of[:] = [world]
        cache.clear()
        http._flights._apart.clear()
        counters.update(open=0, number=0)

        async def caller(path, variant, after, reads, demand):
            if after:
                await world.asleep(after)
            headers = {"X-Variant": variant, **({"Cache-Control": demand} if demand else {})}
            call = HttpCall(edge, httpx.Request("GET", f"https://a/{path}", headers=headers))
            response = None
            try:
                response = await chain(call)
                if reads:
                    text = b"".join([chunk async for chunk in response.stream]).decode().split(" ")
                    assert len(text) == 3, "half an answer"
                    assert text[0] == f"/{path}", "the answer of another URL"
                    assert text[1] in {"*", variant}, "the answer of another variant"
            except (httpx.TransportError, resilient.http.edge.FailedResult):
                pass
            finally:
                for each in (response, call.response):
                    if each is not None:
                        await each.stream.aclose() if hasattr(each.stream, "aclose") else None

        for index in range(5):
            path = "ab"[world.draw(4) == 0]
            demand = ["", "", "", "max-age=0", "max-age=1"][world.draw(5)]
            world.spawn(caller(path, "xy"[index % 2], world.draw(3) * 1.5, world.draw(5) > 0, demand))

        def check():
            assert not len(http._flights), "a flight is left behind"
            assert not edge.background._running, "a renewal is left behind"
            assert counters["open"] == 0, "a body is left open"
            store = http._store
            assert sum(sum(varies.values()) for varies in store._varies.values()) == len(store)
            assert all(entry.whole for entry in store._entries.values())

        return check

    return setup


@pytest.fixture
def without_event_loop(monkeypatch):
    monkeypatch.setattr(resilient.http.cache, "aclose_quietly", _close)
    monkeypatch.setattr(resilient.http.edge, "aclose_quietly", _close)
    monkeypatch.setattr(resilient.http.streams, "_close_to_the_end", _call)


@pytest.mark.usefixtures("without_event_loop")
def test_any_order():
    assert explore(flights_scenario(Cache(0)), runs=1500) == 1500


@pytest.mark.usefixtures("without_event_loop")
@pytest.mark.parametrize("broken", ["abandon", "leave", "land"])
def test_the_explorer_finds_what_is_broken(monkeypatch, broken):
    def abandon(self, leader):
        leader.flight = None

    def leave(self, passenger):
        passenger.followed.waiting.remove(passenger) if passenger in passenger.followed.waiting else None

    def land(self, leader, outcome):
        if leader.flight is not None:
            self._close(leader.flight)

    monkeypatch.setattr(Flights, broken, {"abandon": abandon, "leave": leave, "land": land}[broken])
    with pytest.raises(AssertionError, match="seed"):
        explore(flights_scenario(Cache(0)), runs=1500)


# -- flights alone ------------------------------------------------------------------------------------------------


def followed(count, expires_at=None):
    flights, leader = Flights(), Passenger()
    flights.lead(leader, "key", 1)
    others = [Passenger() for _ in range(count)]
    for other in others:
        flights.follow(other, flights.get("key"), expires_at)
    return flights, leader, others


def test_a_flight_that_lands_tells_all():
    flights, leader, others = followed(2)
    assert len(flights) == 1
    flights.land(leader, "outcome")
    assert [(other.ticket.granted, other.ticket.value) for other in others] == [(True, "outcome")] * 2
    assert (len(flights), leader.flight) == (0, None)
    flights.land(leader, "again")
    flights.tell(leader, "again")
    assert others[0].ticket.value == "outcome"


def test_those_who_follow_may_be_told_before_it_lands():
    flights, leader, others = followed(2)
    flights.tell(leader, ALONE)
    assert [other.ticket.value for other in others] == [ALONE] * 2
    assert flights.get("key") is leader.flight
    assert not leader.flight.waiting


def test_who_leads_goes_and_the_next_one_leads():
    flights, leader, (first, second, third) = followed(3)
    flights.leave(second)
    flights.abandon(leader)
    assert (first.ticket.value, first.flight.leader, third.ticket.granted) == (LEAD, first, False)
    flights.leave(first)  # just as it was to lead
    assert (third.ticket.value, third.flight.leader) == (LEAD, third)
    assert not second.ticket.granted
    flights.abandon(third)
    assert len(flights) == 0


def test_who_cannot_be_woken_does_not_lead():
    def closed():
        raise RuntimeError("the event loop is closed")

    flights, leader, (first, second) = followed(2)
    first.ticket.attach(closed)
    flights.abandon(leader)
    assert (first.flight, second.flight.leader) == (None, second)
    flights.follow(first, second.flight, None)
    first.ticket.attach(closed)
    flights.abandon(second)
    assert len(flights) == 0


def test_a_flight_that_was_replaced_does_not_end_the_new_one():
    flights, leader, others = followed(1)
    new = Passenger()
    flights.lead(new, "key", 2)
    flights.land(leader, ALONE)
    assert others[0].ticket.value is ALONE
    assert flights.get("key") is new.flight
    flights.abandon(new)
    assert flights.get("key") is None


def test_signs_show_their_names():
    assert (repr(LEAD), repr(ALONE)) == ("LEAD", "ALONE")


def test_how_many_are_known_to_stay_apart():
    flights = Flights()
    for key in range(3000):
        flights.set_apart(key, 0.0)
    assert flights.apart(2999, APART_SECONDS - 1)
    assert not flights.apart(2999, APART_SECONDS)
    assert not flights.apart(0, 1)
    assert len(flights._apart) == 1024
    flights.unite(2999)
    flights.unite("unknown")
    assert not flights.apart(2999, 1)


# -- the store alone ----------------------------------------------------------------------------------------------


def entry_of(store, primary="url", *, vary="", variant="", body=b"x", names=None, number=None, fields=()):
    entry = Entry(
        primary=primary,
        names=(primary,) if names is None else names,
        number=next(store.numbers) if number is None else number,
        vary=vary,
        variant=said(vary, {"a": variant, "b": variant}),
        status=200,
        fields=list(fields),
        extensions={},
        lifetime=Lifetime(10.0, 5.0, 20.0, must_revalidate=False),
        delay=2.0,
        received=100.0,
        length=None,
    )
    entry.body = body
    return entry


def test_the_age_of_an_entry():
    entry = entry_of(Store(1), fields=[(b"age", b"3"), (b"AGE", b"9"), (b"X-Age", b"1")])
    assert [entry.age(now) for now in (99.0, 100.0, 101.5)] == [5.0, 5.0, 6.5]
    assert [entry.over(now) for now in (124.9, 125.0)] == [False, True]
    assert entry.shown == [(b"X-Age", b"1")]


def test_what_is_whole():
    entry = entry_of(Store(1), body=b"ab")
    for length, body, whole in [
        (None, b"", True),
        (0, b"", True),
        (2, b"ab", True),
        (1, b"ab", False),
        (3, b"ab", False),
        (None, None, False),
        (None, b"x" * cache_store.BODY_BYTES, True),
        (None, b"x" * (cache_store.BODY_BYTES + 1), False),
    ]:
        entry.length, entry.body = length, body
        assert entry.whole == whole


def test_bytes_are_bounded():
    store = Store(1000)
    mebibyte = b"x" * (cache_store.BODY_BYTES - 1024)
    for number in range(100):
        assert store.add(entry_of(store, f"url{number}", body=mebibyte))
    assert len(store) == 64
    assert store.find("url36", {})[0] is not None
    assert store.find("url35", {})[0] is None
    huge = [(b"x", b"y" * cache_store.TOTAL_BYTES)]
    assert not store.add(entry_of(store, "huge", fields=huge))
    assert store.add(entry_of(store, "long", body=b"", fields=[(b"x", b"y" * (cache_store.TOTAL_BYTES - 1025))]))
    assert len(store) == 1
    store.wrote([f"url{number}" for number in range(100)])  # nothing is left by which those that went are known
    assert set(store._places) == set(store._varies) == {"long"}


def test_writes_that_there_is_no_room_for_count_for_all():
    store = Store(2)
    early = [entry_of(store, name) for name in "abcd"]
    for name in "abc":
        store.wrote([name])
    late = entry_of(store, "d")
    assert not any(store.add(entry) for entry in early)
    assert store.add(late)
    store.wrote(["c"])  # again: needs no room
    assert store.add(entry_of(store, "a"))


def test_of_all_that_fit_the_one_that_was_asked_for_last_counts():
    store = Store(9)
    for varies in (["", "a"], ["b", ""]):
        entries = [entry_of(store, "url", vary=vary, variant="x") for vary in varies]
        for entry in entries[::-1]:
            assert store.add(entry)
        assert store.find("url", {"a": "x", "b": "x"})[0] is entries[-1]
        assert store.find("url", {"a": "y", "b": "y"})[0] is entries[varies.index("")]


def test_the_least_recently_used_goes():
    store = Store(2)
    for name in "ab":
        store.add(entry_of(store, name))
    store.find("a", {})
    store.add(entry_of(store, "c"))
    assert [name for name in "abc" if store.find(name, {})[0] is not None] == ["a", "c"]


class Stored(RuleBasedStateMachine):
    """The store against a list that is searched from end to end."""

    ENTRIES = 4
    primaries = st.sampled_from(["one", "two", "three"])
    variants = st.sampled_from(["x", "y"])
    varies = st.sampled_from(["", "a", "a, b", "b"])

    def __init__(self):
        super().__init__()
        self.store = Store(self.ENTRIES)
        self.model = []  # the one used last comes last
        self.sent = []
        self.writes = []

    def fitting(self, primary, variant):
        headers = {"a": variant, "b": variant}
        return [
            each for each in self.model if each.primary == primary and each.variant == said(each.vary, headers)
        ]

    @rule(primary=primaries, vary=varies, variant=variants)
    def ask(self, primary, vary, variant):
        names = (primary, f"also {primary}") if primary == "one" else (primary,)
        self.sent.append(entry_of(self.store, primary, vary=vary, variant=variant, names=names))

    @rule(data=st.data())
    def add_one(self, data):
        if self.sent:
            self.add(self.sent.pop(data.draw(st.integers(0, len(self.sent) - 1))))

    @rule(primary=primaries, vary=varies, variant=variants)
    def ask_and_add(self, primary, vary, variant):
        self.ask(primary, vary, variant)
        self.add(self.sent.pop())

    def add(self, entry):
        outdated = any(entry.number < number and name in entry.names for name, number in self.recent())
        outdated = outdated or any(entry.number < number for _, number in self.forgotten())
        rival = next((each for each in self.model if each.place == entry.place), None)
        expected = not outdated and (rival is None or rival.number < entry.number)
        assert self.store.add(entry) == expected
        if rival is not None and not outdated:
            self.model.remove(rival)
            self.model.append(rival)
        if expected:
            if rival is not None:
                self.model.remove(rival)
            self.model = [*self.model, entry][-self.ENTRIES :]

    def recent(self):
        """Return the last write of each name, as many as there is room for."""
        last = {}
        for name, number in self.writes:
            last.pop(name, None)
            last[name] = number
        return list(last.items())[-self.ENTRIES :]

    def forgotten(self):
        return self.dropped if hasattr(self, "dropped") else []

    @rule(
        names=st.lists(
            st.sampled_from(["one", "two", "three", "also one", "other", "another"]),
            min_size=1,
            max_size=3,
            unique=True,
        )
    )
    def write(self, names):
        before = self.store._forgotten
        self.store.wrote(names)
        number = next(self.store.numbers) - 1
        self.writes += [(name, number) for name in names]
        self.model = [each for each in self.model if not set(each.names) & set(names)]
        if self.store._forgotten != before:
            self.dropped = [*self.forgotten(), ("any", self.store._forgotten)]

    @rule(primary=primaries, variant=variants)
    def find(self, primary, variant):
        found, told = self.store.find(primary, {"a": variant, "b": variant})
        fitting = self.fitting(primary, variant)
        assert found is max(fitting, key=lambda each: each.number, default=None)
        texts = sorted({each.vary for each in self.model if each.primary == primary})
        assert [vary for vary, _ in told] == texts
        for each in sorted(fitting, key=lambda each: each.vary):
            self.model.remove(each)
            self.model.append(each)

    @rule(primary=primaries, variant=variants)
    def drop(self, primary, variant):
        self.store.drop(primary, {"a": variant, "b": variant})
        for each in self.fitting(primary, variant):
            self.model.remove(each)

    @rule(data=st.data())
    def remove(self, data):
        if self.model:
            entry = data.draw(st.sampled_from(self.model))
            self.store.remove(entry)
            self.store.remove(entry)
            self.model.remove(entry)

    @rule()
    def clear(self):
        self.store.clear()
        self.model.clear()

    @invariant()
    def the_same_is_kept(self):
        store = self.store
        kept = [cachetools.Cache.__getitem__(store._entries, place) for place in store._entries]  # touches none
        assert sorted(map(id, kept)) == sorted(map(id, self.model))
        assert len(store) == len(self.model) <= self.ENTRIES
        assert sum(sum(varies.values()) for varies in store._varies.values()) == len(self.model)
        assert {place for places in store._places.values() for place in places} == {
            each.place for each in self.model
        }
        assert all(store._places.values())
        assert all(varies and all(varies.values()) for varies in store._varies.values())
        assert len(store._writes) <= self.ENTRIES


TestStored = Stored.TestCase
TestStored.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
