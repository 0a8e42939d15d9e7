"""How long to wait: what the server asks for, if it fits, and what `RateLimit(learn=True)` makes of it."""

import time
from email.utils import formatdate

import pytest

from resilient import CircuitBreaker, Fallback, RateLimit, Retry, RetryBudget, Timeout, runtime
from resilient.errors import CircuitOpen, FailedResponse, RateLimited
from resilient.policy import Policy
from resilient.testing import capture_events

from .flaky_server import FlakyServer, ok, status

NOW = 1_800_000_000.0
DATE = formatdate(NOW, usegmt=True)


def rfc850(at):
    return time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(at))


def asctime(at):
    return time.asctime(time.gmtime(at))


@pytest.fixture
def wall_clock(monkeypatch):
    """A wall clock that stands still, in a zone that is not UTC."""
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: NOW)
    yield
    monkeypatch.undo()
    time.tzset()


WAITS = {  # what the header says, and how long that is; None if it is ignored
    "7": 7,
    "0": 0,  # A49
    "007": 7,
    formatdate(NOW + 7, usegmt=True): 7,  # A44, A46
    rfc850(NOW + 7): 7,
    asctime(NOW + 7): 7,
    formatdate(NOW - 3600, usegmt=True): 0,
    "": None,
    "-1": None,  # A45
    "1.5": None,
    "1e3": None,
    "nan": None,
    "inf": None,
    "1_0": None,
    "²": None,
    "soon": None,
    "Wed, 99 Foo 2026 00:00:00 GMT": None,
}


def test_retry_after(kit, wall_clock):
    """A44 to A46, A48: it is a floor, with a little jitter on top."""

    async def scenario():
        for header, asked in WAITS.items():
            headers = [(b"Retry-After", header.encode()), (b"Date", DATE.encode())]
            stub = kit.stub(lambda request, headers=headers: kit.response(503, headers=headers), 200)
            await kit.send(kit.guard(stub, Retry(wait=0.25)), kit.request())
            sent, again = stub.times
            assert stub.closed_at[0] == sent
            if asked:
                assert asked <= again - sent <= asked * 1.1, header
            else:
                assert again - sent == pytest.approx(0.25), header

    kit.run(scenario)


@pytest.mark.parametrize("code", [408, 425, 429, 502, 503, 504])
def test_it_counts_on_every_status_that_is_tried_again(kit, code):
    """A50."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(code, headers={"Retry-After": "7"}), 200)
        await kit.send(kit.guard(stub, Retry(wait=0)), kit.request())
        assert 7 <= stub.times[1] <= 7.7

    kit.run(scenario)


def test_on_a_good_answer_it_means_nothing(kit):
    """A50, A60: nor do fields about limits."""

    async def scenario():
        headers = {"Retry-After": "7", "RateLimit": '"p";r=0;t=30', "X-RateLimit-Remaining": "0"}
        for code in (200, 202, 301, 404):
            stub = kit.stub(lambda request, code=code: kit.response(code, headers=headers))
            transport = kit.guard(stub, Retry(), RateLimit("100/s"))
            for _ in range(2):
                await kit.close(await kit.send(transport, kit.request()))
        assert runtime.now() == 0

    kit.run(scenario)


@pytest.mark.parametrize(
    ("header", "options", "reason"),
    [
        ("86400", {}, "retry_after"),  # A47
        ("61", {}, "retry_after"),
        ("99999999999999999999", {}, "retry_after"),
        ("6", {"max_retry_after": 5}, "retry_after"),
        ("40", {}, "deadline"),
        ("20", {"stop": 1}, "attempts"),
    ],
)
def test_what_does_not_fit_is_not_waited_for(kit, header, options, reason):
    """A47: the answer comes back at once; nobody sleeps for less and tries all the same."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(429, headers={"Retry-After": header}))
        with capture_events() as seen:
            transport = kit.guard(stub, Timeout(30), Retry(**{"wait": 0, **options}), Timeout(10))
            response = await kit.send(transport, kit.request())
        assert (response.status_code, runtime.now(), stub.open, len(stub.seen)) == (429, 0, 1, 1)
        assert response.headers["Retry-After"] == header
        assert [event.reason for event in seen if event.name == "retry.gave_up"] == [reason]

    kit.run(scenario)


class Spy(Policy):
    """A policy that keeps the errors it sees."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def link(self, nxt, edge):
        def look(call):
            try:
                return nxt(call)
            except Exception as error:
                self.errors.append(error)
                raise

        return look

    def alink(self, nxt, edge):
        async def look(call):
            try:
                return await nxt(call)
            except Exception as error:
                self.errors.append(error)
                raise

        return look


def test_policies_further_out_are_told_how_long(kit):
    """A47: `retry_after`, on the error that a failing response is inside of a pipeline."""

    async def scenario():
        spy = Spy()
        stub = kit.stub(lambda request: kit.response(429, headers={"Retry-After": "600"}))
        response = await kit.send(kit.guard(stub, spy, Retry()), kit.request())
        (error,) = spy.errors
        assert isinstance(error, FailedResponse)
        assert (error.status, error.retry_after, error.result) == (429, 600.0, response)

    kit.run(scenario)


@pytest.mark.parametrize(
    "headers",
    [
        {"RateLimit": '"p";r=0;t=5', "RateLimit-Policy": '"p";q=10;w=60'},
        {"RateLimit-Remaining": "0", "RateLimit-Reset": "5"},
        {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "5"},
        {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": str(int(NOW) + 5), "Date": DATE},
    ],
)
def test_fields_about_limits_are_obeyed_on_429(kit, headers, wall_clock):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(429, headers=headers), 200)
        await kit.send(kit.guard(stub, Retry(wait=0)), kit.request())
        assert 5 <= stub.times[1] <= 5.5

    kit.run(scenario)


def test_an_open_circuit_is_not_hammered(kit):
    """D56: nor waited for, unless that was asked for."""

    async def scenario():
        stub = kit.stub(503, 200, pool=9)
        transport = kit.guard(stub, Retry(9, wait=0), CircuitBreaker(consecutive=1, jitter=0, probes=1))
        with pytest.raises(kit.http.TransportError):
            await kit.send(transport, kit.request())
        assert (len(stub.seen), runtime.now()) == (1, 0)
        breaker = CircuitBreaker(consecutive=1, jitter=0, probes=1)
        stub = kit.stub(503, 200)
        transport = kit.guard(stub, Retry(9, wait=0, on={503, CircuitOpen}), breaker)
        assert (await kit.send(transport, kit.request())).status_code == 200
        assert 5 <= runtime.now() <= 5.5

    kit.run(scenario)


def test_retries_are_paid_from_a_budget(kit):
    """A11."""

    async def scenario():
        stub = kit.stub(503, pool=99)
        transport = kit.guard(stub, Retry(3, wait=0, budget=RetryBudget(cap=3, refill=1000)))
        for _ in range(4):
            await kit.send(transport, kit.request())
        assert len(stub.seen) == 4 + 3

    kit.run(scenario)


def test_the_number_of_attempts_is_in_the_note(kit):
    async def scenario():
        stub = kit.stub(kit.http.ConnectError("refused"))
        with pytest.raises(kit.http.ConnectError) as caught:
            await kit.send(kit.guard(stub, Retry(3, wait=1, name="retry")), kit.request())
        assert caught.value.__notes__ == ["retry: 3 attempts in 2.00 s"]
        assert caught.value is stub.outcomes[0]

    kit.run(scenario)


# -- learning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "headers", "remaining", "wait"),
    [
        (429, {"Retry-After": "7"}, 0, 7.0),
        (429, {"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "7"}, 0, 7.0),
        (200, {"X-RateLimit-Remaining": "2", "X-RateLimit-Reset": "7"}, 2, None),
        (200, {"RateLimit": '"p";r=0;t=7'}, 0, 7.0),
        (503, {"RateLimit": '"p";r=1;t=7'}, 1, None),
        (404, {"RateLimit": '"p";r=0;t=7'}, 0, 7.0),
        (503, {"Retry-After": "7"}, 4, None),
        (200, {"RateLimit": "spam"}, 4, None),
        (200, {}, 4, None),
        (429, {"Retry-After": "99999999"}, 0, 3600.0),
    ],
)
def test_the_limit_of_the_other_side_is_learned(kit, code, headers, remaining, wait):
    """A51, A60: from good answers and bad ones, for at most an hour, and for this origin only."""

    async def scenario():
        stub = kit.stub(lambda request: kit.response(code, headers=headers), 200, pool=99)
        transport = kit.guard(stub, RateLimit("5/hour", learn=True))
        await kit.send(transport, kit.request())
        for _ in range(remaining):
            assert (await kit.send(transport, kit.request())).status_code == 200
        with pytest.raises(kit.http.TransportError) as caught:
            await kit.send(transport, kit.request())
        assert isinstance(caught.value, RateLimited)
        if wait is not None:
            assert caught.value.retry_after == pytest.approx(wait)
        assert (await kit.send(transport, kit.request(url="https://b/"))).status_code == 200
        assert len(stub.seen) == remaining + 2

    kit.run(scenario)


def test_what_was_learned_lets_the_next_ones_wait(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(429, headers={"Retry-After": "7"}), 200)
        limit = RateLimit("100/s", learn=True, wait=10)
        response = await kit.send(kit.guard(stub, Retry(wait=0), limit), kit.request())
        assert (response.status_code, len(stub.seen)) == (200, 2)
        assert 7 <= stub.times[1] <= 7.7

    kit.run(scenario)


def test_without_learning_nothing_is_learned(kit):
    async def scenario():
        stub = kit.stub(lambda request: kit.response(429, headers={"Retry-After": "7"}), pool=9)
        transport = kit.guard(stub, RateLimit("100/s"))
        for _ in range(3):
            await kit.send(transport, kit.request())

    kit.run(scenario)


# -- over the wire --------------------------------------------------------------------------------------------


def test_retry_after_over_the_wire(kit):
    async def scenario():
        script = [status(503, b"x" * 50, retry_after="0"), status(429, retry_after="86400"), ok()]
        with FlakyServer(script) as server:
            fallback = Fallback(kit.http.Response(299), on=ValueError)
            transport = kit.guard(kit.real(), Timeout(9), fallback, Retry(wait=0), Timeout(9))
            async with kit.client(transport) as client:
                response = await kit.do(client.get, server.url)
            assert (response.status_code, response.headers["Retry-After"]) == (429, "86400")
            assert (len(server.requests), server.connections) == (2, 1)

    kit.run_really(scenario)
