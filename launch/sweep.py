"""A sweep as a value: one run per combination of values, each as if it were launched by itself with `--set`. Pure.

Combinations come in the order written, the last key fastest. A run's name says its values, so that a sweep that is
launched again finds the checkpoints of every combination, also when values were added to the grid meanwhile.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.load import OpenJob
from meshwright.launch.overrides import put_node
from meshwright.launch.yaml_nodes import Items, Mark, Node, Scalar, Table
from meshwright.launch.yaml_scalars import ScalarError, plain_value

__all__ = ["MOST_RUNS", "Setting", "SweepPlan", "Variant", "plan_sweep", "readable"]

MOST_RUNS = 1000
"""Runs of one sweep: what Slurm takes as one array unless it was told otherwise."""

_MOST_NAME = 80  # of the 100 characters of a name; the rest is the suffix's
_MOST_SUFFIX = 60
_OWN = {"sweep": "sweeps do not nest", "name": "runs are named by their values", "version": "it says the format"}
_OWN["secrets"] = "values of a sweep are shown"


@dataclass(frozen=True)
class Setting:
    """One key and the value that it has in a run.

    Args:
        key: dotted.
        node: the value, with the place where the grid has it.
        mark: where the grid has the key.
    """

    key: str
    node: Node
    mark: Mark

    @property
    def text(self) -> str:
        """The value as `--set` reads it."""
        value = self.node.plain()
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9._/-]*", value) and _read(value) == value
        return value if plain else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Variant:
    """One combination.

    Args:
        index: from 0.
        settings: in the order of the grid.
        suffix: of the run's name.
    """

    index: int
    settings: tuple[Setting, ...]
    suffix: str

    @property
    def overrides(self) -> tuple[str, ...]:
        """What one would give to `--set`."""
        return tuple(f"{each.key}={each.text}" for each in self.settings)

    def apply(self, root: Table) -> Table:
        """The tree of the job with these values, and with the suffix in its name."""
        for each in self.settings:
            changed = put_node(root, each.key, each.node, mark=each.mark)
            assert isinstance(changed, Table), "a mapping stays one"
            root = changed
        name = root.nodes.get("name")
        if not isinstance(name, Scalar) or not isinstance(name.value, str):
            return root  # refused by the check of the job
        named = replace(name, value=f"{name.value}-{self.suffix}")
        return replace(root, nodes={**root.nodes, "name": named})

    def __str__(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True)
class SweepPlan:
    """All runs of a sweep.

    Args:
        name: of the job.
        max_parallel: runs at the same time.
        variants: in the order in which they run.
    """

    name: str
    max_parallel: int
    variants: tuple[Variant, ...]

    def run_id(self, sweep_id: str, index: int) -> str:
        """Id of one run, of the sweep's and its number.

        >>> SweepPlan("tiny", 1, ()).run_id("r1", 3)
        'r1-3'
        """
        return f"{sweep_id}-{index:0{len(str(max(0, len(self.variants) - 1)))}d}"


def plan_sweep(opened: OpenJob) -> SweepPlan | None:
    """The sweep that a job asks for; None where there is none, or one that the check of the job refuses.

    Raises:
        JobError: for keys that no sweep may set, values that stand twice, and more runs than `MOST_RUNS`.
    """
    sweep = opened.root.nodes.get("sweep")
    grid = sweep.nodes.get("grid") if isinstance(sweep, Table) else None
    if not isinstance(sweep, Table) or not isinstance(grid, Table) or not grid.nodes:
        return None
    if not all(isinstance(values, Items) for values in grid.nodes.values()):
        return None
    name, most = opened.root.nodes.get("name"), sweep.nodes.get("max_parallel")
    problems = [*_problems(grid, opened.overrides), *_long(name)]
    if problems:
        raise JobError(problems)
    at_once = most.value if isinstance(most, Scalar) and isinstance(most.value, int) else 1
    return SweepPlan(_text(name), max(1, at_once), tuple(_variants(grid)))


def _text(node: Node | None) -> str:
    return node.value if isinstance(node, Scalar) and isinstance(node.value, str) else ""


def _long(name: Node | None) -> Iterator[Problem]:
    if name is not None and len(_text(name)) > _MOST_NAME:
        message = f"runs of a sweep add their values to it; at most {_MOST_NAME} characters"
        yield Problem(str(name.mark), "name", message)


def _lists(grid: Table) -> dict[str, Items]:
    return {key: values for key, values in grid.nodes.items() if isinstance(values, Items)}


def _problems(grid: Table, overrides: Sequence[str]) -> Iterator[Problem]:
    lists, total = _lists(grid), 1
    for place, (key, values) in enumerate(lists.items()):
        mark = str(grid.marks[key])
        for message in _wrong(key, values, earlier=list(lists)[:place], overrides=overrides):
            yield Problem(mark, f"sweep.grid.{key}", message)
        total *= len(values.nodes)
    if total > MOST_RUNS:
        yield Problem(str(grid.mark), "sweep.grid", f"{total:,} combinations, of which {MOST_RUNS} may run; take fewer")


def _wrong(key: str, values: Items, *, earlier: Sequence[str], overrides: Sequence[str]) -> Iterator[str]:
    parts = key.split(".")
    if not all(part.strip() == part and part for part in parts):
        yield "expected a dotted key, such as train.optimizer.lr"
        return
    if parts[0] in _OWN:
        yield f"{parts[0]} cannot be swept: {_OWN[parts[0]]}"
    if not values.nodes:
        yield "no values; write at least one, or remove the key"
    yield from _again(key, values, earlier=earlier, overrides=overrides)


def _again(key: str, values: Items, *, earlier: Sequence[str], overrides: Sequence[str]) -> Iterator[str]:
    """What sets a value, or the key, a second time."""
    texts = [json.dumps(each.plain(), sort_keys=True) for each in values.nodes]
    twice = [text for place, text in enumerate(texts) if text in texts[:place]]
    if twice:
        yield f"{twice[0]} stands twice"
    for other in earlier:
        if _overlap(key, other):
            yield f"{other} is swept too, and one lies in the other"
    for text in overrides:
        if _overlap(key, text.partition("=")[0].strip()):
            yield f"--set {key} sets it too; --set sweep=null launches one run"


def _overlap(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _variants(grid: Table) -> Iterator[Variant]:
    lists = _lists(grid)
    labels = _labels(list(lists))
    texts = {labels[key] for key, values in lists.items() if {type(each.plain()) for each in values.nodes} == {str}}
    for index, nodes in enumerate(itertools.product(*(values.nodes for values in lists.values()))):
        settings = [Setting(key, node, grid.marks[key]) for key, node in zip(lists, nodes, strict=True)]
        values = {labels[each.key]: each.node.plain() for each in settings}
        yield Variant(index, tuple(settings), readable(values, texts))


def _labels(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of keys that tell them apart.

    >>> _labels(["train.seed", "data.seed", "train.optimizer.lr"])
    {'train.seed': 'train.seed', 'data.seed': 'data.seed', 'train.optimizer.lr': 'lr'}
    """
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-number:]) for number in range(1, len(parts) + 1)]
        shared = [end for end in ends if not any(f".{other}".endswith(f".{end}") for other in keys if other != key)]
        found[key] = (shared or [key])[0]
    return found


def readable(values: Mapping[str, Any], texts: Collection[str] = ()) -> str:
    """The values of a run as a part of a name that is safe as a directory; different values never give the same.

    What names cannot hold is replaced; then, and where it would be too long, a digest of the values follows.

    Args:
        values: of the run.
        texts: those that are text in all runs, so that "1" need not be told from 1.

    >>> readable({"lr": 0.0003, "seed": 2})
    'lr-0.0003_seed-2'
    >>> readable({"decay": "a/b"})
    'decay-a-b-e3bc748b'
    """
    words = {name: _word(value) for name, value in values.items()}
    text = "_".join(f"{_safe(name)}-{word}" for name, word in words.items())
    exact = all(_same(word, values[name], as_text=name in texts) for name, word in words.items())
    if exact and len(text) <= _MOST_SUFFIX:
        return text
    digest = hashlib.sha256(json.dumps(list(values.items()), sort_keys=True).encode()).hexdigest()[:8]
    return f"{text[: _MOST_SUFFIX - 9]}-{digest}"


def _word(value: Any) -> str:
    return _safe(value if isinstance(value, str) else json.dumps(value)).replace("_", "-")


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)


def _same(word: str, value: Any, *, as_text: bool) -> bool:
    """Whether a word says the value and nothing else."""
    read = word or None if as_text else _read(word)
    return bool(read == value)


def _read(text: str) -> Any:
    try:
        return plain_value(text)
    except ScalarError:
        return None
