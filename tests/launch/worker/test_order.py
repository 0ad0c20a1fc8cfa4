from hypothesis import given
from hypothesis import strategies as st

from meshwright.launch.worker.order import Permutation, batch_samples, share


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
