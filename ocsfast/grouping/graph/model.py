"""A model as its own graphs: the same parameters and the same function, every size an attribute.

Where a model's code fixes a width (a literal in a `view`, equal halves, the asserts of
`nn.MultiheadAttention`), its layers stay dense. A traced graph has no such code.
"""

from __future__ import annotations

import linecache
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ocsfast.core.errors import ConfigError, GroupingError, OcsfastError
from ocsfast.cut.record import mark, record_of
from ocsfast.grouping.graph.program import Program, program
from ocsfast.grouping.refusals import require_prunable
from ocsfast.grouping.trace.batch import BATCH, with_batch
from ocsfast.grouping.trace.export import trace
from ocsfast.grouping.trace.failures import cause
from ocsfast.grouping.trace.side_effects import own_inputs, undisturbed
from ocsfast.grouping.trace.stand_ins import QUANTIZING
from ocsfast.grouping.trace.trees import PLAIN, leaves_with_paths, teach, teach_kinds

SAMPLES = 5  # the graphs are traced with 2 and 3 samples, and compared with the model on so many
TOLERANCE = 1e-3  # relative to the largest output: a fused kernel may round in another way


class GraphModel(nn.Module):
    """A model that runs from its traced graphs, one for each mode; `as_graph` makes it.

    Parameters and buffers have the model's names, in plain modules that hold nothing else. It takes the
    arguments that it was traced with, with any number of samples, and returns what the model returns.
    """

    def __init__(
        self,
        model: nn.Module,
        programs: dict[bool, Program],
        inputs: Any,
        outputs: dict[bool, pytree.TreeSpec],
    ) -> None:
        """Take the model's parameters and buffers; `programs` and `outputs` are by mode."""
        super().__init__()
        _fill(self, model, {id(model): self})
        mark(self, record_of(model))
        leaves, self._input = pytree.tree_flatten(inputs)
        self._fixed = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        self._outputs = outputs
        self._name = type(model).__name__
        self._sources = {mode: made.source for mode, made in programs.items()}
        for mode, made in programs.items():
            self.add_module(sizes_name(model, mode), made.sizes)
            for path, momentum in made.momenta.items():
                vars(self.get_submodule(path))["momentum"] = momentum
        self._functions = self._compiled()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._input:
            leaves = self._in_order(args, kwargs)
        for leaf, fixed in zip(leaves, self._fixed, strict=True):
            if fixed is not None and leaf != fixed[0]:
                raise ConfigError(
                    f"the graph of {self._name} was traced with {fixed[0]!r} where it now gets {leaf!r}"
                )
        out = self._functions[self.training](self, *leaves)
        return pytree.tree_unflatten(out, self._outputs[self.training])

    def _in_order(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The leaves of inputs whose keywords come in another order than in the trace."""
        positions, keywords = pytree.tree_unflatten([0] * self._input.num_leaves, self._input)
        if keywords.keys() == kwargs.keys():
            leaves, spec = pytree.tree_flatten((args, {name: kwargs[name] for name in keywords}))
            if spec == self._input:
                return leaves
        raise ConfigError(
            f"the graph of {self._name} was traced with {_spoken(positions, keywords)}, not "
            f"{_spoken(args, kwargs)}: make it with example_inputs= of this form"
        )

    def _compiled(self) -> dict[bool, Callable[..., Any]]:
        return {mode: _function(source, self._name, mode) for mode, source in self._sources.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions, which cannot be copied; they are compiled again from their source."""
        return {name: value for name, value in vars(self).items() if name != "_functions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for spec in (self._input, *self._outputs.values()):
            teach_kinds(spec)
        self._functions = self._compiled()


def graph_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """The model as a `GraphModel`, made from one batch; a `GraphModel` is returned as it is.

    Raises:
        ConfigError, GroupingError, StateError: as `ocsfast.as_graph`.
    """
    if isinstance(model, GraphModel):
        return model
    require_prunable(model)
    for name, module in model.named_modules():
        if type(module).forward in QUANTIZING:
            raise GroupingError(f"{name} quantizes by what it sees, which a graph does not follow")
    _require_plain(args, kwargs)
    programs, outputs = {}, {}
    for mode in (False, True):
        traced, other = (
            trace(model, args, kwargs, training=mode, samples=samples, gradients=True)
            for samples in (BATCH, BATCH + 1)
        )
        if traced.autocast:
            raise GroupingError(
                "the model's own code enters autocast, which its graph cannot: leave it to your loop"
            )
        programs[mode] = program(traced, other, sizes_name(model, mode), training=mode)
        outputs[mode] = traced.structure
    graph = GraphModel(model, programs, (args, kwargs), outputs)
    _compare(model, graph, args, kwargs)
    return graph


def _require_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that no graph can take, or that hold no tensor."""
    teach((args, kwargs))
    leaves = leaves_with_paths((args, kwargs))
    for (which, *path), leaf in leaves:
        if not isinstance(leaf, PLAIN):
            raise ConfigError(
                f"example_inputs= holds a {type(leaf).__name__} ({('args', 'kwargs')[which.idx]}"
                f"{pytree.keystr(tuple(path))}), which a graph cannot take: pass tensors, numbers and "
                "strings"
            )
    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise ConfigError("example_inputs= holds no tensor: pass one batch as the model takes it")


def sizes_name(model: nn.Module, training: bool) -> str:
    """The attribute that holds the sizes of one mode's graph: a name that the model does not use."""
    name = "graph_train" if training else "graph_eval"
    while hasattr(model, name):
        name += "_"
    return name


def _fill(shell: nn.Module, module: nn.Module, known: dict[int, nn.Module]) -> None:
    """Give a plain module another one's parameters and buffers, and a plain module for each child.

    `known` maps the modules that were met, by id, to their plain ones, so that shared ones stay shared.
    """
    shell.training = module.training
    for name, parameter in module._parameters.items():
        shell.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        shell.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        if child is not None and id(child) not in known:
            known[id(child)] = nn.Module()
            _fill(known[id(child)], child, known)
        shell.add_module(name, None if child is None else known[id(child)])


def _function(source: str, name: str, training: bool) -> Callable[..., Any]:
    """Compile a program. Its lines are put where tracebacks find them."""
    number = zlib.crc32(source.encode())  # so that two models of one class have two files
    file = f"<{'training' if training else 'evaluation'} graph of {name}, {number:x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": float("inf")}
    scope["nan"] = float("nan")
    exec(compile(source, file, "exec"), scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _compare(model: nn.Module, graph: nn.Module, args: Any, kwargs: Any) -> None:
    """Compare the graph with the model, in evaluation, on more samples than were traced.

    Raises:
        GroupingError: their outputs differ, or one of them fails.
    """
    args, kwargs, samples = with_batch(args, kwargs, SAMPLES)
    results = []
    for one in (model, graph):
        with undisturbed(one, training=False, real=True):
            torch.manual_seed(0)
            own_args, own_kwargs = own_inputs(args, kwargs)
            try:
                leaves = pytree.tree_leaves(one(*own_args, **own_kwargs))
            except OcsfastError:
                raise
            except Exception as error:
                whose = "the model" if one is model else "the model's graph"
                raise GroupingError(f"{whose} fails with {samples} samples: {cause(error)}") from error
        results.append([leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)])
    for a, b in zip(*results, strict=True):
        scale = float(a.nan_to_num().abs().max()) if a.numel() else 0.0
        if a.shape != b.shape or not torch.allclose(a, b, 0.0, TOLERANCE * scale, equal_nan=True):
            raise GroupingError(
                f"the model's graph, traced with {BATCH} and {BATCH + 1} samples, is not the model with "
                f"{samples}: its code does more with their number than to multiply and add"
            )


def _spoken(args: Any, kwargs: Any) -> str:
    """The form of a call, for messages: "2 positional arguments and mask="."""
    named = "".join(f" and {name}=" for name in kwargs)
    return f"{len(args)} positional argument{'' if len(args) == 1 else 's'}{named}"
