"""The cut of sharded parameters: every process crops its rows, and rows move to where they belong then.

Nothing is gathered. fully_shard's record of a parameter is made anew by torch's own code, on a sketch of
it: as when a model is sharded on the meta device and given its memory later. What the sketch says is
copied into the record at the end; until then nothing has changed. The parameter stays the same object.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage, free_storage
from torch.distributed.tensor import DTensor, Shard

from ocsfast.core.errors import StateError
from ocsfast.cut.agreement import raised_together
from ocsfast.cut.layout import Layout, is_split

# What a sketch writes and a record keeps: what it is of, and what its user said of gradients' dtypes.
_KEPT = {
    *("sharded_param", "_orig_param_uid"),
    *("_has_sharded_grad_dtype_override", "sharded_grad_dtype"),
}
# Lists of the gathered parameter's tensors: filled by the next forward pass if it finds them empty.
_GATHERED = ("all_gather_outputs", "_unsharded_inner_tensors")
# What is read of a record, besides what torch's own methods read of it.
_READ = ("sharded_param", "device", "mesh_info", "post_forward_mesh_info", "offload_to_cpu", *_GATHERED)


def part_of(size: int, rank: int, ranks: int) -> range:
    """The indices of a dim 0 of `size` that a rank holds: as `torch.chunk`, the last may have fewer."""
    most = -(-size // ranks)
    return range(min(rank * most, size), min((rank + 1) * most, size))


def local_of(tensor: Tensor) -> Tensor:
    """The rows that this process holds, without a copy."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def lies_by_rows(tensor: DTensor) -> bool:
    """Whether its dim 0 is spread over a mesh of one dimension, and nothing else."""
    return tensor.device_mesh.ndim == 1 and tuple(tensor.placements) == (Shard(0),)


def settle(model: nn.Module) -> None:
    """Let the parameters be the sharded ones: an evaluation leaves the root module's gathered.

    Raises:
        StateError: as for `records_of`.
    """
    with _known():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that its first sharded parameter is spread over."""
    settle(model)
    split = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    return None if split is None else split.device_mesh.get_group()


# -- fully_shard's records --------------------------------------------------------------------------


def records_of(model: nn.Module) -> dict[int, FSDPParam]:
    """fully_shard's record of each parameter, by the id of the sharded one.

    Raises:
        StateError: this torch keeps other records; it names what they lack.
    """
    with _known():
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        records = [
            record
            for state in states
            for group in _groups_of(state)
            for record in cast(list[FSDPParam], group.fsdp_params)
        ]
        for record in records:
            for name in _READ:
                getattr(record, name)
    return {id(record.sharded_param): record for record in records}


def _groups_of(state: Any) -> Iterable[Any]:
    """One at most before torch 2.14, which keeps a list."""
    if hasattr(state, "_fsdp_param_groups"):
        return cast(Iterable[Any], state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def require_known(records: Iterable[FSDPParam]) -> None:
    """See that a sketch of each parameter as it is says what its record says.

    Raises:
        StateError: it does not, so a sketch of the cut parameter could not be trusted; with the field.
    """
    for record in records:
        with _known():
            fields = _sketched(record, record.sharded_param)
        for name, value in fields.items():
            if isinstance(value, (Tensor, dict)):  # the memory itself; what is kept until it changes
                continue
            if not hasattr(record, name) or getattr(record, name) != value:
                raise _unknown(f"FSDPParam.{name} is not what its parameter alone says")


@contextmanager
def _known() -> Iterator[None]:
    """Around what uses private parts of torch: say which one it is that fails.

    Raises:
        StateError: with that.
    """
    try:
        yield
    except AttributeError as error:
        owner = "FSDPParam" if isinstance(error.obj, FSDPParam) else type(error.obj).__name__
        raise _unknown(f"{owner}.{error.name} is not there") from error
    except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
        raise _unknown(str(error).strip().partition("\n")[0]) from error


def _unknown(what: str) -> StateError:
    return StateError(
        f"fully_shard of torch {torch.__version__} is not one whose parameters can be cut, as those of "
        f"torch 2.10 to 2.15 are: {what}. Use one of these, or DistributedDataParallel"
    )


class _Sketch(FSDPParam):
    """A record to try things on: it writes into no module but its own, and says what it has written."""

    def __init__(self, record: FSDPParam) -> None:
        info: Any = record._module_info
        self.written: set[str]
        vars(self).update(vars(record), written=set())
        vars(self)["_module_info"] = type(info)(module=nn.Module(), param_name=info.param_name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.written.add(name)
        super().__setattr__(name, value)


def _sketched(record: FSDPParam, size_of: Tensor, data: DTensor | None = None) -> dict[str, Any]:
    """What a record says of a parameter of another size, with or without its memory.

    Args:
        size_of: has the whole parameter's size and dtype.
        data: what the parameter will hold: then its local rows are padded here, as fully_shard wants.
    """
    sketch: Any = _Sketch(record)
    empty = torch.empty(size_of.shape, dtype=size_of.dtype, device="meta")
    whole = nn.Parameter(empty, requires_grad=record.sharded_param.requires_grad)
    given = {
        "param": whole,
        "device": record.device,
        "shard_placement_fn": None,
        "mesh_info": record.mesh_info,
    }
    wanted = inspect.signature(sketch._init_sharded_param).parameters
    sketch._init_sharded_param(**{n: v for n, v in given.items() if n in wanted})
    if record.post_forward_mesh_info:
        sketch._init_sharded_post_forward_param_metadata(whole)
    held: Any = sketch.sharded_param if data is None else data
    sketch._module_info.module._parameters[sketch._module_info.param_name] = held
    sketch.reset_sharded_param()
    return {name: vars(sketch)[name] for name in sorted(sketch.written - _KEPT)}


# -- the cut ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Move:
    """Rows that have yet to go to the processes that will hold them."""

    sent: Tensor
    received: Tensor  # [rows, ...], filled by `run`; without memory until it is about to
    sent_counts: list[int]  # rows to each rank
    received_counts: list[int]
    group: dist.ProcessGroup

    def run(self) -> None:
        """Every rank has to call.

        Raises:
            StateError: one of them has no memory for what it receives. Nothing has been sent then.
        """
        with raised_together(self.group):
            alloc_storage(self.received)
        dist.all_to_all_single(
            self.received, self.sent, self.received_counts, self.sent_counts, group=self.group
        )


def crop_shards(tensor: Tensor, kept: Mapping[int, Tensor]) -> tuple[DTensor, Move | None]:
    """The kept indices along each axis, dim 0 spread over the ranks anew; nothing is communicated yet.

    Args:
        tensor: a DTensor with dim 0 split over a mesh of one dimension.
        kept: the same on every rank: [n] int64 on the CPU, ascending.

    Returns:
        The cropped tensor, and what fills it, if rows move.
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
        group = mesh.get_group()
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        before = [part_of(tensor.shape[0], r, ranks) for r in range(ranks)]
        after = [part_of(size[0], r, ranks) for r in range(ranks)]
        # Rows keep their order, so what a rank keeps is one range of the new rows.
        ends = torch.searchsorted(kept[0], torch.tensor([part.stop for part in before])).tolist()
        held = [range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        mine = kept[0][held[rank].start : held[rank].stop] - before[rank].start
        sent = local.index_select(0, mine.to(local.device))
        local = sent.new_empty([len(after[rank]), *size[1:]])
        free_storage(local)
        move = Move(
            sent,
            local,
            [_overlap(held[rank], theirs) for theirs in after],
            [_overlap(after[rank], theirs) for theirs in held],
            group,
        )
    whole = torch.empty(size, device="meta")
    cropped = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return cropped, move


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


class ShardedLayout(Layout):
    """Of a model under `fully_shard`: a process holds some rows of each parameter. For one cut."""

    def __init__(self, model: nn.Module) -> None:
        """Find its records.

        Raises:
            StateError: as for `records_of`.
        """
        settle(model)
        self._records = records_of(model)
        self._moves: list[Move] = []
        self._fields: dict[int, dict[str, Any]] = {}  # a record's new ones, by its parameter's id

    def crop(self, tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
        if not is_split(tensor):
            return super().crop(tensor, kept)
        cropped, move = crop_shards(tensor, kept)
        if move is not None:
            self._moves.append(move)
        return cropped

    def arrive(self, cropped: Iterable[tuple[Tensor, Tensor]]) -> None:
        # One at a time, and what was sent is freed as it goes: a cut holds old rows and new, no more.
        self._moves.reverse()
        while self._moves:
            self._moves.pop().run()
        for tensor, data in cropped:
            record = self._records.get(id(tensor))
            if record is not None:
                self._fields[id(tensor)] = _sketched(record, data, cast(DTensor, data))

    def place(self, tensor: Tensor, data: Tensor, undo: ExitStack) -> None:
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
            fields.update(self._fields[id(tensor)], **{name: [] for name in _GATHERED})
            fields.pop("_unsharded_param", None)


def _hold(tensor: Any, local: Tensor, spec: Any) -> None:
    """`Tensor.data` knows the outer tensor alone."""
    tensor._local_tensor, tensor._spec = local, spec


def _restore(record: FSDPParam, fields: dict[str, Any]) -> None:
    vars(record).clear()
    vars(record).update(fields)
