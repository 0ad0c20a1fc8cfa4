"""A machine as an entry of the catalog: what its measurements say, fitted to the model that trainings are priced with.

`meshwright doctor --calibrate` writes the entry; `hardware_of` loads it. An entry has one `Efficiency` for each number
of ranks that was measured, since ranks of one machine share its cores and its links: ranks that outnumber cores take
turns, and exchanges are timed with all of them. Each fit has the least mean absolute error of logarithms of times.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, hypot, log, log2
from pathlib import Path
from statistics import fmean
from typing import Any

from meshwright.clusters.hardware import Gpu
from meshwright.clusters.simulated.efficiency import Compute, Efficiency, Links, Reserves
from meshwright.parallel.work import Product

__all__ = ["CalibrationError", "Machine", "entry", "hardware_of", "is_calibration"]

_GRID, _ZOOMS = 11, 8
Fit = tuple[tuple[float, ...], float]  # numbers, mean error


class CalibrationError(ValueError):
    """A file that is no calibration, or measurements that say nothing."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was calibrated.

    Args:
        name: of the host.
        processor: of its CPUs.
        cores: that ranks may use.
        memory_bytes: of the host, or of one GPU.
        date: ISO 8601.
    """

    name: str
    processor: str
    cores: int
    memory_bytes: float
    date: str


def _least(error: Callable[[Sequence[float]], float], *bounds: tuple[float, float]) -> Fit:
    """Numbers of least error: on a grid of logarithms that is drawn closer around the best, again and again."""
    limits = [(log(low), log(high)) for low, high in bounds]
    best = [(low + high) / 2 for low, high in limits]
    widths = [(high - low) / 2 for low, high in limits]
    for _ in range(_ZOOMS):
        points: list[list[float]] = [[]]
        for centre, width, (low, high) in zip(best, widths, limits, strict=True):
            tried = (centre + width * (2 * place / (_GRID - 1) - 1) for place in range(_GRID))
            steps = sorted({min(max(each, low), high) for each in tried})
            points = [[*point, step] for point in points for step in steps]
        best = min(points, key=lambda point: error([exp(each) for each in point]))
        widths = [width / 3 for width in widths]
    found = tuple(exp(each) for each in best)
    return found, error(found)


def _error(predicted: Callable[..., float], told: Sequence[Sequence[Any]]) -> float:
    """Mean absolute logarithm of predicted over measured seconds, which stand last."""
    return fmean(abs(log(predicted(*each[:-1]) / each[-1])) for each in told)


def _memory(told: Mapping[str, Any]) -> Fit:
    """Bytes per second of operations between products, and the starts of all of them together."""
    return _least(lambda at: _error(lambda size: at[1] + size / at[0], told["memory"]), (1e8, 1e13), (1e-6, 1e-2))


def _products(told: Mapping[str, Any], precision: str, *known: float) -> Fit:
    """FLOP/s of large products, bytes per second of operands, the start of each; all but the first may be known."""
    rows = [[*each[:3], each[4]] for each in told["products"] if each[3] == precision]

    def error(at: Sequence[float]) -> float:
        rate, operands, start_s = (*at, *known)

        def took_s(m: int, n: int, k: int) -> float:
            product = Product(int(m), int(n), int(k), precision=precision)
            return hypot(product.flops / rate, product.bytes() / operands) + start_s

        return _error(took_s, rows)

    bounds = ((1e7, 1e16), (1e8, 1e14), (1e-7, 1e-2))
    return _least(error, *bounds[: 3 - len(known)])


def _attention(told: Mapping[str, Any], rate: float, kernel_s: float) -> Fit:
    """Share of the products' rate in fused attention, and exponentials that a score costs."""
    per_s = told["exponentials_per_s"]

    def error(at: Sequence[float]) -> float:
        def took_s(*shape: float) -> float:
            batch, heads, positions, width = shape
            scores = batch * heads * positions**2 / 2
            return float(4 * scores * width / (rate * at[0]) + scores * at[1] / per_s + kernel_s)

        return _error(took_s, told["attention"])

    return _least(error, (1e-3, 2.0), (1e-2, 1e2))


def _collectives(told: Mapping[str, Any]) -> Fit:
    """Bytes per second of a ring and its latency for each doubling of ranks; an all-reduce is two gathers."""
    ranks = told["ranks"]
    rows = [each for each in told["collectives"] if each[0] != "send"]

    def error(at: Sequence[float]) -> float:
        def took_s(name: str, size: float) -> float:
            one_s = at[1] * log2(2 * ranks) + size * (ranks - 1) / ranks / at[0]
            return float(one_s * (2 if name == "all_reduce" else 1))

        return _error(took_s, rows)

    return _least(error, (1e6, 1e13), (1e-7, 1.0))


def _transfers(told: Mapping[str, Any], rate: float, latency_s: float) -> Fit:
    """Share of the numbers of collectives that transfers between two ranks take."""
    rows = [each[1:] for each in told["collectives"] if each[0] == "send"]
    return _least(lambda at: _error(lambda size: at[0] * (latency_s + size / rate), rows), (1e-3, 1e3))


def entry(measured: Sequence[Mapping[str, Any]], machine: Machine, *, seconds: float) -> dict[str, Any]:
    """The entry of a machine, as plain values.

    Args:
        measured: of each number of ranks; the one with most products stands for the hardware. See `calibrate_rank`.
        machine: that they are of.
        seconds: that it took.

    Raises:
        CalibrationError: nothing was measured.
    """
    if not measured:
        raise CalibrationError("nothing was measured; run `meshwright doctor` to find out why ranks do not start")
    with_links = [each for each in measured if each["collectives"]]
    link = _collectives(with_links[0])[0][0] if with_links else 1e12
    gpu = _gpu(max(measured, key=lambda each: len(each["products"])), machine, link=link)
    by_ranks, errors = {}, {}
    for told in measured:
        compute, errors[told["ranks"]] = _compute(told, machine, gpu)
        exchanged, compared = _exchanges(told if told["collectives"] else next(iter(with_links), None), gpu)
        by_ranks[told["ranks"]] = {
            "compute": asdict(compute),
            "links": asdict(exchanged),
            "reserves": asdict(Reserves(fragmentation=0.0, overhead_bytes=told["resident_bytes"])),
        }
        errors[told["ranks"]] |= compared if told["collectives"] else {}
    said = {name: measured[0][name] for name in ("torch", "device")} | {"seconds": round(seconds, 1)}
    threads = {each["ranks"]: each["threads"] for each in measured}
    return {
        "calibrated": asdict(machine) | said | {"threads": threads, "op_s": measured[0]["op_s"]},
        "mean_error_percent": errors,
        "gpu": asdict(gpu),
        "by_ranks": by_ranks,
    }


def _gpu(told: Mapping[str, Any], machine: Machine, *, link: float) -> Gpu:
    """The hardware, as far as one rank has it."""
    (memory, _), _ = _memory(told)
    first = told["products"][0][3]
    (rate, *known), _ = _products(told, first)
    rates = {first: rate}
    for other in sorted({each[3] for each in told["products"]} - {first}):
        rates[other] = _products(told, other, *known)[0][0]
    cpu = told["device"] == "cpu"
    return Gpu(
        name=machine.name if cpu else told["device"],
        generation="cpu" if cpu else "measured",
        flops_per_s=rates,
        sustained=dict.fromkeys(rates, 1.0),
        exponentials_per_s=told["exponentials_per_s"],
        memory_bytes=machine.memory_bytes,
        memory_bytes_per_s=memory,
        nvlink_bytes_per_s=link,
        network_bytes_per_s=link,
        operand_bytes_per_s=known[0],
        source=f"measured on {machine.name} ({machine.processor}), {machine.date}, torch {told['torch']}",
    )


def _compute(told: Mapping[str, Any], machine: Machine, gpu: Gpu) -> tuple[Compute, dict[str, float]]:
    """Of one of so many ranks, relative to the hardware; ranks of more threads than there are cores take turns."""
    turns = max(1.0, told["ranks"] * told["threads"] / machine.cores) if told["device"] == "cpu" else 1.0
    first = told["products"][0][3]
    (memory, _), memory_error = _memory(told)
    (rate, _, kernel_s), product_error = _products(told, first)
    (share, softmax), attention_error = _attention(told, rate, kernel_s)
    layer_s = told["layer_s"] * turns
    compute = Compute(
        matmul=rate / gpu.flops_per_s[first] / turns,
        hopper=1.0,
        narrow=1.0,
        attention=share,
        softmax=softmax * turns,
        memory=memory / gpu.memory_bytes_per_s / turns,
        kernel_s=kernel_s * turns,
        host_s=layer_s,
        waiting_s=layer_s,
        unaligned=1.0,
    )
    errors = {"products": product_error, "memory": memory_error, "attention": attention_error}
    return compute, {name: round(100 * each, 1) for name, each in errors.items()}


def _exchanges(told: Mapping[str, Any] | None, gpu: Gpu) -> tuple[Links, dict[str, float]]:
    """Of ranks of one machine, where exchanges and products share the cores and everything shows; free for one rank."""
    (rate, latency_s), error = _collectives(told) if told else ((gpu.nvlink_bytes_per_s, 0.0), 0.0)
    (transfer,), transfer_error = _transfers(told, rate, latency_s) if told else ((1.0,), 0.0)
    share = rate / gpu.nvlink_bytes_per_s
    links = Links(
        nvlink=share,
        nvlink_s=latency_s,
        network=share,
        network_s=latency_s,
        exposed=1.0,
        tp_exposed=1.0,
        transfer=transfer,
        stage_s=0.0,
        straggling=0.0,
    )
    return links, {"collectives": round(100 * error, 1), "transfers": round(100 * transfer_error, 1)}


def is_calibration(path: Path) -> bool:
    """Whether a file holds an entry.

    >>> is_calibration(Path("no/such/file"))
    False
    """
    try:
        return "by_ranks" in _read(path)
    except CalibrationError:
        return False


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CalibrationError(f"{path} cannot be read as a calibration: {error}") from error
    if not isinstance(told, dict) or not {"gpu", "by_ranks"} <= set(told):
        raise CalibrationError(f"{path} is no calibration; write one with `meshwright doctor --calibrate {path}`")
    return told


def hardware_of(path: Path, *, ranks: int = 1) -> tuple[Gpu, Efficiency]:
    """The hardware of a calibrated machine, and what each of so many ranks reaches on it.

    Args:
        path: of an entry that `meshwright doctor --calibrate` wrote.
        ranks: that share the machine; where they were not measured, the next more that were, or else the most.

    Raises:
        CalibrationError: the file is no calibration.
    """
    told = _read(path)
    known = sorted(told["by_ranks"])
    parts = told["by_ranks"][next((each for each in known if each >= ranks), known[-1])]
    try:
        return Gpu(**told["gpu"]), Efficiency(
            Compute(**parts["compute"]), Links(**parts["links"]), Reserves(**parts["reserves"])
        )
    except TypeError as error:
        raise CalibrationError(
            f"{path} was written by another version of meshwright ({error}); write it again"
        ) from error
