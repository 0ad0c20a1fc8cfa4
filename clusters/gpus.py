"""What is known of a node's GPUs: values that print as JSON. What a driver does not tell is None, never an error."""

from dataclasses import dataclass

__all__ = [
    "NO_DRIVER",
    "NO_GPU",
    "NO_LIBRARY",
    "READ",
    "UNREADABLE",
    "Bus",
    "Ecc",
    "Gpu",
    "GpuReport",
    "Heat",
    "Link",
    "Memory",
    "Repairs",
    "Xid",
    "nvlink_matrix",
]

READ, NO_LIBRARY, NO_DRIVER, NO_GPU, UNREADABLE = "read", "no library", "no driver", "no GPU", "unreadable"
"""What came of asking for GPUs; only the last is a fault by itself, since machines without GPUs are ordinary."""


@dataclass(frozen=True)
class Memory:
    """Memory of a GPU, and who uses it now.

    Args:
        total_bytes: all of it.
        used_bytes: taken, by the driver too.
        processes: compute processes that hold some; None where the driver does not tell.
    """

    total_bytes: int
    used_bytes: int
    processes: int | None = None


@dataclass(frozen=True)
class Heat:
    """Temperature and clocks.

    Args:
        temperature_c: of the chip.
        slowdown_c: where the hardware starts to slow down.
        sm_mhz: clock now.
        max_sm_mhz: highest clock.
        slowed_by: why the clock is held down, of: "power brake", "thermal (hardware)", "thermal (software)",
            "hardware"; None where the driver does not tell.
    """

    temperature_c: int | None = None
    slowdown_c: int | None = None
    sm_mhz: int | None = None
    max_sm_mhz: int | None = None
    slowed_by: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ecc:
    """Memory errors, since the driver was loaded and ever.

    Args:
        enabled: whether errors are looked for.
        corrected: since the driver was loaded.
        uncorrected: since the driver was loaded.
        uncorrected_ever: over the life of the GPU.
    """

    enabled: bool | None = None
    corrected: int | None = None
    uncorrected: int | None = None
    uncorrected_ever: int | None = None


@dataclass(frozen=True)
class Repairs:
    """Memory that the GPU has put out of use: pages up to Volta, rows since Ampere.

    Args:
        retired_pages: number of them, for either cause.
        pages_pending: whether some wait for a reset.
        remapped_rows: number of them, for either cause.
        rows_pending: whether some wait for a reset.
        rows_failed: whether a row could not be replaced any more.
    """

    retired_pages: int | None = None
    pages_pending: bool | None = None
    remapped_rows: int | None = None
    rows_pending: bool | None = None
    rows_failed: bool | None = None


@dataclass(frozen=True)
class Bus:
    """Where a GPU sits, and how wide its way there is now and could be; an idle GPU lowers the generation itself."""

    bus_id: str | None = None
    generation: int | None = None
    max_generation: int | None = None
    width: int | None = None
    max_width: int | None = None


@dataclass(frozen=True)
class Link:
    """One NVLink of a GPU.

    Args:
        index: of the link on its GPU.
        active: whether it is up.
        peer: bus id of the other end, "switch" for an NVSwitch, None where the driver does not tell.
    """

    index: int
    active: bool
    peer: str | None = None


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        index: of the driver.
        error: why nothing can be read any more, such as "GPU is lost"; None for a GPU that answers.
        recovery: what the driver asks for: "reset", "reboot", "drain", "drain and reset", "none".
        links: its NVLinks; None where it has none, or the driver does not tell.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    error: str | None = None
    bus: Bus = Bus()
    memory: Memory | None = None
    heat: Heat = Heat()
    ecc: Ecc = Ecc()
    repairs: Repairs = Repairs()
    links: tuple[Link, ...] | None = None
    recovery: str | None = None


@dataclass(frozen=True)
class Xid:
    """One error that the driver wrote into the kernel's log.

    Args:
        number: of NVIDIA's catalog of Xid errors.
        bus_id: of the GPU.
        text: what the driver said.
    """

    number: int
    bus_id: str
    text: str


@dataclass(frozen=True)
class GpuReport:
    """The GPUs of a node.

    Args:
        state: "read", "no library", "no driver", "no GPU" or "unreadable".
        why: more about another state than "read".
        driver: its version.
        cuda: newest CUDA that the driver can run, such as "12.4".
        gpus: in the driver's order.
        paths: (i, j, what lies between two GPUs: "board", "switch", "switches", "host bridge", "node", "system").
        xids: from the kernel's log; None where it cannot be read.
        device_files: number of /dev/nvidiaN, which a GPU that fell off the bus keeps.
        notes: what is odd about the way this was read.
    """

    state: str
    why: str = ""
    driver: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    paths: tuple[tuple[int, int, str], ...] = ()
    xids: tuple[Xid, ...] | None = None
    device_files: int = 0
    notes: tuple[str, ...] = ()


def nvlink_matrix(gpus: tuple[Gpu, ...]) -> tuple[tuple[int, ...], ...]:
    """Number of active NVLinks between each two GPUs; a switch joins two GPUs by as many as both have to switches.

    >>> a = Gpu(0, bus=Bus("A"), links=(Link(0, True, "B"), Link(1, False, "B")))
    >>> b = Gpu(1, bus=Bus("B"), links=(Link(0, True, "A"),))
    >>> nvlink_matrix((a, b))
    ((0, 1), (1, 0))
    >>> c = Gpu(2, links=(Link(0, True, "switch"), Link(1, True, "switch")))
    >>> d = Gpu(3, links=(Link(0, True, "switch"),))
    >>> nvlink_matrix((c, d))
    ((0, 1), (1, 0))
    """
    return tuple(tuple(0 if one is other else _between(one, other) for other in gpus) for one in gpus)


def _between(one: Gpu, other: Gpu) -> int:
    direct = [link for link in one.links or () if link.active and link.peer and link.peer == other.bus.bus_id]
    return len(direct) or min(_to_switches(one), _to_switches(other))


def _to_switches(gpu: Gpu) -> int:
    return sum(link.active and link.peer == "switch" for link in gpu.links or ())
