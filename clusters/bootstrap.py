"""First program of every rank: ties it to its agent, opens its log, then becomes the user's command.

Run by path with `python -I -S`, so it imports next to nothing and no package. The kernel sends the parent-death signal
when the *thread* that forked a process ends: the agent forks ranks on its main thread, which lives as long as it does.
"""

import os
import signal
import sys
from typing import NoReturn

__all__ = ["become", "die_with", "main", "settle"]

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Has the kernel end this process (Linux) as soon as `parent`, that forked it, has ended."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the signal was asked for
        os.kill(os.getpid(), signal.SIGKILL)


def _as_given(name: str) -> None:
    """Takes back what Python itself did to a variable at its start: it sets LC_CTYPE where that would be ASCII."""
    with open("/proc/self/environ", "rb") as pairs:
        given = dict(pair.split(b"=", 1) for pair in pairs.read().split(b"\0") if b"=" in pair)
    value = given.get(name.encode())
    if value is not None:
        os.environ[name] = os.fsdecode(value)
    else:
        os.environ.pop(name, None)


def _open_log(run_dir: str, rank: str, attempt: str) -> None:
    name = f"rank-{rank}.log" if attempt == "0" else f"rank-{rank}.attempt-{attempt}.log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    log = os.open(os.path.join(run_dir, "logs", name), flags, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _end(what: str, error: OSError) -> NoReturn:
    sys.stderr.write(f"meshwright: cannot start {what}: {error.strerror}\n")
    sys.stderr.flush()
    os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def settle(agent: int, *, run_dir: str, workdir: str, command: list[str]) -> None:
    """Ties this process to its agent, in its own log and directory.

    Args:
        agent: process id.
        run_dir: of the run.
        workdir: working directory.
        command: what will run, for what is said if it cannot.
    """
    if sys.platform == "linux":
        die_with(agent)
    rank, attempt = os.environ["RANK"], os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    os.environ["MESHWRIGHT_ATTEMPT"] = attempt
    os.environ["MESHWRIGHT_RANK_DIR"] = os.path.join(run_dir, "ranks", rank)
    _open_log(run_dir, rank, attempt)
    try:
        os.makedirs(os.environ["MESHWRIGHT_RANK_DIR"], mode=0o700, exist_ok=True)
        os.chdir(workdir)
    except OSError as error:
        _end(repr(command[0]) + (f" in {workdir}" if error.filename == workdir else ""), error)


def become(command: list[str]) -> NoReturn:
    """Executes a command in place of this process."""
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and exec would hand that on
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _end(repr(command[0]), error)


def main(words: list[str]) -> None:
    """Becomes `words[3:]` after tying this process to the agent `words[0]`, in the directory `words[2]`.

    Args:
        words: process id of the agent, run directory, working directory, then the command.
    """
    command = words[3:]
    settle(int(words[0]), run_dir=words[1], workdir=words[2], command=command)
    if sys.platform == "linux":
        _as_given("LC_CTYPE")
    become(command)


if __name__ == "__main__":
    main(sys.argv[1:])
