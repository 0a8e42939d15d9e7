"""The circuit breaker against a simpler model of it."""

import math

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from resilient import CircuitBreaker, CircuitOpen
from resilient.call import Call
from resilient.testing import virtual_time

TICK = 0.125


def function():
    """Stand for the guarded function."""


class Model:
    """A breaker that keeps everything in lists and counts periods instead of comparing times."""

    def __init__(self, *, rate, minimum, window, last, consecutive, slow, probes, lease, open_for):
        self.rate, self.minimum, self.window, self.last = rate, minimum, window, last
        self.consecutive, self.slow = consecutive, slow
        self.probes, self.lease, self.open_for = probes, lease, open_for
        self.state = "closed"
        self.period = 0  # how many transitions there have been
        self.outcomes = []  # (time, failed, slow), oldest first
        self.until = None
        self.trips = 0
        self.probe = None  # the call and when its lease ends
        self.results = []  # of the probes of this period

    def enter(self, state, now, *, forever=False):
        self.state = state
        self.period += 1
        self.probe, self.results = None, []
        if state == "open":
            self.until = math.inf if forever else now + min(self.open_for * 2**self.trips, 8 * self.open_for)
            self.trips += 1
        elif state == "closed":
            self.outcomes, self.trips = [], 0

    def admits(self, call, now):
        if self.state == "closed":
            return True
        if self.state == "open":
            if now < self.until:
                return False
            self.enter("half-open", now)
        if self.probe is not None and now < self.probe[1]:
            return False
        self.probe = (call, now + self.lease)
        return True

    def ends(self, call, period, started, now, outcome):
        slow = self.slow is not None and now - started >= self.slow
        failed = outcome == "failure"
        if self.state == "closed":
            if outcome == "nothing" or period != self.period:
                return
            self.outcomes.append((now, failed, slow))
            if (failed or slow) and self.too_bad(now):
                self.enter("open", now)
        elif self.probe is not None and self.probe[0] is call and now < self.probe[1]:
            self.probe = None
            if outcome != "nothing":
                self.results.append((failed, slow))
                self.judge(now)

    def seen(self, now):
        if self.last is not None:
            return self.outcomes[-self.last :]
        length = self.window / 10
        return [each for each in self.outcomes if each[0] // length > now // length - 10]

    def too_bad(self, now):
        if self.consecutive is not None:
            row = [failed for _, failed, _ in self.outcomes[-self.consecutive :]]
            return len(row) == self.consecutive and all(row)
        seen = self.seen(now)
        if len(seen) < self.minimum:
            return False
        return max(sum(failed for _, failed, _ in seen), sum(slow for *_, slow in seen)) >= self.rate * len(seen)

    def judge(self, now):
        failures, slow = (sum(column) for column in zip(*self.results, strict=True))
        enough = self.rate * self.probes
        if (self.consecutive is not None and failures) or failures >= enough or slow >= enough:
            self.enter("open", now)
        elif len(self.results) == self.probes:
            self.enter("closed", now)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.time = virtual_time()
        self.clock = self.time.__enter__()
        self.flying = []

    def teardown(self):
        self.time.__exit__(None, None, None)

    @initialize(
        kind=st.sampled_from(["time", "count", "consecutive"]),
        minimum=st.integers(1, 4),
        extra=st.integers(0, 3),
        rate=st.sampled_from([0.25, 0.5, 0.75, 1.0]),
        slow=st.sampled_from([None, 0.5, 2.0]),
        probes=st.integers(1, 4),
        lease=st.sampled_from([0.5, 4.0]),
    )
    def make(self, *, kind, minimum, extra, rate, slow, probes, lease):
        options = {"open_for": 2, "max_open_for": 16, "jitter": 0, "probes": probes, "probe_lease": lease}
        last = consecutive = None
        if kind == "consecutive":
            slow, consecutive = None, minimum
            options |= {"consecutive": minimum}
        else:
            options |= {"minimum_calls": minimum, "failure_rate": rate}
            options |= {} if slow is None else {"slow": slow, "slow_rate": rate}
            if kind == "count":
                last = minimum + extra
            options |= {"window": 5} if last is None else {"last": last}
        self.breaker = CircuitBreaker(**options)
        self.model = Model(
            rate=rate,
            minimum=minimum,
            window=5,
            last=last,
            consecutive=consecutive,
            slow=slow,
            probes=probes,
            lease=lease,
            open_for=2,
        )
        self.tick()

    def tick(self):
        self.clock.sleep(TICK)  # so that no two things happen at the same moment
        return self.clock.now()

    @rule(ticks=st.integers(1, 40))
    def time_passes(self, ticks):
        self.clock.sleep(ticks * TICK)

    @rule()
    def start(self):
        now = self.tick()
        call = Call(function, (), {})
        wanted = self.model.admits(call, now)
        refused = None
        try:
            self.breaker.admit(call, now)
        except CircuitOpen as error:
            refused = error
        assert wanted == (refused is None)
        if refused is None:
            self.flying.append((call, self.model.period, now))
        elif self.model.state == "half-open":
            assert refused.retry_after == self.model.probe[1] - now
        else:
            forever = self.model.until == math.inf
            assert refused.retry_after == (None if forever else self.model.until - now)

    @precondition(lambda self: self.flying)
    @rule(
        which=st.integers(0, 1_000),
        outcome=st.sampled_from(["success", "failure", "failure", "nothing"]),
    )
    def end(self, which, outcome):
        now = self.tick()
        call, period, started = self.flying.pop(which % len(self.flying))
        error = {"success": None, "failure": OSError(), "nothing": KeyboardInterrupt()}[outcome]
        self.model.ends(call, period, started, now, outcome)
        self.breaker.settle(call, error, started, now)

    @rule(failures=st.integers(1, 6))
    def a_burst_of_failures(self, failures):
        for _ in range(failures):
            before = len(self.flying)
            self.start()
            if len(self.flying) > before:
                self.end(which=before, outcome="failure")

    @rule(how=st.sampled_from(["isolate", "force_open", "close"]))
    def by_hand(self, how):
        now = self.tick()
        self.model.enter("closed" if how == "close" else "open", now, forever=how == "isolate")
        getattr(self.breaker, how)()

    @invariant()
    def they_agree(self):
        if hasattr(self, "breaker"):
            assert self.breaker.current_state == self.model.state
            if self.model.state == "closed" and self.model.consecutive is None:
                now = self.clock.now()
                seen = self.model.seen(now)
                counts = self.breaker._window.counts(now)
                assert counts == (len(seen), sum(f for _, f, _ in seen), sum(s for *_, s in seen))


TestCircuitBreaker = Machine.TestCase
TestCircuitBreaker.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
