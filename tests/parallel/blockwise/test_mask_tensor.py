"""What a model sees of a mask is the tensor that it would have seen."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise.mask import Band
from meshwright.parallel.blockwise.mask_tensor import MaskTensor, mask_and_bias
from meshwright.parallel.blockwise.masks import Frame, causal, padding

CPU = torch.device("cpu")
LOWEST = torch.finfo(torch.float32).min


def _made(dtype: torch.dtype = torch.bool) -> tuple[MaskTensor, Tensor]:
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    seen = torch.ones(4, 4, dtype=torch.bool).tril() & valid[:, None, None].bool()
    dense = seen if dtype is torch.bool else torch.zeros(2, 1, 4, 4).masked_fill(~seen, LOWEST)
    return MaskTensor(causal() & padding(valid), (2, 1, 4, 4), device=CPU, dtype=dtype), dense


def test_it_answers_questions_without_values() -> None:
    mask, dense = _made()
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.dtype, mask.device, mask.ndim, mask.size(-1)) == (dense.shape, torch.bool, CPU, 4, 4)
    assert not mask.requires_grad
    assert mask._shared.made is None


_KEEP: dict[str, Callable[[Tensor], Tensor]] = {
    "all keys": lambda mask: mask[:, :, :, :4],
    "more keys than there are": lambda mask: mask[:, :, :, :9],
    "the first keys": lambda mask: mask[:, :, :, :3],
    "the first queries": lambda mask: mask[:, :, :2],
    "itself": lambda mask: mask[...],
    "the same place": lambda mask: mask.to("cpu"),
    "the same type": lambda mask: mask.to(mask.dtype),
    "detached": lambda mask: mask.detach(),
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", _KEEP)
def test_it_stays_a_mask_where_it_is_passed_on(name: str, dtype: torch.dtype) -> None:
    mask, dense = _made(dtype)
    found = _KEEP[name](mask)
    assert isinstance(found, MaskTensor)
    assert found._shared.made is None
    assert found.shape == _KEEP[name](dense).shape
    assert torch.equal(found.values(), _KEEP[name](dense))


_COMPUTE: dict[str, Callable[[Tensor], Tensor]] = {
    "the last keys": lambda mask: mask[:, :, :, 1:],
    "without the last key": lambda mask: mask[:, :, :, :-1],
    "one sample": lambda mask: mask[:1],
    "one head": lambda mask: mask[:, 0],
    "every second key": lambda mask: mask[..., ::2],
    "for heads": lambda mask: mask.expand(2, 3, 4, 4),
    "a product": lambda mask: mask * torch.arange(4),
    "joined": lambda mask: torch.cat([mask, mask], -1),
    "chosen by": lambda mask: torch.where(mask != 0, 1.0, 2.0),
    "cast": lambda mask: mask.to(torch.float64),
    "as indices": lambda mask: torch.arange(32).reshape(2, 1, 4, 4)[mask.bool()],
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", _COMPUTE)
def test_it_is_dense_where_it_is_computed_with(name: str, dtype: torch.dtype) -> None:
    mask, dense = _made(dtype)
    found, expected = _COMPUTE[name](mask), _COMPUTE[name](dense)
    assert type(found) is Tensor
    assert found.dtype is expected.dtype
    assert torch.equal(found, expected)
    assert torch.equal(mask.values(), dense)


def test_it_is_still_a_mask_where_its_values_were_only_read() -> None:
    mask, dense = _made()
    assert torch.equal(mask.logical_not(), ~dense)
    assert bool(mask.any())
    assert mask_and_bias(mask)[0] is mask.mask
    assert mask.mask is not None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_a_model_writes_into_it_is_not_lost(dtype: torch.dtype) -> None:
    mask, dense = _made(dtype)
    for each in (mask, dense):
        each[:, :, 0, 1] = dense[0, 0, 0, 0]
    found, bias = mask_and_bias(mask)
    if dtype is torch.bool:
        assert found is not None
        assert torch.equal(found.pairs(range(4), range(4), Frame(range(2))), dense)
    else:
        assert found is None
        assert bias is not None
        assert torch.equal(bias, dense)


def test_a_change_in_place_changes_it() -> None:
    mask, dense = _made()
    mask &= torch.eye(4, dtype=torch.bool)
    dense &= torch.eye(4, dtype=torch.bool)
    assert torch.equal(mask, dense)


def test_copies_are_dense() -> None:
    mask, dense = _made()
    mine = copy.deepcopy(mask)
    assert type(mine) is Tensor
    assert torch.equal(mine, dense)


def test_a_tensor_of_a_model_is_a_mask_where_it_only_hides() -> None:
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    hides = torch.zeros(1, 1, 3, 3).masked_fill(~seen, -torch.inf)
    for given in (seen, hides):
        mask, bias = mask_and_bias(given)
        assert bias is None
        assert mask is not None
        assert torch.equal(mask.pairs(range(3), range(3), Frame()), seen)
    for given in (hides + 1, hides.masked_fill(~seen, LOWEST), hides.clone().requires_grad_()):
        mask, bias = mask_and_bias(given)
        assert mask is None
        assert bias is given
    assert mask_and_bias(None) == (None, None)
    assert mask_and_bias(MaskTensor(causal(), (1, 1, 3, 3), device=CPU)) == (Band(None, 0), None)
