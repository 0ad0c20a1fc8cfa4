"""Merging partial attention: in any order, with any difference of magnitude, with empty rows."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from meshwright.parallel.blockwise.merge import Partial, empty_partial, merge, merge_into


def _attention(scores: Tensor, values: Tensor) -> Partial:
    lse = scores.logsumexp(-1)
    return Partial((scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp() @ values, lse)


def _pieces(dtype: torch.dtype, shift: float) -> tuple[list[Partial], Partial]:
    """Three parts of the keys, and all of them; the second is `shift` above the first, the third is empty."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 5, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(1, 2, 9, 4, generator=generator, dtype=torch.float64)
    scores[..., 3:6] += shift
    scores[..., 6:] = -torch.inf
    scores[:, :, 2] = -torch.inf  # a row without a key in any part
    scores[:, :, 4, :3] = -torch.inf  # and one without a key in the first
    parts = [_attention(scores[..., cut], values[..., cut, :]) for cut in (slice(3), slice(3, 6), slice(6, 9))]
    return [Partial(*(each.to(dtype) for each in part)) for part in parts], _attention(scores, values)


def _same(found: Partial, expected: Partial, bound: float) -> None:
    assert torch.isfinite(found.out).all()
    assert torch.equal(found.lse == -torch.inf, expected.lse == -torch.inf)
    assert float((found.out.double() - expected.out).abs().max()) <= bound
    alive = expected.lse.isfinite()
    assert (
        float(((found.lse.double() - expected.lse)[alive] / expected.lse[alive].abs().clamp_min(1.0)).abs().max())
        <= bound
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 80.0, -80.0])
def test_any_order_and_grouping_is_attention_over_all_keys(dtype: torch.dtype, bound: float, shift: float) -> None:
    parts, expected = _pieces(dtype, shift)
    for one, two, three in permutations(parts):
        _same(merge(merge(one, two), three), expected, bound)
        _same(merge(one, merge(two, three)), expected, bound)
        so_far = Partial(*(each.clone() for each in one))
        merge_into(so_far, two)
        merge_into(so_far, three)
        _same(so_far, expected, bound)


def test_nothing_changes_nothing() -> None:
    (part, *_), _ = _pieces(torch.float32, 0.0)
    nothing = empty_partial(part.out, part.out.shape[-1])
    for both in (merge(part, nothing), merge(nothing, part)):
        assert torch.equal(both.out, part.out)
        assert torch.equal(both.lse, part.lse)
    assert torch.equal(merge(nothing, nothing).lse, nothing.lse)
    assert not merge(nothing, nothing).out.any()


def test_half_precision_is_summed_in_single() -> None:
    assert empty_partial(torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16), 4).out.dtype is torch.float32
    so_far = empty_partial(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16), 1)
    for number in range(1, 400):
        merge_into(so_far, Partial(torch.full((1, 1, 1, 1), float(number % 2)).bfloat16(), torch.zeros(1, 1, 1)))
    assert float(so_far.out) == pytest.approx(200 / 399, abs=1e-5)


def test_gradients_go_through_a_merge_of_empty_rows() -> None:
    parts, _ = _pieces(torch.float64, 1e4)
    leaves = [each.requires_grad_() for part in parts for each in part]
    both = merge(merge(*parts[:2]), parts[2])
    found = torch.autograd.grad(both.out.sum() + both.lse[both.lse.isfinite()].sum(), leaves)
    assert all(bool(each.isfinite().all()) for each in found)
