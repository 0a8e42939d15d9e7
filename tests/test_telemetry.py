import logging

import pytest

import resilient
from resilient import CircuitBreaker, Retry
from resilient.telemetry.logging import LoggingListener
from resilient.testing import flaky, virtual_time


@pytest.fixture(autouse=True)
def _time():
    with virtual_time():
        yield


def fail_once_and_for_all(policy):
    with pytest.raises(OSError, match="secret"):
        policy.call(flaky(OSError("secret")))


def test_records_say_what_happened_and_carry_the_fields(caplog):
    caplog.set_level(logging.DEBUG)
    policy = Retry(2, on=OSError, wait=0.25, name="payments")
    with resilient.listen(LoggingListener()):
        fail_once_and_for_all(policy)
    fail_once_and_for_all(policy)  # nobody listens any more
    scheduled, gave_up = caplog.records
    assert (scheduled.name, scheduled.levelno) == ("resilient", logging.INFO)
    assert scheduled.getMessage() == "retry.scheduled policy=payments attempt=1 delay=0.25 error=OSError"
    assert scheduled.resilient == {
        "event": "retry.scheduled",
        "policy": "payments",
        "attempt": 1,
        "delay": 0.25,
        "error": "OSError",
    }
    assert gave_up.levelno == logging.WARNING
    assert gave_up.getMessage().startswith("retry.gave_up policy=payments attempts=2")
    assert "secret" not in caplog.text


def test_one_level_for_all_and_a_logger_of_ones_own(caplog):
    logger = logging.getLogger("mine")
    caplog.set_level(logging.DEBUG, "mine")
    breaker = CircuitBreaker(consecutive=1)
    with breaker.listen(LoggingListener(logger, level=logging.DEBUG)):
        fail_once_and_for_all(breaker)
    assert [(record.name, record.levelno) for record in caplog.records] == [("mine", logging.DEBUG)]


def test_nothing_is_put_together_for_a_logger_that_does_not_want_it(caplog):
    caplog.set_level(logging.ERROR, "resilient")
    breaker = CircuitBreaker(consecutive=1)
    with breaker.listen(LoggingListener("resilient")):
        fail_once_and_for_all(breaker)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logger": 3}, "logger=3"),
        ({"level": "INFO"}, "level='INFO'"),
        ({"level": True}, "level=True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(TypeError, match=f"LoggingListener: {message} is not allowed"):
        LoggingListener(**options)
