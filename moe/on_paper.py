"""Experts of a model run on shapes: tokens are spread evenly, since where they go depends on values.

Each rank of `ep` runs its own experts on as many rows as it sends away; rows travel to experts and back in both
directions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.moe.errors import SwapError
from meshwright.moe.recognise import FoundExperts, find_experts

__all__ = ["spread_evenly"]

Send = Callable[[str, str, Tensor], None]
"""Told of a collective: axis, kind, and the tensor that travels."""


def spread_evenly(
    model: nn.Module, send: Send, *, ep: int = 1, alike: int = 1, runs: Callable[[str], bool] = lambda path: True
) -> bool:
    """Makes the experts of a model run without values, in place; says whether it has any.

    Args:
        model: without values, inside a fake mode.
        send: told of what travels along `ep`.
        ep: ranks that share the experts.
        alike: ranks that hold the same tokens, each of which sends a share of them.
        runs: whether a module will be run.
    """
    try:
        found = find_experts(model)
    except SwapError:
        return False
    for each in found:
        if runs(f"{each.path}."):
            each.module.forward = _Even(each, send, ep=ep, alike=alike if ep > 1 else 1)
    return True


class _Even:
    """The forward of experts that get equal numbers of rows."""

    def __init__(self, found: FoundExperts, send: Send, *, ep: int, alike: int) -> None:
        self._module: Any = found.module
        self._is_stacked = found.kind == "stacked"
        self._own = max(1, found.num_experts // ep)
        self._send = send if ep > 1 else None
        self._alike = alike
        for name, parameter in list(found.module.named_parameters(recurse=False)) if self._is_stacked else ():
            own = parameter.new_empty((self._own, *parameter.shape[1:]))
            setattr(found.module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))

    def __call__(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """What experts make of this rank's tokens, [..., features]."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        top_k = weights.shape[-1]
        number = max(1, len(flat) // self._alike)
        each = max(1, -(-number * top_k // self._own))
        place = torch.empty(each * self._own, dtype=torch.long, device=flat.device)
        rows = self._travelled(flat.index_select(0, place))
        made = self._travelled(self._run(rows.view(self._own, each, -1)).reshape(len(place), -1))
        weighed = made * weights.reshape(-1)[:1].to(made.dtype)
        return torch.zeros_like(flat).index_add(0, place, weighed.to(flat.dtype)).view_as(tokens)

    def _travelled(self, rows: Tensor) -> Tensor:
        if self._send is None:
            return rows
        found: Tensor = _Travel.apply(rows, self._send)  # type: ignore[no-untyped-call]
        return found

    def _run(self, rows: Tensor) -> Tensor:
        """Each expert on its rows, [experts, rows, features]."""
        module = self._module
        if not self._is_stacked:
            experts = list(module.children())[: self._own]
            return torch.stack([expert(part) for expert, part in zip(experts, rows.unbind(0), strict=True)])
        up = "gate_up_proj" if module.has_gate else "up_proj"
        inner = self._product(rows, up)
        return self._product(module._apply_gate(inner) if module.has_gate else module.act_fn(inner), "down_proj")

    def _product(self, rows: Tensor, name: str) -> Tensor:
        module, matrix = self._module, getattr(self._module, name)
        made = torch.bmm(rows.to(matrix.dtype), matrix if module.is_transposed else matrix.mT)
        return made + getattr(module, f"{name}_bias")[:, None] if module.has_bias else made


class _Travel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: Send) -> Tensor:
        ctx.send = send
        send("ep", "all_to_all", rows)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.send("ep", "all_to_all", gradients[0])
        return gradients[0], None
