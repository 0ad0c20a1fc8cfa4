"""Every decoder of `transformers` that can be made small: equal to the plain run on every axis, or refused."""

from itertools import product
from typing import Any

import pytest

import meshwright as mw
from meshwright.parallel.errors import MeshwrightError
from tests.parallel.decoders import DECODERS, decoder, rows

pytestmark = pytest.mark.wide

_LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "pp": ({"pp": 2}, {"schedule": "modular", "num_microbatches": 3}),
    "pp x fsdp": ({"pp": 2, "fsdp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    "tp": ({"tp": 2}, {}),
    "cp": ({"cp": 2}, {}),
}
_REFUSED = {
    ("recurrent_gemma", "pp"): "leaves values outside of what it gives",
    ("recurrent_gemma", "pp x fsdp"): "leaves values outside of what it gives",
    ("recurrent_gemma", "cp"): "does not work on a dealt sequence",
    ("bamba", "tp"): "1 heads, 1 key-value heads; legal degrees of tp: 1",
    ("mamba2", "tp"): "1 heads, 1 key-value heads; legal degrees of tp: 1",
    ("opt", "cp"): "does not work on a dealt sequence",
    ("xlm", "pp"): "leaves values outside of what it gives",
    ("xlm", "pp x fsdp"): "leaves values outside of what it gives",
    ("xlm", "cp"): "does not work on a dealt sequence",
}


@pytest.mark.parametrize(("name", "layout"), list(product(DECODERS, _LAYOUTS)))
def test_a_decoder_on_a_mesh_is_equal_to_the_plain_run_or_refused(name: str, layout: str) -> None:
    degrees, options = _LAYOUTS[layout]
    why = _REFUSED.get((name, layout))
    if why is not None:
        with pytest.raises(MeshwrightError, match=why):
            mw.verify(decoder(name), rows, mw.Mesh(**degrees), **options)
        return
    report = mw.verify(decoder(name), rows, mw.Mesh(**degrees), **options)
    assert report.ok, report
    assert report.max_relative_gradient_error < 1e-10
