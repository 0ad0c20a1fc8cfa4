from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import meshwright as mw
from meshwright.parallel.collectives import stop_ranks, world
from meshwright.parallel.connecting import check_transport, connects_late
from meshwright.parallel.errors import MeshError
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.parallel.schedules_matrix import DEEP
from tests.parallel.strict import start_strict

pytestmark = pytest.mark.slow


def _largest_error(store: str, mesh: mw.Mesh, options: dict[str, Any], one_queue: bool = False) -> float:
    """Of loss and gradients of a second step over the strict transport, on one rank."""
    rank = world().rank
    stop_ranks()
    start_strict(store, rank, mesh.world_size, one_queue=one_queue)
    assert connects_late("cpu")
    build_model, build_batch = DEEP["gpt2"]
    plain, batch = build_model().double().eval(), build_batch()  # without dropout
    model = mw.parallelize(build_model().double().eval(), mesh, **options)
    share = {name: each.chunk(mesh.data_degree)[model.data_rank] for name, each in batch.items()}
    with Promote():
        wanted = plain(**batch).loss
        wanted.backward()
        model.step(share)
        errors = [float((model.step(share) - wanted).abs())]
    if mesh.fsdp == 1:  # torch gathers shards below Python, where this transport is not seen
        found = model.full_gradients()
        pairs = ((found[name], each.grad) for name, each in plain.named_parameters())
        errors += [float((one - other).abs().max()) for one, other in pairs if one is not None and other is not None]
    dist.barrier()
    return max(errors)


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"pp": 2}, {"schedule": "1f1b", "num_microbatches": 4}),
        ({"pp": 2}, {"schedule": "modular", "num_microbatches": 4}),
        ({"pp": 2}, {"schedule": "gpipe", "num_microbatches": 2}),
        ({"pp": 2}, {"schedule": "zbv", "num_microbatches": 4}),
        ({"pp": 2, "dp": 2}, {"schedule": "interleaved", "num_microbatches": 2}),
        ({"pp": 2, "fsdp": 2}, {"schedule": "modular", "num_microbatches": 2, "zero_stage": 3}),
    ],
    ids=str,
)
def test_pipelines_hang_on_no_transport_that_connects_late_and_knows_no_tags(
    tmp_path: Path, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    mesh = mw.Mesh(**degrees)
    errors = run_ranks(_largest_error, mesh, f"file://{tmp_path / 'store'}", mesh, options, timeout_s=90.0)
    assert max(errors) < 1e-10


@pytest.mark.parametrize(
    ("degrees", "options"),
    [
        ({"pp": 2}, {"schedule": "1f1b", "num_microbatches": 4}),
        ({"pp": 2, "tp": 2}, {"schedule": "interleaved", "num_microbatches": 2}),
        ({"pp": 2, "fsdp": 2}, {"schedule": "modular", "num_microbatches": 4, "zero_stage": 3}),
        ({"pp": 4}, {"schedule": "modular", "num_microbatches": 6}),
        ({"pp": 4}, {"schedule": "zbv", "num_microbatches": 5}),
    ],
    ids=str,
)
def test_pipelines_hang_on_no_gpu_whose_streams_share_one_queue(
    tmp_path: Path, degrees: dict[str, int], options: dict[str, Any]
) -> None:
    mesh, store = mw.Mesh(**degrees), f"file://{tmp_path / 'store'}"
    errors = run_ranks(_largest_error, mesh, store, mesh, options, True, timeout_s=90.0)
    assert max(errors) < 1e-10


def test_gloo_connects_ranks_when_a_group_is_made() -> None:
    assert run_ranks(connects_late, mw.Mesh(dp=2), "cpu") == [False, False]


def _refusals() -> list[str]:
    found = []
    for degrees, device in (({"pp": 2}, "cuda"), ({"fsdp": 2}, "cuda"), ({"dp": 2}, "cuda"), ({"pp": 2}, "cpu")):
        try:
            check_transport(mw.Mesh(**degrees), device)
        except MeshError as error:
            found.append(str(error))
    return found


def test_messages_and_shards_on_gpus_are_refused_over_gloo_where_they_would_crash() -> None:
    for refusals in run_ranks(_refusals, mw.Mesh(dp=2)):
        assert [each.split(", which ")[1].split(";")[0] for each in refusals] == ["pp need", "fsdp need"]
