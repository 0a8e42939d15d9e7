"""Load for HTTP servers, over raw connections of HTTP/1.1 that are kept alive.

In a closed loop each connection makes its next request when the last one is answered, so the server is always
busy, and never overloaded: for throughput. In an open loop requests come when they come, whatever became of those
before them, as users do who know nothing of each other: for overload.
"""

import asyncio
import random
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import Self

HOST = "127.0.0.1"
GOOD = 200
LATE = "late"
PATIENCE = 30.0  # s: longer than any answer takes that counts
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def message(path: str) -> bytes:
    """Return the bytes of a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: */*\r\n\r\n".encode()


def parse(received: bytes) -> tuple[int, bytes] | None:
    """Return the status and the body of a response that has a length; None if it is not complete."""
    head, _, body = received.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    return (int(head[9:12]), body) if length and len(body) >= int(length[1]) else None


# -- a closed loop --------------------------------------------------------------------------------------------


class ClosedLoop:
    """Connections that are all busy until enough requests are made.

    It takes less time of the processor than any server does: each connection is read in its turn, and has its next
    request before the one after it is read.

    Args:
        port: Where the server listens.
        connections: How many to open. They are kept from one run to the next; leaving the `with` block closes
            them.
    """

    def __init__(self, port: int, connections: int) -> None:
        self._sockets = [socket.create_connection((HOST, port), timeout=PATIENCE) for _ in range(connections)]
        for each in self._sockets:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for each in self._sockets:
            each.close()

    def run(self, requests: int) -> float:
        """Make so many requests; return how many seconds it took.

        Raises:
            ConnectionError: One of them was not answered with 200, or a connection was closed.
        """
        get, opened = message("/"), self._sockets[:requests]
        started = perf_counter()
        for each in opened:
            each.sendall(get)
        to_send = requests - len(opened)
        for each in islice(cycle(opened), requests):
            status, _body = _read(each)
            if status != GOOD:
                raise ConnectionError(f"answered with {status}")
            if to_send:
                to_send -= 1
                each.sendall(get)
        return perf_counter() - started

    def ask(self, path: str) -> bytes:
        """Make one request; return the body of the response."""
        self._sockets[0].sendall(message(path))
        return _read(self._sockets[0])[1]


def _read(connection: socket.socket) -> tuple[int, bytes]:
    received = b""
    while (answer := parse(received)) is None:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("the server has closed the connection")
        received += data
    return answer


# -- an open loop ---------------------------------------------------------------------------------------------


class Connection(asyncio.Protocol):
    """One connection, with one request on it at a time.

    Attributes:
        answered: Is called with the status and the body when a response is complete.
        broken: Is called when the connection has ended.
        reusable: Whether the server keeps it open.
    """

    def __init__(self) -> None:
        self.answered: Callable[[tuple[int, bytes]], object] = _nothing
        self.broken: Callable[[], object] = _nothing
        self.reusable = True
        self._received = b""

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        self.reusable = False
        self.broken()

    def data_received(self, data):
        self._received += data
        answer = parse(self._received)
        if answer is not None:
            self._received = b""
            self.answered(answer)

    async def ask(self, path: str = "/") -> tuple[int, bytes]:
        """Make a request; return the status and the body."""
        answer = asyncio.get_running_loop().create_future()

        def answered(status_and_body):
            if not answer.done():
                answer.set_result(status_and_body)

        def broken():
            if not answer.done():
                answer.set_exception(ConnectionError("the server has closed the connection"))

        self.answered, self.broken = answered, broken
        self.transport.write(message(path))
        try:
            return await answer
        finally:
            self.answered = self.broken = _nothing


def _nothing(*_arguments):
    pass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        due: When it was due, in seconds from the beginning of the load.
        seconds: How long its client had to wait, from then on.
        result: The status, `LATE` if the client has given up, or the name of an error.
    """

    due: float
    seconds: float
    result: str

    @property
    def good(self) -> bool:
        """Whether it was answered with 2xx in time."""
        return self.result.startswith("2")


async def open_loop(
    port: int, *, rate: float, seconds: float, patience: float, path: str = "/", seed: int = 0
) -> list[Outcome]:
    """Make requests at a rate, at random intervals (a Poisson process); return what became of each.

    A client that has waited long enough gives up and closes its connection. What it has waited counts from the
    moment at which its request was due, so what holds up the sender is in it too.

    Args:
        port: Where the server listens.
        rate: How many requests a second.
        seconds: For how long.
        patience: After how many seconds a client gives up.
        path: What is asked for. Default `"/"`.
        seed: Of the intervals. Default 0.
    """
    clients = _Clients(port, path, patience)
    intervals = random.Random(seed)
    due = intervals.expovariate(rate)
    async with asyncio.TaskGroup() as requests:
        while due < seconds:
            await asyncio.sleep(clients.started + due - clients.now())
            requests.create_task(clients.request(due))
            due += intervals.expovariate(rate)
    clients.close()
    return clients.outcomes


class _Clients:
    """Those who make the requests of an open loop, over as few connections as will do."""

    def __init__(self, port: int, path: str, patience: float) -> None:
        self.port = port
        self.path = path
        self.patience = patience
        self.idle: list[Connection] = []
        self.outcomes: list[Outcome] = []
        self.now = asyncio.get_running_loop().time
        self.started = self.now()

    async def request(self, due: float) -> None:
        connection = None
        try:
            async with asyncio.timeout_at(self.started + due + self.patience):
                connection = self.an_idle_one() or await self.connect()
                status, _body = await connection.ask(self.path)
            result = str(status)
        except TimeoutError:
            result = LATE
        except OSError as error:
            result = type(error).__name__
        else:
            self.idle.append(connection)
            connection = None
        self.outcomes.append(Outcome(due, self.now() - self.started - due, result))
        if connection is not None:
            connection.transport.abort()

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, HOST, self.port))[1]

    def an_idle_one(self) -> Connection | None:
        while self.idle:
            connection = self.idle.pop()
            if connection.reusable:
                return connection
        return None

    def close(self) -> None:
        for connection in self.idle:
            connection.transport.abort()
