"""What a job on paper sends along `cp` and at the end of a step is what the ledger counts, whatever the kind."""

from collections import Counter
from pathlib import Path

import pytest

import meshwright as mw

JOB = """
name: positions
model:
  architecture: llama
  config: {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 3, num_attention_heads: 8, {keys}}}
data: {{files: python-stdlib, sequence_length: 64}}
parallel: {parallel}
train: {{steps: 1, batch_size: 4}}
cluster: {{type: local}}
"""


def _sent(parallel: str, folder: Path, *, kv: int = 4) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Bytes by axis and kind on paper, of all passes and the end of a step; and those of the ledger."""
    path = folder / "job.yaml"
    path.write_text(JOB.format(parallel=parallel, keys=f"num_key_value_heads: {kv}"))
    found = mw.simulate(path, gpu="H100")
    assert found.forecast is not None, found.notes
    assert found.collectives is not None, found.notes
    paper = found.forecast.paper
    every = [paper.traced.before, *paper.traced.blocks.values(), paper.traced.after]
    count = paper.schedule.num_microbatches
    passes = [one for each in every for one in (*each.forward.sent, *each.backward.sent)] * count
    told: Counter[tuple[str, str]] = Counter()
    for each in (*passes, *paper.closing):
        ranks = each.consecutive or paper.machine.mesh.degree(each.axis)
        own = 1 / ranks if each.kind == "all_to_all" else 0.0
        kind = "all_to_all" if each.kind == "hop" else each.kind
        told[each.axis, kind] += round(each.size_bytes * (1 - own))
    known = Counter(
        {
            (str(each["axis"]), str(each["kind"])): int(str(each["payload_bytes"]))
            for each in found.collectives
            if each["axis"] in ("tp", "cp")
        }
    )
    return told, known


@pytest.mark.parametrize("kind", ["ring", "ulysses", "gather", "auto"])
def test_each_kind_of_attention_sends_what_the_runtime_does(kind: str, tmp_path: Path) -> None:
    told, known = _sent(f"{{cp: 2, cp_kind: {kind}, num_microbatches: 2}}", tmp_path)
    assert told == known


def test_groups_of_a_hybrid_exchange_among_themselves(tmp_path: Path) -> None:
    told, known = _sent("{cp: 4, cp_kind: hybrid}", tmp_path)
    assert told["cp", "all_to_all"] == known["cp", "all_to_all"]


def test_gradients_that_ranks_of_tp_share_are_summed_once(tmp_path: Path) -> None:
    told, known = _sent("{tp: 4, sequence_parallel: true, num_microbatches: 2}", tmp_path, kv=2)
    assert told["tp", "all_reduce"] == known["tp", "all_reduce"] > 0
