"""Small models and batches that tests share; built on the ranks, so everything is made from seeds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 97


def causal_lm(architecture: str, **overrides: Any) -> Callable[[], nn.Module]:
    """A tiny untouched `transformers` model."""

    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **overrides)).train()

    return build


def llama(**overrides: Any) -> Callable[[], nn.Module]:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 65,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    return causal_lm("llama", **{**sizes, **overrides})


def gpt2(**overrides: Any) -> Callable[[], nn.Module]:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "use_cache": False}
    return causal_lm("gpt2", **{**sizes, **overrides})


def tokens(num_samples: int = 9, length: int = 16, *, masked: float = 0.3) -> Callable[[], dict[str, Tensor]]:
    """Token ids whose labels are masked unevenly: the first third of the samples almost entirely."""

    def build() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, VOCABULARY, (num_samples, length), generator=generator)
        labels = ids.clone()
        labels[torch.rand(ids.shape, generator=generator) < masked] = -100
        labels[: num_samples // 3, 3:] = -100
        labels[0] = -100
        return {"input_ids": ids, "labels": labels}

    return build


class Regressor(nn.Module):
    """A model nobody wrote for parallelism: positional input, dropout, a branch that may stay unused."""

    def __init__(self, *, unused: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(dropout)) for _ in range(3))
        self.head = nn.Linear(6, 2, bias=False)
        self.spare = nn.Linear(6, 2) if unused else None

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = inputs + layer(inputs)
        return nn.functional.mse_loss(self.head(inputs), targets)


def regressor(**settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Regressor(**settings)

    return build


def pairs(num_samples: int = 8) -> Callable[[], tuple[Tensor, Tensor]]:
    def build() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(num_samples, 6, generator=generator), torch.randn(num_samples, 2, generator=generator)

    return build
