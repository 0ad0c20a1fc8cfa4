"""How long a step takes and why.

One rank of each stage stands for all: ranks of a stage do the same. A stage's micro-batch is added up from its layers'
operations; the pipeline multiplies it by its schedule's closed form; gradients, gathers and the optimizer follow.
"""

from dataclasses import dataclass
from math import log2

from meshwright.clusters.simulated.layer import LayerTimes, head_s, layer_times
from meshwright.clusters.simulated.layout import Layout
from meshwright.clusters.simulated.stages import largest_stage, stage_parameters
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.pipeline.closed_form import zero_bubble_h1_makespan

__all__ = ["Step", "step"]

_OPTIMIZER_BYTES = 30  # of a parameter: gradient 4, master weight and two moments read and written, weight 2


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step by cause; they add up to the whole.

    Args:
        compute_s: forward and backward of the slowest stage.
        recompute_s: its second forward.
        head_s: loss and head, where they are on the slowest stage.
        tp_s: collectives of tp that nothing hides.
        cp_s: keys and values of others on their way.
        ep_s: tokens on their way to experts.
        pp_bubble_s: waiting for other stages.
        pp_transfer_s: activations on their way between stages.
        dp_s: gradients and gathers of weights.
        optimizer_s: the update.
        straggling_s: waiting for the slowest of many nodes.
        offload_s: copies to the host's memory and back.
    """

    compute_s: float
    recompute_s: float
    head_s: float
    tp_s: float
    cp_s: float
    ep_s: float
    pp_bubble_s: float
    pp_transfer_s: float
    dp_s: float
    optimizer_s: float
    straggling_s: float = 0.0
    offload_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Of the step."""
        return sum(map(float, vars(self).values()))


def step(training: Training) -> Step:
    """Predicts a step.

    >>> from meshwright.clusters.hardware import gpu
    >>> from meshwright.clusters.simulated import Cluster, Layout, Training, Transformer
    >>> llama = Transformer(layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, sequence=8192,
    ...                     gated=True)
    >>> eight = Cluster(gpu=gpu("H100"), num_gpus=8)
    >>> found = step(Training(model=llama, cluster=eight, layout=Layout(dp=8, global_batch=128, zero_stage=3)))
    >>> 15 < found.total_s < 25, found.dp_s < found.compute_s, found.pp_bubble_s
    (True, True, 0.0)
    """
    layout = training.layout
    layer, head = layer_times(training), head_s(training)
    layers, with_head = largest_stage(training.model, layout, head_in_layers=head / layer.total_s)
    all_of = layer.times(layout.num_microbatches * layers)
    all_heads_s = layout.num_microbatches * head if with_head else 0.0
    found = Step(
        compute_s=all_of.forward_s + all_of.backward_s,
        recompute_s=all_of.recompute_s,
        head_s=all_heads_s,
        tp_s=all_of.tp_s,
        cp_s=all_of.cp_s,
        ep_s=all_of.ep_s,
        pp_bubble_s=_bubble_s(layout, layer.times(training.model.layers / layout.pp)),
        pp_transfer_s=_transfer_s(training),
        dp_s=_data_parallel_s(training, all_of.total_s + all_heads_s),
        optimizer_s=_optimizer_s(training),
    )
    share = training.efficiency.links.straggling * log2(training.cluster.nodes)
    return Step(**{**vars(found), "straggling_s": found.total_s * share})


def _bubble_s(layout: Layout, stage: LayerTimes) -> float:
    """Waiting in the schedule, stages of equal size."""
    one_s, count = stage.total_s, layout.pipe.num_microbatches
    if layout.pp == 1:
        return 0.0
    if layout.schedule == "zero-bubble":
        return zero_bubble_h1_makespan(layout.pipe, one_s / 3, 2 * one_s / 3) - count * one_s
    return float(layout.pipe.bubble) * count * one_s


def _transfer_s(training: Training) -> float:
    """Activations and their gradients between stages, once in each direction for each micro-batch and stage."""
    layout, links = training.layout, training.efficiency.links
    if layout.pp == 1:
        return 0.0
    num_bytes = 2 * training.tokens * training.model.hidden / (layout.tp if training.engine.split_transfers else 1)
    hop_s = training.efficiency.send_s(num_bytes, training.cluster, layout.num_ranks // layout.pp)
    hops = 2 * layout.vpp * layout.num_microbatches + 2 * (layout.pp - 1)
    return hops * (links.transfer * hop_s + links.stage_s)


def _data_parallel_s(training: Training, busy_s: float) -> float:
    """What is seen of reductions of gradients and gathers of weights while a rank is busy for `busy_s`."""
    layout, engine = training.layout, training.engine
    if layout.replicas == 1:
        return 0.0
    mine = stage_parameters(training.model, layout)
    if layout.zero_stage == 3:
        messages = max(1, round(training.model.layers / layout.pp))
        weights_s = messages * training.gathered_s(2 * mine / messages, layout.replicas, layout.tp)
        gradients_s = messages * training.gathered_s(
            engine.gradient_bytes * mine / messages, layout.replicas, layout.tp
        )
        sent_s = _passes(layout) * (2 * weights_s + gradients_s)
        hidden_by = busy_s
    else:
        back = 2 if layout.zero_stage else engine.gradient_bytes
        sent_s = sum(
            training.gathered_s(each * mine, layout.replicas, layout.tp) for each in (engine.gradient_bytes, back)
        )
        hidden_by = busy_s / _passes(layout)
    return max(sent_s - (hidden_by if engine.overlapped else 0.0), training.efficiency.links.exposed * sent_s)


def _passes(layout: Layout) -> float:
    """Times that a layer's turn comes in each direction of a step: once where all micro-batches go through it together.

    So often sharded weights are gathered and gradients reduced; and only the last such turn hides a reduction of whole
    ones (Lamy-Poirier, arXiv 2106.02679, section 3).
    """
    return 1.0 if layout.schedule == "breadth-first" else layout.num_microbatches


def _optimizer_s(training: Training) -> float:
    mine = stage_parameters(training.model, training.layout)
    return training.moved_s(_OPTIMIZER_BYTES * mine / (training.layout.replicas if training.layout.zero_stage else 1))
