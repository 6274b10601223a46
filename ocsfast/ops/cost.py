"""The cost model: exact, in integers.

cost = sum of coefficient * kept(rows) * kept(cols), with kept(axis) = fixed + sum over families of
multiplicity * kept(family). For MACs this is what `torch.utils.flop_counter.FlopCounterMode` counts
on the cut model, halved. And the sum of what tables of measured values say (`Lookup`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ocsfast.core.errors import ConfigError, GroupingError
from ocsfast.core.families import Families, Lookup, Product

# `CostModel.layout`: four counts, then the start of each table in `CostModel.tables`.
COUNTS = ("axes", "entries", "terms", "lookups")
TABLES = (
    "axis_fixed",  # [axes] indices that never go
    "axis_start",  # [axes + 1] CSR: the families along axis a are entries axis_start[a] .. [a + 1]
    "entry_family",  # [entries]
    "entry_count",  # [entries] indices one group of that family takes along the axis
    "term_coefficient",  # [terms]
    "term_rows",  # [terms] an axis
    "term_cols",  # [terms] an axis
    "lookup_rows",  # [lookups] an axis
    "lookup_cols",  # [lookups] an axis
    "grid_start",  # [2 * lookups + 1] CSR: the grid of a lookup's rows, then that of its columns
    "value_start",  # [lookups + 1] CSR: a lookup's values, row by row
    "grid",  # [*] counts
    "values",  # [*]
)
# csrc/plan.h: what 64 bits, and a double, have room for.
MAX_GRID_COUNT = 2**20
MAX_LOOKUPS = 2**53


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
        products = int((self.table("term_coefficient").cpu() * size[rows] * size[cols]).sum())
        return products + self._looked_up(size)

    def _looked_up(self, size: Tensor) -> int:
        """What the lookups cost where axes have these sizes."""
        if not self.layout[COUNTS.index("lookups")]:
            return 0
        names = ("grid_start", "value_start", "grid", "values")
        grids, firsts, grid, values = (self.table(name).tolist() for name in names)
        sides = (size[self.table(name).cpu()].tolist() for name in ("lookup_rows", "lookup_cols"))
        total = 0
        for k, (rows, cols) in enumerate(zip(*sides, strict=True)):
            begin, middle, end = grids[2 * k : 2 * k + 3]
            points = end - middle
            table = values[firsts[k] : firsts[k + 1]]
            lines = [table[n : n + points] for n in range(0, len(table), points)]
            total += interpolate(grid[begin:middle], grid[middle:end], lines, rows, cols)
        return total

    def to(self, device: torch.device) -> CostModel:
        return CostModel(self.tables.to(device), self.layout, self.unit)


def interpolate(
    row_grid: Sequence[int],
    col_grid: Sequence[int],
    values: Sequence[Sequence[int]],
    rows: int,
    cols: int,
) -> int:
    """The value of a table at (rows, cols): bilinear between grid points, rounded down.

    Examples:
        >>> interpolate([2, 4], [1], [[10], [15]], 3, 1)
        12
    """
    i, row, height = _place(row_grid, rows)
    j, col, width = _place(col_grid, cols)
    low, high = values[i], values[i + (row > 0)]
    along = ((width - col) * line[j] + col * line[j + (col > 0)] for line in (low, high))
    return sum(w * v for w, v in zip((height - row, row), along, strict=True)) // (height * width)


def _place(grid: Sequence[int], count: int) -> tuple[int, int, int]:
    """Where a count lies: a point of the grid, how far beyond it, and how far the next point is."""
    k = bisect_right(grid, count) - 1
    if k < 0 or k + 1 == len(grid):
        return max(k, 0), 0, 1
    return k, count - grid[k], grid[k + 1] - grid[k]


class _Axes:
    """The labelled axes of a cost's summands, each once."""

    def __init__(self, families: Families) -> None:
        self._families = families
        self._known: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self.fixed: list[int] = []
        self.entries: list[dict[int, int]] = []  # family -> indices of one of its groups

    def pair(self, summand: Product | Lookup) -> tuple[int, int]:
        """The numbers of a summand's two axes."""
        return self._number(summand.rows, summand.where), self._number(summand.cols, summand.where)

    def _number(self, labels: Tensor | None, where: str) -> int:
        if labels is None:
            free, along = 1, dict[int, int]()
        else:
            free, along = int((labels < 0).sum()), self._along(labels, where)
        key = (free, tuple(along.items()))
        if key not in self._known:
            self._known[key] = len(self.fixed)
            self.fixed.append(free)
            self.entries.append(along)
        return self._known[key]

    def _along(self, labels: Tensor, where: str) -> dict[int, int]:
        along = {}
        for f, count in self._families.indices_of_groups(labels).items():
            if count is None:
                name = self._families.families[f].name
                raise GroupingError(
                    f"{where}: groups of family {name} take unequal numbers of its indices"
                )
            along[f] = count
        return along


def build_cost_model(families: Families, summands: Sequence[Product | Lookup], unit: str) -> CostModel:
    """Flatten summands over labelled axes into tables.

    Raises:
        ConfigError: a lookup's table is not as `Lookup` says.
        GroupingError: groups of one family take unequal numbers of indices along one axis, so that
            the cost would not depend on the kept counts alone.
    """
    products = [s for s in summands if not isinstance(s, Lookup)]
    lookups = [s for s in summands if isinstance(s, Lookup)]
    _check_lookups(lookups)
    axes = _Axes(families)
    terms = [(s.coefficient, *axes.pair(s)) for s in products]
    sides = [axes.pair(s) for s in lookups]
    grids = [grid for s in lookups for grid in (s.row_grid, s.col_grid)]
    values = [[value for line in s.values for value in line] for s in lookups]
    sections = (
        axes.fixed,
        _starts(axes.entries),
        [f for along in axes.entries for f in along],
        [count for along in axes.entries for count in along.values()],
        *([term[k] for term in terms] for k in range(3)),
        *([side[k] for side in sides] for k in range(2)),
        _starts(grids),
        _starts(values),
        [count for grid in grids for count in grid],
        [value for table in values for value in table],
    )
    counts = (len(axes.fixed), sum(map(len, axes.entries)), len(terms), len(lookups))
    tables = torch.tensor([value for section in sections for value in section], dtype=torch.int64)
    return CostModel(tables, (*counts, *_starts(sections)[:-1]), unit)


def _starts(parts: Sequence[Sized]) -> list[int]:
    """Where each part begins once they lie one behind the other, and where the last one ends."""
    return [0, *accumulate(map(len, parts))]


def _check_lookups(lookups: Sequence[Lookup]) -> None:
    total = 0
    for lookup in lookups:
        fault = _fault(lookup)
        if fault:
            raise ConfigError(f"{lookup.where}: the table of its cost {fault}")
        total += lookup.values[-1][-1]
        if total > MAX_LOOKUPS:
            raise ConfigError(
                f"{lookup.where}: with its table the costs of all tables sum to {total}, above 2**53. "
                "Count in a larger unit"
            )


def _fault(lookup: Lookup) -> str:
    """What is wrong with a table, for people; "" where nothing is."""
    sides = (("row_grid", lookup.row_grid, lookup.rows), ("col_grid", lookup.col_grid, lookup.cols))
    for field, grid, labels in sides:
        name = f"{field}={tuple(grid)!r}"
        if labels is None and tuple(grid) != (1,):
            return f"has {name}, but no labels there: (1,) is expected"
        if not grid or not all(_is_integer(n) and 1 <= n <= MAX_GRID_COUNT for n in grid):
            return f"has {name}: integers from 1 to 2**20 are expected"
        if any(a >= b for a, b in pairwise(grid)):
            return f"has {name}, which does not ascend"
    height, width = len(lookup.row_grid), len(lookup.col_grid)
    if len(lookup.values) != height or any(len(line) != width for line in lookup.values):
        sizes = sorted({len(line) for line in lookup.values})
        return f"has {len(lookup.values)} rows of {sizes} values for grids of {height} and {width}"
    for i, line in enumerate(lookup.values):
        for j, value in enumerate(line):
            if not _is_integer(value) or value < 0:
                return f"has values[{i}][{j}]={value!r}: an integer of at least 0 is expected"
            before = max(lookup.values[i - 1][j] if i else 0, line[j - 1] if j else 0)
            if value < before:
                return (
                    f"falls from {before} to {value} at values[{i}][{j}], but a layer that keeps more "
                    "may not cost less: raise what was measured to the largest before it"
                )
    return ""


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
