"""Experts on shapes: each rank runs its own, and sends what ranks send."""

from collections import Counter
from typing import Any

import pytest
import torch

import meshwright as mw
from benchmarks.fake_ranks import JOBS, Job
from benchmarks.mixtures import build_mixture
from meshwright.moe.on_paper import deal_on_shapes
from meshwright.parallel.fake_rank import fake_rank
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans
from meshwright.parallel.tracing import Tracer, trace
from meshwright.parallel.work import Work
from tests.parallel.families import FAMILIES, lm, words


def _forward(ep: int, **more: int) -> Work:
    build = lm("mixtral", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **more)
    prepare = lambda model, tracer: deal_on_shapes(model, tracer, Mesh(dp=ep, ep=ep)) and None  # noqa: E731
    found = trace(build(), Options(example=words(8, 12)), precision=torch.bfloat16, prepare=prepare)
    return found.blocks["model.layers.1"].forward


def test_every_token_is_computed_by_as_many_experts_as_it_has() -> None:
    rows, width, inner = 8 * 12 * 2, 32, 64
    grouped = [each for each in _forward(1).products if each.batch == 4]
    assert sum(each.flops for each in grouped) == 2 * rows * width * 3 * inner


@pytest.mark.parametrize("ep", [2, 4])
def test_a_rank_sends_its_rows_to_experts_and_back_and_computes_as_many(ep: int) -> None:
    alone, among = _forward(1), _forward(ep)
    assert among.flops == alone.flops
    assert max(each.batch for each in among.products) == 4 // ep
    assert [each.kind for each in among.sent] == ["all_gather", "all_to_all", "all_to_all"]
    assert not alone.sent


_TENSOR = Job({"dp": 2, "tp": 2, "ep": 4}, {"moe": mw.Experts()}, build_mixture)
_SLOW = ("ep of modules", "ep of slices x fsdp", "ep, tokens once")


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(_TENSOR, id="ep x tp"),
        *(
            pytest.param(JOBS[name], id=name, marks=[pytest.mark.slow] * (name in _SLOW))
            for name in ("ep bi-level, capacity", *_SLOW)
        ),
    ],
)
def test_what_is_traced_is_sent_by_a_rank_in_one_micro_batch(job: Job) -> None:
    model, options = job.build(), Options.of(**job.wrap)
    plans = make_plans(model, job.mesh, options)
    rank = fake_rank(model, job.mesh, 0, batch=job.batch(0), plans=plans, **job.wrap)

    def prepare(mine: Any, tracer: Tracer) -> None:
        deal_on_shapes(mine, tracer, job.mesh, experts=job.options["moe"])

    traced = trace(model, options, plan=plans.tensor, prepare=prepare)
    works = (work for each in (*traced.blocks.values(), traced.before, traced.after) for work in vars(each).values())
    sent = Counter(
        (each.axis, each.kind, each.size_bytes) for work in works if isinstance(work, Work) for each in work.sent
    )
    assert any(axis.startswith("ep") for axis, _, _ in sent)
    assert sent == Counter(
        (call.axis, call.kind, call.payload_bytes) for call in rank.calls if call.axis == "tp" or "ep" in call.axis
    )


def test_a_model_without_experts_is_left_alone() -> None:
    assert not deal_on_shapes(FAMILIES["gpt2"][0](), Tracer.__new__(Tracer), Mesh())
