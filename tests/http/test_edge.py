"""What is a failure, what is worth another try, what may be sent again, and whose fault it is."""

import gc
import itertools

import h2.events
import httpcore
import pytest

from resilient import CircuitBreaker, Fallback, Pipeline, RateLimit, Retry, RetryBudget, Timeout, runtime
from resilient.errors import CircuitOpen, FailedResponse, FailedResult, RateLimited, TimedOut
from resilient.http.edge import IDEMPOTENT, TRANSIENT, HttpCall
from resilient.kinds import Race
from resilient.testing import capture_events

from .flaky_server import H2Server, h2_close, h2_goaway, h2_refused, ok

METHODS = [
    "GET",
    "HEAD",
    "OPTIONS",
    "TRACE",
    "PUT",
    "DELETE",
    "QUERY",
    "POST",
    "PATCH",
    "CONNECT",
    "PROPFIND",
    "brew",
]


def edge_of(kit, **options):
    return kit.guard(kit.stub(200), **options)._edge


def terminated(last_stream_id, code=0):
    event = h2.events.ConnectionTerminated()
    event.error_code, event.last_stream_id = code, last_stream_id
    return event


def event_error(kit, event, message="h2"):
    """Return an error as the clients raise it for an event of HTTP/2."""
    error = kit.http.RemoteProtocolError(message)
    error.__cause__ = httpcore.RemoteProtocolError(event)
    return error


# -- statuses -------------------------------------------------------------------------------------------------


def test_statuses(sync_kit):
    """A52, A54, A55, A56: 501 and 505 are answers, 421 and 1xx are the client's business."""
    edge = edge_of(sync_kit)
    for status in range(100, 600):
        error = edge.failed(sync_kit.http.Response(status))
        fails = status in {408, 425, 429} or (status >= 500 and status not in {501, 505})
        assert isinstance(error, FailedResponse) == fails, status
        if fails:
            assert edge.transient(error) == (status in {408, 425, 429, 502, 503, 504}), status
            assert edge.blames(error) == (status >= 500), status


def test_what_is_sent_again_by_default(kit):
    """A12, A19: what comes at the end is the last response itself, open and unread."""

    async def scenario():
        for status in (200, 301, 400, 404, 409, 421, 422, 500, 501, 505, *sorted(TRANSIENT)):
            stub = kit.stub(status)
            response = await kit.send(kit.guard(stub, Retry(3, wait=1)), kit.request())
            tries = {425: 2}.get(status, 3 if status in TRANSIENT else 1)
            assert (response.status_code, len(stub.seen), stub.open) == (status, tries, 1)
            assert not response.is_closed
            assert stub.made[-1].read == 0
            assert await kit.read(response) == b"body"

    kit.run(scenario)


def test_too_early_is_tried_again_once(kit):
    """A53: also among other failures."""

    async def scenario():
        stub = kit.stub(503, 425, 503, 425, 200)
        response = await kit.send(kit.guard(stub, Retry(9, wait=0)), kit.request())
        assert (response.status_code, len(stub.seen)) == (425, 4)

    kit.run(scenario)


@pytest.mark.parametrize(
    ("on", "statuses", "tries"),
    [
        ({404, 409}, [404, 409, 200], 3),
        ((500,), [500, 200], 2),
        ({429}, [503, 200], 1),
        ({501}, [501, 200], 2),
        (lambda error: getattr(error, "status", 0) == 500, [500, 503, 200], 2),
    ],
)
def test_status_codes_in_on(kit, on, statuses, tries):
    async def scenario():
        stub = kit.stub(*statuses)
        response = await kit.send(kit.guard(stub, Retry(5, on=on, wait=0)), kit.request())
        assert (response.status_code, len(stub.seen)) == (statuses[tries - 1], tries)
        assert stub.open == 1

    kit.run(scenario)


def test_status_codes_and_errors_in_on(kit):
    async def scenario():
        stub = kit.stub(429, kit.http.ConnectError("refused"), 503, kit.http.ReadError("reset"))
        transport = kit.guard(stub, Retry(9, on={429, 503, kit.http.ConnectError}, wait=0))
        with pytest.raises(kit.http.ReadError):
            await kit.send(transport, kit.request())
        assert len(stub.seen) == 4

    kit.run(scenario)


def test_a_function_of_the_result_is_asked_too(kit):
    """`Pipeline(failed=...)`: what it calls a failure is closed before the wait, as everything else is (A16)."""

    async def scenario():
        stub = kit.stub(202, 202, 200)
        pipeline = Pipeline(Retry(wait=1), failed=lambda response: response.status_code == 202)
        response = await kit.send(kit.Transport(stub, pipeline=pipeline), kit.request())
        assert (response.status_code, stub.times, stub.closed_at) == (200, [0, 1, 2], [0, 1])
        last = await kit.send(kit.Transport(kit.stub(202), pipeline=pipeline), kit.request())
        assert (last.status_code, last.is_closed) == (202, False)

    kit.run(scenario)


# -- errors ---------------------------------------------------------------------------------------------------

ERRORS = {  # name: worth another try, never sent, fault of the dependency
    "ConnectError": (True, True, True),
    "ConnectTimeout": (True, True, True),
    "PoolTimeout": (True, True, None),  # A38
    "ReadTimeout": (True, False, True),  # A39
    "WriteTimeout": (True, False, True),
    "ReadError": (True, False, True),
    "WriteError": (True, False, True),
    "CloseError": (True, False, True),
    "RemoteProtocolError": (True, False, True),  # A10
    "ProxyError": (True, False, True),
    "LocalProtocolError": (False, False, None),
    "UnsupportedProtocol": (False, False, None),
    "DecodingError": (False, False, True),
    "TooManyRedirects": (False, False, True),
}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_errors_mean(kit, method):
    """A8, A9, A10, A38, A39."""

    async def scenario():
        for name, (again, never_sent, blamed) in ERRORS.items():
            error = getattr(kit.http, name)("x")
            stub = kit.stub(error, 200)
            transport = kit.guard(stub, Retry(2, wait=0))
            if again and (method == "GET" or never_sent):
                assert (await kit.send(transport, kit.request(method))).status_code == 200, name
            else:
                with pytest.raises(type(error)) as caught:
                    await kit.send(transport, kit.request(method))
                assert caught.value is error
            breaker = CircuitBreaker(consecutive=1)
            with pytest.raises(type(error)):
                await kit.send(kit.guard(kit.stub(error), breaker), kit.request(method))
            assert (breaker.current_state == "open") == bool(blamed), name
            assert transport._edge.timed_out(error) == ("Timeout" in name), name

    kit.run(scenario)


@pytest.mark.parametrize("error", [TimeoutError("x"), ConnectionResetError("x"), ValueError("x"), KeyError("x")])
def test_errors_of_the_language(kit, error):
    """A40, D6: those of a transport of the user."""

    async def scenario():
        stub = kit.stub(error, 200)
        transport = kit.guard(stub, Retry(wait=0), Timeout(5))
        if isinstance(error, OSError):
            assert (await kit.send(transport, kit.request())).status_code == 200
        else:
            with pytest.raises(type(error)):
                await kit.send(transport, kit.request())

    kit.run(scenario)


def test_the_time_limit_of_an_attempt_is_worth_another_try(kit):
    async def scenario():
        async def slow(request):
            await kit.sleep(request.extensions["timeout"]["read"])
            raise kit.http.ReadTimeout("slow")

        stub = kit.stub(slow, slow, 200)
        budget = RetryBudget()
        transport = kit.guard(stub, Retry(3, wait=0, budget=budget), Timeout(1))
        response = await kit.send(transport, kit.request())
        assert (response.status_code, runtime.now()) == (200, 2.0)
        assert budget.statistics().lowest == pytest.approx(6.2)  # a retry after a timeout costs 2

    kit.run(scenario)


@pytest.mark.parametrize("name", ["TransportError", "TimeoutException"])
def test_the_time_limit_of_an_attempt_is_what_users_know_it_as(kit, name):
    """A42: policies that name errors of the client see it as one."""

    async def scenario():
        async def hangs(request):
            await kit.sleep(60)
            return 200

        on = {503, getattr(kit.http, name)}
        breaker = CircuitBreaker(consecutive=2, on=on)
        stub = kit.stub(hangs, hangs, 200)
        guard = kit.guard(stub, Retry(3, on=on, wait=0), breaker, Timeout(1))
        with pytest.raises(CircuitOpen):
            await kit.send(guard, kit.request())
        assert (len(stub.seen), breaker.of("https://a").current_state) == (2, "open")

    kit.run(scenario)


@pytest.mark.parametrize(
    ("phase", "again"), [("connect", True), ("pool", True), ("read", False), ("write", False)]
)
def test_a_deadline_that_passes_before_anything_was_sent(kit, phase, again):
    """A9, A38, A39: a POST may be sent again then, and a full pool is nobody's fault; in async code too."""

    async def scenario():
        async def slow(request):
            await kit.sleep(request.extensions["timeout"][phase])
            raise getattr(kit.http, f"{phase.title()}Timeout")("slow")

        stub = kit.stub(slow, 200)
        transport = kit.guard(stub, Retry(2, wait=0), Timeout(1, name="attempt"))
        if again:
            assert (await kit.send(transport, kit.request("POST"))).status_code == 200
        else:
            with pytest.raises(TimedOut) as caught:
                await kit.send(transport, kit.request("POST"))
            assert caught.value.policy == "attempt"
        breaker = CircuitBreaker(consecutive=1)
        stub = kit.stub(slow)
        with pytest.raises(TimedOut):
            await kit.send(kit.guard(stub, breaker, Timeout(1)), kit.request())
        assert breaker.current_state == ("closed" if phase == "pool" else "open")

    kit.run(scenario)


# -- methods --------------------------------------------------------------------------------------------------


def test_methods(kit):
    """A8, A12, A13, Z9: an `Idempotency-Key` makes any request repeatable, with the same key each time."""

    async def scenario():
        for method, key in itertools.product(METHODS, (None, '"abc"')):
            stub = kit.stub(503, 200)
            async with kit.client(kit.guard(stub, Retry(wait=0))) as client:
                headers = {} if key is None else {"IDEMPOTENCY-key": key}
                response = await kit.do(client.request, method, "https://a/", headers=headers)
            again = key is not None or method in IDEMPOTENT
            assert (response.status_code, len(stub.seen)) == ((200, 2) if again else (503, 1)), method
            assert {seen.request.headers.get("Idempotency-Key") for seen in stub.seen} == {key}

    kit.run(scenario)


@pytest.mark.parametrize(
    "repeatable",
    [{"POST"}, ["POST", "PATCH"], lambda request: request.url.path == "/"],
    ids=["set", "list", "function"],
)
def test_repeatable_widens(kit, repeatable):
    async def scenario():
        for method, tries in (("POST", 2), ("GET", 2), ("BREW", 1)):
            stub = kit.stub(503, 200)
            transport = kit.guard(stub, Retry(wait=0), repeatable=repeatable)
            url = "https://a/brew" if method == "BREW" else "https://a/"
            await kit.send(transport, kit.request(method, url))
            assert len(stub.seen) == tries

    kit.run(scenario)


def test_a_refusal_of_ours_means_that_nothing_was_sent(kit):
    """A9: whatever the method."""

    async def scenario():
        stub = kit.stub(200, pool=2)
        limit = RateLimit("1/s")
        transport = kit.guard(stub, Retry(2, on=RateLimited, wait=0), limit)
        for _ in range(2):
            assert (await kit.send(transport, kit.request("POST"))).status_code == 200
        assert stub.times[1] >= 1.0

    kit.run(scenario)


def test_what_may_not_be_sent_again_is_said_so(kit):
    async def scenario():
        stub = kit.stub(503)
        with capture_events() as seen:
            await kit.send(kit.guard(stub, Retry()), kit.request("POST"))
        assert [(event.name, event.reason) for event in seen] == [("retry.gave_up", "not_repeatable")]

    kit.run(scenario)


# -- whose fault it is ----------------------------------------------------------------------------------------


def test_a_429_counts_for_the_retry_and_the_limiter_and_not_for_the_breaker(kit):
    """A51."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(429, headers={"Retry-After": "7"}))
        breaker = CircuitBreaker(consecutive=1, name="breaker")
        limit = RateLimit("100/s", learn=True, name="limit")
        transport = kit.guard(stub, Retry(2, max_retry_after=1), breaker, limit)
        response = await kit.send(transport, kit.request())
        assert (response.status_code, breaker.current_state) == (429, "closed")
        with pytest.raises(kit.http.TransportError) as caught:
            await kit.send(transport, kit.request())
        assert (caught.value.policy, caught.value.retry_after) == ("limit", 7.0)
        other = await kit.send(kit.guard(kit.stub(429), CircuitBreaker(consecutive=1, on={429})), kit.request())
        assert other.status_code == 429

    kit.run(scenario)


def test_a_breaker_counts_what_its_on_names(kit):
    async def scenario():
        by_hand = (KeyError, lambda error: getattr(error, "status", None) == 429)  # a status, but by a function
        cases = (({429}, 429, "open"), ({404}, 404, "open"), ({500}, 503, "closed"), (by_hand, 429, "open"))
        for on, status, state in cases:
            breaker = CircuitBreaker(consecutive=1, on=on)
            await kit.send(kit.guard(kit.stub(status), breaker), kit.request())
            assert breaker.current_state == state

    kit.run(scenario)


def test_a_4xx_shows_the_dependency_at_work(kit):
    """A57: and so do the 401 of a handshake and the 3xx of a redirect."""

    async def scenario():
        breaker = CircuitBreaker(consecutive=2)
        stub = kit.stub(500, 401, 500, 302, 500, 408, 500, pool=9)
        transport = kit.guard(stub, breaker)
        for _ in range(7):
            await kit.send(transport, kit.request())
        assert breaker.current_state == "closed"
        await kit.send(transport, kit.request())
        assert breaker.current_state == "open"

    kit.run(scenario)


def test_the_end_of_one_connection_is_counted_once(sync_kit):
    """A62: however many requests it takes along, in however many pipelines, and between other errors."""
    edge = edge_of(sync_kit)
    goaways = [terminated(5), terminated(7)]
    lost = httpcore.RemoteProtocolError("Server disconnected")
    ends = [event_error(sync_kit, event) for _ in range(5) for event in goaways]
    for _ in range(5):
        error = sync_kit.http.RemoteProtocolError("Server disconnected")
        error.__cause__ = lost
        ends.append(error)
    for _ in range(2):  # a second breaker asks about the same errors
        assert [edge.blames(error) for error in ends] == [True, True, *[None] * 8, True, *[None] * 4]
    alone = [sync_kit.http.RemoteProtocolError("Server disconnected") for _ in range(3)]
    assert [edge.blames(error) for error in alone] == [True] * 3


def test_answers_after_a_goaway_are_refused_by_h2_and_not_by_us(sync_kit):
    """A62: the clients call it a mistake of ours; to try again is right, to blame somebody is not."""
    edge = edge_of(sync_kit)
    late = "Invalid input ConnectionInputs.RECV_HEADERS in state ConnectionState.CLOSED"
    error = sync_kit.http.LocalProtocolError(late)
    assert (edge.transient(error), edge.blames(error)) == (True, None)


def test_what_has_ended_is_not_remembered_for_ever(sync_kit):
    edge = edge_of(sync_kit)
    events = [terminated(5) for _ in range(50)]
    for event in events:
        assert edge.blames(event_error(sync_kit, event))
    assert len(edge._reports) == 16
    assert edge.blames(event_error(sync_kit, events[-1])) is None
    assert edge.blames(event_error(sync_kit, events[0]))
    del events, event
    gc.collect()
    assert {told() for told, _ in edge._reports} == {None}


def test_errors_with_a_cause_of_the_user_are_each_their_own(sync_kit):
    edge = edge_of(sync_kit)
    cause = ValueError("shared")
    for _ in range(2):
        error = sync_kit.http.ReadError("x")
        error.__cause__ = cause
        assert edge.blames(error)


@pytest.mark.parametrize(
    ("event", "again"),
    [
        (h2.events.StreamReset(stream_id=1, error_code=7), True),
        (h2.events.StreamReset(stream_id=1, error_code=2), False),
        (terminated(0), True),
        (terminated(1, 7), False),
        (terminated(9), False),
    ],
    ids=["refused", "reset", "goaway before all", "goaway as refused", "goaway"],
)
def test_what_was_refused_unseen_may_be_sent_again(kit, event, again):
    """A61: whatever the method."""

    async def scenario():
        stub = kit.stub(event_error(kit, event), 200)
        transport = kit.guard(stub, Retry(wait=0))
        if again:
            assert (await kit.send(transport, kit.request("POST"))).status_code == 200
        else:
            with pytest.raises(kit.http.RemoteProtocolError):
                await kit.send(transport, kit.request("POST"))

    kit.run(scenario)


def test_a_body_that_is_refused_had_headers_before(kit):
    """A61: so the request was looked at."""

    async def scenario():
        event = h2.events.StreamReset(stream_id=1, error_code=7)
        stub = kit.stub(lambda request: kit.response(200, b"x", event_error(kit, event)), 200)
        with pytest.raises(kit.http.RemoteProtocolError):
            await kit.send(kit.guard(stub, Retry(wait=0), buffer=True), kit.request("POST"))
        assert (len(stub.seen), stub.open) == (1, 0)

    kit.run(scenario)


@pytest.mark.parametrize(
    ("step", "method", "tries"),
    [
        (h2_refused(), "POST", 2),
        (h2_goaway(0), "POST", 2),
        (h2_goaway(), "POST", 1),
        (h2_goaway(), "GET", 2),
        (h2_close(), "POST", 1),
        (h2_close(), "GET", 2),
    ],
    ids=str,
)
def test_refusals_of_http2_on_the_wire(kit, step, method, tries):
    """A61, A62."""

    async def scenario():
        with H2Server([step, ok()]) as server:
            inner = kit.real(http1=False, http2=True)
            async with kit.client(kit.guard(inner, Retry(wait=0)), base_url=server.url) as client:
                try:
                    outcome = (await kit.do(client.request, method, "/", content=b"body")).status_code
                except kit.http.RemoteProtocolError:
                    outcome = "lost"
            assert (outcome, len(server.requests)) == (200 if tries == 2 else "lost", tries)
            assert all(request.body == b"body" for request in server.requests)

    kit.run_really(scenario)


# -- other policies on this edge ------------------------------------------------------------------------------


def test_a_fallback_for_statuses(kit):
    async def scenario():
        stub = kit.stub(404)
        answer = kit.http.Response(200, content=b"instead")
        async with kit.client(kit.guard(stub, Fallback(answer, on={404}))) as client:
            response = await kit.do(client.get, "https://a/")
        assert (response.status_code, response.content, stub.open) == (200, b"instead", 0)

    kit.run(scenario)


class Twice(Race):
    """A second copy after a second."""

    def next_start(self, call, started):
        return 1.0 if started == 1 else None


@pytest.mark.parametrize("balances", [False, True])
def test_a_copy_of_a_call_has_a_request_of_its_own(async_kit, balances):
    """A77: with the same body and the same list of replicas, but not the same extensions to write into."""
    kit = async_kit

    async def scenario():
        async def slow(request):
            await kit.sleep(5)
            return 200

        stub = kit.stub(slow, 200, pool=2)
        stub.balances = balances
        guard = kit.guard(stub, Timeout(9), Twice())
        async with kit.client(guard) as client:
            response = await kit.do(client.put, "https://a/", content=b"x", extensions={"own": [1]})
        one, two = stub.seen
        assert (response.status_code, stub.times, stub.bodies) == (200, [0, 1], [b"x", b"x"])
        assert one.request is not two.request
        assert one.wire == two.wire
        assert one.extensions["own"] is two.extensions["own"]
        assert ("resilient.tried" in one.extensions) == balances
        assert one.extensions.get("resilient.tried") is two.extensions.get("resilient.tried")
        assert "resilient.tried" not in response.request.extensions

    kit.run(scenario)


def test_copies_of_a_call_tell_their_servers_each_its_own_deadline(kit):
    async def scenario():
        seen = []

        async def slow(request):
            seen.append((request.headers["x-timeout"], request.headers.raw[1:3]))
            await kit.sleep(5)
            return 200

        guard = kit.guard(kit.stub(slow, pool=2), Timeout(9), Twice(), deadline_header="x-timeout")
        request = kit.request(headers=[("X-Two", "1"), ("x-two", "2")])
        await kit.send(guard, request)
        return seen, request.headers.get("x-timeout")

    two = [(b"X-Two", b"1"), (b"x-two", b"2")]
    assert kit.run(scenario) == ([("9", two), ("8", two)], None)


def test_replicas_that_were_tried_are_remembered_for_a_request(kit):
    async def scenario():
        lists = []

        def note(request):
            tried = request.extensions["resilient.tried"]
            tried.append(len(tried))
            lists.append(list(tried))
            return 503

        stub = kit.stub(note)
        stub.balances = True
        transport = kit.guard(stub, Retry(3, wait=0))
        first = await kit.send(transport, kit.request())
        await kit.close(first)
        await kit.send(transport, kit.request())
        assert lists == [[0], [0, 1], [0, 1, 2]] * 2

    kit.run(scenario)


def test_what_is_known_of_a_call(sync_kit):
    guard = sync_kit.guard(sync_kit.stub(200), Retry())
    call = HttpCall(guard._edge, sync_kit.request("POST"))
    edge = guard._edge
    assert (edge.repeatable(call), edge.key(call), call.copy().request.method) == (False, "https://a", "POST")
    assert edge.repeatable(call, sync_kit.http.ConnectError("x"))
    assert edge.transient(FailedResult(1)) is False
    assert edge.timed_out(TimedOut(policy="p"))
