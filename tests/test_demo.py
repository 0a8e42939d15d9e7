"""The demo by numbers, and as a whole in virtual time, where the server is called without a network."""

import asyncio
import itertools
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from unittest.mock import Mock

import httpx
import pytest
from rich.console import Console

import resilient.demo
from resilient import TimedOut, __main__, runtime, testing
from resilient.demo import DemoError, Options, process, report
from resilient.demo.clients import Answer, fetch_with, new_client, new_guard, transient
from resilient.demo.load import send
from resilient.demo.measure import (
    EventCounts,
    Numbers,
    Outcome,
    Side,
    ended_since,
    numbers,
    percentile,
    reasons_why_not_better,
    side,
)
from resilient.demo.process import ServerProcess
from resilient.demo.report import summary
from resilient.demo.run import _view, measure
from resilient.demo.script import DEFAULT_SECONDS, PHASES, PRODUCTS, Arrival, Script, schedule, title
from resilient.demo.server import Catalogue
from resilient.demo.views import Lines, LiveTable, Snapshot, View, graded, milliseconds, percent
from resilient.events import CircuitHalfOpened, CircuitOpened

# -- the script -------------------------------------------------------------------------------------------


def test_phases_follow_each_other_and_the_last_one_never_ends():
    script = Script(DEFAULT_SECONDS)
    moments = {"healthy": (0, 3.99), "errors": (4, 8.99), "hang": (9, 13.9), "outage": (14, 18.9)}
    for phase, (first, last) in {**moments, "recovery": (19, 1000)}.items():
        assert (script.phase_at(first), script.phase_at(last)) == (phase, phase)


def test_phases_stretch_with_the_script():
    script = Script(12)
    assert script.scale == 0.5
    assert script.ends == {"healthy": 2, "errors": 4.5, "hang": 7, "outage": 9.5, "recovery": 12}


def test_phases_have_titles():
    assert [title(phase) for phase in PHASES] == ["healthy", "30 % errors", "hang", "outage", "recovery"]


def test_schedule_is_a_poisson_process_that_the_seed_decides():
    arrivals = schedule(1000, 20, seed=7)
    assert arrivals == schedule(1000, 20, seed=7) != schedule(1000, 20, seed=8)
    assert len(arrivals) == pytest.approx(20_000, rel=0.03)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 1000
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)  # 1/e: memoryless
    assert {arrival.product for arrival in arrivals} == set(range(PRODUCTS))


# -- the numbers ------------------------------------------------------------------------------------------


def test_percentiles_are_nearest_ranks():
    values = [float(value) for value in range(1, 201)]
    assert percentile(values, 0.5) == 100
    assert percentile(values, 0.99) == 198
    assert percentile([5.0], 0.5) == percentile([5.0], 0.99) == 5
    assert percentile([], 0.5) is None


def outcome(due=0.0, latency=0.1, kind="fresh", error=None):
    return Outcome(due, latency, kind, error)


def test_numbers_count_stale_answers_as_useful_and_show_them():
    outcomes = [outcome(latency=n) for n in (0.3, 0.1)] + [outcome(latency=0.2, kind="stale")]
    outcomes += [outcome(latency=2.0, kind="failed", error="ReadTimeout")]
    assert numbers(outcomes, hits=6) == Numbers(
        calls=4,
        fresh=2,
        stale=1,
        failed=1,
        success_rate=0.75,
        p50=0.2,
        p99=2.0,
        hits=6,
        amplification=1.5,
    )


def test_numbers_of_no_calls():
    assert numbers([], hits=0) == Numbers(0, 0, 0, 0, None, None, None, 0, None)


def test_side_sorts_calls_by_the_phase_in_which_they_were_due():
    outcomes = [
        outcome(due=1),
        outcome(due=10, kind="failed", error="ReadTimeout"),
        outcome(due=18, latency=3.0, kind="failed", error="ReadTimeout"),
        outcome(due=18.5, kind="failed", error="HTTPStatusError"),
    ]
    one = side(outcomes, {"healthy": 1, "hang": 4, "outage": 2}, Script(24))
    assert {phase: (those.calls, those.failed, those.hits) for phase, those in one.phases.items()} == {
        "healthy": (1, 0, 1),
        "errors": (0, 0, 0),
        "hang": (1, 1, 4),
        "outage": (2, 2, 2),
        "recovery": (0, 0, 0),
    }
    assert (one.total.calls, one.total.hits) == (4, 7)
    assert one.errors == {"ReadTimeout": 2, "HTTPStatusError": 1}
    assert one.hits_while_down() == 6


def a_side(success_rate=0.5, p99=1.0, hits=10):
    none = numbers([], 0)
    phases = {**dict.fromkeys(PHASES, none), "hang": replace(none, hits=hits), "outage": replace(none, hits=hits)}
    total = Numbers(100, 50, 10, 40, success_rate, 0.01, p99, 2 * hits, 0.2)
    return Side(total=total, phases=phases, errors={"ReadTimeout": 40})


def test_better_means_more_answers_no_slower_no_more_requests():
    assert reasons_why_not_better(a_side(), a_side(success_rate=0.51)) == []
    assert reasons_why_not_better(a_side(), a_side()) == ["its success rate is not higher"]
    assert reasons_why_not_better(a_side(), a_side(success_rate=1.0, p99=1.01)) == ["its p99 is worse"]
    assert reasons_why_not_better(a_side(), a_side(success_rate=1.0, hits=11)) == [
        "more of its requests reached the server while that was down"
    ]
    assert len(reasons_why_not_better(a_side(), a_side(success_rate=0.1, p99=2, hits=11))) == 3


def test_events_are_counted_by_policy_and_reason():
    counts = EventCounts()
    for _ in range(2):
        counts(CircuitOpened(policy="breaker", at=1, reason="probes", open_for=1))
    counts(CircuitHalfOpened(policy="breaker", at=1))
    assert counts.by_policy == {"breaker": Counter({"circuit.opened (probes)": 2, "circuit.half_opened": 1})}


def test_the_last_second_goes_by_when_calls_ended():
    old, slow, quick = outcome(1, 0.5), outcome(0.5, 1.5), outcome(2, 0.1)
    assert ended_since([old, slow, quick], 2.0) == [quick, slow]
    assert ended_since([], 2.0) == []


# -- sending ----------------------------------------------------------------------------------------------


def test_calls_are_sent_on_schedule_whatever_becomes_of_those_before():
    outcomes, begun = [], []

    async def fetch(product):
        begun.append(runtime.now())
        await asyncio.sleep(10 if product == 0 else 1)
        if product == 1:
            raise httpx.ReadTimeout("late")
        return Answer(product, 0.0 if product == 2 else runtime.now())

    async def main():
        arrivals = [Arrival(at=0.5 * n, product=n) for n in range(4)]
        await send(arrivals, fetch, outcomes.append, started=runtime.now())

    testing.run(main)
    assert begun == [0, 0.5, 1.0, 1.5]
    assert outcomes == [
        Outcome(0.5, 1.0, "failed", "ReadTimeout"),
        Outcome(1.0, 1.0, "stale"),
        Outcome(1.5, 1.0, "fresh"),
        Outcome(0.0, 10.0, "fresh"),
    ]


def test_a_sender_that_is_late_counts_the_delay_as_latency():
    outcomes = []

    async def fetch(product):
        return Answer(product, runtime.now())

    async def main():
        await asyncio.sleep(5)
        await send([Arrival(2.0, 0)], fetch, outcomes.append, started=0.0)

    testing.run(main)
    assert outcomes == [Outcome(2.0, 3.0, "fresh")]


# -- clients ----------------------------------------------------------------------------------------------


def test_transient_errors():
    request = httpx.Request("GET", "http://shop/")
    for status, expected in ((503, True), (500, True), (404, False)):
        error = httpx.HTTPStatusError("", request=request, response=httpx.Response(status))
        assert transient(error) is expected
    assert transient(httpx.ConnectError(""))
    assert transient(TimedOut(policy="timeout"))
    assert not transient(ValueError())


def test_fetch_raises_for_bad_answers():
    async def main():
        transport = httpx.MockTransport(lambda _request: httpx.Response(503))
        async with new_client("bare", "http://shop", 1.0, transport) as client:
            assert client.timeout == httpx.Timeout(2.0)
            with pytest.raises(httpx.HTTPStatusError, match="503"):
                await fetch_with(client)(1)

    testing.run(main)


def test_the_guard_scales_with_the_script():
    cache, total, _, _, breaker, attempt = new_guard(0.5).pipeline.policies
    assert (total.seconds, attempt.seconds, breaker.window) == (0.5, 0.15, 1.0)
    assert cache.ttl < 1e-3


# -- the server -------------------------------------------------------------------------------------------


def ask_catalogue(scenario):
    async def main():
        transport = httpx.ASGITransport(app=Catalogue(Script(24), seed=1).app())
        async with new_client("bare", "http://shop", 1.0, transport) as client:
            assert (await client.post("/start")).status_code == 204
            return await scenario(client, runtime.now())

    return testing.run(main, start=100.0)


def test_the_server_follows_the_script_and_counts():
    async def scenario(client, started):
        seen = {}
        for phase, at in (("healthy", 1), ("hang", 10), ("outage", 15), ("recovery", 20)):
            await asyncio.sleep(started + at - runtime.now())
            response = await client.get("/products/3")
            seen[phase] = response.status_code, round(runtime.now() - started - at, 1)
        await client.get("/products/3", headers={"x-demo-client": "guarded"})
        return seen, (await client.get("/hits")).json()

    seen, hits = ask_catalogue(scenario)
    assert seen == {"healthy": (200, 0.0), "hang": (503, 4.0), "outage": (503, 0.0), "recovery": (200, 0.0)}
    assert hits == {
        "bare": {"healthy": 1, "errors": 0, "hang": 1, "outage": 1, "recovery": 1},
        "guarded": {"healthy": 0, "errors": 0, "hang": 0, "outage": 0, "recovery": 1},
    }


def test_the_server_fails_three_in_ten_and_both_clients_alike():
    async def scenario(client, started):
        await asyncio.sleep(5)
        statuses = {}
        for name in ("bare", "guarded"):
            calls = (client.get("/products/3", headers={"x-demo-client": name}) for _ in range(1000))
            statuses[name] = Counter(response.status_code for response in await asyncio.gather(*calls))
        await client.post("/start")
        return statuses, (await client.get("/hits")).json()

    statuses, hits = ask_catalogue(scenario)
    assert statuses["bare"] == statuses["guarded"]
    assert statuses["bare"][503] == pytest.approx(300, abs=45)
    assert hits == {}


# -- all of it, without a network --------------------------------------------------------------------------


def in_virtual_time(options, view=None):
    async def main():
        app = Catalogue(Script(options.seconds), options.seed).app()
        return await measure(options, "http://shop", view or View(), httpx.ASGITransport(app=app))

    return testing.run(main)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_guarded_side_is_better(seed):
    result = in_virtual_time(Options(seed=seed))
    bare, guarded = result.bare, result.guarded
    assert result.worse() == []
    assert bare.total.calls == guarded.total.calls == len(schedule(24, 50, seed))
    assert bare.total.hits == bare.total.calls
    assert bare.total.stale == 0
    assert bare.phases["errors"].success_rate < 0.8
    assert bare.phases["hang"].success_rate == bare.phases["outage"].success_rate == 0
    assert guarded.total.success_rate > 0.99
    assert guarded.phases["healthy"].stale == 0
    assert guarded.phases["errors"].fresh > 0.9 * guarded.phases["errors"].calls
    assert guarded.phases["outage"].fresh == 0  # only older answers are left to give
    assert guarded.hits_while_down() < 0.2 * bare.hits_while_down()
    assert guarded.phases["errors"].amplification > 1
    assert result.statistics["circuit breaker"].state == "closed"
    assert result.statistics["retry budget"].refused > 0
    assert result.events["circuit breaker"]["circuit.closed"] >= 1
    assert 0 < result.events["cache"]["cache.stale_served (error)"] <= result.statistics["cache"].stale


def test_the_result_as_data():
    data = json.loads(json.dumps(in_virtual_time(Options(seconds=3, rate=20)).as_data()))
    assert (data["seconds"], data["rate"], data["seed"]) == (3, 20, 1)
    assert data["better"] is (data["reasons"] == [])
    for name in ("bare", "guarded"):
        assert list(data[name]["phases"]) == list(PHASES)
        total = data[name]["total"]
        assert total["fresh"] + total["stale"] + total["failed"] == total["calls"] > 0
        assert total["hits"] == sum(phase["hits"] for phase in data[name]["phases"].values())
    assert list(data["events"]) == [
        "cache",
        "timeout of the call",
        "bulkhead",
        "retry",
        "circuit breaker",
        "timeout of an attempt",
    ]
    assert set(data["statistics"]) == {"cache", "bulkhead", "retry", "circuit breaker", "retry budget"}


def test_a_server_that_is_gone_ends_it_with_one_error():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(DemoError, match=r"the server is gone \(ConnectError\)"):
        testing.run(measure, Options(), "http://shop", View(), httpx.MockTransport(refuse))


# -- views ------------------------------------------------------------------------------------------------


def test_lines_once_a_second(capsys):
    in_virtual_time(Options(seconds=6), Lines())
    lines = capsys.readouterr().out.splitlines()
    shown = [(line[:6], line[8:19].strip()) for line in lines]
    assert shown[:5] == [
        ("   1 s", "healthy"),
        ("   2 s", "30 % errors"),
        ("   3 s", "hang"),
        ("   4 s", "outage"),
        ("   5 s", "outage"),
    ]
    assert shown[5:] in ([], [("   6 s", "recovery")])  # the last answer may come sooner
    for line in lines:
        assert " bare " in line
        assert " | guarded " in line
        assert ", circuit " in line


def test_the_live_table_shows_everything_in_80_columns():
    screen = StringIO()
    view = LiveTable(Console(file=screen, force_terminal=True, width=80, color_system=None))
    in_virtual_time(Options(seconds=6), view)
    shown = screen.getvalue()
    for word in ("req/s", "success", "stale", "p50 ms", "p99 ms", "hits", "circuit", "bare", "guarded", "closed"):
        assert word in shown
    assert "open" in shown.replace("opened", "")
    assert "of 6 s" in shown
    assert shown.count("In the last second") >= 20  # every quarter of a second
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


def test_the_quiet_view_shows_nothing(capsys):
    with View() as view:
        view.show(Snapshot(1.0, 24.0, "healthy", {}, "closed"))
    assert capsys.readouterr() == ("", "")


def test_the_view_goes_by_what_stdout_is(monkeypatch):
    assert type(_view(Console(), Options(json=True))) is View
    assert type(_view(Console(), Options())) is Lines
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert type(_view(Console(force_terminal=True, _environ={"TERM": "xterm"}), Options())) is LiveTable
    assert type(_view(Console(force_terminal=True, _environ={"TERM": "dumb"}), Options())) is Lines


def test_numbers_for_reading():
    assert [percent(rate) for rate in (None, 0, 0.0001, 0.5, 0.9999, 1)] == [
        "-",
        "0%",
        "0.1%",
        "50.0%",
        "99.9%",
        "100%",
    ]
    assert [milliseconds(seconds) for seconds in (None, 0.0123, 2.0)] == ["-", "12", "2000"]
    assert [graded(rate).style for rate in (None, 0.99, 0.95, 0.5)] == ["green", "green", "yellow", "red"]


# -- the summary ------------------------------------------------------------------------------------------


def a_result(guarded):
    events = {"cache": {"cache.stale_served (error)": 3, "other": 1}, "bulkhead": {}}
    return report.Result(Options(), a_side(), guarded, {}, events)


def test_the_summary_says_what_came_of_it():
    text = summary(Console(width=80), a_result(a_side(success_rate=0.9)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "All 100 calls" in lines
    assert "bare 50.0% 50 10 40 10 1000 20 0.20" in lines
    assert "guarded 90.0% 50 10 40 10 1000 20 0.20" in lines
    assert "hang 0 - / - - - / - - / - 10 / 10" in lines
    assert "cache 3 cache.stale_served (error), 1 other" in lines
    assert "bulkhead nothing" in lines
    assert "failed bare calls: 40 ReadTimeout" in lines
    text = " ".join(lines)
    assert "better: 90.0% of the calls were answered, 16.7% of these with an older answer, instead of" in text


def test_the_summary_of_empty_sides_claims_nothing():
    nothing = side([], {}, Script(24))
    text = summary(Console(width=80), report.Result(Options(), nothing, nothing, {}, {}))
    assert "failed bare calls: none" in text
    assert "better" not in text


# -- the command line -------------------------------------------------------------------------------------


@pytest.fixture
def started_with(monkeypatch):
    options = []
    monkeypatch.setattr(resilient.demo, "main", lambda chosen: options.append(chosen) or 7)
    return options


def test_the_command_line_has_defaults_and_options(started_with):
    assert __main__.main(["demo"]) == 7
    words = "demo --seconds 6.5 --rate 20 --port 8080 --seed 3 --json"
    assert __main__.main(words.split()) == 7
    assert started_with == [Options(), Options(6.5, 20, 8080, 3, json=True)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: COMMAND"),
        ("demo --seconds 2", "2 is not allowed; give a number from 3 to 600"),
        ("demo --seconds nan", "nan is not allowed"),
        ("demo --rate 501", "give a number from 20 to 500"),
        ("demo --rate fast", "argument --rate: invalid number value: 'fast'"),
        ("demo --port 65536", "argument --port: 65536 is not allowed; give a number from 0 to 65535\n"),
        ("demo --port 80.5", "argument --port: invalid number value: '80.5'"),
    ],
)
def test_a_bad_command_line_is_refused(words, message, started_with, capsys):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(words.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert started_with == []


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ([], 0, ""),
        (["one thing", "another"], 1, "demo: the guarded side is not better: one thing; another\n"),
        (DemoError("no server"), 2, "demo: no server\n"),
        (KeyboardInterrupt(), 130, "demo: interrupted\n"),
    ],
)
def test_exit_codes(ending, code, message, monkeypatch, capsys):
    def run(options):
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr("resilient.demo.run.run", run)
    assert resilient.demo.main(Options()) == code
    assert capsys.readouterr() == ("", message)


@pytest.fixture
def measured(monkeypatch):
    """What is measured, instead of starting a server."""
    outcome = []

    async def measure(*arguments):
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    monkeypatch.setattr("resilient.demo.run.ServerProcess", lambda options: nullcontext(Mock(url="http://shop")))
    monkeypatch.setattr("resilient.demo.run.measure", measure)
    return outcome


def test_text_begins_with_the_script_and_ends_with_the_summary(measured, capsys):
    measured.append(a_result(a_side(success_rate=0.9)))
    assert resilient.demo.main(Options()) == 0
    out = capsys.readouterr().out
    phases = "healthy until 4 s, 30 % errors until 9 s, hang until 14 s, outage until 19 s, recovery until 24 s"
    assert out.startswith(f"http://shop: {phases}\n")
    assert out.endswith(summary(Console(width=100), measured[0]) + "\n")


def test_a_result_that_is_not_better_is_told_as_data_and_as_error(measured, capsys):
    measured.append(a_result(a_side(success_rate=0.9, p99=3.0)))
    assert resilient.demo.main(Options(json=True)) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == measured[0].as_data()
    assert (measured[0].as_data()["better"], measured[0].as_data()["reasons"]) == (False, ["its p99 is worse"])
    assert err == "demo: the guarded side is not better: its p99 is worse\n"


def test_it_ends_when_nobody_reads_on(measured, monkeypatch, tmp_path):
    measured.append(ExceptionGroup("", [BrokenPipeError()]))
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert resilient.demo.main(Options()) == 141
        out.write("goes nowhere")
    assert (tmp_path / "out").read_text().startswith("http://shop: ")
    assert "goes nowhere" not in (tmp_path / "out").read_text()


# -- the server process -----------------------------------------------------------------------------------


def test_a_server_that_does_not_start(monkeypatch):
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-S", "-c", ""))
    with pytest.raises(DemoError, match="the server did not start"), ServerProcess(Options()):
        pass


def test_a_server_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(process, "_PATIENCE", 0.1)
    deaf = "import time; print('{\"port\": 1}', flush=True); time.sleep(60)"
    monkeypatch.setattr(process, "_COMMAND", (sys.executable, "-S", "-c", deaf))
    with ServerProcess(Options()) as server:
        assert server.url == "http://127.0.0.1:1"
    assert server._process.returncode == -9
