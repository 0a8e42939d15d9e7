"""How long a server asks to wait: every form of the fields, and whatever else it may send."""

import email.utils
import math
import time
from datetime import UTC, datetime, timedelta

import httpx
import httpx2
import pytest
import starlette.datastructures
from hypothesis import example, given
from hypothesis import strategies as st

from resilient.http import headers
from resilient.http.headers import (
    FOREVER,
    MOST,
    Member,
    Quota,
    age_value,
    http_date,
    lines,
    quota,
    retry_after,
    server_time,
    structured,
    throttled_for,
)

NOW = 1_784_000_000.0  # Tue, 14 Jul 2026 03:33:20 GMT


def date(seconds, *, of=email.utils.format_datetime):
    """Return an HTTP-date so many seconds from now."""
    moment = datetime.fromtimestamp(NOW + seconds, UTC)
    return of(moment, usegmt=True) if of is email.utils.format_datetime else moment.strftime(of)


def is_wait(value):
    return value is None or (isinstance(value, float) and 0 <= value <= FOREVER)


def is_count(value):
    return value is None or (type(value) is int and 0 <= value <= MOST)


# -- the fields of a message ----------------------------------------------------------------------------------

FIELDS = [("X-One", "1"), ("x-two", "2"), ("X-ONE", " 3\t")]


@pytest.mark.parametrize(
    "message",
    [
        httpx.Headers(FIELDS),
        httpx2.Headers(FIELDS),
        starlette.datastructures.Headers(raw=[(name.lower().encode(), v.encode()) for name, v in FIELDS]),
        FIELDS,
        tuple(FIELDS),
        [(name.encode(), value.encode()) for name, value in FIELDS],
    ],
    ids=["httpx", "httpx2", "starlette", "pairs", "tuple", "bytes"],
)
def test_fields_are_found_in_every_kind_of_message(message):
    assert lines(message, "x-one") == ["1", "3"]
    assert lines(message, "x-two") == ["2"]
    assert lines(message, "x-three") == []
    assert retry_after(message, NOW) is None


def test_a_mapping_has_one_field_of_a_name():
    assert lines({"X-One": " 1 "}, "x-one") == ["1"]
    assert retry_after({"retry-AFTER": "7"}, NOW) == 7.0


def test_bytes_that_are_not_text_do_no_harm():
    message = httpx.Headers([(b"Retry-After", b"\xff\xfe"), (b"X-\xff", b"1"), (b"Retry-After", b"3")])
    assert lines(message, "retry-after") == ["ÿþ", "3"]
    assert retry_after(message, NOW) == 3.0


# -- dates ----------------------------------------------------------------------------------------------------

WELL_KNOWN = 784111777.0


@pytest.mark.parametrize(
    "text",
    [
        "Sun, 06 Nov 1994 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "Sun Nov 06 08:49:37 1994",
        "sUN, 06 nOV 1994 08:49:37 gmt",
        "Mon, 06 Nov 1994 08:49:37 GMT",  # it was a Sunday
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_the_three_forms_of_a_date(text, strict):
    assert http_date(text, NOW, strict=strict) == WELL_KNOWN


@pytest.mark.parametrize(
    "text",
    [
        "Sun, 06 Nov 1994 08:49:37 UTC",
        "Sun, 06 Nov 1994 08:49:37 -0000",
        "Sun, 06 Nov 1994 08:49:37 +0000",
        "Sun, 06 Nov 1994 10:49:37 +0200",
        "Sun, 06 Nov 1994 03:19:37 -0530",
    ],
)
def test_other_zones_are_read_unless_a_cache_reads_them(text):
    assert http_date(text, NOW) == WELL_KNOWN
    assert http_date(text, NOW, strict=True) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "now",
        "Sun, 6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 94 08:49:37 GMT",
        "Sun, 06  Nov  1994 08:49:37 GMT",
        "Sun, 06-Nov-1994 08:49:37 GMT",
        "Sun 06 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 8:49:37 GMT",
        "Sun, 06 Nov 1994 08.49.37 GMT",
        "Sun, 06 Nov 1994 08:49 GMT",
        "Sun, 06 Nov 1994 08:49:37",
        "Sun, 06 Nov 1994 08:49:37 PST",
        "Sun, 06 Nov 1994 08:49:37 +2460",
        "Sun, 06 Nov 1994 08:49:37 +9999",
        "Sun, 06 Nov 1994 08:49:37 GMT ",
        "Sun, 00 Nov 1994 08:49:37 GMT",
        "Sun, 31 Nov 1994 08:49:37 GMT",
        "Sun, 29 Feb 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 24:49:37 GMT",
        "Sun, 06 Nov 1994 08:60:37 GMT",
        "Sun, 06 Nov 1994 08:49:61 GMT",
        "Sun, 06 Nov 0000 08:49:37 GMT",
        "Sun, 06 No\u0432 1994 08:49:37 GMT",
        "\u017fun, 06 Nov 1994 08:49:37 GMT",  # a long s, which is an `s` only when case does not matter
        "Sun, \u0660\u0666 Nov 1994 08:49:37 GMT",
        "Sun, 06-Nov-94 08:49:37 GMT",
        "Sunday, 06-Nov-94 08:49:37",
        "Sun Nov 6 08:49:37 1994",
        "Sun Nov  6 08:49:37 1994 GMT",
        "1994-11-06T08:49:37Z",
    ],
)
def test_no_dates(text):
    assert http_date(text, NOW) is None


def test_the_ends_of_time():
    assert http_date("Mon, 01 Jan 0001 00:00:00 GMT", NOW) == -62135596800.0
    assert http_date("Fri, 31 Dec 9999 23:59:59 GMT", NOW) == 253402300799.0
    assert http_date("Mon, 01 Jan 0001 00:00:00 +2359", NOW) == -62135596800.0 - 86340
    assert http_date("Fri, 31 Dec 9999 23:59:59 -2359", NOW) == 253402300799.0 + 86340
    assert http_date("Sat, 31 Dec 2016 23:59:60 GMT", NOW) == 1483228800.0  # a leap second


@pytest.mark.parametrize(
    ("text", "year"),
    [
        ("Tuesday, 14-Jul-26 03:33:20 GMT", 2026),
        ("Tuesday, 14-Jul-76 03:33:20 GMT", 2076),  # 50 years ahead, and no more
        ("Tuesday, 14-Jul-76 03:33:21 GMT", 1976),
        ("Wednesday, 15-Jul-76 03:33:20 GMT", 1976),
        ("Sunday, 13-Aug-76 03:33:20 GMT", 1976),
        ("Friday, 13-Jul-77 03:33:20 GMT", 1977),
        ("Friday, 31-Dec-99 23:59:59 GMT", 1999),
        ("Saturday, 01-Jan-00 00:00:00 GMT", 2000),
    ],
)
def test_the_century_of_a_year_with_two_digits(text, year):
    assert datetime.fromtimestamp(http_date(text, NOW), UTC).year == year


def test_the_century_moves_with_the_time():
    at = datetime(2099, 6, 1, tzinfo=UTC).timestamp()
    assert datetime.fromtimestamp(http_date("Thursday, 01-Jan-01 00:00:00 GMT", at), UTC).year == 2101
    assert datetime.fromtimestamp(http_date("Thursday, 01-Jan-70 00:00:00 GMT", 0.0), UTC).year == 1970
    assert datetime.fromtimestamp(http_date("Thursday, 01-Jan-20 00:00:00 GMT", 0.0), UTC).year == 2020
    assert http_date("Friday, 01-Jan-20 00:00:01 GMT", 0.0) < http_date("Thu Jan  1 00:00:00 1920", 0.0) + 2


@given(st.integers(-62135596800, 253402300799))
def test_dates_come_back(seconds):
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    text = email.utils.format_datetime(moment, usegmt=True)
    assert http_date(text, NOW, strict=True) == seconds
    year = f"{moment.year:04}"
    assert http_date(f"Sun {moment:%b} {moment.day:2} {moment:%H:%M:%S} {year}", NOW, strict=True) == seconds


@pytest.mark.skipif(not hasattr(time, "tzset"), reason="no tzset on this system")
def test_the_local_zone_does_not_leak_in(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert http_date("Sun Nov  6 08:49:37 1994", NOW) == WELL_KNOWN
        assert http_date("Sunday, 06-Nov-94 08:49:37 GMT", NOW) == WELL_KNOWN
        assert http_date("Sun, 06 Nov 1994 08:49:37 -0000", NOW) == WELL_KNOWN
    finally:
        monkeypatch.undo()
        time.tzset()


def test_every_day_and_month_has_its_name():
    for day in range(366):
        text = date(day * 86400)
        assert http_date(text, 0.0, strict=True) == NOW + day * 86400
        assert http_date(date(day * 86400, of="%A, %d-%b-%y %H:%M:%S GMT"), NOW) == NOW + day * 86400
        assert http_date(date(day * 86400, of="%a %b %d %H:%M:%S %Y"), NOW) == NOW + day * 86400
        assert retry_after({"Retry-After": f"1, {text}"}, NOW) == max(day * 86400, 1)


def test_the_time_of_the_server():
    assert server_time({"Date": date(-5)}, NOW) == NOW - 5
    assert server_time({"Date": "yesterday"}, NOW) == NOW
    assert server_time([("Date", "yesterday"), ("Date", date(3)), ("Date", date(4))], NOW) == NOW + 3
    assert server_time({}, NOW) == NOW


# -- Retry-After ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        ("0", 0.0),
        ("007", 7.0),
        (" 5\t", 5.0),
        ("2147483648", FOREVER),
        ("2147483649", FOREVER),
        ("2147483647", FOREVER - 1),
        ("9" * 10_000, FOREVER),
        ("0" * 10_000 + "9", 9.0),
        ("1" + "0" * 400, FOREVER),
        (date(30), 30.0),
        (date(30, of="%A, %d-%b-%y %H:%M:%S GMT"), 30.0),
        (date(30, of="%a %b %d %H:%M:%S %Y"), 30.0),
        (date(30, of="%a, %d %b %Y %H:%M:%S -0000"), 30.0),
        (date(0), 0.0),
        (date(-30), 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", FOREVER),
        ("Mon, 01 Jan 0001 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after(text, seconds):
    assert retry_after({"Retry-After": text}, NOW) == seconds


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "\u00b2", "\u0663", "1e9", "nan", "inf", "-1", "+5", "1_0", "1.5", "0x10", "5s", "5 5", "soon"),
        *("\x0b5", "5\x85", "\xa05", "Sun, 06 Nov 1994", "2026-07-14T03:33:20Z"),
    ],
)
def test_retry_after_that_nobody_can_read_is_ignored(text):
    assert retry_after([("Retry-After", text)], NOW) is None


def test_a_date_is_relative_to_the_clock_of_the_server():
    message = {"Date": date(-3600), "Retry-After": date(-3540)}
    assert retry_after(message, NOW) == 60.0
    assert retry_after(message, 0.0) == 60.0
    assert retry_after({"Date": "broken", "Retry-After": date(60)}, NOW) == 60.0
    assert retry_after({"Date": date(-3600), "Retry-After": "60"}, NOW) == 60.0


@pytest.mark.parametrize(
    "message",
    [
        [("Retry-After", "5"), ("Retry-After", "soon"), ("Retry-After", "60"), ("Retry-After", "7")],
        [("Retry-After", date(60)), ("Retry-After", "5")],
        {"Retry-After": f"5, {date(60)}, soon,7"},  # as a mapping joins them
        {"Retry-After": f"{date(60)}, {date(6)}"},
        {"Retry-After": f"{date(60, of='%A, %d-%b-%y %H:%M:%S GMT')}, 1"},
        {"Retry-After": "1,,60"},
    ],
)
def test_of_several_fields_the_longest_wait_counts(message):
    assert retry_after(message, NOW) == 60.0


# -- quotas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        # The current draft.
        ({"RateLimit": '"default";r=50;t=30'}, Quota(None, 50, 30.0)),
        ({"RateLimit": "default;r=50;t=30"}, Quota(None, 50, 30.0)),
        ({"RateLimit": '"default"; r=0'}, Quota(None, 0, None)),
        ({"RateLimit": '"d";r=999;pk=:dHJpYWwxMjEzMjM=:'}, Quota(None, 999, None)),
        ({"RateLimit": '"d";t=5;r=3;acme-burst;x=?0;y=1.5;z=@17'}, Quota(None, 3, 5.0)),
        ({"RateLimit": '"d";r=3;t=999999999999999'}, Quota(None, 3, FOREVER)),
        ({"RateLimit": f'"d";r={MOST};t=0'}, Quota(None, MOST, 0.0)),
        (
            {"RateLimit": '"perhr";r=20;t=1800', "RateLimit-Policy": '"permin";q=50;w=60, "perhr";q=1000;w=3600'},
            Quota(1000, 20, 1800.0),
        ),
        ({"RateLimit": '"a";r=1;t=1', "RateLimit-Policy": "broken"}, Quota(None, 1, 1.0)),
        ({"RateLimit": '"a";r=1;t=1', "RateLimit-Policy": '"a";q=-5;w=60'}, Quota(None, 1, 1.0)),
        ({"RateLimit": '"a";r=1;t=1', "RateLimit-Policy": '"a";q="5"'}, Quota(None, 1, 1.0)),
        ({"RateLimit": '"a \\"b\\"";r=1', "RateLimit-Policy": '"a \\"b\\"";q=9'}, Quota(9, 1, None)),
        # Several policies: the one that stops soonest.
        ({"RateLimit": '"min";r=5;t=60, "day";r=3;t=7200'}, Quota(None, 3, 7200.0)),
        ({"RateLimit": '"min";r=0;t=60, "day";r=0;t=7200, "sec";r=0'}, Quota(None, 0, 7200.0)),
        ({"RateLimit": '"min";r=0;t=60, "day";r=9;t=7200'}, Quota(None, 0, 60.0)),
        ([("RateLimit", '"a";r=5;t=6'), ("RateLimit", '"b";r=4;t=7')], Quota(None, 4, 7.0)),
        ({"RateLimit": '"bad";r=-1;t=60, "good";r=9;t=7, "none";t=1'}, Quota(None, 9, 7.0)),
        # Older drafts.
        ({"RateLimit": "limit=100, remaining=50, reset=30"}, Quota(100, 50, 30.0)),
        ({"RateLimit": "remaining=0,reset=30;x=1"}, Quota(None, 0, 30.0)),
        ({"RateLimit": "reset=30"}, Quota(None, None, 30.0)),
        ({"RateLimit": "remaining=5"}, Quota(None, 5, None)),
        ({"RateLimit": "remaining=-1, reset=30"}, Quota(None, None, 30.0)),
        (
            {"RateLimit-Limit": "100, 100;w=60", "RateLimit-Remaining": "5", "RateLimit-Reset": "7"},
            Quota(100, 5, 7.0),
        ),
        ({"RateLimit-Limit": "100;w=21600", "RateLimit-Remaining": "76;w=21600"}, Quota(100, 76, None)),
        # What was there before.
        ({"X-RateLimit-Limit": "60", "X-RateLimit-Remaining": "0", "X-RateLimit-Reset": "12"}, Quota(60, 0, 12.0)),
        (
            {"x-rate-limit-limit": "60", "x-rate-limit-remaining": "3", "x-rate-limit-reset": "12"},
            Quota(60, 3, 12.0),
        ),
        ({"X-RateLimit-Remaining": "595.0", "X-RateLimit-Reset": "1.5"}, Quota(None, 595, 1.5)),
        ({"X-RateLimit-Remaining": "9" * 5000}, Quota(None, MOST, None)),
        ({"X-RateLimit-Remaining": "0" * 5000 + "5"}, Quota(None, 5, None)),
        ({"X-RateLimit-Limit": "many", "X-RateLimit-Remaining": "5"}, Quota(None, 5, None)),
        (
            [
                *(("X-RateLimit-Remaining", text) for text in ("9", "2")),
                *(("X-RateLimit-Reset", text) for text in ("3", "600")),
                *(("X-RateLimit-Limit", text) for text in ("10", "99")),
            ],
            Quota(10, 2, 600.0),
        ),
        # The better field counts, but only if it can be read.
        ({"RateLimit": '"a";r=5;t=6', "X-RateLimit-Remaining": "1"}, Quota(None, 5, 6.0)),
        ({"RateLimit": '"a";r=5;', "X-RateLimit-Remaining": "1"}, Quota(None, 1, None)),
        ({"RateLimit-Limit": "5", "X-RateLimit-Remaining": "1"}, Quota(None, 1, None)),
        ({"RateLimit-Remaining": "4", "X-RateLimit-Remaining": "1"}, Quota(None, 4, None)),
        ({"X-RateLimit-Remaining": "4", "X-Rate-Limit-Remaining": "1"}, Quota(None, 4, None)),
        # Nothing to say.
        ({}, None),
        ({"RateLimit": ""}, None),
        ({"RateLimit": "limit=5"}, None),
        ({"RateLimit": "remaining=few"}, None),
        ({"RateLimit": '"a"'}, None),
        ({"RateLimit": '"a";r=1.5'}, None),
        ({"RateLimit": '"a";r="5"'}, None),
        ({"RateLimit": '"a";r'}, None),
        ({"RateLimit": '"a";r=1234567890123456'}, None),
        ({"RateLimit": '("a" "b");r=1'}, None),
        ({"RateLimit": '"a";r=5 "b"'}, None),
        ({"RateLimit": '"a";r=5,'}, None),
        ({"RateLimit": '"a;r=5'}, None),
        ({"RateLimit": '"ä";r=5'}, None),
        ({"X-RateLimit-Limit": "5"}, None),
        ({"X-RateLimit-Remaining": "-5", "X-RateLimit-Reset": "-5"}, None),
        ({"X-RateLimit-Remaining": "\u0665", "X-RateLimit-Reset": "soon"}, None),
        ({"X-RateLimit-Remaining": "5x", "X-RateLimit-Reset": "1e3"}, None),
    ],
)
def test_quota(message, expected):
    assert quota(message, NOW) == expected


@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        ("0", 0.0),
        ("30", 30.0),
        ("0.25", 0.25),
        ("999999999", 999999999.0),
        (f"{NOW + 30:.0f}", 30.0),
        (f"{NOW + 30.5}", 30.5),
        (f"{NOW - 30:.0f}", 0.0),
        (f"{NOW * 1000 + 30_000:.0f}", 30.0),
        (f"{NOW * 1000 - 30_000:.0f}", 0.0),
        ("1000000000", 0.0),
        ("100000000000", 0.0),  # in 1973, in milliseconds
        ("99999999999", FOREVER),  # in 5138, in seconds
        (date(30), 30.0),
        (date(-30), 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", FOREVER),
        ("9" * 400, FOREVER),
    ],
)
@pytest.mark.parametrize("name", ["RateLimit-Reset", "X-RateLimit-Reset", "X-Rate-Limit-Reset"])
def test_a_reset_is_a_time_or_a_point_in_time(name, reset, seconds):
    assert quota({name: reset}, NOW) == Quota(None, None, seconds)
    moved = {name: reset, "Date": date(0)}
    assert quota(moved, NOW + 1e6) == Quota(None, None, seconds)


def test_a_quota_from_a_cache_is_old_news():
    assert quota({"RateLimit": '"a";r=5;t=6', "Age": "1"}, NOW) is None
    assert quota({"RateLimit": '"a";r=5;t=6', "Age": "0"}, NOW) == Quota(None, 5, 6.0)
    assert quota({"RateLimit": '"a";r=5;t=6', "Age": "old"}, NOW) == Quota(None, 5, 6.0)


def test_a_quota_is_frozen_and_hashable():
    assert len({Quota(1, 2, 3.0), Quota(1, 2, 3.0)}) == 1
    with pytest.raises(AttributeError):
        Quota(1, 2, 3.0).limit = 2


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("7200", 7200.0),
        ("7200, 0", 7200.0),
        ("7200 , 0", 7200.0),
        ("0, 7200", 0.0),
        ("abc", 0.0),
        ("-7200", 0.0),
        ("7200.0", 0.0),
        ("7200;foo=111", 0.0),
        ("2147483649", FOREVER),
        ("", 0.0),
    ],
)
def test_age_value(text, age):
    assert age_value({"Age": text}) == age
    assert age_value([("Age", part) for part in text.split(",")]) == age


# -- the wait that a server asks for --------------------------------------------------------------------------

EXHAUSTED = {"RateLimit": '"a";r=0;t=30'}


@pytest.mark.parametrize(
    ("status", "message", "expected"),
    [
        (429, {"Retry-After": "5"}, 5.0),
        (503, {"Retry-After": "5"}, 5.0),
        (413, {"Retry-After": "5"}, 5.0),
        (300, {"Retry-After": "5"}, 5.0),
        (301, {"Retry-After": "5"}, 5.0),
        (299, {"Retry-After": "5"}, None),
        (500, {"Retry-After": "5"}, 5.0),
        (200, {"Retry-After": "5"}, None),
        (202, {"Retry-After": "5"}, None),
        (101, {"Retry-After": "5"}, None),
        (429, {"Retry-After": "0", **EXHAUSTED}, 0.0),
        (429, {"Retry-After": "5", **EXHAUSTED}, 5.0),
        (429, {"Retry-After": "soon", **EXHAUSTED}, 30.0),
        (429, EXHAUSTED, 30.0),
        (503, EXHAUSTED, 30.0),
        (403, EXHAUSTED, None),
        (500, EXHAUSTED, None),
        (200, EXHAUSTED, None),
        (429, {"RateLimit": '"a";r=1;t=30'}, None),
        (429, {"RateLimit": '"a";r=0'}, None),
        (429, {"X-RateLimit-Reset": "30"}, 30.0),
        (429, {}, None),
        (503, {}, None),
    ],
)
def test_throttled_for(status, message, expected):
    assert throttled_for(status, message, NOW) == expected


# -- structured fields ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "members"),
    [
        (["a"], [Member(None, "a", {})]),
        (['"abc"'], [Member(None, "abc", {})]),
        (["1,-2"], [Member(None, 1, {}), Member(None, -2, {})]),
        ([" 1 \t,\t2 "], [Member(None, 1, {}), Member(None, 2, {})]),
        (["1", "2"], [Member(None, 1, {}), Member(None, 2, {})]),
        (["a=1;x;y=2, b=?0"], [Member("a", 1, {"x": "?1", "y": 2}), Member("b", "?0", {})]),
        (['"a,b\\\\";  x=1;x=2'], [Member(None, "a,b\\", {"x": 2})]),
        (["*a/b:c;*=1"], [Member(None, "*a/b:c", {"*": 1})]),
        (["1.5, @-7, :aGk=:, ?1"], [Member(None, text, {}) for text in ("1.5", "@-7", ":aGk=:", "?1")]),
        (['%"f%c3%bc"'], [Member(None, '%"f%c3%bc"', {})]),
        (["999999999999999"], [Member(None, MOST, {})]),
    ],
)
def test_structured_fields(values, members):
    assert structured(values) == members


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            ",",
            "a,",
            ",a",
            "a,,b",
            "a b",
            "a;",
            "a; ;b",
            "a ;b",
            "a;B=1",
            "a;b= 1",
            "a;b=",
            "A=1",
            "=1",
            "a==1",
        ),
        *(
            '"',
            '"a',
            '"a\\b"',
            '"\t"',
            '"\x7f"',
            '"ä"',
            "1.",
            ".5",
            "1.1234",
            "1234567890123456",
            "--1",
            "-",
            "?2",
            "?",
        ),
        *(":a", "(a b)", "é", "a;b=(1)", "@1.5", "\x00", "\ta"),
    ],
)
def test_malformed_structured_fields(text):
    assert structured([text]) is None


# -- whatever a server may send -------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-10, 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(["", "0", "\u0663", "1e9", "9" * 5000, f"{NOW:.0f}", f"{NOW * 1000:.0f}", "1.5", "-1"]),
)
MOMENTS = st.one_of(
    NUMBERS,
    st.datetimes().map(lambda moment: f"{moment:%a, %d %b %Y %H:%M:%S} GMT"),
    st.datetimes().map(lambda moment: f"{moment:%A, %d-%b-%y %H:%M:%S} GMT"),
    st.datetimes().map(lambda moment: f"{moment:%a %b %d %H:%M:%S %Y}"),
    st.from_regex(headers._DATES[0], fullmatch=True),
    st.from_regex(headers._DATES[1], fullmatch=True),
    st.from_regex(headers._DATES[2], fullmatch=True),
)
PIECES = st.lists(
    st.sampled_from(
        [
            *(
                '"',
                "a",
                '"a"',
                "=",
                ";",
                ",",
                " ",
                "r",
                "t",
                "q",
                ";r=",
                ";t=",
                "limit=",
                "remaining=",
                "reset=",
                "\\",
            ),
            *("0", "5", "-", ".", "9" * 20, ":", "?1", "@", "%", "(", ")", "\t", "\x7f", "é", "Mon", " GMT"),
        ]
    )
).map("".join)
COUNTED = [
    f"{prefix}-{what}" for prefix in ("RateLimit", "X-RateLimit") for what in ("Limit", "Remaining", "Reset")
]
NAMES = st.sampled_from(
    [*COUNTED, "x-rate-limit-reset", "RateLimit", "RateLimit-Policy", "Retry-After", "Date", "Age"]
)
VALUES = st.one_of(
    st.text(),
    MOMENTS,
    PIECES,
    st.lists(MOMENTS).map(", ".join),
    st.from_regex(headers._MEMBER, fullmatch=True),
)
MESSAGES = st.lists(st.tuples(NAMES, VALUES), max_size=6)
NOWS = st.one_of(st.just(NOW), st.floats(0, 1e11))


@given(st.integers(100, 599), MESSAGES, NOWS)
@example(429, [("RateLimit", '"' + "\\" * 1001), ("Age", ",")], NOW)
def test_nothing_raises_and_everything_is_bounded(status, message, now):
    for of in (message, dict(message), [(n.encode(), v.encode("utf-8", "replace")) for n, v in message]):
        assert is_wait(retry_after(of, now))
        assert is_wait(throttled_for(status, of, now))
        assert is_wait(age_value(of))
        assert math.isfinite(server_time(of, now))
        found = quota(of, now)
        if found is not None:
            assert is_count(found.limit)
            assert is_count(found.remaining)
            assert is_wait(found.reset)
            assert found.remaining is not None or found.reset is not None


@given(st.lists(st.integers(0, 10**6), min_size=1), MESSAGES)
def test_a_wait_is_never_shorter_than_any_that_was_asked_for(waits, noise):
    message = [*noise, *(("Retry-After", str(wait)) for wait in waits)]
    assert retry_after(message, NOW) >= max(waits)


@given(st.text(), st.booleans())
def test_any_text_as_a_date(text, strict):
    assert http_date(text, NOW, strict=strict) is None


SAFE_TEXT = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E))


@given(st.lists(st.tuples(SAFE_TEXT, st.integers(0, MOST), st.integers(0, MOST)), min_size=1))
def test_a_rate_limit_as_the_draft_writes_it_is_read(policies):
    def quoted(name):
        return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'

    field = ", ".join(f"{quoted(name)};r={remaining};t={reset}" for name, remaining, reset in policies)
    remaining, reset = min(((r, t) for _, r, t in policies), key=lambda one: (one[0], -one[1]))
    assert quota({"RateLimit": field}, NOW) == Quota(None, remaining, min(float(reset), FOREVER))


@pytest.mark.parametrize(
    "text",
    [
        '"' * 100_000,
        '"' + '\\"' * 50_000,
        "a," * 50_000,
        "a;" * 50_000,
        '"a";r=' * 20_000,
        "1" * 100_000,
        "a=" * 50_000,
        "Mon, " * 20_000,
        " " * 100_000,
        ";x=1" * 25_000,
        "a" + ";x=1" * 25_000 + "!",
    ],
    ids=range(11),
)
@pytest.mark.parametrize(
    "name", ["RateLimit", "Retry-After", "X-RateLimit-Reset", "X-RateLimit-Remaining", "Date"]
)
@pytest.mark.timeout(10)  # a quadratic parser takes minutes
def test_long_fields_take_linear_time(name, text):
    message = {name: text, "Retry-After": "x"} if name == "Date" else {name: text}
    assert is_wait(throttled_for(429, message, NOW))
