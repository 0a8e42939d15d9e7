"""How the tests drive ASGI applications: by hand, as test clients hide what is streamed, cut off or never awaited.

def test_a_request(backend):
    async def scenario():
        answer = await ask(app, "/items", headers={"accept": "text/plain"})
        assert answer.status == 200

    run(scenario, backend=backend)
"""

from collections import deque

import anyio
import anyio.lowlevel


class Answer:
    """What came from an application.

    Attributes:
        messages: All that it sent.
        error: What it raised, None if nothing.
    """

    def __init__(self):
        self.messages = []
        self.error = None

    @property
    def types(self):
        return [message["type"].removeprefix("http.response.") for message in self.messages]

    @property
    def status(self):
        return self.messages[0]["status"]

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def whole(self):
        return self.messages[-1]["type"] == "http.response.body" and not self.messages[-1].get("more_body", False)


def scope_of(path="/", *, method="GET", headers=None, **changes):
    """Return the scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"a"),
            *((name.encode(), value.encode()) for name, value in (headers or {}).items()),
        ],
        "client": ("192.0.2.1", 1234),
        "server": ("a", 80),
        **changes,
    }


class Connection:
    """A connection to an application: what it receives, and what it sends.

    Args:
        body: The parts of the request's body.
        gone: An event after which the client has gone; None keeps it there for ever.
    """

    def __init__(self, *body, gone=None):
        parts = [{"type": "http.request", "body": part, "more_body": True} for part in body or (b"",)]
        parts[-1]["more_body"] = False
        self.parts = deque(parts)
        self.gone = gone
        self.answer = Answer()

    async def receive(self):
        if self.parts:
            return self.parts.popleft()
        await (self.gone or anyio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        await anyio.lowlevel.checkpoint()
        self.answer.messages.append(message)


async def ask(app, path="/", *body, gone=None, **scope):
    """Make one request, and return the answer with whatever the application raised."""
    connection = Connection(*body, gone=gone)
    try:
        await app(scope_of(path, **scope), connection.receive, connection.send)
    except Exception as error:
        connection.answer.error = error
    return connection.answer


def replies(*outcomes, headers=(), seen=None):
    """Return an application that answers by these statuses or raises these errors; it repeats the last one."""
    left = deque(outcomes)

    async def app(scope, receive, send):
        outcome = left.popleft() if len(left) > 1 else left[0]
        if seen is not None:
            seen.append(scope)
        if isinstance(outcome, BaseException):
            raise outcome
        await send({"type": "http.response.start", "status": outcome, "headers": list(headers)})
        await send({"type": "http.response.body", "body": b"app %d" % outcome})

    return app
