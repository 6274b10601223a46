"""What users pass to the library, made into what the library works with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ocsfast.config import Config, make_config
from ocsfast.errors import ConfigError, StateError
from ocsfast.grouping import Choice, group
from ocsfast.grouping.families import Families
from ocsfast.model_config import describes_itself
from ocsfast.uniform import expressible

# A model's wrappers by class name, so that none of torch's distributed packages has to be imported.
_WRAPPERS = {
    "DistributedDataParallel": "pass the outermost one, or the module that is wrapped",
    "FullyShardedDataParallel": "its shards hide the channels that would be cut",
    "FSDPModule": "its shards hide the channels that would be cut",
    "DataParallel": "pass model.module",
}

Inputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
Unpacked = tuple[tuple[Any, ...], dict[str, Any]]  # one batch as (args, kwargs)


def plain(model: nn.Module) -> nn.Module:
    """The model itself: a compiled or replicated one unwrapped, a sharded one refused."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: an nn.Module is expected")
    wrapped = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
    while (inside := wrapped.get(type(model).__name__)) is not None:
        model = model.get_submodule(inside)
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                where = f"its part {name}" if name else "the model"
                raise StateError(f"{where} is a {base.__name__}: {_WRAPPERS[base.__name__]}")
    return model


def unpacked(inputs: Inputs) -> Unpacked:
    """One batch as (args, kwargs)."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def options_of(config: Config | None, config_fields: dict[str, Any]) -> Config:
    options = make_config(config_fields)
    return options if config is None else replace(config, **config_fields)


def families_of(model: nn.Module, inputs: Unpacked, config: Config) -> Families:
    """The model's families, as the options say."""
    choice = Choice(config.keep, config.only, config.kinds, config.outputs, config.forward)
    families = group(
        model,
        *inputs,
        choice=choice,
        engine=config.grouping,
        verify=config.verify,
        time_limit=config.time_limit,
    )
    return expressible(model, families) if config.uniform and describes_itself(model) else families
