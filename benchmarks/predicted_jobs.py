"""The jobs of `benchmarks.predicted`: seven meshes of one small llama, five others, and three later ones.

The others were chosen before anything that the seven show was modelled, the later ones before anything that the others
show was measured again, and no number is fitted to any: other families, batches, lengths, numbers of ranks, kinds of
attention and recomputing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["JOBS", "VOCABULARY", "Small"]

VOCABULARY = 257  # bytes, and the end of a document

_LLAMA = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
_GPT2 = {"n_embd": 192, "n_layer": 3, "n_head": 6, "n_positions": 256}
_QWEN3 = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
_MIXTRAL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}

_OPT = {
    "hidden_size": 192,
    "ffn_dim": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "word_embed_proj_dim": 192,
    "max_position_embeddings": 256,
}
_OLMOE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 384,
}
_GEMMA3 = {
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 40,
    "sliding_window": 128,
    "max_position_embeddings": 384,
}


@dataclass(frozen=True, kw_only=True)
class Small:
    """A job of 2 to 8 ranks.

    Args:
        parallel: as in a job file.
        architecture: of `transformers`.
        config: of it.
        batch_size: sequences of a step.
        length: positions of each.
    """

    parallel: Mapping[str, Any]
    architecture: str = "llama"
    config: Mapping[str, Any] = field(default_factory=lambda: _LLAMA)
    batch_size: int = 8
    length: int = 256

    def file(self, *, steps: int) -> dict[str, Any]:
        """The whole job file."""
        data = {"files": "python-stdlib", "tokenizer": "bytes", "sequence_length": self.length, "max_bytes": "1MiB"}
        return {
            "version": 1,
            "name": "predicted",
            "model": {"architecture": self.architecture, "config": dict(self.config)},
            "data": data,
            "parallel": dict(self.parallel),
            "train": {"steps": steps, "batch_size": self.batch_size, "log_every_steps": 1, "clip_norm": None},
            "cluster": {"type": "local"},
        }

    def build(self) -> Any:
        """Its model, with the same weights on every rank."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.architecture, **{"vocab_size": VOCABULARY, **self.config})
        config.use_cache = False
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).train()


JOBS: Mapping[str, Small] = {
    "dp": Small(parallel={"dp": 2}),
    "fsdp, layered": Small(parallel={"fsdp": 2, "schedule": "layered", "num_microbatches": 2}),
    "tp": Small(parallel={"tp": 2, "sequence_parallel": True}),
    "pp, modular": Small(parallel={"pp": 2, "schedule": "modular", "num_microbatches": 4}),
    "cp": Small(parallel={"cp": 2}),
    "dp x tp": Small(parallel={"dp": 2, "tp": 2}),
    "pp x fsdp x tp": Small(
        parallel={"pp": 2, "fsdp": 2, "tp": 2, "schedule": "1f1b", "num_microbatches": 4},
    ),
    "other: gpt2, fsdp 4": Small(
        parallel={"fsdp": 4, "num_microbatches": 2}, architecture="gpt2", config=_GPT2, length=192
    ),
    "other: llama, tp 4": Small(parallel={"tp": 4}, batch_size=16, length=128),
    "other: qwen3, cp ring": Small(
        parallel={"cp": 2, "cp_kind": "ring"}, architecture="qwen3", config=_QWEN3, batch_size=4, length=512
    ),
    "other: mixtral, ep": Small(
        parallel={"dp": 2, "ep": 2}, architecture="mixtral", config=_MIXTRAL, batch_size=16, length=128
    ),
    "other: gpt2, recomputed": Small(
        parallel={"dp": 2, "schedule": "layered", "num_microbatches": 4, "recompute": "blocks"},
        architecture="gpt2",
        config=_GPT2,
    ),
    "later: opt, pp 2 x dp 2": Small(
        parallel={"pp": 2, "dp": 2, "schedule": "1f1b", "num_microbatches": 4},
        architecture="opt",
        config=_OPT,
        length=192,
    ),
    "later: olmoe, fsdp": Small(
        parallel={"fsdp": 2, "num_microbatches": 2}, architecture="olmoe", config=_OLMOE, length=384
    ),
    "later: gemma3, tp": Small(parallel={"tp": 2}, architecture="gemma3_text", config=_GEMMA3, length=320),
}
"""Names of those that were chosen besides begin with "other" and "later"."""
