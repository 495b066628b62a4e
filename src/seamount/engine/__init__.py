"""Turns requests into tokens: scheduling, paged cache, sampling, the worker process and the in-process `LLM`."""
