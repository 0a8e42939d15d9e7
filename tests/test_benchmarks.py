"""The benchmark's method and its report, on trivial subjects; no time is asserted anywhere."""

import asyncio
import gc
import json
import socket
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from resilient import testing
from resilient.testing import virtual_time

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def through(function):
    return lambda: function()  # noqa: PLW0108 - the layer is what is measured


def athrough(function):
    async def guarded():
        return await function()

    return guarded


def missing(function):
    raise ImportError("No module named 'peer'")


def wrong(function):
    return lambda: 41


async def accepts(make, colour):
    assert callable(make(lambda: None))


def a_case(subjects, colour="sync", check=accepts, **more):
    from benchmarks.harness import Case

    return Case("trivial", colour, subjects, check, **more)


def measured(case):
    from benchmarks.harness import measure

    return measure(case, rounds=2, batch=20_000)


@pytest.mark.parametrize(("colour", "layer"), [("sync", through), ("async", athrough)])
def test_every_subject_gets_a_number_and_the_bare_call_is_the_unit(colour, layer):
    rows = measured(a_case({"resilient": layer, "other": layer}, colour, target=1000.0, note="a note"))
    bare, ours, other = rows
    assert [row.subject for row in rows] == ["bare call", "resilient", "other"]
    assert bare.ratio == 1.0
    for row in rows:
        assert row.ns > 0
        assert row.ratio == row.ns / bare.ns
    assert (ours.target, ours.note) == (1000.0, "a note")
    assert (other.target, other.note, other.met) == (None, "", None)


@pytest.mark.parametrize(
    ("subject", "reason"),
    [
        (missing, "not measured: ImportError: No module named 'peer'"),
        (wrong, "not measured: returned 41 instead of 42"),
    ],
)
def test_a_subject_that_cannot_be_measured_stays_in_the_table(subject, reason):
    from benchmarks import report

    rows = measured(a_case({"resilient": through, "peer": subject}))
    assert rows[-1].note == reason
    assert (rows[-1].ns, rows[-1].ratio, rows[-1].met) == (None, None, None)
    last = report.as_table(rows, [], 2).splitlines()[-1]
    assert last.split()[:3] == ["peer", "-", "-"]
    assert reason in last


def test_a_subject_that_does_not_guard_is_not_measured():
    from benchmarks import checks

    rows = measured(a_case({"resilient": through}, check=checks.retries))
    assert rows[-1].note == "not measured: Failure"


def test_the_unit_can_be_something_else_than_the_bare_call():
    rows = measured(a_case({"resilient": through}, bare=lambda colour: lambda: sum(range(2000)), unit="a sum"))
    assert [row.subject for row in rows] == ["a sum", "resilient"]
    assert rows[0].ratio == 1.0
    assert rows[1].ratio < 1.0, "calling a trivial function takes less than adding 2000 numbers"


@pytest.mark.parametrize(
    ("target", "rival", "to_beat", "met"),
    [
        (None, None, None, None),
        (1000.0, None, None, True),
        (0.5, None, None, False),
        (None, "slow", 10.0, True),
        (None, "fast", 2.0, False),
        (1000.0, "fast", 2.0, False),
        (0.5, "slow", 10.0, False),
        (1000.0, "missing", None, True),
    ],
)
def test_a_target_can_be_to_be_faster_than_somebody_else(monkeypatch, target, rival, to_beat, met):
    from benchmarks import harness

    took = {"bare call": 100, "resilient": 500, "slow": 1000, "fast": 200}
    monkeypatch.setattr(harness, "_calibrate", lambda call, batch: 1)
    monkeypatch.setattr(harness, "_in_turns", lambda ready, rounds: iter(took))
    batches = iter(took.values())
    monkeypatch.setattr(harness, "_batch", lambda call, times: next(batches))
    subjects = {"resilient": through, "slow": through, "fast": through, "missing": missing}
    rows = harness.measure(a_case(subjects, target=target, rival=rival), rounds=1)
    assert (rows[1].ratio, rows[1].to_beat, rows[1].met) == (5.0, to_beat, met)
    assert [row.met for row in rows if row.subject != "resilient"] == [None] * 4


def test_each_subject_is_called_in_batches_in_turns():
    from benchmarks import harness

    order = []

    def named(name):
        def make(function):
            def guarded():
                if order[-1:] != [name]:
                    order.append(name)
                return function()

            return guarded

        return make

    harness.measure(a_case({"a": named("a"), "b": named("b")}), rounds=3, batch=10_000)
    assert order[:4] == ["a", "b"] * 2, "prepared and calibrated"
    assert set(order[4:]) == {"a", "b"}


def test_turns_are_taken_in_another_order_each_time_with_no_garbage_left():
    from benchmarks import harness

    class Cycle:
        def __init__(self):
            self.self = self

    order = []
    garbage = None
    with harness._long_lived():
        for name in harness._in_turns(dict.fromkeys("abcd"), 12):
            assert garbage is None or garbage() is None
            garbage = weakref.ref(Cycle())
            order.append(name)
    rounds = ["".join(order[start : start + 4]) for start in range(0, 48, 4)]
    assert all(sorted(each) == list("abcd") for each in rounds)
    assert len(set(rounds)) > 5


def test_the_fastest_batch_counts(monkeypatch):
    from benchmarks import harness

    took = iter([500, 900, 200, 600, 300, 1200])  # the bare call and the subject, in three rounds
    monkeypatch.setattr(harness, "_calibrate", lambda call, batch: 10)
    monkeypatch.setattr(harness, "_in_turns", lambda ready, rounds: list(ready) * rounds)
    monkeypatch.setattr(harness, "_batch", lambda call, times: next(took))
    bare, ours = harness.measure(a_case({"resilient": through}), rounds=3)
    assert (bare.ns, ours.ns, ours.ratio) == (20.0, 60.0, 3.0)


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_the_garbage_collector_is_off_in_a_batch_only(colour):
    from benchmarks import harness

    def function():
        assert not gc.isenabled()

    async def afunction():
        function()

    if colour == "sync":
        harness._batch(function, 3)
    else:
        asyncio.run(harness._abatch(afunction, 3))
    assert gc.isenabled()


@pytest.mark.parametrize("name", ["retries", "opens", "limits", "bounds", "falls_back", "caches", "stacks"])
def test_a_guard_that_does_nothing_fails_the_check(name):
    from benchmarks import checks

    with pytest.raises((AssertionError, checks.Failure, RecursionError)):
        asyncio.run(getattr(checks, name)(lambda function, **_options: through(function), "sync"))


def test_our_own_subjects_pass_their_checks():
    from benchmarks import cases
    from benchmarks.harness import OURS

    for case in cases.CASES:
        if case.name != "Timeout":  # its check really waits
            asyncio.run(case.check(case.subjects[OURS], case.colour))


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_our_own_transports_pass_their_checks(package, colour):
    from benchmarks import clients
    from benchmarks.harness import OURS

    cases = [case for case in clients.cases_of(package) if case.colour == colour]
    assert len(cases) == 3
    for case in cases:
        for name in (OURS, "by hand (retry)"):
            with virtual_time():
                testing.run(lambda case=case, name=name: case.check(case.subjects[name], colour))


@pytest.mark.parametrize("check", ["retries", "retries_or_opens"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_a_transport_without_a_guard_fails_the_check(check, colour):
    from benchmarks import clients

    with pytest.raises(AssertionError):
        asyncio.run(getattr(clients, check)("httpx", lambda transport, colour: transport, colour))


@pytest.mark.parametrize("package", ["httpx", "httpx2"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_requests_to_the_mock_are_measured(package, colour):
    from benchmarks import clients

    for case in clients.cases_of(package):
        if case.colour == colour:
            alone = case.subjects.get(clients.ALONE) or case.subjects["resilient"]
            rows = measured(replace(case, subjects={"alone": alone}, rival=None))
            assert [row.subject for row in rows] == [case.unit, "alone"]
            assert all(row.ns for row in rows)


def test_one_retry_is_measured_on_requests_that_fail_once():
    from benchmarks import clients

    (case,) = (case for case in clients.cases_of("httpx") if case.name.endswith("retry") and case.colour == "sync")
    call = case.prepare(lambda transport, colour: transport, "sync")
    assert [call() for _ in range(4)] == [503, 200, 503, 200]


class Sends:
    """A transport that sends a request so often, and gives up as it is told."""

    def __init__(self, transport, times, error=None):
        self.transport = transport
        self.times = times
        self.error = error

    def handle_request(self, request):
        for _ in range(self.times):
            response = self.transport.handle_request(request)
            if response.status_code == 200:
                return response
        if self.error is not None:
            raise self.error
        return response

    def __enter__(self):
        return self


@pytest.mark.parametrize(
    ("times", "error", "reason"),
    [
        (2, None, "ended with 503 after 2 attempts instead of 3"),
        (4, None, "gave up with 503 after 4 attempts instead of 3"),
        (3, OSError("down"), r"gave up with OSError\('down'\) after 3 attempts instead of 3"),
    ],
)
def test_a_retry_of_requests_has_to_be_exact(times, error, reason):
    from benchmarks import clients

    with pytest.raises(AssertionError, match=reason):
        asyncio.run(clients.retries("httpx", lambda transport, colour: Sends(transport, times, error), "sync"))


@pytest.mark.parametrize("case", ["Sockets, requests", "Sockets, retries over one connection"])
@pytest.mark.parametrize("colour", ["sync", "async"])
def test_clients_are_measured_over_sockets(monkeypatch, case, colour):
    from benchmarks import sockets

    monkeypatch.setattr(sockets, "WARM_UP", 1)
    monkeypatch.setattr(sockets, "TURN", 5)
    found = sockets.measure_here(case, "httpx", colour, 10)
    assert found["per_second"] > 0
    assert ("ratio" in found) == (case == sockets.REQUESTS)
    assert (found["connections"], found["sockets"], found["tasks"]) == (1, 0, 0)


def test_what_a_client_leaves_behind_is_counted(monkeypatch):
    from benchmarks import sockets

    monkeypatch.setattr(sockets, "WARM_UP", 0)
    monkeypatch.setattr(sockets, "TURN", 1)
    kept = []

    def leaking(url):
        kept.append(socket.socket())
        kept.append([0] * 50)
        thread = threading.Thread(target=done.wait)
        thread.start()
        kept.append(thread)
        return SimpleNamespace(status_code=200)

    done = threading.Event()
    with asyncio.Runner() as runner:
        _, grown = sockets._Clients("httpx", "sync", runner).turns("http://localhost/", 3, leaking)
    done.set()
    for each in kept:
        if isinstance(each, threading.Thread):
            each.join()
        elif isinstance(each, socket.socket):
            each.close()
    assert (grown["sockets"], grown["tasks"]) == (3, 3)
    assert grown["blocks"] > 3


def test_requests_over_sockets_have_to_succeed():
    from benchmarks import sockets

    with asyncio.Runner() as runner, pytest.raises(AssertionError, match=r"answered with \{503\}"):
        sockets._Clients("httpx", "sync", runner).turn(lambda url: SimpleNamespace(status_code=503), "")


def test_a_client_that_cannot_be_measured_over_sockets_stays_in_the_table():
    from benchmarks import report, sockets

    row = sockets._row(sockets.SocketRow(sockets.REQUESTS, "httpx3", "sync", 10, target=0.95))
    assert row.note == "not measured: ModuleNotFoundError: No module named 'httpx3'"
    assert row.met is None
    assert row.note in report.as_table([], [], 1, [row])


def socket_row(**changes):
    from benchmarks.sockets import REQUESTS, SocketRow

    good = {"per_second": 1234.5, "ratio": 0.97, "target": 0.95}
    good |= {"connections": 1, "sockets": 0, "tasks": 0, "blocks": 12}
    return SocketRow(REQUESTS, "httpx", "async", 10_000, **(good | changes))


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"ratio": 0.94}, False),
        ({"ratio": None, "target": None}, True),
        ({"connections": 2}, False),
        ({"sockets": 1}, False),
        ({"tasks": 1}, False),
        ({"blocks": 10_000}, False),
    ],
)
def test_over_sockets_the_target_is_speed_and_no_leak(changes, met):
    assert socket_row(**changes).met is met


def test_the_table_shows_what_was_left_behind():
    from benchmarks import report

    rows = [socket_row(), replace(socket_row(sockets=3), colour="sync"), socket_row(ratio=None, target=None)]
    table = report.as_table([], [], 1, rows)
    first, second, third, _, summary = table.splitlines()[3:]
    assert " ".join(first.split()) == (
        "httpx, async 1,234 0.970 >= 0.95, no leak met "
        "connections: 1; grown by 0 sockets, 0 tasks, 12 blocks of memory"
    )
    assert ">= 0.95, no leak MISSED connections: 1; grown by 3 sockets, 0 threads" in second
    assert " ".join(third.split()).startswith("httpx, async 1,234 - no leak met ")
    assert summary == "2 of 3 targets met; not: Sockets, requests, httpx, sync"


def memory_rows():
    from benchmarks.memory import MemoryRow

    return [
        MemoryRow("RateLimit memory", "resilient", 1000, 83.4, 120.0),
        MemoryRow("RateLimit memory", "other", 1000, 348.0),
    ]


def test_the_table_shows_targets_and_a_summary():
    from benchmarks import report
    from benchmarks.harness import Row

    rows = [
        Row("Retry", "sync", "bare call", 20.0, 1.0),
        Row("Retry", "sync", "a-slow", 2000.0, 100.0),
        Row("Retry", "sync", "fast", 100.0, 5.0),
        Row("Retry", "sync", "resilient", 200.0, 10.0, 12.0),
        Row("Cache hit", "async", "resilient", 900.0, 9.0, 8.0),
    ]
    lines = [line.split() for line in report.as_table(rows, memory_rows(), 2).splitlines()]
    subjects = ["bare", "resilient", "fast", "a-slow"]
    assert [line[0] for line in lines[3:7]] == subjects, "ours first, then from fast to slow"
    assert lines[4] == ["resilient", "200", "10.0", "<=", "12", "met"]
    assert ["resilient", "900", "9.0", "<=", "8", "MISSED"] in lines
    assert ["resilient", "83", "<=", "120", "met"] in lines
    assert " ".join(lines[-1]) == "2 of 3 targets met; not: Cache hit, async"


def test_the_table_shows_what_is_nearly_equal_in_more_digits():
    from benchmarks import report
    from benchmarks.harness import Row

    rows = [
        Row("GET", "sync", "bare client", 60_000.0, 1.0),
        Row("GET", "sync", "resilient", 65_160.0, 1.086, 1.1, "", 1.0412),
        Row("GET", "sync", "peer", 62_472.0, 1.0412),
    ]
    lines = [" ".join(line.split()) for line in report.as_table(rows, [], 2).splitlines()]
    assert lines[3:6] == [
        "bare client 60,000 1.000",
        "resilient 65,160 1.086 <= 1.1, < 1.041 MISSED",
        "peer 62,472 1.041",
    ]


def test_the_data_says_the_same():
    from benchmarks import report

    rows = measured(a_case({"resilient": through, "peer": missing}, target=0.0))
    data = json.loads(report.as_json(rows, memory_rows(), 2))
    assert set(data) == {"python", "rounds", "rows", "memory", "sockets", "servers"}
    assert data["rounds"] == 2
    for row in data["rows"]:
        assert set(row) == {"case", "colour", "subject", "ns", "ratio", "target", "met", "note", "to_beat"}
    assert [row["met"] for row in data["rows"]] == [None, False, None]
    assert data["memory"][0] == {
        "case": "RateLimit memory",
        "subject": "resilient",
        "keys": 1000,
        "bytes_per_key": 83.4,
        "target": 120.0,
        "met": True,
        "note": "",
    }


@pytest.mark.parametrize("subject", ["resilient", "by hand: a dict of floats"])
def test_memory_is_counted_per_key(subject):
    from benchmarks import memory

    assert memory.bytes_per_key(subject, 2000) > 0


def test_a_limiter_that_cannot_be_measured_stays_in_the_table():
    from benchmarks import memory

    row = memory._row("no such limiter", 10)
    assert row.bytes_per_key is None
    assert row.note == "not measured: KeyError: 'no such limiter'"


def trivial_command(monkeypatch, cases_found=(), clients_found=()):
    from benchmarks import __main__, asgi, cases, clients, memory, sockets

    monkeypatch.setattr(__main__, "ROUNDS", 5)
    monkeypatch.setattr(asgi, "CASES", [])
    monkeypatch.setattr(cases, "CASES", list(cases_found))
    monkeypatch.setattr(clients, "CASES", list(clients_found))
    asked = []
    monkeypatch.setattr(memory, "measure", lambda keys: asked.append(keys) or memory_rows())
    monkeypatch.setattr(
        sockets, "measure", lambda case, requests: asked.append((case, requests)) or [socket_row()]
    )
    monkeypatch.setattr(__main__, "SERVERS", {"Overload": lambda quick: asked.append(quick) or []})
    return __main__.main, asked


def test_the_command_prints_data(monkeypatch, capsys):
    main, asked = trivial_command(
        monkeypatch, [a_case({"resilient": through})], [a_case({}, "async"), a_case({}, rounds=3)]
    )
    assert main(["--quick", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rounds"] == 1
    assert [row["subject"] for row in data["rows"]] == ["bare call", "resilient", "bare call", "bare call"]
    assert len(data["memory"]) == 2
    assert [row["met"] for row in data["sockets"]] == [True, True]
    assert data["servers"] == []
    assert asked == [50_000, ("Sockets, requests", 2000), ("Sockets, retries over one connection", 2000), True]


def test_a_case_can_ask_for_more_rounds(monkeypatch, capsys):
    from benchmarks import harness

    main, _ = trivial_command(monkeypatch, [a_case({}), a_case({}, rounds=3)])
    asked = []
    monkeypatch.setattr(harness, "measure", lambda case, rounds: asked.append(rounds) or [])
    assert main(["--only", "trivial"]) == 0
    assert asked == [5, 15]


def test_the_command_runs_only_the_named_cases(monkeypatch, capsys):
    main, asked = trivial_command(monkeypatch, [a_case({"resilient": through})])
    assert main(["--quick", "--only", "TRIV"]) == 0
    assert "trivial, sync" in capsys.readouterr().out
    assert not asked
    assert main(["--only", "sockets, req"]) == 0
    assert main(["--only", "overload"]) == 0
    assert asked == [("Sockets, requests", 10_000), False]
    with pytest.raises(SystemExit):
        main(["--only", "nonsense"])
    assert (
        "no case is called 'nonsense'; there are Overload, RateLimit memory, Sockets, requests, "
        "Sockets, retries over one connection, trivial"
    ) in capsys.readouterr().err
