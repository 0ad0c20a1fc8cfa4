"""Models with experts, and routers that choose as evenly as is assumed of those without values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from meshwright.moe import routing, swap
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.two_gates import TwoGates, replace_routers

__all__ = ["build_mixture", "build_switch", "even_routers"]


def build_mixture(levels: BiLevel | None = None, **changes: Any) -> nn.Module:
    """A mixtral of `transformers`, the same on every rank; with bi-level routers where they are given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", **{**sizes, **heads, "use_cache": False, **changes})
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, nn.Module), type(model)
    if levels is not None:
        replace_routers(model, levels)
    return model


def build_switch(levels: BiLevel | None = None) -> nn.Module:
    """A switch of `transformers`, likewise; its experts are modules, and its routers hand them zeros and ones."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_experts": 8}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    quiet = {"use_cache": False, "dropout_rate": 0.0, "router_jitter_noise": 0.0, "decoder_start_token_id": 0}
    model = AutoModelForSeq2SeqLM.from_config(
        AutoConfig.for_model("switch_transformers", **sizes, **layers, **quiet, pad_token_id=0)
    )
    assert isinstance(model, nn.Module), type(model)
    if levels is not None:
        replace_routers(model, levels)
    return model


@contextmanager
def even_routers(model: nn.Module) -> Iterator[None]:
    """Inside, routers do not look at the values that they have; all else goes by what it finds."""
    ours = any(isinstance(each, TwoGates) for each in model.modules())
    with patch.object(routing if ours else swap, "has_values", lambda _: False):
        yield
