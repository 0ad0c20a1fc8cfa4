"""Models cut as their users say: blocks by name, stages by hand or by cost, schedules from files; at parity."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import ScheduleError, WrapError
from meshwright.parallel.microbatch import share
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.placements import Placement
from meshwright.parallel.stages import Stages, stages_of
from meshwright.testing import run_ranks
from tests.parallel.models import llama, tokens

TYPED = ["first", "second"]


class Typed(nn.Module):
    """Blocks of different types in attributes: structure finds none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.second = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.3))
        self.head = nn.Linear(6, 2)
        self.first = nn.Linear(6, 6)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.head(self.second(self.first(inputs)).tanh()), targets)


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "labels": torch.randint(0, 2, (4,), generator=generator),
    }


def _vision(architecture: str, **sizes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, image_size=32, patch_size=4, depths=[2, 2], **sizes)
    return AutoModelForImageClassification.from_config(config).train()


def swin() -> nn.Module:
    return _vision("swin", embed_dim=8, num_heads=[2, 2], window_size=4)


def convnext() -> nn.Module:
    return _vision("convnext", hidden_sizes=[8, 16], num_stages=2)


def albert() -> nn.Module:
    """One block object that is called for every layer."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "embedding_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model("albert", intermediate_size=16, vocab_size=97, **sizes)
    return AutoModelForMaskedLM.from_config(config).train()


def _cut(model: nn.Module, degrees: dict[str, int], **options: Any) -> Stages:
    return stages_of(model, mw.Mesh(**degrees), 0, Options.of(**options))


def _equal(build_model: Any, build_batch: Any, degrees: dict[str, int], **options: Any) -> None:
    report = mw.verify(build_model, build_batch, mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build_model", "build_batch", "degrees", "options"),
    [
        (Typed, pairs, {"pp": 2}, {"blocks": TYPED, "schedule": "1f1b", "loss": "sample_mean", "stage_costs": "flops"}),
        (Typed, pairs, {"fsdp": 2}, {"blocks": TYPED, "loss": "sample_mean"}),
        (swin, images, {"pp": 2}, {"blocks": ["*.encoder.layers.*.blocks.*"], "schedule": "modular"}),
        (convnext, images, {"pp": 2}, {"blocks": ["*.stages.*.layers.*"], "schedule": "modular"}),
    ],
    ids=["typed", "typed, sharded", "swin", "convnext"],
)
def test_named_blocks_are_stepped_as_in_the_plain_run(
    build_model: Any, build_batch: Any, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    _equal(build_model, build_batch, degrees, num_microbatches=2, **options)


def _predicted_and_counted(mesh: mw.Mesh) -> tuple[str, str]:
    model = mw.parallelize(Typed(), mesh, blocks=TYPED, loss="sample_mean", num_microbatches=2)
    _, counted = model.ledger_step(share(pairs(), model.data_rank, 2))
    return str(model.report.collectives), str(counted)


@pytest.mark.slow
def test_named_blocks_are_the_units_that_are_sharded() -> None:
    for predicted, counted in run_ranks(_predicted_and_counted, mw.Mesh(fsdp=2), mw.Mesh(fsdp=2)):
        assert predicted == counted
        assert re.search(r"all_gather +8 ", counted), counted  # two units and the rest, twice in both micro-batches


@pytest.mark.slow
def test_a_schedule_from_a_file_on_stages_cut_by_hand_is_the_plain_run(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text("0F0,0F1,0B0,0F2,0B1,0B2\n1F0,1B0,1F1,1B1,1F2,1B2\n")
    cut = Placement((0, 1, 3), (0, 1))
    build = llama(attention_dropout=0.1)
    _equal(build, tokens(6), {"pp": 2}, schedule=str(file), placement=cut, num_microbatches=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"fsdp": 2}, {"schedule": "layered", "zero_stage": 3}),
        ({"dp": 2}, {"schedule": "layered"}),
        ({"pp": 2, "fsdp": 2}, {"schedule": "modular", "zero_stage": 2}),
    ],
    ids=str,
)
def test_micro_batches_in_groups_are_the_plain_run(degrees: dict[str, int], options: dict[str, Any]) -> None:
    build = llama(attention_dropout=0.1)
    _equal(build, tokens(12), degrees, num_microbatches=5, group_size=2, **options)


def test_blocks_that_cannot_be_found_are_asked_for_with_what_may_be_named() -> None:
    with pytest.raises(
        WrapError, match=r"name them with blocks=\[...\] \(some of \['second.\*', 'second', 'head', 'first'\]"
    ):
        _cut(Typed(), {"pp": 2}, schedule="1f1b")
    with pytest.raises(WrapError, match=r"name them with blocks=\[...\], or use schedule='accumulate'"):
        _cut(nn.Linear(2, 2), {}, schedule="layered")


def test_a_block_that_is_called_for_every_layer_is_one_block() -> None:
    shared = r"1 blocks cannot make 2 stages.*one block, however often it is called: albert.*albert_layers.0"
    with pytest.raises(ScheduleError, match=shared):
        _cut(albert(), {"pp": 2}, schedule="1f1b", blocks=["*.albert_layers.*"])


def test_what_does_not_fit_the_model_is_refused_before_a_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshwright.parallel.verify.run_ranks", lambda *_: pytest.fail("ranks were started"))
    schedule = Schedule.read("0F0,1F0,1B0,0B0\n2F0,3F0,3B0,2B0")
    with pytest.raises(
        ScheduleError, match=r"4 stages, but the model has 3 blocks.*blocks model.layers.0 to model.layers.2"
    ):
        mw.verify(llama(), tokens(4), mw.Mesh(pp=2), schedule=schedule)
    with pytest.raises(WrapError, match=r"no module has a path like 'model.layerz.\*'; nearest: model.layers"):
        mw.verify(llama(), tokens(4), mw.Mesh(fsdp=2), blocks=["model.layerz.*"])
