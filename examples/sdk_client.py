"""An SDK that takes `http_client=`: why its own retries have to be off.

The SDK below is made up, but does what those of OpenAI and Anthropic do. What to write for these is in
docs/http/sdk-clients.md.
"""

import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx2

from resilient import CircuitOpen
from resilient.httpx2 import install
from resilient.presets import http_client


class APIError(Exception):
    """The one error of the SDK."""


class SDK:
    """Asks a model.

    Args:
        base_url: Where it is.
        http_client: What to ask with.
        max_retries: How often to ask again.
    """

    def __init__(self, base_url, *, http_client, max_retries=2):
        self.base_url = base_url
        self.http_client = http_client
        self.max_retries = max_retries

    def ask(self, question):
        error = None
        for _ in range(1 + self.max_retries):
            try:
                response = self.http_client.post(f"{self.base_url}/v1/messages", json={"question": question})
                response.raise_for_status()
                return response.json()["answer"]
            except httpx2.HTTPError as caught:
                error = caught
        raise APIError(str(error)) from error


failures = 0  # how many requests are still to fail
asked = []  # what the model was asked


class Model(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        global failures  # noqa: PLW0603 - one server
        asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["question"])
        failures -= 1
        body = b'{"answer": 42}'
        self.send_response(503 if failures >= 0 else 200)
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


with running(Model) as url, httpx2.Client(timeout=600) as client:
    pipeline = http_client(timeout=600, attempt_timeout=120)
    # A question is a POST, which is not repeated unless it is named.
    installation = install(client, pipeline, repeatable={"POST"}, buffer=True)

    failures = 2
    answer = SDK(url, http_client=client, max_retries=0).ask("what?")
    print("two failures, no retries in the SDK:", answer, "after", len(asked), "requests")
    assert (answer, len(asked)) == (42, 3)

    for max_retries, expected in ((0, 3), (2, 9)):
        asked.clear()
        failures = 100
        try:
            SDK(url, http_client=client, max_retries=max_retries).ask("what?")
        except APIError:
            print(f"an outage, max_retries={max_retries}:", len(asked), "requests")
        assert len(asked) == expected

    installation.uninstall()
    pipeline = http_client(timeout=600, attempt_timeout=120, attempts=1)
    with install(client, pipeline):
        pipeline.policies[2].isolate()  # the circuit breaker
        cause = None
        try:
            SDK(url, http_client=client, max_retries=0).ask("what?")
        except APIError as error:
            print("an open circuit:", error)
            cause = error.__cause__
        assert isinstance(cause, CircuitOpen)
