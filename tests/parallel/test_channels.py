import pytest
import torch

import meshwright as mw
from meshwright.parallel.channels import Channels
from meshwright.parallel.collectives import Groups
from meshwright.testing import run_ranks

pytestmark = pytest.mark.slow


def _both_ways(ranks: int) -> tuple[list[list[float]], bool]:
    """What a rank's two neighbours send it under one tag, all at once; and whether both ways share a connection."""
    channels = Channels(groups := Groups(mw.Mesh(pp=ranks)), "pp", [(each, each + 1) for each in range(ranks - 1)])
    here = groups.rank
    others = [each for each in (here - 1, here + 1) if 0 <= each < ranks]
    made = {each: torch.empty(2) for each in others}
    arriving = [channels.receive(made[each], each, tag=5) for each in others]
    sent = [channels.send(torch.tensor([float(here), float(each)]), each, tag=5) for each in others]
    for each in (*arriving, *sent):
        each.wait()
    there, back = channels._sends_to(others[0])[0], channels._receives_from(others[0])[0]
    return [made[each].tolist() for each in others], there.__self__ is back.__self__  # type: ignore[attr-defined]


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_neighbours_send_each_other_at_once_arrives(ranks: int) -> None:
    for here, (found, _) in enumerate(run_ranks(_both_ways, mw.Mesh(pp=ranks), ranks)):
        assert found == [[each, here] for each in (here - 1, here + 1) if 0 <= each < ranks]


def test_what_a_rank_sends_shares_no_connection_with_what_it_receives() -> None:
    assert [shared for _, shared in run_ranks(_both_ways, mw.Mesh(pp=2), 2)] == [False, False]
