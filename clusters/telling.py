"""What a program complains of, in one line: what tells something of many lines on its standard error. Pure."""

import re

__all__ = ["refusal", "telling"]

_MOST = 400
_SURE = re.compile(r"^ssh: |No module named|No such file|[Nn]ot found|Host key verification failed|Permission denied")
"""What says more than all the rest, which may be a carrier's own about a process that failed."""

_REFUSALS = (
    (
        r"^(\S+) has detected an attempt to run as root",
        r"\1 of Open MPI refuses to run as root; set OMPI_ALLOW_RUN_AS_ROOT=1 and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or "
        "launch as another user",
    ),
)
"""A screen of words each, and what it comes down to."""

_NOISE = re.compile(
    r"^(?:See|Type|Try|Usage:|Use|For more|Run) .*(?:help|usage|--)"  # how a command is called
    r"|^[IWEF][0-9]{4} [0-9:.]+ +[0-9]+ \S+\]"  # kubectl's own log, which it sums up in its last line
    r"|^(?:\S+: )?[Ww]arning: ",
)


def refusal(text: str) -> str:
    """What a program refuses to do for this user, and what to do instead; empty where it refuses nothing that is known.

    Args:
        text: what it wrote to its standard error.

    >>> refusal("mpirun has detected an attempt to run as root.").partition(";")[0]
    'mpirun of Open MPI refuses to run as root'
    """
    found = ((re.search(pattern, text, re.MULTILINE), words) for pattern, words in _REFUSALS)
    return next((match.expand(words) for match, words in found if match), "")


def telling(text: str, most: int = _MOST) -> str:
    """The lines that tell something, joined: the last and the first ones where they are too many; empty where none do.

    Args:
        text: what a program wrote to its standard error.
        most: letters of the answer, about.

    >>> telling("Error: unknown flag: --no\\nSee 'kubectl get --help' for usage.")
    'Error: unknown flag: --no'
    >>> telling("------\\nNot enough slots for the\\napplication:\\n\\n  train\\n------")
    'Not enough slots for the application: / train'
    """
    known = refusal(text)
    if known:
        return known
    blocks = _blocks(text)
    said = [line for block in blocks for line in block]
    sure = next((line for line in said if _SURE.search(line)), "")
    if sure:
        return _cut(sure, most)
    if "Traceback (most recent call last):" in said:
        return _cut(said[-1], most)
    parts = list(dict.fromkeys(part for block in blocks for part in _parts(block)))
    return _chosen([part for part in parts if not _NOISE.search(part)] or parts, most)


def _blocks(text: str) -> list[list[str]]:
    """Lines between those that are empty, or only rules."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.search(r"\w", line):
            blocks[-1].append(line.strip(" \t\r="))
        else:
            blocks.append([])
    return [block for block in blocks if block]


def _parts(block: list[str]) -> list[str]:
    """Sentences that go on over lines in one piece; other lines each by itself."""
    parts: list[str] = []
    for line in block:
        if parts and re.match(r"[a-z]+(?: |:?$)", line) and not parts[-1].endswith((".", "!", "?")):
            parts[-1] += f" {line}"
        else:
            parts.append(line)
    return parts


def _chosen(parts: list[str], most: int) -> str:
    """As many as fit, the last before the first ones."""
    if not parts:
        return ""
    *others, last = parts
    left, first = most - len(last), list[str]()
    for part in others:
        left -= len(part) + 3
        if left < 0:
            break
        first.append(part)
    gap = ["..."] if len(first) < len(others) else []
    return " / ".join([*first, *gap, _cut(last, most)])


def _cut(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[:most]}..."
