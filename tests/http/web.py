"""An origin that answers as it is told, and a client that talks to it, in the family and colour of a kit.

    origin = Origin(reply(200, b"one", cache_control="max-age=60"), reply(503), kit.http.ConnectError("refused"))
    web = Web(kit, Cache(0), origin)
    response = await web.get()

Bodies are streams, as those of real transports are, unless `memory=True`: so they can be read only once, may be
left unread, and somebody has to close them. `origin.open` says how many were not.
"""

import gzip
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio

from resilient import runtime
from resilient.testing import _finish

URL = "https://example.com/a"


@dataclass
class Reply:
    """One answer.

    Attributes:
        status: Its status code.
        chunks: Its body, in pieces.
        headers: Its fields.
        wait: Seconds until the headers come.
        gap: Seconds before each piece of the body.
        breaks: What is raised after the last piece.
        memory: Whether the body is there at once.
        extensions: Its extensions.
    """

    status: int
    chunks: tuple[bytes, ...]
    headers: list[tuple[bytes, bytes]]
    wait: float
    gap: float
    breaks: Exception | None
    memory: bool
    extensions: dict[str, Any]


def reply(
    status: int = 200,
    *chunks: bytes,
    wait: float = 0.0,
    gap: float = 0.0,
    breaks: Exception | None = None,
    memory: bool = False,
    raw: tuple[tuple[bytes, bytes], ...] = (),
    extensions: dict[str, Any] | None = None,
    **fields: str,
) -> Reply:
    """Return an answer; fields are written as `cache_control="max-age=60"`, or as pairs in `raw`."""
    headers = [(name.replace("_", "-").title().encode(), value.encode()) for name, value in fields.items()]
    return Reply(status, chunks, [*headers, *raw], wait, gap, breaks, memory, extensions or {})


def zipped(text: bytes, **fields: str) -> Reply:
    return reply(200, gzip.compress(text), content_encoding="gzip", **fields)


class Origin:
    """Answers requests; the last step repeats. A step is a `Reply`, an exception, or a function of the request.

    Attributes:
        requests: What has come.
        open: How many bodies are not closed.
        started: How many bodies somebody has begun to read.
        closed: Whether the transport was closed.
    """

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.requests = []
        self.open = self.started = 0
        self.closed = False

    @property
    def asked(self) -> int:
        return len(self.requests)

    def next(self, request: Any) -> Reply:
        step = self.steps[min(len(self.requests), len(self.steps) - 1)]
        self.requests.append(Seen(request))
        if callable(step) and not isinstance(step, type):
            step = step(request)
        if isinstance(step, BaseException):
            raise step
        return step

    def respond(self, module: Any, step: Reply, body: type) -> Any:
        if step.memory:
            stream: Any = module.ByteStream(b"".join(step.chunks))
        else:
            stream = body(self, step)
            self.open += 1
        return module.Response(step.status, headers=step.headers, stream=stream, extensions=dict(step.extensions))


class Seen:
    """A request as it was sent."""

    def __init__(self, request: Any) -> None:
        self.method = request.method
        self.url = str(request.url)
        self.headers = dict(request.headers)
        self.raw = list(request.headers.raw)
        self.extensions = dict(request.extensions)
        self.at = runtime.now()


class Body:
    """What the bodies of both colours have in common."""

    def __init__(self, origin: Origin, step: Reply) -> None:
        self.origin = origin
        self.step = step
        self.is_open = True
        self.used = False

    def begin(self) -> None:
        assert not self.used, "this body was read before"
        self.used = True
        self.origin.started += 1

    def end(self) -> None:
        if self.is_open:
            self.is_open = False
            self.origin.open -= 1


class SyncBody(Body):
    def __iter__(self) -> Any:
        self.begin()
        for chunk in self.step.chunks:
            if self.step.gap:
                runtime.sleep(self.step.gap)
            yield chunk
        if self.step.breaks is not None:
            raise self.step.breaks

    def close(self) -> None:
        self.end()


class AsyncBody(Body):
    async def __aiter__(self) -> Any:
        self.begin()
        for chunk in self.step.chunks:
            if self.step.gap:
                await runtime.asleep(self.step.gap)
            yield chunk
        if self.step.breaks is not None:
            raise self.step.breaks

    async def aclose(self) -> None:
        self.end()


class Transport:
    def __init__(self, kit: Any, origin: Origin) -> None:
        self.kit = kit
        self.origin = origin
        base = kit.http.SyncByteStream if kit.sync else kit.http.AsyncByteStream
        self.body = type("Stream", (SyncBody if kit.sync else AsyncBody, base), {})

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Any:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def handle_request(self, request: Any) -> Any:
        step = self.origin.next(request)
        if step.wait:
            runtime.sleep(step.wait)
        return self.origin.respond(self.kit.http, step, self.body)

    def close(self) -> None:
        self.origin.closed = True


class AsyncTransport(Transport):
    async def handle_async_request(self, request: Any) -> Any:
        step = self.origin.next(request)
        if step.wait:
            await runtime.asleep(step.wait)
        return self.origin.respond(self.kit.http, step, self.body)

    async def aclose(self) -> None:
        self.close()


class Web:
    """A client in the colour of a kit; all that it does is awaited.

    Args:
        kit: The kit.
        pipeline: The policies.
        origin: Who answers.
        around: What is put around the transport to the origin.
        options: More options of the transport.
    """

    def __init__(
        self,
        kit: Any,
        pipeline: Any,
        origin: Origin,
        *,
        around: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        self.kit, self.origin = kit, origin
        inner = (Transport if kit.sync else AsyncTransport)(kit, origin)
        self.transport = kit.Transport(inner if around is None else around(inner), pipeline=pipeline, **options)
        self.client = kit.Client(transport=self.transport, trust_env=False)

    async def get(self, url: str = URL, **options: Any) -> Any:
        return await self.request("GET", url, **options)

    async def request(self, method: str, url: str = URL, *, stream: bool = False, **options: Any) -> Any:
        return await self.send(self.client.build_request(method, url, **options), stream=stream)

    async def send(self, request: Any, *, stream: bool = False) -> Any:
        return await self.kit.do(self.client.send, request, stream=stream)

    async def close(self) -> None:
        await self.kit.close(self.client)


async def gather(kit: Any, *functions: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run async functions at the same time, in threads or in tasks; return their results, or what they raised."""
    results: list[Any] = [None] * len(functions)

    async def run_one(index: int) -> None:
        try:
            results[index] = await functions[index]()
        except Exception as error:
            results[index] = error

    if kit.sync:
        clock = runtime.start_thread.__self__  # type: ignore[attr-defined]
        clock.run_threads(*(lambda index=index: _finish(run_one(index)) for index in range(len(functions))))
        return results
    async with anyio.create_task_group() as group:
        for index in range(len(functions)):
            group.start_soon(run_one, index)
            for _ in range(2):  # they begin in this order, on trio too
                await anyio.lowlevel.checkpoint()
    return results


def served(response: Any) -> Any:
    """Return what the cache says that it has served, None if the answer is the origin's."""
    return response.extensions.get("resilient", {}).get("cache")
