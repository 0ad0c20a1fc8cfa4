"""The parity matrix of long sequences: models x masks x ways to deal or cut a sequence, each equal to the plain run.

`python -m tests.parallel.sequence_matrix` runs all cells and writes docs/parity-sequences.md; tests run a part of them.
"""

import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from tests.parallel.families import FAMILIES, Family, lm, words

__all__ = ["ROWS", "WAYS", "cell"]

PAGE = Path(__file__).parents[2] / "docs" / "parity-sequences.md"
_LENGTH = 15  # divided by no number of ranks or blocks


def packed() -> dict[str, Tensor]:
    """Three documents in each row, told by positions that begin anew."""
    batch = words(6, _LENGTH)
    starts = torch.tensor([0] * 4 + [4] * 6 + [10] * 5)
    batch["position_ids"] = (torch.arange(_LENGTH) - starts).expand(6, -1).contiguous()
    return batch


def padded() -> dict[str, Tensor]:
    """Rows of several lengths, padded on the right."""
    batch = words(6, _LENGTH)
    lengths = torch.tensor([15, 9, 4, 12, 15, 7])
    batch["attention_mask"] = (torch.arange(_LENGTH) < lengths[:, None]).long()
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def holes() -> dict[str, Tensor]:
    """Rows of which tokens anywhere are hidden."""
    batch = words(6, _LENGTH)
    hidden = torch.rand(6, _LENGTH, generator=torch.Generator().manual_seed(3)) < 0.3
    batch["attention_mask"] = (~hidden).long()
    batch["labels"] = batch["labels"].masked_fill(hidden, -100)
    return batch


class _Encoder(nn.Module):
    """Torch's own layers, which are told of padding and of nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, values: Tensor, padding: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error (0-dim) of [b, s, 16], `padding` [b, s] True where nothing is."""
        return nn.functional.mse_loss(self.encoder(values, src_key_padding_mask=padding), targets)


def hidden_rows() -> dict[str, Tensor]:
    """Values of which some are hidden from the others."""
    generator = torch.Generator().manual_seed(4)
    values, targets = (torch.randn(6, _LENGTH, 16, generator=generator) for _ in range(2))
    return {"values": values, "padding": torch.rand(6, _LENGTH, generator=generator) < 0.3, "targets": targets}


def whole() -> dict[str, Tensor]:
    """Rows of one length."""
    return words(6, _LENGTH)


_WINDOW: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_sliding_window": True,
    "sliding_window": 5,
    "max_window_layers": 0,
}

ROWS: dict[str, Family] = {
    "gpt2, causal": (FAMILIES["gpt2"][0], whole),
    "gpt2, padded": (FAMILIES["gpt2"][0], padded),
    "llama, causal": (lm("llama"), whole),
    "llama, GQA": (lm("llama", num_key_value_heads=2, attention_dropout=0.1), whole),
    "llama, GQA, packed": (lm("llama", num_key_value_heads=2), packed),
    "qwen3, GQA": (FAMILIES["qwen3"][0], whole),
    "qwen3, GQA, packed": (FAMILIES["qwen3"][0], packed),
    "qwen3, GQA, window": (lm("qwen3", **_WINDOW), whole),
    "gemma3, window and causal, one key head": (FAMILIES["gemma3"][0], whole),
    "gemma3, window and causal, packed": (FAMILIES["gemma3"][0], packed),
    "bert, whole": (FAMILIES["bert"][0], whole),
    "bert, padded": (FAMILIES["bert"][0], padded),
    "bert, holes": (FAMILIES["bert"][0], holes),
    "torch's encoder, holes": (_Encoder, hidden_rows),
    "t5, encoder and decoder": (FAMILIES["t5"][0], whole),
    "vit, whole": FAMILIES["vit"],
}
"""Model and mask."""

Way = tuple[dict[str, int], dict[str, Any]]
WAYS: dict[str, Way] = {
    **{f"{kind}, cp=2": ({"cp": 2}, {"cp_kind": kind}) for kind in ("ring", "ulysses", "gather")},
    **{f"{kind}, cp=4": ({"cp": 4}, {"cp_kind": kind}) for kind in ("ring", "ulysses", "hybrid", "gather")},
    "attention by blocks": ({"dp": 2}, {"blockwise": {"query_block": 4, "kv_block": 5}}),
    "layers by spans": ({"dp": 2}, {"blockwise": {"layer_block": 4}}),
}
"""How a sequence is dealt or cut."""


def cell(row: str, way: str) -> float | str:
    """The largest relative error of loss, any gradient or their norm; or why there is none."""
    degrees, options = WAYS[way]
    try:
        report = mw.verify(*ROWS[row], mw.Mesh(**degrees), **options)
    except WrapError as refused:
        return str(refused)
    largest = max(report.max_relative_gradient_error, report.loss_error, report.gradient_norm_error)
    assert report.ok, f"{row}, {way}: {report}"
    assert largest <= 1e-10, f"{row}, {way}: {report}"
    return largest


def main() -> int:
    """Runs the whole matrix and writes its page."""
    found: dict[tuple[str, str], float | str] = {}
    wrong: list[str] = []
    start_s = time.monotonic()
    for number, (row, way) in enumerate(product(ROWS, WAYS)):
        try:
            found[row, way] = cell(row, way)
        except AssertionError as error:
            wrong.append(str(error))
            found[row, way] = "wrong"
        passed_s = time.monotonic() - start_s
        sys.stderr.write(f"\r{number + 1} cells, {len(wrong)} wrong, {passed_s:.0f} s  {row:<40} {way:<20}")
    PAGE.write_text(_page(found), encoding="utf-8")
    sys.stderr.write(f"\nwrote {PAGE}\n" + "\n".join(wrong))
    return 1 if wrong else 0


def _page(found: dict[tuple[str, str], float | str]) -> str:
    refused = dict.fromkeys(each for each in found.values() if isinstance(each, str))
    marks = {reason: f"[{number}]" for number, reason in enumerate(refused, 1)}
    lines = [
        "# The parity matrix of long sequences",
        "",
        f"Each model ran one optimizer step on sequences of {_LENGTH} positions (pictures: 17), which no number of",
        "ranks or block size divides: dealt over `cp`, with attention by blocks, and with layers by spans; real ranks",
        "(gloo, float64, dropout on). The number is the largest relative error of loss, any gradient or their norm",
        "against the unwrapped model; the limit is 1e-10. `make matrix` writes this page.",
        "",
        f"| model | {' | '.join(WAYS)} |",
        "|---" * (len(WAYS) + 1) + "|",
    ]
    for row in ROWS:
        cells = (found[row, way] for way in WAYS)
        lines.append(
            f"| {row} | {' | '.join(marks[each] if isinstance(each, str) else f'{each:.1e}' for each in cells)} |"
        )
    return "\n".join([*lines, "", *(f"{mark} {reason}" for reason, mark in marks.items())]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
