"""Errors of the package `moe`: a fact with its values, where it was found, and what to do instead."""

from meshwright.parallel.errors import MeshwrightError

__all__ = ["BalanceError", "DispatchError", "MetricsError", "RoutingError", "SwapError"]


class RoutingError(MeshwrightError):
    """Logits or options of a router that do not fit each other, or that no decision can be made of."""


class BalanceError(MeshwrightError):
    """Statistics or biases that would balance wrongly."""


class DispatchError(MeshwrightError):
    """Tokens, experts and ranks that do not fit each other."""


class MetricsError(MeshwrightError):
    """Counts that do not add up, or that no number can be made of."""


class SwapError(MeshwrightError):
    """A model whose experts cannot be dealt over ranks, or none of whose modules is recognised as experts."""
