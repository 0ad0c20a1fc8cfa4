"""A sequence of 96,000 tokens trains in memory in which the untouched model ends: 32 trajectories of 1,000 steps."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

import meshwright as mw
from tests.house.tree import ROOT
from tests.parallel.spans.trajectories import STEPS, TRAJECTORIES, Decider, batch

_MEGABYTES = 400


def _trained(way: str, steps: int) -> dict[str, Any]:
    """Losses of two steps of training in a process of its own, or the error that ended it."""
    command = [sys.executable, "-m", "tests.parallel.spans.trajectories", way, str(steps), str(_MEGABYTES)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.slow
@pytest.mark.wide
def test_32_trajectories_train_where_the_untouched_model_is_out_of_memory() -> None:
    plain = _trained("vanilla", TRAJECTORIES * STEPS)
    assert "can't allocate memory" in plain["error"]
    ours = _trained("ours", TRAJECTORIES * STEPS)
    assert ours["error"] is None
    assert ours["losses"][1] < 0.9 * ours["losses"][0]


def test_a_trajectory_by_spans_is_the_plain_run() -> None:
    torch.manual_seed(0)
    model, given = Decider(), batch(100)
    wanted = model(**given).item()
    blockwise = {"query_block": 64, "kv_block": 64, "layer_block": 70}
    wrapped = mw.parallelize(model, mw.Mesh(), loss="sample_mean", blockwise=blockwise, example=batch(8))
    assert float(wrapped.step(given)) == pytest.approx(wanted, rel=1e-5)
