"""Which bearer token is in use, and who renews it (RFC 6749 section 5.1, RFC 6750).

The age of a token decides who renews it:

    0 ........................ expires_in - early ............ expires_in ............
    everybody uses it        | one caller renews it first,   | everybody waits
                             | the others go on with it      | for the new one

However many callers need a new token at one moment, one of them leads, in whatever thread or event loop it runs:
it asks for the token, and the others wait for what comes of it. They share its failure too, and so does whoever
comes within the next second: asking a failing token endpoint once for each request would help nobody. A leader
that is cancelled hands over to the one who has waited longest. A leader that is not heard of any more counts as
failed when its time is up, so nothing that gets lost can keep the others waiting for ever.

`Tokens` decides all of this, by numbers alone; `resilient.http.auth` acts on it.
"""

import math
import re
import sys
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from resilient.ticket import Ticket

_PRINTABLE = re.compile(r"[\x20-\x7e]+")  # RFC 6749 A.12 and A.17


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """What a token endpoint gives out (RFC 6749 5.1); it does not show its secrets.

    Args:
        access_token: The token that requests carry: printable ASCII without spaces.
        expires_in: For how many seconds it is good, a number >= 0, counted from when it was asked for. Default
            None: until a server refuses it.
        refresh_token: What the next token is to be asked for with. Default None: with the one at hand.
        token_type: `"Bearer"` in any case of letters. Other types are refused, as RFC 6749 7.1 wants.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value that is not allowed.
    """

    access_token: str
    expires_in: float | None = None
    refresh_token: str | None = None
    token_type: str = "Bearer"  # noqa: S105 - the name of a kind of tokens

    def __post_init__(self) -> None:
        check_secret("Token", "access_token", self.access_token)
        if " " in self.access_token:  # RFC 6750 2.1: it is one word of a header
            raise _not_allowed("Token", "access_token", ValueError)
        if self.refresh_token is not None:
            check_secret("Token", "refresh_token", self.refresh_token)
        if not isinstance(self.token_type, str) or self.token_type.lower() != "bearer":
            raise ValueError("Token: this token_type is not allowed; give 'Bearer'")
        length = self.expires_in
        if length is None:
            return
        allowed = "Token: this expires_in is not allowed; give a number of seconds >= 0, or None"
        if isinstance(length, bool) or not isinstance(length, int | float):
            raise TypeError(allowed)
        if not 0 <= length <= sys.float_info.max:
            raise ValueError(allowed)

    def __repr__(self) -> str:
        refresh = "None" if self.refresh_token is None else "***"
        return f"Token(access_token=***, expires_in={self.expires_in!r}, refresh_token={refresh})"


class Issued:
    """A token in use.

    Attributes:
        header: What requests carry.
        asked_at: When it was asked for.
        early_at: When it is to be renewed.
        expires_at: When it is good no more.
        spared_until: Until when a refusal is no reason to renew it.
    """

    __slots__ = ("asked_at", "early_at", "expires_at", "header", "spared_until")

    def __init__(self, flight: "Flight", token: Token, early: float) -> None:
        life = math.inf if token.expires_in is None else float(token.expires_in)
        self.header = f"Bearer {token.access_token}"
        # Counted from when it was asked for, because nobody knows how long the answer was under way.
        self.asked_at = flight.started_at
        self.expires_at = flight.started_at + life
        self.early_at = self.expires_at - min(early, life / 2)
        self.spared_until = -math.inf


class Flight:
    """One attempt to get a token.

    Attributes:
        number: They are counted, so that a late answer does not replace a newer one.
        refresh_token: What it asks with, or None.
        started_at: When it began.
        overdue_at: When it counts as failed.
        begun: Whether it goes on by itself now, with or without the caller who leads.
    """

    __slots__ = ("begun", "number", "overdue_at", "refresh_token", "started_at")

    def __init__(self, number: int, refresh_token: str | None, now: float, timeout: float) -> None:
        self.number = number
        self.refresh_token = refresh_token
        self.started_at = now
        self.overdue_at = now + timeout
        self.begun = False


@dataclass(frozen=True, slots=True)
class Failure:
    """How a flight failed.

    Attributes:
        reason: In a few words, without secrets.
        code: The error code of the token endpoint, or None.
        pause: For how many seconds the token endpoint wants to be left alone.
        until: How long the failure is remembered: until then nobody asks again.
        cause: The error behind it, for those who waited for this flight.
    """

    reason: str
    code: str | None = None
    pause: float = 0.0
    until: float = 0.0
    cause: BaseException | None = None


class Tokens:
    """Which token is in use, and who renews it.

    Every method may be called from any thread. None of them waits, reads a clock or calls a function of the user.

    Args:
        early: How many seconds before its end a token is renewed.
        timeout: For how many seconds an answer is waited for.
        retry_failed_after: For how many seconds a failure is remembered.
        refresh_token: The first one, or None.
    """

    def __init__(
        self, *, early: float, timeout: float, retry_failed_after: float, refresh_token: str | None = None
    ) -> None:
        self._early = early
        self._timeout = timeout
        self._retry_failed_after = retry_failed_after
        self._refresh_token = refresh_token
        self._lock = threading.Lock()
        self._issued: Issued | None = None
        self._landed = 0
        self._started = 0
        self._flight: Flight | None = None
        self._failure: Failure | None = None
        self._waiting: deque[Ticket] = deque()

    def look(self, now: float, expires_at: float) -> Issued | Ticket | Flight | Failure:
        """Say what a caller who needs a token is to do.

        Args:
            now: The time.
            expires_at: How long the caller can wait at most.

        Returns:
            A token to use; a ticket to wait with, whose value will be any of the others; a flight to lead, which
            has to end in `land`, `fail` or `abandon`; or the failure of a flight that ended a moment ago.
        """
        issued = self._issued
        if issued is not None and now < issued.early_at:
            return issued
        with self._lock:
            self._give_up_overdue(now)
            valid = self._valid(now)
            if valid is not None and now < valid.early_at:
                return valid
            if self._flight is not None:
                return valid or self._queue_up(expires_at)
            if self._failure is not None and now < self._failure.until:
                return valid or self._failure
            return self._start(now)

    def join(self, expires_at: float) -> Ticket:
        """Return a ticket for the flight that is under way."""
        with self._lock:
            return self._queue_up(expires_at)

    def begin(self, flight: Flight) -> bool:
        """Take note that a flight goes on by itself now; False if it has been given up."""
        with self._lock:
            flight.begun = self._flight is flight
            return flight.begun

    def land(self, flight: Flight, token: Token) -> tuple[Issued, bool]:
        """Take the token that a flight brought; tell what to use, and whether there is a new refresh token."""
        issued, rotated = Issued(flight, token, self._early), False
        with self._lock:
            if flight.number > self._landed:  # also one that was given up: its token is the newest there is
                self._issued, self._landed, self._failure = issued, flight.number, None
                rotated = token.refresh_token not in (None, self._refresh_token)
                if rotated:
                    self._refresh_token = token.refresh_token
            if self._flight is flight:
                self._end(issued)
        return issued, rotated

    def fail(self, flight: Flight, failure: Failure, now: float) -> Failure:
        """Take note that a flight failed; return what is remembered of it."""
        with self._lock:
            # A refresh token that was refused will be refused again, unless another flight has replaced it.
            used_up = failure.code == "invalid_grant" and flight.refresh_token is not None
            used_up = used_up and flight.refresh_token == self._refresh_token
            until = math.inf if used_up else self._remembered_until(now, failure.pause)
            failure = replace(failure, until=until)
            if self._flight is flight:
                self._fail(failure, now)
            return failure

    def abandon(self, flight: Flight, now: float) -> None:
        """Let the one who has waited longest lead, unless the flight goes on by itself."""
        with self._lock:
            if self._flight is not flight or flight.begun:
                return
            self._flight = None
            while self._waiting:
                ticket = self._waiting.popleft()
                ticket.value = self._start(now)
                if ticket.grant():
                    return
                self._flight = None

    def leave(self, ticket: Ticket, now: float) -> Issued | Failure:
        """Give back a ticket whose holder waits no longer; return what it gets instead."""
        with self._lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self._give_up_overdue(now)
            instead = self._valid(now) or Failure("no answer in time", until=now + self._retry_failed_after)
        if isinstance(ticket.value, Flight):  # just as it gave up: somebody else has to lead
            self.abandon(ticket.value, now)
        return instead

    def refuse(self, issued: Issued, now: float) -> bool:
        """Take note that a server refused a token; tell whether it makes sense to come with another one."""
        with self._lock:
            if self._issued is issued:
                if now < issued.spared_until:
                    return False
                self._issued = None
            return True

    def spare(self, issued: Issued, now: float) -> None:
        """Take note that a new token was refused as well: for a while it is not the token that is to blame."""
        issued.spared_until = now + self._retry_failed_after

    def valid(self, now: float) -> Issued | None:
        """Return the token if it has not expired, young or not."""
        with self._lock:
            return self._valid(now)

    def after_fork(self) -> None:
        """Forget who leads and who waits: they are not in this process."""
        self._lock = threading.Lock()
        self._flight = None
        self._waiting.clear()

    def _valid(self, now: float) -> Issued | None:
        issued = self._issued
        return issued if issued is not None and now < issued.expires_at else None

    def _start(self, now: float) -> Flight:
        self._started += 1
        self._flight = Flight(self._started, self._refresh_token, now, self._timeout)
        return self._flight

    def _queue_up(self, expires_at: float) -> Ticket:
        ticket = Ticket(expires_at=expires_at)
        self._waiting.append(ticket)
        return ticket

    def _give_up_overdue(self, now: float) -> None:
        flight = self._flight
        if flight is not None and now >= flight.overdue_at:
            self._fail(Failure("no answer in time", until=self._remembered_until(flight.overdue_at)), now)

    def _remembered_until(self, now: float, pause: float = 0.0) -> float:
        valid = self._valid(now)
        left = 0.0 if valid is None else (valid.expires_at - now) / 2  # no hurry while the old token serves
        return now + max(self._retry_failed_after, pause, left)

    def _fail(self, failure: Failure, now: float) -> None:
        self._failure = replace(failure, cause=None)
        self._end(self._valid(now) or failure)

    def _end(self, outcome: Issued | Failure) -> None:
        self._flight = None
        while self._waiting:
            ticket = self._waiting.popleft()
            ticket.value = outcome
            ticket.grant()


def check_secret(owner: str, option: str, value: Any) -> None:
    """Refuse what is no secret of OAuth, without showing it."""
    if not isinstance(value, str):
        raise _not_allowed(owner, option, TypeError)
    if not _PRINTABLE.fullmatch(value):
        raise _not_allowed(owner, option, ValueError)


def _not_allowed(owner: str, option: str, kind: type[Exception]) -> Exception:
    return kind(f"{owner}: this {option} is not allowed; give a str of printable ASCII")
