"""The ways in which one unit might be dealt, the likeliest first; `prove` says which of them is true."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor, nn

from meshwright.parallel.layout import Split
from meshwright.parallel.regions import Region, column_split, head_shares, row_split
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.unit_run import Plain, keyed_arguments

__all__ = ["common_path", "subsets", "variants"]

_LEVELS = ("heads", "all", "config", "none")
_MOST_SLICED = 4


def variants(unit: nn.Module, plain: Plain, regions: Sequence[Region], base: TensorPlan) -> Iterator[TensorPlan]:
    """Plans of one unit that deal all of `regions` (paths relative to the unit).

    They differ in which numbers of the model's code become local (numbers of heads and sizes, heads only, those
    in the config, none), in whether small tensors with one entry per head are dealt, in which arguments
    carry one map per head, and in where the sequence is joined.
    """
    seen: list[TensorPlan] = []
    extras = _per_head_tensors(unit, regions, base.degree)
    slices = list(_per_head_arguments(plain, regions, base.degree))
    gathers = [_gathers(regions, plain, whole) for whole in (True, False)] if base.sequence else [{}]
    joined = _joined(unit, regions, plain) if base.sequence else {}
    start = _matrices(unit, regions, base)
    for sliced, level, extra, gather in product(slices, _LEVELS, (extras, {}), gathers):
        plan = replace(
            start,
            attributes=_attributes(unit, regions, base.degree, level),
            splits={**start.splits, **extra},
            slices={"": sliced} if sliced else {},
            gathers=gather,
            joined=joined,
        )
        if plan not in seen:
            seen.append(plan)
            yield plan


def _matrices(unit: nn.Module, regions: Sequence[Region], base: TensorPlan) -> TensorPlan:
    names = {name for name, _ in unit.named_parameters(remove_duplicate=False)}
    splits: dict[str, Split] = {}
    columns: dict[str, str] = {}
    rows: dict[str, bool] = {}
    for region in regions:
        for column in region.columns:
            split = column_split(region, column, base.degree)
            splits[f"{column.path}.weight"] = replace(split, dim=1 if column.transposed else 0)
            splits[f"{column.path}.bias"] = split
            columns[column.path] = region.row.path
        split = row_split(region, base.degree)
        splits[f"{region.row.path}.weight"] = replace(split, dim=0 if region.row.transposed else 1)
        rows[region.row.path] = region.row.transposed
    forms = {column.path: column.transposed for region in regions for column in region.columns}
    present = {name: split for name, split in splits.items() if name in names}
    return replace(base, splits=present, columns=columns, rows=rows, transposed=forms)


def _root(region: Region) -> str:
    """The module that holds all columns of a region (their parent, where there is one column only)."""
    return common_path([f"{column.path}." for column in region.columns])


def common_path(paths: Sequence[str]) -> str:
    """The deepest module above all paths.

    >>> common_path(["a.b.q", "a.b.k"]), common_path(["a.b.q"])
    ('a.b', 'a.b')
    """
    parts = [path.rstrip(".").split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)


def _attributes(
    unit: nn.Module, regions: Sequence[Region], degree: int, level: str
) -> dict[str, dict[str, tuple[int, ...]]]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    if level == "none":
        return found
    for region in regions:
        matrices = {f"{_root(region)}.{path}".strip(".") for path in region.paths} | set(region.paths)
        for path, module in unit.get_submodule(_root(region)).named_modules(prefix=_root(region)):
            if path in matrices:
                continue
            numbers = dict(_numbers(vars(module), region, degree, sizes=level == "all"))
            config = getattr(module, "config", None)
            if level == "config" and config is not None:
                inside = _numbers(vars(config), region, degree, sizes=False)
                numbers.update({f"config.{name}": values for name, values in inside})
            if numbers:
                found.setdefault(path, {}).update(numbers)
    return found


def _numbers(
    attributes: Mapping[str, Any], region: Region, degree: int, *, sizes: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, value in attributes.items():
        if type(value) is not int:
            continue
        counts_heads = ("head" in name or "group" in name) and not ("dim" in name or "size" in name)
        local = _local_heads(name, value, region, degree) if counts_heads else None
        if local is None and sizes and not counts_heads:
            local = _local_size(value, region, degree)
        if local is not None and set(local) != {value}:
            yield name, local


def _local_heads(name: str, value: int, region: Region, degree: int) -> tuple[int, ...] | None:
    if region.heads is None or value == 0:
        return None
    shares = head_shares(region, degree)
    query = tuple(last - first for (first, last), _ in shares)
    key_value = tuple(last - first for _, (first, last) in shares)
    if "group" in name and value == region.heads.query // region.heads.key_value:
        return tuple(one // other for one, other in zip(query, key_value, strict=True))
    if value == region.heads.query:
        return query
    if value == region.heads.key_value:
        return key_value
    if value % region.heads.key_value == 0 and degree <= region.heads.key_value:
        return tuple(value // region.heads.key_value * share for share in key_value)
    return None


def _local_size(value: int, region: Region, degree: int) -> tuple[int, ...] | None:
    """A size between columns and row, such as the width of all heads, as each rank has it."""
    ranks = range(degree)
    if value == region.row.inputs:
        split = row_split(region, degree)
        return tuple(split.local_size(rank) for rank in ranks)
    for column in region.columns:
        split = column_split(region, column, degree)
        if value == column.outputs:
            return tuple(split.local_size(rank) for rank in ranks)
        for segment in column.segments:
            if value == segment.size:
                end = segment.start + segment.size
                return tuple(
                    sum(stop - start for start, stop in split.clipped(segment.start, end)[rank]) for rank in ranks
                )
    return None


def _per_head_tensors(unit: nn.Module, regions: Sequence[Region], degree: int) -> dict[str, Split]:
    """Parameters and buffers beside an attention's matrices with one entry per head (biases, sinks, slopes)."""
    found: dict[str, Split] = {}
    for region in regions:
        if region.heads is None:
            continue
        root = _root(region)
        held = [[query] for query, _ in head_shares(region, degree)]
        owner = unit.get_submodule(root)
        for name, tensor in (*owner.named_parameters(prefix=root), *owner.named_buffers(prefix=root)):
            dims = [dim for dim, size in enumerate(tensor.shape) if size == region.heads.query]
            if len(dims) == 1 and name.rpartition(".")[0] not in region.paths:
                found[name] = Split.of(dims[0], region.heads.query, held)
    return found


def _per_head_arguments(
    plain: Plain, regions: Sequence[Region], degree: int
) -> Iterator[tuple[tuple[int | str, Split], ...]]:
    """Sets of the unit's arguments that may carry one map per head: none first, then all, then some."""
    heads = next((region for region in regions if region.heads is not None), None)
    yield ()
    if heads is None or heads.heads is None:
        return
    number = heads.heads.query
    held = [[query] for query, _ in head_shares(heads, degree)]
    found: list[tuple[int | str, Split]] = []
    for key, value in keyed_arguments(plain.call.args, plain.call.kwargs):
        if isinstance(value, Tensor) and key != plain.stream:
            dims = [dim for dim, size in enumerate(value.shape) if size == number]
            found += [(key, Split.of(dim, number, held)) for dim in dims[-1:] if value.dim() > 2 or len(dims) == 1]
            found += [(key, Split.of(dim, number, held)) for dim in dims[:-1] if value.dim() > 2]
    for mask in sorted(range(1, 2 ** min(len(found), _MOST_SLICED)), key=lambda bits: -bits.bit_count()):
        chosen = tuple(item for position, item in enumerate(found) if mask >> position & 1)
        if len({key for key, _ in chosen}) == len(chosen):
            yield chosen


def _gathers(regions: Sequence[Region], plain: Plain, at_module: bool) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    """Where shares of the sequence are joined: before the module that holds the columns, else before each column.

    The module comes first because its code may read the shape of its input (HF llama does).
    """
    found: dict[str, tuple[str, tuple[int | str, ...]]] = {}
    for region in regions:
        root = _root(region)
        if at_module and root and plain.keys.get(root):
            found[root] = (region.row.path, plain.keys[root])
        else:
            found.update({column.path: (region.row.path, (0,)) for column in region.columns})
    return found


def _joined(unit: nn.Module, regions: Sequence[Region], plain: Plain) -> dict[str, tuple[int | str, ...]]:
    """Modules that are not dealt and may mix positions: every rank runs them on the whole sequence."""
    matrices = {path for region in regions for path in region.paths}
    roots = {_root(region) for region in regions if plain.keys.get(_root(region))}

    def walk(module: nn.Module, path: str) -> Iterator[str]:
        for name, child in module.named_children():
            inner = f"{path}.{name}".strip(".")
            if inner in matrices or inner in roots:
                continue
            if any(each.startswith(inner + ".") for each in matrices | roots):
                yield from walk(child, inner)
            elif any(each.dim() > 1 for each in child.parameters()) and plain.keys.get(inner):
                yield inner

    return {path: plain.keys[path] for path in walk(unit, "")}


def subsets(items: list[Any]) -> Iterator[list[Any]]:
    """All subsets, the larger ones first."""
    for mask in sorted(range(2 ** len(items)), key=lambda bits: (-bits.bit_count(), bits)):
        yield [item for position, item in enumerate(items) if mask >> position & 1]
