"""Requests that miss the same answer at the same time: one leads, the others follow it (RFC 9111 4).

A leader lands with an outcome, and everybody who follows is told. If he is cancelled, the one who has waited
longest takes over. Where an answer turned out to be none to share, nobody follows anybody for `APART_SECONDS`
(Varnish calls that hit-for-miss): so those who poll for something that must not be kept never wait for each other.

Nothing here takes a lock or reads a clock; the tickets are waited for by whoever has them.
"""

from collections import deque
from collections.abc import Hashable
from typing import Any, Final

from cachetools import LRUCache

from resilient.ticket import Ticket

APART_SECONDS: Final = 120.0
"""For how long nobody follows after an answer that could not be shared."""

_REMEMBERED = 1024  # how many keys are known not to be shared


class _Sign:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


LEAD: Final = _Sign("LEAD")
"""The outcome of one who has to lead now."""

ALONE: Final = _Sign("ALONE")
"""The outcome of one who has to go on by himself."""


class Passenger:
    """One request.

    Attributes:
        flight: The flight that it leads, None if it leads none.
        followed: The flight that it follows or has followed.
        ticket: What it waits for; its `value` will be the outcome.
    """

    __slots__ = ("flight", "followed", "ticket")

    followed: "Flight"
    ticket: Ticket

    def __init__(self) -> None:
        self.flight: Flight | None = None


class Flight:
    """A request that is under way, and those who follow it.

    Args:
        key: What those who follow have in common.
        leader: Who leads it.
        number: The number of its request.
    """

    __slots__ = ("key", "leader", "number", "waiting")

    def __init__(self, key: Hashable, leader: Passenger, number: int) -> None:
        self.key = key
        self.leader = leader
        self.number = number
        self.waiting: deque[Passenger] = deque()


class Flights:
    """All that are under way."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight] = {}
        self._apart: LRUCache[Hashable, float] = LRUCache(_REMEMBERED)  # until when nobody follows

    def __len__(self) -> int:
        return len(self._flights)

    def get(self, key: Hashable) -> Flight | None:
        """Return the flight under a key, or None."""
        return self._flights.get(key)

    def lead(self, passenger: Passenger, key: Hashable, number: int) -> None:
        """Have somebody lead from now on; another flight under this key goes on, but nobody joins it any more."""
        self._flights[key] = passenger.flight = Flight(key, passenger, number)

    def follow(self, passenger: Passenger, flight: Flight, expires_at: float | None) -> None:
        """Have somebody follow; he waits for his ticket until it expires."""
        passenger.ticket, passenger.followed = Ticket(expires_at=expires_at), flight
        flight.waiting.append(passenger)

    def tell(self, leader: Passenger, outcome: Any) -> None:
        """Tell all who follow somebody, so that nobody does any more; the flight goes on."""
        while leader.flight is not None and leader.flight.waiting:
            ticket = leader.flight.waiting.popleft().ticket
            ticket.value = outcome
            ticket.grant()

    def land(self, leader: Passenger, outcome: Any) -> None:
        """End the flight that somebody leads, if any, and tell all who follow."""
        self.tell(leader, outcome)
        flight, leader.flight = leader.flight, None
        if flight is not None:
            self._close(flight)

    def abandon(self, leader: Passenger) -> None:
        """Have the one who has waited longest lead in the place of somebody."""
        flight, leader.flight = leader.flight, None
        while flight is not None and flight.waiting:
            heir = flight.leader = flight.waiting.popleft()
            heir.flight, heir.ticket.value = flight, LEAD
            if heir.ticket.grant():
                return
            heir.flight = None
        if flight is not None:
            self._close(flight)

    def leave(self, passenger: Passenger) -> None:
        """Have somebody wait no more. If he was to lead, just as he gave up, the next one does."""
        if passenger in passenger.followed.waiting:
            passenger.followed.waiting.remove(passenger)
        self.abandon(passenger)

    def clear(self) -> None:
        """Forget all flights."""
        self._flights.clear()

    def apart(self, primary: Hashable, now: float) -> bool:
        """Tell whether nobody follows anybody who asks for this."""
        return self._apart.get(primary, now) > now

    def set_apart(self, primary: Hashable, now: float) -> None:
        """Have nobody follow for a while."""
        self._apart[primary] = now + APART_SECONDS

    def unite(self, primary: Hashable) -> None:
        """Let people follow each other again."""
        self._apart.pop(primary, None)

    def _close(self, flight: Flight) -> None:
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]
