"""Predicted against published: step time and memory of each run of a table, the order of layouts, Calculon beside them.

`python -m benchmarks.simulate --runs FILE.csv` takes any table in the format of `benchmarks/data/published_runs.csv`
(the default). An error is the prediction over the measured value, less one. Dense runs on Ampere and Hopper count in
`dense_step_time_mape_percent`; the others are listed by their kind of GPU.
"""

import argparse
import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from benchmarks.published import LACKING, LeftOutError, Run, read, run_of
from meshwright.clusters.simulated import Efficiency, fitted, memory, step

__all__ = ["DATA", "GENERATIONS", "RUNS", "groups", "loaded", "memory_error", "order", "report", "step_error", "table"]

DATA = Path(__file__).with_name("data")
RUNS = DATA / "published_runs.csv"
GENERATIONS = ("ampere", "hopper")
_ALTERNATIVES = 4  # layouts of one job that make a group


def loaded(path: Path) -> tuple[list[Run], dict[int, str]]:
    """Runs of a table that say enough, and line -> why not of the others."""
    runs, left = [], {}
    for line, row in read(path):
        try:
            runs.append(run_of(line, row))
        except LeftOutError as reason:
            left[line] = f"{row['source']}: {reason}"
    return runs, left


def step_error(run: Run, efficiency: Efficiency) -> float:
    """Of the predicted step time; the run has a measured one."""
    assert run.measured_s is not None, run
    return step(replace(run.training, efficiency=efficiency)).total_s / run.measured_s - 1


def memory_error(run: Run, efficiency: Efficiency) -> float:
    """Of the predicted memory; the run has a measured one."""
    assert run.memory_bytes is not None, run
    found = memory(replace(run.training, efficiency=efficiency))
    return (found.tensor_bytes if run.only_tensors else found.total_bytes) / run.memory_bytes - 1


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Alternatives of one job: one source, model, number of GPUs, batch, precision; at least four layouts."""
    jobs: dict[Any, list[Run]] = defaultdict(list)
    for run in runs:
        of = run.training
        gpus = of.cluster.gpu.name, of.cluster.num_gpus
        jobs[run.source, of.model, gpus, of.layout.global_batch, of.engine.precision].append(run)
    return [each for each in jobs.values() if len({run.training.layout for run in each}) >= _ALTERNATIVES]


def order(found: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """How well predictions choose: share of pairs in the right order, and what the choice costs over the best.

    Args:
        found: for each group (predicted, measured) seconds of its layouts.

    >>> order([[(1.0, 10.0), (2.0, 11.0), (3.0, 8.0)]])
    (0.3333333333333333, 0.25)
    """
    pairs = [pair for each in found for pair in combinations(each, 2) if pair[0][1] != pair[1][1]]
    right = [(one[0] - other[0]) * (one[1] - other[1]) > 0 for one, other in pairs]
    regrets = [min(each)[1] / min(measured for _, measured in each) - 1 for each in found]
    return sum(right) / max(1, len(right)), statistics.fmean(regrets) if regrets else 0.0


def _percent(errors: Sequence[float]) -> float | None:
    return round(100 * statistics.fmean(map(abs, errors)), 2) if errors else None


def _spread(errors: Sequence[float]) -> dict[str, Any]:
    sizes = sorted(map(abs, errors))
    ranked = {name: sizes[min(len(sizes) - 1, share * len(sizes) // 100)] for name, share in (("p50", 50), ("p90", 90))}
    told = {"max": sizes[-1], "bias": statistics.fmean(errors)} | ranked
    percents = {f"{name}_percent": round(100 * value, 2) for name, value in told.items()}
    return {"rows": len(sizes), "mape_percent": _percent(errors)} | percents


def _by(runs: Sequence[Run], error: Callable[[Run], float], name: Callable[[Run], str]) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        parts[name(run)].append(error(run))
    return {each: _spread(parts[each]) for each in sorted(parts)}


def report(path: Path, efficiency: Efficiency | None = None) -> dict[str, Any]:
    """All numbers about one table."""
    reached = efficiency or fitted()
    runs, left = loaded(path)
    timed = [run for run in runs if run.measured_s is not None]
    sparse = [run for run in timed if run.training.model.experts]
    all_dense = [run for run in timed if not run.training.model.experts]
    dense = [run for run in all_dense if run.training.cluster.gpu.generation in GENERATIONS]
    others = [run for run in all_dense if run.training.cluster.gpu.generation not in GENERATIONS]
    kept = [run for run in runs if run.memory_bytes is not None]
    of_step, of_memory = partial(step_error, efficiency=reached), partial(memory_error, efficiency=reached)
    sizes = [abs(of_memory(run)) for run in kept]
    return {
        "dense_step_time_mape_percent": _percent([*map(of_step, dense)]),
        "moe_step_time_mape_percent": _percent([*map(of_step, sparse)]),
        "memory_median_error_percent": round(100 * statistics.median(sizes), 2) if sizes else None,
        "rows_predicted": len(runs),
        "rows_left_out": len(left),
        "rows_with_needed_columns_percent": _covered(runs, left.values()),
        **_choices(dense, of_step),
        "dense": _by(dense, of_step, _source),
        "dense_on_other_gpus": _by(others, of_step, _kind),
        "moe": _by(sparse, of_step, _kind),
        "memory": _by(kept, of_memory, _source),
        "left_out": {str(line): reason for line, reason in left.items()},
        "calculon": _beside(dense, reached) if path.resolve() == RUNS.resolve() else None,
    }


def _covered(runs: Sequence[Run], reasons: Iterable[str]) -> float | None:
    """Share of rows that are predicted, of those whose source gives every column that a prediction needs."""
    others = sum(LACKING not in reason for reason in reasons)
    return round(100 * len(runs) / (len(runs) + others), 2) if runs or others else None


def _choices(runs: Iterable[Run], error: Callable[[Run], float]) -> dict[str, float]:
    found = []
    for group in groups(runs):
        seconds = [(run, run.measured_s or 0.0) for run in group]
        found.append([((1 + error(run)) * measured_s, measured_s) for run, measured_s in seconds])
    right, regret = order(found)
    return {"pairwise_order": round(right, 4), "mean_regret_percent": round(100 * regret, 2), "groups": len(found)}


def _source(run: Run) -> str:
    return run.source


def _kind(run: Run) -> str:
    return run.training.cluster.gpu.name


def _beside(runs: Sequence[Run], reached: Efficiency) -> dict[str, Any]:
    """Calculon's errors and ours on the rows that both predict."""
    by_line = {run.line: run for run in runs}
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    with (DATA / "calculon_baseline.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if run := by_line.get(int(row["csv_line"])):
                ours[row["source"]].append(step_error(run, reached))
                theirs[row["source"]].append(float(row["rel_error"]))

    def of(mine: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
        return {"rows": len(mine), "ours_percent": _percent(mine), "calculon_percent": _percent(other)}

    whole = of([*chain.from_iterable(ours.values())], [*chain.from_iterable(theirs.values())])
    return whole | {"by": {each: of(ours[each], theirs[each]) for each in sorted(ours)}}


def table(found: Mapping[str, Any]) -> str:
    """The dense sources of a report, most rows first, with Calculon's error on the rows that it predicts."""
    lines = ["| source | rows | error | rows of Calculon | its error | ours on them |", "|---|---|---|---|---|---|"]
    beside = found["calculon"] or {"by": {}}
    whole = {"rows": sum(each["rows"] for each in found["dense"].values())}
    whole["mape_percent"] = found["dense_step_time_mape_percent"]
    parts = sorted(found["dense"].items(), key=lambda each: -each[1]["rows"])
    for name, each in [*parts, ("all", whole)]:
        other = beside if name == "all" else beside["by"].get(name)
        also = (
            f"{other['rows']} | {other['calculon_percent']:.1f}% | {other['ours_percent']:.1f}%"
            if other
            else "- | - | -"
        )
        lines.append(f"| {name} | {each['rows']} | {each['mape_percent']:.1f}% | {also} |")
    return "\n".join(lines) + "\n"


def _text(found: Mapping[str, Any]) -> str:
    lines = []
    for part in ("dense", "dense_on_other_gpus", "moe", "memory"):
        lines.append(f"{part:<60} rows   mean|e|     p50     p90     max    bias  (percent)")
        for name, each in found[part].items():
            numbers = [each[f"{key}_percent"] for key in ("mape", "p50", "p90", "max", "bias")]
            lines.append(f"  {name[:56]:<58} {each['rows']:4d}  " + "".join(f"{value:8.1f}" for value in numbers))
    if beside := found["calculon"]:
        lines.append(f"{'on the rows that Calculon predicts':<60} rows      ours  calculon")
        for name, each in [*beside["by"].items(), ("all", beside)]:
            numbers = [each["ours_percent"], each["calculon_percent"]]
            lines.append(f"  {name[:56]:<58} {each['rows']:4d}  " + "".join(f"{value:10.1f}" for value in numbers))
    reasons: dict[str, list[str]] = defaultdict(list)
    for line, reason in found["left_out"].items():
        reasons[reason].append(line)
    lines.append("left out")
    lines += [f"  {len(each):4d}  {reason} (line {', '.join(each[:3])} ...)" for reason, each in reasons.items()]
    lines += [f"{name} {value}" for name, value in found.items() if isinstance(value, int | float)]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=RUNS, help="table of runs")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--table", action="store_true", help="the table of docs/concepts/simulate.md")
    arguments = parser.parse_args()
    if not arguments.runs.is_file():
        parser.error(f"--runs {arguments.runs}: there is no such file")
    found = report(arguments.runs)
    shown = table(found) if arguments.table else _text(found)
    sys.stdout.write(json.dumps(found) + "\n" if arguments.json else shown)


if __name__ == "__main__":
    main()
