"""Modules of a block that look at other positions though they are no attention, such as routers that count tokens.

A router with a capacity drops the tokens of an expert that come after too many others. Random tokens may never fill
one, so that a proof on them would pass; one token at all positions fills it. Such a module runs on the whole sequence
on every rank, and what it says of each position goes on with the position.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from meshwright.parallel.blockwise.by_position import WithoutDropout
from meshwright.parallel.dropout import PlainDropout
from meshwright.parallel.promote import Promote
from meshwright.parallel.unit_run import Plain, tensors_of

__all__ = ["looks_around", "mixing_modules"]

_TOLERANCE = 1e-10
_FEWEST_POSITIONS = 37  # twice that, and so on, is a size of few other things
_MOST_POSITIONS = 1 << 14
_MOST_PRODUCTS = 1 << 28
_MOST_NUMBERS = 1 << 26


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


def looks_around(module: nn.Module, width: int, longest: int, *, key: int | str = 0) -> bool:
    """Whether a module says different things of equal tokens, from where they stand; False where it cannot be called.

    One that draws for each of them does, whether that matters for these tokens or not. A module is run on ever more of
    them; one that compares all with all, and takes memory by the square, on no more than make tensors of 2^26 numbers.

    Args:
        module: of float64; a copy of it is run, without dropout.
        width: of a token.
        longest: most positions, that all have one token.
        key: of its only argument.

    >>> looks_around(nn.Linear(4, 2).double(), 4, 8), looks_around(nn.GRU(4, 4, batch_first=True).double(), 4, 8)
    (False, True)
    """
    generator = torch.Generator().manual_seed(5)
    token = torch.randn(1, 1, width, dtype=torch.float64, generator=generator)
    other = {size for each in (*module.parameters(), *module.buffers()) for size in each.shape}
    length, before = min(_FEWEST_POSITIONS, longest), 0
    while True:
        while length in other:  # a dim of that size need not be the positions'
            length += 1
        said = _said(module, token.expand(1, length, width).contiguous(), key)
        if said is None:
            return False
        if said.draws or any(not _constant(each.double(), length) for each in said.made):
            return True
        if length >= longest or (4 * said.largest > _MOST_NUMBERS and said.largest > 3 * before):
            return False
        length, before = min(2 * length, longest), said.largest


@dataclass(frozen=True, eq=False)
class _Said:
    """What a module made of equal tokens, numbers of the largest tensor on the way, and whether it drew for each."""

    made: list[Tensor]
    largest: int
    draws: bool


def _said(module: nn.Module, given: Tensor, key: int | str) -> _Said | None:
    mine = copy.deepcopy(module, {id(each): each for each in module.parameters()})
    drawing = PlainDropout(generator=torch.Generator().manual_seed(7))
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            drawing,
            _Largest() as seen,
            Promote(),
            WithoutDropout(),
        ):
            made = tensors_of(mine(given) if isinstance(key, int) else mine(**{key: given}))
    except Exception:  # whatever a module raises when it is given one tensor, it is not called with one
        return None
    return _Said(made, seen.numbers, any(prod(shape) % given.shape[1] == 0 for _, shape in drawing.drawn))


class _Largest(TorchFunctionMode):
    """Notes the size of the largest tensor that is made inside."""

    numbers = 0

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        args, keywords = given[0] if given else (), given[1] if len(given) > 1 and given[1] else {}
        result = func(*args, **keywords)
        if isinstance(result, Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def _looks_around(plain: Plain, path: str, key: int | str) -> bool:
    module, (*_, full, width) = plain.unit.get_submodule(path), plain.shape
    products = width + sum(each.numel() for each in module.parameters())
    longest = max(2 * full, min(_MOST_POSITIONS, _MOST_PRODUCTS // products))
    return looks_around(module, width, longest, key=key)


def _constant(made: Tensor, length: int) -> bool:
    """Whether all positions have the same; True for what has none."""
    scale = float(made.abs().max()) if made.numel() else 0.0
    dims = [dim for dim, size in enumerate(made.shape) if size == length]
    return all(bool(((made - made.narrow(dim, 0, 1)).abs() <= _TOLERANCE * scale).all()) for dim in dims)
