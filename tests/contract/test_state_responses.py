"""Responses that are kept in the state database, over both kinds."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from seamount.core.errors import ForbiddenError, SeamountError
from seamount.server.responses import store as responses_store
from seamount.server.responses.store import ResponseStore, StoredResponse

DAY_S = 86_400
START_S = 1_800_000_000
ROOM = 10_000_000


class Clock:
    """Seconds that the test sets."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def response(number: int = 0, *, tenant: str = "bank", created_s: int = START_S) -> StoredResponse:
    return StoredResponse(
        id=f"resp_{number:032x}",
        tenant=tenant,
        key_id=None if number % 2 else "k",
        model="org/模型",
        created_s=created_s,
        items='[{"text": "Grüße 一 \\u0000 \'; DROP TABLE responses --"}]',
        response='{"output": []}',
    )


@pytest.fixture
def clock() -> Clock:
    return Clock(START_S + 0.5)


@pytest.fixture
def store(open_one, clock) -> ResponseStore:
    return ResponseStore(open_one(), 30, ROOM, clock)


async def test_a_response_comes_back_as_it_was_and_in_every_server(store, open_one, clock):
    for number in (0, 1):
        await store.put(response(number))
    for other in (store, ResponseStore(open_one(), 30, ROOM, clock)):
        assert [await other.get("bank", response(number).id) for number in (0, 1)] == [response(0), response(1)]
    assert await store.get("bank", response(2).id) is None


async def test_it_is_its_tenants_alone(store):
    await store.put(response())
    assert await store.get("club", response().id) is None
    assert await store.get("", response().id) is None
    assert not await store.delete("club", response().id)
    assert await store.get("bank", response().id) == response()


async def test_it_is_deleted_once(store):
    await store.put(response(0))
    await store.put(response(1))
    assert await store.delete("bank", response().id)
    assert not await store.delete("bank", response().id)
    assert await store.get("bank", response().id) is None
    assert await store.get("bank", response(1).id) == response(1)


@pytest.mark.parametrize("wrong", ["", "resp_", "resp_" + "0" * 31, "resp_" + "0" * 32 + "\n", "\x00", "%", "' OR 1=1"])
async def test_what_is_no_id_names_nothing(store, wrong):
    await store.put(response())
    assert await store.get("bank", wrong) is None
    assert not await store.delete("bank", wrong)


async def test_its_time_is_over_at_its_second(store, clock):
    await store.put(response())
    clock.now_s = START_S + 30 * DAY_S - 0.5
    assert await store.get("bank", response().id) == response()
    clock.now_s += 0.5
    assert await store.get("bank", response().id) is None
    assert not await store.delete("bank", response().id)


async def test_what_is_over_leaves_the_database_while_it_is_used_and_at_the_start(store, open_one, clock):
    database = open_one()

    def rows() -> int:
        return database.read(lambda run: run("SELECT COUNT(*) FROM responses"))[0][0]

    await asyncio.gather(*(store.put(response(number)) for number in range(3)))
    await store.ready("bank", 0)
    assert rows() == 3
    clock.now_s += 30 * DAY_S
    await store.put(response(3, created_s=int(clock.now_s)))
    await store.ready("bank", 0)
    assert rows() == 1

    def many(run) -> None:
        for number in range(10, 1_300):
            run(
                "INSERT INTO responses (id, tenant, model, created_s, expires_s, items, response) "
                "VALUES (?, 'bank', 'm', 0, 1, '[]', '{}')",
                str(number),
            )

    database.write(many)
    await store.clean()
    assert rows() == 1
    assert await store.get("bank", response(3).id) is not None


async def test_a_shorter_time_holds_for_what_was_kept_before_and_a_longer_one_does_not(store, open_one, clock):
    old, young = response(0), response(1, created_s=START_S + 5 * DAY_S)
    await store.put(old)
    await store.put(young)
    clock.now_s = START_S + 7 * DAY_S
    await ResponseStore(open_one(), 90, ROOM, clock).clean()
    shorter = ResponseStore(open_one(), 6, ROOM, clock)
    await shorter.clean()
    assert await store.get("bank", old.id) is None
    assert await store.get("bank", young.id) == young
    clock.now_s = START_S + 11 * DAY_S
    assert await store.get("bank", young.id) is None


async def test_what_cannot_be_kept_is_told_and_leaves_nothing(store):
    await store.put(response())
    with pytest.raises(SeamountError):
        await store.put(dataclasses.replace(response(), items="[]"))
    assert await store.get("bank", response().id) == response()


def total_of(database, tenant: str = "bank") -> int:
    return database.read(lambda run: run("SELECT num_bytes FROM response_totals WHERE tenant = ?", tenant))[0][0]


async def test_a_tenant_keeps_no_more_than_it_may(open_one, clock):
    size = response().num_bytes
    database = open_one()
    store = ResponseStore(database, 30, 3 * size + 1, clock)
    for number in range(3):
        await store.ready("bank", size)
        await store.put(response(number))
    await store.ready("bank", 1)
    with pytest.raises(ForbiddenError) as early:
        await store.ready("bank", 2)
    with pytest.raises(ForbiddenError) as late:
        await store.put(response(3))
    for caught in (early, late):
        assert (caught.value.code, caught.value.param) == ("storage_limit_exceeded", "store")
        assert "store to false" in caught.value.hint
    assert await store.get("bank", response(3).id) is None
    await store.ready("club", size)
    await store.put(response(4, tenant="club"))
    assert (total_of(database), total_of(database, "club")) == (3 * size, size)
    assert await store.delete("bank", response(1).id)
    await store.put(response(3))
    assert total_of(database) == 3 * size


async def test_what_is_over_makes_room_the_oldest_first(open_one, clock, monkeypatch):
    monkeypatch.setattr(responses_store, "_CLEAN_ROWS", 1)
    size = response().num_bytes
    database = open_one()
    store = ResponseStore(database, 30, 4 * size, clock)

    def ids() -> list[str]:
        return [row[0] for row in database.read(lambda run: run("SELECT id FROM responses ORDER BY id"))]

    for number, age_s in enumerate((2, 3, 1, 0)):
        await store.put(response(number, created_s=START_S - age_s))
    clock.now_s = START_S + 30 * DAY_S - 1
    await store.put(response(5, created_s=int(clock.now_s)))
    assert ids() == [response(number).id for number in (0, 2, 3, 5)]
    await store.ready("bank", 2 * size)
    assert ids() == [response(number).id for number in (3, 5)]
    with pytest.raises(ForbiddenError):
        await store.ready("bank", 2 * size + 1)
    assert total_of(database) == 2 * size


async def test_totals_are_exact_however_many_servers_keep_and_delete_at_once(open_one, clock):
    stores = [ResponseStore(open_one(busy_timeout_s=60), 30, ROOM, clock) for _ in range(3)]
    tenants = ("bank", "club")

    async def busy(which: int) -> None:
        for number in range(8):
            tenant = tenants[(which + number) % 2]
            made = response(100 * which + number, tenant=tenant, created_s=START_S - 40 * DAY_S * (number % 3 == 0))
            await stores[which % 3].put(made)
            await stores[(which + 1) % 3].ready(tenant, 0)
            if number % 2:
                await stores[(which + 2) % 3].delete(tenant, made.id)

    await asyncio.gather(*(busy(which) for which in range(6)))
    await stores[0].clean()
    database = open_one()
    counted = dict(database.read(lambda run: run("SELECT tenant, num_bytes FROM response_totals")))
    found = dict(database.read(lambda run: run("SELECT tenant, SUM(num_bytes) FROM responses GROUP BY tenant")))
    assert counted == found
    assert all(total > 0 for total in found.values())
