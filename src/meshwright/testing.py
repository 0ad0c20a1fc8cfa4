"""What a user's own tests need: functions run on real ranks of this machine, and a pytest fixture for it.

>>> from meshwright import Mesh
>>> from meshwright.testing import run_ranks
>>> run_ranks(lambda: 1 + 1, Mesh(dp=2))
[2, 2]
"""

from collections.abc import Callable
from typing import Any

import pytest

from meshwright.parallel.mesh import Mesh

__all__ = ["run_on_ranks", "run_ranks"]


def run_ranks(function: Callable[..., Any], mesh: Mesh, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Calls `function(*args)` on every rank of a mesh here; see `meshwright.parallel.ranks.run_ranks`."""
    from meshwright.parallel import ranks

    return ranks.run_ranks(function, mesh, *args, timeout_s=timeout_s)


@pytest.fixture
def run_on_ranks() -> Callable[..., list[Any]]:
    """The fixture form of `run_ranks`: `def test_it(run_on_ranks): run_on_ranks(function, Mesh(dp=2))`."""
    return run_ranks
