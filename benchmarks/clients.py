"""The cases of HTTP clients: what the guard of a transport costs, for httpx and for httpx2.

No socket is opened here (see `sockets` for that): a mock transport makes each response. So the bare request costs
what the client itself does for it in Python, a few dozen microseconds, and the guard cannot hide behind a network.
A subject is a function that puts its transport around another one.
"""

import asyncio
import importlib
from collections.abc import Callable, Iterable
from functools import partial
from itertools import cycle, repeat
from typing import Any

import resilient
from benchmarks.cases import HAND, LONG, free_sleep
from benchmarks.checks import attempt
from benchmarks.harness import OURS, Case, Colour, Make

URL = "http://localhost/"
GOOD, BAD = 200, 503
RETRYABLE = frozenset({429, 502, 503, 504})
PACKAGES = ("httpx", "httpx2")
COLOURS: tuple[Colour, ...] = ("sync", "async")
ROUNDS = 3
CLIENT, TRANSPORT = "bare client", "bare transport"
RIVAL = "httpx-retries"
ALONE = f"{OURS}, Retry alone"
PRESET = "the whole of presets.http_client()"


# -- transports -----------------------------------------------------------------------------------------------


def resilient_preset(package: str, transport: Any, colour: Colour) -> Any:
    return _of_ours(package, colour)(transport)


def resilient_retry(package: str, transport: Any, colour: Colour) -> Any:
    return _of_ours(package, colour)(transport, pipeline=resilient.Retry(3, wait=0))


def _of_ours(package: str, colour: Colour) -> Any:
    ours = importlib.import_module(f"resilient.{package}")
    return ours.ResilientTransport if colour == "sync" else ours.AsyncResilientTransport


def httpx_retries(package: str, transport: Any, colour: Colour) -> Any:
    import httpx_retries as library

    return library.RetryTransport(transport, retry=library.Retry(total=2))


def interlock(package: str, transport: Any, colour: Colour) -> Any:
    from interlock import Config, WindowType

    library = importlib.import_module(f"interlock.integrations.{package}")
    kind = library.CircuitBreakerTransport if colour == "sync" else library.AsyncCircuitBreakerTransport
    config = Config(window_type=WindowType.TIME_BASED, window_size=30, wait_duration_in_open=LONG)
    return kind(transport, config=config)


def by_hand(package: str, transport: Any, colour: Colour) -> Any:
    client = importlib.import_module(package)

    class RetryTransport(client.BaseTransport):
        def handle_request(self, request):
            for left in (2, 1, 0):
                try:
                    response = transport.handle_request(request)
                except client.TransportError:
                    if not left:
                        raise
                else:
                    if not left or response.status_code not in RETRYABLE:
                        return response
                    response.close()
            raise AssertionError

    class AsyncRetryTransport(client.AsyncBaseTransport):
        async def handle_async_request(self, request):
            for left in (2, 1, 0):
                try:
                    response = await transport.handle_async_request(request)
                except client.TransportError:
                    if not left:
                        raise
                else:
                    if not left or response.status_code not in RETRYABLE:
                        return response
                    await response.aclose()
                await asyncio.sleep(0)
            raise AssertionError

    return RetryTransport() if colour == "sync" else AsyncRetryTransport()


# -- what is called in the loop -------------------------------------------------------------------------------


def mock(package: str, statuses: Iterable[int] = repeat(GOOD)) -> Any:
    """Return a transport of both colours that answers with one status after the other."""
    client = importlib.import_module(package)
    following = iter(statuses)
    return client.MockTransport(lambda _request: client.Response(next(following), content=b"answer"))


def by_client(package: str, transport: Any, colour: Colour) -> Callable[[], Any]:
    """Return a GET by a client with this transport; it returns the status."""
    client = importlib.import_module(package)
    get = (client.Client if colour == "sync" else client.AsyncClient)(transport=transport).get

    def request():
        return get(URL).status_code

    async def arequest():
        return (await get(URL)).status_code

    return request if colour == "sync" else arequest


def by_transport(package: str, transport: Any, colour: Colour) -> Callable[[], Any]:
    """Return a GET that goes to the transport without a client; it returns the status."""
    client = importlib.import_module(package)
    request = client.Request("GET", URL, extensions={"timeout": client.Timeout(5).as_dict()})
    send = transport.handle_request if colour == "sync" else transport.handle_async_request

    def handle():
        return send(request).status_code

    async def ahandle():
        return (await send(request)).status_code

    return handle if colour == "sync" else ahandle


# -- what a subject has to show -------------------------------------------------------------------------------


async def requests(
    package: str, make: Make, colour: Colour, statuses: Iterable[int], times: int
) -> tuple[Any, int]:
    """Make requests that are answered with these statuses; return the last outcome, and how many were sent."""
    sent = 0

    def counted():
        nonlocal sent
        for status in statuses:
            sent += 1
            yield status

    call = by_client(package, make(mock(package, counted()), colour), colour)
    outcome = None
    for _ in range(times):
        outcome = await attempt(call, patience=5.0)
    return outcome, sent


async def retries(package: str, make: Make, colour: Colour) -> None:
    """Check that it makes up to three attempts, and hands out the response of the last one."""
    outcome, sent = await requests(package, make, colour, (BAD, BAD, GOOD), 1)
    assert (outcome, sent) == (GOOD, 3), f"ended with {outcome!r} after {sent} attempts instead of 3"
    outcome, sent = await requests(package, make, colour, repeat(BAD), 1)
    assert (outcome, sent) == (BAD, 3), f"gave up with {outcome!r} after {sent} attempts instead of 3"


async def retries_or_opens(package: str, make: Make, colour: Colour) -> None:
    """Check that it does anything about failures: tries again, or stops calling."""
    outcome, sent = await requests(package, make, colour, (BAD, GOOD), 1)
    if (outcome, sent) == (GOOD, 2):
        return
    _, sent = await requests(package, make, colour, repeat(BAD), 200)
    assert sent < 200, "neither tried a failed request again nor stopped in 200 failures"


# -- the cases ------------------------------------------------------------------------------------------------


def cases_of(package: str) -> list[Case]:
    """Return the cases of one package."""
    peers = {RIVAL: partial(httpx_retries, package)} if package == "httpx" else {}  # it knows no other
    retry = partial(resilient_retry, package)
    hand = {f"{HAND} (retry)": partial(by_hand, package)}
    guards = {
        OURS: partial(resilient_preset, package),
        ALONE: retry,
        "interlock-cb (breaker)": partial(interlock, package),
        **peers,
        **hand,
    }
    return [
        case
        for colour in COLOURS
        for case in (
            Case(
                f"{package} client, GET",
                colour,
                guards,
                partial(retries_or_opens, package),
                prepare=partial(_guarded, by_client, package, (GOOD,)),
                answer=GOOD,
                bare=partial(_bare, by_client, package),
                unit=CLIENT,
                rounds=ROUNDS,
                target=1.1,
                rival=RIVAL,
                note=PRESET,
            ),
            Case(
                f"{package} transport, GET",
                colour,
                guards,
                partial(retries_or_opens, package),
                prepare=partial(_guarded, by_transport, package, (GOOD,)),
                answer=GOOD,
                bare=partial(_bare, by_transport, package),
                unit=TRANSPORT,
                rounds=ROUNDS,
                target=2.5,
                note=PRESET,
            ),
            Case(
                f"{package} client, one retry",
                colour,
                {OURS: retry, **peers, **hand},
                partial(retries, package),
                prepare=partial(_guarded, by_client, package, (BAD, GOOD)),
                answer=GOOD,
                around=free_sleep,
                bare=partial(_bare, by_client, package),
                unit=CLIENT,
                rounds=ROUNDS,
                note="Retry alone; 503, then 200 without a wait",
            ),
        )
    ]


def _bare(call: Callable[..., Any], package: str, colour: Colour) -> Callable[[], Any]:
    return call(package, mock(package), colour)


def _guarded(
    call: Callable[..., Any], package: str, statuses: Iterable[int], make: Make, colour: Colour
) -> Callable[[], Any]:
    return call(package, make(mock(package, cycle(statuses)), colour), colour)


CASES = sorted((case for package in PACKAGES for case in cases_of(package)), key=lambda case: case.name)
