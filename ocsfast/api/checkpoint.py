"""A pruned model in a file: weights as safetensors, structure as JSON in their metadata. No pickle.

`load` puts both onto a fresh instance of the original class. The model keeps its device and its memory
format; dtypes must be equal (convert the fresh model first). Nothing is changed before all is checked.
"""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ocsfast.api.arguments import plain
from ocsfast.core.errors import CheckpointError
from ocsfast.cut.fitting import FitHook
from ocsfast.cut.layout import Layout, is_sharded
from ocsfast.cut.record import Record, is_record, mark, record_of
from ocsfast.cut.removal import Change, Swap, size_attributes
from ocsfast.grouping.graph.model import GraphModel
from ocsfast.ops.plan import is_channels_last

KEY = "ocsfast"  # the metadata entry that holds the structure
FORMAT = 3


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's parameters, persistent buffers and structure, whole or not at all.

    Args:
        model: pruned or dense; the module inside of a compiled or a DistributedDataParallel one is what
            is written. Tied tensors are written once.
        path: the file; what is there is replaced only once the new one is complete and on the disk.

    Raises:
        CheckpointError: the path cannot be written, the model is sharded, or its state holds something
            besides tensors.
    """
    model = plain(model)
    if is_sharded(model):
        raise CheckpointError(
            "the model is sharded: gather its weights with torch.distributed.checkpoint.state_dict."
            "get_model_state_dict, load them into a plain one (ocsfast.fit_on_load), and save that"
        )
    tensors, aliases = _distinct(_state(model))
    whole = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    structure = {
        "format": FORMAT,
        "class": _class_of(model),
        "aliases": aliases,
        "attributes": {
            name: sizes for name, module in model.named_modules() if (sizes := size_attributes(module))
        },
        "cut": record_of(model),
    }
    structure["checksum"] = checksum(structure, whole)
    try:
        with replacing(path) as part:
            save_file(whole, part, metadata={KEY: json.dumps(structure)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {os.fspath(path)}: {error}") from error


@torch.inference_mode(False)  # a mode that a validation loop may leave on: weights would stay in it
def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a fresh instance of the saved model's class its structure and weights, strictly.

    Parameters keep their identity, so an optimizer that was built before stays valid (its state, if it
    has any, does not fit).

    Args:
        model: as dense as when the saved one was built, of the same class and dtypes; on any device.

    Raises:
        CheckpointError: the file is missing, cut short, not one of ours, another model's, or says
            something that no cut of this model can have led to. The model is as it was then.
    """
    model, path = plain(model), os.fspath(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    structure = _parse(metadata, path, tensors)
    if structure.class_name != _class_of(model):
        raise CheckpointError(
            f"{path} holds a {structure.class_name}, the model is a {_class_of(model)}"
        )
    state, aliases = _distinct(_state(model))
    if aliases != structure.aliases:
        raise CheckpointError(f"{path}: other tensors are tied than in the model")
    _check_tensors(path, tensors, state)
    attributes = _checked_attributes(path, model, structure.attributes)
    _check_layers(path, model, tensors, aliases, attributes)
    # A pruner that waits for weights is told of these, as by `load_state_dict`: it cuts what it drives.
    for hook in tuple(model._load_state_dict_pre_hooks.values()):
        fit = getattr(hook, "hook", hook)
        if isinstance(fit, FitHook):
            fit(model, tensors, "")
    swaps = tuple(Swap(state[name], _placed(new, state[name])) for name, new in tensors.items())
    with ExitStack() as undo:
        Change(model, Layout(), swaps, tuple(attributes)).apply(undo)
        undo.callback(mark(model, structure.cut))
        undo.pop_all()


@dataclass(frozen=True)
class _Structure:
    class_name: str
    aliases: dict[str, str]
    attributes: dict[str, dict[str, int]]
    cut: Record | None  # None: the model was dense


def checksum(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything that a file says, but for the checksum itself."""
    said = {name: value for name, value in structure.items() if name != "checksum"}
    crc = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def _parse(metadata: dict[str, str], path: str, tensors: Mapping[str, Tensor]) -> _Structure:
    """The structure in a file's metadata, every type checked."""
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by ocsfast.save. For weights alone: ocsfast.fit_on_load, and then "
            "load_state_dict"
        )
    try:
        raw = json.loads(metadata[KEY])
        if raw["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {raw['format']!r}, this version reads {FORMAT}")
        aliases, attributes = raw["aliases"], raw["attributes"]
        sound = (
            set(raw) == {"format", "class", "aliases", "attributes", "cut", "checksum"}
            and isinstance(raw["class"], str)
            and all(isinstance(x, str) for x in aliases.values())
            and all(
                isinstance(size, int) and not isinstance(size, bool)
                for sizes in attributes.values()
                for size in sizes.values()
            )
            and (raw["cut"] is None or is_record(raw["cut"]))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its structure cannot be read: {error!r}") from error
    if not sound:
        raise CheckpointError(f"{path}: its structure cannot be read: unexpected fields")
    if raw["checksum"] != checksum(raw, tensors):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of what it holds")
    return _Structure(raw["class"], aliases, attributes, raw["cut"])


def _check_tensors(path: str, new: dict[str, Tensor], old: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which the model lacks"
        raise CheckpointError(f"{path} {what}: it is another model's file")
    for name, tensor in new.items():
        have = old[name]
        if tensor.dtype != have.dtype:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, the model's is {have.dtype}. Convert the model first"
            )
        fits = tensor.dim() == have.dim() and all(
            min(1, m) <= n <= m for n, m in zip(tensor.shape, have.shape, strict=True)
        )
        if not fits:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, which no cut of the model's "
                f"{tuple(have.shape)} has: load it into a dense instance"
            )


def _checked_attributes(
    path: str, model: nn.Module, attributes: dict[str, dict[str, int]]
) -> list[tuple[nn.Module, str, int]]:
    """What to set: exactly the size attributes the model has, none larger than it is."""
    modules = dict(model.named_modules())
    own = {name: sizes for name, module in modules.items() if (sizes := size_attributes(module))}
    if {name: set(sizes) for name, sizes in own.items()} != {
        name: set(sizes) for name, sizes in attributes.items()
    }:
        raise CheckpointError(f"{path}: its size attributes are not the model's")
    result = []
    for module, sizes in attributes.items():
        for name, size in sizes.items():
            if not min(1, own[module][name]) <= size <= own[module][name]:
                raise CheckpointError(
                    f"{path}: {module}.{name} is {size}, the model's is {own[module][name]}"
                )
            result.append((modules[module], name, size))
    return result


# The attributes of torch's layers that give their weight's sizes: (dim, attribute, divided by).
_WEIGHTS: tuple[tuple[tuple[type[nn.Module], ...], tuple[tuple[int, str, str], ...]], ...] = (
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        ((0, "in_channels", ""), (1, "out_channels", "groups")),
    ),
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        ((0, "out_channels", ""), (1, "in_channels", "groups")),
    ),
    ((nn.Linear,), ((0, "out_features", ""), (1, "in_features", ""))),
    ((nn.modules.batchnorm._NormBase,), ((0, "num_features", ""),)),
    ((nn.GroupNorm,), ((0, "num_channels", ""),)),
    ((nn.LayerNorm, nn.RMSNorm), ((-1, "normalized_shape", ""),)),
    ((nn.Embedding,), ((0, "num_embeddings", ""), (1, "embedding_dim", ""))),
)


def _check_layers(
    path: str,
    model: nn.Module,
    tensors: dict[str, Tensor],
    aliases: dict[str, str],
    attributes: list[tuple[nn.Module, str, int]],
) -> None:
    """Refuse sizes that contradict the weights they belong to."""
    sizes = {(id(module), name): size for module, name, size in attributes}
    for name, module in model.named_modules():
        full = f"{name}.weight".lstrip(".")
        weight = tensors.get(aliases.get(full, full))
        rules = next((rules for kinds, rules in _WEIGHTS if isinstance(module, kinds)), ())
        for dim, attribute, divisor in rules if weight is not None else ():
            size, parts = sizes.get((id(module), attribute)), sizes.get((id(module), divisor), 1)
            assert weight is not None
            if size is not None and size != weight.shape[dim] * (parts or 1):
                raise CheckpointError(
                    f"{path}: {name}.{attribute} is {size}, its weight has shape {tuple(weight.shape)}"
                )
        for held, tensor in ((n, tensors.get(f"{name}.{n}".lstrip("."))) for n in _VECTORS):
            if rules and weight is not None and tensor is not None:
                wanted = sizes.get((id(module), "out_channels"), sizes.get((id(module), "out_features")))
                if wanted is None:
                    wanted = weight.shape[0]
                if tensor.shape[0] != wanted:
                    raise CheckpointError(
                        f"{path}: {name}.{held} has {tensor.shape[0]} entries, its layer {wanted}"
                    )


_VECTORS = ("bias", "running_mean", "running_var")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, not copied; tied ones under each name."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the model's state is a {type(value).__name__}, not a tensor"
            )
    return dict(state)


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and the other names it goes by."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in state.items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return {name: state[name] for name in first.values()}, aliases


def _class_of(model: nn.Module) -> str:
    """The name that a file knows a model's class by; a graph's does not depend on where its code lies."""
    if isinstance(model, GraphModel):
        return "ocsfast.as_graph.GraphModel"
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _placed(new: Tensor, old: Tensor) -> Tensor:
    """`new` on the device and in the memory format of `old`."""
    placed = new.to(old.device)
    if is_channels_last(old):
        form = torch.channels_last if old.dim() == 4 else torch.channels_last_3d
        placed = placed.contiguous(memory_format=form)
    return placed


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """Write a file whole or not at all: to the path it yields, which then takes the place of `path`.

    A process killed in the midst of it leaves the old file as it was, and a hidden .tmp beside it.
    """
    target = os.path.abspath(os.fspath(path))
    if os.path.isdir(target):
        raise IsADirectoryError(f"{target} is a folder")
    folder, name = os.path.split(target)
    # In the same folder, so that the last step is a rename; its name says whose it is.
    part = os.path.join(folder, f".{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield part
        _flush(part)
        os.replace(part, target)
        _flush(folder)
    finally:
        if os.path.exists(part):
            os.unlink(part)


def _flush(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
