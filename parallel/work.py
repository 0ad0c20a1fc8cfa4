"""What one rank does with one block and one micro-batch in one direction, as numbers: no times, no tensors.

Made from the sizes of a transformer, or by running a real model on shapes (see `tracing`); priced by whoever knows what
hardware reaches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CPU_KEYS",
    "ELEMENT_BYTES",
    "FUNCTIONS",
    "FUSED_BACKWARD",
    "Attention",
    "Passes",
    "Precision",
    "Product",
    "Sent",
    "Traced",
    "Work",
    "besides",
]

Precision = Literal["fp64", "fp32", "bf16", "fp8", "fp4"]
"""Of products: "bf16" stands for fp16 as well; operands of fp8 and fp4 are counted with what is read to make them."""

ELEMENT_BYTES = {"fp64": 8.0, "fp32": 4.0, "bf16": 2.0, "fp8": 2.0, "fp4": 2.0}
"""Of an operand, by precision."""

FUNCTIONS = (
    "exp",
    "tanh",
    "sigmoid",
    "gelu",
    "gelu_tanh",
    "gelu_backward",
    "gelu_backward_tanh",
    "silu",
    "silu_backward",
    "_softmax",
    "_softmax_backward_data",
    "_safe_softmax",
    "_log_softmax",
    "_log_softmax_backward_data",
    "native_layer_norm",
    "native_layer_norm_backward",
    "index",
    "index_put",
    "where",
)
"""Operations that take a CPU longer than their bytes, by torch's names for them (and how they approximate, where they
do): functions of each element, sums over rows, elements that are picked."""

CPU_KEYS = 512
"""Keys that torch's fused attention goes through at once on a CPU."""

FUSED_BACKWARD = 2.5
"""FLOPs of fused attention backward over those forward (FlashAttention-2, arXiv 2307.08691, section 4.1: five products
against two)."""


@dataclass(frozen=True)
class Product:
    """`batch` matrix products [m, k] x [k, n].

    Args:
        m: rows of the first.
        n: columns of the second.
        k: inner width.
        batch: of them.
        precision: of its operands.
        more_bytes: read and written besides operands and result, such as sums that the result is added to.

    >>> Product(4, 5, 6, batch=2).flops
    480
    """

    m: int
    n: int
    k: int
    batch: int = 1
    precision: str = "bf16"
    more_bytes: float = 0.0

    @property
    def flops(self) -> int:
        """Of the product in one direction; backward has two such products."""
        return 2 * self.m * self.n * self.k * self.batch

    def bytes(self, element_bytes: float | None = None) -> float:
        """Read and written when each operand moves once.

        Args:
            element_bytes: those of its precision by default.
        """
        each = ELEMENT_BYTES[self.precision] if element_bytes is None else element_bytes
        return each * self.batch * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass(frozen=True)
class Attention:
    """Fused attention, whose scores never reach memory.

    Args:
        flops: of its products.
        scores: exponentials.
        precision: of its operands.
        besides: what a CPU computes more than that; see `besides`.
    """

    flops: float
    scores: float
    precision: str = "bf16"
    besides: float = 0.0


def besides(share: float, length: int, *, borders: int = 1) -> float:
    """Scores that a CPU computes besides those that are not masked, as a share of these.

    It goes through many keys at once, so that half of them, on average, lie beyond each border of a mask.

    Args:
        share: of all scores, those that are not masked.
        length: keys.
        borders: at which scores begin, or end, to be masked.

    >>> besides(0.5, 256), besides(0.5, 1024), besides(1.0, 1024, borders=0)
    (1.0, 0.5, 0.0)
    """
    seen = max(share, 1.0 / length)
    return min(1.0, seen + borders * CPU_KEYS / 2 / length) / seen - 1.0


@dataclass(frozen=True)
class Sent:
    """A collective that a rank waits for.

    Args:
        axis: of the mesh.
        kind: "all_reduce", "all_gather", "reduce_scatter", "all_to_all"; "hop" to the next rank of a ring.
        size_bytes: of the whole tensor, as the ledger counts it; of an all-to-all what one rank sends to all, itself
            included; of a hop what it sends.
        consecutive: ranks of the axis, side by side, that take part; 0 for all.
    """

    axis: str
    kind: str
    size_bytes: float
    consecutive: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done in one direction.

    Args:
        products: of matrices.
        attentions: fused.
        moved_bytes: read and written by all other operations.
        operations: started by the host, on tensors; views aside.
        drawn: random numbers.
        computed: names of `FUNCTIONS`, each with the elements made by it.
        sent: collectives, in order.
        saved_bytes: kept for backward.
        working_bytes: held at once at most, besides what was there before and what is kept.
        growing_bytes: the same where gradients of parameters stay as they are made, and none were there before.
        holding_bytes: the same where nothing that forward kept is let go before the end, as where it was recomputed.
    """

    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    moved_bytes: float = 0.0
    operations: float = 0.0
    drawn: float = 0.0
    computed: tuple[tuple[str, float], ...] = ()
    sent: tuple[Sent, ...] = ()
    saved_bytes: float = 0.0
    working_bytes: float = 0.0
    growing_bytes: float = 0.0
    holding_bytes: float = 0.0

    @property
    def flops(self) -> float:
        """Of products and attention.

        >>> Work(products=(Product(1, 1, 1),), attentions=(Attention(4.0, 1.0),)).flops
        6.0
        """
        return sum((each.flops for each in self.products), 0.0) + sum(each.flops for each in self.attentions)

    def __add__(self, other: "Work") -> "Work":
        """One after the other."""
        return Work(
            products=self.products + other.products,
            attentions=self.attentions + other.attentions,
            moved_bytes=self.moved_bytes + other.moved_bytes,
            operations=self.operations + other.operations,
            drawn=self.drawn + other.drawn,
            computed=self.computed + other.computed,
            sent=self.sent + other.sent,
            saved_bytes=self.saved_bytes + other.saved_bytes,
            working_bytes=max(self.working_bytes, other.working_bytes),
            growing_bytes=max(self.growing_bytes, other.growing_bytes),
            holding_bytes=max(self.holding_bytes, other.holding_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """A block in both directions.

    Args:
        forward: with what it keeps.
        backward: of the same.
        input_bytes: of what it is given and gradients go back to: all that is kept of a block that is recomputed.
        reread_bytes: the part of what forward keeps that is such an input itself.
        waiting_bytes: of gradients that wait between the halves of a backward, where paths to weights turn off.
        made_bytes: of gradients of parameters that nothing before it in backward has used.
        is_tied: whether it uses a parameter that others use, too.
    """

    forward: Work
    backward: Work
    input_bytes: float = 0.0
    reread_bytes: float = 0.0
    waiting_bytes: float = 0.0
    made_bytes: float = 0.0
    is_tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What a rank does for one micro-batch of a model, block by block.

    Args:
        blocks: name -> both directions, in the model's order; equal ones share a value.
        before: what stands before blocks and between them.
        after: what stands behind the last one called, the loss included.
    """

    blocks: Mapping[str, Passes]
    before: Passes
    after: Passes

    @property
    def forward_flops(self) -> float:
        """Of all."""
        return sum(each.forward.flops for each in (*self.blocks.values(), self.before, self.after))
