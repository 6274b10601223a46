"""The plan's tables, read back into what they were made from."""

import pytest
import torch
from helpers.builders import families, mixed_case

from ocsfast.core.errors import StateError
from ocsfast.core.memory_format import is_channels_last
from ocsfast.ops import functions as ops
from ocsfast.ops.plan import COUNTS, TABLES
from ocsfast.ops.planning import build_plan, shard_plan


def test_the_tables_of_a_small_plan_are_as_written():
    found = families([2, 1], {"a.weight": {0: [0, 0, 1, -1], 1: [2, 2]}, "a.bias": {0: [0, 0, 1, -1]}})
    plan = build_plan(found, {"a.weight": torch.zeros(4, 2, 3), "a.bias": torch.zeros(4)})
    assert plan.names == ("a.weight",)  # biases do not count
    assert [plan.count(c) for c in COUNTS] == [1, 3, 3, 2]
    expected = {
        "row_slice": [0, 0, 1, -1],
        "col_slice": [2, 2],
        "slice_size": [12, 6, 24],
        "slice_group": [0, 1, 2],
        "slice_tensor": [0, 0, 0],
        "slice_start": [0, 2, 3, 5],
        "slice_entry": [0, 1, 2, 4, 5],
        "group_start": [0, 1, 2, 3],
        "group_slice": [0, 1, 2],
        "family_start": [0, 2, 3],
        "family_layers": [1, 1],
    }
    assert {name: plan.table(name).tolist() for name in TABLES} == expected
    assert plan.shapes.tolist() == [[4, 2, 3, 0, 0, 0]]
    with_bias = build_plan(
        found, {"a.weight": torch.zeros(4, 2, 3), "a.bias": torch.zeros(4)}, include_bias=True
    )
    assert with_bias.names == ("a.weight", "a.bias")
    assert with_bias.table("slice_size").tolist() == [12, 6, 24, 2, 1]


def test_every_slice_is_in_the_tables():
    made = mixed_case()
    plan = made.plan
    sizes, groups = plan.table("slice_size").tolist(), plan.table("slice_group").tolist()
    found = sorted(
        (g, made.weights[t].numel() // made.weights[t].shape[axis] * len(index))
        for g, t, axis, index in made.slices()
    )
    assert sorted(zip(groups, sizes, strict=True)) == found
    starts = plan.table("group_start").tolist()
    for g in range(plan.count("groups")):
        assert all(groups[s] == g for s in plan.table("group_slice")[starts[g] : starts[g + 1]].tolist())


def test_every_row_and_column_of_a_slice_is_listed():
    plan = mixed_case().plan
    slice_of = torch.cat([plan.table("row_slice"), plan.table("col_slice")]).tolist()
    starts, entries = plan.table("slice_start").tolist(), plan.table("slice_entry").tolist()
    for s in range(plan.count("slices")):
        assert entries[starts[s] : starts[s + 1]] == [i for i, of in enumerate(slice_of) if of == s]


def test_channels_last_needs_no_copies():
    x = torch.zeros(4, 3, 2, 2)
    assert not is_channels_last(x)
    assert is_channels_last(x.to(memory_format=torch.channels_last))
    assert not is_channels_last(torch.zeros(4, 3, 1, 1).to(memory_format=torch.channels_last))
    assert is_channels_last(torch.zeros(4, 3, 2, 2, 2).to(memory_format=torch.channels_last_3d))


@pytest.mark.parametrize(
    ("labels", "tensor", "said"),
    [
        ({0: [0, 1]}, torch.zeros(3, 2), "has 3 indices"),
        ({0: [0], 1: [0, 1], 2: [0, 1]}, torch.zeros(1, 2, 2), "axes 0, 1, 2 are labelled; two at most"),
        (
            {2: [0, 1]},
            torch.zeros(3, 3, 2, 2).to(memory_format=torch.channels_last),
            "of a channels_last tensor only its rows and columns",
        ),
        ({0: [0, 1]}, torch.zeros(2, 4).t()[:2].t()[:, :2].t(), "strides"),
    ],
)
def test_what_no_plan_can_hold_is_refused(labels, tensor, said):
    with pytest.raises(StateError, match=said):
        build_plan(families([2], {"a": labels}), {"a": tensor})


def test_a_plan_may_couple_nothing():
    plan = build_plan(families([], {}), {})
    assert [plan.count(c) for c in COUNTS] == [0, 0, 0, 0]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 30])
def test_the_parts_of_a_plan_are_the_whole(ranks):
    """Rows of a matrix, several rows to an index, a vector, and parts that hold nothing."""
    labels = {
        "a.weight": {0: [0, 0, 1, -1, 1, 0, -1], 1: [2, 3]},
        "b.weight": {1: [2, 3, -1], 2: [0, 1]},
        "c.weight": {0: [2, 3, 3, 2]},
    }
    found = families([2, 2], labels)
    torch.manual_seed(0)
    whole = {"a.weight": (7, 2, 3), "b.weight": (5, 3, 2), "c.weight": (4,)}
    whole = {name: torch.randn(shape, dtype=torch.float64) for name, shape in whole.items()}
    plan = build_plan(found, whole)
    mask, half = torch.tensor([True, False, False, True]), torch.tensor(0.5)
    sums = torch.zeros(plan.count("slices"), dtype=torch.float64)
    shrunk = {name: [] for name in plan.names}
    for rank in range(ranks):
        parts = []
        for name in plan.names:
            size = len(whole[name])
            most = -(-size // ranks)
            parts.append(range(min(rank * most, size), min((rank + 1) * most, size)))
        rows = [
            whole[name][part.start : part.stop].clone()
            for name, part in zip(plan.names, parts, strict=True)
        ]
        part = ops.Bound(shard_plan(plan, [whole[name].shape for name in plan.names], parts), rows)
        sums += ops.group_saliency(part)[1]
        ops.shrink_(part, mask, half)
        for name, tensor in zip(plan.names, rows, strict=True):
            shrunk[name].append(tensor)
    bound = ops.Bound(plan, [whole[name] for name in plan.names])
    torch.testing.assert_close(sums, ops.group_saliency(bound)[1])
    ops.shrink_(bound, mask, half)
    for name, tensors in shrunk.items():
        assert torch.equal(torch.cat(tensors), whole[name])
