import asyncio
import functools
import json
import logging
import threading

import anyio
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route

from resilient import Bulkhead, CircuitBreaker, Pipeline, Retry, runtime
from resilient.asgi.drain import Drain
from resilient.asgi.health import Health
from resilient.testing import run, virtual_time

both = pytest.mark.parametrize("backend", ["asyncio", "trio"])


class Answer:
    def __init__(self, sent):
        start, body = sent
        assert (start["type"], body["type"]) == ("http.response.start", "http.response.body")
        assert not body.get("more_body")
        self.status = start["status"]
        self.headers = dict(start["headers"])
        self.body = body["body"].decode()

    @property
    def seen(self):
        return self.status, self.body


async def ask(app, path="/readyz", method="GET", root_path=""):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    scope = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": []}
    await app({**scope, "query_string": b"", "http_version": "1.1", "scheme": "http"}, receive, send)
    return Answer(sent)


def asked(app, *args, backend="asyncio", **kwargs):
    return run(functools.partial(ask, app, *args, **kwargs), backend=backend)


def asked_in_real_time(app, *args):
    """For sync checks: virtual time would not wait for their threads."""
    return anyio.run(ask, app, *args)


# -- HTTP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz"])
@pytest.mark.parametrize(
    ("form", "media_type", "body"),
    [
        ("plain", b"text/plain; charset=utf-8", "pass"),
        ("json", b"application/json", '{"status": "pass"}'),
        ("health+json", b"application/health+json", '{"status": "pass"}'),
    ],
)
def test_all_is_well(path, form, media_type, body):
    answer = asked(Health(format=form), path)
    assert answer.seen == (200, body)
    assert answer.headers == {
        b"content-type": media_type,
        b"content-length": str(len(body)).encode(),
        b"cache-control": b"no-store",
    }


def test_head():
    answer = asked(Health(), method="HEAD")
    assert answer.seen == (200, "")
    assert answer.headers[b"content-length"] == b"4"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods(method):
    answer = asked(Health(), "/livez", method)
    assert answer.status == 405
    assert answer.headers[b"allow"] == b"GET, HEAD"
    assert answer.headers[b"cache-control"] == b"no-store"


@pytest.mark.parametrize("path", ["/", "/live", "/livez/", "/readyz/x", ""])
def test_other_paths(path):
    health = Health()
    assert asked(health, path).seen == (404, "not found")
    assert not health.handles({"type": "http", "path": path})


def test_what_it_handles():
    health = Health(paths={"live": "/alive", "startup": None})
    assert health.paths == {"live": "/alive", "ready": "/readyz", "startup": None}
    for path, root, handled in (
        ("/alive", "", True),
        ("/readyz", "", True),
        ("/livez", "", False),
        ("/startupz", "", False),
        ("/api/alive", "/api", True),
        ("/api/alive", "/api/", True),
        ("/alive", "/api", True),  # a server that knows its root path, but is asked without
        ("/api/alive", "", False),
        ("/apialive", "/api", False),
        ("/alive", "/alive", True),
    ):
        scope = {"type": "http", "path": path, "root_path": root, "method": "POST"}
        assert health.handles(scope) is handled, (path, root)
        assert (asked(health, path, root_path=root).status == 200) is handled
    assert health.handles({"type": "http", "path": "/alive"})
    assert not health.handles({"type": "websocket", "path": "/alive"})
    assert not health.handles({"type": "lifespan"})


@pytest.mark.parametrize("root", ["", "/api"])
def test_mounted_at_the_path_of_a_probe(root):
    app = Starlette(routes=[Mount("/livez", Health()), Mount("/health", Health(paths={"live": "/"}))])
    for path, status in (("/livez/", 200), ("/livez/x", 404), ("/health/", 200), ("/health/readyz", 200)):
        assert asked(app, root + path, root_path=root).status == status
    assert asked(Health(), "/", root_path=root).status == 404


def test_in_starlette():
    health = Health()
    app = Starlette(routes=[Route("/readyz", health), Mount("/health", health)])
    for path, status in (("/readyz", 200), ("/health/livez", 200), ("/health/x", 404), ("/livez", 404)):
        assert asked(app, path).status == status
    assert asked(app, "/readyz", "HEAD").seen == (200, "")
    assert asked(app, "/readyz", "POST").status == 405


def test_a_websocket_is_closed():
    sent = []

    async def main():
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await Health()({"type": "websocket", "path": "/livez"}, receive, send)

    run(main)
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_the_lifespan():
    sent = []

    async def main():
        messages = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive():
            return {"type": next(messages)}

        async def send(message):
            sent.append(message["type"])

        await Health()({"type": "lifespan"}, receive, send)

    run(main)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# -- starting and ending ------------------------------------------------------------------------------------------


def test_an_app_that_goes_on_starting():
    health = Health(started=False, details=True)
    assert asked(health, "/livez").status == 200
    for path in ("/startupz", "/readyz"):
        assert asked(health, path).seen == (503, "fail\nstartup: fail: not started yet")
    health.mark_started()
    for path in ("/startupz", "/readyz"):
        assert asked(health, path).seen == (200, "pass")


def test_draining():
    drain = Drain(grace=5)
    calls = []
    health = Health(drain=drain, checks={"database": lambda: calls.append(1)}, format="json")
    with virtual_time() as clock:
        drain.enter()
        drain.begin()
        for state in ("grace", "draining"):
            answer = asyncio.run(ask(health))
            assert answer.status == 503
            assert json.loads(answer.body) == {
                "status": "fail",
                "checks": {"drain:state": {"status": "fail", "observedValue": state}},
            }
            for path in ("/livez", "/startupz"):
                assert asyncio.run(ask(health, path)).status == 200
            clock.sleep(5)
    assert not calls


# -- checks -------------------------------------------------------------------------------------------------------


async def well():
    return True


async def silent():
    pass


async def unwell():
    return False


async def broken():
    raise ConnectionRefusedError("password swordfish refused by 10.0.0.7")


async def hangs():
    await anyio.sleep_forever()


@both
@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (well, None),
        (silent, None),
        (functools.partial(well), None),
        (unwell, "returned False"),
        (broken, "ConnectionRefusedError: password swordfish refused by 10.0.0.7"),
        (hangs, "not done after 1 s"),
    ],
    ids=["true", "None", "partial", "false", "error", "hangs"],
)
def test_async_checks(check, reason, backend, caplog):
    for details in (False, True):
        answer = asked(Health(checks={"database": check}, details=details), backend=backend)
        status, word = (503, "fail") if reason else (200, "pass")
        line = f"\ndatabase: {word}" + (f": {reason}" if reason else "") if details else ""
        assert answer.seen == (status, word + line)
        assert asked(Health(checks={"database": check}), "/livez", backend=backend).status == 200


def raises(error):
    def check():
        raise error

    return check


def test_a_check_that_awaits_what_was_cancelled_fails():
    async def consumer():
        task = asyncio.ensure_future(asyncio.sleep(1))
        task.cancel()
        await task

    answer = asked(Health(checks={"consumer": consumer}, details=True))
    assert answer.seen == (503, "fail\nconsumer: fail: CancelledError: ")


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (lambda: 1, None),
        (lambda: None, None),
        (lambda: well(), None),  # noqa: PLW0108 - a sync function of an awaitable
        (lambda: unwell(), "returned False"),  # noqa: PLW0108
        (list, "returned []"),
        (raises(OSError("gone")), "OSError: gone"),
        (raises(SystemExit(3)), "RuntimeError: it raised SystemExit"),
    ],
    ids=["true", "None", "awaitable", "awaitable of false", "false", "error", "exit"],
)
def test_sync_checks_run_in_threads(check, reason):
    threads = []

    def observed():
        threads.append(threading.current_thread())
        return check()

    answer = asked_in_real_time(Health(checks={"database": observed}, details=True))
    expected = f"fail\ndatabase: fail: {reason}" if reason else "pass\ndatabase: pass"
    assert answer.seen == (503 if reason else 200, expected)
    assert threads[0] is not threading.current_thread()


def test_a_sync_check_that_hangs_holds_one_thread():
    release, calls, done = threading.Event(), [], threading.Event()

    def check():
        calls.append(1)
        release.wait()
        done.set()

    health = Health(checks={"database": check}, check_timeout=0.01, check_ttl=0.001, details=True)

    async def until(wanted):
        while wanted not in (await ask(health)).body:  # noqa: ASYNC110 - each probe asks anew
            await anyio.sleep(0.001)

    async def main():
        await until("not done after 0.01 s")
        await until("TimeoutError: an earlier run is not done yet")
        assert len(calls) == 1
        release.set()
        await until("database: pass")
        assert len(calls) > 1

    anyio.run(main)


@both
def test_checks_run_at_the_same_time_and_in_time(backend):
    async def slow():
        await anyio.sleep(0.7)

    health = Health(checks=dict.fromkeys("abc", slow) | {"d": hangs}, format="json")

    async def main():
        answer = await ask(health)
        assert runtime.now() == pytest.approx(1)
        return answer

    answer = run(main, backend=backend)
    assert json.loads(answer.body)["checks"] == {
        "a": {"status": "pass"},
        "b": {"status": "pass"},
        "c": {"status": "pass"},
        "d": {"status": "fail"},
    }


@both
def test_probes_do_not_hammer_a_dependency(backend):
    calls = []

    async def check():
        calls.append(runtime.now())
        await anyio.sleep(0.5)
        return len(calls) != 2

    health = Health(checks={"database": check})

    async def main():
        statuses = []

        async def probe(after):
            await anyio.sleep(after)
            statuses.append((await ask(health)).status)

        async with anyio.create_task_group() as group:
            for after in (0, 0.1, 0.4, 1.3, 2, 2.2, 4):
                group.start_soon(probe, after)
        return statuses

    assert run(main, backend=backend) == [200, 200, 200, 200, 503, 503, 200]
    assert calls == pytest.approx([0, 2, 4])


@both
def test_a_probe_that_is_cancelled_does_not_spoil_the_others(backend):
    async def check():
        await anyio.sleep(0.5)

    health = Health(checks={"database": check})

    async def main():
        async with anyio.create_task_group() as group:

            async def impatient():
                with anyio.move_on_after(0.2):
                    await ask(health)

            group.start_soon(impatient)
            await anyio.sleep(0.1)
            assert (await ask(health)).status == 200

    run(main, backend=backend)


def test_the_log_tells_of_changes(caplog):
    outcomes = iter([OSError("gone"), OSError("gone"), None, None, OSError("again")])

    async def check():
        if (error := next(outcomes)) is not None:
            raise error

    health = Health(checks={"database": check})

    async def main():
        for _ in range(5):
            await ask(health)
            await anyio.sleep(2)

    with caplog.at_level(logging.INFO, "resilient"):
        run(main)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "the health check 'database' fails: OSError: gone"),
        ("INFO", "the health check 'database' passes again"),
        ("WARNING", "the health check 'database' fails: OSError: again"),
    ]
    assert isinstance(caplog.records[0].exc_info[1], OSError)


# -- circuit breakers ---------------------------------------------------------------------------------------------


def test_an_open_breaker_is_a_warning():
    payments = CircuitBreaker(consecutive=1, name="payments")
    stock = CircuitBreaker(name="stock")
    health = Health(breakers=[Pipeline(Bulkhead(5), payments), stock], format="health+json", details=True)

    def checks(answer):
        return json.loads(answer.body)["checks"]

    closed = [{"status": "pass", "observedValue": "closed"}]
    answer = asked(health)
    assert checks(answer) == {"payments:circuit": closed, "stock:circuit": closed}
    payments.force_open()
    answer = asked(health)
    assert answer.status == 200
    assert json.loads(answer.body)["status"] == "warn"
    open_ = [{"status": "warn", "observedValue": "open", "output": "the circuit is open"}]
    assert checks(answer) == {"payments:circuit": open_, "stock:circuit": closed}
    assert asked(health, "/livez").body == asked(health, "/startupz").body == '{"status": "pass"}'
    assert asked(Health(breakers=payments)).seen == (200, "warn")
    payments.close()
    assert asked(Health(breakers=payments)).seen == (200, "pass")


def test_a_failing_check_outweighs_an_open_breaker():
    breaker = CircuitBreaker()
    breaker.isolate()
    health = Health(checks={"database": unwell, "cache": well}, breakers=breaker, details=True)
    assert asked(health).seen == (
        503,
        "fail\ndatabase: fail: returned False\ncache: pass\nbreaker-1:circuit: warn: the circuit is open",
    )


def test_names_of_breakers():
    same = CircuitBreaker(name="a")
    pipeline = Pipeline(CircuitBreaker(consecutive=7), same)
    health = Health(breakers=(pipeline, same, CircuitBreaker(name="a"), CircuitBreaker()), format="json")
    assert list(json.loads(asked(health).body)["checks"]) == [
        "breaker-1:circuit",
        "a:circuit",
        "a-3:circuit",
        "breaker-4:circuit",
    ]


def test_nothing_is_told_without_details():
    breaker = CircuitBreaker(consecutive=7)
    breaker.force_open()
    for form in ("plain", "json", "health+json"):
        answer = asked(Health(checks={"database": broken}, breakers=breaker, format=form))
        assert answer.status == 503
        assert not any(secret in answer.body for secret in ("swordfish", "Refused", "consecutive"))


# -- options ------------------------------------------------------------------------------------------------------


async def session():
    """Yield a session, as dependencies of FastAPI do, which is no check."""
    yield


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("checks", [well], TypeError),
        ("checks", {"": well}, TypeError),
        ("checks", {1: well}, TypeError),
        ("checks", {"database": 1}, TypeError),
        ("checks", {"database": Retry}, TypeError),
        ("checks", {"database": session}, TypeError),
        ("breakers", 1, TypeError),
        ("breakers", "abc", TypeError),
        ("breakers", [1], TypeError),
        ("breakers", Bulkhead(1), ValueError),
        ("breakers", [CircuitBreaker(), Pipeline()], ValueError),
        ("drain", 1, TypeError),
        ("started", None, TypeError),
        ("format", "xml", ValueError),
        ("format", ["json"], ValueError),
        ("paths", ["/livez"], TypeError),
        ("paths", {"live": 1}, TypeError),
        ("paths", {"live": "livez"}, ValueError),
        ("paths", {"live": "/readyz"}, ValueError),
        ("paths", {"alive": "/alive"}, ValueError),
        ("check_timeout", 0, ValueError),
        ("check_ttl", -1, ValueError),
        ("check_ttl", None, TypeError),
        ("details", 1, TypeError),
    ],
)
def test_bad_options(option, value, error):
    with pytest.raises(error) as raised:
        Health(**{option: value})
    assert str(raised.value).startswith(f"Health: {option}={value!r} is not allowed; give ")
