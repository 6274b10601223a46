"""What `ocsfast.step` knows of each model between two calls."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.api.arguments import Inputs, Unpacked, unpacked
from ocsfast.api.calls import Call
from ocsfast.api.pruner import Pruner
from ocsfast.core.config import UNITS, Config
from ocsfast.core.errors import GroupingError, StateError
from ocsfast.core.families import Families
from ocsfast.cut.copies import Also
from ocsfast.cut.fitting import Nothing
from ocsfast.cut.record import Record, target_in
from ocsfast.distributed.placement import processes_of
from ocsfast.grouping.reasons import one_of, why_dense
from ocsfast.optim.owners import counter, find_optimizer, require_optimizer
from ocsfast.run.report import StepReport
from ocsfast.run.uncut import Listener, warn_at_end

logger = logging.getLogger("ocsfast")


class Recorder:
    """A forward pre-hook that keeps the first training batch's arguments, and then does nothing."""

    def __init__(self, steps: int) -> None:
        self.steps = steps  # of the optimizer at the first call of `ocsfast.step`
        self.inputs: Unpacked | None = None
        self._training = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._training and (self.inputs is None or model.training):
            self._training = model.training
            self.inputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return Recorder(self.steps)

    def __reduce__(self) -> tuple[type[Nothing], tuple[()]]:
        return Nothing, ()


class Run:
    """A model's pruner, or the recorder that waits for an input to attach one with."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.pruner: Pruner | None = None
        self.recorder: Recorder | None = None
        self.listener: Listener | None = None
        self._farewell: weakref.finalize[..., Any] | None = None  # of a run that ends as it listens
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def is_finished(self) -> bool:
        return self.pruner is not None and self.pruner.stage == "pruned"

    def listen(self, model: nn.Module, given: nn.Module, steps: int) -> None:
        """Wait for the model's input.

        Args:
            model: the plain one.
            given: as the user passed it, perhaps compiled: that runs past later hooks of the module
                inside, and a plain call runs past the hooks of the compiled one.
            steps: of its optimizer so far.
        """
        self.recorder = recorder = Recorder(steps)
        self.listener = Listener(steps, processes_of(model).is_first)
        self._farewell = warn_at_end(self, self.listener)
        self._handles = [
            module.register_forward_pre_hook(recorder, with_kwargs=True)
            for module in dict.fromkeys((given, model))
        ]

    def inputs(self, given: Inputs | None) -> Unpacked:
        """The batch that was passed, or else the one that was recorded.

        Raises:
            StateError: there is neither.
        """
        if given is not None:
            return unpacked(given)
        if self.recorder is None or self.recorder.inputs is None:
            raise StateError(
                "no forward pass of this model has been seen since the first call of ocsfast.step: "
                "pass example_inputs= (one batch as the model takes it)"
            )
        return self.recorder.inputs

    def attach(
        self,
        model: nn.Module,
        call: Call,
        optimizer: Optimizer,
        families: Families,
        also: Iterable[Also],
        options: Config | None = None,
    ) -> Pruner:
        """Give the model a pruner.

        Args:
            options: in the place of the call's, where something was measured for them.

        Raises:
            GroupingError: nothing in the model can be pruned.
            ConfigError, StateError: as `Pruner` says.
        """
        _require_prunable(families)
        steps = counter.steps(optimizer)
        options = options or call.options
        pruner = Pruner(model, call.ratio, options, optimizer, families, steps=steps, also=also)
        self.pruner, self.call = pruner, call
        return pruner

    def end_listening(self) -> None:
        """Wait for nothing any longer."""
        if self._farewell is not None:
            self._farewell.detach()
        for handle in self._handles:
            handle.remove()
        self._handles, self.recorder = [], None

    def require_driven(self) -> None:
        """Notice an optimizer that took the place of the one whose steps the pruner waits for.

        Raises:
            StateError: there is one, or the pruner was detached.
        """
        pruner, last = self.pruner, counter.last()
        assert pruner is not None  # it is attached
        if not pruner.attached:
            raise StateError(
                "the pruner of this model was detached: call ocsfast.detach(model) to start anew"
            )
        if pruner.idle and last is not None and last is not pruner.optimizer:
            weights = {id(p) for p in pruner.optimizer.param_groups[0]["params"]}
            if any(id(p) in weights for held in last.param_groups for p in held["params"]):
                raise StateError(
                    f"the model is now driven by another optimizer ({type(last).__name__}) than the one "
                    "attached: call ocsfast.detach(model), then attach with the new one"
                )


# By model, weakly. A pruner is no attribute of its model, so that copies and pickles of it are just
# models.
runs: weakref.WeakKeyDictionary[nn.Module, Run] = weakref.WeakKeyDictionary()


def _require_prunable(families: Families) -> None:
    if families.families:
        return
    held, ways = why_dense(families)
    examples = "; ".join(f"{f.where}: {f.reason}" for f in families.frozen[:3])
    said = [f"nothing in this model can be pruned: {held}", *([examples] if examples else [])]
    raise GroupingError(". ".join(said) + (f". To prune it, {one_of(ways)}" if ways else ""))


def trainable_owner(model: nn.Module) -> Optimizer:
    """The one optimizer that owns the model's parameters and has stepped.

    Raises:
        StateError: there is none, or there are several, or nothing trains.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise StateError(
            "no parameter of the model trains (requires_grad=False): unfreeze them, or call "
            "ocsfast.step only from the epoch in which they train"
        )
    return find_optimizer(counter, trainable)


def stepped_owner(model: nn.Module, optimizer: Optimizer | None) -> Optimizer:
    """The optimizer of `step`, which must have taken a training step.

    Raises:
        StateError: it has not, or as for `trainable_owner`.
    """
    if optimizer is None:
        return trainable_owner(model)
    require_optimizer(optimizer)
    if counter.steps(optimizer) == 0:
        raise StateError(
            f"the {type(optimizer).__name__} optimizer given has taken no step yet: call ocsfast.step "
            "after the training steps, or ocsfast.attach ahead of them"
        )
    return optimizer


_explained: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # cut models whose rest was explained


def resting(model: nn.Module, record: Record, target: object, accuracy: float | None) -> StepReport:
    """What `step` answers for a model that came here cut: loaded from a file, say."""
    name = target_in(record, target)
    left, dense = int(record["left"][name]), int(record["dense"][name])
    if model not in _explained:
        _explained.add(model)
        logger.warning(
            "the model was cut already, %.3f of its dense %s is gone: ocsfast.step leaves it as it is. "
            "again=True cuts it further, and ratio= is then still of the dense model",
            1 - left / max(1, dense),
            name,
        )
    kept = tuple((family, count, size) for family, count, size in record["kept"])
    return StepReport(
        "pruned",
        cost=left,
        cost_at_cut=left,
        cost_dense=dense,
        unit=UNITS[name],
        kept=kept,
        accuracy=accuracy,
    )
