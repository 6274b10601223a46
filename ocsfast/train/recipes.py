"""How a network is trained: the optimizer, its learning-rate schedule and their constants, by name."""

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
    """An optimizer and a learning-rate schedule, which is stepped after every optimizer step."""

    name: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9  # of SGD
    nesterov: bool = False
    warmup: float = 0.0  # share of the run over which the learning rate rises from 0 to `lr`
    schedule: Literal["cosine", "multistep"] = "cosine"
    milestones: tuple[float, ...] = ()  # shares of the run at which the rate is multiplied by `gamma`
    gamma: float = 0.2
    preset: Literal["cifar", "imagenet"] | None = None  # prune with `ocsfast.Config.paper(preset)`
    preset_epochs: int = 0  # the length of the run that the preset's epoch numbers are meant for
    image_size: int = 32  # of image folders, in pixels; other data sets have their own size
    resized_crop: bool = False  # for image folders: ImageNet's augmentation instead of a padded crop

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
# Table 8 of the paper. It says "momentum 0.9". The paper's CIFAR code, which gave the published
# accuracies, uses Nesterov's momentum, so this recipe does too.
_PAPER_CIFAR = Recipe(
    "paper-cifar",
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
_PAPER_IMAGENET = Recipe(
    "paper-imagenet",
    epochs=130,
    batch_size=256,
    lr=0.1,
    weight_decay=4e-5,
    preset="imagenet",
    preset_epochs=130,
    image_size=224,
    resized_crop=True,
)
RECIPES = ("default", _PAPER_CIFAR.name, _PAPER_IMAGENET.name)


def recipe(name: str, data: str, arch: str, optimizer: str | None = None) -> Recipe:
    """The recipe of that name for a data set and an architecture.

    "default" is a short run with a cosine schedule: AdamW with a warm-up for transformers, SGD for the
    rest, unless `optimizer` says otherwise. "paper-cifar" and "paper-imagenet" are Table 8 of the paper.

    Args:
        name: one of `RECIPES`.
        data: the name of the data set.
        arch: one of `ARCHITECTURES`.
        optimizer: one of `OPTIMIZERS`; None: the recipe's own.

    Raises:
        ConfigError: the name is unknown, or the optimizer is not one that the recipe can use.
    """
    if name == "default":
        return _default_recipe(data, optimizer or ("adamw" if arch in TRANSFORMERS else "sgd"))
    if name in RECIPES and optimizer not in (None, "sgd"):
        raise ConfigError(f"recipe {name} is SGD's: --optimizer {optimizer} goes with the default one")
    if name == "paper-cifar":
        return _PAPER_CIFAR
    if name == "paper-imagenet":
        if arch == "mobilenet_v2":
            return replace(_PAPER_IMAGENET, epochs=150, preset_epochs=150, lr=0.05)
        return _PAPER_IMAGENET
    raise ConfigError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")


def _default_recipe(data: str, optimizer: str) -> Recipe:
    """A short run with a cosine schedule."""
    epochs = {"digits": 40, "fashion-mnist": 20}.get(data, 40)
    if optimizer == "adamw":
        return Recipe(
            "default",
            epochs=epochs,
            batch_size=128,
            lr=1e-3,
            weight_decay=0.05,
            optimizer="adamw",
            warmup=0.1,
        )
    return Recipe("default", epochs=epochs, batch_size=128, lr=0.1, weight_decay=5e-4)


def learning_rate_factor(recipe: Recipe, done: float) -> float:
    """The factor on the recipe's `lr` when the share `done` of the run is over."""
    if done < recipe.warmup:
        return done / recipe.warmup
    if recipe.schedule == "cosine":
        after_warmup = (min(done, 1.0) - recipe.warmup) / (1 - recipe.warmup)
        return 0.5 * (1 + math.cos(math.pi * after_warmup))
    return recipe.gamma ** sum(done >= milestone for milestone in recipe.milestones)


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer, over all parameters of a model."""
    if recipe.optimizer == "adamw":
        decayed, others = _by_decay(model)
        param_groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(param_groups, lr=recipe.lr)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def _by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that weight decay applies to, and the others.

    It applies to the layers' weight matrices and kernels. By custom it does not apply to biases, norms,
    the class token and the position embedding, since pulling these towards zero does not regularise.
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
