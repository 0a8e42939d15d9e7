"""What policies may know about a request to an ASGI application.

| question          | answer                                                                                      |
|-------------------|---------------------------------------------------------------------------------------------|
| failure           | errors of the application; 5xx, but not 501 and 505, which stay as they are                 |
| worth another try | 502, 503, 504; connection errors and timeouts that the application lets out                 |
| may be run again  | idempotent methods (RFC 9110 9.2.2) and requests with an `Idempotency-Key`, as long as      |
|                   | nothing of the response has gone out and the body of the request is recorded                |
| fault of the app  | all but a client that has gone                                                              |
"""

import sys
from collections.abc import Callable, Collection
from functools import lru_cache, partial
from inspect import Parameter, signature
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from resilient.asgi.exchange import App, AsgiCall, Fields, Message, Receive, Response, Run, Scope, is_event_stream
from resilient.asgi.limits import Limits
from resilient.call import AsyncNext, Call
from resilient.edge import Edge, error_of
from resilient.errors import FailedResponse, Rejected
from resilient.http.edge import IDEMPOTENT
from resilient.keyed import members
from resilient.kinds import Loop, Value
from resilient.kinds import Scope as Timed
from resilient.policies.rate_limit import RateLimit
from resilient.policy import Policy

if TYPE_CHECKING:
    from resilient.policies.cache import Cache

Repeatable: TypeAlias = Collection[str] | Callable[[Scope], object]

TRANSIENT = frozenset({502, 503, 504})
"""Statuses after which another run of the application may succeed."""

_FINAL = frozenset({501, 505})
_POSITIONAL = frozenset({Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD})


class AsgiEdge(Edge):
    """The edge of one application under one pipeline.

    Args:
        app: The application.
        pipeline: The policies around it.
        capture: How many bytes of a failing response are held back, if a policy could replace it.
        record: How many bytes of a request's body are kept for another run.
        repeatable: What else may be run again: methods, or a function of the scope.
        legacy: Whether to tell limits in `X-RateLimit-*` too.
        until_start: Whether deadlines end when a response begins, and not only when it is complete.
        limited: Whether requests may have a deadline that is not one of the pipeline's.
    """

    knows_failures = True
    judges = True
    notes_keys = True

    def __init__(
        self,
        app: App,
        pipeline: Policy,
        *,
        capture: int = 0,
        record: int = 0,
        repeatable: Repeatable = (),
        legacy: bool = False,
        until_start: bool = False,
        limited: bool = False,
    ) -> None:
        policies, kinds = list(pipeline.walk()), list(members(pipeline))
        self.app = app
        self.repeats = repeatable
        self.record = record
        self._repeats = any(isinstance(policy, Loop) for policy in kinds)
        replaced = any(isinstance(policy, Loop | Value) for policy in kinds)
        self.capture = capture if replaced else 0
        self._judges = [policy.judge for policy in policies if policy.judge is not None]
        self.listens = bool(self._judges)
        self.ends_at_start: Callable[[Fields], bool] | None = lambda _fields: True
        if not until_start:
            limited = limited or any(isinstance(policy, Timed) for policy in kinds)
            self.ends_at_start = is_event_stream if limited else None
        self.limits = Limits([policy for policy in policies if isinstance(policy, RateLimit)], legacy=legacy)
        self.fields: Callable[[AsgiCall], Fields] = self.limits.fields

    # -- what an answer or an error means ---------------------------------------------------------------------

    def judge(self, call: AsgiCall, response: Response) -> BaseException | None:
        """Return the error that a response stands for, or None if it is a good one."""
        own = self.failed(response)
        if not self._judges:
            return own
        other = error_of(self._judges, call, response)  # always asked, as some learn from what they see
        return own or other

    def failed(self, result: Any) -> BaseException | None:
        status = result.status_code
        return FailedResponse(result) if status >= 500 and status not in _FINAL else None  # noqa: PLR2004

    def transient(self, error: BaseException) -> bool:
        if isinstance(error, FailedResponse):
            return error.status in TRANSIENT
        return isinstance(error, ConnectionError | TimeoutError)

    def blames(self, error: Exception) -> bool | None:
        # Starlette raises an error of its own, whether the client went while its request or its response was read.
        starlette = sys.modules.get("starlette.requests")
        gone = starlette is not None and isinstance(error, starlette.ClientDisconnect)
        return None if gone or hasattr(error, "_of_client") else True

    def replaceable(self, call: Call) -> bool:
        assert isinstance(call, AsgiCall)  # noqa: S101 - no other calls end here
        return not call.started

    def repeatable(self, call: Call, error: Exception | None = None) -> bool:
        assert isinstance(call, AsgiCall)  # noqa: S101
        if call.started:
            return False
        if call.run is None or (isinstance(error, Rejected) and error is not call.escaped):
            return True  # it did not come to the application
        return self._may_repeat(call.scope) and not call.receive.overflowed  # type: ignore[attr-defined]

    def _may_repeat(self, scope: Scope) -> bool:
        if scope["method"] in IDEMPOTENT or any(name == b"idempotency-key" for name, _value in scope["headers"]):
            return True
        return bool(self.repeats(scope)) if callable(self.repeats) else scope["method"] in self.repeats

    def alternative(self, alternative: Any, call: Call) -> Any:
        """Return what a `Fallback` gives: a response (any ASGI application), or that of a function."""
        return alternative if is_app(alternative) else super().alternative(alternative, call)

    @staticmethod
    def cache(cache: "Cache") -> Policy:
        from resilient.asgi.cache import AsgiCache  # which is built on this module

        policy: Policy = AsgiCache(cache)
        return policy

    # -- running ----------------------------------------------------------------------------------------------

    def aend(self) -> AsyncNext:
        app, record = self.app, self.record

        async def run(call: AsgiCall) -> Any:
            try:
                await app(call.scope, call.receive, call.run or call.take)
            except Exception as error:
                call.escaped = error
                raise
            if call.failure is not None:
                raise call.failure
            return call.response

        async def run_again(call: AsgiCall) -> Any:
            if call.run is None:
                call.snapshot = _copy_of(call.scope)
                call.receive = Recording(call.receive, record)
            else:  # the scope is what it was, and the body begins anew
                call.response = call.failure = call.held = call.escaped = None
                call.scope.clear()
                call.scope.update(_copy_of(call.snapshot))
                call.receive.rewind()  # type: ignore[attr-defined]
            call.run = Run(call)
            return await run(call)

        return run_again if self._repeats else run  # type: ignore[return-value]


class Recording:
    """What a run of the application receives, so that another one can receive it again.

    Args:
        receive: What comes from the server.
        room: How many bytes of the body are kept at most.

    Attributes:
        overflowed: Whether there was more.
    """

    __slots__ = ("_messages", "_next", "_receive", "_room", "overflowed")

    def __init__(self, receive: Receive, room: int) -> None:
        self._receive = receive
        self._room = room
        self._messages: list[Message] = []
        self._next = 0
        self.overflowed = False

    async def __call__(self) -> Message:
        """Return the next message: one that was kept, or a new one."""
        if self._next < len(self._messages):
            message = self._messages[self._next]
            self._next += 1
            return message
        message = await self._receive()
        if not self.overflowed:
            self._room -= len(message.get("body", b""))
            self.overflowed = self._room < 0
            if self.overflowed:
                self._messages.clear()
            else:
                self._messages.append(message)
            self._next = len(self._messages)
        return message

    def rewind(self) -> None:
        """Begin anew."""
        self._next = 0


def _copy_of(scope: Scope) -> Scope:
    """Return a copy of a scope, and of what in it applications change in place."""
    copied = {**scope, "headers": list(scope["headers"])}
    if isinstance(scope.get("state"), dict):
        copied["state"] = dict(scope["state"])
    return copied


def is_app(candidate: Any) -> bool:
    """Tell whether this can be called as an ASGI application: with a scope, `receive` and `send`."""
    if not callable(candidate):
        return False
    if isinstance(candidate, FunctionType | MethodType | partial | type):
        return _takes(candidate, 3)
    return bool(_is_app_kind(type(candidate)))  # type: ignore[arg-type]  # classes are hashable


@lru_cache(1024)
def _is_app_kind(kind: type) -> bool:
    return _takes(kind.__call__, 4)


def _takes(function: Callable[..., Any], number: int) -> bool:
    """Tell whether a function has so many positional parameters."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # one that is not written in Python
        return False
    return sum(each.kind in _POSITIONAL for each in parameters) == number
