"""Small untouched models with experts, and one step of them as ranks and as one process see it."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "NUM_EXPERTS", "Gated", "GatedList", "batch", "build", "build_listed", "run"]

VOCABULARY = 53
NUM_EXPERTS = 8
LENGTH = 7

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "intermediate_size": 24, "num_local_experts": NUM_EXPERTS},
    "qwen3_moe": {
        **_SIZES,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "num_experts": NUM_EXPERTS,
        "head_dim": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "olmoe": {**_SIZES, "intermediate_size": 12, "num_experts": NUM_EXPERTS},
    "deepseek_v3": {
        **_SIZES,
        "intermediate_size": 24,
        "moe_intermediate_size": 12,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "gpt_oss": {**_SIZES, "intermediate_size": 12, "num_local_experts": NUM_EXPERTS, "head_dim": 8},
    "switch_transformers": {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_ff": 24,
        "d_kv": 8,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "num_experts": NUM_EXPERTS,
        "expert_capacity": 2,
        "router_jitter_noise": 0.0,
        "dropout_rate": 0.0,
        "use_cache": False,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "output_router_logits": False,
    },
}


def build(family: str, **overrides: Any) -> nn.Module:
    """A model in float64 with weights that differ everywhere, also those that models begin with zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    kind = AutoModelForSeq2SeqLM if family == "switch_transformers" else AutoModelForCausalLM
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model: nn.Module = kind.from_config(config).to(torch.float64)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for each in model.parameters():
            each.normal_(0.0, 0.3, generator=generator)
    return model.train()


class GatedList(nn.ModuleList):
    """Gated experts with biases, each a module of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(Gated(width, inner) for _ in range(NUM_EXPERTS))
        self.num_experts = NUM_EXPERTS

    def forward(self, tokens: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        made = torch.zeros_like(tokens)
        for number, expert in enumerate(self):
            row, choice = torch.where(ids == number)
            if len(row):
                made = made.index_add(0, row, expert(tokens[row]) * weights[row, choice, None])
        return made


class Gated(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.back = nn.Linear(inner, width)
        self.both = nn.Linear(width, 2 * inner)

    def forward(self, rows: Tensor) -> Tensor:
        pairs = self.both(rows).unflatten(-1, (-1, 2))  # a feature's gate and itself lie side by side
        made: Tensor = self.back(nn.functional.silu(pairs[..., 0]) * pairs[..., 1])
        return made


def build_listed() -> nn.Module:
    """A model of `mixtral` whose experts are modules of nobody's library."""
    model = build("mixtral")
    generator = torch.Generator().manual_seed(5)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.experts = GatedList(16, 7).double()  # type: ignore[union-attr]
        with torch.no_grad():
            for each in layer.mlp.experts.parameters():  # type: ignore[union-attr]
                each.normal_(0.0, 0.3, generator=generator)
    return model


def batch(num_samples: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (num_samples, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, ids: Tensor, num_samples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """This part's share of the mean loss over all samples, and gradients by name; zeros where there are none."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids.flip(1)
    scores = model(**inputs).logits[:, :-1]
    losses = nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss = losses / (num_samples * (LENGTH - 1))
    loss.backward()
    found = {
        name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in model.named_parameters()
    }
    return loss.detach(), found
