"""Decoders of `transformers` as they come, some hundred of them, each with four small blocks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.parallel.models import VOCABULARY, causal_lm

__all__ = ["DECODERS", "decoder", "rows"]

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TABLE: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "apertus arcee biogpt bitnet cohere cohere2 diffllama doge ernie4_5 gpt_neox gpt_neox_japanese granite "
        "lfm2 mistral nanochat nemotron olmo olmo2 persimmon phi phi3 qwen2 smollm3 stablelm starcoder2",
        {},
    ),
    ("gemma gemma2 glm glm4 helium hunyuan_v1_dense ministral ministral3 qwen3 seed_oss vaultgemma", {"head_dim": 8}),
    ("falcon_mamba mamba", {"state_size": 4}),
    ("bert-generation camembert data2vec-text ernie megatron-bert roberta roformer xlm-roberta", {"is_decoder": True}),
    ("exaone4 olmo3", {"sliding_window": 8}),
    ("rwkv", {"context_length": 64}),
    ("modernbert-decoder", {"local_attention": 8}),
    ("granitemoe phimoe", {"num_local_experts": 4}),
    ("bloom", {"n_layer": 4, "n_head": 4}),
    ("recurrent_gemma", {"head_dim": 8, "lru_width": 32}),
    ("cwm gemma3_text", {"head_dim": 8, "sliding_window": 8}),
    ("minimax", {"num_local_experts": 4, "head_dim": 8}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("electra", {"is_decoder": True, "embedding_size": 16}),
    ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}),
    ("xlm", {"emb_dim": 32, "n_layers": 4, "n_heads": 4}),
    ("flex_olmo olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    ("hunyuan_v1_moe", {"head_dim": 8, "num_experts": 4, "moe_topk": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("big_bird", {"is_decoder": True, "attention_type": "original_full"}),
    ("granitemoeshared", {"num_local_experts": 4, "shared_intermediate_size": 32}),
    ("gpt_bigcode openai-gpt", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 64}),
    ("ernie4_5_moe", {"moe_num_experts": 4, "moe_intermediate_size": 32, "moe_k": 2}),
    ("gpt_oss minimax_m2", {"num_local_experts": 4, "head_dim": 8, "num_experts_per_tok": 2}),
    ("llama4_text", {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 64}),
    ("ctrl", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "dff": 64}),
    ("rembert", {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 16}),
    ("codegen gptj", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    ("bamba", {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]}),
    ("qwen2_moe", {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}),
    ("afmoe", {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}),
    (
        "bart blenderbot marian mbart mvp pegasus plbart trocr whisper",
        {"d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    ),
    ("glm4_moe", {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 8}),
    (
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    ),
    (
        "jamba",
        {
            "num_experts": 2,
            "mamba_d_state": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 8,
        },
    ),
    (
        "dots1",
        {
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    (
        "granitemoehybrid",
        {
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "layer_types": ["attention", "attention", "attention", "attention"],
        },
    ),
    (
        "qwen3_next",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "head_dim": 8,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
)
"""Names of architectures, and what makes them small besides `_SIZES`."""

DECODERS: dict[str, dict[str, Any]] = {name: settings for names, settings in _TABLE for name in names.split()}


def decoder(name: str) -> Callable[[], nn.Module]:
    """Builds one of them, untouched."""
    return causal_lm(name, **{**_SIZES, **DECODERS[name]})


def rows() -> dict[str, Tensor]:
    """Nine rows of sixteen tokens, a third of them without a label."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (9, 16), generator=generator)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)}
