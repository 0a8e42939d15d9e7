import importlib
import inspect
import itertools
import sys
import types

import pytest

import resilient
from resilient import Fallback, Retry, Timeout, instrument
from resilient.testing import run, virtual_time

BACKENDS = ("asyncio", "trio")

SOURCE = '''
import functools

LIMIT = 3
calls = []


def fetch(value):
    """Fetch a value."""
    calls.append(value)
    if len(calls) % 3:
        raise OSError(len(calls))
    return value


async def afetch(value):
    return fetch(value)


def stream():
    yield 1


class Base:
    def inherited(self, value):
        return type(self).__name__, fetch(value)

    @classmethod
    def made(cls, value):
        return cls.__name__, fetch(value)


class Client(Base):
    def method(self, value):
        return self, fetch(value)

    async def amethod(self, value):
        return self, fetch(value)

    @classmethod
    def klass(cls, value):
        return cls, fetch(value)

    @staticmethod
    def static(value):
        return fetch(value)

    class Inner:
        def method(self, value):
            return fetch(value)


shared = Client()
partial = functools.partial(fetch, 5)


def __getattr__(name):
    if name == "lazy":
        return fetch
    raise AttributeError(name)
'''

numbers = itertools.count()


@pytest.fixture
def name(tmp_path, monkeypatch):
    """The name of a module that can be imported and that nobody has imported yet."""
    module = f"someone_elses_{next(numbers)}"
    (tmp_path / f"{module}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield module
    sys.modules.pop(module, None)


@pytest.fixture
def module(name):
    return importlib.import_module(name)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(autouse=True)
def _time():
    with virtual_time():
        yield


RETRY = Retry(on=OSError, wait=0)


def test_a_function_is_guarded_and_put_back(name, module):
    original = module.fetch
    handle = instrument(name, "fetch", RETRY)
    assert handle.active
    assert module.fetch is not original
    assert module.fetch(7) == 7
    assert module.calls == [7, 7, 7]
    assert inspect.signature(module.fetch) == inspect.signature(original)
    assert module.fetch.__doc__ == "Fetch a value."
    handle.undo()
    assert not handle.active
    assert module.fetch is original
    handle.undo()
    assert module.fetch is original
    with pytest.raises(OSError, match="4"):
        module.fetch(7)


def test_it_is_a_context_manager_too(name, module):
    original = module.fetch
    with instrument(name, "fetch", RETRY) as handle:
        assert handle.active
        assert module.fetch(7) == 7
    assert not handle.active
    assert module.fetch is original


def test_an_error_in_the_block_undoes_it_as_well(name, module):
    original = module.fetch
    with pytest.raises(KeyError), instrument(name, "fetch", RETRY):
        raise KeyError
    assert module.fetch is original


def test_a_module_that_is_imported_later_is_guarded_then(name):
    handle = instrument(name, "fetch", RETRY)
    assert name not in sys.modules
    assert not handle.active
    module = importlib.import_module(name)
    assert handle.active
    assert module.fetch(7) == 7
    handle.undo()
    with pytest.raises(OSError, match="4"):
        module.fetch(7)


def test_undone_before_the_import_nothing_happens(name):
    with instrument(name, "fetch", RETRY) as handle:
        pass
    module = importlib.import_module(name)
    assert not handle.active
    with pytest.raises(OSError, match="1"):
        module.fetch(7)
    assert not hasattr(module.fetch, "__wrapped__")


def test_several_functions_of_a_module_that_is_imported_later(name):
    handles = [instrument(name, path, RETRY) for path in ("fetch", "Client.static")]
    module = importlib.import_module(name)
    assert [handle.active for handle in handles] == [True, True]
    assert module.Client.static(1) == 1


def test_methods_stay_what_they_are(name, module, backend):
    client = module.Client()
    guarded = {
        "Client.method": lambda: client.method(1) == (client, 1),
        "Client.klass": lambda: module.Client.klass(1) == (module.Client, 1) and client.klass,
        "Client.static": lambda: client.static(1) == 1,
        "Client.amethod": lambda: run(client.amethod, 1, backend=backend) == (client, 1),
        "Client.Inner.method": lambda: module.Client.Inner().method(1) == 1,
        "afetch": lambda: run(module.afetch, 1, backend=backend) == 1,
        "partial": lambda: module.partial() == 5,
        "shared.method": lambda: module.shared.method(1) == (module.shared, 1),
    }
    for path, works in guarded.items():
        module.calls.clear()
        with instrument(name, path, RETRY):
            assert works(), path
            assert len(module.calls) == 3, path
    assert inspect.iscoroutinefunction(module.Client.amethod)
    assert isinstance(vars(module.Client)["klass"], classmethod)
    assert isinstance(vars(module.Client)["static"], staticmethod)
    assert "method" not in vars(module.shared)


def test_guarded_methods_have_their_sort(name, module):
    with (
        instrument(name, "Client.klass", RETRY),
        instrument(name, "Client.static", RETRY),
        instrument(name, "Client.amethod", RETRY),
    ):
        assert isinstance(vars(module.Client)["klass"], classmethod)
        assert isinstance(vars(module.Client)["static"], staticmethod)
        assert inspect.iscoroutinefunction(module.Client.amethod)


def test_an_inherited_method_is_guarded_in_the_subclass_only(name, module):
    with instrument(name, "Client.inherited", RETRY), instrument(name, "Client.made", RETRY):
        assert module.Client().inherited(1) == ("Client", 1)
        assert module.Client.made(1) == ("Client", 1)
        with pytest.raises(OSError, match="7"):
            module.Base().inherited(1)
        assert {"inherited", "made"} <= set(vars(module.Client))
    assert not {"inherited", "made"} & set(vars(module.Client))
    with pytest.raises(OSError, match="8"):
        module.Client().inherited(1)


def test_a_base_class_is_guarded_for_its_subclasses(name, module):
    with instrument(name, "Base.inherited", RETRY):
        assert module.Client().inherited(1) == ("Client", 1)


def test_a_function_that_the_module_makes_when_asked(name, module):
    with instrument(name, "lazy", RETRY):
        assert module.lazy(1) == 1
        assert "lazy" in vars(module)
    assert "lazy" not in vars(module)


def test_two_policies_around_one_function(name, module):
    original = module.fetch
    with instrument(name, "fetch", Retry(2, on=OSError, wait=0)), instrument(name, "fetch", Fallback("value")):
        assert module.fetch(1) == "value"
        assert len(module.calls) == 2
    assert module.fetch is original


def test_what_others_imported_before_is_not_guarded(name, module):
    fetch = module.fetch
    with instrument(name, "fetch", RETRY), pytest.raises(OSError, match="1"):
        fetch(1)


def test_a_class_of_the_standard_library():
    import json

    with instrument("json", "JSONDecoder.decode", Fallback({}, on=ValueError)):
        assert json.loads("no json") == {}
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads("no json")


@pytest.mark.parametrize("path", ["missing", "Client.missing", "missing.method", "LIMIT.nothing"])
def test_a_path_that_is_not_there_is_named(name, path):
    handle = instrument(name, path, RETRY)
    with pytest.raises(AttributeError, match=f"instrument: the module '{name}' has no '{path}'"):
        importlib.import_module(name)
    handle.undo()
    sys.modules.pop(name, None)
    importlib.import_module(name)
    with pytest.raises(AttributeError, match=f"instrument: the module '{name}' has no '{path}'"):
        instrument(name, path, RETRY)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("LIMIT", "can only guard something that can be called, not 3"),
        ("Client", "cannot guard the class Client"),
        ("stream", "cannot guard the generator function 'stream'"),
    ],
)
def test_what_cannot_be_guarded_is_refused(name, module, path, says):
    before = dict(vars(module))
    with pytest.raises(TypeError, match=f"Retry {says}"):
        instrument(name, path, RETRY)
    assert vars(module) == before


def test_a_policy_that_does_not_fit_is_refused(name, module):
    original = module.fetch
    with pytest.raises(TypeError, match="Retry: on= is required"):
        instrument(name, "fetch", Retry())
    assert module.fetch is original


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("json", "loads", Timeout), "policy=<class .*Timeout'> is not a policy"),
        (("json", "loads", None), "policy=None is not a policy"),
        (("json", "", Timeout(1)), "path='' is not allowed; give a non-empty str"),
        (("json", None, Timeout(1)), "path=None is not allowed; give a non-empty str"),
        (("", "loads", Timeout(1)), "module='' is not allowed; give a non-empty str"),
        ((types, "loads", Timeout(1)), "module=<module 'types'.*is not allowed; give a non-empty str"),
    ],
    ids=range(6),
)
def test_bad_arguments_are_named(args, says):
    with pytest.raises(TypeError, match=f"^instrument: {says}"):
        instrument(*args)


def test_it_is_part_of_the_package():
    assert resilient.instrument is instrument
    assert callable(instrument)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize(("path", "attribute"), [("fetch", None), ("Client.inherited", "inherited")])
def test_several_guards_of_one_function_are_undone_in_any_order(name, module, path, attribute, order):
    owner, attribute = (module.Client, attribute) if attribute else (module, path)
    before = vars(owner).get(attribute)
    breakers = [resilient.CircuitBreaker(name=str(number)) for number in range(3)]
    handles = [instrument(name, path, breaker) for breaker in breakers]
    undone = set()
    for number in order:
        handles[number].undo()
        undone.add(number)
        module.calls[:] = [0, 0]  # so that the next call succeeds
        seen = [breaker.statistics().calls for breaker in breakers]
        (module.Client().inherited if path != "fetch" else module.fetch)(1)
        grown = [breaker.statistics().calls - was for breaker, was in zip(breakers, seen, strict=True)]
        assert grown == [0 if each in undone else 1 for each in range(3)]
    assert vars(owner).get(attribute) is before
