"""What the measurements of layers on nodes say: ratios, messages, bytes of a link, rows against their expectation."""

from statistics import median
from typing import Any

import torch

from benchmarks.moe_network import CASES, EACH, NODES, measured
from benchmarks.sections import aligned
from benchmarks.timing import noise_of, ratio_of
from meshwright.moe.groups import Groups
from meshwright.moe.once import expected_nodes, visit_once
from meshwright.moe.top_k import TopK

__all__ = ["compare", "distinct_nodes", "text"]

_PAIRS = {
    "over_flat": ("top-8", "times", "flat", "bi-level"),
    "over_flat_by_deduplication_alone": ("top-8", "times", "flat", "flat by two hops"),
    "over_flat_top1": ("top-1", "times", "flat", "bi-level"),
    "over_flat_top1_delayed": ("top-1", "delayed", "flat", "bi-level"),
    "over_deepspeed": ("top-8", "times", "DeepSpeed", "bi-level"),
    "over_deepspeed_top1": ("top-1", "times", "DeepSpeed", "bi-level"),
    "over_deepspeed_top1_delayed": ("top-1", "delayed", "DeepSpeed", "bi-level"),
    "over_deepspeed_dropping": ("top-8", "times", "DeepSpeed, dropping", "bi-level, dropping"),
    "over_deepspeed_dropping_top1": ("top-1", "times", "DeepSpeed, dropping", "bi-level, dropping"),
    "over_deepspeed_dropping_top1_delayed": ("top-1", "delayed", "DeepSpeed, dropping", "bi-level, dropping"),
}
"""Name of a speed-up -> case, kind of times, the slower one, the faster one."""


def compare(rate_mbit_s: float, rounds: int, delay_s: float) -> dict[str, Any]:
    """All of it, as JSON takes it.

    Args:
        rate_mbit_s: of each node's link; 0 for this machine's own network.
        rounds: of timing.
        delay_s: of a message to another node, where it has one.
    """
    found = measured(rate_mbit_s, rounds, delay_s)
    beside, halves = found.pop("shared"), found.pop("halves")
    speedups = {
        name: ratio_of(found[case][kind][slow], found[case][kind][fast])
        for name, (case, kind, slow, fast) in _PAIRS.items()
        if kind in found[case]
    }
    return {
        **{f"speedup_{name}": ratio.median for name, ratio in speedups.items()},
        "half_width": {f"speedup_{name}": ratio.half_width for name, ratio in speedups.items()},
        "rate_mbit_s": rate_mbit_s,
        "delay_s": delay_s,
        "cases": {case: _case(case, each) for case, each in found.items()},
        "distinct_nodes": distinct_nodes(),
        "shared": {**_overlap(beside["times"], "flying", "waiting"), "same_bits": beside["same"]},
        "halves": {**_overlap(halves["times"], "halves", "whole"), "difference": halves["difference"]},
    }


def _overlap(times: dict[str, list[float]], with_it: str, without: str) -> dict[str, Any]:
    found = ratio_of(times[with_it], times[without])
    return {
        f"ratio_of_{with_it}_to_{without}": found.median,
        "half_width": found.half_width,
        "noise": noise_of(times[f"{without} again"], times[without]),
        "median_s": {who: median(each) for who, each in times.items()},
    }


def _case(name: str, found: dict[str, Any]) -> dict[str, Any]:
    kinds = [kind for kind in ("times", "delayed") if kind in found]
    return {
        "sizes": vars(CASES[name]),
        "median_s": {kind: {who: median(each) for who, each in found[kind].items()} for kind in kinds},
        "noise": {kind: noise_of(found[kind]["flat again"], found[kind]["flat"]) for kind in kinds},
        "sent": found["sent"],
        "rows": found["rows"],
        "expected_nodes": expected_nodes(num_experts=CASES[name].experts, k=CASES[name].k, num_nodes=NODES),
        "difference_to_deepspeed": found["difference"],
    }


def distinct_nodes(*, experts: int = 256, k: int = 8, tokens: int = 20000) -> list[dict[str, float]]:
    """Rows between nodes for each token where it is sent once to each: counted of any k experts, and derived.

    The last of each is what is left where a token may visit half of the nodes (node-limited routing).
    """
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    routing = TopK(num_experts=experts, k=k).route(logits)
    found = []
    for nodes in (2, 4, 8, 16):
        visits = visit_once(routing, num_nodes=nodes).departure.tokens.bincount(minlength=tokens).double()
        limited = Groups(number=nodes, limit=nodes // 2)
        few = TopK(num_experts=experts, k=k, groups=limited).route(logits)
        found.append(
            {
                "nodes": nodes,
                "counted": float(visits.mean()),
                "standard_error": float(visits.std() / tokens**0.5),
                "derived": expected_nodes(num_experts=experts, k=k, num_nodes=nodes),
                "limited_to_half": visit_once(few, num_nodes=nodes).departure.num_rows / tokens,
            }
        )
    return found


def text(found: dict[str, Any]) -> str:
    """The same for people."""
    shaped = f"{found['rate_mbit_s']:.0f} Mbit/s each" if found["rate_mbit_s"] else "not slowed down"
    parts = [f"{NODES} nodes of {EACH} ranks, links {shaped}; forward and backward of one layer\n"]
    for name, case in found["cases"].items():
        parts.append(_table(name, case, found["delay_s"]))
    parts.append(
        "".join(
            f"speedup_{name:<38} {found[f'speedup_{name}']:.3f} +- {found['half_width'][f'speedup_{name}']:.3f}\n"
            for name in _PAIRS
            if f"speedup_{name}" in found
        )
    )
    names = ("counted", "standard_error", "derived", "limited_to_half")
    rows = [["rows of a token, 256 experts, k = 8", *(name.replace("_", " ") for name in names)]]
    for each in found["distinct_nodes"]:
        rows.append([f"once to each of {each['nodes']} nodes", *(f"{each[name]:.4f}" for name in names)])
    beside = found["shared"]
    words = (
        f"a shared network while rows fly / after they arrived: {beside['ratio_of_flying_to_waiting']:.3f} "
        f"+- {beside['half_width']:.3f} of the time of a step (A/A {beside['noise']:.3f}, "
        f"{'the same bits' if beside['same_bits'] else 'other bits'})\n"
        f"tokens in two halves / whole: {found['halves']['ratio_of_halves_to_whole']:.3f} "
        f"+- {found['halves']['half_width']:.3f} of the time of a step (A/A {found['halves']['noise']:.3f}, "
        f"outputs differ by {found['halves']['difference']:.1e})\n"
    )
    return "\n".join([*parts, aligned(rows), words])


def _table(name: str, case: dict[str, Any], delay_s: float) -> str:
    kinds = {"times": "ms", "delayed": f"ms, {delay_s * 1e3:g} ms a message"}
    shown = [kind for kind in kinds if kind in case["median_s"]]
    tokens = NODES * EACH * case["sizes"]["tokens"]
    rows = [[name, *map(kinds.get, shown), "messages", "others", "link MB", "rows between nodes of a token"]]
    for who, times in case["median_s"]["times"].items():
        sent, counted = case["sent"][who], case["rows"].get(who)
        per_token = "" if counted is None else f"{counted['rows_between_nodes'] / tokens:.3f}"
        cells = [f"{case['median_s'][kind][who] * 1e3:.0f}" for kind in shown] if times else []
        cells += [f"{sent['messages']:g}", f"{sent['other_messages']}", f"{sent['link_bytes'] / 1e6:.2f}", per_token]
        rows.append([who, *cells])
    noise = ", ".join(f"{case['noise'][kind]:.3f}" for kind in shown)
    return (
        aligned([[str(cell) for cell in row] for row in rows])
        + f"A/A {noise}; expected nodes of a token {case['expected_nodes']:.3f}; largest difference between flat and "
        f"DeepSpeed {case['difference_to_deepspeed']:.1e} of the largest output\n"
    )
