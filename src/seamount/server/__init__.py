"""The HTTP face: OpenAI's API, probes, metrics and the console. Async only; holds no torch."""
