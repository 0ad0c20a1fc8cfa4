"""Blocks by spans and inputs in the host's memory, predicted and run: the bytes that are on a rank's device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml

import meshwright as mw
from benchmarks import fake_ranks
from benchmarks.predicted import VOCABULARY
from benchmarks.predicted_jobs import Small
from meshwright.clusters.calibrate import written
from meshwright.launch.load import load_job
from meshwright.parallel.footprint import Live
from meshwright.parallel.recompute import Frame
from meshwright.testing import run_ranks
from tests.clusters.test_calibration import made, of

GPT2 = {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 256}
HOSTED = {"schedule": "layered", "num_microbatches": 4, "recompute": "blocks", "offload_inputs": True}
JOBS = {
    "spans": Small(parallel={"dp": 2, "blockwise": {"layer_block": 64}}),
    "spans that drop": Small(parallel={"dp": 2, "blockwise": {"layer_block": 64}}, architecture="gpt2", config=GPT2),
    "inputs": Small(parallel={"dp": 2, **HOSTED}),
    "inputs of a pipeline": Small(parallel={"pp": 2, **HOSTED, "schedule": "1f1b"}),
    "states": Small(parallel={"fsdp": 2, "offload": "cpu", "num_microbatches": 2}),
    "inputs of spans": Small(parallel={"dp": 2, **HOSTED, "blockwise": {"layer_block": 64}}),
}


class _OnDevice(Live):
    """Without what inputs are copied to."""

    is_away = False

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage, unless it is made for the host."""
        if not self.is_away:
            super().note(storage)


@contextmanager
def _apart(found: list[_OnDevice]) -> Iterator[None]:
    """Inside, copies that a frame makes for the host are not counted before they are back."""
    offload, fetch = Frame.offload, Frame.fetch

    def made(*given: Any) -> _OnDevice:
        found.append(_OnDevice(*given))
        return found[-1]

    def goes(frame: Frame) -> None:
        found[-1].is_away = True
        offload(frame)
        found[-1].is_away = False

    def comes(frame: Frame) -> None:
        leaves = [leaf for leaf, _ in frame._hosted]
        fetch(frame)
        for leaf in leaves:
            found[-1].note(leaf.untyped_storage())

    with (
        patch.object(Frame, "offload", goes),
        patch.object(Frame, "fetch", comes),
        patch.object(fake_ranks, "Live", made),
    ):
        yield


def _on_device(job: fake_ranks.Job) -> int:
    with _apart([]):
        return fake_ranks.real_rank(job)[1]


def _drawn_up(small: Small, folder: Path) -> tuple[Path, fake_ranks.Job]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(small.file(steps=1)))
    job = load_job(path).job
    return path, fake_ranks.Job(
        job.mesh.degrees(), job.options, small.build, samples=small.batch_size // job.mesh.data_degree,
        length=small.length, vocabulary=VOCABULARY,
    )  # fmt: skip


def _tensor_bytes(path: Path, kind: Path | str) -> float:
    found = mw.simulate(path, gpu=kind).forecast
    assert found is not None
    return found.memory.tensor_bytes - found.memory.optimizer


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_memory_on_paper_is_that_of_a_run_here(name: str, tmp_path: Path) -> None:
    path, job = _drawn_up(JOBS[name], tmp_path)
    entry = tmp_path / "machine.yaml"
    entry.write_text(written(of(made(1, 4), made(4, 1))), encoding="utf-8")
    most = max(peak_bytes for _, peak_bytes in fake_ranks.real_ranks(job))
    assert _tensor_bytes(path, entry) == pytest.approx(most, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inputs", "inputs of a pipeline", "inputs of spans"])
def test_what_stays_on_a_gpu_is_what_a_run_has_besides_its_copies_for_the_host(name: str, tmp_path: Path) -> None:
    path, job = _drawn_up(JOBS[name], tmp_path)
    apart = max(run_ranks(_on_device, job.mesh, job))
    together = max(peak_bytes for _, peak_bytes in fake_ranks.real_ranks(job))
    assert apart < 0.97 * together
    assert _tensor_bytes(path, "H100") == pytest.approx(apart, rel=0.05)
