"""The base of all policies: what a user can do with any of them, whatever its kind."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, Self, TypeVar

from resilient import blocks, options
from resilient.call import AsyncNext, Call, Next, with_own_code
from resilient.component import Component
from resilient.edge import FUNCTION, Edge, ajudged, arestoring, judge_statuses, judged, restoring
from resilient.functions import decorate, refuse_called, refuse_function

if TYPE_CHECKING:
    from resilient.pipeline import Pipeline

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound="Callable[..., Any] | classmethod[Any, ..., Any] | staticmethod[..., Any]")


class Policy(Component, ABC):
    """One rule that guards a call.

    The object is the state: share the object and you share the state. Every option is kept in an attribute
    of the same name. To write a policy of your own, derive from one of the kinds in `resilient.kinds`; to
    derive from this class directly means to write `link` and `alink` by hand.

    Args:
        name: What errors, events and statistics call this policy; its repr if None (the default).
    """

    judge: Callable[[Call, Any], BaseException | None] | None = None
    """Tells which results are failures, or None; asked at the innermost point of the pipeline."""

    @abstractmethod
    def link(self, nxt: Next, edge: Edge) -> Next:
        """Return a function of a call that guards the sync function `nxt`; called once, not per call."""

    @abstractmethod
    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        """Return a coroutine function of a call that guards `nxt`."""

    def close_alone(self, function: Callable[..., Any]) -> Callable[..., Any] | None:
        """Return a guarded sync function that does without a chain, or None if there is no such shortcut."""
        return None

    def judge_statuses_of(self, wanted: "options.Errors") -> None:
        """Have responses with the status codes that an option names count as failures."""
        statuses = options.statuses(wanted)
        if statuses:
            self.judge = judge_statuses(statuses)

    # -- using it ---------------------------------------------------------------------------------------------

    def __call__(self, function: F, /) -> F:
        """Guard a function: use the policy as a decorator.

        Args:
            function: A function, coroutine function, method, classmethod, staticmethod, partial or any other
                callable object.

        Returns:
            A callable of the same signature and colour.

        Raises:
            TypeError: A generator function or a class, which cannot be guarded; or a policy that is not fit
                for plain functions, such as `Retry` without `on=`.
        """
        return decorate(self, function)  # type: ignore[no-any-return]

    def call(self, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a sync function under this policy, without decorating it."""
        if not callable(function):
            refuse_called("call", function)
        result = self.chain_of_functions(Call(function, args, kwargs))
        if result.__class__ is GeneratorType:
            refuse_function(self, function)
        return result  # type: ignore[no-any-return]

    async def acall(self, function: Callable[P, Awaitable[R]], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call an async function (or one that returns an awaitable) under this policy."""
        if not callable(function):
            refuse_called("acall", function)
        return await self.achain_of_functions(Call(function, args, kwargs))  # type: ignore[no-any-return]

    def __or__(self, inner: "Policy") -> "Pipeline":
        """Compose: `a | b` is `Pipeline(a, b)`, with `a` outermost."""
        from resilient.pipeline import Pipeline

        return Pipeline(self, inner) if isinstance(inner, Policy | type) else NotImplemented

    def statistics(self) -> Any:
        """Return a frozen snapshot of the policy's state and counters; None if it keeps none."""
        return None

    # -- blocks -----------------------------------------------------------------------------------------------

    def block(self) -> AbstractContextManager[None]:
        """Return a context manager that guards one block; `with policy:` is the short form."""
        self.refuse_block()

    def ablock(self) -> AbstractAsyncContextManager[None]:
        """Return an async context manager that guards one block; `async with policy:` is the short form."""
        self.refuse_block()

    def refuse_block(self) -> NoReturn:
        """Say why this policy cannot guard a block."""
        raise TypeError(
            f"{type(self).__name__} cannot guard a `with` block: it may have to skip the block, replace its "
            "result or run it again, and Python gives a context manager no way to do that. Decorate a function "
            "instead, or use call()/acall()"
        )

    def __enter__(self) -> Self:
        blocks.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return blocks.leave(self, kind, error, trace)

    async def __aenter__(self) -> Self:
        await blocks.aenter(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await blocks.aleave(self, kind, error, trace)

    # -- for the kinds -----------------------------------------------------------------------

    def idle(self, now: float) -> bool:
        """Tell whether the state equals that of a fresh policy, so that forgetting it changes nothing."""
        return True

    def walk(self) -> Iterator["Policy"]:
        """Go through this policy and the policies in it."""
        yield self

    def chain(self, edge: Edge) -> Next:
        """Link a sync chain that ends at `edge`."""
        judges = self._judges(edge)
        end = edge.end()
        linked = with_own_code(self.link(judged(end, judges) if judges else end, edge))
        return restoring(linked) if judges and not edge.judges else linked

    def achain(self, edge: Edge) -> AsyncNext:
        """Link an async chain that ends at `edge`."""
        judges = self._judges(edge)
        end = edge.aend()
        linked = with_own_code(self.alink(ajudged(end, judges) if judges else end, edge))
        return arestoring(linked) if judges and not edge.judges else linked

    def _judges(self, edge: Edge) -> list[Callable[[Call, Any], BaseException | None]]:
        judges = [policy.judge for policy in self.walk() if policy.judge is not None]
        if type(edge).failed is not Edge.failed and not edge.judges:
            judges.append(lambda _call, result: edge.failed(result))
        return judges

    @functools.cached_property
    def chain_of_functions(self) -> Next:
        return self.chain(FUNCTION)

    @functools.cached_property
    def achain_of_functions(self) -> AsyncNext:
        return self.achain(FUNCTION)
