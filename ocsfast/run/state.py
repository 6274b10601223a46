"""What a run has come to, and what has to be saved of it to go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocsfast.core.config import PLAN
from ocsfast.core.errors import StateError
from ocsfast.core.families import Families, Frozen
from ocsfast.optim.param_groups import Scalar
from ocsfast.run.report import STAGES, StepReport

STATE_VERSION = 5


@dataclass
class Progress:
    """The numbers that a pruner changes as the run goes on."""

    stage: str = "observe"
    check: int = 0  # checks made
    steps: int = 0  # optimizer steps taken
    at_call: int = 0  # optimizer steps taken by the last call of `step`
    at_check: int = 0  # optimizer steps taken by the last check
    begun: int = 0  # optimizer steps taken before the first call that could make a check
    calls: int = 0  # calls of `step` that could make a check and came after new optimizer steps
    listened: int = 0  # calls of `step` before a check was possible
    every: int = 0  # check_every="auto": steps to the next check; 0: to be found
    between: bool = False  # whether an optimizer step makes a check, between two calls of `step`
    apart: int = 0  # optimizer steps between the last two calls
    length: int | None = None  # optimizer steps of the whole run, as the last call knew it
    told: int | None = None  # what told it: `epochs`, or the scheduler's own length
    waits: bool = False  # whether the cut was found due between two calls: the next one looks again
    t_sl: int | None = None  # check at which sparsity learning began
    t_cut: int | None = None  # check at which the cut came
    start: int | None = None  # optimizer step at which sparsity learning began
    position: tuple[int, int] | None = None  # optimizer and scheduler steps when its scheduler was found
    planned: int = 0  # optimizer steps the automatic ramp takes
    scale: float | None = None  # slice norm that scales Eq. 8; None: Eq. 8 as written
    nats: Scalar = 0.0
    indices: list[float] = field(default_factory=list)  # Eq. 3, from check lag + 1 on
    history: list[StepReport] = field(default_factory=list)

    def all_calls(self) -> int:
        """`calls`, with the one that is being made."""
        return self.calls + (self.steps > self.at_call and not self.between)


@dataclass(eq=False)
class RunState:
    """A run's numbers and choices: what a check changes, and a resumed run begins with."""

    progress: Progress
    masks: deque[Tensor]  # the last choices, the oldest first, `lag` at most; [groups] bool each
    mask: Tensor | None = None  # the last check's choice, less the groups frozen since
    scores: Tensor | None = None  # and its scores, [groups]
    # What a call without a check returns.
    report: StepReport = field(default_factory=partial(StepReport, "observe"))

    def copied(self) -> RunState:
        """Another one, so that what a check changes here can be taken back."""
        now = self.progress
        before = replace(now, indices=[*now.indices], history=[*now.history])
        return RunState(before, self.masks.copy(), self.mask, self.scores, self.report)

    def become(self, other: RunState) -> None:
        """Take over what another one holds; who holds this one, or its progress, sees it."""
        vars(self.progress).update(vars(other.progress))
        self.masks, self.mask, self.scores = other.masks, other.mask, other.scores
        self.report = other.report

    def to(self, device: torch.device) -> None:
        """Move the masks to where the weights are."""
        self.masks = deque((mask.to(device) for mask in self.masks), maxlen=self.masks.maxlen)
        self.mask = None if self.mask is None else self.mask.to(device)


def pack(state: RunState, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A run's state as CPU tensors, plain numbers, strings, lists and dicts.

    Args:
        state: of the run.
        facts: what has to be equal where the state is loaded, by name: plain values.
    """
    progress, mask, scores = state.progress, state.mask, state.scores
    numbers = {f.name: getattr(progress, f.name) for f in fields(Progress)}
    reports = [asdict(report) for report in progress.history]
    for report in reports:
        report["kept"] = [list(entry) for entry in report["kept"]]
        report["stale"] = list(report["stale"])
        del report["frozen"]  # `unpack` has it from the families
    return {
        "version": STATE_VERSION,
        "facts": dict(facts),
        "progress": {
            **numbers,
            "position": None if progress.position is None else list(progress.position),
            "nats": float(progress.nats),
            "indices": list(progress.indices),
            "history": reports,
        },
        "masks": [m.cpu() for m in state.masks],
        "mask": None if mask is None else mask.cpu(),
        "scores": None if scores is None else scores.cpu(),
    }


def unpack(
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    families: Families,
    device: torch.device,
    lag: int,
    report: StepReport,
) -> RunState:
    """The inverse of `pack`, for the same facts.

    Args:
        report: of a run that has made no check yet.

    Raises:
        StateError: it is not what `pack` returns, or of another run.
    """
    wanted = {"version", "facts", "progress", "masks", "mask", "scores"}
    if not isinstance(state, Mapping) or set(state) != wanted:
        raise StateError("this is not a pruner's state")
    if state["version"] != STATE_VERSION:
        raise StateError(f"the state has version {state['version']}, this is {STATE_VERSION}")
    _require_same(state["facts"], facts)
    progress = _progress(state["progress"], families.frozen)
    masks, mask, scores = list(state["masks"]), state["mask"], state["scores"]
    size = (families.num_groups,)
    for tensor in (*masks, mask, scores):
        if tensor is None and progress.check == 0:
            continue
        if not isinstance(tensor, Tensor) or tensor.shape != size:
            raise StateError("the state's masks and scores do not fit the model's groups")
    if any(m.dtype != torch.bool for m in (*masks, mask) if m is not None):
        raise StateError("the state's masks are not boolean")
    return RunState(
        progress,
        deque((m.to(device) for m in masks), maxlen=lag),
        None if mask is None else mask.to(device),
        None if scores is None else scores.to(device),
        replace(progress.history[-1], cut=False, seconds=0.0) if progress.history else report,
    )


def replanned(state: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    """Whether a packed state is of a run with another length, or other checks, than now."""
    return any(state["facts"]["config"].get(name) != facts["config"].get(name) for name in PLAN)


def _require_same(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    if not isinstance(saved, Mapping) or set(saved) != set(facts):
        raise StateError("this is not a pruner's state: it does not say what it is of")
    for name, value in facts.items():
        if saved[name] == value:
            continue
        if name == "families":
            raise StateError("the state is of another model: its families differ")
        if isinstance(value, Mapping) and isinstance(saved[name], Mapping):
            now, then = value, saved[name]
            differing = [k for k in {**now, **then} if now.get(k, None) != then.get(k, None)]
            name = next((k for k in differing if k not in PLAN), "")
            if not name:  # a run goes on by the plan of now
                continue
            raise StateError(
                f"the state is of {name}={then.get(name)!r}, here it is {now.get(name)!r}: attach "
                "with what the state is of, or begin without it"
            )
        raise StateError(
            f"the state is of {name}={saved[name]!r}, here it is {value!r}: attach with what the "
            "state is of, or begin without it"
        )


def read_report(saved: Mapping[str, Any], frozen: tuple[Frozen, ...] = ()) -> StepReport:
    """A report as `pack` wrote it; `frozen`, which is not written, comes from the families."""
    kept = tuple((str(family), count, size) for family, count, size in saved["kept"])
    stale = tuple(saved.get("stale", ()))
    return StepReport(**{**saved, "kept": kept, "frozen": frozen, "stale": stale})


def _progress(state: Mapping[str, Any], frozen: tuple[Frozen, ...]) -> Progress:
    try:
        if set(state) != {f.name for f in fields(Progress)} or state["stage"] not in STAGES:
            raise ValueError(f"fields {sorted(state)}, stage {state.get('stage')!r}")
        names = ("check", "steps", "at_call", "at_check", "begun", "calls", "listened", "planned")
        counts = [state[name] for name in names]
        optional = [state[name] for name in ("t_sl", "t_cut", "start")]
        if not all(isinstance(n, int) for n in counts + [n for n in optional if n is not None]):
            raise ValueError("a count is not an integer")
        reports = [read_report(report, frozen) for report in state["history"]]
        indices = [float(x) for x in state["indices"]]
        nats = float(state["nats"])
        position = None if state["position"] is None else tuple(int(n) for n in state["position"])
        return Progress(
            **{**state, "nats": nats, "indices": indices, "history": reports, "position": position}
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StateError(f"this is not a pruner's state: {error}") from error
