"""Operations are counted by what they multiply, read and write."""

import pytest
import torch
from torch import Tensor, nn

from meshwright.parallel.operations import Tally, moved_bytes
from meshwright.parallel.work import Product
from tests.parallel.counting import Counting


def _counted(work, *tensors: Tensor) -> Tally:  # type: ignore[no-untyped-def]
    with Counting() as counting:
        work(*tensors)
    return counting.tally


def test_views_move_nothing() -> None:
    tally = _counted(lambda x: x.view(6).t().unsqueeze(0).expand(4, 6)[:, :2], torch.zeros(2, 3))
    assert (tally.moved_bytes, tally.operations) == (0, 0)


def test_an_operation_reads_its_inputs_and_writes_its_output() -> None:
    tally = _counted(lambda x: (x + x) * 2, torch.zeros(2, 3))
    assert (tally.moved_bytes, tally.operations) == (4 * 6 * 4, 2)  # the same input is read once


def test_expanded_inputs_are_read_once_and_changes_in_place_read_and_write() -> None:
    row = torch.zeros(3).expand(2, 3)
    assert _counted(lambda x: x.clone(), row).moved_bytes == 4 * (3 + 6)
    assert _counted(lambda x: x.add_(1), torch.zeros(2, 3)).moved_bytes == 4 * 12
    assert _counted(lambda x: x.zero_(), torch.zeros(2, 3)).moved_bytes == 4 * 6


def test_a_lookup_reads_the_rows_it_finds() -> None:
    table, ids = torch.zeros(1000, 4), torch.zeros(3, dtype=torch.long)
    assert moved_bytes("embedding", [table, ids], [torch.zeros(3, 4)]) == 8 * 3 + 2 * 4 * 12


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_is_three_products(bias: bool) -> None:
    layer, x = nn.Linear(4, 5, bias=bias), torch.zeros(3, 4, requires_grad=True)
    tally = _counted(lambda x: layer(x).sum().backward(), x)
    assert sorted(each.flops for each in tally.products) == [2 * 3 * 4 * 5] * 3
    assert tally.products[0] == Product(3, 5, 4, precision="fp32")


def test_a_convolution_is_a_product_of_pixels_with_filters() -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2), torch.zeros(2, 4, 5, 5, requires_grad=True)
    tally = _counted(lambda x: layer(x).sum().backward(), x)
    assert tally.products == [Product(50, 3, 18, 2, precision="fp32")] * 3
    assert tally.products[0].flops == 2 * 2 * 25 * 6 * 18


def test_elements_of_functions_are_counted_by_name_in_place_or_not() -> None:
    tally = _counted(lambda x: torch.nn.functional.gelu(x.tanh_().tanh(), approximate="tanh"), torch.zeros(2, 3))
    assert tally.computed == {"tanh": 12, "gelu_tanh": 6}
    assert tally.work().computed == (("gelu_tanh", 6), ("tanh", 12))
    assert not _counted(lambda x: x + x, torch.zeros(2, 3)).computed
