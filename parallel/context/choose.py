"""`cp_kind: auto`: the kind that spends the least time on sending, by formula (`traffic`); without torch.

  seconds = exchanged bytes / speed + max(0, ring bytes / speed - what hides them)

Exchanges are waited for; hops of a ring are under way while a rank computes, 4 b h s^2 / N operations in forward and
10 in backward, half of it where attention is causal. Where speeds are not known, the fewest bytes win.
"""

from dataclasses import dataclass, replace

from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import Hybrid, Kind, Ring, Ulysses
from meshwright.parallel.context.traffic import Shape, Traffic, traffic_of

__all__ = ["Choice", "Links", "choose", "hybrids"]


@dataclass(frozen=True, kw_only=True)
class Links:
    """Where messages travel, and what computes meanwhile.

    Args:
        ranks_per_node: consecutive ranks of `cp` with fast links between them.
        inside_bytes_per_s: of one rank, to ranks of its node.
        between_bytes_per_s: of one rank, to other nodes.
        flops_per_s: of attention on one rank.
    """

    ranks_per_node: int
    inside_bytes_per_s: float
    between_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Choice:
    """A kind, and why."""

    kind: Kind
    reason: str


def choose(shape: Shape, degree: int, *, itemsize: int = 2, causal: bool = True, links: Links | None = None) -> Choice:
    """Picks Ulysses, a ring, or both.

    Args:
        shape: of the attention; its heads are those of one rank of `tp`.
        degree: of `cp`.
        itemsize: bytes of an element.
        causal: whether half of the scores are masked.
        links: speeds; None where they are not known.

    >>> choose(Shape(batch=1, length=65536, heads=32, kv_heads=8, width=128), 8).kind
    Ulysses()
    >>> for line in choose(Shape(batch=1, length=8192, heads=4, kv_heads=4, width=128), 8).reason.split("; "):
    ...     print(line)
    hybrid over groups of 4: sends 18.9 MB per attention and rank, forward and backward
    ring 62.9 MB, hybrid over groups of 2 33.6 MB
    4 heads (4 of keys) are not dealt evenly over 8 ranks
    """
    asked = _Asked(shape, degree, itemsize, causal, links)
    divisors = [each for each in range(1, degree + 1) if degree % each == 0]
    costs = {each: asked.cost(each) for each in divisors if _fits(shape, each)}
    best = min(costs, key=lambda each: (costs[each], -each))
    verb = "sends" if links is None else "waits for links"
    reason = f"{asked.name(best)}: {verb} {asked.words(costs[best])} per attention and rank, forward and backward"
    others = [f"{asked.name(each)} {asked.words(cost)}" for each, cost in costs.items() if each != best]
    odd = " or ".join(str(each) for each in divisors if each not in costs)
    if odd:
        others.append(f"{shape.heads} heads ({shape.kv_heads} of keys) are not dealt evenly over {odd} ranks")
    known = [", ".join(each) for each in (others[: len(costs) - 1], others[len(costs) - 1 :]) if each]
    return Choice(asked.kind(best), "; ".join([reason, *known]))


def hybrids(shape: Shape, degree: int) -> list[int]:
    """Sizes of groups of a `Hybrid` that heads are dealt evenly over.

    >>> hybrids(Shape(batch=1, length=8, heads=4, kv_heads=4, width=8), 8)
    [2, 4]
    """
    return [each for each in range(2, degree) if degree % each == 0 and _fits(shape, each)]


def _fits(shape: Shape, ulysses: int) -> bool:
    """Whether every rank gets as many heads, with key heads of their own or a copy of one."""
    even_keys = shape.kv_heads % ulysses == 0 or ulysses % shape.kv_heads == 0
    return shape.heads % ulysses == 0 and even_keys


@dataclass(frozen=True)
class _Asked:
    """The question, about Ulysses over so many consecutive ranks and rings across them."""

    shape: Shape
    degree: int
    itemsize: int
    causal: bool
    links: Links | None

    def kind(self, ulysses: int) -> Kind:
        """As a value."""
        if ulysses == 1:
            return Ring()
        return Ulysses() if ulysses == self.degree else Hybrid(ulysses)

    def name(self, ulysses: int) -> str:
        """In words."""
        if ulysses == 1:
            return "ring"
        return "ulysses" if ulysses == self.degree else f"hybrid over groups of {ulysses}"

    def words(self, cost: float) -> str:
        """A cost in words."""
        return f"{cost / 1e6:,.1f} MB" if self.links is None else f"{cost * 1e3:,.2f} ms"

    def cost(self, ulysses: int) -> float:
        """Seconds of waiting, or bytes where speeds are not known."""
        dealing = Dealing("zigzag", self.degree)
        found = 0.0
        for backward, operations in ((False, 4), (True, 10)):
            sent = traffic_of(self.shape, dealing, self.kind(ulysses), rank=0, backward=backward)
            found += sent.sent_bytes(self.itemsize) if self.links is None else self._seconds(sent, ulysses, operations)
        return found

    def _seconds(self, sent: Traffic, ulysses: int, operations: int) -> float:
        assert self.links is not None, "speeds are known here"
        near, shape = self.links.ranks_per_node, self.shape
        speed = {True: self.links.inside_bytes_per_s, False: self.links.between_bytes_per_s}
        exchange_s = sent.exchanged * self.itemsize / speed[near % ulysses == 0]
        ring_bytes = replace(sent, exchanged=0).sent_bytes(self.itemsize)
        scores = shape.batch * shape.length**2 / self.degree * (0.5 if self.causal else 1.0)
        compute_s = operations * scores * shape.heads * shape.width / self.links.flops_per_s
        return exchange_s + max(0.0, ring_bytes / speed[self.degree <= near] - compute_s)
