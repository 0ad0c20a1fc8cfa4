"""Errors of clusters, each with the exit code that the launcher ends with."""

from meshwright.parallel.errors import MeshwrightError

__all__ = ["ClusterError", "FewerNodesError", "RendezvousError", "UnavailableError"]


class ClusterError(MeshwrightError):
    """A cluster that cannot do what was asked."""

    exit_code = 70


class UnavailableError(ClusterError):
    """Machines or devices that are not there, or not enough of them."""

    exit_code = 69


class FewerNodesError(UnavailableError):
    """So many nodes cannot be had now, and fewer may be.

    Args:
        message: why not.
        have: as many as may be.
    """

    def __init__(self, message: str, have: int) -> None:
        super().__init__(message)
        self.have = have


class RendezvousError(ClusterError):
    """Ranks that cannot find each other, such as by a port that is taken."""

    exit_code = 76
