"""The two ways to find a model's families: index labels, and Torch-Pruning's DepGraph."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from torch import nn

from ocsfast.core.errors import GroupingError, GroupingTimeout
from ocsfast.core.families import Families
from ocsfast.grouping.assembly import assemble
from ocsfast.grouping.composed import spell_out
from ocsfast.grouping.depgraph import by_depgraph
from ocsfast.grouping.findings import Findings
from ocsfast.grouping.graph.sizes import literals_beyond
from ocsfast.grouping.proof.trials import GraphFails, Run, Setting, proved
from ocsfast.grouping.propagation import Propagation
from ocsfast.grouping.refusals import require_prunable
from ocsfast.grouping.scope import Scope, kept_outputs, matched_parameters, protected_parameters
from ocsfast.grouping.time_limit import TimeLimit
from ocsfast.grouping.trace.attempts import Attempt, attempt
from ocsfast.grouping.trace.batch import BATCH, Batch, batches
from ocsfast.grouping.trace.failures import require_runs
from ocsfast.grouping.trace.forward import forward_as
from ocsfast.grouping.trace.modes import same_but_for_mode
from ocsfast.grouping.walk import Walk

logger = logging.getLogger("ocsfast")

TIME_LIMIT = 300.0  # seconds


def group(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    scope: Scope | None = None,
    engine: str = "labels",
    verify: bool = True,
    time_limit: float = TIME_LIMIT,
) -> Families:
    """Find the families of a model: which parameter slices must disappear together.

    The model is left as it was.

    Args:
        model: any module with dense floating-point parameters, on any device.
        args, kwargs: one batch of input, as for `model(*args, **kwargs)`; dim 0 is the batch.
        scope: what may go. The model's outputs keep their shapes without being named.
        engine: "labels" runs index labels over the exported graph, and falls back to the second engine
            if the model cannot be exported. "torch-pruning" uses DepGraph, for plain CNNs.
        verify: prove, on a float64 copy, that cutting groups equals zeroing their slices. A family
            for which this fails is left dense and named in `Families.frozen`.
        time_limit: seconds after which to give up; looked at between operators and between trials.

    Raises:
        ConfigError: a name in `scope` matches nothing.
        GroupingError: the model has parameters that cannot be pruned at all, the inputs hold no sample
            or tensors that cannot be found, or neither engine can trace it. `GroupingTimeout`, a
            subclass: it takes too long.
        StateError: a buffer holds NaN.
    """
    kwargs = kwargs or {}
    scope = scope or Scope()
    with nullcontext() if scope.forward is None else forward_as(model, scope.forward):
        protected = protected_parameters(model, scope)
        require_prunable(model)
        batches(args, kwargs)  # refuses what no engine could be given
        deadline = TimeLimit(time_limit)
        if engine != "labels":
            families, setting = _by_second(model, args, kwargs, protected, deadline)
            return proved(model, families, setting) if verify else families
        try:
            families, setting = by_labels(model, args, kwargs, scope, deadline)
        except GroupingTimeout:
            raise
        except GroupingError as error:
            require_runs(model, args, kwargs)
            logger.warning("%s. Trying the second engine (torch-pruning)", error)
            try:
                families, setting = _by_second(model, args, kwargs, protected, deadline)
            except GroupingError as second:
                raise GroupingError(f"{error}. The second engine failed too: {second}") from error
        if not verify:
            return families
        try:
            return proved(model, families, setting)
        except GraphFails as error:
            if setting.as_given:
                raise
            why = f"with {BATCH} samples {error.why}"  # as an index into what was cut off does
            families, setting = by_labels(model, args, kwargs, scope, deadline, why=why)
            return proved(model, families, setting)


def by_labels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scope: Scope,
    deadline: TimeLimit | None = None,
    *,
    why: str = "",
) -> tuple[Families, Setting]:
    """Trace the model in both modes, and run labels over what it does in either.

    A width that the code reads in training alone is bound too, and what the model returns in training
    alone, as deep supervision does, keeps its shape. Where one mode cannot be traced, or the model takes
    no batch of another size than the example, `Families.notes` says so.

    Args:
        model, args, kwargs: one call of the model.
        scope: what may go.
        deadline: looked at before every operator.
        why: why the inputs should be traced as given, if that is known.

    Returns:
        The families, not yet proved, and the setting to prove them in.

    Raises:
        GroupingError: neither mode can be traced; or one cannot, and the model is a `GraphModel`, whose
            sizes in the other mode's graph would then be unknown.
    """
    made = attempt(model, args, kwargs, why)
    found, kept = _labelled(model, made, scope, deadline)
    if found.apart and not made.why:
        # Costs of a few rows would tell nothing of what runs once for all of them.
        made = attempt(model, args, kwargs, f"dim 0 is no batch ({found.apart} runs once for all of it)")
        found, kept = _labelled(model, made, scope, deadline)
    batch = made.batch
    families = assemble(found, model, 1 if made.why else batch.rows, scope.kinds)
    notes = [_note(*entry) for entry in made.failed.items()]
    if made.why:
        notes.append(_as_given(batch, made.why))
    runs = tuple(Run(traced, mode, kept[mode]) for mode, traced in made.traces.items())
    setting = Setting(batch.args, batch.kwargs, runs, not made.failed, deadline, bool(made.why))
    return replace(families, notes=tuple(notes)), setting


def _labelled(
    model: nn.Module, made: Attempt, scope: Scope, deadline: TimeLimit | None
) -> tuple[Findings, dict[bool, frozenset[int]]]:
    """What labels find in an attempt's graphs, and the outputs that keep their shape, by mode."""
    traces, failed = made.traces, made.failed
    for traced in traces.values():
        spell_out(traced.graph)
    if failed and literals_beyond(model, *traces.values()):
        raise next(iter(failed.values()))
    found = Findings()
    if not failed and same_but_for_mode(traces[False], traces[True]):
        found.read |= traces.pop(True).read
    kept = kept_outputs(traces, scope.outputs)
    for training, traced in traces.items():
        first = traced is next(iter(traces.values()))
        walk = Walk(model, traced, found, count=first, training=training)
        Propagation(walk, outputs=kept[training], alone=bool(failed), deadline=deadline).run()
    _freeze_protected(found, model, scope)
    return found, kept


def _by_second(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    protected: dict[str, str],
    deadline: TimeLimit,
) -> tuple[Families, Setting]:
    """What the second engine finds, and the setting to prove it in.

    Raises:
        GroupingError: it cannot trace the model. It says how the inputs as given failed.
    """
    *tried, last = batches(args, kwargs)
    for batch in (*tried, last):
        setting = Setting(batch.args, batch.kwargs, (), True, deadline, bool(tried))
        try:
            families = by_depgraph(model, batch, protected)
        except GroupingError:
            if batch is last:
                raise
            continue
        if tried and batch is last:
            why = f"with {tried[0].rows} samples the model cannot be traced"
            families = replace(families, notes=(_as_given(batch, why),))
        return families, setting
    raise AssertionError("there is a batch at least")


def _freeze_protected(found: Findings, model: nn.Module, scope: Scope) -> None:
    """Freeze the parameters that `scope` leaves out, and those that do not train."""
    protected = protected_parameters(model, scope)
    for name, dims in found.state.items():
        if name in protected:
            for vector in dims:
                found.labels.freeze(vector, protected[name])
    if scope.only:
        chosen = matched_parameters(model, scope.only, "only")
        for name, axis in found.producers:
            if name not in chosen:
                found.labels.freeze(found.state[name][axis], "only= leaves it out")


def _note(training: bool, error: GroupingError) -> str:
    """What a user should know where the graph of one mode is missing."""
    mode, other = ("training", "evaluation") if training else ("evaluation", "training")
    return (
        f"only the {other} mode could be traced: what the model does in {mode} alone was not seen, and "
        f"a width that it reads there may not fit after the cut ({error})"
    )


def _as_given(batch: Batch, why: str) -> str:
    """What a user should know where the inputs could not be cut to a few samples."""
    one = "; a dimension of size 1 may hide what it means" if batch.rows == 1 else ""
    return (
        f"the example inputs were traced as they are, since {why}: costs are of the whole example, not "
        f"of one sample, and what the model does where dim 0 is not {batch.rows} was not seen{one}"
    )
