"""Makes a model's blocks work on their rank's positions: the one place that executes a plan of `cp`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.attention import draw_seed
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plug_in
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.collectives import Groups
from meshwright.parallel.context.arguments import deal_arguments
from meshwright.parallel.context.attending import attend_to_all, has_dealt_keys, own_rows
from meshwright.parallel.context.attention import attend_dealt
from meshwright.parallel.context.axis import ContextAxis, context_axis
from meshwright.parallel.context.chosen import ContextWay
from meshwright.parallel.context.kinds import Kind
from meshwright.parallel.context.plan import Attends, ContextPlan
from meshwright.parallel.dropout import first_dropped_head
from meshwright.parallel.errors import WrapError
from meshwright.parallel.length import Length
from meshwright.parallel.passing import on_passing
from meshwright.parallel.tensor import install, length_of, open_streams

__all__ = ["deal_sequence"]


def deal_sequence(model: nn.Module, plan: ContextPlan, groups: Groups, *, way: ContextWay, sizes: Blockwise) -> None:
    """Deals the sequence of a model before its blocks and joins it behind them.

    Args:
        model: changed in place; its heads may be dealt over `tp` already.
        plan: of `cp`, see `plan_context`.
        groups: process groups of the mesh.
        way: how keys and queries meet.
        sizes: of attention's blocks.
    """
    axis = replace(context_axis(groups, way.kind), order=way.dealing)
    lengths = open_streams(model, plan, axis)
    install(model, plan, axis, lengths)
    deal_arguments(model, plan, lengths)
    for stream in plan.streams:
        on_passing(model.get_submodule(stream.blocks[0]), partial(_check_length, lengths[stream.blocks[0]]))
    plug_in(model, _Handler(plan.attends, lengths, axis, way.kind, sizes))


@dataclass(frozen=True, eq=False)
class _Handler:
    attends: Mapping[str, Attends]
    lengths: Mapping[str, Length]
    axis: ContextAxis
    kind: Kind
    sizes: Blockwise

    def __call__(self, asked: AttentionCall) -> Tensor:
        attends = self.attends.get(asked.name)
        if attends is None:
            return attend_to(asked, self.sizes)
        length = length_of(asked.name, self.lengths)
        assert length is not None, asked.name
        _check(asked, attends, length)
        if not attends.dealt:
            return attend_to_all(asked, length, self.sizes, dealt=False)
        return self._attend(asked, length.full, own_rows(asked.bias, length))

    def _attend(self, asked: AttentionCall, full: int, bias: Tensor | None) -> Tensor:
        first, seed = 0, None
        if asked.dropout_p:
            first = first_dropped_head(asked.query, (*asked.query.shape[:3], full))
            seed = draw_seed()
        return attend_dealt(
            asked.query,
            asked.key,
            asked.value,
            axis=self.axis,
            dealing=self.axis.dealing,
            length=full,
            kind=self.kind,
            mask=asked.mask,
            bias=bias,
            scale=asked.scale,
            softcap=asked.softcap,
            sinks=asked.sinks,
            dropout_p=asked.dropout_p,
            dropout_seed=seed,
            first_head=first,
            query_block=self.sizes.query_block,
            kv_block=self.sizes.kv_block,
        )


def _check_length(length: Length, arguments: object) -> None:
    del arguments
    if length.full < 2 * length.axis.size:  # models take one position alone for a step of generation, without a mask
        raise WrapError(
            f"a sequence of {length.full} positions leaves some of the {length.axis.size} ranks of cp with fewer than "
            "two; give longer ones, or deal the batch over dp"
        )


def _check(asked: AttentionCall, attends: Attends, length: Length) -> None:
    found = has_dealt_keys(asked, length)
    if found is None or (attends.dealt and not found):
        where = "dealt as its queries" if attends.dealt else "whole"
        raise WrapError(
            f"attention of {asked.name} has {asked.query.shape[2]} queries and {asked.key.shape[2]} keys here, of a "
            f"sequence of {length.full}, and its keys were {where} with the example; pass an example= like the batches "
            "to come"
        )
