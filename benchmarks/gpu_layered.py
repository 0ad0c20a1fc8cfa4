"""Layered accumulation on one GPU against one micro-batch after the other: step time, peak memory, equal losses.

A llama of half a billion parameters in bfloat16, 8 micro-batches; without an optimizer, since it is the same for all.
On one GPU there is nothing to hide, so what is measured is what the order costs, and what recomputing and host memory
save; a loop of torch alone with layers checkpointed stands beside it.
`python -m benchmarks.gpu_layered [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from benchmarks.device import Device, compared, timed
from benchmarks.long_models import Model, build
from benchmarks.sections import Sections, aligned, asked

__all__ = ["main", "measure", "table"]

_MICROBATCHES = 8
_BASE = "accumulate"
_PLAIN = "torch, layers checkpointed"
_RECOMPUTE: dict[str, Any] = {"schedule": "layered", "recompute": "blocks"}

ORDERS: dict[str, dict[str, Any]] = {
    _BASE: {},
    _PLAIN: {},
    "layered": {"schedule": "layered"},
    "layered, groups of 2": {"schedule": "layered", "group_size": 2},
    "layered, recomputed": _RECOMPUTE,
    "layered, recomputed, inputs in host memory": {**_RECOMPUTE, "offload_inputs": True},
    "one by one, recomputed": {**_RECOMPUTE, "group_size": 1},
    "one by one, recomputed, inputs in host memory": {**_RECOMPUTE, "group_size": 1, "offload_inputs": True},
}
"""Options of `parallelize` by name; of none is the loop of torch alone, with the inputs of layers kept."""
_TIMED = (_BASE, "layered, recomputed", "layered, recomputed, inputs in host memory", _PLAIN)


@dataclass(frozen=True)
class _Sizes:
    model: Model
    samples: int
    length: int

    @classmethod
    def of(cls, sections: Sections) -> "_Sizes":
        """As the command line asks."""
        if sections.tiny:
            return cls(Model(hidden=64, layers=3, heads=2, intermediate=128, vocabulary=256), 8, 64)
        return cls(Model(hidden=1536, layers=16, heads=12, intermediate=4096, vocabulary=32000), 16, 1024)


def measure(sections: Sections) -> None:
    """All sections; step times first, and peaks of what was not timed last."""
    trial = _Trial(_Sizes.of(sections), sections.device)
    for name in _TIMED:
        sections.run(f"first step: {name}", partial(trial.first, name))
    sections.run("times", partial(trial.times, limit_s=max(1.0, min(10.0, sections.left_s / 2))))
    for name in (*_TIMED, *(name for name in ORDERS if name not in _TIMED)):
        sections.run(name, partial(trial.compared, name), needs_s=0.0 if sections.tiny else 2.0)


class _Trial:
    """The orders, on the same values.

    Args:
        sizes: of the model and its batch.
        device: that it is on.
    """

    def __init__(self, sizes: _Sizes, device: Device) -> None:
        self._sizes = sizes
        self._device = device
        self._batch = _batch(sizes, device)
        self._made: dict[str, tuple[nn.Module, Callable[[], Any]]] = {}
        self._loss = 0.0
        self._gradients: list[Tensor] = []

    def first(self, name: str) -> dict[str, Any]:
        """A first step, in which kernels are chosen."""
        module, step = self._make(name)
        start_s = time.monotonic()
        loss = float(step())
        module.zero_grad()
        return {"first_s": time.monotonic() - start_s, "first_loss": loss}

    def times(self, *, limit_s: float) -> dict[str, Any]:
        """Step times in turn, and tokens per second."""
        steps = {name: partial(_cleared, module, step) for name, (module, step) in self._made.items()}
        found = compared(timed(steps | {f"{_BASE} again": steps[_BASE]}, self._device, limit_s=limit_s), _BASE)
        tokens = self._batch["input_ids"].numel()
        return found | {"tokens_per_s": {name: tokens / each for name, each in found["median_s"].items()}}

    def compared(self, name: str) -> dict[str, Any]:
        """Peak memory of a step of one order, and its loss and gradients against those of the first order."""
        module, step = self._make(name)
        loss = float(step())
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        if not self._gradients:
            self._loss, self._gradients = loss, [each.clone() for each in gradients]
        apart = max(_error(one, two) for one, two in zip(gradients, self._gradients, strict=True))
        del gradients
        module.zero_grad()
        peak_bytes = self._device.peak_bytes(step)
        self._made.pop(name)
        return {
            "loss": loss,
            "loss_differs": abs(loss - self._loss),
            "gradients_differ": apart,
            "parameters": sum(each.numel() for each in module.parameters()),
            "peak_above_parameters_bytes": peak_bytes,
        }

    def _make(self, name: str) -> tuple[nn.Module, Callable[[], Any]]:
        """The model under one order, and its step."""
        if name not in self._made:
            module = build(self._sizes.model, attention="sdpa", device=self._device.kind, dtype=torch.bfloat16)
            if name == _PLAIN:
                module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
                self._made[name] = (module, partial(_one_by_one, module, self._batch))
            else:
                model = mw.parallelize(module, mw.Mesh(), num_microbatches=_MICROBATCHES, **ORDERS[name])
                self._made[name] = (module, partial(model.step, self._batch))
        return self._made[name]


def _cleared(module: nn.Module, step: Callable[[], Any]) -> None:
    step()
    module.zero_grad()


def _one_by_one(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a loop without this library does; micro-batches are of one size."""
    loss = torch.zeros((), device=batch["input_ids"].device)
    for tokens in batch["input_ids"].chunk(_MICROBATCHES):
        part = module(input_ids=tokens, labels=tokens).loss / _MICROBATCHES
        part.backward()
        loss += part.detach()
    return loss


def _batch(sizes: _Sizes, device: Device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, sizes.model.vocabulary, (sizes.samples, sizes.length), generator=generator)
    return {"input_ids": tokens.to(device.kind), "labels": tokens.to(device.kind)}


def _error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.to(found.device).float()
    return float((found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def table(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    sections = found["sections"]
    times = sections.get("times", {})
    rows = [["", "peak MB", "loss differs", "gradients differ", "ms a step", "ratio", "+-", "noise", "tokens/s"]]
    lines = []
    for name, each in sections.items():
        if "loss" not in each:
            lines += [f"{name}: {each}\n"] if "median_s" not in each and "first_s" not in each else []
            continue
        cells = [f"{each['peak_above_parameters_bytes'] / 1e6:.0f}", f"{each['loss_differs']:.1e}"]
        rows.append([name, *cells, f"{each['gradients_differ']:.1e}", *_timed_cells(name, times)])
    return aligned(rows) + "".join(lines)


def _timed_cells(name: str, times: dict[str, Any]) -> list[str]:
    seconds = times.get("median_s", {}).get(name)
    if seconds is None:
        return [""] * 5
    ratio, width = times["ratio"].get(name, 1.0), times.get("half_width", {}).get(name)
    beside = ["" if each is None else f"{each:.3f}" for each in (width, times.get("noise"))]
    return [f"{seconds * 1e3:.1f}", f"{ratio:.3f}", *beside, f"{times['tokens_per_s'][name]:.0f}"]


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=60.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
