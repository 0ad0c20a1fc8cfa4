"""Counts what the experts of a model are asked for while it trains, dealt or not, and moves biases by it.

Counts are integers and add up exactly over micro-batches and ranks, so the biases that balance experts without a loss
(see `loss_free`) are the same however a global batch is cut.

  model --count_experts-->  steps  --take_counts--> RoutingCounts of each layer  --move_biases--> next step
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from meshwright.moe.balance import Total
from meshwright.moe.errors import BalanceError
from meshwright.moe.loss_free import next_bias
from meshwright.moe.metrics import RoutingCounts, count_routing, no_counts, summed_counts
from meshwright.moe.recognise import FoundExperts, find_bias, find_experts
from meshwright.moe.swap import read_routing
from meshwright.parallel.recompute import is_uncounted

__all__ = ["count_experts", "move_biases", "take_counts"]


def count_experts(model: nn.Module, *, balanced: bool = False) -> list[str]:
    """From now on counts what is asked of experts, by forward passes of training, once for each micro-batch.

    Args:
        model: before its experts are dealt, and after its routers are replaced.
        balanced: whether biases will be moved by what is counted.

    Returns:
        The paths of the experts.

    Raises:
        SwapError: for a model without experts that are recognised.
        BalanceError: for routers without biases that can be moved.
    """
    found = find_experts(model)
    for each in found:
        counter = _Counter(model, each)
        if balanced:
            _check(each, counter)
        each.module.register_forward_pre_hook(counter, with_kwargs=True)
    return [each.path for each in found]


def take_counts(model: nn.Module, total: Total, *, mine: bool = True) -> dict[str, RoutingCounts]:
    """What was counted since the last call: path of experts -> counts of all ranks.

    Args:
        model: see `count_experts`; wrapped or not.
        total: adds int64 [n] over all ranks of a mesh; called once, so all ranks must ask.
        mine: whether this rank's tokens are its own to count; of ranks that hold the same ones (`tp`), one does.
    """
    counters = dict(_counters(model))
    taken = {path: each.take() for path, each in counters.items()}
    own = taken if mine else {path: no_counts(each.num_experts) for path, each in taken.items()}
    return summed_counts(own, total)


def move_biases(
    model: nn.Module, counts: Mapping[str, RoutingCounts], *, rate: float = 1e-3, centred: bool = False
) -> None:
    """Moves what experts are ranked by, towards those that were asked for less; once for each global batch.

    Args:
        model: see `count_experts`; one whose routers have such a bias, as DeepSeek-V3's.
        counts: of the global batch, from `take_counts`.
        rate: step of a bias.
        centred: keep the sum of each bias.

    Raises:
        BalanceError: for a bias that is kept in too narrow a dtype.
    """
    for path, counter in _counters(model):
        bias = counter.bias()
        if bias is None:  # of another stage
            continue
        moved = next_bias(bias, counts[path].asked.to(bias.device), rate=rate, centred=centred)
        with torch.no_grad():
            bias.copy_(moved)


class _Counter:
    """Called with what experts are called with, before they are."""

    def __init__(self, model: nn.Module, found: FoundExperts) -> None:
        self._num_experts = found.num_experts
        self._signature = inspect.signature(found.module.forward)
        self._bias = find_bias(model, found)
        self._counted = no_counts(found.num_experts)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or is_uncounted():
            return
        _, index, weights = self._signature.bind(*args, **kwargs).arguments.values()
        self._counted += count_routing(read_routing(index, weights.detach(), num_experts=self._num_experts))

    def take(self) -> RoutingCounts:
        """What was counted; counting begins anew."""
        taken, self._counted = self._counted, no_counts(self._num_experts)
        return taken

    def bias(self) -> torch.Tensor | None:
        """What moves choices, as its module holds it now."""
        return None if self._bias is None else getattr(*self._bias)


def _check(found: FoundExperts, counter: _Counter) -> None:
    bias = counter.bias()
    if bias is None:
        raise BalanceError(f"no bias moves what experts {found.path} are chosen by; balance these experts by a loss")
    next_bias(bias, bias.new_zeros(bias.shape, dtype=torch.int64))


def _counters(model: nn.Module) -> Iterator[tuple[str, _Counter]]:
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _Counter):
                yield path, hook
