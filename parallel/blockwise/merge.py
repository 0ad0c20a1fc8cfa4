"""Attention over disjoint sets of keys, made one: the online softmax (arXiv 1805.02867, 2205.14135)."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Partial", "empty_partial", "merge", "merge_into"]


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [batch, heads, queries, d], normalised over those keys; 0 where a query attends to none of them.
        lse: [batch, heads, queries], log of the sum of exp(score) over them; -inf where there are none.
    """

    out: Tensor
    lse: Tensor


def merge(one: Partial, other: Partial) -> Partial:
    """Attention over the keys of both; in any order or grouping.

    With m = max(l1, l2) and w_i = exp(l_i - m): out = (w1 o1 + w2 o2) / (w1 + w2), lse = m + log(w1 + w2).

    >>> one = Partial(torch.tensor([1.0]), torch.tensor(0.0))
    >>> merge(one, Partial(torch.tensor([3.0]), torch.tensor(0.0))).out
    tensor([2.])
    >>> merge(one, Partial(torch.tensor([0.0]), torch.tensor(float("-inf"))))
    Partial(out=tensor([1.]), lse=tensor(0.))
    """
    top = torch.maximum(one.lse, other.lse)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf is no number
    weights = [(each.lse - top).exp() for each in (one, other)]
    total = weights[0] + weights[1]  # 0, or at least 1
    some = total.clamp_min(1.0)
    shares = [(each / some).unsqueeze(-1) for each in weights]
    lse = (top + some.log()).masked_fill(total == 0.0, -torch.inf)
    return Partial(one.out * shares[0] + other.out * shares[1], lse)


def empty_partial(query: Tensor, width: int) -> Partial:
    """What attending to no keys gives, in the dtype that partial results are summed in."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, heads, tokens, _ = query.shape
    out = query.new_zeros(batch, tokens, heads, width, dtype=dtype).transpose(1, 2)  # as models put heads together
    return Partial(out, query.new_full(query.shape[:-1], -torch.inf, dtype=dtype))


def merge_into(so_far: Partial, more: Partial) -> None:
    """`merge` in place, with fewer passes over the outputs."""
    top = torch.maximum(so_far.lse, more.lse)
    top.masked_fill_(top == -torch.inf, 0.0)
    old, new = (so_far.lse - top).exp_(), (more.lse - top).exp_()
    total = old + new
    scale = total.clamp_min(1.0)
    so_far.out.mul_((old / scale).unsqueeze(-1)).addcmul_(more.out.to(so_far.out.dtype), (new / scale).unsqueeze(-1))
    so_far.lse.copy_(total.log_().add_(top))
