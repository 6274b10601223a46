"""The one line a training loop needs, and attaching ahead of the loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ocsfast.api.arguments import (
    Inputs,
    families_of,
    plain,
    require_described,
    require_no_choice,
    require_whole,
    unpacked,
)
from ocsfast.api.calls import Call, options_of
from ocsfast.api.latency import with_latency
from ocsfast.api.pruner import Pruner
from ocsfast.api.runs import Run, resting, runs, stepped_owner, trainable_owner
from ocsfast.core.config import Config
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families
from ocsfast.cut.copies import Also
from ocsfast.cut.record import record_of
from ocsfast.distributed.placement import processes_of
from ocsfast.optim.owners import counter, require_optimizer
from ocsfast.run.report import StepReport, told, unattached
from ocsfast.run.timetable import require_apart

# A validation loop may leave inference mode on; tensors made in it cannot be trained, so these leave it.
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

    The first call finds the optimizer by its steps and starts to listen for the model's input. The
    second call, after the next training steps, attaches (with `example_inputs=` the first one does) and
    makes the first check. From then on it does what `Pruner.step` says, and after the cut nothing.

    Args:
        model: a module, also compiled, in DataParallel or in DistributedDataParallel; with that every
            process has to call.
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

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for epoch in range(10):
        ...     for _ in range(8):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(4, 8)).square().mean().backward()
        ...         optimizer.step()
        ...     report = ocsfast.step(model, 0.5, epochs=10)
        >>> report.stage, model[0].out_features
        ('pruned', 8)
    """
    given, model = model, plain(model)
    accuracy, call = told(accuracy), Call(ratio, config, config_fields)
    run = runs.get(model)
    if run is not None and run.is_finished() and call.asks_anew(run.call):
        del runs[model]
        run = None
    if run is not None:
        call.require_same(run.call, finished=run.is_finished())
    else:
        record = None if call.options.again else record_of(model)
        if record is not None:
            return resting(model, record, call.options.target, accuracy)
        run = _begun(model, given, call, optimizer, listens=example_inputs is None)
        if example_inputs is None:
            runs[model] = run
            return unattached(model, accuracy)
    if run.pruner is None:
        _attach_to(model, run, optimizer, example_inputs, also)
    run.require_driven()
    assert run.pruner is not None  # attached by now
    return run.pruner.step(accuracy)


def _begun(
    model: nn.Module, given: nn.Module, call: Call, optimizer: Optimizer | None, listens: bool
) -> Run:
    """The run of a first call, seen to be possible; it may have to listen for an input."""
    require_whole(model)
    taken = counter.steps(stepped_owner(model, optimizer))
    require_apart(call.options, taken)
    run = Run(call)
    if listens:
        run.listen(model, given, taken)
    return run


def _attach_to(
    model: nn.Module,
    run: Run,
    optimizer: Optimizer | None,
    example_inputs: Inputs | None,
    also: Iterable[Also],
) -> None:
    """Attach in a training loop, with the input that was passed or recorded."""
    if run.listener is not None:
        run.listener.failed = True  # until it has not: an error says more than the end of the run
    owner, call, recorder = stepped_owner(model, optimizer), run.call, run.recorder
    inputs = run.inputs(example_inputs)
    if recorder is not None:
        require_apart(call.options, counter.steps(owner) - recorder.steps)
    families = families_of(model, inputs, call.options)
    options = with_latency(model, inputs, families, call.options, processes_of(model))
    pruner = run.attach(model, call, owner, families, also, options)
    if recorder is not None:
        pruner.begin_at(recorder.steps, calls=1)
    pruner.announce()
    run.end_listening()
    runs[model] = run


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
    """Attach ahead of the training loop; later calls of `step(model, ratio)` use this pruner.

    Needed to resume a run, before the model is sharded, and where the optimizer's first step is to
    count.

    Args:
        model: a module, also compiled, in DataParallel or in DistributedDataParallel. Of a sharded model
            every process has to call.
        ratio: the share of the target that is removed, between 0 and 1.
        optimizer: the one that owns the model's parameters. Without it, one must have stepped.
        example_inputs: one batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
            Required, but for `families`.
        families: what `group` found in this model before it was sharded. Options that say what may go
            have been said there.
        also: further optimizers and moving averages that the cut has to follow, as `step` describes
            them.
        config: options as one object.
        **config_fields: fields of `Config`; they override `config`.

    Returns:
        The pruner.

    Raises:
        ConfigError: a bad option, or a ratio that cannot be reached.
        GroupingError: the model's structure cannot be found, or nothing in it can be pruned.
        StateError: the model has a pruner already, was cut already, is not the one of `families`, or is
            wrapped; no optimizer owns its parameters, or its state cannot be cut.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, example_inputs=torch.randn(4, 8))
        >>> pruner.stage
        'observe'
    """
    model = plain(model)
    run = runs.get(model)
    if run is not None and run.pruner is not None and not run.is_finished():
        raise StateError("this model has a pruner already: call ocsfast.detach(model) first")
    with processes_of(model).together():
        call = Call(ratio, config, config_fields)
        _require_dense(model, call.options)
        if families is not None:
            require_described(families, model)
            require_no_choice(call.options)
        else:
            require_whole(model)
            if example_inputs is None:
                raise StateError("attach needs example_inputs= (one batch as the model takes it)")
        owner = trainable_owner(model) if optimizer is None else require_optimizer(optimizer)
        if families is None:
            assert example_inputs is not None  # refused above
            families = families_of(model, unpacked(example_inputs), call.options)
    batch = None if example_inputs is None else unpacked(example_inputs)
    options = with_latency(model, batch, families, call.options, processes_of(model))
    if run is None:
        run = Run(call)
    pruner = run.attach(model, call, owner, families, also, options)
    pruner.begin_at(pruner.steps, calls=int(run.recorder is not None))
    pruner.announce()
    run.end_listening()
    runs[model] = run
    return pruner


def _require_dense(model: nn.Module, options: Config) -> None:
    if record_of(model) is not None and not options.again:
        raise StateError(
            "the model was cut already: train it on as it is, or pass again=True to cut it further "
            "(ratio= is then still of the dense model). To resume a run, attach to a dense instance"
        )


@_out_of_inference_mode
def group(
    model: nn.Module, example_inputs: Inputs, *, config: Config | None = None, **config_fields: Any
) -> Families:
    """Find the families of a model now, for `attach(..., families=)` once it has been sharded.

    Args:
        model: a module, also compiled, in DataParallel or in DistributedDataParallel; not sharded yet.
        example_inputs: one batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        config, **config_fields: options. Those count that say what may go: `keep`, `only`, `kinds`,
            `outputs`, `forward`, `uniform`, `grouping`, `verify`, `time_limit`.

    Returns:
        The structure that was found, and proved on a copy of the model.

    Raises:
        ConfigError: a bad option.
        GroupingError: the model's structure cannot be found.
        StateError: the model is sharded already.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> [(f.name, f.kind, f.size) for f in ocsfast.group(model, torch.randn(4, 8)).families]
        [('0', 'neuron', 16)]
    """
    model = plain(model)
    require_whole(model)
    return families_of(model, unpacked(example_inputs), options_of(config, config_fields))


def detach(model: nn.Module) -> None:
    """Forget the model's pruner: its hooks go, the model stays as it is. Harmless if there is none.

    Args:
        model: as for `step`, or one that never was.

    Examples:
        >>> import ocsfast
        >>> ocsfast.detach(torch.nn.Linear(2, 2))
    """
    run = runs.pop(plain(model), None)
    if run is not None:
        run.end_listening()
        if run.pruner is not None:
            run.pruner.detach()
