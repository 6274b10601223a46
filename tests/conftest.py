from __future__ import annotations

import pytest
import torch

if torch.cuda.is_available():  # TF32 has three digits, too few where results are compared
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, in turn."""
    return str(request.param)
