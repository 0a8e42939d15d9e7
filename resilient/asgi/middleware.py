"""A pipeline around an ASGI application.

It is pure ASGI: the application runs in the task that the server has made for the request, what it sends goes to
the server as it comes, and what it raises is raised.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from inspect import isawaitable
from typing import Any, Final, Literal, TypeAlias

from resilient import options, presets, runtime
from resilient import priority as priorities
from resilient.asgi.disconnects import while_wanted
from resilient.asgi.drain import Drain
from resilient.asgi.edge import AsgiEdge, Repeatable, is_app
from resilient.asgi.exchange import App, AsgiCall, Handshake, Message, Receive, Scope, Send
from resilient.asgi.health import Health
from resilient.asgi.incoming import Incoming
from resilient.asgi.refusals import OnRejected, refusal_of
from resilient.asgi.routes import Routes, check_paths
from resilient.call import AsyncNext
from resilient.errors import Draining, FailedResult, ResilientError
from resilient.http.transport import check_pipeline, check_repeatable
from resilient.keyed import members
from resilient.kinds import Loop, Race, Value
from resilient.policy import Policy
from resilient.priority import Priority

HEALTH_PATHS: Final = frozenset({"/livez", "/readyz", "/startupz", "/healthz", "/health", "/metrics"})
"""What probes and collectors ask for. An overloaded service that failed its probes would be killed."""

_OWNER = "ResilienceMiddleware"
_TRY_AGAIN_LATER = 1013

REFUSED: Final = "resilient.refused"
"""Where in the scope dependencies of FastAPI leave the errors by which they refuse a request: in a list, as
middleware in between may copy the scope."""

_LEVELS = {level.name.lower().encode(): level for level in Priority}

_Guard: TypeAlias = tuple[AsgiEdge, AsyncNext]


class ResilienceMiddleware:
    """Guard an ASGI application by a pipeline.

        app = Starlette(middleware=[Middleware(ResilienceMiddleware, pipeline=guard)])
        app.add_middleware(ResilienceMiddleware, pipeline=guard)      # the last one added is the outermost
        app = ResilienceMiddleware(app, pipeline=guard)

    Frameworks make the middleware when the first request comes, and some more than once. The state is in the
    policies, in `health` and in `drain`: make these yourself, and the middleware may be made as often as it likes.

    Functions that policies are given, as `key=` of a `RateLimit`, are called with the scope of the request. A
    policy sees the whole run of the application, background tasks included: a `Bulkhead` counts a request until
    then. But a `Timeout` ends when the response is complete.

    Args:
        app: The application.
        pipeline: The policies, a `Pipeline` or a single one. Default None: `resilient.presets.http_server()`, made
            anew for each middleware.
        routes: Other pipelines for some paths, as in `{"/search": guard, "POST /users/{id}": other,
            "/files/{p:path}": None}`; None guards by nothing. They take the place of `pipeline`: put shared
            policies into both. Paths without parameters win, one with methods over one without; then the first
            template that fits. Default None.
        exempt: Paths that are guarded by nothing, unless `routes` says otherwise. Default `HEALTH_PATHS`. CORS
            preflight requests are never guarded, as browsers do not show scripts what became of them.
        websockets: A pipeline for the handshakes of websockets, of policies that admit or limit the time; a
            `Bulkhead` counts a connection until it ends. Default None: they pass.
        gateway: Whether the application only passes requests on: then timeouts are answered by 504 instead of 503.
            Default False.
        legacy_headers: Whether limits are told in `X-RateLimit-*` too. Default False.
        on_rejected: A function of the scope and the `Refusal` that returns a response to refuse by (any ASGI
            application), or None for the usual one; it may be async. Not asked for websockets. Default None.
        deadline_until: When deadlines end: `"complete"`, when the response is, or `"start"`, when it begins.
            Server-sent events have none once they have begun. Default `"complete"`.
        retry_after: What `Retry-After` says where nobody knows when it is worth coming back, as when load is
            shed, in seconds; up to twice as much, so that not all come at once. Default 1 s.
        repeatable: What a `Retry` may run again besides idempotent methods and requests with an `Idempotency-Key`:
            methods such as `{"POST"}`, or a function of the scope. Default: nothing.
        capture: How many bytes of a failing response are held back, for a policy to put another one in its place;
            a longer one goes out. Default 64 KiB.
        record: How many bytes of a request's body are kept for another run of the application; a request with a
            longer one is not run again. Default 64 KiB.
        deadline_header: The header in which callers say how long they will wait: `"grpc-timeout"`,
            `"x-envoy-expected-rq-timeout-ms"` (in milliseconds as all names that end so), or one in seconds. It
            becomes the deadline of the request. Default None: nobody is asked.
        max_deadline: The longest time in seconds that a caller can ask for. Default 60 s.
        deadline_margin: By how many seconds to be done sooner, for the way back; less than `max_deadline`. Default
            0.02 s.
        cancel_on_disconnect: Whether to cancel what runs for a client that has gone, once the body of its request
            has been read. Default False.
        priority: What is shed last: a mapping of paths to `Priority`, like `routes`, where all other paths are
            NORMAL; or the name of a header with the value `low`, `normal`, `high` or `critical`, if those who set
            it can be trusted; or a function of the scope. Default None: all requests have the priority around
            them.
        health: A `Health` that answers the probes, before anything else. Default None.
        drain: A `Drain` that counts requests, and refuses them once the process is to end. Default None.

    Raises:
        TypeError: An option of the wrong type, or a policy that cannot work here, such as hedging.
        ValueError: A bad option.
    """

    def __init__(
        self,
        app: App,
        *,
        pipeline: Policy | None = None,
        routes: Mapping[str, Policy | None] | None = None,
        exempt: Collection[str] = HEALTH_PATHS,
        websockets: Policy | None = None,
        gateway: bool = False,
        legacy_headers: bool = False,
        on_rejected: OnRejected | None = None,
        deadline_until: Literal["complete", "start"] = "complete",
        retry_after: options.Seconds = 1.0,
        repeatable: Repeatable = (),
        capture: int = 64 * 1024,
        record: int = 64 * 1024,
        deadline_header: str | None = None,
        max_deadline: options.Seconds = 60.0,
        deadline_margin: options.Seconds = 0.02,
        cancel_on_disconnect: bool = False,
        priority: Callable[[Scope], Priority] | Mapping[str, Priority] | str | None = None,
        health: Health | None = None,
        drain: Drain | None = None,
    ) -> None:
        if not callable(app):
            raise options.refuse(_OWNER, "app", app, "an ASGI application", TypeError)
        self.app = app
        self.pipeline = check_pipeline(_OWNER, pipeline) or presets.http_server()
        self.gateway = options.flag(_OWNER, "gateway", gateway)
        self.on_rejected = on_rejected
        if on_rejected is not None and (not callable(on_rejected) or isinstance(on_rejected, type)):
            raise options.refuse(_OWNER, "on_rejected", on_rejected, "a function of scope and refusal", TypeError)
        self.retry_after = options.seconds(_OWNER, "retry_after", retry_after)
        self.health = _instance("health", health, Health)
        self.drain = _instance("drain", drain, Drain)
        if deadline_until not in ("complete", "start"):
            raise options.refuse(_OWNER, "deadline_until", deadline_until, '"complete" or "start"')
        self._around = _wrappers(deadline_header, max_deadline, deadline_margin, cancel_on_disconnect, priority)
        edge_of = partial(
            AsgiEdge,
            app,
            capture=options.whole(_OWNER, "capture", capture, minimum=0),
            record=options.whole(_OWNER, "record", record, minimum=0),
            repeatable=check_repeatable(_OWNER, repeatable),
            legacy=options.flag(_OWNER, "legacy_headers", legacy_headers),
            until_start=deadline_until == "start",
            limited=deadline_header is not None,
        )
        self._guards = self._link(edge_of, exempt, routes)
        self._websockets = None if websockets is None else self._link_websockets(websockets)
        self._supervised = health is not None or drain is not None

    def _link(
        self, edge_of: Callable[[Policy], AsgiEdge], exempt: Collection[str], routes: Any
    ) -> Routes[_Guard | None]:
        if routes is not None and not isinstance(routes, Mapping):
            raise options.refuse(_OWNER, "routes", routes, "a mapping of paths to pipelines", TypeError)
        table: dict[str, Policy | None] = dict.fromkeys(check_paths(_OWNER, "exempt", exempt))
        for route, pipeline in (routes or {}).items():
            table[route] = check_pipeline(_OWNER, pipeline, "routes")
        pipelines = {pipeline for pipeline in (self.pipeline, *table.values()) if pipeline is not None}
        linked = {pipeline: self._linked(edge_of(pipeline), pipeline) for pipeline in pipelines}
        guards = {route: None if pipeline is None else linked[pipeline] for route, pipeline in table.items()}
        return Routes(_OWNER, guards, linked[self.pipeline])

    def _link_websockets(self, pipeline: Any) -> _Guard:
        check_pipeline(_OWNER, pipeline, "websockets")
        for policy in members(pipeline):
            if isinstance(policy, Loop | Value | Race):
                raise TypeError(
                    f"{_OWNER}: websockets={type(policy).__name__} cannot guard a handshake; give policies "
                    "that admit or limit the time, such as RateLimit, Bulkhead and Timeout"
                )
        return self._linked(AsgiEdge(self.app, pipeline), pipeline)

    def _linked(self, edge: AsgiEdge, pipeline: Policy) -> _Guard:
        for policy in members(pipeline):
            if isinstance(policy, Race):
                raise TypeError(
                    f"{_OWNER}: {type(policy).__name__} cannot guard an application: a request can be "
                    "answered only once. Hedge the calls that the application makes"
                )
        chain = pipeline.alink(edge.aend(), edge)
        for wrapper in self._around:
            chain = wrapper(chain)
        return edge, chain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection: a request under its pipeline, anything else as it is."""
        if scope["type"] != "http" or self._supervised:
            await self._supervise(scope, receive, send)
        else:
            await self._serve(self._guards.of(scope), AsgiCall, scope, receive, send)

    async def _supervise(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection that is no request, or one that is counted."""
        kind, drain = scope["type"], self.drain
        if kind not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        if kind == "http" and self.health is not None and self.health.handles(scope):
            await self.health(scope, receive, send)
            return
        if drain is not None and kind == "http" and scope["http_version"].startswith("1"):
            send = partial(_send_and_close, drain, send)
        if drain is not None and not drain.enter():
            await self._refuse(Draining("the process is about to end", policy=drain.label), scope, receive, send)
            return
        try:
            if kind == "http":
                await self._serve(self._guards.of(scope), AsgiCall, scope, receive, send)
            else:
                await self._serve(self._websockets, Handshake, scope, receive, send)
        finally:
            if drain is not None:
                drain.leave()

    async def _serve(
        self, guard: _Guard | None, kind: type[AsgiCall], scope: Scope, receive: Receive, send: Send
    ) -> None:
        if guard is None or (kind is AsgiCall and scope["method"] == "OPTIONS" and _is_preflight(scope)):
            await self.app(scope, receive, send)
            return
        edge, chain = guard
        call = kind(edge, scope, receive, send, runtime.now())
        try:
            result = await chain(call)
        except Exception as error:
            result = await self._failed(call, error)
        if result is not call.response:
            await self._replace(call, result)
        elif call.held is not None:
            await call.release()

    async def _failed(self, call: AsgiCall, error: Exception) -> Any:
        """Return the response that failed, or refuse the request; what the application raised is raised."""
        if isinstance(error, FailedResult):
            return error.result
        if isinstance(error, ResilientError) and not call.started:
            call.held = None
            await self._refuse(error, call.scope, call.receive, call.send, call)
            return call.response
        await call.release()  # applications that answer by 500 and then raise: the answer is theirs
        raise error  # if the response has begun the server closes the connection, and nobody takes it for whole

    async def _replace(self, call: AsgiCall, result: Any) -> None:
        """Send what a policy answers instead of the application."""
        if not is_app(result):
            raise TypeError(
                f"{_OWNER}: the pipeline answered {result!r} instead of a response; fallbacks have to "
                "give responses of Starlette, or any other ASGI application"
            )
        call.held = None
        await result(call.scope, call.receive, partial(_send_of, call))

    async def _refuse(
        self, error: ResilientError, scope: Scope, receive: Receive, send: Send, call: AsgiCall | None = None
    ) -> None:
        inside = call is not None and error is call.escaped and error not in scope.get(REFUSED, ())
        refusal = refusal_of(error, call, retry_after=self.retry_after, gateway=self.gateway, inside=inside)
        if scope["type"] == "websocket":
            if not isinstance(call, Handshake) or not call.received:
                await receive()  # the handshake: it comes once, and has to be received before it is refused
            if "websocket.http.response" not in scope.get("extensions", ()):
                await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": refusal.title})
                return
        answer: Any = refusal
        if self.on_rejected is not None and scope["type"] == "http":
            own = self.on_rejected(scope, refusal)
            own = await own if isawaitable(own) else own
            if own is not None and not is_app(own):
                raise TypeError(f"{_OWNER}: on_rejected= returned {own!r}; return a response or None")
            answer = refusal if own is None else own
        await answer(scope, receive, send if call is None else partial(_send_of, call))


async def _send_of(call: AsgiCall, message: Message) -> None:
    """Send an answer that is not the application's, with the fields about limits."""
    await (call.begin(message) if message["type"].endswith("http.response.start") else call.forward(message))


def _send_and_close(drain: Drain, send: Send, message: Message) -> Awaitable[None]:
    """Send a message of a response; while draining the client had better open its next connection elsewhere."""
    if drain.draining and message["type"] == "http.response.start":
        message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
    return send(message)


def _instance(option: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise options.refuse(_OWNER, option, value, f"a {kind.__name__} or None", TypeError)
    return value


def _check_priority(priority: Any) -> Callable[[Scope], Priority] | None:
    if isinstance(priority, Mapping):
        for level in priority.values():
            if not isinstance(level, Priority):
                raise options.refuse(_OWNER, "priority", level, "a Priority for each path", TypeError)
        return Routes(_OWNER, priority, Priority.NORMAL, option="priority").of
    if isinstance(priority, str):
        return partial(_priority_in, options.header_name(_OWNER, "priority", priority).encode())
    return None if priority is None else options.function(_OWNER, "priority", priority)


def _priority_in(header: bytes, scope: Scope) -> Priority:
    """Return the priority that a header of a request names, NORMAL if there is none, or not one."""
    values = [value for name, value in scope["headers"] if name == header]
    return _LEVELS.get(values[0].strip().lower(), Priority.NORMAL) if len(values) == 1 else Priority.NORMAL


def _is_preflight(scope: Scope) -> bool:
    """Tell whether a browser asks if it may send a request (Fetch, 3.3.2)."""
    return any(name == b"access-control-request-method" for name, _value in scope["headers"])


def _wrappers(
    deadline_header: str | None, cap: Any, margin: Any, cancel_on_disconnect: Any, priority: Any
) -> list[Callable[[AsyncNext], AsyncNext]]:
    """Return what is put around all chains, innermost first."""
    wrappers: list[Callable[[AsyncNext], AsyncNext]] = []
    cap = options.seconds(_OWNER, "max_deadline", cap)
    margin = options.seconds(_OWNER, "deadline_margin", margin, zero=True)
    if margin >= cap:
        raise options.refuse(_OWNER, "deadline_margin", margin, f"seconds below max_deadline={cap:g}")
    if deadline_header is not None:
        wrappers.append(Incoming(deadline_header, cap=cap, margin=margin).around)
    level_of = _check_priority(priority)
    if level_of is not None:
        wrappers.append(partial(_with_priority, level_of))
    if options.flag(_OWNER, "cancel_on_disconnect", cancel_on_disconnect):
        wrappers.append(while_wanted)
    return wrappers


def _with_priority(level_of: Callable[[Scope], Priority], chain: AsyncNext) -> AsyncNext:
    async def prioritised(call: AsgiCall) -> Any:
        with priorities.of(level_of(call.scope)):
            return await chain(call)

    return prioritised  # type: ignore[return-value]
