"""One rank of any mesh, run for real without the others: the calls and the memory of the real one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import meshwright as mw
from benchmarks.fake_ranks import JOBS, compared
from benchmarks.loops import batch_of, build_llama
from meshwright.parallel.errors import WrapError
from meshwright.parallel.fake_rank import fake_rank
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans
from meshwright.parallel.report import describe
from meshwright.testing import run_ranks

_SLOW = ("fsdp, stage 3", "pp x fsdp x tp", "tp x pp", "cp ring")
_SLOW += tuple(each for each in JOBS if each.startswith("ep") or " by " in each or each.endswith("host memory"))


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in _SLOW)) for each in JOBS])
def test_every_rank_calls_what_the_real_one_calls_in_the_same_order_and_takes_its_memory(name: str) -> None:
    for fake, calls, peak_bytes in compared(JOBS[name]):
        assert fake.calls == calls, fake.rank
        assert abs(fake.memory.peak_bytes / peak_bytes - 1) < 0.05, fake.rank


@pytest.mark.parametrize(
    ("degrees", "options"),
    [({"dp": 3}, {}), ({"dp": 2, "fsdp": 4}, {"num_microbatches": 2}), ({"tp": 2, "fsdp": 2}, {"schedule": "layered"})],
    ids=str,
)
def test_the_first_rank_calls_what_the_report_predicts(degrees: dict[str, int], options: dict[str, object]) -> None:
    model, mesh, batch = build_llama(64, 2, 128), mw.Mesh(**degrees), batch_of(0, samples=2, length=16, vocabulary=128)
    number = int(str(options.get("num_microbatches", 1)))
    chosen = {**options, "example": {name: each[: 2 // number] for name, each in batch.items()}}
    wanted = Options.of(**chosen)
    predicted = describe(model, mesh, wanted, make_plans(model, mesh, wanted)).collectives
    assert fake_rank(model, mesh, 0, batch=batch, **chosen).ledger == predicted


class _Chain(nn.Module):
    """Eight blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(8))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            values = block(values)
        return values.square().mean()


_LARGE = mw.Mesh(pp=8, fsdp=16, dp=8)
_PIPE: dict[str, object] = {"schedule": "1f1b", "num_microbatches": 4, "loss": "sample_mean"}


def test_a_mesh_of_a_thousand_ranks_needs_none_of_them() -> None:
    model = mw.deferred(_Chain)
    found = [fake_rank(model, _LARGE, rank, batch=torch.zeros(4, 8), **_PIPE) for rank in (0, 700, 1023)]
    counts = [[each.ledger.count(kind) for kind in ("send", "recv")] for each in found]
    assert counts == [[4, 4], [8, 8], [4, 4]]
    assert all(call.group_size == 16 for call in found[1].calls if call.axis == "fsdp")
    assert not dist.is_initialized()
    assert all(each.is_meta for each in model.parameters())


def _beside_a_run() -> tuple[bool, float]:
    before = dist.distributed_c10d._get_default_group()
    fake_rank(_Chain(), mw.Mesh(fsdp=8), 5, batch=torch.zeros(4, 8), loss="sample_mean")
    ones = torch.ones(1)
    dist.all_reduce(ones)
    dist.all_reduce(ones, group=dist.new_group())
    return dist.distributed_c10d._get_default_group() is before, float(ones)


def test_a_process_group_that_runs_goes_on_afterwards() -> None:
    assert run_ranks(_beside_a_run, mw.Mesh(dp=2)) == [(True, 4.0)] * 2


class _Asks(_Chain):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values * 2 if float(values.sum()) > 0 else values)


def test_what_cannot_be_run_without_values_is_said() -> None:
    batch = torch.zeros(4, 8)
    with pytest.raises(WrapError, match="rank 2 lies outside of the mesh dp=2; choose 0 to 1"):
        fake_rank(_Chain(), mw.Mesh(dp=2), 2, batch=batch)
    with pytest.raises(WrapError, match="ask for data_engine='torch'"):
        fake_rank(_Chain(), mw.Mesh(dp=2), 0, batch=batch, data_engine="deepspeed", loss="sample_mean")
    with pytest.raises(WrapError, match="asks for values"):
        fake_rank(_Asks(), mw.Mesh(dp=2), 0, batch=batch, loss="sample_mean")
