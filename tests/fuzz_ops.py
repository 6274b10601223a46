"""Random plans, weights and arguments through every op, right ones and spoilt ones: `make sanitize`.

Run with an extension built with AddressSanitizer and UBSan: a wrong access ends the process. Right
arguments must give what the plain-torch twins give; spoilt ones must be refused or be harmless.

    python tests/fuzz_ops.py --seconds 60 [--seed 0] [--right]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from helpers.builders import draw_lookup
from torch import Tensor

import ocsfast
from ocsfast.core.criteria import CRITERIA
from ocsfast.core.families import Axis, Families, Family, Product
from ocsfast.ops import extension, reference
from ocsfast.ops import functions as ops
from ocsfast.ops.cost import build_cost_model
from ocsfast.ops.plan import Plan
from ocsfast.ops.planning import build_plan

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = (0, 1, 2, 3, 5, 15, 16, 17, 31, 33, 64, 65, 129, 300, 1500)
REFUSALS = (RuntimeError, ValueError, NotImplementedError, IndexError, TypeError, OverflowError)


def draw_families(pick: random.Random) -> tuple[Families, dict[str, Tensor], list[str]]:
    """Some families, and tensors whose rows and columns they label, or nobody does."""
    families, first = [], 0
    for f in range(pick.randint(1, 4)):
        size = pick.choice([1, 2, 7, 13, 40])
        families.append(Family(f"f{f}", first, size, (f"f{f}",)))
        first += size
    parameters, axes = {}, []

    def labels(extent: int) -> Tensor:
        family = pick.choice(families)
        index = torch.arange(extent)
        label = family.first + index // max(1, -(-extent // family.size)) % family.size
        if pick.random() < 0.3:
            label = torch.where(torch.rand(extent) < 0.2, -1, label)
        return label

    for t in range(pick.randint(0, 8)):
        dims = pick.randint(0, 5)
        shape = [pick.choice(SIZES) if d < 2 else pick.choice([1, 1, 2, 3]) for d in range(dims)]
        while torch.Size(shape).numel() > 500_000:
            shape[pick.randrange(2)] //= 2
        tensor = torch.randn(shape).to(pick.choice(DTYPES))
        if dims in (4, 5) and pick.random() < 0.5:
            last = torch.channels_last if dims == 4 else torch.channels_last_3d
            tensor = tensor.contiguous(memory_format=last)
        name = f"w{t}"
        parameters[name] = tensor
        plain = dims > 2 and tensor.is_contiguous() and pick.random() < 0.3
        for axis in sorted(pick.sample(range(dims), 2)) if plain else range(min(dims, 2)):
            if pick.random() < 0.7:
                axes.append(Axis(name, axis, labels(shape[axis])))
    named = Families(tuple(families), tuple(axes), (), (), ())
    others = [name for name in parameters if pick.random() < 0.8]
    return named, parameters, others


def close(ours: Tensor, theirs: Tensor, what: str, least: float = 1e-3) -> None:
    """Raise unless both are equal to rounding. least: of what was added up, where it may cancel."""
    if not ours.numel():
        return
    scale = float(theirs.double().abs().max()) + least
    error = float((ours.double() - theirs.double()).abs().max())
    # Sums of float32 weights are good to float32, whatever they are stored in.
    tolerance = 64 * max(torch.finfo(ours.dtype).eps, 1e-6) * scale
    assert error <= tolerance, (what, error, scale)


def draw_scaling(pick: random.Random) -> dict[str, Tensor | None]:
    """What a gradient scaler says to an optimizer's step, if there is one."""
    if pick.random() < 0.7:
        return {}
    return {
        "grad_scale": torch.tensor(pick.choice([0.5, 1024.0])),
        "found_inf": torch.tensor(float(pick.random() < 0.3)),
    }


def adamw_step(
    pick: random.Random,
    ours: ops.Bound,
    theirs: ops.Bound,
    grads: list[Tensor | None],
    penalty: ops.Penalty | None,
) -> None:
    averages = [None if g is None else torch.randn_like(g) for g in grads]
    squares = [None if g is None else torch.randn_like(g).square_().add_(0.1) for g in grads]
    copies = [[None if t is None else t.clone() for t in tensors] for tensors in (averages, squares)]
    steps = [torch.tensor(float(pick.choice([0, 1, 999, 10**6]))) for _ in grads]
    counts = [count.clone() for count in steps]
    lr = torch.tensor(0.1, dtype=torch.float64)
    options = {
        "betas": (pick.choice([0.0, 0.9]), pick.choice([0.5, 0.999])),
        "eps": pick.choice([0.0, 1e-8, 0.1]),
        "weight_decay": pick.choice([0.0, 0.1]),
        "maximize": pick.random() < 0.2,
        "penalty": penalty,
        **draw_scaling(pick),
    }
    ops.adamw_step_(ours, grads, averages, squares, steps, lr, **options)
    reference.adamw_step_(theirs, grads, *copies, counts, lr, **options)
    got, expected = [*ours.weights, *averages, *squares], [*theirs.weights, *copies[0], *copies[1]]
    for a, b in zip(got, expected, strict=True):
        if a is not None and b is not None:
            close(a, b, "adamw_step_", 1.0)


def beside(pick: random.Random, weights: list[Tensor]) -> list[Tensor | None]:
    """A tensor like each weight, but for a few."""
    return [None if pick.random() < 0.2 else torch.randn_like(w) for w in weights]


def sgd_step(
    pick: random.Random,
    ours: ops.Bound,
    theirs: ops.Bound,
    grads: list[Tensor | None],
    penalty: ops.Penalty | None,
) -> None:
    momentum = pick.choice([0.0, 0.9])
    momenta = [None if g is None or momentum == 0 else torch.randn_like(g) for g in grads]
    copies = [None if m is None else m.clone() for m in momenta]
    options = {
        "first": [t for t in range(len(grads)) if pick.random() < 0.2],
        "momentum": momentum,
        "dampening": pick.choice([0.0, 0.5]),
        "weight_decay": pick.choice([0.0, 0.1]),
        "nesterov": pick.random() < 0.5,
        "maximize": pick.random() < 0.2,
        "penalty": penalty,
        **draw_scaling(pick),
    }
    lr = torch.tensor(0.1, dtype=torch.float64)
    ops.sgd_step_(ours, grads, momenta, lr, **options)
    reference.sgd_step_(theirs, grads, copies, lr, **options)
    for a, b in zip([*ours.weights, *momenta], [*theirs.weights, *copies], strict=True):
        if a is not None and b is not None:
            close(a, b, "sgd_step_", 1.0)


def right_choice(pick: random.Random, families: Families, plan: Plan, mask: Tensor) -> None:
    """A partition to some budget, and how far it is from another mask."""
    scores = torch.rand(len(mask), dtype=pick.choice([torch.float32, torch.float64]))
    sizes = [f.size for f in families.families]
    gen, summands = torch.Generator().manual_seed(pick.randrange(2**31)), []
    for f in families.families:
        rows = torch.arange(f.first, f.first + f.size)
        if pick.random() < 0.3:
            summands.append(draw_lookup(gen, rows, pick.choice([None, rows]), f.name))
        else:
            summands.append(Product(pick.randint(1, 9), rows, None, f.name))
    model = build_cost_model(families, summands, "units")
    limits = torch.tensor([pick.randint(-1, s + 1) for s in sizes])
    budget = torch.tensor(pick.randint(-1, model(sizes) + 1))
    ties = [sizes.index(size) if pick.random() < 0.5 else f for f, size in enumerate(sizes)]
    ties = torch.tensor([first if ties[first] == first else f for f, first in enumerate(ties)])
    units = pick.choice([None, torch.tensor([pick.randint(-1, 5) for _ in sizes])[ties]])
    options = (units, pick.choice([None, ties]), pick.random() < 0.7)
    arguments = (plan, model, scores, limits[ties], budget, *options)
    got = ops.partition(*arguments)
    for a, b in zip(got, reference.partition(*arguments), strict=True):
        assert torch.equal(a, b), "partition"
    earlier = [pick.choice([None, mask]) for _ in range(2)]
    facts = (plan, got[0], scores, *got[1:], *earlier)
    close(ops.compare(*facts), reference.compare(*facts), "compare")


def right_arguments(pick: random.Random) -> None:
    families, parameters, others = draw_families(pick)
    plan = build_plan(families, parameters, others=others)
    weights = [parameters[name] for name in plan.names]
    mask = torch.rand(plan.count("groups")) < pick.choice([0.0, 0.3, 1.0])
    factor, lam = torch.tensor(pick.random()), torch.tensor(pick.random())
    torch.set_num_threads(pick.choice([1, 2, 3]))
    ours, theirs = (ops.Bound(plan, [w.clone() for w in weights]) for _ in range(2))
    criterion = pick.choice([*CRITERIA])
    extra = () if not CRITERIA[criterion].x else beside(pick, weights)
    for a, b in zip(
        ops.group_saliency(ours, criterion, extra),
        reference.group_saliency(theirs, criterion, extra),
        strict=True,
    ):
        if criterion not in ("taylor", "taylor_state", "obd_state"):  # these sums cancel
            close(a, b, criterion)
    for _ in range(2):
        ops.shrink_(ours, mask, factor)
        reference.shrink_(theirs, mask, factor)
        grads = beside(pick, weights)
        copies = [None if g is None else g.clone() for g in grads]
        ops.lasso_grad_(ours, grads, mask, lam)
        reference.lasso_grad_(theirs, copies, mask, lam)
        for a, b in zip(grads, copies, strict=True):
            if a is not None and b is not None:
                close(a, b, "lasso_grad_")
        penalty = ops.Penalty(mask, lam, factor) if pick.random() < 0.7 else None
        sgd_step(pick, ours, theirs, beside(pick, weights), penalty)
        adamw_step(pick, ours, theirs, beside(pick, weights), penalty)
    right_choice(pick, families, plan, mask)


def spoil(pick: random.Random, plan: Plan) -> Plan:
    """One number of the plan, or a few, changed."""
    tables, shapes, layout = plan.tables.clone(), plan.shapes.clone(), list(plan.layout)
    for _ in range(pick.randint(1, 3)):
        value = pick.choice([-(2**31), -2, -1, 0, 1, 7, 1000, 2**31 - 1])
        what = pick.random()
        if what < 0.6 and tables.numel():
            tables[pick.randrange(tables.numel())] = value
        elif what < 0.8 and shapes.numel():
            shapes.view(-1)[pick.randrange(shapes.numel())] = value
        else:
            layout[pick.randrange(len(layout))] = pick.choice([value, 2**40, layout[0] + 1])
    return replace(plan, tables=tables, shapes=shapes, layout=tuple(layout))


def harmless(call: Callable[[], object]) -> bool:
    """Whether it was refused; a crash ends the process."""
    try:
        call()
    except REFUSALS:
        return True
    return False


def every_op(plan: Plan, weights: list[Tensor], mask: Tensor) -> None:
    """All ops that walk the weights, by this plan."""
    one, lr = torch.tensor(0.5), torch.tensor(0.1, dtype=torch.float64)
    bound = ops.Bound(plan, weights)
    ops.group_saliency(bound)
    ops.shrink_(bound, mask, one)
    grads = [torch.randn_like(w) for w in weights]
    ops.lasso_grad_(bound, grads, mask, one)
    penalty = ops.Penalty(mask, one, one)
    ops.sgd_step_(bound, grads, grads, lr, momentum=0.9, penalty=penalty)
    counts = [torch.zeros(()) for _ in grads]
    ops.adamw_step_(bound, grads, grads, grads, counts, lr, penalty=penalty)


def spoilt_weight(pick: random.Random, bound: ops.Bound, mask: Tensor) -> bool:
    """A weight that has become another one since it was bound."""
    victim = pick.choice(bound.weights)
    change = pick.choice(
        [
            lambda: setattr(victim, "data", victim.new_empty(0)),
            lambda: setattr(victim, "data", victim.clone().flatten()[:1].clone()),
            lambda: setattr(victim, "data", victim.to(torch.float64, copy=True)),
            lambda: victim.resize_(3),
        ]
    )
    return harmless(change) or harmless(lambda: ops.shrink_(bound, mask, torch.tensor(0.5)))


def spoilt_state(pick: random.Random, bound: ops.Bound) -> bool:
    """Averages and counts of other numbers and shapes than the weights'."""
    weights = bound.weights
    count = pick.choice([0, len(weights), len(weights) + 1])
    tensors = [
        [torch.randn(pick.choice(SIZES), pick.choice([1, 3])) for _ in range(count)] for _ in range(2)
    ]
    grads = [torch.randn_like(w) for w in weights]
    steps = [torch.zeros(pick.choice([(), (1,), (0,)]))] * pick.choice([count, len(weights)])
    lr = torch.tensor(0.1, dtype=torch.float64)
    return harmless(lambda: ops.adamw_step_(bound, grads, *tensors, steps, lr))


def spoilt_choice(pick: random.Random, families: Families, plan: Plan, mask: Tensor) -> bool:
    """A plan and a cost model with wrong numbers in their tables."""
    wrong = spoil(pick, plan)
    summands, all_groups = [], torch.arange(len(mask))
    if len(families.families) == 1:
        gen = torch.Generator().manual_seed(pick.randrange(2**31))
        summands = [Product(1, all_groups, None, "all"), draw_lookup(gen, all_groups, None, "table")]
    model = build_cost_model(families, summands, "units")
    if model.tables.numel() and pick.random() < 0.5:
        model.tables[pick.randrange(model.tables.numel())] = pick.choice([-1, 2**40, 5])
    limits = torch.ones(len(families.families), dtype=torch.int64)
    scores, budget = torch.rand(len(mask)), torch.tensor(0)
    status = torch.tensor(0, dtype=torch.int32)
    ties = pick.choice([None, torch.tensor([pick.randint(-1, 3) for _ in limits])])
    return harmless(lambda: ops.partition(wrong, model, scores, limits, budget, None, ties)) | harmless(
        lambda: ops.compare(wrong, mask, scores, budget, status, mask, mask)
    )


def spoilt_arguments(pick: random.Random) -> bool:
    """Whether an op refused one of them; what is neither refused nor harmless ends the process."""
    families, parameters, others = draw_families(pick)
    plan = build_plan(families, parameters, others=others)
    weights = [parameters[name] for name in plan.names]
    mask, one = torch.rand(plan.count("groups")) < 0.5, torch.tensor(0.5)
    kind = pick.randrange(6)
    if kind == 0:
        wrong_plan = spoil(pick, plan)
        return harmless(lambda: every_op(wrong_plan, weights, mask))
    bound = ops.Bound(plan, weights)
    if kind == 1 and weights:
        return spoilt_weight(pick, bound, mask)
    if kind == 2:
        grads = [torch.randn(pick.choice(SIZES), pick.choice([1, 3])) for _ in weights]
        return harmless(lambda: ops.lasso_grad_(bound, grads, mask, one))
    if kind == 3:
        wrong = pick.choice([mask[:-1], mask.float(), mask[None], mask.repeat_interleave(2)[::2], one])
        return harmless(lambda: ops.shrink_(bound, wrong, one))
    if kind == 4:
        return spoilt_state(pick, bound)
    return spoilt_choice(pick, families, plan, mask)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--right", action="store_true", help="no spoilt arguments")
    args = parser.parse_args()
    print(ocsfast.__file__, extension.build_info()["cuda_version"], flush=True)
    # Memory that is yet to be written holds NaN: an op that reads it is found.
    torch.use_deterministic_algorithms(True)
    end, seed, refused, spoilt = time.monotonic() + args.seconds, args.seed, 0, 0
    while time.monotonic() < end:
        torch.manual_seed(seed)
        pick = random.Random(seed)
        try:
            if seed % 2 and not args.right:
                spoilt += 1
                refused += spoilt_arguments(pick)
            else:
                right_arguments(pick)
        except BaseException:
            print(f"seed {seed}", flush=True)
            raise
        seed += 1
    print(f"{seed - args.seed} cases, of {spoilt} spoilt ones {refused} refused; no fault")


if __name__ == "__main__":
    main()
