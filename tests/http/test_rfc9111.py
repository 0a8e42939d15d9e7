"""The rules of HTTP caching, as tables: what is stored, under what, for how long, and who may have it."""

import email.utils
import itertools
import math
from datetime import UTC, datetime

import httpx
import httpx2
import pytest
import starlette.datastructures
from hypothesis import example, given
from hypothesis import strategies as st

from resilient.http import headers, rfc9111
from resilient.http.headers import FOREVER
from resilient.http.rfc9111 import (
    Directives,
    Lifetime,
    Use,
    age,
    cache_key,
    cache_status,
    confirms,
    credentials_key,
    demands,
    freshened,
    invalidated,
    lifetime,
    revalidation_headers,
    storable,
    stored_headers,
    vary_key,
)

NOW = 1_784_000_000.0
NOTHING = Use(now=False, while_refreshing=False, on_error=False)


def date(seconds):
    return email.utils.format_datetime(datetime.fromtimestamp(NOW + seconds, UTC), usegmt=True)


def control(*values):
    return [("Cache-Control", value) for value in values]


# -- directives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "flags", "seconds"),
    [
        ([], set(), {}),
        ([""], set(), {}),
        ([",, ;"], set(), {}),
        (["max-age=3600"], set(), {"max-age": 3600.0}),
        (["MaX-aGe=3600, No-StOrE"], {"no-store"}, {"max-age": 3600.0}),
        (["foobar, max-age=3600, x=y"], set(), {"max-age": 3600.0}),
        (["max-age=3600", "no-cache"], {"no-cache"}, {"max-age": 3600.0}),
        # Numbers: quoted ones too, huge ones end at 2^31.
        (['max-age="3600"'], set(), {"max-age": 3600.0}),
        (['max-age="36\\00"'], set(), {"max-age": 3600.0}),
        (["max-age=003600"], set(), {"max-age": 3600.0}),
        (["max-age = 3600"], set(), {"max-age": 3600.0}),
        (["max-age=2147483647"], set(), {"max-age": FOREVER - 1}),
        (["max-age=2147483649"], set(), {"max-age": FOREVER}),
        (["max-age=" + "9" * 5000], set(), {"max-age": FOREVER}),
        # What cannot be read counts as strictly as it can.
        *(
            ([f"max-age{bad}"], set(), {"max-age": 0.0})
            for bad in ("", "=", "=-1", "=a1", "=1a", "=1.5", "='1'", '="1"2')
        ),
        *(
            ([f"{name}=x"], set(), {name: 0.0})
            for name in ("s-maxage", "stale-if-error", "stale-while-revalidate")
        ),
        (["max-age=\u0663"], set(), {"max-age": 0.0}),
        (["max-stale=x"], set(), {"max-stale": 0.0}),
        (["min-fresh=x"], set(), {"min-fresh": FOREVER}),
        (["max-stale"], set(), {"max-stale": FOREVER}),
        # Of several the strictest.
        (["max-age=1800, max-age=1"], set(), {"max-age": 1.0}),
        (["max-age=1", "max-age=1800"], set(), {"max-age": 1.0}),
        (["max-age=1, max-age=x"], set(), {"max-age": 0.0}),
        (["max-stale, max-stale=5"], set(), {"max-stale": 5.0}),
        (["min-fresh=5, min-fresh=9, min-fresh=7"], set(), {"min-fresh": 9.0}),
        (["stale-if-error=9, stale-if-error=5"], set(), {"stale-if-error": 5.0}),
        # Quotes.
        (['x="max-age=3600", max-age=1'], set(), {"max-age": 1.0}),
        (['max-age=1, x="max-age=3600, no-store"'], set(), {"max-age": 1.0}),
        (['x="\\", no-store", public'], {"public"}, {}),
        (['"no-store", public'], {"public"}, {}),
        (['x="no-store'], {"no-store"}, {}),
        (['x="a\\', "public"], {"no-store", "public"}, {}),
        # Arguments where none belong.
        (['private="set-cookie", no-cache="a, b"'], {"private", "no-cache"}, {}),
        (["no-store=yes, must-revalidate=0"], {"no-store", "must-revalidate"}, {}),
        (["public=yes, must-understand=1, public="], set(), {}),
        (["public, must-understand"], {"public", "must-understand"}, {}),
        # Separators and other rubbish.
        (["no-cache; no-store"], {"no-cache", "no-store"}, {}),
        (["no-cache no-store"], set(), {}),
        (["=no-store, no-cache\t"], {"no-cache"}, {}),
        (["only-if-cached,proxy-revalidate"], {"only-if-cached", "proxy-revalidate"}, {}),
    ],
)
def test_directives(values, flags, seconds):
    for found in (Directives.of_response(control(*values)), Directives.of_request(control(*values))):
        assert (found.flags, found.seconds) == (flags, seconds)
        assert all(name in found for name in (*flags, *seconds))
        assert "immutable" not in found


def test_pragma_is_for_requests_without_cache_control():
    assert "no-cache" in Directives.of_request([("Pragma", "x=y, No-Cache ")])
    assert "no-cache" not in Directives.of_request([("Pragma", "no-cache"), ("Cache-Control", "max-stale")])
    assert "no-cache" not in Directives.of_request([("Pragma", "x, no-cached")])
    assert "no-cache" in Directives.of_request([("Pragma", "x"), ("Pragma", "no-cache")])
    assert "no-cache" not in Directives.of_response([("Pragma", "no-cache")])
    assert Directives.of_request([("Pragma", "no-store, max-age=5")]).flags == set()


# -- what is stored -------------------------------------------------------------------------------------------

FINE = control("max-age=60")
WHO = [("Authorization", "Bearer x")]


@pytest.mark.parametrize(
    ("method", "request_headers", "status", "response_headers", "private", "shared"),
    [
        # Methods.
        ("GET", [], 200, FINE, True, True),
        ("GET", [], 200, [], True, True),
        ("HEAD", [], 200, FINE, False, False),
        ("POST", [], 200, FINE, False, False),
        ("QUERY", [], 200, FINE, False, False),
        ("get", [], 200, FINE, False, False),
        # Statuses: those with a default freshness need no word from the origin, others do.
        *(
            ("GET", [], status, [], True, True)
            for status in (200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 451)
        ),
        *(("GET", [], status, [], False, False) for status in (201, 202, 302, 303, 307, 400, 401, 403, 429, 499)),
        *(("GET", [], status, FINE, True, True) for status in (201, 302, 307, 403, 429, 499)),
        *(
            ("GET", [], status, FINE, False, False)
            for status in (100, 101, 103, 199, 206, 304, 500, 501, 503, 599)
        ),
        # What counts as a word from the origin.
        ("GET", [], 302, control("public"), True, True),
        ("GET", [], 302, control("private"), True, False),
        ("GET", [], 302, control("s-maxage=5"), False, True),
        ("GET", [], 302, [("Expires", date(60))], True, True),
        ("GET", [], 302, [("Expires", "0")], True, True),
        ("GET", [], 302, control("no-cache, must-revalidate"), False, False),
        ("GET", [], 302, control("stale-if-error=60"), False, False),
        # no-store.
        ("GET", [], 200, control("max-age=60, no-store"), False, False),
        ("GET", control("no-store"), 200, FINE, False, False),
        ("GET", control("no-cache, max-age=0"), 200, FINE, True, True),
        ("GET", [("Pragma", "no-cache")], 200, FINE, True, True),
        ("GET", [], 200, control('max-age=60, x="'), False, False),
        # must-understand.
        ("GET", [], 200, control("max-age=60, no-store, must-understand"), True, True),
        *(
            ("GET", [], status, control("public, no-store, must-understand"), True, True)
            for status in (302, 303, 307)
        ),
        ("GET", [], 499, control("max-age=60, no-store, must-understand"), False, False),
        ("GET", [], 499, control("max-age=60, must-understand"), False, False),
        ("GET", control("no-store"), 200, control("max-age=60, must-understand"), False, False),
        # Vary.
        ("GET", [], 200, [*FINE, ("Vary", "Accept")], True, True),
        ("GET", [], 200, [*FINE, ("Vary", "*")], False, False),
        ("GET", [], 200, [*FINE, ("Vary", "Accept"), ("Vary", ", *")], False, False),
        ("GET", [], 200, [*FINE, ("Vary", "Ac cept")], False, False),
        # Several users.
        ("GET", [], 200, control("max-age=60, private"), True, False),
        ("GET", [], 200, control('max-age=60, private="x"'), True, False),
        ("GET", [], 200, control("public, private"), True, False),
        ("GET", WHO, 200, FINE, True, False),
        ("GET", WHO, 200, control("public"), True, True),
        ("GET", WHO, 200, control("must-revalidate"), True, True),
        ("GET", WHO, 200, control("s-maxage=60"), True, True),
        ("GET", WHO, 200, control("proxy-revalidate"), True, False),
        ("GET", WHO, 200, control("public=1"), True, False),
        ("GET", [], 200, [*FINE, ("Set-Cookie", "a=b")], True, False),
        ("GET", [], 200, [*control("public"), ("Set-Cookie", "a=b")], True, False),
        # A body of the request, which is not in the key.
        ("GET", [("Content-Length", "0")], 200, FINE, True, True),
        ("GET", [("Content-Length", "2")], 200, FINE, False, False),
        ("GET", [("Transfer-Encoding", "chunked")], 200, FINE, False, False),
        # A full answer to a request with conditions, those of the cache for instance.
        ("GET", [("If-None-Match", '"a"'), ("Range", "bytes=0-")], 200, FINE, True, True),
    ],
)
def test_storable(*, method, request_headers, status, response_headers, private, shared):
    assert storable(method, request_headers, status, response_headers) is private
    assert storable(method, request_headers, status, response_headers, shared=True) is shared


# -- lifetimes ------------------------------------------------------------------------------------------------

DEFAULTS = {"received": NOW, "default_fresh": 10.0, "default_stale": 20.0, "default_refresh": 30.0}
DATED = [("Date", date(-100))]


def fresh_for(seconds):
    return Lifetime(seconds, 20.0, 30.0, must_revalidate=False)


def strict(seconds):
    return Lifetime(seconds, 0.0, 0.0, must_revalidate=True)


@pytest.mark.parametrize(
    ("status", "response_headers", "private", "shared"),
    [
        (200, [], fresh_for(10.0), None),
        (404, [], fresh_for(10.0), None),
        (302, [], fresh_for(0.0), None),
        (302, control("public"), fresh_for(10.0), None),
        (302, control("public=x"), fresh_for(0.0), None),
        (200, control("max-age=60"), fresh_for(60.0), None),
        (200, control("max-age=0"), fresh_for(0.0), None),
        (200, control("max-age=-60"), fresh_for(0.0), None),
        (200, control("max-age=99999999999"), fresh_for(FOREVER), None),
        (200, control("max-age=60, s-maxage=5"), fresh_for(60.0), strict(5.0)),
        (200, control("s-maxage=5"), fresh_for(10.0), strict(5.0)),
        # Expires, relative to the Date of the response.
        (200, [*DATED, ("Expires", date(-40))], fresh_for(60.0), None),
        (200, [("Expires", date(60))], fresh_for(60.0), None),
        (200, [("Date", "foo"), ("Expires", date(60))], fresh_for(60.0), None),
        (200, [*DATED, ("Expires", date(-100))], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", date(-160))], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", "0")], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", "")], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", date(-40).replace("GMT", "UTC"))], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", date(-40)), ("Expires", date(-30))], fresh_for(60.0), None),
        (200, [*DATED, ("Expires", date(-40)), ("Expires", "0")], fresh_for(0.0), None),
        (200, [*DATED, ("Expires", "Fri, 31 Dec 9999 23:59:59 GMT")], fresh_for(FOREVER), None),
        (200, [*control("max-age=5"), *DATED, ("Expires", date(9))], fresh_for(5.0), None),
        (200, [*control("max-age=5"), *DATED, ("Expires", "0")], fresh_for(5.0), None),
        (200, [*control("s-maxage=5"), *DATED, ("Expires", date(-40))], fresh_for(60.0), strict(5.0)),
        # RFC 5861.
        (200, control("max-age=1, stale-if-error=7"), Lifetime(1.0, 7.0, 30.0, must_revalidate=False), None),
        (
            200,
            control("max-age=1, stale-while-revalidate=8"),
            Lifetime(1.0, 20.0, 8.0, must_revalidate=False),
            None,
        ),
        (
            200,
            control("stale-if-error=0, stale-while-revalidate=x"),
            Lifetime(10.0, 0.0, 0.0, must_revalidate=False),
            None,
        ),
        # Never stale.
        (200, control("max-age=60, must-revalidate, stale-if-error=9"), strict(60.0), None),
        (200, control("must-revalidate"), strict(10.0), None),
        (200, control("max-age=60, no-cache"), strict(0.0), None),
        (200, control('max-age=60, no-cache="a"'), strict(0.0), None),
        (200, control("max-age=60, s-maxage=60, no-cache"), strict(0.0), None),
        (200, control("max-age=60, proxy-revalidate"), fresh_for(60.0), strict(60.0)),
        (200, control("max-age=60, s-maxage=x"), fresh_for(60.0), strict(0.0)),
    ],
)
def test_lifetime(status, response_headers, private, shared):
    assert lifetime(response_headers, status, **DEFAULTS) == private
    assert lifetime(response_headers, status, **DEFAULTS, shared=True) == (shared or private)


def test_a_lifetime_without_defaults_is_what_the_origin_says():
    assert lifetime([], 200, received=NOW) == Lifetime(0.0, 0.0, 0.0, must_revalidate=False)


@pytest.mark.parametrize(
    ("text", "delay", "resident", "expected"),
    [
        (None, 0.5, 10.0, 10.5),
        ("100", 0.5, 10.0, 110.5),
        ("100, 5", 0.0, 0.0, 100.0),
        ("old", 0.0, 10.0, 10.0),
        ("2147483649", 0.0, 10.0, FOREVER + 10),
        ("100", -1.0, -5.0, 100.0),  # clocks that go back make nothing younger
    ],
)
def test_age(text, delay, resident, expected):
    assert age({} if text is None else {"Age": text}, delay, resident) == expected


# -- what a request may have ----------------------------------------------------------------------------------

MINUTE = Lifetime(60.0, 100.0, 10.0, must_revalidate=False)
ALL = Use(now=True, while_refreshing=True, on_error=True)
LATER = Use(now=False, while_refreshing=True, on_error=True)
ON_ERROR = Use(now=False, while_refreshing=False, on_error=True)


@pytest.mark.parametrize(
    ("directives", "at", "expected"),
    [
        ("", 0, ALL),
        ("", 59.9, ALL),
        ("", 60, LATER),
        ("", 69.9, LATER),
        ("", 70, ON_ERROR),
        ("", 159.9, ON_ERROR),
        ("", 160, NOTHING),
        ("no-cache", 0, NOTHING),
        ("no-cache, stale-if-error=60", 61, NOTHING),
        # max-age: nothing older, and nothing stale.
        ("max-age=30", 30, ALL),
        ("max-age=30", 30.1, NOTHING),
        ("max-age=90", 59, ALL),
        ("max-age=90", 60, NOTHING),
        ("max-age=1", 0.5, ALL),
        ("max-age=0", 0, NOTHING),
        ("max-age=x", 5, NOTHING),
        # min-fresh.
        ("min-fresh=20", 40, ALL),
        ("min-fresh=20", 40.1, NOTHING),
        ("min-fresh=0", 59, ALL),
        ("min-fresh=0", 60, NOTHING),
        ("min-fresh=x", 0, NOTHING),
        # max-stale.
        ("max-stale=20", 59, ALL),
        ("max-stale=20", 80, ALL),
        ("max-stale=20", 80.1, NOTHING),
        ("max-stale", 1e6, ALL),
        ("max-stale=x", 60, ALL),
        ("max-stale=x", 60.1, NOTHING),
        ("max-stale=20, max-age=70", 70, ALL),
        ("max-stale=20, max-age=70", 70.1, NOTHING),
        ("max-stale=20, min-fresh=1", 60, NOTHING),
        # stale-if-error of its own: the smaller window, whatever else it says about age.
        ("stale-if-error=30", 65, LATER),
        ("stale-if-error=30", 89, ON_ERROR),
        ("stale-if-error=30", 90, NOTHING),
        ("stale-if-error=3000", 159, ON_ERROR),
        ("stale-if-error=3000", 160, NOTHING),
        ("stale-if-error=0", 60, Use(now=False, while_refreshing=True, on_error=False)),
        ("stale-if-error=0", 59, ALL),
        ("max-age=0, stale-if-error=30", 5, ON_ERROR),
        ("max-age=0, stale-if-error=30", 65, ON_ERROR),
        ("min-fresh=50, stale-if-error=30", 20, ON_ERROR),
        ("max-stale=5, stale-if-error=30", 80, ON_ERROR),
    ],
)
def test_allow(directives, at, expected):
    assert demands("GET", control(directives)).allow(float(at), MINUTE) == expected
    assert demands("HEAD", control(directives)).allow(float(at), MINUTE) == expected


@pytest.mark.parametrize(
    "directives", ["", "max-stale", "stale-if-error=1000", "max-stale=1000, stale-if-error=1000"]
)
def test_nobody_gets_what_must_be_revalidated(directives):
    wants = demands("GET", control(directives))
    assert wants.allow(59.0, strict(60.0)) == ALL
    assert wants.allow(60.0, strict(60.0)) == NOTHING
    assert wants.allow(0.0, strict(0.0)) == NOTHING


def test_errors_that_a_stale_answer_may_stand_in_for():
    assert {500, 502, 503, 504} == rfc9111.STALE_ON


@pytest.mark.parametrize(
    "value",
    [Directives(frozenset(), {}), MINUTE, NOTHING, demands("GET", [])],
    ids=lambda value: type(value).__name__,
)
def test_what_is_handed_out_is_frozen(value):
    with pytest.raises(AttributeError):
        setattr(value, value.__slots__[0], None)


def test_a_window_may_be_without_end():
    kept = Lifetime(1.0, math.inf, 0.0, must_revalidate=False)
    assert demands("GET", []).allow(1e9, kept) == ON_ERROR


@pytest.mark.parametrize(
    ("method", "request_headers", "bypass", "only_if_cached"),
    [
        ("GET", [], False, False),
        ("HEAD", [], False, False),
        ("POST", [], True, False),
        ("QUERY", [], True, False),
        ("get", [], True, False),
        ("GET", control("no-cache"), False, False),
        ("GET", control("no-store"), True, False),
        ("GET", control("only-if-cached"), False, True),
        ("GET", [("Pragma", "no-cache")], False, False),
        ("GET", [("Content-Length", "0")], False, False),
        ("GET", [("Content-Length", "9")], True, False),
        ("GET", [("Transfer-Encoding", "chunked")], True, False),
        *(("GET", [(name, "x")], True, False) for name in ("Range", "If-Range", "If-Match", "If-None-Match")),
        *(("GET", [(name, "x")], True, False) for name in ("If-Modified-Since", "If-Unmodified-Since")),
    ],
)
def test_demands(method, request_headers, bypass, only_if_cached):
    found = demands(method, request_headers)
    assert (found.bypass, found.only_if_cached) == (bypass, only_if_cached)


# -- keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "url", "key"),
    [
        ("GET", "https://example.com/a?b=c", "GET https://example.com/a?b=c"),
        ("HEAD", "https://example.com/a", "GET https://example.com/a"),
        ("POST", "https://example.com/a", "POST https://example.com/a"),
        ("GET", "HTTPS://EXAMPLE.com:443/A?B#c", "GET https://example.com/A?B"),
        ("GET", "http://example.com:80", "GET http://example.com/"),
        ("GET", "http://example.com:", "GET http://example.com/"),
        ("GET", "http://example.com:443/", "GET http://example.com:443/"),
        ("GET", "http://example.com?x", "GET http://example.com/?x"),
        ("GET", "http://example.com/?", "GET http://example.com/?"),
        ("GET", "http://example.com/a?b=/?c#d#e", "GET http://example.com/a?b=/?c"),
        ("GET", "http://user:p@ss@example.com/", "GET http://example.com/"),
        ("GET", "http://[::1]:80/", "GET http://[::1]/"),
        ("GET", "http://[::80]/", "GET http://[::80]/"),
        ("GET", "ws://example.com:80/", "GET ws://example.com:80/"),
        ("GET", "/a#b", "GET /a"),
        ("GET", "", "GET "),
    ],
)
def test_cache_key(method, url, key):
    assert cache_key(method, url) == key


def test_cache_key_takes_the_urls_of_the_clients():
    for url in (httpx.URL("https://u:p@Example.com:443/a?b#c"), httpx2.URL("https://u:p@Example.com:443/a?b#c")):
        assert cache_key("GET", url) == "GET https://example.com/a?b"


def test_keys_of_the_query_are_not_sorted():
    assert cache_key("GET", "http://a/?x&y") != cache_key("GET", "http://a/?y&x")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([("Foo", "1")], [("foo", "1")], True),
        ([("Foo", "1")], [("Foo", "2")], False),
        ([("Foo", "1")], [], False),
        ([("Foo", "")], [], False),
        ([("Foo", "")], [("Foo", " , ")], True),
        ([], [], True),
        ([("Foo", "1")], [("Foo", "1"), ("Other", "2")], True),
        ([("Foo", "1, 2")], [("Foo", "1"), ("Foo", "2")], True),
        ([("Foo", "1,2")], [("Foo", " 1 ,\t2 ")], True),
        ([("Foo", "1"), ("Foo", "2")], [("Foo", "2"), ("Foo", "1")], False),
        ([("Foo", '"a, b"')], [("Foo", '"a,b"')], False),
        ([("Foo", '"a, b')], [("Foo", '"a,b')], False),
        ([("Foo", "a b")], [("Foo", "ab")], False),
        ([("Foo", "a;q=1")], [("Foo", "a")], False),
        ([("Foo", "A")], [("Foo", "a")], False),
        ([("Foo", "1"), ("Bar", "2")], [("Bar", "2"), ("Foo", "1")], True),
        ([("Foo", "2"), ("Bar", "1")], [("Foo", "1"), ("Bar", "2")], False),
        ([("Foo", "1")], [("Bar", "1")], False),
        ([("Foo", "None")], [], False),
        ([("Foo", "\xfc")], [("Foo", "\\xfc")], False),
        ([("Foo", "\xfc")], [(b"FOO", b"\xfc")], True),
    ],
)
def test_vary_key(one, other, equal):
    response_headers = [("Vary", "Foo , BAR"), ("vary", ", baz,")]
    assert (vary_key(response_headers, one) == vary_key(response_headers, other)) is equal


def test_vary_key_is_for_the_fields_that_are_named():
    request_headers = [("Foo", "1"), ("Bar", "2")]
    keys = {
        vary_key([("Vary", names)], request_headers) for names in ("", "Foo", "Bar", "Foo, Bar", "Baz", "Foo, Baz")
    }
    assert len(keys) == 6
    assert vary_key([], request_headers) == vary_key([], []) == vary_key([("Vary", " ,")], [])
    assert vary_key([("Vary", "bar,foo")], request_headers) == vary_key([("Vary", "Foo, BAR")], request_headers)


@pytest.mark.parametrize(
    "names", ["*", "*, *", ", *", "*, Foo", "Foo, *", " * ", "F\u00f6\u00f6", "Foo Bar", '"Foo"', "Foo;Bar"]
)
def test_what_never_matches(names):
    assert vary_key([("Vary", names)], []) is None
    assert vary_key([("Vary", "Foo"), ("Vary", names)], []) is None


def test_keys_are_short_and_tell_nothing():
    secret = [("Authorization", "Bearer s3cr3t"), ("Cookie", "session=s3cr3t")]
    for key in (credentials_key(secret), vary_key([("Vary", "Cookie")], secret)):
        assert len(key) == 32
        int(key, 16)


def test_credentials_keys():
    fields = ["Authorization", "Cookie", "Proxy-Authorization", "X-Api-Key", "Api-Key", "X-Auth-Token"]
    somebody = [credentials_key([(name, value)]) for name in fields for value in ("a", "b", "")]
    assert len(set(somebody)) == len(somebody)
    assert None not in somebody
    assert credentials_key([("Accept", "a")]) is None
    assert credentials_key([("AUTHORIZATION", "a")]) == credentials_key([("Authorization", "a"), ("Accept", "b")])
    both = credentials_key([("Authorization", "a"), ("Cookie", "b")])
    assert both == credentials_key([("Cookie", "b"), ("Authorization", "a")])
    assert both not in {credentials_key([("Authorization", "a")]), credentials_key([("Cookie", "b")])}
    assert credentials_key([("Cookie", "a"), ("Cookie", "b")]) != credentials_key([("Cookie", "a, b")])


@pytest.mark.parametrize(
    "name",
    [
        *("Private-Token", "X-Vault-Token", "X-Shopify-Access-Token", "X-Amz-Security-Token", "X-Session-Id"),
        *("apikey", "DD-API-KEY", "X-Goog-Api-Key", "X-RapidAPI-Key", "Ocp-Apim-Subscription-Key", "X-Auth-Key"),
        *("X-Tenant", "X-Client-Secret", "X-User-Id", b"private-token"),
    ],
)
def test_credentials_may_be_in_other_fields(name):
    ada, bob = (credentials_key([(name, value)]) for value in ("ada", "bob"))
    assert None not in {ada, bob}
    assert ada != bob


@pytest.mark.parametrize(
    "name",
    [
        *("User-Agent", "Accept", "Host", "Idempotency-Key", "Sec-WebSocket-Key", "X-Request-Id", "Traceparent"),
        *("X-Monkey", "Keep-Alive", "Tokens"),
    ],
)
def test_other_fields_do_not_say_who_asks(name):
    assert credentials_key([(name, "ada")]) is None


# -- what is kept of the fields -------------------------------------------------------------------------------


def test_stored_headers():
    kept = [
        (b"X-Test", b"1"),
        (b"x-test", b"2"),
        (b"Cache-Control", b"max-age=5"),
        (b"Content-Encoding", b"gzip"),
        (b"Content-Length", b"9"),
        (b"Age", b"5"),
        (b"Cache-Status", b"Elsewhere; hit"),
        (b"X-Raw", b"\xff"),
    ]
    dropped = [
        (b"Connection", b"close, X-Private , Cache-Control"),
        (b"connection", b"X-OTHER,content-encoding"),
        (b"X-Private", b"1"),
        (b"x-other", b"1"),
        *((name, b"1") for name in (b"Keep-Alive", b"Proxy-Connection", b"TE", b"Trailer", b"Transfer-Encoding")),
        *((name, b"1") for name in (b"Upgrade", b"Proxy-Authenticate", b"Proxy-Authentication-Info")),
        *((name, b"1") for name in (b"Proxy-Authorization", b"Set-Cookie", b"set-cookie", b"Set-Cookie2")),
    ]
    mixed = [field for pair in itertools.zip_longest(dropped, kept) for field in pair if field]
    assert stored_headers(mixed) == kept
    for kind in (httpx.Headers, httpx2.Headers):
        assert stored_headers(kind(mixed)) == kept
    assert stored_headers(starlette.datastructures.Headers(raw=mixed)) == kept


def test_stored_headers_of_text():
    assert stored_headers({"X-A": "\xfc", "Set-Cookie": "a", "X-B": "\u0663"}) == [
        (b"X-A", b"\xfc"),
        (b"X-B", b"\\u0663"),
    ]
    assert stored_headers([("Connection", "a"), ("A", "1"), ("B", "2")]) == [(b"B", b"2")]


def test_nobody_can_make_us_forget_what_an_answer_means():
    needed = {
        b"age",
        b"cache-control",
        b"content-encoding",
        b"content-type",
        b"date",
        b"etag",
        b"expires",
        b"vary",
    }
    needed |= {b"last-modified", b"pragma"}
    fields = [(name, b"1") for name in sorted(needed)]
    assert stored_headers([(b"Connection", b", ".join(needed)), *fields]) == fields


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([], []),
        ([("ETag", '"a"')], [(b"If-None-Match", b'"a"')]),
        ([("ETag", 'W/"\xfc"')], [(b"If-None-Match", b'W/"\xfc"')]),
        ([("ETag", '""')], [(b"If-None-Match", b'""')]),
        ([("Last-Modified", date(-9))], [(b"If-Modified-Since", date(-9).encode())]),
        (
            [("Last-Modified", date(-9)), ("ETag", '"a"')],
            [(b"If-None-Match", b'"a"'), (b"If-Modified-Since", date(-9).encode())],
        ),
        ([("ETag", '"a"'), ("ETag", '"b"')], [(b"If-None-Match", b'"a"')]),
        ([("Last-Modified", date(-9)), ("Last-Modified", date(-8))], [(b"If-Modified-Since", date(-9).encode())]),
        *(([("ETag", bad)], []) for bad in ("*", "a", '"a", "b"', '"a', 'w/"a"', '"a b"', '"a""', "")),
        *(([("Last-Modified", bad)], []) for bad in ("", "0", "yesterday", date(-9).replace("GMT", "UTC"))),
    ],
)
def test_revalidation_headers(stored, expected):
    assert revalidation_headers(stored) == expected
    for kind in (httpx, httpx2):
        request = kind.Request("GET", "http://a", headers=[("Accept", "x"), *revalidation_headers(stored)])
        assert [field for field in request.headers.raw if field[0].startswith(b"If-")] == expected


@pytest.mark.parametrize(
    ("not_modified", "stored", "expected"),
    [
        ([], [], True),
        ([], [("ETag", '"a"')], True),
        ([("ETag", '"a"')], [("ETag", '"a"')], True),
        ([("ETag", '"a"')], [("ETag", '"b"')], False),
        ([("ETag", '"a"')], [("ETag", '"a"'), ("ETag", '"b"')], True),
        ([("ETag", '"a"'), ("ETag", '"b"')], [("ETag", '"a"')], True),
        ([("ETag", '"a"')], [("ETag", 'W/"a"')], False),
        ([("ETag", '"a"')], [], False),
        ([("ETag", 'W/"a"')], [("ETag", 'W/"a"')], True),
        ([("ETag", 'W/"a"')], [("ETag", '"a"')], True),
        ([("ETag", 'W/"a"')], [("ETag", 'W/"b"')], False),
        ([("ETag", 'W/"a"')], [], False),
        ([("ETag", '"a"'), ("Last-Modified", date(-1))], [("ETag", '"a"'), ("Last-Modified", date(-9))], True),
        ([("Last-Modified", date(-9))], [("Last-Modified", date(-9)), ("ETag", '"a"')], True),
        ([("Last-Modified", date(-9))], [("Last-Modified", date(-8))], False),
        ([("Last-Modified", date(-9))], [("ETag", '"a"')], False),
    ],
)
def test_confirms(not_modified, stored, expected):
    assert confirms(not_modified, stored) is expected


def test_freshened():
    stored = [
        (b"Date", b"old"),
        (b"Age", b"500"),
        (b"Cache-Control", b"max-age=1"),
        (b"X-Kept", b"1"),
        (b"X-Many", b"1"),
        (b"X-Many", b"2"),
        (b"ETag", b'"a"'),
        (b"Content-Type", b"text/plain"),
        (b"Content-Length", b"9"),
        (b"Content-Encoding", b"gzip"),
    ]
    not_modified = [
        ("date", "new"),
        ("cache-control", "max-age=9"),
        ("Cache-Control", "public"),
        ("X-Many", "3"),
        ("X-New", "4"),
        ("Content-Location", "/b"),
        ("Content-Type", "text/html"),
        ("Content-Length", "0"),
        ("Content-Encoding", "br"),
        ("Content-Range", "bytes 0-1/2"),
        ("Set-Cookie", "a=b"),
        ("Connection", "x-hop"),
        ("X-Hop", "5"),
    ]
    result = freshened(stored, not_modified)
    assert result == [
        (b"X-Kept", b"1"),
        (b"ETag", b'"a"'),
        (b"Content-Type", b"text/plain"),
        (b"Content-Length", b"9"),
        (b"Content-Encoding", b"gzip"),
        (b"date", b"new"),
        (b"cache-control", b"max-age=9"),
        (b"Cache-Control", b"public"),
        (b"X-Many", b"3"),
        (b"X-New", b"4"),
        (b"Content-Location", b"/b"),
    ]
    assert age(result, 0.0, 0.0) == 0.0
    assert age(freshened(stored, [("Age", "7")]), 0.0, 0.0) == 7.0


# -- invalidation ---------------------------------------------------------------------------------------------

HERE = "http://example.com/a/b"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "M-SEARCH", "post", "get", "CONNECT"])
@pytest.mark.parametrize(("status", "changed"), [(200, True), (204, True), (302, True), (399, True), (101, False)])
def test_what_is_not_safe_invalidates_its_target(method, status, changed):
    assert invalidated(method, status, f"{HERE}#c", []) == ([HERE] if changed else [])
    assert invalidated(method, status + 200, HERE, []) == ([HERE] if status == 101 else [])  # errors and 301


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "QUERY", "PROPFIND", "REPORT", "SEARCH"])
def test_what_is_safe_invalidates_nothing(method):
    assert invalidated(method, 200, HERE, [("Location", "/x")]) == []


@pytest.mark.parametrize(
    ("references", "others"),
    [
        (["/x"], ["http://example.com/x"]),
        (["x?y#z"], ["http://example.com/a/x?y"]),
        (["../x"], ["http://example.com/x"]),
        (["http://EXAMPLE.com:80/x"], ["http://example.com/x"]),
        (["/x", "/y", "/x"], ["http://example.com/x", "http://example.com/y"]),
        ([HERE], []),
        ([""], []),
        (["https://example.com/x"], []),
        (["http://example.com:8080/x"], []),
        (["http://example.com.evil/x"], []),
        (["//evil/x"], []),
        (["http://example.com@evil/x"], []),
        (["http://evil/@example.com/x"], []),
        (["http://[::1/x"], []),
        (["mailto:a@example.com"], []),
    ],
)
def test_other_urls_of_the_same_origin_are_invalidated(references, others):
    for names in (("Location",), ("Content-Location",), ("Location", "Content-Location")):
        message = [(name, reference) for name in names for reference in references]
        assert invalidated("POST", 201, HERE, message) == [HERE, *others]


def test_what_is_invalidated_is_found_again():
    url = httpx.URL("HTTP://u:p@Example.com:80/a#b")
    assert [cache_key("GET", found) for found in invalidated("PUT", 200, url, [])] == [cache_key("GET", url)]


# -- Cache-Status ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "resilient; hit"),
        ({"ttl": 376.9}, "resilient; hit; ttl=376"),
        ({"ttl": -0.5}, "resilient; hit; ttl=-1"),
        ({"ttl": -412.0}, "resilient; hit; ttl=-412"),
        ({"ttl": math.inf}, "resilient; hit; ttl=2147483648"),
        ({"ttl": -math.inf}, "resilient; hit; ttl=-2147483648"),
        ({"forward": "uri-miss"}, "resilient; fwd=uri-miss"),
        ({"forward": "uri-miss", "stored": True}, "resilient; fwd=uri-miss; stored"),
        ({"forward": "stale", "status": 304, "ttl": 60.0}, "resilient; fwd=stale; fwd-status=304; ttl=60"),
        (
            {"forward": "stale", "status": 503, "ttl": -12.0, "detail": "stale-if-error"},
            "resilient; fwd=stale; fwd-status=503; ttl=-12; detail=stale-if-error",
        ),
        (
            {"forward": "miss", "collapsed": True, "stored": True},
            "resilient; fwd=miss; stored; collapsed",
        ),
        ({"forward": "uri-miss", "collapsed": False}, "resilient; fwd=uri-miss; collapsed=?0"),
        ({"status": 200, "stored": True, "collapsed": True}, "resilient; hit"),  # they mean nothing with a hit
    ],
)
def test_cache_status(options, expected):
    text = cache_status(**options)
    assert text == expected
    assert len(headers.structured(["Elsewhere; hit", text])) == 2


# -- whatever is sent -----------------------------------------------------------------------------------------

NAMES = [
    *(
        "Cache-Control",
        "Pragma",
        "Expires",
        "Date",
        "Age",
        "Vary",
        "ETag",
        "Last-Modified",
        "Authorization",
        "Cookie",
    ),
    *("Location", "Content-Location", "Connection", "Set-Cookie", "Content-Length", "Range", "Foo"),
]
DIRECTIVES = st.builds(
    "{}{}".format,
    st.sampled_from(sorted([*rfc9111._RESTRICTIVE, *rfc9111._PERMISSIVE, *rfc9111._DELTAS, "immutable"])),
    st.one_of(
        st.just(""), st.integers(-5, 10**12).map("={}".format), st.sampled_from(["=", '="', '="5"', "=x", " "])
    ),
)
VALUES = st.one_of(
    st.text(),
    st.lists(DIRECTIVES).map(", ".join),
    st.lists(
        st.sampled_from(['"', "\\", ",", ";", "=", "*", " ", "a", "Foo", "max-age", "no-store", "5", "/"])
    ).map("".join),
    st.sampled_from(["*", "Foo, Bar", '"a"', 'W/"a"', date(0), date(60), "0", "http://a/b", "//[", "close, foo"]),
)
MESSAGES = st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=6)
STATUSES = st.integers(100, 599)
TIMES = st.floats(0, 1e10)


@given(
    method=st.sampled_from(["GET", "HEAD", "POST", ""]),
    asked=MESSAGES,
    status=STATUSES,
    told=MESSAGES,
    at=TIMES,
    url=st.text(),
    shared=st.booleans(),
)
@example(
    method="GET",
    asked=[],
    status=200,
    told=[("Cache-Control", '"' + "\\" * 11)],
    at=NOW,
    url="http://[",
    shared=True,
)
def test_nothing_raises_and_everything_is_bounded(*, method, asked, status, told, at, url, shared):
    assert type(storable(method, asked, status, told, shared=shared)) is bool
    kept = lifetime(
        told, status, received=at, default_fresh=5.0, default_stale=5.0, default_refresh=5.0, shared=shared
    )
    for seconds in (kept.fresh, kept.stale_if_error, kept.stale_while_revalidate):
        assert 0 <= seconds <= FOREVER
    assert 0 <= age(told, at, at) <= FOREVER + 2 * at
    use = demands(method, asked).allow(at, kept)
    assert use.now <= use.while_refreshing
    assert use.now <= use.on_error
    fields = stored_headers(told)
    assert stored_headers(fields) == fields
    assert freshened(fields, []) == [field for field in fields if field[0] != b"Age"]
    once = freshened(fields, asked)
    assert sorted(freshened(once, asked)) == sorted(once)
    assert type(confirms(asked, told)) is bool
    assert len(revalidation_headers(told)) <= 2
    assert cache_key(method, url).startswith("GET " if method == "HEAD" else method)
    found = invalidated(method, status, url, told)
    assert len(set(found)) == len(found)
    assert [cache_key("GET", again) for again in found] == [f"GET {again}" for again in found]
    assert credentials_key(asked) == credentials_key(list(asked))
    assert vary_key(told, asked) == vary_key(told, [*asked, ("Nobody-Asks", "x")])


@given(MESSAGES, st.sampled_from([200, 302, 404, 429, 500]), MESSAGES)
def test_a_shared_cache_stores_no_more_than_a_private_one(asked, status, told):
    directives = Directives.of_response(told)
    private = storable("GET", asked, status, told)
    if storable("GET", asked, status, told, shared=True):
        assert private or "s-maxage" in directives
        assert "private" not in directives
    if private:
        assert "no-store" not in directives or "must-understand" in directives


@given(MESSAGES, MESSAGES, STATUSES, TIMES)
def test_asking_for_more_never_gives_more(asked, told, status, at):
    kept = lifetime(told, status, received=NOW, default_fresh=60.0, default_stale=60.0, default_refresh=60.0)
    plain = demands("GET", []).allow(at, kept)
    directives = Directives.of_request(asked)
    use = demands("GET", asked).allow(at, kept)
    if "max-stale" not in directives:  # nothing else lets the cache answer with what is stale
        assert use.now <= plain.now
        assert use.while_refreshing <= plain.while_refreshing
        assert use.on_error <= plain.on_error
    if kept.must_revalidate and at >= kept.fresh:
        assert use == NOTHING


VARIANT = st.lists(st.tuples(st.sampled_from(["Foo", "Bar", "Baz"]), st.text("ab, \"'", max_size=3)), max_size=3)


@given(VARIANT, VARIANT)
def test_variants_that_match_are_the_same_but_for_white_space(one, other):
    def members(message):
        sent = {name: [value for field, value in message if field == name] for name, _ in message if name != "Baz"}
        return {name: ",".join(values).replace(" ", "").split(",") for name, values in sent.items()}

    if vary_key([("Vary", "Foo, Bar")], one) == vary_key([("Vary", "Foo, Bar")], other):
        first, second = members(one), members(other)
        assert first.keys() == second.keys()
        assert all(list(filter(None, first[name])) == list(filter(None, second[name])) for name in first)


WHOSE = st.lists(
    st.tuples(st.sampled_from(["Authorization", "Cookie", "X-Api-Key"]), st.text(max_size=3)), max_size=3
)


@given(WHOSE, WHOSE)
def test_credentials_never_meet(one, other):
    def meaning(message):
        return {
            name: [v.strip(" \t") for field, v in message if field == name]
            for name in {field for field, _ in message}
        }

    assert (credentials_key(one) == credentials_key(other)) is (meaning(one) == meaning(other))


@pytest.mark.parametrize(
    "text",
    [
        *('"' * 100_000, '"' + '\\"' * 50_000, "\\" * 100_000, '"a' * 50_000, "a" * 100_000 + '"'),
        *("a," * 50_000, "a;" * 50_000, "=" * 100_000, "max-age=1," * 10_000, "," * 100_000, " " * 100_000),
        *("http://" * 15_000, "/../" * 25_000),
    ],
    ids=range(13),
)
@pytest.mark.timeout(10)  # a quadratic parser takes minutes
def test_long_fields_take_linear_time(text):
    message = [(name, text) for name in NAMES]
    assert storable("GET", message, 200, message) is False
    Directives.of_response(message)
    lifetime(message, 200, received=NOW)
    vary_key([("Vary", "Foo")], message)
    vary_key(message, message)
    stored_headers(message)
    revalidation_headers(message)
    invalidated("POST", 200, text, message)
    credentials_key(message)
    cache_key("GET", text)
