"""How evenly dealt experts are loaded while a job trains: numbers for its metrics, and a picture at the end."""

from pathlib import Path
from typing import Any

from meshwright.moe.errors import MetricsError
from meshwright.moe.heat_map import draw_heat_map
from meshwright.moe.metrics import RoutingCounts
from meshwright.moe.swap import take_counts
from meshwright.parallel.collectives import sum_integers
from meshwright.parallel.errors import MeshwrightError
from meshwright.parallel.wrap import ParallelModel

__all__ = ["ExpertLoads"]


class ExpertLoads:
    """Counts of all layers since the run began, and since the last log.

    Args:
        model: whose experts are dealt; with another one there is nothing to tell.
    """

    def __init__(self, model: ParallelModel) -> None:
        self._model = model
        self._whole: dict[str, RoutingCounts] = {}

    def read(self) -> dict[str, Any]:
        """Numbers since the last call, of the worst layer where they are of layers; every rank must ask."""
        if self._model.mesh.ep == 1:
            return {}
        found = take_counts(self._model.module, sum_integers)
        self._whole = {path: each + self._whole[path] if self._whole else each for path, each in found.items()}
        loads = [each.load(num_nodes=self._model.mesh.ep_node) for each in found.values()]
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
