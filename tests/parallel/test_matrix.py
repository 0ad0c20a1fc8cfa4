"""Where axes meet: every family on every axis, and every two of axes and options, is the plain run."""

from typing import Any

import pytest

from meshwright.parallel.errors import WrapError
from tests.parallel.cells import tiered
from tests.parallel.matrix import WHOLE, Cell, cells

pytestmark = pytest.mark.slow


ALL = list(cells(WHOLE))


def _seen(cell: Cell) -> tuple[str, dict[str, int], dict[str, Any]]:
    return cell.family, cell.degrees, cell.options


def _why(cell: Cell) -> tuple[str]:
    """A refusal looks at the family and at the axis or option that it cannot have, whatever stands beside it."""
    return (f"{cell.family}: {cell.refusal}",)


@pytest.mark.parametrize("cell", tiered((each for each in ALL if each.refusal is not None), _why), ids=str)
def test_a_cell_that_cannot_be_had_is_refused(cell: Cell) -> None:
    with pytest.raises(WrapError, match=cell.refusal):
        cell.run()


@pytest.mark.parametrize("cell", tiered((each for each in ALL if each.refusal is None), _seen), ids=str)
def test_a_cell_is_the_plain_run(cell: Cell) -> None:
    report = cell.run()
    assert report.ok, str(report)
    assert report.notes == ()


def test_the_whole_matrix_holds_every_triple() -> None:
    triples = {frozenset(degrees) for degrees, _ in WHOLE}
    assert frozenset({"dp", "fsdp", "tp"}) in triples
    assert {options.get("zero_stage", 3) for degrees, options in WHOLE if "fsdp" in degrees} == {1, 2, 3}
