"""Eq. 2 against plain loops in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.builders import Case, case, families, mixed_case
from helpers.tolerance import DTYPES, assert_as_good_as_torch, assert_same_bits
from torch import Tensor

from ocsfast.ops import functions as ops
from ocsfast.ops import reference
from ocsfast.ops.bound import Bound
from ocsfast.ops.plan import TABLES


def equation_2(made: Case, squared: bool = False) -> Tensor:
    """S(g) = mean over the slices w of g of |w|_2 / sqrt(|w|), as paper and released code have it."""
    terms: dict[int, list[float]] = {}
    for group, t, axis, indices in made.slices():
        w = made.weights[t].double().cpu().index_select(axis, indices)
        total = float((w * w).sum())
        terms.setdefault(group, []).append((total if squared else total**0.5) / w.numel() ** 0.5)
    scores = [
        sum(terms[g]) / len(terms[g]) if g in terms else 0.0 for g in range(made.plan.count("groups"))
    ]
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_those_of_equation_2(
    device: str, dtype: torch.dtype, channels_last: bool, squared: bool
) -> None:
    made = mixed_case(dtype, channels_last=channels_last, device=device)
    criterion = "l2_squared" if squared else "l2"
    scores, slice_sq = ops.group_saliency(made.bound(), criterion)
    torchs, torchs_sq = reference.group_saliency(made.bound(), criterion)
    assert scores.dtype == slice_sq.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_torch(scores.cpu(), torchs.cpu(), equation_2(made, squared))
    squares = [
        float(made.weights[t].double().cpu().index_select(axis, indices).square().sum())
        for _, t, axis, indices in made.slices()
    ]
    exact = torch.tensor(squares, dtype=torch.float64)
    assert_as_good_as_torch(slice_sq.cpu(), torchs_sq.cpu(), exact)
    torch.testing.assert_close(slice_sq.double().cpu(), exact, rtol=1e-6, atol=0)  # small ones too


def test_mixed_dtypes_give_float64_where_any_weight_is(device: str) -> None:
    made = mixed_case(torch.float32, device=device)
    for name, dtype in zip(made.parameters, [*DTYPES, *DTYPES], strict=False):
        made.parameters[name] = made.parameters[name].to(dtype)
    scores, _ = ops.group_saliency(made.bound())
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.cpu(), equation_2(made), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 1024, 1025, 5000, 70001])
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_widths_around_vectors_and_tasks(device: str, rows: int, cols: int) -> None:
    gen = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=gen).to(device)
    labels = {"w": {0: torch.arange(rows), 1: rows + torch.arange(cols)}}
    made = case(families([rows, cols], labels), {"w": weight})
    _, slice_sq = ops.group_saliency(made.bound())
    square = weight.double().square()
    exact = torch.cat([square.sum(1), square.sum(0)]).cpu()
    torch.testing.assert_close(slice_sq.double().cpu(), exact, rtol=1e-6, atol=0)


def test_large_sums_stay_accurate(device: str) -> None:
    """A million equal squares in one slice: a running float32 sum would be wrong in the third digit."""
    weight = torch.full((1024, 1024), 0.1, device=device)
    labels = {"w": {0: torch.zeros(1024), 1: torch.ones(1024)}}
    made = case(families([1, 1], labels), {"w": weight})
    _, slice_sq = ops.group_saliency(made.bound())
    exact = float(weight.double().square().sum())
    assert slice_sq.tolist() == pytest.approx([exact, exact], rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_reach_the_scores_of_their_groups_alone(device: str, value: float) -> None:
    made = mixed_case(device=device)
    made.parameters["conv2.weight"][9, 4] = value  # group 13 + 9 // 8, and group 4 by its column
    scores, _ = ops.group_saliency(made.bound())
    assert torch.nonzero(~scores.isfinite()).flatten().tolist() == [4, 14]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0, 1), (0,)])
def test_empty_tensors_score_zero(device: str, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape, device=device)
    made = case(families([max(1, shape[0])], {"w": {0: torch.arange(shape[0])}}), {"w": weight})
    scores, _ = ops.group_saliency(made.bound())
    assert scores.tolist() == [0.0] * made.plan.count("groups")


def test_no_tensor_at_all_gives_no_score() -> None:
    made = case(families([], {}), {})
    scores, slice_sq = ops.group_saliency(made.bound())
    assert scores.shape == slice_sq.shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_run_gives_the_same_bits(device: str, channels_last: bool) -> None:
    made = mixed_case(channels_last=channels_last, device=device)
    assert_same_bits(lambda: list(ops.group_saliency(made.bound())))


def test_the_op_passes_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    bound = made.bound()
    scores = torch.empty(made.plan.count("groups"), device=device)
    slices = torch.empty(made.plan.count("slices"), device=device)
    for criterion, others in (("l2", []), ("taylor", made.weights)):
        arguments = (bound.ticket, scores, slices, others, criterion, False)
        torch.library.opcheck(torch.ops.ocsfast.group_saliency.default, arguments)


def loops(made: Case, criterion: str, others: list[Tensor | None]) -> Tensor:
    """The criterion of each group by plain loops in float64."""
    terms: dict[int, list[float]] = {}
    for group, t, axis, indices in made.slices():
        other = others[t] if others else made.weights[t]
        w = made.weights[t].double().cpu().index_select(axis, indices)
        x = torch.zeros_like(w) if other is None else other.double().cpu().index_select(axis, indices)
        value = {
            "l1": lambda w, x: w.abs().mean(),
            "linf": lambda w, x: w.abs().max(),
            "taylor": lambda w, x: (w * x).sum().abs(),
            "taylor_state": lambda w, x: (w * x).sum().abs(),
            "obd": lambda w, x: (w**2 * x**2).sum() / 2,
            "obd_state": lambda w, x: (w**2 * x).sum() / 2,
        }[criterion](w, x)
        terms.setdefault(group, []).append(float(value))
    groups = range(made.plan.count("groups"))
    return torch.tensor([sum(terms[g]) / len(terms[g]) if g in terms else 0.0 for g in groups]).double()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", ["l1", "linf", "taylor", "taylor_state", "obd", "obd_state"])
def test_other_criteria_are_those_of_the_reference(
    device: str, criterion: str, dtype: torch.dtype, channels_last: bool
) -> None:
    made = mixed_case(dtype, channels_last=channels_last, device=device)
    gen = torch.Generator().manual_seed(3)
    others: list[Tensor | None] = []
    if criterion not in ("l1", "linf"):
        others = [torch.empty_like(w).copy_(torch.rand(w.shape, generator=gen)) for w in made.weights]
        others[3] = None
    bound = made.bound()
    ops.group_saliency(bound)
    squares = ops.group_saliency(bound)[1]
    scores, _ = ops.group_saliency(bound, criterion, others)
    torchs, _ = reference.group_saliency(bound, criterion, others)
    exact = loops(made, criterion, others)
    # torch may be lucky: the sums of |w x| it rounds are up to 4000 elements long.
    assert_as_good_as_torch(
        scores.cpu(), torchs.cpu(), exact, atol=1e-5 if dtype != torch.float64 else 0
    )
    assert torch.equal(ops.group_saliency(bound)[1], squares)  # they are not forgotten


def test_squares_are_remembered_until_a_weight_changes(device: str) -> None:
    made = mixed_case(device=device)
    bound = made.bound()
    assert not bound.knows()
    ops.group_saliency(bound)
    assert bound.knows()
    made.weights[0].mul_(2)
    assert not bound.knows()
    torch.testing.assert_close(ops.group_saliency(bound)[0].double().cpu(), equation_2(made))


def test_a_criterion_must_be_known_and_given_what_it_needs() -> None:
    bound = mixed_case().bound()
    with pytest.raises(RuntimeError, match="criterion 'l3' is not known"):
        ops.group_saliency(bound, "l3")
    with pytest.raises(RuntimeError, match="0 others, the plan has 12 weights"):
        ops.group_saliency(bound, "taylor")
    with pytest.raises(RuntimeError, match=r"others\[0\] is a Double tensor"):
        ops.group_saliency(bound, "taylor", [w.double() for w in bound.weights])


def wrong_weight(weight: Tensor, how: str) -> Tensor:
    return {
        "shape": weight[:, :2],
        "strides": weight.contiguous(memory_format=torch.channels_last),
        "gaps": torch.cat([weight, weight], 1)[:, :3],
        "int": weight.int(),
        "complex": weight.to(torch.complex64),
        "dims": weight.flatten(),
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "shape",
            r"weights\[0\] has shape \(13, 2, 3, 3\), the plan was built for 13 rows, 3 columns of 9",
        ),
        ("strides", r"weights\[0\] has strides \(27, 1, 9, 3\) .* built for a contiguous tensor"),
        ("gaps", r"weights\[0\] has strides \(54, 9, 3, 1\)"),
        ("int", r"weights\[0\] is Int, but only float32"),
        ("complex", r"weights\[0\] is ComplexFloat, but only float32"),
        ("dims", r"weights\[0\] has shape \(351\)"),
    ],
)
def test_wrong_weights_are_refused(how: str, message: str) -> None:
    made = mixed_case()
    weights = made.weights
    weights[0] = wrong_weight(weights[0], how)
    with pytest.raises(RuntimeError, match=r"ocsfast\.bind: " + message):
        made.bound(weights)


def test_wrong_lists_and_layouts_are_refused() -> None:
    made = mixed_case()
    with pytest.raises(RuntimeError, match="11 weights, the plan has 12"):
        made.bound(made.weights[1:])
    with pytest.raises((RuntimeError, NotImplementedError), match="bind"):
        made.bound([made.weights[0].to_sparse(), *made.weights[1:]])
    tables, shapes, layout = made.plan.tables, made.plan.shapes, made.plan.layout
    op = torch.ops.ocsfast.bind
    with pytest.raises(RuntimeError, match="tables is Long, expected Int"):
        op(made.weights, tables.long(), shapes, layout)
    with pytest.raises(RuntimeError, match="layout has 3 entries"):
        op(made.weights, tables, shapes, layout[:3])
    with pytest.raises(RuntimeError, match="layout does not fit its tables"):
        op(made.weights, tables, shapes, (layout[0], layout[1] + 1, *layout[2:]))
    with pytest.raises(RuntimeError, match=r"layout\[2\] is -1"):
        op(made.weights, tables, shapes, (layout[0], layout[1], -1, *layout[3:]))
    with pytest.raises(RuntimeError, match="tables has strides"):
        op(made.weights, tables.repeat_interleave(2)[::2], shapes, layout)


@pytest.mark.parametrize(
    "table", [name for name in TABLES if name not in ("slice_size", "family_layers")]
)
def test_tables_that_point_outside_are_refused(table: str) -> None:
    made = mixed_case()
    spoilt = replace(made.plan, tables=made.plan.tables.clone())
    spoilt.table(table)[1] = 1_000_000
    with pytest.raises(RuntimeError, match="tables: "):
        Bound(spoilt, made.weights)


def test_entries_of_another_slice_are_refused() -> None:
    made = mixed_case()
    spoilt = replace(made.plan, tables=made.plan.tables.clone())
    entries = spoilt.table("slice_entry")
    entries[0], entries[1] = int(entries[1]), int(entries[0])
    with pytest.raises(RuntimeError, match="no row of slice 0"):
        Bound(spoilt, made.weights)


def test_bases_outside_the_tables_are_refused() -> None:
    made = mixed_case()
    tables, shapes, layout = made.plan.tables, made.plan.shapes, made.plan.layout
    spoilt = shapes.clone()
    spoilt[0, 4] = 10_000
    with pytest.raises(RuntimeError, match="row base of tensor 0 is 10000"):
        torch.ops.ocsfast.bind(made.weights, tables, spoilt, layout)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: setattr(w, "data", w.clone()),
        lambda w: setattr(w, "data", w.double()),
        lambda w: setattr(w, "data", w[:5].clone()),
        lambda w: setattr(w, "data", w.new_empty(0)),
        lambda w: w.resize_(2, 2),
    ],
)
def test_a_weight_that_was_replaced_in_place_is_found(change: Callable[[Tensor], object]) -> None:
    made = mixed_case()
    bound = made.bound()
    ops.group_saliency(bound)
    change(made.weights[2])
    mask, factor = torch.ones(54, dtype=torch.bool), torch.tensor(0.5)
    before = made.weights[0].clone()
    for call in (lambda: ops.group_saliency(bound), lambda: ops.shrink_(bound, mask, factor)):
        with pytest.raises(RuntimeError, match=r"weights\[2\] was given other memory"):
            call()
    assert torch.equal(before, made.weights[0])


def test_a_ticket_that_was_given_back_or_made_up_leads_nowhere() -> None:
    made = mixed_case()
    bound = made.bound()
    ticket = bound.ticket.clone()
    del bound
    mask, factor = torch.ones(54, dtype=torch.bool), torch.tensor(0.5)
    for wrong in (ticket, torch.tensor(-1), torch.tensor(2**62)):
        with pytest.raises(RuntimeError, match="nothing is bound under"):
            torch.ops.ocsfast.shrink_(wrong, mask, factor)
    with pytest.raises(RuntimeError, match="bound is Float"):
        torch.ops.ocsfast.shrink_(torch.tensor(1.0), mask, factor)
