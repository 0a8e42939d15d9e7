"""What guarded clients do over real sockets: how many requests they get done, and what they leave behind.

The server is a process of its own that answers on loopback, over HTTP/1.1 connections that are kept alive. The
client is another one: `python -m benchmarks.sockets measure CASE PACKAGE COLOUR REQUESTS` prints the result.

Two cases. In the first, a bare client and one under the preset take turns, some requests each. What counts is the
median of the ratios of two turns that follow each other: what slows the machine down mostly slows down both. In
the second, every request is answered with 503 first and has to be made again, over a pool of one connection. A
response that is not released leaves no connection for the next attempt, and one that is thrown away with its
connection has the server accept another.
"""

import asyncio
import gc
import importlib
import json
import os
import socket
import stat
import statistics
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import truediv
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import resilient
from benchmarks.harness import Colour

REQUESTS, RETRIES = "Sockets, requests", "Sockets, retries over one connection"
CASES = (REQUESTS, RETRIES)
PACKAGES = ("httpx", "httpx2")
COLOURS: tuple[Colour, ...] = ("sync", "async")

TARGET = 0.95
NO_GROWTH = 1000  # blocks of memory: asyncio alone keeps up to a hundred cancelled timers, of some blocks each
TURN = 50  # requests
WARM_UP = 10  # turns
DESCRIPTORS = 1024


@dataclass(frozen=True, slots=True)
class SocketRow:
    """What came out for one package and colour; what was not measured is None.

    Attributes:
        case: One of `CASES`.
        package: `httpx` or `httpx2`.
        colour: `sync` or `async`.
        requests: How many were made under the guard.
        per_second: How many of them the client gets done in a second.
        ratio: The throughput of the guarded client in units of that of the bare one.
        target: The ratio that this library sets out to reach, or None.
        connections: How many connections the server has accepted from the guarded client.
        sockets: By how many open sockets the process has grown.
        tasks: By how many tasks, or threads in the case of sync code.
        blocks: By how many blocks of memory.
        note: Why it was not measured.
    """

    case: str
    package: str
    colour: Colour
    requests: int
    per_second: float | None = None
    ratio: float | None = None
    target: float | None = None
    connections: int | None = None
    sockets: int | None = None
    tasks: int | None = None
    blocks: int | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether it is quick enough, used one connection and left nothing behind; None if it was not measured."""
        if self.blocks is None:
            return None
        quick = self.target is None or (self.ratio is not None and self.ratio >= self.target)
        return quick and self.connections == 1 and self.sockets == self.tasks == 0 and self.blocks < NO_GROWTH


# -- the server -----------------------------------------------------------------------------------------------


class Answers(asyncio.Protocol):
    """One connection of the server: `/` is answered with 200, `/flaky` with 503 and 200 in turn."""

    accepted = 0

    def connection_made(self, transport):
        # asyncio sets it only if it made the listening socket itself, and without it an answer can take 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        type(self).accepted += 1
        self.transport = transport
        self.received = b""
        self.failed = False

    def data_received(self, data):
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            self.transport.write(self.answer(head))

    def answer(self, head):
        path = head.split(b" ", 2)[1]
        if path == b"/accepted":
            return _answer(b"200 OK", str(self.accepted).encode())
        self.failed = path == b"/flaky" and not self.failed
        return _answer(b"503 Service Unavailable", b"not yet") if self.failed else OK


def _answer(status: bytes, body: bytes) -> bytes:
    length = str(len(body)).encode()
    return (
        b"HTTP/1.1 " + status + b"\r\nContent-Type: text/plain\r\nContent-Length: " + length + b"\r\n\r\n" + body
    )


OK = _answer(b"200 OK", b"answer")


async def serve() -> None:
    """Print the port and answer until standard input ends, which it does at the latest with the parent process."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answers, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


@contextmanager
def served() -> Iterator[str]:
    """Start a server; give its URL."""
    command = [sys.executable, "-m", "benchmarks.sockets", "serve"]
    with subprocess.Popen(  # noqa: S603 - ourselves
        command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.stdin.close()


_ROOT = Path(__file__).parents[1]


# -- the client -----------------------------------------------------------------------------------------------


def measure(case: str, requests: int) -> list[SocketRow]:
    """Measure one case for all packages and colours, each in a process of its own."""
    target = TARGET if case == REQUESTS else None
    return [
        _row(SocketRow(case, package, colour, requests, target=target))
        for package in PACKAGES
        for colour in COLOURS
    ]


def _row(row: SocketRow) -> SocketRow:
    command = [sys.executable, "-m", "benchmarks.sockets", "measure"]
    command += [row.case, row.package, row.colour, str(row.requests)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return replace(row, note=f"not measured: {reason}")
    return replace(row, **json.loads(done.stdout))


def measure_here(case: str, package: str, colour: Colour, requests: int) -> dict[str, Any]:
    """Measure in this process; return what came out, by the names of `SocketRow`."""
    with served() as url, asyncio.Runner() as runner, _Clients(package, colour, runner) as clients:
        return clients.requests(url, requests) if case == REQUESTS else clients.retries(url, requests)


class _Clients:
    """The clients of one process; leaving the `with` block closes them.

    Args:
        package: `httpx` or `httpx2`.
        colour: `sync` or `async`.
        runner: Keeps the event loop for async clients.
    """

    def __init__(self, package: str, colour: Colour, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.is_sync = colour == "sync"
        prefix = "" if self.is_sync else "Async"
        client, ours = importlib.import_module(package), importlib.import_module(f"resilient.{package}")
        self.limits = client.Limits
        self.client_type = getattr(client, f"{prefix}Client")
        self.transport_type = getattr(client, f"{prefix}HTTPTransport")
        self.guard_type = getattr(ours, f"{prefix}ResilientTransport")
        self.opened: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for client in self.opened:
            if self.is_sync:
                client.close()
            else:
                self.runner.run(client.aclose())

    def open(self, transport: Any = None) -> Any:
        client = self.client_type(transport=transport)
        self.opened.append(client)
        return client

    def requests(self, url: str, requests: int) -> dict[str, Any]:
        bare, guarded = self.open(), self.open(self.guard_type(self.transport_type()))
        (theirs, ours), grown = self.turns(url, requests, bare.get, guarded.get)
        ratio = statistics.median(map(truediv, theirs, ours))
        connections = (
            int(self.get(guarded.get, f"{url}/accepted").text) - 1
        )  # the other is that of the bare client
        return {**grown, "ratio": ratio, "per_second": TURN / statistics.median(ours), "connections": connections}

    def retries(self, url: str, requests: int) -> dict[str, Any]:
        retry = resilient.Retry(3, wait=0)
        pipeline = resilient.Pipeline(resilient.Timeout(30), resilient.Bulkhead(1), retry, resilient.Timeout(10))
        transport = self.transport_type(limits=self.limits(max_connections=1))
        guarded = self.open(self.guard_type(transport, pipeline=pipeline))
        (ours,), grown = self.turns(f"{url}/flaky", requests, guarded.get)
        retries = retry.statistics().retries - WARM_UP * TURN
        assert retries == len(ours) * TURN, f"made {retries} retries"
        connections = int(self.get(guarded.get, f"{url}/accepted").text)
        return {**grown, "per_second": TURN / statistics.median(ours), "connections": connections}

    def turns(
        self, url: str, requests: int, *gets: Callable[[str], Any]
    ) -> tuple[list["array[float]"], dict[str, int]]:
        """Let clients take turns; return the seconds of their turns, and what the process has grown by."""
        seconds = [array("d", [0.0] * (requests // TURN)) for _ in gets]  # made before: it is no growth
        for _ in range(WARM_UP):
            for get in gets:
                self.turn(get, url)
        before = self.held()
        for number in range(requests // TURN):
            for get, took in zip(gets, seconds, strict=True):
                took[number] = self.turn(get, url)
        return seconds, {name: count - before[name] for name, count in self.held().items()}

    def turn(self, get: Callable[[str], Any], url: str) -> float:
        """Make some requests, one after the other; return how many seconds they took."""
        gc.collect()
        started = perf_counter()
        statuses = self.statuses(get, url) if self.is_sync else self.runner.run(self.astatuses(get, url))
        took = perf_counter() - started
        assert statuses == {200}, f"answered with {statuses}"
        return took

    def statuses(self, get: Callable[[str], Any], url: str) -> set[int]:
        return {get(url).status_code for _ in range(TURN)}

    async def astatuses(self, get: Callable[[str], Any], url: str) -> set[int]:
        return {(await get(url)).status_code for _ in range(TURN)}

    def get(self, get: Callable[[str], Any], url: str) -> Any:
        return get(url) if self.is_sync else self.runner.run(get(url))

    def held(self) -> dict[str, int]:
        """Count the open sockets, the tasks or threads, and the blocks of memory that this process holds."""
        gc.collect()
        tasks = threading.active_count() if self.is_sync else len(asyncio.all_tasks(self.runner.get_loop()))
        return {"sockets": _open_sockets(), "tasks": tasks, "blocks": sys.getallocatedblocks()}


def _open_sockets() -> int:
    opened = 0
    for descriptor in range(DESCRIPTORS):
        try:
            opened += stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:  # this descriptor is free
            pass
    return opened


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve())
    else:
        print(json.dumps(measure_here(*sys.argv[2:5], int(sys.argv[5]))), flush=True)
