"""What is recorded of a training run: plain numbers, no model, no library object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one run: a row of metrics.csv."""

    run: str  # "dense" or "one-cycle"
    epoch: int  # from 1
    loss: float  # mean over the epoch's batches
    accuracy: float  # on the test images, %, after the epoch (and after the cut, if one was made)
    lr: float  # at the end of the epoch
    train_seconds: float  # forward, backward, optimizer, penalty
    step_seconds: float  # ocsfast.step
    macs: int  # of one sample's forward pass, after the epoch
    stage: str = "dense"
    stability: float | None = None  # J, Eq. 3
    mean_stability: float | None = None  # Eq. 4
    strength: float = 0.0  # lambda
    nats: float = 0.0
    residual: float | None = None
    changed: int = 0
    macs_at_cut: int | None = None  # what a cut made now would leave
    cut: bool = False
    forced: bool = False


@dataclass(frozen=True)
class Cut:
    """The moment at which the pruning became real."""

    epoch: int
    forced: bool  # by the deadline
    accuracy_before: float  # %, before any further training
    accuracy_after: float


@dataclass(frozen=True)
class FamilyWidth:
    """How many channels of a family were there, and how many stayed."""

    name: str
    size: int
    kept: int


@dataclass(frozen=True, eq=False)
class NormSnapshot:
    """The groups at one check."""

    epoch: int
    norms: NDArray[np.float64]  # [groups], Eq. 2
    pruned: NDArray[np.bool_]  # [groups], the partition's choice


@dataclass(frozen=True)
class RunResult:
    """One training run, from first to last epoch."""

    rows: tuple[EpochRow, ...]
    params: int  # at the end
    macs: int
    set_up_seconds: float  # attaching: outside the training time
    cut: Cut | None = None
    t_sl: int | None = None
    t_cut: int | None = None
    widths: tuple[FamilyWidth, ...] = ()
    snapshots: tuple[NormSnapshot, ...] = ()
    frozen: tuple[str, ...] = ()  # "layer: reason"

    @property
    def training_seconds(self) -> float:
        """Time in training and in ocsfast.step; evaluation and set-up excluded."""
        return sum(row.train_seconds + row.step_seconds for row in self.rows)

    def epoch_seconds(self, *, pruned: bool) -> float | None:
        """Median seconds an epoch over the epochs trained after (`pruned`) or before the cut."""
        last = self.cut.epoch if self.cut else len(self.rows)
        rows = self.rows[last:] if pruned else self.rows[:last]
        return float(np.median([r.train_seconds + r.step_seconds for r in rows])) if rows else None
