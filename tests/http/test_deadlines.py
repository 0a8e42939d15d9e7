"""Deadlines: they cap the timeouts of the client, hold for headers and bodies, and say whose they were."""

import pytest

from resilient import CircuitBreaker, Retry, Timeout, deadline, runtime
from resilient.errors import TimedOut
from resilient.testing import capture_events

FOUR = ("connect", "read", "write", "pool")


def slow_until(kit, name, error):
    """Wait as long as a timeout of the request says, and raise the error for it."""

    async def slow(request):
        await kit.sleep(request.extensions["timeout"][name])
        raise getattr(kit.http, error)(name)

    return slow


# -- the timeouts of the request ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "kept"),
    [
        (None, {}),
        ({}, {}),
        ({"read": 1.0}, {"read": 1.0}),
        (dict.fromkeys(FOUR), {}),
        (dict.fromkeys(FOUR, 5.0), {}),
        (dict.fromkeys(FOUR, 0.5), dict.fromkeys(FOUR, 0.5)),
        (
            {"connect": 9.0, "read": None, "write": 0.1, "pool": 1.9, "own": 7},
            {"write": 0.1, "pool": 1.9, "own": 7},
        ),
    ],
)
def test_timeouts_are_lowered_and_never_raised(kit, theirs, kept):
    """A31, A33, A37: on a copy."""

    async def scenario():
        stub = kit.stub(200)
        request = kit.request(extensions={} if theirs is None else {"timeout": theirs})
        before = None if theirs is None else dict(theirs)
        await kit.send(kit.guard(stub, Timeout(2)), request)
        assert stub.seen[0].timeouts == kit.capped(2.0) | kept
        assert request.extensions.get("timeout") == before
        assert request.extensions.get("timeout") is theirs

    kit.run(scenario)


def test_without_a_deadline_nothing_is_touched(kit):
    """A37: no timeout stays no timeout."""

    async def scenario():
        stub = kit.stub(200)
        request = kit.request(extensions={"timeout": dict.fromkeys(FOUR)})
        await kit.send(kit.guard(stub, Retry()), request)
        assert stub.seen[0].timeouts == dict.fromkeys(FOUR)
        assert stub.seen[0].extensions == request.extensions

    kit.run(scenario)


def test_attempts_count_as_waits_do(kit):
    """A80."""

    async def scenario():
        slow = slow_until(kit, "read", "ReadTimeout")
        stub = kit.stub(slow, 503, slow)
        with pytest.raises(TimedOut) as caught:
            await kit.send(kit.guard(stub, Timeout(10, name="total"), Retry(9, wait=1), Timeout(4)), kit.request())
        assert (caught.value.policy, stub.times, runtime.now()) == ("total", [0, 5, 6], 10.0)

    kit.run(scenario)


def test_timeouts_shrink_with_the_time_that_is_left(kit):
    """A35: before every attempt."""

    async def scenario():
        stub = kit.stub(503, 503, 503, 200)
        transport = kit.guard(stub, Timeout(10), Retry(4, wait=3), Timeout(8))
        await kit.send(transport, kit.request())
        assert [seen.timeouts["read"] for seen in stub.seen] == [8.0, 7.0, 4.0, 1.0]

    kit.run(scenario)


def test_a_wait_that_does_not_fit_is_not_begun(kit):
    """D12, A47: the last answer is returned at once."""

    async def scenario():
        stub = kit.stub(503, 503, 200)
        with capture_events() as seen:
            response = await kit.send(kit.guard(stub, Timeout(5), Retry(wait=3)), kit.request())
        assert (response.status_code, runtime.now(), stub.open) == (503, 3.0, 1)
        assert [event.reason for event in seen if event.name == "retry.gave_up"] == ["deadline"]

    kit.run(scenario)


# -- whose it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("own", [None, 60.0])
def test_the_error_names_the_scope(kit, name, own):
    """A41: it is of the client's family, and has the request."""

    async def scenario():
        stub = kit.stub(slow_until(kit, name, f"{name.title()}Timeout"))
        transport = kit.guard(stub, Timeout(9, name="total"), Timeout(2, name="attempt"))
        request = kit.request(extensions={"timeout": dict.fromkeys(FOUR, own)})
        with pytest.raises(kit.http.TimeoutException) as caught, capture_events() as seen:
            await kit.send(transport, request)
        assert isinstance(caught.value, TimedOut)
        assert (caught.value.policy, caught.value.seconds) == ("attempt", 2.0)
        assert runtime.now() == (2.0 if kit.sync or name in {"read", "write"} else 1.99)
        assert caught.value.request is request
        assert [(event.name, event.policy) for event in seen] == [("timeout.expired", "attempt")]

    kit.run(scenario)


def test_the_outer_scope_is_named_if_it_ends_first(kit):
    """D5."""

    async def scenario():
        stub = kit.stub(slow_until(kit, "read", "ReadTimeout"))
        for policies in ([Timeout(2, name="outer"), Timeout(2)], [Timeout(2, name="outer"), Timeout(5)]):
            with pytest.raises(TimedOut) as caught:
                await kit.send(kit.guard(stub, *policies), kit.request())
            assert caught.value.policy == "outer"

    kit.run(scenario)


def test_a_timeout_of_the_clients_own_is_its_own(kit):
    """D6: within the deadline, also just before it."""

    async def scenario():
        for seconds in (1.0, 1.9):
            stub = kit.stub(slow_until(kit, "read", "ReadTimeout"))
            request = kit.request(extensions={"timeout": dict.fromkeys(FOUR, seconds)})
            with pytest.raises(kit.http.ReadTimeout) as caught:
                await kit.send(kit.guard(stub, Timeout(2)), request)
            assert not isinstance(caught.value, TimedOut)

    kit.run(scenario)


def test_a_deadline_that_was_named_further_in_keeps_its_name(kit):
    """Also if another one passes in the same moment; and it is reported once."""

    async def scenario():
        async def slow(request):
            await kit.sleep(request.extensions["timeout"]["read"])
            raise kit.http.ReadTimeout("slow")

        inner = kit.guard(kit.stub(slow), Timeout(1.9995, name="inner"))
        with pytest.raises(TimedOut) as caught, capture_events() as seen:
            await kit.send(kit.guard(inner, Timeout(2, name="outer")), kit.request())
        assert caught.value.policy == "inner"
        assert [event.policy for event in seen] == ["inner"]

    kit.run(scenario)


def test_a_timeout_of_the_client_just_before_the_deadline(kit):
    """Clocks differ: the deadline was the reason, and nothing is tried again in what is left of it."""

    async def scenario():
        async def slow(request):
            await kit.sleep(1.9995)
            raise kit.http.ReadTimeout("a little early")

        stub = kit.stub(slow)
        with pytest.raises(TimedOut) as caught:
            await kit.send(kit.guard(stub, Timeout(2, name="total"), Retry(9, wait=0), Timeout(5)), kit.request())
        assert (caught.value.policy, len(stub.seen)) == ("total", 1)
        assert runtime.now() == 2.0

    kit.run(scenario)


def test_a_deadline_that_passes_between_short_timeouts(sync_kit):
    """Where no single timeout has to be lowered, the deadline still holds, and says so."""
    kit = sync_kit

    async def scenario():
        async def drips(request):
            while runtime.now() < 2:
                await kit.sleep(0.4)
            raise kit.http.ReadTimeout("as the network does when the deadline has passed")

        stub = kit.stub(drips)
        request = kit.request(extensions={"timeout": dict.fromkeys(FOUR, 0.5)})
        with pytest.raises(kit.http.TimeoutException) as caught:
            await kit.send(kit.guard(stub, Timeout(2, name="total")), request)
        assert (caught.value.policy, stub.seen[0].timeouts["read"]) == ("total", 0.5)

    kit.run(scenario)


def test_a_deadline_around_the_client_holds_too(kit):
    """A scope of the user around everything, which only says so."""

    async def scenario():
        stub = kit.stub(slow_until(kit, "read", "ReadTimeout"), 200)
        user = deadline.Deadline(3.0, Timeout(3, interrupt=False, name="user"))
        with deadline.published(user), pytest.raises(TimedOut) as caught:
            await kit.send(kit.guard(stub, Timeout(30), Retry(wait=1), Timeout(10)), kit.request())
        assert (caught.value.policy, runtime.now()) == ("user", 3.0)

    kit.run(scenario)


def test_no_time_is_left_at_all(kit):
    """D11, D12: then nothing is sent."""

    async def scenario():
        stub = kit.stub(200)
        user = deadline.Deadline(0.0, Timeout(3, interrupt=False, name="user"))
        with deadline.published(user), pytest.raises(kit.http.TimeoutException) as caught:
            await kit.send(kit.guard(stub, Retry()), kit.request())
        assert (caught.value.policy, len(stub.seen)) == ("user", 0)

    kit.run(scenario)


def test_a_deadline_counts_against_the_breaker_and_the_retry(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=2)
        stub = kit.stub(slow_until(kit, "read", "ReadTimeout"))
        with pytest.raises(TimedOut):
            await kit.send(kit.guard(stub, Retry(2, wait=0), breaker, Timeout(2)), kit.request())
        assert (breaker.current_state, len(stub.seen)) == ("open", 2)

    kit.run(scenario)


def test_a_transport_that_looks_at_no_timeout(async_kit):
    """A36: async code is cancelled all the same."""
    kit = async_kit

    async def scenario():
        async def deaf(request):
            await kit.sleep(60)

        stub = kit.stub(deaf)
        with pytest.raises(kit.http.TimeoutException) as caught:
            await kit.send(kit.guard(stub, Timeout(2, name="total")), kit.request())
        assert (caught.value.policy, runtime.now()) == ("total", 2.0)

    kit.run(scenario)


def test_a_transport_that_looks_at_no_timeout_is_looked_at_afterwards(kit):
    """A36: nobody interrupts it, but what comes too late is too late, in memory or not."""

    async def scenario():
        for answer in (kit.response(200), kit.http.Response(200, content=b"x")):

            async def deaf(request, answer=answer):
                await kit.sleep(5)
                return answer

            for timeout in (9.0, 0.5):
                stub = kit.stub(deaf)
                request = kit.request(extensions={"timeout": dict.fromkeys(FOUR, timeout)})
                with pytest.raises(TimedOut):
                    await kit.send(kit.guard(stub, Timeout(2, interrupt=False)), request)
                assert stub.open == 0

    kit.run(scenario)


# -- telling the server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "told"),
    [("grpc-timeout", ["4000000u", "2000000u"]), ("X-Timeout-Ms", ["4000", "2000"]), ("x-timeout", ["4", "2"])],
)
def test_servers_are_told_how_long_an_attempt_waits(kit, header, told):
    async def scenario():
        seen = []

        def answer(request):
            seen.append(request.headers[header])
            return kit.response(503 if len(seen) == 1 else 200)

        stub = kit.stub(answer)
        guard = kit.guard(stub, Timeout(10), Retry(wait=8), Timeout(4), deadline_header=header)
        await kit.send(guard, kit.request())
        return seen

    assert kit.run(scenario) == told


def test_what_the_caller_tells_the_server_stays_as_it_is(kit):
    async def scenario():
        seen = []

        def answer(request):
            seen.append(request.headers["x-timeout"])
            return kit.response(503)

        guard = kit.guard(kit.stub(answer), Retry(2, wait=0), Timeout(4), deadline_header="x-timeout")
        await kit.send(guard, kit.request(headers={"x-timeout": "1"}))
        return seen

    assert kit.run(scenario) == ["1", "1"]


def test_what_servers_are_told_does_not_stay_in_the_request(kit):
    """A client sends the same request again after a 401, and copies its fields into redirects."""

    async def scenario():
        seen = []

        def answer(request):
            seen.append(request.headers["x-timeout"])
            return kit.response(200)

        guard = kit.guard(kit.stub(answer), Retry(), deadline_header="x-timeout")
        request = kit.request()
        with deadline.published(deadline.Deadline(5.0, Timeout(5))):
            for _ in range(2):
                await kit.close(await kit.send(guard, request))
                await kit.sleep(3)
        return seen, "x-timeout" in request.headers

    assert kit.run(scenario) == (["5", "2"], False)


def test_without_a_deadline_servers_are_told_nothing(kit):
    async def scenario():
        stub = kit.stub(200)
        request = kit.request()
        await kit.send(kit.guard(stub, Retry(), deadline_header="x-timeout"), request)
        return "x-timeout" in request.headers

    assert kit.run(scenario) is False


@pytest.mark.parametrize(("header", "kind"), [("", ValueError), ("a b", ValueError), (3, TypeError)])
def test_a_bad_name_of_a_header_is_refused(kit, header, kind):
    with pytest.raises(kind, match="ResilientTransport: deadline_header="):
        kit.guard(kit.stub(200), deadline_header=header)
