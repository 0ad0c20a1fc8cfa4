"""What a model computes with its matrices: one forward pass on an example, watched from outside.

Every tensor carries the set of matrices whose products reached it without passing through another one. That says
which matrices feed which, whose products leave, and into how many heads a product is cut, for any model and on any
device (meta included), from shapes and data flow alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from meshwright.parallel.dropout import without_dropout

__all__ = ["Matrix", "Segment", "Sight", "matrix_form", "watch"]


@dataclass(frozen=True, order=True)
class Segment:
    """A range of a product's features, `size` from `start`, cut into `count` heads (or single features)."""

    start: int
    size: int
    count: int


@dataclass
class Matrix:
    """One matrix of a model and what became of its product.

    Attributes:
        transposed: whether its weight is [inputs, outputs] and not [outputs, inputs].
        segments: how the model cuts its product.
        fed_by: matrices whose products reach its input.
    """

    path: str
    transposed: bool
    inputs: int
    outputs: int
    segments: tuple[Segment, ...] = ()
    fed_by: set[str] = field(default_factory=set)


@dataclass
class Sight:
    """What was seen.

    Attributes:
        matrices: by path, in the order of their first call.
        leaked: matrices whose products reach the model's output without passing another matrix.
        scored: matrices whose product is the scores of a cross entropy.
        lookups: paths of embeddings that were called.
        used_directly: names of parameters that are used outside the module that owns them.
        elements: matrix or embedding -> for each call, elements of its input and of its output.
    """

    matrices: dict[str, Matrix]
    leaked: set[str]
    scored: set[str]
    lookups: set[str]
    used_directly: set[str]
    elements: Mapping[str, list[tuple[int, int]]]


def watch(model: nn.Module, run: Callable[[], Any]) -> Sight:
    """Runs `run` (one forward pass of `model`) and says what was seen; the model stays as it was."""
    forms = {path: form for path, leaf in model.named_modules() if (form := matrix_form(leaf)) is not None}
    watcher = _Watcher()
    hooks = []
    for path, leaf in model.named_modules():
        if path in forms:
            hooks.append(leaf.register_forward_hook(watcher.on_matrix(path, forms[path] == "transposed")))
        elif isinstance(getattr(leaf, "weight", None), nn.Parameter) and leaf.weight.dim() == 2:
            hooks.append(leaf.register_forward_hook(watcher.on_lookup(path)))
    try:
        with without_dropout(model), saved_tensors_hooks(_forget, _refuse), watcher:
            output = run()
    finally:
        for hook in hooks:
            hook.remove()
    return watcher.sight(model, output)


def matrix_form(leaf: nn.Module) -> str | None:
    """ "linear" if the module computes x W^T + b, "transposed" if x W + b, None if neither.

    It is asked, not named: a small copy of it is run.

    >>> matrix_form(nn.Linear(2, 3)), matrix_form(nn.LayerNorm(2))
    ('linear', None)
    """
    if not _may_be_matrix(leaf):
        return None
    weight, bias = leaf.weight, leaf.bias
    assert isinstance(weight, Tensor), type(weight)
    small = copy(leaf)
    two_by_two = nn.Parameter(torch.arange(4.0).reshape(2, 2))
    two = None if bias is None else nn.Parameter(torch.tensor([5.0, 7.0]))
    small._parameters = {"weight": two_by_two, "bias": two}
    for name, value in vars(leaf).items():
        if type(value) is int and value in weight.shape:
            setattr(small, name, 2)
    given = torch.tensor([[3.0, 11.0]])
    try:
        with torch.no_grad():
            found = small.forward(given)
    except Exception:  # whatever a module raises when it is given a matrix's input, it is no matrix
        return None
    forms = {"linear": two_by_two, "transposed": two_by_two.T}
    same = (form for form, each in forms.items() if _equal(found, functional.linear(given, each, two)))
    return next(same, None)


def _may_be_matrix(leaf: nn.Module) -> bool:
    weight = getattr(leaf, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or not weight.is_floating_point():
        return False
    inside = [*leaf.children(), *leaf.buffers()]
    return not inside and set(dict(leaf.named_parameters())) <= {"weight", "bias"} and hasattr(leaf, "bias")


def _equal(found: Any, expected: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.equal(found, expected)


class _Watcher(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self._matrices: dict[str, Matrix] = {}
        self._tags: Any = WeakIdKeyDictionary()
        self._plain: Any = WeakIdKeyDictionary()  # tensor [..., size] -> (path, start): features not yet cut
        self._stacked: Any = (
            WeakIdKeyDictionary()
        )  # tensor [..., n, heads, ...] -> (path, start, size, (n, heads, ...))
        self._cuts: dict[str, set[Segment]] = {}
        self._flat: dict[str, set[Segment]] = {}
        self._scored: set[str] = set()
        self._lookups: set[str] = set()
        self._uses: Counter[int] = Counter()
        self._elements: dict[str, list[tuple[int, int]]] = {}

    def on_matrix(self, path: str, transposed: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor), type(weight)
            self._uses.subtract(id(each) for each in module.parameters())
            inputs, outputs = weight.shape if transposed else weight.shape[::-1]
            matrix = self._matrices.setdefault(path, Matrix(path, transposed, inputs, outputs))
            for given in _tensors(args):
                matrix.fed_by |= self._tags.get(given, frozenset())
            self._count(path, args, output)
            self._tags[output] = frozenset([path])
            self._plain[output] = (path, 0)

        return hook

    def on_lookup(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._uses.subtract(id(each) for each in module.parameters())
            if args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
                self._lookups.add(path)
                self._count(path, args, output)

        return hook

    def _count(self, path: str, args: tuple[Any, ...], output: Tensor) -> None:
        self._elements.setdefault(path, []).append((args[0].numel(), output.numel()))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = _tensors(result)
        if made or func is Tensor.__setitem__:
            self._note(func, _tensors((args, kwargs or {})), made)
        return result

    def _note(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        if func is Tensor.__setitem__:
            made = given[:1]
        self._uses.update(id(each) for each in given if isinstance(each, nn.Parameter))
        self._tag(func, given, made)
        for source in given:
            if source in self._plain:
                for result in made:
                    self._follow(source, result)
            elif source in self._stacked:
                for result in made:
                    self._unstack(source, result)

    def _tag(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        tags = frozenset().union(*(self._tags.get(each, frozenset()) for each in given))
        if func is functional.cross_entropy and len(tags) == 1:
            self._scored |= tags
        for result in made if tags else ():
            self._tags[result] = tags | self._tags.get(result, frozenset())

    def _follow(self, source: Tensor, result: Tensor) -> None:
        """Keeps track of a product's features through slices, casts and the view that cuts them into heads."""
        path, start = self._plain[source]
        size = source.shape[-1]
        if result is source:
            return
        if result.shape == source.shape:
            self._plain[result] = (path, start)
        elif result.dim() == source.dim() and result.shape[:-1] == source.shape[:-1] and _is_slice(source, result):
            self._plain[result] = (path, start + result.storage_offset() - source.storage_offset())
        elif result.numel() == source.numel() and (count := _num_heads(source.shape, result.shape)):
            self._cuts.setdefault(path, set()).add(Segment(start, size, count))
            parts = tuple(result.shape[source.dim() - 1 :])
            if len(parts) > 2 and prod(parts) == size:
                self._stacked[result] = (path, start, size, parts)
            return
        self._flat.setdefault(path, set()).add(Segment(start, size, size))

    def _unstack(self, source: Tensor, result: Tensor) -> None:
        """Sees a view [..., n, heads, ...] taken apart along n: these are n segments, not n heads."""
        path, start, size, parts = self._stacked[source]
        if source.untyped_storage()._cdata != result.untyped_storage()._cdata:
            return
        if (parts[0], size // parts[0]) in zip(result.shape, result.stride(), strict=True):
            self._stacked[result] = self._stacked[source]
            return
        each = size // parts[0]
        self._cuts[path].discard(Segment(start, size, parts[0]))
        self._cuts[path] |= {Segment(start + number * each, each, parts[1]) for number in range(parts[0])}

    def sight(self, model: nn.Module, output: Any) -> Sight:
        names = {id(each): name for name, each in model.named_parameters()}
        for path, matrix in self._matrices.items():
            cuts, flat = self._cuts.get(path, set()), self._flat.get(path, set())
            matrix.segments = _tiling(cuts, flat, matrix.outputs)
        made = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        leaked = frozenset().union(*(self._tags.get(each, frozenset()) for each in made))
        direct = {names[key] for key, number in self._uses.items() if number > 0 and key in names}
        return Sight(self._matrices, set(leaked), self._scored, self._lookups, direct, self._elements)


def _num_heads(source: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Into how many heads a view cuts the last dim of `source`; 0 where it does something else."""
    lead = len(source) - 1
    if len(result) > len(source) and tuple(result[:lead]) == tuple(source[:-1]):
        return result[lead]
    trailing = len(result)
    while trailing > 0 and prod(result[trailing:]) < source[-1]:
        trailing -= 1
    if prod(result[trailing:]) != source[-1] or len(result) - trailing < 2:
        return 0
    return result[trailing]


def _is_slice(source: Tensor, result: Tensor) -> bool:
    same = source.untyped_storage()._cdata == result.untyped_storage()._cdata
    return same and result.stride() == source.stride() and result.shape[-1] < source.shape[-1]


def _tiling(cuts: set[Segment], flat: set[Segment], outputs: int) -> tuple[Segment, ...]:
    """Segments that tile a product: heads where the model cuts heads, else its slices, else all of it as features."""
    loose = [each for each in flat if not any(_overlap(each, cut) for cut in cuts)]
    finest = [each for each in loose if not any(each != other and _inside(other, each) for other in loose)]
    tiles = sorted([*cuts, *finest])
    end = 0
    for tile in tiles:
        if tile.start != end:
            break
        end += tile.size
    return (
        tuple(tiles)
        if end == outputs and sum(tile.size for tile in tiles) == outputs
        else (Segment(0, outputs, outputs),)
    )


def _overlap(one: Segment, other: Segment) -> bool:
    return one.start < other.start + other.size and other.start < one.start + one.size


def _inside(inner: Segment, outer: Segment) -> bool:
    return outer.start <= inner.start and inner.start + inner.size <= outer.start + outer.size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [found for item in value for found in _tensors(item)]
    if isinstance(value, dict):
        return [found for item in value.values() for found in _tensors(item)]
    return []


def _forget(tensor: Tensor) -> None:
    """Saved tensors of the watched pass are not kept: it has no backward."""


def _refuse(nothing: None) -> Tensor:
    raise AssertionError("the watched pass has no backward")
