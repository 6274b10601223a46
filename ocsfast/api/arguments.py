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

# Where a wrapper holds the model, by the wrapper's class.
_INSIDE = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module"}
# Its other wrappers. Classes are named, so that none of torch's distributed packages has to be imported.
_WRAPPERS = {
    "DistributedDataParallel": "pass the outermost one, or the module that is wrapped",
    "FullyShardedDataParallel": "its flat shards hide the channels: use torch.distributed.fsdp."
    "fully_shard, which keeps each parameter",
}

Inputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]
Unpacked = tuple[tuple[Any, ...], dict[str, Any]]  # one batch as (args, kwargs)


def plain(model: nn.Module) -> nn.Module:
    """The model itself: a compiled or replicated one unwrapped, other wrappers refused.

    Parts in `nn.DataParallel` stay as they are: what they hold is pruned in place, under the same names.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={type(model).__name__}: an nn.Module is expected")
    while isinstance(model, nn.DataParallel) or type(model).__name__ in _INSIDE:
        model = model.get_submodule(_INSIDE.get(type(model).__name__, "module"))
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            if base.__name__ in _WRAPPERS:
                where = f"its part {name}" if name else "the model"
                raise StateError(f"{where} is a {base.__name__}: {_WRAPPERS[base.__name__]}")
    return model


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
