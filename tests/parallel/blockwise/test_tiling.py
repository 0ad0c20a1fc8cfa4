"""The option `blockwise` on feed-forward networks and losses of wrapped models."""

from itertools import product
from typing import Any

import pytest
from torch import nn

import meshwright as mw
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.blockwise.tiling import tile_heads, tile_networks
from meshwright.parallel.errors import WrapError
from tests.parallel.cells import tiered
from tests.parallel.families import FAMILIES, lm

SIZES = {"query_block": 5, "kv_block": 4, "ffn_block": 5, "loss_block": 7}  # divide no length in these tests
LAYOUTS: tuple[tuple[dict[str, int], dict[str, Any]], ...] = (
    ({"fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ({"cp": 2, "tp": 2}, {"cp_kind": "ring"}),
    ({"tp": 2}, {"num_microbatches": 2}),
    ({"dp": 2, "fsdp": 2}, {}),
    ({"pp": 2}, {"schedule": "zb-h1", "num_microbatches": 2}),
    ({"cp": 2, "pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), tiered(product(("llama", "gemma3"), LAYOUTS)))
def test_everything_by_blocks_is_the_plain_run(family: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    (build, batch), (degrees, options) = FAMILIES[family], layout
    report = mw.verify(build, batch, mw.Mesh(**degrees), blockwise=SIZES, **options)  # type: ignore[arg-type]
    assert report.ok, str(report)


def test_the_report_names_what_runs_by_blocks() -> None:
    model, sizes = lm("llama")(), Blockwise.of(SIZES)
    assert tile_networks(model, sizes) == ["feed-forward in blocks of 5 positions: 2 x model.layers.*.mlp"]
    assert tile_heads(model, sizes) == ["cross entropy in blocks of 7 rows of scores: lm_head"]
    model, early = lm("llama")(), Blockwise.of({**SIZES, "loss_in_advance": True})
    assert tile_heads(model, early) == ["cross entropy in blocks of 7 rows of scores: lm_head, gradients with it"]
    assert model.get_submodule("lm_head").forward.in_advance  # type: ignore[union-attr]


def test_sizes_that_are_not_asked_for_change_nothing() -> None:
    model = lm("llama")()
    assert tile_networks(model, Blockwise()) == tile_heads(model, None) == []
    assert "forward" not in vars(model.get_submodule("lm_head"))


def test_models_without_such_parts_are_refused() -> None:
    with pytest.raises(WrapError, match="ffn_block needs"):
        tile_networks(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), Blockwise.of(SIZES))
    with pytest.raises(WrapError, match="loss_block needs a head"):
        tile_heads(nn.ModuleList(nn.LayerNorm(4) for _ in range(2)), Blockwise.of(SIZES))


@pytest.mark.parametrize(
    ("degrees", "options", "message"),
    [
        ({"tp": 2}, {"sequence_parallel": True}, "ffn_block does not go with sequence_parallel"),
        ({"dp": 2}, {"data_engine": "deepspeed"}, "use data_engine='torch'"),
    ],
)
def test_what_does_not_go_with_blocks_is_refused(
    degrees: dict[str, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(WrapError, match=message):
        mw.verify(*FAMILIES["llama"], mw.Mesh(**degrees), blockwise=SIZES, **options)  # type: ignore[arg-type]
