"""Neural networks and all that a checkpoint folder holds: config, weights, tokenizer, chat template, output parsers."""
