"""Documents as samples of unequal lengths, made into micro-batches with padding or without.

    padded   a0 a1 a2 SEP        packed   a0 a1 a2 SEP b0 SEP      position_ids  0 1 2 3 0 1
             b0 SEP .  .                  -  a1 a2 SEP -  SEP      labels ("-" is -100: not counted in the loss)

A sample is one document with its separator; a longer document than a sequence is cut into several samples, whose
beginnings are no targets (there is no text before them). Both forms hold the same targets, so a global batch has the
same loss and gradients in both, whatever the number of ranks and micro-batches it is dealt to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from meshwright.launch.worker.errors import CorpusError
from meshwright.launch.worker.order import share
from meshwright.launch.worker.packing import IGNORED, end_to_end, fingerprint
from meshwright.parallel.ragged import balance, unpad_batch

__all__ = ["Samples", "cut_documents"]

_FILLER = 2  # tokens of a micro-batch without samples: as few as a model that shifts labels takes


@dataclass(frozen=True)
class Samples:
    """Samples in one token stream.

    Args:
        tokens: 1-dim integers.
        begins: of each sample in `tokens`, 1-dim int64.
        lengths: of each sample, at least 2.
        form: how a micro-batch holds its samples: in a padded row each, or all in one row without padding.
        multiple: rows are padded to a multiple of so many tokens.
    """

    tokens: Tensor
    begins: Tensor
    lengths: tuple[int, ...]
    form: Literal["padded", "packed"] = "padded"
    multiple: int = 1

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def deal(self, samples: Sequence[int], parts: int) -> list[list[int]]:
        """A global batch, in ascending order of length, dealt to micro-batches.

        Padded ones get equally many samples of like lengths, the last one the longest; packed ones about equally many
        tokens.
        """
        if self.form == "padded":
            return [list(share(samples, part, parts)) for part in range(parts)]
        return [[samples[place] for place in part] for part in balance([self.lengths[each] for each in samples], parts)]

    def batch(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """A micro-batch of some samples, int64: padded (samples, longest), packed (1, tokens).

        Without samples it is a row of tokens that do not count, so that a rank with nothing to do can go along.
        """
        lengths = [self.lengths[each] for each in samples] or [_FILLER]
        width = self._rounded(max(lengths))
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        inputs = torch.zeros(len(lengths), width, dtype=torch.int64)
        for row, each in enumerate(samples):
            begin = int(self.begins[each])
            inputs[row, : lengths[row]] = self.tokens[begin : begin + lengths[row]]
        labels = inputs.masked_fill(~mask, IGNORED)
        labels[:, 0] = IGNORED
        if not samples:
            labels[:] = IGNORED
        padded = {"input_ids": inputs, "attention_mask": mask.long(), "labels": labels}
        return padded if self.form == "padded" else self._packed(padded)

    def places(self, samples: Sequence[int]) -> int:
        """Tokens of the micro-batch of some samples, padding included."""
        lengths = [self.lengths[each] for each in samples] or [_FILLER]
        return self._rounded(max(lengths)) * len(lengths) if self.form == "padded" else self._rounded(sum(lengths))

    def fingerprint(self) -> int:
        """A 62-bit number that changes with any token or sample, and not with the form."""
        return fingerprint("samples", self.tokens, self.begins, torch.tensor(self.lengths))

    def _packed(self, padded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Laid end to end; what fills up a row to a multiple is a sequence of its own."""
        row = unpad_batch(padded)
        size = row["input_ids"].shape[1]
        rest = self._rounded(size) - size
        if rest:
            tails = {"input_ids": torch.zeros(rest), "labels": torch.full((rest,), IGNORED)}
            tails["position_ids"] = torch.arange(rest)
            row = {key: torch.cat([each, tails[key].to(each)[None]], dim=1) for key, each in row.items()}
        return row

    def _rounded(self, size: int) -> int:
        return -(-size // self.multiple) * self.multiple


def cut_documents(
    documents: Sequence[Tensor],
    *,
    separator: int,
    sequence_length: int,
    vocab_size: int,
    form: Literal["padded", "packed"] = "padded",
    multiple: int = 1,
) -> Samples:
    """Makes samples of documents (1-dim integers), each followed by `separator`, of at most `sequence_length` tokens.

    A single token that a cut leaves over predicts nothing and is left out.

    >>> texts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    >>> samples = cut_documents(texts, separator=9, sequence_length=4, vocab_size=10, form="packed")
    >>> {key: each.tolist() for key, each in samples.batch([0, 1]).items()}  # doctest: +NORMALIZE_WHITESPACE
    {'input_ids': [[1, 2, 3, 9, 4, 9]], 'labels': [[-100, 2, 3, 9, -100, 9]], 'position_ids': [[0, 1, 2, 3, 0, 1]]}

    Raises:
        CorpusError: when no document has two tokens.
    """
    tokens, _ = end_to_end(documents, separator=separator, vocab_size=vocab_size)
    ends = list(accumulate(len(document) + 1 for document in documents))
    pieces = [
        (begin, min(sequence_length, end - begin))
        for start, end in zip([0, *ends], ends, strict=False)
        for begin in range(start, end - 1, sequence_length)
    ]
    if not pieces:
        raise CorpusError(
            "no document holds a token, so there is nothing to predict; add files, or raise data.max_bytes or "
            "data.validation_fraction"
        )
    begins, lengths = zip(*pieces, strict=True)
    return Samples(tokens, torch.tensor(begins), lengths, form, multiple)
