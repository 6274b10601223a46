"""How a run goes on: from a saved state, and from weights that arrive cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ocsfast.api.parts import Parts
from ocsfast.choice.budget import Aim, with_cost_model, with_multiple
from ocsfast.choice.targets import target_products
from ocsfast.core.config import Config
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.core.latency import LatencyRecord
from ocsfast.cut.fitting import FitHook, surplus
from ocsfast.ops.cost import build_cost_model
from ocsfast.run import state as states
from ocsfast.run.hooks import weak_hook
from ocsfast.run.state import RunState


class LoadHooks:
    """Cuts a model, with all that a pruner drives, to the widths of weights that are loaded into it."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        model = parts.alive()
        self._handles = [
            module.register_load_state_dict_pre_hook(FitHook(weak_hook(self._fit)))  # type: ignore[no-untyped-call]
            for module in (model, *parts.copies.modules(model))
        ]

    def remove(self) -> None:
        """Listen no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _fit(self, module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        parts, state = self._parts, self._parts.state
        if state.progress.stage == "pruned":
            return
        model = parts.alive()
        if module not in (model, *parts.copies.modules(model)):
            return
        pruned = surplus(parts.families, shapes)
        if pruned is None:
            return
        parts.remove(pruned)  # these hooks stay until then: torch is just going through them
        parts.fitted = parts.families.cropped(pruned).sizes
        state.progress.stage = "pruned"
        cost = parts.aim.cost_model(parts.fitted)
        state.report = replace(state.report, stage="pruned", cost=cost, cost_at_cut=cost)


def load_state(parts: Parts, state: Mapping[str, Any]) -> None:
    """Go on where a state was taken; see `Pruner.load_state_dict`.

    Raises:
        StateError: as there.
    """
    if parts.fitted is None:
        if parts.state.progress.stage == "pruned":
            raise StateError("the model is cut already: attach to a dense instance to load a state")
        parts.require_attached()
    state = dict(state) if isinstance(state, Mapping) else {}
    saved = state.pop("latency", None)  # None where the target is another
    multiple = state.pop("multiple", None)
    loaded = _unpacked(parts, state)
    config, aim = _measured_then(parts, saved)
    aim = _rounded_then(parts, aim, multiple)
    if loaded.progress.stage == "pruned":
        assert loaded.mask is not None  # `unpack` sees to it
        left = parts.families.cropped(loaded.mask.cpu()).sizes
        if parts.fitted is None:
            before = parts.config, parts.aim
            parts.config, parts.aim = config, aim  # what the cut is remembered by
            try:
                parts.remove(loaded.mask)
            except BaseException:
                parts.config, parts.aim = before
                raise
        elif left != parts.fitted:
            raise StateError("the state and the weights that were loaded are of different cuts")
    elif parts.fitted is not None:
        raise StateError(
            "the state is from before the cut, the weights that were loaded from after it: load "
            "both from one checkpoint"
        )
    parts.config, parts.aim = config, aim
    parts.restore(loaded)


def _measured_then(parts: Parts, saved: Any) -> tuple[Config, Aim]:
    """The options and the aim by the latency that the state's run had measured, in the same integers.

    Raises:
        StateError: the state has none, or one of another model.
    """
    target = parts.config.target
    if not isinstance(target, LatencyRecord):
        return parts.config, parts.aim
    try:
        table, dense = type(target).from_plain(saved["table"]), int(saved["dense"])
        config = replace(parts.config, target=table)
        cost = build_cost_model(parts.families, *target_products(table, parts.families, {}))
    except (ConfigError, TypeError, KeyError, ValueError) as error:
        raise StateError(f"the state's latency table cannot be used: {error}") from error
    return config, with_cost_model(parts.aim, parts.families, cost, dense, parts.ratio)


def _rounded_then(parts: Parts, aim: Aim, multiple: Any) -> Aim:
    """The aim with the multiple that round_to="auto" stood for where the run began.

    Raises:
        StateError: the state has none.
    """
    number = isinstance(multiple, int) and not isinstance(multiple, bool)
    if number and multiple == aim.multiple:
        return aim
    if parts.config.round_to != "auto" or not number or multiple not in (1, 2, 4, 8, 16):
        raise StateError(f"the state's multiple of kept counts, {multiple!r}, is none that a run has")
    parameters = dict(parts.alive().named_parameters())
    return with_multiple(aim, parts.families, parameters, parts.config.round_to, multiple)


def _unpacked(parts: Parts, state: Mapping[str, Any]) -> RunState:
    """A state that was packed, checked against this run; the same on every process."""
    facts, coupled = parts.facts(), parts.hooks.coupled
    device = torch.device("cpu") if coupled is None else coupled.device
    with parts.processes.together():
        loaded = states.unpack(
            state, facts, parts.families, device, parts.config.lag, parts.state.report
        )
        if states.replanned(state, facts) and loaded.progress.stage != "pruned":
            parts.timetable.take_over(loaded.progress)
    mask = None if loaded.mask is None else loaded.mask.tolist()
    stage = loaded.progress.stage
    parts.processes.begin({"the state's stage": stage, "mask": mask, "weights": parts.fitted})
    return loaded
