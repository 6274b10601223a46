"""How a network is trained: everything the optimizer and its schedule need, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ocsfast.core.errors import ConfigError
from ocsfast.train.models import TRANSFORMERS


@dataclass(frozen=True)
class Recipe:
    """An optimizer and a learning-rate schedule that is stepped once an iteration."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD
    nesterov: bool = False
    warmup: float = 0.0  # share of the run over which the rate rises from 0 to `lr`
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
        if not 0 <= self.warmup < 1:
            raise ConfigError(
                f"warmup is {self.warmup}: it is a share of the run, at least 0 and below 1"
            )


OPTIMIZERS = ("sgd", "adamw")
RECIPES = ("default", "paper-cifar", "paper-imagenet")


def recipe(name: str, data: str, arch: str, optimizer: str | None = None) -> Recipe:
    """The recipe of that name for a data set and an architecture.

    "default": short cosine runs, with AdamW and a warm-up for transformers, with SGD for the rest;
    `optimizer` takes the other one. "paper-cifar" and "paper-imagenet": Table 8 of the paper. Where
    the paper says "momentum 0.9" its released CIFAR code uses Nesterov's, and the published accuracies
    come from that code, so it does here.

    Raises:
        ConfigError: an unknown name, or an optimizer that is not the recipe's.
    """
    if name == "default":
        epochs = {"digits": 40, "fashion-mnist": 20}.get(data, 40)
        if (optimizer or ("adamw" if arch in TRANSFORMERS else "sgd")) == "adamw":
            return Recipe(
                name,
                epochs=epochs,
                batch_size=128,
                lr=1e-3,
                weight_decay=0.05,
                optimizer="adamw",
                warmup=0.1,
            )
        return Recipe(name, epochs=epochs, batch_size=128, lr=0.1, weight_decay=5e-4)
    if name in RECIPES and optimizer not in (None, "sgd"):
        raise ConfigError(f"recipe {name} is SGD's: --optimizer {optimizer} goes with the default one")
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
    """What the recipe's learning rate is multiplied by when the share `done` of the run is over."""
    if done < recipe.warmup:
        return done / recipe.warmup
    if recipe.schedule == "cosine":
        after_warmup = (min(done, 1.0) - recipe.warmup) / (1 - recipe.warmup)
        return 0.5 * (1 + math.cos(math.pi * after_warmup))
    return recipe.gamma ** sum(done >= milestone for milestone in recipe.milestones)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer == "adamw":
        decayed, others = _by_decay(model)
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The layers' weight matrices and kernels, and all else.

    All else are biases, norms, the class token and the position embedding: pulling them towards zero
    is no regularisation, and by custom it is left out.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        layer_weight = name.endswith("weight") and parameter.dim() > 1
        (decayed if layer_weight else others).append(parameter)
    return decayed, others


def make_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, iterations: int) -> LambdaLR:
    """The schedule over `iterations` optimizer steps."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(recipe, step / iterations))
