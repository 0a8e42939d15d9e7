"""The middleware under real servers, where what is not allowed on the wire comes to light.

`servers.py` has the application, with a pipeline for each path, and says how tests see what happens inside.
"""

import hashlib
import http.client
import re
import socket
from itertools import count
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from .servers import ENDED_BY_SIGTERM, HTTP2, SERVERS, running

LIMIT = 10  # s, before a test gives up; nothing here takes as long if it works
MEGABYTES = bytes(range(256)) * 4096 * 5
INVITES_ALWAYS = {"hypercorn", "hypercorn, trio"}  # by 100 Continue, before the application is asked
LEAVES_STREAMS_OPEN = {"hypercorn", "hypercorn, trio"}  # by HTTP/2, until the connection has been idle for 5 s
ERROR = re.compile(r"^[ |+]*([\w.]+(?:Error|Exception|Group|TimedOut))\b", re.MULTILINE)
EXPECTED = {
    "RuntimeError",
    "ConnectionError",
    "asyncio.exceptions.CancelledError",
    "resilient.errors.TimedOut",
    "TimedOut",
}
numbers = count()


class Site:
    """A running server, asked by one version of HTTP.

    Args:
        server: The server.
        http2: Whether to use HTTP/2, without having been offered it.
    """

    def __init__(self, server, *, http2):
        self.server = server
        self.http2 = http2
        self.mine = f"mine{next(numbers)}"  # what this test calls its events

    def new_client(self):
        address, port = self.server.address
        return httpx.Client(
            base_url=f"http://{address}:{port}",
            params={"mine": self.mine},
            http1=not self.http2,
            http2=self.http2,
            timeout=LIMIT,
            trust_env=False,
            verify=False,  # there is no TLS, and a client that loads certificates takes its time
        )

    def __enter__(self):
        self.client = self.new_client()
        return self

    def __exit__(self, *error):
        self.client.close()

    def get(self, path, **options):
        return self.client.get(path, **options)

    def tell(self, event):
        """Have an event happen that the application waits for."""
        assert self.get(f"/tell/{self.mine} {event}").status_code == 200

    def until(self, event, times=1):
        """Wait until an event has happened in the application."""
        assert self.get(f"/until/{self.mine} {event}/{times}").status_code == 200

    def begun(self, path, params):
        """Return a response that has begun, even if the machine paused for longer than the timeout of its path."""
        while True:
            response = self.client.send(self.client.build_request("GET", path, params=params), stream=True)
            if response.status_code != 503:
                return response
            response.close()

    def is_cut_off(self, response, pieces):
        """Tell whether a response, whose sender has ended, is visibly not whole."""
        left_open = self.http2 and self.server.name in LEAVES_STREAMS_OPEN
        if left_open:
            self.get("/good")  # on the same connection, so whatever there was to come has come
            response.request.extensions["timeout"]["read"] = 0.01
        try:
            for _piece in pieces:
                pass
        except httpx.RemoteProtocolError:
            return True
        except httpx.ReadTimeout:
            return left_open
        return False

    def socket(self):
        return socket.create_connection(self.server.address, timeout=LIMIT)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with running(tmp_path_factory.mktemp("servers")) as servers:
        for server in servers.values():
            server.wait()
        yield servers
        for name, server in servers.items():
            output = server.stop()
            assert set(ERROR.findall(output)) <= EXPECTED, f"{name} has logged an error: {output}"
            assert "<lifespan.shutdown>" in output or name not in ENDED_BY_SIGTERM


@pytest.fixture(params=[*SERVERS, *(f"{name}, HTTP/2" for name in sorted(HTTP2))])
def site(request, servers):
    """A server that is asked by HTTP/1.1 and, where it can, by HTTP/2."""
    name = request.param.removesuffix(", HTTP/2")
    with Site(servers[name], http2=name != request.param) as site:
        yield site


@pytest.fixture(params=SERVERS)
def site1(request, servers):
    """A server that is asked by HTTP/1.1, or by what is not HTTP."""
    with Site(servers[request.param], http2=False) as site:
        yield site


def read_response(connection, method="GET"):
    """Read one response from a socket, and no byte of what comes after it."""
    response = http.client.HTTPResponse(connection, method=method)
    response.begin()
    return response, response.read()


def request_of(method, path, *fields):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: a", *fields, "", ""]).encode()


# -- whole responses ------------------------------------------------------------------------------------------


def test_a_good_response(site):
    response = site.get("/good")
    assert (response.status_code, response.content) == (200, b"good")
    assert response.headers["x-own"] == "yes"
    assert response.headers["ratelimit-policy"] == '"roomy";q=10000;w=60'


def test_a_response_that_the_server_sends_itself(site):
    assert site.get("/file").content == Path(__file__).with_name("servers.py").read_bytes()
    if site.server.name == "granian":
        assert site.get("/until/pathsend/1").status_code == 200


def test_lifespan_reaches_the_application(site1):
    assert site1.get("/until/lifespan.startup/1").text == "1"


def test_refusals_leave_the_connection_usable(site1):
    with site1.socket() as connection:
        connection.sendall(request_of("GET", "/used-up"))
        refused, problem = read_response(connection)
        assert refused.status == 429
        assert refused.headers["content-type"] == "application/problem+json"
        assert refused.headers["ratelimit-policy"] == '"hourly";q=1;w=3600'
        assert refused.headers["ratelimit"].startswith('"hourly";r=0;t=')
        assert 0 < int(refused.headers["retry-after"]) <= 3600
        assert b'"violated-policies": ["hourly"]' in problem

        connection.sendall(request_of("HEAD", "/used-up"))
        headers, nothing = read_response(connection, "HEAD")
        assert (headers.status, headers.headers["content-length"], nothing) == (429, str(len(problem)), b"")

        connection.sendall(request_of("GET", "/nothing"))
        assert read_response(connection)[0].status == 204
        connection.sendall(request_of("GET", "/good"))
        assert read_response(connection)[1] == b"good"


def test_a_refusal_of_head_has_no_body(site):
    problem = site.get("/used-up")
    headers = site.client.head("/used-up")
    assert (problem.status_code, headers.status_code) == (429, 429)
    assert headers.headers["content-length"] == str(len(problem.content))
    assert site.get("/good").content == b"good"


def test_a_failing_response_that_nobody_replaces(site):
    response = site.get("/fails")
    assert (response.status_code, response.content) == (500, b"it failed")
    assert response.headers["x-reason"] == "unknown"


def test_an_error_before_the_response_is_the_servers(site):
    response = site.get("/raises")
    assert response.status_code == 500
    assert b"nobody may read" not in response.content
    assert response.content == site.get("/bare/raises").content
    assert site.get("/good").content == b"good"


# -- bodies of requests ---------------------------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_has_come(site1):
    with site1.socket() as connection:
        connection.sendall(request_of("POST", "/used-up", f"Content-Length: {len(MEGABYTES)}") + MEGABYTES[:1000])
        refused, _problem = read_response(connection)
        assert refused.status == 429
        try:  # the server may close the connection; if it does not, what comes next is the next request
            connection.sendall(MEGABYTES[1000:] + request_of("GET", "/good"))
            assert read_response(connection)[1] == b"good"
        except ConnectionError:
            pass
    assert site1.get("/good").content == b"good"


@pytest.mark.parametrize("site1", sorted(SERVERS.keys() - INVITES_ALWAYS), indirect=True)
def test_nobody_is_invited_to_send_a_body_that_is_refused(site1):
    expecting = (f"Content-Length: {len(MEGABYTES)}", "Expect: 100-continue")
    with site1.socket() as connection:
        connection.sendall(request_of("POST", "/used-up", *expecting))
        assert connection.makefile("rb").readline().split()[1] == b"429"
    with site1.socket() as connection:
        connection.sendall(request_of("POST", f"/upload?mine={site1.mine}", *expecting))
        assert connection.makefile("rb").readline().split()[1] == b"100"


def test_an_upload_streams_through(site):
    def parts():
        yield MEGABYTES[:1000]
        with site.new_client() as other:
            other.get(f"/until/{site.mine} part/1")  # the application has it before the rest is sent
        yield MEGABYTES[1000:]

    response = site.client.post("/upload", content=parts())
    assert response.text == f"{len(MEGABYTES)} {hashlib.sha256(MEGABYTES).hexdigest()}"


def test_another_run_gets_the_same_body(site):
    response = site.client.post("/fails-once", content=b"body", headers={"Idempotency-Key": '"1"'})
    assert (response.status_code, response.content) == (200, b"body")
    site.until("run", 2)


# -- bodies of responses --------------------------------------------------------------------------------------


def test_a_response_comes_in_pieces(site):
    with site.client.stream("GET", "/pieces") as response:
        pieces = response.iter_raw()
        assert next(pieces) == b"one"
        site.tell("two")
        assert next(pieces) == b"two"
        site.tell("end")
        assert list(pieces) == []


@pytest.mark.parametrize(("path", "end"), [("/events", "gone"), ("/watched/events", "ended")])
def test_events_come_until_the_client_goes(site, path, end):
    with site.new_client() as client, client.stream("GET", path) as response:
        assert response.headers["content-type"] == "text/event-stream"
        events = response.iter_raw()
        for number in range(3):
            assert next(events) == b"data: %d\n\n" % number
            site.tell("event")
    site.until(end)


@pytest.mark.parametrize("length", [{}, {"length": "8"}])
def test_an_error_in_the_response_cuts_it_off(site, length):
    with site.client.stream("GET", "/raises-late", params=length) as response:
        pieces = response.iter_raw()
        assert next(pieces) == b"half"
        site.tell("read")
        site.until("raises")
        assert site.is_cut_off(response, pieces)
    assert site.get("/good").content == b"good"


# -- time -----------------------------------------------------------------------------------------------------


def test_a_timeout_before_the_response(site):
    response = site.get("/late")
    assert (response.status_code, response.headers["retry-after"] in {"1", "2"}) == (503, True)
    assert response.headers["content-type"] == "application/problem+json"
    assert site.get("/good").content == b"good"


@pytest.mark.parametrize("length", [{}, {"length": "8"}])
def test_a_timeout_in_the_response_cuts_it_off(site, length):
    response = site.begun("/half", length)
    try:
        pieces = response.iter_raw()
        assert next(pieces) == b"half"
        assert site.get("/late").status_code == 503  # it has the same timeout, and came later
        assert site.is_cut_off(response, pieces)
    finally:
        response.close()
    assert site.get("/good").content == b"good"


def test_background_tasks_outlive_the_timeout(site):
    for task in (1, 2):  # both at the same time
        response = site.begun("/background", {"task": task})
        assert response.read() == b"answered"
    assert site.get("/late").status_code == 503  # it has the same timeout, and came later
    for task in (2, 1):
        site.tell(f"go {task}")
        site.until(f"done {task}")


@pytest.mark.parametrize("path", ["/good-background", "/watched/background"])
def test_background_tasks_end_in_another_order(site, path):
    for task in (1, 2):
        assert site.begun(path, {"task": task}).read() == b"answered"
    for task in (2, 1):
        site.tell(f"go {task}")
        site.until(f"done {task}")


# -- clients that go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, b"body"])
def test_what_runs_for_a_client_that_has_gone_is_cancelled(site, body):
    method = "GET" if body is None else "POST"
    request = {"method": method, "url": "/watched/waits", "params": {"half": "1"}, "content": body}
    with site.new_client() as client, client.stream(**request) as response:
        pieces = response.iter_raw()
        assert next(pieces) == b"half"
        site.until("waits")
        assert site.get("/watched/permits").text == "1"
    site.until("cancelled")
    assert site.get("/watched/permits").text == "0"


def test_a_client_that_goes_before_the_response(site1):
    with site1.socket() as connection:
        connection.sendall(request_of("GET", f"/watched/waits?mine={site1.mine}"))
        site1.until("waits")
    site1.until("cancelled")
    assert site1.get("/watched/permits").text == "0"


# -- the end of a process -------------------------------------------------------------------------------------


def test_a_drain_sends_clients_elsewhere(site):
    response = site.get("/draining/good")
    assert response.content == b"good"
    assert response.headers.get("connection") == (None if site.http2 else "close")
    refused = site.get("/drained/good")
    assert refused.status_code == 503
    assert refused.headers.get("connection") == (None if site.http2 else "close")
    assert site.get("/good").content == b"good"


# -- websockets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/echo", "/watched/echo"])
def test_websockets_pass(site1, path):
    address, port = site1.server.address
    with connect(f"ws://{address}:{port}{path}", proxy=None, open_timeout=LIMIT) as connection:
        for text in ("a", "b"):
            connection.send(text)
            assert connection.recv(LIMIT) == text.upper()
    assert site1.get("/until/websocket closed/1").status_code == 200


def test_a_handshake_is_refused(site1):
    address, port = site1.server.address
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{address}:{port}/refused", proxy=None, open_timeout=LIMIT)
    response = refused.value.response
    assert (response.status_code, response.headers["content-type"]) == (429, "application/problem+json")
    assert b'"status": 429' in response.body
    assert site1.get("/good").content == b"good"


def test_a_handshake_that_takes_too_long_is_refused(site1):
    address, port = site1.server.address
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://{address}:{port}/hurried/late", proxy=None, open_timeout=LIMIT)
    assert refused.value.response.status_code in {403, 503}
    assert site1.get("/good").content == b"good"
