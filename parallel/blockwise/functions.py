"""The function of torch through which models attend that have no interface of their own, and torch's own modules.

What a call means is written in torch's documentation of `scaled_dot_product_attention`, which `nn.MultiheadAttention`
calls where no weights are asked for.
"""

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from meshwright.parallel.blockwise.calls import calling_module, plug_of
from meshwright.parallel.blockwise.mask_tensor import mask_and_bias
from meshwright.parallel.blockwise.masks import causal
from meshwright.parallel.blockwise.patches import Place
from meshwright.parallel.errors import WrapError

__all__ = ["attribute_places", "function_places", "weight_hooks"]

_SDPA = torch._C._nn.scaled_dot_product_attention
_WEIGHTS_WANTED: ContextVar[bool] = ContextVar("weights_wanted", default=False)
_OURS = "_meshwright_replaces"
_NEED_WEIGHTS = 4  # position in a call of nn.MultiheadAttention


def function_places(modules: list[nn.Module]) -> list[Place]:
    """What is replaced in torch, and in the files that the model's classes come from."""
    files = {kind.__module__ for module in modules for kind in type(module).__mro__} - {functional.__name__}
    spaces = [functional, *(sys.modules[file] for file in sorted(files) if file in sys.modules)]
    found = [Place(space, name, _attending) for space in spaces for name in _names_of_function(space)]
    return [*found, Place(torch.backends.mha, "get_fastpath_enabled", _without_fast_path)]


def attribute_places(modules: list[nn.Module]) -> list[Place]:
    """What is replaced on the model's modules: attributes that are the function."""
    return [Place(module, name, _attending) for module in modules for name in _names_of_function(module)]


def weight_hooks(modules: list[nn.Module]) -> list[RemovableHandle]:
    """Hooks that keep torch's own modules from the path that holds all weights, which most are asked for by default."""
    hooks = []
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward:
            hooks.append(module.register_forward_pre_hook(_ask_for_none, with_kwargs=True))
            hooks.append(module.register_forward_hook(_stand_in))
    return hooks


def _names_of_function(space: Any) -> list[str]:
    """Also where it was replaced for another model, which may be gone before this one."""
    return [name for name, value in vars(space).items() if value is _SDPA or getattr(value, _OURS, None) is _SDPA]


def _attending(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        calling = calling_module()
        if calling is None:
            return plain(query, key, value, *rest, **more)
        plug, module = calling
        settings = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **more}
        lead = _lead(query, key, value)
        mask, bias = mask_and_bias(_flat_mask(settings.get("attn_mask"), lead))
        if settings.get("is_causal"):
            mask = causal() if mask is None else mask & causal()
        output = plug.compute(
            module,
            "scaled_dot_product_attention",
            query=_flat(query, lead),
            key=_flat(key, lead),
            value=_flat(value, lead),
            mask=mask,
            bias=bias,
            scale=settings.get("scale"),
            dropout_p=settings.get("dropout_p", 0.0),
        )
        return output if len(lead) == 1 else output.reshape(*lead, *query.shape[-3:-1], value.shape[-1])

    setattr(scaled_dot_product_attention, _OURS, getattr(plain, _OURS, plain))
    return scaled_dot_product_attention


def _lead(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """Dims before heads, as they broadcast."""
    shape = query.shape[:-3]
    if shape == key.shape[:-3] == value.shape[:-3]:
        return shape
    return torch.Size(torch.broadcast_shapes(shape, key.shape[:-3], value.shape[:-3]))


def _flat(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[..., heads, s, d] as [b, heads, s, d]; what comes without heads has one."""
    if len(lead) == 1 and tensor.dim() == 4 and tensor.shape[0] == lead[0]:
        return tensor
    heads = tensor if tensor.dim() > 2 else tensor.unsqueeze(0)
    return heads.expand(*lead, *heads.shape[-3:]).reshape(-1, *heads.shape[-3:])


def _flat_mask(mask: Tensor | None, lead: torch.Size) -> Tensor | None:
    """[b or 1, heads or 1, s_q or 1, s_k or 1]."""
    if mask is None or (mask.dim() == 4 and len(lead) == 1):
        return mask
    whole = mask.reshape(*(1,) * (len(lead) + 3 - mask.dim()), *mask.shape)
    if all(size == 1 for size in whole.shape[:-3]):
        return whole.reshape(1, *whole.shape[-3:])
    return _flat(whole, lead)


def _ask_for_none(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if plug_of(module) is None:  # a copy of a plugged one
        return None
    by_place = len(args) > _NEED_WEIGHTS
    _WEIGHTS_WANTED.set(args[_NEED_WEIGHTS] if by_place else kwargs.get("need_weights", True))
    if by_place:
        return (*args[:_NEED_WEIGHTS], False, *args[_NEED_WEIGHTS + 1 :]), kwargs
    return args, {**kwargs, "need_weights": False}


def _stand_in(module: nn.Module, args: Any, output: Any) -> Any:
    del args
    if plug_of(module) is None or not _WEIGHTS_WANTED.get():
        return None
    return output[0], _NoWeights(type(module).__name__)


def _without_fast_path(plain: Callable[[], bool]) -> Callable[[], bool]:
    """Layers of torch have a way past both functions, for evaluation."""

    def get_fastpath_enabled() -> bool:
        return calling_module() is None and plain()

    return get_fastpath_enabled


class _NoWeights:
    """Stands where attention weights would be: most models ask for them by default and leave them."""

    def __init__(self, asked: str) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        raise WrapError(
            f"{self._asked} is asked for its attention weights (.{name}), which blockwise attention "
            "never holds; leave out blockwise="
        )

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("[]")
