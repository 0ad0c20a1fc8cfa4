"""States of a model whose blocks are dealt over `pp`: who holds what, and one copy of everything that several hold.

A rank keeps the parameters of its own blocks and of what stands around blocks (embeddings, norms, head): the model's
own code there may run on any rank, so gradients of these are summed over `pp`, ties included.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.errors import WrapError
from meshwright.parallel.shared import Local, SharedGradients
from meshwright.parallel.weights import NamedStates

__all__ = ["StagedStates"]

T = TypeVar("T")


class StagedStates:
    """Takes the blocks of other ranks out of a model.

    Args:
        module: the whole model, memory or not; changed in place.
        homes: block -> rank of the pipeline.
        groups: process groups of the mesh.
        names: of all its states; those of single experts may be gone from this rank.
    """

    def __init__(self, module: nn.Module, homes: Mapping[str, int], groups: Groups, *, names: NamedStates) -> None:
        self._groups = groups
        self._rank = groups.mesh.coordinates(groups.rank)["pp"]
        self._degree = groups.mesh.pp
        self.aliases = names.aliases
        self._home = {names[0]: _home(names, homes) for names in self.aliases}
        self._sums = SharedGradients([name for name, home in self._home.items() if home is None], groups, "pp")
        self._trained = names.trained
        for aliases in self.aliases:
            if self._home[aliases[0]] not in (None, self._rank):
                for name in aliases:
                    _take_out(module, name)
        for block, home in homes.items():
            if home != self._rank:
                module.get_submodule(block).register_forward_pre_hook(partial(_refuse, block, home))

    def fill(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Gives parameters that several ranks hold a gradient, so that all ranks sum the same ones."""
        if self._degree > 1:
            self._sums.fill(trained)

    def sum_gradients(self, local: Local) -> None:
        """Sums gradients of what several ranks hold; none is left where no rank had one."""
        if self._degree > 1:
            self._sums.sum(local)

    def counted(self, local: Local) -> Local:
        """What this rank counts in a norm: every parameter is counted by one rank of `pp`."""
        if self._rank == 0:
            return local
        shared = set(self._shared(local))
        return {name: held for name, held in local.items() if name not in shared}

    def gathered(self, mine: Mapping[str, T]) -> dict[str, T]:
        """What all ranks have by parameter name, in the model's order; every rank must ask."""
        if self._degree == 1:
            return {name: mine[name] for name in self._trained}
        found = {name: mine[name] for name in self._shared(mine)}
        for rank in range(self._degree):
            own = {name: each for name, each in mine.items() if self._home[name] == rank}
            found |= self._groups.tell(own, "pp", rank)
        return {name: found[name] for name in self._trained}

    def wholes(self, of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every saved tensor, tied ones once; `of` gives those that this rank holds; every rank must take them all."""
        for name, *_ in self.aliases:
            home = self._home[name]
            if home is None:
                yield name, of(name)
            else:
                yield name, self._groups.tell(of(name) if home == self._rank else None, "pp", home)

    def _shared(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self._home[name] is None]


def _home(names: Sequence[str], homes: Mapping[str, int]) -> int | None:
    """The one rank whose blocks hold a tensor, or None."""
    found = {next((home for block, home in homes.items() if name.startswith(block + ".")), None) for name in names}
    return next(iter(found)) if len(found) == 1 else None


def _refuse(block: str, home: int, module: nn.Module, args: object) -> None:
    del module, args
    raise WrapError(
        f"block {block} is held by rank {home} of the pipeline, so the model cannot be called as a whole; use step() "
        "and evaluate(), and recompute= where the model runs blocks again in backward (torch.utils.checkpoint)"
    )


def _take_out(module: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    for kind in (owner._parameters, owner._buffers):
        if leaf in kind:
            kind[leaf] = None
