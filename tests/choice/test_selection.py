"""A check's launches, its one read, and what it keeps on a device."""

from collections.abc import Callable

import torch
from helpers.runs import run
from torch.profiler import ProfilerActivity, profile

from ocsfast.choice.selection import choose

# These allocate or name memory, and ask a tensor about itself: no device runs anything for them.
FREE = {"aten::new_empty", "aten::detach", "aten::resolve_conj", "aten::resolve_neg"}


def launches(call: Callable[[], object]) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        call()
    return [e.name for e in watched.events() if e.cpu_parent is None and e.name not in FREE]


def test_a_check_is_three_launches_and_one_read() -> None:
    _model, _, pruner = run()
    aim, coupled, lag = pruner._parts.aim, pruner._hooks.coupled, pruner.config.lag
    assert coupled is not None
    masks = [choose(aim, coupled.bound).mask for _ in range(lag)]
    # `.tolist()` reads, with no op of torch's.
    ours = ["ocsfast::group_saliency", "ocsfast::partition", "ocsfast::compare"]
    for before in (masks, masks[:1], []):
        assert launches(lambda before=before: choose(aim, coupled.bound, before=before, lag=lag)) == ours
    held = frozenset({0})
    choose(aim.without(held), coupled.bound)
    # Where layers are frozen too: what the aim has on the device is copied there once.
    assert launches(lambda: choose(aim.without(held), coupled.bound)) == ours


def test_an_aim_without_families_is_kept() -> None:
    aim = run()[2]._parts.aim
    assert aim.without(frozenset({1})) is aim.without(frozenset({1}))
    assert aim.without(frozenset({1})).limits[1] == 0
    assert aim.without(frozenset({0})).limits[1] == aim.limits[1] > 0
    device = torch.device("cpu")
    assert aim.without(frozenset({1})).on(device) is aim.without(frozenset({1})).on(device)
