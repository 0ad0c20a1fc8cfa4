"""Random bits from keys instead of call order.

Dropout must not depend on which rank draws it. Every micro-batch therefore draws from a generator seeded by
(seed, step, global micro-batch number): the plain run, which walks the same micro-batches one after the other,
draws the same masks, and so does a run that was killed and resumed. Inside a micro-batch every block draws from a
generator of its own, so that a rank that skips a block draws what follows as the rank does that ran it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

__all__ = ["draw_by_block", "draw_from_key", "generators_kept", "keyed", "seed_of", "skip_block"]

_MARK_BITS = 16
_DRAWN_BITS = 64 - _MARK_BITS
_MARKS = (1 << _MARK_BITS) - 1
_WORD = (1 << 64) - 1
_MARKING = 0x9E3779B97F4A7C15
_GENERATOR = torch.default_generator


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, and can be told from seeds of others.

    >>> seed_of(0, "step", 1) == seed_of(0, "step", 1), seed_of(0, "step", 1) == seed_of(0, "step", 2)
    (True, False)
    """
    drawn = _digest(repr(key)) >> (_MARK_BITS + 1)
    return drawn << _MARK_BITS | _mark(drawn)


def draw_from_key(*key: int | str) -> None:
    """Draws all random numbers that follow from `key`; whoever asks for it puts the generators back."""
    _draw_from(seed_of(*key))


@contextmanager
def keyed(*key: int | str) -> Iterator[None]:
    """Draws all random numbers inside from `key`, on CPU and the current GPU, and puts the generators back after.

    >>> with keyed(0, "a"):
    ...     first = torch.rand(1)
    >>> with keyed(0, "a"):
    ...     torch.equal(first, torch.rand(1))
    True
    """
    with generators_kept():
        draw_from_key(*key)
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the generators of CPU and the current GPU back after what is inside has drawn from them."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


def draw_by_block(blocks: Mapping[str, nn.Module]) -> None:
    """Makes blocks draw from generators of their own, wherever they are called inside of `keyed`.

    That a block is inside is told by the seed that it finds, so a block that is recomputed in backward, where the
    generator's state was put back, draws what it drew before.

    >>> block = nn.Dropout(0.5)
    >>> draw_by_block({"0": block})
    >>> with keyed(0):
    ...     _, after_block = block(torch.ones(9)), torch.rand(1)
    >>> with keyed(0):
    ...     skip_block("0")
    ...     torch.equal(after_block, torch.rand(1))
    True
    """
    for name, block in blocks.items():
        block.forward = _Drawn(name, block.forward)


def skip_block(name: str) -> None:
    """Leaves the generator as it would be after a call of the block."""
    seed = _seed_inside()
    if seed is not None:
        _draw_part(seed, _number(name, "after"))


class _Drawn:
    """A block's own forward between two draws; hooks on modules take longer than a small block."""

    def __init__(self, name: str, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward
        self._inside, self._after = _number(name, "inside"), _number(name, "after")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seed = _seed_inside()
        if seed is None:
            return self.__wrapped__(*args, **kwargs)
        _draw_part(seed, self._inside)
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _draw_part(seed, self._after)


def _seed_inside() -> int | None:
    """The seed that the generator started from, if it is one of ours: if not, this is no place inside of `keyed`."""
    seed: int = _GENERATOR.initial_seed()
    drawn, mark = seed >> _MARK_BITS, seed & _MARKS
    ours = mark == (drawn * _MARKING & _WORD) >> _DRAWN_BITS or _mark(drawn) == mark
    return seed if ours else None


def _draw_part(seed: int, number: int) -> None:
    """Goes on from the seed of a part of what draws from `seed`.

    Mixed as splitmix64 does, since a digest takes a micro-second; told from foreign seeds by a product, for the same
    reason. Written out, since every block of every micro-batch comes by here twice.
    """
    mixed = (seed ^ number) & _WORD
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _WORD
    drawn = (mixed ^ (mixed >> 31)) >> (_MARK_BITS + 1)
    found = drawn << _MARK_BITS | (drawn * _MARKING & _WORD) >> _DRAWN_BITS
    _GENERATOR.manual_seed(found)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(found)


@lru_cache(maxsize=1 << 16)
def _number(name: str, where: str) -> int:
    return _digest(repr((name, where)))


def _draw_from(seed: int) -> None:
    """What `torch.manual_seed` does, for the generators in use only: asking every kind of device takes 0.15 ms."""
    _GENERATOR.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _mark(drawn: int) -> int:
    return _digest(f"mark {drawn}") >> _DRAWN_BITS


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
