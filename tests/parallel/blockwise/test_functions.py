"""Calls of torch's functions mean what its documentation says."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as imported

from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.errors import WrapError
from tests.parallel.blockwise.unplugged import dense_attention


class _Calls(nn.Module):
    """A module that attends as told."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.attend = attend

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attend(*args, **kwargs)


def _tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


_SOME = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
_FOUR = ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6))


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (_FOUR, {}),
        (_FOUR, {"is_causal": True}),
        (_FOUR, {"scale": 0.3}),
        (_FOUR, {"attn_mask": _SOME}),
        (_FOUR, {"attn_mask": _SOME[:1]}),
        (_FOUR, {"attn_mask": _SOME.expand(2, 1, 5, 7)}),
        (_FOUR, {"attn_mask": torch.linspace(-1, 1, 35, dtype=torch.float64).reshape(5, 7)}),
        (_FOUR, {"attn_mask": torch.zeros(5, 7, dtype=torch.float64).masked_fill(~_SOME, -torch.inf)}),
        (((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8)), {"enable_gqa": True, "is_causal": True}),
        (((3, 5, 8), (3, 7, 8), (3, 7, 6)), {"attn_mask": _SOME}),
        (((5, 8), (7, 8), (7, 6)), {"attn_mask": _SOME}),
        (((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), {"attn_mask": _SOME.expand(3, 1, 5, 7)}),
        (((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 6)), {"attn_mask": _SOME.expand(1, 1, 4, 5, 7)}),
        (((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)), {}),
    ],
    ids=str,
)
def test_a_call_gives_value_and_gradients_of_torch(shapes: tuple[Any, ...], options: dict[str, Any]) -> None:
    model, tensors = (
        _Calls(functional.scaled_dot_product_attention),
        _tensors(*shapes),
    )
    plain = model(*tensors, **options)
    with plugged(model, dense_attention) as plug:
        found = model(*tensors, **options)
    assert plug.arrived == {"": "scaled_dot_product_attention"}
    weight = torch.randn_like(plain)
    gradients = [torch.autograd.grad(each, tensors, weight) for each in (found, plain)]
    for mine, other in zip((found, *gradients[0]), (plain, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)


def test_positions_of_arguments_are_those_of_torch() -> None:
    tensors = _tensors(*_FOUR)
    calls: list[AttentionCall] = []
    model = _Calls(functional.scaled_dot_product_attention)
    with plugged(model, lambda call: calls.append(call) or dense_attention(call)):  # type: ignore[func-returns-value]
        model(*tensors, _SOME, 0.25, False)
    assert calls[0].dropout_p == 0.25
    assert calls[0].mask is not None


def test_a_bias_that_is_learned_gets_its_gradient() -> None:
    tensors, (bias,) = _tensors(*_FOUR), _tensors((4, 5, 7))
    model = _Calls(functional.scaled_dot_product_attention)
    (plain,) = torch.autograd.grad(model(*tensors, attn_mask=bias).square().sum(), [bias])
    with plugged(model, dense_attention):
        (found,) = torch.autograd.grad(model(*tensors, attn_mask=bias).square().sum(), [bias])
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


class _Imports(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return imported(x, x, x)


def test_a_name_that_a_file_imported_is_found() -> None:
    (x,) = _tensors((1, 2, 3, 4))
    before = imported
    with plugged(_Imports(), lambda call: call.value + 1) as plug:
        model = plug.modules[0]
        assert torch.equal(model(x), x + 1)
    assert imported is before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", ["", "keys", "pairs", "both"])
def test_layers_of_torch_attend_elsewhere(masked: str, training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().train(training)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    (x,) = _tensors((3, 5, 8))
    keys = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    options = {
        "src_key_padding_mask": keys if masked in ("keys", "both") else None,
        "mask": torch.ones(5, 5, dtype=torch.bool).triu(1) if masked in ("pairs", "both") else None,
    }
    with torch.set_grad_enabled(training):
        plain = model(x, **options)
        with plugged(model, dense_attention) as plug:
            found = model(x, **options)
    assert list(plug.arrived) == ["layers.0.self_attn", "layers.1.self_attn"]
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("asked", [(), (None, True)])
def test_weights_that_a_model_asks_for_and_leaves_are_not_made(asked: tuple[Any, ...]) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    (x,) = _tensors((3, 5, 8))
    plain, _ = attention(x, x, x, *asked)
    with plugged(attention, dense_attention) as plug:
        found, weights = attention(x, x, x, *asked)
    assert plug.arrived == {"": "scaled_dot_product_attention"}
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-13)
    for use in (partial(getattr, weights, "shape"), lambda: weights[0]):
        with pytest.raises(WrapError, match=r"MultiheadAttention is asked for .* weights .* leave out blockwise="):
            use()


def test_weights_that_a_model_does_not_ask_for_are_none() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    (x,) = _tensors((3, 5, 8))
    with plugged(attention, dense_attention):
        assert attention(x, x, x)[1] is not None
        assert attention(x, x, x, need_weights=False)[1] is None
        assert attention(x, x, x, None, False)[1] is None


def test_modes_that_look_at_calls_of_other_models_see_them() -> None:
    query, key, value = (each.detach() for each in _tensors(*_FOUR))
    with plugged(nn.MultiheadAttention(8, 2), dense_attention), PlainDropout() as dropout:
        functional.scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert dropout.shapes == [(2, 4, 5, 7)]


def test_what_a_handler_calls_does_not_come_back_to_it() -> None:
    def handler(call: AttentionCall) -> Tensor:
        return functional.scaled_dot_product_attention(call.query, call.key, call.value)

    (x,) = _tensors((1, 2, 3, 4))
    model = _Calls(lambda x: functional.scaled_dot_product_attention(x, x, x))
    plain = model(x)
    with plugged(model, handler):
        assert torch.equal(model(x), plain)


def test_an_error_inside_leaves_no_module_behind() -> None:
    (x,) = _tensors((1, 2, 3, 4))

    def fails(x: Tensor) -> Tensor:
        raise KeyError("inside")

    model = _Calls(fails)
    with plugged(model, lambda call: call.value + 1):
        with pytest.raises(KeyError, match="inside"):
            model(x)
        torch.testing.assert_close(  # called outside of the model
            functional.scaled_dot_product_attention(x, x, x),
            dense_attention(AttentionCall(query=x, key=x, value=x, module=model)),
        )
