"""An application that has a guard for every path, and the real servers that run it.

`app` is served by a process of its own. Tests talk to it by requests, and see what goes on inside by requests
too: `/tell/x` counts an event, `/until/x/2` is answered when it has been counted twice. So nobody has to sleep,
and nothing depends on how fast the machine is.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import parse_qs

import anyio

from resilient import Bulkhead, CircuitBreaker, Fallback, Pipeline, RateLimit, Retry, Timeout
from resilient.asgi import ResilienceMiddleware
from resilient.asgi.drain import Drain

SERVERS = {
    "uvicorn, h11": ["uvicorn", "servers:app", "--http", "h11", "--lifespan", "on", "--port", "{port}"],
    "uvicorn, httptools": [
        "uvicorn",
        "servers:app",
        "--http",
        "httptools",
        "--lifespan",
        "on",
        "--port",
        "{port}",
    ],
    "hypercorn": ["hypercorn", "servers:app", "--workers", "0", "--bind", "127.0.0.1:{port}"],
    "hypercorn, trio": ["hypercorn", "servers:app", "-k", "trio", "--workers", "0", "--bind", "127.0.0.1:{port}"],
    "granian": ["granian", "servers:app", "--interface", "asgi", "--port", "{port}"],
}
HTTP2 = {"hypercorn", "hypercorn, trio", "granian"}
ENDED_BY_SIGTERM = SERVERS.keys() - {"hypercorn, trio"}  # which is killed by it, as it handles nothing but SIGINT

SOURCE = Path(__file__).read_bytes()

# -- the application ------------------------------------------------------------------------------------------

happened = Counter()
waiting = set()


def tell(event):
    happened[event] += 1
    for changed in waiting:
        changed.set()
    waiting.clear()


async def until(event, times=1):
    while happened[event] < times:
        changed = anyio.Event()
        waiting.add(changed)
        await changed.wait()


async def start(send, status=200, *headers):
    await send({"type": "http.response.start", "status": status, "headers": [(b"x-own", b"yes"), *headers]})


async def body(send, content=b"", *, more=False):
    await send({"type": "http.response.body", "body": content, "more_body": more})


async def answer(send, content, status=200):
    await start(send, status, (b"content-length", b"%d" % len(content)))
    await body(send, content)


async def parts_of(receive):
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client has gone")
        yield message["body"]
        if not message.get("more_body"):
            return


async def good(scope, receive, send, mine):
    await answer(send, b"good")


async def nothing(scope, receive, send, mine):
    await start(send, 204)
    await body(send)


async def file(scope, receive, send, mine):
    """Answer with this file, which some servers send themselves."""
    await start(send)
    if "http.response.pathsend" in scope.get("extensions", {}):
        tell("pathsend")
        await send({"type": "http.response.pathsend", "path": __file__})
    else:
        await body(send, SOURCE)


async def pieces(scope, receive, send, mine):
    await start(send)
    await body(send, b"one", more=True)
    await until(f"{mine} two")
    await body(send, b"two", more=True)
    await until(f"{mine} end")
    await body(send)


async def events(scope, receive, send, mine):
    """Send events until the client goes, in the way of frameworks: one task sends, the other one listens."""

    async def listen():
        while (await receive())["type"] != "http.disconnect":
            pass
        tell(f"{mine} gone")
        group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            await start(send, 200, (b"content-type", b"text/event-stream"))
            for number in count():
                await body(send, b"data: %d\n\n" % number, more=True)
                await until(f"{mine} event", number + 1)
    finally:
        tell(f"{mine} ended")


async def upload(scope, receive, send, mine):
    size, digest = 0, hashlib.sha256()
    async for part in parts_of(receive):
        size += len(part)
        digest.update(part)
        tell(f"{mine} part")
    await answer(send, b"%d %s" % (size, digest.hexdigest().encode()))


async def raises(scope, receive, send, mine):
    raise RuntimeError("what nobody may read")


async def raises_late(scope, receive, send, mine):
    await start(send, 200, *length_of(scope))
    await body(send, b"half", more=True)
    await until(f"{mine} read")
    tell(f"{mine} raises")
    raise RuntimeError("what nobody may read")


async def late(scope, receive, send, mine):
    await anyio.sleep_forever()


async def half(scope, receive, send, mine):
    await start(send, 200, *length_of(scope))
    await body(send, b"half", more=True)
    await anyio.sleep_forever()


async def background(scope, receive, send, mine):
    task = parse_qs(scope["query_string"].decode())["task"][0]
    await answer(send, b"answered")
    await until(f"{mine} go {task}")
    tell(f"{mine} done {task}")


async def fails(scope, receive, send, mine):
    await start(send, 500, (b"x-reason", b"unknown"))
    await body(send, b"it ", more=True)
    await body(send, b"failed")


async def fails_once(scope, receive, send, mine):
    content = b"".join([part async for part in parts_of(receive)])
    tell(f"{mine} run")
    await answer(send, content, 503 if happened[f"{mine} run"] == 1 else 200)


async def unreachable(scope, receive, send, mine):
    raise ConnectionError("what nobody may read")


async def waits(scope, receive, send, mine):
    """Read the request, begin to answer if asked to, and wait for ever."""
    try:
        if scope["method"] == "POST":
            async for _part in parts_of(receive):
                pass
        if "half" in parse_qs(scope["query_string"].decode()):
            await start(send)
            await body(send, b"half", more=True)
        tell(f"{mine} waits")
        await anyio.sleep_forever()
    except BaseException:
        tell(f"{mine} cancelled")
        raise


async def permits(scope, receive, send, mine):
    await answer(send, b"%d" % watched.statistics().in_use)


async def told(scope, receive, send, mine):
    _, _, event, *times = scope["path"].split("/")
    if times:
        await until(event, int(times[0]))
    else:
        tell(event)
    await answer(send, b"%d" % happened[event])


def length_of(scope):
    return [(b"content-length", b"8")] if "length" in parse_qs(scope["query_string"].decode()) else []


async def websocket(scope, receive, send):
    await receive()
    if scope["path"].endswith("/late"):
        await anyio.sleep_forever()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"].upper()})
    tell("websocket closed")


async def lifespan(scope, receive, send):
    while True:
        message = await receive()
        tell(message["type"])
        print(f"<{message['type']}>", flush=True)  # noqa: T201 - nobody can ask by a request any more
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


PATHS = {
    "/good": good,
    "/nothing": nothing,
    "/used-up": upload,
    "/file": file,
    "/pieces": pieces,
    "/events": events,
    "/upload": upload,
    "/raises": raises,
    "/raises-late": raises_late,
    "/late": late,
    "/half": half,
    "/background": background,
    "/good-background": background,
    "/fails": fails,
    "/fails-once": fails_once,
    "/unreachable": unreachable,
    "/watched/background": background,
    "/watched/events": events,
    "/watched/waits": waits,
    "/watched/permits": permits,
    "/draining/good": good,
    "/drained/good": good,
}


async def bare(scope, receive, send):
    if scope["type"] == "lifespan":
        await lifespan(scope, receive, send)
    elif scope["type"] == "websocket":
        await websocket(scope, receive, send)
    else:
        mine = parse_qs(scope["query_string"].decode()).get("mine", [""])[0]
        await PATHS.get(scope["path"].removeprefix("/bare"), told)(scope, receive, send, mine)


# -- its guards -----------------------------------------------------------------------------------------------


def everything():
    return Pipeline(
        RateLimit("10000/minute", name="roomy"),
        Fallback(answer, on=ZeroDivisionError),
        Timeout(60),
        Bulkhead(100, queue=100),
        CircuitBreaker(),
        Retry(wait=0.001),
    )


def used_up():
    limit = RateLimit("1/hour", name="hourly")
    limit.call(int)
    return limit


def draining(**options):
    drain = Drain(**options)
    drain.begin()
    return drain


soon = Timeout(0.2)
watched = Bulkhead(100)
guarded = ResilienceMiddleware(
    bare,
    pipeline=Pipeline(),
    routes={
        **{path: everything() for path in PATHS},
        "/used-up": used_up(),
        "/late": soon,
        "/half": soon,
        "/background": soon,
    },
)
APPS = {
    "bare": bare,
    "watched": ResilienceMiddleware(
        bare,
        pipeline=everything(),
        routes={"/watched/waits": watched},
        websockets=Bulkhead(100),
        cancel_on_disconnect=True,
    ),
    "refused": ResilienceMiddleware(bare, pipeline=Pipeline(), websockets=used_up()),
    "hurried": ResilienceMiddleware(bare, pipeline=Pipeline(), websockets=soon),
    "draining": ResilienceMiddleware(bare, pipeline=Pipeline(), drain=draining(grace=100_000)),
    "drained": ResilienceMiddleware(bare, pipeline=Pipeline(), drain=draining(grace=0)),
}


async def app(scope, receive, send):
    name = "" if scope["type"] == "lifespan" else scope["path"].split("/")[1]
    await APPS.get(name, guarded)(scope, receive, send)


# -- its servers ----------------------------------------------------------------------------------------------


class Server:
    """A process that serves the application.

    Args:
        name: One of `SERVERS`.
        folder: Where its output is kept.
    """

    def __init__(self, name, folder):
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = free.getsockname()
        command = [sys.executable, "-m", *(word.format(port=self.address[1]) for word in SERVERS[name])]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self._output = folder / name
        with self._output.open("w") as output:
            self._process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=output
            )

    @property
    def output(self):
        return self._output.read_text()

    def wait(self):
        """Wait until it listens; the time limit is that of the suite."""
        while True:
            assert self._process.poll() is None, f"{self.name} has ended: {self.output}"
            try:
                socket.create_connection(self.address).close()
            except ConnectionRefusedError:
                time.sleep(0.01)
            else:
                return

    def stop(self):
        """End it, and return its output."""
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        return self.output


@contextmanager
def running(folder):
    """Run all servers at the same time, as most of what they do is to start."""
    with ExitStack() as stack:
        servers = {}
        for name in SERVERS:
            servers[name] = Server(name, folder)
            stack.callback(servers[name].stop)
        yield servers
