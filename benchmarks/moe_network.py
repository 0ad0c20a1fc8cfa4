"""A layer of experts on four nodes of two ranks: two levels against flat routing, ours and DeepSpeed's.

Nodes are network namespaces whose links are slow; ranks of a node talk freely. All contenders of a case have the same
tokens, experts and choices of a token, and are timed forward and backward, in turn. What a node's link carried is read
from its network device; messages are counted at the calls, rows from the choices of all ranks.

`delay` is what a message to another node costs its sender besides its bytes, as launching one over a fast network does:
the same sleep before every collective of every contender, for each rank of another node that it talks to.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

import meshwright as mw
from benchmarks.link import addresses, missing, slow_link
from benchmarks.moe_layers import Network, OurLayer, Sizes, deepspeed_layer, step_of, tokens_of, weights_of
from benchmarks.timing import alternate
from meshwright.moe import flight
from meshwright.moe.axes import ExpertAxes, RowAxis, expert_axes
from meshwright.moe.bilevel import BiLevel
from meshwright.moe.capacity import Capacity
from meshwright.moe.dispatch import sort_choices
from meshwright.moe.once import visit_once
from meshwright.moe.top_k import TopK
from meshwright.moe.traffic import HopTraffic, traffic, traffic_once
from meshwright.moe.transport_once import Once
from meshwright.moe.transports import TransportKind
from meshwright.moe.travel import Splits
from meshwright.parallel.collectives import Groups

__all__ = ["CASES", "EACH", "NODES", "Counted", "measured", "serve_rank"]

NODES, EACH = 4, 2
RANKS = NODES * EACH
CASES = {
    "top-1": Sizes(tokens=512, width=256, inner=128, experts=RANKS, k=1),
    "top-8": Sizes(tokens=128, width=256, inner=32, experts=4 * RANKS, k=8),
}
_SHARED_INNER = 512
_HALVES_INNER = 1024  # experts compute about as long as rows are on their way
_SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
_COLLECTIVES = ("all_to_all_single", "all_gather_into_tensor", "all_reduce")
Step = Callable[[], Tensor]


class Counted:
    """Collectives of this process: to how many ranks each sends; each may be made to cost more.

    Args:
        rank: this one.
    """

    def __init__(self, rank: int) -> None:
        self.peers: list[tuple[str, int]] = []
        self._node = rank // EACH

    @contextmanager
    def delayed(self, delay_s: float) -> Iterator[None]:
        """While it lasts, each message to another node takes so much longer."""
        with patch.multiple(dist, **{name: self._noted(name, delay_s) for name in _COLLECTIVES}):
            yield

    def _noted(self, name: str, delay_s: float) -> Callable[..., Any]:
        inner = getattr(dist, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            ranks = dist.get_process_group_ranks(kwargs.get("group"))
            self.peers.append((name, len(ranks) - 1))
            time.sleep(delay_s * sum(rank // EACH != self._node for rank in ranks))
            return inner(*args, **kwargs)

        return noted


def _layers(case: str, axes: ExpertAxes) -> dict[str, nn.Module]:
    sizes, rank = CASES[case], axes.ep.rank
    flat = TopK(num_experts=sizes.experts, k=sizes.k, renormalise=sizes.k > 1)
    many = sizes.k > 1
    levels = BiLevel(
        num_nodes=NODES,
        num_local=sizes.experts // NODES,
        k_nodes=2 if many else 1,
        k_local=sizes.k // 2 if many else 1,
        renormalise=many,
    )
    slots = replace(levels, capacity=Capacity(factor=1.0))
    two_hops: TransportKind = "once" if many else "inter_first"
    return {
        "bi-level": OurLayer(sizes, axes, router=levels, kind=two_hops),
        "bi-level, dropping": OurLayer(sizes, axes, router=slots, kind=two_hops),
        "flat by two hops": OurLayer(sizes, axes, router=flat, kind=two_hops),
        "flat": OurLayer(sizes, axes, router=flat, kind="one_hop"),
        "flat again": OurLayer(sizes, axes, router=flat, kind="one_hop"),
        "DeepSpeed, dropping": deepspeed_layer(sizes, ranks=RANKS, rank=rank, drop_tokens=True),
        "DeepSpeed": deepspeed_layer(sizes, ranks=RANKS, rank=rank, drop_tokens=False),
    }


def _shared(rounds: int) -> dict[str, Any]:
    """On a rank, seconds per step with a shared network that computes while rows fly, or waits until they arrived."""
    rank, sizes = dist.get_rank(), CASES["top-1"]
    axes = expert_axes(Groups(mw.Mesh(dp=RANKS, ep=RANKS, ep_node=NODES)))
    _, up, down = weights_of(replace(sizes, inner=_SHARED_INNER, experts=1))
    router = BiLevel(num_nodes=NODES, num_local=EACH)
    layer = OurLayer(sizes, axes, router=router, kind="inter_first", shared=Network(up[0], down[0]))
    flying = step_of(layer, tokens_of(sizes, rank))

    def at_once(axis: RowAxis, rows: Tensor, splits: Splits) -> Callable[[], Tensor]:
        made = axis.exchange(rows, splits.sent, splits.received)
        return lambda: made

    def waiting() -> Tensor:
        with patch.object(flight, "begun", at_once):
            return flying()

    steps = {"flying": flying, "waiting": waiting, "waiting again": waiting}
    same = torch.equal(flying(), waiting())
    return {"times": alternate(steps, rounds=rounds, steps=1, warmup=1, sync=dist.barrier), "same": same}


def _halves(rounds: int) -> dict[str, Any]:
    """On a rank, seconds per step with tokens that travel in two halves, or whole."""
    rank, sizes = dist.get_rank(), replace(CASES["top-1"], inner=_HALVES_INNER)
    axes = expert_axes(Groups(mw.Mesh(dp=RANKS, ep=RANKS, ep_node=NODES)))
    router, tokens = TopK(num_experts=RANKS, k=1), tokens_of(sizes, rank)
    whole, halves = (
        step_of(OurLayer(sizes, axes, router=router, kind="one_hop", halves=each), tokens) for each in (False, True)
    )
    steps = {"halves": halves, "whole": whole, "whole again": whole}
    difference = float((halves() - whole()).abs().max() / whole().abs().max())
    times = alternate(steps, rounds=rounds, steps=1, warmup=1, sync=dist.barrier)
    return {"times": times, "difference": difference}


def _measure(case: str, rounds: int, delay_s: float) -> dict[str, Any]:
    """On a rank, seconds per step and what was sent, by contender."""
    torch.set_num_threads(1)
    rank = dist.get_rank()
    axes = expert_axes(Groups(mw.Mesh(dp=RANKS, ep=RANKS, ep_node=NODES)))
    tokens, layers, counted = tokens_of(CASES[case], rank), _layers(case, axes), Counted(rank)
    steps = {name: step_of(layer, tokens) for name, layer in layers.items()}
    sent = {name: _sent_by(steps[name], counted) for name in steps}
    made = {name: step() for name, step in steps.items()}
    found: dict[str, Any] = {
        "sent": sent,
        "rows": _rows(layers, tokens, CASES[case]),
        "difference": float((made["flat"] - made["DeepSpeed"]).abs().max() / made["flat"].abs().max()),
        "times": alternate(steps, rounds=rounds, steps=1, warmup=1, sync=dist.barrier),
    }
    if delay_s and case == "top-1":  # with top-8 it is bytes that count
        with counted.delayed(delay_s):
            found["delayed"] = alternate(steps, rounds=rounds, steps=1, warmup=1, sync=dist.barrier)
    return found


def _sent_by(step: Step, counted: Counted) -> dict[str, Any]:
    """Of a step: bytes that left this node, messages of an exchange of rows, and of all other collectives."""
    step()
    counted.peers.clear()
    dist.barrier()
    before = _device_bytes()
    with counted.delayed(0.0):
        step()
    dist.barrier()
    rows = [peers for name, peers in counted.peers if name == "all_to_all_single"]
    others = [peers for name, peers in counted.peers if name != "all_to_all_single"]
    exchanges = 4  # there and back, of rows and of gradients
    return {
        "link_bytes": _device_bytes() - before,
        "messages": sum(rows) / exchanges,
        "other_messages": sum(others),
    }


def _device_bytes() -> int:
    return int(_SENT.read_text()) if _SENT.exists() and "MESHWRIGHT_NODE" in os.environ else 0


def _rows(layers: dict[str, nn.Module], tokens: Tensor, sizes: Sizes) -> dict[str, Any]:
    """Of our layers, rows between nodes on the way to experts, for each token of all ranks, and their bytes."""
    found = {}
    row_bytes = sizes.width * tokens.element_size()
    for name, layer in layers.items():
        if not isinstance(layer, OurLayer) or name == "flat again":
            continue
        routing = layer.route(tokens)
        own = (sort_choices(routing).counts, visit_once(routing, num_nodes=NODES).departure.counts)
        counts, visits = (_of_all(each) for each in own)
        hops: tuple[HopTraffic, ...] = traffic(counts, row_bytes=row_bytes, num_nodes=NODES)
        if isinstance(layer.transport, Once):
            visit_bytes = row_bytes + 8 * sizes.k  # and an int32 and a float32 for each choice
            hops = traffic_once(counts, visits, row_bytes=row_bytes, visit_bytes=visit_bytes)
        found[name] = {
            "rows_between_nodes": hops[0].rows_between_nodes,
            "bytes_between_nodes": hops[0].bytes_between_nodes,
            "nodes_of_a_token": int(visits.sum()) / (RANKS * sizes.tokens),
        }
    return found


def _of_all(counts: Tensor) -> Tensor:
    parts = [torch.empty_like(counts) for _ in range(RANKS)]
    dist.all_gather(parts, counts)
    return torch.stack(parts)


def serve_rank(rank: int, rounds: int, delay_s: float) -> None:
    """What one of the processes that `measured` starts does."""
    os.environ["LOCAL_RANK"] = str(rank % EACH)
    address = os.environ["MESHWRIGHT_HOST"]
    dist.init_process_group("gloo", init_method=f"tcp://{address}:29417", rank=rank, world_size=RANKS)
    found = {
        "shared": _shared(rounds),
        "halves": _halves(rounds),
        **{case: _measure(case, rounds, delay_s) for case in CASES},
    }
    if rank == 0:
        Path(os.environ["MEASURED"]).write_text(json.dumps(found))
    dist.destroy_process_group()


def measured(rate_mbit_s: float, rounds: int, delay_s: float) -> dict[str, Any]:
    """What rank 0 measured, by case; without root, or with a rate of 0, on this machine's own network."""
    words = [sys.executable, "-m", "benchmarks.moe", "--rounds", str(rounds), "--delay", str(delay_s * 1e3)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "measured.json"
        if missing() is None and rate_mbit_s:
            with slow_link(rate_mbit_s, hosts=NODES) as hosts:
                named = {"GLOO_SOCKET_IFNAME": "eth0", "MESHWRIGHT_HOST": addresses()[0], "MESHWRIGHT_NODE": "1"}
                _run([[*hosts[rank // EACH], *words] for rank in range(RANKS)], {**named, "MEASURED": str(out)})
        else:
            named = {"GLOO_SOCKET_IFNAME": "lo", "MESHWRIGHT_HOST": "127.0.0.1"}
            _run([words] * RANKS, {**named, "MEASURED": str(out)})
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def _run(commands: list[list[str]], named: dict[str, str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **named}
    ranks = [
        subprocess.Popen([*words, "--rank", str(rank)], env=environment, stdout=sys.stderr)
        for rank, words in enumerate(commands)
    ]
    if any([each.wait() for each in ranks]):
        raise SystemExit("a rank failed; its error is above")
