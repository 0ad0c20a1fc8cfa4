"""Makes the `TensorPlan` of a model: from a look at one forward pass, the user's patterns, the model's own plan, rules.

Where the sources disagree the first one that knows a module decides. What is dealt in the end is what `prove` found
equal to the plain run, unit by unit; everything else stays replicated and is named with the reason.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.errors import WrapError, nearest
from meshwright.parallel.layout import Split
from meshwright.parallel.prove import Plain, Refuted, UnitCall, own_copy, prove, run_plain, subsets
from meshwright.parallel.regions import Region, find_regions
from meshwright.parallel.tensor_plan import Decision, Stream, TensorPlan
from meshwright.parallel.variants import common_path, variants
from meshwright.parallel.watch import Matrix, Sight, watch

__all__ = ["PATTERNS", "plan_tensor"]

PATTERNS = ("column", "row", "vocabulary", "replicate")
"""What a user's pattern may ask for."""


@dataclass(frozen=True)
class _Settled:
    """What became of one unit: its plan (paths relative to it), and why regions were left out."""

    plan: TensorPlan
    refused: Mapping[str, str]
    stream: int | str | None


def plan_tensor(
    model: nn.Module,
    run: Callable[[], Any],
    degree: int,
    *,
    sequence: bool = False,
    patterns: Mapping[str, str] | None = None,
) -> TensorPlan:
    """Decides how a model is dealt over `degree` ranks of `tp`.

    Args:
        model: unwrapped; on any device, meta included; it is not changed.
        run: one forward pass of the model on an example.
        degree: of `tp`.
        sequence: whether the sequence dim is dealt between blocks too.
        patterns: module pattern (`fnmatch`) -> one of `PATTERNS`; they come before the model's own `tp_plan`.

    Raises:
        WrapError: for patterns that fit nothing, heads that `degree` does not fit, or a sequence that cannot be dealt.
    """
    wishes = _Wishes(model, patterns or {})
    sight = watch(model, run)
    base = TensorPlan(degree=degree, sequence=sequence)
    regions, decisions = _wished(find_regions(sight), wishes)
    units = _units(model, regions)
    calls = _capture(model, run, units)
    settled: dict[Any, _Settled] = {}
    plans = []
    for path, mine in units.items():
        if path not in calls:
            continue
        unit = model.get_submodule(path)
        local = [_relative(region, path) for region in mine]
        key = _signature(unit, local, calls[path])
        if key not in settled:
            settled[key] = _settle(unit, calls[path], local, base)
        plans.append(settled[key].plan.under(path))
        decisions += _decide(path, mine, settled[key], wishes)
    plan = base.joined_with(plans)
    plan = _with_vocabulary(model, plan, sight, wishes, decisions)
    if sequence:
        plan = replace(
            plan,
            streams=_streams(
                model,
                units,
                {
                    p: settled[_signature(model.get_submodule(p), [_relative(r, p) for r in m], calls[p])]
                    for p, m in units.items()
                    if p in calls
                },
            ),
        )
    _check_wishes(wishes, plan)
    return replace(plan, decisions=(*decisions, *_left(sight, plan, decisions, wishes)))


class _Wishes:
    """Roles that the user's patterns and the model's own plan give to modules."""

    def __init__(self, model: nn.Module, patterns: Mapping[str, str]) -> None:
        self.patterns = patterns
        self._own = {pattern: _role(style) for pattern, style in _own_plan(model).items()}
        paths = [path for path, _ in model.named_modules() if path]
        for pattern, role in patterns.items():
            if role not in PATTERNS:
                raise WrapError(f"tensor_plan[{pattern!r}]={role!r} does not exist; {nearest(role, PATTERNS)}")
            if not any(fnmatchcase(path, pattern) for path in paths):
                close = nearest(pattern, [_starred(path) for path in paths] if "*" in pattern else paths)
                raise WrapError(f"tensor_plan: no module of the model fits {pattern!r}; {close}")

    def of(self, path: str) -> tuple[str, str] | None:
        """Role and reason, or None where nobody asked for anything."""
        for pattern, role in self.patterns.items():
            if fnmatchcase(path, pattern):
                return role, f"your pattern {pattern!r}"
        for pattern, own in self._own.items():
            if own is not None and fnmatchcase(path, pattern):
                return own, "the model's own tp_plan"
        return None


def _own_plan(model: nn.Module) -> Mapping[str, str]:
    plan = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    return plan if isinstance(plan, Mapping) else {}


def _role(style: Any) -> str | None:
    """Our word for a style of transformers' plans; None where it says something else."""
    text = str(style)
    if "gather" in text or "embedding" in text:
        return "vocabulary"
    return "column" if "col" in text else "row" if "row" in text else "replicate" if "replicate" in text else None


def _wished(regions: Sequence[Region], wishes: _Wishes) -> tuple[list[Region], list[Decision]]:
    """Regions nobody objects to, and a decision for each that somebody does."""
    kept: list[Region] = []
    decisions: list[Decision] = []
    for region in regions:
        objection = None
        for path in region.paths:
            wish = wishes.of(path)
            natural = "row" if path == region.row.path else "column"
            if wish is not None and wish[0] not in (natural, "vocabulary"):
                objection = f"{wish[1]} says {wish[0]} for {path}"
        if objection is None:
            kept.append(region)
        else:
            decisions += [Decision(path, "replicate", objection) for path in region.paths]
    return kept, decisions


def _units(model: nn.Module, regions: Sequence[Region]) -> dict[str, list[Region]]:
    """The parts of the model that are proved one by one: blocks, or the smallest modules that hold a region."""
    blocks = list(find_blocks(model))
    homes: dict[str, list[Region]] = {}
    for region in regions:
        inside = [path for path in blocks if all(each.startswith(path + ".") for each in region.paths)]
        homes.setdefault(inside[0] if inside else common_path(region.paths), []).append(region)
    merged: dict[str, list[Region]] = {}
    for path, mine in homes.items():
        above = [other for other in homes if other == "" or path.startswith(other + ".") or path == other]
        merged.setdefault(min(above, key=len), []).extend(mine)
    return merged


def _capture(model: nn.Module, run: Callable[[], Any], units: Iterable[str]) -> dict[str, UnitCall]:
    """Arguments of the first call of each unit."""
    found: dict[str, UnitCall] = {}

    def noting(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if path not in found:
                kept = tree_map(_kept, (args, kwargs))
                found[path] = UnitCall(*kept)

        return hook

    with ExitStack() as stack:
        for path in units:
            hook = model.get_submodule(path).register_forward_pre_hook(noting(path), with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        run()
    return found


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().requires_grad_(leaf.requires_grad)
    return own_copy(leaf)


def _relative(region: Region, unit: str) -> Region:
    def moved(matrix: Matrix) -> Matrix:
        return replace(matrix, path=matrix.path.removeprefix(unit + "." if unit else ""))

    return replace(region, columns=tuple(moved(each) for each in region.columns), row=moved(region.row))


def _signature(unit: nn.Module, regions: Sequence[Region], call: UnitCall) -> Any:
    """Units of equal signature are dealt alike; one proof serves them all."""
    settings = tuple(
        (
            path,
            type(module),
            tuple((name, each) for name, each in vars(module).items() if type(each) in (float, bool, str)),
        )
        for path, module in unit.named_modules()
    )
    tensors = tuple((name, tuple(each.shape), each.requires_grad) for name, each in unit.named_parameters())
    heads = tuple((region.paths, region.heads, tuple(each.segments for each in region.columns)) for region in regions)
    given = tuple(
        (key, tuple(each.shape), each.requires_grad) if isinstance(each, Tensor) else (key, type(each))
        for key, each in (*enumerate(call.args), *call.kwargs.items())
    )
    return settings, tensors, heads, given


def _settle(unit: nn.Module, call: UnitCall, regions: Sequence[Region], base: TensorPlan) -> _Settled:
    """Finds the variant of a unit that deals most and is proved."""
    for region in regions:
        if region.heads is not None:
            region.heads.deal(base.degree, region.row.path)
    refused: dict[str, str] = {}
    try:
        plain = run_plain(unit, call)
    except Exception as error:  # whatever a unit raises outside its model, it cannot be proved
        reason = f"cannot be run alone: {type(error).__name__}: {error}"
        return _Settled(base, {region.row.path: reason for region in regions}, None)
    for kept in subsets(list(regions)):
        if not kept and not base.sequence:
            break
        reasons: list[str] = []
        for variant in variants(unit, plain, kept, base):
            try:
                found = prove(plain, variant)
            except Refuted as error:
                reasons.append(str(error))
                continue
            return _Settled(found, refused, plain.stream)
        if len(kept) == 1 or len(regions) == 1:
            refused.update({region.row.path: reasons[0] for region in kept})
    return _Settled(base, refused or {region.row.path: "refuted" for region in regions}, plain.stream)


def _decide(unit: str, regions: Sequence[Region], settled: _Settled, wishes: _Wishes) -> list[Decision]:
    decisions = []
    for region in regions:
        row = region.row.path.removeprefix(unit + "." if unit else "")
        dealt = row in settled.plan.rows
        for path in region.paths:
            wish = wishes.of(path)
            rule = (
                f"{region.heads.query} heads, {region.heads.key_value} key-value heads"
                if region.heads is not None
                else f"{region.row.inputs} features"
            )
            reason = f"{wish[1] if wish else 'rule: products reach one row only'}; {rule}"
            if not dealt:
                reason = f"not equal to the plain run when dealt: {settled.refused.get(row, 'see the other regions')}"
            placement = ("row" if path == region.row.path else "column") if dealt else "replicate"
            decisions.append(Decision(path, placement, reason))
    return decisions


def _with_vocabulary(
    model: nn.Module, plan: TensorPlan, sight: Sight, wishes: _Wishes, decisions: list[Decision]
) -> TensorPlan:
    """Adds embeddings and heads that are dealt by rows of the vocabulary."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    splits = dict(plan.splits)
    lookups: list[str] = []
    heads: list[str] = []
    rows = {path: model.get_submodule(path).weight.shape[0] for path in sight.lookups}  # type: ignore[union-attr, operator, index]
    for path in sight.scored | sight.leaked:
        head = sight.matrices[path]
        tables = [each for each, number in rows.items() if number == head.outputs]
        wish = wishes.of(path)
        if head.transposed or path in plan.rows or path in plan.columns or (wish and wish[0] in ("replicate", "row")):
            continue
        if not tables and not (wish and wish[0] == "vocabulary" and wish[1].startswith("your")):
            continue
        tied = {name for each in (path, *tables) for name in owners[id(model.get_submodule(each).weight)]}  # type: ignore[arg-type]
        users = {name.rpartition(".")[0] for name in tied} & {*sight.matrices, *sight.lookups}
        if (
            users - {path, *tables}
            or tied & sight.used_directly
            or not all(_plain_table(model, each) for each in tables)
        ):
            continue
        split = Split.even(0, head.outputs, plan.degree)
        bias = model.get_submodule(path).bias
        names = [*tied, *(owners[id(bias)] if isinstance(bias, Tensor) else [])]
        splits.update(dict.fromkeys(names, split))
        heads.append(path)
        lookups += [each for each in tables if each not in lookups]
        reason = f"{wish[1] if wish else 'rule: scores of a vocabulary'}; {head.outputs} rows"
        decisions.append(Decision(path, "vocabulary", reason))
        decisions += [Decision(each, "vocabulary", f"as many rows as {path} has scores") for each in tables]
    return replace(plan, splits=splits, heads=tuple(heads), lookups=tuple(lookups))


def _plain_table(model: nn.Module, path: str) -> bool:
    table = model.get_submodule(path)
    odd = ("max_norm", "sparse", "scale_grad_by_freq")
    return not any(getattr(table, name, None) for name in odd) and not any(True for _ in table.children())


def _streams(model: nn.Module, units: Mapping[str, Any], settled: Mapping[str, _Settled]) -> tuple[Stream, ...]:
    lists: dict[str, list[str]] = {}
    for path in find_blocks(model):
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    streams = []
    for blocks in lists.values():
        mine = [path for path in blocks if path in settled]
        if not mine:
            continue
        for path in blocks:
            if path not in settled or not settled[path].plan.rows or settled[path].stream is None:
                why = "; ".join(settled[path].refused.values()) if path in settled else "nothing in it can be dealt"
                raise WrapError(
                    f"sequence_parallel: block {path} cannot work on a dealt sequence: {why}; "
                    "use sequence_parallel=False"
                )
        key = settled[blocks[0]].stream
        assert key is not None, blocks
        streams.append(Stream(tuple(blocks), key))
    if not streams:
        raise WrapError("sequence_parallel: the model has no list of blocks; use sequence_parallel=False")
    return tuple(streams)


def _check_wishes(wishes: _Wishes, plan: TensorPlan) -> None:
    """A user's wish that was not granted is an error; the model's own plan is a hint only."""
    dealt = {**dict.fromkeys(plan.columns, "column"), **dict.fromkeys(plan.rows, "row")}
    dealt.update(dict.fromkeys((*plan.heads, *plan.lookups), "vocabulary"))
    for pattern, role in wishes.patterns.items():
        hits = [path for path, found in dealt.items() if fnmatchcase(path, pattern) and found == role]
        if role != "replicate" and not hits:
            raise WrapError(
                f"tensor_plan[{pattern!r}]={role!r} cannot be had: no module it fits can be dealt that way; "
                "print the plan without it to see what can"
            )


def _left(sight: Sight, plan: TensorPlan, decisions: Sequence[Decision], wishes: _Wishes) -> list[Decision]:
    said = {each.module for each in decisions}
    found = []
    for path in (*sight.matrices, *sight.lookups):
        if path not in said:
            wish = wishes.of(path)
            asked = f"{wish[1]} says {wish[0]}, but " if wish and wish[0] != "replicate" else ""
            found.append(Decision(path, "replicate", f"{asked}no rule fits"))
    return found


def _starred(path: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
