from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import meshwright as mw
from meshwright.parallel.agreement import fingerprint
from meshwright.parallel.errors import MeshError, WrapError
from meshwright.testing import run_ranks
from tests.parallel.models import pairs


def test_fingerprints_tell_name_shape_dtype_and_bits() -> None:
    base = torch.arange(3000.0)
    marks = {
        fingerprint("w", base),
        fingerprint("v", base),
        fingerprint("w", base.view(2, 1500)),
        fingerprint("w", base.double()),
        fingerprint("w", base + torch.eye(1, 3000)[0] * 1e-3),
        fingerprint("w", base.roll(1024)),
    }
    assert len(marks) == 6
    assert fingerprint("w", base) == fingerprint("w", base.clone())


def _differently(what: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if dist.get_rank() == 1:
        if what == "weight":
            model[1].weight.data += 1e-7
        else:
            model.append(nn.Linear(2, 2))
    mw.parallelize(model, mw.Mesh(dp=2))


@pytest.mark.slow
def test_ranks_with_other_weights_or_other_models_are_named() -> None:
    with pytest.raises(WrapError, match=r"ranks \[1\] hold another 1\.weight than rank 0"):
        run_ranks(_differently, mw.Mesh(dp=2), "weight")
    with pytest.raises(WrapError, match=r"different models: parameters and buffers per rank \[4, 6\]"):
        run_ranks(_differently, mw.Mesh(dp=2), "model")


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self.head(self.norm(inputs)), targets)


def _normalised(frozen: bool) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Normalised().train(not frozen)

    return build


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"dp": 2}, {"fsdp": 2}])
def test_batch_statistics_that_would_differ_between_ranks_are_refused_by_name(degrees: dict[str, int]) -> None:
    with pytest.raises(WrapError, match=r"norm\.running_mean, norm\.running_var"):
        mw.verify(_normalised(False), pairs(), mw.Mesh(**degrees))
    assert mw.verify(_normalised(True), pairs(), mw.Mesh(**degrees)).ok


@pytest.mark.slow
def test_a_mesh_of_another_size_than_the_running_ranks_is_refused() -> None:
    with pytest.raises(MeshError, match="has 4 ranks, but 2 are running"):
        run_ranks(lambda: mw.parallelize(nn.Linear(2, 2), mw.Mesh(dp=4)), mw.Mesh(dp=2))
