"""A model's forward pass as a graph of aten operators, kept whole; the model is left as it was."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError, OcsfastError
from ocsfast.grouping.trace.batch import BATCH, with_batch
from ocsfast.grouping.trace.data_sizes import set_data_sizes
from ocsfast.grouping.trace.failures import cause, way_out
from ocsfast.grouping.trace.inlining import inline
from ocsfast.grouping.trace.nodes import name_sliced
from ocsfast.grouping.trace.numbers import KnownNumbers
from ocsfast.grouping.trace.origins import origins
from ocsfast.grouping.trace.outputs import all_outputs, names_of, returns_both
from ocsfast.grouping.trace.packed import FullLength
from ocsfast.grouping.trace.side_effects import undisturbed
from ocsfast.grouping.trace.stand_ins import WrittenData
from ocsfast.grouping.trace.trees import hidden

logger = logging.getLogger("ocsfast")


class NotExported(GroupingError):
    """The model cannot be exported.

    Attributes:
        why: the cause, without the way out.
    """

    def __init__(self, why: str, advice: str = "") -> None:
        super().__init__(why + advice)
        self.why = why


@dataclass(frozen=True, eq=False)
class Trace:
    """An exported graph.

    Its placeholders are the model's state, in the order of `state`, then the inputs. Its outputs are
    what the model returns, in the order of `outputs`, then what its pass leaves behind, in the order of
    `left` (see `outputs.py`).
    """

    graph: torch.fx.GraphModule
    state: tuple[str | None, ...]  # name of the parameter or buffer; None: a constant tensor
    constants: dict[int, Tensor]  # the constants, by the number of their placeholder
    samples: int  # the size of dim 0 of the inputs: how many they hold, where they are a batch
    outputs: tuple[str, ...]  # the model's names for what it returns: "logits", "0"
    left: tuple[str, ...]  # places of what it leaves behind: "features[0]"
    structure: pytree.TreeSpec  # the tuples, lists and dicts around the outputs
    autocast: bool  # whether the model's own code enters autocast
    read: frozenset[tuple[str, str]]  # (module, name) of the integer attributes that the pass used

    def run(self, interpreter: torch.fx.Interpreter, state: dict[str, Tensor], inputs: Any) -> Any:
        """Run the graph in float64 on other state and inputs.

        Args:
            interpreter: made from `graph`; it runs the nodes.
            state: tensors by name, float64 where they are floating-point.
            inputs: (args, kwargs) of the form that was traced.

        Returns:
            A flat sequence: the outputs, then what the pass left behind.
        """
        constants = {n: c.double() if c.is_floating_point() else c for n, c in self.constants.items()}
        values = [constants[n] if name is None else state[name] for n, name in enumerate(self.state)]
        return interpreter.run(*values, *pytree.tree_leaves(hidden(inputs)))


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
    samples: int | None = BATCH,
    gradients: bool = False,
) -> Trace:
    """Export the model's forward pass in one mode.

    Args:
        model, args, kwargs: one call of the model.
        training: the mode.
        samples: how many to trace with, where the inputs allow it (see `with_batch`); None: as given.
        gradients: whether the graph detaches what the model's code runs under `torch.no_grad`. It is
            then to be run in the model's place, so that packed sequences keep their lengths.

    Raises:
        NotExported: the model cannot be exported. The message names the place and the cause.
    """
    given = with_batch(args, kwargs, None)[2]
    args, kwargs, samples = with_batch(args, kwargs, samples)
    try:
        program, read, names = _exported(model, args, kwargs, training, gradients)
    except OcsfastError:  # raised by a `forward=` of this library; it says more
        raise
    except Exception as error:  # torch.export passes on whatever the model's own code raises
        mode = " in training mode" if training else ""
        # as_graph, which asks for gradients, has no forward=.
        advice = "" if gradients else f". {way_out(error)}"
        logger.debug("torch.export: %s", error, exc_info=error)  # hundreds of lines
        made = ""
        if samples != given:
            made = f" (with {samples} samples, made of the example inputs' {given})"
        why = f"the model cannot be exported{mode}: {cause(error)}"
        raise NotExported(why, made + advice) from None
    state, constants = _state_of(program, model)
    autocast = inline(program.graph_module)
    name_sliced(program.graph_module.graph, model)
    if not gradients:
        tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        tensors.update(model.named_buffers(remove_duplicate=False))
        held = [constants[n] if name is None else tensors[name] for n, name in enumerate(state)]
        set_data_sizes(program.graph_module, [*held, *pytree.tree_leaves((args, kwargs))])
    spec = program.call_spec.out_spec
    assert spec is not None
    own, left = spec.children() if returns_both(model) else (spec, pytree.tree_structure({}))
    numbers = list(range(left.num_leaves))
    return Trace(
        graph=program.graph_module,
        state=state,
        constants=constants,
        samples=samples,
        outputs=names or _numbered(own),
        left=tuple(pytree.tree_unflatten(numbers, left)),
        structure=own,
        autocast=autocast,
        read=read,
    )


def _exported(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, gradients: bool
) -> tuple[torch.export.ExportedProgram, frozenset[tuple[str, str]], tuple[str, ...]]:
    """torch's program, the integer attributes that the pass used, and the outputs' names, if known."""
    with (
        undisturbed(model, training=training) as snapshot,
        torch.set_grad_enabled(gradients),
        all_outputs(model, snapshot, whole=gradients) as names,
        KnownNumbers(),
        WrittenData(),
        origins(model) as read,
        _unvalidated(),
        _unwinding(),
        nullcontext() if gradients else FullLength(),
        warnings.catch_warnings(),
    ):
        # torch warns of tensors that the pass assigned to attributes; these are put back.
        warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
        with quiet():
            program = torch.export.export(model, *hidden((args, kwargs)), strict=False)
    return program, frozenset(read), tuple(names)


def _numbered(structure: pytree.TreeSpec) -> tuple[str, ...]:
    """Names for the outputs of a model whose hooks do not see them: numbers, if there are no others."""
    numbers = list(range(structure.num_leaves))
    try:
        return names_of(pytree.tree_unflatten(numbers, structure))
    except Exception:  # the class of an output wants tensors
        return tuple(map(str, numbers))


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Let `torch.distributions` not look at its parameters' numbers, which a trace does not have."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def _unwinding() -> Iterator[None]:
    """Let torch forget modules whose pass has raised what the code around it caught."""
    plain = torch.fx.Tracer.call_module

    def call_module(self: Any, *args: Any, **kwargs: Any) -> Any:
        entered = len(self.module_stack)
        try:
            return plain(self, *args, **kwargs)
        except Exception:
            while len(self.module_stack) > entered:
                self.module_stack.popitem()
            raise

    with patch.object(torch.fx.Tracer, "call_module", call_module):
        yield


def _state_of(
    program: torch.export.ExportedProgram, model: nn.Module
) -> tuple[tuple[str | None, ...], dict[int, Tensor]]:
    """`Trace.state` and `Trace.constants` of a program.

    A parameter that the code takes out of a list of its own is a constant to torch.
    """
    state: list[str | None] = []
    named = (*model.named_buffers(), *model.named_parameters())
    places = {(tensor.data_ptr(), tensor.shape): name for name, tensor in named if tensor.numel()}
    constants: dict[int, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state.append(spec.target)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constant = program.constants[str(spec.target)]
            name = places.get((constant.data_ptr(), constant.shape))
            if name is None:
                constants[len(state)] = constant
            state.append(name)
        elif spec.kind != InputKind.USER_INPUT:
            raise GroupingError(
                f"the model cannot be exported: it holds a {spec.kind.name.lower()} input"
            )
    return tuple(state), constants


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what is printed to stderr; drop it after an error, when torch prints whole graphs."""
    with redirect_stderr(io.StringIO()) as held:
        yield
    sys.stderr.write(held.getvalue())
