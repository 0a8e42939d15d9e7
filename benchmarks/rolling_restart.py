"""A rolling restart under load: how many requests fail while two servers are replaced one after the other.

`python -m benchmarks.rolling_restart` prints a table. Two uvicorn processes stand behind a balancer of our own,
which asks each for `/readyz` and sends requests to those that answered 200 last; it tries nothing again. Requests
come at a fixed rate, whether or not earlier ones have ended, each over a connection of its own. Both processes are
restarted by SIGTERM, as an orchestrator does it: the next one only when the one before is ready again. What counts
is how many requests did not get a 200; with `Drain` there must be none.
"""

import argparse
import asyncio
import math
import signal
import socket
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from resilient.asgi.drain import Drain
from resilient.asgi.health import Health

CASE = "Rolling restart"
WITH, WITHOUT = "uvicorn with Drain", "uvicorn alone"
REQUESTS = 5_000
RATE = 200  # requests a second
WORK = 0.05  # seconds that a request takes in the app
PROBE_EVERY = 0.25  # seconds
GRACE = 1.0  # seconds: four probes
PATIENCE = 30  # seconds for a process to be ready, or to end

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class RestartRow:
    """What came out.

    Attributes:
        subject: `WITH` or `WITHOUT`.
        requests: How many were made.
        failed: How many of them did not get a 200, by reason.
        restarts: How many processes were replaced meanwhile.
        p99: Milliseconds that 99 of 100 requests took at most.
        note: Why it was not measured.
    """

    subject: str
    requests: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    restarts: int = 0
    p99: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether no request failed; None for the comparison, and for what was not measured."""
        if self.subject != WITH or self.note:
            return None
        return not self.failed and self.requests > 0


# -- the app ------------------------------------------------------------------------------------------------------

drain = Drain(grace=GRACE, timeout=10)
health = Health(drain=drain)


def drained_app():
    return _app(installs=True)


def plain_app():
    return _app(installs=False)


def _app(*, installs):
    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            if installs:
                assert drain.install()
            await health(scope, receive, send)
        elif health.handles(scope):
            await health(scope, receive, send)
        elif not drain.enter():
            await answer(send, 503)
        else:
            try:
                await asyncio.sleep(WORK)
                await answer(send, 200)
            finally:
                drain.leave()

    async def answer(send, status):
        headers = [(b"content-length", b"2"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"ok"})

    return app


# -- the processes --------------------------------------------------------------------------------------------


class Replica:
    """One uvicorn process after the other, always at the same port."""

    def __init__(self, factory):
        self.factory = factory
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.ready = False
        self.process = None

    async def start(self):
        command = ["-m", "uvicorn", f"benchmarks.rolling_restart:{self.factory}", "--factory"]
        command += ["--port", str(self.port), "--log-level", "critical", "--no-access-log"]
        self.process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=_ROOT)

    async def restart(self):
        await self.stop()
        self.ready = False  # the probes have the last word, but a process that has ended is not ready
        await self.start()
        await until(lambda: self.ready)

    async def stop(self):
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            await self.process.wait()


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - other processes set no events
            await asyncio.sleep(0.01)


# -- the balancer ---------------------------------------------------------------------------------------------


class Balancer:
    """Sends each connection to the next replica that is ready, and byte for byte back."""

    def __init__(self, replicas):
        self.replicas = replicas
        self.turn = 0

    async def serve(self, reader, writer):
        try:
            there, back = await self.connect()
            try:
                back.write(await reader.readuntil(b"\r\n\r\n"))
                while data := await there.read(65536):
                    writer.write(data)
                await writer.drain()
            finally:
                back.close()
        except OSError as error:
            writer.write(f"HTTP/1.1 502 {type(error).__name__}\r\nConnection: close\r\n\r\n".encode())
        finally:
            writer.close()

    async def connect(self):
        ready = [replica for replica in self.replicas if replica.ready] or self.replicas
        self.turn += 1
        return await asyncio.open_connection("127.0.0.1", ready[self.turn % len(ready)].port)

    async def probe(self, replica):
        while True:
            try:
                async with asyncio.timeout(1):
                    replica.ready = (await get(replica.port, "/readyz")).startswith("200")
            except (OSError, TimeoutError):
                replica.ready = False
            await asyncio.sleep(PROBE_EVERY)


async def get(port, path):
    """Make a request over a connection of its own; return the status and the reason."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
    finally:
        writer.close()
    return answer.partition(b"\r\n")[0].decode().partition(" ")[2] or "no answer"


# -- the load -------------------------------------------------------------------------------------------------


class Load:
    """Makes requests at a fixed rate until it is told to stop."""

    def __init__(self, port):
        self.port = port
        self.seconds = []
        self.failed = {}

    async def run(self, enough):
        started = perf_counter()
        async with asyncio.TaskGroup() as group:
            made = 0
            while not enough(made):
                group.create_task(self.request())
                made += 1
                await asyncio.sleep(max(0.0, started + made / RATE - perf_counter()))

    async def request(self):
        started = perf_counter()
        try:
            async with asyncio.timeout(10):
                outcome = await get(self.port, "/")
        except (OSError, TimeoutError) as error:
            outcome = type(error).__name__
        self.seconds.append(perf_counter() - started)
        if not outcome.startswith("200"):
            self.failed[outcome] = self.failed.get(outcome, 0) + 1


async def ameasure(subject, requests):
    replicas = [Replica("drained_app" if subject == WITH else "plain_app") for _ in range(2)]
    balancer = Balancer(replicas)
    server = await asyncio.start_server(balancer.serve, "127.0.0.1", 0)
    for replica in replicas:
        await replica.start()
    probes = [asyncio.create_task(balancer.probe(replica)) for replica in replicas]
    try:
        await until(lambda: all(replica.ready for replica in replicas))
        load = Load(server.sockets[0].getsockname()[1])
        restarts = asyncio.create_task(restart_all(replicas))
        await load.run(lambda made: made >= requests and restarts.done())
        row = RestartRow(subject, len(load.seconds), load.failed, await restarts)
        return _with_p99(row, load.seconds)
    finally:
        for probe in probes:
            probe.cancel()
        for replica in replicas:
            with suppress(ProcessLookupError):
                await replica.stop()
        server.close()


async def restart_all(replicas):
    for replica in replicas:
        await asyncio.sleep(1)
        await replica.restart()
    return len(replicas)


def _with_p99(row, seconds):
    p99 = statistics.quantiles(seconds, n=100)[-1] * 1000 if len(seconds) > 1 else math.nan
    return RestartRow(row.subject, row.requests, row.failed, row.restarts, p99)


def measure(requests=REQUESTS):
    """Measure with `Drain` and without it."""
    rows = []
    for subject in (WITH, WITHOUT):
        try:
            rows.append(asyncio.run(ameasure(subject, requests)))
        except Exception as error:
            rows.append(RestartRow(subject, note=f"not measured: {type(error).__name__}: {error}".rstrip(": ")))
    return rows


def as_table(rows):
    lines = ["| subject | requests | failed | restarts | p99, ms |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        if row.note:
            lines.append(f"| {row.subject} | {row.note} ||||")
            continue
        reasons = ", ".join(f"{reason}: {times}" for reason, times in sorted(row.failed.items()))
        failed = f"{sum(row.failed.values())}" + (f" ({reasons})" if reasons else "")
        lines.append(f"| {row.subject} | {row.requests:,} | {failed} | {row.restarts} | {row.p99:.0f} |")
    return "\n".join(lines)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rolling_restart")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="at least so many for each subject")
    rows = measure(parser.parse_args(arguments).requests)
    print(as_table(rows))
    return 0 if rows[0].met else 1


if __name__ == "__main__":
    sys.exit(main())
