"""What a step takes from the memory allocator of the process, counted at every operation.

The records of torch's profiler miss what other threads give back (gloo's hold on to tensors), so glibc is asked.
"""

import ctypes
import gc
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["measured_peak_bytes"]


_FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _Mallinfo2(ctypes.Structure):
    """`struct mallinfo2` of glibc: all fields are size_t."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def _in_use_bytes(mallinfo2: Any) -> int:
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


class _Peak(TorchDispatchMode):
    def __init__(self, mallinfo2: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self._mallinfo2 = mallinfo2

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and looks how much is in use."""
        made = func(*args, **(kwargs or {}))
        self.bytes = max(self.bytes, _in_use_bytes(self._mallinfo2))
        return made


def measured_peak_bytes(module: nn.Module, step: Callable[[], Any]) -> int:
    """Peak of CPU memory in the second call of `step`, parameters, buffers and gradients of `module` included."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    with _Peak(mallinfo2):
        step()  # the first step makes what is kept: buckets, threads, caches of kernels
    gc.collect()
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    states = [*module.parameters(), *module.buffers(), *gradients]
    held_bytes = sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in states}.values())
    del gradients, states
    before_bytes = _in_use_bytes(mallinfo2)
    with _Peak(mallinfo2) as peak:
        step()
    return int(held_bytes + peak.bytes - before_bytes)
