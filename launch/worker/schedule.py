"""The learning rate of a step: linear warm-up, then cosine or constant."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

__all__ = ["LearningRate"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Learning rate as a function of the step alone, steps counted from 1.

    Args:
        peak: rate at the end of the warm-up.
        steps: optimizer steps of the whole run.
        warmup_steps: steps of the linear rise; the last of them runs at `peak`.
        decay: "cosine" falls to `min_ratio * peak` at the last step (Loshchilov and Hutter, arXiv 1608.03983, eq. 5,
            without restarts), "constant" stays.
        min_ratio: smallest rate as a share of `peak`.
    """

    peak: float
    steps: int
    warmup_steps: int = 0
    decay: Literal["cosine", "constant"] = "cosine"
    min_ratio: float = 0.0

    def at(self, step: int) -> float:
        """Rate used by a step, 1 <= step <= steps.

        >>> rate = LearningRate(peak=1.0, steps=12, warmup_steps=2, min_ratio=0.1)
        >>> [round(rate.at(step), 2) for step in (1, 2, 7, 12)]
        [0.5, 1.0, 0.55, 0.1]
        """
        if step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + cos(pi * min(1.0, done))))
