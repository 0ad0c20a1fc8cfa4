"""Blockwise attention equals attention: every feature, dtype and length, forward and backward, and backward of that."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from meshwright.parallel.blockwise import masks
from meshwright.parallel.blockwise.attention import attend
from meshwright.parallel.blockwise.biases import alibi
from meshwright.parallel.blockwise.masks import Mask
from meshwright.parallel.errors import WrapError
from tests.parallel.blockwise.dense import Given, dense_attention, elements, relative_error

_SIZE = 23
_IDS = torch.tensor([[0] * 10 + [1] * 7 + [2] * 6, [0] * 3 + [1] * 20])
_RANDOM = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)) > 0.5

MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(5),
    "both sides": masks.window(2, 3),
    "packed": masks.causal() & masks.documents(_IDS),
    "padded": masks.padding(_IDS > 0),
    "dense": masks.dense(torch.rand(2, 1, _SIZE, _SIZE, generator=torch.Generator().manual_seed(2)) > 0.6),
    "function": masks.function(lambda sample, head, query, key: (query + head - key) % 3 == sample),
    "sparse": masks.blocks(_RANDOM, 4) | masks.window(1, 1),
    "nothing": masks.padding(torch.zeros(2, _SIZE)),
}
FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the tensors, of the call
    "plain": ({}, {}),
    "one head for all": ({"heads": (4, 1)}, {"scale": 0.3}),
    "narrow values": ({"widths": (8, 6)}, {}),
    "wide values": ({"widths": (4, 6)}, {"softcap": 2.0}),
    "bias": ({"bias": (4, _SIZE, _SIZE)}, {}),
    "bias of keys": ({"bias": (2, 1, 1, _SIZE), "sinks": True}, {"softcap": 1.5}),
    "sinks": ({"sinks": True}, {}),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def _compare(given: Given, bound: float, *, mask: Mask | None = None, **options: Any) -> None:
    """Output, log-sum-exp and all gradients against dense float64."""
    dense = {name: each for name, each in options.items() if name in ("scale", "softcap")}
    blocks: dict[str, Any] = {"query_block": 8, "kv_block": 5, "bias": given.bias, "sinks": given.sinks, **options}
    (batch, heads, rows, _), columns = given.query.shape, given.key.shape[2]
    allowed = elements(mask, range(rows), range(columns), batch=batch, heads=heads)
    wide = given.wide()
    expected, expected_lse = dense_attention(wide, allowed=allowed, **dense)
    out, lse = attend(given.query, given.key, given.value, mask=mask, with_lse=True, **blocks)
    assert out.dtype is given.query.dtype
    assert relative_error(out, expected) <= bound
    assert relative_error(lse, expected_lse) <= bound
    back = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).reshape(out.shape)
    alive = expected_lse.isfinite()
    found = torch.autograd.grad((out * back.to(out)).sum() + lse[alive].sum(), given.all)
    wanted = torch.autograd.grad((expected * back).sum() + expected_lse[alive].sum(), wide.all)
    assert max(relative_error(*pair) for pair in zip(found, wanted, strict=True)) <= bound


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("mask", MASKS)
def test_it_equals_dense_attention(mask: str, feature: str, dtype: torch.dtype) -> None:
    tensors, options = FEATURES[feature]
    _compare(Given.random(**tensors, dtype=dtype), BOUNDS[dtype], mask=MASKS[mask], **options)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (129, 129), (1, 50), (50, 1), (33, 70), (70, 33)], ids=str)
@pytest.mark.parametrize("blocks", [(1, 2), (16, 64), (64, 16), (1000, 1000)], ids=str)
@pytest.mark.parametrize("mask", [None, masks.causal(), masks.window(3, 2)], ids=["none", "causal", "window"])
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["fused", "plain"])
def test_any_lengths_and_block_sizes_do(
    lengths: tuple[int, int], blocks: tuple[int, int], mask: Mask | None, softcap: float | None
) -> None:
    if blocks == (1, 2):
        lengths = (lengths[0] // 4 + 1, lengths[1] // 4 + 1)  # thousands of blocks show no more
    given = Given.random(batch=1, heads=(2, 1), lengths=lengths)
    _compare(given, 1e-12, mask=mask, softcap=softcap, query_block=blocks[0], kv_block=blocks[1])


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["fused", "plain"])
@pytest.mark.parametrize("shape", list(product((1, 2), (1, 4), (1, _SIZE), (1, _SIZE))), ids=str)
def test_masks_of_one_row_for_all_queries_and_of_one_column_for_all_keys_do(
    shape: tuple[int, ...], softcap: float | None
) -> None:
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) > 0.4
    given = Given.random(batch=2, heads=(4, 2))
    expected, _ = dense_attention(given.wide(), allowed=allowed, softcap=softcap)
    found = attend(given.query, given.key, given.value, mask=masks.dense(allowed), softcap=softcap)
    assert relative_error(found, expected) <= 1e-12
    _compare(given, 1e-12, mask=masks.dense(allowed), softcap=softcap)


@pytest.mark.parametrize("valid", [[1, 1, 0, 1, 1, 0], [1] * 6, [0, 1, 1, 1, 1, 1]], ids=str)
def test_masks_that_hide_keys_anywhere_do(valid: list[int]) -> None:
    given = Given.random(batch=1, heads=(2, 2), lengths=(6, 6))
    expected, _ = dense_attention(given.wide(), allowed=torch.tensor(valid).bool()[None, None, None])
    for mask in (masks.padding(torch.tensor([valid])), masks.dense(torch.tensor(valid).bool().expand(1, 2, 1, 6))):
        found = attend(given.query, given.key, given.value, mask=mask, query_block=4, kv_block=4)
        assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_no_queries_or_no_keys_give_zeros(lengths: tuple[int, int], sinks: bool) -> None:
    given = Given.random(lengths=lengths, sinks=sinks)
    out, lse = attend(given.query, given.key, given.value, sinks=given.sinks, mask=masks.causal(), with_lse=True)
    assert out.shape == given.query.shape
    assert not out.any()
    assert torch.equal(lse, dense_attention(given)[1])
    assert not any(bool(each.any()) for each in torch.autograd.grad(out.sum(), given.all))


def test_an_empty_batch_is_one() -> None:
    query = torch.zeros(0, 2, 4, 8, requires_grad=True)
    attend(query, query, query, mask=masks.causal()).sum().backward()
    assert query.grad is not None


@pytest.mark.parametrize("mask", ["causal", "window", "packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_torch_gets(mask: str, dtype: torch.dtype) -> None:
    given = Given.random(heads=(4, 4), dtype=dtype)
    allowed = elements(MASKS[mask], range(_SIZE), range(_SIZE), batch=2, heads=4).expand(2, 1, _SIZE, _SIZE).clone()
    allowed[..., 0] = True  # torch gives no number to rows without a key
    ours = attend(given.query, given.key, given.value, mask=masks.dense(allowed), query_block=8, kv_block=8)
    theirs = functional.scaled_dot_product_attention(given.query, given.key, given.value, attn_mask=allowed)
    wide = given.wide()
    exact, _ = dense_attention(wide, allowed=allowed)
    wanted = [exact, *torch.autograd.grad(exact.sum(), wide.all)]
    found, peer = ([out, *torch.autograd.grad(out.sum(), given.all)] for out in (ours, theirs))
    for one, other, right in zip(found, peer, wanted, strict=True):
        assert one.dtype is dtype
        assert relative_error(one, right) <= max(2 * relative_error(other, right), torch.finfo(dtype).eps)


def test_memory_layouts_do_not_matter() -> None:
    given = Given.random()
    plain = attend(given.query, given.key, given.value, mask=masks.causal())
    queries = given.query.transpose(1, 2).contiguous().transpose(1, 2)
    keys = given.key.detach().repeat_interleave(2, -1)[..., ::2]
    assert torch.equal(attend(queries, keys, given.value, mask=masks.causal()), plain)
    values = given.value.detach()[:, :1].expand(2, 2, _SIZE, 8)
    expanded, copied = (attend(queries, keys, each, mask=masks.causal()) for each in (values, values.contiguous()))
    assert torch.equal(expanded, copied)


@pytest.mark.parametrize("mask", ["none", "causal", "window", "packed", "dense", "nothing"])
def test_both_derivatives_are_those_of_finite_differences(mask: str) -> None:
    length = 6
    given = Given.random(batch=2, heads=(2, 1), lengths=(length, 9), widths=(3, 2), bias=(2, length, 1), sinks=True)

    def work(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, bias, sinks = tensors
        return attend(
            query, key, value, bias=bias, sinks=sinks, mask=MASKS[mask], softcap=1.5, dropout_p=0.3, dropout_seed=3,
            query_block=4, kv_block=5, with_lse=True,
        )  # fmt: skip

    fast = mask != "nothing"  # the fast way does not take gradients that are 0 throughout
    assert gradcheck(work, given.all, fast_mode=fast)
    assert gradgradcheck(work, given.all, fast_mode=fast)


@pytest.mark.parametrize("mask", ["causal", "window", "packed", "dense"])
def test_fused_blocks_have_second_derivatives(mask: str) -> None:
    given = Given.random(batch=2, heads=(2, 1), lengths=(5, 11), widths=(3, 2))

    def work(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, mask=MASKS[mask], query_block=4, kv_block=5)

    assert gradcheck(work, given.all, fast_mode=True)
    assert gradgradcheck(work, given.all, fast_mode=True)


def test_functional_derivatives_are_the_same() -> None:
    given = Given.random(batch=1, heads=(2, 1), lengths=(5, 11), widths=(3, 2))

    def once(query: Tensor) -> Tensor:
        return attend(query, given.key.detach(), given.value.detach(), mask=masks.causal(), kv_block=5).square().sum()

    def twice(query: Tensor) -> Tensor:
        return torch.func.grad(once)(query).square().sum()

    (first,) = torch.autograd.grad(once(given.query), given.query, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), given.query)
    assert relative_error(torch.func.grad(once)(given.query.detach()), first) <= 1e-12
    assert relative_error(torch.func.grad(twice)(given.query.detach()), second) <= 1e-12


@pytest.mark.slow
def test_every_element_of_both_derivatives_is_right() -> None:
    given = Given.random(batch=1, heads=(2, 1), lengths=(3, 4), widths=(2, 2), bias=(2, 3, 1), sinks=True)

    def work(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value, bias, sinks = tensors
        return attend(query, key, value, bias=bias, sinks=sinks, query_block=2, kv_block=3, with_lse=True)

    assert gradcheck(work, given.all)
    assert gradgradcheck(work, given.all)


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}, {"dropout_p": 0.2}], ids=str)
def test_only_inputs_output_and_log_sum_exp_are_kept(options: dict[str, Any]) -> None:
    given = Given.random(lengths=(200, 200))
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        out, lse = attend(given.query, given.key, given.value, mask=masks.causal(), with_lse=True, **options)
    wanted = [given.query, given.key, given.value, out, lse]
    assert [(each.data_ptr(), each.shape) for each in kept] == [(each.data_ptr(), each.shape) for each in wanted]


def test_a_bias_is_the_same_as_tensor_and_as_function() -> None:
    given = Given.random()
    tensor = alibi(torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64))(range(_SIZE), range(_SIZE))
    given.bias = tensor
    expected, _ = dense_attention(given, allowed=elements(masks.causal(), range(_SIZE), range(_SIZE)))
    for bias in (tensor, alibi(-tensor[0, :, 0, 1])):
        found = attend(given.query, given.key, given.value, bias=bias, mask=masks.causal(), query_block=4, kv_block=7)
        assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float64).min])
def test_the_lowest_bias_is_a_mask(least: float) -> None:
    given = Given.random()
    allowed = elements(MASKS["dense"], range(_SIZE), range(_SIZE), batch=2)
    allowed[:, :, 5] = False
    bias = torch.zeros(2, 1, _SIZE, _SIZE, dtype=torch.float64).masked_fill(~allowed, least)
    found = attend(given.query, given.key, given.value, bias=bias, mask=masks.causal(), query_block=8, kv_block=8)
    causal = elements(masks.causal(), range(_SIZE), range(_SIZE))
    expected, _ = dense_attention(given, allowed=allowed & causal)
    assert relative_error(found, expected) <= 1e-12
    gradients = [torch.autograd.grad(each.square().sum(), given.all) for each in (found, expected)]
    assert max(relative_error(*pair) for pair in zip(*gradients, strict=True)) <= 1e-12


def test_autocast_casts_as_for_torch() -> None:
    given = Given.random(heads=(2, 2), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(given.query, given.key, given.value, mask=masks.causal())
        theirs = functional.scaled_dot_product_attention(given.query, given.key, given.value, is_causal=True)
    assert out.dtype is theirs.dtype is torch.bfloat16
    assert torch.equal(out, theirs)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"query": torch.zeros(2, 4, 8)}, {}, "takes [batch, heads, tokens, d], not query [2, 4, 8]"),
        ({"query": torch.zeros(1, 3, 4, 8)}, {}, "heads must be a multiple of kv_heads"),
        ({"key": torch.zeros(1, 2, 5, 8)}, {}, "the other sizes equal"),
        ({"key": torch.zeros(1, 2, 4, 8).half()}, {}, "give them one floating dtype"),
        ({"value": torch.zeros(1, 2, 4, 0)}, {}, "without heads or width there is nothing to attend by"),
        ({}, {"sinks": torch.zeros(3)}, "sinks [3] must be one score per head, [4]"),
        ({}, {"bias": torch.zeros(3, 4)}, "a bias [3, 4] does not broadcast to the scores [1, 4, 4, 4]"),
        ({}, {"dropout_p": 1.5}, "dropout_p=1.5 is no share"),
        ({}, {"kv_block": 0}, "must be at least 1"),
        ({}, {"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({}, {"query_positions": range(3)}, "positions of queries are [range(0, 3)]"),
        ({}, {"mask": masks.documents(torch.arange(3)[:, None].expand(3, 4))}, "3 samples of 4 tokens"),
        ({}, {"mask": masks.dense(torch.ones(3, 4).bool())}, "does not broadcast"),
        ({}, {"mask": masks.function(lambda b, h, q, k: q if q > k else k)}, "without looking at single values"),
        ({}, {"bias": alibi(torch.zeros(4, requires_grad=True))}, "give the bias as a tensor"),
        ({}, {"droput_p": 0.1}, "did you mean 'dropout_p'?"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Tensor], options: dict[str, Any], message: str) -> None:
    given = {name: torch.zeros(1, heads, 4, 8) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    with pytest.raises(WrapError) as caught:
        attend(**{**given, **change}, **options)
    assert message in str(caught.value)
