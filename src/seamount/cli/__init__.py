"""The command line: one file per command, `main` that chooses it, and `wire`, where ports meet implementations."""
