"""Saving and resuming: torch's distributed checkpoint inside a directory that is whole or absent.

Tensors are stored under layout-independent names, so that another data mesh can read them. Beside them lie the random
states of every rank, the position in the data, and the curve so far.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from errno import ENOSPC
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from meshwright.launch.worker.errors import CheckpointError
from meshwright.launch.worker.leave import Leave
from meshwright.launch.worker.rng import capture_random_states, restore_random_states
from meshwright.launch.worker.snapshots import (
    Snapshot,
    damaged_file,
    describe_files,
    find_newest,
    partial_path,
    prune,
    read_snapshot,
    seal,
    sweep,
    write_durably,
)

__all__ = ["Checkpoints", "Stateful"]

_CURVE = "curve.jsonl"


class Stateful(Protocol):
    """What can be saved: a `ParallelModel`."""

    def state_dict(self, *, loading: bool = False) -> dict[str, Any]:
        """States under layout-independent names."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """The checkpoints of one job, as one rank sees them.

    Args:
        directory: holds one directory per checkpoint; storage that all ranks share.
        keep: how many of the newest ones stay.
        rank: this rank.
        world_size: number of ranks.
        agree: gathers one integer per rank, in rank order; also a barrier.
        say: where messages for people go.
        leave: whether the nodes will be taken away, so that it is time to save.
    """

    directory: Path
    keep: int
    rank: int
    world_size: int
    agree: Callable[[int], list[int]]
    say: Callable[[str], None]
    leave: Leave = field(default_factory=Leave)

    def save(self, model: Stateful, step: int, facts: Mapping[str, Any], curve: list[dict[str, Any]]) -> Path:
        """Writes the checkpoint of a step on all ranks; on return of rank 0 it is whole on the disk.

        Args:
            model: what is saved.
            step: optimizer steps done.
            facts: JSON values that go into the manifest.
            curve: metrics records so far.

        Raises:
            CheckpointError: when it cannot be written; earlier checkpoints stay as they are.
        """
        partial = partial_path(self.directory, step)
        state = model.state_dict()
        self._all_well(self._attempt(lambda: self._make_room(partial, _whole_bytes(state))), partial)
        self._all_well(self._attempt(lambda: self._write(partial, state, curve)), partial)
        if self.rank == 0:
            failure = self._attempt(lambda: self._seal(partial, step, facts))
            if failure is not None:
                raise self._failed(partial, failure)
        return self.directory / f"step-{step:08d}"

    def find(self, resume: str) -> Snapshot | None:
        """The checkpoint to go on from; all ranks call it and get the same.

        Args:
            resume: "auto" (the newest whole one, if any), "never", or the path of one.

        Raises:
            CheckpointError: when the named one is not whole, or ranks see different storage.
        """
        if self.rank == 0:
            sweep(self.directory)
        if resume == "never":
            return None
        candidates = find_newest(self.directory, self.say) if resume == "auto" else [self._named(Path(resume))]
        self._same_everywhere(candidates)
        for candidate in candidates:
            if self._intact(candidate):
                return candidate
            if resume != "auto":
                raise CheckpointError(f"checkpoint.resume: {candidate.path} is damaged; name another one")
        return None

    def load(self, model: Stateful, snapshot: Snapshot) -> list[dict[str, Any]]:
        """Fills the model, its optimizer and the random states from a checkpoint; returns the curve so far.

        Raises:
            CheckpointError: when it does not fit the model.
        """
        state = model.state_dict(loading=True)
        try:
            with _quiet():
                state_dict_loader.load(state, checkpoint_id=snapshot.path)
        except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {snapshot.path} does not fit this job's model: {error}; "
                "set checkpoint.resume=never to start anew, or restore the model it was written by"
            ) from error
        model.load_state_dict(state)
        mine = snapshot.path / _rank_file(self.rank)
        if mine.exists() and snapshot.manifest.get("world_size") == self.world_size:
            restore_random_states(json.loads(mine.read_text())["random"])
        return [json.loads(line) for line in (snapshot.path / _CURVE).read_text().splitlines()]

    def _make_room(self, partial: Path, needed_bytes: int) -> None:
        if self.rank != 0:
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(self.directory).free
        if free < needed_bytes:
            raise OSError(ENOSPC, f"it needs about {needed_bytes:,} bytes")

    def _write(self, partial: Path, state: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        with _quiet():
            state_dict_saver.save(state, storage_writer=FileSystemWriter(partial, sync_files=True))
        mine = describe_files(partial, (path.name for path in partial.glob(f"__{self.rank}_*")))
        record = {"files": mine, "random": capture_random_states()}
        write_durably(partial / _rank_file(self.rank), json.dumps(record))
        if self.rank == 0:
            write_durably(partial / _CURVE, "".join(json.dumps(each) + "\n" for each in curve))

    def _seal(self, partial: Path, step: int, facts: Mapping[str, Any]) -> None:
        ranks = [_rank_file(rank) for rank in range(self.world_size)]
        files = describe_files(partial, [".metadata", _CURVE, *ranks])
        for name in ranks:
            files.update(json.loads((partial / name).read_text())["files"])
        seal(partial, step, {**facts, "world_size": self.world_size, "files": files})
        prune(self.directory, self.keep)

    def _named(self, path: Path) -> Snapshot:
        found = read_snapshot(path)
        if isinstance(found, str):
            raise CheckpointError(f"checkpoint.resume: {path} is not a whole checkpoint: {found}")
        return found

    def _intact(self, snapshot: Snapshot) -> bool:
        """Checks contents, each rank a part of the files, and agrees on the outcome; every rank knows a bad file."""
        names = sorted(snapshot.manifest["files"])
        bad = damaged_file(snapshot, names[self.rank :: self.world_size])
        found = [names[each - 1] for each in self.agree(0 if bad is None else 1 + names.index(bad)) if each]
        if found:
            self.say(f"checkpoint {snapshot.path} is skipped: the content of {found[0]} is not what was written")
        return not found

    def _same_everywhere(self, candidates: list[Snapshot]) -> None:
        newest = self.agree(candidates[0].step if candidates else -1)
        counts = self.agree(len(candidates))
        if len(set(newest)) > 1 or len(set(counts)) > 1:
            raise CheckpointError(
                f"checkpoint.dir: ranks find different checkpoints in {self.directory} (newest by rank: {newest}); "
                "put checkpoint.dir on storage that all nodes share"
            )

    def _attempt(self, action: Callable[[], None]) -> str | None:
        try:
            action()
        except (OSError, CheckpointException, RuntimeError) as error:
            return f"{type(error).__name__}: {error}".strip()
        return None

    def _all_well(self, failure: str | None, partial: Path) -> None:
        """Ends the save on every rank when it failed on one."""
        failed = [rank for rank, bad in enumerate(self.agree(int(failure is not None))) if bad]
        if failed:
            raise self._failed(partial, failure or f"rank {failed[0]} could not write its part")

    def _failed(self, partial: Path, failure: str) -> CheckpointError:
        free = (
            f"{shutil.disk_usage(self.directory).free:,} bytes are free" if self.directory.exists() else "no directory"
        )
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return CheckpointError(
            f"the checkpoint {partial.name} could not be written in {self.directory} ({free}): {failure}; "
            "earlier checkpoints are untouched; free some space or set checkpoint.dir to a larger disk, "
            "and launch again to go on from the newest one"
        )


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _whole_bytes(value: Any) -> int:
    """Bytes of all tensors, sharded ones counted whole."""
    if isinstance(value, Mapping):
        return sum(_whole_bytes(each) for each in value.values())
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


class _quiet(warnings.catch_warnings):  # noqa: N801
    """Silences notes of torch's checkpoint code that users can do nothing about."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")
