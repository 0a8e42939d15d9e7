"""Guarding clients that exist already."""

import os
from unittest import mock

import pytest

import resilient.httpx
import resilient.httpx2
from resilient import CircuitBreaker, Pipeline, Retry, Timeout, presets
from resilient.errors import CircuitOpen

from .flaky_server import FlakyServer, ok, status


def mocked(kit, *statuses):
    """Return a client whose answers are given, and the list of the requests it sent."""
    seen = []

    def answer(request):
        seen.append(request)
        return kit.http.Response(statuses[min(len(seen), len(statuses)) - 1])

    return kit.Client(transport=kit.http.MockTransport(answer)), seen


def test_a_client_is_guarded_until_that_is_undone(kit):
    async def scenario():
        client, seen = mocked(kit, 503, 200, 503)
        before = client._transport
        installation = kit.ours.install(client, Retry(wait=0))
        assert (await kit.do(client.get, "https://a/")).status_code == 200
        assert isinstance(client._transport, kit.Transport)
        assert (installation.client, client._transport.transport) == (client, before)
        installation.uninstall()
        assert client._transport is before
        assert (await kit.do(client.get, "https://a/")).status_code == 503
        assert len(seen) == 3
        installation.uninstall()
        assert client._transport is before
        await kit.close(client)

    kit.run(scenario)


def test_for_a_block_only(kit):
    async def scenario():
        client, _ = mocked(kit, 503, 200, 503)
        before = client._transport
        with kit.ours.install(client, Retry(wait=0)) as installation:
            assert (await kit.do(client.get, "https://a/")).status_code == 200
            assert installation.pipeline.statistics().retries == 1
        assert client._transport is before
        with pytest.raises(ZeroDivisionError), kit.ours.install(client):
            _ = 1 / 0
        assert client._transport is before
        await kit.close(client)

    kit.run(scenario)


def test_the_options_are_those_of_the_transports(kit):
    async def scenario():
        client, _ = mocked(kit, 503, 200)
        key = lambda request: request.url.path  # noqa: E731
        breaker = CircuitBreaker()
        pipeline = Pipeline(Retry(wait=0), breaker)
        installation = kit.ours.install(client, pipeline, repeatable={"POST"}, key=key, buffer=7)
        assert (await kit.do(client.post, "https://a/path")).status_code == 200
        assert installation.pipeline is client._transport.pipeline is pipeline
        assert set(breaker.statistics().partitions) == {"/path"}
        assert client._transport.buffer == 7
        with pytest.raises(TypeError, match="key="):
            kit.ours.install(mocked(kit, 200)[0], key=3)
        await kit.close(client)

    kit.run(scenario)


def test_without_a_pipeline_it_is_the_preset(kit):
    client, _ = mocked(kit, 200)
    installation = kit.ours.install(client)
    assert repr(installation.pipeline) == repr(presets.http_client())


# -- mounts ---------------------------------------------------------------------------------------------------


def with_mounts(kit):
    one, two = (kit.stub(503, 200) for _ in range(2))
    mounts = {"https://b": two, "https://c": two, "https://d": None}
    return kit.Client(transport=one, mounts=mounts), one, two


def test_mounts_are_guarded_too(kit):
    """A67, A71: with one pipeline, and one transport for several patterns stays one."""

    async def scenario():
        client, one, two = with_mounts(kit)
        before = dict(client._mounts)
        order = list(client._mounts)
        breaker = CircuitBreaker(consecutive=9)
        installation = kit.ours.install(client, Pipeline(Retry(wait=0), breaker))
        for host in "abcd":
            assert (await kit.do(client.get, f"https://{host}/")).status_code == 200
        assert [seen.request.url.host for seen in one.seen] == ["a", "a", "d"]
        assert [seen.request.url.host for seen in two.seen] == ["b", "b", "c"]
        mounted = [transport for transport in client._mounts.values() if transport is not None]
        assert mounted[0] is mounted[1]
        assert list(client._mounts.values()).count(None) == 1
        assert len(breaker.statistics().partitions) == 4
        assert list(client._mounts) == order
        installation.uninstall()
        assert (client._transport, dict(client._mounts)) == (one, before)
        assert list(client._mounts) == order
        await kit.close(client)
        assert (one.log, two.log) == (["close"], ["close", "close"])

    kit.run(scenario)


def test_a_guarded_client_closes_each_transport_once(kit):
    """A67: the bare client closes one that is mounted twice twice."""

    async def scenario():
        client, one, two = with_mounts(kit)
        kit.ours.install(client)
        await kit.close(client)
        assert (one.log, two.log) == (["close"], ["close"])

    kit.run(scenario)


def test_one_transport_for_everything(kit):
    async def scenario():
        stub = kit.stub(503, 200)
        client = kit.Client(transport=stub, mounts={"https://b": stub})
        installation = kit.ours.install(client, Retry(wait=0))
        assert (await kit.do(client.get, "https://b/")).status_code == 200
        assert client._transport is next(iter(client._mounts.values()))
        installation.uninstall()
        assert client._transport is next(iter(client._mounts.values())) is stub
        await kit.close(client)

    kit.run(scenario)


def test_mounts_that_are_added_later_stay(kit):
    async def scenario():
        client, one, _ = with_mounts(kit)
        other = kit.stub(201)
        installation = kit.ours.install(client)
        client._mounts[type(next(iter(client._mounts)))("https://e")] = other
        installation.uninstall()
        assert client._transport is one
        assert other in client._mounts.values()
        await kit.close(client)

    kit.run(scenario)


def test_proxies_from_the_environment(kit):
    """A71: they are mounts; a transport that was given to the client would have switched them off."""

    async def scenario():
        with FlakyServer([status(503), ok()]) as proxy:
            variables = {"HTTP_PROXY": proxy.url, "NO_PROXY": "direct.test"}
            with mock.patch.dict(os.environ, variables):
                client = kit.Client(verify=False)
            kit.ours.install(client, Pipeline(Timeout(9), Retry(wait=0), Timeout(9)))
            response = await kit.do(client.get, "http://a.test/")
            assert response.status_code == 200
            assert [request.target for request in proxy.requests] == ["http://a.test/"] * 2
            await kit.close(client)

    kit.run_really(scenario)


# -- in use ---------------------------------------------------------------------------------------------------


def test_a_client_that_is_open_already(kit):
    """A68: its transport is entered once and left once, whenever the guard came."""

    async def scenario():
        for when in ("before", "inside", "until the middle"):
            stub = kit.stub(200)
            client = kit.Client(transport=stub)
            installation = kit.ours.install(client) if when != "inside" else None
            await kit.do(client.__enter__ if kit.sync else client.__aenter__)
            if when == "inside":
                kit.ours.install(client)
            if when == "until the middle":
                installation.uninstall()
            await kit.do(client.__exit__ if kit.sync else client.__aexit__, None, None, None)
            assert stub.log == ["enter", "exit"]

    kit.run(scenario)


def test_one_pipeline_for_several_clients(kit):
    async def scenario():
        pipeline = Pipeline(CircuitBreaker(consecutive=1))
        one, two = mocked(kit, 503)[0], mocked(kit, 200)[0]
        for client in (one, two):
            kit.ours.install(client, pipeline)
        await kit.do(one.get, "https://a/")
        with pytest.raises(CircuitOpen):
            await kit.do(two.get, "https://a/")

    kit.run(scenario)


def test_real_sockets(kit):
    async def scenario():
        with FlakyServer([status(503), ok(b"done")]) as server:
            client = kit.Client(verify=False)
            with kit.ours.install(client, Pipeline(Timeout(9), Retry(wait=0), Timeout(9))):
                assert (await kit.do(client.get, server.url)).content == b"done"
            assert (await kit.do(client.get, server.url)).content == b"done"
            assert server.connections == 1
            await kit.close(client)

    kit.run_really(scenario)


# -- what is refused ------------------------------------------------------------------------------------------


def test_twice_is_once_too_many(kit):
    client, _ = mocked(kit, 200)
    kit.ours.install(client)
    with pytest.raises(ValueError, match="not guarded yet"):
        kit.ours.install(client)
    ready = kit.Client(transport=kit.guard(kit.stub(200)))
    with pytest.raises(ValueError, match="add policies to its pipeline"):
        kit.ours.install(ready)
    mounted = kit.Client(transport=kit.stub(200), mounts={"https://b": kit.guard(kit.stub(200))})
    with pytest.raises(ValueError, match="not guarded yet"):
        kit.ours.install(mounted)


class Sdk:
    """Something that has a client, as SDKs do."""

    def __init__(self, client):
        self._client = client


def test_what_is_no_client_is_refused(kit):
    name = kit.http.__name__
    other = "httpx2" if name == "httpx" else "httpx"
    foreign = __import__(other).Client() if kit.sync else __import__(other).AsyncClient()
    client, _ = mocked(kit, 200)
    cases = {
        "https://a/": f"give an {name}.Client or {name}.AsyncClient",
        client._transport: f"give an {name}.Client",
        foreign: f"This is a client of {other}: use resilient.{other}",
        Sdk(foreign): f"This is a client of {other}: use resilient.{other}",
        Sdk(client): "The one of this Sdk is its attribute _client",
        Sdk(None): f"give an {name}.Client",
        type(client): f"give an {name}.Client",
    }
    for wrong, hint in cases.items():
        with pytest.raises(TypeError) as caught:
            kit.ours.install(wrong)
        assert hint in str(caught.value)
        assert str(caught.value).startswith(f"resilient.{name}.install: client=")
    kit.ours.install(Sdk(client)._client).uninstall()


@pytest.mark.parametrize("pipeline", [Retry, 1, "retry", [Retry()]])
def test_a_bad_pipeline_changes_nothing(kit, pipeline):
    client, _ = mocked(kit, 200)
    before = client._transport
    with pytest.raises(TypeError, match=rf"resilient\.{kit.http.__name__}\.install: pipeline="):
        kit.ours.install(client, pipeline)
    assert client._transport is before


def test_a_transport_that_cannot_be_wrapped_changes_nothing(kit):
    other = kit.Client(transport=kit.stub(200), mounts={"https://b": "no transport"})
    before = other._transport, dict(other._mounts)
    with pytest.raises(TypeError, match="transport='no transport'"):
        kit.ours.install(other)
    assert (other._transport, dict(other._mounts)) == before


@pytest.mark.parametrize("where", ["main", "first mount", "second mount", "removed mount"])
def test_what_somebody_else_has_replaced_is_not_undone(kit, where):
    """Neither all of it nor a part."""
    client, one, _ = with_mounts(kit)
    installation = kit.ours.install(client)
    guard, mounts = client._transport, dict(client._mounts)
    patterns = [pattern for pattern, mounted in mounts.items() if mounted is not None]
    if where == "main":
        client._transport = kit.stub(200)
    elif where == "removed mount":
        del client._mounts[patterns[0]]
    else:
        client._mounts[patterns[where == "second mount"]] = kit.stub(200)
    now = client._transport, dict(client._mounts)
    with pytest.raises(RuntimeError, match="has other transports than those that were installed"):
        installation.uninstall()
    assert (client._transport, dict(client._mounts)) == now
    client._transport = guard
    client._mounts.clear()
    client._mounts.update(mounts)
    installation.uninstall()
    assert client._transport is one


def test_the_modules_export_what_they_say(family):
    _, ours = family
    assert ours.__all__ == sorted(ours.__all__)
    for name in ours.__all__:
        assert getattr(ours, name).__doc__
    assert resilient.httpx.Installation is resilient.httpx2.Installation


def test_the_class_of_the_client_does_not_matter(kit):
    """Those of SDKs are derived, and may have no `__init__` of their own."""

    class Derived(kit.Client):
        pass

    async def scenario():
        client = Derived(transport=kit.stub(503, 200))
        with kit.ours.install(client, Retry(wait=0)):
            assert (await kit.do(client.get, "https://a/")).status_code == 200
        await kit.close(client)

    kit.run(scenario)
