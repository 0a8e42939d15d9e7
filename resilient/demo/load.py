"""Sending calls on schedule, whatever becomes of those before them.

The loop is open: users do not wait for each other. A latency counts from the moment at which the call was due, so
what holds up the sender itself is in it too (no coordinated omission).
"""

import asyncio
from collections.abc import Callable, Sequence

from resilient import runtime
from resilient.demo.clients import Fetch
from resilient.demo.measure import Outcome
from resilient.demo.script import Arrival


async def send(
    arrivals: Sequence[Arrival], fetch: Fetch, record: Callable[[Outcome], object], started: float
) -> None:
    """Make all calls, and return when the last one has ended.

    Args:
        arrivals: Which calls are due when.
        fetch: Makes a call.
        record: Is told of the outcome of each.
        started: When the schedule began, in seconds of the monotonic clock.
    """
    async with asyncio.TaskGroup() as calls:
        for arrival in arrivals:
            await asyncio.sleep(started + arrival.at - runtime.now())
            calls.create_task(_make(arrival, fetch, record, started))


async def _make(arrival: Arrival, fetch: Fetch, record: Callable[[Outcome], object], started: float) -> None:
    begun = runtime.now()
    error = None
    try:
        answer = await fetch(arrival.product)
        kind = "fresh" if answer.received_at >= begun else "stale"
    except Exception as caught:
        kind, error = "failed", type(caught).__name__
    record(Outcome(arrival.at, runtime.now() - started - arrival.at, kind, error))
