"""The second engine: Torch-Pruning's DepGraph, its groups written down as `Families`.

Only its tracing is used. It is right on plain convolutional networks, and works on some models that
cannot be exported. What it does not know (grouped convolutions, bare parameters, attention) is left
dense and named. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError
from ocsfast.core.families import Attribute, Axis, Families, Family, Frozen, Product
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.trace.batch import Batch
from ocsfast.grouping.trace.side_effects import undisturbed
from ocsfast.grouping.trace.trees import teach, without_strangers

Labelled = dict[tuple[str, int], Tensor]  # (tensor, axis) -> the group of each index, or -1
# A layer (or a bare parameter) in a group of layers: the module, whether along its outputs, its indices,
# and for each of these the index of the group's first layer that it goes with.
Member = tuple[Any, bool, list[int], list[int]]


def by_depgraph(model: nn.Module, batch: Batch, protected: dict[str, str]) -> Families:
    """Families from DepGraph's groups.

    Args:
        model: the model.
        batch: what it is called with.
        protected: parameters that keep their shape, and why.

    Raises:
        GroupingError: Torch-Pruning is not installed, or it cannot trace the model.
    """
    args, kwargs = batch.args, batch.kwargs
    names = {id(module): name for name, module in model.named_modules()}
    groups, outputs = _traced(model, args, kwargs)
    labels: Labelled = {}
    frozen = []
    families: list[Family] = []
    first = 0
    for members in groups:
        layers = [names[id(module)] for module, out, _, _ in members if out and _is_producer(module)]
        root = members[0][0]
        size = len(members[0][2])
        reason = _obstacle(members, names, protected, outputs)
        if reason or size < 2:
            frozen.append(Frozen(names.get(id(root), "a parameter"), reason or "it has one channel"))
            continue
        for module, out, indices, roots in members:
            for name, axis, length in _axes_of(module, names[id(module)], out):
                groups_of = labels.setdefault((name, axis), torch.full((length,), -1))
                groups_of[torch.tensor(indices)] = first + torch.tensor(roots)
        families.append(Family(layers[0], first, size, tuple(dict.fromkeys(layers))))
        first += size
    modules = dict(model.named_modules())
    return Families(
        families=tuple(families),
        axes=tuple(Axis(name, axis, groups) for (name, axis), groups in labels.items()),
        attributes=tuple(_attributes(modules, labels)),
        macs=tuple(_costs(model, modules, labels, args, kwargs, batch.per)),
        frozen=tuple(frozen),
    )


def _traced(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[list[Member]], set[int]]:
    """DepGraph's groups of layers, and the ids of the layers whose outputs the model returns."""
    try:
        import torch_pruning
    except ImportError as error:
        raise GroupingError(
            "torch-pruning is not installed: pip install ocsfast[torch-pruning]"
        ) from error
    with undisturbed(model, training=False, real=True), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # DepGraph calls the model with one argument; `forward_fn` takes the pair apart again.
            graph = torch_pruning.DependencyGraph().build_dependency(
                model,
                (args, kwargs),
                forward_fn=lambda m, inputs: m(*inputs[0], **inputs[1]),
                verbose=False,
            )
            groups = [list(_members(graph, group)) for group in graph.get_all_groups()]
        except Exception as error:
            raise GroupingError(
                f"torch-pruning cannot trace the model: {type(error).__name__}: {error}"
            ) from error
        return groups, _output_layers(model, args, kwargs)


def _members(graph: Any, group: Any) -> Iterable[Member]:
    """The layers and bare parameters of one of DepGraph's groups."""
    for item in group:
        out = bool(graph.is_out_channel_pruning_fn(item.dep.handler))
        module = item.dep.target.module
        is_dummy = "Dummy" in type(item.dep.target).__name__
        # Torch-Pruning puts modules of its own in the place of operators without parameters.
        is_stand_in = type(module).__module__.startswith("torch_pruning")
        if isinstance(module, (nn.Module, nn.Parameter)) and not is_dummy and not is_stand_in:
            yield module, out, list(item.idxs), list(item.root_idxs)


def _is_producer(module: Any) -> bool:
    """Whether a layer makes new channels; a depthwise convolution passes those of its input on."""
    depthwise = isinstance(module, _ConvNd) and module.groups > 1
    return isinstance(module, (_ConvNd, nn.Linear)) and not depthwise


def _obstacle(
    members: list[Member], names: dict[int, str], protected: dict[str, str], outputs: set[int]
) -> str | None:
    """Why a group of layers has to stay dense; None if it may shrink."""
    for module, out, indices, roots in members:
        if isinstance(module, nn.Parameter):
            return "a bare parameter is coupled with it"
        name = names[id(module)]
        if not isinstance(module, (_ConvNd, nn.Linear, _BatchNorm)):
            return f"{name} is a {type(module).__name__}"
        if isinstance(module, _ConvNd) and module.groups > 1 and module.groups != module.out_channels:
            return f"{name} is a grouped convolution"
        if len(set(indices)) != len(indices) or len(indices) != len(roots):
            return f"{name} takes one index for several channels"
        if out and id(module) in outputs:
            return "model output"
        for tensor, _, length in _axes_of(module, name, out):
            if tensor in protected:
                return protected[tensor]
            if max(indices) >= length:
                return f"torch-pruning counts more channels of {name} than it has"
    return None


def _axes_of(module: Any, name: str, out: bool) -> list[tuple[str, int, int]]:
    """(tensor, axis, size) of a layer's output channels, or of its input channels."""
    if isinstance(module, _BatchNorm):
        held = ("weight", "bias", "running_mean", "running_var")
        return [(f"{name}.{t}", 0, len(v)) for t in held if (v := getattr(module, t)) is not None]
    depthwise = isinstance(module, _ConvNd) and module.groups > 1
    rows = 1 if isinstance(module, _ConvTransposeNd) and not depthwise else 0
    if not (out or depthwise):
        return [(f"{name}.weight", 1 - rows, module.weight.shape[1 - rows])]
    axes = [(f"{name}.weight", rows, module.weight.shape[rows])]
    if module.bias is not None:
        axes.append((f"{name}.bias", 0, len(module.bias)))
    return axes


def _attributes(modules: dict[str, nn.Module], labels: Labelled) -> Iterable[Attribute]:
    """The sizes that a cut has to set in the labelled layers."""
    for (tensor, axis), groups in labels.items():
        path, _, held = tensor.rpartition(".")
        module = modules[path]
        if held != "weight":
            continue
        if isinstance(module, _BatchNorm):
            counted: tuple[str, ...] = ("num_features",)
        elif isinstance(module, nn.Linear):
            counted = ("out_features", "in_features")[axis : axis + 1]
        elif isinstance(module, _ConvNd) and module.groups > 1:
            counted = ("out_channels", "in_channels", "groups")
        else:
            produced = 1 if isinstance(module, _ConvTransposeNd) else 0
            counted = ("out_channels",) if axis == produced else ("in_channels",)
        yield from (Attribute(path, name, groups) for name in counted)


def _costs(
    model: nn.Module,
    modules: dict[str, nn.Module],
    labels: Labelled,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    samples: int,
) -> Iterable[Product]:
    """MACs of each call of a convolution or linear layer, and of everything else as one constant."""
    calls: list[tuple[str, int]] = []  # (layer, MACs for each pair of rows and columns of its weight)

    def record(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            moved = inputs[0] if isinstance(module, _ConvTransposeNd) else output
            width = module.weight.shape[0]
            calls.append((name, moved.numel() // width * module.weight[0, 0].numel()))

        return hook

    # `undisturbed` also removes the hooks that are registered in it.
    with undisturbed(model, training=False, real=True), torch.no_grad():
        for name, module in modules.items():
            if isinstance(module, (_ConvNd, nn.Linear)):
                module.register_forward_hook(record(name))
        rest = count_macs(lambda: model(*args, **kwargs))
    for name, positions in calls:
        weight: Any = modules[name].weight
        rest -= positions * weight.shape[0] * weight.shape[1]
        along = [labels.get((f"{name}.weight", axis)) for axis in (0, 1)]
        sizes = [size for size, g in zip(weight.shape[:2], along, strict=True) if g is None]
        coefficient = positions * int(torch.tensor(sizes, dtype=torch.int64).prod())
        yield Product(coefficient // samples, along[0], along[1], name)
    if rest:
        yield Product(rest // samples, None, None, "")


def _output_layers(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """The ids of the layers whose output channels reach the model's outputs.

    Autograd's graph is followed from the outputs back to the first product or convolution on each way.
    """
    owner = {id(p): id(m) for m in model.modules() for p in m.parameters(recurse=False)}
    output = model(*args, **kwargs)
    teach(output)
    outputs = [x for x in pytree.tree_leaves(without_strangers(output)) if isinstance(x, Tensor)]
    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen: set[Any] = set()
    found: set[int] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = node.name()
        held = {owner.get(id(p)) for p in _parameters_of(node)}
        found |= {h for h in held if h is not None}
        if not any(word in kind for word in ("Convolution", "Addmm", "MmBackward")):
            stack.extend(f for f, _ in node.next_functions if f is not None)
    return found


def _parameters_of(node: Any) -> Iterable[Tensor]:
    """Parameters that enter an autograd node, directly or transposed."""
    for source, _ in node.next_functions:
        if source is not None and source.name().startswith("TBackward"):
            source = source.next_functions[0][0]
        if source is not None and hasattr(source, "variable"):
            yield source.variable
