"""Bearer tokens that renew themselves, as the authentication of a client (RFC 6750).

Requests carry the token that `resilient.http.tokens` says is in use; a new one is asked for as
`resilient.http.grants` says, or with a function of the user.

A server may also refuse a token before its time, with a 401. Then the request is sent once more, with the token
that somebody else got meanwhile or with a new one, and the answer to that is final.

`TokenFlow` is the glue: one generator of steps, and two drivers that carry the steps out, in sync and in async
code.
"""

import contextvars
import functools
import math
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from types import CoroutineType
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar

from resilient import deadline, options, runtime, timers, workers
from resilient.component import Component
from resilient.deadline import Deadline
from resilient.errors import ResilientError, ThreadsExhausted, TimedOut
from resilient.events import logger
from resilient.http.bodies import examine
from resilient.http.family import Family, _families
from resilient.http.grants import HEADER, Grant, Redirected, Unusable, form_of, grant_of, request_of
from resilient.http.streams import CLOCKS_DIFFER, AsyncWatch, SyncWatch, watch
from resilient.http.tokens import Failure, Flight, Issued, Token, Tokens, check_secret
from resilient.policies.timeout import Timeout
from resilient.ticket import Ticket

LONGEST_ANSWER: Final = 256 * 1024
"""How many bytes a token endpoint may answer."""

MOST_THREADS: Final = 16
"""How many calls of a sync `fetch` that did not answer in time may still be running."""

_REFUSED = 401


class TokenRefreshFailed(ResilientError):
    """A new token is needed, and there is none to be had.

    What a client raises is also a `TransportError` of its own package, with `request` set to the request that
    needed the token. Neither the message nor the other attributes hold secrets.

    Args:
        reason: Why, in a few words.
        policy: The label of the `TokenAuth`.
        retry_after: Seconds until the next request asks for a token again; None if no request will, because the
            refresh token was refused for good (`invalid_grant`).
        code: The error code of the token endpoint (RFC 6749 5.2), or None.
    """

    def __init__(
        self, reason: str, *, policy: str, retry_after: float | None = None, code: str | None = None
    ) -> None:
        super().__init__(f"{policy}: no new token: {reason}")
        self.reason = reason
        self.policy = policy
        self.retry_after = retry_after
        self.code = code


FetchToken: TypeAlias = Callable[[str | None], Any]


class TokenFlow(Component):
    """Everything of `TokenAuth` but its base class: see `resilient.httpx.TokenAuth`.

    Requests carry `Authorization: Bearer ...`, whatever header of that name they had, as with every auth of httpx;
    give a single request `auth=None` to leave it alone. The token goes to whatever URL the client is asked for,
    but not along with a redirect to another origin.

    A 401 to a request that carried the token gets it a new token and is sent once more, if its body can be: bytes,
    forms and files that can seek, but no generators. The answer to that is final, even if it is another 401. A
    request that was redirected before it was refused goes on from where it was refused.

    The token endpoint is asked through the same client, so through its transport. If the client raises there, the
    request that asked fails, even if the old token still serves. The answers are taken out of
    `response.history`, but count for `max_redirects`. A sync `fetch` runs in a thread of its own.

    Args:
        fetch: A function of the refresh token at hand (a str, or None if there is none) that returns a `Token`.
            Sync clients need a sync function, async clients take both. Or use `client_credentials` and
            `refresh_token`.
        early: How many seconds before its end a token is renewed, at most half of its life. Default 30 s.
        timeout: For how many seconds an answer is waited for. In sync code it bounds each step of a token request
            by itself, unless the transport of the client is a `ResilientTransport`. Default 10 s.
        retry_failed_after: For how many seconds everybody shares a failure before the next one asks again, or
            longer if the token endpoint says so (up to 60 s). While the old token still serves, nobody asks before
            half of what is left of it has passed. Default 1 s.
        on_rotate: A sync function that is called with the `Token` that brought a new refresh token, to keep it. If
            it raises, that is logged. Default None.
        name: What errors and logs call this object. Default: its repr.

    Raises:
        TokenRefreshFailed: There is no valid token (at requests). It is a `TransportError` of httpx as well.
        TypeError: A bad option; or, at requests of a sync client, an async `fetch`.
        ValueError: A bad option.
    """

    _family: ClassVar[Family]
    requires_request_body = False
    requires_response_body = False

    def __init__(
        self,
        fetch: FetchToken | Grant,
        *,
        early: options.Seconds = 30.0,
        timeout: options.Seconds = 10.0,
        retry_failed_after: options.Seconds = 1.0,
        on_rotate: Callable[[Token], object] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        owner = type(self).__name__
        if not isinstance(fetch, Grant) and (not callable(fetch) or isinstance(fetch, type)):
            raise TypeError(  # without the value, which may be a token
                f"{owner}: fetch of type {type(fetch).__name__} is not allowed; give a function of the refresh "
                f"token that returns a Token, or use {owner}.client_credentials() or {owner}.refresh_token()"
            )
        self.fetch = fetch
        self.early = options.seconds(owner, "early", early, zero=True)
        self.timeout = options.seconds(owner, "timeout", timeout)
        self.retry_failed_after = options.seconds(owner, "retry_failed_after", retry_failed_after, zero=True)
        self.on_rotate = None if on_rotate is None else options.function(owner, "on_rotate", on_rotate)
        self._grant = fetch if isinstance(fetch, Grant) else None
        self._is_async = options.is_async(fetch)
        self._threads = 0
        self._limit = _Limit(self.timeout, name=f"{self.label}: timeout")
        self._tokens = Tokens(
            early=self.early,
            timeout=self.timeout,
            retry_failed_after=self.retry_failed_after,
            refresh_token=None if self._grant is None else self._grant.refresh_token,
        )

    @classmethod
    def client_credentials(
        cls,
        token_url: Any,
        *,
        client_id: str,
        client_secret: str,
        scope: str | None = None,
        client_auth: Literal["basic", "body"] = "basic",
        params: Mapping[str, str] | None = None,
        early: options.Seconds = 30.0,
        timeout: options.Seconds = 10.0,
        retry_failed_after: options.Seconds = 1.0,
        name: str | None = None,
    ) -> Self:
        """Get tokens in the name of the client itself (RFC 6749 4.4).

        Args:
            token_url: The URL of the token endpoint; https, but for tests, as it is sent secrets (RFC 6749 3.2).
            client_id: The name of the client.
            client_secret: Its password.
            scope: What the token is for, names with spaces between them. Default None: the server decides.
            client_auth: `"basic"` (the default) sends name and password in a header, `"body"` in the form, for
                servers that want it so (RFC 6749 2.3.1).
            params: More fields for the form, such as `{"audience": "https://api.example"}`. Default None.
            early: See `TokenAuth`.
            timeout: See `TokenAuth`.
            retry_failed_after: See `TokenAuth`.
            name: See `TokenAuth`.
        """
        check_secret(cls.__name__, "client_secret", client_secret)
        grant = grant_of(
            cls.__name__,
            cls._family,
            token_url,
            form=form_of("client_credentials", scope, params),
            client_id=client_id,
            client_secret=client_secret,
            client_auth=client_auth,
        )
        return cls(grant, early=early, timeout=timeout, retry_failed_after=retry_failed_after, name=name)

    @classmethod
    def refresh_token(
        cls,
        token_url: Any,
        *,
        refresh_token: str,
        client_id: str,
        client_secret: str | None = None,
        scope: str | None = None,
        client_auth: Literal["basic", "body"] = "basic",
        params: Mapping[str, str] | None = None,
        early: options.Seconds = 30.0,
        timeout: options.Seconds = 10.0,
        retry_failed_after: options.Seconds = 1.0,
        on_rotate: Callable[[Token], object] | None = None,
        name: str | None = None,
    ) -> Self:
        """Get tokens with a refresh token (RFC 6749 6).

        An answer with another refresh token replaces the one at hand; keep it with `on_rotate`. One that the
        server refuses for good (`invalid_grant`) is not tried again. One that rotates belongs to one process only.

        Args:
            token_url: See `client_credentials`.
            refresh_token: The refresh token to begin with.
            client_id: The name of the client.
            client_secret: Its password. Default None: a public client, which has none.
            scope: What the token is for, not more than was granted. Default None: all of it.
            client_auth: See `client_credentials`.
            params: More fields for the form. Default None.
            early: See `TokenAuth`.
            timeout: See `TokenAuth`.
            retry_failed_after: See `TokenAuth`.
            on_rotate: See `TokenAuth`.
            name: See `TokenAuth`.
        """
        check_secret(cls.__name__, "refresh_token", refresh_token)
        grant = grant_of(
            cls.__name__,
            cls._family,
            token_url,
            form=form_of("refresh_token", scope, params),
            client_id=client_id,
            client_secret=client_secret,
            client_auth=client_auth,
            refresh_token=refresh_token,
        )
        return cls(
            grant,
            early=early,
            timeout=timeout,
            retry_failed_after=retry_failed_after,
            on_rotate=on_rotate,
            name=name,
        )

    def after_fork(self) -> None:
        super().after_fork()
        self._threads = 0
        self._tokens.after_fork()

    def __repr__(self) -> str:
        """Show the options that differ from their defaults, but not what may be hidden in a function."""
        changed = self.changed_options()
        shown = [repr(self.fetch) if self._grant is not None else _name_of(self.fetch)]
        shown += [
            f"{name}={getattr(self, name):g}"
            for name in ("early", "timeout", "retry_failed_after")
            if name in changed
        ]
        if self.on_rotate is not None:
            shown.append(f"on_rotate={_name_of(self.on_rotate)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    # -- drivers ----------------------------------------------------------------------------------------------

    def sync_auth_flow(self, request: Any) -> Generator[Any, Any, None]:
        """Send a request with a token; called by sync clients."""
        if self._is_async:
            raise TypeError(
                f"{self.label}: fetch is an async function, which a sync client cannot wait for; give a sync "
                "function, or use an async client"
            )
        steps = self._steps(request)
        answer: Any = None
        thrown: list[BaseException] = []  # popped where it is raised, so that no frame keeps its own error alive
        while True:
            try:
                step = steps.throw(thrown.pop()) if thrown else steps.send(answer)
            except StopIteration:
                return
            if isinstance(step, _Send):
                try:
                    answer = yield step.request
                    continue
                except GeneratorExit:
                    pass
                self._note_closed(step)
                return
            try:
                if isinstance(step, _Ask):
                    answer = yield from self._ask(step.request)
                else:
                    assert not isinstance(step, _Fetch)  # noqa: S101 - refused above
                    answer = step.run()
            except BaseException as error:
                thrown.append(error)

    async def async_auth_flow(self, request: Any) -> AsyncGenerator[Any, Any]:
        """Send a request with a token; called by async clients."""
        steps = self._steps(request)
        answer: Any = None
        thrown: list[BaseException] = []
        while True:
            try:
                step = steps.throw(thrown.pop()) if thrown else steps.send(answer)
            except StopIteration:
                return
            if isinstance(step, _Send):
                try:
                    answer = yield step.request
                    continue
                except GeneratorExit:
                    pass
                self._note_closed(step)
                return
            timer, closed = None, False
            try:
                if isinstance(step, _Ask):
                    # A cancel scope around a yield is a danger in general. Here nobody but the client runs in
                    # between: it sends the request, which is what is to be cancelled.
                    timer = timers.begin(self._limit, self.timeout, runtime.now(), self._limit._queues)
                    answer = yield step.request
                    await self._aread(answer, step.request)
                else:
                    answer = await step.arun()
            except GeneratorExit:
                closed = True
            except BaseException as error:
                thrown.append(error)
            if closed:
                thrown.append(_error_of_client())
            if timer is not None:
                try:
                    timer.end(thrown[0] if thrown else None)
                except TimedOut as error:
                    thrown[:] = [error]

    def _note_closed(self, sent: "_Send") -> None:
        """Take note of a refusal that a hook of the client made an error of: it can only help those to come."""
        response = getattr(_error_of_client(), "response", None)
        now = runtime.now()
        if (
            isinstance(response, self._family.Response)
            and _is_refusal(response, request_of(response, sent.request), sent.issued)
            and now >= sent.issued.asked_at + self.retry_failed_after  # else it is not the token that is to blame
        ):
            self._tokens.refuse(sent.issued, now)

    def _ask(self, request: Any) -> Generator[Any, Any, Any]:
        """Have the client send a token request, and read the answer."""
        response = None
        with deadline.published(deadline.tighten(self._limit, self.timeout, runtime.now())):
            try:
                response = yield request
            except GeneratorExit:
                pass
            else:
                self._read(response, request)
        if response is None:
            raise _error_of_client()
        return response

    def _read(self, response: Any, request: Any) -> None:
        watched = watch(self._family, response, request, SyncWatch)
        if watched is not None:
            watched.limit = deadline.current()
            if watched.buffer(LONGEST_ANSWER) is None:
                watched.close()
                response.stream = self._family.ByteStream(b"")  # the client would read the rest
        response.read()

    async def _aread(self, response: Any, request: Any) -> None:
        watched = watch(self._family, response, request, AsyncWatch)
        if watched is not None and await watched.buffer(LONGEST_ANSWER) is None:
            await watched.aclose()
            response.stream = self._family.ByteStream(b"")
        await response.aread()

    # -- steps ------------------------------------------------------------------------------------------------

    def _steps(self, request: Any) -> "Steps[None]":
        """Send a request with a token; send it once more if the token was refused."""
        body = examine(self._family, request)
        asked: list[Any] = []
        issued = yield from self._obtain(request, asked)
        request.headers[HEADER] = issued.header
        response = yield _Send(request, issued)
        refused = request_of(response, request)
        if _is_refusal(response, refused, issued) and self._tokens.refuse(issued, runtime.now()):
            if refused.stream is not request.stream:  # redirected
                body = examine(self._family, refused)
            if body.replayable:
                yield _Read(response)  # now and not when the client does: others wait for its connection
                issued = yield from self._obtain(request, asked)
                if body.rewind is not None:
                    body.rewind()
                refused.headers[HEADER] = issued.header
                response = yield _Send(refused, issued)
                if _is_refusal(response, request_of(response, refused), issued):
                    self._tokens.spare(issued, runtime.now())
        if asked:
            for each in (response, *response.history):
                each.history = [other for other in each.history if other not in asked]

    def _obtain(self, request: Any, asked: list[Any]) -> "Steps[Issued]":
        """Return a token to use, whatever has to be done for it."""
        now = runtime.now()
        found: Issued | Ticket | Flight | Failure = self._tokens.look(now, self._patience(now))
        while not isinstance(found, Issued):
            if isinstance(found, Ticket):
                found = yield from self._follow(found, request)
            elif isinstance(found, Failure):
                try:
                    raise self._error(found, request) from found.cause
                finally:
                    # Or the cause would keep itself alive, on Python 3.12 through its frame and this one.
                    del found
            elif self._grant is not None or self._is_async:
                found = yield from self._lead(found, request, asked)
            else:
                found = yield from self._lead_thread(found, request)
        return found

    def _follow(
        self, ticket: Ticket, request: Any, *, threaded: bool = False
    ) -> "Steps[Issued | Flight | Failure]":
        """Wait for what somebody else does."""
        try:
            granted = yield _Wait(ticket, threaded=threaded)
        except BaseException:
            self._tokens.leave(ticket, runtime.now())
            raise
        if granted:
            found: Issued | Flight | Failure = ticket.value
            return found
        instead = self._tokens.leave(ticket, runtime.now())
        if self._is_late():
            raise self._own_deadline(request)
        return instead

    def _lead(self, flight: Flight, request: Any, asked: list[Any]) -> "Steps[Issued | Failure]":
        """Ask for a token, in the name of all who wait for it."""
        try:
            if self._grant is None:
                token = _checked((yield _Fetch(self._limit, self.fetch, flight.refresh_token)))
            else:
                asking = self._grant.request(self._family, flight.refresh_token, request, self._time_left())
                response = yield _Ask(asking)
                asked.append(response)
                token = self._grant.token_in(response, asking)
        except Exception as error:
            if self._is_late():
                self._tokens.abandon(flight, runtime.now())
                raise self._own_deadline(request) from error
            # The client can send the request only if it has not raised an error of its own.
            return self._fail(flight, error, final=self._grant is not None and not isinstance(error, Unusable))
        except BaseException:
            self._tokens.abandon(flight, runtime.now())
            raise
        return self._land(flight, token)

    def _lead_thread(self, flight: Flight, request: Any) -> "Steps[Issued | Flight | Failure]":
        """Have a thread ask for a token, and wait like everybody else: the thread goes on if this caller goes."""
        try:
            ticket = self._tokens.join(self._patience(runtime.now()))
            try:
                self._start_thread(flight)
            except Exception as error:  # no thread to be had: this ends the wait as well
                self._fail(flight, error)
            except BaseException:
                self._tokens.leave(ticket, runtime.now())
                raise
            return (yield from self._follow(ticket, request, threaded=True))
        finally:
            self._tokens.abandon(flight, runtime.now())  # if the thread has not begun

    def _start_thread(self, flight: Flight) -> None:
        with self._lock:
            if self._threads >= MOST_THREADS:
                raise ThreadsExhausted(f"{self._threads} abandoned threads are still running", policy=self.label)
            self._threads += 1
        try:
            with deadline.detached():
                context = contextvars.copy_context()
            workers.start(workers.Job(functools.partial(self._work, flight), context, None))
        except BaseException:
            self._end_thread()
            raise

    def _work(self, flight: Flight) -> None:
        """Call a sync `fetch`; runs in a thread of its own."""
        try:
            if not self._tokens.begin(flight):
                return
            with deadline.published(Deadline(flight.overdue_at, self._limit)):
                token = _checked(self.fetch(flight.refresh_token))  # type: ignore[operator]  # it is no Grant
        except BaseException as error:
            self._fail(flight, error)
        else:
            self._land(flight, token)
        finally:
            self._end_thread()

    def _end_thread(self) -> None:
        with self._lock:
            self._threads -= 1

    def _land(self, flight: Flight, token: Token) -> Issued:
        issued, rotated = self._tokens.land(flight, token)
        if rotated and self.on_rotate is not None:
            try:
                self.on_rotate(token)
            except Exception as error:
                # Its text and its traceback may hold the token.
                logger.error("%s: on_rotate failed with %s", self.label, type(error).__name__)
        return issued

    def _fail(self, flight: Flight, error: BaseException, *, final: bool = False) -> Issued | Failure:
        """Take note that a flight failed; return the old token instead if it serves, and if that is of any use."""
        code, pause = (error.code, error.pause) if isinstance(error, Unusable) else (None, 0.0)
        now = runtime.now()
        failure = self._tokens.fail(flight, Failure(self._reason(error), code, pause, cause=error), now)
        valid = self._tokens.valid(now)
        if valid is not None:
            logger.warning("%s: no new token: %s; the old one serves until it expires", self.label, failure.reason)
        return failure if final or valid is None else valid

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, Unusable):
            return error.reason
        if isinstance(error, Redirected):
            return "the token endpoint redirects"
        if isinstance(error, TimeoutError | self._family.module.TimeoutException):
            return "no answer in time"
        return f"{'fetch' if self._grant is None else 'the token request'} failed with {type(error).__name__}"

    def _error(self, failure: Failure, request: Any) -> Exception:
        left = failure.until - runtime.now()
        error: Any = _error_class(self._family)(
            failure.reason,
            policy=self.label,
            retry_after=None if left == math.inf else max(0.0, left),
            code=failure.code,
        )
        error.request = request
        return error  # type: ignore[no-any-return]

    def _is_late(self) -> bool:
        """Tell whether it is the time of the caller that is over, and not that of the refresh."""
        left = deadline.remaining()
        return left is not None and left <= CLOCKS_DIFFER

    def _own_deadline(self, request: Any) -> Exception:
        limit = deadline.current()
        assert limit is not None  # noqa: S101 - it has passed
        return self._family.own(limit.timed_out(), request)

    def _patience(self, now: float) -> float:
        until = deadline.tightest(now + self.timeout)
        assert until is not None  # noqa: S101 - for the type checker: a time was given
        return until

    def _time_left(self) -> float:
        left = deadline.remaining()
        return self.timeout if left is None else min(left, self.timeout)


class _Limit(Timeout):
    """The time limit of a refresh; what is reported is the failure of the refresh."""

    def timed_out(self, *, tell: bool = True) -> TimedOut:
        return super().timed_out(tell=False)


class _Send:
    """Have the client send the request."""

    def __init__(self, request: Any, issued: Issued) -> None:
        self.request = request
        self.issued = issued


class _Ask:
    """Have the client send a token request, within the time limit, and read the answer."""

    def __init__(self, request: Any) -> None:
        self.request = request


class _Read:
    """Read a response that will be sent for once more."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def run(self) -> None:
        self._response.read()

    async def arun(self) -> None:
        await self._response.aread()


class _Wait:
    """Wait with a ticket."""

    def __init__(self, ticket: Ticket, *, threaded: bool) -> None:
        self._ticket = ticket
        self._threaded = threaded

    def run(self) -> bool:
        return runtime.wait(self._ticket)

    async def arun(self) -> bool:
        if self._threaded and runtime.start_thread is not runtime.start_daemon:
            return runtime.wait(self._ticket)  # in virtual time a thread has its turn while another one blocks
        return await runtime.await_ticket(self._ticket)


class _Fetch:
    """Call an async `fetch` within the time limit."""

    def __init__(self, limit: Timeout, fetch: Any, refresh_token: str | None) -> None:
        self._limit = limit
        self._fetch = fetch
        self._refresh_token = refresh_token

    async def arun(self) -> Any:
        return await self._limit.acall(self._fetch, self._refresh_token)


_R = TypeVar("_R")
Steps: TypeAlias = Generator[_Send | _Ask | _Read | _Wait | _Fetch, Any, _R]


# -- helpers --------------------------------------------------------------------------------------------------


@functools.cache
def _error_class(family: Family) -> Any:
    """Return the class that is both a `TokenRefreshFailed` and an error of this family."""

    def reduce(self: TokenRefreshFailed) -> tuple[Any, ...]:
        state = {key: value for key, value in self.__dict__.items() if key != "_request"}  # which holds the token
        return _rebuild_error, (family.name, self.args, state)

    members = {"__module__": family.name, "__doc__": TokenRefreshFailed.__doc__, "__reduce__": reduce}
    return type("TokenRefreshFailed", (TokenRefreshFailed, family.module.TransportError), members)


def _error_of_client() -> BaseException:
    """Return the error because of which a client closes the flow.

    A generator that is being closed only sees a GeneratorExit. Outside of all its own handlers, the error that is
    handled is that of its caller. There is none if the flow is closed for another reason.
    """
    return sys.exception() or GeneratorExit()


def _rebuild_error(name: str, args: tuple[Any, ...], state: dict[str, Any]) -> TokenRefreshFailed:
    if name not in _families:  # in another process, where nobody has imported it yet
        __import__(name)
    kind = _error_class(_families[name])
    error: TokenRefreshFailed = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update({"_request": None, **state})
    return error


def _is_refusal(response: Any, request: Any, issued: Issued) -> bool:
    """Tell whether a token was refused, and not a request without it, as after a redirect to another origin."""
    return bool(response.status_code == _REFUSED and request.headers.get(HEADER) == issued.header)


def _checked(token: Any) -> Token:
    if isinstance(token, CoroutineType):
        token.close()
        raise Unusable("fetch returned a coroutine; make it an `async def` function")
    if not isinstance(token, Token):
        raise Unusable(f"fetch returned {type(token).__name__}; return a Token")
    return token


def _name_of(function: Any) -> str:
    """Return the name of a function without what is bound to it, which may be secret."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))
