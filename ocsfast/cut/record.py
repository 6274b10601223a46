"""What a cut model remembers of its cut: what it cost while dense, and what it costs now.

The record is a plain dict in an attribute of the model, so copies and pickles of the model have it too.
`ocsfast.save` writes it into the file, and the `config` of a transformers model holds it as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ocsfast.core.config import LATENCY, TARGETS
from ocsfast.core.latency import LatencyRecord
from ocsfast.cut.model_config import describes_itself

ATTRIBUTE = "_ocsfast_cut"  # where a model keeps its record
IN_CONFIG = "ocsfast_cut"  # where its `config` does

# {"dense": {target: cost while dense}, "left": {target: cost now}, of "latency" if that was cut,
#  "kept": [[family, groups kept, groups before]],
#  "widths": [[tensor, axis, indices left]], for some of the axes that were cut}
Record = Mapping[str, Any]


def target_in(record: Record, target: object) -> str:
    """The record's entry for a target.

    A callable of the user's own is taken to scale as FLOPs do, and so is latency where the cut was for
    another target.
    """
    if isinstance(target, LatencyRecord):
        target = LATENCY
    return target if isinstance(target, str) and target in record["dense"] else "flops"


def record_of(model: nn.Module) -> Record | None:
    """The record of a model that was cut; None for a dense one.

    A wrapper has the record of the module inside it that holds more than half of what trains.
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
    """Whether a model has the widths in a record that its config holds.

    It may not have them, because a dense model may have been built from the same config. Names are also
    compared without their first part, because the model may have another head than the one that was cut:
    "bert.encoder..." in one is "encoder..." in the other.
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
    """Set or, with None, remove the record of a model or of a config.

    Returns:
        A function that takes the change back.
    """
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
    """Whether a value that a file or a config holds is a record."""
    try:
        return set(value) == {"dense", "left", "kept", "widths"} and all(
            isinstance(value[part][name], int) and value[part][name] > 0
            for part in ("dense", "left")
            for name in TARGETS
        )
    except (TypeError, KeyError):
        return False
