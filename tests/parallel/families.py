"""Tiny models of many families, untouched, and batches for them; built on the ranks, so all is made from seeds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.parallel.models import VOCABULARY, causal_lm

Family = tuple[Callable[[], nn.Module], Callable[[], Any]]

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def lm(architecture: str, **overrides: Any) -> Callable[[], nn.Module]:
    return causal_lm(architecture, **{**SHAPE, "use_cache": False, **overrides})


def made(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A class of `transformers` that no auto class builds."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        found = getattr(transformers, model)(getattr(transformers, config)(**settings)).train()
        assert isinstance(found, nn.Module)
        return found

    return build


def words(num_samples: int = 9, length: int = 12) -> dict[str, Tensor]:
    """Tokens whose labels are masked unevenly; the odd numbers divide by nothing."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (num_samples, length), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    labels[0, 4:] = -100
    return {"input_ids": ids, "labels": labels}


def pictures() -> dict[str, Tensor]:
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "labels": torch.arange(9) % 5}


def sounds() -> dict[str, Tensor]:
    waves = torch.randn(9, 8, 32, generator=torch.Generator().manual_seed(0))
    return {"input_features": waves, "labels": words()["labels"]}


def images() -> tuple[Tensor, Tensor]:
    return pictures()["pixel_values"], pictures()["labels"]


def sentences() -> tuple[Tensor, Tensor]:
    ids = words()["input_ids"]
    return ids, ids.flip(1)


class Translator(nn.Module):
    """torch's own encoder-decoder, whose attention computes with its matrices directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, 32)
        self.core = nn.Transformer(32, 4, 2, 2, 64, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        scores = self.head(self.core(self.table(source), self.table(target)))
        return functional.cross_entropy(scores.flatten(0, 1), target.flatten())


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(functional.relu(self.norm(self.first(x))))


class ResidualNet(nn.Module):
    """Convolutions only: nothing for `tp` to deal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Residual(8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x.mean((2, 3))), labels)


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.across = nn.Sequential(nn.Linear(tokens, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, tokens))
        self.along = nn.Sequential(nn.Linear(width, 50), nn.GELU(), nn.Dropout(0.1), nn.Linear(50, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.along(self.norms[1](x))


class Mixer(nn.Module):
    """MLP-Mixer (arXiv 2105.01601)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.ModuleList([MixerBlock(16, 16) for _ in range(2)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x.mean(1)), labels)


FAMILIES: dict[str, Family] = {
    "llama": (lm("llama", num_key_value_heads=2, attention_dropout=0.1), words),
    "gpt2": (
        causal_lm("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCABULARY, use_cache=False),
        words,
    ),
    "qwen3": (lm("qwen3", num_key_value_heads=2, head_dim=8), words),
    "gemma3": (lm("gemma3_text", num_key_value_heads=1, head_dim=8), words),
    "mixtral": (lm("mixtral", num_key_value_heads=2, num_local_experts=4, experts_implementation="eager"), words),
    "phi3": (lm("phi3", num_key_value_heads=2, pad_token_id=0), words),
    "gpt_neox": (lm("gpt_neox"), words),
    "olmo2": (lm("olmo2", num_key_value_heads=2), words),
    "bert": (made("BertForMaskedLM", "BertConfig", **SHAPE), words),
    "t5": (
        made(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=VOCABULARY,
            decoder_start_token_id=0,
            use_cache=False,
        ),
        words,
    ),
    "vit": (
        made(
            "ViTForImageClassification",
            "ViTConfig",
            **{**SHAPE, "vocab_size": 0},
            image_size=16,
            patch_size=4,
            num_labels=5,
        ),
        pictures,
    ),
    "deit": (
        made(
            "DeiTForImageClassification",
            "DeiTConfig",
            **{**SHAPE, "vocab_size": 0},
            image_size=16,
            patch_size=4,
            num_labels=5,
        ),
        pictures,
    ),
    "whisper": (
        made(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            use_cache=False,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **SPECIAL,
        ),
        sounds,
    ),
    "modernbert": (
        made(
            "ModernBertForMaskedLM",
            "ModernBertConfig",
            **SHAPE,
            pad_token_id=0,
            cls_token_id=1,
            sep_token_id=2,
            global_attn_every_n_layers=2,
            local_attention=8,
        ),
        words,
    ),
    "translator": (Translator, sentences),
    "residual_net": (ResidualNet, images),
    "mixer": (Mixer, images),
}
