"""A cut model's weights on a dense one: files of its own (`save`, `load`), and plain state dicts.

A file holds the weights as safetensors and the structure as JSON in their metadata, never a pickle.
`load` puts both onto a fresh instance of the original class. `fit_on_load` does the same for weights
that came as a plain state dict, in which the structure can be read off the shapes alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ocsfast.api.arguments import Inputs, families_of, plain, unpacked
from ocsfast.api.calls import options_of
from ocsfast.api.checkpoint_format import (
    KEY,
    check_layers,
    check_tensors,
    checked_sizes,
    read_structure,
    written_structure,
)
from ocsfast.api.files import replacing
from ocsfast.choice.targets import make_record
from ocsfast.core.config import Config
from ocsfast.core.errors import CheckpointError
from ocsfast.core.memory_format import in_format_of
from ocsfast.cut.fitting import FitHook, surplus
from ocsfast.cut.layout import Layout, is_sharded
from ocsfast.cut.record import mark, record_of
from ocsfast.cut.removal import Change, Swap, cut_model
from ocsfast.grouping.graph.model import GraphModel


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters, persistent buffers and structure to a file.

    The file is written whole or not at all: what is at `path` is replaced only once the new file is
    complete and on the disk.

    Args:
        model: pruned or dense, on any device and of any dtypes. Of a compiled model, or one in
            DataParallel or DistributedDataParallel, the module inside is written. Tied tensors are
            written once.
        path: the file, by custom "*.safetensors". Its folder must exist.

    Returns:
        None.

    Raises:
        CheckpointError: the path cannot be written; the model is sharded; or its state dict holds
            something besides tensors.

    Examples:
        >>> import os, tempfile, torch, ocsfast
        >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
        >>> ocsfast.save(torch.nn.Linear(2, 2), path)
        >>> os.path.exists(path)
        True
    """
    model = plain(model)
    if is_sharded(model):
        raise CheckpointError(
            "the model is sharded: gather its weights with torch.distributed.checkpoint.state_dict."
            "get_model_state_dict, load them into a plain one (ocsfast.fit_on_load), and save that"
        )
    tensors, aliases = _distinct(_state(model))
    whole = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    structure = written_structure(model, _class_of(model), aliases, record_of(model), whole)
    try:
        with replacing(path) as part:
            save_file(whole, part, metadata={KEY: structure})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {os.fspath(path)}: {error}") from error


# A validation loop may leave inference mode on; tensors made in it could not be trained.
@torch.inference_mode(False)
def load(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Give a fresh instance of a saved model's class the structure and the weights in a file.

    The model keeps its device and memory format. Every parameter stays the same object, so an optimizer
    that was built before remains valid; only state that it had already gathered does not fit. The load
    is strict: names, dtypes, ties and sizes are all checked.

    Args:
        model: as dense as the saved one was when it was built, of the same class and the same dtypes;
            on any device.
        path: a file that `save` wrote.

    Returns:
        None. The model is changed in place.

    Raises:
        CheckpointError: the file is missing, damaged, not one of ours, another model's, or describes
            something that no cut of this model leaves. The model is as it was then.

    Examples:
        >>> import os, tempfile, torch, ocsfast
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> cut = build()
        >>> families = ocsfast.group(cut, torch.randn(4, 8))
        >>> _ = ocsfast.cut_model(cut, families, torch.arange(6) < 2)
        >>> path = os.path.join(tempfile.mkdtemp(), "cut.safetensors")
        >>> ocsfast.save(cut, path)
        >>> model = build()
        >>> ocsfast.load(model, path)
        >>> model[0]
        Linear(in_features=8, out_features=4, bias=True)
    """
    model, path = plain(model), os.fspath(path)
    metadata, tensors = _read(path)
    structure = read_structure(metadata, path, tensors)
    if structure.class_name != _class_of(model):
        raise CheckpointError(
            f"{path} holds a {structure.class_name}, the model is a {_class_of(model)}"
        )
    state, aliases = _distinct(_state(model))
    if aliases != structure.aliases:
        raise CheckpointError(f"{path}: other tensors are tied than in the model")
    check_tensors(path, tensors, state)
    sizes = checked_sizes(path, model, structure.attributes)
    check_layers(path, model, tensors, aliases, sizes)
    # A pruner that waits for weights is told of these as `load_state_dict` would tell it: it then cuts
    # everything that it drives.
    for hook in tuple(model._load_state_dict_pre_hooks.values()):
        fit = getattr(hook, "hook", hook)
        if isinstance(fit, FitHook):
            fit(model, tensors, "")
    swaps = tuple(Swap(state[name], _placed(new, state[name])) for name, new in tensors.items())
    with ExitStack() as undo:
        Change(model, Layout(), swaps, tuple(sizes)).apply(undo)
        undo.callback(mark(model, structure.cut))
        undo.pop_all()


def fit_on_load(
    model: nn.Module, example_inputs: Inputs, *, config: Config | None = None, **config_fields: Any
) -> None:
    """Let the next `load_state_dict` of a dense model cut it to the widths of the weights that arrive.

    Use it for weights of a cut model that were saved as a plain state dict, as by `torch.save` or a
    training framework. Files of `ocsfast.save` do not need it (see `load`), nor does a model that has a
    pruner. The structure is searched for only if shapes arrive that differ from the model's.

    Args:
        model: as dense as the saved one was when it was built.
        example_inputs: one batch as the model takes it: a tensor, a tuple of arguments, or a dict of
            keyword arguments.
        config: the options of the run that cut the saved model. Those count that say what may go, such
            as `keep`.
        **config_fields: fields of `Config`; they override `config`.

    Returns:
        None. A hook is registered on the model; copies and pickles of the model do not have it.

    Raises:
        ConfigError: an option is not valid.
        StateError: from `load_state_dict`, if no cut of the model has the shapes that arrive. Nothing
            has been changed then.

    Examples:
        >>> import torch, ocsfast
        >>> from torch import nn
        >>> def build():
        ...     return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> cut, x = build(), torch.randn(4, 8)
        >>> _ = ocsfast.cut_model(cut, ocsfast.group(cut, x), torch.arange(6) < 2)
        >>> model = build()
        >>> ocsfast.fit_on_load(model, x)
        >>> model.load_state_dict(cut.state_dict())
        <All keys matched successfully>
        >>> model[0]
        Linear(in_features=8, out_features=4, bias=True)
    """
    options = options_of(config, config_fields)

    def fit(module: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
        own = module.state_dict(keep_vars=True)
        if all(shape == own[name].shape for name, shape in shapes.items() if name in own):
            return
        families = families_of(module, unpacked(example_inputs), options)
        pruned = surplus(families, shapes)
        if pruned is not None:
            parameters = dict(module.named_parameters())
            record = make_record(families, pruned, parameters, record_of(module))
            cut_model(module, families, pruned, record=record)

    model.register_load_state_dict_pre_hook(FitHook(fit))  # type: ignore[no-untyped-call]


def _read(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file, on the CPU."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, not copied; tied ones under each of their names."""
    state = model.state_dict(keep_vars=True)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in the model's state is a {type(value).__name__}, not a tensor"
            )
    return dict(state)


def _distinct(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, under its first name; and further name -> first name."""
    first: dict[int, str] = {}
    aliases = {}
    for name, tensor in state.items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
    return {name: state[name] for name in first.values()}, aliases


def _class_of(model: nn.Module) -> str:
    """The name by which a file knows a model's class.

    That of a graph model is fixed, so that its code may move without making old files unreadable.
    """
    if isinstance(model, GraphModel):
        return "ocsfast.as_graph.GraphModel"
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _placed(new: Tensor, old: Tensor) -> Tensor:
    """`new` on the device and in the memory format of `old`."""
    return in_format_of(new.to(old.device), old)
