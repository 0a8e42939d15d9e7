"""Rates: so many in so much time."""

import re
from dataclasses import KW_ONLY, dataclass
from typing import Self

from resilient import options

_UNITS = {
    unit: seconds
    for names, seconds in (
        (("s", "sec", "second"), 1),
        (("m", "min", "minute"), 60),
        (("h", "hour"), 3600),
        (("d", "day"), 86400),
        (("ms", "millisecond"), 0.001),  # after the minutes, so that "ms" is not the plural of "m"
    )
    for name in names
    for unit in (name, f"{name}s")
}
_RATE = re.compile(r"\s*(\d+)\s*(?:/|per)\s*(\d+(?:\.\d+)?)?\s*([a-z]+)\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Rate:
    """So many in so much time.

    Args:
        limit: How many, an int >= 1.
        per: In how many seconds (or a timedelta). Default 1 s.
    """

    limit: int
    _: KW_ONLY
    per: options.Seconds = 1.0

    def __post_init__(self) -> None:
        options.whole("Rate", "limit", self.limit)
        object.__setattr__(self, "per", options.seconds("Rate", "per", self.per))
        if self.micros < 1:
            raise options.refuse("Rate", "per", self.per, "at least a microsecond")

    @property
    def micros(self) -> int:
        """The length of the period in microseconds."""
        assert isinstance(self.per, float)  # noqa: S101 - __post_init__ has made it one
        return round(self.per * 1_000_000)

    @classmethod
    def of(cls, owner: str, value: object) -> Self:
        """Return a rate, whatever form it was given in.

        Args:
            owner: Whose option it is, for the error.
            value: A `Rate`, or a str such as `"100/minute"`, `"5 per 10 s"`, `"1000/2h"`.

        Raises:
            TypeError: Neither a str nor a `Rate`.
            ValueError: A str of another form, or a rate of nothing.
        """
        if isinstance(value, cls):
            return value
        allowed = 'a rate such as "100/minute", "5/10s" or Rate(100, per=60)'
        if not isinstance(value, str):
            raise options.misused(owner, "rate", value, allowed)
        match = _RATE.fullmatch(value)
        if match is None or match[3].lower() not in _UNITS:
            raise options.refuse(owner, "rate", value, allowed)
        count, length = int(match[1]), float(match[2] or 1)
        if count < 1 or length <= 0:
            raise options.refuse(owner, "rate", value, allowed)
        return cls(count, per=length * _UNITS[match[3].lower()])

    def __repr__(self) -> str:
        return f"Rate({self.limit}, per={self.per:g})"

    def __str__(self) -> str:
        return f"{self.limit} per {self.per:g} s"
