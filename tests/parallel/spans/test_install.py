"""The option `layer_block` of wrapped models: which blocks run by spans, on which layouts, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import WrapError
from meshwright.parallel.spans.install import plan_spans
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import FAMILIES, lm, words

SIZES = {"query_block": 5, "kv_block": 4, "layer_block": 5, "loss_block": 7}
LAYOUTS: tuple[tuple[str, dict[str, int], dict[str, Any]], ...] = (
    ("llama", {"fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ("gpt2", {"tp": 2}, {}),
    ("translator", {"tp": 2}, {}),
    ("bert", {"pp": 2}, {"schedule": "zb-h1", "num_microbatches": 2}),
    ("llama", {"tp": 2}, {"num_microbatches": 2}),
    ("gemma3", {"dp": 2, "fsdp": 2}, {}),
    ("gemma3", {"fsdp": 2}, {"recompute": ["*layers.*"], "schedule": "layered", "num_microbatches": 2}),
    ("whisper", {"pp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    ("mixtral", {"dp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ("vit", {"pp": 2, "dp": 2}, {"schedule": "modular", "num_microbatches": 2}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees", "options"), tiered(LAYOUTS, layout_of))
def test_blocks_by_spans_are_the_plain_run(family: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    build, batch = FAMILIES[family]
    sizes = {name: size for name, size in SIZES.items() if name != "loss_block" or family in ("llama", "gemma3")}
    report = mw.verify(build, batch, mw.Mesh(**degrees), blockwise=sizes, **options)  # type: ignore[arg-type]
    assert report.ok, str(report)


def test_the_report_says_which_blocks_do() -> None:
    model = lm("llama")()
    lines = plan_spans(model, lambda: model(**words())).lines(mw.parallel.blockwise.sizes.Blockwise(layer_block=8))
    assert lines == ["blocks in spans of 8 positions, attention once: 2 x model.layers.*"]


def test_blocks_that_cannot_are_named_with_the_reason() -> None:
    model = FAMILIES["t5"][0]()
    with pytest.raises(WrapError, match=r"encoder\.block\.0: layer\.0\.SelfAttention looks at the whole sequence"):
        plan_spans(model, lambda: model(**words()))
    with pytest.raises(WrapError, match="it has no list of blocks; use ffn_block"):
        plan_spans(nn.Linear(2, 2), lambda: None)


def test_blocks_that_give_more_than_the_stream_run_whole() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.matrix(x)
            return y, y.sum()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Two(), Two()])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x, _ = layer(x)
            return x.sum()

    model = Model()
    with pytest.raises(WrapError, match="fits no block of the model"):
        plan_spans(model, lambda: model(torch.ones(1, 4, 8)))


@pytest.mark.parametrize(
    ("degrees", "options", "message"),
    [
        ({"cp": 2}, {}, "layer_block does not go with cp=2"),
        ({"tp": 2}, {"sequence_parallel": True}, "layer_block does not go with sequence_parallel"),
        ({"dp": 2}, {"data_engine": "deepspeed"}, "use data_engine='torch'"),
    ],
)
def test_what_does_not_go_together_is_refused(degrees: dict[str, int], options: dict[str, Any], message: str) -> None:
    build, batch = FAMILIES["llama"]
    with pytest.raises(WrapError, match=message):
        mw.verify(build, batch, mw.Mesh(**degrees), blockwise={"layer_block": 5}, **options)  # type: ignore[arg-type]
