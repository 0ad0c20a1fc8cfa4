"""The environment of a node's ranks: what is inherited, what the plan adds, what stays secret. Pure."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["BASE", "inherited", "rank_environment"]

BASE = ("HOME", "LANG", "LC_*", "LOGNAME", "PATH", "SHELL", "TMPDIR", "TZ", "USER")
"""What a job with `env_pass` inherits besides: where programs and homes are, and the language."""

_OURS = ("MESHWRIGHT_", "TORCHELASTIC_")


def inherited(patterns: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names match a pattern: exact, or a start and `*`; those of an outer run never do.

    >>> inherited(["PATH", "NCCL_*"], {"PATH": "/bin", "NCCL_DEBUG": "WARN", "KEY": "k", "MESHWRIGHT_RUN_ID": "r"})
    {'PATH': '/bin', 'NCCL_DEBUG': 'WARN'}
    """
    wanted = list(patterns)
    exact = {each for each in wanted if not each.endswith("*")}
    starts = tuple(each[:-1] for each in wanted if each.endswith("*"))
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(_OURS) and (name in exact or name.startswith(starts))
    }


def rank_environment(
    plan: Mapping[str, Any], node: Mapping[str, Any], *, secrets: Mapping[str, str], environment: Mapping[str, str]
) -> dict[str, str]:
    """All variables of a node's ranks but those that differ from rank to rank, which torch's agent adds."""
    return inherited(plan["inherit"], environment) | dict(node["env"]) | dict(secrets)
