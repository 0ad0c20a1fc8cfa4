"""Tests that `make wide` runs though they are no cells of a matrix: long ones beside a shorter one of the same kind.

`make test` is for whoever waits for it. What stands here takes ten seconds and more, and says again, on another node,
by another way or for longer, what a test says that stays.
"""

from collections.abc import Iterable

__all__ = ["LATER", "is_later"]

_CALLS = "test_every_rank_calls_what_the_real_one_calls_in_the_same_order_and_takes_its_memory"
_FAKE = f"tests/parallel/test_fake_rank.py::{_CALLS}"
_HOSTED = "tests/launch/paper/test_hosted.py::test_memory_on_paper_is_that_of_a_run_here"
_CLAIM = "tests/launch/test_jobsets.py::test_a_training_goes_on_from_the_checkpoint_on_its_claim_with_the_same_losses"
_EXPERTS = "tests/parallel/test_experts.py::test_checkpoints_move_between_numbers_of_ranks"
_SECRETS = "tests/launch/test_secrets.py::test_a_secret_that_a_rank_prints_and_dies_of_is_nowhere"
_CUT_OFF = "test_a_first_node_that_is_cut_off_is_named_and_the_run_goes_on_when_slurm_hears_of_it_again"

LATER = (
    # each way of dealing stays once; these are their meetings, and long sequences
    *(
        f"{_FAKE}[{each}]"
        for each in ("dp, by spans", "pp x fsdp x tp", "tp x pp", "ep of slices x fsdp", "ep of modules")
    ),
    *(
        f"{_FAKE}[{each}]"
        for each in ("fsdp layered, by spans, inputs in host memory", "ep, tokens once", "ep bi-level")
    ),
    *(f"{_HOSTED}[{each}]" for each in ("spans", "capped attention, dealt", "shards and spans", "spans that drop")),
    f"{_EXPERTS}[switch_transformers]",
    f"{_EXPERTS}[mixtral]",
    # runs that fall and go on: each cluster stays with one way to fall
    f"{_CLAIM}[evict-0-preempt-1]",
    f"{_CLAIM}[kill-1-node-1]",
    "tests/launch/test_elastic_jobsets.py::test_a_training_begins_on_the_pods_that_came_and_goes_on_with_more_of_the_same",
    f"tests/launch/test_batch.py::{_CUT_OFF}[True]",
    "tests/launch/test_batch.py::test_a_preemption_of_which_only_the_tasks_hear_lets_ranks_save_in_its_grace",
    "tests/launch/test_batch.py::test_a_preemption_that_ranks_did_not_live_to_save_in_is_one_all_the_same",
    "tests/launch/test_batch.py::test_a_requeue_without_a_grace_lets_ranks_save_while_slurm_waits_to_kill",
    "tests/launch/test_batch.py::test_the_signal_that_ends_runs_warns_where_the_job_wants_it_and_slurm_goes_on",
    "tests/launch/test_sweeping.py::test_tasks_and_the_whole_array_are_cancelled_from_another_terminal",
    "tests/launch/test_launch.py::test_restarts_count_once_for_the_whole_job_and_keep_their_logs[1]",
    "tests/launch/test_fetch.py::test_a_launch_shows_lines_of_pods_and_ends_with_code_and_reason_of_the_rank_that_failed_first[j",
    "tests/clusters/test_pod.py::test_a_pod_that_has_to_go_lets_ranks_save_and_the_next_pods_count_on[True]",
    "tests/clusters/test_pod.py::test_a_run_that_was_given_up_does_not_ask_to_be_started_again_whatever_its_rank_ended_with[75]",
    "tests/clusters/test_prefork.py::test_a_forked_rank_sees_what_an_executed_one_sees[1]",
    "tests/clusters/test_prefork.py::test_a_forked_rank_sees_what_an_executed_one_sees[2000]",
    "tests/launch/worker/test_faults.py::test_a_killed_and_resumed_training_ends_with_the_same_bits",
    "tests/parallel/test_forks.py::test_a_fork_that_the_kernel_refuses_is_told",
    "tests/parallel/test_forks.py::test_imports_that_fail_are_told",
    f"{_SECRETS}[mpi]",
    f"{_SECRETS}[two nodes]",
    # one of several that measure, search or read much
    "tests/clusters/test_calibrate.py::test_two_ranks_of_this_machine_are_measured_and_loaded",
    "tests/clusters/simulated/test_family.py::test_the_ratio_holds_with_what_hardware_reaches",
    "tests/clusters/simulated/test_family.py::test_over_ethernet_it_is_still_faster_than_the_best_contiguous_layout_over_inf",
    "tests/clusters/test_kubernetes_manifest.py::test_whatever_the_schema_of_kubernetes_refuses_of_a_pod_ours_refuses_too",
)
"""How their names begin."""


def is_later(name: str, later: Iterable[str] = LATER) -> bool:
    """Whether a test waits for `make wide`.

    >>> is_later("tests/x.py::test_that[two]", ["tests/x.py::test_that[two"])
    True
    """
    return name.startswith(tuple(later))
