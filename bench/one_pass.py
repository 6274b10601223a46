"""Training steps of torch's own optimizers while groups shrink: python bench/one_pass.py --arch resnet18

Copies of one model take whole steps in turn: with torch's optimizer alone, with a pruner in the stage
before, and in sparsity learning with the penalty in two passes around the step and in one with it. Each
round starts with another of them. Every ratio is of two steps of one round, so that a slow moment of the
machine falls on both; given are the median over the rounds and half of the quartiles' distance.
"""

from __future__ import annotations

import copy
import statistics

import records
import torch
from end_to_end import Way, optimizers, penalized, step_of

import ocsfast
from ocsfast.train.models import build_model

Taken = dict[str, list[tuple[float, float]]]  # seconds of forward and backward, and of the step

RATIOS = {
    "step, of plain": ("plain", (1,)),
    "whole, of plain": ("plain", (0, 1)),
    "whole, of two passes": ("two passes", (0, 1)),
}
WAYS = ("plain", "observe", "two passes", "one pass")


def ways_of(arch: str, name: str, batch: int) -> dict[str, Way]:
    """A step of each way, on a copy of the same model."""
    dense = build_model(arch, 10, 3, 32)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    families = ocsfast.group(dense, x[:2], verify=False)
    ways = {}
    for way in WAYS:
        model = copy.deepcopy(dense)
        optimizer = optimizers()[name](model.parameters())
        if way == "observe":
            ocsfast.attach(model, 0.5, optimizer=optimizer, families=families, total_steps=10**6)
        elif way != "plain":
            penalized(model, optimizer, x, families, one_pass=way == "one pass")
        ways[way] = step_of(model, optimizer, x, y)
    return ways


def spread(values: list[float]) -> float:
    first, _, third = statistics.quantiles(values, n=4)
    return (third - first) / 2


def ratios(taken: Taken, way: str, base: str, parts: tuple[int, ...]) -> list[float]:
    """Of two steps of each round: of all of them, or of the optimizer's part."""
    pairs = zip(taken[way], taken[base], strict=True)
    return [sum(a[k] for k in parts) / sum(b[k] for k in parts) for a, b in pairs]


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--optimizer", default="torch SGD", help=f"one of {', '.join(optimizers())}")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.quick:
        args.arch, args.batch, args.rounds = "resnet20", 2, 2
    ways = ways_of(args.arch, args.optimizer, args.batch)
    taken: Taken = {way: [] for way in WAYS}
    for k in range(args.rounds + 1):
        for way in (*WAYS[k % 4 :], *WAYS[: k % 4]):
            seconds = ways[way]()
            if k > 0:  # the first round warms up
                taken[way].append(seconds)
    print(f"{args.arch}, {args.optimizer}, batch {args.batch}, 1 thread, torch {torch.__version__}\n")
    print(
        f"| way | forward + backward, ms | step, ms | {' | '.join(RATIOS)} |\n|---|---|---|---|---|---|"
    )
    for way, pairs in taken.items():
        cells = [f"{1e3 * statistics.median(pair[k] for pair in pairs):.2f}" for k in (0, 1)]
        row = {title: ratios(taken, way, *of) for title, of in RATIOS.items()}
        cells += [f"{statistics.median(values):.3f} ± {spread(values):.3f}" for values in row.values()]
        print(f"| {way} | {' | '.join(cells)} |", flush=True)
        if args.rows is not None:
            medians = {title: statistics.median(values) for title, values in row.items()}
            records.append(args.rows, "one pass", way=way, model=args.arch, batch=args.batch, **medians)


if __name__ == "__main__":
    main()
