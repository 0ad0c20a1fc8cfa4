"""Products of groups, by loop and by torch: the same numbers and gradients."""

import re

import pytest
import torch
from torch import Tensor

from meshwright.moe import grouped
from meshwright.moe.errors import DispatchError
from meshwright.moe.grouped import agrees, grouped_product, looped_product

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return torch.einsum("ri,rio->ro", rows, matrices[experts])


@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 0], [0, 0, 7], [1, 2, 4]])
@pytest.mark.parametrize("widths", [(16, 24), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_group_meets_its_matrix(counts: list[int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    rows = drawn(sum(counts), widths[0], seed=0, dtype=dtype).requires_grad_()
    matrices = drawn(3, *widths, seed=1, dtype=dtype).requires_grad_()
    wide = [each.detach().double().requires_grad_() for each in (rows, matrices)]
    found, expected = grouped_product(rows, matrices, torch.tensor(counts)), by_hand(*wide, counts)
    upstream = drawn(*expected.shape, seed=2, dtype=dtype)
    pairs = [(found, expected)]
    gradients = torch.autograd.grad(found, (rows, matrices), upstream)
    pairs += zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True)
    bound = 16 * torch.finfo(dtype).eps
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound)


def test_float64_is_looped_to_the_last_bit_and_differentiable_twice() -> None:
    leaves = drawn(5, 3, seed=0).requires_grad_(), drawn(3, 3, 2, seed=1).requires_grad_()
    counts = torch.tensor([2, 0, 3])
    assert torch.equal(grouped_product(*leaves, counts), looped_product(*leaves, counts))
    assert torch.autograd.gradcheck(lambda a, b: grouped_product(a, b, counts), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b: grouped_product(a, b, counts), leaves)


def test_torch_is_asked_where_it_fits_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noted(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        asked.append(rows.dtype)
        return looped_product(rows, matrices, counts)

    monkeypatch.setattr(grouped, "_by_torch", noted)
    monkeypatch.setattr(grouped, "_AGREED", {(kind, CPU): True for kind in grouped._DTYPES})
    counts = torch.tensor([1, 1])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        grouped_product(drawn(2, 8, seed=0, dtype=dtype), drawn(2, 8, 8, seed=1, dtype=dtype), counts)
    assert asked == [torch.float32, torch.bfloat16]
    grouped_product(drawn(2, 9, seed=0, dtype=torch.float32), drawn(2, 9, 8, seed=1, dtype=torch.float32), counts)
    grouped_product(
        drawn(0, 8, seed=0, dtype=torch.float32), drawn(2, 8, 8, seed=1, dtype=torch.float32), torch.tensor([0, 0])
    )
    assert len(asked) == 2  # neither odd widths nor nothing


def test_autocast_casts_as_it_does_for_other_products() -> None:
    counts = torch.tensor([3, 0, 4])
    for widths in ((16, 24), (5, 3)):
        rows, matrices = (
            drawn(7, widths[0], seed=0, dtype=torch.float32),
            drawn(3, *widths, seed=1, dtype=torch.float32),
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = [grouped_product(rows, matrices, counts), looped_product(rows, matrices, counts)]
            wide = grouped_product(rows.double(), matrices.double(), counts)
        assert [each.dtype for each in (*found, wide)] == [torch.bfloat16, torch.bfloat16, torch.float64]
        torch.testing.assert_close(*found)


def test_a_product_that_means_something_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        return looped_product(rows, matrices, counts.flip(0))

    def spoiled(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        made = looped_product(rows, matrices, counts)
        return made + (float("nan") if 0 in counts[:1] else 0.0)

    def refusing(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
        raise RuntimeError("not here")

    for other in (wrong, spoiled, refusing):
        monkeypatch.setattr(grouped, "_by_torch", other)
        assert not agrees(torch.float32, CPU)
        monkeypatch.setattr(grouped, "_AGREED", {})
        rows, matrices = drawn(2, 8, seed=0, dtype=torch.float32), drawn(2, 8, 8, seed=1, dtype=torch.float32)
        counts = torch.tensor([0, 2])
        assert torch.equal(grouped_product(rows, matrices, counts), looped_product(rows, matrices, counts))


def test_torch_agrees_here() -> None:
    assert all(agrees(dtype, CPU) for dtype in grouped._DTYPES)
    assert not agrees(torch.float64, CPU)


def test_torch_is_trusted_whatever_the_pass_that_asks_first_does_with_saved_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grouped, "_AGREED", {})
    rows, matrices = drawn(2, 8, seed=0, dtype=torch.float32), drawn(2, 8, 8, seed=1, dtype=torch.float32)
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: None):  # type: ignore[arg-type, return-value]
        grouped_product(rows, matrices, torch.tensor([0, 2]))
    assert grouped._AGREED[torch.float32, CPU]


def test_what_does_not_fit_is_refused() -> None:
    rows, matrices = torch.zeros(4, 3), torch.zeros(2, 3, 5)
    with pytest.raises(DispatchError, match=re.escape("4 rows for 2 experts that get [1, 2]; counts say how many")):
        grouped_product(rows, matrices, torch.tensor([1, 2]))
    with pytest.raises(DispatchError, match=re.escape("4 rows for 2 experts that get [4]")):
        grouped_product(rows, matrices, torch.tensor([4]))
    with pytest.raises(DispatchError, match=re.escape("rows [4, 3] and matrices [2, 5, 3] of experts")):
        grouped_product(rows, matrices.mT, torch.tensor([1, 3]))
