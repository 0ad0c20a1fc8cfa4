"""How evenly rows are spread over experts and nodes: numbers made from integer counts, which add up exactly.

Add counts over ranks and micro-batches first; shares and entropies of parts cannot be averaged.
"""

from dataclasses import dataclass
from math import fsum, log

from meshwright.moe.errors import MetricsError

__all__ = ["Load"]


@dataclass(frozen=True)
class Load:
    """The rows of each expert of one layer. Where there are none at all, shares, ratios and entropies are 0.

    Args:
        counts: rows of each expert, of all ranks that share the batch.
        num_nodes: that the experts lie on in order, equally many on each.

    Raises:
        MetricsError: for counts below 0, no expert, or nodes that cannot share the experts.

    >>> load = Load((6, 1, 1, 0), num_nodes=2)
    >>> load.shares, load.worst_ratio, load.node_shares, load.worst_node_ratio, load.dead
    ((0.75, 0.125, 0.125, 0.0), 3.0, (0.875, 0.125), 1.75, (3,))
    """

    counts: tuple[int, ...]
    num_nodes: int = 1

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0:
            raise MetricsError(f"loads {list(self.counts)[:8]}: give the rows of each expert, 0 or more")
        number = self.num_experts
        if self.num_nodes < 1 or number % self.num_nodes:
            legal = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
            raise MetricsError(f"{number} experts do not lie evenly on {self.num_nodes} nodes; choose from: {legal}")

    @property
    def num_experts(self) -> int:
        """Of all ranks."""
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        """Of all experts: choices that are sent."""
        return sum(self.counts)

    @property
    def node_counts(self) -> tuple[int, ...]:
        """Rows of the experts of each node."""
        each = self.num_experts // self.num_nodes
        return tuple(sum(self.counts[start : start + each]) for start in range(0, self.num_experts, each))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all rows, by expert."""
        return _shares(self.counts)

    @property
    def node_shares(self) -> tuple[float, ...]:
        """Of all rows, by node."""
        return _shares(self.node_counts)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Rows of each expert over their mean: 1 is even."""
        return _ratios(self.counts)

    @property
    def worst_ratio(self) -> float:
        """Rows of the busiest expert over the mean: from 1 (even) to `num_experts`."""
        return max(self.ratios)

    @property
    def worst_node_ratio(self) -> float:
        """Rows of the busiest node over the mean: from 1 (even) to `num_nodes`."""
        return max(_ratios(self.node_counts))

    @property
    def busiest(self) -> int:
        """The expert with the most rows; of equal ones the first."""
        return self.counts.index(max(self.counts))

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts without rows."""
        return tuple(expert for expert, rows in enumerate(self.counts) if rows == 0)

    @property
    def entropy_nats(self) -> float:
        """-sum p ln p of the shares: exp of it is how many experts an even load would keep as busy."""
        return fsum(-share * log(share) for share in self.shares if share)

    @property
    def most_entropy_nats(self) -> float:
        """What the entropy is where all experts are loaded evenly: ln of their number."""
        return log(self.num_experts)

    def as_dict(self) -> dict[str, int | float]:
        """Plain numbers, such as for a line of `metrics.jsonl`.

        >>> {name: round(value, 3) for name, value in Load((3, 1, 0, 0), num_nodes=2).as_dict().items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'rows': 4, 'worst_expert_ratio': 3.0, 'worst_node_ratio': 2.0, 'dead_experts': 2,
         'load_entropy_nats': 0.562, 'most_load_entropy_nats': 1.386}
        """
        return {
            "rows": self.num_rows,
            "worst_expert_ratio": self.worst_ratio,
            "worst_node_ratio": self.worst_node_ratio,
            "dead_experts": len(self.dead),
            "load_entropy_nats": self.entropy_nats,
            "most_load_entropy_nats": self.most_entropy_nats,
        }


def _shares(counts: tuple[int, ...]) -> tuple[float, ...]:
    total = sum(counts)
    return tuple(count / total if total else 0.0 for count in counts)


def _ratios(counts: tuple[int, ...]) -> tuple[float, ...]:
    total = sum(counts)  # one division of integers, so that an even load is 1 exactly
    return tuple(count * len(counts) / total if total else 0.0 for count in counts)
