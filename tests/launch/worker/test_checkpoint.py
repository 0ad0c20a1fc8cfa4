"""Saving and loading on one rank: what fails leaves earlier checkpoints as they were."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import meshwright as mw
from meshwright.launch.worker import checkpoint
from meshwright.launch.worker.checkpoint import Checkpoints
from meshwright.launch.worker.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def _made(width: int = 4) -> tuple[mw.ParallelModel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = mw.parallelize(torch.nn.Linear(width, 1), mw.Mesh(), loss="sample_mean", loss_fn=lambda out, _: out.mean())
    return model, model.make_optimizer(lambda each: torch.optim.AdamW(each, lr=0.1))


def _checkpoints(folder: Path, said: list[str] | None = None) -> Checkpoints:
    said = [] if said is None else said
    return Checkpoints(directory=folder, keep=2, rank=0, world_size=1, agree=lambda value: [value], say=said.append)


def _train(model: mw.ParallelModel, optimizer: torch.optim.Optimizer) -> None:
    model.step(torch.ones(2, 4))
    optimizer.step()


def test_a_loaded_model_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    model, optimizer = _made()
    _train(model, optimizer)
    _checkpoints(tmp_path).save(model, 1, {"name": "x"}, [{"step": 1, "loss": 2.0}])
    other, other_optimizer = _made()
    found = _checkpoints(tmp_path).find("auto")
    assert found is not None
    assert _checkpoints(tmp_path).load(other, found) == [{"step": 1, "loss": 2.0}]
    for each in ((model, optimizer), (other, other_optimizer)):
        _train(*each)
    assert torch.equal(model.full_parameters()["weight"], other.full_parameters()["weight"])


def test_a_full_disk_says_so_and_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = _made()
    _train(model, optimizer)
    _checkpoints(tmp_path).save(model, 1, {}, [])

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.state_dict_saver, "save", full)
    with pytest.raises(CheckpointError, match=r"(?s)No space left on device.*earlier checkpoints are untouched"):
        _checkpoints(tmp_path).save(model, 2, {}, [])
    found = _checkpoints(tmp_path).find("auto")
    assert found is not None
    assert found.step == 1
    assert not list(tmp_path.glob(".step-*"))


def test_a_damaged_checkpoint_is_skipped_with_a_word(tmp_path: Path) -> None:
    model, optimizer = _made()
    for step in (1, 2):
        _train(model, optimizer)
        path = _checkpoints(tmp_path).save(model, step, {}, [])
    data = next(path.glob("__0_*"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    said: list[str] = []
    found = _checkpoints(tmp_path, said).find("auto")
    assert found is not None
    assert found.step == 1
    assert "is skipped: the content of" in said[0]
    with pytest.raises(CheckpointError, match="is damaged; name another one"):
        _checkpoints(tmp_path).find(str(path))
    assert _checkpoints(tmp_path).find("never") is None


def test_a_file_that_another_rank_finds_damaged_is_named_by_the_first_one_too(tmp_path: Path) -> None:
    model, optimizer = _made()
    _train(model, optimizer)
    _checkpoints(tmp_path).save(model, 1, {}, [])
    said = list[str]()
    other = iter([1, 1, 2])  # the newest step, how many there are, and that the second file is bad
    found = replace(_checkpoints(tmp_path, said), agree=lambda value: [value, next(other)])
    assert found.find("auto") is None
    (words,) = said
    assert words.startswith(f"checkpoint {tmp_path / 'step-00000001'} is skipped: the content of ")
    assert words.endswith(".distcp is not what was written"), "of .metadata, then what a rank wrote"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    _checkpoints(tmp_path).save(_made()[0], 1, {}, [])
    found = _checkpoints(tmp_path).find("auto")
    assert found is not None
    with pytest.raises(CheckpointError, match="does not fit this job's model"):
        _checkpoints(tmp_path).load(_made(width=7)[0], found)


def test_room_is_asked_for_one_copy_however_many_ranks_hold_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    eight = replace(_checkpoints(tmp_path), world_size=8, agree=lambda value: [value] * 8)
    eight._make_room(tmp_path / "new", checkpoint._whole_bytes({"model": {"w": torch.zeros(25)}}))
    with pytest.raises(OSError, match="it needs about 104 bytes"):
        eight._make_room(tmp_path / "new", checkpoint._whole_bytes({"model": {"w": torch.zeros(26)}}))


def test_a_rank_that_sees_no_checkpoint_stops_the_resume(tmp_path: Path) -> None:
    _checkpoints(tmp_path).save(_made()[0], 1, {}, [])
    answers = iter([[1, -1], [1, 0]])
    split = replace(_checkpoints(tmp_path), world_size=2, agree=lambda value: next(answers))
    with pytest.raises(CheckpointError, match=r"newest by rank: \[1, -1\].*storage that all nodes share"):
        split.find("auto")
