from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meshwright.parallel.errors import BatchError
from meshwright.parallel.microbatch import call, num_samples, share, split


@dataclass
class Pair:
    left: Tensor
    right: Tensor


@given(st.integers(1, 12), st.integers(1, 5))
def test_parts_hold_every_sample_once_and_in_order(samples: int, parts: int) -> None:
    batch = {
        "x": torch.arange(samples),
        "nested": [(torch.arange(samples) * 2,)],
        "scale": torch.tensor(3.0),
        "tag": "t",
    }
    if samples < parts:
        with pytest.raises(BatchError, match=f"{samples} samples cannot make {parts} micro-batches"):
            split(batch, parts)
        return
    cut = split(batch, parts)
    assert torch.cat([part["x"] for part in cut]).tolist() == list(range(samples))
    assert torch.cat([part["nested"][0][0] for part in cut]).tolist() == list(range(0, 2 * samples, 2))
    assert all(part["tag"] == "t" and float(part["scale"]) == 3.0 for part in cut)


def test_dataclasses_are_cut_too() -> None:
    part = share(Pair(torch.arange(4), torch.arange(4)), 1, 2)
    assert part.left.tolist() == [2, 3]


def test_a_list_of_batches_is_taken_as_cut() -> None:
    ready = [{"x": torch.zeros(1)}, {"x": torch.zeros(5)}]
    assert split(ready, 2) == ready
    with pytest.raises(BatchError, match="a list of 2 micro-batches was given for num_microbatches=3"):
        split(ready, 3)


def test_tensors_of_other_sizes_are_named() -> None:
    with pytest.raises(BatchError, match=r"batch\['x'\]: 2, batch\['y'\]: 3"):
        num_samples({"x": torch.zeros(2), "y": torch.zeros(3)})
    with pytest.raises(BatchError, match="holds no tensor"):
        num_samples({"tag": "t"})


def test_mappings_are_keywords_and_tuples_positions() -> None:
    assert call(lambda a, b: a - b, {"b": 1, "a": 3}) == 2
    assert call(lambda a, b: a - b, (3, 1)) == 2
    assert call(lambda a: a, 5) == 5


class Taker(torch.nn.Module):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale + ("a" if scale == 0 else 0)  # type: ignore[operator]


def test_a_batch_that_forward_does_not_take_is_named() -> None:
    with pytest.raises(BatchError, match=r"the batch holds y, scale, but forward of Taker takes x, scale"):
        call(Taker(), {"y": torch.ones(1), "scale": 2.0})
    with pytest.raises(BatchError, match=r"the batch holds 3 positional arguments"):
        call(Taker(), (torch.ones(1), 1.0, 2.0))
    with pytest.raises(TypeError, match="unsupported operand"):
        call(Taker(), {"x": torch.ones(1), "scale": 0})
