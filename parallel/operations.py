"""What one operation of torch costs, from the tensors it is given and makes: products, or bytes read and written.

Operations are taken as they are started, one kernel each: every one reads its inputs and writes its outputs. Views move
nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from meshwright.parallel.work import FUNCTIONS, FUSED_BACKWARD, Attention, Product, Sent, Work, besides

__all__ = ["Tally", "moved_bytes", "precision_of", "storage_of", "tensors_of"]

_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "lift_fresh",
    "detach",
}
_OVERWRITES = {"copy_", "zero_", "fill_", "bernoulli_", "normal_", "uniform_"}
"""Those that do not read what they change."""
_DRAWS = {
    "native_dropout",
    "bernoulli",
    "bernoulli_",
    "normal_",
    "uniform_",
    "rand",
    "rand_like",
    "randn",
    "randn_like",
}
"""Those that need a random number for each element of what they make."""
_PICKS = {"embedding", "index_select", "gather", "index", "nll_loss_forward", "nll_loss2d_forward"}
"""Those that read as much of a table as they write."""
_MAKES = {"nll_loss_backward", "nll_loss2d_backward", "embedding_dense_backward"}
"""Those that write a whole tensor of which they fill little."""
_FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": 0,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 1,
}
"""Fused attention: the place of the query among its arguments."""
_PRECISIONS = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}


def storage_of(tensor: Tensor) -> int:
    """What tells one piece of memory from another."""
    return int(tensor.untyped_storage()._cdata)


def precision_of(tensor: Tensor) -> str:
    """Of products with such an operand.

    >>> precision_of(torch.zeros(1, dtype=torch.float16)), precision_of(torch.zeros(1))
    ('bf16', 'fp32')
    """
    return _PRECISIONS.get(tensor.dtype, "fp8")


@dataclass
class Tally:
    """Adds up operations of one block in one direction; those of memory are for others to set."""

    products: list[Product] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    moved_bytes: float = 0.0
    operations: int = 0
    drawn: float = 0.0
    computed: Counter[str] = field(default_factory=Counter)
    sent: list[Sent] = field(default_factory=list)
    saved_bytes: float = 0.0
    working_bytes: float = 0.0
    growing_bytes: float = 0.0
    holding_bytes: float = 0.0

    def note(self, func: Any, args: Any, kwargs: Any, *, made: Any) -> None:
        """Counts one operation.

        >>> tally, one = Tally(), torch.zeros(2, 3)
        >>> tally.note(torch.ops.aten.add.Tensor, (one, one), {}, made=torch.zeros(2, 3))
        >>> tally.moved_bytes, tally.operations
        (48.0, 1)
        """
        name = func._schema.name.removeprefix("aten::")
        given, outputs = tensors_of((args, kwargs)), tensors_of(made)
        if name in _FREE or not outputs or (not func._schema.is_mutable and _is_view(given, outputs)):
            return
        self.operations += 1
        self.drawn += outputs[0].numel() if name in _DRAWS else 0
        function = _function(name, kwargs)
        if function in FUNCTIONS:
            self.computed[function] += outputs[0].numel()
        products = list(_products(name, args, outputs))
        if name in _FUSED:
            self.attentions.append(_fused(name, args))
            self.moved_bytes += sum(map(_bytes, tensors_of(kwargs.get("attn_mask"))))
        elif products:
            self.products += products
        else:
            self.moved_bytes += moved_bytes(name, given, outputs)

    def work(self) -> Work:
        """What was counted."""
        return Work(
            products=tuple(self.products),
            attentions=tuple(self.attentions),
            moved_bytes=self.moved_bytes,
            operations=self.operations,
            drawn=self.drawn,
            computed=tuple(sorted(self.computed.items())),
            sent=tuple(self.sent),
            saved_bytes=self.saved_bytes,
            working_bytes=self.working_bytes,
            growing_bytes=self.growing_bytes,
            holding_bytes=self.holding_bytes,
        )


def moved_bytes(name: str, given: Iterable[Tensor], outputs: Iterable[Tensor]) -> float:
    """Read and written by an operation that is no product.

    Args:
        name: without namespace and overload.
        given: tensors it takes; those given twice are read once.
        outputs: tensors it makes or changes.
    """
    read = {id(each): each for each in given}
    written = {id(each): each for each in outputs}
    if name in _OVERWRITES or (name.endswith("_") and name[:-1] in _OVERWRITES):
        read = {key: each for key, each in read.items() if key not in written}
    written_bytes = sum(map(_bytes, written.values()))
    if name in _PICKS:
        first, *others = read.values()
        return min(_bytes(first), written_bytes) + sum(map(_bytes, others)) + written_bytes
    if name in _MAKES:
        return written_bytes + 2 * min(map(_bytes, read.values()))
    return sum(map(_bytes, read.values())) + written_bytes


def tensors_of(value: Any) -> list[Tensor]:
    """Tensors anywhere in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_view(given: list[Tensor], outputs: list[Tensor]) -> bool:
    known = {storage_of(each) for each in given}
    return bool(outputs) and all(storage_of(each) in known for each in outputs)


def _bytes(tensor: Tensor) -> float:
    """Of its elements, those of expanded dims once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return float(prod(sizes) * tensor.itemsize)


def _fused(name: str, args: Any) -> Attention:
    """A kernel that attends; scores of a mask are all computed, those of a triangle by half."""
    back = _FUSED[name]
    query, key, value = args[back : back + 3]
    rest = args[back + 3 + 2 * back :]  # dropout, and whether it is causal
    share = 0.5 if len(rest) > 1 and rest[1] else 1.0
    seen = query[..., 0].numel() * key.shape[-2] * share
    flops = 2 * seen * (query.shape[-1] + value.shape[-1]) * (FUSED_BACKWARD if back else 1.0)
    return Attention(flops, seen, precision_of(query), besides(share, key.shape[-2], borders=int(share < 1.0)))


def _function(name: str, kwargs: Any) -> str:
    """The name of an operation without what says that it changes its operand, and with how it approximates.

    >>> _function("exp_", {}), _function("gelu", {"approximate": "tanh"})
    ('exp', 'gelu_tanh')
    """
    how = kwargs.get("approximate", "none")
    return name.removesuffix("_") if how == "none" else f"{name}_{how}"


def _products(name: str, args: Any, outputs: list[Tensor]) -> Iterator[Product]:
    if name in ("addmm", "baddbmm"):
        args = args[1:]
    if name in ("mm", "addmm"):
        (m, k), n = args[0].shape, args[1].shape[1]
        yield Product(m, n, k, precision=precision_of(args[0]))
    elif name in ("bmm", "baddbmm"):
        (batch, m, k), n = args[0].shape, args[1].shape[2]
        yield Product(m, n, k, batch, precision=precision_of(args[0]))
    elif name in ("mv", "addmv", "dot"):
        matrix = args[1] if name == "addmv" else args[0]
        yield Product(matrix.numel() // matrix.shape[-1], 1, matrix.shape[-1], precision=precision_of(matrix))
    elif name in ("convolution", "_convolution"):
        yield _convolution(outputs[0], args[1], args[8])
    elif name == "convolution_backward":
        wanted = sum(bool(each) for each in args[10][:2])
        yield from [_convolution(args[0], args[2], args[9])] * wanted


def _convolution(output: Tensor, weight: Tensor, groups: int) -> Product:
    """As a product of pixels with filters; transposed ones take as much."""
    columns, inner = weight.shape[0] // groups, prod(weight.shape[1:])
    rows = output.numel() // output.shape[1]
    return Product(rows, columns, inner, groups, precision=precision_of(weight))
