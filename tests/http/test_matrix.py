"""What becomes of a request at servers that misbehave in every way, in both families and all colours.

Each row is one server. For each row a request ends in one of these ways:

    good(2)                    with a 200, at the second try
    once("ReadError")          with this, at the first try, because it may not be repeated
    spent("ReadError")         with this, at the third try, because three are all there are
    late("TimedOut: total")    with this, at the first try, because there is no time left for another one
    final(500)                 with this, at the first try, and `Retry` had nothing to say about it

Whatever the end, the same is asked: that the error is one of the family, with the request in it; that the server
got as many requests as tries, all with the same body; that `Retry` says why it gave up, and the circuit breaker
knows whom to blame; and that the only connection of the pool is free again.
"""

import contextlib
import functools
import itertools
import re
import time
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from typing import Any

import anyio.lowlevel
import pytest

from resilient import CircuitBreaker, Fallback, Retry, Timeout, runtime
from resilient.errors import CircuitOpen, TimedOut
from resilient.http.headers import FOREVER
from resilient.testing import capture_events

from .flaky_server import (
    FlakyServer,
    H2Server,
    Step,
    choose,
    chunked,
    close_before_headers,
    close_idle,
    drip,
    drip_headers,
    early,
    early_response,
    extra_bytes,
    garbage_status_line,
    h2_close,
    h2_goaway,
    h2_refused,
    h2_reset,
    hang,
    hanging_port,
    informational_flood,
    ok,
    raw,
    refused_port,
    reset_before_headers,
    reset_mid_body,
    status,
    truncated,
)

SHORT = 0.05  # s: the deadline or the timeout that is meant to end something
LONG = 20.0  # s: one that is not
FOUR = ("connect", "read", "write", "pool")

BUSY, LATER, BROKEN = status(503, b"busy"), status(429, b"later", retry_after=0), status(500, b"broken")
CONTENT = {200: b"ok", 413: b"large", 429: b"later", 500: b"broken", 503: b"busy"}
BAD_STATUS = raw(b"HTTP/1.1 999999 What\r\n\r\n")
BAD_LENGTH = raw(b"HTTP/1.1 200 Fine\r\nContent-Length: -5\r\n\r\n")

WHY = {
    "attempts": "3 attempts in T s",
    "not_repeatable": "1 attempt in T s; the call cannot be repeated",
    "deadline": "1 attempt in T s; the next attempt would begin after the deadline",
}

# Writing a body fails while the generator of the client is suspended, and httpx leaves that to the collector.
LEAKS = pytest.mark.filterwarnings("ignore:Async generator 'httpx._content:ResourceWarning")
METHODS = pytest.mark.parametrize("method", ["GET", "POST"])


def unless_starved(test):
    """Play a cell up to three times: 50 ms are short, and who shares the machine may have taken them.

    Each time all of it is new, the server included, so a fault of ours fails all three.
    """

    @functools.wraps(test)
    def played(**given):
        for _ in range(2):
            with contextlib.suppress(Exception):
                return test(**given)
        return test(**given)

    return played


@dataclass(frozen=True)
class End:
    """How a request ends.

    Attributes:
        what: The status, the name of the error, or `TimedOut: ` and whose deadline it was.
        tries: How many requests the server got.
        reason: Why `Retry` gave up, None if it did not.
        failures: How many calls the circuit breaker has against the server.
    """

    what: int | str
    tries: int
    reason: str | None
    failures: int


def good(tries, *, failures=None):
    return End(200, tries, None, tries - 1 if failures is None else failures)


def once(what, *, failures=1):
    return End(what, 1, "not_repeatable", failures)


def spent(what, *, failures=3):
    return End(what, 3, "attempts", failures)


def final(what, *, failures=0):
    return End(what, 1, None, failures)


def late(what):
    return End(what, 1, "deadline", 1)


@dataclass(frozen=True)
class Row:
    """A server, how requests to it end, and with which options.

    Attributes:
        script: What the server does.
        get: The end of a GET.
        post: The end of a POST.
        attempt: The deadline of an attempt, in seconds.
        total: The deadline of the whole call.
        timeout: The four timeouts of the client, None for none.
        buffer: Whether the transport reads the body.
        http2: Whether it speaks HTTP/2.
    """

    script: list[Step]
    get: End
    post: End
    attempt: float = LONG
    total: float = 2 * LONG
    timeout: float | None = None
    buffer: bool = False
    http2: bool = False


@dataclass
class Sending:
    """A request to a server, through a transport that has a single connection, and all that can be seen of it."""

    kit: Any
    row: Row
    server: Any
    breaker: Any = field(default_factory=lambda: CircuitBreaker(minimum_calls=99))

    def __post_init__(self):
        row, kit = self.row, self.kit
        self.retry = Retry(3, wait=0, name="retry")
        # A connection of HTTP/2 that breaks stays in the pool of httpcore2 for ever, with or without us.
        limits = kit.http.Limits(max_connections=4 if row.http2 else 1)
        self.inner = kit.real(limits=limits, http1=not row.http2, http2=row.http2)
        deadlines = Timeout(row.total, name="total"), Timeout(row.attempt, name="attempt")
        policies = deadlines[0], self.retry, self.breaker, deadlines[1]
        self.transport = kit.guard(self.inner, *policies, buffer=row.buffer)

    async def check(self, method, content, sent, end):
        """Send it, and compare all of it with the end that is expected."""
        kit, before = self.kit, len(self.server.requests)
        async with kit.client(self.transport, timeout=self.row.timeout) as client:
            with capture_events() as seen:
                try:
                    response = await kit.do(client.request, method, self.server.url, content=content)
                except kit.http.HTTPError as error:
                    self.check_error(error, method, end)
                else:
                    assert (response.status_code, response.content) == (end.what, CONTENT[end.what])
            requests = self.server.requests[before:]
            assert len(requests) == end.tries
            assert [event.reason for event in seen if event.name == "retry.gave_up"] == [end.reason] * bool(
                end.reason
            )
            assert [event.delay for event in seen if event.name == "retry.scheduled"] == [0.0] * (end.tries - 1)
            statistics = self.breaker.statistics()
            assert (statistics.state, statistics.failures) == ("closed", end.failures)
            await self.check_pool()
        assert self.server.wait_until(lambda: self.server.open_connections == 0)
        assert [(request.complete, request.body) for request in requests] == [(True, sent)] * end.tries

    def check_error(self, error, method, end):
        kit = self.kit
        if isinstance(error, TimedOut):
            assert isinstance(error, kit.http.TimeoutException)
            assert end.what == f"TimedOut: {error.policy}"
        else:
            assert type(error) is getattr(kit.http, str(end.what))
        assert (error.request.method, error.request.url) == (method, self.server.url)
        notes = getattr(error, "__notes__", [])
        assert len(notes) == bool(end.reason)
        if end.reason:
            assert re.sub(r"\d+\.\d\d", "T", notes[0]) == f"retry: {WHY[end.reason]}"

    async def check_pool(self, expected=b"after"):
        """Send a request past all policies: it finds no connection if one is still in use."""
        kit = self.kit
        request = kit.request(url=f"{self.server.url}/after", extensions={"timeout": dict.fromkeys(FOUR, 2.0)})
        response = await kit.send(self.inner, request)
        assert (response.status_code, await kit.read(response)) == (200, expected)
        await kit.close(response)


def serve(row):
    """Return the server of a row, which does what the row says but for the request after all others."""

    def well_after(step):
        if step.early:
            return step
        return choose(lambda request: ok(b"after") if request.target == "/after" else step)

    return (H2Server if row.http2 else FlakyServer)([well_after(step) for step in row.script])


def play(kit, row, method, end, *, content, sent):
    async def scenario():
        with serve(row) as server:
            await Sending(kit, row, server).check(method, content, sent, end)

    kit.run_really(scenario)


# -- one request, on a new connection -------------------------------------------------------------------------

ROWS = {
    "all is well": Row([ok()], good(1), good(1)),
    "busy once": Row([BUSY, ok()], good(2), once(503)),
    "busy twice": Row([BUSY, BUSY, ok()], good(3), once(503)),
    "busy for ever": Row([BUSY], spent(503), once(503)),
    "too many once": Row([LATER, ok()], good(2, failures=0), once(429, failures=0)),
    "broken": Row([BROKEN, ok()], final(500, failures=1), final(500, failures=1)),
    "reset": Row([reset_before_headers(), ok()], good(2), once("ReadError")),
    "reset for ever": Row([reset_before_headers()], spent("ReadError"), once("ReadError")),
    "closed": Row([close_before_headers(), ok()], good(2), once("RemoteProtocolError")),
    "closed for ever": Row([close_before_headers()], spent("RemoteProtocolError"), once("RemoteProtocolError")),
    "garbage": Row([garbage_status_line(), ok()], good(2), once("RemoteProtocolError")),
    "garbage for ever": Row([garbage_status_line()], spent("RemoteProtocolError"), once("RemoteProtocolError")),
    "a bad status": Row([BAD_STATUS, ok()], good(2), once("RemoteProtocolError")),
    "a bad length": Row([BAD_LENGTH, ok()], good(2), once("RemoteProtocolError")),
    "one fault after the other": Row(
        [reset_before_headers(), garbage_status_line(), ok()], good(3), once("ReadError")
    ),
    "the last fault counts": Row([BUSY, BUSY, reset_before_headers()], spent("ReadError"), once(503)),
    "interim answers": Row([informational_flood(30)], good(1), good(1)),
    "interim answers, then busy": Row([informational_flood(9, then=BUSY), ok()], good(2), once(503)),
    "an early answer": Row([early_response(413, b"large")], final(413), final(413)),
    "an early 503": Row([early_response(503, b"busy"), ok()], good(2), once(503)),
    "headers in drops": Row([drip_headers(every=0.0001)], good(1), good(1)),
    "a body in drops": Row([drip(b"ok", every=0.001)], good(1), good(1)),
    "chunks": Row([chunked(b"o", b"k")], good(1), good(1)),
}

# The answer has come, so that what is wrong with its body is told to the caller who reads it.
BODIES = {
    "a reset body": Row([reset_mid_body(), ok()], final("ReadError"), final("ReadError")),
    "a short body": Row([truncated(), ok()], final("RemoteProtocolError"), final("RemoteProtocolError")),
    "a broken chunk": Row(
        [chunked(b"x", end="broken"), ok()], final("RemoteProtocolError"), final("RemoteProtocolError")
    ),
    "a missing end": Row(
        [chunked(b"x", end="cut"), ok()], final("RemoteProtocolError"), final("RemoteProtocolError")
    ),
    "a reset chunk": Row([chunked(b"x", end="reset"), ok()], final("ReadError"), final("ReadError")),
}
BUFFERED = {
    "a reset body": Row([reset_mid_body(), ok()], good(2), once("ReadError"), buffer=True),
    "a reset body for ever": Row([reset_mid_body()], spent("ReadError"), once("ReadError"), buffer=True),
    "a short body": Row([truncated(), ok()], good(2), once("RemoteProtocolError"), buffer=True),
    "a broken chunk": Row([chunked(b"x", end="broken"), ok()], good(2), once("RemoteProtocolError"), buffer=True),
    "a missing end": Row([chunked(b"x", end="cut"), ok()], good(2), once("RemoteProtocolError"), buffer=True),
    "a good one": Row([chunked(b"o", b"k")], good(1), good(1), buffer=True),
}

ATTEMPT, TOTAL = "TimedOut: attempt", "TimedOut: total"
SLOW = {
    "silence once": Row([hang(), ok()], good(2), once(ATTEMPT), attempt=2 * SHORT),
    "silence": Row([hang()], spent(ATTEMPT), once(ATTEMPT), attempt=SHORT),
    "silence, for the client": Row([hang()], spent("ReadTimeout"), once("ReadTimeout"), timeout=SHORT),
    "headers faster than the client's timeout": Row(
        [drip_headers()], spent(ATTEMPT), once(ATTEMPT), attempt=SHORT, timeout=LONG / 4
    ),
    "headers slower than the client's timeout": Row(
        [drip_headers(every=3600)], spent("ReadTimeout"), once("ReadTimeout"), timeout=SHORT
    ),
    "interim answers without end": Row(
        [informational_flood()], spent(ATTEMPT), once(ATTEMPT), attempt=SHORT, timeout=LONG / 4
    ),
}


SLOW_BODIES = {
    "drops faster than the client's timeout": Row(
        [drip(), ok()], final(TOTAL), final(TOTAL), total=2 * SHORT, timeout=LONG / 4
    ),
    "chunks faster than the client's timeout": Row(
        [chunked(*[b"x"] * 1000, every=0.01), ok()], final(TOTAL), final(TOTAL), total=2 * SHORT, timeout=LONG / 4
    ),
    "drops slower than the client's timeout": Row(
        [drip(every=3600), ok()], final("ReadTimeout"), final("ReadTimeout"), timeout=SHORT
    ),
    "no end": Row([chunked(b"x", end="hang"), ok()], final(TOTAL), final(TOTAL), total=2 * SHORT),
}
NO_TIME = {
    "silence": Row([hang(), ok()], late(TOTAL), once(TOTAL), total=SHORT),
    "interim answers without end": Row([informational_flood(), ok()], late(TOTAL), once(TOTAL), total=SHORT),
    "headers in drops": Row([drip_headers(), ok()], late(TOTAL), once(TOTAL), total=SHORT),
}


def rows(*tables):
    return pytest.mark.parametrize(
        "row", [pytest.param(row, id=name) for table in tables for name, row in table.items()]
    )


def play_simply(kit, row, method):
    content, end = (b"", row.get) if method == "GET" else (b"body", row.post)
    play(kit, row, method, end, content=content, sent=content)


@LEAKS
@METHODS
@rows(ROWS, SLOW)
@unless_starved
def test_an_answer(kit, row, method):
    play_simply(kit, row, method)


@METHODS
@rows(BODIES)
@unless_starved
def test_a_body(kit, row, method):
    play_simply(kit, row, method)


@rows(SLOW_BODIES)
@unless_starved
def test_a_slow_body(kit, row):
    """A32."""
    play_simply(kit, row, "GET")


@METHODS
@rows(BUFFERED)
@unless_starved
def test_a_body_that_is_part_of_the_attempt(kit, row, method):
    play_simply(kit, row, method)


@METHODS
@rows(NO_TIME)
@unless_starved
def test_no_time_for_another_try(kit, row, method):
    play_simply(kit, row, method)


# -- HTTP/2 ---------------------------------------------------------------------------------------------------

H2 = {
    "all is well": Row([ok()], good(1), good(1), http2=True),
    "busy once": Row([BUSY, ok()], good(2), once(503), http2=True),
    "refused": Row([h2_refused(), ok()], good(2), good(2), http2=True),
    "refused for ever": Row(
        [h2_refused()], spent("RemoteProtocolError"), spent("RemoteProtocolError"), http2=True
    ),
    "reset": Row([h2_reset(), ok()], good(2), once("RemoteProtocolError"), http2=True),
    "a reset body": Row(
        [h2_reset(sent=5), ok()], final("RemoteProtocolError"), final("RemoteProtocolError"), http2=True
    ),
    "going away, nothing done": Row([h2_goaway(0), ok()], good(2), good(2), http2=True),
    "going away, nothing done, still open": Row([h2_goaway(0, then=hang()), ok()], good(2), good(2), http2=True),
    "going away": Row([h2_goaway(), ok()], good(2), once("RemoteProtocolError"), http2=True),
    "going away, but answered": Row(
        [h2_goaway(then=ok()), ok()], good(2, failures=0), once("LocalProtocolError", failures=0), http2=True
    ),
    "closed": Row([h2_close(), ok()], good(2), once("RemoteProtocolError"), http2=True),
    "silence": Row([hang(), ok()], good(2), once(ATTEMPT), attempt=2 * SHORT, http2=True),
}


@METHODS
@rows(H2)
@unless_starved
def test_http2(kit, row, method):
    """A61, A62."""
    play_simply(kit, row, method)


@METHODS
def test_http2_repeats_by_itself_what_a_goaway_says_was_not_processed(kit, method):
    """A61: httpcore does, whatever the method, without anybody being asked."""

    async def scenario():
        row = Row([ok(), h2_goaway(1), ok(b"again")], good(1), good(1), http2=True)
        content = b"" if method == "GET" else b"body"
        with H2Server(row.script) as server:
            sending = Sending(kit, row, server)
            async with kit.client(sending.transport, timeout=None) as client:
                assert (await kit.do(client.get, server.url)).content == b"ok"
                assert (await kit.do(client.request, method, server.url, content=content)).content == b"again"
            assert [(request.body, request.connection) for request in server.requests] == [
                (b"", 1),
                (content, 1),
                (content, 2),
            ]
            assert sending.retry.statistics().retries == 0

    kit.run_really(scenario)


# -- bodies that can be read only once ------------------------------------------------------------------------


class AsyncOnce:
    """What `iter([...])` is in sync code: gives everything the first time, then nothing, and no error."""

    def __init__(self, *pieces):
        self._pieces = list(pieces)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._pieces:
            return self._pieces.pop(0)
        raise StopAsyncIteration


def pieces():
    yield b"one"
    yield b"two"


async def apieces():
    yield b"one"
    yield b"two"


ONE_SHOT = {
    "generator": (pieces, apieces),
    "iterator": (lambda: iter([b"one", b"two"]), lambda: AsyncOnce(b"one", b"two")),
}

# What a body of bytes survives, and what becomes of one that can be read only once.
UPLOADS = {
    "all is well": (ROWS["all is well"], good(1)),
    "busy once": (ROWS["busy once"], once(503)),
    "an early 503": (ROWS["an early 503"], once(503)),
    "reset": (ROWS["reset"], once("ReadError")),
    "closed": (ROWS["closed"], once("RemoteProtocolError")),
    "one fault after the other": (ROWS["one fault after the other"], once("ReadError")),
    "http2, busy once": (H2["busy once"], once(503)),
    "http2, refused": (H2["refused"], once("RemoteProtocolError")),
    "http2, going away, nothing done": (H2["going away, nothing done"], once("RemoteProtocolError")),
}


@LEAKS
@pytest.mark.parametrize("upload", UPLOADS)
def test_an_idempotent_upload(kit, upload):
    """A5: what is sent again is the same, byte for byte."""
    row, _ = UPLOADS[upload]
    body = bytes(range(256)) * 100
    play(kit, row, "PUT", row.get, content=body, sent=body)


@LEAKS
@pytest.mark.parametrize("kind", ONE_SHOT)
@pytest.mark.parametrize("upload", UPLOADS)
def test_an_upload_that_cannot_be_repeated(kit, upload, kind):
    """A1, A2: it is idempotent, perhaps it was never processed, but what would be sent again is nothing."""
    row, end = UPLOADS[upload]
    play(kit, row, "PUT", end, content=ONE_SHOT[kind][not kit.sync](), sent=b"onetwo")


@LEAKS
@pytest.mark.parametrize("kind", ONE_SHOT)
def test_http2_does_not_repeat_it_by_itself(kit, kind):
    """A2, A61: httpcore would send it again as an empty body, and get a 200."""

    async def scenario():
        row = Row([ok(), h2_goaway(1), ok()], good(1), good(1), http2=True)
        with H2Server(row.script) as server:
            sending = Sending(kit, row, server)
            async with kit.client(sending.transport, timeout=None) as client:
                await kit.do(client.get, server.url)
                with pytest.raises(kit.http.RemoteProtocolError) as caught:
                    await kit.do(client.put, server.url, content=ONE_SHOT[kind][not kit.sync]())
                assert caught.value.request.method == "PUT"
            assert [request.body for request in server.requests[1:] if request.complete] == [b"onetwo"]
            assert sending.retry.statistics().retries == 0

    kit.run_really(scenario)


# -- a connection that was used before ------------------------------------------------------------------------

# How many requests the server has seen is not always certain.
USED = {
    "reset while nothing is read": ([ok(), early(reset_before_headers()), ok()], (200, 1), ("ReadError", None)),
    "closed while idle": ([close_idle(), ok()], (200, 1), (200, 1)),
    "closed just now": ([ok(), close_before_headers(), ok()], (200, 2), ("RemoteProtocolError", 1)),
    "bytes left over": ([extra_bytes(), ok()], (200, None), ("RemoteProtocolError", None)),
}


@METHODS
@pytest.mark.parametrize("used", USED)
def test_a_connection_that_was_used_before(kit, used, method):
    """A10, A54: whether the server had seen the request is not known, so a POST is not sent again."""
    script, *ends = USED[used]
    what, tries = ends[method == "POST"]

    async def scenario():
        with FlakyServer(script) as server:
            sending = Sending(kit, Row(script, good(1), good(1)), server)
            async with kit.client(sending.transport, timeout=None) as client:
                first = await kit.do(client.get, server.url)
                assert (first.status_code, first.content) == (200, b"ok")
                if what == 200:
                    response = await kit.do(client.request, method, server.url)
                    assert (response.status_code, response.content) == (200, b"ok")
                else:
                    with pytest.raises(getattr(kit.http, what)) as caught:
                        await kit.do(client.request, method, server.url)
                    assert caught.value.request.method == method
                assert tries is None or len(server.requests) == 1 + tries
                await sending.check_pool(b"ok")

    kit.run_really(scenario)


# -- nobody there ---------------------------------------------------------------------------------------------


@dataclass
class Nobody:
    """Where no server is."""

    url: str


CONTENTS = {"GET": b"", "POST": b"body", "one-shot POST": None}
PORTS = {
    "refused": (refused_port, "ConnectError", {}),
    "hanging": (hanging_port, "ConnectTimeout", {"timeout": SHORT}),
    "hanging until the deadline": (hanging_port, ATTEMPT, {"attempt": SHORT}),
}


# A deadline says only just before it passes that nothing was sent: too close for a test with a POST.
@pytest.mark.parametrize(
    ("port", "sent"), [*itertools.product(["refused", "hanging"], CONTENTS), ("hanging until the deadline", "GET")]
)
@unless_starved
def test_nobody_there(kit, port, sent):
    """A9: nothing was sent, whatever the method; but a body that can be read only once is never risked."""
    having, what, options = PORTS[port]
    content = CONTENTS[sent]
    end = once(what) if content is None else spent(what)

    async def scenario():
        with having() as number:
            nobody = Nobody(f"http://127.0.0.1:{number}")
            sending = Sending(kit, Row([], end, end, **options), nobody)
            async with kit.client(sending.transport, timeout=sending.row.timeout) as client:
                body = ONE_SHOT["iterator"][not kit.sync]() if content is None else content
                method = sent.split()[-1]
                with pytest.raises(kit.http.TransportError) as caught:
                    await kit.do(client.request, method, nobody.url, content=body)
                sending.check_error(caught.value, method, end)
            assert sending.retry.statistics().retries == end.tries - 1
            assert sending.breaker.statistics().failures == end.failures

    kit.run_really(scenario)


# -- the circuit breaker --------------------------------------------------------------------------------------

FAILING = {name: ROWS[name] for name in ("busy for ever", "reset for ever", "garbage for ever")}


@METHODS
@rows(FAILING)
@unless_starved
def test_a_server_that_fails_is_left_alone(kit, row, method):
    async def scenario():
        with serve(row) as server:
            breaker = CircuitBreaker(consecutive=3, open_for=60, jitter=0, name="breaker")
            sending = Sending(kit, row, server, breaker)
            async with kit.client(sending.transport, timeout=None) as client:
                try:
                    assert (await kit.do(client.get, server.url)).status_code == row.get.what
                except kit.http.TransportError as error:
                    sending.check_error(error, "GET", row.get)
                assert breaker.statistics().state == "open"
                with pytest.raises(CircuitOpen) as caught:
                    await kit.do(client.request, method, server.url)
                refusal = caught.value
                assert isinstance(refusal, kit.http.TransportError)
                assert (refusal.request.method, refusal.request.url) == (method, server.url)
                assert "breaker" in refusal.policy
                assert 40 < refusal.retry_after <= 60
                assert len(server.requests) == 3
                await sending.check_pool()

    kit.run_really(scenario)


# -- when to come back ----------------------------------------------------------------------------------------

THEN = 1_800_000_000  # s since the epoch: what the clock of the server says, which is not what ours says
THERE = formatdate(THEN, usegmt=True)
WAIT = 0.25  # s: if the server does not say


def asking(**fields):
    """Return headers, written with underscores for hyphens."""
    return {name.replace("_", "-"): value for name, value in fields.items()} | {"Date": THERE}


def rfc850(at):
    return time.strftime("%A, %d-%b-%y %H:%M:%S GMT", time.gmtime(at))


ASKED = {  # and how many seconds are waited then
    "0": (asking(Retry_After="0"), WAIT),
    "seconds": (asking(Retry_After="7"), 7.0),
    "a date": (asking(Retry_After=formatdate(THEN + 7, usegmt=True)), 7.0),
    "a date of RFC 850": (asking(Retry_After=rfc850(THEN + 7)), 7.0),
    "a date of asctime": (asking(Retry_After=time.asctime(time.gmtime(THEN + 7))), 7.0),
    "now": (asking(Retry_After=THERE), WAIT),
    "the past": (asking(Retry_After=formatdate(THEN - 3600, usegmt=True)), WAIT),
    "-1": (asking(Retry_After="-1"), WAIT),
    "abc": (asking(Retry_After="abc"), WAIT),
    "1.5": (asking(Retry_After="1.5"), WAIT),
    "1e9": (asking(Retry_After="1e9"), WAIT),
    "nothing": (asking(Retry_After=""), WAIT),
    "RateLimit": (asking(RateLimit='"p";r=0;t=7'), 7.0),
    "X-RateLimit": (asking(X_RateLimit_Remaining="0", X_RateLimit_Reset="7"), 7.0),
    "X-RateLimit since the epoch": (asking(X_RateLimit_Remaining="0", X_RateLimit_Reset=str(THEN + 7)), 7.0),
}
TOO_LONG = {
    "86400": (asking(Retry_After="86400"), 86400.0),
    "10**12": (asking(Retry_After=str(10**12)), FOREVER),
    "a date": (asking(Retry_After=formatdate(THEN + 7200, usegmt=True)), 7200.0),
    "X-RateLimit": (asking(X_RateLimit_Remaining="0", X_RateLimit_Reset="3600"), 3600.0),
}


@pytest.fixture
def waits():
    """Have waits that end at once and no jitter, and return how long the waits would have been."""
    waits = []

    async def skip(seconds):
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    real = runtime._installed
    runtime.install(replace(real, sleep=waits.append, asleep=skip, random=lambda low, high: low))
    yield waits
    runtime.install(real)


@pytest.mark.parametrize(("asked", "code"), [*zip(ASKED, itertools.cycle([429, 503]))])
def test_when_to_come_back(kit, waits, asked, code):
    """A44 to A49: on 429 and 503 alike, by the clock of the server, and what cannot be read is ignored."""
    headers, seconds = ASKED[asked]

    async def scenario():
        with FlakyServer([status(code, headers=headers), ok(b"done")]) as server, capture_events() as seen:
            transport = kit.guard(kit.real(), Timeout(LONG), Retry(wait=WAIT), CircuitBreaker(), Timeout(LONG))
            async with kit.client(transport) as client:
                assert (await kit.do(client.get, server.url)).content == b"done"
            assert len(server.requests) == 2
            assert [event.delay for event in seen if event.name == "retry.scheduled"] == waits == [seconds]

    kit.run_really(scenario)


@METHODS
@pytest.mark.parametrize(("asked", "code"), [*zip(TOO_LONG, itertools.cycle([429, 503]))])
def test_not_before_tomorrow(kit, waits, asked, code, method):
    """A47: the answer comes back at once; nobody waits for less and tries all the same."""
    headers, seconds = TOO_LONG[asked]
    reason, told = ("retry_after", seconds) if method == "GET" else ("not_repeatable", None)
    errors = []

    async def scenario():
        with FlakyServer([status(code, b"later", headers=headers), ok()]) as server, capture_events() as seen:
            outside = Fallback("never used", on=errors.append)
            transport = kit.guard(kit.real(), outside, Timeout(LONG), Retry(), CircuitBreaker(), Timeout(LONG))
            async with kit.client(transport) as client:
                response = await kit.do(client.request, method, server.url)
            assert (response.status_code, response.content, len(server.requests)) == (code, b"later", 1)
            assert [event.reason for event in seen if event.name == "retry.gave_up"] == [reason]
            assert [getattr(error, "retry_after", None) for error in errors] == [told]
            assert waits == []

    kit.run_really(scenario)
