"""Arguments of a block: the tensors in them, and what of each belongs to a span."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from meshwright.parallel.errors import WrapError
from meshwright.parallel.unit_run import keyed_arguments

__all__ = ["Arguments", "Dims", "Given", "Key"]

Key: TypeAlias = int | str
Dims: TypeAlias = Mapping[Key, tuple[int | None, ...]]
"""Argument -> for each leaf in it its dim of positions, from the end, or None."""


@dataclass(frozen=True)
class _Place:
    number: int


@dataclass(frozen=True)
class Given:
    """Arguments for one span; `tensors` are leaves, in order, of which some want a gradient."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: list[Tensor]


@dataclass(frozen=True)
class Arguments:
    """Arguments of one call, without their tensors.

    Attributes:
        full: length of the sequence.
        dims: for each tensor its dim of positions, from the end, or None.
    """

    full: int
    dims: tuple[int | None, ...]
    _entries: tuple[tuple[Key, TreeSpec, tuple[Any, ...]], ...]

    @classmethod
    def of(
        cls, args: tuple[Any, ...], kwargs: dict[str, Any], *, dims: Dims, full: int
    ) -> "tuple[Arguments, list[Tensor]]":
        """Of a call of a block; and the tensors.

        Raises:
            WrapError: for a tensor that has no entry for each position where it had one in the example.
        """
        tensors: list[Tensor] = []
        found: list[int | None] = []
        entries = []
        for key, value in keyed_arguments(args, kwargs):
            leaves, structure = tree_flatten(value)
            own = dims.get(key, (None,) * len(leaves))
            for place, (leaf, dim) in enumerate(zip(leaves, own, strict=True)):
                if isinstance(leaf, Tensor):
                    _check(leaf, dim, full)
                    leaves[place] = _Place(len(tensors))
                    tensors.append(leaf)
                    found.append(dim)
            entries.append((key, structure, tuple(leaves)))
        return cls(full, tuple(found), tuple(entries)), tensors

    def at(self, span: slice, tensors: Sequence[Tensor], learned: Sequence[bool]) -> Given:
        """What a call on one span is given.

        Args:
            span: of positions.
            tensors: of the call, whole.
            learned: which of them want a gradient.
        """
        parts = []
        for tensor, dim, learns in zip(tensors, self.dims, learned, strict=True):
            part = tensor.detach()
            if dim is not None:
                part = part.narrow(dim, span.start, span.stop - span.start).contiguous()  # models may ask for views
            parts.append(part.requires_grad_(learns))
        args, kwargs = self.filled(parts)
        return Given(args, kwargs, parts)

    def filled(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call with these tensors."""
        values: dict[Key, Any] = {
            key: tree_unflatten([tensors[leaf.number] if isinstance(leaf, _Place) else leaf for leaf in leaves], spec)
            for key, spec, leaves in self._entries
        }
        args = tuple(value for key, value in values.items() if isinstance(key, int))
        return args, {key: value for key, value in values.items() if isinstance(key, str)}


def _check(tensor: Tensor, dim: int | None, full: int) -> None:
    if dim is not None and (tensor.dim() < -dim or tensor.shape[dim] != full):
        raise WrapError(
            f"a block gets a value {tuple(tensor.shape)} where it got one for each of the {full} positions in the "
            "example; pass an example= like the batches to come, or leave out layer_block"
        )
