"""What a CPU takes for one element of operations that cost more than their bytes, and what bytes alone cost it.

Tensors of a training come and go: operands were written long ago, results are memory that something else used last.
So operands are taken in turns here, of more of them than caches hold, and results are kept for as long.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["in_turns", "measured_functions", "streamed", "streamed_s"]

_ROWS, _WIDTH = 512, 256
_TURNED_BYTES = 48e6  # more than a processor's share of the last cache
_ELEMENT_BYTES = 4
Timed = Callable[..., float]
Made = TypeVar("Made")


def in_turns(make: Callable[[], Made], num_bytes: float) -> Iterator[Made]:
    """One after the other of as many operands as caches do not hold, again and again.

    Args:
        make: one of them.
        num_bytes: of one.
    """
    return cycle([make() for _ in range(max(1, round(_TURNED_BYTES / num_bytes)))])


def streamed_s(size: int, timed: Timed) -> float:
    """Seconds of one product of two vectors, element by element.

    Args:
        size: elements of each.
        timed: seconds of a call.
    """
    import torch

    num_bytes = 2 * _ELEMENT_BYTES * size
    given = in_turns(lambda: (torch.randn(size), torch.randn(size)), num_bytes)
    kept = deque["Tensor"](maxlen=max(1, round(_TURNED_BYTES / num_bytes / 2)))

    def once() -> None:
        one, other = next(given)
        kept.append(one * other)

    return timed(once)


def streamed(timed: Timed) -> list[list[float]]:
    """Bytes that pass by, and the seconds of it, of several sizes."""
    sizes = [2**power for power in (14, 16, 17, 18, 19)]
    return [[3.0 * _ELEMENT_BYTES * size, streamed_s(size, timed)] for size in sizes]


def measured_functions(timed: Timed) -> dict[str, list[float]]:
    """Name of `parallel.work.FUNCTIONS` -> bytes read and written for an element, and seconds of it.

    Args:
        timed: seconds of a call.
    """
    import torch

    torch.manual_seed(0)
    rows, other = torch.randn(_ROWS, _WIDTH), torch.randn(_ROWS, _WIDTH)
    found = {}
    for name, (operands, call) in _calls(rows, other).items():
        found[name] = [_ELEMENT_BYTES * (operands + 1.0), timed(call) / rows.numel()]
    return found


def _calls(rows: "Tensor", other: "Tensor") -> Mapping[str, tuple[float, Callable[[], Any]]]:
    """Name -> operands of its size, and a call."""
    import torch

    aten, width, dtype = torch.ops.aten, [_WIDTH], rows.dtype
    scale, made = torch.ones(_WIDTH), torch.softmax(rows, -1)
    _, mean, rstd = aten.native_layer_norm(rows, width, scale, scale, 1e-5)
    picked, kept = torch.randperm(_ROWS), torch.ones(_ROWS, _WIDTH, dtype=torch.bool).tril()
    normed = (width, mean, rstd, scale, scale, [True, True, True])
    return {
        "exp": (1, lambda: aten.exp(rows)),
        "tanh": (1, lambda: aten.tanh(rows)),
        "sigmoid": (1, lambda: aten.sigmoid(rows)),
        "gelu": (1, lambda: aten.gelu(rows)),
        "gelu_tanh": (1, lambda: aten.gelu(rows, approximate="tanh")),
        "gelu_backward": (2, lambda: aten.gelu_backward(other, rows)),
        "gelu_backward_tanh": (2, lambda: aten.gelu_backward(other, rows, approximate="tanh")),
        "silu": (1, lambda: aten.silu(rows)),
        "silu_backward": (2, lambda: aten.silu_backward(other, rows)),
        "_softmax": (1, lambda: aten._softmax(rows, -1, False)),
        "_softmax_backward_data": (2, lambda: aten._softmax_backward_data(other, made, -1, dtype)),
        "_safe_softmax": (1, lambda: aten._safe_softmax(rows, -1)),
        "_log_softmax": (1, lambda: aten._log_softmax(rows, -1, False)),
        "_log_softmax_backward_data": (2, lambda: aten._log_softmax_backward_data(other, made, -1, dtype)),
        "native_layer_norm": (1, lambda: aten.native_layer_norm(rows, width, scale, scale, 1e-5)),
        "native_layer_norm_backward": (2, lambda: aten.native_layer_norm_backward(other, rows, *normed)),
        "index": (1, lambda: aten.index(rows, [picked])),
        "index_put": (2, lambda: aten.index_put(rows, [picked], other)),
        "where": (2.25, lambda: aten.where(kept, rows, other)),
    }
