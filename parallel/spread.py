"""How states are spread besides the data axes: over `tp`, `cp`, `ep` and `pp`."""

from dataclasses import dataclass

from torch import Tensor, nn

from meshwright.parallel.collectives import Groups
from meshwright.parallel.dealt import DealtStates
from meshwright.parallel.experts import ExpertStates
from meshwright.parallel.options import Options
from meshwright.parallel.plan import Plans
from meshwright.parallel.shared import SharedGradients
from meshwright.parallel.staged import StagedStates
from meshwright.parallel.stages import Stages, stages_of
from meshwright.parallel.weights import NamedStates

__all__ = ["Spread", "spread_over"]


@dataclass(frozen=True, eq=False)
class Spread:
    """How states are spread besides the data axes.

    Args:
        dealt: over `tp`.
        context: over `cp`: gradients that are partial on each rank.
        staged: over `pp`.
        stages: what `staged` follows.
        experts: over `ep`.
    """

    dealt: DealtStates
    context: SharedGradients
    staged: StagedStates
    stages: Stages
    experts: ExpertStates

    def is_dealt(self, name: str) -> bool:
        """Whether ranks of a stage hold different parts of a parameter or buffer, besides shards."""
        return self.dealt.is_dealt(name) or self.experts.is_dealt(name)

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The full tensor behind this rank's part; every rank that holds one must ask."""
        return self.experts.whole(name, self.dealt.whole(name, tensor))

    def part(self, name: str, parameter: Tensor, values: Tensor) -> Tensor:
        """How this rank's values of a parameter are written to a checkpoint; see `DealtStates.part`."""
        for states in (self.dealt, self.experts):
            if states.is_dealt(name):
                return states.part(name, parameter, values)
        return values


def spread_over(
    module: nn.Module, groups: Groups, options: Options, *, plans: Plans, names: NamedStates | None = None
) -> Spread:
    """Cuts a model, dealt over `tp`, `cp` and `ep` already, into stages and keeps those of this rank.

    Args:
        module: changed in place.
        groups: of the mesh.
        options: of the wrap.
        plans: by which it was dealt.
        names: of the whole model's states, where experts were dealt.
    """
    stages = stages_of(module, groups.mesh, groups.rank, options)
    experts = ExpertStates(plans.experts, groups)
    of_cp = () if plans.context is None else plans.context.partial
    return Spread(
        DealtStates(plans.tensor, groups),
        SharedGradients([name for name in of_cp if not experts.holds(name)], groups, "cp"),
        StagedStates(module, stages.homes, groups, names=names or NamedStates.of(module)),
        stages,
        experts,
    )
