"""The label algebra on its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ocsfast.grouping.labels import Labels


def terms(labels, vector):
    """The term of each index as it stands now."""
    return [labels.term(number) for number in labels.settled(vector).tolist()]


def test_unified_vectors_have_equal_terms_and_stay_live():
    labels = Labels()
    a, b = labels.fresh(4), labels.fresh(4)
    labels.unify(a, b, "add")
    assert terms(labels, a) == terms(labels, b)
    assert len(set(terms(labels, a))) == 4
    assert labels.live(a)


def test_unify_is_transitive_whatever_the_order():
    labels = Labels()
    a, b, c, d = (labels.fresh(3) for _ in range(4))
    labels.unify(a, b, "")
    labels.unify(c, d, "")
    labels.unify(d, a, "")
    assert terms(labels, a) == terms(labels, b) == terms(labels, c) == terms(labels, d)


def test_freezing_one_side_freezes_the_other_and_keeps_the_reason():
    labels = Labels()
    a, b = labels.fresh(2), labels.fresh(2)
    labels.unify(a, b, "add")
    labels.freeze(a, "model output")
    assert not labels.live(b)
    assert labels.reasons(b) == ["model output"]
    c = labels.fresh(2)
    labels.unify(c, None, "meets an input")
    assert labels.reasons(c) == ["meets an input"]


def test_unequal_lengths_are_an_error_that_names_the_operator():
    labels = Labels()
    with pytest.raises(ValueError, match="cat: 2 labels meet 3"):
        labels.unify(labels.fresh(2), labels.fresh(3), "cat")


def test_split_refines_each_atom_and_merge_restores_it():
    labels = Labels()
    flat = labels.fresh(6)
    rows, cols = labels.split(flat, [2, 3], "view")
    assert [len(t) for t in terms(labels, rows)] == [1, 1]
    assert [len(t) for t in terms(labels, cols)] == [1, 1, 1]
    assert terms(labels, labels.merge([rows, cols], [2, 3])) == terms(labels, flat)
    assert all(len(term) == 2 for term in terms(labels, flat))
    again = labels.split(flat, [2, 3], "view")
    assert [terms(labels, v) for v in again] == [terms(labels, rows), terms(labels, cols)]


def test_split_of_a_repeated_vector_needs_no_new_atoms():
    labels = Labels()
    channels = labels.fresh(3)
    flat = labels.merge([channels, None], [3, 4])  # flatten [3, 4]: the second dimension is frozen
    assert labels.split(flat, [3, 4], "view")[1] is None
    assert terms(labels, labels.split(flat, [3, 4], "view")[0]) == terms(labels, channels)
    tiled = labels.merge([None, channels], [4, 3])
    assert labels.split(tiled, [4, 3], "view")[0] is None


def test_freezing_the_inner_part_leaves_the_outer_one():
    labels = Labels()
    flat = labels.fresh(6)
    rows, cols = labels.split(flat, [2, 3], "view")
    labels.freeze(cols, "position")
    left = terms(labels, flat)
    assert [len(t) for t in left] == [1] * 6
    assert len(set(left)) == 2
    assert left == [t for t in terms(labels, rows) for _ in range(3)]


def test_a_term_that_holds_another_freezes_the_rest():
    labels = Labels()
    a, b = labels.fresh(2), labels.fresh(1)
    both = labels.merge([a, b], [2, 1])  # {a0, b}, {a1, b}
    labels.unify(both, a, "add")
    assert not labels.live(b)
    assert labels.live(a)


def test_ambiguous_equations_freeze_rather_than_guess():
    labels = Labels()
    a, b, c, d = (labels.fresh(n) for n in (2, 3, 2, 3))
    left, right = labels.merge([a, b], [2, 3]), labels.merge([d, c], [3, 2])
    labels.unify(left, right, "add")
    assert terms(labels, left) == terms(labels, right)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=12), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_equations_hold_after_any_sequence(pairs, frozen):
    """Whatever is unified, split or frozen, both sides of every equation read the same afterwards."""
    labels = Labels()
    vectors = [labels.fresh(6) for _ in range(5)]
    rows, cols = labels.split(vectors[0], [2, 3], "view")
    cols2, rows2 = labels.split(vectors[1], [3, 2], "view")
    if frozen < 5:
        labels.freeze(vectors[frozen][:2], "frozen")
    for i, j in pairs:
        labels.unify(vectors[i], vectors[j], "eq")
    for i, j in pairs:
        assert terms(labels, vectors[i]) == terms(labels, vectors[j])
    assert terms(labels, labels.merge([rows, cols], [2, 3])) == terms(labels, vectors[0])
    assert terms(labels, labels.merge([cols2, rows2], [3, 2])) == terms(labels, vectors[1])
    solution = labels.solution()
    for vector in vectors:
        assert np.array_equal(solution[vector], labels.settled(vector))
