"""The two functions of torch through which models attend that have no interface of their own.

What a call means is written in torch's documentation of `scaled_dot_product_attention`.
"""

import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.blockwise.calls import calling_module
from meshwright.parallel.blockwise.mask_tensor import mask_and_bias
from meshwright.parallel.blockwise.masks import causal
from meshwright.parallel.blockwise.patches import Place
from meshwright.parallel.errors import WrapError

__all__ = ["function_places"]

_SDPA = torch._C._nn.scaled_dot_product_attention
_MULTI_HEAD = functional.multi_head_attention_forward
_MULTI_HEAD_SIGNATURE = signature(_MULTI_HEAD)


def function_places(modules: list[nn.Module]) -> list[Place]:
    """What is replaced: names in torch, in the files that the model's classes come from, and on its modules."""
    files = {kind.__module__ for module in modules for kind in type(module).__mro__} - {functional.__name__}
    spaces = [functional, *(sys.modules[file] for file in sorted(files) if file in sys.modules), *modules]
    named = [(space, name, value) for space in spaces for name, value in vars(space).items()]
    wraps = ((_SDPA, _attending), (_MULTI_HEAD, _multi_head))
    found = [Place(space, name, wrap) for space, name, value in named for plain, wrap in wraps if value is plain]
    return [*found, Place(torch.backends.mha, "get_fastpath_enabled", _without_fast_path)]


def _attending(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        calling = calling_module()
        if calling is None:
            return plain(query, key, value, *rest, **more)
        plug, module = calling
        settings = {**dict(zip(("attn_mask", "dropout_p", "is_causal"), rest, strict=False)), **more}
        lead = torch.broadcast_shapes(*(each.shape[:-3] for each in (query, key, value)))
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
        return output.reshape(*lead, *query.shape[-3:-1], value.shape[-1])

    return scaled_dot_product_attention


def _flat(tensor: Tensor, lead: torch.Size) -> Tensor:
    """[..., heads, s, d] as [b, heads, s, d]; what comes without heads has one."""
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


def _multi_head(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
        calling = calling_module()
        if calling is None:
            return plain(*args, **kwargs)
        given = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        wanted = given.arguments["need_weights"]
        given.arguments["need_weights"] = False  # weights stand for a path that holds all of them
        output, _ = plain(*given.args, **given.kwargs)
        return output, _NoWeights(type(calling[1]).__name__) if wanted else None

    return multi_head_attention_forward


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
            f"{self._asked} uses the attention weights of nn.MultiheadAttention (.{name}), which blockwise attention "
            "never holds; leave out blockwise="
        )

    def __getitem__(self, key: Any) -> Any:
        return self.__getattr__("[]")
