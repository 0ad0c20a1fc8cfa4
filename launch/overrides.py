"""`--set a.b=c`: one key of the job's tree, replaced before the job is checked.

The value is a YAML 1.2 scalar, or a collection in brackets: `--set parallel.dp=4`, `--set after=[tokenize]`.
"""

from dataclasses import dataclass, replace

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.yaml_nodes import Items, Mark, Node, Scalar, Table
from meshwright.launch.yaml_scalars import ScalarError, plain_value
from meshwright.launch.yaml_text import read_tree

__all__ = ["apply_override", "put_node"]


def apply_override(root: Node, text: str, place: int = 0) -> Node:
    """The tree with one key replaced or added.

    Args:
        root: tree of the job; not changed.
        text: "dotted.key=value"; parts of lists are numbers from 0.
        place: position among the overrides, which orders their errors.

    Raises:
        JobError: when the text is no override, or its key leads through a value that has no keys.

    >>> tree = read_tree("parallel: {dp: 2}", "job.yaml").root
    >>> apply_override(tree, "parallel.dp=4").plain()
    {'parallel': {'dp': 4}}
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    shown = f"{key}=***" if parts[0] == "secrets" else text  # a secret given by mistake stays unseen
    mark = Mark(f"--set {shown}".encode("unicode_escape").decode("ascii"), 0, place)
    if not equals or not all(parts):
        raise JobError([Problem(str(mark), "", "expected dotted.key=value, such as --set parallel.dp=4")])
    return _Override(tuple(parts), _read(value.strip(), mark), mark).put(root, 0)


def put_node(root: Node, key: str, value: Node, *, mark: Mark) -> Node:
    """The tree with one key replaced or added by a value of its own place.

    Args:
        root: tree of the job; not changed.
        key: dotted.
        value: is put there.
        mark: where the key was written.

    Raises:
        JobError: when the key leads through a value that has no keys.
    """
    return _Override(tuple(key.split(".")), value, mark).put(root, 0)


def _read(text: str, mark: Mark) -> Node:
    if text[:1] in ("[", "{", '"', "'"):
        try:
            tree = read_tree(text, mark.source)
        except JobError as error:
            raise _bad(mark, "", error.problems[0].message) from None
        if tree.problems:
            raise _bad(mark, "", tree.problems[0][2])
        return _at(tree.root, mark)
    try:
        return Scalar(plain_value(text), text, mark)
    except ScalarError as error:
        raise _bad(mark, "", f"{error}, got {text[:40]}") from None


def _at(node: Node, mark: Mark) -> Node:
    if isinstance(node, Scalar):
        return replace(node, mark=mark)
    if isinstance(node, Items):
        return Items(tuple(_at(each, mark) for each in node.nodes), mark)
    return Table({key: _at(each, mark) for key, each in node.nodes.items()}, dict.fromkeys(node.marks, mark), mark)


def _bad(mark: Mark, key: str, message: str) -> JobError:
    return JobError([Problem(str(mark), key, message)])


@dataclass(frozen=True)
class _Override:
    parts: tuple[str, ...]
    value: Node
    mark: Mark

    def put(self, node: Node, depth: int) -> Node:
        """The node that `parts[:depth]` leads to, with the value put at the rest of the parts."""
        if depth == len(self.parts):
            return self.value
        if isinstance(node, Items):
            return self._put_item(node, depth)
        if isinstance(node, Scalar) and node.value is not None:
            above = ".".join(self.parts[:depth])
            raise _bad(self.mark, above, f"{above} is {node.text[:40]!r}, which has no keys; set {above} itself")
        return self._put_key(node if isinstance(node, Table) else Table({}, {}, self.mark), depth)

    def _put_item(self, items: Items, depth: int) -> Node:
        part, above = self.parts[depth], ".".join(self.parts[:depth])
        if not part.isdecimal() or int(part) >= len(items.nodes):
            message = f"{above} is a list of {len(items.nodes)} items; write a number from 0, got {part!r}"
            raise _bad(self.mark, above, message)
        nodes = list(items.nodes)
        nodes[int(part)] = self.put(nodes[int(part)], depth + 1)
        return Items(tuple(nodes), items.mark)

    def _put_key(self, table: Table, depth: int) -> Node:
        part, last = self.parts[depth], depth + 1 == len(self.parts)
        changed = self.put(table.nodes.get(part, Table({}, {}, self.mark)), depth + 1)
        mark = self.mark if last else table.marks.get(part, self.mark)
        return Table({**table.nodes, part: changed}, {**table.marks, part: mark}, table.mark)
