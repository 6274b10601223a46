"""A check (saliency, partition, similarity), and the partition alone, up to half a million groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import aim_of, case, compared
from peers import TorchPruning

from ocsfast import Config
from ocsfast.choice.selection import choose
from ocsfast.core.families import Families, Family, Lookup, Product
from ocsfast.grouping.engines import group
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model
from ocsfast.ops.planning import build_plan


@pytest.mark.parametrize("by", ["ocsfast", "deep copies"])
def bench_check(by: str, name: str, device: str, measure: Any) -> None:
    """All that a check measures, beside the bisection of the published method, which prunes and counts
    copies of the model."""
    made = case(name, device)
    if by == "ocsfast":
        aim, config = aim_of(made), Config()
        before = [made.half] * config.lag

        def check() -> None:
            choose(aim, made.bound, before=before, lag=config.lag)

        moved = made.size * made.flat.numel()
        measure("check", by, check, moved=moved, roof=lambda: torch.sum(made.flat), waits=True)
    elif name in ("ResNet56", "ResNet50") and device == "cpu":
        measure("check", by, TorchPruning(made).bisection, slow=True)
    else:
        pytest.skip("no model of that kind, or not on the CPU")


def bench_compare(name: str, device: str, measure: Any) -> None:
    made = case(name, device)
    measure("compare", "ocsfast", compared(made))


def bench_partition(name: str, device: str, measure: Any) -> None:
    made = case(name, device)
    scores, _ = ops.group_saliency(made.bound)
    measure(
        "partition",
        "ocsfast",
        lambda: ops.partition(made.plan, made.cost_model, scores, made.limits, made.budget),
    )


def bench_partition_of_tables(name: str, device: str, measure: Any) -> None:
    """The same where each layer's cost is read from a table of five counts by five."""
    if name != "ResNet50":
        pytest.skip("once is enough")
    made = case(name, device)
    tables = [tabled(product) for product in made.families.macs]
    cost_model = build_cost_model(made.families, tables, "ns")
    scores, _ = ops.group_saliency(made.bound)
    budget = torch.tensor(cost_model(made.families.sizes) // 2, device=device)
    on_device = cost_model.to(torch.device(device))
    measure(
        f"partition by {len(tables)} tables",
        "ocsfast",
        lambda: ops.partition(made.plan, on_device, scores, made.limits, budget),
    )


def tabled(product: Product) -> Lookup:
    """What a layer may take: by its MACs, and some of it whatever its size."""
    grids = [
        (1,) if labels is None else tuple(sorted({max(1, labels.numel() * k // 5) for k in range(1, 6)}))
        for labels in (product.rows, product.cols)
    ]
    values = tuple(
        tuple(10_000 + product.coefficient * rows * cols // 100 for cols in grids[1])
        for rows in grids[0]
    )
    return Lookup(product.rows, product.cols, *grids, values, product.where)


def bench_partition_of_many(name: str, device: str, measure: Any) -> None:
    """Neurons and heads of a language model of 7 B parameters: half a million groups, 96 families."""
    if name != "Llama 1.1B":
        pytest.skip("once is enough")
    sizes = [11008, 4608] * 32
    families, axes, first = [], [], 0
    for k, size in enumerate(sizes):
        families.append(Family(str(k), first, size, (str(k),)))
        axes.append(torch.arange(first, first + size))
        first += size
    products = tuple(Product(4096, a, None, str(k)) for k, a in enumerate(axes))
    made = Families(tuple(families), (), (), products, ())
    plan, cost_model = build_plan(made, {}), build_cost_model(made, products, "parameters")
    scores = torch.rand(first, generator=torch.Generator().manual_seed(0)).to(device)
    plan = type(plan)(plan.names, plan.tables.to(device), plan.shapes, plan.layout)
    limits = (torch.tensor(sizes) * 3 // 4).to(device)
    budget = torch.tensor(cost_model(torch.tensor(sizes)) // 2, device=device)
    on_device = cost_model.to(torch.device(device))
    measure(
        f"partition of {first} groups",
        "ocsfast",
        lambda: ops.partition(plan, on_device, scores, limits, budget),
    )


@pytest.mark.parametrize("op", ["shrink_, none", "lasso_grad_, none"])
def bench_host(op: str, name: str, device: str, measure: Any) -> None:
    """What a call costs the host: nothing is marked."""
    made = case(name, device)
    none, one = ~made.every, torch.tensor(1.0, device=device)
    ops.group_saliency(made.bound)
    calls = {
        "shrink_, none": lambda: ops.shrink_(made.bound, none, one),
        "lasso_grad_, none": lambda: ops.lasso_grad_(made.bound, made.grads, none, one),
    }
    measure(op, "ocsfast", calls[op])


@pytest.mark.parametrize("verify", [False, True], ids=["alone", "with proof"])
def bench_grouping(verify: bool, name: str, device: str, measure: Any) -> None:
    """Once in a run: export, labels and families, and their proof."""
    made = case(name, device)
    if made.model is None:
        pytest.skip("shapes only")
    op = "grouping with its proof" if verify else "grouping"
    measure(op, "ocsfast", lambda: group(made.model, (made.example,), verify=verify), slow=True)
