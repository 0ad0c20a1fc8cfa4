"""Feed-forward networks by blocks: the untouched model's numbers, with a seventh of what attention alone keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

import meshwright as mw
from meshwright.parallel.blockwise.by_position import works_by_position
from meshwright.parallel.blockwise.feed_forward import TiledFeedForward, tile_feed_forward
from meshwright.parallel.promote import Promote
from tests.parallel.families import FAMILIES, lm, words

NORMED, ALONE = "by blocks, with its norm", "by blocks"
FOUND = {
    "llama": ("model.layers.0.mlp", NORMED),
    "gpt2": ("transformer.h.0.mlp", NORMED),
    "qwen3": ("model.layers.0.mlp", NORMED),
    "gemma3": ("model.layers.0.mlp", NORMED),
    "phi3": ("model.layers.0.mlp", NORMED),
    "gpt_neox": ("gpt_neox.layers.0.mlp", NORMED),
    "olmo2": ("model.layers.0.mlp", ALONE),
    "t5": ("encoder.block.0.layer.1", ALONE),
    "vit": ("vit.layers.0.mlp", NORMED),
    "modernbert": ("model.layers.0.mlp", NORMED),
    "mixer": ("blocks.0.along", NORMED),
}


def _step(model: nn.Module, batch: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    model.zero_grad()
    wide = [batch] if isinstance(batch, dict) else [dict(zip(("x", "labels"), batch, strict=True))]
    with Promote():
        found = model(**{key: each.double() if each.is_floating_point() else each for key, each in wide[0].items()})
        (found if isinstance(found, Tensor) else found.loss).backward()
    return {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("family", FOUND)
def test_gradients_are_those_of_the_untouched_model_dropout_included(family: str) -> None:
    build, batch = FAMILIES[family]
    plain = _step(build().double(), batch())
    model = build().double()
    tiled = tile_feed_forward(model, 5)
    found = _step(model, batch())
    path, how = FOUND[family]
    assert path in tiled
    forward = model.get_submodule(path).forward
    assert isinstance(forward, TiledFeedForward)
    assert forward.uses == {how: 1}
    largest = max(float(each.abs().max()) for each in plain.values() if each is not None)
    for name, gradient in plain.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            assert float((gradient - other).abs().max()) <= 1e-12 * scale, name


def test_what_mixes_positions_or_keeps_something_is_left_alone() -> None:
    class Keeps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x.mean()
            return super().forward(x)

    class Borrows(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + borrowed

    def pair() -> tuple[nn.Module, ...]:
        return nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    borrowed = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    assert works_by_position(nn.Sequential(*pair(), nn.Dropout(0.5)), 4)
    assert not works_by_position(nn.Sequential(*pair(), nn.Softmax(dim=1)), 4)
    assert not works_by_position(nn.Sequential(nn.BatchNorm1d(6), *pair()), 4)
    assert not works_by_position(Keeps(*pair()), 4)
    assert not works_by_position(Borrows(*pair()), 4)
    assert not works_by_position(nn.Sequential(*pair(), nn.AlphaDropout(0.5)), 4)
    assert not works_by_position(nn.Sequential(nn.ReLU(inplace=True), *pair()), 4)
    assert not works_by_position(nn.TransformerEncoderLayer(4, 2, 8), 4)
    assert tile_feed_forward(FAMILIES["mixtral"][0](), 4) == tile_feed_forward(FAMILIES["bert"][0](), 4) == []


class Layer(nn.Module):
    """A pre-norm layer as the fact of its memory is told: h = 256, 4 heads, 4h wide, GELU."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.norms = nn.ModuleList([nn.LayerNorm(256), nn.LayerNorm(256)])
        self.qkv, self.out = nn.Linear(256, 768), nn.Linear(256, 256)
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (4, 64)).transpose(1, 2) for each in parts)
        if self.attention == "flash":
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            mixed = (q * 0.125 @ k.transpose(-2, -1)).masked_fill(later, -torch.inf).softmax(-1) @ v
        y = x + self.out(mixed.transpose(1, 2).flatten(2))
        return y + self.mlp(self.norms[1](y))


def _kept_per_layer(attention: str, block: int | None) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer(attention) for _ in range(4)))
    if block is not None:
        assert tile_feed_forward(model, block) == [f"{number}.mlp" for number in range(4)]
    own = {each.untyped_storage()._cdata for each in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held.append(storage)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    x = torch.randn(1, 2048, 256, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(kept.values()) / (4 * x.numel() * 4)


@pytest.mark.parametrize(
    ("attention", "block", "units"), [("whole scores", None, 50), ("flash", None, 16), ("flash", 256, 7)]
)
def test_a_layer_keeps_as_many_tensors_as_it_should(attention: str, block: int | None, units: float) -> None:
    assert _kept_per_layer(attention, block) == pytest.approx(units, rel=0.03)


def _pair(block: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"norm": nn.LayerNorm(8), "mlp": nn.Sequential(nn.Linear(8, 32), nn.GELU())})]
    layers[0]["mlp"].append(nn.Linear(32, 8))
    found = nn.ModuleList([layers[0], nn.ModuleDict({"norm": nn.LayerNorm(8)})])
    tile_feed_forward(found, block)
    return layers[0]["norm"], layers[0]["mlp"]


X = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(0))


def _uses(mlp: nn.Module) -> dict[str, int]:
    assert isinstance(mlp.forward, TiledFeedForward)
    return dict(mlp.forward.uses)


def test_a_norms_output_that_was_changed_or_is_watched_is_taken_as_it_is() -> None:
    norm, mlp = _pair()
    x = X.clone().requires_grad_()
    mlp(norm(x))
    mlp(norm(x).mul_(2.0))
    mlp(norm(x) * 1.0)
    watched = norm(x)
    watched.register_hook(lambda gradient: gradient)
    mlp(watched)
    with torch.autocast("cpu", torch.bfloat16):
        normed = norm(x)
    mlp(normed)
    given = x * 2
    normed = norm(given)
    given.add_(1.0)
    mlp(normed)
    assert _uses(mlp) == {NORMED: 1, ALONE: 5}


def test_hooks_on_inner_modules_see_everything_once() -> None:
    _, mlp = _pair()
    assert isinstance(mlp, nn.Sequential)
    seen: list[tuple[int, ...]] = []
    handle = mlp[1].register_forward_hook(lambda _, __, made: seen.append(tuple(made.shape)))
    outer: list[tuple[int, ...]] = []
    mlp.register_forward_hook(lambda _, __, made: outer.append(tuple(made.shape)))
    mlp(X.requires_grad_()).sum().backward()
    handle.remove()
    mlp(X.requires_grad_()).sum().backward()
    assert (seen, outer, _uses(mlp)) == ([(2, 7, 32)], [(2, 7, 8)] * 2, {"whole": 1, ALONE: 1})


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same() -> None:
    _, mlp = _pair()
    plain = mlp.forward.forward(X)
    with torch.no_grad():
        torch.testing.assert_close(mlp(X), plain)
    assert _uses(mlp) == {"without gradients": 1}


def _tiled(build: Any) -> Any:
    def made() -> nn.Module:
        model: nn.Module = build()
        assert tile_feed_forward(model, 5)
        return model

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "degrees", "options"),
    [
        ("t5", {"tp": 2}, {}),
        ("gpt2", {"pp": 2}, {"schedule": "zb-h1"}),
        ("llama", {"fsdp": 2}, {"schedule": "layered", "recompute": "blocks"}),
        ("gpt2", {"fsdp": 2}, {"zero_stage": 3}),
        ("qwen3", {"dp": 2}, {}),
    ],
    ids=str,
)
def test_it_meets_other_axes_and_schedules(family: str, degrees: dict[str, int], options: dict[str, Any]) -> None:
    build, batch = FAMILIES[family]
    report = mw.verify(_tiled(build), batch, mw.Mesh(**degrees), num_microbatches=2, **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-11


def test_a_step_by_turns_gives_the_gradients_of_the_untouched_model() -> None:
    found = []
    build = lm("llama", num_key_value_heads=2)
    for each in (build, _tiled(build)):
        for options in ({}, {"recompute": "blocks"}):
            model = mw.parallelize(each().double(), mw.Mesh(), schedule="layered", num_microbatches=3, **options)
            model.step(words())
            found.append({name: each for name, each in model.full_gradients().items() if each is not None})
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-7)
