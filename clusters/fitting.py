"""Fits of what a machine was measured at to the formulas that trainings are priced with.

Each fit has the least mean absolute error of logarithms of times, and comes with that error.
"""

from collections.abc import Callable, Mapping, Sequence
from math import exp, hypot, log, log2
from statistics import fmean
from typing import Any

from meshwright.parallel.work import FUSED_BACKWARD, Product, besides

__all__ = ["Fit", "attention", "attention_backward", "batched", "by_kind", "memory", "products", "ring"]

_GRID, _ZOOMS = 11, 8
_RINGS = ("all_reduce", "all_gather")
Fit = tuple[tuple[float, ...], float]
"""Numbers, and the mean error."""


def _least(error: Callable[[Sequence[float]], float], *bounds: tuple[float, float]) -> Fit:
    """Numbers of least error: on a grid of logarithms that is drawn closer around the best, again and again."""
    limits = [(log(low), log(high)) for low, high in bounds]
    best = [(low + high) / 2 for low, high in limits]
    widths = [(high - low) / 2 for low, high in limits]
    for _ in range(_ZOOMS):
        points: list[list[float]] = [[]]
        for centre, width, (low, high) in zip(best, widths, limits, strict=True):
            tried = (centre + width * (2 * place / (_GRID - 1) - 1) for place in range(_GRID))
            steps = sorted({min(max(each, low), high) for each in tried})
            points = [[*point, step] for point in points for step in steps]
        best = min(points, key=lambda point: error([exp(each) for each in point]))
        widths = [width / 3 for width in widths]
    found = tuple(exp(each) for each in best)
    return found, error(found)


def _error(predicted: Callable[..., float], told: Sequence[Sequence[Any]]) -> float:
    """Mean absolute logarithm of predicted over measured seconds, which stand last."""
    return fmean(abs(log(predicted(*each[:-1]) / each[-1])) for each in told)


def memory(told: Mapping[str, Any]) -> Fit:
    """Bytes per second of operations between products, and the starts of all of them together."""
    return _least(lambda at: _error(lambda size: at[1] + size / at[0], told["memory"]), (1e8, 1e13), (1e-6, 1e-2))


def products(told: Mapping[str, Any], precision: str, *known: float) -> Fit:
    """FLOP/s of large products, bytes per second of operands, the start of each; all but the first may be known."""
    rows = [[*each[:3], each[4]] for each in told["products"] if each[3] == precision]

    def error(at: Sequence[float]) -> float:
        rate, operands, start_s = (*at, *known)

        def took_s(m: int, n: int, k: int) -> float:
            product = Product(int(m), int(n), int(k), precision=precision)
            return hypot(product.flops / rate, product.bytes() / operands) + start_s

        return _error(took_s, rows)

    bounds = ((1e7, 1e16), (1e8, 1e14), (1e-7, 1e-2))
    return _least(error, *bounds[: 3 - len(known)])


def attention(told: Mapping[str, Any], rate: float, kernel_s: float) -> Fit:
    """Share of the products' rate in fused attention, and exponentials that a score costs."""
    per_s = told["exponentials_per_s"]

    def error(at: Sequence[float]) -> float:
        def took_s(*shape: float) -> float:
            batch, heads, positions, width = shape
            scores = batch * heads * positions**2 * _causal(told, positions)
            return float(4 * scores * width / (rate * at[0]) + scores * at[1] / per_s + kernel_s)

        return _error(took_s, told["attention"])

    return _least(error, (1e-3, 2.0), (1e-2, 1e2))


def attention_backward(told: Mapping[str, Any], rate: float, kernel_s: float, *known: float) -> Fit:
    """Times what FLOPs and exponentials say that backward takes; known is what `attention` found."""
    share, softmax = known

    def error(at: Sequence[float]) -> float:
        def took_s(*shape: float) -> float:
            batch, heads, positions, width = shape
            scores = batch * heads * positions**2 * _causal(told, positions)
            products_s = FUSED_BACKWARD * 4 * scores * width / (rate * share)
            return float(at[0] * (products_s + scores * softmax / told["exponentials_per_s"] + kernel_s))

        return _error(took_s, told["attention_backward"])

    return _least(error, (1e-1, 1e1))


def _causal(told: Mapping[str, Any], positions: float) -> float:
    """Share of scores that causal attention computes."""
    return 0.5 * (1.0 + besides(0.5, int(positions))) if told["device"] == "cpu" else 0.5


def batched(told: Mapping[str, Any], of_products: Sequence[float]) -> Fit:
    """Share of the products' rate in many small ones at once; `of_products` is what `products` found."""
    rate, operands, start_s = of_products

    def error(at: Sequence[float]) -> float:
        def took_s(*sizes: int) -> float:
            m, n, k, batch = sizes
            product = Product(m, n, k, batch, "fp32")
            return hypot(product.flops / (rate * at[0]), product.bytes() / operands) + start_s

        return _error(took_s, told["batched"])

    return _least(error, (1e-2, 2.0))


def ring(told: Mapping[str, Any]) -> Fit:
    """Bytes per second of a ring of all ranks and its latency for each doubling; an all-reduce is two gathers."""
    ranks = told["ranks"]
    rows = [(name, *row) for name, size, *row in told["collectives"] if name in _RINGS and size == ranks]

    def error(at: Sequence[float]) -> float:
        def took_s(name: str, size: float) -> float:
            one_s = at[1] * log2(2 * ranks) + size * (ranks - 1) / ranks / at[0]
            return float(one_s * (2 if name == "all_reduce" else 1))

        return _error(took_s, rows)

    return _least(error, (1e6, 1e13), (1e-7, 1.0))


def by_kind(told: Mapping[str, Any]) -> dict[str, dict[int, Fit]]:
    """Latency and bytes per second of each kind of collective, and of transfers, in groups of each size."""
    rows: dict[str, dict[int, list[list[float]]]] = {}
    for name, size, *row in told["collectives"]:
        rows.setdefault(name, {}).setdefault(size, []).append(row)
    return {name: {size: _straight(each) for size, each in of.items()} for name, of in rows.items()}


def _straight(rows: Sequence[Sequence[float]]) -> Fit:
    return _least(lambda at: _error(lambda size: at[0] + size / at[1], rows), (1e-7, 1.0), (1e6, 1e13))
