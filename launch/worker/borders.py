"""Whether a model keeps the documents of a packed row apart: tried once, before the first step.

A model that ignores where positions start anew lets documents read each other, and trains on without a word. Here two
documents lie in one row and only one of them counts in the loss, which may change neither with the other one nor with
the order of both.
"""

import torch
from torch import Tensor

from meshwright.launch.worker.errors import ModelBuildError
from meshwright.launch.worker.packing import IGNORED
from meshwright.launch.worker.samples import Samples
from meshwright.launch.worker.text import Text
from meshwright.parallel.wrap import ParallelModel

__all__ = ["check_borders"]

_LENGTH = 24  # tokens of each document
_SAME = 1e-6  # relative: the same kernels on the same shapes, with other values where the mask is closed
_MOVED, _MOVED_NARROW = 1e-5, 2e-3  # relative: sums in another order


def check_borders(model: ParallelModel, text: Text, dtype: torch.dtype) -> None:
    """Refuses a model whose documents see each other, where batches are packed; every rank must ask.

    Args:
        model: wrapped; its weights are tried as they are.
        text: of the job.
        dtype: what the model computes in.

    Raises:
        ModelBuildError: with the losses that should be equal.
    """
    if not isinstance(text.training, Samples) or text.training.form != "packed":
        return
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, max(text.training.lengths))
    counted, one, other = torch.randint(0, text.vocab_size, (3, length), generator=generator)
    was_training = model.module.training
    model.module.eval()
    first, second, moved = (
        _loss(model, row, at=at) for row, at in (((one, counted), 1), ((other, counted), 1), ((counted, one), 0))
    )
    model.module.train(was_training)
    is_narrow = torch.bfloat16 in (dtype, next(model.module.parameters()).dtype)
    allowed = _MOVED_NARROW if is_narrow else _MOVED
    if abs(first - second) > _SAME * abs(first) or abs(first - moved) > allowed * abs(first):
        raise ModelBuildError(
            f"data.batching=packed: the loss of a document is {first:.8g} after one document, {second:.8g} after "
            f"another and {moved:.8g} before it, so the model does not keep the documents of a row apart; set "
            "data.batching: padded, or take a model that starts anew where position_ids do, as llama, qwen3, gpt2 and "
            "gemma3 of transformers"
        )


def _loss(model: ParallelModel, row: tuple[Tensor, Tensor], *, at: int) -> float:
    """Mean loss of the document that stands `at` a place of a row, on all data ranks alike."""
    labels = [torch.full_like(each, IGNORED) for each in row]
    labels[at][1:] = row[at][1:]
    positions = [torch.arange(len(each)) for each in row]
    batch = {"input_ids": torch.cat(row), "labels": torch.cat(labels), "position_ids": torch.cat(positions)}
    loss, items = model.evaluate({name: each[None] for name, each in batch.items()})
    return float(loss / items)
