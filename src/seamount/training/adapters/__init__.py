"""LoRA and QLoRA: layers that learn beside frozen weights, PEFT's files, and merging."""
