"""Partitions: one policy for each key, such as a circuit breaker for each host."""

import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NoReturn, TypeAlias
from weakref import WeakKeyDictionary

from cachetools import Cache, LRUCache

from resilient import events, options, runtime
from resilient.call import AsyncNext, Call, Next, with_own_code
from resilient.edge import Edge, error_of
from resilient.kinds import covered
from resilient.policy import Policy
from resilient.table import OVERFLOW

_PROBES = 16


class Keyed(Policy):
    """Give each key a policy of its own, so that one bad host, tenant or customer does not stop the others.

    Args:
        factory: A function without arguments that makes the policy of a new key, for example
            `lambda: CircuitBreaker(consecutive=5)`, or a policy class.
        key: A function of the call's arguments that returns the key (hashable). Default: the key of the edge,
            such as the origin of an HTTP request; for plain functions there is only one.
        max_keys: How many keys have a policy of their own. The least recently used one whose policy is idle is
            forgotten first; if none is idle, new keys share one policy, as forgetting would reset an open
            breaker or an exhausted limit. Default 1024.
        name: What errors and events call this policy. Default: its repr.

    Emits:
        PartitionsFull, and whatever the policies emit.
    """

    def __init__(
        self,
        factory: Callable[[], Policy],
        *,
        key: Callable[..., Hashable] | None = None,
        max_keys: int = 1024,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        if not _makes_something(factory) or isinstance(factory, Policy):
            allowed = "a function that makes a new policy, such as `lambda: CircuitBreaker()`"
            raise options.refuse("Keyed", "factory", factory, allowed, TypeError)
        self.factory = factory
        self.key = None if key is None else options.function("Keyed", "key", key)
        self.max_keys = options.whole("Keyed", "max_keys", max_keys)
        self._partitions = _Partitions(self.max_keys)
        self._last: _Partition | None = None  # the one used last: to find it again needs neither lock nor table
        self.template = self._make()  # a bad factory fails here, not at the first call
        if any(policy.judge is not None for policy in self.template.walk()):
            self.judge = self._judge

    def link(self, nxt: Next, edge: Edge) -> Next:
        return self._keyed(edge, lambda policy: policy.link(nxt, edge))

    def alink(self, nxt: AsyncNext, edge: Edge) -> AsyncNext:
        return self._keyed(edge, lambda policy: policy.alink(nxt, edge))

    def _keyed(self, edge: Edge, link: Callable[[Policy], Callable[[Call], Any]]) -> Callable[[Call], Any]:
        probe = link(self._make())  # a policy that does not fit the edge says so now
        key_of = edge.key if self.key is None else self._key_of
        links: _Links = WeakKeyDictionary()  # here and not there: partitions outlive the transports of a client
        last: tuple[object, Any] = None, None

        def keyed(call: Call) -> Any:
            nonlocal last
            key = key_of(call)
            partition = self._last
            if partition is None or partition.key != key:
                partition = self._partition(key)
            known, linked = last
            if known is not partition:
                linked = links.get(partition)
                if linked is None:
                    linked = links.setdefault(partition, with_own_code(link(partition.policy)))
                last = partition, linked
            return linked(call)

        return covered(keyed, probe)

    def refuse_block(self) -> NoReturn:
        """Say why a block has no partition."""
        raise TypeError(
            "Keyed cannot guard a `with` block: the key is taken from the arguments of the call, and a block has "
            "none. Decorate a function instead, or guard the block by `keyed.of(key)`"
        )

    def of(self, key: Hashable) -> Policy:
        """Return the policy of a key: to look at its state, or to open a breaker by hand."""
        return self._partition(key).policy

    def policies(self) -> dict[Hashable, Policy]:
        """Return the policies of all keys that are remembered."""
        with self._lock:
            return {key: self._partitions.peek(key).policy for key in self._partitions}

    def statistics(self) -> dict[Hashable, Any]:
        """Return the statistics of every key's policy."""
        return {key: policy.statistics() for key, policy in self.policies().items()}

    def idle(self, now: float) -> bool:
        return all(policy.idle(now) for policy in self.policies().values())

    def _make(self) -> Policy:
        policy = self.factory()
        if not isinstance(policy, Policy):
            raise TypeError(f"Keyed: factory returned {policy!r}, which is not a policy")
        for part in policy.walk():
            part._listeners = self._listeners
        return policy

    def _make_for(self, key: Hashable) -> Policy:
        return self._make()

    def _judge(self, call: Call, result: Any) -> BaseException | None:
        """Ask the judges of the partition, and no others, as some learn from what they see."""
        partition = self._partition(call.edge.key(call) if self.key is None else self._key_of(call))
        judges = [policy.judge for policy in partition.policy.walk() if policy.judge is not None]
        return error_of(judges, call, result)

    def _key_of(self, call: Call) -> Hashable:
        assert self.key is not None  # noqa: S101 - the caller has looked
        key: Hashable = self.key(*call.args, **call.kwargs)
        return key

    def _partition(self, key: Hashable) -> "_Partition":
        try:
            hash(key)
        except TypeError:
            raise TypeError(f"{self.label}: key= returned {type(key).__name__}, which is not hashable") from None
        with self._lock:
            partition = self._partitions.get(key)
            if partition is None:
                partition = self._partitions.get(OVERFLOW)
                full = not self._partitions.make_room(runtime.now())
                if not full or partition is None:
                    place = OVERFLOW if full else key
                    partition = self._partitions[place] = _Partition(key, self._make_for(place))
            else:
                full = False
            self._last = partition if partition.key == key and not full else None
        if full:
            self.emit(events.PartitionsFull, max_keys=self.max_keys)
        return partition


def members(policy: Policy) -> Iterator[Policy]:
    """Go through a policy and the policies in it, and through one of those that each `Keyed` in it makes."""
    for member in policy.walk():
        yield member
        if isinstance(member, Keyed):
            yield from members(member.template)


class _Partition:
    """The policy of one key."""

    __slots__ = ("__weakref__", "key", "policy")

    def __init__(self, key: Hashable, policy: Policy) -> None:
        self.key = key
        self.policy = policy


_Links: TypeAlias = WeakKeyDictionary[_Partition, Any]


class _Partitions(LRUCache[Hashable, _Partition]):
    """Partitions in the order of their last use, with one place more for the overflow partition."""

    def __init__(self, max_keys: int) -> None:
        super().__init__(maxsize=max_keys + 1)
        self._max_keys = max_keys

    def peek(self, key: Hashable) -> _Partition:
        """Return a partition without using it: the order stays."""
        return Cache.__getitem__(self, key)

    def make_room(self, now: float) -> bool:
        """Forget an idle partition if the table is full; tell whether there is room now."""
        if len(self) - (OVERFLOW in self) < self._max_keys:
            return True
        for _ in range(_PROBES):
            key, partition = self.popitem()
            if key is not OVERFLOW and partition.policy.idle(now):
                return True
            self[key] = partition  # still needed: back in, as the one used last
        return False


def _makes_something(factory: Any) -> bool:
    """Tell whether this can be called without arguments, and without awaiting."""
    if not callable(factory) or options.is_async(factory):
        return False
    try:
        inspect.signature(factory).bind()
    except ValueError:  # no signature, as some builtins: calling it will tell
        return True
    except TypeError:
        return False
    return True
