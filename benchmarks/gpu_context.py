"""The longest sequence that trains in a given GPU memory, and step times at long ones, against torch and transformers.

A llama of 8 layers of width 512 and 32,000 tokens, in bfloat16, forward, backward and AdamW. Each side is taken at its
best policy of what is kept for backward. Step times are against flash attention with the inputs of layers kept, and the
loss by rows under `torch.utils.checkpoint`.
`python -m benchmarks.gpu_context [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.device import compared, timed
from benchmarks.long_models import SIDES
from benchmarks.long_runs import SLOW_S, SLOW_TRIES, Run, Setting
from benchmarks.longest import longest
from benchmarks.sections import Sections, aligned, asked

__all__ = ["main", "measure", "table"]

_PEER = "flash, layers checkpointed, loss by rows"
_HOST = "ours, layers recomputed by spans, inputs in host memory"
_BASELINES = ("vanilla, layers checkpointed", "flash, layers checkpointed", _PEER)
_RATIOS = ("ours", "ours, layers by spans", "ours, layers recomputed")


def measure(sections: Sections) -> None:
    """All sections; those that the others build on first."""
    setting = Setting.of(sections)
    trial = _Trial(sections, setting)
    for policy in _BASELINES:
        trial.search(policy, left_s=70.0)
    trial.times(setting.lengths[0], limit_s=8.0)
    trial.search(_HOST, left_s=32.0)
    trial.search("ours, layers recomputed by spans", left_s=28.0)
    trial.ratios()
    trial.times(setting.lengths[1], limit_s=min(10.0, sections.left_s - 25.0))
    trial.search("ours, layers by spans", left_s=10.0)
    trial.ratios()
    peer = trial.longest[_PEER]
    if peer and peer not in setting.lengths:
        trial.times(peer, limit_s=sections.left_s / 2)
        trial.ratios()


class _Trial:
    """What was found so far.

    Args:
        sections: that note it.
        setting: of all runs.
    """

    def __init__(self, sections: Sections, setting: Setting) -> None:
        self.longest: dict[str, int] = {}
        self._sections = sections
        self._setting = setting
        self._runs = {name: Run(name, setting) for name in (_PEER, *_RATIOS)}
        self._steps: dict[int, dict[str, Any]] = {}

    def search(self, policy: str, *, left_s: float) -> None:
        """The longest sequence of a policy, in what time there is but for `left_s`."""
        for run in self._runs.values():
            run.close()  # their models would count
        find = partial(_longest, policy, self._setting, self._sections, left_s=left_s)
        made = self._sections.run(f"longest: {policy}", find)
        self.longest[policy] = 0 if made is None else made["length"]

    def times(self, length: int, *, limit_s: float) -> None:
        """Step times at a length."""
        measure = partial(_times, self._runs, length, self._setting, limit_s=limit_s)
        made = self._sections.run(f"step at {length}", measure)
        if made is not None:
            self._steps[length] = made

    def ratios(self) -> None:
        """Each side's longest sequence, ours over it, and our best step time over the peer's."""
        best = {side: max(self.longest.get(name, 0) for name in names) for side, names in SIDES.items()}
        over = {_key(side): best["ours"] / (each or 1) for side, each in best.items() if side != "ours"}
        budget = {"budget_bytes": self._setting.budget_bytes}
        steps = {
            f"{name}_{length}": each[name] for length, each in self._steps.items() for name in _BEST if name in each
        }
        self._sections.run("context", lambda: {**budget, "length": best, **over, **steps})


_BEST = ("step_ratio", "step_ratio_within_peer_memory")


def _key(side: str) -> str:
    return f"length_over_{side.replace(' ', '_').replace(',', '')}"


def _limit(setting: Setting) -> None:
    if setting.device.is_gpu:
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(setting.budget_bytes / total_bytes)


def _free(setting: Setting) -> None:
    if setting.device.is_gpu:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _longest(policy: str, setting: Setting, sections: Sections, *, left_s: float) -> dict[str, Any]:
    """The longest sequence of one policy."""
    run = Run(policy, setting)
    whole = policy in _BASELINES and policy != _PEER
    spare_s = 0.0 if sections.tiny else left_s

    def may_try(length: int) -> str | None:
        expected_s = run.expected_s(length)
        if length > setting.most:
            return f"longer than {setting.most} is not tried"
        if run.slow_tries >= SLOW_TRIES:
            return f"{run.slow_tries} tries took more than {SLOW_S:.0f} s"
        fits = expected_s < sections.left_s - spare_s
        return None if fits else f"{length} positions would take {expected_s:.0f} s"

    _limit(setting)
    try:
        probes = setting.probes_of_scores if whole else setting.probes
        power = 2 if policy.startswith("vanilla") else 1
        search = longest(run.peak, setting.budget_bytes, probes=probes, power=power, may_try=may_try)
    finally:
        run.close()
        _free(setting)
    return asdict(search) | {"length": search.length, "verified": search.verified, "seconds": run.seconds}


def _times(runs: dict[str, Run], length: int, setting: Setting, *, limit_s: float) -> dict[str, Any]:
    """Step time and peak of each policy at one length, all memory allowed."""
    steps, missing, peaks = {}, {}, {}
    for name, run in runs.items():
        try:
            steps[name] = run.step(length)
            setting.device.clear()
            peaks[name] = setting.device.peak_bytes(steps[name]) + run.own_bytes
        except torch.OutOfMemoryError as error:
            steps.pop(name, None)
            missing[name] = str(error).splitlines()[0]
            run.close()
    again = {f"{_PEER} again": steps[_PEER]}
    times = timed(steps | again, setting.device, limit_s=limit_s, warm=False)
    found = compared(times, _PEER) | {"peak_bytes": peaks, "missing": missing}
    ours = {name: found["ratio"][name] for name in _RATIOS if name in found["ratio"]}
    small = [ratio for name, ratio in ours.items() if peaks[name] <= peaks[_PEER]]
    best = {"step_ratio": min(ours.values())} if ours else {}
    return found | best | ({"step_ratio_within_peer_memory": min(small)} if small else {})


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
