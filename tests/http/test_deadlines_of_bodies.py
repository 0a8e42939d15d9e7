"""Deadlines that hold while the body is read, and those that real sockets keep."""

import asyncio
import contextlib
import time

import anyio
import pytest

from resilient import Bulkhead, CircuitBreaker, Pipeline, Retry, Timeout, deadline, runtime
from resilient.errors import TimedOut
from resilient.testing import capture_events

from .conftest import Kit
from .flaky_server import (
    FlakyServer,
    H2Server,
    choose,
    chunked,
    drip,
    drip_headers,
    hang,
    hanging_port,
    informational_flood,
    ok,
    sse,
)

FOUR = ("connect", "read", "write", "pool")


def slow_until(kit, name, error):
    """Wait as long as a timeout of the request says, and raise the error for it."""

    async def slow(request):
        await kit.sleep(request.extensions["timeout"][name])
        raise getattr(kit.http, error)(name)

    return slow


# -- bodies ---------------------------------------------------------------------------------------------------


def test_the_body_ends_by_the_deadline_of_the_whole_call(kit):
    """A32."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.4, b"x"] * 99))
        transport = kit.guard(stub, Timeout(3, name="total"), Retry(), Timeout(2))
        async with kit.client(transport) as client:
            with pytest.raises(kit.http.TimeoutException) as caught, capture_events() as seen:
                await kit.do(client.get, "https://a/")
        assert (caught.value.policy, caught.value.seconds) == ("total", 3.0)
        assert caught.value.request.url == "https://a/"
        assert runtime.now() == pytest.approx(3.2 if kit.sync else 3.0)
        assert [event.name for event in seen] == ["timeout.expired"]
        assert (stub.open, len(stub.seen)) == (0, 1)

    kit.run(scenario)


@pytest.mark.parametrize(
    ("before", "inside"), [([30, 5], [2]), ([5, 30], [2]), ([5, 30], []), ([30, 9, 5], [2, 1])]
)
def test_of_several_deadlines_of_the_whole_call_the_soonest_limits_the_body(kit, before, inside):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 99))
        policies = [*map(Timeout, before), Retry(), *map(Timeout, inside)]
        response = await kit.send(kit.guard(stub, *policies), kit.request())
        with pytest.raises(TimedOut) as caught:
            await kit.read(response)
        assert (caught.value.seconds, runtime.now()) == (5.0, 5.0)

    kit.run(scenario)


def test_without_a_loop_the_inner_deadlines_are_those_of_the_attempt(kit):
    """As in the preset, if it makes one attempt only."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 99))
        response = await kit.send(kit.guard(stub, Bulkhead(1), Timeout(5), Timeout(2)), kit.request())
        with pytest.raises(TimedOut) as caught:
            await kit.read(response)
        assert (caught.value.seconds, runtime.now()) == (5.0, 5.0)

    kit.run(scenario)


@pytest.mark.parametrize("around", [None, 5.0])
@pytest.mark.parametrize("total", [None, 4.0, 30.0])
def test_the_deadline_of_an_attempt_does_not_limit_the_body(kit, around, total):
    """A32, A37: only that of the whole call does, or one around it."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 7))
        policies = [Retry(), CircuitBreaker(), Timeout(2)]
        transport = kit.guard(stub, *([] if total is None else [Timeout(total)]), *policies)
        request = kit.request(extensions={"timeout": dict.fromkeys(FOUR, 60.0)})
        scope = Timeout(5, interrupt=False)
        limit = None if around is None else deadline.Deadline(runtime.now() + around, scope)
        with deadline.published(limit):
            response = await kit.send(transport, request)
            ends = min(filter(None, (around, total)), default=None)
            left = stub.seen[0].request.extensions["timeout"]["read"]
            assert left == 60.0
            assert await kit.read(response) == b"x" * 7
            assert runtime.now() == 3.5
        assert (
            getattr(response.stream, "limit", None) is None if ends is None else response.stream.limit.at == ends
        )

    kit.run(scenario)


def test_the_transport_sees_what_is_left_for_the_body(kit):
    """A33: it looks at the timeouts again before each read; those of the attempt must not hold any more."""

    async def scenario():
        kept = []

        async def answer(request):
            kept.append(request.extensions["timeout"])
            await kit.sleep(1)
            return kit.response(200)

        request = kit.request(extensions={"timeout": {"read": 60.0, "write": None}})
        for policies, left in (
            ([Timeout(10), Retry(), Timeout(2)], 9.0),
            ([Retry(), Timeout(2)], None),
        ):
            await kit.close(await kit.send(kit.guard(kit.stub(answer), *policies), request))
            assert kept[-1] == ({"read": 60.0, "write": None} if left is None else kit.capped(left))

    kit.run(scenario)


@pytest.mark.parametrize("error", ["ReadTimeout", None])
def test_a_read_that_times_out_at_the_deadline_names_it(kit, error):
    """The timeout of the read and the deadline are the same moment: the deadline is the reason."""

    async def scenario():
        late = TimeoutError("x") if error is None else getattr(kit.http, error)("x")
        stub = kit.stub(lambda request: kit.response(200, b"x", 1.9995, late))
        response = await kit.send(kit.guard(stub, Timeout(2, name="total")), kit.request())
        with pytest.raises(kit.http.TimeoutException) as caught:
            await kit.read(response)
        assert (caught.value.policy, caught.value.__cause__, stub.open) == ("total", late, 0)

    kit.run(scenario)


def test_a_read_that_times_out_before_the_deadline_does_not(kit):
    async def scenario():
        for late in (kit.http.ReadTimeout("x"), kit.http.ReadError("x")):
            stub = kit.stub(lambda request, late=late: kit.response(200, b"x", 1.0, late))
            response = await kit.send(kit.guard(stub, Timeout(2)), kit.request())
            with pytest.raises(type(late)) as caught:
                await kit.read(response)
            assert caught.value is late

    kit.run(scenario)


def test_sockets_see_the_deadline_while_the_body_is_read(sync_kit):
    """A32: and only then, as between two chunks the thread does something else."""
    kit = sync_kit

    async def scenario():
        left = []

        class Body(kit.http.SyncByteStream):
            def __iter__(self):
                for _ in range(3):
                    left.append(deadline.remaining())
                    runtime.sleep(1)
                    yield b"x"

        stub = kit.stub(kit.http.Response(200, stream=Body()))
        response = await kit.send(kit.guard(stub, Timeout(9), Retry(), Timeout(5)), kit.request())
        for _chunk in response.iter_raw():
            assert deadline.remaining() is None
        assert left == [9.0, 8.0, 7.0]

    kit.run(scenario)


def test_whoever_reads_can_have_a_tighter_deadline(sync_kit):
    kit = sync_kit

    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 7))
        response = await kit.send(kit.guard(stub, Timeout(9, name="total")), kit.request())
        reader = deadline.Deadline(1.2, Timeout(1, interrupt=False, name="reader"))
        with deadline.published(reader), pytest.raises(TimedOut) as caught:
            response.read()
        assert caught.value.policy == "reader"

    kit.run(scenario)


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {"Content-Type": "text/event-stream; charset=utf-8"}), (101, {"Upgrade": "x"})]
)
def test_what_is_meant_to_go_on_has_no_deadline(kit, status, headers):
    """Z8."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(status, *[9.0, b"x"] * 9, headers=headers))
        response = await kit.send(kit.guard(stub, Timeout(3), Bulkhead(1)), kit.request())
        assert (await kit.read(response), runtime.now()) == (b"x" * 9, 81.0)

    kit.run(scenario)


def test_the_deadline_of_a_body_may_change_while_it_is_read(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[1.0, b"x"] * 99))
        response = await kit.send(kit.guard(stub, Timeout(50)), kit.request())
        response.stream.limit = deadline.Deadline(5.5, Timeout(5.5, name="first"))
        chunks = response.iter_raw() if kit.sync else response.aiter_raw()
        for _ in range(3):
            assert (next(chunks) if kit.sync else await anext(chunks)) == b"x"
        response.stream.limit = deadline.Deadline(7.5, Timeout(7.5, name="second"))
        with pytest.raises(TimedOut) as caught:
            await kit.chunks(chunks)
        assert (caught.value.policy, runtime.now()) == ("second", 8.0 if kit.sync else 7.5)

    kit.run(scenario)


def test_a_pipeline_of_its_own_scope_only(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 9))
        response = await kit.send(kit.Transport(stub, pipeline=Pipeline(Timeout(2, name="only"))), kit.request())
        with pytest.raises(TimedOut) as caught:
            await kit.read(response)
        assert caught.value.policy == "only"

    kit.run(scenario)


@pytest.mark.parametrize("where", ["around", "pipeline"])
def test_a_deadline_cancels_who_reads_a_body_once(family, where):
    """A75: twice would be too much for httpcore, which waits when it closes a connection that was cancelled."""
    kit = Kit(*family, "asyncio")
    seen = []

    class Hangs(kit.http.AsyncByteStream):
        async def __aiter__(self):
            yield b"x"
            try:
                await kit.sleep(60)
            except asyncio.CancelledError:
                seen.append(asyncio.current_task().cancelling())
                raise

    async def scenario():
        stub = kit.stub(lambda request: kit.http.Response(200, stream=Hangs()))
        limit = Timeout(2, name="limit")
        guard = kit.guard(stub, *([limit] if where == "pipeline" else []), Retry(), Timeout(9), buffer=True)
        with pytest.raises(TimedOut, match="limit"):
            async with limit if where == "around" else contextlib.nullcontext():
                await kit.send(guard, kit.request())
        assert (seen, asyncio.current_task().cancelling(), runtime.now()) == ([1], 0, 2.0)

    kit.run(scenario)


@pytest.mark.parametrize(("inner", "outer"), [(2, 30), (30, 2)])
def test_of_two_transports_around_each_other_the_sooner_deadline_holds(kit, inner, outer):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(200, *[0.5, b"x"] * 99))
        transport = kit.guard(kit.guard(stub, Timeout(inner)), Timeout(outer))
        response = await kit.send(transport, kit.request())
        with pytest.raises(TimedOut) as caught:
            await kit.read(response)
        assert (caught.value.seconds, runtime.now(), stub.open) == (2.0, 2.0, 0)

    kit.run(scenario)


# -- on real sockets ------------------------------------------------------------------------------------------

DRIPS = [drip_headers(), drip(), chunked(*[b"x"] * 1000, every=0.01), informational_flood(every=0.01)]
HANGS = [hang(), hang(read=False)]
SHORT, LONG = 0.06, 9.0


async def outlast(kit, step, own):
    """Send a request to a server that takes ten seconds or for ever, and return how long that took us."""
    with FlakyServer(step) as server, capture_events() as seen:
        transport = kit.guard(kit.real(), Timeout(SHORT, name="total"), Timeout(LONG))
        async with kit.client(transport, timeout=own) as client:
            started = time.monotonic()
            content = b"x" * 20_000_000 if "read=False" in step.name else b""
            with pytest.raises(kit.http.TimeoutException) as caught:
                await kit.do(client.put, server.url, content=content)
            took = time.monotonic() - started
        assert isinstance(caught.value, TimedOut)
        assert (caught.value.policy, caught.value.request.url) == ("total", server.url)
        assert [event.name for event in seen] == ["timeout.expired"]
        return took


@pytest.mark.filterwarnings("ignore:Async generator 'httpx._content.ByteStream:ResourceWarning")  # of httpx itself
@pytest.mark.parametrize("step", [*DRIPS, *HANGS], ids=str)
def test_a_server_that_takes_its_time(kit, step):
    """A32, A35, A37: total deadlines against whatever drips, in sync code too."""
    assert SHORT - 0.005 <= kit.run_really(outlast, kit, step, None) < SHORT + 2.5


@pytest.mark.parametrize("step", DRIPS, ids=str)
def test_a_server_that_drips_faster_than_any_timeout(sync_kit, step):
    """A32: so that no timeout of the request has to be lowered."""
    assert SHORT - 0.005 <= sync_kit.run_really(outlast, sync_kit, step, 0.05) < SHORT + 2.5


def test_a_server_that_does_not_accept(kit):
    """A9, A39: nothing was sent, so that a POST may be repeated."""

    async def scenario():
        with hanging_port() as port:
            transport = kit.guard(kit.real(), Timeout(SHORT, name="total"))
            async with kit.client(transport, timeout=None) as client:
                with pytest.raises(TimedOut) as caught:
                    await kit.do(client.post, f"http://127.0.0.1:{port}")
            assert caught.value.policy == "total"

    kit.run_really(scenario)


def test_a_full_pool(kit):
    """A38: the deadline holds there as well; and what the client waited for is nobody's fault."""

    async def scenario():
        breaker = CircuitBreaker(consecutive=1)
        with FlakyServer(sse(["x"], end="hang")) as server:
            inner = kit.one_connection()
            async with kit.client(kit.guard(inner, Timeout(SHORT, name="total"))) as client:
                first = await kit.do(client.send, client.build_request("GET", server.url), stream=True)
                with pytest.raises(TimedOut) as caught:
                    await kit.do(client.get, server.url)
                assert caught.value.policy == "total"
                patient = kit.guard(inner, Timeout(LONG), breaker)
                timeouts = {"timeout": dict.fromkeys(FOUR, 5.0) | {"pool": 0.02}}
                for _ in range(2):
                    with pytest.raises(kit.http.PoolTimeout):
                        await kit.send(patient, kit.request(url=server.url, extensions=timeouts))
                await kit.close(first)

    kit.run_really(scenario)


def test_the_next_attempt_gets_a_connection_of_its_own(kit):
    async def scenario():
        with FlakyServer([hang(), drip_headers(), ok(b"done")]) as server:
            inner = kit.one_connection()
            transport = kit.guard(inner, Timeout(LONG), Retry(3, wait=0), Timeout(0.08))
            async with kit.client(transport) as client:
                response = await kit.do(client.get, server.url)
            assert (response.content, server.connections) == (b"done", 3)
            assert server.wait_until(lambda: server.open_connections == 0)

    kit.run_really(scenario)


def test_after_a_deadline_the_client_works_as_before(kit):
    """Deadlines of one request do not stay with a connection that it leaves behind."""

    async def scenario():
        with FlakyServer(ok(b"done")) as server:
            transport = kit.guard(kit.real(), Timeout(0.15))
            async with kit.client(transport) as client:
                for _ in range(3):
                    assert (await kit.do(client.get, server.url)).content == b"done"
                    await kit.sleep(0.06)
            assert server.connections == 1

    kit.run_really(scenario)


def test_http2(kit):
    async def scenario():
        with H2Server([hang(), ok(b"done")]) as server:
            inner = kit.real(http1=False, http2=True)
            transport = kit.guard(inner, Timeout(LONG), Retry(wait=0), Timeout(SHORT))
            async with kit.client(transport) as client:
                assert (await kit.do(client.get, server.url)).content == b"done"

    kit.run_really(scenario)


def test_the_others_on_the_connection_go_on(async_kit):
    """A63: a deadline ends its own stream of HTTP/2 only. In sync code httpcore gives the connection up."""
    kit = async_kit

    async def scenario():
        with H2Server(choose(lambda request: hang() if request.target == "/hang" else ok(b"done"))) as server:
            inner = kit.real(http1=False, http2=True)
            hurried, patient = kit.guard(inner, Timeout(SHORT)), kit.guard(inner, Timeout(LONG))
            async with kit.client(patient, timeout=None) as client:
                assert (await client.get(server.url)).content == b"done"
                with pytest.raises(TimedOut):
                    await kit.send(hurried, kit.request(url=server.url + "/hang"))
                assert (await client.get(server.url)).content == b"done"
            assert server.connections == 1

    kit.run_really(scenario)


def test_a_task_that_is_cancelled_is_cancelled(async_kit):
    """D7: a deadline and a cancellation are different things."""
    kit = async_kit

    async def scenario():
        with FlakyServer(hang()) as server:
            async with kit.client(kit.guard(kit.real(), Timeout(LONG), Retry(), Timeout(LONG))) as client:
                with anyio.move_on_after(0.05) as scope:
                    await client.get(server.url)
                assert scope.cancelled_caught
            assert server.wait_until(lambda: server.open_connections == 0)

    kit.run_really(scenario)
