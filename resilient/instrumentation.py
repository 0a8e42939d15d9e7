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
        self._replaced: tuple[Any, str, Any] | None = None

    @property
    def active(self) -> bool:
        """Whether the function is guarded now: False while the module has not been imported, and after `undo`."""
        return self._replaced is not None

    def undo(self) -> None:
        """Put the original back, or do nothing when the module is imported later; twice does no harm."""
        self._undone = True
        if self._replaced is None:
            return
        owner, name, original = self._replaced
        self._replaced = None
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)

    def apply(self, module: ModuleType) -> None:
        """Replace the function, now that the module is there."""
        if self._undone:
            return
        try:
            owner, name, _ = wrapt.resolve_path(module, self.path)
        except AttributeError:
            raise AttributeError(f"instrument: the module {self.module!r} has no {self.path!r}") from None
        # Looked up in the owner itself, past the descriptor protocol: that keeps classmethods and staticmethods
        # what they are, and tells what is inherited and must be deleted, not restored.
        own = vars(owner).get(name, _ABSENT)
        inherited = next((vars(base)[name] for base in getattr(owner, "__mro__", ()) if name in vars(base)), own)
        setattr(
            owner,
            name,
            decorate(self.policy, inherited if inherited is not _ABSENT else getattr(owner, name)),
        )
        self._replaced = (owner, name, own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


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
