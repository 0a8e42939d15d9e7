"""State for each origin: breakers, rate limits and budgets, or by a key of the user's."""

import gc
import weakref
from types import SimpleNamespace

import pytest

from resilient import CircuitBreaker, Keyed, Pipeline, RateLimit, Retry, RetryBudget, Timeout
from resilient.errors import CircuitOpen, RateLimited
from resilient.testing import capture_events

ORIGINS = {
    "https://example.com": "https://example.com",
    "https://example.com/": "https://example.com",
    "https://example.com:443/path?query#fragment": "https://example.com",
    "https://EXAMPLE.com/": "https://example.com",
    "https://me:secret@example.com/": "https://example.com",
    "http://example.com:80/": "http://example.com",
    "http://example.com/": "http://example.com",
    "https://example.com:8443/": "https://example.com:8443",
    "http://example.com:443/": "http://example.com:443",
    "https://[2001:DB8::1]:8080/": "https://[2001:db8::1]:8080",
    "https://münchen.example/": "https://xn--mnchen-3ya.example",
    "http://127.0.0.1:80": "http://127.0.0.1",
}


@pytest.mark.parametrize("url", ORIGINS)
def test_origins(family, url):
    http, ours = family
    assert ours.origin(http.Request("GET", url)) == ORIGINS[url]


def down(name):
    """Return the outcomes of a stub where one host is down."""
    return lambda request: 503 if request.url.host == name else 200


def test_origins_of_urls_that_keep_their_parts_elsewhere(family):
    """What makes it quick is private to the clients, and may change."""
    http, ours = family
    for url, origin in ORIGINS.items():
        real = http.URL(url)
        public = SimpleNamespace(scheme=real.scheme, netloc=real.netloc)
        assert ours.origin(SimpleNamespace(url=public)) == origin


def test_a_breaker_for_each_origin(kit):
    """One host that is down takes no other one with it."""

    async def scenario():
        breaker = CircuitBreaker(consecutive=2, name="breaker")
        transport = kit.guard(kit.stub(down("b"), pool=99), breaker)
        for _ in range(2):
            await kit.send(transport, kit.request(url="https://a/x"))
            await kit.send(transport, kit.request(url="https://b/x"))
        assert breaker.of("https://a").current_state == "closed"
        assert breaker.of("https://b").current_state == "open"
        assert (await kit.send(transport, kit.request(url="https://a/y"))).status_code == 200
        with pytest.raises(CircuitOpen) as caught:
            await kit.send(transport, kit.request(url="https://b/y"))
        assert "https://b" in caught.value.policy
        for other in ("http://b/", "https://b:444/"):
            assert (await kit.send(transport, kit.request(url=other))).status_code == 503
        assert set(breaker.statistics().partitions) == {"https://a", "https://b", "http://b", "https://b:444"}

    kit.run(scenario)


def test_a_rate_limit_for_each_origin(kit):
    async def scenario():
        limit = RateLimit("2/hour")
        transport = kit.guard(kit.stub(200, pool=99), limit)
        for url in ("https://a/", "https://b/"):
            for _ in range(2):
                await kit.send(transport, kit.request(url=url))
            with pytest.raises(RateLimited):
                await kit.send(transport, kit.request(url=url))
        assert limit.statistics().keys == 2

    kit.run(scenario)


def test_a_budget_for_each_origin(kit):
    async def scenario():
        budget = RetryBudget(cap=2, refill=10_000)
        stub = kit.stub(503, pool=99)
        transport = kit.guard(stub, Retry(9, wait=0, budget=budget))
        for url in ("https://a/", "https://b/"):
            await kit.send(transport, kit.request(url=url))
        assert len(stub.seen) == 6
        assert budget.statistics().partitions == 2

    kit.run(scenario)


def test_a_key_of_the_user(kit):
    """All three are counted by it, and it is asked once for each request."""

    async def scenario():
        asked = []

        def tenant(request):
            asked.append(request)
            return request.headers.get("X-Tenant")

        breaker, budget = CircuitBreaker(consecutive=3), RetryBudget(cap=2, refill=10_000)
        limit = RateLimit("99/hour")
        stub = kit.stub(503, pool=99)
        transport = kit.guard(stub, Retry(9, wait=0, budget=budget), breaker, limit, key=tenant)
        request = kit.request(headers={"X-Tenant": "one"})
        await kit.send(transport, request)
        assert asked == [request]
        assert (len(stub.seen), budget.tokens(0, "one"), budget.tokens(0, "two")) == (3, 0, 2)
        assert set(breaker.statistics().partitions) == {"one"}
        assert breaker.of("one").current_state == "open"
        two = kit.request(url="https://b/", headers={"X-Tenant": "two"})
        assert (await kit.send(transport, two)).status_code == 503
        with pytest.raises(CircuitOpen):
            await kit.send(transport, kit.request(url="https://c/", headers={"X-Tenant": "one"}))

    kit.run(scenario)


def test_a_key_of_the_policy_comes_before_that_of_the_transport(kit):
    async def scenario():
        breaker = CircuitBreaker(consecutive=1, key=lambda request: request.method)
        limit = RateLimit("2/hour", key=lambda request: request.method)
        transport = kit.guard(kit.stub(503, pool=99), breaker, limit)
        for method in ("GET", "POST"):
            await kit.send(transport, kit.request(method))
        assert set(breaker.statistics().partitions) == {"GET", "POST"}
        assert limit.statistics().keys == 2

    kit.run(scenario)


def test_keyed_policies_see_the_request(kit):
    async def scenario():
        timeouts = Keyed(lambda: Timeout(2), key=lambda request: request.url.path)
        stub = kit.stub(200)
        await kit.send(kit.guard(stub, timeouts), kit.request(url="https://a/path"))
        assert set(timeouts.statistics()) == {"/path"}
        assert stub.seen[0].timeouts == kit.capped(2.0)

    kit.run(scenario)


def test_a_key_that_is_none(kit):
    """It is a key as any other."""

    async def scenario():
        policies = CircuitBreaker(), RateLimit("9/s"), Retry(wait=0, budget=RetryBudget())
        for policy in policies:
            stub = kit.stub(503, 200, pool=2)
            assert (await kit.send(kit.guard(stub, policy, key=lambda request: None), kit.request())).status_code

    kit.run(scenario)


def test_a_key_that_cannot_be_hashed(kit):
    async def scenario():
        for policy in (CircuitBreaker(), RateLimit("9/s")):
            stub = kit.stub(200)
            with pytest.raises(TypeError, match="list, which is not hashable"):
                await kit.send(kit.guard(stub, policy, key=lambda request: []), kit.request())
            assert stub.seen == []

    kit.run(scenario)


def test_a_key_that_raises(kit):
    """What it raises is what the caller gets, also if it is what a missing attribute raises."""

    async def scenario():
        for error in (LookupError("mine"), AttributeError("mine")):

            def key(request, error=error):
                raise error

            with pytest.raises(type(error), match="mine"):
                await kit.send(kit.guard(kit.stub(200), RateLimit("9/s"), key=key), kit.request())

    kit.run(scenario)


def test_the_number_of_origins_is_bounded(kit):
    """B35: and those that are in trouble are remembered longest."""

    async def scenario():
        breaker = CircuitBreaker(consecutive=1, max_keys=20)
        budget = RetryBudget(max_keys=20)
        limit = RateLimit("1/hour", max_keys=20)
        transport = kit.guard(kit.stub(down("bad"), pool=9999), Retry(2, wait=0, budget=budget), breaker, limit)
        with capture_events() as seen:
            await kit.send(transport, kit.request("POST", "https://bad/"))
            for number in range(200):
                try:
                    await kit.send(transport, kit.request(url=f"https://h{number}/"))
                except RateLimited:
                    pass
        assert breaker.of("https://bad").current_state == "open"
        assert len(breaker.statistics().partitions) <= 21
        assert limit.statistics().keys <= 21
        assert budget.statistics().partitions <= 21
        assert "partitions.full" in {event.name for event in seen}

    kit.run(scenario)


def test_transports_that_share_a_policy_are_not_kept_alive_by_it(kit):
    """One breaker for many clients that come and go: what it knows of an origin must not hold on to them."""

    async def scenario():
        shared = Pipeline(Keyed(lambda: RateLimit("9/s")), CircuitBreaker())
        seen = []
        for _ in range(3):
            stub = kit.stub(200)
            guarded = kit.guard(stub, shared)
            seen.append(weakref.ref(stub))
            assert (await kit.send(guarded, kit.request())).status_code == 200
            del stub, guarded
        gc.collect()
        assert [each() for each in seen] == [None] * 3

    kit.run(scenario)
