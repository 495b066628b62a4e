"""Offline jobs of many requests: made, kept, worked on while the engine has room."""
