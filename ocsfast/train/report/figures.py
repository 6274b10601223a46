"""The figures of the paper, drawn for a run of one's own. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ocsfast.train.report.records import Check, FamilyWidth, NormSnapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PRUNED, _KEPT = "tab:red", "tab:blue"
_PANELS = 12  # the most histograms that norms.png shows


def _figure(width: float, height: float) -> Figure:
    """An empty figure, made without pyplot, which needs a display and leaves global state behind."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_stability(
    checks: Sequence[Check], t_sl: float | None, t_cut: int | None, epochs: int, path: Path
) -> None:
    """Fig. 3: the stability score at each check, raw (dotted) and averaged (solid).

    Vertical lines mark t_sl and t*, in epochs, unless they are None.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    raw = [(check.epoch, check.stability) for check in checks if check.stability is not None]
    mean = [(check.epoch, check.mean_stability) for check in checks if check.mean_stability is not None]
    for points, style, label in ((raw, ":", "J"), (mean, "-", "J, averaged")):
        if points:
            axes.plot(*zip(*points, strict=True), style, color=_KEPT, label=label)
    for epoch, color, label in ((t_sl, "tab:orange", "$t_{sl}$"), (t_cut, _PRUNED, "$t^*$ (cut)")):
        if epoch is not None:
            axes.axvline(epoch, color=color, linestyle="--", label=f"{label} = {epoch:.3g}")
    axes.set(xlabel="epoch", ylabel="stability score", xlim=(0, epochs + 1))
    axes.set_title("Which groups are kept: agreement with the checks before", fontsize=10)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def save_norms(snapshots: Sequence[NormSnapshot], path: Path) -> None:
    """Fig. 5: histograms of the groups' norms at some of the epochs, pruned in red and kept in blue."""
    shown = _spread(snapshots, _PANELS)
    columns = min(4, max(len(shown), 1))
    lines = -(-max(len(shown), 1) // columns)
    figure = _figure(3 * columns, 2.2 * lines + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    everything = np.concatenate([shot.norms for shot in shown]) if shown else np.zeros(1)
    bins = np.linspace(0.0, max(float(everything.max()), 1e-12), 41)
    for panel, shot in zip(panels, shown, strict=False):
        parts = [shot.norms[shot.pruned], shot.norms[~shot.pruned]]
        panel.hist(parts, bins=bins, stacked=True, color=[_PRUNED, _KEPT], label=["pruned", "kept"])
        panel.set_title(f"epoch {shot.epoch}", fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in panels[len(shown) :]:
        panel.set_axis_off()
    if shown:
        panels[0].legend(fontsize=8)
    figure.supxlabel("norm of a group (Eq. 2)", fontsize=9)
    figure.supylabel("groups", fontsize=9)
    figure.savefig(path, dpi=130)


def _spread(items: Sequence[NormSnapshot], count: int) -> list[NormSnapshot]:
    """At most `count` items at equal distances, with the first and the last among them."""
    if len(items) <= count:
        return list(items)
    chosen: NDArray[Any] = np.linspace(0, len(items) - 1, count).round().astype(int)
    return [items[index] for index in chosen]


def save_filters(widths: Sequence[FamilyWidth], path: Path) -> None:
    """Fig. 6: pruned and kept filters of each layer. Layers that share their channels are one bar."""
    figure = _figure(max(6.0, 0.28 * len(widths) + 2.5), 4.5)
    axes = figure.subplots()
    places = np.arange(len(widths))
    kept = np.array([width.kept for width in widths], dtype=float)
    pruned = np.array([width.size - width.kept for width in widths], dtype=float)
    axes.bar(places, kept, color=_KEPT, label="kept")
    axes.bar(places, pruned, bottom=kept, color=_PRUNED, label="pruned")
    axes.set_xticks(places, [width.name for width in widths], rotation=90, fontsize=7)
    axes.set_ylabel("filters")
    axes.margins(y=0.1)
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=130)
