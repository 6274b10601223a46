"""DistributedDataParallel, for real: two gloo processes on the CPU."""

import os
import time

import pytest
import torch
from helpers.networks import EPOCH, batch, net, sgd, train
from helpers.planted import Planted, PlantedError
from helpers.ranks import EPOCHS, RANKS, same_everywhere, smooth, spawn, step, whole_run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ocsfast
from ocsfast import StateError


def options():
    return {"example_inputs": batch(0)[0], "total_steps": EPOCHS * EPOCH}


def replicated(rank, folder, wrapped, more):
    """A run of two ranks, driven through the wrapper or through the module inside it."""
    model = smooth()
    optimizer = sgd(model)
    if wrapped:
        ddp = DistributedDataParallel(model, **more)
        pruner = ocsfast.attach(ddp, 0.5, optimizer=optimizer, **options())
    else:  # as frameworks do, which wrap what was attached
        pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, **options())
        ddp = DistributedDataParallel(model, **more)

    def drive():
        ocsfast.step(ddp if wrapped else model, 0.5)
        weights = [p.detach().double().sum().item() for p in model.parameters()]
        same_everywhere((weights, pruner.stage, pruner.mask.tolist()))
        return pruner

    masks = whole_run(ddp, optimizer, drive, rank)
    assert pruner._processes.is_first == (rank == 0)
    assert pruner.stage == "pruned"
    assert model.conv2.out_channels < 12
    torch.save((masks, model.state_dict()), f"{folder}/rank{rank}")


@pytest.mark.parametrize(
    ("wrapped", "more"),
    [
        (True, {}),
        (False, {"static_graph": True}),
        (True, {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 1}),
    ],
    ids=["plain", "static_graph", "unused"],
)
def test_two_ranks_equal_one_with_twice_the_batch(ranks, tmp_path, wrapped, more):
    ranks(replicated, tmp_path, wrapped, more)
    model = smooth()
    optimizer = sgd(model)
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, **options())

    def drive():
        pruner.step()
        return pruner

    masks = whole_run(model, optimizer, drive)
    for rank in range(RANKS):
        theirs, state = torch.load(tmp_path / f"rank{rank}")
        assert all(torch.equal(a, b) for a, b in zip(masks, theirs, strict=True))
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def by_one_line(rank):
    model = smooth()
    ddp = DistributedDataParallel(model)
    optimizer = sgd(ddp)
    for e in range(EPOCHS):
        for k in range(EPOCH):
            step(ddp, optimizer, e * EPOCH + k, rank)
        report = ocsfast.step(ddp, 0.5, total_steps=EPOCHS * EPOCH)
    assert report.stage == "pruned"
    with ddp.no_sync():
        step(ddp, optimizer, 0, rank)


def test_one_line_finds_everything_by_itself(ranks):
    ranks(by_one_line)


def wrapped_anew(rank):
    model = smooth()
    ddp = DistributedDataParallel(model)
    optimizer = sgd(model)
    cuts = 0
    for e in range(EPOCHS):
        for k in range(EPOCH):
            step(ddp, optimizer, e * EPOCH + k, rank)
        if ocsfast.step(ddp.module, 0.5, total_steps=EPOCHS * EPOCH).cut:
            ddp = DistributedDataParallel(ddp.module)
            cuts += 1
    assert cuts == 1


def test_the_module_inside_may_be_wrapped_anew_after_the_cut(ranks):
    ranks(wrapped_anew)


def attached(ratio=0.5, **more):
    """A wrapped model, its optimizer and pruner."""
    model = smooth()
    ddp = DistributedDataParallel(model)
    optimizer = sgd(model)
    return ddp, optimizer, ocsfast.attach(ddp, ratio, optimizer=optimizer, **options(), **more)


def between_steps(rank):
    ddp, optimizer, pruner = attached()
    with ddp.no_sync():
        step(ddp, optimizer, 0, rank)
        with pytest.raises(StateError, match="no_sync"):
            pruner.cut()
    # A step that the other rank does not take: the check in it meets the other's cut.
    one_sided = optimizer.step if rank == 1 else pruner.cut
    with pytest.raises(StateError, match="drifted apart: progress of rank 1"):
        one_sided()
    assert pruner.stage == "observe"


def test_a_cut_within_no_sync_or_after_other_steps_is_refused(ranks):
    ranks(between_steps)


def other_arguments(rank):
    ddp, optimizer, pruner = attached(0.5 if rank == 0 else 0.4, check_every="call")
    step(ddp, optimizer, 1, rank)
    with pytest.raises(StateError, match="drifted apart: ratio of rank 1"):
        pruner.cut()
    assert pruner.stage == "observe"


def test_ranks_with_other_ratios_are_refused(ranks):
    ranks(other_arguments)


def other_models(rank):
    model = smooth()
    optimizer = sgd(model)
    if rank == 1:
        model.fc2.double()
    ddp = DistributedDataParallel(model.fc1)
    ddp.module = model  # so that the forward pass of the odd rank is not needed
    pruner = ocsfast.attach(ddp, 0.5, optimizer=optimizer, **options())
    with pytest.raises(StateError, match="drifted apart: dtypes of rank 1"):
        pruner.cut()
    ddp.mixed_precision = object()
    with pytest.raises(StateError, match=r"Give ocsfast\.step the module inside"):
        pruner.cut()
    assert pruner.stage == "observe"


def test_ranks_with_other_dtypes_and_wrappers_in_mixed_precision_are_refused(ranks):
    ranks(other_models)


def not_rebuilt(rank):
    """New buckets cannot be made: the cut is undone, the old ones work, and a later cut is made."""
    ddp, optimizer, pruner = attached()
    model = ddp.module
    step(ddp, optimizer, 0, rank)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        planted = Planted(patch, (DistributedDataParallel, "_ddp_init_helper"))
        planted.plant(0)
        with pytest.raises(PlantedError):
            pruner.cut()
    assert pruner.stage == "observe"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    for k in (1, 2):
        step(ddp, optimizer, k, rank)
        same_everywhere([p.detach().double().sum().item() for p in model.parameters()])
        if k == 1:
            pruner.cut()
            assert model.conv2.out_channels < 12


def test_a_cut_is_undone_where_the_wrapper_cannot_be_rebuilt(ranks):
    ranks(not_rebuilt)


def dies(rank, folder):
    ddp, optimizer, pruner = attached()
    model = ddp.module
    for e in range(EPOCHS):
        for k in range(EPOCH):
            step(ddp, optimizer, e * EPOCH + k, rank)
        if e == 5 and rank == 1:
            os._exit(9)  # as if it were killed
        if e == 5:
            try:
                pruner.cut()
            except Exception as error:
                with open(f"{folder}/survivor", "w") as file:
                    file.write(repr(error))
                os._exit(3)
        pruner.step()
        if rank == 0:
            parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
            torch.save({n: part.state_dict() for n, part in parts.items()}, f"{folder}/checkpoint")


def goes_on(rank, folder):
    model = smooth(seed=4)
    optimizer = sgd(model)
    ddp = DistributedDataParallel(model)
    pruner = ocsfast.attach(ddp, 0.5, optimizer=optimizer, **options())
    state = torch.load(f"{folder}/checkpoint", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    pruner.load_state_dict(state["pruner"])
    whole_run(ddp, optimizer, lambda: pruner.step() and None, rank, first=5)
    torch.save(model.state_dict(), f"{folder}/end{rank}")
    replicated(rank, folder, True, {})


def test_a_killed_rank_ends_the_others_and_the_run_goes_on_from_its_checkpoint(ranks, tmp_path):
    begun = time.perf_counter()
    codes = spawn(dies, tmp_path)
    assert codes == [3, 9], codes
    assert time.perf_counter() - begun < 150
    ranks(goes_on, tmp_path)
    _, whole = torch.load(tmp_path / "rank0")
    for rank in range(RANKS):
        for key, value in torch.load(tmp_path / f"end{rank}").items():
            assert torch.equal(value, whole[key]), key


def test_synchronized_batch_norms_are_cut_like_others():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    pruner = ocsfast.attach(model, 0.5, optimizer=sgd(model), example_inputs=batch(0)[0])
    pruner.cut()
    assert isinstance(model.bn1, nn.SyncBatchNorm)
    assert model.bn2.num_features == model.conv2.out_channels < 12
    model.eval()(batch(0)[0])


def test_without_processes_nothing_is_searched(monkeypatch):
    import gc

    model = net()
    optimizer = sgd(model)
    pruner = ocsfast.attach(model, 0.5, optimizer=optimizer, **options())
    train(model, optimizer, 2)
    monkeypatch.setattr(gc, "get_objects", lambda: pytest.fail("searched"))
    pruner.cut()
