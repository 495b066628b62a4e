"""Admission of batches' lines: only where nobody else waits, and never more than their part."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from seamount.server.admission.core import AdmissionCore, Capacity, Ticket
from seamount.server.admission.shares import BATCH, PRIORITIES


def ticket(priority: int, tokens: int = 10, n: int = 1, tenant: str = "a") -> Ticket:
    return Ticket(tenant=tenant, priority=priority, num_sequences=n, num_tokens=tokens)


def core(sequences: int = 4) -> AdmissionCore:
    made = AdmissionCore(max_waiting=100, max_wait_s=1e9)
    made.open(Capacity(max_sequences=sequences, max_tokens=1000), 0.0)
    return made


def ask(core: AdmissionCore, *tickets: Ticket) -> list[str]:
    for one in tickets:
        core.ask(one, 0.0)
        core.admit(0.0)
    return [one.state for one in tickets]


def test_lines_keep_to_half_and_with_the_lowest_priority_to_three_quarters():
    here = core(8)
    assert ask(here, *(ticket(BATCH) for _ in range(5))) == ["admitted"] * 4 + ["waiting"]
    assert ask(here, *(ticket(-1) for _ in range(3))) == ["admitted"] * 2 + ["waiting"]
    assert ask(here, *(ticket(0) for _ in range(2))) == ["admitted"] * 2
    other = core(8)
    assert ask(other, *(ticket(-1) for _ in range(4))) == ["admitted"] * 4
    assert ask(other, ticket(BATCH)) == ["waiting"]


def test_no_line_begins_while_anybody_waits_even_for_what_it_would_not_take():
    here = core(4)
    low = [ticket(-1) for _ in range(3)]
    assert ask(here, *low) == ["admitted", "admitted", "waiting"]
    line = ticket(BATCH)
    assert ask(here, line) == ["waiting"]
    here.leave(low[2], 0.0)
    assert line.state == "waiting"  # half the places are held by those of the lowest priority
    here.leave(low[0], 0.0, num_tokens=10)
    assert line.state == "admitted"


def test_held_back_lines_do_not_begin_and_hold_nobody_up():
    here = core(2)
    lines = [ticket(BATCH), ticket(BATCH)]
    assert ask(here, *lines) == ["admitted", "waiting"]
    here.hold_batches()
    here.leave(lines[0], 0.0, num_tokens=10)
    assert lines[1].state == "waiting"
    assert ask(here, ticket(0), ticket(0), ticket(0)) == ["admitted", "admitted", "waiting"]


def test_a_full_queue_drops_lines_first():
    here = AdmissionCore(max_waiting=1, max_wait_s=1e9)
    here.open(Capacity(max_sequences=1, max_tokens=1000), 0.0)
    running, line, person = ticket(0), ticket(BATCH), ticket(-1)
    assert ask(here, running, line) == ["admitted", "waiting"]
    assert here.ask(person, 0.0) is line
    assert (line.state, person.state) == ("over", "waiting")


def test_an_engine_with_one_place_gives_it_to_a_line_only_when_nobody_is_there():
    here = core(1)
    person, line = ticket(0), ticket(BATCH)
    assert ask(here, person, line) == ["admitted", "waiting"]
    here.leave(person, 0.0, num_tokens=10)
    assert line.state == "admitted"


@given(seed=st.integers(0, 2**32), sequences=st.integers(2, 8))
def test_under_any_traffic_lines_wait_for_everybody_and_leave_room(seed, sequences):
    chance, here = random.Random(seed), core(sequences)
    known: list[Ticket] = []
    for _ in range(120):
        before = [one for one in known if one.state == "waiting"]
        if chance.random() < 0.6:
            one = ticket(
                chance.choice((BATCH, BATCH, *PRIORITIES)), chance.choice((1, 20, 90)), tenant=chance.choice("ab")
            )
            known.append(one)
            here.ask(one, 0.0)
            here.admit(0.0)
        elif running := [one for one in known if one.state == "admitted"]:
            here.leave(chance.choice(running), 0.0, num_tokens=5)
        began = [one for one in before if one.state == "admitted"]
        waiting = [one for one in known if one.state == "waiting"]
        if any(one.priority == BATCH for one in began):
            assert all(one.priority == BATCH for one in waiting)
        admitted = [one for one in known if one.state == "admitted"]
        lines = [one for one in admitted if one.priority == BATCH]
        if lines and len(admitted) > 1:
            assert sum(one.num_sequences for one in lines) <= max(sequences / 2, 1)
    for one in [one for one in known if one.state == "admitted"]:
        here.leave(one, 0.0, num_tokens=5)
    while admitted := [one for one in known if one.state == "admitted"]:
        for one in admitted:
            here.leave(one, 0.0, num_tokens=5)
    assert all(one.state == "over" for one in known)
    assert (here.num_sequences, here.num_tokens, here.num_admitted) == (0, 0, 0)
