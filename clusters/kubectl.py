"""kubectl: how it is called, and what it complains of."""

import shutil
import subprocess

from meshwright.clusters.errors import UnavailableError
from meshwright.clusters.telling import telling

__all__ = ["Kubectl"]

_TIMEOUT_S = 60.0


class Kubectl:
    """The commands for one namespace of one cluster.

    Args:
        namespace: of all objects.
        context: of the kubeconfig; None is its current one.

    >>> Kubectl("ml", "prod").words
    ('kubectl', '--context', 'prod', '--namespace', 'ml')
    """

    def __init__(self, namespace: str, context: str | None = None) -> None:
        chosen = () if context is None else ("--context", context)
        self.words: tuple[str, ...] = ("kubectl", *chosen, "--namespace", namespace)

    def need(self) -> None:
        """Makes sure that it is here.

        Raises:
            UnavailableError: when it is not.
        """
        if shutil.which("kubectl") is None:
            raise UnavailableError("kubectl is not here; install it, or hand over what --dry-run prints yourself")

    def __call__(self, *words: str, text: str = "", timeout_s: float = _TIMEOUT_S) -> str:
        """What it prints.

        Args:
            words: of the command.
            text: on its standard input.
            timeout_s: until it must have ended.

        Raises:
            UnavailableError: when it does not get through, or is refused.
        """
        try:
            done = subprocess.run(
                (*self.words, *words), input=text.encode(), capture_output=True, timeout=timeout_s, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UnavailableError(f"kubectl {words[0]}: {error}") from error
        if done.returncode:
            said = telling(done.stderr.decode(errors="replace")) or f"exit code {done.returncode}"
            raise UnavailableError(f"kubectl {words[0]}: {said}; see kubectl config get-contexts")
        return done.stdout.decode(errors="replace")
