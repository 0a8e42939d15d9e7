import asyncio
import functools
from datetime import timedelta
from http import HTTPStatus
from math import inf, nan
from types import SimpleNamespace

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from resilient import FailedResponse, FailedResult, options


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
    for value in (3, 503, int, (OSError, "3"), (OSError, True), "OSError", OSError(), an_async_function, None):
        refused(TypeError, options.errors, value)


def test_errors_that_no_policy_ever_catches():
    for value in (KeyboardInterrupt, asyncio.CancelledError, (OSError, SystemExit), {GeneratorExit}):
        assert "always passes straight through" in refused(ValueError, options.errors, value)
    for value in (BaseException, BaseExceptionGroup, (Exception, ExceptionGroup)):
        assert options.errors("Owner", "option", value) == value


def test_errors_may_be_status_codes():
    assert options.errors("Owner", "option", (503,)) == (503,)
    assert set(options.errors("Owner", "option", {429, 503, OSError})) == {429, 503, OSError}
    assert options.errors("Owner", "option", [100, 599, HTTPStatus.BAD_GATEWAY]) == (100, 599, 502)
    for value in ((99,), (600,), (OSError, 3), [-1], (503, 0)):
        assert "HTTP status codes (100 to 599)" in refused(ValueError, options.errors, value)


def test_errors_may_be_functions_beside_classes_and_statuses():
    assert options.errors("Owner", "option", [OSError, 503, len]) == (OSError, 503, len)
    for value in ((OSError, an_async_function), {503, functools.partial(an_async_function)}):
        with pytest.raises(TypeError, match=r"an_async_function.* is not allowed; give a sync function"):
            options.errors("Owner", "option", value)


def test_strategies_of_tenacity_are_no_functions_of_the_error():
    strategy = tenacity.retry_if_exception_type(OSError)
    for value in (strategy, strategy | strategy, (503, strategy)):
        assert "works only as Retry(on=) and alone" in refused(TypeError, options.errors, value)


def test_a_matcher_asks_functions_about_what_no_class_and_no_status_names():
    asked = []
    matches = options.matcher((OSError, 503, lambda error: asked.append(error) or "busy" in str(error)))
    busy, other = ValueError("busy"), ValueError("other")
    assert [bool(matches(error)) for error in (OSError(), error_with(status=503), busy, other)] == [1, 1, 1, 0]
    assert asked == [busy, other]
    assert matches(ExceptionGroup("all of them", [OSError(), busy]))
    assert not matches(ExceptionGroup("not all of them", [OSError(), other]))


def test_naming_looks_at_no_class():
    names = options.naming((OSError, 503, lambda error: "busy" in str(error)))
    assert [names(error) for error in (OSError(), error_with(status=503), OSError("busy"))] == [False, True, True]
    assert options.naming(OSError)(OSError()) is False


def test_statuses():
    assert options.statuses((503, OSError, 429)) == {503, 429}
    for wanted in (OSError, (OSError,), lambda error: True):
        assert options.statuses(wanted) == frozenset()


def error_with(**attributes):
    error = Exception()
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


@pytest.mark.parametrize(
    ("attributes", "status"),
    [
        ({}, None),
        ({"status": 503}, 503),
        ({"status_code": HTTPStatus.SERVICE_UNAVAILABLE}, 503),
        ({"response": SimpleNamespace(status=503)}, 503),
        ({"response": SimpleNamespace(status_code=503)}, 503),
        ({"status": 503, "status_code": 1, "response": SimpleNamespace(status=2)}, 503),
        ({"status": "closed", "status_code": 503}, 503),
        ({"status_code": None, "response": SimpleNamespace(status="bad", status_code=503)}, 503),
        ({"status": "503", "response": None}, None),
    ],
)
def test_the_status_of_an_error(attributes, status):
    assert options.status_of(error_with(**attributes)) == status


def test_the_status_of_a_failed_response():
    assert options.status_of(FailedResponse(SimpleNamespace(status_code=503))) == 503
    assert options.status_of(FailedResult(SimpleNamespace(status_code=503))) is None


def test_matcher():
    of_class, of_several = options.matcher(OSError), options.matcher((OSError, KeyError))
    assert of_class(ConnectionError())
    assert not of_class(ValueError())
    assert of_several(KeyError())
    assert options.matcher(bool) is not bool, "bool is a class"
    chosen = lambda error: "yes" in error.args  # noqa: E731
    assert options.matcher(chosen) is chosen


def test_a_matcher_of_status_codes():
    matches = options.matcher((503, OSError))
    assert matches(error_with(status=503))
    assert matches(error_with(response=SimpleNamespace(status_code=503)))
    assert matches(OSError())
    assert not matches(error_with(status=500))
    assert not matches(Exception())
    assert not options.matcher((OSError,))(error_with(status=503))
    only = options.matcher((503,))
    assert only(error_with(status_code=503))
    assert not only(OSError())


def test_a_group_is_wanted_if_all_in_it_are():
    matches = options.matcher(OSError)
    assert matches(ExceptionGroup("all", [OSError(), ExceptionGroup("inner", [ConnectionError()])]))
    assert not matches(ExceptionGroup("mixed", [OSError(), ValueError()]))
    assert options.matcher(ExceptionGroup)(ExceptionGroup("any", [ValueError()]))
    matches = options.matcher((503, OSError))
    assert matches(ExceptionGroup("all", [OSError(), error_with(status=503)]))
    assert not matches(ExceptionGroup("mixed", [OSError(), error_with(status=500)]))
