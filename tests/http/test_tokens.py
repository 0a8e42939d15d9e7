"""Which token is in use and who renews it, by numbers alone; `test_token_auth.py` has the same with clients."""

import copy
import math
import pickle

import pytest

from resilient.http.tokens import Failure, Flight, Issued, Token, Tokens
from resilient.ticket import Ticket


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ((None,), TypeError),
        ((b"acc3ss",), TypeError),
        (("",), ValueError),
        (("acc3ss\n",), ValueError),
        (("acc3ss acc3ss",), ValueError),
        (("acc3ss", "r3fr3sh"), TypeError),
        (("acc3ss", True), TypeError),
        (("acc3ss", -1), ValueError),
        (("acc3ss", math.nan), ValueError),
        (("acc3ss", math.inf), ValueError),
        (("acc3ss", 10**400), ValueError),
        (("acc3ss", 1, 7), TypeError),
        (("acc3ss", 1, ""), ValueError),
        (("acc3ss", 1, "r3fr3sh\r"), ValueError),
        (("acc3ss", None, None, "r3fr3sh"), ValueError),
        (("acc3ss", None, None, None), ValueError),
    ],
)
def test_bad_tokens(args, kind):
    with pytest.raises(kind, match=r"^Token: this \w+ is not allowed; give ") as caught:
        Token(*args)
    assert not any(secret in str(caught.value) for secret in ("r3fr3sh", "acc3ss"))


def test_a_token():
    token = Token("acc3ss", 3600, "r3fr3sh")
    assert repr(token) == str(token) == "Token(access_token=***, expires_in=3600, refresh_token=***)"
    assert repr(Token("acc3ss")) == "Token(access_token=***, expires_in=None, refresh_token=None)"
    assert pickle.loads(pickle.dumps(token)) == copy.deepcopy(token) == token != Token("acc3ss", 3600)
    with pytest.raises(AttributeError):
        token.access_token = "other"


def tokens(**kwargs):
    return Tokens(**{"early": 30, "timeout": 10, "retry_failed_after": 1} | kwargs)


def test_a_flight_and_its_token():
    state = tokens()
    flight = state.look(5, math.inf)
    assert isinstance(flight, Flight)
    assert (flight.number, flight.started_at, flight.overdue_at, flight.refresh_token) == (1, 5, 15, None)
    issued, rotated = state.land(flight, Token("acc3ss", 100, "r3fr3sh"))
    assert rotated
    assert (issued.header, issued.early_at, issued.expires_at) == ("Bearer acc3ss", 75, 105)
    assert state.look(74.9, math.inf) is issued
    assert state.valid(104.9) is issued
    assert state.valid(105) is None
    early = state.look(75, math.inf)
    assert isinstance(early, Flight)
    assert early.refresh_token == "r3fr3sh"
    assert state.look(75, math.inf) is issued
    assert state.look(94.9, math.inf) is issued  # overdue since 85, which is remembered for half of what was left
    assert isinstance(state.look(95, math.inf), Flight)


def test_a_token_that_lands_while_somebody_looks():
    state = tokens()
    first = state.look(0, math.inf)
    lock = state._lock

    class Meanwhile:
        def __enter__(self):
            state._lock = lock
            state.land(first, Token("acc3ss"))
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    state._lock = Meanwhile()
    assert isinstance(state.look(1, math.inf), Issued)


def test_tickets_expire_when_they_are_told_to():
    state = tokens()
    state.look(0, 10)
    ticket = state.look(1, 4)
    assert isinstance(ticket, Ticket)
    assert ticket.expires_at == 4
    failure = state.leave(ticket, 4)
    assert (failure.reason, failure.until) == ("no answer in time", 5)
    assert not state._waiting


def test_a_ticket_that_is_given_back_while_it_is_handed_the_lead():
    state = tokens()
    first = state.look(0, math.inf)
    ticket, other = state.look(1, math.inf), state.look(2, math.inf)
    state.abandon(first, 3)
    assert isinstance(ticket.value, Flight)
    assert ticket.value is not first
    state.leave(ticket, 3)
    assert isinstance(other.value, Flight)
    state.leave(other, 3)
    assert isinstance(state.look(3, math.inf), Flight)


def test_a_ticket_whose_event_loop_has_ended_is_passed_over():
    state = tokens()
    first = state.look(0, math.inf)
    gone, there = state.look(1, math.inf), state.look(2, math.inf)

    def wake():
        raise RuntimeError("the loop is closed")

    gone.attach(wake)
    state.abandon(first, 3)
    assert isinstance(there.value, Flight)
    assert there.granted
    state.leave(there, 3)
    alone = state.look(3, math.inf)
    waiting = state.look(4, math.inf)
    waiting.attach(wake)
    state.abandon(alone, 4)
    assert state._flight is None
    assert isinstance(state.look(4, math.inf), Flight)


def test_a_flight_that_has_begun_is_not_abandoned():
    state = tokens()
    flight = state.look(0, math.inf)
    assert state.begin(flight)
    state.abandon(flight, 1)
    assert isinstance(state.look(1, math.inf), Ticket)
    state.fail(flight, Failure("no"), 2)
    assert not state.begin(flight)


def test_an_overdue_flight_fails_for_everybody():
    state = tokens()
    flight = state.look(0, math.inf)
    ticket = state.look(5, math.inf)
    found = state.look(10.5, math.inf)
    assert (found.reason, found.until) == ("no answer in time", 11)
    assert ticket.value.reason == "no answer in time"
    another = state.look(11, math.inf)
    assert (another.number, state.fail(flight, Failure("late"), 12).until) == (2, 13)
    assert isinstance(state.look(12, math.inf), Ticket)  # a late failure changes nothing
    issued, rotated = state.land(flight, Token("old", None, "r3fr3sh-1"))
    assert rotated
    assert state.look(12, math.inf) is issued  # a late token does
    assert state.land(another, Token("new", None, "r3fr3sh-2"))[1]
    newest = state.look(12, math.inf)
    assert newest.header == "Bearer new"
    assert state.land(flight, Token("old", None, "r3fr3sh-1"))[1] is False
    assert state.look(12, math.inf) is newest


def test_who_leads_no_more_takes_nothing_from_who_does():
    state = tokens()
    first = state.look(0, math.inf)
    state.look(10, math.inf)
    second = state.look(11, math.inf)
    waiting = state.look(11, math.inf)
    state.abandon(first, 12)
    assert isinstance(state.look(12, math.inf), Ticket)
    assert not waiting.granted
    state.land(second, Token("acc3ss"))
    assert waiting.granted


def test_who_waits_in_vain_tells_the_others():
    state = tokens()
    state.look(0, math.inf)
    first, second = state.look(1, 11), state.look(5, 15)
    state.leave(first, 11)
    assert second.value.reason == "no answer in time"
    assert second.granted


def test_a_late_token_does_not_end_the_flight_of_another():
    state = tokens(refresh_token="r3fr3sh-0")
    late = state.look(0, math.inf)
    state.look(10, math.inf)
    current = state.look(11, math.inf)
    waiting = state.look(11, math.inf)
    state.land(late, Token("acc3ss", 0, "r3fr3sh-1"))
    assert not waiting.granted
    assert isinstance(state.look(12, math.inf), Ticket)
    assert state.fail(current, Failure("no"), 12).until == 13
    assert waiting.value.reason == "no"


def test_a_late_token_mends_what_seemed_to_be_over_for_good():
    state = tokens(refresh_token="r3fr3sh-0")
    late = state.look(0, math.inf)
    state.look(10, math.inf)
    current = state.look(11, math.inf)
    assert state.fail(current, Failure("refused", "invalid_grant"), 11).until == math.inf
    assert isinstance(state.look(1e9, math.inf), Failure)
    state.land(late, Token("acc3ss", 100, "r3fr3sh-1"))
    flight = state.look(1e9, math.inf)
    assert flight.refresh_token == "r3fr3sh-1"


def test_a_refresh_token_that_was_replaced_meanwhile_is_not_missed():
    state = tokens(refresh_token="r3fr3sh-0")
    late = state.look(0, math.inf)
    state.look(10, math.inf)
    current = state.look(11, math.inf)
    ticket = state.look(11, math.inf)
    issued, _ = state.land(late, Token("acc3ss", 100, "r3fr3sh-1"))
    failure = state.fail(current, Failure("refused", "invalid_grant"), 12)
    assert failure.until < math.inf
    assert ticket.value is issued
    assert state.look(12, math.inf) is issued


def test_a_pause_that_was_asked_for():
    state = tokens()
    assert state.fail(state.look(0, math.inf), Failure("no", pause=30), 0).until == 30
    assert state.fail(state.look(30, math.inf), Failure("no", pause=0.5), 30).until == 31
    # While a token serves, the next try comes after half of what is left of it.
    state.land(state.look(31, math.inf), Token("acc3ss", 20))
    assert state.fail(state.look(41, math.inf), Failure("no"), 42).until == 46.5


def test_refusals():
    state = tokens()
    issued, _ = state.land(state.look(0, math.inf), Token("acc3ss"))
    assert state.refuse(issued, 0)
    newer, _ = state.land(state.look(0, math.inf), Token("newer"))
    assert state.refuse(issued, 0)  # an old one: there is a newer one
    assert state.look(0, math.inf) is newer
    state.spare(newer, 5)
    assert not state.refuse(newer, 5.9)
    assert state.look(5.9, math.inf) is newer
    assert state.refuse(newer, 6)
    assert isinstance(state.look(6, math.inf), Flight)


def test_who_gives_up_may_go_on_with_the_old_token():
    state = tokens(timeout=40)
    issued, _ = state.land(state.look(0, math.inf), Token("acc3ss", 100))
    flight = state.look(80, math.inf)
    ticket = state.join(90)
    assert state.leave(ticket, 90) is issued
    state.land(flight, Token("newer"))
