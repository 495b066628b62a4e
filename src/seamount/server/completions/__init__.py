"""Continued text, and /v1/completions over it."""
