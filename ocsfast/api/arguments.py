"""What users pass to the library, made into what the library works with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ocsfast.core.config import Config
from ocsfast.core.errors import ConfigError, StateError
from ocsfast.core.families import Families
from ocsfast.cut.layout import is_sharded
from ocsfast.cut.model_config import describes_itself
from ocsfast.grouping.engines import group
from ocsfast.grouping.scope import Scope
from ocsfast.grouping.uniform import expressible

# A model's wrappers by class name, so that none of torch's distributed packages has to be imported.
_WRAPPERS = {
    "DistributedDataParallel": "pass the outermost one, or the module that is wrapped",
    "FullyShardedDataParallel": "its flat shards hide the channels: use torch.distributed.fsdp."
    "fully_shard, which keeps each parameter",
    "DataParallel": "pass model.module",
}

Inputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
Unpacked = tuple[tuple[Any, ...], dict[str, Any]]  # one batch as (args, kwargs)


def plain(model: nn.Module) -> nn.Module:
    """The model itself: a compiled or replicated one unwrapped, other wrappers refused."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: an nn.Module is expected")
    wrapped = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
    while (inside := wrapped.get(type(model).__name__)) is not None:
        model = model.get_submodule(inside)
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                where = f"its part {name}" if name else "the model"
                advice = _WRAPPERS[base.__name__]
                if name and base.__name__ == "DataParallel":
                    advice = f"replace it: {_unwrapping(name)}"
                raise StateError(f"{where} is a {base.__name__}: {advice}")
    return model


def _unwrapping(name: str) -> str:
    """The line that puts what a part wraps in its place."""
    if any(step.isdecimal() for step in name.split(".")):
        return f"model.set_submodule({name!r}, model.get_submodule({name!r}).module)"
    return f"model.{name} = model.{name}.module"


def require_whole(model: nn.Module) -> None:
    """Refuse a sharded model where its structure has to be found.

    Raises:
        StateError: with the lines to write instead.
    """
    if is_sharded(model):
        raise StateError(
            "the model is sharded, which hides its channels. Find them before, and attach after it:\n"
            "    families = ocsfast.group(model, example_inputs)\n"
            "    fully_shard(model)  # and make the optimizer\n"
            "    ocsfast.attach(model, ratio, optimizer=optimizer, families=families)"
        )


def require_described(families: Families, model: nn.Module) -> None:
    """Refuse families of another model, or of another state of this one.

    Raises:
        StateError: naming the first parameter that is missing or of another size.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    for axis in families.axes:
        tensor = tensors.get(axis.tensor)
        shape = () if tensor is None else tuple(tensor.shape)
        if axis.axis >= len(shape) or shape[axis.axis] != axis.groups.numel():
            raise StateError(
                f"families= is of another model: {axis.tensor} should have {axis.groups.numel()} "
                f"indices along axis {axis.axis}, here it "
                + ("is missing" if tensor is None else f"has the shape {shape}")
            )


def require_no_choice(options: Config) -> None:
    """Refuse options that say what may go beside families, in which that has been said.

    Raises:
        ConfigError: naming the options.
    """
    default = Config()
    names = ("keep", "only", "kinds", "outputs", "forward", "grouping")
    given = [f"{n}=" for n in names if getattr(options, n) != getattr(default, n)]
    if given:
        raise ConfigError(
            f"{', '.join(given)} beside families=: these say it already. Pass it to ocsfast.group"
        )


def unpacked(inputs: Inputs) -> Unpacked:
    """One batch as (args, kwargs).

    Raises:
        ConfigError: it is none, but an array or a loader.
    """
    kind = type(inputs).__name__
    if kind in ("ndarray", "DataLoader", "generator"):
        raise ConfigError(
            f"example_inputs={kind}: one batch as the model takes it is expected: a tensor, a tuple of "
            "arguments, or a dict of keyword arguments"
        )
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def families_of(model: nn.Module, inputs: Unpacked, config: Config) -> Families:
    """The model's families, as the options say."""
    scope = Scope(config.keep, config.only, config.kinds, config.outputs, config.forward)
    families = group(
        model,
        *inputs,
        scope=scope,
        engine=config.grouping,
        verify=config.verify,
        time_limit=config.time_limit,
    )
    return expressible(model, families) if config.uniform and describes_itself(model) else families
