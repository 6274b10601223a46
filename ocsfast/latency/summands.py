"""What a latency table says of a model, as summands of a cost."""

from __future__ import annotations

from bisect import bisect_right

from torch import Tensor

from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Families, Lookup, Operation, Product
from ocsfast.core.latency import Entry, Extent, LatencyRecord
from ocsfast.latency.sides import Profiles, is_product, sides_of


def latency_summands(table: LatencyRecord, families: Families) -> tuple[Product | Lookup, ...]:
    """One summand for each operator that can shrink, and one for all that cannot.

    Args:
        table: of this model, or of what it was before it was cut.
        families: of the model.

    Raises:
        ConfigError: the table is of another model, or of one of which less may go.
    """
    if not families.operations:
        raise ConfigError(
            "target= is a latency table, but the model's operators are not known: the second engine "
            "(torch-pruning) does not name them"
        )
    called = {operation.node: operation for operation in families.operations}
    profiles = Profiles(families)
    summands: list[Product | Lookup] = []
    constant = table.rest
    timed = set()
    for entry in table.entries:
        for node in entry.nodes:
            operation = called.get(node)
            if operation is None or operation.operator != entry.operator:
                there = "nothing" if operation is None else operation.operator
                raise _other(f"it has {entry.operator} as {node}, where the model calls {there}")
            timed.add(node)
            summand = _summand(entry, operation, profiles)
            if isinstance(summand, int):
                constant += summand
            else:
                summands.append(summand)
    for operation in families.operations:
        missing = is_product(operation.operator) and operation.node not in timed
        if missing and sides_of(operation, profiles):
            raise _other(f"it has no times of {operation.operator} in {operation.where or 'the model'}")
    return (*summands, Product(constant, None, None, "the rest of the model"))


def is_of_dense(table: LatencyRecord, families: Families) -> bool:
    """Whether the model was cut since the table was measured: some width is less than the table's."""
    called = {operation.node: operation for operation in families.operations}
    return any(
        _size(side, called[node]) < side.kept[-1]
        for entry in table.entries
        for side in (entry.rows, entry.cols)
        if side is not None
        for node in entry.nodes
        if node in called
    )


def _summand(entry: Entry, operation: Operation, profiles: Profiles) -> Lookup | int:
    """The cost of one call; a number where nothing of it may go."""
    sides = [side for side in (entry.rows, entry.cols) if side is not None]
    if len(sides) < len(sides_of(operation, profiles)):
        raise ConfigError(
            f"more of the model may go than of the one that the latency table was measured on: "
            f"{operation.where or operation.node} was taken to stay. Measure it with the same keep=, "
            "only= and kinds="
        )
    rows, cols, values = entry.rows, entry.cols, entry.nanoseconds
    row_labels, row_size = _along(rows, operation, profiles)
    col_labels, col_size = _along(cols, operation, profiles)
    if rows is not None and row_labels is None:
        values = (tuple(_between(rows.kept, column, row_size) for column in zip(*values, strict=True)),)
    if cols is not None and col_labels is None:
        values = tuple((_between(cols.kept, row, col_size),) for row in values)
    if row_labels is None and col_labels is None:
        return values[0][0]
    row_grid = (1,) if rows is None or row_labels is None else rows.kept
    col_grid = (1,) if cols is None or col_labels is None else cols.kept
    where = operation.where or operation.node
    return Lookup(row_labels, col_labels, row_grid, col_grid, values, where)


def _along(side: Extent | None, operation: Operation, profiles: Profiles) -> tuple[Tensor | None, int]:
    """The groups along a side, None where all of it stays, and its size."""
    if side is None:
        return None, 1
    size = _size(side, operation)
    if size < 1 or size > side.kept[-1]:
        raise _other(
            f"it has {side.kept[-1]} indices along dim {side.dim} of tensor {side.tensor} of "
            f"{operation.operator} in {operation.where or 'the model'}, which has {max(0, size)}"
        )
    labels = operation.groups[side.tensor][side.dim]
    return (None if labels is None or profiles.of(labels) is None else labels), size


def _size(side: Extent, operation: Operation) -> int:
    """The size of a side in the model; 0 where there is no such place."""
    shapes = operation.shapes
    there = side.tensor < len(shapes) and side.dim < len(shapes[side.tensor])
    return shapes[side.tensor][side.dim] if there else 0


def _between(grid: tuple[int, ...], values: tuple[int, ...], count: int) -> int:
    """The value at a count between two that were measured, rounded down."""
    k = bisect_right(grid, count) - 1
    if k < 0 or k + 1 == len(grid):
        return values[max(k, 0)]
    width = grid[k + 1] - grid[k]
    return ((grid[k + 1] - count) * values[k] + (count - grid[k]) * values[k + 1]) // width


def _other(why: str) -> ConfigError:
    return ConfigError(f"target= is a latency table of another model: {why}")
