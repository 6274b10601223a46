"""fully_shard's records of the parameters that it has sharded, and what they become in a cut.

fully_shard keeps a record of each parameter (`FSDPParam`: its sizes, its padded memory). It is private
to torch, and has to fit the parameter. For a cropped parameter, torch's own code makes the fields of the
record anew in a *sketch*: a copy of the record that may be written to. torch does the same for a model
that is sharded on the meta device and gets its memory later.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.tensor import DTensor

from ocsfast.core.errors import StateError

# Fields that torch's code writes into a sketch but that the record keeps as they are: which parameter it
# is of, and which dtype the user chose for gradients.
_KEPT = {
    *("sharded_param", "_orig_param_uid"),
    *("_has_sharded_grad_dtype_override", "sharded_grad_dtype"),
}
# Lists of the gathered parameter's tensors. The next forward pass fills them if it finds them empty.
GATHERED = ("all_gather_outputs", "_unsharded_inner_tensors")
# Fields of a record that this module reads itself. torch's own methods read others.
_READ = ("sharded_param", "device", "mesh_info", "post_forward_mesh_info", "offload_to_cpu", *GATHERED)


def settle(model: nn.Module) -> None:
    """Make the sharded parameters the model's parameters again.

    A forward pass without a backward pass, as in an evaluation, leaves the root module's gathered.

    Raises:
        StateError: as for `records_of`.
    """
    with _known():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def records_of(model: nn.Module) -> dict[int, FSDPParam]:
    """fully_shard's record of each parameter, by the id of the sharded parameter.

    Raises:
        StateError: the records of this version of torch lack a field that is needed; it is named.
    """
    with _known():
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        records = [
            record
            for state in states
            for fsdp_group in _fsdp_groups_of(state)
            for record in cast(list[FSDPParam], fsdp_group.fsdp_params)
        ]
        for record in records:
            for name in _READ:
                getattr(record, name)
    return {id(record.sharded_param): record for record in records}


def _fsdp_groups_of(state: Any) -> Iterable[Any]:
    """The sets of parameters that a module gathers together; before torch 2.14, one at most."""
    if hasattr(state, "_fsdp_param_groups"):
        return cast(Iterable[Any], state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def require_known(records: Iterable[FSDPParam]) -> None:
    """Check that sketches can be trusted in this version of torch.

    A sketch of each parameter as it is now is compared with the record that torch made of it.

    Raises:
        StateError: they differ; it names the field.
    """
    for record in records:
        with _known():
            fields = sketched_fields(record, record.sharded_param)
        for name, value in fields.items():
            # A sketch has no memory, and dicts hold what torch caches.
            if isinstance(value, (Tensor, dict)):
                continue
            if not hasattr(record, name) or getattr(record, name) != value:
                raise _unknown(f"FSDPParam.{name} is not what its parameter alone says")


@contextmanager
def _known() -> Iterator[None]:
    """A context for code that uses private parts of torch.

    Raises:
        StateError: one of these parts is missing or behaves otherwise; it names the part.
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
    """A copy of a record that may be written to, and that remembers which fields were written.

    It belongs to an empty module of its own, so that the model's modules are not written to.
    """

    def __init__(self, record: FSDPParam) -> None:
        info: Any = record._module_info
        self.written: set[str]
        vars(self).update(vars(record), written=set())
        vars(self)["_module_info"] = type(info)(module=nn.Module(), param_name=info.param_name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.written.add(name)
        super().__setattr__(name, value)


def sketched_fields(record: FSDPParam, size_of: Tensor, data: DTensor | None = None) -> dict[str, Any]:
    """The fields that a record would have if its parameter had another size.

    Args:
        size_of: a tensor of the size and dtype of the whole parameter.
        data: what the parameter will hold. If given, its local rows are padded here to equal numbers on
            all ranks, as fully_shard keeps them.
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
