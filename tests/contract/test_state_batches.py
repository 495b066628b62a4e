"""Files and batches in the state database, over both kinds: whole or not at all, a lease for one, results once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from seamount.core.errors import ForbiddenError, InvalidRequestError, NotFoundError, QuotaError, SeamountError
from seamount.core.migrations import MIGRATIONS, migrate
from seamount.core.state import connect_state
from seamount.server.batches import store as batches_store
from seamount.server.batches.store import WINDOW_S, Batch, BatchStore, LeaseLostError, LineError, LineResult, Tokens
from seamount.server.files import store as files_store
from seamount.server.files.store import BATCH_RETENTION_S, STALE_UPLOAD_S, FileStore, Lines, StoredFile

DAY_S = 86_400
TEXT = '{"a": "Grüße 一 \\u0000 \'; DROP TABLE files --"}\n\n\u2028?%s\n'


class Clock:
    """Seconds that the test sets."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.5)


@pytest.fixture
def files(open_one, clock) -> FileStore:
    return FileStore(open_one(), 10_000, clock)


@pytest.fixture
def batches(files, clock) -> BatchStore:
    return BatchStore(files.database, files, clock)


def send(files: FileStore, *chunks: str, tenant: str = "bank", lifetime_s: int = DAY_S) -> StoredFile:
    file_id = files.new_file_id()
    files.begin(file_id, tenant, "batch")
    line = 1
    for number, chunk in enumerate(chunks):
        files.append(file_id, number, [Lines(line, chunk)])
        line += chunk.count("\n")
    return files.complete(file_id, "Eingabe 一.jsonl", lifetime_s)


def read(files: FileStore, file: StoredFile) -> str:
    text, place = "", 0
    while part := files.content(file, place):
        text, place = text + part[0], part[1]
    return text


def add(batches: BatchStore, tenant: str = "bank", **other: object) -> Batch:
    batches.clock.now_s += 0.002  # ids sort by the millisecond
    given = {
        "key_id": "k",
        "endpoint": "/v1/completions",
        "model": "m",
        "metadata": {"Zweck": "一"},
        "output_lifetime_s": DAY_S,
        "input_file_id": send(batches.files, "{}\n", tenant=tenant).id,
        **other,
    }
    return batches.add(tenant=tenant, **given)


def claim(batches: BatchStore, owner: str, *, model: str = "m", busy: tuple[str, ...] = ()) -> str | None:
    until_s = int(batches.clock()) + 20
    found = batches.claim(owner, until_s, model=model, busy_tenants=busy)
    return found and found.id


def test_a_file_comes_back_as_it_was_and_only_when_it_is_whole(files, open_one, clock):
    file_id = files.new_file_id()
    files.begin(file_id, "bank", "batch")
    files.append(file_id, 0, [Lines(1, TEXT), Lines(4, "x" * 5)])
    with pytest.raises(NotFoundError):
        files.get("bank", file_id)
    assert files.page("bank", purpose=None, after=None, limit=9, newest_first=True) == []
    files.append(file_id, 2, [Lines(4, "end")])
    made = files.complete(file_id, "n", 60)
    other = FileStore(open_one(), 1, clock)
    assert other.get("bank", file_id) == made
    assert read(other, made) == TEXT + "xxxxxend"
    assert made.num_bytes == len((TEXT + "xxxxxend").encode())
    assert (made.created_s, made.expires_s) == (1_800_000_000, 1_800_000_060)
    assert other.lines(file_id, 1) == Lines(4, "xxxxx")
    assert other.lines(file_id, 3) is None


def test_what_is_discarded_or_given_up_leaves_nothing(files, clock):
    def rows() -> tuple[int, int]:
        counts = [
            files.database.read(lambda run, t=t: run(f"SELECT COUNT(*) FROM {t}")) for t in ("files", "file_chunks")
        ]
        return counts[0][0][0], counts[1][0][0]

    first, second = files.new_file_id(), files.new_file_id()
    for file_id in (first, second):
        files.begin(file_id, "bank", "batch")
        files.append(file_id, 0, [Lines(1, "x")])
    files.discard(first)
    assert rows() == (1, 1)
    clock.now_s += STALE_UPLOAD_S
    assert files.sweep() == 0
    clock.now_s += 1
    assert files.sweep() == 1
    assert rows() == (0, 0)
    for late in (lambda: files.append(second, 1, [Lines(2, "y")]), lambda: files.complete(second, "n", 60)):
        with pytest.raises(NotFoundError):
            late()
    assert rows() == (0, 0)


def test_files_are_their_tenants_alone_and_expire(files, clock):
    mine, other = send(files, "x", lifetime_s=60), send(files, "y", tenant="club")
    for wrong in (other.id, "", "nothing", "\x00", "%", mine.id.upper(), mine.id + "\n", "' OR 1=1 --"):
        with pytest.raises(NotFoundError):
            files.get("bank", wrong)
        with pytest.raises(NotFoundError):
            files.delete("bank", wrong)
        with pytest.raises(InvalidRequestError):
            files.page("bank", purpose=None, after=wrong, limit=1, newest_first=True)
    clock.now_s += 60
    with pytest.raises(NotFoundError):
        files.get("bank", mine.id)
    assert files.page("bank", purpose=None, after=None, limit=9, newest_first=True) == []
    assert files.sweep() == 1
    assert read(files, mine) == ""
    assert read(files, other) == "y"
    files.delete("club", other.id)
    assert read(files, other) == ""


def test_pages_go_forth_and_back_without_a_gap(files, clock):
    made = []
    for number in range(7):
        made.append(send(files, "x").id)
        clock.now_s += 0.002 if number % 3 else 1
    for newest_first in (True, False):
        found, after = [], None
        while page := files.page("bank", purpose="batch", after=after, limit=3, newest_first=newest_first):
            found += [file.id for file in page]
            after = found[-1]
        assert found == (made[::-1] if newest_first else made)
    assert files.page("bank", purpose="batch_output", after=None, limit=3, newest_first=True) == []


def test_a_tenant_keeps_no_more_than_it_may(files, batches, monkeypatch):
    send(files, "x" * 9_000)
    with pytest.raises(ForbiddenError) as caught:
        send(files, "y" * 1_001)
    assert caught.value.code == "storage_limit_exceeded"
    send(files, "y" * 9_000, tenant="club")
    batch = add(batches)
    claim(batches, "a")
    batches.keep("a", batch.id, [LineResult(1, "z" * 1_000)], is_failed=True)
    for more in (lambda: send(files, "x"), lambda: add(batches)):
        with pytest.raises(ForbiddenError):
            more()
    monkeypatch.setattr(files_store, "MAX_FILES", 1)
    with pytest.raises(ForbiddenError):
        send(files, "x", tenant="club")


def test_a_batch_comes_back_as_it_was(batches, open_one, clock):
    file = send(batches.files, "{}\n")
    made = add(batches, input_file_id=file.id, key_id=None)
    assert (made.status, made.num_total, made.errors, made.expires_s) == (
        "validating",
        0,
        (),
        1_800_000_000 + WINDOW_S,
    )
    assert made.metadata == {"Zweck": "一"}
    database = open_one()
    other = BatchStore(database, FileStore(database, 1, clock), clock)
    assert other.get("bank", made.id) == made
    for wrong in ("", "\x00", made.id + "0"):
        with pytest.raises(NotFoundError):
            other.get("bank", wrong)
        with pytest.raises(NotFoundError):
            other.ask_to_cancel("bank", wrong)
    with pytest.raises(NotFoundError):
        other.get("club", made.id)
    with pytest.raises(NotFoundError):
        other.ask_to_cancel("club", made.id)
    with pytest.raises(NotFoundError):
        add(batches, tenant="club", input_file_id=file.id)


def test_a_file_that_a_batch_reads_stays_until_its_end(batches, clock):
    file = send(batches.files, "{}\n", lifetime_s=60)
    batch = add(batches, input_file_id=file.id)
    with pytest.raises(InvalidRequestError) as caught:
        batches.files.delete("bank", file.id)
    assert caught.value.code == "file_in_use"
    clock.now_s += 3600
    batches.files.sweep()
    assert batches.files.lines(file.id, 0) == Lines(1, "{}\n")
    claim(batches, "a")
    batches.end("a", batch.id, "failed", [LineError("empty_file", "一")])
    assert batches.files.sweep() == 1
    assert batches.files.lines(file.id, 0) is None
    assert batches.get("bank", batch.id).errors == (LineError("empty_file", "一", None, None),)


@pytest.mark.parametrize("way", ["delete", "sweep"])
def test_a_file_is_taken_or_removed_and_never_both(batches, open_one, clock, way):
    """Whoever comes second waits for the first one's end, and is told what that one did."""
    file = send(batches.files, "{}\n", lifetime_s=60)
    other = FileStore(open_one(busy_timeout_s=60), 10_000, clock)
    is_held, may_go = threading.Event(), threading.Event()
    hold = batches.files.hold

    def hold_long(run, tenant, file_id):
        found = hold(run, tenant, file_id)
        is_held.set()
        may_go.wait()
        return found

    def remove() -> object:
        if way == "sweep":
            late = FileStore(other.database, 10_000, Clock(clock.now_s + 60))
            return late.sweep()
        with pytest.raises(InvalidRequestError) as caught:
            other.delete("bank", file.id)
        return caught.value.code

    batches.files.hold = hold_long
    with ThreadPoolExecutor(2) as pool:
        taking = pool.submit(add, batches, input_file_id=file.id)
        is_held.wait()
        removing = pool.submit(remove)
        # Not by waiting for it: that it waits is what makes it right, and cannot be seen from outside.
        may_go.set()
        batch = taking.result()
        assert removing.result() in ("file_in_use", 0, 1)
    assert batches.files.lines(file.id, 0) == Lines(1, "{}\n")
    assert batches.get("bank", batch.id).input_file_id == file.id


def test_a_file_is_taken_or_deleted_whoever_comes_first(batches, open_one, clock):
    other = FileStore(open_one(busy_timeout_s=60), 10_000, clock)
    for _ in range(8):
        file, barrier = send(batches.files, "{}\n"), threading.Barrier(2)

        def both(work, file=file, barrier=barrier) -> bool:
            barrier.wait()
            try:
                work(file)
            except (InvalidRequestError, NotFoundError):
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            taken = pool.submit(both, lambda file: add(batches, input_file_id=file.id))
            deleted = pool.submit(both, lambda file: other.delete("bank", file.id))
            assert taken.result() is not deleted.result()


def test_one_lease_is_one_servers(batches, open_one, clock):
    made = {add(batches, tenant=f"t{number}").id for number in range(8)}
    servers = [BatchStore(open_one(busy_timeout_s=60), batches.files, clock) for _ in range(4)]
    barrier = threading.Barrier(4)

    def all_it_gets(number: int) -> list[str]:
        barrier.wait()
        return list(iter(lambda: claim(servers[number], f"server {number}"), None))

    with ThreadPoolExecutor(4) as threads:
        got = [batch_id for found in threads.map(all_it_gets, range(4)) for batch_id in found]
    assert sorted(got) == sorted(made)


def test_a_lease_that_ran_out_is_the_next_ones_and_the_last_owner_writes_nothing_more(batches, clock):
    batch = add(batches)
    assert claim(batches, "a") == batch.id
    assert batches.start("a", batch.id, 3) == "in_progress"
    batches.keep("a", batch.id, [LineResult(1, "one\n")], is_failed=False)
    clock.now_s += 15
    assert claim(batches, "b") is None
    assert batches.renew("a", [batch.id], int(clock.now_s) + 20) == {batch.id: "in_progress"}
    clock.now_s += 15
    assert claim(batches, "b") is None
    clock.now_s += 6
    assert claim(batches, "b") == batch.id
    assert batches.renew("a", [batch.id], int(clock.now_s) + 20) == {}
    for late in (
        lambda: batches.keep("a", batch.id, [LineResult(2, "late\n")], is_failed=False),
        lambda: batches.start("a", batch.id, 9),
        lambda: batches.end("a", batch.id, "completed"),
    ):
        with pytest.raises(LeaseLostError):
            late()
    batches.release("a")
    batches.keep("b", batch.id, [LineResult(1, "again\n"), LineResult(2, "two\n")], is_failed=False)
    batches.keep("b", batch.id, [LineResult(3, "three\n")], is_failed=True)
    assert batches.answered(batch.id, 2, 3) == {2, 3}
    ended = batches.end("b", batch.id, "completed")
    assert (ended.status, ended.num_total, ended.num_completed, ended.num_failed) == ("completed", 3, 2, 1)
    files = batches.files
    output, errors = (files.get("bank", file_id) for file_id in (ended.output_file_id, ended.error_file_id))
    assert (read(files, output), read(files, errors)) == ("one\ntwo\n", "three\n")
    assert (output.num_bytes, errors.num_bytes, output.purpose) == (8, 6, "batch_output")
    with pytest.raises(LeaseLostError):
        batches.keep("b", batch.id, [LineResult(4, "late\n")], is_failed=False)
    files.delete("bank", output.id)
    assert (read(files, output), read(files, errors)) == ("", "three\n")


def test_a_released_batch_is_anothers_at_once(batches):
    first, second = add(batches, tenant="a"), add(batches, tenant="b")
    assert [claim(batches, "s"), claim(batches, "s")] == [first.id, second.id]
    batches.release("s", second.id)
    assert [claim(batches, "t"), claim(batches, "t")] == [second.id, None]
    batches.release("s")
    assert claim(batches, "t") == first.id


def test_which_batch_comes_next(batches, clock):
    first, second, third = add(batches), add(batches), add(batches, tenant="club")
    assert claim(batches, "s", model="another") is None
    assert claim(batches, "s") == first.id
    assert claim(batches, "s", busy=("bank",)) == second.id  # its lines are yet to be checked
    batches.start("s", second.id, 1)
    batches.release("s", second.id)
    assert claim(batches, "s", busy=("bank", "club")) == third.id
    assert claim(batches, "s", busy=("bank",)) is None
    assert batches.ask_to_cancel("bank", second.id).status == "cancelling"
    assert claim(batches, "s", model="another", busy=("bank",)) == second.id
    fourth = add(batches)
    assert claim(batches, "s", model="another") is None
    clock.now_s += WINDOW_S
    batches.renew("s", [first.id, second.id, third.id], int(clock.now_s) + 20)
    assert claim(batches, "s", model="another") == fourth.id


def test_a_cancelled_batch_says_so_to_whoever_writes_to_it(batches):
    batch = add(batches)
    claim(batches, "s")
    assert batches.ask_to_cancel("bank", batch.id).cancelling_s == 1_800_000_000
    assert batches.start("s", batch.id, 1) == "cancelling"
    assert batches.keep("s", batch.id, [LineResult(1, "one\n")], is_failed=False) == "cancelling"
    assert batches.renew("s", [batch.id], 1_900_000_000) == {batch.id: "cancelling"}
    ended = batches.end("s", batch.id, "cancelled")
    assert (ended.status, ended.num_completed) == ("cancelled", 1)
    assert batches.ask_to_cancel("bank", batch.id) == ended
    other = add(batches)
    claim(batches, "s")
    batches.end("s", other.id, "completed")
    with pytest.raises(InvalidRequestError, match="completed"):
        batches.ask_to_cancel("bank", other.id)


def test_open_batches_are_bounded_and_ended_ones_are_forgotten_in_time(batches, clock, monkeypatch):
    monkeypatch.setattr(batches_store, "MAX_OPEN", 2)
    first = add(batches)
    add(batches)
    with pytest.raises(QuotaError):
        add(batches)
    add(batches, tenant="club")
    claim(batches, "s")
    batches.keep("s", first.id, [LineResult(1, "one\n")], is_failed=False)
    batches.end("s", first.id, "completed")
    third = add(batches)
    assert [batch.id for batch in batches.page("bank", after=third.id, limit=9)][-1] == first.id
    clock.now_s += BATCH_RETENTION_S + 1
    while batches.files.sweep():
        pass
    with pytest.raises(NotFoundError):
        batches.get("bank", first.id)
    assert batches.get("bank", third.id).status == "validating"
    assert batches.answered(first.id, 1, 1) == set()


def test_a_database_that_fails_midway_leaves_no_half_end(batches, monkeypatch):
    batch = add(batches)
    claim(batches, "s")
    batches.keep("s", batch.id, [LineResult(1, "one\n")], is_failed=False)

    def broken(*values: object, **named: object) -> str:
        raise SeamountError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(batches_store, "add_results", broken)
        with pytest.raises(SeamountError):
            batches.end("s", batch.id, "completed")
    assert batches.get("bank", batch.id).status == "validating"
    assert batches.end("s", batch.id, "completed").output_file_id


def test_a_page_of_results_ends_where_the_next_begins(batches):
    batch = add(batches)
    claim(batches, "s")
    wanted = [LineResult(line, json.dumps({"line": line}) + "\n") for line in range(1, 101)]
    batches.keep("s", batch.id, wanted[50:], is_failed=False)
    batches.keep("s", batch.id, wanted[:50], is_failed=False)
    output = batches.files.get("bank", batches.end("s", batch.id, "completed").output_file_id)
    assert read(batches.files, output) == "".join(content for _, content, _ in wanted)
    assert output.num_bytes == len(read(batches.files, output))


def test_tokens_are_counted_with_the_lines_that_are_kept(batches):
    batch = add(batches)
    assert (batch.input_tokens, batch.cached_tokens, batch.output_tokens, batch.reasoning_tokens) == (0, 0, 0, 0)
    claim(batches, "s")
    batches.keep("s", batch.id, [LineResult(1, "one\n", Tokens(2**40, 4, 20, 3))], is_failed=False)
    batches.keep(  # the first has its answer: what the second one took is new
        "s", batch.id, [LineResult(1, "x\n", Tokens(9, 9, 9, 9)), LineResult(2, "y\n", Tokens(1, 0, 2, 0))],
        is_failed=False,
    )  # fmt: skip
    batches.keep("s", batch.id, [LineResult(3, "z\n")], is_failed=True)
    with pytest.raises(LeaseLostError):
        batches.keep("other", batch.id, [LineResult(4, "late\n", Tokens(7, 7, 7, 7))], is_failed=False)
    ended = batches.end("s", batch.id, "completed")
    assert (ended.input_tokens, ended.cached_tokens, ended.output_tokens, ended.reasoning_tokens) == (
        2**40 + 1, 4, 22, 3,
    )  # fmt: skip
    assert (ended.num_completed, ended.completed_bytes) == (2, len("one\ny\n"))


def test_a_batch_from_before_tokens_were_counted_has_no_counts(location):
    earlier = connect_state(location)
    migrate(earlier, MIGRATIONS[:3])
    earlier.write(
        lambda run: run(
            """INSERT INTO batches (id, tenant, endpoint, model, input_file_id, output_lifetime_s, status, num_total,
            num_completed, num_failed, completed_bytes, failed_bytes, created_s, expires_s)
            VALUES (?, 'bank', '/v1/completions', 'm', 'f', 60, 'in_progress', 2, 1, 0, 4, 0, 1, 2000000000)""",
            "batch_" + "0" * 31,
        )
    )
    migrate(earlier)
    store = BatchStore(earlier, FileStore(earlier, 10_000))
    claimed = store.claim("s", 2_000_000_000, model="m", busy_tenants=())
    store.keep("s", claimed.id, [LineResult(2, "two\n", Tokens(1, 0, 2, 0))], is_failed=False)
    ended = store.end("s", claimed.id, "completed")
    assert (ended.num_completed, ended.input_tokens, ended.reasoning_tokens) == (2, None, None)
    earlier.close()
