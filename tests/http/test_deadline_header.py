"""Deadlines in headers: what is one, what is none, and that nobody is given more time than there is."""

import dataclasses
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from resilient.http.deadline_header import DeadlineHeader

GRPC = "grpc-timeout"
ENVOY = "x-envoy-expected-rq-timeout-ms"
MILLISECONDS = "x-request-timeout-ms"
SECONDS = "x-request-timeout"
NAMES = [GRPC, ENVOY, MILLISECONDS, SECONDS]

VALUES = [
    # value, and the seconds that it says in each of the four formats
    ("", None, None, None, None),
    ("0", None, None, 0.0, 0.0),
    ("00", None, None, 0.0, 0.0),
    ("0m", 0.0, None, None, None),
    ("0.0", None, None, None, 0.0),
    ("1", None, 0.001, 0.001, 1.0),
    ("0250", None, 0.25, 0.25, 250.0),
    ("2H", 7200.0, None, None, None),
    ("2M", 120.0, None, None, None),
    ("2S", 2.0, None, None, None),
    ("2m", 0.002, None, None, None),
    ("2u", 0.000_002, None, None, None),
    ("2n", 0.000_000_002, None, None, None),
    ("2h", None, None, None, None),
    ("2s", None, None, None, None),
    ("2U", None, None, None, None),
    ("2N", None, None, None, None),
    ("2ms", None, None, None, None),
    ("2 m", None, None, None, None),
    ("m", None, None, None, None),
    ("m2", None, None, None, None),
    ("1m1m", None, None, None, None),
    ("1.5S", None, None, None, None),
    ("99999999H", 99_999_999 * 3600.0, None, None, None),
    ("100000000S", None, None, None, None),
    ("000000001S", None, None, None, None),
    ("999999999999", None, 999_999_999.999, 999_999_999.999, None),
    ("9999999999999", None, None, None, None),
    ("999999999", None, 999_999.999, 999_999.999, 999_999_999.0),
    ("1000000000", None, 1_000_000.0, 1_000_000.0, None),
    ("1.5", None, None, None, 1.5),
    ("0.000000001", None, None, None, 1e-9),
    ("0.0000000001", None, None, None, None),
    (".5", None, None, None, None),
    ("5.", None, None, None, None),
    ("1.2.3", None, None, None, None),
    ("1,5", None, None, None, None),
    ("1, 1", None, None, None, None),
    ("+1", None, None, None, None),
    ("-1", None, None, None, None),
    ("-0", None, None, None, None),
    ("-1S", None, None, None, None),
    ("+1S", None, None, None, None),
    ("1e3", None, None, None, None),
    ("1_0", None, None, None, None),
    ("0x10", None, None, None, None),
    ("nan", None, None, None, None),
    ("inf", None, None, None, None),
    ("Infinity", None, None, None, None),
    ("1\n", None, None, None, None),
    ("1S\n", None, None, None, None),
    ("1\x00", None, None, None, None),
    ("\u0661", None, None, None, None),
    ("\u00b9", None, None, None, None),
    ("\u0661S", None, None, None, None),
    ("9" * 5000, None, None, None, None),
    ("9" * 5000 + "S", None, None, None, None),
    (" \t1S ", 1.0, None, None, None),
    (" 1\t", None, 0.001, 0.001, 1.0),
    ("1; 1", None, None, None, None),
]


@pytest.mark.parametrize(("value", "grpc", "envoy", "milliseconds", "seconds"), VALUES)
def test_parse(value, grpc, envoy, milliseconds, seconds):
    for name, expected in zip(NAMES, (grpc, envoy, milliseconds, seconds), strict=True):
        header = DeadlineHeader.of(name)
        assert header.parse(value) == expected, name
        assert header.parse(value.encode()) == expected, name


@pytest.mark.parametrize(
    ("seconds", "grpc", "envoy", "milliseconds", "text"),
    [
        (0, "0n", "1", "0", "0"),
        (-1, "0n", "1", "0", "0"),
        (-0.0, "0n", "1", "0", "0"),
        (1e-10, "0n", "1", "0", "0"),
        (0.000_999, "999000n", "1", "0", "0"),
        (0.05, "50000000n", "50", "50", "0.05"),
        (0.099_999_999_9, "99999999n", "99", "99", "0.099"),
        (0.1, "100000u", "100", "100", "0.1"),
        (0.3, "300000u", "300", "300", "0.3"),
        (1, "1000000u", "1000", "1000", "1"),
        (1.001, "1001000u", "1001", "1001", "1.001"),
        (1.001_999, "1001999u", "1001", "1001", "1.001"),
        (10, "10000000u", "10000", "10000", "10"),
        (0.014_620_151_999_999_999, "14620151n", "14", "14", "0.014"),
        (70_687.338_999_999_99, "70687338m", "70687338", "70687338", "70687.338"),
        (99.999_999_9, "99999999u", "99999", "99999", "99.999"),
        (100, "100000m", "100000", "100000", "100"),
        (99_999.999_9, "99999999m", "99999999", "99999999", "99999.999"),
        (100_000, "100000S", "100000000", "100000000", "100000"),
        (100_000_000, "1666666M", "100000000000", "100000000000", "100000000"),
        (1e9, "16666666M", "999999999999", "999999999999", "999999999.999"),
        (6e9, "1666666H", "999999999999", "999999999999", "999999999.999"),
        (1e300, "99999999H", "999999999999", "999999999999", "999999999.999"),
    ],
)
def test_format(seconds, grpc, envoy, milliseconds, text):
    found = [DeadlineHeader.of(name).format(seconds) for name in NAMES]
    assert found == [grpc, envoy, milliseconds, text]


@pytest.mark.parametrize("name", [GRPC, MILLISECONDS, SECONDS])
@given(seconds=st.floats(0, 1e12))
@example(seconds=0.3)
@example(seconds=4.35)
@example(seconds=math.nextafter(0.1, 0))
@example(seconds=math.nextafter(1e9, 0))
@example(seconds=math.nextafter(6e9, 0))
def test_what_is_written_is_read_as_no_more_and_hardly_less(name, seconds):
    header = DeadlineHeader.of(name)
    read = header.parse(header.format(seconds))
    assert read is not None
    assert read <= seconds
    largest = 99_999_999 * 3600 if name == GRPC else 999_999_999.999
    wanted = min(seconds, largest)
    step = max(1e-9, wanted * 3600 / 99_999_999) if name == GRPC else 0.001
    assert wanted - read <= step * (1 + 1e-6)
    assert header.format(read) == header.format(seconds)


@given(seconds=st.floats(0, 1e12))
def test_envoy_is_never_told_that_there_is_no_limit(seconds):
    header = DeadlineHeader.of(ENVOY)
    read = header.parse(header.format(seconds))
    assert read is not None
    assert 0.001 <= read <= max(seconds, 0.001)


@pytest.mark.parametrize("name", NAMES)
@given(value=st.binary() | st.text() | st.from_regex(r"[0-9]{0,14}\.?[0-9]{0,10}[HMSmun]?", fullmatch=True))
def test_what_is_read_is_a_time_or_nothing(name, value):
    read = DeadlineHeader.of(name).parse(value)
    assert read is None or 0 <= read < 1e12


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_no_time_to_write(name, seconds):
    with pytest.raises(ValueError, match=r"seconds=-?(nan|inf) is not allowed; give a finite number of seconds"):
        DeadlineHeader.of(name).format(seconds)


@pytest.mark.parametrize("seconds", [None, "1", True])
def test_what_is_no_number_is_not_written(seconds):
    with pytest.raises(TypeError, match="give a finite number of seconds"):
        DeadlineHeader.of(GRPC).format(seconds)


def test_names_are_lower_case():
    assert DeadlineHeader.of("Grpc-Timeout").name == "grpc-timeout"
    assert DeadlineHeader.of("Grpc-Timeout").parse("1M") == 60
    assert DeadlineHeader.of("X-Timeout-MS").parse("1") == 0.001


@pytest.mark.parametrize("name", ["", "grpc timeout", "timeout:", "timeout\n", "tïmeout", "a,b"])
def test_bad_names(name):
    with pytest.raises(ValueError, match=r"DeadlineHeader: name=.* is not allowed; give the name of a header"):
        DeadlineHeader.of(name)


@pytest.mark.parametrize("name", [None, b"grpc-timeout", 1])
def test_names_are_text(name):
    with pytest.raises(TypeError, match="DeadlineHeader: name="):
        DeadlineHeader.of(name)


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DeadlineHeader.of(GRPC).name = "other"
