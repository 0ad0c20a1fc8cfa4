"""What attention dropout keeps: a function of numbers, not of the order in which they are asked for.

A probability is kept by a hash of (seed, sample, head, query position, key position), so it is the same one in forward
and backward, for every block size, every dealing of the sequence, and on every device. Rows and columns are hashed to
64 bits each (splitmix64, Steele et al. 2014), and 32 bits of both are mixed by the finalizer of MurmurHash3.
"""

import torch
from torch import Tensor

from meshwright.parallel.blockwise.mask import Frame, places

__all__ = ["kept"]

_GOLDEN = 0x9E3779B97F4A7C15


def kept(queries: range, keys: range, frame: Frame, *, seed: int, share: float, dtype: torch.dtype) -> Tensor:
    """Factors of probabilities [batch, heads, queries, keys]: 0, or 1 / (1 - share).

    Args:
        queries: positions.
        keys: positions.
        frame: numbers of samples and heads, and the device.
        seed: any integer.
        share: of probabilities that are dropped.
        dtype: of the factors.

    >>> draw = {"seed": 1, "share": 0.5, "dtype": torch.float32}
    >>> block = kept(range(6), range(6), Frame(), **draw)
    >>> torch.equal(block[..., 2:4, 3:], kept(range(2, 4), range(3, 6), Frame(), **draw))
    True
    """
    rows = torch.full((1, 1, 1), _signed(seed, 64), dtype=torch.int64, device=frame.device)
    for dim, numbers in enumerate((frame.batch, frame.heads, queries)):
        rows = _mixed_64(rows * _signed(_GOLDEN, 64) + places(numbers, frame.device).reshape(*_one_dim(dim)))
    columns = _mixed_64(places(keys, frame.device) * _signed(_GOLDEN, 64) + _signed(~seed, 64))
    bits = _low_32(rows).unsqueeze(-1) ^ _low_32(columns)
    if share >= 1.0:
        return torch.zeros_like(bits, dtype=dtype)
    dropped = min(round(share * (1 << 32)), (1 << 32) - 1)
    return (_mixed_32(bits) >= dropped - (1 << 31)).to(dtype).mul_(1.0 / (1.0 - share))


def _one_dim(dim: int) -> list[int]:
    return [-1 if each == dim else 1 for each in range(3)]


def _mixed_64(bits: Tensor) -> Tensor:
    """Multiplication of int64 wraps, as wanted; >> copies the sign, so what it shifts in is masked away."""
    bits = (bits ^ _shifted(bits, 30, 64)) * _signed(0xBF58476D1CE4E5B9, 64)
    bits = (bits ^ _shifted(bits, 27, 64)) * _signed(0x94D049BB133111EB, 64)
    return bits ^ _shifted(bits, 31, 64)


def _mixed_32(bits: Tensor) -> Tensor:
    """In place: these are as many as scores."""
    bits = bits.bitwise_xor_(_shifted(bits, 16, 32)).mul_(_signed(0x85EBCA6B, 32))
    bits = bits.bitwise_xor_(_shifted(bits, 13, 32)).mul_(_signed(0xC2B2AE35, 32))
    return bits.bitwise_xor_(_shifted(bits, 16, 32))


def _shifted(bits: Tensor, by: int, width: int) -> Tensor:
    return (bits >> by).bitwise_and_((1 << (width - by)) - 1)


def _low_32(bits: Tensor) -> Tensor:
    return ((bits << 32) >> 32).to(torch.int32)


def _signed(number: int, width: int) -> int:
    number &= (1 << width) - 1
    return number - (1 << width) if number >> (width - 1) else number
