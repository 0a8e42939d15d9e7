"""httpx and httpx2: one contract, two packages without a class in common."""

import functools
from types import ModuleType
from typing import Any, Final

from resilient.errors import Rejected, ResilientError, TimedOut

HIGHEST_PORT: Final = 65535
"""The clients take any number, and sockets then take what is left of it in 16 bits: that of somebody else."""


class Family:
    """The classes of one of the two packages.

    Args:
        module: `httpx` or `httpx2`, imported by the module that users import.
        name: The name of our module for it, such as `resilient.httpx`.
    """

    def __init__(self, module: ModuleType, name: str) -> None:
        self.module: Any = module
        self.package = module.__name__
        self.name = name
        self.Request = self.module.Request
        self.Response = self.module.Response
        self.ByteStream = self.module.ByteStream
        _families[name] = self

    def own(self, error: ResilientError, request: Any) -> Exception:
        """Return an error of ours as one that is an exception of this family too, with `request` set.

        So `except httpx.HTTPError` and the SDKs that are built on it keep working: a `TimedOut` is also a
        `TimeoutException`, a refusal is also a `TransportError`.
        """
        theirs = self._base_for(type(error))
        if theirs is None or isinstance(error, theirs):
            mapped = error
        else:
            mapped = _rebuild(self.name, type(error), error.args, error.__dict__)
            mapped.__traceback__ = error.__traceback__
        mapped.request = request  # type: ignore[attr-defined]
        return mapped

    def _base_for(self, kind: type[ResilientError]) -> type[Exception] | None:
        if issubclass(kind, TimedOut):
            return self.module.TimeoutException  # type: ignore[no-any-return]
        return self.module.TransportError if issubclass(kind, Rejected) else None


_families: dict[str, Family] = {}


@functools.cache
def _mapped(name: str, kind: Any) -> Any:
    """Return the class that is both `kind` and an exception of the family: always the same."""
    family = _families[name]

    def reduce(self: ResilientError) -> tuple[Any, ...]:
        # Without the request: it holds the headers and the body, which are nobody's business in another process.
        state = {key: value for key, value in self.__dict__.items() if key != "_request"}
        return _rebuild, (name, kind, self.args, state)

    bases = (kind, family._base_for(kind))
    return type(kind.__name__, bases, {"__module__": name, "__doc__": kind.__doc__, "__reduce__": reduce})  # type: ignore[arg-type]


def _rebuild(name: str, kind: Any, args: tuple[Any, ...], state: dict[str, Any]) -> ResilientError:
    if name not in _families:  # in another process, where nobody has imported it yet
        __import__(name)
    mapped = _mapped(name, kind)
    error: ResilientError = mapped.__new__(mapped, *args)
    error.args = args
    error.__dict__.update({"_request": None, **state})
    return error
