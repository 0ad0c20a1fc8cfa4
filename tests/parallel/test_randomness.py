import torch
from torch import nn

from meshwright.parallel.randomness import draw_by_block, keyed, skip_block


def test_equal_keys_draw_equal_numbers_and_others_do_not() -> None:
    draws = []
    for key in [(0, "step", 1), (0, "step", 1), (0, "step", 2), (1, "step", 1)]:
        with keyed(*key):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_the_users_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with keyed(9):
        torch.rand(100)
    assert torch.equal(torch.rand(2), expected)


def test_what_follows_a_block_does_not_depend_on_what_the_block_drew() -> None:
    small, large = nn.Dropout(0.5), nn.Dropout(0.5)
    for block in (small, large):
        draw_by_block({"layers.0": block})
    followed = []
    for block, size in ((small, 1), (large, 999)):
        with keyed(0):
            block(torch.ones(size))
            followed.append(torch.rand(3))
    with keyed(0):
        skip_block("layers.0")
        followed.append(torch.rand(3))
    assert torch.equal(followed[0], followed[1])
    assert torch.equal(followed[0], followed[2])


def test_a_block_that_is_called_again_is_followed_by_other_numbers() -> None:
    with keyed(0):
        drawn = [torch.rand(1).item()]
        for _ in range(3):
            skip_block("layers.0")
            drawn.append(torch.rand(1).item())
        skip_block("layers.1")
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 5


def test_outside_of_keys_blocks_leave_the_users_generator_alone() -> None:
    block = nn.Dropout(0.5)
    draw_by_block({"layers.0": block})
    torch.manual_seed(3)
    nn.functional.dropout(torch.ones(9))
    expected = torch.rand(2)
    torch.manual_seed(3)
    block(torch.ones(9))
    skip_block("layers.1")
    assert torch.equal(torch.rand(2), expected)
