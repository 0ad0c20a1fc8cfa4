"""Speed of a training run: step time, tokens per second, memory, and model-FLOP utilisation."""

import time

import torch
from torch import Tensor, nn

from meshwright.launch.worker.flops import FlopCount, count_flops, measure_peak_flops_per_s
from meshwright.launch.worker.metrics import peak_memory_bytes, utilisation
from meshwright.parallel.deferred import on_shapes
from meshwright.parallel.microbatch import call, to_device
from meshwright.parallel.randomness import keyed

__all__ = ["Meter"]


class Meter:
    """Times steps between two readings; validation and saving do not count.

    Args:
        device: of this rank.
        dtype: what matmuls compute in.
        num_ranks: whose speeds add up.

    Attributes:
        tokens: of all ranks since the first step; a resumed run says how many came before.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, num_ranks: int) -> None:
        self.tokens = 0
        self._device = device
        self._dtype = dtype
        self._num_ranks = num_ranks
        self._since_s = time.perf_counter()
        self._spent_s = 0.0
        self._steps = 0
        self._tokens = 0
        self._places = 0
        self._per_token: FlopCount | None = None
        self._peak_flops_per_s = 0.0

    @property
    def needs_peak(self) -> bool:
        """Whether it is still unknown what this device can do."""
        return not self._peak_flops_per_s

    def tick(self, tokens: int, places: int) -> None:
        """Ends a step of so many tokens on all ranks, and so many places with their padding."""
        now_s = time.perf_counter()
        self._spent_s += now_s - self._since_s
        self._since_s = now_s
        self._steps += 1
        self.tokens += tokens
        self._tokens += tokens
        self._places += places

    def pause(self) -> None:
        """Forgets the time since the last step."""
        self._since_s = time.perf_counter()

    def count(self, module: nn.Module, batch: dict[str, Tensor]) -> None:
        """Counts one forward pass of the whole model, before it is wrapped: a rank of `tp` runs only a part of it."""

        def run(device: torch.device) -> FlopCount:
            before = [buffer.clone() for buffer in module.buffers()]
            with count_flops() as counted:
                call(module, to_device(batch, device))
            for buffer, value in zip(module.buffers(), before, strict=True):  # running statistics saw no training step
                buffer.copy_(value)
            return counted()

        with torch.no_grad(), keyed(0, "flops"):
            self._per_token = on_shapes(module, run).per_token(batch["input_ids"].numel())

    def measure_peak(self) -> None:
        """Measures this device; every rank must ask."""
        self._peak_flops_per_s = measure_peak_flops_per_s(self._device, self._dtype) * self._num_ranks
        self.pause()

    def read(self) -> dict[str, float | int]:
        """Figures of the steps since the last reading; utilisation under both conventions (see `flops`)."""
        steps = max(1, self._steps)
        step_s, tokens_per_step = self._spent_s / steps, self._tokens / steps
        padding_ratio = 1.0 - self._tokens / self._places if self._places else 0.0
        self._spent_s, self._steps, self._tokens, self._places = 0.0, 0, 0, 0
        tokens_per_s = tokens_per_step / step_s if step_s else 0.0
        assert self._per_token is not None, "count first"
        peak = self._peak_flops_per_s
        return {
            "tokens_per_s": round(tokens_per_s, 1),
            "step_s": round(step_s, 6),
            "tokens_per_step": round(tokens_per_step, 1),
            "padding_ratio": round(padding_ratio, 4),
            "peak_memory_bytes": peak_memory_bytes(self._device),
            "mfu_full": round(utilisation(self._per_token.full, tokens_per_s, peak), 4),
            "mfu_causal": round(utilisation(self._per_token.causal, tokens_per_s, peak), 4),
        }
