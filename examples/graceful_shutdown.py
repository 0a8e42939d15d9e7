"""A server is told to end while it works on a request. Nobody gets an error.

This file is both: the app, which uvicorn imports, and the client, which starts uvicorn and sends SIGTERM to it.
"""

import asyncio
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from resilient.asgi import Drain, Health, ResilienceMiddleware

# Not ready from SIGTERM on; after a second no new requests; after ten more the server ends whatever goes on.
drain = Drain(grace=1, timeout=10)
health = Health(drain=drain)


@asynccontextmanager
async def lifespan(app):
    with drain.installed():  # from here on SIGTERM comes to us first
        yield


async def report(request):
    await asyncio.sleep(float(request.query_params["seconds"]))
    return PlainTextResponse("the report")


app = Starlette(
    routes=[Route("/report", report)],
    lifespan=lifespan,
    middleware=[Middleware(ResilienceMiddleware, health=health, drain=drain)],
)


def start_server():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    here = Path(__file__)
    command = [sys.executable, "-m", "uvicorn", f"{here.stem}:app", "--app-dir", str(here.parent)]
    server = subprocess.Popen([*command, "--port", str(port), "--log-level", "warning"])  # noqa: S603 - ourselves
    return server, f"http://127.0.0.1:{port}"


def ask_until(client, path, status):
    while True:
        try:
            response = client.get(path)
        except httpx.ConnectError:  # it does not listen yet
            time.sleep(0.02)
            continue
        if response.status_code == status:
            return response
        time.sleep(0.02)


if __name__ == "__main__":
    server, url = start_server()
    with httpx.Client(base_url=url, timeout=20) as client, ThreadPoolExecutor() as pool:
        ask_until(client, "/readyz", 200)
        slow = pool.submit(httpx.get, f"{url}/report?seconds=2")
        time.sleep(0.2)

        server.send_signal(signal.SIGTERM)
        ask_until(client, "/readyz", 503)
        print("SIGTERM: not ready any more, but alive:", client.get("/livez").status_code)
        print("a new request in the grace period:", client.get("/report?seconds=0").status_code)

        refused = ask_until(client, "/report?seconds=0", 503)
        print("after the grace period:", refused.status_code, "connection:", refused.headers["Connection"])
        assert "Retry-After" in refused.headers

        print("the slow one:", slow.result().status_code, slow.result().text)
        print("the server ended:", server.wait() in (0, -signal.SIGTERM))
