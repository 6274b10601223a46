"""Eq. 2 against plain loops in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import Case, case, families, mixed_case
from tolerance import DTYPES, assert_as_good_as_torch, assert_same_bits
from torch import Tensor

from ocsfast import ops, reference


def equation_2(made: Case, squared: bool) -> Tensor:
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
def test_equation_2(device: str, dtype: torch.dtype, channels_last: bool, squared: bool) -> None:
    made = mixed_case(dtype, channels_last=channels_last, device=device)
    scores, slice_sq = ops.group_saliency(made.plan, made.weights, squared=squared)
    torchs, torchs_sq = reference.group_saliency(made.plan, made.weights, squared=squared)
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
    scores, _ = ops.group_saliency(made.plan, made.weights)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores.cpu(), equation_2(made, False), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 1024, 1025, 5000, 70001])
@pytest.mark.parametrize("rows", [1, 3, 130])
def test_widths_around_vectors_and_tasks(device: str, rows: int, cols: int) -> None:
    gen = torch.Generator().manual_seed(rows * cols)
    weight = torch.randn(rows, cols, generator=gen).to(device)
    labels = {"w": {0: torch.arange(rows), 1: rows + torch.arange(cols)}}
    made = case(families([rows, cols], labels), {"w": weight})
    _, slice_sq = ops.group_saliency(made.plan, made.weights)
    square = weight.double().square()
    exact = torch.cat([square.sum(1), square.sum(0)]).cpu()
    torch.testing.assert_close(slice_sq.double().cpu(), exact, rtol=1e-6, atol=0)


def test_large_sums_stay_accurate(device: str) -> None:
    """A million equal squares in one slice: a running float32 sum would be wrong in the third digit."""
    weight = torch.full((1024, 1024), 0.1, device=device)
    labels = {"w": {0: torch.zeros(1024), 1: torch.ones(1024)}}
    made = case(families([1, 1], labels), {"w": weight})
    _, slice_sq = ops.group_saliency(made.plan, made.weights)
    exact = float(weight.double().square().sum())
    assert slice_sq.tolist() == pytest.approx([exact, exact], rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_reach_the_scores_of_their_groups_alone(device: str, value: float) -> None:
    made = mixed_case(device=device)
    made.parameters["conv2.weight"][9, 4] = value  # group 13 + 9 // 8, and group 4 by its column
    scores, _ = ops.group_saliency(made.plan, made.weights)
    assert torch.nonzero(~scores.isfinite()).flatten().tolist() == [4, 14]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3, 0, 1), (0,)])
def test_empty_tensors_score_zero(device: str, shape: tuple[int, ...]) -> None:
    weight = torch.zeros(shape, device=device)
    made = case(families([max(1, shape[0])], {"w": {0: torch.arange(shape[0])}}), {"w": weight})
    scores, _ = ops.group_saliency(made.plan, made.weights)
    assert scores.tolist() == [0.0] * made.plan.count("groups")


def test_no_tensor_at_all() -> None:
    made = case(families([], {}), {})
    scores, slice_sq = ops.group_saliency(made.plan, [])
    assert scores.shape == slice_sq.shape == (0,)


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits(device: str, channels_last: bool) -> None:
    made = mixed_case(channels_last=channels_last, device=device)
    assert_same_bits(lambda: list(ops.group_saliency(made.plan, made.weights)))


def test_opcheck(device: str) -> None:
    made = mixed_case(device=device)
    arguments = (made.weights, made.plan.tables, made.plan.shapes, made.plan.layout, False)
    torch.library.opcheck(torch.ops.ocsfast.group_saliency.default, arguments)


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
    with pytest.raises(RuntimeError, match=r"ocsfast\.group_saliency: " + message):
        ops.group_saliency(made.plan, weights)


def test_wrong_lists_and_layouts_are_refused() -> None:
    made = mixed_case()
    with pytest.raises(RuntimeError, match="9 weights, the plan has 10"):
        ops.group_saliency(made.plan, made.weights[1:])
    with pytest.raises((RuntimeError, NotImplementedError), match="group_saliency"):
        ops.group_saliency(made.plan, [made.weights[0].to_sparse(), *made.weights[1:]])
    tables, shapes, layout = made.plan.tables, made.plan.shapes, made.plan.layout
    op = torch.ops.ocsfast.group_saliency
    with pytest.raises(RuntimeError, match="tables is Long, expected Int"):
        op(made.weights, tables.long(), shapes, layout, False)
    with pytest.raises(RuntimeError, match="layout has 3 entries"):
        op(made.weights, tables, shapes, layout[:3], False)
    with pytest.raises(RuntimeError, match="layout does not fit its tables"):
        op(made.weights, tables, shapes, (layout[0], layout[1] + 1, *layout[2:]), False)
    with pytest.raises(RuntimeError, match=r"layout\[2\] is -1"):
        op(made.weights, tables, shapes, (layout[0], layout[1], -1, *layout[3:]), False)
    with pytest.raises(RuntimeError, match="tables has strides"):
        op(made.weights, tables.repeat_interleave(2)[::2], shapes, layout, False)


@pytest.mark.parametrize(
    "table", ["row_slice", "col_slice", "slice_group", "group_slice", "group_start"]
)
def test_tables_that_point_outside_are_refused(table: str) -> None:
    made = mixed_case()
    spoilt = replace(made.plan, tables=made.plan.tables.clone())
    spoilt.table(table)[1] = 1_000_000
    with pytest.raises(RuntimeError, match=f"tables: {table}"):
        ops.group_saliency(spoilt, made.weights)


def test_bases_outside_the_tables_are_refused() -> None:
    made = mixed_case()
    tables, shapes, layout = made.plan.tables, made.plan.shapes, made.plan.layout
    spoilt = shapes.clone()
    spoilt[0, 4] = 10_000
    with pytest.raises(RuntimeError, match="row base of tensor 0 is 10000"):
        torch.ops.ocsfast.group_saliency(made.weights, tables, spoilt, layout, False)
