"""Exit codes of the launcher."""

from enum import IntEnum

from meshwright.parallel.hang import EXIT_CODE

__all__ = ["Exit"]


class Exit(IntEnum):
    """Exit codes of the launcher; a failed rank keeps its own, 128 + N for signal N."""

    SUCCESS = 0
    USAGE = 64
    BAD_JOB = 65
    UNAVAILABLE = 69
    INTERNAL = 70
    IO = 74
    PREEMPTED = 75
    RENDEZVOUS = 76
    PERMISSION = 77
    PREFLIGHT = 78
    TIMEOUT = 124
    HANG = EXIT_CODE
