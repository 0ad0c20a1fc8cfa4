"""What an all-to-all costs on a link: a start, something for each message, and its bytes.

    T = latency_s + messages * message_s / nics + bytes / (rate * share)

A latency-bandwidth model has no middle term, and then many small messages cost what few large ones do. Measured
all-to-alls do not: on a lossy network that many senders share, each message to another node keeps a NIC busy besides
its bytes (the gap of LogGP, Alexandrov et al. 1995; incast at the receiver lengthens it). The numbers stand in
`catalog/exchanges.yaml`, which says from what curves and with what error they were fitted.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from meshwright.parallel.errors import nearest

__all__ = ["FILE", "Fabric", "fabric"]

FILE = Path(__file__).parents[1] / "catalog" / "exchanges.yaml"


@dataclass(frozen=True, kw_only=True)
class Fabric:
    """One kind of link, as all-to-alls see it.

    Args:
        name: in the catalog.
        share: of the promised rate that large all-to-alls reach.
        latency_s: until anything has moved.
        message_s: that a message keeps one NIC busy besides its bytes.
        source: of the curves it was fitted to.
        mean_error_percent: of that fit.

    >>> fabric("efa").took_s(120, 25e6, rate_bytes_per_s=50e9, nics=4) > fabric("efa").took_s(15, 25e6,
    ...     rate_bytes_per_s=50e9, nics=4)
    True
    """

    name: str
    share: float
    latency_s: float
    message_s: float
    source: str
    mean_error_percent: float

    def took_s(self, messages: float, num_bytes: float, *, rate_bytes_per_s: float, nics: float = 1.0) -> float:
        """Seconds of a rank's part of an all-to-all; none without messages.

        Args:
            messages: that it sends over this link.
            num_bytes: in them.
            rate_bytes_per_s: promised to the rank, in one direction.
            nics: of the rank; half a one where two ranks share it.
        """
        if not messages:
            return 0.0
        return self.latency_s + messages * self.message_s / nics + num_bytes / (rate_bytes_per_s * self.share)

    def congested(self, times: float) -> "Fabric":
        """The same with that many times its cost of a message: 0 for a latency-bandwidth model."""
        return replace(self, message_s=self.message_s * times)


@cache
def fabric(name: str) -> Fabric:
    """A fabric of the catalog: "efa", "rdma", "nvlink".

    Raises:
        ValueError: for one that the catalog does not know; names the nearest.
    """
    import yaml

    told: dict[str, dict[str, Any]] = yaml.safe_load(FILE.read_text())
    if name not in told:
        raise ValueError(f"no fabric called {name!r} in the catalog; {nearest(name, tuple(told))}")
    return Fabric(name=name, **told[name])
