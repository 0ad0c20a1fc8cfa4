"""The best of very many experts by product keys: one half of a query scores rows, the other half columns.

Expert (i, j) of n x n scores q1 . a_i + q2 . b_j. Its best k lie among the k best rows and the k best columns, so
2 n + k^2 scores are made in place of n^2 (PEER, arXiv 2407.04153; product keys, arXiv 1907.05242).
"""

import torch
from torch import Tensor

from meshwright.moe.errors import RoutingError
from meshwright.moe.routing import Routing, first_largest

__all__ = ["product_top_k"]


def product_top_k(queries: Tensor, rows: Tensor, columns: Tensor, *, k: int) -> Routing:
    """The k best of n x m experts for each query, weighted by the softmax of their scores.

    Args:
        queries: [tokens, 2 d], with gradients.
        rows: [n, d] keys for the first half of a query.
        columns: [m, d] keys for the second half; expert (i, j) is number i m + j.
        k: experts of a token.

    Raises:
        RoutingError: for shapes that do not fit, or a k above what there is.

    >>> keys = torch.tensor([[1.0], [2.0]])
    >>> product_top_k(torch.tensor([[1.0, -0.5]]), keys, keys, k=2).experts.tolist()
    [[2, 3]]
    """
    _check(queries, rows, columns, k=k)
    n, m = len(rows), len(columns)
    first, second = queries.chunk(2, dim=-1)
    wide = torch.promote_types(queries.dtype, torch.float32)
    of_rows, of_columns = first.to(wide) @ rows.to(wide).mT, second.to(wide) @ columns.to(wide).mT
    best_rows, best_columns = first_largest(of_rows.detach(), min(k, n)), first_largest(of_columns.detach(), min(k, m))
    sums = of_rows.gather(1, best_rows)[:, :, None] + of_columns.gather(1, best_columns)[:, None]
    ids = (best_rows[:, :, None] * m + best_columns[:, None]).flatten(1)
    order = first_largest(sums.detach().flatten(1), k)
    weights = sums.flatten(1).gather(1, order).softmax(-1)
    yes = torch.ones_like(order, dtype=torch.bool)
    return Routing(experts=ids.gather(1, order), weights=weights, asked=yes, kept=yes, num_experts=n * m)


def _check(queries: Tensor, rows: Tensor, columns: Tensor, *, k: int) -> None:
    width = rows.shape[-1]
    if queries.dim() != 2 or rows.dim() != 2 or columns.shape[1:] != rows.shape[1:] or queries.shape[1] != 2 * width:
        raise RoutingError(
            f"queries {list(queries.shape)}, rows {list(rows.shape)} and columns {list(columns.shape)}; they are "
            "[tokens, 2 d], [n, d] and [m, d]"
        )
    if not 1 <= k <= len(rows) * len(columns):
        raise RoutingError(f"k={k} of {len(rows)} x {len(columns)} experts: use 1 to {len(rows) * len(columns)}")
