"""Heads whose scores are never there: cross entropy takes them block by block of rows (arXiv 2305.19370, section 3.3).

A tiled head gives `TiledScores`: the rows that it was given, and how scores come from them. What the model does with
scores on the way to the loss is noted; cross entropy then computes them a few rows at a time. Anything else makes them
whole, which is exact, as if the head had not been tiled, and is counted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.parallel.blocks import find_blocks
from meshwright.parallel.blockwise.dealt_rows import DealtRows
from meshwright.parallel.blockwise.entropy import Entropy, blockwise_cross_entropy
from meshwright.parallel.blockwise.product import Product, narrow_dtype
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis, enter
from meshwright.parallel.following import Call
from meshwright.parallel.layout import Range
from meshwright.parallel.scores import Scores
from meshwright.parallel.vocabulary import DealtHead, DealtScores, own_range
from meshwright.parallel.watch import matrix_form

__all__ = ["TiledHead", "TiledScores", "find_heads", "tile_loss"]

_BY_BLOCKS = "cross_entropy by blocks"


def tile_loss(
    model: nn.Module,
    block: int,
    *,
    heads: Sequence[str] | None = None,
    in_advance: bool = False,
    rows: Axis | None = None,
) -> dict[str, "TiledHead"]:
    """Makes heads give scores that cross entropy computes `block` rows at a time; returns them by their paths.

    Args:
        model: changed in place; dealt over `tp` already.
        block: rows (tokens) at a time; [block, vocabulary] scores are in memory at once.
        heads: paths of modules that multiply by one matrix; None takes those of `find_heads`.
        in_advance: compute gradients with the loss, see `Entropy`.
        rows: ranks that give their heads the same rows and share the work of the loss; None for this rank alone.

    Raises:
        WrapError: for a head that is no matrix.

    >>> model = nn.ModuleDict({"table": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    >>> list(tile_loss(model, 2))
    ['head']
    >>> scores = model["head"](torch.zeros(5, 4))
    >>> nn.functional.cross_entropy(scores, torch.arange(5)).backward()
    >>> model["head"].forward.uses
    Counter({'cross_entropy by blocks': 1})
    """
    paths = find_heads(model) if heads is None else heads
    found = {path: _tiled(path, model.get_submodule(path), block) for path in paths}
    tiled = {path: replace(each, block=block, in_advance=in_advance, rows=rows) for path, each in found.items()}
    for path, each in tiled.items():
        model.get_submodule(path).forward = each
    return tiled


def find_heads(model: nn.Module) -> list[str]:
    """Modules outside of blocks that multiply by one matrix which widens.

    It is a guess about what is worth while: whatever the product is used for comes out the same.
    """
    blocks = tuple(f"{path}." for path in find_blocks(model))
    found = []
    for path, module in model.named_modules():
        if path.startswith(blocks) or f"{path}." in blocks:
            continue
        form = "linear" if isinstance(module.forward, DealtHead) else matrix_form(module)
        weight = getattr(module, "weight", None)
        if form is None or not isinstance(weight, Tensor):
            continue
        inputs, outputs = weight.shape if form == "transposed" else weight.shape[::-1]
        if outputs > inputs or isinstance(module.forward, DealtHead):
            found.append(path)
    return found


def _tiled(path: str, head: nn.Module, block: int) -> "TiledHead":
    known = head.forward
    if isinstance(known, TiledHead):
        return known
    if isinstance(known, DealtHead):
        return TiledHead(head, known.vocabulary, block, axis=known.axis)
    form = matrix_form(head)
    if form is None:
        raise WrapError(
            f"{path} ({type(head).__name__}) does not multiply by one matrix, so its scores cannot be computed by "
            "blocks; name the last module that does, or leave the loss out of blockwise="
        )
    weight = head.weight
    assert isinstance(weight, Tensor), type(weight)
    transposed = form == "transposed"
    return TiledHead(head, weight.shape[1 if transposed else 0], block, transposed=transposed)


@dataclass(frozen=True)
class TiledHead:
    """The forward of a head whose scores are computed when they are needed.

    Attributes:
        head: the module.
        vocabulary: number of classes.
        block: rows at a time.
        axis: over which classes are dealt.
        transposed: whether the weight is [inputs, classes].
        in_advance: whether gradients are computed with the loss.
        rows: ranks that share the rows of a loss.
        uses: what scores were used for -> how often.
    """

    head: nn.Module
    vocabulary: int
    block: int
    axis: Axis | None = field(default=None, kw_only=True)
    transposed: bool = field(default=False, kw_only=True)
    in_advance: bool = field(default=False, kw_only=True)
    rows: Axis | None = field(default=None, kw_only=True)
    uses: Counter[str] = field(default_factory=Counter, kw_only=True)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The scores of rows [..., inputs], not computed yet."""
        weight, bias = self.head.weight, self.head.bias
        assert isinstance(weight, Tensor), type(weight)
        assert not isinstance(bias, nn.Module), type(bias)
        hidden = hidden if self.axis is None else enter(hidden, self.axis)
        product = Product(self.transposed, narrow_dtype(hidden.device))
        probe = product.narrowed(torch.zeros(1, dtype=hidden.dtype, device=hidden.device))
        return TiledScores.of(hidden.contiguous(), _Source(self, weight, bias, product, probe))

    @property
    def span(self) -> Range:
        """The classes of this rank."""
        return (0, self.vocabulary) if self.axis is None else own_range(self.vocabulary, self.axis)


@dataclass(frozen=True, eq=False)
class _Source:
    """What scores come from, besides rows; `probe` is one score without a value."""

    head: TiledHead
    weight: Tensor
    bias: Tensor | None
    product: Product
    probe: Tensor

    def check(self) -> None:
        """Refuses weights whose memory is gone, as sharded ones' may be after the head's forward."""
        if self.weight.numel() == 0 or (self.weight.untyped_storage().nbytes() == 0 and not self.weight.is_meta):
            raise WrapError(
                "scores are used after the memory of the head's weight was given back (a sharded model's, after its "
                "forward?); compute the loss inside the model's forward, or leave the loss out of blockwise="
            )


class TiledScores(Scores):
    """Scores [..., vocabulary] that nobody has computed yet, in the shape of all of them."""

    source: _Source

    @classmethod
    def of(cls, hidden: Tensor, source: _Source) -> "TiledScores":
        """The scores of rows `hidden` [..., inputs]."""
        scores = cls.holding(hidden, source.head.vocabulary)
        scores.source = source
        return scores

    def like(self, held: Tensor) -> "TiledScores":
        """Scores of other rows."""
        return TiledScores.of(held, self.source)

    def kind(self) -> Tensor:
        """One score."""
        return self.source.probe

    def without_history(self) -> "TiledScores":
        """The same, as if computed without gradients."""
        scores, source = self.of_rows(self.held().detach()), self.source
        bias = None if source.bias is None else source.bias.detach()
        scores.source = replace(source, weight=source.weight.detach(), bias=bias)
        return scores

    def make_whole(self, func: Any) -> Tensor:
        """Computes all scores; ranks that hold some of the classes join them."""
        source = self.source
        source.check()
        source.head.uses[getattr(func, "__name__", str(func))] += 1
        scores = source.product(self.held(), source.weight, source.bias)
        if source.head.axis is None:
            return scores
        return DealtScores.of(scores, source.head.axis, self.vocabulary).make_whole(func)

    def own(self, row: Tensor) -> Tensor:
        """The numbers beside this rank's classes."""
        start, stop = self.source.head.span
        return row[start:stop]

    def each(self, call: Call) -> Any:
        """Notes the call; numbers beside the scores are kept as they are now."""
        step, before = call.map(_kept), self.source.probe.clone()
        probe = call.map(_first).on(before)
        changes = before._version > 0
        if probe is before and not changes:
            return self
        source = replace(self.source, product=self.source.product.then(step), probe=probe)
        if changes:
            self.change(lambda: setattr(self, "source", source), call.func)
            return self
        return TiledScores.of(self.held(), source)

    def entropy(self, target: Tensor, ignore_index: int, reduction: str) -> Any:
        """By blocks of rows."""
        source, head = self.source, self.source.head
        source.check()
        if not head.uses[_BY_BLOCKS]:
            DealtRows(head.rows, len(target)).check(self.held(), target)
        head.uses[_BY_BLOCKS] += 1
        narrow = source.probe.dtype in (torch.float16, torch.bfloat16)
        cast = narrow and narrow_dtype(source.probe.device) is not None  # autocast takes losses in float32
        call = Entropy(
            source.product,
            self.vocabulary,
            head.block,
            torch.float32 if cast else source.probe.dtype,
            ignore_index,
            reduction,
            axis=head.axis,
            span=head.span,
            in_advance=head.in_advance,
            rows=head.rows,
        )
        return blockwise_cross_entropy(call, self.held(), target, weight=source.weight, bias=source.bias)


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().reshape(-1 if value.dim() else ()).clone()


def _first(value: Any) -> Any:
    return value[:1] if isinstance(value, Tensor) and value.dim() else value
