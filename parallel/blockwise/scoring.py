"""How queries score keys: everything about attention besides the tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, TypedDict

from torch import Tensor

from meshwright.parallel.blockwise.mask import Mask
from meshwright.parallel.errors import WrapError

__all__ = ["BiasFunction", "Scoring", "ScoringKeywords"]

BiasFunction: TypeAlias = Callable[[range, range], Tensor]


class ScoringKeywords(TypedDict, total=False):
    """Keyword arguments that `attend` has from `Scoring`."""

    mask: Mask | None
    scale: float | None
    softcap: float | None
    dropout_p: float
    query_block: int
    kv_block: int
    first_sample: int
    first_head: int


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """score = cap(scale q k) + bias where the mask lets attend; cap(x) = softcap tanh(x / softcap).

    Args:
        mask: which pairs attend; all where None.
        scale: of the products; 1 / sqrt(d) where None.
        softcap: bound of scaled products (arXiv 2408.00118, section 2.1).
        bias: `(queries, keys)`, ranges of positions, to a tensor broadcastable to [batch, heads, queries, keys].
        dropout_p: share of probabilities that are dropped; the others grow by 1 / (1 - p).
        dropout_seed: of what is dropped, together with numbers of sample and head and both positions.
        query_block: most queries of a block whose scores exist at once.
        kv_block: most keys of one.
        first_sample: number of the first sample in the whole model, where a rank holds some of them.
        first_head: number of the first head.

    Raises:
        WrapError: for values that do not exist.
    """

    mask: Mask | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: BiasFunction | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0
    query_block: int = 1024
    kv_block: int = 1024
    first_sample: int = 0
    first_head: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout_p <= 1.0:
            raise WrapError(f"dropout_p={self.dropout_p} is no share; choose from 0 to 1")
        if self.query_block < 1 or self.kv_block < 1:
            raise WrapError(f"query_block={self.query_block} and kv_block={self.kv_block} must be at least 1")
        if self.softcap is not None and not self.softcap > 0:
            raise WrapError(f"softcap={self.softcap} must be above 0; None for none")
