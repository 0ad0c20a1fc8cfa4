"""Decoders x layouts: each cell equal to the plain run, or refused for the reason written here.

`python -m tests.parallel.decoders_matrix` runs all cells and writes docs/parity-decoders.md.
"""

import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import meshwright as mw
from meshwright.parallel.errors import MeshwrightError
from tests.parallel.decoders import DECODERS, decoder, rows

PAGE = Path(__file__).parents[2] / "docs" / "parity-decoders.md"

LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "pp": ({"pp": 2}, {"schedule": "modular", "num_microbatches": 3}),
    "pp x fsdp": ({"pp": 2, "fsdp": 2}, {"schedule": "1f1b", "num_microbatches": 2}),
    "tp": ({"tp": 2}, {}),
    "cp": ({"cp": 2}, {}),
    "tp, dealt": ({"tp": 2}, {"sequence_parallel": True}),
    "pp x tp": ({"pp": 2, "tp": 2}, {"schedule": "zbv", "num_microbatches": 3}),
    "cp x pp": ({"cp": 2, "pp": 2}, {"schedule": "interleaved", "num_microbatches": 4, "recompute": "blocks"}),
}
_OUTSIDE, _DEALT = "leaves values outside of what it gives", "does not work on a dealt sequence"
_ONE_HEAD = "1 heads, 1 key-value heads; legal degrees of tp: 1"
_CANNOT, _NOTHING = "cannot work on a dealt sequence", "can be dealt; use sequence_parallel=False"
_REASONS = {
    _OUTSIDE: {each: "recurrent_gemma xlm" for each in ("pp", "pp x fsdp", "pp x tp")},
    _DEALT: {each: "opt recurrent_gemma xlm" for each in ("cp", "cp x pp")},
    _ONE_HEAD: {each: "bamba mamba2" for each in ("tp", "tp, dealt", "pp x tp")},
    _NOTHING: {"tp, dealt": "falcon_mamba jetmoe mamba"},
    _CANNOT: {"tp, dealt": "bitnet flex_olmo llama4_text minimax minimax_m2 olmoe opt qwen3_next recurrent_gemma rwkv"},
}
REFUSED = {
    (name, layout): reason
    for reason, layouts in _REASONS.items()
    for layout, names in layouts.items()
    for name in names.split()
}


def run(name: str, layout: str) -> mw.ParityReport:
    """Runs a cell on real ranks."""
    degrees, options = LAYOUTS[layout]
    return mw.verify(decoder(name), rows, mw.Mesh(**degrees), **options)


def _verdict(name: str, layout: str) -> tuple[str, float]:
    try:
        report = run(name, layout)
    except MeshwrightError as error:
        why = REFUSED.get((name, layout))
        return ("refused" if why is not None and why in str(error) else "WRONG"), 0.0
    if not report.ok or (name, layout) in REFUSED:
        return "WRONG", report.max_relative_gradient_error
    return "equal", max(report.max_relative_gradient_error, report.loss_error, report.gradient_norm_error)


def main() -> int:
    """Runs all cells and writes their page."""
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in DECODERS}
    start_s = time.monotonic()
    for name, layout in product(DECODERS, LAYOUTS):
        found[name].append(_verdict(name, layout))
        sys.stderr.write(f"\r{sum(map(len, found.values()))} cells, {time.monotonic() - start_s:.0f} s  {name:<40}")
    PAGE.write_text(_page(found), encoding="utf-8")
    sys.stderr.write(f"\nwrote {PAGE}\n")
    return any(verdict == "WRONG" for cells in found.values() for verdict, _ in cells)


def _page(found: dict[str, list[tuple[str, float]]]) -> str:
    verdicts = [verdict for cells in found.values() for verdict, _ in cells]
    counts = ", ".join(f"{verdicts.count(each)} {each}" for each in ("equal", "refused", "WRONG"))
    lines = [
        "# Decoders of transformers",
        "",
        f"{len(found)} architectures that `AutoModelForCausalLM` builds, as they come, of four small blocks, ran an",
        "optimizer step on these meshes (real ranks, gloo, float64, dropout on). *Equal* means that loss, every",
        "gradient, their norm and the next weights equal those of the unwrapped model within 1e-10; *refused* that the",
        f"layout was refused before a gradient was computed, for the reason below. {counts}.",
        "`make matrix` writes this page.",
        "",
        "- "
        + "\n- ".join(
            f"**{name}**: {mw.Mesh(**degrees)}{_said(options)}" for name, (degrees, options) in LAYOUTS.items()
        ),
        "",
        f"| decoder | {' | '.join(LAYOUTS)} | largest error |",
        "|---" * (len(LAYOUTS) + 2) + "|",
    ]
    for name, cells in sorted(found.items()):
        lines.append(
            f"| {name} | {' | '.join(verdict for verdict, _ in cells)} | {max(error for _, error in cells):.1e} |"
        )
    why = [f"- {name} on {layout}: {reason}" for (name, layout), reason in sorted(REFUSED.items())]
    return "\n".join([*lines, "", "Why what was refused was refused:", "", *why]) + "\n"


def _said(options: dict[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in options.items())


if __name__ == "__main__":
    sys.exit(main())
