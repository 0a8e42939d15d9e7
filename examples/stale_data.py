"""A service goes down, and its clients go on with what they know, until it is back."""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

from resilient import Cache, CircuitBreaker, Pipeline, Retry, Timeout
from resilient.httpx import ResilientTransport

rate = 1.08
down = False
asked = []  # what the service was asked


class Rates(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        asked.append(self.path)
        body = b"" if down else json.dumps({"EUR": rate}).encode()
        self.send_response(503 if down else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def running(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


breaker = CircuitBreaker(consecutive=4)
pipeline = Pipeline(Cache(ttl=0, stale=3600), Timeout(2), Retry(2, wait=0.01), breaker)

with running(Rates) as url, httpx.Client(transport=ResilientTransport(pipeline=pipeline), base_url=url) as client:

    def show(when):
        response = client.get("/rates")
        how = response.extensions.get("resilient", {"cache": "from the service"})["cache"]
        print(f"{when}: {response.json()['EUR']} ({how}, asked {len(asked)} times)")
        return response

    show("all is well")
    down, rate = True, 1.09
    for number in range(1, 5):
        response = show(f"outage, request {number}")
        assert response.json() == {"EUR": 1.08}
        assert "Age" in response.headers
    assert len(asked) == 1 + 4  # two attempts for each of the first two; then the circuit was open
    print("the circuit is", breaker.current_state)

    down = False
    breaker.close()  # or wait for its probe
    response = show("back again")
    assert response.json() == {"EUR": 1.09}
    assert "resilient" not in response.extensions
