"""Switch (flat) against bi-level routing on paper: models and cluster of SMILE (arXiv 2212.05191), 1 to 16 nodes.

`python -m benchmarks.smile [--json]`. Every GPU has one expert of each mixture; every second layer is a mixture. What
an exchange costs was fitted to other people's all-to-alls (`benchmarks.fit_exchanges`) and to nothing of SMILE. The
abstract gives one figure, 2.5 times the throughput; step times of the paper are known second-hand and not compared.

Assumed, since neither the paper's text nor its code was at hand: see ASSUMED, which the report prints.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.clusters.hardware import gpu
from meshwright.clusters.simulated import Cluster, Engine, Layout, Training, Transformer, step
from meshwright.clusters.simulated.congestion import fabric
from meshwright.clusters.simulated.experts import Exchange, Ways

__all__ = ["ASSUMED", "MODELS", "NODES", "Case", "report", "ways"]

ASSUMED = (
    "12, 24 and 36 layers of width 768, 1024 and 1600: derived from the models' sizes, not read",
    "128 sequences of 128 tokens on each GPU (batch 16,384 on 128 GPUs) in one micro-batch, fp16, rows of tokens only",
    "choices spread evenly; gates take no time; exchanges hide behind nothing, forward and backward alike",
    "a message costs a NIC of the p4d what it costs a NIC of the p5, where it was measured; a GPU has half a NIC,"
    " not four, so it waits eight times as long for one",
    "what is not an exchange takes as long as `clusters.simulated` says of unfused attention on A100",
)
PUBLISHED_SPEED_UP = 2.5  # of the abstract, 16 nodes
NODES = (1, 2, 4, 8, 16)
_PER_NODE, _SEQUENCE, _SEQUENCES, _VOCABULARY = 8, 128, 128, 30522
_NETWORK = 4 * 100e9 / 8 / _PER_NODE  # bytes per second of a GPU: p4d.24xlarge has 400 Gb/s
_NICS = 4 / _PER_NODE
_EXCHANGES = 4  # there and back, forward and backward
_ELEMENT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one number of nodes.

    Args:
        layers: half of them mixtures.
        hidden: width; networks are four times as wide inside.
        nodes: of 8 GPUs.
        micro_batch: sequences of a GPU that travel together.
        capacity: factor of slots that all travel; None where tokens alone do.
    """

    layers: int = 12
    hidden: int = 768
    nodes: int = 16
    micro_batch: int = _SEQUENCES
    capacity: float | None = None

    @property
    def num_gpus(self) -> int:
        """Of all nodes; as many experts."""
        return self.nodes * _PER_NODE

    def exchange(self, *, bilevel: bool) -> Exchange:
        """Of one micro-batch and one mixture."""
        return Exchange(
            tokens=self.micro_batch * _SEQUENCE,
            row_bytes=_ELEMENT_BYTES * self.hidden,
            experts=self.num_gpus,
            nodes=self.nodes,
            per_node=_PER_NODE,
            way="two_hops" if bilevel else "one_hop",
            capacity=self.capacity,
        )

    @property
    def rest_s(self) -> float:
        """Of a step, everything but exchanges."""
        dense = Transformer(
            layers=self.layers // 2,
            hidden=self.hidden,
            heads=self.hidden // 64,
            kv_heads=self.hidden // 64,
            ffn=4 * self.hidden,
            vocab=_VOCABULARY,
            sequence=_SEQUENCE,
            tied=True,
        )
        sparse = replace(dense, vocab=0, experts=self.num_gpus, top_k=1)
        layout = Layout(dp=self.num_gpus, ep=1, micro_batch=self.micro_batch, global_batch=_SEQUENCES * self.num_gpus)
        cluster = Cluster(gpu=gpu("A100-SXM4-40GB"), num_gpus=self.num_gpus, network_bytes_per_s=_NETWORK)
        engine = Engine(fused_attention=False, gradient_bytes=2)
        parts = ((dense, layout), (sparse, replace(layout, ep=self.num_gpus)))
        found = [step(Training(model=each, layout=dealt, cluster=cluster, engine=engine)) for each, dealt in parts]
        return sum(each.total_s - each.ep_s for each in found)

    def exchanges_s(self, links: Ways, *, bilevel: bool) -> tuple[float, ...]:
        """Of a step, by hop."""
        times = _EXCHANGES * self.layers // 2 * _SEQUENCES // self.micro_batch
        return tuple(times * each for each in self.exchange(bilevel=bilevel).took_s(links))


MODELS: Mapping[str, tuple[int, int]] = {"3.7B": (12, 768), "13B": (24, 1024), "48B": (36, 1600)}


def ways(congestion: float = 1.0, *, as_a_p5: bool = False) -> Ways:
    """The links of a p4d's GPU, with so many times the measured cost of a message between nodes."""
    between = fabric("efa").congested(congestion)
    return Ways(
        within=fabric("nvlink"),
        between=between,
        within_bytes_per_s=gpu("A100").nvlink_bytes_per_s,
        between_bytes_per_s=_NETWORK,
        nics_per_gpu=4 if as_a_p5 else _NICS,
    )


def _speed_up(case: Case, links: Ways) -> float:
    rest_s = case.rest_s
    flat_s, bilevel_s = (sum(case.exchanges_s(links, bilevel=each)) for each in (False, True))
    return (rest_s + flat_s) / (rest_s + bilevel_s)


def _line(case: Case) -> dict[str, Any]:
    """What one case sends and takes."""
    flat, bilevel = (case.exchange(bilevel=each) for each in (False, True))
    return {
        "nodes": case.nodes,
        "flat_hops": [asdict(hop) for hop in flat.hops],
        "bilevel_hops": [asdict(hop) for hop in bilevel.hops],
        "rest_s": case.rest_s,
        "flat_s": list(case.exchanges_s(ways(), bilevel=False)),
        "bilevel_s": list(case.exchanges_s(ways(), bilevel=True)),
        "flat_s_without": list(case.exchanges_s(ways(0.0), bilevel=False)),
        "bilevel_s_without": list(case.exchanges_s(ways(0.0), bilevel=True)),
        "speed_up": _speed_up(case, ways()),
        "speed_up_without": _speed_up(case, ways(0.0)),
    }


def report() -> dict[str, Any]:
    """All numbers: 3.7B by nodes, all models on 16 nodes, and what the answer depends on."""
    largest = Case()
    sensitivity = {
        "messages for nothing (latency and bandwidth alone)": _speed_up(largest, ways(0.0)),
        "a message half of what was measured": _speed_up(largest, ways(0.5)),
        "as measured": _speed_up(largest, ways()),
        "twice": _speed_up(largest, ways(2.0)),
        "a GPU waits for a message as long as one of a p5": _speed_up(largest, ways(as_a_p5=True)),
        **{f"micro-batches of {each}": _speed_up(replace(largest, micro_batch=each), ways()) for each in (64, 32, 16)},
        **{f"slots {each:g} travel": _speed_up(replace(largest, capacity=each), ways()) for each in (1.25, 2.0)},
    }
    return {
        "published_speed_up_16_nodes": PUBLISHED_SPEED_UP,
        "predicted_speed_up_16_nodes": sensitivity["as measured"],
        "predicted_speed_up_16_nodes_without": sensitivity["messages for nothing (latency and bandwidth alone)"],
        "by_nodes": [_line(replace(largest, nodes=each)) for each in NODES],
        "by_model": {name: _line(Case(layers=each[0], hidden=each[1])) for name, each in MODELS.items()},
        "sensitivity": sensitivity,
        "assumed": list(ASSUMED),
    }


def _text(found: Mapping[str, Any]) -> str:
    lines = [
        "3.7B, ms of a step: rest | flat: peers away+within, MB away, ms | bi-level: peers, ms between, within | gain"
    ]
    for each in found["by_nodes"]:
        flat, levels = each["flat_hops"][0], each["bilevel_hops"]
        between, within = each["bilevel_s"] if len(levels) == 2 else (0.0, *each["bilevel_s"])
        peers = [f"{hops[0]['messages_away']:3d}+{hops[-1]['messages_within']}" for hops in (each["flat_hops"], levels)]
        lines.append(
            f"{each['nodes']:3d} nodes {1e3 * each['rest_s']:6.0f} | {peers[0]}{flat['bytes_away'] / 1e6:7.1f}"
            f"{1e3 * sum(each['flat_s']):7.0f} | {peers[1]}{1e3 * between:7.0f}{1e3 * within:7.0f} | "
            f"{each['speed_up']:.2f} (messages for nothing: {each['speed_up_without']:.2f})"
        )
    lines += [
        f"{name:>5} on 16 nodes: {each['speed_up']:.2f} (messages for nothing: {each['speed_up_without']:.2f})"
        for name, each in found["by_model"].items()
    ]
    lines.append(f"published for 16 nodes {found['published_speed_up_16_nodes']}; predicted for 3.7B")
    lines += [f"  {value:5.2f}  {name}" for name, value in found["sensitivity"].items()]
    lines += ["assumed", *(f"  {each}" for each in found["assumed"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    found = report()
    sys.stdout.write(json.dumps(found) + "\n" if parser.parse_args().json else _text(found))


if __name__ == "__main__":
    main()
