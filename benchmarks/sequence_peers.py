"""Attention of dealt sequences by others, of tensors [batch, own positions, heads, d].

torch's ring is a private template, which gets its CPU flash kernel here and is used as torch's own operators use it.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

__all__ = ["deepspeed_ulysses", "torch_ring"]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def deepspeed_ulysses() -> Attention:
    """Around torch's own attention, causal."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel, compiled at first use
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False, verbose=False)

    def local(query: Tensor, key: Tensor, value: Tensor, *args: Any, **keywords: Any) -> Tensor:
        del args, keywords
        by_head = (each.transpose(1, 2) for each in (query, key, value))
        return functional.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)

    attention = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    return lambda query, key, value: attention(query, key, value, 0)


def torch_ring(rotate: str) -> Attention:
    """Causal, of positions that torch's head-tail balancer deals; by "allgather", its default, or "alltoall"."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        by_head = (each.transpose(1, 2) for each in (query, key, value))
        out: Tensor = _Ring.apply(*by_head, rotate)  # type: ignore[no-untyped-call]
        return out.transpose(1, 2)

    return attention


def _template(rotate: str) -> Any:
    from torch.distributed.tensor.experimental._context_parallel import _attention

    _attention.set_rotate_method(rotate)
    return _attention


class _Ring(Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        query, key, value, rotate = inputs
        ring = _template(rotate)._templated_ring_attention
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = ring(dist.group.WORLD, 2, kernel, query, key, value, is_causal=True)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rotate = rotate
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        ring = _template(ctx.rotate)._templated_ring_attention_backward
        found = ring(
            dist.group.WORLD, 2, _kernel_back, gradients[0], "grad_out", query, key, value, out, lse, is_causal=True
        )
        return *found[:3], None


def _kernel_back(*, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Any:
    out, lse, causal = rest["out"], rest["logsumexp"], rest["is_causal"]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, lse, 0.0, causal
    )
