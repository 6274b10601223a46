"""The cost model: exact, analytic, in integers.

cost = sum of coefficient * kept(rows) * kept(cols), with kept(axis) = fixed + sum over families of
multiplicity * kept(family). For MACs this is what `torch.utils.flop_counter.FlopCounterMode` counts
on the cut model, halved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ocsfast.core.config import TARGETS, UNITS
from ocsfast.core.errors import GroupingError
from ocsfast.core.families import Families, Product
from ocsfast.cut.record import Record, target_in

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
    unit: str  # "MACs" or "parameters"

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


# A weighted sum's integers: fine enough for a parameter of a model with 10**12 of them.
_WEIGHTED_TOTAL = 2**50


def target_products(
    target: str | Mapping[str, float], families: Families, parameters: Mapping[str, Tensor]
) -> tuple[tuple[Product, ...], str]:
    """The summands of a target's cost, and its unit.

    "flops": MACs; "params": parameters; "bytes": their bytes, each in its dtype. A mapping of these to
    weights: the weighted mean of their shares of the dense model, in units of 2**-50.
    """
    if target == "flops":
        return families.macs, UNITS[target]
    if target == "params":
        return parameter_products(families, parameters), UNITS[target]
    if isinstance(target, str):
        products = parameter_products(families, parameters)
        return tuple(
            replace(p, coefficient=p.coefficient * parameters[p.where].element_size()) for p in products
        ), UNITS[target]
    sizes = [family.size for family in families.families]
    summands: list[Product] = []
    for name, weight in target.items():
        products, unit = target_products(name, families, parameters)
        dense = build_cost_model(families, products, unit)(sizes)
        scale = round(_WEIGHTED_TOTAL * weight / sum(target.values()) / max(1, dense))
        summands += [replace(p, coefficient=p.coefficient * scale) for p in products]
    return tuple(summands), "weighted units"


def parameter_products(families: Families, parameters: Mapping[str, Tensor]) -> tuple[Product, ...]:
    """The number of parameters as products, one a tensor; tied tensors are listed once by their name."""
    labels: dict[str, dict[int, Tensor]] = {}
    for axis in families.axes:
        labels.setdefault(axis.tensor, {})[axis.axis] = axis.groups
    products = []
    for name, tensor in parameters.items():
        along = labels.get(name, {})
        coefficient = tensor.numel()
        for groups in along.values():
            coefficient //= max(1, groups.numel())
        rows, cols = (*along.values(), None, None)[:2]
        products.append(Product(coefficient, rows, cols, name))
    return tuple(products)


def build_cost_model(families: Families, products: Sequence[Product], unit: str) -> CostModel:
    """Flatten products over labelled axes into tables.

    Raises:
        GroupingError: groups of one family take unequal numbers of indices along one axis, so that
            the cost would not depend on the kept counts alone.
    """
    family = families.family_of_groups()
    sizes = [f.size for f in families.families]
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


def dense_cost(record: Record | None, target: object, now: int) -> int:
    """What the dense model cost of which a cut one costs `now`: MACs scale with the size of the input.

    Without a record, the model is the dense one.
    """
    if record is None:
        return now
    name = target_in(record, target)
    return now * int(record["dense"][name]) // max(1, int(record["left"][name]))


_WIDTHS = 32  # of a record: enough to know a model by


def make_record(
    families: Families, pruned: Tensor, parameters: Mapping[str, Tensor], before: Record | None
) -> Record:
    """The record of a cut that is about to be made.

    Args:
        families, parameters: of the model before it.
        pruned: [num_groups] bool.
        before: the record of an earlier cut of the same model: dense is what was dense then.
    """
    counts = [family.size for family in families.cropped(pruned.cpu()).families]
    sizes = [family.size for family in families.families]
    dense, left = {}, {}
    for target in TARGETS:
        cost = build_cost_model(families, *target_products(target, families, parameters))
        dense[target], left[target] = dense_cost(before, target, cost(sizes)), cost(counts)
    kept = [[f.name, n, f.size] for f, n in zip(families.families, counts, strict=True)]
    axes = zip(families.axes, families.cropped(pruned.cpu()).axes, strict=True)
    widths = [
        [now.tensor, now.axis, now.groups.numel()]
        for before_it, now in axes
        if now.groups.numel() != before_it.groups.numel() and now.tensor in parameters
    ]
    return {"dense": dense, "left": left, "kept": kept, "widths": widths[:_WIDTHS]}
