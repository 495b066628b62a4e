"""Schemas of what crosses the wire, in OpenAI's words."""
