"""What a routing did, as integers that add up exactly over micro-batches and ranks, and numbers made from them.

  routing --count_routing--> RoutingCounts --+ and summed--> RoutingCounts --load, drops, gate_entropy--> numbers

Counting asks a device for no value; the numbers do, so make them where a step is logged. The entropy of a token's gate
is rounded to 2^-24 nats and counted in those, so that it adds up in any order too: means are exact within 6e-8 nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import log

import torch
from torch import Tensor

from meshwright.moe.balance import Total
from meshwright.moe.errors import MetricsError
from meshwright.moe.load import Load
from meshwright.moe.routing import Routing

__all__ = ["Drops", "GateEntropy", "RoutingCounts", "count_routing", "no_counts", "summed_counts"]

_UNITS_PER_NAT = 2**24


@dataclass(frozen=True)
class Drops:
    """What capacity dropped. Shares of nothing are 0.

    Args:
        num_choices: (token, expert) pairs that were asked for.
        num_dropped_choices: that were not sent.
        num_tokens: without padding.
        num_short_tokens: that lost at least one choice.
        num_unserved_tokens: that no expert sees, so that only the residual is left of them; with expert choice also
            those that no expert took.

    >>> drops = Drops(num_choices=8, num_dropped_choices=2, num_tokens=4, num_short_tokens=2, num_unserved_tokens=0)
    >>> drops.choice_share, drops.token_share, drops.unserved_share
    (0.25, 0.5, 0.0)
    """

    num_choices: int
    num_dropped_choices: int
    num_tokens: int
    num_short_tokens: int
    num_unserved_tokens: int

    @property
    def choice_share(self) -> float:
        """Of choices, those that were dropped."""
        return _share(self.num_dropped_choices, self.num_choices)

    @property
    def token_share(self) -> float:
        """Of tokens, those that lost at least one choice."""
        return _share(self.num_short_tokens, self.num_tokens)

    @property
    def unserved_share(self) -> float:
        """Of tokens, those that no expert sees."""
        return _share(self.num_unserved_tokens, self.num_tokens)

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers, such as for a line of `metrics.jsonl`."""
        return {
            "choices": self.num_choices,
            "tokens": self.num_tokens,
            "dropped_choices": self.num_dropped_choices,
            "dropped_choice_share": self.choice_share,
            "short_token_share": self.token_share,
            "unserved_token_share": self.unserved_share,
        }


@dataclass(frozen=True)
class GateEntropy:
    """How undecided a gate is: the mean over tokens of -sum p ln p of their scores.

    Args:
        mean_nats: 0 where every token is sure; 0 for no tokens, and for routers without scores.
        most_nats: ln of the number of experts, where scores are all alike.

    >>> GateEntropy(mean_nats=0.5, most_nats=1.0).as_dict()
    {'gate_entropy_nats': 0.5, 'most_gate_entropy_nats': 1.0}
    """

    mean_nats: float
    most_nats: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers, such as for a line of `metrics.jsonl`."""
        return {"gate_entropy_nats": self.mean_nats, "most_gate_entropy_nats": self.most_nats}


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingCounts:
    """Integers of one layer's routings; all int64, on the device of the routing.

    Args:
        asked: [num_experts], choices before drops.
        kept: [num_experts], choices that are sent.
        num_tokens: [], without padding.
        num_short_tokens: [], that lost at least one choice.
        num_unserved_tokens: [], that no expert sees.
        num_scored_tokens: [], of routings with scores.
        entropy_units: [], sum over those of the entropy of their scores, each rounded, in 2^-24 nats.
    """

    asked: Tensor
    kept: Tensor
    num_tokens: Tensor
    num_short_tokens: Tensor
    num_unserved_tokens: Tensor
    num_scored_tokens: Tensor
    entropy_units: Tensor

    def __add__(self, other: "RoutingCounts") -> "RoutingCounts":
        if self.num_experts != other.num_experts:
            raise MetricsError(
                f"counts of {self.num_experts} and of {other.num_experts} experts do not add up; add those of one layer"
            )
        mine, more = self._packed(), other._packed()
        return self._unpacked(mine.to(more.device) + more)

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return len(self.kept)

    def summed(self, total: Total) -> "RoutingCounts":
        """The counts of all ranks.

        Args:
            total: adds int64 [n] over the ranks that share the batch; called once.
        """
        return self._unpacked(total(self._packed()))

    def load(self, *, num_nodes: int = 1) -> Load:
        """What is sent to each expert and node.

        Raises:
            MetricsError: for nodes that cannot share the experts.
        """
        return Load(tuple(self.kept.tolist()), num_nodes=num_nodes)

    def drops(self) -> Drops:
        """What is not sent."""
        choices, tokens = int(self.asked.sum()), int(self.num_tokens)
        return Drops(
            num_choices=choices,
            num_dropped_choices=choices - int(self.kept.sum()),
            num_tokens=tokens,
            num_short_tokens=int(self.num_short_tokens),
            num_unserved_tokens=int(self.num_unserved_tokens),
        )

    def gate_entropy(self) -> GateEntropy:
        """How undecided the gate is."""
        units = _share(int(self.entropy_units), int(self.num_scored_tokens))
        return GateEntropy(mean_nats=units / _UNITS_PER_NAT, most_nats=log(self.num_experts))

    def _packed(self) -> Tensor:
        return torch.cat([getattr(self, each.name).flatten() for each in fields(self)])

    def _unpacked(self, packed: Tensor) -> "RoutingCounts":
        sizes = [getattr(self, each.name).numel() for each in fields(self)]
        parts = zip(fields(self), packed.split(sizes), strict=True)
        return RoutingCounts(**{each.name: part.view_as(getattr(self, each.name)) for each, part in parts})


def count_routing(routing: Routing) -> RoutingCounts:
    """Counts one layer's routing of one micro-batch on one rank; nothing in it carries a gradient.

    Args:
        routing: from any router; with no tokens, all counts are 0.

    >>> from meshwright.moe.capacity import Capacity
    >>> from meshwright.moe.top_k import TopK
    >>> router = TopK(num_experts=4, k=1, capacity=Capacity(factor=2.0))
    >>> logits = torch.tensor([[2.0, 1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    >>> one = count_routing(router.route(logits))
    >>> both = one + count_routing(router.route(-logits))
    >>> one.kept.tolist(), both.kept.tolist(), both.drops().num_dropped_choices
    ([2, 0, 0, 0], [2, 2, 1, 0], 1)
    """
    real = routing.real
    if real is None:
        real = torch.ones(routing.num_tokens, dtype=torch.bool, device=routing.experts.device)
    zero = routing.experts.new_zeros(())
    return RoutingCounts(
        asked=routing.counts().sum(0),
        kept=routing.loads(),
        num_tokens=real.sum(),
        num_short_tokens=(routing.asked & ~routing.kept).any(1).sum(),
        num_unserved_tokens=(real & ~routing.kept.any(1)).sum(),
        num_scored_tokens=zero if routing.scores is None else real.sum(),
        entropy_units=zero if routing.scores is None else _entropy_units(routing.scores.detach(), real),
    )


def no_counts(num_experts: int) -> RoutingCounts:
    """Of no tokens, on the CPU until something is added.

    >>> no_counts(2).kept.tolist()
    [0, 0]
    """
    none = torch.zeros((0, 1), dtype=torch.int64)
    no = none.bool()
    return count_routing(Routing(experts=none, weights=none.float(), asked=no, kept=no, num_experts=num_experts))


def summed_counts(counts: Mapping[str, RoutingCounts], total: Total) -> dict[str, RoutingCounts]:
    """The counts of all ranks, of many layers at once.

    Args:
        counts: layer -> counts of this rank; the same layers on all ranks.
        total: adds int64 [n] over ranks; called once.

    >>> summed_counts({"layer": no_counts(2)}, lambda integers: integers + 3)["layer"].kept.tolist()
    [3, 3]
    """
    if not counts:
        return {}
    packed = [each._packed() for each in counts.values()]
    parts = total(torch.cat(packed)).split([len(each) for each in packed])
    return {name: each._unpacked(part) for (name, each), part in zip(counts.items(), parts, strict=True)}


def _entropy_units(scores: Tensor, real: Tensor) -> Tensor:
    nats = torch.special.entr(scores.double()).sum(1)
    return torch.where(real, nats * _UNITS_PER_NAT, 0.0).round().long().sum()


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
