"""GPUs of a running node: a fault is told once, only of the node's own GPUs, and only if it came since the start."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from meshwright.clusters.failure import Failure
from meshwright.clusters.gpus import NO_LIBRARY, READ, UNREADABLE, Ecc, Gpu, GpuReport, Heat, Xid
from meshwright.clusters.retry import Decision, RetryPolicy, decide
from meshwright.clusters.watching import GpuWatch, Watch, faults_of, shown_gpus, watch_from
from tests.clusters.evidence import gpu

BUS = "0000:01:00"


def report(*gpus: Gpu, xids: tuple[Xid, ...] | None = (), **more: Any) -> GpuReport:
    return GpuReport(READ, driver="580.1", cuda="13.0", gpus=gpus, xids=xids, **more)


def said(found: GpuReport, watch: Watch | None = None, gpus: Collection[int] | None = None, **more: Any) -> list[str]:
    return list(faults_of(found, watch or Watch(), gpus=gpus, **more))


def test_what_is_well_is_no_fault_and_each_fault_names_its_gpu() -> None:
    assert said(report(gpu(0), gpu(1))) == []
    assert said(report(gpu(0), gpu(1, ecc=Ecc(True, 0, 2, 2)))) == [
        f"GPU 1 ({BUS}): 2 uncorrected memory errors since the driver was loaded"
    ]
    assert said(report(gpu(0, error="GPU is lost"))) == ["GPU 0 (0000:00:00): GPU is lost"]


def test_gpus_of_other_nodes_of_the_machine_do_not_count() -> None:
    sick = report(gpu(0), gpu(1, ecc=Ecc(True, 0, 2, 2)), xids=(Xid(79, BUS, ""),))
    assert said(sick, gpus={0}) == []
    assert len(said(sick, gpus={1})) == 2


def test_a_driver_that_cannot_be_asked_is_a_fault_of_the_node() -> None:
    assert said(GpuReport(UNREADABLE, why="it hangs"), gpus={0}) == ["the driver cannot be asked: it hangs"]


def test_a_job_may_set_a_lower_temperature() -> None:
    warm = report(gpu(0, heat=Heat(71, 90)))
    assert said(warm, Watch(max_temp_c=72)) == []
    assert said(warm, Watch(max_temp_c=71)) == ["GPU 0: 71 C, health.watch.max_temp_c is 71"]


@pytest.mark.parametrize(("which", "numbers"), [("critical", [79]), ("any", [13, 79]), ("ignore", [])])
def test_xids_count_as_the_job_says_and_from_the_start_of_the_run(which: str, numbers: list[int]) -> None:
    old, fell, program = Xid(48, BUS, "x"), Xid(79, BUS, ""), Xid(13, BUS, "of a program")
    found = said(report(gpu(1), xids=(old, fell, program)), Watch(xid=which), before=(old,))
    assert sorted(int(words.split("Xid ")[1].split(":")[0]) for words in found) == numbers


def watched(*reports: GpuReport, watch: Watch | None = None) -> tuple[GpuWatch, list[dict[str, Any]]]:
    told: list[dict[str, Any]] = []
    left = list(reports)

    def tell(event: str, **words: object) -> None:
        told.append({"event": event, **words})

    found = GpuWatch(watch or Watch(), None, tell=tell, read=lambda: left.pop(0))
    for _ in reports:
        found.look()
    return found, told


def test_a_fault_is_told_once_however_its_numbers_go_on() -> None:
    hot = [report(gpu(0, heat=Heat(each, 90))) for each in (40, 89, 91, 40)]
    found, told = watched(*hot)
    assert [(each["event"], each["fault"]) for each in told] == [
        ("health", "GPU 0 (0000:00:00): 89 C, it slows down from 90 C")
    ]
    assert found.fault is not None
    assert found.fault[0] == told[0]["fault"]
    both = report(gpu(0, heat=Heat(89, 90)), gpu(1, heat=Heat(89, 90)))
    assert len(watched(both, both)[1]) == 2


def test_nothing_to_watch_is_said_once_and_is_no_fault() -> None:
    found, told = watched(GpuReport(NO_LIBRARY, why="no libnvidia-ml.so.1"))
    assert told[0]["found"] == "no GPU to watch: no libnvidia-ml.so.1"
    assert (told[0]["fault"], found.fault, found.ends_attempt) == (None, None, False)


def test_xids_that_were_there_before_the_run_are_not_its_own() -> None:
    old, new = Xid(79, BUS, ""), Xid(48, BUS, "")
    _, told = watched(report(gpu(1), xids=(old,)), report(gpu(1), xids=(old, new)), report(gpu(1), xids=(old, new)))
    assert [each["fault"] for each in told] == [f"GPU at {BUS}: Xid 48: a double-bit memory error"]


def test_only_a_watch_that_restarts_ends_the_attempt() -> None:
    sick = report(gpu(0, error="GPU is lost"))
    assert [watched(sick, watch=Watch(restarts=each))[0].ends_attempt for each in (True, False)] == [True, False]


def test_a_watch_comes_back_from_its_saved_form() -> None:
    from dataclasses import asdict

    watch = Watch(3.0, 80.0, "any", restarts=True)
    assert watch_from(asdict(watch)) == watch
    assert watch_from(None) is None
    assert shown_gpus(None) is None


def test_a_sick_node_is_left_out_at_the_next_restart_where_nodes_may_be() -> None:
    policy, fault = RetryPolicy(jitter=0.0, exclude_after=3), "GPU 1: 2 uncorrected memory errors"
    sick = Failure("b", "node", 78, evidence=fault, sick=fault, time_unix_s=5.0)

    def decided(policy: RetryPolicy, *failures: Failure) -> Decision:
        return decide(policy, [], failures, run_id="r", max_restarts=2)

    assert decided(policy, Failure("a"), sick).excludes == ("b",)
    assert decided(replace(policy, exclude_after=None), Failure("a"), sick).excludes == ()
    crashed = Failure("a", "exit", 1, time_unix_s=1.0)
    found = decided(policy, crashed, replace(sick, kind="", exit_code=0))
    assert (found.failure, found.excludes) == (crashed, ("b",))
