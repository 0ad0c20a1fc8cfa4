"""What experts are asked for is counted once, exactly, however a batch is cut; biases move by it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.moe.balance import Total
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.counting import count_experts, move_biases, take_counts
from meshwright.moe.errors import BalanceError, SwapError
from meshwright.moe.expert_pass import Experts
from meshwright.moe.loss_free import next_bias
from meshwright.moe.metrics import RoutingCounts
from meshwright.moe.recognise import find_experts
from meshwright.moe.two_gates import replace_routers
from meshwright.parallel.collectives import sum_integers
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.moe.models import LENGTH, batch, build, run


def alone(integers: Tensor) -> Tensor:
    return integers


def counted(model: nn.Module, total: Total = alone) -> dict[str, RoutingCounts]:
    return take_counts(model, total)


def test_every_choice_of_every_layer_is_counted_once() -> None:
    with Promote():
        model = build("mixtral", output_router_logits=True)
        assert count_experts(model) == [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
        run(model, batch(3), 3)
        found = counted(model)
        logits = model(input_ids=batch(3)).router_logits
    for each, scores in zip(found.values(), logits, strict=True):
        assert torch.equal(each.asked, scores.topk(2).indices.flatten().bincount(minlength=8))
        assert int(each.num_tokens) == 3 * LENGTH
    assert int(sum(each.asked.sum() for each in counted(model).values())) == 2 * 2 * 3 * LENGTH


def test_evaluation_and_second_runs_are_not_counted() -> None:
    model = build("mixtral").float()
    count_experts(model)
    block = model.get_submodule("model.layers.0.mlp")
    tokens = torch.randn(1, 4, 16, requires_grad=True)
    for reentrant in (False, True):
        checkpoint(block, tokens, use_reentrant=reentrant).sum().backward()
        assert [int(each.asked.sum()) for each in counted(model).values()] == [8, 0]
    model.eval()(input_ids=batch(1))
    assert not any(int(each.asked.sum()) for each in counted(model).values())


def test_of_ranks_with_the_same_tokens_one_counts() -> None:
    model = build("mixtral")
    count_experts(model)
    with Promote():
        run(model, batch(1), 1)
    assert not any(int(each.asked.sum()) for each in take_counts(model, alone, mine=False).values())
    assert not any(int(each.asked.sum()) for each in counted(model).values())


def test_what_two_gates_choose_is_counted() -> None:
    model = build("switch_transformers")
    replace_routers(model, BiLevel(num_nodes=4, num_local=2, k_nodes=2))
    count_experts(model)
    with Promote():
        run(model, batch(3), 3)
    assert {int(each.asked.sum()) for each in counted(model).values()} == {2 * 3 * LENGTH}


def test_a_bias_moves_towards_experts_that_were_asked_for_less() -> None:
    model = build("deepseek_v3")
    count_experts(model, balanced=True)
    with Promote():
        run(model, batch(3), 3)
    (found,) = (counts := counted(copy.deepcopy(model))).values()
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    expected = next_bias(bias, found.asked, rate=0.25)
    move_biases(model, counts, rate=0.25)
    assert torch.equal(bias, expected)
    assert bias.unique().numel() > 1


def test_models_with_nothing_to_move_are_refused() -> None:
    with pytest.raises(BalanceError, match=r"no bias moves what experts model\.layers\.0\.mlp\.experts are chosen by"):
        count_experts(build("mixtral"), balanced=True)
    narrow = build("deepseek_v3")
    narrow.get_submodule("model.layers.1.mlp.gate").e_score_correction_bias = torch.zeros(8, dtype=torch.bfloat16)
    with pytest.raises(BalanceError, match="keep it in float32"):
        count_experts(narrow, balanced=True)
    twice = build("deepseek_v3")
    twice.get_submodule("model.layers.1.mlp").register_buffer("other", torch.zeros(8))
    with pytest.raises(SwapError, match="could each be the bias"):
        count_experts(twice)
    with pytest.raises(SwapError, match="is recognised as experts"):
        count_experts(nn.Linear(2, 2))


def _trained(mesh: mw.Mesh, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    model = build("deepseek_v3")
    (experts,) = find_experts(model)
    count_experts(model, balanced=True)
    ids = batch(12)
    wrapped = mw.parallelize(model, mesh, **options)
    optimizer = wrapped.make_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    losses, biases = [], []
    own = ids.chunk(mesh.data_degree)[wrapped.data_rank]
    for _ in range(4):
        with Promote():
            losses.append(wrapped.step({"input_ids": own, "labels": own}).detach())
        optimizer.step()
        mine = mesh.coordinates(wrapped.rank)["tp"] == 0
        move_biases(wrapped.module, take_counts(wrapped.module, sum_integers, mine=mine), rate=0.05)
        bias = getattr(wrapped.module.get_submodule(f"{experts.path[:-8]}.gate"), "e_score_correction_bias", None)
        biases += [] if bias is None else [bias.clone()]
    return losses, biases


@pytest.mark.slow
def test_biases_are_the_same_however_a_batch_is_cut() -> None:
    [(losses, biases)] = run_ranks(_trained, mw.Mesh(), mw.Mesh(), {})
    assert len({tuple(each.tolist()) for each in biases}) > 2
    cuts: list[tuple[mw.Mesh, dict[str, Any]]] = [
        (mw.Mesh(fsdp=2), {"num_microbatches": 3, "schedule": "layered", "recompute": "blocks"}),
        (mw.Mesh(dp=2, ep=2), {"num_microbatches": 2, "moe": Experts()}),
        (mw.Mesh(fsdp=2, tp=2, ep=4), {"num_microbatches": 3, "moe": Experts()}),
        (mw.Mesh(pp=2), {"num_microbatches": 2, "schedule": "1f1b"}),
    ]
    for mesh, options in cuts:
        every = run_ranks(_trained, mesh, mesh, options)
        assert [len(moved) for _, moved in every] in ([4] * mesh.world_size, [0, 4])  # a stage has its own
        for found, moved in every:
            assert all(torch.equal(one, other) for one, other in zip(moved, biases, strict=bool(moved))), mesh
            torch.testing.assert_close(torch.stack(found), torch.stack(losses), rtol=1e-10, atol=1e-12)
