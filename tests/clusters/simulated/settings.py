"""A training to predict, with any of its numbers changed."""

from dataclasses import replace
from typing import Any

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout, Training, Transformer

__all__ = ["GPT_175B", "LLAMA_405B", "setting"]

GPT_175B = Transformer(layers=96, hidden=12288, heads=96, kv_heads=96, ffn=49152, vocab=51200, sequence=2048, tied=True)
LLAMA_405B = Transformer(
    layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocab=128256, sequence=8192, gated=True
)


def setting(model: Transformer = GPT_175B, kind: str = "A100", engine: Engine | None = None, **layout: Any) -> Training:
    """A model on as many GPUs as the layout has ranks, eight to a node."""
    dealt = replace(Layout(global_batch=layout.get("dp", 1) * layout.get("micro_batch", 1)), **layout)
    cluster = Cluster(gpu=gpu(kind), num_gpus=dealt.num_ranks)
    return Training(model=model, layout=dealt, cluster=cluster, engine=engine or Engine())
