import copy
import dataclasses
import pickle

import pytest

from resilient import Bulkhead, Cache, CircuitBreaker, Fallback, Pipeline, RateLimit, Retry, RetryBudget, Timeout
from resilient.component import Component, _living

POLICIES = [
    Bulkhead(2, queue=1),
    Cache(60),
    CircuitBreaker(consecutive=3),
    Fallback(1, on=OSError),
    RateLimit("10/minute", burst=3),
    Retry(5, on=(OSError, ValueError), wait=0.25),
    RetryBudget(cap=5),
    Timeout(2),
    Pipeline(Timeout(2), Bulkhead(1), name="both"),
]


def a_named_function():
    pass


def test_names():
    assert Bulkhead(1).name is None
    assert Bulkhead(1).label == "Bulkhead(1)"
    named = Bulkhead(1, name="pool")
    assert named.label == named.name == "pool"
    for bad, error in ((3, TypeError), ("", ValueError), (b"x", TypeError)):
        with pytest.raises(error, match=f"Bulkhead: name={bad!r} is not allowed"):
            Bulkhead(1, name=bad)


def test_repr_shows_what_is_not_the_default():
    assert repr(Retry(on=OSError)) == "Retry(on=OSError)"
    assert repr(Retry(3, on=OSError, max_retry_after=60)) == "Retry(on=OSError)"
    assert repr(Retry(5, on=(OSError, ValueError))) == "Retry(5, on=(OSError, ValueError))"
    assert repr(Cache(60.0, key=a_named_function)) == "Cache(60, key=a_named_function)"
    assert repr(Fallback(a_named_function, 3)) == "Fallback(a_named_function, 3)"
    assert repr(CircuitBreaker(on={OSError})) == "CircuitBreaker(on=(OSError,))"
    assert repr(Pipeline(Timeout(2), Bulkhead(1), name="x")) == "Pipeline(Timeout(2), Bulkhead(1), name='x')"
    assert repr(Pipeline()) == "Pipeline()"
    assert repr(RetryBudget()) == "RetryBudget()"


def copies_of(component):
    return [
        component.fresh(),
        copy.copy(component),
        copy.deepcopy(component),
        pickle.loads(pickle.dumps(component)),
        pickle.loads(pickle.dumps(copy.copy(component), 0)),
    ]


@pytest.mark.parametrize("component", POLICIES, ids=repr)
def test_copies(component):
    for other in copies_of(component):
        assert other is not component
        assert type(other) is type(component)
        assert repr(other) == repr(component)
        assert other._lock is not component._lock
        assert other.label == component.label


def test_a_copy_has_its_own_state_and_listeners():
    policy = Bulkhead(2)
    heard = []
    policy.listen(heard.append)
    with policy:
        assert policy.statistics().in_use == 1
        for other in copies_of(policy):
            assert other.statistics().in_use == 0
            assert other._listeners.current == ()


def test_a_subclass_with_options_of_its_own_is_copied():
    class Pool(Bulkhead):
        def __init__(self, limit, *, host):
            super().__init__(limit)
            self.host = host

    pool = Pool(3, host="a")
    assert repr(pool) == "Pool(3, host='a')"
    assert copy.deepcopy(pool).host == "a"


@pytest.mark.parametrize("component", POLICIES, ids=repr)
def test_statistics_are_frozen(component):
    statistics = component.statistics()
    if isinstance(component, Pipeline):
        statistics = statistics["Bulkhead(1)"]
    if statistics is None:
        assert isinstance(component, Timeout)
        return
    field = dataclasses.fields(statistics)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(statistics, field, 3)


def test_components_are_forgotten_when_nobody_uses_them():
    component = Component(name="short-lived")
    assert component in _living
    before = len(_living)
    del component
    assert len(_living) < before


def test_after_fork_replaces_the_lock():
    component = Component()
    with component._lock:
        component.after_fork()
        assert component._lock.acquire(blocking=False)
        component._lock.release()
    component.after_fork()
