"""Responses that nobody will see are closed: before anybody waits, and whatever else goes wrong."""

import asyncio
import contextlib

import anyio
import pytest

from resilient import CircuitBreaker, Fallback, Pipeline, Retry, Timeout, runtime
from resilient.errors import TimedOut
from resilient.policy import Policy
from resilient.testing import capture_events

from .conftest import Kit
from .flaky_server import FlakyServer, chunked, drip, ok, status


def test_a_response_is_closed_before_the_wait(kit):
    """A16: the stub has one connection, and would answer PoolTimeout."""

    async def scenario():
        stub = kit.stub(503, 429, 200)
        response = await kit.send(kit.guard(stub, Timeout(60), Retry(wait=5), Timeout(10)), kit.request())
        assert (stub.times, stub.closed_at, stub.open) == ([0, 5, 10], [0, 5], 1)
        await kit.close(response)
        assert [body.closed for body in stub.made] == [1, 1, 1]

    kit.run(scenario)


@pytest.mark.parametrize("where", ["on", "wait", "stop", "failed"])
def test_a_response_is_closed_when_a_hook_raises(kit, where):
    """A17."""

    def hook(_argument):
        raise ZeroDivisionError("hook")

    async def scenario():
        stub = kit.stub(503)
        pipeline = {
            "on": lambda: Pipeline(Retry(on=hook)),
            "wait": lambda: Pipeline(Retry(wait=hook)),
            "stop": lambda: Pipeline(Retry(hook, on={503})),
            "failed": lambda: Pipeline(Retry(), failed=hook),
        }[where]()
        with pytest.raises(ZeroDivisionError):
            await kit.send(kit.Transport(stub, pipeline=pipeline), kit.request())
        assert (len(stub.seen), stub.open) == (1, 0)

    kit.run(scenario)


def test_a_response_is_closed_when_the_predicate_raises_and_the_call_is_made_again(kit):
    """A17: that error belongs to nobody's response, and yet there is one."""

    def failed(response):
        if response.status_code != 200:
            raise ZeroDivisionError("hook")

    async def scenario():
        stub = kit.stub(202, 204, 200)
        pipeline = Pipeline(Retry(on=ZeroDivisionError, wait=0), failed=failed)
        response = await kit.send(kit.Transport(stub, pipeline=pipeline), kit.request())
        assert (response.status_code, len(stub.seen), stub.open) == (200, 3, 1)

    kit.run(scenario)


def test_a_response_is_closed_when_the_sleep_is_interrupted(sync_kit, monkeypatch):
    """A17, D21."""
    kit = sync_kit

    async def scenario():
        def sleep(seconds):
            assert stub.open == 0
            raise KeyboardInterrupt

        stub = kit.stub(503)
        monkeypatch.setattr(runtime, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            await kit.send(kit.guard(stub, Retry(wait=1)), kit.request())
        assert stub.open == 0

    kit.run(scenario)


@pytest.mark.parametrize("after", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
def test_a_response_is_closed_when_the_task_is_cancelled(async_kit, after):
    """A17, A28, D1: in the sleep, while it waits for the answer, and just as that comes."""
    kit = async_kit

    async def scenario():
        async def slow(request):
            await kit.sleep(1)
            return 503

        stub = kit.stub(slow)
        with anyio.move_on_after(after):
            await kit.send(kit.guard(stub, Retry(3, wait=1)), kit.request())
            raise AssertionError("not cancelled")
        assert (stub.open, runtime.now()) == (0, after)

    kit.run(scenario)


def test_a_response_is_closed_when_the_task_is_cancelled_while_it_is_read(async_kit):
    """A18, A28: to read it was only an attempt to keep the connection."""
    kit = async_kit

    async def scenario():
        stub = kit.stub(kit.response(503, 60.0, b"x", headers={"Content-Length": "1"}))
        with anyio.move_on_after(0.02):
            await kit.send(kit.guard(stub, Retry(wait=0)), kit.request())
        assert (stub.open, runtime.now()) == (0, 0.02)

    kit.run(scenario)


def test_a_response_that_is_slow_to_close_does_not_hold_up_a_cancelled_task(async_kit):
    """A28: shielded, but not for long."""
    kit = async_kit

    async def scenario():
        response = kit.response(503)
        response.stream.aclose = lambda: kit.sleep(60)
        with anyio.move_on_after(2):
            await kit.send(kit.guard(kit.stub(response), Retry(on=lambda error: True, wait=5)), kit.request())
        assert 2 <= runtime.now() <= 3

    kit.run(scenario)


class SlowToClose:
    """A body that takes half a second to close, once: httpcore does not go on with it either."""

    def __init__(self, response):
        self.begun = self.closed = 0
        response.stream.aclose = self.aclose

    async def aclose(self):
        self.begun += 1
        if self.begun == 1:
            await anyio.sleep(0.5)
            self.closed += 1


@pytest.mark.parametrize(("status", "buffer"), [(503, False), (200, True)])
def test_a_deadline_that_passes_while_a_response_is_closed(async_kit, status, buffer):
    """A28: a pool would count a connection for ever that was not closed to the end."""
    kit = async_kit

    async def scenario():
        async def slow(request):
            await kit.sleep(0.8)
            return response

        response = kit.response(status)
        body = SlowToClose(response)
        guard = kit.guard(kit.stub(slow), Timeout(1), Retry(wait=0), buffer=buffer)
        with contextlib.suppress(TimedOut):  # a body that was read in time may be good
            assert (await kit.send(guard, kit.request())).status_code == 200
        assert (body.closed, runtime.now()) == (1, 1.3)

    kit.run(scenario)


def test_a_task_that_is_cancelled_twice_while_a_response_is_closed(family):
    """A28: the shields of anyio do not hold against asyncio's own cancellation."""
    kit = Kit(*family, "asyncio")

    async def scenario():
        response = kit.response(503)
        body = SlowToClose(response)
        transport = kit.guard(kit.stub(response), Retry(wait=0))
        task = asyncio.create_task(kit.send(transport, kit.request()))
        for _ in range(2):
            await kit.sleep(0.1)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (body.closed, runtime.now()) == (1, 0.5)

    kit.run(scenario)


def test_a_task_that_is_cancelled_while_a_body_is_closed_that_took_too_long(family):
    kit = Kit(*family, "asyncio")

    async def scenario():
        response = kit.response(200, 60.0, b"x")
        body = SlowToClose(response)
        response = await kit.send(kit.guard(kit.stub(response), Timeout(2)), kit.request())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.1):
                await kit.read(response)
        assert (body.closed, runtime.now()) == (1, 2.5)

    kit.run(scenario)


@pytest.mark.parametrize("outer", ["policy", "around"])
def test_a_response_is_closed_when_a_deadline_passes_just_as_it_comes(async_kit, outer):
    """A28: whoever wins, nothing is left open."""
    kit = async_kit

    async def scenario():
        async def slow(request):
            await kit.sleep(1)
            return kit.response(200)

        stub = kit.stub(slow)
        transport = kit.guard(stub, Timeout(1)) if outer == "policy" else kit.guard(stub)
        try:
            with anyio.fail_after(1 if outer == "around" else 9):
                response = await kit.send(transport, kit.request())
            await kit.close(response)
        except TimeoutError:
            pass
        assert stub.open == 0

    kit.run(scenario)


def test_a_response_is_closed_when_something_else_answers(kit):
    """A16: a fallback inside or outside of the retries."""

    async def scenario():
        for policies in ([Fallback], [Retry, Fallback], [Fallback, Retry]):
            stub = kit.stub(503)
            answer = kit.http.Response(200, content=b"instead")
            chain = [kind(answer) if kind is Fallback else kind(2, wait=0) for kind in policies]
            response = await kit.send(kit.guard(stub, *chain), kit.request())
            assert (response.status_code, stub.open) == (200, 0)

    kit.run(scenario)


def test_a_late_answer_is_closed_before_the_wait(kit):
    """A36: from a transport that does not look at its timeouts, where nobody interrupts it."""

    async def scenario():
        async def slow(request):
            await kit.sleep(2)
            return 200

        for timeout in (None, {"connect": 0.5, "read": 0.5, "write": 0.5, "pool": 0.5}):
            stub = kit.stub(slow, 200)
            transport = kit.guard(stub, Retry(wait=1), Timeout(1, interrupt=False))
            started = runtime.now()
            extensions = {} if timeout is None else {"timeout": timeout}
            response = await kit.send(transport, kit.request(extensions=extensions))
            assert [at - started for at in stub.times] == [0, 3]
            assert [at - started for at in stub.closed_at] == [2]
            await kit.close(response)

    kit.run(scenario)


def test_no_connections_leak_in_300_retries(kit):
    """A16, A18, A75: a pool of one, real sockets, and bodies that are read so that the connection can be kept."""

    async def scenario():
        with FlakyServer(status(503, b"x" * 1000)) as server:
            inner = kit.one_connection()
            retry = Retry(301, wait=0)
            async with kit.client(kit.guard(inner, Timeout(60), retry, Timeout(20)), timeout=5) as client:
                response = await kit.do(client.get, server.url)
                assert (response.status_code, len(server.requests)) == (503, 301)
                assert len(inner._pool.connections) == 1
            assert server.connections == 1
            assert server.wait_until(lambda: server.open_connections == 0)

    kit.run_really(scenario)


@pytest.mark.parametrize(
    ("step", "connections"),
    [
        (status(503, b"x" * 1000), 1),
        (status(503, b"x" * 200_000), 2),
        (chunked(b"x", end="hang"), 2),
        (drip(b"x" * 50), 2),
    ],
    ids=["short", "long", "unknown", "slow"],
)
def test_how_much_of_an_unwanted_body_is_read(kit, step, connections):
    """A18: what is short, is read, so that its connection can be used again; but not for long."""

    async def scenario():
        with FlakyServer([step, ok()]) as server, capture_events() as seen:
            retry = Retry(2, on={200, 503}, wait=0)
            transport = kit.guard(kit.one_connection(), Timeout(20), retry, Timeout(9))
            async with kit.client(transport) as client:
                response = await kit.do(client.get, server.url)
            assert (response.content, server.connections) == (b"ok", connections)
        assert "timeout.expired" not in [event.name for event in seen]

    kit.run_really(scenario)


class Broken(Policy):
    """A policy that fails once the answer is there."""

    def link(self, nxt, edge):
        def guard(call):
            nxt(call)
            raise LookupError("broken")

        return guard

    def alink(self, nxt, edge):
        async def guard(call):
            await nxt(call)
            raise LookupError("broken")

        return guard


def test_a_policy_that_breaks_leaks_nothing(kit):
    """A17: also if it is tried again: what the first attempt got is closed before the second."""

    async def scenario():
        stub = kit.stub(200)
        transport = kit.guard(stub, Retry(3, on=LookupError, wait=0), Broken())
        with pytest.raises(LookupError, match="broken"):
            await kit.send(transport, kit.request())
        assert (len(stub.seen), stub.open) == (3, 0)

    kit.run(scenario)


@pytest.mark.parametrize("error", [KeyboardInterrupt("x"), TimedOut(policy="p"), OSError("x")])
def test_a_stream_that_cannot_be_closed_hides_nothing(kit, error):
    """D21: what the caller gets is why we closed it, or what is there instead."""

    def interrupted(state):
        raise error

    async def scenario():
        def response():
            def close():
                raise RuntimeError("cannot be closed")

            body = kit.body(b"x")
            body.close = close
            return kit.http.Response(503, stream=body)

        retry = Retry(on=lambda failure: True, wait=interrupted)
        with pytest.raises(type(error)) as caught:
            await kit.send(kit.guard(kit.stub(response()), retry), kit.request())
        assert caught.value is error or isinstance(caught.value, TimedOut)
        instead = kit.guard(kit.stub(response()), Fallback(kit.http.Response(200)))
        assert (await kit.send(instead, kit.request())).status_code == 200
        again = kit.guard(kit.stub(response(), 200, pool=9), Retry(wait=0))
        assert (await kit.send(again, kit.request())).status_code == 200

    kit.run(scenario)


def test_a_pipeline_can_guard_several_transports(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=1)
        pipeline = Pipeline(breaker)
        await kit.send(kit.Transport(kit.stub(503), pipeline=pipeline), kit.request())
        with pytest.raises(kit.http.TransportError):
            await kit.send(kit.Transport(kit.stub(200), pipeline=pipeline), kit.request())

    kit.run(scenario)
