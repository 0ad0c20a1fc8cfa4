"""The masks there are, to be combined with `&` and `|`: which query may attend to which key, by position.

>>> packed = causal() & documents(torch.tensor([[0, 0, 0, 1, 1, 1]]))
>>> packed.block(range(3, 6), range(0, 3)), packed.block(range(5, 6), range(3, 6))
(<Uniform.EMPTY: 'empty'>, <Uniform.FULL: 'full'>)
"""

import torch
from torch import Tensor

from meshwright.parallel.blockwise.diagonals import EMPTY, FULL, Uniform
from meshwright.parallel.blockwise.elements import Blocks, Dense, Function, MaskFunction
from meshwright.parallel.blockwise.mask import Frame, Mask, Verdict, causal, window
from meshwright.parallel.blockwise.tokens import Documents, Padding, Tokens
from meshwright.parallel.errors import WrapError

__all__ = [
    "EMPTY",
    "FULL",
    "Frame",
    "Mask",
    "MaskFunction",
    "Uniform",
    "Verdict",
    "blocks",
    "causal",
    "dense",
    "documents",
    "function",
    "padding",
    "window",
]


def documents(ids: Tensor) -> Mask:
    """Packed sequences: a query attends to the keys of its own document.

    Args:
        ids: [s] or [batch, s], integers, over the whole sequence; tokens with a negative id attend to nothing.

    >>> packed = causal() & documents(torch.tensor([[0, 0, 1, 1]]))
    >>> packed.block(range(2, 4), range(0, 2))
    <Uniform.EMPTY: 'empty'>
    >>> packed.block(range(4), range(4)).int()
    tensor([[[[1, 0, 0, 0],
              [1, 1, 0, 0],
              [0, 0, 1, 0],
              [0, 0, 1, 1]]]], dtype=torch.int32)

    Raises:
        WrapError: for ids of another kind.
    """
    if ids.dim() not in (1, 2) or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise WrapError(f"documents() takes integer ids [s] or [batch, s], not {ids.dtype} {list(ids.shape)}")
    return Tokens.of(ids.reshape(-1, ids.shape[-1]).long(), Documents)


def padding(valid: Tensor) -> Mask:
    """Padded sequences: every query attends to the valid keys.

    Args:
        valid: [s] or [batch, s], bool or 0 and 1, over the whole sequence; True where there is a token.

    >>> padding(torch.tensor([[1, 1, 0]])).block(range(3), range(2, 3))
    <Uniform.EMPTY: 'empty'>

    Raises:
        WrapError: for values of another kind.
    """
    if valid.dim() not in (1, 2):
        raise WrapError(f"padding() takes the validity of keys, [s] or [batch, s], not {list(valid.shape)}")
    return Tokens.of((valid.reshape(-1, valid.shape[-1]) != 0).long(), Padding)


def dense(allowed: Tensor) -> Mask:
    """A mask that exists in full.

    Args:
        allowed: bool, [s, s] or broadcastable to [batch, heads, s, s], True where attended.

    Raises:
        WrapError: for other shapes, and for scores, which are a `bias=`.
    """
    if allowed.dtype is not torch.bool:
        raise WrapError(f"dense() takes a bool mask, True where attended, not {allowed.dtype}; give scores as bias=")
    if allowed.dim() not in (2, 4):
        raise WrapError(
            f"dense() takes [queries, keys] or [batch, heads, queries, keys], not {list(allowed.shape)}; add dims of "
            "size 1 for what it does not tell apart"
        )
    allowed = allowed.reshape(*(1,) * (4 - allowed.dim()), *allowed.shape)
    if allowed.shape[1] == allowed.shape[2] == 1 < allowed.shape[3]:
        return padding(allowed[:, 0, 0])
    return Dense(allowed)


def function(allows: MaskFunction) -> Mask:
    """A mask as a function of numbers: `allows(batch, head, query, key)`, which broadcast, to bool.

    >>> even = function(lambda batch, head, query, key: (query - key) % 2 == 0)
    >>> even.block(range(2), range(2)).int()
    tensor([[[[1, 0],
              [0, 1]]]], dtype=torch.int32)

    It must work on index tensors as a whole: no `if`, no `.item()`.
    """
    return Function(allows)


def blocks(pattern: Tensor, block_size: int) -> Mask:
    """Block-sparse attention.

    Args:
        pattern: bool, [query blocks, key blocks] or [batch, heads, query blocks, key blocks].
        block_size: tokens of a block.

    >>> blocks(torch.eye(2, dtype=torch.bool), 128).block(range(128), range(128, 256))
    <Uniform.EMPTY: 'empty'>

    Raises:
        WrapError: for other patterns or sizes.
    """
    if pattern.dtype is not torch.bool or pattern.dim() not in (2, 4) or block_size < 1:
        raise WrapError(
            "blocks() takes a bool pattern [query blocks, key blocks] or [batch, heads, query blocks, key blocks] and "
            f"a block_size of at least 1, not {pattern.dtype} {list(pattern.shape)} and {block_size}"
        )
    return Blocks(pattern.reshape(*(1,) * (4 - pattern.dim()), *pattern.shape), block_size)
