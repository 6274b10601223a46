"""The plan: the families as flat integer tables, which every kernel walks.

Every tensor that counts is a matrix: rows = dim 0, columns = dim 1, inner = the rest (a vector
is one row). Where other axes are labelled, the last of them is the columns and all dimensions before
it, flattened, are the rows: a position embedding [1, N, C] has N rows, a stack of experts' weights
[E, out, in] has E * out. Each row and each column has a slice number or -1; a slice has a group and a
size; a group has its slices (CSR) and, groups being numbered family by family, a family.

All tables lie one behind the other in one int32 tensor, `Plan.tables`, on the device of the
weights; `Plan.layout` holds the counts and where each table starts. What the host needs to start a
kernel, `Plan.shapes`, stays on the CPU. `csrc/plan.h` reads the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.core.memory_format import is_channels_last, is_dense

# `Plan.layout`: four counts, then the start of each table in `Plan.tables`.
COUNTS = ("tensors", "slices", "groups", "families")
TABLES = (
    "row_slice",  # slice of each row, tensor after tensor; a tensor's rows start at its row base
    "col_slice",  # the same for columns
    "slice_size",  # [slices] |w|, elements
    "slice_group",  # [slices]
    "slice_tensor",  # [slices] number of the tensor a slice lies in
    "slice_start",  # [slices + 1] CSR: the rows and columns of slice s are
    "slice_entry",  # slice_entry[slice_start[s] : slice_start[s + 1]], each a position in row_slice
    #     or len(row_slice) + a position in col_slice
    "group_start",  # [groups + 1] CSR: the slices of group g are
    "group_slice",  # [slices]      group_slice[group_start[g] : group_start[g + 1]]
    "family_start",  # [families + 1] the groups of family f are family_start[f] .. family_start[f + 1]
    "family_layers",  # [families] layers that share the family's channels: its weight in Eq. 3
)
# A row of `Plan.shapes`. A base is where the tensor's rows (columns) start in row_slice (col_slice);
# -1: none of them has a slice.
SHAPE_FIELDS = ("rows", "cols", "inner", "channels_last", "row base", "column base")


def counts_as_weight(tensor: Tensor, name: str, include_bias: bool) -> bool:
    """Whether a labelled tensor's slices count in saliency and penalty: weights and norm scales do."""
    if not tensor.is_floating_point():
        return False
    return include_bias or not name.endswith("bias")


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


@dataclass(frozen=True, eq=False)
class Plan:
    """Flat tables over the coupled tensors `names`; see the module's docstring."""

    names: tuple[str, ...]
    tables: Tensor  # [n] int32, on the device of the weights
    shapes: Tensor  # [tensors, 6] int32, on the CPU: SHAPE_FIELDS of each tensor
    layout: tuple[int, ...]

    def count(self, name: str) -> int:
        """One of COUNTS, e.g. `plan.count("groups")`."""
        return self.layout[COUNTS.index(name)]

    def table(self, name: str) -> Tensor:
        """A view of one of TABLES, 1-d int32."""
        k = len(COUNTS) + TABLES.index(name)
        stop = self.layout[k + 1] if k + 1 < len(self.layout) else self.tables.numel()
        return self.tables[self.layout[k] : stop]


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
    names = (*labels, *(name for name in others if name not in labels))

    shapes: list[list[int]] = []
    row_slice: list[Tensor] = []
    col_slice: list[Tensor] = []
    slice_size: list[Tensor] = []
    slice_group: list[Tensor] = []
    slice_tensor: list[Tensor] = []
    num_rows = num_cols = num_slices = 0
    for t, name in enumerate(names):
        tensor = parameters[name]
        channels_last = is_channels_last(tensor)
        if not is_dense(tensor):
            raise StateError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}: "
                "weights must be contiguous or channels_last. Call .contiguous() on it first"
            )
        if tensor.device != parameters[names[0]].device:
            raise StateError(
                f"{name} is on {tensor.device}, {names[0]} on {parameters[names[0]].device}: "
                "the pruned parameters must lie on one device"
            )
        along = {axis: of for axis, of in labels.get(name, {}).items() if bool((of >= 0).any())}
        if len(along) > 2 or (channels_last and max(along, default=0) > 1):
            raise StateError(
                f"{name}: axes {', '.join(map(str, along))} are labelled; two at most can be, and of a "
                "channels_last tensor only its rows and columns"
            )
        (rows, cols, inner), *of_both = _matrix(tensor, along)
        bases = [-1, -1]
        for dim, (groups, per_index) in enumerate(
            zip(of_both, (cols * inner, rows * inner), strict=True)
        ):
            if groups is None or not groups.numel():
                continue
            distinct, position, count = torch.unique(groups, return_inverse=True, return_counts=True)
            frozen = int(distinct[0] < 0)  # unique() sorts, so -1 comes first
            slices = torch.where(groups < 0, -1, num_slices + position - frozen)
            slice_group.append(distinct[frozen:])
            slice_size.append(count[frozen:] * per_index)
            slice_tensor.append(torch.full_like(distinct[frozen:], t))
            num_slices += distinct.numel() - frozen
            if dim == 0:
                bases[0], num_rows = num_rows, num_rows + rows
                row_slice.append(slices)
            else:
                bases[1], num_cols = num_cols, num_cols + cols
                col_slice.append(slices)
        shapes.append([rows, cols, inner, int(channels_last), *bases])

    slice_start, slice_entry = _csr(_joined([*row_slice, *col_slice]), num_slices)
    group_start, group_slice = _csr(_joined(slice_group), families.num_groups)
    sizes = torch.tensor([family.size for family in families.families], dtype=torch.int64)
    sections = {
        "row_slice": _joined(row_slice),
        "col_slice": _joined(col_slice),
        "slice_size": _joined(slice_size),
        "slice_group": _joined(slice_group),
        "slice_tensor": _joined(slice_tensor),
        "slice_start": slice_start,
        "slice_entry": slice_entry,
        "group_start": group_start,
        "group_slice": group_slice,
        "family_start": torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(sizes, 0)]),
        "family_layers": torch.tensor([len(f.layers) for f in families.families], dtype=torch.int64),
    }
    device = parameters[names[0]].device if names else torch.device("cpu")
    counts = (num_slices, families.num_groups, len(families.families))
    return _assembled(names, sections, shapes, counts, device)


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
        along = len(size) >= 2  # else its indices are the columns
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
