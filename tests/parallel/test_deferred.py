"""A deferred model has the same weights on every mesh, and no rank holds them whole."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright.parallel.deferred import deferred, device_of, materialise
from meshwright.parallel.errors import DeferError, WrapError
from meshwright.testing import run_ranks
from tests.parallel.cells import tiered
from tests.parallel.families import FAMILIES

ENOUGH = 100  # values of one tensor to know a spread from; a bias of five elements is drawn twenty times
MESHES = ({"dp": 2}, {"fsdp": 2}, {"tp": 2}, {"fsdp": 2, "tp": 2}, {"fsdp": 3}, {"tp": 4})


def _deferred(family: str) -> nn.Module:
    return deferred(FAMILIES[family][0], seed=5)


def _made(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    return materialise(deferred(build, seed=seed))


def _weights(family: str, degrees: dict[str, int]) -> dict[str, torch.Tensor]:
    model = mw.parallelize(_deferred(family), mw.Mesh(**degrees), example=FAMILIES[family][1]())
    return model.full_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deferred_model_is_the_model_itself(family: str) -> None:
    shell = _deferred(family)
    assert all(each.is_meta for each in shell.parameters())
    made, plain = materialise(shell), FAMILIES[family][0]()
    assert list(made.state_dict()) == list(plain.state_dict())
    for (name, mine), (_, theirs) in zip(made.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    names = dict(plain.named_parameters())
    assert list(dict(made.named_parameters())) == list(names)  # ties stay ties
    for name, mine in made.named_parameters():
        theirs = names[name]
        assert mine.requires_grad == theirs.requires_grad, name
        assert mine.dtype == theirs.dtype, name


def _many_draws(builds: Iterable[Callable[[], nn.Module]]) -> dict[str, torch.Tensor]:
    """The values that a parameter gets in several models, in one row."""
    models = [dict(build().named_parameters()) for build in builds]
    return {name: torch.stack([each[name].detach().double() for each in models]).flatten() for name in models[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_a_deferred_model_are_distributed_as_the_constructor_says(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = FAMILIES[family][0]
    sizes = [each.numel() for each in build().parameters() if float(each.detach().std(correction=0)) > 0]
    draws = range(-(-ENOUGH // min(sizes)))
    mine = _many_draws(partial(_made, build, seed) for seed in draws)
    seeded, numbers = torch.manual_seed, iter(draws)  # all of these constructors seed themselves
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeded(seed + 1000 + next(numbers)))
    plain = _many_draws(build for _ in draws)
    for name, expected in plain.items():
        found, spread = mine[name], float(expected.std(correction=0))
        if spread == 0.0:
            assert torch.equal(found, expected), name
            continue
        error = 5.0 * spread / found.numel() ** 0.5  # five deviations of a normal law, more of one with thinner tails
        assert abs(float(found.std(correction=0)) - spread) <= error, name
        assert abs(float(found.mean() - expected.mean())) <= 2**0.5 * error, name


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees"), tiered(product(("llama", "gpt2", "t5"), MESHES)), ids=str)
def test_one_seed_gives_the_same_weights_on_every_mesh(family: str, degrees: dict[str, int]) -> None:
    whole = dict(materialise(_deferred(family)).named_parameters())
    for found in run_ranks(_weights, mw.Mesh(**degrees), family, degrees):
        for name, expected in whole.items():
            assert torch.equal(found[name], expected), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the model cannot be run on shapes alone")  # mixtral loops over what it finds
@pytest.mark.parametrize(
    ("family", "degrees"),
    tiered(
        product(("llama", "gpt2", "t5", "vit", "translator", "mixtral"), ({"dp": 2}, {"fsdp": 2, "tp": 2}, {"fsdp": 2}))
    ),
    ids=str,
)
def test_a_step_of_a_deferred_model_equals_the_plain_one(family: str, degrees: dict[str, int]) -> None:
    build: Callable[[], nn.Module] = partial(_deferred, family)
    report = mw.verify(build, FAMILIES[family][1], mw.Mesh(**degrees))
    assert report.ok, str(report)


def _different() -> None:
    rank = torch.distributed.get_rank()
    mw.parallelize(deferred(lambda: nn.Linear(3, 4), seed=rank), mw.Mesh(dp=2))


@pytest.mark.slow
def test_ranks_that_would_make_other_weights_are_told() -> None:
    with pytest.raises(Exception, match=r"ranks \[1\] hold another (bias|weight) than rank 0"):
        run_ranks(_different, mw.Mesh(dp=2))


def test_meta_parameters_without_a_recipe_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    with pytest.raises(WrapError, match=r"parameter weight is on the meta device .* meshwright\.deferred"):
        device_of(model)


def test_a_constructor_that_needs_memory_says_so() -> None:
    def build() -> nn.Module:
        torch.zeros(3).numpy()
        return nn.Linear(2, 3)

    with pytest.raises(DeferError, match="cannot be built without memory"):
        deferred(build)


def test_tensors_that_are_no_parameters_have_values_at_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2))
            self.scales = [torch.arange(3) * 2]

    model = deferred(Scaled)
    assert torch.equal(model.scales[0], torch.tensor([0, 2, 4]))
