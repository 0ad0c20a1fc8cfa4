"""One llama-like model of `transformers`, a step on one long sequence, by policy of what is kept for backward."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import meshwright as mw

__all__ = ["POLICIES", "SIDES", "Model", "Ours", "Policy", "Theirs", "build"]

_LOSS_ROWS = 1024
Step = Callable[[], object]


@dataclass(frozen=True)
class Model:
    """Sizes of a model; those of a llama of 58 million parameters."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    intermediate: int = 1376
    vocabulary: int = 32000


def build(model: Model, *, attention: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The model, always with the same values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        vocab_size=model.vocabulary,
        max_position_embeddings=1 << 22,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        make: Any = AutoModelForCausalLM.from_config
        made = make(config, attn_implementation=attention, dtype=dtype)
    assert isinstance(made, nn.Module), type(made)
    return made.to(device).train()


@dataclass(frozen=True)
class Theirs:
    """transformers and torch alone.

    Args:
        attention: "eager" makes scores, "sdpa" is torch's fused kernel.
        layers: keep the inputs of whole layers only.
        loss: compute the loss by rows, each under `torch.utils.checkpoint`; else the model's own.
    """

    attention: str
    layers: bool = False
    loss: bool = False

    def sizes(self, length: int) -> dict[str, int]:
        """Sizes of blocks for sequences of a length: none."""
        return {}

    def step(self, model: Model, *, length: Callable[[], int], device: str, dtype: torch.dtype) -> Step:
        """A training step on as many positions as `length` says then."""
        return self.step_of(build(model, attention=self.attention, device=device, dtype=dtype), length=length)

    def step_of(self, module: nn.Module, *, length: Callable[[], int]) -> Step:
        """The same of a model that was built for `attention`."""
        if self.layers:
            module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step() -> Tensor:
            optimizer.zero_grad()
            tokens = _tokens(module, length())
            with _flash(self.attention, tokens.device.type):
                loss = _loss_by_rows(module, tokens) if self.loss else module(input_ids=tokens, labels=tokens).loss
                loss.backward()
            optimizer.step()
            return loss.detach()

        return step


@dataclass(frozen=True)
class Ours:
    """The same model, wrapped.

    Args:
        options: of `parallelize`.
        spans: compute whole layers span by span; else only their feed-forward parts.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    spans: bool = False
    attention: ClassVar[str] = "sdpa"

    def sizes(self, length: int) -> dict[str, int]:
        """Sizes of blocks for sequences of a length; spans of long ones are a tenth."""
        rows = {"layer_block": max(8192, length // 10)} if self.spans else {"ffn_block": 4096}
        return {"loss_block": _LOSS_ROWS, **rows}

    def step(self, model: Model, *, length: Callable[[], int], device: str, dtype: torch.dtype) -> Step:
        """A training step on as many positions as `length` says then; sizes of blocks are those of its answer now."""
        return self.step_of(build(model, attention=self.attention, device=device, dtype=dtype), length=length)

    def step_of(self, module: nn.Module, *, length: Callable[[], int]) -> Step:
        """The same of a model that was built for `attention`."""
        sizes = self.sizes(length())
        tokens = _tokens(module, 16)
        example = {"input_ids": tokens, "labels": tokens}
        wrapped = mw.parallelize(module, mw.Mesh(), blockwise=sizes, example=example, **self.options)
        optimizer = wrapped.make_optimizer(lambda each: torch.optim.AdamW(each, lr=1e-4, fused=True))

        def step() -> Tensor:
            tokens = _tokens(module, length())
            loss = wrapped.step({"input_ids": tokens, "labels": tokens})
            optimizer.step()
            return loss

        return step


Policy = Theirs | Ours
_LAYERED: dict[str, Any] = {"schedule": "layered", "recompute": "blocks"}

POLICIES: dict[str, Policy] = {
    "vanilla": Theirs("eager"),
    "vanilla, layers checkpointed": Theirs("eager", layers=True),
    "flash": Theirs("sdpa"),
    "flash, layers checkpointed": Theirs("sdpa", layers=True),
    "flash, layers checkpointed, loss by rows": Theirs("sdpa", layers=True, loss=True),
    "ours": Ours(),
    "ours, layers by spans": Ours(spans=True),
    "ours, layers recomputed": Ours(_LAYERED),
    "ours, layers recomputed by spans": Ours(_LAYERED, spans=True),
    "ours, layers recomputed by spans, inputs in host memory": Ours({**_LAYERED, "offload_inputs": True}, spans=True),
}
"""What may be kept for backward, by name."""

SIDES: dict[str, tuple[str, ...]] = {
    "vanilla": ("vanilla", "vanilla, layers checkpointed"),
    "memory efficient": ("flash", "flash, layers checkpointed"),
    "memory efficient, loss by rows": ("flash, layers checkpointed, loss by rows",),
    "ours": tuple(name for name, policy in POLICIES.items() if isinstance(policy, Ours)),
}
"""Each side's policies, of which the best counts."""


def _tokens(module: Any, length: int) -> Tensor:
    device, vocabulary = next(module.parameters()).device, module.config.vocab_size
    generator = torch.Generator(device=device).manual_seed(0)
    return torch.randint(0, vocabulary, (1, length), generator=generator, device=device)


def _flash(attention: str, device: str) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if attention == "sdpa" and device == "cuda" else nullcontext()


def _loss_by_rows(module: Any, tokens: Tensor) -> Tensor:
    """The mean loss of next tokens; scores of `_LOSS_ROWS` positions exist at a time."""
    rows = module.model(input_ids=tokens).last_hidden_state[0, :-1]
    target = tokens[0, 1:]

    def part(rows: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(module.lm_head(rows).float(), target, reduction="sum")

    parts = [
        checkpoint(part, *each, use_reentrant=False)
        for each in zip(rows.split(_LOSS_ROWS), target.split(_LOSS_ROWS), strict=True)
    ]
    return torch.stack(parts).sum() / target.numel()
