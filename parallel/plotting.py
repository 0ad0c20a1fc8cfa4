"""Pictures need matplotlib, which is an extra: imported when one is drawn."""

from pathlib import Path
from typing import Any

from meshwright.parallel.errors import PlotError

__all__ = ["pyplot_for"]


def pyplot_for(path: Path) -> Any:
    """`matplotlib.pyplot`, drawing into files.

    Args:
        path: of the picture that is wanted, for messages.

    Raises:
        PlotError: where matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlotError(
            f"{path} cannot be drawn, since matplotlib is not installed; pip install 'meshwright[plots]'"
        ) from error
    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot
