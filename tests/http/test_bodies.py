"""Request bodies: what is sent a second time is the same, byte for byte, and what cannot be is not sent at all.

The stub reads bodies as a server does, keeping nothing. `MockTransport` keeps them, which hides these bugs.
"""

import io
import tempfile

import anyio
import pytest

from resilient import Retry, Timeout
from resilient.http.bodies import IN_MEMORY, ONE_SHOT, examine

from .flaky_server import FlakyServer, early_response, ok, status


class Unseekable(io.BytesIO):
    """A file such as a pipe."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation

    def tell(self):
        raise io.UnsupportedOperation


class Forgetful(io.BytesIO):
    """A file that says it can seek, but does not know where it is."""

    def tell(self):
        raise OSError("telling position disabled")


def chunks():
    yield b"one"
    yield b"two"


async def achunks():
    yield b"one"
    yield b"two"


class Once:
    """An iterable that gives everything the first time and nothing after that: no generator, and no error."""

    def __init__(self, *pieces):
        self._pieces = iter(pieces)

    def __iter__(self):
        return self._pieces


class AsyncOnce:
    """The same for async code."""

    def __init__(self, *pieces):
        self._pieces = list(pieces)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self._pieces:
            return self._pieces.pop(0)
        raise StopAsyncIteration


def mid_file():
    file = io.BytesIO(b"skipped, sent")
    file.seek(9)
    return file


SENT_TWICE = {  # A5: safe to be sent again
    "nothing": ({}, b""),
    "bytes": ({"content": b"body"}, b"body"),
    "text": ({"content": "body"}, b"body"),
    "json": ({"json": {"a": 1}}, b'{"a":1}'),
    "form": ({"data": {"a": "1"}}, b"a=1"),
}
REWOUND = {
    "list": lambda: [b"one", b"two"],
    "tuple": lambda: (b"one", b"two"),
    "file": lambda: io.BytesIO(b"onetwo"),
}
SYNC_ONE_SHOT = {
    "generator": chunks,  # A1
    "iterator": lambda: iter([b"one", b"two"]),  # A2: raises nothing, and is empty the second time
    "map": lambda: map(bytes.upper, [b"one", b"two"]),
    "unseekable file": lambda: Unseekable(b"onetwo"),  # A3
    "forgetful file": lambda: Forgetful(b"onetwo"),
    "object": lambda: Once(b"one", b"two"),
}


@pytest.mark.parametrize("body", SENT_TWICE)
def test_what_is_in_memory_is_sent_again(kit, body):
    """A5, A14: and so are the headers, in the same order."""
    options, expected = SENT_TWICE[body]

    async def scenario():
        stub = kit.stub(503, kit.http.ConnectError("refused"), 200)
        async with kit.client(kit.guard(stub, Retry(wait=0)), headers={"X-Signed": "s"}) as client:
            response = await kit.do(client.request, "PUT", "https://a/p?q=1", **options)
        assert (response.status_code, stub.bodies) == (200, [expected] * 3)
        assert stub.seen[0].wire == stub.seen[1].wire == stub.seen[2].wire

    kit.run(scenario)


@pytest.mark.parametrize("body", REWOUND)
def test_what_can_start_over_is_sent_again(sync_kit, body):
    """A3: a file goes back to where it was."""
    kit = sync_kit

    async def scenario():
        stub = kit.stub(503, 503, 200)
        async with kit.client(kit.guard(stub, Retry(wait=0))) as client:
            response = client.put("https://a/", content=REWOUND[body]())
        assert (response.status_code, stub.bodies) == (200, [b"onetwo"] * 3)

    kit.run(scenario)


def test_a_file_goes_back_to_where_it_stood_and_not_to_its_beginning(sync_kit):
    """A3."""
    kit = sync_kit

    async def scenario():
        stub = kit.stub(503, 200)
        transport = kit.guard(stub, Retry(wait=0))
        await kit.send(transport, kit.request("PUT", content=mid_file()))
        assert stub.bodies == [b"sent"] * 2

    kit.run(scenario)


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("body", SYNC_ONE_SHOT)
def test_what_can_be_read_only_once_is_sent_only_once(sync_kit, body, method):
    """A1, A2, A3: the caller gets the failure itself, not StreamConsumed; and `repeatable` changes nothing."""
    kit = sync_kit

    async def scenario():
        stub = kit.stub(503, 200)
        transport = kit.guard(stub, Retry(wait=0), repeatable={"POST"})
        async with kit.client(transport) as client:
            response = client.request(method, "https://a/", content=SYNC_ONE_SHOT[body]())
        assert (response.status_code, response.content) == (503, b"body")
        assert [text.upper() for text in stub.bodies] == [b"ONETWO"]

    kit.run(scenario)


@pytest.mark.parametrize("make", [achunks, lambda: AsyncOnce(b"one", b"two")], ids=["generator", "object"])
def test_an_async_body_is_sent_only_once(async_kit, make):
    """A1, A2."""
    kit = async_kit

    async def scenario():
        error = kit.http.ReadError("reset")
        stub = kit.stub(error, 200)
        async with kit.client(kit.guard(stub, Retry(wait=0), repeatable=lambda request: True)) as client:
            with pytest.raises(kit.http.ReadError) as caught:
                await client.put("https://a/", content=make())
        assert (caught.value, stub.bodies) == (error, [b"onetwo"])

    kit.run(scenario)


def test_an_async_file_is_sent_only_once(async_kit, tmp_path):
    """It says that it can seek, but to do so would have to be awaited."""
    kit = async_kit
    (tmp_path / "file").write_bytes(b"onetwo")

    async def scenario():
        stub = kit.stub(503, 200)
        async with (
            kit.client(kit.guard(stub, Retry(wait=0))) as client,
            await anyio.open_file(tmp_path / "file", "rb") as file,
        ):
            response = await client.put("https://a/", content=file)
        assert (response.status_code, stub.bodies) == (503, [b"onetwo"])

    kit.run_really(scenario)


def test_a_body_that_never_left_is_not_sent_either(kit):
    """A9 says it could be; but a body that can be read only once is not worth the risk."""

    async def scenario():
        stub = kit.stub(kit.http.ConnectError("refused"), 200)
        content = chunks() if kit.sync else achunks()
        async with kit.client(kit.guard(stub, Retry(wait=0))) as client:
            with pytest.raises(kit.http.ConnectError):
                await kit.do(client.put, "https://a/", content=content)
        assert len(stub.seen) == 1

    kit.run(scenario)


@pytest.mark.parametrize(
    ("file", "attempts"),
    [
        (lambda: b"inside", 2),
        (lambda: io.BytesIO(b"inside"), 2),
        (tempfile.TemporaryFile, 2),
        (lambda: Unseekable(b"inside"), 1),
    ],
    ids=["bytes", "memory", "disk", "pipe"],
)
def test_a_form_is_sent_again_if_each_of_its_files_can_seek(kit, file, attempts):
    """A4: one that cannot gives a well-formed form with an empty part the second time, and a 200."""

    async def scenario():
        stub = kit.stub(503, 200)
        with io.BytesIO(b"other") as other:
            files = {"other": other, "file": file()}
            async with kit.client(kit.guard(stub, Retry(wait=0))) as client:
                response = await kit.do(client.put, "https://a/", files=files, data={"field": "x"})
            getattr(files["file"], "close", int)()
        assert response.status_code == (200 if attempts == 2 else 503)
        assert stub.bodies == [stub.bodies[0]] * attempts

    kit.run(scenario)


def test_a_closed_file_is_no_reason_to_fail(family):
    http, ours = family
    file = io.BytesIO(b"body")
    request = http.Request("PUT", "https://a/", content=file)
    file.close()
    assert examine(ours._FAMILY, request) is ONE_SHOT
    form = http.Request("PUT", "https://a/", files={"file": io.BytesIO(b"body")})
    form.stream.fields[0].file.close()
    assert examine(ours._FAMILY, form) is ONE_SHOT


def test_bodies_of_classes_of_the_user_are_taken_to_be_one_shot(family):
    """Also if they have attributes of the names that the clients use."""
    http, ours = family

    class Upload(http.SyncByteStream):
        def __init__(self, **attributes):
            vars(self).update(attributes)

    for attributes in ({}, {"fields": []}, {"_stream": [b"x"]}, {"_stream": io.BytesIO(b"x")}):
        request = http.Request("PUT", "https://a/", stream=Upload(**attributes))
        assert examine(ours._FAMILY, request) is ONE_SHOT
    assert examine(ours._FAMILY, http.Request("GET", "https://a/")) is IN_MEMORY


def test_nothing_is_read_before_the_transport_reads_it(sync_kit):
    """A6: a body is not loaded in order to be able to send it again."""
    kit = sync_kit
    taken = []

    class Transport:
        def handle_request(self, request):
            assert not taken
            assert b"".join(request.stream) == b"x"
            return kit.http.Response(200)

        def close(self):
            pass

    def body():
        taken.append("x")
        yield b"x"

    async def scenario():
        async with kit.client(kit.guard(Transport(), Retry(), Timeout(5))) as client:
            assert client.post("https://a/", content=body()).status_code == 200
        assert taken == ["x"]

    kit.run(scenario)


@pytest.mark.parametrize("content", [[b"a" * 70_000, b"b"], b"c" * 200_000], ids=["chunks", "bytes"])
def test_bodies_on_the_wire(sync_kit, content):
    """A7: also when the server answers before it has read the body, what is sent again is all of it."""
    kit = sync_kit

    async def scenario():
        with FlakyServer([status(503), early_response(503), ok()]) as server:
            async with kit.client(kit.guard(kit.real(), Retry(wait=0))) as client:
                response = client.put(server.url, content=content)
            whole = b"".join(content) if isinstance(content, list) else content
            assert response.status_code == 200
            assert server.wait_until(lambda: all(request.complete for request in server.requests))
            assert [request.body for request in server.requests] == [whole] * 3
            first = [request.headers for request in server.requests]
            assert first[0] == first[1] == first[2]

    kit.run_really(scenario)


def test_a_file_on_the_wire(sync_kit):
    kit = sync_kit

    async def scenario():
        with FlakyServer([status(503), status(503), ok()]) as server:
            async with kit.client(kit.guard(kit.real(), Retry(wait=0))) as client:
                response = client.put(server.url, content=io.BytesIO(b"f" * 100_000))
            assert response.status_code == 200
            assert [len(request.body) for request in server.requests] == [100_000] * 3

    kit.run_really(scenario)


def test_a_transport_that_sends_again_by_itself_cannot_send_it_empty(kit):
    """A2: httpcore does that where a server of HTTP/2 goes away; not with a body that is used up."""

    async def scenario():
        class Stubborn(type(kit.stub(200))):
            def handle_request(self, request):
                super().handle_request(request)
                return super().handle_request(request)

            async def handle_async_request(self, request):
                await super().handle_async_request(request)
                return await super().handle_async_request(request)

        stub = Stubborn(kit, [200], pool=2)
        content = iter([b"one", b"two"]) if kit.sync else achunks()
        request = kit.request("POST", content=content)
        body = request.stream
        with pytest.raises(kit.http.RemoteProtocolError, match="can be read only once"):
            await kit.send(kit.guard(kit.guard(stub, Retry())), request)  # one in another one
        assert (stub.bodies, request.stream) == ([b"onetwo"], body)
        mock = kit.http.MockTransport(lambda request: kit.http.Response(200, content=request.content))
        request = kit.request("POST", content=iter([b"three"]) if kit.sync else achunks())
        await kit.send(kit.guard(mock), request)
        assert request.content in {b"three", b"onetwo"}  # what the transport has read stays

    kit.run(scenario)


def test_redirects_and_challenges_send_bodies_again_as_without_us(kit):
    """A6: what the client itself sends again is as bare as ever."""

    async def scenario():
        def answer(request):
            if request.url.path == "/old":
                return kit.http.Response(307, headers={"Location": "/new"})
            if "authorization" not in request.headers:
                return kit.http.Response(
                    401, headers={"WWW-Authenticate": 'Digest realm="r", nonce="n", qop="auth"'}
                )
            return 200

        stub = kit.stub(answer)
        auth = kit.http.DigestAuth("me", "secret")
        async with kit.client(kit.guard(stub, Retry(wait=0)), auth=auth, follow_redirects=True) as client:
            response = await kit.do(client.put, "https://a/old", content=b"body")
            assert (response.status_code, stub.bodies) == (200, [b"body"] * len(stub.seen))
            with pytest.raises(kit.http.StreamConsumed):
                await kit.do(client.put, "https://a/old", content=chunks() if kit.sync else achunks())

    kit.run(scenario)
