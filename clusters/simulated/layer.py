"""What one layer of one micro-batch takes on one rank, and the head."""

from dataclasses import dataclass
from math import ceil

from meshwright.clusters.simulated.experts import exchange_s
from meshwright.clusters.simulated.model import Product
from meshwright.clusters.simulated.training import Training

__all__ = ["LayerTimes", "elementwise_bytes", "head_s", "layer_times", "score_bytes"]

_BACKWARD_BYTES = 1.5  # of operations between products: gradient and input read, gradient written, against one of each
_SCORE_BYTES = 13  # of one score kept in memory: product 2, softmax 4, dropout 5 (mask 1), product 2
_LOGIT_BYTES = 24  # of one logit, both directions: written, read in fp32 three times, its gradient written and read
_FUSED_BACKWARD = 2.5  # FlashAttention-2 (arXiv 2307.08691, section 4.1): five products backward, two forward
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
        dealt += 4 * (2 * model.hidden + inner)
        whole += 4 * model.hidden
    if model.experts:  # rows put in the experts' order and back into the tokens', read and written each time
        dealt += 8 * model.top_k * model.hidden
    return training.tokens * (whole / (layout.tp if layout.sequence_parallel else 1) + dealt / layout.tp)


def score_bytes(training: Training) -> float:
    """Read and written by one layer's scores where they are kept in memory."""
    return _SCORE_BYTES * training.tokens * training.model.heads / training.layout.tp * training.model.sequence


def layer_times(training: Training) -> LayerTimes:
    """Adds up one layer of one micro-batch."""
    layout, precision = training.layout, training.engine.precision
    products = _weight_products(training)
    linear_s = [training.product_s(each, precision) for each in products]
    weights_s = sum(_weights_s(each, training) for each in products)
    between_s = training.moved_s(elementwise_bytes(training))
    score_forward_s, score_backward_s = _attention_s(training)
    forward_s = sum(linear_s) + between_s + score_forward_s
    again_s = {
        "none": 0.0,
        "selective": between_s if training.engine.fused_attention else score_forward_s,
        "full": forward_s - (linear_s[-1] if training.engine.stops_early else 0.0),
    }[layout.recompute]
    times = LayerTimes(
        forward_s=forward_s,
        backward_s=sum(linear_s) + weights_s + _BACKWARD_BYTES * between_s + score_backward_s,
        recompute_s=again_s,
        tp_s=_tensor_parallel_s(training),
        cp_s=_context_parallel_s(training, score_forward_s + score_backward_s),
        ep_s=_expert_parallel_s(training),
    )
    busy_s, passes = times.total_s, 3 + (layout.recompute == "full")
    floor_s = training.efficiency.floor_s(busy_s, passes, in_series=training.engine.host_in_series)
    return times.times(floor_s / busy_s)


def _weight_products(training: Training) -> list[Product]:
    """With weights, forward. Rows spread evenly over experts; each expert's matrices lie whole on one rank."""
    model, layout = training.model, training.layout
    products = list(model.linear_products(max(1, int(training.tokens)), layout.tp))
    if model.experts:
        mine = max(1, model.experts // layout.ep)
        rows = training.tokens / layout.tp * model.top_k * min(layout.ep, model.experts) / model.experts
        products += model.ffn_products(max(1, int(rows)), 1, mine)
    return products


def _weights_s(forward: Product, training: Training) -> float:
    """The product that gives gradients of weights and adds them to those of earlier micro-batches."""
    product = Product(forward.k, forward.n, forward.m, forward.batch)
    sums = (2 * training.engine.gradient_bytes - 2) * product.m * product.n * product.batch
    return training.product_s(product, training.engine.precision, more_bytes=sums)


def _attention_s(training: Training) -> tuple[float, float]:
    """Forward and backward of scores and what they weigh."""
    model, layout = training.model, training.layout
    if not training.engine.fused_attention:
        queries = max(1, model.sequence // layout.cp)
        products = model.score_products(layout.micro_batch, queries, layout.tp)
        product_s = sum(training.product_s(each) for each in products)
        scores_s = training.moved_s(score_bytes(training))
        return product_s + scores_s, 2 * product_s + _BACKWARD_BYTES * scores_s
    seen = training.tokens * model.heads / layout.tp * model.sequence / 2
    flops = 4 * seen * model.head_dim
    forward_s, backward_s = (
        training.efficiency.attention_s(factor * flops, seen, training.cluster.gpu) for factor in (1.0, _FUSED_BACKWARD)
    )
    return forward_s, backward_s


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
    return 3 * training.product_s(product) + training.moved_s(_LOGIT_BYTES * training.tokens * columns)
