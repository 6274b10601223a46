"""From families to a plan: which row and column of which weight belongs to which slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.core.memory_format import is_channels_last, is_dense
from ocsfast.ops.plan import SHAPE_FIELDS, TABLES, Plan


def build_plan(
    families: Families,
    parameters: Mapping[str, Tensor],
    *,
    include_bias: bool = False,
    others: Iterable[str] = (),
) -> Plan:
    """Build the tables for the parameters that are coupled. Buffers hold no slices and are left out.

    Args:
        families: what grouping found; its names are those of `parameters`.
        parameters: `dict(model.named_parameters())`; dense (contiguous or channels_last), on one
            device, of any floating dtype.
        include_bias: whether biases count in saliency and penalty.
        others: parameters to take in as well, after those: without slices, for an optimizer's sake.

    Raises:
        StateError: a tensor is not dense, lies on another device, or has another size than its labels.
    """
    labels = _labels(families, parameters, include_bias)
    names = (*labels, *(name for name in others if name not in labels))
    device = parameters[names[0]].device if names else torch.device("cpu")
    slices = _Slices()
    for t, name in enumerate(names):
        along = {axis: of for axis, of in labels.get(name, {}).items() if bool((of >= 0).any())}
        _require_walkable(name, parameters[name], names[0], device, along)
        slices.add(t, parameters[name], along)
    counts = (slices.count, families.num_groups, len(families.families))
    return _assembled(names, slices.sections(families), slices.shapes, counts, device)


def counts_as_weight(tensor: Tensor, name: str, include_bias: bool) -> bool:
    """Whether a labelled tensor's slices count in saliency and penalty: weights and norm scales do."""
    if not tensor.is_floating_point():
        return False
    return include_bias or not name.endswith("bias")


def _labels(
    families: Families, parameters: Mapping[str, Tensor], include_bias: bool
) -> dict[str, dict[int, Tensor]]:
    """The group of each index along each axis, of the parameters that count: by name, then by axis."""
    labels: dict[str, dict[int, Tensor]] = {}
    for axis in families.axes:
        tensor = parameters.get(axis.tensor)
        if tensor is None or not counts_as_weight(tensor, axis.tensor, include_bias):
            continue
        if axis.groups.numel() != tensor.shape[axis.axis]:
            raise StateError(
                f"{axis.tensor}: axis {axis.axis} has {tensor.shape[axis.axis]} indices, "
                f"its labels are for {axis.groups.numel()}"
            )
        labels.setdefault(axis.tensor, {})[axis.axis] = axis.groups
    return labels


def _require_walkable(
    name: str, tensor: Tensor, first: str, device: torch.device, along: Mapping[int, Tensor]
) -> None:
    """Refuse a weight that no kernel can walk together with the first one."""
    if not is_dense(tensor):
        raise StateError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: "
            "weights must be contiguous or channels_last. Call .contiguous() on it first"
        )
    if tensor.device != device:
        raise StateError(
            f"{name} is on {tensor.device}, {first} on {device}: "
            "the pruned parameters must lie on one device"
        )
    if len(along) > 2 or (is_channels_last(tensor) and max(along, default=0) > 1):
        raise StateError(
            f"{name}: axes {', '.join(map(str, along))} are labelled; two at most can be, and of a "
            "channels_last tensor only its rows and columns"
        )


@dataclass
class _Slices:
    """The slices of the tensors added so far, numbered as they come."""

    count: int = 0
    rows: int = 0  # of the tensors whose rows have slices
    cols: int = 0  # and of those whose columns have
    shapes: list[list[int]] = field(default_factory=list)  # SHAPE_FIELDS of each tensor
    row_slice: list[Tensor] = field(default_factory=list)
    col_slice: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)
    group: list[Tensor] = field(default_factory=list)
    tensor: list[Tensor] = field(default_factory=list)

    def add(self, number: int, tensor: Tensor, along: Mapping[int, Tensor]) -> None:
        """Add a tensor; `along` has the groups of each axis on which at least one index has a group."""
        (rows, cols, inner), of_rows, of_cols = _matrix(tensor, along)
        row_base = col_base = -1
        if of_rows is not None and of_rows.numel():
            self.row_slice.append(self._numbered(number, of_rows, cols * inner))
            row_base, self.rows = self.rows, self.rows + rows
        if of_cols is not None and of_cols.numel():
            self.col_slice.append(self._numbered(number, of_cols, rows * inner))
            col_base, self.cols = self.cols, self.cols + cols
        self.shapes.append([rows, cols, inner, int(is_channels_last(tensor)), row_base, col_base])

    def _numbered(self, number: int, groups: Tensor, per_index: int) -> Tensor:
        """The slice of each index, from its group: one for each group that occurs."""
        distinct, position, count = torch.unique(groups, return_inverse=True, return_counts=True)
        frozen = int(distinct[0] < 0)  # unique() sorts, so -1 comes first
        slices = torch.where(groups < 0, -1, self.count + position - frozen)
        self.group.append(distinct[frozen:])
        self.size.append(count[frozen:] * per_index)
        self.tensor.append(torch.full_like(distinct[frozen:], number))
        self.count += distinct.numel() - frozen
        return slices

    def sections(self, families: Families) -> dict[str, Tensor]:
        """TABLES of all that was added."""
        starts, entries = _csr(_joined([*self.row_slice, *self.col_slice]), self.count)
        group_start, group_slice = _csr(_joined(self.group), families.num_groups)
        sizes = torch.tensor(families.sizes, dtype=torch.int64)
        layers = [len(family.layers) for family in families.families]
        return {
            "row_slice": _joined(self.row_slice),
            "col_slice": _joined(self.col_slice),
            "slice_size": _joined(self.size),
            "slice_group": _joined(self.group),
            "slice_tensor": _joined(self.tensor),
            "slice_start": starts,
            "slice_entry": entries,
            "group_start": group_start,
            "group_slice": group_slice,
            "family_start": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(sizes, 0)]),
            "family_layers": torch.tensor(layers, dtype=torch.int64),
        }


def _matrix(
    tensor: Tensor, labels: Mapping[int, Tensor]
) -> tuple[tuple[int, int, int], Tensor | None, Tensor | None]:
    """A tensor's rows, columns and elements of both, and the groups of its rows and of its columns."""
    if tensor.dim() < 2:
        return (1, tensor.numel(), 1), None, labels.get(0)
    last = max(1, max(labels, default=0))
    leading, cols = tensor.shape[:last], tensor.shape[last]
    of_rows = None
    for axis, groups in labels.items():
        if axis != last:
            of_rows = (
                groups.view([-1 if d == axis else 1 for d in range(last)]).expand(leading).reshape(-1)
            )
    return (leading.numel(), cols, tensor.shape[last + 1 :].numel()), of_rows, labels.get(last)


def shard_plan(plan: Plan, sizes: Sequence[torch.Size], parts: Sequence[range]) -> Plan:
    """The plan for a part of every tensor: some indices of its dim 0, as one of several processes has.

    Slices keep their numbers, groups and sizes; those that lie in other parts are empty here.

    Args:
        sizes: of the whole tensors.
        parts: the part of each, which may be empty.
    """
    sections = {name: plan.table(name).cpu().long() for name in TABLES}
    shapes: list[list[int]] = []
    row_slice: list[Tensor] = []
    col_slice: list[Tensor] = []
    num_rows = num_cols = 0
    for size, part, (rows, cols, inner, form, row_base, col_base) in zip(
        sizes, parts, plan.shapes.tolist(), strict=True
    ):
        along = len(size) >= 2  # a vector is one row: a part of it is a range of columns
        each = rows // size[0] if along else 1
        first, count = part.start * each, len(part) * each
        rows, skipped, cols = (count, 0, cols) if along else (rows, first, count)
        if row_base >= 0:
            begin = row_base + (first if along else 0)
            row_slice.append(sections["row_slice"][begin : begin + rows])
            row_base, num_rows = num_rows, num_rows + rows
        if col_base >= 0:
            begin = col_base + skipped
            col_slice.append(sections["col_slice"][begin : begin + cols])
            col_base, num_cols = num_cols, num_cols + cols
        shapes.append([rows, cols, inner, form, row_base, col_base])
    sections["row_slice"], sections["col_slice"] = _joined(row_slice), _joined(col_slice)
    sections["slice_start"], sections["slice_entry"] = _csr(
        _joined([*row_slice, *col_slice]), plan.count("slices")
    )
    counts = (plan.count("slices"), plan.count("groups"), plan.count("families"))
    return _assembled(plan.names, sections, shapes, counts, plan.tables.device)


def _assembled(
    names: tuple[str, ...],
    sections: Mapping[str, Tensor],
    shapes: list[list[int]],
    counts: tuple[int, int, int],
    device: torch.device,
) -> Plan:
    offsets, end = [], 0
    for key in TABLES:
        offsets.append(end)
        end += sections[key].numel()
    tables = torch.cat([sections[key] for key in TABLES])
    shape_table = torch.tensor(shapes, dtype=torch.int64).view(-1, len(SHAPE_FIELDS))
    if any(
        int(t.abs().max()) > torch.iinfo(torch.int32).max for t in (tables, shape_table) if t.numel()
    ):
        raise StateError(
            "a coupled tensor has a slice of 2**31 elements or more: too large for the plan"
        )
    return Plan(
        names,
        tables.to(device=device, dtype=torch.int32),
        shape_table.to(torch.int32),
        (len(names), *counts, *offsets),
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if parts else torch.zeros(0, dtype=torch.int64)


def _csr(owner: Tensor, owners: int) -> tuple[Tensor, Tensor]:
    """Starts [owners + 1], and each owner's positions in `owner`, ascending; -1 stands for no owner."""
    entries = torch.nonzero(owner >= 0).flatten()
    per_owner = torch.bincount(owner[entries], minlength=owners)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(per_owner, 0)])
    return starts, entries[torch.sort(owner[entries], stable=True).indices]
