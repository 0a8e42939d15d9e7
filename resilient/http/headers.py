"""How long a server asks its clients to wait: `Retry-After`, and the fields about rate limits.

Pure functions of the fields of one response and of the time. A server is not trusted: what cannot be read is
ignored, nothing raises, and no time is longer than `FOREVER`. Points in time are relative to the `Date` of the
response that names them, so that a wrong clock on either side does no harm.

Every server counts its limits in fields of its own. These are understood, the first that is there counts:

    RateLimit: "default";r=50;t=30               draft-ietf-httpapi-ratelimit-headers-08 to -11
    RateLimit: limit=100, remaining=50, reset=30 the same draft, -06 and -07
    RateLimit-Limit, -Remaining, -Reset          the same draft up to -06, and servers that never read it
    X-RateLimit-*, X-Rate-Limit-*                what everybody used before there was a draft
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, Final, NamedTuple, TypeAlias

Headers: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]] | Sequence[tuple[bytes, bytes]]
"""The fields of a message: the `Headers` of a client or an ASGI app, a mapping, or pairs of text or of bytes."""

FOREVER: Final = 2.0**31
"""The longest time in seconds that anything here returns, 68 years: what RFC 9111 1.2.2 says of larger numbers."""

MOST: Final = 10**15 - 1
"""The largest count that anything here returns: the largest Integer of a structured field (RFC 9651 3.3.1)."""

_EPOCH_SECONDS = 1e9
_EPOCH_MILLISECONDS = 1e11
_THROTTLED = frozenset({429, 503})

_DAY = "(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_LONG_DAY = "(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = f"(?P<month>{'|'.join(_MONTHS)})"
_TIME = "(?P<hour>[0-9]{2}):(?P<minute>[0-9]{2}):(?P<second>[0-9]{2})"
_ZONE = "(?P<zone>GMT|UTC|(?P<offset>[+-][0-9]{4}))"
_DATES = [
    re.compile(form, re.ASCII | re.IGNORECASE)
    for form in (
        rf"{_DAY}, (?P<day>[0-9]{{2}}) {_MONTH} (?P<year>[0-9]{{4}}) {_TIME} {_ZONE}",
        rf"{_LONG_DAY}, (?P<day>[0-9]{{2}})-{_MONTH}-(?P<year>[0-9]{{2}}) {_TIME} {_ZONE}",
        rf"{_DAY} {_MONTH} (?P<day>[ 0-9][0-9]) {_TIME} (?P<year>[0-9]{{4}})",
    )
]
_BETWEEN_MEMBERS = re.compile(r"(?<!mon)(?<!tue)(?<!wed)(?<!thu)(?<!fri)(?<!sat)(?<!sun)(?<!day),", re.IGNORECASE)
_NUMBER = re.compile(r"(?P<whole>[0-9]+)(?P<part>\.[0-9]+)?[ \t]*(?:[,;]|\Z)")

_KEY = r"[a-z*][a-z0-9_\-.*]*"
_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
_WORD = r"[A-Za-z*][!#$%&'*+\-.^_`|~:/0-9A-Za-z]*"
_DECIMAL_OR_INTEGER = r"-?(?:[0-9]{1,12}\.[0-9]{1,3}|[0-9]{1,15})"
_OTHERS = r':[A-Za-z0-9+/=]*:|\?[01]|@-?[0-9]{1,15}|%"[^"]*"'
_BARE = f"(?:{_STRING}|{_WORD}|{_DECIMAL_OR_INTEGER}|{_OTHERS})"
_PARAMETER = re.compile(f";[ ]*({_KEY})(?:=({_BARE}))?")
_MEMBER = re.compile(f"(?:({_KEY})=)?({_BARE})((?:;[ ]*{_KEY}(?:={_BARE})?)*)")
_COMMA = re.compile(r"[ \t]*,[ \t]*")


@dataclass(frozen=True, slots=True)
class Quota:
    """What a server says about how much a client may still do.

    Attributes:
        limit: The size of the quota, usually in requests per window; None if unknown.
        remaining: How much of it is left; None if unknown.
        reset: In how many seconds there will be more; None if unknown.
    """

    limit: int | None
    remaining: int | None
    reset: float | None


class Member(NamedTuple):
    """One member of a structured field that is a list or a dictionary (RFC 9651 3.1, 3.2).

    Attributes:
        key: Its key in a dictionary, None in a list.
        value: An int, or a str: the value of a String or a Token, the text of anything else.
        parameters: What follows it after semicolons, with values of the same types.
    """

    key: str | None
    value: int | str
    parameters: dict[str, int | str]


def retry_after(headers: Headers, now: float) -> float | None:
    """Return for how many seconds the server asks to wait in `Retry-After` (RFC 9110 10.2.3).

    Args:
        headers: The fields of the response.
        now: The wall clock in seconds since the epoch, for a response without a readable `Date`.

    Returns:
        Seconds from 0 (a date that has passed, and `0` itself) to `FOREVER`, which stands for more too. The
        largest if there are several fields, None if there is none that can be read.
    """
    waits = [
        wait
        for line in lines(headers, "retry-after")
        for text in _BETWEEN_MEMBERS.split(line)  # a mapping has joined several fields
        if (wait := _wait(text.strip(" \t"), headers, now)) is not None
    ]
    return max(waits, default=None)


def quota(headers: Headers, now: float) -> Quota | None:
    """Return the state of the server's rate limit, of whatever fields it uses.

    Where the server names several policies it is the one that stops soonest: with the least that remains, and of
    these the one that takes longest. Units are not told apart. A reset may be in seconds, or a point in time: a
    date, or seconds or milliseconds since the epoch, told apart by their size.

    Args:
        headers: The fields of the response.
        now: The wall clock in seconds since the epoch, for a response without a readable `Date`.

    Returns:
        The quota, or None if the response says neither what remains nor when there will be more, or comes from a
        cache (draft-ietf-httpapi-ratelimit-headers-11 7.3).
    """
    if age_value(headers) > 0:
        return None
    return _current_draft(headers) or _separate_fields(headers, now)


def throttled_for(status: int, headers: Headers, now: float) -> float | None:
    """Return for how many seconds the server asks not to repeat the request.

    `Retry-After` comes first (draft-ietf-httpapi-ratelimit-headers-11 7), whatever the status, except on success:
    there it asks for patience, not for another try. Else it is the reset of an exhausted quota, on 429 and 503
    only: on other statuses that is advance notice.

    Args:
        status: The status code of the response.
        headers: The fields of the response.
        now: The wall clock in seconds since the epoch, for a response without a readable `Date`.

    Returns:
        Seconds from 0 to `FOREVER`; None if it does not ask.
    """
    if status < 300:  # noqa: PLR2004 - where redirection begins
        return None
    wait = retry_after(headers, now)
    if wait is None and status in _THROTTLED and (limit := quota(headers, now)) and not limit.remaining:
        return limit.reset
    return wait


def lines(headers: Headers, name: str) -> list[str]:
    """Return the values of all fields of a name, in order, without white space around them.

    Args:
        headers: The fields of a message.
        name: The name in lower case.
    """
    wanted = name.encode()
    found = []
    for field, value in pairs(headers):
        if isinstance(field, bytes):
            if field.lower() == wanted:
                found.append(value.decode("latin-1").strip(" \t"))
        elif field.lower() == name:
            found.append(value.strip(" \t"))
    return found


def pairs(headers: Headers) -> Iterable[tuple[Any, Any]]:
    """Return names and values, repeated names included, as text or as bytes, whichever is there."""
    raw = getattr(headers, "raw", None)  # `get` of the clients fails on names that are not ASCII
    if raw is not None:
        return raw  # type: ignore[no-any-return]
    return headers.items() if isinstance(headers, Mapping) else headers


def delay_seconds(text: str) -> float | None:
    """Return a number of seconds (`1*DIGIT`), at most `FOREVER`, or None if it is anything else."""
    return float(_whole(text, int(FOREVER))) if text.isascii() and text.isdigit() else None


def age_value(headers: Headers) -> float:
    """Return the `Age` of a response in seconds; 0 if there is none that can be read (RFC 9111 5.1)."""
    first = ",".join(lines(headers, "age")).partition(",")[0]
    return delay_seconds(first.strip(" \t")) or 0.0


def http_date(text: str, now: float, *, strict: bool = False) -> float | None:
    """Return the seconds since the epoch of an HTTP-date in any of its three forms (RFC 9110 5.6.7).

    Letters may be of either case (RFC 9111 4.2), and the day of the week may be wrong. No zone means UTC.

    Args:
        text: The date.
        now: The wall clock in seconds since the epoch; it decides about the century of a year of two digits.
        strict: Whether the zone has to be `GMT`, as it has to for a cache (RFC 9111 4.2). Default False: it may be
            `UTC` too, or an offset, which Python's own `email.utils` writes.
    """
    match = next((match for form in _DATES if (match := form.fullmatch(text))), None)
    if match is None:
        return None
    part = match.groupdict()
    if strict and part.get("zone", "GMT").upper() != "GMT":
        return None
    rest = (_MONTHS.index(part["month"].lower()) + 1, *(int(part[name]) for name in ("day", "hour", "minute")))
    year, second = int(part["year"]), int(part["second"])
    if len(part["year"]) == 2:  # noqa: PLR2004 - digits of RFC 850
        year = _with_century(year, (*rest, second), now)
    offset = part.get("offset") or "+0000"
    leap = second == 60  # noqa: PLR2004 - RFC 9110 has it, datetime does not
    try:
        zone = timezone(int(f"{offset[0]}1") * timedelta(hours=int(offset[1:3]), minutes=int(offset[3:])))
        return datetime(year, *rest, second - leap, tzinfo=zone).timestamp() + leap  # type: ignore[arg-type,misc]
    except ValueError:
        return None


def server_time(headers: Headers, now: float) -> float:
    """Return the `Date` of a response in seconds since the epoch, or `now` if there is none that can be read."""
    dates = (http_date(line, now) for line in lines(headers, "date"))
    return next((date for date in dates if date is not None), now)


def structured(values: Sequence[str]) -> list[Member] | None:
    """Parse a structured field that is a list or a dictionary without inner lists (RFC 9651 4.2).

    Args:
        values: Its field lines.

    Returns:
        Its members, or None if there is none or any part of it is malformed: such a field is ignored as a whole.
    """
    text = ",".join(values).strip(" ")
    members, at = [], 0
    while (match := _MEMBER.match(text, at)) is not None:
        key, value, parameters = match.groups()
        found = _PARAMETER.findall(parameters)
        members.append(Member(key, _bare(value), {name: _bare(bare or "?1") for name, bare in found}))
        if match.end() == len(text):
            return members
        comma = _COMMA.match(text, match.end())
        if comma is None:
            return None
        at = comma.end()
    return None


def _wait(text: str, headers: Headers, now: float) -> float | None:
    seconds = delay_seconds(text)
    if seconds is not None:
        return seconds
    date = http_date(text, now)
    return None if date is None else _until(date, server_time(headers, now))


def _until(moment: float, now: float) -> float:
    return min(max(moment - now, 0.0), FOREVER)


def _current_draft(headers: Headers) -> Quota | None:
    members = structured(lines(headers, "ratelimit")) or []
    keyed = {member.key: member.value for member in members}
    if "remaining" in keyed or "reset" in keyed:
        found = [keyed.get(name) for name in ("limit", "remaining", "reset")]
    else:
        policies = structured(lines(headers, "ratelimit-policy")) or []
        limits = {policy.value: policy.parameters.get("q") for policy in policies}
        candidates = [
            [limits.get(member.value), member.parameters["r"], member.parameters.get("t")]
            for member in members
            if _natural(member.parameters.get("r")) is not None
        ]
        found = min(candidates, key=lambda one: (one[1], -(_natural(one[2]) or 0)), default=[None] * 3)
    limit, remaining, reset = map(_natural, found)
    if remaining is None and reset is None:
        return None
    return Quota(limit, remaining, None if reset is None else min(float(reset), FOREVER))


def _separate_fields(headers: Headers, now: float) -> Quota | None:
    for prefix in ("ratelimit", "x-ratelimit", "x-rate-limit"):
        remaining = _counts(lines(headers, f"{prefix}-remaining"))
        resets = [
            reset
            for line in lines(headers, f"{prefix}-reset")
            if (reset := _reset(line, headers, now)) is not None
        ]
        if remaining or resets:
            limits = _counts(lines(headers, f"{prefix}-limit"))
            return Quota(min(limits, default=None), min(remaining, default=None), max(resets, default=None))
    return None


def _counts(values: Sequence[str]) -> list[int]:
    """Return the number that each line begins with: `100`, but also `595.0` and `100;w=60, 1000;w=3600`."""
    return [_whole(match["whole"], MOST) for line in values if (match := _NUMBER.match(line))]


def _reset(text: str, headers: Headers, now: float) -> float | None:
    match = _NUMBER.match(text)
    moment = http_date(text, now) if match is None else float(match["whole"] + (match["part"] or ""))
    if moment is None:
        return None
    if match and moment < _EPOCH_SECONDS:
        return moment
    if match and moment >= _EPOCH_MILLISECONDS:
        moment /= 1000
    return _until(moment, server_time(headers, now))


def _natural(value: int | str | None) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _whole(digits: str, largest: int) -> int:
    """Read digits, which Python refuses to do if there are thousands of them."""
    significant = digits.lstrip("0")
    return largest if len(significant) > len(str(largest)) else min(int(significant or "0"), largest)


def _with_century(year: int, rest: tuple[int, ...], now: float) -> int:
    """Return the latest year with these last two digits that is at most 50 years ahead (RFC 9110 5.6.7)."""
    today = datetime.fromtimestamp(now, UTC)
    furthest = (today.year + 50, *today.timetuple()[1:6])
    year += today.year // 100 * 100 + 100
    while (year, *rest) > furthest:
        year -= 100
    return year


def _bare(text: str) -> int | str:
    if text[0] == '"':
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    return int(text) if text.lstrip("-").isdigit() else text
