"""Errors of the training program, each with the exit code that its process ends with.

The codes are those of `meshwright.launch.exits`: 65 for a job that asks for something impossible, 74 for files.
"""

from meshwright.parallel.errors import MeshwrightError

__all__ = ["CheckpointError", "CorpusError", "CorpusMissingError", "ModelBuildError", "WorkerError"]


class WorkerError(MeshwrightError):
    """Base of what can go wrong on a rank for a reason the user can mend."""

    exit_code = 65


class CorpusError(WorkerError):
    """A corpus or tokenizer that cannot feed this job."""


class CorpusMissingError(WorkerError):
    """A data file that does not exist or cannot be read."""

    exit_code = 74


class ModelBuildError(WorkerError):
    """A model that cannot be imported or built."""


class CheckpointError(WorkerError):
    """A checkpoint that cannot be written or read."""

    exit_code = 74
