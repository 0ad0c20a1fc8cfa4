import torch

from meshwright.parallel.promote import Promote


def test_every_way_to_a_narrow_float_gives_float64() -> None:
    wide = torch.ones(2, 2, dtype=torch.float64)
    with Promote():
        results = [
            wide.float(),
            wide.half(),
            wide.bfloat16(),
            wide.to(torch.float32),
            wide.to(dtype=torch.bfloat16),
            wide.type(torch.float32),
            torch.softmax(wide, -1, dtype=torch.float32),
            torch.zeros(2),
            torch.arange(3, dtype=torch.float32),
            wide.sum(dtype=torch.float32),
        ]
    assert {each.dtype for each in results} == {torch.float64}


def test_integers_and_what_follows_are_left_alone() -> None:
    with Promote():
        assert torch.ones(2).to(torch.int64).dtype is torch.int64
    assert torch.zeros(1).dtype is torch.float32
