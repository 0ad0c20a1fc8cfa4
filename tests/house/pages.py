"""Reads the documentation: pages, their fenced blocks and links, and runs what can be run.

A block that stands under `<!-- norun: reason -->` is not run. The words after the language of a fence steer it:
`python file=train.py` writes the block to a file that later blocks of the page use.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["ROOT", "Block", "blocks", "commands", "links", "pages"]

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^(`{3,})(\w*)(.*)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NORUN = re.compile(r"<!-- norun: (.+) -->")


class Block(NamedTuple):
    """One fenced block: `line` is that of its first line of text, `norun` the reason not to run it."""

    language: str
    words: str
    text: str
    line: int
    norun: str


def pages() -> list[Path]:
    """README and its siblings, and everything under docs."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(text: str) -> Iterator[Block]:
    r"""The fenced blocks of a page.

    >>> list(blocks("<!-- norun: why -->\n```python\nx = 1\n```\n"))
    [Block(language='python', words='', text='x = 1\n', line=3, norun='why')]
    """
    lines = iter(enumerate(text.splitlines(), start=1))
    before = ""
    for number, line in lines:
        opened = _FENCE.match(line)
        if opened is None:
            before = line if line.strip() else before
            continue
        inside = []
        for _, each in lines:
            if each.startswith(opened[1]):
                break
            inside.append(f"{each}\n")
        reason = _NORUN.search(before)
        yield Block(opened[2], opened[3].strip(), "".join(inside), number + 1, reason[1] if reason else "")
        before = ""


def commands(text: str) -> Iterator[tuple[str, str]]:
    r"""The commands of a console block, each with the output that the page shows for it.

    >>> list(commands("$ echo a \\\n  b\na b\n$ true\n"))
    [('echo a \\\n  b', 'a b\n'), ('true', '')]
    """
    command: list[str] = []
    shown: list[str] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield "\n".join(command), "".join(shown)
            command, shown = [line[2:]], []
        elif command and command[-1].endswith("\\") and not shown:
            command.append(line)
        else:
            shown.append(f"{line}\n")
    if command:
        yield "\n".join(command), "".join(shown)


def links(text: str) -> Iterator[str]:
    """The targets of a page's links outside fenced blocks.

    >>> list(links("see [this](a.md#b) and `[x](y)`"))
    ['a.md#b']
    """
    bare = re.sub(r"^(`{3,}).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    yield from _LINK.findall(re.sub(r"`[^`\n]*`", "", bare))
