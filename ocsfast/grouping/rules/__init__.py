"""What each operator says of the indices that go through it. Importing this registers every rule."""

from ocsfast.grouping.rules import (
    detection,
    factories,
    indexing,
    layers,
    patches,
    pointwise,
    products,
    recurrent,
    reductions,
)

__all__ = [
    "detection",
    "factories",
    "indexing",
    "layers",
    "patches",
    "pointwise",
    "products",
    "recurrent",
    "reductions",
]
