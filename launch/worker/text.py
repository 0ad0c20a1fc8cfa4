"""The text of a job as batches: read, encoded, packed, and handed out by step and data rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from meshwright.launch.worker.corpus import Document, read_documents, split_documents
from meshwright.launch.worker.errors import CorpusError
from meshwright.launch.worker.order import SortedOrder, share
from meshwright.launch.worker.packing import Packed, fingerprint, pack
from meshwright.launch.worker.samples import Samples, cut_documents
from meshwright.launch.worker.tokenizer import Tokenizer, make_tokenizer

__all__ = ["Size", "Text", "lay_out", "load_text"]


class Size(NamedTuple):
    """Tokens of a global batch: that are read, and that are computed on, padding included."""

    tokens: int
    places: int


@dataclass(frozen=True)
class Text:
    """Training and held-out sequences of one job.

    Args:
        training: windows of one length, or samples of unequal lengths, to learn from.
        validation: the same of text that is never learnt from; None where nothing is held out.
        vocab_size: of the tokenizer, separator included.
        seed: of the sample order.
        batch_size: sequences of one global batch.
        num_microbatches: of each data rank.
        sort_window: global batches that are sorted by length together; None takes an epoch's.
        by_tokens: these batches hold about equally many tokens, instead of sequences.
    """

    training: Packed | Samples
    validation: Packed | Samples | None
    vocab_size: int
    seed: int
    batch_size: int
    num_microbatches: int = 1
    sort_window: int | None = 1
    by_tokens: bool = False

    def training_batch(self, step: int, data_rank: int, data_degree: int) -> Any:
        """A data rank's share of the global batch of a step, steps counted from 1.

        Windows come as one batch for `step` to cut, samples of unequal lengths as a list of its micro-batches.
        """
        chosen = self._order.batch(step - 1)
        return self._share(self.training, chosen, data_rank=data_rank, data_degree=data_degree)

    def training_size(self, step: int, data_degree: int) -> Size:
        """Size of the global batch of a step; only its places depend on the number of data ranks."""
        chosen = self._order.batch(step - 1)
        tokens = sum(self._order.lengths[each] for each in chosen)
        if isinstance(self.training, Packed):
            return Size(tokens, tokens)
        return Size(tokens, sum(map(self.training.places, self.training.deal(chosen, self._parts(data_degree)))))

    def validation_batch(self, number: int, data_rank: int, data_degree: int) -> Any:
        """A data rank's share of a held-out batch: the same samples in every run, drawn from all held-out documents."""
        assert self.validation is not None, "nothing is held out"
        chosen = self._held_out_order.batch(number)
        return self._share(self.validation, chosen, data_rank=data_rank, data_degree=data_degree)

    @property
    def usual_length(self) -> int:
        """Length at which attention costs a token what it costs on average: sum(length^2) / sum(length)."""
        lengths = self.training.lengths
        return round(sum(each * each for each in lengths) / sum(lengths))

    def fingerprint(self) -> int:
        """Changes with any training token, with the seed, batch size and sorting: with what a step reads."""
        mark = self.training.fingerprint() ^ (self.seed << 20) ^ self.batch_size
        sorting = (self.sort_window, self.by_tokens)
        return mark if sorting == (1, False) else mark ^ fingerprint(f"sorted {sorting}")

    @cached_property
    def _order(self) -> SortedOrder:
        return SortedOrder(
            self.training.lengths, self.seed, self.batch_size, window=self.sort_window, by_tokens=self.by_tokens
        )

    @cached_property
    def _held_out_order(self) -> SortedOrder:
        assert self.validation is not None, "nothing is held out"
        return SortedOrder(self.validation.lengths, 0, self.batch_size)

    def _parts(self, data_degree: int) -> int:
        return data_degree * self.num_microbatches

    def _share(self, source: Packed | Samples, chosen: list[int], *, data_rank: int, data_degree: int) -> Any:
        if isinstance(source, Packed):
            return source.batch(share(chosen, data_rank, data_degree))
        parts = source.deal(chosen, self._parts(data_degree))
        return [source.batch(part) for part in parts[data_rank::data_degree]]  # sizes rise from part to part


def load_text(data: Mapping[str, Any], *, seed: int, batch_size: int, num_microbatches: int = 1) -> Text:
    """Reads, encodes and packs what a job's `data:` block names.

    Args:
        data: the block as plain values: files, tokenizer, sequence_length, validation_fraction, max_bytes; batching,
            sort_window, batches_of and length_multiple where they are not the default.
        seed: of the sample order.
        batch_size: sequences of one global batch.
        num_microbatches: of each data rank.

    Raises:
        CorpusMissingError: when a file does not exist.
        CorpusError: when there is too little text.
    """
    documents = read_documents(data["files"], max_bytes=data["max_bytes"])
    tokenizer = make_tokenizer(data["tokenizer"], documents)
    training, held_out = split_documents(documents, data["validation_fraction"])
    made = lay_out(training, tokenizer, data)
    try:
        validation = lay_out(held_out, tokenizer, data) if held_out else None
    except CorpusError as error:
        raise CorpusError(
            f"data.validation_fraction={data['validation_fraction']} holds too little out: {error}"
        ) from error
    window = data.get("sort_window", 1)
    return Text(
        made,
        validation,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        batch_size=batch_size,
        num_microbatches=num_microbatches,
        sort_window=None if window == "all" else window,
        by_tokens=data.get("batches_of") == "tokens",
    )


def lay_out(documents: list[Document], tokenizer: Tokenizer, data: Mapping[str, Any]) -> Packed | Samples:
    """Encodes documents and lays them out as windows or samples, as the `data:` block wants them.

    Raises:
        CorpusError: when there is too little text.
    """
    encoded = tokenizer.encode([document.content for document in documents])
    keywords = {
        "separator": tokenizer.separator,
        "sequence_length": data["sequence_length"],
        "vocab_size": tokenizer.vocab_size,
    }
    form = data.get("batching", "windows")
    if form == "windows":
        return pack(encoded, **keywords)
    return cut_documents(encoded, **keywords, form=form, multiple=data.get("length_multiple", 1))
