"""Eq. 4-6 on hand-made indices."""

import pytest

from ocsfast.choice.stability import has_settled, is_stable, mean_stability


def test_mean_over_what_exists():
    assert mean_stability([], 3) is None
    assert mean_stability([0.5], 3) == 0.5
    assert mean_stability([0.0, 0.3, 0.6, 0.9], 3) == pytest.approx(0.6)
    assert mean_stability([0.0, 0.3, 0.6, 0.9], 3, back=3) == 0.0
    assert mean_stability([0.0, 0.3], 3, back=3) is None


def test_settled_needs_window_plus_lag_plus_one_checks():
    window, lag, flat = 3, 2, [0.9] * 10
    first = next(n for n in range(11) if has_settled(flat[:n], window, 1e-4))
    assert first + lag == window + lag + 1


def test_settled_when_the_mean_no_longer_rises():
    rising = [0.1 * k for k in range(10)]
    assert not any(has_settled(rising[:n], 3, 1e-4) for n in range(11))
    assert has_settled([*rising, 0.9, 0.9, 0.9, 0.9, 0.9], 3, 1e-4)
    assert has_settled([0.9, 0.5, 0.5, 0.5], 3, 0.0)  # falling is not rising


def test_stable_over_a_full_window():
    assert not is_stable([1.0, 1.0], 3, 1e-3)
    assert is_stable([0.2, 1.0, 1.0, 1.0], 3, 1e-3)
    assert not is_stable([1.0, 1.0, 0.99], 3, 1e-3)
    assert is_stable([1.0, 1.0, 0.9975], 3, 1e-3)
