"""Nodes that nobody has seen get a number of ranks that was said, or none."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.clusters.base import Program, StartRequest
from meshwright.clusters.dealing import ranks_per_node
from meshwright.clusters.errors import UnavailableError

REQUEST = StartRequest("j", "r", Path("/runs/r"), Program(("x",), Path("/w")), num_nodes=2)


def test_a_number_is_taken_as_it_is_and_all_ranks_are_shared_evenly() -> None:
    assert ranks_per_node(replace(REQUEST, ranks_per_node=3), "x") == 3
    assert ranks_per_node(replace(REQUEST, ranks_per_node=None, num_ranks=6), "x") == 3
    assert ranks_per_node(replace(REQUEST, ranks_per_node=None), "x") == 1


def test_a_word_is_a_number_only_where_gpus_were_asked_for() -> None:
    asked = replace(REQUEST, ranks_per_node="gpu")
    assert ranks_per_node(asked, "x", gpus=8) == 8
    for request, gpus in ((asked, None), (asked, 0), (replace(asked, ranks_per_node="cpu"), 8)):
        with pytest.raises(UnavailableError, match=r"nproc_per_node: .pu, but nobody knows; write a number"):
            ranks_per_node(request, "nobody knows", gpus=gpus)
