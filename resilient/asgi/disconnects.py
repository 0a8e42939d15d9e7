"""Stop working for clients that have gone.

An application learns that its client has gone only when it asks by `receive`, and most never do. So this asks for
it. Two must not ask at the same time: each would take messages from the other. Therefore nobody asks here before
the application has received the whole body, and from then on only this does, and hands on what it gets.
"""

from typing import Any

import anyio

from resilient.asgi.exchange import AsgiCall, Message, Receive, Scope
from resilient.call import AsyncNext

_BODILESS = frozenset({"GET", "HEAD", "OPTIONS", "DELETE", "TRACE"})


class Listener:
    """Listens for the end of one request's connection, on behalf of the application.

    Args:
        scope: The scope of the request.
        receive: What comes from the server.

    Attributes:
        gone: Whether the client has gone.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._arrived = anyio.Event()
        self._whole = anyio.Event()
        self.gone = False
        if scope["method"] in _BODILESS and not any(
            name in {b"content-length", b"transfer-encoding"} for name, _value in scope["headers"]
        ):
            self._whole.set()

    async def receive(self) -> Message:
        """Return the next message for the application."""
        if not self._whole.is_set():
            message = await self._receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                self.gone = self.gone or message["type"] == "http.disconnect"
                self._whole.set()
            return message
        while not self._kept and not self.gone:
            await self._arrived.wait()
        return self._kept.pop(0) if self._kept else {"type": "http.disconnect"}

    async def listen(self) -> None:
        """Return when the client has gone."""
        await self._whole.wait()
        while not self.gone:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
            else:
                self._kept.append(message)
            arrived, self._arrived = self._arrived, anyio.Event()
            arrived.set()


def while_wanted(chain: AsyncNext) -> AsyncNext:
    """Return a chain that is cancelled when the client has gone.

    What it raises is raised as it is, and not in a group: the application runs in the task that it is called in,
    and only the listener in another one.
    """

    async def wanted(call: AsgiCall) -> Any:
        if call.scope["type"] != "http":
            return await chain(call)
        listener = Listener(call.scope, call.receive)
        call.receive = listener.receive
        failure: BaseException | None = None
        result: Any = None

        async def listen() -> None:
            await listener.listen()
            if not call.completed:  # servers say so, too, when all was sent, and the rest is background work
                running.cancel()

        async with anyio.create_task_group() as group:
            with anyio.CancelScope() as running:
                group.start_soon(listen)
                try:
                    result = await chain(call)
                except Exception as error:
                    failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return call.response if listener.gone else result

    return wanted  # type: ignore[return-value]
