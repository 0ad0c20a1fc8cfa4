"""Whether a module works position by position: it is run, on all positions and on a few at a time."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from meshwright.parallel.promote import Promote
from meshwright.parallel.unit_run import with_random_weights

__all__ = ["WithoutDropout", "leaves_of", "works_by_position"]

_TOLERANCE = 1e-10
_LENGTH = 6
_CUTS = (slice(0, 1), slice(1, 4), slice(4, _LENGTH))


def works_by_position(module: nn.Module, width: int) -> bool:
    """Whether each position of the output [samples, positions, width] depends on that of the input alone.

    A copy is run in float64 with random weights, in training, without dropout. It must leave nothing behind, such as
    statistics or losses on the side, and use no parameters but its own.

    >>> works_by_position(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), 4)
    True
    >>> works_by_position(nn.BatchNorm1d(_LENGTH), 4), works_by_position(nn.Softmax(dim=1), 4)
    (False, False)
    """
    generator = torch.Generator().manual_seed(5)
    given = torch.randn(3, _LENGTH, width, dtype=torch.float64, generator=generator).requires_grad_()
    try:
        mine = with_random_weights(module).train()
        before = _state_of(mine)
        with torch.random.fork_rng(devices=[]), Promote(), WithoutDropout():
            whole = mine(given)
            parts = torch.cat([mine(given[:, cut].contiguous()) for cut in _CUTS], 1)
    except Exception:  # whatever a module raises when it is given one tensor, it is not called with one
        return False
    if not isinstance(whole, Tensor) or whole.shape != given.shape or whole is given:
        return False
    own = {id(given), *map(id, mine.parameters())}
    return _close(parts, whole) and _state_of(mine) == before and leaves_of(whole) <= own


class WithoutDropout(TorchFunctionMode):
    """A context in which nothing is dropped."""

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        """Replaces dropouts and passes every other call on."""
        args, keywords = given[0] if given else (), given[1] if len(given) > 1 and given[1] else {}
        if func is functional.dropout:
            return args[0] if args else keywords["input"]
        return func(*args, **keywords)


def _close(found: Any, expected: Tensor) -> bool:
    fits = isinstance(found, Tensor) and found.shape == expected.shape
    return fits and bool(((found - expected).abs() <= _TOLERANCE * expected.abs().max()).all())


def _state_of(module: nn.Module) -> list[Any]:
    """What a call must not change: attributes of modules, and versions of their tensors."""
    tensors: Iterable[Tensor] = (*module.parameters(), *module.buffers())
    attributes = [
        (name, id(value)) for each in module.modules() for name, value in vars(each).items() if not name.startswith("_")
    ]
    return [*attributes, *((id(each), each._version) for each in tensors)]


def leaves_of(output: Tensor) -> set[int]:
    """Ids of the leaves that a tensor's history reaches.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> leaves_of(weight * 2) == {id(weight)}
    True
    """
    found, seen, todo = set(), set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [after for after, _ in node.next_functions]
    return found
