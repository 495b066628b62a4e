"""Seamount: the private DeepSeek stack.

The public names are loaded when they are first used, so that `import seamount`, and with it `seamount --help`, costs
nothing: torch comes with `LLM`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .core.sampling import SamplingParams
    from .engine.llm import LLM
    from .training.continual.pipeline import ContinualLearning
    from .training.tuning.pipeline import FineTuningPipeline

__all__ = ["LLM", "ContinualLearning", "FineTuningPipeline", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": ".engine.llm",
    "ContinualLearning": ".training.continual.pipeline",
    "FineTuningPipeline": ".training.tuning.pipeline",
    "SamplingParams": ".core.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
