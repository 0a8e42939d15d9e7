import dataclasses
import logging

import pytest

import resilient
from resilient import Fallback, Pipeline, Policy, Retry, RetryBudget, events, listen, testing
from resilient.events import FallbackUsed


def fail():
    raise ConnectionError


def test_a_listener_hears_until_it_is_closed():
    policy = Fallback(1, on=OSError)
    heard = []
    subscription = policy.listen(heard.append)
    assert policy.call(fail) == 1
    subscription.close()
    subscription.close()
    assert policy.call(fail) == 1
    assert [event.name for event in heard] == ["fallback.used"]


def test_a_subscription_is_a_context_manager():
    policy = Fallback(1)
    heard = []
    with policy.listen(heard.append) as subscription:
        policy.call(fail)
        assert isinstance(subscription, events.Subscription)
    policy.call(fail)
    assert len(heard) == 1


def test_the_same_listener_twice_hears_twice_and_closes_once_each():
    policy = Fallback(1)
    heard = []
    first, second = policy.listen(heard.append), policy.listen(heard.append)
    policy.call(fail)
    assert len(heard) == 2
    first.close()
    first.close()
    policy.call(fail)
    assert len(heard) == 3
    second.close()
    policy.call(fail)
    assert len(heard) == 3


def test_a_listener_that_was_removed_by_hand_can_still_be_closed():
    policy = Fallback(1)
    subscription = policy.listen([].append)
    policy._listeners.current = ()
    subscription.close()


def test_a_listener_that_raises_is_logged_and_disturbs_nobody(caplog):
    policy = Fallback(1)
    heard = []

    def broken(event):
        raise RuntimeError("broken listener")

    with policy.listen(broken), policy.listen(heard.append), caplog.at_level(logging.ERROR, logger="resilient"):
        assert policy.call(fail) == 1
    assert len(heard) == 1
    assert "fallback.used" in caplog.text
    assert "broken listener" in caplog.text


def test_an_interrupt_in_a_listener_is_not_swallowed():
    def interrupted(event):
        raise KeyboardInterrupt

    policy = Fallback(1)
    with policy.listen(interrupted), pytest.raises(KeyboardInterrupt):
        policy.call(fail)


class AsyncCallable:
    async def __call__(self, event):
        pass


async def async_listener(event):
    pass


@pytest.mark.parametrize("add", [listen, Fallback(1).listen, Pipeline().listen], ids=["all", "policy", "pipeline"])
@pytest.mark.parametrize("listener", [async_listener, AsyncCallable()], ids=["function", "object"])
def test_an_async_listener_is_refused(add, listener):
    before = events.everywhere.current
    with pytest.raises(TypeError, match="must be a sync function: events are never awaited"):
        add(listener)
    with pytest.raises(TypeError, match="listener=3 must be a function of one event"):
        add(3)
    assert events.everywhere.current == before


def test_global_policy_and_pipeline_listeners():
    policy, other = Fallback(1, name="one"), Fallback(2, name="two")
    pipeline = Pipeline(policy)
    everything, of_policy, of_pipeline = [], [], []
    with listen(everything.append), policy.listen(of_policy.append), pipeline.listen(of_pipeline.append):
        pipeline.call(fail)
        other.call(fail)
    assert [event.policy for event in everything] == ["one", "two"]
    assert [event.policy for event in of_policy] == ["one"]
    assert [event.policy for event in of_pipeline] == ["one"]


def test_a_shared_policy_reports_the_calls_of_both_pipelines():
    shared = Fallback(1)
    one, two = Pipeline(shared), Pipeline(shared)
    heard = []
    with one.listen(heard.append):
        one.call(fail)
        two.call(fail)
    assert len(heard) == 2


def test_a_policy_that_is_in_a_pipeline_twice_reports_once():
    shared = Fallback(1)
    inner = Pipeline(shared)
    outer = Pipeline(inner, Pipeline(inner), shared)
    heard = []
    with outer.listen(heard.append):
        shared.call(fail)
    assert len(heard) == 1
    shared.call(fail)
    assert len(heard) == 1, "closed everywhere"


def test_the_label_and_the_time_are_in_the_event():
    policy = Retry(2, on=OSError, wait=1.5)
    with testing.virtual_time(start=100), testing.capture_events(policy) as seen, pytest.raises(ConnectionError):
        policy.call(fail)
    assert seen == [
        events.RetryScheduled(policy=repr(policy), at=100, attempt=1, delay=1.5, error="ConnectionError"),
        events.RetryGaveUp(
            policy=repr(policy), at=101.5, attempts=2, elapsed=1.5, reason="attempts", error="ConnectionError"
        ),
    ]


def test_events_are_frozen_and_named():
    event = FallbackUsed(policy="p", at=1.0, error="ConnectionError")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.error = "other"
    kinds = [cls for cls in vars(events).values() if isinstance(cls, type) and issubclass(cls, events.Event)]
    names = [cls.name for cls in kinds if cls is not events.Event]
    assert len(set(names)) == len(names) > 10
    assert all(dataclasses.is_dataclass(cls) and cls.__doc__ for cls in kinds)


def test_nothing_is_built_when_nobody_listens(monkeypatch):
    def build(self, **fields):
        raise AssertionError("built for nobody")

    monkeypatch.setattr(FallbackUsed, "__init__", build)
    assert Fallback(1).call(fail) == 1


def test_listen_is_exported():
    assert resilient.listen is events.listen
    assert issubclass(Fallback, Policy)
    assert not isinstance(RetryBudget(), Policy)
