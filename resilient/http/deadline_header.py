"""Headers in which a caller says how many seconds it will wait: read and written, without any I/O.

| name                              | value                                   | example | source                 |
|-----------------------------------|-----------------------------------------|---------|------------------------|
| `grpc-timeout`                    | 1 to 8 digits and one of `H M S m u n`  | `250m`  | gRPC over HTTP/2       |
| `x-envoy-...-ms`                  | whole milliseconds, 0 means no limit    | `250`   | Envoy's router filter  |
| any other name that ends in `-ms` | whole milliseconds                      | `250`   |                        |
| any other name                    | seconds, with or without a decimal part | `0.25`  |                        |

In `grpc-timeout`, `M` are minutes and `m` milliseconds. All are times from now on, so the clocks of the two sides
need not agree; the way here takes time, too, which nobody has counted. A value that is not exactly in its format
is no deadline: to guess could be wrong by 60,000 times. Zero is a deadline that has passed, but not to Envoy.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resilient import options

_GRPC = re.compile(r"([0-9]{1,8})([HMSmun])")
_MILLISECONDS = re.compile(r"[0-9]{1,12}")
_SECONDS = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")

# Each unit as (seconds in it, how many of it are a second): one of the two is 1, so that no step is inexact twice.
_UNITS = {"n": (1, 10**9), "u": (1, 10**6), "m": (1, 1000), "S": (1, 1), "M": (60, 1), "H": (3600, 1)}
_MOST_OF_GRPC = 10**8 - 1
_MOST_MILLISECONDS = 10**12 - 1


@dataclass(frozen=True, slots=True)
class DeadlineHeader:
    """One such header. Make it by `of`.

    Attributes:
        name: Its name in lower case.
    """

    name: str
    _parse: Callable[[str], float | None]
    _format: Callable[[float], str]

    @classmethod
    def of(cls, name: str, owner: str = "DeadlineHeader", option: str = "name") -> "DeadlineHeader":
        """Return the header of this name; the name decides about the format, see the table of this module.

        Args:
            name: The name, in any case.
            owner: Whose option it is, for errors.
            option: What it is called there.

        Raises:
            TypeError: The name is no str.
            ValueError: The name is not the name of a header.
        """
        name = options.header_name(owner, option, name)
        if name == "grpc-timeout":
            return cls(name, _parse_grpc, _format_grpc)
        if not name.endswith("-ms"):
            return cls(name, _parse_seconds, _format_seconds)
        if name.startswith("x-envoy-"):
            return cls(name, _parse_envoy, _format_envoy)
        return cls(name, _parse_milliseconds, _format_milliseconds)

    def parse(self, value: bytes | str) -> float | None:
        """Return what a value says.

        Args:
            value: The value of one field line. Blanks around it do not count.

        Returns:
            The seconds, 0.0 or more. None if the value is not in the format: empty, negative, with an exponent, an
            unknown unit, too many digits, not ASCII. None also for the `0` of Envoy, which means no limit.
        """
        text = value.decode("latin-1") if isinstance(value, bytes) else value
        return self._parse(text.strip(" \t"))

    def format(self, seconds: float) -> str:
        """Return the value that says so many seconds.

        Args:
            seconds: The time that is left. Below 0 is the same as 0.

        Returns:
            The value, rounded down, so that nobody works for a caller that has gone; and the largest that there is
            if it has to be less. To Envoy at least 1 ms is said, as 0 would mean no limit.

        Raises:
            ValueError: The seconds are infinite or not a number: leave the header out.
        """
        checked: Any = seconds
        allowed = "a finite number of seconds"
        if isinstance(checked, bool) or not isinstance(checked, int | float):
            raise options.refuse("DeadlineHeader.format", "seconds", seconds, allowed, TypeError)
        if not math.isfinite(seconds):
            raise options.refuse("DeadlineHeader.format", "seconds", seconds, allowed)
        return self._format(max(float(seconds), 0.0))


def _parse_grpc(text: str) -> float | None:
    match = _GRPC.fullmatch(text)
    return None if match is None else _length(int(match[1]), match[2])


def _format_grpc(seconds: float) -> str:
    for unit in _UNITS:
        if seconds < _length(_MOST_OF_GRPC + 1, unit):
            return f"{_count(seconds, unit)}{unit}"
    return f"{_MOST_OF_GRPC}H"


def _parse_milliseconds(text: str) -> float | None:
    return _length(int(text), "m") if _MILLISECONDS.fullmatch(text) else None


def _format_milliseconds(seconds: float) -> str:
    return str(_milliseconds(seconds))


def _parse_envoy(text: str) -> float | None:
    return _parse_milliseconds(text) or None


def _format_envoy(seconds: float) -> str:
    return _format_milliseconds(max(seconds, 0.001))


def _parse_seconds(text: str) -> float | None:
    return float(text) if _SECONDS.fullmatch(text) else None


def _format_seconds(seconds: float) -> str:
    whole, thousandths = divmod(_milliseconds(seconds), 1000)
    return f"{whole}.{thousandths:03}".rstrip("0").rstrip(".") if thousandths else str(whole)


def _milliseconds(seconds: float) -> int:
    return _count(seconds, "m") if seconds < _length(_MOST_MILLISECONDS, "m") else _MOST_MILLISECONDS


def _length(count: int, unit: str) -> float:
    multiple, part = _UNITS[unit]
    return count * multiple / part


def _count(seconds: float, unit: str) -> int:
    """Return the largest count whose length is at most `seconds`, as `_length` computes it.

    0.3 s are 300 ms, although the float is a bit less than that; and 1.001 s are 1001 ms, although the product is.
    """
    multiple, part = _UNITS[unit]
    count = int(seconds * part / multiple)
    if _length(count, unit) > seconds:
        return count - 1
    return count + (_length(count + 1, unit) <= seconds)
