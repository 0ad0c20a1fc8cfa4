"""The model of a job: an architecture of `transformers` with random weights, or a function of the user's.

Weights depend on the seed alone, so that all ranks build the same model.
"""

import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from meshwright.launch.worker.errors import ModelBuildError
from meshwright.parallel.deferred import deferred
from meshwright.parallel.errors import DeferError, nearest

__all__ = ["build_model", "import_function"]

_SLIP = 0.85  # of the letters are those of a known key, in order
_CLASSES = {"causal_lm": "AutoModelForCausalLM"}


def build_model(
    spec: Mapping[str, Any],
    *,
    vocab_size: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    values: bool = True,
) -> nn.Module:
    """Builds the model that the `model:` block of a job describes; its weights are deferred, and drawn from `seed`.

    Args:
        spec: {"architecture" or "path": ..., "config": {...}} or {"python": "module:function", "arguments": {...}}.
        vocab_size: tokens of the job's tokenizer; a config that names no vocabulary gets this one.
        seed: of all weights.
        dtype: of parameters and buffers.
        device: where the weights are wanted.
        values: whether they are; without, the model is on the meta device sooner, and for good.

    Raises:
        ModelBuildError: when something cannot be imported, does not exist, or has too small a vocabulary.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    build = _builder(spec, vocab_size)
    try:
        if not values:
            with torch.device("meta"):
                return build()
        return _with_values(build, seed, device)
    finally:
        torch.set_default_dtype(before)


def _with_values(build: Callable[[], nn.Module], seed: int, device: torch.device | str) -> nn.Module:
    try:
        return deferred(build, seed=seed, device=device)
    except DeferError as error:
        warnings.warn(f"{error}; so every rank builds it whole", stacklevel=3)
        torch.manual_seed(seed)
        return build().to(device)


def _builder(spec: Mapping[str, Any], vocab_size: int) -> Callable[[], nn.Module]:
    own = partial(_from_python, spec) if spec.get("python") else partial(_from_transformers, spec, vocab_size)
    return partial(_routed, own, spec["bilevel"]) if spec.get("bilevel") else own


def import_function(name: str) -> Any:
    """Imports "package.module:function".

    >>> import_function("math:sqrt")(4)
    2.0

    Raises:
        ModelBuildError: naming what does not exist.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ModelBuildError(
            f"model.python: {module_name!r} cannot be imported: {type(error).__name__}: {error}; "
            "it must be importable from the job's workdir or be installed"
        ) from error
    found = getattr(module, function_name, None)
    if not callable(found):
        names = [each for each in vars(module) if not each.startswith("_") and callable(getattr(module, each))]
        raise ModelBuildError(
            f"model.python: {module_name} has no function {function_name!r}; {nearest(function_name, names)}"
        )
    return found


def _routed(build: Callable[[], nn.Module], gates: Mapping[str, Any]) -> nn.Module:
    """The model with bi-level routers."""
    from meshwright.moe.bilevel import BiLevel
    from meshwright.moe.recognise import find_experts
    from meshwright.moe.two_gates import replace_routers

    model, nodes = build(), gates["nodes"]
    for number in {each.num_experts for each in find_experts(model)}:
        if number % nodes:
            raise ModelBuildError(f"model.bilevel.nodes={nodes} does not divide the {number} experts of a layer")
        router = BiLevel(num_nodes=nodes, num_local=number // nodes, **{k: v for k, v in gates.items() if k != "nodes"})
    replace_routers(model, router)
    return model


def _from_python(spec: Mapping[str, Any]) -> nn.Module:
    function = import_function(spec["python"])
    arguments = dict(spec.get("arguments") or {})
    try:
        model = function(**arguments)
    except TypeError as error:
        raise ModelBuildError(f"model.python: {spec['python']}(**{arguments}) failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelBuildError(
            f"model.python: {spec['python']} returned {type(model).__name__}; it must return a torch.nn.Module"
        )
    return model


def _from_transformers(spec: Mapping[str, Any], vocab_size: int) -> nn.Module:
    overrides = dict(spec.get("config") or {})
    config = _config(spec, overrides, vocab_size)
    _check_keys(overrides, config)
    has = getattr(config.get_text_config(), "vocab_size", None)
    if has is not None and has < vocab_size:
        raise ModelBuildError(
            f"model.config.vocab_size={has} is smaller than the {vocab_size} tokens of data.tokenizer; "
            f"leave it out or set it to at least {vocab_size}"
        )
    config.use_cache = False
    loader = getattr(_transformers(), _CLASSES[spec.get("class") or "causal_lm"])
    try:
        model = loader.from_config(config)
    except Exception as error:  # transformers raises many kinds for a config it cannot build
        raise ModelBuildError(f"model: {config.model_type} cannot be built: {type(error).__name__}: {error}") from error
    assert isinstance(model, nn.Module), type(model)
    return model


def _config(spec: Mapping[str, Any], overrides: dict[str, Any], vocab_size: int) -> Any:
    library = _transformers()
    try:
        if spec.get("path"):
            return library.AutoConfig.from_pretrained(str(spec["path"]), **overrides)
        _check_architecture(library, str(spec["architecture"]))
        return library.AutoConfig.for_model(spec["architecture"], **{"vocab_size": vocab_size, **overrides})
    except ModelBuildError:
        raise
    except Exception as error:
        where = f"model.path: {spec['path']}" if spec.get("path") else f"model.config: {overrides}"
        looked = f" (looked in {Path.cwd()})" if spec.get("path") else ""
        raise ModelBuildError(f"{where}: {type(error).__name__}: {error}{looked}") from error


def _check_keys(overrides: Mapping[str, Any], config: Any) -> None:
    """A configuration takes any keyword: one that its class does not know is for the model's code alone, or a slip."""
    try:
        known = type(config)()
    except Exception:  # some are made of others, and cannot be made of nothing
        return
    names = [each for each in {**known.to_dict(), **dict(known.attribute_map)} if not each.startswith("_")]
    for key in overrides:
        close = [] if _has(known, key) else get_close_matches(key, names, n=1, cutoff=_SLIP)
        if close:
            raise ModelBuildError(f"model.config: {config.model_type} knows no {key!r}; did you mean {close[0]!r}?")


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except Exception:  # there is one for each layer
        return True


def _check_architecture(library: Any, name: str) -> None:
    known = list(library.CONFIG_MAPPING.keys())
    if name not in known:
        shown = nearest(name, known)
        hint = shown if shown.startswith("did") else "see transformers.CONFIG_MAPPING for all names"
        raise ModelBuildError(f"model.architecture: {name!r} is no model_type of transformers; {hint}")


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ModelBuildError(
            f"model: the package `transformers` cannot be imported ({error}); "
            "`pip install 'meshwright[hf]'`, or use model.python with a function of your own"
        ) from error
    return transformers
