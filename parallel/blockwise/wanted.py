"""Which gradients a backward pass is asked for: schedules ask for those of inputs first and of weights later."""

from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["wanted"]


def wanted(ctx: Any, inputs: Sequence[bool]) -> list[bool]:
    """For each input of a custom function whether its gradient is asked for, seen from inside its backward.

    Args:
        ctx: of the function.
        inputs: of the call, in order: whether it was a tensor.
    """
    nodes = iter(node for node, _ in ctx.next_functions)
    following = [next(nodes) if each else None for each in inputs]
    needed = zip(ctx.needs_input_grad, following, strict=False)
    return [bool(need) and node is not None and _goes_on(node) for need, node in needed]


def _goes_on(node: Any) -> bool:
    try:
        found: bool = torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `torch.autograd.grad` was asked for by name
        return True
    return found
