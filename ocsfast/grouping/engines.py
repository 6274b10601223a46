"""Grouping: which parameter slices of a model must disappear together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ocsfast.core.errors import ConfigError, GroupingError, GroupingTimeout, StateError
from ocsfast.core.families import DEFAULT_KINDS, KINDS, Axis, Families, Family, Frozen, names_match
from ocsfast.grouping import rules  # noqa: F401  registers what operators say
from ocsfast.grouping.assemble import assemble
from ocsfast.grouping.deadline import Deadline
from ocsfast.grouping.depgraph import by_depgraph
from ocsfast.grouping.graph.literals import literals_beyond
from ocsfast.grouping.proof.trials import Run, Setting, proved
from ocsfast.grouping.propagate import Findings, Walk
from ocsfast.grouping.trace.export import Trace, forward_as, require_runs, trace, with_batch
from ocsfast.grouping.trace.modes import same_but_for_mode

__all__ = ["Axis", "Choice", "Families", "Family", "Frozen", "group"]

logger = logging.getLogger("ocsfast")

ENGINES = ("labels", "torch-pruning")
TIME_LIMIT = 300.0  # seconds
# What transformers' models return besides what they are for: not kept, unless there is nothing else.
INNER_OUTPUTS = (
    *("past_key_values*", "*hidden_state", "*hidden_states", "*attentions", "*cache_params*"),
    *("pooler_output", "vision_model_output", "text_model_output"),
)


@dataclass(frozen=True)
class Choice:
    """What may go, as the user says it.

    keep: modules, or shell patterns of module or parameter names, whose parameters keep their shapes.
    only: the same; where given, no other layer may lose outputs.
    kinds: the kinds of groups that may go, of `families.KINDS`.
    outputs: shell patterns of the outputs that keep their shapes, by the names that the model gives
        them ("logits", "0", "features.2"); None: all but INNER_OUTPUTS.
    forward: what to run instead of the model's own forward pass, called with the model and the example
        inputs: for a model whose own pass branches on its data. What it does not run stays as it is.
    """

    keep: Sequence[str | nn.Module] = ()
    only: Sequence[str | nn.Module] = ()
    kinds: Collection[str] = DEFAULT_KINDS
    outputs: Sequence[str] | None = None
    forward: Callable[..., Any] | None = None


def group(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    choice: Choice | None = None,
    engine: str = "labels",
    verify: bool = True,
    time_limit: float = TIME_LIMIT,
) -> Families:
    """Find the families of a model. The model is left as it was.

    Args:
        model: any module with dense floating-point parameters, on any device.
        args, kwargs: one batch of input, as for `model(*args, **kwargs)`; dim 0 is the batch.
        choice: what may go. The model's outputs are protected without being named.
        engine: "labels" (index labels over the exported graph), or "torch-pruning" (DepGraph's
            tracing; plain CNNs). A model that cannot be exported falls back to the second.
        verify: prove on a float64 copy that cutting groups equals zeroing their slices. A family
            for which it does not is left dense and named in `Families.frozen`.
        time_limit: seconds after which to give up; looked at between operators and between trials.

    Raises:
        ConfigError: an unknown engine or kind, or a name in `choice` that matches nothing.
        GroupingError: the model has parameters that cannot be pruned at all, or no engine can
            trace it, or (GroupingTimeout) it takes too long.
    """
    kwargs = kwargs or {}
    choice = choice or Choice()
    if choice.forward is not None:
        with forward_as(model, choice.forward):
            own = replace(choice, forward=None)
            return group(
                model, args, kwargs, choice=own, engine=engine, verify=verify, time_limit=time_limit
            )
    if engine not in ENGINES:
        raise ConfigError(f"grouping={engine!r} is not known; choose one of {', '.join(ENGINES)}")
    for kind in choice.kinds:
        if kind not in KINDS:
            raise ConfigError(f"kinds= holds {kind!r}: choose from {', '.join(KINDS)}")
    protected = _protected(model, choice.keep)
    check_parameters(model)
    deadline = Deadline(time_limit)
    setting = Setting(*with_batch(args, kwargs)[:2], (), training=True, deadline=deadline)
    if engine == "labels":
        try:
            families, setting = by_labels(model, args, kwargs, choice, deadline)
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
    choice: Choice,
    deadline: Deadline | None = None,
) -> tuple[Families, Setting]:
    """Trace the model in both modes and label what it does in either.

    What it computes in both but returns in training only, as deep supervision does, keeps its shape;
    so does a width that only its training code reads. Where one mode cannot be traced, a note of the
    families says so.

    Returns the families and what to prove them on.
    """
    traces: dict[bool, Trace] = {}
    failed: dict[bool, GroupingError] = {}
    for training in (False, True):
        try:
            traces[training] = trace(model, args, kwargs, training=training)
        except GroupingError as error:
            failed[training] = error
    if not traces:
        raise failed[False]
    if failed and literals_beyond(model, *traces.values()):
        raise next(iter(failed.values()))  # a graph's own: the sizes in it would not be known
    found = Findings()
    if not failed and same_but_for_mode(traces[False], traces[True]):
        found.read |= traces.pop(True).read
    wanted = _wanted_outputs(traces, choice.outputs)
    for training, traced in traces.items():
        Walk(
            model,
            traced,
            found,
            count=traced is next(iter(traces.values())),
            outputs=wanted[training],
            training=training,
            alone=bool(failed),
            deadline=deadline,
        ).run()
    protected = _protected(model, choice.keep)
    for name, dims in found.state.items():
        if name in protected:
            for vector in dims:
                found.labels.freeze(vector, protected[name])
    if choice.only:
        chosen = _named(model, choice.only, "only")
        for name, axis in found.producers:
            if name not in chosen:
                found.labels.freeze(found.state[name][axis], "only= leaves it out")
    samples = next(iter(traces.values())).samples
    families = assemble(found, model, samples, choice.kinds)
    families = replace(families, notes=tuple(_note(*entry) for entry in failed.items()))
    args, kwargs, _ = with_batch(args, kwargs)
    runs = tuple(Run(traced, mode, wanted[mode]) for mode, traced in traces.items())
    return families, Setting(args, kwargs, runs, not failed, deadline)


def _note(training: bool, error: GroupingError) -> str:
    mode, other = ("training", "evaluation") if training else ("evaluation", "training")
    return (
        f"only the {other} mode could be traced: what the model does in {mode} alone was not seen, and "
        f"a width that it reads there may not fit after the cut ({error})"
    )


def _wanted_outputs(
    traces: dict[bool, Trace], patterns: Sequence[str] | None
) -> dict[bool, frozenset[int]]:
    """Numbers of the outputs that keep their shape, in each mode.

    What a pass leaves behind follows the outputs. It counts in training, where a loss may read it.
    """
    wanted = {}
    for training, traced in traces.items():
        returned = range(len(traced.outputs))
        left = range(len(returned), len(returned) + len(traced.left))
        if patterns is None:
            inner = {n for n in returned if names_match(traced.outputs[n], INNER_OUTPUTS)}
            chosen = set(returned) - inner or set(returned)
            wanted[training] = frozenset(chosen | set(left if training or len(traces) == 1 else ()))
        else:
            named = (names_match(name, patterns) for name in traced.outputs)
            # A place in a layer that is called as an output is, "0.last", is none of that output.
            places = (any(fnmatchcase(name, pattern) for pattern in patterns) for name in traced.left)
            wanted[training] = frozenset(n for n, yes in enumerate((*named, *places)) if yes)
    known = dict.fromkeys(name for t in traces.values() for name in (*t.outputs, *t.left))
    for pattern in patterns or ():
        if not any(names_match(name, [pattern]) for name in known):  # a place, or an output's name
            raise ConfigError(
                f"outputs={pattern!r} matches no output of the model; it has {', '.join([*known][:20])}"
            )
    return wanted


def _protected(model: nn.Module, keep: Sequence[str | nn.Module]) -> dict[str, str]:
    """Parameters that must keep their shape, and why."""
    protected = {n: "requires_grad=False" for n, p in model.named_parameters() if not p.requires_grad}
    return {**protected, **_named(model, keep, "keep")}


def _named(model: nn.Module, entries: Sequence[str | nn.Module], option: str) -> dict[str, str]:
    """The parameters that modules and patterns name, each with the entry that names it."""
    names = dict(model.named_parameters())
    found: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, nn.Module):
            own = {id(p) for p in entry.parameters()}
            hits = [name for name, p in names.items() if id(p) in own]
            said = f"{option}={type(entry).__name__}"
        else:
            hits = [name for name in names if names_match(name, [entry])]
            said = f"{option}={entry!r}"
        if not hits:
            raise ConfigError(f"{said} matches no parameter of the model; see model.named_parameters()")
        found.update(dict.fromkeys(hits, said))
    return found


def check_parameters(model: nn.Module) -> None:
    """Refuse a model that holds what cannot be cut.

    Raises:
        GroupingError, StateError: naming the part, and the way out.
    """
    for name, module in model.named_modules():
        where = f"its part {name}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise GroupingError(f"{where} is scripted: nothing in it can be cut. Pass its source")
        if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
            raise GroupingError(f"{where} is quantized: prune first, and quantize what is left")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise GroupingError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}: only float32, float64, "
                "float16 and bfloat16 parameters can be pruned. Register it as a buffer, or convert it"
            )
        if parameter.layout is not torch.strided or isinstance(parameter, nn.UninitializedParameter):
            raise GroupingError(f"{name} is not a dense tensor: run a forward pass or .to_dense() first")
        if parameter.device.type == "meta":
            raise GroupingError(f"{name} is on the meta device: materialize the model first (to_empty)")
    for name, buffer in model.named_buffers():
        if buffer.device.type == "meta":
            raise GroupingError(f"{name} is on the meta device: materialize the model first (to_empty)")
        if buffer.is_floating_point() and buffer.isnan().any():  # masks may well hold infinity
            raise StateError(f"{name} holds NaN: the training has diverged")
