"""Cross entropy of a head's scores by blocks of rows: exact, with no more than [block, classes] scores in memory.

  loss_i = lse_i - s_iy      d loss_i / d s_ij = exp(s_ij - lse_i) - [j = y]      lse_i = log sum_j exp s_ij

Backward keeps the rows that the head was given and one number for each of them, and computes scores anew. Where it
follows at once, gradients can be computed in advance, while the scores are there (as in Liger-Kernel, arXiv
2410.10989): that saves one of four products, and holds the gradient of the weight from forward to backward.
`F.linear_cross_entropy` of torch does so too, knows no steps after the product and no dealt classes, and has no second
derivative; `python -m benchmarks.loss` found it as fast (0.95 to 0.98 of our time, noise 0.1) with 1.36 times our peak
of memory, so it is not used.

Ranks that all have the same rows can share them: each computes some, then losses and gradients are made whole.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional

from meshwright.parallel.blockwise.dealt_rows import DealtRows
from meshwright.parallel.blockwise.head import Gradients, Head
from meshwright.parallel.blockwise.product import Product
from meshwright.parallel.blockwise.wanted import wanted
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.layout import Range
from meshwright.parallel.targets import Targets

__all__ = ["Entropy", "blockwise_cross_entropy"]


@dataclass(frozen=True)
class Entropy:
    """What is to be computed.

    Args:
        product: scores from rows.
        classes: number of all classes.
        block: rows at a time.
        dtype: of the loss.
        ignore_index: of targets that do not count.
        reduction: "mean" (over targets that count), "sum" or "none".
        axis: over which classes are dealt; the gradient of rows is then this rank's part of a sum.
        span: the classes of this rank.
        in_advance: whether gradients are computed while the scores are there. It saves a quarter of the work where
            backward follows at once; micro-batches that went forward each hold a gradient of the weight until then.
        rows: ranks that have the same rows, targets and weight, and share the work; None for this rank alone.
    """

    product: Product
    classes: int
    block: int
    dtype: torch.dtype
    ignore_index: int = -100
    reduction: str = "mean"
    axis: Axis | None = None
    span: Range | None = None
    in_advance: bool = False
    rows: Axis | None = None

    @property
    def wide(self) -> torch.dtype:
        """What is computed in, whatever the dtype of products."""
        return torch.promote_types(self.dtype, torch.float32)


def blockwise_cross_entropy(
    call: Entropy, hidden: Tensor, target: Tensor, *, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What `F.cross_entropy` gives for the scores of rows `hidden` [rows, inputs] and class indices `target` [rows].

    Its second derivative is exact too, and makes the scores whole. Ranks that share rows all get the whole loss and
    whole gradients.

    >>> call = Entropy(Product(), classes=3, block=1, dtype=torch.float32)
    >>> blockwise_cross_entropy(call, torch.zeros(2, 3), torch.tensor([1, -100]), weight=torch.eye(3))
    tensor(1.0986)
    """
    loss: Tensor = _Entropy.apply(hidden, weight, bias, target, call)  # type: ignore[no-untyped-call]
    return loss


class _Entropy(Function):
    """`items` is the number of targets that count, under the name that `loss.items_of_graph` asks for."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        target, call = inputs[3:]
        dealt = DealtRows(call.rows, len(target))
        targets = Targets.of(target, call.ignore_index, call.span or (0, call.classes), classes=call.classes)
        targets = targets.rows(dealt.own)
        mine = (dealt.taken(inputs[0]), *inputs[1:3])
        head = Head(call.product, mine, call.block)
        needed = ctx.needs_input_grad[:3]
        early = Gradients(head, mine, needed) if _is_early(call, head, needed) else None
        lse, losses = _forward(call, head, targets, early=early)
        ctx.items, ctx.targets, ctx.call, ctx.dealt = targets.items, targets, call, dealt
        ctx.early = None if early is None else early.found(dealt)
        ctx.save_for_backward(*mine, target, lse)
        losses = dealt.joined(losses) if call.reduction == "none" else dealt.summed(losses.sum())
        result: Tensor = targets.reduce(losses, call.reduction).to(call.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        *inputs, target, lse = ctx.saved_tensors
        needed = wanted(ctx, [each is not None for each in inputs])
        if torch.is_grad_enabled():
            return (*_differentiable(ctx.call, inputs, target, gradient=gradients[0], needed=needed), None, None)
        found: list[Tensor | None] = [None, None, None]
        for number, early in enumerate(ctx.early or ()):
            if early is not None and needed[number]:
                found[number], ctx.early[number] = early.mul_(gradients[0].to(early.dtype)), None
        missing = [need and each is None for need, each in zip(needed, found, strict=True)]
        if any(missing):
            of_losses = gradients[0][ctx.dealt.own] if ctx.call.reduction == "none" else gradients[0]
            factors = ctx.targets.spread(of_losses.to(ctx.call.wide), ctx.call.reduction)
            found_here = _backward(ctx.call, inputs, missing, targets=ctx.targets, lse=lse, factors=factors)
            rest = found_here.found(ctx.dealt)
            found = [other if each is None else each for each, other in zip(found, rest, strict=True)]
        return (*found, None, None)


def _is_early(call: Entropy, head: Head, needed: Any) -> bool:
    """Unscaled gradients of float16 would vanish, and dealt scores need those of other ranks first."""
    possible = call.axis is None and call.reduction != "none" and head.matrix.dtype is not torch.float16
    return call.in_advance and possible and any(needed)


def _forward(call: Entropy, head: Head, targets: Targets, *, early: Gradients | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and loss of each row; gradients of the mean or sum where they are computed in advance."""
    largest, total, own = torch.zeros(3, len(targets.counted), dtype=call.wide, device=targets.counted.device)
    factors = targets.spread(torch.ones_like(own[:1]).squeeze(0), call.reduction)
    for block in head.blocks:
        product, scores = head.scores(block, goes_back=early is not None)
        values = scores.detach().to(call.wide)
        own[block] = values.gather(1, targets.place[block].unsqueeze(1)).squeeze(1)
        largest[block] = values.amax(-1).clamp_min(torch.finfo(call.wide).min)
        powers = _powers(values, largest[block], spare=product is scores or values.dtype != scores.dtype)
        total[block] = powers.sum(-1)
        if early is not None:
            powers.div_(total[block].unsqueeze(1))
            gradient = _of_scores(powers, targets, block, factors=factors)
            early.add(block, head.gradient(product, scores, gradient))
    if call.axis is not None:
        mine, largest = largest, call.axis.largest(largest.clone())
        total, own = call.axis.sum(
            torch.stack([total * (mine - largest).exp(), (own - largest).masked_fill(~targets.mine, 0.0)])
        )
    else:
        own = own - largest
    return total.log() + largest, (total.log() - own).masked_fill(~targets.counted, 0.0)


def _backward(call: Entropy, inputs: Any, needed: Any, *, targets: Targets, lse: Tensor, factors: Tensor) -> Gradients:
    """Gradients from the log-sum-exp and the gradient of each row's loss."""
    head = Head(call.product, inputs, call.block)
    gradients = Gradients(head, inputs, needed)
    for block in head.blocks:
        product, scores = head.scores(block, goes_back=True)
        values = scores.detach().to(call.wide)
        shares = _powers(values, lse[block], spare=product is scores or values.dtype != scores.dtype)
        gradient = _of_scores(shares, targets, block, factors=factors)
        gradients.add(block, head.gradient(product, scores, gradient))
    return gradients


def _powers(values: Tensor, shift: Tensor, *, spare: bool) -> Tensor:
    """exp(values - shift), row by row; spare values give their memory."""
    moved = values.sub_(shift.unsqueeze(1)) if spare else values - shift.unsqueeze(1)
    return moved.exp_()


def _of_scores(shares: Tensor, targets: Targets, block: slice, *, factors: Tensor) -> Tensor:
    """The gradient of scores [block, classes], in the place of their shares of the sum."""
    shares.mul_(factors[block].unsqueeze(1))
    one = (factors * targets.mine)[block].unsqueeze(1)
    return shares.scatter_add_(1, targets.place[block].unsqueeze(1), -one)


def _differentiable(
    call: Entropy, inputs: Any, target: Tensor, *, gradient: Tensor, needed: Any
) -> list[Tensor | None]:
    """The same gradients with a history, from whole scores."""
    if call.rows is not None:
        raise WrapError("second derivatives of a cross entropy whose rows are dealt over cp cannot be had; use cp=1")
    if call.axis is not None:
        raise WrapError(
            "second derivatives of a cross entropy whose classes are dealt over tp cannot be had; use tp=1, or leave "
            "the head replicated with tensor_plan={'<head>': 'replicate'}"
        )
    scores = call.product(*inputs).to(call.wide)
    loss = functional.cross_entropy(scores, target, ignore_index=call.ignore_index, reduction=call.reduction)
    asked = [each for each, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(loss.to(call.dtype), asked, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]
