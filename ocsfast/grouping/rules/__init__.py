"""One function an operator: what it says about the labels that flow through it.

Importing this package registers every rule.
"""

from ocsfast.grouping.rules import (
    copies,
    detection,
    factories,
    indexing,
    layers,
    patches,
    pointwise,
    products,
    quantization,
    rearrangement,
    recurrent,
    reductions,
)

__all__ = [
    "copies",
    "detection",
    "factories",
    "indexing",
    "layers",
    "patches",
    "pointwise",
    "products",
    "quantization",
    "rearrangement",
    "recurrent",
    "reductions",
]
