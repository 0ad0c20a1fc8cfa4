"""Attention as it is defined, with all scores at once: what blockwise attention is compared with."""

from dataclasses import dataclass

import torch
from torch import Tensor

from meshwright.parallel.blockwise.masks import Frame, Mask, Uniform

__all__ = ["Given", "dense_attention", "elements", "relative_error"]


@dataclass
class Given:
    """Tensors of one attention; `all` are those that have gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    sinks: Tensor | None = None

    @classmethod
    def random(
        cls,
        *,
        batch: int = 2,
        heads: tuple[int, int] = (4, 2),
        lengths: tuple[int, int] = (23, 23),
        widths: tuple[int, int] = (8, 8),
        dtype: torch.dtype = torch.float64,
        bias: tuple[int, ...] | None = None,
        sinks: bool = False,
    ) -> "Given":
        """Normal numbers, the same ones for every dtype."""
        generator = torch.Generator().manual_seed(0)

        def made(*sizes: int) -> Tensor:
            drawn = torch.randn(*sizes, generator=generator, dtype=torch.float64)
            return drawn.to(dtype).requires_grad_()

        return cls(
            made(batch, heads[0], lengths[0], widths[0]),
            made(batch, heads[1], lengths[1], widths[0]),
            made(batch, heads[1], lengths[1], widths[1]),
            None if bias is None else made(*bias),
            made(heads[0]) if sinks else None,
        )

    @property
    def all(self) -> list[Tensor]:
        """Those there are."""
        return [each for each in (self.query, self.key, self.value, self.bias, self.sinks) if each is not None]

    def wide(self) -> "Given":
        """The same numbers in float64."""
        return Given(*(None if each is None else _wide(each) for each in vars(self).values()))  # type: ignore[arg-type]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


def dense_attention(
    given: Given,
    *,
    allowed: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    times = given.query.shape[1] // given.key.shape[1]
    key, value = (each.repeat_interleave(times, 1) for each in (given.key, given.value))
    scores = given.query @ key.mT * (given.query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if given.bias is not None:
        scores = scores + given.bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    exponents = [scores]
    if given.sinks is not None:
        exponents.append(given.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1))
    lse = torch.cat(exponents, -1).logsumexp(-1)
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return (probabilities if kept is None else probabilities * kept) @ value, lse


def elements(mask: Mask | None, queries: range, keys: range, *, batch: int = 1, heads: int = 1) -> Tensor:
    """All pairs of a mask, [1 or batch, 1 or heads, queries, keys]."""
    verdict = Uniform.FULL if mask is None else mask.block(queries, keys, Frame(range(batch), range(heads)))
    if isinstance(verdict, Uniform):
        return torch.full((1, 1, len(queries), len(keys)), verdict is Uniform.FULL)
    return verdict.reshape(*(1,) * (4 - verdict.dim()), *verdict.shape)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest expected number; infinities must be at the same places."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach(), expected.detach()
    finite = expected.isfinite()
    assert torch.equal(found[~finite].double(), expected[~finite].double())
    if not bool(finite.any()):
        return 0.0
    difference = (found.double() - expected.double())[finite]
    return float(difference.abs().max() / expected[finite].abs().max().clamp_min(1e-6))
