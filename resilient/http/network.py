"""Deadlines on the sockets of a sync client.

The timeouts of httpx are per read: a server that sends one byte a second, of the headers or of the body, is never
too slow for them. Async code is cancelled at its deadline; a sync thread has to look at the clock by itself, each
time before it reads or writes. httpcore lets one plug in a network for that; the transports of httpx build their
own pool, though, so the network is wrapped where the pool keeps it. Without a deadline the wrapper only passes on.

What cannot be bounded this way: the resolution of a name, as `getaddrinfo` has no timeout; the second and further
addresses of a name, each of which gets what was left when connecting began; and in HTTP/2, waiting for another
thread that is reading from the same connection.
"""

import sys
from collections.abc import Callable
from typing import Any

from resilient import runtime
from resilient.deadline import _current

_PIECE = 64 * 1024


def keep_deadlines(transport: Any) -> bool:
    """Make the sockets that a sync transport opens from now on keep the deadline of the running call.

    Args:
        transport: Any transport; only those of httpx and httpx2 have sockets that we know.

    Returns:
        Whether it could be done: else deadlines hold between the steps of a request, but not within each.
    """
    pool = getattr(transport, "_pool", None)
    backend = getattr(pool, "_network_backend", None)
    if isinstance(backend, _Network):
        return True
    if not hasattr(backend, "connect_tcp"):
        return False
    pool._network_backend = _Network(backend)  # type: ignore[union-attr]
    return True


class _Guarded:
    """What can be bounded by a deadline: `_left` is called before everything that may block.

    Args:
        inner: A backend or a connection of httpcore or httpcore2.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._core = sys.modules[type(inner).__module__.partition(".")[0]]

    def _left(self, timeout: float | None, error: str) -> float | None:
        """Return the seconds until the timeout or the deadline, whichever comes first.

        The error is httpcore's own, as it can reach other requests on the same HTTP/2 connection: whose deadline
        it was is said further out.
        """
        limit = _current.get()
        if limit is None:
            return timeout
        left = limit.at - runtime.now()
        if left <= 0:
            raise getattr(self._core, error, TimeoutError)("the deadline has passed")
        return left if timeout is None or left < timeout else timeout


class _Network(_Guarded):
    """A network backend whose connections keep the deadline."""

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options: Any) -> "_Connection":
        left = self._left(timeout, "ConnectTimeout")
        return _Connection(self._inner.connect_tcp(host, port, timeout=left, **options))

    def connect_unix_socket(self, path: str, timeout: float | None = None, **options: Any) -> "_Connection":
        left = self._left(timeout, "ConnectTimeout")
        return _Connection(self._inner.connect_unix_socket(path, timeout=left, **options))

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(self._left(seconds, "ConnectTimeout"))


class _Connection(_Guarded):
    """A connection that keeps the deadline of whoever is using it."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.close: Callable[[], None] = inner.close
        self.get_extra_info: Callable[[str], Any] = inner.get_extra_info

    def read(self, max_bytes: int, timeout: float | None = None) -> Any:
        return self._inner.read(max_bytes, timeout=self._left(timeout, "ReadTimeout"))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if _current.get() is None:
            self._inner.write(buffer, timeout=timeout)
            return
        for start in range(0, len(buffer), _PIECE):  # the connection looks at the clock for each write only
            piece = buffer[start : start + _PIECE]
            self._inner.write(piece, timeout=self._left(timeout, "WriteTimeout"))

    def start_tls(self, *arguments: Any, timeout: float | None = None, **options: Any) -> "_Connection":
        left = self._left(timeout, "ConnectTimeout")
        return _Connection(self._inner.start_tls(*arguments, timeout=left, **options))
