"""How evenly experts are loaded while a job trains: numbers, a picture at the end, and biases that even it out."""

from pathlib import Path
from typing import Any

from torch import nn

from meshwright.launch.worker.errors import ModelBuildError
from meshwright.moe.counting import count_experts, move_biases, take_counts
from meshwright.moe.errors import BalanceError, MetricsError, SwapError
from meshwright.moe.heat_map import draw_heat_map
from meshwright.moe.metrics import RoutingCounts
from meshwright.parallel.collectives import sum_integers
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.wrap import ParallelModel

__all__ = ["ExpertLoads", "count_job"]


def count_job(module: nn.Module, *, balanced: bool) -> None:
    """Lets experts be counted, if there are any; before they are dealt.

    Args:
        module: of a job.
        balanced: whether they are to be balanced by biases.

    Raises:
        ModelBuildError: for a model that has nothing to balance.
    """
    try:
        count_experts(module, balanced=balanced)
    except (SwapError, BalanceError) as error:
        if balanced:
            raise ModelBuildError(f"train.balance_rate: {error}") from error


class ExpertLoads:
    """Counts of all layers since the run began, and since the last log; moves biases by those of each step.

    Args:
        model: whose experts are counted; with another one there is nothing to tell.
        balance_rate: step of the biases; None leaves them alone.
    """

    def __init__(self, model: ParallelModel, *, balance_rate: float | None = None) -> None:
        self._model = model
        self._rate = balance_rate
        self._mine = model.mesh.coordinates(model.rank)["tp"] == 0
        self._whole: dict[str, RoutingCounts] = {}
        self._since: dict[str, RoutingCounts] = {}

    def balance(self) -> None:
        """Once for each global batch; every rank must ask."""
        if self._rate is not None:
            move_biases(self._model.module, self._take(), rate=self._rate)

    def read(self) -> dict[str, Any]:
        """Numbers since the last call, of the worst layer where they are of layers; every rank must ask."""
        self._take()
        found, self._since = self._since, {}
        self._whole = _added(self._whole, found)
        loads = [each.load(num_nodes=self._model.mesh.ep_node) for each in found.values()]
        if not loads:
            return {}
        return {
            "experts": {
                "worst_expert_ratio": max(load.worst_ratio for load in loads),
                "worst_node_ratio": max(load.worst_node_ratio for load in loads),
                "dead_experts": sum(len(load.dead) for load in loads),
                "unserved_token_share": max(each.drops().unserved_share for each in found.values()),
            }
        }

    def draw(self, path: Path) -> str | None:
        """Draws the load of all experts; says where it lies, or why it does not."""
        if not self._whole:
            return None
        try:
            num_nodes = self._model.mesh.ep_node
            draw_heat_map({name: each.load(num_nodes=num_nodes) for name, each in self._whole.items()}, path)
        except (MetricsError, MeshwrightError) as error:
            return f"no {path.name}: {error}"
        return f"load of experts: {path}"

    def _take(self) -> dict[str, RoutingCounts]:
        found = take_counts(self._model.module, sum_integers, mine=self._mine)
        self._since = _added(self._since, found)
        return found


def _added(one: dict[str, RoutingCounts], other: dict[str, RoutingCounts]) -> dict[str, RoutingCounts]:
    return {path: each + one[path] if one else each for path, each in other.items()}
