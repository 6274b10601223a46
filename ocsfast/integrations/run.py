"""What the callbacks of all frameworks have in common: one model, pruned over one training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ocsfast
from ocsfast.arguments import Inputs, options_of
from ocsfast.copies import Also
from ocsfast.history import StepReport
from ocsfast.optimizers import tells_by_steps
from ocsfast.pruner import Pruner
from ocsfast.record import record_of
from ocsfast.timetable import INNER_LOOP_CHECKS


class PruneRun:
    """A pruner that is attached once the framework has made an optimizer, or resumed before that.

    Frameworks restore the weights first; then optimizers are made; then their state is restored, and
    that of callbacks somewhere between. So weights of a cut model cut this one as they arrive, and the
    rest waits until training begins.
    """

    def __init__(
        self, ratio: float, example_inputs: Inputs, also: Iterable[Also], options: Mapping[str, Any]
    ) -> None:
        self.ratio = ratio
        self.example_inputs = example_inputs
        self.also = also
        self.options = dict(options)
        self.pruner: Pruner | None = None
        self.report = StepReport("observe")
        self._state: Mapping[str, Any] | None = None  # as saved
        self._attach: Callable[[], Pruner] | None = None  # to be called after the first step

    def expect_weights(self, model: nn.Module) -> None:
        """Let the model take the widths of a cut one whose weights are loaded."""
        ocsfast.fit_on_load(model, self._inputs(model), **self.options)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from here when training begins. An empty state is that of a run that had not begun."""
        self._state = state or None

    def state_dict(self) -> Mapping[str, Any]:
        """The pruner's own state; see `Pruner.state_dict`."""
        if self.pruner is not None:
            return self.pruner.state_dict()
        return self._state or {}

    def begin(self, model: nn.Module, optimizer: Optimizer, steps: int | None) -> None:
        """Training begins now, with optimizer and weights restored if they are to be.

        Args:
            steps: of the optimizer in the whole run, if that is known.
        """
        if self.pruner is not None:  # a second round of training with the same callback
            return
        options = dict(self.options)
        if steps is not None:
            options.setdefault("total_steps", steps)
            options.setdefault("check_every", max(1, steps // INNER_LOOP_CHECKS))
        state = self._state
        if state is not None and state["progress"]["stage"] == "pruned":
            self.report = StepReport(**{**state["progress"]["history"][-1], "cut": False})
            return

        again = options_of(None, options).again
        if state is None and not again and record_of(model) is not None:
            self.report = ocsfast.step(model, self.ratio, **options)  # which says so, and rests
            return

        def attach() -> Pruner:
            return ocsfast.attach(
                model,
                self.ratio,
                optimizer=optimizer,
                example_inputs=self._inputs(model),
                also=self.also,
                **options,
            )

        if state is None and tells_by_steps(optimizer):
            self._attach = attach
            return
        self.pruner = attach()
        if state is not None:
            self.pruner.load_state_dict(state)

    def step(self) -> StepReport:
        """An optimizer step has been taken."""
        if self._attach is not None:
            self.pruner, self._attach = self._attach(), None
        if self.pruner is not None:
            self.report = self.pruner.step()
        return self.report

    def _inputs(self, model: nn.Module) -> Any:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return torch.utils._pytree.tree_map(moved, self.example_inputs)
