"""The parity matrix: families x layouts, each cell equal to the plain run or refused for the reason written here.

`python -m tests.parallel.matrix` runs all cells and writes docs/parity.md.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import meshwright as mw
from meshwright.parallel.errors import MeshwrightError
from tests.parallel.families import FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"

Layout = tuple[dict[str, int], dict[str, Any]]

_CONTEXT: tuple[Layout, ...] = (
    ({"cp": 2}, {"cp_kind": "ring", "num_microbatches": 2}),
    ({"cp": 2, "fsdp": 2}, {"cp_kind": "ring"}),
    ({"cp": 2, "tp": 2}, {"num_microbatches": 2}),
    ({"cp": 4}, {"cp_kind": "hybrid"}),
    ({"cp": 2, "dp": 2}, {"cp_kind": "gather"}),
    ({"cp": 2, "fsdp": 2}, {"schedule": "layered", "num_microbatches": 2}),
    ({"cp": 2, "pp": 2}, {"schedule": "modular", "num_microbatches": 2}),
    ({"cp": 2, "pp": 2, "fsdp": 2}, {"schedule": "1f1b", "num_microbatches": 3, "cp_kind": "ring"}),
    ({"cp": 2, "tp": 2, "fsdp": 2}, {"schedule": "layered", "num_microbatches": 2, "cp_kind": "ring"}),
)
_DATA: tuple[Layout, ...] = (
    ({}, {}),
    ({"dp": 2}, {}),
    *(({"fsdp": 2}, {"zero_stage": stage}) for stage in (1, 2, 3)),
    *(({"dp": 2, "fsdp": 2}, {"zero_stage": stage}) for stage in (1, 3)),
)
_TENSOR: tuple[Layout, ...] = (
    ({}, {}),
    ({"tp": 2}, {}),
    ({"tp": 2}, {"sequence_parallel": True}),
    ({"tp": 4}, {}),
)
WHOLE: tuple[Layout, ...] = (
    ({"tp": 4}, {"sequence_parallel": True, "num_microbatches": 2}),
    *_CONTEXT,
    *(
        ({**data, **tensor}, {**data_options, **tensor_options, "num_microbatches": parts})
        for (data, data_options), (tensor, tensor_options) in product(_DATA, _TENSOR)
        for parts in ((1, 2) if len({**data, **tensor}) == 1 else (2,))
        if mw.Mesh(**data, **tensor).world_size in range(2, 9)
    ),
)

# families that a layout with this word cannot have: word -> family -> a part of the message
_TWICE = "draws dropout masks that both"
REFUSED = {
    "cp x tp": dict.fromkeys(("gpt2", "bert", "t5", "translator"), _TWICE),
    "cp": dict.fromkeys(("residual_net", "mixer"), "does not work on a dealt sequence"),
    "tp": {"residual_net": "nothing can be dealt"},
    "sequence_parallel": {
        "residual_net": "nothing in blocks.* can be dealt",
        "mixer": "blocks.0 cannot work on a dealt sequence",
    },
}


@dataclass(frozen=True)
class Cell:
    """One family on one layout."""

    family: str
    degrees: dict[str, int]
    options: dict[str, Any]

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.options.items() if value not in (1, False)]
        return " ".join([self.family, str(mw.Mesh(**self.degrees)), *words])

    @property
    def refusal(self) -> str | None:
        """A part of the message that this cell must be refused with; None where it must run."""
        words = [word for word in REFUSED if self.options.get(word) or set(word.split(" x ")) <= set(self.degrees)]
        found = [REFUSED[word][self.family] for word in reversed(words) if self.family in REFUSED[word]]
        return found[0] if found else None

    def run(self) -> mw.ParityReport:
        """Runs the cell on real ranks."""
        build_model, build_batch = FAMILIES[self.family]
        return mw.verify(build_model, build_batch, mw.Mesh(**self.degrees), **self.options)  # type: ignore[arg-type]


def cells(layouts: tuple[Layout, ...]) -> Iterator[Cell]:
    """All families on the given layouts."""
    for family, (degrees, options) in product(FAMILIES, layouts):
        yield Cell(family, degrees, options)


def main() -> int:
    """Runs the whole matrix and writes its page."""
    rows: dict[str, list[tuple[str, float]]] = {family: [] for family in FAMILIES}
    wrong: list[str] = []
    start_s = time.monotonic()
    for number, cell in enumerate(cells(WHOLE)):
        verdict, error = _verdict(cell)
        rows[cell.family].append((verdict, error))
        if verdict == "WRONG":
            wrong.append(str(cell))
        sys.stderr.write(f"\r{number + 1} cells, {len(wrong)} wrong, {time.monotonic() - start_s:.0f} s  {cell!s:<80}")
    PAGE.write_text(_page(rows, wrong), encoding="utf-8")
    sys.stderr.write(f"\nwrote {PAGE}\n" + "\n".join(wrong))
    return 1 if wrong else 0


def _verdict(cell: Cell) -> tuple[str, float]:
    try:
        report = cell.run()
    except MeshwrightError as error:
        known = cell.refusal is not None and cell.refusal in str(error)
        return ("refused" if known else "WRONG"), 0.0
    if not report.ok or report.notes or cell.refusal is not None:
        return "WRONG", report.max_relative_gradient_error
    return "equal", max(report.max_relative_gradient_error, report.loss_error, report.gradient_norm_error)


def _page(rows: dict[str, list[tuple[str, float]]], wrong: list[str]) -> str:
    lines = [
        "# The parity matrix",
        "",
        f"Each family ran one optimizer step on {len(WHOLE)} layouts: dp, fsdp (ZeRO 1, 2, 3), tp, sequence parallel",
        "and micro-batches, alone, in pairs and triples, on 2 to 8 real ranks (gloo, float64, dropout on). *Equal*",
        "means that loss, every gradient, their norm and the next weights equal those of the unwrapped model within",
        "1e-10; *refused* that the layout was refused before a rank started, for a reason that the tests state.",
        "`make matrix` writes this page.",
        "",
        "| family | equal | refused | wrong | largest error |",
        "|---|---|---|---|---|",
    ]
    for family, found in rows.items():
        counts = [sum(verdict == name for verdict, _ in found) for name in ("equal", "refused", "WRONG")]
        lines.append(f"| {family} | {' | '.join(map(str, counts))} | {max(error for _, error in found):.1e} |")
    return "\n".join([*lines, "", *(f"wrong: {each}" for each in wrong)]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
