"""Loss-free balancing: exact signs, a bias that stays wide, counts once for each micro-batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.moe.errors import BalanceError
from meshwright.moe.loss_free import LoadBias, next_bias
from meshwright.moe.routing import Routing
from meshwright.moe.top_k import TopK
from meshwright.parallel.recompute import Frame
from tests.moe.golden import flat_logits


def test_the_golden_step() -> None:
    counts = TopK(num_experts=4, k=2).route(flat_logits()).counts().sum(0)
    for centred in (False, True):
        found = next_bias(torch.zeros(4), counts, rate=1e-3, centred=centred)
        assert torch.equal(found, torch.tensor([0.0, -1e-3, 0.0, 1e-3]))


@given(some.lists(some.integers(0, 2**40), min_size=1, max_size=8), some.booleans())
def test_the_sign_is_exact(counts: list[int], centred: bool) -> None:
    signs = [(sum(counts) > each * len(counts)) - (sum(counts) < each * len(counts)) for each in counts]
    step = torch.tensor(signs, dtype=torch.float64) * 0.5
    step = step - step.mean() if centred else step
    found = next_bias(torch.ones(len(counts), dtype=torch.float64), torch.tensor(counts), rate=0.5, centred=centred)
    torch.testing.assert_close(found, 1.0 + step, rtol=1e-15, atol=0)


def test_counts_that_narrow_floats_confuse_keep_their_sign() -> None:
    counts = torch.tensor([40840, 40841, 40839])
    assert counts.bfloat16().unique().numel() == 1
    assert next_bias(torch.zeros(3), counts, rate=1.0).tolist() == [0.0, -1.0, 1.0]
    large = torch.tensor([2**30, 2**30 + 1])
    assert next_bias(torch.zeros(2), large, rate=1.0).tolist() == [1.0, -1.0]


def routed(logits: Tensor, load: LoadBias) -> Routing:
    routing = TopK(num_experts=4, k=2, score="sigmoid").route(logits, bias=load.bias)
    load.count(routing)
    return routing


@pytest.mark.parametrize("cuts", [[8], [4, 4], [1, 7], [3, 0, 5]])
def test_the_bias_does_not_depend_on_how_the_batch_is_cut(cuts: list[int]) -> None:
    load = LoadBias(4)
    expected = torch.zeros(4)
    for step in range(3):
        logits = flat_logits(4) * (step + 1)
        counts = TopK(num_experts=4, k=2, score="sigmoid").route(logits, bias=expected).counts().sum(0)
        for part in logits.split(cuts):
            routed(part, load)
        load.step()
        expected = next_bias(expected, counts)
        assert torch.equal(load.bias, expected)


def test_ranks_that_share_a_batch_step_alike() -> None:
    ranks = [LoadBias(4), LoadBias(4)]
    for load, part in zip(ranks, flat_logits().split([5, 3]), strict=True):
        routed(part, load)
    total = ranks[0].counts + ranks[1].counts
    for load in ranks:
        load.step(lambda _: total)
    alone = LoadBias(4)
    routed(flat_logits(), alone)
    alone.step()
    assert torch.equal(ranks[0].bias, alone.bias)
    assert torch.equal(ranks[1].bias, alone.bias)
    assert alone.counts.tolist() == [0] * 4


def test_evaluation_leaves_counts_as_they_were() -> None:
    load = LoadBias(4).eval()
    routed(flat_logits(), load)
    assert load.counts.tolist() == [0] * 4


def test_a_block_that_the_engine_runs_again_counts_once() -> None:
    load = LoadBias(4)
    logits = flat_logits().requires_grad_()
    leaves = {id(logits): logits.detach().requires_grad_()}
    frame = Frame(
        "block", lambda each: routed(each, load).weights, ((logits,), {}), leaves=leaves, buffers=list(load.buffers())
    )
    weights = frame.run()
    frame.recompute()
    weights.sum().backward()
    assert load.counts.sum() == 16
    routed(flat_logits(), load)
    assert load.counts.sum() == 32


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_forward_that_is_uncounted_counts_once(reentrant: bool) -> None:
    load = LoadBias(4)
    logits = flat_logits().requires_grad_()
    weights = checkpoint(lambda each: routed(each, load).weights, logits, use_reentrant=reentrant)
    weights.sum().backward()
    assert load.counts.sum() == 16


def test_the_bias_stays_wide_and_is_saved_alone() -> None:
    load = LoadBias(4)
    load.bias += 0.1234567
    model = nn.Sequential(nn.Linear(2, 2), load).bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert load.bias.dtype == torch.float32
    assert torch.equal(load.bias, torch.full((4,), 0.1234567))
    assert list(load.state_dict()) == ["bias"]
    assert load.double().bias.dtype == torch.float64
    assert load.half().bias.dtype == torch.float64


def test_what_would_balance_wrongly_is_refused() -> None:
    with pytest.raises(BalanceError, match=r"a bias in torch\.bfloat16 loses steps of 0\.001 to rounding"):
        next_bias(torch.zeros(4).bfloat16(), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(BalanceError, match=r"counts are torch\.float32 \[4\]; for a bias \[4\] they are int64"):
        next_bias(torch.zeros(4), torch.zeros(4))
    with pytest.raises(BalanceError, match=r"counts are torch\.int64 \[3\]"):
        next_bias(torch.zeros(4), torch.zeros(3, dtype=torch.int64))
