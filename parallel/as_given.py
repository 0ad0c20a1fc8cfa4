"""Gradients that something else than the model changed between a step and the optimizer's."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from meshwright.parallel.mesh import Mesh

__all__ = ["AsGiven"]

_PARTS = ("tp", "pp", "ep")


class AsGiven:
    """Warns once where ranks hold parts of gradients and a norm of some would be taken for that of all.

    torch.nn.utils.clip_grad_norm_ knows the parameters it is given: on each rank it finds another norm, and scales what
    several ranks hold by another factor.

    Args:
        local: gives trained parameters and the part of their gradients that this rank holds.
        mesh: of the model.

    >>> weight = nn.Parameter(Tensor([3.0]))
    >>> given = AsGiven(lambda: {"weight": (weight, weight.grad)}, Mesh(tp=2))
    >>> weight.grad = Tensor([1.0])
    >>> given.note()
    >>> given.check()
    >>> _ = weight.grad.mul_(0.5)
    >>> given.check()
    Traceback (most recent call last):
    UserWarning: gradients were changed between step() and the optimizer's; on tp=2 a rank holds parts of them: ...
    """

    def __init__(self, local: Callable[[], Mapping[str, tuple[nn.Parameter, Tensor | None]]], mesh: Mesh) -> None:
        self._local = local
        self._axes = ", ".join(f"{axis}={mesh.degree(axis)}" for axis in _PARTS if mesh.degree(axis) > 1)
        self._versions: dict[str, int] | None = None

    def note(self) -> None:
        """Gradients are now as they should be."""
        if self._axes:
            self._versions = self._now()

    def check(self, *of_optimizer: Any) -> None:
        """Before a step of the optimizer.

        Warns:
            UserWarning: the first time that gradients are others.
        """
        del of_optimizer
        if self._axes and self._versions is not None and self._now() != self._versions:
            axes, self._axes = self._axes, ""
            warnings.warn(
                f"gradients were changed between step() and the optimizer's; on {axes} a rank holds parts of them: to "
                "clip by their norm, call clip_gradients() of the wrapped model, which knows all parts "
                "(torch.nn.utils.clip_grad_norm_ does not)",
                stacklevel=2,
            )

    def _now(self) -> dict[str, int]:
        return {name: each._version for name, (_, each) in self._local().items() if each is not None}
