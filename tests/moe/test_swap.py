"""Models whose experts are dealt over ranks: the loss and all gradients of the plain run."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meshwright.moe.errors import DispatchError, SwapError
from meshwright.moe.swap import deal_experts, plan_experts, read_routing
from meshwright.moe.transports import TransportKind
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.moe.models import FAMILIES, NUM_EXPERTS, batch, build, run
from tests.moe.threads import on_threads

SAMPLES = {2: (3, 2), 4: (2, 1, 1, 1)}
WAYS: dict[str, TransportKind] = {
    "mixtral": "one_hop",
    "qwen3_moe": "once",
    "olmoe": "all_gather",
    "deepseek_v3": "inter_first",
    "gpt_oss": "intra_first",
    "switch_transformers": "one_hop",
}

Stepped = tuple[Tensor, dict[str, Tensor], dict[str, "tuple[int, int] | None"], str]


def stepped(mesh: Mesh, families: tuple[str, ...]) -> list[Stepped]:
    """On a rank: a step of each family on its share of the samples."""
    from meshwright.moe.axes import expert_axes
    from meshwright.parallel.collectives import Groups

    groups = Groups(mesh)
    axes, shares = expert_axes(groups), SAMPLES[mesh.world_size]
    found: list[Stepped] = []
    for family in families:
        with Promote():
            model = build(family)
            dealt = deal_experts(model, axes, kind=WAYS[family])
            own = batch(sum(shares)).split(shares)[groups.rank]
            kept = {name: split.held[axes.ep.rank][0] for name, split in dealt.splits.items()}
            kept |= {name: None for name, homes in dealt.homes.items() if axes.ep.rank in homes}
            found.append((*run(model, own, sum(shares)), kept, dealt.summary))
    return found


def relative(found: Tensor, expected: Tensor, least: float) -> float:
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), least)


def check(parts: list[Stepped], family: str, mesh: Mesh) -> None:
    """Compares the parts of all ranks with one process: summed over ranks, those of experts over edp."""
    with Promote():
        model = build(family)
        loss, expected = run(model, batch(5), 5)
    assert float(sum(each[0] for each in parts)) == pytest.approx(float(loss), rel=1e-12)
    least = 1e-6 * max(float(each.abs().max()) for each in expected.values())
    names = set().union(*(part[1] for part in parts))
    assert names == set(expected)
    for name, whole in expected.items():
        holders = [part for part in parts if name in part[1]]
        kept = [part[2].get(name) for part in holders]  # of its first dim
        if kept[0] is None:  # a dense parameter, or one of a single expert
            copies = len(parts) // mesh.ep if name in holders[0][2] else len(parts)
            found = torch.stack([part[1][name] for part in holders]).sum(0)
        else:
            each = NUM_EXPERTS // mesh.ep
            copies = len(parts)
            assert kept == [(rank % mesh.ep * each, (rank % mesh.ep + 1) * each) for rank in range(len(parts))]
            found = torch.zeros_like(whole)
            for part, own in zip(holders, kept, strict=True):
                assert own is not None
                found[own[0] : own[1]] += part[1][name]
        assert len(holders) == copies, name
        assert relative(found, whole, least) <= 1e-10, name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(dp=2, ep=2), Mesh(dp=4, ep=4, ep_node=2), Mesh(dp=4, ep=2)])
def test_loss_and_gradients_are_the_plain_ones(mesh: Mesh) -> None:
    found = run_ranks(stepped, mesh, mesh, tuple(FAMILIES))
    for number, family in enumerate(FAMILIES):
        check([each[number] for each in found], family, mesh)
    assert re.fullmatch(r"8 experts of 2 modules over \d ranks, one_hop", found[0][0][3])


class Own(nn.Module):
    """Experts of nobody's library: a list, called with ids."""

    def __init__(self, number: int, *, p: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(3, number)
        self.chosen = OwnExperts(nn.Sequential(nn.Linear(3, 3), nn.Dropout(p)) for _ in range(number))

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = self.gate(tokens).softmax(-1).topk(2)
        found: Tensor = self.chosen(tokens, ids, weights=weights)
        return found


class OwnExperts(nn.ModuleList):
    @property
    def num_experts(self) -> int:
        return len(self)

    def forward(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = torch.stack([each(tokens) for each in self])  # [experts, tokens, d]
        chosen = rows[ids, torch.arange(len(tokens))[:, None]]
        return (chosen * weights[..., None]).sum(1)


def own(number: int = 4, **options: Any) -> Own:
    torch.manual_seed(0)
    return Own(number, **options).double()


def test_lists_of_modules_are_dealt_under_their_own_names() -> None:
    tokens = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    models = [own() for _ in range(2)]

    def work(rank: int, axes: Any) -> Tensor:
        deal_experts(models[rank], axes)
        made = models[rank](tokens[:2] if rank == 0 else tokens[2:])
        made.square().sum().backward()
        return made.detach()

    found = torch.cat(on_threads(Mesh(dp=2, ep=2), work))
    plain = own()
    expected = plain(tokens)
    expected.square().sum().backward()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-13, atol=1e-13)
    assert sorted({name[0] for name, _ in models[1].chosen.named_parameters()}) == ["2", "3"]
    for name, each in plain.chosen.named_parameters():
        holder = models[int(name[0]) // 2].chosen
        torch.testing.assert_close(holder.get_parameter(name).grad, each.grad, rtol=1e-12, atol=1e-13)
    gate = sum(model.gate.weight.grad for model in models)
    torch.testing.assert_close(gate, plain.gate.weight.grad, rtol=1e-12, atol=1e-13)


def test_dropout_of_experts_is_noted() -> None:
    notes = plan_experts(own(2, p=0.1), ranks=2).notes
    assert [note.partition(" of experts")[0] for note in notes] == [f"chosen.{e}.1: dropout masks" for e in (0, 1)]


def refused(model: nn.Module, mesh: Mesh, words: str, error: type[Exception] = SwapError) -> None:
    with pytest.raises(error, match=re.escape(words)):
        on_threads(mesh, lambda _, axes: deal_experts(model, axes))


def test_what_cannot_be_dealt_is_refused() -> None:
    refused(nn.Linear(2, 2), Mesh(), "no module of Linear is recognised as experts: one called with (tokens, choices,")
    odd = nn.ModuleDict({"my_experts": nn.ModuleList([nn.Linear(2, 2)])})
    refused(odd, Mesh(), "of one type; nearest: my_experts")
    refused(own(), Mesh(dp=3, ep=3), "4 experts do not lie evenly on ep=3 ranks; choose ep from: 1,", DispatchError)
    tied = own()
    tied.chosen[1][0].weight = tied.chosen[0][0].weight  # type: ignore[index]
    refused(tied, Mesh(), "parameters chosen.0.0.weight and chosen.1.0.weight are tied")
    with pytest.raises(SwapError, match=re.escape("choices [3, 2] and weights [3, 1] of a router")):
        read_routing(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1), num_experts=4)
