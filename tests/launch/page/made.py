"""Run directories as training leaves them, made up: small ones, long ones, and broken ones."""

import json
import math
from pathlib import Path
from typing import Any

ID = "20261126T101010Z-a1b2c3"
START_S = 1_795_690_000.0


def record(step: int, **more: Any) -> dict[str, Any]:
    """What a step logs on GPUs with experts."""
    return {
        "step": step,
        "loss": 2 + 8 * math.exp(-step / 50),
        "tokens": 4096 * step,
        "tokens_per_s": 61_000.0,
        "mfu_full": 0.41,
        "mfu_causal": 0.38,
        "lr": 1e-3 * min(1.0, step / 50),
        "gradient_norm": 1.5,
        "peak_memory_bytes": 38_400_000_000,
        "counted_s": 2.0,
        "network_sent_bytes": 400_000_000,
        "network_received_bytes": 200_000_000,
        "loopback_bytes": 10,
        "gpu_utilisation": 0.9,
        "gpu_power_w": 612.0,
        "experts": {"worst_expert_ratio": 1.3, "worst_node_ratio": 1.1, "dead_experts": 0},
        "time_unix_s": START_S + step,
        **more,
    }


def write_run(folder: Path, *, steps: int = 200, job: str = "llama", **ended: Any) -> Path:
    """A run of which every file is there, restarted once at step 100.

    Args:
        folder: its directory.
        steps: that are logged, of 250.
        job: its name.
        ended: what the exit record says; there is none unless something is given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"step": 0, "validation_loss": 10.0, "time_unix_s": START_S}]
    rows += [record(step) for step in range(1, steps + 1)]
    rows += [{"event": "restart", "step": 100, "run_id": ID, "attempt": 1, "time_unix_s": START_S + 101}]
    rows += [{"step": steps, "validation_loss": 2.5, "time_unix_s": START_S + steps + 1}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    parallel = {"dp": 2, "tp": 2, "schedule": "accumulate"}
    write(folder / "job.json", {"name": job, "train": {"steps": 250}, "parallel": parallel})
    write(folder / "plan.json", {"nodes": [{}, {}]})
    write(folder / "launch.json", {"run_id": ID, "name": job, "cluster": "slurm", "started_unix_s": START_S - 20})
    if ended:
        write(folder / "exit.json", {"run_id": ID, "ended_unix_s": START_S + 340, **ended})
    return folder


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
