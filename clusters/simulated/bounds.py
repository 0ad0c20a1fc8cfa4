"""What no layout of a group can be below, in seconds and in bytes, without pricing one.

A layout takes at least what its slowest stage computes in all micro-batches and what it waits for others, by the closed
form of its schedule; what may come on top (gradients, transfers, the update) is left out. It keeps at least the
activations of the most frugal order, and the smallest states that any stage of ZeRO leaves.
"""

from dataclasses import replace
from functools import lru_cache

from meshwright.clusters.simulated.candidates import Group, Question
from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.memory import memory
from meshwright.clusters.simulated.stages import layers_of_ranks
from meshwright.clusters.simulated.step import step
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.pipeline.closed_form import Pipe, zero_bubble_h1_makespan

__all__ = ["Bounds", "memory_bytes", "state_bytes", "training_of"]

_ROUNDING = 1 - 1e-9  # bounds are added up in another order than what they bound


def training_of(asked: Question, layout: Layout) -> Training:
    """The layout on as many GPUs as it has ranks."""
    cluster = replace(asked.cluster, num_gpus=layout.num_ranks)
    return Training(model=asked.model, layout=layout, cluster=cluster, engine=asked.engine, efficiency=asked.efficiency)


def memory_bytes(asked: Question, training: Training) -> float:
    """Of the fullest GPU; `parallelize` deals states over dp alone, so there those of dp replicas count."""
    found, layout = memory(training), training.layout
    if not _kept_by_cp(asked, layout):
        return found.total_bytes
    return found.total_bytes - found.state_bytes + state_bytes(asked, layout)


def state_bytes(asked: Question, layout: Layout) -> float:
    """The part that does not depend on the batch."""
    if _kept_by_cp(asked, layout):
        layout = replace(layout, cp=1, ep=min(layout.ep, layout.dp))
    return memory(training_of(asked, layout)).state_bytes


def _kept_by_cp(asked: Question, layout: Layout) -> bool:
    return asked.space.runnable and layout.cp > 1 and layout.zero_stage > 0


class Bounds:
    """Bounds on the layouts that answer one question.

    Args:
        asked: the question.
    """

    def __init__(self, asked: Question) -> None:
        self._asked = asked
        self._layers: dict[Layout, tuple[float, float]] = {}
        self._states: dict[Layout, float] = {}

    def group_s(self, group: Group) -> float:
        """Seconds of a sequence with most replicas and no bubble."""
        return self.computing_s(group, group.replicas[0])

    def computing_s(self, group: Group, dp: int) -> float:
        """Of a sequence, computed by the slowest stage: the one with most layers, or the last one with the head."""
        layer_s, head_s = self._layer_and_head_s(group)
        layers = layers_of_ranks(self._asked.model, group.base.pp)
        stage_s = max(max(layers) * layer_s, layers[-1] * layer_s + head_s)
        return _ROUNDING * stage_s / (dp * group.base.micro_batch)

    def waiting_s(self, group: Group, pipe: Pipe, schedule: str) -> float:
        """Of a sequence of one replica, in the bubble."""
        if pipe.num_ranks == 1:
            return 0.0
        layer_s, _ = self._layer_and_head_s(group)
        one_s = layer_s * self._asked.model.layers / pipe.num_ranks
        return _ROUNDING * one_s * _bubble(pipe, schedule) / group.base.micro_batch

    def least_waiting_s(self, group: Group, microbatches: int) -> float:
        """The same in the best order that so many micro-batches or fewer can have."""
        pp = group.base.pp
        every = group.orders(pp * microbatches)  # also those that want ranks to divide micro-batches
        return min(self.waiting_s(group, Pipe(pp, microbatches, vpp), schedule) for schedule, vpp in every)

    def least_bytes(self, group: Group, dp: int, microbatches: int) -> float:
        """Memory of any order and any stage of ZeRO with so many micro-batches or more."""
        schedule, vpp = _frugal(group.orders(group.base.pp * microbatches))
        layout = group.layout(dp=dp, microbatches=microbatches, schedule=schedule, vpp=vpp, zero_stage=0)
        found = memory(training_of(self._asked, layout))
        key = replace(layout, micro_batch=1, global_batch=dp, recompute="none", sequence_parallel=False)
        if key not in self._states:
            stages = (0, *self._asked.space.zero_stages)
            self._states[key] = min(state_bytes(self._asked, replace(key, zero_stage=stage)) for stage in stages)
        return _ROUNDING * (found.total_bytes - found.state_bytes + self._states[key])

    def _layer_and_head_s(self, group: Group) -> tuple[float, float]:
        """Of one micro-batch: a layer and the head, of what every layout of the group has to do."""
        alone = replace(group.base, pp=1)
        if alone not in self._layers:
            found = step(training_of(self._asked, alone))
            busy_s = found.compute_s + found.recompute_s + found.tp_s + found.cp_s + found.ep_s
            self._layers[alone] = busy_s / self._asked.model.layers, found.head_s
        return self._layers[alone]


def _frugal(orders: tuple[tuple[str, int], ...]) -> tuple[str, int]:
    """The order that keeps least: depth first in few loops, else breadth first in many, which gather few layers."""

    def kept(order: tuple[str, int]) -> tuple[int, int]:
        schedule, vpp = order
        return (1, -vpp) if schedule in ("breadth-first", "gpipe") else (0, vpp)

    return min(orders, key=kept)


@lru_cache(maxsize=1 << 16)
def _bubble(pipe: Pipe, schedule: str) -> float:
    """Of a micro-batch's time on a rank."""
    if schedule == "zero-bubble":
        return zero_bubble_h1_makespan(pipe, 1 / 3, 2 / 3) / pipe.num_microbatches - 1
    return float(pipe.bubble)
