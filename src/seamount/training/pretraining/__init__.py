"""The embedded model from nothing: tokenizer, corpus of made samples, loop."""
