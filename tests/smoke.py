"""One call of each op, held against the CPU's: python tests/smoke.py --device cuda

For a machine that has just been built on, and for tools under which a whole test suite takes hours.
"""

from __future__ import annotations

import argparse

import torch
from helpers.builders import Case, every_call, mixed_case
from torch import Tensor


def results(made: Case) -> dict[str, list[Tensor]]:
    """What each op leaves behind."""
    return {name: [t.clone() for t in call()] for name, call in every_call(made).items()}


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
