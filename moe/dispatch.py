"""Tokens sorted by where they go, and results put back together; one rank's part, without any process group.

A choice is one (token, slot); its place is token * slots + slot. `sort_choices` lists the choices that are sent by
expert, and of one expert by place, so that results do not depend on the transport that carried them. Results are added
in the order of slots, never in that of arrival: forward and backward give the same bits each time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn.functional import embedding_bag

from meshwright.moe.assumed import with_values
from meshwright.moe.errors import DispatchError
from meshwright.moe.routing import Routing

__all__ = ["Departure", "combine", "depart", "sort_choices"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Departure:
    """The rows that a rank sends, in the order in which it sends them.

    Args:
        places: int64 [rows], the choice that each row serves.
        counts: int64 [destinations], rows for each, such as for each expert; zeros are ordinary.
        num_tokens: of the rank.
        slots: places of a token.
    """

    places: Tensor
    counts: Tensor
    num_tokens: int
    slots: int

    @property
    def num_rows(self) -> int:
        """Rows that are sent."""
        return len(self.places)

    @property
    def tokens(self) -> Tensor:
        """int64 [rows]: the token of each row."""
        return self.places.div(self.slots, rounding_mode="floor")


def sort_choices(routing: Routing, *, own: range | None = None) -> Departure:
    """What is sent, by expert and then by place.

    Args:
        routing: from any router.
        own: consecutive experts, where only their rows are wanted: what a rank computes that sees all tokens.

    Raises:
        DispatchError: for experts that do not exist.

    >>> from meshwright.moe.top_k import TopK
    >>> routing = TopK(num_experts=3, k=1).route(torch.tensor([[0.0, 0, 9], [9, 0, 0], [0, 0, 9]]))
    >>> found = sort_choices(routing)
    >>> found.tokens.tolist(), found.counts.tolist()
    ([1, 0, 2], [1, 0, 2])
    """
    span = range(routing.num_experts) if own is None else own
    if span.step != 1 or not 0 <= span.start <= span.stop <= routing.num_experts:
        raise DispatchError(f"experts {span} of {routing.num_experts}: use a part of range({routing.num_experts})")
    kept = routing.kept & (routing.experts >= span.start) & (routing.experts < span.stop)
    # what is not sent sorts behind, and is cut off
    experts = torch.where(kept, routing.experts - span.start, len(span)).flatten()
    counts = experts.new_zeros(len(span) + 1).index_add_(0, experts, torch.ones_like(experts))[:-1]
    places = experts.argsort(stable=True)[: int(counts.sum())]
    return Departure(places=places, counts=counts, num_tokens=routing.num_tokens, slots=routing.k)


def depart(tokens: Tensor, departure: Departure) -> Tensor:
    """The rows to send: a copy of a token for each of its choices.

    Args:
        tokens: [tokens, ...]
        departure: of these tokens.

    Returns:
        [rows, ...]; gradients of a token's rows are added in the order of slots.

    Raises:
        DispatchError: for another number of tokens.

    >>> departure = Departure(places=torch.tensor([2, 1]), counts=torch.tensor([2]), num_tokens=2, slots=2)
    >>> depart(torch.tensor([[5.0], [6.0]]), departure).tolist()
    [[6.0], [5.0]]
    """
    if len(tokens) != departure.num_tokens:
        raise DispatchError(
            f"{len(tokens)} tokens for a routing of {departure.num_tokens}; route the ones that are sent"
        )
    return _Depart.apply(tokens, departure)  # type: ignore[no-any-return, no-untyped-call]


def combine(rows: Tensor, departure: Departure, weights: Tensor | None = None) -> Tensor:
    """The weighted sum of each token's rows; zeros for tokens without any.

    Args:
        rows: [rows, ...] in the order of the departure, what came back for each.
        departure: that they left with.
        weights: [tokens, slots], with gradients; ones where None.

    Returns:
        [tokens, ...] in the dtype of the rows; added in float32 or wider.

    Raises:
        DispatchError: for rows or weights of other shapes.

    >>> departure = Departure(places=torch.tensor([2, 1]), counts=torch.tensor([2]), num_tokens=2, slots=2)
    >>> combine(torch.tensor([[5.0], [6.0]]), departure, torch.tensor([[0.1, 0.5], [2.0, 0.1]])).tolist()
    [[3.0], [10.0]]
    """
    shape = (departure.num_tokens, departure.slots)
    if len(rows) != departure.num_rows or (weights is not None and tuple(weights.shape) != shape):
        raise DispatchError(
            f"{len(rows)} rows and weights {None if weights is None else list(weights.shape)} for a departure of "
            f"{departure.num_rows} rows of {list(shape)} choices"
        )
    return _Combine.apply(departure, rows, weights)  # type: ignore[no-any-return, no-untyped-call]


class _Depart(Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, departure: Departure) -> Tensor:
        ctx.departure = departure
        return tokens.index_select(0, departure.tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return combine(gradients[0], ctx.departure), None


class _Combine(Function):
    """By hand, since autograd would add to all rows once for each slot."""

    @staticmethod
    def forward(ctx: Any, departure: Departure, *tensors: Tensor | None) -> Tensor:
        rows, weights = tensors
        assert rows is not None
        ctx.departure = departure
        ctx.save_for_backward(rows, weights)
        combined = _bagged if weights is None or weights.dtype == rows.dtype else _by_slots
        with with_values():  # backward too, where a departure that has some meets gradients that have none
            return combined(rows, departure, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, weights = ctx.saved_tensors
        departure = ctx.departure
        own = gradients[0].index_select(0, departure.tokens)
        if weights is None:
            return None, own, None
        of_rows = of_weights = None
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(torch.promote_types(rows.dtype, weights.dtype), torch.float32)
            products = (own.to(wide) * rows.to(wide)).flatten(1).sum(1).to(weights.dtype)
            of_weights = torch.zeros_like(weights).flatten().index_copy(0, departure.places, products).view_as(weights)
        if ctx.needs_input_grad[1]:
            factors = _beside(weights.flatten()[departure.places], own)
            # in place where nobody differentiates this backward
            of_rows = own * factors if torch.is_grad_enabled() or factors.dtype != own.dtype else own.mul_(factors)
            of_rows = of_rows.to(rows.dtype)
        return None, of_rows, of_weights


def _bagged(rows: Tensor, departure: Departure, weights: Tensor | None) -> Tensor:
    """Sums of rows in one pass of torch's bags, which add in order, in float32 or wider."""
    if not departure.num_rows:
        return rows.new_zeros(departure.num_tokens, *rows.shape[1:])
    sent, factors = _arrivals(departure).flatten(), None if weights is None else weights.reshape(-1)
    starts = torch.arange(departure.num_tokens, device=rows.device) * departure.slots
    if departure.num_rows < len(sent):  # rows that were not sent are in no bag
        there = (sent < departure.num_rows).nonzero().flatten()
        sizes = (sent < departure.num_rows).view(-1, departure.slots).sum(1)
        sent, starts = sent[there], sizes.cumsum(0) - sizes
        factors = None if factors is None else factors[there]
    flat = rows.reshape(len(rows), -1).contiguous()
    sums = embedding_bag(sent, flat, starts, mode="sum", per_sample_weights=factors)
    return sums.view(departure.num_tokens, *rows.shape[1:])


def _by_slots(rows: Tensor, departure: Departure, weights: Tensor | None) -> Tensor:
    """The same with weights that are wider than rows, and are not rounded to their dtype."""
    assert weights is not None
    wide = torch.promote_types(rows.dtype, torch.float32)
    arrivals = _arrivals(departure)
    if departure.num_rows < arrivals.numel():
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])  # stands for what was not sent
    total = rows.new_zeros(departure.num_tokens, *rows.shape[1:], dtype=wide)
    for slot in range(departure.slots):
        part = rows.index_select(0, arrivals[:, slot]).to(wide)
        total.addcmul_(part, _beside(weights[:, slot].to(wide), part))
    return total.to(rows.dtype)


def _arrivals(departure: Departure) -> Tensor:
    """int64 [tokens, slots]: the row that serves each choice; one behind the last for what was not sent."""
    places = departure.places
    found = places.new_full((departure.num_tokens * departure.slots,), departure.num_rows)
    found.scatter_(0, places, torch.arange(departure.num_rows, device=places.device))
    return found.view(departure.num_tokens, departure.slots)


def _beside(factors: Tensor, rows: Tensor) -> Tensor:
    """One factor for each row, broadcastable."""
    return factors.view(-1, *[1] * (rows.dim() - 1))
