import copy
import pickle
import re
import threading
from datetime import timedelta
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilient import Retry, RetryBudget, TimedOut
from resilient.call import Call
from resilient.edge import Edge
from resilient.table import OVERFLOW
from resilient.testing import virtual_time

ERROR = OSError()
TIMEOUT = TimedOut(policy="t")


def drain(budget, now=0.0, key=None):
    """Spend all that is there, and return how much that was."""
    spent = 0
    while budget.withdraw(ERROR, now, key):
        spent += 1
    return spent


def test_it_starts_full_and_each_retry_takes_one():
    budget = RetryBudget()
    assert budget.tokens(0.0) == 10
    assert drain(budget) == 10
    assert budget.tokens(0.0) == 0
    assert not budget.withdraw(ERROR, 0.0)


def test_a_timeout_costs_two():
    budget = RetryBudget(cap=5)
    assert [budget.withdraw(TIMEOUT, 0.0) for _ in range(3)] == [True, True, False]
    assert budget.tokens(0.0) == 1  # the refusal took nothing
    assert budget.withdraw(ERROR, 0.0)
    assert not budget.withdraw(TimeoutError(), 0.0)  # any TimeoutError is one


def test_who_asks_may_know_better_what_a_timeout_is():
    budget = RetryBudget(cap=5)
    assert budget.withdraw(ERROR, 0.0, timed_out=True)
    assert budget.tokens(0.0) == 3
    assert budget.withdraw(TIMEOUT, 0.0, timed_out=False)
    assert budget.tokens(0.0) == 2
    assert budget.withdraw(TIMEOUT, 0.0, timed_out=None)
    assert budget.tokens(0.0) == 0


class Hosts(Edge):
    def key(self, call):
        return call.args[0]


class HostCall(Call):
    edge = Hosts()


def test_the_partition_of_a_call():
    plain, to_host = Call(print, ("a",), {}), HostCall(print, ("a",), {})
    assert RetryBudget().key_of(plain) is None
    assert RetryBudget().key_of(to_host) == "a"
    for call in (plain, to_host):
        assert RetryBudget(key=str.upper).key_of(call) == "A"


def test_an_unhashable_key_is_named():
    budget = RetryBudget(key=lambda host: [host], name="b")
    with pytest.raises(TypeError, match="b: key= returned list, which is not hashable"):
        budget.key_of(Call(print, ("a",), {}))


def test_it_tells_whether_it_was_drawn_on():
    budget = RetryBudget(cap=1, timeout_cost=1, refill=10)
    assert not budget.drawn_on
    budget.withdraw(ERROR, 0.0, "a")
    assert budget.drawn_on


def test_ten_successes_pay_for_one_retry():
    budget = RetryBudget()
    drain(budget)
    for _ in range(9):
        budget.deposit()
    assert not budget.withdraw(ERROR, 0.0)
    budget.deposit()
    assert budget.withdraw(ERROR, 0.0)
    assert not budget.withdraw(ERROR, 0.0)


def test_almost_a_token_is_not_enough():
    budget = RetryBudget(cap=1, ratio=0.999_999, timeout_cost=1)
    drain(budget)
    budget.deposit()
    assert not budget.withdraw(ERROR, 0.0)
    assert budget.tokens(0.0) == 0.999_999


def test_a_full_budget_takes_no_more():
    budget = RetryBudget(cap=2, ratio=1)
    for _ in range(50):
        budget.deposit()
    assert budget.tokens(0.0) == 2
    assert drain(budget) == 2
    for _ in range(50):
        budget.deposit()
    assert budget.tokens(0.0) == 2


def test_a_token_comes_back_every_refill():
    budget = RetryBudget(cap=3, refill=10, timeout_cost=1)
    assert drain(budget, 100.0) == 3
    assert not budget.withdraw(ERROR, 109.9)
    assert budget.withdraw(ERROR, 110.0)
    assert budget.tokens(125.0) == 1.5
    assert budget.tokens(1e9) == 3


def test_a_quiet_client_is_not_locked_out_by_being_asked_often():
    budget = RetryBudget(cap=1, refill=10, timeout_cost=1)
    drain(budget)
    steps = 1_000_000  # each step alone is worth less than the smallest unit
    for step in range(1, 101):
        budget.tokens(step * 10 / steps)
    assert budget.tokens(100 * 10 / steps) == pytest.approx(100 / steps, abs=1e-6)
    assert budget.tokens(10.0) == pytest.approx(1, abs=1e-4)


def test_a_clock_that_goes_back_changes_nothing():
    budget = RetryBudget(cap=2, refill=1, timeout_cost=1)
    drain(budget, 50.0)
    assert budget.tokens(10.0) == 0
    assert budget.tokens(50.5) == 0.5


def test_without_a_ratio_only_time_helps():
    budget = RetryBudget(ratio=0, cap=1, refill=10, timeout_cost=1)
    drain(budget)
    for _ in range(100):
        budget.deposit()
    assert budget.tokens(5.0) == 0.5


def test_partitions_do_not_touch_each_other():
    budget = RetryBudget(cap=2, ratio=1)
    assert drain(budget, key="a") == 2
    assert budget.tokens(0.0, "b") == 2
    budget.deposit("b")
    assert budget.tokens(0.0, "a") == 0
    budget.deposit("a")
    assert (budget.tokens(0.0, "a"), budget.tokens(0.0, "b")) == (1, 2)


def test_an_exhausted_partition_is_never_refilled_by_other_keys():
    budget = RetryBudget(cap=2, max_keys=3, refill=1e6)
    for key in "abc":
        drain(budget, key=key)
    for key in range(1000):
        budget.withdraw(ERROR, 0.0, key)
        budget.deposit(key)
    assert [budget.tokens(0.0, key) for key in "abc"] == [0, 0, 0]
    assert not any(budget.withdraw(ERROR, 0.0, key) for key in "abc")


def test_partitions_are_bounded_and_the_rest_share_one():
    budget = RetryBudget(cap=2, max_keys=3, refill=1e6)
    spent = sum(drain(budget, key=key) for key in range(100))
    assert spent == 3 * 2 + 2  # three partitions, and one for all others
    assert len(budget._purses.entries) == 4
    assert budget.statistics().refused == 100


def test_a_full_partition_makes_room():
    budget = RetryBudget(cap=1, max_keys=2, refill=10, timeout_cost=1)
    drain(budget, 0.0, "a")
    drain(budget, 5.0, "b")
    assert drain(budget, 10.0, "c") == 1  # a is full again by now, and forgotten
    assert set(budget._purses.entries) == {"b", "c"}
    assert budget.tokens(10.0, "a") == 1
    assert budget.tokens(10.0, "b") == 0.5


def test_successes_of_full_partitions_are_not_remembered():
    budget = RetryBudget()
    for key in range(100):
        budget.deposit(key)
    assert not budget._purses.entries


def test_statistics():
    with virtual_time() as clock:
        budget = RetryBudget(cap=4, refill=10)
        assert budget.statistics() == type(budget.statistics())(partitions=0, lowest=4.0, refused=0)
        drain(budget, 0.0, "a")
        budget.withdraw(ERROR, 0.0, "b")
        statistics = budget.statistics()
        assert (statistics.partitions, statistics.lowest, statistics.refused) == (2, 0.0, 1)
        clock.sleep(10)
        statistics = budget.statistics()
        assert (statistics.partitions, statistics.lowest) == (1, 1.0)
        with pytest.raises(AttributeError):
            statistics.lowest = 3


def test_copies_have_a_state_of_their_own():
    budget = RetryBudget(cap=3, ratio=0.5, name="shared")
    drain(budget)
    for other in (budget.fresh(), copy.copy(budget), copy.deepcopy(budget), pickle.loads(pickle.dumps(budget))):
        assert other.tokens(0.0) == 3
        assert (other.cap, other.ratio, other.name) == (3, 0.5, "shared")
    assert "cap=3" in repr(budget)


@pytest.mark.parametrize(
    ("option", "value", "kind", "allowed"),
    [
        ("ratio", -0.1, ValueError, "from 0 up to 1"),
        ("ratio", 1.5, ValueError, "from 0 up to 1"),
        ("ratio", "x", TypeError, "from 0 up to 1"),
        ("ratio", True, TypeError, "from 0 up to 1"),
        ("cap", 0, ValueError, "an int >= 1"),
        ("cap", 2.5, TypeError, "an int >= 1"),
        ("refill", 0, ValueError, "> 0"),
        ("refill", timedelta(0), ValueError, "> 0"),
        ("refill", None, TypeError, "> 0"),
        ("timeout_cost", 0, ValueError, "an int >= 1"),
        ("timeout_cost", 11, ValueError, "an int up to cap=10"),
        ("key", "host", TypeError, "a function"),
        ("max_keys", 0, ValueError, "an int >= 1"),
        ("max_keys", "many", TypeError, "an int >= 1"),
        ("name", "", ValueError, "a non-empty str"),
    ],
)
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed(option, value, kind, allowed):
    with pytest.raises(kind, match=f"^RetryBudget: {option}=.*is not allowed; give .*{re.escape(allowed)}"):
        RetryBudget(**{option: value})


# -- against a model --------------------------------------------------------------------------------------------

KEYS = ["a", "b", "c", "d", None]


class BudgetMachine(RuleBasedStateMachine):
    """A budget and a dict of fractions see the same calls.

    All times and ratios are multiples of 1/8, which both represent exactly: the tolerance is zero.
    """

    @initialize(
        cap=st.integers(1, 4),
        ratio=st.sampled_from([0, 0.125, 0.5, 1]),
        refill=st.sampled_from([0.25, 1, 8]),
        max_keys=st.integers(1, 4),
        data=st.data(),
    )
    def make(self, cap, ratio, refill, max_keys, data):
        self.timeout_cost = data.draw(st.integers(1, cap))
        self.cap, self.ratio, self.refill, self.max_keys = cap, Fraction(ratio), Fraction(refill), max_keys
        self.budget = RetryBudget(
            cap=cap, ratio=ratio, refill=refill, timeout_cost=self.timeout_cost, max_keys=max_keys
        )
        self.now = 0.0
        self.model = {}

    def gain(self, key, tokens):
        self.model[key] = min(Fraction(self.cap), self.model[key] + tokens)

    @rule(eighths=st.integers(1, 40))
    def time_passes(self, eighths):
        self.now += eighths / 8
        for key in self.model:
            self.gain(key, Fraction(eighths, 8) / self.refill)

    @rule(key=st.sampled_from(KEYS))
    def deposit(self, key):
        self.budget.deposit(key)
        if key in self.model:
            self.gain(key, self.ratio)

    @rule(key=st.sampled_from(KEYS), timeout=st.booleans())
    def withdraw(self, key, timeout):
        place = self.place_of(key)
        cost = self.timeout_cost if timeout else 1
        paid = self.budget.withdraw(TIMEOUT if timeout else ERROR, self.now, key)
        self.follow(place)
        assert paid == (self.model[place] >= cost)
        if paid:
            self.model[place] -= cost

    def place_of(self, key):
        """Where a key's tokens are, by the rules: its own place if there is one or can be made."""
        own = [other for other in self.model if other is not OVERFLOW]
        roomy = len(own) < self.max_keys or any(self.model[other] == self.cap for other in own)
        return key if key in self.model or roomy else OVERFLOW

    def follow(self, place):
        """Forget what the budget has forgotten, which must have been full."""
        for key in set(self.model) - set(self.budget._purses.entries):
            assert self.model.pop(key) == self.cap
        self.model.setdefault(place, Fraction(self.cap))

    @precondition(lambda self: self.model)
    @invariant()
    def tokens_agree(self):
        assert set(self.budget._purses.entries) == set(self.model)
        assert len(self.model) <= self.max_keys + 1
        for key, tokens in self.model.items():
            assert Fraction(self.budget.tokens(self.now, key)) == tokens
            assert 0 <= tokens <= self.cap


BudgetMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBudgetMachine = BudgetMachine.TestCase


@settings(max_examples=200, deadline=None)
@given(
    refill=st.floats(0.01, 100),
    ratio=st.floats(0, 1),
    steps=st.lists(st.tuples(st.floats(0, 50), st.booleans()), min_size=1, max_size=40),
)
def test_odd_numbers_do_not_drift(refill, ratio, steps):
    budget = RetryBudget(cap=5, refill=refill, ratio=ratio)
    now, exact, deposits = 0.0, Fraction(5), 0
    for seconds, retries in steps:
        later = now + seconds
        exact = min(Fraction(5), exact + (Fraction(later) - Fraction(now)) / Fraction(refill))
        now = later
        if not retries:
            if budget._purses.entries:
                exact = min(Fraction(5), exact + Fraction(ratio))
            budget.deposit()
            deposits += 1
        elif budget.withdraw(ERROR, now):
            exact -= 1
        # Half a millionth of a token for the rounding of each deposit, and one for that of the clock.
        assert abs(Fraction(budget.tokens(now)) - exact) <= Fraction(deposits + 2, 2_000_000)


# -- threads ----------------------------------------------------------------------------------------------------


def test_threads_never_spend_more_than_was_there():
    budget = RetryBudget(cap=1000, refill=1e9, ratio=0.5, timeout_cost=2)
    barrier = threading.Barrier(8)
    spent = [0] * 8
    deposited = [0] * 8

    def hammer(index):
        barrier.wait()
        for step in range(2000):
            if step % 4 == 0:
                budget.deposit("k")
                deposited[index] += 1
            elif step % 4 == 1:
                spent[index] += 2 * budget.withdraw(TIMEOUT, 0.0, "k")
            else:
                spent[index] += budget.withdraw(ERROR, 0.0, "k")

    budget.withdraw(ERROR, 0.0, "k")  # from here on every deposit counts
    threads = [threading.Thread(target=hammer, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = budget.tokens(0.0, "k")
    assert left >= 0
    assert 1 + sum(spent) + left <= 1000 + sum(deposited) * 0.5
    assert drain(budget, 0.0, "k") == int(left)


def test_threads_share_one_budget_through_retries():
    attempts = []
    budget = RetryBudget(cap=7, refill=1e9, ratio=0, timeout_cost=1)

    def call():
        retry = Retry(100, on=OSError, wait=1, budget=budget)
        try:
            retry.call(fail)
        except OSError:
            return

    def fail():
        attempts.append(None)
        raise OSError

    with virtual_time() as clock:
        clock.run_threads(*[call] * 8)
    assert len(attempts) == 8 + 7
