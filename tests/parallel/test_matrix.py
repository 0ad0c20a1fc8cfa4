"""Where axes meet: every family on layouts that hold all pairs of dp, fsdp, tp, sequence, micro-batches."""

import pytest

from meshwright.parallel.errors import WrapError
from tests.parallel.matrix import WHOLE, Cell, few_cells

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("cell", list(few_cells()), ids=str)
def test_a_cell_is_the_plain_run_or_is_refused(cell: Cell) -> None:
    if cell.refusal is not None:
        with pytest.raises(WrapError, match=cell.refusal):
            cell.run()
        return
    report = cell.run()
    assert report.ok, str(report)
    assert report.notes == ()


def test_the_whole_matrix_holds_every_triple() -> None:
    triples = {frozenset(degrees) for degrees, _ in WHOLE}
    assert frozenset({"dp", "fsdp", "tp"}) in triples
    assert {options.get("zero_stage", 3) for degrees, options in WHOLE if "fsdp" in degrees} == {1, 2, 3}
