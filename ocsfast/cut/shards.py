"""The cut of parameters under `fully_shard`: each process crops its rows, then rows change processes.

Nothing is gathered. The parameter stays the same object, and fully_shard's record of it (see
`fsdp_records`) is brought in line at the end. Until then nothing has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage, free_storage
from torch.distributed.tensor import DTensor, Shard

from ocsfast.core.errors import StateError
from ocsfast.cut.agreement import raised_together
from ocsfast.cut.fsdp_records import GATHERED, records_of, settle, sketched_fields
from ocsfast.cut.layout import Layout, is_split


def part_of(size: int, rank: int, ranks: int) -> range:
    """The indices along a dim 0 of `size` that a rank holds.

    They are split as by `torch.chunk`: every rank has as many but the last ones, which may have fewer.
    """
    most = -(-size // ranks)
    return range(min(rank * most, size), min((rank + 1) * most, size))


def local_of(tensor: Tensor) -> Tensor:
    """The rows that this process holds, without a copy."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lies_by_rows(tensor: DTensor) -> bool:
    """Whether its dim 0, and nothing else, is spread over a mesh of one dimension."""
    return tensor.device_mesh.ndim == 1 and tuple(tensor.placements) == (Shard(0),)


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The process group that a model's first sharded parameter is spread over, if one is sharded."""
    settle(model)
    split = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    return None if split is None else split.device_mesh.get_group()


@dataclass(frozen=True, eq=False)
class Move:
    """Rows of one tensor that have yet to be sent to the processes that will hold them."""

    sent: Tensor
    received: Tensor  # [rows, ...]; has no memory until `run` allocates and fills it
    sent_counts: list[int]  # [ranks] rows that go to each rank
    received_counts: list[int]  # [ranks] rows that come from each rank
    process_group: dist.ProcessGroup

    def run(self) -> None:
        """Exchange the rows. Every rank has to call.

        Raises:
            StateError: a rank has no memory for what it receives. Nothing has been sent then.
        """
        with raised_together(self.process_group):
            alloc_storage(self.received)
        counts = self.received_counts, self.sent_counts
        dist.all_to_all_single(self.received, self.sent, *counts, group=self.process_group)


def crop_shards(tensor: Tensor, kept: Mapping[int, Tensor]) -> tuple[DTensor, Move | None]:
    """Crop a sharded tensor, and spread the rows that are left over the ranks anew.

    Nothing is communicated yet.

    Args:
        tensor: a DTensor with dim 0 split over a mesh of one dimension.
        kept: axis -> the indices that stay, [n] int64 on the CPU, ascending; the same on every rank.

    Returns:
        The cropped tensor. If rows are cropped: also the move that fills it, else None.

    Raises:
        StateError: the tensor is split in another way.
    """
    assert isinstance(tensor, DTensor)
    mesh, local, move = tensor.device_mesh, local_of(tensor), None
    if not lies_by_rows(tensor):
        raise StateError(
            f"a tensor of shape {tuple(tensor.shape)} has the placements {tuple(tensor.placements)} on "
            f"a mesh of {mesh.ndim} dimensions: only rows over one dimension can be cut"
        )
    for axis, indices in kept.items():
        if axis != 0:
            local = local.index_select(axis, indices.to(local.device))
    size = list(tensor.shape)
    for axis, indices in kept.items():
        size[axis] = indices.numel()
    if 0 in kept:
        move = _row_move(local, tensor.shape[0], kept[0], mesh.get_group())
        local = move.received
    whole = torch.empty(size, device="meta")
    cropped = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return cropped, move


def _row_move(local: Tensor, rows: int, kept: Tensor, process_group: dist.ProcessGroup) -> Move:
    """Which of the rows here stay, and to which ranks they go.

    Args:
        local: [local rows, ...], cropped along all other axes.
        rows: of the whole tensor before the cut.
        kept: the rows of the whole tensor that stay, [n] int64 on the CPU, ascending.
    """
    rank, ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    before = [part_of(rows, r, ranks) for r in range(ranks)]
    after = [part_of(kept.numel(), r, ranks) for r in range(ranks)]
    # Rows keep their order, so the rows that a rank keeps are one range of the new rows.
    ends = torch.searchsorted(kept, torch.tensor([part.stop for part in before])).tolist()
    held = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    mine = kept[held[rank].start : held[rank].stop] - before[rank].start
    sent = local.index_select(0, mine.to(local.device))
    received = sent.new_empty([len(after[rank]), *local.shape[1:]])
    free_storage(received)
    return Move(
        sent,
        received,
        sent_counts=[_overlap(held[rank], theirs) for theirs in after],
        received_counts=[_overlap(after[rank], theirs) for theirs in held],
        process_group=process_group,
    )


def _overlap(a: range, b: range) -> int:
    """How many numbers two ranges have in common."""
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


class ShardedLayout(Layout):
    """The layout of a model under `fully_shard`: each process holds some rows of each parameter.

    It serves one cut: `crop` collects the moves, `arrive` makes them, `place` writes the records.
    """

    def __init__(self, model: nn.Module) -> None:
        """Find fully_shard's records of the parameters.

        Raises:
            StateError: as for `records_of`.
        """
        settle(model)
        self._records = records_of(model)
        self._moves: list[Move] = []
        # The new fields of each record, by the id of its parameter.
        self._fields: dict[int, dict[str, Any]] = {}

    def crop(self, tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
        """The tensor cropped. Rows that move are missing until `arrive`."""
        if not is_split(tensor):
            return super().crop(tensor, kept)
        cropped, move = crop_shards(tensor, kept)
        if move is not None:
            self._moves.append(move)
        return cropped

    def arrive(self, cropped: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Move the rows, one tensor at a time, and work out the records' new fields.

        What was sent is freed after each move, so that the cut holds the old rows and the new ones, and
        no third copy.
        """
        self._moves.reverse()
        while self._moves:
            self._moves.pop().run()
        for tensor, data in cropped:
            record = self._records.get(id(tensor))
            if record is not None:
                self._fields[id(tensor)] = sketched_fields(record, data, cast(DTensor, data))

    def place(self, tensor: Tensor, data: Tensor, undo: ExitStack) -> None:
        """Give a tensor its new data, and its record the new fields. Closing `undo` takes both back."""
        record = self._records.get(id(tensor))
        if record is not None:
            undo.callback(_restore, record, dict(vars(record)))
        if isinstance(tensor, DTensor):
            undo.callback(_hold, tensor, tensor._local_tensor, tensor._spec)
        super().place(tensor, data, undo)
        if isinstance(tensor, DTensor) and isinstance(data, DTensor):
            _hold(tensor, data._local_tensor, data._spec)
        if record is not None:
            fields = vars(record)
            fields.update(self._fields[id(tensor)], **{name: [] for name in GATHERED})
            fields.pop("_unsharded_param", None)


def _hold(tensor: Any, local: Tensor, spec: Any) -> None:
    """Set what a DTensor holds. Assigning to `.data` changes the outer tensor only."""
    tensor._local_tensor, tensor._spec = local, spec


def _restore(record: FSDPParam, fields: dict[str, Any]) -> None:
    """Give a record exactly these fields."""
    vars(record).clear()
    vars(record).update(fields)
