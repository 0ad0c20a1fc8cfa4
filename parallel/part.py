"""A tensor of which this rank holds some boxes, as torch's distributed checkpoint wants to see it.

DTensor covers equal contiguous shards only; fused projections, uneven heads and replicated key-value heads hold
several boxes, some of them on several ranks. Any mesh can read what any other wrote, since boxes are global.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

__all__ = ["Chunk", "Part"]


@dataclass(frozen=True, eq=False)
class Chunk:
    """A box of a global tensor: where it starts, and its values (a view of the rank's memory)."""

    offsets: tuple[int, ...]
    values: Tensor

    def metadata(self) -> ChunkStorageMetadata:
        """The box without its values."""
        return ChunkStorageMetadata(torch.Size(self.offsets), self.values.shape)


class Part(Tensor):
    """The boxes of one global tensor that this rank holds; it has the global shape and no values of its own."""

    chunks: tuple[Chunk, ...]
    local: Tensor

    @classmethod
    def of(cls, shape: torch.Size, local: Tensor, chunks: Sequence[Chunk]) -> "Part":
        """A part of a tensor of global `shape`.

        Args:
            shape: of the whole tensor.
            local: the memory the boxes are views of.
            chunks: the boxes.
        """
        part: Part = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        part.local = local
        part.chunks = tuple(chunks)
        return part

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answers questions about shape; it cannot be computed with."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise TypeError(f"{func} of a checkpoint part: it is read and written only")

    def __create_write_items__(self, name: str, value: Any) -> list[WriteItem]:
        del value
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.metadata().offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk.metadata(),
                    properties=TensorProperties.create_from_tensor(chunk.values),
                    size=self.shape,
                ),
            )
            for chunk in self.chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk.metadata() for chunk in self.chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for chunk in self.chunks:
            if index.offset is not None and chunk.offsets == tuple(index.offset):
                return chunk.values
        raise ValueError(f"no box at {index.offset} of {index.fqn} on this rank")
