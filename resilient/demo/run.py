"""The demo as a whole: server, two clients on one schedule, view, summary.

Both clients run in one event loop at the same time: they meet the same phases and the same load of this machine.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import httpx
from rich.console import Console

from resilient import runtime
from resilient.demo import DemoError, Options
from resilient.demo.clients import Guard, fetch_with, new_client, new_guard
from resilient.demo.load import send
from resilient.demo.measure import EventCounts, Outcome, ended_since, numbers, side
from resilient.demo.process import ServerProcess
from resilient.demo.report import Result, summary
from resilient.demo.script import Script, schedule, title
from resilient.demo.views import Lines, LiveTable, Progress, Snapshot, View

_PATIENCE = 5.0


def run(options: Options) -> list[str]:
    """Run the demo and print what came of it.

    Returns:
        Why the guarded side is not better; nothing if it is.

    Raises:
        DemoError: The server cannot run.
        BrokenPipeError: Nobody reads what is printed.
    """
    console = Console(width=None if sys.stdout.isatty() else 100)
    with ServerProcess(options) as server:
        if not options.json:
            print(_introduction(options, server.url), flush=True)
        try:
            result = asyncio.run(measure(options, server.url, _view(console, options)))
        except ExceptionGroup as failures:  # of the view: nothing else ends early
            raise failures.exceptions[0] from None
    print(json.dumps(result.as_data(), indent=2) if options.json else summary(console, result), flush=True)
    return result.worse()


def _introduction(options: Options, url: str) -> str:
    phases = [f"{title(phase)} until {end:.3g} s" for phase, end in Script(options.seconds).ends.items()]
    return f"{url}: {', '.join(phases)}"


def _view(console: Console, options: Options) -> View:
    if options.json:
        return View()
    return LiveTable(console) if sys.stdout.isatty() and not console.is_dumb_terminal else Lines()


async def measure(
    options: Options, url: str, view: View, transport: httpx.AsyncBaseTransport | None = None
) -> Result:
    """Make all calls and sum them up.

    Args:
        options: What the command line asks for.
        url: Of the server.
        view: Where to show how it goes.
        transport: Instead of the network.

    Raises:
        DemoError: The server is gone.
        ExceptionGroup: Of one error, that of the view or of asking the server what to show.
    """
    script = Script(options.seconds)
    arrivals = schedule(options.seconds, options.rate, options.seed)
    guard = new_guard(script.scale)
    events = EventCounts()
    async with AsyncExitStack() as stack:
        bare, guarded, observer = [
            await stack.enter_async_context(new_client(name, url, script.scale, transport))
            for name in ("bare", "guarded", "observer")
        ]
        stack.enter_context(guard.pipeline.listen(events))
        fetches = {"bare": fetch_with(bare), "guarded": guard.pipeline(fetch_with(guarded))}
        outcomes: dict[str, list[Outcome]] = {name: [] for name in fetches}
        await _ask(observer, "POST", "/start")
        clock = _Clock(script, runtime.now())
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(_watch(view, clock, observer, outcomes, guard))
            sending = [
                tasks.create_task(send(arrivals, fetch, outcomes[name].append, clock.started))
                for name, fetch in fetches.items()
            ]
            await asyncio.wait(sending)
            watching.cancel()
        hits = (await _ask(observer, "GET", "/hits")).json()
    return Result(
        options=options,
        bare=side(outcomes["bare"], hits.get("bare", {}), script),
        guarded=side(outcomes["guarded"], hits.get("guarded", {}), script),
        statistics={**guard.pipeline.statistics(), guard.budget.label: guard.budget.statistics()},
        events={one.label: dict(events.by_policy.get(one.label, {})) for one in guard.pipeline.policies},
    )


@dataclass(frozen=True, slots=True)
class _Clock:
    """The script, and when it started."""

    script: Script
    started: float


async def _watch(
    view: View,
    clock: _Clock,
    observer: httpx.AsyncClient,
    outcomes: Mapping[str, Sequence[Outcome]],
    guard: Guard,
) -> None:
    due = clock.started
    with view:
        while True:
            due += view.interval
            await asyncio.sleep(due - runtime.now())
            hits = (await _ask(observer, "GET", "/hits")).json()
            elapsed = runtime.now() - clock.started
            clients = {
                name: Progress(
                    last_second=numbers(ended_since(ended, elapsed - 1), 0),
                    total=numbers(ended, sum(hits.get(name, {}).values())),
                )
                for name, ended in outcomes.items()
            }
            phase = clock.script.phase_at(elapsed - view.interval / 2)  # of the time that is shown
            view.show(Snapshot(elapsed, clock.script.seconds, phase, clients, guard.breaker.current_state))


async def _ask(observer: httpx.AsyncClient, method: str, path: str) -> httpx.Response:
    try:
        return await observer.request(method, path, timeout=_PATIENCE)
    except httpx.HTTPError as error:
        raise DemoError(f"the server is gone ({type(error).__name__})") from error
