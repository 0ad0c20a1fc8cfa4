"""Transports by name."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from meshwright.moe.axes import ExpertAxes
from meshwright.moe.errors import DispatchError
from meshwright.moe.transport import Hopping, Transport
from meshwright.moe.transport_gather import Gathering
from meshwright.moe.transport_once import Once
from meshwright.parallel.errors import nearest

__all__ = ["TransportKind", "transport"]

TransportKind = Literal["all_gather", "one_hop", "inter_first", "intra_first", "once"]

_MAKERS: dict[str, Callable[[ExpertAxes], Transport]] = {
    "all_gather": Gathering,
    "one_hop": Hopping,
    "inter_first": partial(Hopping, hops="inter_first"),
    "intra_first": partial(Hopping, hops="intra_first"),
    "once": Once,
}


def transport(kind: TransportKind, axes: ExpertAxes) -> Transport:
    """A transport over some ranks; see the module `transport` for what each sends.

    Args:
        kind: its name.
        axes: made by `expert_axes`.

    Raises:
        DispatchError: for another name.

    >>> from meshwright.moe.axes import expert_axes
    >>> from meshwright.parallel.collectives import Groups
    >>> from meshwright.parallel.mesh import Mesh
    >>> transport("once", expert_axes(Groups(Mesh())))  # doctest: +ELLIPSIS
    Once(axes=ExpertAxes(...))
    """
    if kind not in _MAKERS:
        raise DispatchError(f"no transport is called {kind!r}; {nearest(str(kind), get_args(TransportKind))}")
    return _MAKERS[kind](axes)
