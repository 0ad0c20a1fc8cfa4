"""What blocks on dealt positions take besides the stream: their share of it, or the whole with gradients summed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from meshwright.parallel.context.plan import ContextPlan, Dealt
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import cut, enter
from meshwright.parallel.length import Length
from meshwright.parallel.tensor import changed, length_of

__all__ = ["deal_arguments"]


def deal_arguments(model: nn.Module, plan: ContextPlan, lengths: Mapping[str, Length]) -> None:
    """Puts hooks on blocks that change what they are given.

    Args:
        model: or one block, where the plan is about one.
        plan: whose `dealt` and `entered` are done.
        lengths: block -> its stream.
    """
    for path in {*plan.dealt, *plan.entered}:
        length = length_of(path, lengths)
        assert length is not None, f"{path} has no stream"
        hook = partial(_change, length, plan.dealt.get(path, ()), plan.entered.get(path, ()))
        model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)


def _change(length: Length, dealt: Dealt, entered: tuple[int | str, ...], *call: Any) -> Any:
    _, args, kwargs = call
    for key, dims in dealt:
        args, kwargs = changed(args, kwargs, keys=(key,), change=partial(_own_share, length, dims))
    return changed(args, kwargs, keys=entered, change=partial(_entered, length))


def _own_share(length: Length, dims: tuple[int | None, ...], value: Any) -> Any:
    leaves, structure = tree_flatten(value)
    own = length.axis.dealing.size(length.full, length.axis.rank)
    for place, (leaf, dim) in enumerate(zip(leaves, dims, strict=True)):
        if dim is None or not isinstance(leaf, Tensor) or leaf.shape[dim] == own:
            continue  # no positions, or its share already
        if leaf.shape[dim] != length.full:
            raise WrapError(
                f"a block gets a value {tuple(leaf.shape)} where it got one for each of the {length.full} positions in "
                "the example; pass an example= like the batches to come"
            )
        leaves[place] = cut(leaf, length.axis, dim % leaf.dim())
    return tree_unflatten(leaves, structure)


def _entered(length: Length, value: Any) -> Any:
    return enter(value, length.axis) if isinstance(value, Tensor) else value
