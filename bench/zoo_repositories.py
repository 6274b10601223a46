"""Models of people's own packages, small and with random weights, as bench/models.py groups them.

The versions are in bench/requirements-zoo.txt, which says how to install them. A package that is absent
is left out.
"""

from __future__ import annotations

from zoo_images import GENERATION, MEDICAL, PYTORCHCV, RESTORATION, SEGMENTATION, VISION
from zoo_rows import Row
from zoo_signals import SEQUENCES, SOUND, TABLES

MODELS: dict[str, Row] = {
    **SEGMENTATION,
    **RESTORATION,
    **PYTORCHCV,
    **VISION,
    **MEDICAL,
    **GENERATION,
    **SOUND,
    **TABLES,
    **SEQUENCES,
}
