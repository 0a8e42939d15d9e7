"""What the tests of the middleware have in common; they drive applications by `driver.py`."""

import pytest


@pytest.fixture(params=["asyncio", "trio"])
def backend(request):
    """The event loop of a test."""
    return request.param
