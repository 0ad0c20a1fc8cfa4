"""Losses that spread tokens over experts. They are returned, never kept; what is counted is a value.

With c_e the choices of expert e, S_e the sum of its scores over tokens (rows sum to one), N tokens, E experts:

  family           loss                            all even    also computed by
  "switch"         E / N^2 sum_e c1_e S_e          1           DeepSpeed top-1 and top-2, Tutel; c1: first choices
  "megatron"       E / (k N^2) sum_e c_e S_e       1           DeepSpeed top-k, MegaBlocks
  "huggingface"    E / N^2 sum_e c_e S_e           k           Mixtral, Qwen-MoE, OLMoE in transformers

(Switch, arXiv 2101.03961, eq. 4 to 6.) Choices count before capacity drops, padding does not, and counts carry no
gradient. A loss is linear in S, so ranks need to agree on integers only: give `summed` what adds them over the axes
that share the batch, and each rank's loss is its part; parts add up to the loss of the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from meshwright.moe.errors import BalanceError
from meshwright.moe.routing import Routing, check_real, count_choices, first_largest
from meshwright.parallel.errors import nearest

__all__ = ["Family", "Tally", "Total", "balance_loss", "summed", "tally", "z_loss"]

Family = Literal["switch", "megatron", "huggingface"]

Total: TypeAlias = Callable[[Tensor], Tensor]
"""Integers of this rank -> their sums over ranks."""


@dataclass(frozen=True, eq=False)
class Tally:
    """What balance losses need to know of a routing; may have leading dims, such as one for sequences.

    Tallies add up: over micro-batches, or over layers as `transformers` does.

    Args:
        counts: int64 [..., k, num_experts], tokens that asked for each expert as their first, second, ... choice.
        score_sums: [..., num_experts], with gradients.
        num_tokens: int64 [...], without padding.

    Raises:
        BalanceError: for counts of another dtype; bfloat16 is exact up to 256 only.
    """

    counts: Tensor
    score_sums: Tensor
    num_tokens: Tensor

    def __post_init__(self) -> None:
        for name in ("counts", "num_tokens"):
            found = getattr(self, name).dtype
            if found != torch.int64:
                raise BalanceError(f"{name} of a tally are {found}; count in int64")

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.counts + other.counts, self.score_sums + other.score_sums, self.num_tokens + other.num_tokens)


def tally(routing: Routing, *, sections: int | None = None, plain: bool = False) -> Tally:
    """Counts what was asked.

    Args:
        routing: with scores.
        sections: equal sections of its tokens, such as sequences, to be counted alone: the tally has a leading dim of
            this size, and so has its loss, whose mean is the sequence-wise loss of DeepSeek-V3.
        plain: count the k best scores of each token in place of its choices, as Megatron does where a bias or groups
            changed them.

    Raises:
        BalanceError: for a routing without scores, or sections that do not divide its tokens.

    >>> from meshwright.moe.top_k import TopK
    >>> found = tally(TopK(num_experts=2, k=1).route(torch.tensor([[1.0, 0.0], [2.0, 0.0]])))
    >>> found.counts.tolist(), found.num_tokens.item()
    ([[2, 0]], 2)
    """
    if routing.scores is None:
        raise BalanceError("a routing without scores has nothing to learn balance with; hash routers need no loss")
    parts = 1 if sections is None else sections
    if parts < 1 or routing.num_tokens % parts:
        raise BalanceError(f"{routing.num_tokens} tokens do not make {parts} equal sections, such as sequences")
    asked = routing.asked
    real = torch.ones_like(asked[:, 0]) if routing.real is None else routing.real
    experts = first_largest(routing.scores, routing.k) if plain else routing.experts
    asked = real[:, None].expand_as(asked) if plain else asked
    sums = torch.where(real[:, None], routing.scores, 0.0).view(parts, -1, routing.num_experts).sum(1)
    counts = count_choices(experts, asked, num_experts=routing.num_experts, parts=parts)
    found = Tally(counts, sums, real.view(parts, -1).sum(1))
    return found if sections is not None else Tally(found.counts[0], found.score_sums[0], found.num_tokens[0])


def summed(tallies: Sequence[Tally], total: Total) -> list[Tally]:
    """The same with counts and tokens of all ranks, by one call of `total`; sums of scores stay those of this rank.

    Args:
        tallies: of one layer or of many, the same on every rank.
        total: adds an int64 vector over the ranks that share the batch.

    >>> own = Tally(torch.tensor([[1, 1]]), torch.ones(2), torch.tensor(2))
    >>> [both] = summed([own], lambda integers: integers * 2)
    >>> both.counts.tolist(), both.num_tokens.item(), both.score_sums.tolist()
    ([[2, 2]], 4, [1.0, 1.0])
    """
    own = [part for each in tallies for part in (each.counts, each.num_tokens)]
    if not own:
        return []
    joined = total(torch.cat([part.flatten() for part in own]))
    parts = [part.view_as(like) for part, like in zip(joined.split([p.numel() for p in own]), own, strict=True)]
    return [
        replace(each, counts=counts, num_tokens=num_tokens)
        for each, counts, num_tokens in zip(tallies, parts[::2], parts[1::2], strict=True)
    ]


def balance_loss(found: Tally, family: Family = "megatron") -> Tensor:
    """How unevenly tokens are spread, without a coefficient; 0 of no tokens.

    Args:
        found: of this rank alone, or with counts of all ranks (`summed`), which makes the loss this rank's part.
        family: decides what counts and the scale; see the table on top.

    Returns:
        [...], the leading dims of the tally.

    Raises:
        BalanceError: for an unknown family.

    >>> even = Tally(torch.tensor([[2, 2], [2, 2]]), torch.tensor([2.0, 2.0]), torch.tensor(4))
    >>> [balance_loss(even, family).item() for family in ("switch", "megatron", "huggingface")]
    [1.0, 1.0, 2.0]
    """
    if family not in get_args(Family):
        raise BalanceError(f"no balance loss is called {family!r}; {nearest(str(family), get_args(Family))}")
    k, num_experts = found.counts.shape[-2:]
    counts = found.counts[..., 0, :] if family == "switch" else found.counts.sum(-2)
    tokens = found.num_tokens.clamp_min(1).to(found.score_sums.dtype)
    scale = num_experts / (k if family == "megatron" else 1)
    return scale * (counts / tokens[..., None] * found.score_sums).sum(-1) / tokens


def z_loss(logits: Tensor, *, real: Tensor | None = None, num_tokens: int | Tensor | None = None) -> Tensor:
    """Mean square of the log of what softmax divides by: keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        logits: [tokens, num_experts], of any float dtype; computed in float32 or wider.
        real: bool [tokens], False for padding.
        num_tokens: real ones of all ranks, which makes the loss this rank's part; those of `logits` where None.

    >>> round(z_loss(torch.zeros(3, 2)).item(), 4)  # log(2) squared
    0.4805
    """
    check_real(real, len(logits))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide = wide if real is None else torch.where(real[:, None], wide, 0.0)
    squares = wide.logsumexp(-1).square()
    own: int | Tensor = len(squares)
    if real is not None:
        squares, own = torch.where(real, squares, 0.0), real.sum()
    total = torch.as_tensor(own if num_tokens is None else num_tokens, device=squares.device)
    return squares.sum() / total.clamp_min(1)
