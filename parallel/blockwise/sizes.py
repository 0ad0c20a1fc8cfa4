"""The option `blockwise`: how large the blocks are in which a model computes along its sequence, and in which order."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from meshwright.parallel.errors import WrapError, nearest

__all__ = ["Blockwise"]


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """Sizes of blocks, in positions of the sequence (arXiv 2305.19370).

    Args:
        query_block: queries whose scores are made at once.
        kv_block: keys that they meet at once.
        ffn_block: positions that a feed-forward layer takes at once; None takes all.
        layer_block: positions that all of a block but its attention takes at once, of which only its input and what
            attention gave are kept; None takes all. It does what `ffn_block` does, and more.
        loss_block: positions whose scores over the vocabulary are made at once; None makes all.
        loss_in_advance: compute the loss's gradients with it, while scores are there. Backward then makes none anew,
            three products instead of four, where it follows at once (schedule "accumulate"); micro-batches that went
            forward each hold a gradient of the head's weight until then.

    Raises:
        WrapError: for sizes below 1 and those that exclude each other, or `loss_in_advance` without `loss_block`.
    """

    query_block: int = 1024
    kv_block: int = 1024
    ffn_block: int | None = None
    layer_block: int | None = None
    loss_block: int | None = None
    loss_in_advance: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.loss_in_advance, bool):
            raise WrapError(f"blockwise: loss_in_advance={self.loss_in_advance!r} is neither True nor False")
        if self.loss_in_advance and self.loss_block is None:
            raise WrapError("blockwise: loss_in_advance is about a loss by blocks; give loss_block too")
        for field in fields(self):
            if field.name.endswith("_block"):
                _check_size(field.name, getattr(self, field.name), may_miss=field.default is None)

        if self.ffn_block is not None and self.layer_block is not None:
            raise WrapError(
                f"blockwise: with layer_block={self.layer_block} feed-forward runs by blocks too; leave out ffn_block"
            )

    @classmethod
    def of(cls, given: "Blockwise | Mapping[str, Any] | None") -> "Blockwise | None":
        """The option as a user writes it.

        >>> Blockwise.of({"kv_block": 512}) == Blockwise(query_block=1024, kv_block=512, ffn_block=None)
        True

        Raises:
            WrapError: naming the nearest size for an unknown one.
        """
        if given is None or isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise WrapError(f"blockwise={given!r} is no mapping of sizes; write blockwise={{}} for the default ones")
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                raise WrapError(f"blockwise has no size {name!r}; {nearest(str(name), names)}")
        return cls(**given)


def _check_size(name: str, size: Any, *, may_miss: bool) -> None:
    if size is None and may_miss:
        return
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise WrapError(
            f"blockwise: {name}={size!r} is no size of a block; give a whole number of at least 1"
            f"{', or None for no blocks' if may_miss else ''}"
        )
