"""The benchmark's method and its report, on trivial subjects; no time is asserted anywhere."""

import asyncio
import gc
import json
from pathlib import Path

import pytest

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
    assert order == ["a", "b"] * 5, "prepared, calibrated, and three rounds"


def test_the_fastest_batch_counts(monkeypatch):
    from benchmarks import harness

    took = iter([500, 900, 200, 600, 300, 1200])  # the bare call and the subject, in three rounds
    monkeypatch.setattr(harness, "_calibrate", lambda call, batch: 10)
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


def test_the_data_says_the_same():
    from benchmarks import report

    rows = measured(a_case({"resilient": through, "peer": missing}, target=0.0))
    data = json.loads(report.as_json(rows, memory_rows(), 2))
    assert set(data) == {"python", "rounds", "rows", "memory"}
    assert data["rounds"] == 2
    for row in data["rows"]:
        assert set(row) == {"case", "colour", "subject", "ns", "ratio", "target", "met", "note"}
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


def test_the_command_prints_data(monkeypatch, capsys):
    from benchmarks import __main__, cases, memory

    monkeypatch.setattr(__main__, "ROUNDS", 5)
    monkeypatch.setattr(cases, "CASES", [a_case({"resilient": through}), a_case({}, "async")])
    monkeypatch.setattr(memory, "measure", lambda keys: memory_rows())
    assert __main__.main(["--quick", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["rounds"] == 1
    assert [row["subject"] for row in data["rows"]] == ["bare call", "resilient", "bare call"]
    assert len(data["memory"]) == 2


def test_the_command_runs_only_the_named_cases(monkeypatch, capsys):
    from benchmarks import __main__, cases, memory

    monkeypatch.setattr(__main__, "ROUNDS", 5)
    monkeypatch.setattr(cases, "CASES", [a_case({"resilient": through})])
    monkeypatch.setattr(memory, "measure", lambda keys: pytest.fail("not asked for"))
    assert __main__.main(["--quick", "--only", "TRIV"]) == 0
    assert "trivial, sync" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        __main__.main(["--only", "nonsense"])
    assert "no case is called 'nonsense'; there are RateLimit memory, trivial" in capsys.readouterr().err
