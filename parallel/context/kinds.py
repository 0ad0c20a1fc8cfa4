"""How the ranks of `cp` come by the keys that their queries need: values, without torch.

Ring          keys and values travel from rank to rank                        arXiv 2310.01889
Ulysses       ranks exchange positions for heads, and back                    arXiv 2309.14509
Hybrid        both: consecutive ranks exchange, rings run across them         arXiv 2405.07719, 2406.18485
GatherKV      every rank is given all keys and values                         arXiv 2407.21783, section 3.3.2
"""

from dataclasses import dataclass
from typing import TypeAlias

from meshwright.parallel.errors import WrapError

__all__ = ["GatherKV", "Hybrid", "Kind", "Ring", "Ulysses", "ulysses_degree"]


@dataclass(frozen=True)
class Ring:
    """Keys and values travel around all ranks while these compute."""


@dataclass(frozen=True)
class GatherKV:
    """Keys and values of all ranks are gathered, in backward once more; for masks that a ring would wait on."""


@dataclass(frozen=True)
class Ulysses:
    """Each rank computes some of the heads over all positions."""


@dataclass(frozen=True)
class Hybrid:
    """Groups of consecutive ranks exchange positions for heads; rings run across the groups.

    Args:
        ulysses: ranks of a group, the fast links.
    """

    ulysses: int


Kind: TypeAlias = Ring | GatherKV | Ulysses | Hybrid


def ulysses_degree(kind: Kind, degree: int) -> int:
    """Consecutive ranks, of `degree`, that exchange positions for heads.

    >>> [ulysses_degree(kind, 8) for kind in (Ring(), Ulysses(), Hybrid(ulysses=2))]
    [1, 8, 2]

    Raises:
        WrapError: for groups that do not divide the axis.
    """
    found = kind.ulysses if isinstance(kind, Hybrid) else degree if isinstance(kind, Ulysses) else 1
    if found < 1 or degree % found:
        legal = ", ".join(str(each) for each in range(1, degree + 1) if degree % each == 0)
        raise WrapError(f"groups of {found} ranks do not divide cp={degree}; choose ulysses from: {legal}")
    return found
