"""The attention interface of `transformers`: its models fetch what attends, and what makes masks, from two registers.

They ask by a name in their config. Behind the name "sdpa" a plugged model finds ours, any other model what was there:
many models ask whether the name is "sdpa" before they make a mask or choose a path, so the name stays.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.blockwise.calls import plug_of
from meshwright.parallel.blockwise.closures import read_mask
from meshwright.parallel.blockwise.mask_tensor import MaskTensor, mask_and_bias
from meshwright.parallel.blockwise.masks import MaskFunction, causal, padding, window
from meshwright.parallel.blockwise.patches import Place
from meshwright.parallel.errors import WrapError

__all__ = ["Configs", "interface_places"]

_NAME = "sdpa"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"  # by custom, in the file of each model


class _Plugged(str):
    """The name in the config of a plugged model; copies of the config have the name that was there before."""

    before: str | None

    def __new__(cls, before: str | None) -> "_Plugged":
        made = super().__new__(cls, _NAME)
        made.before = before
        return made

    def __deepcopy__(self, memo: Any) -> str | None:
        del memo
        return self.before

    def __reduce_ex__(self, protocol: Any) -> Any:
        del protocol
        return _as_it_is, (self.before,)


def _as_it_is(name: str | None) -> str | None:
    return name


def interface_places() -> list[Place]:
    """What is replaced, where `transformers` is loaded and has its interface."""
    modeling, masking = sys.modules.get("transformers.modeling_utils"), sys.modules.get("transformers.masking_utils")
    attend, mask = getattr(modeling, "AttentionInterface", None), getattr(masking, "AttentionMaskInterface", None)
    if attend is None or mask is None:
        return []
    return [Place(attend._global_mapping, _NAME, _attending), Place(mask._global_mapping, _NAME, _masking)]


class Configs:
    """The configs by which a model's modules fetch attention.

    Args:
        modules: all of the model's.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = {id(config): (config, config._attn_implementation) for config in _configs(modules)}

    @classmethod
    def plugged(cls, modules: Iterable[nn.Module]) -> "Configs":
        """Those that name ours, of a model that may be plugged."""
        return cls([each for each in modules if isinstance(_attention_of(each), _Plugged)])

    def check(self) -> None:
        """Refuses a model that does not fetch ours any more.

        Raises:
            WrapError: where its name, or what it is to give back, was changed.
        """
        for config, _ in self._before.values():
            name, weights = config._attn_implementation, getattr(config, "output_attentions", False)
            if name != _NAME or weights:
                change = "output_attentions" if weights else f"the attention implementation {name!r}"
                raise WrapError(
                    f"{type(config).__name__} was given {change} behind the wrap, and would compute attention by "
                    "itself, without what is dealt over ranks or done by blocks; set it before parallelize()"
                )

    def switch(self) -> None:
        """Makes the modules fetch ours.

        Raises:
            WrapError: for a model that is to give back attention weights.
        """
        for config, _ in self._before.values():
            if getattr(config, "output_attentions", False):
                raise WrapError(
                    f"{type(config).__name__}.output_attentions asks for attention weights, which blockwise attention "
                    "never holds; set it to False"
                )
        for config, name in self._before.values():
            config._attn_implementation_internal = _Plugged(name)

    def restore(self) -> None:
        """Gives each config the name it had."""
        for config, name in self._before.values():
            config._attn_implementation_internal = name


def _attention_of(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


def _configs(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """Configs of modules whose file uses the interface."""
    for module in modules:
        config, home = getattr(module, "config", None), sys.modules.get(type(module).__module__)
        if hasattr(config, "_attn_implementation_internal") and hasattr(home, _INTERFACE):
            yield config


def _attending(plain: Callable[..., Any]) -> Callable[..., Any]:
    def attend(module: nn.Module, *given: Any, **settings: Any) -> Any:
        """Signature and result of transformers' `sdpa_attention_forward`."""
        plug = plug_of(module)
        if plug is None:
            return _of_unplugged(module, plain)(module, *given, **settings)
        named = dict(zip(("query", "key", "value", "attention_mask"), given, strict=False))
        asked = _asked(module, {**named, **settings})
        output = plug.compute(module, "the attention interface of transformers", **asked)
        return output.transpose(1, 2).contiguous(), None

    return attend


def _of_unplugged(module: nn.Module, plain: Callable[..., Any]) -> Callable[..., Any]:
    """What a module attends by that is none of ours, but may share its config with one."""
    name = _attention_of(module)
    if not isinstance(name, _Plugged) or name.before == _NAME:
        return plain
    home = sys.modules[type(module).__module__]
    own: Callable[..., Any] = getattr(home, _INTERFACE).get_interface(name.before, getattr(home, _EAGER, None))
    if own is None:
        raise WrapError(
            f"{type(module).__name__} shares its config with a model whose attention is computed by blocks; give it a "
            "copy of the config"
        )
    return own


def _asked(module: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """Fields of the call, with the meaning that transformers' `sdpa_attention_forward` gives to what it takes."""
    if settings.get("output_attentions"):
        raise WrapError("output_attentions asks for attention weights, which blockwise attention never holds; leave it")
    given = settings.get("attention_mask")
    query, key, value = _one_batch(settings["query"], settings["key"], settings["value"])
    mask, bias = mask_and_bias(given)
    position_bias = settings.get("position_bias")
    if given is None and query.shape[2] > 1 and _is_causal(module, settings):
        mask = causal()
        length = min(key.shape[2], query.shape[2])  # of a cache that is filled later
        key, value = key[:, :, :length], value[:, :, :length]
        position_bias = None if position_bias is None else position_bias[..., :length]
    if position_bias is not None:
        bias = position_bias if bias is None else position_bias + bias
    return {
        "query": query,
        "key": key,
        "value": value,
        "mask": mask,
        "bias": bias,
        "scale": settings.get("scaling"),
        "softcap": settings.get("softcap"),
        "sinks": _sinks(module, settings),
        "dropout_p": settings.get("dropout", 0.0),
    }


def _is_causal(module: nn.Module, settings: dict[str, Any]) -> bool:
    """What no mask means: "sdpa" asks the module, "eager" hides nothing then."""
    if _name_before(getattr(module, "config", None)) == "eager":
        return False
    asked = settings.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _name_before(config: Any) -> str | None:
    name = getattr(config, "_attn_implementation", None)
    return name.before if isinstance(name, _Plugged) else name


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Learned queries come with one sample for all."""
    batch = max(query.shape[0], key.shape[0])
    wide = [each if each.shape[0] == batch else each.expand(batch, -1, -1, -1) for each in (query, key, value)]
    return wide[0], wide[1], wide[2]


def _sinks(module: nn.Module, settings: dict[str, Any]) -> Tensor | None:
    sinks: Tensor | None = settings.get("s_aux")
    if settings.get("sinks") is not None:
        raise WrapError(
            f"{type(module).__name__} computes sinks for each query, which blockwise attention does not take; leave "
            "out blockwise="
        )
    return sinks


def _masking(plain: Callable[..., Any]) -> Callable[..., Any]:
    def make_mask(*args: Any, config: Any = None, **settings: Any) -> Any:
        """Signature of transformers' `sdpa_mask`; gives a `MaskTensor` where that gives a dense mask.

        Modules that were made for "eager" may attend without the interface: they find the floats they expect.
        """
        if args or not isinstance(getattr(config, "_attn_implementation", None), _Plugged):
            return plain(*args, config=config, **settings)
        if _name_before(config) != "eager":
            return _stated(**{**settings, "dtype": torch.bool})
        return _stated(**{"dtype": torch.float32, **settings, "allow_is_causal_skip": False})

    return make_mask


def _stated(
    *, batch_size: int, q_length: int, kv_length: int, mask_function: MaskFunction, **settings: Any
) -> MaskTensor | None:
    q_offset, kv_offset = settings.get("q_offset", 0), settings.get("kv_offset", 0)
    valid = _valid(settings.get("attention_mask"), kv_length, kv_offset)
    if valid is None and _is_left_out(q_length, kv_length, settings):
        return None
    at_start = isinstance(q_offset, int) and q_offset == kv_offset == 0
    asked = mask_function if at_start else _shifted(mask_function, q_offset, kv_offset)
    length = q_length if q_length == kv_length and at_start else None
    mask = read_mask(asked, length=length, use_vmap=settings.get("use_vmap", False))
    if valid is not None:
        mask = padding(valid) if mask is None else mask & padding(valid)
    whole = window(None, None) if mask is None else mask
    device = torch.device(settings.get("device", "cpu"))
    return MaskTensor(whole, (batch_size, 1, q_length, kv_length), device=device, dtype=settings["dtype"])


def _valid(given: Tensor | None, length: int, offset: int) -> Tensor | None:
    """[b, s_k], which keys are tokens; None where all of them are."""
    if given is None:
        return None
    valid = functional.pad(given, (0, max(length + offset - given.shape[-1], 0)))[:, offset : offset + length]
    return None if bool(valid.all()) else valid


def _is_left_out(q_length: int, kv_length: int, settings: dict[str, Any]) -> bool:
    """Whether `sdpa_mask` leaves a mask out: the module's `is_causal` says it, or there is nothing to hide."""
    local = settings.get("local_size")
    if local is not None and kv_length >= local:
        return False
    causal_skip = settings.get("allow_is_causal_skip", True) and q_length in (1, kv_length)
    return bool(causal_skip or settings.get("allow_is_bidirectional_skip", False))


def _shifted(asked: MaskFunction, q_offset: Any, kv_offset: Any) -> MaskFunction:
    return lambda sample, head, query, key: asked(sample, head, query + q_offset, key + kv_offset)
