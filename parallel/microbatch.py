"""Batches cut into micro-batches along dim 0, whatever their structure."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from meshwright.parallel.errors import BatchError

__all__ = ["call", "check_constant", "num_samples", "share", "split", "to_device"]


def num_samples(batch: Any) -> int:
    """Size of dim 0, which all tensors of the batch must share.

    >>> num_samples({"x": torch.zeros(4, 2), "scale": torch.tensor(1.0)})
    4

    Raises:
        BatchError: when there is no such tensor, or sizes differ.
    """
    sizes = {name: tensor.shape[0] for name, tensor in _tensors(batch, "batch") if tensor.dim() > 0}
    if not sizes:
        raise BatchError(f"the batch ({type(batch).__name__}) holds no tensor with a dim 0 of samples")
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise BatchError(f"tensors of one batch differ in dim 0 (samples): {shown}")
    return next(iter(sizes.values()))


def split(batch: Any, parts: int) -> list[Any]:
    """Cuts a batch into `parts` along dim 0, the first ones a sample larger where it does not divide.

    0-dim tensors and other values go into every part. A list of `parts` batches is taken as cut already.

    >>> [part["x"].tolist() for part in split({"x": torch.arange(5)}, 2)]
    [[0, 1, 2], [3, 4]]

    Raises:
        BatchError: when there are fewer samples than parts.
    """
    if isinstance(batch, list) and batch and not isinstance(batch[0], Tensor):
        if len(batch) != parts:
            raise BatchError(f"a list of {len(batch)} micro-batches was given for num_microbatches={parts}")
        for each in batch:
            num_samples(each)  # refuses one that has none, or whose tensors differ
        return list(batch)
    samples = num_samples(batch)
    if samples < parts:
        raise BatchError(
            f"{samples} samples cannot make {parts} micro-batches; give at least {parts} samples per rank "
            f"or set num_microbatches to at most {samples}"
        )
    tensors = {id(tensor): tensor for _, tensor in _tensors(batch, "batch")}
    cut = {key: tensor.tensor_split(parts) if tensor.dim() else [tensor] * parts for key, tensor in tensors.items()}
    return [_map(batch, lambda tensor, index=index: cut[id(tensor)][index]) for index in range(parts)]


def check_constant(batch: Any) -> None:
    """Refuses a batch that something outside of the model waits for gradients of.

    Raises:
        BatchError: naming the tensor.
    """
    for name, tensor in _tensors(batch, "batch"):
        if tensor.requires_grad:
            raise BatchError(
                f"{name} requires a gradient, which schedules do not give; make what it comes from a part of the "
                "model, or use schedule='accumulate'"
            )


def share(batch: Any, index: int, parts: int) -> Any:
    """Part `index` of `parts` of a batch along dim 0; may be empty where samples are few.

    >>> share((torch.arange(5), "tag"), 1, 2)
    (tensor([3, 4]), 'tag')
    """
    return _map(batch, lambda tensor: tensor.tensor_split(parts)[index] if tensor.dim() > 0 else tensor)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with its tensors on `device`."""
    return _map(batch, lambda tensor: tensor if tensor.device == device else tensor.to(device, non_blocking=True))


def call(module: Any, batch: Any) -> Any:
    """Calls a module the way its batch asks: a mapping as keywords, a tuple as positions, else one argument.

    Raises:
        BatchError: when the module's forward does not take what the batch holds.
    """
    args = batch if isinstance(batch, tuple) else () if isinstance(batch, (dict, Mapping)) else (batch,)
    kwargs = batch if isinstance(batch, (dict, Mapping)) else {}
    try:
        return module(*args, **kwargs)
    except TypeError as error:
        taken = signature(getattr(module, "forward", module))
        try:
            taken.bind(*args, **kwargs)
        except TypeError as mismatch:
            names = list(taken.parameters)
            given = ", ".join(map(str, kwargs)) or f"{len(args)} positional arguments"
            raise BatchError(
                f"the batch holds {given}, but forward of {type(module).__name__} takes {', '.join(names)}: {mismatch}"
            ) from error
        raise


def _map(value: Any, change: Any) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (dict, Mapping)):  # a dict first: asking whether anything else is a mapping takes longer
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, change) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{item.name: _map(getattr(value, item.name), change) for item in fields(value)})
    return value


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, (dict, Mapping)):
        return [found for key, item in value.items() for found in _tensors(item, f"{name}[{key!r}]")]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [found for index, item in enumerate(value) for found in _tensors(item, f"{name}[{index}]")]
    if is_dataclass(value) and not isinstance(value, type):
        items = [(item.name, getattr(value, item.name)) for item in fields(value)]
        return [found for key, item in items for found in _tensors(item, f"{name}.{key}")]
    return []
