"""What the callbacks of all frameworks have in common: one model, pruned over one training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ocsfast
from ocsfast.api.arguments import Inputs
from ocsfast.api.calls import options_of
from ocsfast.api.pruner import Pruner
from ocsfast.core.config import Config
from ocsfast.cut.copies import Also
from ocsfast.cut.record import record_of
from ocsfast.optim.owners import tells_by_steps
from ocsfast.run.report import StepReport, unattached
from ocsfast.run.timetable import INNER_LOOP_CHECKS


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

    def begin(
        self, model: nn.Module, optimizer: Optimizer, steps: int | None, each: int | None = None
    ) -> None:
        """Training begins now, with optimizer and weights restored if they are to be.

        Args:
            steps: of the optimizer in the whole run, if that is known.
            each: and in an epoch, for what `epochs=` says of a run of which this is a part.
        """
        if self.pruner is not None:  # a second round of training with the same callback
            return
        options = self._planned(steps, each)
        state = self._state
        if state is not None and state["progress"]["stage"] == "pruned":
            self.report = StepReport(**{**state["progress"]["history"][-1], "cut": False})
            return

        if state is None and not options.again and record_of(model) is not None:
            self.report = ocsfast.step(model, self.ratio, config=options)  # which says so, and rests
            return

        def attach() -> Pruner:
            return ocsfast.attach(
                model,
                self.ratio,
                optimizer=optimizer,
                example_inputs=self._inputs(model),
                also=self.also,
                config=options,
            )

        self.report = unattached(model)

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

    def _planned(self, steps: int | None, each: int | None) -> Config:
        """The options, with the run's length in optimizer steps and the checks that follow."""
        given = {name: value for name, value in self.options.items() if name != "config"}
        options = options_of(self.options.get("config"), given)
        if options.epochs is not None and each is not None:
            options = replace(options, epochs=None, total_steps=options.epochs * each)
        elif options.epochs is None and options.total_steps is None:
            options = replace(options, total_steps=steps)
        if options.total_steps is not None and options.check_every == "auto":
            every = max(1, options.total_steps // INNER_LOOP_CHECKS)
            options = replace(options, check_every=every)
        return options

    def _inputs(self, model: nn.Module) -> Any:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return torch.utils._pytree.tree_map(moved, self.example_inputs)
