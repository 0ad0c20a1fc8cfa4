"""Models cut as their users say: blocks by name, stages by hand or by cost, schedules from files; at parity."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw
from meshwright.parallel.errors import ScheduleError, WrapError
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.actions import Schedule
from meshwright.parallel.pipeline.orders import hybrid, one_forward_one_backward
from meshwright.parallel.pipeline.placements import Placement
from meshwright.parallel.stages import Stages, stages_of
from tests.parallel.models import llama, tokens


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
        (Typed, pairs, {"pp": 2}, {"blocks": ["first", "second"], "schedule": "1f1b", "loss": "sample_mean"}),
        (Typed, pairs, {"fsdp": 2}, {"blocks": ["first", "second"], "loss": "sample_mean"}),
        (swin, images, {"pp": 2}, {"blocks": ["*.encoder.layers.*.blocks.*"], "schedule": "modular"}),
        (convnext, images, {"pp": 2}, {"blocks": ["*.stages.*.layers.*"], "schedule": "modular"}),
    ],
    ids=["typed", "typed, sharded", "swin", "convnext"],
)
def test_named_blocks_are_stepped_as_in_the_plain_run(
    build_model: Any, build_batch: Any, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    _equal(build_model, build_batch, degrees, num_microbatches=2, **options)
