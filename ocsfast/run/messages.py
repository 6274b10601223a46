"""What a pruner says in the log: one sentence or two a moment, each a function of plain values."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from ocsfast.choice.budget import MUCH, Aim, coarsest, overshoot, quantity
from ocsfast.core.config import Config
from ocsfast.core.families import NOT_USED, Families, Frozen
from ocsfast.cut.sizes import followed_sizes
from ocsfast.run.report import StepReport
from ocsfast.run.stage import Stage
from ocsfast.run.state import Progress

WAY_OUT = (
    "Pass epochs= (step is called once in each) or total_steps= (optimizer steps of the whole run) to "
    "plan the cut"
)
_REASONS, _NAMES = 5, 10  # that a line holds


Line = tuple[int, str]  # a level of `logging`, and a text


def at_attach(families: Families, aim: Aim, least: int, ratio: float, plan: str) -> list[Line]:
    """What may go, what stays and why, and when things are to happen.

    Args:
        least: the lowest cost that the limits allow.
        plan: when what is to come, a sentence.
    """
    lines = [(logging.INFO, attached(families, aim, least, ratio, plan))]
    if families.frozen:
        lines.append((logging.INFO, stays_dense(families.frozen)))
    lines += [(logging.WARNING, note) for note in families.notes]
    lines += [(logging.DEBUG, f"{f.where} stays dense: {f.reason}") for f in families.frozen]
    unused = [frozen.where for frozen in families.frozen if frozen.reason == NOT_USED]
    if unused:
        text = (
            f"{len(unused)} parameters were not used by the example inputs "
            f"({', '.join(unused[:3])} ...) and stay dense: inputs that do use them may find their "
            "neighbours cut. Pass example_inputs= that use all"
        )
        lines.append((logging.WARNING, text))
    return lines


def attached(families: Families, aim: Aim, least: int, ratio: float, plan: str) -> str:
    """What may go, and when; arguments as those of `at_attach`."""
    dense, unit = quantity(aim.dense, aim.cost_model.unit), max(aim.units, default=1)
    together = f", up to {unit} at a time," if unit > 1 else ","
    return (
        f"attached: of {families.num_groups} groups in {len(families.families)} families "
        f"{sum(aim.limits)} may go{together} with {_percent(1 - least / max(1, aim.dense))} of {dense}; "
        f"{_percent(ratio)} is to go. {plan}"
    )


def planned(config: Config, stage: Stage, each: float, unit: str, total: int) -> str:
    """The stages of a run of known length.

    Args:
        each, unit: optimizer steps in what is counted, and its name; the run has `total` of these.
    """
    if isinstance(config.deadline, int):
        return f"The cut comes at check {config.deadline} at the latest"
    if config.sparsify_from is not None:
        begin = f"from check {config.sparsify_from} on"
    elif config.strength == "auto":
        begin = f"from {unit} {math.ceil(stage.latest_start / each)} on at the latest"
    else:
        begin = "once the choice has settled"
    if stage.deadline is None:
        return f"Groups shrink {begin}, of {total}; there is no deadline for the cut"
    deadline = math.ceil(stage.deadline / each)
    return f"Groups shrink {begin}, and the cut comes by {unit} {deadline} of {total}"


def stays_dense(frozen: Sequence[Frozen]) -> str:
    """How many layers and parameters, by reason; the commonest first."""
    counted = Counter(one.reason for one in frozen).most_common()
    parts = [f"{count} x {reason}" for reason, count in counted[:_REASONS]]
    if len(counted) > _REASONS:
        parts.append(f"{sum(count for _, count in counted[_REASONS:])} x other reasons")
    return f"stays dense: {'; '.join(parts)} (each is named at level DEBUG)"


def unplanned(now: Progress, checks: tuple[int, int] | None) -> str:
    """Of a run whose length nothing tells.

    Args:
        checks: at which it begins to shrink and is cut, at the latest.
    """
    plan = "groups shrink once the choice has settled, and the cut comes some time after that"
    if checks is not None:
        if now.check == now.all_calls():  # one check a call
            begin, end = (f"call {check + now.listened} of step" for check in checks)
        else:
            begin, end = (f"check {check}" for check in checks)
        plan = f"groups shrink from {begin} on, and the cut comes at {end}, at the latest"
    return f"nothing tells how long this run is: {plan}; a run that ends before stays uncut. {WAY_OUT}"


def sparsity_begins(now: Progress, groups: int, of: int, ramp: bool) -> str:
    over = f", over {now.planned} steps as planned" if ramp else ""
    return (
        f"sparsity learning begins at check {now.check} (optimizer step {now.steps}): {groups} of {of} "
        f"groups shrink{over}"
    )


def deadline_came(check: int, residual: float, most: float | None) -> tuple[int, str]:
    """A level, and what the deadline meets: groups that are small, or some that are not."""
    share = f"the groups that go have {residual:.3g} of the mean saliency of those that stay"
    if most is None or residual < most:
        harmless = "any is allowed" if most is None else f"below max_residual={most:g}: it is harmless"
        return logging.INFO, f"the plan's deadline has come at check {check}; {share} ({harmless})"
    return logging.WARNING, (
        f"the plan's deadline has come at check {check} with groups that are not fully shrunk: {share} "
        f"(max_residual={most:g}). Accuracy may dip at the cut and recover in the rest of the run. A "
        "longer run, or a larger span= or nats=, shrinks them further"
    )


def at_cut(
    report: StepReport, ratio: float, aim: Aim, families: Families, mask: Tensor, captured: bool
) -> list[Line]:
    """What has gone, and what a user has to know of it.

    Args:
        mask: [groups] bool, the groups that went.
        captured: whether optimizer steps were captured in a CUDA graph.
    """
    lines = [(logging.INFO, cut_made(report, ratio))]
    more = overshoot(aim, report.cost_at_cut)
    if more > MUCH:
        lines.append((logging.WARNING, too_much(more, coarsest(aim, families))))
    if report.stale:
        lines.append((logging.INFO, stale(report.stale)))
    names = followed_sizes(families, mask)
    if names:
        lines.append((logging.INFO, followed(names)))
    if captured:
        text = "the CUDA graphs captured so far train the model of before the cut: capture again"
        lines.append((logging.WARNING, text))
    return lines


def cut_made(report: StepReport, ratio: float) -> str:
    gone = 1 - report.cost / max(1, report.cost_dense)
    accuracy = "" if report.accuracy is None else f"; the accuracy told last is {report.accuracy:g}"
    dense, left = (quantity(cost, report.unit) for cost in (report.cost_dense, report.cost))
    return (
        f"cut at check {report.check}: {_percent(gone)} of {dense} is gone ({_percent(ratio)} was asked "
        f"for), {left} stay{accuracy}"
    )


def too_much(share: float, coarsest: str) -> str:
    return f"the cut takes {_percent(share)} of the cost more than asked for: {coarsest}"


def stale(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return (
        "attributes that may still say the old width, if other code than the traced forward pass reads "
        f"them: {', '.join(names[:_NAMES])}{more}"
    )


def followed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return (
        "attributes that follow the cut by name and size, though the forward pass did not read them: "
        f"{', '.join(names[:_NAMES])}{more}"
    )


def why_uncut(config: Config, stage: Stage, held: Sequence[Frozen]) -> str:
    """Why a run that ended now would not have been cut.

    Args:
        held: what may not go now, as it is frozen.
    """
    if held:
        names = ", ".join(one.where for one in held[:3])
        return f"{names}{' ...' if len(held) > 3 else ''} were frozen: unfreeze them before the deadline"
    if isinstance(config.deadline, int):
        return f"the deadline was planned at check {config.deadline}"
    if config.deadline is None:
        return "the choice was not stable and small yet, and deadline=None sets no limit"
    if stage.deadline is None:
        return "nothing told the run's length"
    return f"the deadline was planned at optimizer step {stage.deadline}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
