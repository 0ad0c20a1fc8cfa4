"""Memory of a step before it is run: the step itself, on tensors without values, with live storages counted."""

from dataclasses import dataclass
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Footprint", "Live"]


@dataclass(frozen=True)
class Footprint:
    """Memory of one rank, in bytes.

    Attributes:
        states_bytes: parameters, buffers and the data engine's own, held between steps.
        peak_bytes: the most that is alive at once in a step, states and gradients included, optimizer states not.
    """

    states_bytes: int
    peak_bytes: int


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive; one that is resized, as FSDP2 does, counts as what it is now."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, tuple[Any, int]] = {}
        self._resize: Any = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        resize, live = self._resize, self

        def resized(storage: torch.UntypedStorage, size_bytes: int) -> Any:
            made = resize(storage, size_bytes)
            live.note(storage)
            return made

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes what it made."""
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked several times for each operation, and no other mode needs to know
        made = func(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor) and _takes_memory(leaf):
                self.note(leaf.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is gone."""
        key, size_bytes = storage._cdata, storage.nbytes()
        known, before_bytes = self._known.get(key, (None, 0))
        if known is not None and size_bytes == before_bytes:
            return

        def gone(_: Any) -> None:
            self.now_bytes -= self._known.pop(key)[1]

        self._known[key] = ref(storage, gone) if known is None else known, size_bytes
        self.now_bytes += size_bytes - before_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


def _takes_memory(tensor: Tensor) -> bool:
    """Not where a tensor is asked for its shape, or stands around others that are counted, as a DTensor does."""
    if isinstance(tensor, FakeTensor):
        return tensor.fake_device.type != "meta"  # asking for `device` would go through all modes
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.device.type != "meta"
