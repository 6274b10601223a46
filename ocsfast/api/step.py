"""The one line a training loop needs, and attaching ahead of the loop."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ocsfast.api.arguments import (
    Inputs,
    Unpacked,
    families_of,
    options_of,
    plain,
    require_described,
    require_no_choice,
    require_whole,
    unpacked,
)
from ocsfast.api.pruner import Pruner
from ocsfast.core.config import PLAN, Config, checked_ratio
from ocsfast.core.errors import ConfigError, GroupingError, StateError
from ocsfast.core.families import Families
from ocsfast.cut.copies import Also
from ocsfast.cut.fitting import Nothing
from ocsfast.cut.record import UNITS, Record, record_of, target_in
from ocsfast.distributed.placement import processes_of
from ocsfast.grouping.reasons import one_of, why_dense
from ocsfast.optim.owners import counter as _counter
from ocsfast.optim.owners import find_optimizer, require_optimizer
from ocsfast.run.history import StepReport, told, unattached
from ocsfast.run.timetable import require_apart
from ocsfast.run.uncut import Listener, warn_at_end

logger = logging.getLogger("ocsfast")


class _Recorder:
    """A forward pre-hook that keeps the first training batch's arguments, and then does nothing."""

    def __init__(self, steps: int) -> None:
        self.steps = steps  # of the optimizer at the first call of `ocsfast.step`
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._training = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._training and (self.inputs is None or model.training):
            self._training = model.training
            self.inputs = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recorder:
        return _Recorder(self.steps)

    def __reduce__(self) -> tuple[type[Nothing], tuple[()]]:
        return Nothing, ()


_Call = tuple[float, Config | None, dict[str, Any]]

# Weak; and the pruner is not an attribute of its model, so that copies and pickles of the model are just
# models.
_runs: weakref.WeakKeyDictionary[nn.Module, _Run] = weakref.WeakKeyDictionary()


class _Run:
    """What `step` knows of a model: its pruner, or the recorder that waits for an input."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.pruner: Pruner | None = None
        self.recorder: _Recorder | None = None
        self.listener: Listener | None = None
        self.farewell: weakref.finalize[..., Any] | None = None  # of a run that ends as it listens
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def is_finished(self) -> bool:
        return self.pruner is not None and self.pruner.stage == "pruned"


# Called in the mode that a validation loop left on, what they make could not be trained.
_out_of_inference_mode = torch.inference_mode(False)


@_out_of_inference_mode
def step(
    model: nn.Module,
    ratio: float,
    *,
    optimizer: Optimizer | None = None,
    example_inputs: Inputs | None = None,
    also: Iterable[Also] = (),
    accuracy: float | None = None,
    config: Config | None = None,
    **config_fields: Any,
) -> StepReport:
    """Prune `model` as it trains: call this once an epoch, or after every optimizer step.

    The first call finds the optimizer by its steps and starts to listen for the model's input; the
    second call, after the next training steps, attaches (with `example_inputs=` the first one does) and
    makes the first check. From then on it does what `Pruner.step` says, and after the cut nothing.

    Args:
        model: a module, compiled or in DistributedDataParallel too; then every process has to call.
        ratio: the share of the target that is removed, between 0 and 1.
        optimizer: the one that owns the model's parameters; found by itself where only one does.
        example_inputs: one batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        also: what the cut has to follow besides: further optimizers that keep state of its parameters,
            and moving averages: modules or other objects that hold a copy of the model, or one of each
            of its parameters (or of those that train) in a list, or in a dict by name. Used at attach.
        accuracy: what your last validation gave, in any unit: kept in the report and said at the cut.
        config: options as one object, say `Config.paper("cifar")`.
        **config_fields: fields of `Config`; they override `config`.

    Returns:
        Where things stand; see `StepReport`.

    Raises:
        ConfigError: a bad option; a ratio or option that differs from the first call's (options need not
            be repeated, and the run's length is nothing to the call after the cut); a ratio that cannot
            be reached; or `epochs` in calls after every optimizer step.
        GroupingError: the model's structure cannot be found, or nothing in it can be pruned.
        StateError: no training step was seen, no or several optimizers own the parameters, the
            optimizer's state cannot be cut, the model is wrapped, or a weight is NaN or infinite.
    """
    given, model = model, plain(model)
    accuracy = told(accuracy)
    call: _Call = (ratio, config, config_fields)
    run = _runs.get(model)
    if run is not None and run.is_finished() and _asks_anew(run.call, call):
        del _runs[model]
        run = None
    if run is None:
        checked_ratio(ratio)
        options = options_of(config, config_fields)
        record = None if options.again else record_of(model)
        if record is not None:
            return _resting(model, record, options, accuracy)
        require_whole(model)
        owner = _stepped(model, optimizer)
        taken = _counter.steps(owner)
        require_apart(options, taken)
        run = _Run(call)
        if example_inputs is None:
            run.recorder = _Recorder(taken)
            run.listener = Listener(taken, processes_of(model).is_first)
            run.farewell = warn_at_end(run, run.listener)
            # A compiled module runs past later hooks of the one inside, a plain call past its own.
            run.handles = [
                module.register_forward_pre_hook(run.recorder, with_kwargs=True)
                for module in dict.fromkeys((given, model))
            ]
            _runs[model] = run
            return unattached(model, accuracy)
    else:
        _require_unchanged(run.call, call, finished=run.is_finished())
    if run.pruner is None:
        if run.listener is not None:
            run.listener.failed = True  # until it has not: an error says more than the end of the run
        owner = _stepped(model, optimizer)
        inputs = _inputs(example_inputs, run.recorder)
        options = options_of(config, config_fields)
        if run.recorder is not None:
            require_apart(options, _counter.steps(owner) - run.recorder.steps)
        families = families_of(model, inputs, options)
        run.pruner = _attach(model, ratio, owner, families, options, also)
        if run.recorder is not None:
            run.pruner.begin_at(run.recorder.steps, calls=1)
        run.pruner.announce()
        _forget_inputs(run)
        _runs[model] = run
    pruner = run.pruner
    if not pruner.attached:
        raise StateError(
            "the pruner of this model was detached: call ocsfast.detach(model) to start anew"
        )
    _require_driven(pruner)
    return pruner.step(accuracy)


@_out_of_inference_mode
def attach(
    model: nn.Module,
    ratio: float,
    *,
    optimizer: Optimizer | None = None,
    example_inputs: Inputs | None = None,
    families: Families | None = None,
    also: Iterable[Also] = (),
    config: Config | None = None,
    **config_fields: Any,
) -> Pruner:
    """Attach ahead of the training loop; later calls of `step(model, ratio, ...)` use this pruner.

    Args: as for `step`. Without `optimizer`, one must have stepped; `example_inputs` is required, or
        families: what `group` found in this model before it was sharded; then options that say what may
            go have been said there. On a sharded model every process has to call.

    Raises:
        As for `step`; StateError too if the model has a pruner already, or is not the one of `families`.
    """
    model = plain(model)
    run = _runs.get(model)
    if run is not None and run.pruner is not None and not run.is_finished():
        raise StateError("this model has a pruner already: call ocsfast.detach(model) first")
    with processes_of(model).together():
        checked_ratio(ratio)
        options = options_of(config, config_fields)
        if record_of(model) is not None and not options.again:
            raise StateError(
                "the model was cut already: train it on as it is, or pass again=True to cut it further "
                "(ratio= is then still of the dense model). To resume a run, attach to a dense instance"
            )
        if families is None:
            require_whole(model)
            if example_inputs is None:
                raise StateError("attach needs example_inputs= (one batch as the model takes it)")
        else:
            require_described(families, model)
            require_no_choice(options)
        owner = _trainable_owner(model) if optimizer is None else require_optimizer(optimizer)
        if families is None:
            assert example_inputs is not None  # refused above
            families = families_of(model, unpacked(example_inputs), options)
    if run is None:
        run = _Run((ratio, config, config_fields))
    run.pruner = _attach(model, ratio, owner, families, options, also)
    run.call = (ratio, config, config_fields)
    run.pruner.begin_at(run.pruner.steps, calls=int(run.recorder is not None))
    run.pruner.announce()
    _forget_inputs(run)
    _runs[model] = run
    return run.pruner


@_out_of_inference_mode
def group(
    model: nn.Module, example_inputs: Inputs, *, config: Config | None = None, **config_fields: Any
) -> Families:
    """Find the families of a model now, for `attach(..., families=)` once it has been sharded.

    Args: as for `step`; of the options, those count that say what may go.

    Raises:
        ConfigError, GroupingError: as for `step`.
        StateError: the model is sharded already.
    """
    model = plain(model)
    require_whole(model)
    return families_of(model, unpacked(example_inputs), options_of(config, config_fields))


def detach(model: nn.Module) -> None:
    """Forget the model's pruner: its hooks go, the model stays as it is. Harmless if there is none."""
    run = _runs.pop(plain(model), None)
    if run is not None:
        _forget_inputs(run)
        if run.pruner is not None:
            run.pruner.detach()


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # cut models whose rest was explained


def _resting(model: nn.Module, record: Record, options: Config, accuracy: float | None) -> StepReport:
    """What `step` answers for a model that came here cut: loaded from a file, say."""
    name = target_in(record, options.target)
    left, dense = int(record["left"][name]), int(record["dense"][name])
    if model not in _told:
        _told.add(model)
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


def _attach(
    model: nn.Module,
    ratio: float,
    optimizer: Optimizer,
    families: Families,
    config: Config,
    also: Iterable[Also],
) -> Pruner:
    if not families.families:
        held, ways = why_dense(families)
        examples = "; ".join(f"{f.where}: {f.reason}" for f in families.frozen[:3])
        said = [f"nothing in this model can be pruned: {held}", *([examples] if examples else [])]
        raise GroupingError(". ".join(said) + (f". To prune it, {one_of(ways)}" if ways else ""))
    return Pruner(model, ratio, config, optimizer, families, steps=_counter.steps(optimizer), also=also)


def _inputs(given: Inputs | None, recorder: _Recorder | None) -> Unpacked:
    """The batch that was passed, or else the one that was recorded."""
    if given is not None:
        return unpacked(given)
    if recorder is None or recorder.inputs is None:
        raise StateError(
            "no forward pass of this model has been seen since the first call of ocsfast.step: "
            "pass example_inputs= (one batch as the model takes it)"
        )
    return recorder.inputs


def _trainable_owner(model: nn.Module) -> Optimizer:
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise StateError(
            "no parameter of the model trains (requires_grad=False): unfreeze them, or call "
            "ocsfast.step only from the epoch in which they train"
        )
    return find_optimizer(_counter, trainable)


def _stepped(model: nn.Module, optimizer: Optimizer | None) -> Optimizer:
    """The optimizer of `step`, which must have taken a training step."""
    if optimizer is None:
        return _trainable_owner(model)
    require_optimizer(optimizer)
    if _counter.steps(optimizer) == 0:
        raise StateError(
            f"the {type(optimizer).__name__} optimizer given has taken no step yet: call ocsfast.step "
            "after the training steps, or ocsfast.attach ahead of them"
        )
    return optimizer


def _require_driven(pruner: Pruner) -> None:
    """Notice an optimizer that took the place of the one whose steps the pruner waits for."""
    last = _counter.last()
    if pruner.idle and last is not None and last is not pruner.optimizer:
        weights = {id(p) for p in pruner.optimizer.param_groups[0]["params"]}
        if any(id(p) in weights for group in last.param_groups for p in group["params"]):
            raise StateError(
                f"the model is now driven by another optimizer ({type(last).__name__}) than the one "
                "attached: call ocsfast.detach(model), then attach with the new one"
            )


def _asks_anew(first: _Call, now: _Call) -> bool:
    """Whether a call asks for a further cut than that of the first one, by name."""
    return now[0] != first[0] and options_of(*now[1:]).again


def _require_unchanged(first: _Call, now: _Call, *, finished: bool) -> None:
    """Refuse another ratio than the first call's, or other options; options need not be repeated.

    Args:
        finished: whether the cut is made, so that the run's length decides nothing any longer.
    """
    if now[0] != first[0]:
        way = (
            "The model is cut: again=True cuts it further"
            if finished
            else "It cannot change in mid-run: call ocsfast.detach(model) to start anew"
        )
        raise ConfigError(f"ratio={now[0]!r} differs from ratio={first[0]!r} of the first call. {way}")
    if now[1:] in ((None, {}), first[1:]):
        return
    then, given = options_of(*first[1:]), options_of(*now[1:])
    names = [f.name for f in fields(Config) if getattr(then, f.name) != getattr(given, f.name)]
    changed = [name for name in names if not (finished and name in PLAN)]
    if changed:
        raise ConfigError(
            f"{', '.join(changed)}: not as in the first call; options cannot change in mid-run. "
            "Call ocsfast.detach(model) to start anew"
        )


def _forget_inputs(run: _Run) -> None:
    if run.farewell is not None:
        run.farewell.detach()
    for handle in run.handles:
        handle.remove()
    run.handles, run.recorder = [], None
