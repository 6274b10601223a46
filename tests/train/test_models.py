"""The architectures have the published sizes (the paper's base models)."""

from __future__ import annotations

import pytest
import torch

from ocsfast.core.errors import ConfigError
from ocsfast.train.loop import count_parameters, macs_per_sample
from ocsfast.train.models import ARCHITECTURES, build_model

PUBLISHED = [  # classes, pixels, GMACs, M parameters, each as it is printed
    ("resnet56", 10, 32, "0.13", "0.86"),
    ("resnet110", 10, 32, "0.25", "1.73"),
    ("vgg16", 10, 32, "0.40", "14.73"),
    ("vgg19", 100, 32, "0.51", "20.09"),
    ("resnet50", 1000, 224, "4.09", "25.56"),
    ("resnet18", 1000, 224, "1.81", "11.69"),
    ("mobilenet_v2", 1000, 224, "0.30", "3.50"),
]


@pytest.mark.parametrize(("arch", "classes", "pixels", "macs", "params"), PUBLISHED)
def test_published_sizes(arch: str, classes: int, pixels: int, macs: str, params: str) -> None:
    # The paper prints 0.26 G for ResNet110 and 4.12 G for ResNet50; torch counts a little less.
    model = build_model(arch, classes, 3)
    assert f"{macs_per_sample(model, (3, pixels, pixels)) / 1e9:.2f}" == macs
    assert f"{count_parameters(model) / 1e6:.2f}" == params


@pytest.mark.parametrize("arch", list(ARCHITECTURES))
def test_grey_images(arch: str) -> None:
    model = build_model(arch, 7, 1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_same_seed_same_weights() -> None:
    first, second = (
        (torch.manual_seed(3), build_model("resnet20", 10, 3).state_dict())[1] for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_architecture_lists_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"resnet57.*choose from.*resnet56"):
        build_model("resnet57", 10, 3)
