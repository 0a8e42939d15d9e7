"""Policies in order, outermost first."""

import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from typing import Any

from resilient import events, options
from resilient.call import AsyncNext, Call, Next, with_own_code
from resilient.edge import Edge
from resilient.errors import FailedResult
from resilient.policy import Policy


class Pipeline(Policy):
    """Guard a call by several policies, the first one outermost; `a | b` builds the same.

    A pipeline is itself a policy, so pipelines nest. It adds nothing to the cost of its policies.

    Args:
        *policies: The policies, outermost first. None at all is allowed: such a pipeline only calls.
        failed: A function of a result that tells whether it counts as a failure. Policies then see a
            `FailedResult` error; if none of them handles it, the caller gets the result itself.
        name: What the pipeline is called in statistics and reprs.

    Raises:
        TypeError: Something that is not a policy.
    """

    def __init__(
        self, *policies: Policy, failed: Callable[[Any], object] | None = None, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        for policy in policies:
            if not isinstance(policy, Policy):
                raise TypeError(f"Pipeline: {policy!r} is not a policy{_hint(policy)}")
        self.policies = policies
        self.failed = None if failed is None else options.function("Pipeline", "failed", failed)
        if self.failed is not None:
            self.judge = self._judge

    def _judge(self, _call: Call, result: Any) -> BaseException | None:
        return FailedResult(result) if self.failed is not None and self.failed(result) else None

    def link(self, nxt: Next, edge: Edge) -> Next:
        for policy in reversed(self.policies):
            nxt = with_own_code(policy.link(nxt, edge))
        return nxt

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        for policy in reversed(self.policies):
            nxt = with_own_code(policy.alink(nxt, edge))
        return nxt

    def walk(self) -> Iterator[Policy]:
        yield self
        for policy in self.policies:
            yield from policy.walk()

    def __or__(self, inner: Policy) -> "Pipeline":
        if not isinstance(inner, Policy | type):  # of a class the constructor says what is missing
            return NotImplemented
        if self.name is None and self.failed is None:
            return Pipeline(*self.policies, inner)
        return Pipeline(self, inner)

    def listen(self, listener: events.Listener) -> events.Subscription:
        """Hear the events of every policy in this pipeline.

        A policy that is shared with another pipeline reports the calls of both.
        """
        members = {id(policy): policy for policy in self.walk() if policy is not self}
        subscriptions = [Policy.listen(policy, listener) for policy in (self, *members.values())]

        def close() -> None:
            for subscription in subscriptions:
                subscription.close()

        return events.Subscription(close)

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the policies that keep any, by label (`label #2` for a second one)."""
        collected: dict[str, Any] = {}
        for policy in self.walk():
            snapshot = None if isinstance(policy, Pipeline) else policy.statistics()
            if snapshot is not None:
                times = sum(label.partition(" #")[0] == policy.label for label in collected)
                collected[f"{policy.label} #{times + 1}" if times else policy.label] = snapshot
        return collected

    def _positional(self) -> tuple[Any, ...]:
        return self.policies

    def block(self) -> AbstractContextManager[None]:
        return _all_of([policy.block() for policy in self.policies])  # refusals come before anything is entered

    def ablock(self) -> AbstractAsyncContextManager[None]:
        return _aall_of([policy.ablock() for policy in self.policies])


def _hint(thing: object) -> str:
    """Say what may have been meant by something that is not a policy."""
    if isinstance(thing, type):
        return f"; write {thing.__name__}() with parentheses"
    if isinstance(thing, list | tuple):
        return "; give several one by one, as in Pipeline(*policies)"
    from resilient.policies.retry_budget import RetryBudget

    if isinstance(thing, RetryBudget):
        return "; give it to a Retry, as its budget="
    if inspect.isroutine(thing):
        return ". To decorate a function write @Pipeline(...) with policies in the parentheses"
    return ""


@contextmanager
def _all_of(blocks: list[AbstractContextManager[None]]) -> Iterator[None]:
    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        yield


@asynccontextmanager
async def _aall_of(blocks: list[AbstractAsyncContextManager[None]]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for block in blocks:
            await stack.enter_async_context(block)
        yield
