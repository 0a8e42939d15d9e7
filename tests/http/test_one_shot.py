"""A body that can be read once is never sent empty, not even by httpcore itself."""

import pytest

from resilient import Pipeline, Retry
from resilient.http.bodies import guard, unguard

from .flaky_server import H2Server, h2_goaway, ok


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_httpcore_does_not_send_it_empty_after_a_goaway(package):
    """A61: httpcore itself repeats what no server has looked at, and a used-up iterator raises nothing."""
    httpx = pytest.importorskip(package)
    module = pytest.importorskip(f"resilient.{package}")
    with H2Server([ok(), h2_goaway(1), ok()]) as server:
        inner = httpx.HTTPTransport(http1=False, http2=True, verify=False)
        with httpx.Client(
            transport=module.ResilientTransport(inner, pipeline=Pipeline(Retry(3, wait=0)))
        ) as client:
            assert client.get(server.url).status_code == 200
            with pytest.raises(httpx.RemoteProtocolError, match="can be read only once") as caught:
                client.post(server.url, content=iter([b"a", b"b"]))
            assert caught.value.request.method == "POST"
    posts = [request for request in server.requests if request.method == "POST"]
    assert [request.body for request in posts if request.complete] == [b"ab"], (
        "the server can tell the second is cut"
    )


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_the_body_is_given_back(package):
    httpx = pytest.importorskip(package)
    module = pytest.importorskip(f"resilient.{package}")
    request = httpx.Request("POST", "http://a", content=iter([b"a"]))
    body = request.stream
    seen = []

    class Raw(httpx.BaseTransport):
        def handle_request(self, request):
            seen.append(list(request.stream))
            return httpx.Response(503)

    transport = module.ResilientTransport(Raw(), pipeline=Retry(3, wait=0))
    assert transport.handle_request(request).status_code == 503
    assert seen == [[b"a"]]
    assert request.stream is body
    guard(module._FAMILY, request, asynchronous=False)
    guarded = request.stream
    guard(module._FAMILY, request, asynchronous=False)
    assert request.stream is guarded
    unguard(request)
    unguard(request)
    assert request.stream is body


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
def test_a_policy_in_the_place_of_the_transport(package):
    module = pytest.importorskip(f"resilient.{package}")
    with pytest.raises(TypeError, match="This is a policy: write it as pipeline="):
        module.ResilientTransport(Retry(3))
