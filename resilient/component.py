"""What policies and their parts have in common: a name, a repr, copies, listeners, and surviving a fork."""

import functools
import inspect
import os
import threading
import weakref
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from resilient import events, options, runtime


class Component:
    """Something with options that reports events.

    Every option is kept in an attribute of the same name, from which repr, copies and pickles are made. A
    copy has the same options and a state of its own.

    Args:
        name: What errors, events and statistics call it; its repr if None (the default).
    """

    _parameters: ClassVar[Mapping[str, inspect.Parameter]]

    __slots__ = ("__dict__", "__weakref__", "_lock")

    def __init__(self, *, name: str | None = None) -> None:
        self.name = options.name(type(self).__name__, name)
        self._listeners = events.Listeners()
        self._lock = threading.Lock()
        _living.add(self)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._parameters = inspect.signature(cls).parameters

    def listen(self, listener: events.Listener) -> events.Subscription:
        """Hear the events of this object.

        Args:
            listener: A sync function of one `Event`.

        Returns:
            A subscription: `close()` it, or use it in a `with` statement, to stop.

        Raises:
            TypeError: The listener is not callable, or is async.
        """
        return self._listeners.add(listener)

    def fresh(self) -> Self:
        """Return a copy with the same options and a state of its own."""
        return type(self)(*self._positional(), **self._keywords())

    @functools.cached_property
    def label(self) -> str:
        """What errors and events call this object."""
        return self.name or repr(self)

    def emit(self, event: type[events.Event], **fields: Any) -> None:
        """Build an event and deliver it, if anybody listens. Never call this while holding a lock."""
        listeners = self._listeners.current + events.everywhere.current
        if listeners:
            events.deliver(event(policy=self.label, at=runtime.now(), **fields), listeners)

    def after_fork(self) -> None:
        """Make the state usable in a forked child, where only the thread that forked goes on."""
        self._lock = threading.Lock()

    def _positional(self) -> tuple[Any, ...]:
        return tuple(
            value
            for option in self._parameters.values()
            if option.kind is option.VAR_POSITIONAL
            for value in getattr(self, option.name)
        )

    def _keywords(self) -> dict[str, Any]:
        return {
            option.name: getattr(self, option.name)
            for option in self._parameters.values()
            if option.kind in (option.POSITIONAL_OR_KEYWORD, option.KEYWORD_ONLY) and hasattr(self, option.name)
        }

    def changed_options(self) -> set[str]:
        """Return the names of the options that differ from their defaults."""
        parameters = self._parameters
        return {
            option
            for option, value in self._keywords().items()
            if value is not parameters[option].default and value != parameters[option].default
        }

    def __repr__(self) -> str:
        """Show the options that differ from their defaults."""
        changed = self.changed_options()
        shown = [_show(value) for value in self._positional()]
        for option, value in self._keywords().items():
            if option in changed:
                keyword_only = self._parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
                shown.append(f"{option}={_show(value)}" if keyword_only else _show(value))
        return f"{type(self).__name__}({', '.join(shown)})"

    def __copy__(self) -> Self:
        return self.fresh()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.fresh()

    def __reduce__(self) -> tuple[Any, ...]:
        changed = self.changed_options()  # a default is known by its identity, which a pickle does not keep
        keywords = {option: value for option, value in self._keywords().items() if option in changed}
        return _remake, (type(self), self._positional(), keywords)


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, type) or inspect.isroutine(value):
        return str(value.__qualname__)
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _remake(cls: type[Component], positional: tuple[Any, ...], keywords: dict[str, Any]) -> Component:
    return cls(*positional, **keywords)


_living: weakref.WeakSet[Component] = weakref.WeakSet()


def _after_fork() -> None:
    for component in list(_living):
        try:
            component.after_fork()
        except AttributeError:  # its constructor refused an option: nobody can use it
            continue


os.register_at_fork(after_in_child=_after_fork)
