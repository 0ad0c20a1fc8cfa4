"""What kind of failure it was, as far as one node can tell: exit code, signal, the last words of the rank. Pure."""

import re
from dataclasses import dataclass
from typing import Any

from meshwright.clusters.blame import Verdict
from meshwright.parallel.hang import EXIT_CODE

__all__ = ["KINDS", "Failure", "failure_of", "kind_of"]

KINDS = ("node", "signal", "hang", "preempt", "exit", "config", "import_error")
"""Kinds of failure; `exit` is any that is none of the others."""

_TOLD = {75: "preempt", EXIT_CODE: "hang"}  # codes that say it themselves
_CONFIG_CODES = (64, 65, 126, 127)  # sysexits.h: usage, data; a shell's: cannot be run, not found
_KILLED_CODES = range(129, 193)  # of a shell whose command was killed
_USAGE_CODE = 2  # of Python and its argparse
_MACHINE = re.compile(
    r"uncorrectable (?:ECC|NVLink) error|fallen off the bus|device\(s\) is/are busy or unavailable"
    r"|Stale file handle|Input/output error"
)
_IMPORT = re.compile(r"^(?:ImportError|ModuleNotFoundError|SyntaxError|IndentationError|TabError)\b", re.MULTILINE)
_USAGE = re.compile(r"^usage: |^\S*python\S*: can't (?:open file|find) ", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """What one node knows of an attempt that failed.

    Args:
        node: its name.
        kind: one of `KINDS`; empty where none of its ranks failed by itself.
        exit_code: of its first failing rank, 128 + N for signal N.
        rank: that one.
        time_unix_s: when it failed.
        only_lost: whether it only lost its connection to another, or was told to end by somebody.
        evidence: in words.
        step: newest step that was seen to be done; None where nothing tells.
        leaving: whether the node is about to be taken away.
        done: whether its ranks have all succeeded.
        lost: whether it is gone, with its agent.
        sick: what is wrong with its machine, where that was seen while ranks ran.
    """

    node: str
    kind: str = ""
    exit_code: int = 0
    rank: int | None = None
    time_unix_s: float = 0.0
    only_lost: bool = False
    evidence: str = ""
    step: int | None = None
    leaving: bool = False
    done: bool = False
    lost: bool = False
    sick: str = ""


def kind_of(exit_code: int, text: str, *, killed: bool = False, lost: bool = False) -> str:
    """The kind of a failure.

    Args:
        exit_code: of the rank, 128 + N for signal N.
        text: its traceback, or the end of its log.
        killed: by a signal.
        lost: whether its connection to another rank broke, and no rank is known to have failed before.

    >>> kind_of(1, "Traceback ...\\nModuleNotFoundError: No module named 'x'"), kind_of(137, "", killed=True)
    ('import_error', 'signal')
    """
    last = "\n".join(text.rstrip().splitlines()[-8:])
    if exit_code in _TOLD:
        return _TOLD[exit_code]
    if lost or _MACHINE.search(last):
        return "node"
    if killed or exit_code in _KILLED_CODES:
        return "signal"
    if _IMPORT.search(last):
        return "import_error"
    usage = exit_code == _USAGE_CODE and _USAGE.search(text)
    return "config" if usage or exit_code in _CONFIG_CODES else "exit"


def failure_of(node: str, verdict: Verdict, **known: Any) -> Failure:
    """What a node knows, from its judge's verdict on its own ranks.

    Args:
        node: its name.
        verdict: on its own ranks.
        known: further arguments of `Failure`: time_unix_s, step, leaving.
    """
    first = verdict.first
    if first is None:
        return Failure(node, **known)
    killed = first.signal is not None
    kind = kind_of(first.exit_code, first.traceback, killed=killed, lost=verdict.only_lost and not killed)
    words = verdict.hang or first.evidence + (f": {last}" if (last := _last_line(first.traceback)) else "")
    told = {"rank": first.rank, "only_lost": verdict.only_lost, "evidence": words, **known}
    return Failure(node, kind, first.exit_code, **told)


def _last_line(traceback: str) -> str:
    return next(iter(traceback.strip().splitlines()[-1:]), "")[:300] if "Traceback" in traceback else ""
