"""Where tokens go when no values say so: what a fake rank and a prediction assume, here and nowhere else.

Choices are as those of a router that prefers nobody, dealt like cards: places are shuffled (always alike), and each
token takes the next k. Loads differ by at most one, and a token visits as many nodes as any k experts lie on. Ranks are
taken to choose alike, so what others tell of theirs is what this one has: torch's fake process group answers a gather
so, and `as_sent` an exchange.

  who chooses            what is assumed
  a router of this       each of its levels chooses evenly; its capacity drops what it drops of such choices
  package
  a model's own router   experts are chosen evenly and all choices are sent, whatever groups or capacity it has

Choices have values then, and so has all that is made of them `with_values`; tokens and weights have none.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import lcm
from random import Random

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily as with_values

__all__ = ["as_sent", "even_choices", "has_values", "with_values"]


def has_values(tensor: Tensor) -> bool:
    """Whether somebody could ask for them.

    >>> has_values(torch.zeros(1)), has_values(torch.zeros(1, device="meta"))
    (True, False)
    """
    return not isinstance(tensor, FakeTensor) and not tensor.is_meta


def even_choices(
    rows: int, k: int, places: int, *, within: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Even choices; they have values inside of `with_values`.

    Args:
        rows: that choose.
        k: different places for each.
        places: to choose from.
        within: int64 [rows], whose places each row chooses from, such as its node's; all the same where None.
        device: of the choices.

    Returns:
        int64 [rows, k]

    >>> even_choices(6, 1, 3).flatten().bincount().tolist()
    [2, 2, 2]
    >>> even_choices(4, 1, 2, within=torch.tensor([0, 1, 0, 1])).flatten().tolist()  # two rows of each node, one each
    [1, 1, 0, 0]
    """
    dealt = torch.tensor(_dealt(rows * k, k, places), dtype=torch.int64, device=device).view(rows, k)
    if within is None or not rows:
        return dealt
    order = within.argsort(stable=True)
    sizes = within.bincount()
    before = torch.arange(rows, device=device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=rows)
    return dealt[torch.empty_like(order).scatter_(0, order, before)]


def as_sent(arrived: Tensor, sent: Tensor, sizes: Sequence[int], *, rank: int) -> Tensor:
    """What arrived; where it has no values, what this rank sends to itself, from each of the ranks.

    Args:
        arrived: [rows, ...]
        sent: by this rank, [sum of sizes, ...]
        sizes: rows for each rank.
        rank: this one.

    >>> sent = torch.tensor([7, 8, 9])
    >>> as_sent(torch.zeros(4, device="meta"), sent, [1, 2], rank=1).tolist()
    [8, 9, 8, 9]
    """
    if has_values(arrived) or not has_values(sent):
        return arrived
    own: Tensor = sent.split(list(sizes))[rank]
    return own.repeat(len(sizes), *[1] * (own.dim() - 1))


@lru_cache(maxsize=16)
def _dealt(number: int, k: int, places: int) -> tuple[int, ...]:
    """Shuffled anew whenever a token ends with a shuffle's last place, so that no token has a place twice."""
    chance, found = Random(0), list[int]()
    while len(found) < number:
        shuffled = chance.sample(range(places), places)
        found += shuffled * (lcm(places, k) // places)
    return tuple(found[:number])
