"""The states of replicas, by numbers."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from resilient.http.outliers import Ejected, Outliers, Returned


def outliers(size=4, **changed):
    defaults = {
        "consecutive": 5,
        "failure_rate": 0.5,
        "minimum_calls": 20,
        "window": 30.0,
        "eject_for": 30.0,
        "max_eject_for": 300.0,
        "max_ejected": 0.5,
    }
    return Outliers(size, **(defaults | changed))


def end(group, number, failed, now, started=None):
    return group.record(number, failed=failed, started=now if started is None else started, now=now)


def fail(group, number, now, times=5, started=None):
    """Let a replica fail so many times in a row; return what changed."""
    return [change for _ in range(times) for change in end(group, number, True, now, started)]


def test_so_many_failures_in_a_row_eject():
    group = outliers()
    assert fail(group, 2, 1.0, times=4) == []
    assert (group.healthy(2), group.out, group.ejected_until(2)) == (True, 0, None)
    assert fail(group, 2, 1.0, times=1) == [Ejected(2, "consecutive", 30.0)]
    assert (group.healthy(2), group.out, group.ejected_until(2)) == (False, 1, 31.0)
    assert [group.healthy(number) for number in range(4)] == [True, True, False, True]


def test_a_success_starts_the_count_again():
    group = outliers()
    fail(group, 0, 1.0, times=4)
    assert end(group, 0, False, 1.0) == []
    assert fail(group, 0, 1.0, times=4) == []
    assert fail(group, 0, 1.0, times=1) == [Ejected(0, "consecutive", 30.0)]


def test_each_replica_has_its_own_count():
    group = outliers()
    assert [change for _ in range(4) for number in range(4) for change in end(group, number, True, 1.0)] == []


def test_the_failure_rate_ejects_from_the_minimum_of_calls_on():
    group = outliers()
    changes = [change for index in range(19) for change in end(group, 1, index % 2 == 1, 1.0)]
    assert changes == []
    assert end(group, 1, True, 1.0) == [Ejected(1, "failure_rate", 30.0)]


def test_a_rate_below_does_not_eject():
    group = outliers()
    assert [
        change for index in range(100) for change in end(group, 1, index % 9 in (1, 3, 5, 7), index / 10)
    ] == []


def test_the_window_forgets():
    group = outliers()
    for index in range(18):
        end(group, 1, index % 2 == 0, 1.0)
    assert fail(group, 1, 40.0, times=2) == []


def test_a_success_does_not_eject_whatever_the_rate():
    group = outliers(minimum_calls=8)
    for failed in (True, True, True, True, False, False, False):
        assert end(group, 0, failed, 1.0) == []
    assert end(group, 0, False, 1.0) == []  # 4 of 8
    assert end(group, 0, True, 1.0) == [Ejected(0, "failure_rate", 30.0)]


def test_it_comes_back_when_its_time_is_over_with_a_clean_slate():
    group = outliers(minimum_calls=6)
    fail(group, 0, 1.0)
    assert group.age(30.9) == []
    assert group.age(50.0) == [Returned(0, 31.0)]
    assert (group.healthy(0), group.ejected_until(0), group.out, group.age(50.0)) == (True, None, 0, [])
    assert fail(group, 0, 50.0, times=4) == []
    assert end(group, 0, True, 50.0) == [Ejected(0, "consecutive", 60.0)]


def test_an_outcome_brings_back_those_whose_time_is_over():
    group = outliers()
    fail(group, 0, 1.0)
    assert end(group, 1, False, 31.0) == [Returned(0, 31.0)]
    fail(group, 0, 31.0)
    assert fail(group, 0, 91.0, times=1) == [Returned(0, 91.0)]


def test_what_began_before_an_ejection_does_not_count_after_it():
    group = outliers()
    fail(group, 0, 1.0)
    assert fail(group, 0, 1.5, times=20, started=0.5) == []
    assert group.age(31.0) == [Returned(0, 31.0)]
    assert fail(group, 0, 32.0, times=20, started=0.5) == []
    assert fail(group, 0, 32.0, times=20, started=30.9) == []  # sent in spite of the ejection
    assert fail(group, 0, 32.0, times=5, started=31.0) == [Ejected(0, "consecutive", 60.0)]


def test_ejections_grow_up_to_the_maximum():
    group = outliers(max_eject_for=100.0)
    now, lengths = 0.0, []
    for _ in range(6):
        (change,) = fail(group, 0, now)
        lengths.append(change.seconds)
        now += change.seconds
        assert group.age(now) == [Returned(0, now)]
    assert lengths == [30.0, 60.0, 90.0, 100.0, 100.0, 100.0]


@pytest.mark.parametrize(
    ("good_for", "following"), [(29.9, 120.0), (30.0, 90.0), (89.9, 60.0 + 30.0 - 30.0), (90.0, 30.0), (1e6, 30.0)]
)
def test_good_behaviour_makes_the_next_ejection_shorter(good_for, following):
    group, now = outliers(), 0.0
    for _ in range(3):
        now += fail(group, 0, now)[0].seconds
        group.age(now)
    assert fail(group, 0, now + good_for) == [Ejected(0, "consecutive", following)]


def test_growth_begins_anew_from_the_maximum():
    """Ejections that were no longer than the maximum allows are not remembered either."""
    group, now = outliers(max_eject_for=60.0), 0.0
    for _ in range(50):
        now += fail(group, 0, now)[0].seconds
        group.age(now)
    assert fail(group, 0, now + 60) == [Ejected(0, "consecutive", 30.0)]


@pytest.mark.parametrize(
    ("size", "fraction", "room"),
    [
        (1, 0.5, 0),
        (2, 0.5, 1),
        (3, 0.5, 1),
        (4, 0.5, 2),
        (5, 0.5, 2),
        (3, 1 / 3, 1),
        (100, 0.29, 29),
        (3, 1.0, 3),
        (5, 0.0, 0),
    ],
)
def test_only_so_many_are_ejected_at_once(size, fraction, room):
    group = outliers(size, max_ejected=fraction)
    changes = [change for number in range(size) for change in fail(group, number, 1.0)]
    assert [change.number for change in changes] == list(range(room))
    assert group.out == size
    assert sum(group.ejected_until(number) is not None for number in range(size)) == room


def test_one_that_is_spared_is_not_healthy_and_comes_back_without_a_word():
    group = outliers(2)
    fail(group, 0, 0.0)
    assert fail(group, 1, 10.0) == []
    assert (group.healthy(1), group.ejected_until(1), group.out) == (False, None, 2)
    assert group.age(30.0) == [Returned(0, 30.0)]
    assert group.age(39.9) == []
    assert group.out == 1
    assert group.age(40.0) == []
    assert group.out == 0


def test_one_that_is_spared_is_ejected_when_it_fails_again_and_there_is_room():
    group = outliers(2)
    fail(group, 0, 0.0)
    fail(group, 1, 10.0)
    assert fail(group, 1, 20.0, times=3) == []
    assert end(group, 1, True, 30.0) == [Returned(0, 30.0), Ejected(1, "consecutive", 30.0)]
    assert (group.ejected_until(1), group.out) == (60.0, 1)
    assert fail(group, 1, 30.5, times=10, started=29.0) == []
    assert fail(group, 1, 31.0, times=10) == []
    assert group.age(60.0) == [Returned(1, 60.0)]
    assert group.out == 0


def test_what_began_while_one_was_spared_does_not_count_once_it_is_ejected():
    group = outliers(2)
    fail(group, 0, 0.0)
    fail(group, 1, 10.0)
    assert end(group, 1, True, 30.0, started=20.0) == [Returned(0, 30.0), Ejected(1, "consecutive", 30.0)]
    assert [end(group, 1, False, 31.0, started=29.0) for _ in range(9)] == [[]] * 9
    assert not group.healthy(1)


def test_one_that_is_ejected_is_not_ejected_again():
    group = outliers(4)
    fail(group, 0, 0.0)
    assert fail(group, 0, 10.0, times=9) == []
    assert group.ejected_until(0) == 30.0


def test_the_window_begins_anew_with_each_return():
    group = outliers(window=1000.0, minimum_calls=6)
    fail(group, 0, 0.0)
    group.age(30.0)
    assert fail(group, 0, 31.0, times=4) == []


def test_one_that_was_spared_gets_longer_the_next_time():
    group = outliers(1, max_ejected=0)
    fail(group, 0, 0.0)
    group.age(30.0)
    fail(group, 0, 30.0)
    assert (group.age(89.9), group.out) == ([], 1)
    assert (group.age(90.0), group.out) == ([], 0)


def test_as_many_successes_bring_one_back_early():
    group = outliers(2)
    fail(group, 0, 0.0)
    fail(group, 1, 0.0)
    assert [end(group, 0, False, 1.0) for _ in range(4)] == [[]] * 4
    assert end(group, 0, True, 2.0) == []
    assert [end(group, 0, False, 3.0) for _ in range(5)] == [[], [], [], [], [Returned(0, 3.0)]]
    assert group.healthy(0)
    assert [end(group, 1, False, 3.0) for _ in range(5)] == [[]] * 5
    assert group.healthy(1)
    assert fail(group, 0, 4.0, times=9, started=2.9) == []
    assert fail(group, 0, 4.0) == [Ejected(0, "consecutive", 60.0)]


def test_successes_that_began_before_do_not_bring_one_back():
    group = outliers(2)
    fail(group, 0, 1.0)
    assert [change for _ in range(9) for change in end(group, 0, False, 2.0, started=0.9)] == []


def test_successes_of_an_earlier_ejection_do_not_count_for_the_next():
    group = outliers(2)
    fail(group, 0, 0.0)
    for _ in range(4):
        end(group, 0, False, 1.0)
    group.age(30.0)
    fail(group, 0, 30.0)
    assert end(group, 0, False, 31.0) == []
    assert not group.healthy(0)


class Requests(RuleBasedStateMachine):
    """Any requests with any ends, against the list of what ended since the last change of a replica."""

    SIZE, ROOM = 3, 1

    def __init__(self):
        super().__init__()
        self.group = outliers(self.SIZE, consecutive=3, minimum_calls=6, window=1e6, max_eject_for=70.0)
        self.now = 0.0
        self.under_way = []
        self.replicas = [
            {"state": "in", "since": float("-inf"), "until": None, "ended": [], "times": 0}
            for _ in range(self.SIZE)
        ]

    @rule(seconds=st.sampled_from([0.5, 5.0, 30.0, 100.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def age(self):
        assert self.group.age(self.now) == self.expect_return()

    @rule(number=st.integers(0, SIZE - 1), times=st.integers(1, 4))
    def begin(self, number, times):
        self.under_way += [(number, self.now)] * times

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), failed=st.booleans())
    def finish(self, data, failed):
        number, started = self.under_way.pop(data.draw(st.integers(0, len(self.under_way) - 1)))
        expected = self.expect_return() + self.expect_end(number, failed, started)
        assert end(self.group, number, failed, self.now, started) == expected

    def expect_return(self):
        expected = []
        for number, replica in enumerate(self.replicas):
            if replica["state"] != "in" and replica["until"] <= self.now:
                expected += self.bring_back(number, replica["until"])
        return expected

    def expect_end(self, number, failed, started):
        replica = self.replicas[number]
        if started < replica["since"]:
            return []
        ended = replica["ended"] = [*replica["ended"], failed]
        if replica["state"] != "in":
            if ended[-3:] == [False] * 3:
                return self.bring_back(number, self.now)
            return self.eject(number) if failed and replica["state"] == "spared" else []
        in_a_row = ended[-3:] == [True] * 3
        if not failed or not (in_a_row or (len(ended) >= 6 and sum(ended) >= len(ended) / 2)):
            return []
        served = self.now - replica["since"]
        times = replica["times"] if served < 30 else max(0, replica["times"] - served // 30)
        replica["times"] = min(times + 1, 3)  # 90 s are more than 70 s
        replica["reason"] = "consecutive" if in_a_row else "failure_rate"
        replica |= {"state": "spared", "since": self.now, "ended": [], "until": self.now + self.length(replica)}
        return self.eject(number)

    def eject(self, number):
        if sum(each["state"] == "ejected" for each in self.replicas) == self.ROOM:
            return []
        replica = self.replicas[number]
        length = self.length(replica)
        replica |= {"state": "ejected", "since": self.now, "until": self.now + length}
        return [Ejected(number, replica["reason"], length)]

    def length(self, replica):
        return min(70.0, 30.0 * replica["times"])

    def bring_back(self, number, at):
        replica = self.replicas[number]
        told = replica["state"] == "ejected"
        replica |= {"state": "in", "since": at, "ended": []}
        return [Returned(number, at)] if told else []

    @invariant()
    def all_agree(self):
        states = [replica["state"] for replica in self.replicas]
        assert [self.group.healthy(number) for number in range(self.SIZE)] == [state == "in" for state in states]
        assert self.group.out == self.SIZE - states.count("in")
        assert states.count("ejected") <= self.ROOM
        for number, replica in enumerate(self.replicas):
            until = replica["until"] if replica["state"] == "ejected" else None
            assert self.group.ejected_until(number) == until


TestRequests = Requests.TestCase
