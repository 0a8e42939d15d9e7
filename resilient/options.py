"""Checks of options, so that a bad one fails at construction and says what is allowed.

Every message has the same form: `Timeout: seconds=-1 is not allowed; give a number of seconds > 0`.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeAlias

import wrapt
from tenacity.retry import retry_base

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 5.6.2

Seconds: TypeAlias = float | timedelta
"""A duration: seconds as a number, or a timedelta."""

Decide: TypeAlias = Callable[[Exception], object]
Several: TypeAlias = tuple[type[BaseException] | int | Decide, ...] | frozenset[Any] | set[Any] | list[Any]
Errors: TypeAlias = type[BaseException] | Decide | Several
"""Which errors: an exception class, a function of the error, or several of them and of HTTP status codes."""


def refuse(owner: str, option: str, value: object, allowed: str, kind: type[Exception] = ValueError) -> Exception:
    """Build the error for a bad option."""
    return kind(f"{owner}: {option}={value!r} is not allowed; give {allowed}")


def seconds(owner: str, option: str, value: Any, *, zero: bool = False) -> float:
    """Return a duration in seconds, which must be finite and > 0 (or >= 0 where `zero` is allowed)."""
    allowed = f"a number of seconds (or a timedelta) {'>=' if zero else '>'} 0"
    length = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise misused(owner, option, value, allowed)
    if not math.isfinite(length) or length < 0 or (length == 0 and not zero):
        raise refuse(owner, option, value, allowed)
    return float(length)


def whole(owner: str, option: str, value: Any, *, minimum: int = 1) -> int:
    """Return an int that is at least `minimum`."""
    allowed = f"an int >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise misused(owner, option, value, allowed)
    if value < minimum:
        raise refuse(owner, option, value, allowed)
    return value


def fraction(owner: str, option: str, value: Any, *, zero: bool = False) -> float:
    """Return a number in (0, 1], or in [0, 1] where `zero` is allowed."""
    allowed = f"a number {'from 0' if zero else 'above 0 and'} up to 1"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(owner, option, value, allowed, TypeError)
    if not 0 <= value <= 1 or (value == 0 and not zero):
        raise refuse(owner, option, value, allowed)
    return float(value)


def flag(owner: str, option: str, value: Any) -> bool:
    """Return a bool, and nothing that only looks like one."""
    if not isinstance(value, bool):
        raise refuse(owner, option, value, "True or False", TypeError)
    return value


def name(owner: str, value: Any) -> str | None:
    """Return a policy's name: a non-empty str, or None."""
    if value is not None and not isinstance(value, str):
        raise refuse(owner, "name", value, "a str or None", TypeError)
    if value == "":
        raise refuse(owner, "name", value, "a non-empty str or None")
    return value


def header_name(owner: str, option: str, value: Any) -> str:
    """Return the name of a header, in lower case."""
    allowed = 'the name of a header, such as "x-request-timeout"'
    if not isinstance(value, str):
        raise refuse(owner, option, value, allowed, TypeError)
    if not _TOKEN.fullmatch(value):
        raise refuse(owner, option, value, allowed)
    return value.lower()


def function(owner: str, option: str, value: Any) -> Callable[..., Any]:
    """Return a sync function (or any other callable that is not async)."""
    if not callable(value) or isinstance(value, type):
        raise refuse(owner, option, value, "a function", TypeError)
    if is_async(value):
        raise refuse(owner, option, value, "a sync function: policies decide without awaiting", TypeError)
    checked: Callable[..., Any] = value
    return checked


def errors(owner: str, option: str, value: Any) -> "Errors":
    """Return an exception class, a function of the error, or a tuple of them and of status codes."""
    several = "a tuple or set of them and of HTTP status codes (100 to 599)"
    allowed = f"an exception class, a function of the error, or {several}"
    if not isinstance(value, tuple | set | frozenset | list):
        _check_error(owner, option, value, value, allowed)
        checked: Errors = value
        return checked
    if not value:
        raise refuse(owner, option, value, allowed)
    for member in value:
        if isinstance(member, int) and not isinstance(member, bool):
            if not 100 <= member <= 599:  # noqa: PLR2004 - as the message says
                raise refuse(owner, option, value, allowed)
        else:
            _check_error(owner, option, value, member, allowed)
    return tuple(value)


def _check_error(owner: str, option: str, value: Any, member: Any, allowed: str) -> None:
    if isinstance(member, retry_base):
        allowed += "; a strategy of tenacity looks at a state of its own, and works only as Retry(on=) and alone"
    elif isinstance(member, type):
        if issubclass(member, BaseException):
            _refuse_uncaught(owner, option, value, member)
            return
    elif callable(member):
        function(owner, option, member)
        return
    raise refuse(owner, option, value, allowed, TypeError)


def _refuse_uncaught(owner: str, option: str, value: Any, kind: type[BaseException]) -> None:
    if not (issubclass(kind, Exception) or issubclass(ExceptionGroup, kind)):
        allowed = f"subclasses of Exception: {kind.__name__} always passes straight through"
        raise refuse(owner, option, value, allowed)


def statuses(wanted: "Errors") -> frozenset[int]:
    """Return the status codes among the wanted errors; `wanted` comes from `errors`."""
    return frozenset(each for each in _members(wanted) if isinstance(each, int))


def classes(wanted: "Errors") -> tuple[type[BaseException], ...]:
    """Return the exception classes among the wanted errors; `wanted` comes from `errors`."""
    return tuple(each for each in _members(wanted) if isinstance(each, type))


def functions(wanted: "Errors") -> tuple[Decide, ...]:
    """Return the functions among the wanted errors; `wanted` comes from `errors`."""
    return tuple(each for each in _members(wanted) if not isinstance(each, int | type))


def _members(wanted: "Errors") -> tuple[Any, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error stands for, if it says so as those of httpx and of SDKs do."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status", "status_code"):
            status = getattr(holder, name, None)
            if isinstance(status, int):
                return status
    return None


def matcher(wanted: "Errors") -> Callable[[Exception], object]:
    """Return a function that tells whether an error is wanted; `wanted` comes from `errors`.

    An exception group is wanted if each error in it is: a group of one transient and one fatal error is fatal.
    """
    if not isinstance(wanted, type | tuple):
        return wanted  # type: ignore[return-value]  # errors() leaves only a function
    kinds, names = classes(wanted), naming(wanted)

    def matches(error: Any) -> bool:
        if isinstance(error, kinds) or names(error):
            return True
        return isinstance(error, BaseExceptionGroup) and all(matches(each) for each in error.exceptions)

    return matches


def naming(wanted: "Errors") -> Callable[[Exception], bool]:
    """Return a function that tells whether an error is wanted by its status or by a function."""
    codes, deciders = statuses(wanted), functions(wanted)

    def names(error: Exception) -> bool:
        if codes and status_of(error) in codes:
            return True
        return any(decide(error) for decide in deciders)

    return names


def is_async(function: Any) -> bool:
    """Tell whether calling this gives an awaitable: coroutine functions, also inside partials and `__call__`."""
    while True:
        if hasattr(function, "func") and hasattr(function, "keywords"):
            function = function.func
        elif isinstance(function, wrapt.FunctionWrapper | wrapt.BoundFunctionWrapper):
            function = function.__wrapped__  # the proxy's own `__call__` is sync, whatever it stands for
        else:
            break
    return inspect.iscoroutinefunction(function) or (
        callable(function)
        and not isinstance(function, type)
        and inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
    )


def is_generator(function: Any) -> bool:
    """Tell whether calling this only makes a generator, sync or async, whose body does not run yet."""
    while isinstance(function, functools.partial):
        function = function.func
    shapes = (function, getattr(function, "__call__", None))  # noqa: B004 - to look at it, not to ask whether it is
    return any(inspect.isgeneratorfunction(shape) or inspect.isasyncgenfunction(shape) for shape in shapes)


def misused(owner: str, option: str, value: Any, allowed: str) -> Exception:
    """Build the error for an option of the wrong type, which may be a function that was to be decorated."""
    if inspect.isroutine(value):
        allowed += f". To decorate a function write @{owner}({option}=...) with parentheses"
    return refuse(owner, option, value, allowed, TypeError)
