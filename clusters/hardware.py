"""What links can carry: the catalog of accelerators, and the least bandwidth that a healthy all-reduce has on them.

`gpu(name)` gives the numbers that a training step is predicted from: peaks, memory, links.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Accelerator", "Catalog", "Expected", "Gpu", "catalog", "gpu", "host_link"]

_FILE = Path(__file__).with_name("catalog") / "accelerators.yaml"
_GPUS = Path(__file__).with_name("catalog") / "gpus.yaml"


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU.

    Args:
        name: as it stands in the driver's name for it.
        nvlink_bytes_per_s: all its NVLinks in one direction; None where it has none.
        memory_bytes: of the smallest one of that name.
        source: of the numbers.
    """

    name: str
    nvlink_bytes_per_s: float | None
    memory_bytes: float
    source: str


@dataclass(frozen=True)
class Expected:
    """The least bus bandwidth of an all-reduce, in bytes per second, and why."""

    bytes_per_s: float
    why: str


@dataclass(frozen=True)
class Catalog:
    """The catalog's numbers.

    Args:
        accelerators: kinds of GPUs, special names first.
        pcie_bytes_per_s: generation -> one direction of 16 lanes.
        shares: link -> share of it that a healthy all-reduce reaches.
        loopback_bytes_per_s: the least between ranks of one machine, with gloo.
    """

    accelerators: tuple[Accelerator, ...]
    pcie_bytes_per_s: Mapping[int, float]
    shares: Mapping[str, float]
    loopback_bytes_per_s: float

    def accelerator(self, name: str | None) -> Accelerator | None:
        """The kind of GPU that a driver calls so; None for one that the catalog does not know.

        >>> catalog().accelerator("NVIDIA H100 80GB HBM3").nvlink_bytes_per_s
        450000000000.0
        >>> catalog().accelerator("NVIDIA A100-SXM4-40GB").name, catalog().accelerator("Radeon") is None
        ('A100', True)
        """
        words = (name or "").replace("-", " ").split()
        return next((each for each in self.accelerators if set(each.name.split()) <= set(words)), None)

    def between_gpus(self, name: str | None, *, linked: bool, generation: int | None) -> Expected | None:
        """What GPUs of one node reach among each other, by NVLink or over the bus; None where nothing is known."""
        kind = self.accelerator(name)
        if linked:
            if kind is None or kind.nvlink_bytes_per_s is None:
                return None
            speed, share = kind.nvlink_bytes_per_s, self.shares["nvlink"]
            return Expected(speed * share, f"{share:.0%} of NVLink's {speed / 1e9:g} GB/s ({kind.source})")
        speed_of_bus = self.pcie_bytes_per_s.get(generation or 0)
        if speed_of_bus is None:
            return None
        share = self.shares["pcie"]
        why = f"{share:.0%} of {speed_of_bus / 1e9:g} GB/s (PCI Express {generation}, 16 lanes)"
        return Expected(speed_of_bus * share, why)

    def between_nodes(self, bytes_per_s: float | None, backend: str, *, interface: str) -> Expected | None:
        """What ranks of several nodes reach over an interface of a known speed."""
        if bytes_per_s is None:
            return None
        share = self.shares["gloo" if backend == "gloo" else "infiniband" if interface.startswith("ib") else "ethernet"]
        return Expected(bytes_per_s * share, f"{share:.0%} of the {bytes_per_s / 1e9:g} GB/s of {interface}")

    def on_loopback(self) -> Expected:
        """What ranks of one machine reach with gloo."""
        return Expected(self.loopback_bytes_per_s, "the least over loopback")


@cache
def catalog() -> Catalog:
    """The catalog that comes with meshwright."""
    import yaml

    told: dict[str, Any] = yaml.safe_load(_FILE.read_text())
    return Catalog(
        accelerators=tuple(Accelerator(**each) for each in told["accelerators"]),
        pcie_bytes_per_s=told["pcie_bytes_per_s"],
        shares=told["shares"],
        loopback_bytes_per_s=told["loopback_bytes_per_s"],
    )


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one kind of GPU reaches in training.

    Args:
        name: words of the driver's name for it.
        generation: of its matrix units: "volta", "ampere", "hopper", "blackwell", "cdna3", "cdna4".
        flops_per_s: precision ("bf16" stands for fp16 as well, "fp8", "fp4"; "fp16" where bf16 is none) -> dense peak.
        sustained: precision -> share of that peak that the largest products were measured at.
        exponentials_per_s: of the whole GPU.
        memory_bytes: of its own memory.
        memory_bytes_per_s: of the same.
        nvlink_bytes_per_s: all links of it in one direction.
        network_bytes_per_s: of the network that such nodes usually have, per GPU and direction.
        source: of the numbers.
        nvlink_gpus: GPUs that NVLink joins beyond a node; 0 where that is the node.
        operand_bytes_per_s: that products read and write at, which is faster than memory where caches hold operands;
            memory's where None.
    """

    name: str
    generation: str
    flops_per_s: Mapping[str, float]
    sustained: Mapping[str, float]
    exponentials_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    source: str
    nvlink_gpus: int = 0
    operand_bytes_per_s: float | None = None

    @property
    def half_flops_per_s(self) -> float:
        """Dense peak of 16-bit products.

        >>> gpu("V100").half_flops_per_s
        125000000000000.0
        """
        return self.flops_per_s["bf16" if "bf16" in self.flops_per_s else "fp16"]

    def lacks(self, precision: str) -> str | None:
        """Why a job of some `train.precision` is not for this kind; None where it may be.

        >>> gpu("A100").lacks("bfloat16"), gpu("V100").lacks("float32")
        (None, None)
        >>> gpu("V100").lacks("bfloat16")
        'V100 has no matrix units for bfloat16; set train.precision=float32, or take a GPU that has them'
        """
        if precision != "bfloat16" or "fp16" not in self.flops_per_s:
            return None
        return f"{self.name} has no matrix units for bfloat16; set train.precision=float32, or take a GPU that has them"

    def matmul_flops_per_s(self, precision: str) -> float:
        """What its largest products were measured at; the next wider precision where it has not this one.

        >>> gpu("A100").matmul_flops_per_s("fp8") == gpu("A100").matmul_flops_per_s("bf16")
        True
        """
        wider = {"fp4": ("fp4", "fp8", "bf16", "fp16"), "fp8": ("fp8", "bf16", "fp16")}.get(
            precision, (precision, "bf16", "fp16", "fp32")
        )
        found = next(each for each in wider if each in self.flops_per_s)
        share = self.sustained.get(found, min(self.sustained.values(), default=1.0))
        return self.flops_per_s[found] * share


@cache
def gpu(name: str) -> Gpu:
    """The kind of GPU that is called so.

    Raises:
        ValueError: for one that the catalog does not know; names the nearest.

    >>> gpu("A100-SXM4-40GB").memory_bytes_per_s, gpu("NVIDIA H100 80GB HBM3").name
    (1555000000000.0, 'H100')
    """
    known = _gpus()
    words = set(re.split(r"[^A-Za-z0-9]+", name.upper()))
    found = next((each for each in known if set(each.name.upper().split()) <= words), None)
    if found is None:
        names = [each.name for each in known]
        nearest = difflib.get_close_matches(name.upper(), names, n=1, cutoff=0.0)[0]
        raise ValueError(f"no GPU called {name!r} in the catalog; nearest: {nearest!r}; known: {', '.join(names)}")
    return found


def host_link(name: str) -> float | None:
    """Bytes per second between GPUs that are called so and their host's memory, in one direction; None if not known.

    >>> host_link("NVIDIA H100 80GB HBM3"), host_link("Radeon")
    (63000000000.0, None)
    """
    try:
        known = gpu(name).name
    except ValueError:
        return None
    rates: dict[str, float] = _told()["host_bytes_per_s"]
    return rates.get(known)


@cache
def _gpus() -> tuple[Gpu, ...]:
    return tuple(Gpu(**each) for each in _told()["gpus"])


@cache
def _told() -> dict[str, Any]:
    import yaml

    told: dict[str, Any] = yaml.safe_load(_GPUS.read_text())
    return told
