"""Batches beside people's requests: who begins when, what is kept, and what ends a batch. No HTTP."""

from __future__ import annotations

import asyncio
import json

from batch_site import FOUR, TWO, Held, as_line, until

from seamount.core.identity import Principal
from seamount.server.batches.runner import LEASE_S
from seamount.server.batches.store import WINDOW_S, BatchStore, LineResult


async def test_every_line_is_answered_under_its_name_in_the_inputs_order(start):
    site = await start(Held(FOUR))
    batch = site.add("a", "b", "c", "d", "e")
    await site.begins("a", "b")
    site.engine.pass_on("b")
    await until(lambda: "c" in site.engine.begun)
    site.engine.open()
    ended = await site.ended(batch)
    assert (ended.status, ended.num_total, ended.num_completed, ended.num_failed) == ("completed", 5, 5, 0)
    assert ended.in_progress_s == ended.finalizing_s == ended.completed_s == 1_800_000_000
    assert ended.error_file_id is None
    found = site.lines(batch)
    assert [line["custom_id"] for line in found] == list("abcde")
    for line in found:
        assert (line["response"]["status_code"], line["error"]) == (200, None)
        assert line["response"]["body"]["choices"][0]["text"] == line["custom_id"]
        assert line["response"]["body"]["usage"]["completion_tokens"] == 3
    assert len({line["id"] for line in found} | {line["response"]["request_id"] for line in found}) == 10
    assert set(site.engine.priorities.values()) == {-2}


async def test_a_line_that_is_wrong_fails_alone(start):
    site = await start(Held())
    site.engine.open()
    lines = (as_line("a"), as_line("b", temperature=-1), as_line("c", prompt="x" * 5000), as_line("d", best_of=2))
    ended = await site.ended(site.add(*lines, as_line("e")))
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 2, 3)
    assert [line["custom_id"] for line in site.lines(ended)] == ["a", "e"]
    errors = site.lines(ended, failed=True)
    assert [line["custom_id"] for line in errors] == ["b", "c", "d"]
    assert [line["response"]["status_code"] for line in errors] == [400, 400, 400]
    told = [line["response"]["body"]["error"] for line in errors]
    assert [(error["code"], error["param"]) for error in told] == [
        ("invalid_value", "temperature"),
        ("context_length_exceeded", "prompt"),
        ("unsupported_parameter", "best_of"),
    ]


async def test_lines_that_are_no_requests_fail_the_batch_before_any_is_answered(start):
    site = await start(Held())
    site.engine.open()
    ended = await site.ended(site.add("a", as_line("b", stream=True), "a"))
    assert (ended.status, ended.output_file_id, ended.error_file_id) == ("failed", None, None)
    assert [(error.line, error.code) for error in ended.errors] == [
        (2, "unsupported_parameter"),
        (3, "duplicate_custom_id"),
    ]
    assert site.engine.begun == []


async def test_a_person_begins_at_once_and_before_further_lines(start):
    site = await start(Held(TWO))
    batch = site.add("line 1", "line 2", "line 3")
    await site.begins("line 1")
    await site.settles()
    assert site.engine.begun == ["line 1"], "half of the places stay free"
    first = asyncio.create_task(site.ask("first"))
    await site.begins("line 1", "first")
    second = asyncio.create_task(site.ask("second"))
    third = asyncio.create_task(site.ask("third"))
    await until(lambda: site.service.admission.load().num_waiting[0] == 2)
    site.engine.pass_on("line 1")
    await site.begins("line 1", "first", "second")
    site.engine.pass_on("second")
    await site.begins("line 1", "first", "second", "third")
    await site.settles()
    assert site.engine.begun[-1] == "third", "nobody waits, but there is no place"
    site.engine.pass_on("first")
    await site.begins("line 1", "first", "second", "third", "line 2")
    site.engine.open()
    assert await asyncio.gather(first, second, third) == ["first", "second", "third"]
    assert (await site.ended(batch)).num_completed == 3


async def test_tenants_take_turns(start):
    site = await start(Held(TWO))
    site.keys.add_first_administrator(tenant="admin", label="")
    one, other = (site.keys.add(Principal(key_id=None, tenant=tenant))[1].id for tenant in "ab")
    slow = site.add("a1", "a2", "a3", "a4", tenant="a", key_id=one)
    await site.begins("a1")
    quick = site.add("b1", "b2", tenant="b", key_id=other)
    await until(lambda: site.service.admission.load().num_waiting[-2] == 2)
    for name, then in (("a1", "b1"), ("b1", "a2"), ("a2", "b2")):
        site.engine.pass_on(name)
        await until(lambda then=then: site.engine.begun[-1] == then)
        await until(lambda: site.service.admission.load().num_waiting[-2] == 1)
    site.engine.pass_on("b2")
    assert (await site.ended(quick)).status == "completed"
    assert site.get(slow).status == "in_progress"
    site.engine.open()
    assert (await site.ended(slow)).num_completed == 4


async def test_a_tenants_batches_come_one_after_the_other_but_bad_lines_are_told_at_once(start):
    site = await start(Held(FOUR))
    first, second, third = site.add("a"), site.add("b"), site.add("c", "c")
    assert (await site.ended(third)).status == "failed"
    await until(lambda: site.get(second).status == "in_progress")
    await site.begins("a")
    await site.settles()
    assert site.engine.begun == ["a"]
    site.engine.open()
    assert (await site.ended(second)).status == "completed"
    assert site.engine.begun == ["a", "b"]
    assert site.get(first).status == "completed"


async def test_a_cancelled_batch_stops_at_once_and_keeps_what_it_has(start):
    site = await start(Held(TWO))
    batch, waiting = site.add("a", "b", "c"), site.add("d")
    await site.begins("a")
    site.engine.pass_on("a")
    await site.begins("a", "b")
    for one in (waiting, batch):
        site.store.ask_to_cancel("local", one.id)
        site.runner.cancel(one.id)
        ended = await site.ended(one)
        assert ended.status == "cancelled"
        assert ended.cancelled_s is not None
    await site.settles()
    assert site.engine.begun == ["a", "b"]
    assert site.engine.given_up == ["b"]
    assert [line["custom_id"] for line in site.lines(batch)] == ["a"]


async def test_a_batch_cancelled_at_another_server_stops_within_a_line(start):
    site = await start(Held(TWO))
    batch = site.add("a", "b", "c")
    await site.begins("a")
    site.store.ask_to_cancel("local", batch.id)
    site.engine.pass_on("a")
    ended = await site.ended(batch)
    assert (ended.status, ended.num_completed) == ("cancelled", 1)
    assert "c" not in site.engine.begun


async def test_a_draining_server_begins_no_line_and_the_next_one_goes_on(start):
    site = await start(Held(FOUR))
    batch = site.add(*"abcdef")
    await site.begins("a", "b")
    site.engine.pass_on("a")
    await site.begins("a", "b", "c")
    site.service.begin_drain()
    site.engine.pass_on("b")
    await until(lambda: site.get(batch).num_completed == 2)
    await site.settles()
    assert site.engine.begun == ["a", "b", "c"]
    await site.service.close()
    await site.runner.close()
    assert site.get(batch).status == "in_progress"
    assert site.get(batch).num_failed == 0
    later = await start(Held(FOUR))
    later.engine.open()
    ended = await later.ended(batch)
    assert (ended.num_completed, ended.num_failed) == (6, 0)
    assert [line["custom_id"] for line in later.lines(batch)] == list("abcdef")
    assert sorted(later.engine.begun) == list("cdef")


async def test_a_server_that_is_no_more_is_succeeded_when_its_lease_is_over(start, state, clock):
    site = await start(Held(FOUR))
    site.engine.open()
    gone = BatchStore(state, site.store.files, clock)
    site.service.begin_drain()  # so that the other one claims it
    batch = site.add(*"abcd")
    assert gone.claim("gone", int(clock() + LEASE_S), model="fake", busy_tenants=()).id == batch.id
    gone.start("gone", batch.id, 4)
    gone.keep("gone", batch.id, [LineResult(2, json.dumps({"custom_id": "b"}) + "\n")], is_failed=False)
    other = await start(Held(FOUR))
    other.engine.open()
    other.runner.wake()
    await other.settles()
    assert other.engine.begun == []
    clock.now_s += LEASE_S + 1
    other.runner.wake()
    ended = await other.ended(batch)
    assert [line["custom_id"] for line in other.lines(ended)] == list("abcd")
    assert sorted(other.engine.begun) == list("acd")


async def test_a_server_that_lost_its_lease_stops(start, state, clock):
    site = await start(Held(FOUR))
    batch = site.add(*"abcd")
    await site.begins("a", "b")
    thief = BatchStore(state, site.store.files, clock)
    clock.now_s += LEASE_S + 1
    assert thief.claim("thief", int(clock() + 1000), model="fake", busy_tenants=()).id == batch.id
    site.engine.pass_on("a")
    await until(lambda: "b" in site.engine.given_up)
    assert site.get(batch).num_completed == 0
    assert thief.answered(batch.id, 1, 4) == set()


async def test_two_servers_share_the_batches_and_answer_each_line_once(start):
    sites = [await start(Held(FOUR)), await start(Held(FOUR))]
    batches = [sites[0].add(*(f"{tenant}{n}" for n in range(5)), tenant=tenant) for tenant in "pqrstu"]
    for site in sites:
        site.engine.open()
        site.runner.wake()
    for batch in batches:
        assert (await sites[0].ended(batch)).num_completed == 5
        assert [line["custom_id"] for line in sites[0].lines(batch)] == [f"{batch.tenant}{n}" for n in range(5)]
    begun = [name for site in sites for name in site.engine.begun]
    assert len(begun) == len(set(begun)) == 30


async def test_what_is_not_done_within_the_window_expires(start, clock):
    site = await start(Held(FOUR))
    site.service.begin_drain()
    batch, unchecked = site.add("a", "b", "c"), site.add("d")
    claimed = site.store.claim("x", int(clock()), model="fake", busy_tenants=())
    assert claimed.id == batch.id
    site.store.start("x", batch.id, 3)
    site.store.keep("x", batch.id, [LineResult(2, '{"custom_id": "b"}\n')], is_failed=False)
    clock.now_s += WINDOW_S
    later = await start(Held(FOUR))
    ended = await later.ended(batch)
    assert (ended.status, ended.num_completed, ended.num_failed) == ("expired", 1, 2)
    errors = later.lines(batch, failed=True)
    assert [(line["custom_id"], line["response"], line["error"]["code"]) for line in errors] == [
        ("a", None, "batch_expired"),
        ("c", None, "batch_expired"),
    ]
    assert (await later.ended(unchecked)).status == "expired"
    assert later.engine.begun == []
