"""How long a sequence trains in a given memory, against torch and transformers, and what a step costs there; on a CPU.

A llama of width 512 with 8 heads and 8 layers in float32, forward, backward and AdamW; each side at its best policy of
what is kept for backward. Peaks are counted by running the code on tensors without values, and measured where it runs
in reasonable time. The closed form says what a layer keeps in units of positions x width; how many scores of all pairs
and heads are alive at once is counted. Step times are CPU seconds of one thread, of a quarter of layers and tokens.
`python -m benchmarks.context [--json] [--budget GiB] [--measured N,...] [--timed N,...] [--rounds N]`
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.counted import counted_peak_bytes
from benchmarks.long_models import POLICIES, SIDES, Model, Step, build
from benchmarks.longest import longest
from benchmarks.memory import measured_peak_bytes
from benchmarks.sections import aligned
from benchmarks.timing import alternate, noise_of, ratio_of

__all__ = ["main", "measure", "table"]

_PEER = "flash, layers checkpointed, loss by rows"
_KEPT = {
    "vanilla, layers checkpointed": 1.0,
    "flash, layers checkpointed": 1.0,
    _PEER: 1.0,
    "ours, layers by spans": 2.0,
    "ours, layers recomputed by spans": 1.0,
}
"""Policies, and what of a layer's positions x width each keeps by its closed form."""
_TIMED = (_PEER, "ours", "ours, layers by spans", "ours, layers recomputed")
_SHORT = 64
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Asked:
    """What to measure.

    Args:
        budget_bytes: that a step has to fit into, optimizer states included.
        measured: lengths at which peaks are measured too.
        timed: lengths of step times.
        rounds: of step times.
        model: its sizes.
        timed_model: the sizes of the one that is timed.
    """

    budget_bytes: int = 24 << 30
    measured: tuple[int, ...] = (1024, 2048)
    timed: tuple[int, ...] = (2048, 8192)
    rounds: int = 12
    model: Model = field(default_factory=Model)
    timed_model: Model = field(default_factory=lambda: Model(layers=2, vocabulary=8000))


class _Run:
    """Steps of one policy on sequences of any length."""

    def __init__(self, policy: str, model: Model) -> None:
        self._policy = POLICIES[policy]
        self._model = model
        self._length = 0
        self._sizes: dict[str, int] | None = None
        self._step: Step | None = None

    @cached_property
    def module(self) -> nn.Module:
        """The model, not wrapped."""
        return build(self._model, attention=self._policy.attention, device="cpu", dtype=torch.float32)

    @property
    def states_bytes(self) -> int:
        """Of AdamW."""
        return sum(2 * each.numel() * _FLOAT_BYTES for each in self.module.parameters())

    def step(self, length: int) -> Step:
        """One step; wraps the model anew where sizes of blocks go with the length."""
        if self._sizes != self._policy.sizes(length):
            self.__dict__.pop("module", None)
            self._length, self._sizes = length, self._policy.sizes(length)
            self._step = self._policy.step_of(self.module, length=lambda: self._length)
            self._length = _SHORT
            self._step()  # makes the optimizer's states
        made = self._step
        assert made is not None, self._sizes

        def step() -> object:
            self._length = length
            return made()

        return step

    def counted(self, length: int) -> int:
        """Peak of a step at a length, AdamW's states included."""
        step = self.step(length)
        return counted_peak_bytes(self.module, step) + self.states_bytes

    def measured(self, length: int) -> int:
        """The same of a real step."""
        step = self.step(length)
        return measured_peak_bytes(self.module, step) + self.states_bytes

    def within(self, budget_bytes: int, length: int) -> int | None:
        """Peak of a step; None where it does not fit."""
        found = self.counted(length)
        return found if found <= budget_bytes else None


def measure(asked: Asked) -> dict[str, Any]:
    """Step times, peaks, and the longest sequences; what has values first, since what is cached may lose them then."""
    times = {length: _times(asked, length) for length in asked.timed}
    measured = {policy: {n: _Run(policy, asked.model).measured(n) for n in asked.measured} for policy in _KEPT}
    peaks = {policy: _peaks(policy, asked, of_policy) for policy, of_policy in measured.items()}
    found = {policy: _longest(policy, asked) for policy in _KEPT}
    best = {side: max(found[name]["length"] for name in names if name in found) for side, names in SIDES.items()}
    over = {f"length_over_{_key(side)}": best["ours"] / (best[side] or 1) for side in best if side != "ours"}
    ratios = {"step_ratio": {length: each["step_ratio"] for length, each in times.items()}}
    forms = {policy: _form(policy, asked.model) for policy in _KEPT}
    return {**over, **ratios, "length": best, "longest": found, "peaks": peaks, "forms": forms, "times": times}


def _key(side: str) -> str:
    return side.replace(" ", "_").replace(",", "")


def _times(asked: Asked, length: int) -> dict[str, Any]:
    """CPU seconds of a step by policy in turn, the peer also against itself."""
    steps = {name: _Run(name, asked.timed_model).step(length) for name in _TIMED}
    steps |= {f"{_PEER} again": steps[_PEER]}
    seconds = alternate(steps, rounds=asked.rounds, steps=1, warmup=1, clock=time.process_time)
    ratios = {name: ratio_of(each, seconds[_PEER]) for name, each in seconds.items()}
    return {
        "median_s": {name: median(each) for name, each in seconds.items()},
        "ratio": {name: asdict(each) for name, each in ratios.items()},
        "step_ratio": min(ratios[name].median for name in _TIMED if name != _PEER),
        "noise": noise_of(seconds[f"{_PEER} again"], seconds[_PEER]) if asked.rounds > 1 else None,
    }


def _peaks(policy: str, asked: Asked, measured: dict[int, int]) -> dict[int, dict[str, float]]:
    """Counted and measured peaks by length."""
    run = _Run(policy, asked.model)
    counted = {length: run.counted(length) for length in measured}
    states_bytes = 2 * run.states_bytes  # and as much for parameters and gradients
    return {
        length: {
            "measured": each,
            "counted": counted[length],
            "ratio": counted[length] / each,
            "ratio_above_states": (counted[length] - states_bytes) / (each - states_bytes),
        }
        for length, each in measured.items()
    }


def _longest(policy: str, asked: Asked) -> dict[str, Any]:
    """The longest sequence of a policy by its counted peak."""
    run = _Run(policy, asked.model)
    scores = policy.startswith("vanilla")
    search = longest(
        partial(run.within, asked.budget_bytes),
        asked.budget_bytes,
        probes=(1024, 2048) if scores else (8192, 16384),
        power=2 if scores else 1,
        may_try=lambda length: None,
    )
    return asdict(search) | {"length": search.length, "verified": search.verified}


def _form(policy: str, model: Model) -> dict[str, float]:
    """Units kept per layer, and scores of all pairs alive at once, by counts, beside those of the closed form."""
    short, long = (1024, 2048) if policy.startswith("vanilla") else (16384, 32768)
    few = replace(model, layers=2, vocabulary=1000)
    more = replace(few, layers=4)
    by_layers = [[_Run(policy, each).counted(n) for n in (short, long)] for each in (few, more)]
    grows = [two - one for one, two in by_layers]
    unit_bytes = model.hidden * _FLOAT_BYTES * (long - short)
    bent = _Run(policy, few).counted(2 * long) - by_layers[0][1] - 2 * grows[0]
    pairs_bytes = model.heads * _FLOAT_BYTES * (4 * long**2 - long**2 - 2 * (long**2 - short**2))
    return {
        "units_per_layer": (grows[1] - grows[0]) / unit_bytes / (more.layers - few.layers),
        "closed": _KEPT[policy],
        "scores_alive": bent / pairs_bytes,
    }


def table(found: dict[str, Any]) -> str:
    """What was found, as text."""
    rows = [["", "longest", "next does not fit", "peak MB there", "units a layer", "closed form", "scores alive"]]
    for policy, each in found["longest"].items():
        form = found["forms"][policy]
        peak = max(filter(None, [*each["probes"].values(), *each["tried"].values()]), default=0)
        cells = [str(each["length"]), str(each["verified"]), f"{peak / 1e6:.0f}", f"{form['units_per_layer']:.2f}"]
        rows.append([policy, *cells, f"{form['closed']:.0f}", f"{form['scores_alive']:.2f}"])
    peaks = [["", "measured MB", "counted MB", "ratio", "above states"]]
    for policy, lengths in found["peaks"].items():
        for length, each in lengths.items():
            cells = [f"{each[name] / 1e6:.0f}" for name in ("measured", "counted")]
            cells += [f"{each[name]:.3f}" for name in ("ratio", "ratio_above_states")]
            peaks.append([f"{policy} at {length}", *cells])
    steps = [["", "CPU s a step", "to peer", "+-", "noise"]]
    for length, each in found["times"].items():
        for policy, ratio in each["ratio"].items():
            cells = [f"{each['median_s'][policy]:.2f}", f"{ratio['median']:.3f}", f"{ratio['half_width']:.3f}"]
            steps.append([f"{policy} at {length}", *cells, "" if each["noise"] is None else f"{each['noise']:.3f}"])
    over = "".join(f"{name}: {found[name]:.1f}\n" for name in found if name.startswith("length_over"))
    return "\n".join([aligned(rows), aligned(peaks), aligned(steps), f"{over}step_ratio: {found['step_ratio']}\n"])


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(",") if each)


def main() -> None:
    """Measures and prints."""
    usual = Asked()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--budget", type=int, default=usual.budget_bytes >> 30, metavar="GiB")
    parser.add_argument("--measured", type=_lengths, default=usual.measured, metavar="N,...")
    parser.add_argument("--timed", type=_lengths, default=usual.timed, metavar="N,...")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    torch.set_num_threads(1)
    given = parser.parse_args()
    found = measure(Asked(given.budget << 30, given.measured, given.timed, given.rounds))
    sys.stdout.write(json.dumps(found) + "\n" if given.json else table(found))


if __name__ == "__main__":
    main()
