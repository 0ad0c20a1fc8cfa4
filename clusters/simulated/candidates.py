"""Which layouts there are for a model on a cluster: every legal one, in groups whose layers take the same time."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from math import gcd

from meshwright.clusters.simulated.cluster import Cluster
from meshwright.clusters.simulated.efficiency import Efficiency, fitted
from meshwright.clusters.simulated.layout import Engine, Layout, Recompute
from meshwright.clusters.simulated.model import Transformer

__all__ = ["RUNNABLE", "Group", "Question", "Space", "divisors", "groups"]

_MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search chooses from.

    Args:
        schedules: orders of micro-batches; "1f1b" stands for its interleaved relatives too.
        contiguous: stages of neighbouring layers, one for each rank; else also several for each rank.
        recomputes: what is computed again.
        zero_stages: what replicas share.
        micro_batches: sequences of one.
        max_tp: most ranks that share a matrix; those of a node where None.
        max_cp: most ranks that share a sequence.
        runnable: only what `parallelize` does: no sequence_parallel with cp, states dealt over dp alone.
    """

    schedules: tuple[str, ...] = ("1f1b", "gpipe", "breadth-first", "zero-bubble")
    contiguous: bool = False
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    micro_batches: tuple[int, ...] = _MICRO_BATCHES
    max_tp: int | None = None
    max_cp: int = 64
    runnable: bool = False


RUNNABLE = Space(recomputes=("none", "full"), runnable=True)
"""What `parallelize` runs."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be trained, on what, and what may be chosen.

    Args:
        model: what is trained.
        cluster: all GPUs that there are.
        global_batch: sequences of a step.
        at_most: GPUs and batch are limits (a critical batch size, say); else exactly so many are used.
        engine: how each rank goes about it.
        efficiency: of the hardware; the catalog's by default.
        space: what is chosen from.

    Raises:
        ValueError: no batch.
    """

    model: Transformer
    cluster: Cluster
    global_batch: int
    at_most: bool = False
    engine: Engine = field(default_factory=Engine)
    efficiency: Efficiency = field(default_factory=fitted)
    space: Space = field(default_factory=Space)

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise ValueError(f"a step has sequences: global_batch {self.global_batch}")


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layouts whose layers and stages are the same; they differ in replicas, order and what replicas share.

    Args:
        question: that they answer.
        base: all that they have in common, with the fewest replicas that experts need.
    """

    question: Question
    base: Layout

    @property
    def replicas(self) -> range:
        """Degrees of dp, most first."""
        asked, base = self.question, self.base
        most = asked.cluster.num_gpus // (base.tp * base.cp * base.pp)
        if not asked.at_most:
            return range(most, most + 1)
        least = base.dp
        return range(min(most, asked.global_batch // base.micro_batch) // least * least, 0, -least)

    def microbatches(self, dp: int) -> range:
        """Micro-batches that a replica may have, most first.

        Where GPUs and batch are limits, those with which no more replicas could be had: of two layouts with equal
        micro-batches the one with more replicas takes less for a sequence, once they are on several nodes.
        """
        asked, base = self.question, self.base
        most = asked.global_batch // (dp * base.micro_batch)
        if not asked.at_most:
            return range(most, most + 1)
        more = asked.global_batch // ((dp + base.dp) * base.micro_batch) if dp < self.replicas[0] else 0
        return range(most, more, -1)

    def orders(self, microbatches: int) -> tuple[tuple[str, int], ...]:
        """Schedules and stages of each rank."""
        space, ranks = self.question.space, self.base.pp
        if ranks == 1:
            return _on_one_rank(space)
        layers, over = divmod(self.question.model.layers, ranks)
        return _across_ranks(space, 1 if over else layers, even=microbatches % ranks == 0)

    def zero_stages(self, dp: int, schedule: str, microbatches: int) -> tuple[int, ...]:
        """What replicas share.

        Stage 2 only where gradients are reduced once a step: elsewhere they are either whole until then, as with stage
        1, or reduced for each micro-batch, as with stage 3.
        """
        space = self.question.space
        if dp * (1 if space.runnable else self.base.cp) == 1:
            return (0,)
        once = schedule == "breadth-first" or microbatches == 1
        return tuple(stage for stage in space.zero_stages if stage != 2 or once)

    def layout(self, *, dp: int, microbatches: int, schedule: str, vpp: int, zero_stage: int) -> Layout:
        """One of them."""
        base = self.base
        return Layout(
            tp=base.tp,
            cp=base.cp,
            ep=base.ep,
            dp=dp,
            pp=base.pp,
            vpp=vpp,
            micro_batch=base.micro_batch,
            global_batch=dp * base.micro_batch * microbatches,
            schedule=schedule,
            recompute=base.recompute,
            sequence_parallel=base.sequence_parallel,
            zero_stage=zero_stage,
        )

    def choices(self) -> Iterator[tuple[int, int, str, int, int]]:
        """Replicas, micro-batches, schedule, stages of a rank, stage of ZeRO: one after the other."""
        for dp in self.replicas:
            for microbatches in self.microbatches(dp):
                for schedule, vpp in self.orders(microbatches):
                    for stage in self.zero_stages(dp, schedule, microbatches):
                        yield dp, microbatches, schedule, vpp, stage

    @property
    def size(self) -> int:
        """Layouts in the group, counted without listing them."""
        replicas, base = self.replicas, self.base
        if not self.question.at_most:
            return self.count(replicas[0], self.microbatches(replicas[0])[0])
        limit = self.question.global_batch // base.micro_batch
        most = limit // base.dp
        several = most if base.dp > 1 else limit // 2 if replicas[0] > 1 else 0  # micro-batches with which dp > 1
        return self._counted(2, range(1, several + 1)) + self._counted(1, range(several + 1, most + 1))

    def _counted(self, dp: int, numbers: range) -> int:
        """With each of these numbers of micro-batches: it matters whether it is 1, and whether ranks divide it."""
        pp, found = self.base.pp, 0
        if 1 in numbers:
            found, numbers = self.count(dp, 1), numbers[1:]
        even = (numbers.stop - 1) // pp - (numbers.start - 1) // pp
        return found + even * self.count(dp, 2 * pp) + (len(numbers) - even) * self.count(dp, 2 * pp + 1)

    def count(self, dp: int, microbatches: int) -> int:
        """Layouts with so many replicas and micro-batches."""
        orders = self.orders(microbatches)
        return sum(len(self.zero_stages(dp, schedule, microbatches)) for schedule, _ in orders)


@cache
def _on_one_rank(space: Space) -> tuple[tuple[str, int], ...]:
    """Micro-batches one after the other, and layer by layer."""
    return tuple((each, 1) for each in ("1f1b", "breadth-first") if each in space.schedules)


@cache
def _across_ranks(space: Space, layers: int, *, even: bool) -> tuple[tuple[str, int], ...]:
    """With `layers` on each rank (1 where they do not deal evenly); interleaved in even groups of micro-batches."""
    loops = () if space.contiguous else divisors(layers)[1:]
    orders = [(each, 1) for each in space.schedules if each != "breadth-first"]
    orders += [("1f1b", vpp) for vpp in loops if "1f1b" in space.schedules and even]
    return (*orders, *(("breadth-first", vpp) for vpp in loops if "breadth-first" in space.schedules))


@cache
def divisors(number: int) -> tuple[int, ...]:
    """All of them, smallest first.

    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def groups(asked: Question) -> Iterator[Group]:
    """Every group of legal layouts, in a fixed order."""
    for tp, cp, pp in _axes(asked):
        for ep in divisors(asked.model.experts) if asked.model.experts else (1,):
            least = ep // gcd(ep, cp)
            for size in asked.space.micro_batches:
                base = Layout(tp=tp, cp=cp, pp=pp, ep=ep, dp=least, micro_batch=size, global_batch=least * size)
                if _fills(asked, base):
                    yield from _variants(asked, base)


def _axes(asked: Question) -> Iterator[tuple[int, int, int]]:
    for tp in filter(partial(_shares, asked), divisors(asked.model.heads)):
        for cp in filter(partial(_halves, asked), divisors(asked.model.sequence)):
            most = asked.cluster.num_gpus // (tp * cp)
            for pp in filter(partial(_cuts, asked), range(1, min(asked.model.layers, most) + 1)):
                if asked.at_most or asked.cluster.num_gpus % (tp * cp * pp) == 0:
                    yield tp, cp, pp


def _shares(asked: Question, tp: int) -> bool:
    """Whether matrices deal evenly; key-value heads do or are held several times."""
    model = asked.model
    if tp > (asked.space.max_tp or asked.cluster.gpus_per_node):
        return False
    keys = model.kv_heads % tp == 0 or tp % model.kv_heads == 0
    return keys and model.hidden % tp == 0 and model.ffn % tp == 0


def _halves(asked: Question, cp: int) -> bool:
    """Whether each rank gets an early and a late part of a sequence, so that all see equally much of it."""
    return cp == 1 or (cp <= asked.space.max_cp and asked.model.sequence % (2 * cp) == 0)


def _cuts(asked: Question, pp: int) -> bool:
    """Whether stages are what is predicted: `parallelize` never counts embedding and head as layers."""
    layers = asked.model.layers
    return not (asked.space.runnable and layers % pp and (layers + 2) % pp == 0)


def _fills(asked: Question, base: Layout) -> bool:
    """Whether some number of replicas divides GPUs and batch."""
    most = asked.cluster.num_gpus // (base.tp * base.cp * base.pp)
    if asked.at_most:
        return most >= base.dp and base.global_batch <= asked.global_batch
    return most % base.dp == 0 and asked.global_batch % (most * base.micro_batch) == 0


def _variants(asked: Question, base: Layout) -> Iterator[Group]:
    """With and without what is done about activations."""
    spreads = (False, True) if base.tp > 1 and not (asked.space.runnable and base.cp > 1) else (False,)
    for recompute in asked.space.recomputes:
        for spread in spreads:
            group = Group(question=asked, base=replace(base, recompute=recompute, sequence_parallel=spread))
            if group.orders(base.pp):
                yield group
