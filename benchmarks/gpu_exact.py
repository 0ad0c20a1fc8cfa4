"""How exact attention by blocks is on a device, which kernels it trusts there, what its plans should reckon with."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Device, timed
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.block import Allowed, Block, Upstream
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.fused import Kernel, fused_backward, fused_forward
from meshwright.parallel.blockwise.kernels import agrees, block_backward, block_forward
from meshwright.parallel.blockwise.masks import Mask, causal, documents, window
from meshwright.parallel.blockwise.plain import plain_backward, plain_forward
from meshwright.parallel.blockwise.torch_kernels import FUSED

__all__ = ["costs", "errors", "text", "trusted"]

_HEADS, _WIDTH = 4, 64


def trusted(device: Device) -> dict[str, Any]:
    """Kernel, dtype and heads per key head -> whether it is trusted; where it is not, why."""
    found: dict[str, Any] = {}
    for kernel in FUSED[device.kind]:
        for dtype in kernel.dtypes:
            for heads in (1, 2):
                name = f"{kernel.name} {str(dtype).removeprefix('torch.')} {heads} heads a key head"
                good = agrees(kernel, dtype, torch.device(device.kind), heads=heads)
                found[name] = True if good else _differences(kernel, dtype, device, heads=heads)
    return found


def _differences(kernel: Kernel, dtype: torch.dtype, device: Device, *, heads: int) -> dict[str, str]:
    """Of a whole, a causal and a masked block: the error, or largest differences over largest values, by result."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 2 * heads, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16), (2, 2 * heads, 40, 16))
    query, key, value, grad = (torch.randn(*each, generator=generator).to(device.kind, dtype) for each in sizes)
    found = {}
    band = Allowed(Diagonals(-30, 5).tensor(40, 40, query.device))
    blocks: dict[str, dict[str, Any]] = {"whole": {}, "causal": {"causal": True}, "masked": {"allowed": band}}
    for name, options in blocks.items():
        block = Block(query, key, value, 0.25, **options)
        try:
            ours = plain_forward(block)
            upstream = Upstream(grad, grad[..., 0].float(), ours.out.to(dtype), ours.lse)
            theirs = [*fused_forward(kernel, block), *fused_backward(kernel, block, upstream)[:3]]
            plain = [*ours, *plain_backward(block, upstream)[:3]]
            found[name] = " ".join(f"{_error(one, two):.0e}" for one, two in zip(theirs, plain, strict=True))
        except Exception as error:  # what `agrees` takes for a no
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max())


def _features(length: int, device: Device) -> dict[str, dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(1, _HEADS, length, length, generator=generator).to(device.kind)
    packed = causal() & documents(torch.bucketize(torch.arange(length), torch.tensor([length // 5, length // 2])))
    return {
        "whole": {},
        "causal": {"mask": causal()},
        "window": {"mask": causal() & window(length // 10)},
        "documents": {"mask": packed},
        "grouped": {"mask": causal(), "kv_heads": 2},
        "bias": {"mask": causal(), "bias": bias},
        "softcap": {"mask": causal(), "softcap": 5.0},
        "sinks": {"mask": causal(), "sinks": bias[0, :, 0, 0]},
    }


def errors(device: Device, *, length: int) -> dict[str, Any]:
    """Feature -> dtype -> largest error of output and gradients against float64, and what dropout keeps to."""
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found: dict[str, Any] = {"dropout": _dropout(device, length)}
    for name, options in _features(length, device).items():
        of = partial(_of, device, length, options)
        found[name] = {str(each).removeprefix("torch."): _try(partial(of, dtype=each)) for each in dtypes}
        found[name]["float32, small blocks"] = _try(partial(of, dtype=torch.float32, query_block=70, kv_block=50))
    return found


def _try(measure: Callable[[], float]) -> float | str:
    try:
        return measure()
    except Exception as error:  # the other cells still say something
        return f"{type(error).__name__}: {str(error)[:300]}"


def _given(device: Device, dtype: torch.dtype, *, length: int, kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, each, length, _WIDTH) for each in (_HEADS, kv_heads, kv_heads))
    return [torch.randn(*each, generator=generator).to(device.kind, dtype).requires_grad_() for each in sizes]


def _of(device: Device, length: int, options: dict[str, Any], *, dtype: torch.dtype, **blocks: int) -> float:
    options = dict(options)
    given = _given(device, dtype, length=length, kv_heads=options.pop("kv_heads", _HEADS))
    wide = [each.detach().double().requires_grad_() for each in given]
    grad = torch.linspace(-1, 1, given[0].numel(), device=device.kind).reshape(given[0].shape)
    call: Any = attend
    out, plain = call(*given, **options, **blocks), _plain(wide, options)
    back = torch.autograd.grad(out, given, grad.to(dtype))
    wanted = torch.autograd.grad(plain, wide, grad.to(dtype).double())
    return max(_error(one, two) for one, two in zip((out, *back), (plain, *wanted), strict=True))


def _plain(given: list[Tensor], options: dict[str, Any]) -> Tensor:
    """All scores at once, by the book."""
    query, key, value = given
    times = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(times, 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if "softcap" in options:
        scores = options["softcap"] * (scores / options["softcap"]).tanh()
    if "bias" in options:
        scores = scores + options["bias"]
    mask: Mask | None = options.get("mask")
    if mask is not None:
        pairs = mask.block(range(query.shape[2]), range(key.shape[2]))
        assert isinstance(pairs, Tensor), pairs
        scores = scores.masked_fill(~pairs.to(scores.device), -torch.inf)
    if "sinks" in options:
        column = options["sinks"].to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weighted: Tensor = scores.softmax(-1)[..., : key.shape[2]] @ value
    return weighted


def _dropout(device: Device, length: int) -> dict[str, Any]:
    """The same bits twice; differences by block size, and from a CPU."""
    given = _given(device, torch.float32, length=length, kv_heads=_HEADS)
    options: Any = {"mask": causal(), "dropout_p": 0.2, "dropout_seed": 3}
    with torch.no_grad():
        once = attend(*given, **options)
        blocks = attend(*given, **options, query_block=64, kv_block=48)
        there = attend(*(each.cpu() for each in given), **options)
        return {
            "same bits twice": bool((attend(*given, **options) == once).all()),
            "by block size": _error(blocks, once),
            "from a CPU": _error(once.cpu(), there),
        }


def costs(device: Device, *, length: int) -> dict[str, float]:
    """What plans reckon with, forward and backward together, in pairs of one head of width 64.

    `call` is what a call costs besides its pairs, `masked` what a pair costs under a mask.
    """
    small, large = _block(device, 64), _block(device, length)
    band = Allowed(Diagonals(1 - length, length // 2).tensor(length, length, small.query.device))
    masked = replace(large, allowed=band)
    timing = {"small": small, "large": large, "masked": masked, "causal": replace(large, causal=True)}
    times = timed({name: partial(_both, each) for name, each in timing.items()}, device, limit_s=2.0)
    middle = {name: median(each) for name, each in times.items()}
    pair_s = middle["large"] / (large.query.shape[1] * length**2)
    found = {"pair_s": pair_s, "call": middle["small"] / pair_s, "masked": middle["masked"] / middle["large"]}
    return found | {"causal": middle["causal"] / middle["large"]}


def _block(device: Device, length: int) -> Block:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 16, length, _WIDTH, generator=generator).to(device.kind, torch.bfloat16) for _ in range(3)
    )
    return Block(query, key, value, _WIDTH**-0.5)


def _both(block: Block) -> None:
    with torch.no_grad():
        out, lse = block_forward(block)
        block_backward(block, Upstream(block.query, None, out, lse), with_bias=False)


def text(sections: dict[str, Any]) -> str:
    """What was found of kernels, costs and errors."""
    kernels = sections.get("kernels") or {}
    lines = [f"trusted: {'; '.join(name for name, why in kernels.items() if why is True)}"]
    lines += [f"not trusted: {name}: {why}" for name, why in kernels.items() if why is not True]
    lines += [f"{name}: {_short(value)}" for name, value in (sections.get("exactness") or {}).items()]
    return "\n".join([*lines, f"costs: {_short(sections.get('costs'))}"]) + "\n"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    return f"{value:.1e}" if isinstance(value, float) else str(value)
