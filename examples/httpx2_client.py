"""Fifty requests at once, async and with httpx2, to a server that rations and breaks its connections."""

import asyncio
import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread

import httpx2

from resilient.events import RetryScheduled
from resilient.httpx2 import AsyncResilientTransport
from resilient.presets import http_client


class Load:
    """How many requests have come, and how many there were at once."""

    def __init__(self):
        self.lock = Lock()
        self.requests = self.running = self.most = 0

    def __enter__(self):
        with self.lock:
            self.requests += 1
            self.running += 1
            self.most = max(self.most, self.running)
            return self.requests

    def __exit__(self, *_):
        with self.lock:
            self.running -= 1


load = Load()


class Catalogue(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        with load as number:
            time.sleep(0.01)
        body = json.dumps({"path": self.path}).encode()
        if number % 20 == 0:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            body = b""
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if number % 15 == 0:
            self.wfile.write(body[:5])  # the headers were fine, and then this
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 50  # or new connections would have to wait a second


@contextmanager
def running(handler):
    with Server(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


async def fetch_all(url):
    pipeline = http_client(timeout=5, attempt_timeout=2, concurrency=8)
    # With buffer=True the body is read as part of the attempt, so that one that breaks off is tried again.
    transport = AsyncResilientTransport(pipeline=pipeline, buffer=True)
    retries = []
    async with httpx2.AsyncClient(transport=transport, base_url=url) as client:
        with pipeline.listen(lambda event: retries.append(event) if isinstance(event, RetryScheduled) else None):
            responses = await asyncio.gather(*(client.get(f"/items/{number}") for number in range(50)))
    print(len(responses), "answers after", load.requests, "requests, at most", load.most, "at once")
    print("tried again:", sorted({event.error for event in retries}))
    assert [response.json()["path"] for response in responses] == [f"/items/{number}" for number in range(50)]
    assert load.requests == 50 + len(retries)
    assert load.most <= 8


with running(Catalogue) as url:
    asyncio.run(fetch_all(url))
