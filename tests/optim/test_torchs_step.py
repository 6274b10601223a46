"""Steps of torch's own optimizers in one pass with the penalty: the same run, to rounding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from helpers.tolerance import DTYPES, assert_as_good_as_torch
from helpers.torchs_runs import Case, Trial
from torch import Tensor
from torch.optim import Optimizer

STEPS, FIRST, LOAD, CUT = 200, 10, 90, 160

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def drawn(seed: int) -> Case:
    """A case at random, of all that torch admits together."""
    draw = random.Random(seed)
    kind: type[Optimizer] = draw.choice([SGD, SGD, ADAMW, ADAMW, ADAM])
    settings: dict[str, Any] = {
        "weight_decay": draw.choice([0.0, 0.05]),
        "maximize": draw.random() < 0.3,
    }
    if kind is SGD:
        settings["momentum"] = draw.choice([0.0, 0.9, 0.9])
        style = draw.choice(["", "dampening", "nesterov"]) if settings["momentum"] else ""
        if style:
            settings[style] = 0.3 if style == "dampening" else True
    else:
        settings |= {"betas": draw.choice([(0.9, 0.999), (0.8, 0.9)]), "amsgrad": draw.random() < 0.15}
        settings["eps"] = 1e-4  # 1e-8 is 0 in float16
    form = draw.choice(["foreach", "fused", "plain", "default"])
    settings |= {form: True} if form in ("foreach", "fused") else {}
    settings |= {"foreach": False} if form == "plain" else {}
    dtype = draw.choice(DTYPES)
    return Case(
        kind,
        settings,
        dtype=dtype,
        cuts=dtype in (torch.float32, torch.float64),  # else rounding has a say in what goes
        penalty=draw.choice(["both", "both", "lasso", "shrink"]),
        channels_last=draw.random() < 0.5,
        param_groups=draw.choice([1, 2]),
        tensor_lr=form not in ("foreach", "fused") and draw.random() < 0.3,
    )


def run(
    case: Case, one_pass: bool, loaded: bool = False, mask: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """From the first step through the cut; half way it may go on in a run of the other kind.

    Args:
        mask: what shrinks, if another run is to be followed.
    """
    trial = Trial(case, one_pass, STEPS)
    for k in range(STEPS):
        trial.step(k)
        if k == FIRST:
            assert trial.pruner.step().stage == "sparsify"
            chosen = trial.pruner.mask
            assert chosen is not None
            if mask is not None:
                chosen.copy_(mask)
            mask = chosen.clone()
        if k == LOAD and loaded:
            state = trial.state()
            trial = Trial(case, not one_pass, STEPS)
            trial.load(state)
        if k == CUT and case.cuts:
            assert trial.pruner.cut().stage == "pruned"
            assert "_init_group" not in vars(trial.optimizer)
    assert mask is not None
    return trial.tensors(), mask


@pytest.mark.parametrize("seed", range(12))
def test_a_run_is_the_one_with_two_more_passes(seed: int) -> None:
    case = drawn(seed)
    torchs, mask = run(case, one_pass=False)
    exact, _ = run(case.exact(), one_pass=False, mask=mask)
    for loaded in (False, True):
        ours, chosen = run(case, one_pass=True, loaded=loaded)
        assert torch.equal(chosen, mask)
        assert ours.keys() == torchs.keys()
        for name, value in ours.items():
            want = torchs[name]
            assert (value.shape, value.dtype, value.stride()) == (want.shape, want.dtype, want.stride())
            if name.endswith(": step"):
                assert torch.equal(value, want)
            elif case.dtype == torch.float64:
                torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)
            else:
                assert_as_good_as_torch(value, want, exact[name].double())
