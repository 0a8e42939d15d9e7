"""One request to an ASGI application, and what the application answers.

What the application sends goes to the server as it comes. Only a response that is a failure is held back, up to a
bound, if there is a policy that could put another one in its place. Once the first message has gone out, nothing
can be put in its place any more: that is when a call has *started*.
"""

from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio.lowlevel

from resilient.call import Call
from resilient.deadline import _current
from resilient.runtime import in_trio

if TYPE_CHECKING:
    from resilient.asgi.edge import AsgiEdge

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Fields: TypeAlias = list[tuple[bytes, bytes]]

_NO_KEYWORDS: dict[str, Any] = {}
_ENDS_THE_BODY = frozenset({"http.response.body", "http.response.zerocopysend"})


class Response:
    """What the application has begun to answer.

    Attributes:
        status_code: Its status.
        headers: Its fields, as pairs of bytes.
    """

    __slots__ = ("headers", "status_code")

    def __init__(self, status_code: int, headers: Fields) -> None:
        self.status_code = status_code
        self.headers = headers


class AsgiCall(Call):
    """One request on its way through a pipeline, to all the runs of the application that it takes.

    Attributes:
        scope: Its scope.
        receive: What the application receives by.
        send: What goes to the server.
        around: The deadline that was there before the pipeline.
        response: What the application has answered in its last run; None if nothing yet.
        started: Whether anything of a response has gone out.
        completed: Whether all of it has.
        failure: The error that the response of the last run stands for.
        held: The messages of that response that are held back; None if they went out.
        escaped: What the application has raised in its last run.
        run: What the application sends by in its last run.
        snapshot: The scope as it was before the first run, if there may be another one.
        keys: The rate limits that have looked at this call, and their keys.
        tees: Who wants to see the messages that go out; None if nobody does.
    """

    # Most calls leave these as they are. Attributes of the class need no place in a call that is made for every
    # request.
    response: Response | None = None
    started = completed = trailers = False
    failure: BaseException | None = None
    held: list[Message] | None = None
    room = 0
    escaped: BaseException | None = None
    run: Send | None = None
    snapshot: Scope = _NO_KEYWORDS
    keys: dict[Any, Hashable] = _NO_KEYWORDS
    tees: list[Callable[[Message], object]] | None = None

    def __init__(self, edge: "AsgiEdge", scope: Scope, receive: Receive, send: Send, now: float) -> None:
        self.function = edge.app  # not by super(): this is made for every request
        self.args = (scope,)
        self.kwargs = _NO_KEYWORDS
        self.now = now
        self.attempt = 1
        self.abandoned = ()
        self.edge: AsgiEdge = edge
        self.scope = scope
        self.receive = receive
        self.send = send
        self.around = _current.get()

    def note_key(self, limit: Any, key: Hashable) -> None:
        """Remember what a rate limit counts this call by."""
        self.keys = {**self.keys, limit: key} if self.keys else {limit: key}

    async def take(self, message: Message) -> None:
        """Take a message of the application: pass it on, or hold it back if it belongs to a failure."""
        kind = message["type"]
        if kind == "http.response.start":
            edge = self.edge
            self.trailers = message.get("trailers", False)
            headers = message.get("headers", ())
            if headers.__class__ is not list:  # any iterable will do, and some can be read only once
                headers = list(headers)
                message = {**message, "headers": headers}
            response = self.response = Response(message["status"], headers)
            if edge.listens or response.status_code >= 500:  # noqa: PLR2004 - to ask costs as much as a policy
                failure = self.failure = edge.judge(self, response)
                if failure is not None and edge.capture and not self.started:
                    self.held = [message]
                    self.room = edge.capture
                    return
            if _current.get() is not self.around and in_trio():
                await anyio.lowlevel.checkpoint_if_cancelled()  # then `send` would send nothing
            self.started = True
            if edge.ends_at_start is not None and edge.ends_at_start(headers):
                disarm(self)
            fields = edge.fields(self)
            if fields:
                message = {**message, "headers": [*headers, *fields]}
        elif self.held is not None:
            self.held.append(message)
            self.room -= len(message.get("body", b""))
            if self.room < 0:
                await self.release()
            return
        elif _ends(message, kind, trailers=self.trailers):
            self.completed = True
            disarm(self)
        if self.tees is not None:
            self._show(message)
        try:  # forward(), in place: a coroutine less for each message
            await self.send(message)
        except OSError as error:
            error._of_client = True  # type: ignore[attr-defined]
            raise

    async def begin(self, message: Message) -> None:
        """Send the start of a response that is not the application's, with the fields about limits."""
        self.started = True
        await self.forward({**message, "headers": [*message.get("headers", ()), *self.edge.fields(self)]})

    async def forward(self, message: Message) -> None:
        """Send a message to the server; if that fails, it is because the client has gone."""
        if self.tees is not None:
            self._show(message)
        try:
            await self.send(message)
        except OSError as error:
            error._of_client = True  # type: ignore[attr-defined]  # for the edge, which blames nobody then
            raise

    def _show(self, message: Message) -> None:
        for tee in self.tees or ():
            tee(message)

    async def release(self) -> None:
        """Send what was held back, as nobody puts anything in its place."""
        held, self.held = self.held, None
        if held:
            if self.edge.ends_at_start is not None and self.edge.ends_at_start(held[0]["headers"]):
                disarm(self)
            await self.begin(held[0])
            for message in held[1:]:
                await self.take(message)


class Run:
    """One of several runs of the application: what it sends after another one has begun is lost."""

    __slots__ = ("call",)

    def __init__(self, call: AsgiCall) -> None:
        self.call = call

    async def __call__(self, message: Message) -> None:
        """Take a message of this run."""
        if self.call.run is self:
            await self.call.take(message)


class Handshake(AsgiCall):
    """The handshake of a websocket: it is complete when the application accepts.

    Attributes:
        received: Whether the application has received anything, which is the handshake to begin with.
    """

    received = False

    def __init__(self, edge: "AsgiEdge", scope: Scope, receive: Receive, send: Send, now: float) -> None:
        super().__init__(edge, scope, receive, send, now)
        self._receive = receive
        self.receive = self._receive_and_note

    async def _receive_and_note(self) -> Message:
        message = await self._receive()
        self.received = True
        return message

    async def take(self, message: Message) -> None:
        if message["type"] == "websocket.accept":
            self.completed = True
            disarm(self)
        self.started = True
        await self.forward(message)


def disarm(call: AsgiCall) -> None:
    """End the deadlines of a call whose response is complete: what runs now is nothing that anybody waits for."""
    current = _current.get()
    if current is None:
        return
    while current is not None and current is not call.around:
        current.disarm()
        current = current.outer
    _current.set(call.around)  # what is around this middleware ends its own deadlines, and has to find them


def is_event_stream(headers: Fields) -> bool:
    """Tell whether a response is a stream of server-sent events, which has no end that one could wait for."""
    for name, value in headers:  # a generator would cost more than all that it looks at
        if name == b"content-type":
            return value[:17].lower() == b"text/event-stream"
    return False


def _ends(message: Message, kind: str, *, trailers: bool) -> bool:
    """Tell whether a response ends with this message."""
    if kind in _ENDS_THE_BODY:
        return not trailers and not message.get("more_body", False)
    if kind == "http.response.trailers":
        return not message.get("more_trailers", False)
    return kind == "http.response.pathsend" and not trailers
