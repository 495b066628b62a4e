"""The one place that names the version; read by packaging, the CLI and the server."""

__version__ = "0.1.0"
