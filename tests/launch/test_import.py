"""Specs stay light: no torch, no transformers, and a job is read without them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.yaml"
HEAVY = ["torch", "transformers", "numpy", "deepspeed"]
PROGRAM = f"""
import json, sys, time
start = time.process_time()
import meshwright, meshwright.launch.load, meshwright.launch.spec
import_s = time.process_time() - start
import pydantic
from pydantic import BaseModel, Field
pydantic_s = time.process_time() - start - import_s
meshwright.launch.spec.Job
models_s = time.process_time() - start - import_s - pydantic_s
meshwright.launch.load.load_job(sys.argv[1])
found = dict(import_s=import_s, pydantic_s=pydantic_s, models_s=models_s)
json.dump(found | dict(heavy=sorted(set({HEAVY}) & set(sys.modules))), sys.stdout)
"""


def measure() -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(EXAMPLE)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_job_is_read_without_torch_and_specs_import_in_150_ms(capsys: pytest.CaptureFixture[str]) -> None:
    found = [measure() for _ in range(3)]
    best = {key: min(each[key] for each in found) * 1e3 for key in ("import_s", "pydantic_s", "models_s")}
    with capsys.disabled():
        shown = ", ".join(f"{key.removesuffix('_s')} {time_ms:.0f} ms" for key, time_ms in best.items())
        sys.stdout.write(f"\nCPU time: {shown}\n")
    assert [each["heavy"] for each in found] == [[], [], []]
    assert best["import_s"] < 150
    assert best["models_s"] < 100, "our own models, without pydantic itself"
