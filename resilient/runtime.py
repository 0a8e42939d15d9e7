"""Time, sleep, waiting, threads and randomness: everything impure, in one place.

Policies get numbers; the kinds read the clock and wait through this module. `install` replaces all of it at
once, which is how `resilient.testing` runs an hour of retries in a millisecond. The functions are looked up
at each call (`runtime.now()`), so policies made and linked long before are affected too.
"""

import asyncio
import contextvars
import random as _random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, fields
from typing import Any

import anyio

from resilient.ticket import Ticket


def _sleep(seconds: float) -> None:
    time.sleep(seconds)  # looked up late, so that gevent's patched version is found


async def _asleep(seconds: float) -> None:
    await anyio.sleep(seconds)


def _wait(ticket: Ticket) -> bool:
    if ticket.ready_at is not None:
        _installed.sleep(max(0.0, ticket.ready_at - _installed.now()))
        return True
    event = threading.Event()
    if ticket.attach(event.set):
        event.wait(None if ticket.expires_at is None else max(0.0, ticket.expires_at - _installed.now()))
    return ticket.granted


async def _await_ticket(ticket: Ticket) -> bool:
    if ticket.ready_at is not None:
        await _installed.asleep(max(0.0, ticket.ready_at - _installed.now()))
        return True
    event = anyio.Event()
    run_soon = _waker()
    if ticket.attach(lambda: run_soon(event.set)):
        with anyio.move_on_after(
            None if ticket.expires_at is None else max(0.0, ticket.expires_at - _installed.now())
        ):
            await event.wait()
    return ticket.granted


def _waker() -> Callable[[Callable[[], object]], object]:
    """Return how any thread gets a function run in the event loop that is running here."""
    if in_trio():
        import trio

        return trio.lowlevel.current_trio_token().run_sync_soon
    return asyncio.get_running_loop().call_soon_threadsafe


def in_trio() -> bool:
    """Tell whether the caller runs in a trio task (never importing trio to find out)."""
    trio = sys.modules.get("trio")
    return trio is not None and trio.lowlevel.in_trio_run()


def is_cancellation(error: BaseException | None) -> bool:
    """Tell whether an error is what the event loop cancels a task with."""
    trio = sys.modules.get("trio")
    return isinstance(error, asyncio.CancelledError) or (trio is not None and isinstance(error, trio.Cancelled))


def start_daemon(function: Callable[[], object], name: str) -> None:
    """Run a function in a new daemon thread."""
    threading.Thread(target=function, name=name, daemon=True).start()


_tasks: set[asyncio.Task[Any]] = set()


def _start_task(
    function: Callable[[], Coroutine[Any, Any, object]],
    context: contextvars.Context,
    cancelled: Callable[[], object],
) -> None:
    if in_trio():
        import trio

        trio.lowlevel.spawn_system_task(function, context=context)
        return
    task = asyncio.get_running_loop().create_task(function(), context=context)
    _tasks.add(task)  # the event loop itself keeps only weak references
    task.add_done_callback(_tasks.discard)
    task.add_done_callback(lambda task: cancelled() if task.cancelled() else None)


@dataclass(frozen=True, slots=True)
class Runtime:
    """One implementation of everything impure.

    Attributes:
        now: Monotonic clock, in seconds.
        sleep: Block the thread for so many seconds.
        asleep: Suspend the task for so many seconds.
        wait: Block until the ticket is ready, granted or expired; tell whether it was granted.
        await_ticket: The same for a task.
        start_thread: Run a function in a new daemon thread of the given name.
        start_task: Run a coroutine function in the background of the running event loop. Where a task can be
            cancelled before its first step, call the third argument when it was cancelled.
        random: Source of all jitter. The module-wide generator, because CPython seeds it again after fork.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = _sleep
    asleep: Callable[[float], Awaitable[None]] = _asleep
    wait: Callable[[Ticket], bool] = _wait
    await_ticket: Callable[[Ticket], Awaitable[bool]] = _await_ticket
    start_thread: Callable[[Callable[[], object], str], None] = start_daemon
    start_task: Callable[
        [Callable[[], Coroutine[Any, Any, object]], contextvars.Context, Callable[[], object]], None
    ] = _start_task
    random: Callable[[float, float], float] = _random.uniform


now: Callable[[], float]
sleep: Callable[[float], None]
asleep: Callable[[float], Awaitable[None]]
wait: Callable[[Ticket], bool]
await_ticket: Callable[[Ticket], Awaitable[bool]]
start_thread: Callable[[Callable[[], object], str], None]
start_task: Callable[[Callable[[], Coroutine[Any, Any, object]], contextvars.Context, Callable[[], object]], None]
random: Callable[[float, float], float]

_installed = Runtime()


def install(runtime: Runtime) -> Runtime:
    """Make `runtime` the source of time and randomness for the whole process; return the one it replaces."""
    global _installed
    previous, _installed = _installed, runtime
    for field in fields(Runtime):
        globals()[field.name] = getattr(runtime, field.name)
    return previous


install(_installed)
