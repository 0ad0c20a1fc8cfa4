"""A plan for one unit, proved by running it: plain, and on ranks that are threads, with random weights.

Structure says which matrices could be dealt; whether the code between them allows it, which numbers of heads it asks
for, and whether the gradient of a replicated parameter is whole or partial on a rank, is found by trying. A variant
counts only if outputs, gradients of inputs and of all parameters equal the plain run's.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.layout import deal
from meshwright.parallel.promote import Promote
from meshwright.parallel.tensor import Length, install, keep_shares
from meshwright.parallel.tensor_plan import Drop, TensorPlan
from meshwright.parallel.threads import ThreadAxis, run_threads

__all__ = ["Plain", "Refuted", "UnitCall", "own_copy", "prove", "run_plain", "subsets"]

_TOLERANCE = 1e-8
_FLOOR = 1e-6


class Refuted(Exception):
    """A variant whose numbers are not the plain run's."""


@dataclass(frozen=True)
class UnitCall:
    """Arguments of one call of a unit, as the model made it; tensors are kept detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def fresh(self, generator: torch.Generator | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy to be run: float64 leaves on CPU; tensors without values (meta) get random ones."""
        generator = generator or torch.Generator().manual_seed(1)
        args, kwargs = tree_map(lambda leaf: _thawed(leaf, generator), (self.args, self.kwargs))
        return args, kwargs


@dataclass
class Plain:
    """The plain run of a unit: what every variant is compared with.

    Attributes:
        unit: a copy of the unit with random float64 weights.
        keys: module of the unit -> arguments that are made from the stream and shaped like it.
        stream: the argument that is the stream, if there is one.
        drops: shapes of tensors that dropout was called on.
    """

    unit: nn.Module
    call: UnitCall
    outputs: list[Tensor]
    weights: list[Tensor]
    gradients: dict[str, Tensor | None]
    given: list[Tensor | None]
    keys: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)
    stream: int | str | None = None
    shape: tuple[int, ...] = ()
    drops: list[tuple[int, ...]] = field(default_factory=list)


def run_plain(unit: nn.Module, call: UnitCall) -> Plain:
    """Runs a unit as it is, forward and backward."""
    mine = _with_random_weights(unit)
    args, kwargs = call.fresh()
    stream = _stream_key(args, kwargs)
    derived = _Derived(None if stream is None else _at(args, kwargs, stream))
    hooks = [
        module.register_forward_pre_hook(derived.noting(path), with_kwargs=True)
        for path, module in mine.named_modules()
        if path
    ]
    generator = torch.Generator().manual_seed(7)
    with Promote(), PlainDropout(generator=generator) as dropout, derived:
        outputs = _tensors_of(mine(*args, **kwargs))
    for hook in hooks:
        hook.remove()
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in outputs]
    inputs = _inputs(args, kwargs)
    parameters = {name: each for name, each in mine.named_parameters() if each.requires_grad}
    found = _gradients(outputs, weights, [*inputs, *parameters.values()])
    shape = () if stream is None else tuple(_at(args, kwargs, stream).shape)
    return Plain(
        mine,
        call,
        [each.detach() for each in outputs],
        weights,
        dict(zip(parameters, found[len(inputs) :], strict=True)),
        found[: len(inputs)],
        derived.keys,
        stream,
        shape,
        dropout.shapes,
    )


def prove(plain: Plain, plan: TensorPlan) -> TensorPlan:
    """Runs a variant on threads; returns it with partial parameters, dropouts and collectives filled in.

    Raises:
        Refuted: when it fails, or its numbers are not the plain ones.
    """
    drops: tuple[Drop | None, ...] = ()
    if plain.drops:
        drops = _dealt_drops(plain, [each.drops for each in _run(plain, plan, ())], plan)
    ranks = _run(plain, plan, drops)
    for number, whole in enumerate(plain.outputs):
        _check_output(number, whole, ranks, plan, plain)
    for number, gradient in enumerate(plain.given):
        for rank, each in enumerate(ranks):
            expected = gradient
            if gradient is not None and each.given[number] is not None and each.given[number].shape != gradient.shape:
                expected = _share(gradient, plan.degree, rank)
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


def _run(plain: Plain, plan: TensorPlan, drops: tuple[Drop | None, ...]) -> list[_Rank]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return run_threads(lambda axis: _run_rank(plain, plan, drops, axis), plan.degree)
    except Exception as error:  # whatever a unit raises when its heads do not fit, the variant is refuted
        raise Refuted(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    finally:
        torch.set_default_dtype(before)


def _run_rank(plain: Plain, plan: TensorPlan, drops: tuple[Drop | None, ...], axis: ThreadAxis) -> _Rank:
    memo = {id(each): each for each in [*plain.unit.parameters(), *plain.unit.buffers()]}
    mine = copy.deepcopy(plain.unit, memo)
    keep_shares(mine, plan.splits, axis.rank)
    args, kwargs = plain.call.fresh()
    length = Length(axis, full=plain.shape[-2], width=plain.shape[-1]) if plan.sequence else None
    if plan.sequence:
        args, kwargs = _with_share(args, kwargs, plain, axis)
    install(mine, replace(plan, drops={}), axis, {} if length is None else {"": length})
    generator = torch.Generator().manual_seed(7)
    full = (lambda: length.full) if length is not None else None
    with (
        Promote(),
        PlainDropout(drops, rank=axis.rank, degree=axis.size, length=full, generator=generator) as dropout,
    ):
        outputs = _tensors_of(mine(*args, **kwargs))
        weights = [_like(plain, number, each, axis) for number, each in enumerate(outputs)]
        inputs = _inputs(args, kwargs)
        parameters = {name: each for name, each in mine.named_parameters() if each.requires_grad}
        found = _gradients(outputs, weights, [*inputs, *parameters.values()])
    gradients = dict(zip(parameters, found[len(inputs) :], strict=True))
    return _Rank([each.detach() for each in outputs], gradients, found[: len(inputs)], axis.calls, dropout.shapes)


def _with_share(args: Any, kwargs: Any, plain: Plain, axis: ThreadAxis) -> tuple[tuple[Any, ...], dict[str, Any]]:
    key = plain.stream
    given = _at(args, kwargs, key)
    start, stop = deal(given.shape[-2], axis.size)[axis.rank]
    share = given.detach()[..., start:stop, :].clone().requires_grad_(given.requires_grad)
    if isinstance(key, int):
        return (*args[:key], share, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: share}


def _like(plain: Plain, number: int, output: Tensor, axis: ThreadAxis) -> Tensor:
    """The cotangent of a rank's output: its part of the plain one where it holds a part."""
    whole = plain.weights[number]
    if whole.shape == output.shape:
        return whole
    dim = _dealt_dim(whole.shape, output.shape)
    sizes = axis._met(torch.tensor([output.shape[dim]]), torch.cat).tolist()
    if sum(sizes) != whole.shape[dim]:
        raise Refuted(f"output {number} has shape {tuple(output.shape)}, plain {tuple(whole.shape)}")
    return whole.narrow(dim, sum(sizes[: axis.rank]), sizes[axis.rank])


def _dealt_dim(whole: tuple[int, ...], share: tuple[int, ...]) -> int:
    if len(whole) != len(share):
        raise Refuted(f"a tensor has shape {tuple(share)}, plain {tuple(whole)}")
    odd = [dim for dim, (one, other) in enumerate(zip(whole, share, strict=True)) if one != other]
    if len(odd) != 1:
        raise Refuted(f"a tensor has shape {tuple(share)}, plain {tuple(whole)}")
    return odd[0]


def _check_output(number: int, whole: Tensor, ranks: list[_Rank], plan: TensorPlan, plain: Plain) -> None:
    parts = [each.outputs[number] for each in ranks]
    if all(part.shape == whole.shape for part in parts):
        for rank, part in enumerate(parts):
            _same(part, whole, f"output {number} on rank {rank}")
        return
    joined = torch.cat(parts, _dealt_dim(whole.shape, next(each.shape for each in parts if each.shape != whole.shape)))
    _same(joined, whole, f"output {number}")


def _is_partial(name: str, plain: Plain, ranks: list[_Rank], plan: TensorPlan) -> bool:
    """Whether the ranks' gradients of a replicated parameter must be added; checks the gradient of any other."""
    whole = plain.gradients[name]
    found = [each.gradients[name] for each in ranks]
    split = plan.splits.get(name)
    floor = _FLOOR * max((float(each.abs().max()) for each in plain.gradients.values() if each is not None), default=0)
    if split is not None:
        sums = [torch.zeros(()) if each is None else each for each in found]
        for rank in range(plan.degree):
            same = [sums[other] for other in range(plan.degree) if split.held[other] == split.held[rank]]
            expected = None if whole is None else split.take(whole, rank)
            _same(torch.stack(same).sum(0) if whole is not None else None, expected, f"gradient of {name}", floor)
        return False
    if all(_close(each, whole, floor) for each in found):
        return False
    present = [each for each in found if each is not None]
    if whole is None or not present or not _close(torch.stack(present).sum(0), whole, floor):
        raise Refuted(f"gradient of {name} is neither whole on every rank nor a sum over ranks")
    return True


def _same(found: Tensor | None, expected: Tensor | None, what: str, floor: float = 0.0) -> None:
    if not _close(found, expected, floor):
        raise Refuted(f"{what} is not the plain one")


def _close(found: Tensor | None, expected: Tensor | None, floor: float) -> bool:
    if found is None or expected is None:
        return found is None and expected is None
    if found.shape != expected.shape:
        return False
    if not expected.numel() or not expected.is_floating_point():
        return torch.equal(found, expected)
    known = expected.isfinite()
    if not torch.equal(known, found.isfinite()):
        return False
    scale = max(float(expected[known].abs().max()) if bool(known.any()) else 0.0, floor, 1e-30)
    return float((found - expected)[known].abs().max() if bool(known.any()) else 0.0) <= _TOLERANCE * scale


def _share(whole: Tensor, degree: int, rank: int) -> Tensor:
    start, stop = deal(whole.shape[-2], degree)[rank]
    return whole[..., start:stop, :]


def _dealt_drops(plain: Plain, seen: list[list[tuple[int, ...]]], plan: TensorPlan) -> tuple[Drop | None, ...]:
    if any(len(each) != len(plain.drops) for each in seen):
        raise Refuted("dropout is called another number of times")
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


def _gradients(outputs: list[Tensor], weights: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    pairs = [(each, weight.to(each.dtype)) for each, weight in zip(outputs, weights, strict=True) if each.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    roots, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, inputs, cotangents, allow_unused=True))


class _Derived(TorchFunctionMode):
    """Follows one tensor through a unit and notes which modules receive values made from it, in its shape."""

    def __init__(self, stream: Tensor | None) -> None:
        super().__init__()
        self.keys: dict[str, tuple[int | str, ...]] = {}
        self._shape = None if stream is None else stream.shape
        self._known: Any = WeakIdKeyDictionary()
        if stream is not None:
            self._known[stream] = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if made and any(leaf in self._known for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            for leaf in made:
                self._known[leaf] = True
        return result

    def noting(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            found = [key for key, value in (*enumerate(args), *kwargs.items()) if self._is_stream(value)]
            self.keys[path] = tuple(dict.fromkeys((*self.keys.get(path, ()), *found)))

        return hook

    def _is_stream(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._known and value.shape == self._shape


def _stream_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The first argument [samples, positions, features] of floats."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return key
    return None


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _tensors_of(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def own_copy(value: Any) -> Any:
    """A copy of an argument that is no tensor (a cache, say), whose tensors are detached copies."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return type(value)({key: own_copy(item) for key, item in value.items()})
    if type(value) in (list, tuple, set):
        return type(value)(own_copy(item) for item in value)
    if not hasattr(value, "__dict__") or isinstance(value, (nn.Module, type)) or callable(value):
        return value
    mine = copy.copy(value)
    for name, item in vars(value).items():
        object.__setattr__(mine, name, own_copy(item))
    return mine


def _thawed(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor):
        return own_copy(leaf)
    return _valued(leaf, generator).requires_grad_(leaf.requires_grad)


def _valued(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A float64 CPU copy with values: its own, or random ones where it has none (meta)."""
    if tensor.is_floating_point():
        if tensor.is_meta:
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return tensor.detach().to("cpu", torch.float64, copy=True)
    if tensor.is_meta:
        return (
            torch.ones(tensor.shape, dtype=tensor.dtype)
            if tensor.dtype is torch.bool
            else torch.zeros(tensor.shape, dtype=tensor.dtype)
        )
    return tensor.detach().to("cpu", copy=True)


def _with_random_weights(unit: nn.Module) -> nn.Module:
    """A copy in float64 whose weights are random, since freshly made zeros and ones would hide faults."""
    generator = torch.Generator().manual_seed(3)
    memo: dict[int, Any] = {}
    for parameter in unit.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scaled = values / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.75 + 0.25 * values
        memo[id(parameter)] = nn.Parameter(scaled, requires_grad=parameter.requires_grad)
    for buffer in unit.buffers():
        memo[id(buffer)] = _valued(buffer, generator)
    return copy.deepcopy(unit, memo)


def subsets(items: list[Any]) -> Iterator[list[Any]]:
    """All subsets, the larger ones first."""
    for mask in sorted(range(2 ** len(items)), key=lambda bits: (-bits.bit_count(), bits)):
        yield [item for position, item in enumerate(items) if mask >> position & 1]
