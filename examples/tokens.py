"""Twenty threads, one token: it is asked for once, again when it was revoked, and again before it expires."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

from resilient.httpx import ResilientTransport, TokenAuth

life = 3600  # for how many seconds a token is good
issued = []  # the tokens, oldest first; only the newest is good
refused = []  # requests that were answered with 401


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/token":
            time.sleep(0.05)  # token endpoints take their time
            issued.append(f"token-{1 + len(issued)}")
            self.reply(200, {"access_token": issued[-1], "token_type": "Bearer", "expires_in": life})
        elif self.headers["Authorization"] == f"Bearer {issued[-1]}":
            self.reply(200, {"token": issued[-1]})
        else:
            refused.append(self.path)
            self.reply(401, {})

    do_GET = do_POST = answer  # noqa: N815 - http.server looks for these names

    def reply(self, status, fields):
        body = json.dumps(fields).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
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


with running(Service) as url, ThreadPoolExecutor(20) as threads:
    secret = "s3cret"  # noqa: S105 - made up
    auth = TokenAuth.client_credentials(f"{url}/token", client_id="shop", client_secret=secret)
    with httpx.Client(transport=ResilientTransport(), auth=auth, base_url=url) as client:

        def tokens_of_twenty_requests():
            responses = list(threads.map(client.get, [f"/orders/{number}" for number in range(20)]))
            assert {response.status_code for response in responses} == {200}
            return {response.json()["token"] for response in responses}

        print("twenty requests:", tokens_of_twenty_requests())
        assert issued == ["token-1"]

        issued.append("token-2")  # somebody else has got one, and ours is good no more
        print("it was revoked:", tokens_of_twenty_requests(), "after", len(refused), "refusals")
        assert issued == ["token-1", "token-2", "token-3"]
        assert 1 <= len(refused) <= 20

        life = 1
        issued.append("token-4")
        print("revoked again:", client.post("/orders", json={"item": 1}).json()["token"])

        refused.clear()
        time.sleep(0.6)  # more than half of its life
        print("before it expires:", client.get("/orders").json()["token"], "after", len(refused), "refusals")
        assert issued[4:] == ["token-5", "token-6"]
        assert refused == []
