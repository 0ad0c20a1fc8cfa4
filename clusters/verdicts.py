"""Verdicts of a doctor: what was found, on which node, and what to do; the table people read and the same as JSON."""

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["BAD", "OK", "SKIPPED", "WARNING", "Diagnosis", "Verdict"]

OK, WARNING, BAD, SKIPPED = "ok", "warning", "bad", "skipped"

_HEAD = ("check", "node", "verdict", "found")
_COLOURS = {OK: "32", WARNING: "33", BAD: "1;31", SKIPPED: "2"}
_FEW = 3


@dataclass(frozen=True)
class Verdict:
    """One check of one node, or of all together.

    Args:
        check: such as "clock".
        node: whose; None for what belongs to no single node.
        state: "ok", "warning", "bad" or "skipped".
        found: the fact, with its numbers.
        remedy: what to do; every warning and bad verdict has one.
    """

    check: str
    node: str | None
    state: str
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.state in (OK, SKIPPED), f"{self.check} of {self.node}: {self.found}: what to do?"


@dataclass(frozen=True)
class Diagnosis:
    """All verdicts.

    Args:
        nodes: that were examined.
        verdicts: in the order of the checks.
        excluded: nodes that were left out on purpose.
    """

    nodes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    excluded: tuple[str, ...] = ()

    @property
    def fit(self) -> bool:
        """Whether nothing is bad.

        >>> Diagnosis(("a",), (Verdict("disk", "a", "ok", "80 GB free"),)).fit
        True
        """
        return not any(verdict.state == BAD for verdict in self.verdicts)

    @property
    def sick(self) -> tuple[str, ...]:
        """Nodes with a bad verdict of their own; without them the others may be fit."""
        bad = {verdict.node for verdict in self.verdicts if verdict.state == BAD}
        return tuple(node for node in self.nodes if node in bad)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "fit": self.fit,
            "sick": list(self.sick),
            "healthy": [node for node in self.nodes if node not in self.sick],
            "excluded": list(self.excluded),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def table(self, *, colour: bool = False) -> str:
        """The verdicts as people read them: what is alike stands in one row, and what to do below what is wrong.

        >>> two = (Verdict("clock", "a", "ok", "0 ms"), Verdict("clock", "b", "ok", "0 ms"))
        >>> print(Diagnosis(("a", "b"), two).table())
        check  node  verdict  found
        clock  a, b  ok       0 ms
        <BLANKLINE>
        fit: 2 nodes
        """
        groups: dict[Verdict, list[str]] = {}
        for each in self.verdicts:
            groups.setdefault(replace(each, node=None), []).append(each.node or "all")
        rows = [(each, (each.check, _names(nodes), each.state, each.found)) for each, nodes in groups.items()]
        widths = [
            max(map(len, column)) for column in zip(*(row[:3] for row in (_HEAD, *(r for _, r in rows))), strict=True)
        ]
        lines = [_line(_HEAD, widths)]
        for verdict, row in rows:
            lines.append(_line(row, widths, _COLOURS[verdict.state] if colour else ""))
            lines += [f"{' ' * (sum(widths) + 6)}-> {verdict.remedy}"] if verdict.remedy else []
        return "\n".join([*lines, "", self._conclusion()])

    def __str__(self) -> str:
        return self.table()

    def _conclusion(self) -> str:
        left_out = f"; left out: {', '.join(self.excluded)}" if self.excluded else ""
        if self.fit:
            return f"fit: {_count(len(self.nodes), 'node')}{left_out}"
        if self.sick and len(self.sick) < len(self.nodes):
            flags = " ".join(f"--exclude {node}" for node in self.sick)
            return f"not fit: sick: {', '.join(self.sick)}; to go on without: {flags}{left_out}"
        return f"not fit{': sick: ' + ', '.join(self.sick) if self.sick else ''}{left_out}"


def _line(row: tuple[str, ...], widths: list[int], colour: str = "") -> str:
    words = [word.ljust(width) for word, width in zip(row[:3], widths, strict=True)]
    if colour:
        words[2] = f"\x1b[{colour}m{words[2]}\x1b[0m"
    return f"{'  '.join(words)}  {row[3]}".rstrip()


def _names(nodes: list[str]) -> str:
    """Nodes of one row; of many the first and last.

    >>> _names(["a", "b"]), _names(["n1", "n2", "n3", "n4"])
    ('a, b', 'n1 .. n4 (4)')
    """
    return ", ".join(nodes) if len(nodes) <= _FEW else f"{nodes[0]} .. {nodes[-1]} ({len(nodes)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
