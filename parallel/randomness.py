"""Random bits from keys instead of call order.

Dropout must not depend on which rank draws it. Every micro-batch therefore draws from a generator seeded by
(seed, step, global micro-batch number): the plain run, which walks the same micro-batches one after the other,
draws the same masks, and so does a run that was killed and resumed. Inside a micro-batch every block draws from a
generator of its own, so that a rank that skips a block draws what follows as the rank does that ran it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b

import torch
from torch import nn

__all__ = ["draw_by_block", "keyed", "seed_of", "skip_block"]

_SCOPES: list[None] = []


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key.

    >>> seed_of(0, "step", 1) == seed_of(0, "step", 1), seed_of(0, "step", 1) == seed_of(0, "step", 2)
    (True, False)
    """
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def keyed(*key: int | str) -> Iterator[None]:
    """Draws all random numbers inside from `key`, on CPU and the current GPU; puts the generators back after.

    >>> with keyed(0, "a"):
    ...     first = torch.rand(1)
    >>> with keyed(0, "a"):
    ...     torch.equal(first, torch.rand(1))
    True
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(seed_of(*key))
        _SCOPES.append(None)
        try:
            yield
        finally:
            _SCOPES.pop()


def draw_by_block(blocks: Mapping[str, nn.Module]) -> None:
    """Makes blocks draw from generators of their own, wherever they are called inside of `keyed`.

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
        seeds: list[int] = []
        block.register_forward_pre_hook(partial(_enter, name, seeds))
        block.register_forward_hook(partial(_leave, name, seeds), always_call=True)


def skip_block(name: str) -> None:
    """Leaves the generator as it would be after a call of the block."""
    if _SCOPES:
        torch.random.manual_seed(seed_of(torch.initial_seed(), name, "after"))


def _enter(name: str, seeds: list[int], module: nn.Module, args: object) -> None:
    del module, args
    if _SCOPES:
        seeds.append(torch.initial_seed())
        torch.random.manual_seed(seed_of(seeds[-1], name))


def _leave(name: str, seeds: list[int], module: nn.Module, args: object, output: object) -> None:
    del module, args, output
    if _SCOPES and seeds:
        torch.random.manual_seed(seed_of(seeds.pop(), name, "after"))
