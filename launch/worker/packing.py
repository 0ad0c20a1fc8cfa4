"""Documents packed into windows of one length, with labels that never cross a border.

    document a      document b          document c
    a0 a1 a2 | SEP  b0 | SEP  c0 c1 c2 ...       tokens, cut every sequence_length
    -  a1 a2   SEP  -    SEP  -  c1 c2           labels ("-" is -100: not counted in the loss)

A document's first token is no target (it cannot be told from the text before it), neither is a window's (there is no
text before it). So the number of targets differs from window to window. Models shift labels themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil

import torch
from torch import Tensor

from meshwright.launch.worker.errors import CorpusError

__all__ = ["IGNORED", "Packed", "end_to_end", "fingerprint", "pack"]

IGNORED = -100
"""The label that every loss function of torch leaves out."""


@dataclass(frozen=True)
class Packed:
    """Token stream of many documents, read in windows.

    Args:
        tokens: 1-dim integers, each document followed by a separator.
        starts: 1-dim booleans, true where a document begins.
        sequence_length: tokens per window.
    """

    tokens: Tensor
    starts: Tensor
    sequence_length: int

    def __len__(self) -> int:
        """Number of windows; the last one overlaps the one before it where tokens do not divide evenly."""
        return ceil(len(self.tokens) / self.sequence_length)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each window."""
        return [self.sequence_length] * len(self)

    def batch(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """Inputs and labels of some windows, int64, (windows, sequence_length)."""
        spans = [self._span(window) for window in windows]
        inputs = torch.stack([self.tokens[start:end] for start, _, end in spans]).long()
        borders = torch.stack([self.starts[start:end] for start, _, end in spans])
        labels = inputs.masked_fill(borders, IGNORED)
        labels[:, 0] = IGNORED
        for row, (start, fresh, _) in enumerate(spans):
            labels[row, : fresh - start] = IGNORED
        return {"input_ids": inputs, "labels": labels}

    def fingerprint(self) -> int:
        """A 62-bit number that changes with any token, border or window length."""
        return fingerprint(f"{self.sequence_length} {len(self.tokens)}", self.tokens, self.starts)

    def _span(self, window: int) -> tuple[int, int, int]:
        """(first token, first token that no earlier window held, end) of a window."""
        if not 0 <= window < len(self):
            raise IndexError(window)
        fresh = window * self.sequence_length
        end = min(fresh + self.sequence_length, len(self.tokens))
        return end - self.sequence_length, fresh, end


def fingerprint(words: str, *tensors: Tensor) -> int:
    """A 62-bit number of some words and the values of tensors."""
    digest = blake2b(words.encode(), digest_size=8)
    for tensor in tensors:
        digest.update(memoryview(bytearray(tensor.contiguous().view(torch.uint8).numpy())))
    return int.from_bytes(digest.digest(), "big") >> 2


def pack(documents: Sequence[Tensor], *, separator: int, sequence_length: int, vocab_size: int) -> Packed:
    """Concatenates documents (1-dim integers), each followed by `separator`.

    >>> packed = pack([torch.tensor([1, 2, 3]), torch.tensor([4])], separator=9, sequence_length=3, vocab_size=10)
    >>> packed.tokens.tolist(), len(packed)
    ([1, 2, 3, 9, 4, 9], 2)
    >>> packed.batch([1])["labels"].tolist()
    [[-100, -100, 9]]

    Raises:
        CorpusError: when there are fewer tokens than one window holds.
    """
    tokens, starts = end_to_end(documents, separator=separator, vocab_size=vocab_size)
    if len(tokens) < sequence_length:
        raise CorpusError(
            f"the corpus has {len(tokens)} tokens, fewer than data.sequence_length={sequence_length}; "
            "add files, raise data.max_bytes or data.validation_fraction, or shorten the sequences"
        )
    return Packed(tokens, starts, sequence_length)


def end_to_end(documents: Sequence[Tensor], *, separator: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens of all documents, each followed by `separator`, and where documents begin (1-dim, integers and booleans).

    >>> [each.tolist() for each in end_to_end([torch.tensor([1, 2])], separator=9, vocab_size=10)]
    [[1, 2, 9], [True, False, False]]
    """
    total = sum(len(document) + 1 for document in documents)
    tokens = torch.empty(total, dtype=torch.int16 if vocab_size <= 1 << 15 else torch.int32)
    starts = torch.zeros(total, dtype=torch.bool)
    position = 0
    for document in documents:
        starts[position] = True
        tokens[position : position + len(document)] = document
        position += len(document) + 1
        tokens[position - 1] = separator
    return tokens, starts
