"""All that is slow to import, for the interpreters of `helpers.processes`."""

from __future__ import annotations

import importlib

import ocsfast.grouping.engines  # noqa: F401

for _name in (
    *("pytest", "numpy.ma", "torch.nn.parallel", "torch._dynamo"),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    # torch.export imports these when it is first called.
    *("torch.export._trace", "torch._export.non_strict_utils", "torch.fx.experimental.validator"),
    *("torch._inductor.sizevars", "torch._subclasses.schema_check_mode"),
    *("torch._inductor.fx_passes.dedupe_symint_uses", "torch._export.passes._node_metadata_hook"),
    "torch._export.passes.replace_autocast_with_hop_pass",
):
    importlib.import_module(_name)
