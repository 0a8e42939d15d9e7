"""Rates: so many in so much time."""

from datetime import timedelta

import pytest

from resilient import Rate


@pytest.mark.parametrize(
    ("text", "limit", "per"),
    [
        ("100/minute", 100, 60.0),
        ("5/10s", 5, 10.0),
        ("5 per 10 s", 5, 10.0),
        ("5 PER 10 Seconds", 5, 10.0),
        ("  7 / hour ", 7, 3600.0),
        ("1000/2h", 1000, 7200.0),
        ("1/ms", 1, 0.001),
        ("3/250 milliseconds", 3, 0.25),
        ("2/1.5min", 2, 90.0),
        ("9/m", 9, 60.0),
        ("4/sec", 4, 1.0),
        ("6/days", 6, 86400.0),
        ("6/d", 6, 86400.0),
    ],
)
def test_text(text, limit, per):
    rate = Rate.of("RateLimit", text)
    assert rate == Rate(limit, per=per)
    assert rate.micros == round(per * 1_000_000)


def test_a_rate_is_taken_as_it_is():
    rate = Rate(3, per=2)
    assert Rate.of("RateLimit", rate) is rate


def test_the_period_may_be_a_timedelta_and_is_a_second_by_default():
    assert Rate(3, per=timedelta(minutes=2)) == Rate(3, per=120.0)
    assert Rate(3).micros == 1_000_000


def test_it_reads_well_is_hashable_and_frozen():
    assert str(Rate(100, per=60)) == "100 per 60 s"
    assert len({Rate(1), Rate(1, per=1.0), Rate(2)}) == 2
    with pytest.raises(AttributeError):
        Rate(1).limit = 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "/minute",
        "100/",
        "100 minute",
        "100/fortnight",
        "-1/s",
        "1.5/s",
        "0/s",
        "1/0s",
        "1/-2s",
        "1/s/s",
        "1/2",
        "one/s",
        "1/0.0000001s",
        "\u0661/s",  # a digit, but not one of ours
        "1/\u017f",  # a long s, which is an `s` only when case does not matter
    ],
)
def test_bad_text(text):
    with pytest.raises(ValueError, match=r"not allowed; give"):
        Rate.of("RateLimit", text)


@pytest.mark.parametrize("value", [None, 5, 5.0, ("5", "s"), b"5/s", timedelta(1)])
def test_bad_type(value):
    with pytest.raises(TypeError, match=r'RateLimit: rate=.* is not allowed; give a rate such as "100/minute"'):
        Rate.of("RateLimit", value)


def test_a_function_in_its_place_is_told_about_the_parentheses():
    with pytest.raises(TypeError, match="To decorate a function write @RateLimit"):
        Rate.of("RateLimit", test_bad_type)


@pytest.mark.parametrize(
    ("limit", "per", "kind", "message"),
    [
        (0, 1, ValueError, "Rate: limit=0 is not allowed; give an int >= 1"),
        (1.5, 1, TypeError, "Rate: limit=1.5 is not allowed"),
        (True, 1, TypeError, "Rate: limit=True is not allowed"),
        (1, 0, ValueError, "Rate: per=0 is not allowed"),
        (1, -1, ValueError, "Rate: per=-1 is not allowed"),
        (1, float("nan"), ValueError, "Rate: per=nan is not allowed"),
        (1, float("inf"), ValueError, "Rate: per=inf is not allowed"),
        (1, "s", TypeError, "Rate: per='s' is not allowed"),
        (1, 1e-7, ValueError, "Rate: per=1e-07 is not allowed; give at least a microsecond"),
    ],
)
def test_bad_numbers(limit, per, kind, message):
    with pytest.raises(kind, match=message.replace("+", r"\+")):
        Rate(limit, per=per)
