"""Widths to time an operator at, and times that are made to rise."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ocsfast.latency.grid import kept_counts, rising
from ocsfast.latency.sides import Side


def side(size, unit=1, fixed=0):
    return Side(0, 0, torch.zeros(size, dtype=torch.int64), unit, fixed, (0,), {})


def test_counts_are_spread_over_what_a_cut_can_leave():
    assert kept_counts(side(64), 5) == (13, 26, 38, 51, 64)
    assert kept_counts(side(512), 5) == (102, 205, 307, 410, 512)
    assert kept_counts(side(64), 5, most_gone=1.0) == (1, 16, 32, 48, 64)
    assert kept_counts(side(768, unit=64), 4) == (128, 384, 576, 768)  # twelve heads, whole
    assert kept_counts(side(20, fixed=10), 2) == (12, 20)
    assert kept_counts(side(3), 5) == (1, 2, 3)
    assert kept_counts(side(1), 5) == (1,)


def test_counts_are_multiples_of_what_the_run_keeps():
    assert kept_counts(side(64), 5, groups=8) == (16, 24, 40, 48, 64)
    assert kept_counts(side(60), 3, groups=16) == (16, 32, 60)


@given(arrays(np.float64, (3, 4), elements=st.floats(0, 1e9)))
def test_any_times_rise_and_stay_within_their_range(times):
    made = np.array(rising(times))
    assert (np.diff(made, axis=0) >= 0).all()
    assert (np.diff(made, axis=1) >= 0).all()
    assert np.floor(times.min()) <= made.min()
    assert made.max() <= np.ceil(times.max())


def test_times_that_rise_are_left_as_they_are():
    assert rising([[1, 2], [1, 5]]) == ((1, 2), (1, 5))
    assert rising([[4, 2]]) == ((3, 3),)
