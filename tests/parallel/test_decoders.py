"""Every decoder of `transformers` that can be made small: equal to the plain run on every axis, or refused."""

import re
from itertools import product

import pytest

from meshwright.parallel.errors import MeshwrightError
from tests.parallel.decoders import DECODERS
from tests.parallel.decoders_matrix import LAYOUTS, PAGE, REFUSED, run


@pytest.mark.wide
@pytest.mark.parametrize(("name", "layout"), list(product(DECODERS, LAYOUTS)))
def test_a_decoder_on_a_mesh_is_equal_to_the_plain_run_or_refused(name: str, layout: str) -> None:
    why = REFUSED.get((name, layout))
    if why is not None:
        with pytest.raises(MeshwrightError, match=why):
            run(name, layout)
        return
    report = run(name, layout)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-10


def test_the_page_has_every_decoder_and_what_is_refused() -> None:
    rows = {row[0]: row[1:] for line in PAGE.read_text().splitlines() if (row := re.findall(r"[^| ][^|]*[^| ]", line))}
    for name in DECODERS:
        verdicts = dict(zip(LAYOUTS, rows[name], strict=False))
        assert verdicts == {each: "refused" if (name, each) in REFUSED else "equal" for each in LAYOUTS}, name
