"""Models that keep the documents of a packed row apart, and models that do not."""

from typing import Any

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.launch.worker.borders import check_borders
from meshwright.launch.worker.errors import ModelBuildError
from meshwright.testing import run_ranks
from tests.launch.worker.test_text import text
from tests.parallel.models import VOCABULARY, causal_lm, gpt2, llama

pytestmark = pytest.mark.slow
SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}
WIDE = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
APART = {
    "llama": llama(),
    "gpt2": gpt2(bos_token_id=0, eos_token_id=0),
    "qwen3": causal_lm("qwen3", **WIDE),
    "mixtral": causal_lm("mixtral", **WIDE, num_local_experts=4),
    "gemma3": causal_lm("gemma3_text", **WIDE, sliding_window=4),
}
TOGETHER = {
    "bloom": causal_lm("bloom", hidden_size=32, n_head=4, n_layer=2, vocab_size=VOCABULARY, use_cache=False),
    "opt": causal_lm("opt", **SHAPE, ffn_dim=48, word_embed_proj_dim=32),
    "mamba": causal_lm("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, use_cache=False),
}


class Counting(nn.Module):
    """Reads no neighbour, but takes a position for the place in the row."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(VOCABULARY, 16), nn.Embedding(64, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        scores = self.head(self.table(input_ids) + self.places(torch.arange(input_ids.shape[1]) + 0 * position_ids))
        return nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _check(build: Any, mesh: mw.Mesh, form: str, dtype: torch.dtype, options: dict[str, Any]) -> bool:
    module = build()
    if dtype is torch.bfloat16:
        module.forward = torch.autocast("cpu", dtype=dtype)(module.forward)
    model = mw.parallelize(module, mesh, **options)
    check_borders(model, text(form), dtype)
    return model.module.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_documents_that_do_not_see_each_other_pass(dtype: torch.dtype) -> None:
    for name, build in APART.items():
        assert run_ranks(_check, mw.Mesh(), build, mw.Mesh(), "packed", dtype, {}) == [True], name
    for mesh, options in ((mw.Mesh(dp=2), {}), (mw.Mesh(pp=2), {"schedule": "gpipe"})):
        assert all(run_ranks(_check, mesh, llama(), mesh, "packed", dtype, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TOGETHER)
def test_documents_that_see_each_other_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(
        ModelBuildError, match=r"does not keep the documents of a row apart; set data\.batching: padded"
    ):
        run_ranks(_check, mw.Mesh(), TOGETHER[name], mw.Mesh(), "packed", dtype, {})


def test_positions_that_go_on_across_a_border_are_refused() -> None:
    with pytest.raises(ModelBuildError, match="does not keep the documents of a row apart"):
        run_ranks(_check, mw.Mesh(), Counting, mw.Mesh(), "packed", torch.float32, {})


def test_padded_batches_are_not_tried() -> None:
    assert run_ranks(_check, mw.Mesh(), TOGETHER["bloom"], mw.Mesh(), "padded", torch.float32, {}) == [True]
