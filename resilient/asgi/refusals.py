"""The answers that the middleware gives itself: 429, 503 and 504.

They are problem details (RFC 9457), or plain text or HTML for those who ask for it, with `Retry-After`. They say
what the caller may know and nothing else: no names of policies but those of the rate limits, which the `RateLimit`
fields show anyway, no keys, and no text of errors.
"""

import html
import json
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeAlias

from resilient import runtime
from resilient.asgi.exchange import App, Fields, Receive, Scope, Send
from resilient.errors import CircuitOpen, Draining, RateLimited, ResilientError, Shed, TimedOut

if TYPE_CHECKING:
    from resilient.asgi.exchange import AsgiCall

_PROBLEMS = "https://iana.org/assignments/http-problem-types#"
_MOST_RETRY_AFTER = 2**31 - 1
_LONGEST_ACCEPT = 1000  # characters; to look through 60,000 commas would cost far more than what is refused


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was refused, and what its caller is told.

    Attributes:
        error: The error of the policy that refused it; not for the caller.
        status: The status: 429, 503 or 504.
        title: A few words for the kind of refusal.
        detail: A sentence.
        retry_after: In how many whole seconds to try again.
        headers: `Retry-After` and `Cache-Control`, as pairs of bytes. The fields about limits are added to
            whatever response is sent.
        type: The URI of the kind of problem.
        violated: The rate limits that are used up, by name.
    """

    error: ResilientError
    status: int
    title: str
    detail: str
    retry_after: int
    headers: Fields
    type: str = "about:blank"
    violated: tuple[str, ...] = ()

    def problem(self) -> dict[str, Any]:
        """Return the members of a problem details object (RFC 9457 3.1)."""
        members: dict[str, Any] = {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        if self.violated:
            members["violated-policies"] = list(self.violated)
        return members

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response: problem details, or what the caller likes better."""
        kind, body = self._body(scope)
        fields = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *self.headers]
        prefix = "websocket." if scope["type"] == "websocket" else ""
        await send({"type": f"{prefix}http.response.start", "status": self.status, "headers": fields})
        await send({"type": f"{prefix}http.response.body", "body": b"" if scope.get("method") == "HEAD" else body})

    def _body(self, scope: Scope) -> tuple[bytes, bytes]:
        kind = preferred(scope, ("application/problem+json", "application/json", "text/html", "text/plain"))
        if kind == "text/html":
            title, detail = html.escape(self.title), html.escape(self.detail)
            page = f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1><p>{detail}</p>\n"
            return b"text/html; charset=utf-8", page.encode()
        if kind == "text/plain":
            return b"text/plain; charset=utf-8", f"{self.title}. {self.detail}\n".encode()
        return kind.encode(), json.dumps(self.problem()).encode()


OnRejected: TypeAlias = Callable[[Scope, Refusal], App | Awaitable[App | None] | None]
"""What `on_rejected=` takes: a function that returns a response (any ASGI application), or None."""


def refusal_of(
    error: ResilientError,
    call: "AsgiCall | None",
    *,
    retry_after: float,
    gateway: bool = False,
    inside: bool = False,
) -> Refusal:
    """Return what the caller of a request is told.

    Args:
        error: Why it was refused.
        call: The request, for the names of its limits; None if no policy has seen it.
        retry_after: How many seconds to tell where the error does not know: up to twice as many, so that not all
            come back at once.
        gateway: Whether timeouts are those of somebody behind.
        inside: Whether the application has let the error out: then it is not the caller who did too much.
    """
    status, title, kind, detail = HTTPStatus.SERVICE_UNAVAILABLE, "", "about:blank", "The service is overloaded."
    violated: tuple[str, ...] = ()
    if isinstance(error, RateLimited) and not inside:
        status, title, kind = HTTPStatus.TOO_MANY_REQUESTS, "Quota exceeded", f"{_PROBLEMS}quota-exceeded"
        detail = "More requests were made than the limit allows."
        violated = call.edge.limits.violated(error.policy, call) if call is not None else ()
    elif isinstance(error, TimedOut):
        detail = "The request took too long."
        status = HTTPStatus.GATEWAY_TIMEOUT if gateway else status
    elif isinstance(error, CircuitOpen) or inside:
        detail = "Something that this service depends on is out of order."
    elif isinstance(error, Draining):
        detail = "The service is being restarted."
    else:
        title, kind = "Temporary reduced capacity", f"{_PROBLEMS}temporary-reduced-capacity"
    wait = getattr(error, "retry_after", None)
    if wait is None or isinstance(error, Shed):  # which knows when it looks again, and not when the load is less
        wait = max(wait or 0.0, runtime.random(retry_after, 2 * retry_after))
    seconds = max(1, math.ceil(wait))
    seconds = min(seconds, _MOST_RETRY_AFTER)
    headers = [(b"retry-after", b"%d" % seconds), (b"cache-control", b"no-store")]
    return Refusal(
        error=error,
        status=int(status),
        title=title or status.phrase,
        detail=detail,
        retry_after=seconds,
        headers=headers,
        type=kind,
        violated=violated,
    )


def preferred(scope: Scope, offered: tuple[str, ...]) -> str:
    """Return which of the offered media types the caller likes best: the first if it does not care, or says a lot.

    Args:
        scope: The scope of the request.
        offered: Media types, the best first.
    """
    accepted = b",".join(value for name, value in scope["headers"] if name == b"accept").decode("latin-1")
    if not accepted or accepted == "*/*" or len(accepted) > _LONGEST_ACCEPT:
        return offered[0]
    ranges = [_media_range(each) for each in accepted.lower().split(",")]

    def liking(kind: str) -> float:
        fitting = [(quality, given) for given, quality in ranges if given in {kind, kind.partition("/")[0] + "/*"}]
        exact = [quality for quality, given in fitting if given == kind]
        wide = [quality for quality, _given in fitting] or [quality for given, quality in ranges if given == "*/*"]
        return (exact or wide or [0.0])[0]

    return max(offered, key=liking)  # the first of those that are liked as much


def _media_range(text: str) -> tuple[str, float]:
    kind, *parameters = (part.strip() for part in text.split(";"))
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return kind, min(max(float(value), 0.0), 1.0)
            except ValueError:
                return kind, 0.0
    return kind, 1.0
