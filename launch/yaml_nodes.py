"""The tree of a YAML file: values that remember the line and column they were written at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Found", "Items", "Mark", "Node", "Scalar", "Table", "follow", "show"]

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Mark:
    """A position: "job.yaml:12:9", or an override "--set a.b=c" (which has no line).

    Args:
        source: file name as the user wrote it, or the override.
        line: from 1; 0 for an override.
        column: from 1, in characters; for an override its place among the overrides.
    """

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Scalar:
    """Text, number, truth value or nothing; `text` is what was written, without quotes."""

    value: str | int | float | bool | None
    text: str
    mark: Mark

    def plain(self) -> Any:
        """The value without its position."""
        return self.value


@dataclass(frozen=True)
class Items:
    """A list."""

    nodes: tuple["Node", ...]
    mark: Mark

    def plain(self) -> Any:
        """The list without positions."""
        return [node.plain() for node in self.nodes]


@dataclass(frozen=True)
class Table:
    """A mapping with text keys; `marks` holds where each key was written."""

    nodes: Mapping[str, "Node"]
    marks: Mapping[str, Mark]
    mark: Mark

    def plain(self) -> Any:
        """The mapping without positions."""
        return {key: node.plain() for key, node in self.nodes.items()}

    def dotted_keys(self, prefix: str = "") -> Iterator[str]:
        """Every key that was written, at every depth, dotted: "failure.backoff.max"."""
        for key, node in self.nodes.items():
            yield prefix + key
            if isinstance(node, Table):
                yield from node.dotted_keys(f"{prefix}{key}.")


Node: TypeAlias = Scalar | Items | Table

Found: TypeAlias = tuple[Mark, str, str]
"""A problem of a tree: where it was written, the dotted key, the message."""


def follow(root: Node, path: tuple[str | int, ...]) -> tuple[Node, Mark, tuple[str, ...]]:
    """Walks as far along a path as the tree goes, skipping parts that are no keys.

    Returns:
        The last node reached, where it (or its key) was written, and the keys that led there.
    """
    node, mark = root, root.mark
    keys: list[str] = []
    for part in path:
        if isinstance(node, Table) and part in node.nodes:
            mark, node = node.marks[str(part)], node.nodes[str(part)]
        elif isinstance(node, Items) and isinstance(part, int) and part < len(node.nodes):
            node = node.nodes[part]
            mark = node.mark
        else:
            continue
        keys.append(str(part))
    return node, mark, tuple(keys)


def show(node: Node) -> str:
    """A value as an error message shows it.

    >>> show(Scalar("two", "two", Mark("job.yaml", 1, 1)))
    '"two"'
    """
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        return "a list"
    if node.value is None:
        return "nothing"
    text = node.text if len(node.text) <= _SHOWN_CHARACTERS else node.text[:_SHOWN_CHARACTERS] + "..."
    if isinstance(node.value, str):
        return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
    return text
