"""The fastest layouts of a training on a cluster, without pricing most of them.

Branch and bound: layouts are taken in groups whose layers take the same time, the group that could be fastest first. A
layout takes at least what its slowest stage computes in all micro-batches and what it waits for others, by the closed
form of its schedule; what may come on top (gradients, transfers, the update) is left out of the bound. A layout whose
bound is above what is known already is not priced. What is found is what pricing all of them would find, in that order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf

from meshwright.clusters.simulated.candidates import Group, Question, groups
from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.memory import memory
from meshwright.clusters.simulated.stages import layers_of_ranks
from meshwright.clusters.simulated.step import Step, step
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.pipeline.closed_form import Pipe, zero_bubble_h1_makespan

__all__ = ["Found", "Priced", "memory_bytes", "price", "search", "training_of"]

_ROUNDING = 1 - 1e-9  # bounds are added up in another order than steps
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
        peak = self.training.cluster.gpu.flops_per_s[_counted(self.training)]
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
        too_large: of them not priced, since they do not fit.
        priced: of them.
    """

    question: Question
    best: tuple[Priced, ...]
    nearest: Priced | None
    seen: int
    pruned: int
    too_large: int
    priced: int


def training_of(asked: Question, layout: Layout) -> Training:
    """The layout on as many GPUs as it has ranks."""
    cluster = replace(asked.cluster, num_gpus=layout.num_ranks)
    return Training(model=asked.model, layout=layout, cluster=cluster, engine=asked.engine, efficiency=asked.efficiency)


def memory_bytes(asked: Question, training: Training) -> float:
    """Of the fullest GPU; `parallelize` deals states over dp alone, so there those of dp replicas count."""
    found, layout = memory(training), training.layout
    if not asked.space.runnable or layout.cp == 1 or not layout.zero_stage:
        return found.total_bytes
    alone = memory(training_of(asked, replace(layout, cp=1, ep=min(layout.ep, layout.dp))))
    return found.total_bytes - found.state_bytes + alone.state_bytes


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
    bounded = sorted(((walk.bounds.of_group(each), index, each) for index, each in enumerate(groups(asked))))
    for bound_s, _, group in bounded:
        walk.take(group, bound_s)
    best = tuple(sorted(walk.best.values(), key=lambda each: each.rank)[:num_best])
    return Found(
        question=asked,
        best=best,
        nearest=None if best or walk.nearest is None else price(asked, walk.nearest),
        seen=walk.seen,
        pruned=walk.seen - walk.too_large - walk.priced,
        too_large=walk.too_large,
        priced=walk.priced,
    )


class _Bounds:
    """Seconds of a sequence that no layout can be below."""

    def __init__(self, asked: Question) -> None:
        self.asked = asked
        self._layers: dict[Layout, tuple[float, float]] = {}

    def layer_and_head_s(self, group: Group) -> tuple[float, float]:
        """Of one micro-batch: a layer and the head, of what every layout of the group has to do."""
        alone = replace(group.base, pp=1)
        if alone not in self._layers:
            found = step(training_of(self.asked, alone))
            busy_s = found.compute_s + found.recompute_s + found.tp_s + found.cp_s + found.ep_s
            self._layers[alone] = busy_s / self.asked.model.layers, found.head_s
        return self._layers[alone]

    def of_group(self, group: Group) -> float:
        """With most replicas and no bubble."""
        return self.without_bubble(group, group.replicas[0])

    def without_bubble(self, group: Group, dp: int) -> float:
        """Of the slowest stage: the one with most layers, or the last one with the head."""
        layer_s, head_s = self.layer_and_head_s(group)
        layers = layers_of_ranks(self.asked.model, group.base.pp)
        stage_s = max(max(layers) * layer_s, layers[-1] * layer_s + head_s)
        return _ROUNDING * stage_s / (dp * group.base.micro_batch)

    def waiting(self, group: Group, pipe: Pipe, schedule: str) -> float:
        """Of the bubble, for one replica; divided by sequences of a step."""
        if pipe.num_ranks == 1:
            return 0.0
        layer_s, _ = self.layer_and_head_s(group)
        one_s = layer_s * self.asked.model.layers / pipe.num_ranks
        return _ROUNDING * one_s * _bubble(pipe, schedule) / group.base.micro_batch


@lru_cache(maxsize=1 << 16)
def _bubble(pipe: Pipe, schedule: str) -> float:
    """Of a micro-batch's time on a rank."""
    if schedule == "zero-bubble":
        return zero_bubble_h1_makespan(pipe, 1 / 3, 2 / 3) / pipe.num_microbatches - 1
    return float(pipe.bubble)


class _Walk:
    """What is known on the way."""

    def __init__(self, asked: Question, num_best: int) -> None:
        self.asked = asked
        self.num_best = num_best
        self.bounds = _Bounds(asked)
        self.best: dict[_Axes, Priced] = {}
        self.nearest: Layout | None = None
        self.seen = self.too_large = self.priced = 0
        self._least_bytes = inf
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

    def take(self, group: Group, bound_s: float) -> None:
        """Prices what may be good in a group."""
        self.seen += group.size
        if bound_s > self.limit_s(group):
            return
        for dp in group.replicas:
            without_s = self.bounds.without_bubble(group, dp)
            if without_s > self.limit_s(group):
                return  # fewer replicas take longer still
            for microbatches in group.microbatches(dp):
                for schedule, vpp in group.orders(microbatches):
                    waiting_s = self.bounds.waiting(group, Pipe(group.base.pp, microbatches, vpp), schedule)
                    self._stages(group, (dp, microbatches, schedule, vpp), without_s + waiting_s / dp)

    def _stages(self, group: Group, chosen: tuple[int, int, str, int], bound_s: float) -> None:
        dp, microbatches, schedule, vpp = chosen
        for stage in group.zero_stages(dp, schedule, microbatches):
            if bound_s <= self.limit_s(group):
                self._price(
                    group.layout(dp=dp, microbatches=microbatches, schedule=schedule, vpp=vpp, zero_stage=stage)
                )

    def _price(self, layout: Layout) -> None:
        training = training_of(self.asked, layout)
        needed = memory_bytes(self.asked, training)
        if needed > self.asked.cluster.gpu.memory_bytes:
            self.too_large += 1
            if needed < self._least_bytes:
                self._least_bytes, self.nearest = needed, layout
            return
        self.priced += 1
        self.offer(Priced(training=training, step=step(training), memory_bytes=needed))


def _counted(training: Training) -> str:
    peaks = training.cluster.gpu.flops_per_s
    return training.engine.precision if training.engine.precision in peaks else "bf16"
