"""Masks that `transformers` states as functions of positions, read as structured masks.

`transformers.masking_utils` makes a mask by nesting closures: causal, a window, documents, padding, joined by "and" and
"or". A closure is told by its code object, and what it closes over says the rest. A function that is none of these
stays a function: exact too, but each of its blocks is looked at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.blockwise.masks import Mask, MaskFunction, causal, documents, function, padding, window

__all__ = ["read_mask"]


@dataclass(frozen=True, eq=False)
class _Around:
    """What is known around a function.

    Attributes:
        positions: [1 or batch, length], what number each position has for the function; None where queries and keys
            are not the same positions.
        packed: [batch, length], numbers of the documents that everything is limited to, if that is known.
        renumbered: whether `positions` are others than 0, 1, 2, ...; then they count up within each document.
        use_vmap: whether unknown functions take one position at a time.
    """

    positions: Tensor | None
    packed: Tensor | None = None
    renumbered: bool = False
    use_vmap: bool = False


def read_mask(asked: MaskFunction, *, length: int | None, use_vmap: bool = False) -> Mask | None:
    """The mask that a function states; None where every query sees every key.

    Args:
        asked: the function.
        length: of queries and keys, which are the same positions counted from 0; None if they are not.
        use_vmap: whether functions that are not known take one position at a time.

    >>> from transformers.masking_utils import sliding_window_causal_mask_function
    >>> read_mask(sliding_window_causal_mask_function(4), length=8)
    Band(left=3, right=0)
    """
    positions = None if length is None else torch.arange(length)[None]
    return _read(asked, _Around(positions, use_vmap=use_vmap))


def _read(asked: MaskFunction, around: _Around) -> Mask | None:
    reader = _readers().get(getattr(asked, "__code__", None))
    if reader is not None:
        found = reader(_closed_over(asked), around)
        if not isinstance(found, _Unreadable):
            return found
    return function(_as_called(asked, around))


class _Unreadable:
    """What a reader gives where the function is known and what is around it does not allow a structured mask."""


_Reader = Callable[[Mapping[str, Any], _Around], Mask | _Unreadable | None]


@cache
def _readers() -> dict[Any, _Reader]:
    """Code of a function of `transformers` -> how it is read, as far as the installed version has it."""
    from transformers import masking_utils as made

    nothing = torch.zeros(1, 1, dtype=torch.long)
    examples: dict[str, tuple[Sequence[Any], _Reader]] = {
        "and_masks": ((), _read_and),
        "or_masks": ((), _read_or),
        "sliding_window_overlay": ((1,), _read_window),
        "sliding_window_bidirectional_overlay": ((1,), lambda inside, _: window(*[inside["sliding_window"]] * 2)),
        "chunked_overlay": ((1, nothing), _read_chunks),
        "blockwise_overlay": ((nothing,), _read_groups),
        "padding_mask_function": ((nothing,), _read_padding),
        "packed_sequence_mask_function": ((nothing,), _read_packed),
        "remap_positions_for_packed_sequence": ((_nothing, nothing), _read_renumbered),
    }
    found: dict[Any, _Reader] = {
        getattr(made, factory)(*given).__code__: reader
        for factory, (given, reader) in examples.items()
        if hasattr(made, factory)
    }
    found[made.causal_mask_function.__code__] = lambda _, __: causal()
    found[made.bidirectional_mask_function.__code__] = lambda _, __: None
    return found


def _nothing(*position: Any) -> None:
    del position


def _closed_over(asked: MaskFunction) -> dict[str, Any]:
    cells = getattr(asked, "__closure__", None) or ()
    return dict(zip(asked.__code__.co_freevars, (each.cell_contents for each in cells), strict=True))


def _read_and(inside: Mapping[str, Any], around: _Around) -> Mask | None:
    for part in inside["mask_functions"]:
        if _readers().get(getattr(part, "__code__", None)) is _read_packed:
            around = replace(around, packed=_closed_over(part)["packed_sequence_mask"])
    read = [mask for part in inside["mask_functions"] if (mask := _read(part, around)) is not None]
    return reduce(and_, read) if read else None


def _read_or(inside: Mapping[str, Any], around: _Around) -> Mask | None:
    read = [mask for part in inside["mask_functions"] if (mask := _read(part, around)) is not None]
    return reduce(or_, read) if len(read) == len(inside["mask_functions"]) else None


def _read_window(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable:
    """A window of 0, which some configs state for none, holds nothing."""
    del around
    size = inside["sliding_window"]
    return window(size - 1, None) if size > 0 else _Unreadable()


def _read_chunks(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable:
    if around.positions is None:
        return _Unreadable()
    before: Tensor = inside["left_padding"]
    chunks = (around.positions.to(before.device) - before[:, None]).div(inside["chunk_size"], rounding_mode="floor")
    return documents(chunks - chunks.amin())  # a negative number would see nothing


def _read_groups(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable:
    """Positions with one number see each other, those with a negative one nothing."""
    groups: Tensor = inside["block_sequence_ids"]
    if around.positions is None or around.renumbered or groups.shape[-1] < around.positions.shape[-1]:
        return _Unreadable()
    return documents(groups)


def _read_padding(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable:
    return _Unreadable() if around.renumbered else padding(inside["padding_mask"])


def _read_packed(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable:
    return _Unreadable() if around.renumbered or around.positions is None else documents(inside["packed_sequence_mask"])


def _read_renumbered(inside: Mapping[str, Any], around: _Around) -> Mask | _Unreadable | None:
    """Positions that start again in each document: a causal mask or window is the same one within a document."""
    numbers: Tensor = inside["position_ids"]
    if around.packed is None or around.renumbered or not _count_up(numbers, around.packed):
        return _Unreadable()
    return _read(inside["mask_function"], replace(around, positions=numbers, renumbered=True))


def _count_up(numbers: Tensor, packed: Tensor) -> bool:
    """Whether positions of one document follow each other without gaps, and documents too."""
    step, change = numbers.diff(dim=-1), packed.diff(dim=-1)
    return bool(((change == 0) & (step == 1) | (change > 0)).all())


def _as_called(asked: MaskFunction, around: _Around) -> MaskFunction:
    """The function as it is called on positions from 0."""
    called = _one_by_one(asked) if around.use_vmap else asked
    if not around.renumbered:
        return called
    numbers = around.positions
    assert numbers is not None
    return lambda sample, head, query, key: called(sample, head, numbers[sample, query], numbers[sample, key])


def _one_by_one(asked: MaskFunction) -> MaskFunction:
    """A function of one position each, on tensors of positions."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    def of_many(*positions: Tensor) -> Tensor:
        wide = torch.broadcast_tensors(*positions)
        with TransformGetItemToIndex():  # lets positions that are tensors without dims be indices
            found: Tensor = torch.vmap(asked)(*(each.flatten() for each in wide))
        return found.reshape(wide[0].shape)

    return of_many
