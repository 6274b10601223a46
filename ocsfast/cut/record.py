"""What a model knows of its cut: how much it cost before, and what it costs now.

The record is a plain dict among the model's attributes, so that copies and pickles of the model carry
it. `ocsfast.save` writes it into the file, and a transformers model's `config` holds it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ocsfast.core.config import TARGETS
from ocsfast.cut.model_config import describes_itself

ATTRIBUTE = "_ocsfast_cut"
IN_CONFIG = "ocsfast_cut"

# {"dense": its cost by target, "left": what it costs now, "kept": [[family, kept, of how many]],
#  "widths": [[tensor, axis, what is left of it]], of some that were cut}
Record = Mapping[str, Any]


def target_in(record: Record, target: object) -> str:
    """Which of the record's targets stands for one: a target of the user's own scales as FLOPs do."""
    return target if isinstance(target, str) and target in record["dense"] else "flops"


def record_of(model: nn.Module) -> Record | None:
    """The record of a model that was cut; None for a dense one.

    Of a wrapper, that of the module inside which holds most of what trains.
    """
    known: Record | None = vars(model).get(ATTRIBUTE)
    if known is None and describes_itself(model):
        said: Any = getattr(model.config, IN_CONFIG, None)
        known = said if is_record(said) and _fits(said, model) else None
    if known is not None:
        return known
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for module in model.modules():
        if module is not model and ATTRIBUTE in vars(module):
            inside = sum(p.numel() for p in module.parameters() if p.requires_grad)
            if 2 * inside > trained:
                return record_of(module)
    return None


def _fits(record: Record, model: nn.Module) -> bool:
    """Whether a model has the widths that a config's record says; a dense one may share the config.

    Its head may be another than that of the model that was cut, so that names begin otherwise.
    """
    shapes = {name.partition(".")[2]: p.shape for name, p in model.named_parameters()}
    shapes.update({name: p.shape for name, p in model.named_parameters()})
    widths = []
    for name, axis, size in record["widths"]:
        shape = shapes.get(name, shapes.get(name.partition(".")[2]))
        if shape is not None and axis < len(shape):
            widths.append(shape[axis] == size)
    return bool(widths) and all(widths)


def mark(holder: Any, record: Record | None, name: str = ATTRIBUTE) -> Callable[[], None]:
    """Let a model, or a config, know of a cut, or with None of none. Returns what takes that back."""
    held = vars(holder)
    before = held.get(name)

    def put(value: Record | None) -> None:
        if value is None:
            held.pop(name, None)
        else:
            held[name] = dict(value)

    put(record)
    return lambda: put(before)


def is_record(value: Any) -> bool:
    """Whether what a file holds is one."""
    try:
        return set(value) == {"dense", "left", "kept", "widths"} and all(
            isinstance(value[part][name], int) and value[part][name] > 0
            for part in ("dense", "left")
            for name in TARGETS
        )
    except (TypeError, KeyError):
        return False
