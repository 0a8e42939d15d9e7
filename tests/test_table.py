"""The bounded table that never forgets a limit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.table import OVERFLOW, Table


def idle(state):
    return state["left"] == 0


def test_keys_have_entries_of_their_own_while_there_is_room():
    table = Table(2)
    a = table.add("a", {"left": 1}, idle)
    b = table.add("b", {"left": 2}, idle)
    assert table.entries == {"a": {"left": 1}, "b": {"left": 2}}
    assert (a, b) == ({"left": 1}, {"left": 2})


def test_an_idle_key_makes_room():
    table = Table(2)
    table.add("a", {"left": 1}, idle)
    table.add("b", {"left": 0}, idle)
    table.add("c", {"left": 3}, idle)
    assert set(table.entries) == {"a", "c"}


def test_without_an_idle_key_new_keys_share_one_entry():
    table = Table(2)
    for key in "ab":
        table.add(key, {"left": 1}, idle)
    first = table.add("c", {"left": 7}, idle)
    second = table.add("d", {"left": 9}, idle)
    assert first is second is table.entries[OVERFLOW]
    assert first == {"left": 7}
    assert set(table.entries) == {"a", "b", OVERFLOW}
    assert repr(OVERFLOW) == "OVERFLOW"


def test_the_overflow_entry_is_left_for_room_of_ones_own_when_there_is_some():
    table = Table(1)
    table.add("a", {"left": 1}, idle)
    assert table.place_for("b", idle) is OVERFLOW
    table.entries["a"]["left"] = 0
    assert table.place_for("b", idle) == "b"


def test_the_search_for_an_idle_key_goes_on_where_it_ended():
    table = Table(100)
    for number in range(100):
        table.add(number, {"left": 1}, idle)
    table.entries[50]["left"] = 0
    places = [table.place_for(f"new{turn}", idle) for turn in range(7)]
    # 16 keys are looked at in one search, so the one in the middle is found by one of the first seven
    found = [place for place in places if place is not OVERFLOW]
    assert len(found) == 1
    assert 50 not in table.entries


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2), st.booleans()), max_size=80),
)
def test_a_key_that_is_not_idle_is_never_dropped(max_keys, steps):
    """Each step adds or changes a key; `calm` makes all entries idle."""
    table = Table(max_keys)
    busy = {}
    for key, left, calm in steps:
        if calm:
            for state in table.entries.values():
                state["left"] = 0
            busy.clear()
        state = table.entries[key] if key in table.entries else table.add(key, {"left": 0}, idle)
        state["left"] = max(state["left"], left)
        if state is table.entries.get(key) and left:
            busy[key] = state
        for kept, its_state in busy.items():
            assert table.entries[kept] is its_state
        assert len(table.entries) <= max_keys + (OVERFLOW in table.entries)
        assert (OVERFLOW in table.entries) or key in table.entries
