"""Experts that are modules, cut into slices of their hidden features: what is cut, and where, is seen and not named.

A copy of an expert runs whose parameters have shapes and no memory, and its linear layers answer with numbers of ours.
Gradients of what the last layer is given tell which of these each hidden feature needs. Then each slice runs, on
parameters of its own shapes and its own part of the numbers: what it gives its last layer must be the whole expert's
part, and what that layer makes must leave the expert as it is. So slices add up to the expert, whatever its weights.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from meshwright.moe.errors import SwapError
from meshwright.parallel.layout import Range, Split, deal

__all__ = ["draws", "form_of", "ranges_of", "slice_expert", "sources_of"]

_ROWS = 3


class _UnfitError(Exception):
    """Why an expert cannot be cut."""


@dataclass(frozen=True, eq=False)
class _Call:
    """A linear layer that was called: its parameters, what it was given, and our answer (both [rows, features])."""

    weight: str
    bias: str | None
    given: Tensor
    answer: Tensor


@dataclass(eq=False)
class _Run:
    """What an expert made of tokens by which calls, and the shapes of what it dropped elements of."""

    tokens: Tensor
    made: Any = None
    calls: list[_Call] = field(default_factory=list)
    dropped: list[torch.Size] = field(default_factory=list)


def slice_expert(expert: nn.Module, *, slices: int, where: str) -> dict[str, Split]:
    """Each parameter of a feed-forward expert -> the part of it that each slice keeps.

    Of a bias behind the last product, which is added once, the first slice keeps all and the others nothing.

    Args:
        expert: [rows, d] -> [rows, d], by linear layers; all but the last read tokens. May be on the meta device.
        slices: how many.
        where: its path, for errors.

    Raises:
        SwapError: for an expert that is not seen to be the sum of slices of it.

    >>> cuts = slice_expert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), slices=2, where="0")
    >>> {name: (cut.dim, cut.held) for name, cut in cuts.items() if name.startswith("2.")}
    {'2.weight': (1, (((0, 2),), ((2, 4),))), '2.bias': (0, (((0, 3),), ()))}
    """
    try:
        whole = _whole(expert)
        cuts = _cuts(expert, whole, slices)
        found = [_slice(expert, whole, cuts, part=part) for part in range(slices)]
        for each, parts in zip(whole.dropped, zip(*found, strict=True), strict=True):
            if sum(part[-1] for part in parts) != each[-1] or not draws(expert):
                raise _UnfitError("it drops elements that are no hidden features, or not by nn.Dropout")
    except (_UnfitError, RuntimeError) as error:  # of a backward that a model could not do either
        why = error if isinstance(error, _UnfitError) else f"it cannot be followed ({str(error).splitlines()[0]})"
        raise SwapError(f"expert {where} is not seen to be the sum of {slices} slices: {why}; use one slice") from None
    return cuts


def draws(expert: nn.Module) -> bool:
    """Whether dropout is on inside.

    >>> draws(nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.1)))
    True
    """
    return any(isinstance(each, nn.Dropout) and each.p > 0 for each in expert.modules())


def form_of(expert: nn.Module) -> tuple[object, ...]:
    """What two experts share that do the same but for their weights; it can be compared and looked up.

    >>> form_of(nn.Linear(2, 3)) == form_of(nn.Linear(2, 3)), form_of(nn.Dropout(0.1)) == form_of(nn.Dropout(0.2))
    (True, False)
    """
    shapes = tuple((name, each.shape) for name, each in (*expert.named_parameters(), *expert.named_buffers()))
    options = (
        (path, type(module), name, value if isinstance(value, int | float | str) else id(value))
        for path, module in expert.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_")
    )
    return (*shapes, *options)


def sources_of(outputs: Tensor, inputs: Tensor, parts: Sequence[Range]) -> list[Tensor]:
    """For each range of the last dim of `outputs`, the entries of the last dim of `inputs` that it is made of (bool).

    >>> inputs = torch.ones(1, 4).requires_grad_()
    >>> [each.tolist() for each in sources_of(inputs[:, :2] * inputs[:, 2:], inputs, [(0, 1), (1, 2)])]
    [[True, False, True, False], [False, True, False, True]]
    """
    weighted = outputs * torch.linspace(1.0, 2.0, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)
    sums = [weighted[..., low:high].sum() for low, high in parts]
    if not outputs.requires_grad:
        return [torch.zeros(inputs.shape[-1], dtype=torch.bool) for _ in parts]
    found = [
        torch.autograd.grad(each, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        for each in sums
    ]
    return [(each != 0).flatten(0, -2).any(0) for each in found]


def ranges_of(entries: Tensor) -> list[Range]:
    """Where a row of flags is set.

    >>> ranges_of(torch.tensor([True, True, False, True]))
    [(0, 2), (3, 4)]
    """
    padded = functional.pad(entries.to(torch.int8), (1, 1))
    borders = padded.diff().nonzero().flatten().tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))


class _Watch(TorchFunctionMode):
    """Answers in the place of linear layers, and drops nothing."""

    def __init__(self, expert: nn.Module, run: _Run, answer: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._names = {id(each): name for name, each in expert.named_parameters()}
        self._run = run
        self._answer = answer

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        """Takes calls that touch parameters."""
        args, kwargs = given[0] if given else (), given[1] if len(given) > 1 and given[1] else {}
        if func is functional.linear:
            return self._linear(*args, **kwargs)
        if func is functional.dropout:
            return self._dropout({**dict(zip(("input", "p", "training", "inplace"), args, strict=False)), **kwargs})
        made = func(*args, **kwargs)
        touched = [self._names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._names]
        if touched and any(isinstance(leaf, Tensor) for leaf in tree_leaves(made)):
            raise _UnfitError(f"{touched[0]} is used otherwise than by a linear layer")
        return made

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) not in self._names or (bias is not None and id(bias) not in self._names):
            raise _UnfitError("a linear layer's weight is not a parameter of it as it is")
        if input.shape != (_ROWS, weight.shape[1]):
            raise _WidthError(f"{self._names[id(weight)]} reads {weight.shape[1]} features, not {list(input.shape)}")
        answer = self._answer(weight.shape[0])
        call = _Call(self._names[id(weight)], None if bias is None else self._names[id(bias)], input, answer)
        self._run.calls.append(call)
        return answer.clone()  # which may be changed in place

    def _dropout(self, given: dict[str, Any]) -> Any:
        if given.get("p", 0.5) > 0 and given.get("training", True):
            self._run.dropped.append(given["input"].shape)
        return given["input"]


class _WidthError(_UnfitError):
    """Tokens have another width."""


def _ran(expert: nn.Module, tokens: Tensor, answer: Callable[[int], Tensor]) -> _Run:
    """Runs a copy without memory."""
    run, before = _Run(tokens), torch.get_rng_state()
    try:
        with torch.enable_grad(), _Watch(expert, run, answer):
            run.made = expert(tokens.clone())
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise _UnfitError(f"it cannot be followed ({type(error).__name__}: {error})") from None
    if not run.calls:
        raise _UnfitError("it calls no linear layer")
    if not torch.equal(before, torch.get_rng_state()):
        raise _UnfitError("it draws random numbers")
    if not isinstance(run.made, Tensor) or not torch.equal(run.made, run.calls[-1].answer):
        raise _UnfitError(f"it is not what its last linear layer {run.calls[-1].weight} makes")
    return run


def _whole(expert: nn.Module) -> _Run:
    """What the whole expert does; tokens are as wide as it wants them."""
    generator = torch.Generator().manual_seed(0)

    def drawn(width: int) -> Tensor:
        numbers = torch.randn(_ROWS, width, generator=generator, dtype=torch.float64, device="cpu")
        numbers[0] = numbers[0].abs() + 0.5  # where a ReLU lets everything through
        return numbers.requires_grad_()

    shapes = [each.shape for each in expert.parameters()]
    widths = dict.fromkeys(shape[1] for shape in shapes if len(shape) == 2)
    errors: list[_UnfitError] = []
    for width in widths:
        try:
            return _ran(_hollow(expert), drawn(width).detach(), drawn)
        except _UnfitError as error:
            errors.append(error)
    errors.sort(key=lambda error: isinstance(error, _WidthError))  # other reasons tell more
    raise errors[0] if errors else _UnfitError("it has no matrices")


def _cuts(expert: nn.Module, whole: _Run, slices: int) -> dict[str, Split]:
    """How parameters are cut."""
    shapes = {name: each.shape for name, each in expert.named_parameters()}
    *ups, down = whole.calls
    width, inner = shapes[down.weight]
    if slices > inner:
        raise _UnfitError(f"it has {inner} hidden features")
    parts = deal(inner, slices)
    cuts = {down.weight: Split.of(1, inner, [[part] for part in parts])}
    if down.bias is not None:
        cuts[down.bias] = Split.of(0, width, [[(0, width)], *([] for _ in parts[1:])])
    for up in ups:
        needed = sources_of(down.given, up.answer, parts)
        if not bool((torch.stack(needed).sum(0) == 1).all()):
            raise _UnfitError(f"features of {up.weight} do not each go to hidden features of one slice")
        held = [ranges_of(each) for each in needed]
        for name in filter(None, (up.weight, up.bias)):
            cuts[name] = Split.of(0, shapes[up.weight][0], held)
    once = {call.weight for call in whole.calls} | {call.bias for call in whole.calls if call.bias is not None}
    uses = sum(1 if call.bias is None else 2 for call in whole.calls)
    if once != set(shapes) or uses > len(once):
        raise _UnfitError("its parameters are not each used by one call of a linear layer")
    return cuts


def _slice(expert: nn.Module, whole: _Run, cuts: Mapping[str, Split], *, part: int) -> list[torch.Size]:
    """Runs one slice and compares it with its part of the whole; returns the shapes of what it dropped elements of."""
    *ups, down = whole.calls
    answers = iter([*(_taken(up.answer, cuts[up.weight], part) for up in ups), down.answer.detach()])
    mine = _ran(_hollow(expert, cuts, part), whole.tokens, lambda _: next(answers))
    given = [*(up.given for up in ups), _taken(down.given, cuts[down.weight], part)]
    names = [(call.weight, call.bias if call is not down or part == 0 else None) for call in whole.calls]
    alike = [
        each.given.shape == of_whole.shape and torch.allclose(each.given, of_whole, rtol=1e-5, equal_nan=True)
        for each, of_whole in zip(mine.calls, given, strict=False)
    ]
    if names != [(call.weight, call.bias) for call in mine.calls] or not all(alike):
        raise _UnfitError(f"slice {part} gives its linear layers something else than the whole expert")
    return mine.dropped


def _taken(features: Tensor, cut: Split, part: int) -> Tensor:
    return torch.cat([features.detach()[:, low:high] for low, high in cut.held[part]], 1)


def _hollow(expert: nn.Module, cuts: Mapping[str, Split] | None = None, part: int = 0) -> nn.Module:
    """A copy, in training, whose parameters have the shapes of a slice and one element in memory."""
    memory: dict[int, Any] = {}
    for name, each in expert.named_parameters():
        shape = each.shape if cuts is None else cuts[name].local_shape(each.shape, part)
        memory[id(each)] = nn.Parameter(torch.zeros((), dtype=torch.float64, device="cpu").expand(shape))
    made = copy.deepcopy(expert, memory)
    for name, cut in (cuts or {}).items():
        if not cut.held[part]:
            path, _, leaf = name.rpartition(".")
            made.get_submodule(path)._parameters[leaf] = None
    return made.train()
