"""The text of a job as batches: read, encoded, packed, and handed out by step and data rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meshwright.launch.worker.corpus import Document, read_documents, split_documents
from meshwright.launch.worker.errors import CorpusError
from meshwright.launch.worker.order import batch_samples, share
from meshwright.launch.worker.packing import Packed, pack
from meshwright.launch.worker.tokenizer import Tokenizer, make_tokenizer

__all__ = ["Text", "load_text"]


@dataclass(frozen=True)
class Text:
    """Training and held-out sequences of one job.

    Args:
        training: packed windows to learn from.
        validation: packed windows that are never learnt from; None where nothing is held out.
        vocab_size: of the tokenizer, separator included.
        seed: of the sample order.
        batch_size: sequences of one global batch.
    """

    training: Packed
    validation: Packed | None
    vocab_size: int
    seed: int
    batch_size: int

    def training_batch(self, step: int, data_rank: int, data_degree: int) -> dict[str, Tensor]:
        """A data rank's share of the global batch of a step, steps counted from 1."""
        windows = batch_samples(len(self.training), seed=self.seed, step=step - 1, batch_size=self.batch_size)
        return self.training.batch(share(windows, data_rank, data_degree))

    def validation_batch(self, number: int, data_rank: int, data_degree: int) -> dict[str, Tensor]:
        """A data rank's share of a held-out batch: the same windows in every run, drawn from all held-out documents."""
        assert self.validation is not None, "nothing is held out"
        windows = batch_samples(len(self.validation), seed=0, step=number, batch_size=self.batch_size)
        return self.validation.batch(share(windows, data_rank, data_degree))

    def fingerprint(self) -> int:
        """Changes with any training token, with the seed and with the batch size: with what a step reads."""
        return self.training.fingerprint() ^ (self.seed << 20) ^ self.batch_size


def load_text(data: Mapping[str, Any], *, seed: int, batch_size: int) -> Text:
    """Reads, encodes and packs what a job's `data:` block names.

    Args:
        data: the block as plain values: files, tokenizer, sequence_length, validation_fraction, max_bytes.
        seed: of the sample order.
        batch_size: sequences of one global batch.

    Raises:
        CorpusMissingError: when a file does not exist.
        CorpusError: when there is too little text.
    """
    documents = read_documents(data["files"], max_bytes=data["max_bytes"])
    tokenizer = make_tokenizer(data["tokenizer"], documents)
    training, held_out = split_documents(documents, data["validation_fraction"])
    length = data["sequence_length"]
    packed = _pack(training, tokenizer, length)
    try:
        validation = _pack(held_out, tokenizer, length) if held_out else None
    except CorpusError as error:
        raise CorpusError(
            f"data.validation_fraction={data['validation_fraction']} holds too little out: {error}"
        ) from error
    return Text(packed, validation, tokenizer.vocab_size, seed, batch_size)


def _pack(documents: list[Document], tokenizer: Tokenizer, sequence_length: int) -> Packed:
    encoded = tokenizer.encode([document.content for document in documents])
    return pack(
        encoded, separator=tokenizer.separator, sequence_length=sequence_length, vocab_size=tokenizer.vocab_size
    )
