"""Makes a model's blocks work on their rank's positions: the one place that executes a plan of `cp`."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.parallel.blockwise.answer import attend_to
from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.plugs import plug_in
from meshwright.parallel.blockwise.sizes import Blockwise
from meshwright.parallel.context.attending import DEALT, attend_to_all, kind_of
from meshwright.parallel.errors import WrapError
from meshwright.parallel.exchange import Axis
from meshwright.parallel.length import Length
from meshwright.parallel.tensor import install, length_of, open_streams
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["deal_sequence"]


def deal_sequence(model: nn.Module, plan: TensorPlan, axis: Axis, sizes: Blockwise) -> None:
    """Deals the sequence of a model before its blocks and joins it behind them.

    Args:
        model: changed in place; its heads may be dealt over `tp` already.
        plan: of `cp`, see `plan_context`.
        axis: the ranks of `cp`.
        sizes: of attention's blocks.
    """
    lengths = open_streams(model, plan, axis)
    install(model, plan, axis, lengths)
    plug_in(model, _Handler(plan, lengths, sizes))


@dataclass(frozen=True, eq=False)
class _Handler:
    plan: TensorPlan
    lengths: Mapping[str, Length]
    sizes: Blockwise

    def __call__(self, asked: AttentionCall) -> Tensor:
        kind = self.plan.attends.get(asked.name)
        if kind is None:
            return attend_to(asked, self.sizes)
        length = length_of(asked.name, self.lengths)
        assert length is not None, asked.name
        _check(asked, kind, length)
        return attend_to_all(asked, length, kind, self.sizes)


def _check(asked: AttentionCall, kind: str, length: Length) -> None:
    found = kind_of(asked, length)
    if found is None or (kind == DEALT and found != DEALT):
        raise WrapError(
            f"attention of {asked.name} has {asked.query.shape[2]} queries and {asked.key.shape[2]} keys here, of a "
            f"sequence of {length.full}, and its keys were {kind} with the example; pass an example= like the batches "
            "to come"
        )
