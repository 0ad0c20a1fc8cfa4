"""Are a node's GPUs fit: verdicts over what the driver told. Pure.

Limits follow what operators of large clusters publish: any uncorrected error since the driver was loaded, any Xid that
speaks of hardware, more than 10 retired pages of at most 64, a row that could not be replaced, a driver that asks for a
reset.
"""

from collections.abc import Iterator

from meshwright.clusters.evidence import Evidence, Wishes
from meshwright.clusters.gpus import READ, UNREADABLE, Gpu, GpuReport
from meshwright.clusters.inventory import NodeFacts
from meshwright.clusters.verdicts import BAD, OK, SKIPPED, WARNING, Verdict
from meshwright.clusters.xid import CRITICAL_XIDS

__all__ = ["faults_of_gpu", "faults_of_node", "gpu_verdicts", "nvlink_verdicts"]

_HOT_C = 88
_MANY_CORRECTED = 50_000_000
_MANY_RETIRED = 10
_BUSY_BYTES = 1 << 30
_RESET = "drain the node and reset the GPU (nvidia-smi --gpu-reset), or reboot"
_REPLACE = "take the node out of use and have the GPU replaced"
_COOL = "see to the cooling: fans, filters, air flow, the temperature of the room"

Finding = tuple[str, str, str]
"""State, fact, remedy."""


def gpu_verdicts(evidence: Evidence, wishes: Wishes) -> Iterator[Verdict]:
    """One verdict per fault of a GPU, or one for a node whose GPUs are all well."""
    for node, facts in evidence.facts.items():
        report = facts.gpus
        found = [*_of_report(report, wishes), *(each for gpu in report.gpus for each in _of_gpu(gpu))]
        found += [*_of_xids(report), *_of_torch(facts, wishes)]
        for state, fact, remedy in found:
            yield Verdict("gpu", node, state, fact, remedy)
        if not found:
            state = OK if report.gpus else SKIPPED
            yield Verdict("gpu", node, state, _summary(report))


def faults_of_node(report: GpuReport) -> Iterator[str]:
    """Faults of all GPUs of a node together, in words."""
    yield from (fact for state, fact, _ in _of_report(report, Wishes()) if state == BAD)


def faults_of_gpu(gpu: Gpu) -> Iterator[str]:
    """Faults of one GPU, in words."""
    yield from (fact for state, fact, _ in _of_gpu(gpu) if state == BAD)


def _summary(report: GpuReport) -> str:
    if not report.gpus:
        return f"no GPU: {report.why}"
    names: dict[str, int] = {}
    for gpu in report.gpus:
        names[gpu.name or "?"] = names.get(gpu.name or "?", 0) + 1
    hottest = max((gpu.heat.temperature_c for gpu in report.gpus if gpu.heat.temperature_c is not None), default=None)
    words = [f"{count} x {name}" for name, count in names.items()]
    words += [f"driver {report.driver}"] if report.driver else []
    words += [f"at most {hottest} C"] if hottest is not None else []
    words += ["Xid log not readable"] if report.xids is None else []
    return ", ".join(words)


def _of_report(report: GpuReport, wishes: Wishes) -> Iterator[Finding]:
    if report.state == UNREADABLE:
        yield BAD, f"the driver cannot be asked: {report.why}", "reload the driver's modules, or reboot the node"
    for note in report.notes:
        yield WARNING, note, "follow it" if "pip" in note else "update the driver or nvidia-ml-py"
    if report.state == READ and report.device_files > len(report.gpus):
        fact = (
            f"{report.device_files} GPUs have a device file, the driver sees {len(report.gpus)}: one fell off the bus"
        )
        yield BAD, fact, _RESET
    yield from _of_wishes(report, wishes)
    if len({gpu.name for gpu in report.gpus if gpu.error is None}) > 1:
        yield WARNING, f"GPUs of several kinds: {_summary(report)}", "the slowest sets the pace; use nodes of one kind"


def _of_wishes(report: GpuReport, wishes: Wishes) -> Iterator[Finding]:
    have, wanted, kind = len(report.gpus), wishes.gpus_per_node, wishes.gpu_type
    if wanted is not None and have < wanted and report.state != UNREADABLE:
        why = f" ({report.why})" if report.why else ""
        yield BAD, f"{have} GPUs{why}, the job wants {wanted}", "choose a node that has them, or lower gpus_per_node"
    for gpu in report.gpus:
        if kind is not None and gpu.name is not None and kind.lower() not in gpu.name.lower():
            yield BAD, f"GPU {gpu.index} is a {gpu.name}, the job wants {kind}", "choose a node of that kind"


def _of_torch(facts: NodeFacts, wishes: Wishes) -> Iterator[Finding]:
    torch = facts.versions.get("torch") or ""
    if torch.endswith("+cpu") and facts.gpus.gpus:
        state = BAD if wishes.gpus_per_node else WARNING
        yield state, f"torch {torch} cannot use these GPUs", f"install a torch for CUDA {facts.gpus.cuda or 'there'}"


def _of_gpu(gpu: Gpu) -> Iterator[Finding]:
    if gpu.error is not None:
        yield BAD, f"{_name(gpu)}: {gpu.error}", "reboot the node; if it comes back, have the GPU replaced"
    for state, fact, remedy in (*_of_memory(gpu), *_of_heat(gpu), *_of_state(gpu)):
        yield state, f"{_name(gpu)}: {fact}", remedy


def _name(gpu: Gpu) -> str:
    return f"GPU {gpu.index}" + (f" ({gpu.bus.bus_id})" if gpu.bus.bus_id else "")


def _of_memory(gpu: Gpu) -> Iterator[Finding]:
    ecc, repairs = gpu.ecc, gpu.repairs
    if ecc.uncorrected:
        yield BAD, f"{ecc.uncorrected} uncorrected memory errors since the driver was loaded", _RESET
    if (ecc.corrected or 0) > _MANY_CORRECTED:
        yield WARNING, f"{ecc.corrected} corrected memory errors since the driver was loaded", _RESET
    if ecc.enabled is False:
        yield WARNING, "memory errors are not looked for (ECC is off)", "nvidia-smi --ecc-config=1, then reboot"
    if repairs.rows_failed:
        yield BAD, "a row of its memory could not be replaced", _REPLACE
    if repairs.rows_pending or repairs.pages_pending:
        yield BAD, "memory waits to be put out of use", _RESET
    if (repairs.retired_pages or 0) > _MANY_RETIRED:
        yield BAD, f"{repairs.retired_pages} retired pages, more than {_MANY_RETIRED}", _REPLACE


def _of_heat(gpu: Gpu) -> Iterator[Finding]:
    heat = gpu.heat
    limit = heat.slowdown_c - 2 if heat.slowdown_c else _HOT_C
    if heat.temperature_c is not None and heat.temperature_c >= limit:
        yield BAD, f"{heat.temperature_c} C, it slows down from {heat.slowdown_c or _HOT_C} C", _COOL
    if heat.slowed_by:
        clocks = "" if heat.sm_mhz is None else f", {heat.sm_mhz} of {heat.max_sm_mhz or '?'} MHz"
        remedy = "see to the power supply" if "power brake" in heat.slowed_by else _COOL
        yield BAD, f"its clock is held down: {', '.join(heat.slowed_by)}{clocks}", remedy


def _of_state(gpu: Gpu) -> Iterator[Finding]:
    bus, memory = gpu.bus, gpu.memory
    if gpu.recovery not in (None, "none"):
        yield BAD, f"the driver asks for: {gpu.recovery}", _RESET
    if bus.width and bus.max_width and bus.width < bus.max_width:
        yield WARNING, f"its bus has {bus.width} of {bus.max_width} lanes", "reseat the card, or update the firmware"
    if memory is not None and memory.processes and memory.used_bytes > _BUSY_BYTES:
        used = f"{memory.used_bytes / 1e9:.1f} GB of its memory"
        yield WARNING, f"{memory.processes} processes hold {used}", "wait for them, or end what a dead job left behind"


def _of_xids(report: GpuReport) -> Iterator[Finding]:
    """One finding per GPU and number; the kernel's log goes back to the start of the machine."""
    counts: dict[tuple[str, int], int] = {}
    for xid in report.xids or ():
        if xid.number in CRITICAL_XIDS:
            counts[xid.bus_id, xid.number] = counts.get((xid.bus_id, xid.number), 0) + 1
    for (bus_id, number), count in counts.items():
        times = f", {count} times" if count > 1 else ""
        yield BAD, f"GPU at {bus_id}: Xid {number}: {CRITICAL_XIDS[number]}{times}", _RESET


def nvlink_verdicts(evidence: Evidence) -> Iterator[Verdict]:
    """A link that is down, or a GPU with fewer links than its neighbours."""
    for node, facts in evidence.facts.items():
        gpus = [gpu for gpu in facts.gpus.gpus if gpu.error is None]
        most = max((len(gpu.links or ()) for gpu in gpus), default=0)
        if not most:
            yield Verdict("nvlink", node, SKIPPED, "no NVLinks" if gpus else "no GPU")
            continue
        short = [gpu for gpu in gpus if _active(gpu) < most]
        for gpu in short:
            remedy = "see nvidia-smi nvlink --status; restart the fabric manager, or reboot"
            yield Verdict("nvlink", node, BAD, f"{_name(gpu)}: {_active(gpu)} of {most} NVLinks are up", remedy)
        if not short:
            yield Verdict("nvlink", node, OK, f"{most} NVLinks of each of {len(gpus)} GPUs are up")


def _active(gpu: Gpu) -> int:
    return sum(link.active for link in gpu.links or ())
