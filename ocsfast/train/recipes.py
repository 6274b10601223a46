"""How a network is trained: everything the optimizer and its schedule need, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ocsfast.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a learning-rate schedule that is stepped once an iteration."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    momentum: float = 0.9
    nesterov: bool = False
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[float, ...] = ()  # shares of the run; the rate is multiplied by `gamma` there
    gamma: float = 0.2
    preset: Literal["cifar", "imagenet"] | None = None  # `ocsfast.Config.paper(preset)`
    preset_epochs: int = 0  # the run that the preset's epoch numbers are meant for
    image_size: int = 32  # of image folders; data sets have their own
    resized_crop: bool = False  # ImageNet's augmentation instead of a padded crop, for image folders

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "batch size": self.batch_size, "image size": self.image_size}
        for what, number in whole.items():
            if number < 1:
                raise ConfigError(f"{what} is {number}: it must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr is {self.lr}: it must be a positive number")


RECIPES = ("default", "paper-cifar", "paper-imagenet")


def recipe(name: str, data: str, arch: str) -> Recipe:
    """The recipe of that name for a data set and an architecture.

    "default": short cosine runs. "paper-cifar" and "paper-imagenet": Table 8 of the paper. Where the
    paper says "momentum 0.9" its released CIFAR code uses Nesterov's, and the published accuracies
    come from that code, so it does here.
    """
    if name == "default":
        epochs = {"digits": 40, "fashion-mnist": 20}.get(data, 40)
        return Recipe(name, epochs=epochs, batch_size=128, lr=0.1, weight_decay=5e-4)
    if name == "paper-cifar":
        return Recipe(
            name,
            epochs=300,
            batch_size=128,
            lr=0.1,
            weight_decay=5e-4,
            nesterov=True,
            schedule="multistep",
            milestones=(90 / 300, 180 / 300, 240 / 300, 270 / 300),
            preset="cifar",
            preset_epochs=300,
        )
    if name == "paper-imagenet":
        imagenet = Recipe(
            name,
            epochs=130,
            batch_size=256,
            lr=0.1,
            weight_decay=4e-5,
            preset="imagenet",
            preset_epochs=130,
            image_size=224,
            resized_crop=True,
        )
        return (
            replace(imagenet, epochs=150, preset_epochs=150, lr=0.05)
            if arch == "mobilenet_v2"
            else imagenet
        )
    raise ConfigError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")


def learning_rate_factor(recipe: Recipe, done: float) -> float:
    """What the initial learning rate is multiplied by when the share `done` of the run is over."""
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return recipe.gamma ** sum(done >= milestone for milestone in recipe.milestones)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, iterations: int) -> LambdaLR:
    """The schedule over `iterations` optimizer steps."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step / iterations))
