"""A dry run: what would be pruned, what stays dense and why, and how far one can go."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ocsfast.api.arguments import Inputs, families_of, options_of, plain, require_whole, unpacked
from ocsfast.choice.selection import Aim, Choice, choose, group_shares, make_aim, overshoot, quantity
from ocsfast.core.config import Config, checked_ratio
from ocsfast.core.families import Frozen
from ocsfast.cut.record import record_of
from ocsfast.grouping.graph.sizes import Sizes
from ocsfast.grouping.proof.trials import CUT_FAILS
from ocsfast.ops.cost import CostModel, build_cost_model, parameter_products
from ocsfast.ops.functions import Bound
from ocsfast.ops.plan import build_plan


@dataclass(frozen=True)
class FamilyFacts:
    """One family of a model."""

    name: str
    kind: str  # of `families.KINDS`
    layers: tuple[str, ...]  # every layer whose output channels these are
    groups: int
    macs: float  # share of the model's MACs that would go with all of its groups, 0 to 1
    parameters: float  # the same of its parameters
    kept: int | None  # groups that stay at the ratio asked for, by the weights as they are
    step: float = 0.0  # share of the target's cost that one of its groups takes, 0 to 1


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `str()` of it is a table."""

    families: tuple[FamilyFacts, ...]
    frozen: tuple[Frozen, ...]  # what stays dense, by which operator at which source line
    prunable: float  # share of the parameters that lie on at least one axis that may shrink
    macs: int  # of one sample's forward pass
    parameters: int
    largest_ratio: float  # the most that can go of the target
    ratio: float | None  # as asked for
    macs_left: int | None  # at that ratio
    parameters_left: int | None
    grouping_seconds: float  # what attaching takes, the proof included
    check_seconds: float  # what one check takes: saliency and partition
    gone: float = 0.0  # the share of the target that an earlier cut took: ratios are of the dense model
    notes: tuple[str, ...] = ()  # what to know of how these were found
    overshoot: float | None = None  # share of the target's cost that goes beyond the ratio asked for
    graph_may: bool = False  # whether the model's own code holds what its graph may lose

    def __str__(self) -> str:
        return _table(self)


def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    ratio: float | None = None,
    *,
    config: Config | None = None,
    **config_fields: Any,
) -> Inspection:
    """Say what pruning would do to a model, and change nothing.

    Args:
        model: as for `ocsfast.step`.
        example_inputs: one batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ratio: the share of the target to remove, to see the result that the weights of now give.
        config, **config_fields: as for `ocsfast.step`.

    Raises:
        ConfigError: a bad option. A ratio that cannot be reached is none: `largest_ratio` says so.
        GroupingError: no engine can trace the model; both say why.
    """
    model, options = plain(model), options_of(config, config_fields)
    require_whole(model)
    if ratio is not None:
        checked_ratio(ratio)
    begun = time.perf_counter()
    families = families_of(model, unpacked(example_inputs), options)
    grouping_seconds = time.perf_counter() - begun

    parameters = dict(model.named_parameters())
    sizes = [family.size for family in families.families]
    macs = build_cost_model(families, families.macs, "MACs")
    held = build_cost_model(families, parameter_products(families, parameters), "parameters")
    record = record_of(model)
    aim = make_aim(families, parameters, options, 0.5 if ratio is None else ratio, record)
    largest, kept, check_seconds = 0.0, None, 0.0
    if families.families:
        plan = build_plan(families, parameters, include_bias=options.include_bias)
        bound = Bound(plan, [parameters[name] for name in plan.names])
        most = _choice(replace(aim, budget=0), bound, options, model)
        largest = 1 - most.cost / max(1, aim.dense)
        begun = time.perf_counter()
        choice = _choice(aim, bound, options, model)
        check_seconds = time.perf_counter() - begun
        kept = choice.kept if ratio is not None and choice.cost <= aim.budget else None

    def share(cost: CostModel, f: int) -> float:
        without = cost([0 if k == f else size for k, size in enumerate(sizes)])
        return 1 - without / max(1, cost(sizes))

    labelled = {axis.tensor for axis in families.axes}
    steps = group_shares(aim, families)
    return Inspection(
        families=tuple(
            FamilyFacts(
                family.name,
                family.kind,
                family.layers,
                family.size,
                share(macs, f),
                share(held, f),
                None if kept is None else kept[f],
                steps[f],
            )
            for f, family in enumerate(families.families)
        ),
        frozen=families.frozen,
        prunable=sum(p.numel() for name, p in parameters.items() if name in labelled)
        / max(1, sum(p.numel() for p in parameters.values())),
        macs=macs(sizes),
        parameters=held(sizes),
        largest_ratio=largest,
        ratio=ratio,
        macs_left=None if kept is None else macs(kept),
        parameters_left=None if kept is None else held(kept),
        grouping_seconds=grouping_seconds,
        check_seconds=check_seconds,
        gone=1 - aim.now / aim.dense if aim.dense else 0.0,
        notes=families.notes,
        overshoot=None if kept is None else overshoot(aim, choice.cost),
        graph_may=any(frozen.reason.startswith(CUT_FAILS) for frozen in families.frozen)
        and not any(isinstance(module, Sizes) for module in model.modules()),
    )


def _choice(aim: Aim, bound: Bound, config: Config, model: nn.Module) -> Choice:
    """What a check would choose by the weights' norms; another criterion may need a training run."""
    return choose(aim, bound, "l2", config, torch.optim.SGD(model.parameters(), lr=0.0))


def _table(found: Inspection) -> str:
    rows = [("family", "kind", "groups", "kept", "a group", "MACs", "params", "layers")]
    for f in found.families:
        more = f" + {len(f.layers) - 1} more" if len(f.layers) > 1 else ""
        rows.append(
            (
                f.name,
                f.kind,
                str(f.groups),
                "" if f.kept is None else str(f.kept),
                f"{100 * f.step:.2g} %",
                f"{100 * f.macs:.1f} %",
                f"{100 * f.parameters:.1f} %",
                f"{f.layers[0]}{more}",
            )
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    if found.frozen:
        lines += ["", "dense:"]
        lines += [f"  {frozen.where}: {frozen.reason}" for frozen in found.frozen]
    if found.graph_may:
        lines.append("what fails when cut is held by the model's code: try ocsfast.as_graph(model, x)")
    lines += [f"note: {note}" for note in found.notes]
    lines += [
        "",
        f"{quantity(found.macs)}MACs, {quantity(found.parameters)}parameters, "
        f"{100 * found.prunable:.1f} % of them in tensors that can shrink",
        f"largest ratio: {found.largest_ratio:.3f}",
    ]
    if found.gone > 0:
        lines.append(f"cut before: {found.gone:.3f} of the dense model is gone, and ratios are of that")
    if found.ratio is not None and found.macs_left is None:
        lines.append(f"ratio {found.ratio:g} cannot be reached")
    elif found.macs_left is not None and found.parameters_left is not None:
        lines.append(
            f"at ratio {found.ratio:g}: {quantity(found.macs_left)}MACs, "
            f"{quantity(found.parameters_left)}parameters"
            + (f"; {100 * found.overshoot:.1f} % more goes than asked for" if found.overshoot else "")
        )
    check = f"a check {1000 * found.check_seconds:.1f} ms"
    lines.append(f"grouping takes {found.grouping_seconds:.1f} s, once; {check}")
    return "\n".join(lines)
