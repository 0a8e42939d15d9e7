"""The transports: a pipeline around the transport of a client.

What the client sees stays the same. It gets the responses that the wrapped transport gave, open and unread, and
errors of its own family: a `TimedOut` is also its `TimeoutException`, a refusal is also its `TransportError`.
"""

from collections.abc import Callable, Collection, Hashable
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

from resilient import options, presets
from resilient.errors import FailedResult, ResilientError
from resilient.http.bodies import unguard
from resilient.http.deadline_header import DeadlineHeader
from resilient.http.edge import HttpCall, HttpEdge, Repeatable, origin
from resilient.http.family import Family
from resilient.http.network import keep_deadlines
from resilient.http.streams import _leaked, aclose_quietly, close_quietly, release_leaked
from resilient.kinds import Loop, Race, Scope
from resilient.policy import Policy

BUFFER = 1024 * 1024
"""How many bytes `buffer=True` reads."""

_PACKAGES = frozenset({"httpx", "httpx2"})
_OF_SYNC = frozenset({"handle_request", "close", "__enter__", "__exit__"})
_OF_ASYNC = frozenset({"handle_async_request", "aclose", "__aenter__", "__aexit__"})
_OF_THE_WIRE = frozenset({b"content-encoding", b"content-length", b"transfer-encoding"})


class Guard:
    """What the transports of both colours have in common; see `resilient.httpx.ResilientTransport`."""

    _family: ClassVar[Family]
    _asynchronous: ClassVar[bool]

    def __init__(
        self,
        transport: Any = None,
        *,
        pipeline: Policy | None = None,
        repeatable: Repeatable = (),
        key: Callable[[Any], Hashable] = origin,
        buffer: bool | int = False,
        deadline_header: str | None = None,
    ) -> None:
        owner = type(self).__name__
        self.transport = check_transport(owner, self._family, transport, asynchronous=self._asynchronous)
        self.pipeline = check_pipeline(owner, pipeline) or presets.http_client()
        self.repeatable = check_repeatable(owner, repeatable)
        self.key = options.function(owner, "key", key)
        self.buffer = _check_buffer(owner, buffer)
        self.deadline_header = deadline_header
        tells = None if deadline_header is None else DeadlineHeader.of(deadline_header, owner, "deadline_header")
        self._entered = self._closed = False
        self._request_type = self._family.Request
        send = getattr(self.transport, "handle_async_request" if self._asynchronous else "handle_request")
        self._edge = HttpEdge(
            self._family,
            send,
            asynchronous=self._asynchronous,
            repeatable=self.repeatable,
            partition=self.key,
            buffer=self.buffer,
            tells=tells,
            balances=getattr(self.transport, "balances", False),
            drains=not self._asynchronous and keep_deadlines(self.transport),
            of_attempts=_scopes_of_attempts(self.pipeline),
        )
        link = self.pipeline.achain if self._asynchronous else self.pipeline.chain
        self._chain: Callable[[HttpCall], Any] = link(self._edge)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transport!r}, pipeline={self.pipeline!r})"

    def _check_request(self, request: Any) -> None:
        if not isinstance(request, self._request_type):
            theirs = type(request).__module__.partition(".")[0]
            raise TypeError(
                f"{self._family.name}.{type(self).__name__} got a request of {theirs}, which has nothing in "
                f"common with {self._family.package}; use resilient.{theirs} for the clients of {theirs}"
            )

    def _check_answer(self, answer: Any) -> Any:
        """Return an answer that did not come from the transport (a fallback) as a response of its own."""
        if not isinstance(answer, self._family.Response):
            raise TypeError(
                f"{self._family.name}.{type(self).__name__}: the pipeline answered {answer!r} instead of a "
                f"response; fallbacks have to return {self._family.package}.Response objects"
            )
        # One response object may be the answer to many requests, and clients write into it.
        fields = {"status_code": answer.status_code, "extensions": dict(answer.extensions)}
        if answer.stream.__class__ is self._family.ByteStream:
            return self._family.Response(headers=answer.headers.raw, stream=answer.stream, **fields)
        try:
            content = answer.content
        except self._family.module.ResponseNotRead:
            return answer
        headers = [(name, value) for name, value in answer.headers.raw if name.lower() not in _OF_THE_WIRE]
        return self._family.Response(headers=headers, content=content, **fields)

    def _raise_own(self, error: ResilientError, request: Any) -> NoReturn:
        own = self._family.own(error, request)
        if own is error:
            raise own
        raise own from error.__cause__


def _lacks(guard: Guard, name: str) -> NoReturn:
    message = f"{type(guard).__name__!r} object has no attribute {name!r}"
    if name in (_OF_SYNC if guard._asynchronous else _OF_ASYNC):
        mine, other = ("Async", "") if guard._asynchronous else ("", "Async")
        package = guard._family.package
        message += f": it is for {package}.{mine}Client; give {package}.{other}Client {other}ResilientTransport()"
    raise AttributeError(message, name=name, obj=guard)


Guard.__getattr__ = _lacks  # type: ignore[attr-defined]  # in the class it would make all names pass type checks


class SyncGuard(Guard):
    """A transport for sync clients."""

    _asynchronous = False

    def handle_request(self, request: Any) -> Any:
        """Send one request under the pipeline."""
        if request.__class__ is not self._request_type:
            self._check_request(request)
        if _leaked:
            release_leaked()
        call = HttpCall(self._edge, request)
        try:
            response = self._chain(call)
        except FailedResult as failure:
            response = failure.result
        except BaseException as error:
            if call.response is not None:
                close_quietly(call.response)
            if isinstance(error, ResilientError):
                self._raise_own(error, request)
            raise
        finally:
            if not call.body.replayable:
                unguard(request)
        if response is call.response:
            call.response = (
                None  # or they would keep each other alive, and with them what waits for the body's end
            )
            return response
        if call.response is not None:
            close_quietly(call.response)
        return self._check_answer(response)

    def __enter__(self) -> Self:
        if not self._entered:  # a client enters it once for each pattern that it is mounted at
            self.transport.__enter__()
            self._entered = True
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if not self._closed:
            self._closed = True
            try:
                self._edge.background.close()
            finally:
                self.transport.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        """Close the wrapped transport, once."""
        if not self._closed:
            self._closed = True
            try:
                self._edge.background.close()
            finally:
                self.transport.close()


class AsyncGuard(Guard):
    """A transport for async clients, on asyncio and on trio."""

    _asynchronous = True

    async def handle_async_request(self, request: Any) -> Any:
        """Send one request under the pipeline."""
        if request.__class__ is not self._request_type:
            self._check_request(request)
        if _leaked:
            release_leaked()
        call = HttpCall(self._edge, request)
        try:
            response = await self._chain(call)
        except FailedResult as failure:
            response = failure.result
        except BaseException as error:
            if call.response is not None:
                await aclose_quietly(call.response)
            if isinstance(error, ResilientError):
                self._raise_own(error, request)
            raise
        finally:
            if not call.body.replayable:
                unguard(request)
        if response is call.response:
            call.response = (
                None  # or they would keep each other alive, and with them what waits for the body's end
            )
            return response
        if call.response is not None:
            await aclose_quietly(call.response)
        return self._check_answer(response)

    async def __aenter__(self) -> Self:
        if not self._entered:
            await self.transport.__aenter__()
            self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        if not self._closed:
            self._closed = True
            try:
                await self._edge.background.aclose()
            finally:
                await self.transport.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        """Close the wrapped transport, once."""
        if not self._closed:
            self._closed = True
            try:
                await self._edge.background.aclose()
            finally:
                await self.transport.aclose()


def check_transport(owner: str, family: Family, transport: Any, *, asynchronous: bool) -> Any:
    """Return the transport to wrap, or refuse it with an error that says what is wrong with it.

    Args:
        owner: Who asks, for the message.
        family: The family that it has to belong to; anything that has the right method will do.
        transport: The transport; None makes the default one of the family.
        asynchronous: The colour.

    Raises:
        TypeError: A transport of the other package, or of the other colour, or none at all.
    """
    needed, other = "handle_request", "handle_async_request"
    base = "AsyncHTTPTransport" if asynchronous else "HTTPTransport"
    if asynchronous:
        needed, other = other, needed
    if transport is None:
        return getattr(family.module, base)()
    allowed = f"a transport of {family.package} such as {family.package}.{base}(), or None"
    for kind in type(transport).__mro__:
        package = kind.__module__.partition(".")[0]
        if package in _PACKAGES - {family.package} and kind.__name__ in {"BaseTransport", "AsyncBaseTransport"}:
            allowed += f". This one is of {package}: use resilient.{package} instead"
            raise options.refuse(f"{family.name}.{owner}", "transport", transport, allowed, TypeError)
    if not callable(getattr(transport, needed, None)) or isinstance(transport, type):
        if isinstance(transport, Policy):
            allowed += ". This is a policy: write it as pipeline="
        elif isinstance(transport, type):
            allowed += ". This is a class: write it with parentheses"
        elif callable(getattr(transport, other, None)):
            colour, fits = (
                ("a sync", "ResilientTransport") if asynchronous else ("an async", "AsyncResilientTransport")
            )
            allowed += f". This is {colour} transport, which fits {fits}"
        elif hasattr(transport, "_transport"):
            allowed += f". To guard a client that exists already use {family.name}.install(client)"
        raise options.refuse(f"{family.name}.{owner}", "transport", transport, allowed, TypeError)
    return transport


def check_pipeline(owner: str, pipeline: Any, option: str = "pipeline") -> Policy | None:
    """Return a pipeline or None, and refuse anything else."""
    if pipeline is not None and not isinstance(pipeline, Policy):
        hint = f". Write {pipeline.__name__}() with parentheses" if isinstance(pipeline, type) else ""
        raise options.refuse(owner, option, pipeline, f"a policy, a Pipeline or None{hint}", TypeError)
    return pipeline


def _scopes_of_attempts(pipeline: Policy) -> frozenset[Policy]:
    """Return the scopes inside of a loop; if there is none, all but the outermost."""
    policies = list(pipeline.walk())
    loops = [place for place, policy in enumerate(policies) if isinstance(policy, Loop | Race)]
    scopes = [place for place, policy in enumerate(policies) if isinstance(policy, Scope)]
    first = min(loops) if loops else min(scopes, default=0) + 1
    return frozenset(policies[place] for place in scopes if place >= first)


def check_repeatable(owner: str, repeatable: Any) -> Repeatable:
    """Return what else may be sent again: methods, or a function."""
    allowed = "a collection of methods in upper case, such as {'POST'}, or a function of the request"
    if callable(repeatable):
        checked: Repeatable = options.function(owner, "repeatable", repeatable)
        return checked
    if isinstance(repeatable, str) or not isinstance(repeatable, Collection):
        raise options.refuse(owner, "repeatable", repeatable, allowed, TypeError)
    if not all(isinstance(method, str) for method in repeatable):
        raise options.refuse(owner, "repeatable", repeatable, allowed, TypeError)
    if not all(method and method == method.upper() for method in repeatable):
        raise options.refuse(owner, "repeatable", repeatable, allowed)
    return frozenset(repeatable)


def _check_buffer(owner: str, buffer: Any) -> int:
    if isinstance(buffer, bool):
        return BUFFER if buffer else 0
    if not isinstance(buffer, int):
        raise options.refuse(owner, "buffer", buffer, "True, False or a number of bytes >= 1", TypeError)
    return options.whole(owner, "buffer", buffer)
