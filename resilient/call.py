"""One invocation travelling through a pipeline."""

from collections.abc import Awaitable, Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from resilient import runtime

if TYPE_CHECKING:
    from resilient.edge import Edge
    from resilient.workers import Job


class Call:
    """A function, the arguments it is called with, and what the policies need to know about this one call.

    It is made for every guarded call, so it is kept light.

    Args:
        function: What will be called at the innermost point.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Attributes:
        now: When the call got to where it is, in seconds. Who lets time pass before calling on sets it anew: so
            one reading of the clock serves all policies that come after each other without waiting.
        attempt: The number of the attempt that is running, counted from 1 by the innermost `Loop`.
        abandoned: Work of this call that goes on in threads which nobody waits for any more (sync `Timeout`).
        edge: What the call ends at.
    """

    if TYPE_CHECKING:
        edge: (
            Edge  # an attribute of the class, so that calls of functions need no place for it; see resilient.edge
        )

    __slots__ = ("abandoned", "args", "attempt", "function", "kwargs", "now")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs
        self.now = runtime.now()
        self.attempt = 1
        self.abandoned: tuple[Job, ...] = ()

    @classmethod
    def of_block(cls) -> "Call":
        """Return a call that stands for a `with` block: there is no function, and there are no arguments."""
        return cls(_block, (), {})

    def copy(self) -> "Call":
        """Return a call of the same function and arguments, for running it twice at the same time."""
        return Call(self.function, self.args, self.kwargs)


Next: TypeAlias = Callable[[Call], Any]
AsyncNext: TypeAlias = Callable[[Call], Awaitable[Any]]

N = TypeVar("N", bound=Callable[..., Any])


def with_own_code(closure: N) -> N:
    """Give a closure a code object of its own.

    CPython adapts the code of a function to what it sees there (PEP 659). All closures made by one `def` share
    their code, so without this the layers of one policy would undo what the layers of another have learned.
    """
    if isinstance(closure, FunctionType) and closure.__closure__:
        closure.__code__ = closure.__code__.replace()
    return closure


def _block() -> None:
    """Stand in for the function of a call that is really a `with` block."""


def is_block(call: Call) -> bool:
    """Tell whether the call stands for a `with` block, which has no arguments."""
    return call.function is _block
