"""What one layer of one micro-batch takes on one rank, and the head."""

from dataclasses import dataclass, replace
from math import ceil

from meshwright.clusters.simulated.experts import exchange_s
from meshwright.clusters.simulated.training import Training
from meshwright.parallel.work import FUSED_BACKWARD, Attention, Product, Work

__all__ = ["LayerTimes", "elementwise_bytes", "head_s", "layer_times", "layer_works", "score_bytes"]

_BACKWARD_BYTES = 1.5  # of operations between products: gradient and input read, gradient written, against one of each
_SCORE_BYTES = 13  # of one score kept in memory: product 2, softmax 4, dropout 5 (mask 1), product 2
_LOGIT_BYTES = 24  # of one logit, both directions: written, read in fp32 three times, its gradient written and read
_ROWS = 16  # that products with few of them are padded to
_TABLE_ROWS = 128  # tables are padded to a multiple, so that products are aligned


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds of one micro-batch by cause; exposed ones.

    Args:
        forward_s: of products and what lies between them.
        backward_s: of the same.
        recompute_s: of forward again.
        tp_s: collectives of tp.
        cp_s: keys and values of other ranks.
        ep_s: tokens on their way to experts and back.
    """

    forward_s: float
    backward_s: float
    recompute_s: float
    tp_s: float
    cp_s: float
    ep_s: float

    @property
    def total_s(self) -> float:
        """All together."""
        return self.forward_s + self.backward_s + self.recompute_s + self.tp_s + self.cp_s + self.ep_s

    def times(self, factor: float) -> "LayerTimes":
        """Of so many layers."""
        return LayerTimes(**{name: factor * value for name, value in vars(self).items()})


def elementwise_bytes(training: Training) -> float:
    """Read and written between the products of a layer's forward on one rank.

    Norms (read, written) and residual sums (two read, one written) on all of the width unless tp deals positions;
    rotary or biases and the activation on what tp deals. Two bytes each; a dropout writes a mask of one byte.
    """
    model, layout = training.model, training.layout
    whole = (20 if model.gated else 22) * model.hidden
    inner = model.ffn * max(1, model.top_k)
    dealt = 4 * (model.hidden + 2 * model.kv_width) + (6 if model.gated else 4) * inner
    if training.engine.precision != "bf16":  # inputs of products read, and written as they are and transposed
        dealt += 4 * ((2 + model.top_k) * model.hidden + inner)
        whole += 0 if model.experts else 4 * model.hidden
    if model.experts:  # rows put in the experts' order and back into the tokens', read and written each time
        dealt += 8 * model.top_k * model.hidden
    return training.tokens * (whole / (layout.tp if layout.sequence_parallel else 1) + dealt / layout.tp)


def score_bytes(training: Training) -> float:
    """Read and written by one layer's scores where they are kept in memory."""
    return _SCORE_BYTES * training.tokens * training.model.heads / training.layout.tp * training.model.sequence


def layer_works(training: Training) -> tuple[Work, Work, Work]:
    """What is computed for one layer and micro-batch: forward, backward, and of forward again."""
    linear = _weight_products(training)
    between = Work(products=linear, moved_bytes=elementwise_bytes(training))
    scores, scores_back = _attention_works(training)
    forward = between + scores
    backward = scores_back + Work(
        products=(*linear, *(_weight_gradient(each, training) for each in linear)),
        moved_bytes=_BACKWARD_BYTES * between.moved_bytes,
    )
    return forward, backward, _again(training, forward, scores)


def layer_times(training: Training) -> LayerTimes:
    """Adds up one layer of one micro-batch."""
    forward, backward, again = layer_works(training)
    attention_s = sum(map(training.busy_s, _attention_works(training)))
    times = LayerTimes(
        forward_s=training.busy_s(forward),
        backward_s=training.busy_s(backward),
        recompute_s=training.busy_s(again),
        tp_s=_tensor_parallel_s(training),
        cp_s=_context_parallel_s(training, attention_s),
        ep_s=_expert_parallel_s(training),
    )
    busy_s, passes = times.total_s, 3 + (training.layout.recompute == "full")
    floor_s = training.efficiency.floor_s(busy_s, passes, in_series=training.engine.host_in_series)
    return times.times(floor_s / busy_s)


def _again(training: Training, forward: Work, scores: Work) -> Work:
    """Of forward, what is computed once more: nothing, what is cheap, or all but what backward does not need."""
    recompute, engine = training.layout.recompute, training.engine
    if recompute == "none":
        return Work()
    if recompute == "selective":
        return Work(moved_bytes=elementwise_bytes(training)) if engine.fused_attention else scores
    if not engine.stops_early:
        return forward
    last = len(_weight_products(training)) - 1
    return replace(forward, products=forward.products[:last] + forward.products[last + 1 :])


def _weight_products(training: Training) -> tuple[Product, ...]:
    """With weights, forward. Rows spread evenly over experts; each expert's matrices lie whole on one rank."""
    model, layout = training.model, training.layout
    products = list(model.linear_products(max(1, int(training.tokens)), layout.tp))
    if model.experts:
        mine = max(1, model.experts // layout.ep)
        rows = training.tokens / layout.tp * model.top_k * min(layout.ep, model.experts) / model.experts
        products += model.ffn_products(max(1, int(rows)), 1, mine)
    return tuple(replace(each, precision=training.engine.precision) for each in products)


def _weight_gradient(forward: Product, training: Training) -> Product:
    """The product that gives gradients of weights and adds them to those of earlier micro-batches.

    Rows are no inner width of either operand there, so they need not be aligned.
    """
    m, n, k = forward.k, forward.n, _ROWS * ceil(forward.m / _ROWS)
    sums = (2 * training.engine.gradient_bytes - 2) * m * n * forward.batch
    return Product(m, n, k, forward.batch, precision=forward.precision, more_bytes=sums)


def _attention_works(training: Training) -> tuple[Work, Work]:
    """Scores and what they weigh, forward and backward."""
    model, layout = training.model, training.layout
    if not training.engine.fused_attention:
        queries = max(1, model.sequence // layout.cp)
        products = tuple(model.score_products(layout.micro_batch, queries, layout.tp))
        moved = score_bytes(training)
        back = Work(products=2 * products, moved_bytes=_BACKWARD_BYTES * moved)
        return Work(products=products, moved_bytes=moved), back
    seen = training.tokens * model.heads / layout.tp * model.sequence / 2
    flops = 4 * seen * model.head_dim
    forward, backward = (Work(attentions=(Attention(each * flops, seen),)) for each in (1.0, FUSED_BACKWARD))
    return forward, backward


def _tensor_parallel_s(training: Training) -> float:
    """Two all-reduces in each direction, or as many gathers and scatters, and again where forward is recomputed."""
    layout = training.layout
    if layout.tp == 1:
        return 0.0
    one_s = training.gathered_s(2 * training.tokens * training.model.hidden, layout.tp)
    pairs = 4 + 2 * (layout.recompute == "full")
    exposed = training.efficiency.links.tp_exposed if training.engine.overlapped_tp else 1.0
    return exposed * pairs * 2 * one_s


def _context_parallel_s(training: Training, attention_s: float) -> float:
    """Keys and values go round forward, they and their gradients backward; attention hides what it can."""
    model, layout = training.model, training.layout
    if layout.cp == 1:
        return 0.0
    num_bytes = 2 * 2 * layout.micro_batch * model.sequence * model.kv_width / layout.tp
    sent_s = 3 * training.gathered_s(num_bytes, layout.cp, layout.tp)
    hidden_by = attention_s if training.engine.overlapped else 0.0
    return max(sent_s - hidden_by, training.efficiency.links.exposed * sent_s)


def _expert_parallel_s(training: Training) -> float:
    """Rows to experts and back, forward and backward."""
    return 4 * exchange_s(training)


def head_s(training: Training) -> float:
    """Seconds of the head and the loss of one micro-batch, both directions."""
    model = training.model
    if not model.vocab:
        return 0.0
    columns = _TABLE_ROWS * ceil(model.vocab / training.layout.tp / _TABLE_ROWS)
    product = Product(max(1, int(training.tokens)), columns, model.hidden)
    return training.busy_s(Work(products=3 * (product,), moved_bytes=_LOGIT_BYTES * training.tokens * columns))
