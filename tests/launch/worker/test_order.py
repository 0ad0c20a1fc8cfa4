from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from meshwright.launch.worker.order import Permutation, SortedOrder, batch_samples, share


@given(st.integers(1, 300), st.integers(0, 5))
def test_a_permutation_holds_every_index_once(size: int, key: int) -> None:
    order = Permutation.of(size, key)
    assert sorted(order[index] for index in range(size)) == list(range(size))


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
def test_every_epoch_reads_every_sample_once_whatever_the_batch_size(samples: int, batch_size: int, seed: int) -> None:
    steps = -(-2 * samples // batch_size)
    read = [
        index for step in range(steps) for index in batch_samples(samples, seed=seed, step=step, batch_size=batch_size)
    ]
    assert sorted(read[:samples]) == sorted(read[samples : 2 * samples]) == list(range(samples))


def test_seeds_and_epochs_shuffle_differently() -> None:
    first = batch_samples(100, seed=0, step=0, batch_size=100)
    assert first != batch_samples(100, seed=1, step=0, batch_size=100)
    assert first != batch_samples(100, seed=0, step=1, batch_size=100)
    assert first == batch_samples(100, seed=0, step=0, batch_size=100)


@given(st.integers(0, 20), st.integers(1, 6))
def test_shares_are_parts_of_the_batch_in_order(size: int, parts: int) -> None:
    items = list(range(size))
    assert [item for part in range(parts) for item in share(items, part, parts)] == items


LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=40)
WINDOWS = st.none() | st.integers(1, 7)


@given(LENGTHS, st.integers(1, 9), WINDOWS, st.integers(0, 3), st.booleans())
@example([2, 2, 50], 1, 3, 0, True)  # half of the tokens in one sample
@example([2, 2, 2, 30, 30, 30], 1, 6, 0, True)
def test_windows_hold_the_samples_that_unsorted_batches_would(
    lengths: list[int], size: int, window: int | None, seed: int, by_tokens: bool
) -> None:
    order = SortedOrder(lengths, seed, size, window=window, by_tokens=by_tokens)
    epoch = -(-len(lengths) // size)
    together = epoch if window is None else min(window, epoch)
    for number in range(3):
        steps = range(number * together, (number + 1) * together)
        batches = [order.batch(step) for step in steps]
        unsorted = [
            each for step in steps for each in batch_samples(len(lengths), seed=seed, step=step, batch_size=size)
        ]
        assert sorted(each for batch in batches for each in batch) == sorted(unsorted)
        assert all(batches)
        assert by_tokens or {len(batch) for batch in batches} == {size}
        ranges = sorted([(lengths[batch[0]], lengths[batch[-1]]) for batch in batches])
        assert all(before[1] <= after[0] for before, after in pairwise(ranges)), "no overlap"
        assert all(sorted(batch, key=lengths.__getitem__) == batch for batch in batches)


@given(st.integers(1, 6), st.integers(1, 6), WINDOWS, st.integers(0, 3))
def test_an_epoch_of_whole_windows_reads_every_sample_once(
    batches: int, size: int, window: int | None, seed: int
) -> None:
    num_samples = batches * size * (window or 1)
    order = SortedOrder([2 + each % 5 for each in range(num_samples)], seed, size, window=window)
    for epoch in range(2):
        steps = range(epoch * num_samples // size, (epoch + 1) * num_samples // size)
        assert sorted(each for step in steps for each in order.batch(step)) == list(range(num_samples))


@given(LENGTHS, st.integers(1, 9), WINDOWS, st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_a_step_reads_the_same_whatever_was_read_before(
    lengths: list[int], size: int, window: int | None, steps: list[int]
) -> None:
    order = SortedOrder(lengths, 3, size, window=window)
    for step in steps:
        assert order.batch(step) == SortedOrder(lengths, 3, size, window=window).batch(step)


def test_the_order_of_a_windows_batches_is_shuffled_anew_in_each_window() -> None:
    order = SortedOrder([2 + each % 97 for each in range(640)], 0, 8, window=10)
    longest = [[order.batch(10 * number + place)[-1] % 97 for place in range(10)] for number in range(8)]
    ranks = {tuple(sorted(range(10), key=each.__getitem__)) for each in longest}
    assert len(ranks) == 8
    assert tuple(range(10)) not in ranks


def test_batches_of_tokens_hold_about_equally_many() -> None:
    lengths = [2 + (each * each) % 300 for each in range(960)]
    order = SortedOrder(lengths, 0, 16, window=20, by_tokens=True)
    found = [order.batch(step) for step in range(20)]
    tokens = [sum(lengths[each] for each in batch) for batch in found]
    assert max(tokens) - min(tokens) <= 2 * max(lengths)
    assert min(map(len, found)) < 16 < max(map(len, found))
