"""The rules of HTTP caching as pure functions: RFC 9111, RFC 5861 (stale answers), RFC 9211 (`Cache-Status`).

The cache that is built on them keeps the answers to `GET`. It is private unless told that it is shared, which is
one that serves several users, such as one in front of an ASGI app. No clock is read here; all times are in
seconds.

    before    `demands` says whether the cache takes part; `Demands.allow` what a stored answer may be used for
    key       `cache_key`, `credentials_key` and, among the answers under these two, `vary_key`
    store     `storable`, `stored_headers`, `lifetime`
    answer    with `Age` (the whole seconds of `age`) in place of the stored one, and `cache_status`
    validate  `revalidation_headers`; after a 304 that `confirms` the stored answer, store it anew with `freshened`
    after     `invalidated` says what a write has made obsolete

Where directives conflict, or one cannot be read, the most restrictive reading counts (RFC 9111 4.2.1).
"""

import functools
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urljoin

from resilient.http.headers import FOREVER, Headers, age_value, delay_seconds, http_date, lines, pairs, server_time

Fields: TypeAlias = list[tuple[bytes, bytes]]
"""Header fields as a message carries them: order, case and repetitions are kept."""

Forward: TypeAlias = Literal["bypass", "method", "uri-miss", "vary-miss", "miss", "request", "stale", "partial"]
"""Why a request went to the origin (RFC 9211 2.2)."""

STALE_ON: Final = frozenset({500, 502, 503, 504})
"""The statuses on which a stale answer may be used in place of the one received (RFC 5861 4)."""

WHO: Final = re.compile(
    rb"(?!sec-)(?:.*-)?(?:authorization|cookie|token|accesstoken|[a-z]*api-?key|(?:access|auth|subscription)-key"
    rb"|secret|assertion|jwt|session|session-id|tenant|tenant-id|principal|user|user-id|username|email|groups"
    rb"|client-cert)|x-amzn-oidc-.*|x-ms-client-principal-.*|(?:x-)?ssl-client-.*"
)
"""The names of request fields that say who asks, those that proxies add after a login among them: a service may
call its tokens as it likes, and to tell too many people apart does no harm."""

HEURISTICALLY_CACHEABLE: Final = frozenset({200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 451})
"""Statuses that may be kept without a word from the origin (RFC 9110 15.1, RFC 7725 3); no parts and no 5xx."""

_UNDERSTOOD = HEURISTICALLY_CACHEABLE | {302, 303, 307}
_SAFE = {"GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "PROPFIND", "REPORT", "SEARCH"}
_CONDITIONS = ("range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since")
_RESTRICTIVE = {"must-revalidate", "no-cache", "no-store", "only-if-cached", "private", "proxy-revalidate"}
_PERMISSIVE = {"must-understand", "public"}
_DELTAS = {"max-age", "max-stale", "min-fresh", "s-maxage", "stale-if-error", "stale-while-revalidate"}
_NOT_STORED = frozenset(
    b"connection keep-alive proxy-connection te trailer transfer-encoding upgrade "
    b"proxy-authenticate proxy-authentication-info proxy-authorization set-cookie set-cookie2".split()
)
_FOR_ALL_RECIPIENTS = frozenset(
    b"age cache-control content-encoding content-type date etag expires last-modified pragma vary".split()
)
_NOT_UPDATED = frozenset(b"content-encoding content-length content-range content-type".split())

_QUOTED = r'"(?:[^"\\]|\\.)*(?:"|(\\?\Z))'  # an open quote ends with the line: so matching takes linear time
_DIRECTIVE = re.compile(rf'(?:[^",;]+|{_QUOTED})+', re.DOTALL)
_LIST_MEMBER = re.compile(rf'(?:[^",]+|{_QUOTED})+', re.DOTALL)
_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_ENTITY_TAG = re.compile(r'(?:W/)?"[!#-~\x80-\xff]*"')
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?]*)([^?]*)(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Directives:
    """The directives of `Cache-Control` that are known here (RFC 9111 5.2, RFC 5861).

    Several of a kind count as the strictest one. An argument where none belongs makes `public` and
    `must-understand` void, which allow something, but not the others: `private="x"` is `private` (RFC 9111
    5.2.2.4, 5.2.2.7). `;` separates like `,`, since `no-cache; no-store` is a common mistake.

    Attributes:
        flags: The names of those without a number.
        seconds: Those with a number of seconds, at most `FOREVER`; the strictest number if it cannot be read.
    """

    flags: frozenset[str]
    seconds: Mapping[str, float]

    def __contains__(self, name: str) -> bool:
        return name in self.flags or name in self.seconds

    @classmethod
    def of_response(cls, headers: Headers) -> "Directives":
        """Return the directives of a response."""
        return cls._of(lines(headers, "cache-control"))

    @classmethod
    def of_request(cls, headers: Headers) -> "Directives":
        """Return the directives of a request; `Pragma: no-cache` stands in for `Cache-Control` (RFC 9111 5.4)."""
        values = lines(headers, "cache-control")
        pragmas = ",".join(lines(headers, "pragma")).lower().split(",")
        return cls._of(values or [value for value in pragmas if value.strip() == "no-cache"])

    @classmethod
    def _of(cls, values: Iterable[str]) -> "Directives":
        flags: set[str] = set()
        seconds: dict[str, float] = {}
        for member in (member for value in values for member in _DIRECTIVE.finditer(value)):
            name, equals, argument = (part.strip() for part in member[0].partition("="))
            name = name.lower()
            if member[1] is not None:  # a quote that never ends: who knows what else the line says
                flags.add("no-store")
            elif name in _RESTRICTIVE or (name in _PERMISSIVE and not equals):
                flags.add(name)
            elif name in _DELTAS:
                stricter, strictest = (max, FOREVER) if name == "min-fresh" else (min, 0.0)
                any_age = name == "max-stale" and not equals
                number = FOREVER if any_age else delay_seconds(_unquoted(argument))
                number = strictest if number is None else number
                seconds[name] = stricter(number, seconds.get(name, number))
        return cls(frozenset(flags), seconds)


@dataclass(frozen=True, slots=True)
class Lifetime:
    """For how long an answer may be used, in seconds.

    Attributes:
        fresh: From its origin on: without asking.
        stale_if_error: From there on: if the origin fails (RFC 5861 4).
        stale_while_revalidate: From there on: while it is fetched anew in the background (RFC 5861 3).
        must_revalidate: Whether nobody may have it once it is stale, even one who asks for that (RFC 9111 4.2.4).
    """

    fresh: float
    stale_if_error: float
    stale_while_revalidate: float
    must_revalidate: bool


@dataclass(frozen=True, slots=True)
class Use:
    """What a stored answer may be used for. If it is for nothing, the cache has to ask the origin.

    Attributes:
        now: To answer without asking the origin.
        while_refreshing: To answer without waiting for the origin, which is asked in the background.
        on_error: To answer if the origin cannot be reached, or answers with a status of `STALE_ON`.
    """

    now: bool
    while_refreshing: bool
    on_error: bool


@dataclass(frozen=True, slots=True)
class Demands:
    """What a request demands of a cache (RFC 9111 5.2.1).

    Attributes:
        bypass: Whether the cache has to keep out: neither answer nor store.
        only_if_cached: Whether the origin must not be asked: without an answer for `now` it is 504.
        directives: All directives of the request.
    """

    bypass: bool
    only_if_cached: bool
    directives: Directives

    def allow(self, age: float, lifetime: Lifetime) -> Use:
        """Return what a stored answer may be used for (RFC 9111 4.2, 4.2.4, 5.2.1).

        If the request has a `stale-if-error` of its own, the smaller one of the two windows counts, whatever else
        it says about age (RFC 5861 4). Without it, a request that says something about age gets no more when the
        origin fails than it gets at once.

        Args:
            age: The age of the answer, from `age`.
            lifetime: Its lifetime.
        """
        asked = self.directives.seconds
        overdue = age - lifetime.fresh
        is_fresh = overdue < 0
        if "no-cache" in self.directives or (lifetime.must_revalidate and not is_fresh):
            return Use(now=False, while_refreshing=False, on_error=False)
        # With `max-age=0` people ask for a new one, however young the old one is.
        is_young = 0 < asked.get("max-age", math.inf) >= age
        lasts = -overdue >= asked.get("min-fresh", -math.inf)
        now = (is_fresh or overdue <= asked.get("max-stale", -math.inf)) and is_young and lasts
        any_age = asked.keys().isdisjoint({"max-age", "max-stale", "min-fresh"})
        window = min(lifetime.stale_if_error, asked.get("stale-if-error", math.inf))
        return Use(
            now=now,
            while_refreshing=now or (any_age and overdue < lifetime.stale_while_revalidate),
            on_error=now or ((any_age or "stale-if-error" in asked) and overdue < window),
        )


def demands(method: str, request_headers: Headers) -> Demands:
    """Return what a request demands of the cache.

    The cache keeps out of all but `GET` and `HEAD`, of requests with a body, which is not part of the key, and of
    requests for a part or with conditions of the caller, which want a 206, 304 or 412. `no-store` keeps it out
    too, although RFC 9111 5.2.1.5 would let it answer.

    Args:
        method: The method, in the case in which it was sent.
        request_headers: The fields of the request, before the cache adds conditions of its own.
    """
    directives = Directives.of_request(request_headers)
    bypass = (
        method not in {"GET", "HEAD"}
        or "no-store" in directives
        or _has_body(request_headers)
        or any(lines(request_headers, name) for name in _CONDITIONS)
    )
    return Demands(bypass, "only-if-cached" in directives, directives)


def storable(
    method: str, request_headers: Headers, status: int, response_headers: Headers, *, shared: bool = False
) -> bool:
    """Tell whether a complete answer may be stored (RFC 9111 3, 3.5).

    Never stored are parts, errors of the server, and what `Vary: *` keeps from matching (RFC 9111 4.1). A shared
    cache stores nothing that sets a cookie either: RFC 9111 7.3 would allow it, but it was made for one user.

    Args:
        method: The method of the request; only `GET` is stored.
        request_headers: The fields of the request as it was sent.
        status: The status code of the response.
        response_headers: The fields of the response.
        shared: Whether the cache serves several users. Default False.
    """
    if method != "GET" or "no-store" in Directives.of_request(request_headers) or _has_body(request_headers):
        return False
    told = Directives.of_response(response_headers)
    final = 200 <= status < 500 and status not in {206, 304}  # noqa: PLR2004 - the classes of statuses
    forbidden = status not in _UNDERSTOOD if "must-understand" in told else "no-store" in told
    if not final or forbidden or vary_key(response_headers, request_headers) is None:
        return False
    if shared:
        for_all = any(name in told for name in ("public", "must-revalidate", "s-maxage"))
        if "private" in told or lines(response_headers, "set-cookie"):
            return False
        if lines(request_headers, "authorization") and not for_all:
            return False
    return (
        status in HEURISTICALLY_CACHEABLE
        or any(name in told for name in ("public", "max-age", "s-maxage" if shared else "private"))
        or bool(lines(response_headers, "expires"))
    )


def lifetime(
    response_headers: Headers,
    status: int,
    *,
    received: float,
    default_fresh: float = 0.0,
    default_stale: float = 0.0,
    default_refresh: float = 0.0,
    shared: bool = False,
) -> Lifetime:
    """Return for how long an answer may be used (RFC 9111 4.2.1, 4.2.4; RFC 5861).

    Args:
        response_headers: The fields of the response.
        status: Its status code: a default freshness applies to those that may have one (RFC 9111 4.2.2).
        received: When it was received, in seconds since the epoch, for a response without a readable `Date`.
        default_fresh: For how many seconds it is fresh if the origin does not say. Default 0.
        default_stale: The same for `stale_if_error`. Default 0.
        default_refresh: The same for `stale_while_revalidate`. Default 0.
        shared: Whether the cache serves several users. Default False.
    """
    told = Directives.of_response(response_headers)
    strict = {"no-cache", "must-revalidate", *(("proxy-revalidate", "s-maxage") if shared else ())}
    expires = lines(response_headers, "expires")
    if "no-cache" in told:
        fresh = 0.0
    elif shared and "s-maxage" in told:
        fresh = told.seconds["s-maxage"]
    elif "max-age" in told:
        fresh = told.seconds["max-age"]
    elif expires:
        dates = [http_date(line, received, strict=True) or 0.0 for line in expires]  # unreadable means expired
        fresh = min(max(min(dates) - server_time(response_headers, received), 0.0), FOREVER)
    else:
        fresh = default_fresh if status in HEURISTICALLY_CACHEABLE or "public" in told else 0.0
    if any(name in told for name in strict):
        return Lifetime(fresh, 0.0, 0.0, must_revalidate=True)
    stale = told.seconds.get("stale-if-error", default_stale)
    refresh = told.seconds.get("stale-while-revalidate", default_refresh)
    return Lifetime(fresh, stale, refresh, must_revalidate=False)


def age(response_headers: Headers, response_delay: float, resident: float) -> float:
    """Return the age of a stored answer in seconds (RFC 9111 4.2.3).

    Args:
        response_headers: The fields of the response: caches on its way have counted in `Age`.
        response_delay: How many seconds the origin took to answer.
        resident: For how many seconds it has been stored, by a clock that nobody sets.
    """
    return age_value(response_headers) + max(response_delay, 0.0) + max(resident, 0.0)


def cache_key(method: str, url: object) -> str:
    """Return what answers are stored under: the method, and the URL without its fragment (RFC 9111 2).

    `HEAD` has the key of `GET`. User and password are left out, since they are not sent (RFC 9110 4.2.4).

    Args:
        method: The method of the request.
        url: The URL, as text or as the URL object of a client.
    """
    return f"{'GET' if method == 'HEAD' else method} {_normalised(url)}"


@functools.lru_cache(1024)
def says_who(name: str | bytes) -> bool:
    """Tell whether a request field of this name, in any case of letters, says who asks.

    It remembers the names: not for those that come from outside.
    """
    return WHO.fullmatch(_bytes(name).lower()) is not None


def credentials_key(request_headers: Headers) -> str | None:
    """Return a digest of who asks, None if nobody says: an answer must never be used across two of these.

    RFC 9111 3.5 protects only `Authorization`, and only in shared caches.

    Args:
        request_headers: The fields of the request as it was sent.
    """
    found: dict[str, list[str]] = {}
    for name, value in pairs(request_headers):
        if says_who(name):
            found.setdefault(_text(name).lower(), []).append(_text(value).strip(" \t"))
    return _digest(sorted(found.items())) if found else None


def vary_key(response_headers: Headers, request_headers: Headers) -> str | None:
    """Return what a request has to have in common with the one that was answered (RFC 9111 4.1).

    Args:
        response_headers: The fields of the stored answer.
        request_headers: The fields of a request.

    Returns:
        A digest of the fields that `Vary` names, since cookies may be among them; None if nothing ever matches.
        White space around commas and the split into lines make no difference; a missing field differs from an
        empty one.
    """
    names = {name.strip().lower() for line in lines(response_headers, "vary") for name in line.split(",")} - {""}
    if not all(_NAME.fullmatch(name) and name != "*" for name in names):
        return None
    sent: dict[str, list[str]] = {}
    for name, value in pairs(request_headers):
        sent.setdefault(_text(name).lower(), []).append(_text(value))
    return _digest([(name, _members(sent[name]) if name in sent else None) for name in sorted(names)])


def stored_headers(headers: Headers) -> Fields:
    """Return the fields of a response that are stored (RFC 9111 3.1): those that are not about one connection.

    `Set-Cookie` is not stored either: a cookie is set once (RFC 9111 7.3). What `Connection` names goes too,
    unless the answer cannot be understood without it (RFC 9110 7.6.1).
    """
    fields = [(_bytes(name), _bytes(value)) for name, value in pairs(headers)]
    options = b",".join(value for name, value in fields if name.lower() == b"connection").lower().split(b",")
    dropped = _NOT_STORED | ({option.strip() for option in options} - _FOR_ALL_RECIPIENTS)
    return [(name, value) for name, value in fields if name.lower() not in dropped]


def revalidation_headers(stored: Headers) -> Fields:
    """Return the fields that ask the origin whether a stored answer is still good (RFC 9111 4.3.1); maybe none."""
    tags = [tag for tag in lines(stored, "etag") if _ENTITY_TAG.fullmatch(tag)]
    dates = [date for date in lines(stored, "last-modified") if http_date(date, 0.0, strict=True) is not None]
    fields = [(b"If-None-Match", _bytes(tag)) for tag in tags[:1]]
    return [*fields, *((b"If-Modified-Since", _bytes(date)) for date in dates[:1])]


def confirms(not_modified: Headers, stored: Headers) -> bool:
    """Tell whether a 304 is about this stored answer (RFC 9111 4.3.4); if not, ask again without conditions.

    Args:
        not_modified: The fields of the 304.
        stored: The fields of the answer that the request asked about, and of no other.
    """
    for name in ("etag", "last-modified"):
        told, known = lines(not_modified, name)[:1], lines(stored, name)[:1]
        if told and told[0].startswith("W/"):  # RFC 9110 8.8.3.2: weak comparison
            return [tag.removeprefix("W/") for tag in known] == [told[0].removeprefix("W/")]
        if told:
            return told == known
    return True


def freshened(stored: Headers, not_modified: Headers) -> Fields:
    """Return the fields of a stored answer after a 304 (RFC 9111 3.2, 4.3.4); store it anew, if it is `storable`.

    Those that describe the stored bytes stay as they are. `Age` is that of the 304, or gone: the answer is as
    young as its confirmation.

    Args:
        stored: The stored fields.
        not_modified: The fields of the 304.
    """
    news = [(name, value) for name, value in stored_headers(not_modified) if name.lower() not in _NOT_UPDATED]
    replaced = {name.lower() for name, _ in news} | {b"age"}
    return [field for field in stored_headers(stored) if field[0].lower() not in replaced] + news


def invalidated(method: str, status: int, url: object, response_headers: Headers) -> list[str]:
    """Return the URLs whose stored answers a response makes obsolete (RFC 9111 4.4), each fit for `cache_key`.

    Args:
        method: The method of the request; those of unknown safety count as unsafe.
        status: The status code of the response: only 2xx and 3xx mean that something has changed.
        url: The URL of the request.
        response_headers: The fields of the response: what `Location` and `Content-Location` name counts too, if it
            is of the same origin.
    """
    if method in _SAFE or not 200 <= status < 400:  # noqa: PLR2004 - the classes of statuses
        return []
    target = _normalised(url)
    found = [target]
    for reference in (*lines(response_headers, "location"), *lines(response_headers, "content-location")):
        try:
            other = _normalised(urljoin(target, reference))
        except ValueError:  # not a URL
            continue
        if other not in found and other.split("/", 3)[:3] == target.split("/", 3)[:3]:
            found.append(other)
    return found


def cache_status(
    forward: Forward | None = None,
    *,
    status: int | None = None,
    ttl: float | None = None,
    stored: bool = False,
    collapsed: bool | None = None,
    detail: str | None = None,
) -> str:
    """Return our member of `Cache-Status`, to be added after those that are there (RFC 9211 2).

    A hit is an answer for which nobody asked the origin first, be it stale. An answer that stands in for an error
    is no hit: the request was forwarded, because of "stale", and `detail` can tell the rest.

    Args:
        forward: Why the request went to the origin. Default None: it did not, this is a hit.
        status: What the origin answered, if that is not what the caller gets. Default None.
        ttl: For how many seconds more the answer is fresh, negative if it is stale. Default None: not told.
        stored: Whether the answer of the origin was stored. Default False.
        collapsed: Whether one request went out for several; False if that failed. Default None: it was not tried.
        detail: A token that says more. Default None.
    """
    parts = ["resilient", "hit" if forward is None else f"fwd={forward}"]
    if forward is not None and status is not None:
        parts.append(f"fwd-status={status}")
    if ttl is not None:
        parts.append(f"ttl={math.floor(max(min(ttl, FOREVER), -FOREVER))}")
    if forward is not None and stored:
        parts.append("stored")
    if forward is not None and collapsed is not None:
        parts.append("collapsed" if collapsed else "collapsed=?0")
    if detail is not None:
        parts.append(f"detail={detail}")
    return "; ".join(parts)


def _has_body(request_headers: Headers) -> bool:
    lengths = lines(request_headers, "content-length")
    return bool(lines(request_headers, "transfer-encoding")) or any(length != "0" for length in lengths)


def _normalised(url: object) -> str:
    """Return a URL as RFC 9110 4.2.3 compares it, without a fragment and without a user."""
    text = str(url).partition("#")[0]
    match = _URI.fullmatch(text)
    if match is None:
        return text
    scheme, authority, path, query = match.groups()
    scheme = scheme.lower()
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    host = authority.rpartition("@")[2].lower().removesuffix(port).removesuffix(":")
    return f"{scheme}://{host}{path or '/'}{query}"


def _members(values: Iterable[str]) -> list[str]:
    """Return the members of a list, which may contain commas in quotes."""
    stripped = (match[0].strip(" \t") for match in _LIST_MEMBER.finditer(",".join(values)))
    return [member for member in stripped if member]


def _unquoted(argument: str) -> str:
    return re.sub(r"\\(.)", r"\1", argument[1:-1]) if argument.startswith('"') else argument


def _digest(value: Any) -> str:
    return hashlib.sha256(ascii(value).encode()).hexdigest()[:32]


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("latin-1")


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1", "backslashreplace")
