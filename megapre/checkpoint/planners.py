"""Pieces of tensors through torch.distributed.checkpoint, whose are the file format, the planning over ranks and the
intersection of what is there with what is wanted. Imported when a checkpoint is written or read: it takes a while.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .pieces import Pieces


class SavePlanner(DefaultSavePlanner):
    """Writes the pieces of `tensors` that are to be written."""

    def __init__(self, tensors: Mapping[str, Pieces]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values = {(name, piece.offsets): piece.values for name, t in tensors.items() for piece in t.written}
        self.shapes = {name: torch.Size(tensor.shape) for name, tensor in tensors.items()}

    def create_local_plan(self) -> SavePlan:
        items = []
        for (name, offsets), values in self.values.items():
            chunk = ChunkStorageMetadata(torch.Size(offsets), values.shape)
            data = TensorWriteData(chunk, TensorProperties(values.dtype), self.shapes[name])
            items.append(WriteItem(MetadataIndex(name, torch.Size(offsets)), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        offset = write_item.index.offset
        assert offset is not None
        return self.values[write_item.index.fqn, tuple(offset)].detach()


class LoadPlanner(DefaultLoadPlanner):
    """Fills all pieces of `tensors`."""

    def __init__(self, tensors: Mapping[str, Pieces]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.tensors = tensors
        self.values = {(name, piece.offsets): piece.values for name, t in tensors.items() for piece in t.held}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, tensor in self.tensors.items():
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata), f"{name} is no tensor"
            wanted = [ChunkStorageMetadata(torch.Size(piece.offsets), piece.values.shape) for piece in tensor.held]
            items += create_read_items_for_chunk_list(name, stored, wanted)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        offset = read_item.dest_index.offset
        assert offset is not None
        values = self.values[read_item.dest_index.fqn, tuple(offset)].detach()
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            values = values.narrow(dim, start, length)
        return values
