"""Layered accumulation on one GPU against one micro-batch after the other: step time, peak memory, equal losses.

A llama of half a billion parameters in bfloat16, 8 micro-batches; without an optimizer, since it is the same for all.
On one GPU there is nothing to hide, so what is measured is what the order costs, and what recomputing and host memory
save. `python -m benchmarks.gpu_layered [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import meshwright as mw
from benchmarks.device import Device, compared, timed
from benchmarks.long_models import Model, build
from benchmarks.sections import Sections, aligned, asked

__all__ = ["main", "measure", "table"]

_MICROBATCHES = 8
_BASE = "accumulate"
_RECOMPUTE: dict[str, Any] = {"schedule": "layered", "recompute": "blocks"}

ORDERS: dict[str, dict[str, Any]] = {
    _BASE: {},
    "layered": {"schedule": "layered"},
    "layered, groups of 2": {"schedule": "layered", "group_size": 2},
    "layered, recomputed": _RECOMPUTE,
    "layered, recomputed, inputs in host memory": {**_RECOMPUTE, "offload_inputs": True},
    "one by one, recomputed": {**_RECOMPUTE, "group_size": 1},
    "one by one, recomputed, inputs in host memory": {**_RECOMPUTE, "group_size": 1, "offload_inputs": True},
}
"""Options of `parallelize` by name."""


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
    """All sections."""
    trial = _Trial(_Sizes.of(sections), sections.device)
    for name, options in ORDERS.items():
        sections.run(name, partial(trial.first, name, options))
    limit_s = max(1.0, min(30.0, sections.left_s * 0.7))
    sections.run("times", partial(trial.times, limit_s=limit_s))


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
        self._wrapped: dict[str, mw.ParallelModel] = {}
        self._loss = 0.0
        self._gradients: list[Tensor] = []

    def first(self, name: str, options: dict[str, Any]) -> dict[str, Any]:
        """Peak memory of a step of one order, and its loss and gradients against those of the first order."""
        module = build(self._sizes.model, attention="sdpa", device=self._device.kind, dtype=torch.bfloat16)
        model = mw.parallelize(module, mw.Mesh(), num_microbatches=_MICROBATCHES, **options)
        loss = float(model.step(self._batch))
        gradients = [each.grad for each in module.parameters() if each.grad is not None]
        if not self._gradients:
            self._loss, self._gradients = loss, [each.cpu() for each in gradients]
        apart = max(_error(one, two) for one, two in zip(gradients, self._gradients, strict=True))
        del gradients
        module.zero_grad()
        peak_bytes = self._device.peak_bytes(lambda: model.step(self._batch))
        module.zero_grad()
        self._wrapped[name] = model
        return {
            "loss": loss,
            "loss_differs": abs(loss - self._loss),
            "gradients_differ": apart,
            "parameters": sum(each.numel() for each in module.parameters()),
            "peak_above_parameters_bytes": peak_bytes,
        }

    def times(self, *, limit_s: float) -> dict[str, Any]:
        """Step times in turn, and tokens per second."""
        steps = {name: partial(model.step, self._batch) for name, model in self._wrapped.items()}
        found = compared(timed(steps | {f"{_BASE} again": steps[_BASE]}, self._device, limit_s=limit_s), _BASE)
        tokens = self._batch["input_ids"].numel()
        return found | {"tokens_per_s": {name: tokens / each for name, each in found["median_s"].items()}}


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
            lines += [f"{name}: {each}\n"] if "median_s" not in each else []
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
