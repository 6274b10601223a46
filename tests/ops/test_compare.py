"""What a partition comes to: Eq. 3 against sets of kept channels, and counts and sums."""

from __future__ import annotations

import pytest
import torch
from helpers.builders import Case, comparison, draw_mask, families, mixed_case
from helpers.builders import case as make
from helpers.tolerance import assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference
from ocsfast.ops.plan import FACTS, Plan


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


def index(plan: Plan, first: Tensor, mask: Tensor) -> float:
    return float(comparison(plan, mask, first)()[FACTS.index("index")])


@pytest.mark.parametrize("seed", range(5))
def test_the_index_is_that_of_equation_3(device: str, seed: int) -> None:
    made = mixed_case(device=device)
    a, b = draw_mask(made.plan, 0.5, seed), draw_mask(made.plan, 0.7, seed + 100)
    assert index(made.plan, a, b) == pytest.approx(equation_3(made, a.cpu(), b.cpu()), abs=1e-15)


def test_the_index_lies_between_its_bounds(device: str) -> None:
    plan = mixed_case(device=device).plan
    none, everything = draw_mask(plan, 0.0), draw_mask(plan, 1.0)
    assert index(plan, none, none) == 1.0
    assert index(plan, everything, everything) == 1.0  # nothing kept: nothing differs
    assert index(plan, none, everything) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("earlier", [(), ("first",), ("last",), ("first", "last")])
def test_facts_are_the_references(device: str, dtype: torch.dtype, earlier: tuple[str, ...]) -> None:
    # More groups than a block has threads, odd numbers, a family of one and one without any.
    sizes = [1301, 1, 0, 70, 700]
    labels = {f"w{f}": {0: sum(sizes[:f]) + torch.arange(size)} for f, size in enumerate(sizes)}
    weights = {f"w{f}": torch.zeros(size, device=device) for f, size in enumerate(sizes)}
    plan = make(families(sizes, labels, layers=[2, 1, 3, 1, 1]), weights).plan
    mask = draw_mask(plan, 0.5, 1)
    others = {name: draw_mask(plan, 0.6, 2 + k) for k, name in enumerate(earlier)}
    gen = torch.Generator().manual_seed(3)
    values = torch.rand(sum(sizes), generator=gen, dtype=dtype).to(device)
    cost = torch.tensor(2**53 - 1, device=device)
    status = torch.tensor(1, dtype=torch.int32, device=device)
    ours = ops.compare(plan, mask, values, cost, status, **others)
    theirs = reference.compare(plan, mask, values, cost, status, **others)
    assert ours.dtype == theirs.dtype == torch.float64
    assert ours.shape == theirs.shape == (len(FACTS) + len(sizes),)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    for fact in ("cost", "status", "gone", "changed"):
        assert ours[FACTS.index(fact)] == theirs[FACTS.index(fact)]
    assert int(ours[0]) == 2**53 - 1
    parts = torch.split(~mask, sizes)
    assert ours[len(FACTS) :].tolist() == [int(part.sum()) for part in parts]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(device: str, value: float) -> None:
    made = mixed_case(device=device)
    mask = draw_mask(made.plan, 0.5)
    sizes = torch.ones(len(mask), device=device)
    sizes[mask.nonzero()[0]] = value
    cost = torch.tensor(1, device=device)
    facts = ops.compare(made.plan, mask, sizes, cost, cost.int())
    assert not facts[FACTS.index("size_gone")].isfinite()
    facts = ops.compare(made.plan, ~mask, sizes, cost, cost.int())
    assert not facts[FACTS.index("size")].isfinite()
    assert facts[FACTS.index("size_gone")] == (~mask).sum()


def test_without_any_family_the_choice_is_stable() -> None:
    plan = make(families([], {}), {}).plan
    nothing = torch.zeros(0, dtype=torch.bool)
    assert comparison(plan, nothing, nothing, nothing)().tolist() == [7, 7, 0, 0, 0, 1, 0]


def test_every_run_gives_the_same_bits(device: str) -> None:
    made = mixed_case(device=device)
    a, b = draw_mask(made.plan, 0.5, 1), draw_mask(made.plan, 0.5, 2)
    compare = comparison(made.plan, a, b, b)
    assert_same_bits(lambda: [compare()])


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    mask, cost = draw_mask(made.plan, 0.5), torch.tensor(3, device=device)
    sizes = torch.rand(len(mask), device=device)
    for first in (None, ~mask):
        arguments = (mask, sizes, cost, cost.int(), first, None, made.plan.tables, made.plan.layout)
        torch.library.opcheck(torch.ops.ocsfast.compare.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.zeros(53, dtype=torch.bool)}, r"mask has shape \(53\), expected \(54,\)"),
        ({"mask": torch.zeros(54, dtype=torch.int32)}, "mask is Int, expected Bool"),
        ({"first": torch.zeros(53, dtype=torch.bool)}, r"first has shape \(53\), expected \(54,\)"),
        ({"last": torch.zeros(54)}, "last is Float, expected Bool"),
        ({"sizes": torch.zeros(54, dtype=torch.float16)}, "sizes is Half, expected Float"),
        ({"sizes": torch.zeros(53)}, r"sizes has shape \(53\), expected \(54,\)"),
        ({"cost": torch.tensor(1.0)}, "cost is Float, expected Long"),
        ({"status": torch.tensor([1], dtype=torch.int32)}, "status has shape .*, expected a 0-dim"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Tensor], message: str) -> None:
    plan = mixed_case().plan
    arguments = {
        "mask": draw_mask(plan, 0.5),
        "sizes": torch.zeros(54),
        "cost": torch.tensor(1),
        "status": torch.tensor(0, dtype=torch.int32),
        **changes,
    }
    with pytest.raises(RuntimeError, match=r"ocsfast\.compare: " + message):
        ops.compare(plan, **arguments)
