"""Dense models as mixtures: the same function at first, and experts that can be dealt."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.moe.errors import SwapError
from meshwright.moe.swap import deal_experts
from meshwright.moe.upcycle import Upcycling, upcycle
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.promote import Promote
from tests.moe.threads import on_threads
from tests.parallel.models import llama

HOWS = [
    Upcycling(num_experts=4, k=1),
    Upcycling(num_experts=4, k=2),
    Upcycling(num_experts=8, k=2, granularity=2),
    Upcycling(num_experts=8, k=8, granularity=4, gate_std=1.0),
]


def dense(**overrides: Any) -> nn.Module:
    return llama(intermediate_size=24, **overrides)().double()


def scores(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(1))
    with Promote():
        found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("how", HOWS, ids=lambda how: f"{how.num_experts}-{how.k}-{how.granularity}")
@pytest.mark.parametrize("biased", [False, True])
def test_the_function_is_kept_at_first(how: Upcycling, biased: bool) -> None:
    model = dense(mlp_bias=biased)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("bias"):
                each.normal_(generator=torch.Generator().manual_seed(len(name)))
    before = scores(model)
    assert upcycle(model, how) == [f"model.layers.{layer}.mlp" for layer in range(3)]
    torch.testing.assert_close(scores(model), before, rtol=1e-12, atol=1e-13)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    sizes = sum(each.numel() for name, each in experts.named_parameters() if "bias" not in name)
    assert sizes == how.copies * 3 * 24 * 32


def test_some_networks_and_gates_of_their_own() -> None:
    model = dense()
    assert upcycle(model, HOWS[0], modules="*.[02].mlp") == ["model.layers.0.mlp", "model.layers.2.mlp"]
    gates = [model.get_submodule(f"model.layers.{layer}.mlp.gate").weight for layer in (0, 2)]
    assert not torch.equal(*gates)  # type: ignore[arg-type]
    assert hasattr(model.get_submodule("model.layers.1.mlp"), "gate_proj")


def test_upcycled_experts_are_dealt() -> None:
    models = []
    for _ in range(2):
        models.append(dense())
        upcycle(models[-1], HOWS[2])
    inputs = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = models[0].get_submodule("model.layers.0.mlp")(inputs).detach()

    def work(rank: int, axes: Any) -> Tensor:
        deal_experts(models[rank], axes, kind="once")
        made: Tensor = models[rank].get_submodule("model.layers.0.mlp")(inputs[2 * rank : 6 if rank else 2])
        return made.detach()

    found = torch.cat(on_threads(Mesh(dp=2, ep=2, ep_node=2), work))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert models[1].get_parameter("model.layers.0.mlp.experts.down_proj").shape == (4, 32, 12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SwapError, match=re.escape("8 experts of granularity 2, 3 for each token: tokens take whole")):
        Upcycling(num_experts=8, k=3, granularity=2)
    with pytest.raises(SwapError, match="both are multiples of the granularity; nearest: num_experts=8, k=4"):
        Upcycling(num_experts=7, k=4, granularity=4)
    with pytest.raises(SwapError, match=r"model\.layers\.0\.mlp of inner width 24 cannot be cut into 5"):
        upcycle(dense(), Upcycling(num_experts=5, k=5, granularity=5))
    with pytest.raises(SwapError, match=re.escape("fits '*.9.mlp'; it has up_proj, down_proj and act_fn; choose")):
        upcycle(dense(), HOWS[0], modules="*.9.mlp")
    with pytest.raises(SwapError, match="no feed-forward network of Linear fits"):
        upcycle(nn.Linear(2, 2), HOWS[0])
