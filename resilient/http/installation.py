"""Guarding a client that exists already, such as the one inside an SDK; undoable.

A client keeps its transports in attributes that it does not document: one for everything, and the `mounts` that
take precedence for some URLs (proxies from the environment are among them). All of them are wrapped.
"""

from types import TracebackType
from typing import Any, Self

from resilient import options, presets
from resilient.http.family import Family
from resilient.http.transport import Guard, check_pipeline
from resilient.policy import Policy


class Installation:
    """A pipeline in an existing client; `uninstall()` takes it out, and so does the end of a `with` block.

    Attributes:
        client: The client.
        pipeline: What guards it.
    """

    def __init__(self, client: Any, pipeline: Policy, guard: Guard, mounts: dict[Any, Guard]) -> None:
        self.client = client
        self.pipeline = pipeline
        self._guard: Guard | None = guard
        self._mounts = mounts

    def uninstall(self) -> None:
        """Give the client its own transports back; calling it again does nothing.

        Raises:
            RuntimeError: Somebody else has replaced a transport meanwhile: nothing is changed then.
        """
        guard, client = self._guard, self.client
        if guard is None:
            return
        found = [client._transport, *map(client._mounts.get, self._mounts)]
        if any(mine is not its for mine, its in zip([guard, *self._mounts.values()], found, strict=True)):
            raise RuntimeError(f"{client!r} has other transports than those that were installed; undo these first")
        client._transport = guard.transport
        client._mounts.update({pattern: mine.transport for pattern, mine in self._mounts.items()})
        self._guard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.uninstall()


def install_in(
    client: Any, pipeline: Policy | None, kinds: tuple[type[Guard], type[Guard]], **settings: Any
) -> Installation:
    """Wrap the transports of a client; see `resilient.httpx.install`.

    Args:
        client: The client.
        pipeline: What guards it; None for the preset.
        kinds: The sync and the async transport of the family.
        **settings: The other options of the transports.
    """
    family = kinds[0]._family
    if isinstance(client, family.module.Client):
        kind = kinds[0]
    elif isinstance(client, family.module.AsyncClient):
        kind = kinds[1]
    else:
        raise options.refuse(f"{family.name}.install", "client", client, _allowed(client, family), TypeError)
    before = [client._transport, *filter(None, client._mounts.values())]
    if any(isinstance(transport, Guard) for transport in before):
        allowed = "a client that is not guarded yet: undo the first installation, or add policies to its pipeline"
        raise options.refuse(f"{family.name}.install", "client", client, allowed)
    guard = check_pipeline(f"{family.name}.install", pipeline) or presets.http_client()
    # All are wrapped before the first is replaced, as a refusal changes nothing.
    unique = {id(transport): transport for transport in before}
    wrapped = {key: kind(transport, pipeline=guard, **settings) for key, transport in unique.items()}
    mounts = {pattern: wrapped[id(mounted)] for pattern, mounted in client._mounts.items() if mounted is not None}
    client._transport = wrapped[id(client._transport)]
    client._mounts.update(mounts)
    return Installation(client, guard, client._transport, mounts)


def _allowed(client: Any, family: Family) -> str:
    allowed = f"an {family.package}.Client or {family.package}.AsyncClient"
    inner = getattr(client, "_client", None)
    for candidate in (client, inner):
        package = type(candidate).__module__.partition(".")[0]
        if package in {"httpx", "httpx2"} and package != family.package:
            return f"{allowed}. This is a client of {package}: use resilient.{package}"
        if isinstance(candidate, family.module.Client | family.module.AsyncClient):
            return f"{allowed}. The one of this {type(client).__name__} is its attribute _client"
    return allowed
