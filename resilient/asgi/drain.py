"""Drain: end a server process without failing a request.

    SERVING --- begin() or SIGTERM ---> GRACE --- grace is over ---> DRAINING --- none in flight, ---> DRAINED
                                                                                  or timeout is over

* In the grace period readiness fails and every request is still served: load balancers need time to notice.
  Kubernetes takes a pod out of its endpoints at the same time as it sends SIGTERM, not before.
* While draining, new requests are refused and those in flight end.
* Drained, the server may close its sockets. Only now does SIGTERM reach it (`Drain.install`).

The state ages from the clock: there are no timers, and nothing to do as long as nobody asks. The one thread is
that which waits for the end on behalf of a signal.

How SIGTERM is held back meanwhile is in `resilient.asgi.sigterm`.
"""

import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Literal

from resilient import options, runtime
from resilient.asgi.sigterm import Hook
from resilient.component import Component
from resilient.counter import Counter
from resilient.events import DrainBegan, DrainEnded
from resilient.ticket import Ticket

State = Literal["serving", "grace", "draining", "drained"]


@dataclass(frozen=True, slots=True)
class DrainStatistics:
    """A snapshot of a `Drain`.

    Attributes:
        state: `serving`, `grace`, `draining` or `drained`.
        in_flight: Requests that have entered and not left.
        refused: Requests that were refused.
    """

    state: State
    in_flight: int
    refused: int


class Drain(Component):
    """The end of a server process, in order: not ready, then no new requests, then nothing in flight.

    Make one for a process, and share it: `ResilienceMiddleware(app, drain=drain)` counts and refuses requests,
    `Health(drain=drain)` fails readiness, `install()` begins it when SIGTERM comes. It begins once and does not
    come back.

    Args:
        grace: For how many seconds requests are still served after `begin()`, while readiness fails. It should
            be longer than readiness probes need to notice: their period times their failure threshold. Default
            5 s.
        timeout: For how many seconds more requests in flight may go on. Default 25 s. Kubernetes kills a process
            30 s after SIGTERM (less the preStop hook) unless `terminationGracePeriodSeconds` says otherwise.
        name: What events call it. Default: its repr.

    Attributes:
        draining: Whether it has begun. A plain attribute, for whoever has to look often.

    Emits:
        DrainBegan, DrainEnded.
    """

    def __init__(
        self, *, grace: options.Seconds = 5.0, timeout: options.Seconds = 25.0, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.grace = options.seconds("Drain", "grace", grace, zero=True)
        self.timeout = options.seconds("Drain", "timeout", timeout, zero=True)
        self._serve()

    def _serve(self) -> None:
        self.draining = False
        self._refusing = False
        self._drained = False
        self._began_at = self._refuses_at = self._gives_up_at = float("inf")
        self._begins, self._ends = count(), count()  # the first to take a tick does it
        self._inside: deque[None] = deque()  # its operations are atomic, so counting needs no lock
        self._refused = Counter()
        self._for_begin: set[Ticket] = set()
        self._for_end: set[Ticket] = set()
        self._awaited = False
        self._hook: Hook | None = None
        self._settling = False  # the loop that was tapped may have started anew since

    # -- what it says -----------------------------------------------------------------------------------------

    @property
    def refusing(self) -> bool:
        """Whether new requests are refused: the grace period is over."""
        return self._refusing or (self.draining and runtime.now() >= self._refuses_at)

    @property
    def state(self) -> State:
        """`serving`, `grace`, `draining` or `drained`."""
        if not self.draining:
            return "serving"
        if not self.refusing:
            return "grace"
        over = self._drained or not self._inside or runtime.now() >= self._gives_up_at
        return "drained" if over else "draining"

    def statistics(self) -> DrainStatistics:
        """Return the state, how many requests are in flight, and how many were refused."""
        return DrainStatistics(self.state, len(self._inside), self._refused.value)

    # -- around each request ----------------------------------------------------------------------------------

    def enter(self) -> bool:
        """Count a request in; return False if it has to be refused, and then do not call `leave`."""
        if self._settling:
            self.settle()
        self._inside.append(None)  # before looking: who ends the drain looks the other way round
        if self.draining and self.refusing:
            self._refused.add()
            self.leave()
            return False
        return True

    def leave(self) -> None:
        """Count a request out, however it ended.

        Raises:
            RuntimeError: There is none in flight.
        """
        try:
            self._inside.pop()
        except IndexError:
            raise RuntimeError("Drain: leave() was called more often than enter() returned True") from None
        if self.draining and not self._inside and self.refusing:
            self._end()

    # -- the states -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin, from any thread; to begin twice does no harm.

        It takes no lock and does not wait, so a handler of a signal may call it too. Listeners are called here
        as well, and have to be fit for that then.
        """
        if next(self._begins):
            return
        self._began_at = runtime.now()
        self._refuses_at = self._began_at + self.grace
        self._gives_up_at = self._refuses_at + self.timeout
        self.draining = True  # last: from here on others look at the times
        for ticket in list(self._for_begin):
            ticket.grant()
        self.emit(DrainBegan, grace=self.grace, timeout=self.timeout, in_flight=len(self._inside))

    async def begun(self) -> None:
        """Wait until it begins: for long-lived responses and websockets, which have to end by themselves."""
        ticket = Ticket()
        self._for_begin.add(ticket)
        try:
            if not self.draining:
                await runtime.await_ticket(ticket)
        finally:
            self._for_begin.discard(ticket)

    async def wait(self) -> None:
        """Wait until it is drained, from before it begins on; works as hypercorn's `shutdown_trigger`."""
        self._awaited = True
        await self.begun()
        await runtime.asleep(max(0.0, self._refuses_at - runtime.now()))
        ticket = self._refuse()
        try:
            if not self._drained and self._inside:
                await runtime.await_ticket(ticket)
        finally:
            self._for_end.discard(ticket)
        self._end()

    def sit_out(self) -> None:
        """Wait, in a thread, until what has begun is drained."""
        runtime.sleep(max(0.0, self._refuses_at - runtime.now()))
        ticket = self._refuse()
        if not self._drained and self._inside:
            runtime.wait(ticket)
        self._for_end.discard(ticket)
        self._end()

    def _refuse(self) -> Ticket:
        # Who has slept through the grace period says that it is over: clocks and sleepers may differ by a hair.
        self._refusing = True
        ticket = Ticket(expires_at=self._gives_up_at)
        self._for_end.add(ticket)
        return ticket

    def _end(self) -> None:
        if next(self._ends):
            return
        self._drained = True
        for ticket in list(self._for_end):
            ticket.grant()
        self.emit(DrainEnded, seconds=runtime.now() - self._began_at, in_flight=len(self._inside))

    # -- SIGTERM ----------------------------------------------------------------------------------------------

    def install(self) -> bool:
        """Have SIGTERM begin the drain, and reach the server only when that is over.

        Call it in the startup of the lifespan: by then the server has installed its own handling. Another SIGTERM,
        a second or more after the first, goes to the server at once, and so does SIGINT, which is not touched. If
        nothing but the default action is there, it happens when all is drained, unless somebody awaits `wait()`,
        whose business it is then.

        Returns:
            Whether it is installed. Not so outside the main thread, where Python lets nobody handle signals (test
            clients and servers in threads run there), and if the handler that is there is not Python's.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        previous = signal.getsignal(signal.SIGTERM)
        if previous is None:
            return False
        if self._hook is None or previous is not self._hook:
            self.uninstall()
            self._hook = Hook(self, previous)
            self._settling = self._hook.taps
        return True

    def settle(self) -> None:
        """Complete what `install` has begun, with the first request or probe, in the main thread.

        A server may start its event loop anew between the startup of the lifespan and the first request, as
        granian does, and uvloop then listens to signals as if nobody had come before it.
        """
        if self._hook is not None and threading.current_thread() is threading.main_thread():
            self._settling = False
            self._hook.renew()

    def uninstall(self) -> None:
        """Put back what `install` found, in the main thread; without `install` this does nothing.

        A handler that somebody else has installed meanwhile is left alone.
        """
        hook, self._hook = self._hook, None
        self._settling = False
        if hook is not None:
            hook.remove()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Return a context manager of `install` and `uninstall`."""
        self.install()
        try:
            yield
        finally:
            self.uninstall()

    def after_fork(self) -> None:
        """Serve again in a forked child: the requests in flight, and the signal, are its parent's."""
        super().after_fork()
        hook = self._hook
        self._serve()
        if hook is not None:
            hook.forget()
