"""What happens when: the phases that the server goes through, and when which call is sent."""

import random
from dataclasses import dataclass

PHASES = {"healthy": 4.0, "errors": 5.0, "hang": 5.0, "outage": 5.0, "recovery": 5.0}
"""The phases in order, each with its seconds in a script of default length."""

DOWN = ("hang", "outage")
"""The phases in which nothing is answered."""

DEFAULT_SECONDS = sum(PHASES.values())
ERROR_RATE = 0.3
PRODUCTS = 25


class Script:
    """The phases, stretched to a length.

    Args:
        seconds: The length of the whole.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.scale = seconds / DEFAULT_SECONDS
        self.ends: dict[str, float] = {}
        end = 0.0
        for phase, length in PHASES.items():
            end += length * self.scale
            self.ends[phase] = end

    def phase_at(self, elapsed: float) -> str:
        """Return the phase after so many seconds; the last one never ends."""
        return next((phase for phase, end in self.ends.items() if elapsed < end), "recovery")


def title(phase: str) -> str:
    """Return what a phase is called on the screen."""
    return f"{100 * ERROR_RATE:.0f} % errors" if phase == "errors" else phase


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call that is due.

    Attributes:
        at: Seconds since the start.
        product: What it asks for, 0 to `PRODUCTS` - 1.
    """

    at: float
    product: int


def schedule(seconds: float, rate: float, seed: int) -> list[Arrival]:
    """Return the calls that users make who know nothing of each other: a Poisson process.

    Args:
        seconds: When the last one may be due.
        rate: Calls per second, on average.
        seed: The same seed gives the same schedule.
    """
    luck = random.Random(seed)
    arrivals = []
    at = luck.expovariate(rate)
    while at < seconds:
        arrivals.append(Arrival(at, luck.randrange(PRODUCTS)))
        at += luck.expovariate(rate)
    return arrivals
