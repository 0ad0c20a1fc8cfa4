"""Routers that learn nothing: a table from token ids to experts (Hash Layers, arXiv 2106.04426).

No gate, no balance loss, no weight. Where tokens go is known as soon as a batch is: split sizes of all layers can be
made by the loader, before the forward. The paper's best tables are random and balanced ones:

  modulo      id mod E; no table to make, and unbalanced where frequent ids are close
  random      each id its own draw, by a key that is the same on every rank
  balanced    ids by frequency, each to the lightest expert: loads differ by at most the frequency of one id
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, asked_of, check_real
from meshwright.parallel.randomness import seed_of

__all__ = ["HashRouter"]


@dataclass(frozen=True, eq=False)
class HashRouter:
    """A router by token id.

    Args:
        table: int64 [vocabulary, k], the experts of each id, all different.
        num_experts: of all ranks.

    Raises:
        RoutingError: for a table that is not one.

    >>> router = HashRouter.modulo(vocabulary=10, num_experts=4)
    >>> router.route(torch.tensor([3, 4, 9])).experts.flatten().tolist()
    [3, 0, 1]
    """

    table: Tensor
    num_experts: int

    def __post_init__(self) -> None:
        if self.table.dtype != torch.int64 or self.table.dim() != 2 or not self.table.numel():
            raise RoutingError(
                f"a table of experts is int64 [vocabulary, k], not {self.table.dtype} {list(self.table.shape)}"
            )
        if self.table.min() < 0 or self.table.max() >= self.num_experts:
            raise RoutingError(
                f"a table names experts {int(self.table.min())} to {int(self.table.max())}; there are "
                f"{self.num_experts}, from 0"
            )
        ordered = self.table.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise RoutingError("a table names an expert twice for one id; its k experts must differ")

    @classmethod
    def modulo(cls, *, vocabulary: int, num_experts: int) -> "HashRouter":
        """Expert id mod `num_experts`."""
        _check(vocabulary, num_experts, k=1)
        return cls(torch.arange(vocabulary)[:, None] % num_experts, num_experts)

    @classmethod
    def random(cls, *, vocabulary: int, num_experts: int, k: int = 1, seed: int = 0) -> "HashRouter":
        """Each id draws k experts; the same ones on every rank and machine.

        >>> router = HashRouter.random(vocabulary=10, num_experts=4, seed=1)
        >>> torch.equal(router.table, HashRouter.random(vocabulary=10, num_experts=4, seed=1).table)
        True
        """
        _check(vocabulary, num_experts, k=k)
        generator = torch.Generator().manual_seed(seed_of(seed, "hash router"))
        drawn = torch.rand(vocabulary, num_experts, generator=generator)
        return cls(drawn.argsort(dim=-1, stable=True)[:, :k].contiguous(), num_experts)

    @classmethod
    def balanced(cls, frequencies: Sequence[float] | Tensor, *, num_experts: int, k: int = 1) -> "HashRouter":
        """Ids by frequency, most frequent first, each to the k experts with the least so far.

        Args:
            frequencies: of each id in a corpus, 0 or above; any unit.
            num_experts: of all ranks.
            k: experts of each id.

        >>> HashRouter.balanced([5, 1, 4, 1], num_experts=2).table.flatten().tolist()
        [0, 1, 1, 0]
        """
        values = torch.as_tensor(frequencies, dtype=torch.float64)
        _check(len(values), num_experts, k=k)
        if not bool((values.isfinite() & (values >= 0)).all()):
            wrong = int((~(values.isfinite() & (values >= 0))).nonzero()[0])
            raise RoutingError(f"the frequency of id {wrong} is {values[wrong].item()}; a frequency is 0 or above")
        table = torch.empty(len(values), k, dtype=torch.int64)
        lightest = [(0.0, expert) for expert in range(num_experts)]  # a heap already
        for token in values.argsort(descending=True, stable=True).tolist():
            table[token] = torch.tensor(_put(lightest, values[token].item(), k))
        return cls(table, num_experts)

    def route(self, ids: Tensor, *, real: Tensor | None = None) -> Routing:
        """Looks experts up; each of a token's k experts weighs 1 / k.

        Args:
            ids: int64 [tokens].
            real: bool [tokens], False for padding.

        Raises:
            RoutingError: for ids outside of the vocabulary.
        """
        if ids.dtype != torch.int64 or ids.dim() != 1:
            raise RoutingError(
                f"ids are {ids.dtype} {list(ids.shape)}; they are int64 [tokens], such as input_ids.flatten()"
            )
        check_real(real, len(ids))
        ids = ids if real is None else torch.where(real, ids, 0)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.table):
            raise RoutingError(
                f"ids {int(ids.min())} to {int(ids.max())} for a table of {len(self.table)}; make it as long as the "
                "vocabulary, or mark padding by real="
            )
        experts = self.table.to(ids.device)[ids]
        asked = asked_of(experts, real)
        weights = asked.to(torch.float32) / experts.shape[1]
        return Routing(
            experts=experts, weights=weights, asked=asked, kept=asked, num_experts=self.num_experts, real=real
        )


def _put(lightest: list[tuple[float, int]], amount: float, k: int) -> list[int]:
    """Gives an amount to the k lightest of a heap of (load, expert); of equal loads the lower expert."""
    chosen = [heappop(lightest) for _ in range(k)]
    for load, expert in chosen:
        heappush(lightest, (load + amount, expert))
    return [expert for _, expert in chosen]


def _check(vocabulary: int, num_experts: int, *, k: int) -> None:
    if vocabulary < 1 or not 1 <= k <= num_experts:
        raise RoutingError(
            f"a vocabulary of {vocabulary} with k={k} of {num_experts} experts; use at least one id, and k from 1 to "
            f"{max(num_experts, 1)}"
        )
