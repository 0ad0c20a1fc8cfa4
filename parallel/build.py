"""From a model and the plans made of it to the engine that steps it: what every rank does, real or on paper."""

from collections.abc import Hashable, Mapping

from torch import nn

from meshwright.parallel.blockwise.calls import Handler
from meshwright.parallel.blockwise.install import BlockwiseAttention
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.blockwise.tiling import tile_heads, tile_networks
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.chosen import way_of
from meshwright.parallel.context.install import deal_sequence
from meshwright.parallel.data import build_data_engine
from meshwright.parallel.engine import Engine
from meshwright.parallel.options import Options
from meshwright.parallel.pipeline.route import Route
from meshwright.parallel.plan import Plans, deal_model
from meshwright.parallel.spans.install import span_blocks
from meshwright.parallel.spread import spread_over
from meshwright.parallel.weights import NamedStates

__all__ = ["deal", "engine_of"]


def deal(
    model: nn.Module, groups: Groups, options: Options, *, plans: Plans
) -> tuple[BlockwiseAttention | None, list[str]]:
    """Makes the model run by blocks and over axes, in place, pass by pass.

    Returns:
        Its attention by blocks, where there is any, and what a report says.
    """
    mesh = groups.mesh
    blocks = options.sizes if mesh.cp == 1 else None  # cp attends by blocks anyway
    blockwise = None if blocks is None else BlockwiseAttention(model, blocks, options.example)
    said = tile_networks(model, options.sizes)
    handler = _run_by_spans(model, options.sizes, plans, said=said)
    if mesh.tp > 1:
        deal_model(model, plans.tensor, groups.axis("tp"))
    said += tile_heads(model, options.sizes, groups.axis("cp") if mesh.cp > 1 else None)
    if blockwise is not None:
        blockwise.install(handler)
    if plans.context is not None and mesh.cp > 1:
        way = way_of(options.cp_kind, plans.context.attends, degree=mesh.cp, tp=mesh.tp)
        deal_sequence(model, plans.context, groups, way=way, sizes=options.sizes or Blockwise())
    if options.moe is not None:
        options.moe.deal(model, plans.experts, groups)
    return blockwise, said


def _run_by_spans(model: nn.Module, sizes: Blockwise | None, plans: Plans, *, said: list[str]) -> Handler | None:
    """Makes blocks run by spans where that was planned; what computes attention then."""
    if sizes is None or plans.spans is None:
        return None
    said += plans.spans.lines(sizes)
    return span_blocks(model, plans.spans, sizes)


def engine_of(
    model: nn.Module,
    groups: Groups,
    options: Options,
    *,
    plans: Plans,
    names: NamedStates,
    routes: Mapping[Hashable, Route] | None = None,
) -> Engine:
    """Spreads the states of a model that was dealt, and makes the engine that steps it.

    Args:
        model: changed in place.
        groups: of the mesh.
        options: of the wrap.
        plans: by which it was dealt.
        names: of the whole model's states.
        routes: of all micro-batches through a pipeline, where they need not be looked for.
    """
    spread = spread_over(model, groups, options, plans=plans, names=names)
    data = build_data_engine(model, groups, options, spread)
    return Engine(data, groups, options, spread.stages, routes=routes)
