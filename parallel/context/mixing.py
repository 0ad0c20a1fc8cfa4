"""Modules of a block that look at other positions though they are no attention, such as routers that count tokens.

A router with a capacity drops the tokens of an expert that come after too many others. Random tokens may never fill
one, so that a proof on them would pass; one token at all positions fills it. Such a module runs on the whole sequence
on every rank, and what it says of each position goes on with the position.
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from meshwright.parallel.blockwise.by_position import WithoutDropout
from meshwright.parallel.promote import Promote
from meshwright.parallel.unit_run import Plain, tensors_of

__all__ = ["looks_around", "mixing_modules"]

_TOLERANCE = 1e-10
_MOST_POSITIONS = 1 << 14
_MOST_PRODUCTS = 1 << 28


def mixing_modules(plain: Plain, attends: Iterable[str]) -> dict[str, tuple[int | str, ...]]:
    """The innermost modules of a block that look at other positions -> the argument by which they see the stream.

    Args:
        plain: run of the block.
        attends: modules whose attention is followed; nothing that holds one or lies in one is tried.
    """
    attending = [f"{name}." for name in attends]
    found = {}
    for path, keys in plain.keys.items():
        apart = not any(f"{path}.".startswith(name) or name.startswith(f"{path}.") for name in attending)
        if len(keys) == 1 and apart and _looks_around(plain, path, keys[0]):
            found[path] = keys
    return {path: keys for path, keys in found.items() if not any(other.startswith(f"{path}.") for other in found)}


def looks_around(module: nn.Module, width: int, length: int, *, key: int | str = 0) -> bool:
    """Whether a module says different things of equal tokens, from where they stand; False where it cannot be called.

    Args:
        module: of float64; a copy of it is run, without dropout.
        width: of a token.
        length: positions, that all have one token.
        key: of its only argument.

    >>> looks_around(nn.Linear(4, 2).double(), 4, 8), looks_around(nn.Conv1d(8, 8, 3, padding=1).double(), 4, 8)
    (False, True)
    """
    generator = torch.Generator().manual_seed(5)
    token = torch.randn(1, 1, width, dtype=torch.float64, generator=generator)
    given = token.expand(1, length, width).contiguous()
    mine = copy.deepcopy(module, {id(each): each for each in module.parameters()})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), Promote(), WithoutDropout():
            made = tensors_of(mine(given) if isinstance(key, int) else mine(**{key: given}))
    except Exception:  # whatever a module raises when it is given one tensor, it is not called with one
        return False
    return any(not _constant(each.double(), length) for each in made)


def _looks_around(plain: Plain, path: str, key: int | str) -> bool:
    module, (*_, full, width) = plain.unit.get_submodule(path), plain.shape
    products = width + sum(each.numel() for each in module.parameters())
    return looks_around(module, width, max(2 * full, min(_MOST_POSITIONS, _MOST_PRODUCTS // products)), key=key)


def _constant(made: Tensor, length: int) -> bool:
    """Whether all positions have the same; True for what has none."""
    scale = float(made.abs().max()) if made.numel() else 0.0
    dims = [dim for dim, size in enumerate(made.shape) if size == length]
    return all(bool(((made - made.narrow(dim, 0, 1)).abs() <= _TOLERANCE * scale).all()) for dim in dims)
