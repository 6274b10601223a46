"""What may be pruned, as the user says it: by layers, by kinds of groups, by outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ocsfast.core.errors import ConfigError
from ocsfast.core.families import DEFAULT_KINDS, names_match
from ocsfast.grouping.trace.export import Trace

# What transformers' models return beside what a loss reads. These outputs keep their shape only where
# the model returns nothing else.
INNER_OUTPUTS = (
    *("past_key_values*", "*hidden_state", "*hidden_states", "*attentions", "*cache_params*"),
    *("pooler_output", "vision_model_output", "text_model_output"),
)


@dataclass(frozen=True)
class Scope:
    """What may go. `Config` has checked the values.

    Attributes:
        keep: modules, or shell patterns of module or parameter names. Their parameters keep their
            shapes.
        only: modules or patterns too. If any are given, no other layer loses output channels.
        kinds: the kinds of groups that may go, of `families.KINDS`.
        outputs: shell patterns of the outputs that keep their shapes, by the names that the model gives
            them ("logits", "0", "features.2"). None: all but INNER_OUTPUTS.
        forward: a function that is traced instead of the model's own forward pass, called with the model
            and the example inputs, for a model whose own pass branches on its data. Parameters that it
            does not use keep their shapes.
    """

    keep: Sequence[str | nn.Module] = ()
    only: Sequence[str | nn.Module] = ()
    kinds: Collection[str] = DEFAULT_KINDS
    outputs: Sequence[str] | None = None
    forward: Callable[..., Any] | None = None


def protected_parameters(model: nn.Module, scope: Scope) -> dict[str, str]:
    """The parameters that must keep their shape, each with the reason.

    Raises:
        ConfigError: an entry of `keep` names no parameter.
    """
    untrained = {n: "requires_grad=False" for n, p in model.named_parameters() if not p.requires_grad}
    return {**untrained, **matched_parameters(model, scope.keep, "keep")}


def matched_parameters(
    model: nn.Module, entries: Sequence[str | nn.Module], option: str
) -> dict[str, str]:
    """The parameters that modules and patterns name, each with the entry that names it.

    Args:
        model: whose parameters.
        entries: modules of the model, or shell patterns of module or parameter names.
        option: what the user calls `entries`, for messages.

    Raises:
        ConfigError: an entry names no parameter.
    """
    names = dict(model.named_parameters())
    found: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, nn.Module):
            own = {id(p) for p in entry.parameters()}
            hits = [name for name, p in names.items() if id(p) in own]
            said = f"{option}={type(entry).__name__}"
        else:
            hits = [name for name in names if names_match(name, [entry])]
            said = f"{option}={entry!r}"
        if not hits:
            raise ConfigError(f"{said} matches no parameter of the model; see model.named_parameters()")
        found.update(dict.fromkeys(hits, said))
    return found


def kept_outputs(
    traces: Mapping[bool, Trace], patterns: Sequence[str] | None
) -> dict[bool, frozenset[int]]:
    """The numbers of the outputs that keep their shape, by mode (True: training).

    What a pass leaves behind is numbered after what it returns. Without patterns it keeps its shape in
    training, where a loss may read it, or where one mode alone could be traced.

    Raises:
        ConfigError: a pattern matches no output.
    """
    kept = {}
    for training, traced in traces.items():
        returned = range(len(traced.outputs))
        left = range(len(returned), len(returned) + len(traced.left))
        if patterns is None:
            inner = {n for n in returned if names_match(traced.outputs[n], INNER_OUTPUTS)}
            chosen = set(returned) - inner or set(returned)
            kept[training] = frozenset(chosen | set(left if training or len(traces) == 1 else ()))
        else:
            named = (names_match(name, patterns) for name in traced.outputs)
            # A pattern for an output's name also matches what is inside that output. For a place it
            # must match the whole: "0.last", an attribute of layer "0", is no part of the output "0".
            places = (any(fnmatchcase(name, pattern) for pattern in patterns) for name in traced.left)
            kept[training] = frozenset(n for n, yes in enumerate((*named, *places)) if yes)
    known = dict.fromkeys(name for t in traces.values() for name in (*t.outputs, *t.left))
    for pattern in patterns or ():
        if not any(names_match(name, [pattern]) for name in known):
            raise ConfigError(
                f"outputs={pattern!r} matches no output of the model; it has {', '.join([*known][:20])}"
            )
    return kept
