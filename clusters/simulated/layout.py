"""How a training is dealt to ranks, and how the program on each rank goes about it, as numbers."""

from dataclasses import dataclass
from math import ceil, prod
from typing import Literal

from meshwright.parallel.pipeline.closed_form import Pipe

__all__ = ["Engine", "Layout", "Recompute"]

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of the axes, micro-batches, and what is sharded and recomputed.

    Args:
        tp: ranks that share each matrix; neighbours.
        cp: ranks that share each sequence.
        ep: ranks among the data-parallel ones that share the experts.
        dp: ranks with different sequences.
        pp: ranks in a pipeline; farthest from each other.
        vpp: stages of each rank of the pipeline.
        micro_batch: sequences.
        global_batch: sequences of a step.
        schedule: "1f1b", "gpipe", "breadth-first", "zero-bubble"; interleaved where vpp > 1.
        recompute: nothing; what is cheap (scores, or else normalisation and activation); whole layers.
        sequence_parallel: activations between products are dealt over tp.
        zero_stage: 0 to 3.

    Raises:
        ValueError: a batch that does not fill the ranks, an unknown word.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    vpp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    schedule: str = "1f1b"
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    zero_stage: int = 0

    def __post_init__(self) -> None:
        degrees = (self.tp, self.cp, self.ep, self.dp, self.pp, self.vpp, self.micro_batch, self.global_batch)
        if min(degrees) < 1:
            raise ValueError(f"degrees and batches are positive: {self}")
        if self.global_batch < self.dp * self.micro_batch:
            raise ValueError(
                f"a step of {self.global_batch} sequences does not fill dp {self.dp} x micro_batch {self.micro_batch}: "
                f"it needs {self.dp * self.micro_batch}"
            )
        known = {
            "schedule": (self.schedule, ("1f1b", "gpipe", "breadth-first", "zero-bubble")),
            "recompute": (self.recompute, ("none", "selective", "full")),
            "zero_stage": (self.zero_stage, (0, 1, 2, 3)),
        }
        for name, (given, allowed) in known.items():
            if given not in allowed:
                raise ValueError(f"{name} is one of {', '.join(map(str, allowed))}, not {given!r}")

    @property
    def num_ranks(self) -> int:
        """All of them; ep lies within dp and cp."""
        return prod((self.tp, self.cp, self.dp, self.pp))

    @property
    def num_microbatches(self) -> float:
        """Of one pipeline in a step; not whole where a last one is ragged."""
        return self.global_batch / (self.dp * self.micro_batch)

    @property
    def pipe(self) -> Pipe:
        """The numbers of its schedule, micro-batches rounded up."""
        return Pipe(self.pp, ceil(self.num_microbatches), self.vpp)

    @property
    def depth_first(self) -> bool:
        """Backward of a micro-batch as soon as it can: 1F1B and its relatives."""
        return self.schedule not in ("gpipe", "breadth-first")

    @property
    def replicas(self) -> int:
        """Ranks with the same shard of the model, which ZeRO deals states to."""
        return self.dp * self.cp


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the program of a rank goes about its part.

    Args:
        precision: of products with weights: "bf16" (fp16 alike), "fp8", "fp4".
        gradient_bytes: of a gradient where it is summed up and on its way.
        fused_attention: scores never reach memory.
        overlapped: collectives of dp and cp run while products do.
        overlapped_tp: collectives of tp do.
        split_transfers: ranks of tp share the sending to the next stage.
        stops_early: a recomputed layer stops at the last activation that backward needs, as torch's checkpoint does
            since 2.1: the last product of the layer is left out.
        once_per_node: a token goes to each node of its experts once, whatever their number.
        host_in_series: the host waits for the GPU in each layer, as DeepSpeed's pipeline engine does.
        bilevel_nodes: that a bi-level router chooses for each token, and its experts are there; 0 for a flat router.

    Raises:
        ValueError: an unknown precision.
    """

    precision: str = "bf16"
    gradient_bytes: int = 4
    fused_attention: bool = True
    overlapped: bool = True
    overlapped_tp: bool = False
    split_transfers: bool = True
    stops_early: bool = True
    once_per_node: bool = True
    host_in_series: bool = False
    bilevel_nodes: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "fp8", "fp4"):
            raise ValueError(f"precision is bf16 (fp16 alike), fp8 or fp4, not {self.precision!r}")
