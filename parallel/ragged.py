"""Sequences of unequal lengths: laid end to end without padding, sorted by length in part, dealt evenly.

    tokens [b, s], mask              values [T], cu_seqlens
    a0 a1 a2  .                      a0 a1 a2 | b0 | c0 c1          0 3 4 6
    b0  .  .  .        unpad         positions
    c0 c1  .  .      --------->      0  1  2  | 0  | 0  1

The zero-padding algorithm is that of ByteTransformer (Zhai et al., arXiv 2210.03052, section III-D), the partial sort
that of data sorting (arXiv 2308.08153). Pure functions for any data loader; none of them talks to other ranks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapreplace
from typing import NamedTuple

import torch
from torch import Tensor

from meshwright.parallel.errors import BatchError

__all__ = ["Unpadded", "balance", "pad_back", "padding_ratio", "positions", "sort_batches", "unpad", "unpad_batch"]

_IGNORED = -100


class Unpadded(NamedTuple):
    """Tokens of a batch without its padding.

    Attributes:
        values: [T, ...], the kept tokens of one sequence after those of another.
        cu_seqlens: [b + 1], int32: sequence i is values[cu_seqlens[i] : cu_seqlens[i + 1]].
        indices: [T], int64: where each came from in the batch with its first two dims flattened.
    """

    values: Tensor
    cu_seqlens: Tensor
    indices: Tensor


def unpad(padded: Tensor, mask: Tensor) -> Unpadded:
    """Gathers what a mask keeps; gradients flow through.

    Args:
        padded: [b, s, ...].
        mask: [b, s], nonzero where a token counts; padding may stand on either side.

    >>> found = unpad(torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    >>> found.values.tolist(), found.cu_seqlens.tolist(), found.indices.tolist()
    ([5, 6, 7], [0, 2, 3], [0, 1, 3])

    Raises:
        BatchError: when the mask is not of the batch's first two dims.
    """
    _check_fit(padded, mask)
    kept = mask.bool()
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    return Unpadded(padded.flatten(0, 1)[indices], cu_seqlens, indices)


def _check_fit(padded: Tensor, mask: Tensor) -> None:
    if mask.dim() != 2 or padded.shape[:2] != mask.shape:
        raise BatchError(
            f"a mask of shape {tuple(mask.shape)} does not fit a tensor of shape {tuple(padded.shape)}; give both the "
            "same dims [samples, positions] first, and a mask that is nonzero where a token counts"
        )


def pad_back(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `unpad`: [T, ...] back to [b, s, ...], zero where the mask kept nothing; gradients flow through.

    >>> pad_back(torch.tensor([5, 6, 7]), torch.tensor([0, 1, 3]), (2, 3)).tolist()
    [[5, 6, 0], [7, 0, 0]]
    """
    rows, length = shape
    flat = values.new_zeros(rows * length, *values.shape[1:]).index_copy(0, indices, values)
    return flat.reshape(rows, length, *values.shape[1:])


def positions(cu_seqlens: Tensor) -> Tensor:
    """Position of each token in its own sequence, [T], int64.

    >>> positions(torch.tensor([0, 3, 4, 6])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    counted = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    return counted - starts.repeat_interleave(lengths)


def unpad_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns a padded batch into one packed row: every tensor [b, s, ...] becomes [1, T, ...].

    The mask leaves, `position_ids` come, and a label that a sequence begins with is -100, so that nothing is predicted
    across a border. Models of `transformers` limit attention to sequences where positions start anew and no mask is
    given. Loss and gradients are those of the batch padded on the right.

    Args:
        batch: `attention_mask` [b, s], and tensors with the same first two dims, such as `input_ids` and `labels`.

    >>> padded = {"input_ids": [[5, 6, 0], [7, 8, 9]], "labels": [[5, 6, -100], [7, 8, 9]]}
    >>> mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    >>> row = unpad_batch({"attention_mask": mask, **{key: torch.tensor(rows) for key, rows in padded.items()}})
    >>> {key: each.tolist() for key, each in row.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'input_ids': [[5, 6, 7, 8, 9]], 'labels': [[-100, 6, -100, 8, 9]], 'position_ids': [[0, 1, 0, 1, 2]]}

    Raises:
        BatchError: without a mask, or when a tensor has other first dims.
    """
    if "attention_mask" not in batch:
        raise BatchError(f"the batch holds {', '.join(batch)} and no attention_mask, which says what padding is")
    mask = batch["attention_mask"]
    found = unpad(mask, mask)
    row: dict[str, Tensor] = {}
    for key, each in batch.items():
        if key not in ("attention_mask", "position_ids"):
            _check_fit(each, mask)
            row[key] = each.flatten(0, 1)[found.indices][None]
    row["position_ids"] = positions(found.cu_seqlens)[None]
    if "labels" in row:
        row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, _IGNORED)
    return row


def padding_ratio(batches: Iterable[Sequence[int]]) -> float:
    """Share of places that hold padding when each batch is padded to its longest sequence.

    1 - sum(lengths) / sum over batches (number x longest), as data sorting reports it (arXiv 2308.08153).

    Args:
        batches: the lengths of each batch's sequences.

    >>> padding_ratio([[3, 1], [1, 1]])
    0.25
    """
    kept = places = 0
    for lengths in batches:
        kept += sum(lengths)
        places += len(lengths) * max(lengths, default=0)
    return 1.0 - kept / places if places else 0.0


def sort_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    window: int | None = 1,
    seed: int = 0,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """One epoch of batches of like lengths: every sequence once, in an order that stays near a random one.

    Shuffles, takes windows of `window` x `batch_size` sequences, sorts and cuts each, and shuffles the batches.

    Args:
        lengths: of all sequences, in tokens.
        batch_size: sequences of a batch at most; the last batch of a window may hold fewer.
        window: batches that are sorted together: 1 leaves batches random, None sorts the whole epoch.
        seed: of both shuffles; give each epoch its own.
        max_tokens: places of a batch at most, padding included; a longer sequence is a batch of its own.

    >>> sort_batches([9, 1, 8, 2], batch_size=2, window=None)
    [[1, 3], [2, 0]]

    Raises:
        BatchError: for sizes below one.
    """
    for name, value in (("batch_size", batch_size), ("window", window), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise BatchError(f"{name}={value} holds nothing; give at least 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = max(1, len(order)) if window is None else window * batch_size
    limit = max_tokens or batch_size * max(lengths, default=0)
    windows = (sorted(order[start : start + size], key=lengths.__getitem__) for start in range(0, len(order), size))
    batches = [batch for each in windows for batch in _cut(each, lengths, batch_size=batch_size, max_tokens=limit)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _cut(ordered: list[int], lengths: Sequence[int], *, batch_size: int, max_tokens: int) -> Iterator[list[int]]:
    """Batches of sequences that are in ascending order of length."""
    batch: list[int] = []
    for index in ordered:
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[index] > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Deals sequences into parts of about equally many tokens; no part is empty unless sequences are too few.

    Longest first, each to the part that holds least: at most 4/3 of the best possible largest part (Graham, SIAM J.
    Appl. Math. 17, 1969). Equal input gives equal output.

    >>> balance([5, 1, 1, 4, 1], 2)
    [[0, 2], [1, 3, 4]]
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, 0, part) for part in range(parts)]  # tokens, sequences; sorted as it is, so a heap
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        tokens, sequences, part = loads[0]
        found[part].append(index)
        heapreplace(loads, (tokens + lengths[index], sequences + 1, part))
    return [sorted(part) for part in found]
