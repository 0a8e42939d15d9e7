"""The priority of the running call goes wherever its context goes."""

import asyncio
import copy
import pickle
from threading import Thread

import anyio
import pytest

import resilient
from resilient import Pipeline, Priority, Timeout, priority
from resilient.testing import run, virtual_time


def test_calls_are_normal_unless_somebody_says_otherwise():
    assert priority.current() is Priority.NORMAL


def test_the_order_of_the_levels():
    assert Priority.LOW < Priority.NORMAL < Priority.HIGH < Priority.CRITICAL
    assert all(Priority)


def test_a_block_has_its_own_priority_and_gives_it_back():
    with priority.of(Priority.HIGH):
        assert priority.current() is Priority.HIGH
        with priority.of(Priority.LOW):
            assert priority.current() is Priority.LOW
        assert priority.current() is Priority.HIGH
    assert priority.current() is Priority.NORMAL


def test_it_is_given_back_after_an_error():
    with pytest.raises(OSError, match="broken"), priority.of(Priority.CRITICAL):
        raise OSError("broken")
    assert priority.current() is Priority.NORMAL


def test_as_a_decorator():
    @priority.of(Priority.LOW)
    def batch():
        return priority.current()

    assert [batch(), batch(), priority.current()] == [Priority.LOW, Priority.LOW, Priority.NORMAL]


@pytest.mark.parametrize("level", Priority)
def test_the_number_of_a_priority_is_a_priority(level):
    with priority.of(int(level)):
        assert priority.current() is level


@pytest.mark.parametrize("level", [0, 5, -1, 10**9])
def test_other_numbers_are_refused(level):
    with pytest.raises(
        ValueError, match=rf"priority.of: level={level} is not allowed; give one of Priority.LOW, "
    ):
        priority.of(level).__enter__()


@pytest.mark.parametrize("level", ["high", None, 2.0, True, Priority])
def test_what_is_no_number_is_refused(level):
    with pytest.raises(TypeError, match=r"Priority\.CRITICAL"):
        priority.of(level).__enter__()
    assert priority.current() is Priority.NORMAL


def test_low_level_use_by_middleware():
    token = priority._current.set(Priority.HIGH)
    assert priority.current() is Priority.HIGH
    priority._current.reset(token)
    assert priority.current() is Priority.NORMAL


def test_it_travels_into_the_threads_of_a_timeout():
    with virtual_time(), priority.of(Priority.HIGH):
        assert Pipeline(Timeout(5)).call(priority.current) is Priority.HIGH


def test_a_thread_of_ones_own_begins_anew():
    seen = []
    with priority.of(Priority.HIGH):
        thread = Thread(target=lambda: seen.append(priority.current()))
        thread.start()
        thread.join()
    assert seen == [Priority.NORMAL]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_tasks_have_the_priority_of_who_started_them(backend):
    async def main():
        seen = {}

        async def note(name):
            seen[name] = priority.current()

        async def low():
            with priority.of(Priority.LOW):
                await anyio.sleep(1)
                await note("low")

        async with anyio.create_task_group() as group:
            group.start_soon(low)
            with priority.of(Priority.HIGH):
                group.start_soon(note, "high")
            await anyio.sleep(0.5)
            await note("self")
        return seen

    assert run(main, backend=backend) == {
        "high": Priority.HIGH,
        "self": Priority.NORMAL,
        "low": Priority.LOW,
    }


def test_asyncio_threads_too():
    async def main():
        with priority.of(Priority.CRITICAL):
            return await asyncio.to_thread(priority.current)

    assert asyncio.run(main()) is Priority.CRITICAL


def test_it_can_be_copied_and_pickled_and_is_exported():
    assert copy.deepcopy(Priority.HIGH) is pickle.loads(pickle.dumps(Priority.HIGH)) is Priority.HIGH
    assert resilient.Priority is priority.Priority
    assert {"priority", "Priority", "LoadShed", "Shed"} <= set(resilient.__all__)
