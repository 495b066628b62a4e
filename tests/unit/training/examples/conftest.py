"""Prompt encoders of each family: its chat template over a small tokenizer; and the embedded model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from chat_families import EOS, FAMILIES, write_family

from seamount.models.locate import locate_model
from seamount.models.prompt import PromptEncoder
from seamount.training.examples.rendering import Renderer


@pytest.fixture(scope="session")
def encoder_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], PromptEncoder]]:
    """`encoder_of(family)`; "tiny" is the embedded model's, "none" has no template."""
    made: dict[str, PromptEncoder] = {}

    def make(family: str) -> PromptEncoder:
        if family not in made:
            if family == "tiny":
                folder = locate_model("seamount-tiny")
            else:
                folder = write_family(tmp_path_factory.mktemp(family), *FAMILIES.get(family, ("", [], EOS)))
            made[family] = PromptEncoder.from_folder(folder)
        return made[family]

    yield make
    for encoder in made.values():
        encoder.close()


@pytest.fixture(scope="session")
def tiny(encoder_of: Callable[[str], PromptEncoder]) -> PromptEncoder:
    return encoder_of("tiny")


@pytest.fixture(scope="session")
def tiny_renderer(tiny: PromptEncoder) -> Renderer:
    return Renderer(tiny, max_length=256)
