"""Plugging a model's attention, whatever it is written in."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import finalize

from torch import nn

from meshwright.parallel.blockwise.calls import Handler, Plug
from meshwright.parallel.blockwise.functions import attribute_places, function_places, weight_hooks
from meshwright.parallel.blockwise.interface import Configs, interface_places
from meshwright.parallel.blockwise.patches import Patches

__all__ = ["Plugged", "plug_in", "plugged"]

_SHARED = Patches()


class Plugged:
    """A model whose attention calls go to a handler until `remove`, or until the model is no more.

    Attributes:
        plug: what it was plugged with.
    """

    def __init__(self, model: nn.Module, handler: Handler) -> None:
        self.plug = Plug(model, handler)
        modules = self.plug.modules
        self._configs = Configs(modules)
        self.plug.put_in()
        try:
            self._configs.switch()
        except BaseException:
            self.plug.take_out()
            raise
        self._hooks = weight_hooks(modules)
        self._attributes, self._places = Patches(), attribute_places(modules)
        self._attributes.need(self._places)
        shared = [*interface_places(), *function_places(modules)]
        _SHARED.need(shared)
        self._release = finalize(model, _SHARED.release, shared)

    def remove(self) -> None:
        """Makes the model, its configs and what was patched for it what they were."""
        self._release()
        self._attributes.release(self._places)
        for hook in self._hooks:
            hook.remove()
        self._configs.restore()
        self.plug.take_out()


def plug_in(model: nn.Module, handler: Handler) -> Plugged:
    """Sends every attention call of an unmodified model to `handler`, until `remove` of what is returned is called.

    Calls arrive from models of `transformers` by their attention interface, and from any model by torch's
    `scaled_dot_product_attention` and `nn.MultiheadAttention`. Other models in the process are not touched.

    Args:
        model: changed in place: names in configs, hooks.
        handler: computes calls.

    Raises:
        WrapError: for a model that is plugged already, or that gives back attention weights.
    """
    return Plugged(model, handler)


@contextmanager
def plugged(model: nn.Module, handler: Handler) -> Iterator[Plug]:
    """The same as `plug_in` for as long as the context is entered.

    >>> import torch
    >>> attention, x = nn.MultiheadAttention(4, 2), torch.ones(3, 1, 4)
    >>> with plugged(attention, lambda call: call.value) as plug:
    ...     _ = attention(x, x, x)
    >>> plug.arrived
    {'': 'scaled_dot_product_attention'}
    """
    inside = plug_in(model, handler)
    try:
        yield inside.plug
    finally:
        inside.remove()
