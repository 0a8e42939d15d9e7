"""What is left of a server when three times as many requests come as it can answer.

`python -m benchmarks.overload bare` (or `guarded`) is uvicorn in a process of its own. Its handler needs one of
8 places for 40 ms, as with a pool of connections to a database: 200 requests a second is all that it can do. The
bare application lets everybody wait for a place. The guarded one has what its user knows in front of it: as many
places in the `Bulkhead`, a queue half as long, and the patience of the clients as the `Timeout`.

The load is an open loop of clients that give up after a second and close their connection. First a quarter of the
capacity, for comparison; then three times as much as the capacity. What counts is *goodput*: the responses with
2xx that came while somebody waited for them, in units of the capacity.
"""

import asyncio
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resilient
from benchmarks import load, servers
from benchmarks.harness import OURS
from resilient.asgi import ResilienceMiddleware

CASE = "Overload"
BARE = "bare app"
SECONDS = 20.0
PLACES = 8
WORK = 0.04  # s
CAPACITY = PLACES / WORK  # requests a second
TIMES = 3
UNLOADED = 0.25  # of the capacity
PATIENCE = 1.0  # s
QUEUE = 4

GOODPUT = 0.90
P99 = 2.0  # times as long as without load
FLAT = 4 * 1024 * 1024  # bytes


@dataclass(frozen=True, slots=True)
class OverloadRow:
    """What came out for one server; what was not measured is None.

    Attributes:
        case: `CASE`.
        subject: `BARE`, or ours.
        seconds: How long the overload lasted.
        requests: How many requests came in that time.
        goodput: The responses with 2xx that came in time, in units of the capacity.
        at_the_end: The same in the second half of the overload.
        refused: How many were answered with something else, in time, or not at all.
        late: How many clients gave up.
        unloaded_p99: In how many seconds 99 of 100 requests had their 2xx without the overload.
        p99: The same under overload, without those who had none; None if nobody had one.
        grown: By how many bytes the memory of the server has grown, from before the overload to its end.
        note: Why it was not measured.
    """

    case: str
    subject: str
    seconds: float
    requests: int = 0
    goodput: float | None = None
    at_the_end: float | None = None
    refused: int = 0
    late: int = 0
    unloaded_p99: float | None = None
    p99: float | None = None
    grown: int | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether our server answers enough, soon enough, without growing; None for the other one."""
        if self.subject != OURS or self.goodput is None:
            return None
        quick = self.p99 is not None and self.unloaded_p99 is not None and self.p99 <= P99 * self.unloaded_p99
        return self.goodput >= GOODPUT and quick and (self.grown or 0) <= FLAT


# -- the server -----------------------------------------------------------------------------------------------


def bare() -> Any:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    places = asyncio.Semaphore(PLACES)

    async def work(request):
        async with places:
            await asyncio.sleep(WORK)
        return JSONResponse({"hello": "world"})

    return Starlette(routes=[Route("/", work)])


def guarded() -> Any:
    guard = resilient.Pipeline(
        resilient.Timeout(PATIENCE), resilient.Bulkhead(PLACES, queue=QUEUE), resilient.LoadShed()
    )
    return ResilienceMiddleware(bare(), pipeline=guard)


APPS = {BARE: bare, OURS: guarded}


def memory_of(process: int) -> int | None:
    """Return the bytes of memory that a process takes, where the system tells it as Linux does."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return None
    (kilobytes,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kilobytes) * 1024


# -- the load -------------------------------------------------------------------------------------------------


def measure(seconds: float = SECONDS) -> list[OverloadRow]:
    """Measure the bare server, then the guarded one.

    Args:
        seconds: For how long the overload lasts.
    """
    rows = []
    for subject in APPS:
        try:
            with servers.served("benchmarks.overload", subject) as ((port,), process):
                rows.append(asyncio.run(under_load(subject, port, process, seconds)))
        except Exception as error:
            rows.append(OverloadRow(CASE, subject, seconds, note=servers.note_of(error)))
    return rows


async def under_load(subject: str, port: int, process: int, seconds: float) -> OverloadRow:
    """Load a server, a little and then too much; return what came out."""
    calm = await load.open_loop(port, rate=UNLOADED * CAPACITY, seconds=seconds / 2, patience=PATIENCE)
    before = memory_of(process)
    storm = asyncio.create_task(
        load.open_loop(port, rate=TIMES * CAPACITY, seconds=seconds, patience=PATIENCE, seed=1)
    )
    await asyncio.sleep(seconds)
    after = memory_of(process)
    outcomes = await storm
    return OverloadRow(
        CASE,
        subject,
        seconds,
        requests=len(outcomes),
        goodput=goodput(outcomes, 0.0, seconds),
        at_the_end=goodput(outcomes, seconds / 2, seconds),
        refused=sum(not each.good and each.result != load.LATE for each in outcomes),
        late=sum(each.result == load.LATE for each in outcomes),
        unloaded_p99=p99(calm),
        p99=p99(outcomes),
        grown=None if before is None or after is None else after - before,
    )


def goodput(outcomes: Sequence[load.Outcome], start: float, end: float) -> float:
    """Return how many good answers came from `start` to `end`, in units of the capacity."""
    return (
        sum(each.good and start <= each.due + each.seconds < end for each in outcomes) / (end - start) / CAPACITY
    )


def p99(outcomes: Sequence[load.Outcome]) -> float | None:
    """Return in how many seconds 99 of 100 good answers came; None without any."""
    seconds = sorted(each.seconds for each in outcomes if each.good)
    return seconds[math.ceil(0.99 * len(seconds)) - 1] if seconds else None


if __name__ == "__main__":
    asyncio.run(servers.serve([APPS[sys.argv[1]]()]))
