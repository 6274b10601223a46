"""One check: measure, agree with the other processes, choose, and decide what follows."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from ocsfast.api.parts import Parts
from ocsfast.choice import stability
from ocsfast.choice.budget import Aim
from ocsfast.choice.selection import Choice, choose, mean_pruned_norm
from ocsfast.core.errors import StateError
from ocsfast.distributed.decision import one_choice
from ocsfast.optim.coupled import Coupled
from ocsfast.run import messages
from ocsfast.run.decision import Decision, decide
from ocsfast.run.report import StepReport


def make_check(parts: Parts, coupled: Coupled, forced: bool) -> StepReport:
    """Choose anew. If the report says `cut`, that has yet to be made; between two calls none does.

    Args:
        coupled: the plan, as the weights lie now.
        forced: whether to cut in any case.

    Raises:
        StateError: a weight is NaN or infinite, the processes have drifted apart, or a forced cut
            finds nothing to cut.
    """
    parts.freezing.look()
    aim, choice = _aim_and_choice(parts, coupled)
    now, state = parts.state.progress, parts.state
    now.waits = False
    if choice.stability is not None:
        now.indices.append(choice.stability)
    now.check += 1
    now.at_check, now.every = now.steps, 0
    state.masks.append(choice.mask)
    state.scores, state.mask = choice.scores, choice.mask

    parts.timetable.note_position(now)
    stage = parts.timetable.plan(now)
    if not forced and not now.between and parts.timetable.lacks_length(now, stage):
        text = messages.unplanned(now, parts.timetable.latest_checks(now))
        parts.processes.log(text, logging.WARNING)
    for level, text in parts.freezing.told(choice.cost <= aim.budget, parts.ratio):
        parts.processes.log(text, level)
    if forced and choice.cost == aim.now:
        raise StateError("nothing can be cut: all that might go is frozen (requires_grad=False)")
    decision = decide(parts.config, parts.timetable, now, stage, choice, aim, forced)
    if decision.cut and now.between:
        decision, now.waits = replace(decision, ready=False, late=False), True
    if decision.late and not decision.ready and not forced:
        level, text = messages.deadline_came(now.check, choice.residual, parts.config.max_residual)
        parts.processes.log(text, level)
    if decision.begins:
        _begin(parts, choice, coupled)
    return _report(parts, choice, decision)


def _aim_and_choice(parts: Parts, coupled: Coupled) -> tuple[Aim, Choice]:
    """The aim without what is frozen, and the choice; round_to="auto" gives way where that takes it."""
    frozen = parts.freezing.families
    while True:
        aim = parts.aim.without(frozen) if frozen else parts.aim
        choice = _choice(parts, coupled, aim)
        if not frozen or parts.config.round_to != "auto" or choice.cost <= aim.budget:
            return aim, choice
        multiple = parts.processes.first_of_all(parts.aim.multiple)
        if multiple == 1:
            return aim, choice
        parts.set_multiple(multiple // 2)


def _choice(parts: Parts, coupled: Coupled, aim: Aim) -> Choice:
    """This process's choice; where several train the model, rank 0's."""
    before, config, now = list(parts.state.masks), parts.config, parts.state.progress

    def choose_here() -> Choice:
        return choose(aim, coupled.bound, config.criterion, parts.optimizer, before, config.lag)

    def facts() -> dict[str, Any]:  # to read the masks waits for the device
        return {
            **parts.facts(),
            "dtypes": [str(w.dtype) for w in coupled.bound.weights],
            "progress": (now.stage, now.check, now.steps, now.at_check, float(now.nats)),
            "choice": [mask.tolist() for mask in before],
            "frozen": sorted(parts.freezing.families),
            "latency": parts.latency(),
        }

    return one_choice(parts.processes, facts, choose_here)


def _begin(parts: Parts, choice: Choice, coupled: Coupled) -> None:
    """Begin sparsity learning."""
    now = parts.state.progress
    now.stage, now.t_sl, now.start = "sparsify", now.check, now.steps
    # Planned once: a length that moved with every estimate would make the sum of lambda * lr drift.
    now.planned = parts.timetable.plan(now).steps
    if parts.config.strength == "auto":
        now.scale = mean_pruned_norm(coupled.bound, choice.mask)
    gone, ramp = int(choice.mask.sum()), parts.config.strength == "auto"
    parts.processes.log(messages.sparsity_begins(now, gone, parts.families.num_groups, ramp))


def _report(parts: Parts, choice: Choice, decision: Decision) -> StepReport:
    now, cut = parts.state.progress, decision.cut
    shrinks = now.stage == "sparsify" and not cut
    families = parts.families.families
    return StepReport(
        stage="pruned" if cut else now.stage,
        check=now.check,
        steps=now.steps,
        stability=choice.stability,
        mean_stability=stability.mean_stability(now.indices, parts.config.window),
        lam=float(parts.hooks.lam(parts.hooks.rate())) if shrinks else 0.0,
        nats=float(now.nats),
        residual=choice.residual,
        changed=choice.changed,
        cost=choice.cost if cut else parts.aim.now,
        cost_at_cut=choice.cost,
        cost_dense=parts.aim.dense,
        unit=parts.aim.cost_model.unit,
        cut=cut,
        forced=cut and not decision.ready,
        accuracy=parts.state.report.accuracy,
        kept=tuple((f.name, n, f.size) for f, n in zip(families, choice.kept, strict=True)),
        frozen=(*parts.families.frozen, *parts.freezing.named()),
    )
