"""Weights in Hugging Face's layout go into shares and come back bit for bit, on any mesh."""

from pathlib import Path

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.parallel.errors import WeightsError
from meshwright.testing import run_ranks
from tests.parallel.families import FAMILIES

pytestmark = pytest.mark.slow

MESHES = ({}, {"tp": 2}, {"fsdp": 2}, {"fsdp": 2, "tp": 2}, {"tp": 4})


def _blank(family: str) -> nn.Module:
    model = FAMILIES[family][0]()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    return model


def _through(source: str, target: str, family: str, degrees: dict[str, int]) -> None:
    model = mw.parallelize(_blank(family), mw.Mesh(**degrees), example=FAMILIES[family][1]())
    model.load_weights(source)
    model.save_weights(target, file_bytes=20_000)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "t5"])
@pytest.mark.parametrize("degrees", MESHES, ids=lambda degrees: str(mw.Mesh(**degrees)))
def test_weights_survive_any_mesh_bit_for_bit(tmp_path: Path, family: str, degrees: dict[str, int]) -> None:
    whole = FAMILIES[family][0]()
    whole.save_pretrained(tmp_path / "in")  # type: ignore[operator]
    run_ranks(_through, mw.Mesh(**degrees), str(tmp_path / "in"), str(tmp_path / "out"), family, degrees)
    again = type(whole).from_pretrained(tmp_path / "out")  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    FAMILIES["llama"][0]().save_pretrained(tmp_path)  # type: ignore[operator]
    model = mw.parallelize(FAMILIES["gpt2"][0](), mw.Mesh())
    with pytest.raises(WeightsError, match=r"holds no transformer\."):
        model.load_weights(tmp_path)
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors\.index\.json"):
        model.load_weights(tmp_path / "nowhere")
