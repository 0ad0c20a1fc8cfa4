"""Which experts a rank keeps."""

import re

import pytest

from meshwright.moe.errors import DispatchError
from meshwright.moe.folding import own_experts


def test_experts_lie_in_order_and_evenly() -> None:
    assert [own_experts(6, ranks=3, rank=rank) for rank in range(3)] == [range(0, 2), range(2, 4), range(4, 6)]
    with pytest.raises(DispatchError, match=re.escape("6 experts do not lie evenly on ep=4 ranks; choose ep from: 1,")):
        own_experts(6, ranks=4, rank=0)
