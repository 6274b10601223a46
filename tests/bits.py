"""What the ops leave where no sum takes part, to be held against another build's, bit by bit.

    python tests/bits.py --write bits.pt                                  with the CPU's kernels
    PYTHONPATH=build/emulated python tests/bits.py --against bits.pt      with CUDA's, emulated

Sums are added up in float on CUDA and in double on the CPU, so scores and whatever depends on a norm
agree to rounding only; the ops' tests see to these.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from helpers.builders import Case, chain, draw, draw_mask, mixed_case, scalar
from torch import Tensor

from ocsfast.ops import functions as ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def of_weights(made: Case) -> dict[str, list[Tensor]]:
    """Eq. 9, and steps that shrink nothing, each on its own copies."""
    found, lr = {}, scalar(0.1, "cpu", torch.float64)
    weights = [w.clone() for w in made.weights]
    ops.shrink_(made.bound(weights), draw_mask(made.plan, 0.5), scalar(0.3, "cpu"))
    found["shrink_"] = weights
    for nesterov in (False, True):
        weights, momenta = [w.clone() for w in made.weights], draw(made, 1)
        ops.sgd_step_(
            made.bound(weights),
            draw(made, 2),
            momenta,
            lr,
            momentum=0.9,
            weight_decay=1e-2,
            nesterov=nesterov,
        )
        found[f"sgd_step_, nesterov={nesterov}"] = weights + momenta
    weights, averages = [w.clone() for w in made.weights], draw(made, 1)
    squares, steps = [m.square() for m in averages], [torch.tensor(3.0) for _ in averages]
    ops.adamw_step_(made.bound(weights), draw(made, 2), averages, squares, steps, lr)
    found["adamw_step_"] = weights + averages + squares + steps
    return found


def results() -> dict[str, list[Tensor]]:
    found = {}
    for dtype in DTYPES:
        for channels_last in (False, True):
            of_dtype = of_weights(mixed_case(dtype, channels_last=channels_last))
            found |= {f"{op}, {dtype}, {channels_last=}": made for op, made in of_dtype.items()}
    scores = torch.rand(375, generator=torch.Generator().manual_seed(1)).round(decimals=2)  # many equal
    for unit, tables in product((1, 2), (None, 0, 1)):
        plan, cost = chain([300, 70, 5], tables=tables)
        most, budget = torch.tensor([299, 69, 4]), torch.tensor(cost([150, 35, 3]))
        units = torch.full((3,), unit)
        for give_back in (False, True):
            chosen = ops.partition(plan, cost, scores, most, budget, units, None, give_back)
            found[f"partition, {unit=}, {tables=}, {give_back=}"] = list(chosen)
    plan, cost = chain([120, 75, 60, 60, 60], tables=2)
    most, budget = torch.tensor([119, 74, 50, 50, 50]), torch.tensor(cost([70, 40, 35, 35, 35]))
    ties = torch.tensor([0, 1, 2, 2, 2])
    found["partition of tied families"] = list(
        ops.partition(plan, cost, scores, most, budget, None, ties)
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("--write", type=Path)
    files.add_argument("--against", type=Path)
    args = parser.parse_args()
    found = results()
    if args.write is not None:
        torch.save(found, args.write)
        return
    others = torch.load(args.against)
    differ = [
        name
        for name, tensors in found.items()
        if not all(torch.equal(a, b) for a, b in zip(tensors, others[name], strict=True))
    ]
    if differ:
        raise SystemExit("other bits: " + "; ".join(differ))
    print(f"the same bits: {len(found)} calls")


if __name__ == "__main__":
    main()
