"""Chunks are joined where they come faster than anybody reads, and nothing of them is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from seamount.core.requests import Chunk, PositionLogprobs, TokenLogprob
from seamount.engine.pacing import MAX_HOLD_S, Pacer


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def chunk(sequence: int, token_id: int, *, first: bool = False, last: bool = False) -> Chunk:
    return Chunk(
        request_id=f"r{sequence}",
        token_ids=(token_id,),
        text=f"<{token_id}>",
        logprobs=(PositionLogprobs(TokenLogprob(token_id, -1.0, "x")),),
        num_cached_tokens=3 if first else None,
        queue_s=0.5 if first else None,
        finish_reason="stop" if last else None,
        stop_reason="end" if last else None,
    )


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 0.01)), min_size=1, max_size=60))
def test_nothing_is_lost_and_nothing_waits_long(events: list[tuple[int, float]]) -> None:
    clock, sent = Clock(), []
    pacer = Pacer(clock)
    added: dict[str, list[int]] = {}
    last_sent_s = 0.0
    for token_id, (sequence, later_s) in enumerate(events):
        clock.now_s += later_s
        ids = added.setdefault(f"r{sequence}", [])
        pacer.add([chunk(sequence, token_id, first=not ids)])
        ids.append(token_id)
        if pacer.is_due():
            taken = pacer.take()
            assert len({(c.request_id, c.index) for c in taken}) == len(taken)
            sent += taken
            last_sent_s = clock.now_s
        else:
            assert clock.now_s - last_sent_s < MAX_HOLD_S
    sent += pacer.take()
    for name, ids in added.items():
        whole = [c for c in sent if c.request_id == name]
        assert [t for c in whole for t in c.token_ids] == ids
        assert "".join(c.text for c in whole) == "".join(f"<{t}>" for t in ids)
        assert [p.chosen.token_id for c in whole for p in c.logprobs] == ids
        assert [c.num_cached_tokens for c in whole] == [3] + [None] * (len(whole) - 1)


def test_beginnings_and_ends_are_not_held() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    pacer.add([chunk(n, 1) for n in range(9)])
    assert not pacer.is_due()
    pacer.add([chunk(9, 2, first=True)])
    assert pacer.is_due()
    assert len(pacer.take()) == 10
    pacer.add([chunk(0, 3)])
    assert not pacer.is_due()
    pacer.add([chunk(0, 4, last=True)])
    assert pacer.is_due()
    (whole,) = pacer.take()
    assert (whole.token_ids, whole.finish_reason, whole.stop_reason) == ((3, 4), "stop", "end")


def test_a_lone_stream_of_a_large_model_is_never_held() -> None:
    clock = Clock()
    pacer = Pacer(clock)
    for token_id in range(20):
        clock.now_s += 0.01
        pacer.add([chunk(0, token_id)])
        assert pacer.is_due()
        assert len(pacer.take()) == 1
