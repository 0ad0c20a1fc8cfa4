"""Attention as torch computes it, by pattern: its flash kernel, its memory-efficient one with a mask, flash by pattern.

Tensors are [batch, heads, positions, d]; there may be fewer heads of keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device import Device
from meshwright.parallel.blockwise.masks import Mask, causal, documents, window

__all__ = ["Pattern", "Peer", "patterns", "peers"]

WINDOW = 1024
DOCUMENTS = 8
Peer: TypeAlias = Callable[[], Callable[..., Tensor]]
_aten: Any = torch.ops.aten


@dataclass
class Pattern:
    """Which pairs attend.

    Args:
        length: of the sequence.
        mask: ours; None for all pairs.
        dense: whether torch needs a mask in memory.
        window: keys that a query sees.
        num_documents: of equal length.
    """

    length: int
    mask: Mask | None
    dense: bool = False
    window: int | None = None
    num_documents: int = 1
    mask_bytes: int = field(init=False, default=0)

    def scores(self, device: str, dtype: torch.dtype) -> Tensor:
        """0 where allowed and -inf elsewhere, [length, length], made some rows at a time."""
        keys = torch.arange(self.length, device=device, dtype=torch.int32)
        made = torch.zeros(self.length, self.length, device=device, dtype=dtype)
        size = -(-self.length // self.num_documents)
        reach = self.window or self.length
        for start in range(0, self.length, 1024):
            rows = keys[start : start + 1024, None]
            allowed = (rows >= keys) & (rows - keys < reach) & (rows // size == keys // size)
            made[start : start + 1024].masked_fill_(~allowed, -torch.inf)
        self.mask_bytes = made.numel() * made.element_size()
        return made


def patterns(length: int) -> dict[str, Pattern]:
    """Name -> pattern of that length."""
    reach = min(WINDOW, max(1, length // 4))
    size = -(-length // DOCUMENTS)
    packed = causal() & documents(torch.arange(length) // size)
    return {
        "whole": Pattern(length, None),
        "causal": Pattern(length, causal()),
        "window": Pattern(length, causal() & window(reach - 1), dense=True, window=reach),
        "documents": Pattern(length, packed, dense=True, num_documents=DOCUMENTS),
    }


def peers(device: Device, pattern: Pattern) -> dict[str, Peer]:
    """Name -> makes a call; "torch" is what `scaled_dot_product_attention` does with such a pattern."""
    if not pattern.dense:
        return {"torch": lambda: _flash(device, causal=pattern.mask is not None)}
    found: dict[str, Peer] = {"torch": lambda: _masked(device, pattern)}
    if device.is_gpu:
        found["flash by pattern"] = lambda: _flash_by_pattern(pattern)
    return found


def _flash(device: Device, *, causal: bool) -> Callable[..., Tensor]:
    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if device.is_gpu else SDPBackend.MATH):
            grouped = query.shape[1] != key.shape[1]
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

    return call


def _masked(device: Device, pattern: Pattern) -> Callable[..., Tensor]:
    if pattern.length**2 >= 1 << 31:
        raise ValueError(f"the kernel counts elements of a mask in 32 bits, which has {pattern.length**2:.1e}")
    scores = pattern.scores(device.kind, torch.bfloat16)[None, None]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        times = query.shape[1] // key.shape[1]
        key, value = (each if times == 1 else each.repeat_interleave(times, 1) for each in (key, value))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if device.is_gpu else SDPBackend.MATH):
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=scores)

    return call


def _flash_by_pattern(pattern: Pattern) -> Callable[..., Tensor]:
    """torch's flash kernel, told the window, or the borders between documents."""
    size = -(-pattern.length // pattern.num_documents)
    borders = torch.arange(0, pattern.num_documents + 1, device="cuda", dtype=torch.int32) * size
    borders = borders.clamp(max=pattern.length)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        if pattern.window is not None:
            reach = {"window_size_left": pattern.window - 1, "window_size_right": 0}
            length = pattern.length
            out: Tensor = _aten._flash_attention_forward(
                query, key, value, None, None, length, length, 0.0, True, False, **reach
            )[0]
        else:
            rows = (each[0] for each in (query, key, value))
            out = _aten._flash_attention_forward(*rows, borders, borders, size, size, 0.0, True, False)[0][None]
        return out.transpose(1, 2)

    return call
