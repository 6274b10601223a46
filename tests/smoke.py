"""One call of each op, held against the CPU's: python tests/smoke.py --device cuda

For a machine that has just been built on, and for tools under which a whole test suite takes hours.
"""

from __future__ import annotations

import argparse

import torch
from helpers.builders import Case, chain, comparison, draw_mask, mixed_case, one_of_each
from torch import Tensor

from ocsfast.ops import functions as ops


def results(made: Case) -> dict[str, list[Tensor]]:
    """What each op leaves behind."""
    device = str(made.plan.tables.device)
    found = {name: [t.clone() for t in call()] for name, call in one_of_each(made).items()}
    plan, cost = chain([300, 70, 5], device)
    scores = torch.linspace(1, 0, 375, device=device)
    most, budget = torch.tensor([299, 69, 4], device=device), cost([150, 35, 3])
    mask, reached, status = ops.partition(
        plan, cost, scores, most, torch.tensor(budget, device=device), 1
    )
    found["partition"] = [mask, reached, status]
    a, b = draw_mask(made.plan, 0.5), draw_mask(made.plan, 0.7, 1)
    found["compare"] = [comparison(made.plan, a, b, b)()]
    return found


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args(words).device
    ours, cpus = results(mixed_case(device=device)), results(mixed_case())
    for name, tensors in ours.items():
        for a, b in zip(tensors, cpus[name], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
        print(f"{name}: as on the CPU")
    print(f"{len(ours)} ops on {device}")


if __name__ == "__main__":
    main()
