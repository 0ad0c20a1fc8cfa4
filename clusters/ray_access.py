"""Attaching to a Ray cluster, and who else could: what is asked of the cluster, not of this process's variables."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from meshwright.clusters.errors import UnavailableError

__all__ = ["attached", "is_open"]

_DIAL_S = 5.0
_ASK_S = 20.0
_LEAST = (2, 54)
_REFUSED = "refused"


def is_open(address: str) -> bool:
    """Whether a cluster lets in whoever has no token; False where that is not certain.

    Args:
        address: of its head, or "auto".

    Raises:
        UnavailableError: when it lets in only those with a token, and we have none or another.
    """
    try:
        _dial(address)
        free = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
        if _answer(address, {**free, "RAY_AUTH_MODE": "disabled"}) != _REFUSED:
            return True
        refused = address != "auto" and _answer(address, os.environ) == _REFUSED  # for "auto" Ray looks for a token
    except (OSError, subprocess.SubprocessError):  # attaching tells why
        return False
    if refused:
        raise UnavailableError(
            f"cluster.address: the Ray cluster at {address!r} asks for a token; set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN_PATH to the file that holds the right one"
        )
    return False


def _answer(address: str, env: Mapping[str, str]) -> str:
    """What a cluster answers to a process with such variables, since they are read once in each.

    Raises:
        subprocess.SubprocessError: where it answers neither that it is well nor that it lets nobody in.
    """
    program = "import gc; gc.disable(); from ray.scripts.scripts import main; main()"  # a third of it: it only imports
    words = [sys.executable, "-c", program, "status", f"--address={address}"]
    done = subprocess.run(words, env=dict(env), capture_output=True, text=True, timeout=_ASK_S, check=False)
    if "AuthenticationError" in done.stderr:
        return _REFUSED
    done.check_returncode()
    return ""


def _dial(address: str) -> None:
    """Makes sure that somebody listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal():
        socket.create_connection((host, int(port)), _DIAL_S).close()


def _check_version(version: str) -> None:
    """Refuses what lets web pages run programs on a cluster (CVE-2026-27482): Ray attaches to its own version only.

    Raises:
        UnavailableError: for a version before 2.54.
    """
    found = tuple(int(each) for each in re.findall(r"\d+", version)[:2])
    if found < _LEAST:
        raise UnavailableError(
            f"ray {version} is installed, and versions before {'.'.join(map(str, _LEAST))} let web pages run programs "
            "on a cluster; pip install 'meshwright[ray]' here and on all nodes"
        )


def attached(address: str) -> Any:
    """The module `ray`, attached once; it takes SIGTERM for itself, which the launcher needs.

    Args:
        address: of a cluster's head, or "auto".

    Raises:
        UnavailableError: when there is no such cluster, or Ray is too old or missing.
    """
    try:
        import ray
    except ImportError as error:
        raise UnavailableError("ray is not installed; pip install 'meshwright[ray]'") from error
    _check_version(ray.__version__)
    if ray.is_initialized():
        return ray
    before = signal.getsignal(signal.SIGTERM)
    try:
        _dial(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnavailableError(
            f"cluster.address: no Ray cluster at {address!r}: {first}; start one by ray start"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    return ray
