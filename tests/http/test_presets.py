"""The pipeline for HTTP clients: its order, and the arithmetic that its docstring promises."""

import inspect
import re
from datetime import timedelta

import anyio
import pytest

from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    Fallback,
    Pipeline,
    RateLimit,
    Retry,
    Timeout,
    presets,
    runtime,
)
from resilient.errors import CircuitOpen, TimedOut
from resilient.testing import _finish, capture_events


def kinds(pipeline):
    return [type(policy) for policy in pipeline.policies]


def hanging(kit):
    """Take as long as the timeouts of the request allow."""

    async def hang(request):
        seconds = request.extensions["timeout"]["read"]
        await kit.sleep(seconds)
        raise kit.http.ReadTimeout("slow")

    return hang


def asked(kit, **timeouts):
    """Return a request of a client that has no timeouts of its own."""
    return kit.request(extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"))}, **timeouts)


def test_the_order():
    plain = [Timeout, Bulkhead, Retry, CircuitBreaker, Timeout]
    assert kinds(presets.http_client()) == plain
    assert kinds(presets.http_client(attempts=1)) == [Timeout, Bulkhead, CircuitBreaker, Timeout]
    assert kinds(presets.http_client(rate="9/s")) == [*plain[:4], RateLimit, Timeout]
    everything = presets.http_client(cache=Cache(0, stale=3600), rate="9/s")
    assert kinds(everything) == [Cache, *plain[:4], RateLimit, Timeout]
    assert kinds(presets.http_client(cache=Fallback(1)))[0] is Fallback


def test_the_options():
    pipeline = presets.http_client(
        timeout=timedelta(seconds=9), attempt_timeout=2, attempts=5, concurrency=7, rate="9/s"
    )
    total, bulkhead, retry, breaker, rate, attempt = pipeline.policies
    assert (total.seconds, attempt.seconds) == (9.0, 2.0)
    assert (retry.stop, retry.budget.cap, bulkhead.limit, bulkhead.queue) == (5, 10, 7, 70)
    assert (str(rate.rate), rate.wait, breaker.probe_lease) == ("9 per 1 s", 1.0, 10.0)
    assert presets.http_client(attempt_timeout=9).policies[3].probe_lease == 18.0
    assert presets.http_client(timeout=5, attempt_timeout=5).policies[0].seconds == 5.0
    names = ["timeout", "bulkhead", "retry", "circuit breaker", "rate limit", "attempt timeout"]
    assert [policy.name for policy in pipeline.policies] == names
    assert (pipeline.name, retry.budget.name) == ("http_client", "retry budget")


def test_each_has_a_state_of_its_own():
    one, two = presets.http_client(), presets.http_client()
    assert not {id(policy) for policy in one.walk()} & {id(policy) for policy in two.walk()}
    assert one.policies[2].budget is not two.policies[2].budget


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout=0 is not allowed; give a number of seconds"),
        ({"timeout": "30"}, TypeError, "timeout='30' is not allowed"),
        ({"timeout": None}, TypeError, "timeout=None is not allowed"),
        ({"timeout": float("nan")}, ValueError, "timeout=nan is not allowed"),
        ({"attempt_timeout": -1}, ValueError, "attempt_timeout=-1 is not allowed"),
        ({"attempt_timeout": 31}, ValueError, "attempt_timeout=31 is not allowed; give up to timeout=30"),
        (
            {"timeout": 5, "attempt_timeout": 10},
            ValueError,
            "attempt_timeout=10 is not allowed; give up to timeout=5",
        ),
        ({"attempts": 0}, ValueError, "attempts=0 is not allowed; give an int >= 1"),
        ({"attempts": 2.5}, TypeError, "attempts=2.5 is not allowed"),
        ({"attempts": True}, TypeError, "attempts=True is not allowed"),
        ({"concurrency": 0}, ValueError, "concurrency=0 is not allowed; give an int >= 1"),
        ({"concurrency": None}, TypeError, "concurrency=None is not allowed"),
        ({"cache": 60}, TypeError, "cache=60 is not allowed; give a policy such as Cache"),
        ({"cache": Cache}, TypeError, "give a policy such as Cache"),
    ],
    ids=str,
)
def test_bad_options_name_themselves(options, kind, message):
    with pytest.raises(kind) as caught:
        presets.http_client(**options)
    assert str(caught.value).startswith("http_client: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("rate", ["fast", 9, "0/s"])
def test_a_bad_rate_names_itself(rate):
    with pytest.raises((ValueError, TypeError), match="rate="):
        presets.http_client(rate=rate)


# -- the arithmetic -------------------------------------------------------------------------------------------


def test_a_dependency_that_hangs(kit):
    """At most 3 attempts of at most 10 s, and 30 s in all: the waits between them come off the last one."""

    async def scenario():
        stub = kit.stub(hanging(kit))
        with pytest.raises(kit.http.TimeoutException) as caught:
            await kit.send(kit.Transport(stub), asked(kit))
        assert (len(stub.seen), runtime.now(), caught.value.policy) == (3, 30.0, "timeout")
        _, second, third = stub.times
        assert 10 <= second <= 10.1
        assert 10 <= third - second <= 10.2
        assert stub.seen[0].timeouts["read"] == stub.seen[1].timeouts["read"] == 10
        assert stub.seen[2].timeouts["read"] == pytest.approx(30 - third)

    kit.run(scenario)


def test_a_dependency_that_refuses(kit):
    """The waits are at most 0.1 s and 0.2 s."""

    async def scenario():
        longest = 0.0
        for number in range(40):
            stub = kit.stub(503)
            started = runtime.now()
            await kit.send(kit.Transport(stub), asked(kit, url=f"https://h{number}/"))
            one, two, three = (at - started for at in stub.times)
            assert one == 0
            assert two <= 0.1
            assert three - two <= 0.2
            longest = max(longest, three)
        assert 0.15 < longest <= 0.3

    kit.run(scenario)


def test_a_body_that_drips(kit):
    """The body has to end within the 30 s too; and no attempt's 10 s end it."""

    async def scenario():
        stub = kit.stub(
            lambda request: kit.response(200, *[0.5, b"x"] * 30),
            lambda request: kit.response(200, *[0.5, b"x"] * 99),
        )
        transport = kit.Transport(stub)
        response = await kit.send(transport, asked(kit))
        assert await kit.read(response) == b"x" * 30
        await kit.close(response)
        response = await kit.send(transport, asked(kit))
        with pytest.raises(TimedOut) as caught:
            await kit.read(response)
        assert (caught.value.policy, runtime.now()) == ("timeout", 45.0)

    kit.run(scenario)


def test_a_wait_that_the_server_asks_for(kit):
    async def scenario():
        for header, tries in (("5", 3), ("29", 2), ("31", 1)):
            stub = kit.stub(lambda request, header=header: kit.response(503, headers={"Retry-After": header}))
            await kit.send(kit.Transport(stub), asked(kit))
            assert len(stub.seen) == tries

    kit.run(scenario)


def test_a_dependency_that_fails_at_every_call(kit):
    """10 retries at once, then one every 10 s; and after 20 calls, of which half failed, its breaker opens."""

    async def scenario():
        pipeline = presets.http_client()
        stub = kit.stub(503, pool=99)
        transport = kit.Transport(stub, pipeline=pipeline)
        for _ in range(5):
            await kit.send(transport, asked(kit))
        assert len(stub.seen) == 15
        await kit.send(transport, asked(kit))
        assert len(stub.seen) == 16
        retries = pipeline.policies[2].statistics().retries
        assert (retries, runtime.now() < 2) == (10, True)
        for _ in range(4):
            await kit.send(transport, asked(kit))
        assert len(stub.seen) == 20
        with pytest.raises(CircuitOpen):
            await kit.send(transport, asked(kit))
        assert (await kit.send(transport, asked(kit, url="https://b/"))).status_code == 503

    kit.run(scenario)


def test_the_budget_comes_back(kit):
    """One retry every 10 s."""

    async def scenario():
        stub = kit.stub(503, pool=999)
        transport = kit.Transport(stub)
        for _ in range(5):
            await kit.send(transport, asked(kit))
        await kit.sleep(31)  # until the breaker has forgotten that
        before = len(stub.seen)
        for _ in range(10):
            await kit.sleep(10)
            await kit.send(transport, asked(kit))
        assert len(stub.seen) - before - 10 == 13

    kit.run(scenario)


def test_so_many_at_the_same_time(kit):
    """The rest waits, in order, and as long as the deadline allows."""

    async def scenario():
        async def slow(request):
            await kit.sleep(4)
            return kit.http.Response(200)

        stub = kit.stub(slow)
        transport = kit.Transport(stub, pipeline=presets.http_client(concurrency=2, timeout=9, attempt_timeout=5))
        ended = []

        def caller(number):
            async def call():
                await kit.sleep(number / 100)
                try:
                    await kit.send(transport, asked(kit))
                except kit.http.TransportError as error:
                    ended.append((number, type(error).__name__, runtime.now()))
                else:
                    ended.append((number, "answered", runtime.now()))

            return call

        callers = [caller(number) for number in range(6)]
        if kit.sync:
            runtime.now.__self__.run_threads(*[lambda call=call: _finish(call()) for call in callers])
        else:
            async with anyio.create_task_group() as group:
                for call in callers:
                    group.start_soon(call)
        answered = [(number, at) for number, what, at in ended if what == "answered"]
        assert [number for number, _ in answered] == [0, 1, 2, 3]
        assert [number for number, what, _ in ended if what != "answered"] == [4, 5]
        assert len(stub.seen) >= 4

    kit.run(scenario)


def test_a_rate_for_each_origin(kit):
    """More wait up to a second."""

    async def scenario():
        stub = kit.stub(200, pool=99)
        transport = kit.Transport(stub, pipeline=presets.http_client(rate="2/s"))
        for _ in range(4):
            await kit.send(transport, asked(kit))
        assert stub.times == [0, 0, 0.5, 1.0]
        await kit.send(transport, asked(kit, url="https://b/"))
        assert stub.times[-1] == 1.0

    kit.run(scenario)


def test_an_outage_is_survived_with_a_fallback(kit):
    async def scenario():
        stub = kit.stub(kit.http.ConnectError("refused"))
        older = Fallback(kit.http.Response(200, content=b"older"))
        transport = kit.Transport(stub, pipeline=presets.http_client(cache=older))
        async with kit.client(transport) as client:
            for _ in range(40):
                assert (await kit.do(client.get, "https://a/")).content == b"older"
        assert len(stub.seen) == 20  # then the breaker is open

    kit.run(scenario)


def test_success_is_silent(kit):
    async def scenario():
        with capture_events() as seen:
            transport = kit.Transport(kit.stub(200))
            await kit.close(await kit.send(transport, asked(kit)))
        assert seen == []
        assert isinstance(transport.pipeline, Pipeline)

    kit.run(scenario)


def test_every_option_is_documented():
    text = inspect.getdoc(presets.http_client).partition("Args:")[2].partition("Raises:")[0]
    _, *parts = re.split(r"\n    (\w+): ", text)
    documented = dict(zip(parts[::2], parts[1::2], strict=True))
    for name, parameter in inspect.signature(presets.http_client).parameters.items():
        default = parameter.default
        description = " ".join(documented[name].split())
        assert (f"Default {default:g}" if default else "Default None") in description
