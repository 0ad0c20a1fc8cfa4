"""How much of the promised hardware a training reaches: few numbers for all of them, fitted to published runs.

Times add up where a smooth maximum would say nothing more: a product takes its FLOPs, its bytes and its start, so small
and thin ones are slow by themselves. Collectives are latency and bytes over the slowest link of a ring. The numbers
stand in `catalog/efficiency.yaml`, which says from what rows and with what error they were fitted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import hypot, log2
from pathlib import Path
from typing import Any

from meshwright.clusters.hardware import Gpu, host_link
from meshwright.clusters.simulated.cluster import Cluster, Group
from meshwright.parallel.errors import WrapError
from meshwright.parallel.work import Attention, Product, Work

__all__ = ["FILE", "Compute", "Efficiency", "Links", "Reserves", "Unhidden", "fitted"]

FILE = Path(__file__).parents[1] / "catalog" / "efficiency.yaml"
_WIDE = {"fp32": 1.0, "fp64": 0.5}  # rates over that of fp32
_HOST_LINK = 0.8  # of the link to the host's memory, what copies reach: PCI Express in SimAI's constants
_ALIGNED = 8  # elements of 2 bytes in the 16 that tensor cores load at once


@dataclass(frozen=True, kw_only=True)
class Unhidden:
    """What a CPU takes longer for than for the bytes and FLOPs of it; a GPU hides that behind its memory.

    Args:
        drawn_s: to draw one random number, besides writing it.
        function_s: name of `parallel.work.FUNCTIONS` -> for one element of it, besides its bytes.
        batched: share of the products' rate in many small ones at once.
    """

    drawn_s: float = 0.0
    function_s: Mapping[str, float] = field(default_factory=dict)
    batched: float = 1.0

    def took_s(self, work: Work) -> float:
        """Seconds of a work besides its bytes."""
        functions_s = sum(number * self.function_s.get(name, 0.0) for name, number in work.computed)
        return work.drawn * self.drawn_s + functions_s


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What one GPU reaches.

    Args:
        matmul: share of the rate that large products were measured at.
        hopper: the same of 16-bit products on Hopper, besides; its clocks give way under real loads.
        narrow: the same in precisions below 16 bits, besides.
        attention: share of that rate in fused attention, besides its exponentials.
        softmax: exponentials that the work on one score of fused attention costs as much as.
        memory: share of the memory's rate.
        kernel_s: from the start of a product to its full rate and from there to its end.
        host_s: to start the operations of one layer in one direction; a floor.
        waiting_s: the same where the host waits for the GPU in each layer; on top.
        unaligned: slow-down of products whose inner width is no multiple of 16 bytes.
        attention_backward: times what FLOPs and exponentials of fused attention say that backward takes.
        unhidden: what a CPU takes besides.
    """

    matmul: float
    hopper: float
    narrow: float
    attention: float
    softmax: float
    memory: float
    kernel_s: float
    host_s: float
    waiting_s: float
    unaligned: float
    attention_backward: float = 1.0
    unhidden: Unhidden = field(default_factory=Unhidden)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What collectives reach.

    Args:
        nvlink: share of the links' rate within a node.
        nvlink_s: latency of one collective within a node, for each doubling of ranks.
        network: share of the network's rate.
        network_s: latency of a step of a ring to the next node.
        exposed: share of an overlapped collective of dp or cp that is seen nevertheless.
        tp_exposed: the same of tp.
        transfer: share of transfers between stages that is seen.
        stage_s: until a stage has begun a micro-batch in one direction: host and neighbours wait for each other.
        straggling: what each doubling of nodes adds to a step, as a share.
        unsteady: seconds that ranks wait for the slowest after computing for one second; they grow with the root.
        unit_s: what a unit of `fully_shard` keeps a CPU from computing with each gather and each reduction.
        measured: kind of collective, or "send" -> ranks of a group -> seconds until something has moved, and bytes per
            second, with all groups of so many at work. What is not measured is a ring.
    """

    nvlink: float
    nvlink_s: float
    network: float
    network_s: float
    exposed: float
    tp_exposed: float
    transfer: float
    stage_s: float
    straggling: float
    unsteady: float = 0.0
    unit_s: float = 0.0
    measured: Mapping[str, Mapping[int, Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reserves:
    """Memory that no tensor of the model explains.

    Args:
        fragmentation: held by the allocator, as a share of activations.
        overhead_bytes: of the driver, of collectives, of the framework.
    """

    fragmentation: float
    overhead_bytes: float


@dataclass(frozen=True)
class Efficiency:
    """Shares and latencies of one way to train: those of GPUs, those of links; and memory held in reserve."""

    compute: Compute
    links: Links
    reserves: Reserves

    def busy_s(self, work: Work, gpu: Gpu, *, backward: bool = False) -> float:
        """Seconds that a GPU computes: every product, attention and other operation after the one before."""
        products_s = sum(self.matmul_s(each, gpu) for each in work.products)
        attentions_s = sum(self.attention_s(each, gpu) for each in work.attentions)
        attentions_s *= self.compute.attention_backward if backward else 1.0
        between_s = self.memory_s(work.moved_bytes, gpu) + self.compute.unhidden.took_s(work)
        return products_s + between_s + attentions_s

    def matmul_s(self, product: Product, gpu: Gpu) -> float:
        """Seconds of one product, which computes while it reads and writes."""
        rate = self.flops_per_s(gpu, product.precision)
        slower = 1.0 if product.k % _ALIGNED == 0 and product.n % _ALIGNED == 0 else self.compute.unaligned
        slower /= self.compute.unhidden.batched if product.batch > 1 else 1.0
        rate_of_operands = (gpu.operand_bytes_per_s or gpu.memory_bytes_per_s) * self.compute.memory
        moved_s = (product.bytes() + product.more_bytes) / rate_of_operands
        return hypot(product.flops / rate * slower, moved_s) + self.compute.kernel_s

    def flops_per_s(self, gpu: Gpu, precision: str = "bf16") -> float:
        """What large products reach; never less than in 16 bits where they are narrower, and half in fp64 of fp32."""
        if precision in _WIDE:
            return gpu.matmul_flops_per_s("fp32") * self.compute.matmul * _WIDE[precision]
        wide = gpu.matmul_flops_per_s("bf16") * self.compute.matmul
        wide *= self.compute.hopper if gpu.generation == "hopper" else 1.0
        narrow = gpu.matmul_flops_per_s(precision) * self.compute.matmul * self.compute.narrow
        return wide if precision == "bf16" else max(wide, narrow)

    def memory_s(self, num_bytes: float, gpu: Gpu) -> float:
        """Seconds to read and write so many bytes in all."""
        return num_bytes / (gpu.memory_bytes_per_s * self.compute.memory)

    def attention_s(self, attention: Attention, gpu: Gpu) -> float:
        """Seconds of fused attention in one direction."""
        rate = self.flops_per_s(gpu, attention.precision) * self.compute.attention
        exponentials_s = attention.scores * self.compute.softmax / gpu.exponentials_per_s
        more = attention.besides if gpu.generation == "cpu" else 0.0
        return (attention.flops / rate + exponentials_s) * (1.0 + more) + self.compute.kernel_s

    def host_s(self, num_bytes: float, gpu: Gpu) -> float:
        """Seconds to copy so many bytes between a GPU and the host's memory; of a CPU, within its own.

        Raises:
            WrapError: for a GPU whose link nobody knows.
        """
        if gpu.generation == "cpu":
            return self.memory_s(2 * num_bytes, gpu)
        link = host_link(gpu.name)
        if link is None:
            raise WrapError(
                f"nobody knows how fast {gpu.name} reaches its host's memory; take a GPU of the catalog (--gpu), or "
                "keep everything on the GPU"
            )
        return num_bytes / (link * _HOST_LINK)

    def floor_s(self, busy_s: float, passes: float, *, in_series: bool = False) -> float:
        """Seconds of a layer whose GPU is busy for `busy_s` while the host starts `passes` times its operations.

        A smooth maximum: host and GPU each wait for the other now and then where both take as long. The sum where the
        host waits for the GPU before it goes on.
        """
        if in_series:
            return busy_s + passes * self.compute.waiting_s
        host_s = passes * self.compute.host_s
        return float((busy_s**4 + host_s**4) ** 0.25)

    def gather_s(self, num_bytes: float, group: Group) -> float:
        """Seconds of an all-gather or reduce-scatter of `num_bytes` in all; an all-reduce takes two.

        A ring: each rank sends all but its own part (Patarasu and Yuan, 2009).
        """
        if group.size == 1:
            return 0.0
        share = self.links.nvlink if group.nodes == 1 else self.links.network
        latency = self.links.nvlink_s * log2(2 * min(group.size, group.per_node))
        latency += self.links.network_s * (group.nodes - 1)
        return latency + num_bytes * (group.size - 1) / group.size / (group.bytes_per_s * share)

    def collective_s(self, kind: str, num_bytes: float, group: Group) -> float:
        """Seconds of a collective of `num_bytes` in all, as it was measured, or as a ring.

        Args:
            kind: "all_reduce", "all_gather", "reduce_scatter".
            num_bytes: of the whole tensor.
            group: ranks.
        """
        if group.size == 1:
            return 0.0
        known = self.measured_s(kind, num_bytes, group.size)
        if known is not None:
            return known
        return (2 if kind == "all_reduce" else 1) * self.gather_s(num_bytes, group)

    def measured_s(self, kind: str, num_bytes: float, ranks: int) -> float | None:
        """Seconds, where that kind was measured: among so many ranks, the next more, or else the most."""
        known = self.links.measured.get(kind)
        if not known:
            return None
        latency_s, bytes_per_s = known[min((each for each in known if each >= ranks), default=max(known))]
        return latency_s + num_bytes / bytes_per_s

    def waits_s(self, busy_s: float, times: float) -> float:
        """Seconds that a rank waits for slower ones when all meet so often while they compute.

        Delays come at any time, one from the other apart, so that what ranks differ by between two meetings grows with
        the root of the time between.
        """
        return float(self.links.unsteady * (busy_s * times) ** 0.5)

    def hop_s(self, num_bytes: float, group: Group) -> float:
        """Seconds until every rank of a ring has what the one before sent."""
        share = (group.size - 1) / group.size  # of an all-to-all of so much leaves a rank
        known = self.measured_s("all_to_all", num_bytes / share, group.size)
        if known is not None:
            return known
        within = group.nodes == 1
        latency_s, reached = (
            (self.links.nvlink_s, self.links.nvlink) if within else (self.links.network_s, self.links.network)
        )
        return latency_s + num_bytes / (group.bytes_per_s * reached)

    def send_s(self, num_bytes: float, cluster: Cluster, stride: int) -> float:
        """Seconds to send so many bytes to the rank `stride` away."""
        known = self.measured_s("send", num_bytes, 2)
        if known is not None:
            return known
        within = stride < cluster.gpus_per_node
        if within:
            return self.links.nvlink_s + num_bytes / (cluster.gpu.nvlink_bytes_per_s * self.links.nvlink)
        return self.links.network_s + num_bytes / (cluster.network * self.links.network)


@cache
def fitted() -> Efficiency:
    """The numbers of the catalog."""
    import yaml

    told: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return Efficiency(Compute(**told["compute"]), Links(**told["links"]), Reserves(**told["reserves"]))
