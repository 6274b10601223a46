"""Where a run stands: one frozen report a check, and the numbers that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.config import PLAN
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.core.families import Families, Frozen
from ocsfast.optim.owners import Scalar

STATE_VERSION = 3
STAGES = ("observe", "sparsify", "pruned")


@dataclass(frozen=True)
class StepReport:
    """One check, or where things stand if this call made none.

    Costs are exact integers in `unit`. Until the pruner is attached nothing tells what goes: `check` is
    0, and the three costs are the model's number of parameters.
    """

    stage: str  # "observe", "sparsify" or "pruned", after this call
    check: int = 0  # number of this check, 1-based
    stability: float | None = None  # Eq. 3; None before check lag + 1
    mean_stability: float | None = None  # Eq. 4
    lam: float = 0.0  # lambda in force from here on, for the mean learning rate
    nats: float = 0.0  # sum of lambda * lr so far: pruned weights shrank by exp(-nats) from Eq. 9 alone
    residual: float | None = None  # mean saliency of the pruned groups / of the kept ones
    changed: int = 0  # groups that changed sides since the last check
    cost: int = 0  # of the model as it is
    cost_at_cut: int = 0  # of the model with the present choice cut out
    cost_dense: int = 0  # of the model at attach
    unit: str = "MACs"  # of these: "MACs" of a sample's forward pass, "parameters", "bytes", ...
    cut: bool = False  # whether the cut happened in this call
    forced: bool = False  # cut by the deadline or by `Pruner.cut()`, not because it was stable
    seconds: float = 0.0  # this check's wall-clock time
    accuracy: float | None = None  # the last that `step` was told, in whatever unit
    kept: tuple[tuple[str, int, int], ...] = field(default=(), repr=False)  # family, kept, of how many
    dense: tuple[Frozen, ...] = field(default=(), repr=False)  # what is never pruned, and why
    # At the cut: attributes that may still say a width of before it, as "layers.2.c = 64".
    stale: tuple[str, ...] = ()

    def kept_share(self) -> dict[str, float]:
        """The share of groups that stay, 0 to 1, by family (named after its first layer)."""
        return {name: kept / size for name, kept, size in self.kept}


def unattached(model: nn.Module, accuracy: float | None = None) -> StepReport:
    """The report of a call that only listens."""
    cost = sum(parameter.numel() for parameter in model.parameters())
    return StepReport(
        "observe",
        cost=cost,
        cost_at_cut=cost,
        cost_dense=cost,
        unit="parameters",
        accuracy=accuracy,
    )


def told(accuracy: Any) -> float | None:
    """What a caller says of the model's accuracy, as a plain number.

    Raises:
        ConfigError: it is no number.
    """
    try:
        return None if accuracy is None else float(accuracy)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"accuracy={accuracy!r}: a number is expected") from error


@dataclass
class Progress:
    """The numbers a pruner changes as the run goes on."""

    stage: str = "observe"
    check: int = 0  # checks made
    steps: int = 0  # optimizer steps taken
    at_call: int = 0  # of those, at the last call of `step`
    at_check: int = 0  # and at the last check
    begun: int = 0  # and before the first call that could make one
    calls: int = 0  # calls of `step` from then on that had new optimizer steps to tell of
    listened: int = 0  # and before that
    every: int = 0  # steps between checks where `step` is called after each; 0: to be found
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
        return self.calls + (self.steps > self.at_call)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A pruner's state, read and checked."""

    progress: Progress
    masks: list[Tensor]  # the last partitions, oldest first, [groups] bool each
    mask: Tensor | None
    scores: Tensor | None
    replanned: bool  # the options that say when things happen are others now


def pack(
    progress: Progress,
    facts: Mapping[str, Any],
    masks: list[Tensor],
    mask: Tensor | None,
    scores: Tensor | None,
) -> dict[str, Any]:
    """A pruner's state as CPU tensors, plain numbers, strings, lists and dicts.

    Args:
        facts: what has to be equal where the state is loaded, by name: plain values.
    """
    numbers = {f.name: getattr(progress, f.name) for f in fields(Progress)}
    reports = [asdict(report) for report in progress.history]
    for report in reports:
        report["kept"] = [list(entry) for entry in report["kept"]]
        report["stale"] = list(report["stale"])
        del report["dense"]  # `unpack` has it from the families
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
        "masks": [m.cpu() for m in masks],
        "mask": None if mask is None else mask.cpu(),
        "scores": None if scores is None else scores.cpu(),
    }


def unpack(
    state: Mapping[str, Any], facts: Mapping[str, Any], families: Families, device: torch.device
) -> Loaded:
    """The inverse of `pack`, for the same facts.

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
    return Loaded(
        progress,
        [m.to(device) for m in masks],
        None if mask is None else mask.to(device),
        None if scores is None else scores.to(device),
        any(state["facts"]["config"].get(name) != facts["config"].get(name) for name in PLAN),
    )


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


def _progress(state: Mapping[str, Any], dense: tuple[Frozen, ...]) -> Progress:
    try:
        if set(state) != {f.name for f in fields(Progress)} or state["stage"] not in STAGES:
            raise ValueError(f"fields {sorted(state)}, stage {state.get('stage')!r}")
        names = ("check", "steps", "at_call", "at_check", "begun", "calls", "listened", "planned")
        counts = [state[name] for name in names]
        optional = [state[name] for name in ("t_sl", "t_cut", "start")]
        if not all(isinstance(n, int) for n in counts + [n for n in optional if n is not None]):
            raise ValueError("a count is not an integer")
        reports = [
            StepReport(
                **{
                    **report,
                    "kept": tuple((str(f), k, n) for f, k, n in report["kept"]),
                    "dense": dense,
                    "stale": tuple(report.get("stale", ())),
                }
            )
            for report in state["history"]
        ]
        indices = [float(x) for x in state["indices"]]
        nats = float(state["nats"])
        position = None if state["position"] is None else tuple(int(n) for n in state["position"])
        return Progress(
            **{**state, "nats": nats, "indices": indices, "history": reports, "position": position}
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise StateError(f"this is not a pruner's state: {error}") from error
