"""Eq. 7, the automatic ramp, and the planned stage."""

import pytest
import torch

from ocsfast import Config
from ocsfast.optim.strength import Ramp, paper_lambda
from ocsfast.run.stage import plan_stage


@pytest.mark.parametrize("every", [1, 2, 3])
def test_eq7_to_the_letter(every):
    config = Config.paper("imagenet", growth="recursive", delta_every=every)
    expected = config.lambda0  # lambda at t_sl, where the floor is 0
    for elapsed in range(40):
        expected += config.delta * (elapsed // every)
        assert paper_lambda(config, elapsed) == pytest.approx(expected, rel=1e-12)


def test_linear_growth_as_the_prose_says():
    config = Config(strength="paper", delta_every=2)
    assert [paper_lambda(config, k) for k in range(5)] == pytest.approx([1e-4, 1e-4, 2e-4, 2e-4, 3e-4])


@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_ramp_adds_up_to_nats_and_grows(shape):
    ramp = Ramp(3.0, 50, shape)
    rates = [ramp.at(k) for k in range(50)]
    assert sum(rates) == pytest.approx(3.0)
    assert rates == sorted(rates)
    assert ramp.at(70) == pytest.approx(ramp.at(60))  # goes on at the last rate
    assert ramp.at(60) == pytest.approx(3.0 / 50 * (2 if shape == "linear" else 4))


def test_stage_with_a_known_length():
    stage = plan_stage(Config(), total=1000, start=None, checks=5, steps=50)
    assert (stage.latest_start, stage.steps, stage.deadline) == (400, 200, 600)
    late = plan_stage(Config(), total=1000, start=550, checks=55, steps=550)
    assert (late.steps, late.deadline) == (100, 650)  # half of the stage at least


def test_a_late_stage_moves_the_deadline():
    """Checks that begin when the deadline is near, or over, still shrink before they cut."""
    first = plan_stage(Config(), total=200, start=None, checks=1, steps=160, begun=150)
    assert (first.latest_start <= 160, first.deadline) == (True, 180)
    begun = plan_stage(Config(), total=200, start=160, checks=1, steps=160, begun=150)
    assert (begun.steps, begun.deadline) == (20, 180)
    paper = plan_stage(Config(strength="paper"), total=200, start=None, checks=1, steps=160)
    assert paper.deadline == 120
    over = plan_stage(Config(), total=200, start=None, checks=1, steps=200)
    assert over.deadline == 200  # nothing is left of the run: now or never


def test_stage_with_an_unknown_length():
    before = plan_stage(Config(), total=None, start=None, checks=5, steps=50)
    assert (before.latest_start, before.deadline) == (240, None)
    after = plan_stage(Config(), total=None, start=80, checks=9, steps=90)
    assert (after.steps, after.deadline) == (80, 240)


def test_tensor_learning_rates_are_read_without_a_device():
    from ocsfast.optim.param_groups import learning_rate

    assert learning_rate({"lr": torch.tensor(0.25)}) == 0.25


@pytest.mark.parametrize("shape", ["linear", "cubic"])
def test_a_ramp_of_tensors_is_that_of_numbers(shape):
    for step in (0, 3, 10, 14):  # the last lies beyond the planned ten
        plain = Ramp(3.0, 10, shape).total(step)
        tensor = Ramp(3.0, torch.tensor(10.0), shape).total(torch.tensor(float(step)))
        assert float(tensor) == pytest.approx(plain)
