"""What a rate limit in the middleware remembers of a flood of clients, each with an address of its own.

`python -m benchmarks.flood KEYS MAX_KEYS` prints the result. One client has used up its limit before the flood,
and tries again all the time while a million others come. The memory for others is bounded, and who is refused must
not be forgotten to make room for them: he may get what the limit gives him anew in the meantime, and no request
more.

There is no server. Memory is what `tracemalloc` sees.
"""

import asyncio
import gc
import json
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, replace
from ipaddress import IPv4Address
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any

import resilient
from benchmarks.asgi import requests_to
from benchmarks.harness import OURS
from resilient.asgi import ResilienceMiddleware, client_address

CASE = "ASGI flood of clients"
KEYS = 1_000_000
MAX_KEYS = 100_000
LIMIT, PER = 100, 60  # requests of one client, in s
EVERY = 100  # newcomers between two tries of the one who has used up his limit
FULL = 2  # times max_keys: by then, the dictionary has got the reserves that it needs for many changes
SPREAD = 1.05  # of the memory at the cap

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class FloodRow:
    """What came out; what was not measured is None.

    Attributes:
        case: `CASE`.
        subject: Whose limit.
        keys: How many clients came.
        max_keys: How many the limit may remember.
        remembered: How many it remembers at the end; newcomers that find no room share one more.
        at_the_cap: How many bytes the memory had grown by when twice as many had come.
        at_the_end: The same at the end.
        refused: How many of the newcomers were refused.
        tries: How often the one who had used up his limit tried.
        admitted: How often that went well.
        allowed: How often the limit gave him a request anew.
        note: Why it was not measured.
    """

    case: str
    subject: str
    keys: int
    max_keys: int
    remembered: int | None = None
    at_the_cap: int | None = None
    at_the_end: int | None = None
    refused: int = 0
    tries: int = 0
    admitted: int = 0
    allowed: int = 0
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the memory stays at the cap and who is refused stays refused; None if it was not measured."""
        if self.remembered is None or self.at_the_cap is None or self.at_the_end is None:
            return None
        bounded = self.remembered <= self.max_keys and self.at_the_end <= SPREAD * self.at_the_cap
        return bounded and self.admitted <= self.allowed


def measure(keys: int = KEYS) -> list[FloodRow]:
    """Measure in a process of its own.

    Args:
        keys: How many clients come. The limit may remember a tenth of them.
    """
    row = FloodRow(CASE, OURS, keys, keys // (KEYS // MAX_KEYS))
    command = [sys.executable, "-m", "benchmarks.flood", str(row.keys), str(row.max_keys)]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [replace(row, note=f"not measured: {reason}")]
    return [replace(row, **json.loads(done.stdout))]


async def flood(keys: int, max_keys: int) -> dict[str, Any]:
    """Let so many clients make a request each; return what came out, by the names of `FloodRow`."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limit = resilient.RateLimit(resilient.Rate(LIMIT, per=PER), key=client_address, max_keys=max_keys)
    request = requests_to(ResilienceMiddleware(app, pipeline=limit))
    greedy = {"client": ("192.0.2.1", 1)}
    started = perf_counter()
    before = sum([await request(**greedy) == 200 for _ in range(2 * LIMIT)])
    refused = tries = admitted = 0
    gc.collect()
    tracemalloc.start()
    empty, at_the_cap = _held(), 0
    for number, address in zip(range(1, keys + 1), count(int(IPv4Address("10.0.0.0"))), strict=False):
        refused += await request(client=(str(IPv4Address(address)), 1)) != 200
        if number % EVERY == 0:
            tries += 1
            admitted += await request(**greedy) == 200
        if number == FULL * max_keys:
            at_the_cap = _held() - empty
    at_the_end = _held() - empty
    tracemalloc.stop()
    anew = int((perf_counter() - started) * LIMIT / PER) + 1
    return {
        "remembered": limit.statistics().keys,
        "at_the_cap": at_the_cap,
        "at_the_end": at_the_end,
        "refused": refused,
        "tries": tries,
        "admitted": admitted,
        "allowed": LIMIT + anew - before,
    }


def _held() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(int(sys.argv[1]), int(sys.argv[2])))), flush=True)
