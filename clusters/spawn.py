"""Starts an agent before anything is known about the job, so that it imports torch meanwhile.

Nothing but the standard library is imported here: it is the launcher's first act.
"""

import subprocess
import sys
from collections.abc import Sequence

__all__ = ["AGENT_ARGV", "AGENT_WORDS", "end_agent", "end_warm", "keep_warm", "spawn_agent", "warm_agent", "words_for"]

AGENT_WORDS = ("-u", "-m", "meshwright.clusters.agent")
"""Words that follow the interpreter."""

AGENT_ARGV = (sys.executable, *AGENT_WORDS)


def words_for(python: str, argv: Sequence[str]) -> tuple[str, ...]:
    """The words of a command where this interpreter is another one.

    >>> words_for("/opt/python", [sys.executable, "-u", "a.py"]), words_for("/opt/python", ["./a.out"])
    (('/opt/python', '-u', 'a.py'), ('./a.out',))
    """
    return (python, *argv[1:]) if argv and argv[0] == sys.executable else tuple(argv)


def spawn_agent() -> subprocess.Popen[bytes]:
    """An agent that waits for its plan; it goes by itself when its standard input ends.

    It leads a session of its own: a Ctrl-C at the terminal reaches the launcher alone, which then decides.
    """
    return subprocess.Popen(
        AGENT_ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
    )


_KEPT: "list[subprocess.Popen[bytes]]" = []


def keep_warm() -> None:
    """Starts an agent for whoever asks first."""
    _KEPT.append(spawn_agent())


def warm_agent() -> "subprocess.Popen[bytes] | None":
    """The agent that is kept; it stays the keeper's to end."""
    return _KEPT[0] if _KEPT else None


def end_warm() -> None:
    """Ends what is kept."""
    while _KEPT:
        end_agent(_KEPT.pop())


def end_agent(agent: "subprocess.Popen[bytes]") -> None:
    """Ends an agent that nobody needs, and lets go of its pipes."""
    if agent.poll() is None:
        agent.kill()
        agent.wait()
    for pipe in (agent.stdin, agent.stdout):
        if pipe is not None:
            pipe.close()
