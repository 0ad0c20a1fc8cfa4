"""What must still be as it was when a model was wrapped."""

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from meshwright.parallel.blockwise.interface import Configs
from meshwright.parallel.errors import WrapError

__all__ = ["HOOKED", "AsWrapped"]

HOOKED = (
    "parameter {} has hooks on its gradient, which would not be called, since this rank holds a part of it; change "
    "gradients behind step() instead, or keep parameters whole (axis dp)"
)
"""For parameters that `fsdp` cuts."""


class AsWrapped:
    """Looks at a model before a step.

    Args:
        module: the model, wrapped.
        deals: whether ranks hold parts of tensors inside of its blocks (`tp`, `cp`).

    >>> frozen = nn.Linear(2, 2).requires_grad_(False)
    >>> wrapped = AsWrapped(frozen, deals=False)
    >>> wrapped.check()
    >>> _ = frozen.requires_grad_(True)
    >>> wrapped.check()
    Traceback (most recent call last):
    meshwright.parallel.errors.WrapError: parameter weight was frozen when the model was wrapped, and trains now; ...
    """

    def __init__(self, module: nn.Module, *, deals: bool) -> None:
        modules = dict(module.named_modules())
        self._configs = Configs.plugged(modules.values())
        self._frozen = [
            (f"{path}.{leaf}".lstrip("."), owner, leaf)
            for path, owner in modules.items()
            for leaf, each in owner._parameters.items()
            if each is not None and not each.requires_grad
        ]
        self._idle = [
            (path, each) for path, each in modules.items() if deals and isinstance(each, _DropoutNd) and each.p == 0
        ]

    def check(self) -> None:
        """Before a step.

        Raises:
            WrapError: for a parameter that was frozen at the wrap and trains now, for dropout that had a p of 0, and
                for a model of transformers that would attend by itself now.
        """
        self._configs.check()
        for name, owner, leaf in self._frozen:
            each = owner._parameters.get(leaf)
            if each is not None and each.requires_grad:
                raise WrapError(
                    f"parameter {name} was frozen when the model was wrapped, and trains now; let it train when you "
                    "call parallelize() and freeze it behind that: it may be thawed again then"
                )
        for path, dropout in self._idle:
            if dropout.p > 0:
                raise WrapError(
                    f"dropout {path} had p=0 when the model was wrapped on tp or cp, and has p={dropout.p} now, of "
                    "which no rank knows its part; set it before parallelize()"
                )
