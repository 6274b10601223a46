"""What a checkpoint file holds, and the checks that it fits a model.

A file is a safetensors file: the tensors of the state dict, each under its first name, and in the
metadata one JSON object with the structure (see `Structure`). Every check is made before the model is
touched, and raises a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ocsfast.core.errors import CheckpointError
from ocsfast.cut.record import Record, is_record
from ocsfast.cut.sizes import Size, size_attributes

KEY = "ocsfast"  # the entry of the metadata that holds the structure
FORMAT = 3  # the version of the format, which `load` compares


@dataclass(frozen=True)
class Structure:
    """What a file says of its model besides the tensors."""

    class_name: str
    aliases: dict[str, str]  # a tied tensor's further name -> the name it is stored under
    attributes: dict[str, dict[str, int]]  # module -> size attribute -> value
    cut: Record | None  # None: the model was dense


def written_structure(
    model: nn.Module,
    class_name: str,
    aliases: Mapping[str, str],
    cut: Record | None,
    tensors: Mapping[str, Tensor],
) -> str:
    """The JSON that describes a model; `tensors` are those that the file will hold, on the CPU."""
    structure = {
        "format": FORMAT,
        "class": class_name,
        "aliases": aliases,
        "attributes": _sizes_of(model),
        "cut": cut,
    }
    structure["checksum"] = checksum(structure, tensors)
    return json.dumps(structure)


def read_structure(metadata: Mapping[str, str], path: str, tensors: Mapping[str, Tensor]) -> Structure:
    """Read the structure in a file's metadata, and check the type of every field and the checksum.

    Raises:
        CheckpointError: the file is not one of ours, of another format, malformed or damaged.
    """
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
    return Structure(raw["class"], aliases, attributes, raw["cut"])


def checksum(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of everything that a file says, except the checksum itself."""
    said = {name: value for name, value in structure.items() if name != "checksum"}
    crc = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        if tensor.numel():
            crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return crc


def check_tensors(path: str, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Check that the file's tensors (`new`) can be what a cut leaves of the model's (`old`).

    Raises:
        CheckpointError: other names, another dtype, or a shape that is larger than the model's.
    """
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


def checked_sizes(
    path: str, model: nn.Module, attributes: Mapping[str, Mapping[str, int]]
) -> list[Size]:
    """The size attributes to set: those that the model has, none larger than it is now.

    A private attribute, or an entry of a dict, may also be a counter. It is set where the file has less.

    Raises:
        CheckpointError: any other attribute is missing, unknown or larger.
    """
    modules, own = dict(model.named_modules()), _sizes_of(model)
    if _public(own) != _public(attributes):
        raise CheckpointError(f"{path}: its size attributes are not the model's")
    result = []
    for module, sizes in attributes.items():
        for name, size in sizes.items():
            now = own.get(module, {}).get(name)
            fits = now is not None and min(1, now) <= size <= now
            if not fits and _is_public(name):
                raise CheckpointError(f"{path}: {module}.{name} is {size}, the model's is {now}")
            if fits:
                result.append((modules[module], name, size))
    return result


def _is_public(name: str) -> bool:
    return not name.startswith("_") and "['" not in name


def _public(attributes: Mapping[str, Mapping[str, int]]) -> set[tuple[str, str]]:
    """(module, name) of the attributes that are no private ones and no entries of dicts."""
    return {(module, name) for module, own in attributes.items() for name in own if _is_public(name)}


def _sizes_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """The size attributes of each module that has any."""
    return {name: sizes for name, module in model.named_modules() if (sizes := size_attributes(module))}


# (dim of the weight, attribute that counts its indices, attribute by which that is divided)
_Rule = tuple[int, str, str]

# torch's layers whose attributes repeat the shape of their weight.
_WEIGHTS: tuple[tuple[tuple[type[nn.Module], ...], tuple[_Rule, ...]], ...] = (
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
_VECTORS = ("bias", "running_mean", "running_var")  # one entry for each output channel of such a layer


def check_layers(
    path: str,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    aliases: Mapping[str, str],
    sizes: list[Size],
) -> None:
    """Check that the size attributes of torch's own layers agree with the tensors they belong to.

    Raises:
        CheckpointError: naming the attribute or the tensor that does not.
    """
    values = {(id(module), name): size for module, name, size in sizes}
    for name, module in model.named_modules():
        weight_name = f"{name}.weight".lstrip(".")
        weight = tensors.get(aliases.get(weight_name, weight_name))
        rules = next((rules for kinds, rules in _WEIGHTS if isinstance(module, kinds)), ())
        if weight is None or not rules:
            continue
        for dim, attribute, divisor in rules:
            size, parts = values.get((id(module), attribute)), values.get((id(module), divisor), 1)
            if size is not None and size != weight.shape[dim] * (parts or 1):
                raise CheckpointError(
                    f"{path}: {name}.{attribute} is {size}, its weight has shape {tuple(weight.shape)}"
                )
        wanted = values.get((id(module), "out_channels"), values.get((id(module), "out_features")))
        if wanted is None:
            wanted = weight.shape[0]
        for held, vector in _vectors_of(name, tensors):
            if vector.shape[0] != wanted:
                raise CheckpointError(
                    f"{path}: {name}.{held} has {vector.shape[0]} entries, its layer {wanted}"
                )


def _vectors_of(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for held in _VECTORS:
        vector = tensors.get(f"{name}.{held}".lstrip("."))
        if vector is not None:
            yield held, vector
