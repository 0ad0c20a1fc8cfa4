"""Experts dealt over `ep` beside every other axis: the plain run's step, and states that any mesh reads."""

from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

import meshwright as mw
from meshwright.moe.errors import DispatchError, SwapError
from meshwright.moe.upcycle import Upcycling, upcycle
from meshwright.parallel.errors import WrapError
from meshwright.parallel.microbatch import share
from meshwright.parallel.options import Options
from meshwright.parallel.plan import make_plans
from meshwright.parallel.promote import Promote
from meshwright.testing import run_ranks
from tests.moe.models import NUM_EXPERTS, VOCABULARY, build, build_listed
from tests.parallel.cells import layout_of, tiered
from tests.parallel.families import lm

TWO: dict[str, Any] = {"num_microbatches": 2}
LAYERED: dict[str, Any] = {**TWO, "schedule": "layered"}
LAYOUTS: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 4, "ep": 2}, TWO),
    ({"fsdp": 4, "ep": 2}, TWO),
    ({"tp": 2, "dp": 2, "ep": 4, "ep_node": 2}, TWO),
    ({"fsdp": 4, "ep": 2}, LAYERED),
    ({"pp": 2, "fsdp": 2, "ep": 2}, {**TWO, "schedule": "1f1b"}),
    ({"dp": 2, "ep": 2}, LAYERED),
    ({"tp": 2, "fsdp": 2, "ep": 2}, TWO),
    ({"pp": 2, "dp": 2, "ep": 2}, {**TWO, "schedule": "modular"}),
    ({"dp": 2, "fsdp": 2, "ep": 2}, LAYERED),
    ({"fsdp": 2, "ep": 2}, {**TWO, "zero_stage": 1}),
    ({"fsdp": 4, "ep": 2}, {**TWO, "zero_stage": 2}),
    ({"dp": 2, "fsdp": 2, "ep": 2}, TWO),
    ({"tp": 2, "ep": 2}, {}),
    ({"pp": 2, "tp": 2, "ep": 2}, {**TWO, "schedule": "zb-h1"}),
    ({"pp": 2, "fsdp": 2, "tp": 2, "ep": 2}, {**TWO, "schedule": "modular"}),
]
CONTEXT: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"cp": 2, "dp": 2, "ep": 2}, {}),
    ({"cp": 2, "fsdp": 2, "ep": 4}, LAYERED),
    ({"pp": 2, "cp": 2, "ep": 2}, {**TWO, "schedule": "modular"}),
    ({"tp": 2, "cp": 2, "ep": 2}, LAYERED),
]


def words(num_samples: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (num_samples, 8), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)}


def upcycled() -> nn.Module:
    model = lm("llama", num_key_value_heads=2, vocab_size=VOCABULARY)().double()
    upcycle(model, Upcycling(num_experts=NUM_EXPERTS, k=2))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0.0, 0.3, generator=generator)
    return model


def crowded() -> nn.Module:
    """All tokens go to the experts of the first rank."""
    model = build("qwen3_moe")
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                each[2:] = 0.0
                each[:2] *= 100
                each[:2] += each[:2].sign() * 10
    return model


def one_expert() -> nn.Module:
    """All tokens of a sample want one expert, which takes five of them."""
    model = build("switch_transformers", num_experts=6, expert_capacity=5)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("classifier.weight"):
                each.zero_()
    return model


MODELS: dict[str, Any] = {
    **{name: partial(build, name) for name in ("mixtral", "qwen3_moe", "deepseek_v3", "switch_transformers")},
    "upcycled": upcycled,
    "crowded": crowded,
    "balanced": partial(build, "mixtral", output_router_logits=True, router_aux_loss_coef=0.5),
    "gpt_oss": partial(build, "gpt_oss"),
    "noisy": partial(build, "switch_transformers", router_jitter_noise=0.05),
    "listed": build_listed,
    "olmoe": partial(build, "olmoe"),
}


ALONE = mw.Experts()


def _collects(model: str, degrees: dict[str, int]) -> bool:
    """Whether a loss reads what routers left outside of the blocks of other stages."""
    return model == "balanced" and "pp" in degrees


def poison(model: mw.ParallelModel) -> None:
    """Memory that nobody wrote is full of NaN."""
    del model
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings: Any = import_module("torch.utils.deterministic")
    settings.fill_uninitialized_memory = True


def check(
    model: str, degrees: dict[str, int], options: dict[str, Any], *, moe: mw.Experts = ALONE, **more: Any
) -> None:
    given = {"moe": moe, "prepare": poison, **options, **more}
    report = mw.verify(MODELS[model], words, mw.Mesh(**degrees), **given)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    tiered((model, layout) for model, layout in product(MODELS, LAYOUTS) if not _collects(model, layout[0])),
    ids=str,
)
def test_a_step_is_the_plain_one(model: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    check(model, *layout)


@pytest.mark.slow
def test_what_routers_collect_beside_blocks_is_refused_where_other_stages_would_miss_it() -> None:
    with pytest.raises(WrapError, match=r"leaves values outside of what it gives.*output_router_logits=False"):
        check("balanced", {"pp": 2, "dp": 2, "ep": 2}, {**TWO, "schedule": "modular"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    tiered(
        product(("mixtral", "qwen3_moe", "deepseek_v3", "upcycled", "switch_transformers", "noisy"), CONTEXT), layout_of
    ),
    ids=str,
)
def test_a_step_on_dealt_sequences_is_the_plain_one(model: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    check(model, *layout)


SLICED: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 4, "ep": 4}, TWO),
    ({"fsdp": 4, "ep": 2}, LAYERED),
    ({"tp": 2, "fsdp": 2, "ep": 2}, TWO),
    ({"pp": 2, "dp": 2, "ep": 2}, {**TWO, "schedule": "modular"}),
    ({"cp": 2, "dp": 2, "ep": 4}, {}),
]
LISTED: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"dp": 4, "ep": 4}, TWO),
    ({"fsdp": 4, "ep": 2}, LAYERED),
    ({"fsdp": 4, "ep": 2}, TWO),
    ({"tp": 2, "dp": 2, "ep": 4}, TWO),
    ({"dp": 2, "ep": 2}, {}),
    ({"pp": 2, "dp": 2, "ep": 2}, {**TWO, "schedule": "1f1b"}),
    ({"cp": 2, "dp": 2, "ep": 4}, {}),
    ({"dp": 2, "fsdp": 2, "ep": 4}, LAYERED),
    ({"tp": 2, "fsdp": 2, "ep": 2}, TWO),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    tiered(product(("mixtral", "deepseek_v3", "gpt_oss", "crowded"), SLICED), layout_of),
    ids=str,
)
def test_experts_cut_into_slices_make_the_plain_step(model: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    check(model, *layout, moe=mw.Experts(slices=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"), tiered(product(("switch_transformers", "listed"), LISTED), layout_of), ids=str
)
def test_experts_that_are_modules_are_cut_into_slices(
    model: str, layout: tuple[dict[str, int], dict[str, Any]]
) -> None:
    check(model, *layout, moe=mw.Experts(slices=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("deepseek_v3", ({"dp": 2, "tp": 2, "ep": 4, "ep_node": 2}, TWO)),
        ("mixtral", ({"fsdp": 4, "ep": 2}, LAYERED)),
        pytest.param("crowded", ({"pp": 2, "dp": 2, "ep": 2}, {**TWO, "schedule": "modular"}), marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_tokens_in_two_halves_make_the_plain_step(model: str, layout: tuple[dict[str, int], dict[str, Any]]) -> None:
    check(model, *layout, moe=mw.Experts(overlap=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout", "slices"),
    [
        ("mixtral", {"fsdp": 4, "ep": 2}, 1),
        ("switch_transformers", {"dp": 2, "fsdp": 2, "ep": 4}, 2),
        ("switch_transformers", {"cp": 2, "dp": 2, "ep": 2}, 1),
    ],
)
def test_plain_gradient_descent_sees_the_scale_of_gradients(model: str, layout: dict[str, int], slices: int) -> None:
    check(model, layout, {}, moe=mw.Experts(slices=slices), build_optimizer=partial(torch.optim.SGD, lr=1.0))


@pytest.mark.slow
def test_tokens_over_capacity_are_those_of_the_whole_sequence() -> None:
    """Three ranks have shares of 3, 3 and 2 positions of eight."""
    report = mw.verify(one_expert, words, mw.Mesh(cp=3, ep=3), moe=ALONE, prepare=poison)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


class Counting(nn.Module):
    """A mixture that counts tokens where it chooses experts, outside of any module."""

    def __init__(self, mixture: Any) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, NUM_EXPERTS), mixture.experts

    def forward(self, tokens: Tensor) -> Tensor:
        weights, ids = self.gate(tokens).softmax(-1).topk(1)
        chosen = nn.functional.one_hot(ids[..., 0], NUM_EXPERTS)
        kept = (chosen.cumsum(1) * chosen).sum(-1, keepdim=True) <= 2
        made: Tensor = self.experts(tokens.flatten(0, 1), ids.flatten(0, 1), (weights * kept).flatten(0, 1))
        return made.view_as(tokens)


def counting() -> nn.Module:
    model = build("mixtral")
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp = Counting(layer.mlp).double()  # type: ignore[union-attr,arg-type]
    return model


def test_experts_that_would_get_all_tokens_of_all_ranks_are_refused() -> None:
    with pytest.raises(WrapError) as caught:
        make_plans(counting(), mw.Mesh(cp=2, ep=2), Options.of(moe=mw.Experts(), example=words(2)))
    assert "experts model.layers.0.mlp.experts lie in model.layers.0.mlp, which looks at other pos" in str(caught.value)
    assert "let a module of its own choose experts" in str(caught.value)


def stepped(model: mw.ParallelModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        batch = words(24)
        own = {key: each.roll(number, 0) for key, each in batch.items()}
        model.step(share(own, model.data_rank, model.mesh.data_degree))
        model.clip_gradients(0.1)
        optimizer.step()


def trained(family: str, mesh: mw.Mesh, options: dict[str, Any], *, steps: range, folder: str = "") -> Any:
    """Whole parameters after some steps that go on from where the folder is, if it is not empty."""
    slices = options.pop("slices", 1)
    with Promote():
        model = mw.parallelize(MODELS[family](), mesh, moe=mw.Experts(slices=slices), example=words(2), **options)
        optimizer = model.make_optimizer(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        if folder and steps.start:
            state = model.state_dict(loading=True)
            state_dict_loader.load(state, checkpoint_id=f"{folder}/{steps.start}")
            model.load_state_dict(state)
        stepped(model, optimizer, steps)
        if folder:
            state_dict_saver.save(model.state_dict(), checkpoint_id=f"{folder}/{steps.stop}")
        found = {name: each.clone() for name, each in model.full_parameters().items()}
    return found if model.rank == 0 else None


WAYS = {
    "mixtral": [
        ({"dp": 4, "ep": 4}, {}),
        ({"fsdp": 4, "ep": 2}, {}),
        ({"dp": 2}, {}),
        ({"fsdp": 4, "ep": 4}, {"schedule": "layered", "slices": 2}),
        ({"dp": 4, "ep": 4}, {"slices": 4}),
    ],
    "switch_transformers": [
        ({"fsdp": 4, "ep": 4}, {"schedule": "layered"}),
        ({"dp": 4, "ep": 2}, {}),
        ({"fsdp": 2}, {}),
        ({"tp": 2, "dp": 2, "ep": 4}, {}),
        ({"fsdp": 4, "ep": 4}, {"schedule": "layered", "slices": 2}),
        ({"dp": 4, "ep": 4}, {"slices": 4}),
    ],
    "listed": [
        ({"fsdp": 4, "ep": 2}, {"schedule": "layered", "slices": 2}),
        ({"dp": 4, "ep": 4}, {"slices": 4}),
        ({"fsdp": 4, "ep": 4}, {}),
        ({"dp": 4, "ep": 4}, {"slices": 2}),
    ],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # torch's own, about its checkpoint writer
@pytest.mark.parametrize("family", WAYS)
def test_checkpoints_move_between_numbers_of_ranks(family: str, tmp_path: Path) -> None:
    for number, (degrees, options) in enumerate(WAYS[family]):
        mesh, steps = mw.Mesh(**degrees), range(number, number + 1)
        found = run_ranks(partial(trained, steps=steps, folder=str(tmp_path)), mesh, family, mesh, options)[0]
    whole = range(len(WAYS[family]))
    expected = run_ranks(partial(trained, steps=whole), mw.Mesh(), family, mw.Mesh(), {})[0]
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=1e-9, atol=1e-12, msg=name)


def weights(family: str, mesh: mw.Mesh, folder: str) -> list[int]:
    """Saves a model of random weights whole, reads it into another one, and compares; elements that a rank keeps."""
    model = mw.parallelize(MODELS[family](), mesh, moe=mw.Experts())
    model.save_weights(folder)
    other = MODELS[family]()
    with torch.no_grad():
        for each in other.parameters():
            each.zero_()
    read = mw.parallelize(other, mesh, moe=mw.Experts())
    read.load_weights(folder)
    for (name, one), two in zip(model.full_parameters().items(), read.full_parameters().values(), strict=True):
        assert torch.equal(one, two), name
    local = [each.to_local() if hasattr(each, "to_local") else each for each in model.parameters()]
    assert sum(each.numel() for each in local) <= model.report.parameters_per_rank
    return [each.numel() for each in local]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_weights_are_saved_whole_and_read_in_parts(family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    mesh = mw.Mesh(dp=2, ep=2)
    held = run_ranks(weights, mesh, family, mesh, str(tmp_path))
    plain, saved = MODELS[family](), load_file(tmp_path / "model.safetensors")
    for name, each in plain.named_parameters():
        assert torch.equal(saved[name], each), name
    of_experts = sum(each.numel() for name, each in plain.named_parameters() if ".experts." in name)
    whole = sum(each.numel() for each in plain.parameters())
    assert {sum(sizes) for sizes in held} == {whole - of_experts // 2}


def test_what_does_not_go_together_is_refused() -> None:
    mesh = mw.Mesh(dp=2, ep=2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "mesh axis ep=2 deals experts; say how by moe=meshwright.Experts(), or leave it out: dp=2"),
        ({"data_engine": "deepspeed"}, "ep=2 does not go with data_engine='deepspeed'"),
        ({"blockwise": {"ffn_block": 4}}, "ep=2 does not go with blockwise: ffn_block"),
    ]
    for options, words_of_it in cases:
        given = {"moe": mw.Experts()} if options else {}
        with pytest.raises(WrapError) as caught:
            mw.verify(MODELS["mixtral"], words, mesh, **given, **options)
        assert words_of_it in str(caught.value)
    with pytest.raises(DispatchError, match="8 experts do not lie evenly on ep=3 ranks; choose ep from: 1, 2, 4, 8"):
        mw.verify(MODELS["mixtral"], words, mw.Mesh(dp=3, ep=3), moe=mw.Experts())
    with pytest.raises(SwapError, match="no module of LlamaForCausalLM is recognised as experts"):
        mw.verify(lm("llama"), words, mesh, moe=mw.Experts())
    with pytest.raises(DispatchError, match="no transport is called 'two_hop'"):
        mw.Experts(transport="two_hop")  # type: ignore[arg-type]
