"""The option blockwise as users write it."""

from typing import Any

import pytest

import meshwright as mw
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.errors import WrapError
from meshwright.parallel.options import Options
from meshwright.parallel.sequence_options import SequenceOptions


def test_sizes_have_defaults_and_names() -> None:
    assert Options.of(blockwise={}).sizes == Blockwise(query_block=1024, kv_block=1024)
    assert Options.of(blockwise={"query_block": 7, "loss_block": 3}).sizes == Blockwise(query_block=7, loss_block=3)
    assert Options.of(blockwise=Blockwise(ffn_block=2)).sizes == Blockwise(ffn_block=2)
    assert Options.of().sizes is None
    assert SequenceOptions(blockwise={}) == SequenceOptions(blockwise=Blockwise())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kv_blok": 2}, "blockwise has no size 'kv_blok'; did you mean 'kv_block'?"),
        ({"kv_block": 0}, "kv_block=0 is no size of a block; give a whole number of at least 1"),
        ({"ffn_block": 4, "layer_block": 4}, "with layer_block=4 feed-forward runs by blocks too; leave out ffn_block"),
        ({"kv_block": True}, "kv_block=True is no size"),
        ({"query_block": None}, "query_block=None is no size"),
        ({"ffn_block": 1.5}, "ffn_block=1.5 is no size of a block; give a whole number of at least 1, or None"),
        ({"loss_block": 3, "loss_in_advance": 1}, "loss_in_advance=1 is neither True nor False"),
        ({"loss_in_advance": True}, "loss_in_advance is about a loss by blocks; give loss_block too"),
        (True, "blockwise=True is no mapping of sizes; write blockwise={} for the default ones"),
    ],
)
def test_a_size_that_does_not_exist_is_refused(given: Any, text: str) -> None:
    with pytest.raises(WrapError) as error:
        Options.of(blockwise=given).check(mw.Mesh())
    assert text in str(error.value)
