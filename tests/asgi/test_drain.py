import asyncio
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace

import anyio
import pytest

from resilient import runtime
from resilient.asgi.drain import Drain, DrainStatistics
from resilient.testing import capture_events, run, virtual_time

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
TERM = signal.SIGTERM


def seen(events):
    return [(event.name, event.at) for event in events]


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["grace", "timeout"])
@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), ("5", TypeError), (float("nan"), ValueError)])
def test_bad_options(option, value, error):
    with pytest.raises(error, match=f"Drain: {option}={value!r} is not allowed; give a number of seconds"):
        Drain(**{option: value})


def test_name_repr_and_copies():
    drain = Drain(grace=0, timeout=0.5, name="shop")
    assert repr(Drain()) == "Drain()"
    assert repr(drain) == "Drain(grace=0, timeout=0.5, name='shop')"
    drain.begin()
    drain.enter()
    for other in (drain.fresh(), copy.deepcopy(drain), pickle.loads(pickle.dumps(drain))):
        assert repr(other) == repr(drain)
        assert other.statistics() == DrainStatistics("serving", 0, 0)


# -- the states ---------------------------------------------------------------------------------------------------


def test_states_with_nothing_in_flight():
    drain = Drain()
    with virtual_time() as clock:
        assert (drain.state, drain.draining, drain.refusing) == ("serving", False, False)
        clock.sleep(100)
        drain.begin()
        assert (drain.state, drain.draining, drain.refusing) == ("grace", True, False)
        clock.sleep(4.9)
        assert drain.enter()
        drain.leave()
        assert (drain.state, drain.refusing) == ("grace", False)
        clock.sleep(0.1)
        assert (drain.state, drain.draining, drain.refusing) == ("drained", True, True)


def test_states_with_a_request_in_flight():
    drain = Drain(grace=2, timeout=10)
    with virtual_time() as clock, capture_events() as events:
        assert drain.enter()
        assert drain.enter()
        drain.begin()
        clock.sleep(1)
        drain.begin()  # changes nothing
        drain.leave()
        clock.sleep(1)
        assert drain.state == "draining"
        assert not drain.enter()
        assert drain.statistics() == DrainStatistics("draining", 1, 1)
        clock.sleep(3)
        drain.leave()
        assert drain.statistics() == DrainStatistics("drained", 0, 1)
        assert not drain.enter()
    began, ended = events
    assert (began.name, began.at, began.policy) == ("drain.began", 0, "Drain(grace=2, timeout=10)")
    assert (began.grace, began.timeout, began.in_flight) == (2, 10, 2)
    assert (ended.name, ended.at, ended.seconds, ended.in_flight) == ("drain.ended", 5, 5, 0)


def test_the_timeout_ends_it_too():
    drain = Drain(grace=2, timeout=10)
    with virtual_time() as clock:
        drain.enter()
        drain.begin()
        clock.sleep(11.9)
        assert drain.state == "draining"
        clock.sleep(0.1)
        assert drain.state == "drained"
        drain.leave()
        assert drain.state == "drained"


def test_a_request_that_is_refused_first_of_all_ends_it():
    drain = Drain(grace=1)
    with virtual_time() as clock, capture_events() as events:
        drain.begin()
        clock.sleep(1)
        assert not drain.enter()
    assert seen(events) == [("drain.began", 0), ("drain.ended", 1)]


def test_leaving_too_often():
    drain = Drain()
    drain.enter()
    drain.leave()
    with pytest.raises(RuntimeError, match=r"leave\(\) was called more often than enter\(\) returned True"):
        drain.leave()


def test_counts_of_threads():
    drain = Drain(grace=0)
    start = threading.Barrier(9)
    entered = []

    def work():
        start.wait()
        mine = 0
        for _ in range(500):
            if drain.enter():
                mine += 1
                drain.leave()
        entered.append(mine)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    drain.begin()
    for thread in threads:
        thread.join()
    statistics = drain.statistics()
    assert sum(entered) + statistics.refused == 8 * 500
    assert (statistics.state, statistics.in_flight) == ("drained", 0)


def test_many_begin_at_once():
    drain = Drain()
    with capture_events() as events:
        threads = [threading.Thread(target=drain.begin) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(events) == 1


# -- waiting ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("lasts", "ends"), [(None, 5), (3, 5), (5, 5), (9, 9), (100, 30)])
def test_wait(backend, lasts, ends):
    """Somebody waits from the start, somebody else comes later, and a request leaves after a time."""
    drain = Drain()
    times = []

    async def wait(after):
        await runtime.asleep(after)
        await drain.wait()
        times.append(round(runtime.now(), 6))

    async def request():
        assert drain.enter()
        try:
            await runtime.asleep(10 + lasts)
        finally:
            drain.leave()

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(wait, 0)
            group.start_soon(wait, 12)
            if lasts is not None:
                group.start_soon(request)
            await runtime.asleep(10)
            drain.begin()
            await runtime.asleep(ends - 0.5)
            assert drain.state != "drained"
        await drain.wait()

    with capture_events() as events:
        run(main, backend=backend)
    assert times == [10 + ends, 10 + ends]
    assert [(name, round(at, 6)) for name, at in seen(events)] == [("drain.began", 10), ("drain.ended", 10 + ends)]
    assert events[1].in_flight == (lasts == 100)
    assert not drain._for_begin
    assert not drain._for_end


@both
def test_begun(backend):
    drain = Drain()

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(drain.begun)
            await runtime.asleep(3)
            drain.begin()
        assert runtime.now() == pytest.approx(3)
        await drain.begun()

    run(main, backend=backend)
    assert not drain._for_begin


@both
def test_waiters_can_be_cancelled(backend):
    drain = Drain(grace=1)

    async def main():
        drain.enter()
        for _ in range(2):
            with anyio.move_on_after(3) as scope:
                await drain.wait()
            assert scope.cancelled_caught
            assert not drain._for_begin
            assert not drain._for_end
            drain.begin()
        drain.leave()
        await drain.wait()

    run(main, backend=backend)


@both
def test_a_cancelled_request_leaves(backend):
    drain = Drain(grace=0)

    async def request():
        assert drain.enter()
        try:
            await anyio.sleep_forever()
        finally:
            drain.leave()

    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(request)
            await runtime.asleep(1)
            drain.begin()
            assert drain.state == "draining"
            group.cancel_scope.cancel()
        assert drain.state == "drained"

    run(main, backend=backend)


def test_begin_in_another_thread_wakes_who_waits():
    drain = Drain(grace=0)

    async def main():
        thread = threading.Thread(target=drain.begin)
        thread.start()
        await drain.wait()
        thread.join()

    asyncio.run(main())


@pytest.mark.parametrize(("leaves", "ends"), [(3, 5), (7, 7), (100, 30)])
def test_sitting_it_out_in_a_thread(leaves, ends):
    drain = Drain()
    with virtual_time() as clock:
        drain.enter()
        drain.begin()

        def sit_out():
            drain.sit_out()
            return clock.now()

        def request():
            clock.sleep(leaves)
            drain.leave()

        assert clock.run_threads(sit_out, sit_out, request)[:2] == [ends, ends]
    assert not drain._for_end


# -- SIGTERM ------------------------------------------------------------------------------------------------------


@contextmanager
def handled(handler):
    before = signal.signal(TERM, handler)
    try:
        yield
    finally:
        signal.signal(TERM, before)


@contextmanager
def inline():
    """Run in virtual time, and what would be a thread at once."""
    with virtual_time() as clock:
        runtime.install(replace(runtime._installed, start_thread=lambda function, _name: function()))
        yield clock


def terminate():
    os.kill(os.getpid(), TERM)


class Server:
    """What a server does with the signal: it notes when it came."""

    def __init__(self):
        self.told = []

    def __call__(self, *_):
        self.told.append(runtime.now())


def test_sigterm_begins_and_reaches_the_server_in_the_end():
    drain, server = Drain(), Server()
    with inline(), handled(server), drain.installed():
        assert drain.install()  # again: no harm
        assert signal.getsignal(TERM) is not server
        terminate()
        assert server.told == [5]
        assert drain.state == "drained"
        assert signal.getsignal(TERM) is server
        terminate()
        assert server.told == [5, 5]


def test_the_watcher_is_a_thread():
    drain, told = Drain(grace=0), threading.Event()
    names = []
    drain.listen(lambda _event: names.append(threading.current_thread().name))
    with handled(lambda *_: told.set()), drain.installed():
        terminate()
        assert told.wait(100)
    assert names == ["resilient-drain"] * 2


def test_another_sigterm_goes_to_the_server_at_once():
    drain, server = Drain(), Server()
    threads = []
    with virtual_time() as clock, handled(server), drain.installed():
        runtime.install(replace(runtime._installed, start_thread=lambda function, _name: threads.append(function)))
        terminate()
        clock.sleep(0.9)
        terminate()  # the same one, from the parent of this process
        assert server.told == []
        clock.sleep(0.1)
        terminate()
        assert server.told == [1]
        [watch] = threads
        watch()  # finds that there is nothing left to do
        assert (server.told, drain.state) == ([1], "drained")


def test_drained_at_once():
    drain, server = Drain(grace=0), Server()
    with inline(), handled(server), drain.installed():
        terminate()
        assert server.told == [0]


def test_a_drain_that_began_before_the_signal():
    drain, server = Drain(), Server()
    with inline() as clock, handled(server), drain.installed():
        drain.begin()
        clock.sleep(3)
        terminate()
        assert server.told == [5]


def test_no_thread_to_be_had():
    drain, server = Drain(), Server()

    def start_thread(_function, _name):
        raise RuntimeError("can't start new thread")

    with virtual_time(), handled(server), drain.installed():
        runtime.install(replace(runtime._installed, start_thread=start_thread))
        terminate()
        assert server.told == [0]


def test_uninstalling_in_time():
    drain, server = Drain(), Server()
    with inline(), handled(server):
        drain.uninstall()  # never installed
        drain.install()
        drain.uninstall()
        drain.uninstall()
        terminate()
        assert (server.told, drain.state) == ([0], "serving")


def test_uninstalling_after_an_error():
    drain, server = Drain(), Server()
    with handled(server):
        with pytest.raises(ZeroDivisionError), drain.installed():
            raise ZeroDivisionError
        assert signal.getsignal(TERM) is server


def test_a_handler_that_came_later_stays():
    drain, first, second = Drain(), Server(), Server()
    with inline(), handled(first), drain.installed():
        signal.signal(TERM, second)
        drain.uninstall()
        assert signal.getsignal(TERM) is second
        drain.install()
        signal.signal(TERM, first)
        assert drain.install()  # another server in the same process
        terminate()
        assert (first.told, second.told) == ([5], [])


def test_not_in_other_threads(monkeypatch):
    drain = Drain()
    installed = []

    def work():
        with drain.installed():
            installed.append(signal.getsignal(TERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert installed == [signal.getsignal(TERM)]
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # a handler that C code has installed
    assert not drain.install()


def test_who_awaits_the_end_has_to_end_the_process_if_no_handler_does():
    drain = Drain()

    async def main():
        with drain.installed():
            async with anyio.create_task_group() as group:
                group.start_soon(drain.wait)
                await anyio.wait_all_tasks_blocked()
                terminate()

    with inline(), handled(signal.SIG_DFL):
        asyncio.run(main())
        assert drain.state == "drained"


ALONE = """
import os, signal, time
from resilient.asgi.drain import Drain
signal.signal(signal.SIGTERM, signal.SIG_DFL)
drain = Drain(grace=0)
drain.enter()
print(drain.install(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
while drain.state != "draining":
    time.sleep(0.001)
print("survived", flush=True)
drain.leave()
signal.pause()
"""


def test_the_default_action_happens_in_the_end():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-TERM, "True\nsurvived\n"), done.stderr


def test_windows_wakes_nobody_up(monkeypatch):
    monkeypatch.delattr(signal, "pthread_kill")
    drain, server = Drain(), Server()

    async def main():
        with drain.installed():
            terminate()

    with inline(), handled(server):
        asyncio.run(main())
        assert server.told == [5]


# -- SIGTERM in an asyncio event loop -----------------------------------------------------------------------------


def in_loop(function, drain):
    """Run a coroutine function in a loop that handles signals, as hypercorn and granian have it do."""
    told = {TERM: asyncio.Event(), signal.SIGUSR1: asyncio.Event()}
    errors = []

    async def main():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: errors.append(context))
        for number, event in told.items():
            loop.add_signal_handler(number, event.set)
        drain.install()
        await function(told)
        await asyncio.sleep(0)

    with inline(), handled(Server()):
        asyncio.run(main())
    drain.uninstall()
    assert errors == []


def test_the_event_loop_hears_of_sigterm_in_the_end():
    drain = Drain()

    async def scenario(told):
        os.kill(os.getpid(), signal.SIGUSR1)
        await told[signal.SIGUSR1].wait()  # the others are passed on
        told[signal.SIGUSR1].clear()
        terminate()
        assert drain.state == "drained"
        assert not told[TERM].is_set()  # the first one was kept from the loop, which has yet to read the second
        await told[TERM].wait()
        os.kill(os.getpid(), signal.SIGUSR1)
        await told[signal.SIGUSR1].wait()
        drain.uninstall()

    in_loop(scenario, drain)


def test_the_event_loop_does_not_hear_of_the_first():
    drain = Drain()

    async def scenario(told):
        runtime.install(replace(runtime._installed, start_thread=lambda _function, _name: None))
        terminate()
        os.kill(os.getpid(), signal.SIGUSR1)
        await told[signal.SIGUSR1].wait()
        await asyncio.sleep(0)
        assert not told[TERM].is_set()
        runtime.sleep(1)
        terminate()
        await told[TERM].wait()

    in_loop(scenario, drain)


def open_files():
    files = set()
    for number in range(256):
        with suppress(OSError):
            os.fstat(number)
            files.add(number)
    return files


def test_uninstalling_gives_the_loop_its_signals_back():
    drain = Drain()

    async def scenario(told):
        drain.uninstall()
        await asyncio.sleep(0)
        before = open_files()
        drain.install()
        drain.uninstall()
        await asyncio.sleep(0)
        assert open_files() == before
        terminate()
        await told[TERM].wait()
        assert drain.state == "serving"

    in_loop(scenario, drain)


def test_uninstalling_after_the_loop_has_ended():
    drain = Drain()

    async def scenario(told):
        pass

    before = open_files()
    in_loop(scenario, drain)
    drain.uninstall()
    assert open_files() == before


def test_a_loop_whose_file_was_put_back_by_others():
    drain = Drain()

    async def scenario(told):
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, int)  # sets the file once more
        drain.uninstall()
        terminate()
        await told[TERM].wait()

    in_loop(scenario, drain)


@pytest.mark.parametrize("settle", [Drain.enter, Drain.settle])
def test_a_loop_that_starts_anew_before_the_first_request(settle):
    drain = Drain()

    async def scenario(told):
        assert drain._settling
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, int)  # as if it listened for the first time
        settle(drain)
        assert not drain._settling
        drain.settle()
        runtime.install(replace(runtime._installed, start_thread=lambda _function, _name: None))
        terminate()
        os.kill(os.getpid(), signal.SIGUSR1)
        await told[signal.SIGUSR1].wait()
        await asyncio.sleep(0)
        assert not told[TERM].is_set()
        drain.uninstall()
        assert not drain._settling
        terminate()
        await told[TERM].wait()

    in_loop(scenario, drain)


def test_settling_has_to_happen_in_the_main_thread():
    drain = Drain()

    async def scenario(told):
        thread = threading.Thread(target=drain.enter)
        thread.start()
        thread.join()
        assert drain._settling
        drain.enter()
        assert not drain._settling

    in_loop(scenario, drain)


def test_settling_without_a_loop_that_listens():
    drain, server = Drain(), Server()
    drain.settle()  # not installed
    with handled(server), drain.installed():
        drain.settle()
        assert signal.getsignal(TERM) is not server

    async def scenario(told):
        signal.set_wakeup_fd(-1)
        drain.settle()
        assert signal.set_wakeup_fd(-1) == -1

    in_loop(scenario, drain)


def test_a_file_that_somebody_else_has_set_stays():
    drain = Drain()
    reads, writes = os.pipe()
    os.set_blocking(writes, False)

    async def scenario(told):
        theirs = signal.set_wakeup_fd(writes)
        assert theirs != -1
        drain.uninstall()
        assert signal.set_wakeup_fd(-1) == writes

    in_loop(scenario, drain)
    os.close(reads)
    os.close(writes)


# -- forks --------------------------------------------------------------------------------------------------------


def in_child(function):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            os.write(writes, repr(function()).encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        written = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return written


@FORKS
def test_a_child_serves_by_itself():
    drain, other, server = Drain(), Drain(), Server()
    drain.enter()
    other.begin()
    with inline(), handled(server), drain.installed():
        drain.begin()

        def child():
            return drain.statistics(), drain.enter(), other.state, signal.getsignal(TERM) is server

        assert in_child(child) == repr((DrainStatistics("serving", 0, 0), True, "serving", True))
        assert drain.statistics().in_flight == 1


@FORKS
@pytest.mark.parametrize("changed", [False, True], ids=["untouched", "changed"])
def test_a_child_leaves_the_event_loop_of_its_parent_alone(changed):
    drain = Drain()

    async def scenario(told):
        if changed:
            asyncio.get_running_loop().add_signal_handler(TERM, told[TERM].set)

        def child():
            return signal.set_wakeup_fd(-1) == -1, drain._hook

        reset = not changed or sys.version_info >= (3, 12)  # by asyncio itself, from then on
        assert in_child(child) == repr((reset, None))
        drain.uninstall()
        terminate()
        await told[TERM].wait()

    in_loop(scenario, drain)
