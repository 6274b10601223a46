from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.ranks import Ranks

if torch.cuda.is_available():  # TF32 has three digits, too few where results are compared
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine, in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes of one gloo group: `ranks(worker, *args)` runs worker(rank, *args) in both."""
    both = Ranks()
    yield both
    both.end()
