"""AdamW with decoupled decay on matrices only (Loshchilov and Hutter, arXiv 1711.05101)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

__all__ = ["build_adamw", "decay_of", "set_rate"]


def decay_of(weight_decay: float) -> Callable[[str, Tensor], dict[str, Any]]:
    """Sorts parameters: matrices decay; norms, biases and other vectors do not.

    >>> decay_of(0.1)("norm.weight", torch.zeros(4))
    {'weight_decay': 0.0}
    """

    def settings(name: str, parameter: Tensor) -> dict[str, Any]:
        del name
        return {"weight_decay": weight_decay if parameter.dim() >= 2 else 0.0}

    return settings


def build_adamw(lr: float, betas: tuple[float, float], eps: float) -> Callable[[Iterable[Any]], Optimizer]:
    """A function that builds AdamW on groups of parameters, fused into one pass over memory."""

    def build(params: Iterable[Any]) -> Optimizer:
        return AdamW(params, lr=lr, betas=betas, eps=eps, fused=True)

    return build


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Gives every group of an optimizer the same learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
