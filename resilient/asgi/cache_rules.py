"""What a shared cache has to know about the requests of an ASGI application.

Pure functions of one request: who asks, what it asks for, and what the request is that renews its response.
"""

import re
import time
from typing import Final
from urllib.parse import quote, unquote

import anyio

from resilient.asgi.exchange import Fields, Message, Receive, Scope
from resilient.http import rfc9111
from resilient.http.headers import http_date, lines

CONDITIONS: Final = frozenset({b"if-none-match", b"if-modified-since"})
"""The conditions that a cache can answer by itself."""

_NOT_RENEWED = CONDITIONS | {b"cache-control", b"pragma", b"content-length", b"expect"}
_REWRITES = frozenset(
    b"forwarded x-forwarded-host x-forwarded-proto x-forwarded-scheme x-forwarded-port x-forwarded-prefix "
    b"x-forwarded-server x-host x-original-url x-original-host x-rewrite-url x-http-method x-http-method-override "
    b"x-method-override".split()
)  # what applications may take for a part of the target: else who sends it decides what all others get
_TOLD_APART = re.compile(
    rb'(?:host|proto)="?[^";,]*', re.IGNORECASE
)  # in `Forwarded`, besides the client's address
_TAG = re.compile(r'(?:W/)?("[!#-~\x80-\xff]*")')


def has_the_same(asked: Fields, stored: Fields) -> bool:
    """Tell whether a client has what is stored (RFC 9110 13.1.2, 13.1.3, 13.2.2)."""
    tags = lines(asked, "if-none-match")
    if tags:
        own = {
            tag for line in lines(stored, "etag")[:1] for tag in _TAG.findall(line)
        }  # without W/: weak comparison
        return tags == ["*"] or not own.isdisjoint(_TAG.findall(",".join(tags)))
    since = [http_date(line, time.time(), strict=True) for line in lines(asked, "if-modified-since")]
    changed = [http_date(line, time.time(), strict=True) for line in lines(stored, "last-modified")]
    if len(since) != 1 or len(changed) != 1 or since[0] is None or changed[0] is None:
        return False
    return changed[0] <= since[0]


def is_for_all(told: rfc9111.Directives) -> bool:
    """Tell whether a response to somebody who is known is for everybody (RFC 9111 3.5)."""
    return any(name in told for name in ("public", "must-revalidate", "s-maxage"))


def disowned(told: rfc9111.Directives) -> bool:
    """Tell whether a response says that it must not be kept here."""
    return "no-store" in told or "private" in told


def tells_who(scope: Scope, headers: Fields) -> bool:
    """Tell whether a request says who asks: by a field, or by a certificate."""
    tls = (scope.get("extensions") or {}).get("tls") or {}
    return bool(tls.get("client_cert_name")) or any(rfc9111.WHO.fullmatch(name) for name, _value in headers)


def target_of(scope: Scope, headers: Fields, known: bool) -> str:  # noqa: FBT001 - a part of the key like the others
    """Return a digest of all that decides what the application answers to anybody (RFC 9111 2, 7.1)."""
    said_more = [
        (name, _TOLD_APART.findall(value) if name == b"forwarded" else value)
        for name, value in headers
        if name in _REWRITES
    ]
    parts = [scope.get(name) for name in ("scheme", "root_path", "path", "raw_path", "query_string")]
    return rfc9111._digest((*parts, _host(headers), said_more, known))


def _host(headers: Fields) -> bytes:
    return b",".join(value for name, value in headers if name == b"host").lower()


def url_of(scope: Scope) -> str:
    """Return the URL of a request as its client knows it."""
    root, path, query = scope.get("root_path", ""), scope["path"], scope.get("query_string", b"")
    whole = quote(path if path.startswith(root) else root + path, safe="/:@!$&'()*+,;=~", errors="surrogatepass")
    url = f"{scope.get('scheme', 'http')}://{_host(scope['headers']).decode('latin-1')}{whole}"
    return f"{url}?{query.decode('latin-1')}" if query else url


def name_of(url: str) -> str:
    """Return what a write forgets the responses of a URL by, however its characters are written."""
    return rfc9111._digest(unquote(rfc9111.cache_key("GET", url)))


def plain_get(scope: Scope) -> Scope:
    """Return the scope of a GET for the same, without what is about one request and one connection."""
    plain = dict(scope)
    plain["method"] = "GET"
    plain["headers"] = [field for field in scope["headers"] if field[0] not in _NOT_RENEWED]
    extensions = scope.get("extensions") or {}
    plain["extensions"] = {name: each for name, each in extensions.items() if not name.startswith("http.")}
    if "state" in scope:
        plain["state"] = dict(scope["state"])
    return plain


def nothing_more() -> Receive:
    """Return what a request without a body receives, whose client never goes away."""
    messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive() -> Message:
        if not messages:
            await anyio.sleep_forever()
        return messages.pop()

    return receive
