"""A pruner's numbers where the replays of a captured optimizer step change them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ocsfast.core.config import Config
from ocsfast.optim.param_groups import Scalar
from ocsfast.optim.strength import Ramp, lambda_for, paper_lambda
from ocsfast.run.state import Progress


class Clock:
    """The numbers of `Progress` that an optimizer step reads and changes, as tensors on a device.

    A captured step replays kernels only: no hook runs then. So with `Config.capturable` the hooks
    compute lambda from these tensors and count in them, in every stage, and a check moves what was
    counted into `Progress`. Before sparsity learning begins `mask` is empty and lambda 0: the same graph
    serves until the cut.

    Args:
        groups: of the plan.
        device: of the weights.
    """

    def __init__(self, config: Config, groups: int, device: torch.device) -> None:
        self._config = config
        self._numbers = torch.zeros(7, dtype=torch.float64, device=device)
        self._steps, self._nats, self._elapsed, self._active, self._planned, self.scale, self._lam = (
            self._numbers.unbind()
        )
        self._ends = torch.arange(2, dtype=torch.float64, device=device)  # of a step: 0 and 1
        self.mask = torch.zeros(groups, dtype=torch.bool, device=device)  # of groups that shrink
        self.load(Progress(), None)

    def load(self, now: Progress, mask: Tensor | None) -> None:
        """Take over what a check has decided; what was counted has to be settled before."""
        active = now.stage == "sparsify" and mask is not None and now.start is not None
        elapsed = now.steps - (now.start or 0) if active else 0
        paper = paper_lambda(self._config, now.check - (now.t_sl or 0)) if active else 0.0
        scale = 1.0 if now.scale is None else now.scale
        values = [0.0, 0.0, elapsed, active, max(1, now.planned), scale, paper]
        self._numbers.copy_(torch.tensor(values, dtype=torch.float64))
        self.mask.zero_()
        if active and mask is not None:
            self.mask.copy_(mask)

    def settle(self, now: Progress) -> None:
        """Move the steps and nats that were counted since into `now`; this waits for the device."""
        steps, nats = self._numbers[:2].tolist()
        if steps:
            now.steps += round(steps)
            now.nats = now.nats + nats
            self._numbers[:2].zero_()

    def lam(self, rate: Scalar) -> Scalar:
        """Eq. 7, or the automatic ramp, for the coming step: 0 outside of its stage."""
        config = self._config
        if config.penalty == "none":
            return 0.0
        if config.strength == "paper":
            return self._lam * self._active
        ramp = Ramp(config.nats, self._planned, config.shape)
        # `ramp.at`, with both of its sums taken at once: every op here is a launch in each replay.
        before, after = cast(Tensor, ramp.total(self._elapsed + self._ends)).unbind()
        return lambda_for(rate, (after - before) * self._active)

    def count(self, lam: Scalar, rate: Scalar, skipped: Tensor | None) -> None:
        """A step at `lam` has been taken, unless `skipped` (0-dim) is not 0."""
        if skipped is None:
            self._steps.add_(1.0)
            self._nats.add_(lam * rate)
            self._elapsed.add_(self._active)
            return
        taken = (skipped.reshape(()) == 0).to(self._steps)
        self._steps.add_(taken)
        self._nats.add_(lam * rate * taken)
        self._elapsed.add_(taken * self._active)

    def tensors(self) -> list[Tensor]:
        """What a captured step reads and writes."""
        return [self._numbers, self._ends, self.mask]
