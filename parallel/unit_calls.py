"""How a model calls some of its modules: what proofs run them on."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from meshwright.parallel.unit_run import UnitCall, keyed_arguments, own_copy, settings_of, tensors_of

__all__ = ["calls_of", "signature_of"]


def calls_of(model: nn.Module, run: Callable[[], Any], units: Iterable[str]) -> dict[str, UnitCall]:
    """Arguments of the first call of each unit of a model in `run`, one forward pass."""
    found: dict[str, UnitCall] = {}
    made: dict[int, Any] = {}  # storages that units made, kept alive so that their addresses stay theirs

    def noting(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if path not in found:
                kept = tree_map(_kept, (args, kwargs))
                given = keyed_arguments(args, kwargs)
                passed = (key for key, each in given if isinstance(each, Tensor) and _storage(each) in made)
                found[path] = UnitCall(kept[0], kept[1], frozenset(passed))

        return hook

    def keeping(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        made.update({_storage(each): each.untyped_storage() for each in tensors_of(output)})

    with ExitStack() as stack:
        for path in units:
            hook = model.get_submodule(path).register_forward_pre_hook(noting(path), with_kwargs=True)
            stack.callback(hook.remove)
            stack.callback(model.get_submodule(path).register_forward_hook(keeping).remove)
        stack.enter_context(saved_tensors_hooks(lambda tensor: None, lambda nothing: torch.empty(0)))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        run()
    return found


def signature_of(unit: nn.Module, call: UnitCall, parts: Any = ()) -> Any:
    """Units of equal signature are dealt alike; one proof serves them all. `parts` is what else tells them apart."""
    given = tuple(
        (key, tuple(each.shape), each.requires_grad) if isinstance(each, Tensor) else (key, type(each))
        for key, each in keyed_arguments(call.args, call.kwargs)
    )
    return settings_of(unit), parts, given


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _kept(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.detach().requires_grad_(leaf.requires_grad)
    return own_copy(leaf)
