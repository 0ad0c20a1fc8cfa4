"""Attention over the whole sequence with all scores at once, and what a rank should find of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.parallel.blockwise.dropout import kept
from meshwright.parallel.blockwise.mask import Frame, Mask
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import ContextAxis, context_axis
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.kinds import Kind
from meshwright.parallel.mesh import Mesh

SEED = 5


@dataclass
class Case:
    """One attention; tensors that want a gradient are `query`, `key`, `value`, and those in `more`."""

    query: Tensor
    key: Tensor
    value: Tensor
    more: dict[str, Tensor]
    options: dict[str, Any]
    grad: Tensor


def dense(case: Case) -> Tensor:
    """softmax(scores) value, in float64."""
    query, options = case.query, case.options
    (batch, heads, length, width), group = query.shape, query.shape[1] // case.key.shape[1]
    key, value = (each.repeat_interleave(group, 1) for each in (case.key, case.value))
    scores = query @ key.mT * options.get("scale", width**-0.5)
    if "softcap" in options:
        scores = (scores / options["softcap"]).tanh() * options["softcap"]
    everything, frame = range(length), Frame(range(batch), range(heads))
    if "bias" in options:
        scores = scores + options["bias"](everything, everything)
    if "bias" in case.more:
        scores = scores + case.more["bias"]
    mask: Mask | None = options.get("mask")
    if mask is not None:
        scores = scores.masked_fill(~mask.pairs(everything, everything, frame), -torch.inf)
    if "sinks" in case.more:
        scores = torch.cat((scores, case.more["sinks"][:, None, None].expand(batch, heads, length, 1)), -1)
    shares = scores.softmax(-1)[..., :length].nan_to_num()
    if "dropout_p" in options:
        factors = kept(everything, everything, frame, seed=SEED, share=options["dropout_p"], dtype=shares.dtype)
        shares = shares * factors
    return shares @ value


def tensors_of(case: Case) -> dict[str, Tensor]:
    return {"query": case.query, "key": case.key, "value": case.value, **case.more}


def own_rows(tensors: dict[str, Tensor], places: Sequence[int]) -> dict[str, Tensor]:
    """What a rank holds: its rows of all that has rows."""
    return {
        name: each if name == "sinks" or (name == "bias" and each.shape[-2] == 1) else each[..., list(places), :]
        for name, each in tensors.items()
    }


def differences(case: Case, *, axis: ContextAxis, dealing: Dealing, kind: Kind) -> dict[str, float]:
    """Largest difference from dense attention, of the output and of every gradient."""
    whole = {name: each.detach().requires_grad_() for name, each in tensors_of(case).items()}
    named = [whole.pop(name) for name in ("query", "key", "value")]
    length = case.query.shape[2]
    out = dense(Case(*named, whole, case.options, case.grad))
    wanted = torch.autograd.grad((out * case.grad).sum(), [*named, *whole.values()])
    places = [place for piece in dealing.pieces(length, axis.rank) for place in piece]
    own = {name: each.detach().clone() for name, each in own_rows(tensors_of(case), places).items()}
    for each in own.values():
        each.requires_grad_()
    options = {**case.options, **{name: own[name] for name in case.more}}
    if "dropout_p" in options:
        options["dropout_seed"] = SEED
    found = attend_dealt(
        own["query"], own["key"], own["value"], axis=axis, dealing=dealing, length=length, kind=kind, **options
    )
    grads = torch.autograd.grad((found * case.grad[:, :, places]).sum(), list(own.values()))
    expected = own_rows(dict(zip(own, wanted, strict=True)), places)
    results = {"out": (found, out[:, :, places])}
    for (name, one), grad in zip(expected.items(), grads, strict=True):
        summed = grad.clone()
        if one.shape == wanted[list(own).index(name)].shape and name in case.more:
            dist.all_reduce(summed, group=axis.group)  # what all ranks hold alike
        results[name] = (summed, one)
    return {name: float((one - two).abs().max()) if one.numel() else 0.0 for name, (one, two) in results.items()}


def axis_here(*kinds: Kind) -> ContextAxis:
    """All ranks as one axis."""
    return context_axis(Groups(Mesh(cp=dist.get_world_size())), *kinds)
