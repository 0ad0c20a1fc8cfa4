"""A training to predict, with any of its numbers changed."""

import random
from dataclasses import replace
from typing import Any

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout, Training, Transformer
from meshwright.clusters.simulated.candidates import Question, Space

__all__ = ["GPT_175B", "LLAMA_405B", "any_question", "setting"]

GPT_175B = Transformer(layers=96, hidden=12288, heads=96, kv_heads=96, ffn=49152, vocab=51200, sequence=2048, tied=True)
LLAMA_405B = Transformer(
    layers=126, hidden=16384, heads=128, kv_heads=8, ffn=53248, vocab=128256, sequence=8192, gated=True
)


def setting(model: Transformer = GPT_175B, kind: str = "A100", engine: Engine | None = None, **layout: Any) -> Training:
    """A model on as many GPUs as the layout has ranks, eight to a node."""
    dealt = replace(Layout(global_batch=layout.get("dp", 1) * layout.get("micro_batch", 1)), **layout)
    cluster = Cluster(gpu=gpu(kind), num_gpus=dealt.num_ranks)
    return Training(model=model, layout=dealt, cluster=cluster, engine=engine or Engine())


def any_question(seed: int) -> Question:
    """A small one, that follows from the seed."""
    draw = random.Random(seed)
    heads = draw.choice([8, 12, 16])
    experts = draw.choice([0, 0, 4])
    model = Transformer(
        layers=draw.choice([6, 8, 12]),
        hidden=heads * draw.choice([64, 128]),
        heads=heads,
        kv_heads=heads // draw.choice([1, 2, 4]),
        ffn=heads * 256,
        vocab=draw.choice([0, 32000, 250000]),
        sequence=draw.choice([512, 2048, 8192]),
        gated=draw.random() < 0.5,
        experts=experts,
        top_k=min(2, experts),
    )
    kind = replace(gpu(draw.choice(["V100", "A100", "H100"])), memory_bytes=draw.choice([10e9, 12e9, 16e9, 80e9]))
    return Question(
        model=model,
        cluster=Cluster(
            gpu=kind,
            num_gpus=draw.choice([6, 8, 16]),
            gpus_per_node=draw.choice([2, 4, 8]),
            network_bytes_per_s=draw.choice([None, 1e9, 100e9]),
        ),
        global_batch=draw.choice([16, 24, 48]),
        at_most=draw.random() < 0.3,
        engine=Engine(overlapped=draw.random() < 0.5, fused_attention=draw.random() < 0.5),
        space=Space(max_cp=2, micro_batches=(1, 2, 4), runnable=draw.random() < 0.5),
    )
