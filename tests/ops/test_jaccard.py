"""Eq. 3 against sets of kept channels."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Case, draw_mask, families, mixed_case
from helpers.builders import case as make
from helpers.tolerance import assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference


def equation_3(made: Case, a: Tensor, b: Tensor) -> float:
    """The mean over layers l of |F_a & F_b| / |F_a | F_b|, F the identities of the kept filters."""
    alike = []
    for family in made.families.families:
        groups = range(family.first, family.first + family.size)
        kept_a = {g for g in groups if not a[g]}
        kept_b = {g for g in groups if not b[g]}
        either = kept_a | kept_b
        alike += [len(kept_a & kept_b) / len(either) if either else 1.0] * len(family.layers)
    return sum(alike) / len(alike)


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_that_of_equation_3(device: str, seed: int) -> None:
    made = mixed_case(device=device)
    a, b = draw_mask(made.plan, 0.5, seed), draw_mask(made.plan, 0.7, seed + 100)
    ours = ops.jaccard(made.plan, a, b)
    assert ours.dtype == torch.float64
    assert ours.shape == ()
    assert float(ours) == pytest.approx(equation_3(made, a.cpu(), b.cpu()), abs=1e-15)
    assert float(reference.jaccard(made.plan, a, b)) == pytest.approx(float(ours), abs=1e-15)


def test_the_index_lies_between_its_bounds(device: str) -> None:
    made = mixed_case(device=device)
    none, everything = draw_mask(made.plan, 0.0), draw_mask(made.plan, 1.0)
    assert float(ops.jaccard(made.plan, none, none)) == 1.0
    assert float(ops.jaccard(made.plan, everything, everything)) == 1.0  # nothing kept: nothing differs
    assert float(ops.jaccard(made.plan, none, everything)) == 0.0


def test_without_any_family_the_choice_is_stable() -> None:
    made = make(families([], {}), {})
    nothing = torch.zeros(0, dtype=torch.bool)
    assert float(ops.jaccard(made.plan, nothing, nothing)) == 1.0


def test_every_run_gives_the_same_bits(device: str) -> None:
    made = mixed_case(device=device)
    a, b = draw_mask(made.plan, 0.5, 1), draw_mask(made.plan, 0.5, 2)
    assert_same_bits(lambda: [ops.jaccard(made.plan, a, b)])


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    mask = draw_mask(made.plan, 0.5)
    torch.library.opcheck(
        torch.ops.ocsfast.jaccard.default, (mask, ~mask, made.plan.tables, made.plan.layout)
    )


def test_wrong_masks_are_refused() -> None:
    made = mixed_case()
    mask = draw_mask(made.plan, 0.5)
    with pytest.raises(
        RuntimeError, match=r"ocsfast\.jaccard: mask_b has shape \(53\), expected \(54,\)"
    ):
        ops.jaccard(made.plan, mask, mask[1:])
    with pytest.raises(RuntimeError, match="mask_a is Int, expected Bool"):
        ops.jaccard(made.plan, mask.int(), mask)
