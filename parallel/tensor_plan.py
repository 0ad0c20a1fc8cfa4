"""What tensor and sequence parallelism do to a model, as one value: made once, printed, sent, applied.

Names are paths of modules and parameters; everything a rank must know is listed per rank, so that the plan that
one rank made serves all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from meshwright.parallel.layout import Split

__all__ = ["Decision", "Drop", "Stream", "TensorPlan", "starred"]


@dataclass(frozen=True)
class Decision:
    """One row of the plan's table: what becomes of a module, and why."""

    module: str
    placement: str
    reason: str


@dataclass(frozen=True)
class Drop:
    """A dropout inside a unit that sees one dim of the plain tensor in shares.

    Args:
        dim: the dealt dim.
        sizes: size on each rank; None where it is the sequence, whose length changes.
    """

    dim: int
    sizes: tuple[int, ...] | None


@dataclass(frozen=True)
class Stream:
    """A list of blocks between which the sequence dim stays dealt.

    Args:
        blocks: their paths, in order.
        key: the argument of a block that is the stream (a position or a keyword).
    """

    blocks: tuple[str, ...]
    key: int | str


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """Placements of one model along `tp`.

    Attributes:
        degree: ranks of `tp`.
        splits: parameter or buffer -> how one of its dims is dealt; what is not listed is replicated.
        columns: module dealt by outputs -> the row that ends its region.
        rows: module dealt by inputs -> whether its weight is transposed.
        transposed: the same for columns and heads.
        gathers: module -> (region, arguments whose sequence shares are joined before it).
        joined: module -> arguments joined before it, because every rank runs it whole on the full sequence.
        slices: unit -> ((argument, split), ...) of values that carry one number or map per head.
        streams: lists of blocks with a dealt sequence.
        attributes: module -> {attribute: its value on each rank}.
        partial: replicated parameters whose gradients are summed over `tp`.
        drops: unit -> one entry per dropout call in it, None where the plain mask is drawn whole.
        lookups: embeddings dealt by rows of the vocabulary.
        heads: matrices whose scores are dealt by the vocabulary.
        calls: unit or module -> collectives of one forward and backward pass as (kind, elements).
        decisions: the table.
    """

    degree: int
    sequence: bool = False
    splits: Mapping[str, Split] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, bool] = field(default_factory=dict)
    transposed: Mapping[str, bool] = field(default_factory=dict)
    gathers: Mapping[str, tuple[str, tuple[int | str, ...]]] = field(default_factory=dict)
    joined: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    slices: Mapping[str, tuple[tuple[int | str, Split], ...]] = field(default_factory=dict)
    streams: tuple[Stream, ...] = ()
    attributes: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    drops: Mapping[str, tuple[Drop | None, ...]] = field(default_factory=dict)
    lookups: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    calls: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()

    def per_module(self) -> tuple[str, ...]:
        """Names of the attributes that are about modules or parameters by path."""
        return _PER_MODULE

    def under(self, prefix: str) -> Self:
        """The same plan for a copy whose root stands at `prefix` in this one."""
        moved: dict[str, Any] = {
            name: {_moved(path, prefix): each for path, each in getattr(self, name).items()}
            for name in self.per_module()
        }
        moved["columns"] = {path: _moved(row, prefix) for path, row in moved["columns"].items()}
        moved["gathers"] = {path: (_moved(row, prefix), keys) for path, (row, keys) in moved["gathers"].items()}
        partial = frozenset(_moved(name, prefix) for name in self.partial)
        return replace(self, **moved, partial=partial, streams=(), lookups=(), heads=(), decisions=())

    def joined_with(self, others: Iterable[Self]) -> Self:
        """One plan from this one and plans of disjoint parts."""
        merged: dict[str, Any] = {}
        for each in (self, *others):
            for name in self.per_module():
                merged.setdefault(name, {}).update(getattr(each, name))
            merged["partial"] = merged.get("partial", frozenset()) | each.partial
        return replace(self, **merged)

    def between(self) -> str:
        """Where the stream is whole inside a list of blocks, in words; empty where it is nowhere."""
        homes = [each.blocks[-1].rpartition(".")[0] for each in self.streams]
        lasts = [
            each.blocks[-1] for each, home, after in zip(self.streams, homes, homes[1:], strict=False) if home == after
        ]
        if not lasts:
            return ""
        return f"joined and dealt again behind {', '.join(lasts)}, where the model's own code uses what a block gave"

    def summary(self) -> str:
        """One line: how many matrices are dealt in which way, and what is uneven or held twice."""
        parts = [
            f"{len(self.columns)} matrices by columns and {len(self.rows)} by rows over {self.degree} ranks",
            f"{len(self.heads)} heads and {len(self.lookups)} embeddings by the vocabulary",
        ]
        sizes = {name: {split.local_size(rank) for rank in range(split.degree)} for name, split in self.splits.items()}
        uneven = sorted(name for name, each in sizes.items() if len(each) > 1)
        twice = sorted(name for name, split in self.splits.items() if split.duplicated)
        parts += [f"uneven shares: {len(uneven)} parameters, first {uneven[0]}"] if uneven else []
        parts += [f"held by several ranks: {len(twice)} parameters, first {twice[0]}"] if twice else []
        parts += [f"gradients summed over tp: {len(self.partial)} replicated parameters"] if self.partial else []
        parts += ["sequence dealt between matrices of blocks"] if self.sequence else []
        parts += [self.between()] if self.between() else []
        return "; ".join(parts)

    def table(self) -> str:
        """Module, placement and reason, one row each; equal blocks share a row (numbers shown as *)."""
        rows: dict[tuple[str, str, str], int] = {}
        for each in self.decisions:
            key = (starred(each.module), each.placement, each.reason)
            rows[key] = rows.get(key, 0) + 1
        width = max((len(module) for module, _, _ in rows), default=0)
        return "\n".join(
            f"{module:<{width}}  {placement:<12} {reason}" + (f"  ({count} times)" if count > 1 else "")
            for (module, placement, reason), count in rows.items()
        )


_PER_MODULE = (
    "splits",
    "columns",
    "rows",
    "transposed",
    "gathers",
    "joined",
    "slices",
    "attributes",
    "drops",
    "calls",
)


def _moved(name: str, prefix: str) -> str:
    """`name` with `prefix` put before it; the empty name is the root itself."""
    return ".".join(part for part in (prefix, name) if part)


def starred(path: str) -> str:
    """A path with its numbers shown as *.

    >>> starred("layers.3.mlp")
    'layers.*.mlp'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
