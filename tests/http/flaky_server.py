"""Real servers that misbehave as they are told, for the clients of httpx and httpx2.

A script is one step for each request, in the order in which the requests arrive; the last step repeats.

    with FlakyServer([status(503, retry_after="1"), reset_mid_body(), ok(b"done")]) as server:
        ...                                     # send three requests to server.url
        assert [request.method for request in server.requests] == ["GET", "GET", "GET"]

    with H2Server([h2_refused(), ok(b"done")]) as server:      # httpx.HTTPTransport(http1=False, http2=True)

    with refused_port() as port: ...            # nobody listens there
    with hanging_port() as port: ...            # connecting takes for ever

`ok`, `status`, `choose` and `hang` work on both servers, the other steps on one of them. A step of your own is a
function that takes an `Exchange` (or an `H2Exchange`) first:

    @step
    def teapot(exchange, body=b""):
        exchange.respond(418, body)

A `Step` shows itself as the call that made it, so that `pytest.mark.parametrize(..., ids=str)` reads well.

What the server has seen lags behind what the client has done: `server.wait_until(lambda: ...)` waits for it (in
async code `await anyio.to_thread.run_sync(server.wait_until, ...)`, if the client has work to do meanwhile).
Whatever a step is doing, it ends within `POLL` seconds once its client goes away or the server is left. A step
that fails for a reason of its own makes the `with` statement fail.
"""

import functools
import http.client
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias

import h2.config
import h2.connection
import h2.errors
import h2.events
import h11
from hyperframe.frame import GoAwayFrame

POLL = 0.005
"""Seconds between two looks at what may have changed: small against the deadlines that tests set."""

PATIENCE = 10.0
"""Seconds after which something that has to happen is taken to have failed; no test gets there unless it fails."""

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str, str]]
Pace: TypeAlias = float | Callable[[], object]
"""Seconds before each piece, or a function that is asked again and again until it says yes; it must not block."""

End: TypeAlias = Literal["finish", "cut", "broken", "reset", "hang"]


@dataclass
class Request:
    """A request as the server got it.

    Attributes:
        method: Its method.
        target: Path and query, as sent.
        headers: Names and values, as sent, in this order. HTTP/2 has `:authority` and the like in front.
        complete: Whether its body has come to the end.
        connection: The number of its connection, counted from 1.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    complete: bool = False
    connection: int = 0
    chunks: list[bytes] = field(default_factory=list, repr=False)

    @property
    def body(self) -> bytes:
        """What has come of the body so far."""
        return b"".join(self.chunks)

    def header(self, name: str) -> str | None:
        """Return the value of the first header of this name, in any case, or None."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)


class Step:
    """What happens to one request; made by the functions that `step` decorates.

    Args:
        name: How it shows itself.
        run: Does it.
        early: Whether it begins before the request is read; see the function `early`.
    """

    def __init__(self, name: str, run: Callable[[Any], object], *, early: bool = False) -> None:
        self.name = name
        self.run = run
        self.early = early

    def __repr__(self) -> str:
        return self.name


def step(function: Callable[..., object]) -> Callable[..., Step]:
    """Make a function that takes an exchange and options into one that takes the options and returns a `Step`."""

    @functools.wraps(function)
    def make(*args: Any, **kwargs: Any) -> Step:
        shown = ", ".join([repr(arg) for arg in args] + [f"{key}={value!r}" for key, value in kwargs.items()])
        return Step(f"{function.__name__}({shown})", lambda exchange: function(exchange, *args, **kwargs))

    return make


def early(waiting: Step) -> Step:
    """Return the step as one that does not wait for the request.

    In HTTP/1.1 it begins when the first byte has come, and nothing is read; in HTTP/2 it begins with the headers.
    A reset right at the connection would be a `ConnectError` in some runs and a `ReadError` in others; with a body
    in the request it still depends on who is quicker, so have none.
    """
    return Step(f"early({waiting.name})", waiting.run, early=True)


# -- steps for both servers ---------------------------------------------------------------------------------------


@step
def ok(exchange: "Exchange | H2Exchange", body: bytes = b"ok", *, headers: Headers = ()) -> None:
    """Answer 200."""
    exchange.respond(200, body, headers)


@step
def status(
    exchange: "Exchange | H2Exchange",
    code: int,
    body: bytes = b"",
    *,
    retry_after: object = None,
    headers: Headers = (),
) -> None:
    """Answer with a status; `retry_after` is sent as it is, right or wrong, unless it is None."""
    more = [] if retry_after is None else [("Retry-After", str(retry_after))]
    exchange.respond(code, body, [*_pairs(headers), *more])


@step
def choose(exchange: "Exchange | H2Exchange", function: Callable[[Request], Step]) -> None:
    """Do the step that the function returns for the headers of the request."""
    assert exchange.request is not None
    function(exchange.request).run(exchange)


@step
def hang(exchange: "Exchange | H2Exchange", *, read: bool = True) -> None:
    """Never answer. With `read=False` (HTTP/1.1) not even read the body, so that a long one cannot be written.

    Then the server cannot see that the client has gone: that message waits behind the body.
    """
    exchange.hang(read=read)


# -- steps for HTTP/1.1 -------------------------------------------------------------------------------------------


@step
def reset_before_headers(exchange: "Exchange") -> None:
    """Reset the connection once the request has been read; `early(...)` does it with the request unread."""
    exchange.reset()


@step
def close_before_headers(exchange: "Exchange") -> None:
    """Close the connection once the request has been read, with no answer.

    As a second step it is what a client meets that reuses a connection just when the server gives it up.
    """
    exchange.read()
    exchange.close()


@step
def reset_mid_body(exchange: "Exchange", body: bytes = bytes(100), *, after: int = 5) -> None:
    """Answer 200 with so many bytes of the body, then reset the connection."""
    exchange.send_head(200, [("Content-Length", str(len(body)))])
    exchange.send(body[:after])
    exchange.reset()


@step
def truncated(exchange: "Exchange", *, length: int = 100, sent: int = 10) -> None:
    """Announce `length` bytes, send fewer, and close the connection."""
    exchange.send_head(200, [("Content-Length", str(length))])
    exchange.send(bytes(sent))
    exchange.close()


@step
def extra_bytes(exchange: "Exchange", body: bytes = b"ok", *, extra: bytes = b"spam") -> None:
    """Send more than the length that was announced, in one piece, and keep the connection open.

    A client that reuses the connection takes what is left for the beginning of the next answer.
    """
    exchange.read()
    exchange.send(_head(200, [("Content-Length", str(len(body)))]) + body + extra)


@step
def garbage_status_line(exchange: "Exchange", line: bytes = b"SPAM 200 EGGS") -> None:
    """Answer with something that is not HTTP, and keep the connection open."""
    exchange.read()
    exchange.send(line + b"\r\n\r\n")


@step
def drip(exchange: "Exchange", body: bytes = bytes(1000), *, every: Pace = 0.01, headers: Headers = ()) -> None:
    """Answer 200 and send the body byte by byte."""
    exchange.send_head(200, [*_pairs(headers), ("Content-Length", str(len(body)))])
    exchange.drip(body, every)


@step
def drip_headers(exchange: "Exchange", body: bytes = b"ok", *, every: Pace = 0.01, headers: Headers = ()) -> None:
    """Answer 200, with the status line and the headers byte by byte and the body at once."""
    exchange.read()
    exchange.drip(_head(200, [*_pairs(headers), ("Content-Length", str(len(body)))]), every)
    exchange.send(body)


@step
def informational_flood(
    exchange: "Exchange", count: int | None = None, *, code: int = 103, every: Pace = 0.0, then: Step | None = None
) -> None:
    """Send so many 1xx answers, None for no end, and then the answer of another step (default `ok()`)."""
    exchange.read()
    interim = _head(code, [("Link", "</style.css>; rel=preload")])
    while count is None or count > 0:
        exchange.pause(every)
        exchange.send(interim)
        count = None if count is None else count - 1
    (then or ok()).run(exchange)


@step
def early_response(exchange: "Exchange", code: int = 413, body: bytes = b"", *, drain: bool = True) -> None:
    """Answer before the body of the request has been read, and close the connection.

    The rest of the body is read first (a lingering close: RFC 9112, section 9.6). Without `drain` the connection
    is reset while the client still sends, which may cost it the answer: it does on asyncio.
    """
    exchange.send(_head(code, [("Content-Length", str(len(body))), ("Connection", "close")]) + body)
    if drain:
        exchange.read()
    exchange.close()


@step
def close_idle(exchange: "Exchange", body: bytes = b"ok", *, headers: Headers = ()) -> None:
    """Answer 200 as if the connection were kept, and close it, in one packet.

    So a client that looks at its connection before it sends the next request sees that it is dead. For one that
    cannot have seen it, make `close_before_headers` the second step.
    """
    exchange.connection.cork()
    exchange.respond(200, body, headers)
    exchange.close()


@step
def chunked(
    exchange: "Exchange", *chunks: bytes, every: Pace = 0.0, end: End = "finish", headers: Headers = ()
) -> None:
    """Answer 200 with a chunked body, chunk by chunk.

    The end is one of `"finish"` (as it should be), `"cut"` (closed before the last chunk), `"broken"` (a chunk
    whose size is no number), `"reset"` and `"hang"`.
    """
    exchange.send_head(200, [*_pairs(headers), ("Transfer-Encoding", "chunked")])
    for chunk in chunks:
        exchange.pause(every)
        exchange.send(b"%x\r\n%b\r\n" % (len(chunk), chunk))
    exchange.pause(every)
    if end == "finish":
        exchange.send(b"0\r\n\r\n")
    elif end == "broken":
        exchange.send(b"spam\r\neggs\r\n")
    elif end == "reset":
        exchange.reset()
    elif end == "hang":
        exchange.hang()
    if end != "finish":
        exchange.close()


@step
def chunked_broken(exchange: "Exchange", *chunks: bytes) -> None:
    """Answer 200 with good chunks, then one whose size is no number."""
    chunked(*(chunks or (b"good",)), end="broken").run(exchange)


@step
def sse(exchange: "Exchange", events: Sequence[str], *, every: Pace = 0.0, end: End = "finish") -> None:
    r"""Send server-sent events: each a line of data, or all lines of an event (`"id: 7\ndata: x"`)."""
    texts = [event if "\n" in event else f"data: {event}" for event in events]
    chunks = [f"{text}\n\n".encode() for text in texts]
    chunked(*chunks, every=every, end=end, headers={"Content-Type": "text/event-stream"}).run(exchange)


@step
def wait_for(exchange: "Exchange", event: threading.Event, *, then: Step | None = None) -> None:
    """Read the request, wait until the event is set, and go on with another step (default `ok()`)."""
    exchange.read()
    exchange.pause(event.is_set)
    (then or ok()).run(exchange)


@step
def raw(exchange: "Exchange", data: bytes, *, close: bool = True) -> None:
    """Answer with these bytes."""
    exchange.read()
    exchange.send(data)
    if close:
        exchange.close()


# -- steps for HTTP/2 ---------------------------------------------------------------------------------------------


h2_ok = ok
h2_hang = hang


@step
def h2_reset(
    exchange: "H2Exchange", code: int = h2.errors.ErrorCodes.INTERNAL_ERROR, *, sent: int | None = None
) -> None:
    """Reset the stream, after so many bytes of an answer; None (the default) for not even headers."""
    if sent is not None:
        exchange.send_headers(200, [("content-length", str(sent + 100))])
        exchange.send_data(bytes(sent))
    exchange.reset(code)


@step
def h2_refused(exchange: "H2Exchange") -> None:
    """Reset the stream with REFUSED_STREAM: the request has not been processed (RFC 9113, section 8.7)."""
    exchange.reset(h2.errors.ErrorCodes.REFUSED_STREAM)


@step
def h2_goaway(
    exchange: "H2Exchange",
    last_stream_id: int | None = None,
    code: int = h2.errors.ErrorCodes.NO_ERROR,
    *,
    then: Step | None = None,
) -> None:
    """Send GOAWAY, then close the connection, or go on with another step (`ok()`: answer all the same).

    Streams above `last_stream_id` have not been processed (RFC 9113, section 6.8): 0 says so of all of them, None
    (the default) says that this one was. The streams of a client are numbered 1, 3, 5 on each connection.
    """
    exchange.go_away(exchange.stream_id if last_stream_id is None else last_stream_id, code)
    if then is None:
        exchange.close()
    else:
        then.run(exchange)


@step
def h2_close(exchange: "H2Exchange") -> None:
    """Close the connection without saying goodbye."""
    exchange.close()


# -- ports --------------------------------------------------------------------------------------------------------


@contextmanager
def refused_port() -> Iterator[int]:
    """Keep a port of 127.0.0.1 on which nobody listens, so that connections are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@contextmanager
def hanging_port() -> Iterator[int]:
    """Keep a port of 127.0.0.1 to which connecting takes for ever.

    The queue of a listening socket is filled up, and then Linux ignores the packets that ask for a connection. The
    clients send them again after 1, 3 and 7 seconds, and once the port is given up they are refused.

    Raises:
        RuntimeError: The system does something else.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(16):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
            if not select.select([], [waiting], [], 10 * POLL)[1]:
                break
        else:
            raise RuntimeError("this system goes on accepting connections when its queue is full")
        yield listener.getsockname()[1]


# -- what servers have in common ----------------------------------------------------------------------------------


_HANG_UP = getattr(select, "POLLRDHUP", select.POLLHUP)  # elsewhere than on Linux, the second means the same


class _Gone(Exception):
    """There is no sense in going on: the client has gone away, or the server is being left."""


class _Connection:
    """A connection, closed exactly once, and never while somebody else shuts it down."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.number = number
        self.open = True
        self._socket = sock
        self._lock = threading.Lock()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def receive(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise _Gone
        return data

    def await_data(self) -> None:
        """Wait until there is something to receive."""
        if not self._socket.recv(1, socket.MSG_PEEK):
            raise _Gone

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def cork(self) -> None:
        """Keep back what is sent until the connection is closed, where the system can."""
        if hasattr(socket, "TCP_CORK"):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)

    def check(self) -> None:
        """Raise unless the client is still there."""
        poll = select.poll()
        poll.register(self._socket, _HANG_UP)
        if poll.poll(0):
            raise _Gone

    def finish(self) -> None:
        """Say that nothing more will come, and close the connection once the client has closed it.

        Closing at once would make a reset of it if the client had sent anything that is unread.
        """
        self._socket.shutdown(socket.SHUT_WR)
        while self._socket.recv(65536):
            pass
        self.close()

    def interrupt(self) -> None:
        """End whatever another thread does with the connection."""
        with self._lock, suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self.open = False
            self._socket.close()

    def reset(self) -> None:
        with self._lock, suppress(OSError):  # the client may have been quicker
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


class _Server:
    """Listens, gives each connection a thread, and hands out the steps.

    Args:
        script: The steps, at least one; or one step for all requests.
    """

    def __init__(self, script: Step | Sequence[Step]) -> None:
        self._steps = deque([script] if isinstance(script, Step) else script)
        if not self._steps:
            raise ValueError(f"{type(self).__name__}: script=() is not allowed; give at least one step")
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._requests: list[Request] = []
        self._connections: list[_Connection] = []
        self._threads: list[threading.Thread] = []
        self._errors: list[Exception] = []

    @property
    def requests(self) -> list[Request]:
        """All requests whose headers have come, in this order; the last ones may still be growing."""
        with self._lock:
            return list(self._requests)

    @property
    def connections(self) -> int:
        """How many connections there have been."""
        with self._lock:
            return len(self._connections)

    @property
    def open_connections(self) -> int:
        """How many connections are open, as far as the server knows."""
        with self._lock:
            return sum(connection.open for connection in self._connections)

    def wait_until(self, predicate: Callable[[], object]) -> bool:
        """Wait until something is true, about this server or anything else; False if it never is."""
        end = time.monotonic() + PATIENCE
        while not predicate():
            if time.monotonic() > end:
                return False
            time.sleep(POLL)
        return True

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._wake, self._woken = socket.socketpair()
        self._start(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._wake.close()
        self._threads[0].join(PATIENCE)  # from now on there are no new ones
        for connection in self._connections:
            connection.interrupt()
        for thread in self._threads:
            thread.join(PATIENCE)
        if any(thread.is_alive() for thread in self._threads):
            raise RuntimeError("a step blocks, and goes on after the server has been left")
        if self._errors:
            raise self._errors[0]

    def _start(self, function: Callable[..., object], *args: object) -> None:
        thread = threading.Thread(target=function, args=args, name=f"flaky server {self.port}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        with self._listener, self._woken:
            while self._woken not in select.select([self._listener, self._woken], [], [])[0]:
                try:
                    accepted = self._listener.accept()[0]
                except OSError:  # gone again before it was accepted
                    continue
                accepted.setblocking(True)
                connection = _Connection(accepted, len(self._connections) + 1)
                with self._lock:
                    self._connections.append(connection)
                self._start(self._attend, connection)

    def _attend(self, connection: _Connection) -> None:
        try:
            self._serve(connection)
        except (_Gone, OSError):
            pass
        except Exception as error:
            self._errors.append(error)
        finally:
            connection.close()

    def _serve(self, connection: _Connection) -> None:
        raise NotImplementedError

    def came(self, request: Request) -> None:
        """Remember a request."""
        with self._lock:
            self._requests.append(request)

    def take_early(self) -> Step | None:
        """Return the next step if it is an early one."""
        with self._lock:
            return self.take() if self._steps[0].early else None

    def take(self) -> Step:
        """Return the next step; the last one is never used up."""
        with self._lock:
            return self._steps.popleft() if len(self._steps) > 1 else self._steps[0]

    def pause(self, connection: _Connection, seconds: float) -> None:
        """Wait, unless the server is left or the client has gone."""
        if self._stopping.wait(seconds):
            raise _Gone
        connection.check()


# -- HTTP/1.1 -----------------------------------------------------------------------------------------------------


class FlakyServer(_Server):
    """A server that speaks HTTP/1.1, more or less.

    Args:
        script: The steps, at least one; or one step for all requests.

    Attributes:
        url: `http://127.0.0.1:PORT`.
        port: The port.
        requests: All requests so far; see `Request`.
        connections: How many connections there have been.
        open_connections: How many of them are open.
    """

    def _serve(self, connection: _Connection) -> None:
        exchange = Exchange(self, connection)
        while exchange.keeps_alive():
            connection.await_data()
            first = self.take_early()
            if first is not None:
                exchange.request = None
                first.run(exchange)
                return  # what has come is not looked at
            if not exchange.next_request():
                return
            self.take().run(exchange)


class Exchange:
    """One request and its answer, as a step of `FlakyServer` sees them.

    Attributes:
        request: The request, None in an early step.
        connection: The connection.
    """

    def __init__(self, server: _Server, connection: _Connection) -> None:
        self.request: Request | None = None
        self.connection = connection
        self._server = server
        self._parser = h11.Connection(h11.SERVER)
        self._closing = False

    def next_request(self) -> bool:
        """Read the headers of the next request; False if that is not HTTP, which has been answered."""
        self._parser = h11.Connection(h11.SERVER)
        try:
            event = self._next_event()
        except h11.RemoteProtocolError:
            self.send(_head(400, [("Content-Length", "0"), ("Connection", "close")]))
            return False
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items()]
        self.request = Request(
            event.method.decode(), event.target.decode(), headers, connection=self.connection.number
        )
        self._closing = _closes(self.request.headers)
        self._server.came(self.request)
        return True

    def keeps_alive(self) -> bool:
        """Tell whether there can be another request on this connection."""
        return self.connection.open and not self._closing

    def read(self) -> None:
        """Read the request to its end."""
        request = self.request
        while request is not None and not request.complete:
            event = self._next_event()
            if isinstance(event, h11.Data):
                request.chunks.append(bytes(event.data))
            else:
                request.complete = True

    def respond(self, code: int, body: bytes = b"", headers: Headers = ()) -> None:
        """Read the request to its end and send a proper answer; no body where there must be none."""
        self.read()
        head = self.request is not None and self.request.method == "HEAD"
        bodiless = code in (204, 304)
        pairs = _pairs(headers)
        if not bodiless and not any(name.lower() == "content-length" for name, _ in pairs):
            pairs.append(("Content-Length", str(len(body))))
        self._closing |= _closes(pairs)
        self.send(_head(code, pairs) + (b"" if head or bodiless else body))

    def send_head(self, code: int, headers: Headers = ()) -> None:
        """Read the request to its end and send a status line and exactly these headers."""
        self.read()
        pairs = _pairs(headers)
        self._closing |= _closes(pairs)
        self.send(_head(code, pairs))

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.connection.send(data)

    def drip(self, data: bytes, every: Pace) -> None:
        """Send bytes one by one."""
        for index in range(len(data)):
            self.pause(every)
            self.send(data[index : index + 1])

    def pause(self, every: Pace) -> None:
        """Wait for so many seconds, or until the function says yes."""
        if callable(every):
            while not every():
                self._server.pause(self.connection, POLL)
            return
        end = time.monotonic() + every
        while (left := end - time.monotonic()) > 0:
            self._server.pause(self.connection, min(left, POLL))

    def hang(self, *, read: bool = True) -> None:
        """Wait until the client goes away."""
        if read:
            self.read()
        while True:
            self._server.pause(self.connection, POLL)

    def close(self) -> None:
        """Close the connection; what is unread makes a reset of it."""
        self.connection.close()

    def reset(self) -> None:
        """Read the request to its end, if there is one, and reset the connection."""
        self.read()
        self.connection.reset()

    def _next_event(self) -> Any:
        while (event := self._parser.next_event()) is h11.NEED_DATA:
            self._parser.receive_data(self.connection.receive())
        return event


def _pairs(headers: Headers) -> list[tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers)


def _closes(pairs: list[tuple[str, str]]) -> bool:
    return ("connection", "close") in [(name.lower(), value.lower()) for name, value in pairs]


def _head(code: int, headers: Headers) -> bytes:
    lines = [f"HTTP/1.1 {code} {http.client.responses.get(code, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in _pairs(headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


# -- HTTP/2 -------------------------------------------------------------------------------------------------------


class H2Server(_Server):
    """A server that speaks HTTP/2 without TLS to clients that know (RFC 9113, section 3.3).

    A step begins when its request is complete, `early(step)` when its headers have come. The attributes are those
    of `FlakyServer`.

    Args:
        script: The steps, at least one; or one step for all requests.
    """

    def _serve(self, connection: _Connection) -> None:
        state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="latin-1"))
        state.initiate_connection()
        exchanges: dict[int, H2Exchange] = {}
        while True:
            connection.send(state.data_to_send())
            for event in state.receive_data(connection.receive()):
                self._handle(event, state, connection, exchanges)
                if not connection.open:
                    return

    def _handle(
        self, event: object, state: Any, connection: _Connection, exchanges: "dict[int, H2Exchange]"
    ) -> None:
        if isinstance(event, h2.events.RequestReceived):
            headers = [(str(name), str(value)) for name, value in event.headers]
            pseudo = dict(headers[:4])
            request = Request(pseudo[":method"], pseudo[":path"], headers, connection=connection.number)
            following = self.take()
            exchanges[event.stream_id] = H2Exchange(state, connection, event.stream_id, request, following)
            self.came(request)
            if following.early:
                exchanges[event.stream_id].run()
        elif isinstance(event, h2.events.DataReceived):
            state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            exchanges[event.stream_id].request.chunks.append(event.data)
        elif isinstance(event, h2.events.StreamEnded):
            exchange = exchanges[event.stream_id]
            exchange.request.complete = True
            if not exchange.step.early:
                exchange.run()


class H2Exchange:
    """One request and its answer, as a step of `H2Server` sees them.

    Attributes:
        request: The request.
        stream_id: The number of its stream.
        step: What happens to it.
    """

    def __init__(self, state: Any, connection: _Connection, stream_id: int, request: Request, step: Step) -> None:
        self.request = request
        self.stream_id = stream_id
        self.step = step
        self._state = state
        self._connection = connection
        self._unsent = b""

    def run(self) -> None:
        """Do the step; what it sends leaves in one piece, so that clients see the same in each run."""
        self.step.run(self)
        self._flush()

    def respond(self, code: int, body: bytes = b"", headers: Headers = ()) -> None:
        """Send a proper answer, as long as the window of the client takes it at once."""
        self.send_headers(code, [(name.lower(), value) for name, value in _pairs(headers)])
        self.send_data(body)
        self._state.end_stream(self.stream_id)

    def send_headers(self, code: int, headers: Headers = ()) -> None:
        """Send a status and exactly these headers."""
        self._state.send_headers(self.stream_id, [(":status", str(code)), *_pairs(headers)])

    def send_data(self, data: bytes) -> None:
        """Send a part of the body."""
        size = self._state.max_outbound_frame_size
        for start in range(0, len(data), size):
            self._state.send_data(self.stream_id, data[start : start + size])

    def reset(self, code: int) -> None:
        """Reset the stream."""
        self._state.reset_stream(self.stream_id, code)

    def go_away(self, last_stream_id: int, code: int) -> None:
        """Send GOAWAY. The state machine is not told: it would let no stream go on, which the protocol allows."""
        frame = GoAwayFrame(0, last_stream_id=last_stream_id, error_code=code)
        self._unsent = self._state.data_to_send() + frame.serialize()

    def hang(self, *, read: bool = True) -> None:
        """Do nothing: other streams go on."""
        assert read, "what is never read in HTTP/2 is a window that is never opened, which nobody has needed yet"

    def close(self) -> None:
        """Close the connection."""
        self._flush()
        self._connection.finish()

    def _flush(self) -> None:
        if self._connection.open:
            self._connection.send(self._unsent + self._state.data_to_send())
            self._unsent = b""
