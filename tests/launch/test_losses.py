"""What is known of a lost node: why, since when, and from when on nothing of it can be there."""

from meshwright.clusters.failure import Failure
from meshwright.clusters.retry import Decision
from meshwright.launch.losses import Losses


def gone(node: str, **more: object) -> dict[str, object]:
    return {"event": "gone", "node": node, "code": -9, **more}


def test_the_first_loss_is_the_time_and_the_last_to_end_the_wait() -> None:
    found = Losses()
    found.take(gone("b", ends_within_s=6.0), 100.0)
    found.take(gone("c", ends_within_s=2.0), 103.0)
    assert (found.since_unix_s, found.until_unix_s) == (100.0, 106.0)
    assert set(found.codes) == {"b", "c"}


def test_a_cluster_that_knows_why_is_believed() -> None:
    found = Losses()
    found.take(gone("b"), 1.0)
    found.take(gone("c", exit_code=77, message="host c: its key is unknown"), 1.0)
    assert found.cause_of("b") == (69, "the agent of b died (SIGKILL); its ranks were ended")
    assert found.cause_of("c") == (77, "host c: its key is unknown")


def test_what_was_left_out_is_kept_with_its_reason_and_the_next_start_begins_with_nothing_lost() -> None:
    found = Losses()
    found.take(gone("b"), 5.0)
    found.exclude(Decision(True, "", 1.0, 2, Failure("b", "node"), 40, ("b",)), 9.0)
    assert found.excluded == [
        {
            "node": "b",
            "why": "the agent of b died (SIGKILL); its ranks were ended",
            "attempt": 2,
            "step": 40,
            "lost": True,
        }
        | {"time_unix_s": 5.0}
    ]
    assert (found.codes, found.causes, found.since_unix_s) == ({}, {}, 0.0)
    worn = Decision(True, "", 1.0, 3, Failure("c", "node", evidence="uncorrectable ECC error"), 41, ("c",))
    found.exclude(worn, 11.0)
    assert (found.excluded[1]["why"], found.excluded[1]["time_unix_s"]) == ("uncorrectable ECC error", 11.0)
