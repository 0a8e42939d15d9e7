"""The transports are transparent: what works with a bare transport works with one of ours around it."""

import inspect
import threading
from pathlib import Path

import anyio
import pytest

import resilient
from resilient import Fallback, Retry, Timeout, presets
from resilient.http.transport import BUFFER
from resilient.testing import capture_events, run

from .conftest import Kit
from .flaky_server import FlakyServer, choose, ok, status


class Other:
    """Whatever has the right method is a transport (Z7)."""

    def __init__(self, http, status=200):
        self.http = http
        self.status = status

    def handle_request(self, request):
        return self.http.Response(self.status)

    async def handle_async_request(self, request):
        return self.http.Response(self.status)

    def close(self):
        pass

    async def aclose(self):
        pass


# -- what can be wrapped --------------------------------------------------------------------------------------


def test_with_nothing_given(kit):
    """A70, A72: the client's own transport of this colour only, and the preset."""

    async def scenario():
        transport = kit.Transport()
        assert type(transport.transport) is kit.HTTPTransport
        assert repr(transport.pipeline) == repr(presets.http_client())
        assert kit.Transport().pipeline is not transport.pipeline
        assert isinstance(transport, kit.http.BaseTransport if kit.sync else kit.http.AsyncBaseTransport)
        assert type(transport).__name__ in repr(transport)
        assert repr(transport.pipeline) in repr(transport)
        await kit.close(transport)

    kit.run_really(scenario)


def test_a_single_policy_is_a_pipeline(kit):
    async def scenario():
        stub = kit.stub(503, 200)
        assert (await kit.send(kit.Transport(stub, pipeline=Retry(wait=0)), kit.request())).status_code == 200

    kit.run(scenario)


def test_anything_with_the_right_method_is_a_transport(kit):
    """Z7: also if its base class happens to have the name of theirs."""

    class BaseTransport(Other):
        pass

    async def scenario():
        mock = kit.http.MockTransport(lambda request: kit.http.Response(201))
        for inner in (Other(kit.http, 201), BaseTransport(kit.http, 201), mock):
            assert (await kit.send(kit.guard(inner), kit.request())).status_code == 201

    kit.run(scenario)


def refused(kit):
    other = "httpx2" if kit.http.__name__ == "httpx" else "httpx"
    module = __import__(other)
    right, wrong = ("HTTPTransport", "AsyncHTTPTransport") if kit.sync else ("AsyncHTTPTransport", "HTTPTransport")
    colour, fits = ("an async", "AsyncResilientTransport") if kit.sync else ("a sync", "ResilientTransport")
    foreign = type("Foreign", (module.BaseTransport, module.AsyncBaseTransport), {})
    return [
        (getattr(module, right), f"This one is of {other}: use resilient.{other}"),
        (foreign, f"This one is of {other}: use resilient.{other}"),
        (getattr(kit.http, wrong), f"This is {colour} transport, which fits {fits}"),
        (lambda: kit.HTTPTransport, "This is a class: write it with parentheses"),
        (Retry, "This is a policy: write it as pipeline="),
        (kit.Client, f"use {kit.ours.__name__}.install(client)"),
        (module.Client, f"use {kit.ours.__name__}.install(client)"),
        (lambda: "https://a/", f"such as {kit.http.__name__}.{right}(), or None"),
        (lambda: 1, f"give a transport of {kit.http.__name__}"),
        (lambda: print, f"give a transport of {kit.http.__name__}"),
    ]


def test_what_cannot_be_wrapped_is_refused(kit):
    """Z2: at construction, with an error that says what to do."""
    for make, hint in refused(kit):
        with pytest.raises(TypeError) as caught:
            kit.Transport(make())
        assert hint in str(caught.value)
        assert str(caught.value).startswith(f"{kit.ours.__name__}.{kit.Transport.__name__}: transport=")


def test_a_client_of_the_other_colour_is_told_which_one_it_needs(kit):
    Client = kit.http.AsyncClient if kit.sync else kit.http.Client  # noqa: N806 - it is a class
    mine, needed = ("", "Async") if kit.sync else ("Async", "")
    hint = f"it is for {kit.http.__name__}.{mine}Client; give {kit.http.__name__}.{needed}Client {needed}Resilient"

    client = Client(transport=kit.Transport(kit.stub(200)))
    with pytest.raises(AttributeError, match=f"has no attribute 'handle_(async_)?request': {hint}"):
        run(client.get, "https://a/") if kit.sync else client.get("https://a/")
    with pytest.raises(AttributeError, match=r"object has no attribute 'headers'$"):
        kit.Transport(kit.stub(200)).headers  # noqa: B018 - to see that nobody pretends to have it


OPTIONS = [
    ("pipeline", 1, TypeError, "a policy, a Pipeline or None"),
    ("pipeline", Retry, TypeError, "Write Retry() with parentheses"),
    ("pipeline", [Retry()], TypeError, "a policy, a Pipeline or None"),
    ("repeatable", "POST", TypeError, "methods in upper case"),
    ("repeatable", 3, TypeError, "methods in upper case"),
    ("repeatable", None, TypeError, "methods in upper case"),
    ("repeatable", {"POST", 1}, TypeError, "methods in upper case"),
    ("repeatable", {"post"}, ValueError, "methods in upper case"),
    ("repeatable", [""], ValueError, "methods in upper case"),
    ("repeatable", str, TypeError, "a function"),
    ("key", "https://a", TypeError, "a function"),
    ("key", None, TypeError, "a function"),
    ("buffer", 0, ValueError, "an int >= 1"),
    ("buffer", -1, ValueError, "an int >= 1"),
    ("buffer", 1.5, TypeError, "True, False or a number of bytes"),
    ("buffer", None, TypeError, "True, False or a number of bytes"),
]


def test_bad_options_name_themselves(kit):
    for name, value, kind, allowed in OPTIONS:
        with pytest.raises(kind) as caught:
            kit.Transport(kit.stub(200), **{name: value})
        assert f"{kit.Transport.__name__}: {name}={value!r} is not allowed" in str(caught.value)
        assert allowed in str(caught.value)


@pytest.mark.parametrize("name", ["key", "repeatable"])
def test_functions_must_not_be_async(kit, name):
    async def function(request):
        return True

    with pytest.raises(TypeError, match=f"{name}=.*a sync function"):
        kit.Transport(kit.stub(200), **{name: function})


def test_options_can_be_read(kit):
    transport = kit.Transport(kit.stub(200), repeatable=["POST"], buffer=True)
    assert (transport.repeatable, transport.buffer, transport.key) == (
        frozenset({"POST"}),
        BUFFER,
        kit.ours.origin,
    )
    assert (kit.Transport(kit.stub(200), buffer=7).buffer, kit.Transport(kit.stub(200)).buffer) == (7, 0)


def test_a_pipeline_that_does_not_fit_is_refused_at_once(kit):
    async def fallback(request):
        return kit.http.Response(200)

    if kit.sync:
        with pytest.raises(TypeError, match="async"):
            kit.guard(kit.stub(200), Fallback(fallback))
    else:
        kit.guard(kit.stub(200), Fallback(fallback))


def test_requests_of_the_other_package_are_refused(kit):
    """Z2: instead of an AssertionError without words."""
    other = __import__("httpx2" if kit.http.__name__ == "httpx" else "httpx")

    async def scenario():
        for request in (other.Request("GET", "https://a/"), "https://a/"):
            with pytest.raises(TypeError, match="got a request of"):
                await kit.send(kit.guard(kit.stub(200)), request)

    kit.run(scenario)


def test_requests_of_derived_classes_are_not(kit):
    async def scenario():
        request = type("Request", (kit.http.Request,), {})("GET", "https://a/")
        assert (await kit.send(kit.guard(kit.stub(200)), request)).status_code == 200

    kit.run(scenario)


# -- being closed ---------------------------------------------------------------------------------------------


async def enter(kit, client):
    await (kit.do(client.__enter__) if kit.sync else kit.do(client.__aenter__))


async def leave(kit, client):
    await (kit.do(client.__exit__, None, None, None) if kit.sync else kit.do(client.__aexit__, None, None, None))


@pytest.mark.parametrize("close", [Kit.close, leave])
def test_who_is_interrupted_while_background_work_ends_has_closed_all_the_same(kit, close):
    """A69: asking again would do nothing."""

    class Interrupt(BaseException):
        pass

    def interrupted(*_):
        raise Interrupt

    async def scenario():
        stub = kit.stub(200)
        transport = kit.guard(stub)
        transport._edge.background._close = interrupted
        with pytest.raises(Interrupt):
            await close(kit, transport)
        assert stub.log == ["close" if close is Kit.close else "exit"]

    kit.run(scenario)


def test_context_managers_reach_the_wrapped_transport_once(kit):
    """A67, A68: also where it is mounted at several patterns."""

    async def scenario():
        stub, other = kit.stub(200), kit.stub(200)
        shared = kit.guard(other)
        mounts = {"https://": shared, "http://": shared, "all://b": None}
        client = kit.Client(transport=kit.guard(stub), mounts=mounts)
        await enter(kit, client)
        assert (await kit.do(client.get, "https://a/")).status_code == 200
        assert (await kit.do(client.get, "https://b/")).status_code == 200
        assert (len(stub.seen), len(other.seen)) == (1, 1)
        await leave(kit, client)
        assert stub.log == other.log == ["enter", "exit"]
        await kit.close(shared)
        assert other.log == ["enter", "exit"]

    kit.run(scenario)


def test_closing_reaches_the_wrapped_transport_once(kit):
    async def scenario():
        stub = kit.stub(200)
        transport = kit.guard(stub)
        clients = [kit.Client(transport=transport) for _ in range(2)]
        for client in clients:
            await kit.close(client)
        assert stub.log == ["close"]
        with pytest.raises(RuntimeError):  # A69
            await kit.do(client.get, "https://a/")

    kit.run(scenario)


def test_a_transport_that_cannot_be_entered(kit):
    async def scenario():
        stub = kit.stub(200)

        def fail(what, enter=stub._enter):
            enter(what)
            if len(stub.log) == 1:
                raise OSError("no")

        stub._enter = fail
        transport = kit.guard(stub)
        with pytest.raises(OSError, match="no"):
            await enter(kit, transport)
        await enter(kit, transport)
        assert stub.log == ["enter", "enter"]

    kit.run(scenario)


# -- many at the same time ------------------------------------------------------------------------------------


def test_threads_share_a_transport(sync_kit):
    """A73: each request is retried on its own, and gets the answer to its own question."""
    kit = sync_kit

    async def scenario():
        lock, tries = threading.Lock(), {}

        def twice(request):
            with lock:
                tries[request.target] = tries.get(request.target, 0) + 1
                return status(503, b"busy") if tries[request.target] == 1 else ok(request.target.encode())

        results, requests = {}, 15
        with FlakyServer(choose(twice)) as server, capture_events() as seen:
            retry = Retry(wait=0)
            with kit.Client(transport=kit.guard(kit.real(), Timeout(30), retry, Timeout(10))) as client:

                def work(worker):
                    for number in range(requests):
                        path = f"/{worker}/{number}"
                        results[path] = client.get(server.url + path).text

                threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        assert len(results) == 8 * requests
        assert all(path == text for path, text in results.items())
        assert [event.name for event in seen] == ["retry.scheduled"] * 8 * requests
        assert retry.statistics().retries == 8 * requests

    kit.run_really(scenario)


def test_one_request_object_can_be_sent_by_many(async_kit):
    """A33, A77: each gets its own timeouts, and the request its own extensions back."""
    kit = async_kit

    async def scenario():
        async def slow(request):
            timeouts.append(request.extensions["timeout"])
            await kit.sleep(2)
            return 200

        timeouts = []
        transport = kit.guard(kit.stub(slow, pool=9), Timeout(20))
        request = kit.request(extensions={"timeout": {"read": 30.0}})
        extensions = request.extensions
        async with anyio.create_task_group() as group:
            for delay in (0, 1, 1.5):

                async def send(delay=delay):
                    await kit.sleep(delay)
                    await kit.send(transport, request)

                group.start_soon(send)
        assert request.extensions is extensions
        assert extensions == {"timeout": {"read": 30.0}}
        assert len({id(each) for each in timeouts}) == 3

    kit.run(scenario)


def test_a_guard_inside_a_guard_keeps_the_tighter_deadline(kit):
    """A33: what the outer one has cut, the inner one does not put back."""

    async def scenario():
        stub = kit.stub(kit.http.ReadError("reset"), 200)
        inner = kit.guard(stub, Timeout(50), Retry(wait=0), Timeout(40))
        request = kit.request(extensions={"timeout": {"read": 60.0}})
        await kit.send(kit.guard(inner, Timeout(10, name="outer")), request)
        assert [seen.timeouts["read"] for seen in stub.seen] == [10.0] * 2
        assert request.extensions == {"timeout": {"read": 60.0}}

    kit.run(scenario)


def test_what_a_transport_in_between_adds_is_not_lost(kit):
    async def scenario():
        stub = kit.stub(503, 200)
        inner = kit.guard(stub, Timeout(9), Retry(wait=0))

        class Between(Other):
            def handle_request(self, request):
                request.extensions["added"] = True
                return inner.handle_request(request)

            async def handle_async_request(self, request):
                request.extensions["added"] = True
                return await inner.handle_async_request(request)

        request = kit.request()
        await kit.send(kit.guard(Between(kit.http), Timeout(9)), request)
        assert [seen.extensions["added"] for seen in stub.seen] == [True, True]
        assert request.extensions == {}

    kit.run(scenario)


def test_tasks_share_a_transport(async_kit):
    """A74."""
    kit = async_kit

    async def scenario():
        def echo(request):
            tries[request.url.path] = tries.get(request.url.path, 0) + 1
            if tries[request.url.path] == 1:
                return 503
            return kit.response(200, request.url.path.encode())

        tries, results = {}, {}
        stub = kit.stub(echo, pool=1000)
        async with kit.client(kit.Transport(stub)) as client:

            async def work(number):
                await kit.sleep(number % 7)
                results[f"/{number}"] = (await client.get(f"https://{number % 10}.test/{number}")).text

            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(work, number)
        assert len(results) == 100
        assert all(path == text for path, text in results.items())
        assert stub.open == 0

    kit.run(scenario)


def test_every_option_is_on_the_page(family):
    page = (Path(resilient.__file__).parent.parent / "docs" / "http" / "httpx.md").read_text()
    rows = page.partition("| option of the transport |")[2].partition("\n\n")[0]
    for kind in (family[1].ResilientTransport, family[1].AsyncResilientTransport):
        missing = [name for name in inspect.signature(kind).parameters if f"| `{name}`" not in rows]
        assert missing == []
