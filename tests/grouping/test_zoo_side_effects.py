"""Models of torchvision, timm and transformers are left as they were by `inspect` and `attach`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers.untouched import attach, unchanged

import ocsfast

BENCH = Path(__file__).parents[2] / "bench"
FEW = ("torchvision/googlenet", "timm/test_resnet", "transformers/llama eager")
SMALL = {  # fifty models of docs/models.md
    "torchvision": (
        *("alexnet", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "resnet18"),
        *("shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0", "googlenet", "inception_v3"),
    ),
    "timm": None,
    "transformers": None,
}


def zoo():
    sys.path.insert(0, str(BENCH))
    try:
        import zoo
    finally:
        sys.path.remove(str(BENCH))
    return zoo


def leaves_as_it_was(library, name):
    model, args, kwargs = zoo().build(library, name)
    inputs = kwargs or tuple(args)
    unchanged(model, lambda: ocsfast.inspect(model, inputs, 0.2), lambda: attach(model, inputs, 0.2))


@pytest.mark.parametrize("full", FEW)
def test_models_are_left_as_they_were(full):
    library, _, name = full.partition("/")
    pytest.importorskip(library)
    leaves_as_it_was(library, name)


@pytest.mark.slow
def test_many_models_are_left_as_they_were():
    """Forty at least, of all three libraries."""
    tried = 0
    for library, names in SMALL.items():
        pytest.importorskip(library)
        for name in names or zoo().names()[library][:: 8 if library == "timm" else 4]:
            leaves_as_it_was(library, name)
            tried += 1
    assert tried >= 40
