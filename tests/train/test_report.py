"""Figures and tables from made-up records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ocsfast.train.report.figures import save_filters, save_norms, save_stability
from ocsfast.train.report.records import Check, Cut, EpochRow, FamilyWidth, NormSnapshot, RunResult
from ocsfast.train.report.table import comparison_table, progress_line

image = pytest.importorskip("PIL.Image")


def row(epoch: int, **changes: object) -> EpochRow:
    values: dict[str, object] = {
        "run": "one-cycle",
        "epoch": epoch,
        "loss": 0.5,
        "accuracy": 90.0,
        "lr": 0.1,
        "train_seconds": 1.0,
        "step_seconds": 0.5,
        "macs": 2_000_000,
        "stage": "sparsify",
        "stability": 0.9,
        "mean_stability": 0.8,
        "macs_at_cut": 1_000_000,
    }
    return EpochRow(**{**values, **changes})  # type: ignore[arg-type]


def snapshots(count: int) -> list[NormSnapshot]:
    random = np.random.default_rng(0)
    return [NormSnapshot(n + 1, random.random(50), random.random(50) < 0.5) for n in range(count)]


def colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.array(image.open(path).convert("RGB")).reshape(-1, 3)
    return {tuple(map(int, colour)) for colour in np.unique(pixels, axis=0)}


RED, BLUE = (214, 39, 40), (31, 119, 180)  # matplotlib's tab:red and tab:blue


def test_stability(tmp_path: Path) -> None:
    checks = [Check(n / 2, None if n < 3 else 1 - 1 / n, None if n < 3 else 0.8) for n in range(1, 20)]
    save_stability(checks, 1.5, 8, 10, tmp_path / "a.png")
    assert {RED, BLUE} <= colours(tmp_path / "a.png")


@pytest.mark.parametrize("count", [1, 5, 40])
def test_norms(tmp_path: Path, count: int) -> None:
    save_norms(snapshots(count), tmp_path / "a.png")
    assert {RED, BLUE} <= colours(tmp_path / "a.png")


def test_norms_all_zero(tmp_path: Path) -> None:
    save_norms([NormSnapshot(1, np.zeros(4), np.ones(4, bool))], tmp_path / "a.png")
    assert RED in colours(tmp_path / "a.png")


def test_filters(tmp_path: Path) -> None:
    save_filters([FamilyWidth("conv1", 64, 20), FamilyWidth("conv2", 32, 32)], tmp_path / "a.png")
    assert {RED, BLUE} <= colours(tmp_path / "a.png")


def test_nothing_to_draw(tmp_path: Path) -> None:
    save_stability([], None, None, 1, tmp_path / "a.png")
    save_norms([], tmp_path / "b.png")
    save_filters([], tmp_path / "c.png")


def test_times_of_a_run() -> None:
    rows = tuple(row(n, train_seconds=3.0 if n <= 4 else 1.0) for n in range(1, 8))
    result = RunResult(rows, 1, 1, 0.0, cut=Cut(4, False, 90.0, 89.0))
    assert result.training_seconds == pytest.approx(4 * 3.5 + 3 * 1.5)
    assert result.epoch_seconds(pruned=False) == 3.5
    assert result.epoch_seconds(pruned=True) == 1.5
    uncut = RunResult(rows, 1, 1, 0.0)
    assert uncut.epoch_seconds(pruned=True) is None


def test_progress_line() -> None:
    line = progress_line(row(3), 40)
    for part in ("3/40", "0.5000", "90.00 %", "sparsify", "0.900", "λ", "2.00 MMACs (cut: 1.00)"):
        assert part in line
    assert "<- cut by the deadline" in progress_line(row(3, cut=True, forced=True), 40)
    assert "J" not in progress_line(row(3, stage="dense"), 40)


def test_table() -> None:
    dense = {"accuracy": 98.0, "macs": 2_000_000, "params": 10, "training_seconds": 30.0}
    pruned = {**dense, "accuracy": 97.5, "macs": 1_000_000, "training_seconds": 20.0}
    lines = comparison_table({"dense": dense, "one_cycle": pruned}).splitlines()
    assert lines[0].split() == ["dense", "one-cycle", "change"]
    assert any(line.split()[-1] == "-0.50" for line in lines)
    assert any("-50.0 %" in line for line in lines)
    assert any("1.50x speed" in line for line in lines)
    assert "change" not in comparison_table({"one_cycle": pruned})
