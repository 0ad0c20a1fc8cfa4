"""The fastest layouts of a training on a cluster, without pricing most of them.

Branch and bound: layouts are taken in groups whose layers take the same time, the group that could be fastest first.
One that by its bounds is slower than what is known already, or does not fit, is not priced (see `bounds`). What is
found is what pricing all of them would find, in that order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from meshwright.clusters.simulated.bounds import Bounds, memory_bytes, training_of
from meshwright.clusters.simulated.candidates import Group, Question, groups
from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.step import Step, step
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.pipeline.closed_form import Pipe

__all__ = ["Found", "Priced", "least_memory", "price", "search"]

_Axes = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A layout and what it costs.

    Args:
        training: the layout on its cluster.
        step: seconds by cause.
        memory_bytes: of the fullest GPU.
    """

    training: Training
    step: Step
    memory_bytes: float

    @property
    def layout(self) -> Layout:
        """How the model is dealt."""
        return self.training.layout

    @property
    def sequence_s(self) -> float:
        """Seconds of a step over its sequences: what a search makes least."""
        return self.step.total_s / self.layout.global_batch

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.training.model.sequence / self.sequence_s

    @property
    def mfu(self) -> float:
        """Model FLOPs, all scores of attention counted, over the dense peak of all GPUs in use."""
        flops = self.tokens_per_s * self.training.model.flops_per_token()
        gpu = self.training.cluster.gpu
        peak = gpu.flops_per_s.get(self.training.engine.precision, gpu.half_flops_per_s)
        return flops / (self.layout.num_ranks * peak)

    @property
    def axes(self) -> _Axes:
        """Degrees of tp, cp, ep, pp: layouts that differ in them are alternatives worth a line each."""
        return self.layout.tp, self.layout.cp, self.layout.ep, self.layout.pp

    @property
    def rank(self) -> tuple[float, float, str]:
        """What is less is better; of equally fast ones that with less memory, else the first in writing."""
        return self.sequence_s, self.memory_bytes, str(self.layout)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found.

    Args:
        question: that it answers.
        best: fastest first, one layout for each (tp, cp, ep, pp), all within the memory.
        nearest: where none fits, the one that needs least memory.
        seen: legal layouts.
        pruned: of them not priced, since they cannot be among the best.
        too_large: of them not priced, since they were found not to fit before they were found too slow.
        priced: of them.
    """

    question: Question
    best: tuple[Priced, ...]
    nearest: Priced | None
    seen: int
    pruned: int
    too_large: int
    priced: int


def price(asked: Question, layout: Layout) -> Priced:
    """Time and memory of one layout, whether it fits or not."""
    training = training_of(asked, layout)
    return Priced(training=training, step=step(training), memory_bytes=memory_bytes(asked, training))


def search(asked: Question, num_best: int = 10, *, known: Iterable[Layout] = ()) -> Found:
    """Finds the fastest layouts.

    Args:
        asked: what may be chosen.
        num_best: alternatives to return, each of other degrees (tp, cp, ep, pp).
        known: layouts that are priced first; good ones make it quicker, none changes what is found.

    >>> from meshwright.clusters.hardware import gpu
    >>> from meshwright.clusters.simulated import Cluster, Transformer
    >>> llama = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=8192,
    ...                     gated=True)
    >>> found = search(Question(model=llama, cluster=Cluster(gpu=gpu("H100"), num_gpus=64), global_batch=128))
    >>> found.best[0].memory_bytes < 80e9, found.priced < found.seen == found.priced + found.pruned + found.too_large
    (True, True)
    """
    walk = _Walk(asked, num_best)
    for layout in known:
        walk.offer(price(asked, layout))
    every = [*groups(asked)]
    for _, _, group in sorted((walk.bounds.group_s(each), index, each) for index, each in enumerate(every)):
        walk.take(group)
    best = tuple(sorted(walk.best.values(), key=lambda each: each.rank)[:num_best])
    seen = sum(each.size for each in every)
    return Found(
        question=asked,
        best=best,
        nearest=None if best else least_memory(asked),
        seen=seen,
        pruned=seen - walk.too_large - walk.priced,
        too_large=walk.too_large,
        priced=walk.priced,
    )


def least_memory(asked: Question) -> Priced | None:
    """The layout that needs least memory, the first of equals; None where no layout is legal."""
    least, nearest, bounds = inf, None, Bounds(asked)
    bounded = []
    for index, group in enumerate(groups(asked)):
        dp = group.replicas[0]
        fewest = 1 if asked.at_most else group.microbatches(dp)[0]
        bounded.append((bounds.least_bytes(group, dp, fewest), index, group))
    for bound, _, group in sorted(bounded):
        if bound > least:
            break
        for dp, microbatches, schedule, vpp, stage in group.choices():
            layout = group.layout(dp=dp, microbatches=microbatches, schedule=schedule, vpp=vpp, zero_stage=stage)
            needed = memory_bytes(asked, training_of(asked, layout))
            if needed < least:
                least, nearest = needed, layout
    return None if nearest is None else price(asked, nearest)


class _Walk:
    """What is known on the way."""

    def __init__(self, asked: Question, num_best: int) -> None:
        self.asked = asked
        self.num_best = num_best
        self.bounds = Bounds(asked)
        self.best: dict[_Axes, Priced] = {}
        self.too_large = self.priced = 0
        self._worst_s = inf

    def offer(self, found: Priced) -> None:
        """Keeps the best of each kind that fit."""
        if found.memory_bytes > self.asked.cluster.gpu.memory_bytes:
            return
        before = self.best.get(found.axes)
        if before is None or found.rank < before.rank:
            self.best[found.axes] = found
            ranked = sorted(each.sequence_s for each in self.best.values())
            self._worst_s = ranked[self.num_best - 1] if len(ranked) >= self.num_best else inf

    def limit_s(self, group: Group) -> float:
        """What a layout of the group must not exceed to be of use."""
        base = group.base
        before = self.best.get((base.tp, base.cp, base.ep, base.pp))
        return min(self._worst_s, before.sequence_s if before else inf)

    def take(self, group: Group) -> None:
        """Prices what may be good in a group."""
        for dp in group.replicas:
            computing_s = self.bounds.computing_s(group, dp)
            if computing_s > self.limit_s(group):
                return  # fewer replicas take longer still
            for microbatches in group.microbatches(dp):
                if computing_s + self.bounds.least_waiting_s(group, microbatches) / dp > self.limit_s(group):
                    break  # with fewer micro-batches bubbles are larger still
                if self.bounds.least_bytes(group, dp, microbatches) > self.asked.cluster.gpu.memory_bytes:
                    self.too_large += group.count(dp, microbatches)
                else:
                    self._orders(group, dp, microbatches)

    def _orders(self, group: Group, dp: int, microbatches: int) -> None:
        computing_s = self.bounds.computing_s(group, dp)
        for schedule, vpp in group.orders(microbatches):
            waiting_s = self.bounds.waiting_s(group, Pipe(group.base.pp, microbatches, vpp), schedule)
            for stage in group.zero_stages(dp, schedule, microbatches):
                if computing_s + waiting_s / dp <= self.limit_s(group):
                    self._price(
                        group.layout(dp=dp, microbatches=microbatches, schedule=schedule, vpp=vpp, zero_stage=stage)
                    )

    def _price(self, layout: Layout) -> None:
        training = training_of(self.asked, layout)
        needed = memory_bytes(self.asked, training)
        if needed > self.asked.cluster.gpu.memory_bytes:
            self.too_large += 1
            return
        self.priced += 1
        self.offer(Priced(training=training, step=step(training), memory_bytes=needed))
