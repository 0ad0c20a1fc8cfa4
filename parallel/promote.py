"""Float64 all the way: casts to narrower floats inside a model are promoted while parity is measured.

Many models compute norms, rotary angles and losses in float32 on purpose. In float64 such a cast would round two equal
computations differently, and the noise (1e-7) would hide real faults; so it is lifted on both sides alike.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Promote"]

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = {Tensor.float: Tensor.double, Tensor.half: Tensor.double, Tensor.bfloat16: Tensor.double}


class Promote(TorchFunctionMode):
    """A context in which every cast to a narrower float gives float64.

    >>> with Promote():
    ...     torch.ones(2, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __init__(self) -> None:
        super().__init__()
        self._default = torch.get_default_dtype()

    def __enter__(self) -> "Promote":
        """Starts promoting; new tensors are float64 too."""
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        """Ends promoting."""
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Passes calls on with wider dtypes."""
        wide = tuple(_wide(arg) for arg in args)
        return _CASTS.get(func, func)(*wide, **{name: _wide(arg) for name, arg in (kwargs or {}).items()})


def _wide(arg: Any) -> Any:
    return torch.float64 if isinstance(arg, torch.dtype) and arg in _NARROW else arg
