"""What a schedule is at, in words, with the rank that a receive waits for."""

import pytest

from meshwright.parallel.pipeline.actions import Action
from meshwright.parallel.pipeline.observe import both, watch_progress
from meshwright.parallel.pipeline.runtime import Phase
from meshwright.parallel.progress import Progress, told

HOMES, RANKS = (0, 1, 0, 1), (4, 6)


@pytest.mark.parametrize(
    ("text", "phase", "waits_for"),
    [
        ("2RECV_F1", Phase.WAITS, (6,)),
        ("1RECV_F1", Phase.WAITS, (4,)),
        ("1RECV_B1", Phase.WAITS, (4,)),
        ("2RECV_B0", Phase.WAITS, (6,)),
        ("2RECV_F1", Phase.DONE, ()),
        ("2F1", Phase.WAITS, ()),
        ("0SEND_F1", Phase.WAITS, ()),
        ("3REDUCE_GRAD", Phase.RUNS, ()),
    ],
)
def test_a_receive_waits_for_the_rank_of_the_stage_that_sends(
    text: str, phase: Phase, waits_for: tuple[int, ...]
) -> None:
    progress = Progress()
    watch_progress(progress, HOMES, RANKS)(Action.parse(text), phase)
    found = told(progress.at)
    assert found.waits_for == waits_for
    assert text in found.words


def test_an_action_is_told_in_words() -> None:
    progress = Progress()
    watch_progress(progress, HOMES, RANKS)(Action.parse("2F1"), Phase.RUNS)
    assert told(progress.at).words == "2F1 (forward, stage 2, micro-batch 1)"


def test_two_watches_are_told_both() -> None:
    seen: list[str] = []
    watch = both(lambda action, phase: seen.append(f"a{action}"), lambda action, phase: seen.append(f"b{action}"))
    watch(Action.parse("0F0"), Phase.RUNS)
    assert seen == ["a0F0", "b0F0"]
