"""An optimizer's own step() beside torch's fused one: python bench/optimizer_steps.py --models ResNet50

Copies of one model, with the gradients of one batch, take steps in turn, hooks and all: torch's fused
optimizer, ocsfast's, and ocsfast's while half of the cost shrinks. bench/bench_step.py has the kernels
alone, on weights that lie one behind the other. One thread; each round starts with another of them.
Every ratio is of two steps of one round; given are the median over the rounds and their quartiles.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable

import records
import torch
from cases import model_of
from end_to_end import optimizers, penalized, step_of
from machine import processor

import ocsfast

Clock = Callable[[], float]
Step = Callable[[], object]


def steps_of(model_name: str, rule: str) -> dict[str, Step]:
    """The step() of each optimizer, its state begun."""
    dense, x = model_of(model_name)
    y = torch.zeros(len(x), dtype=torch.int64)
    families = ocsfast.group(dense, x, verify=False)
    steps: dict[str, Step] = {}
    for way in (f"torch {rule}, fused", f"ocsfast {rule}", f"ocsfast {rule}, penalized"):
        model = copy.deepcopy(dense)
        optimizer = optimizers()[way.removesuffix(", penalized")](model.parameters())
        if way.endswith("penalized"):
            penalized(model, optimizer, x, families)
        for held in optimizer.param_groups:
            held["lr"] = 1e-9  # whatever number of steps is measured, weights stay as large as they are
        step_of(model, optimizer, x, y)()
        steps[way] = _keeping(optimizer.step, model)
    return steps


def _keeping(step: Step, model: torch.nn.Module) -> Step:
    """A step that keeps its model alive, and with it the pruner."""

    def run(kept: object = model) -> object:
        return step()

    return run


def in_rounds(steps: dict[str, Step], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each step of each round, after one round that warms up."""
    ways, seconds = list(steps), {way: [] for way in steps}
    for k in range(rounds + 1):
        for way in (*ways[k % len(ways) :], *ways[: k % len(ways)]):
            begun = clock()
            steps[way]()
            if k > 0:
                seconds[way].append(clock() - begun)
    return seconds


def quartiles(values: Iterable[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = records.program(__doc__)
    parser.add_argument("--models", nargs="+", default=["ResNet50", "ResNet56"])
    parser.add_argument("--optimizer", default="SGD", choices=("SGD", "AdamW"))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--cpu-time", action="store_true", help="by the thread's clock, not the wall's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.quick:
        args.models, args.rounds = ["ResNet56"], 2
    clock = time.thread_time if args.cpu_time else time.perf_counter
    print(f"{processor()}; torch {torch.__version__}, 1 thread, {args.rounds} rounds\n")
    print("| model | way | ms | of torch's fused step | quartiles |\n|---|---|---|---|---|")
    for name in args.models:
        seconds = in_rounds(steps_of(name, args.optimizer), args.rounds, clock)
        base = seconds[f"torch {args.optimizer}, fused"]
        for way, taken in seconds.items():
            first, middle, third = quartiles(a / b for a, b in zip(taken, base, strict=True))
            ms, spread = 1e3 * statistics.median(taken), f"{first:.3f} to {third:.3f}"
            print(f"| {name} | {way} | {ms:.3f} | {middle:.3f} | {spread} |", flush=True)
            if args.rows is not None:
                row = {"model": name, "way": way, "ms": ms, "of_torch": middle}
                records.append(args.rows, "optimizer step", **row, processor=processor())


if __name__ == "__main__":
    main()
