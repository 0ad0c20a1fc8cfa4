"""What an all-to-all costs on a link: a start, messages, bytes."""

import pytest

from benchmarks.fit_exchanges import FABRICS, fit, points
from meshwright.clusters.simulated.congestion import fabric


@pytest.mark.parametrize("name", FABRICS)
def test_the_catalog_is_what_the_curves_say(name: str) -> None:
    told, found = fit(FABRICS[name]), fabric(name)
    for key, value in told.items():
        assert getattr(found, key) == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), key
    assert found.mean_error_percent < 10
    assert len(points(FABRICS[name])) >= 30


def test_a_lossy_network_charges_messages_many_times_what_a_lossless_one_does() -> None:
    assert fabric("efa").message_s > 10 * fabric("rdma").message_s


def test_messages_may_be_priced_at_nothing_or_at_more() -> None:
    efa = fabric("efa")

    def took_s(times: float, messages: int) -> float:
        return efa.congested(times).took_s(messages, 1e6, rate_bytes_per_s=50e9, nics=4)

    assert took_s(0, 100) == took_s(0, 1)
    assert took_s(1, 100) - took_s(1, 1) == pytest.approx(99 * efa.message_s / 4)
    assert took_s(2, 100) - took_s(1, 100) == pytest.approx(100 * efa.message_s / 4)


def test_nothing_sent_takes_no_time() -> None:
    assert fabric("rdma").took_s(0, 0.0, rate_bytes_per_s=1e9) == 0


def test_half_a_nic_sends_half_as_many_messages() -> None:
    with_one, with_half = (fabric("efa").took_s(10, 0.0, rate_bytes_per_s=1e9, nics=each) for each in (1, 0.5))
    assert with_half - with_one == pytest.approx(10 * fabric("efa").message_s)


def test_an_unknown_fabric_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"no fabric called 'nvlnk' in the catalog.*nvlink"):
        fabric("nvlnk")
