"""A policy of your own: a gate that is open from nine to five.

A policy only decides. It is given the time and never reads a clock, so a test can try any hour at once.
"""

from resilient import Rejected
from resilient.kinds import Gate

HOUR = 3600.0


class OfficeHours(Gate):
    """Let calls start only within office hours.

    Args:
        opens: The hour at which calls may start.
        closes: The hour from which they may not.
        name: What errors and events call this policy.
    """

    def __init__(self, *, opens: int = 9, closes: int = 17, name: str | None = None) -> None:
        super().__init__(name=name)
        self.opens = opens
        self.closes = closes

    def admit(self, call, now):
        hour = now / HOUR % 24
        if not self.opens <= hour < self.closes:
            wait = (self.opens - hour) % 24 * HOUR
            raise Rejected("the office is closed", policy=self.label, retry_after=wait)


if __name__ == "__main__":
    from resilient.testing import virtual_time

    guarded = OfficeHours()(lambda: "good morning")
    with virtual_time(start=8 * HOUR) as clock:
        try:
            guarded()
        except Rejected as refused:
            print(refused)
            clock.sleep(refused.retry_after)
        print(guarded())
