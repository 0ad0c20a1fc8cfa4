"""Blocks by spans: the untouched model's numbers, of what a flash layer with a plain network keeps an eighth."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.errors import WrapError
from meshwright.parallel.promote import Promote
from meshwright.parallel.spans.block import SpannedBlock
from meshwright.parallel.spans.install import Spanned, plan_spans, span_blocks
from tests.parallel.families import FAMILIES, lm, words

SIZES = Blockwise(query_block=5, kv_block=4, layer_block=5)  # divides no length in these tests
SPANNED = ("llama", "gpt2", "gemma3", "mixtral", "gpt_neox", "bert", "vit", "whisper", "modernbert")


def wide(batch: Any) -> dict[str, Any]:
    """A batch in float64, by name."""
    return {key: each.double() if each.is_floating_point() else each for key, each in batch.items()}


def step(model: nn.Module, batch: Any, handler: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients; all that is random begins at one seed."""
    torch.manual_seed(1)
    with Promote(), plugged(model, handler):
        found = model(**wide(batch))
        loss = found if isinstance(found, Tensor) else found.loss
        loss.backward()
    return loss.detach(), {name: each.grad for name, each in model.named_parameters()}


def spanned(model: nn.Module, batch: Any, sizes: Blockwise = SIZES) -> tuple[Spanned, Any]:
    """The model's blocks by spans, and what computes its attention."""

    def run() -> Any:
        with Promote():
            return model(**wide(batch))

    found = plan_spans(model, run)
    return found, span_blocks(model, found, sizes)


def same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-11) -> None:
    """Fails where gradients differ."""
    largest = max(float(each.abs().max()) for each in expected.values() if each is not None)
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            scale = max(float(gradient.abs().max()), 1e-6 * largest)
            assert float((gradient - other).abs().max()) <= tolerance * scale, name


def forwards(model: nn.Module) -> list[SpannedBlock]:
    """What runs the blocks."""
    return [each.forward for each in model.modules() if isinstance(each.forward, SpannedBlock)]


@pytest.mark.parametrize("family", SPANNED)
def test_gradients_are_those_of_the_untouched_model_dropout_included(family: str) -> None:
    build, batch = FAMILIES[family]
    loss, expected = step(build().double(), batch(), partial(attend_to, sizes=SIZES))
    model = build().double()
    plan, handler = spanned(model, batch())
    again, found = step(model, batch(), handler)
    assert not plan.whole
    assert all(each.uses == {"by spans": 1} for each in forwards(model))
    assert abs(float(loss - again)) <= 1e-13 * abs(float(loss))
    same(found, expected)


def test_under_autocast_both_passes_cast_alike() -> None:
    found = []
    for blocks in (None, SIZES):
        model, batch = lm("llama", num_key_value_heads=2)(), words(4, 12)
        handler: Any = partial(attend_to, sizes=SIZES)
        if blocks is not None:
            handler = spanned(model.double(), batch)[1]
            model.float()
        with plugged(model, handler):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
        found.append((loss.detach(), {name: each.grad for name, each in model.named_parameters()}))
    (one, expected), (other, gradients) = found
    assert torch.equal(one, other)
    same(gradients, expected, tolerance=0.02)  # two units in the last place of bfloat16


class Layer(nn.Module):
    """A pre-norm layer as the fact of its memory is told: 4 heads, 4h wide, GELU; attention in its own forward."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, -1)
        q, k, v = (each.unflatten(-1, (4, -1)).transpose(1, 2) for each in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = x + self.out(mixed.transpose(1, 2).flatten(2))
        return y + self.mlp(self.norms[1](y))


class Stack(nn.Module):
    """Layers, and their sum as a loss."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sin().sum()


def by_spans(model: nn.Module, length: int, width: int, block: int) -> tuple[nn.Module, Any]:
    """A stack whose layers run by spans, and what computes its attention."""
    plan = plan_spans(model, lambda: model(torch.randn(1, length, width, dtype=next(model.parameters()).dtype)))
    return model, span_blocks(model, plan, Blockwise(layer_block=block))


class Checkpointed(Stack):
    """Of whose layers torch keeps the inputs alone."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x.sin().sum()


@pytest.mark.parametrize(("kind", "units"), [(Stack, 2), (Checkpointed, 1)])
def test_a_layer_keeps_its_input_and_what_attention_gave(kind: type[Stack], units: float) -> None:
    """In units of b s h 4 bytes, and a log-sum-exp for each head; flash with a plain network keeps 16."""
    torch.manual_seed(0)
    model, handler = by_spans(kind([Layer() for _ in range(4)]), 32, 256, 256)
    own = {each.untyped_storage()._cdata for each in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    x = torch.randn(1, 2048, 256, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), plugged(model, handler):
        model(x)
    kept.pop(next(iter(reversed(kept))))  # the argument of sin
    assert sum(each.nbytes() for each in kept.values()) / (4 * x.numel() * 4) == pytest.approx(units, rel=0.03)


def test_a_checkpoint_around_spans_changes_no_gradient() -> None:
    found = []
    for kind in (Stack, Checkpointed):
        torch.manual_seed(0)
        model, handler = by_spans(kind([Layer(8), Layer(8)]).double(), 7, 8, 3)
        with plugged(model, handler):
            model(torch.linspace(-1, 1, 112, dtype=torch.float64).view(2, 7, 8)).backward()
        found.append({name: each.grad for name, each in model.named_parameters()})
    same(*found, tolerance=1e-12)


def test_second_derivatives_are_those_of_the_untouched_model() -> None:
    torch.manual_seed(0)
    model = Stack([Layer(8), Layer(8)]).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)

    def twice() -> list[Tensor]:
        (first,) = torch.autograd.grad(model(x), x, create_graph=True)
        return list(torch.autograd.grad(first.pow(2).sum(), [x, *model.parameters()]))

    with plugged(model, partial(attend_to, sizes=Blockwise())):
        expected = twice()
    model, handler = by_spans(model, 7, 8, 3)
    with plugged(model, handler):
        found = twice()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model, handler = by_spans(Stack([Layer(8), Layer(8)]).double(), 7, 8, 3)
    x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = model.get_parameter("layers.1.qkv.weight")
    with plugged(model, handler):
        (of_x,) = torch.autograd.grad(model(x), x)
        (of_weight,) = torch.autograd.grad(model(x), weight)
        model.get_parameter("layers.0.out.weight").requires_grad_(False)
        model(x).backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert model.get_parameter("layers.0.out.weight").grad is None
    torch.testing.assert_close(x.grad, of_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, of_weight, rtol=1e-12, atol=1e-12)


def test_hooks_on_parameters_are_called_once() -> None:
    model, handler = by_spans(Stack([Layer(8), Layer(8)]), 12, 8, 2)
    calls: list[str] = []
    for name, each in model.named_parameters():
        each.register_post_accumulate_grad_hook(lambda parameter, name=name: calls.append(name))  # type: ignore[misc]
    with plugged(model, handler):
        model(torch.randn(2, 12, 8)).backward()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters())


def test_inner_hooks_and_arguments_it_was_not_tried_with_make_a_block_run_whole() -> None:
    model, handler = by_spans(Stack([Layer(8), Layer(8)]), 12, 8, 4)
    first, second = forwards(model)
    seen: list[int] = []
    hook = model.get_submodule("layers.0.mlp").register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    with plugged(model, handler):
        model(torch.randn(2, 12, 8))
        hook.remove()
        model(torch.randn(2, 12, 8))
    assert seen == [12]
    assert (first.uses, second.uses) == ({"whole": 1, "by spans": 1}, {"by spans": 2})


def test_random_bits_beside_dropout_are_refused() -> None:
    class Path(Layer):
        noisy = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out + torch.rand(1) if self.noisy else out

    model, handler = by_spans(Stack([Path(8), Path(8)]), 12, 8, 4)
    model.get_submodule("layers.1").noisy = True  # type: ignore[assignment]
    with plugged(model, handler), pytest.raises(WrapError, match=r"layers\.1 draws random bits beside dropout"):
        model(torch.randn(1, 12, 8))


def test_dropout_that_is_not_about_positions_is_refused() -> None:
    class Path(Layer):
        kept = False

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out * nn.functional.dropout(torch.ones(len(x), 1, 1)) if self.kept else out

    model, handler = by_spans(Stack([Path(8), Path(8)]), 12, 8, 4)
    model.get_submodule("layers.1").kept = True  # type: ignore[assignment]
    with plugged(model, handler), pytest.raises(WrapError, match=r"dropout on \(2, 1, 1\) inside of a call on 4 pos"):
        model(torch.randn(2, 12, 8))


def test_parameters_that_change_between_forward_and_backward_are_noticed() -> None:
    model, handler = by_spans(Stack([Layer(8), Layer(8)]), 12, 8, 4)
    with plugged(model, handler):
        loss = model(torch.randn(1, 12, 8))
        with torch.no_grad():
            model.get_parameter("layers.0.qkv.weight").add_(1)
        with pytest.raises(WrapError, match=r"parameters of layers\.0 were changed"):
            loss.backward()


def test_spans_may_be_viewed_as_the_whole_may() -> None:
    class Views(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(x.shape[0] * x.shape[1], -1).view(x.shape))

    model, handler = by_spans(Stack([Views(8), Views(8)]), 12, 8, 4)
    with plugged(model, handler):
        model(torch.randn(2, 12, 8)).backward()
    assert [each.uses for each in forwards(model)] == [{"by spans": 1}] * 2


def test_what_backward_saves_for_itself_is_no_business_of_hooks_on_saved_tensors() -> None:
    model, handler = by_spans(Stack([Layer(8), Layer(8)]), 12, 8, 4)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor

    with plugged(model, handler):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.randn(2, 12, 8, requires_grad=True))
        before = len(packed)
        loss.backward()
    assert 0 < before == len(packed)


@pytest.mark.parametrize("length", [1, 2, 3, 11, 40])
def test_every_length_is_exact(length: int) -> None:
    def batch() -> dict[str, Tensor]:
        return words(2, length)

    _, expected = step(lm("llama")().double(), batch(), partial(attend_to, sizes=SIZES))
    model = lm("llama")().double()
    _, handler = spanned(model, words(2, 12))
    _, found = step(model, batch(), handler)
    same(found, expected)
