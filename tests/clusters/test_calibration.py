"""An entry recovers the machine that times were made from, and is read back as hardware."""

from dataclasses import replace
from functools import cache
from math import hypot, log2
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.clusters.calibrate import written
from meshwright.clusters.calibrate_device import PRODUCTS
from meshwright.clusters.calibration import CalibrationError, Machine, entry, hardware_of, is_calibration
from meshwright.clusters.simulated import Cluster
from meshwright.parallel.work import Product, besides

HOST = Machine(name="host", processor="cpu", cores=4, memory_bytes=8e9, date="2026-01-01")
RATES = {"fp32": 60e9, "bf16": 20e9}
MEMORY, START_S, EXP, LINK, LATENCY_S = 30e9, 8e-6, 1e9, 2e9, 3e-4


def made(ranks: int, threads: int, *, slower: float = 1.0, wrong: float = 1.0) -> dict[str, Any]:
    """What a machine of known numbers would have measured; `wrong` spoils every other product."""

    def product(m: int, n: int, k: int, name: str) -> float:
        bytes_ = Product(m, n, k, precision=name).bytes()
        return hypot(2 * m * n * k / RATES[name], bytes_ / MEMORY) * slower + START_S

    def ring(size: float) -> float:
        return LATENCY_S * log2(2 * ranks) + size * (ranks - 1) / ranks / LINK

    names = ["fp32"] if threads > 1 else ["fp32", "bf16"]
    shapes = [(*shape, name) for name in names for shape in PRODUCTS["cpu"]]
    products = [[*each, product(*each) * (wrong if at % 2 else 1)] for at, each in enumerate(shapes)]
    heads = [(64, 16), (256, 32), (1024, 128), (512, 8)]
    rate = 0.5 * RATES["fp32"]
    scores = {s: 8 * s**2 * 0.5 * (1 + besides(0.5, s)) for s, _ in heads}
    attention = [[2, 4, s, w, scores[s] * (4 * w / rate + 3 / EXP) + START_S] for s, w in heads]
    backward = [[2, 4, s, w, BACK * (scores[s] * (10 * w / rate + 3 / EXP) + START_S)] for s, w in heads]
    sizes = (2**10, 2**16, 2**20, 2**23)
    exchanged = [[name, ranks, size, ring(size) * times] for size in sizes for name, times in _TIMES.items()]
    exchanged += [[name, 2, size, *_straight(name, size)] for size in sizes for name in _STRAIGHT]
    return {
        "ranks": ranks,
        "threads": threads,
        "device": "cpu",
        "torch": "2.13",
        "resident_bytes": 3e8,
        "op_s": 1e-6,
        "layer_s": 2e-4,
        "exponentials_per_s": EXP,
        "drawn_per_s": 1 / (DRAWN_S + 4 / MEMORY),
        "products": products,
        "functions": {"tanh": [8.0, 8.0 / MEMORY + TANH_S], "exp": [8.0, 4.0 / MEMORY]},
        "batched": [[*each, _batched_s(*each)] for each in ((64, 64, 32, 8), (128, 32, 128, 4))],
        "memory": [[size, 2e-5 + size / MEMORY] for size in (1e5, 1e6, 1e7)],
        "attention": attention,
        "attention_backward": backward,
        "collectives": exchanged if ranks > 1 else [],
        "unsteady": 0.01 if ranks > 1 else 0.0,
        "unit_s": 0.002 if ranks > 1 else 0.0,
    }


_TIMES = {"all_gather": 1, "all_reduce": 2}
_STRAIGHT = {"reduce_scatter": (5e-4, 1e9), "all_to_all": (2e-4, 4e9), "send": (1e-4, 3e9)}  # latency, bytes per second
BACK, DRAWN_S, TANH_S, BATCHED = 1.3, 6e-9, 2e-9, 0.6


def _batched_s(m: int, n: int, k: int, batch: int) -> float:
    product = Product(m, n, k, batch, precision="fp32")
    return hypot(product.flops / (BATCHED * RATES["fp32"]), product.bytes() / MEMORY) + START_S


def _straight(name: str, size: float) -> list[float]:
    latency_s, rate = _STRAIGHT[name]
    return [latency_s + size / rate]


def of(*measured: dict[str, Any], machine: Machine = HOST) -> dict[str, Any]:
    return entry(measured, machine, seconds=1.0)


@cache
def known_machine() -> str:
    """An entry for one rank with four threads and four with one; to fit it takes a second."""
    return written(of(made(1, 4), made(4, 1)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An entry of 1, 4 and 8 ranks on four cores."""
    found = tmp_path / "machine.yaml"
    found.write_text(written(of(made(1, 4), made(4, 1), made(8, 1))), encoding="utf-8")
    return found


def test_the_numbers_that_times_were_made_from_are_found_again(path: Path) -> None:
    gpu, reached = hardware_of(path, ranks=4)
    assert {name: gpu.matmul_flops_per_s(name) for name in RATES} == pytest.approx(RATES, rel=0.02)
    assert gpu.memory_bytes_per_s == pytest.approx(MEMORY, rel=0.01)
    assert reached.compute.kernel_s == pytest.approx(START_S, rel=0.05)
    assert (reached.compute.attention, reached.compute.softmax) == pytest.approx((0.5, 3.0), rel=0.1)
    assert (gpu.nvlink_bytes_per_s, reached.links.nvlink_s) == pytest.approx((LINK, LATENCY_S), rel=0.01)
    assert reached.compute.attention_backward == pytest.approx(BACK, rel=0.03)
    assert reached.compute.unhidden.drawn_s == pytest.approx(DRAWN_S, rel=0.01)
    assert reached.compute.unhidden.function_s == pytest.approx({"tanh": TANH_S, "exp": 0.0}, rel=0.01)
    assert reached.compute.unhidden.batched == pytest.approx(BATCHED, rel=0.05)
    assert (reached.links.unsteady, reached.links.unit_s) == (0.01, 0.002)
    assert reached.compute.host_s == reached.compute.waiting_s == 2e-4
    assert reached.reserves.overhead_bytes == 3e8


def test_an_entry_prices_what_it_was_made_from(path: Path) -> None:
    gpu, reached = hardware_of(path, ranks=4)
    for m, n, k, name, took_s in made(4, 1)["products"]:
        product = Product(m, n, k, precision=name)
        assert reached.matmul_s(product, gpu) == pytest.approx(took_s, rel=0.03), product
    group = Cluster(gpu=gpu, num_gpus=4, gpus_per_node=4).group(4)
    for name, ranks, size, took_s in made(4, 1)["collectives"]:
        assert reached.measured_s(name, size, ranks) == pytest.approx(took_s, rel=0.02), name
        if name in _TIMES:
            assert _TIMES[name] * reached.gather_s(size, group) == pytest.approx(took_s, rel=0.02)
            assert reached.collective_s(name, size, group) == pytest.approx(took_s, rel=0.02)
    assert reached.send_s(1e6, Cluster(gpu=gpu, num_gpus=4), 1) == pytest.approx(_straight("send", 1e6)[0], rel=0.02)


def test_ranks_that_outnumber_cores_take_turns(path: Path) -> None:
    (_, four), (_, eight) = (hardware_of(path, ranks=each) for each in (4, 8))
    for name in ("kernel_s", "host_s", "waiting_s", "softmax"):
        assert getattr(eight.compute, name) == pytest.approx(2 * getattr(four.compute, name), rel=1e-4), name
    beside, alone = eight.compute.unhidden, four.compute.unhidden
    assert (beside.drawn_s, beside.function_s["tanh"]) == pytest.approx(
        (2 * alone.drawn_s, 2 * alone.function_s["tanh"]), rel=1e-4
    )
    assert beside.batched == alone.batched
    for name in ("matmul", "memory"):
        assert getattr(eight.compute, name) == pytest.approx(getattr(four.compute, name) / 2, rel=1e-4), name


def test_a_number_of_ranks_that_was_not_measured_is_the_next_that_was(path: Path) -> None:
    assert hardware_of(path, ranks=3) == hardware_of(path, ranks=4)
    assert hardware_of(path, ranks=64) == hardware_of(path, ranks=8)
    assert hardware_of(path) == hardware_of(path, ranks=1)


def test_threads_that_are_slower_together_are_priced_so(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(written(of(made(1, 4, slower=4.0), made(4, 1))))
    (_, alone), (_, four) = (hardware_of(path, ranks=each) for each in (1, 4))
    assert alone.compute.matmul == pytest.approx(four.compute.matmul / 4, rel=0.1)


def test_errors_say_how_far_off_the_fits_are() -> None:
    exact, spoilt = (of(made(4, 1, wrong=each))["mean_error_percent"][4] for each in (1.0, 2.0))
    assert set(exact) == {"products", "memory", "attention", "attention_backward", *_TIMES, *_STRAIGHT}
    assert max(exact.values()) < 1
    assert 25 < spoilt["products"] < 45


def test_one_rank_alone_is_an_entry_too() -> None:
    found = of(made(1, 1))
    assert set(found["by_ranks"]) == {1}
    assert set(found["mean_error_percent"][1]) == {"products", "memory", "attention", "attention_backward"}


def test_a_gpu_is_called_as_its_driver_does_and_its_ranks_take_no_turns(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    told = [{**made(each, 1), "device": "NVIDIA H100"} for each in (1, 8)]
    path.write_text(written(of(*told, machine=replace(HOST, cores=2))))
    (gpu, alone), (_, eight) = (hardware_of(path, ranks=each) for each in (1, 8))
    assert (gpu.name, gpu.generation) == ("NVIDIA H100", "measured")
    assert alone.compute == eight.compute


def test_what_is_no_calibration_is_refused_with_the_way_out(tmp_path: Path, path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: j\n")
    assert (is_calibration(job), is_calibration(path)) == (False, True)
    with pytest.raises(CalibrationError, match=r"job.yaml is no calibration; write one with `meshwright doctor --cal"):
        hardware_of(job)
    with pytest.raises(CalibrationError, match="cannot be read as a calibration"):
        hardware_of(tmp_path / "missing.yaml")
    old = yaml.safe_load(path.read_text())
    old["by_ranks"][1]["compute"]["forgotten"] = 1.0
    job.write_text(yaml.safe_dump(old))
    with pytest.raises(CalibrationError, match="another version of meshwright"):
        hardware_of(job)
    old = yaml.safe_load(path.read_text())
    del old["by_ranks"][1]["links"]["unit_s"]
    job.write_text(yaml.safe_dump(old))
    with pytest.raises(CalibrationError, match=r"another version of meshwright \('unit_s'\); write it again"):
        hardware_of(job)
    with pytest.raises(CalibrationError, match="nothing was measured"):
        of()
