"""Logits whose routing is known to the last digit; t counts tokens, e, i and j experts, nodes and experts of a node."""

import torch
from torch import Tensor

__all__ = ["flat_logits", "inter_logits", "intra_logits"]


def flat_logits(num_experts: int = 4, num_tokens: int = 8) -> Tensor:
    """sin(0.7 t + 1.3 e + 0.1 t e), float64 [tokens, num_experts]"""
    t, e = _grid(num_tokens, num_experts)
    return torch.sin(0.7 * t + 1.3 * e + 0.1 * t * e)


def inter_logits(num_nodes: int = 2, num_tokens: int = 8) -> Tensor:
    """sin(0.7 t + 1.3 i), float64 [tokens, num_nodes]"""
    t, i = _grid(num_tokens, num_nodes)
    return torch.sin(0.7 * t + 1.3 * i)


def intra_logits(num_local: int = 4, num_tokens: int = 8) -> Tensor:
    """cos(0.5 t + 0.9 j), float64 [tokens, num_local]"""
    t, j = _grid(num_tokens, num_local)
    return torch.cos(0.5 * t + 0.9 * j)


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(columns, dtype=torch.float64)[None]
