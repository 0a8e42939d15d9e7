"""What clients do works with a transport of ours as it does with a bare one."""

import functools
import gzip
import threading

import pytest

from resilient import CircuitBreaker, Fallback, Retry, Timeout

from .flaky_server import FlakyServer, H2Server, choose, chunked, ok, status

# -- what clients do ------------------------------------------------------------------------------------------


def test_authentication(kit):
    """A57: the 401 of a handshake is no failure, and each step is a request of its own."""

    async def scenario():
        def answer(request):
            if "authorization" in request.headers:
                return kit.response(200, headers={"X-Auth": request.headers["authorization"].split()[0]})
            challenge = 'Digest realm="r", nonce="n", qop="auth", algorithm=SHA-256'
            return kit.response(401, headers={"WWW-Authenticate": challenge})

        stub = kit.stub(answer, pool=2)
        breaker = CircuitBreaker(consecutive=1)
        async with kit.client(kit.guard(stub, Retry(wait=0), breaker)) as client:
            basic = await kit.do(client.get, "https://a/", auth=("me", "secret"))
            digest = await kit.do(client.get, "https://a/", auth=kit.http.DigestAuth("me", "secret"))
        assert (basic.headers["X-Auth"], digest.headers["X-Auth"]) == ("Basic", "Digest")
        assert (len(stub.seen), stub.open, breaker.current_state) == (3, 0, "closed")

    kit.run(scenario)


def test_redirects_and_cookies(kit):
    """A34, A58: each hop is a request of its own; cookies of attempts that were retried are lost."""

    async def scenario():
        stub = kit.stub(
            lambda request: kit.response(503, headers={"Set-Cookie": "lost=1"}),
            lambda request: kit.response(302, headers={"Location": "/new", "Set-Cookie": "kept=1"}),
            503,
            lambda request: kit.response(200, headers=[("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]),
        )
        transport = kit.guard(stub, Timeout(60), Retry(2, wait=1), Timeout(5))
        async with kit.client(transport, follow_redirects=True, timeout=20) as client:
            response = await kit.do(client.get, "https://a/old")
            cookies = dict(client.cookies)
        assert (response.status_code, response.url.path) == (200, "/new")
        assert [hop.status_code for hop in response.history] == [302]
        assert cookies == {"kept": "1", "a": "1", "b": "2"}
        assert stub.seen[3].request.headers["Cookie"] == "kept=1"
        assert [seen.timeouts["read"] for seen in stub.seen] == [5.0] * 4
        assert response.request.extensions["timeout"]["read"] == 20

    kit.run(scenario)


def test_hooks_run_once_for_each_request_of_the_client(kit):
    """A59."""
    calls = []

    async def scenario():
        def note(what):
            def hook(_message):
                calls.append(what)

            async def ahook(_message):
                calls.append(what)

            return hook if kit.sync else ahook

        stub = kit.stub(503, 503, 200)
        hooks = {"request": [note("request")], "response": [note("response")]}
        async with kit.client(kit.guard(stub, Retry(wait=0)), event_hooks=hooks) as client:
            await kit.do(client.get, "https://a/")
        assert (calls, len(stub.seen)) == (["request", "response"], 3)
        calls.clear()

    kit.run(scenario)


def test_apps(kit):
    """`ASGITransport` and `WSGITransport`, which keep no timeouts (A36)."""

    def wsgi(environ, start_response):
        body = environ["wsgi.input"].read()
        start_response("200 OK", [("Content-Type", "text/plain"), ("X-Path", environ["PATH_INFO"])])
        return [body, b"!"]

    async def asgi(scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        headers = [(b"content-type", b"text/plain"), (b"x-path", scope["path"].encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"!"})

    async def scenario():
        inner = kit.http.WSGITransport(app=wsgi) if kit.sync else kit.http.ASGITransport(app=asgi)
        async with kit.client(kit.guard(inner, Timeout(5), Retry(), Timeout(2)), base_url="https://a") as client:
            response = await kit.do(client.post, "/path", content=b"body")
        assert (response.text, response.headers["X-Path"]) == ("body!", "/path")

    kit.run(scenario)


def test_what_was_answered_is_handed_on_as_it_is(kit):
    """A19, A24, A25, A27, A30: headers in order and case, extensions, and a time that covers all attempts."""

    async def scenario():
        headers = [(b"X-ONE", b"1"), (b"Set-Cookie", b"a=1"), (b"x-two", b"\xff"), (b"Set-Cookie", b"b=2")]
        extensions = {"http_version": b"HTTP/2", "reason_phrase": b"Fine", "stream_id": 3, "own": object()}
        answer = kit.response(200, b"one", b"two", headers=headers, extensions=extensions)
        stub = kit.stub(503, answer)
        async with kit.client(kit.guard(stub, Retry(wait=3))) as client:
            response = await kit.do(client.send, client.build_request("GET", "https://a/"), stream=True)
            assert response is answer
            assert response.headers.raw == headers
            assert response.extensions == extensions
            assert (response.http_version, response.reason_phrase) == ("HTTP/2", "Fine")
            with pytest.raises(RuntimeError):
                _ = response.elapsed
            read = await kit.chunks(response.iter_raw() if kit.sync else response.aiter_raw())
            await kit.close(response)
            assert read == [b"one", b"two"]
            assert response.elapsed.total_seconds() >= 0
            assert response.request.url == "https://a/"

    kit.run(scenario)


def test_what_was_asked_is_handed_on_as_it_is(kit):
    """A14, A65, A66: each attempt gets all extensions, and the request is the same afterwards."""

    async def scenario():
        trace = lambda name, info: None  # noqa: E731
        own = {"trace": trace, "sni_hostname": "b", "target": b"*", "timeout": {"read": 9.0}}
        stub = kit.stub(503, kit.http.ReadError("reset"), 200)
        request = kit.request(headers=[("b", "1"), ("A", "2"), ("b", "3")], extensions=own)
        before = dict(own), request.headers.raw
        await kit.send(kit.guard(stub, Timeout(5), Retry(wait=1), Timeout(2)), request)
        for seen, left in zip(stub.seen, (2.0, 2.0, 2.0), strict=True):
            assert seen.timeouts == kit.capped(left)
            assert [seen.extensions[name] for name in ("trace", "sni_hostname", "target")] == [trace, "b", b"*"]
        assert (request.extensions, request.headers.raw) == before
        assert request.extensions["timeout"] is own["timeout"]

    kit.run(scenario)


# -- answers that did not come from the transport -------------------------------------------------------------


def test_one_response_can_answer_many_requests(kit):
    """A43: each gets an object of its own, as clients write into it. What failed is closed."""

    async def scenario():
        raw = [(b"X-One", b"1"), (b"Content-Length", b"7")]
        answer = kit.http.Response(203, headers=raw, content=b"instead", extensions={"own": 1})
        stub = kit.stub(500)
        async with kit.client(kit.guard(stub, Fallback(answer))) as client:
            one, two = [await kit.do(client.get, f"https://a/{number}") for number in (1, 2)]
        assert one is not two
        assert (one.request.url.path, two.request.url.path) == ("/1", "/2")
        for response in (one, two):
            assert (response.status_code, response.content, response.headers.raw) == (203, b"instead", raw)
            assert response.extensions == {"own": 1}
        assert stub.open == 0

    kit.run(scenario)


def test_a_response_that_was_read_elsewhere_can_answer_too(kit):
    async def scenario():
        headers = {"Content-Encoding": "gzip", "X-One": "1", "Content-Type": "text/plain"}
        packed = gzip.compress(b"older")
        async with kit.client(kit.stub(kit.response(200, packed, headers=headers))) as client:
            saved = await kit.do(client.get, "https://backup/")
        async with kit.client(kit.guard(kit.stub(500), Fallback(saved))) as client:
            for _ in range(2):
                response = await kit.do(client.get, "https://a/")
                assert (response.text, response.headers["X-One"]) == ("older", "1")
                assert "content-encoding" not in response.headers
                assert response.headers["Content-Length"] == "5"
                assert response.request.url == "https://a/"
        assert saved.request.url == "https://backup/"

    kit.run(scenario)


def test_a_fallback_can_send_the_request_elsewhere(kit):
    async def scenario():
        stub, backup = kit.stub(kit.http.ConnectError("refused")), kit.stub(kit.response(200, b"one", b"two"))
        send = functools.partial(backup.handle_request if kit.sync else backup.handle_async_request)
        async with kit.client(kit.guard(stub, Fallback(send))) as client:
            request = client.build_request("GET", "https://a/")
            response = await kit.do(client.send, request, stream=True)
            assert backup.made[0].read == 0
            assert await kit.read(response) == b"onetwo"
        assert backup.open == 0

    kit.run(scenario)


def test_an_answer_that_is_no_response_is_refused(kit):
    async def scenario():
        stub = kit.stub(500)
        with pytest.raises(TypeError, match=r"answered 'nothing' instead of a response; fallbacks have to return"):
            await kit.send(kit.guard(stub, Fallback("nothing")), kit.request())
        assert stub.open == 0

    kit.run(scenario)


# -- with real sockets ----------------------------------------------------------------------------------------


def test_streaming_both_ways(kit):
    """A26: neither body is loaded, with all policies of the preset around it."""

    async def scenario():
        received = threading.Event()
        step = chunked(b"one", b"two", every=received.is_set)
        with FlakyServer([step]) as server:
            pieces = [b"a" * 100_000, b"b"]

            def body():
                yield from pieces

            async def abody():
                for piece in pieces:
                    yield piece

            async with kit.client(kit.Transport(kit.real())) as client:
                request = client.build_request("POST", server.url, content=body() if kit.sync else abody())
                response = await kit.do(client.send, request, stream=True)
                received.set()  # the headers were here before the first chunk was sent
                iterator = response.iter_raw() if kit.sync else response.aiter_raw()
                assert b"".join(await kit.chunks(iterator)) == b"onetwo"
            assert server.requests[0].body == b"".join(pieces)
            assert server.requests[0].header("transfer-encoding") == "chunked"

    kit.run_really(scenario)


def test_http2(kit):
    async def scenario():
        with H2Server([status(503), ok(b"done")]) as server:
            inner = kit.real(http1=False, http2=True)
            async with kit.client(kit.Transport(inner)) as client:
                response = await kit.do(client.get, server.url)
            assert (response.http_version, response.content, server.connections) == ("HTTP/2", b"done", 1)

    kit.run_really(scenario)


def test_a_proxy(kit):
    """Plain HTTP through a proxy: it gets the whole URL."""

    async def scenario():
        with FlakyServer([status(502), ok()]) as proxy:
            inner = kit.real(proxy=proxy.url)
            async with kit.client(kit.guard(inner, Timeout(5), Retry(wait=0), Timeout(2))) as client:
                response = await kit.do(client.get, "http://a.test/path")
            assert response.status_code == 200
            assert [request.target for request in proxy.requests] == ["http://a.test/path"] * 2

    kit.run_really(scenario)


def test_mounts(kit):
    async def scenario():
        with FlakyServer(choose(lambda request: ok(request.header("Host").encode()))) as server:
            one, two = kit.Transport(kit.real()), kit.guard(kit.stub(503), Retry(2, wait=0))
            async with kit.client(one, mounts={"all://b.test": two}) as client:
                assert (await kit.do(client.get, server.url)).status_code == 200
                assert (await kit.do(client.get, "http://b.test/")).status_code == 503

    kit.run_really(scenario)
