"""The targets: what a ratio can be a share of, as summands of a cost; and the record of a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ocsfast.core.config import LATENCY, TARGETS, UNITS
from ocsfast.core.errors import ConfigError
from ocsfast.core.families import Families, Lookup, Product
from ocsfast.core.latency import LatencyRecord
from ocsfast.cut.record import Record, target_in
from ocsfast.latency.summands import is_of_dense, latency_summands
from ocsfast.ops.cost import build_cost_model

# A weighted sum's integers: fine enough for a parameter of a model with 10**12 of them.
_WEIGHTED_TOTAL = 2**50


def target_products(
    target: str | Mapping[str, float] | LatencyRecord,
    families: Families,
    parameters: Mapping[str, Tensor],
) -> tuple[tuple[Product | Lookup, ...], str]:
    """The summands of a target's cost, and its unit.

    "flops": MACs; "params": parameters; "bytes": their bytes, each in its dtype. A mapping of these to
    weights: the weighted mean of their shares of the dense model, in units of 2**-50. A latency table:
    nanoseconds.

    Raises:
        ConfigError: the table is of another model, or "latency" was not measured yet.
    """
    if isinstance(target, LatencyRecord):
        return latency_summands(target, families), UNITS[LATENCY]
    if target == LATENCY:
        raise ConfigError(
            "target='latency' is measured by ocsfast.attach, step and inspect: here, pass "
            "target=ocsfast.LatencyTable.measure(model, example_inputs)"
        )
    if isinstance(target, str):
        return _counted(target, families, parameters)
    sizes = families.sizes
    summands: list[Product] = []
    for name, weight in target.items():
        products, unit = _counted(name, families, parameters)
        dense = build_cost_model(families, products, unit)(sizes)
        scale = round(_WEIGHTED_TOTAL * weight / sum(target.values()) / max(1, dense))
        summands += [replace(p, coefficient=p.coefficient * scale) for p in products]
    return tuple(summands), "weighted units"


def _counted(
    target: str, families: Families, parameters: Mapping[str, Tensor]
) -> tuple[tuple[Product, ...], str]:
    """The summands and the unit of one of TARGETS."""
    if target == "flops":
        return families.macs, UNITS[target]
    products = parameter_products(families, parameters)
    if target == "bytes":
        products = tuple(
            replace(p, coefficient=p.coefficient * parameters[p.where].element_size()) for p in products
        )
    return products, UNITS[target]


def parameter_products(families: Families, parameters: Mapping[str, Tensor]) -> tuple[Product, ...]:
    """The number of parameters as products, one a tensor; tied tensors are listed once by their name."""
    labels: dict[str, dict[int, Tensor]] = {}
    for axis in families.axes:
        labels.setdefault(axis.tensor, {})[axis.axis] = axis.groups
    products = []
    for name, tensor in parameters.items():
        along = labels.get(name, {})
        coefficient = tensor.numel()
        for groups in along.values():
            coefficient //= max(1, groups.numel())
        rows, cols = (*along.values(), None, None)[:2]
        products.append(Product(coefficient, rows, cols, name))
    return tuple(products)


def dense_cost(record: Record | None, target: object, now: int, families: Families) -> int:
    """What the dense model cost of which a cut one costs `now`: MACs scale with the size of the input.

    Without a record, the model is the dense one. So is the one that a latency table was measured on, if
    that was before the cut.

    Raises:
        ConfigError: the latency of a cut model was measured, and nothing tells that of the dense one;
            or the model is narrower than the one that was measured, but was not cut.
    """
    if record is None:
        if isinstance(target, LatencyRecord) and is_of_dense(target, families):
            raise ConfigError(
                "target= is a latency table of another model: it is wider than this one, which was not "
                "cut by ocsfast"
            )
        return now
    name = target_in(record, target)
    if isinstance(target, LatencyRecord):
        if is_of_dense(target, families):
            return target.dense
        if name != LATENCY:
            raise ConfigError(
                "ratio= is of the dense model, and how long that took is not known, as the model was "
                "cut by another target: pass target= a LatencyTable that was measured before"
            )
    return now * int(record["dense"][name]) // max(1, int(record["left"][name]))


_WIDTHS = 32  # of a record: enough to know a model by


def make_record(
    families: Families,
    pruned: Tensor,
    parameters: Mapping[str, Tensor],
    before: Record | None,
    latency: tuple[int, int] | None = None,
) -> Record:
    """The record of a cut that is about to be made.

    Args:
        families, parameters: of the model before it.
        pruned: [num_groups] bool.
        before: the record of an earlier cut of the same model: dense is what was dense then.
        latency: nanoseconds of the dense model and of this cut, where it is for that.
    """
    cut = families.cropped(pruned.cpu())
    sizes = families.sizes
    dense, left = {}, {}
    for target in TARGETS:
        cost = build_cost_model(families, *target_products(target, families, parameters))
        dense[target] = dense_cost(before, target, cost(sizes), families)
        left[target] = cost(cut.sizes)
    if latency is not None:
        dense[LATENCY], left[LATENCY] = latency
    kept = [[f.name, n, f.size] for f, n in zip(families.families, cut.sizes, strict=True)]
    widths = [
        [now.tensor, now.axis, now.groups.numel()]
        for dense_axis, now in zip(families.axes, cut.axes, strict=True)
        if now.groups.numel() != dense_axis.groups.numel() and now.tensor in parameters
    ]
    return {"dense": dense, "left": left, "kept": kept, "widths": widths[:_WIDTHS]}
