"""Where tokens go: the value that every router returns and every transport takes.

A router is a pure function of logits. It decides in float32 or wider, and of equal scores takes the lower index, so
that a forward that is run again decides the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.moe.assumed import even_choices, has_values
from meshwright.moe.errors import RoutingError

__all__ = ["Routing", "asked_of", "check_real", "count_choices", "first_largest", "usable_logits"]

_MOST_ROUNDS = 16  # measured on CPU: beyond, one stable sort is faster than one search for each choice


@dataclass(frozen=True, eq=False, kw_only=True)
class Routing:
    """Which experts each token visits, and with what weight.

    Args:
        experts: int64 [tokens, k], in order of choice; ids below `num_experts` even where nothing is sent.
        weights: [tokens, k], float32 or wider; exactly 0, without gradient, where nothing is sent.
        asked: bool [tokens, k]: what was chosen; False for padding, and in places without a choice.
        kept: bool [tokens, k]: what is sent, which is less than `asked` where capacity drops.
        num_experts: of all ranks.
        scores: [tokens, num_experts], rows that sum to one, with gradients: what balance losses are made of; None for
            routers that learn nothing.
        real: bool [tokens], False for padding; None where every token is real.

    Raises:
        RoutingError: for shapes that do not fit.

    >>> yes = torch.ones(2, 1, dtype=torch.bool)
    >>> to = torch.tensor([[2], [0]])
    >>> routing = Routing(experts=to, weights=torch.ones(2, 1), asked=yes, kept=yes, num_experts=3)
    >>> routing.loads().tolist(), routing.k
    ([1, 0, 1], 1)
    """

    experts: Tensor
    weights: Tensor
    asked: Tensor
    kept: Tensor
    num_experts: int
    scores: Tensor | None = None
    real: Tensor | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.experts.shape)
        if len(shape) != 2 or self.experts.dtype != torch.int64:
            raise RoutingError(
                f"experts of a routing are int64 [tokens, k], not {self.experts.dtype} {list(shape)}; flatten "
                "[batch, positions] to tokens first"
            )
        for name in ("weights", "asked", "kept"):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise RoutingError(f"{name} of a routing {list(found)} must be shaped as its experts {list(shape)}")
        if self.scores is not None and tuple(self.scores.shape) != (shape[0], self.num_experts):
            raise RoutingError(
                f"scores of a routing {list(self.scores.shape)} must be [tokens, num_experts], "
                f"here {[shape[0], self.num_experts]}"
            )
        check_real(self.real, shape[0])

    @property
    def num_tokens(self) -> int:
        """Rows, with padding."""
        return self.experts.shape[0]

    @property
    def k(self) -> int:
        """Choices of a token."""
        return self.experts.shape[1]

    def num_real(self) -> Tensor:
        """int64 []: tokens that are not padding."""
        if self.real is None:
            return torch.tensor(self.num_tokens, device=self.experts.device)
        return self.real.sum()

    def counts(self) -> Tensor:
        """int64 [k, num_experts]: how many tokens asked for each expert as their first, second, ... choice."""
        return self._count(self.asked)

    def loads(self) -> Tensor:
        """int64 [num_experts]: tokens that are sent to each expert."""
        return self._count(self.kept).sum(0)

    def drops(self) -> Tensor:
        """int64 []: choices that capacity dropped."""
        return (self.asked & ~self.kept).sum()

    def rows(self, some: slice) -> "Routing":
        """That of some of the tokens."""
        return Routing(
            experts=self.experts[some],
            weights=self.weights[some],
            asked=self.asked[some],
            kept=self.kept[some],
            num_experts=self.num_experts,
            scores=None if self.scores is None else self.scores[some],
            real=None if self.real is None else self.real[some],
        )

    def _count(self, which: Tensor) -> Tensor:
        return count_choices(self.experts, which, num_experts=self.num_experts)[0]


def count_choices(experts: Tensor, which: Tensor, *, num_experts: int, parts: int = 1) -> Tensor:
    """Counts choices by their level, without asking a device for a value.

    Args:
        experts: int64 [tokens, k].
        which: bool [tokens, k], those that count.
        num_experts: of all ranks.
        parts: equal parts of the tokens, each counted alone.

    Returns:
        int64 [parts, k, num_experts]

    >>> count_choices(torch.tensor([[1], [0]]), torch.tensor([[True], [False]]), num_experts=2).tolist()
    [[[0, 1]]]
    """
    tokens, k = experts.shape
    part = torch.arange(parts, device=experts.device).repeat_interleave(tokens // parts)
    place = experts + num_experts * (torch.arange(k, device=experts.device) + k * part[:, None])
    found = experts.new_zeros(parts * k * num_experts)
    return found.index_add_(0, place.flatten(), which.flatten().long()).view(parts, k, num_experts)


def usable_logits(logits: Tensor, num_experts: int, *, real: Tensor | None, name: str = "logits") -> Tensor:
    """Logits as routers take them: [tokens, ..., num_experts] in float32 or wider; 0 in rows of padding.

    Args:
        logits: from the gate.
        num_experts: that it should have scored.
        real: bool [tokens], or None.
        name: what errors call them.

    Raises:
        RoutingError: for logits of integers, of another shape, or that no softmax is defined of.

    >>> usable_logits(torch.zeros(2, 4, dtype=torch.bfloat16), 4, real=None).dtype
    torch.float32
    """
    if not logits.is_floating_point():
        raise RoutingError(f"{name} are {logits.dtype}; a router needs floats, as they come from its gate")
    if logits.dim() < 2 or logits.shape[-1] != num_experts:
        raise RoutingError(
            f"{name} {list(logits.shape)} do not end with the {num_experts} scores of each token; flatten "
            f"[batch, positions, {num_experts}] to [tokens, {num_experts}] first"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    check_real(real, len(wide))
    if real is not None:
        rows = real.view(-1, *[1] * (wide.dim() - 1))
        wide = torch.where(rows, wide, 0.0)  # what stands in padding must reach neither errors nor gradients
    _check_finite(wide, name)
    return wide


def asked_of(choices: Tensor, real: Tensor | None) -> Tensor:
    """bool [tokens, k]: all choices of tokens that are not padding.

    >>> asked_of(torch.zeros(2, 1), torch.tensor([True, False])).tolist()
    [[True], [False]]
    """
    yes = torch.ones_like(choices, dtype=torch.bool)
    return yes if real is None else yes & real[:, None]


def check_real(real: Tensor | None, num_tokens: int) -> None:
    """Whether a mask of real tokens fits.

    Raises:
        RoutingError: for another dtype than bool, or another number of tokens.
    """
    if real is not None and (real.dtype != torch.bool or tuple(real.shape) != (num_tokens,)):
        raise RoutingError(
            f"real is {real.dtype} {list(real.shape)}; it is bool [{num_tokens}], one for each token, such as "
            "attention_mask.bool().flatten()"
        )


def first_largest(scores: Tensor, k: int, *, within: Tensor | None = None) -> Tensor:
    """Indices of the k largest scores of each row, largest first; of equal ones the lower index first.

    `torch.topk` may order equal scores otherwise from call to call, and differs between devices. Of scores without
    values the assumed choices.

    Args:
        scores: [..., n] floats; -inf is the least of them, and no index comes twice.
        k: how many.
        within: int64 [...], whose places each row scores; the same for all where None. Matters without values only.

    Returns:
        int64 [..., k]

    >>> first_largest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3).tolist()
    [1, 2, 3]
    """
    if not has_values(scores):
        rows = scores.shape[:-1]
        groups = None if within is None else within.flatten()
        return even_choices(rows.numel(), k, scores.shape[-1], within=groups, device=scores.device).view(*rows, k)
    if k > _MOST_ROUNDS:
        return scores.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    left, found = scores.detach().clamp_min(torch.finfo(scores.dtype).min), []
    for _ in range(k):
        found.append(left.argmax(-1, keepdim=True))
        left.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, -1)


def _check_finite(logits: Tensor, name: str) -> None:
    # the maximum of a row is nan or +inf if anything in it is, and -inf if all of it is
    best = logits.detach().amax(-1)
    if bool(best.isfinite().all()):
        return
    first = (~best.isfinite()).nonzero()[0].tolist()
    values = ", ".join(f"{value:g}" for value in logits[tuple(first)].tolist()[:8])
    raise RoutingError(
        f"{name} of token {first[0]} cannot be routed: [{values}{', ...' if logits.shape[-1] > 8 else ''}]; look for "
        "what made them before the gate, or mark padding by real="
    )
