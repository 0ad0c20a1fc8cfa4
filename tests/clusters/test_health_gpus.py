"""Verdicts on GPUs: the faults that operators take a node out for, each with the GPU's name and what to do."""

from typing import Any

import pytest

from meshwright.clusters.evidence import Evidence, Wishes
from meshwright.clusters.gpus import UNREADABLE, Bus, Ecc, Gpu, GpuReport, Heat, Link, Memory, Repairs, Xid
from meshwright.clusters.health_gpus import gpu_verdicts, nvlink_verdicts
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING
from tests.clusters.evidence import VERSIONS, evidence, gpu, node_with, spoiled


def _said(found: Evidence, **wishes: Any) -> list[tuple[str, str]]:
    return [(each.state, each.found) for each in gpu_verdicts(found, Wishes(**wishes))]


def test_healthy_gpus_are_one_line_and_no_gpu_is_no_fault() -> None:
    assert _said(node_with(gpu(0), gpu(1))) == [(OK, "2 x NVIDIA H100 80GB HBM3, driver 580.1, at most 40 C")]
    assert _said(evidence("a")) == [(SKIPPED, "no GPU: no driver here")]


@pytest.mark.parametrize(
    ("spoil", "state", "fact"),
    [
        ({"error": "GPU is lost"}, BAD, "GPU is lost"),
        ({"ecc": Ecc(True, 0, 2, 2)}, BAD, "2 uncorrected memory errors"),
        ({"ecc": Ecc(True, 60_000_000, 0, 0)}, WARNING, "60000000 corrected"),
        ({"ecc": Ecc(False)}, WARNING, "ECC is off"),
        ({"repairs": Repairs(11)}, BAD, "11 retired pages, more than 10"),
        ({"repairs": Repairs(3, True)}, BAD, "waits to be put out of use"),
        ({"repairs": Repairs(None, None, 9, True, False)}, BAD, "waits to be put out of use"),
        ({"repairs": Repairs(None, None, 9, False, True)}, BAD, "could not be replaced"),
        ({"heat": Heat(89, 90, 1980, 1980, ())}, BAD, "89 C"),
        ({"heat": Heat(88)}, BAD, "88 C"),
        ({"heat": Heat(70, 90, 600, 1980, ("thermal (hardware)",))}, BAD, "thermal (hardware), 600 of 1980 MHz"),
        ({"recovery": "reboot"}, BAD, "the driver asks for: reboot"),
        ({"bus": Bus("0000:01:00", 5, 5, 8, 16)}, WARNING, "8 of 16 lanes"),
        ({"memory": Memory(80 << 30, 9 << 30, 2)}, WARNING, "2 processes hold 9.7 GB"),
    ],
)
def test_each_fault_of_a_gpu_is_found_and_named(spoil: dict[str, Any], state: str, fact: str) -> None:
    verdicts = list(gpu_verdicts(node_with(gpu(0), gpu(1, **spoil)), Wishes()))
    assert [each.state for each in verdicts] == [state]
    assert verdicts[0].found.startswith("GPU 1 (0000:01:00): ")
    assert fact in verdicts[0].found
    assert verdicts[0].remedy


def test_what_the_driver_does_not_tell_is_no_fault() -> None:
    assert [state for state, _ in _said(node_with(Gpu(0, name="Tesla K80")))] == [OK]


@pytest.mark.parametrize("well", [{"ecc": Ecc(True, 3, 0, 5)}, {"repairs": Repairs(10, False)}, {"recovery": "none"}])
def test_what_passes_with_age_is_no_fault(well: dict[str, Any]) -> None:
    assert [state for state, _ in _said(node_with(gpu(0, **well)))] == [OK]


def test_xids_of_the_hardware_count_once_per_gpu_and_those_of_programs_do_not() -> None:
    xids = (
        Xid(79, "0000:01:00", "off"),
        Xid(31, "0000:01:00", "fault"),
        Xid(48, "0000:02:00", ""),
        Xid(48, "0000:02:00", ""),
    )
    found = GpuReport("read", gpus=(gpu(0),), xids=xids)
    assert _said(spoiled("a", "a", gpus=found)) == [
        (BAD, "GPU at 0000:01:00: Xid 79: the GPU fell off the bus"),
        (BAD, "GPU at 0000:02:00: Xid 48: a double-bit memory error, 2 times"),
    ]


def test_fewer_or_other_gpus_than_the_job_wants_are_a_fault() -> None:
    assert _said(evidence("a"), gpus_per_node=8) == [(BAD, "0 GPUs (no driver here), the job wants 8")]
    assert _said(node_with(gpu(0)), gpus_per_node=2) == [(BAD, "1 GPUs, the job wants 2")]
    assert _said(node_with(gpu(0)), gpu_type="h100")[0][0] == OK
    assert _said(node_with(gpu(0)), gpu_type="A100") == [(BAD, "GPU 0 is a NVIDIA H100 80GB HBM3, the job wants A100")]


def test_a_gpu_that_fell_off_the_bus_leaves_its_device_file() -> None:
    assert "8 GPUs have a device file, the driver sees 1" in _said(node_with(gpu(0), device_files=8))[0][1]


def test_several_kinds_odd_libraries_and_drivers_that_do_not_answer_are_said() -> None:
    assert "several kinds" in _said(node_with(gpu(0), gpu(1, name="NVIDIA A100-SXM4-40GB")))[0][1]
    assert _said(node_with(gpu(0), notes=("nvmlDeviceGetName: Unknown Error",)))[0][0] == WARNING
    unreadable = spoiled("a", "a", gpus=GpuReport(UNREADABLE, "versions differ"))
    assert _said(unreadable, gpus_per_node=8) == [(BAD, "the driver cannot be asked: versions differ")]


def test_a_torch_without_cuda_is_a_fault_where_the_job_wants_gpus() -> None:
    found = node_with(gpu(0))
    cpu = spoiled("a", "a", gpus=found.facts["a"].gpus, versions={**VERSIONS, "torch": "2.13.0+cpu"})
    assert [state for state, _ in _said(cpu)] == [WARNING]
    assert [state for state, _ in _said(cpu, gpus_per_node=1)] == [BAD]


def test_a_link_that_is_down_is_named_and_boards_without_links_are_passed_over() -> None:
    def states(found: Evidence) -> list[tuple[str, str]]:
        return [(each.state, each.found) for each in nvlink_verdicts(found)]

    down = tuple(Link(each, each > 1, "switch") for each in range(18))
    assert states(node_with(gpu(0), gpu(1, links=down))) == [(BAD, "GPU 1 (0000:01:00): 16 of 18 NVLinks are up")]
    assert states(node_with(gpu(0), gpu(1, links=None))) == [(BAD, "GPU 1 (0000:01:00): 0 of 18 NVLinks are up")]
    assert states(node_with(gpu(0), gpu(1))) == [(OK, "18 NVLinks of each of 2 GPUs are up")]
    assert states(node_with(gpu(0, links=None))) == [(SKIPPED, "no NVLinks")]
    assert states(evidence("a")) == [(SKIPPED, "no GPU")]
