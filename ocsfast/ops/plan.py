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

from dataclasses import dataclass

from torch import Tensor

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
# What `compare` tells of a partition. The groups that each family keeps follow.
FACTS = (
    "cost",  # of the partition
    "status",  # of the partition
    "gone",  # groups that go
    "size_gone",  # their sizes, added up
    "size",  # the sizes of all groups
    "index",  # Eq. 3 against an earlier mask
    "changed",  # groups on another side than in another earlier mask
)
# A row of `Plan.shapes`. A base is where the tensor's rows (columns) start in row_slice (col_slice);
# -1: none of them has a slice.
SHAPE_FIELDS = ("rows", "cols", "inner", "channels_last", "row base", "column base")


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
