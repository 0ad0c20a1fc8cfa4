"""What a job on paper comes to: time, memory, whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from meshwright.clusters.simulated.holding import Held, States, fullest
from meshwright.clusters.simulated.paper import Paper
from meshwright.clusters.simulated.step import Step

__all__ = ["FLOPS", "Forecast"]

FLOPS = "model FLOPs: 3 x forward's products, recomputing not counted, causal attention counted half"
"""The convention of `Forecast.mfu`."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """A prediction of one step.

    Args:
        paper: the job.
        states: of each rank of the pipeline.
        tokens: of one step, all ranks.
        flops: the model's, of one step, all ranks; see `FLOPS`.
        advice: what would make it fit, where it does not.
    """

    paper: Paper
    states: Sequence[States] = field(repr=False)
    tokens: float
    flops: float
    advice: str = ""

    @cached_property
    def step(self) -> Step:
        """Seconds by cause."""
        return self.paper.step

    @cached_property
    def memory(self) -> Held:
        """Bytes of the fullest rank by cause."""
        return fullest(self.paper, self.states)[1]

    @property
    def capacity_bytes(self) -> float:
        """Of one GPU."""
        return self.paper.machine.cluster.gpu.memory_bytes

    @property
    def missing_bytes(self) -> float:
        """What the fullest rank lacks; negative where it fits."""
        return self.memory.total_bytes - self.capacity_bytes

    @property
    def fits(self) -> bool:
        """Whether the fullest rank does."""
        return self.missing_bytes <= 0

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.tokens / self.step.total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs over those of all GPUs at their 16-bit peak; of CPUs at that of 32 bits where that is higher."""
        cluster = self.paper.machine.cluster
        peak = max(cluster.gpu.flops_per_s.get(each, 0.0) for each in ("bf16", "fp16", "fp32"))
        return self.flops / self.step.total_s / (cluster.num_gpus * peak)

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        cluster = self.paper.machine.cluster
        return {
            "fits": self.fits,
            "missing_bytes": max(0.0, self.missing_bytes),
            "advice": self.advice,
            "step_s": self.step.total_s,
            "seconds": dict(vars(self.step)),
            "tokens_per_step": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "mfu_convention": FLOPS,
            "memory_bytes": self.memory.total_bytes,
            "memory": self.memory.causes,
            "host_memory_bytes": self.memory.host,
            "gpu": cluster.gpu.name,
            "gpu_memory_bytes": self.capacity_bytes,
            "num_gpus": cluster.num_gpus,
            "gpus_per_node": cluster.gpus_per_node,
            "network_bytes_per_s": cluster.network,
        }
