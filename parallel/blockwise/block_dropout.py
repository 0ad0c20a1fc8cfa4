"""Dropout on blocks of positions with the masks of the whole: numbers depend on no size of blocks."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from meshwright.parallel.errors import WrapError

__all__ = ["BlockDropout"]


class BlockDropout(TorchFunctionMode):
    """A context in which a call that is repeated block by block drops what one call on all positions would.

    The first block of each dropout draws the mask of all positions (one byte for each element). Where another mode
    decides what is drawn, it is asked, and what it said is kept, since it may say something else next time; a mode
    that never does says `may_draw = False`.

    Args:
        length: all positions, dim -2 of what drops.

    Attributes:
        masks: of the dropouts of the call, in order.
        kept: whether the masks cannot be drawn again.

    >>> with torch.random.fork_rng(), BlockDropout(4) as dropout:
    ...     parts = [functional.dropout(torch.ones(2, 3)) for _ in map(dropout.at, [slice(0, 2), slice(2, 4)])]
    >>> torch.equal(torch.cat(parts), dropout.masks[0] * 2.0)
    True
    """

    def __init__(self, length: int, masks: list[Tensor] | None = None) -> None:
        super().__init__()
        self.masks = masks or []
        self.kept = bool(masks)
        self._length = length
        self._block = slice(0, length)
        self._number = 0

    def at(self, block: slice) -> None:
        """The next calls are for positions `block`."""
        self._block, self._number = block, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replaces dropouts and passes every other call on."""
        if func is functional.dropout:
            return self._dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return functional.dropout(input, p, training, inplace)
        self._check(input)
        if self._number == len(self.masks):
            self.masks.append(self._drawn(input, p))
        mask = self.masks[self._number][..., self._block, :].to(input.dtype)
        self._number += 1
        kept = input * (mask.div_(1 - p) if p < 1 else mask)
        return input.copy_(kept) if inplace else kept

    def _check(self, input: Tensor) -> None:
        size = len(range(*self._block.indices(self._length)))
        if input.shape[-2:-1] != (size,):
            raise WrapError(
                f"dropout on {tuple(input.shape)} inside of a call on {size} positions, which are not its second last "
                "dim, so the whole run's mask cannot be cut for it; leave out ffn_block, or layer_block, or set its "
                "dropout to 0"
            )

    def _drawn(self, input: Tensor, p: float) -> Tensor:
        shape = (*input.shape[:-2], self._length, input.shape[-1])
        if any(getattr(each, "may_draw", True) for each in _get_current_function_mode_stack()):
            self.kept = True
            return functional.dropout(torch.ones(shape, dtype=input.dtype, device=input.device), p) != 0
        return torch.empty(shape, dtype=torch.bool, device=input.device).bernoulli_(1 - p)
