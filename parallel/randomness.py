"""Random bits from keys instead of call order.

Dropout must not depend on which rank draws it. Every micro-batch therefore draws from a generator seeded by
(seed, step, global micro-batch number): the plain run, which walks the same micro-batches one after the other,
draws the same masks, and so does a run that was killed and resumed. Inside a micro-batch what follows a block draws
from a seed of its own, whatever the block drew, so that a rank that skips it goes on as the rank does that ran it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

__all__ = ["draw_by_block", "draw_from", "generators_kept", "keyed", "seed_of", "skip_block"]

_MARK_BITS = 16
_DRAWN_BITS, _MARK_SHIFT = 63 - _MARK_BITS, 64 - _MARK_BITS
_MARKS, _DRAWN, _WORD = (1 << _MARK_BITS) - 1, (1 << _DRAWN_BITS) - 1, (1 << 64) - 1
_MARKING = 0x9E3779B97F4A7C15
_GENERATOR = torch.default_generator


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key, and can be told from seeds of others.

    >>> seed_of(0, "step", 1) == seed_of(0, "step", 1), seed_of(0, "step", 1) == seed_of(0, "step", 2)
    (True, False)
    """
    return _marked(_digest(repr(key)) & _DRAWN)


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
        draw_from(seed_of(*key))
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the generators of CPU and the current GPU back after what is inside has drawn from them."""
    before, on_gpu = _GENERATOR.get_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        _GENERATOR.set_state(before)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)


def draw_by_block(blocks: Mapping[str, nn.Module]) -> None:
    """Makes what follows a block draw from a seed of its own, wherever blocks are called inside of `keyed`.

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
    _draw_behind(_GENERATOR.initial_seed(), _number(name))


class _Drawn:
    """A block's own forward, and a draw; hooks on modules take longer than a small block."""

    def __init__(self, name: str, forward: Callable[..., Any]) -> None:
        self.__wrapped__ = forward
        self._number = _number(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seed = _GENERATOR.initial_seed()
        try:
            return self.__wrapped__(*args, **kwargs)
        finally:
            _draw_behind(seed, self._number)


def _draw_behind(seed: int, number: int) -> None:
    """Draws what follows a block from its number and the seed that the generator had before it.

    A seed that is none of ours says that this is no place inside of `keyed`. Sums, since a digest takes a micro-second
    of every block, and a block that is called twice must not come to the same seed again.
    """
    drawn = seed >> _MARK_BITS
    if seed & _MARKS == (drawn * _MARKING & _WORD) >> _MARK_SHIFT:
        drawn = drawn + number & _DRAWN
        draw_from(drawn << _MARK_BITS | (drawn * _MARKING & _WORD) >> _MARK_SHIFT)


@lru_cache(maxsize=1 << 16)
def _number(name: str) -> int:
    return _digest(name) & _DRAWN


def draw_from(seed: int) -> None:
    """Draws all random numbers that follow from a seed; whoever asks for it puts the generators back.

    It is what `torch.manual_seed` does, for the generators in use only: asking every kind of device takes 0.15 ms.
    """
    _GENERATOR.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _marked(drawn: int) -> int:
    """A seed that is told from foreign ones by its lowest bits."""
    return drawn << _MARK_BITS | (drawn * _MARKING & _WORD) >> (64 - _MARK_BITS)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
