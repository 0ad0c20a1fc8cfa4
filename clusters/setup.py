"""Runs a job's setup script on a node, once before its ranks, and hands on the environment it leaves.

So `source .venv/bin/activate` means what it says. The script runs under bash where there is one, with -e.
"""

import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path

__all__ = ["SetupError", "run_setup"]

_LOOK_S = 0.02
_OF_SHELL = frozenset(["_", "SHLVL", "PWD", "OLDPWD"])
"""Variables that a shell sets for itself: they stay as they were before the script."""


class SetupError(Exception):
    """A setup script that failed; nothing was started."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the setup script ended with exit code {code}" if code >= 0 else f"signal {-code} ended it")
        self.code = code


def _read_until_end(child: "subprocess.Popen[bytes]", reader: int) -> bytes:
    """What a child says; what it leaves running holds its end of the pipe, too, and is not waited for."""
    said = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            over = child.poll() is not None  # before the look, so that nothing is missed
            if select.select([pipe], [], [], 0.0 if over else _LOOK_S)[0]:
                part = pipe.read(1 << 16)
                if not part:
                    return said
                said += part
            elif over:
                return said


def run_setup(script: str, *, cwd: str, env: Mapping[str, str], log: Path) -> dict[str, str]:
    """The environment after the script, which writes its output to `log`.

    Raises:
        SetupError: when it ends with another exit code than 0.
    """
    shell = "/bin/bash" if os.access("/bin/bash", os.X_OK) else "/bin/sh"
    reader, writer = os.pipe()
    text = f"set -e\n{script}\nset +e\nexec env -0 >/dev/fd/{writer}"
    with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as output:
        child = subprocess.Popen(
            [shell, "-c", text],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        left = _read_until_end(child, reader)
        code = child.wait()
    if code:
        raise SetupError(code)
    pairs = (os.fsdecode(each).partition("=") for each in left.split(b"\0") if each)
    kept = {name: env[name] for name in _OF_SHELL & set(env)}
    return {name: value for name, _, value in pairs if name not in _OF_SHELL} | kept
