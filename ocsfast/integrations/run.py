"""What the callbacks of all frameworks share: one model that is pruned during one training run."""

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
from ocsfast.run.state import read_report


class PruneRun:
    """A pruner that is attached when training begins, whether from the start or from a checkpoint.

    Frameworks restore a checkpoint piece by piece: first the weights; later they make the optimizers and
    restore their state; and that of callbacks somewhere in between. So if the weights of a cut model
    arrive, the model is cut at once (`expect_weights`), and everything else waits until training begins.

    Attributes:
        pruner: None until training has begun, and in a run that resumes after its cut.
        report: the last report.
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
        self._state: Mapping[str, Any] | None = None  # what a checkpoint held
        self._attach: Callable[[], Pruner] | None = None  # called after the first optimizer step

    def expect_weights(self, model: nn.Module) -> None:
        """Let the model take the widths of a cut model if the weights of one are loaded into it."""
        ocsfast.fit_on_load(model, self._inputs(model), **self.options)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state to go on from when training begins.

        An empty one comes from a run whose training had not begun.
        """
        self._state = state or None

    def state_dict(self) -> Mapping[str, Any]:
        """The state of the pruner (see `Pruner.state_dict`), or else the one to go on from."""
        if self.pruner is not None:
            return self.pruner.state_dict()
        return self._state or {}

    def begin(
        self, model: nn.Module, optimizer: Optimizer, steps: int | None, per_epoch: int | None = None
    ) -> None:
        """Attach, now that training begins; weights and optimizer have been restored by now.

        Args:
            model: the network to prune.
            optimizer: the one that trains it.
            steps: optimizer steps in the whole run, if known.
            per_epoch: optimizer steps in an epoch, if known. With `epochs=` among the options they tell
                the length of a longer run, of which this one is a part.
        """
        if self.pruner is not None:  # the same callback is used for a second round of training
            return
        options = self._planned(steps, per_epoch)
        state = self._state
        if state is not None and state["progress"]["stage"] == "pruned":
            self.report = replace(read_report(state["progress"]["history"][-1]), cut=False)
            return

        if state is None and not options.again and record_of(model) is not None:
            # The model came here cut. `step` says so in the log, and leaves it as it is.
            self.report = ocsfast.step(model, self.ratio, config=options)
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
        """Called after every optimizer step: make a check if one is due."""
        if self._attach is not None:
            self.pruner, self._attach = self._attach(), None
        if self.pruner is not None:
            self.report = self.pruner.step()
        return self.report

    def _planned(self, steps: int | None, per_epoch: int | None) -> Config:
        """The options, with the run's length in optimizer steps filled in."""
        given = {name: value for name, value in self.options.items() if name != "config"}
        options = options_of(self.options.get("config"), given)
        if options.epochs is not None and per_epoch is not None:
            options = replace(options, epochs=None, total_steps=options.epochs * per_epoch)
        elif options.epochs is None and options.total_steps is None:
            options = replace(options, total_steps=steps)
        return options

    def _inputs(self, model: nn.Module) -> Any:
        """The example inputs, on the device of the model."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))

        def moved(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return torch.utils._pytree.tree_map(moved, self.example_inputs)
