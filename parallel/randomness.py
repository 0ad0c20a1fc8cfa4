"""Random bits from keys instead of call order.

Dropout must not depend on which rank draws it. Every micro-batch therefore draws from a generator seeded by
(seed, step, global micro-batch number): the plain run, which walks the same micro-batches one after the other,
draws the same masks, and so does a run that was killed and resumed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch

__all__ = ["keyed", "seed_of"]


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
        yield
