"""The experts of a model, found by structure: a module that is called with tokens, choices and weights.

  stacked    parameters [num_experts, ...] only: the standard experts interface of `transformers` (5.0 and later), which
             says by `has_gate`, `has_bias` and `is_transposed` what they mean
  listed     `num_experts` modules of one type in a `ModuleDict` or `ModuleList`, called one by one

A router is what stands beside them and has one row of weights for each. Shared experts and what else stands around are
the model's own, whatever their names.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from meshwright.moe.errors import SwapError

__all__ = ["FoundExperts", "find_bias", "find_experts", "find_router"]

_INTERFACE = ("has_gate", "has_bias", "is_transposed")
_NUM_INPUTS = 3
_MOST_SHOWN = 6


@dataclass(frozen=True, eq=False)
class FoundExperts:
    """One module that holds experts.

    Args:
        path: in the model.
        module: it.
        num_experts: of all ranks.
        kind: "stacked" or "listed".
    """

    path: str
    module: nn.Module
    num_experts: int
    kind: Literal["stacked", "listed"]


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """All experts of a model, in its order.

    Raises:
        SwapError: where there are none, naming what looks most like them, and for experts with parts of another kind.
    """
    found = list(_walk(model))
    if not found:
        raise SwapError(
            f"no module of {type(model).__name__} is recognised as experts: one called with (tokens, choices, weights) "
            "that keeps the parameters of `num_experts` experts stacked along a first dim, or that is a ModuleDict or "
            f"ModuleList of `num_experts` modules of one type{_nearest(model)}"
        )
    return found


def find_router(model: nn.Module, experts: FoundExperts) -> tuple[str, Any]:
    """The module beside experts, or the nearest inside of one beside them, that has one row of weights for each.

    Returns:
        Its path, and it.

    Raises:
        SwapError: where there is none, or more than one as near.
    """
    near = [(path.count("."), path, module) for path, module in _beside(model, experts)]
    rows = [each for each in near if _has_rows(each[-1], experts.num_experts)]
    best = [(path, module) for depth, path, module in rows if depth == min(rows)[0]]
    if len(best) == 1:
        return best[0]
    seen = f"; {' and '.join(path for path, _ in best)} could both be it" if best else ""
    raise SwapError(
        f"no router is recognised beside experts {experts.path}: one module with a weight "
        f"[{experts.num_experts}, d] and perhaps a bias{seen}"
    )


def find_bias(model: nn.Module, experts: FoundExperts) -> tuple[nn.Module, str] | None:
    """The tensor that moves a router's choices without learning: one number for each expert, beside the experts.

    Returns:
        The module that holds it and its name there; None where there is none.

    Raises:
        SwapError: for more than one.
    """
    parent = model.get_submodule(experts.path.rpartition(".")[0])
    found = {
        id(each): (module, name)
        for module in (parent, *(module for _, module in _beside(model, experts)))
        for name, each in (*module._buffers.items(), *module._parameters.items())
        if each is not None and not each.requires_grad and tuple(each.shape) == (experts.num_experts,)
    }
    if len(found) > 1:
        names = " and ".join(name for _, name in found.values())
        raise SwapError(f"{names} beside experts {experts.path} could each be the bias that moves their choices")
    return next(iter(found.values()), None)


def _beside(model: nn.Module, experts: FoundExperts) -> Iterator[tuple[str, nn.Module]]:
    """Modules beside experts, and all inside of them."""
    parent, _, own = experts.path.rpartition(".")
    for path, module in model.get_submodule(parent).named_modules():
        if path and path.partition(".")[0] != own:
            yield f"{parent}.{path}".lstrip("."), module


def _has_rows(module: nn.Module, number: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and len(weight) == number


def _walk(model: nn.Module) -> Iterator[FoundExperts]:
    for path, module in model.named_modules():
        number = getattr(module, "num_experts", None)
        if type(number) is not int or number < 1 or not _takes_choices(module):
            continue
        if _is_stacked(module, number):
            if getattr(module, "has_post_expert_norm", False):
                raise SwapError(f"experts {path} share a norm behind them, which this version does not deal")
            yield FoundExperts(path, module, number, "stacked")
        elif _is_listed(module, number):
            yield FoundExperts(path, module, number, "listed")


def _takes_choices(module: nn.Module) -> bool:
    inputs = inspect.signature(module.forward).parameters.values()
    return sum(each.kind is each.POSITIONAL_OR_KEYWORD for each in inputs) == _NUM_INPUTS


def _is_stacked(module: nn.Module, number: int) -> bool:
    own = [each.shape[0] if each.dim() else 0 for each in module.parameters(recurse=False)]
    known = all(hasattr(module, name) for name in _INTERFACE)
    return known and bool(own) and set(own) == {number} and not any(True for _ in _inner(module))


def _is_listed(module: nn.Module, number: int) -> bool:
    children: list[Any] = list(module.children())
    alike = len({type(each) for each in children}) == 1
    holds = isinstance(module, (nn.ModuleDict, nn.ModuleList)) and not list(module.parameters(recurse=False))
    return holds and alike and len(children) == number


def _inner(module: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of modules inside."""
    for child in module.children():
        yield from child.parameters()


def _nearest(model: nn.Module) -> str:
    near = [path for path, _ in model.named_modules() if "expert" in path.rpartition(".")[2]]
    return f"; nearest: {', '.join(near[:_MOST_SHOWN])}" if near else ""
