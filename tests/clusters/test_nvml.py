"""The reader of NVML on a library of our own: what is missing, old, lost or sick gives an answer, never an error."""

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from meshwright.clusters import nvml
from meshwright.clusters.gpus import NO_DRIVER, NO_GPU, NO_LIBRARY, READ, UNREADABLE, nvlink_matrix
from tests.lab.nvml import read, with_gpus


def test_a_machine_without_the_library_says_so(tmp_path: Path) -> None:
    report = read({**os.environ, "LD_LIBRARY_PATH": str(tmp_path)})
    if report.state == READ:
        pytest.skip("this machine has a driver")
    assert report.state == NO_LIBRARY
    assert "libnvidia-ml.so.1" in report.why
    assert report.gpus == ()


@pytest.mark.parametrize(
    ("story", "state", "why"),
    [
        ("gpus=0", NO_GPU, "sees no GPU"),
        ("init=9", NO_DRIVER, "not loaded"),
        ("init=18", UNREADABLE, "different versions, as after an update"),
        ("init=999", UNREADABLE, "Unknown Error"),
    ],
)
def test_a_driver_that_has_nothing_to_show_is_an_answer(story: str, state: str, why: str) -> None:
    report = read(with_gpus(story))
    assert (report.state, report.gpus) == (state, ())
    assert why in report.why


def test_eight_healthy_gpus_are_read_completely() -> None:
    report = read(with_gpus("gpus=8 *.links=18 *.retired=0 *.recovery=0"))
    assert (report.state, report.driver, report.cuda, report.notes) == (READ, "550.54.15", "12.4", ())
    assert [gpu.index for gpu in report.gpus] == list(range(8))
    gpu = report.gpus[5]
    assert (gpu.name, gpu.uuid, gpu.error, gpu.recovery) == ("NVIDIA H100 80GB HBM3", "GPU-fake-5", None, "none")
    assert (gpu.bus.bus_id, gpu.bus.width, gpu.bus.max_generation) == ("0000:3f:00", 16, 5)
    assert gpu.memory is not None
    assert (gpu.memory.total_bytes, gpu.memory.used_bytes, gpu.memory.processes) == (80 << 30, 1 << 20, 0)
    assert (gpu.heat.temperature_c, gpu.heat.slowdown_c, gpu.heat.slowed_by) == (41, 90, ())
    assert (gpu.ecc.enabled, gpu.ecc.uncorrected, gpu.repairs.retired_pages, gpu.repairs.rows_failed) == (
        True,
        0,
        0,
        False,
    )
    assert {(one, other, path) for one, other, path in report.paths if one < 1} == {
        *((0, other, "node") for other in (1, 2, 3)),
        *((0, other, "system") for other in (4, 5, 6, 7)),
    }


@pytest.mark.parametrize("early", [0, 1])
def test_a_gpu_lost_in_the_middle_does_not_hide_the_others(early: int) -> None:
    report = read(with_gpus(f"gpus=4 2.lost=1 2.early={early} *.links=4"))
    assert [gpu.error for gpu in report.gpus] == [None, None, "GPU is lost", None]
    assert [gpu.heat.temperature_c for gpu in report.gpus] == [36, 37, None, 39]
    assert {(one, other) for one, other, _ in report.paths} == {(0, 1), (0, 3), (1, 3)}


def test_a_gpu_that_needs_a_reset_is_named_so() -> None:
    assert read(with_gpus("gpus=2 1.lost=1 1.code=16")).gpus[1].error == "GPU requires reset"


def test_what_an_old_driver_does_not_know_is_none() -> None:
    report = read(with_gpus("gpus=2 driver=418 1.retired=3 *.links=6", "-DOLD"))
    assert (report.state, report.driver, report.notes) == (READ, "418.54.15", ())
    gpu = report.gpus[1]
    assert (gpu.bus.bus_id, gpu.bus.generation, gpu.links, gpu.recovery, gpu.heat.slowed_by) == (None,) * 5
    assert gpu.repairs.remapped_rows is None
    assert gpu.memory is not None
    assert gpu.memory.processes is None
    assert (gpu.repairs.retired_pages, gpu.heat.temperature_c, gpu.ecc.uncorrected) == (3, 37, 0)


def test_errors_pages_rows_and_heat_are_counted() -> None:
    story = "gpus=2 1.uncorrected=2 1.corrected=9 1.retired=12 1.pending=1 1.rows=3 1.rows_failed=1 1.temperature=91 "
    sick = read(with_gpus(f"{story} 1.slowed=0x68 1.clock=600 1.recovery=4 1.lanes=8 1.processes=2")).gpus[1]
    assert (sick.ecc.corrected, sick.ecc.uncorrected) == (9, 2)
    assert (sick.repairs.retired_pages, sick.repairs.pages_pending) == (12, True)
    assert (sick.repairs.remapped_rows, sick.repairs.rows_failed) == (3, True)
    assert (sick.heat.temperature_c, sick.heat.sm_mhz, sick.recovery) == (91, 600, "drain and reset")
    assert sick.heat.slowed_by == ("hardware", "thermal (software)", "thermal (hardware)")
    assert sick.bus.width == 8
    assert sick.memory is not None
    assert sick.memory.processes == 2


def test_links_through_switches_and_between_gpus_make_a_matrix() -> None:
    switched = read(with_gpus("gpus=3 *.links=18 1.down=2")).gpus
    assert nvlink_matrix(switched) == ((0, 16, 18), (16, 0, 16), (18, 16, 0))
    meshed = read(with_gpus("gpus=3 *.mesh=2")).gpus
    assert nvlink_matrix(meshed) == ((0, 2, 2), (2, 0, 2), (2, 2, 0))
    assert nvlink_matrix(read(with_gpus("gpus=2")).gpus) == ((0, 0), (0, 0))


def test_a_question_that_the_python_library_does_not_have_is_answered_by_none() -> None:
    class NVMLError(Exception):
        value = 999

    def broken(handle: object) -> int:
        raise NVMLError("Unknown Error")

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlDeviceGetTemperature=broken, nvmlDeviceGetName=lambda handle: b"T4"
    )
    asked = nvml._Nvml(library)
    assert asked.ask("nvmlDeviceGetRecoveryAction", 0) is None
    assert asked.ask("nvmlDeviceGetName", 0) == "T4"
    assert asked.notes == []
    assert asked.ask("nvmlDeviceGetTemperature", 0) is None
    assert asked.notes == ["nvmlDeviceGetTemperature: Unknown Error"]


def test_another_distribution_of_the_same_name_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("pynvml")
    other.__path__ = []
    other.NVMLError = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "pynvml", other)
    report = nvml.read_gpus()
    assert report.state == UNREADABLE
    assert "pip uninstall pynvml" in report.notes[0]
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in nvml.read_gpus().why
