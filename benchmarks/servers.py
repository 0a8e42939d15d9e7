"""What the middleware costs under a real server: requests a second, bare and guarded.

`python -m benchmarks.servers` is uvicorn in a process of its own, with one port for each subject, all in the same
event loop. The client keeps 32 connections to each port busy, one port at a time: the subjects take turns, some
requests each, every round in another order. What counts is the median of the ratios to the bare application's turn
in the same round: what slows the machine down mostly slows down both.

The time of the processor that the server takes for a request is measured too. It depends less on what else the
machine does.
"""

import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import truediv
from pathlib import Path
from typing import Any

from benchmarks import asgi, load
from benchmarks.cases import HAND
from benchmarks.harness import OURS

CASE = "ASGI under uvicorn"
REQUESTS = 60_000
CONNECTIONS = 32
TURN = 1000  # requests
WARM_UP = 2  # turns
TARGET = 0.95

SUBJECTS: dict[str, Any] = {
    asgi.APP: asgi.bare,
    OURS: asgi.resilient_guard,
    asgi.PRESET: asgi.resilient_preset,
    HAND: asgi.by_hand,
    f"{asgi.RIVAL} (decorator)": asgi.slowapi_decorator,
    f"{asgi.RIVAL} (ASGI middleware)": asgi.slowapi_asgi,
}

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class ServerRow:
    """What came out for one subject; what was not measured is None.

    Attributes:
        case: `CASE`.
        subject: Who guards the application.
        requests: How many were made.
        per_second: How many the server gets done in a second.
        ratio: The same in units of the bare application.
        target: The ratio that this library sets out to reach, or None.
        cpu: Microseconds of the processor for one request.
        added_cpu: How much of that is more than what the bare application takes.
        note: Why it was not measured.
    """

    case: str
    subject: str
    requests: int
    per_second: float | None = None
    ratio: float | None = None
    target: float | None = None
    cpu: float | None = None
    added_cpu: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None if there is no target or no number."""
        return None if self.target is None or self.ratio is None else self.ratio >= self.target


# -- the server -----------------------------------------------------------------------------------------------


def with_meter(app: Any) -> Any:
    """Put beside an application what tells how much time of the processor this process has taken: `/cpu`."""

    async def metered(scope, receive, send):
        if scope["path"] != "/cpu":
            await app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        await PlainTextResponse(str(time.process_time()))(scope, receive, send)

    return metered


async def serve(apps: Sequence[Any]) -> None:
    """Serve applications, each at a port of its own, until standard input ends.

    Prints the ports in one line; the standard input of a child process ends at the latest with its parent.
    """
    import uvicorn

    listening = [_listening() for _ in apps]
    options: dict[str, Any] = {"lifespan": "off", "access_log": False, "log_level": "critical"}
    servers = [uvicorn.Server(uvicorn.Config(app, **options)) for app in apps]
    print(*(each.getsockname()[1] for each in listening), flush=True)
    async with asyncio.TaskGroup() as group:
        for server, its in zip(servers, listening, strict=True):
            group.create_task(server.serve(sockets=[its]))
        await asyncio.to_thread(sys.stdin.read)
        for server in servers:
            server.should_exit = server.force_exit = True


def _listening() -> socket.socket:
    # With the protocol named, asyncio sets TCP_NODELAY; without it an answer can take 40 ms.
    its = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    its.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    its.bind((load.HOST, 0))
    its.listen(2048)
    return its


@contextmanager
def served(*command: str) -> Iterator[tuple[list[int], int]]:
    """Start a server by `python -m`; give its ports and the number of its process.

    Raises:
        RuntimeError: It has ended at once.
    """
    with subprocess.Popen(  # noqa: S603 - ourselves
        [sys.executable, "-m", *command], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        ports = process.stdout.readline().split()
        if not ports:
            raise RuntimeError("the server did not start")
        try:
            yield [int(port) for port in ports], process.pid
        finally:
            process.stdin.close()


# -- the client -----------------------------------------------------------------------------------------------


def measure(requests: int = REQUESTS) -> list[ServerRow]:
    """Measure all subjects that work, in turns.

    Args:
        requests: How many each of them gets.
    """
    failed = faults(SUBJECTS)
    names = [name for name in SUBJECTS if name not in failed]
    rounds = max(1, requests // TURN)
    seconds: Mapping[str, list[float]] = {}
    cpu: Mapping[str, list[float]] = {}
    try:
        with served("benchmarks.servers", *names) as (ports, _process):
            seconds, cpu = turns(dict(zip(names, ports, strict=True)), rounds)
    except Exception as error:
        failed = dict.fromkeys(SUBJECTS, note_of(error))
    return [_row(name, rounds * TURN, seconds, cpu, failed.get(name, "")) for name in SUBJECTS]


def faults(subjects: Mapping[str, Any]) -> dict[str, str]:
    """Return why those subjects cannot be measured that are missing, or do not limit."""
    failed = {}
    for name, make in subjects.items():
        try:
            if name != asgi.APP:
                asyncio.run(asgi.limits(make, "async"))
        except Exception as error:
            failed[name] = note_of(error)
    return failed


def note_of(error: Exception) -> str:
    """Return what the table says instead of a number."""
    return f"not measured: {type(error).__name__}: {error}".rstrip(": ")


def _row(
    name: str, requests: int, seconds: Mapping[str, list[float]], cpu: Mapping[str, list[float]], note: str
) -> ServerRow:
    target = TARGET if name == OURS else None
    if note:
        return ServerRow(CASE, name, requests, target=target, note=note)
    took, bare = statistics.median(cpu[name]), statistics.median(cpu[asgi.APP])
    return ServerRow(
        CASE,
        name,
        requests,
        per_second=TURN / statistics.median(seconds[name]),
        ratio=statistics.median(map(truediv, seconds[asgi.APP], seconds[name])),
        target=target,
        cpu=took / TURN * 1e6,
        added_cpu=took / bare - 1,
    )


def turns(ports: Mapping[str, int], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Let subjects take turns; return how many seconds each turn took, and how many of the processor's.

    Args:
        ports: Where each of them listens.
        rounds: How many turns each of them gets.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ports}
    cpu: dict[str, list[float]] = {name: [] for name in ports}
    order, names = random.Random(0), list(ports)
    with ExitStack() as stack:
        loops = {name: stack.enter_context(load.ClosedLoop(port, CONNECTIONS)) for name, port in ports.items()}
        for name in names * WARM_UP:
            loops[name].run(TURN)
        for _ in range(rounds):
            order.shuffle(names)
            for name in names:
                before = float(loops[name].ask("/cpu"))
                seconds[name].append(loops[name].run(TURN))
                cpu[name].append(float(loops[name].ask("/cpu")) - before)
    return seconds, cpu


if __name__ == "__main__":
    asyncio.run(serve([with_meter(SUBJECTS[name]()) for name in sys.argv[1:]]))
