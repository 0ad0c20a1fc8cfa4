"""What torch's memory-efficient kernel on a GPU asks of the memory its operands lie in: errors against float64.

One thing is varied at a time, of the call as the library makes it. Rows with "out [b h n d]" show what its backward
gives where the output lies otherwise than the kernel left it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.device import Device
from benchmarks.sections import aligned
from meshwright.parallel.blockwise.block import Block, Upstream
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.fused import fused_backward, fused_forward
from meshwright.parallel.blockwise.plain import plain_backward, plain_forward
from meshwright.parallel.blockwise.torch_kernels import FUSED

__all__ = ["layouts", "table"]

_aten: Any = torch.ops.aten
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class _Trial:
    """A call.

    Args:
        rows: of queries and keys.
        width: of a head.
        causal: or all pairs.
        operands: what query, key and value lie in memory as.
        out: what the output lies in memory as when backward reads it; likewise `grad`, its gradient.
        grad: see `out`.
        pad: of the log-sum-exp to 32 rows; None leaves its own numbers there.
        way: who calls: the "wrapped" operator, the one it calls "below", torch's "autograd", the library ("ours"), or
            the library where there is a gradient of log-sum-exp too ("ours, dlse").
    """

    rows: int = 128
    width: int = 64
    causal: bool = False
    operands: str = "b h n d"
    out: str = "b n h d"
    grad: str = "b h n d"
    pad: float | None = math.inf
    way: str = "wrapped"

    @property
    def varied(self) -> str:
        """What differs from the first trial."""
        usual = _Trial()
        found = [each.name for each in fields(self) if getattr(self, each.name) != getattr(usual, each.name)]
        return ", ".join(f"{name} {getattr(self, name)}" for name in found) or "as usual"


_TRIALS = (
    _Trial(),
    *(_Trial(out="b h n d", rows=rows, causal=causal) for rows in (40, 128, 1024) for causal in (False, True)),
    *(_Trial(rows=rows, causal=causal) for rows in (40, 64, 1024) for causal in (False, True)),
    *(_Trial(width=width) for width in (16, 32, 128)),
    _Trial(operands="b n h d"),
    _Trial(operands="b n h d", out="b h n d"),
    _Trial(grad="b n h d"),
    _Trial(rows=40, pad=0.0),
    _Trial(rows=40, pad=None),
    *(_Trial(way="below", out=out) for out in ("b n h d", "b h n d")),
    *(_Trial(rows=rows, way=way) for way in ("autograd", "ours", "ours, dlse") for rows in (40, 128)),
)
Found: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def layouts(device: Device) -> dict[str, dict[str, str]]:
    """Trial -> dtype -> largest differences over largest values of output, log-sum-exp and gradients."""
    found: dict[str, dict[str, str]] = {}
    for trial in _TRIALS:
        of_trial = found.setdefault(trial.varied, {})
        for dtype in _DTYPES:
            try:
                text = " ".join(f"{each:.0e}" for each in _errors(trial, dtype, device))
            except Exception as error:  # a kernel that refuses
                text = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
            of_trial[str(dtype).removeprefix("torch.")] = text
    return found


def _errors(trial: _Trial, dtype: torch.dtype, device: Device) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, trial.rows, trial.width)
    made = [torch.randn(*shape, generator=generator).to(device.kind, dtype) for _ in range(4)]
    query, key, value = (_laid(each, trial.operands) for each in made[:3])
    band = Diagonals(1 - trial.rows, 0) if trial.causal else None
    block = Block(query, key, value, trial.width**-0.5, band=band)
    grad_lse = made[3][..., 0].float() if trial.way.endswith("dlse") else None
    with torch.no_grad():
        wanted = _wanted(block, made[3], grad_lse)
    found = _WAYS[trial.way](trial, block, _laid(made[3], trial.grad))
    return [_error(one, two) for one, two in zip(found, wanted, strict=True)]


def _laid(tensor: Tensor, axes: str) -> Tensor:
    """The same numbers, in memory as those axes say."""
    return tensor.contiguous() if axes == "b h n d" else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _output(tensor: Tensor, axes: str) -> Tensor:
    """The same with as much memory behind it, so that a kernel that takes other strides for granted reads zeros."""
    laid = _laid(tensor, axes)
    room = laid.new_zeros(2 * laid.numel())
    return room.as_strided(laid.shape, laid.stride()).copy_(laid)


def _wanted(block: Block, grad: Tensor, grad_lse: Tensor | None) -> Found:
    wide = replace(block, query=block.query.double(), key=block.key.double(), value=block.value.double())
    out, lse = plain_forward(wide)
    back = plain_backward(wide, Upstream(grad.double(), None if grad_lse is None else grad_lse.double(), out, lse))
    return out, lse, back.query, back.key, back.value


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted).abs().max() / wanted.abs().max())


def _wrapped(trial: _Trial, block: Block, grad: Tensor) -> Found:
    given = (block.query, block.key, block.value)
    options = {"scale": block.scale}
    with torch.no_grad():
        out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(
            *given, None, True, 0.0, block.causal, **options
        )
        lse = _padded(lse, trial)
        back = _aten._scaled_dot_product_efficient_attention_backward(
            grad, *given, None, _output(out, trial.out), lse, seed, offset, 0.0,
            [True, True, True, False], block.causal, **options,
        )  # fmt: skip
    return out, lse[..., : trial.rows], back[0], back[1], back[2]


def _padded(lse: Tensor, trial: _Trial) -> Tensor:
    if trial.pad is None:
        return lse
    return functional.pad(lse[..., : trial.rows], (0, -trial.rows % 32), value=trial.pad)


def _below(trial: _Trial, block: Block, grad: Tensor) -> Found:
    """The operators that the others call; all is [batch, n, heads, d] there."""
    query, key, value = (each.transpose(1, 2) for each in (block.query, block.key, block.value))
    with torch.no_grad():
        out, lse, seed, offset, _, _ = _aten._efficient_attention_forward(
            query, key, value, None, None, None, None, None, 0.0, int(block.causal), True, scale=block.scale
        )
        read = _output(out.transpose(1, 2), trial.out).transpose(1, 2)
        back = _aten._efficient_attention_backward(
            grad.transpose(1, 2), query, key, value, None, read, None, None, trial.rows, trial.rows, lse, 0.0,
            seed, offset, int(block.causal), False, scale=block.scale,
        )  # fmt: skip
    out, *gradients = (each.transpose(1, 2) for each in (out, *back[:3]))
    return out, lse[..., : trial.rows], gradients[0], gradients[1], gradients[2]


def _autograd(trial: _Trial, block: Block, grad: Tensor) -> Found:
    given = [each.detach().requires_grad_() for each in (block.query, block.key, block.value)]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = functional.scaled_dot_product_attention(*given, is_causal=block.causal, scale=block.scale)
    query, key, value = torch.autograd.grad(out, given, grad)
    return out, plain_forward(block).lse.detach(), query, key, value


def _ours(trial: _Trial, block: Block, grad: Tensor) -> Found:
    kernel = FUSED[block.query.device.type][-1]
    with torch.no_grad():
        out, lse = fused_forward(kernel, block)
        grad_lse = grad[..., 0].float() if trial.way.endswith("dlse") else None
        back = fused_backward(kernel, block, Upstream(grad, grad_lse, out.contiguous(), lse))
    return out, lse, back.query, back.key, back.value


_WAYS: dict[str, Callable[[_Trial, Block, Tensor], Found]] = {
    "wrapped": _wrapped,
    "below": _below,
    "autograd": _autograd,
    "ours": _ours,
    "ours, dlse": _ours,
}


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    names = [str(each).removeprefix("torch.") for each in _DTYPES]
    trials = {trial: each for trial, each in found.items() if isinstance(each, dict)}
    rows = [[f"memory-efficient kernel: {' '.join(_NAMES)}", *names]]
    return aligned([*rows, *([trial, *(each.get(name, "") for name in names)] for trial, each in trials.items())])
