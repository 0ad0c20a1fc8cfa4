"""DeepSpeed as a data engine: ZeRO stages 0 to 3 behind the same `step`.

DeepSpeed averages over ranks and partitions gradients as they come, but the number of items of a step is known only
after its last forward. So each loss is weighted by items x ranks, which makes DeepSpeed's average a sum, and the
division by the global number of items (with clipping) happens to the partitions right before the base optimizer
updates them, in its own pre-step hook: nothing of DeepSpeed's internals is touched.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from meshwright.parallel.collectives import Groups
from meshwright.parallel.data import AskScale, Unscheduled
from meshwright.parallel.errors import WrapError
from meshwright.parallel.optimizer import BuildOptimizer, GroupOf, grouped
from meshwright.parallel.shared import SharedFlags

__all__ = ["DeepSpeedStates"]


class DeepSpeedStates(Unscheduled):
    """Data engine on `deepspeed.initialize`; all data ranks are one group.

    Args:
        module: the model in float32 or bfloat16, whole on every rank.
        groups: process groups; DeepSpeed uses the default one.
        zero_stage: 0 to 3.
        offload: keep optimizer states in host memory.

    Raises:
        WrapError: for float64 parameters, or where DeepSpeed is not installed.
    """

    def __init__(self, module: nn.Module, groups: Groups, *, zero_stage: int, offload: bool) -> None:
        wide = next((name for name, each in module.named_parameters() if each.dtype is torch.float64), None)
        if wide is not None:
            raise WrapError(
                f"DeepSpeed trains no float64 parameters, and {wide} is one; use float32, or data_engine='torch'"
            )
        self.module = module
        self._library = _import_deepspeed(groups.device_type)
        self._groups = groups
        self._num_ranks = groups.mesh.world_size
        self._config = _config(zero_stage, offload)
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._used: set[str] = set()
        self._flags: SharedFlags | None = None
        self._used_anywhere: set[str] = set()
        self._scale = torch.ones(())
        self._ask_scale: AskScale = lambda: self._scale
        self._engine: Any = None

    def begin(self) -> None:
        """Forgets which parameters were used in the step before."""
        if self._engine is None:
            raise WrapError("DeepSpeed owns the optimizer: call model.make_optimizer(...) before the first step")
        self._engine.zero_grad()
        self._used.clear()

    def prepare(self, last: bool) -> None:
        """Tells DeepSpeed whether the next micro-batch is the last of its step."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, items: Tensor, ask_scale: AskScale | None) -> None:
        """Adds `items` times the gradient of `loss` to DeepSpeed's partitions."""
        self._ask_scale = ask_scale or self._ask_scale
        self._engine.backward(torch.where(items > 0, loss, 0.0) * (items * self._num_ranks), scale_wrt_gas=False)

    def launch(self) -> None:
        """DeepSpeed reduced at the last micro-batch; what is left to say is which parameters were used."""
        self._flags = SharedFlags(self._trained, self._used, self._groups)

    def finish(self) -> None:
        """Keeps the scale for the update; DeepSpeed's sums stay as they are until then."""
        self._scale = self._ask_scale().float()
        assert self._flags is not None, "launch comes first"
        self._used_anywhere = set(self._trained) - set(self._flags.unused())

    def release(self) -> None:
        """DeepSpeed frees gathered parameters itself."""

    def clip(self, max_norm: float | None) -> Tensor:
        """Scales the coming update to a global L2 norm of at most `max_norm`; returns the norm before."""
        held = [gradient.double().norm() for gradient in self.full_gradients().values() if gradient is not None]
        norm = torch.stack(held).norm() if held else torch.zeros((), dtype=torch.float64)
        if max_norm is not None:
            self._scale = self._scale * (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
        return norm

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole trained parameters by name; every rank must ask."""
        return {name: self._whole_parameter(each) for name, each in self._trained.items()}

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Whole gradients by name, None where no rank computed one; every rank must ask."""
        found: dict[str, Tensor | None] = {}
        for name, parameter in self._trained.items():
            gradient = self._library.utils.safe_get_full_grad(parameter)
            found[name] = gradient * self._scale if gradient is not None and name in self._used_anywhere else None
        return found

    def make_optimizer(self, build: BuildOptimizer, group_of: GroupOf | None) -> "_DeepSpeedOptimizer":
        """Starts DeepSpeed's engine around the optimizer that `build` makes."""
        base = build(grouped(self._trained, group_of))
        base.register_step_pre_hook(self._scale_gradients)
        for name, parameter in self._trained.items():
            parameter.register_hook(self._noting(name))
        self._engine = self._library.initialize(model=self.module, optimizer=base, config=self._config)[0]
        self.module = self._engine
        return _DeepSpeedOptimizer(self._engine, base, self._trained, self._library.utils)

    def model_state(self) -> dict[str, Any]:
        """Whole parameters, tied ones under each of their names, and buffers."""
        plain = self.module if self._engine is None else self._engine.module
        whole = {id(self._trained[name]): tensor for name, tensor in self.full_parameters().items()}
        named = plain.named_parameters(remove_duplicate=False)
        return {**plain.state_dict(), **{name: whole[id(each)] for name, each in named if id(each) in whole}}

    def load_model_state(self, state: dict[str, Any]) -> None:
        """Takes back what `model_state` gave."""
        plain = self.module if self._engine is None else self._engine.module
        for name, buffer in plain.named_buffers():
            if name in state:
                buffer.copy_(state[name])
        for name, parameter in self._trained.items():
            if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
                parameter.data.copy_(state[name])
            else:
                self._library.utils.safe_set_full_fp32_param(parameter, state[name])

    def _whole_parameter(self, parameter: nn.Parameter) -> Tensor:
        whole = self._library.utils.safe_get_full_fp32_param(parameter)
        return parameter.detach() if whole is None else whole

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def on_gradient(gradient: Tensor) -> None:
            del gradient
            self._used.add(name)

        return on_gradient

    def _scale_gradients(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self._scale)


class _EngineOptimizer(Optimizer):
    """The user's handle: shares the base optimizer's groups, so that learning rates reach it, and steps the engine."""

    def __init__(self, engine: Any, base: Optimizer) -> None:
        super().__init__(base.param_groups, base.defaults)
        self._engine = engine

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates the partitions and gathers the parameters."""
        del closure
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        del set_to_none
        self._engine.zero_grad()


class _DeepSpeedOptimizer:
    """Optimizer states through DeepSpeed's own accessors, whole on every rank."""

    def __init__(self, engine: Any, base: Optimizer, trained: dict[str, nn.Parameter], access: Any) -> None:
        self.optimizer: Optimizer = _EngineOptimizer(engine, base)
        self._base = base
        self._trained = trained
        self._access = access

    def states(self) -> dict[str, dict[str, Any]]:
        """Whole states by parameter name; every rank must ask."""
        keys = self._keys()
        return {name: {key: self._get(each, key) for key in keys} for name, each in self._trained.items()}

    def make_states(self) -> None:
        """DeepSpeed makes states when it starts."""

    def load(self, states: dict[str, dict[str, Any]]) -> None:
        """Puts whole states back."""
        for name, kept in states.items():
            for key, value in kept.items():
                self._set(self._trained[name], key, value)

    def _keys(self) -> list[str]:
        return sorted({key for state in self._base.state.values() for key in state})

    def _get(self, parameter: nn.Parameter, key: str) -> Any:
        if parameter in self._base.state:
            return self._base.state[parameter][key]
        scalars = [state[key] for state in self._base.state.values() if _is_scalar(state.get(key))]
        return scalars[0] if scalars else self._access.safe_get_full_optimizer_state(parameter, key)

    def _set(self, parameter: nn.Parameter, key: str, value: Any) -> None:
        if parameter in self._base.state:
            self._base.state[parameter][key] = value
        elif _is_scalar(value):
            for state in self._base.state.values():
                state[key] = value.clone() if isinstance(value, Tensor) else value
        else:
            self._access.safe_set_full_optimizer_state(parameter, value, key)


def _is_scalar(value: Any) -> bool:
    return (not isinstance(value, Tensor) and value is not None) or (isinstance(value, Tensor) and value.dim() == 0)


def _config(zero_stage: int, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,  # only a name for DeepSpeed's logs: batches are the caller's
        "gradient_accumulation_steps": 1,  # boundaries are told, see `prepare`
        "gradient_clipping": 0.0,  # clipping waits for the division by items, see `clip`
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _import_deepspeed(device_type: str) -> Any:
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise WrapError("data_engine='deepspeed' needs DeepSpeed: pip install 'meshwright[deepspeed]'") from error
    logger.setLevel("ERROR")
    # used for inference only; compiling it at first use needs a C++ compiler and hangs on the lock of a killed build
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device_type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False, verbose=False)
    return deepspeed
