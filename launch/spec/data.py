"""What a job trains on: files, tokenizer, and how documents become batches."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from meshwright.launch.spec.block import BY_KIND, Block, Count, Line, Listed, Size

__all__ = ["Bpe", "Data", "Tokenizer"]

Together = Annotated[
    Annotated[Count, Tag("<integer>")] | Annotated[Literal["all"], Tag("<text>")],
    BY_KIND,
]


class Bpe(Block):
    """Byte-pair encoding trained on the job's text."""

    vocab_size: Annotated[int, Field(ge=257, le=1_000_000)] = Field(description="Number of tokens.")


class Tokenizer(Block):
    """A tokenizer other than bytes: exactly one of bpe and file."""

    bpe: Bpe | None = Field(default=None, description="Train a byte-pair encoding on the job's text.")
    file: Line | None = Field(default=None, description="A tokenizer.json of the tokenizers library.")


class Data(Block):
    """The text a job trains on."""

    files: Annotated[
        Annotated[Line, Tag("<text>")] | Annotated[Listed[Line], Field(min_length=1), Tag("<list>")], BY_KIND
    ] = Field(description="python-stdlib (the standard library's source), a glob pattern, or a list of them.")
    tokenizer: Annotated[
        Annotated[Literal["bytes"], Tag("<text>")] | Annotated[Tokenizer, Tag("<mapping>")], BY_KIND
    ] = Field(
        default="bytes", description="bytes (256 tokens and a separator), {bpe: {vocab_size: N}} or {file: PATH}."
    )
    sequence_length: Annotated[int, Field(ge=2, le=100_000_000)] = Field(
        default=256, description="Tokens of one sequence, at most."
    )
    batching: Literal["windows", "padded", "packed"] = Field(
        default="windows",
        description="What a sample is, and how a micro-batch holds samples: windows cuts the concatenated text every "
        "sequence_length tokens; padded and packed take a document as a sample (a longer one is cut into several), "
        "padded in a row each up to the longest, packed end to end in one row without padding.",
    )
    sort_window: Together = Field(
        default=1,
        description="Batches whose samples are sorted by length together, for padded and packed: 1 leaves batches as "
        "they were shuffled, all sorts an epoch.",
    )
    batches_of: Literal["samples", "tokens"] = Field(
        default="samples",
        description="What the batches of a sort_window hold equally many of: samples (train.batch_size of them), or "
        "tokens, with train.batch_size samples on average.",
    )
    length_multiple: Count = Field(
        default=1,
        description="Rows are padded to a multiple of so many tokens, for padded and packed: fewer shapes, for "
        "pipelines and kernels.",
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.02, description="Part of the text kept for validation, 0 to 1."
    )
    max_bytes: Size | None = Field(default=None, description="Read at most this much text; by default all of it.")
