import torch

from meshwright.parallel.randomness import keyed


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
