"""SIGTERM under real servers: readiness fails, requests go on, the last one ends, and so does the process.

The clock of the drain in the server process is a file, so a grace period of 5 s is over when the test says so, and
not a moment earlier, however slow the machine is.
"""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

APP = """
import asyncio, os, signal
from dataclasses import replace
from pathlib import Path
from time import sleep

from resilient import runtime
from resilient.asgi.drain import Drain
from resilient.asgi.health import Health

HERE = Path(__file__).parent


def now():
    return float((HERE / "clock").read_text() or 0)


def wait_for_clock(seconds):
    until = now() + seconds
    while now() < until:
        sleep(0.005)


async def await_clock(seconds):
    until = now() + seconds
    while now() < until:
        await asyncio.sleep(0.005)


runtime.install(replace(runtime.Runtime(), now=now, sleep=wait_for_clock, asleep=await_clock))
drain = Drain()  # 5 s of grace
health = Health(drain=drain)


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        assert (await receive())["type"] == "lifespan.startup"
        assert drain.install()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        drain.uninstall()
        (HERE / "shutdown").touch()
        await send({"type": "lifespan.shutdown.complete"})
    elif health.handles(scope):
        await health(scope, receive, send)
    elif not drain.enter():
        await answer(send, 503)
    else:
        try:
            if scope["path"] == "/slow":
                (HERE / "slow").touch()
                while not (HERE / "release").exists():
                    await asyncio.sleep(0.005)
            await answer(send, 200)
        finally:
            drain.leave()


async def answer(send, status):
    headers = [(b"content-length", b"0"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body"})


if __name__ == "__main__":
    import sys
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not that of a tool which measures this process
    config = Config()
    config.bind = sys.argv[1]
    asyncio.run(serve(app, config, shutdown_trigger=drain.wait))
"""

KILLED, ENDED = -signal.SIGTERM, 0
SERVERS = {
    "uvicorn, h11": (["-m", "uvicorn", "app:app", "--http", "h11", "--port", "{port}"], KILLED),
    "uvicorn, httptools": (["-m", "uvicorn", "app:app", "--http", "httptools", "--port", "{port}"], KILLED),
    "uvicorn, workers": (["-m", "uvicorn", "app:app", "--workers", "2", "--port", "{port}"], ENDED),
    "hypercorn": (["-m", "hypercorn", "app:app", "--workers", "0", "--bind", "127.0.0.1:{port}"], ENDED),
    "hypercorn, trigger": (["app.py", "127.0.0.1:{port}"], ENDED),
    "granian": (["-m", "granian", "app:app", "--interface", "asgi", "--port", "{port}"], ENDED),
}


class Server:
    def __init__(self, process, port, folder):
        self.process = process
        self.port = port
        self.folder = folder

    def get(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            return connection.getresponse().status
        finally:
            connection.close()

    def until(self, path, wanted):
        """Ask until the answer is the wanted status; the time limit is that of the suite."""
        while True:
            try:
                if self.get(path) == wanted:
                    return
            except OSError:  # not listening yet
                pass
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.01)

    def until_file(self, name):
        while not (self.folder / name).exists():
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.005)

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def set_clock(self, seconds):
        new = self.folder / "new clock"
        new.write_text(str(seconds))
        new.replace(self.folder / "clock")

    def ends_after(self, clock):
        """Let time go on until the process has ended: another worker may have heard of the signal only now."""
        while self.process.poll() is None:
            clock += 1
            self.set_clock(clock)
            time.sleep(0.01)
        return self.process.returncode


@contextmanager
def running(name, folder):
    (folder / "app.py").write_text(APP)
    (folder / "clock").write_text("100")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *(word.format(port=port) for word in SERVERS[name][0])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    with (folder / "output").open("w") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
        server = Server(process, port, folder)
        try:
            server.until("/livez", 200)
            yield server
        except BaseException as error:
            error.add_note((folder / "output").read_text())
            raise
        finally:
            (folder / "release").touch()
            if process.poll() is None:
                process.terminate()
            server.ends_after(10_000)


def in_background(function, *args):
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args)))
    thread.start()

    def result():
        thread.join()
        return results[0]

    return result


@pytest.mark.parametrize("name", SERVERS)
def test_sigterm_fails_no_request(name, tmp_path):
    with running(name, tmp_path) as server:
        assert server.get("/readyz") == 200
        slow = in_background(server.get, "/slow")
        server.until_file("slow")

        server.terminate()
        server.until("/readyz", 503)
        assert server.get("/livez") == 200
        assert server.get("/") == 200  # the grace period

        server.set_clock(105)
        server.until("/", 503)
        assert server.get("/livez") == 200
        assert not (tmp_path / "shutdown").exists()

        (tmp_path / "release").touch()
        assert slow() == 200
        assert server.ends_after(105) == SERVERS[name][1]
        assert (tmp_path / "shutdown").exists()


def test_another_sigterm_goes_to_the_server(tmp_path):
    with running("uvicorn, httptools", tmp_path) as server:
        server.terminate()
        server.until("/readyz", 503)
        server.set_clock(101)
        server.terminate()
        assert server.process.wait() == KILLED
        assert (tmp_path / "shutdown").exists()
