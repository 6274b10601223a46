"""What is recorded of a training run: plain numbers and strings, no model or tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochRow:
    """One epoch of one run: a row of metrics.csv, whose columns are these fields."""

    run: str  # "dense" or "one-cycle"
    epoch: int  # from 1
    loss: float  # mean over the epoch's batches
    accuracy: float  # on the test images, in percent, after the epoch and after a cut if one was made
    lr: float  # at the end of the epoch
    train_seconds: float  # of forward and backward passes, the optimizer and the penalty
    step_seconds: float  # ocsfast.step
    macs: int  # of one sample's forward pass, after the epoch
    stage: str = "dense"
    stability: float | None = None  # J, Eq. 3
    mean_stability: float | None = None  # Eq. 4
    strength: float = 0.0  # lambda of Eq. 8 and 9
    nats: float = 0.0  # the sum of lambda * lr so far
    residual: float | None = None  # norm of the pruned groups relative to the kept ones
    changed: int = 0  # groups that the choice treats otherwise than at the check before
    macs_at_cut: int | None = None  # what a cut made now would leave
    cut: bool = False  # whether the cut was made after this epoch
    forced: bool = False  # whether the deadline forced it


@dataclass(frozen=True)
class Check:
    """One check of a run."""

    epoch: float  # epochs that were over by then, and the share of the one under way
    stability: float | None  # J, Eq. 3
    mean_stability: float | None  # Eq. 4


@dataclass(frozen=True)
class Cut:
    """The cut of a run."""

    epoch: int
    forced: bool  # by the deadline
    accuracy_before: float  # in percent, just before the cut
    accuracy_after: float  # in percent, just after it, without further training


@dataclass(frozen=True)
class FamilyWidth:
    """How many groups a family had, and how many were kept."""

    name: str
    size: int
    kept: int


@dataclass(frozen=True, eq=False)
class NormSnapshot:
    """The norm of every group at one check, and which of them were to go."""

    epoch: int
    norms: NDArray[np.float64]  # [groups], Eq. 2
    pruned: NDArray[np.bool_]  # [groups], true: the partition prunes it


@dataclass(frozen=True)
class RunResult:
    """A training run, from the first to the last epoch."""

    rows: tuple[EpochRow, ...]
    params: int  # at the end
    macs: int  # of one sample's forward pass, at the end
    set_up_seconds: float  # of attaching, which is not part of the training time
    cut: Cut | None = None
    t_sl: float | None = None  # the epoch in which sparsity learning began, Eq. 5, as `Check.epoch`
    checks: tuple[Check, ...] = ()
    widths: tuple[FamilyWidth, ...] = ()
    snapshots: tuple[NormSnapshot, ...] = ()
    frozen: tuple[str, ...] = ()  # "layer: reason"

    @property
    def t_cut(self) -> int | None:
        """The epoch after which the cut was made, Eq. 6; None without one."""
        return self.cut.epoch if self.cut else None

    @property
    def training_seconds(self) -> float:
        """Time of training and of `ocsfast.step`, without evaluation and set-up."""
        return sum(row.train_seconds + row.step_seconds for row in self.rows)

    def epoch_seconds(self, *, pruned: bool) -> float | None:
        """The median time of the epochs after the cut (`pruned=True`) or before it; None without any."""
        last = self.cut.epoch if self.cut else len(self.rows)
        rows = self.rows[last:] if pruned else self.rows[:last]
        return float(np.median([r.train_seconds + r.step_seconds for r in rows])) if rows else None
