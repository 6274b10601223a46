"""Each criterion's formula, on numbers that one can check by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ocsfast.core.criteria import CRITERIA

W, X = torch.tensor([3.0, -4.0]), torch.tensor([2.0, 1.0])
BY_HAND = {
    "l2": 5 / math.sqrt(2),
    "l2_squared": 25 / math.sqrt(2),
    "l1": 3.5,
    "linf": 4.0,
    "taylor": 2.0,
    "taylor_state": 2.0,
    "obd": 26.0,
    "obd_state": 17.0,
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_formula_is_what_its_text_says(name: str) -> None:
    formula = CRITERIA[name]
    joined = getattr(torch, formula.reduce)(formula.element(W, X))
    scored = formula.slice(joined, torch.tensor(2.0))
    assert float(scored) == pytest.approx(BY_HAND[name])
    assert bool(formula.x) == ("x" in formula.text.split("(")[0].replace("max", ""))
    assert bool(formula.keys) == bool(formula.keepers) == (formula.x == "state")
