"""Weights in Hugging Face's layout (safetensors files, an index, a config), read straight into shares and written back.

A rank reads only the ranges it holds; writing joins one tensor at a time, so no rank ever holds the whole model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from meshwright.parallel.dealt import rows_of
from meshwright.parallel.errors import WeightsError, nearest
from meshwright.parallel.part import Chunk, Part

__all__ = ["NamedStates", "WeightFiles", "alias_groups", "boxes_of", "write_weights"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightFiles:
    """The tensors of a folder by name; nothing is read before it is asked for.

    Raises:
        WeightsError: when the folder holds no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        index = folder / _INDEX
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / _SINGLE).exists():
            names = [_SINGLE]
        else:
            raise WeightsError(f"{folder} holds neither {_INDEX} nor {_SINGLE}; save the model with safetensors")
        self._files: list[Any] = [safe_open(folder / name, framework="pt") for name in names]
        self._home: dict[str, Any] = {key: file for file in self._files for key in file.keys()}  # noqa: SIM118 (it is no dict)

    def fill(self, name: str, shape: tuple[int, ...], boxes: list[Chunk]) -> None:
        """Reads the boxes of one tensor of full `shape` into the memory they are views of.

        Raises:
            WeightsError: when the tensor is missing or has another shape.
        """
        if name not in self._home:
            raise WeightsError(f"{self.folder} holds no {name}; {nearest(name, list(self._home))}")
        stored = self._home[name].get_slice(name)
        if tuple(stored.get_shape()) != tuple(shape):
            raise WeightsError(
                f"{name} has shape {tuple(shape)} in the model and {stored.get_shape()} in {self.folder}"
            )
        for box in boxes:
            ends = [start + size for start, size in zip(box.offsets, box.values.shape, strict=True)]
            where = tuple(slice(start, end) for start, end in zip(box.offsets, ends, strict=True))
            box.values.copy_(stored[where] if where else self._home[name].get_tensor(name))

    def __contains__(self, name: str) -> bool:
        return name in self._home


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], module: nn.Module, file_bytes: int) -> None:
    """Writes whole tensors into files of at most `file_bytes` each, an index, and the module's config if any.

    Args:
        folder: made if needed.
        tensors: name and whole tensor, one at a time.
        module: whose `config` (of `transformers`) is saved beside them.
        file_bytes: when a new file is begun.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, str]] = []
    held: dict[str, Tensor] = {}
    total_bytes = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(dict.fromkeys(held, ""))
        held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(each.numel() * each.element_size() for each in held.values()) + size > file_bytes:
            flush()
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        total_bytes += size
    flush()
    _name_files(folder, parts, total_bytes)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "save_pretrained"):
        config.save_pretrained(folder)


def _name_files(folder: Path, parts: list[dict[str, str]], total_bytes: int) -> None:
    if len(parts) == 1:
        (folder / "part-0.safetensors").replace(folder / _SINGLE)
        return
    home: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}.safetensors").replace(folder / file)
        home.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": home}
    (folder / _INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def boxes_of(values: Tensor) -> tuple[torch.Size, list[Chunk]]:
    """Full shape of a state and the boxes of it that this rank holds."""
    if isinstance(values, Part):
        return values.shape, list(values.chunks)
    rows = rows_of(values)
    local = values.to_local() if isinstance(values, DTensor) else values
    start = rows[0] if rows is not None else 0
    return values.shape, [Chunk(tuple(start if dim == 0 else 0 for dim in range(values.dim())), local)]


@dataclass(frozen=True)
class NamedStates:
    """Names of a whole model's states, before ranks drop what others keep.

    Args:
        aliases: of every saved state, names of one tied tensor together.
        trained: names of the trained parameters, in the model's order.
    """

    aliases: tuple[tuple[str, ...], ...]
    trained: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "NamedStates":
        """Those of a model.

        >>> NamedStates.of(nn.Linear(2, 1)).trained
        ('weight', 'bias')
        """
        trained = tuple(name for name, each in model.named_parameters() if each.requires_grad)
        return cls(tuple(map(tuple, alias_groups(model))), trained)


def alias_groups(module: nn.Module) -> list[list[str]]:
    """Names of the module's saved states, names of one tied tensor together."""
    groups: dict[int, list[str]] = {}
    saved = module.state_dict(keep_vars=True)
    for name, each in saved.items():
        if isinstance(each, Tensor):
            groups.setdefault(id(each), []).append(name)
    return list(groups.values())
