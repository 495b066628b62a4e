"""What a batch meets: keys that end, an engine that fails, a queue that is full. No HTTP."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from batch_site import FOUR, TWO, Held, as_line, until

from seamount.core.errors import EngineError, QueueFullError, UnauthenticatedError, WorkerDiedError
from seamount.core.identity import Limits, Principal
from seamount.security.usage import Tokens, UsageLedger, usage_by_day
from seamount.server.admission.core import Capacity
from seamount.server.admission.queue import Admission
from seamount.server.batches import line as batches_answer


def bank(**other: Any) -> Principal:
    return Principal(key_id=None, tenant="bank", **other)


async def test_a_revoked_key_ends_its_batches(start):
    site = await start(Held(TWO))
    site.keys.add_first_administrator(tenant="admin", label="")
    _, key = site.keys.add(bank())
    batch = site.add("a", "b", "c", tenant="bank", key_id=key.id)
    await site.begins("a")
    await until(lambda: site.service.admission.load().num_waiting[-2] == 1)
    site.keys.revoke(key.id)
    site.engine.pass_on("a")
    ended = await site.ended(batch)
    assert ended.status == "failed"
    assert [(error.code, error.line) for error in ended.errors] == [("revoked_api_key", None)]
    assert [line["custom_id"] for line in site.lines(batch)] == ["a"]
    assert "c" not in site.engine.begun


async def test_a_line_that_runs_ends_with_its_key(start):
    site = await start(Held(TWO))
    site.keys.add_first_administrator(tenant="admin", label="")
    _, key = site.keys.add(bank())
    batch = site.add("a", "b", tenant="bank", key_id=key.id)
    await site.begins("a")
    assert site.service.calls.keys() == (key.id,)
    site.service.calls.end(key.id, UnauthenticatedError("The API key is revoked.", code="revoked_api_key"))
    ended = await site.ended(batch)
    assert (ended.status, [error.code for error in ended.errors]) == ("failed", ["revoked_api_key"])
    assert site.lines(batch) == site.lines(batch, failed=True) == []
    assert sorted(site.engine.given_up) == sorted(site.engine.begun)  # whether "b" had begun depends on the machine
    await until(lambda: not site.service.admission.load().num_admitted)


@pytest.mark.parametrize(
    ("other", "lifetime_s", "code"),
    [
        ({"routes": ("/v1/batches", "/v1/files")}, None, "route_not_permitted"),
        ({}, 10, "expired_api_key"),
    ],
)
async def test_a_key_that_may_not_is_told_by_its_batch(start, clock, other, lifetime_s, code):
    site = await start(Held(TWO))
    site.keys.add_first_administrator(tenant="admin", label="")
    _, key = site.keys.add(bank(**other), lifetime_s=lifetime_s)
    clock.now_s += 10
    ended = await site.ended(site.add("a", tenant="bank", key_id=key.id))
    assert (ended.status, [error.code for error in ended.errors]) == ("failed", [code])
    assert site.engine.begun == []


async def test_a_batch_from_before_there_were_keys_ends_when_there_are(start):
    site = await start(Held(TWO))
    site.keys.add_first_administrator(tenant="admin", label="")
    ended = await site.ended(site.add("a"))
    assert [error.code for error in ended.errors] == ["missing_api_key"]


async def test_lines_count_as_used_but_not_against_limits_per_minute(start, state, clock):
    ledger = UsageLedger(state, clock)
    site = await start(Held(TWO), ledger)
    site.engine.open()
    site.keys.add_first_administrator(tenant="admin", label="")
    tight = Limits(requests_per_minute=1, tokens_per_minute=1, max_concurrent=1)
    _, key = site.keys.add(bank(limits=tight, priority=1))
    ended = await site.ended(site.add("a", "b", "c", tenant="bank", key_id=key.id))
    assert ended.num_completed == 3
    await ledger.flush()
    assert sum(usage_by_day(state)[key.id].values(), Tokens()) == Tokens(3 * 2, 3 * 3)
    assert set(site.engine.priorities.values()) == {-2}


async def test_a_line_that_the_engine_fails_on_is_tried_again_and_then_answered_so(start):
    site = await start(Held(TWO))
    site.engine.open()
    site.engine.failing["b"] = [EngineError("It broke.", code="broken") for _ in range(3)]
    ended = await site.ended(site.add("a", "b", "c"))
    assert (ended.status, ended.num_completed, ended.num_failed) == ("completed", 2, 1)
    (line,) = site.lines(ended, failed=True)
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) == (500, "broken")
    assert sorted(site.engine.begun) == ["a", "b", "b", "b", "c"]
    assert len(site.pauses) == 2


async def test_what_nobody_foresaw_fails_its_line_and_is_logged_without_its_words(start, caplog):
    site = await start(Held(TWO))
    site.engine.open()
    site.engine.failing["b"] = [RuntimeError("the secret")]
    ended = await site.ended(site.add("a", "b"))
    (line,) = site.lines(ended, failed=True)
    assert line["response"]["body"]["error"]["code"] == "internal_error"
    assert "Unforeseen RuntimeError" in caplog.text
    assert "the secret" not in caplog.text + json.dumps(line)


async def test_a_worker_that_dies_costs_no_line(start):
    site = await start(Held(TWO))
    site.engine.failing["a"] = [WorkerDiedError("It died.", retry_after=1) for _ in range(2)]
    batch = site.add("a")
    await site.begins("a", "a", "a")
    site.engine.kill_worker()
    site.engine.open()
    await site.settles()
    assert site.get(batch).status == "in_progress"
    site.engine.restart_worker()
    assert (await site.ended(batch)).num_completed == 1
    assert site.pauses == [1, 1]


async def test_a_line_for_more_than_its_part_of_the_engine_waits_until_it_is_alone(start):
    site = await start(Held(FOUR))
    person = asyncio.create_task(site.ask("person"))
    await site.begins("person")
    batch = site.add(as_line("big", n=4))
    await until(lambda: site.service.admission.load().num_waiting[-2] == 1)
    await site.settles()
    assert site.engine.begun == ["person"]
    site.engine.open()
    await person
    assert (await site.ended(batch)).num_completed == 1


async def test_a_line_of_more_prompts_than_could_ever_be_taken_is_answered_so(start):
    site = await start(Held(TWO))
    site.engine.open()
    site.service.admission = Admission(max_waiting=1, max_wait_s=60)
    site.service.admission.open(Capacity(max_sequences=2, max_tokens=1000))
    batch = site.add(as_line("a", prompt=["a", "b", "c"]), as_line("b", prompt=["a", "b"]))
    await site.ended(batch)
    (failed,) = site.lines(batch, failed=True)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("a", 400)
    assert "at most 2 such prompts" in failed["response"]["body"]["error"]["message"]
    assert [line["custom_id"] for line in site.lines(batch)] == ["b"]


async def test_a_full_queue_puts_lines_off_and_refuses_nobody_else(start, monkeypatch):
    refused = QueueFullError("full", retry_after=3)
    site = await start(Held(TWO))
    site.engine.open()
    answer = batches_answer.prepare_completion
    attempts: list[int] = []

    async def prepare(*values: Any) -> object:
        attempts.append(1)
        if len(attempts) < 3:
            raise refused
        return await answer(*values)

    monkeypatch.setattr(batches_answer, "prepare_completion", prepare)
    assert (await site.ended(site.add("a"))).num_completed == 1
    assert site.pauses == [3, 3]
