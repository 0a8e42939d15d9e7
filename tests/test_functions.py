import asyncio
import functools
import inspect
import operator
import pickle
import typing

import anyio
import pytest
import wrapt

from resilient import (
    Bulkhead,
    Cache,
    CircuitBreaker,
    Fallback,
    Keyed,
    Pipeline,
    RateLimit,
    Retry,
    RetryBudget,
    Timeout,
)
from resilient.kinds import Gate
from resilient.testing import flaky, run, virtual_time

BACKENDS = ("asyncio", "trio")


class Counting(Gate):
    """Counts the calls that begin and end, and so tells whether a call was guarded at all."""

    def __init__(self, *, name=None):
        super().__init__(name=name)
        self.calls = 0
        self.errors = []

    def admit(self, call, now):
        self.calls += 1

    def settle(self, call, error, started, now):
        self.errors.append(type(error))


@pytest.fixture
def guard():
    return Counting()


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# -- functions --------------------------------------------------------------------------------------------------


def test_a_plain_function(guard):
    @guard
    def function(first, *rest, key="k", **others):
        return first, rest, key, others

    assert function(1, 2, 3, key=4, other=5) == (1, (2, 3), 4, {"other": 5})
    assert guard.errors == [type(None)]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        function()
    assert guard.calls == 2


def test_a_function_whose_arguments_have_the_names_that_we_use(guard):
    @guard
    def function(function, call, self, args, kwargs):
        return function, call, self, args, kwargs

    names = ("function", "call", "self", "args", "kwargs")
    assert function(**{name: name for name in names}) == names
    assert guard.call(function, **{name: name for name in names}) == names


def test_a_coroutine_function(guard, backend):
    @guard
    async def function(first, *, key):
        await anyio.sleep(1)
        if key == "bad":
            raise KeyError(key)
        return first, key

    async def main():
        assert await function(1, key=2) == (1, 2)
        with pytest.raises(KeyError):
            await function(1, key="bad")

    run(main, backend=backend)
    assert guard.errors == [type(None), KeyError]


def test_a_policy_is_only_a_link_once_per_colour(guard):
    assert guard.chain_of_functions is guard.chain_of_functions
    first, second = guard(lambda: 1), guard(lambda: 2)
    assert (first(), second(), guard.calls) == (1, 2, 2)


def test_what_a_function_looks_like_is_kept(guard):
    def function(first: int, /, second: "str" = "x", *, third: float) -> list[int]:
        """Say what it does."""

    function.extra = "kept"

    async def afunction(first: int) -> int:
        """Say what it does."""

    for original in (function, afunction):
        guarded = guard(original)
        assert guarded is not original
        for name in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
            assert getattr(guarded, name) == getattr(original, name)
        assert guarded.__wrapped__ is original
        assert inspect.signature(guarded) == inspect.signature(original)
        assert typing.get_type_hints(guarded) == typing.get_type_hints(original)
        assert inspect.iscoroutinefunction(guarded) == inspect.iscoroutinefunction(original)
        assert inspect.isfunction(guarded)
        assert inspect.getsource(guarded) == inspect.getsource(original)
    assert guard(function).extra == "kept"


def test_a_lambda_and_a_builtin(guard):
    assert guard(lambda value: value + 1)(1) == 2
    assert guard(len)("abc") == 3
    assert guard(operator.add)(1, 2) == 3
    assert guard("abc".upper)() == "ABC"
    assert guard(max)([1, 3, 2], key=operator.neg) == 1
    assert guard.calls == 5
    assert guard(len).__name__ == "len"
    assert inspect.signature(guard(len)) == inspect.signature(len)


def test_a_partial(guard, backend):
    def function(first, second, *, key):
        return first, second, key

    async def afunction(first, second, *, key):
        return first, second, key

    partial = guard(functools.partial(function, 1, key=3))
    assert partial(2) == (1, 2, 3)
    nested = guard(functools.partial(functools.partial(function, 1), key=3))
    assert nested(2) == (1, 2, 3)
    assert inspect.signature(partial) == inspect.signature(functools.partial(function, 1, key=3))
    for apartial in (
        guard(functools.partial(afunction, 1, key=3)),
        guard(functools.partial(functools.partial(afunction, 1), key=3)),
    ):
        assert inspect.iscoroutinefunction(apartial)
        assert run(apartial, 2, backend=backend) == (1, 2, 3)
    assert guard.calls == 4


class Callable:
    def __init__(self, value):
        self.value = value

    def __call__(self, other):
        return self.value, other


class AsyncCallable(Callable):
    async def __call__(self, other):
        await anyio.sleep(1)
        return self.value, other


def test_callable_objects(guard, backend):
    original = Callable(1)
    guarded = guard(original)
    assert guarded(2) == (1, 2)
    assert guarded.value == 1
    assert isinstance(guarded, Callable)
    assert guard(functools.partial(Callable(1), 3))() == (1, 3)
    assert run(guard(AsyncCallable(1)), 2, backend=backend) == (1, 2)
    assert run(guard(functools.partial(AsyncCallable(1), other=2)), backend=backend) == (1, 2)
    assert run(functools.partial(guard(AsyncCallable(1)), other=2), backend=backend) == (1, 2)
    assert guard.errors == [type(None)] * 5


def test_the_call_of_an_async_object_begins_when_it_is_awaited(backend):
    class Slow:
        async def __call__(self):
            from resilient import deadline

            await anyio.sleep(1)
            return deadline.remaining()

        async def method(self):
            return await self()

    async def main():
        for function in (Slow(), Slow().method, functools.partial(Slow())):
            coroutine = Timeout(5)(function)()
            assert inspect.iscoroutine(coroutine)
            await anyio.sleep(60)
            assert await coroutine == pytest.approx(4)

    run(main, backend=backend)


def test_a_guarded_function_can_be_guarded_again(guard, backend):
    @guard
    @guard
    def function():
        return 1

    @guard
    @guard
    async def afunction():
        return 1

    assert function() == 1
    assert run(afunction, backend=backend) == 1
    assert run(guard(guard(AsyncCallable(1))), 2, backend=backend) == (1, 2)
    assert guard.calls == 6


def test_a_wrapt_decorated_function(guard, backend):
    @wrapt.decorator
    def decorator(wrapped, instance, args, kwargs):
        return wrapped(*args, **kwargs)

    @decorator
    async def afunction(value):
        return value

    @decorator
    def function(value):
        return value

    assert guard(function)(1) == 1
    assert run(guard(afunction), 1, backend=backend) == 1


def test_a_cached_function(guard):
    calls = []

    @guard
    @functools.lru_cache
    def function(value):
        calls.append(value)
        return value

    assert [function(1), function(1), function(2)] == [1, 1, 2]
    assert calls == [1, 2]
    assert guard.calls == 3
    assert function.cache_info().hits == 1
    function.cache_clear()

    @functools.lru_cache
    @guard
    def inside(value):
        return value

    assert [inside(1), inside(1)] == [1, 1]
    assert guard.calls == 4


def test_a_singledispatch_function(guard):
    @functools.singledispatch
    def function(value):
        return "any"

    @function.register
    def _(value: int):
        return "int"

    guarded = guard(function)
    assert (guarded("x"), guarded(1)) == ("any", "int")
    assert guard.calls == 2


def test_a_recursive_function_passes_the_guard_at_each_level(guard):
    @guard
    def factorial(number):
        return 1 if number == 0 else number * factorial(number - 1)

    assert factorial(5) == 120
    assert guard.calls == 6


# -- methods ----------------------------------------------------------------------------------------------------

shared = Counting()


class Client:
    """Every sort of method, guarded."""

    def __init__(self, value=1):
        self.value = value

    @shared
    def method(self, other):
        return self, other

    @shared
    async def amethod(self, other):
        return self, other

    @classmethod
    @shared
    def inner_class(cls, other):
        return cls, other

    @shared
    @classmethod
    def outer_class(cls, other):
        return cls, other

    @staticmethod
    @shared
    def inner_static(other):
        return other

    @shared
    @staticmethod
    def outer_static(other):
        return other

    @shared
    @classmethod
    async def aclass(cls, other):
        return cls, other

    @shared
    @staticmethod
    async def astatic(other):
        return other

    @property
    @shared
    def prop(self):
        return self.value

    partial = staticmethod(shared(functools.partial(max, 3)))
    builtin = shared(len)

    @shared
    def __call__(self):
        return "called"

    @shared
    def __len__(self):
        return 7


class Derived(Client):
    def method(self, other):
        return super().method(other)


def test_methods_of_every_sort(backend):
    shared.calls = 0
    for cls in (Client, Derived):
        client = cls()
        assert client.method(1) == (client, 1)
        assert cls.method(client, 1) == (client, 1)
        assert client.inner_class(2) == cls.inner_class(2) == (cls, 2)
        assert client.outer_class(2) == cls.outer_class(2) == (cls, 2)
        assert client.inner_static(3) == cls.inner_static(3) == 3
        assert client.outer_static(3) == cls.outer_static(3) == 3
        assert run(client.amethod, 4, backend=backend) == (client, 4)
        assert run(client.aclass, 4, backend=backend) == (cls, 4)
        assert run(cls.astatic, 4, backend=backend) == 4
        assert client.prop == 1
        assert client() == "called"
        assert len(client) == 7
        assert client.partial(5) == 5
        assert client.builtin("abc") == 3
    assert shared.calls == 2 * 18
    assert inspect.iscoroutinefunction(Client().amethod)
    assert inspect.iscoroutinefunction(Client.aclass)
    assert inspect.iscoroutinefunction(Client.astatic)
    assert inspect.ismethod(Client().method)
    assert isinstance(vars(Client)["outer_class"], classmethod)
    assert isinstance(vars(Client)["outer_static"], staticmethod)
    assert str(inspect.signature(Client().method)) == "(other)"


def test_bound_methods(guard, backend):
    client = Client(2)
    assert guard(client.method)(1) == (client, 1)
    assert guard(Client.inner_class)(1) == (Client, 1)
    assert guard(Client.inner_static)(1) == 1
    guarded = guard(client.amethod)
    assert inspect.iscoroutinefunction(guarded)
    assert run(guarded, 1, backend=backend) == (client, 1)
    assert guard.calls == 4


def test_a_guarded_method_keeps_no_instance_alive():
    import gc
    import weakref

    client = Client()
    client.method(1)
    gone = weakref.ref(client)
    del client
    gc.collect()
    assert gone() is None


# -- refused ----------------------------------------------------------------------------------------------------


def generator(self=None):
    yield 1


async def asyncgenerator(self=None):
    yield 1


class GeneratorObject:
    def __call__(self):
        yield 1


class AsyncGeneratorObject:
    async def __call__(self):
        yield 1


@pytest.mark.parametrize(
    "function",
    [
        generator,
        asyncgenerator,
        functools.partial(generator),
        functools.partial(functools.partial(asyncgenerator)),
        GeneratorObject(),
        AsyncGeneratorObject(),
        functools.partial(GeneratorObject()),
        GeneratorObject().__call__,
        staticmethod(generator),
        classmethod(asyncgenerator),
    ],
    ids=range(10),
)
@pytest.mark.parametrize("policy", [Timeout(2), Pipeline(), Retry(on=OSError)], ids=lambda p: type(p).__name__)
def test_generator_functions_are_refused(policy, function):
    with pytest.raises(
        TypeError, match=f"^{type(policy).__name__} cannot guard the generator function .*unguarded"
    ):
        policy(function)


def test_classes_are_refused(guard):
    for cls in (Client, int, OSError, typing.NamedTuple("N", [("x", int)])):
        with pytest.raises(
            TypeError, match=f"Counting cannot guard the class {cls.__qualname__}; guard its methods"
        ):
            guard(cls)


@pytest.mark.parametrize("policy", [Timeout(2), Pipeline(Timeout(2)), CircuitBreaker()], ids=repr)
def test_policies_are_combined_and_not_guarded(guard, policy):
    with pytest.raises(TypeError, match=r"Counting cannot guard .*, which guards functions itself.*by \| or in a"):
        guard(policy)


@pytest.mark.parametrize("thing", [None, 3, "fetch", object(), [len], property(len)], ids=repr)
def test_what_cannot_be_called_is_refused(guard, thing):
    with pytest.raises(TypeError, match="Counting can only guard something that can be called, not "):
        guard(thing)


def test_a_coroutine_is_not_a_function(guard):
    async def function():
        pass

    coroutine = function()
    with pytest.raises(TypeError, match="can only guard something that can be called"):
        guard(coroutine)
    coroutine.close()


def test_a_sync_function_that_returns_a_coroutine_is_refused_when_it_does(guard):
    async def afunction():
        raise AssertionError("never runs")

    @functools.lru_cache
    async def cached():
        raise AssertionError("never runs")

    for function in (lambda: afunction(), cached):  # noqa: PLW0108 - the lambda hides the colour
        guarded = guard(function)
        with pytest.raises(
            TypeError, match=r"returned a coroutine, which no policy would guard; make it an `async"
        ):
            guarded()
    with pytest.raises(TypeError, match="returned a coroutine"):
        guard.call(afunction)
    assert guard.errors == [TypeError] * 3


def test_acall_takes_any_function_that_returns_an_awaitable(guard, backend):
    async def afunction(value):
        await anyio.sleep(1)
        return value

    async def main():
        assert await guard.acall(afunction, 1) == 1
        assert await guard.acall(lambda value: afunction(value), 2) == 2  # noqa: PLW0108 - the lambda hides the colour
        assert await guard.acall(functools.partial(afunction, 3)) == 3
        assert await guard.acall(AsyncCallable(4), 4) == (4, 4)
        with pytest.raises(TypeError, match=r"returned int, which cannot be awaited; use call\(\) for sync"):
            await guard.acall(lambda: 5)
        with pytest.raises(TypeError, match="returned async_generator, which cannot be awaited"):
            await guard.acall(asyncgenerator)

    run(main, backend=backend)
    assert guard.calls == 6


def test_what_a_function_returned_is_not_taken_for_the_function(guard, backend):
    """A fallback would answer instead, for ever, and the mistake would never be seen."""

    async def afunction():
        raise AssertionError("never runs")

    async def main():
        coroutine = afunction()
        with pytest.raises(TypeError, match=r"acall\(\) takes the function and then .*: <coroutine object"):
            await Pipeline(Fallback("default"), guard).acall(coroutine)
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED

    run(main, backend=backend)
    with pytest.raises(TypeError, match=r"call\(\) takes the function .*\(fetch, url\): 7 cannot be called"):
        Pipeline(Fallback("default"), guard).call(7)
    assert guard.calls == 0


def test_generator_functions_cannot_be_called_unguarded(guard):
    with pytest.raises(TypeError, match="Counting cannot guard the generator function 'generator'"):
        guard.call(generator)
    rows = guard.call(lambda: (number for number in "ab"))  # the function itself has run under the policy
    assert list(rows) == ["a", "b"]


def test_call_passes_arguments_on(guard):
    assert guard.call(dict, [("a", 1)], b=2) == {"a": 1, "b": 2}
    assert guard.call(max, 1, 2) == 2
    with pytest.raises(KeyError):
        guard.call({}.__getitem__, 1)
    assert guard.errors == [type(None), type(None), KeyError]


def test_a_task_can_be_made_of_a_guarded_call(guard):
    @guard
    async def function():
        return 1

    async def main():
        return await asyncio.create_task(function())

    assert run(main) == 1


# -- pickling ---------------------------------------------------------------------------------------------------

module_guard = Counting()


@module_guard
def pickled(value):
    return value + 1


@module_guard
async def apickled(value):
    return value + 1


def test_a_guarded_function_of_a_module_pickles_by_name():
    for function in (pickled, apickled):
        assert pickle.loads(pickle.dumps(function)) is function
    assert pickle.loads(pickle.dumps(pickled))(1) == 2
    assert module_guard.calls == 1


# -- without parentheses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        (CircuitBreaker, r"To decorate a function write @CircuitBreaker\(\) with parentheses"),
        (Retry, "To decorate a function write @Retry"),
        (Timeout, "To decorate a function write @Timeout"),
        (RateLimit, "To decorate a function write @RateLimit"),
        (Bulkhead, "To decorate a function write @Bulkhead"),
        (Cache, "To decorate a function write @Cache"),
        (Pipeline, "is not a policy. To decorate a function write @Pipeline"),
        (Keyed, "Keyed: factory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_policy_class_without_parentheses_says_what_to_write(policy, says):
    def function():
        return 1

    async def afunction():
        return 1

    def with_argument(url):
        return url

    for decorated in (function, afunction, with_argument):
        with pytest.raises(TypeError, match=says):
            policy(decorated)


def test_a_factory_that_makes_no_policy_is_named():
    for factory in (dict, lambda: 3):  # the first one has no signature to look at
        with pytest.raises(TypeError, match=r"Keyed: factory returned .*, which is not a policy"):
            Keyed(factory)
    for factory in (lambda key: Bulkhead(1), Bulkhead, Bulkhead(1), flaky(1).asynchronous, None):
        with pytest.raises(TypeError, match=r"Keyed: factory=.* is not allowed; give a function that makes a new"):
            Keyed(factory)


def test_policies_are_not_made_of_each_other_by_mistake():
    with pytest.raises(TypeError, match=r"write Retry\(\) with parentheses"):
        Pipeline(Retry)
    for left in (Timeout(2), Pipeline(Timeout(2)), Pipeline(name="named")):
        with pytest.raises(TypeError, match=r"write CircuitBreaker\(\) with parentheses"):
            left | CircuitBreaker
        with pytest.raises(TypeError, match="unsupported operand"):
            left | (lambda: 1)
    for several in ([Timeout(2)], (Timeout(2), Bulkhead(1))):
        with pytest.raises(
            TypeError, match=r"is not a policy; give several one by one, as in Pipeline\(\*policies\)"
        ):
            Pipeline(several)
    with pytest.raises(TypeError, match="is not a policy; give it to a Retry, as its budget="):
        Pipeline(RetryBudget())


def test_every_policy_decorates():
    with virtual_time():
        for policy in (
            Retry(on=OSError),
            Timeout(2),
            CircuitBreaker(),
            RateLimit("1/s"),
            Bulkhead(1),
            Cache(1),
            Fallback(1),
            Keyed(CircuitBreaker),
            Pipeline(),
        ):
            assert policy(flaky(7).__call__)() == 7
            assert policy(lambda: 7)() == 7 if not isinstance(policy, RateLimit) else True
