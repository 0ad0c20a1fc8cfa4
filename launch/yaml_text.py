"""Text to a tree of nodes with positions: YAML 1.2 scalars, nothing executed, nothing unbounded.

PyYAML (libyaml where it is built in) makes the events; the tree is composed here, because every node must keep its
position and because duplicate keys, tags, merge keys and bombs of aliases must be refused, not interpreted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from meshwright.launch.errors import JobError, Problem
from meshwright.launch.yaml_nodes import Found, Items, Mark, Node, Scalar, Table
from meshwright.launch.yaml_scalars import ScalarError, plain_value

__all__ = ["MAX_ALIASES", "MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "Tree", "read_tree"]

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 100
MAX_NODES = 20_000
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_SMALL = {int: "an integer", float: "a number", bool: "a truth value", type(None): "nothing"}


@dataclass(frozen=True)
class Tree:
    """A composed document: its root, and the problems that did not stop the reading (duplicate keys, tags, ...)."""

    root: Node
    problems: tuple[Found, ...] = ()


def read_tree(content: bytes | str, source: str) -> Tree:
    """Composes one YAML document.

    Raises:
        JobError: when the text is not one YAML document within the limits of this module.

    >>> tree = read_tree("nodes: 2\\ntime: 24:00:00\\n", "job.yaml")
    >>> tree.root.plain()
    {'nodes': 2, 'time': '24:00:00'}
    >>> print(tree.root.nodes["time"].mark)
    job.yaml:2:7
    """
    text = _decode(content, source)
    found = _UNPRINTABLE.search(text)
    if found:
        _stop(
            _mark_at(text, found.start(), source),
            f"character {found.group()!a} is not allowed in YAML; remove it",
        )
    return _Composer(source, text).document()


def _decode(content: bytes | str, source: str) -> str:
    if len(content) > MAX_BYTES:
        _stop(Mark(source, 1, 1), f"a job file has at most {MAX_BYTES} bytes, this one has {len(content)}")
    if isinstance(content, str):
        return content
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", errors="replace")
        byte = content[error.start]
        _stop(
            _mark_at(before, len(before), source),
            f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8 text",
        )


def _mark_at(text: str, offset: int, source: str) -> Mark:
    line = text.count("\n", 0, offset) + 1
    return Mark(source, line, offset - text.rfind("\n", 0, offset))


def _stop(mark: Mark, message: str, key: str = "") -> NoReturn:
    raise JobError([Problem(str(mark), key, message)]) from None


@dataclass
class _Anchor:
    node: Node | None
    size: int
    depth: int


@dataclass
class _Composer:
    source: str
    text: str
    problems: list[Found] = field(default_factory=list)
    anchors: dict[str, _Anchor] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)
    num_nodes: int = 0
    num_aliases: int = 0
    deepest: int = 0

    def __post_init__(self) -> None:
        self.events: Iterator[Any] = yaml.parse(self.text, Loader=_LOADER)

    def document(self) -> Tree:
        self._next()  # start of the stream
        if isinstance(self._next(), yaml.StreamEndEvent):
            _stop(
                Mark(self.source, 1, 1),
                "the file is empty; write at least `name:` and `command:` or `model:`",
            )
        root = self._node(self._next(), 0)
        self._next()  # end of the document
        event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            _stop(
                self._mark(event),
                "a second document starts here; a job file holds one, so remove the line `---`",
            )
        return Tree(root, tuple(self.problems))

    def _next(self) -> Any:
        try:
            return next(self.events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            _stop(Mark(self.source, line, column), self._why(error, line, column))
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # the reader of PyYAML without libyaml raises these for escapes such as "\\U00110000"
            _stop(Mark(self.source, 1, 1), f"this is not YAML: {error}")

    def _why(self, error: Any, line: int, column: int) -> str:
        lines = self.text.splitlines() or [""]
        written = lines[min(line, len(lines)) - 1]
        if "\t" in written[: column + 1]:
            return "this is not YAML: a tab stands here; indent with spaces"
        context = f" ({error.context}" if error.context else ""
        if context and error.context_mark:
            context += f" that starts at line {error.context_mark.line + 1}"
        hint = '; quote text that contains "{name}"' if re.search(r"\{\w+\}", written) else ""
        return f"this is not YAML: {error.problem}{context and context + ')'}{hint}"

    def _mark(self, event: Any) -> Mark:
        return Mark(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _key(self) -> str:
        return ".".join(self.path)

    def _note(self, mark: Mark, message: str) -> None:
        self.problems.append((mark, self._key(), message))

    def _node(self, event: Any, depth: int) -> Node:
        self._count(event, 1, depth)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        if event.tag is not None:
            self._note(self._mark(event), f"tag {event.tag!r} is not allowed; quote a value to make it text")
        before, outer_deepest = self.num_nodes, self.deepest
        self.deepest = depth
        if event.anchor is not None:
            self.anchors[event.anchor] = _Anchor(None, 0, 0)
        node = self._content(event, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = _Anchor(node, self.num_nodes - before + 1, self.deepest - depth)
        self.deepest = max(self.deepest, outer_deepest)
        return node

    def _content(self, event: Any, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        return self._items(event, depth) if isinstance(event, yaml.SequenceStartEvent) else self._table(event, depth)

    def _count(self, event: Any, size: int, depth: int) -> None:
        self.num_nodes += size
        self.deepest = max(self.deepest, depth)
        if self.num_nodes > MAX_NODES:
            _stop(
                self._mark(event),
                f"more than {MAX_NODES} values (aliases expanded); a job is smaller",
                self._key(),
            )
        if self.deepest > MAX_DEPTH:
            _stop(self._mark(event), f"nested deeper than {MAX_DEPTH} levels; a job is flatter", self._key())

    def _alias(self, event: Any, depth: int) -> Node:
        self.num_aliases += 1
        if self.num_aliases > MAX_ALIASES:
            _stop(self._mark(event), f"more than {MAX_ALIASES} aliases; write the values out", self._key())
        known = self.anchors.get(event.anchor)
        if known is None:
            _stop(
                self._mark(event),
                f"alias *{event.anchor} has no anchor &{event.anchor} before it",
                self._key(),
            )
        if known.node is None:
            _stop(self._mark(event), f"alias *{event.anchor} lies inside the value it repeats", self._key())
        self._count(event, known.size, depth + known.depth)
        return known.node

    def _scalar(self, event: Any) -> Scalar:
        mark = self._mark(event)
        if "\0" in event.value:
            self._note(mark, "text with a NUL character; remove it")
        if event.style:
            return Scalar(event.value, event.value, mark)
        try:
            return Scalar(plain_value(event.value), event.value, mark)
        except ScalarError as error:
            self._note(mark, f"{error}, got {event.value[:40]}")
            return Scalar(0, event.value, mark)

    def _items(self, event: Any, depth: int) -> Items:
        mark, nodes = self._mark(event), list[Node]()
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            self.path.append(str(len(nodes)))
            nodes.append(self._node(event, depth + 1))
            self.path.pop()
        return Items(tuple(nodes), mark)

    def _table(self, event: Any, depth: int) -> Table:
        mark = self._mark(event)
        nodes: dict[str, Node] = {}
        marks: dict[str, Mark] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key_mark = self._mark(event)
            key = self._key_text(self._node(event, depth + 1), event)
            self.path.append(key or "?")
            node = self._node(self._next(), depth + 1)
            if key in marks:
                self._note(key_mark, f"duplicate key, first written at line {marks[key].line}; keep one of them")
            elif key is not None:
                nodes[key], marks[key] = node, key_mark
            self.path.pop()
        return Table(nodes, marks, mark)

    def _key_text(self, node: Node, event: Any) -> str | None:
        mark = self._mark(event)
        if not isinstance(node, Scalar):
            self._note(mark, 'a key must be text, got a list or mapping; quote text that contains "{name}"')
        elif isinstance(node.value, str):
            if node.text == "<<" and not event.style:
                self._note(
                    mark,
                    "merge key << belongs to YAML 1.1; write the keys out, or use *alias as a whole value",
                )
                return None
            return node.value
        else:
            self._note(mark, f'a key must be text, got {_SMALL[type(node.value)]}; write "{node.text}"')
        return None
