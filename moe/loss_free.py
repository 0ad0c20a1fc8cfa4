"""Balance without a loss: a bias on what experts are ranked by (Wang et al., arXiv 2408.15664; DeepSeek-V3).

After each global batch   bias_e += rate sign(mean(counts) - counts_e)

The sign is taken of integers. In bfloat16 counts above 256 are rounded, and the sign of a close one flips; a bias of a
few tenths does not even see a step of 0.001.
"""

from typing import Any

import torch
from torch import Tensor, nn

from meshwright.moe.balance import Total
from meshwright.moe.errors import BalanceError
from meshwright.moe.routing import Routing
from meshwright.parallel.recompute import is_uncounted

__all__ = ["LoadBias", "next_bias"]


def next_bias(bias: Tensor, counts: Tensor, *, rate: float = 1e-3, centred: bool = False) -> Tensor:
    """The bias for the next global batch.

    Args:
        bias: [num_experts], float32 or wider.
        counts: int64 [num_experts], choices of each expert in the global batch: of all micro-batches and all ranks that
            share it.
        rate: step of the bias.
        centred: subtract the mean of the steps, so that the sum of the bias stays.

    Raises:
        BalanceError: for a narrower bias, counts that are not integers, or shapes that differ.

    >>> next_bias(torch.zeros(4), torch.tensor([4, 5, 4, 3]), rate=0.5).tolist()
    [0.0, -0.5, 0.0, 0.5]
    """
    if torch.promote_types(bias.dtype, torch.float32) != bias.dtype:
        raise BalanceError(f"a bias in {bias.dtype} loses steps of {rate} to rounding; keep it in float32")
    if counts.dtype != torch.int64 or counts.shape != bias.shape or counts.dim() != 1:
        raise BalanceError(
            f"counts are {counts.dtype} {list(counts.shape)}; for a bias {list(bias.shape)} they are int64, one for "
            "each expert"
        )
    step = rate * (counts.sum() - counts * len(counts)).sign().to(bias.dtype)
    return bias.detach() + (step - step.mean() if centred else step)


class LoadBias(nn.Module):
    """A bias, as a buffer that is saved with the model, and what was counted since it moved.

    Casting the model to a narrower dtype leaves the bias in float32.

    Args:
        num_experts: of all ranks.
        rate: step of the bias.
        centred: keep its sum.

    >>> from meshwright.moe.top_k import TopK
    >>> load = LoadBias(2, rate=0.5)
    >>> load.count(TopK(num_experts=2, k=1).route(torch.tensor([[1.0, 0.0]]), bias=load.bias))
    >>> load.step()
    >>> load.bias.tolist(), load.counts.tolist()
    ([-0.5, 0.5], [0, 0])
    """

    bias: Tensor

    def __init__(self, num_experts: int, *, rate: float = 1e-3, centred: bool = False) -> None:
        super().__init__()
        self.rate, self.centred = rate, centred
        # no buffer: those of a forward that may be run again must not change
        self._counted: Tensor | None = None
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    @property
    def counts(self) -> Tensor:
        """int64 [num_experts]: choices of each expert since the last step."""
        return torch.zeros_like(self.bias, dtype=torch.int64) if self._counted is None else self._counted

    def count(self, routing: Routing) -> None:
        """Adds what a micro-batch asked for; call it once for each, in forward.

        Counts nothing in evaluation, nor in a forward that is run again.
        """
        if self.training and not is_uncounted():
            self._counted = self.counts + routing.counts().sum(0)

    def step(self, total: Total | None = None) -> None:
        """Moves the bias; call it once for each global batch.

        Args:
            total: adds an int64 vector over the ranks that share the batch; this rank is alone where None.
        """
        counts = self.counts if total is None else total(self.counts)
        self.bias.copy_(next_bias(self.bias, counts, rate=self.rate, centred=self.centred))
        self._counted = None

    def _apply(self, fn: Any, recurse: bool = True) -> "LoadBias":
        before = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.promote_types(self.bias.dtype, torch.float32) != self.bias.dtype:
            self.bias = before.to(self.bias.device)  # not back from the narrow one, whose digits are gone
        return self
