"""Every operator of torch: its labels follow from a rule, from others, or it freezes for a reason."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ocsfast.grouping import rules
from ocsfast.grouping.composed import composition
from ocsfast.grouping.operators import FREEZES, HARMLESS, INTERNAL, frozen_by
from ocsfast.grouping.rules.registry import RULES
from ocsfast.grouping.trace.nodes import is_pointwise, operator_name

assert rules  # importing it fills the table
ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^torch==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def overloads(name: str) -> list[Any]:
    packet = getattr(torch.ops.aten, name)
    return [getattr(packet, overload) for overload in packet.overloads()]


def operators() -> dict[str, list[Any]]:
    """The overloads of every operator of aten, by the packet's name."""
    every = torch._C._dispatch_get_all_op_names()
    names = sorted({n.removeprefix("aten::").split(".")[0] for n in every if n.startswith("aten::")})
    return {name: overloads(name) for name in names}


def class_of(targets: list[Any]) -> str | None:
    """What becomes of an operator, by the first of these that holds."""
    name = operator_name(targets[0])
    takes = (a for t in targets for a in t._schema.arguments if a.name != "out")
    if name in RULES:
        return "a rule"
    if is_pointwise(targets[0]):
        return "pointwise"
    if name in HARMLESS or not any("Tensor" in str(argument.type) for argument in takes):
        return "harmless"
    if frozen_by(name) is not None:
        return "freezes"
    if INTERNAL.fullmatch(name):
        return "internal"
    if any(composition(target) is not None for target in targets):
        return "composed"
    return None


def test_every_operator_is_in_a_class():
    """A new torch may bring new operators: what is unknown stays dense, so those only get a warning."""
    classes = {name: class_of(targets) for name, targets in operators().items()}
    unknown = [name for name, found in classes.items() if found is None]
    counts = {found: list(classes.values()).count(found) for found in set(classes.values())}
    assert counts["a rule"] > 300
    assert counts["pointwise"] > 200
    assert counts["composed"] > 100
    if PINNED is not None and torch.__version__.startswith(f"{PINNED[1]}."):
        assert not unknown, f"say in ocsfast/grouping/operators.py what becomes of {unknown}"
    elif unknown:
        warnings.warn(f"operators without a class: {unknown}", stacklevel=1)


def test_no_operator_has_two_answers():
    assert not [name for name in RULES if "::" not in name and frozen_by(name) is not None]
    assert not HARMLESS & set(RULES)
    assert not [name for name in HARMLESS if frozen_by(name) is not None]


def test_every_reason_is_of_an_operator_that_there_is():
    names = {operator_name(targets[0]) for targets in operators().values()}
    for pattern in FREEZES:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_what_freezes_is_in_the_manual():
    manual = (ROOT / "docs" / "grouping.md").read_text()
    for reason in set(FREEZES.values()):
        assert reason in manual, reason


# -- operators that are pointwise although torch tags other overloads of them only --------------------


def given(target: Any, kind: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """Arguments for an overload by the types in its schema; None where a type is not known."""
    values: dict[str, Any] = {}
    for argument in target._schema.arguments:
        wanted = str(argument.type)
        if wanted == "Tensor":
            x = torch.rand(shape) * 0.8 + 0.1
            values[argument.name] = x if kind.is_floating_point else (x * 5).to(kind)
        elif argument.has_default_value():
            continue
        elif wanted in ("Scalar", "number", "int"):
            values[argument.name] = 2
        elif wanted == "float":
            values[argument.name] = 0.5
        else:
            return None
    return values


def untagged() -> list[Any]:
    """Overloads on tensors that only another overload's tag says are pointwise."""
    return [
        target
        for targets in operators().values()
        for target in targets
        if is_pointwise(target)
        and operator_name(target) not in RULES
        and torch.Tag.pointwise not in target.tags
        and "backward" not in target.name()
        and any(str(argument.type) == "Tensor" for argument in target._schema.arguments)
        and not any(argument.is_out for argument in target._schema.arguments)
    ]


def test_overloads_without_a_tag_are_pointwise():
    """Changing one entry of every operand changes that entry of the result alone."""
    seen, missed = [], []
    for target in untagged():
        for kind in (torch.float32, torch.int64, torch.bool):
            torch.manual_seed(0)
            args = given(target, kind, (3, 4))
            if args is None:
                break
            part = {k: v[1:, :3].clone() if isinstance(v, Tensor) else v for k, v in args.items()}
            try:
                whole, small = target(**args), target(**part)
            except (RuntimeError, NotImplementedError):
                continue
            assert whole.shape == (3, 4), target
            assert torch.equal(whole[1:, :3], small), target
            seen.append(target)
            break
        else:
            missed.append(str(target))
    assert len(seen) > 15
    assert len(missed) < 0.2 * len(seen), missed


@pytest.mark.parametrize("name", ["max.dim", "max", "sum", "cumsum", "softmax.int", "sort", "glu"])
def test_others_are_not(name):
    packet, _, overload = name.partition(".")
    assert not is_pointwise(getattr(getattr(torch.ops.aten, packet), overload or "default"))
