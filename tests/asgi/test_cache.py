"""`Cache` around an application: what is kept, what is served and to whom, and who waits for whom.

C1 to C33 are the traps and "bad input" the rows that a test looks into.
"""

from email.utils import formatdate
from types import SimpleNamespace

import anyio
import anyio.lowlevel
import pytest

import resilient.asgi.cache
from resilient import (
    Cache,
    CircuitBreaker,
    Fallback,
    Pipeline,
    RateLimit,
    Retry,
    Timeout,
    deadline,
    runtime,
)
from resilient.asgi import ResilienceMiddleware
from resilient.asgi.cache import PATIENCE_SECONDS, RENEWAL_SECONDS, AsgiCache
from resilient.asgi.edge import AsgiEdge
from resilient.errors import Rejected
from resilient.http.cache_flights import APART_SECONDS
from resilient.http.cache_store import BODY_BYTES
from resilient.testing import capture_events, run

from .driver import Connection, ask, scope_of

WALL = 1_800_000_000.0  # what the wall clock shows when virtual time begins
FRESH = {"cache_control": "max-age=60"}
SHARED = {"cache_control": "public, max-age=60"}


@pytest.fixture(autouse=True)
def wall(monkeypatch):
    wall = SimpleNamespace(offset=WALL)
    clock = SimpleNamespace(time=lambda: wall.offset + runtime.now())
    monkeypatch.setattr(resilient.asgi.cache, "time", clock)
    return wall


class Step:
    """One answer of the application: a status and the parts of a body, or an error."""

    def __init__(self, *body, status=200, wait=0.0, gap=0.0, breaks=None, ends=True, more=None, **fields):
        self.body = body or (b"",)
        self.status = status
        self.wait = wait
        self.gap = gap
        self.breaks = breaks
        self.ends = ends
        self.more = more or {}
        self.fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]

    async def __call__(self, scope, receive, send):
        await anyio.sleep(self.wait)
        if self.breaks is not None and self.body == (b"",):
            raise self.breaks
        await send({"type": "http.response.start", "status": self.status, "headers": self.fields, **self.more})
        for number, part in enumerate(self.body):
            last = self.ends and self.breaks is None and number == len(self.body) - 1
            if number or self.gap:
                await anyio.sleep(self.gap)
            await send({"type": "http.response.body", "body": part, "more_body": not last})
        if self.breaks is not None:
            raise self.breaks


class Origin:
    """An application that answers by these steps, the last one again and again."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.scopes = []

    async def __call__(self, scope, receive, send):
        self.scopes.append(scope)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        await (step if isinstance(step, Step) or not callable(step) else step(scope))(scope, receive, send)

    @property
    def asked(self):
        return len(self.scopes)


def guarded(origin, *policies, **options):
    return ResilienceMiddleware(origin, pipeline=Pipeline(*policies), **options)


def how(answer):
    """Return what the cache says about an answer: hit, collapsed, the detail of a stale one, None if nothing."""
    status = answer.headers.get("cache-status")
    if status is None:
        return None
    return status.partition("detail=")[2] or ("collapsed" if "collapsed" in status else "hit")


def counts(cache):
    statistics = cache.statistics()
    return statistics.hits, statistics.misses, statistics.shared, statistics.stale


def ages(backend, cache, *steps, at, **options):
    """Ask for the same at these times; return status, text and what the cache says, or the error."""

    async def scenario():
        origin = Origin(*steps)
        app = guarded(origin, cache)
        seen = []
        for moment in at:
            await anyio.sleep(moment - runtime.now())
            answer = await ask(app, **options)
            if answer.messages:
                seen.append((answer.status, answer.body.decode(), how(answer)))
            else:
                seen.append(type(answer.error).__name__)
        return seen, origin

    return run(scenario, backend=backend)


def twice(backend, cache, step, **options):
    """Tell whether what answers the second request of two is what answered the first."""
    seen, origin = ages(backend, cache, step, at=(0, 1), **options)
    return seen[1][2] == "hit" and origin.asked == 1


async def gather(*functions):
    """Run async functions at almost the same time, as trio begins in any order, and return their results."""
    results = [None] * len(functions)

    async def run_one(index):
        await anyio.sleep(index / 1e6)
        results[index] = await functions[index]()

    async with anyio.create_task_group() as group:
        for index in range(len(functions)):
            group.start_soon(run_one, index)
    return results


def later(seconds, app, path="/", **options):
    """Return a function that waits, asks, and returns the answer and the time."""

    async def call():
        await anyio.sleep(seconds)
        answer = await ask(app, path, **options)
        return answer, round(runtime.now(), 3)

    return call


def summary(results):
    return [(answer.body, how(answer), moment) for answer, moment in results]


# -- served on errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_c1_an_old_response_stands_in_for_a_failing_one(backend, status):
    old = Step(b"o", b"ld", cache_control="max-age=10, stale-if-error=20")
    seen, origin = ages(backend, Cache(0), old, Step(b"broken", status=status), at=(0, 9.5, 10, 29.5, 30))
    assert seen == [
        (200, "old", None),
        (200, "old", "hit"),
        (200, "old", "stale-if-error"),
        (200, "old", "stale-if-error"),
        (status, "broken", None),
    ]
    assert origin.asked == 4


@pytest.mark.parametrize("error", [ConnectionError("refused"), KeyError("a bug"), TimeoutError()], ids=type)
def test_c1_an_old_response_stands_in_for_an_error(backend, error):
    seen, _ = ages(backend, Cache(0, stale=10), Step(b"old"), Step(breaks=error), at=(0, 5, 15))
    assert seen == [(200, "old", None), (200, "old", "stale-if-error"), type(error).__name__]


@pytest.mark.parametrize("status", [400, 404, 429, 501, 505, 507])
def test_c1_other_statuses_are_the_answer(backend, status):
    seen, _ = ages(backend, Cache(0, stale=60), Step(b"old"), Step(b"no", status=status), at=(0, 1))
    assert seen[1] == (status, "no", None)


def test_the_policy_says_which_failures_count(backend):
    steps = Step(b"old"), Step(status=429), Step(status=503), Step(breaks=KeyError())
    for on, expected in [
        ({Exception, 429}, ["stale-if-error"] * 3),
        ({429}, ["stale-if-error", 503, "KeyError"]),
        (KeyError, [429, 503, "stale-if-error"]),
        (lambda error: getattr(error, "status", None) == 503, [429, "stale-if-error", "KeyError"]),
    ]:
        seen, _ = ages(backend, Cache(0, stale=60, on=on), *steps, at=(0, 1, 2, 3))
        assert [each if isinstance(each, str) else each[2] or each[0] for each in seen[1:]] == expected


@pytest.mark.parametrize(
    "control", ["must-revalidate", "proxy-revalidate", "no-cache", "s-maxage=10"], ids=lambda name: name[:8]
)
def test_c2_what_must_be_asked_for_is_never_served_old(backend, control):
    old = Step(b"old", cache_control=f"max-age=10, stale-if-error=60, {control}")
    seen, _ = ages(backend, Cache(10, stale=60, refresh=60), old, Step(status=503), at=(0, 11))
    assert seen[1] == (503, "", None)


def test_c1_nothing_is_put_in_the_place_of_what_has_begun(backend):
    breaks = Step(b"half", breaks=KeyError("x"))
    seen, _ = ages(backend, Cache(0, stale=60), Step(b"old"), breaks, Step(breaks=KeyError()), at=(0, 1, 2))
    assert seen == [(200, "old", None), (200, "half", None), (200, "old", "stale-if-error")]


def test_a_refusal_further_in_is_answered_by_an_old_response(backend):
    async def scenario():
        breaker = CircuitBreaker(consecutive=1)
        origin = Origin(Step(b"old"), Step(status=503))
        app = guarded(origin, Cache(0, stale=60), breaker)
        answers = [await ask(app) for _ in range(3)]
        assert [how(answer) for answer in answers] == [None, "stale-if-error", "stale-if-error"]
        assert (breaker.current_state, origin.asked) == ("open", 2)  # C28: the breaker sees the failure
        assert answers[1].headers["cache-status"].startswith("resilient; fwd=stale; fwd-status=503; ttl=0")
        assert answers[2].headers["cache-status"] == "resilient; fwd=stale; ttl=0; detail=stale-if-error"

    run(scenario, backend=backend)


def test_a_deadline_is_answered_by_an_old_response(backend):
    async def scenario():
        app = guarded(Origin(Step(b"old"), Step(b"new", wait=9)), Cache(0, stale=60), Timeout(2))
        await ask(app)
        answer = await ask(app)
        assert (answer.body, how(answer), runtime.now()) == (b"old", "stale-if-error", 2)

    run(scenario, backend=backend)


def test_the_event_and_the_counters_tell_of_it(backend):
    async def scenario():
        cache = Cache(1, stale=60)
        app = guarded(Origin(Step(b"old"), Step(status=503)), cache)
        with capture_events(cache) as seen:
            for pause in (0, 0.5, 2):
                await anyio.sleep(pause)
                await ask(app)
        assert [(event.name, event.age, event.reason) for event in seen] == [("cache.stale_served", 2.5, "error")]
        assert counts(cache) == (1, 2, 0, 1)
        assert cache.statistics().entries == 1

    run(scenario, backend=backend)


def test_retries_are_made_before_an_old_response_is_served(backend):
    for order in ((Cache(0, stale=60), Retry(2, wait=1)), (Retry(2, wait=1), Cache(0, stale=60))):

        async def scenario(order=order):
            origin = Origin(Step(b"old"), Step(status=503), Step(b"new"))
            app = guarded(origin, *order)
            await ask(app)
            return (await ask(app)).body, origin.asked

        inside = order[0].__class__ is Cache
        assert run(scenario, backend=backend) == ((b"new", 3) if inside else (b"old", 2))


def test_what_a_fallback_inside_gives_is_not_kept(backend):
    async def alternative(scope, receive, send):
        await Step(b"instead")(scope, receive, send)

    async def scenario():
        app = guarded(Origin(Step(status=503), Step(b"good")), Cache(60), Fallback(alternative))
        return [(await ask(app)).body for _ in range(3)]

    assert run(scenario, backend=backend) == [b"instead", b"good", b"good"]


# -- who gets what --------------------------------------------------------------------------------------------

LOGINS = {
    "authorization": "Bearer a",
    "cookie": "id=a",
    "x-api-key": "a",
    "x-access-token": "a",
    "x-forwarded-user": "ada",
    "x-amzn-oidc-data": "a",
    "x-goog-iap-jwt-assertion": "a",
    "x-tenant": "a",
    "x-ssl-client-s-dn": "CN=a",
    "x-forwarded-client-cert": "a",
}


@pytest.mark.parametrize("name", LOGINS)
@pytest.mark.parametrize("control", [None, "max-age=60", "public, max-age=60", "max-age=60, must-revalidate"])
def test_c7_c8_what_somebody_asked_for_is_for_all_only_if_it_says_so(backend, name, control):
    """Bad input 72, 78: A warms the cache, the application dies, and B asks."""
    fields = {} if control is None else {"cache_control": control}
    kept = control is not None and control != "max-age=60"

    async def scenario():
        app = guarded(Origin(Step(b"of A", **fields), Step(status=503)), Cache(60, stale=600))
        await ask(app, headers={name: LOGINS[name]})
        others = [await ask(app, headers={name: "b"}), await ask(app)]
        assert [each.status for each in others] == [200 if kept else 503, 503]
        await anyio.sleep(61)
        assert (await ask(app, headers={name: "b"})).status == (200 if kept and "must" not in control else 503)

    run(scenario, backend=backend)


@pytest.mark.parametrize("control", ["s-maxage=60", "no-cache, public"])
def test_c7_other_directives_of_shared_caches(backend, control):
    hit = twice(backend, Cache(60), Step(b"x", cache_control=control), headers={"authorization": "a"})
    assert hit == (control == "s-maxage=60")


def test_c7_a_client_certificate_is_a_login(backend):
    tls = {"tls": {"client_cert_name": "CN=ada"}}
    assert not twice(backend, Cache(60), Step(b"x"), extensions=tls)
    assert twice(backend, Cache(60), Step(b"x"), extensions={"tls": {"client_cert_name": None}})
    assert twice(backend, Cache(60), Step(b"x"), extensions=None)


@pytest.mark.parametrize(
    "name", ["user-agent", "sec-fetch-user", "x-requested-with", "idempotency-key", "x-forwarded-for"]
)
def test_other_fields_are_no_logins(backend, name):
    assert twice(backend, Cache(60), Step(b"x"), headers={name: "v"})


def test_c8_those_who_say_who_they_are_do_not_get_what_nobody_in_particular_got(backend):
    async def scenario():
        origin = Origin(Step(b"log in, please"), Step(b"hello ada"))
        app = guarded(origin, Cache(60))
        return [(await ask(app, headers=each)).body for each in ({}, {"cookie": "id=ada"}, {})]

    assert run(scenario, backend=backend) == [b"log in, please", b"hello ada", b"log in, please"]


def test_c8_credentials_that_come_on_the_way_count_too(backend):
    async def app(scope, receive, send):
        scope["headers"] = [*scope["headers"], (b"cookie", b"a")]
        await Step(b"x")(scope, receive, send)

    assert not twice(backend, Cache(60), lambda scope: app)


def test_c8_a_key_tells_people_apart(backend):
    def principal(scope):
        return scope["path"], dict(scope["headers"]).get(b"authorization")

    async def scenario():
        cache = Cache(60, key=principal)
        origin = Origin(*(Step(b"%d" % number) for number in range(9)))
        app = guarded(origin, cache)
        asked = [("/", "a"), ("/", "b"), ("/", "a"), ("/b", "a"), ("/", "b")]
        bodies = [(await ask(app, path, headers={"authorization": who})).body for path, who in asked]
        assert bodies == [b"0", b"1", b"0", b"2", b"1"]
        await ask(app, method="POST", headers={"authorization": "a"})
        assert (await ask(app, headers={"authorization": "b"})).body == b"4"  # the same URL, whoever asks

    run(scenario, backend=backend)


def test_a_key_is_what_a_write_forgets_by(backend):
    async def scenario():
        app = guarded(Origin(Step(b"0"), Step(b"1"), Step(b"2")), Cache(60, key=lambda scope: "all"))
        await ask(app, "/a")
        await ask(app, "/b", method="DELETE")
        return (await ask(app, "/a")).body

    assert run(scenario, backend=backend) == b"2"


def test_a_key_has_to_be_hashable(backend):
    seen, origin = ages(backend, Cache(60, key=lambda scope: []), Step(b"x"), at=(0,))
    assert (seen, origin.asked) == (["TypeError"], 0)


@pytest.mark.parametrize(
    "fields",
    [
        {"set_cookie": "id=a", **SHARED},
        {"cache_control": "private, max-age=60"},
        {"cache_control": "no-store"},
        {"cache_control": "max-age=60, no-store"},
        {"vary": "*", **FRESH},
        {"vary": "Accept, *", **FRESH},
        {"cache_control": "max-age=0"},
        {"expires": "0"},
        {"content_type": "text/event-stream", **FRESH},
        {"content_type": "Text/Event-Stream; charset=utf-8", **FRESH},
        {"content_length": "3", **FRESH},
    ],
    ids=str,
)
def test_c6_c9_c10_what_is_not_kept(backend, fields):
    """Bad input 73 to 75."""
    assert not twice(backend, Cache(60), Step(b"data", **fields))
    if "content_length" not in fields:
        assert not twice(backend, Cache(60, key=lambda scope: 0), Step(b"data", **fields))


def test_c6_c29_which_statuses_are_kept(backend):
    """Bad input 81: neither errors nor parts."""
    kept = {status for status in range(200, 600) if twice("asyncio", Cache(60), Step(b"x", status=status))}
    assert kept == {200, 203, 204, 300, 301, 308}
    told = {200, 201, 302, 303, 307, 404, 410, 206, 304, 500, 503}
    assert {each for each in told if twice(backend, Cache(60), Step(b"x", status=each, **SHARED))} == told - {
        206,
        304,
        500,
        503,
    }


@pytest.mark.parametrize("gone", [Step(b"no", status=404), Step(b"x", cache_control="no-store")])
def test_what_the_application_takes_back_is_forgotten(backend, gone):
    seen, _ = ages(backend, Cache(0, stale=60), Step(b"old"), gone, Step(status=503), at=(0, 1, 2))
    assert seen[2] == (503, "", None)


@pytest.mark.parametrize("step", [Step(status=400), Step(b"x", set_cookie="a=b"), Step(status=401)], ids=repr)
def test_what_is_about_one_client_takes_nothing_from_others(backend, step):
    seen, _ = ages(backend, Cache(0, stale=60), Step(b"old"), step, Step(status=503), at=(0, 1, 2))
    assert seen[2] == (200, "old", "stale-if-error")


def test_c10_variants_are_kept_side_by_side(backend):
    """Bad input 76, 77."""

    def speak(scope):
        language = dict(scope["headers"]).get(b"accept-language", b"-")
        return Step(language, vary="Accept-Language", **FRESH)

    async def scenario():
        origin = Origin(speak)
        app = guarded(origin, Cache(0))
        asked = [{"accept-language": "de"}, {"accept-language": "en"}, {}] * 2
        bodies = [(await ask(app, headers=each)).body for each in asked]
        assert (bodies, origin.asked) == ([b"de", b"en", b"-"] * 2, 3)

    run(scenario, backend=backend)


def test_c11_a_vary_is_about_the_request_as_the_application_got_it(backend):
    async def app(scope, receive, send):
        country = dict(scope["headers"])[b"x-of"]
        scope["headers"] = [*scope["headers"], (b"x-country", country)]
        await Step(country, vary="X-Country", **FRESH)(scope, receive, send)

    async def scenario():
        guard = guarded(app, Cache(0))
        return [(await ask(guard, headers={"x-of": each})).body for each in ("de", "fr")]

    assert run(scenario, backend=backend) == [b"de", b"fr"]


# -- keys -----------------------------------------------------------------------------------------------------

OTHERS = {
    "path": {"path": "/b", "raw_path": b"/b"},
    "raw path": {"raw_path": b"/%61"},
    "query": {"query_string": b"a=1"},
    "scheme": {"scheme": "https"},
    "root": {"root_path": "/shop"},
    "host": {"headers": [(b"host", b"b")]},
    **{
        name: {"headers": [(b"host", b"a"), (name.encode(), b"evil")]}
        for name in ("x-forwarded-host", "x-forwarded-proto", "x-original-url", "x-http-method-override", "x-host")
    },
    "forwarded": {"headers": [(b"host", b"a"), (b"forwarded", b'for=1;host="evil"')]},
}


@pytest.mark.parametrize("other", OTHERS)
def test_c12_c13_what_is_part_of_the_key(backend, other):
    """Bad input 79: whoever poisons an entry gets it back alone."""

    async def scenario():
        app = guarded(Origin(Step(b"mine", **FRESH), Step(b"other", **FRESH)), Cache(0))
        bodies = []
        for changes in ({}, OTHERS[other], {}, OTHERS[other]):
            connection = Connection()
            scope = {**scope_of("/a"), **changes}
            await app(scope, connection.receive, connection.send)
            bodies.append(connection.answer.body)
        return bodies

    assert run(scenario, backend=backend) == [b"mine", b"other"] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"client": ("198.51.100.7", 1)},
        {"headers": [(b"host", b"A")]},
        {"headers": [(b"host", b"a"), (b"forwarded", b"for=2")]},
        {"headers": [(b"host", b"a"), (b"x-forwarded-for", b"2")]},
    ],
    ids=str,
)
def test_c12_what_is_no_part_of_the_key(backend, changes):
    async def scenario():
        origin = Origin(Step(b"mine", **FRESH))
        app = guarded(origin, Cache(0))
        first = {"headers": [(b"host", b"a"), (b"forwarded", b"for=1")]} if "for=2" in str(changes) else {}
        for each in (first, changes):
            connection = Connection()
            await app({**scope_of("/a"), **each}, connection.receive, connection.send)
        return origin.asked

    assert run(scenario, backend=backend) == 1


def test_c12_a_head_is_answered_from_a_get_and_not_the_other_way(backend):
    async def scenario():
        origin = Origin(Step(b"data", etag='"1"', **FRESH))
        app = guarded(origin, Cache(0))
        await ask(app, method="HEAD")
        await ask(app)
        head = await ask(app, method="HEAD")
        assert (head.status, head.body, how(head), origin.asked) == (200, b"", "hit", 2)
        assert head.headers["content-length"] == "4"

    run(scenario, backend=backend)


def test_a_head_that_fails_gets_the_head_of_an_old_response(backend):
    async def scenario():
        app = guarded(Origin(Step(b"data", content_length="4"), Step(status=503)), Cache(0, stale=60))
        await ask(app)
        head = await ask(app, method="HEAD")
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", "4")
        assert how(head) == "stale-if-error"

    run(scenario, backend=backend)


# -- requests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"range": "bytes=0-1"},
        {"if-range": '"1"'},
        {"if-match": '"1"'},
        {"cache-control": "no-store"},
        {"content-length": "4"},
        {"transfer-encoding": "chunked"},
    ],
    ids=str,
)
def test_c3_c14_c21_what_the_cache_keeps_out_of(backend, headers):
    async def scenario():
        cache = Cache(60, stale=60)
        origin = Origin(Step(b"data"), Step(b"data"), Step(status=503))
        app = guarded(origin, cache)
        await ask(app)
        await ask(app, headers=headers)
        assert (await ask(app, headers=headers)).status == 503
        assert (origin.asked, counts(cache)) == (3, (0, 1, 0, 0))

    run(scenario, backend=backend)


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ("no-cache", [None, None]),
        ("max-age=0", [None, None]),
        ("max-age=5", ["hit", None]),
        ("min-fresh=55", ["hit", None]),
        ("max-stale=99", ["hit", "hit"]),
        ("stale-if-error=5", ["hit", None]),
        ("stale-if-error=99", ["hit", "stale-if-error"]),
    ],
)
def test_c3_what_a_request_demands(backend, control, expected):
    async def scenario():
        steps = [Step(b"old", cache_control="max-age=60, stale-if-error=60")]
        app = guarded(Origin(*steps, Step(status=503)), Cache(0))
        await ask(app)
        seen = []
        for pause in (2, 65):
            await anyio.sleep(pause)
            answer = await ask(app, headers={"cache-control": control})
            assert answer.status == (503 if how(answer) is None else 200)
            seen.append(how(answer))
        return seen

    assert run(scenario, backend=backend) == expected


def test_c3_only_if_cached(backend):
    async def scenario():
        origin = Origin(Step(b"data"))
        app = guarded(origin, Cache(60, stale=60))
        demand = {"cache-control": "only-if-cached"}
        none = await ask(app, headers=demand)
        assert (none.status, none.body, none.headers["cache-status"]) == (
            504,
            b"",
            "resilient; detail=only-if-cached",
        )
        assert (await ask(app)).status == 200
        assert (await ask(app, headers=demand)).status == 200
        await anyio.sleep(61)
        assert (await ask(app, headers=demand)).status == 504
        assert origin.asked == 1

    run(scenario, backend=backend)


MODIFIED = formatdate(WALL - 1000, usegmt=True)


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ({"if-none-match": '"1"'}, 304),
        ({"if-none-match": 'W/"1"'}, 304),
        ({"if-none-match": '"0", W/"1"'}, 304),
        ({"if-none-match": "*"}, 304),
        ({"if-none-match": '"2"'}, 200),
        ({"if-none-match": "1"}, 200),
        ({"if-none-match": '"2"', "if-modified-since": MODIFIED}, 200),
        ({"if-modified-since": MODIFIED}, 304),
        ({"if-modified-since": formatdate(WALL - 999, usegmt=True)}, 304),
        ({"if-modified-since": formatdate(WALL - 1001, usegmt=True)}, 200),
        ({"if-modified-since": "yesterday"}, 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_c19_c21_a_client_that_has_the_same_is_told_so(backend, method, asked, status):
    fields = {"etag": 'W/"1"', "last_modified": MODIFIED, "content_type": "text/x", "vary": "Accept", **FRESH}

    async def scenario():
        origin = Origin(Step(b"data", **fields))
        app = guarded(origin, Cache(0))
        await ask(app)
        await anyio.sleep(7)
        answer = await ask(app, method=method, headers=asked)
        assert (answer.status, answer.body, origin.asked) == (
            status,
            b"data" * (status == 200 and method == "GET"),
            1,
        )
        assert (answer.headers["etag"], answer.headers["age"], answer.headers["vary"]) == ('W/"1"', "7", "Accept")
        assert ("content-type" in answer.headers) == ("content-length" in answer.headers) == (status == 200)

    run(scenario, backend=backend)


@pytest.mark.parametrize("asked", [{"if-none-match": '"1"'}, {"if-modified-since": MODIFIED}], ids=str)
def test_what_has_no_validator_is_never_the_same(backend, asked):
    seen, _ = ages(backend, Cache(60), Step(b"data"), at=(0, 1), headers=asked)
    assert seen == [(200, "data", None), (200, "data", "hit")]


def test_conditions_are_for_good_responses_only(backend):
    step = Step(b"gone", status=404, etag='"1"', **FRESH)
    seen, _ = ages(backend, Cache(0), step, at=(0, 1), headers={"if-none-match": '"1"'})
    assert seen == [(404, "gone", None), (404, "gone", "hit")]


def test_c19_a_304_of_the_application_passes(backend):
    async def scenario():
        origin = Origin(Step(b"data", etag='"1"'), Step(status=304), Step(status=503))
        app = guarded(origin, Cache(1, stale=60))
        await ask(app)
        await anyio.sleep(2)
        passed = await ask(app, headers={"if-none-match": '"1"'})
        assert (passed.status, how(passed)) == (304, None)
        failed = await ask(app, headers={"if-none-match": '"1"'})
        assert (failed.status, how(failed)) == (304, "stale-if-error")
        assert (await ask(app)).body == b"data"

    run(scenario, backend=backend)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "MADE-UP"])
@pytest.mark.parametrize("status", [200, 204, 303])
def test_c15_a_write_makes_obsolete_what_was_kept(backend, method, status):
    async def scenario():
        origin = Origin(Step(b"old", **FRESH), Step(status=status), Step(b"new", **FRESH))
        app = guarded(origin, Cache(0))
        await ask(app, "/a")
        await ask(app, "/a", method=method)
        return (await ask(app, "/a")).body

    assert run(scenario, backend=backend) == b"new"


@pytest.mark.parametrize(
    ("method", "status"), [("POST", 400), ("POST", 503), ("OPTIONS", 200), ("QUERY", 200), ("TRACE", 200)]
)
def test_c15_what_makes_nothing_obsolete(backend, method, status):
    async def scenario():
        app = guarded(Origin(Step(b"old", **FRESH), Step(status=status)), Cache(0))
        await ask(app)
        await ask(app, method=method)
        return how(await ask(app))

    assert run(scenario, backend=backend) == "hit"


@pytest.mark.parametrize(
    ("fields", "forgotten"),
    [
        ({"location": "/items/5%3A"}, True),
        ({"location": "/items/5:#top"}, True),
        ({"content_location": "http://A/items/5:"}, True),
        ({"location": "http://b/items/5:"}, False),
        ({"location": "/items/6"}, False),
    ],
    ids=str,
)
def test_c15_so_does_one_that_names_the_place(backend, fields, forgotten):
    async def scenario():
        app = guarded(Origin(Step(b"old", **FRESH), Step(status=201, **fields), Step(b"new", **FRESH)), Cache(0))
        await ask(app, "/items/5:")
        await ask(app, "/items", method="POST")
        return (await ask(app, "/items/5:")).body

    assert run(scenario, backend=backend) == (b"new" if forgotten else b"old")


@pytest.mark.parametrize("path", ["/shop/a", "/a"])
def test_c15_a_write_below_a_mount(backend, path):
    async def scenario():
        app = guarded(Origin(Step(b"old", **FRESH), Step(location="/shop/a"), Step(b"new", **FRESH)), Cache(0))
        mounted = {"root_path": "/shop", "query_string": b""}
        await ask(app, path, **mounted)
        await ask(app, "/other", method="POST", **mounted)
        return (await ask(app, path, **mounted)).body

    assert run(scenario, backend=backend) == b"new"


def test_c15_a_write_is_known_before_its_response_goes_out(backend):
    async def scenario():
        slow = Step(b"done", gap=5)
        origin = Origin(Step(b"old", **FRESH), slow, Step(b"new", **FRESH))
        app = guarded(origin, Cache(0))
        await ask(app)
        _, (answer, moment) = await gather(later(0, app, method="PUT"), later(1, app))
        assert (answer.body, moment) == (b"new", 1)

    run(scenario, backend=backend)


def test_c35_what_was_asked_for_before_a_write_is_not_kept(backend):
    async def scenario():
        steps = Step(b"before", wait=5, **FRESH), Step(b"", wait=1), Step(b"after", **FRESH)
        app = guarded(Origin(*steps), Cache(0))
        await gather(later(0, app), later(1, app, method="PUT"))
        return (await ask(app)).body

    assert run(scenario, backend=backend) == b"after"


# -- what is stored and shown ---------------------------------------------------------------------------------


def test_c16_c26_c27_what_a_stored_response_shows(backend):
    async def scenario():
        fields = {"age": "10", "connection": "x-hop", "x_hop": "1", "x_own": "2", "cache_status": "inner; hit"}
        app = guarded(Origin(Step(b"da", b"ta", wait=2, transfer_encoding="chunked", **fields, **FRESH)), Cache(0))
        first = await ask(app)
        assert (first.types, first.headers["age"]) == (["start", "body", "body"], "10")
        await anyio.sleep(5.5)
        second = await ask(app)
        assert second.messages == [
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"x-own", b"2"),
                    (b"cache-status", b"inner; hit"),
                    (b"cache-control", b"max-age=60"),
                    (b"age", b"17"),
                    (b"cache-status", b"resilient; hit; ttl=42"),
                    (b"content-length", b"4"),
                ],
            },
            {"type": "http.response.body", "body": b"data"},
        ]

    run(scenario, backend=backend)


def test_a_response_without_a_body_gets_no_length(backend):
    async def scenario():
        app = guarded(Origin(Step(status=204)), Cache(60))
        await ask(app)
        answer = await ask(app)
        assert (answer.status, how(answer), "content-length" in answer.headers) == (204, "hit", False)

    run(scenario, backend=backend)


def test_the_fields_about_limits_are_not_kept(backend):
    async def scenario():
        app = guarded(Origin(Step(b"data")), RateLimit("10/hour", burst=10), Cache(60))
        answers = [await ask(app) for _ in range(2)]
        values = [
            [value for name, value in each.messages[0]["headers"] if name == b"ratelimit"] for each in answers
        ]
        assert how(answers[1]) == "hit"
        assert [len(each) for each in values] == [1, 1]
        assert values[0] != values[1]

    run(scenario, backend=backend)


@pytest.mark.parametrize(
    ("fields", "fresh_for"),
    [
        ({}, 30),
        ({"cache_control": "public"}, 30),
        ({"cache_control": "max-age=10"}, 10),
        ({"cache_control": "max-age=99, s-maxage=10"}, 10),
        ({"expires": formatdate(WALL + 10, usegmt=True)}, 10),
        ({"cache_control": "max-age=10", "expires": formatdate(WALL + 99, usegmt=True)}, 10),
    ],
    ids=str,
)
def test_c17_the_application_has_the_first_word_about_freshness(backend, fields, fresh_for):
    seen, _ = ages(backend, Cache(30), Step(b"x", **fields), at=(0, fresh_for - 0.5, fresh_for))
    assert [each[2] for each in seen] == [None, "hit", None]


def test_c33_the_wall_clock_may_be_set(backend, wall):
    async def scenario():
        app = guarded(Origin(Step(b"x", expires=formatdate(WALL + 10, usegmt=True))), Cache(0))
        await ask(app)
        wall.offset += 1e6
        await anyio.sleep(9)
        assert how(await ask(app)) == "hit"
        wall.offset -= 2e6
        await anyio.sleep(2)
        assert how(await ask(app)) is None

    run(scenario, backend=backend)


def test_c25_nothing_is_delayed(backend):
    async def scenario():
        times = []
        app = guarded(Origin(Step(b"1", b"2", b"3", gap=1, **FRESH)), Cache(0))
        connection = Connection()

        async def send(message):
            times.append((message["type"][14:], runtime.now()))

        await app(scope_of(), connection.receive, send)
        assert times == [("start", 0), ("body", 1), ("body", 2), ("body", 3)]
        assert how(await ask(app)) == "hit"

    run(scenario, backend=backend)


BIG = b"x" * (BODY_BYTES // 2)


@pytest.mark.parametrize(
    ("step", "kept"),
    [
        (Step(BIG, BIG, **FRESH), True),
        (Step(BIG, BIG, b"x", **FRESH), False),
        (Step(BIG, BIG, b"x", b"y", b"z", **FRESH), False),
        (Step(BIG, BIG, content_length=str(BODY_BYTES), **FRESH), True),
        (Step(BIG, BIG, b"x", content_length=str(BODY_BYTES + 1), **FRESH), False),
        (Step(b"half", content_length="8", **FRESH), False),
        (Step(b"half", breaks=OSError("cut"), **FRESH), False),
        (Step(b"half", ends=False, **FRESH), False),
        (Step(b"x", more={"trailers": True}, **FRESH), False),
    ],
)
def test_c24_c25_only_what_is_whole_and_not_too_long_is_kept(backend, step, kept):
    assert twice(backend, Cache(0), step) == kept


def test_c24_a_client_that_goes_away_leaves_nothing_behind(backend):
    async def scenario():
        app = guarded(Origin(Step(b"1", b"2", **FRESH)), cache := Cache(0))
        connection = Connection()

        async def send(message):
            if message.get("body") == b"1":
                raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            await app(scope_of(), connection.receive, send)
        assert (cache.statistics().entries, cache.idle(0)) == (0, True)

    run(scenario, backend=backend)


@pytest.mark.parametrize("kind", ["pathsend", "zerocopysend"])
def test_files_that_the_server_sends_are_not_kept(backend, kind):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": f"http.response.{kind}"})

    assert not twice(backend, Cache(60), lambda scope: app)


def test_messages_beside_the_response_pass(backend):
    async def app(scope, receive, send):
        await send({"type": "http.response.early_hint", "links": []})
        await send({"type": "http.response.debug", "info": {}})
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.push", "path": "/", "headers": []})
        await send({"type": "http.response.body", "body": bytearray(b"x")})

    async def scenario():
        guard = guarded(app, Cache(60))
        first = await ask(guard)
        assert first.types == ["early_hint", "debug", "start", "push", "body"]
        assert (await ask(guard)).types == ["start", "body"]

    run(scenario, backend=backend)


def test_applications_that_break_the_rules_hear_it_from_the_server(backend):
    async def app(scope, receive, send):
        await send({"type": "http.response.body", "body": b"x"})

    assert not run(lambda: _types_of(guarded(app, cache := Cache(60)), cache), backend=backend)


async def _types_of(app, cache):
    assert (await ask(app)).types == ["body"]
    return cache.statistics().entries


def test_the_least_recently_used_goes(backend):
    async def scenario():
        cache = Cache(60, max_entries=2)
        app = guarded(Origin(Step(b"x")), cache)
        for path in ("/a", "/b", "/a", "/c"):
            await ask(app, path)
        assert [how(await ask(app, path)) for path in ("/a", "/c", "/b")] == ["hit", "hit", None]
        assert cache.statistics().entries == 2
        cache.clear()
        assert cache.statistics().entries == 0
        assert how(await ask(app, "/a")) is None

    run(scenario, backend=backend)


def test_there_are_no_sync_applications():
    cache = AsgiCache(Cache(1, name="pages"))
    with pytest.raises(TypeError, match="pages: there are no sync ASGI applications"):
        cache.link(lambda call: None, AsgiEdge(Origin(Step()), Cache(1)))


def test_nobody_is_waited_for_after_a_fork(backend):
    async def scenario():
        cache = Cache(60)
        app = guarded(origin := Origin(Step(b"x", wait=5)), cache)

        async def fork():
            await anyio.sleep(1)
            assert not cache.idle(1)
            cache.after_fork()
            cache._on_edges[AsgiEdge.cache].after_fork()

        await gather(later(0, app), fork, later(2, app))
        assert origin.asked == 2

    run(scenario, backend=backend)


# -- those who follow -----------------------------------------------------------------------------------------


def test_c30_c32_requests_for_the_same_at_the_same_time_are_one(backend):
    async def scenario():
        cache = Cache(0)
        origin = Origin(Step(b"bo", b"dy", wait=1, etag='"1"', **FRESH))
        app = guarded(origin, cache)
        same = later(0.5, app, headers={"if-none-match": '"1"'})
        seen = await gather(later(0, app), later(0, app), later(0.5, app), same, later(1, app))
        assert summary(seen[:3]) == [(b"body", None, 1), (b"body", "collapsed", 1), (b"body", "collapsed", 1)]
        assert (seen[3][0].status, how(seen[3][0])) == (304, "collapsed")
        assert seen[1][0].headers["cache-status"] == "resilient; fwd=miss; ttl=59; stored; collapsed"
        assert origin.asked == 1
        assert counts(cache) in {(0, 1, 4, 0), (1, 1, 3, 0)}

    run(scenario, backend=backend)


@pytest.mark.parametrize(
    "step",
    [
        Step(b"mine", wait=1, cache_control="no-store"),
        Step(b"mine", wait=1, set_cookie="a=b"),
        Step(b"mine", wait=1, cache_control="max-age=0, stale-if-error=9"),
        Step(b"mine", wait=1, content_length=str(BODY_BYTES + 1), **FRESH),
        Step(b"mine", wait=1, status=500),
        Step(wait=1, breaks=KeyError("x")),
    ],
)
def test_c31_those_who_cannot_have_it_go_on_all_at_once(backend, step):
    async def scenario():
        origin = Origin(step)
        app = guarded(origin, Cache(0))
        seen = await gather(*[later(0, app)] * 4)
        assert ([moment for _, moment in seen], origin.asked) == ([1, 2, 2, 2], 4)
        assert {how(answer) for answer, _ in seen if answer.messages} <= {None}

    run(scenario, backend=backend)


@pytest.mark.parametrize("fields", [{"cache_control": "no-store"}, {"content_length": "2000000"}], ids=str)
def test_c31_they_go_on_as_soon_as_the_headers_say_so(backend, fields):
    async def scenario():
        app = guarded(Origin(Step(b"1", b"2", wait=1, gap=5, **fields)), Cache(60))
        return [moment for _, moment in await gather(later(0, app), later(0, app))]

    assert run(scenario, backend=backend) == [11, 12]


def test_a_failure_that_was_too_long_to_hold_back_sets_nobody_apart(backend):
    async def scenario():
        app = guarded(
            origin := Origin(Step(b"too long", b"", status=503), Step(b"x", wait=1)), Cache(60), capture=5
        )
        await ask(app)
        await gather(later(0, app), later(0, app))
        return origin.asked

    assert run(scenario, backend=backend) == 2


def test_c31_once_it_is_known_nobody_waits_for_a_while(backend):
    async def scenario():
        app = guarded(Origin(Step(b"mine", wait=1, cache_control="no-store")), Cache(0))
        await ask(app)
        seen = await gather(*[later(0, app)] * 3)
        assert {moment for _, moment in seen} == {2}
        await anyio.sleep(APART_SECONDS)
        seen = await gather(*[later(0, app)] * 3)
        assert {moment for _, moment in seen} == {APART_SECONDS + 3, APART_SECONDS + 4}

    run(scenario, backend=backend)


def test_c31_they_wait_again_once_there_is_something_to_share(backend):
    async def scenario():
        secret, good = Step(cache_control="no-store"), Step(b"x", wait=1, cache_control="max-age=5")
        app = guarded(Origin(secret, good), Cache(0))
        await ask(app)
        await ask(app)
        await anyio.sleep(5)
        return [how(answer) for answer, _ in await gather(later(0, app), later(0, app))]

    assert run(scenario, backend=backend) == [None, "collapsed"]


def test_c31_those_whom_it_does_not_fit_go_on(backend):
    async def scenario():
        origin = Origin(lambda scope: Step(dict(scope["headers"]).get(b"x", b""), wait=1, vary="X", **FRESH))
        app = guarded(origin, Cache(0))
        seen = await gather(*(later(0, app, headers={"x": each}) for each in "aab"))
        assert summary(seen) == [(b"a", None, 1), (b"a", "collapsed", 1), (b"b", None, 2)]

    run(scenario, backend=backend)


@pytest.mark.parametrize("headers", [{"cache-control": "no-cache"}, {"cache-control": "max-age=0"}])
def test_who_wants_a_new_one_follows_nobody(backend, headers):
    async def scenario():
        app = guarded(Origin(Step(b"x", wait=2, **FRESH)), Cache(0))
        seen = await gather(later(0, app), later(1, app, headers=headers))
        assert [moment for _, moment in seen] == [2, 3]

    run(scenario, backend=backend)


def test_nobody_follows_a_head_or_who_may_get_a_304(backend):
    async def scenario():
        origin = Origin(Step(b"x", wait=1, **FRESH))
        app = guarded(origin, Cache(0))
        await gather(
            later(0, app, method="HEAD"), later(0, app, headers={"if-none-match": '"1"'}), later(0.5, app)
        )
        return origin.asked

    assert run(scenario, backend=backend) == 3


def test_nobody_follows_what_began_before_a_write(backend):
    async def scenario():
        app = guarded(Origin(Step(b"0", wait=3, **FRESH), Step(b"w"), Step(b"1", **FRESH)), Cache(0))
        seen = await gather(later(0, app), later(1, app, method="PUT"), later(2, app))
        return summary(seen)

    assert run(scenario, backend=backend) == [(b"0", None, 3), (b"w", None, 1), (b"1", None, 2)]


def test_those_who_are_known_follow_only_where_that_is_known_to_help(backend):
    async def scenario():
        cache = Cache(0)
        app = guarded(Origin(Step(b"x", wait=1, **SHARED)), cache)
        known = {"cookie": "id=a"}
        first = await gather(*[later(0, app, headers=known)] * 3)
        assert [(how(answer), moment) for answer, moment in first] == [(None, 1)] * 3
        cache.clear()
        second = await gather(*[later(0, app, headers=known)] * 3)
        assert [how(answer) for answer, _ in second] == [None, "collapsed", "collapsed"]
        assert (await later(0, app)())[1] == 3  # the others have their own

    run(scenario, backend=backend)


def test_those_who_follow_have_patience_but_not_for_ever(backend):
    """A response goes out no faster than a client reads, and may be endless."""

    async def scenario():
        app = guarded(origin := Origin(Step(b"1", b"2", b"3", wait=1, gap=0.4, **FRESH)), Cache(0))
        seen = await gather(later(0, app), later(0.5, app), later(1.9, app))
        assert [round(moment - 1 - PATIENCE_SECONDS, 6) for _, moment in seen] == [0.2, 2.2, 2.2]
        assert origin.asked == 3
        assert how(await ask(app)) == "hit"

    run(scenario, backend=backend)


def test_patience_ends_before_a_deadline_does(backend):
    async def scenario():
        app = guarded(Origin(Step(b"1", b"2", gap=5, **FRESH), Step(b"new")), Cache(0))

        async def patient():
            with deadline.published(deadline.Deadline(50, Timeout(50))):
                return await later(0, app)()

        return summary(await gather(later(0, app), patient))

    assert run(scenario, backend=backend) == [(b"12", None, 10), (b"new", None, PATIENCE_SECONDS)]


def test_a_stream_that_ends_in_time_is_shared(backend):
    async def scenario():
        origin = Origin(Step(b"1", b"2", wait=1, gap=0.4, **FRESH))
        app = guarded(origin, Cache(0))
        seen = await gather(later(0, app), later(0.5, app), later(1.5, app))
        assert [(how(answer), round(moment, 6)) for answer, moment in seen] == [
            (None, 1.8),
            ("collapsed", 1.8),
            ("collapsed", 1.8),
        ]

    run(scenario, backend=backend)


def test_nobody_joins_what_has_been_going_on_for_too_long(backend):
    async def scenario():
        app = guarded(Origin(Step(b"1", b"2", gap=9, **FRESH), Step(b"new", **FRESH)), Cache(0))
        seen = await gather(later(0, app), later(5, app))
        assert summary(seen) == [(b"12", None, 18), (b"new", None, 5)]
        assert (await ask(app)).body == b"new"  # it was asked for later

    run(scenario, backend=backend)


def test_c31_a_response_that_gets_too_long_is_followed_no_more(backend):
    async def scenario():
        app = guarded(Origin(Step(BIG, BIG, b"x", b"y", gap=0.2, **FRESH)), Cache(0))
        seen = await gather(later(0, app), later(0.1, app))
        assert [round(moment, 6) for _, moment in seen] == [0.8, 1.4]

    run(scenario, backend=backend)


def test_a_failure_is_not_shared_but_old_responses_are(backend):
    async def scenario():
        cache = Cache(1, stale=60)
        origin = Origin(Step(b"old"), Step(b"bad", status=503, wait=1), Step(b"new"))
        app = guarded(origin, cache)
        await ask(app)
        await anyio.sleep(2)
        seen = await gather(*[later(0, app)] * 3)
        assert summary(seen) == [(b"old", "stale-if-error", 3)] * 3
        assert origin.asked == 2
        cache.clear()
        origin.steps = [Step(b"bad", status=503, wait=1), Step(b"new")]
        seen = await gather(*[later(0, app)] * 3)
        assert [body for body, _, _ in summary(seen)] == [b"bad", b"new", b"new"]

    run(scenario, backend=backend)


def test_a_refusal_is_for_the_one_who_is_refused(backend):
    async def scenario():
        refusal = Rejected("no", policy="limit")
        app = guarded(Origin(Step(b"old"), Step(wait=1, breaks=refusal), Step(b"new")), Cache(1, stale=60))
        await ask(app)
        await anyio.sleep(2)
        return summary(await gather(later(0, app), later(0, app)))

    assert run(scenario, backend=backend) == [(b"old", "stale-if-error", 3), (b"new", None, 3)]


@pytest.mark.parametrize("ends", ["cancelled", "out of time"])
def test_c30_if_the_one_who_leads_ends_the_next_one_leads(backend, ends):
    async def scenario():
        late = Step(wait=2, breaks=TimeoutError())
        origin = Origin(*[late] * (ends == "out of time"), Step(b"x", wait=5, **FRESH))
        app = guarded(origin, Cache(0))

        async def leads():
            with anyio.move_on_after(2.5 - 0.5 * (ends == "cancelled")):
                with deadline.published(deadline.Deadline(2, Timeout(2))):
                    assert isinstance((await ask(app)).error, TimeoutError)

        _, *seen = await gather(leads, later(1, app), later(1, app))
        assert summary(seen) == [(b"x", None, 7), (b"x", "collapsed", 7)]
        assert origin.asked == 2

    run(scenario, backend=backend)


def test_who_follows_and_is_cancelled_takes_nobody_along(backend):
    async def scenario():
        origin = Origin(Step(b"x", wait=3, **FRESH))
        app = guarded(origin, Cache(0))

        async def cancelled():
            with anyio.move_on_after(2):
                await ask(app)

        seen = await gather(later(0, app), cancelled, later(1, app))
        assert summary([seen[0], seen[2]]) == [(b"x", None, 3), (b"x", "collapsed", 3)]
        assert origin.asked == 1

    run(scenario, backend=backend)


@pytest.mark.parametrize("old", [False, True])
def test_c32_who_follows_keeps_his_own_deadline(backend, old):
    async def scenario():
        cache = Cache(1, stale=60)
        steps = [Step(b"old")] * old + [Step(b"x", wait=9)]
        app = guarded(Origin(*steps), cache)
        if old:
            await ask(app)
        await anyio.sleep(5)

        async def hurried():
            await anyio.sleep(1)
            with deadline.published(deadline.Deadline(8, Timeout(2))):
                return await ask(app), runtime.now()

        _, (answer, moment) = await gather(later(0, app), hurried)
        assert moment == 8
        assert (answer.body, how(answer)) == (b"old", "stale-if-error") if old else answer.status == 503

    run(scenario, backend=backend)


def test_who_fails_gets_what_somebody_else_was_luckier_to_get(backend):
    async def scenario():
        steps = Step(b"bad", wait=5, status=503), Step(b"good", wait=1)
        app = guarded(Origin(*steps), Cache(60, stale=60))
        first, _ = await gather(later(0, app, headers={"if-none-match": '"1"'}), later(1, app))
        return summary([first])

    assert run(scenario, backend=backend) == [(b"good", "hit", 5)]


def test_an_error_that_nobody_wants_is_not_answered_for_those_who_follow_either(backend):
    async def scenario():
        app = guarded(
            Origin(Step(b"old"), Step(wait=1, breaks=KeyError()), Step(b"new")), Cache(1, stale=9, on=OSError)
        )
        await ask(app)
        await anyio.sleep(2)
        seen = await gather(*[later(0, app)] * 2)
        assert isinstance(seen[0][0].error, KeyError)
        assert summary(seen[1:]) == [(b"new", None, 3)]

    run(scenario, backend=backend)


def test_c31_what_was_too_old_when_it_came_is_for_nobody_else(backend):
    async def scenario():
        step = Step(b"1", b"2", b"3", wait=1.5, gap=0.3, cache_control="max-age=2, stale-if-error=60")
        app = guarded(Origin(step), Cache(0))
        return summary(await gather(later(0, app), later(0.5, app)))

    assert run(scenario, backend=backend) == [(b"123", None, 2.4), (b"123", None, 4.8)]


# -- in the background ----------------------------------------------------------------------------------------


def test_c4_c20_an_old_response_is_served_while_one_run_renews_it(backend):
    async def scenario():
        cache = Cache(10, refresh=20)
        origin = Origin(Step(b"old"), Step(b"new", wait=2))
        app = guarded(origin, cache)
        await ask(app)
        await anyio.sleep(11)
        seen = await gather(later(0, app), later(1, app), later(1, app, method="HEAD"), later(2.5, app))
        assert summary(seen) == [
            (b"old", "stale-while-revalidate", 11),
            (b"old", "stale-while-revalidate", 12),
            (b"", "stale-while-revalidate", 12),
            (b"new", "hit", 13.5),
        ]
        assert seen[0][0].headers["cache-status"] == "resilient; hit; ttl=-1; detail=stale-while-revalidate"
        assert (origin.asked, counts(cache)) == (2, (1, 2, 0, 3))
        await anyio.sleep(30)
        late = await later(0, app)()
        assert (late[0].body, how(late[0])) == (b"new", None)  # never past the window

    run(scenario, backend=backend)


def test_c5_what_runs_in_the_background(backend):
    """It is a plain GET whose client is always there and takes only bytes."""
    seen = []

    async def inspecting(scope, receive, send):
        seen.append((scope, [await receive()], deadline.current()))
        with anyio.move_on_after(50):
            seen[-1][1].append(await receive())
        await Step(b"x")(scope, receive, send)

    async def scenario():
        app = guarded(Origin(lambda scope: inspecting), Timeout(60), Cache(10, refresh=99))
        headers = {"if-none-match": '"1"', "cache-control": "stale-if-error=5", "x-own": "1", "accept": "a"}
        extensions = {"http.response.pathsend": {}, "tls": {}}
        state = {"pool": object()}
        with deadline.published(deadline.Deadline(500, Timeout(500))):
            await ask(app)
            await anyio.sleep(20)
            answer = await ask(app, method="HEAD", headers=headers, extensions=extensions, state=state)
        assert how(answer) == "stale-while-revalidate"
        await anyio.sleep(100)
        scope, messages, limit = seen[1]
        assert (scope["method"], scope["path"], limit) == ("GET", "/", None)
        assert [name for name, _ in scope["headers"]] == [b"host", b"x-own", b"accept"]
        assert (scope["extensions"], scope["state"] == state, scope["state"] is state) == (
            {"tls": {}},
            True,
            False,
        )
        assert messages == [{"type": "http.request", "body": b"", "more_body": False}]
        assert len(seen) == 2

    run(scenario, backend=backend)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (Step(b"bad", status=503), "FailedResponse"),
        (Step(b"x" * 10, b"y", status=503), "FailedResponse"),
        (Step(breaks=KeyError("x")), "KeyError"),
        (Step(b"1", b"2", gap=RENEWAL_SECONDS), "TimeoutError"),
    ],
    ids=["status", "too long to hold", "error", "too slow"],
)
def test_c5_a_failure_in_the_background_is_told_and_the_old_response_stays(backend, step, error):
    async def scenario():
        cache = Cache(10, refresh=1000, stale=1000)
        app = guarded(origin := Origin(Step(b"old"), step), cache, capture=5)
        await ask(app)
        await anyio.sleep(11)
        with capture_events(cache) as events:
            assert how(await ask(app)) == "stale-while-revalidate"
            await anyio.sleep(RENEWAL_SECONDS + 1)
        assert [(event.name, getattr(event, "error", None)) for event in events] == [
            ("cache.stale_served", None),
            ("cache.refresh_failed", error),
        ]
        assert how(await ask(app)) == "stale-while-revalidate"
        await anyio.sleep(RENEWAL_SECONDS + 1)
        assert origin.asked == 3

    run(scenario, backend=backend)


@pytest.mark.parametrize(("headers", "part"), [([], BIG), ([(b"content-type", b"text/event-stream")], b"")])
def test_an_endless_stream_in_the_background_is_ended(backend, headers, part):
    async def endless(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while True:
            await anyio.sleep(0.1)
            await send({"type": "http.response.body", "body": part, "more_body": True})

    async def scenario():
        cache = Cache(10, refresh=1000)
        origin = Origin(Step(b"old"), lambda scope: endless)
        app = guarded(origin, cache)
        await ask(app)
        await anyio.sleep(11)
        with capture_events(cache) as events:
            assert how(await ask(app)) == "stale-while-revalidate"
            await anyio.sleep(RENEWAL_SECONDS + 1)
        assert [event.name for event in events] == ["cache.stale_served"]

    run(scenario, backend=backend)


def test_a_busy_stream_in_the_background_lets_others_run(backend):
    sent = []

    async def busy(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while len(sent) < 1000:
            sent.append(1)
            await send({"type": "http.response.body", "body": b"", "more_body": True})

    async def scenario():
        app = guarded(Origin(Step(b"old"), lambda scope: busy), Cache(10, refresh=1000))
        await ask(app)
        await anyio.sleep(11)
        await ask(app)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        assert 0 < len(sent) < 100

    run(scenario, backend=backend)


def test_what_is_not_to_be_kept_any_more_is_forgotten_by_a_renewal(backend):
    seen, _ = ages(
        backend, Cache(10, refresh=60), Step(b"old"), Step(b"new", cache_control="no-store"), at=(0, 11, 12)
    )
    assert seen == [(200, "old", None), (200, "old", "stale-while-revalidate"), (200, "new", None)]


def test_background_tasks_of_a_renewal_take_their_time(backend):
    ended = []

    async def busy(scope, receive, send):
        await Step(b"new")(scope, receive, send)
        await anyio.sleep(2 * RENEWAL_SECONDS)
        ended.append(runtime.now())

    async def scenario():
        app = guarded(Origin(Step(b"old"), lambda scope: busy), Cache(10, refresh=60))
        await ask(app)
        await anyio.sleep(11)
        await ask(app)
        await anyio.sleep(1)
        assert (await ask(app)).body == b"new"
        await anyio.sleep(3 * RENEWAL_SECONDS)
        assert ended == [11 + 2 * RENEWAL_SECONDS]

    run(scenario, backend=backend)


def test_the_policies_further_in_guard_a_renewal(backend):
    async def scenario():
        cache = Cache(10, refresh=1000)
        app = guarded(Origin(Step(b"old"), Step(b"x", wait=9)), cache, Timeout(5))
        await ask(app)
        await anyio.sleep(11)
        with capture_events(cache) as events:
            await ask(app)
            await anyio.sleep(6)
        assert [getattr(event, "error", None) for event in events] == [None, "TimedOut"]

    run(scenario, backend=backend)


def test_a_renewal_is_followed_by_those_who_cannot_wait(backend):
    async def scenario():
        app = guarded(Origin(Step(b"old"), Step(b"new", wait=5)), Cache(10, refresh=3))
        await ask(app)
        await anyio.sleep(12)
        seen = await gather(later(0, app), later(2, app))
        assert summary(seen) == [(b"old", "stale-while-revalidate", 12), (b"new", "collapsed", 17)]

    run(scenario, backend=backend)
