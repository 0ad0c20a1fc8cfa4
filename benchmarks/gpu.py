"""All benchmarks of one GPU within a given time, each in a process of its own; tables last, numbers in one file.

`python -m benchmarks.gpu [--device cuda|cpu] [--tiny] [--seconds S] [--json PATH]`
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import gpu_attention, gpu_context, gpu_layered, gpu_predicted, gpu_ranks
from benchmarks.sections import Sections, asked

__all__ = ["main"]

_SHARES: dict[ModuleType, float] = {
    gpu_attention: 60,
    gpu_layered: 40,
    gpu_context: 110,
    gpu_ranks: 90,
    gpu_predicted: 120,
}
_GRACE_S = 15.0  # for what began just before the end
_START_S = 10.0  # imports, and the first use of a GPU


def main() -> None:
    """Runs one after the other; what one leaves of its time, the next ones share."""
    sections = asked(__doc__, seconds=420.0)
    found: dict[str, Any] = {}
    shares = dict(_SHARES)
    with tempfile.TemporaryDirectory() as folder:
        for module in _SHARES:
            name = module.__name__.removeprefix("benchmarks.gpu_")
            path = Path(folder) / f"{name}.json"
            seconds = max(1.0, sections.left_s - _GRACE_S) * shares[module] / sum(shares.values()) - _START_S
            ended = _run(module, sections, seconds=seconds, path=path)
            found[name] = json.loads(path.read_text()) if path.exists() else {"sections": {}}
            found[name]["ended"] = ended
            shares.pop(module)
    for module in _SHARES:
        name = module.__name__.removeprefix("benchmarks.gpu_")
        sys.stdout.write(f"\n{name}: {found[name]['ended']}\n{_text(module, found[name])}")
    first = next(each for each in found.values())
    described = {name: value for name, value in first.items() if name not in ("sections", "ended")}
    if sections.path is not None:
        sections.path.write_text(json.dumps({**described, "benchmarks": found}, indent=1) + "\n")


def _run(module: ModuleType, sections: Sections, *, seconds: float, path: Path) -> str:
    """One benchmark; says how it ended."""
    command = [sys.executable, "-m", module.__name__, "--device", sections.device.kind, "--json", str(path)]
    command += ["--seconds", str(max(seconds, 1.0)), *(["--tiny"] if sections.tiny else [])]
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    start_s = time.monotonic()
    try:
        code = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, timeout=seconds + _START_S + _GRACE_S, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {time.monotonic() - start_s:.0f} s"
    return f"{time.monotonic() - start_s:.0f} s, exit code {code}"


def _text(module: ModuleType, found: dict[str, Any]) -> str:
    try:
        text: str = module.table(found)
    except (KeyError, TypeError, ValueError) as error:  # a section that ended half way
        return f"no table: {type(error).__name__}: {error}\n"
    return text


if __name__ == "__main__":
    main()
