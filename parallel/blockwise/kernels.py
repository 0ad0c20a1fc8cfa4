"""One block by the fastest exact kernel at hand: torch's own fused ones where they can, plain torch elsewhere.

A kernel of a device that this library was not tested on is compared with plain torch before its first use, so that a
torch in which it means something else costs speed and not truth.
"""

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from meshwright.parallel.blockwise.block import Allowed, Block, BlockGradients, Upstream
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.fused import Kernel, fused_backward, fused_forward
from meshwright.parallel.blockwise.merge import Partial
from meshwright.parallel.blockwise.plain import plain_backward, plain_forward
from meshwright.parallel.blockwise.torch_kernels import FUSED
from meshwright.parallel.thread_state import aside

__all__ = ["agrees", "block_backward", "block_forward", "kernel_for"]

_BOUNDS = {torch.float32: 64}  # in eps; both ways round each of their sums, where wider sums of half precision do not
_AGREED: dict[tuple[Kernel, torch.dtype, torch.device, bool], bool] = {}


def block_forward(block: Block) -> Partial:
    """Output and log-sum-exp over the block's keys."""
    kernel = kernel_for(block)
    return plain_forward(block) if kernel is None else fused_forward(kernel, block)


def block_backward(block: Block, upstream: Upstream, *, with_bias: bool) -> BlockGradients:
    """Gradients by way of the block alone; in plain torch where they will be differentiated."""
    differentiated = torch.is_grad_enabled()
    if differentiated and not torch._C._are_functorch_transforms_active():  # they take no checkpoints
        made = checkpoint(plain_backward, block, upstream, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(made, BlockGradients), type(made)
        return made
    kernel = None if with_bias or differentiated else kernel_for(block)
    return plain_backward(block, upstream) if kernel is None else fused_backward(kernel, block, upstream)


def kernel_for(block: Block) -> Kernel | None:
    """The fused kernel that can compute a block."""
    if block.softcap is not None or block.kept is not None:
        return None
    fitting = (kernel for kernel in FUSED.get(block.query.device.type, ()) if _fits(kernel, block))
    return next((kernel for kernel in fitting if _trusted(kernel, block)), None)


def _fits(kernel: Kernel, block: Block) -> bool:
    if block.query.dtype not in kernel.dtypes or kernel.width(block, more=1) > kernel.max_width:
        return False
    if block.band is not None and not block.causal:
        ahead = block.key.shape[2] - block.query.shape[2]
        return kernel.bands and block.bias is None and block.band.low <= ahead <= block.band.high
    return kernel.masks or (block.allowed is None and block.bias is None)


def _trusted(kernel: Kernel, block: Block) -> bool:
    if not kernel.check_first:
        return True
    grouped = block.query.shape[1] != block.key.shape[1]
    place = (kernel, block.query.dtype, block.query.device, grouped)
    if place not in _AGREED:
        heads = 2 if grouped else 1
        _AGREED[place] = aside(lambda: agrees(kernel, block.query.dtype, block.query.device, heads=heads))
    return _AGREED[place]


@torch.no_grad()
def agrees(kernel: Kernel, dtype: torch.dtype, device: torch.device, *, heads: int = 1) -> bool:
    """Whether a kernel gives what plain torch gives, forward and backward: whole, causal, banded and masked blocks.

    Args:
        kernel: on trial.
        dtype: of the tensors.
        device: where they are.
        heads: query heads per key head.
    """
    numbers = torch.arange(2 * heads * 2 * 40 * 16, device=device, dtype=torch.float32).reshape(2, 2 * heads, 40, 16)
    query, key, value, grad = ((numbers * each).sin().to(dtype) for each in (0.7, 1.1, 1.3, 1.7))
    allowed = Allowed(Diagonals(-30, 5).tensor(40, 40, device).index_fill_(0, torch.tensor(7, device=device), False))
    whole = Block(query, key[:, :2], value[:, :2], 0.25)
    blocks = [whole, replace(whole, band=Diagonals(-39, 0))]
    if kernel.masks:
        blocks.append(replace(whole, allowed=allowed))
    if kernel.bands:
        blocks.append(replace(whole, band=Diagonals(-9, 2)))
        few = replace(whole, query=query[:, :, :30])
        blocks += [replace(few, band=band) for band in (Diagonals(-29, 10), Diagonals(3, 12), Diagonals(3, 39))]
    try:
        return all(_same(kernel, block, grad) for block in blocks)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False


def _same(kernel: Kernel, block: Block, grad: torch.Tensor) -> bool:
    dtype = block.query.dtype
    bound = _BOUNDS.get(dtype, 16) * torch.finfo(dtype).eps
    theirs, ours = fused_forward(kernel, block), plain_forward(block)
    grad = grad[:, :, : block.query.shape[2]]
    upstream = Upstream(grad, grad[..., 0].float(), ours.out.to(grad.dtype), ours.lse)
    pairs = [*zip(theirs, ours, strict=True)]
    pairs += [*zip(fused_backward(kernel, block, upstream)[:3], plain_backward(block, upstream)[:3], strict=True)]
    return all(torch.allclose(one.to(two.dtype), two, rtol=bound, atol=bound * _size(two)) for one, two in pairs)


def _size(tensor: torch.Tensor) -> float:
    return float(tensor.nan_to_num(neginf=0.0).abs().max())
