"""Wrapped models whose sequences are dealt equal the plain run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.errors import WrapError
from tests.parallel.families import FAMILIES, VOCABULARY, lm, words


def packed(num_samples: int = 4) -> dict[str, Tensor]:
    """Three documents in each row, told by positions that begin anew."""
    batch = words(num_samples, 15)
    starts = torch.tensor([0] * 4 + [4] * 6 + [10] * 5)
    batch["position_ids"] = (torch.arange(15) - starts).expand(num_samples, -1).contiguous()
    return batch


def checked(build: Any, batch: Any, **options: Any) -> None:
    degrees = {name: options.pop(name) for name in ("cp", "dp", "fsdp", "tp", "pp") if name in options}
    report = mw.verify(build, batch, mw.Mesh(**degrees), **options)
    assert report.ok, str(report)
    assert not report.notes


@pytest.mark.parametrize("kind", ["ring", "ulysses", "gather"])
def test_packed_documents_cross_the_borders_of_ranks(kind: Any) -> None:
    checked(lm("llama", num_key_value_heads=2), packed, cp=2, cp_kind=kind)


def test_windows_shorter_than_a_share_are_the_plain_run() -> None:
    checked(FAMILIES["gemma3"][0], FAMILIES["gemma3"][1], cp=4, cp_kind="ring")


def test_sequences_of_two_positions_for_each_rank_are_the_plain_run_and_shorter_ones_refused() -> None:
    build = lm("qwen3", num_key_value_heads=2)
    checked(build, lambda: words(6, 8), cp=4, cp_kind="ring")
    with pytest.raises(WrapError, match="7 positions leaves some of the 4 ranks of cp with fewer than two"):
        mw.verify(build, lambda: words(6, 7), mw.Mesh(cp=4), example=words(2, 8))


def test_layers_cross_stages_with_their_positions_dealt() -> None:
    build, batch = FAMILIES["mixtral"]
    checked(build, batch, cp=2, pp=2, schedule="modular", num_microbatches=2, cp_kind="ring")


def test_sharded_states_and_recompute_go_with_dealt_positions() -> None:
    build, batch = FAMILIES["gpt2"]
    checked(build, batch, cp=2, fsdp=2, schedule="layered", num_microbatches=2, recompute="blocks", cp_kind="ring")


class Experts(nn.Module):
    """A block whose experts are modules, most of which see none of a rank's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 8)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))
        self.into, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, stream: Tensor) -> Tensor:
        parts = self.into(stream).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        stream = stream + self.out(attended.transpose(1, 2).flatten(2))
        chosen = self.router(stream).argmax(-1)
        added = torch.zeros_like(stream)
        for number, expert in enumerate(self.experts):
            seen = chosen == number
            if bool(seen.any()):
                added[seen] = expert(stream[seen])
        return stream + added


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        stream = self.table(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return functional.cross_entropy(self.head(stream).flatten(0, 1), labels.flatten())


def test_parameters_that_only_some_ranks_use_are_summed_and_unused_ones_keep_no_gradient() -> None:
    checked(Routed, lambda: words(1, 6), cp=2, cp_kind="ring")
    checked(Routed, lambda: words(1, 9), cp=4)


def test_batches_may_be_longer_than_the_example() -> None:
    build, _ = FAMILIES["llama"]
    checked(build, lambda: words(4, 17), cp=2, example=words(2, 8), cp_kind="ring")


@pytest.mark.parametrize(
    ("degrees", "options", "message"),
    [
        ({"cp": 2}, {"data_engine": "deepspeed"}, "cp=2 does not go with data_engine"),
        ({"cp": 2, "tp": 2}, {"sequence_parallel": True}, "cp=2 does not go with sequence_parallel"),
        ({"cp": 2}, {"cp_kind": "rings"}, "nearest: 'ring'|ring"),
    ],
)
def test_what_does_not_go_with_dealt_positions_is_refused(
    degrees: dict[str, int], options: dict[str, Any], message: str
) -> None:
    build, batch = FAMILIES["llama"]
    with pytest.raises(WrapError, match=message):
        mw.verify(build, batch, mw.Mesh(**degrees), **options)


def test_router_logits_that_reach_the_loss_beside_the_stream_are_refused_in_the_first_step() -> None:
    build = lm(
        "mixtral",
        num_key_value_heads=2,
        num_local_experts=4,
        experts_implementation="eager",
        output_router_logits=True,
    )
    with pytest.raises(WrapError, match=r"ranks of cp come to different losses .*output_router_logits=False"):
        mw.verify(build, words, mw.Mesh(cp=2))


def test_models_that_mix_positions_are_refused_before_a_rank_starts() -> None:
    with pytest.raises(WrapError, match="does not work on a dealt sequence"):
        mw.verify(FAMILIES["mixer"][0], FAMILIES["mixer"][1], mw.Mesh(cp=2))  # type: ignore[arg-type]
