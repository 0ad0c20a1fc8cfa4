"""Makes the `TensorPlan` of a model: from a look at one forward pass, the user's patterns, the model's own plan, rules.

Where the sources disagree the first one that knows a module decides. What is dealt in the end is what `prove` found
equal to the plain run, unit by unit; everything else stays replicated and is named with the reason.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.errors import WrapError
from meshwright.parallel.mixed import refuse_mixed
from meshwright.parallel.prove import RefutedError, prove
from meshwright.parallel.regions import Region, find_regions
from meshwright.parallel.tensor_plan import Decision, Stream, TensorPlan, starred
from meshwright.parallel.traced_blocks import Alike, alike_blocks, watch_blocks
from meshwright.parallel.unit_calls import calls_of, handed_on, signature_of
from meshwright.parallel.unit_run import Plain, UnitCall, argument, run_plain
from meshwright.parallel.variants import common_path, subsets, variants
from meshwright.parallel.vocabulary_plan import with_vocabulary
from meshwright.parallel.watch import Matrix, Sight, watch
from meshwright.parallel.wishes import Wishes

__all__ = ["plan_tensor"]


@dataclass(frozen=True)
class _Settled:
    """What became of one unit: its plan (paths relative to it), why regions were left out, its stream.

    `ends` are the collectives at the two ends of a stream of such units: shares joined in backward, then in forward.
    """

    plan: TensorPlan
    refused: Mapping[str, str]
    stream: int | str | None
    ends: tuple[tuple[str, int], ...] = ()


def plan_tensor(
    model: nn.Module,
    run: Callable[[], Any],
    degree: int,
    *,
    sequence: bool = False,
    patterns: Mapping[str, str] | None = None,
    shapes: bool = False,
) -> TensorPlan:
    """Decides how a model is dealt over `degree` ranks of `tp`.

    Args:
        model: unwrapped; on any device, meta included; it is not changed.
        run: one forward pass of the model on an example.
        degree: of `tp`.
        sequence: whether the sequence dim is dealt between blocks too.
        patterns: module pattern -> one of `PATTERNS`; they come before the model's own `tp_plan`.
        shapes: compare shapes only, for predictions about units too large to be run; not to train with.

    Raises:
        WrapError: for patterns that fit nothing, heads that `degree` does not fit, a sequence that cannot be dealt.
    """
    wishes, base = Wishes(model, patterns or {}), TensorPlan(degree=degree, sequence=sequence)
    run, sight = _watched(model, run, alike := alike_blocks(find_blocks(model) if shapes else {}))
    regions, objections = _wished(find_regions(sight), wishes)
    units = _units(model, regions)
    calls = calls_of(model, run, units)
    settled = alike.spread(_settle_all(model, units, calls, base, shapes=shapes))
    plan = base.joined_with(each.plan.under(path) for path, each in settled.items())
    refuse_mixed(model, plan, list(settled), axis=f"tp={degree}")
    plan = _with_streams(plan, _streams(model, settled, {} if shapes else calls), settled) if sequence else plan
    plan, vocabulary = with_vocabulary(model, plan, sight, wishes)
    _check_wishes(wishes, plan)
    said = [*objections, *_dealt(units, settled, wishes), *vocabulary]
    return replace(plan, decisions=(*said, *_left(sight, said, wishes)))


def _dealt(units: Mapping[str, list[Region]], settled: Mapping[str, _Settled], wishes: Wishes) -> Iterator[Decision]:
    for path, each in settled.items():
        yield from _decide(path, units.get(path, ()), each, wishes)


def _watched(model: nn.Module, run: Callable[[], Any], alike: Alike) -> tuple[Callable[[], Any], Sight]:
    """A pass that may leave out blocks to which others are equal, and what is seen in it."""
    run = partial(_first_ones, run, find_blocks(model), alike) if alike.first else run
    return run, watch(model, run)


def _first_ones(run: Callable[[], Any], blocks: Mapping[str, nn.Module], alike: Alike) -> Any:
    """A pass in which only the first of equal blocks runs."""
    with watch_blocks(blocks, Alike(alike.first), lambda *_, **__: None):
        return run()


def _with_streams(plan: TensorPlan, streams: tuple[Stream, ...], settled: Mapping[str, _Settled]) -> TensorPlan:
    ends = {f"stream of {each.blocks[0]}": settled[each.blocks[0]].ends for each in streams}
    return replace(plan, streams=streams, calls={**plan.calls, **ends})


def _settle_all(
    model: nn.Module,
    units: Mapping[str, list[Region]],
    calls: Mapping[str, UnitCall],
    base: TensorPlan,
    *,
    shapes: bool,
) -> dict[str, _Settled]:
    """Settles each unit that was called; units of one signature once."""
    known: dict[Any, _Settled] = {}
    settled: dict[str, _Settled] = {}
    blocks = find_blocks(model)
    for region in (each for mine in units.values() for each in mine):
        if region.heads is not None:
            region.heads.deal(base.degree, region.row.path)  # refuses a degree that heads do not fit
    for path, call in calls.items():
        unit = model.get_submodule(path)
        regions = [_relative(region, path) for region in units[path]]
        parts = tuple((each.paths, each.heads, tuple(column.segments for column in each.columns)) for each in regions)
        mine = base if path in blocks else replace(base, sequence=False)  # what stands around blocks gets it whole
        key = signature_of(unit, call, (parts, mine.sequence))
        if key not in known:
            known[key] = _settle(unit, call, regions, mine, shapes=shapes)
        settled[path] = known[key]
    return settled


def _wished(regions: Sequence[Region], wishes: Wishes) -> tuple[list[Region], list[Decision]]:
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


def _relative(region: Region, unit: str) -> Region:
    def moved(matrix: Matrix) -> Matrix:
        return replace(matrix, path=matrix.path.removeprefix(unit + "." if unit else ""))

    return replace(region, columns=tuple(moved(each) for each in region.columns), row=moved(region.row))


def _settle(unit: nn.Module, call: UnitCall, regions: Sequence[Region], base: TensorPlan, *, shapes: bool) -> _Settled:
    """Finds the variant of a unit that deals most and is proved."""
    refused: dict[str, str] = {}
    try:
        plain = run_plain(unit, call, shapes=shapes)
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
            except RefutedError as error:
                reasons.append(str(error))
                continue
            return _Settled(found, refused, plain.stream, _ends(plain, base.degree) if base.sequence else ())
        if len(kept) == 1 or len(regions) == 1:
            refused.update({region.row.path: reasons[0] for region in kept})
    return _Settled(base, refused or {region.row.path: "refuted" for region in regions}, plain.stream)


def _ends(plain: Plain, degree: int) -> tuple[tuple[str, int], ...]:
    if not plain.shape:
        return ()
    samples, length, width = plain.shape
    padded = samples * -(-length // degree) * degree * width
    given = argument(plain.call.args, plain.call.kwargs, plain.stream)
    return (("all_gather", padded),) * (1 + int(given.requires_grad))


def _decide(unit: str, regions: Sequence[Region], settled: _Settled, wishes: Wishes) -> list[Decision]:
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


def _streams(model: nn.Module, settled: Mapping[str, _Settled], calls: Mapping[str, UnitCall]) -> tuple[Stream, ...]:
    """The lists of blocks that were proved on a dealt sequence.

    Raises:
        WrapError: naming the block that cannot work on one.
    """
    lists: dict[str, list[str]] = {}
    for path in find_blocks(model):
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    streams: list[Stream] = []
    for blocks in lists.values():
        if any(path in settled for path in blocks):
            keys = _keys_of_streams(blocks, settled)
            streams += [Stream(run, keys[run[0]]) for run in handed_on(blocks, calls, keys)]
    if not streams:
        first = starred(next(iter(lists.values()))[0]) if lists else ""
        lacking = f"nothing in {first} can be dealt" if lists else "the model has no list of blocks"
        raise WrapError(f"sequence_parallel: {lacking}; use sequence_parallel=False")
    return tuple(streams)


def _keys_of_streams(blocks: Sequence[str], settled: Mapping[str, _Settled]) -> dict[str, int | str]:
    """Block -> the argument that is its stream."""
    keys: dict[str, int | str] = {}
    for path in blocks:
        key = settled[path].stream if path in settled else None
        if key is None or not settled[path].plan.rows:
            why = "; ".join(settled[path].refused.values()) if path in settled else "nothing in it can be dealt"
            raise WrapError(
                f"sequence_parallel: block {path} cannot work on a dealt sequence: {why}; use sequence_parallel=False"
            )
        keys[path] = key
    return keys


def _check_wishes(wishes: Wishes, plan: TensorPlan) -> None:
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


def _left(sight: Sight, decisions: Sequence[Decision], wishes: Wishes) -> list[Decision]:
    said = {each.module for each in decisions}
    found = []
    for path in (*sight.matrices, *sight.lookups):
        if path not in said:
            wish = wishes.of(path)
            asked = f"{wish[1]} says {wish[0]}, but " if wish and wish[0] != "replicate" else ""
            found.append(Decision(path, "replicate", f"{asked}no rule fits"))
    return found
