"""The server of the demo: a small catalogue that follows the script, and counts the requests that reach it.

It runs as a process of its own, `python -m resilient.demo.server PORT SECONDS SEED`. The first line that it
prints is a JSON document: the port it listens on, or why it cannot. It ends when its standard input does, which
the system closes however the demo ends, so it cannot be left behind.

Both clients are served by the same process at the same time: they meet the same phases on the same machine, and
a request that hangs here costs no more than a sleeping task, so neither can slow the other down.
"""

import asyncio
import json
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Sequence

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from resilient import runtime
from resilient.demo.script import ERROR_RATE, PHASES, Script

CLIENT_HEADER = "x-demo-client"
SERVICE_TIME = 0.005, 0.015
"""The least and the most seconds that a good answer takes."""


class Catalogue:
    """The application.

    Args:
        script: What happens when; it starts with `POST /start`.
        seed: Seed of the errors. Both clients meet the same sequence of them.
    """

    def __init__(self, script: Script, seed: int) -> None:
        self._script = script
        self._seed = seed
        self._started = runtime.now()
        self._hits: dict[str, dict[str, int]] = {}
        self._luck: dict[str, random.Random] = {}

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/start", self.start, methods=["POST"]),
                Route("/hits", self.hits),
                Route("/products/{product:int}", self.product),
            ]
        )

    async def start(self, request: Request) -> Response:
        """Begin the script and count from zero."""
        self._hits.clear()
        self._luck.clear()
        self._started = runtime.now()
        return Response(status_code=204)

    async def hits(self, request: Request) -> Response:
        """Tell how many requests have reached the products, by client and phase."""
        return JSONResponse(self._hits)

    async def product(self, request: Request) -> Response:
        """Answer as the script says."""
        client = request.headers.get(CLIENT_HEADER, "unknown")
        elapsed = runtime.now() - self._started
        phase = self._script.phase_at(elapsed)
        self._hits.setdefault(client, dict.fromkeys(PHASES, 0))[phase] += 1
        luck = self._luck.setdefault(client, random.Random(self._seed))
        if phase == "hang":  # the outage that ends it takes along what was still hanging
            await asyncio.sleep(self._script.ends["hang"] - elapsed)
            return Response(status_code=503)
        if phase == "outage" or (phase == "errors" and luck.random() < ERROR_RATE):
            return Response(status_code=503)
        await asyncio.sleep(luck.uniform(*SERVICE_TIME))
        return JSONResponse({"product": request.path_params["product"]})


def main(arguments: Sequence[str]) -> int:
    """Serve until the standard input ends; return the exit code."""
    port, seconds, seed = int(arguments[0]), float(arguments[1]), int(arguments[2])
    try:
        listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    except OSError as error:
        why = f"cannot listen on port {port} ({os.strerror(error.errno or 0)}); leave --port out for a free one"
        print(json.dumps({"error": why}), flush=True)
        return 2
    # asyncio does this only for sockets that know their protocol; without it, each answer takes 40 ms more.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(
        Catalogue(Script(seconds), seed).app(),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        timeout_keep_alive=60,  # longer than a silence of the guarded client
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = server.force_exit = True

    threading.Thread(target=call_at_end_of_input, args=(stop,), daemon=True).start()
    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    asyncio.run(server.serve([listening]))
    return 0


def call_at_end_of_input(stop: Callable[[], None]) -> None:
    """Wait until nobody holds the other end of the standard input any more."""
    sys.stdin.buffer.read()
    stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
