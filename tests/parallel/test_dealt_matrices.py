from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from meshwright.parallel.dealt_matrices import DealtColumns, DealtRows, Entry

ALONE: Any = SimpleNamespace(rank=0, size=1, sum=lambda tensor: tensor)


def test_a_value_that_several_matrices_read_enters_once_until_the_region_ends() -> None:
    entry, value = Entry(ALONE), torch.ones(2, 3, requires_grad=True)
    entered = entry(value)
    assert entry(value) is entered
    entry.close()
    assert entry(value) is not entered


def test_a_matrix_on_one_rank_gives_what_it_gave_and_its_copy_computes_with_its_own_parameters() -> None:
    for make in (
        lambda matrix: DealtColumns(matrix, Entry(ALONE), transposed=False),
        lambda matrix: DealtRows(matrix, ALONE, Entry(ALONE), transposed=False, length=None),
    ):
        matrix, value = nn.Linear(3, 4), torch.ones(2, 3)
        before = matrix(value)
        matrix.forward = make(matrix)
        copied = deepcopy(matrix)
        torch.nn.init.zeros_(copied.weight)
        assert torch.equal(matrix(value), before)
        assert torch.equal(copied(value), copied.bias.expand(2, 4))
