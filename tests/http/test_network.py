"""The sockets of sync clients: each look at the clock, one by one, and what is left alone."""

import socket
import ssl
import sys
import threading

import httpcore
import httpcore2
import pytest

from resilient import Timeout, deadline, runtime
from resilient.deadline import Deadline
from resilient.http.network import _PIECE, _Connection, _Network, keep_deadlines
from resilient.testing import virtual_time

CORES = pytest.mark.parametrize("core", [httpcore, httpcore2], ids=["httpcore", "httpcore2"])
SCOPE = Timeout(5, interrupt=False)


class Recorder:
    """A backend and a connection that write down what they are asked to do, and for how long."""

    def __init__(self, takes=0.0):
        self.calls = []
        self.takes = takes

    def note(self, name, *args, **kwargs):
        self.calls.append((name, args, kwargs))
        runtime.sleep(self.takes)
        return self

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.note(name, *args, **kwargs)


def recorder(core, takes=0.0):
    """Return a recorder that comes from httpcore, as far as one can tell."""
    return type("Recorder", (Recorder,), {"__module__": core.__name__})(takes)


def within(seconds):
    return deadline.published(Deadline(runtime.now() + seconds, SCOPE))


BLOCKING = {
    "connect_tcp": (("a.test", 80), {"local_address": None, "socket_options": [1]}, "ConnectTimeout"),
    "connect_unix_socket": (("/path",), {"socket_options": None}, "ConnectTimeout"),
    "start_tls": (("context", "a.test"), {}, "ConnectTimeout"),
    "read": ((10,), {}, "ReadTimeout"),
    "write": ((b"x",), {}, "WriteTimeout"),
}


def guarded(name, inner):
    return (_Network if name.startswith("connect") else _Connection)(inner)


@CORES
@pytest.mark.parametrize("name", BLOCKING)
@pytest.mark.parametrize(("own", "left"), [(None, 3.0), (9.0, 3.0), (3.0, 3.0), (1.0, 1.0)])
def test_what_may_block_is_given_what_is_left(core, name, own, left):
    """A33: and what it is asked for besides stays as it is."""
    args, kwargs, _ = BLOCKING[name]
    with virtual_time():
        inner = recorder(core)
        with within(3):
            getattr(guarded(name, inner), name)(*args, timeout=own, **kwargs)
        assert inner.calls == [(name, args, {**kwargs, "timeout": left})]


@CORES
@pytest.mark.parametrize("name", BLOCKING)
@pytest.mark.parametrize("own", [None, 9.0])
def test_without_a_deadline_nothing_changes(core, name, own):
    args, kwargs, _ = BLOCKING[name]
    inner = recorder(core)
    getattr(guarded(name, inner), name)(*args, timeout=own, **kwargs)
    assert inner.calls == [(name, args, {**kwargs, "timeout": own})]


@CORES
@pytest.mark.parametrize("name", BLOCKING)
def test_when_the_deadline_has_passed_nothing_begins(core, name):
    """With the error of httpcore, which can reach other requests on the same connection of HTTP/2."""
    args, kwargs, error = BLOCKING[name]
    with virtual_time() as time:
        inner = recorder(core)
        with within(3):
            time.sleep(3)
            with pytest.raises(getattr(core, error), match="the deadline has passed"):
                getattr(guarded(name, inner), name)(*args, timeout=None, **kwargs)
        assert inner.calls == []


def test_a_backend_of_somebody_else():
    """It has no errors of its own: then it is the one of the language."""
    with virtual_time(), within(3):
        inner = Recorder()
        runtime.sleep(4)
        with pytest.raises(TimeoutError):
            _Connection(inner).read(1)
    assert type(inner).__module__.partition(".")[0] in sys.modules


@CORES
def test_connections_are_guarded_too(core):
    inner = recorder(core)
    network = _Network(inner)
    assert isinstance(network.connect_tcp("a.test", 80), _Connection)
    assert isinstance(network.connect_unix_socket("/path"), _Connection)
    assert isinstance(_Connection(inner).start_tls("context", "a.test"), _Connection)
    connection = _Connection(inner)
    connection.close()
    assert connection.get_extra_info("socket") is inner
    assert [name for name, *_ in inner.calls][-2:] == ["close", "get_extra_info"]


@CORES
def test_the_waits_of_httpcores_own_retries(core):
    with virtual_time():
        inner = recorder(core, takes=2)
        with within(3):
            network = _Network(inner)
            network.sleep(9.0)
            network.sleep(0.5)
            with pytest.raises(core.ConnectTimeout):
                network.sleep(0.5)
        network.sleep(9.0)
        assert [args for _, args, _ in inner.calls] == [(3.0,), (0.5,), (9.0,)]


@CORES
def test_long_writes_are_cut_into_pieces(core):
    """A server that reads slowly is looked at between them."""
    with virtual_time():
        inner = recorder(core, takes=1)
        data = bytes(range(256)) * 1024
        with within(2.5), pytest.raises(core.WriteTimeout):
            _Connection(inner).write(data, timeout=2)
        assert [(len(args[0]), kwargs["timeout"]) for _, args, kwargs in inner.calls] == [
            (_PIECE, 2),
            (_PIECE, 1.5),
            (_PIECE, 0.5),
        ]
        inner.calls.clear()
        with within(99):
            _Connection(inner).write(data)
        assert b"".join(args[0] for _, args, _ in inner.calls) == data
        inner.calls.clear()
        with within(9):
            _Connection(inner).write(b"")
        assert inner.calls == []


# -- where it goes --------------------------------------------------------------------------------------------


def test_what_has_sockets_is_guarded_once(family):
    http, ours = family
    for options in ({}, {"proxy": "http://127.0.0.1:1"}, {"proxy": "https://127.0.0.1:1"}, {"uds": "/path"}):
        inner = http.HTTPTransport(verify=False, **options)
        assert keep_deadlines(inner)
        backend = inner._pool._network_backend
        assert isinstance(backend, _Network)
        ours.ResilientTransport(inner)
        assert keep_deadlines(inner)
        assert inner._pool._network_backend is backend
        inner.close()


def test_what_has_none_is_left_alone(family):
    http, ours = family
    for inner in (http.MockTransport(print), http.WSGITransport(print), object()):
        before = dict(getattr(inner, "__dict__", {}))
        assert not keep_deadlines(inner)
        assert getattr(inner, "__dict__", {}) == before
    asynchronous = http.AsyncHTTPTransport(verify=False)
    before = asynchronous._pool._network_backend
    ours.AsyncResilientTransport(asynchronous)
    assert asynchronous._pool._network_backend is before


def test_a_unix_socket(family, tmp_path):
    http, ours = family
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve():
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 204 Fine\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        transport = ours.ResilientTransport(http.HTTPTransport(verify=False, uds=path))
        with http.Client(transport=transport) as client:
            assert client.get("http://a.test/").status_code == 204
        thread.join()


def test_a_handshake_that_takes_its_time(family):
    """The server accepts, and says nothing."""
    http, ours = family
    with socket.create_server(("127.0.0.1", 0)) as listener:
        transport = ours.ResilientTransport(http.HTTPTransport(verify=False), pipeline=Timeout(0.06, name="total"))
        with (
            http.Client(transport=transport, timeout=None) as client,
            pytest.raises(http.TimeoutException) as caught,
        ):
            client.get(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        assert caught.value.policy == "total"


def test_a_handshake_that_fails(family):
    http, ours = family
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with listener.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"this is no TLS")

        thread = threading.Thread(target=serve)
        thread.start()
        transport = ours.ResilientTransport(http.HTTPTransport(verify=False), pipeline=Timeout(9))
        with http.Client(transport=transport) as client, pytest.raises(http.ConnectError) as caught:
            client.get(f"https://127.0.0.1:{listener.getsockname()[1]}/")
        assert isinstance(caught.value.__cause__.args[0], ssl.SSLError)
        thread.join()
