"""Reads the GPUs of this node through NVML, the library that comes with NVIDIA's driver.

What they are and how well; `usage` asks how busy one is. A library or driver that is missing, old, or lost a GPU gives
an answer, not an error: every question is asked by name, and one that it does not know is answered by None.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from meshwright.clusters.gpus import (
    NO_DRIVER,
    NO_GPU,
    NO_LIBRARY,
    READ,
    UNREADABLE,
    Bus,
    Ecc,
    Gpu,
    GpuReport,
    Heat,
    Link,
    Memory,
    Repairs,
)
from meshwright.clusters.xid import logged_xids

__all__ = ["normal_bus_id", "read_gpus"]

_TEMPERATURE, _SLOWDOWN = 0, 1
_SM_CLOCK = 1
_CORRECTED, _UNCORRECTED = 0, 1
_SINCE_LOAD, _EVER = 0, 1
_PAGE_CAUSES = (0, 1)
_SWITCH = 2
_RECOVERY_ACTION = 230
_MAX_LINKS = 36

_SLOWED = {0x8: "hardware", 0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake"}
_RECOVERY = {0: "none", 1: "reset", 2: "reboot", 3: "drain", 4: "drain and reset", 6: "reset", 7: "reboot"}
_PATHS = {0: "board", 10: "switch", 20: "switches", 30: "host bridge", 40: "node", 50: "system"}

_DEAD = {15: "GPU is lost", 16: "GPU requires reset", 8: "insufficient external power", 11: "interrupts do not arrive"}
_UNTOLD = {2, 3, 4, 13, 21, 25, 26}
"""This driver, this GPU or this user is told nothing about that; 2 is for a link that is not there."""


class _GoneError(Exception):
    """A GPU that cannot be asked anything any more."""


class _Nvml:
    """The library, asked by name.

    Args:
        library: the module `pynvml` of nvidia-ml-py.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self.notes: list[str] = []

    def ask(self, question: str, *words: Any) -> Any:
        """The answer, or None where there is none.

        Raises:
            _GoneError: when the GPU is lost.
        """
        function = getattr(self._library, question, None)
        if function is None:
            return None
        try:
            answer = function(*words)
        except self._library.NVMLError as error:
            code = int(getattr(error, "value", 999))
            if code in _DEAD:
                raise _GoneError(_DEAD[code]) from error
            if code not in _UNTOLD:
                self.notes.append(f"{question}: {error}")
            return None
        except Exception as error:  # what the Python library raises by itself where the driver's is older than it
            self.notes.append(f"{question}: {error}")
            return None
        return answer.decode() if isinstance(answer, bytes) else answer


def read_gpus() -> GpuReport:
    """The GPUs of this node, as the driver tells them now.

    >>> read_gpus().state in {"read", "no library", "no driver", "no GPU", "unreadable"}
    True
    """
    files = len(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        import pynvml
    except ImportError:
        return GpuReport(NO_LIBRARY, "the Python package nvidia-ml-py is not installed", device_files=files)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return GpuReport(*_no_start(pynvml, error), device_files=files, notes=_origin(pynvml))
    except AttributeError as error:
        why = f"module pynvml is not that of nvidia-ml-py ({error})"
        return GpuReport(UNREADABLE, why, device_files=files, notes=_origin(pynvml))
    try:
        return _report(_Nvml(pynvml), files, notes=_origin(pynvml))
    finally:
        _close(pynvml)


def _no_start(pynvml: Any, error: Any) -> tuple[str, str]:
    code = int(getattr(error, "value", 999))
    if code == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return NO_LIBRARY, "libnvidia-ml.so.1 is not on this machine, so it has no NVIDIA driver"
    if code == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        return NO_DRIVER, "NVIDIA's kernel driver is not loaded"
    if code == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return UNREADABLE, "the driver's library and kernel module have different versions, as after an update"
    return UNREADABLE, str(error)


def _origin(pynvml: Any) -> tuple[str, ...]:
    """A warning where another distribution took the module's name."""
    if hasattr(pynvml, "__path__"):
        return ("pynvml is a package of another distribution; pip uninstall pynvml, pip install nvidia-ml-py",)
    return ()


def _close(pynvml: Any) -> None:
    try:
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return  # a library that cannot even end has been read all the same


def _report(nvml: _Nvml, files: int, *, notes: tuple[str, ...]) -> GpuReport:
    count = nvml.ask("nvmlDeviceGetCount") or 0
    handles = [_handle(nvml, index) for index in range(count)]
    gpus = tuple(_gpu(nvml, index, handle) for index, handle in enumerate(handles))
    cuda = nvml.ask("nvmlSystemGetCudaDriverVersion")
    return GpuReport(
        state=READ if count else NO_GPU,
        why="" if count else "the driver runs and sees no GPU",
        driver=nvml.ask("nvmlSystemGetDriverVersion"),
        cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
        gpus=gpus,
        paths=tuple(_paths(nvml, handles)),
        xids=logged_xids(),
        device_files=files,
        notes=(*notes, *dict.fromkeys(nvml.notes)),
    )


def _handle(nvml: _Nvml, index: int) -> Any:  # or the reason why there is none
    try:
        handle = nvml.ask("nvmlDeviceGetHandleByIndex", index)
    except _GoneError as error:
        return str(error)
    return "the driver gives no handle" if handle is None else handle


def _gpu(nvml: _Nvml, index: int, handle: Any) -> Gpu:
    if isinstance(handle, str):
        return Gpu(index, error=handle)
    known: dict[str, Any] = {}
    try:
        for name, value in _parts(nvml, handle):
            known[name] = value
    except _GoneError as error:
        known["error"] = str(error)
    return Gpu(index, **known)


def _parts(nvml: _Nvml, handle: Any) -> Iterator[tuple[str, Any]]:
    """What is asked of a GPU; one that is lost on the way keeps what it told before."""
    yield "name", nvml.ask("nvmlDeviceGetName", handle)
    yield "uuid", nvml.ask("nvmlDeviceGetUUID", handle)
    yield "bus", _bus(nvml, handle)
    yield "memory", _memory(nvml, handle)
    yield "heat", _heat(nvml, handle)
    yield "ecc", _ecc(nvml, handle)
    yield "repairs", _repairs(nvml, handle)
    yield "recovery", _recovery(nvml, handle)
    yield "links", _links(nvml, handle)


def _bus_id(pci: Any) -> str | None:
    """The bus id in one form; the older structure has it in another field only.

    >>> from types import SimpleNamespace
    >>> _bus_id(SimpleNamespace(busId=b"00000000:3B:00.0"))
    '0000:3b:00'
    """
    raw = getattr(pci, "busId", None) or getattr(pci, "busIdLegacy", None)
    return normal_bus_id(raw.decode() if isinstance(raw, bytes) else str(raw)) if raw else None


def normal_bus_id(text: str) -> str:
    """A PCI address as domain:bus:device, in lower case, with a domain of four digits.

    >>> normal_bus_id("00000000:3B:00.0"), normal_bus_id("0000:3b:00")
    ('0000:3b:00', '0000:3b:00')
    """
    domain, _, rest = text.strip().lower().partition(":")
    return f"{int(domain, 16):04x}:{rest.partition('.')[0]}"


def _bus(nvml: _Nvml, handle: Any) -> Bus:
    pci = nvml.ask("nvmlDeviceGetPciInfo", handle)
    return Bus(
        bus_id=None if pci is None else _bus_id(pci),
        generation=nvml.ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        max_generation=nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        width=nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
        max_width=nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", handle),
    )


def _memory(nvml: _Nvml, handle: Any) -> Memory | None:
    told = nvml.ask("nvmlDeviceGetMemoryInfo", handle)
    if told is None:
        return None
    running = nvml.ask("nvmlDeviceGetComputeRunningProcesses_v3", handle)
    if running is None:  # drivers before 510; without a number the Python library insists on its own version
        running = nvml.ask("nvmlDeviceGetComputeRunningProcesses_v2", handle)
    return Memory(int(told.total), int(told.used), None if running is None else len(running))


def _heat(nvml: _Nvml, handle: Any) -> Heat:
    reasons = nvml.ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # the name it had until driver 535
        reasons = nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return Heat(
        temperature_c=nvml.ask("nvmlDeviceGetTemperature", handle, _TEMPERATURE),
        slowdown_c=nvml.ask("nvmlDeviceGetTemperatureThreshold", handle, _SLOWDOWN),
        sm_mhz=nvml.ask("nvmlDeviceGetClockInfo", handle, _SM_CLOCK),
        max_sm_mhz=nvml.ask("nvmlDeviceGetMaxClockInfo", handle, _SM_CLOCK),
        slowed_by=None if reasons is None else tuple(why for bit, why in _SLOWED.items() if reasons & bit),
    )


def _ecc(nvml: _Nvml, handle: Any) -> Ecc:
    mode = nvml.ask("nvmlDeviceGetEccMode", handle)
    return Ecc(
        enabled=None if mode is None else bool(mode[0]),
        corrected=nvml.ask("nvmlDeviceGetTotalEccErrors", handle, _CORRECTED, _SINCE_LOAD),
        uncorrected=nvml.ask("nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _SINCE_LOAD),
        uncorrected_ever=nvml.ask("nvmlDeviceGetTotalEccErrors", handle, _UNCORRECTED, _EVER),
    )


def _repairs(nvml: _Nvml, handle: Any) -> Repairs:
    pages = [nvml.ask("nvmlDeviceGetRetiredPages", handle, cause) for cause in _PAGE_CAUSES]
    pending = nvml.ask("nvmlDeviceGetRetiredPagesPendingStatus", handle)
    rows = nvml.ask("nvmlDeviceGetRemappedRows", handle)
    return Repairs(
        retired_pages=None if None in pages else sum(len(list(each)) for each in pages),
        pages_pending=None if pending is None else bool(pending),
        remapped_rows=None if rows is None else rows[0] + rows[1],
        rows_pending=None if rows is None else bool(rows[2]),
        rows_failed=None if rows is None else bool(rows[3]),
    )


def _recovery(nvml: _Nvml, handle: Any) -> str | None:
    """What a driver since 570 asks for; older ones answer that they do not know the question."""
    told = nvml.ask("nvmlDeviceGetFieldValues", handle, [_RECOVERY_ACTION])
    if not told or told[0].nvmlReturn != 0:
        return None
    return _RECOVERY.get(int(told[0].value.uiVal), f"action {int(told[0].value.uiVal)}")


def _links(nvml: _Nvml, handle: Any) -> tuple[Link, ...] | None:
    found = []
    for index in range(_MAX_LINKS):
        state = nvml.ask("nvmlDeviceGetNvLinkState", handle, index)
        if state is None:
            break
        found.append(Link(index, bool(state), _peer(nvml, handle, index) if state else None))
    return tuple(found) or None


def _peer(nvml: _Nvml, handle: Any, index: int) -> str | None:
    if nvml.ask("nvmlDeviceGetNvLinkRemoteDeviceType", handle, index) == _SWITCH:
        return "switch"
    pci = nvml.ask("nvmlDeviceGetNvLinkRemotePciInfo", handle, index)
    return None if pci is None else _bus_id(pci)


def _paths(nvml: _Nvml, handles: list[Any]) -> Iterator[tuple[int, int, str]]:
    for one, first in enumerate(handles):
        for other, second in enumerate(handles[:one]):
            if isinstance(first, str) or isinstance(second, str):
                continue
            try:
                level = nvml.ask("nvmlDeviceGetTopologyCommonAncestor", second, first)
            except _GoneError:
                continue
            if level is not None:
                yield other, one, _PATHS.get(int(level), f"level {level}")
