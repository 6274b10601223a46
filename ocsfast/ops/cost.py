"""The cost model: exact, analytic, in integers.

cost = sum of coefficient * kept(rows) * kept(cols), with kept(axis) = fixed + sum over families of
multiplicity * kept(family). For MACs this is what `torch.utils.flop_counter.FlopCounterMode` counts
on the cut model, halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsfast.core.errors import GroupingError
from ocsfast.core.families import Families, Product

# `CostModel.layout`: three counts, then the start of each table in `CostModel.tables`.
COUNTS = ("axes", "entries", "terms")
TABLES = (
    "axis_fixed",  # [axes] indices that never go
    "axis_start",  # [axes + 1] CSR: the families along axis a are entries axis_start[a] .. [a + 1]
    "entry_family",  # [entries]
    "entry_count",  # [entries] indices one group of that family takes along the axis
    "term_coefficient",  # [terms]
    "term_rows",  # [terms] an axis
    "term_cols",  # [terms] an axis
)


@dataclass(frozen=True, eq=False)
class CostModel:
    """cost(kept counts) as flat int64 tables; `csrc/plan.h` reads the same."""

    tables: Tensor  # [n] int64
    layout: tuple[int, ...]
    unit: str  # "MACs", "parameters", "bytes", or of a target of another kind

    def table(self, name: str) -> Tensor:
        """A view of one of TABLES, 1-d int64."""
        k = len(COUNTS) + TABLES.index(name)
        stop = self.layout[k + 1] if k + 1 < len(self.layout) else self.tables.numel()
        return self.tables[self.layout[k] : stop]

    def __call__(self, kept: Sequence[int] | Tensor) -> int:
        """The cost where family f keeps kept[f] groups."""
        counts = torch.as_tensor(kept, dtype=torch.int64).cpu()
        start = self.table("axis_start").cpu()
        entry_axis = torch.repeat_interleave(torch.arange(len(start) - 1), start.diff())
        along = self.table("entry_count").cpu() * counts[self.table("entry_family").cpu()]
        size = self.table("axis_fixed").cpu().clone().index_add_(0, entry_axis, along)
        rows, cols = self.table("term_rows").cpu(), self.table("term_cols").cpu()
        return int((self.table("term_coefficient").cpu() * size[rows] * size[cols]).sum())

    def to(self, device: torch.device) -> CostModel:
        return CostModel(self.tables.to(device), self.layout, self.unit)


def build_cost_model(families: Families, products: Sequence[Product], unit: str) -> CostModel:
    """Flatten products over labelled axes into tables.

    Raises:
        GroupingError: groups of one family take unequal numbers of indices along one axis, so that
            the cost would not depend on the kept counts alone.
    """
    family = families.family_of_groups()
    sizes = families.sizes
    fixed: list[int] = []
    entries: list[dict[int, int]] = []
    known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}

    def axis_number(labels: Tensor | None, where: str) -> int:
        if labels is None:
            free, along = 1, dict[int, int]()
        else:
            free, along = int((labels < 0).sum()), {}
            live = labels[labels >= 0]
            per_group = torch.bincount(live, minlength=families.num_groups)
            for f in torch.unique(family[live]).tolist():
                first = families.families[f].first
                counts = per_group[first : first + sizes[f]]
                along[f] = int(counts[0])
                if bool((counts != along[f]).any()):
                    raise GroupingError(
                        f"{where}: groups of family {families.families[f].name} take unequal numbers "
                        "of its indices"
                    )
        key = (free, tuple(along.items()))
        if key not in known:
            known[key] = len(fixed)
            fixed.append(free)
            entries.append(along)
        return known[key]

    terms = [
        (p.coefficient, axis_number(p.rows, p.where), axis_number(p.cols, p.where)) for p in products
    ]
    start = [0]
    for along in entries:
        start.append(start[-1] + len(along))
    sections = (
        fixed,
        start,
        [f for along in entries for f in along],
        [count for along in entries for count in along.values()],
        [term[0] for term in terms],
        [term[1] for term in terms],
        [term[2] for term in terms],
    )
    offsets, end = [], 0
    for section in sections:
        offsets.append(end)
        end += len(section)
    tables = torch.tensor([value for section in sections for value in section], dtype=torch.int64)
    return CostModel(tables, (len(fixed), start[-1], len(terms), *offsets), unit)
