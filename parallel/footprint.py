"""Peak memory of a step before it is run: the step itself, on tensors without values, with live storages counted."""

import gc
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from meshwright.parallel.data import build_data_engine
from meshwright.parallel.deferred import device_of
from meshwright.parallel.engine import Engine
from meshwright.parallel.errors import WrapError
from meshwright.parallel.mesh import Mesh
from meshwright.parallel.meta import MetaAnswers, without_values
from meshwright.parallel.options import Options
from meshwright.parallel.paper import PaperGroups
from meshwright.parallel.plan import Plans, deal_model
from meshwright.parallel.spread import spread_over
from meshwright.parallel.tensor_plan import TensorPlan

__all__ = ["Footprint", "Live", "footprint"]


@dataclass(frozen=True)
class Footprint:
    """Memory of the first rank, in bytes.

    Attributes:
        states_bytes: parameters, buffers and the data engine's own, held between steps.
        peak_bytes: the most that is alive at once in a step, states and gradients included, optimizer states not.
    """

    states_bytes: int
    peak_bytes: int


def footprint(model: nn.Module, mesh: Mesh, options: Options, plan: TensorPlan) -> Footprint:
    """Predicts the memory of a step on micro-batches like `options.example`; the model is not changed.

    What kernels use inside one call is not seen, nor what the allocator wastes.

    Raises:
        WrapError: where it cannot be told, with the reason.
    """
    if options.example is None:
        raise WrapError("no example was given")
    if mesh.cp > 1:
        raise WrapError("the memory of a dealt sequence is not known")
    if mesh.fsdp > 1 or mesh.pp > 1 or options.data_engine != "torch":
        raise WrapError("the memory of sharded states is not known before they are sharded")
    groups: Any = PaperGroups(mesh, device_of(model).type)
    counted = replace(options, loss="sum", loss_items=None)  # counting items would ask for values
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fakes, MetaAnswers(), Live() as live:
            mine = without_values(model, groups.device_type)
            example = tree_map(lambda leaf: _faked(leaf, fakes, groups.device_type), options.example)
            deal_model(mine, plan, groups.axis("tp"))
            spread = spread_over(mine, groups, options, plans=Plans(tensor=plan))
            engine = Engine(build_data_engine(mine, groups, options, spread), groups, counted, spread.stages)
            gc.collect()  # shares were taken from whole parameters, which hooks may hold in cycles
            live.peak_bytes = states_bytes = live.now_bytes
            engine.accumulate([example] * options.num_microbatches)
    except RuntimeError as error:
        raise WrapError(f"a step asks for values: {str(error).splitlines()[0]}") from error
    return Footprint(states_bytes, live.peak_bytes)


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = 0
        self.peak_bytes = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes what it made."""
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # which are asked for shapes, and take nothing
                self.note(leaf.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage until it is gone."""
        key, size_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now_bytes -= size_bytes

        self._known[key] = ref(storage, gone)
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)


def _faked(leaf: Any, fakes: FakeTensorMode, device_type: str) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    fake: Tensor = fakes.from_tensor(leaf)
    return fake.to(device_type)
