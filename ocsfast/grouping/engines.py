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
from ocsfast.grouping.proof.trials import Run, Setting, proved
from ocsfast.grouping.propagation import Propagation
from ocsfast.grouping.refusals import require_prunable
from ocsfast.grouping.scope import Scope, kept_outputs, matched_parameters, protected_parameters
from ocsfast.grouping.time_limit import TimeLimit
from ocsfast.grouping.trace.batch import with_batch
from ocsfast.grouping.trace.export import Trace, trace
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
        GroupingError: the model has parameters that cannot be pruned at all, or neither engine can
            trace it. `GroupingTimeout`, a subclass: it takes too long.
        StateError: a buffer holds NaN.
    """
    kwargs = kwargs or {}
    scope = scope or Scope()
    with nullcontext() if scope.forward is None else forward_as(model, scope.forward):
        protected = protected_parameters(model, scope)
        require_prunable(model)
        deadline = TimeLimit(time_limit)
        setting = Setting(*with_batch(args, kwargs)[:2], (), training=True, deadline=deadline)
        if engine == "labels":
            try:
                families, setting = by_labels(model, args, kwargs, scope, deadline)
            except GroupingTimeout:
                raise
            except GroupingError as error:
                require_runs(model, args, kwargs)
                logger.warning("%s. Trying the second engine (torch-pruning)", error)
                try:
                    families = by_depgraph(model, args, kwargs, protected)
                except GroupingError as second:
                    raise GroupingError(f"{error}. The second engine failed too: {second}") from error
        else:
            families = by_depgraph(model, args, kwargs, protected)
        return proved(model, families, setting) if verify else families


def by_labels(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    scope: Scope,
    deadline: TimeLimit | None = None,
) -> tuple[Families, Setting]:
    """Trace the model in both modes, and run labels over what it does in either.

    A width that the code reads in training alone is bound too, and what the model returns in training
    alone, as deep supervision does, keeps its shape. Where one mode cannot be traced,
    `Families.notes` says so.

    Returns:
        The families, not yet proved, and the setting to prove them in.

    Raises:
        GroupingError: neither mode can be traced.
    """
    traces, failed = _traces(model, args, kwargs)
    found = Findings()
    if not failed and same_but_for_mode(traces[False], traces[True]):
        found.read |= traces.pop(True).read
    kept = kept_outputs(traces, scope.outputs)
    for training, traced in traces.items():
        first = traced is next(iter(traces.values()))
        walk = Walk(model, traced, found, count=first, training=training)
        Propagation(walk, outputs=kept[training], alone=bool(failed), deadline=deadline).run()
    _freeze_protected(found, model, scope)
    samples = next(iter(traces.values())).samples
    families = assemble(found, model, samples, scope.kinds)
    families = replace(families, notes=tuple(_note(*entry) for entry in failed.items()))
    args, kwargs, _ = with_batch(args, kwargs)
    runs = tuple(Run(traced, mode, kept[mode]) for mode, traced in traces.items())
    return families, Setting(args, kwargs, runs, not failed, deadline)


def _traces(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[bool, Trace], dict[bool, GroupingError]]:
    """The graph of each mode (True: training), evaluation first, and why a mode has none.

    Raises:
        GroupingError: no mode can be traced; or one cannot, and the model is a `GraphModel`, whose sizes
            in the other mode's graph would then be unknown.
    """
    traces: dict[bool, Trace] = {}
    failed: dict[bool, GroupingError] = {}
    for training in (False, True):
        try:
            traces[training] = trace(model, args, kwargs, training=training)
            spell_out(traces[training].graph)
        except GroupingError as error:
            failed[training] = error
    if not traces:
        raise failed[False]
    if failed and literals_beyond(model, *traces.values()):
        raise next(iter(failed.values()))
    return traces, failed


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
