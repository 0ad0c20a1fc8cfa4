"""Attention with all its scores, as a handler, and models whose own attention it is compared with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from meshwright.parallel.blockwise.calls import AttentionCall
from meshwright.parallel.blockwise.masks import Frame
from meshwright.parallel.blockwise.plugs import plugged
from meshwright.parallel.parity import relative_errors
from meshwright.parallel.promote import Promote
from tests.parallel.families import FAMILIES, SHAPE, Family, lm, made, words
from tests.parallel.models import VOCABULARY


def dense_attention(call: AttentionCall) -> Tensor:
    """What a call asks for, written down as it is defined."""
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.repeat_interleave(groups, 1), call.value.repeat_interleave(groups, 1)
    scores = call.query @ key.mT * (call.query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias
    if call.mask is not None:
        samples, heads, queries, keys = (range(size) for size in scores.shape)
        scores = scores.masked_fill(~call.mask.pairs(queries, keys, Frame(samples, heads, scores.device)), -torch.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    shares = torch._safe_softmax(scores, -1)[..., : key.shape[2]]
    return functional.dropout(shares, call.dropout_p) @ value


def run(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Loss and gradients of a float64 model, casts inside promoted."""
    model.zero_grad()
    torch.manual_seed(0)
    with Promote():
        output = model(**batch) if isinstance(batch, dict) else model(*batch)
        loss: Tensor = output if isinstance(output, Tensor) else output.loss
        loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **found}


def wide(batch: Any) -> Any:
    """Floats of a batch in float64."""
    if isinstance(batch, dict):
        return {name: wide(each) for name, each in batch.items()}
    if isinstance(batch, tuple):
        return tuple(wide(each) for each in batch)
    return batch.double() if isinstance(batch, Tensor) and batch.is_floating_point() else batch


def error_when_plugged(
    model: nn.Module, batch: Any, handler: Callable[[AttentionCall], Tensor] = dense_attention
) -> tuple[float, dict[str, str]]:
    """Largest relative error of loss and gradients against the unplugged model, and what arrived."""
    batch = wide(batch)
    plain = run(model, batch)
    with plugged(model, handler) as plug:
        found = run(model, batch)
    assert found.keys() == plain.keys()
    return max(relative_errors(found, plain).values()), plug.arrived


def padded() -> dict[str, Tensor]:
    """Samples of several lengths, padded on the right."""
    batch = words(4, 12)
    lengths = torch.tensor([12, 7, 1, 9])
    mask = (torch.arange(12)[None] < lengths[:, None]).long()
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


def packed() -> dict[str, Tensor]:
    """Samples that hold several documents each, told by positions that start again."""
    positions = [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [*range(12)], [0, *range(11)], [*range(6), *range(6)]]
    return {**words(4, 12), "position_ids": torch.tensor(positions)}


def translation() -> dict[str, Tensor]:
    """Padded sources that are shorter than their targets."""
    batch = padded()
    return {**batch, "labels": words(4, 17)["labels"]}


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        return self.out(self.attend(query, key, value).transpose(-3, -2).flatten(-2))


class Handwritten(nn.Module):
    """Nobody's architecture: layers that attend as told, around a head with a loss."""

    def __init__(self, *attends: Callable[..., Tensor], width: int = 16, heads: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(_Attention(width, heads, attend) for attend in attends)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.table(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention that no plug sees."""
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


_EXPERTS = {"num_local_experts": 4, "experts_implementation": "eager"}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}

MODELS: dict[str, Family] = {
    **{name: (FAMILIES[name][0], words) for name in ("gpt2", "llama", "qwen3", "mixtral", "olmo2")},
    **{name: FAMILIES[name] for name in ("vit", "whisper", "modernbert", "translator")},
    "padded llama": (FAMILIES["llama"][0], padded),
    "padded bert": (FAMILIES["bert"][0], padded),
    "padded t5": (FAMILIES["t5"][0], translation),
    "packed llama": (FAMILIES["llama"][0], packed),
    "packed gemma3": (lm("gemma3_text", num_key_value_heads=1, head_dim=8, sliding_window=4, layer_types=None), packed),
    "gemma3": (lm("gemma3_text", num_key_value_heads=1, head_dim=8, sliding_window=4, num_hidden_layers=7), words),
    "gemma2": (lm("gemma2", num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0), words),
    "gpt_oss": (lm("gpt_oss", num_key_value_heads=2, head_dim=8, sliding_window=4, **_EXPERTS), words),
    "deepseek_v3": (
        lm("deepseek_v3", **_LATENT, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
           first_k_dense_replace=1, moe_intermediate_size=32, experts_implementation="eager"),
        words,
    ),
    "falcon": (lm("falcon", alibi=True, new_decoder_architecture=False), padded),
    "bart": (
        made("BartForConditionalGeneration", "BartConfig", d_model=32, encoder_layers=2, decoder_layers=2,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
             vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
             decoder_start_token_id=1, use_cache=False),
        translation,
    ),
    "pegasus_x": (  # attends by "eager" alone
        made("PegasusXForConditionalGeneration", "PegasusXConfig", d_model=32, encoder_layers=2, decoder_layers=2,
             encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
             vocab_size=VOCABULARY, max_position_embeddings=64, num_global_tokens=4, block_size=8, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False),
        words,  # and has no masks then
    ),
    "swin": (
        made("SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[2, 2],
             num_heads=[2, 4], window_size=4, num_labels=5),
        FAMILIES["vit"][1],
    ),
}  # fmt: skip


def model_of(name: str) -> tuple[nn.Module, Any]:
    """A float64 model in evaluation mode, and its batch."""
    build_model, build_batch = MODELS[name]
    return build_model().double().eval(), build_batch()


__all__ = [
    "MODELS",
    "SHAPE",
    "Handwritten",
    "by_hand",
    "dense_attention",
    "error_when_plugged",
    "model_of",
    "run",
    "wide",
]
