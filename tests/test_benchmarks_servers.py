"""The benchmarks of the middleware and of servers under it, with little load; no time is asserted anywhere."""

import asyncio
import json
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from resilient import runtime, testing

ROOT = Path(__file__).parents[1]
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


# -- the middleware in process --------------------------------------------------------------------------------


def test_our_own_applications_pass_their_check():
    from benchmarks import asgi

    for name in ("resilient", "resilient, preset", "resilient, RateLimit alone", "by hand"):
        asyncio.run(asgi.limits(asgi.SUBJECTS[name], "async"))


def never_refuses(limit=""):
    from benchmarks import asgi

    return asgi.resilient_guard()


def unguarded(limit=""):
    from benchmarks import asgi

    return asgi.bare()


def limits_all_together(limit=""):
    from benchmarks import asgi
    from resilient import RateLimit
    from resilient.asgi import ResilienceMiddleware

    return ResilienceMiddleware(asgi.bare(), pipeline=RateLimit(limit))


def refuses_all(limit=""):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 503, "headers": []})

    return app


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (refuses_all, "answered the first request with 503"),
        (unguarded, "does not tell its limit"),
        (never_refuses, r"answered with \[200, 200, 200\] after 1 of 2 requests"),
        (limits_all_together, "answered another client with 429"),
    ],
)
def test_an_application_has_to_limit_before_it_is_measured(make, reason):
    from benchmarks import asgi

    with pytest.raises(AssertionError, match=reason):
        asyncio.run(asgi.limits(make, "async"))


def test_what_the_middleware_adds_is_measured():
    from benchmarks import asgi, harness

    (case,) = asgi.CASES
    case = replace(case, subjects={"resilient": case.subjects["resilient"]})
    rows = asgi.compared(harness.measure(case, rounds=1, batch=20_000))
    assert [row.subject for row in rows] == ["bare app", "resilient"]
    assert rows[0].added is None
    assert rows[1].added == rows[1].ratio - 1
    assert rows[1].share is None


def test_the_guard_by_hand_is_a_bulkhead_and_a_timeout_too():
    from benchmarks import asgi

    async def app(scope, receive, send):
        await asyncio.sleep(60)

    guard = asgi._ByHand(app, 1000)

    async def main():
        return await asgi.requests_to(guard)(), runtime.now()

    assert testing.run(main) == (503, 10)
    guard.running = 200
    assert asyncio.run(asgi.requests_to(guard)()) == 503


def asgi_rows(ratio=1.4, decorator=2.5):
    from benchmarks.harness import Row

    return [
        Row("ASGI request", "async", "bare app", 10.0, 1.0),
        Row("ASGI request", "async", "resilient", 10.0 * ratio, ratio, 1.5, "a note"),
        Row("ASGI request", "async", "slowapi (decorator)", 25.0, decorator),
        Row("ASGI request", "async", "slowapi (middleware)", 60.0, 6.0),
    ]


@pytest.mark.parametrize(
    ("ratio", "decorator", "met"),
    [(1.4, 2.5, True), (1.4, 2.0, False), (1.6, 2.9, False), (1.4, None, True), (None, 2.5, None)],
)
def test_the_targets_are_of_a_request_and_of_what_slowapi_adds(ratio, decorator, met):
    from benchmarks import asgi

    bare, ours, theirs, _middleware = asgi_rows()
    rows = asgi.compared([bare, replace(ours, ratio=ratio), replace(theirs, ratio=decorator)])
    assert [row.met for row in rows] == [None, met, None]


def test_the_table_says_what_is_added():
    from benchmarks import asgi, report

    table = report.as_table(asgi.compared(asgi_rows()), [], 1).splitlines()
    assert " ".join(table[4].split()) == (
        "resilient 14 1.400 <= 1.5, share <= 0.33 met adds 0.40 of a request, 0.27 of what slowapi adds; a note"
    )
    alone = report.as_table(asgi.compared(asgi_rows()[:2]), [], 1).splitlines()
    assert alone[4].endswith("adds 0.40 of a request; a note")


def test_rows_of_other_cases_stay_as_they_are():
    from benchmarks import asgi
    from benchmarks.harness import Row

    rows = [Row("Retry", "sync", "bare call", 10.0, 1.0)]
    assert asgi.compared(rows) == rows


# -- load -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("received", "answer"),
    [
        (OK, (200, b"ok")),
        (BUSY, (503, b"")),
        (OK[:-1], None),
        (OK[:30], None),
        (b"", None),
        (b"HTTP/1.1 200 OK\r\n\r\n", None),
    ],
)
def test_a_response_is_read_when_it_is_complete(received, answer):
    from benchmarks import load

    assert load.parse(received) == answer


class Server:
    """Answers requests one after the other; None closes the connection, and `b""` is no answer."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.accepted = 0
        self.asked = []

    async def handle(self, reader, writer):
        self.accepted += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked.append(head.split()[1].decode())
                answer = self.answers.pop(0) if self.answers else OK
                if answer is None:
                    break
                writer.write(answer[:10])
                await writer.drain()
                writer.write(answer[10:])
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def start(self):
        return await asyncio.start_server(self.handle, "127.0.0.1", 0)

    @contextmanager
    def in_a_thread(self):
        started, ports, loop = threading.Event(), [], asyncio.new_event_loop()

        async def run():
            async with await self.start() as server:
                ports.append(server.sockets[0].getsockname()[1])
                started.set()
                await ended.wait()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()

        ended = asyncio.Event()
        thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
        thread.start()
        started.wait()
        try:
            yield ports[0]
        finally:
            loop.call_soon_threadsafe(ended.set)
            thread.join()
            loop.close()


def test_a_closed_loop_keeps_its_connections_busy():
    from benchmarks import load

    server = Server()
    with server.in_a_thread() as port, load.ClosedLoop(port, 3) as loop:
        assert loop.run(10) > 0
        assert loop.run(2) > 0
        assert loop.ask("/cpu") == b"ok"
    assert server.accepted == 3
    assert server.asked == ["/"] * 12 + ["/cpu"]


@pytest.mark.parametrize(
    ("answer", "reason"), [(BUSY, "answered with 503"), (None, "the server has closed the connection")]
)
def test_a_closed_loop_takes_nothing_but_200(answer, reason):
    from benchmarks import load

    with (
        Server(OK, answer).in_a_thread() as port,
        load.ClosedLoop(port, 1) as loop,
        pytest.raises(ConnectionError, match=reason),
    ):
        loop.run(5)


def test_the_requests_of_an_open_loop_come_at_a_rate():
    from benchmarks import load

    async def main():
        server = Server()
        async with await server.start() as its:
            port = its.sockets[0].getsockname()[1]
            outcomes = await load.open_loop(port, rate=400, seconds=0.1, patience=30, path="/x", seed=1)
        assert {each.result for each in outcomes} == {"200"}
        assert all(each.good and 0 <= each.due < 0.1 for each in outcomes)
        assert server.asked == ["/x"] * len(outcomes)
        assert 10 < len(outcomes) < 100

    asyncio.run(main())


def test_what_becomes_of_a_request_is_told():
    from benchmarks import load

    async def main():
        server = Server(OK, BUSY, None, OK)
        its = await server.start()
        clients = load._Clients(its.sockets[0].getsockname()[1], "/", 30)
        for _ in range(4):
            await clients.request(0.0)
        assert server.accepted == 2, "one connection until it is closed"
        clients.idle[0].reusable = False
        await clients.request(0.0)
        assert server.accepted == 3
        server.answers = [b""]
        clients.patience = 0.05
        clients.started = clients.now()
        (connection,) = clients.idle
        await clients.request(0.0)
        assert clients.idle == []
        assert connection.transport.is_closing(), "who gives up closes the connection"
        clients.patience = 30
        its.close()  # and not wait for it: from 3.12 on that waits for all connections to end
        await clients.request(0.0)
        results = [each.result for each in clients.outcomes]
        assert results == ["200", "503", "ConnectionError", "200", "200", load.LATE, "ConnectionRefusedError"]
        assert [each.good for each in clients.outcomes] == [True, False, False, True, True, False, False]

    asyncio.run(main())


def test_what_comes_after_an_answer_is_nobodys():
    from benchmarks import load

    async def main():
        async with await Server().start() as its:
            clients = load._Clients(its.sockets[0].getsockname()[1], "/", 30)
            connection = await clients.connect()
            asking = asyncio.create_task(connection.ask("/"))
            await asyncio.sleep(0)
            answered, broken = connection.answered, connection.broken
            assert await asking == (200, b"ok")
            answered((500, b""))
            broken()
            connection.transport.abort()

    asyncio.run(main())


# -- servers --------------------------------------------------------------------------------------------------


def test_uvicorn_is_measured_bare_and_guarded(monkeypatch):
    from benchmarks import report, servers

    names = ("bare app", "resilient")
    monkeypatch.setattr(servers, "SUBJECTS", {name: servers.SUBJECTS[name] for name in names})
    monkeypatch.setattr(servers, "TURN", 20)
    monkeypatch.setattr(servers, "CONNECTIONS", 2)
    rows = servers.measure(50)
    assert [(row.subject, row.requests, row.note) for row in rows] == [(name, 40, "") for name in names]
    assert rows[0].ratio == 1.0
    assert all(row.per_second > 0 and row.cpu > 0 for row in rows)
    assert rows[1].target == 0.95
    assert "of the processor for a request, +0%" in report.as_table([], [], 1, [], rows)


def test_who_is_missing_or_does_not_limit_is_not_measured():
    from benchmarks import servers

    def missing(limit=""):
        raise ImportError("No module named 'peer'")

    subjects = {"bare app": unguarded, "peer": missing, "other": unguarded}
    assert servers.faults(subjects) == {
        "peer": "not measured: ImportError: No module named 'peer'",
        "other": "not measured: AssertionError: does not tell its limit",
    }


def test_a_server_that_does_not_start_leaves_all_unmeasured(monkeypatch):
    from benchmarks import report, servers

    monkeypatch.setattr(servers, "SUBJECTS", {"bare app": unguarded, "no such subject": never_refuses})
    monkeypatch.setattr(servers, "faults", lambda subjects: {})
    rows = servers.measure(10)
    assert {row.note for row in rows} == {"not measured: RuntimeError: the server did not start"}
    assert [row.met for row in rows] == [None, None]
    assert report.as_table([], [], 1, [], rows).count("did not start") == 2


def test_the_unit_is_the_bare_turn_of_the_same_round(monkeypatch):
    from benchmarks import servers

    monkeypatch.setattr(servers, "TURN", 10)
    seconds = {"bare app": [1.0, 2.0, 4.0], "resilient": [2.0, 2.5, 8.0]}
    cpu = {"bare app": [0.001, 0.002, 0.003], "resilient": [0.002, 0.003, 0.004]}
    row = servers._row("resilient", 30, seconds, cpu, "")
    assert (row.ratio, row.per_second, row.cpu, row.added_cpu) == (0.5, 4.0, 300.0, 0.5)


def server_row(**changes):
    from benchmarks.servers import ServerRow

    good = {"per_second": 9600.0, "ratio": 0.96, "target": 0.95, "cpu": 52.0, "added_cpu": 0.041}
    return ServerRow("ASGI under uvicorn", "resilient", 1000, **(good | changes))


@pytest.mark.parametrize(
    ("changes", "met"), [({}, True), ({"ratio": 0.94}, False), ({"ratio": None}, None), ({"target": None}, None)]
)
def test_under_uvicorn_the_target_is_throughput(changes, met):
    assert server_row(**changes).met is met


# -- overload -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subject", "statuses", "took"), [("bare app", {200: 20}, 0.12), ("resilient", {200: 12, 503: 8}, 0.08)]
)
def test_the_bare_app_lets_all_wait_and_the_guarded_one_refuses(subject, statuses, took):
    from benchmarks import asgi, overload

    async def main():
        app = overload.APPS[subject]()
        answers = await asyncio.gather(*(asgi.requests_to(app)() for _ in range(20)))
        assert {status: answers.count(status) for status in sorted(set(answers))} == statuses
        return runtime.now()

    assert testing.run(main) == pytest.approx(took)


def test_a_server_is_measured_under_overload(monkeypatch):
    from benchmarks import overload

    monkeypatch.setattr(overload, "APPS", {"resilient": overload.guarded})
    (row,) = overload.measure(0.2)
    assert row.note == ""
    assert (row.case, row.subject, row.seconds) == ("Overload", "resilient", 0.2)
    assert row.requests > 30
    assert row.met in {True, False}, "it was measured; what came out depends on the machine"


def test_a_server_that_does_not_start_is_not_measured(monkeypatch):
    from benchmarks import overload, report

    monkeypatch.setattr(overload, "APPS", {"no such app": overload.bare})
    (row,) = overload.measure(0.1)
    assert row.note == "not measured: RuntimeError: the server did not start"
    assert row.note in report.as_table([], [], 1, [], [row])


def test_goodput_is_what_comes_in_time():
    from benchmarks import load, overload

    good = [load.Outcome(number / 100, 0.1, "200") for number in range(100)]
    others = [load.Outcome(0.5, 0.1, "503"), load.Outcome(0.5, 1.0, load.LATE)]
    assert overload.goodput([*good, *others], 0.0, 1.0) == 90 / overload.CAPACITY
    assert overload.goodput(good, 0.5, 1.0) == 100 / overload.CAPACITY


def test_the_p99_is_of_good_answers():
    from benchmarks import load, overload

    outcomes = [load.Outcome(0.0, number / 1000, "200") for number in range(1, 201)]
    assert overload.p99([*outcomes, load.Outcome(0.0, 9.0, "503")]) == 0.198
    assert overload.p99([load.Outcome(0.0, 9.0, "late")]) is None


def test_the_memory_of_a_process_is_told_where_it_can_be():
    from benchmarks import overload

    assert overload.memory_of(-1) is None
    if Path("/proc/self/status").exists():
        assert overload.memory_of(os.getpid()) > 1_000_000


def overload_row(**changes):
    from benchmarks.overload import OverloadRow

    good = {"requests": 12000, "goodput": 0.95, "at_the_end": 0.96, "refused": 8000, "late": 0}
    good |= {"unloaded_p99": 0.042, "p99": 0.07, "grown": 100_000}
    return OverloadRow("Overload", **({"subject": "resilient", "seconds": 20.0} | good | changes))


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"goodput": 0.89}, False),
        ({"p99": 0.09}, False),
        ({"p99": None}, False),
        ({"unloaded_p99": None}, False),
        ({"grown": 20_000_000}, False),
        ({"grown": None}, True),
        ({"goodput": None}, None),
        ({"subject": "bare app"}, None),
    ],
)
def test_under_overload_the_target_is_goodput_in_time_without_growth(changes, met):
    assert overload_row(**changes).met is met


def test_the_table_shows_the_overload():
    from benchmarks import report

    bare = overload_row(subject="bare app", goodput=0.06, at_the_end=0.0, p99=None, grown=None)
    table = report.as_table([], [], 1, [], [bare, overload_row()])
    heading, first, second, _, summary = table.splitlines()[2:]
    assert " ".join(heading.split()) == "Overload, 3 times, 20 s goodput x p99 target"
    assert " ".join(first.split()) == (
        "bare app 6.0% - second half 0.0%; p99 42 ms and -; of 12,000 requests 8,000 refused, 0 given up"
    )
    assert " ".join(second.split()) == (
        "resilient 95.0% 1.67 >= 90%, <= 2, flat met second half 96.0%; p99 42 ms and 70 ms; "
        "of 12,000 requests 8,000 refused, 0 given up; grown by 0.1 MB"
    )
    assert summary == "1 of 1 targets met"


# -- a flood of clients ---------------------------------------------------------------------------------------


def test_a_flood_of_clients_is_measured():
    from benchmarks import flood, report

    (row,) = flood.measure(1000)
    assert (row.keys, row.max_keys, row.tries, row.note) == (1000, 100, 10, "")
    assert row.remembered <= 101
    assert row.admitted <= row.allowed
    assert "who had used up his limit: admitted" in report.as_table([], [], 1, [], [row])


def test_a_flood_counts_those_who_find_no_room():
    from benchmarks import flood

    found = asyncio.run(flood.flood(600, 50))
    assert found["remembered"] == 50
    assert found["at_the_cap"] > 0
    assert (found["tries"], found["refused"] > 0) == (6, True)
    assert 0 < found["allowed"] < flood.LIMIT, "what was left of his limit is used up before"


def test_a_flood_that_cannot_be_measured_stays_in_the_table():
    from benchmarks import flood, report

    (row,) = flood.measure(1)
    assert row.note.startswith("not measured: ValueError: RateLimit: max_keys=0")
    assert row.met is None
    assert row.note in report.as_table([], [], 1, [], [row])


@pytest.mark.parametrize(
    ("changes", "met"),
    [
        ({}, True),
        ({"remembered": 101}, False),
        ({"at_the_end": 2200}, False),
        ({"admitted": 4}, False),
        ({"remembered": None}, None),
    ],
)
def test_in_a_flood_the_target_is_bounded_memory_that_forgets_nobody(changes, met):
    from benchmarks.flood import FloodRow

    good = {"remembered": 100, "at_the_cap": 2000, "at_the_end": 2050, "tries": 10, "admitted": 3, "allowed": 3}
    assert FloodRow("ASGI flood of clients", "resilient", 1000, 100, **(good | changes)).met is met


# -- all of them ----------------------------------------------------------------------------------------------


def test_a_rolling_restart_is_in_the_table_and_in_the_data():
    from benchmarks import report
    from benchmarks.rolling_restart import WITH, WITHOUT, RestartRow

    rows = [RestartRow(WITH, 5000, {}, 2, 61.2), RestartRow(WITHOUT, 5000, {"502": 70, "no answer": 9}, 2, 99.9)]
    heading, first, second, _, summary = report.as_table([], [], 1, [], rows).splitlines()[2:]
    assert " ".join(heading.split()) == "Rolling restart, 5,000 requests failed target"
    assert " ".join(first.split()) == f"{WITH} 0 none met 2 restarts, p99 61 ms"
    assert " ".join(second.split()) == f"{WITHOUT} 79 2 restarts, p99 100 ms, 502: 70, no answer: 9"
    assert summary == "1 of 1 targets met"
    (ours, _) = json.loads(report.as_json([], [], 1, [], rows))["servers"]
    assert (ours["case"], ours["subject"], ours["met"]) == ("Rolling restart", WITH, True)


def test_missed_targets_of_servers_are_named():
    from benchmarks import report

    rows = [server_row(ratio=0.9), overload_row(goodput=0.5)]
    summary = report.as_table([], [], 1, [], rows).splitlines()[-1]
    assert summary == "0 of 2 targets met; not: ASGI under uvicorn; Overload"


@pytest.mark.parametrize("quick", [True, False])
def test_the_command_measures_servers_as_long_as_it_is_told(monkeypatch, quick):
    from benchmarks import __main__, flood, overload, rolling_restart, servers

    asked = []
    for module in (servers, overload, flood, rolling_restart):
        monkeypatch.setattr(module, "measure", lambda amount, module=module: asked.append((module.CASE, amount)))
    for measure in __main__.SERVERS.values():
        measure(quick)
    assert asked == [
        ("ASGI under uvicorn", 12_000 if quick else 60_000),
        ("Overload", 5.0 if quick else 20.0),
        ("ASGI flood of clients", 200_000 if quick else 1_000_000),
        ("Rolling restart", 1000 if quick else 5000),
    ]
