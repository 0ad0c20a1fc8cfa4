"""One block of attention in plain torch: any device, dtype and feature, and differentiable as often as asked.

Backward of a block needs the output and log-sum-exp over all keys (arXiv 2205.14135, appendix B): with
P = exp(S - lse) and D = rowsum(dO * O) - dlse,  dV = P^T dO,  dS = P * (dO V^T - D),  dQ = dS K,  dK = dS^T Q.
"""

import torch
from torch import Tensor

from meshwright.parallel.blockwise.block import Block, BlockGradients, Upstream
from meshwright.parallel.blockwise.merge import Partial

__all__ = ["plain_backward", "plain_forward"]


def plain_forward(block: Block) -> Partial:
    """Output and log-sum-exp over the block's keys, in float32 or wider."""
    scores, _ = _scores(block)
    lse = scores.logsumexp(-1)
    probabilities = _probabilities(scores, lse)
    if block.kept is not None:
        probabilities = probabilities * block.kept
    return Partial(_by_key_head(block, probabilities, _wide(block.value)), lse)


def plain_backward(block: Block, upstream: Upstream) -> BlockGradients:
    """Gradients by way of this block alone, in float32 or wider."""
    scores, slope = _scores(block)
    probabilities = _probabilities(scores, upstream.lse)
    grad_out, value, key, query = map(_wide, (upstream.grad_out, block.value, block.key, block.query))
    moved = _by_key_head(block, grad_out, value.transpose(-1, -2))
    dropped = probabilities
    if block.kept is not None:
        moved, dropped = moved * block.kept, probabilities * block.kept
    grad_scores = probabilities * (moved - upstream.delta().unsqueeze(-1))
    grad_products = grad_scores if slope is None else grad_scores * slope
    return BlockGradients(
        query=_by_key_head(block, grad_products, key) * block.scale,
        key=_grouped(block, grad_products).transpose(-1, -2) @ _grouped(block, query) * block.scale,
        value=_grouped(block, dropped).transpose(-1, -2) @ _grouped(block, grad_out),
        bias=grad_scores,
    )


def _scores(block: Block) -> tuple[Tensor, Tensor | None]:
    """Scores [batch, heads, n, m], and the slope of the cap."""
    scores = _by_key_head(block, _wide(block.query) * block.scale, _wide(block.key).transpose(-1, -2))
    slope = None
    if block.softcap is not None:
        bent = (scores / block.softcap).tanh()
        scores, slope = bent * block.softcap, 1.0 - bent.square()
    if block.bias is not None:
        scores = scores + block.bias
    pairs = block.pairs()
    return (scores if pairs is None else scores.masked_fill(~pairs, -torch.inf)), slope


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """0 in rows without a key, where lse is -inf."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()


def _by_key_head(block: Block, rows: Tensor, right: Tensor) -> Tensor:
    """Product of [batch, heads, n, x] with [batch, kv_heads, x, y], each head with its key head."""
    return (_grouped(block, rows) @ right).reshape(*rows.shape[:-1], right.shape[-1])


def _grouped(block: Block, rows: Tensor) -> Tensor:
    """[batch, heads, n, x] as [batch, kv_heads, heads per key head * n, x]"""
    batch, heads, n, width = rows.shape
    kv_heads = block.key.shape[1]
    return rows.reshape(batch, kv_heads, heads // kv_heads * n, width)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
