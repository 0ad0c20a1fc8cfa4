"""Matrix products of many experts: rows that lie by expert, each group times a matrix of its own.

A loop computes them in any dtype. Torch's own grouped product computes them at once, and is asked where it is exact:

  it refuses float64 and widths that are no multiple of 16 bytes      such products are looped
  it leaves rows behind the last group as memory was                  rows and counts must match, or are refused
  autocast does not know it                                           operands are cast before
  empty groups and absent rows are where kernels of others fail       compared with the loop before the first use

A group without rows has a gradient of zeros, not none: optimizers of all ranks do the same then.
"""

import torch
from torch import Tensor
from torch.nn import functional

from meshwright.moe.assumed import has_values
from meshwright.moe.errors import DispatchError
from meshwright.parallel.thread_state import aside

__all__ = ["agrees", "grouped_product", "looped_product"]

_ALIGNED_BYTES = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_AGREED: dict[tuple[torch.dtype, torch.device], bool] = {}


def grouped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """Each group of rows times its matrix, by the fastest exact way at hand.

    Args:
        rows: [rows, d_in], group by group.
        matrices: [groups, d_in, d_out].
        counts: int64 [groups], rows of each; zeros are ordinary.

    Returns:
        [rows, d_out]

    Raises:
        DispatchError: for shapes that do not fit.

    >>> rows, matrices = torch.tensor([[1.0], [2.0]]), torch.tensor([[[5.0]], [[7.0]], [[9.0]]])
    >>> grouped_product(rows, matrices, torch.tensor([1, 0, 1])).tolist()
    [[5.0], [18.0]]
    """
    _check(rows, matrices, counts)
    rows, matrices = _as_autocast(rows), _as_autocast(matrices)
    if _fits(rows, matrices) and _trusted(rows):
        return _by_torch(rows, matrices, counts)
    return looped_product(rows, matrices, counts)


def looped_product(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """The same, one group after the other."""
    groups = zip(rows.split(counts.tolist()), matrices.unbind(0), strict=True)
    return torch.cat([part @ matrix for part, matrix in groups])


def agrees(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's grouped product gives what the loop gives, and its gradients: groups of any size, some empty.

    Args:
        dtype: of the tensors.
        device: where they are.
    """
    try:
        return all(_same(counts, dtype, device) for counts in ([3, 0, 17, 1], [0, 0, 8, 0], [16, 5, 0, 0]))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return False


def _by_torch(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    made: Tensor = functional.grouped_mm(rows.contiguous(), matrices, offs=ends)
    return made


def _as_autocast(tensor: Tensor) -> Tensor:
    """As autocast hands tensors to products; it does not know the grouped one."""
    kind = tensor.device.type
    if not torch.is_autocast_enabled(kind) or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))


def _fits(rows: Tensor, matrices: Tensor) -> bool:
    widths = (matrices.shape[1] * rows.element_size(), matrices.shape[2] * rows.element_size())
    first = matrices.data_ptr() if has_values(matrices) else matrices.storage_offset() * matrices.element_size()
    aligned = not any(width % _ALIGNED_BYTES for width in (*widths, first))
    plain = matrices.is_contiguous() or matrices.mT.is_contiguous()
    return rows.dtype in _DTYPES and matrices.dtype == rows.dtype and len(rows) > 0 and aligned and plain


def _trusted(rows: Tensor) -> bool:
    place = (rows.dtype, rows.device)
    if not has_values(rows):  # stands for a device that has it
        return True
    if place not in _AGREED:
        _AGREED[place] = aside(agrees, *place)  # hooks and modes of the pass that asks first are not its own
    return _AGREED[place]


def _same(counts: list[int], dtype: torch.dtype, device: torch.device) -> bool:
    numbers = torch.arange(4 * 32 * 48, device=device, dtype=torch.float64)
    rows = (numbers[: sum(counts) * 32] * 0.7).sin().view(-1, 32)
    matrices = (numbers * 1.1).sin().view(4, 48, 32)
    gradient = (numbers[: sum(counts) * 48] * 1.3).sin().view(-1, 48)
    results = []
    for product, kind in ((_by_torch, dtype), (looped_product, torch.float64)):
        leaves = [each.to(dtype).to(kind).requires_grad_() for each in (rows, matrices)]
        made = product(leaves[0], leaves[1].mT, torch.tensor(counts, device=device))
        results.append((made, *torch.autograd.grad(made, leaves, gradient.to(dtype).to(kind))))
    bound = (2 if dtype.itemsize < 4 else 64) * torch.finfo(dtype).eps  # narrow ones are added in float32
    return all(bool(((a - b).abs() <= bound * b.abs().amax()).all()) for a, b in zip(*results, strict=True))


def _check(rows: Tensor, matrices: Tensor, counts: Tensor) -> None:
    if rows.dim() != 2 or matrices.dim() != 3 or matrices.shape[1] != rows.shape[1]:
        raise DispatchError(
            f"rows {list(rows.shape)} and matrices {list(matrices.shape)} of experts; they are [rows, d_in] and "
            "[experts, d_in, d_out]"
        )
    if tuple(counts.shape) != (len(matrices),) or int(counts.sum()) != len(rows):
        raise DispatchError(
            f"{len(rows)} rows for {len(matrices)} experts that get {counts.tolist()}; counts say how many rows of "
            "each expert stand together, and leave none over"
        )
