"""Models of one family in growing sizes, and hardware that reaches all it promises: the analysis of a 2021 paper.

Lamy-Poirier (arXiv 2106.02679) asks how fast a model can be trained if no step may be larger than the critical batch,
above which more samples hardly save steps (McCandlish et al., arXiv 1812.06162). Peaks and no latencies, as there.
"""

from dataclasses import dataclass, replace
from math import inf

from meshwright.clusters.hardware import Gpu
from meshwright.clusters.simulated.candidates import Question, Space
from meshwright.clusters.simulated.cluster import Cluster
from meshwright.clusters.simulated.efficiency import Compute, Efficiency, Links, Reserves, fitted
from meshwright.clusters.simulated.layout import Engine
from meshwright.clusters.simulated.model import Transformer
from meshwright.clusters.simulated.search import Priced, search

__all__ = ["CONTIGUOUS", "ENGINE", "MODULAR", "Family", "at_peak", "fastest", "promised"]

_MOST_GPUS, _ISLAND = 40_000, 16

ENGINE = Engine(gradient_bytes=2, fused_attention=False, overlapped=True, stops_early=False)
"""Gradients of 2 bytes, reductions behind backward, as in the paper."""

MODULAR = Space(schedules=("breadth-first",), recomputes=("full",), micro_batches=(1, 2), max_cp=1)
"""Layered accumulation over single layers, or a few, that are dealt in turn; layers are recomputed."""

CONTIGUOUS = replace(MODULAR, schedules=("1f1b", "gpipe"), contiguous=True)
"""A stage of neighbouring layers on each rank."""


@dataclass(frozen=True)
class Family:
    """X_x of the paper: x layers with x heads of size x, sequences of 16 x tokens.

    >>> round(Family(160).model.parameters / 1e12, 2), Family(160).critical_sequences
    (1.26, 2416)
    """

    x: int

    @property
    def model(self) -> Transformer:
        """Without embedding and head, which the paper leaves out."""
        x = self.x
        return Transformer(
            layers=x, hidden=x**2, heads=x, kv_heads=x, ffn=4 * x**2, vocab=0, sequence=16 * x, tied=True
        )

    @property
    def critical_sequences(self) -> int:
        """The batch above which more hardly save steps: 82 x^(2/3)."""
        return int(82.0 * float(self.x ** (2 / 3)))


def promised(kind: Gpu) -> Gpu:
    """The GPU with products at the peak of its data sheet.

    >>> from meshwright.clusters.hardware import gpu
    >>> promised(gpu("A100")).matmul_flops_per_s("bf16")
    312000000000000.0
    """
    return replace(kind, sustained=dict.fromkeys(kind.flops_per_s, 1.0))


def at_peak() -> Efficiency:
    """Products and links at their rates, nothing else takes time, memory holds tensors alone.

    Of a collective or a gather that can hide nothing is seen; transfers between stages are seen whole.
    """
    return Efficiency(
        Compute(
            matmul=1.0,
            hopper=1.0,
            narrow=1.0,
            attention=1.0,
            softmax=0.0,
            memory=inf,
            kernel_s=0.0,
            host_s=0.0,
            waiting_s=0.0,
            unaligned=1.0,
        ),
        Links(
            nvlink=1.0,
            nvlink_s=0.0,
            network=1.0,
            network_s=0.0,
            exposed=0.0,
            tp_exposed=1.0,
            transfer=1.0,
            stage_s=0.0,
            straggling=0.0,
        ),
        Reserves(fragmentation=0.0, overhead_bytes=0.0),
    )


def fastest(
    family: Family, kind: Gpu, space: Space, *, network_bytes_per_s: float | None = None, peak: bool = True
) -> Priced:
    """The layout that takes the least time for a sequence on at most 40,000 GPUs, in steps of the critical batch.

    Args:
        family: what is trained.
        kind: GPUs, NVLink between sixteen.
        space: what is chosen from.
        network_bytes_per_s: between nodes, per GPU and direction; the usual one where None.
        peak: hardware that reaches what it promises; else what the catalog says that it reaches.

    Raises:
        ValueError: nothing fits.
    """
    cluster = Cluster(
        gpu=promised(kind) if peak else kind,
        num_gpus=_MOST_GPUS,
        gpus_per_node=_ISLAND,
        network_bytes_per_s=network_bytes_per_s,
    )
    asked = Question(
        model=family.model,
        cluster=cluster,
        global_batch=family.critical_sequences,
        at_most=True,
        engine=ENGINE,
        efficiency=at_peak() if peak else fitted(),
        space=space,
    )
    found = search(asked, 1)
    if not found.best:
        raise ValueError(f"no layout of X_{family.x} fits {kind.name}")
    return found.best[0]
