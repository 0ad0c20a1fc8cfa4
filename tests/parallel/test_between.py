"""Code that stands between blocks sees the whole sequence, whoever holds which positions inside of them."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import meshwright as mw
from meshwright.testing import run_ranks
from tests.parallel.cells import tiered


class Mlp(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))


class Between(nn.Module):
    """Blocks of one width in a loop that a user wrote."""

    def __init__(self, glue: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.glue = _GLUE[glue]
        self.blocks = nn.ModuleList([Mlp() for _ in range(4)])
        self.scales = nn.Parameter(torch.linspace(0.5, 2.0, 16))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        kept = [x]
        for block in self.blocks:
            x = self.glue(self, block(x), kept)
            kept.append(x)
        return functional.mse_loss(self.head(x), target)


Glue = Callable[[Any, Tensor, list[Tensor]], Tensor]


def _skipped(model: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
    """A U-net of tokens: the second half adds what the first half was given."""
    return x + model.scales * kept[3 - len(kept)] if len(kept) > 2 else x


def _supervised(model: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
    """The last block's successor gets what all before it gave on top; nothing else stands between blocks."""
    return x + sum(each.mean(1, keepdim=True) for each in kept) if len(kept) == 4 else x


def _in_place(model: Any, x: Tensor, kept: list[Tensor]) -> Tensor:
    return x.mul_(0.5)


_GLUE: dict[str, Glue] = {
    "scaled": lambda model, x, kept: x * model.scales,
    "centred": lambda model, x, kept: x - x.mean(1, keepdim=True),
    "dropped": lambda model, x, kept: functional.dropout(x, 0.2),
    "flipped": lambda model, x, kept: x.flip(1),
    "residual": lambda model, x, kept: kept[-1] + x,
    "skipped": _skipped,
    "supervised": _supervised,
    "in place": _in_place,
}
_LAYOUTS = (
    ({"cp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"cp": 2, "pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    ({"tp": 2, "pp": 2}, {"schedule": "modular", "num_microbatches": 2, "sequence_parallel": True}),
)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, 16, generator=generator), torch.randn(5, 7, 16, generator=generator)


_CELLS = [(glue, layout) for glue, layout in product(_GLUE, _LAYOUTS) if glue != "supervised" or "pp" not in layout[0]]


@pytest.mark.slow
@pytest.mark.parametrize(("glue", "layout"), tiered(_CELLS), ids=str)
def test_code_between_blocks_sees_the_whole_sequence(glue: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    degrees, options = layout
    report = mw.verify(lambda: Between(glue), batch, mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.notes == ()


def _told(glue: str, degrees: dict[str, int], options: dict[str, Any]) -> tuple[str, str, str]:
    model = mw.parallelize(Between(glue), mw.Mesh(**degrees), example=batch(), **options)
    model.step(batch())
    _, counted = model.ledger_step(batch())
    return str(model.report), str(model.report.collectives), str(counted)


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "options"), [_LAYOUTS[0], _LAYOUTS[1]], ids=str)
def test_the_report_says_where_the_sequence_is_whole_and_what_that_sends(degrees: Any, options: Any) -> None:
    report, predicted, counted = run_ranks(_told, mw.Mesh(**degrees), "supervised", degrees, options)[0]
    assert "joined and dealt again behind blocks.0, blocks.1, blocks.2, where the model's own code uses" in report
    assert counted == predicted


class Turned(nn.Module):
    """torch's own blocks with positions first, as they are by default: what is dealt is samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.2)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(self.encoder(x.transpose(0, 1)).transpose(0, 1), target)


@pytest.mark.slow
@pytest.mark.parametrize(("degrees", "options"), [_LAYOUTS[0], _LAYOUTS[1]], ids=str)
def test_attention_that_drops_along_another_dim_than_the_dealt_one_draws_what_the_plain_run_draws(
    degrees: Any, options: Any
) -> None:
    report = mw.verify(Turned, batch, mw.Mesh(**degrees), **options)
    assert report.ok, report
