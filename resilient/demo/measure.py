"""What came of the calls: outcomes in, numbers out."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resilient.demo.script import DOWN, PHASES, Script
from resilient.events import Event


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended.

    Attributes:
        due: When it was to be sent, in seconds since the start.
        latency: Seconds from then to its end.
        kind: `fresh`: the server answered during the call. `stale`: the answer is from before. `failed`: an error.
        error: The type of the error.
    """

    due: float
    latency: float
    kind: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Numbers:
    """What came of some calls.

    Attributes:
        calls: How many were made.
        fresh: Answered by the server.
        stale: Answered with an older answer.
        failed: Ended in an error.
        success_rate: Fraction with an answer that the caller could use, fresh or stale; None without calls.
        p50: Median of the latency in seconds, failed calls included; None without calls.
        p99: What 99 % of the latencies do not exceed.
        hits: Requests that reached the server.
        amplification: Requests for each call; None without calls.
    """

    calls: int
    fresh: int
    stale: int
    failed: int
    success_rate: float | None
    p50: float | None
    p99: float | None
    hits: int
    amplification: float | None


def numbers(outcomes: Sequence[Outcome], hits: int) -> Numbers:
    """Sum up some outcomes.

    Args:
        outcomes: Of the calls.
        hits: How many requests of theirs reached the server.
    """
    kinds = Counter(outcome.kind for outcome in outcomes)
    latencies = sorted(outcome.latency for outcome in outcomes)
    calls = len(outcomes)
    return Numbers(
        calls=calls,
        fresh=kinds["fresh"],
        stale=kinds["stale"],
        failed=kinds["failed"],
        success_rate=(calls - kinds["failed"]) / calls if calls else None,
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        hits=hits,
        amplification=hits / calls if calls else None,
    )


def percentile(ordered: Sequence[float], fraction: float) -> float | None:
    """Return the smallest value that a fraction of all do not exceed (nearest rank); None if there are none."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else None


@dataclass(frozen=True, slots=True)
class Side:
    """What came of the calls of one client.

    Attributes:
        total: All of them.
        phases: Those due in each phase, and the requests that reached the server in it.
        errors: How many ended in which type of error.
    """

    total: Numbers
    phases: dict[str, Numbers]
    errors: dict[str, int]

    def hits_while_down(self) -> int:
        """Return how many requests reached the server while it answered nothing."""
        return sum(self.phases[phase].hits for phase in DOWN)


def side(outcomes: Sequence[Outcome], hits: Mapping[str, int], script: Script) -> Side:
    """Sum up one client.

    Args:
        outcomes: Of all its calls.
        hits: How many of its requests reached the server in which phase.
        script: Tells which call was due in which phase.
    """
    return Side(
        total=numbers(outcomes, sum(hits.values())),
        phases={
            phase: numbers([one for one in outcomes if script.phase_at(one.due) == phase], hits.get(phase, 0))
            for phase in PHASES
        },
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common()),
    )


def reasons_why_not_better(bare: Side, guarded: Side) -> list[str]:
    """Tell what is missing for the guarded side to be better; nothing if it is.

    Better is: more calls are answered, the slowest are not slower, and a server that is down is not asked more
    often.
    """
    reasons = []
    if (guarded.total.success_rate or 0) <= (bare.total.success_rate or 0):
        reasons.append("its success rate is not higher")
    if (guarded.total.p99 or 0) > (bare.total.p99 or 0):
        reasons.append("its p99 is worse")
    if guarded.hits_while_down() > bare.hits_while_down():
        reasons.append("more of its requests reached the server while that was down")
    return reasons


class EventCounts:
    """A listener that counts events by policy, and by name and reason."""

    def __init__(self) -> None:
        self.by_policy: dict[str, Counter[str]] = {}

    def __call__(self, event: Event) -> None:
        """Count an event."""
        reason = getattr(event, "reason", None)
        name = event.name if reason is None else f"{event.name} ({reason})"
        self.by_policy.setdefault(event.policy, Counter())[name] += 1


def ended_since(outcomes: Sequence[Outcome], moment: float) -> list[Outcome]:
    """Return the calls that ended after a moment.

    Args:
        outcomes: In the order in which the calls ended.
        moment: In seconds since the start.
    """
    return list(itertools.takewhile(lambda one: one.due + one.latency >= moment, reversed(outcomes)))
