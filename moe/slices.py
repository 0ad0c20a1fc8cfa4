"""Experts cut into slices of their hidden features (expert tensor parallel), as experts of their own.

Expert x of slice j computes down_j(act(up_j(token))), and the slices of an expert add up to it. So a choice of x is a
choice of each of its slices with the same weight, any router goes with any transport, and nothing else knows. Ranks i s
to i s + s - 1 of `ep` share experts; slice j of them lies on rank i s + j.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.moe.assumed import with_values
from meshwright.moe.errors import SwapError
from meshwright.moe.folding import own_experts
from meshwright.moe.listed import form_of, ranges_of, slice_expert, sources_of
from meshwright.moe.recognise import FoundExperts
from meshwright.moe.routing import Routing
from meshwright.parallel.layout import Range, Split, deal

__all__ = ["Slicing", "sliced_columns"]


@dataclass(frozen=True)
class Slicing:
    """How choices of experts become choices of slices.

    Args:
        slices: of each expert; 1 leaves everything as it is.
        each: experts of one rank.

    >>> yes = torch.ones(1, 1, dtype=torch.bool)
    >>> routing = Routing(experts=torch.tensor([[3]]), weights=torch.ones(1, 1), asked=yes, kept=yes, num_experts=4)
    >>> Slicing(2, 2).of(routing).experts.tolist()  # the second experts of the last two of four ranks
    [[5, 7]]
    """

    slices: int
    each: int

    def of(self, routing: Routing) -> Routing:
        """The routing among slices."""
        if self.slices == 1:
            return routing
        rank, local = routing.experts.div(self.each, rounding_mode="floor"), routing.experts % self.each
        numbers = torch.arange(self.slices, device=local.device)
        slices = ((rank[..., None] * self.slices + numbers) * self.each + local[..., None]).flatten(1)
        return Routing(
            experts=slices,
            weights=self._repeated(routing.weights),
            asked=self._repeated(routing.asked),
            kept=self._repeated(routing.kept),
            num_experts=routing.num_experts * self.slices,
            real=routing.real,
        )

    def _repeated(self, choices: Tensor) -> Tensor:
        return choices[..., None].expand(*choices.shape, self.slices).flatten(1)


@with_values()  # which are tried
def sliced_columns(found: FoundExperts, *, ranks: int, slices: int) -> dict[str, Split]:
    """Parameter -> which part of its hidden features each rank of `ep` keeps, none of experts of other ranks.

    Which features of the first product a hidden one needs is seen from gradients of the activation, so that gates may
    lie in halves or side by side.

    Raises:
        SwapError: for experts that have too few hidden features or mix them, or that are not seen to be sums of slices.
    """
    return (_of_stacked if found.kind == "stacked" else _of_listed)(found, ranks, slices)


def _of_listed(found: FoundExperts, ranks: int, slices: int) -> dict[str, Split]:
    splits: dict[str, Split] = {}
    shares = [own_experts(found.num_experts, ranks=ranks // slices, rank=rank // slices) for rank in range(ranks)]
    known: dict[object, dict[str, Split]] = {}
    for number, (place, expert) in enumerate(found.module.named_children()):
        form = form_of(expert)
        if form not in known:
            known[form] = slice_expert(expert, slices=slices, where=f"{found.path}.{place}")
        for name, cut in known[form].items():
            held = [cut.held[rank % slices] if number in own else () for rank, own in enumerate(shares)]
            splits[f"{place}.{name}"] = Split(cut.dim, cut.size, tuple(held))
    return splits


def _of_stacked(found: FoundExperts, ranks: int, slices: int) -> dict[str, Split]:
    module: Any = found.module
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = (1, 2) if not module.is_transposed else (2, 1)
    wide, inner = getattr(module, name).shape[up], module.down_proj.shape[down]
    if slices > inner:
        raise SwapError(f"experts {found.path} have {inner} hidden features, too few for {slices} slices")
    parts = deal(inner, slices)
    sources = _sources(module._apply_gate if module.has_gate else module.act_fn, wide, parts, where=found.path)
    of_rank = [rank % slices for rank in range(ranks)]
    found_splits = {
        name: Split.of(up, wide, [sources[part] for part in of_rank]),
        "down_proj": Split.of(down, inner, [[parts[part]] for part in of_rank]),
    }
    if module.has_bias:
        found_splits[f"{name}_bias"] = Split.of(1, wide, [sources[part] for part in of_rank])
        width = module.down_proj_bias.shape[1]
        found_splits["down_proj_bias"] = Split.of(1, width, [[(0, width)] if part == 0 else [] for part in of_rank])
    return found_splits


def _sources(act: Any, wide: int, parts: list[Range], *, where: str) -> list[list[Range]]:
    """For each part of the activation's outputs, the inputs that it is made of."""
    with torch.enable_grad():
        inputs = torch.linspace(0.5, 1.5, wide, dtype=torch.float64)[None].requires_grad_()
        needed = sources_of(act(inputs), inputs, parts)
    if int(torch.stack(needed).sum(0).max()) > 1:
        raise SwapError(
            f"experts {where} mix their hidden features in the activation, so they cannot be cut into slices"
        )
    return [ranges_of(each) for each in needed]
