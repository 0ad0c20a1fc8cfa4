"""One unit of a model run alone: its call as the model made it, and the plain numbers that any variant must give."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.keeping import kept
from meshwright.parallel.meta import without_values
from meshwright.parallel.promote import Promote

__all__ = [
    "Around",
    "Kinds",
    "Plain",
    "UnitCall",
    "argument",
    "gradients_of",
    "inputs_of",
    "keyed_arguments",
    "kinds_of",
    "own_copy",
    "run_plain",
    "settings_of",
    "tensors_of",
    "with_random_weights",
]


Kinds: TypeAlias = tuple[tuple[int | str, type | None], ...]

Around = Callable[[nn.Module], AbstractContextManager[object]]
"""Makes the context in which a copy of a unit runs."""


@dataclass(frozen=True)
class UnitCall:
    """Arguments of one call of a unit, as the model made it; tensors are kept detached.

    `passed_on` names arguments that an earlier unit made: where that one is dealt they arrive dealt. `follows` names
    those that are, in every call, the very value that an earlier unit gave, with its path. `read` has the shapes of
    what the unit gave that anything but units beside it looks at.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    passed_on: frozenset[int | str] = frozenset()
    follows: Mapping[int | str, str] = field(default_factory=dict)
    read: frozenset[tuple[int, ...]] = frozenset()

    def fresh(self, *, shapes: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A copy to be run: float64 leaves on CPU, random ones for tensors without values (meta).

        Args:
            shapes: give no tensor values.
        """
        generator = None if shapes else torch.Generator().manual_seed(1)
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
        drawn: what else drew random numbers, in order: a function, and the shape of what it made.
        shapes: whether it was run on shapes alone, so that nothing but shapes can be compared.
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
    drawn: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    shapes: bool = False


def run_plain(unit: nn.Module, call: UnitCall, around: Around | None = None, *, shapes: bool = False) -> Plain:
    """Runs a unit as it is, forward and backward; `around` makes a context for the copy that is run."""
    mine = _training(without_values(unit).double() if shapes else with_random_weights(unit))
    args, kwargs = call.fresh(shapes=shapes)
    stream = _stream_key(args, kwargs)
    derived = _Derived(None if stream is None else argument(args, kwargs, stream))
    hooks = [
        module.register_forward_pre_hook(derived.noting(path), with_kwargs=True)
        for path, module in mine.named_modules()
        if path
    ]
    generator = torch.Generator().manual_seed(7)
    inside = nullcontext() if around is None else around(mine)
    with Promote(), PlainDropout(generator=generator) as dropout, derived, inside, kept(mine):
        outputs = tensors_of(mine(*args, **kwargs))
    for hook in hooks:
        hook.remove()
    weights, inputs = [_random_like(each, generator) for each in outputs], inputs_of(args, kwargs)
    parameters = {name: each for name, each in mine.named_parameters() if each.requires_grad}
    found = gradients_of(outputs, weights, [*inputs, *parameters.values()])
    shape = () if stream is None else tuple(argument(args, kwargs, stream).shape)
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
        dropout.drawn,
        shapes,
    )


def _training(unit: nn.Module) -> nn.Module:
    """As it trains, where it is all in evaluation (`from_pretrained`): what drops then must be known."""
    return unit if unit.training else unit.train()


def gradients_of(outputs: list[Tensor], weights: list[Tensor], inputs: list[Tensor]) -> list[Tensor | None]:
    """Gradients of inputs when outputs are weighted; None for inputs that do not matter."""
    pairs = [(each, weight.to(each.dtype)) for each, weight in zip(outputs, weights, strict=True) if each.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    roots, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(roots, inputs, cotangents, allow_unused=True))


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among arguments that need gradients."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Any:
    """The argument at a position or keyword."""
    return args[key] if isinstance(key, int) else kwargs[key]


def keyed_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int | str, Any]]:
    """Arguments of a call by position and keyword.

    >>> keyed_arguments((1,), {"mask": 2})
    [(0, 1), ('mask', 2)]
    """
    return [*enumerate(args), *kwargs.items()]


def kinds_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kinds:
    """Arguments of a call by position and keyword, and what they are: two calls may differ in tensors that are there.

    >>> kinds_of((torch.ones(1),), {"mask": None, "cache": {}})
    ((0, None), ('mask', None), ('cache', <class 'dict'>))
    """
    given = keyed_arguments(args, kwargs)
    return tuple((key, None if value is None or isinstance(value, Tensor) else type(value)) for key, value in given)


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


def settings_of(unit: nn.Module) -> Any:
    """What tells a unit from another of its kind: types, plain settings, shapes of parameters."""
    settings = tuple(
        (
            path,
            type(module),
            tuple((name, each) for name, each in vars(module).items() if type(each) in (float, bool, str)),
        )
        for path, module in unit.named_modules()
    )
    return settings, tuple((name, tuple(each.shape), each.requires_grad) for name, each in unit.named_parameters())


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
            found = [key for key, value in keyed_arguments(args, kwargs) if self._is_stream(value)]
            self.keys[path] = tuple(dict.fromkeys((*self.keys.get(path, ()), *found)))

        return hook

    def _is_stream(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._known and value.shape == self._shape


def _stream_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """The first argument [samples, positions, features] of floats."""
    for key, value in keyed_arguments(args, kwargs):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return key
    return None


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_meta:
        return torch.empty_like(tensor, dtype=torch.float64)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def _thawed(leaf: Any, generator: torch.Generator | None) -> Any:
    if not isinstance(leaf, Tensor):
        return own_copy(leaf)
    if generator is None:
        dtype = torch.float64 if leaf.is_floating_point() else leaf.dtype
        return torch.empty_like(leaf, dtype=dtype, device="meta").requires_grad_(leaf.requires_grad)
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


def with_random_weights(unit: nn.Module) -> nn.Module:
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
