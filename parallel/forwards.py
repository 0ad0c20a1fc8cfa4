"""The model's own forward on micro-batches: a loss, a number of items, and random numbers of its own for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.data import DataEngine
from meshwright.parallel.loss import LossContract, as_items
from meshwright.parallel.microbatch import call, to_device
from meshwright.parallel.randomness import draw_from, keyed, seed_of

__all__ = ["Forwards", "Result"]

Result = tuple[Tensor, Tensor]
"""Loss and number of items, 0-dim."""


@dataclass(frozen=True, eq=False)
class Forwards:
    """Forward passes of one rank.

    Args:
        data: holds the model.
        contract: what its loss is.
        device: of its values.
        seed: of the run.
        first: number of this rank's first micro-batch among all of a step.

    >>> from types import SimpleNamespace
    >>> contract = LossContract("sample_mean")
    >>> data = SimpleNamespace(module=torch.nn.Flatten(0))
    >>> forwards = Forwards(data, contract, device=torch.device("cpu"), seed=0, first=0)
    >>> forwards.now(torch.ones(1, 1), step=0, index=0)
    (tensor(1.), tensor(1., dtype=torch.float64))
    """

    data: DataEngine
    contract: LossContract
    device: torch.device
    seed: int
    first: int

    def now(self, part: Any, *, step: int, index: int) -> Result:
        """Loss and items (0-dim) of the micro-batch `index` of a step; leaves the generators as they were."""
        with keyed(*self._key(step, index)):
            return self._run(part)

    def later(self, part: Any, *, step: int, index: int) -> Callable[[], Result]:
        """The same where whoever calls it puts the generators back; what needs no forward is done at once."""
        return self.of_step(step)(part, index)

    def of_step(self, step: int) -> Callable[[Any, int], Callable[[], Result]]:
        """What makes those of one step: micro-batch and its index -> `later`; they share tensors of equal numbers."""
        number = cache(partial(as_items, device=self.device))

        def later(part: Any, index: int) -> Callable[[], Result]:
            items = self.contract.of_size(part)
            seed = seed_of(*self._key(step, index))
            return partial(self._drawn, part, seed, None if items is None else number(items))

        return later

    def _drawn(self, part: Any, seed: int, items: Tensor | None) -> Result:
        draw_from(seed)
        return self._run(part, items)

    def _run(self, part: Any, items: Tensor | None = None) -> Result:
        moved = to_device(part, self.device)
        return self.contract.run(lambda: call(self.data.module, moved), moved, items=items)

    def _key(self, step: int, index: int) -> tuple[int | str, ...]:
        return self.seed, "step", step, "microbatch", self.first + index
