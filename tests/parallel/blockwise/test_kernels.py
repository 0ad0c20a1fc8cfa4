"""Fused kernels give what plain torch gives, or are not used."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise import kernels, torch_kernels
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.block import Allowed, Block, Upstream
from meshwright.parallel.blockwise.diagonals import Diagonals
from meshwright.parallel.blockwise.fused import Kernel, Operands, fused_backward, fused_forward
from meshwright.parallel.blockwise.kernels import agrees, block_backward, kernel_for
from meshwright.parallel.blockwise.masks import causal, window
from meshwright.parallel.blockwise.plain import plain_backward, plain_forward
from meshwright.parallel.blockwise.torch_kernels import FUSED
from tests.parallel.blockwise.dense import Given, relative_error

_CPU = torch.device("cpu")
(_FLASH,) = FUSED["cpu"]
_GPU_FLASH, _EFFICIENT = FUSED["cuda"]


def _block(dtype: torch.dtype = torch.float64, lengths: tuple[int, int] = (9, 9), **options: Any) -> Block:
    widths = options.pop("widths", (8, 8))
    given = Given.random(lengths=lengths, widths=widths, dtype=dtype)
    return Block(*(each.detach() for each in given.all), scale=0.4, **options)


def _upstream(block: Block, *, with_lse: bool) -> Upstream:
    out, lse = plain_forward(block)
    more = plain_forward(replace(block, key=block.key * 0.3, band=None, allowed=None))
    lse = torch.logaddexp(lse, more.lse)  # other blocks see more keys
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    return Upstream(grad, grad[..., 0].sin() if with_lse else None, out, lse)


_ALLOWED = Diagonals(-3, 1).tensor(9, 9).index_fill(0, torch.tensor(4), False)
_BLIND = torch.zeros(9, 9)
_BLIND[3, :4] = -torch.inf  # has a key only beyond the diagonal
BLOCKS: dict[str, dict[str, Any]] = {
    "whole": {},
    "rectangle": {"lengths": (5, 9)},
    "triangle": {"band": Diagonals(-8, 0)},
    "mask": {"allowed": Allowed(_ALLOWED)},
    "mask of heads": {"allowed": Allowed(torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5)},
    "mask of keys": {"allowed": Allowed(torch.arange(9) > 3)},
    "bias": {"bias": torch.randn(4, 9, 9, dtype=torch.float64)},
    "bias of rows": {"bias": torch.randn(2, 1, 9, 1, dtype=torch.float64)},
    "turned bias": {"bias": torch.randn(2, 4, 9, 9, dtype=torch.float64).mT},
    "bias in a triangle": {"bias": _BLIND, "band": Diagonals(-8, 0)},
    "bias and mask": {"bias": torch.randn(4, 9, 9, dtype=torch.float64), "allowed": Allowed(_ALLOWED)},
    "narrow values": {"widths": (8, 3)},
    "wide values": {"widths": (3, 8)},
}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("kind", BLOCKS)
def test_flash_gives_what_plain_torch_gives(kind: str, with_lse: bool) -> None:
    block = _block(**BLOCKS[kind])
    assert kernel_for(block) is _FLASH
    fused, plain = fused_forward(_FLASH, block), plain_forward(block)
    assert relative_error(fused.out, plain.out) <= 1e-12
    assert relative_error(fused.lse, plain.lse) <= 1e-12
    upstream = _upstream(block, with_lse=with_lse)
    found, wanted = fused_backward(_FLASH, block, upstream), plain_backward(block, upstream)
    for one, other in zip(found[:3], wanted[:3], strict=True):
        assert one is not None
        assert other is not None
        assert relative_error(one, other) <= 1e-12


def test_keys_that_a_kernel_would_skip_first_do_no_harm() -> None:
    block = _block(lengths=(40, 1300), allowed=Allowed(torch.arange(1300) > 1100))
    assert relative_error(fused_forward(_FLASH, block).out, plain_forward(block).out) <= 1e-12


@pytest.mark.parametrize(
    "features",
    [{"softcap": 3.0}, {"kept": torch.ones(1)}],
    ids=["soft cap", "dropout"],
)
def test_what_a_kernel_lacks_is_left_to_plain_torch(features: dict[str, Any]) -> None:
    assert kernel_for(_block(**features)) is None


def test_gradients_of_biases_and_second_derivatives_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("fused")

    monkeypatch.setattr(kernels, "fused_backward", refuse)
    block = _block()
    upstream = _upstream(block, with_lse=False)
    with torch.no_grad():
        assert block_backward(block, upstream, with_bias=True).bias is not None
        with pytest.raises(AssertionError, match="fused"):
            block_backward(block, upstream, with_bias=False)
    assert block_backward(block, upstream, with_bias=False).query.shape == block.query.shape


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", _FLASH.dtypes, ids=str)
def test_a_right_kernel_is_found_right(dtype: torch.dtype, heads: int) -> None:
    assert agrees(_FLASH, dtype, _CPU, heads=heads)


def _other_scale(given: Operands) -> Any:
    return _FLASH.forward(given._replace(scale=given.scale * 1.01))


def _no_triangle(given: Operands) -> Any:
    return _FLASH.forward(given._replace(causal=False))


def _dead_rows(given: Operands) -> Any:
    out, lse = _FLASH.forward(given)
    return out, lse.nan_to_num() if given.mask is None else lse + 1e-3


def _missing(given: Operands, *_: Any) -> Any:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("forward", [_other_scale, _no_triangle, _dead_rows, _missing])
def test_a_wrong_kernel_is_found_wrong(forward: Any) -> None:
    assert not agrees(replace(_FLASH, forward=forward), torch.float32, _CPU)
    assert not agrees(replace(_FLASH, backward=_missing), torch.float32, _CPU)


def test_a_kernel_on_trial_is_used_whatever_mode_the_pass_is_in_that_asks_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right, block = replace(_FLASH, check_first=True), _block()
    monkeypatch.setattr(kernels, "FUSED", {"cpu": (right,)})
    monkeypatch.setattr(kernels, "_AGREED", {})
    block = replace(block, query=block.query.float(), key=block.key.float(), value=block.value.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kernel_for(block) is right


def test_a_kernel_on_trial_is_used_if_it_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = replace(_FLASH, check_first=True), replace(_FLASH, check_first=True, forward=_other_scale)
    monkeypatch.setattr(kernels, "FUSED", {"cpu": (wrong, right)})
    assert kernel_for(_block()) is right
    monkeypatch.setattr(kernels, "FUSED", {"cpu": (wrong,)})
    assert kernel_for(_block()) is None
    given = Given.random()
    attend(given.query, given.key, given.value, mask=causal() & window(4)).sum().backward()


def _by_window(*given: Any, scale: float, **window: int | None) -> Operands:
    """What the kernel computes, as it is documented: windows count from the pair of the last query and the last key."""
    query, key, value = (each.transpose(1, 2) for each in given[:3])
    rows, columns = query.shape[2], key.shape[2]
    left, right = (window.get(f"window_size_{side}") for side in ("left", "right"))
    own = torch.arange(rows)[:, None] + columns - rows
    keys = torch.arange(columns)
    allowed = (own - keys <= (columns if left is None else left)) & (
        keys - own <= (columns if right is None else right)
    )
    mask = None if bool(allowed.all()) else torch.zeros(rows, columns).masked_fill(~allowed, -torch.inf)[None, None]
    return Operands(query, key, value, mask, given[3], scale)


class _Aten:
    """The GPU kernels as their documentation has them, on the CPU."""

    def _scaled_dot_product_efficient_attention(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        with_lse, dropout, causal_ = rest
        assert query.shape[1] == key.shape[1] == value.shape[1]
        assert (with_lse, dropout, query.shape[-1] % 8) == (True, 0.0, 0)
        if bias is not None:
            assert bias.shape == (*query.shape[:3], key.shape[2])
            assert bias.stride(-2) % 16 == 0
            bias = bias.contiguous()
        out, lse = _FLASH.forward(Operands(query, key, value, bias, causal_, scale))
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        return out, padded, torch.zeros(()), torch.zeros(())

    def _scaled_dot_product_efficient_attention_backward(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *rest: Any, scale: float
    ) -> tuple[Tensor | None, ...]:
        out, lse, _, _, dropout, wanted, causal_ = rest
        assert (dropout, wanted, lse.shape[-1] % 32) == (0.0, [True, True, True, False], 0)
        assert out.transpose(1, 2).is_contiguous()  # its strides are not looked at
        bias = None if bias is None else bias.contiguous()
        given = Operands(query, key, value, bias, causal_, scale)
        back = torch_kernels.Returned(grad, out, lse[..., : query.shape[2]])
        return *_FLASH.backward(given, back), None

    def _flash_attention_forward(self, *given: Any, **how: Any) -> tuple[Any, ...]:
        query, key, value, _, _, rows, columns, dropout, causal_, debug = given
        assert (dropout, debug, query.shape[-1] % 8) == (0.0, False, 0)
        assert (rows, columns) == (query.shape[1], key.shape[1])
        out, lse = _FLASH.forward(_by_window(query, key, value, causal_, **how))
        return out.transpose(1, 2), lse, None, None, None

    def _flash_attention_backward(self, *given: Any, **how: Any) -> Any:
        grad, query, key, value, out, lse, _, _, rows, columns, dropout, causal_, _, _ = given
        assert (rows, columns, dropout) == (query.shape[1], key.shape[1], 0.0)
        back = torch_kernels.Returned(grad.transpose(1, 2), out.transpose(1, 2), lse)
        return [each.transpose(1, 2) for each in _FLASH.backward(_by_window(query, key, value, causal_, **how), back)]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "dtype"), [(_GPU_FLASH, torch.bfloat16), (_EFFICIENT, torch.float32)], ids=["flash", "efficient"]
)
def test_gpu_kernels_are_called_as_they_are_documented(
    kernel: Kernel, dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not agrees(kernel, dtype, _CPU, heads=heads)  # no such kernel here

    class _Both(_Aten):
        """With the one that stands in."""

        def __getattr__(self, name: str) -> Any:
            return getattr(torch.ops.aten, name)

    monkeypatch.setattr(torch_kernels, "_aten", _Both())
    assert agrees(kernel, dtype, _CPU, heads=heads)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kernel", FUSED["cuda"], ids=lambda kernel: kernel.name)
def test_gpu_kernels_agree(kernel: Kernel, heads: int) -> None:
    assert all(agrees(kernel, dtype, torch.device("cuda"), heads=heads) for dtype in kernel.dtypes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpu_gives_what_a_cpu_gives(dtype: torch.dtype) -> None:
    given = Given.random(lengths=(200, 200), widths=(16, 16), dtype=dtype)
    there = [each.detach().cuda().requires_grad_() for each in given.all]
    for options in ({}, {"softcap": 2.0}, {"dropout_p": 0.3, "dropout_seed": 1}):
        outs = [attend(*tensors, mask=causal() & window(40), **options) for tensors in (given.all, there)]
        grads = [
            torch.autograd.grad(out.float().square().sum(), on)
            for out, on in zip(outs, (given.all, there), strict=True)
        ]
        bound = 64 * torch.finfo(dtype).eps
        assert relative_error(outs[1].cpu(), outs[0]) <= bound
        assert all(relative_error(two.cpu(), one) <= bound for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize("lengths", [(40, 40), (12, 40), (40, 12)])
@pytest.mark.parametrize("band", [Diagonals(-9, 0), Diagonals(-60, 5), Diagonals(-3, 60), Diagonals(20, 25)])
def test_a_kernel_that_takes_bands_gets_them_whole(
    band: Diagonals, lengths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Operands] = []

    def forward(given: Operands) -> Any:
        asked.append(given)
        return _FLASH.forward(_masked(given))

    def backward(given: Operands, back: torch_kernels.Returned) -> Any:
        return _FLASH.backward(_masked(given), back)

    def _masked(given: Operands) -> Operands:
        rows, columns = given.query.shape[2], given.key.shape[2]
        assert given.band is not None
        return given._replace(mask=Allowed(given.band.tensor(rows, columns)).scores(torch.float64), causal=False)

    given = Given.random(lengths=lengths, widths=(8, 8))
    mask = window(-band.low, band.high)
    wanted = attend(given.query, given.key, given.value, mask=mask)
    monkeypatch.setattr(kernels, "FUSED", {"cpu": (replace(_FLASH, forward=forward, backward=backward, bands=True),)})
    found = attend(given.query, given.key, given.value, mask=mask)
    assert len(asked) <= 1
    assert relative_error(found, wanted) <= 1e-12
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), given.all),
        torch.autograd.grad(wanted.sin().sum(), given.all),
        strict=True,
    ):
        assert relative_error(one, other) <= 1e-12
