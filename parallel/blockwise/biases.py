"""Biases as functions of positions, of which nothing the size of all scores exists."""

import torch
from torch import Tensor

from meshwright.parallel.blockwise.mask import places
from meshwright.parallel.blockwise.scoring import BiasFunction
from meshwright.parallel.errors import WrapError

__all__ = ["alibi"]


def alibi(slopes: Tensor) -> BiasFunction:
    """Attention with linear biases (arXiv 2108.12409): each score loses slope * |query position - key position|.

    Args:
        slopes: [heads].

    >>> alibi(torch.tensor([0.5]))(range(2, 4), range(0, 4))
    tensor([[[[-1.0000, -0.5000, -0.0000, -0.5000],
              [-1.5000, -1.0000, -0.5000, -0.0000]]]])

    Raises:
        WrapError: for slopes of another shape.
    """
    if slopes.dim() != 1:
        raise WrapError(f"alibi() takes one slope per head, [heads], not {list(slopes.shape)}")

    def bias(queries: range, keys: range) -> Tensor:
        distance = places(queries, slopes.device).unsqueeze(-1) - places(keys, slopes.device)
        return distance.abs().to(torch.promote_types(slopes.dtype, torch.float32)) * -slopes.reshape(1, -1, 1, 1)

    return bias
