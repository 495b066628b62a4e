"""Write a checkpoint with 8-bit weights as vLLM reads it (compressed-tensors, W8A8); runs inside vLLM's environment.

    python convert_w8a8.py FOLDER TARGET

Weights are symmetric per output row, activations are quantized by vLLM per token; embedding, head, norms and the router
of the experts stay as they are, as the recipes of llm-compressor leave them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_KEPT = ("embed_tokens", "lm_head", "mlp.gate.weight")
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def main() -> None:
    """Parse the command line and write the folder."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": _SCHEME}), encoding="utf-8")
    weight_map = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                tensors |= _converted(key, file.get_tensor(key))
        save_file(tensors, target / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _converted(key: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    if values.dim() != 2 or any(part in key for part in _KEPT):
        return {key: values}
    scale = values.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 127
    return {key: (values.float() / scale).round().to(torch.int8), f"{key}_scale": scale}


if __name__ == "__main__":
    main()
