"""What a run reports: one JSON object per logged step in metrics.jsonl, and one plain line on standard output.

A resumed run starts its file with the records its checkpoint holds, so that the file is the whole curve and each step
is in it once.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["MetricsFile", "now_unix_s", "peak_memory_bytes", "progress_line", "restart_record", "utilisation"]


@dataclass
class MetricsFile:
    """metrics.jsonl of one run; only rank 0 writes, other ranks hold one without a path.

    Args:
        path: the file; None writes nothing.
        heard: is told every record that is written.
    """

    path: Path | None
    heard: Callable[[Mapping[str, Any]], None] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def restart(self, history: list[dict[str, Any]]) -> None:
        """Makes the file hold exactly `history`."""
        self.history = list(history)
        if self.path is not None:
            self.path.write_text("".join(_line(record) for record in self.history))

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record in a single write."""
        self.history.append(dict(record))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(_line(record))
        if self.heard is not None:
            self.heard(record)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":")) + "\n"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this rank ever held: of the GPU, or of the process (VmHWM of /proc/self/status)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource

        scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there and KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def utilisation(flops_per_token: float, tokens_per_s: float, peak_flops_per_s: float) -> float:
    """Model-FLOP utilisation: FLOPs the model needs per second over FLOPs the devices can do per second.

    >>> utilisation(6e6, 1000.0, 12e9)
    0.5
    """
    return flops_per_token * tokens_per_s / peak_flops_per_s


def progress_line(record: Mapping[str, Any], steps: int) -> str:
    """A record as one line for people.

    >>> progress_line({"step": 20, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.5, "step_s": 0.25}, 400)
    'step  20/400  loss 2.5000  lr 1.00e-03  1,234 tokens/s  250 ms/step'
    """
    width = len(str(steps))
    parts = [f"step {record['step']:>{width}}/{steps}"]
    if "loss" in record:
        parts.append(f"loss {record['loss']:.4f}")
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.4f}")
    if "lr" in record:
        parts.append(f"lr {record['lr']:.2e}")
    if "tokens_per_s" in record:
        parts += [f"{int(record['tokens_per_s']):,} tokens/s", f"{record['step_s'] * 1e3:.0f} ms/step"]
    if record.get("padding_ratio"):
        parts.append(f"padding {record['padding_ratio']:.1%}")
    if record.get("mfu_full") is not None:
        parts.append(f"MFU {record['mfu_full']:.1%} ({record['mfu_causal']:.1%} causal)")
    return "  ".join(parts)


def restart_record(step: int) -> list[dict[str, Any]]:
    """The record of a training that begins in the middle, or not for the first time; none for an ordinary beginning.

    Args:
        step: it goes on from.
    """
    attempt = int(os.environ.get("MESHWRIGHT_ATTEMPT", "0"))
    if not step and not attempt:
        return []
    run_id = os.environ.get("MESHWRIGHT_RUN_ID", "")
    return [{"event": "restart", "step": step, "run_id": run_id, "attempt": attempt, "time_unix_s": now_unix_s()}]


def now_unix_s() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)
