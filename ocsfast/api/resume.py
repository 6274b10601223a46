"""How a run goes on: from a saved state, and from weights that arrive cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ocsfast.api.parts import Parts
from ocsfast.core.errors import StateError
from ocsfast.cut.fitting import FitHook, surplus
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
    loaded = _unpacked(parts, state)
    if loaded.progress.stage == "pruned":
        assert loaded.mask is not None  # `unpack` sees to it
        left = parts.families.cropped(loaded.mask.cpu()).sizes
        if parts.fitted is None:
            parts.remove(loaded.mask)
        elif left != parts.fitted:
            raise StateError("the state and the weights that were loaded are of different cuts")
    elif parts.fitted is not None:
        raise StateError(
            "the state is from before the cut, the weights that were loaded from after it: load "
            "both from one checkpoint"
        )
    parts.restore(loaded)


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
