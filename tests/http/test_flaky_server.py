"""The flaky servers do what their scripts say, write down what they get, and leave nothing behind."""

import socket
import threading
from functools import partial

import anyio
import h2.connection
import httpx
import httpx2
import pytest

from . import flaky_server
from .flaky_server import (
    FlakyServer,
    H2Server,
    choose,
    chunked,
    chunked_broken,
    close_before_headers,
    close_idle,
    drip,
    drip_headers,
    early,
    early_response,
    extra_bytes,
    garbage_status_line,
    h2_close,
    h2_goaway,
    h2_hang,
    h2_ok,
    h2_refused,
    h2_reset,
    hang,
    hanging_port,
    informational_flood,
    ok,
    raw,
    refused_port,
    reset_before_headers,
    reset_mid_body,
    sse,
    status,
    step,
    truncated,
    wait_for,
)

FAMILIES = pytest.mark.parametrize("family", [httpx, httpx2], ids=["httpx", "httpx2"])
GET = b"GET / HTTP/1.1\r\nHost: test\r\n\r\n"
LONG = 20_000_000  # bytes, more than the buffers of a connection hold


def client_of(server, family=httpx, *, timeout=5.0):
    http2 = isinstance(server, H2Server)
    transport = family.HTTPTransport(verify=False, http1=not http2, http2=http2)
    return family.Client(transport=transport, timeout=timeout, base_url=server.url)


def outcome(family, function):
    """Return the status and the body, or the name and the message of the error."""
    try:
        response = function()
    except family.HTTPError as error:
        return type(error).__name__, f"{error} at {error.request.url}"  # raises if there is no request
    return response.status_code, response.content


def connect(server):
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(10)
    return sock


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flaky server")]


# -- the script, and what is written down ---------------------------------------------------------------------


def test_there_is_one_step_for_each_request_and_the_last_repeats():
    with FlakyServer([status(503), ok(b"a"), ok(b"b")]) as server, client_of(server) as client:
        answers = [client.get("/") for _ in range(4)]
        assert [(answer.status_code, answer.content) for answer in answers] == [
            (503, b""),
            (200, b"a"),
            (200, b"b"),
            (200, b"b"),
        ]
        assert [request.connection for request in server.requests] == [1, 1, 1, 1]
        assert (server.connections, server.open_connections) == (1, 1)
        client.close()
        assert server.wait_until(lambda: server.open_connections == 0)
        assert server.connections == 1


def test_one_step_is_a_script_and_none_is_not():
    with FlakyServer(ok()) as server, client_of(server) as client:
        assert client.get("/").content == b"ok"
    with pytest.raises(ValueError, match="FlakyServer: script="):
        FlakyServer([])


@pytest.mark.parametrize("kind", [FlakyServer, H2Server])
def test_requests_are_written_down_as_they_were_sent(kind):
    with kind(ok()) as server, client_of(server) as client:
        client.post("/a?b=%20", content=bytes(200_000), headers=[("X-One", "1"), ("x-one", "2")])
        client.put("/chunks", content=iter([b"c", b"hunks"]))
        first, second = server.requests
    assert (first.method, first.target, first.body, first.complete) == ("POST", "/a?b=%20", bytes(200_000), True)
    assert [value for name, value in first.headers if name.lower() == "x-one"] == ["1", "2"]
    assert (first.header("X-ONE"), first.header("x-two")) == ("1", None)
    assert (second.method, second.body, second.complete) == ("PUT", b"chunks", True)
    if kind is FlakyServer:
        assert ("X-One", "1") in first.headers
        assert second.header("transfer-encoding") == "chunked"


def test_a_request_that_is_cut_off_stays_incomplete():
    with FlakyServer(ok()) as server:
        with connect(server) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\nhalf")
            assert server.wait_until(lambda: server.requests and server.requests[0].body)
        assert server.wait_until(lambda: server.open_connections == 0)
        assert (server.requests[0].body, server.requests[0].complete) == (b"half", False)


def test_a_step_can_depend_on_the_request():
    with (
        FlakyServer(choose(lambda request: ok() if request.method == "GET" else status(405))) as server,
        client_of(server) as client,
    ):
        assert [client.get("/").status_code, client.post("/").status_code] == [200, 405]


def test_answers_without_a_body_have_none():
    with FlakyServer([ok(b"abc"), status(204, b"abc"), ok()]) as server, client_of(server) as client:
        head = client.head("/")
        assert (head.content, head.headers["Content-Length"]) == (b"", "3")
        assert "Content-Length" not in client.get("/").headers
        assert client.get("/").content == b"ok"
        assert server.connections == 1


@pytest.mark.parametrize(("theirs", "ours"), [("close", "keep-alive"), ("keep-alive", "close")])
def test_either_side_can_give_the_connection_up(theirs, ours):
    with FlakyServer(ok(headers={"Connection": ours})) as server, connect(server) as sock:
        sock.sendall(GET[:-2] + f"Connection: {theirs}\r\n\r\n".encode())
        with sock.makefile("rb") as answer:
            assert answer.read().endswith(b"\r\n\r\nok")


def test_what_is_not_http_is_refused():
    with FlakyServer(ok()) as server, connect(server) as sock:
        sock.sendall(b"spam\r\n\r\n")
        with sock.makefile("rb") as answer:
            assert answer.read().startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert server.requests == []


def test_a_step_shows_how_it_was_made():
    assert str(status(429, retry_after="1")) == "status(429, retry_after='1')"
    assert str(early(hang())) == "early(hang())"


def test_retry_after_is_sent_as_it_is():
    script = [status(503, retry_after=" 1e9"), status(429, retry_after=0)]
    with FlakyServer(script) as server, connect(server) as sock:
        sock.sendall(GET)
        assert b"\r\nRetry-After:  1e9\r\n" in sock.recv(1000)
        sock.sendall(GET)
        assert b"\r\nRetry-After: 0\r\n" in sock.recv(1000)


# -- what clients see -----------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([early(reset_before_headers())], ("ReadError", "reset by peer")),
        ([reset_before_headers()], ("ReadError", "reset by peer")),
        ([close_before_headers()], ("RemoteProtocolError", "without sending a response")),
        ([reset_mid_body()], ("ReadError", "reset by peer")),
        ([truncated()], ("RemoteProtocolError", "received 10 bytes, expected 100")),
        ([garbage_status_line()], ("RemoteProtocolError", "illegal status line")),
        ([informational_flood(100, then=ok(b"at last"))], (200, b"at last")),
        ([drip(b"slow", every=0.001)], (200, b"slow")),
        ([drip_headers(b"slow", every=0.001)], (200, b"slow")),
        ([early_response(503, b"no")], (503, b"no")),
        ([chunked(b"a", b"b")], (200, b"ab")),
        ([chunked(b"a", end="cut")], ("RemoteProtocolError", "incomplete chunked read")),
        ([chunked(b"a", end="reset")], ("ReadError", "reset by peer")),
        ([chunked_broken()], ("RemoteProtocolError", "illegal chunk header")),
        ([sse(["one", "id: 2\ndata: two"])], (200, b"data: one\n\nid: 2\ndata: two\n\n")),
        ([raw(b"HTTP/1.0 200 OK\r\n\r\nto the end")], (200, b"to the end")),
    ],
    ids=str,
)
def test_a_client_meets_what_the_script_says(family, script, expected):
    with FlakyServer(script) as server, client_of(server, family) as client:
        what, detail = outcome(family, partial(client.get, "/"))
        assert what == expected[0]
        assert expected[1] in detail
        assert len(server.requests) == (not script[0].early)


@FAMILIES
def test_a_connection_can_die_between_requests_or_just_as_it_is_reused(family):
    with FlakyServer([close_idle(), ok(), close_before_headers()]) as server, client_of(server, family) as client:
        assert [client.get("/").status_code, client.get("/").status_code] == [200, 200]
        assert [request.connection for request in server.requests] == [1, 2]
        assert outcome(family, partial(client.get, "/"))[0] == "RemoteProtocolError"
        assert [request.connection for request in server.requests] == [1, 2, 2]


def test_an_idle_connection_is_closed_together_with_the_answer():
    with FlakyServer(close_idle(b"end")) as server:
        for _ in range(20):
            with connect(server) as sock:
                sock.sendall(GET)
                assert sock.recv(1000).endswith(b"end")
                sock.setblocking(False)
                assert sock.recv(1000) == b""


@FAMILIES
def test_extra_bytes_are_taken_for_the_next_answer(family):
    forged = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"
    with FlakyServer([extra_bytes(b"a", extra=forged), ok(b"b")]) as server, client_of(server, family) as client:
        assert [client.get("/").content, client.get("/").content] == [b"a", b"no"]
    with FlakyServer([extra_bytes(b"a"), ok(b"b")]) as server, client_of(server, family) as client:
        assert client.get("/").content == b"a"
        assert outcome(family, partial(client.get, "/"))[0] == "RemoteProtocolError"


@FAMILIES
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_early_answer_arrives_if_the_rest_is_drained(family, backend):
    async def main():
        transport = family.AsyncHTTPTransport(verify=False)
        async with family.AsyncClient(transport=transport, timeout=5) as client:
            return (await client.post(server.url, content=bytes(LONG))).status_code

    with FlakyServer(early_response(413)) as server:
        assert anyio.run(main, backend=backend) == 413


def test_an_early_step_is_the_last_of_its_connection():
    with FlakyServer([early(ok(b"a")), ok(b"b")]) as server, client_of(server) as client:
        assert client.get("/").content == b"a"
        assert server.wait_until(lambda: server.open_connections == 0)
        assert client.get("/").content == b"b"
        assert (server.connections, len(server.requests)) == (2, 1)


@FAMILIES
def test_a_body_that_is_not_read_cannot_be_written(family):
    with FlakyServer(hang(read=False)) as server, client_of(server, family, timeout=0.05) as client:
        assert outcome(family, partial(client.post, "/", content=bytes(LONG)))[0] == "WriteTimeout"


def test_what_is_dripped_can_be_paced_by_hand():
    tokens = threading.Semaphore(0)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"
    by_hand = drip(b"abc", every=partial(tokens.acquire, blocking=False))
    with FlakyServer(by_hand) as server, connect(server) as sock:
        sock.sendall(GET)
        received = b""
        while len(received) < len(head):
            received += sock.recv(1000)
        assert received == head
        sock.settimeout(4 * flaky_server.POLL)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(10)
        tokens.release(2)
        assert sock.recv(1) + sock.recv(1) == b"ab"
        tokens.release()
        assert sock.recv(1) == b"c"


def test_an_answer_can_wait_for_the_test():
    event = threading.Event()
    with FlakyServer(wait_for(event, then=status(201))) as server, client_of(server, timeout=0.05) as client:
        assert outcome(httpx, partial(client.get, "/"))[0] == "ReadTimeout"
        event.set()
        assert client.get("/", timeout=5).status_code == 201


@FAMILIES
def test_nobody_listens_on_a_refused_port(family):
    with refused_port() as port, family.HTTPTransport(verify=False) as transport:
        request = family.Request("GET", f"http://127.0.0.1:{port}")
        with pytest.raises(family.ConnectError):
            transport.handle_request(request)


@FAMILIES
def test_connecting_to_a_hanging_port_takes_for_ever(family):
    with hanging_port() as port, family.HTTPTransport(verify=False) as transport:
        request = family.Request("GET", f"http://127.0.0.1:{port}", extensions={"timeout": {"connect": 0.05}})
        for _ in range(2):
            with pytest.raises(family.ConnectTimeout):
                transport.handle_request(request)


# -- HTTP/2 ---------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ([h2_ok(bytes(20_000))], (200, bytes(20_000))),
        ([status(429, retry_after=1)], (429, b"")),
        ([h2_refused()], ("RemoteProtocolError", "error_code:7, remote_reset:True")),
        ([early(h2_refused())], ("RemoteProtocolError", "error_code:7, remote_reset:True")),
        ([h2_reset(8)], ("RemoteProtocolError", "error_code:8, remote_reset:True")),
        ([h2_reset(sent=5)], ("RemoteProtocolError", "error_code:2, remote_reset:True")),
        ([h2_goaway()], ("RemoteProtocolError", "<ConnectionTerminated error_code:0, last_stream_id:1")),
        ([h2_goaway(0, 11)], ("RemoteProtocolError", "<ConnectionTerminated error_code:11, last_stream_id:0")),
        ([h2_goaway(0, then=hang())], ("RemoteProtocolError", "last_stream_id:0")),
        ([h2_goaway(then=ok())], ("LocalProtocolError", "RECV_HEADERS in state ConnectionState.CLOSED")),
        ([h2_close()], ("RemoteProtocolError", "Server disconnected")),
    ],
    ids=str,
)
def test_an_http2_client_meets_what_the_script_says(family, script, expected):
    with H2Server(script) as server, client_of(server, family) as client:
        what, detail = outcome(family, partial(client.post, "/", content=b"body"))
        assert what == expected[0]
        assert expected[1] in detail
        assert len(server.requests) == 1


@FAMILIES
def test_a_client_repeats_by_itself_what_a_goaway_says_was_not_processed(family):
    with H2Server([ok(), h2_goaway(1), ok(b"again")]) as server, client_of(server, family) as client:
        assert [client.post("/").content, client.post("/").content] == [b"ok", b"again"]
        assert [request.connection for request in server.requests] == [1, 1, 2]


@FAMILIES
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_stream_hangs_and_others_go_on(family, backend):
    async def main():
        transport = family.AsyncHTTPTransport(verify=False, http1=False, http2=True)
        async with (
            family.AsyncClient(transport=transport, base_url=server.url, timeout=5) as client,
            anyio.create_task_group() as group,
        ):
            group.start_soon(client.get, "/first")
            await anyio.to_thread.run_sync(server.wait_until, lambda: len(server.requests) == 1)
            assert (await client.get("/second")).content == b"ok"
            group.cancel_scope.cancel()

    with H2Server([h2_hang(), ok()]) as server:
        anyio.run(main, backend=backend)
        assert [request.target for request in server.requests] == ["/first", "/second"]
        assert server.connections == 1


def test_a_connection_is_given_up_without_a_reset(monkeypatch):
    client = h2.connection.H2Connection()
    client.initiate_connection()
    request = {":method": "GET", ":path": "/", ":authority": "test", ":scheme": "http"}
    client.send_headers(1, request.items(), end_stream=True)
    for _ in range(10_000):  # more than the server reads at once
        client.ping(b"are you?")
    with H2Server(h2_close()) as server, connect(server) as sock:
        sock.sendall(client.data_to_send())
        while sock.recv(65536):
            pass
        with monkeypatch.context() as impatient:
            impatient.setattr(flaky_server, "PATIENCE", 4 * flaky_server.POLL)
            assert not server.wait_until(lambda: server.open_connections == 0)
        sock.close()
        assert server.wait_until(lambda: server.open_connections == 0)


# -- the end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "endless",
    [
        hang(),
        hang(read=False),
        early(hang()),
        drip(every=3600),
        drip_headers(every=lambda: False),
        informational_flood(),
        chunked(b"a", end="hang"),
        wait_for(threading.Event()),
    ],
    ids=str,
)
@pytest.mark.parametrize("who", ["client", "server"])
def test_a_step_ends_when_the_client_goes_or_the_server_is_left(endless, who):
    with FlakyServer(endless) as server:
        with connect(server) as sock:
            sock.sendall(GET)
            assert server.wait_until(lambda: server.requests or endless.early)
            if who == "server":
                server.__exit__()
                assert server.open_connections == 0
                assert not threads()
        if who == "client":
            assert server.wait_until(lambda: server.open_connections == 0)
    assert not threads()


@pytest.mark.parametrize("kind", [FlakyServer, H2Server])
def test_idle_connections_end_with_the_server(kind):
    with kind(ok()) as server, connect(server) as sock:
        assert server.wait_until(lambda: server.open_connections == 1)
        server.__exit__()
        while sock.recv(1000):
            pass
    assert not threads()


@pytest.mark.parametrize("kind", [FlakyServer, H2Server])
def test_a_step_that_fails_fails_the_test(kind):
    @step
    def broken(exchange):
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing"), kind(broken()) as server, client_of(server) as client:
        client.get("/")


def test_waiting_in_vain_is_told(monkeypatch):
    monkeypatch.setattr(flaky_server, "PATIENCE", 0.01)
    with FlakyServer(ok()) as server:
        assert not server.wait_until(lambda: server.requests)


def test_a_step_that_blocks_is_told(monkeypatch):
    event = threading.Event()

    @step
    def blocking(exchange):
        event.wait()

    monkeypatch.setattr(flaky_server, "PATIENCE", 0.01)
    with FlakyServer(blocking()) as server, connect(server) as sock:
        sock.sendall(GET)
        while not server.requests:
            pass
        with pytest.raises(RuntimeError, match="a step blocks"):
            server.__exit__()
        event.set()
        monkeypatch.undo()
    assert not threads()
