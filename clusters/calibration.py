"""A machine as an entry of the catalog: what its measurements say, fitted to the model that trainings are priced with.

`meshwright doctor --calibrate` writes the entry; `hardware_of` loads it. An entry has one `Efficiency` for each number
of ranks that was measured, since ranks of one machine share its cores and its links: ranks that outnumber cores take
turns, and exchanges are timed with all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from meshwright.clusters import fitting
from meshwright.clusters.hardware import Gpu
from meshwright.clusters.simulated.efficiency import Compute, Efficiency, Links, Reserves, Unhidden

__all__ = ["CalibrationError", "Machine", "entry", "hardware_of", "is_calibration"]


_Part = TypeVar("_Part", Compute, Links, Reserves, Unhidden)
_DRAWN_BYTES = 4  # written for each


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
    link = fitting.ring(with_links[0])[0][0] if with_links else 1e12
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
    (memory, _), _ = fitting.memory(told)
    first = told["products"][0][3]
    (rate, *known), _ = fitting.products(told, first)
    rates = {first: rate}
    for other in sorted({each[3] for each in told["products"]} - {first}):
        rates[other] = fitting.products(told, other, *known)[0][0]
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
    cpu = told["device"] == "cpu"
    turns = max(1.0, told["ranks"] * told["threads"] / machine.cores) if cpu else 1.0
    first = told["products"][0][3]
    (memory, _), memory_error = fitting.memory(told)
    (rate, operands, kernel_s), product_error = fitting.products(told, first)
    (share, softmax), attention_error = fitting.attention(told, rate, kernel_s)
    (backward,), backward_error = fitting.attention_backward(told, rate, kernel_s, share, softmax)
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
        attention_backward=backward,
        unhidden=_unhidden(told, (rate, operands, kernel_s), memory, turns=turns) if cpu else Unhidden(),
    )
    errors = {"products": product_error, "memory": memory_error, "attention": attention_error}
    errors["attention_backward"] = backward_error
    return compute, {name: round(100 * each, 1) for name, each in errors.items()}


def _unhidden(told: Mapping[str, Any], of_products: Sequence[float], memory: float, *, turns: float) -> Unhidden:
    """What a CPU takes besides bytes and FLOPs."""

    def besides(num_bytes: float, took_s: float) -> float:
        return max(0.0, took_s - num_bytes / memory) * turns

    (batched,), _ = fitting.batched(told, of_products)
    functions = {name: besides(*each) for name, each in told["functions"].items()}
    return Unhidden(drawn_s=besides(_DRAWN_BYTES, 1 / told["drawn_per_s"]), function_s=functions, batched=batched)


def _exchanges(told: Mapping[str, Any] | None, gpu: Gpu) -> tuple[Links, dict[str, float]]:
    """Of ranks of one machine, where exchanges and products share the cores and everything shows; free for one rank."""
    (rate, latency_s), _ = fitting.ring(told) if told else ((gpu.nvlink_bytes_per_s, 0.0), 0.0)
    share, kinds = rate / gpu.nvlink_bytes_per_s, fitting.by_kind(told or {"collectives": []})
    links = Links(
        nvlink=share,
        nvlink_s=latency_s,
        network=share,
        network_s=latency_s,
        exposed=1.0,
        tp_exposed=1.0,
        transfer=1.0,
        stage_s=0.0,
        straggling=0.0,
        unsteady=told["unsteady"] if told else 0.0,
        unit_s=told["unit_s"] if told else 0.0,
        measured={name: {size: list(fit[0]) for size, fit in of.items()} for name, of in kinds.items()},
    )
    errors = {name: fmean(fit[1] for fit in of.values()) for name, of in kinds.items()}
    return links, {name: round(100 * each, 1) for name, each in errors.items()}


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
        unhidden = _whole(Unhidden, parts["compute"]["unhidden"])
        compute = _whole(Compute, {**parts["compute"], "unhidden": unhidden})
        reached = Efficiency(compute, _whole(Links, parts["links"]), _whole(Reserves, parts["reserves"]))
        return Gpu(**told["gpu"]), reached
    except (KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path} was written by another version of meshwright ({error}); write it again"
        ) from error


def _whole(kind: type[_Part], told: Mapping[str, Any]) -> _Part:
    """A part of an entry, which says everything: what a catalog leaves out costs nothing, here it was not measured."""
    lacking = sorted({each.name for each in fields(kind)} - set(told))
    if lacking:
        raise KeyError(", ".join(lacking))
    return kind(**told)
