"""Parameters that a plan uses in two ways at once."""

from collections.abc import Sequence

from torch import nn

from meshwright.parallel.errors import WrapError
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["refuse_mixed"]


def refuse_mixed(model: nn.Module, plan: TensorPlan, units: Sequence[str], *, axis: str) -> None:
    """Refuses a parameter whose gradient is a part on every rank in one unit and whole elsewhere.

    One sum over ranks fits either, not both at once.

    Args:
        model: unwrapped.
        plan: with its partial parameters.
        units: paths of what was proved; what stands around them is alike on every rank.
        axis: in words.

    Raises:
        WrapError: naming the places of the parameter.
    """
    partial: dict[int, dict[str, bool]] = {}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((path for path in units if name.startswith(f"{path}.")), "")
        mine = partial.setdefault(id(parameter), {})
        mine[unit] = mine.get(unit, False) or name in plan.partial
        names.setdefault(id(parameter), []).append(name)
    for key, mine in partial.items():
        if len(set(mine.values())) > 1:
            raise WrapError(
                f"mesh axis {axis}: {' and '.join(names[key])} are one parameter, of which a rank does its part of the "
                "work in one place and all of it in another; untie them, or deal the batch over dp"
            )
