"""The short program that a GPU's sanitizers run."""

from __future__ import annotations

import pytest
import smoke
import torch


def test_every_op_is_called(capsys: pytest.CaptureFixture[str], device: str) -> None:
    smoke.main(["--device", device])
    called = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]}
    schemas = (schema.name for schema in torch._C._jit_get_all_schemas())
    registered = {name.removeprefix("ocsfast::") for name in schemas if name.startswith("ocsfast::")}
    assert called == registered - {"bind"}
