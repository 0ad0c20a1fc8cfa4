"""torch's fused kernels as they are called: on CPU flash, on GPUs flash, then the memory-efficient one.

The CPU kernel ends the process on empty tensors, so blocks are never empty; it takes grouped heads, any width, and a
mask of the width of its sums. Flash on GPUs takes bands and no mask. The memory-efficient kernel takes as many key
heads as query heads, pads its log-sum-exp to 32 rows, and reads masks whose rows begin at multiples of 16 elements.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.parallel.blockwise.fused import Gradients, Kernel, Operands, Result, Returned

__all__ = ["FUSED"]

_aten: Any = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


def _cpu_flash(given: Operands) -> Result:
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        *given[:3], 0.0, given.causal, attn_mask=given.mask, scale=given.scale
    )
    return out, lse


def _cpu_flash_back(given: Operands, back: Returned) -> Gradients:
    query, key, value = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        back.grad_out, *given[:3], back.out, back.lse, 0.0, given.causal, attn_mask=given.mask, scale=given.scale
    )
    return query, key, value


def _gpu_flash(given: Operands) -> Result:
    query, key, value = (each.transpose(1, 2) for each in given[:3])
    lengths, how = (query.shape[1], key.shape[1]), _flash_band(given)
    found = _aten._flash_attention_forward(query, key, value, None, None, *lengths, 0.0, given.causal, False, **how)
    return found[0].transpose(1, 2), found[1]


def _gpu_flash_back(given: Operands, back: Returned) -> Gradients:
    grad, query, key, value, out = (each.transpose(1, 2) for each in (back.grad_out, *given[:3], back.out))
    state = query.new_zeros(2, dtype=torch.uint64)  # of dropout, which there is none of
    found = _aten._flash_attention_backward(
        grad, query, key, value, out, back.lse.contiguous(), None, None, query.shape[1], key.shape[1],
        0.0, given.causal, state, state.new_zeros(()), **_flash_band(given),
    )  # fmt: skip
    query, key, value = (each.transpose(1, 2) for each in found)
    return query, key, value


def _flash_band(given: Operands) -> dict[str, Any]:
    """Keys that each query sees to both sides of its own, where the last query's own key is the last one."""
    found: dict[str, Any] = {"scale": given.scale}
    if given.band is not None and not given.causal:
        rows, columns = given.query.shape[2], given.key.shape[2]
        left, right = columns - rows - given.band.low, given.band.high - (columns - rows)
        found["window_size_left"] = None if given.band.low <= 1 - rows else left
        found["window_size_right"] = None if given.band.high >= columns - 1 else right
    return found


def _gpu_efficient(given: Operands) -> Result:
    key, value = _repeated(given)
    out, lse, _, _ = _aten._scaled_dot_product_efficient_attention(
        given.query, key, value, _aligned(given), True, 0.0, given.causal, scale=given.scale
    )
    return out, lse[..., : given.query.shape[2]]


def _gpu_efficient_back(given: Operands, back: Returned) -> Gradients:
    key, value = _repeated(given)
    padded = functional.pad(back.lse, (0, -back.lse.shape[-1] % 32), value=torch.inf)  # inf: rows of weight 0
    unused = torch.zeros((), dtype=torch.int64, device=back.lse.device)
    grad_query, *others, _ = _aten._scaled_dot_product_efficient_attention_backward(
        back.grad_out, given.query, key, value, _aligned(given), back.out, padded, unused, unused, 0.0,
        [True, True, True, False], given.causal, scale=given.scale,
    )  # fmt: skip
    grad_key, grad_value = (_summed(each, given.key.shape[1]) for each in others)
    return grad_query, grad_key, grad_value


def _repeated(given: Operands) -> tuple[Tensor, Tensor]:
    """Keys and values of each query head."""
    times = given.query.shape[1] // given.key.shape[1]
    key, value = (each if times == 1 else each.repeat_interleave(times, 1) for each in (given.key, given.value))
    return key, value


def _summed(gradient: Tensor, kv_heads: int) -> Tensor:
    """[batch, heads, m, d] to [batch, kv_heads, m, d]"""
    batch, heads, *sizes = gradient.shape
    return gradient if heads == kv_heads else gradient.reshape(batch, kv_heads, -1, *sizes).sum(2)


def _aligned(given: Operands) -> Tensor | None:
    """The mask in the query's dtype, expanded, in memory whose rows are a multiple of 16 long."""
    if given.mask is None:
        return None
    columns = given.key.shape[2]
    mask = given.mask.to(given.query.dtype).expand(*given.mask.shape[:3], columns)
    mask = functional.pad(mask, (0, -columns % 16))[..., :columns]
    return mask.expand(*given.query.shape[:3], columns)


FUSED: dict[str, tuple[Kernel, ...]] = {
    "cpu": (Kernel("flash", (torch.float64, torch.float32, *_HALF), _cpu_flash, _cpu_flash_back),),
    "cuda": (
        Kernel(
            "flash",
            _HALF,
            _gpu_flash,
            _gpu_flash_back,
            masks=False,
            bands=True,
            whole=8,
            max_width=256,
            check_first=True,
        ),
        Kernel("efficient", (torch.float32, *_HALF), _gpu_efficient, _gpu_efficient_back, whole=8, check_first=True),
    ),
}
