"""The collectives a report predicts along `cp` are the ones a step runs, for every kind and family."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

import meshwright as mw
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.chosen import ContextWay
from meshwright.parallel.context.kinds import Ring, Ulysses
from meshwright.parallel.context.plan import Attends, ContextPlan, Scored, Seen
from meshwright.parallel.context.predicted import microbatch_calls, reason_unknown
from meshwright.testing import run_ranks
from tests.parallel.cells import tiered
from tests.parallel.families import FAMILIES

KINDS = ("ring", "ulysses", "hybrid", "gather")


def _calls(family: str, mesh: mw.Mesh, options: dict[str, Any]) -> tuple[str, str]:
    build_model, build_batch = FAMILIES[family]
    batch = build_batch()
    example = {key: each[:3] for key, each in batch.items()} if isinstance(batch, dict) else tuple(x[:3] for x in batch)
    options = {"num_microbatches": 3, **options}
    model = mw.parallelize(build_model(), mesh, example=example, **options)
    model.step(batch)
    _, counted = model.ledger_step(batch)
    return str(model.report.collectives), str(counted)


_DEALT = [name for name in FAMILIES if name not in ("residual_net", "mixer")]
_LOSS = {"blockwise": {"loss_block": 5}}
_CASES = [
    *((family, {"cp": 4 if kind == "hybrid" else 2}, {"cp_kind": kind}) for family, kind in product(_DEALT, KINDS)),
    *((family, {"cp": 2}, _LOSS) for family in ("llama", "bert", "t5", "whisper", "gpt2")),
    ("llama", {"cp": 2, "fsdp": 2}, {"cp_kind": "ring", "schedule": "layered", **_LOSS}),
    ("gemma3", {"cp": 2, "tp": 2}, {"cp_kind": "ring", **_LOSS}),
    ("qwen3", {"cp": 2, "tp": 2}, {"cp_kind": "ulysses"}),
    ("t5", {"cp": 2, "dp": 2}, {}),
    ("gpt2", {"cp": 2, "fsdp": 2}, {}),
    ("llama", {"cp": 4}, {"cp_kind": "ring"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees", "options"), tiered(_CASES), ids=str)
def test_collectives_of_cp_are_predicted_for_every_family(family: str, degrees: Any, options: Any) -> None:
    mesh = mw.Mesh(**degrees)
    predicted, counted = run_ranks(_calls, mesh, family, mesh, options)[0]  # others may hold other shares
    assert counted == predicted


SEEN = Seen(batch=2, length=32, value_width=4)
RINGS, SWAPS = ContextWay(Ring(), "contiguous", ""), ContextWay(Ulysses(), "contiguous", "")


def _plan(seen: Seen) -> ContextPlan:
    return ContextPlan(degree=4, attends={"self_attn": Attends(True, 4, 4, 4, seen)})


def test_a_window_ends_the_ring_early_and_what_only_values_tell_does_not() -> None:
    def hops(**seen: Any) -> int:
        found = microbatch_calls(_plan(replace(SEEN, **seen)), RINGS, [], itemsize=4, tp=1)
        return sum(each.kind == "all_to_all" for each in found)

    assert hops() == hops(window=None) == hops(window=(None, 0)) == 3 + 3 + 4
    assert hops(window=(8, 0)) == 1 + 1 + 2
    assert hops(window=(8, 0), times=2) == 2 * 4
    assert hops(learned=False) == 3


def test_what_cannot_be_told_is_said() -> None:
    assert reason_unknown(_plan(SEEN), SWAPS, None) is None
    assert reason_unknown(_plan(replace(SEEN, biased=True)), RINGS, None) is None
    odd = reason_unknown(_plan(replace(SEEN, biased=True)), SWAPS, None)
    assert odd == "self_attn adds to the scores of each query what is exchanged with them"
    blocks = Blockwise.of({"loss_block": 3})
    assert "the example computes no loss" in str(reason_unknown(_plan(SEEN), RINGS, blocks))
    assert reason_unknown(replace(_plan(SEEN), losses=(Scored(3, 9, reduced=True),)), RINGS, blocks) is None
