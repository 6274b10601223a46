"""Random networks: whatever the labels say may go, going equals zero.

OCSFAST_RANDOM_GRAPHS=2000 runs that many instead of a fixed few, all of them new each time.
"""

from __future__ import annotations

import copy
import os
from collections import Counter

import pytest
import torch
from helpers.random_networks import Watched, networks
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from ocsfast.cut.removal import cut_model
from ocsfast.grouping.engines import by_labels
from ocsfast.grouping.macs import count_macs
from ocsfast.grouping.proof.trials import Trial
from ocsfast.grouping.scope import Scope
from ocsfast.ops.cost import build_cost_model

EXAMPLES = int(os.environ.get("OCSFAST_RANDOM_GRAPHS", "25"))
seen: Counter[str] = Counter()


def silent(difference: str | None) -> bool:
    """Whether a trial found other numbers, rather than module code that raised."""
    return difference is not None and difference.startswith(("outputs", "an output", "another number"))


def check(model: nn.Module) -> None:
    x = torch.randn(2, 3, 4, 4)
    families, setting = by_labels(model, (x,), {}, Scope())
    seen["networks"] += 1
    seen[f"{len(setting.runs)} graphs"] += 1
    if isinstance(model, Watched):
        seen.update(how for how, _ in model.taps.values())
    assert not families.notes, families.notes
    seen["families"] += len(families.families)
    with torch.no_grad():
        torch.manual_seed(1)
        trial = Trial(model, families, setting)
        able = []
        for f, family in enumerate(families.families):
            difference = trial.difference([f])
            assert not silent(difference), f"{family}: {difference}"
            if difference is None:
                able.append(f)
            else:
                seen["raised"] += 1
                seen[f"raised: {difference[:60]}"] += 1
        if not able:
            return
        difference = trial.difference(able)
        assert not silent(difference), f"all families: {difference}"
        if difference is not None:
            seen["raised together"] += 1
            return
        pruned = torch.zeros(families.num_groups, dtype=torch.bool)
        for f in able:
            family = families.families[f]
            pruned[family.first + torch.randperm(family.size)[: max(1, family.size // 3)]] = True
        subject = copy.deepcopy(model).eval()
        left = cut_model(subject, families, pruned)
        sizes = [f.size for f in left.families]
        predicted = build_cost_model(left, left.macs, "MACs")(torch.tensor(sizes))
        assert int(predicted) * 2 == count_macs(lambda: subject(x))


common = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "database": None,
    "print_blob": True,
}


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=25, derandomize=True, phases=[Phase.generate], **common)
@given(networks())
def test_cutting_random_networks_equals_zeroing(model: nn.Module) -> None:
    check(model)


@pytest.mark.slow
@pytest.mark.skipif("OCSFAST_RANDOM_GRAPHS" not in os.environ, reason="set OCSFAST_RANDOM_GRAPHS=2000")
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=EXAMPLES, **common)
@given(networks())
def test_many_random_networks(model: nn.Module) -> None:
    check(model)
