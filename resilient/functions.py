"""Guarding functions of every sort.

A plain function gets a plain closure, which costs a sixth of a wrapt proxy. Everything else that can be
called (partials, bound methods, callable objects) gets the proxy, which keeps binding and introspection right.
"""

import functools
import inspect
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

import wrapt

from resilient import runtime
from resilient.call import Call, with_own_code
from resilient.component import Component
from resilient.options import is_async, is_generator

if TYPE_CHECKING:
    from resilient.policy import Policy


def decorate(policy: "Policy", function: Any) -> Any:
    """Return `function` guarded by `policy`, of the same colour and signature."""
    if isinstance(function, classmethod | staticmethod):
        return type(function)(decorate(policy, function.__func__))
    refuse_function(policy, function)
    if isinstance(function, FunctionType):
        return _close_async(policy, function) if is_async(function) else _close_sync(policy, function)
    if is_async(function):
        achain = policy.achain_of_functions

        async def aguarded(wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return await achain(Call(wrapped, args, kwargs))  # the call begins when it is awaited

        return wrapt.FunctionWrapper(function, aguarded)
    chain = policy.chain_of_functions

    def guarded(wrapped: Any, _instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return chain(Call(wrapped, args, kwargs))

    return wrapt.FunctionWrapper(function, guarded)


def _close_sync(policy: "Policy", function: FunctionType) -> Any:
    alone = policy.close_alone(function)
    if alone is not None:
        return functools.wraps(function)(with_own_code(alone))
    chain, new = policy.chain_of_functions, object.__new__

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        call = new(Call)  # what Call() does, done here: on CPython 3.11 an __init__ costs as much as a policy
        call.function = function
        call.args = args
        call.kwargs = kwargs
        call.now = runtime.now()
        call.attempt = 1
        call.abandoned = ()
        return chain(call)

    return with_own_code(guarded)


def _close_async(policy: "Policy", function: FunctionType) -> Any:
    chain, new = policy.achain_of_functions, object.__new__

    @functools.wraps(function)
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        call = new(Call)  # see _close_sync
        call.function = function
        call.args = args
        call.kwargs = kwargs
        call.now = runtime.now()
        call.attempt = 1
        call.abandoned = ()
        return await chain(call)

    return with_own_code(guarded)


def refuse_called(method: str, result: Any) -> NoReturn:
    """Refuse what stands where a function should: most of the time what the function has returned."""
    if inspect.iscoroutine(result):
        result.close()  # nobody will await it
    raise TypeError(
        f"{method}() takes the function and then its arguments, as in {method}(fetch, url): {result!r} cannot be "
        "called, and if it is what the function returned, no policy has guarded that"
    )


def refuse_function(policy: "Policy", function: Any) -> None:
    """Refuse what calls itself a function but would run unguarded."""
    who = type(policy).__name__
    if not callable(function):
        raise TypeError(f"{who} can only guard something that can be called, not {function!r}")
    if isinstance(function, type):
        raise TypeError(
            f"{who} cannot guard the class {function.__qualname__}; guard its methods, which "
            f"resilient.instrument(module, '{function.__qualname__}.method', policy) does where it is not yours"
        )
    if isinstance(function, Component):
        raise TypeError(
            f"{who} cannot guard {function!r}, which guards functions itself: what is decorated by it would get "
            "past this policy. Combine the two by | or in a Pipeline"
        )
    if is_generator(function):
        raise TypeError(
            f"{who} cannot guard the generator function {getattr(function, '__qualname__', function)!r}: calling "
            "it only creates a generator, so its body would run unguarded. Guard the function that opens the "
            "stream, or one that fetches a single item or page"
        )
