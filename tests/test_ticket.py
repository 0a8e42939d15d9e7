import asyncio

import pytest

from resilient.ticket import Ticket


def test_a_grant_wakes_the_holder():
    ticket = Ticket(expires_at=3.0)
    woken = []
    assert ticket.attach(lambda: woken.append(1))
    assert not ticket.granted
    assert ticket.grant()
    assert ticket.granted
    assert woken == [1]


def test_a_grant_may_come_before_the_holder_waits():
    ticket = Ticket()
    assert ticket.grant()
    assert not ticket.attach(lambda: None)


def test_a_holder_whose_loop_has_ended_cannot_be_woken():
    loop = asyncio.new_event_loop()
    ticket = Ticket()
    ticket.attach(lambda: loop.call_soon_threadsafe(print))
    loop.close()
    assert not ticket.grant()
    assert not ticket.granted


def test_other_errors_of_the_holder_come_out():
    ticket = Ticket()
    ticket.attach(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ticket.grant()


def test_what_it_carries():
    ticket = Ticket(ready_at=2.0)
    assert (ticket.ready_at, ticket.expires_at, ticket.value, ticket.error) == (2.0, None, None, None)
