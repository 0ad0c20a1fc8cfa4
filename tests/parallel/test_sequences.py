"""Sequences that are dealt or cut equal the plain run: a part of the matrix of `sequence_matrix`."""

import pytest

from tests.parallel.cells import alternating
from tests.parallel.sequence_matrix import ROWS, WAYS, cell


@pytest.mark.parametrize(("row", "way"), alternating(ROWS, WAYS, every=14))
def test_a_sequence_that_is_dealt_or_cut_is_the_plain_run(row: str, way: str) -> None:
    found = cell(row, way)
    assert isinstance(found, float) or (row.startswith("t5") and way == "layers by spans"), found
