"""A dry run: what would be pruned, what stays dense and why, and how far one can go."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ocsfast.api.arguments import Inputs, families_of, plain, require_whole, unpacked
from ocsfast.api.calls import Call
from ocsfast.api.latency import with_latency
from ocsfast.choice.budget import (
    Aim,
    group_shares,
    make_aim,
    overshoot,
    quantity,
    with_multiple,
)
from ocsfast.choice.selection import choose, with_fitting_multiple
from ocsfast.choice.targets import parameter_products
from ocsfast.core.config import LATENCY, UNITS, Config
from ocsfast.core.families import Families, Frozen
from ocsfast.core.latency import LatencyRecord
from ocsfast.cut.record import record_of
from ocsfast.grouping.graph.sizes import Sizes
from ocsfast.grouping.proof.trials import CUT_FAILS
from ocsfast.ops.bound import Bound
from ocsfast.ops.cost import CostModel, build_cost_model
from ocsfast.ops.planning import build_plan


@dataclass(frozen=True)
class FamilyFacts:
    """One family of a model.

    Attributes:
        name: Of its first layer.
        kind: "head", "head_dim", "width", "channel" or "neuron".
        layers: Every layer whose output channels these are.
        groups: How many there are.
        macs: The share of the model's MACs that would go with all of its groups, 0 to 1.
        parameters: The same of its parameters.
        kept: Groups that stay at the ratio asked for, by the weights as they are; None if none was asked
            for, or it cannot be reached.
        step: The share of the target's dense cost that one of its groups takes, 0 to 1.
        latency: Nanoseconds that would go with all of its groups; None if the target is another.

    Examples:
        >>> FamilyFacts("conv1", "channel", ("conv1",), 16, 0.5, 0.4, None).groups
        16
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    groups: int
    macs: float
    parameters: float
    kept: int | None
    step: float = 0.0
    latency: int | None = None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `str()` of it is a table.

    Attributes:
        families: One entry for each.
        frozen: What stays dense, by which operator at which source line.
        prunable: The share of the parameters that lie on at least one axis that may shrink.
        macs: Of one sample's forward pass, or of the whole example's where `notes` says so.
        parameters: Of the model.
        largest_ratio: The most that can go of the target.
        ratio: As asked for.
        macs_left: At that ratio; None if none was asked for, or it cannot be reached.
        parameters_left: The same.
        grouping_seconds: What attaching takes, the proof included.
        check_seconds: What one check takes: saliency and partition.
        gone: The share of the target that an earlier cut took. Ratios are of the dense model.
        notes: What to know of how these were found.
        overshoot: The share of the target's dense cost that goes beyond the ratio asked for.
        graph_may: Whether `ocsfast.as_graph` may free what the model's own code holds.
        latency: Nanoseconds of a batch; None if the target is another.
        latency_left: The same at that ratio; None if it cannot be reached, too.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> found = ocsfast.inspect(model, torch.randn(4, 8), ratio=0.5)
        >>> found.macs, found.macs_left, found.families[0].kept
        (160, 80, 8)
    """

    families: tuple[FamilyFacts, ...]
    frozen: tuple[Frozen, ...]
    prunable: float
    macs: int
    parameters: int
    largest_ratio: float
    ratio: float | None
    macs_left: int | None
    parameters_left: int | None
    grouping_seconds: float
    check_seconds: float
    gone: float = 0.0
    notes: tuple[str, ...] = ()
    overshoot: float | None = None
    graph_may: bool = False
    latency: int | None = None
    latency_left: int | None = None

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
        model: a module, also compiled, in DataParallel or in DistributedDataParallel.
        example_inputs: one batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        ratio: the share of the target to remove, to see the result that the weights of now give. An
            unreachable ratio does not raise; see `largest_ratio`.
        config: options as one object.
        **config_fields: fields of `Config`; they override `config`.

    Returns:
        What was found; print it.

    Raises:
        ConfigError: a bad option.
        GroupingError: no engine can trace the model; both say why.
        StateError: the model is sharded.

    Examples:
        >>> import ocsfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> ocsfast.inspect(model, torch.randn(4, 8)).largest_ratio
        0.75
    """
    model, call = plain(model), Call(0.5 if ratio is None else ratio, config, config_fields)
    options = call.options
    require_whole(model)
    begun = time.perf_counter()
    inputs = unpacked(example_inputs)
    families = families_of(model, inputs, options)
    grouping_seconds = time.perf_counter() - begun
    options = with_latency(model, inputs, families, options)

    parameters = dict(model.named_parameters())
    sizes = families.sizes
    macs = build_cost_model(families, families.macs, "MACs")
    held = build_cost_model(families, parameter_products(families, parameters), "parameters")
    aim = make_aim(families, parameters, options, call.ratio, record_of(model))
    dry = _DryRun(families, parameters, options, aim)
    kept = dry.kept if ratio is not None else None
    timed = isinstance(options.target, LatencyRecord)
    labelled = {axis.tensor for axis in families.axes}
    own_code = any(frozen.reason.startswith(CUT_FAILS) for frozen in families.frozen)
    return Inspection(
        families=_facts(families, macs, held, kept, aim, timed),
        frozen=families.frozen,
        prunable=sum(p.numel() for name, p in parameters.items() if name in labelled)
        / max(1, sum(p.numel() for p in parameters.values())),
        macs=macs(sizes),
        parameters=held(sizes),
        largest_ratio=dry.largest,
        ratio=ratio,
        macs_left=None if kept is None else macs(kept),
        parameters_left=None if kept is None else held(kept),
        grouping_seconds=grouping_seconds,
        check_seconds=dry.check_seconds,
        gone=1 - aim.now / aim.dense if aim.dense else 0.0,
        notes=families.notes,
        overshoot=None if kept is None else overshoot(aim, dry.cost),
        graph_may=own_code and not any(isinstance(module, Sizes) for module in model.modules()),
        latency=aim.now if timed else None,
        latency_left=dry.cost if timed and kept is not None else None,
    )


class _DryRun:
    """What checks by the weights' norms would choose; another criterion may need a training run."""

    def __init__(
        self, families: Families, parameters: Mapping[str, nn.Parameter], options: Config, aim: Aim
    ) -> None:
        self.largest, self.check_seconds, self.cost = 0.0, 0.0, aim.now
        self.kept: tuple[int, ...] | None = None  # None: the budget cannot be reached
        if not families.families:
            return
        plan = build_plan(families, parameters, include_bias=options.include_bias)
        bound = Bound(plan, [parameters[name] for name in plan.names])
        finest = aim
        if options.round_to == "auto":  # a ratio that needs it has the finest
            finest = with_multiple(aim, families, parameters, "auto", 1)
            aim = with_fitting_multiple(aim, families, parameters, bound)
        most = choose(replace(finest, budget=0), bound)
        self.largest = 1 - most.cost / max(1, aim.dense)
        begun = time.perf_counter()
        choice = choose(aim, bound)
        self.check_seconds = time.perf_counter() - begun
        self.cost = choice.cost
        self.kept = choice.kept if choice.cost <= aim.budget else None


def _facts(
    families: Families,
    macs: CostModel,
    held: CostModel,
    kept: Sequence[int] | None,
    aim: Aim,
    timed: bool,
) -> tuple[FamilyFacts, ...]:
    sizes = families.sizes

    def goes(cost: CostModel, f: int) -> int:
        return cost(sizes) - cost([0 if k == f else size for k, size in enumerate(sizes)])

    def share(cost: CostModel, f: int) -> float:
        return goes(cost, f) / max(1, cost(sizes))

    steps = group_shares(aim, families)
    return tuple(
        FamilyFacts(
            family.name,
            family.kind,
            family.layers,
            family.size,
            share(macs, f),
            share(held, f),
            None if kept is None else kept[f],
            steps[f],
            goes(aim.cost_model, f) if timed else None,
        )
        for f, family in enumerate(families.families)
    )


def _table(found: Inspection) -> str:
    timed = found.latency is not None
    head = ("family", "kind", "groups", "kept", "a group", "MACs", "params")
    rows = [(*head, *(("ms",) if timed else ()), "layers")]
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
                *(() if f.latency is None else (f"{f.latency / 1e6:.3g}",)),
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
        *([] if found.latency is None else [f"{quantity(found.latency, UNITS[LATENCY])} a batch"]),
        f"{quantity(found.macs, 'MACs')}, {quantity(found.parameters, 'parameters')}, "
        f"{100 * found.prunable:.1f} % of them in tensors that can shrink",
        f"largest ratio: {found.largest_ratio:.3f}",
    ]
    if found.gone > 0:
        lines.append(f"cut before: {found.gone:.3f} of the dense model is gone, and ratios are of that")
    if found.ratio is not None and found.macs_left is None:
        lines.append(f"ratio {found.ratio:g} cannot be reached")
    elif found.macs_left is not None and found.parameters_left is not None:
        lines.append(
            f"at ratio {found.ratio:g}: "
            + ("" if found.latency_left is None else f"{quantity(found.latency_left, UNITS[LATENCY])}, ")
            + f"{quantity(found.macs_left, 'MACs')}, {quantity(found.parameters_left, 'parameters')}"
            + (f"; {100 * found.overshoot:.1f} % more goes than asked for" if found.overshoot else "")
        )
    check = f"a check {1000 * found.check_seconds:.1f} ms"
    lines.append(f"grouping takes {found.grouping_seconds:.1f} s, once; {check}")
    return "\n".join(lines)
