"""Text for the terminal: a line for each epoch, and a table at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ocsfast.train.report.records import EpochRow


def progress_line(row: EpochRow, epochs: int) -> str:
    """One epoch in one line."""
    line = (
        f"{row.run:>9}  epoch {row.epoch:>3}/{epochs}  loss {row.loss:.4f}  "
        f"accuracy {row.accuracy:6.2f} %  {row.train_seconds + row.step_seconds:6.2f} s  {row.stage:<8}"
    )
    if row.stage != "dense":
        stability, mean = (
            "  -  " if value is None else f"{value:.3f}" for value in (row.stability, row.mean_stability)
        )
        line += f"  J {stability} (mean {mean})  λ {row.strength:.2e}"
    line += f"  {millions(row.macs)} MMACs"
    if row.macs_at_cut is not None and row.macs_at_cut != row.macs:
        line += f" (cut: {millions(row.macs_at_cut)})"
    if row.cut:
        line += "  <- cut by the deadline" if row.forced else "  <- cut"
    return line


def millions(count: float) -> str:
    """A count in millions, with two decimals."""
    return f"{count / 1e6:.2f}"


def _number(form: str, scale: float = 1.0) -> Callable[[float | None], str]:
    """Writes numbers in a format, multiplied by `scale`; "-" for None."""
    return lambda value: "-" if value is None else format(value * scale, form)


# (title, key in a run's summary, how it is written)
_LINES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("accuracy, %", "accuracy", _number(".2f")),
    ("MMACs", "macs", _number(".2f", 1e-6)),
    ("parameters, M", "params", _number(".3f", 1e-6)),
    ("training, s", "training_seconds", _number(".1f")),
    ("an epoch before the cut, s", "epoch_seconds_before_cut", _number(".3f")),
    ("an epoch after the cut, s", "epoch_seconds_after_cut", _number(".3f")),
    ("latency of a batch, ms", "latency_ms", _number(".2f")),
    ("accuracy just before the cut, %", "accuracy_before_cut", _number(".2f")),
    ("accuracy just after the cut, %", "accuracy_after_cut", _number(".2f")),
)


def comparison_table(summary: Mapping[str, Any]) -> str:
    """A table with a column for each run of a summary, and one for what changed between two."""
    runs = {
        title: summary[key]
        for title, key in (("dense", "dense"), ("one-cycle", "one_cycle"))
        if summary.get(key)
    }
    rows = [["", *runs, *(["change"] if len(runs) == 2 else [])]]
    for title, key, write in _LINES:
        values = [run.get(key) for run in runs.values()]
        if all(value is None for value in values):
            continue
        row = [title, *map(write, values)]
        if len(runs) == 2:
            row.append(_change(key, values[0], values[1]))
        rows.append(row)
    return _aligned(rows)


def _change(key: str, dense: float | None, pruned: float | None) -> str:
    """What pruning changed: a difference in accuracy, a share of a size, a factor of a time."""
    if dense is None or pruned is None or not dense:
        return ""
    if key == "accuracy":
        return f"{pruned - dense:+.2f}"
    if key in ("macs", "params"):
        return f"{100 * (pruned / dense - 1):+.1f} %"
    return f"{dense / pruned:.2f}x speed"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines: the first column flush left, the others right, a rule below the titles."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)
