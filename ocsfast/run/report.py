"""What a call of `step` returns: where the run stands."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Frozen

STAGES = ("observe", "sparsify", "pruned")


@dataclass(frozen=True)
class StepReport:
    """One check, or where things stand if this call made none.

    Costs are exact integers in `unit`. Until the pruner is attached nothing tells what goes: `check` is
    0, and the three costs are the model's number of parameters.

    Attributes:
        stage: "observe", "sparsify" or "pruned", after this call.
        check: Number of this check, counted from 1.
        steps: Optimizer steps of the run up to it.
        stability: Eq. 3, in [0, 1]; None before check lag + 1.
        mean_stability: Eq. 4, in [0, 1]; None as long.
        lam: lambda in force from here on, for the mean learning rate.
        nats: Sum of lambda * lr so far: by Eq. 9 alone pruned weights have shrunk by exp(-nats).
        residual: Mean saliency (Eq. 2) of the pruned groups, divided by that of the kept ones.
        changed: Groups that changed sides since the last check.
        cost: Of the model as it is.
        cost_at_cut: Of the model with the present choice cut out.
        cost_dense: Of the model at attach.
        unit: Of these three: "MACs" of a sample's forward pass, "parameters", "bytes", "nanoseconds" of
            a batch, ...
        cut: Whether the cut happened in this call.
        forced: Whether the deadline or `Pruner.cut()` made it, not stability.
        seconds: Wall-clock time of this check.
        accuracy: The last that `step` was told, in whatever unit.
        kept: For each family its name, how many groups stay, and of how many.
        frozen: What is never pruned, and why.
        stale: At the cut: attributes that may still say a width of before it, as "layers.2.c = 64".

    Examples:
        >>> StepReport("observe", kept=(("conv1", 12, 16),)).kept_share()
        {'conv1': 0.75}
    """

    stage: str
    check: int = 0
    steps: int = 0
    stability: float | None = None
    mean_stability: float | None = None
    lam: float = 0.0
    nats: float = 0.0
    residual: float | None = None
    changed: int = 0
    cost: int = 0
    cost_at_cut: int = 0
    cost_dense: int = 0
    unit: str = "MACs"
    cut: bool = False
    forced: bool = False
    seconds: float = 0.0
    accuracy: float | None = None
    kept: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)
    frozen: tuple[Frozen, ...] = field(default=(), repr=False)
    stale: tuple[str, ...] = ()

    def kept_share(self) -> dict[str, float]:
        """The share of groups that stay, 0 to 1, by family (named after its first layer)."""
        return {name: kept / size for name, kept, size in self.kept}

    @property
    def dense(self) -> tuple[Frozen, ...]:
        """The old name of `frozen`."""
        warnings.warn("StepReport.dense is now StepReport.frozen", DeprecationWarning, stacklevel=2)
        return self.frozen


def unattached(model: nn.Module, accuracy: float | None = None) -> StepReport:
    """The report of a call that only listens."""
    cost = sum(parameter.numel() for parameter in model.parameters())
    return StepReport(
        "observe",
        cost=cost,
        cost_at_cut=cost,
        cost_dense=cost,
        unit="parameters",
        accuracy=accuracy,
    )


def told(accuracy: Any) -> float | None:
    """What a caller says of the model's accuracy, as a plain number.

    Raises:
        ConfigError: it is no number.
    """
    try:
        return None if accuracy is None else float(accuracy)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"accuracy={accuracy!r}: a number is expected") from error
