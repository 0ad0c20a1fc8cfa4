"""What memory the fullest rank needs, and for what.

Activations follow Korthikanti et al. (arXiv 2205.05198, section 4.1), for any ratio of widths and for gated layers:
with a feed-forward of 4 h and scores in memory a layer keeps s b h (10 + 24 / t + 5 a s / h t) bytes.
"""

from dataclasses import dataclass, replace
from math import ceil

from meshwright.clusters.simulated.stages import layers_of_ranks, stage_parameters
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.pipeline.closed_form import in_flight

__all__ = ["Memory", "activation_bytes", "memory"]

_LOGIT_BYTES = 10  # of one logit: in 2 bytes, in fp32, and the gradient in fp32
_FP32 = 4
_OPTIMIZER_BYTES = 12  # of a parameter: master weight and two moments in fp32


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest rank by cause; they add up to the whole.

    Args:
        weights_bytes: kept between steps, and those gathered for the layers at work.
        gradients_bytes: summed up over micro-batches.
        optimizer_bytes: master weights and moments.
        activations_bytes: kept for backward by all micro-batches in flight.
        working_bytes: of the layer at work where layers are recomputed.
        logits_bytes: of the head and the loss.
        fragmentation_bytes: held by the allocator beyond activations.
        overhead_bytes: context of the GPU's driver, buffers of collectives and of the framework.
    """

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    working_bytes: float
    logits_bytes: float
    fragmentation_bytes: float
    overhead_bytes: float

    @property
    def total_bytes(self) -> float:
        """All together."""
        return sum(map(float, vars(self).values()))

    @property
    def tensor_bytes(self) -> float:
        """Of tensors alone."""
        return self.total_bytes - self.fragmentation_bytes - self.overhead_bytes

    @property
    def state_bytes(self) -> float:
        """What does not depend on the batch."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


def activation_bytes(training: Training) -> float:
    """Kept for backward by one layer for one micro-batch on one rank."""
    model, layout = training.model, training.layout
    dealt = layout.tp if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return 2 * training.tokens * model.hidden / dealt
    fused, selective = training.engine.fused_attention, layout.recompute == "selective"
    inner = model.ffn * max(1, model.top_k)
    whole = (8 if model.gated else 10) * model.hidden
    shared = 4 * model.hidden + 4 * model.kv_width + (6 if model.gated else 4) * inner
    if fused and selective:  # normalised inputs and activations are computed again
        whole, shared = whole - 4 * model.hidden, shared - 2 * inner
    scores = 0 if fused or selective else 5 * model.heads * model.sequence
    return training.tokens * (whole / dealt + (shared + scores) / layout.tp)


def memory(training: Training) -> Memory:
    """Predicts the memory of the fullest rank: of the first stage or the last."""
    return max((_stage(training, last=last) for last in (False, True)), key=lambda each: each.total_bytes)


def _stage(training: Training, *, last: bool) -> Memory:
    model, layout, reserves = training.model, training.layout, training.efficiency.reserves
    weights, gradients, optimizer = _state(training)
    layers = layers_of_ranks(model, layout.pp)[-1 if last else 0]
    kept = in_flight(layout.pipe, depth_first=layout.depth_first) / layout.vpp
    if last and layout.pp > 1 and layout.depth_first:
        kept = 1.0
    logits = _LOGIT_BYTES * training.tokens * ceil(model.vocab / layout.tp) if last or layout.pp == 1 else 0.0
    activations = kept * layers * activation_bytes(training)
    whole = replace(training, layout=replace(layout, recompute="none"))
    working = activation_bytes(whole) if layout.recompute == "full" else 0.0
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=activations,
        working_bytes=working,
        logits_bytes=logits,
        fragmentation_bytes=reserves.fragmentation * (activations + working),
        overhead_bytes=reserves.overhead_bytes,
    )


def _state(training: Training) -> tuple[float, float, float]:
    """Weights, gradients, optimizer; ZeRO deals the optimizer, then gradients, then weights.

    Gradients summed up in 2 bytes become 4 where the optimizer uses them; those summed up in 4 come in 2. With stage 3
    the master weights are the ones kept, and two layers are whole at a time: one at work, the next on its way.
    """
    layout = training.layout
    mine, replicas = stage_parameters(training.model, layout), layout.replicas
    narrow = training.engine.gradient_bytes < _FP32
    optimizer = (_OPTIMIZER_BYTES + (_FP32 if narrow else 0)) * mine / (replicas if layout.zero_stage >= 1 else 1)
    each = 2 if narrow else _FP32 + 2
    gradients = each * mine / (replicas if layout.zero_stage >= 2 else 1)
    if layout.zero_stage < 3:
        return 2 * mine, gradients, optimizer
    at_work = _layers_at_work(training) * training.model.layer_parameters / layout.tp
    return 2 * 2 * at_work, gradients + each * at_work, optimizer


def _layers_at_work(training: Training) -> int:
    """Layers that are gathered together: one, but a whole stage where all micro-batches go through it one by one."""
    layout = training.layout
    if layout.schedule != "breadth-first" or layout.pp == 1:
        return 1
    return ceil(max(layers_of_ranks(training.model, layout.pp)) / layout.vpp)
