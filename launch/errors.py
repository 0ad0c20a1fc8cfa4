"""Errors of job files: where, which key, what is wrong, what to write instead; all of one file at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.parallel.errors import MeshwrightError

__all__ = ["JobError", "Problem"]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a job.

    Args:
        where: "job.yaml:12:9", or "--set a.b=c" for an override.
        key: dotted key, empty where none is known.
        message: fact with the value found, and what to write instead.
    """

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class JobError(MeshwrightError):
    """A job that cannot be read or makes no sense; lists every problem found, in the order of the file.

    >>> error = JobError([Problem("job.yaml:3:1", "nodez", "unknown key; did you mean 'nodes'?")])
    >>> print(error)
    job.yaml:3:1: nodez: unknown key; did you mean 'nodes'?
    >>> error.where, error.exit_code
    ('job.yaml:3:1', 65)
    """

    exit_code = 65

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a JobError names at least one problem"
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type["JobError"], tuple[tuple[Problem, ...]]]:
        return (type(self), (self.problems,))

    @property
    def where(self) -> str:
        """Where the first problem is: "file:line:col" or "--set a.b=c"."""
        return self.problems[0].where
