"""Jobs of one GPU on paper and run: seconds of a step and the most bytes, of the catalog and of a calibration.

Jobs were chosen before any was run, and no number is fitted to them. Each is launched as a user would; its first steps
are left out. On a CPU this only shows that it runs.
`python -m benchmarks.gpu_predicted [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import yaml

import meshwright as mw
from benchmarks.predicted import WARM_STEPS, calibrate, launched
from benchmarks.predicted_jobs import Small
from benchmarks.sections import Sections, aligned, asked

__all__ = ["JOBS", "main", "measure", "table"]

_STEPS = 12
_LLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
}
_GPT2 = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}
_MIXTRAL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
}
_QWEN3 = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}

JOBS: Mapping[str, Small] = {
    "llama, 0.7 billion": Small(parallel={}, config=_LLAMA, batch_size=8, length=2048),
    "gpt2 medium, layered, recomputed": Small(
        parallel={"schedule": "layered", "num_microbatches": 4, "recompute": "blocks"},
        architecture="gpt2",
        config=_GPT2,
        batch_size=32,
        length=1024,
    ),
    "mixtral": Small(
        parallel={"num_microbatches": 2}, architecture="mixtral", config=_MIXTRAL, batch_size=8, length=1024
    ),
    "qwen3, 8,192 positions": Small(parallel={}, architecture="qwen3", config=_QWEN3, batch_size=4, length=8192),
}
_TINY: Mapping[str, Small] = {"llama": Small(parallel={}, batch_size=4, length=64)}


def measure(sections: Sections, *, catalog: str = "H100") -> None:
    """All sections: the calibration, then job by job."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sections.run("calibration", partial(_calibrate, folder / "machine.yaml"))
        ways = {"calibrated": str(folder / "machine.yaml"), "catalog": catalog}
        for number, (job, small) in enumerate((_TINY if sections.tiny else JOBS).items()):
            compare = partial(_compare, small, folder / f"job-{number}.yaml", ways)
            sections.run(job, compare, needs_s=0.0 if sections.tiny else 20.0)


def _calibrate(entry: Path) -> dict[str, Any]:
    return {"said": calibrate(entry).splitlines(), "entry": yaml.safe_load(entry.read_text())}


def _compare(small: Small, path: Path, ways: Mapping[str, str]) -> dict[str, Any]:
    """A job on paper by each way, and run."""
    found = small.file(steps=WARM_STEPS + _STEPS)
    found["train"]["precision"] = "bfloat16"
    path.write_text(yaml.safe_dump(found))
    paper = {}
    for way, gpu in ways.items():
        forecast = mw.simulate(path, gpu=gpu).forecast
        assert forecast is not None, path
        paper[way] = {"step_s": forecast.step.total_s, "causes": dict(vars(forecast.step))}
        paper[way] |= {"tensor_bytes": forecast.memory.tensor_bytes}
    steps = launched(path, path.stem)
    step_s = median(each["step_s"] for each in steps)
    peak_bytes = max(each["peak_memory_bytes"] for each in steps)
    for each in paper.values():
        each |= {"step_error": each["step_s"] / step_s - 1, "memory_error": each["tensor_bytes"] / peak_bytes - 1}
    return {"step_s": step_s, "fastest_s": min(each["step_s"] for each in steps), "peak_bytes": peak_bytes} | paper


def table(found: dict[str, Any]) -> str:
    """What was measured, as text."""
    rows = [["", "ms a step", "calibrated", "catalog", "peak GB", "on paper"]]
    lines = []
    for name, each in found["sections"].items():
        if each is None or "step_s" not in each:
            lines.append(f"{name}: {each if each is None or 'said' not in each else each['said']}\n")
            continue
        errors = [f"{each[way]['step_error']:+.1%}" for way in ("calibrated", "catalog")]
        memory = [f"{each['peak_bytes'] / 1e9:.2f}", f"{each['catalog']['memory_error']:+.1%}"]
        rows.append([name, f"{1e3 * each['step_s']:.1f}", *errors, *memory])
    return aligned(rows) + "".join(lines)


def main() -> None:
    """Measures and prints."""
    sections = asked(__doc__, seconds=150.0)
    measure(sections)
    sys.stdout.write(table(sections.found))


if __name__ == "__main__":
    main()
