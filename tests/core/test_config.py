"""Options: what is accepted, and what is said about the rest."""

import pytest
from torch import nn

from ocsfast import Config, ConfigError
from ocsfast.api.calls import checked_ratio, options_of
from ocsfast.choice.budget import budget_of
from ocsfast.core.config import make_config


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0, "between 0 and 1"),
        (1, "between 0 and 1"),
        (1.5, "did you mean 0.5?"),
        (50, "did you mean 0.5?"),
        (-0.3, "between 0 and 1"),
        (float("nan"), "NaN"),
        (float("inf"), "between 0 and 1"),
        ("half", "a number"),
        (True, "a number"),
    ],
)
def test_a_bad_ratio_is_refused(ratio, said):
    with pytest.raises(ConfigError, match=r".*") as error:
        checked_ratio(ratio)
    assert said in str(error.value)


def test_budget_takes_the_ratio_as_written():
    assert budget_of(10**18, 0.7) == 3 * 10**17
    assert budget_of(10, 0.3) == 7
    assert budget_of(11, 0.5) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"penalty": "ridge"},
            "penalty='ridge' is not known: use one of auto, both, lasso, shrink, none",
        ),
        ({"criterion": "l3"}, "criterion='l3'"),
        ({"target": {"flops": 1, "time": 1}}, "'time' is not one of flops, params, bytes"),
        ({"target": {"flops": 0}}, "target['flops']=0"),
        ({"target": {}}, "target={} is not known"),
        ({"target": "speed"}, "target='speed'"),
        ({"lag": 0}, "lag=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"nats": -1}, "nats=-1"),
        ({"max_family_ratio": 0}, "max_family_ratio=0"),
        ({"span": 1.0}, "span=1.0"),
        ({"deadline": 1.5}, "deadline=1.5"),
        ({"deadline": 0}, "deadline=0"),
        ({"total_steps": True}, "total_steps=True"),
        ({"check_every": "often"}, "check_every='often'"),
        ({"check_every": 0}, "check_every=0"),
        ({"max_residual": 0}, "max_residual=0"),
        ({"keep": (3,)}, "keep= holds 3"),
        ({"tua": 1e-3}, "did you mean tau=?"),
    ],
)
def test_a_bad_option_is_refused(options, said):
    with pytest.raises(ConfigError) as error:
        make_config(options)
    assert said in str(error.value)


def test_keep_takes_one_or_many():
    layer = nn.Linear(2, 2)
    assert make_config({"keep": "fc"}).keep == ("fc",)
    assert make_config({"keep": layer}).keep == (layer,)
    assert make_config({"keep": ["fc", layer]}).keep == ("fc", layer)


def test_the_presets_are_the_papers():
    cifar, imagenet = Config.paper("cifar"), Config.paper("imagenet")
    assert (cifar.lambda0, cifar.delta, cifar.delta_every, cifar.epsilon) == (1e-4, 1e-4, 1, 1e-3)
    assert (imagenet.lambda0, imagenet.delta, imagenet.delta_every, imagenet.tau) == (
        1e-4,
        1e-4,
        2,
        1e-4,
    )
    assert (cifar.sparsify_from, imagenet.sparsify_from) == (30, None)
    assert cifar.strength == imagenet.strength == "paper"
    assert cifar.growth == imagenet.growth == "linear"
    assert cifar.max_residual is None
    assert (cifar.give_back, imagenet.give_back, Config().give_back) == (False, False, True)
    assert Config.paper("cifar", deadline=90).deadline == 90
    with pytest.raises(ConfigError, match="'cifar' or 'imagenet'"):
        Config.paper("mnist")


def test_the_penalty_leaves_gradients_alone_where_scores_read_them():
    assert Config().settled_penalty() == Config(criterion="l1").settled_penalty() == "both"
    for criterion in ("taylor", "taylor_state", "obd", "obd_state", lambda w, grad, state: w * grad):
        assert Config(criterion=criterion).settled_penalty() == "shrink"
        assert options_of(Config(), {"criterion": criterion}).settled_penalty() == "shrink"
    assert Config(criterion="taylor", penalty="both").settled_penalty() == "both"
    assert Config(penalty="none").settled_penalty() == "none"
    assert Config().plain()["penalty"] == "both"
