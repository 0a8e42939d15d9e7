"""Work that goes on behind the answers of a transport, until that is closed.

It has threads and tasks of its own, which know nothing of the transport's life. So they are counted: once the
transport is being closed nothing starts any more, and what runs gets a moment to end, as its connections are the
transport's.
"""

import anyio

from resilient import runtime
from resilient.http.streams import CLOSE_SECONDS
from resilient.ticket import Ticket


class Background:
    """What runs behind the answers of one transport.

    There is no lock: who ends and who closes each write before they look, so one of them sees the other.
    """

    def __init__(self) -> None:
        self._running: set[object] = set()
        self._closing: Ticket | None = None

    def begin(self, work: object) -> bool:
        """Take note that something starts; return False if it must not, because the transport is closed."""
        self._running.add(work)
        if self._closing is None:
            return True
        self.end(work)
        return False

    def end(self, work: object) -> None:
        """Take note that it has ended; to say so twice does no harm."""
        self._running.discard(work)
        if self._closing is not None and not self._running:
            self._closing.grant()

    def close(self) -> None:
        """Start nothing any more, and wait for what runs, up to `CLOSE_SECONDS`."""
        ticket = self._close()
        if self._running:
            runtime.wait(ticket)

    async def aclose(self) -> None:
        """Do the same in a task; no scope of anyio cuts it short, as it takes no longer than that."""
        ticket = self._close()
        if self._running:
            with anyio.CancelScope(shield=True):
                await runtime.await_ticket(ticket)

    def _close(self) -> Ticket:
        self._closing = ticket = Ticket(expires_at=runtime.now() + CLOSE_SECONDS)
        return ticket
