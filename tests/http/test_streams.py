"""Bodies of responses: released once, watched to their end, and read ahead only by those who asked for it."""

import asyncio
import gc
import threading

import anyio
import pytest

from resilient import Bulkhead, Cache, CircuitBreaker, Retry, Timeout, runtime
from resilient.errors import BulkheadFull
from resilient.http.streams import SyncWatch, _leaked
from resilient.testing import _finish, capture_events

from .flaky_server import FlakyServer, choose, chunked, ok, raw, reset_mid_body, sse, truncated

# -- released -------------------------------------------------------------------------------------------------


def test_a_permit_is_held_until_the_body_has_ended(kit):
    """A21: read to its end, closed, or broken."""

    async def scenario():
        bulkhead = Bulkhead(1, name="b")
        stub = kit.stub(
            lambda request: kit.response(200, b"one", b"two"),
            lambda request: kit.response(200, b"one", b"two"),
            lambda request: kit.response(200, b"one", kit.http.ReadError("reset")),
            lambda request: kit.response(500),
            lambda request: kit.http.Response(200, content=b"in memory"),
            lambda request: kit.response(200, headers={"Content-Type": "Text/Event-Stream; charset=utf-8"}),
            pool=9,
        )
        async with kit.client(kit.guard(stub, bulkhead)) as client:

            async def stream():
                return await kit.do(client.send, client.build_request("GET", "https://a/"), stream=True)

            response = await stream()
            with pytest.raises(BulkheadFull):
                await stream()
            assert await kit.read(response) == b"onetwo"
            assert bulkhead.statistics().in_use == 0
            response = await stream()
            assert bulkhead.statistics().in_use == 1
            await kit.close(response)
            await kit.close(response)
            assert bulkhead.statistics().in_use == 0
            response = await stream()
            with pytest.raises(kit.http.ReadError):
                await kit.read(response)
            assert bulkhead.statistics().in_use == 0
            for _ in range(3):  # a failure, what is in memory, and what has no end
                await stream()
                assert bulkhead.statistics().in_use == 0

    kit.run(scenario)


def test_a_permit_comes_back_from_a_response_that_nobody_closed(kit):
    """A21: when the next request is sent, and not in the middle of a garbage collection."""

    async def scenario():
        bulkhead = Bulkhead(1)
        stub = kit.stub(200, pool=9)
        transport = kit.guard(stub, bulkhead)
        response = await kit.send(transport, kit.request())
        del response
        stub.made.clear()
        gc.collect()
        assert (bulkhead.statistics().in_use, len(_leaked)) == (1, 1)
        response = await kit.send(transport, kit.request())
        assert (bulkhead.statistics().in_use, len(_leaked)) == (1, 0)
        await kit.close(response)
        assert bulkhead.statistics().in_use == 0

    kit.run(scenario)


def test_those_who_wait_get_the_permit_of_a_body_that_ends(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, 3.0, b"x"))
        transport = kit.guard(stub, Bulkhead(1, queue=5))
        ended = []

        def caller(delay):
            async def call():
                await kit.sleep(delay)
                response = await kit.send(transport, kit.request())
                await kit.read(response)
                await kit.close(response)
                ended.append(runtime.now())

            return call

        if kit.sync:
            clock = runtime.now.__self__
            clock.run_threads(*[lambda delay=delay: _finish(caller(delay)()) for delay in (0, 0.1, 0.2)])
        else:
            async with anyio.create_task_group() as group:
                for delay in (0, 0.1, 0.2):
                    group.start_soon(caller(delay))
        assert ended == [3.0, 6.0, 9.0]

    kit.run(scenario)


def test_two_bulkheads_watch_one_body(kit):
    async def scenario():
        one, two = Bulkhead(1), Bulkhead(1)
        stub = kit.stub(200)
        response = await kit.send(kit.guard(stub, one, Timeout(9), two), kit.request())
        assert (one.statistics().in_use, two.statistics().in_use) == (1, 1)
        await kit.close(response)
        assert (one.statistics().in_use, two.statistics().in_use, stub.made[0].closed) == (0, 0, 1)

    kit.run(scenario)


def test_threads_that_read_and_close_release_once(family):
    """A21: a permit that comes back twice would let one too many in."""
    _, ours = family

    class Contested(list):
        """Another thread comes along whenever something is about to be taken."""

        def pop(self, index):
            if not others:
                others.append(True)
                watched.release(None)
            return super().pop(index)

    released, others = [], []
    watched = SyncWatch(ours._FAMILY, None, None)
    watched._callbacks = Contested()
    watched.when_released(released.append)
    watched.release(None)
    assert (released, others) == ([None], [True])


def test_a_cache_sees_what_passes(kit):
    """What it looks at is the body on its way, and nobody waits for that."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, b"one", b"two", headers={"Cache-Control": "max-age=60"}))
        async with kit.client(kit.guard(stub, Cache(60), Bulkhead(1))) as client:
            assert (await kit.do(client.get, "https://a/")).content == b"onetwo"
            assert (await kit.do(client.get, "https://a/")).content == b"onetwo"
        assert (len(stub.seen), stub.open) == (1, 0)

    kit.run(scenario)


def test_what_is_watched_is_a_stream_of_the_family(kit):
    """A22: clients insist on their own base classes; and A29: of one colour."""

    async def scenario():
        response = await kit.send(kit.guard(kit.stub(200), Bulkhead(1)), kit.request())
        right, wrong = kit.http.SyncByteStream, kit.http.AsyncByteStream
        right, wrong = (right, wrong) if kit.sync else (wrong, right)
        assert isinstance(response.stream, right)
        assert not isinstance(response.stream, wrong)
        await kit.close(response)

    kit.run(scenario)


# -- after the headers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [truncated(), reset_mid_body(), chunked(b"x", end="broken")], ids=str)
def test_a_body_that_breaks_is_the_callers_error(kit, step):
    """A20, A23: never sent again, nor counted."""

    async def scenario():
        with FlakyServer([step, ok()]) as server:
            breaker = CircuitBreaker(consecutive=1)
            transport = kit.guard(kit.one_connection(), Timeout(9), Retry(wait=0), breaker)
            async with kit.client(transport) as client:
                with pytest.raises((kit.http.ReadError, kit.http.RemoteProtocolError)) as caught:
                    await kit.do(client.get, server.url)
                assert caught.value.request.url == server.url
                assert len(server.requests) == 1
                assert (await kit.do(client.get, server.url)).content == b"ok"

    kit.run_really(scenario)


@pytest.mark.parametrize("step", [truncated(), reset_mid_body(), chunked(b"x", end="broken")], ids=str)
def test_a_body_that_breaks_is_tried_again_with_buffer(kit, step):
    async def scenario():
        with FlakyServer([step, step, ok(b"whole")]) as server:
            transport = kit.guard(kit.one_connection(), Timeout(9), Retry(wait=0), Timeout(5), buffer=True)
            async with kit.client(transport) as client:
                response = await kit.do(client.get, server.url)
            assert (response.content, len(server.requests)) == (b"whole", 3)

    kit.run_really(scenario)


def test_an_unwanted_body_that_breaks_is_closed_all_the_same(kit):
    """A18: to read it was only an attempt to keep the connection."""

    async def scenario():
        with FlakyServer([raw(b"HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nx"), ok()]) as server:
            transport = kit.guard(kit.one_connection(), Retry(wait=0))
            async with kit.client(transport) as client:
                assert (await kit.do(client.get, server.url)).content == b"ok"
            assert server.connections == 2

    kit.run_really(scenario)


# -- buffer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "bound", "read"),
    [
        ((b"12345", b"67890"), 10, "all"),
        ((b"12345", b"67890", b"1"), 10, 3),
        ((b"12345678901", b"x"), 10, 1),
        ((b"",), 1, "all"),
        ((b"x" * 500_000, b"y" * 500_000), True, "all"),
        ((b"x" * 500_000, b"y" * 600_000, b"z"), True, 2),
    ],
    ids=["fits", "longer", "first is longer", "empty", "a megabyte", "more than a megabyte"],
)
def test_what_is_longer_than_the_buffer_is_passed_on_from_where_it_is(kit, pieces, bound, read):
    async def scenario():
        for policies in ([], [Timeout(5)], [Bulkhead(1)]):
            stub = kit.stub(lambda request: kit.response(200, *pieces))
            response = await kit.send(kit.guard(stub, *policies, buffer=bound), kit.request())
            assert (type(response.stream) is kit.http.ByteStream) == (read == "all")
            assert stub.made[0].read == (len(pieces) if read == "all" else read)
            assert stub.open == (0 if read == "all" else 1)
            assert await kit.read(response) == b"".join(pieces)
            await kit.close(response)
            assert stub.made[0].closed == 1

    kit.run(scenario)


def test_only_what_is_read_ahead_is_kept(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[b"12345"] * 100))
        response = await kit.send(kit.guard(stub, buffer=10), kit.request())
        assert stub.made[0].read == 3
        iterator = response.iter_raw() if kit.sync else response.aiter_raw()
        assert await kit.chunks(iterator) == [b"12345"] * 100

    kit.run(scenario)


@pytest.mark.parametrize(
    "headers",
    [{"Content-Length": "11"}, {"Content-Type": "text/event-stream"}, {"content-type": "TEXT/Event-Stream;x=y"}],
)
def test_what_is_not_read_ahead_at_all(kit, headers):
    """Z8, A26: server-sent events never, and nothing that says that it is too long."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, b"12345", b"678901", headers=headers))
        response = await kit.send(kit.guard(stub, Timeout(5), buffer=10), kit.request())
        assert stub.made[0].read == 0
        assert await kit.read(response) == b"12345678901"
        upgrade = kit.stub(lambda request: kit.response(101, b"x"))
        response = await kit.send(kit.guard(upgrade, Timeout(5), buffer=10), kit.request())
        assert upgrade.made[0].read == 0

    kit.run(scenario)


@pytest.mark.parametrize("length", ["²", "1_0", "-1", "", "9" * 25, "x"])
def test_lengths_that_are_none(kit, length):
    """A45: the body is read to see how long it is."""

    async def scenario():
        headers = [(b"Content-Length", length.encode())]
        stub = kit.stub(lambda request: kit.response(503, b"12345", headers=headers), 200)
        response = await kit.send(kit.guard(stub, Retry(wait=0), buffer=10), kit.request())
        assert (response.status_code, stub.open) == (200, 0)

    kit.run(scenario)


def test_a_body_that_breaks_while_it_is_read_ahead_is_closed_before_the_wait(kit):
    """A16."""

    async def scenario():
        broken = kit.http.ReadError("reset")
        stub = kit.stub(lambda request: kit.response(200, b"x", broken), 200)
        response = await kit.send(kit.guard(stub, Retry(wait=1), buffer=True), kit.request())
        assert await kit.read(response) == b"body"
        assert (stub.times, stub.closed_at, runtime.now()) == ([0, 1], [0, 1], 1)

    kit.run(scenario)


@pytest.mark.parametrize("interrupt", [True, False])
@pytest.mark.parametrize("total", [[Timeout(60, name="total")], []])
def test_a_slow_body_that_is_read_ahead_belongs_to_its_attempt(kit, total, interrupt):
    """A32: so the time limit of the attempt holds for it."""

    async def scenario():
        slow = [0.4, b"x"] * 100
        stub = kit.stub(lambda request: kit.response(200, *slow), 200)
        attempt = Timeout(1, interrupt=interrupt, name="attempt")
        policies = *total, Retry(wait=1, name="retry"), attempt
        with capture_events() as seen:
            response = await kit.send(kit.guard(stub, *policies, buffer=True), kit.request())
        assert await kit.read(response) == b"body"
        scheduled = [event for event in seen if event.name == "retry.scheduled"]
        assert [(event.policy, event.error) for event in scheduled] == [("retry", "TimedOut")]
        assert stub.times == [0, pytest.approx(2.2 if kit.sync else 2.0)]
        assert stub.open == 0

    kit.run(scenario)


def test_a_failing_response_is_buffered_too(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(503, b"busy", headers={"Content-Length": "4"}))
        async with kit.client(kit.guard(stub, Retry(3, wait=0), buffer=True)) as client:
            response = await kit.do(client.get, "https://a/")
        assert (response.status_code, response.content, stub.open) == (503, b"busy", 0)

    kit.run(scenario)


# -- generators -----------------------------------------------------------------------------------------------


def test_bodies_that_are_left_early_leave_no_generators_behind(async_kit):
    """Trio warns of each, and warnings are errors here. Only what we put around the body is looked at."""
    kit = async_kit

    async def scenario():
        for options in ({}, {"buffer": 3}):
            stub = kit.stub(lambda request: kit.response(200, b"one", b"two", b"three"))
            response = await kit.send(kit.guard(stub, Timeout(9), Bulkhead(1), **options), kit.request())
            iterator = response.stream.__aiter__()
            assert await anext(iterator) == b"one"
            await iterator.aclose()
            assert response.stream._chunks.ag_frame is None
            await kit.close(response)
            response = await kit.send(kit.guard(stub, Timeout(9), Bulkhead(1), **options), kit.request())
            await kit.close(response)
            assert stub.open == 0
        gc.collect()

    kit.run(scenario)


def test_a_body_that_is_closed_while_somebody_reads_it(async_kit):
    """As when a client is closed with streams under way."""
    kit = async_kit

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, b"one", 5.0, b"two"))
        bulkhead = Bulkhead(1)
        response = await kit.send(kit.guard(stub, bulkhead), kit.request())
        read = []

        async def reader():
            read.extend([chunk async for chunk in response.stream])

        async with anyio.create_task_group() as group:
            group.start_soon(reader)
            await kit.sleep(1)
            await response.stream.aclose()
            assert bulkhead.statistics().in_use == 0
        assert read == [b"one", b"two"]

    kit.run(scenario)


def test_events_come_one_by_one(kit):
    """Z8, A26: with all that could hold them up."""

    async def scenario():
        seen = threading.Semaphore(1)
        step = sse(["one", "two", "three"], every=lambda: seen.acquire(blocking=False))
        with FlakyServer(step) as server:
            async with kit.client(kit.Transport(kit.real(), buffer=True)) as client:
                request = client.build_request("GET", server.url)
                response = await kit.do(client.send, request, stream=True)
                chunks = response.iter_raw() if kit.sync else response.aiter_raw()
                for name in ("one", "two", "three"):
                    chunk = next(chunks) if kit.sync else await anext(chunks)
                    assert chunk == f"data: {name}\n\n".encode()
                    seen.release()
                seen.release()
                assert await kit.chunks(chunks) == []

    kit.run_really(scenario)


def test_the_streams_of_httpx2(kit):
    """Z8: `sse()` of its clients."""
    if kit.http.__name__ != "httpx2":
        pytest.skip("httpx has none")

    async def scenario():
        with FlakyServer(sse(["one", "id: 7\ndata: two"])) as server:
            async with kit.client(kit.Transport(kit.real())) as client:
                if kit.sync:
                    with client.sse(server.url) as source:
                        events = list(source)
                else:
                    async with client.sse(server.url) as source:
                        events = [event async for event in source]
            assert [(event.data, event.id) for event in events] == [("one", ""), ("two", "7")]

    kit.run_really(scenario)


def test_a_switched_protocol_is_left_alone(kit):
    """Z8, A24, A56: a 101 is not read, not closed, and has no time limit."""

    async def scenario():
        switching = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n"
        with FlakyServer(choose(lambda request: raw(switching, close=False))) as server:
            async with kit.client(kit.guard(kit.real(), Timeout(0.1), Retry(), buffer=True)) as client:
                headers = {"Connection": "upgrade", "Upgrade": "echo"}
                request = client.build_request("GET", server.url, headers=headers)
                response = await kit.do(client.send, request, stream=True)
                assert (response.status_code, response.is_closed) == (101, False)
                stream = response.extensions["network_stream"]
                await kit.sleep(0.15)
                await kit.do(stream.write, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", timeout=5)
                assert (await kit.do(stream.read, 12, timeout=5)) == switching[:12]
                assert server.wait_until(lambda: len(server.requests) == 2)
                await kit.close(response)

    kit.run_really(scenario)


def test_a_loop_that_has_gone_leaves_a_permit_that_comes_back(async_kit):
    """D27: the watched body is collected after its event loop has been closed."""
    if async_kit.colour == "trio":
        return
    kit = async_kit
    bulkhead = Bulkhead(1)
    stub = kit.stub(200, pool=9)
    transport = kit.guard(stub, bulkhead)
    held = []

    async def leave():
        held.append(await kit.send(transport, kit.request()))

    asyncio.run(leave())
    held.clear()
    stub.made.clear()
    gc.collect()

    async def again():
        await kit.close(await kit.send(transport, kit.request()))

    asyncio.run(again())
    assert bulkhead.statistics().in_use == 0
