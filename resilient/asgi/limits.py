"""What a response tells about the limits that its request was counted by.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` says what the limits are, and
`RateLimit` what is left of them now. They hold names and numbers only: whom a limit is counted by is nobody's
business. Numbers are whole, and rounded to the safe side: what is left down, times up.
"""

import re
from collections.abc import Hashable, Iterable, Sequence
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

from resilient.policies.rate_limit import RateLimit

if TYPE_CHECKING:
    from resilient.asgi.exchange import AsgiCall, Fields


NOTED: Final = "resilient.limits"
"""Where in the scope the application leaves the limits that it has counted a request by, and their keys."""

_ESCAPED: Final = re.compile(r"\\(.)")


class Limits:
    """The rate limits of a pipeline, and the fields that tell about them.

    Args:
        limits: The limits, outermost first. Each is told under its `name`, without one as `"default"`.
        legacy: Whether to add the fields `X-RateLimit-Limit`, `-Remaining` and `-Reset`, which can tell only of
            one limit: that of which the smallest part is left.
    """

    def __init__(self, limits: Sequence[RateLimit], *, legacy: bool = False) -> None:
        self._legacy = legacy
        self._limits = _told(limits)
        self._policy = _policy_field(self._limits)
        self.fields = self._fields_of_one if len(self._limits) == 1 and not legacy else self._fields_of_all
        """Returns the fields for the response to a call: about the limits that have looked at it."""

    def violated(self, label: str, call: "AsgiCall") -> tuple[str, ...]:
        """Return the names of the limits that have this label, those that the application has noted included."""
        limits = self._limits if NOTED not in call.scope else self._with_noted(call)
        return tuple(_ESCAPED.sub(r"\1", each.name[1:-1]) for each in limits if each.limit.label == label)

    def _fields_of_one(self, call: "AsgiCall") -> "Fields":
        """Do the same for the usual number of limits, in half of the time."""
        if NOTED in call.scope:
            return self._fields_of_all(call)
        (only,) = self._limits
        found = _left(only.limit, call)
        if found is None:
            return []
        left, reset = found
        return [self._policy, (b"ratelimit", only.state % (left, ceil(reset)))]

    def _fields_of_all(self, call: "AsgiCall") -> "Fields":
        limits = self._limits
        if NOTED in call.scope:
            limits = self._with_noted(call)
            call.scope[NOTED].clear()  # a middleware further out would tell of them again
        told: list[_Told] = []
        states: list[bytes] = []
        numbers: list[tuple[float, int, int, int]] = []
        for each in limits:
            limit = each.limit
            found = _left(limit, call)
            if found is None:
                continue
            left, reset = found
            seconds = ceil(reset)
            states.append(each.state % (left, seconds))
            told.append(each)
            if self._legacy:
                numbers.append((left / limit.burst, limit.burst, left, seconds))
        if not told:
            return []
        policy = self._policy if told == self._limits else _policy_field(told)
        fields = [policy, (b"ratelimit", states[0] if len(states) == 1 else b", ".join(states))]
        return [*fields, *_legacy(*min(numbers))] if self._legacy else fields

    def _with_noted(self, call: "AsgiCall") -> "list[_Told]":
        """Return our limits and those that the application has counted the call by."""
        noted: dict[RateLimit, Hashable] = dict(call.scope[NOTED])
        call.keys = {**call.keys, **noted}
        return _told([*(each.limit for each in self._limits), *noted])


class _Told(NamedTuple):
    """A limit and what is told about it.

    Attributes:
        limit: The limit.
        name: Its name.
        policy: The member of `RateLimit-Policy` that describes it.
        state: The member of `RateLimit`, to be formatted with what is left and the seconds until there is more.
    """

    limit: RateLimit
    name: str
    policy: bytes
    state: bytes


def _left(limit: RateLimit, call: "AsgiCall") -> tuple[int, float] | None:
    """Return what is left for a call; None if another limit has refused it before."""
    if limit.key is None:
        return limit.left()
    return limit.left(call.keys[limit]) if limit in call.keys else None


def _told(limits: Sequence[RateLimit]) -> list[_Told]:
    return [
        _Told(
            limit,
            name,
            f"{name};q={limit.burst}{_window(limit)}".encode(),
            name.replace("%", "%%").encode() + b";r=%d;t=%d",
        )
        for limit, name in zip(limits, names(limits), strict=True)
    ]


def _policy_field(told: Sequence[_Told]) -> tuple[bytes, bytes]:
    return b"ratelimit-policy", b", ".join([each.policy for each in told])


def _legacy(_part: float, burst: int, left: int, seconds: int) -> "Fields":
    """Return the old fields, about one limit."""
    return [
        (b"x-ratelimit-limit", b"%d" % burst),
        (b"x-ratelimit-remaining", b"%d" % left),
        (b"x-ratelimit-reset", b"%d" % seconds),
    ]


def names(limits: Iterable[RateLimit]) -> list[str]:
    """Return how limits are called: as Strings of a structured field (RFC 9651 3.3.3), each another one."""
    taken: list[str] = []
    for limit in limits:
        readable = (limit.name or "default").encode("ascii", "replace").decode()
        name = "".join(each if each.isprintable() else "?" for each in readable)
        unique, number = name, 1
        while unique in taken:
            number += 1
            unique = f"{name}-{number}"
        taken.append(unique)
    return ['"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in taken]


def _window(limit: RateLimit) -> str:
    """Return the time in which the whole quota comes back; what is under a second cannot be said."""
    seconds = limit.burst * limit.rate.micros / limit.rate.limit / 1_000_000
    return f";w={ceil(seconds)}" if seconds >= 1 else ""
