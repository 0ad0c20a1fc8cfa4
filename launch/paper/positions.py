"""What a job on paper sends besides what its model does by itself: keys along `cp`, its borders, and sums of gradients.

Attention sends what the runtime's kind of it does (see `parallel.context.traffic`). Gradients of what ranks of `tp` or
`cp` all hold are summed once a step.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

from torch import Tensor, nn

from meshwright.launch.paper.states import block_parameters
from meshwright.parallel.context.chosen import way_of
from meshwright.parallel.context.dealing import Dealing
from meshwright.parallel.context.plan import Attends, ContextPlan
from meshwright.parallel.context.traffic import Sending, Shape, sendings_of
from meshwright.parallel.dealt import summed_elements
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans
from meshwright.parallel.tensor_plan import TensorPlan
from meshwright.parallel.work import Sent

__all__ = ["border_sends", "keys_fetched", "summed_at_end"]

_WIDE = 4  # bytes that an element of a sum has at least


def keys_fetched(
    options: Options, degree: int
) -> Callable[[Tensor, Tensor, Tensor], tuple[Sequence[Sent], Sequence[Sent]]]:
    """Tells what a rank of `cp` sends for an attention of its own positions, forward and backward.

    Args:
        options: of the job, with `cp_kind`.
        degree: of `cp`.
    """

    def fetched(query: Tensor, key: Tensor, value: Tensor) -> tuple[Sequence[Sent], Sequence[Sent]]:
        outer, (positions, width) = query.shape[:-2], query.shape[-2:]
        heads, kv_heads = (each.shape[-3] if each.dim() > 2 else 1 for each in (query, key))
        shape = Shape(
            batch=prod(outer[:-1]),
            length=positions * degree,
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            value_width=value.shape[-1],
        )
        way = way_of(options.cp_kind, {"": Attends(True, heads, kv_heads, width)}, degree=degree, tp=1)
        dealing = Dealing(way.dealing, degree)
        both = [sendings_of(shape, dealing, way.kind, rank=0, backward=each) for each in (False, True)]
        forward, backward = ([_sent(each, query.itemsize, degree) for each in found] for found in both)
        return forward, backward

    return fetched


def _sent(sending: Sending, itemsize: int, degree: int) -> Sent:
    size_bytes = float(sending.elements * (max(itemsize, _WIDE) if sending.of == "summed" else itemsize))
    if sending.kind != "all_to_all":
        return Sent("cp", sending.kind, size_bytes)
    if sending.of != "exchanged":
        return Sent("cp", "hop", size_bytes)
    whole = size_bytes * sending.ranks / (sending.ranks - 1)
    return Sent("cp", "all_to_all", whole, consecutive=sending.ranks if sending.ranks < degree else 0)


def border_sends(plan: ContextPlan | None, itemsize: int) -> tuple[Sent, ...]:
    """What a micro-batch sends along `cp` where it enters blocks and leaves them.

    Args:
        plan: along `cp`; nothing is known without.
        itemsize: bytes of an element.
    """
    calls = () if plan is None else plan.calls.values()
    return tuple(Sent("cp", kind, float(elements * itemsize)) for each in calls for kind, elements in each)


def summed_at_end(mine: nn.Module, mesh: Mesh, options: Options, *, plans: Plans) -> tuple[Sent, ...]:
    """The sums of gradients along `tp` and `cp` that end a step on one rank, evenly over stages.

    Args:
        mine: what a rank of `tp` holds of the model.
        mesh: of the job.
        options: of the wrap.
        plans: how the model is dealt; without one along `cp`, all parameters of blocks are taken to be summed.
    """
    trained = {name: each for name, each in mine.named_parameters() if each.requires_grad}
    itemsize = max((each.element_size() for each in trained.values()), default=0)
    found = dict(_sums(trained, mesh, plans))
    if mesh.cp > 1 and plans.context is None:
        inside = set().union(*block_parameters(mine, options).values())
        found["cp"] = sum(each.numel() for name, each in trained.items() if name in inside) / mesh.fsdp
    return tuple(
        Sent(axis, "all_reduce", elements * itemsize / mesh.pp) for axis, elements in found.items() if elements
    )


def _sums(trained: dict[str, nn.Parameter], mesh: Mesh, plans: Plans) -> Iterator[tuple[str, float]]:
    of_axes: tuple[tuple[str, TensorPlan | None], ...] = ("tp", plans.tensor), ("cp", plans.context)
    for axis, plan in of_axes:
        if plan is not None and plan.degree > 1:
            wanted = trained if axis == "tp" else {name: each for name, each in trained.items() if name in plan.partial}
            used = len(wanted) if axis == "cp" else 0  # which some rank of cp may not have, and says
            shapes = {name: tuple(each.shape) for name, each in wanted.items()}
            yield axis, summed_elements(plan, shapes, mesh.fsdp) + used
