"""Tracing: the model's aten graph, operators kept whole, the model left as it was."""

from __future__ import annotations

import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, is_dataclass
from types import MethodType
from typing import Any

import torch
import torch.fx.traceback
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ocsfast.core.errors import GroupingError, OcsfastError
from ocsfast.grouping.trace.inline import inline
from ocsfast.grouping.trace.origins import origins
from ocsfast.grouping.trace.side_effects import Kept, as_it_was

logger = logging.getLogger("ocsfast")

BATCH = 2  # a dimension of size 1 hides structure, so one sample would not do


@dataclass(frozen=True, eq=False)
class Trace:
    """An exported graph. Its placeholders are the state, in the order of `state`, then the inputs."""

    graph: torch.fx.GraphModule
    state: tuple[str | None, ...]  # parameter or buffer name of each state placeholder; None: a constant
    constants: dict[int, Tensor]  # value of each constant, by the number of its placeholder
    samples: int  # how many samples that is
    outputs: tuple[str, ...]  # what the model calls each of its outputs, e.g. "logits" or "0"
    left: tuple[str, ...]  # further outputs: what the pass left behind, by the place, a hook's store say
    structure: pytree.TreeSpec  # what the outputs stand in
    autocast: bool  # whether the model's own code asks for lower precision somewhere
    read: frozenset[tuple[str, str]]  # modules' integer attributes that the pass used: (module, name)

    def run(self, interpreter: torch.fx.Interpreter, state: dict[str, Tensor], inputs: Any) -> Any:
        """Run the graph on other state and inputs, all float64; its outputs, flat, and what it left."""
        constants = {n: c.double() if c.is_floating_point() else c for n, c in self.constants.items()}
        values = [constants[n] if name is None else state[name] for n, name in enumerate(self.state)]
        return interpreter.run(*values, *pytree.tree_leaves(inputs))


def with_batch(
    args: tuple[Any, ...], kwargs: dict[str, Any], samples: int = BATCH
) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """The inputs cut or repeated to so many samples, where one leading size is common to all tensors.

    Where none is, they stay, and the first tensor says how many samples there are.

    Raises:
        GroupingError: the inputs hold no sample.
    """
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    leading = [x.shape[0] for x in leaves if x.dim() > 0]
    size = leading[0] if leading else 1
    if size == 0:
        raise GroupingError("the example inputs hold no sample: pass a batch of one at least")
    if len(set(leading)) != 1 or any(x.dim() == 0 for x in leaves):
        return args, kwargs, size

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach()
        return x[:samples].clone() if size >= samples else x[:1].expand(samples, *x.shape[1:]).clone()

    args, kwargs = pytree.tree_map(resize, (args, kwargs))
    return args, kwargs, samples


def _key(entry: Any) -> str:
    """A step on the way to an output: the key, number or name it has in what holds it."""
    return str(next(getattr(entry, a) for a in ("key", "idx", "name") if hasattr(entry, a)))


@contextmanager
def undisturbed(model: nn.Module, *, training: bool, real: bool = False) -> Iterator[Kept]:
    """Put the model in a mode; afterwards it is as it was, whatever ran in between (see `as_it_was`).

    A language model keeps no cache of keys and values meanwhile.

    Args:
        real: whether the model is run on numbers, not only traced.
    """
    with as_it_was(model, weights=real or changes_modes(model)) as kept:
        try:
            model.train(training)
        except NotImplementedError as error:  # an exported program's module
            raise GroupingError(f"the model has one mode only ({error}): pass its source") from error
        held = (vars(module).get("config") for module in model.modules())
        configs: list[Any] = [config for config in held if getattr(config, "use_cache", False)]
        for config in configs:
            config.use_cache = False
        yield kept


def changes_modes(model: nn.Module) -> bool:
    """Whether code of its own runs where a mode is set: adapters are merged into weights there."""
    kinds = {type(module) for module in model.modules()}
    return any(k.train is not nn.Module.train or k.eval is not nn.Module.eval for k in kinds)


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    training: bool,
    samples: int = BATCH,
    gradients: bool = False,
) -> Trace:
    """Export the model's forward pass in one mode.

    Args:
        samples: how many, where the inputs say (see `with_batch`).
        gradients: whether what the model's code runs without gradients is told from the rest.

    Raises:
        GroupingError: the model cannot be exported; the message names the place and the cause.
    """
    given = args, kwargs
    args, kwargs, samples = with_batch(args, kwargs, samples)
    try:
        with (
            undisturbed(model, training=training) as kept,
            torch.set_grad_enabled(gradients),
            all_outputs(model, kept),
            origins(model) as read,
            warnings.catch_warnings(),
        ):
            # Of attributes that were assigned: they are put back.
            warnings.filterwarnings("ignore", "The tensor attribute", UserWarning)
            with quiet():
                program = torch.export.export(model, args, kwargs, strict=False)
    except OcsfastError:  # a forward= of ours, which says more
        raise
    except Exception as error:  # export raises whatever the model's own code raises, and more
        mode = " in training mode" if training else ""
        advice = "" if gradients else f". {_way_out(error)}"  # what asks for gradients takes no forward=
        logger.debug("torch.export: %s", error, exc_info=error)  # hundreds of lines
        raise GroupingError(
            f"the model cannot be exported{mode}: {_cause(error)}{_resized(given, samples)}{advice}"
        ) from None
    state: list[str | None] = []
    constants: dict[int, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state.append(spec.target)
        elif spec.kind == InputKind.CONSTANT_TENSOR:
            constants[len(state)] = program.constants[str(spec.target)]
            state.append(None)
        elif spec.kind != InputKind.USER_INPUT:
            raise GroupingError(
                f"the model cannot be exported: it holds a {spec.kind.name.lower()} input"
            )
    autocast = inline(program.graph_module)
    spec = program.call_spec.out_spec
    assert spec is not None
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    own, left = numbered if _returns_both(model) else (numbered, {})
    return Trace(
        program.graph_module,
        tuple(state),
        constants,
        samples,
        _names(own),
        tuple(left),
        pytree.tree_structure(own),
        autocast,
        frozenset(read),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what is printed to stderr; drop it after an error: torch prints whole graphs then."""
    with redirect_stderr(io.StringIO()) as held:
        yield
    sys.stderr.write(held.getvalue())


def require_runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse inputs that the model fails on without any tracing.

    Raises:
        GroupingError: in both modes; with what the model says in evaluation.
    """
    said = []
    for training in (False, True):
        with undisturbed(model, training=training, real=True), torch.no_grad():
            try:
                model(*args, **kwargs)
                return
            except OcsfastError:
                raise
            except Exception as error:
                said.append(_cause(error))
    leaves = pytree.tree_leaves((args, kwargs))
    given = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in leaves)
    raise GroupingError(
        f"the model fails on example_inputs= ({given[:200]}): {said[0]}. Pass one batch as the model "
        "takes it"
    )


@contextmanager
def all_outputs(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Let the model return what it returns and, beside it, the tensors that its pass left behind.

    A loss may read those as well as the outputs: features for distillation in the store of a hook, say.
    The dataclasses among the outputs are made known to torch, which takes them apart.
    """

    if not _returns_both(model):
        yield
        return

    def register(output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if is_dataclass(leaf) and not isinstance(leaf, type):
                torch.export.register_dataclass(type(leaf))
                register(leaf)

    depth = 0  # of a forward= that calls the model itself: the outer call alone returns both

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def both(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal depth
        depth -= 1
        if depth:
            return None
        register(output)
        traced = {name: t for name, t in kept.left_behind().items() if type(t) is not Tensor}
        return output, traced

    handles = model.register_forward_pre_hook(enter), model.register_forward_hook(both)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _returns_both(model: nn.Module) -> bool:
    """Whether hooks see the model's output as its callers do: not with a `__call__` of its own."""
    return type(model).__call__ is nn.Module.__call__


def _names(numbered: Any) -> tuple[str, ...]:
    """What each output is called, from a structure of their numbers."""
    paths = pytree.tree_flatten_with_path(numbered)[0]
    return tuple(".".join(map(_key, path)) or "0" for path, _ in paths)


@contextmanager
def forward_as(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the model, and copies of it, run `forward(model, ...)` instead of its own forward pass.

    Inside `forward` they have their own.
    """
    own = vars(model).get("forward")
    bound = isinstance(own, MethodType) and own.__self__ is model

    def instead(self: nn.Module, *args: Any, **kwargs: Any) -> Any:  # export wants a plain function
        outer = vars(self).pop("forward")
        if own is not None:
            vars(self)["forward"] = MethodType(own.__func__, self) if bound else own
        try:
            return forward(self, *args, **kwargs)
        finally:
            vars(self)["forward"] = outer

    vars(model)["forward"] = MethodType(instead, model)  # a copy's method is bound to the copy
    try:
        yield
    finally:
        del vars(model)["forward"]
        if own is not None:
            vars(model)["forward"] = own


def _cause(error: BaseException) -> str:
    """One line: the last place in the user's code that the error passed, and its first line."""
    passed = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    where = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    user = [place for place in (*passed, *where) if not re.search(OURS, place[0])]
    place = f" at {user[-1][0]}:{user[-1][1]}" if user else ""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}{place}: {first[:300]}".rstrip(".")


# Frames that no user wrote; ours stand between torch's.
OURS = r"^<|/torch/|/ocsfast/(grouping/|as_graph\.py)"


def _resized(given: tuple[tuple[Any, ...], dict[str, Any]], samples: int) -> str:
    """What was done to the example inputs, where that may be why they did not do."""
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor) and x.dim()]
    if not leaves or with_batch(*given, samples)[2] == len(leaves[0]):
        return ""
    return f" (with {samples} samples, made of the example inputs' {len(leaves[0])})"


def _way_out(error: BaseException) -> str:
    other = "example_inputs= of the form that inference takes"
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        return f"It branches on its data: pass {other}, or forward= (a function of model and inputs)"
    return f"Pass {other}, or in forward= what to run instead (a function of model and inputs)"


def module_of(node: torch.fx.Node) -> str:
    """Qualified name of the innermost module whose forward pass the node belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path)  # "@1": the second call of one module


def source_of(node: torch.fx.Node) -> str:
    """file:line of the user's statement that made the node, or its module."""
    stack = node.meta.get("stack_trace") or ""
    noted = re.findall(r"  # at (.+:\d+)$", stack, re.MULTILINE)  # by a program of `literals`
    if noted:
        return str(noted[-1])
    where = re.findall(r'File "([^"]+)", line (\d+)', stack)
    return f"{where[-1][0]}:{where[-1][1]}" if where else module_of(node) or "the model's forward"
