"""An engine without requests costs nothing: its threads sleep instead of waiting busily for the next step."""

from __future__ import annotations

import time

from seamount import LLM, SamplingParams


def test_an_idle_engine_uses_no_processor() -> None:
    llm = LLM("seamount-tiny")
    llm.generate("What is 3 + 4?", SamplingParams(max_tokens=8, ignore_eos=True))
    time.sleep(0.3)  # what still runs down after a step, of whichever library
    before = time.process_time()  # of all threads together
    time.sleep(1.0)
    assert time.process_time() - before < 0.05
