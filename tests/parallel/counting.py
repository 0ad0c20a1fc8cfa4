"""Counts operations of torch as they are started, by what a run on shapes counts them by."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from meshwright.parallel.operations import Tally

__all__ = ["Counting"]


class Counting(TorchDispatchMode):
    """Inside, every operation is counted in `tally`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tally = Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs and counts one."""
        made = func(*args, **(kwargs or {}))
        self.tally.note(func, args, kwargs or {}, made=made)
        return made
