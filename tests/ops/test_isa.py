"""The CPU's instruction sets give the same bits."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from helpers.builders import draw_mask, mixed_case
from helpers.processes import interpreter

from ocsfast.core.criteria import CRITERIA
from ocsfast.ops import functions as ops


def digest_everything(isa: str, file: Path) -> None:
    """A digest of what every op gives; the set is chosen where an op is first called in a process."""
    os.environ["OCSFAST_ISA"] = isa
    digest = hashlib.sha256()
    one, lr = torch.tensor(0.3), torch.tensor(0.1, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for channels_last in (False, True):
            made = mixed_case(dtype, channels_last=channels_last)
            made.parameters["up.weight"][3, 5] = 1e-41  # a denormal, where the dtype has it
            bound, mask = made.bound(), draw_mask(made.plan, 0.4)
            gen = torch.Generator().manual_seed(1)
            grads, momenta = (
                [torch.empty_like(w).copy_(torch.randn(w.shape, generator=gen)) for w in made.weights]
                for _ in range(2)
            )
            results = []
            for criterion in CRITERIA:
                others = () if not CRITERIA[criterion].x else grads
                results += ops.group_saliency(bound, criterion, others)
            ops.shrink_(bound, mask, one)
            ops.lasso_grad_(bound, grads, mask, one)
            penalty = ops.Penalty(mask, one, one)
            for options in ({}, {"nesterov": True, "weight_decay": 0.1, "dampening": 0.2}):
                ops.sgd_step_(bound, grads, momenta, lr, momentum=0.9, penalty=penalty, **options)
            squares = [t.abs() for t in momenta]
            steps = [torch.tensor(2.0) for _ in grads]
            ops.adamw_step_(bound, grads, momenta, squares, steps, lr, penalty=penalty)
            for tensor in (
                *results,
                *bound.weights,
                *grads,
                *momenta,
                *squares,
                *ops.group_saliency(bound),
            ):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    file.write_text(digest.hexdigest())


def test_the_same_bits_with_every_instruction_set(tmp_path: Path) -> None:
    digests = {}
    for isa in ("baseline", "avx2", ""):
        file = tmp_path / "digest"
        assert interpreter().start(digest_everything, isa, file).code() == 0
        digests[isa] = file.read_text()
    assert len(set(digests.values())) == 1, digests
