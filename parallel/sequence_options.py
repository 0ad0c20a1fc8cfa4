"""Options that say what is done along the sequence, and with experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.chosen import ContextKind
from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.experts import ExpertPass
from meshwright.parallel.stage_options import StageKeywords, StageOptions

__all__ = ["SequenceKeywords", "SequenceOptions"]


class SequenceKeywords(StageKeywords, total=False):
    """Keyword arguments about the sequence and experts; see `SequenceOptions`."""

    sequence_parallel: bool
    blockwise: Mapping[str, int | None] | Blockwise | None
    cp_kind: ContextKind
    moe: ExpertPass | None


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(StageOptions):
    """What is dealt and what is computed by blocks along the sequence, and experts; `StageOptions` besides.

    Args:
        sequence_parallel: deal the sequence dim over `tp` between the matrices of blocks (arXiv 2205.05198).
        blockwise: compute attention by blocks, and what else `Blockwise` names: sizes, or {} for the default ones.
        cp_kind: how the ranks of `cp` share attention: "ring", "ulysses" (each computes some heads), "hybrid" (both),
            "gather" (each gets all keys), or "auto", which takes the one that sends least.
        moe: what deals experts over the axis `ep` of a mesh: `meshwright.Experts(...)`.

    Raises:
        WrapError: for sizes or kinds that do not exist.
    """

    sequence_parallel: bool = False
    blockwise: Mapping[str, int | None] | Blockwise | None = None
    cp_kind: ContextKind = "auto"
    moe: ExpertPass | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blockwise", Blockwise.of(self.blockwise))
        if self.cp_kind not in get_args(ContextKind):
            raise WrapError(f"cp_kind={self.cp_kind!r} does not exist; {nearest(self.cp_kind, get_args(ContextKind))}")

    @property
    def sizes(self) -> Blockwise | None:
        """Sizes of blocks, where something is computed by blocks."""
        return Blockwise.of(self.blockwise)
