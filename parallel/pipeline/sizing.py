"""Step time and memory of a layout of a transformer by closed forms: no schedule is walked, nothing is measured.

Everything is of Lamy-Poirier (arXiv 2106.02679) or follows from counting: flops and bytes of a layer, the windows in
which reductions and gathers hide, the bubble with latency (see `closed_form`). 16-bit weights and gradients, fp32 Adam,
activations recomputed from the inputs of layers, which the ranks of a tensor group share.
"""

from dataclasses import dataclass

from meshwright.parallel.pipeline.closed_form import Pipe, in_flight, makespan

__all__ = ["Device", "Family", "Layout", "memory_bytes", "step_s", "tokens_to_hide"]


@dataclass(frozen=True)
class Device:
    """One accelerator and its links; bytes per second count both directions together.

    Args:
        flops: per second, at peak.
        memory_bytes: of the device.
        island_bytes_per_s: to those that make a tensor group with it.
        network_bytes_per_s: to all others.
    """

    flops: float = 312e12  # A100 80 GB: dense bf16
    memory_bytes: float = 80e9
    island_bytes_per_s: float = 600e9  # NVLink 3
    network_bytes_per_s: float = 50e9  # InfiniBand of 200 Gb/s


@dataclass(frozen=True)
class Family:
    """X_x of the paper: x layers with x heads of size x, sequences of 16 x tokens.

    >>> round(Family(160).parameters / 1e12, 2), int(Family(160).critical_samples)
    (1.26, 2416)
    """

    x: int

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.x**2

    @property
    def tokens(self) -> int:
        """Of one sample."""
        return 16 * self.x

    @property
    def parameters(self) -> float:
        """Of all layers."""
        return 12.0 * self.x**5

    @property
    def critical_samples(self) -> float:
        """The batch above which more samples hardly save steps."""
        return 82.0 * float(self.x ** (2 / 3))

    @property
    def forward_flops(self) -> float:
        """Of one layer and sample: matrices and attention; backward with recomputing takes three times that."""
        return 24 * self.tokens * self.width**2 * (1 + self.tokens / (6 * self.width))

    @property
    def stream_bytes(self) -> int:
        """Of what one layer gives the next for one sample."""
        return 2 * self.tokens * self.width


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who holds what, and in which order micro-batches go.

    Args:
        data: n_b, replicas.
        pipe: n_l, ranks of the pipeline.
        tensor: n_a, ranks that share every layer.
        num_microbatches: n_mu, of one replica and step.
        microbatch_samples: b_mu.
        zero_stage: 0 shares nothing over `data`, 1 optimizer states, 2 and gradients, 3 and parameters.
        schedule: "modular" deals single layers in turn and takes all micro-batches through one before the next; "gpipe"
            and "1f1b" give a rank neighbouring layers.
    """

    data: int
    pipe: int
    tensor: int
    num_microbatches: int
    microbatch_samples: int = 1
    zero_stage: int = 1
    schedule: str = "1f1b"

    @property
    def num_devices(self) -> int:
        """All ranks."""
        return self.data * self.pipe * self.tensor

    @property
    def batch_samples(self) -> int:
        """Of one step."""
        return self.data * self.num_microbatches * self.microbatch_samples

    @property
    def is_layered(self) -> bool:
        """Whether a layer is done with all micro-batches before the next begins."""
        return self.schedule == "modular"


def tokens_to_hide(device: Device, zero_stage: int) -> float:
    """Tokens of a replica that hide its network traffic: per step if layered, else per micro-batch.

    Bytes per parameter are 8 over a backward of 6 flops a token, or 12 over 8 with gathers.

    >>> tokens_to_hide(Device(), 1), tokens_to_hide(Device(), 3)
    (8320.0, 9360.0)
    """
    return (1.5 if zero_stage == 3 else 4 / 3) * device.flops / device.network_bytes_per_s


def memory_bytes(model: Family, layout: Layout) -> float:
    """Peak of one device: states, checkpoints of layer inputs, one layer at work on one micro-batch.

    States are 12 bytes a parameter (Adam and fp32 weights), weights and gradients 2 each; what is shared and not held
    whole needs two layers of buffers. One layer at work: arXiv 2205.05198, s b h (34 + 5 a s / h).

    >>> modular = Layout(data=483, pipe=5, tensor=16, num_microbatches=5, zero_stage=3, schedule="modular")
    >>> round(memory_bytes(Family(160), modular) / 1e9, 1)
    6.2
    """
    held = model.parameters / (layout.pipe * layout.tensor)
    layers = model.x // layout.pipe
    whole = 2 * min(1.0, 2 / layers)  # two layers of weights or gradients, per parameter held

    def spread(share_bytes: float, from_stage: int) -> float:
        return share_bytes / layout.data if layout.zero_stage >= from_stage else share_bytes

    buffers = whole * ((layout.zero_stage >= 2) + (layout.zero_stage == 3))
    states = held * (spread(12, 1) + spread(2, 2) + spread(2, 3) + buffers)
    kept = in_flight(Pipe(layout.pipe, layout.num_microbatches), depth_first=layout.schedule == "1f1b")
    checkpoints = model.stream_bytes * layers * kept * layout.microbatch_samples / layout.tensor
    elements = model.tokens * model.width * 34 + 5 * model.x * model.tokens**2
    return states + checkpoints + elements * layout.microbatch_samples / layout.tensor


def step_s(model: Family, layout: Layout, device: Device) -> float:
    """Time of a step at peak flops: computing, tensor traffic, bubble with latency, and what of the network is exposed.

    >>> modular = Layout(data=483, pipe=5, tensor=16, num_microbatches=6, zero_stage=3, schedule="modular")
    >>> ideal_s = 4 * Family(160).forward_flops * 160 * modular.batch_samples / modular.num_devices / 312e12
    >>> round(step_s(Family(160), modular, Device()) / ideal_s, 2)
    1.19
    """
    forward_s = _layer_s(model, layout, device)
    layers = model.x // layout.pipe
    pipe = Pipe(layout.pipe, layout.num_microbatches, layers if layout.is_layered else 1)
    blocks = 1 if layout.is_layered else layers  # of one stage
    hop_s = model.stream_bytes * layout.microbatch_samples / layout.tensor / (device.network_bytes_per_s / 2)
    piped_s = makespan(pipe, blocks * forward_s, 3 * blocks * forward_s, latency=hop_s)
    network_s, exposed_s = _data_traffic_s(model, layout, device, forward_s=forward_s)
    if layout.pipe > 1:  # both ends of a stage, forward and back: four times a stream, of which a hop moves two
        network_s += 2 * hop_s * pipe.num_loops * layout.num_microbatches
    return max(piped_s + exposed_s, network_s)


def _layer_s(model: Family, layout: Layout, device: Device) -> float:
    """Forward of one layer and micro-batch with its all-reduces over the tensor group.

    There are 6 in all, so 1.5 for each of the four parts that forward, recomputing and backward are.
    """
    compute_s = model.forward_flops / layout.tensor / device.flops
    reduced_bytes = 4 * (layout.tensor - 1) / layout.tensor * model.stream_bytes
    return layout.microbatch_samples * (compute_s + 1.5 * reduced_bytes / device.island_bytes_per_s)


def _data_traffic_s(model: Family, layout: Layout, device: Device, *, forward_s: float) -> tuple[float, float]:
    """Time that replicas need of the network, and how much of it computing does not hide.

    A gather hides behind one layer's forward, a gather and a reduction behind one layer's backward, of all
    micro-batches if layered, of one if not; the first gather and the last reduction behind nothing.
    """
    share = (layout.data - 1) / layout.data
    one_s = 4 * share * model.parameters / (model.x * layout.tensor) / device.network_bytes_per_s  # of a layer
    layers, times = model.x // layout.pipe, 1 if layout.is_layered else layout.num_microbatches
    window_s = forward_s * (layout.num_microbatches if layout.is_layered else 1)
    gathers = times if layout.zero_stage == 3 else 1 if layout.zero_stage else 0
    again = gathers if layout.zero_stage == 3 else 0  # gathers of backward
    reductions = times if layout.zero_stage >= 2 else 1
    size = 1 if layout.zero_stage else 2  # without a partition gradients are all-reduced
    forward_exposed_s = gathers * max(0.0, one_s - window_s)
    busy_s = size * one_s + (one_s if again else 0.0)
    backward_exposed_s = reductions * max(0.0, busy_s - 3 * window_s)
    ends_s = size * one_s + (one_s if gathers else 0.0)
    total_s = layers * one_s * (gathers + again + size * reductions)
    exposed_s = min(total_s, ends_s + (layers - 1) * (forward_exposed_s + backward_exposed_s))
    return total_s, exposed_s
