"""Starting the server process, and never leaving it behind."""

import json
import subprocess
import sys
from types import TracebackType
from typing import Self

from resilient.demo import DemoError, Options

_COMMAND = (sys.executable, "-m", "resilient.demo.server")
_PATIENCE = 3.0


class ServerProcess:
    """A running server, as a context manager.

    The pipe to its standard input is what it lives on: that is closed at the end, or by the system if the demo
    is killed. The process has a session of its own, so Ctrl-C in a terminal reaches only the demo.

    Args:
        options: What the command line asks for.

    Raises:
        DemoError: The server cannot listen on the port, or does not start.
    """

    def __init__(self, options: Options) -> None:
        words = [str(options.port), str(options.seconds), str(options.seed)]
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            [*_COMMAND, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.url = ""

    def __enter__(self) -> Self:
        try:
            self.url = f"http://127.0.0.1:{self._read_port()}"
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, and wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: S101, PT018 - pipes
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read_port(self) -> int:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        line = self._process.stdout.readline()
        if not line:
            raise DemoError("the server did not start")
        said = json.loads(line)
        if "error" in said:
            raise DemoError(said["error"])
        port: int = said["port"]
        return port
