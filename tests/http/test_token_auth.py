"""Tokens that renew themselves: who asks, who waits, what is sent again, and what is never told."""

import asyncio
import base64
import contextlib
import contextvars
import copy
import functools
import gc
import gzip
import io
import itertools
import json
import math
import os
import pickle
import re
import ssl
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import parse_qsl

import anyio
import httpx
import httpx2
import pytest
from interleave import explore

import resilient.httpx
import resilient.httpx2
from resilient import RateLimit, Retry, ThreadsExhausted, TimedOut, Timeout, deadline, runtime, workers
from resilient.http.auth import MOST_THREADS, TokenFlow, TokenRefreshFailed
from resilient.http.tokens import Flight, Token, Tokens
from resilient.testing import capture_events, run, run_both, virtual_time

from .flaky_server import FlakyServer, choose, hang, ok, status

TOKEN_URL = "https://login.example/token"
URL = "https://api.example/things"
SECRETS = ("s3cr3t", "r3fr3sh", "acc3ss")  # parts of every secret that is used here


class TokenAuth(TokenFlow, httpx.Auth):
    _family = resilient.httpx._FAMILY


class TokenAuth2(TokenFlow, httpx2.Auth):
    _family = resilient.httpx2._FAMILY


FAMILIES = {
    "httpx": SimpleNamespace(module=httpx, TokenAuth=TokenAuth, ours=resilient.httpx),
    "httpx2": SimpleNamespace(module=httpx2, TokenAuth=TokenAuth2, ours=resilient.httpx2),
}
KINDS = pytest.mark.parametrize("kind", ["function", "client_credentials", "refresh_token"])
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


class World:
    """A token endpoint and an API, as both colours see them.

    Attributes:
        asked: The requests (or refresh tokens) with which a token was asked for.
        served: The tokens with which the API was asked.
        valid: The tokens that the API takes; None for the last one only.
        answers: What the token endpoint does instead of giving a token: each a function of the request.
        takes: How many seconds the token endpoint takes.
        life: The `expires_in` of the tokens.
    """

    def __init__(self, family, colour=None, *, life=None, takes=0.0):
        self.family = family
        self.colour = colour
        self.life = life
        self.takes = takes
        self.asked = []
        self.served = []
        self.valid = None
        self.answers = []
        self.number = 0
        self.at_once = 0
        self.most_at_once = 0

    def issue(self):
        self.number += 1
        return f"acc3ss-{self.number}"

    async def sleep(self, seconds):
        if seconds:
            await self.colour.sleep(seconds)

    async def token_endpoint(self, request):
        self.asked.append(request)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.sleep(self.takes)
        finally:
            self.at_once -= 1
        if self.answers:
            outcome = self.answers.pop(0)
            if isinstance(outcome, BaseException):
                raise outcome
            if outcome is not None:
                return outcome
        if isinstance(request, str | None):
            return Token(self.issue(), self.life)
        return self.json({"access_token": self.issue(), "expires_in": self.life, "token_type": "bearer"})

    def json(self, answer, code=200, **kwargs):
        return self.family.module.Response(code, json=answer, **kwargs)

    async def api(self, request):
        token = request.headers["Authorization"].removeprefix("Bearer ")
        self.served.append(token)
        good = token == f"acc3ss-{self.number}" if self.valid is None else token in self.valid
        return self.family.module.Response(200 if good else 401, text=token)

    async def handle(self, request):
        if request.url.host == "login.example":
            return await self.token_endpoint(request)
        return await self.api(request)

    def revoke(self):
        """Have the API refuse all tokens that were issued so far."""
        self.valid = _From(self.number + 1)

    def auth(self, kind="function", **kwargs):
        cls = self.family.TokenAuth
        if kind == "client_credentials":
            return cls.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t", **kwargs)
        if kind == "refresh_token":
            return cls.refresh_token(TOKEN_URL, refresh_token="r3fr3sh-0", client_id="me", **kwargs)
        return cls(self.colour.function(self.token_endpoint), **kwargs)

    def client(self, auth, handle=None, **kwargs):
        return Client(self.family, self.colour, auth, handle or self.handle, **kwargs)


class _From:
    """All tokens from a number on."""

    def __init__(self, number):
        self.number = number

    def __contains__(self, token):
        return int(token.rpartition("-")[2]) >= self.number


class Client:
    """A client of either colour, used as an async one."""

    def __init__(self, family, colour, auth, handle, transport=None, **kwargs):
        self._sync = colour.name == "sync"
        transport = transport or family.module.MockTransport(colour.function(handle))
        kind = family.module.Client if self._sync else family.module.AsyncClient
        self.raw = kind(transport=transport, auth=auth, **kwargs)

    async def request(self, method="GET", url=URL, **kwargs):
        outcome = self.raw.request(method, url, **kwargs)
        return outcome if self._sync else await outcome

    async def get(self, url=URL, **kwargs):
        return await self.request("GET", url, **kwargs)

    async def failing(self, **kwargs):
        """Return the error that a request ends with."""
        try:
            await self.get(**kwargs)
        except TokenRefreshFailed as error:
            return error
        raise AssertionError("it did not fail")


def both(scenario):
    """Run a scenario in all colours, with the same outcome, and return the trace of events."""
    return run_both(scenario)


# -- what a request carries -----------------------------------------------------------------------------------


@KINDS
def test_a_token_is_fetched_once_and_used_again(family, kind):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth(kind))
        texts = [(await client.get()).text for _ in range(3)]
        assert texts == ["acc3ss-1"] * 3
        assert len(world.asked) == 1

    assert both(scenario) == []


@KINDS
def test_a_refused_token_is_renewed_and_the_request_sent_once_more(family, kind):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth(kind))
        await client.get()
        world.revoke()
        response = await client.get()
        assert (response.status_code, response.text) == (200, "acc3ss-2")
        assert [each.status_code for each in response.history] == [401]
        assert response.history[0].text == "acc3ss-1"
        assert world.served == ["acc3ss-1", "acc3ss-1", "acc3ss-2"]
        assert len(world.asked) == 2
        assert (await client.get()).history == []

    both(scenario)


@KINDS
def test_a_second_401_is_the_answer(family, kind):
    async def scenario(colour):
        world = World(family, colour)
        world.valid = ()
        client = world.client(world.auth(kind))
        response = await client.get()
        assert response.status_code == 401
        assert world.served == ["acc3ss-1", "acc3ss-2"]
        assert len(world.asked) == 2

    both(scenario)


def test_a_page_that_refuses_every_token_does_not_storm_the_token_endpoint(family):
    async def scenario(colour):
        world = World(family, colour)
        world.valid = ()
        client = world.client(world.auth("client_credentials"))
        for _ in range(5):
            assert (await client.get()).status_code == 401
        assert len(world.asked) == 2
        await colour.sleep(1.0)
        await client.get()
        assert len(world.asked) == 3

    both(scenario)


@KINDS
def test_a_refusal_that_a_hook_makes_an_error_of_is_noted(family, kind):
    """The request is lost, as the client hands out an error instead of the 401; those that follow are not."""

    async def scenario(colour):
        world = World(family, colour)

        async def hook(response):
            response.raise_for_status()

        client = world.client(world.auth(kind), event_hooks={"response": [colour.function(hook)]})
        await client.get()
        world.revoke()
        with pytest.raises(family.module.HTTPStatusError, match="401"):  # its token is too new to be the reason
            await client.get()
        await colour.sleep(1)
        with pytest.raises(family.module.HTTPStatusError, match="401"):
            await client.get()
        assert len(world.asked) == 1
        assert (await client.get()).text == "acc3ss-2"

        world.valid = ()
        for _ in range(3):  # it is not the token, which is new
            with pytest.raises(family.module.HTTPStatusError, match="401"):
                await client.get()
        assert len(world.asked) == 2

    both(scenario)


def test_an_error_of_a_hook_that_has_no_refusal_is_none_of_our_business(family):
    async def scenario(colour):
        world = World(family, colour)
        errors = [ZeroDivisionError(), None]

        async def hook(response):
            error = errors.pop(0)
            if error is not None:
                error.response = 401
                raise error

        client = world.client(world.auth(), event_hooks={"response": [colour.function(hook)]})
        with pytest.raises(ZeroDivisionError):
            await client.get()
        await colour.sleep(1)
        assert (await client.get()).text == "acc3ss-1"

    both(scenario)


def test_what_the_user_put_into_the_header_is_replaced(family):
    """As every auth of httpx does; a single request can go without."""

    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth())
        assert (await client.get(headers={"Authorization": "Bearer mine"})).text == "acc3ss-1"
        assert (await client.get(headers={"Authorization": "Bearer mine"}, auth=None)).text == "mine"

    both(scenario)


def test_a_newer_token_is_used_without_asking_for_another(family):
    """Two requests carry the same old token; the second refusal finds that it has been renewed."""

    async def scenario(colour):
        world = World(family, colour)

        async def handle(request):
            if request.url.host == "api.example" and request.headers["Authorization"].endswith("-1"):
                await colour.sleep(int(request.url.path[-1]))
                world.revoke() if world.number == 1 else None
            return await world.handle(request)

        client = world.client(world.auth("client_credentials"), handle)
        responses = await colour.gather(
            *(functools.partial(client.get, f"https://api.example/{wait}") for wait in (1, 2, 3))
        )
        assert [response.text for response in responses] == ["acc3ss-2"] * 3
        assert len(world.asked) == 2

    both(scenario)


def test_other_statuses_are_left_alone(family):
    async def scenario(colour):
        world = World(family, colour)

        async def handle(request):
            return family.module.Response(403, headers={"WWW-Authenticate": 'Bearer error="insufficient_scope"'})

        client = world.client(world.auth(), handle)
        assert (await client.get()).status_code == 403
        assert len(world.asked) == 1

    both(scenario)


def test_a_sync_function_serves_async_clients_too(family):
    """It runs in a thread, so a slow one does not stop the event loop."""
    names = []

    def fetch(refresh_token):
        names.append(threading.current_thread() is threading.main_thread())
        return Token("acc3ss-1")

    async def main():
        client = family.module.AsyncClient(
            transport=family.module.MockTransport(lambda request: family.module.Response(200)),
            auth=family.TokenAuth(fetch),
        )
        assert (await client.get(URL)).status_code == 200

    for backend in ("asyncio", "trio"):
        anyio.run(main, backend=backend)
        run(main, backend=backend)
    assert names == [False] * 4


def test_a_sync_client_refuses_an_async_function(family):
    async def fetch(refresh_token):
        raise AssertionError

    class Fetcher:
        async def __call__(self, refresh_token):
            raise AssertionError

    for function in (fetch, functools.partial(fetch), Fetcher()):
        client = family.module.Client(auth=family.TokenAuth(function))
        with pytest.raises(TypeError, match="fetch is an async function, which a sync client cannot wait for"):
            client.get(URL)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("acc3ss", "fetch returned str; return a Token"),
        (None, "fetch returned NoneType; return a Token"),
        ({"access_token": "acc3ss"}, "fetch returned dict; return a Token"),
    ],
)
def test_a_function_has_to_return_a_token(family, result, reason):
    async def scenario(colour):
        async def fetch(refresh_token):
            return result

        world = World(family, colour)
        error = await world.client(family.TokenAuth(colour.function(fetch))).failing()
        assert error.reason == reason

    both(scenario)


def test_a_function_that_hides_a_coroutine_is_told_what_to_do(family):
    async def fetch(refresh_token):
        raise AssertionError

    client = family.module.Client(auth=family.TokenAuth(lambda _: fetch(None)))
    with pytest.raises(TokenRefreshFailed, match="fetch returned a coroutine; make it an `async def` function"):
        client.get(URL)


# -- age ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("life", "early", "renewed_at"),
    [(100, 30, 70), (100, 0, 100), (20, 30, 10), (100.5, 0.25, 100.25), (0, 30, 0)],
)
@KINDS
def test_a_token_is_renewed_before_its_end(family, kind, life, early, renewed_at):
    async def scenario(colour):
        world = World(family, colour, life=life)
        client = world.client(world.auth(kind, early=early))
        await client.get()
        if renewed_at:
            await colour.sleep(renewed_at - 0.125)
            await client.get()
            assert len(world.asked) == 1
            await colour.sleep(0.125)
        assert (await client.get()).text == "acc3ss-2"
        assert len(world.asked) == 2
        assert world.served[-1] == "acc3ss-2"

    both(scenario)


def test_the_age_counts_from_when_the_token_was_asked_for(family):
    async def scenario(colour):
        world = World(family, colour, life=20, takes=5)
        client = world.client(world.auth(early=0))
        await client.get()
        await colour.sleep(14.5)
        await client.get()
        assert len(world.asked) == 1
        await colour.sleep(0.5)
        await client.get()
        assert len(world.asked) == 2

    both(scenario)


def test_a_token_without_an_age_lasts(family):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth())
        await client.get()
        await colour.sleep(1e6)
        await client.get()
        assert len(world.asked) == 1

    both(scenario)


@KINDS
def test_while_one_renews_early_the_others_go_on(family, kind):
    async def scenario(colour):
        world = World(family, colour, life=100)
        client = world.client(world.auth(kind))
        world.valid = _From(1)
        await client.get()
        await colour.sleep(80)
        world.takes = 5

        async def one(wait):
            await colour.sleep(wait)
            text = (await client.get()).text
            return text, colour.now()

        results = await colour.gather(*(functools.partial(one, wait) for wait in (0, 1, 2, 6)))
        assert results == [("acc3ss-2", 85), ("acc3ss-1", 81), ("acc3ss-1", 82), ("acc3ss-2", 86)]
        assert len(world.asked) == 2

    both(scenario)


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_the_old_token_serves_where_an_early_renewal_fails(family, kind, caplog):
    async def scenario(colour):
        world = World(family, colour, life=100)
        client = world.client(world.auth(kind, name="login"))
        await client.get()
        await colour.sleep(80)
        failure = OSError("s3cr3t") if kind == "function" else world.json({"error": "s3cr3t"}, 503)
        world.answers = [failure] * 2
        trace = []
        for _ in range(30):
            try:
                text = (await client.get()).text
            except TokenRefreshFailed as error:
                text = error.reason
            trace.append((len(world.asked), text))
            await colour.sleep(1)
        # Asked at 80 and at 90, after half of what was left of the old token, and at 95.
        assert [asked for asked, _ in trace] == [2] * 10 + [3] * 5 + [4] * 15
        assert [text for _, text in trace] == ["acc3ss-1"] * 15 + ["acc3ss-2"] * 15

    both(scenario)
    assert len(caplog.messages) == 6
    why = "fetch failed with OSError" if kind == "function" else "the token endpoint answered 503 without a token"
    assert set(caplog.messages) == {f"login: no new token: {why}; the old one serves until it expires"}


def test_an_error_of_the_client_during_an_early_renewal_is_raised(family):
    """Then the client has given up the whole flow. The others go on with the old token."""

    async def scenario(colour):
        world = World(family, colour, life=100)
        client = world.client(world.auth("client_credentials"))
        await client.get()
        await colour.sleep(80)
        world.answers = [family.module.ConnectError("no")]
        error = await client.failing()
        assert error.reason == "the token request failed with ConnectError"
        assert isinstance(error.__cause__, family.module.ConnectError)
        assert (await client.get()).text == "acc3ss-1"
        assert len(world.asked) == 2

    both(scenario)


# -- one at a time --------------------------------------------------------------------------------------------


@KINDS
def test_fifty_refusals_one_refresh(family, kind):
    async def scenario(colour):
        world = World(family, colour, takes=1)
        client = world.client(world.auth(kind))
        await client.get()
        world.revoke()
        responses = await colour.gather(*[client.get] * 50)
        assert {(response.status_code, response.text) for response in responses} == {(200, "acc3ss-2")}
        assert len(world.asked) == 2
        assert world.most_at_once == 1
        assert colour.now() == 2

    both(scenario)


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_fifty_threads_and_two_event_loops_one_refresh(family, kind):
    """In real threads, on all cores, sync clients and async ones sharing one object."""
    module = family.module
    lock, issued, served = threading.Lock(), [], []
    barrier = threading.Barrier(22)

    def fetch(refresh_token):
        with lock:
            issued.append(f"acc3ss-{len(issued) + 1}")
            return Token(issued[-1])

    def handle(request):
        if request.url.host == "login.example":
            return module.Response(200, json={"access_token": fetch(None).access_token})
        with lock:
            token = request.headers["Authorization"].removeprefix("Bearer ")
            served.append(token)
            return module.Response(200 if len(issued) > 1 and token == "acc3ss-2" else 401)

    if kind == "function":
        auth = family.TokenAuth(fetch)
    else:
        auth = family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t")
    auth._tokens.land(auth._tokens.look(runtime.now(), math.inf), Token("acc3ss-1"))
    issued.append("acc3ss-1")
    codes = []
    transport = module.MockTransport(handle)
    context = ssl.create_default_context()  # made once: it is what costs time

    def in_thread():
        client = module.Client(transport=transport, auth=auth, verify=context)
        barrier.wait()
        codes.append(client.get(URL).status_code)

    async def in_loop():
        client = module.AsyncClient(transport=transport, auth=auth, verify=context)

        async def one():
            codes.append((await client.get(URL)).status_code)

        barrier.wait()
        async with anyio.create_task_group() as group:
            for _ in range(15):
                group.start_soon(one)

    threads = [threading.Thread(target=in_thread) for _ in range(20)]
    threads += [
        threading.Thread(target=anyio.run, args=(in_loop,), kwargs={"backend": each})
        for each in ("asyncio", "trio")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [200] * 50
    assert issued == ["acc3ss-1", "acc3ss-2"]


@KINDS
def test_all_who_wait_share_a_failure(family, kind, caplog):
    async def scenario(colour):
        world = World(family, colour, takes=1)
        world.answers = [family.module.ConnectError("s3cr3t")] * 2
        client = world.client(world.auth(kind, name="login"))
        errors = await colour.gather(*[client.failing] * 5)
        who = "fetch" if kind == "function" else "the token request"
        assert {str(error) for error in errors} == {f"login: no new token: {who} failed with ConnectError"}
        assert len({id(error) for error in errors}) == 5
        for error in errors:
            assert isinstance(error, family.module.TransportError)
            assert isinstance(error, TokenRefreshFailed)
            assert error.request.url == URL
            assert isinstance(error.__cause__, family.module.ConnectError)
            assert (error.policy, error.retry_after, error.code) == ("login", 1.0, None)
        assert len({id(error.request) for error in errors}) == 5
        assert len(world.asked) == 1

        await colour.sleep(0.75)  # remembered for a second
        error = await client.failing()
        assert (error.retry_after, error.__cause__) == (0.25, None)
        assert len(world.asked) == 1
        await colour.sleep(0.25)
        await client.failing()
        assert len(world.asked) == 2
        await colour.sleep(1)
        assert (await client.get()).text == "acc3ss-1"

    assert both(scenario) == []
    assert caplog.messages == []


def test_a_refusal_and_then_a_failure(family):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth("client_credentials"))
        await client.get()
        world.revoke()
        world.answers = [world.json({"error": "invalid_client"}, 401)]
        error = await client.failing()
        assert (error.reason, error.code) == ("the token endpoint answered 401 invalid_client", "invalid_client")
        assert world.served == ["acc3ss-1"] * 2
        await colour.sleep(1)
        assert (await client.get()).text == "acc3ss-2"

    both(scenario)


# -- a token endpoint that hangs ------------------------------------------------------------------------------


def test_a_function_that_hangs(family):
    async def scenario(colour):
        world = World(family, colour, takes=1000)
        client = world.client(world.auth(timeout=10))
        errors = await colour.gather(*[client.failing] * 3)
        assert {error.reason for error in errors} == {"no answer in time"}
        assert colour.now() == 10
        await client.failing()
        assert colour.now() == 10
        assert len(world.asked) == 1
        await colour.sleep(1)
        world.takes = 0
        assert (await client.get()).text == "acc3ss-1"
        assert len(world.asked) == 2

    both(scenario)


@BACKENDS
def test_a_token_request_that_hangs_in_async_code(family, backend):
    """Also where the transport does not look at its timeouts, as MockTransport does not."""

    async def main():
        world = World(family, SimpleNamespace(name=backend, sleep=runtime.asleep, function=lambda each: each))
        world.takes = 1000
        client = world.client(world.auth("client_credentials", timeout=4))
        errors = []

        async def one(wait):
            await runtime.asleep(wait)
            errors.append((await client.failing(), runtime.now()))

        async with anyio.create_task_group() as group:
            for wait in (0, 1, 2):
                group.start_soon(one, wait)
        assert [now for _, now in errors] == [4.0] * 3
        assert {error.reason for error, _ in errors} == {"no answer in time"}
        assert all(isinstance(error.__cause__, TimedOut) for error, _ in errors)
        if backend == "asyncio":
            assert asyncio.current_task().cancelling() == 0
        await runtime.asleep(1)
        world.takes = 0
        assert (await client.get()).status_code == 200

    run(main, backend=backend)


def test_a_token_request_that_hangs_in_sync_code(family):
    """The sockets keep the time limit of the refresh, where it is shorter than that of the client."""
    with FlakyServer(choose(lambda request: hang() if request.target == "/token" else ok())) as server:
        auth = family.TokenAuth.client_credentials(
            f"{server.url}/token", client_id="me", client_secret="s3cr3t", timeout=0.05
        )
        with family.module.Client(auth=auth, timeout=None) as client:
            with pytest.raises(TokenRefreshFailed) as caught:
                client.get(server.url)
            assert caught.value.reason == "no answer in time"
            assert isinstance(caught.value.__cause__, family.module.ReadTimeout)


def test_the_body_of_an_answer_is_bounded(family):
    """In time, where bytes come one by one, and in length."""

    async def scenario(colour):
        for body, reason, ends_at in (
            (Body(colour, [b" "] * 100, every=1), "no answer in time", 5),
            (Body(colour, itertools.repeat(b" " * 10_000)), "the token endpoint answered 200 without a token", 0),
        ):
            began = colour.now()
            world = World(family, colour)
            world.answers = [family.module.Response(200, stream=body.of(family))]
            client = world.client(world.auth("client_credentials", timeout=5))
            assert (await client.failing()).reason == reason
            assert colour.now() - began == ends_at
            assert body.sent < 30
            assert body.closed
            await colour.sleep(1)
            assert (await client.get()).status_code == 200

    both(scenario)


def test_the_flood_is_not_read_on_by_the_client_either(family):
    """Where an old token still serves, the client would read the answer that nobody wants to its end."""

    async def scenario(colour):
        body = Body(colour, itertools.repeat(b" " * 10_000))
        world = World(family, colour, life=100)
        client = world.client(world.auth("client_credentials"))
        await client.get()
        await colour.sleep(80)
        world.answers = [family.module.Response(200, stream=body.of(family))]
        assert (await client.get()).text == "acc3ss-1"
        assert body.sent < 30

    both(scenario)


class Body:
    """A streamed body in either colour."""

    def __init__(self, colour, pieces, every=0):
        self.colour = colour
        self.pieces = pieces
        self.every = every
        self.sent = 0
        self.closed = False

    def of(self, family):
        module = family.module
        bases = (Body, module.SyncByteStream if self.colour.name == "sync" else module.AsyncByteStream)
        self.__class__ = type("Body", bases, {})
        return self

    def __iter__(self):
        for piece in self.pieces:
            _finished(self.colour.sleep(self.every))
            self.sent += 1
            yield piece

    def __aiter__(self):
        self.rest = iter(self.pieces)
        return self

    async def __anext__(self):
        try:
            piece = next(self.rest)
        except StopIteration:
            raise StopAsyncIteration from None
        await self.colour.sleep(self.every)
        self.sent += 1
        return piece

    def close(self):
        self.closed = True

    async def aclose(self):
        self.closed = True


def test_the_timeouts_of_a_token_request(family):
    async def scenario(colour):
        world = World(family, colour, life=0)
        client = world.client(world.auth("client_credentials", timeout=4))
        for given, expected in (
            (None, {"connect": 4, "read": 4, "write": 4, "pool": 4}),
            (60, {"connect": 4, "read": 4, "write": 4, "pool": 4}),
            (family.module.Timeout(3, read=9), {"connect": 3, "read": 4, "write": 3, "pool": 3}),
        ):
            await client.get(timeout=given)
            assert world.asked[-1].extensions == {"timeout": expected}

        async def hurried():
            return await client.get(timeout=60)

        await colour.call(Timeout(2.5, interrupt=False), hurried)
        assert set(world.asked[-1].extensions["timeout"].values()) == {2.5}

    both(scenario)


def test_a_flow_that_is_lost_does_not_keep_the_others_waiting(family):
    """Somebody drives the flow by hand and never goes on with it."""
    module = family.module

    def answer(token):
        return module.Response(200, json={"access_token": token})

    with virtual_time() as clock:
        auth = family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t", timeout=5)
        elsewhere = contextvars.copy_context()
        lost = auth.sync_auth_flow(module.Request("GET", URL))
        assert elsewhere.run(next, lost).url == TOKEN_URL

        with pytest.raises(TokenRefreshFailed, match="no answer in time"):
            next(auth.sync_auth_flow(module.Request("GET", URL)))
        assert clock.now() == 5
        clock.sleep(1)
        last = auth.sync_auth_flow(module.Request("GET", URL))
        next(last)
        assert last.send(answer("acc3ss-1")).headers["Authorization"] == "Bearer acc3ss-1"
        last.close()

        # The lost one comes back after all, with an answer that is older than what is there now.
        assert elsewhere.run(lost.send, answer("acc3ss-0")).headers["Authorization"] == "Bearer acc3ss-0"
        elsewhere.run(lost.close)
        another = auth.sync_auth_flow(module.Request("GET", URL))
        assert next(another).headers["Authorization"] == "Bearer acc3ss-1"
        another.close()


def test_a_flow_that_is_dropped_hands_over(family):
    module = family.module
    auth = family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t")
    for _ in range(3):
        flow = auth.sync_auth_flow(module.Request("GET", URL))
        assert next(flow).url == TOKEN_URL
        flow.close()

    async def main():
        for _ in range(3):
            flow = auth.async_auth_flow(module.Request("GET", URL))
            assert (await anext(flow)).url == TOKEN_URL
            await flow.aclose()

    anyio.run(main)
    anyio.run(main, backend="trio")


def test_threads_that_never_end_are_bounded(family):
    with virtual_time() as clock:
        auth = family.TokenAuth(
            lambda refresh_token: clock.sleep(1e6), timeout=1, retry_failed_after=0, name="login"
        )
        transport = family.module.MockTransport(lambda request: family.module.Response(200))
        client = family.module.Client(transport=transport, auth=auth)
        reasons = []
        for _ in range(MOST_THREADS + 2):
            with pytest.raises(TokenRefreshFailed) as caught:
                client.get(URL)
            reasons.append(caught.value.reason)
        assert reasons == ["no answer in time"] * MOST_THREADS + ["fetch failed with ThreadsExhausted"] * 2
        assert isinstance(caught.value.__cause__, ThreadsExhausted)
        assert clock.now() == MOST_THREADS
        clock.sleep(1e6 + 1)
        auth.fetch = lambda refresh_token: Token("acc3ss")
        assert client.get(URL).status_code == 200


def test_no_thread_to_be_had(family, monkeypatch):
    def start(job):
        raise RuntimeError("can't start new thread")

    transport = family.module.MockTransport(lambda request: family.module.Response(200))
    client = family.module.Client(
        transport=transport, auth=family.TokenAuth(lambda refresh_token: Token("acc3ss"))
    )
    with virtual_time() as clock:
        with monkeypatch.context() as patched:
            patched.setattr(workers, "start", start)
            with pytest.raises(TokenRefreshFailed, match="fetch failed with RuntimeError"):
                client.get(URL)
        clock.sleep(1)
        assert client.get(URL).status_code == 200
        assert client.auth._threads == 0


def test_an_answer_that_comes_late_is_not_lost(family):
    """A thread cannot be stopped. What it brings after its time is the newest token all the same."""
    with virtual_time() as clock:
        rotated = []

        def fetch(refresh_token):
            clock.sleep(7)
            return Token("acc3ss-1", None, "r3fr3sh-1")

        auth = family.TokenAuth(fetch, timeout=5, on_rotate=rotated.append)
        transport = family.module.MockTransport(lambda request: family.module.Response(200))
        client = family.module.Client(transport=transport, auth=auth)
        with pytest.raises(TokenRefreshFailed):
            client.get(URL)
        clock.sleep(2.5)
        auth.fetch = None
        assert client.get(URL).status_code == 200
        assert [token.refresh_token for token in rotated] == ["r3fr3sh-1"]


# -- leaders who go away --------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_a_cancelled_leader_hands_over(family, backend, kind):
    async def main():
        world = World(family, _async_colour(backend), takes=5)
        client = world.client(world.auth(kind))
        order = []

        async def one(name, wait):
            await runtime.asleep(wait)
            order.append((name, (await client.get()).text, runtime.now()))

        async with anyio.create_task_group() as group:
            scope = anyio.CancelScope()

            async def first():
                with scope:
                    await one("first", 0)

            group.start_soon(first)
            for number, name in enumerate(("second", "third", "fourth"), 1):
                group.start_soon(one, name, number)
            await runtime.asleep(3.5)
            scope.cancel()
        assert scope.cancelled_caught
        assert order[0][1:] == ("acc3ss-1", 8.5)  # begun anew when the first one went
        assert sorted(name for name, _, _ in order) == ["fourth", "second", "third"]
        assert len(world.asked) == 2

    run(main, backend=backend)


@BACKENDS
@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_the_one_who_waited_longest_leads(family, backend, kind):
    async def main():
        world = World(family, _async_colour(backend), takes=5)
        names = []

        async def watched(request):
            names.append(current.get())
            return await world.token_endpoint(request)

        current = contextvars.ContextVar("current")

        async def handle(request):
            return await (watched(request) if request.url.host == "login.example" else world.api(request))

        auth = family.TokenAuth(watched) if kind == "function" else world.auth(kind)
        client = world.client(auth, handle)
        scopes = {name: anyio.CancelScope() for name in "abcd"}

        async def one(name, wait):
            await runtime.asleep(wait)
            current.set(name)
            with scopes[name]:
                await client.get()

        async with anyio.create_task_group() as group:
            for wait, name in enumerate("abcd"):
                group.start_soon(one, name, wait)
            await runtime.asleep(3.5)
            for name in "cab":  # c only waits, a leads, and then b
                scopes[name].cancel()
                await runtime.asleep(0.25)
        assert names == ["a", "b", "d"]

    run(main, backend=backend)


@pytest.mark.parametrize("interrupted", ["leader", "follower"])
def test_an_interrupt_in_sync_code_hands_over(family, interrupted):
    with virtual_time() as clock:
        world = World(family, SimpleNamespace(name="sync", sleep=None, function=None))
        asked = []

        def handle(request):
            if request.url.host == "login.example":
                asked.append(clock.now())
                clock.sleep(3)
                if interrupted == "leader" and len(asked) == 1:
                    raise KeyboardInterrupt
                return world.json({"access_token": "acc3ss-1"})
            return family.module.Response(200)

        auth = world.auth("client_credentials")
        client = family.module.Client(transport=family.module.MockTransport(handle), auth=auth)
        ends = []

        def one(wait):
            clock.sleep(wait)
            try:
                ends.append((wait, client.get(URL).status_code, clock.now()))
            except KeyboardInterrupt:
                ends.append((wait, "interrupted", clock.now()))

        def interrupting_wait(ticket):
            if len(waits) == 0:
                waits.append(ticket)
                raise KeyboardInterrupt
            return clock.wait(ticket)

        waits = [] if interrupted == "follower" else [None]
        previous = runtime.install(replace(runtime._installed, wait=interrupting_wait))
        try:
            clock.run_threads(*(functools.partial(one, wait) for wait in (0, 1, 2)))
        finally:
            runtime.install(previous)
        assert not auth._tokens._waiting
        assert auth._tokens._flight is None
    if interrupted == "leader":
        assert ends == [(0, "interrupted", 3), (1, 200, 6), (2, 200, 6)]
    else:
        assert ends == [(1, "interrupted", 1), (0, 200, 3), (2, 200, 3)]


def test_a_leader_whose_thread_goes_on(family):
    """A sync leader that is interrupted leaves its thread behind, and the others wait for that."""
    with virtual_time() as clock:
        world = World(family, SimpleNamespace(name="sync", sleep=None, function=None))
        asked = []

        def fetch(refresh_token):
            asked.append(clock.now())
            clock.sleep(3)
            return Token("acc3ss-1")

        auth = family.TokenAuth(fetch)
        client = family.module.Client(
            transport=family.module.MockTransport(lambda request: family.module.Response(200)), auth=auth
        )
        ends = []

        def hurried():
            with pytest.raises(family.module.TimeoutException) as caught:
                Timeout(1, interrupt=False, name="mine").call(client.get, URL)
            assert isinstance(caught.value, TimedOut)
            assert str(caught.value) == "mine: not done after 1 s"
            assert caught.value.request.url == URL
            ends.append(clock.now())

        def patient():
            clock.sleep(0.5)
            client.get(URL)
            ends.append(clock.now())

        clock.run_threads(hurried, patient)
        assert ends == [1, 3]
        assert asked == [0]
        assert world.asked == []


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_a_leader_whose_own_time_is_over_hands_over(family, kind):
    """Its deadline is no failure of the token endpoint."""

    async def scenario(colour):
        world = World(family, colour, takes=3)
        client = world.client(world.auth(kind, name="login"))

        async def get():
            return (await client.get()).text

        async def hurried():
            try:
                await colour.call(Timeout(2, name="mine"), get)
            except TimedOut as error:
                return str(error), colour.now()

        async def patient():
            await colour.sleep(1)
            return await get()

        first, second = await colour.gather(hurried, patient)
        assert first == ("mine: not done after 2 s", 2)
        assert second.startswith("acc3ss")

    both(scenario)


@BACKENDS
def test_a_token_request_that_sees_the_deadline_of_its_caller(family, backend):
    """A transport that keeps deadlines raises before the caller is cancelled: the same as if it was cancelled."""

    async def main():
        world = World(family, _async_colour(backend))
        asked = []

        async def handle(request):
            if request.url.host == "login.example":
                asked.append(runtime.now())
                if len(asked) == 1:
                    await runtime.asleep(2.9995)  # the clock of a socket, and ours, are not the same
                    raise family.module.ReadTimeout("late")
            return await world.handle(request)

        client = world.client(world.auth("client_credentials"), handle)
        outcomes = []

        async def hurried():
            with pytest.raises(family.module.TimeoutException) as caught:
                await Timeout(3, interrupt=False, name="mine").acall(client.get)
            assert isinstance(caught.value, TimedOut)
            assert caught.value.request.url == URL
            assert isinstance(caught.value.__cause__, family.module.ReadTimeout)
            outcomes.append("hurried")

        async def patient():
            await runtime.asleep(1)
            outcomes.append((await client.get()).text)

        async with anyio.create_task_group() as group:
            group.start_soon(hurried)
            group.start_soon(patient)
        assert outcomes == ["hurried", "acc3ss-1"]
        assert asked == [0, 2.9995]

    run(main, backend=backend)


def test_a_deadline_that_has_passed_already(family):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth("client_credentials"))

        async def late():
            await colour.sleep(2)
            await client.get()

        try:
            await colour.call(Timeout(1, interrupt=False), late)
        except TimedOut as error:
            assert isinstance(error, family.module.TimeoutException)  # noqa: PT017
        else:
            raise AssertionError
        assert world.asked == []
        assert (await client.get()).status_code == 200

    both(scenario)


def _async_colour(backend):
    return SimpleNamespace(name=backend, sleep=runtime.asleep, function=lambda each: each)


# -- bodies ---------------------------------------------------------------------------------------------------


class OneWay(io.BytesIO):
    """A file that cannot seek."""

    def seekable(self):
        return False

    def seek(self, *_args):
        raise io.UnsupportedOperation


def a_generator():
    yield b"one"
    yield b"two"


def a_read_file():
    file = io.BytesIO(b"skipped|one")
    file.seek(8)
    return file


REPLAYABLE = {
    "nothing": (dict, b""),
    "bytes": (lambda: {"content": b"one"}, b"one"),
    "json": (lambda: {"json": {"a": 1}}, b'"a"'),
    "form": (lambda: {"data": {"a": "1"}}, b"a=1"),
    "file": (lambda: {"content": io.BytesIO(b"one")}, b"one"),
    "file from its middle": (lambda: {"content": a_read_file()}, b"one"),
    "multipart": (lambda: {"files": {"f": io.BytesIO(b"one")}}, b"one"),
    "list": (lambda: {"content": [b"one", b"two"]}, b"onetwo"),
}
ONE_SHOT = {
    "generator": lambda: {"content": a_generator()},
    "iterator": lambda: {"content": iter([b"one", b"two"])},
    "one-way file": lambda: {"content": OneWay(b"one")},
    "multipart with a one-way file": lambda: {"files": {"f": OneWay(b"one")}},
}


def reading(world, bodies):
    """A transport that reads each body once, as a socket does; MockTransport makes bytes of it before."""

    class Reading(world.family.module.BaseTransport, world.family.module.AsyncBaseTransport):
        def handle_request(self, request):
            if request.url.host != "login.example":
                bodies.append(b"".join(request.stream))
            return _finished(world.handle(request))

        async def handle_async_request(self, request):
            if request.url.host != "login.example":
                bodies.append(b"".join([chunk async for chunk in request.stream]))
            return await world.handle(request)

    return Reading()


def _finished(coroutine):
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError


@pytest.mark.parametrize("body", REPLAYABLE)
@KINDS
def test_what_can_be_sent_again_is_sent_again_byte_for_byte(family, kind, body):
    make, part = REPLAYABLE[body]
    with virtual_time() as clock:
        world = World(family, _sync_colour(clock))
        bodies = []
        client = family.module.Client(transport=reading(world, bodies), auth=world.auth(kind))
        client.get(URL)
        world.revoke()
        response = client.post(URL, **make())
        assert response.status_code == 200
        assert bodies[1] == bodies[2]
        assert part in bodies[1]
        assert (b"skipped" in bodies[1]) is False


@pytest.mark.parametrize("body", ONE_SHOT)
@KINDS
def test_what_cannot_be_sent_again_gets_the_401_and_the_next_request_a_new_token(family, kind, body):
    with virtual_time() as clock:
        world = World(family, _sync_colour(clock))
        bodies = []
        client = family.module.Client(transport=reading(world, bodies), auth=world.auth(kind))
        client.get(URL)
        world.revoke()
        response = client.post(URL, **ONE_SHOT[body]())
        assert (response.status_code, response.text, response.history) == (401, "acc3ss-1", [])
        assert len(bodies) == 2
        assert len(world.asked) == 1
        assert client.get(URL).text == "acc3ss-2"


@BACKENDS
def test_bodies_in_async_code(family, backend):
    async def chunks():
        yield b"one"

    async def main():
        world = World(family, _async_colour(backend))
        bodies = []

        client = family.module.AsyncClient(transport=reading(world, bodies), auth=world.auth("refresh_token"))
        await client.get(URL)
        world.revoke()
        assert (await client.post(URL, content=chunks())).status_code == 401
        assert (await client.post(URL, content=b"one")).status_code == 200
        world.revoke()
        assert (await client.post(URL, files={"f": io.BytesIO(b"two")})).status_code == 200
        assert bodies[1:3] == [b"one", b"one"]
        assert bodies[3] == bodies[4]
        assert b"two" in bodies[4]

    run(main, backend=backend)


def test_a_401_that_is_given_back_has_not_been_read(family):
    """As the transport gave it, so a caller who streams gets the stream."""

    async def scenario(colour):
        async def handle(request):
            if request.url.host == "login.example":
                return await world.handle(request)
            return family.module.Response(401, stream=Body(colour, [b"refused"]).of(family))

        world = World(family, colour)
        client = world.client(world.auth("client_credentials"), handle)
        request = client.raw.build_request("POST", URL, content=b"x")
        outcome = client.raw.send(request, stream=True)
        response = outcome if colour.name == "sync" else await outcome
        assert response.status_code == 401
        assert not response.is_stream_consumed
        response.read() if colour.name == "sync" else await response.aread()
        assert response.text == "refused"
        assert response.history[0].text == "refused"

    both(scenario)


def _sync_colour(clock):
    async def sleep(seconds):
        clock.sleep(seconds)

    def function(coroutine_function):
        return lambda *args: _finished(coroutine_function(*args))

    return SimpleNamespace(name="sync", sleep=sleep, function=function, now=clock.now)


# -- connections ----------------------------------------------------------------------------------------------


def a_site(request):
    """Refuse the first token; the token endpoint is a part of the same site."""
    if request.target == "/token":
        return ok(json.dumps({"access_token": "acc3ss-2"}).encode())
    token = dict(request.headers)["Authorization"]
    return ok() if token == "Bearer acc3ss-2" else status(401, b"refused" * 100)


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_one_connection_is_enough(family, kind):
    """The refused answer has given its connection back before a token is asked for, by whatever client."""
    module = family.module
    with FlakyServer(choose(a_site)) as server:

        def fetch(refresh_token):
            return Token(client.post(f"{server.url}/token", auth=None).json()["access_token"])

        auth = one_of(family, kind, server, fetch)
        limits = module.Limits(max_connections=1)
        with module.Client(auth=auth, limits=limits, timeout=module.Timeout(5, pool=0.5)) as client:
            response = client.get(server.url)
            assert (response.status_code, response.history[0].status_code) == (200, 401)
        assert [request.target for request in server.requests] == ["/", "/token", "/"]
        assert server.connections == 1


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
@BACKENDS
def test_one_connection_is_enough_in_async_code(family, kind, backend):
    module = family.module

    async def main():
        async def fetch(refresh_token):
            return Token((await client.post(f"{server.url}/token", auth=None)).json()["access_token"])

        auth = one_of(family, kind, server, fetch)
        limits = module.Limits(max_connections=1)
        async with module.AsyncClient(auth=auth, limits=limits, timeout=module.Timeout(5, pool=0.5)) as client:
            assert (await client.get(server.url)).status_code == 200

    with FlakyServer(choose(a_site)) as server:
        anyio.run(main, backend=backend)
        assert [request.target for request in server.requests] == ["/", "/token", "/"]
        assert server.connections == 1


def one_of(family, kind, server, fetch):
    if kind == "function":
        auth = family.TokenAuth(fetch)
    else:
        auth = family.TokenAuth.client_credentials(f"{server.url}/token", client_id="me", client_secret="s3cr3t")
    auth._tokens.land(auth._tokens.look(runtime.now(), math.inf), Token("acc3ss-1"))
    return auth


def test_a_token_request_that_was_sent_is_not_sent_again(family):
    """Not by the pipeline of the client either: the refresh token in it may be used up."""

    async def scenario(colour):
        world = World(family, colour)
        world.answers = [family.module.ReadError("no")]
        guarded = family.ours.ResilientTransport if colour.name == "sync" else family.ours.AsyncResilientTransport
        inner = family.module.MockTransport(colour.function(world.handle))
        pipeline = Retry(3, wait=0.1)
        transport = guarded(inner, pipeline=pipeline, repeatable={"POST"})
        client = world.client(world.auth("refresh_token"), None, transport=transport)
        assert (await client.failing()).reason == "the token request failed with ReadError"
        assert len(world.asked) == 1

    both(scenario)


def test_the_pipeline_of_the_client_keeps_the_time_limit_of_a_refresh(family):
    """In sync code as well, where nobody could cancel it."""

    async def scenario(colour):
        world = World(family, colour)
        guarded = family.ours.ResilientTransport if colour.name == "sync" else family.ours.AsyncResilientTransport
        inner = family.module.MockTransport(colour.function(world.handle))
        transport = guarded(inner, pipeline=RateLimit("1/100s", wait=1000, key=lambda call: None))
        client = world.client(world.auth("client_credentials"), None, transport=transport)
        await client.get(auth=None, headers={"Authorization": "Bearer none"})
        assert (await client.failing()).reason == "the token request failed with RateLimited"
        assert colour.now() == 0  # the next turn comes after the time limit, so nobody waits for it
        assert world.asked == []

    both(scenario)


# -- redirects ------------------------------------------------------------------------------------------------


class Redirects:
    """Servers that redirect."""

    def __init__(self, family, routes):
        self.module = family.module
        self.routes = routes
        self.seen = []

    async def handle(self, request):
        body = b"".join([chunk async for chunk in request.stream]) if hasattr(request.stream, "__aiter__") else b""
        self.seen.append((request.method, str(request.url), request.headers.get("Authorization"), body))
        outcome = self.routes[str(request.url)]
        if isinstance(outcome, list):
            outcome = outcome.pop(0)
        if isinstance(outcome, tuple):
            return self.module.Response(outcome[0], headers={"Location": outcome[1]}, text="moved")
        return self.module.Response(**outcome)


def test_a_token_does_not_go_along_to_another_origin(family):
    async def scenario(colour):
        routes = {
            "https://api.example/a": (302, "https://evil.example/b"),
            "https://evil.example/b": {"status_code": 401},
            "https://api.example:444/b": {"status_code": 401},
            "http://api.example/b": {"status_code": 401},
        }
        world = World(family, colour)
        for there in list(routes)[1:]:
            routes["https://api.example/a"] = (302, there)
            servers = Redirects(family, routes)
            client = world.client(world.auth(), servers.handle, follow_redirects=True)
            world.asked.clear()
            response = await client.get("https://api.example/a")
            assert response.status_code == 401
            (_, _, first, _), (_, url, second, _) = servers.seen
            assert first.startswith("Bearer acc3ss-")
            assert (url, second) == (there, None)
            assert len(world.asked) == 1  # a refusal of nobody's token is no reason for a new one

    both(scenario)


def test_a_refusal_behind_a_redirect_goes_on_from_there(family):
    """What has been done before the redirect is not done again."""

    async def scenario(colour):
        routes = {
            "https://api.example/orders": (303, "/orders/1"),
            "https://api.example/orders/1": [{"status_code": 401}, {"status_code": 200}],
        }
        world = World(family, colour)
        servers = Redirects(family, routes)
        client = world.client(world.auth(), servers.handle, follow_redirects=True)
        response = await client.request("POST", "https://api.example/orders", content=b"one")
        assert (response.status_code, str(response.url)) == (200, "https://api.example/orders/1")
        assert [(method, url[19:], token) for method, url, token, _ in servers.seen] == [
            ("POST", "/orders", "Bearer acc3ss-1"),
            ("GET", "/orders/1", "Bearer acc3ss-1"),
            ("GET", "/orders/1", "Bearer acc3ss-2"),
        ]

    both(scenario)


def test_a_refusal_behind_a_redirect_that_keeps_the_body(family):
    async def scenario(colour):
        routes = {
            "https://api.example/a": (308, "/b"),
            "https://api.example/b": [{"status_code": 401}, {"status_code": 200}],
        }
        world = World(family, colour)
        servers = Redirects(family, routes)
        client = world.client(world.auth(), servers.handle, follow_redirects=True)
        response = await client.request("PUT", "https://api.example/a", content=b"one")
        assert response.status_code == 200
        assert [body for *_, body in servers.seen] == [b"one"] * 3

    both(scenario)


def test_a_generator_behind_a_redirect_that_drops_it(family):
    """The first request could not be sent again, but the one that was refused has no body."""

    def handle(request):
        seen.append((request.method, request.url.path))
        for _chunk in request.stream:
            pass
        if request.url.path == "/a":
            return family.module.Response(303, headers={"Location": "/b"})
        return family.module.Response(200 if len(seen) > 2 else 401)

    seen = []
    auth = family.TokenAuth(lambda refresh_token: Token(f"acc3ss-{len(seen)}"))
    client = family.module.Client(transport=family.module.MockTransport(handle), auth=auth, follow_redirects=True)
    assert client.post("https://api.example/a", content=a_generator()).status_code == 200
    assert seen == [("POST", "/a"), ("GET", "/b"), ("GET", "/b")]


def test_a_token_goes_along_to_https_of_the_same_host(family):
    """The one redirect to another origin with which the clients themselves keep the header."""

    async def scenario(colour):
        routes = {
            "http://api.example/a": (301, "https://api.example/a"),
            "https://api.example/a": [{"status_code": 401}, {"status_code": 200}],
        }
        world = World(family, colour)
        servers = Redirects(family, routes)
        client = world.client(world.auth(), servers.handle, follow_redirects=True)
        assert (await client.get("http://api.example/a")).status_code == 200
        assert [(url[:5], token[-1]) for _, url, token, _ in servers.seen] == [
            ("http:", "1"),
            ("https", "1"),
            ("https", "2"),
        ]

    both(scenario)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("there", ["https://evil.example/token", "https://login.example/other"])
@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("client_auth", ["basic", "body"])
def test_credentials_do_not_follow_a_redirect(family, code, there, follows, client_auth):
    async def scenario(colour):
        token = {"status_code": 200, "json": {"access_token": "acc3ss-evil"}}
        routes = {TOKEN_URL: (code, there), there: token, URL: {"status_code": 200}}
        servers = Redirects(family, routes)
        auth = family.TokenAuth.refresh_token(
            TOKEN_URL, refresh_token="r3fr3sh-0", client_id="me", client_secret="s3cr3t", client_auth=client_auth
        )
        client = World(family, colour).client(auth, servers.handle, follow_redirects=follows)
        error = await client.failing()
        redirects = "the token endpoint redirects"
        assert error.reason == (redirects if follows else f"the token endpoint answered {code} without a token")
        first, *rest = servers.seen
        assert b"r3fr3sh-0" in first[3]
        for _, _, header, body in rest:
            assert body == b""
            if "evil" in there:
                assert header is None

    both(scenario)


# -- what a token endpoint may answer -------------------------------------------------------------------------


BEARER = {"token_type": "Bearer"}
BAD = {
    "no token": (200, {"expires_in": 3600, **BEARER}, "the token endpoint answered 200 without a token"),
    "an error with 200": (200, {"error": "invalid_grant"}, "the token endpoint answered 200 invalid_grant"),
    "a list": (200, ["acc3ss"], "the token endpoint answered 200 without a token"),
    "null": (200, None, "the token endpoint answered 200 without a token"),
    "500": (500, {"access_token": "acc3ss", **BEARER}, "the token endpoint answered 500 without a token"),
    "400": (400, {"error": "invalid_scope"}, "the token endpoint answered 400 invalid_scope"),
    "an unknown error": (400, {"error": "r3fr3sh"}, "the token endpoint answered 400 without a token"),
    "an error that is none": (400, {"error": ["s3cr3t"]}, "the token endpoint answered 400 without a token"),
    "token is null": (200, {"access_token": None, **BEARER}, "access_token"),
    "token is a number": (200, {"access_token": 1, **BEARER}, "access_token"),
    "token is empty": (200, {"access_token": "", **BEARER}, "access_token"),
    "token with a line end": (200, {"access_token": "acc3ss\r\nX-Evil: 1", **BEARER}, "access_token"),
    "token with a trailing line end": (200, {"access_token": "acc3ss\n", **BEARER}, "access_token"),
    "token with a space": (200, {"access_token": "acc3ss acc3ss", **BEARER}, "access_token"),
    "token not in ASCII": (200, {"access_token": "accéss", **BEARER}, "access_token"),
    "type mac": (200, {"access_token": "acc3ss", "token_type": "mac"}, "token_type"),
    "type is a number": (200, {"access_token": "acc3ss", "token_type": 1}, "token_type"),
    "type is empty": (200, {"access_token": "acc3ss", "token_type": ""}, "token_type"),
    "refresh token is a number": (200, {"access_token": "acc3ss", "refresh_token": 1}, "refresh_token"),
    "refresh token is empty": (200, {"access_token": "acc3ss", "refresh_token": ""}, "refresh_token"),
    **{
        f"expires_in {value!r}": (200, {"access_token": "acc3ss", "expires_in": value, **BEARER}, "expires_in")
        for value in ("abc", "", "-1", "1.5", "²", " 60", "1e3", "9" * 19, -1, -0.5, True, [], {}, 10**400)
    },
}
RAW = {
    "HTML": b"<html>s3cr3t</html>",
    "empty": b"",
    "half": b'{"access_token": "acc3ss',
    "not UTF-8": b'{"access_token": "\xff\xfe"}',
    "deep": b"[" * 100_000,
    "infinite": b'{"access_token": "acc3ss", "expires_in": 1e400}',
    "not a number": b'{"access_token": "acc3ss", "expires_in": NaN}',
}


@pytest.mark.parametrize("answer", [*BAD, *RAW])
def test_an_answer_that_is_no_token(family, answer):
    async def scenario(colour):
        world = World(family, colour)
        if answer in BAD:
            code, content, reason = BAD[answer]
            world.answers = [family.module.Response(code, content=json.dumps(content).encode())]
            if reason in ("access_token", "token_type", "refresh_token", "expires_in"):
                reason = f"the token endpoint answered with a bad token (Token: this {reason} is not allowed; "
        else:
            reason = "the token endpoint answered "
            world.answers = [
                family.module.Response(200, content=RAW[answer], headers={"Content-Type": "text/html"})
            ]
        auth = family.TokenAuth.refresh_token(
            TOKEN_URL, refresh_token="r3fr3sh-0", client_id="me", client_secret="s3cr3t", name="login"
        )
        client = world.client(auth)
        error = await client.failing()
        assert error.reason.startswith(reason)
        assert not any(
            secret in "".join(traceback.format_exception(error)).replace("'refresh_token'", "")
            for secret in ("r3fr3sh-0", "s3cr3t-", "acc3ss\r")
        )
        assert world.served == []
        await client.failing()
        assert len(world.asked) == 1  # it is not asked again at once
        return str(error), error.code

    both(scenario)


@pytest.mark.parametrize(
    ("answer", "life"),
    [
        ({"expires_in": "3600"}, 3600),
        ({"expires_in": 3600.5}, 3600.5),
        ({"expires_in": None}, None),
        ({}, None),
        ({"token_type": "bEARER", "scope": "a", "extra": {"x": 1}, "refresh_token": None}, None),
        ({"token_type": None}, None),
    ],
)
def test_an_answer_that_will_do(family, answer, life):
    async def scenario(colour):
        world = World(family, colour)
        world.answers = [world.json({"access_token": "acc3ss-~/+=._", **answer}, 201 if life else 200)]
        world.valid = {"acc3ss-~/+=._", "acc3ss-1"}
        client = world.client(world.auth("refresh_token", early=0))
        await client.get()
        assert world.served == ["acc3ss-~/+=._"]
        await colour.sleep(3599)
        await client.get()
        await colour.sleep(10)
        await client.get()
        assert len(world.asked) == (1 if life is None else 2)

    both(scenario)


def test_an_answer_in_a_content_coding(family):
    async def scenario(colour):
        world = World(family, colour)
        body = gzip.compress(b'{"access_token": "acc3ss-0"}')
        world.valid = {"acc3ss-0"}
        world.answers = [
            family.module.Response(
                200, stream=Body(colour, [body]).of(family), headers={"Content-Encoding": "gzip"}
            )
        ]
        client = world.client(world.auth("client_credentials"))
        assert (await client.get()).text == "acc3ss-0"
        if colour.name == "sync":  # here the async clients leave a generator of their own behind
            world.revoke()
            broken = Body(colour, [b"no gzip"]).of(family)
            world.answers = [family.module.Response(200, stream=broken, headers={"Content-Encoding": "gzip"})]
            assert (await client.failing()).reason == "the token request failed with DecodingError"

    both(scenario)


@pytest.mark.parametrize(
    ("field", "pause"),
    [({"Retry-After": "20"}, 20), ({"Retry-After": "86400"}, 60), ({"Retry-After": "soon"}, 1), ({}, 1)],
)
def test_a_token_endpoint_may_ask_for_patience(family, field, pause):
    async def scenario(colour):
        world = World(family, colour)
        world.answers = [world.json({"error": "slow_down"}, 429, headers=field)]
        client = world.client(world.auth("client_credentials"))
        assert (await client.failing()).retry_after == pause
        await colour.sleep(pause - 0.5)
        await client.failing()
        assert len(world.asked) == 1
        await colour.sleep(0.5)
        assert (await client.get()).status_code == 200

    both(scenario)


def test_where_the_answers_of_the_token_endpoint_are_not_to_be_found(family):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth("client_credentials"))
        assert (await client.get()).history == []
        world.revoke()
        response = await client.get()
        assert [(each.status_code, each.history) for each in response.history] == [(401, [])]

        # The first token of all is refused: two token requests around one answer.
        world.valid = _From(world.number + 2)
        response = await world.client(world.auth("client_credentials")).get()
        assert response.status_code == 200
        assert [(each.status_code, each.history) for each in response.history] == [(401, [])]

        # One token request fails, and the old token serves.
        world.life = 100
        world.revoke()
        await client.get()
        await colour.sleep(90)
        world.answers = [world.json({}, 500)]
        response = await client.get()
        assert (response.status_code, response.history) == (200, [])

    both(scenario)


# -- what a token endpoint is asked ---------------------------------------------------------------------------


def asked_with(family, method, **kwargs):
    """Return the one request that asks for a token, and the fields of its form."""
    requests = []

    def handle(request):
        if request.url.host == "login.example":
            requests.append((request, b"".join(request.stream)))
            return family.module.Response(200, json={"access_token": "acc3ss"})
        return family.module.Response(200)

    client = family.module.Client(
        transport=family.module.MockTransport(handle),
        auth=getattr(family.TokenAuth, method)(f"{TOKEN_URL}?tenant=1", **kwargs),
        headers={"X-Mine": "1"},
        cookies={"session": "s3cr3t"},
    )
    client.get(URL, headers={"User-Agent": "mine/1"})
    ((request, body),) = requests
    assert request.method == "POST"
    assert str(request.url) == f"{TOKEN_URL}?tenant=1"
    assert request.headers["Content-Type"] == "application/x-www-form-urlencoded"
    assert request.headers["Content-Length"] == str(len(body))
    assert request.headers["Accept"] == "application/json"
    assert request.headers["Host"] == "login.example"
    assert request.headers["User-Agent"] == "mine/1"
    assert not {"Cookie", "X-Mine"} & set(request.headers)
    assert body == request.content
    return request, dict(parse_qsl(body.decode(), strict_parsing=True))


def test_client_credentials(family):
    request, form = asked_with(family, "client_credentials", client_id="m &:", client_secret="s3cr3t &%+")
    assert form == {"grant_type": "client_credentials"}
    # RFC 6749 2.3.1: both are form-encoded before they are put together.
    pair = base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")).decode()
    assert pair == "m+%26%3A:s3cr3t+%26%25%2B"

    request, form = asked_with(
        family,
        "client_credentials",
        client_id="me",
        client_secret="s3cr3t",
        client_auth="body",
        scope="a b",
        params={"audience": "https://api.example"},
    )
    assert "Authorization" not in request.headers
    assert form == {
        "grant_type": "client_credentials",
        "scope": "a b",
        "audience": "https://api.example",
        "client_id": "me",
        "client_secret": "s3cr3t",
    }


def test_a_refresh_token_that_begins(family):
    request, form = asked_with(family, "refresh_token", client_id="me", refresh_token="r3fr3sh 0")
    assert "Authorization" not in request.headers
    assert form == {"grant_type": "refresh_token", "refresh_token": "r3fr3sh 0", "client_id": "me"}

    request, form = asked_with(
        family,
        "refresh_token",
        client_id="me",
        client_secret="s3cr3t",
        refresh_token="r3fr3sh-0",
        scope="a",
        params={"client_id": "me"},
    )
    assert request.headers["Authorization"].startswith("Basic ")
    assert form == {
        "grant_type": "refresh_token",
        "refresh_token": "r3fr3sh-0",
        "scope": "a",
        "client_id": "me",
    }


def test_no_user_agent_to_copy(family):
    auth = family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t")
    flow = auth.sync_auth_flow(family.module.Request("GET", URL))
    assert "User-Agent" not in next(flow).headers
    flow.close()


# -- rotation -------------------------------------------------------------------------------------------------


def refresh_token_in(request):
    return dict(parse_qsl(request.content.decode()))["refresh_token"]


def test_refresh_tokens_rotate(family):
    async def scenario(colour):
        world = World(family, colour, life=0)
        world.valid = _From(0)
        rotated = []
        client = world.client(world.auth("refresh_token", on_rotate=rotated.append))
        given = ["r3fr3sh-1", None, "r3fr3sh-1", "r3fr3sh-2"]
        world.answers = [
            world.json({"access_token": f"acc3ss-{index}", "expires_in": 0, "refresh_token": token})
            for index, token in enumerate(given)
        ]
        for _ in range(5):
            await client.get()
        used = [refresh_token_in(request) for request in world.asked]
        assert used == ["r3fr3sh-0", "r3fr3sh-1", "r3fr3sh-1", "r3fr3sh-1", "r3fr3sh-2"]
        assert [(token.access_token, token.refresh_token) for token in rotated] == [
            ("acc3ss-0", "r3fr3sh-1"),
            ("acc3ss-3", "r3fr3sh-2"),
        ]

    both(scenario)


def test_functions_rotate_too(family):
    async def scenario(colour):
        seen, rotated = [], []

        async def fetch(refresh_token):
            seen.append(refresh_token)
            return Token("acc3ss", 0, [None, "r3fr3sh-1", "r3fr3sh-2", None][min(len(seen) - 1, 3)])

        world = World(family, colour)
        world.valid = {"acc3ss"}
        client = world.client(family.TokenAuth(colour.function(fetch), on_rotate=rotated.append))
        for _ in range(5):
            await client.get()
        assert seen == [None, None, "r3fr3sh-1", "r3fr3sh-2", "r3fr3sh-2"]
        assert [token.refresh_token for token in rotated] == ["r3fr3sh-1", "r3fr3sh-2"]

    both(scenario)


def test_a_client_has_no_use_for_a_refresh_token(family):
    """RFC 6749 4.4.3: what comes with client credentials is not to be used."""

    async def scenario(colour):
        world = World(family, colour)
        world.answers = [world.json({"access_token": "acc3ss-0", "refresh_token": 1, "expires_in": 0})] * 2
        client = world.client(world.auth("client_credentials"))
        await client.get()
        await client.get()
        assert b"refresh" not in world.asked[-1].content

    both(scenario)


@KINDS
def test_a_hook_that_raises_is_logged_without_what_it_says(family, kind, caplog):
    async def scenario(colour):
        def on_rotate(token):
            raise OSError(f"cannot write {token.access_token} and {token.refresh_token}")

        world = World(family, colour)
        world.valid = _From(0)
        client = world.client(
            family.TokenAuth.refresh_token(
                TOKEN_URL, refresh_token="r3fr3sh-0", client_id="me", on_rotate=on_rotate, name="login"
            )
        )
        world.answers = [world.json({"access_token": "acc3ss-1", "refresh_token": "r3fr3sh-1"})]
        assert (await client.get()).status_code == 200

    both(scenario)
    assert caplog.messages == ["login: on_rotate failed with OSError"] * 3
    assert not any(record.exc_info for record in caplog.records)


def test_a_refresh_token_that_is_refused_for_good_is_not_tried_again(family):
    async def scenario(colour):
        world = World(family, colour, life=100)
        client = world.client(world.auth("refresh_token"))
        await client.get()
        await colour.sleep(80)
        world.answers = [world.json({"error": "invalid_grant", "error_description": "s3cr3t"}, 400)]
        assert (await client.get()).text == "acc3ss-1"  # as long as it lasts
        await colour.sleep(20)
        for _ in range(3):
            error = await client.failing()
            assert str(error).endswith("no new token: the token endpoint answered 400 invalid_grant")
            assert (error.code, error.retry_after) == ("invalid_grant", None)
            await colour.sleep(1e6)
        assert len(world.asked) == 2

    both(scenario)


def test_other_grants_are_tried_again(family):
    async def scenario(colour):
        world = World(family, colour)
        client = world.client(world.auth("client_credentials"))
        world.answers = [world.json({"error": "invalid_grant"}, 400)]
        assert (await client.failing()).retry_after == 1
        await colour.sleep(1)
        assert (await client.get()).status_code == 200

    both(scenario)


# -- options, copies, and what is never shown -----------------------------------------------------------------

BAD_OPTIONS = [
    ({"early": -1}, ValueError, "TokenAuth: early=-1 is not allowed; give a number of seconds"),
    ({"early": "soon"}, TypeError, "TokenAuth: early='soon' is not allowed"),
    ({"timeout": 0}, ValueError, "TokenAuth: timeout=0 is not allowed"),
    ({"timeout": None}, TypeError, "TokenAuth: timeout=None is not allowed"),
    ({"retry_failed_after": math.nan}, ValueError, "TokenAuth: retry_failed_after=nan is not allowed"),
    ({"on_rotate": 1}, TypeError, "TokenAuth: on_rotate=1 is not allowed; give a function"),
    ({"on_rotate": asyncio.sleep}, TypeError, "TokenAuth: on_rotate=.* is not allowed; give a sync function"),
    ({"name": ""}, ValueError, "TokenAuth: name='' is not allowed"),
]


@pytest.mark.parametrize(("kwargs", "kind", "message"), BAD_OPTIONS)
def test_bad_options(kwargs, kind, message):
    with pytest.raises(kind, match=message):
        TokenAuth(print, **kwargs)
    with pytest.raises(kind, match=message):
        TokenAuth.refresh_token(TOKEN_URL, refresh_token="r3fr3sh", client_id="me", **kwargs)
    if "on_rotate" not in kwargs:
        with pytest.raises(kind, match=message):
            TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t", **kwargs)


@pytest.mark.parametrize("fetch", ["acc3ss", None, 1, Token("acc3ss"), Token, httpx.BasicAuth])
def test_what_is_no_function(fetch):
    message = re.escape(
        f"TokenAuth: fetch of type {type(fetch).__name__} is not allowed; give a function of the ref"
    )
    with pytest.raises(TypeError, match=message) as caught:
        TokenAuth(fetch)
    assert "acc3ss" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "kind", "option"),
    [
        ({"token_url": "login.example/token"}, ValueError, "token_url"),
        ({"token_url": "ftp://login.example/token"}, ValueError, "token_url"),
        ({"token_url": "https:///token"}, ValueError, "token_url"),
        ({"token_url": "https://me:s3cr3t@login.example/token"}, ValueError, "token_url"),
        ({"token_url": "https://login.example/token#s3cr3t"}, ValueError, "token_url"),
        ({"token_url": "https://login.example:s3cr3t/"}, ValueError, "token_url"),
        ({"token_url": "https://login.example:65536/"}, ValueError, "token_url"),
        ({"token_url": None}, ValueError, "token_url"),
        ({"client_id": None}, TypeError, "client_id"),
        ({"client_id": ""}, ValueError, "client_id"),
        ({"client_secret": b"s3cr3t"}, TypeError, "client_secret"),
        ({"client_secret": "s3cr3t\n"}, ValueError, "client_secret"),
        ({"client_secret": ""}, ValueError, "client_secret"),
        ({"client_auth": "s0mething"}, ValueError, "client_auth='s0mething'"),
        ({"scope": ["a"]}, TypeError, r"scope=\['a'\]"),
        ({"params": {"a": 1}}, TypeError, "params"),
        ({"params": {1: "a"}}, TypeError, "params"),
        ({"params": "s3cr3t"}, TypeError, "params"),
        ({"params": {"grant_type": "s3cr3t"}}, ValueError, "params"),
        ({"params": {"client_secret": "s3cr3t"}}, ValueError, "params"),
        ({"params": {"refresh_token": "s3cr3t"}}, ValueError, "params"),
        ({"params": {"scope": "a"}, "scope": "b"}, ValueError, "params"),
    ],
)
def test_bad_options_of_grants(kwargs, kind, option):
    good = {"token_url": TOKEN_URL, "client_id": "me", "client_secret": "s3cr3t"}
    with pytest.raises(
        kind, match=f"TokenAuth: (this )?{option} (is|are) not allowed|these {option} are"
    ) as caught:
        TokenAuth.client_credentials(**good | kwargs)
    assert "s3cr3t" not in str(caught.value)
    with pytest.raises(kind, match=option):
        TokenAuth.refresh_token(**good | kwargs, refresh_token="r3fr3sh")


def test_bad_refresh_tokens():
    for token, kind in ((None, TypeError), (7, TypeError), ("", ValueError), ("r3fr3sh\x00", ValueError)):
        with pytest.raises(
            kind, match="TokenAuth: this refresh_token is not allowed; give a str of printable ASCII"
        ):
            TokenAuth.refresh_token(TOKEN_URL, refresh_token=token, client_id="me")
    with pytest.raises(TypeError, match="this client_secret is not allowed"):
        TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret=None)


def test_the_url_may_be_one_of_the_package(family):
    url = family.module.URL(TOKEN_URL)
    auth = family.TokenAuth.client_credentials(url, client_id="me", client_secret="s3cr3t")
    assert TOKEN_URL in repr(auth)


def test_the_repr():
    secret = functools.partial(functools.partial(print, "s3cr3t"), "r3fr3sh")

    class Fetcher:
        secret = "s3cr3t"

        def __call__(self, refresh_token):
            raise AssertionError

        def __repr__(self):
            return self.secret

        def fetch(self, refresh_token):
            raise AssertionError

    assert repr(TokenAuth(print)) == "TokenAuth(print)"
    assert repr(TokenAuth(secret, on_rotate=secret)) == "TokenAuth(print, on_rotate=print)"
    assert repr(TokenAuth(Fetcher())) == "TokenAuth(test_the_repr.<locals>.Fetcher)"
    assert repr(TokenAuth(Fetcher().fetch)) == "TokenAuth(test_the_repr.<locals>.Fetcher.fetch)"
    auth = TokenAuth(print, early=1, timeout=2.5, retry_failed_after=0)
    assert repr(auth) == "TokenAuth(print, early=1, timeout=2.5, retry_failed_after=0)"
    assert auth.label == repr(auth)
    assert TokenAuth(print, name="login").label == "login"
    auth = TokenAuth.refresh_token(
        f"{TOKEN_URL}?key=s3cr3t",
        refresh_token="r3fr3sh",
        client_id="me",
        client_secret="s3cr3t",
        params={"a": "s3cr3t"},
    )
    assert repr(auth) == f"TokenAuth(<refresh_token at {TOKEN_URL}>)"


def an_own_function(refresh_token):
    return Token("acc3ss-1")


def test_copies_have_a_state_of_their_own(family):
    module = family.module
    client = module.Client(transport=module.MockTransport(lambda request: module.Response(200)))
    auth = family.TokenAuth(an_own_function, early=5, name="login")
    client.get(URL, auth=auth)
    for other in (auth.fresh(), copy.copy(auth), copy.deepcopy(auth), pickle.loads(pickle.dumps(auth))):
        assert (other.fetch, other.early, other.timeout, other.name) == (an_own_function, 5, 10, "login")
        assert other._tokens._issued is None
        assert client.get(URL, auth=other).status_code == 200
    grant = family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t")
    assert repr(pickle.loads(pickle.dumps(grant))) == repr(grant)


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_errors_travel(family, remake):
    client = family.module.Client(auth=family.TokenAuth(lambda refresh_token: 1 / 0, name="login"))
    with pytest.raises(TokenRefreshFailed) as caught:
        client.get(URL, headers={"X-Secret": "s3cr3t"})
    error = caught.value
    assert isinstance(error, family.module.TransportError)
    assert isinstance(error, family.module.HTTPError)
    error.add_note("a note")
    assert b"s3cr3t" not in pickle.dumps(error)
    other = remake(error)
    assert type(other) is type(error)
    assert (str(other), other.reason, other.retry_after) == (str(error), error.reason, error.retry_after)
    assert other.__notes__ == ["a note"]
    with pytest.raises(RuntimeError):
        other.request  # noqa: B018
    plain = remake(TokenRefreshFailed("why", policy="login", retry_after=2.0, code="invalid_scope"))
    assert (str(plain), vars(plain)) == (
        "login: no new token: why",
        {"reason": "why", "policy": "login", "retry_after": 2.0, "code": "invalid_scope"},
    )


def test_errors_travel_to_where_nobody_knows_the_package(family):
    client = family.module.Client(auth=family.TokenAuth(lambda refresh_token: 1 / 0, name="login"))
    with pytest.raises(TokenRefreshFailed) as caught:
        client.get(URL)
    code = "import pickle, sys; e = pickle.loads(sys.stdin.buffer.read()); print(type(e).__module__, e)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(caught.value), stdout=subprocess.PIPE, check=True
    )
    assert done.stdout.decode().split()[0] == family.ours.__name__


def test_secrets_are_nowhere_to_be_seen(family, caplog):
    """Not in errors, their tracebacks, events and logs, whatever goes wrong."""
    caplog.set_level(0)
    seen = []

    async def scenario(colour):
        world = World(family, colour, life=100)
        auth = family.TokenAuth.refresh_token(
            f"{TOKEN_URL}?key=k",
            refresh_token="r3fr3sh-0",
            client_id="me",
            client_secret="s3cr3t",
            on_rotate=lambda token: {}[token.refresh_token],
        )
        world.answers = [
            world.json({"access_token": "acc3ss-0", "refresh_token": "r3fr3sh-1", "expires_in": 100}),
            world.json({"error": "s3cr3t", "error_description": "r3fr3sh-1", "error_uri": "s3cr3t"}, 400),
            family.module.Response(200, content=b'{"access_token": "acc3ss" "r3fr3sh"'),
            family.module.Response(302, headers={"Location": "https://evil.example/?s3cr3t"}),
            family.module.Response(500, text="s3cr3t r3fr3sh acc3ss"),
            world.json({"access_token": "acc3ss 2", "refresh_token": "r3fr3sh-2", "expires_in": "s3cr3t"}),
            family.module.ConnectError("no"),
        ]
        world.valid = _From(0)
        client = world.client(auth)
        await client.get()
        await colour.sleep(100)
        for _ in range(6):
            error = await client.failing()
            seen.append("".join(traceback.format_exception(error)) + repr(vars(error)) + repr(error))
            await colour.sleep(1)
        assert not world.answers
        seen.append(repr(auth) + repr(auth.fetch) + repr(auth._tokens._failure))

    with capture_events() as events:
        both(scenario)
    assert events == []
    for text in (*seen, caplog.text):
        # The lines of this file that a traceback quotes are no secrets.
        quoted = [line for line in text.splitlines() if "world.answers" not in line]
        assert not any(secret in line for secret in SECRETS for line in quoted), text


def test_context_variables_travel_to_the_thread_but_no_deadline(family):
    variable = contextvars.ContextVar("variable")
    seen = []

    def fetch(refresh_token):
        seen.append((variable.get(), deadline.remaining()))
        return Token("acc3ss-1")

    with virtual_time():
        variable.set("mine")
        transport = family.module.MockTransport(lambda request: family.module.Response(200))
        client = family.module.Client(transport=transport, auth=family.TokenAuth(fetch, timeout=7))
        Timeout(3, interrupt=False).call(client.get, URL)
    assert seen == [("mine", 7.0)]


def test_an_interrupt_while_a_thread_is_started(family, monkeypatch):
    def start(job):
        raise KeyboardInterrupt

    module = family.module
    client = module.Client(transport=module.MockTransport(lambda request: module.Response(200)))
    client.auth = family.TokenAuth(an_own_function)
    with monkeypatch.context() as patched:
        patched.setattr(workers, "start", start)
        with pytest.raises(KeyboardInterrupt):
            client.get(URL)
    assert client.get(URL).status_code == 200
    assert client.auth._threads == 0


def test_a_thread_that_begins_too_late(family, monkeypatch):
    """Its leader has gone before, so somebody else leads by now."""
    module = family.module
    jobs, asked = [], []

    def fetch(refresh_token):
        asked.append(None)
        return Token("acc3ss-1")

    with virtual_time() as clock:
        client = module.Client(
            transport=module.MockTransport(lambda request: module.Response(200)),
            auth=family.TokenAuth(fetch, timeout=9),
        )
        with monkeypatch.context() as patched:
            patched.setattr(workers, "start", jobs.append)
            with pytest.raises(TimedOut):
                Timeout(1, interrupt=False).call(client.get, URL)
        assert client.get(URL).status_code == 200
        assert (len(asked), clock.now()) == (1, 1)
        jobs[0].run()
        assert len(asked) == 1
        assert client.auth._threads == 0


FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@FORKS
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    release = threading.Event()

    def fetch(refresh_token):
        if os.getpid() == parent:
            release.wait()
        return Token("acc3ss-1")

    parent = os.getpid()
    auth = TokenAuth(fetch)
    client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(200)), auth=auth)
    thread = threading.Thread(target=client.get, args=(URL,))
    thread.start()
    while auth._tokens._flight is None or not auth._tokens._flight.begun:
        pass
    auth._tokens._lock.acquire()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if client.get(URL).status_code == 200 and auth._threads == 0 else 1)
    auth._tokens._lock.release()
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("kind", ["function", "client_credentials", "late"])
def test_no_error_keeps_itself_alive(family, kind):
    """A flow that ends with an error leaves nothing for the collector of cycles."""
    module = family.module

    def errors():
        kinds = (TokenRefreshFailed, TimedOut, module.ConnectError, ZeroDivisionError)
        return sum(isinstance(each, kinds) for each in gc.get_objects())

    def handle(request):
        if kind == "late":
            runtime.sleep(2)
        raise module.ConnectError("no")

    auth = (
        family.TokenAuth(lambda refresh_token: 1 / 0)
        if kind == "function"
        else family.TokenAuth.client_credentials(TOKEN_URL, client_id="me", client_secret="s3cr3t")
    )
    client = module.Client(transport=module.MockTransport(handle), auth=auth)
    gc.collect()
    gc.disable()
    try:
        with virtual_time():
            before = errors()
            with contextlib.suppress(TokenRefreshFailed, TimedOut):
                Timeout(1, interrupt=False).call(client.get, URL)
            if kind == "function":  # its thread has given the answer before it ends
                ends_at = time.monotonic() + 10
                while errors() > before and time.monotonic() < ends_at:
                    pass
            assert errors() == before
    finally:
        gc.enable()


# -- interleavings --------------------------------------------------------------------------------------------


def exploring(family, kind):
    """Callers with refusals, failures, hanging token endpoints and cancellations in any order."""
    module = family.module
    request = module.Request("GET", URL)
    refused, fine = module.Response(401, request=request), module.Response(200, request=request)
    failed = module.Response(500)

    async def fetch(refresh_token):
        raise AssertionError

    async def drive(world, auth, server, caller):
        """Carry out the steps of a flow, as a client and an event loop would."""
        steps = auth._steps(module.Request("GET", URL))
        answer, thrown = None, None
        while True:
            try:
                step = steps.send(answer) if thrown is None else steps.throw(thrown)
            except StopIteration:
                return answer
            answer, thrown = None, None
            try:
                match type(step).__name__:
                    case "_Wait":
                        answer = await step.arun()
                    case "_Send":
                        await world.pause()
                        number = int(step.request.headers["Authorization"].split("-")[1])
                        answer = fine if number >= server.good else refused
                        step.request.headers["X-Answer"] = str(answer.status_code)
                        answer._request = step.request
                    case "_Ask" | "_Fetch":
                        answer = await server.ask(world, step)
            except AssertionError:
                raise
            except BaseException as error:
                thrown = error

    class Server:
        def __init__(self):
            self.hung = False
            self.asking = 0
            self.asked = 0
            self.number = 0
            self.good = 1

        async def ask(self, world, step):
            assert self.asking == 0, "two ask for a token at the same time"
            self.asking += 1
            self.asked += 1
            try:
                manner = world.draw(8)
                if manner < 2:
                    await world.asleep(0.5)
                elif manner == 2:
                    self.hung = True
                    await world.asleep(auth.timeout)
                    raise TimedOut(policy="the driver")
                else:
                    await world.pause()
            finally:
                self.asking -= 1
            if manner == 3:
                raise OSError
            if manner == 4 and kind != "function":
                return failed
            self.number += 1
            life = 1.0 if world.draw(4) == 0 else None
            if kind == "function":
                return Token(f"acc3ss-{self.number}", life)
            return module.Response(
                200, json={"access_token": f"acc3ss-{self.number}", "expires_in": life}, request=step.request
            )

    auth = None

    def setup(world):
        nonlocal auth
        server = Server()
        if kind == "function":
            auth = family.TokenAuth(fetch, timeout=3, retry_failed_after=0.25, early=0.25)
        else:
            auth = family.TokenAuth.client_credentials(
                TOKEN_URL, client_id="me", client_secret="s3cr3t", timeout=3, retry_failed_after=0.25, early=0.25
            )
        ended = []

        async def caller(after):
            if after:
                await world.asleep(after)
            began = world.time
            try:
                response = await drive(world, auth, server, after)
            except TokenRefreshFailed as failure:
                ended.append(None)
                told = server.hung or failure.reason != "no answer in time"
                assert told, "nobody told it the outcome"
            else:
                ended.append(response)
            assert world.time - began <= 2 * auth.timeout + 1, "it took too long"

        async def revoking():
            await world.asleep(0.75)
            server.good = server.number + 1

        for index in range(4):
            world.spawn(caller(index % 2 * 0.75))
        world.spawn(revoking())

        def check():
            state = auth._tokens
            assert state._flight is None, "a flight is left behind"
            assert not state._waiting, "somebody is left in the queue"
            assert server.asked <= 8, f"asked {server.asked} times"

        return check

    return setup


@pytest.mark.parametrize("kind", ["function", "client_credentials"])
def test_interleavings(kind):
    runs = 1_500
    assert explore(exploring(FAMILIES["httpx"], kind), runs=runs) == runs


@pytest.mark.parametrize(
    ("name", "broken", "complaint"),
    [
        ("abandon", lambda self, flight, now: None, "nobody told it the outcome|left behind"),
        ("_start", lambda self, now: Flight(1, None, now, 3), "two ask"),
        ("_end", lambda self, outcome: setattr(self, "_flight", None), "nobody told it the outcome"),
    ],
)
def test_the_interleavings_find_what_is_broken(monkeypatch, name, broken, complaint):
    monkeypatch.setattr(Tokens, name, broken)
    with pytest.raises(AssertionError, match=complaint):
        explore(exploring(FAMILIES["httpx"], "client_credentials"), runs=1_000)
