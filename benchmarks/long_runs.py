"""Steps of one policy on sequences of any length: what they take of memory, and how long."""

import time
from dataclasses import dataclass, field

import torch

from benchmarks.device import Device
from benchmarks.long_models import POLICIES, Model, Step
from benchmarks.sections import Sections

__all__ = ["SLOW_S", "SLOW_TRIES", "Run", "Setting"]

_BUDGET_BYTES = 4 << 30
SLOW_S, SLOW_TRIES = 3.0, 3


@dataclass
class Setting:
    """What all runs have in common.

    Args:
        device: that they run on.
        model: its sizes.
        budget_bytes: that the longest sequence has to fit into.
        probes: lengths that are tried first.
        probes_of_scores: likewise where all scores of a head, or those of all positions and tokens, exist at once.
        lengths: of step times.
        most: the longest that is tried.
    """

    device: Device
    model: Model = field(default_factory=Model)
    budget_bytes: int = _BUDGET_BYTES
    probes: tuple[int, int] = (8192, 16384)
    probes_of_scores: tuple[int, int] = (2048, 4096)
    lengths: tuple[int, int] = (32768, 131072)
    most: int = 262144

    @classmethod
    def of(cls, sections: Sections) -> "Setting":
        """As the command line asks."""
        if not sections.tiny:
            return cls(sections.device)
        small = Model(hidden=64, layers=2, heads=2, intermediate=128, vocabulary=512)
        return cls(sections.device, small, 7 << 20, (128, 192), (64, 96), (128, 192), 768)


class Run:
    """Steps of one policy on sequences of any length."""

    def __init__(self, policy: str, setting: Setting) -> None:
        self.seconds: dict[int, float] = {}
        self.slow_tries = 0
        self.own_bytes = 0
        self._policy = policy
        self._setting = setting
        self._length = 0
        self._sizes: dict[str, int] = {}
        self._step: Step | None = None

    def step(self, length: int) -> Step:
        """One step."""
        policy, device = POLICIES[self._policy], self._setting.device
        if self._step is None or policy.sizes(length) != self._sizes:
            self.close()
            before_bytes = _allocated(device)
            self._length, self._sizes = length, policy.sizes(length)
            self._step = policy.step(
                self._setting.model, length=lambda: self._length, device=device.kind, dtype=torch.bfloat16
            )
            self._length = self._setting.probes_of_scores[0] // 4
            self._step()  # makes the optimizer's states
            self.own_bytes = _allocated(device) - before_bytes
        made = self._step

        def step() -> object:
            self._length = length
            return made()

        return step

    def peak(self, length: int) -> int | None:
        """Bytes in use at most, parameters and optimizer included; None where the memory does not suffice."""
        setting = self._setting
        start_s = time.monotonic()
        try:
            step = self.step(length)
            setting.device.clear()
            start_s = time.monotonic()
            found = _peak(setting, step)
            self.seconds[length] = time.monotonic() - start_s
        except torch.OutOfMemoryError:
            self.close()  # what it left behind is not to count
            found = setting.budget_bytes + 1
        self.slow_tries += time.monotonic() - start_s > SLOW_S
        return found if found <= setting.budget_bytes else None

    def expected_s(self, length: int) -> float:
        """Of a step, by the two longest that ran: a part that grows with length, one with its square."""
        if len(self.seconds) < 2:
            return 0.0
        short, long = sorted(self.seconds)[-2:]
        rates = [self.seconds[each] / each for each in (short, long)]
        slope = max(0.0, (rates[1] - rates[0]) / (long - short))
        return (rates[1] + slope * (length - long)) * length

    def close(self) -> None:
        """Gives back the model."""
        self._step = None
        self._setting.device.clear()


def _allocated(device: Device) -> int:
    return torch.cuda.memory_allocated() if device.is_gpu else 0


def _peak(setting: Setting, step: Step) -> int:
    if not setting.device.is_gpu:
        return setting.device.peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
