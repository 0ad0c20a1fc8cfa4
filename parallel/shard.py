"""The axis `fsdp`: parameters, gradients and optimizer states in shards (ZeRO, arXiv 1910.02054), on torch's FSDP2.

  stage   parameters between uses   gradients between micro-batches   gathers per step   reductions per step
  1       whole for the step        whole, reduced once               U                  U
  2       whole for the step        sharded                           U                  M U
  3       sharded                   sharded                           M (2U - 2)         M U

for U units (blocks, then the rest of the model as the root) and M micro-batches. The root and the last block
are kept whole between forward and backward, since backward asks for them at once.
With `dp` above one the shards are replicated along it (HSDP).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from meshwright.parallel.as_wrapped import HOOKED
from meshwright.parallel.blocks import own_blocks
from meshwright.parallel.collectives import Groups
from meshwright.parallel.data import AskScale
from meshwright.parallel.errors import WrapError
from meshwright.parallel.experts import ExpertStates
from meshwright.parallel.sharded import ShardedStates
from meshwright.parallel.shared import SharedFlags, SharedGradients
from meshwright.parallel.spread import Spread

__all__ = ["Shard"]


class Shard(ShardedStates):
    """Data engine for sharded states.

    Args:
        module: the model, whole on every rank; it is sharded in place.
        groups: process groups of `dp` and `fsdp`.
        spread: what `tp` and `pp` add.
        zero_stage: 1, 2 or 3.
        offload: keep shards in host memory between uses.
        blocks: the units, found by structure or named (see `own_blocks`).
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Groups,
        spread: Spread,
        *,
        zero_stage: int,
        offload: bool = False,
        blocks: Sequence[str] | None = None,
    ) -> None:
        self.zero_stage = zero_stage
        self._used: set[str] = set()
        self._flags: list[SharedFlags] = []
        axes = ("dp", "fsdp") if groups.mesh.dp > 1 else ("fsdp",)
        on_host = groups.device_type == "cpu"  # where nothing can be pinned, and nothing need be
        policy: OffloadPolicy = CPUOffloadPolicy(pin_memory=not on_host) if offload else OffloadPolicy()
        experts = _Experts(module, spread.experts, groups)
        sharded = partial(fully_shard, offload_policy=policy, ignored_params=set(experts.whole.values()))
        self._units = _shard_units(
            module,
            own_blocks(module, blocks),
            partial(sharded, mesh=groups.device_mesh(*axes)),
            stays_whole=zero_stage < 3,
            experts=experts,
        )
        self._copies, self._whole = SharedGradients(experts.whole, groups, "edp"), frozenset(experts.whole)
        self._root = cast(FSDPModule, module)
        super().__init__(module, groups, norm_axes=("fsdp",), spread=spread)
        module._apply(lambda tensor: tensor)  # FSDP2 looks at its parameters anew: deferred ones have memory by now
        self._watch = [unit.register_forward_pre_hook(self._watch_gradients) for unit in self._units]
        for name in experts.whole:
            self._trained[name].register_post_accumulate_grad_hook(self._noting(name))

    @property
    def units(self) -> int:
        """How many groups of parameters are gathered and reduced together."""
        return len(self._units)

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self._used.clear()
        for name, parameter in self._trained.items():
            parameter.grad = None
            if parameter._backward_hooks and name not in self._whole:
                raise WrapError(HOOKED.format(name))

    def prepare(self, last: bool) -> None:
        """Says whether the next micro-batch is the last of its step, and so what is reduced and kept after it."""
        keep = self.zero_stage < 3 and not last
        self._root.set_requires_gradient_sync(last or self.zero_stage > 1)
        self._root.set_requires_all_reduce(last)
        self._root.set_reshard_after_backward(not keep)
        self._root.set_is_last_backward(last)

    def backward(self, loss: Tensor, items: Tensor, ask_scale: AskScale | None) -> None:
        """Adds `items` times the gradient of `loss`; FSDP2 reduces each unit as its backward ends."""
        self._ask_scale = ask_scale or self._ask_scale
        loss.backward(gradient=items)

    def launch(self) -> None:
        """FSDP2 reduced during backward; what is left to say is which parameters were used."""
        self._flags = self._shared_flags(self._used)

    def finish(self) -> None:
        """Divides the summed gradients; parameters no rank used keep no gradient."""
        assert self._flags, "launch comes first"
        self._copies.fill(self._trained)
        self._copies.sum(self.local())
        self._drop_unused(self._flags)
        held = [gradient for _, gradient in self.local().values() if gradient is not None]
        if held:
            torch._foreach_mul_(held, self._ask_scale().to(held[0].device))
        self._sum_over_copies()

    def release(self) -> None:
        """Frees whole parameters that a forward pass without backward left behind."""
        for unit in self._units:
            cast(FSDPModule, unit).reshard()

    def _watch_gradients(self, unit: nn.Module, args: Any) -> None:
        """Runs at a unit's first forward, when its whole parameters exist: notes which ones receive gradients."""
        del args
        for name in self._units[unit]:
            module_name, _, leaf = name.rpartition(".")
            parameter = getattr(self.module.get_submodule(module_name), leaf)
            if name in self._trained:  # what was frozen since may be thawed again
                trains = parameter.requires_grad
                parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._noting(name))
                parameter.requires_grad_(trains)
        self._watch[list(self._units).index(unit)].remove()

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        used = self._used  # and not `self`: see the hooks of `Replicate`

        def on_gradient(parameter: Tensor) -> None:
            del parameter
            used.add(name)

        return on_gradient


class _Experts:
    """Experts that are dealt: modules whose parameters are sharded over `edp`, and parameters that stay whole.

    FSDP2 makes a unit whole when its module is called, which it refuses for lists of modules; and of an expert that no
    other rank keeps there is nothing to shard, nor of a parameter whose every row is another slice's.
    """

    def __init__(self, module: nn.Module, experts: ExpertStates, groups: Groups) -> None:
        self.mesh = groups.device_mesh("edp") if groups.size("edp") > 1 else None
        paths = experts.plan.paths if experts.plan.degree > 1 and self.mesh is not None else ()
        found = {path: module.get_submodule(path) for path in paths}
        self.units = {
            path: each for path, each in found.items() if not isinstance(each, (nn.ModuleList, nn.ModuleDict))
        }
        self.whole = {
            name: each
            for name, each in module.named_parameters()
            if experts.holds(name) and not (each.numel() and any(name.startswith(f"{path}.") for path in self.units))
        }

    def shard(self, prefix: str, names: Sequence[str], shard: Callable[..., Any]) -> dict[nn.Module, Sequence[str]]:
        """Shards those below a path; returns the parameter names of each unit."""
        units: dict[nn.Module, Sequence[str]] = {}
        for path, unit in self.units.items():
            if f"{path}.".startswith(prefix) and not isinstance(unit, FSDPModule):
                units[unit] = [name for name in names if name.startswith(f"{path}.") and name not in self.whole]
                shard(unit, mesh=self.mesh)
        return units


def _shard_units(
    module: nn.Module,
    blocks: Mapping[str, nn.Module],
    shard: Callable[..., Any],
    *,
    stays_whole: bool,
    experts: _Experts,
) -> dict[nn.Module, Sequence[str]]:
    """Shards blocks, experts in them first, then the rest; returns the parameter names of each unit, the root last."""
    units: dict[nn.Module, Sequence[str]] = {}
    claimed: set[str] = set(experts.whole)
    names = [name for name, _ in module.named_parameters()]

    def claim(prefix: str, unit: nn.Module, *, reshards: bool) -> None:
        sharded = partial(shard, reshard_after_forward=reshards)
        inner = experts.shard(prefix, names, sharded)
        claimed.update(name for each in inner.values() for name in each)
        units.update(inner)
        units[unit] = [name for name in names if name.startswith(prefix) and name not in claimed]
        claimed.update(units[unit])
        sharded(unit)

    for position, (path, block) in enumerate(blocks.items()):
        claim(f"{path}.", block, reshards=not stays_whole and position < len(blocks) - 1)
    claim("", module, reshards=False)
    _sum_gradients(cast(FSDPModule, module))
    return units


def _sum_gradients(root: FSDPModule) -> None:
    """Makes FSDP2 add gradients (the engine divides once, by items) and send zeros for unused parameters."""
    for unit in cast(nn.Module, root).modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
    if hasattr(
        root, "set_reduce_scatter_unused_params"
    ):  # torch 2.13; older ones need the same parameters on all ranks
        root.set_reduce_scatter_unused_params(True)
