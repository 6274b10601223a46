"""The cut of sharded parameters: every process crops its rows, and rows move to where they belong then.

Nothing is gathered. fully_shard's record of a parameter is made anew as when a model is sharded on the
meta device and given its memory later; the parameter stays the same object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

from ocsfast.errors import StateError
from ocsfast.slicing import replace_data

# What is used of torch's own record of a sharded parameter.
_METHODS = {
    "_init_sharded_param": {"self", "param", "device", "shard_placement_fn", "mesh_info"},
    "_init_sharded_post_forward_param_metadata": {"self", "param"},
    "_setattr_on_modules": {"self", "param"},
    "free_unsharded_param": {"self"},
    "reset_sharded_param": {"self"},
}


def part_of(size: int, rank: int, ranks: int) -> range:
    """The indices of a dim 0 of `size` that a rank holds: as `torch.chunk`, the last may have fewer."""
    most = -(-size // ranks)
    return range(min(rank * most, size), min((rank + 1) * most, size))


def local_of(tensor: Tensor) -> Tensor:
    """The rows that this process holds, without a copy."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def settle(model: nn.Module) -> None:
    """Let the parameters be the sharded ones: an evaluation leaves the root module's gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def managed(model: nn.Module) -> dict[int, FSDPParam]:
    """fully_shard's record of each parameter, by the id of the sharded one.

    Raises:
        StateError: this torch keeps other records.
    """
    for name, arguments in _METHODS.items():
        method = getattr(FSDPParam, name, None)
        if method is None or set(inspect.signature(method).parameters) != arguments:
            raise StateError(
                f"fully_shard of torch {torch.__version__} is not one whose parameters can be cut: that "
                "of torch 2.15 is. Use it, or DistributedDataParallel"
            )
    return {
        id(record.sharded_param): record
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for group in module._get_fsdp_state()._fsdp_param_groups
        for record in group.fsdp_params
    }


def crop_shards(tensor: Tensor, kept: Mapping[int, Tensor]) -> DTensor:
    """The kept indices along each axis, dim 0 spread over the ranks anew. Every rank has to call.

    Args:
        tensor: a DTensor with dim 0 split over a mesh of one dimension.
        kept: the same on every rank: [n] int64 on the CPU, ascending.
    """
    assert isinstance(tensor, DTensor)
    mesh, local = tensor.device_mesh, local_of(tensor)
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
        dist.all_to_all_single(
            local,
            sent,
            [_overlap(after[rank], theirs) for theirs in held],
            [_overlap(held[rank], theirs) for theirs in after],
            group=group,
        )
    whole = torch.empty(size, device="meta")
    return DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _overlap(a: range, b: range) -> int:
    return max(0, min(a.stop, b.stop) - max(a.start, b.start))


def placer(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """What gives a tensor of the model cropped data: `replace_data`, and more for a sharded parameter.

    Raises:
        StateError: as for `managed`.
    """
    settle(model)
    records = managed(model)

    def place(tensor: Tensor, data: Tensor) -> None:
        replace_data(tensor, data)
        if isinstance(tensor, DTensor) and isinstance(data, DTensor):
            # `Tensor.data` knows the outer tensor alone.
            inner: Any = tensor
            inner._local_tensor, inner._spec = data._local_tensor, data._spec
        if id(tensor) in records:
            _renew(records[id(tensor)], tensor)

    return place


def _renew(record: Any, parameter: Tensor) -> None:
    """Let a record describe its parameter as it is now, and forget the gathered one."""
    of_user = ("_orig_param_uid", "_has_sharded_grad_dtype_override", "sharded_grad_dtype")
    stays = {name: getattr(record, name) for name in of_user}
    record.free_unsharded_param()
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    sizes = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    record._init_sharded_param(sizes, record.device, None, record.mesh_info)
    if record.post_forward_mesh_info:
        record._init_sharded_post_forward_param_metadata(sizes)
    for name, value in stays.items():
        setattr(record, name, value)
    record.all_gather_outputs, record._unsharded_inner_tensors = [], []
    vars(record).pop("_unsharded_param", None)
    record.sharded_param = parameter
    record._setattr_on_modules(parameter)
    record.reset_sharded_param()
