"""States of the random number generators of one rank, as plain values for a checkpoint."""

import random
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["capture_random_states", "restore_random_states"]


def capture_random_states() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators (CPU and the current GPU), as JSON values."""
    import numpy as np

    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = _text(torch.cuda.get_rng_state())
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Puts back what `capture_random_states` returned.

    >>> before = capture_random_states()
    >>> first = torch.rand(1)
    >>> restore_random_states(before)
    >>> torch.equal(first, torch.rand(1))
    True
    """
    import numpy as np

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_tensor(states["torch"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(states["cuda"]))


def _text(state: Tensor) -> str:
    return b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(b64decode(text)), dtype=torch.uint8)
