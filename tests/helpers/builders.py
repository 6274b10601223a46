"""Hand-made families, plans and weights for tests of the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ocsfast.core.families import Axis, Families, Family, Lookup, Product
from ocsfast.ops import functions as ops
from ocsfast.ops.bound import Bound
from ocsfast.ops.cost import CostModel, build_cost_model
from ocsfast.ops.functions import Penalty
from ocsfast.ops.plan import Plan
from ocsfast.ops.planning import build_plan


def families(
    sizes: Sequence[int],
    labels: Mapping[str, Mapping[int, Sequence[int] | Tensor]],
    layers: Sequence[int] | None = None,
    macs: Sequence[Product] = (),
) -> Families:
    """Families of the given sizes, with `labels[tensor][axis]` = group of each index."""
    records, first = [], 0
    for f, size in enumerate(sizes):
        names = tuple(f"f{f}.layer{k}" for k in range(layers[f] if layers else 1))
        records.append(Family(f"f{f}", first, size, names))
        first += size
    axes = tuple(
        Axis(name, axis, torch.as_tensor(groups, dtype=torch.int64))
        for name, along in labels.items()
        for axis, groups in along.items()
    )
    return Families(tuple(records), axes, (), tuple(macs), ())


@dataclass(frozen=True, eq=False)
class Case:
    """A plan, the weights it was built for, and the labels it was built from."""

    families: Families
    parameters: dict[str, Tensor]
    plan: Plan

    @property
    def weights(self) -> list[Tensor]:
        return [self.parameters[name] for name in self.plan.names]

    def bound(self, weights: Sequence[Tensor] | None = None) -> Bound:
        """The plan bound to its weights, or to others like them."""
        return Bound(self.plan, self.weights if weights is None else weights)

    def slices(self) -> list[tuple[int, int, int, Tensor]]:
        """(group, position in the plan's names, axis, indices along it), one a slice."""
        found = []
        for axis in self.families.axes:
            if axis.tensor not in self.plan.names:
                continue
            for group in sorted(set(axis.groups[axis.groups >= 0].tolist())):
                indices = torch.nonzero(axis.groups == group).flatten()
                found.append((group, self.plan.names.index(axis.tensor), axis.axis, indices))
        return found


def case(found: Families, parameters: Mapping[str, Tensor]) -> Case:
    return Case(found, dict(parameters), build_plan(found, parameters))


def mixed_case(
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    device: str = "cpu",
    seed: int = 0,
) -> Case:
    """Every kind of coupling at once, with odd sizes.

    Family 0: 13 channels, conv1 -> norm -> conv2's columns -> flatten -> linear's columns (6 of each).
    Family 1: 3 channels of conv2's 25 rows (8 rows each, the last row frozen), conv3's columns.
    Family 2: one group. Family 3: 37 neurons between two linear layers, some frozen; a vector
    alone; the last axis of a position embedding; with family 0 the last two axes of three experts.
    """
    gen = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=gen, dtype=torch.float64).to(device=device, dtype=dtype)
        if channels_last and len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        if channels_last and len(shape) == 5:
            tensor = tensor.contiguous(memory_format=torch.channels_last_3d)
        return tensor

    parameters = {
        "conv1.weight": weight(13, 3, 3, 3),
        "norm.weight": weight(13),
        "conv2.weight": weight(25, 13, 5, 1),
        "linear.weight": weight(10, 78),
        "conv3.weight": weight(1, 25, 2, 3, 2),
        "norm3.weight": weight(1),
        "up.weight": weight(37, 300),
        "down.weight": weight(70, 37),
        "scale.weight": weight(37),
        "big.weight": weight(259, 37, 3, 3),
        "position.weight": weight(1, 5, 37),
        "experts.weight": weight(3, 37, 13),
    }
    first = torch.arange(13)
    second = torch.cat([13 + torch.arange(24) // 8, torch.tensor([-1])])
    fourth = torch.where(torch.arange(37) % 5 == 2, -1, 17 + torch.arange(37))
    labels: dict[str, dict[int, Sequence[int] | Tensor]] = {
        "conv1.weight": {0: first},
        "norm.weight": {0: first},
        "conv2.weight": {0: second, 1: first},
        "linear.weight": {1: first.repeat_interleave(6)},
        "conv3.weight": {0: [16], 1: second},
        "norm3.weight": {0: [16]},
        "up.weight": {0: fourth},
        "down.weight": {1: fourth},
        "scale.weight": {0: fourth},
        "big.weight": {1: fourth},
        "position.weight": {2: fourth},
        "experts.weight": {1: fourth, 2: first},
    }
    return case(families([13, 3, 1, 37], labels, layers=[2, 1, 1, 3]), parameters)


def draw_mask(plan: Plan, share: float, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.rand(plan.count("groups"), generator=gen) < share).to(plan.tables.device)


def with_uncoupled(made: Case) -> Case:
    """With parameters beside those that are coupled: one of several tasks, a scalar, an empty one."""
    like = made.weights[0]
    gen = torch.Generator().manual_seed(9)
    for name, shape in (("head", (3, 70001)), ("bias", (7,)), ("scalar", ()), ("empty", (0, 4))):
        made.parameters[name] = torch.randn(shape, generator=gen).to(like)
    others = ["head", "bias", "scalar", "empty"]
    return Case(
        made.families, made.parameters, build_plan(made.families, made.parameters, others=others)
    )


def draw(made: Case, seed: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.empty_like(w).copy_(torch.randn(w.shape, generator=gen)) for w in made.weights]


def penalty_of(made: Case, share: float | None) -> Penalty | None:
    if share is None:
        return None
    device = made.plan.tables.device
    mask = draw_mask(made.plan, share)
    return Penalty(mask, torch.tensor(0.3, device=device), torch.tensor(0.9, device=device))


def as_double(made: Case) -> Case:
    parameters = {name: tensor.double() for name, tensor in made.parameters.items()}
    return Case(made.families, parameters, build_plan(made.families, parameters, others=made.plan.names))


def scalar(value: float, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=device)


def one_of_each(made: Case, numbers: str | None = None) -> dict[str, Callable[[], list[Tensor]]]:
    """Every op that walks the weights, on its own copies of them; numbers lie where `numbers` says."""
    device = numbers or str(made.plan.tables.device)
    mask, half = draw_mask(made.plan, 0.5), scalar(0.5, device)
    bound = made.bound([w.clone() for w in made.weights])
    gen = torch.Generator().manual_seed(4)
    grads, momenta = (
        [torch.empty_like(w).copy_(torch.randn(w.shape, generator=gen)) for w in made.weights]
        for _ in range(2)
    )
    lr, penalty = scalar(0.1, device, torch.float64), ops.Penalty(mask, half, half)

    def saliency() -> list[Tensor]:
        bound.forget()
        return list(ops.group_saliency(bound))

    def shrink() -> list[Tensor]:
        ops.shrink_(bound, mask, half)
        return list(bound.weights)

    def lasso() -> list[Tensor]:
        bound.forget()
        ops.lasso_grad_(bound, grads, mask, half)
        return grads

    def sgd_step() -> list[Tensor]:
        ops.sgd_step_(bound, grads, momenta, lr, momentum=0.9, penalty=penalty)
        return [*bound.weights, *momenta, *ops.group_saliency(bound)]

    # Copied: what torch's kernels write is none of what a sanitizer sees that looks at ours alone.
    squares = [torch.empty_like(m).copy_(m.cpu().square()) for m in momenta]
    steps = [torch.zeros(()).to(m.device) for m in momenta]

    def adamw_step() -> list[Tensor]:
        ops.adamw_step_(bound, grads, momenta, squares, steps, lr, penalty=penalty)
        return [*bound.weights, *momenta, *squares, *ops.group_saliency(bound)]

    return {
        "group_saliency": saliency,
        "shrink_": shrink,
        "lasso_grad_": lasso,
        "sgd_step_": sgd_step,
        "adamw_step_": adamw_step,
    }


def every_call(made: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """All ops, those that take tables alone too."""
    device = str(made.plan.tables.device)
    plan, cost = chain([300, 70, 5], device)
    scores, most = torch.linspace(1, 0, 375, device=device), torch.tensor([299, 69, 4], device=device)
    budget = torch.tensor(cost([150, 35, 3]), device=device)
    a, b = draw_mask(made.plan, 0.5), draw_mask(made.plan, 0.7, 1)
    compare = comparison(made.plan, a, b, b)
    return {
        **one_of_each(made),
        "partition": lambda: list(ops.partition(plan, cost, scores, most, budget)),
        "compare": lambda: [compare()],
    }


def comparison(
    plan: Plan, mask: Tensor, first: Tensor | None = None, last: Tensor | None = None
) -> Callable[[], Tensor]:
    """A call of `ops.compare`, with sizes, cost and status of no meaning."""
    sizes = torch.linspace(1, 2, len(mask), device=mask.device)
    cost, status = (scalar(7, str(mask.device), dtype) for dtype in (torch.int64, torch.int32))
    return lambda: ops.compare(plan, mask, sizes, cost, status, first, last)


def draw_lookup(
    gen: torch.Generator, rows: Tensor | None, cols: Tensor | None, where: str, most: int = 10**4
) -> Lookup:
    """A lookup with grids over less or more than its labels, and values that rise or stay."""

    def grid(labels: Tensor | None) -> Tensor:
        if labels is None:
            return torch.ones(1, dtype=torch.int64)
        points = int(torch.randint(1, 6, (), generator=gen))
        return torch.unique(torch.randint(1, labels.numel() + 4, (points,), generator=gen))

    sides = [grid(labels) for labels in (rows, cols)]
    share = torch.randint(0, 9, (len(sides[0]), len(sides[1])), generator=gen).double()
    rising = share.cumsum(0).cumsum(1)
    values = (rising / rising.max().clamp(min=1) * most).long()
    table = tuple(map(tuple, values.tolist()))
    return Lookup(rows, cols, tuple(sides[0].tolist()), tuple(sides[1].tolist()), table, where)


def chain(sizes: list[int], device: str = "cpu", *, tables: int | None = None) -> tuple[Plan, CostModel]:
    """Layers one behind the other: each family is the columns of one and the rows of the next.

    tables: every other layer costs what a table says, drawn by this seed.
    """
    first, groups = 0, []
    for size in sizes:
        groups.append(torch.arange(first, first + size))
        first += size
    summands: list[Product | Lookup] = [
        Product(9 + k, rows, cols, f"layer{k}")
        for k, (cols, rows) in enumerate(zip([None, *groups], [*groups, None], strict=True))
    ]
    if tables is not None:
        gen = torch.Generator().manual_seed(tables)
        for k in range(0, len(summands), 2):
            summands[k] = draw_lookup(gen, summands[k].rows, summands[k].cols, f"layer{k}")
    labels = {f"w{k}": {0: rows} for k, rows in enumerate(groups)}
    found = families(sizes, labels)
    parameters = {f"w{k}": torch.zeros(len(rows), device=device) for k, rows in enumerate(groups)}
    model = build_cost_model(found, summands, "MACs")
    return build_plan(found, parameters), model.to(torch.device(device))
