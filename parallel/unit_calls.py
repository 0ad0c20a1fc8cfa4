"""How a model calls some of its modules: what proofs run them on, and what its own code does between them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.unit_run import UnitCall, argument, keyed_arguments, own_copy, settings_of, tensors_of

__all__ = ["calls_of", "handed_on", "signature_of"]

# what is alike of a tensor and of a part of it
_ALIKE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "layout", "requires_grad", "ndim", "grad_fn")),
        *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta", "is_leaf", "is_sparse", "is_nested")),
        *(Tensor.dim, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device),
    }
)


def calls_of(model: nn.Module, run: Callable[[], Any], units: Iterable[str]) -> dict[str, UnitCall]:
    """Arguments of the first call of each unit of a model in `run`, one forward pass, in the order of these calls."""
    seen = _Seen()
    with ExitStack() as stack:
        for path in units:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(seen.entering(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(seen.leaving(path)).remove)
        stack.enter_context(saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_Between(seen))
        run()
    return {path: replace(call, read=frozenset(seen.read.get(path, ()))) for path, call in seen.calls.items()}


def handed_on(
    blocks: Sequence[str], calls: Mapping[str, UnitCall], streams: Mapping[str, int | str]
) -> list[tuple[str, ...]]:
    """The blocks of one list in runs, within which each gets for its stream the very value that the one before it gave.

    Where a run ends, the model's own code does something with the stream: scale it, drop some of it, add what it kept
    from before. It must see the whole then.

    Args:
        blocks: in any order; those that were not called stay with the one before.
        calls: of units in the order in which they were called, see `calls_of`.
        streams: block -> the argument that is its stream.
    """
    streams = {path: streams[path] for path in blocks}
    called = [path for path in calls if path in streams]
    order = called if set(called) == set(blocks) else list(blocks)
    runs = [[order[0]]]
    for before, after in pairwise(order):
        if (
            before in calls
            and after in calls
            and not _hands_on(calls[before], calls[after], before, stream=streams[after])
        ):
            runs.append([])
        runs[-1].append(after)
    return [tuple(each) for each in runs]


def _hands_on(before: UnitCall, after: UnitCall, path: str, *, stream: int | str) -> bool:
    shape = tuple(argument(after.args, after.kwargs, stream).shape)
    return after.follows.get(stream) == path and shape not in before.read


def signature_of(unit: nn.Module, call: UnitCall, parts: Any = ()) -> Any:
    """Units of equal signature are dealt alike; one proof serves them all. `parts` is what else tells them apart."""
    given = tuple(
        (key, tuple(each.shape), each.requires_grad) if isinstance(each, Tensor) else (key, type(each))
        for key, each in keyed_arguments(call.args, call.kwargs)
    )
    return settings_of(unit), parts, given


@dataclass
class _Seen:
    """What was seen of a pass so far.

    Attributes:
        calls: the first of each unit.
        made: storage -> a tensor that keeps its address, and the unit that made it.
        gave: id of a tensor -> itself, and the unit that gave it.
        read: unit -> shapes of what it gave that others looked at.
        depth: of units in each other.
    """

    calls: dict[str, UnitCall] = field(default_factory=dict)
    made: dict[int, tuple[Any, str]] = field(default_factory=dict)
    gave: dict[int, tuple[Tensor, str]] = field(default_factory=dict)
    read: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)
    depth: int = 0

    def entering(self, path: str) -> Any:
        """A hook before a unit's forward."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            self.depth += 1
            given = [(key, each) for key, each in keyed_arguments(args, kwargs) if isinstance(each, Tensor)]
            follows = {key: self.gave[id(each)][1] for key, each in given if id(each) in self.gave}
            for _, each in given:
                self.note(each, reader=path)
            known = self.calls.get(path)
            if known is not None:
                always = {key: maker for key, maker in known.follows.items() if follows.get(key) == maker}
                self.calls[path] = replace(known, follows=always)
                return
            kept = tree_map(_kept, (args, kwargs))
            passed = frozenset(key for key, each in given if _storage(each) in self.made)
            self.calls[path] = UnitCall(kept[0], kept[1], passed, follows)

        return hook

    def leaving(self, path: str) -> Any:
        """A hook behind a unit's forward."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            for each in tensors_of(output):
                self.made[_storage(each)] = (each.untyped_storage(), path)
                self.gave[id(each)] = (each, path)
            self.depth -= 1

        return hook

    def note(self, tensor: Tensor, reader: str = "") -> None:
        """Notes that a value is looked at, unless by a unit of the list that its maker is in."""
        _, maker = self.made.get(_storage(tensor), (None, ""))
        if maker and (not reader or reader.rpartition(".")[0] != maker.rpartition(".")[0]):
            self.read.setdefault(maker, set()).add(tuple(tensor.shape))


class _Between(TorchFunctionMode):
    """Sees what a model's own code does outside of units."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, *given: Any) -> Any:
        """Passes every call on."""
        if not self._seen.depth and func not in _ALIKE:
            for each in tree_leaves(given):
                if isinstance(each, Tensor):
                    self._seen.note(each)
        args, keywords = given[0] if given else (), given[1] if len(given) > 1 and given[1] else {}
        return func(*args, **keywords)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().requires_grad_(leaf.requires_grad)
    return own_copy(leaf)
