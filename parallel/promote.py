"""Float64 all the way: casts to narrower floats inside a model are promoted while parity is measured.

Many models compute norms, rotary angles and losses in float32 on purpose. In float64 such a cast would round two equal
computations differently, and the noise (1e-7) would hide real faults; so it is lifted on both sides alike. The product
of groups, which torch has for narrow floats only, is made of single products.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from threading import Lock, local
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["Promote"]

_AUTOGRAD: Any = torch.autograd
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Promote(TorchFunctionMode):
    """A context in which every cast to a narrower float gives float64, in what backward runs again, too.

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
        _ENGINE.enter()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        """Ends promoting."""
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        _ENGINE.leave()
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Passes calls on with wider dtypes."""
        wide = tuple(_wide(arg) for arg in args)
        return _INSTEAD.get(func, func)(*wide, **{name: _wide(arg) for name, arg in (kwargs or {}).items()})


class _InBackward(Promote):
    """The same inside of another one."""

    def __enter__(self) -> "_InBackward":
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *args: Any) -> None:
        TorchFunctionMode.__exit__(self, *args)


class _Engine:
    """Torch takes a mode off while it passes a call on, and backward is such a call: a checkpoint would not see it.

    So backward puts it on again, in threads that promote, as long as there are any.
    """

    def __init__(self) -> None:
        self._lock, self._here = Lock(), local()
        self._number = 0
        self._run: Callable[..., Any] = _AUTOGRAD._engine_run_backward

    def enter(self) -> None:
        """This thread promotes from here on."""
        self._here.depth = getattr(self._here, "depth", 0) + 1
        with self._lock:
            self._number += 1
            if self._number == 1:
                self._run, _AUTOGRAD._engine_run_backward = _AUTOGRAD._engine_run_backward, self._promoted

    def leave(self) -> None:
        """Ends what `enter` began."""
        self._here.depth -= 1
        with self._lock:
            self._number -= 1
            if not self._number:
                _AUTOGRAD._engine_run_backward = self._run

    def _promoted(self, *args: Any, **kwargs: Any) -> Any:
        with _InBackward() if getattr(self._here, "depth", 0) else nullcontext():
            return self._run(*args, **kwargs)


_ENGINE = _Engine()


def _wide(arg: Any) -> Any:
    return torch.float64 if isinstance(arg, torch.dtype) and arg in _NARROW else arg


def _grouped(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`torch.nn.functional.grouped_mm`, one group after the other; rows behind the last group are zeros."""
    assert bias is None, "torch itself takes none yet"
    made = a @ b if offs is None else _looped(a, b, [end - start for start, end in pairwise([0, *offs.tolist()])])
    return made if out_dtype is None else made.to(out_dtype)


def _looped(a: Tensor, b: Tensor, sizes: list[int]) -> Tensor:
    if a.dim() == 3:
        return _looped(b.mT, a.mT, sizes).mT
    if b.dim() == 2:
        return torch.stack([one @ other for one, other in zip(_parts(a, sizes, 1), _parts(b, sizes, 0), strict=True)])
    made = torch.cat([rows @ matrix for rows, matrix in zip(_parts(a, sizes, 0), b, strict=True)])
    return functional.pad(made, (0, 0, 0, len(a) - len(made)))


def _parts(tensor: Tensor, sizes: list[int], dim: int) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = tensor.narrow(dim, 0, sum(sizes)).split(sizes, dim)
    return parts


_INSTEAD: dict[Any, Callable[..., Any]] = {
    Tensor.float: Tensor.double,
    Tensor.half: Tensor.double,
    Tensor.bfloat16: Tensor.double,
    torch._grouped_mm: _grouped,
}
