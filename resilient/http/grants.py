"""How a token endpoint is asked for a token, and what it answers (RFC 6749 sections 2.3.1, 4.4, 5 and 6).

A token request holds the secrets of the client, so it goes to the token endpoint and nowhere else: its body can be
sent once, and a redirect is no answer. Of what the endpoint writes, nothing is repeated but the error codes that
the standard knows: the rest may hold a token.

A `Grant` has no state: it builds a request and reads the answer; `resilient.http.auth` has the client send it.
"""

import base64
import functools
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import quote_plus

from resilient import options
from resilient.http.family import HIGHEST_PORT, Family
from resilient.http.headers import throttled_for
from resilient.http.tokens import Token, check_secret

LONGEST_PAUSE: Final = 60.0
"""For how many seconds a token endpoint that asks for patience (`Retry-After`) is left alone at most."""

HEADER: Final = "Authorization"
"""Where a request says who sends it."""

_DIGITS = re.compile(r"[0-9]{1,18}")

# Not `client_id`: some servers want it in the form too, beside the header.
_OF_OPTIONS = frozenset({"grant_type", "client_secret", "refresh_token"})

# RFC 6749 5.2. Nothing else that a token endpoint writes is repeated anywhere: it may hold a token.
_CODES = frozenset(
    {
        "invalid_request",
        "invalid_client",
        "invalid_grant",
        "unauthorized_client",
        "unsupported_grant_type",
        "invalid_scope",
    }
)


class Unusable(Exception):
    """An answer of a token endpoint that holds no token."""

    def __init__(self, reason: str, code: str | None = None, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.code = code
        self.pause = pause


class Redirected(Exception):
    """The client was about to send credentials to where a token endpoint redirects."""


@dataclass(frozen=True, slots=True, repr=False)
class Grant:
    """What a token endpoint is asked for: the OAuth grant, and who asks.

    Attributes:
        token_url: The token endpoint.
        form: The fields of the request but for the refresh token and the client.
        client_id: Who asks.
        client_secret: Its password, None for a public client.
        client_auth: Whether these two go into a header or into the form.
        refresh_token: The first refresh token; None for a grant that has none.
    """

    token_url: str
    form: tuple[tuple[str, str], ...]
    client_id: str
    client_secret: str | None
    client_auth: Literal["basic", "body"]
    refresh_token: str | None = None

    def __repr__(self) -> str:
        return f"<{dict(self.form)['grant_type']} at {self.token_url.partition('?')[0]}>"

    def request(self, family: Family, refresh_token: str | None, original: Any, timeout: float) -> Any:
        """Return the request to send, with the timeouts of the original one, but none above `timeout` seconds."""
        form = dict(self.form)
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if "User-Agent" in original.headers:  # some servers turn away whoever does not say what it is
            headers["User-Agent"] = original.headers["User-Agent"]
        if refresh_token is not None:
            form["refresh_token"] = refresh_token
        if self.client_secret is not None and self.client_auth == "basic":
            pair = f"{quote_plus(self.client_id)}:{quote_plus(self.client_secret)}"  # RFC 6749 2.3.1
            headers[HEADER] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            form["client_id"] = self.client_id
            if self.client_secret is not None:
                form["client_secret"] = self.client_secret
        theirs = original.extensions.get("timeout") or {}
        timeouts = {
            name: timeout if (given := theirs.get(name)) is None else min(given, timeout)
            for name in ("connect", "read", "write", "pool")
        }
        request = family.Request(
            "POST", self.token_url, data=form, headers=headers, extensions={"timeout": timeouts}
        )
        request.stream = _credentials_of(family)(request.content)
        return request

    def token_in(self, response: Any, request: Any) -> Token:
        """Return the token in an answer.

        Raises:
            Unusable: There is none.
        """
        if request_of(response, request) is not request:
            raise Unusable("the token endpoint redirects")
        answer = _json_object(response)
        code = answer.get("error")
        code = code if isinstance(code, str) and code in _CODES else None
        if not response.is_success or "access_token" not in answer:
            answered = f"the token endpoint answered {response.status_code}"
            pause = throttled_for(response.status_code, response.headers, time.time()) or 0.0
            reason = f"{answered} {code}" if code else f"{answered} without a token"
            raise Unusable(reason, code, min(pause, LONGEST_PAUSE))
        expires_in = answer.get("expires_in")
        if isinstance(expires_in, str) and _DIGITS.fullmatch(expires_in):
            expires_in = int(expires_in)  # as old services of Microsoft write it
        try:
            return Token(
                answer["access_token"],
                expires_in,
                None if self.refresh_token is None else answer.get("refresh_token"),
                "Bearer" if answer.get("token_type") is None else answer["token_type"],
            )
        except (TypeError, ValueError) as error:
            raise Unusable(f"the token endpoint answered with a bad token ({error})") from None


class Credentials:
    """The body of a token request: it is sent once, to the token endpoint.

    A client that follows redirects would send the same body on (307 and 308), to wherever that is.
    """

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._spent = False

    def __iter__(self) -> Iterator[bytes]:
        yield self._once()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._once()

    def _once(self) -> bytes:
        if self._spent:
            raise Redirected
        self._spent = True
        return self._body


def grant_of(
    owner: str,
    family: Family,
    token_url: Any,
    *,
    form: tuple[tuple[str, str], ...],
    client_id: Any,
    client_secret: Any,
    client_auth: Any,
    refresh_token: str | None = None,
) -> Grant:
    """Return the grant with these options, or refuse them in the name of `owner`."""
    try:
        url = family.module.URL(token_url)
    except (TypeError, family.module.InvalidURL):
        url = None
    goes = url is not None and url.scheme in {"http", "https"} and url.host and (url.port or 0) <= HIGHEST_PORT
    if not goes or url.userinfo or url.fragment:
        raise ValueError(  # without the value, which may hold a password
            f"{owner}: this token_url is not allowed; give an absolute http or https URL without user or fragment"
        )
    check_secret(owner, "client_id", client_id)
    if client_secret is not None:
        check_secret(owner, "client_secret", client_secret)
    if client_auth not in {"basic", "body"}:
        raise options.refuse(owner, "client_auth", client_auth, "'basic' or 'body'")
    return Grant(str(url), form, client_id, client_secret, client_auth, refresh_token)


def form_of(grant_type: str, scope: Any, params: Any) -> tuple[tuple[str, str], ...]:
    """Return the fields that a grant has from the user."""
    form = {"grant_type": grant_type}
    if scope is not None:
        if not isinstance(scope, str):
            raise options.refuse("TokenAuth", "scope", scope, "a str with spaces between the names", TypeError)
        form["scope"] = scope
    if params is not None:
        pairs = params.items() if isinstance(params, Mapping) else [(None, None)]
        if not all(isinstance(each, str) for pair in pairs for each in pair):
            raise TypeError("TokenAuth: these params are not allowed; give a dict of str")
        taken = sorted(params.keys() & {*form, *_OF_OPTIONS})
        if taken:
            allowed = f"give fields that neither an option nor the grant sets, unlike {', '.join(taken)}"
            raise ValueError(f"TokenAuth: these params are not allowed; {allowed}")
        form = {**params, **form}
    return tuple(form.items())


def request_of(response: Any, sent: Any) -> Any:
    """Return what a response answers: not what was sent, if the client followed a redirect."""
    try:
        return response.request
    except RuntimeError:  # it did not come from a client
        return sent


@functools.cache
def _credentials_of(family: Family) -> Any:
    bases = (Credentials, family.module.SyncByteStream, family.module.AsyncByteStream)
    return type("Credentials", bases, {"__module__": __name__})


def _json_object(response: Any) -> dict[str, Any]:
    try:
        answer = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}
