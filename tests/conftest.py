"""Fixtures that several rooms' tests share: a small checkpoint on disk, and isolation from the user's own settings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import hypothesis
import pytest

# No timed tests: a busy machine makes drawing and running slow, and neither is a fault of the code.
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("any-machine", deadline=None, suppress_health_check=_SLOW)
hypothesis.settings.load_profile("any-machine")


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings and the history of whoever runs the tests out of them, and theirs out of these."""
    home = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    for name in [name for name in os.environ if name.startswith("SEAMOUNT_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Qwen2 with random weights: real enough for every command, loaded in a blink, saying nonsense."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "small-qwen2"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    _write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": template})
    _write_json(folder / "generation_config.json", {"eos_token_id": 256, "temperature": 0.7})
    _write_json(folder / "config.json", _CONFIG)
    save_file(_random_weights(), str(folder / "model.safetensors"))
    return folder


_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 256,
}


def _random_weights() -> dict[str, object]:
    import numpy

    random = numpy.random.default_rng(7)
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (257, 32),
        f"{layer}.self_attn.q_proj.weight": (32, 32),
        f"{layer}.self_attn.q_proj.bias": (32,),
        f"{layer}.self_attn.k_proj.weight": (16, 32),
        f"{layer}.self_attn.k_proj.bias": (16,),
        f"{layer}.self_attn.v_proj.weight": (16, 32),
        f"{layer}.self_attn.v_proj.bias": (16,),
        f"{layer}.self_attn.o_proj.weight": (32, 32),
        f"{layer}.mlp.gate_proj.weight": (64, 32),
        f"{layer}.mlp.up_proj.weight": (64, 32),
        f"{layer}.mlp.down_proj.weight": (32, 64),
    }
    weights = {name: random.normal(0, 0.3, shape).astype(numpy.float32) for name, shape in shapes.items()}
    for name in (f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight", "model.norm.weight"):
        weights[name] = numpy.ones(32, dtype=numpy.float32)
    return weights


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
