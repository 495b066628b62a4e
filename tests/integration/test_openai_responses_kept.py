"""Responses that are kept: chained, read, listed and deleted with the official client, over a real database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from seamount.cli.wire import make_access
from seamount.core.database import Database
from seamount.core.errors import StateUnavailableError
from seamount.core.identity import Principal
from seamount.core.requests import Request
from seamount.core.state import open_state
from seamount.engine.fake import FakeEngine, say
from seamount.security.keys import ApiKeys
from seamount.server.responses import answer as responses_answer

NOTHING = "resp_" + "0" * 32


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Database]:
    database = open_state(str(tmp_path / "state.db"))
    yield database
    database.close()


def client(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


class Remembering(FakeEngine):
    """Answers "one", "two", ...; keeps the text of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(self._next)

    def _next(self, request: Request, index: int) -> tuple[int, ...]:
        self.asked.append(bytes(token for token in request.prompt_token_ids if token < 256).decode())
        return tuple(("one", "two", "three", "four")[(len(self.asked) - 1) % 4].encode())


async def test_a_chain_carries_the_conversation_but_no_instructions(serve, state):
    engine = Remembering()
    running = await serve(engine, state=state)
    async with client(running.url) as api:
        first = await api.responses.create(model="fake", input="a", instructions="Be kind.")
        second = await api.responses.create(model="fake", input="b", previous_response_id=first.id)
        stream = await api.responses.create(
            model="fake", input="c", previous_response_id=second.id, stream=True, instructions="Be brief."
        )
        third = [event async for event in stream][-1].response
        beside = await api.responses.create(model="fake", input="d", previous_response_id=first.id)
    assert engine.asked == [
        "system: Be kind.\nuser: a\n",
        "user: a\nassistant: one\nuser: b\n",
        "system: Be brief.\nuser: a\nassistant: one\nuser: b\nassistant: two\nuser: c\n",
        "user: a\nassistant: one\nuser: d\n",
    ]
    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    assert beside.output_text == "four"


async def test_what_is_kept_is_what_was_answered(serve, state):
    running = await serve(FakeEngine(say("<think>hm</think>ja")), state=state)
    async with client(running.url) as api:
        made = await api.responses.create(
            model="fake", input="x", metadata={"a": "b"}, include=["message.output_text.logprobs"]
        )
        kept = await api.responses.retrieve(made.id)
        stream = await api.responses.create(model="fake", input="x", stream=True, max_output_tokens=5)
        cut = [event async for event in stream][-1].response
        assert (await api.responses.retrieve(cut.id)).to_dict() == cut.to_dict()
        for refused in ({"stream": True}, {"include": ["message.output_text.logprobs"]}):
            with pytest.raises(openai.BadRequestError):
                await api.responses.retrieve(made.id, **refused)
    assert made.output[-1].content[0].logprobs
    made.output[-1].content[0].logprobs = []
    assert kept.to_dict() == made.to_dict()
    assert kept.store


async def test_a_chain_outlives_the_server_and_what_it_began_with(serve, state, tmp_path):
    before = await serve(Remembering(), state=state)
    async with client(before.url) as api:
        first = await api.responses.create(model="fake", input="a")
        second = await api.responses.create(model="fake", input="b", previous_response_id=first.id)
        await api.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError) as caught:
            await api.responses.create(model="fake", input="c", previous_response_id=first.id)
    assert (caught.value.code, caught.value.param) == ("previous_response_not_found", "previous_response_id")
    before.server.stop()
    await before.task
    other = open_state(str(tmp_path / "state.db"))
    engine = Remembering()
    after = await serve(engine, state=other)
    async with client(after.url) as api:
        await api.responses.create(model="fake", input="c", previous_response_id=second.id)
    assert engine.asked == ["user: a\nassistant: one\nuser: b\nassistant: two\nuser: c\n"]
    other.close()


async def test_nothing_is_kept_that_shall_not_be(serve, state):
    running = await serve(Remembering(), state=state)
    async with client(running.url) as api:
        kept = await api.responses.create(model="fake", input="a")
        loose = await api.responses.create(model="fake", input="b", store=False, previous_response_id=kept.id)
        assert (kept.store, loose.store) == (True, False)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(loose.id)
        with pytest.raises(openai.NotFoundError):
            await api.responses.create(model="fake", input="c", previous_response_id=loose.id)
    assert [row[0] for row in state.read(lambda run: run("SELECT id FROM responses"))] == [kept.id]


async def test_a_deleted_response_is_gone(serve, state):
    running = await serve(Remembering(), state=state)
    async with client(running.url) as api, httpx.AsyncClient(base_url=running.url) as plain:
        made = await api.responses.create(model="fake", input="a")
        answer = await plain.delete(f"/v1/responses/{made.id}")
        assert answer.json() == {"id": made.id, "object": "response", "deleted": True}
        for gone in (
            api.responses.retrieve,
            api.responses.delete,
            api.responses.cancel,
            api.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                await gone(made.id)
            assert caught.value.code == "response_not_found"
    assert state.read(lambda run: run("SELECT id FROM responses")) == []


async def test_another_tenant_finds_what_anybody_finds_where_nothing_is(serve, state):
    keys = ApiKeys(state)
    keys.add_first_administrator(tenant="admin", label="")
    bank, mate, club = (keys.add(Principal(key_id=None, tenant=name))[0] for name in ("bank", "bank", "club"))
    engine = Remembering()
    running = await serve(engine, access=make_access(state), state=state)
    async with (
        client(running.url, bank) as owner,
        client(running.url, club) as other,
        client(running.url, mate) as mine,
    ):
        made = await owner.responses.create(model="fake", input="secret")

        async def told(response_id: str) -> list[tuple[int, Any]]:
            api, found = other.responses, []
            calls = (
                api.retrieve(response_id),
                api.delete(response_id),
                api.cancel(response_id),
                api.input_items.list(response_id),
                api.create(model="fake", input="x", previous_response_id=response_id),
            )
            for call in calls:
                with pytest.raises(openai.NotFoundError) as caught:
                    await call
                found.append((caught.value.status_code, caught.value.body))
            return found

        assert await told(made.id) == await told(NOTHING)
        assert (await mine.responses.retrieve(made.id)).output_text == "one"
    assert len(engine.asked) == 1
    (row,) = state.read(lambda run: run("SELECT tenant, key_id FROM responses"))
    assert row[0] == "bank" and bank.startswith(f"sm-{row[1]}-")


async def test_items_are_listed_in_pages_both_ways(serve, state):
    running = await serve(Remembering(), state=state)
    again = {"type": "message", "id": "msg_mine", "role": "user", "content": "again"}
    async with client(running.url) as api:
        first = await api.responses.create(model="fake", input=[{"role": "user", "content": "a"}, again, again])
        second = await api.responses.create(model="fake", input="b", previous_response_id=first.id)
        rising = [item async for item in api.responses.input_items.list(second.id, order="asc", limit=2)]
        falling = [item async for item in api.responses.input_items.list(second.id, limit=1)]
        page = await api.responses.input_items.list(second.id, order="asc", limit=2)
        rest = await api.responses.input_items.list(second.id, order="asc", after=page.last_id)
        with pytest.raises(openai.BadRequestError) as caught:
            await api.responses.input_items.list(second.id, after="msg_none")
        with pytest.raises(openai.BadRequestError):
            await api.responses.input_items.list(second.id, limit=101)
    assert [item.content[0].text for item in rising] == ["a", "again", "again", "one", "b"]
    assert [item.role for item in rising] == ["user", "user", "user", "assistant", "user"]
    assert falling == rising[::-1]
    assert [*page.data, *rest.data] == rising
    assert (page.has_more, rest.has_more, page.first_id) == (True, False, rising[0].id)
    assert rising[1].id == "msg_mine"
    assert len({item.id for item in rising}) == 5
    assert caught.value.param == "after"


async def test_nothing_can_be_cancelled(serve, state):
    running = await serve(Remembering(), state=state)
    async with client(running.url) as api:
        made = await api.responses.create(model="fake", input="a")
        with pytest.raises(openai.BadRequestError, match="background"):
            await api.responses.cancel(made.id)


async def test_a_call_and_its_result_in_a_chain(serve, state):
    running = await serve(Remembering(), state=state)
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "12"}]}
    async with client(running.url) as api:
        first = await api.responses.create(model="fake", input=[call, result])
        await api.responses.create(model="fake", input="b", previous_response_id=first.id)
        items = [item async for item in api.responses.input_items.list(first.id, order="asc")]
    assert [item.type for item in items] == ["function_call", "function_call_output"]
    assert items[0].id.startswith("fc_") and items[1].id.startswith("fco_")


async def test_a_database_that_cannot_be_written_is_told_before_anything_is_made(serve, state, tmp_path):
    engine = Remembering()
    impatient = open_state(str(tmp_path / "state.db"), busy_timeout_s=0.05)
    running = await serve(engine, state=impatient)
    holder = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    async with client(running.url) as api:
        for stream in (True, False):
            with pytest.raises(openai.InternalServerError) as caught:
                await api.responses.create(model="fake", input="a", stream=stream)
            assert (caught.value.status_code, caught.value.code) == (503, "state_busy")
            assert caught.value.response.headers["retry-after"]
        assert engine.asked == []
        assert (await api.responses.create(model="fake", input="a", store=False)).output_text == "one"
        holder.execute("ROLLBACK")
        assert (await api.responses.create(model="fake", input="a")).store
    holder.close()
    impatient.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_database_that_fails_at_the_end_costs_nobody_the_answer(serve, state, monkeypatch, stream):
    async def put(self: object, stored: object) -> None:
        raise StateUnavailableError("The state database is gone.", retry_after=5)

    running = await serve(Remembering(), state=state)
    monkeypatch.setattr(responses_answer.ResponseStore, "put", put)
    async with client(running.url) as api:
        if stream:
            events = [event async for event in await api.responses.create(model="fake", input="a", stream=True)]
            assert events[0].response.store
            made = events[-1].response
        else:
            made = await api.responses.create(model="fake", input="a")
    assert (made.status, made.output_text, made.store) == ("completed", "one", False)
    assert made.store_error["code"] == "state_unavailable"


async def test_what_is_too_large_is_not_kept_and_says_so(serve, state, monkeypatch):
    engine = Remembering()
    running = await serve(engine, state=state)
    monkeypatch.setattr(responses_answer, "MAX_STORED_BYTES", 2_000)
    async with client(running.url) as api:
        with pytest.raises(openai.BadRequestError, match="at most 2000") as caught:
            await api.responses.create(model="fake", input="x" * 2_000)
        assert (caught.value.code, caught.value.param) == ("response_too_large", "store")
        assert engine.asked == []
        assert (await api.responses.create(model="fake", input="x" * 2_000, store=False)).output_text == "one"
        barely = await api.responses.create(model="fake", input="x" * 1_500)
    assert (barely.output_text, barely.store, barely.store_error["code"]) == ("two", False, "response_too_large")


async def test_a_tenant_that_keeps_as_much_as_it_may_is_told_before_anything_is_made(serve, state):
    engine = Remembering()
    running = await serve(engine, state=state, max_tenant_response_bytes=4_000)
    async with client(running.url) as api:
        first = await api.responses.create(model="fake", input="x" * 1_500)
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await api.responses.create(model="fake", input="x" * 4_000)
        assert (caught.value.code, caught.value.param) == ("storage_limit_exceeded", "store")
        for words in ("4000 bytes", "Delete responses", "store to false"):
            assert words in caught.value.message
        assert len(engine.asked) == 1
        loose = await api.responses.create(model="fake", input="x" * 4_000, store=False)
        assert (loose.output_text, loose.store) == ("two", False)
        await api.responses.delete(first.id)
        assert (await api.responses.create(model="fake", input="x" * 1_500)).store


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_for_which_there_is_no_room_is_sent_and_says_so(serve, state, stream):
    running = await serve(FakeEngine(say("y" * 2_000)), state=state, max_tenant_response_bytes=4_000)
    async with client(running.url) as api:
        answer = await api.responses.create(model="fake", input="x" * 1_500, stream=stream)
        made = [event async for event in answer][-1].response if stream else answer
        assert (made.output_text, made.store, made.store_error["code"]) == (
            "y" * 2_000,
            False,
            "storage_limit_exceeded",
        )
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(made.id)
    assert state.read(lambda run: run("SELECT id FROM responses")) == []


async def test_a_failed_or_abandoned_response_is_not_kept(serve, state):
    running = await serve(FakeEngine(say("abcdef"), fail_after_tokens=3), state=state)
    async with client(running.url) as api:
        events = [event async for event in await api.responses.create(model="fake", input="a", stream=True)]
    assert (events[0].response.store, events[-1].response.store) == (True, False)
    assert state.read(lambda run: run("SELECT id FROM responses")) == []


async def test_a_row_that_cannot_be_read_is_told_as_such(serve, state):
    running = await serve(Remembering(), state=state)
    async with client(running.url) as api:
        made = await api.responses.create(model="fake", input="a")
        state.write(lambda run: run("UPDATE responses SET items = ? WHERE id = ?", '[{"type": "later"}]', made.id))
        with pytest.raises(openai.InternalServerError) as caught:
            await api.responses.create(model="fake", input="b", previous_response_id=made.id)
    assert caught.value.code == "integrity_error"


async def test_what_is_over_is_gone_at_the_start(serve, state):
    state.write(
        lambda run: run(
            "INSERT INTO responses (id, tenant, model, created_s, expires_s, items, response) "
            "VALUES (?, 'local', 'm', 0, 1, '[]', '{}')",
            NOTHING,
        )
    )
    await serve(Remembering(), state=state)
    assert state.read(lambda run: run("SELECT id FROM responses")) == []


async def test_a_server_that_is_to_keep_nothing_keeps_nothing_and_lets_go_of_what_was_kept(serve, state):
    before = await serve(Remembering(), state=state)
    async with client(before.url) as api:
        made = await api.responses.create(model="fake", input="a")
    running = await serve(Remembering(), state=state, response_retention_days=0)
    assert state.read(lambda run: run("SELECT id FROM responses")) == []
    async with client(running.url) as api:
        assert not (await api.responses.create(model="fake", input="a")).store
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            await api.responses.create(model="fake", input="a", store=True)
        with pytest.raises(openai.NotFoundError):
            await api.responses.retrieve(made.id)
