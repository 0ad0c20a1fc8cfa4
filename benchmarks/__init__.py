"""Comparisons against peers: each module is one command, `python -m benchmarks.NAME [--json]`."""

__all__: list[str] = []
