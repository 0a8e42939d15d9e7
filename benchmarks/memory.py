"""How much memory a rate limiter needs for many keys.

Each subject runs in a process of its own: `python -m benchmarks.memory SUBJECT KEYS` prints bytes per key.
"""

import gc
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import OURS

CASE = "RateLimit memory"
TARGET = 120.0
LIMIT, PER = 1000, 3600  # calls for each key, in s


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """What came out for one limiter; `bytes_per_key` is None if it was not measured."""

    case: str
    subject: str
    keys: int
    bytes_per_key: float | None
    target: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target was reached; None if there is no target or no number."""
        return None if self.target is None or self.bytes_per_key is None else self.bytes_per_key <= self.target


def resilient(keys: int) -> Callable[[str], bool]:
    from resilient import Rate, RateLimit, RateLimited

    guarded = RateLimit(Rate(LIMIT, per=PER), key=lambda key: key, max_keys=keys)(lambda key: True)

    def admit(key):
        try:
            return guarded(key)
        except RateLimited:
            return False

    return admit


def limits(keys: int) -> Callable[[str], bool]:
    from limits import RateLimitItemPerSecond
    from limits.storage import MemoryStorage
    from limits.strategies import FixedWindowRateLimiter

    item = RateLimitItemPerSecond(LIMIT, PER)
    limiter = FixedWindowRateLimiter(MemoryStorage())
    return lambda key: limiter.hit(item, key)


def throttled(keys: int) -> Callable[[str], bool]:
    from datetime import timedelta

    from throttled import MemoryStore, Throttled, per_duration

    store = MemoryStore(options={"MAX_SIZE": keys})
    quota = per_duration(timedelta(seconds=PER), LIMIT, burst=LIMIT)
    limiter = Throttled(using="gcra", quota=quota, store=store)
    return lambda key: not limiter.limit(key).limited


def nopanic(keys: int) -> Callable[[str], bool]:
    import nopanic as library

    limit = library.keyed(
        lambda _key: library.rate_limit(LIMIT, PER, max_wait=0), key=lambda key: key, maxsize=keys
    )
    guarded = limit(lambda key: True)

    def admit(key):
        try:
            return guarded(key)
        except library.RateLimited:
            return False

    return admit


def by_hand(keys: int) -> Callable[[str], bool]:
    drained: dict[Hashable, float] = {}
    step, monotonic = PER / LIMIT, time.monotonic

    def admit(key):
        now = monotonic()
        due = max(drained.get(key, 0.0), now) + step
        if due - now > PER + step / 2:
            return False
        drained[key] = due
        return True

    return admit


SUBJECTS = {
    OURS: resilient,
    "limits (fixed window)": limits,
    "throttled-py": throttled,
    "nopanic": nopanic,
    "by hand: a dict of floats": by_hand,
}


def measure(keys: int) -> list[MemoryRow]:
    """Measure all limiters, one process after the other."""
    return [_row(name, keys) for name in SUBJECTS]


def _row(name: str, keys: int) -> MemoryRow:
    target = TARGET if name == OURS else None
    command = [sys.executable, "-m", "benchmarks.memory", name, str(keys)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return MemoryRow(CASE, name, keys, None, target, f"not measured: {reason}")
    return MemoryRow(CASE, name, keys, float(done.stdout), target)


def bytes_per_key(name: str, keys: int) -> float:
    """Let a limiter see so many keys; return by how much its memory grew, divided by their number."""
    check = SUBJECTS[name](16)
    assert sum(check("one") for _ in range(LIMIT + 10)) == LIMIT, "does not limit a key"
    assert check("other"), "does not limit each key by itself"
    admit = SUBJECTS[name](keys)
    strings = [f"client-{number:08d}" for number in range(keys)]
    admit(strings[0])
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for key in strings:
        admit(key)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return grown / keys


if __name__ == "__main__":
    print(bytes_per_key(sys.argv[1], int(sys.argv[2])), flush=True)
