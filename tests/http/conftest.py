"""One scenario in both families and all colours: what the tests of the transports are written with.

    def test_a_503_is_tried_again(kit):
        async def scenario():
            stub = kit.stub(503, 200)
            async with kit.client(kit.guard(stub, Retry(wait=1))) as client:
                response = await kit.do(client.get, "https://a/")
            assert (response.status_code, runtime.now()) == (200, 1.0)

        kit.run(scenario)

`kit` is a fixture of six: httpx and httpx2, each as sync code, on asyncio and on trio.
"""

import inspect
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import httpx2
import pytest

import resilient.httpx
import resilient.httpx2
from resilient import Pipeline, runtime
from resilient.testing import _finish, run, virtual_time

FAMILIES = {"httpx": (httpx, resilient.httpx), "httpx2": (httpx2, resilient.httpx2)}
COLOURS = ("sync", "asyncio", "trio")


class Kit:
    """The same operations in one family and colour.

    Args:
        http: `httpx` or `httpx2`.
        ours: Our module for it.
        colour: `sync`, `asyncio` or `trio`.
    """

    def __init__(self, http: ModuleType, ours: ModuleType, colour: str) -> None:
        self.http: Any = http
        self.ours: Any = ours
        self.colour = colour
        self.sync = colour == "sync"
        self.family = ours._FAMILY
        self.Transport = ours.ResilientTransport if self.sync else ours.AsyncResilientTransport
        self.HTTPTransport = self.http.HTTPTransport if self.sync else self.http.AsyncHTTPTransport
        self.Client = self.http.Client if self.sync else self.http.AsyncClient

    def run(self, scenario, *args):
        """Run a scenario in virtual time."""
        if self.sync:
            with virtual_time():
                return _finish(scenario(*args))
        return run(scenario, *args, backend=self.colour)

    def run_really(self, scenario, *args):
        """Run a scenario in real time, for real sockets."""
        return _finish(scenario(*args)) if self.sync else anyio.run(scenario, *args, backend=self.colour)

    async def do(self, function, *args, **kwargs):
        """Call a function of this colour."""
        result = function(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def sleep(self, seconds):
        if self.sync:
            runtime.sleep(seconds)
        else:
            await runtime.asleep(seconds)

    async def close(self, closeable):
        await self.do(closeable.close if self.sync else closeable.aclose)

    async def read(self, response):
        return await self.do(response.read if self.sync else response.aread)

    async def chunks(self, iterable):
        """Return all chunks of a stream."""
        return [chunk for chunk in iterable] if self.sync else [chunk async for chunk in iterable]  # noqa: C416

    def guard(self, inner, *policies, **options):
        """Return a transport with a pipeline around another one."""
        return self.Transport(inner, pipeline=Pipeline(*policies), **options)

    async def send(self, transport, request):
        """Send a request through a transport, without any client."""
        return await self.do(transport.handle_request if self.sync else transport.handle_async_request, request)

    def request(self, method="GET", url="https://a/", **options):
        return self.http.Request(method, url, **options)

    @asynccontextmanager
    async def client(self, transport, **options):
        """Have a client of this family and colour, closed at the end."""
        client = self.Client(transport=transport, **options)
        try:
            yield client
        finally:
            await self.close(client)

    def real(self, **options):
        """Return a transport of the client that really connects, without TLS, which takes long to set up."""
        return self.HTTPTransport(verify=False, **options)

    def one_connection(self):
        return self.real(limits=self.http.Limits(max_connections=1))

    def capped(self, left):
        """Return the timeouts of a request that had none, with so much time left."""
        before_sending = left - min(0.01, left / 4)
        return {"connect": before_sending, "read": left, "write": left, "pool": before_sending}

    def stub(self, *outcomes, **options):
        """Return a transport that answers as told, see `Stub`."""
        return (SyncStub if self.sync else AsyncStub)(self, outcomes, **options)

    def body(self, *pieces, stub=None):
        """Return a stream that no memory holds: bytes, seconds to wait as a float, errors to raise."""
        kind = type("Body", (_Body, self.http.SyncByteStream, self.http.AsyncByteStream), {})
        return kind(pieces, stub)

    def response(self, status=200, *pieces, stub=None, **options):
        """Return a response whose body is a stream."""
        return self.http.Response(status, stream=self.body(*(pieces or (b"body",)), stub=stub), **options)


@dataclass
class Seen:
    """A request as a stub got it: what went over the wire, and when."""

    request: Any
    body: bytes
    timeouts: dict[str, Any] | None
    at: float
    extensions: dict[str, Any] = field(default_factory=dict)

    @property
    def wire(self) -> tuple[Any, ...]:
        """All that a server would see."""
        return self.request.method, str(self.request.url), self.request.headers.raw, self.body


class Stub:
    """A transport of one connection: until a response has been closed, the next request finds the pool empty.

    It reads bodies as they come, keeping nothing: what can be read only once is empty the next time.

    Args:
        kit: The family and colour.
        outcomes: What requests get, the last one for ever: a status, a response, an error, or a function of the
            request (async if it waits) that returns one of these.
        pool: How many responses may be open at the same time.

    Attributes:
        seen: The requests.
        closed_at: When the responses were closed.
    """

    def __init__(self, kit, outcomes, *, pool=1):
        self.kit = kit
        self.outcomes = outcomes
        self.pool = pool
        self.seen = []
        self.made = []
        self.closed_at = []
        self.log = []

    @property
    def times(self):
        return [seen.at for seen in self.seen]

    @property
    def bodies(self):
        return [seen.body for seen in self.seen]

    @property
    def open(self):
        return sum(not body.closed for body in self.made)

    async def _answer(self, request, body):
        timeouts = request.extensions.get("timeout")
        extensions = dict(request.extensions)
        seen = Seen(request, body, None if timeouts is None else dict(timeouts), runtime.now(), extensions)
        self.seen.append(seen)
        if self.open >= self.pool:
            raise self.kit.http.PoolTimeout("a response is still open")
        outcome = self.outcomes[min(len(self.seen), len(self.outcomes)) - 1]
        while callable(outcome) and not isinstance(outcome, type):
            outcome = outcome(request)
            outcome = await outcome if inspect.isawaitable(outcome) else outcome
        if isinstance(outcome, BaseException | type):
            raise outcome
        if isinstance(outcome, int):
            outcome = self.kit.response(outcome)
        if isinstance(outcome.stream, _Body):
            outcome.stream.stub = self
            self.made.append(outcome.stream)
        return outcome

    def _enter(self, what):
        self.log.append(what)
        return self


class SyncStub(Stub):
    def handle_request(self, request):
        return _finish(self._answer(request, b"".join(request.stream)))

    def __enter__(self):
        return self._enter("enter")

    def __exit__(self, *_):
        self._enter("exit")

    def close(self):
        self._enter("close")


class AsyncStub(Stub):
    async def handle_async_request(self, request):
        return await self._answer(request, b"".join([chunk async for chunk in request.stream]))

    async def __aenter__(self):
        return self._enter("enter")

    async def __aexit__(self, *_):
        self._enter("exit")

    async def aclose(self):
        self._enter("close")


class _Body:
    def __init__(self, pieces, stub):
        self.pieces = pieces
        self.stub = stub
        self.closed = 0
        self.read = 0

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, float):
                runtime.sleep(piece)
            elif isinstance(piece, bytes):
                self.read += 1
                yield piece
            else:
                raise piece

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, float):
                await runtime.asleep(piece)
            elif isinstance(piece, bytes):
                self.read += 1
                yield piece
            else:
                raise piece

    def close(self):
        self.closed += 1
        if self.stub is not None:
            self.stub.closed_at.append(runtime.now())

    async def aclose(self):
        await anyio.lowlevel.checkpoint()  # as anything that closes a connection does
        self.close()


@pytest.fixture(params=FAMILIES)
def family(request):
    """One of the packages and our module for it, as a pair."""
    return FAMILIES[request.param]


@pytest.fixture(params=COLOURS)
def kit(family, request):
    """One family in one colour."""
    return Kit(*family, request.param)


@pytest.fixture
def sync_kit(family):
    return Kit(*family, "sync")


@pytest.fixture(params=COLOURS[1:])
def async_kit(family, request):
    return Kit(*family, request.param)
