"""Grouping: which parameter slices of a model must disappear together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ocsfast.errors import ConfigError, GroupingError
from ocsfast.grouping import layers, rules  # noqa: F401  (they register what operators say)
from ocsfast.grouping.assemble import assemble
from ocsfast.grouping.depgraph import by_depgraph
from ocsfast.grouping.families import Axis, Families, Family, Frozen, names_match
from ocsfast.grouping.proof import Setting, proved
from ocsfast.grouping.propagate import Findings, Walk
from ocsfast.grouping.trace import Trace, trace, with_batch

__all__ = ["Axis", "Families", "Family", "Frozen", "group"]

logger = logging.getLogger("ocsfast")

ENGINES = ("labels", "torch-pruning")


def group(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    keep: Sequence[str | nn.Module] = (),
    engine: str = "labels",
    verify: bool = True,
) -> Families:
    """Find the families of a model. The model is left as it was.

    Args:
        model: any module with dense floating-point parameters, on any device.
        args, kwargs: one batch of input, as for `model(*args, **kwargs)`; dim 0 is the batch.
        keep: modules, or shell patterns of module or parameter names, whose parameters keep their
            shapes. The model's outputs are protected without being named.
        engine: "labels" (index labels over the exported graph), or "torch-pruning" (DepGraph's
            tracing; plain CNNs). A model that cannot be exported falls back to the second.
        verify: prove on a float64 copy that cutting groups equals zeroing their slices. A family
            for which it does not is left dense and named in `Families.frozen`.

    Raises:
        ConfigError: an unknown engine, or a `keep` that names nothing.
        GroupingError: the model has parameters that cannot be pruned at all, or no engine can
            trace it.
    """
    kwargs = kwargs or {}
    if engine not in ENGINES:
        raise ConfigError(f"grouping={engine!r} is not known; choose one of {', '.join(ENGINES)}")
    protected = _protected(model, keep)
    _check_parameters(model)
    # DepGraph traces one mode only, so the cut model must at least run in the other one.
    traced, both_modes = None, True
    if engine == "torch-pruning":
        families = by_depgraph(model, args, kwargs, protected)
    else:
        try:
            families, traced, both_modes = by_labels(model, args, kwargs, protected)
        except GroupingError as error:
            logger.warning("%s. Trying the second engine (torch-pruning)", error)
            try:
                families = by_depgraph(model, args, kwargs, protected)
            except GroupingError as second:
                raise GroupingError(f"{error}. The second engine failed too: {second}") from error
    if not verify:
        return families
    args, kwargs, _ = with_batch(args, kwargs)
    return proved(model, families, Setting(args, kwargs, traced, both_modes))


def by_labels(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], protected: dict[str, str]
) -> tuple[Families, Trace, bool]:
    """Trace in eval mode, and in training mode too where that uses more of the parameters.

    Returns the families, the trace in eval mode, and whether there is one in training mode.
    """
    found = Findings()
    evaluation = trace(model, args, kwargs, training=False)
    Walk(model, evaluation, found, count=True).run()
    parameters = dict(model.named_parameters())
    both_modes = False
    if any(name not in found.used for name in parameters):
        # Auxiliary heads and the like run in training only, on channels that are pruned elsewhere.
        try:
            training = trace(model, args, kwargs, training=True)
        except GroupingError as error:
            logger.info("no trace in training mode: %s", error)
        else:
            Walk(model, training, found, count=False).run()
            both_modes = True
    for name, dims in found.state.items():
        if name in protected:
            for vector in dims:
                found.labels.freeze(vector, protected[name])
    return assemble(found, parameters, evaluation.samples), evaluation, both_modes


def _protected(model: nn.Module, keep: Sequence[str | nn.Module]) -> dict[str, str]:
    """Parameters that must keep their shape, and why."""
    names = dict(model.named_parameters())
    protected = {n: "requires_grad=False" for n, p in names.items() if not p.requires_grad}
    for entry in keep:
        if isinstance(entry, nn.Module):
            own = {id(p) for p in entry.parameters()}
            hits = [name for name, p in names.items() if id(p) in own]
            said = type(entry).__name__
        else:
            hits = [name for name in names if names_match(name, [entry])]
            said = repr(entry)
        if not hits:
            raise ConfigError(
                f"keep={said} matches no parameter of the model; see model.named_parameters()"
            )
        protected.update(dict.fromkeys(hits, f"keep={said}"))
    return protected


def _check_parameters(model: nn.Module) -> None:
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
