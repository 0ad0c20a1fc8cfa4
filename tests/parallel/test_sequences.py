"""Sequences that are dealt or cut equal the plain run: a part of the matrix of `sequence_matrix`."""

from itertools import product

import pytest

from tests.parallel.cells import tiered
from tests.parallel.sequence_matrix import ROWS, WAYS, cell


@pytest.mark.slow
@pytest.mark.parametrize(("row", "way"), tiered(product(ROWS, WAYS), lambda cell: WAYS[cell[1]]))
def test_a_sequence_that_is_dealt_or_cut_is_the_plain_run(row: str, way: str) -> None:
    found = cell(row, way)
    assert isinstance(found, float) or (row.startswith(("t5", "torch's encoder")) and way == "layers by spans"), found
