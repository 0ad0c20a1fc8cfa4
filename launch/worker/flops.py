"""How much arithmetic a model needs, and how much this device can do.

Model FLOPs are counted, not derived from a config, so that any model has them: one forward pass runs under torch's
`FlopCounterMode` (2 FLOPs per multiply-add of matmuls and convolutions); backward costs twice the forward (Kaplan et
al., arXiv 2001.08361, section 2.1). Attention, 4 * batch * heads * queries * keys * head_dim forward, is counted at its
call, because a fused kernel hides its matmuls, and under both conventions of the field:
  full    every query meets every key (PaLM, arXiv 2204.02311, appendix B)
  causal  only pairs that the mask keeps (FlashAttention-2, arXiv 2307.08691, section 4.1)
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["FlopCount", "count_flops", "measure_peak_flops_per_s"]

_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class FlopCount:
    """Forward and backward FLOPs of a number of tokens, under both conventions."""

    full: float
    causal: float

    def per_token(self, num_tokens: int) -> "FlopCount":
        """The same for one token."""
        return FlopCount(self.full / num_tokens, self.causal / num_tokens)


@contextmanager
def count_flops() -> Iterator[Callable[[], FlopCount]]:
    """Counts the forward passes made inside; the function it gives returns forward and backward FLOPs.

    >>> weight = torch.zeros(4, 8)
    >>> with count_flops() as counted:
    ...     _ = torch.zeros(2, 8) @ weight.T
    >>> counted()
    FlopCount(full=384.0, causal=384.0)
    """
    matmuls = FlopCounterMode(display=False)
    with matmuls, _AttentionCounter(matmuls) as attention:
        yield lambda: FlopCount(3.0 * (attention.rest() + attention.full), 3.0 * (attention.rest() + attention.causal))


class _AttentionCounter(TorchFunctionMode):
    def __init__(self, matmuls: FlopCounterMode) -> None:
        super().__init__()
        self.full = 0.0
        self.causal = 0.0
        self._matmuls = matmuls
        self._inside = 0

    def rest(self) -> int:
        """FLOPs of everything but attention."""
        return int(self._matmuls.get_total_flops()) - self._inside

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **keywords)
        before = self._matmuls.get_total_flops()
        result = func(*args, **keywords)
        self._inside += self._matmuls.get_total_flops() - before
        self._note(args, keywords)
        return result

    def _note(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        named = {**dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)), **keywords}
        query, key, value = named["query"], named["key"], named["value"]
        queries, keys = query.shape[-2], key.shape[-2]
        flops = 2.0 * query.shape[:-2].numel() * queries * keys * (query.shape[-1] + value.shape[-1])
        self.full += flops
        self.causal += flops * _kept(named.get("attn_mask"), queries, keys, bool(named.get("is_causal")))


def _kept(mask: Tensor | None, queries: int, keys: int, is_causal: bool) -> float:
    """Share of query-key pairs that attention keeps."""
    if is_causal:
        return sum(min(row + 1, keys) for row in range(queries)) / (queries * keys)
    if mask is None:
        return 1.0
    kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return float(kept.double().mean())


def measure_peak_flops_per_s(device: torch.device, dtype: torch.dtype, *, budget_s: float = 0.15) -> float:
    """Best rate of square matmuls that this rank reaches now; the denominator of model-FLOP utilisation.

    Run it on all ranks at once: ranks that share a machine share its speed.
    """
    size = 8192 if device.type == "cuda" else 768
    left = torch.ones(size, size, device=device, dtype=dtype)
    right = torch.ones(size, size, device=device, dtype=dtype)
    best = 0.0
    started = time.perf_counter()
    while best == 0.0 or time.perf_counter() - started < budget_s:
        begin = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - begin))
    return best
