"""Health: tell probes whether the process lives, has started, and wants requests.

Three questions, because the wrong answer to each costs something else (Kubernetes, "Liveness, Readiness, and
Startup Probes"):

* live: shall the process be killed? Only if it cannot answer at all. A dependency that is down never is a reason:
  a restart does not heal it, and restarting everything at once makes one outage two.
* ready: shall it get requests? Not while it drains, and not if a check of yours fails. An open circuit breaker is
  only a warning: the app goes on without that dependency, which is what the breaker is for, and as all replicas
  see the same outage, failing here would take all of them away.
* started: is it done with starting? Until then the other two are not asked.

Results of checks are kept for a moment, and one run of a check answers all who ask meanwhile, so probes add next
to no load on a dependency, however many there are.
"""

import asyncio
import contextvars
import functools
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, get_args

import anyio

from resilient import options, runtime, workers
from resilient.asgi.drain import Drain
from resilient.asgi.exchange import Receive, Scope, Send
from resilient.asgi.routes import path_of
from resilient.policies.cache import Cache
from resilient.policies.circuit_breaker import CircuitBreaker
from resilient.policy import Policy

logger = logging.getLogger("resilient")

Check: TypeAlias = Callable[[], object] | Callable[[], Awaitable[object]]
Format: TypeAlias = Literal["plain", "json", "health+json"]
Status: TypeAlias = Literal["pass", "warn", "fail"]

PATHS: Final = {"live": "/livez", "ready": "/readyz", "startup": "/startupz"}

_MEDIA_TYPES: Final = {
    "plain": b"text/plain; charset=utf-8",
    "json": b"application/json",
    "health+json": b"application/health+json",
}
_WORST_FIRST: Final[tuple[Status, ...]] = ("fail", "warn", "pass")


@dataclass(frozen=True, slots=True)
class _Finding:
    """One part of an answer.

    Attributes:
        key: What was looked at, and what about it, in the form of draft-inadarei-api-health-check: `name:circuit`.
        status: `pass`, `warn` or `fail`.
        observed: A state to show, or None.
        output: Why it does not pass: only for those who may know the details.
    """

    key: str
    status: Status
    observed: str | None = None
    output: str = ""

    @property
    def line(self) -> str:
        return f"{self.key}: {self.status}" + (f": {self.output}" if self.output else "")


class Health:
    """An ASGI app that answers probes: mount it, route to it, or hand it to `ResilienceMiddleware(health=...)`.

    It answers GET and HEAD with 200 or 503, and is never cached. A websocket is closed, and the lifespan is
    answered, so that it can also run alone.

    Args:
        checks: What has to be well for this process to serve requests: functions without arguments, sync or async,
            by name. A check fails if it raises, takes too long, or returns something false other than None. Sync
            ones run in a thread. Default None: no checks.
        breakers: Circuit breakers, or pipelines with some in them: one that is not closed makes readiness a
            warning. Default none.
        drain: The `Drain` that makes readiness fail once it has begun. Default None.
        started: Whether the app is ready as soon as it is asked; servers ask nothing before the startup of the
            lifespan is complete. With False, startup and readiness fail until `mark_started()`. Default True.
        format: `"plain"` (the status as a word; the default), `"json"`, or `"health+json"`: the media type
            `application/health+json` of draft-inadarei-api-health-check-06.
        paths: Other paths for the probes `live`, `ready` and `startup`, or None for one that is not answered.
            Default: `/livez`, `/readyz` and `/startupz`. They are below the `root_path` of the app.
        check_timeout: How many seconds a check may take. Default 1 s, as long as Kubernetes waits for a probe.
        check_ttl: For how many seconds the result of a check is used again. Default 1 s.
        details: Whether answers say why something fails, messages of errors included. Default False: they may
            be secret, and probes are often open to everyone. The log has them in any case.
    """

    def __init__(
        self,
        *,
        checks: Mapping[str, Check] | None = None,
        breakers: Policy | Iterable[Policy] = (),
        drain: Drain | None = None,
        started: bool = True,
        format: Format = "plain",  # noqa: A002 - the word for it
        paths: Mapping[str, str | None] | None = None,
        check_timeout: options.Seconds = 1.0,
        check_ttl: options.Seconds = 1.0,
        details: bool = False,
    ) -> None:
        me = "Health"
        if not isinstance(drain, Drain | None):
            raise options.refuse(me, "drain", drain, "a Drain or None", TypeError)
        if format not in get_args(Format):
            raise options.refuse(me, "format", format, "'plain', 'json' or 'health+json'")
        self.drain = drain
        self.started = options.flag(me, "started", started)
        self.format = format
        self.paths = _paths(paths)
        self.check_timeout = options.seconds(me, "check_timeout", check_timeout)
        self.check_ttl = options.seconds(me, "check_ttl", check_ttl)
        self.details = options.flag(me, "details", details)
        self._checks = [
            _CachedCheck(name, check, self.check_timeout, self.check_ttl) for name, check in _named(checks)
        ]
        self._breakers = _find_breakers(breakers)
        self._probes = {path: probe for probe, path in self.paths.items() if path is not None}

    def mark_started(self) -> None:
        """Say that the app is done with starting, if it was made with `started=False`."""
        self.started = True

    def handles(self, scope: Scope) -> bool:
        """Tell whether a request is a probe: an HTTP request for one of the paths, of whatever method."""
        return scope["type"] == "http" and self._probe_of(scope) is not None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as an ASGI app."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] != "http":
            await receive()
            await send({"type": "websocket.close", "code": 1000, "reason": ""})
        elif (probe := self._probe_of(scope)) is None:
            await _answer(scope, send, 404, b"text/plain; charset=utf-8", b"not found")
        elif scope["method"] not in ("GET", "HEAD"):
            allow = (b"allow", b"GET, HEAD")
            await _answer(scope, send, 405, b"text/plain; charset=utf-8", b"method not allowed", allow)
        else:
            if self.drain is not None:
                self.drain.settle()
            findings = await self._find(probe)
            statuses = {found.status for found in findings}
            status: Status = next((one for one in _WORST_FIRST if one in statuses), "pass")
            body = self._show(status, findings).encode()
            await _answer(scope, send, 503 if status == "fail" else 200, _MEDIA_TYPES[self.format], body)

    def _probe_of(self, scope: Scope) -> str | None:
        path = path_of(scope)
        if path == "/" and path not in self._probes:  # it may be mounted right at a probe
            path = path_of({**scope, "root_path": scope.get("app_root_path", "")}).rstrip("/")
        return self._probes.get(path)

    # -- what there is to say ---------------------------------------------------------------------------------

    async def _find(self, probe: str) -> list[_Finding]:
        if probe == "live":
            return []
        if not self.started:
            return [_Finding("startup", "fail", output="not started yet")]
        if probe == "startup":
            return []
        if self.drain is not None and self.drain.draining:
            return [_Finding("drain:state", "fail", self.drain.state, "this process is about to end")]
        return [*await self._run_checks(), *map(_look_at, self._breakers, self._breakers.values())]

    async def _run_checks(self) -> list[_Finding]:
        found: dict[str, _Finding] = {}

        async def run(check: _CachedCheck) -> None:
            found[check.name] = await check.result()

        async with anyio.create_task_group() as group:
            for check in self._checks:
                group.start_soon(run, check)
        return [found[check.name] for check in self._checks]

    def _show(self, status: Status, findings: list[_Finding]) -> str:
        if self.format == "plain":
            return "\n".join([status, *(found.line for found in findings if self.details)])
        parts: dict[str, Any] = {}
        for found in findings:
            part: dict[str, str] = {"status": found.status}
            if found.observed is not None:
                part["observedValue"] = found.observed
            if found.output and self.details:
                part["output"] = found.output
            parts[found.key] = part if self.format == "json" else [part]
        return json.dumps({"status": status, "checks": parts} if parts else {"status": status})


class _CachedCheck:
    """A check that is not run more often than its results get old, nor twice at the same time.

    Args:
        name: What answers and the log call it.
        function: The function of the user.
        timeout: How many seconds it may take.
        ttl: For how many seconds a result counts.
    """

    def __init__(self, name: str, function: Check, timeout: float, ttl: float) -> None:
        self.name = name
        self._function = function
        self._is_async = options.is_async(function)
        self._timeout = timeout
        self._cache = Cache(ttl, max_entries=1, name=f"health check {name}")
        self._job: workers.Job | None = None
        self._failed = False

    async def result(self) -> _Finding:
        return await self._cache.acall(self._run)

    async def _run(self) -> _Finding:
        error: BaseException | None = None
        output = ""
        with anyio.move_on_after(self._timeout) as limit:
            try:
                answer = await self._ask()
                if not answer and answer is not None:
                    output = f"returned {answer!r}"
            except (Exception, asyncio.CancelledError) as raised:
                task = asyncio.current_task() if isinstance(raised, asyncio.CancelledError) else None
                if task is not None and task.cancelling():
                    raise  # it is the probe that was cancelled, and not what the check has awaited
                error = raised
                output = f"{type(raised).__name__}: {raised}"
        if limit.cancelled_caught:
            output = f"not done after {self._timeout:g} s"
        self._tell_log(output, error)
        return _Finding(self.name, "fail" if output else "pass", output=output)

    async def _ask(self) -> object:
        if self._is_async:
            asked: Any = self._function()
            return await asked
        if self._job is not None and not self._job.finished:
            raise TimeoutError("an earlier run is not done yet")  # its thread is left behind, but not one a probe
        self._job = job = workers.Job(self._function, contextvars.copy_context(), None)
        workers.start(job)
        await runtime.await_ticket(job.ticket)
        try:
            answer = job.outcome()
        except Exception:
            raise
        except BaseException as error:  # one that would end the server, such as SystemExit
            raise RuntimeError(f"it raised {type(error).__name__}") from error
        return await answer if inspect.isawaitable(answer) else answer

    def _tell_log(self, output: str, error: BaseException | None) -> None:
        if output and not self._failed:
            logger.warning("the health check %r fails: %s", self.name, output, exc_info=error)
        elif self._failed and not output:
            logger.info("the health check %r passes again", self.name)
        self._failed = bool(output)


def _look_at(name: str, breaker: CircuitBreaker) -> _Finding:
    state = breaker.current_state
    status: Status = "pass" if state == "closed" else "warn"
    return _Finding(f"{name}:circuit", status, state, "" if status == "pass" else f"the circuit is {state}")


# -- HTTP -----------------------------------------------------------------------------------------------------


async def _answer(
    scope: Scope, send: Send, status: int, media_type: bytes, body: bytes, *more: tuple[bytes, bytes]
) -> None:
    headers = [
        (b"content-type", media_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *more,
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


async def _live(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": message["type"] + ".complete"})


# -- options --------------------------------------------------------------------------------------------------


def _named(checks: Any) -> Iterable[tuple[str, Check]]:
    allowed = "a mapping of names to functions without arguments"
    if checks is None:
        return ()
    if not isinstance(checks, Mapping):
        raise options.refuse("Health", "checks", checks, allowed, TypeError)
    for name, check in checks.items():
        if not isinstance(name, str) or not name or not callable(check) or isinstance(check, type):
            raise options.refuse("Health", "checks", checks, allowed, TypeError)
        if options.is_generator(check):  # calling it runs nothing, and would always pass
            raise options.refuse("Health", "checks", checks, f"{allowed}, and no generator functions", TypeError)
    return checks.items()


def _find_breakers(given: Any) -> dict[str, CircuitBreaker]:
    allowed = "circuit breakers, or pipelines with some in them"
    policies = [given] if isinstance(given, Policy) else given
    if isinstance(policies, str) or not isinstance(policies, Iterable):
        raise options.refuse("Health", "breakers", given, allowed, TypeError)
    found: dict[int, CircuitBreaker] = {}
    for policy in policies:
        if not isinstance(policy, Policy):
            raise options.refuse("Health", "breakers", given, allowed, TypeError)
        members = [member for member in policy.walk() if isinstance(member, CircuitBreaker)]
        if not members:
            raise options.refuse("Health", "breakers", given, allowed)
        found.update((id(member), member) for member in members)
    named: dict[str, CircuitBreaker] = {}
    for number, breaker in enumerate(found.values(), 1):
        # Its repr, which serves as the name elsewhere, would show the configuration to everyone.
        name = breaker.name or "breaker"
        named[name if breaker.name and name not in named else f"{name}-{number}"] = breaker
    return named


def _paths(given: Any) -> dict[str, str | None]:
    allowed = f"a mapping of {', '.join(map(repr, PATHS))} to different paths that begin with a slash, or to None"
    refuse = functools.partial(options.refuse, "Health", "paths", given, allowed)
    if not isinstance(given, Mapping | None):
        raise refuse(TypeError)
    paths: dict[str, str | None] = {**PATHS, **(given or {})}
    answered = [path for path in paths.values() if path is not None]
    if not all(isinstance(path, str) for path in answered):
        raise refuse(TypeError)
    if set(paths) != set(PATHS) or not all(path.startswith("/") for path in answered):
        raise refuse()
    if len(set(answered)) != len(answered):
        raise refuse()
    return paths
