import functools
from datetime import timedelta
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient import options


def refused(kind, check, *args, **kwargs):
    with pytest.raises(kind) as caught:
        check("Owner", "option", *args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"Owner: option={args[0]!r} is not allowed; give "), message
    return message


@given(st.floats(min_value=1e-9, max_value=1e9))
def test_seconds(value):
    assert options.seconds("Owner", "option", value) == value
    assert options.seconds("Owner", "option", timedelta(seconds=2)) == 2.0
    assert isinstance(options.seconds("Owner", "option", 3), float)


def test_bad_seconds():
    for value in (0, -1, nan, inf, -inf, timedelta(0), timedelta(seconds=-1)):
        refused(ValueError, options.seconds, value)
    for value in ("2", None, True, False, [1], 1j):
        refused(TypeError, options.seconds, value)
    assert options.seconds("Owner", "option", 0, zero=True) == 0.0
    assert "> 0" in refused(ValueError, options.seconds, -1)
    assert ">= 0" in refused(ValueError, options.seconds, -1, zero=True)


def test_a_function_in_the_place_of_seconds_looks_like_a_decorator_without_parentheses():
    def decorated():
        pass

    assert "write @Owner(option=...) with parentheses" in refused(TypeError, options.seconds, decorated)
    assert "write @Owner(option=...) with parentheses" in refused(TypeError, options.whole, decorated)


def test_whole():
    assert options.whole("Owner", "option", 1) == 1
    assert options.whole("Owner", "option", 0, minimum=0) == 0
    for value in (0, -1):
        refused(ValueError, options.whole, value)
    for value in (1.0, True, "1", None, nan):
        refused(TypeError, options.whole, value)


def test_fraction():
    assert options.fraction("Owner", "option", 1) == 1.0
    assert options.fraction("Owner", "option", 0, zero=True) == 0.0
    for value in (0, -0.1, 1.1, nan, inf):
        refused(ValueError, options.fraction, value)
    refused(ValueError, options.fraction, -0.1, zero=True)
    for value in ("0.5", True, None):
        refused(TypeError, options.fraction, value)


def test_flag():
    assert options.flag("Owner", "option", False) is False
    for value in (0, 1, None, "True"):
        refused(TypeError, options.flag, value)


async def an_async_function():
    pass


class AsyncCallable:
    async def __call__(self):
        pass


class Callable:
    def __call__(self):
        pass


def test_function():
    call = Callable()
    assert options.function("Owner", "option", len) is len
    assert options.function("Owner", "option", call) is call
    for value in (3, None, int, an_async_function, AsyncCallable(), functools.partial(an_async_function)):
        refused(TypeError, options.function, value)


def test_is_async():
    assert options.is_async(an_async_function)
    assert options.is_async(AsyncCallable())
    assert options.is_async(functools.partial(functools.partial(an_async_function)))
    assert not options.is_async(AsyncCallable)
    assert not options.is_async(Callable())
    assert not options.is_async(3)
    assert not options.is_async(len)


def test_errors():
    def choose(error):
        return True

    assert options.errors("Owner", "option", OSError) is OSError
    assert options.errors("Owner", "option", (OSError, ValueError)) == (OSError, ValueError)
    assert set(options.errors("Owner", "option", {OSError, ValueError})) == {OSError, ValueError}
    assert options.errors("Owner", "option", frozenset([OSError])) == (OSError,)
    assert options.errors("Owner", "option", choose) is choose
    for value in ((), [], set()):
        refused(ValueError, options.errors, value)
    for value in (3, int, (OSError, 3), "OSError", OSError(), an_async_function, None):
        refused(TypeError, options.errors, value)


def test_matcher():
    of_class, of_several = options.matcher(OSError), options.matcher((OSError, KeyError))
    assert of_class(ConnectionError())
    assert not of_class(ValueError())
    assert of_several(KeyError())
    assert options.matcher(bool) is not bool, "bool is a class"
    chosen = lambda error: "yes" in error.args  # noqa: E731
    assert options.matcher(chosen) is chosen


def test_a_group_is_wanted_if_all_in_it_are():
    matches = options.matcher(OSError)
    assert matches(ExceptionGroup("all", [OSError(), ExceptionGroup("inner", [ConnectionError()])]))
    assert not matches(ExceptionGroup("mixed", [OSError(), ValueError()]))
    assert options.matcher(ExceptionGroup)(ExceptionGroup("any", [ValueError()]))
