"""The ledger: which collectives ran, over which mesh axis, and how many bytes they moved.

It listens below every library (c10d's own operators), so it also sees what FSDP2, DTensor, DeepSpeed or a
user's code call. Bytes are exact: `payload_bytes` is the size of the whole tensor a collective works on,
`sent_bytes` what one rank must send for it with ring algorithms (all-reduce 2(n-1)/n, gather and scatter
(n-1)/n of the payload; Patarasuk and Yuan 2009). Of an uneven all-to-all a rank sends all but what it keeps.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.parallel.folding import FOLDS
from meshwright.parallel.mesh import AXES, Mesh

__all__ = ["Call", "Ledger", "LedgerSummary", "sent_bytes"]

# operator name without its leading and trailing underscores -> (kind, which tensor is the whole payload)
_KINDS = {
    "allreduce": ("all_reduce", "first"),
    "allreduce_coalesced": ("all_reduce", "first"),
    "all_reduce": ("all_reduce", "first"),
    "all_reduce_coalesced": ("all_reduce", "first"),
    "allgather": ("all_gather", "largest"),
    "allgather_base": ("all_gather", "largest"),
    "allgather_coalesced": ("all_gather", "largest"),
    "allgather_into_tensor_coalesced": ("all_gather", "largest"),
    "all_gather_into_tensor": ("all_gather", "times"),
    "all_gather_into_tensor_coalesced": ("all_gather", "times"),
    "all_gather_into_tensor_out": ("all_gather", "times"),
    "reduce_scatter": ("reduce_scatter", "largest"),
    "reduce_scatter_base": ("reduce_scatter", "largest"),
    "reduce_scatter_tensor": ("reduce_scatter", "first"),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", "largest"),
    "alltoall": ("all_to_all", "largest"),
    "alltoall_base": ("all_to_all", "second"),
    "all_to_all_single": ("all_to_all", "first"),
    "broadcast": ("broadcast", "first"),
    "reduce": ("reduce", "first"),
    "gather": ("gather", "largest"),
    "scatter": ("scatter", "largest"),
    "send": ("send", "first"),
    "recv": ("recv", "first"),
    "recv_any_source": ("recv", "first"),
    "barrier": ("barrier", "none"),
}

_RING_SHARE = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True, order=True)
class Call:
    """One kind of collective over one axis with one payload size; `kept_bytes` are not sent (-1: an even share)."""

    axis: str
    kind: str
    group_size: int
    payload_bytes: int
    kept_bytes: int = -1

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes one rank sends for this call."""
        if self.kept_bytes >= 0:
            return Fraction(self.payload_bytes - self.kept_bytes)
        return sent_bytes(self.kind, self.payload_bytes, self.group_size)


def sent_bytes(kind: str, payload_bytes: int, group_size: int) -> Fraction:
    """Bytes that one rank sends with ring algorithms; exact, hence a fraction.

    >>> sent_bytes("all_reduce", 1000, 4)
    Fraction(1500, 1)
    >>> sent_bytes("all_gather", 1000, 4)
    Fraction(750, 1)
    """
    if kind in _RING_SHARE:
        return Fraction(_RING_SHARE[kind] * (group_size - 1) * payload_bytes, group_size)
    return Fraction(0 if kind in ("recv", "barrier") else payload_bytes)


@dataclass(frozen=True)
class LedgerSummary:
    """An immutable count of calls; prints as a table, compares by value."""

    calls: tuple[tuple[Call, int], ...]

    @classmethod
    def of(cls, calls: Iterable[Call]) -> "LedgerSummary":
        """Counts equal calls.

        >>> summary = LedgerSummary.of([Call("dp", "all_reduce", 2, 8), Call("dp", "all_reduce", 2, 8)])
        >>> summary.count("all_reduce"), summary.sent_bytes("all_reduce")
        (2, Fraction(16, 1))
        """
        return cls(tuple(sorted(Counter(calls).items())))

    def count(self, kind: str | None = None, axis: str | None = None) -> int:
        """Number of calls of a kind over an axis; None means any."""
        return sum(count for _, count in self._matching(kind, axis))

    def payload_bytes(self, kind: str | None = None, axis: str | None = None) -> int:
        """Total size of the tensors the calls worked on."""
        return sum(call.payload_bytes * count for call, count in self._matching(kind, axis))

    def sent_bytes(self, kind: str | None = None, axis: str | None = None) -> Fraction:
        """Total bytes that this rank sent for the calls."""
        return sum((call.sent_bytes * count for call, count in self._matching(kind, axis)), Fraction(0))

    def as_dict(self) -> list[dict[str, object]]:
        """One JSON-able row per axis and kind."""
        keys = sorted({(call.axis, call.kind) for call, _ in self.calls})
        return [
            {
                "axis": axis,
                "kind": kind,
                "calls": self.count(kind, axis),
                "payload_bytes": self.payload_bytes(kind, axis),
                "sent_bytes": float(self.sent_bytes(kind, axis)),
            }
            for axis, kind in keys
        ]

    def __str__(self) -> str:
        columns = "{:<12} {:<15} {:>6} {:>16} {:>18}".format
        head = columns("axis", "collective", "calls", "payload (bytes)", "sent (bytes/rank)")
        rows = [
            columns(row["axis"], row["kind"], row["calls"], f"{row['payload_bytes']:,}", f"{row['sent_bytes']:,.0f}")
            for row in self.as_dict()
        ]
        return "\n".join([head, *rows]) if rows else "no collectives"

    def _matching(self, kind: str | None, axis: str | None) -> Iterator[tuple[Call, int]]:
        for call, count in self.calls:
            if kind in (None, call.kind) and axis in (None, call.axis):
                yield call, count


class Ledger(TorchDispatchMode):
    """A context that records every collective launched inside it.

    Dispatching each operator through Python costs microseconds per operator: open it for the steps you want
    counted, not for whole runs.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mesh = mesh
        self._rank = rank
        self._calls: list[Call] = []
        self._axis_of: dict[str, tuple[str, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Notes collectives and passes every operator on."""
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func._schema.name.split("::")[1].strip("_"), args)
        return func(*args, **(kwargs or {}))

    @property
    def calls(self) -> tuple[Call, ...]:
        """What was recorded so far, in order."""
        return tuple(self._calls)

    def summary(self) -> LedgerSummary:
        """The same, counted."""
        return LedgerSummary.of(self._calls)

    def _note(self, name: str, args: tuple[Any, ...]) -> None:
        if name not in _KINDS:
            return
        kind, payload = _KINDS[name]
        group = next((found for found in map(_process_group, args) if found is not None), None)
        axis, group_size = self._named(group)
        sizes = [_num_bytes(arg) for arg in args if _holds_tensors(arg)]
        payload_bytes = _payload_bytes(payload, sizes, group_size)
        kept_bytes = _kept_bytes(args, payload_bytes, group) if kind == "all_to_all" else -1
        self._calls.append(Call(axis, kind, group_size, payload_bytes, kept_bytes))

    def _named(self, group: Any | None) -> tuple[str, int]:
        if group is not None:
            name = str(group.group_name)
            if name not in self._axis_of:
                ranks = tuple(sorted(dist.get_process_group_ranks(group)))
                axis = group.group_desc if group.group_desc in FOLDS else _axis_of(self._mesh, self._rank, ranks)
                self._axis_of[name] = (axis, len(ranks))
            return self._axis_of[name]
        return "unknown", 1


def _process_group(arg: Any) -> Any | None:
    if isinstance(arg, dist.ProcessGroup):
        return arg
    if isinstance(arg, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(arg)
        except RuntimeError:  # a reduce operation travels as a script object too
            return None
    if isinstance(arg, str):
        try:
            return torch._C._distributed_c10d._resolve_process_group(arg)  # type: ignore[arg-type]
        except (RuntimeError, ValueError):  # the name of a reduce operation
            return None
    return None


def _kept_bytes(args: tuple[Any, ...], payload_bytes: int, group: Any | None) -> int:
    """What a rank has for itself in an all-to-all with split sizes, of which the last ones are those of the input."""
    splits = [arg for arg in args if isinstance(arg, (list, tuple)) and all(isinstance(each, int) for each in arg)]
    if not splits or not splits[-1] or group is None:
        return -1
    own = splits[-1][group.rank()]
    return payload_bytes * own // sum(splits[-1]) if own else 0


def _axis_of(mesh: Mesh, rank: int, ranks: tuple[int, ...]) -> str:
    active = [axis for axis in AXES if mesh.degree(axis) > 1]
    for length in range(1, len(active) + 1):
        for axes in combinations(active, length):
            if mesh.group(rank, axes) == ranks:
                return "+".join(axes)
    part_of = [axis for axis in active if set(ranks) <= set(mesh.group(rank, (axis,)))]
    if part_of:
        return part_of[0]  # some of its ranks
    return "world" if len(ranks) == mesh.world_size else "other"


def _holds_tensors(arg: Any) -> bool:
    if isinstance(arg, (list, tuple)):
        return any(_holds_tensors(item) for item in arg)
    return isinstance(arg, torch.Tensor)


def _num_bytes(arg: Any) -> int:
    if isinstance(arg, (list, tuple)):
        return sum(_num_bytes(item) for item in arg)
    return arg.numel() * arg.element_size() if isinstance(arg, torch.Tensor) else 0


def _payload_bytes(which: str, sizes: list[int], group_size: int) -> int:
    if which == "none" or not sizes:
        return 0
    if which == "largest":
        return max(sizes)
    if which == "second":
        return sizes[1]
    return sizes[0] * (group_size if which == "times" else 1)
