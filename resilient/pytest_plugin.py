"""Fixtures of `resilient.testing` for pytest, found through the package's entry point.

The package itself is imported only by the tests that ask for a fixture.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from resilient import testing
    from resilient.events import Event


@pytest.fixture
def virtual_time() -> "Iterator[testing.VirtualTime]":
    """Virtual time for the whole test: `virtual_time.now()`, `virtual_time.sleep(3600)`."""
    from resilient import testing

    with testing.virtual_time() as clock:
        yield clock


@pytest.fixture
def captured_events() -> "Iterator[list[Event]]":
    """The events of all policies, as a list that grows during the test."""
    from resilient import testing

    with testing.capture_events() as collected:
        yield collected


@pytest.fixture
def flaky() -> "Callable[..., testing.Flaky]":
    """`resilient.testing.flaky`: make a function with scripted outcomes."""
    from resilient import testing

    return testing.flaky


@pytest.fixture
def run_both() -> "Callable[..., Any]":
    """`resilient.testing.run_both`: run a scenario as sync code, on asyncio and on trio."""
    from resilient import testing

    return testing.run_both
