"""How to test code that waits for hours. The fixtures come with the package."""

import pytest

from resilient import Pipeline, Retry, TimedOut, Timeout

nightly = Pipeline(Timeout(5 * 3600), Retry(10, on=ConnectionError, wait=3600))


def test_the_job_is_tried_every_hour(virtual_time, flaky, captured_events):
    job = flaky(ConnectionError, ConnectionError, "done")
    assert nightly.call(job) == "done"
    assert virtual_time.now() == 2 * 3600
    assert [event.name for event in captured_events] == ["retry.scheduled"] * 2


def test_it_gives_up_before_the_deadline(virtual_time, flaky):
    with pytest.raises(ConnectionError) as caught:
        nightly.call(flaky(ConnectionError))
    assert virtual_time.now() < 5 * 3600
    assert "deadline" in caught.value.__notes__[0]


def test_the_same_as_async_code(run_both):
    async def scenario(colour):
        async def hangs():
            await colour.sleep(24 * 3600)

        with pytest.raises(TimedOut):
            await colour.call(nightly, hangs)
        return colour.now()

    run_both(scenario)
