"""Guard code that is not yours: replace a function or method of a module by its guarded self."""

import importlib
import sys
from types import ModuleType, TracebackType
from typing import Any, Self

import wrapt

from resilient.functions import decorate
from resilient.policy import Policy

_ABSENT = object()


class Instrumented:
    """What `instrument` returns: `undo()` it, or use it as a context manager.

    Args:
        module: The name of the module.
        path: The path of the function in it.
        policy: The policy that guards it.
    """

    def __init__(self, module: str, path: str, policy: Policy) -> None:
        self.module = module
        self.path = path
        self.policy = policy
        self._undone = False
        self._site: _Site | None = None

    @property
    def active(self) -> bool:
        """Whether the function is guarded now: False while the module has not been imported, and after `undo`."""
        return self._site is not None

    def undo(self) -> None:
        """Put the original back, or do nothing when the module is imported later; twice does no harm.

        Several that guard the same function may be undone in any order.
        """
        self._undone = True
        if self._site is not None:
            site, self._site = self._site, None
            site.guards.remove(self)
            site.rebuild()

    def apply(self, module: ModuleType) -> None:
        """Replace the function, now that the module is there."""
        if self._undone:
            return
        try:
            owner, name, _ = wrapt.resolve_path(module, self.path)
        except AttributeError:
            raise AttributeError(f"instrument: the module {self.module!r} has no {self.path!r}") from None
        site = _sites.get((id(owner), name))
        if site is None:
            site = _Site(owner, name)
        decorate(self.policy, site.function)  # refused before anything is changed
        site.guards.append(self)
        site.rebuild()
        self._site = site

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


class _Site:
    """A place in somebody else's code, what was there, and what guards it."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = name
        # Looked up past the descriptor protocol: that keeps classmethods and staticmethods what they are, and
        # tells what is inherited and has to be deleted in the end, not restored.
        self.original = vars(owner).get(name, _ABSENT)
        found = (vars(base)[name] for base in getattr(owner, "__mro__", (owner,)) if name in vars(base))
        self.function = next(found, None) or getattr(owner, name)
        self.guards: list[Instrumented] = []

    def rebuild(self) -> None:
        """Guard the original by all that guard it now, in the order in which they came."""
        _sites[id(self.owner), self.name] = self
        guarded = self.function
        for guard in self.guards:
            guarded = decorate(guard.policy, guarded)
        if self.guards or self.original is not _ABSENT:
            setattr(self.owner, self.name, guarded if self.guards else self.original)
        else:
            delattr(self.owner, self.name)
        if not self.guards:
            del _sites[id(self.owner), self.name]


_sites: dict[tuple[int, str], _Site] = {}
"""The places that are guarded now. They keep their owners alive, so no id is used again."""


def instrument(module: str, path: str, policy: Policy) -> Instrumented:
    """Guard a function or method of a module that is not yours, now or as soon as it is imported.

    Args:
        module: The name of the module, such as `"billing.client"`.
        path: The path in it, such as `"fetch"` or `"Client.fetch"`. Methods, classmethods, staticmethods and
            async functions stay what they are.
        policy: The policy or pipeline.

    Returns:
        A handle whose `undo()` puts the original back; also a context manager.

    Raises:
        TypeError: The policy is not one, or what the path leads to cannot be guarded.
        AttributeError: The module is imported already and has no such path. A module that is imported later
            raises it from its import.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"instrument: policy={policy!r} is not a policy")
    for option, value in (("module", module), ("path", path)):
        if not isinstance(value, str) or not value:
            raise TypeError(f"instrument: {option}={value!r} is not allowed; give a non-empty str")
    instrumented = Instrumented(module, path, policy)
    loaded = sys.modules.get(module)
    if loaded is not None:
        instrumented.apply(importlib.import_module(module))
    else:
        wrapt.register_post_import_hook(instrumented.apply, module)
    return instrumented
