"""Text to token numbers: bytes, or BPE by the `tokenizers` library.

Bytes need no training and no dependency: 256 values and one separator. BPE is trained on the corpus itself; the result
depends on its documents alone. The separator is always the last number of the vocabulary of a trained tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.launch.worker.corpus import Document
from meshwright.launch.worker.errors import CorpusError, CorpusMissingError

__all__ = ["Tokenizer", "byte_tokenizer", "make_tokenizer"]

_SEPARATOR_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]")
_TRAINING_BYTES = 16 << 20  # merges settle long before; more text only costs start-up time


@dataclass(frozen=True)
class Tokenizer:
    """Turns documents into 1-dim integer tensors.

    Args:
        name: for messages.
        vocab_size: tokens of the model's vocabulary, separator included.
        separator: the token that ends a document.
        encode: documents -> one tensor of token numbers per document, without separators.
    """

    name: str
    vocab_size: int
    separator: int
    encode: Callable[[Sequence[bytes]], list[Tensor]]


def make_tokenizer(spec: str | Mapping[str, Any], documents: Sequence[Document]) -> Tokenizer:
    """Builds the tokenizer a job names.

    Args:
        spec: "bytes", {"bpe": {"vocab_size": 1024}} or {"file": "tokenizer.json"}.
        documents: what BPE is trained on.

    Raises:
        CorpusError: when the `tokenizers` library is missing or the file is not a tokenizer.
        CorpusMissingError: when the file does not exist.
    """
    if spec == "bytes":
        return byte_tokenizer()
    assert isinstance(spec, Mapping), spec
    if spec.get("bpe") is not None:
        return _train_bpe(int(spec["bpe"]["vocab_size"]), documents)
    return _from_file(Path(spec["file"]))


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and number 256 as separator.

    >>> [tokens.tolist() for tokens in byte_tokenizer().encode([b"hi"])]
    [[104, 105]]
    """

    def encode(texts: Sequence[bytes]) -> list[Tensor]:
        return [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in texts]

    return Tokenizer("bytes", 257, 256, encode)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise CorpusError(
            "data.tokenizer needs the package `tokenizers`, which is not installed; "
            "`pip install 'meshwright[hf]'`, or set data.tokenizer to bytes"
        ) from error
    return tokenizers


def _train_bpe(vocab_size: int, documents: Sequence[Document]) -> Tokenizer:
    """Byte-level BPE: every byte is a token, so that any text can be written."""
    if vocab_size < 257:
        raise CorpusError(f"data.tokenizer.bpe.vocab_size={vocab_size}: 256 bytes and a separator need at least 257")
    tokenizers = _library()
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator(_texts(documents, _TRAINING_BYTES), trainer=trainer)
    trained = int(model.get_vocab_size())
    return Tokenizer(f"bpe {trained + 1}", trained + 1, trained, _encoder(model))


def _from_file(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CorpusMissingError(f"data.tokenizer.file: {path} does not exist (looked in {Path.cwd()})")
    try:
        model = _library().Tokenizer.from_file(str(path))
    except CorpusError:
        raise
    except Exception as error:  # the library raises bare Exception for what it cannot parse
        raise CorpusError(f"data.tokenizer.file: {path} is not a tokenizer.json: {error}") from error
    size = int(model.get_vocab_size())
    known = [model.token_to_id(name) for name in _SEPARATOR_NAMES]
    separator = next((number for number in known if number is not None), size)
    return Tokenizer(str(path), max(size, separator + 1), separator, _encoder(model))


def _encoder(model: Any) -> Callable[[Sequence[bytes]], list[Tensor]]:
    def encode(texts: Sequence[bytes]) -> list[Tensor]:
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        found = model.encode_batch_fast(decoded, add_special_tokens=False)
        return [torch.tensor(each.ids, dtype=torch.int32) for each in found]

    return encode


def _texts(documents: Sequence[Document], budget_bytes: int) -> list[str]:
    texts: list[str] = []
    for document in documents:
        if budget_bytes <= 0:
            break
        texts.append(document.content[:budget_bytes].decode("utf-8", errors="replace"))
        budget_bytes -= len(document.content)
    return texts
