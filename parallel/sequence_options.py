"""Options that say what is done along the sequence."""

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.stage_options import StageKeywords, StageOptions

__all__ = ["SequenceKeywords", "SequenceOptions"]


class SequenceKeywords(StageKeywords, total=False):
    """Keyword arguments about the sequence; see `SequenceOptions`."""

    sequence_parallel: bool
    blockwise: Mapping[str, int | None] | Blockwise | None


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(StageOptions):
    """What is dealt and what is computed by blocks along the sequence; `StageOptions` besides.

    Args:
        sequence_parallel: deal the sequence dim over `tp` between the matrices of blocks (arXiv 2205.05198).
        blockwise: compute attention by blocks, and what else `Blockwise` names: sizes, or {} for the default ones.

    Raises:
        WrapError: for sizes that do not exist.
    """

    sequence_parallel: bool = False
    blockwise: Mapping[str, int | None] | Blockwise | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blockwise", Blockwise.of(self.blockwise))

    @property
    def sizes(self) -> Blockwise | None:
        """Sizes of blocks, where something is computed by blocks."""
        return Blockwise.of(self.blockwise)
