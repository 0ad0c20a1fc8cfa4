"""Models without memory, and the values of what a rank holds of them.

`deferred` builds a model whose parameters are on the meta device and remembers how its constructor makes their values.
When such a model is wrapped, each rank makes the values of one tensor at a time and keeps its own share: no rank ever
holds the whole model, and the same seed gives the same weights on every mesh.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.errors import DeferError, WrapError
from meshwright.parallel.meta import MetaAnswers
from meshwright.parallel.part import Chunk
from meshwright.parallel.tape import Tape, View

__all__ = ["allocate", "deferred", "device_of", "like", "materialise", "on_shapes", "recipe_text"]


T = TypeVar("T")


@dataclass(frozen=True)
class _Recipe:
    """How the values of a deferred model are made.

    Args:
        tape: of its construction.
        views: parameter or buffer name (every alias) -> its window.
        device: where the values are wanted.
    """

    tape: Tape
    views: dict[str, View]
    device: torch.device


_RECIPES: Any = WeakKeyDictionary()


def deferred(build: Callable[[], nn.Module], *, seed: int = 0, device: torch.device | str | None = None) -> nn.Module:
    """Builds a model without memory for its weights; `parallelize` gives each rank its share of their values.

    Every random draw of the constructor gets a key of its own made of `seed`, so that a weight's values depend on the
    seed and its place in the constructor, not on the mesh. A whole model is had by `materialise`.

    Args:
        build: makes the model, in any way that torch allows short of handing weights to other libraries.
        seed: of all weights.
        device: where values shall be; the default device if None.

    Returns:
        The module, parameters and buffers on the meta device.

    Raises:
        DeferError: when the constructor needs what a tensor without memory cannot give.

    >>> model = deferred(lambda: nn.Linear(2, 3), seed=1)
    >>> model.weight.device.type, materialise(model).weight.shape
    ('meta', torch.Size([3, 2]))
    """
    target = torch.device(device) if device is not None else torch.get_default_device()
    tape = Tape(seed)
    try:
        with tape.recording():
            module = build()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise DeferError(f"the model cannot be built without memory: {type(error).__name__}: {error}") from error
    views = _views(module, tape)
    made: dict[int, Tensor] = {}
    for owner in module.modules():
        _leave_fakes(owner, tape, made)
    _RECIPES[module] = _Recipe(tape, views, target)
    return module


def _views(module: nn.Module, tape: Tape) -> dict[str, View]:
    return {
        f"{prefix}.{leaf}".lstrip("."): tape.view(tensor)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        for leaf, tensor in [*owner._parameters.items(), *owner._buffers.items()]
        if isinstance(tensor, FakeTensor)
    }


def device_of(module: nn.Module) -> torch.device:
    """Where a model's parameters are, or will be if it is deferred.

    Raises:
        WrapError: when they are on the meta device and nobody knows their values.
    """
    if module in _RECIPES:
        return _recipe(module).device
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise WrapError(
                f"parameter {name} is on the meta device and has no values; build the model with "
                "meshwright.deferred(lambda: ...), which remembers how they are made"
            )
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def recipe_text(module: nn.Module, name: str) -> str:
    """How a deferred tensor's values are made, equal on two ranks that would make equal ones; "" for any other."""
    if module not in _RECIPES or name not in _recipe(module).views:
        return ""
    recipe = _recipe(module)
    return recipe.tape.recipe(recipe.views[name])


def materialise(module: nn.Module) -> nn.Module:
    """Gives a deferred model all its values, whole, in place; any other model stays as it is."""
    allocate(module, _whole)
    return module


def on_shapes(module: nn.Module, run: Callable[[torch.device], T]) -> T:
    """Runs a model for its shapes alone; one whose code asks for values is made whole first, with a warning.

    Args:
        module: deferred or not.
        run: runs it on inputs of the given device.
    """
    try:
        with MetaAnswers():
            return run(next(module.parameters()).device)
    except RuntimeError as error:
        if module not in _RECIPES:
            raise
        warnings.warn(
            f"the model cannot be run on shapes alone ({str(error).splitlines()[0]}), so this process makes it whole",
            stacklevel=2,
        )
        materialise(module)
        return run(next(module.parameters()).device)


def allocate(module: nn.Module, boxes_of: Callable[[str, Tensor], Iterable[Chunk]]) -> None:
    """Gives memory to the tensors of a deferred module and fills it; large ones first, while little else is held.

    Args:
        module: its parameters may be shares by now; if it is not deferred, nothing happens.
        boxes_of: name and new tensor -> the boxes of the whole tensor that it consists of.
    """
    if module not in _RECIPES:
        return
    recipe = _recipe(module)
    for owners in _by_size(module, recipe):
        name, owner, leaf = owners[0]
        held = _with_memory(getattr(owner, leaf), recipe.device)
        values = recipe.tape.values(recipe.views[name])
        with torch.no_grad():
            for box in boxes_of(name, held):
                ends = [start + size for start, size in zip(box.offsets, box.values.shape, strict=True)]
                box.values.copy_(values[tuple(slice(*pair) for pair in zip(box.offsets, ends, strict=True))])
        for _, owner, leaf in owners:
            setattr(owner, leaf, held)
    for owner in module.modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(recipe.device)
    del _RECIPES[module]


def _recipe(module: nn.Module) -> _Recipe:
    found: _Recipe = _RECIPES[module]
    return found


def _by_size(module: nn.Module, recipe: _Recipe) -> list[list[tuple[str, nn.Module, str]]]:
    """Places (name, module, attribute) of each meta tensor, those of the largest one first."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for kind in (owner._parameters, owner._buffers):
            for leaf, tensor in kind.items():
                if tensor is not None and tensor.is_meta:
                    places.setdefault(id(tensor), []).append((f"{prefix}.{leaf}".lstrip("."), owner, leaf))
    return sorted(places.values(), key=lambda found: -recipe.views[found[0][0]].num_bytes)


def _whole(name: str, tensor: Tensor) -> list[Chunk]:
    del name
    return [Chunk((0,) * tensor.dim(), tensor)]


def _with_memory(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, DTensor):
        local = torch.empty_like(tensor.to_local(), device=device)
        fresh: Tensor = DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )
    else:
        fresh = torch.empty_like(tensor, device=device)
    made: Tensor = like(tensor, fresh)
    return made


def like(tensor: Tensor, fresh: Tensor) -> Any:
    """`fresh` as a parameter where `tensor` is one, with what a user hung on it."""
    if isinstance(tensor, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():
        if not hasattr(fresh, name):
            setattr(fresh, name, value)
    return fresh


def _leave_fakes(owner: nn.Module, tape: Tape, made: dict[int, Tensor]) -> None:
    """Replaces fake tensors of a module: registered ones by meta tensors, others by their values."""
    for kind in (owner._parameters, owner._buffers):
        for leaf, tensor in kind.items():
            if isinstance(tensor, FakeTensor):
                if id(tensor) not in made:
                    made[id(tensor)] = _on_meta(tensor)
                    made[id(made[id(tensor)])] = tensor  # held, so that no other tensor gets its number
                kind[leaf] = made[id(tensor)]  # type: ignore[assignment]

    def valued(leaf: Any) -> Any:
        return tape.values(tape.view(leaf)) if isinstance(leaf, FakeTensor) else leaf

    for name, value in list(vars(owner).items()):
        if name not in ("_parameters", "_buffers", "_modules") and any(
            isinstance(leaf, FakeTensor) for leaf in tree_leaves(value)
        ):
            setattr(owner, name, tree_map(valued, value))


def _on_meta(tensor: Tensor) -> Tensor:
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return fresh.requires_grad_(tensor.requires_grad)
    return nn.Parameter(fresh, requires_grad=tensor.requires_grad)
