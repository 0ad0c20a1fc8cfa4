"""Starts an agent before anything is known about the job, so that it imports torch meanwhile.

Nothing but the standard library is imported here: it is the launcher's first act.
"""

import subprocess
import sys

__all__ = ["AGENT_ARGV", "end_agent", "spawn_agent"]

AGENT_ARGV = (sys.executable, "-u", "-m", "meshwright.clusters.agent")


def spawn_agent() -> subprocess.Popen[bytes]:
    """An agent that waits for its plan; it goes by itself when its standard input ends.

    It leads a session of its own: a Ctrl-C at the terminal reaches the launcher alone, which then decides.
    """
    return subprocess.Popen(
        AGENT_ARGV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
    )


def end_agent(agent: "subprocess.Popen[bytes]") -> None:
    """Ends an agent that nobody needs, and lets go of its pipes."""
    if agent.poll() is None:
        agent.kill()
        agent.wait()
    for pipe in (agent.stdin, agent.stdout):
        if pipe is not None:
            pipe.close()
