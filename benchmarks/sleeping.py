"""A model whose blocks take time and nothing else; imported on the ranks, since autograd functions are not pickled."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable

__all__ = ["BACKWARD_S", "FORWARD_S", "SPANS", "WIDTH", "Sleeping"]

FORWARD_S = 0.080
BACKWARD_S = 0.160
WIDTH = 4
SPANS: list[tuple[float, float]] = []
"""Start and end of every sleep of this rank, by a clock that all processes of the machine share."""


class _Slept(Function):
    """Half of backward's time is on the way to the input."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        del ctx
        _sleep(FORWARD_S)
        return inputs[0] * 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        _sleep(BACKWARD_S / 2)
        return gradients[0]


class _Weighed(Function):
    """The other half is on the way to the weight, so that schedules can do one without the other."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        del ctx
        return inputs[0] * 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        _sleep(BACKWARD_S / 2)
        return gradients[0]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, values: Tensor) -> Tensor:
        slept: Tensor = _Slept.apply(values)  # type: ignore[no-untyped-call]
        weighed: Tensor = _Weighed.apply(self.scale)  # type: ignore[no-untyped-call]
        return slept + weighed


class Sleeping(nn.Module):
    """Blocks that take time and nothing else."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(_Block() for _ in range(blocks))

    def forward(self, values: Tensor) -> Tensor:
        """A sum (0-dim)."""
        values = values * self.start  # the first block goes back too, as behind an embedding
        for layer in self.layers:
            values = layer(values)
        return values.sum()


def _sleep(duration_s: float) -> None:
    """Sleeps to the end and not past it: the last half millisecond is waited for awake."""
    start_s = time.monotonic()
    time.sleep(max(0.0, duration_s - 5e-4))
    while time.monotonic() < start_s + duration_s:
        pass
    SPANS.append((start_s, time.monotonic()))
