"""What a response tells about the limits that its request was counted by.

The fields are those of draft-ietf-httpapi-ratelimit-headers-11: `RateLimit-Policy` says what the limits are, and
`RateLimit` what is left of them now. They hold names and numbers only: whom a limit is counted by is nobody's
business. Numbers are whole, and rounded to the safe side: what is left down, times up.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from resilient.policies.rate_limit import RateLimit

if TYPE_CHECKING:
    from resilient.asgi.exchange import AsgiCall, Fields


NOTED: Final = "resilient.limits"
"""Where in the scope the application leaves the limits that it has counted a request by, and their keys."""


class Limits:
    """The rate limits of a pipeline, and the fields that tell about them.

    Args:
        limits: The limits, outermost first. Each is told under its `name`, without one as `"default"`.
        legacy: Whether to add the fields `X-RateLimit-Limit`, `-Remaining` and `-Reset`, which can tell only of
            one
            limit: that of which the smallest part is left.
    """

    def __init__(self, limits: Sequence[RateLimit], *, legacy: bool = False) -> None:
        self._legacy = legacy
        self._limits = _described(limits)

    def violated(self, label: str, call: "AsgiCall") -> tuple[str, ...]:
        """Return the names of the limits that have this label, of those that have looked at a call."""
        limits = self._limits if NOTED not in call.scope else self._with_noted(call)
        return tuple(name[1:-1].decode() for limit, name, _policy in limits if limit.label == label)

    def fields(self, call: "AsgiCall") -> "Fields":
        """Return the fields for the response to a call: about the limits that have looked at it."""
        policies: list[bytes] = []
        states: list[bytes] = []
        tightest: tuple[float, int, int, int] | None = None
        for limit, name, policy in self._limits if NOTED not in call.scope else self._with_noted(call):
            if limit.key is None:
                left, reset = limit.left()
            elif limit in call.keys:
                left, reset = limit.left(call.keys[limit])
            else:
                continue  # another one has refused the call before
            seconds = math.ceil(reset)
            policies.append(policy)
            states.append(b"%b;r=%d;t=%d" % (name, left, seconds))
            if self._legacy and (tightest is None or left / limit.burst < tightest[0]):
                tightest = left / limit.burst, limit.burst, left, seconds
        if not policies:
            return []
        fields = [(b"ratelimit-policy", b", ".join(policies)), (b"ratelimit", b", ".join(states))]
        if tightest is not None:
            names = (b"x-ratelimit-limit", b"x-ratelimit-remaining", b"x-ratelimit-reset")
            fields += [(name, b"%d" % number) for name, number in zip(names, tightest[1:], strict=True)]
        return fields

    def _with_noted(self, call: "AsgiCall") -> list[tuple[RateLimit, bytes, bytes]]:
        """Return our limits and those that the application has counted the call by."""
        noted: dict[RateLimit, Hashable] = dict(call.scope[NOTED])
        call.keys = {**call.keys, **noted}
        return _described([*(limit for limit, _name, _policy in self._limits), *noted])


def _described(limits: Sequence[RateLimit]) -> list[tuple[RateLimit, bytes, bytes]]:
    """Return limits with their names, and with the members of `RateLimit-Policy` that describe them."""
    return [
        (limit, name.encode(), f"{name};q={limit.burst}{_window(limit)}".encode())
        for limit, name in zip(limits, names(limits), strict=True)
    ]


def names(limits: Iterable[RateLimit]) -> list[str]:
    """Return how limits are called: as Strings of a structured field (RFC 9651 3.3.3), each another one."""
    taken: list[str] = []
    for limit in limits:
        readable = (limit.name or "default").encode("ascii", "replace").decode()
        name = "".join(each if each.isprintable() else "?" for each in readable)
        number = sum(other == name or other.startswith(f"{name}-") for other in taken) + 1
        taken.append(name if number == 1 else f"{name}-{number}")
    return ['"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"' for name in taken]


def _window(limit: RateLimit) -> str:
    """Return the time in which the whole quota comes back; what is under a second cannot be said."""
    seconds = limit.burst * limit.rate.micros / limit.rate.limit / 1_000_000
    return f";w={math.ceil(seconds)}" if seconds >= 1 else ""
