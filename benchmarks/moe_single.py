"""A layer of experts on one process: against a dense network of as many active FLOPs, transformers' and DeepSpeed's.

All have the same tokens, experts and router (softmax, the k best, renormalised) in float32, forward and backward; times
are CPU seconds of one thread. `transformers` runs the block of Mixtral with the experts implementation that it chooses
itself; DeepSpeed computes the same without dropping, and by its default drops what finds no slot, which is less work.
"""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.moe_layers import Network, Sizes, deepspeed_layer, step_of, tokens_of, weights_of
from benchmarks.sections import aligned
from benchmarks.timing import alternate, noise_of, ratio_of
from meshwright.moe.stacked import Mixture, StackedExperts
from meshwright.moe.top_k import TopK
from meshwright.parallel.ranks import RankPool

__all__ = ["CASES", "compare", "measure", "text"]

CASES = {
    "8 experts of 1024, top-2": Sizes(tokens=2048, width=512, inner=1024, experts=8, k=2),
    "32 experts of 256, top-4": Sizes(tokens=2048, width=512, inner=256, experts=32, k=4),
}
_PEERS = {"dense": "dense", "transformers": "transformers", "deepspeed": "DeepSpeed"}


def measure(name: str, rounds: int) -> dict[str, Any]:
    """CPU seconds per step of each contender, and how far outputs are from ours, of the largest one."""
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", "0")
    sizes = CASES[name]
    _, up, down = weights_of(sizes)
    layers: dict[str, nn.Module] = {
        "ours": _ours(sizes),
        "ours again": _ours(sizes),
        "dense": Network(*_dense(up, down, sizes.k)),
        "transformers": _transformers(sizes),
        "DeepSpeed": deepspeed_layer(sizes, ranks=1, rank=0, drop_tokens=False),
        "DeepSpeed, dropping": deepspeed_layer(sizes, ranks=1, rank=0, drop_tokens=True),
    }
    tokens = tokens_of(sizes, 0)[None]  # a batch of one sequence, which transformers wants
    steps: dict[str, Callable[[], Tensor]] = {who: step_of(layer, tokens) for who, layer in layers.items()}
    made = {who: step() for who, step in steps.items()}
    largest = made["ours"].abs().max()
    same = ("ours again", "transformers", "DeepSpeed")
    return {
        "times": alternate(steps, rounds=rounds, steps=1, warmup=1, clock=time.process_time),
        "difference": {who: float((made[who] - made["ours"]).abs().max() / largest) for who in same},
        "implementation": layers["transformers"].experts.config._experts_implementation,  # type: ignore[union-attr]
    }


def _ours(sizes: Sizes) -> Mixture:
    gate, up, down = weights_of(sizes)
    router = TopK(num_experts=sizes.experts, k=sizes.k, renormalise=True)
    return Mixture(gate, StackedExperts(up, down, functional.silu), router)


def _dense(up: Tensor, down: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k experts as one network."""
    gates, ups = up[:k].chunk(2, 1)
    return torch.cat([gates.flatten(0, 1), ups.flatten(0, 1)]), down[:k].transpose(0, 1).flatten(1)


def _transformers(sizes: Sizes) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.k,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=8,
    )
    block: Any = MixtralForCausalLM(config).model.layers[0].mlp
    gate, up, down = weights_of(sizes)
    with torch.no_grad():
        block.gate.weight.copy_(gate)
        block.experts.gate_up_proj.copy_(up)
        block.experts.down_proj.copy_(down)
    assert isinstance(block, nn.Module), type(block)
    return block


def compare(rounds: int) -> dict[str, Any]:
    """Ratios of our times, by case, and the worst of each."""
    pool = RankPool()
    try:
        found = {name: _case(pool.run(measure, 1, (name, rounds), timeout_s=1800.0)[0]) for name in CASES}
    finally:
        pool.close()
    worst = {key: max(each["ratios"][key] for each in found.values()) for key in _PEERS}
    return {
        "dense_ratio": worst["dense"],
        "ratio_to_deepspeed": worst["deepspeed"],
        "ratio_to_transformers": worst["transformers"],
        "single": found,
    }


def _case(found: dict[str, Any]) -> dict[str, Any]:
    times = found["times"]
    ratios = {who: ratio_of(times["ours"], each) for who, each in times.items() if not who.startswith("ours")}
    return {
        "median_s": {who: median(each) for who, each in times.items()},
        "ratios": {key: ratios[who].median for key, who in _PEERS.items()},
        "ratio_to_deepspeed_dropping": ratios["DeepSpeed, dropping"].median,
        "half_width": {who: ratio.half_width for who, ratio in ratios.items()},
        "noise": noise_of(times["ours again"], times["ours"]),
        "difference": found["difference"],
        "implementation": found["implementation"],
    }


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    parts = []
    for name, case in found["single"].items():
        rows = [[name, "CPU ms", "ours / it", "+-"]]
        ours_s = case["median_s"]["ours"]
        for who, seconds in case["median_s"].items():
            ratio = case["ratios"].get({peer: key for key, peer in _PEERS.items()}.get(who, ""), ours_s / seconds)
            if who == "DeepSpeed, dropping":
                ratio = case["ratio_to_deepspeed_dropping"]
            width = case["half_width"].get(who)
            rows.append([who, f"{seconds * 1e3:.1f}", f"{ratio:.3f}", "" if width is None else f"{width:.3f}"])
        parts.append(
            aligned(rows) + f"A/A {case['noise']:.3f}; transformers runs {case['implementation']!r}; largest "
            f"difference of outputs {max(case['difference'].values()):.1e} of the largest one\n"
        )
    worst = [f"{key} {found[key]:.3f}\n" for key in ("dense_ratio", "ratio_to_deepspeed", "ratio_to_transformers")]
    return "\n".join([*parts, "".join(worst)])
