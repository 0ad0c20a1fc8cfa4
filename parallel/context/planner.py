"""Plans how a model's blocks work on a sequence dealt over `cp`, each proved by running it.

Between blocks every rank holds its positions. A block may then do what concerns one position at a time; its attention
fetches keys of other ranks. What else it takes for each position (rotary tables, ids) is dealt with the stream. Where a
block computes something from positions inside of its attention (relative biases, say), or in a module beside it (see
`mixing`), that module runs whole on every rank. Which of these is true of a block is not read from its code but tried,
in float64, on two ranks that are threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.arguments import deal_arguments
from meshwright.parallel.context.attending import gathered, without_drops
from meshwright.parallel.context.mixing import mixing_modules
from meshwright.parallel.context.plan import Attends, ContextPlan, Dealt, Scored
from meshwright.parallel.errors import WrapError
from meshwright.parallel.length import Length
from meshwright.parallel.mixed import refuse_mixed
from meshwright.parallel.prove import RefutedError, prove
from meshwright.parallel.tensor_plan import Decision, Stream
from meshwright.parallel.unit_calls import calls_of, handed_on, signature_of
from meshwright.parallel.unit_run import Kinds, Plain, UnitCall, argument, keyed_arguments, kinds_of, run_plain

__all__ = ["Settled", "plan_context", "settle_blocks"]

_PROVED_ON = 2


@dataclass(frozen=True)
class Settled:
    """What became of one block.

    Attributes:
        plan: of it, with paths relative to it; None where it does not work on a dealt sequence.
        stream: the argument that is dealt.
        reason: what was tried.
        given: streams that the block gives.
        kinds: of the arguments of the call it was proved for.
        only_streams: whether all it gives has an entry for each position of each sample.
    """

    plan: ContextPlan | None
    stream: int | str | None
    reason: str
    given: int = 0
    kinds: Kinds = ()
    only_streams: bool = False


def plan_context(model: nn.Module, run: Callable[[], Any], degree: int) -> ContextPlan:
    """Decides how the blocks of a model work on their rank's positions.

    Args:
        model: unwrapped, on any device, meta included; it is not changed.
        run: one forward pass of the model on an example.
        degree: of `cp`.

    Raises:
        WrapError: naming the block that cannot.
    """
    with _Losses() as losses:
        calls = calls_of(model, run, list(find_blocks(model)))
    if not calls:
        raise WrapError(
            f"mesh axis cp={degree}: the model has no list of blocks that it calls; deal the batch over dp instead"
        )
    settled = settle_blocks(model, calls, degree)
    _refuse(settled, degree)
    plan = ContextPlan(degree=degree, sequence=True, losses=tuple(losses.seen))
    plan = plan.joined_with(each.plan.under(path) for path, each in settled.items() if each.plan is not None)
    refuse_mixed(model, plan, list(settled), axis=f"cp={degree}")
    decisions = tuple(Decision(path, "positions", each.reason) for path, each in settled.items())
    return replace(_with_streams(plan, calls, settled), decisions=decisions)


def settle_blocks(
    model: nn.Module, calls: Mapping[str, UnitCall], degree: int, *, shapes: bool = False
) -> dict[str, Settled]:
    """Finds out of each block of a model whether it works on some positions of a sequence; equal ones are tried once.

    Args:
        model: unwrapped, on any device, meta included; it is not changed.
        calls: of its blocks in one forward pass.
        degree: ranks whose collectives are counted.
        shapes: compare shapes alone; a module that looks at other positions is not found then.
    """
    known: dict[Any, Settled] = {}
    settled: dict[str, Settled] = {}
    for path, call in calls.items():
        unit = model.get_submodule(path)
        key = signature_of(unit, call)
        if key not in known:
            known[key] = _settle(unit, call, degree, shapes=shapes)
        settled[path] = known[key]
    return settled


def _with_streams(plan: ContextPlan, calls: Mapping[str, UnitCall], settled: Mapping[str, Settled]) -> ContextPlan:
    """Adds the streams, and the collectives at their ends."""
    streams = _streams(calls, settled)
    ends = {
        f"stream of {each.blocks[0]}": _ends(
            calls[each.blocks[0]], each.key, given=settled[each.blocks[-1]].given, degree=plan.degree
        )
        for each in streams
    }
    return replace(plan, streams=streams, calls={**plan.calls, **ends})


def _refuse(settled: Mapping[str, Settled], degree: int) -> None:
    for path, each in settled.items():
        if each.plan is None:
            raise WrapError(
                f"mesh axis cp={degree}: block {path} does not work on a dealt sequence ({each.reason}); deal the "
                "batch over dp, or heads over tp"
            )


def _streams(calls: Mapping[str, UnitCall], settled: Mapping[str, Settled]) -> tuple[Stream, ...]:
    keys = {path: each.stream for path, each in settled.items() if each.stream is not None}
    lists: dict[str, list[str]] = {}
    for path in keys:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    runs = [run for blocks in lists.values() for run in handed_on(blocks, calls, keys)]
    return tuple(Stream(run, keys[run[0]]) for run in runs)


def _ends(call: UnitCall, key: int | str, *, given: int, degree: int) -> tuple[tuple[str, int], ...]:
    """Collectives where a stream is dealt, in backward only, and where what the last block gives is joined."""
    value = argument(call.args, call.kwargs, key)
    gathered = ("all_gather", _padded(value.numel(), value.shape[-2], degree))
    return (gathered,) * (given + int(value.requires_grad))


def _padded(elements: int, length: int, degree: int) -> int:
    """Elements of a tensor whose `length` positions travel in shares as large as the largest."""
    return elements // length * -(-length // degree) * degree


def _settle(unit: nn.Module, call: UnitCall, degree: int, *, shapes: bool) -> Settled:
    """Finds the first variant of a block that is proved."""
    asked: list[str] = []

    def plainly(copy: nn.Module) -> AbstractContextManager[object]:
        return plugged(copy, lambda call: _noted(call, asked))

    try:
        plain = run_plain(unit, call, plainly, shapes=shapes)
    except Exception as error:  # whatever a block raises outside its model, it cannot be proved
        return Settled(None, None, f"it cannot be run alone: {type(error).__name__}: {error}")
    if plain.stream is None:
        return Settled(None, None, "it takes no [samples, positions, features]")
    reasons: list[str] = []
    mixing = {} if shapes else mixing_modules(plain, asked)
    for variant in _variants(plain, list(dict.fromkeys(asked)), mixing):
        attends: dict[str, Attends] = {}
        try:
            found = prove(plain, variant, _Attending(variant, attends))
        except RefutedError as error:
            reasons.append(str(error))
            continue
        partial = found.partial | _untried(plain, variant)
        length = plain.shape[-2]
        calls = {"": tuple((kind, _on(degree, length, kind=kind, elements=each)) for kind, each in found.calls[""])}
        settled = replace(
            variant, partial=partial, drops=found.drops, calls=calls, attends=attends, lengths={"": length}
        )
        given = sum(each.shape == plain.shape for each in plain.outputs)
        kinds = kinds_of(call.args, call.kwargs)
        only_streams = all(each.dim() == 3 and each.shape[:-1] == plain.shape[:-1] for each in plain.outputs)
        return Settled(settled, plain.stream, _said(settled), given, kinds, only_streams)
    return Settled(None, None, f"not equal to the plain run: {reasons[0]}{_of_draws(plain)}")


def _of_draws(plain: Plain) -> str:
    names = ", ".join(sorted({name for name, _ in plain.drawn}))
    return f"; it draws with {names}, which only a module whose one argument is the stream may" if names else ""


def _on(degree: int, length: int, *, kind: str, elements: int) -> int:
    """Elements of a collective of the proof on `degree` ranks: shares of positions are padded to the largest."""
    if kind == "all_reduce":
        return elements
    padded = _padded(length, length, _PROVED_ON)
    return _padded(elements // padded * length, length, degree)


class _Losses(TorchFunctionMode):
    """Notes cross entropies of rows of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Scored] = []

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        """Passes every call on."""
        args, keywords = given[0] if given else (), given[1] if len(given) > 1 and given[1] else {}
        if func is functional.cross_entropy:
            scores = args[0] if args else keywords["input"]
            if scores.dim() == 2:
                rows, classes = scores.shape
                self.seen.append(Scored(rows, classes, reduced=keywords.get("reduction", "mean") != "none"))
        return func(*args, **keywords)


@dataclass(frozen=True)
class _Attending:
    """Prepares a rank's copy of a block in a proof; notes how its attention fetches keys."""

    plan: ContextPlan
    attends: dict[str, Attends]

    def __call__(self, copy: nn.Module, length: Length) -> AbstractContextManager[object]:
        deal_arguments(copy, self.plan, {"": length})
        if length.axis.rank == 0:
            self.attends.clear()  # a proof may take two runs
        return plugged(copy, gathered(length, self._note, joined=self.plan.joined))

    def _note(self, name: str, attends: Attends) -> None:
        before = self.attends.get(name)
        if before is not None and before.seen is not None and attends.seen is not None:
            attends = replace(attends, seen=replace(attends.seen, times=before.seen.times + 1))
        self.attends[name] = attends


def _noted(call: AttentionCall, asked: list[str]) -> Tensor:
    asked.append(call.name)
    return attend_to(without_drops(call), Blockwise())


def _untried(plain: Plain, variant: ContextPlan) -> frozenset[str]:
    """Parameters that the example did not use, such as experts without tokens: they serve positions like the rest."""
    whole = tuple(f"{path}." for path in variant.joined)
    unused = (name for name, gradient in plain.gradients.items() if gradient is None)
    return frozenset(name for name in unused if not name.startswith(whole))


def _said(plan: ContextPlan) -> str:
    attention = f"attention of {', '.join(plan.attends) or 'nothing'}"
    if plan.joined:
        whole = f"{', '.join(plan.joined)} on the whole sequence on every rank, the rest position by position"
        return f"{attention}, {whole}" if plan.attends else whole
    return f"{attention}, the rest position by position"


def _variants(plain: Plain, asked: list[str], mixing: Mapping[str, tuple[int | str, ...]]) -> Iterator[ContextPlan]:
    """The ways in which a block might work on its positions, the likeliest first; `mixing` modules run whole in all."""
    base = ContextPlan(degree=_PROVED_ON, sequence=True, joined=mixing)
    yield from _on_positions(plain, base)
    whole = [path for path in asked if plain.keys.get(path)]
    if not whole:  # attention by hand
        whole = [path for path, keys in plain.keys.items() if keys and "." not in path]
    for paths in [whole] if asked else [*([path] for path in whole), whole]:
        apart = {path: keys for path, keys in mixing.items() if not any(f"{path}.".startswith(f"{p}.") for p in paths)}
        if paths:
            yield replace(base, joined={**{path: plain.keys[path] for path in paths}, **apart})


def _on_positions(plain: Plain, base: ContextPlan) -> Iterator[ContextPlan]:
    """Variants in which all of a block does; they differ in which arguments are dealt with the stream, and where."""
    given = keyed_arguments(plain.call.args, plain.call.kwargs)
    others = {key: value for key, value in given if key != plain.stream}
    learned = [key for key, value in others.items() if isinstance(value, Tensor) and value.requires_grad]
    for dealt in dict.fromkeys(_ways_to_deal(others, learned, plain.shape[-2])):
        entered = tuple(key for key in learned if key not in dict(dealt))
        yield replace(base, dealt={"": dealt} if dealt else {}, entered={"": entered} if entered else {})


def _ways_to_deal(others: Mapping[int | str, Any], learned: Sequence[int | str], full: int) -> Iterator[Dealt]:
    for most in (1, 2):  # a table [positions, width] may be as wide as it is long
        dims = {key: _dims(value, full, most) for key, value in others.items()}
        by_position = [key for key, each in dims.items() if any(dim is not None for dim in each)]
        likeliest = [key for key in by_position if key not in learned]
        for keys in (likeliest, by_position, [], *([key] for key in by_position)):
            yield tuple((key, dims[key]) for key in keys)


def _dims(value: Any, full: int, most: int) -> tuple[int | None, ...]:
    """For each leaf of an argument its first dim of positions, from the end; None of none or more than `most`."""
    found: list[int | None] = []
    for leaf in tree_leaves(value):
        dims = [dim for dim, size in enumerate(leaf.shape) if size == full] if isinstance(leaf, Tensor) else []
        found.append(dims[0] - leaf.dim() if 0 < len(dims) <= most else None)
    return tuple(found)
