"""Stand-ins for the parameters of modules that run more than once for one gradient.

Autograd is given each parameter once, so that what waits for its gradient is called once; what runs inside sees aliases
of the same memory, which have no hooks.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

from meshwright.parallel.errors import WrapError

__all__ = ["Places", "aliases", "check_versions", "places_of", "versions_of"]

Places: TypeAlias = list[tuple[nn.Parameter, list[tuple[nn.Module, str]]]]
"""Each parameter of some modules, and where it lies."""


def places_of(modules: Iterable[nn.Module]) -> Places:
    """The parameters of modules and of what is in them, as they are now.

    >>> [(list(each.shape), len(held)) for each, held in places_of([nn.Linear(2, 3)])]
    [([3, 2], 1), ([3], 1)]
    """
    found: dict[int, tuple[nn.Parameter, list[tuple[nn.Module, str]]]] = {}
    for owner in dict.fromkeys(each for module in modules for each in module.modules()):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, []))[1].append((owner, name))
    return list(found.values())


@contextmanager
def aliases(places: Places, numbers: Sequence[int]) -> Iterator[list[nn.Parameter]]:
    """Inside, modules have aliases of their parameters; those of `numbers` take gradients, and none has hooks."""
    made = [nn.Parameter(each.detach(), requires_grad=number in numbers) for number, (each, _) in enumerate(places)]
    try:
        for (_, held), alias in zip(places, made, strict=True):
            for owner, name in held:
                owner._parameters[name] = alias
        yield made
    finally:
        for parameter, held in places:
            for owner, name in held:
                owner._parameters[name] = parameter


def versions_of(places: Places) -> list[tuple[Tensor, int]]:
    """How often each parameter was changed so far."""
    return [(each, each._version) for each, _ in places]


def check_versions(name: str, versions: Sequence[tuple[Tensor, int]], instead: str) -> None:
    """Refuses to run something again whose parameters were changed since.

    Raises:
        WrapError: then; it names what runs, and what to do `instead`.
    """
    if any(each._version != version for each, version in versions):
        raise WrapError(
            f"parameters of {name} were changed between forward and backward, so it cannot be run again; {instead}"
        )
