"""A plan for one unit, proved by running it: plain, and on ranks that are threads, with random weights.

Structure says which matrices could be dealt; whether the code between them allows it, which numbers of heads it asks
for, and whether the gradient of a replicated parameter is whole or partial on a rank, is found by trying. A variant
counts only if outputs, gradients of inputs and of all parameters equal the plain run's. On paper, where nothing will be
trained, shapes may be all that is compared.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.keeping import kept
from meshwright.parallel.layout import deal
from meshwright.parallel.length import Length
from meshwright.parallel.promote import Promote
from meshwright.parallel.tensor import install, keep_shares
from meshwright.parallel.tensor_plan import Drop, TensorPlan
from meshwright.parallel.threads import ThreadAxis, run_threads
from meshwright.parallel.unit_run import Plain, argument, gradients_of, inputs_of, tensors_of

__all__ = ["Attending", "RefutedError", "prove"]

_TOLERANCE = 1e-8
_FLOOR = 1e-6


class RefutedError(Exception):
    """A variant whose numbers are not the plain run's."""


Attending = Callable[[nn.Module, Length], AbstractContextManager[object]]
"""Prepares a rank's copy of a unit that works on a dealt sequence; makes the context in which it attends."""


@dataclass(frozen=True, eq=False)
class _Variant:
    plan: TensorPlan
    attending: Attending | None
    drops: tuple[Drop | None, ...] = ()

    def around(self, unit: nn.Module, length: Length | None) -> AbstractContextManager[object]:
        return nullcontext() if self.attending is None or length is None else self.attending(unit, length)


def prove(plain: Plain, plan: TensorPlan, attending: Attending | None = None) -> TensorPlan:
    """Runs a variant on threads; returns it with partial parameters, dropouts and collectives filled in.

    Raises:
        RefutedError: when it fails, or its numbers are not the plain ones.
    """
    drops: tuple[Drop | None, ...] = ()
    if plain.drops:
        seen = [each.drops for each in _run(plain, _Variant(plan, attending))]
        drops = _dealt_drops(plain, seen, plan)
    ranks = _run(plain, _Variant(plan, attending, drops))
    _check_draws(ranks, plain)
    for number, whole in enumerate(plain.outputs):
        _check_output(number, whole, ranks, plan, plain)
    for number, gradient in enumerate(plain.given):
        for rank, each in enumerate(ranks):
            expected = gradient
            if gradient is not None and each.given[number] is not None and each.given[number].shape != gradient.shape:
                dim = _dealt_dim(gradient.shape, each.given[number].shape)
                sizes = [other.given[number].shape[dim] for other in ranks]
                expected = gradient.narrow(dim, sum(sizes[:rank]), sizes[rank])
            _same(each.given[number], expected, f"gradient of input {number} on rank {rank}")
    partial = frozenset(name for name in plain.gradients if _is_partial(name, plain, ranks, plan))
    names = {name for name in drops if name is not None}
    return replace(
        plan,
        partial=partial,
        drops={"": drops} if names else {},
        calls={"": tuple(ranks[0].calls)},
    )


@dataclass
class _Rank:
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    given: list[Any]
    calls: list[tuple[str, int]]
    drops: list[tuple[int, ...]]
    drawn: list[tuple[str, tuple[int, ...]]]


def _run(plain: Plain, variant: _Variant) -> list[_Rank]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return run_threads(lambda axis: _run_rank(plain, variant, axis), variant.plan.degree)
    except Exception as error:  # whatever a unit raises when its heads do not fit, the variant is refuted
        raise RefutedError(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        torch.set_default_dtype(before)


def _run_rank(plain: Plain, variant: _Variant, axis: ThreadAxis) -> _Rank:
    plan = variant.plan
    memo = {id(each): each for each in [*plain.unit.parameters(), *plain.unit.buffers()]}
    mine = copy.deepcopy(plain.unit, memo)
    keep_shares(mine, plan.splits, axis.rank)
    args, kwargs = plain.call.fresh(shapes=plain.shapes)
    for key, split in plan.slices.get("", ()):
        if key in plain.call.passed_on:  # an earlier unit made it, dealt
            args, kwargs = _with_own(args, kwargs, key, split.take(argument(args, kwargs, key).detach(), axis.rank))
    length = Length(axis, full=plain.shape[-2], width=plain.shape[-1]) if plan.sequence else None
    if plan.sequence:
        assert plain.stream is not None, "a dealt sequence without a stream"
        given = argument(args, kwargs, plain.stream).detach()
        start, stop = deal(given.shape[-2], axis.size)[axis.rank]
        args, kwargs = _with_own(args, kwargs, plain.stream, given[..., start:stop, :])
    install(mine, replace(plan, drops={}), axis, {} if length is None else {"": length})
    generator = torch.Generator().manual_seed(7)
    full = (lambda: length.full) if length is not None else None
    with (
        variant.around(mine, length),
        Promote(),
        kept(mine),
        PlainDropout(variant.drops, rank=axis.rank, dealing=axis.dealing, length=full, generator=generator) as dropout,
    ):
        outputs = tensors_of(mine(*args, **kwargs))
        weights = [_like(plain, number, each, axis) for number, each in enumerate(outputs)]
        inputs = inputs_of(args, kwargs)
        parameters = {name: each for name, each in mine.named_parameters() if each.requires_grad}
        found = gradients_of(outputs, weights, [*inputs, *parameters.values()])
    gradients = dict(zip(parameters, found[len(inputs) :], strict=True))
    for module in mine.modules():
        module._parameters.clear()  # the hooks make cycles, which would hold them until a collector comes
    held = [each.detach() for each in outputs]
    return _Rank(held, gradients, found[: len(inputs)], axis.calls, dropout.shapes, dropout.drawn)


def _with_own(args: Any, kwargs: Any, key: int | str, own: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a rank's own part in place of one of them."""
    own = own.clone().requires_grad_(argument(args, kwargs, key).requires_grad)
    if isinstance(key, int):
        return (*args[:key], own, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: own}


def _like(plain: Plain, number: int, output: Tensor, axis: ThreadAxis) -> Tensor:
    """The cotangent of a rank's output: its part of the plain one where it holds a part."""
    whole = plain.weights[number]
    if whole.shape == output.shape:
        return whole
    dim = _dealt_dim(whole.shape, output.shape)
    sizes = axis._met(torch.tensor([output.shape[dim]]), torch.cat).tolist()
    if sum(sizes) != whole.shape[dim]:
        raise RefutedError(f"output {number} has shape {tuple(output.shape)}, plain {tuple(whole.shape)}")
    return whole.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


def _dealt_dim(whole: tuple[int, ...], share: tuple[int, ...]) -> int:
    if len(whole) != len(share):
        raise RefutedError(f"a tensor has shape {tuple(share)}, plain {tuple(whole)}")
    odd = [dim for dim, (one, other) in enumerate(zip(whole, share, strict=True)) if one != other]
    if len(odd) != 1:
        raise RefutedError(f"a tensor has shape {tuple(share)}, plain {tuple(whole)}")
    return odd[0]


def _check_draws(ranks: list[_Rank], plain: Plain) -> None:
    """Refuses other draws than the plain ones, whether what was drawn mattered in this run or not."""
    if any(each.drawn != plain.drawn for each in ranks):
        raise RefutedError("on a part of its tokens it draws other random numbers")


def _check_output(number: int, whole: Tensor, ranks: list[_Rank], plan: TensorPlan, plain: Plain) -> None:
    parts = [each.outputs[number] for each in ranks]
    if all(part.shape == whole.shape for part in parts):
        for rank, part in enumerate(parts):
            _same(part, whole, f"output {number} on rank {rank}")
        return
    joined = torch.cat(parts, _dealt_dim(whole.shape, next(each.shape for each in parts if each.shape != whole.shape)))
    _same(joined, whole, f"output {number}")


def _is_partial(name: str, plain: Plain, ranks: list[_Rank], plan: TensorPlan) -> bool:
    """Whether the ranks' gradients of a replicated parameter must be added; checks the gradient of any other.

    One that is zero in theory (of keys' biases, say) is nothing but rounding, which ranks that saw other parts of the
    work do differently; a sum is one on all of them, so that their parameters stay one.
    """
    whole = plain.gradients[name]
    found = [each.gradients[name] for each in ranks]
    split = plan.splits.get(name)
    floor = _floor(plain)
    if split is not None:
        held = [each for each in found if each is not None]
        total = split.added(held) if len(held) == plan.degree else None
        _same(total, whole, f"gradient of {name}", floor)
        return False
    adds_up = _adds_up(found, whole, floor)
    if all(_close(each, whole, floor) for each in found):
        return adds_up and not plain.shapes and _differ(found)
    if not adds_up:
        raise RefutedError(f"gradient of {name} is neither whole on every rank nor a sum over ranks")
    return True


def _adds_up(found: list[Tensor | None], whole: Tensor | None, floor: float) -> bool:
    present = [each for each in found if each is not None]
    return whole is not None and bool(present) and _close(torch.stack(present).sum(0), whole, floor)


def _differ(found: list[Tensor | None]) -> bool:
    present = [each for each in found if each is not None]
    return any(not torch.equal(each, present[0]) for each in present)


def _floor(plain: Plain) -> float:
    """What a difference may be at least, next to the largest gradient."""
    known = () if plain.shapes else (each for each in plain.gradients.values() if each is not None)
    return _FLOOR * max((float(each.abs().max()) for each in known), default=0)


def _same(found: Tensor | None, expected: Tensor | None, what: str, floor: float = 0.0) -> None:
    if not _close(found, expected, floor):
        raise RefutedError(f"{what} is not the plain one")


def _close(found: Tensor | None, expected: Tensor | None, floor: float) -> bool:
    if found is None or expected is None:
        return found is None and expected is None
    return found.shape == expected.shape and (expected.is_meta or _close_values(found, expected, floor))


def _close_values(found: Tensor, expected: Tensor, floor: float) -> bool:
    if not expected.numel() or not expected.is_floating_point():
        return torch.equal(found, expected)
    known = expected.isfinite()
    if not torch.equal(known, found.isfinite()):
        return False
    scale = max(float(expected[known].abs().max()) if bool(known.any()) else 0.0, floor, 1e-30)
    return float((found - expected)[known].abs().max() if bool(known.any()) else 0.0) <= _TOLERANCE * scale


def _dealt_drops(plain: Plain, seen: list[list[tuple[int, ...]]], plan: TensorPlan) -> tuple[Drop | None, ...]:
    if any(len(each) != len(plain.drops) for each in seen):
        raise RefutedError("dropout is called another number of times")
    drops: list[Drop | None] = []
    for number, whole in enumerate(plain.drops):
        shapes = [each[number] for each in seen]
        odd = next((shape for shape in shapes if shape != whole), None)
        if odd is None:
            drops.append(None)
            continue
        dim = _dealt_dim(whole, odd)
        sizes = tuple(shape[dim] for shape in shapes)
        length = plain.shape[-2] if plan.sequence else -1
        follows = whole[dim] == length and sizes == tuple(stop - start for start, stop in deal(length, plan.degree))
        drops.append(Drop(dim, None if follows else sizes))
    return tuple(drops)
