"""Calibrates this machine: starts ranks that measure it, listens to them, fits an entry of the catalog.

One rank for each GPU that torch can use; on CPUs up to eight, which share the cores as ranks of a local launch do. The
entry is `calibration.entry`; nothing here imports torch.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from meshwright.clusters.calibration import CalibrationError, Machine, entry

__all__ = ["HEAD", "calibrated", "share_taken", "this_machine", "usable_gpus", "written"]

HEAD = "# Written by `meshwright doctor --calibrate`; loaded by `meshwright.clusters.calibration.hardware_of`.\n"
_TIMEOUT_S = 300.0
_MOST_RANKS = 8
_PROCESSORS = Path("/proc/stat")
_LOOK_S = 0.5


def usable_gpus() -> int:
    """GPUs that torch can use here; asked of another process, so that this one need not import it."""
    words = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else 0


def this_machine() -> Machine:
    """Where this process runs."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        processor = named[0].partition(":")[2].strip() if named else processor
    return Machine(
        name=platform.node(),
        processor=processor,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def calibrated(
    tell: Callable[[str], None], *, counts: Sequence[int] | None = None, gpus: int | None = None
) -> dict[str, Any]:
    """Measures this machine.

    Args:
        tell: called with a line of progress when a part begins.
        counts: of ranks to measure, ascending; all powers of two there are, up to eight, where None.
        gpus: to use; those that torch can use where None.

    Returns:
        The entry, as plain values; `busy` in it is the share of the processors that others took before or after.

    Raises:
        CalibrationError: ranks did not start, or one of them failed.
    """
    start_s, before = time.monotonic(), _busy()
    found = usable_gpus() if gpus is None else gpus
    most = found or _MOST_RANKS
    chosen = tuple(counts or (each for each in (1, 2, 4, 8) if each <= most))
    tell(f"starting {chosen[-1]} ranks on {f'{found} GPUs' if found else 'CPUs'}")
    measured = []
    with _started("nccl" if found else "gloo", chosen) as lines:
        for told in lines:
            if "begins" in told:
                tell(told["begins"])
            elif "ranks" in told:
                measured.append(told)
    made = entry(measured, this_machine(), seconds=time.monotonic() - start_s)
    made["calibrated"]["busy"] = max(before, _busy())
    return made


def share_taken(before: str, after: str) -> float:
    """Share of all processors that was not idle between two readings of /proc/stat; what a host takes away counts.

    >>> share_taken("cpu 10 0 0 100 0 0 0 0 0 0", "cpu 40 0 0 190 0 0 0 10 0 0")
    0.3076923076923077
    """
    spent = []
    for text in (before, after):
        user, nice, system, idle, iowait, *others = (int(each) for each in text.splitlines()[0].split()[1:9])
        spent.append((idle + iowait, user + nice + system + sum(others)))
    (idle, busy), (idle_after, busy_after) = spent
    total = idle_after - idle + busy_after - busy
    return (busy_after - busy) / total if total > 0 else 0.0


def _busy() -> float:
    """What others take of this machine while nothing of ours runs; 0 where that cannot be read."""
    try:
        before = _PROCESSORS.read_text(encoding="ascii")
        time.sleep(_LOOK_S)
        return share_taken(before, _PROCESSORS.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0.0


@contextmanager
def _started(backend: str, counts: Sequence[int]) -> Iterator[Iterator[dict[str, Any]]]:
    """What rank 0 prints, line by line, while all ranks run; they are ended when the block is left."""
    module = "meshwright.clusters.calibrate_rank"
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w+", encoding="utf-8") as errors:
        ranks = subprocess.Popen(
            [sys.executable, "-m", module, backend, folder, ",".join(map(str, counts)), str(_TIMEOUT_S)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # all ranks are one group of processes, to be ended together
        )
        try:
            yield _lines(ranks, errors)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
            if ranks.stdout is not None:
                ranks.stdout.close()


def _lines(ranks: "subprocess.Popen[str]", errors: TextIO) -> Iterator[dict[str, Any]]:
    assert ranks.stdout is not None, "rank 0 prints"
    ended = False
    for line in ranks.stdout:
        if line.startswith("{"):
            told = json.loads(line)
            ended = "ended" in told
            yield told
    if not ended:
        errors.seek(0)
        last = [line for line in errors.read().splitlines() if line.startswith("rank")] or ["they said nothing"]
        raise CalibrationError(f"ranks failed while they measured: {last[0]}")


def written(found: dict[str, Any]) -> str:
    """The text of an entry, numbers to five digits."""
    import yaml

    return HEAD + yaml.safe_dump(_rounded(found), sort_keys=False, width=120)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
