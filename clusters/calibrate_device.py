"""What operations of eager torch take on one rank of this machine: products, bytes, attention, starts of operations.

Shapes are those of models that such a device trains: small ones on a CPU. Of several samples, each long enough for the
clock, the first quartile counts: other programs only ever make one longer. torch is imported when something is timed.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, prod
from typing import TYPE_CHECKING, Any, Protocol

from meshwright.clusters.calibrate_functions import in_turns, measured_functions, streamed

if TYPE_CHECKING:
    import torch

__all__ = ["PRODUCTS", "measured_device", "quartile_s"]

PRODUCTS: Mapping[str, Sequence[tuple[int, int, int]]] = {
    "cpu": (
        *(
            (tokens, out, width)
            for tokens in (64, 256)
            for width, out in ((64, 64), (64, 256), (256, 256), (256, 1024))
        ),
        *(
            (1024, out, width)
            for width, out in ((64, 256), (128, 128), (256, 64), (256, 1024), (512, 512), (512, 2048))
        ),
        *((width, out, 512) for width, out in ((64, 256), (256, 256), (256, 1024))),  # gradients of weights
    ),
    "cuda": (
        *((tokens, out, width) for tokens in (512, 4096) for width, out in ((1024, 1024), (1024, 4096), (4096, 4096))),
        *((8192, out, width) for width, out in ((512, 512), (4096, 1024), (4096, 14336), (8192, 8192))),
        *((width, out, 8192) for width, out in ((1024, 4096), (4096, 4096), (4096, 14336))),
    ),
}
_BETWEEN = ((1024, 1024), (4096, 1024), (4096, 4096), (8192, 4096), (8192, 8192))  # tokens, width
_BATCHED = ((64, 64, 16, 16), (128, 128, 64, 16), (192, 192, 32, 12), (256, 256, 32, 8))  # m, n, k, products
_MOVED = 2.5 * (
    2 * 2 + 2 * 3 + 2 * 4
)  # elements of the width: two norms, two sums, a wide activation; backward 1.5 times
_ATTENTION = {
    "cpu": ((2, 4, 64, 16), (1, 4, 256, 32), (2, 8, 128, 32), (1, 8, 512, 64)),
    "cuda": ((1, 16, 1024, 64), (1, 32, 4096, 128), (4, 16, 2048, 64), (1, 32, 8192, 128)),
}  # sequences, heads, positions, width of a head
_LEAST_SAMPLE_S, _LEAST_SAMPLES, _MOST_SAMPLES = 2e-4, 5, 40
_TINY = 8  # width of a layer whose work is nothing beside its starts


def quartile_s(
    call: Callable[[], object],
    sync: Callable[[], None],
    *,
    span_s: float = 0.04,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of one call: the first quartile of samples of about `span_s` together, or of five if that is longer.

    >>> 0 <= quartile_s(lambda: None, lambda: None, span_s=0.001) < 0.001
    True
    """
    call()
    sync()
    start_s = clock()
    call()
    sync()
    once_s = max(clock() - start_s, 1e-7)
    repeats = max(1, int(_LEAST_SAMPLE_S / once_s))
    count = max(_LEAST_SAMPLES, min(_MOST_SAMPLES, int(span_s / (once_s * repeats))))
    samples = []
    for _ in range(count):
        start_s = clock()
        for _ in range(repeats):
            call()
        sync()
        samples.append((clock() - start_s) / repeats)
    return statistics.quantiles(samples, n=4, method="inclusive")[0]


class _Timer(Protocol):
    """Seconds of one call on a device."""

    def __call__(self, call: Callable[[], object], *, span_s: float = 0.04) -> float:
        """See `quartile_s`."""
        ...


def _timer(device: "torch.device") -> _Timer:
    """Where one thread computes, its own seconds count, not those in which another program has its processor."""
    import torch

    if device.type == "cuda":
        return partial(quartile_s, sync=torch.cuda.synchronize)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    return partial(quartile_s, sync=_nothing, clock=clock)


def _nothing() -> None:
    """Operations of a CPU are done when they return."""


def measured_device(device: "torch.device", *, brief: bool, begin: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of operations, as plain numbers.

    Args:
        device: where they run.
        brief: fewer shapes and one precision.
        begin: called before each part, with its name.

    Returns:
        products [m, n, k, precision, seconds], memory [bytes, seconds] of what
        stands between products, of a CPU functions {name: [bytes, seconds] of an element} and batched
        [m, n, k, products, seconds], attention [sequences, heads, positions, width, seconds],
        attention_backward (the same), op_s (start of an operation), layer_s (a layer's operations
        in one direction), exponentials_per_s, drawn_per_s (random numbers, written).
    """
    import torch

    timed = _timer(device)
    kinds = {"fp32": torch.float32} if brief else {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cuda":
        kinds = {"bf16": torch.bfloat16, **({} if brief else kinds)}
    found, first = dict[str, Any](products=[]), next(iter(kinds))
    for name, dtype in kinds.items():
        begin(f"products in {name}")
        for m, n, k in PRODUCTS[device.type][:: 3 if brief or name != first else 1]:
            found["products"].append([m, n, k, name, _product_s((m, n, k), device, dtype)])
    begin("memory")
    found |= _unhidden(timed) if device.type == "cpu" else {"memory": [_between(*shape, device) for shape in _BETWEEN]}
    begin("attention")
    found |= _attentions(device)
    begin("starts of operations")
    tiny = torch.zeros(1, device=device)
    return {**found, "op_s": timed(lambda: tiny.add(1.0)), "layer_s": _layer_s(device), **_elements(device)}


def _elements(device: "torch.device") -> dict[str, float]:
    """Of what costs more than its bytes, elements a second."""
    import torch

    timed = _timer(device)
    scores, written = (torch.zeros(2**16, device=device) for _ in range(2))
    return {
        "drawn_per_s": written.numel() / timed(lambda: written.bernoulli_(0.9)),
        "exponentials_per_s": scores.numel() / timed(lambda: torch.exp(scores, out=written)),
    }


def _product_s(shape: tuple[int, int, int], device: "torch.device", dtype: "torch.dtype") -> float:
    """Seconds of one of a linear layer's three products, of which each lies in memory in its own way, on average."""
    import torch
    from torch.nn import functional

    m, n, k = shape
    each = sum(rows * columns for rows, columns in ((m, k), (n, k), (m, n)))

    def operands() -> "list[torch.Tensor]":
        return [torch.randn(*each, device=device).to(dtype) for each in ((m, k), (n, k), (m, n))]

    given = in_turns(operands, dtype.itemsize * each if device.type == "cpu" else inf)

    def three() -> None:
        rows, weight, gradient = next(given)
        functional.linear(rows, weight)
        torch.mm(gradient, weight)
        torch.mm(gradient.T, rows)

    return _timer(device)(three) / 3


def _unhidden(timed: _Timer) -> dict[str, Any]:
    """What a CPU takes for bytes, and besides them."""
    batched = [[*shape, _batched_s(shape, timed)] for shape in _BATCHED]
    return {"memory": streamed(timed), "functions": measured_functions(timed), "batched": batched}


def _batched_s(shape: tuple[int, int, int, int], timed: _Timer) -> float:
    """Seconds of many small products, on average, as they lie where attention is not fused."""
    import torch

    m, n, k, batch = shape
    sizes = ((m, k), (n, k), (m, n))
    given = in_turns(lambda: [torch.randn(batch, *each) for each in sizes], 4 * batch * sum(map(prod, sizes)))

    def three() -> None:
        rows, others, scores = next(given)
        torch.bmm(rows, others.mT)
        torch.bmm(scores, others)
        torch.bmm(scores.mT, rows)

    return timed(three) / 3


def _between(tokens: int, width: int, device: "torch.device") -> list[float]:
    """Bytes and seconds of what stands between a layer's products, forward and backward, as layers are priced."""
    import torch
    from torch.nn import functional

    timed = _timer(device)
    narrow, wide = (
        torch.randn(tokens, width * times, device=device, dtype=torch.bfloat16, requires_grad=True) for times in (1, 4)
    )
    ones = torch.ones_like(narrow)

    def once() -> None:
        one = functional.layer_norm(narrow, (width,)) + narrow
        other = functional.layer_norm(one, (width,)) + one
        inner = functional.gelu(wide)
        torch.autograd.backward([other, inner], [ones, wide.detach()])

    return [_MOVED * narrow.element_size() * tokens * width, timed(once)]


def _attentions(device: "torch.device") -> dict[str, list[list[float]]]:
    """Of fused attention in each direction."""
    both = [(shape, *_attention_s(shape, device)) for shape in _ATTENTION[device.type]]
    return {
        "attention": [[*shape, forward_s] for shape, forward_s, _ in both],
        "attention_backward": [[*shape, backward_s] for shape, _, backward_s in both],
    }


def _attention_s(shape: tuple[int, int, int, int], device: "torch.device") -> tuple[float, float]:
    """Seconds of fused causal attention, forward and backward."""
    import torch
    from torch.nn import functional

    timed = _timer(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (torch.randn(*shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    made = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    ones = torch.ones_like(made)
    with torch.no_grad():
        forward_s = timed(lambda: functional.scaled_dot_product_attention(query, key, value, is_causal=True))
    return forward_s, timed(lambda: torch.autograd.grad(made, (query, key, value), ones, retain_graph=True))


def _layer_s(device: "torch.device") -> float:
    """Seconds that a decoder layer's operations take to start in one direction: a third of forward and backward."""
    import torch
    from torch.nn import functional

    tokens = torch.randn(1, 4, _TINY, device=device, requires_grad=True)
    scale = torch.ones(_TINY, device=device, requires_grad=True)
    weights = [torch.randn(out, into, device=device, requires_grad=True) for out, into in _SIZES]
    qkv, mixed, up, down = weights

    def once() -> None:
        parts = functional.linear(functional.layer_norm(tokens, (_TINY,), scale, scale), qkv).chunk(3, -1)
        query, key, value = (part.view(1, 4, 2, _TINY // 2).transpose(1, 2) for part in parts)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        inner = tokens + functional.linear(seen.transpose(1, 2).reshape(1, 4, _TINY), mixed)
        wide = functional.gelu(functional.linear(functional.layer_norm(inner, (_TINY,), scale, scale), up))
        (inner + functional.linear(wide, down)).sum().backward()

    return _timer(device)(once, span_s=0.2) / 3


_SIZES = ((3 * _TINY, _TINY), (_TINY, _TINY), (4 * _TINY, _TINY), (_TINY, 4 * _TINY))
