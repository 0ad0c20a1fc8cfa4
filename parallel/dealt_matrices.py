"""Matrices of which a rank has a part: columns give their own features, rows a part of a sum.

Their forwards are objects that name their module, so that nothing but the module's own parameters is computed with.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional

from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis, enter, gather, leave, scatter_sum
from meshwright.parallel.length import Length

__all__ = ["DealtColumns", "DealtRows", "Entry"]


class Entry:
    """The values that enter one region: each is entered once, however many matrices read it."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        self._gathered: list[Node] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same value, whose gradient is summed over ranks."""
        known = self._entered.get(id(tensor))
        if known is None or known[0] is not tensor:
            known = (tensor, tensor if self._made_of_gathered(tensor) else enter(tensor, self._axis))
            self._entered[id(tensor)] = known
        return known[1]

    def gathered(self, tensor: Tensor, full: int) -> Tensor:
        """Joins a share of the stream; the result has entered already."""
        whole = gather(tensor, self._axis, tensor.dim() - 2, full)
        self._entered[id(whole)] = (whole, whole)
        if whole.grad_fn is not None:
            self._gathered.append(whole.grad_fn)
        return whole

    def close(self) -> None:
        """Forgets, at the end of the region."""
        self._entered.clear()
        self._gathered.clear()

    def _made_of_gathered(self, tensor: Tensor) -> bool:
        """Whether a value comes from gathered ones: hooks of modules give a matrix another tensor, entered already.

        Raises:
            WrapError: where it also comes from elsewhere, since one gradient is to be summed here and the other not.
        """
        if tensor.grad_fn is None or not self._gathered:
            return False
        first = min(each._sequence_nr() for each in self._gathered)
        found, left, seen = set(), [tensor.grad_fn], set()
        while left:
            node = left.pop()
            if node in self._gathered:
                found.add("gathered")
            elif hasattr(node, "variable") or node._sequence_nr() < first:
                found.add("other")
            elif node not in seen:
                seen.add(node)
                left += [each for each, _ in node.next_functions if each is not None]
        if len(found) > 1:
            raise WrapError(
                "a matrix that tp deals takes a value made of its block's sequence and of something else (in a hook?); "
                "with sequence_parallel=False it may"
            )
        return "gathered" in found


@dataclass(frozen=True, eq=False)
class DealtColumns:
    """The forward of a matrix whose columns are dealt: the features of the product that this rank holds."""

    matrix: nn.Module
    entry: Entry
    transposed: bool

    def __call__(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., own features]"""
        weight, bias = self.matrix.weight, self.matrix.bias
        assert isinstance(weight, Tensor), type(weight)
        assert not isinstance(bias, nn.Module), type(bias)
        return functional.linear(self.entry(input), weight.T if self.transposed else weight, bias)


@dataclass(frozen=True, eq=False)
class DealtRows:
    """The forward of a matrix whose rows are dealt: partial product, sum over ranks, then its bias once."""

    matrix: nn.Module
    axis: Axis
    entry: Entry
    transposed: bool
    length: Length | None

    def __call__(self, input: Tensor) -> Tensor:
        """[..., own inputs] -> [..., features]; of a dealt stream, this rank's positions.

        Raises:
            WrapError: for products of which nobody can tell where the positions are.
        """
        weight, length = self.matrix.weight, self.length
        assert isinstance(weight, Tensor), type(weight)
        self.entry.close()
        partial = functional.linear(input, weight.T if self.transposed else weight)
        if length is None:
            whole = leave(partial, self.axis)
        elif partial.dim() == 3 and partial.shape[-2] == length.full:
            whole = scatter_sum(partial, self.axis, 1)
        else:
            raise WrapError(
                f"a dealt sequence needs products [samples, positions, features], not {tuple(partial.shape)}; "
                "use sequence_parallel=False"
            )
        bias = self.matrix.bias
        return whole + bias.to(whole.dtype) if isinstance(bias, Tensor) else whole  # autocast leaves the bias wide
