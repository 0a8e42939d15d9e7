"""What callers are told when they are refused, and the fields about limits on all that they get."""

import json
import math

import pytest
from starlette.responses import PlainTextResponse

from resilient import Bulkhead, CircuitBreaker, Pipeline, RateLimit, Timeout, runtime
from resilient.asgi import ResilienceMiddleware
from resilient.asgi.limits import names
from resilient.asgi.refusals import preferred, refusal_of
from resilient.errors import BulkheadFull, CircuitOpen, Draining, RateLimited, Shed, TimedOut
from resilient.http import headers
from resilient.testing import run

from .driver import ask, replies, scope_of

QUOTA = "https://iana.org/assignments/http-problem-types#quota-exceeded"
CAPACITY = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"


def guarded(app, *policies, **options):
    return ResilienceMiddleware(app, pipeline=Pipeline(*policies), **options)


async def second(middleware, **request):
    await ask(middleware)
    return await ask(middleware, **request)


def limited(**options):
    return guarded(replies(200), RateLimit("1/minute"), **options)


# -- the problem ----------------------------------------------------------------------------------------------


def test_who_makes_too_many_requests_is_told_by_429(backend):
    answer = run(second, limited(), backend=backend)
    body = json.loads(answer.body)
    assert answer.status == body["status"] == 429
    assert body == {
        "type": QUOTA,
        "title": "Quota exceeded",
        "status": 429,
        "detail": "More requests were made than the limit allows.",
        "violated-policies": ["default"],
    }
    assert answer.headers == {
        "content-type": "application/problem+json",
        "content-length": str(len(answer.body)),
        "retry-after": "60",
        "cache-control": "no-store",
        "ratelimit-policy": '"default";q=1;w=60',
        "ratelimit": '"default";r=0;t=60',
    }
    assert answer.whole


def test_a_limit_is_named_in_the_body_as_it_is(backend):
    middleware = guarded(replies(200), RateLimit("1/minute", name='a "b" \\c'))
    answer = run(second, middleware, backend=backend)
    assert json.loads(answer.body)["violated-policies"] == ['a "b" \\c']
    assert answer.headers["ratelimit"] == r'"a \"b\" \\c";r=0;t=60'


def a_refusal(error, **options):
    options = {"retry_after": 1.0} | options
    return refusal_of(error, None, **options)


@pytest.mark.parametrize(
    ("error", "options", "status", "type_", "detail"),
    [
        (BulkheadFull("", policy="p"), {}, 503, CAPACITY, "The service is overloaded."),
        (BulkheadFull("", policy="p"), {"inside": True}, 503, "about:blank", "depends on"),
        (CircuitOpen("", policy="p"), {}, 503, "about:blank", "Something that this service depends on"),
        (RateLimited("", policy="p"), {"inside": True}, 503, "about:blank", "depends on"),
        (TimedOut(policy="p"), {}, 503, "about:blank", "The request took too long."),
        (TimedOut(policy="p"), {"gateway": True}, 504, "about:blank", "The request took too long."),
        (Draining("", policy="p"), {}, 503, "about:blank", "The service is being restarted."),
    ],
)
def test_why(error, options, status, type_, detail):
    refusal = a_refusal(error, **options)
    problem = refusal.problem()
    assert (refusal.status, problem["status"], problem["type"]) == (status, status, type_)
    assert detail in problem["detail"]
    titles = {429: "Quota exceeded", 504: "Gateway Timeout"}
    title = "Temporary reduced capacity" if type_ == CAPACITY else titles.get(status, "Service Unavailable")
    assert problem["title"] == title
    assert "violated-policies" not in problem


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (RateLimited("", policy="p", retry_after=0.2), 1),
        (RateLimited("", policy="p", retry_after=1.01), 2),
        (CircuitOpen("", policy="p", retry_after=0.0), 1),
        (RateLimited("", policy="p", retry_after=1e12), 2**31 - 1),
        (Shed("", policy="p", retry_after=30.0), 30),
    ],
)
def test_how_long_to_wait(error, seconds):
    refusal = a_refusal(error)
    assert (refusal.retry_after, dict(refusal.headers)[b"retry-after"]) == (seconds, b"%d" % seconds)


@pytest.mark.parametrize("error", [BulkheadFull("", policy="p"), Shed("", policy="p", retry_after=0.02)])
def test_where_nobody_knows_how_long_to_wait_not_all_are_told_the_same(error):
    told = {a_refusal(error, retry_after=5.0).retry_after for _ in range(200)}
    assert told <= set(range(5, 11))
    assert len(told) > 2


def test_an_error_of_ours_that_the_application_lets_out_is_no_fault_of_the_caller(backend):
    async def scenario():
        return await ask(guarded(replies(RateLimited("of a client", policy="p", retry_after=7)), RateLimit("9/s")))

    answer = run(scenario, backend=backend)
    assert (answer.status, answer.headers["retry-after"], answer.error) == (503, "7", None)
    assert b"of a client" not in answer.body


def test_an_open_breaker_is_told_by_503(backend):
    async def scenario():
        breaker = CircuitBreaker()
        breaker.isolate()
        return await ask(guarded(replies(200), breaker))

    assert run(scenario, backend=backend).status == 503


def test_to_head_the_body_is_not_sent(backend):
    answer = run(second, limited(), backend=backend)
    head = run(lambda: second(limited(), method="HEAD"), backend=backend)
    assert (head.status, head.body) == (429, b"")
    assert head.headers == answer.headers


# -- in the form that the caller likes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (None, "application/problem+json"),
        ("*/*", "application/problem+json"),
        ("application/*", "application/problem+json"),
        ("application/json", "application/json"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "text/html; charset=utf-8"),
        ("text/plain", "text/plain; charset=utf-8"),
        ("text/*;q=0.5, application/json;q=0.1", "text/html; charset=utf-8"),
        ("text/*, text/html;q=0", "text/plain; charset=utf-8"),
        ("TEXT/PLAIN; charset=utf-8; q=1", "text/plain; charset=utf-8"),
        ("image/png", "application/problem+json"),
        ("text/plain;q=rubbish, */*;q=0.1", "application/problem+json"),
        ("text/plain;q=9", "text/plain; charset=utf-8"),
        (",;q=,", "application/problem+json"),
        ("text/plain" + "," * 990, "text/plain; charset=utf-8"),
        ("text/plain" + "," * 991, "application/problem+json"),  # too long to be looked through for a refusal
    ],
)
def test_the_form_is_the_one_that_the_caller_likes_best(accept, kind):
    headers_ = {} if accept is None else {"accept": accept}
    answer = run(lambda: second(limited(), headers=headers_))
    assert answer.headers["content-type"] == kind
    assert b"Quota exceeded" in answer.body


def test_several_accept_lines_are_one_list():
    scope = scope_of()
    scope["headers"] += [(b"accept", b"image/png"), (b"accept", b"text/plain")]
    assert preferred(scope, ("text/html", "text/plain")) == "text/plain"


# -- in the words of the application --------------------------------------------------------------------------


def test_a_custom_refusal_takes_the_place_of_ours(backend):
    def on_rejected(scope, refusal):
        seen.append((scope["path"], refusal.status, refusal.retry_after, type(refusal.error)))
        return PlainTextResponse("slow down", refusal.status, headers={"x": "y"})

    seen = []
    answer = run(second, limited(on_rejected=on_rejected), backend=backend)
    assert (answer.status, answer.body, answer.headers["x"]) == (429, b"slow down", "y")
    assert answer.headers["ratelimit"] == '"default";r=0;t=60'
    assert seen == [("/", 429, 60, RateLimited)]


def test_a_custom_refusal_may_be_awaited_or_leave_it_to_us(backend):
    async def on_rejected(scope, refusal):
        return None

    assert run(second, limited(on_rejected=on_rejected), backend=backend).status == 429


def test_a_custom_refusal_has_to_be_a_response():
    answer = run(second, limited(on_rejected=lambda scope, refusal: "slow down"))
    assert "on_rejected= returned 'slow down'; return a response or None" in str(answer.error)


# -- the fields about limits ----------------------------------------------------------------------------------


def test_every_limited_response_tells_what_is_left(backend):
    async def scenario():
        middleware = guarded(replies(200, headers=[(b"ratelimit", b'"app";r=1;t=1')]), RateLimit("10/minute"))
        answers = [await ask(middleware) for _ in range(2)]
        return [
            [value for name, value in answer.messages[0]["headers"] if name == b"ratelimit"] for answer in answers
        ]

    assert run(scenario, backend=backend) == [
        [b'"app";r=1;t=1', b'"default";r=9;t=6'],
        [b'"app";r=1;t=1', b'"default";r=8;t=12'],
    ]


def test_each_limit_that_has_counted_is_told(backend):
    async def scenario():
        limits = (
            RateLimit("2/minute", key=lambda scope: scope["client"][0], name="address"),
            RateLimit("5/hour", burst=1, key=lambda scope: scope["path"], name='a "path"\n'),
            RateLimit("100/s"),
            RateLimit("7/10ms"),
        )
        middleware = guarded(replies(200), *limits, legacy_headers=True)
        answers = [await ask(middleware) for _ in range(3)]
        return [(answer.status, answer.headers) for answer in answers]

    (first, told), (again, then), (third, last) = run(scenario, backend=backend)
    assert (first, again, third) == (200, 429, 429)
    assert told["ratelimit-policy"] == (
        '"address";q=2;w=60, "a \\"path\\"?";q=1;w=720, "default";q=100;w=1, "default-2";q=7'
    )
    assert (
        told["ratelimit"]
        == '"address";r=1;t=30, "a \\"path\\"?";r=0;t=720, "default";r=99;t=1, "default-2";r=6;t=1'
    )
    assert (
        then["ratelimit"]
        == '"address";r=0;t=30, "a \\"path\\"?";r=0;t=720, "default";r=99;t=1, "default-2";r=6;t=1'
    )
    assert last["ratelimit"] == '"address";r=0;t=30, "default";r=99;t=1, "default-2";r=6;t=1'
    assert [told[f"x-ratelimit-{name}"] for name in ("limit", "remaining", "reset")] == ["1", "0", "720"]
    assert [last[f"x-ratelimit-{name}"] for name in ("limit", "remaining", "reset")] == ["2", "0", "30"]


def test_what_our_clients_read_is_what_was_told(backend):
    async def scenario():
        answer = await second(limited(legacy_headers=True))
        fields = answer.messages[0]["headers"]
        return headers.quota(fields, 0), headers.throttled_for(429, fields, 0)

    quota, wait = run(scenario, backend=backend)
    assert (quota.remaining, quota.reset, wait) == (0, 60, 60)


def test_who_was_not_counted_is_told_nothing(backend):
    limit = RateLimit("1/minute", key=lambda scope: "k")
    full = Bulkhead(1)
    full.admit(None, 0)

    async def scenario():
        return await ask(guarded(replies(200), full, limit))

    assert "ratelimit" not in run(scenario, backend=backend).headers


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a", None, "a", None, "a"], ['"a"', '"default"', '"a-2"', '"default-2"', '"a-3"']),
        (["ä", "\\"], ['"?"', '"\\\\"']),
        (["a-2", "a", "a"], ['"a-2"', '"a"', '"a-3"']),
        (["a-b", "a"], ['"a-b"', '"a"']),
    ],
)
def test_names_of_limits_are_strings_of_structured_fields(given, expected):
    told = names([RateLimit("1/s", name=name) for name in given])
    assert told == expected
    assert headers.structured([", ".join(told)]) is not None


@pytest.mark.parametrize("key", [None, len])
def test_what_is_left_is_rounded_to_the_safe_side(key):
    limit = RateLimit("3/second", key=key)
    argument = () if key is None else ("a",)
    place = None if key is None else 1

    async def scenario():
        seen = [limit.left(place)]
        for wait in (0, 0, 0, 0.1, 0.3):
            await runtime.asleep(wait)
            try:
                await limit.acall(the_same, *argument)
            except RateLimited as error:
                seen.append(error.retry_after)
            seen.append(limit.left(place))
        return seen

    async def the_same(*_arguments):
        pass

    full, one, two, three, refused, still, after = run(scenario)
    assert full == (3, 0.0)
    assert [left for left, _reset in (one, two, three, still, after)] == [2, 1, 0, 0, 0]
    assert math.isclose(one[1], 1 / 3)
    assert math.isclose(three[1], 1 / 3, abs_tol=1e-5)
    assert refused == still[1]
    assert math.isclose(after[1], 1 / 3 - 0.4 + 1 / 3, abs_tol=1e-4)


def test_a_new_key_in_a_full_table_shares_what_is_left():
    limit = RateLimit("2/minute", key=lambda key: key, max_keys=1)
    for key in ("a", "b", "c"):
        limit.call(str, key)
    assert limit.left("d")[0] == 0
    assert RateLimit("2/minute", key=lambda key: key, max_keys=1).left("d")[0] == 2


def test_a_pipeline_without_limits_has_nothing_to_tell():
    assert run(ask, guarded(replies(200), Timeout(2))).headers == {}
