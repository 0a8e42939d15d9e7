"""A client of httpx and a server with many troubles: what is tried again, what is not, and what ends it."""

import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

from resilient import CircuitBreaker, CircuitOpen, Pipeline, Retry, RetryBudget, TimedOut, Timeout
from resilient.httpx import ResilientTransport

seen = []  # what the server was asked


class Shop(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        seen.append(f"{self.command} {self.path}")
        if self.path == "/drip":
            self.drip()
            return
        busy = self.path == "/down" or len(seen) % 2  # elsewhere it is each second request that succeeds
        self.send_response(503 if busy else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer  # noqa: N815 - http.server looks for these names

    def drip(self):
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        try:
            for _ in range(100):
                self.wfile.write(b".")
                time.sleep(0.05)
        except ConnectionError:
            pass  # the client has had enough

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


guard = Pipeline(
    Timeout(0.5, name="total"),
    Retry(3, wait=0.01, budget=RetryBudget()),
    CircuitBreaker(consecutive=5, name="shop"),
    Timeout(0.2, name="attempt"),
)

with running(Shop) as url, httpx.Client(transport=ResilientTransport(pipeline=guard), base_url=url) as client:
    response = client.get("/prices")
    print("GET:", response.status_code, "after", seen)
    assert seen == ["GET /prices"] * 2

    seen.clear()
    response = client.post("/orders", json={"item": 1})
    print("POST:", response.status_code, "after", seen, "as it may have been carried out")
    assert (response.status_code, len(seen)) == (503, 1)

    seen.clear()
    response = client.post("/orders", json={"item": 1}, headers={"Idempotency-Key": '"order-1"'})
    print("POST with a key:", response.status_code, "after", seen)
    assert (response.status_code, len(seen)) == (200, 2)

    # A byte each 0.05 s, for five seconds: that is too quick for the timeouts of httpx.
    try:
        client.get("/drip")
    except httpx.TimeoutException as timeout:
        ended_by = timeout
    print("drip:", ended_by)
    assert isinstance(ended_by, TimedOut)

    seen.clear()
    refused = []
    for _ in range(5):
        try:
            print("outage:", client.get("/down").status_code)
        except httpx.TransportError as error:
            print("outage:", error)
            refused.append(type(error))
    print("the server was asked", len(seen), "times")
    assert len(seen) == 5
    assert all(issubclass(each, CircuitOpen) for each in refused)
