"""The longest sequence that trains in a given GPU memory, and step times at long ones, against torch and transformers.

A llama of 8 layers of width 512 and 32,000 tokens, in bfloat16, forward, backward and AdamW. Each side is taken at its
best policy of what is kept for backward. Step times are against flash attention with the inputs of layers kept (and, as
the lengths ask for it, the loss by rows under `torch.utils.checkpoint`).
`python -m benchmarks.gpu_context [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.device import Device, compared, timed
from benchmarks.long_models import POLICIES, SIDES, Model, Step
from benchmarks.longest import longest
from benchmarks.sections import Sections, aligned, asked

__all__ = ["main", "measure", "table"]

_PEER = "flash, layers checkpointed, loss by rows"
_BUDGET_BYTES = 2 << 30
_RATIO_LENGTHS = (32768, 131072)
_RATIO_S = 55.0  # kept back for step times


@dataclass
class _Setting:
    """What all runs have in common."""

    device: Device
    model: Model = field(default_factory=Model)
    budget_bytes: int = _BUDGET_BYTES
    probes: tuple[int, int] = (4096, 8192)
    probes_of_scores: tuple[int, int] = (512, 1024)
    lengths: tuple[int, ...] = _RATIO_LENGTHS

    @classmethod
    def of(cls, sections: Sections) -> "_Setting":
        """As the command line asks."""
        if not sections.tiny:
            return cls(sections.device)
        small = Model(hidden=64, layers=2, heads=2, intermediate=128, vocabulary=512)
        return cls(sections.device, small, 5 << 20, (128, 192), (64, 96), (128, 192))


class _Run:
    """Steps of one policy on sequences of any length."""

    def __init__(self, policy: str, setting: _Setting) -> None:
        self.seconds: dict[int, float] = {}
        self._policy = policy
        self._setting = setting
        self._length = 0
        self._step: Step | None = None

    def step(self, length: int) -> Step:
        """One step."""
        if self._step is None:
            kind = self._setting.device.kind
            self._step = POLICIES[self._policy].step(
                self._setting.model, length=lambda: self._length, device=kind, dtype=torch.bfloat16
            )
        made = self._step

        def step() -> object:
            self._length = length
            return made()

        return step

    def peak(self, length: int) -> int | None:
        """Bytes in use at most, parameters and optimizer included; None where the memory does not suffice."""
        setting = self._setting
        setting.device.clear()
        start_s = time.monotonic()
        try:
            found = _peak(setting, self.step(length))
        except torch.OutOfMemoryError:
            self._step = None  # what it left behind is not to count
            return None
        self.seconds[length] = time.monotonic() - start_s
        return found if found <= setting.budget_bytes else None

    def close(self) -> None:
        """Gives back the model."""
        self._step = None
        self._setting.device.clear()


def _peak(setting: _Setting, step: Step) -> int:
    if not setting.device.is_gpu:
        return setting.device.peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(sections: Sections) -> None:
    """All sections."""
    setting = _Setting.of(sections)
    found: dict[str, int] = {}
    for policy in POLICIES:
        made = sections.run(f"longest: {policy}", partial(_longest, policy, setting, sections))
        found[policy] = 0 if made is None else made["length"]
    best = {side: max(found[name] for name in names) for side, names in SIDES.items()}
    sections.run("context", partial(_ratios, best, setting))
    ours = [name for name in SIDES["ours"] if found[name]]
    lengths = dict.fromkeys(setting.lengths, ours)
    lengths.setdefault(best["ours"], [name for name in ours if found[name] == best["ours"]])
    runs = {name: _Run(name, setting) for name in (_PEER, *ours)}
    for number, (length, names) in enumerate(sorted(lengths.items())):
        limit_s = max(1.0, sections.left_s / (len(lengths) - number) / 2)
        each = {name: runs[name] for name in (_PEER, *names)}
        sections.run(f"step at {length}", partial(_times, each, length, setting, limit_s=limit_s))


def _limit(setting: _Setting) -> None:
    if setting.device.is_gpu:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting.budget_bytes / total_bytes)


def _free(setting: _Setting) -> None:
    if setting.device.is_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _longest(policy: str, setting: _Setting, sections: Sections) -> dict[str, Any]:
    """The longest sequence of one policy."""
    run = _Run(policy, setting)
    scores = policy.startswith("vanilla")

    def may_try(length: int) -> str | None:
        last = max(run.seconds, default=length)
        expected_s = run.seconds.get(last, 0.0) * (length / last) ** 2
        spare_s = sections.left_s - (0.0 if sections.tiny else _RATIO_S)
        return None if expected_s < spare_s else f"{length} positions would take {expected_s:.0f} s"

    _limit(setting)
    try:
        run.peak(setting.probes_of_scores[0])  # makes the optimizer's states
        search = longest(
            run.peak,
            setting.budget_bytes,
            probes=setting.probes_of_scores if scores else setting.probes,
            power=2 if scores else 1,
            may_try=may_try,
        )
    finally:
        run.close()
        _free(setting)
    return asdict(search) | {"length": search.length, "verified": search.verified, "seconds": run.seconds}


def _ratios(best: dict[str, int], setting: _Setting) -> dict[str, Any]:
    """Each side's longest sequence, and ours over it."""
    ours = best["ours"]
    over = {f"length_over_{name.replace(' ', '_').replace(',', '')}": ours / (each or 1) for name, each in best.items()}
    return {"budget_bytes": setting.budget_bytes, "length": best, **over}


def _times(runs: dict[str, _Run], length: int, setting: _Setting, *, limit_s: float) -> dict[str, Any]:
    """Step time and peak of each policy at one length, all memory allowed."""
    steps, missing, peaks = {}, {}, {}
    for name, run in runs.items():
        try:
            steps[name] = run.step(length)
            setting.device.clear()
            peaks[name] = setting.device.peak_bytes(steps[name])
        except torch.OutOfMemoryError as error:
            steps.pop(name, None)
            missing[name] = str(error).splitlines()[0]
            run.close()
    again = {f"{_PEER} again": steps[_PEER]} if length <= max(setting.lengths) else {}
    times = timed(steps | again, setting.device, limit_s=limit_s, warm=False)
    return compared(times, _PEER) | {"peak_bytes": peaks, "missing": missing}


def table(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    rows = [["", "longest", "next does not fit", "predicted", "peak MB there"]]
    steps = [["", "s a step", "to peer", "+-", "noise", "peak MB"]]
    lines = []
    for name, each in found["sections"].items():
        if "error" in each or "skipped" in each:
            lines.append(f"{name}: {each}\n")
        elif name.startswith("longest"):
            peaks = {int(size): peak for size, peak in {**each["probes"], **each["tried"]}.items() if peak is not None}
            peak = max(peaks.items(), default=(0, 0))[1]
            cells = (each["length"], each["verified"], round(each["predicted"]), round(peak / 1e6))
            rows.append([name, *map(str, cells)])
        elif name.startswith("step"):
            steps += _step_rows(name, each)
        else:
            lines.append("".join(f"{key}: {value}\n" for key, value in each.items()))
    return aligned(rows) + aligned(steps) + "".join(lines)


def _step_rows(name: str, each: dict[str, Any]) -> list[list[str]]:
    widths, noise = each.get("half_width", {}), each.get("noise")
    rows = []
    for policy, seconds in each["median_s"].items():
        ratio = f"{each['ratio'][policy]:.3f}" if policy in each["ratio"] else "1"
        beside = [f"{widths[policy]:.3f}" if policy in widths else "", "" if noise is None else f"{noise:.3f}"]
        peak = f"{each['peak_bytes'][policy] / 1e6:.0f}" if policy in each["peak_bytes"] else ""
        rows.append([f"{name}: {policy}", f"{seconds:.4f}", ratio, *beside, peak])
    return rows + [[f"{name}: {policy}", why, "", "", "", ""] for policy, why in each["missing"].items()]


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=120.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
