"""Errors of ours are errors of the client's too; and the two packages, which have not one class in common."""

import copy
import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path

import httpx
import pybreaker
import pytest

import resilient
from resilient import Bulkhead, CircuitBreaker, Fallback, RateLimit, Retry, Timeout, errors, runtime
from resilient.errors import (
    BulkheadFull,
    CircuitOpen,
    Draining,
    RateLimited,
    Rejected,
    ResilientError,
    Shed,
    ThreadsExhausted,
    TimedOut,
)
from resilient.http import family as family_module
from resilient.testing import capture_events

PACKAGE = Path(resilient.__file__).parent
REFUSALS = [Rejected, CircuitOpen, RateLimited, BulkheadFull, Shed, Draining, ThreadsExhausted]


# -- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_a_transport_error_too(family, kind):
    """A42, Z3: of the family whose client is used, and of no other."""
    http, ours = family
    request = http.Request("GET", "https://a/")
    error = kind("it is full", policy="p", retry_after=2.5)
    own = ours._FAMILY.own(error, request)
    assert isinstance(own, kind)
    assert isinstance(own, http.TransportError)
    assert not isinstance(own, http.TimeoutException)
    assert (str(own), own.reason, own.policy, own.retry_after) == (str(error), "it is full", "p", 2.5)
    assert own.request is request
    assert isinstance(own, pybreaker.CircuitBreakerError) == (kind is CircuitOpen)
    assert type(own) is type(ours._FAMILY.own(kind("x", policy="y"), request))
    assert (type(own).__name__, type(own).__module__) == (kind.__name__, ours.__name__)
    assert type(own).__doc__ == kind.__doc__
    other = family_module._families["resilient.httpx2" if http is httpx else "resilient.httpx"]
    assert not isinstance(own, other.module.HTTPError)


def test_a_timeout_is_a_timeout_of_the_client_too(family):
    """A40: theirs is no TimeoutError, ours is both."""
    http, ours = family
    request = http.Request("GET", "https://a/")
    own = ours._FAMILY.own(TimedOut(policy="total", seconds=2.0), request)
    assert isinstance(own, TimedOut)
    assert isinstance(own, TimeoutError)
    assert isinstance(own, http.TimeoutException)
    assert (str(own), own.policy, own.seconds) == ("total: not done after 2 s", "total", 2.0)
    assert own.request is request


def test_what_is_an_error_of_the_client_already_is_only_given_the_request(family):
    """One transport of ours around another one."""
    http, ours = family
    first, second = http.Request("GET", "https://a/"), http.Request("GET", "https://b/")
    own = ours._FAMILY.own(CircuitOpen("open", policy="p"), first)
    assert ours._FAMILY.own(own, second) is own
    assert own.request is second


def test_one_transport_of_ours_around_another_one(kit):
    """The error is the inner one's, as it is."""

    async def scenario():
        inner = kit.guard(kit.stub(200, pool=9), RateLimit("1/hour", name="inner"))
        outer = kit.guard(inner, Timeout(9), CircuitBreaker(consecutive=1))
        await kit.send(outer, kit.request())
        for _ in range(2):  # no failure for the outer breaker: nothing was sent
            with pytest.raises(RateLimited) as caught:
                await kit.send(outer, kit.request(url="https://a/again"))
            assert isinstance(caught.value, kit.http.TransportError)
            assert (caught.value.policy, caught.value.request.url) == ("inner", "https://a/again")

    kit.run(scenario)


def test_errors_of_your_own_stay_as_they_are(family):
    http, ours = family

    class Mine(ResilientError):
        pass

    error = Mine("x")
    assert ours._FAMILY.own(error, http.Request("GET", "https://a/")) is error


@pytest.mark.parametrize("kind", [*REFUSALS, TimedOut])
def test_errors_can_be_pickled_without_their_request(family, kind):
    """D49: the request holds headers and a body, which another process need not see."""
    http, ours = family
    plain = kind(policy="p", seconds=1.5) if kind is TimedOut else kind("full", policy="p", retry_after=1.0)
    plain.add_note("3 attempts in 1.42 s")
    own = ours._FAMILY.own(plain, http.Request("GET", "https://a/", headers={"Authorization": "secret"}))
    data = pickle.dumps(own)
    assert b"secret" not in data
    for twin in (pickle.loads(data), copy.copy(own)):
        assert type(twin) is type(own)
        assert (str(twin), twin.args, twin.policy) == (str(own), own.args, "p")
        assert twin.__notes__ == own.__notes__
        with pytest.raises(RuntimeError, match="request"):
            _ = twin.request


def test_errors_can_be_loaded_where_nobody_has_imported_the_module(family):
    http, ours = family
    data = pickle.dumps(ours._FAMILY.own(CircuitOpen("open", policy="p"), http.Request("GET", "https://a/")))
    program = (
        f"import pickle\nerror = pickle.loads({data!r})\n"
        f"import {http.__name__}\nprint(isinstance(error, {http.__name__}.TransportError), error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("True p: open\n", "")


REFUSING = {
    "bulkhead": lambda: Bulkhead(1, name="p"),
    "rate": lambda: RateLimit("1/hour", name="p"),
    "circuit": lambda: CircuitBreaker(consecutive=1, name="p"),
}


@pytest.mark.parametrize("policy", REFUSING)
def test_those_who_catch_the_errors_of_the_client_catch_ours(kit, policy):
    """A41: SDKs handle nothing else. The URL is in `request`."""

    async def scenario():
        stub = kit.stub(503 if policy == "circuit" else 200, pool=2)
        async with kit.client(kit.guard(stub, REFUSING[policy]())) as client:
            first = await kit.do(client.send, client.build_request("GET", "https://a/"), stream=True)
            with pytest.raises(kit.http.HTTPError) as caught:
                await kit.do(client.get, "https://a/second")
            await kit.close(first)
        assert isinstance(caught.value, Rejected)
        assert caught.value.policy.startswith("p")
        assert caught.value.request.url == "https://a/second"
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__  # the same refusal, before it became one of the client's
        frames = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert any("policies" in name for name in frames)  # where it was refused, not only where it came out
        assert len(stub.seen) == 1

    kit.run(scenario)


def test_a_deadline_that_passes_in_between(kit):
    """The error names whose deadline it was, and what was on the way is its cause."""

    async def scenario():
        async def slow(request):
            await kit.sleep(request.extensions["timeout"]["read"])
            raise kit.http.ReadTimeout("slow")

        stub = kit.stub(slow)
        async with kit.client(kit.guard(stub, Timeout(2, name="total")), timeout=60) as client:
            with pytest.raises(kit.http.TimeoutException) as caught, capture_events() as seen:
                await kit.do(client.get, "https://a/")
        assert (caught.value.policy, caught.value.seconds, runtime.now()) == ("total", 2.0, 2.0)
        assert caught.value.request.url == "https://a/"
        assert caught.value.__cause__ is not None
        assert [event.name for event in seen] == ["timeout.expired"]
        assert "not done after 2 s" in "".join(traceback.format_exception(caught.value))

    kit.run(scenario)


def test_the_notes_of_a_retry_stay_with_the_error(kit):
    async def scenario():
        async def slow(request):
            await kit.sleep(request.extensions["timeout"]["read"])
            raise kit.http.ReadTimeout("slow")

        transport = kit.guard(kit.stub(slow), Retry(2, wait=1, name="retry"), Timeout(1))
        with pytest.raises(kit.http.TimeoutException) as caught:
            await kit.send(transport, kit.request())
        assert caught.value.__notes__ == ["retry: 2 attempts in 3.00 s"]

    kit.run(scenario)


def test_the_error_before_a_fallbacks_own_is_not_lost(kit):
    async def scenario():
        def backup(request):
            raise Rejected("no backup", policy="mine") from cause

        cause = LookupError("no address")

        stub = kit.stub(kit.http.ConnectError("refused"))
        with pytest.raises(kit.http.TransportError, match="no backup") as caught:
            await kit.send(kit.guard(stub, Fallback(backup)), kit.request())
        assert caught.value.__cause__ is cause
        context, chain = caught.value, []
        while context is not None:
            chain.append(type(context).__name__)
            context = context.__context__
        assert chain == ["Rejected", "Rejected", "ConnectError"]

    kit.run(scenario)


# -- two packages ---------------------------------------------------------------------------------------------


def test_the_two_modules_are_equal_but_for_the_name():
    one, two = (PACKAGE / f"{name}.py" for name in ("httpx", "httpx2"))
    expected = one.read_text().replace("httpx", "httpx2")
    first, _, rest = two.read_text().partition("\n")
    assert rest == expected.partition("\n")[2]
    assert re.findall("httpx2?", first) == ["httpx2", "httpx", "httpx"]


def test_what_is_shared_imports_neither():
    """Z4, Z5."""
    for path in [*(PACKAGE / "http").glob("*.py"), PACKAGE / "presets.py"]:
        assert not re.search(r"^\s*(import|from) httpx", path.read_text(), re.MULTILINE), path


IMPORTS = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import {ours}
from {theirs} import Client, MockTransport, Response
client = Client(transport={ours}.ResilientTransport(MockTransport(lambda request: Response(204))))
print(client.get("https://a/").status_code)
"""


def test_each_works_without_the_other(family):
    """Z4: and without trio."""
    http, ours = family
    blocked = {"httpx", "httpx2", "httpcore", "httpcore2", "trio"} - {
        http.__name__,
        http.__name__.replace("x", "core"),
    }
    blocked -= {"httpcore" + http.__name__.removeprefix("httpx")}
    program = IMPORTS.format(blocked=blocked, ours=ours.__name__, theirs=http.__name__)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("204\n", "")


def test_httpx2_can_stand_in_for_httpx():
    """Z5, Z6: after `alias_httpx`, `resilient.httpx` guards clients of httpx2."""
    program = """
import httpx2
httpx2.alias_httpx()
import httpx, resilient.httpx
assert httpx is httpx2
transport = resilient.httpx.ResilientTransport(httpx2.MockTransport(lambda request: httpx2.Response(204)))
print(httpx2.Client(transport=transport).get("https://a/").status_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.stderr) == ("204\n", "")


def test_all_errors_of_the_library_are_thought_of():
    """A new error is a refusal, a timeout, or stays as it is."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ResilientError)]
    mapped = {kind for kind in kinds if issubclass(kind, Rejected | TimedOut)}
    assert mapped == {*REFUSALS, TimedOut}
