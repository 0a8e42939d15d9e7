"""Two replicas and a backup: one replica goes down, then the other, and no request of the client fails."""

from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx

from resilient import Pipeline, Retry, Timeout
from resilient.httpx import LoadBalancer, ResilientTransport


class Prices(BaseHTTPRequestHandler):
    def do_GET(self):
        broken = self.server in out_of_order
        body = names[self.server].encode()
        self.send_response(503 if broken else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextmanager
def running(name):
    with ThreadingHTTPServer(("127.0.0.1", 0), Prices) as server:
        names[server] = name
        Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield server
        finally:
            server.shutdown()


def url_of(server):
    return f"http://127.0.0.1:{server.server_port}"


names = {}
out_of_order = set()

with ExitStack() as stack:
    first, second, standby = (stack.enter_context(running(name)) for name in ("first", "second", "standby"))
    replicas = LoadBalancer([url_of(first), url_of(second)], backup=[url_of(standby)], name="prices")
    transport = ResilientTransport(replicas, pipeline=Pipeline(Timeout(5), Retry(3, wait=0)))
    # The client knows one URL. Nobody has to be there: requests go to the replicas.
    client = stack.enter_context(httpx.Client(transport=transport, base_url="http://prices.example"))
    stack.enter_context(replicas.listen(lambda event: print("  ", event.name, getattr(event, "reason", ""))))

    def ask(times):
        answers = [client.get("/") for _ in range(times)]
        assert {answer.status_code for answer in answers} == {200}
        return sorted({answer.text for answer in answers})

    print("all is well:", ask(30))

    out_of_order.add(first)
    print("the first fails:", ask(30))

    out_of_order.add(second)
    print("the second fails too:", ask(30))
    assert ask(10) == ["standby"]

    out_of_order.clear()
    for name, known in replicas.statistics().replicas.items():
        print("  ", name, "backup" if known.backup else "primary", "healthy" if known.healthy else "not healthy")
