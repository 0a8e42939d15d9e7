"""The real runtime, as far as that is possible without letting real time pass."""

import asyncio
import contextvars
import sys
import threading
import time
from dataclasses import fields, replace

import anyio
import anyio.lowlevel
import pytest
import trio

from resilient import runtime
from resilient.ticket import Ticket


def test_the_defaults():
    real = runtime.Runtime()
    assert real.now is time.monotonic
    assert all(getattr(runtime, field.name) == getattr(real, field.name) for field in fields(real))


def test_install_replaces_everything_and_returns_what_was_there():
    other = replace(runtime.Runtime(), now=lambda: 42.0)
    previous = runtime.install(other)
    try:
        assert runtime.now() == 42.0
    finally:
        assert runtime.install(previous) is other
    assert runtime.now is time.monotonic


def test_sleep_and_random():
    runtime.sleep(0)
    assert 1 <= runtime.random(1, 2) <= 2


def test_wait_for_what_is_ready_granted_or_expired():
    assert runtime.wait(Ticket(ready_at=0.0))
    granted = Ticket()
    granted.grant()
    assert runtime.wait(granted)
    assert not runtime.wait(Ticket(expires_at=0.0))


def test_wait_is_woken_by_another_thread():
    ticket = Ticket()
    threading.Thread(target=ticket.grant).start()
    assert runtime.wait(ticket)


async def await_all_sorts():
    await runtime.asleep(0)
    assert await runtime.await_ticket(Ticket(ready_at=0.0))
    granted = Ticket()
    granted.grant()
    assert await runtime.await_ticket(granted)
    assert not await runtime.await_ticket(Ticket(expires_at=0.0))
    ticket = Ticket()
    thread = threading.Thread(target=ticket.grant)
    thread.start()
    assert await runtime.await_ticket(ticket)
    thread.join()
    return runtime.in_trio()


def test_await_ticket():
    assert asyncio.run(await_all_sorts()) is False
    assert trio.run(await_all_sorts) is True


@pytest.mark.parametrize(
    "run", [asyncio.run, lambda coroutine: trio.run(lambda: coroutine)], ids=["asyncio", "trio"]
)
def test_a_grant_after_the_loop_has_ended_reaches_nobody(run):
    ticket = Ticket()

    async def leave_it():
        ticket.expires_at = 0.0
        await runtime.await_ticket(ticket)

    run(leave_it())
    assert not ticket.grant()


def test_in_trio_does_not_import_trio(monkeypatch):
    monkeypatch.delitem(sys.modules, "trio")
    assert not runtime.in_trio()
    assert "trio" not in sys.modules


def test_daemon_threads():
    seen = []
    done = threading.Event()

    def work():
        seen.append((threading.current_thread().name, threading.current_thread().daemon))
        done.set()

    runtime.start_thread(work, "a-name")
    assert done.wait(10)
    assert seen == [("a-name", True)]


variable = contextvars.ContextVar("variable", default="nothing")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_background_tasks_run_in_their_context(backend):
    seen = []

    async def work():
        seen.append(variable.get())

    async def main():
        context = contextvars.copy_context()
        context.run(variable.set, "something")
        runtime.start_task(work, context, lambda: None)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()

    anyio.run(main, backend=backend)
    assert seen == ["something"]
    assert not runtime._tasks


def test_asyncio_tells_of_a_task_that_was_cancelled_before_it_began():
    ended, began = [], []

    async def work():
        began.append(1)

    async def main():
        runtime.start_task(work, contextvars.copy_context(), lambda: ended.append(1))
        for task in runtime._tasks:
            task.cancel()
        await asyncio.sleep(0)
        runtime.start_task(work, contextvars.copy_context(), lambda: ended.append(2))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert (began, ended) == ([1], [1])
