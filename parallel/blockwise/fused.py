"""What it takes to have a block computed by a fused kernel that was written for less.

One width for query, key and value: zeros beside them change no product. A mask of scores instead of pairs. A
log-sum-exp without infinities, and -inf again where the kernel gives something else to rows without a key. Kernels take
no gradient of log-sum-exp: a column of ones beside the values, with that gradient beside the output's and 0 beside the
output, adds it to dS = P * (dO V^T - rowsum(dO * O)) exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.parallel.blockwise.block import Block, BlockGradients, Upstream
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.merge import Partial

__all__ = ["Gradients", "Kernel", "Operands", "Result", "Returned", "fused_backward", "fused_forward"]


class Operands(NamedTuple):
    """What a kernel takes: query, key, value of one width; `mask` is added to scores, [1 or batch, 1 or heads, ...].

    Kernels that take bands are given one, which may be `causal`, a triangle; others are given that alone.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    band: Diagonals | None = None


class Returned(NamedTuple):
    """What a kernel's backward takes besides."""

    grad_out: Tensor
    out: Tensor
    lse: Tensor


Result: TypeAlias = tuple[Tensor, Tensor]
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A fused kernel of torch.

    Args:
        name: for reports.
        dtypes: that it takes.
        forward: operands to output and log-sum-exp [batch, heads, n].
        backward: operands, and what comes back, to gradients of query, key and value.
        masks: whether it takes a mask.
        bands: whether it takes any band of diagonals that holds the last pair of the block.
        whole: widths it takes are multiples of this.
        max_width: and at most this.
        check_first: whether it is compared with plain torch before it is used.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    forward: Callable[[Operands], Result]
    backward: Callable[[Operands, Returned], Gradients]
    masks: bool = True
    bands: bool = False
    whole: int = 1
    max_width: int = 1 << 16
    check_first: bool = False

    def width(self, block: Block, more: int = 0) -> int:
        """The width that a block's tensors are brought to."""
        wanted = max(block.query.shape[-1], block.value.shape[-1] + more)
        return -(-wanted // self.whole) * self.whole


def fused_forward(kernel: Kernel, block: Block) -> Partial:
    """Output, in the dtype of the query, and log-sum-exp over the block's keys."""
    operands = _operands(block, kernel.width(block))
    out, lse = kernel.forward(operands)
    dead = _dead(block, operands.mask)
    if dead is not None:
        out, lse = out.masked_fill(dead.unsqueeze(-1), 0.0), lse.masked_fill(dead, -torch.inf)
    return Partial(out[..., : block.value.shape[-1]], lse)


def fused_backward(kernel: Kernel, block: Block, upstream: Upstream) -> BlockGradients:
    """Gradients by way of this block alone, in the dtype of the query."""
    grad_out, grad_lse, out, lse = upstream
    width = kernel.width(block, more=0 if grad_lse is None else 1)
    operands = _operands(block, width)
    if grad_lse is not None:
        grad_out = torch.cat((grad_out, grad_lse.unsqueeze(-1).to(grad_out.dtype)), -1)
        value = functional.pad(block.value, (0, 1), value=1.0)
        operands = operands._replace(value=_padded(value, width))
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    returned = Returned(_padded(grad_out, width), _padded(out.to(grad_out.dtype), width), lse)
    found = kernel.backward(operands, returned)
    sizes = (block.query.shape[-1], block.key.shape[-1], block.value.shape[-1])
    query, key, value = (each[..., :size] for each, size in zip(found, sizes, strict=True))
    return BlockGradients(query, key, value, bias=None)


def _dead(block: Block, mask: Tensor | None) -> Tensor | None:
    """Rows without a key."""
    if block.bias is None or mask is None:
        return None if block.allowed is None else block.allowed.dead
    without = mask == -torch.inf
    inside = None if block.band is None else block.pairs()
    return (without if inside is None else without | ~inside).all(-1)


def _operands(block: Block, width: int) -> Operands:
    query, key, value = (_padded(each, width) for each in (block.query, block.key, block.value))
    return Operands(query, key, value, mask=_mask(block), causal=block.causal, scale=block.scale, band=block.band)


def _mask(block: Block) -> Tensor | None:
    """Not in bfloat16: a bias would lose digits. Not narrower than the query: kernels read it as if it were not."""
    dtype = torch.promote_types(block.query.dtype, torch.float32)
    scores = None if block.allowed is None else block.allowed.scores(dtype)
    if block.bias is None:
        return scores
    bias = block.bias.to(dtype)
    bias = bias.reshape(*(1,) * (4 - bias.dim()), *bias.shape)
    return _by_rows(bias if scores is None else bias + scores)


def _padded(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    return _by_rows(tensor) if missing == 0 else functional.pad(tensor, (0, missing))


def _by_rows(tensor: Tensor) -> Tensor:
    """Numbers of a row side by side: kernels read them so, whatever the stride is."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
