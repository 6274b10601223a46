"""Models under `torch.distributed.fsdp.fully_shard`: each process holds some rows of every weight.

A weight is a DTensor whose dim 0 is split over the processes. Only the norms of slices need rows of
several processes: each process sums over its own rows, and one all-reduce of one number per slice adds
the sums up. Everything else is done where the rows lie. No parameter is ever gathered.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ocsfast.core.criteria import CRITERIA
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.cut.agreement import raised_together
from ocsfast.cut.fsdp_records import records_of, require_known, settle
from ocsfast.cut.layout import is_sharded
from ocsfast.cut.removal import Copy
from ocsfast.cut.shards import lies_by_rows, local_of, part_of
from ocsfast.distributed.processes import Processes
from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.ops.plan import Plan
from ocsfast.ops.planning import shard_plan
from ocsfast.ops.tables import group_scores, lasso_slopes, matrices, slice_sums
from ocsfast.optim import coupled
from ocsfast.optim.coupled import steps_in_one_pass


class ShardedWeights:
    """Weights whose rows several processes hold: kernels walk the local ones, sums are all-reduced.

    Args:
        plan: for the whole weights.
        weights: DTensors, dim 0 split over one mesh of one dimension.
    """

    def __init__(self, plan: Plan, weights: Sequence[Tensor]) -> None:
        self.plan = plan
        self.weights = tuple(weights)
        self._process_group = cast(DTensor, weights[0]).device_mesh.get_group()
        rank = dist.get_rank(self._process_group)
        ranks = dist.get_world_size(self._process_group)
        sizes = [weight.shape for weight in weights]
        parts = [part_of(size[0], rank, ranks) for size in sizes]
        self.rows = Bound(shard_plan(plan, sizes, parts), [local_of(w) for w in weights])
        wide = any(weight.dtype == torch.float64 for weight in weights)
        self._dtype = torch.float64 if wide else torch.float32

    def pointers(self) -> tuple[int, ...]:
        """Where the local rows of each weight begin in memory."""
        return tuple(local_of(weight).data_ptr() for weight in self.weights)

    def forget(self) -> None:
        """Do nothing: no sums are remembered from one call to the next."""

    def not_finite(self) -> str | None:
        """The name of the first weight that holds a NaN or an infinity on some rank. One all-reduce."""
        own = [local_of(weight).isfinite().all() for weight in self.weights]
        finite = torch.stack(own).to(self._dtype)
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=self._process_group)
        flags = zip(self.plan.names, finite.tolist(), strict=True)
        return next((name for name, flag in flags if not flag), None)

    def joined(self, sums: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """[slices] over all ranks' rows."""
        sums = sums.to(self._dtype)
        dist.all_reduce(sums, how, group=self._process_group)
        return sums


@ops.group_saliency.register
def _(
    bound: ShardedWeights, criterion: str = "l2", others: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Tensor]:
    bound.rows.forget()  # what changes a DTensor does not raise the version of its rows
    local = [None if other is None else local_of(other) for other in others]
    _, sums = ops.group_saliency(bound.rows, criterion, local)
    maximum = CRITERIA[criterion].maximum
    sums = bound.joined(sums, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return group_scores(bound.plan, sums, criterion), sums


@ops.slice_sums.register
def _(bound: ShardedWeights, elements: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return bound.joined(slice_sums(bound.rows.plan, [local_of(e) for e in elements], dtype))


@ops.lasso_grad_.register
def _(bound: ShardedWeights, grads: Sequence[Tensor | None], mask: Tensor, lam: Tensor) -> None:
    """Eq. 8 on the local rows; one all-reduce, for the norms as they are now.

    The kernel would divide by the norm of the rows that lie here.
    """
    with torch.no_grad():
        _, squares = ops.group_saliency(bound)
        slopes = lasso_slopes(bound.plan, squares, mask, lam)
        walk = matrices(bound.rows.plan, bound.rows.weights)
        for grad, (weight, rows, cols) in zip(grads, walk, strict=True):
            if grad is None or not weight.numel():
                continue
            of_rows = 0.0 if rows is None else slopes[rows].view(-1, 1, 1)
            of_cols = 0.0 if cols is None else slopes[cols].view(1, -1, 1)
            local = local_of(grad)
            added = weight * (of_rows + of_cols)
            local.add_(added.view(local.shape).to(local.dtype))


@ops.shrink_.register
def _(bound: ShardedWeights, mask: Tensor, factor: Tensor) -> None:
    ops.shrink_(bound.rows, mask, factor)


class Shards(Processes):
    """The processes that each hold a part of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Find out how the model is sharded.

        Raises:
            StateError: in another way than by rows over one mesh of one dimension.
        """
        self._model = weakref.ref(model)
        settle(model)
        self._mesh = _mesh_of(model)

    @property
    def process_group(self) -> dist.ProcessGroup:
        return self._mesh.get_group()

    def together(self) -> AbstractContextManager[None]:
        return raised_together(self.process_group)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks begin alike, because from here on they communicate.

        Raises:
            StateError: on every rank, if one of `facts` differs.
        """
        self.require_agreement(facts)

    def require_copies(self, copies: Sequence[Copy]) -> None:
        """Accept modules that are whole, or sharded over the same mesh.

        Raises:
            StateError: a copy is a list of tensors, or sharded over another mesh.
        """
        for copy in copies:
            if not isinstance(copy, nn.Module):
                raise StateError(
                    "also= holds a list of tensors, and the model is sharded: pass an average that is a "
                    "module, sharded as the model is"
                )
            if is_sharded(copy) and _mesh_of(copy) != self._mesh:
                raise StateError(
                    "also= holds a copy that is sharded over another mesh than the model: call "
                    "fully_shard with one mesh for both"
                )

    def bind(
        self,
        families: Families,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        include_bias: bool,
    ) -> coupled.Coupled:
        """As `coupled.bind`, with the weights as `ShardedWeights`.

        Raises:
            StateError: the optimizer steps whole weights, or a weight to be pruned is not sharded.
        """
        if steps_in_one_pass(optimizer):
            name = type(optimizer).__name__
            raise StateError(
                f"ocsfast.optim.{name} steps whole weights: with fully_shard use torch.optim.{name}, "
                "with the same arguments"
            )
        for axis in families.axes:
            parameter = parameters.get(axis.tensor)
            if parameter is not None and not isinstance(parameter, DTensor):
                raise StateError(
                    f"{axis.tensor} is to be pruned and not sharded, while others are: call fully_shard "
                    "on the whole model, without ignored_params=, or name its layer in keep="
                )
        return coupled.bind(families, parameters, optimizer, include_bias, ShardedWeights)

    def require_cuttable(self) -> None:
        """Refuse, before a check, to go on where the cut could not follow.

        Raises:
            StateError: gradients wait to be reduced.
        """
        model = self._model()
        assert model is not None  # the pruner has seen to it
        settle(model)
        for record in records_of(model).values():
            whole = getattr(record, "_unsharded_param", None)
            # Up to torch 2.14 a gradient that is to be reduced in another dtype waits in the record.
            waiting = getattr(record, "unsharded_accumulated_grad", None)
            if waiting is not None or (whole is not None and whole.grad is not None):
                raise StateError(
                    "gradients wait to be reduced (set_requires_gradient_sync(False)): call "
                    "ocsfast.step after optimizer.step()"
                )


def _mesh_of(model: nn.Module) -> DeviceMesh:
    """The mesh over which all sharded parameters are spread.

    Raises:
        StateError: there is no sharded parameter, or one is sharded in a way that cannot be pruned.
    """
    records = records_of(model)
    mesh: DeviceMesh | None = None
    for name, parameter in _sharded(model):
        if id(parameter) not in records:
            raise StateError(
                f"{name} is a DTensor that fully_shard did not make, as of tensor parallelism: prune "
                "with fully_shard alone, and parallelize the model that is left"
            )
        if not lies_by_rows(parameter):
            raise StateError(
                f"{name} has the placements {tuple(parameter.placements)} on a mesh of "
                f"{parameter.device_mesh.ndim} dimensions: only rows over one dimension can be pruned. "
                "Call fully_shard with a mesh of one dimension, without shard_placement_fn=, and "
                "without tensor parallelism"
            )
        if records[id(parameter)].offload_to_cpu:
            raise StateError(f"{name} is offloaded: call fully_shard without CPUOffloadPolicy")
        if mesh is not None and parameter.device_mesh != mesh:
            raise StateError(
                f"{name} is sharded over another mesh than the parameters before it: call fully_shard "
                "with one mesh for all"
            )
        mesh = parameter.device_mesh
    require_known(records.values())
    if mesh is None:
        raise StateError("fully_shard holds no parameter of this model: call it without ignored_params=")
    return mesh


def _sharded(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """Each sharded parameter and its name."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter
